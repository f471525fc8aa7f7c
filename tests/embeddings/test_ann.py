"""Exact search: the same bits however the catalogue is cut into shards and the queries into batches."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embeddings import ann
from embeddings.ann import FlatShard, merge_topk


def brute_force(queries, vectors, k):
    scores = np.array([[float(q.astype(np.float64) @ v) for v in vectors.astype(np.float64)] for q in queries])
    scores = scores.astype(np.float32)
    rows = np.array([sorted(range(len(vectors)), key=lambda at: (-row[at], at))[:k] for row in scores])
    return np.take_along_axis(scores, rows, axis=1), rows


def unit_vectors(generator, count, width):
    vectors = generator.normal(size=(count, width)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def crowded_catalogue(seed, count, width, num_distinct):
    """Unit vectors of which many are copies of one another, so that ties are everywhere."""
    generator = np.random.default_rng(seed)
    distinct = unit_vectors(generator, num_distinct, width)
    return distinct[generator.integers(num_distinct, size=count)], unit_vectors(generator, 5, width)


def search_shards(vectors, queries, k, cuts):
    parts = np.split(np.arange(len(vectors)), cuts)
    found = [FlatShard(vectors[rows], rows).search(queries, k) for rows in parts]
    return merge_topk([scores for scores, _ in found], [rows for _, rows in found], k)


@given(
    seed=st.integers(0, 10_000),
    count=st.integers(1, 300),
    num_distinct=st.integers(1, 300),
    k=st.integers(1, 60),
    cuts=st.lists(st.integers(0, 300), max_size=7).map(sorted),
)
@settings(max_examples=60, deadline=None)
def test_any_sharding_gives_the_same_bits_as_one_index_and_as_brute_force(seed, count, num_distinct, k, cuts):
    vectors, queries = crowded_catalogue(seed, count, 12, num_distinct)
    scores, rows = search_shards(vectors, queries, k, [min(cut, count) for cut in cuts])
    whole_scores, whole_rows = FlatShard(vectors, np.arange(count)).search(queries, k)
    np.testing.assert_array_equal(rows, whole_rows)
    np.testing.assert_array_equal(scores, whole_scores)
    assert scores.dtype == np.float32
    assert rows.dtype == np.int64
    true_scores, true_rows = brute_force(queries, vectors, k)
    np.testing.assert_array_equal(rows, true_rows)
    np.testing.assert_array_equal(scores, true_scores)


def test_scores_do_not_depend_on_the_batch():
    generator = np.random.default_rng(0)
    vectors, queries = unit_vectors(generator, 3000, 96), unit_vectors(generator, 64, 96)
    shard = FlatShard(vectors, np.arange(3000))
    scores, rows = shard.search(queries, 50)
    for at in range(0, 64, 7):
        alone_scores, alone_rows = shard.search(queries[at : at + 1], 50)
        np.testing.assert_array_equal(alone_scores[0], scores[at])
        np.testing.assert_array_equal(alone_rows[0], rows[at])


def test_rounding_inside_faiss_does_not_decide_who_is_in_the_top():
    """Neighbours closer than float32 rounding: FAISS alone orders them by chance."""
    generator = np.random.default_rng(4)
    base = unit_vectors(generator, 1, 128)
    vectors = (base + generator.normal(scale=2e-7, size=(400, 128))).astype(np.float32)
    queries = (base + generator.normal(scale=1e-6, size=(8, 128))).astype(np.float32)
    scores, rows = FlatShard(vectors, np.arange(400)).search(queries, 20)
    true_scores, true_rows = brute_force(queries, vectors, 20)
    np.testing.assert_array_equal(rows, true_rows)
    np.testing.assert_array_equal(scores, true_scores)


def test_a_tie_across_the_kth_place_goes_to_the_lowest_rows(monkeypatch):
    monkeypatch.setattr(ann, "_MAX_CANDIDATES", 1000)  # several blocks
    vectors = np.tile(np.array([[0.6, 0.8]], dtype=np.float32), (900, 1))
    vectors[700] = [1.0, 0.0]
    rows = np.arange(900)[::-1].copy() + 5000
    found = FlatShard(vectors, rows).search(np.array([[1.0, 0.0], [0.0, 1.0]], dtype=np.float32), 4)
    assert found[1].tolist() == [[5199, 5000, 5001, 5002], [5000, 5001, 5002, 5003]]


def test_fewer_products_than_k_gives_all_of_them():
    shard = FlatShard(np.eye(3, dtype=np.float32), np.array([4, 5, 6]))
    scores, rows = shard.search(np.array([[0.1, 0.3, 0.2]], dtype=np.float32), 10)
    assert rows.tolist() == [[5, 6, 4]]
    assert len(shard) == 3
    empty = FlatShard(np.zeros((0, 3), dtype=np.float32), np.zeros(0, dtype=np.int64))
    assert empty.search(np.eye(3, dtype=np.float32), 10)[0].shape == (3, 0)
    merged = merge_topk([scores, np.zeros((1, 0), np.float32)], [rows, np.zeros((1, 0), np.int64)], 2)
    assert merged[1].tolist() == [[5, 6]]
    assert shard.search(np.zeros((0, 3), dtype=np.float32), 2)[1].shape == (0, 2)


@pytest.mark.parametrize(
    "vectors", [np.eye(2), np.full((2, 2), np.nan, dtype=np.float32), np.zeros(2, dtype=np.float32)]
)
def test_vectors_that_are_not_finite_float32_matrices_are_refused(vectors):
    with pytest.raises(ValueError, match="finite float32"):
        FlatShard(vectors, np.arange(2))
    with pytest.raises(ValueError, match="finite float32"):
        FlatShard(np.eye(2, dtype=np.float32), np.arange(2)).search(vectors, 1)


def test_calls_that_do_not_fit_the_shard_are_refused():
    with pytest.raises(ValueError, match="row numbers"):
        FlatShard(np.eye(2, dtype=np.float32), np.arange(3))
    shard = FlatShard(np.eye(2, dtype=np.float32), np.arange(2))
    for queries, k in ((np.eye(3, dtype=np.float32), 1), (np.eye(2, dtype=np.float32), 0)):
        with pytest.raises(ValueError, match="k >= 1"):
            shard.search(queries, k)
    with pytest.raises(ValueError, match="at least one shard"):
        merge_topk([], [], 3)


def test_importing_the_index_does_not_bring_torch():
    code = "import sys, embeddings.ann, embeddings.mining, embeddings.metrics; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
