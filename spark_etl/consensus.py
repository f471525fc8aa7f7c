"""One human grade per pair: the majority of the marks, or the expert's verdict."""

from __future__ import annotations

from pyspark.sql import DataFrame, Window
from pyspark.sql import functions as sf

from lake.schemas import ANNOTATION_CONSENSUS
from spark_etl.recipes import ConsensusRecipe

PAIR = ("dataset", "query_id", "product_id")


def build_consensus(annotations: DataFrame, recipe: ConsensusRecipe) -> DataFrame:
    """The grade that most raters of a pair give; a row of `num_marks` raters counts that often.

    A tie is no consensus, whichever grades tie: such a pair waits for the labeller. A single mark is its own
    consensus.
    """
    votes = annotations.groupBy(*PAIR, "grade").agg(sf.sum("num_marks").alias("votes"))
    pair = Window.partitionBy(*PAIR)
    ranked = votes.select(
        *PAIR,
        "grade",
        "votes",
        sf.sum("votes").over(pair).alias("num_marks"),
        sf.max("votes").over(pair).alias("most"),
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
            sf.lit("expert").alias("judge"),
        )
    )
    names = ANNOTATION_CONSENSUS.column_names
    marks = consensus.join(expert, on=list(PAIR), how="left_anti")
    return marks.select(*names).unionByName(expert.select(*names))
