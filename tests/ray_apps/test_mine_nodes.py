"""A search that loses a node, and one whose driver is killed, on Ray clusters in processes of their own."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from embeddings.vectors import VectorStore, write_vectors
from ray_apps import mine as app

PRODUCTS, QUERIES, WIDTH, K = 20_000, 3_000, 64, 50


def catalog(folder):
    generator = np.random.default_rng(0)
    vectors = generator.normal(size=(PRODUCTS, WIDTH)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    store, hashes = VectorStore(folder / "vectors"), [str(row) for row in range(PRODUCTS)]
    if not store.paths():
        write_vectors(store.path_of(hashes), vectors, hashes, kind="float16")
    return app.Search(store.vectors(pa.array(hashes)), vectors[:QUERIES] + np.float32(0.01))


def started(place, *words):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, __file__, str(place), *words]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)


def ended(process):
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors[-9000:]


def expected(place):
    (found,) = app.mine([catalog(place)], K, num_actors=1, threads_per_actor=1, own_scores=1e12)
    return found


def same(place, found):
    with np.load(place / "found.npz") as arrays:
        return np.array_equal(arrays["score_QK"], found.score_QK) and np.array_equal(arrays["row_QK"], found.row_QK)


@pytest.mark.slow
def test_a_search_that_loses_a_node_finds_the_same(tmp_path):
    """Three nodes, two after a while: a minute."""
    found = expected(tmp_path)
    ended(started(tmp_path, "nodes"))
    assert same(tmp_path, found)


@pytest.mark.slow
def test_a_search_whose_driver_is_killed_goes_on_and_finds_the_same(tmp_path):
    """Two starts of a local cluster: a minute."""
    found = expected(tmp_path)
    process, blocks = started(tmp_path, "local"), tmp_path / "run" / "neighbours"
    while len(list(blocks.rglob("block-*.npz"))) < 3:
        assert process.poll() is None, "the search ended before it could be killed"
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    kept = {path: path.stat().st_mtime_ns for path in blocks.rglob("block-*.npz")}
    assert not (tmp_path / "found.npz").exists()
    ended(started(tmp_path, "local"))
    assert same(tmp_path, found)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def main(place, kind):
    import ray
    from ray.cluster_utils import Cluster

    # blocks follow one another, each of ten parts
    app._PART_ROWS, app._BLOCK_QUERIES = 2_000, 100
    search, how = catalog(place), {"num_actors": 2, "threads_per_actor": 1, "run_folder": str(place / "run")}
    with ThreadPoolExecutor() as threads:
        if kind == "nodes":
            cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
            node, _ = cluster.add_node(num_cpus=1), cluster.add_node(num_cpus=1)
            ray.init(address=cluster.address, log_to_driver=False)
            done = []
            take = app.SearchJob.take
            app.SearchJob.take = lambda job, piece, found: (done.append(piece), take(job, piece, found))[1]
            # Ray starts and ends nodes from the main thread alone
            mining = threads.submit(app.mine, [search], K, **how)
            while len(done) < 20:
                assert not mining.done(), mining.result()
                time.sleep(0.05)
            cluster.remove_node(node, allow_graceful=False)
            assert not mining.done(), "the search ended before the node was gone"
            (found,) = mining.result()
        else:
            ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
            (found,) = app.mine([search], K, **how)
    np.savez(place / "found.npz", score_QK=found.score_QK, row_QK=found.row_QK)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
