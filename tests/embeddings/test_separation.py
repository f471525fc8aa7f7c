"""Separation against counting every pair of scores, and against scikit-learn."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from embeddings.separation import auc, bootstrap_auc_difference, separation, token_overlap

COARSE = st.integers(-4, 4).map(lambda value: value / 4)


def count_pairs(high, low):
    return np.mean([1.0 if h > n else 0.5 if h == n else 0.0 for h in high for n in low])


@given(st.lists(COARSE, min_size=1, max_size=30), st.lists(COARSE, min_size=1, max_size=30))
def test_auc_equals_counting_pairs_and_scikit_learn(high, low):
    assert auc(high, low) == pytest.approx(count_pairs(high, low), abs=1e-12)
    labels = [1] * len(high) + [0] * len(low)
    assert auc(high, low) == pytest.approx(roc_auc_score(labels, high + low), abs=1e-12)


def test_auc_of_an_empty_sample_is_refused():
    with pytest.raises(ValueError, match="two samples"):
        auc([], [0.1])


@given(st.lists(st.tuples(COARSE, st.integers(0, 2), st.integers(0, 4)), max_size=40))
@settings(deadline=None)
def test_separation_equals_loops_over_queries(pairs):
    scores, grades, queries = ([pair[at] for pair in pairs] for at in range(3))
    values = separation(scores, grades, queries)
    expected = {}

    def of(grade, query=None):
        return [s for s, g, q in pairs if g == grade and query in (None, q)]

    for high, low in ((2, 1), (1, 0), (2, 0)):
        if of(high) and of(low):
            expected[f"auc_{high}v{low}"] = count_pairs(of(high), of(low))
        both = [query for query in range(5) if of(high, query) and of(low, query)]
        if both:
            name = f"auc_{high}v{low}_per_query"
            expected[name] = np.mean([count_pairs(of(high, query), of(low, query)) for query in both])
    margins = [query for query in range(5) if of(2, query) and of(0, query)]
    if margins:
        expected["average_margin"] = np.mean([np.mean(of(2, q)) - np.mean(of(0, q)) for q in margins])
        expected["worst_case_margin"] = np.mean([min(of(2, q)) - max(of(0, q)) for q in margins])
    expected |= {f"mean_score_{grade}": np.mean(of(grade)) for grade in range(3) if of(grade)}
    assert values == pytest.approx(expected, abs=1e-12)


def test_separation_by_hand():
    values = separation([0.9, 0.5, 0.6, 0.1, 0.8, 0.7], [2, 2, 0, 0, 1, 0], [7, 7, 7, 7, 3, 3])
    assert values["auc_2v0"] == pytest.approx(4 / 6)
    assert values["auc_2v0_per_query"] == pytest.approx(3 / 4)
    assert values["auc_1v0_per_query"] == 1
    assert values["auc_2v1"] == pytest.approx(1 / 2)
    assert "auc_2v1_per_query" not in values
    assert values["average_margin"] == pytest.approx(0.7 - 0.35)
    assert values["worst_case_margin"] == pytest.approx(-0.1)
    assert values["mean_score_1"] == 0.8


def test_arrays_of_different_length_are_refused():
    with pytest.raises(ValueError, match="align them by pair"):
        separation([0.1, 0.2], [0, 1], [0])


def judged_pairs(generator, num_queries, pairs_per_query):
    """Scores of two models that share a shift per query, so that pairs of one query are dependent."""
    query = np.repeat(np.arange(num_queries), pairs_per_query)
    grade = generator.integers(0, 3, size=query.size)
    shift = generator.normal(0, 0.5, size=num_queries)[query]
    noise = generator.normal(0, 1, size=query.size)
    return (
        grade * 0.8 + shift + noise,
        grade * 0.6 + shift + noise + generator.normal(0, 0.5, query.size),
        grade,
        query,
    )


def test_bootstrap_equals_recomputing_the_auc_of_every_resample():
    generator = np.random.default_rng(0)
    score_a, score_b, grade, query = judged_pairs(generator, 12, 6)
    score_a, score_b = np.round(score_a, 1), np.round(score_b, 1)  # ties
    intervals = bootstrap_auc_difference(score_a, score_b, grade, query * 10 + 3, resamples=50, seed=9)
    draws, differences = np.random.default_rng(9), {name: [] for name in ("auc_2v1", "auc_1v0", "auc_2v0")}
    for _ in range(50):
        members = np.concatenate([np.flatnonzero(query == q) for q in draws.integers(12, size=12)])
        for name, found in differences.items():
            high, low = (grade[members] == int(name[at]) for at in (4, 6))
            a, b = score_a[members], score_b[members]
            found.append(count_pairs(a[high], a[low]) - count_pairs(b[high], b[low]))
    for name, found in differences.items():
        assert intervals[name][1:] == pytest.approx(np.percentile(found, [2.5, 97.5]), abs=1e-12)
        pooled = separation(score_a, grade, query)[name] - separation(score_b, grade, query)[name]
        assert intervals[name].mean == pytest.approx(pooled, abs=1e-12)


def test_bootstrap_covers_the_true_difference_as_often_as_it_says():
    big = judged_pairs(np.random.default_rng(1), 20_000, 6)
    truth = {n: separation(big[0], *big[2:])[n] - separation(big[1], *big[2:])[n] for n in ("auc_2v1", "auc_2v0")}
    covered = dict.fromkeys(truth, 0)
    for seed in range(150):
        sample = judged_pairs(np.random.default_rng(100 + seed), 60, 6)
        intervals = bootstrap_auc_difference(*sample, resamples=200, seed=seed)
        for name in covered:
            covered[name] += intervals[name].low <= truth[name] <= intervals[name].high
    assert all(0.88 <= count / 150 <= 0.99 for count in covered.values()), covered


def test_bootstrap_is_deterministic_and_zero_between_equal_models():
    sample = judged_pairs(np.random.default_rng(2), 20, 5)
    first = bootstrap_auc_difference(*sample, resamples=100, seed=4)
    assert first == bootstrap_auc_difference(*sample, resamples=100, seed=4)
    assert first != bootstrap_auc_difference(*sample, resamples=100, seed=5)
    same = bootstrap_auc_difference(sample[0], sample[0], *sample[2:], resamples=100, seed=4)
    assert all(interval == (0, 0, 0) for interval in same.values())


def test_bootstrap_leaves_out_pairs_of_grades_that_are_missing():
    intervals = bootstrap_auc_difference([0.9, 0.1, 0.8], [0.2, 0.3, 0.4], [2, 0, 2], [0, 1, 2], resamples=60, seed=0)
    assert set(intervals) == {"auc_2v0"}
    assert np.isfinite(intervals["auc_2v0"]).all()
    assert bootstrap_auc_difference([], [], [], [], resamples=10, seed=0) == {}


def test_bootstrap_of_home_depot_size_takes_seconds():
    sample = judged_pairs(np.random.default_rng(3), 617, 6)
    started = time.perf_counter()
    bootstrap_auc_difference(*sample, resamples=1000, seed=0)
    assert time.perf_counter() - started < 30


@pytest.mark.parametrize(
    ("query", "title", "share"),
    [
        ("Red running shoes", "RED shoes, size 42", 2 / 3),
        ("usb-c cable", "Cable USB C 2m", 1.0),
        ("crème brûlée", "Crème caramel", 0.5),
        ("red red", "blue", 0.0),
        ("snake_case", "case snake", 1.0),
        ("!?", "anything", 0.0),
    ],
)
def test_token_overlap(query, title, share):
    assert token_overlap(query, title) == pytest.approx(share)
