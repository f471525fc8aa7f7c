import math

import numpy as np
import pytest

from embeddings.evaluation import JudgedQuery, fit_thresholds, gains, judged_pairs, mean_metrics, measure
from embeddings.metrics import labeller_agreement

TITLES = {"a": "red shoe", "b": "blue shoe", "c": "lamp", "d": "sofa"}
QUERIES = [
    JudgedQuery("q1", "red shoe", {"a": 2, "b": 1, "c": 0}, truth={"a": 2, "d": 1}),
    JudgedQuery("q2", "lamp", {"c": 0, "d": 0}),
]


def test_metrics_of_a_small_case_by_hand():
    # q1 ranks d (unjudged), b, a, c
    scores = np.array([0.5, 0.6, 0.1, 0.3, 0.3])
    found = measure(QUERIES, [["d", "b", "a", "c"], ["a", "b", "c", "d"]], scores, TITLES)
    assert judged_pairs(QUERIES) == [(0, "a", 2), (0, "b", 1), (0, "c", 0), (1, "c", 0), (1, "d", 0)]
    assert found.per_query[1] is None
    assert found.num_queries == 1
    ideal = 1 + 0.5 / math.log2(3)
    assert found.metrics["ndcg@10"] == pytest.approx((0.5 / math.log2(3) + 1 / 2) / ideal)
    assert found.metrics["judged_ndcg@10"] == pytest.approx((0.5 + 1 / math.log2(3)) / ideal)
    assert found.metrics["judged@10"] == 0.75
    assert found.metrics["recall@10"] == 1.0
    assert found.metrics["truth_ndcg@10"] == pytest.approx((0.5 + 1 / 2) / ideal)
    # the query without a relevant product still counts for separation: 0.5 lies above all three zeros
    assert found.metrics["auc_2v0"] == 1.0
    assert found.metrics["auc_2v1"] == 0.0
    assert found.metrics["average_margin"] == pytest.approx(0.4)
    # only the pair (red shoe, a) shares 70 % of the words, so no query has both grades there
    assert "overlap_average_margin" not in found.metrics


def test_gains_are_paired_differences():
    better = measure(QUERIES, [["a", "b", "c", "d"], ["c", "d", "a", "b"]], np.array([0.9, 0.5, 0.1, 0.2, 0.3]), TITLES)
    worse = measure(QUERIES, [["d", "c", "b", "a"], ["c", "d", "a", "b"]], np.array([0.1, 0.5, 0.9, 0.2, 0.3]), TITLES)
    found = gains([better], [worse], seed=0)
    expected = better.metrics["ndcg@10"] - worse.metrics["ndcg@10"]
    assert found["ndcg@10"].mean == pytest.approx(expected)
    assert found["auc_2v1"].mean == 1.0
    assert found["auc_2v0"].mean == pytest.approx(1.0)


def test_gains_of_several_seeds_are_those_of_their_means():
    def encoder(best, scores):
        ranking = [best, *(product for product in "abcd" if product != best)]
        return measure(QUERIES, [ranking, list("cdab")], np.array(scores), TITLES)

    new = [encoder("a", [0.9, 0.5, 0.1, 0.2, 0.3]), encoder("b", [0.3, 0.5, 0.1, 0.2, 0.3])]
    old = [encoder("d", [0.1, 0.5, 0.9, 0.2, 0.3])]

    found = gains(new, old, seed=0)

    for name in ("ndcg@10", "auc_2v1"):
        apart = [one.metrics[name] - old[0].metrics[name] for one in new]
        assert apart[0] != apart[1]
        assert found[name].mean == pytest.approx(np.mean(apart)), name
        assert mean_metrics(new)[name] == pytest.approx(np.mean([one.metrics[name] for one in new]))
    same = gains([new[0], new[0]], [new[0]], seed=0)
    assert same["ndcg@10"] == (0, 0, 0)
    with pytest.raises(ValueError, match="at least one encoder"):
        gains([], old, seed=0)


def test_thresholds_split_separable_grades_without_error():
    scores = [0.1, 0.2, 0.25, 0.5, 0.55, 0.8, 0.9]
    grades = [0, 0, 0, 1, 1, 2, 2]
    low, high = fit_thresholds(scores, grades)
    assert 0.25 < low <= 0.5
    assert 0.55 < high <= 0.8


def test_thresholds_are_the_best_of_all_by_kappa():
    generator = np.random.default_rng(3)
    grades = generator.integers(0, 3, size=60)
    scores = np.round(grades * 0.2 + generator.normal(scale=0.2, size=60), 2)
    low, high = fit_thresholds(scores, grades)

    def kappa(first, second):
        predicted = (scores >= first).astype(int) + (scores >= second)
        return labeller_agreement(grades, predicted)["quadratic_weighted_kappa"]

    cuts = [*np.unique(scores), scores.max() + 1]
    best = max(kappa(a, b) for a in cuts for b in cuts if a <= b)
    assert kappa(low, high) == pytest.approx(best, abs=1e-3)


def test_no_product_need_be_exact_where_no_judged_one_is():
    low, high = fit_thresholds([0.1, 0.2, 0.8, 0.9], [0, 0, 1, 1])
    assert 0.2 < low <= 0.8
    assert high > 0.9


def test_thresholds_need_two_grades():
    assert fit_thresholds([0.1, 0.2], [1, 1]) is None
    assert fit_thresholds([], []) is None
