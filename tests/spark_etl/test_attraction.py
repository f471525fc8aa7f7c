"""Classes of pairs against known truth, and attraction against the same computed with NumPy."""

import numpy as np
import pytest

from spark_etl.attraction import MAX_SAMPLE, fit_classes, with_attraction

KINDS = ("clicks", "carts")
SCHEMA = (
    "dataset string, query_id string, product_id string, clicks bigint, carts bigint, trials double, "
    "clicks_mean double, carts_mean double"
)


def shop(seed, num_pairs=4000):
    """Pairs of two classes, of which the better one has twice the clicks and ten times the carts."""
    rng = np.random.default_rng(seed)
    is_better = rng.random(num_pairs) < 0.3
    lift_2 = np.where(is_better[:, None], [1.6, 2.5], [0.8, 0.25]) * rng.gamma(30.0, 1 / 30.0, (num_pairs, 2))
    trials = rng.gamma(2.0, 10.0, num_pairs)
    mean_2 = np.array([0.2, 0.1])
    return is_better, rng.poisson(lift_2 * trials[:, None] * mean_2), trials, mean_2


def as_frame(spark, seen, trials, mean, dataset="d"):
    rows = [
        (dataset, f"q{n % 7}", f"p{n}", *map(int, events), float(looks), *map(float, mean))
        for n, (events, looks) in enumerate(zip(seen, trials, strict=True))
    ]
    return spark.createDataFrame(rows, SCHEMA)


def by_product(frame):
    return {(row["dataset"], row["product_id"]): row["attraction"] for row in frame.collect()}


def expected(seen, trials, mean, found):
    """Mean lift of the first kind over classes, by Bayes' rule, times its rate."""
    due, inverse = trials[:, None] * mean, found.shape / found.lift_KJ
    log = np.log(found.share_K) + (
        found.shape * np.log(inverse) - (seen[:, None] + found.shape) * np.log(due[:, None] + inverse)
    ).sum(axis=2)
    weight = np.exp(log - log.max(axis=1, keepdims=True))
    lift = (seen[:, :1] + found.shape) / (due[:, :1] + inverse[:, 0])
    return np.minimum(mean[0] * (weight * lift).sum(axis=1) / weight.sum(axis=1), 0.99)


def test_classes_find_the_lifts_and_shares_that_pairs_were_drawn_with():
    is_better, seen, trials, mean = shop(0)
    found = fit_classes(seen.astype(float), trials[:, None] * mean)
    assert found.share_K.sum() == pytest.approx(1)
    # lifts of the mean are known well; that of carts tells the two classes apart
    upper = found.lift_KJ[:, 1] > 1
    assert found.share_K[upper].sum() == pytest.approx(is_better.mean(), abs=0.03)
    for rows, lift in ((upper, (1.6, 2.5)), (~upper, (0.8, 0.25))):
        share = found.share_K[rows] / found.share_K[rows].sum()
        assert share @ found.lift_KJ[rows] == pytest.approx(lift, rel=0.15)


def test_the_order_of_rows_changes_nothing():
    _, seen, trials, mean = shop(1, 500)
    due = trials[:, None] * mean
    turned = np.random.default_rng(0).permutation(len(seen))
    one, other = fit_classes(seen.astype(float), due), fit_classes(seen[turned].astype(float), due[turned])
    assert one.shape == other.shape
    assert np.array_equal(one.lift_KJ, other.lift_KJ)
    assert np.array_equal(one.share_K, other.share_K)


def test_carts_tell_more_of_the_click_rate_than_clicks_alone(spark):
    is_better, seen, trials, mean = shop(2)
    found = by_product(with_attraction(as_frame(spark, seen, trials, mean), KINDS, 0.99))
    value = np.array([found["d", f"p{n}"] for n in range(len(seen))])
    classes = fit_classes(seen.astype(float), trials[:, None] * mean)
    assert value == pytest.approx(expected(seen, trials, mean, classes), rel=1e-9)
    rate = mean[0] * np.where(is_better, 1.6, 0.8)
    alone = by_product(with_attraction(as_frame(spark, seen, trials, mean), KINDS[:1], 0.99))
    value_alone = np.array([alone["d", f"p{n}"] for n in range(len(seen))])
    raw = seen[:, 0] / trials
    errors = [float(np.mean((guess - rate) ** 2)) for guess in (raw, value_alone, value)]
    assert errors[1] < 0.5 * errors[0]
    assert errors[2] < 0.6 * errors[1]


def test_with_many_looks_a_pair_has_its_own_rate(spark):
    _, seen, trials, mean = shop(3, 1000)
    seen[:2], trials[:2] = [[150_000, 0], [3000, 25_000]], 500_000.0
    found = by_product(with_attraction(as_frame(spark, seen, trials, mean), KINDS))
    assert found["d", "p0"] == pytest.approx(0.3, rel=0.01)
    assert found["d", "p1"] == pytest.approx(0.006, rel=0.02)


def test_odd_data_sets(spark):
    _, seen, trials, mean = shop(4, 300)
    frame = as_frame(spark, seen, trials, mean)
    alone = by_product(with_attraction(frame, KINDS))
    never = as_frame(spark, np.zeros((30, 2)), np.ones(30), (1e-9, 1e-9), "never")
    one = as_frame(spark, np.ones((1, 2)), np.ones(1), (0.5, 0.5), "one")
    always = as_frame(spark, np.full((30, 2), 40), np.full(30, 40.0), (0.99, 0.99), "always")
    unseen = frame.selectExpr("'unseen' as dataset", *frame.columns[1:5], "0d as trials", "null as a", "null as b")
    unseen = unseen.toDF(*frame.columns)
    mixed = frame.unionByName(never).unionByName(one).unionByName(always).unionByName(unseen)
    found = by_product(with_attraction(mixed, KINDS, 0.99))
    assert {key: value for key, value in found.items() if key[0] == "d"} == alone
    assert {value for (dataset, _), value in found.items() if dataset == "unseen"} == {None}
    assert 0 <= found["never", "p0"] < 1e-6
    assert 0.3 < found["one", "p0"] <= 0.99
    assert 0.9 < found["always", "p0"] <= 0.99
    assert set(with_attraction(mixed, KINDS).columns) == {*frame.columns, "attraction"}
    assert set(by_product(with_attraction(unseen, KINDS)).values()) == {None}


def test_classes_of_a_large_data_set_come_of_a_sample(spark):
    from pyspark.sql import functions as sf

    from spark_etl.attraction import _samples

    large = spark.range(10 * MAX_SAMPLE).select(
        sf.lit("large").alias("dataset"),
        sf.col("id").cast("string").alias("query_id"),
        sf.lit("p").alias("product_id"),
        *(sf.col("id").alias(name) for name in KINDS),
        sf.lit(1.0).alias("trials"),
        *(sf.lit(0.1).alias(f"{name}_mean") for name in KINDS),
    )
    seen, due = _samples(large, KINDS)["large"]
    assert len(seen) == len(due) == pytest.approx(MAX_SAMPLE, rel=0.05)
    assert len(np.unique(seen[:, 0])) == len(seen)
