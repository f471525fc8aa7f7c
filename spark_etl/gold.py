"""Pairs whose grade is known: gold questions among annotators' work, and experts' verdicts."""

from __future__ import annotations

from pyspark.sql import DataFrame, Window
from pyspark.sql import functions as sf

from spark_etl.checked import clean_text, reason_of, refuse_repeats, refuse_unknown_pair
from spark_etl.consensus import newest_verdicts

COLUMNS = ("query_id", "product_id", "grade", "source", "note", "guideline")
PAIR = ("dataset", "query_id", "product_id")


def check_gold(raw: DataFrame, queries: DataFrame, products: DataFrame) -> DataFrame:
    """Typed gold questions with `raw_row` and `reason`, one per pair; where two rows grade a pair apart none is kept.

    Args:
        raw: raw frame with COLUMNS as text.
        queries: rows of the query table.
        products: rows of the catalogue.
    """
    reason = reason_of(
        (sf.col("unparsed"), "the line is not a row of its file's format"),
        (sf.coalesce("query_id", sf.lit("")) == "", "query_id is missing"),
        (sf.coalesce("product_id", sf.lit("")) == "", "product_id is missing"),
        (~sf.coalesce(sf.col("grade").between(0, 2), sf.lit(False)), "grade is not 0, 1 or 2"),
    )
    typed = raw.withColumns(
        {
            "query_id": sf.trim("query_id"),
            "product_id": sf.trim("product_id"),
            "grade": sf.col("grade").try_cast("tinyint"),
            "source": clean_text("source"),
            "note": clean_text("note"),
            "guideline": clean_text("guideline"),
        }
    )
    checked = refuse_unknown_pair(typed.withColumn("reason", reason), queries, products)
    same_pair = Window.partitionBy(*PAIR, sf.col("reason").isNull())
    is_torn = sf.min("grade").over(same_pair) != sf.max("grade").over(same_pair)
    torn = sf.when(sf.col("reason").isNull() & is_torn, "another row gives the pair another grade")
    return refuse_repeats(checked.withColumn("reason", sf.coalesce("reason", torn)).drop("unparsed"), PAIR)


def known_grades(questions: DataFrame | None, verdicts: DataFrame | None) -> DataFrame | None:
    """PAIR, `gold` and `is_verdict`; a pair with both has the grade of its newest verdict. None where neither is given.

    Args:
        questions: rows of gold_question.
        verdicts: rows of audit_verdict.
    """
    named = [
        frame.select(*PAIR, sf.col("grade").alias("gold"), sf.lit(is_verdict).alias("is_verdict"))
        for frame, is_verdict in (
            (questions, False),
            (None if verdicts is None else newest_verdicts(verdicts), True),
        )
        if frame is not None
    ]
    if len(named) < 2:
        return named[0] if named else None
    asked, decided = named
    return asked.join(decided, on=list(PAIR), how="left_anti").unionByName(decided)
