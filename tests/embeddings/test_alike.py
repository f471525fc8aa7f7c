import numpy as np
import pytest

from embeddings import alike
from embeddings.alike import alike_order


def around(centres, copies, spread=0.05):
    """Normalised vectors near each centre, and the centre that each belongs to, shuffled."""
    generator = np.random.default_rng(0)
    owner = generator.permutation(np.repeat(np.arange(len(centres)), copies))
    vectors = centres[owner] + spread * generator.standard_normal((len(owner), centres.shape[1]))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32), owner


@pytest.mark.parametrize("bucket", [4096, 24])
def test_a_run_holds_rows_of_one_corner(monkeypatch, bucket):
    monkeypatch.setattr(alike, "_BUCKET", bucket)
    vectors, owner = around(np.eye(16), copies=4)

    order = alike_order(vectors, 4, seed=1)

    assert sorted(order.tolist()) == list(range(64))
    alone = [len(set(run)) == 1 for run in owner[order].reshape(16, 4).tolist()]
    # a corner that a bucket's edge runs through is torn
    assert np.mean(alone) == 1 if bucket == 4096 else np.mean(alone) > 0.5


def test_orders_differ_by_seed_and_by_nothing_else():
    vectors, owner = around(np.eye(16), copies=4, spread=0.5)
    one = alike_order(vectors, 4, seed=1)
    np.testing.assert_array_equal(one, alike_order(vectors.copy(), 4, seed=1))
    other = alike_order(vectors, 4, seed=2)
    assert one.tolist() != other.tolist()
    # runs come in no order of corners
    firsts = owner[one].reshape(16, 4)[:, 0].tolist()
    assert firsts != sorted(firsts)


@pytest.mark.parametrize(("count", "size"), [(10, 4), (3, 8), (1, 1), (9, 3)])
def test_a_short_run_comes_last(count, size):
    vectors, _ = around(np.eye(count), copies=1)
    order = alike_order(vectors, size, seed=0)
    assert sorted(order.tolist()) == list(range(count))
