"""Raw events of shoppers into search events."""

from __future__ import annotations

from pyspark.sql import DataFrame
from pyspark.sql import functions as sf

from spark_etl.checked import reason_of, refuse_repeats, refuse_unknown

COLUMNS = ("event_id", "session_id", "query_id", "product_id", "kind", "position", "event_time")
KINDS = ("impression", "click", "cart", "purchase")


def check_events(raw: DataFrame, queries: DataFrame, products: DataFrame) -> DataFrame:
    """Typed events with `raw_row` and `reason`, one per event id.

    Args:
        raw: raw frame with COLUMNS as text; `event_time` in ISO 8601.
        queries: rows of the query table.
        products: rows of the catalogue.
    """
    names = ("event_id", "session_id", "query_id", "product_id")
    typed = raw.withColumns(
        {name: sf.trim(name) for name in names}
        | {
            "kind": sf.lower(sf.trim("kind")),
            "position": sf.col("position").try_cast("int"),
            "event_time": sf.try_to_timestamp("event_time"),
        }
    )
    reason = reason_of(
        (sf.col("unparsed"), "the line is not a row of its file's format"),
        *((sf.coalesce(name, sf.lit("")) == "", f"{name} is missing") for name in names),
        (~sf.coalesce(sf.col("kind").isin(*KINDS), sf.lit(False)), f"kind is none of {', '.join(KINDS)}"),
        (~sf.coalesce(sf.col("position") >= 1, sf.lit(False)), "position is not a rank from 1"),
        (sf.col("event_time").isNull(), "event_time is not a time in ISO 8601"),
    )
    checked = refuse_unknown(typed.withColumn("reason", reason), queries, ("dataset", "query_id"))
    checked = refuse_unknown(checked, products, ("dataset", "product_id"))
    return refuse_repeats(checked.drop("unparsed"), ("dataset", "event_id"))
