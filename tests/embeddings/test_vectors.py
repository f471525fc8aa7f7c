import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embeddings import vectors
from embeddings.vectors import StoreError, VectorStore, has_rows, inner_products, texts_print, write_vectors


def unit_vectors(count, width=24, seed=0):
    vectors = np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def fill(store, vectors, hashes, cuts, kind="float32"):
    for start, end in zip([0, *cuts], [*cuts, len(hashes)], strict=True):
        write_vectors(store.path_of(hashes[start:end]), vectors[start:end], hashes[start:end], kind=kind)


def test_rows_come_back_whichever_file_holds_them_and_texts_share_vectors(tmp_path):
    store, vectors = VectorStore(tmp_path), unit_vectors(11)
    hashes = [f"h{number}" for number in range(11)]
    fill(store, vectors, hashes, [4, 8])
    order = [10, 0, 5, 5, 3, 10]
    catalog = store.vectors(pa.array([hashes[at] for at in order]))
    assert len(catalog) == 6
    assert catalog.width == 24
    assert np.array_equal(catalog.take(np.arange(6)), vectors[order])
    assert np.array_equal(catalog.take(np.array([3, 0])), vectors[[5, 10]])
    rows = catalog.in_file_order(np.arange(6))
    lying = list(zip(catalog.file_P[rows].tolist(), catalog.place_P[rows].tolist(), strict=True))
    assert lying == sorted(lying)
    assert sum(catalog.rows_of(number) for number in range(len(catalog.paths))) == 11


@pytest.mark.parametrize("looks", [1, 3, 1000])
def test_hashes_are_found_however_many_are_looked_through_at_once(tmp_path, monkeypatch, looks):
    monkeypatch.setattr(vectors, "_LEAST_HELD", 1)
    monkeypatch.setattr(vectors, "_MOST_LOOKS", looks)
    monkeypatch.setattr(vectors, "_ROWS_AT_ONCE", 2)
    store, known = VectorStore(tmp_path), unit_vectors(40)
    hashes = [f"h{number}" for number in range(40)]
    fill(store, known, hashes, [3, 4, 20, 33])
    # a text that a second file holds too
    write_vectors(tmp_path / "zz.npy", -known[:5], hashes[:5])
    order = np.random.default_rng(0).integers(0, 40, 60)
    catalog = store.vectors(pa.chunked_array([[hashes[at] for at in order[:7]], [hashes[at] for at in order[7:]]]))
    assert np.array_equal(catalog.take(np.arange(60)), known[order])
    assert store.missing(pa.array(["h39", "x", "h0", "x"])).to_pylist() == ["x"]
    rows = catalog.in_file_order(np.arange(60))
    assert sorted(rows.tolist()) == list(range(60))
    lying = list(zip(catalog.file_P[rows].tolist(), catalog.place_P[rows].tolist(), strict=True))
    assert lying == sorted(lying)
    assert np.array_equal(catalog.in_file_order(rows), rows)


def test_of_rows_that_share_a_vector_the_first_is_distinct(tmp_path):
    store = VectorStore(tmp_path)
    fill(store, unit_vectors(6), list("abcdef"), [2])
    catalog = store.vectors(pa.array(list("fabacfd")))
    assert catalog.distinct(np.arange(7)).tolist() == [0, 1, 2, 4, 6]
    assert catalog.distinct(np.array([3, 5])).tolist() == [3, 5]
    assert catalog.distinct(np.array([], dtype=np.int64)).tolist() == []


def test_only_texts_without_a_vector_are_missing_each_once(tmp_path):
    store = VectorStore(tmp_path / "absent")
    assert store.missing(pa.array(["b", "a", "b"])).to_pylist() == ["b", "a"]
    fill(store, unit_vectors(2), ["a", "c"], [])
    wanted = pa.chunked_array([["b", "a"], ["b", "d"]])
    assert store.missing(wanted).to_pylist() == ["b", "d"]
    with pytest.raises(StoreError, match="3 of 4 products have no vectors; run embed_catalog"):
        store.vectors(wanted)
    write_vectors(tmp_path / "absent" / "queries-x.npy", unit_vectors(1), ["b"])
    assert store.missing(pa.array(["b"])).to_pylist() == ["b"]


@pytest.mark.parametrize(("kind", "error"), [("float32", 0.0), ("float16", 1e-3), ("int8", 1e-2)])
def test_kinds_of_numbers_err_by_what_they_say(tmp_path, kind, error):
    store, vectors = VectorStore(tmp_path), unit_vectors(500, width=384)
    vectors[3] = 0
    hashes = [str(number) for number in range(500)]
    fill(store, vectors, hashes, [200], kind=kind)
    catalog = store.vectors(pa.array(hashes))
    taken = catalog.take(np.arange(500))
    assert taken.dtype == np.float32
    assert np.abs(taken @ vectors.T - vectors @ vectors.T).max() <= error
    stored, scale = catalog.take_stored(np.arange(490, 500))
    assert (scale is None) == (kind != "int8")
    assert np.array_equal(stored.astype(np.float32) * (1 if scale is None else scale[:, None]), taken[490:])


def test_a_file_without_all_its_vectors_is_not_complete(tmp_path):
    path = tmp_path / "four.npy"
    write_vectors(path, np.ones((4, 2), dtype=np.float32), list("abcd"))
    assert has_rows(path, 4)
    assert not has_rows(path, 5)
    (tmp_path / "cut.npy").write_bytes(path.read_bytes()[:-8])
    assert not has_rows(tmp_path / "cut.npy", 4)
    assert not has_rows(tmp_path / "absent.npy", 4)
    assert pq.read_table(path.with_suffix(".parquet"))["hash"].to_pylist() == list("abcd")


def test_vectors_that_are_not_finite_are_not_kept(tmp_path):
    broken = np.array([[0.0, np.nan]], dtype=np.float32)
    with pytest.raises(ValueError, match="expected a matrix of finite vectors"):
        write_vectors(tmp_path / "x.npy", broken, ["a"])
    with pytest.raises(ValueError, match="as many hashes"):
        write_vectors(tmp_path / "x.npy", np.ones((2, 2), np.float32), ["a"])


@pytest.mark.parametrize("width", [1, 2, 3, 7, 8, 384])
def test_inner_products_are_exact_sums_rounded_once(width):
    left, right = unit_vectors(50, width, seed=1), unit_vectors(50, width, seed=2)
    exact = np.array([float(a.astype(float) @ b.astype(float)) for a, b in zip(left, right, strict=True)])
    assert np.array_equal(inner_products(left, right), exact.astype(np.float32))
    assert np.array_equal(inner_products(left[7:8], right[7:8]), inner_products(left, right)[7:8])


def test_pair_scores_are_those_of_the_search(tmp_path, monkeypatch):
    store, vectors, queries = VectorStore(tmp_path), unit_vectors(9), unit_vectors(3, seed=5)
    fill(store, vectors, list("abcdefghi"), [4])
    monkeypatch.setattr("embeddings.vectors._BLOCK_PAIRS", 2)
    query, row = np.array([2, 0, 1]), np.array([8, 0, 4])
    scores = store.vectors(pa.array(list("abcdefghi"))).pair_scores(queries, query, row)
    assert np.array_equal(scores, inner_products(queries[query], vectors[row]))


def test_print_knows_where_one_text_ends_and_the_next_begins():
    assert texts_print(["ab", "c"]) != texts_print(["a", "bc"])
    assert texts_print(["a"], ["b"]) != texts_print(["b"], ["a"])
    assert texts_print(["a", "b"], []) != texts_print(["a"], ["b"])
    assert texts_print(["a", ""]) != texts_print(["a"])


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
def test_print_is_of_the_texts_however_they_lie_in_memory(kind):
    texts = ["ab", "é", "", "d"]
    whole = pa.array(["x", *texts, "y"], kind)
    cut = pa.chunked_array([whole[1:2], whole[2:2], whole[2:5]])
    assert texts_print(texts) == texts_print(whole[1:5]) == texts_print(cut)
    assert texts_print(pa.array(["ab", None], kind)) != texts_print(["ab", ""])
