import numpy as np
import pyarrow as pa
import pytest

from embeddings.anchors import (
    ANCHOR_TEXTS,
    NUM_ANCHORS,
    AnchorRecipe,
    choose_anchors,
    drift_sentence,
    measure_drift,
    read_anchors,
    write_anchors,
)


def judged(num_pairs):
    columns = {name: [f"{name} {row}" for row in range(num_pairs)] for name in ANCHOR_TEXTS}
    columns |= {"query_hash": [f"{row % 7:064x}" for row in range(num_pairs)]}
    columns |= {"product_hash": [f"{(row * 7919) % 2**32:064x}" for row in range(num_pairs)]}
    return pa.table(columns | {"grade": pa.array([row % 3 for row in range(num_pairs)], pa.int8())})


def answers(num_pairs, seed=0):
    return np.random.default_rng(seed).dirichlet([1, 1, 1], num_pairs)


def test_anchors_are_chosen_by_their_texts_alone_and_kept_with_their_answers(tmp_path):
    pairs, answer_N3 = judged(1000), answers(1000)
    order = np.random.default_rng(1).permutation(1000)

    anchors = choose_anchors(pairs, answer_N3)

    assert len(anchors) == NUM_ANCHORS
    assert anchors.equals(choose_anchors(pairs.take(order), answer_N3[order]))
    assert set(np.unique(anchors["grade"].to_numpy())) == {0, 1, 2}
    first = int(anchors["query"][0].as_py().split()[1])
    assert [anchors[f"p{grade}"][0].as_py() for grade in range(3)] == answer_N3[first].tolist()
    write_anchors(tmp_path, anchors)
    assert read_anchors(tmp_path).equals(anchors)
    assert read_anchors(tmp_path / "elsewhere") is None


def test_drift_is_the_change_of_rates_kappa_and_probabilities():
    anchors = choose_anchors(judged(90), answers(90))
    same_N3 = np.stack([anchors[f"p{grade}"].to_numpy() for grade in range(3)], axis=1)
    none = measure_drift(anchors, same_N3)
    assert (none.rate_change, none.kappa_drop, none.largest_change) == (0, 0, 0)
    assert drift_sentence(none, AnchorRecipe()) == ""

    perfect_N3 = np.eye(3)[anchors["grade"].to_numpy()]
    better = measure_drift(anchors, perfect_N3)
    assert better.kappa_drop < 0
    assert "kappa" not in drift_sentence(better, AnchorRecipe(max_rate_change=1))

    broken_N3 = same_N3.copy()
    broken_N3[0] = np.nan
    assert measure_drift(anchors, broken_N3).largest_change == 1

    always_2 = measure_drift(anchors, np.tile([0.1, 0.1, 0.8], (90, 1)))
    share_2 = (same_N3.argmax(axis=1) == 2).mean()
    assert always_2.rate_change == pytest.approx(1 - share_2)
    assert "a grade's share moved by" in drift_sentence(always_2, AnchorRecipe())
