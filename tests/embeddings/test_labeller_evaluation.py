import numpy as np
import pytest

from embeddings.labeller_evaluation import (
    GradedPairs,
    JudgeRecipe,
    measure_judge,
    rate_probabilities,
    score_probabilities,
    slices_of_pairs,
)

RECIPE = JudgeRecipe(resamples=20, min_slice_pairs=300)


def graded(num_pairs=2000, seed=0):
    """Probabilities, and pairs whose raters' mean is their expected grade half-way to the consensus."""
    rng = np.random.default_rng(seed)
    probability_N3 = rng.dirichlet([1, 1, 1], num_pairs)
    grade_N = (probability_N3.cumsum(axis=1) < rng.random((num_pairs, 1))).sum(axis=1).clip(max=2).astype(np.int8)
    value_N = (probability_N3 @ [0, 1, 2] + grade_N) / 2
    rows = np.arange(num_pairs)
    slices = {"half": rows % 2 == 0, "few": rows < 100}
    return probability_N3, GradedPairs(grade_N, value_N, rows // 20, rows >= num_pairs // 4, slices)


def test_test_pairs_alone_are_measured_whole_and_by_slices_that_are_large_enough():
    probability_N3, pairs = graded()
    answered_N = np.searchsorted([0.8, 1.2], probability_N3 @ [0, 1, 2])

    whole, half = measure_judge(probability_N3, answered_N, pairs, RECIPE)

    assert (whole.name, whole.num_pairs, whole.num_queries) == ("", 1500, 75)
    assert (half.name, half.num_pairs) == ("half", 750)
    right = answered_N == pairs.grade_N
    assert whole.metrics["accuracy"].mean == pytest.approx(right[500:].mean())
    assert sum(map(sum, whole.confusion)) == 1500
    assert sum(pairs for _, _, pairs in whole.reliability) == 1500
    assert 0 < whole.ece_floor < 0.05


def test_rmse_is_that_of_the_line_through_the_calibration_pairs():
    probability_N3, pairs = graded()
    expected_N = probability_N3 @ [0, 1, 2]
    design = np.stack([expected_N[:500], np.ones(500)], axis=1)
    line = np.linalg.lstsq(design, pairs.value_N[:500], rcond=None)[0]
    answered_N = probability_N3.argmax(axis=1)
    off = expected_N[500:] * line[0] + line[1] - pairs.value_N[500:]

    whole = measure_judge(probability_N3, answered_N, pairs, RECIPE)[0]

    assert whole.metrics["rmse"].mean == pytest.approx(np.sqrt((off**2).mean()))
    one_rater = GradedPairs(pairs.grade_N, pairs.grade_N.astype(float), pairs.query_N, pairs.is_test_N, {})
    assert "rmse" not in measure_judge(probability_N3, answered_N, one_rater, RECIPE)[0].metrics


def test_a_score_becomes_the_probabilities_it_stands_for():
    rng = np.random.default_rng(0)
    score_N = rng.random(20_000)
    grade_N = rng.binomial(2, score_N)

    found_N3 = score_probabilities(score_N, grade_N, np.array([0.1, 0.5, 0.9]))

    np.testing.assert_allclose(found_N3[1], [0.25, 0.5, 0.25], atol=0.06)
    assert found_N3[0].argmax() == 0
    assert found_N3[2].argmax() == 2
    assert score_probabilities(score_N, np.ones(20_000, int), score_N[:1]).tolist() == [[0, 1, 0]]
    assert rate_probabilities(np.array([2, 2, 0, 1]), 2).tolist() == [[0.25, 0.25, 0.5]] * 2


def test_slices_go_by_query_length_shared_words_and_widest_category():
    queries, titles = ["red shoe", "big red shoe", "shoe", "a b c d"], ["Red shoe", "a shoe", "lamp", "d c b a"]

    found = slices_of_pairs(queries, titles, ["Shoes > Red", None, "Lamps", "Shoes"])

    members = {name: np.flatnonzero(rows).tolist() for name, rows in found.items()}
    assert members == {
        "query of 1-2 words": [0, 2],
        "query of 3 words": [1],
        "query of 4 or more words": [3],
        "title holds no query word": [2],
        "title holds some query words": [1],
        "title holds all query words": [0, 3],
        "category Lamps": [2],
        "category Shoes": [0, 3],
    }
