import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from embeddings.intervals import Draw, stratified_share, wilson

ENDLESS = 1e12


@pytest.mark.parametrize(("successes", "trials"), [(0, 10), (3, 10), (10, 10), (120, 500), (1, 1)])
def test_wilson_s_interval_is_scipy_s(successes, trials):
    expected = binomtest(successes, trials).proportion_ci(0.95, "wilson")
    assert wilson(successes / trials, trials) == pytest.approx((expected.low, expected.high), abs=1e-12)
    share = stratified_share([Draw(ENDLESS, trials, successes)])
    assert share == pytest.approx((successes / trials, expected.low, expected.high), abs=1e-9)


def test_strata_weigh_by_their_size_and_the_interval_is_yan_and_su_s():
    draws = [Draw(ENDLESS, 20, 4), Draw(3 * ENDLESS, 10, 5)]
    share = stratified_share(draws)
    assert share.value == pytest.approx(0.25 * 0.2 + 0.75 * 0.5)
    # by hand: half widths per unit of z, then the lowered quantile, then each stratum's interval at it
    z = 1.959964
    spread = [math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2)) / (1 + z**2 / n) for p, n in ((0.2, 20), (0.5, 10))]
    own = z * math.sqrt((0.25 * spread[0]) ** 2 + (0.75 * spread[1]) ** 2) / (0.25 * spread[0] + 0.75 * spread[1])
    expected = [0.0, 0.0]
    for weight, p, n in ((0.25, 0.2, 20), (0.75, 0.5, 10)):
        centre = (p + own**2 / (2 * n)) / (1 + own**2 / n)
        half = own * math.sqrt(p * (1 - p) / n + own**2 / (4 * n**2)) / (1 + own**2 / n)
        expected = [expected[0] + weight * (centre - half), expected[1] + weight * (centre + half)]
    assert (share.low, share.high) == pytest.approx(expected, abs=1e-6)


def test_what_was_drawn_whole_is_certain_and_what_was_not_drawn_is_left_out():
    assert stratified_share([Draw(8, 8, 2)]) == (0.25, 0.25, 0.25)
    assert stratified_share([Draw(8, 8, 2), Draw(100, 0, 0)]) == (0.25, 0.25, 0.25)
    assert stratified_share([Draw(100, 0, 0)]) is None
    assert stratified_share([]) is None
    half = stratified_share([Draw(8, 8, 2), Draw(8, 1, 0)])
    assert half.value == half.low == 0.125 < half.high < 0.125 + 0.5


def test_of_many_draws_about_95_percent_of_the_intervals_hold_the_truth():
    generator = np.random.default_rng(4)
    sizes, drawn = np.array([400, 200, 100, 40, 15]), np.array([20, 12, 6, 3, 2])
    shares = np.array([0.1, 0.3, 0.6, 0.05, 0.5])
    populations = [np.arange(size) < round(size * share) for size, share in zip(sizes, shares, strict=True)]
    truth = sum(population.sum() for population in populations) / sizes.sum()
    held, values = 0, []
    for _ in range(2000):
        draws = [
            Draw(len(population), count, int(generator.choice(population, count, replace=False).sum()))
            for population, count in zip(populations, drawn, strict=True)
        ]
        share = stratified_share(draws)
        held += share.low <= truth <= share.high
        values.append(share.value)
    # four deviations of 2000 trials at 95 %: 2 %
    assert 0.93 < held / 2000 < 0.985
    assert np.mean(values) == pytest.approx(truth, abs=4 * np.std(values) / math.sqrt(2000))


@given(
    st.lists(
        st.tuples(st.integers(1, 500), st.integers(0, 500), st.integers(0, 500)).map(
            lambda row: Draw(row[0], min(row[:2]), min(row))
        ),
        max_size=8,
    )
)
def test_an_interval_holds_its_share_within_0_and_1(draws):
    share = stratified_share(draws)
    assert (share is None) == (not any(draw.trials for draw in draws))
    if share is not None:
        assert -1e-12 <= share.low <= share.value <= share.high <= 1 + 1e-12
