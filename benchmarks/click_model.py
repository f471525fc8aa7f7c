"""The click model of a log: the fit in Spark beside the same rounds in NumPy, with all counts in memory.

    python -m benchmarks.click_model [--quick] [--impressions N]

A shop of known examinations: 20,000 queries of uneven traffic, lists of 20 out of a query's 40 products, drawn anew
for each session by attraction and chance, shoppers who look at place k in k^-0.7 of the sessions. 10 million
impressions, --quick one million; both fits read the same counts per pair and place. Starting Spark and reading the
counts is told apart; the first pass over them, which keeps what the rounds read, is part of the fit. NumPy takes plain
rounds, twenty for each of Spark's, which jumps ahead: by then both stand still.

The last line is JSON; `difference` is the largest between the two fits' examinations, `error` the largest relative one
of Spark's to the truth at places 1 to 10, `numpy` seconds of NumPy's fit over Spark's.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from lake.spark import SparkPlacement, session
from spark_etl.click_model import bin_of, fit_click_models
from spark_etl.recipes import ClickModelRecipe

QUERIES, CANDIDATES, LIST = 20_000, 40, 20
SESSIONS_AT_ONCE = 50_000
LOOK_K = np.arange(1, LIST + 1) ** -0.7


def write_counts(folder: Path, impressions: int) -> int:
    """Impressions and clicks of every pair and place as Parquet; the number of rows."""
    generator = np.random.default_rng(0)
    attraction_QC = generator.beta(1.0, 8.0, size=(QUERIES, CANDIDATES))
    shown, clicks = (np.zeros(QUERIES * CANDIDATES * LIST, dtype=np.int64) for _ in range(2))
    for start in range(0, impressions // LIST, SESSIONS_AT_ONCE):
        count = min(SESSIONS_AT_ONCE, impressions // LIST - start)
        query_S = np.minimum(generator.zipf(1.3, count), QUERIES) - 1
        liked_SC = attraction_QC[query_S] + generator.normal(scale=0.1, size=(count, CANDIDATES))
        product_SK = np.argsort(-liked_SC, axis=1)[:, :LIST]
        chance_SK = np.take_along_axis(attraction_QC[query_S], product_SK, axis=1) * LOOK_K
        cell_SK = (query_S[:, None] * CANDIDATES + product_SK) * LIST + np.arange(LIST)
        shown += np.bincount(cell_SK.ravel(), minlength=len(shown))
        clicked = generator.random(chance_SK.shape) < chance_SK
        clicks += np.bincount(cell_SK[clicked], minlength=len(clicks))
    cell_N = np.flatnonzero(shown)
    pair_N, place_N = np.divmod(cell_N, LIST)
    query_N, product_N = np.divmod(pair_N, CANDIDATES)
    columns = {
        "dataset": pa.array(["shop"] * len(cell_N)),
        "query_id": pa.array(query_N).cast(pa.string()),
        "product_id": pa.array(product_N).cast(pa.string()),
        "position": pa.array(place_N + 1, pa.int32()),
        "impressions": pa.array(shown[cell_N]),
        "clicks": pa.array(clicks[cell_N]),
    }
    pq.write_table(pa.table(columns), folder / "counts.parquet")
    return len(cell_N)


def by_numpy(table: pa.Table, first_K: NDArray[np.int64], rounds: int) -> NDArray[np.float64]:
    """So many plain rounds of the same fit, from the same beginning."""
    pair_N = np.unique(
        table["query_id"].to_numpy(zero_copy_only=False).astype(np.int64) * CANDIDATES
        + table["product_id"].to_numpy(zero_copy_only=False).astype(np.int64),
        return_inverse=True,
    )[1]
    bin_N = np.searchsorted(first_K, table["position"].to_numpy(), side="right") - 1
    shown_PK, clicks_PK = (np.zeros((pair_N.max() + 1, len(first_K))) for _ in range(2))
    np.add.at(shown_PK, (pair_N, bin_N), np.maximum(table["impressions"].to_numpy(), table["clicks"].to_numpy()))
    np.add.at(clicks_PK, (pair_N, bin_N), table["clicks"].to_numpy())
    rate_K = clicks_PK.sum(axis=0) / shown_PK.sum(axis=0)
    look_K = np.clip(rate_K / rate_K[0], 1e-6, 1)
    kept = (clicks_PK.sum(axis=1) > 0) & ((shown_PK > 0).sum(axis=1) > 1)
    shown_PK, clicks_PK = shown_PK[kept], clicks_PK[kept]
    for _ in range(rounds):
        attraction_P = clicks_PK.sum(axis=1) / (shown_PK @ look_K)
        found_K = clicks_PK.sum(axis=0) / (attraction_P @ shown_PK)
        look_K = np.clip(found_K / found_K[0], 1e-6, 1)
    return look_K


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--impressions", type=int)
    given = parser.parse_args()
    impressions = given.impressions or (1_000_000 if given.quick else 10_000_000)
    recipe, found = ClickModelRecipe(), dict[str, Any]()
    with tempfile.TemporaryDirectory() as place:
        found["rows"] = write_counts(Path(place), impressions)
        started = time.monotonic()
        spark = session(SparkPlacement())
        counts = spark.read.parquet(f"{place}/counts.parquet").persist()
        counts.select(bin_of(counts["position"], recipe)).groupBy().count().collect()
        found["start_seconds"] = time.monotonic() - started
        started = time.monotonic()
        (model,) = fit_click_models(counts, recipe)
        found["spark_seconds"], found["rounds"] = time.monotonic() - started, len(model.rounds)
        table = pq.read_table(f"{place}/counts.parquet")
        started = time.monotonic()
        look_K = by_numpy(table, np.array(model.first_position_K), 20 * len(model.rounds))
        found["numpy_seconds"] = time.monotonic() - started
        spark.stop()
    ours_K = np.array(model.examination_K)
    found["difference"] = float(np.abs(ours_K - look_K).max())
    found["error"] = float(np.abs(ours_K[:10] / LOOK_K[:10] - 1).max())
    ratios = {"numpy": found["numpy_seconds"] / found["spark_seconds"]}
    print(json.dumps({"benchmark": "click_model", "impressions": impressions, **found, "ratios": ratios}))


if __name__ == "__main__":
    main()
