"""Dawid-Skene: the grades of pairs and how each annotator marks, each found from the other.

P(mark k | annotator a, pair of grade g) = matrix_a[g, k], marks independent given the grade, fitted by expectation
maximisation (Dawid and Skene 1979). Marks of a pair lie together in memory once and for all, so that a round moves
nothing but nine sums per annotator; these go to the driver and come back as a small frame that is broadcast.

Priors keep annotators with few marks sane. First one matrix is fitted to all marks of the data set; its own prior falls
with the distance of mark and grade. Each annotator's matrix is then drawn to that one by `prior_marks` marks per grade.

An annotator who marked a pair several times counts as one rater, whose marks share his weight. A row of `num_marks`
raters of whom only the mean is known counts as that many marks on the two grades beside the mean, in the parts that
give it: the least spread that the mean allows, as in at_least_1 and at_least_2 of the consensus. Marks without a name
share one matrix per data set and scale.

Shapes: A annotators, D data sets, P patterns of marks, G grades of pairs, K marks (3 each).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import pyarrow as pa
from pyspark.sql import Column, DataFrame, SparkSession, Window
from pyspark.sql import functions as sf

from spark_etl.annotator_model import GRADES, NEVER, AnnotatorModel, Fit, Matrix, Rater
from spark_etl.recipes import DawidSkeneRecipe

logger = logging.getLogger(__name__)

PAIR = ("dataset", "query_id", "product_id")
_RATER = ("dataset", "kind", "name")
_NUMBERS = tuple(f"n{mark}" for mark in GRADES)
_LOGS = tuple(f"log_{grade}_{mark}" for grade in GRADES for mark in GRADES)
_LOG_SHARES = tuple(f"log_share_{grade}" for grade in GRADES)


def prepare_marks(annotations: DataFrame, gold: DataFrame | None = None) -> DataFrame:
    """Marks per pair and rater, those of a pair together and in order; persist it, every round reads it.

    Args:
        annotations: rows of human_annotation.
        gold: PAIR and `gold`, the grade that is known of the pair.
    """
    value = sf.when(sf.col("num_marks") > 1, sf.col("grade_value")).otherwise(sf.col("grade").cast("double"))
    shares = (1 - sf.least(value, sf.lit(1.0)), 1 - sf.abs(value - 1), sf.greatest(value - 1, sf.lit(0.0)))
    is_named = sf.col("annotator").isNotNull()
    hands = sf.when(sf.col("kind") == "annotator", sf.count("*")).otherwise(sf.lit(1))
    marks = (
        annotations.withColumns(
            {
                "kind": sf.when(is_named, "annotator").otherwise("anonymous"),
                "name": sf.coalesce("annotator", "scale"),
            }
        )
        .groupBy(*PAIR, "kind", "name")
        .agg(
            *(
                (sf.sum(sf.col("num_marks") * share) / hands).alias(name)
                for name, share in zip(_NUMBERS, shares, strict=True)
            )
        )
    )
    if gold is None:
        marked = marks.withColumn("gold", sf.lit(None).cast("int"))
    else:
        known = gold.select(*PAIR, sf.col("gold").cast("int").alias("gold"))
        marked = marks.join(known, on=list(PAIR), how="left")
    placed = marked.repartition(*PAIR).sortWithinPartitions(*PAIR)
    in_pair = Window.partitionBy(*PAIR).orderBy("kind", "name")
    return placed.withColumn("is_first", (sf.row_number().over(in_pair) == 1).cast("double"))


def fit_annotators(marks: DataFrame, recipe: DawidSkeneRecipe) -> list[AnnotatorModel]:
    """A model per data set, in the order of their names; all are fitted in the same rounds.

    Args:
        marks: as of `prepare_marks`, persisted.
    """
    raters = marks.groupBy(*_RATER).count().orderBy(*_RATER).toArrow().to_pylist()
    fits = [
        Fit(dataset, tuple(Rater(row["kind"], row["name"]) for row in raters if row["dataset"] == dataset), recipe)
        for dataset in dict.fromkeys(row["dataset"] for row in raters)
    ]
    patterns = _patterns(marks)
    for fit in fits:
        fit.start(*patterns[fit.dataset])
    waiting = list(fits)
    while waiting:
        expected = _expect(marks, waiting)
        for fit, sums_AN in zip(waiting, expected, strict=True):
            fit.take(sums_AN)
        waiting = [fit for fit in waiting if not fit.is_done]
    for fit in fits:
        told = "converged" if fit.converged else "stopped before it converged; raise recipe.dawid_skene.max_rounds"
        level = logging.INFO if fit.converged else logging.WARNING
        numbers = fit.dataset, len(fit.rater_A), len(fit.rounds)
        logger.log(level, "annotators of %s: %d raters, %d rounds, %s", *numbers, told)
    return [fit.model() for fit in fits]


def grade_probabilities(marks: DataFrame, models: Sequence[AnnotatorModel]) -> DataFrame:
    """p0, p1 and p2 of every marked pair, and whether its grade is known (`is_gold`), which makes it sure.

    Args:
        marks: what the models were fitted to.
    """
    found = _with_grades(marks, _parameters(marks.sparkSession, models))
    first = found.where(sf.col("is_first") == 1)
    return first.select(
        *PAIR,
        *(sf.col(f"q{grade}").alias(f"p{grade}") for grade in GRADES),
        sf.col("gold").isNotNull().alias("is_gold"),
    )


def confusion_frame(spark: SparkSession, models: Iterable[AnnotatorModel]) -> DataFrame:
    """Rows of the table annotator_confusion."""
    rows = [
        {
            "dataset": model.dataset,
            "kind": rater.kind,
            "annotator": rater.name if rater.kind == "annotator" else None,
            "scale": rater.name if rater.kind == "anonymous" else None,
            "true_grade": grade,
            "grade": mark,
            "probability": matrix_GK[grade, mark],
            "marks": marks_GK[grade, mark],
            "num_marks": marks_GK.sum(),
            "true_share": model.share_G[grade],
        }
        for model in models
        for rater, matrix_GK, marks_GK in _matrices(model)
        for grade in GRADES
        for mark in GRADES
    ]
    text, small, number = pa.string(), pa.int8(), pa.float64()
    names = ("dataset", "kind", "annotator", "scale", "true_grade", "grade")
    schema = list(zip(names, (text, text, text, text, small, small), strict=True))
    schema += [(name, number) for name in ("probability", "marks", "num_marks", "true_share")]
    return spark.createDataFrame(pa.Table.from_pylist(rows, pa.schema(schema)))


def rounds_frame(spark: SparkSession, models: Iterable[AnnotatorModel]) -> DataFrame:
    """Rows of the table dawid_skene_round."""
    rows = [
        (model.dataset, stage, number, *(float(value) for value in one[1:]))
        for model in models
        for stage in ("pooled", "annotators")
        for number, one in enumerate((one for one in model.rounds if one.stage == stage), start=1)
    ]
    schema = "dataset string, stage string, round int, log_likelihood double, log_posterior double, change double"
    return spark.createDataFrame(rows, schema)


def _matrices(model: AnnotatorModel) -> Iterator[tuple[Rater, Matrix, Matrix]]:
    yield Rater("pooled", ""), model.pooled_GK, model.pooled_marks_GK
    yield from zip(model.rater_A, model.matrix_AGK, model.marks_AGK, strict=True)


def _patterns(marks: DataFrame) -> dict[str, tuple[Matrix, Matrix, Matrix]]:
    """Data set -> marks of each grade, number of pairs and known grade of each pattern of marks.

    Whose marks they are bears on the pooled matrix in nothing, so pairs with equal marks are one: a few hundred rows
    where each rater has a mark, at most some ten thousand where hundredths of a mean count.
    """
    by_pair = marks.groupBy(*PAIR).agg(
        *(sf.round(sf.sum(name), 2).alias(name) for name in _NUMBERS), sf.first("gold").alias("gold")
    )
    order = ("dataset", *_NUMBERS, "gold")
    found = by_pair.groupBy(*order).agg(sf.count("*").alias("weight")).orderBy(*order).toArrow()
    dataset = np.array(found["dataset"].to_pylist())
    number_PK = np.column_stack([found[name].to_numpy() for name in _NUMBERS])
    weight_P = found["weight"].to_numpy().astype(float)
    gold_P = np.array([np.nan if grade is None else grade for grade in found["gold"].to_pylist()], dtype=float)
    return {
        name: (number_PK[dataset == name], weight_P[dataset == name], gold_P[dataset == name])
        for name in dict.fromkeys(dataset.tolist())
    }


def _parameters(spark: SparkSession, models: Sequence[AnnotatorModel | Fit]) -> DataFrame:
    """Per rater of the models the logarithms of matrix and shares, as data: the plan is that of the first round."""
    logs = [
        np.hstack(
            [
                np.log(model.matrix_AGK).reshape(len(model.rater_A), -1),
                np.repeat(np.log(model.share_G)[None], len(model.rater_A), axis=0),
            ]
        )
        for model in models
    ]
    keys = {
        "dataset": [model.dataset for model in models for _ in model.rater_A],
        "kind": [rater.kind for model in models for rater in model.rater_A],
        "name": [rater.name for model in models for rater in model.rater_A],
    }
    columns = {name: pa.array(values, pa.string()) for name, values in keys.items()}
    columns["place"] = pa.array(np.arange(len(keys["name"])))
    names = (*_LOGS, *_LOG_SHARES)
    logs_AN = np.vstack([np.zeros((0, len(names))), *logs])
    columns |= {name: pa.array(values) for name, values in zip(names, logs_AN.T, strict=True)}
    return spark.createDataFrame(pa.table(columns))


def _with_grades(marks: DataFrame, parameters: DataFrame) -> DataFrame:
    """Adds to every mark the probability of each grade of its pair, q0 to q2, and log that of its marks, `evidence`."""
    pair = Window.partitionBy(*PAIR)
    joined = marks.join(sf.broadcast(parameters), on=list(_RATER), how="inner")
    scores = {f"score_{grade}": _score(grade, pair) for grade in GRADES}
    best = sf.greatest(*scores)
    scored = joined.withColumns(scores).withColumn("best", best)
    odds = scored.withColumns({f"odds_{grade}": sf.exp(sf.col(f"score_{grade}") - sf.col("best")) for grade in GRADES})
    total = sf.col("odds_0") + sf.col("odds_1") + sf.col("odds_2")
    shares = odds.withColumn("total", total)
    return shares.withColumns(
        {f"q{grade}": sf.col(f"odds_{grade}") / sf.col("total") for grade in GRADES}
        | {"evidence": sf.col("best") + sf.log("total")}
    )


def _score(grade: int, pair: Window) -> Column:
    """Logarithm of a grade's share times the probability of all the pair's marks under it."""
    own = sum(
        (sf.col(f"n{mark}") * sf.col(f"log_{grade}_{mark}") for mark in GRADES[1:]),
        sf.col("n0") * sf.col(f"log_{grade}_0"),
    )
    is_open = sf.col("gold").isNull() | (sf.col("gold") == grade)
    return sf.when(is_open, sf.sum(own).over(pair) + sf.col(f"log_share_{grade}")).otherwise(sf.lit(NEVER))


def _expect(marks: DataFrame, fits: Sequence[Fit]) -> list[Matrix]:
    """Per fit and rater nine expected marks; then, of the pairs that he is first in, the sums of q0 to q2 and evidence.

    The marks lie by pair already: what is moved are the sums alone.
    """
    found = _with_grades(marks, _parameters(marks.sparkSession, fits))
    is_first = sf.col("is_first")
    totals = [sf.sum(sf.col(f"q{grade}") * sf.col(f"n{mark}")) for grade in GRADES for mark in GRADES]
    totals += [sf.sum(is_first * sf.col(f"q{grade}")) for grade in GRADES]
    totals.append(sf.sum(is_first * sf.col("evidence")))
    named = [total.alias(f"sum_{number}") for number, total in enumerate(totals)]
    sums = found.groupBy("place").agg(*named).toArrow().sort_by("place")
    sums_AN = np.column_stack([sums[f"sum_{number}"].to_numpy() for number in range(len(totals))])
    return np.split(sums_AN, np.cumsum([len(fit.rater_A) for fit in fits])[:-1])
