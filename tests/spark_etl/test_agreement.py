"""Agreement against Krippendorff's own example, scikit-learn, SciPy and resampling."""

from itertools import permutations

import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn.metrics import cohen_kappa_score

from spark_etl.agreement import alphas, disagreement, measure_agreement, measure_annotators, wilson, with_context
from spark_etl.recipes import AnnotatorsRecipe

MARK = "dataset string, query_id string, product_id string, annotator string, mark_number int, num_marks int"
MARK += ", grade tinyint, guideline string"
GOLD = "dataset string, query_id string, product_id string, gold int, is_verdict boolean"
PRODUCT = "dataset string, product_id string, category string"
# Krippendorff 2011, section "any number of observers, missing data": four observers, twelve units.
OBSERVERS = (
    (1, 2, 3, 3, 2, 1, 4, 1, 2, None, None, None),
    (1, 2, 3, 3, 2, 2, 4, 1, 2, 5, None, 3),
    (None, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, None),
    (1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, None),
)
PUBLISHED = {"nominal": 0.743, "ordinal": 0.815, "interval": 0.849}


def naive_alpha(units, values, level):
    """From the definition: mean distance within units over that between all marks of units with two or more."""
    units = [unit for unit in units if len(unit) > 1]
    marks = [mark for unit in units for mark in unit]
    often = {value: marks.count(value) for value in values}

    def far(one, other):
        low, high = sorted((one, other))
        between = sum(often[value] for value in values if low <= value <= high) - (often[low] + often[high]) / 2
        return {"nominal": one != other, "interval": (one - other) ** 2, "ordinal": between**2}[level]

    observed = sum(sum(far(*two) for two in permutations(unit, 2)) / (len(unit) - 1) for unit in units) / len(marks)
    expected = sum(far(*two) for two in permutations(marks, 2)) / (len(marks) * (len(marks) - 1))
    return 1 - observed / expected


def counts_frame(spark, units, values, query_of):
    rows = [("d", query_of(place), *(unit.count(value) for value in values)) for place, unit in enumerate(units)]
    numbers = ", ".join(f"num_{value} bigint" for value in values)
    return spark.createDataFrame(rows, f"dataset string, query_id string, {numbers}")


def test_alpha_is_that_of_krippendorff_s_example(spark):
    values = (1, 2, 3, 4, 5)
    units = [[mark for mark in unit if mark is not None] for unit in zip(*OBSERVERS, strict=True)]
    (found,) = alphas(counts_frame(spark, units, values, str), ["dataset"], values).to_pylist()
    assert (found["num_pairs"], found["num_marks"]) == (11, 40)
    for level, alpha in PUBLISHED.items():
        assert found[f"alpha_{level}"] == pytest.approx(alpha, abs=5e-4)
        assert found[f"alpha_{level}"] == pytest.approx(naive_alpha(units, values, level), abs=1e-12)
        assert found[f"alpha_{level}_low"] < alpha < found[f"alpha_{level}_high"] < 1


def test_alpha_is_1_where_all_agree_and_none_where_only_one_grade_is_given(spark):
    values = (0, 1, 2)
    (found,) = alphas(counts_frame(spark, [[0, 0], [1, 1], [2, 2, 2]], values, str), ["dataset"], values).to_pylist()
    assert (found["alpha_ordinal"], found["alpha_ordinal_low"]) == (1.0, None)
    (found,) = alphas(counts_frame(spark, [[1, 1], [1, 1]], values, str), ["dataset"], values).to_pylist()
    assert (found["alpha_ordinal"], found["alpha_nominal_high"]) == (None, None)


def test_nineteen_of_twenty_intervals_of_blind_raters_hold_0(spark):
    rng, num = np.random.default_rng(0), 400
    marks = rng.integers(0, 3, (num, 60, 3))
    rows = [
        (f"d{place}", f"q{row}", *np.bincount(unit, minlength=3).tolist())
        for place, units in enumerate(marks)
        for row, unit in enumerate(units)
    ]
    frame = spark.createDataFrame(rows, "dataset string, query_id string, num_0 bigint, num_1 bigint, num_2 bigint")
    found = alphas(frame, ["dataset"], (0, 1, 2)).to_pylist()
    for level in PUBLISHED:
        held = sum(row[f"alpha_{level}_low"] < 0 < row[f"alpha_{level}_high"] for row in found)
        # 380 of 400 are expected, three standard deviations are 13
        assert 367 <= held <= 393


def test_an_interval_of_alpha_is_that_of_resampled_queries(spark):
    rng = np.random.default_rng(1)
    values, num_queries = (0, 1, 2), 60
    units, query = [], []
    for number in range(num_queries):
        hard = rng.random() < 0.3  # queries differ, so that pairs of one are alike
        for _ in range(8):
            true = rng.integers(0, 3)
            units.append([int(true if rng.random() > (0.6 if hard else 0.1) else rng.integers(0, 3)) for _ in range(3)])
            query.append(number)
    frame = counts_frame(spark, units, values, lambda place: f"q{query[place]}")
    (found,) = alphas(frame, ["dataset"], values).to_pylist()
    cell_Q = np.zeros((num_queries, 3, 3))
    for unit, number in zip(units, query, strict=True):
        for one, other in permutations(unit, 2):
            cell_Q[number, one, other] += 1 / (len(unit) - 1)
    drawn = rng.integers(0, num_queries, (4000, num_queries))
    for level in PUBLISHED:
        resampled = 1 - disagreement(cell_Q[drawn].sum(axis=1), values, level)
        low, high = np.quantile(resampled, [0.025, 0.975])
        assert found[f"alpha_{level}_low"] == pytest.approx(low, abs=0.02)
        assert found[f"alpha_{level}_high"] == pytest.approx(high, abs=0.02)


def marked(spark, rows, products=(), gold=None, recipe=None):
    """Rows of (query, product, annotator, grade, guideline) and, where they differ from 1 each, number and raters."""
    full = [
        ("d", query, product, who, *(more or (1, 1)), grade, version)
        for query, product, who, grade, version, *more in rows
    ]
    known = None if gold is None else spark.createDataFrame([("d", *row) for row in gold], GOLD)
    catalog = spark.createDataFrame([("d", *row) for row in products], PRODUCT)
    return with_context(spark.createDataFrame(full, MARK), catalog, recipe or AnnotatorsRecipe(min_marks=2), known)


def test_the_others_are_never_he_himself_and_a_tie_of_them_is_no_majority(spark):
    rows = [("q", "p", who, grade, None) for who, grade in (("a", 2), ("b", 2), ("c", 0), ("d", 0))]
    rows += [("q", "p", None, 1, None), ("q", "alone", "a", 1, None)]
    rows += [("q", "twice", "a", 2, None, 1, 1), ("q", "twice", "a", 2, None, 2, 1), ("q", "twice", "b", 0, None)]
    rows += [("q", "mean", "a", 0, None), ("q", "mean", None, 2, None, 1, 3), ("q", "mean", "b", 0, None)]
    found = {
        (row["product_id"], row["annotator"]): (row["mark"], row["others"]) for row in marked(spark, rows).collect()
    }
    assert found == {
        ("p", "a"): (2, 0),  # the others give 2, 0, 0 and 1
        ("p", "b"): (2, 0),
        ("p", "c"): (0, 2),
        ("p", "d"): (0, 2),
        ("p", None): (1, None),
        ("alone", "a"): (1, None),
        ("twice", "a"): (2, 0),  # his second mark is not one of the others
        ("twice", "b"): (0, 2),
        ("mean", "a"): (0, 2),  # three raters of 2 against one
        ("mean", "b"): (0, 2),
    }


def crew(seed, num_queries=30):
    """Marks of three annotators of different care under two versions of a guideline, and the true grades."""
    rng = np.random.default_rng(seed)
    rates, true, rows = {"ann": 0.1, "bob": 0.3, "cyd": 0.9}, {}, []
    for query in range(num_queries):
        for number in range(6):
            pair = (f"q{query}", f"p{number}")
            true[pair] = int(rng.integers(0, 3))
            for who, rate in rates.items():
                wrong = rng.random() < rate
                rows.append((*pair, who, int(rng.integers(0, 3)) if wrong else true[pair], f"v{1 + query % 2}"))
    return rows, true


def test_kappa_with_the_others_is_scikit_learn_s_in_every_slice(spark):
    rows, _ = crew(2)
    products = [(f"p{number}", ("Shoes > Road", "Tools")[number % 2]) for number in range(5)]
    marks = marked(spark, rows, products).persist()
    quality = {
        (row["annotator"], row["slice"], row["value"]): row
        for row in measure_annotators(marks, AnnotatorsRecipe(min_marks=2)).collect()
    }
    compared = [row for row in marks.collect() if row["others"] is not None]
    assert {key[1:] for key in quality} == {
        *(("all", ""), ("category", "Shoes"), ("category", "Tools"), ("guideline", "v1"), ("guideline", "v2"))
    }
    for (who, kind, value), row in quality.items():
        own = [one for one in compared if one["annotator"] == who and (kind == "all" or one[kind] == value)]
        x, y = [one["mark"] for one in own], [one["others"] for one in own]
        assert row["num_compared"] == len(own)
        assert row["kappa"] == pytest.approx(cohen_kappa_score(x, y, weights="quadratic"), abs=1e-12)
        assert row["agreement"] == pytest.approx(np.mean(np.equal(x, y)))
        assert row["bias"] == pytest.approx(np.mean(np.subtract(x, y)))
        assert row["kappa_low"] < row["kappa"] < row["kappa_high"] <= 1
    kappas = [quality[who, "all", ""]["kappa"] for who in ("ann", "bob", "cyd")]
    assert kappas == sorted(kappas, reverse=True)
    strict = measure_annotators(marks, AnnotatorsRecipe(min_marks=100)).where("slice = 'guideline'").collect()
    assert {row["kappa"] for row in strict} == {None}
    marks.unpersist()


def test_an_interval_of_kappa_is_that_of_resampled_queries(spark):
    rows, _ = crew(3, 80)
    marks = marked(spark, rows).persist()
    row = next(row for row in measure_annotators(marks, AnnotatorsRecipe()).collect() if row["annotator"] == "bob")
    own = [one for one in marks.collect() if one["annotator"] == "bob" and one["others"] is not None]
    marks.unpersist()
    of_query = {}
    for one in own:
        of_query.setdefault(one["query_id"], []).append((one["mark"], one["others"]))
    rng, queries = np.random.default_rng(0), list(of_query.values())
    resampled = []
    for _ in range(2000):
        chosen = [pair for place in rng.integers(0, len(queries), len(queries)) for pair in queries[place]]
        x, y = np.array(chosen, float).T
        by_chance = np.square(np.subtract.outer(x, y)).mean()
        resampled.append(1 - np.square(x - y).mean() / by_chance)
    low, high = np.quantile(resampled, [0.025, 0.975])
    assert row["kappa_low"] == pytest.approx(low, abs=0.03)
    assert row["kappa_high"] == pytest.approx(high, abs=0.03)


def test_alpha_by_slice_is_that_of_the_slice_s_marks(spark):
    rows, _ = crew(4, 20)
    rows = [row for row in rows if row[2] != "cyd" or row[0] in ("q0", "q1", "q2")]
    products = [(f"p{number}", ("Shoes > Road", "Tools")[number % 2]) for number in range(6)]
    mean = ("q0", "p0", None, 0, "v1", 1, 3)
    marks = marked(spark, [*rows, mean], products).persist()
    found = {(row["slice"], row["value"]): row for row in measure_agreement(marks, AnnotatorsRecipe()).collect()}
    marks.unpersist()

    def expected(keep):
        units = {}
        for query, product, who, grade, version in rows:
            if keep(product, version):
                units.setdefault((query, product), []).append((who, grade))
        return units

    wholes = {
        ("all", ""): expected(lambda *_: True),
        ("category", "Shoes"): expected(lambda product, _: product in ("p0", "p2", "p4")),
        ("guideline", "v2"): expected(lambda _, version: version == "v2"),
    }
    wholes["annotator", "cyd"] = {
        key: unit for key, unit in wholes["all", ""].items() if "cyd" in {who for who, _ in unit}
    }
    assert len(found) == 1 + 2 + 2 + 3
    for key, units in wholes.items():
        graded = [[grade for _, grade in unit] for unit in units.values()]
        assert found[key]["num_pairs"] == len(units)
        assert found[key]["num_marks"] == sum(map(len, graded))
        for level in PUBLISHED:
            assert found[key][f"alpha_{level}"] == pytest.approx(naive_alpha(graded, (0, 1, 2), level), abs=1e-9)


def test_gold_tells_how_right_and_how_biased_an_annotator_is(spark):
    rows = [("q", f"p{number}", "eva", grade, None) for number, grade in enumerate((2, 2, 1, 0, 1))]
    gold = [("q", "p0", 2, False), ("q", "p1", 1, False), ("q", "p2", 1, True), ("q", "p3", 0, False)]
    (row,) = measure_annotators(marked(spark, rows, gold=gold), AnnotatorsRecipe()).collect()
    assert (row["num_marks"], row["num_compared"], row["num_gold"], row["num_verdicts"]) == (5, 0, 4, 1)
    assert (row["gold_accuracy"], row["gold_bias"]) == (0.75, 0.25)
    exact = binomtest(3, 4).proportion_ci(method="wilson")
    assert (row["gold_accuracy_low"], row["gold_accuracy_high"]) == pytest.approx((exact.low, exact.high), abs=1e-6)
    assert (row["kappa"], row["agreement"], row["bias"]) == (None, None, None)


def test_wilson_s_interval_is_scipy_s():
    for hits, trials in ((0, 5), (5, 5), (37, 90), (1, 1)):
        exact = binomtest(hits, trials).proportion_ci(method="wilson")
        _, low, high = wilson(np.array([hits]), np.array([trials]))
        assert (low[0], high[0]) == pytest.approx((exact.low, exact.high), abs=1e-6)
    assert np.isnan(wilson(np.array([0.0]), np.array([0.0]))).all()


def test_without_marks_there_are_no_rows(spark):
    marks = marked(spark, [("q", "p", None, 1, None, 1, 3)])
    assert measure_agreement(marks, AnnotatorsRecipe()).count() == 0
    assert measure_annotators(marks, AnnotatorsRecipe()).count() == 0
