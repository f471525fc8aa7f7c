import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import ray

from conf.load import ConfigError
from embeddings.index_recipe import IndexRecipe
from embeddings.vectors import VectorStore, write_vectors
from lake.storage import LakeError
from ray_apps import mine as app
from ray_apps.mine import Search, drop_kept, mine

POOL = {"num_actors": 2, "threads_per_actor": 1}


def stored(folder, vectors, num_files):
    store, hashes = VectorStore(folder), [f"p{row}" for row in range(len(vectors))]
    for own in np.array_split(np.arange(len(vectors)), num_files):
        names = [hashes[row] for row in own]
        write_vectors(store.path_of(names), vectors[own], names, kind="float16")
    return store.vectors(pa.array(hashes))


def unit_vectors(count, seed=0):
    generator = np.random.default_rng(seed)
    vectors = generator.normal(size=(count, 16)).astype(np.float32)
    vectors[count // 2 : count // 2 + count // 6] = vectors[: count // 6]  # products of equal text
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(app, "_PART_ROWS", 50)
    monkeypatch.setattr(app, "_BLOCK_QUERIES", 7)


def same(left, right):
    return np.array_equal(left.score_QK, right.score_QK) and np.array_equal(left.row_QK, right.row_QK)


@pytest.mark.usefixtures("ray_cluster", "small_pieces")
def test_pieces_over_actors_find_what_one_process_does_to_the_bit(tmp_path):
    vectors = unit_vectors(120)
    queries, is_kept = vectors[::7] + np.float32(0.01), np.arange(120) % 5 != 0
    one, three = (stored(tmp_path / str(count), vectors, count) for count in (1, 3))
    searches = [Search(catalog, queries, kept) for catalog in (one, three) for kept in (None, is_kept)]
    spread = mine(searches, 10, **POOL)
    here = mine(searches, 10, **POOL, own_scores=1e9)
    assert all(same(left, right) for left, right in zip(spread, here, strict=True))
    assert same(spread[0], spread[2])
    assert same(spread[1], spread[3])
    assert not (spread[1].row_QK % 5 == 0).any()
    exact = queries.astype(float) @ vectors.astype(np.float16).astype(float).T
    reference = np.array([np.lexsort((np.arange(120), -row.astype(np.float32)))[:10] for row in exact])
    assert np.array_equal(spread[0].row_QK, reference)


@pytest.mark.usefixtures("ray_cluster")
def test_small_catalogues_and_no_queries_give_what_they_have(tmp_path):
    vectors = unit_vectors(4)
    (found,) = mine([Search(stored(tmp_path, vectors, 2), vectors[:3])], 10, **POOL)
    assert found.row_QK.shape == (3, 4)
    (nothing,) = mine([Search(stored(tmp_path, vectors, 2), vectors[:0])], 10, **POOL)
    assert nothing.row_QK.shape == (0, 4)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster", "small_pieces")
def test_a_run_that_goes_on_searches_only_blocks_that_are_missing(tmp_path, monkeypatch):
    """Three searches, each with actors of its own: half a minute."""
    vectors = unit_vectors(120)
    search, folder = Search(stored(tmp_path / "v", vectors, 2), vectors[:30]), str(tmp_path / "run")
    (whole,) = mine([search], 10, **POOL, run_folder=folder)
    kept = sorted(Path(folder, "neighbours").rglob("*.npz"))
    assert len(kept) == 5
    kept[2].unlink()
    # no piece is late, however slowly actors start
    monkeypatch.setattr(app, "_LATE_SEC", 600.0)
    given = []
    give = app.SearchPool._give
    monkeypatch.setattr(app.SearchPool, "_give", lambda *args: given.append(args[-1]) or give(*args))
    (again,) = mine([search], 10, **POOL, run_folder=folder)
    assert same(whole, again)
    assert {piece.block for piece in given} == {2}
    assert len(given) == 3
    # other queries are another search
    (other,) = mine([Search(search.vectors, vectors[30:60])], 10, **POOL, run_folder=folder)
    assert not same(whole, other)
    drop_kept(folder)
    assert not Path(folder, "neighbours").exists()


@pytest.mark.usefixtures("ray_cluster", "small_pieces")
def test_an_actor_that_is_killed_loses_nothing(tmp_path, monkeypatch):
    vectors = unit_vectors(120)
    search = Search(stored(tmp_path, vectors, 2), vectors)
    (expected,) = mine([search], 10, **POOL, own_scores=1e9)
    give, killed = app.SearchPool._give, []

    def deadly(pool, job, given, member, piece):
        reference = give(pool, job, given, member, piece)
        if piece in [(0, 3), (2, 1)] and piece not in killed:
            killed.append(piece)
            ray.kill(member.actor)
        return reference

    monkeypatch.setattr(app.SearchPool, "_give", deadly)
    (found,) = mine([search], 10, **POOL)
    assert same(found, expected)
    assert len(killed) == 2


@pytest.mark.usefixtures("ray_cluster", "small_pieces")
def test_actors_that_always_die_end_the_search_in_a_sentence(tmp_path, monkeypatch):
    vectors = unit_vectors(120)
    give = app.SearchPool._give

    def deadly(pool, job, given, member, piece):
        reference = give(pool, job, given, member, piece)
        ray.kill(member.actor)
        return reference

    monkeypatch.setattr(app.SearchPool, "_give", deadly)
    monkeypatch.setattr(app, "_MOST_LOSSES", 2)
    with pytest.raises(RuntimeError, match="search actors died, the last with"):
        mine([Search(stored(tmp_path, vectors, 2), vectors)], 10, **POOL)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster", "small_pieces")
def test_a_late_piece_is_given_to_an_idle_actor_as_well(tmp_path, monkeypatch):
    """An actor that stands still: half a minute."""
    vectors = unit_vectors(120)
    search = Search(stored(tmp_path, vectors, 2), vectors[:7])
    (expected,) = mine([search], 10, **POOL, own_scores=1e9)
    monkeypatch.setattr(app, "_LATE_SEC", 0.2)
    give, stopped, pieces = app.SearchPool._give, [], []

    def sleepy(pool, job, given, member, piece):
        if piece.part == 2 and not stopped:
            stopped.append(ray.get(member.actor.pid.remote()))
            os.kill(stopped[0], signal.SIGSTOP)
        pieces.append(piece)
        return give(pool, job, given, member, piece)

    monkeypatch.setattr(app.SearchPool, "_give", sleepy)
    try:
        (found,) = mine([search], 10, **POOL)
    finally:
        for pid in stopped:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
    assert same(found, expected)
    assert pieces.count((2, 0)) == 2


@pytest.mark.usefixtures("ray_cluster", "small_pieces")
def test_an_index_is_built_once_and_its_recall_measured(tmp_path):
    vectors = unit_vectors(120)
    catalog, index = stored(tmp_path / "v", vectors, 2), IndexRecipe(kind="ivf_flat", lists=1, probes=1)
    search = Search(catalog, vectors[:30], index=index, index_folder=str(tmp_path / "indexes"))
    (found,) = mine([search], 10, **POOL, own_scores=1e9, run_folder=str(tmp_path / "run"))
    (expected,) = mine([Search(catalog, vectors[:30])], 10, **POOL, own_scores=1e9)
    assert same(found, expected)  # one list is the whole part
    assert found.recall > 0.99  # neighbours of equal text may be exchanged
    files = sorted(path.name for path in (tmp_path / "indexes").glob("*/*"))
    assert files == ["part-00000.faiss", "part-00001.faiss", "part-00002.faiss", "trained.faiss"]
    built = [path.stat().st_mtime_ns for path in (tmp_path / "indexes").glob("*/*")]
    (again,) = mine([search], 10, **POOL, run_folder=str(tmp_path / "run"))
    assert same(again, found)
    assert again.recall == found.recall
    assert [path.stat().st_mtime_ns for path in (tmp_path / "indexes").glob("*/*")] == built
    # other queries, and more lists looked at, read the same files
    index = dataclasses.replace(index, probes=7)
    mine([dataclasses.replace(search, query_QD=vectors[40:50], index=index)], 10, **POOL)
    assert [path.stat().st_mtime_ns for path in (tmp_path / "indexes").glob("*/*")] == built
    with pytest.raises(ValueError, match="needs index_folder"):
        mine([dataclasses.replace(search, index_folder="")], 10, **POOL)
    # a part with few lists looked at misses some, and says so
    (tmp_path / "indexes" / "notes").mkdir()
    narrow = IndexRecipe(kind="hnsw", links=2, links_looked_at=1, spare=0)
    other = dataclasses.replace(search, is_kept_P=np.arange(120) > 3, index=narrow)
    (poor,) = mine([other], 10, **POOL)
    assert poor.recall < 1
    assert len(list((tmp_path / "indexes").iterdir())) == 2


@pytest.mark.usefixtures("ray_cluster")
def test_work_that_fits_no_node_is_refused_before_it_starts(tmp_path, monkeypatch):
    vectors = unit_vectors(12)
    search = Search(stored(tmp_path, vectors, 1), vectors)
    with pytest.raises(ConfigError, match="64 CPU asked for"):
        mine([search], 3, num_actors=1, threads_per_actor=64)
    monkeypatch.setattr(app.SearchJob, "num_bytes", 10**14)
    with pytest.raises(ConfigError, match="a search actor takes about 100,000,000 MB, the largest node has"):
        mine([search], 3, **POOL)


@pytest.mark.usefixtures("ray_cluster", "small_pieces")
def test_a_full_disk_ends_the_search_and_the_next_run_goes_on(tmp_path, monkeypatch):
    vectors = unit_vectors(120)
    search, run_folder = Search(stored(tmp_path, vectors, 1), vectors[:40]), str(tmp_path / "run")
    (expected,) = mine([search], 10, **POOL)
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda place: SimpleNamespace(free=4_000))
        with pytest.raises(LakeError, match=r"neighbours of finished queries take about 0 MB, .* free; make room"):
            mine([search], 10, **POOL, run_folder=run_folder)
    write, written = np.savez, []

    def full(file, **arrays):
        if len(written) == 2:
            Path(file).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        written.append(file)
        write(file, **arrays)

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", full)
        with pytest.raises(OSError, match="No space left"):
            mine([search], 10, **POOL, run_folder=run_folder)
    assert len(list((tmp_path / "run" / "neighbours").rglob("*block*"))) == 2
    (found,) = mine([search], 10, **POOL, run_folder=run_folder)
    assert same(found, expected)


def test_importing_the_search_brings_neither_torch_nor_faiss():
    code = "import sys, ray_apps.mine; sys.exit(bool({'torch', 'faiss'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_process_that_hands_out_work_loads_no_torch():
    code = (
        "import sys, jobs.mine_hard_pairs; from embeddings.index_recipe import IndexRecipe; "
        "from ray_apps.mine import actor_bytes; "
        "print(actor_bytes(100, 1000, 1000, 384, 10, IndexRecipe()) > 0, 'torch' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split() == ["True", "False"]
