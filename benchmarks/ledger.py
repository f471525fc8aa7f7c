"""The grading pipeline without its model, and the ledger at a size that nights of grading reach.

    python -m benchmarks.ledger [--quick]

Pipeline: `label_pairs` on candidate pairs of a synthetic shop, texts, tokens and Ray Data as in earnest, with a stub in
the engine's place that answers at once. Reported are pairs/s without the model and the memory of the driver over the
run, which must stay flat. Ledger: appends of 10,000 rows and the search for 100,000 pairs at two sizes, the larger ten
times the smaller. No peer does this; `ratios` compare with growth in proportion: above 1 is better than linear.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
from deltalake import write_deltalake

import ray_apps.label
from benchmarks.label_throughput import untuned
from embeddings.labeller import LabellerCard, LabellerRecipe
from jobs import label_pairs
from lake import ledger, tables
from lake.ledger import Ledger
from lake.schemas import CANDIDATE_PAIR, CATALOG_PRODUCT, PAIR_GRADE, QUERY, TableSpec
from lake.storage import Lake
from ray_apps.placements import LabelPlacement

WORDS = ("red", "blue", "green", "steel", "oak", "lamp", "shoe", "table", "drill", "hose", "chair", "paint", "kettle")
APPEND_ROWS, ASKED = 10_000, 100_000
FILL_ROWS = 500_000


def write(lake: Lake, spec: TableSpec, columns: dict[str, Any]) -> None:
    """Rows of a table that another engine owns."""
    size = len(next(iter(columns.values())))
    whole = {column.name: columns.get(column.name, pa.nulls(size, column.type)) for column in spec.columns}
    write_deltalake(lake.table(spec.name), pa.table(whole, schema=spec.schema), mode="append")


def fill_shop(lake: Lake, num_pairs: int) -> None:
    """A thousand products, as many queries as the pairs need, and every pair of them as a candidate."""
    rng, num_products = np.random.default_rng(0), 1000
    num_queries = num_pairs // num_products
    titles = [" ".join(rng.choice(WORDS, 8)) + f" {number}" for number in range(num_products)]
    texts = [" ".join(rng.choice(WORDS, 3)) + f" {number}" for number in range(num_queries)]
    ids = {"q": [f"q{n:05d}" for n in range(num_queries)], "p": [f"p{n:05d}" for n in range(num_products)]}
    hashes = {side: [f"{name}-" + "0" * 58 for name in names] for side, names in ids.items()}
    plain = {"dataset": ["shop"] * num_queries, "split": ["train"] * num_queries}
    write(lake, QUERY, plain | {"query_id": ids["q"], "text": texts, "normalised": texts, "query_hash": hashes["q"]})
    products = {"dataset": ["shop"] * num_products, "product_id": ids["p"], "title": titles}
    write(lake, CATALOG_PRODUCT, products | {"product_hash": hashes["p"]})
    query_N, product_N = np.divmod(np.arange(num_queries * num_products), num_products)
    pairs = {"dataset": pa.array(["shop"] * len(query_N)), "source": pa.array(["sampled"] * len(query_N))}
    pairs |= {"query_id": pa.array(ids["q"]).take(pa.array(query_N))}
    write(lake, CANDIDATE_PAIR, pairs | {"product_id": pa.array(ids["p"]).take(pa.array(product_N))})


def stub(_folder: str, _card: LabellerCard, _placement: LabelPlacement) -> Callable[[Any], Any]:
    """In the place of the engine: every pair gets the same distribution."""

    def answer(batch: pa.Table) -> pa.Table:
        values = pa.array([[0.2, 0.3, 0.5]] * len(batch), pa.list_(pa.float64()))
        cost = {"cached_tokens": pa.array([0] * len(batch)), "answered": pa.array([0.0] * len(batch))}
        kept = {name: batch[name] for name in batch.column_names if name != "tokenized_prompt"}
        return pa.table(kept | cost | {"probability": values})

    return lambda encoded: encoded.map_batches(answer, batch_format="pyarrow", batch_size=None)


class Memory(threading.Thread):
    """Resident memory of this process, twice a second."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.mib: list[tuple[float, float]] = []
        self.ended = threading.Event()

    def run(self) -> None:
        """Samples until `ended` is set."""
        own = psutil.Process()
        while not self.ended.wait(0.5):
            self.mib.append((time.monotonic(), own.memory_info().rss / 2**20))

    def at(self, moments: Sequence[float]) -> list[int]:
        """MiB at some moments."""
        times, values = np.array(self.mib).T
        return [round(float(np.interp(moment, times, values))) for moment in moments]


def run_pipeline(num_pairs: int, scratch: Path) -> dict[str, Any]:
    """Pairs per second without the model, and the driver's memory at tenths of the run's answers."""
    lake = Lake(str(scratch / "pipeline"))
    fill_shop(lake, num_pairs)
    # the demo's backbone, not tuned: the stub never asks it
    folder, marks = untuned(scratch, LabellerRecipe()), []
    plain_write = Ledger.append

    def append(self: Ledger, rows: pa.Table, *, run_id: str) -> int:
        written = plain_write(self, rows, run_id=run_id)
        marks.append((time.monotonic(), written))
        return written

    config = label_pairs.Config(
        lake=lake.root,
        inputs=label_pairs.Inputs(labeller=folder),
        placement=LabelPlacement(engine="vllm", part_rows=APPEND_ROWS, batch_rows=1000),
    )
    ray_apps.label._processor, Ledger.append = stub, append  # type: ignore[method-assign]
    memory = Memory()
    memory.start()
    began = time.monotonic()
    record = label_pairs.run(config)
    seconds = time.monotonic() - began
    memory.ended.set()
    Ledger.append = plain_write  # type: ignore[method-assign]
    assert record.counts["labelled"] == num_pairs
    tenths = [marks[int(share * (len(marks) - 1))][0] for share in np.linspace(0, 1, 11)]
    began = time.monotonic()
    assert label_pairs.run(config).counts["reused"] == num_pairs
    return {
        "pairs": num_pairs,
        "seconds": round(seconds, 1),
        "pairs_per_sec": round(num_pairs / seconds),
        "pairs_per_sec_from_first_answer": round((num_pairs - marks[0][1]) / (marks[-1][0] - marks[0][0])),
        "driver_mib_at_tenths": memory.at(tenths),
        "second_run_sec": round(time.monotonic() - began, 1),
        "ledger_files": len(tables.open_table(lake, PAIR_GRADE).file_uris()),
    }


def ledger_rows(rng: np.random.Generator, size: int) -> pa.Table:
    """Rows with addresses and hashes by chance."""
    columns: dict[str, pa.Array] = {}
    for column in PAIR_GRADE.columns:
        if column.unit == "hex" and column.name != "supersedes":
            columns[column.name] = pa.array([rng.bytes(32).hex() for _ in range(size)])
        elif column.type == pa.string():
            columns[column.name] = pa.array(["x"] * size)
        elif column.name == "created_at":
            columns[column.name] = pa.array([datetime.now(UTC)] * size, column.type)
        else:
            columns[column.name] = pa.array(np.full(size, 1 if column.name == "grade" else 1 / 3), column.type)
    return pa.table(columns, schema=PAIR_GRADE.schema)


def time_ledger(lake: Lake, size: int, rng: np.random.Generator) -> dict[str, float]:
    """Fills the ledger up to a size, and times appends and the search for pairs there."""
    held = sum(tables.open_table(lake, PAIR_GRADE).get_add_actions(flatten=True)["num_records"].to_pylist())
    while held < size:
        rows = ledger_rows(rng, min(FILL_ROWS, size - held))
        write_deltalake(lake.table(PAIR_GRADE.name), rows, mode="append")
        held += len(rows)
    fresh = ledger_rows(rng, ASKED)
    half = tables.rows(lake, PAIR_GRADE, columns=["address"])["address"].slice(0, ASKED // 2)
    asked = pa.concat_arrays([half.combine_chunks(), fresh["address"].slice(ASKED // 2).combine_chunks()])
    began = time.monotonic()
    book = Ledger(lake, asked)
    found = int(book.holds(asked).sum())
    search_sec = time.monotonic() - began
    assert found == ASKED // 2
    appended = []
    for start in range(0, 5 * APPEND_ROWS, APPEND_ROWS):
        began = time.monotonic()
        book.append(fresh.slice(ASKED // 2 + start, APPEND_ROWS), run_id="benchmark")
        appended.append(time.monotonic() - began)
    began = time.monotonic()
    ledger.newest_of_pairs(lake, fresh["query_hash"].slice(0, 1000), fresh["product_hash"].slice(0, 1000))
    return {
        "rows": size,
        "search_100k_sec": round(search_sec, 3),
        "append_10k_sec": round(float(np.median(appended)), 3),
        "newest_of_1k_pairs_sec": round(time.monotonic() - began, 3),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Runs both parts; the last line is JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="100,000 pairs, ledgers of 100,000 and a million rows")
    quick = parser.parse_args(argv).quick
    num_pairs, sizes = (100_000, (100_000, 1_000_000)) if quick else (1_000_000, (1_000_000, 10_000_000))
    with tempfile.TemporaryDirectory() as scratch:
        pipeline = run_pipeline(num_pairs, Path(scratch))
        print(json.dumps(pipeline), flush=True)
        lake, rng = Lake(str(Path(scratch, "ledger"))), np.random.default_rng(0)
        tables.create(lake, PAIR_GRADE)
        timed = []
        for size in sizes:
            timed.append(time_ledger(lake, size, rng))
            print(json.dumps(timed[-1]), flush=True)
        began = time.monotonic()
        removed = ledger.compact(lake, from_files=2)
        compacted = {"files_removed": removed, "compact_sec": round(time.monotonic() - began, 1)}
    growth = sizes[1] / sizes[0]
    names = ("search_100k_sec", "append_10k_sec", "newest_of_1k_pairs_sec")
    ratios = {name.removesuffix("_sec"): round(growth * timed[0][name] / timed[1][name], 2) for name in names}
    told = {"benchmark": "ledger", "pipeline": pipeline, "ledger": timed, "compaction": compacted, "ratios": ratios}
    print(json.dumps(told))
    return 0


if __name__ == "__main__":
    sys.exit(main())
