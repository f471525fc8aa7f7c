"""Exact search: the same bits as brute force, however products are sharded and queries cut, in either arithmetic."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embeddings import exact
from embeddings.exact import ExactSearch
from embeddings.topk import merge_topk
from embeddings.vectors import VectorStore, write_vectors

BF16 = pytest.mark.parametrize("bf16", [True, False], ids=["bfloat16", "float32"])


def brute_force(queries, vectors, k):
    scores = np.array([[float(q.astype(np.float64) @ v) for v in vectors.astype(np.float64)] for q in queries])
    scores = scores.astype(np.float32)
    rows = np.array([sorted(range(len(vectors)), key=lambda at: (-row[at], at))[:k] for row in scores])
    return np.take_along_axis(scores, rows, axis=1), rows


def unit_vectors(generator, count, width):
    vectors = generator.normal(size=(count, width)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def stored(folder, vectors, *, file_rows=1000, kind="float32"):
    """A catalogue of these vectors, cut into files."""
    store, hashes = VectorStore(folder), [f"h{number}" for number in range(len(vectors))]
    for start in range(0, len(vectors), file_rows):
        own = hashes[start : start + file_rows]
        write_vectors(store.path_of(own), vectors[start : start + file_rows], own, kind=kind)
    return store.vectors(pa.array(hashes, pa.string()))


def crowded_catalogue(seed, count, width, num_distinct):
    """Unit vectors of which many are copies of one another, so that ties are everywhere."""
    generator = np.random.default_rng(seed)
    distinct = unit_vectors(generator, num_distinct, width)
    return distinct[generator.integers(num_distinct, size=count)], unit_vectors(generator, 5, width)


@BF16
@given(
    seed=st.integers(0, 10_000),
    count=st.integers(1, 300),
    num_distinct=st.integers(1, 300),
    k=st.integers(1, 60),
    cuts=st.lists(st.integers(0, 300), max_size=7).map(sorted),
    tile=st.sampled_from([7, 32, 100, 1000]),
    room=st.sampled_from([1, 64, 1024]),
)
@settings(max_examples=60, deadline=None)
def test_any_sharding_gives_the_same_bits_as_brute_force(
    tmp_path_factory, bf16, seed, count, num_distinct, k, cuts, tile, room
):
    vectors, queries = crowded_catalogue(seed, count, 12, num_distinct)
    catalog = stored(tmp_path_factory.mktemp("vectors"), vectors, file_rows=97)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exact, "TILE_ROWS", tile)
        patch.setattr(exact, "MIN_ROOM", room)
        patch.setattr(exact, "BLOCK_QUERIES", 2)
        parts = np.split(np.arange(count), [min(cut, count) for cut in cuts])
        found = [ExactSearch(catalog, rows, bf16=bf16).search(queries, k) for rows in parts]
    scores, rows = merge_topk([scores for scores, _ in found], [rows for _, rows in found], k)
    true_scores, true_rows = brute_force(queries, vectors, k)
    np.testing.assert_array_equal(rows, true_rows)
    np.testing.assert_array_equal(scores, true_scores)
    assert (scores.dtype, rows.dtype) == (np.float32, np.int64)


@BF16
@pytest.mark.parametrize("kind", ["float32", "float16", "int8"])
def test_larger_tiles_give_the_same_bits_too(tmp_path, bf16, kind):
    generator = np.random.default_rng(0)
    vectors, queries = unit_vectors(generator, 20_000, 96), unit_vectors(generator, 64, 96)
    # a cloud: most products near all queries, so that the k-th place is crowded
    vectors = vectors + np.float32(3) * vectors[:1]
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    catalog = stored(tmp_path, vectors, file_rows=7000, kind=kind)
    scores, rows = ExactSearch(catalog, np.arange(20_000), bf16=bf16).search(queries, 300)
    everything = catalog.take(np.arange(20_000)).astype(np.float64) @ queries.astype(np.float64).T
    for place in range(64):
        order = np.lexsort((np.arange(20_000), -everything[:, place].astype(np.float32)))[:300]
        np.testing.assert_array_equal(rows[place], order)
    alone_scores, alone_rows = ExactSearch(catalog, np.arange(20_000), bf16=bf16).search(queries[5:6], 300)
    np.testing.assert_array_equal(alone_scores[0], scores[5])
    np.testing.assert_array_equal(alone_rows[0], rows[5])


@BF16
def test_rounding_does_not_decide_who_is_in_the_top(tmp_path, bf16):
    """Neighbours closer than float32 rounding, among vectors of very different lengths."""
    generator = np.random.default_rng(4)
    base = unit_vectors(generator, 1, 128)
    vectors = (base + generator.normal(scale=2e-7, size=(400, 128))).astype(np.float32)
    vectors[::3] *= generator.uniform(0.001, 900, size=(134, 1)).astype(np.float32)
    queries = (base + generator.normal(scale=1e-6, size=(8, 128))).astype(np.float32)
    queries[:4] *= np.float32(1e-20)
    scores, rows = ExactSearch(stored(tmp_path, vectors), np.arange(400), bf16=bf16).search(queries, 20)
    true_scores, true_rows = brute_force(queries, vectors, 20)
    np.testing.assert_array_equal(rows, true_rows)
    np.testing.assert_array_equal(scores, true_scores)


def test_fewer_products_than_k_gives_all_of_them(tmp_path):
    catalog = stored(tmp_path, np.eye(3, dtype=np.float32))
    search = ExactSearch(catalog, np.array([1, 2]))
    scores, rows = search.search(np.array([[0.1, 0.3, 0.2]], dtype=np.float32), 10)
    assert rows.tolist() == [[1, 2]]
    assert scores.tolist() == [[np.float32(0.3), np.float32(0.2)]]
    assert len(search) == 2
    assert ExactSearch(catalog, np.arange(0)).search(np.eye(3, dtype=np.float32), 10)[0].shape == (3, 0)
    assert search.search(np.zeros((0, 3), dtype=np.float32), 2)[1].shape == (0, 2)


@pytest.mark.parametrize(
    "queries", [np.eye(2), np.full((2, 2), np.nan, dtype=np.float32), np.zeros(2, dtype=np.float32)]
)
def test_queries_that_are_not_finite_float32_matrices_are_refused(tmp_path, queries):
    with pytest.raises(ValueError, match="finite float32"):
        ExactSearch(stored(tmp_path, np.eye(2, dtype=np.float32)), np.arange(2)).search(queries, 1)


def test_calls_that_do_not_fit_the_catalogue_are_refused(tmp_path):
    search = ExactSearch(stored(tmp_path, np.eye(2, dtype=np.float32)), np.arange(2))
    for queries, k in ((np.eye(3, dtype=np.float32), 1), (np.eye(2, dtype=np.float32), 0)):
        with pytest.raises(ValueError, match="k >= 1"):
            search.search(queries, k)
    with pytest.raises(ValueError, match="at least one shard"):
        merge_topk([], [], 3)
