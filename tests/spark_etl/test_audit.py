"""The audit's probabilities and rules on shops whose truth is known."""

import numpy as np
import pytest

from spark_etl.audit import find_conflicts, grades_out_of_fold, score_pairs
from spark_etl.recipes import AuditRecipe

PAIR = "dataset string, query_id string, product_id string"
CONSENSUS = f"{PAIR}, grade tinyint, num_marks int, at_least_1 double, at_least_2 double"
ENGAGEMENT = (
    f"{PAIR}, impressions bigint, clicks bigint, carts bigint, purchases bigint, corrected_rate double, "
    "examinations double, stratum int, click_rate double, click_rate_low double, click_rate_high double"
)
LABELLER = f"{PAIR}, p0 double, p1 double, p2 double"


def judged(spark, rows):
    """Rows of (product, grade, num_marks, at_least_1, at_least_2) or (product, grade)."""
    full = [row if len(row) == 5 else (*row, 1, float(row[1] >= 1), float(row[1] >= 2)) for row in rows]
    return spark.createDataFrame([("d", "q", *row) for row in full], CONSENSUS)


def seen(spark, rows):
    """Rows of (product, impressions, clicks, carts, click_rate)."""
    full = [
        ("d", "q", name, shown, clicks, carts, 0, 1.0, float(shown), 1, rate, rate / 2, rate * 2)
        for name, shown, clicks, carts, rate in rows
    ]
    return spark.createDataFrame(full, ENGAGEMENT)


def test_conflicts_are_loved_irrelevant_and_ignored_exact_pairs(spark):
    """Of the six rates shown often, the .4 quantile is the third (.3), the .6 quantile the fourth (.4)."""
    rates = {"ignored2": 0.01, "ignored0": 0.02, "mid": 0.3, "mid2": 0.4, "loved0": 0.5, "loved2": 0.6, "rare": 0.9}
    engagement = seen(
        spark,
        [
            (name, 5 if name == "rare" else 100, 1 if name.startswith("ignored") else 8, 0, rate)
            for name, rate in rates.items()
        ],
    )
    grades = {"ignored2": 2, "ignored0": 0, "mid": 0, "mid2": 2, "loved0": 0, "loved2": 2, "rare": 0, "unseen": 1}
    recipe = AuditRecipe(
        min_impressions=10, min_clicks=2, loved_quantile=0.6, ignored_quantile=0.4, min_wrong_probability=1
    )
    scored = score_pairs(engagement, judged(spark, grades.items()), recipe)
    assert scored.count() == len(grades)
    found = {row["product_id"]: row["kind"] for row in find_conflicts(scored, recipe).collect()}
    assert found == {"ignored2": "ignored_but_exact", "loved0": "loved_but_irrelevant"}


def test_a_labeller_disagrees_where_it_is_surer_of_another_grade_than_it_is_on_average(spark):
    grades = [("a", 0), ("b", 0), ("c", 2), ("d", 2)]
    said = {"a": (0.9, 0.1, 0.0), "b": (0.2, 0.1, 0.7), "c": (0.1, 0.2, 0.7), "d": (0.6, 0.0, 0.4)}
    labeller = spark.createDataFrame([("d", "q", name, *shares) for name, shares in said.items()], LABELLER)
    recipe = AuditRecipe(min_wrong_probability=1)
    scored = score_pairs(seen(spark, [("a", 5, 0, 0, 0.1)]), judged(spark, grades), recipe, labeller)
    found = {row["product_id"]: row["kind"] for row in find_conflicts(scored, recipe).collect()}
    # it is sure of 2 on average with (.7 + .4) / 2 where people say 2, and of 0 with (.9 + .2) / 2
    assert found == {"b": "labeller_disagrees", "d": "labeller_disagrees"}


def test_marks_alone_give_the_first_probability(spark):
    recipe = AuditRecipe(error_rate=0.04, mark_error_rate=0.1, min_wrong_probability=1)
    marks = [("one", 2), ("three", 2, 3, 1.0, 1.0), ("two of three", 2, 3, 2 / 3, 2 / 3)]
    found = {row["product_id"]: row for row in score_pairs(seen(spark, []), judged(spark, marks), recipe).collect()}
    single = 0.9 / (0.9 + 0.05 + 0.05)
    assert found["one"]["posterior_2"] == pytest.approx(0.96 * single + 0.02 * (1 - single), abs=1e-6)
    odds = 0.9 / 0.05
    split = odds / (odds + 1 + 1 / odds)
    assert found["two of three"]["posterior_2"] == pytest.approx(0.96 * split + 0.02 * (1 - split), abs=1e-6)
    assert found["three"]["wrong_probability"] < found["two of three"]["wrong_probability"]
    row = found["one"]
    assert row["expected_change"] == pytest.approx(row["posterior_1"] + 2 * row["posterior_0"], abs=1e-9)


def test_witnesses_together_find_more_wrong_grades_than_each_alone_and_say_how_many(spark):
    rng = np.random.default_rng(5)
    num = 4000
    true = rng.choice(3, num, p=[0.3, 0.3, 0.4])
    wrong = rng.random(num) < 0.06
    grade = np.where(wrong, (true + rng.integers(1, 3, num)) % 3, true)
    clicks = rng.binomial(20, np.array([0.05, 0.2, 0.5])[true])
    guess = np.eye(3)[np.where(rng.random(num) < 0.7, true, rng.integers(0, 3, num))] * 0.6 + 0.4 / 3
    engagement = seen(
        spark, [(f"p{row}", 20, int(count), 0, float(count + 1) / 25) for row, count in enumerate(clicks)]
    )
    labeller = spark.createDataFrame(
        [("d", "q", f"p{row}", *map(float, said)) for row, said in enumerate(guess)], LABELLER
    )
    people = judged(spark, [(f"p{row}", int(value)) for row, value in enumerate(grade)])
    recipe = AuditRecipe(mark_error_rate=0.01)

    def caught(*witnesses):
        rows = score_pairs(*witnesses).collect()
        order = sorted(rows, key=lambda row: -row["wrong_probability"])[: num // 20]
        return sum(wrong[int(row["product_id"][1:])] for row in order), sum(row["wrong_probability"] for row in rows)

    (both, said), (behaviour, _), (labelled, _) = (
        caught(engagement, people, recipe, labeller),
        caught(engagement, people, recipe),
        caught(seen(spark, []), people, recipe, labeller),
    )
    assert both > 1.1 * max(behaviour, labelled)
    assert both > 7 * wrong.mean() * num / 20
    assert said == pytest.approx(wrong.sum(), rel=0.3)


def test_of_several_labellers_one_must_be_named(spark):
    rows = spark.createDataFrame(
        [("d", "q", "p", 1.0, 0.0, 0.0, name) for name in ("one", "two")], f"{LABELLER}, labeller string"
    )
    with pytest.raises(ValueError, match="one, two; name one"):
        grades_out_of_fold(rows, "")
    assert grades_out_of_fold(rows, "two").count() == 1
    assert grades_out_of_fold(rows.where("labeller = 'one'"), "").count() == 1
