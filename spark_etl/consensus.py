"""One human grade per pair: the majority of the marks, the most probable grade, or the expert's verdict."""

from __future__ import annotations

from pyspark.sql import DataFrame, Window
from pyspark.sql import functions as sf

from lake.schemas import ANNOTATION_CONSENSUS, Grade
from spark_etl.recipes import ConsensusRecipe

PAIR = ("dataset", "query_id", "product_id")
PROBABILITIES = tuple(f"p{int(grade)}" for grade in Grade)
_TIE = 1e-9
"""Grades whose probabilities differ by less are as probable as each other."""


def build_consensus(annotations: DataFrame, recipe: ConsensusRecipe) -> DataFrame:
    """The grade that most raters of a pair give; a row of `num_marks` raters counts that often.

    Beside it stand the shares of raters at or above grades 1 and 2; a mean that lies between two grades counts for
    both in part. A tie is no consensus, whichever grades tie: such a pair waits for the labeller. A single mark is its
    own consensus.
    """
    weight, value = sf.col("num_marks"), sf.col("grade_value")
    votes = annotations.groupBy(*PAIR, "grade").agg(
        sf.sum(weight).alias("votes"),
        sf.sum(weight * sf.least(value, sf.lit(1.0))).alias("votes_1"),
        sf.sum(weight * sf.greatest(value - 1, sf.lit(0.0))).alias("votes_2"),
    )
    pair = Window.partitionBy(*PAIR)
    ranked = votes.select(
        *PAIR,
        "grade",
        "votes",
        sf.sum("votes").over(pair).alias("num_marks"),
        sf.max("votes").over(pair).alias("most"),
        *(
            (sf.sum(f"votes_{grade}").over(pair) / sf.sum("votes").over(pair)).alias(f"at_least_{grade}")
            for grade in (1, 2)
        ),
    )
    is_untied = sf.count_if(sf.col("votes") == sf.col("most")).over(pair) == 1
    agreed = ranked.withColumn("is_untied", is_untied).where(sf.col("is_untied") & (sf.col("votes") == sf.col("most")))
    return (
        agreed.withColumn("agreement", sf.col("votes") / sf.col("num_marks"))
        .where(sf.col("agreement") >= recipe.min_agreement)
        .select(
            *PAIR,
            "grade",
            sf.col("num_marks").cast("int").alias("num_marks"),
            "agreement",
            "at_least_1",
            "at_least_2",
            sf.lit("human").alias("judge"),
            *(sf.lit(None).cast("double").alias(name) for name in PROBABILITIES),
            sf.lit("majority").alias("method"),
        )
    )


def most_probable(annotations: DataFrame, probabilities: DataFrame, recipe: ConsensusRecipe) -> DataFrame:
    """The most probable grade of each pair, with what its raters gave beside it.

    `agreement` and the shares at or above each grade are of the raters as given, as by majority; only the grade comes
    from the probabilities. Of equally probable grades none is a consensus.

    Args:
        annotations: rows of human_annotation.
        probabilities: PAIR, p0, p1, p2 and `is_gold`, as of `spark_etl.dawid_skene.grade_probabilities`.
    """
    weight, value = sf.col("num_marks"), sf.col("grade_value")
    raters = annotations.groupBy(*PAIR).agg(
        sf.sum("num_marks").alias("raters"),
        sf.sum(weight * sf.least(value, sf.lit(1.0))).alias("votes_1"),
        sf.sum(weight * sf.greatest(value - 1, sf.lit(0.0))).alias("votes_2"),
        sf.array(*(sf.sum(sf.when(sf.col("grade") == int(grade), weight).otherwise(0)) for grade in Grade)).alias(
            "votes"
        ),
    )
    best = sf.greatest(*PROBABILITIES)
    is_best = [sf.col(name) > sf.col("best") - _TIE for name in PROBABILITIES]
    num_best = sum((one.cast("int") for one in is_best[1:]), is_best[0].cast("int"))
    grade = sf.when(is_best[2], 2).when(is_best[1], 1).otherwise(0)
    graded = (
        raters.join(probabilities, on=list(PAIR), how="inner")
        .withColumn("best", best)
        .where((num_best == 1) & (sf.col("best") >= recipe.min_probability))
        .withColumn("grade", grade.cast("tinyint"))
    )
    return graded.select(
        *PAIR,
        "grade",
        sf.col("raters").cast("int").alias("num_marks"),
        (sf.element_at("votes", sf.col("grade").cast("int") + 1) / sf.col("raters")).alias("agreement"),
        *((sf.col(f"votes_{bound}") / sf.col("raters")).alias(f"at_least_{bound}") for bound in (1, 2)),
        sf.lit("human").alias("judge"),
        *PROBABILITIES,
        sf.when(sf.col("is_gold"), "gold").otherwise("dawid_skene").alias("method"),
    )


def with_verdicts(consensus: DataFrame, verdicts: DataFrame) -> DataFrame:
    """The consensus in which the newest verdict of a pair takes the place of the marks, or stands without any."""
    expert = newest_verdicts(verdicts).select(
        *PAIR,
        "grade",
        sf.lit(1).alias("num_marks"),
        sf.lit(1.0).alias("agreement"),
        *((sf.col("grade") >= grade).cast("double").alias(f"at_least_{grade}") for grade in (1, 2)),
        sf.lit("expert").alias("judge"),
        *(sf.lit(None).cast("double").alias(name) for name in PROBABILITIES),
        sf.lit("verdict").alias("method"),
    )
    known = [name for name in ANNOTATION_CONSENSUS.column_names if name in consensus.columns]
    marks = consensus.join(expert, on=list(PAIR), how="left_anti")
    return marks.select(*known).unionByName(expert, allowMissingColumns=True)


def newest_verdicts(verdicts: DataFrame) -> DataFrame:
    """One verdict per pair: the newest."""
    order = Window.partitionBy(*PAIR).orderBy(sf.desc("decided_at"), "expert", "grade")
    return verdicts.withColumn("age", sf.row_number().over(order)).where("age = 1").drop("age")
