"""Rates per look against a computation with NumPy and against known truth."""

import numpy as np
import pytest

from spark_etl.rates import RATES, with_rates
from spark_etl.recipes import EngagementRecipe

SCHEMA = (
    "dataset string, query_id string, product_id string, stratum int, clicks bigint, carts bigint, purchases bigint, "
    "trials double, squares double"
)


def shop(seed, num_queries=300, per_query=12):
    """Pairs whose rate is that of their query, of the ranker's liking, and their own; most are looked at little."""
    rng = np.random.default_rng(seed)
    query = np.repeat(np.arange(num_queries), per_query)
    of_query = rng.beta(3.0, 6.0, num_queries)[query]
    liked = rng.normal(size=len(query))
    rate = np.clip(of_query * np.exp(0.4 * liked + 0.4 * rng.normal(size=len(query))), 0.001, 0.99)
    shown = rng.poisson(3 * np.exp(1.2 * liked)) + 1
    look = rng.uniform(0.1, 1.0, len(query))
    clicks = rng.binomial(shown, rate * look)
    return query, rate, shown, look, clicks


def as_frame(spark, query, shown, look, clicks, dataset="d"):
    rows = [
        (dataset, f"q{q}", f"p{n}", 1 + int(q) % 2, int(c), int(c) // 2, 0, float(s * v), float(s * v * v))
        for n, (q, s, v, c) in enumerate(zip(query, shown, look, clicks, strict=True))
    ]
    return spark.createDataFrame(rows, SCHEMA)


def strength(successes, mean, trials, squares, weight=1.0):
    off = successes - mean * trials
    variance = (weight * (off**2 - mean * trials + mean**2 * squares)).sum()
    return float(np.clip((weight * mean * (1 - mean) * (trials**2 - squares)).sum() / variance - 1, 0.5, 1e5))


def test_a_rate_is_drawn_to_its_query_and_its_share_of_looks(spark):
    query, rate, shown, look, clicks = shop(0)
    found = with_rates(as_frame(spark, query, shown, look, clicks), EngagementRecipe(num_exposures=4)).toPandas()
    found = found.assign(place=found.product_id.str[1:].astype(int)).sort_values("place").reset_index()
    trials, squares = shown * look, shown * look * look
    mean = np.zeros(len(query))
    for stratum in (1, 2):  # queries of a class, without the pair itself
        rows = (1 + query % 2) == stratum
        of = np.unique(query[rows])
        hits, seen, seen_2 = (np.array([column[query == q].sum() for q in of]) for column in (clicks, trials, squares))
        middle = hits.sum() / seen.sum()
        k = strength(hits, middle, seen, seen_2)
        at = np.searchsorted(of, query[rows])
        others = hits[at] - clicks[rows]
        mean[rows] = (others + k * middle) / (np.maximum(seen[at] - trials[rows], others) + k)
    share = trials / np.bincount(query, trials)[query]
    bounds = np.quantile(share, [0.25, 0.5, 0.75], method="inverted_cdf")
    part = (share[:, None] > bounds).sum(1)
    lift = (np.bincount(part, clicks) + 1) / (np.bincount(part, trials * mean) + 1)
    mean = np.minimum(mean * lift[part], 0.99)
    k = strength(clicks, mean, trials, squares, 1 / np.maximum(trials, 1) ** 2)
    expected = (clicks + k * mean) / (np.maximum(trials, clicks) + k)
    assert found.click_rate.to_numpy() == pytest.approx(expected, rel=1e-6)
    assert (found.click_rate_low < found.click_rate).all()
    assert (found.click_rate < found.click_rate_high).all()
    covered = (found.click_rate_low < rate) & (rate < found.click_rate_high)
    assert 0.9 < covered.mean() < 0.99
    ordered = [
        np.corrcoef(np.argsort(np.argsort(one)), np.argsort(np.argsort(rate)))[0, 1]
        for one in (clicks / trials, found.click_rate)
    ]
    assert ordered[1] > ordered[0] + 0.1
    assert set(found.columns) >= {f"{name}{end}" for name in RATES.values() for end in ("", "_low", "_high")}
    assert "part" not in found.columns
    # half of the clicks went into the cart: what all events say is about what clicks say
    assert found.attraction.between(0, 0.99).all()
    assert np.corrcoef(found.attraction, found.click_rate)[0, 1] > 0.9
    assert found.attraction.mean() == pytest.approx(found.click_rate.mean(), rel=0.1)


def test_a_few_pairs_that_all_shoppers_see_do_not_decide_how_much_rates_vary(spark):
    rng = np.random.default_rng(2)
    query = np.repeat(np.arange(400), 10)
    rate = rng.beta(2.0, 8.0, len(query))  # worth ten looks
    shown = np.where(rng.random(len(query)) < 0.005, 3000, 1 + rng.poisson(8, len(query)))
    # those are liked by nearly all or by nearly none
    rate[shown == 3000] = np.where(rng.random((shown == 3000).sum()) < 0.5, 0.01, 0.6)
    look = np.ones(len(query))
    frame = as_frame(spark, query, shown, look, rng.binomial(shown, rate))
    found = with_rates(frame, EngagementRecipe(num_exposures=1)).toPandas()
    # one more click moves the rate by 1 / (looks + strength)
    alike = found[found.trials == 9]
    slope, _ = np.polyfit(alike.clicks, alike.click_rate, 1)
    # what such pairs do to the means of their queries takes some of the ten; by squares of looks less than one is left
    assert 4 < 1 / slope - 9 < 14


def test_what_nobody_looked_at_has_no_rate_and_leaves_the_others_theirs(spark):
    query, _, shown, look, clicks = shop(1, num_queries=40)
    known = as_frame(spark, query, shown, look, clicks)
    unseen = as_frame(spark, np.arange(5), np.zeros(5), np.ones(5), np.zeros(5), "unseen")
    one = as_frame(spark, np.zeros(1, int), np.ones(1), np.ones(1), np.ones(1), "one")
    alone = {row["product_id"]: row["click_rate"] for row in with_rates(known, EngagementRecipe()).collect()}
    found = with_rates(known.unionByName(unseen).unionByName(one), EngagementRecipe()).collect()
    rates = {dataset: {} for dataset in ("d", "unseen", "one")}
    for row in found:
        rates[row["dataset"]][row["product_id"]] = row["click_rate"]
        assert (row["attraction"] is None) == (row["click_rate"] is None)
    assert rates["d"] == pytest.approx(alone)
    assert set(rates["unseen"].values()) == {None}
    assert 0 < rates["one"]["p0"] <= 1
