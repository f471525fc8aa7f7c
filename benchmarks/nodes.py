"""Mining over simulated nodes of one core each: 1, 2 and 4, for the same work (strong) and as much per node (weak).

    python -m benchmarks.nodes [--quick] [--products N] [--queries N] [--rounds N]

Every node is a Ray node of this machine with one core and one search actor (`ray.cluster_utils.Cluster`); a machine of
two cores can show what two nodes gain and what four cost, not what four gain. Vectors are made up, of length one and
width 384, in float16 files. The start of nodes and actors is left out. Strong: all queries over all products; weak:
products times nodes. The last line is JSON; `efficiency` is the time of one node over the time of N, in strong scaling
times 1 / min(N, cores of the machine), in weak scaling times N / min(N, cores).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Final

import numpy as np
import pyarrow as pa

from embeddings.vectors import CatalogVectors, VectorStore, write_vectors

K: Final = 100
NODES: Final = (1, 2, 4)
_WIDTH: Final = 384
_FILE_ROWS: Final = 20_000


def prepare(folder: Path, products: int, queries: int) -> None:
    """Writes vectors of the largest catalogue, and of queries."""
    generator = np.random.default_rng(0)
    store = VectorStore(folder / "products")
    for start in range(0, products, _FILE_ROWS):
        vector_ND = generator.normal(size=(min(_FILE_ROWS, products - start), _WIDTH)).astype(np.float32)
        vector_ND /= np.linalg.norm(vector_ND, axis=1, keepdims=True)
        hashes = [f"p{row}" for row in range(start, start + len(vector_ND))]
        write_vectors(store.path_of(hashes), vector_ND, hashes, kind="float16")
    query_QD = generator.normal(size=(queries, _WIDTH)).astype(np.float32)
    np.save(folder / "queries.npy", query_QD / np.linalg.norm(query_QD, axis=1, keepdims=True))


def searched(folder: Path, products: int, nodes: int) -> float:
    """Seconds of a search over so many nodes."""
    import ray
    from ray.cluster_utils import Cluster

    from ray_apps import mine

    vectors: CatalogVectors = VectorStore(folder / "products").vectors(
        pa.array([f"p{row}" for row in range(products)], pa.string())
    )
    query_QD = np.load(folder / "queries.npy")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    for _ in range(nodes - 1):
        cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False)
    first = np.arange(len(vectors)) < K
    with mine.SearchPool(nodes, 1) as pool:
        # enough queries for a piece of work for every actor
        pool.run(mine.SearchJob(mine.Search(vectors, np.repeat(query_QD, 2, axis=0), first), K, nodes, ""))
        job = mine.SearchJob(mine.Search(vectors, query_QD), K, nodes, "")
        started = time.monotonic()
        pool.run(job)
        seconds = time.monotonic() - started
    ray.shutdown()
    cluster.shutdown()
    return seconds


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--products", type=int)
    parser.add_argument("--queries", type=int)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--one", default="", help=argparse.SUPPRESS)
    given = parser.parse_args()
    products = given.products or (100_000 if given.quick else 250_000)
    queries = given.queries or (8_192 if given.quick else 16_384)
    if given.one:
        folder, nodes = given.one.rsplit(":", 1)
        print(searched(Path(folder), products, int(nodes)))
        return
    runs: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), max(NODES) * products, queries)
        for _ in range(given.rounds or (1 if given.quick else 3)):
            for kind, nodes in [("strong", nodes) for nodes in NODES] + [("weak", nodes) for nodes in NODES[1:]]:
                size = products * nodes if kind == "weak" else products
                command = [sys.executable, "-m", "benchmarks.nodes", "--one", f"{folder}:{nodes}"]
                command += ["--products", str(size), "--queries", str(queries)]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                runs.setdefault(f"{kind}/{nodes}", []).append(float(done.stdout.splitlines()[-1]))
                print(f"{kind:<7} {nodes} nodes {size:>9,} products {runs[f'{kind}/{nodes}'][-1]:8.2f} s", flush=True)
    seconds = {name: median(own) for name, own in runs.items()}
    cores = len(os.sched_getaffinity(0))
    efficiency = {}
    for name, own in seconds.items():
        kind, nodes = name.split("/")
        work = int(nodes) if kind == "weak" else 1
        efficiency[name] = seconds["strong/1"] * work / own / min(int(nodes), cores)
    print(json.dumps({"products": products, "queries": queries, "seconds": seconds, "efficiency": efficiency}))


if __name__ == "__main__":
    main()
