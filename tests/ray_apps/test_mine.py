import numpy as np
import pytest

from embeddings.shards import plan_shards, write_vectors
from ray_apps.mine import Search, mine

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture(scope="module")
def vectors():
    generator = np.random.default_rng(0)
    vectors = generator.normal(size=(120, 8)).astype(np.float32)
    vectors[40:60] = vectors[:20]  # products of equal text
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def shards_of(folder, vectors, num_shards):
    shards = plan_shards(folder, len(vectors), num_shards)
    for shard in shards:
        own = vectors[shard.first_row : shard.first_row + shard.num_rows]
        write_vectors(shard.path, own, [f"p{row}" for row in range(len(own))])
    return shards


def test_one_shard_and_three_find_the_same_to_the_bit(tmp_path, vectors):
    queries = vectors[::7] + np.float32(0.01)
    is_kept = np.arange(len(vectors)) % 5 != 0
    one, three = (shards_of(tmp_path, vectors, count) for count in (1, 3))
    searches = [Search(shards, queries, kept) for shards in (one, three) for kept in (None, is_kept)]
    whole_1, kept_1, whole_3, kept_3 = mine(searches, 10, num_actors=2, threads_per_actor=1)
    for left, right in ((whole_1, whole_3), (kept_1, kept_3)):
        assert np.array_equal(left.score_QK, right.score_QK)
        assert np.array_equal(left.row_QK, right.row_QK)
    assert not (kept_1.row_QK % 5 == 0).any()
    assert whole_3.shard_QK.tolist() == (whole_3.row_QK // 40).tolist()
    exact = queries.astype(float) @ vectors.astype(float).T
    reference = np.array([np.lexsort((np.arange(120), -row.astype(np.float32)))[:10] for row in exact])
    assert np.array_equal(whole_1.row_QK, reference)


def test_a_small_catalogue_gives_all_it_has(tmp_path, vectors):
    (found,) = mine([Search(shards_of(tmp_path, vectors[:4], 2), vectors[:3])], 10, num_actors=2, threads_per_actor=1)
    assert found.row_QK.shape == (3, 4)
    assert found.row_QK[:, 0].tolist() == [0, 1, 2]
