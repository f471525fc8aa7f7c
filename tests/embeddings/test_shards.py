import numpy as np
import pyarrow.parquet as pq
import pytest

from embeddings.shards import has_rows, pair_scores, plan_shards, read_rows, shard_of_rows, texts_print, write_vectors


def written(folder, vectors, num_shards):
    shards = plan_shards(folder, len(vectors), num_shards)
    for shard in shards:
        rows = range(shard.first_row, shard.first_row + shard.num_rows)
        write_vectors(shard.path, vectors[rows.start : rows.stop], [f"p{row}" for row in rows])
    return shards


@pytest.mark.parametrize(("num_products", "num_shards", "sizes"), [(7, 3, [2, 2, 3]), (2, 5, [1, 1]), (10_001, 0, 3)])
def test_shards_are_contiguous_and_differ_by_at_most_one(tmp_path, num_products, num_shards, sizes):
    shards = plan_shards(tmp_path, num_products, num_shards)
    assert [shard.num_rows for shard in shards] == sizes if isinstance(sizes, list) else len(shards) == sizes
    assert [shard.first_row for shard in shards] == list(np.cumsum([0] + [shard.num_rows for shard in shards])[:-1])
    assert sum(shard.num_rows for shard in shards) == num_products


def test_rows_come_back_whichever_shard_holds_them(tmp_path):
    vectors = np.random.default_rng(0).normal(size=(11, 4)).astype(np.float32)
    shards = written(tmp_path, vectors, 3)
    rows = np.array([10, 0, 5, 5, 3])
    assert np.array_equal(read_rows(shards, rows), vectors[rows])
    assert shard_of_rows(shards, rows).tolist() == [2, 0, 1, 1, 1]
    assert pq.read_table(shards[1].path.replace(".npy", ".parquet"))["id"].to_pylist()[0] == f"p{shards[1].first_row}"


def test_a_shard_without_all_its_vectors_is_not_complete(tmp_path):
    shard = written(tmp_path, np.ones((4, 2), dtype=np.float32), 1)[0]
    assert shard.is_complete
    assert not has_rows(shard.path, 5)
    (tmp_path / "cut.npy").write_bytes((tmp_path / shard.path).read_bytes()[:-8])
    assert not has_rows(tmp_path / "cut.npy", 4)
    assert not has_rows(tmp_path / "absent.npy", 4)


def test_pair_scores_are_inner_products_rounded_once(tmp_path):
    generator = np.random.default_rng(1)
    vectors, queries = (generator.normal(size=size).astype(np.float32) for size in ((9, 8), (3, 8)))
    shards = written(tmp_path, vectors, 2)
    query, row = np.array([2, 0, 1]), np.array([8, 0, 4])
    exact = [float(queries[q].astype(float) @ vectors[r].astype(float)) for q, r in zip(query, row, strict=True)]
    assert pair_scores(shards, queries, query, row).tolist() == np.float32(exact).astype(float).tolist()


def test_print_knows_where_one_text_ends_and_the_next_begins():
    assert texts_print(["ab", "c"]) != texts_print(["a", "bc"])
    assert texts_print(["a"], ["b"]) != texts_print(["b"], ["a"])
