import numpy as np
import pytest
from sklearn import metrics as reference

from embeddings.calibration import expected_grade
from embeddings.labeller_metrics import (
    bootstrap_queries,
    calibration_error,
    calibration_floor,
    labeller_metrics,
    reliability,
)


def judged(num_pairs=3000, seed=0):
    rng = np.random.default_rng(seed)
    raw_N3 = rng.dirichlet([1.0, 1.5, 1.0], num_pairs)
    return raw_N3, (raw_N3.cumsum(axis=1) < rng.random((num_pairs, 1))).sum(axis=1).clip(max=2)


def test_metrics_equal_those_of_scikit_learn():
    probability_N3, grade_N = judged()
    expected_N = probability_N3 @ [0, 1, 2]
    predicted_N = np.searchsorted([0.7, 1.4], expected_N)

    found = labeller_metrics(probability_N3, predicted_N, grade_N)

    assert found["accuracy"] == pytest.approx(reference.accuracy_score(grade_N, predicted_N))
    assert found["macro_f1"] == pytest.approx(reference.f1_score(grade_N, predicted_N, average="macro"))
    kappa = reference.cohen_kappa_score(grade_N, predicted_N, weights="quadratic")
    assert found["quadratic_weighted_kappa"] == pytest.approx(kappa)
    assert found["recall_0"] == pytest.approx(reference.recall_score(grade_N == 0, predicted_N == 0))
    assert found["precision_0"] == pytest.approx(reference.precision_score(grade_N == 0, predicted_N == 0))
    assert found["nll"] == pytest.approx(reference.log_loss(grade_N, probability_N3))
    for name, high, low in (("auc_2v1", 2, 1), ("auc_1v0", 1, 0), ("auc_2v0", 2, 0)):
        both = np.isin(grade_N, (high, low))
        assert found[name] == pytest.approx(reference.roc_auc_score(grade_N[both] == high, expected_N[both]))


def test_grades_that_nobody_gave_define_no_metric():
    probability_N3, _ = judged(20)
    found = labeller_metrics(probability_N3, np.zeros(20, int), np.ones(20, int))
    assert {"recall_0", "auc_2v1", "auc_1v0", "auc_2v0"}.isdisjoint(found)


def test_calibration_error_is_the_gap_of_each_bin_by_hand():
    probability_N3 = np.array([[0.6, 0.2, 0.2], [0.1, 0.8, 0.1], [0.0, 0.1, 0.9], [0.5, 0.4, 0.1]])
    grade_N = np.array([0, 0, 2, 1])
    # two bins of two: (.5, .6) with one right, (.8, .9) with one right
    assert calibration_error(probability_N3, grade_N, bins=2) == pytest.approx((0.1 + 0.7) / 4)
    assert reliability(probability_N3, grade_N, bins=2) == [(0.55, 0.5, 2), (pytest.approx(0.85), 0.5, 2)]


def test_a_perfect_judge_is_at_the_floor_and_the_floor_falls_with_the_pairs():
    floors = []
    for num_pairs in (300, 30_000):
        probability_N3, grade_N = judged(num_pairs)
        floors.append(calibration_floor(probability_N3, seed=0))
        assert calibration_error(probability_N3, grade_N) < 2.5 * floors[-1]
    assert floors[1] < floors[0] / 5
    too_sure_N3 = probability_N3**4 / (probability_N3**4).sum(axis=1, keepdims=True)
    assert calibration_error(too_sure_N3, grade_N) > 10 * floors[1]


def test_intervals_hold_the_value_and_widen_where_queries_are_few():
    probability_N3, grade_N = judged()

    def measure(rows):
        return labeller_metrics(probability_N3[rows], probability_N3[rows].argmax(axis=1), grade_N[rows])

    rows = np.arange(len(grade_N))
    many, few = (bootstrap_queries(measure, query_N, resamples=60, seed=0) for query_N in (rows // 3, rows // 300))
    assert many == bootstrap_queries(measure, rows // 3, resamples=60, seed=0)
    assert many.keys() == measure(rows).keys()
    for name in ("accuracy", "auc_2v1", "quadratic_weighted_kappa"):
        assert many[name].low < many[name].mean < many[name].high
        assert many[name].mean == few[name].mean == measure(rows)[name]
    np.testing.assert_allclose(expected_grade(probability_N3), probability_N3[:, 1] + 2 * probability_N3[:, 2])
