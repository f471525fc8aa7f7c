"""The click model against an independent fit, known truth and the distributions of SciPy."""

from itertools import pairwise

import numpy as np
import pytest
from pyspark.sql import functions as sf
from scipy.optimize import minimize
from scipy.stats import beta

from spark_etl.click_model import bin_of, fit_click_models
from spark_etl.recipes import ClickModelRecipe
from spark_etl.shrinkage import fit_priors, posterior

SCHEMA = "dataset string, query_id string, product_id string, position int, impressions bigint, clicks bigint"
LOOKS = np.arange(1, 7) ** -0.8


def shop(seed, num_pairs=3000):
    """Counts of pairs whose attraction is known, each shown at all places, better ones more often at the top."""
    rng = np.random.default_rng(seed)
    attraction = rng.beta(0.8, 2.5, num_pairs).clip(1e-3, 0.99)
    often = rng.gamma(0.5, 20, num_pairs)[:, None] * attraction[:, None] ** np.linspace(0.5, 0, 6)
    shown = rng.poisson(often)
    clicks = rng.binomial(shown, attraction[:, None] * LOOKS)
    return attraction, shown, clicks


def as_frame(spark, shown, clicks, dataset="d"):
    rows = [
        (dataset, "q", f"p{pair}", int(place) + 1, int(shown[pair, place]), int(clicks[pair, place]))
        for pair, place in zip(*np.nonzero(shown), strict=True)
    ]
    return spark.createDataFrame(rows, SCHEMA)


def by_likelihood(shown, clicks):
    """Where the clicks of each pair, given how many they are, fall as they do with the greatest chance."""
    several = (clicks.sum(1) > 0) & ((shown > 0).sum(1) > 1)
    shown, clicks = shown[several], clicks[several]

    def loss_and_slope(free):
        looks = np.exp(np.concatenate([[0.0], free]))
        due = shown * looks
        total = due.sum(1, keepdims=True)
        chance = np.where(shown > 0, np.log(np.maximum(due, 1e-300) / total), 0.0)
        slope = (clicks.sum(1, keepdims=True) * due / total - clicks).sum(0)[1:]
        return -(clicks * chance).sum(), slope

    found = minimize(loss_and_slope, np.zeros(shown.shape[1] - 1), jac=True, method="BFGS", options={"gtol": 1e-7})
    return np.exp(np.concatenate([[0.0], found.x]))


def test_the_fit_is_the_likeliest_and_near_the_truth(spark):
    _, shown, clicks = shop(0)
    model = fit_click_models(as_frame(spark, shown, clicks), ClickModelRecipe(tolerance=1e-7))[0]
    assert model.converged
    assert model.first_position_K == (1, 2, 3, 4, 5, 6)
    assert model.examination_K == pytest.approx(by_likelihood(shown, clicks), abs=1e-4)
    assert model.examination_K == pytest.approx(LOOKS, rel=0.1)
    told = [one.log_likelihood for one in model.rounds]
    assert all(later >= earlier - 1e-6 for earlier, later in pairwise(told))
    assert len(told) < 30


def test_a_shop_that_puts_its_best_first_hardly_bends_the_fit(spark):
    """The clicks at a place, over those at the first, tell of the products there as much as of the looks."""
    rng = np.random.default_rng(4)
    attraction = np.sort(rng.beta(2.0, 4.0, (2000, 6)))[:, ::-1]
    usual = np.tile(np.arange(6), (2000, 1))
    usual[:, 3:5] = np.where(rng.random((2000, 1)) < 0.5, usual[:, 3:5], usual[:, [4, 3]])
    shown, clicks = np.zeros((12_000, 6), int), np.zeros((12_000, 6), int)
    pair = np.arange(12_000).reshape(2000, 6)
    for _ in range(60):
        place = np.argsort(usual + rng.gumbel(0, 0.5, usual.shape)).argsort()
        shown[pair, place] += 1
        clicks[pair, place] += rng.random(place.shape) < attraction * LOOKS[place]
    raw = clicks.sum(0) / shown.sum(0)
    model = fit_click_models(as_frame(spark, shown, clicks), ClickModelRecipe())[0]
    assert np.abs(raw / raw[0] / LOOKS - 1).max() > 0.4
    assert model.examination_K == pytest.approx(LOOKS, rel=0.06)


def test_places_that_no_product_shares_keep_the_rates_of_their_clicks(spark, caplog):
    shown = np.array([[100, 0, 0], [0, 100, 100], [0, 100, 50]])
    clicks = np.array([[60, 0, 0], [0, 30, 0], [0, 24, 0]])
    model = fit_click_models(as_frame(spark, shown, clicks), ClickModelRecipe())[0]
    assert model.examination_K[:2] == pytest.approx((1.0, 0.27 / 0.6))
    assert model.examination_K[2] < 1e-5
    assert "no clicked product" not in caplog.text
    apart = fit_click_models(as_frame(spark, np.diag([100, 100, 100]), np.diag([60, 30, 12])), ClickModelRecipe())[0]
    assert apart.examination_K == pytest.approx((1.0, 0.5, 0.2))
    assert "no clicked product was at several places" in caplog.text


def test_data_sets_are_fitted_apart_and_one_with_too_few_clicks_is_not(spark):
    _, shown, clicks = shop(1, 300)
    few = as_frame(spark, np.array([[5, 5]]), np.array([[1, 1]]), "few")
    both = fit_click_models(as_frame(spark, shown, clicks).unionByName(few), ClickModelRecipe())
    alone = fit_click_models(as_frame(spark, shown, clicks), ClickModelRecipe())
    assert [model.dataset for model in both] == ["d", "few"]
    assert both[0].examination_K == pytest.approx(alone[0].examination_K, abs=1e-6)
    assert (both[1].examination_K, both[1].rounds, both[1].converged) == ((1.0, 1.0), (), False)


def test_places_are_binned_from_their_first(spark):
    recipe = ClickModelRecipe(first_positions=(1, 2, 5))
    rows = spark.createDataFrame([(place,) for place in (1, 2, 4, 5, 99)], "position int")
    assert [row["bin"] for row in rows.select(bin_of(sf.col("position"), recipe).alias("bin")).collect()] == [
        1,
        2,
        2,
        5,
        5,
    ]
    with pytest.raises(ValueError, match="rising places"):
        ClickModelRecipe(first_positions=(2, 3))


def test_the_prior_is_that_of_the_rates_whatever_the_places(spark):
    rng = np.random.default_rng(3)
    rate = rng.beta(2.0, 6.0, 20_000)
    shown = rng.poisson(3.0, (len(rate), 6))
    hits = rng.binomial(shown, rate[:, None] * LOOKS).sum(1)
    rows = [
        ("x", float(hit), float(trials), float(squares))
        for hit, trials, squares in zip(hits, shown @ LOOKS, shown @ LOOKS**2, strict=True)
    ]
    pairs = spark.createDataFrame(rows, "class string, hits double, trials double, squares double")
    prior = fit_priors(pairs, ["hits"], ["class"])["x",]["hits"]
    assert prior.successes == pytest.approx(2.0, rel=0.1)
    assert prior.failures == pytest.approx(6.0, rel=0.1)


def test_an_interval_of_a_rate_is_that_of_the_beta_distribution(spark):
    cases = [(0.0, 0.0), (0.0, 50.0), (1.0, 2.5), (3.0, 3.0), (40.0, 400.0), (900.0, 1000.0)]
    columns = posterior(sf.col("hits"), sf.col("trials"), (sf.lit(0.7), sf.lit(2.5)))
    frame = spark.createDataFrame(cases, "hits double, trials double")
    named = [column.alias(name) for column, name in zip(columns, ("mean", "low", "high"), strict=True)]
    for (hits, trials), row in zip(cases, frame.select(*named).collect(), strict=True):
        exact = beta(hits + 0.7, trials - hits + 2.5)
        assert row["mean"] == pytest.approx(exact.mean(), abs=1e-9)
        near = 0.02 if min(exact.args) >= 3 else 0.13
        assert row["low"] == pytest.approx(exact.ppf(0.025), abs=near)
        assert row["high"] == pytest.approx(exact.ppf(0.975), abs=near)
