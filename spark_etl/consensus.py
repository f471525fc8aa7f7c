"""One human grade per pair: the majority of the marks, or the expert's verdict."""

from __future__ import annotations

from pyspark.sql import DataFrame, Window
from pyspark.sql import functions as sf

from lake.schemas import ANNOTATION_CONSENSUS
from spark_etl.recipes import ConsensusRecipe

PAIR = ("dataset", "query_id", "product_id")


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
        )
    )


def with_verdicts(consensus: DataFrame, verdicts: DataFrame) -> DataFrame:
    """The consensus in which the newest verdict of a pair takes the place of the marks, or stands without any."""
    newest = sf.row_number().over(Window.partitionBy(*PAIR).orderBy(sf.desc("decided_at"), "expert", "grade"))
    expert = (
        verdicts.withColumn("age", newest)
        .where("age = 1")
        .select(
            *PAIR,
            "grade",
            sf.lit(1).alias("num_marks"),
            sf.lit(1.0).alias("agreement"),
            *((sf.col("grade") >= grade).cast("double").alias(f"at_least_{grade}") for grade in (1, 2)),
            sf.lit("expert").alias("judge"),
        )
    )
    names = ANNOTATION_CONSENSUS.column_names
    marks = consensus.join(expert, on=list(PAIR), how="left_anti")
    return marks.select(*names).unionByName(expert.select(*names))
