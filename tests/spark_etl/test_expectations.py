"""Expectations of profiles: what fires, what chance alone may do, and what is kept of a profile."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon

from conf.load import ConfigError, load
from spark_etl import expectations
from spark_etl.expectations import Profile, bounds_of, measure, profile_of, shannon_distance, shares_between
from spark_etl.recipes import QualityRecipe, TableExpectations

GRID = np.arange(1, expectations.NUM_QUANTILES + 1) / (expectations.NUM_QUANTILES + 1)
NOTHING_ALLOWED = QualityRecipe(max_row_drop=0, max_row_growth=0, max_null_rate_rise=0, max_drift=0)


def numbers(values):
    """The profile of a numeric column."""
    return Profile(len(values), quantiles={"x": np.quantile(values, GRID, method="inverted_cdf").tolist()})


def kinds(counts):
    """The profile of a column of few values."""
    return Profile(int(sum(counts)), counts={"kind": {str(place): int(one) for place, one in enumerate(counts) if one}})


def found(now, before, bounds=None):
    return {one.metric: one for one in measure(now, before, bounds or QualityRecipe())}


@pytest.mark.parametrize("seed", range(5))
def test_the_distance_is_that_of_jensen_and_shannon(seed):
    one, other = np.random.default_rng(seed).dirichlet(np.full(6, 0.3), 2).round(3)
    one, other = one / one.sum(), other / other.sum()
    assert shannon_distance(one.tolist(), other.tolist()) == pytest.approx(jensenshannon(one, other, 2), abs=1e-7)


def test_a_value_that_comes_or_goes_has_a_finite_distance():
    assert shannon_distance([1, 0], [0, 1]) == 1
    assert 0 < shannon_distance([1, 0], [0.99, 0.01]) < 0.1
    assert shannon_distance([0.3, 0.7], [0.3, 0.7]) == 0


DRAWS = {
    "lognormal": lambda rng, size: numbers(rng.lognormal(0, 2, size)),
    "mostly none": lambda rng, size: numbers(rng.poisson(0.3, size).astype(float)),
    "places": lambda rng, size: numbers(rng.integers(1, 11, size).astype(float)),
    "signed": lambda rng, size: numbers(rng.normal(0, 1, size)),
    "even": lambda rng, size: kinds(rng.multinomial(size, [0.2] * 5)),
    "rare": lambda rng, size: kinds(rng.multinomial(size, [0.95, 0.03, 0.01, 0.01])),
}


@pytest.mark.parametrize("draw", DRAWS)
def test_samples_of_one_distribution_do_not_fire_however_small(draw):
    """1,500 pairs of samples of 5 to 3,000 rows with no drift allowed: one in 10,000 may fire, so .15 are expected."""
    rng = np.random.default_rng(11)
    alarms = 0
    for _ in range(1500):
        size, before = (round(5 * 600 ** rng.random()) for _ in range(2))
        measures = measure(DRAWS[draw](rng, size), DRAWS[draw](rng, before), NOTHING_ALLOWED)
        alarms += any(not one.met for one in measures if one.metric.startswith("drift/"))
    assert alarms <= 2


def test_a_real_shift_fires_once_there_are_rows_enough_to_tell():
    rng = np.random.default_rng(3)
    before, shifted = rng.lognormal(0, 1, 4000), rng.lognormal(0, 1, 4000) * 2
    for size, fires in ((20, False), (4000, True)):
        one = found(numbers(shifted[:size]), numbers(before[:size]))["drift/x"]
        assert (not one.met) == fires, size
    for size, fires in ((30, False), (3000, True)):
        grades = found(kinds([0, size / 3, 2 * size / 3]), kinds([size / 3] * 3))["drift/kind"]
        assert (not grades.met) == fires, size
        # half of (1/3 + 1/3 log 2/3 + 2/3 log 4/3), by hand
        assert grades.value == pytest.approx(np.sqrt(0.5 * (1 / 3 + np.log2(2 / 3) / 3 + 2 / 3 * np.log2(4 / 3))))


def test_a_crowd_of_rates_near_an_edge_may_move_by_a_hair_but_not_double():
    rng = np.random.default_rng(4)
    rates = np.where(rng.random(5000) < 0.7, 0.2, rng.beta(2, 8, 5000))
    assert found(numbers(rates * 1.02), numbers(rates))["drift/x"].value < 0.05
    doubled = found(numbers(rates * 2), numbers(rates))["drift/x"]
    assert not doubled.met
    assert doubled.value > 0.3


def test_shares_between_edges_are_those_of_the_rows():
    quantiles = np.quantile(np.arange(1, 1001), GRID, method="inverted_cdf").tolist()
    # what lies within a quarter of an edge is shared out between its sides
    assert shares_between(quantiles, [100.0, 500.0]) == pytest.approx([0.1, 0.4, 0.5], abs=0.02)
    assert shares_between([-2.0, -1.0, 0.0, 3.0], [-1.5, 0.0]) == [0.25, 0.5, 0.25]
    assert shares_between([5.0] * 9, [5.0]) == [0.5, 0.5]


def test_rows_may_fall_and_rise_by_the_share_and_by_chance():
    """By hand: 8,000 - 3.719 x (8,000 x 1.8)^.5 = 7,553.7 and 20,000 + 3.719 x (20,000 x 3)^.5 = 20,910.9."""
    for rows, is_met in ((7552, False), (7553, True), (20_911, True), (20_912, False)):
        assert found(Profile(rows), Profile(10_000))["rows"].met == is_met, rows
    assert found(Profile(4), Profile(10))["rows"].met
    assert found(Profile(7000), Profile(10_000))["rows"].setting == "max_row_drop"
    assert found(Profile(30_000), Profile(10_000))["rows"].setting == "max_row_growth"


def test_a_null_rate_may_rise_by_the_share_and_by_chance():
    """By hand: .1 + .1 + 3.719 x (.1008 x .8992 / 1,000 + .2008 x .7992 / 1,000)^.5 = .2589."""
    before = Profile(1000, nulls={"brand": 100})
    for nulls, is_met in ((258, True), (259, False), (0, True), (1000, False)):
        assert found(Profile(1000, nulls={"brand": nulls}), before)["null_rate/brand"].met == is_met, nulls
    assert found(Profile(8, nulls={"brand": 3}), Profile(8, nulls={"brand": 0}))["null_rate/brand"].met


def test_without_a_published_run_only_the_absolute_expectation_counts():
    profile = Profile(5, nulls={"b": 5}, counts={"kind": {"x": 5}}, quantiles={"x": [1.0] * 99})
    for before in (None, Profile(0)):
        assert all(one.met for one in measure(profile, before, NOTHING_ALLOWED))
    few = found(profile, None, QualityRecipe(min_rows=6))["rows"]
    assert (few.met, few.at_least, few.setting) == (False, 6.0, "min_rows")
    assert not found(profile, Profile(5), QualityRecipe(min_rows=6, max_row_drop=1))["rows"].met


def test_a_data_set_without_rows_has_lost_all_of_them_and_nothing_else_is_said():
    lost = measure(Profile(0), Profile(1000, nulls={"b": 1}), QualityRecipe())
    assert [(one.metric, one.met, one.before) for one in lost] == [("rows", False, 1000)]


def test_a_column_that_lost_all_values_has_no_drift():
    before = Profile(900, {"x": 0, "kind": 0}, {"kind": {"a": 900}}, {"x": [1.0] * 99})
    measures = found(Profile(900, {"x": 900, "kind": 900}, {"kind": {}}, {}), before)
    assert {name for name, one in measures.items() if not one.met} == {"null_rate/x", "null_rate/kind"}
    assert not any(name.startswith("drift/") for name in measures)


values = st.text(max_size=4)
counts = st.dictionaries(values, st.integers(1, 400), min_size=1, max_size=5)


@settings(max_examples=60, deadline=None)
@given(counts, st.integers(0, 300), st.lists(st.floats(-9, 9), min_size=99, max_size=99))
def test_a_profile_is_found_again_from_its_measures(held, nulls, quantiles):
    rows = sum(held.values()) + nulls
    profile = Profile(rows, {"kind": nulls, "x": 0}, {"kind": held}, {"x": sorted(quantiles)})
    kept = {one.metric: (one.value, one.quantiles) for one in measure(profile, None, QualityRecipe())}
    assert profile_of(kept) == profile


def test_a_table_may_have_bounds_of_its_own():
    recipe = QualityRecipe(max_drift=0.3, tables=(TableExpectations(table="engagement", min_rows=7, max_drift=0.0),))
    own, other = bounds_of(recipe, "engagement"), bounds_of(recipe, "query")
    assert (own.min_rows, own.max_drift, own.max_row_drop) == (7, 0.0, recipe.max_row_drop)
    assert (other.min_rows, other.max_drift) == (0, 0.3)


@pytest.mark.parametrize("tables", ["[{table: engagment}]", "[{table: query}, {table: query, min_rows: 1}]"])
def test_bounds_of_no_table_or_of_one_twice_are_refused(tables):
    with pytest.raises(ConfigError, match=r"quality\.tables: 'engagment|query' is no table, or named twice"):
        load(QualityRecipe, {}, [f"tables={tables}"])
