"""Metrics against ir_measures and scikit-learn, and by hand."""

import ir_measures
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ir_measures import P, R, nDCG
from sklearn.metrics import cohen_kappa_score

from embeddings.metrics import (
    Interval,
    bootstrap_mean,
    labeller_agreement,
    ndcg,
    paired_bootstrap,
    per_query_metrics,
)

JUDGED_10 = ir_measures.Judged @ 10
REFERENCE = {f"ndcg@{k}": nDCG(dcg="log2") @ k for k in (10, 50, 100)}
REFERENCE |= {f"recall@{k}": R(rel=1) @ k for k in (10, 50, 100)}
REFERENCE |= {f"precision@{k}": P(rel=1) @ k for k in (10, 50, 100)}
REFERENCE |= {f"recall_exact@{k}": R(rel=2) @ k for k in (10, 50, 100)}
REFERENCE |= {f"precision_exact@{k}": P(rel=2) @ k for k in (10, 50, 100)}


def by_ir_measures(measures, ranking, judged):
    qrels = [ir_measures.Qrel("q", product, grade) for product, grade in judged.items()]
    run = [ir_measures.ScoredDoc("q", product, -float(place)) for place, product in enumerate(ranking)]
    return ir_measures.calc_aggregate(measures, qrels, run)


@st.composite
def judged_rankings(draw):
    """A ranking of a catalogue, sparse grades, and judged products that the ranking may miss."""
    size = draw(st.integers(1, 160))
    catalogue = [f"p{number}" for number in range(size)]
    ranking = draw(st.permutations(catalogue))
    judged_ids = draw(st.lists(st.sampled_from([*catalogue, "unseen-1", "unseen-2"]), min_size=1, unique=True))
    judged = {product: draw(st.integers(0, 2)) for product in judged_ids}
    return ranking, judged, draw(st.permutations(judged_ids))


@given(judged_rankings())
@settings(max_examples=150, deadline=None)
def test_metrics_equal_ir_measures(case):
    ranking, judged, judged_ranking = case
    metrics = per_query_metrics(ranking, judged, judged_ranking)
    if not any(judged.values()):
        assert metrics is None
        return
    measures = {key: measure for key, measure in REFERENCE.items() if key in metrics}
    expected = by_ir_measures([*measures.values(), JUDGED_10], ranking, judged)
    on_judged = by_ir_measures([REFERENCE["ndcg@10"]], judged_ranking, judged)
    for key, measure in measures.items():
        assert metrics[key] == pytest.approx(expected[measure], abs=1e-9), key
    assert metrics["judged@10"] == pytest.approx(expected[JUDGED_10], abs=1e-9)
    assert metrics["judged_ndcg@10"] == pytest.approx(on_judged[REFERENCE["ndcg@10"]], abs=1e-9)
    assert len(metrics) == len(measures) + 2
    assert ("recall_exact@10" in metrics) == (2 in judged.values())


def test_metrics_by_hand():
    judged = {"a": 2, "b": 1, "c": 0, "d": 1}
    metrics = per_query_metrics(["x", "b", "a", "c"], judged, ["a", "b", "c", "d"])
    ideal = 1 + 0.5 / np.log2(3) + 0.5 / 2
    assert metrics["ndcg@10"] == pytest.approx((0.5 / np.log2(3) + 1 / 2) / ideal)
    assert metrics["recall@10"] == pytest.approx(2 / 3)
    assert metrics["precision@10"] == pytest.approx(0.2)
    assert metrics["recall_exact@10"] == 1
    assert metrics["precision_exact@50"] == pytest.approx(1 / 50)
    assert metrics["judged@10"] == pytest.approx(3 / 4)
    assert metrics["judged_ndcg@10"] == pytest.approx((1 + 0.5 / np.log2(3) + 0.5 / np.log2(5)) / ideal)


def test_a_query_without_a_relevant_product_has_no_metrics():
    assert per_query_metrics(["a", "b"], {"a": 0}, ["a"]) is None
    assert per_query_metrics(["a", "b"], {}, []) is None


def test_recall_of_exact_products_is_left_out_where_none_exists():
    metrics = per_query_metrics(["a", "b"], {"a": 1}, ["a"])
    assert "recall_exact@10" not in metrics
    assert metrics["precision_exact@10"] == 0


@pytest.mark.parametrize(
    ("ranking", "judged_ranking"), [(["a", "a"], ["a", "b"]), (["a", "b"], ["a"]), (["a", "b"], ["a", "c"])]
)
def test_rankings_that_do_not_fit_the_judgements_are_refused(ranking, judged_ranking):
    with pytest.raises(ValueError, match="per_query_metrics"):
        per_query_metrics(ranking, {"a": 2, "b": 0}, judged_ranking)


def test_ndcg_without_an_ideal_gain_is_refused():
    with pytest.raises(ValueError, match="leave such queries out"):
        ndcg([0.0, 0.0], [0.0], 10)


def test_bootstrap_covers_the_mean_as_often_as_it_says():
    generator = np.random.default_rng(0)
    samples = generator.normal(0.3, 1.0, size=(300, 60))
    intervals = [bootstrap_mean(sample, resamples=300, seed=index) for index, sample in enumerate(samples)]
    covered = np.mean([interval.low <= 0.3 <= interval.high for interval in intervals])
    assert 0.90 <= covered <= 0.98


def test_paired_bootstrap_sees_a_small_steady_gain_that_unpaired_noise_would_hide():
    generator = np.random.default_rng(1)
    difficulty = generator.uniform(0, 1, size=200)
    better = difficulty + 0.02 + generator.normal(0, 0.02, size=200)
    interval = paired_bootstrap(better, difficulty, seed=3)
    assert interval.mean == pytest.approx((better - difficulty).mean())
    assert 0.01 < interval.low < interval.mean < interval.high < 0.03
    unpaired = bootstrap_mean(better, seed=3)
    assert unpaired.high - unpaired.low > 5 * (interval.high - interval.low)


def test_bootstrap_repeats_with_its_seed_and_refuses_what_has_no_mean():
    values = [0.1, 0.9, 0.4, 0.6]
    assert bootstrap_mean(values, seed=5) == bootstrap_mean(values, seed=5) != bootstrap_mean(values, seed=6)
    assert bootstrap_mean([0.5, 0.5], seed=0) == Interval(0.5, 0.5, 0.5)
    for wrong in ([], [0.1, float("nan")]):
        with pytest.raises(ValueError, match="finite"):
            bootstrap_mean(wrong, seed=0)
    with pytest.raises(ValueError, match="same queries"):
        paired_bootstrap([0.1], [0.1, 0.2], seed=0)


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=2, max_size=60))
@settings(deadline=None)
def test_agreement_equals_scikit_learn(pairs):
    human, predicted = (list(grades) for grades in zip(*pairs, strict=True))
    agreement = labeller_agreement(human, predicted)
    assert agreement["accuracy"] == pytest.approx(np.mean(np.equal(human, predicted)))
    assert agreement["within_1"] == pytest.approx(np.mean(np.abs(np.subtract(human, predicted)) <= 1))
    if len({*human, *predicted}) > 1:
        expected = cohen_kappa_score(human, predicted, labels=[0, 1, 2], weights="quadratic")
        assert agreement["quadratic_weighted_kappa"] == pytest.approx(expected, abs=1e-12)
    else:
        assert agreement["quadratic_weighted_kappa"] == 0


def test_agreement_by_hand():
    agreement = labeller_agreement([0, 0, 1, 2], [0, 1, 1, 0])
    # disagreement 0 + 1 + 0 + 4 = 5; by chance (2, 1, 1) x (2, 2, 0) / 4: 1 + .5 + .5*0 + 4*.5 + .5 = 4
    assert agreement["quadratic_weighted_kappa"] == pytest.approx(1 - 5 / 4)
    assert agreement["accuracy"] == 0.5
    assert agreement["within_1"] == 0.75
    assert agreement["confusion"] == [[1, 1, 0], [0, 1, 0], [1, 0, 0]]


@pytest.mark.parametrize(("human", "predicted"), [([], []), ([1], [1, 2]), ([3], [1]), ([1], [-1])])
def test_agreement_refuses_other_than_paired_grades(human, predicted):
    with pytest.raises(ValueError, match="labeller_agreement"):
        labeller_agreement(human, predicted)
