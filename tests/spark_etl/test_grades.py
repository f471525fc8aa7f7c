"""Consensus and engagement against values worked out by hand."""

from datetime import UTC, datetime

import pytest
from pyspark.sql import functions as sf

from spark_etl.click_model import fit_click_models
from spark_etl.consensus import build_consensus, with_verdicts
from spark_etl.engagement import build_engagement, sum_days
from spark_etl.recipes import ConsensusRecipe, EngagementRecipe
from spark_etl.visits import count_places

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
    assert sorted((row["product_id"], row["grade"], row["judge"], row["method"]) for row in joined) == [
        ("judged", 0, "expert", "verdict"),
        ("other", 2, "human", "majority"),
        ("unmarked", 1, "expert", "verdict"),
    ]


def test_corrected_rate_is_clicks_over_expected_clicks(spark):
    """Position 1 is shown 4 times and clicked 2 times (rate .5), position 2 shown 4 times, clicked once (.25)."""
    shown = [("a", 1)] * 3 + [("b", 1)] + [("a", 2)] + [("b", 2)] * 3
    clicked = [("a", 1), ("a", 1), ("b", 2)]
    rows = [("d", "q", product, "impression", position) for product, position in shown]
    rows += [("d", "q", product, "click", position) for product, position in clicked]
    rows += [("d", "q", "a", "cart", 1), ("d", "q", "a", "purchase", 1), ("other", "q", "a", "impression", 1)]
    events = spark.createDataFrame(rows, f"{PAIR}, kind string, position int")
    counts = sum_days(count_places(events.withColumn("event_day", sf.current_date())))
    recipe = EngagementRecipe(prior_clicks=2.0)
    models = fit_click_models(counts, recipe.click_model)
    found = {(row["dataset"], row["product_id"]): row for row in build_engagement(counts, models, recipe).collect()}
    first, second, other = found["d", "a"], found["d", "b"], found["other", "a"]
    assert (first["impressions"], first["clicks"], first["carts"], first["purchases"]) == (4, 2, 1, 1)
    assert first["expected_clicks"] == pytest.approx(3 * 0.5 + 0.25, abs=1e-12)
    assert first["corrected_rate"] == pytest.approx((2 + 2) / (1.75 + 2), abs=1e-12)
    assert second["expected_clicks"] == pytest.approx(0.5 + 3 * 0.25, abs=1e-12)
    assert second["corrected_rate"] == pytest.approx((1 + 2) / (1.25 + 2), abs=1e-12)
    assert (other["expected_clicks"], other["corrected_rate"]) == (0.0, 1.0)
    assert [(model.dataset, model.examination_K, model.converged) for model in models] == [
        ("d", (1.0, 1.0), False),
        ("other", (1.0,), False),
    ]
    assert first["examinations"] == 4.0
    assert (first["breadth"], other["breadth"]) == (
        3.0,
        None,
    )  # 3 x 2 ordered pairs of clicks, 2 of them on one product
    assert other["stratum"] == 0
