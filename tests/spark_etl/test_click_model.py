"""The click model against an independent fit, known truth and the distributions of SciPy."""

from itertools import pairwise

import numpy as np
import pytest
from pyspark.sql import functions as sf
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


def plain_em(shown, clicks, prior, num_rounds):
    """Textbook rounds with attraction found by bisection; the looks at the first place stay 1."""
    missed, clicked = shown - clicks, clicks.sum(1)
    looks = clicks.sum(0) / shown.sum(0)
    looks = np.minimum(looks / looks[0], 1)
    for _ in range(num_rounds):
        low, high = np.full(len(shown), 1e-12), np.full(len(shown), 1 - 1e-12)
        for _ in range(60):
            middle = (low + high) / 2
            slope = (
                (clicked + prior.successes) / middle
                - (missed * looks / (1 - looks * middle[:, None])).sum(1)
                - prior.failures / (1 - middle)
            )
            low, high = np.where(slope > 0, middle, low), np.where(slope > 0, high, middle)
        found = ((low + high) / 2)[:, None]
        unseen = (missed * (1 - found) / (1 - looks * found)).sum(0)
        looks = (clicks.sum(0) + looks * unseen) / shown.sum(0)
    return looks


def test_the_fit_comes_to_where_plain_rounds_go_and_near_the_truth(spark):
    _, shown, clicks = shop(0)
    model = fit_click_models(as_frame(spark, shown, clicks), ClickModelRecipe(tolerance=1e-7))[0]
    assert model.converged
    assert model.first_position_K == (1, 2, 3, 4, 5, 6)
    assert model.examination_K == pytest.approx(plain_em(shown, clicks, model.prior, 400), abs=1e-4)
    assert model.examination_K == pytest.approx(LOOKS, rel=0.1)
    told = [one.log_posterior for one in model.rounds]
    assert all(later >= earlier - 1e-6 for earlier, later in pairwise(told))
    assert len(told) < 30


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
