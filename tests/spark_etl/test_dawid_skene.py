"""Dawid-Skene against an independent fit, planted annotators, and what each rule of the marks says."""

import logging
from itertools import pairwise

import numpy as np
import pytest

from spark_etl.consensus import build_consensus, most_probable
from spark_etl.dawid_skene import (
    _parameters,
    _with_grades,
    confusion_frame,
    fit_annotators,
    grade_probabilities,
    prepare_marks,
    rounds_frame,
)
from spark_etl.recipes import ConsensusRecipe, DawidSkeneRecipe

MARK = "dataset string, query_id string, product_id string, annotator string, mark_number int, scale string"
MARK += ", num_marks int, grade tinyint, grade_value double"
GOLD = "dataset string, query_id string, product_id string, gold int"
CAREFUL = np.array([[0.9, 0.08, 0.02], [0.05, 0.9, 0.05], [0.02, 0.08, 0.9]])
SPAMMER = np.full((3, 3), 1 / 3)
TOO_HIGH = np.array([[0.45, 0.5, 0.05], [0.02, 0.43, 0.55], [0.01, 0.04, 0.95]])
TOO_LOW = TOO_HIGH[::-1, ::-1]
CREW = {
    "ada": CAREFUL,
    "ben": CAREFUL,
    "cyd": SPAMMER,
    "dan": SPAMMER,
    "eve": TOO_HIGH,
    "fay": TOO_HIGH,
    "gus": TOO_LOW,
}


def as_frame(spark, marks, dataset="d"):
    """Rows of (product, annotator, grade) or (product, annotator, grade, num_marks, grade_value, scale)."""
    rows = []
    for number, mark in enumerate(marks, start=1):
        product, annotator, grade, *rest = mark
        num_marks, value, scale = rest or (1, float(grade), "s")
        rows.append((dataset, "q", product, annotator, number, scale, num_marks, int(grade), float(value)))
    return spark.createDataFrame(rows, MARK)


def planted(seed, num_pairs=400, crew=CREW, marks_per_pair=3):
    """True grades, and marks of annotators drawn at random for each pair."""
    rng = np.random.default_rng(seed)
    true = rng.choice(3, num_pairs, p=[0.35, 0.3, 0.35])
    names = list(crew)
    marks = [
        (f"p{pair}", names[one], int(rng.choice(3, p=crew[names[one]][grade])))
        for pair, grade in enumerate(true)
        for one in rng.choice(len(names), marks_per_pair, replace=False)
    ]
    return true, marks


def fit(annotations, recipe=None, gold=None):
    marks = prepare_marks(annotations, gold).persist()
    models = fit_annotators(marks, recipe or DawidSkeneRecipe())
    found = grade_probabilities(marks, models).collect()
    marks.unpersist()
    shares = {(row["dataset"], row["product_id"]): np.array([row["p0"], row["p1"], row["p2"]]) for row in found}
    return models, {product: q for (_, product), q in shares.items()} if len(models) == 1 else shares


def plain_em(marks, recipe):
    """The two fits in plain loops over pairs, one matrix for all and then one each: what they come to at rest."""
    grades, pairs = range(3), sorted({product for product, _, _ in marks})
    of_pair = {product: [(who, mark) for one, who, mark in marks if one == product] for product in pairs}
    names = sorted({who for _, who, _ in marks})

    def normed(row):
        return [value / sum(row) for value in row]

    def counted(q, prior, is_wanted):
        table = [list(row) for row in prior]
        for product in pairs:
            for name, mark in of_pair[product]:
                for g in grades:
                    table[g][mark] += q[product][g] * is_wanted(name)
        return [normed(row) for row in table]

    def expected(matrices, share):
        joint = {product: list(share) for product in pairs}
        for product in pairs:
            for name, mark in of_pair[product]:
                joint[product] = [joint[product][g] * matrices[name][g][mark] for g in grades]
        return {product: normed(row) for product, row in joint.items()}

    def shares(q):
        return normed([1 + sum(q[product][g] for product in pairs) for g in grades])

    def change(new, old):
        return np.abs(np.array(new) - np.array(old)).max()

    far = [normed([recipe.distance_factor ** abs(g - k) for k in grades]) for g in grades]
    prior = [[recipe.prior_marks * value for value in row] for row in far]
    q = {product: normed([sum(m == g for _, m in of_pair[product]) + 1e-3 for g in grades]) for product in pairs}
    pooled, share, moved = counted(q, prior, lambda _: True), shares(q), 1.0
    while moved >= recipe.tolerance:
        q = expected(dict.fromkeys(names, pooled), share)
        before = [*pooled, share]
        pooled, share = counted(q, prior, lambda _: True), shares(q)
        moved = change([*pooled, share], before)
    drawn = [[recipe.prior_marks * value for value in row] for row in pooled]
    matrices = dict.fromkeys(names, pooled)
    while True:
        q = expected(matrices, share)
        after = {name: counted(q, drawn, lambda one, name=name: one == name) for name in names}
        moved = max(change(shares(q), share), *(change(after[name], matrices[name]) for name in names))
        if moved < recipe.tolerance:
            return pooled, matrices, q
        matrices, share = after, shares(q)


def test_the_fit_comes_to_where_plain_loops_come(spark):
    _, marks = planted(0, 150)
    recipe = DawidSkeneRecipe(tolerance=1e-2, prior_marks=5.0, distance_factor=0.3)
    (model,), shares = fit(as_frame(spark, marks), recipe)
    pooled, matrices, q = plain_em(marks, recipe)
    assert model.converged
    np.testing.assert_allclose(model.pooled_GK, pooled, atol=1e-9)
    for rater, matrix in zip(model.rater_A, model.matrix_AGK, strict=True):
        np.testing.assert_allclose(matrix, matrices[rater.name], atol=1e-9)
    assert shares.keys() == q.keys()
    for product, found in shares.items():
        np.testing.assert_allclose(found, q[product], atol=1e-9)


def test_no_round_lowers_the_posterior_and_the_last_is_at_rest(spark):
    _, marks = planted(1)
    (model,), _ = fit(as_frame(spark, marks), DawidSkeneRecipe(tolerance=5e-4))
    for stage in ("pooled", "annotators"):
        told = [one.log_posterior for one in model.rounds if one.stage == stage]
        assert len(told) > 3
        assert all(later >= earlier - 1e-7 for earlier, later in pairwise(told))
    assert model.rounds[-1].change < 5e-4
    rows = rounds_frame(spark, [model]).collect()
    assert [row["round"] for row in rows if row["stage"] == "annotators"] == list(range(1, len(told) + 1))


def test_a_fit_that_is_cut_short_says_so(spark, caplog):
    _, marks = planted(2, 100)
    with caplog.at_level(logging.WARNING, logger="spark_etl"):
        (model,), _ = fit(as_frame(spark, marks), DawidSkeneRecipe(max_rounds=2, tolerance=1e-9))
    assert not model.converged
    assert [one.stage for one in model.rounds] == ["pooled"] * 2 + ["annotators"] * 2
    assert "raise recipe.dawid_skene.max_rounds" in caplog.text


def test_annotators_are_told_apart_by_how_they_mark(spark):
    _, marks = planted(3, 1500)
    (model,), _ = fit(as_frame(spark, marks))
    found = {rater.name: matrix for rater, matrix in zip(model.rater_A, model.matrix_AGK, strict=True)}
    for name, matrix in CREW.items():
        np.testing.assert_allclose(found[name], matrix, atol=0.12)
    assert model.share_G == pytest.approx([0.35, 0.3, 0.35], abs=0.05)


def test_beats_the_majority_on_planted_annotators_over_five_seeds(spark):
    """Only pairs with a majority are compared: those that tie count against neither."""
    crews = [planted(seed) for seed in range(5)]
    frame = as_frame(spark, crews[0][1], "d0")
    for seed in range(1, 5):
        frame = frame.unionByName(as_frame(spark, crews[seed][1], f"d{seed}"))
    _, shares = fit(frame)
    majority = {(row["dataset"], row["product_id"]): row["grade"] for row in votes_of(frame)}
    for seed, (true, _) in enumerate(crews):
        told = [pair for pair in majority if pair[0] == f"d{seed}"]
        truth = np.array([true[int(product[1:])] for _, product in told])
        off_voted = np.abs(np.array([majority[pair] for pair in told]) - truth)
        off_fitted = np.abs(np.array([shares[pair].argmax() for pair in told]) - truth)
        assert (off_fitted > 0).sum() < 0.9 * (off_voted > 0).sum()
        assert off_fitted.mean() < 0.9 * off_voted.mean()


def votes_of(frame):
    return build_consensus(frame, ConsensusRecipe()).collect()


def test_data_sets_are_fitted_apart(spark):
    _, first = planted(4, 150)
    _, second = planted(5, 150, {name: SPAMMER if name == "ada" else CREW["ben"] for name in CREW})
    both = as_frame(spark, first, "a").unionByName(as_frame(spark, second, "b"))
    models, _ = fit(both)
    alone, _ = fit(as_frame(spark, first, "a"))
    assert [model.dataset for model in models] == ["a", "b"]
    np.testing.assert_allclose(models[0].matrix_AGK, alone[0].matrix_AGK, atol=1e-9)
    assert models[0].matrix_AGK[0, 2, 2] > models[1].matrix_AGK[0, 2, 2] + 0.3


def test_an_annotator_of_one_mark_is_near_the_pooled_matrix(spark):
    _, marks = planted(6, 300, dict.fromkeys("abcd", CAREFUL))
    (model,), _ = fit(as_frame(spark, [*marks, ("p0", "new", 2)]))
    found = dict(zip([rater.name for rater in model.rater_A], model.matrix_AGK, strict=True))
    # one mark beside the eight of the prior moves a row by a ninth at most
    assert np.abs(found["new"] - model.pooled_GK).max() < 1 / 9
    assert (found["new"].argmax(axis=1) == [0, 1, 2]).all()


def test_few_marks_are_sane(spark):
    (model,), shares = fit(as_frame(spark, [("one", "a", 2), ("two", "a", 0), ("two", "b", 0)]))
    assert shares["one"].argmax() == 2
    assert shares["two"].argmax() == 0
    assert shares["two"][0] > shares["two"][1] > shares["two"][2]  # by the distance of grades
    assert np.isfinite([one.log_posterior for one in model.rounds]).all()


def test_without_marks_nothing_is_fitted(spark):
    models, shares = fit(as_frame(spark, []))
    assert (models, shares) == ([], {})
    assert confusion_frame(spark, models).count() == rounds_frame(spark, models).count() == 0


def test_gold_makes_a_pair_sure_and_teaches_how_annotators_mark(spark):
    """Where all mark too high the marks cannot tell; gold can."""
    far_too_high = np.array([[0.2, 0.75, 0.05], [0.02, 0.2, 0.78], [0.01, 0.04, 0.95]])
    true, marks = planted(7, 200, dict.fromkeys("xyz", far_too_high))
    gold = spark.createDataFrame([("d", "q", f"p{pair}", int(true[pair])) for pair in range(60)], GOLD)
    frame = as_frame(spark, marks)
    loose = DawidSkeneRecipe(tolerance=5e-3)
    (_, without), (_, told) = fit(frame, loose), fit(frame, loose, gold)
    for pair in range(60):
        assert told[f"p{pair}"][true[pair]] == 1.0
    right = [np.mean([q[f"p{pair}"].argmax() == true[pair] for pair in range(60, 200)]) for q in (without, told)]
    joint = {f"p{pair}": np.log([0.35, 0.3, 0.35]) for pair in range(60, 200)}
    for product, _, mark in marks:
        joint[product] = joint.get(product, 0) + np.log(far_too_high[:, mark])
    best = np.mean([joint[f"p{pair}"].argmax() == true[pair] for pair in range(60, 200)])  # who knows the matrices
    assert right[0] < best - 0.2
    assert right[1] > best - 0.04


def test_marks_without_a_name_share_a_matrix_per_scale(spark):
    marks = [(f"p{n}", None, n % 3, 1, float(n % 3), scale) for n in range(30) for scale in ("a", "b", "b")]
    (model,), _ = fit(as_frame(spark, [*marks, ("p1", "eva", 1)]))
    assert [tuple(rater) for rater in model.rater_A] == [("annotator", "eva"), ("anonymous", "a"), ("anonymous", "b")]
    assert model.marks_AGK.sum(axis=(1, 2)) == pytest.approx([1, 30, 60])
    rows = confusion_frame(spark, [model]).collect()
    assert len(rows) == 9 * 4
    kinds = {(row["kind"], row["annotator"], row["scale"], row["num_marks"]) for row in rows}
    expected = {("pooled", None, None, 91.0), ("annotator", "eva", None, 1.0), ("anonymous", None, "a", 30.0)}
    assert {(kind, who, scale, round(num, 6)) for kind, who, scale, num in kinds} == expected | {
        ("anonymous", None, "b", 60.0)
    }


def test_a_mean_of_raters_counts_as_marks_on_the_grades_beside_it(spark):
    """3 raters of mean 4/3 are 2 marks of 1 and 1 of 2; 4 of mean .25 are 3 of 0 and 1 of 1."""
    rows = [("x", None, 1, 3, 4 / 3, "s"), ("y", None, 0, 4, 0.25, "s"), ("z", None, 2, 1, 1.6, "s")]
    marks = {row["product_id"]: row for row in prepare_marks(as_frame(spark, rows)).collect()}
    found = {product: [row["n0"], row["n1"], row["n2"]] for product, row in marks.items()}
    assert found["x"] == pytest.approx([0, 2, 1])
    assert found["y"] == pytest.approx([3, 1, 0])
    assert found["z"] == pytest.approx([0, 0, 1])  # one rater: the grade that his mark maps to


def test_who_marks_a_pair_twice_is_one_rater(spark):
    rows = prepare_marks(as_frame(spark, [("x", "eva", 2), ("x", "eva", 1), ("x", None, 0), ("x", None, 0)])).collect()
    found = {row["kind"]: [row["n0"], row["n1"], row["n2"]] for row in rows}
    assert found == {"annotator": [0, 0.5, 0.5], "anonymous": [2, 0, 0]}
    assert sum(row["is_first"] for row in rows) == 1


def test_a_round_moves_nothing_but_the_sums_of_raters(spark, capsys):
    _, marks = planted(8, 50)
    prepared = prepare_marks(as_frame(spark, marks)).persist()
    (model,) = fit_annotators(prepared, DawidSkeneRecipe(max_rounds=1))
    graded = _with_grades(prepared, _parameters(spark, [model]))
    graded.groupBy("place").sum("q0").explain()
    plan = capsys.readouterr().out.partition("InMemoryRelation")[0]
    prepared.unpersist()
    assert plan.count("Exchange hashpartitioning(place") == 1
    assert plan.count("Exchange") == 1
    assert "Sort " not in plan


def test_the_most_probable_grade_is_the_consensus_and_settles_ties(spark):
    rows = [("d", "q", "tie", 0.2, 0.7, 0.1, False), ("d", "q", "even", 0.4, 0.4, 0.2, False)]
    rows += [("d", "q", "known", 1.0, 0.0, 0.0, True), ("d", "q", "unsure", 0.3, 0.3, 0.4, False)]
    schema = "dataset string, query_id string, product_id string, p0 double, p1 double, p2 double, is_gold boolean"
    marks = [("tie", "a", 1), ("tie", "b", 2), ("even", "a", 1), ("known", "a", 2), ("unsure", None, 2, 3, 1.75, "s")]
    probabilities = spark.createDataFrame(rows, schema)
    found = {
        row["product_id"]: row
        for row in most_probable(as_frame(spark, marks), probabilities, ConsensusRecipe()).collect()
    }
    assert found.keys() == {"tie", "known", "unsure"}
    tie, known, unsure = found["tie"], found["known"], found["unsure"]
    assert (tie["grade"], tie["num_marks"], tie["agreement"], tie["method"]) == (1, 2, 0.5, "dawid_skene")
    assert (tie["at_least_1"], tie["at_least_2"], tie["p1"]) == (1.0, 0.5, 0.7)
    assert (known["grade"], known["agreement"], known["method"], known["judge"]) == (0, 0.0, "gold", "human")
    assert (unsure["num_marks"], unsure["agreement"], unsure["at_least_2"]) == (3, 1.0, 0.75)
    strict = most_probable(as_frame(spark, marks), probabilities, ConsensusRecipe(min_probability=0.5))
    assert {row["product_id"] for row in strict.collect()} == {"tie", "known"}
