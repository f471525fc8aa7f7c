"""What analysts ask: counts, texts, reasons and rates on rows whose answers are known by hand."""

import math

import pytest

from spark_etl import overview
from spark_etl.audit import judge_pairs
from spark_etl.recipes import AuditRecipe

PAIR = "dataset string, query_id string, product_id string"
CONFLICT = (
    f"{PAIR}, kind string, grade tinyint, stratum int, impressions bigint, wrong_probability double, priority double"
)
QUERY = "dataset string, query_id string, text string"
PRODUCT = "dataset string, product_id string, title string, brand string, category string"
EVIDENCE = (
    "num_marks int, clicks bigint, purchases bigint, click_rate double, click_rate_low double, click_rate_high double, "
    "p0 double, p1 double, p2 double, posterior_0 double, posterior_1 double, posterior_2 double, found_at timestamp"
)
SCORED = (
    f"{PAIR}, grade tinyint, impressions bigint, clicks bigint, stratum int, click_rate double, "
    "p0 double, p1 double, p2 double, posterior_0 double, posterior_1 double, posterior_2 double, "
    "wrong_probability double"
)


def test_conflicts_are_counted_and_held_against_all_judged_pairs(spark):
    rows = [
        ("d", "q", "a", "doubtful", 0, 1, 5, 0.25, 1.0),
        ("d", "q", "b", "doubtful", 0, 1, 7, 0.5, 1.0),
        ("d", "q", "c", "doubtful", 2, None, 0, 1.0, 1.0),
        ("e", "q", "a", "ignored_but_exact", 2, 3, 9, None, 1.0),
    ]
    conflicts = spark.createDataFrame(rows, CONFLICT)
    found = [tuple(row) for row in overview.count_conflicts(conflicts).collect()]
    assert found == [
        ("d", "doubtful", 0, 1, 2, 0.75, 12),
        ("d", "doubtful", 2, None, 1, 1.0, 0),
        ("e", "ignored_but_exact", 2, 3, 1, None, 9),
    ]
    # 1.0 belongs to the last part, and a pair without a probability to none
    histogram = [tuple(row) for row in overview.doubt_histogram(conflicts).collect()]
    assert histogram == [("d", "doubtful", 0.25, 1), ("d", "doubtful", 0.5, 1), ("d", "doubtful", 0.95, 1)]
    judged = spark.createDataFrame([("d", 0)] * 4 + [("d", 1)] * 3 + [("d", 2)] * 2, "dataset string, grade tinyint")
    shares = [tuple(row) for row in overview.conflict_shares(conflicts.where("dataset = 'd'"), judged).collect()]
    assert shares == [("d", 0, 4, 2, 0.5), ("d", 1, 3, 0, 0.0), ("d", 2, 2, 1, 0.5)]


def test_the_first_conflicts_come_in_order_with_texts_even_where_a_text_is_gone(spark):
    rows = [
        ("d", "q", name, "doubtful", 0, 1, 5, 0.3, priority) for name, priority in zip("abc", (1, 3, 2), strict=True)
    ]
    evidence = [
        (1, 0, 0, 0.1, 0.0, 0.2, None, None, None, *posterior, None)
        for posterior in (
            (0.7, 0.2, 0.1),
            (0.1, 0.2, 0.7),
            (0.4, 0.4, 0.2),
        )
    ]
    both = [(*row, *more) for row, more in zip(rows, evidence, strict=True)]
    conflicts = spark.createDataFrame([(*row[:8], float(row[8]), *row[9:]) for row in both], f"{CONFLICT}, {EVIDENCE}")
    queries = spark.createDataFrame([("d", "q", "red shoes"), ("e", "q", "another shop's")], QUERY)
    products = spark.createDataFrame(
        [("d", "b", "Shoe", "Fox", "Shoes"), ("e", "c", "wrong shop", None, None)], PRODUCT
    )
    found = overview.first_conflicts(conflicts, queries, products, 2).collect()
    told = [(row["product_id"], row["query"], row["title"], row["brand"], row["likely_grade"]) for row in found]
    # of two equally likely grades the lower
    assert told == [("b", "red shoes", "Shoe", "Fox", 2), ("c", "red shoes", None, None, 0)]


def test_only_the_newest_report_counts(spark):
    rows = [("old", "2026-01-01", "random", "all", ""), ("new", "2026-02-01", "random", "all", "")]
    schema = "run_id string, created_at string, part string, slice string, name string"
    report = spark.createDataFrame([*rows, ("new", "2026-02-01", "all", "figure", "f")], schema)
    assert [row["part"] for row in overview.newest_report(report).collect()] == ["all", "random"]


def test_every_pair_of_a_query_says_which_rules_it_meets_with_which_bounds(spark):
    """Shown pairs' rates are .01, .2, .3, .5: by the quantiles .3 and .7, below .2 is ignored, above .3 is loved."""
    sure = (0.9, 0.1, 0.0)
    rows = [
        ("loved", 0, 100, 9, 0.5, None, (0.6, 0.3, 0.1)),
        ("ignored", 2, 100, 1, 0.01, None, (0.3, 0.1, 0.6)),
        ("named", 2, 100, 8, 0.3, sure, (0.1, 0.0, 0.9)),
        ("usual", 0, 100, 8, 0.2, (0.7, 0.2, 0.1), (0.9, 0.1, 0.0)),
        ("seldom", 1, 3, 1, 0.9, None, (0.1, 0.85, 0.05)),
        ("unseen", 1, None, None, None, None, (0.35, 0.6, 0.05)),
    ]
    scored = spark.createDataFrame(
        [
            ("d", "q", name, grade, shown, clicks, 4, rate, *(said or (None,) * 3), *after, 1 - after[grade])
            for name, grade, shown, clicks, rate, said, after in rows
        ],
        SCORED,
    )
    recipe = AuditRecipe(loved_quantile=0.7, ignored_quantile=0.3, min_wrong_probability=0.4)
    annotations = spark.createDataFrame(
        [
            ("d", "q", "loved", "ann", 1, 0, 0.0),
            ("d", "q", "loved", None, 3, 1, 0.67),
            ("d", "q", "loved", "bob", 1, 2, 2.0),
            ("d", "other", "loved", "bob", 1, 2, 2.0),
        ],
        f"{PAIR}, annotator string, num_marks int, grade tinyint, grade_value double",
    )
    asked = spark.createDataFrame([("d", "q")], "dataset string, query_id string")
    explained = overview.explain_query(judge_pairs(scored, recipe), annotations, asked, recipe)
    found = {row["product_id"]: row for row in explained.collect()}
    assert {name: row["why"] for name, row in found.items()} == {
        "loved": "grade 0, but 0.5000 clicks per look are above 0.3000, the 0.7 quantile of stratum 4, and 9 clicks "
        "are at least 3; by all evidence other grades have 0.400, at least 0.4",
        "ignored": "grade 2, but 0.0100 clicks per look are below 0.2000, the 0.3 quantile of stratum 4; "
        "by all evidence other grades have 0.400, at least 0.4",
        "named": "the labeller gives grade 0 0.900, no less than 0.700 on average where people give it",
        "usual": "no conflict: other grades have 0.100, below 0.4",
        "seldom": "no conflict: other grades have 0.150, below 0.4; shown less than 20 times, so not judged by clicks "
        "alone",
        "unseen": "by all evidence other grades have 0.400, at least 0.4",
    }
    assert found["loved"]["kind"] == "loved_but_irrelevant"
    assert found["loved"]["marks"] == "ann 0, bob 2, mean of 3: 0.67"
    assert found["unseen"]["marks"] is None
    assert found["unseen"]["likely_grade"] == 1


def test_raw_click_rates_stand_beside_the_looks_of_their_bin(spark):
    counts = spark.createDataFrame(
        [("d", 1, 60, 12), ("d", 1, 40, 8), ("d", 2, 50, 5), ("d", 3, 20, 1), ("d", 9, 0, 1), ("e", 1, 10, 0)],
        "dataset string, position int, impressions bigint, clicks bigint",
    )
    model = spark.createDataFrame(
        [("d", 1, 1.0, True), ("d", 2, 0.6, True), ("e", 1, 1.0, False)],
        "dataset string, first_position int, examination double, converged boolean",
    )
    found = {(row["dataset"], row["position"]): row for row in overview.click_rates_by_place(counts, model).collect()}
    assert {key: row["click_rate"] for key, row in found.items()} == {
        ("d", 1): 0.2,
        ("d", 2): 0.1,
        ("d", 3): 0.05,
        ("d", 9): None,
        ("e", 1): 0.0,
    }
    assert [found["d", place]["examination"] for place in (1, 2, 3, 9)] == [1.0, 0.6, 0.6, 0.6]
    assert [found["d", place]["relative_rate"] for place in (1, 2, 3)] == pytest.approx([1.0, 0.5, 0.25])
    # Wilson's interval of 20 in 100: 0.1334 to 0.2888 (Brown, Cai and DasGupta 2001, formula 4, by hand)
    row = found["d", 1]
    assert (row["click_rate_low"], row["click_rate_high"]) == pytest.approx((0.13337, 0.28883), abs=1e-5)
    assert found["e", 1]["relative_rate"] is None


def test_rates_by_grade_are_ratios_whose_interval_draws_pairs(spark):
    """Two pairs with 2 of 10 and 6 of 10 clicks per look: rate .4, residuals -2 and 2, so 8 * 2 / 1 over 20 looks."""
    engagement = spark.createDataFrame(
        [
            ("d", "q", "a", 1, 10.0, 2, 0, 0, 0.25, 0.01, 0.0),
            ("d", "q", "b", 1, 10.0, 6, 1, 0, 0.55, 0.09, 0.0),
            ("d", "q", "c", 1, 5.0, 1, 0, 0, 0.3, 0.02, 0.0),
            ("d", "q", "unjudged", 1, 10.0, 9, 0, 0, 0.9, 0.0, 0.0),
            ("d", "q", "unseen", 1, 0.0, 0, 0, 0, 0.1, 0.0, 0.0),
        ],
        f"{PAIR}, stratum int, examinations double, clicks bigint, carts bigint, purchases bigint, click_rate double, "
        "cart_rate double, purchase_rate double",
    )
    judged = spark.createDataFrame(
        [("d", "q", "a", 2), ("d", "q", "b", 2), ("d", "q", "c", 0), ("d", "q", "unseen", 0)], f"{PAIR}, grade tinyint"
    )
    found = {(row["name"], row["grade"]): row for row in overview.rates_by_grade(engagement, judged).collect()}
    assert len(found) == 6
    row = found["click_rate", 2]
    reach = 1.959964 * math.sqrt(8 * 2) / 20
    assert (row["num_pairs"], row["looks"], row["num_events"], row["rate"]) == (2, 20.0, 8, 0.4)
    assert (row["low"], row["high"]) == pytest.approx((0.4 - reach, 0.4 + reach), abs=1e-6)
    assert (row["quartile_1"], row["quartile_3"]) == (0.25, 0.55)
    # one cart: residuals -.5 and .5; the interval would begin below 0
    cart = found["cart_rate", 2]
    assert (cart["rate"], cart["low"]) == (0.05, 0.0)
    assert cart["high"] == pytest.approx(0.05 + 1.959964 * math.sqrt(0.5 * 2) / 20, abs=1e-6)
    assert (found["purchase_rate", 2]["low"], found["purchase_rate", 2]["rate"]) == (None, 0.0)
    assert (found["click_rate", 0]["low"], found["click_rate", 0]["rate"]) == (None, 0.2)
