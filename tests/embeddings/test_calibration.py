import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embeddings.calibration import (
    Calibration,
    calibrate,
    fit_calibration,
    fit_calibrations,
    fit_class_rates,
    fit_temperature,
    grades_of,
    query_weights,
    rate_cuts,
)
from embeddings.metrics import labeller_agreement


def population(num_pairs, seed=0, rates=(1.0, 1.0, 1.0)):
    """True probabilities of pairs in a population of given relative class rates, and grades drawn from them."""
    rng = np.random.default_rng(seed)
    given_N3 = np.exp(1.5 * rng.normal(size=(num_pairs, 3))) * np.array(rates)
    true_N3 = given_N3 / given_N3.sum(axis=1, keepdims=True)
    return true_N3, (true_N3.cumsum(axis=1) < rng.random((num_pairs, 1))).sum(axis=1).clip(max=2)


def sharpened(probability_N3, power, weight=(1.0, 1.0, 1.0)):
    changed_N3 = probability_N3**power * np.array(weight)
    return changed_N3 / changed_N3.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("num_pairs", [400, 20_000])
def test_overconfidence_and_wrong_class_rates_are_undone(num_pairs):
    true_N3, grade_N = population(num_pairs)
    answered_N3 = sharpened(true_N3, 3.0, (4.0, 1.0, 0.5))

    found = fit_calibration(answered_N3, grade_N, np.ones(len(grade_N)), Calibration())

    assert found.temperature == pytest.approx(3.0, rel=0.25 if num_pairs < 1000 else 0.05)
    assert bool(found.relevant) == (num_pairs >= 1000)
    off = np.abs(found(answered_N3) - true_N3).mean()
    assert off < (0.06 if num_pairs < 1000 else 0.02) < np.abs(answered_N3 - true_N3).mean()


def test_curves_repair_what_a_temperature_cannot():
    true_N3, grade_N = population(40_000)
    above_N, top_N = 1 - true_N3[:, 0], true_N3[:, 2]
    answered_N3 = np.stack([1 - above_N**3, above_N**3 - (top_N * above_N**2), top_N * above_N**2], axis=1)
    found = fit_calibration(answered_N3, grade_N, np.ones(len(grade_N)), Calibration())
    scale = Calibration(temperature=found.temperature, bias=found.bias)

    fresh_N3, fresh_grade_N = answered_N3[::2], grade_N[::2]

    losses = [-np.log(one(fresh_N3)[np.arange(20_000), fresh_grade_N]).mean() for one in (found, scale)]
    assert losses[0] < losses[1]
    curve = np.array(found.exact)
    assert (np.diff(curve, axis=0) >= 0).all()
    assert curve[0].tolist() == [0, 0]
    assert curve[-1].tolist() == [1, 1]


def test_judged_pairs_of_a_data_set_have_their_own_calibration_and_other_pairs_a_temperature():
    true_N3, grade_N = population(3_000)
    answered_N3 = sharpened(true_N3, 2.0, (4.0, 1.0, 1.0))
    datasets, queries = ["large"] * 2_900 + ["small"] * 100, [str(row // 5) for row in range(3_000)]

    found = fit_calibrations(answered_N3, grade_N, datasets, queries, "rates")

    assert found.keys() == {"", "large", "small"}
    assert found[""] == Calibration(temperature=fit_temperature(answered_N3, grade_N, np.ones(3_000)))
    assert found["large"].bias[0] == pytest.approx(-np.log(4) / 2, abs=0.15)
    by_hand = [found["large"](answered_N3[:1]), found[""](answered_N3[-1:])]
    given = calibrate(found, ["large", "unknown"], answered_N3[[0, -1]])
    np.testing.assert_allclose(given, np.concatenate(by_hand))
    plain = fit_calibrations(answered_N3, grade_N, datasets, queries, "most_probable")
    assert [one.cuts for one in plain.values()] == [None] * 3
    answered_N = grades_of(found, ["large", "unknown"], given)
    assert answered_N.tolist() == [found["large"].grades(given[:1])[0], given[1].argmax()]


def test_a_data_set_of_few_queries_stays_nearer_to_the_usual_calibration_than_one_of_many():
    true_N3, grade_N = population(400)
    answered_N3 = sharpened(true_N3, 1.0, (4.0, 1.0, 1.0))
    usual = Calibration(temperature=1.1)

    bias = [
        fit_calibration(answered_N3, grade_N, query_weights([row // size for row in range(400)]), usual).bias[0]
        for size in (1, 100, 400)
    ]

    assert -1.6 < bias[0] < bias[1] < bias[2] < 0
    assert query_weights(["a"] * 20 + ["b"]).tolist() == [0.5] * 20 + [1.0]
    assert fit_calibration(true_N3[:0], grade_N[:0], np.ones(0), usual) == usual


def test_cuts_give_a_rare_grade_as_often_as_it_occurs_and_agree_better_with_people():
    rng = np.random.default_rng(0)
    place_N = rng.normal(size=20_000)
    # seven in a hundred are irrelevant, and hardly ever is that the most probable grade
    true_N3 = np.exp(np.stack([-1.6 - 0.7 * place_N, 0.3 - 0.2 * place_N, 0.4 * place_N], axis=1))
    true_N3 /= true_N3.sum(axis=1, keepdims=True)
    grade_N = (true_N3.cumsum(axis=1) < rng.random((20_000, 1))).sum(axis=1)
    by_cuts = Calibration(cuts=rate_cuts(true_N3, np.ones(20_000))).grades(true_N3)
    by_most = Calibration().grades(true_N3)

    assert (by_most == 0).mean() < 0.01 < 0.06 < (grade_N == 0).mean()
    np.testing.assert_allclose(np.bincount(by_cuts) / 20_000, true_N3.mean(axis=0), atol=1e-3)
    agreement = [labeller_agreement(grade_N, found)["quadratic_weighted_kappa"] for found in (by_cuts, by_most)]
    assert agreement[0] > agreement[1] + 0.02


def test_the_temperature_is_that_of_least_loss():
    true_N3, grade_N = population(20_000)
    found = fit_temperature(sharpened(true_N3, 3.0), grade_N, np.ones(len(grade_N)))
    assert found == pytest.approx(3.0, rel=0.05)
    assert fit_temperature(true_N3[:0], grade_N[:0], np.ones(0)) == 1.0


def test_a_small_sample_moves_the_class_rates_and_not_the_temperature():
    known_N3, known_grade_N = population(5_000)
    other_N3, other_grade_N = population(300, seed=1, rates=(8.0, 1.0, 1.0))
    # the labeller judges the other population as if its class rates were those it knows
    answered_N3 = sharpened(other_N3, 2.0, (1 / 64, 1.0, 1.0))
    usual = fit_calibration(sharpened(known_N3, 2.0), known_grade_N, np.ones(5_000), Calibration())

    moved = fit_class_rates(usual, answered_N3, other_grade_N)

    assert moved.temperature == usual.temperature
    assert moved.bias[0] - usual.bias[0] > 1
    assert moved(answered_N3)[:, 0].mean() == pytest.approx((other_grade_N == 0).mean(), abs=0.03)
    assert abs(usual(answered_N3)[:, 0].mean() - (other_grade_N == 0).mean()) > 0.15


def test_without_pairs_nothing_changes_and_a_grade_that_is_missing_stays_possible():
    true_N3, grade_N = population(50)
    np.testing.assert_allclose(fit_calibration(true_N3[:0], grade_N[:0], np.ones(0), Calibration())(true_N3), true_N3)

    kept = grade_N > 0
    found = fit_calibration(true_N3[kept], grade_N[kept], np.ones(kept.sum()), Calibration())

    assert found(np.array([[0.98, 0.01, 0.01]]))[0, 0] > 0.05


@given(
    rows=st.lists(st.tuples(*(st.floats(0, 1) for _ in range(3))).filter(lambda row: sum(row) > 0.1), min_size=1),
    temperature=st.floats(0.05, 20),
    bias=st.tuples(*(st.floats(-10, 10) for _ in range(3))),
)
def test_calibrated_probabilities_are_a_distribution(rows, temperature, bias):
    given_N3 = np.array(rows) / np.array(rows).sum(axis=1, keepdims=True)
    curve = ((0.0, 0.0), (0.3, 0.7), (1.0, 1.0))
    for calibration in (
        Calibration(temperature=temperature, bias=bias),
        Calibration(temperature=temperature, bias=bias, relevant=curve, exact=curve),
    ):
        found_N3 = calibration(given_N3)
        assert (found_N3 >= 0).all()
        np.testing.assert_allclose(found_N3.sum(axis=1), 1)
