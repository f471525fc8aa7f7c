"""Queries per second of exact mining: ours beside sentence-transformers' miner and one FAISS index in memory.

    python -m benchmarks.mining [--quick] [--products N] [--titles N] [--queries N] [--rounds N]

  ours            `ray_apps.mine` over a pool of two actors of one thread each, over float16 files mapped into memory;
  ours_process    the same search in one process of two threads, `embeddings.exact`;
  bare_faiss      faiss.IndexFlatIP with all vectors in memory, two threads, all queries in one call;
  st_faiss        sentence_transformers.util.mine_hard_negatives with FAISS, as its documents advise for many products;
  st_torch        the same without FAISS, 512 queries at a time, since its own 16,384 need 26 GB of scores;
  ivf_flat, ivf_pq, hnsw
                  `ray_apps.mine` with such an index, where --contestants asks for it: building it is told apart, the
                  probe of its recall that every run makes is not;
  job             `mine_hard_pairs` itself, where --contestants asks for it, over a lake made of these vectors: queries
                  are encoded, the catalogue is read, pairs are written.

All find 100 products for each query on the same vectors of MiniLM-L6: titles below ASSAY_DATA/titles, and beyond their
number vectors derived from them by noise. Queries are first words of titles. Each contestant of a round is a process of
its own, one after the other; its start, and the time that the miner's encoder calls take, are left out. Memory is the
most anonymous memory of any one process that searches, mapped files apart; what the process that hands out work holds
is driver_mb in the last line. --quick encodes 30,000 titles, derives the rest and asks 4,000 queries. The last line is
JSON; above 1 is ours better; `recall` is of ours against the neighbours that FAISS finds in float32, of an index
against those of ours.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Final

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from embeddings.vectors import CatalogVectors, VectorStore, write_vectors

K: Final = 100
CONTESTANTS: Final = ("ours", "ours_process", "bare_faiss", "st_faiss", "st_torch")
INDEXES: Final = ("ivf_flat", "ivf_pq", "hnsw")
QUICK_TITLES, QUICK_QUERIES, QUERIES = 30_000, 4_000, 10_000
NOISE: Final = 0.5
"""Length of the noise of a derived vector, whose cosine with its origin is about .9."""
_FILE_ROWS: Final = 20_000
_STRIDE: Final = 7_919
"""A prime: its multiples are all products, in another order."""
_ST_QUERIES: Final = 512


@contextmanager
def watched(found: dict[str, Any]) -> Iterator[None]:
    """Notes seconds and the most anonymous memory in MB of any search actor, or of this process where none is.

    What this process holds of its own, beside others that search, is `driver_mb`.
    """
    stop, most = threading.Event(), {"driver": 0.0, "searcher": 0.0}

    def watch() -> None:
        own = psutil.Process()
        while not stop.wait(0.2):
            for process in [own, *own.children(recursive=True)]:
                kind = "driver" if process == own else "searcher"
                try:
                    if process == own or "_Searcher" in process.name():
                        most[kind] = max(most[kind], _anonymous_mb(process.pid))
                except (OSError, psutil.Error):
                    continue

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    started = time.monotonic()
    try:
        yield
    finally:
        found["seconds"] = time.monotonic() - started
        stop.set()
        watcher.join()
        found["anonymous_mb"] = most["searcher"] or most["driver"]
        found["driver_mb"] = most["driver"]


def _anonymous_mb(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024 / 1e6
    return 0.0


def prepare(folder: Path, products: int, queries: int, titles: int) -> None:
    """Writes vectors of products and queries below the folder, those of titles once for all sizes."""
    import torch

    from embeddings.backbone import has_fast_bf16
    from embeddings.encoder import build_encoder, encode
    from embeddings.recipes import EncoderRecipe

    place = folder / f"products-{products}"
    if (folder / f"queries-{products}.npy").is_file() and _words(folder, products).is_file():
        return
    torch.set_num_threads(2)
    model, fast = build_encoder(EncoderRecipe()), has_fast_bf16()
    texts = pq.read_table(Path(os.environ["ASSAY_DATA"], "titles", "titles.parquet"), columns=["title"])["title"]
    names = list(dict.fromkeys(texts.to_pylist()))
    generator = np.random.default_rng(0)
    # all catalogues in any part of it, as the file has them one after the other
    names = [names[at] for at in generator.permutation(len(names))][:titles]
    encoded = VectorStore(folder / "titles")
    for start in range(0, min(len(names), products), _FILE_ROWS):
        part = names[start : start + _FILE_ROWS]
        if not Path(encoded.path_of(part)).is_file():
            vectors = encode(model, part, "document", batch_tokens=8192, bf16=fast)
            write_vectors(encoded.path_of(part), vectors, part, kind="float16")
    known = encoded.vectors(pa.array(names, pa.string()))
    store = VectorStore(place)
    for start in range(0, products, _FILE_ROWS):
        row_N = np.arange(start, min(start + _FILE_ROWS, products))
        vector_ND = known.take(row_N % len(known))
        noise = generator.normal(size=vector_ND.shape).astype(np.float32)
        noise *= NOISE * (row_N >= len(known))[:, None] / np.linalg.norm(noise, axis=1, keepdims=True)
        vector_ND += noise
        vector_ND /= np.linalg.norm(vector_ND, axis=1, keepdims=True)
        hashes = [f"p{row}" for row in row_N]
        write_vectors(store.path_of(hashes), vector_ND, hashes, kind="float16")
    words = [" ".join(names[at].split()[:3]) for at in generator.integers(len(names), size=queries)]
    _words(folder, products).write_text("\n".join(words), encoding="utf-8")
    np.save(folder / f"queries-{products}.npy", encode(model, words, "query", batch_tokens=8192, bf16=fast))


def catalog(folder: Path, products: int) -> tuple[CatalogVectors, NDArray[np.float32]]:
    """The vectors of products, and of queries."""
    place = folder / f"products-{products}"
    # not through a list: of 10 million strings it would be most of the memory that is measured
    names = pc.binary_join_element_wise("p", pa.array(np.arange(products)).cast(pa.string()), "")
    return VectorStore(place).vectors(names), np.load(folder / f"queries-{products}.npy")


def ours(folder: Path, products: int, found: dict[str, Any]) -> NDArray[np.int64]:
    """By a pool of actors, whose start is left out."""
    from ray_apps.cluster import RayPlacement, connect
    from ray_apps.mine import Search, SearchJob, SearchPool

    vectors, query_QD = catalog(folder, products)
    connect(RayPlacement(address="local", num_cpus=2))
    first = np.arange(len(vectors)) < K
    with SearchPool(2, 1) as pool:
        pool.run(SearchJob(Search(vectors, query_QD[:4096], first), K, 2, ""))
        with watched(found):
            job = SearchJob(Search(vectors, query_QD), K, 2, "")
            pool.run(job)
            rows = job.neighbours().row_QK
    return rows


def indexed(folder: Path, products: int, found: dict[str, Any], *, kind: Any) -> NDArray[np.int64]:
    """By an actor of two threads with an index, which is built first."""
    from embeddings.index_recipe import IndexRecipe
    from ray_apps.cluster import RayPlacement, connect
    from ray_apps.mine import Search, SearchJob, SearchPool

    vectors, query_QD = catalog(folder, products)
    connect(RayPlacement(address="local", num_cpus=2))
    building: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=folder) as place, SearchPool(1, 2, uses_index=True) as pool:
        recipe = IndexRecipe(kind=kind)
        with watched(building):
            pool.run(SearchJob(Search(vectors, query_QD[:1], index=recipe, index_folder=place), K, 1, ""))
        found["build_seconds"], found["build_anonymous_mb"] = building["seconds"], building["anonymous_mb"]
        found["index_mb"] = sum(path.stat().st_size for path in Path(place).rglob("part-*")) / 1e6
        with watched(found):
            job = SearchJob(Search(vectors, query_QD, index=recipe, index_folder=place), K, 1, "")
            pool.run(job)
            rows = job.neighbours().row_QK
    return rows


def job(folder: Path, products: int, found: dict[str, Any]) -> None:
    """By `mine_hard_pairs`, over a lake that another process makes: this one shall hold what the job holds."""
    from jobs import mine_hard_pairs

    with tempfile.TemporaryDirectory(dir=folder) as place:
        command = [sys.executable, "-m", "benchmarks.mining", "--lake", place, "--folder", str(folder)]
        subprocess.run([*command, "--products", str(products)], check=True, capture_output=True)
        with watched(found):
            mine_hard_pairs.run(mine_hard_pairs.Config(lake=place, inputs=mine_hard_pairs.Inputs(model="model")))


def write_lake(root: str, folder: Path, products: int) -> None:
    """A lake of these vectors, with their encoder, in which every query has one judged product."""
    from embeddings.encoder import build_encoder, save_encoder
    from embeddings.recipes import EncoderRecipe
    from embeddings.text import TextRecipe
    from jobs.job import content_hash
    from lake.storage import Lake

    lake = Lake(root)
    save_encoder(build_encoder(EncoderRecipe()), lake.path("model"), {"text": TextRecipe()})
    store = Path(lake.path("vectors", content_hash(lake.path("model")), "shop", "float16"))
    store.mkdir(parents=True)
    for path in (folder / f"products-{products}").iterdir():
        (store / path.name).symlink_to(path.resolve())
    _write_tables(lake, products, _words(folder, products).read_text(encoding="utf-8").splitlines())


def _words(folder: Path, products: int) -> Path:
    """The file of the queries' texts."""
    return folder / f"queries-{products}.txt"


def _write_tables(lake: Any, products: int, texts: Sequence[str]) -> None:
    """The tables that mining reads, the products in another order than that of their vectors."""
    from deltalake import write_deltalake

    from lake import tables
    from lake.schemas import CATALOG_PRODUCT, QUERY, TRAINING_INSTANCE

    def write(spec: Any, columns: dict[str, Any]) -> None:
        size = len(next(iter(columns.values())))
        data = {name: columns.get(name, [None] * size) for name in spec.column_names}
        tables.create(lake, spec)
        write_deltalake(lake.table(spec.name), pa.table(data, schema=spec.schema), mode="append")

    for start in range(0, products, 500_000):
        row_N = np.arange(start, min(start + 500_000, products))
        ids = [f"p{row:08d}" for row in row_N * _STRIDE % products]
        hashes = [f"p{row}" for row in row_N]
        write(
            CATALOG_PRODUCT, {"dataset": ["shop"] * len(ids), "product_id": ids, "title": ids, "product_hash": hashes}
        )
    queries = len(texts)
    names, judged = [f"q{row:05d}" for row in range(queries)], np.arange(queries) * _STRIDE % products
    key = {"dataset": ["shop"] * queries, "query_id": names}
    write(QUERY, key | {"text": texts, "normalised": texts, "query_hash": names, "split": ["train"] * queries})
    pairs = {"product_ids": [[f"p{row:08d}"] for row in judged], "grades": [[2]] * queries}
    shares = {"sources": [["human"]] * queries, "at_least_1": [[1.0]] * queries, "at_least_2": [[1.0]] * queries}
    write(TRAINING_INSTANCE, key | {"stage": [1] * queries, "query": texts} | pairs | shares)


def ours_process(folder: Path, products: int, found: dict[str, Any]) -> NDArray[np.int64]:
    """By one process."""
    import torch

    from embeddings.exact import ExactSearch

    torch.set_num_threads(2)
    vectors, query_QD = catalog(folder, products)
    with watched(found):
        _, rows = ExactSearch(vectors, np.arange(len(vectors))).search(query_QD, K)
    return rows


def bare_faiss(folder: Path, products: int, found: dict[str, Any]) -> NDArray[np.int64]:
    """By one index in memory, whose filling is left out."""
    import faiss

    faiss.omp_set_num_threads(2)
    vectors, query_QD = catalog(folder, products)
    index = faiss.IndexFlatIP(vectors.width)
    for start in range(0, len(vectors), _FILE_ROWS):
        index.add(vectors.take(np.arange(start, min(start + _FILE_ROWS, len(vectors)))))
    with watched(found):
        _, rows = index.search(query_QD, K)
    return np.asarray(rows)


def sentence_transformers(folder: Path, products: int, found: dict[str, Any], *, use_faiss: bool) -> None:
    """By the peer's miner, with an encoder whose calls return vectors that are there."""
    import torch
    from datasets import Dataset
    from sentence_transformers.util import mine_hard_negatives

    from embeddings.encoder import build_pretrained
    from embeddings.recipes import EncoderRecipe

    if use_faiss:
        import faiss

        faiss.omp_set_num_threads(2)
    torch.set_num_threads(2)
    vectors, query_QD = catalog(folder, products)
    vector_PD = vectors.take(np.arange(len(vectors)))
    model = build_pretrained(EncoderRecipe())
    model.encode_document = lambda texts, **_: vector_PD[: len(texts)]
    model.encode_query = lambda texts, **_: query_QD[: len(texts)]
    rows = Dataset.from_dict(
        {
            "query": [f"q{row}" for row in range(len(query_QD))],
            "product": [f"p{row}" for row in range(len(query_QD))],
        }
    )
    with watched(found):
        mine_hard_negatives(
            rows,
            model,
            corpus=[f"p{row}" for row in range(len(vectors))],
            num_negatives=K,
            range_max=K,
            use_faiss=use_faiss,
            faiss_batch_size=16_384 if use_faiss else _ST_QUERIES,
            output_format="n-tuple",
            verbose=False,
        )


def contestant(name: str, folder: Path, products: int) -> dict[str, Any]:
    """One contestant's seconds and memory; its neighbours are kept where it tells them."""
    found: dict[str, Any] = {}
    if name.startswith("st_"):
        sentence_transformers(folder, products, found, use_faiss=name == "st_faiss")
    elif name == "job":
        job(folder, products, found)
    else:
        runs = {"ours": ours, "ours_process": ours_process, "bare_faiss": bare_faiss}
        runs |= {kind: partial(indexed, kind=kind) for kind in INDEXES}
        np.save(folder / f"rows-{name}.npy", runs[name](folder, products, found))
    return found


def _recall(folder: Path, names: Sequence[str]) -> dict[str, float]:
    """Share of the nearest that ours found: by FAISS's neighbours in float32, of an index by the exact search's."""
    found = {}
    for name, truth in (("ours", "bare_faiss"), ("ours_process", "bare_faiss"), *((name, "ours") for name in INDEXES)):
        if name in names and truth in names:
            pairs = zip(np.load(folder / f"rows-{name}.npy"), np.load(folder / f"rows-{truth}.npy"), strict=True)
            found[name] = float(np.mean([np.intersect1d(*pair).size for pair in pairs])) / K
    return found


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--products", type=int, default=400_000)
    parser.add_argument("--queries", type=int)
    parser.add_argument("--titles", type=int, help="titles that are encoded; the other products derive from them")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--contestants", default="")
    parser.add_argument("--one", default="", help=argparse.SUPPRESS)
    parser.add_argument("--lake", default="", help=argparse.SUPPRESS)
    parser.add_argument("--folder", default="", help="keeps vectors between runs; empty: a temporary one")
    given = parser.parse_args()
    if given.lake:
        write_lake(given.lake, Path(given.folder), given.products)
        return
    if given.one:
        print(json.dumps(contestant(given.one, Path(given.folder), given.products)))
        return
    if not os.environ.get("ASSAY_DATA"):
        sys.exit("benchmarks.mining: set ASSAY_DATA to the folder that holds titles/")
    names = given.contestants.split(",") if given.contestants else CONTESTANTS
    queries = given.queries or (QUICK_QUERIES if given.quick else QUERIES)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(given.folder or place)
        folder.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        titles = given.titles or (QUICK_TITLES if given.quick else given.products)
        prepare(folder, given.products, queries, titles)
        print(f"vectors of {given.products:,} products and {queries:,} queries: {time.monotonic() - started:.0f} s")
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
        for number in range(given.rounds or (1 if given.quick else 3)):
            for name in names if number % 2 == 0 else reversed(names):
                command = [sys.executable, "-m", "benchmarks.mining", "--one", name, "--folder", str(folder)]
                command += ["--products", str(given.products)]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                one = json.loads(done.stdout.splitlines()[-1])
                runs[name].append(one)
                rate = queries / one["seconds"]
                print(
                    f"{name:<14} {one['seconds']:8.2f} s {rate:9.1f} queries/s {one['anonymous_mb']:8.0f} MB"
                    + (f", built in {one['build_seconds']:.1f} s" if "build_seconds" in one else ""),
                    flush=True,
                )
        seconds = {name: median(one["seconds"] for one in own) for name, own in runs.items()}
        memory = {name: max(one["anonymous_mb"] for one in own) for name, own in runs.items()}
        recall = _recall(folder, names)
    theirs = [seconds[name] for name in ("st_faiss", "st_torch") if name in seconds]
    ratios = {"sentence_transformers_mine": min(theirs) / seconds["ours"]} if theirs else {}
    if "bare_faiss" in seconds:
        ratios["bare_faiss"] = seconds["bare_faiss"] / seconds["ours"]
    if "ours_process" in seconds:
        ratios["one_process"] = seconds["ours_process"] / seconds["ours"]
    print(
        json.dumps(
            {
                "products": given.products,
                "queries": queries,
                "seconds": seconds,
                "anonymous_mb": memory,
                "driver_mb": {name: max(one["driver_mb"] for one in own) for name, own in runs.items()},
                "recall": recall,
                "indexes": {name: own[-1] for name, own in runs.items() if name in INDEXES},
                "ratios": ratios,
            }
        )
    )


if __name__ == "__main__":
    main()
