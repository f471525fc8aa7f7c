"""Consensus, engagement and audit against values worked out by hand."""

from datetime import UTC, datetime
from math import log

import pytest

from spark_etl.audit import find_conflicts
from spark_etl.consensus import build_consensus, with_verdicts
from spark_etl.engagement import build_engagement
from spark_etl.recipes import AuditRecipe, ConsensusRecipe, EngagementRecipe

PAIR = "dataset string, query_id string, product_id string"


def consensus_of(spark, marks, recipe=None):
    rows = [("d", "q", *(mark if len(mark) == 4 else (*mark, float(mark[1])))) for mark in marks]
    frame = spark.createDataFrame(rows, f"{PAIR}, grade tinyint, num_marks int, grade_value double")
    return build_consensus(frame, recipe or ConsensusRecipe())


def test_consensus_is_the_majority_and_a_tie_is_none(spark):
    marks = [("single", 1, 1)]
    marks += [("majority", 2, 1), ("majority", 2, 1), ("majority", 0, 1)]
    marks += [("even", 1, 1), ("even", 2, 1)]
    marks += [("three-way", 0, 1), ("three-way", 1, 1), ("three-way", 2, 1)]
    marks += [("mean of raters", 1, 3), ("mean of raters", 2, 1), ("mean of raters", 2, 1)]
    found = {
        row["product_id"]: (row["grade"], row["num_marks"], round(row["agreement"], 6), row["judge"])
        for row in consensus_of(spark, marks).collect()
    }
    assert found == {
        "single": (1, 1, 1.0, "human"),
        "majority": (2, 3, 0.666667, "human"),
        "mean of raters": (1, 5, 0.6, "human"),
    }
    strict = consensus_of(spark, marks, ConsensusRecipe(min_agreement=0.65)).collect()
    assert {row["product_id"] for row in strict} == {"single", "majority"}


def test_a_consensus_keeps_the_shares_of_raters_at_or_above_each_grade(spark):
    marks = [("three raters", 2, 1), ("three raters", 2, 1), ("three raters", 0, 1)]
    marks += [("a mean of 1.25", 1, 3, 1.25), ("a mean of 0.4", 0, 3, 0.4)]
    marks += [("two means", 2, 1, 1.75), ("two means", 1, 3, 0.75)]
    found = {row["product_id"]: (row["at_least_1"], row["at_least_2"]) for row in consensus_of(spark, marks).collect()}
    expected = {"three raters": (2 / 3, 2 / 3), "a mean of 1.25": (1, 0.25), "a mean of 0.4": (0.4, 0)}
    expected["two means"] = ((1 + 3 * 0.75) / 4, 0.75 / 4)
    assert found.keys() == expected.keys()
    for product, shares in expected.items():
        assert found[product] == pytest.approx(shares), product


def test_the_newest_verdict_takes_the_place_of_the_marks(spark):
    day = [datetime(2026, 1, number, tzinfo=UTC) for number in (1, 2)]
    verdicts = [
        ("d", "q", "judged", 2, "eva", day[0], None),
        ("d", "q", "judged", 0, "eva", day[1], None),
        ("d", "q", "unmarked", 1, "eva", day[0], None),
    ]
    frame = spark.createDataFrame(verdicts, f"{PAIR}, grade tinyint, expert string, decided_at timestamp, note string")
    joined = with_verdicts(consensus_of(spark, [("judged", 1, 1), ("other", 2, 1)]), frame).collect()
    assert sorted((row["product_id"], row["grade"], row["judge"]) for row in joined) == [
        ("judged", 0, "expert"),
        ("other", 2, "human"),
        ("unmarked", 1, "expert"),
    ]


def test_corrected_rate_is_clicks_over_expected_clicks(spark):
    """Position 1 is shown 4 times and clicked 2 times (rate .5), position 2 shown 4 times, clicked once (.25)."""
    shown = [("a", 1)] * 3 + [("b", 1)] + [("a", 2)] + [("b", 2)] * 3
    clicked = [("a", 1), ("a", 1), ("b", 2)]
    rows = [("d", "q", product, "impression", position) for product, position in shown]
    rows += [("d", "q", product, "click", position) for product, position in clicked]
    rows += [("d", "q", "a", "cart", 1), ("d", "q", "a", "purchase", 1), ("other", "q", "a", "impression", 1)]
    frame = spark.createDataFrame(rows, f"{PAIR}, kind string, position int")
    found = {
        (row["dataset"], row["product_id"]): row
        for row in build_engagement(frame, EngagementRecipe(prior_clicks=2.0)).collect()
    }
    first, second, other = found["d", "a"], found["d", "b"], found["other", "a"]
    assert (first["impressions"], first["clicks"], first["carts"], first["purchases"]) == (4, 2, 1, 1)
    assert first["expected_clicks"] == pytest.approx(3 * 0.5 + 0.25, abs=1e-12)
    assert first["corrected_rate"] == pytest.approx((2 + 2) / (1.75 + 2), abs=1e-12)
    assert second["expected_clicks"] == pytest.approx(0.5 + 3 * 0.25, abs=1e-12)
    assert second["corrected_rate"] == pytest.approx((1 + 2) / (1.25 + 2), abs=1e-12)
    assert (other["expected_clicks"], other["corrected_rate"]) == (0.0, 1.0)


def test_conflicts_are_loved_irrelevant_and_ignored_exact_pairs(spark):
    """Of the six rates shown often, the .4 quantile is the third (1.0), the .6 quantile the fourth (1.1)."""
    rates = {"ignored2": 0.1, "ignored0": 0.2, "mid": 1.0, "mid2": 1.1, "loved0": 4.0, "loved2": 5.0, "rare": 9.0}
    engagement = [
        ("d", "q", name, 5 if name == "rare" else 100, 1 if name.startswith("ignored") else 8, 0, 0, 2.0, rate)
        for name, rate in rates.items()
    ]
    frame = spark.createDataFrame(
        engagement,
        f"{PAIR}, impressions bigint, clicks bigint, carts bigint, purchases bigint, "
        "expected_clicks double, corrected_rate double",
    )
    grades = {"ignored2": 2, "ignored0": 0, "mid": 0, "mid2": 2, "loved0": 0, "loved2": 2, "rare": 0}
    judged = spark.createDataFrame([("d", "q", *item) for item in grades.items()], f"{PAIR}, grade tinyint")
    recipe = AuditRecipe(min_impressions=10, min_clicks=2, loved_quantile=0.6, ignored_quantile=0.4)
    found = {row["product_id"]: row for row in find_conflicts(frame, judged, recipe).collect()}
    assert {name: row["kind"] for name, row in found.items()} == {
        "ignored2": "ignored_but_exact",
        "loved0": "loved_but_irrelevant",
    }
    assert found["ignored2"]["priority"] == pytest.approx(abs(log(0.1)) * 10, abs=1e-9)
