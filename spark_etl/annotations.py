"""Raw marks into human annotations."""

from __future__ import annotations

from pyspark.sql import DataFrame, Window
from pyspark.sql import functions as sf

from spark_etl.checked import clean_text, reason_of, refuse_unknown_pair

COLUMNS = ("query_id", "product_id", "mark", "scale", "num_marks", "annotator", "grade", "grade_value", "guideline")


def check_annotations(raw: DataFrame, queries: DataFrame, products: DataFrame) -> DataFrame:
    """Typed marks with `mark_number`, `raw_row` and `reason`; equal marks of a pair are two marks, not a repetition.

    Args:
        raw: raw frame with COLUMNS as text.
        queries: rows of the query table.
        products: rows of the catalogue.
    """
    reason = reason_of(
        (sf.col("unparsed"), "the line is not a row of its file's format"),
        (sf.col("query_id").isNull(), "query_id is missing"),
        (sf.col("product_id").isNull(), "product_id is missing"),
        (sf.col("mark").isNull() | sf.col("scale").isNull(), "mark or scale is missing"),
        (~sf.coalesce(sf.col("grade").between(0, 2), sf.lit(False)), "grade is not 0, 1 or 2"),
        (~sf.coalesce(sf.col("grade_value").between(0, 2), sf.lit(False)), "grade_value is not between 0 and 2"),
        (~sf.coalesce(sf.col("num_marks") >= 1, sf.lit(False)), "num_marks is not a number of raters"),
    )
    typed = raw.withColumns(
        {
            "query_id": sf.trim("query_id"),
            "product_id": sf.trim("product_id"),
            "num_marks": sf.coalesce("num_marks", sf.lit("1")).try_cast("int"),
            "grade": sf.col("grade").try_cast("tinyint"),
            "grade_value": sf.coalesce(sf.col("grade_value"), sf.col("grade")).try_cast("double"),
            "guideline": clean_text("guideline"),
        }
    )
    checked = refuse_unknown_pair(typed.withColumn("reason", reason), queries, products)
    same_hand = Window.partitionBy("dataset", "query_id", "product_id", "annotator", sf.col("reason").isNull())
    return checked.withColumn("mark_number", sf.row_number().over(same_hand.orderBy("raw_row"))).drop("unparsed")
