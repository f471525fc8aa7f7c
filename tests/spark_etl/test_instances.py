"""Instances: precedence of grades, ledger by text hash, bands of stage 2, train queries only."""

from datetime import UTC, datetime

import pytest

from spark_etl.instances import build_instances
from spark_etl.recipes import InstancesRecipe
from tests.fakes import shares

SHARES = "at_least_1 double, at_least_2 double"
PAIR = "dataset string, query_id string, product_id string"
LEDGER = "address string, query_hash string, product_hash string, grade tinyint, p0 double, p1 double, p2 double"
LEDGER += ", labeller string, created_at timestamp, judge string"


def grade_row(query, product, grade, *, labeller="new", day=1, probability=0.8, judge="labeller"):
    rest = [(1 - probability) / 2] * 3
    rest[grade] = probability
    when = datetime(2026, 1, day, tzinfo=UTC)
    address = f"{query}{product}{labeller}{day}"
    return (address, f"hash of {query}", f"hash of {product}", grade, *rest, labeller, when, judge)


def tables_of(spark, *, consensus, verdicts=(), candidates=(), ledger=(), mined=()):
    queries = [
        ("d", "q1", "red shoe", "hash of shoe", "train"),
        ("d", "q2", "red shoe", "hash of shoe", "train"),
        ("d", "q3", "hat", "hash of hat", "test"),
    ]
    products = [("d", f"p{number}", f"hash of p{number}") for number in range(8)] + [("d", "twin of p1", "hash of p1")]
    consensus = [(*row, "human") for row in consensus]
    return {
        "query": spark.createDataFrame(
            queries, "dataset string, query_id string, text string, query_hash string, split string"
        ),
        "catalog_product": spark.createDataFrame(products, "dataset string, product_id string, product_hash string"),
        "annotation_consensus": spark.createDataFrame(
            [("d", q, p, grade, 1, 1.0, *shares(grade).values(), judge) for q, p, grade, judge in consensus],
            f"{PAIR}, grade tinyint, num_marks int, agreement double, {SHARES}, judge string",
        ),
        "audit_verdict": spark.createDataFrame(
            [("d", q, p, grade, "eva", datetime(2026, 1, 1, tzinfo=UTC), None) for q, p, grade in verdicts],
            f"{PAIR}, grade tinyint, expert string, decided_at timestamp, note string",
        ),
        "candidate_pair": spark.createDataFrame([("d", *row) for row in candidates], f"{PAIR}, source string"),
        "pair_grade": spark.createDataFrame(list(ledger), LEDGER),
        "mined_pair": spark.createDataFrame(
            [("d", *row) for row in mined], f"{PAIR}, rank int, band string, round int"
        ),
    }


def built(tables, recipe=None):
    found = build_instances(tables, recipe or InstancesRecipe()).collect()
    return {row["query_id"]: list(zip(row["product_ids"], row["grades"], row["sources"], strict=True)) for row in found}


def test_expert_goes_before_people_and_people_before_the_labeller(spark):
    tables = tables_of(
        spark,
        consensus=[("q1", "p2", 2), ("q1", "p1", 2)],
        verdicts=[("q1", "p1", 0)],
        candidates=[("q1", "p1", "sampled"), ("q1", "p2", "engagement"), ("q1", "p3", "sampled")],
        ledger=[grade_row("shoe", product, 1) for product in ("p1", "p2", "p3")],
    )
    assert built(tables) == {"q1": [("p1", 0, "expert"), ("p2", 2, "human"), ("p3", 1, "sampled")]}


def test_ledger_is_joined_by_text_so_repeated_texts_share_a_grade(spark):
    tables = tables_of(
        spark,
        consensus=[("q1", "p0", 2), ("q2", "p0", 2)],
        candidates=[("q1", "p1", "sampled"), ("q2", "twin of p1", "sampled"), ("q2", "p7", "sampled")],
        ledger=[grade_row("shoe", "p1", 0)],
    )
    assert built(tables) == {
        "q1": [("p0", 2, "human"), ("p1", 0, "sampled")],
        "q2": [("p0", 2, "human"), ("twin of p1", 0, "sampled")],
    }


@pytest.mark.parametrize(("labeller", "grade"), [("", 1), ("old", 0), ("nobody", None)])
def test_newest_grade_of_the_wanted_labeller_counts(spark, labeller, grade):
    ledger = [grade_row("shoe", "p1", 0, labeller="old", day=1), grade_row("shoe", "p1", 1, labeller="new", day=2)]
    tables = tables_of(spark, consensus=[("q1", "p0", 2)], candidates=[("q1", "p1", "sampled")], ledger=ledger)
    expected = {} if grade is None else {"q1": [("p0", 2, "human"), ("p1", grade, "sampled")]}
    assert built(tables, InstancesRecipe(labeller=labeller)) == expected


def test_doubtful_grades_are_left_out(spark):
    ledger = [grade_row("shoe", "p1", 0, probability=0.4), grade_row("shoe", "p2", 0, probability=0.9)]
    candidates = [("q1", "p1", "sampled"), ("q1", "p2", "sampled")]
    tables = tables_of(spark, consensus=[("q1", "p0", 2)], candidates=candidates, ledger=ledger)
    recipe = InstancesRecipe(min_grade_probability=0.5)
    assert built(tables, recipe) == {"q1": [("p0", 2, "human"), ("p2", 0, "sampled")]}


def test_no_test_query_and_no_single_grade_becomes_an_instance(spark):
    consensus = [("q1", "p0", 2), ("q1", "p1", 2), ("q3", "p0", 2), ("q3", "p1", 0)]
    ledger = [grade_row("hat", "p2", 1)]
    tables = tables_of(spark, consensus=consensus, candidates=[("q3", "p2", "sampled")], ledger=ledger)
    assert built(tables) == {}


def test_stage_2_keeps_mined_pairs_by_band_and_grade(spark):
    tables = tables_of(
        spark,
        consensus=[("q1", "p0", 2), ("q1", "p6", 0)],
        candidates=[("q1", "p1", "sampled"), ("q1", "p2", "mined")],
        ledger=[grade_row("shoe", f"p{number}", grade) for number, grade in ((1, 0), (2, 0), (3, 0), (4, 1), (5, 2))],
        mined=[
            ("q1", "p2", 3, "top", 1),  # grade 0 near the top: kept
            ("q1", "p3", 90, "tail", 1),  # grade 0 in the tail: dropped
            ("q1", "p4", 2, "top", 1),  # grade 1 near the top: kept if near misses are
            ("q1", "p5", 80, "tail", 1),  # grade 2 in the tail: kept
            ("q1", "p6", 95, "tail", 1),  # human grade 0 in the tail: there already, stays
            ("q1", "p1", 99, "tail", 1),  # sampled before: an original pair, stays
            ("q1", "p7", 1, "top", 1),  # never graded
        ],
    )
    first = [("p0", 2, "human"), ("p1", 0, "sampled"), ("p6", 0, "human")]
    assert built(tables, InstancesRecipe(stage=1)) == {"q1": first}
    mined = [("p2", 0, "mined"), ("p5", 2, "mined")]
    assert built(tables, InstancesRecipe(stage=2)) == {"q1": sorted([*first, *mined])}
    near = [*mined, ("p4", 1, "mined")]
    assert built(tables, InstancesRecipe(stage=2, keep_near_misses=True)) == {"q1": sorted([*first, *near])}
    every = [*near, ("p3", 0, "mined")]
    assert built(tables, InstancesRecipe(stage=2, keep_all_mined=True)) == {"q1": sorted([*first, *every])}


def test_a_full_instance_keeps_human_grades_first(spark):
    tables = tables_of(
        spark,
        consensus=[("q1", "p6", 2), ("q1", "p7", 1)],
        candidates=[("q1", f"p{number}", "sampled") for number in range(4)],
        ledger=[grade_row("shoe", f"p{number}", 0) for number in range(4)],
    )
    (instance,) = built(tables, InstancesRecipe(max_products_per_query=3)).values()
    assert len(instance) == 3
    assert [row for row in instance if row[2] == "human"] == [("p6", 2, "human"), ("p7", 1, "human")]


def test_what_people_said_of_the_same_texts_goes_before_every_labeller(spark):
    human = {"judge": "human", "probability": 0.4}
    ledger = [
        grade_row("shoe", "p1", 0, day=9),
        grade_row("shoe", "p1", 1, labeller="consensus", day=3, **human),
        grade_row("shoe", "p1", 2, labeller="eva", day=2, **human),
        grade_row("shoe", "p2", 0, day=9),
        grade_row("shoe", "p2", 1, labeller="consensus", day=1, **human),
    ]
    candidates = [("q1", "p1", "sampled"), ("q1", "p2", "sampled")]
    tables = tables_of(spark, consensus=[("q1", "p0", 0)], candidates=candidates, ledger=ledger)

    recipe = InstancesRecipe(labeller="new", min_grade_probability=0.9)

    expected = [("p0", 0, "human"), ("p1", 2, "sampled"), ("p2", 1, "sampled")]
    assert built(tables, recipe)["q1"] == expected


def test_a_population_s_class_rates_change_the_labeller_s_grades_of_it_alone(spark):
    ledger = [
        grade_row("shoe", "p1", 2, probability=0.6),
        grade_row("shoe", "p2", 2, probability=0.6),
        grade_row("shoe", "p3", 2, probability=0.95),
        grade_row("shoe", "p4", 2, labeller="consensus", judge="human", probability=0.6),
    ]
    candidates = [("q1", "p2", "sampled")]
    mined = [("q1", f"p{number}", 1, "top", 1) for number in (1, 3, 4)]
    tables = tables_of(spark, consensus=[("q1", "p0", 1)], candidates=candidates, ledger=ledger, mined=mined)
    rates = [("new", "d", "mined", 3.0, 0.0, 0.0), ("old", "d", "sampled", 3.0, 0.0, 0.0)]
    schema = "labeller string, dataset string, source string, bias_0 double, bias_1 double, bias_2 double"
    tables["class_rate"] = spark.createDataFrame(rates, schema)

    # p1: .2 e^3 against .6; p3: .025 e^3 against .95, no hard negative; p4 is people's
    found = built(tables, InstancesRecipe(stage=2, labeller="new"))["q1"]
    assert found == [("p0", 1, "human"), ("p1", 0, "mined"), ("p2", 2, "sampled")]

    # .2 e^3 / (.2 e^3 + .2 + .6) = .834 is what p1's grade is sure of now
    for least, rest in ((0.83, [("p1", 0, "mined")]), (0.84, None)):
        sure = built(tables, InstancesRecipe(stage=2, labeller="new", min_grade_probability=least))
        assert sure.get("q1") == (rest and [("p0", 1, "human"), *rest])


def test_a_stronger_labeller_goes_before_the_one_whose_abstentions_it_was_asked_for(spark):
    ledger = [
        grade_row("shoe", "p1", 1, day=9),
        grade_row("shoe", "p1", 2, labeller="strong", day=2),
        grade_row("shoe", "p2", 1, day=9),
        grade_row("shoe", "p2", 2, labeller="other", day=9),
    ]
    candidates = [("q1", "p1", "sampled"), ("q1", "p2", "sampled")]
    tables = tables_of(spark, consensus=[("q1", "p0", 0)], candidates=candidates, ledger=ledger)
    found = built(tables, InstancesRecipe(labeller="new", stronger="strong"))
    assert found["q1"] == [("p0", 0, "human"), ("p1", 2, "sampled"), ("p2", 1, "sampled")]


def test_shares_are_those_of_raters_and_probabilities_of_the_labeller(spark):
    tables = tables_of(
        spark,
        consensus=[("q1", "p0", 2)],
        verdicts=[("q1", "p2", 1)],
        candidates=[("q1", "p1", "sampled")],
        ledger=[grade_row("shoe", "p1", 1, probability=0.7)],
    )
    soft = {"p0": (0.9, 0.6), "p2": (0.1, 0.0)}
    marks = [("d", "q1", p, 2 - 2 * (p == "p2"), 3, 1.0, *soft[p], "human") for p in soft]
    tables["annotation_consensus"] = spark.createDataFrame(marks, tables["annotation_consensus"].schema)

    (row,) = build_instances(tables, InstancesRecipe()).collect()

    found = dict(zip(row["product_ids"], zip(row["at_least_1"], row["at_least_2"], strict=True), strict=True))
    assert found == {"p0": (0.9, 0.6), "p1": (pytest.approx(0.85), pytest.approx(0.15)), "p2": (1.0, 0.0)}
