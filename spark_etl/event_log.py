"""Rows of a shop's log into typed events, each judged by itself.

Two sources: `events`, a row per event (or per product shown, with a flag `clicked`), and `ubi`, the User Behavior
Insights schema of OpenSearch, where searches are rows of their own and one event names its product and place in nested
attributes. What two rows say of each other (repetitions, visits, bots) is `spark_etl.visits`' part.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as sf

from lake.schemas import LOGGED_EVENT
from spark_etl.checked import clean_text, reason_of
from spark_etl.queries import normal_form
from spark_etl.raw import read_files
from spark_etl.recipes import LOG_COLUMNS, EventLogRecipe

KINDS = ("impression", "click", "cart", "purchase")
AFTER_SEARCH = ("cart", "purchase")
"""What shoppers also do on pages that know nothing of the search: query and place may be told by the visit."""
PASSED_OVER = "passed over: about no product"
_UBI_COLUMNS = ("action_name", "query_id", "session_id", "client_id", "timestamp", "user_query", "event_attributes")
_UBI_KINDS = {"impression": "impression", "click": "click", "add_to_cart": "cart", "purchase": "purchase"}
_UBI_ATTRIBUTES = "object STRUCT<object_id: STRING>, position STRUCT<ordinal: STRING>"
_BULK = ("index", "create")
_TELLING = ("session_id", "visitor_id", "query_id", "query", "product_id", "kind", "position", "event_time")
_LOCALE = r"^[A-Za-z]{2,8}([-_][A-Za-z0-9]{1,8})*$"


def read_log(
    spark: SparkSession, dataset: str, files: Mapping[Path, tuple[str, str]], recipe: EventLogRecipe, scratch: Path
) -> DataFrame:
    """Every row of the files as rows of logged_event: events, and rows with the `reason` why they are none.

    Args:
        files: path -> its delivery and its name; at least one.
        scratch: folder for unpacked files; must outlive the frame.
    """
    if recipe.source == "ubi":
        columns = (*_UBI_COLUMNS, *_BULK)
        raw = _from_ubi(read_files(spark, dataset, files, columns, scratch))
    else:
        theirs = {name: recipe.columns.get(name, name) for name in LOG_COLUMNS}
        raw = read_files(spark, dataset, files, list(dict.fromkeys(theirs.values())), scratch)
        told = {name: sf.col(f"`{given}`") for name, given in theirs.items()}
        kept = ("dataset", "delivery", "file", "raw_row", "unparsed")
        raw = raw.select(*kept, *(column.alias(name) for name, column in told.items()))
    return check_log(raw, recipe)


def check_log(raw: DataFrame, recipe: EventLogRecipe) -> DataFrame:
    """Typed rows of logged_event; where there is a `reason`, the row as read stands beside it and no day.

    Args:
        raw: LOG_COLUMNS as text, dataset, delivery, file, raw_row, unparsed.
    """
    typed = _typed(_by_kind(raw), recipe)
    # the normal form is nondeterministic in Spark's eyes, and so in a select of its own
    formed = typed.withColumn("normalised", normal_form(sf.col("query"), sf.col("locale")))
    formed = formed.withColumn("reason", _reason(recipe))
    is_event = sf.col("reason").isNull()
    told = [sf.coalesce(sf.col(name).cast("string"), sf.lit("")) for name in _TELLING]
    return (
        formed.withColumns(
            {
                "content": sf.xxhash64(*told),
                "event_day": sf.when(is_event, sf.to_date("event_time")),
                "row": sf.when(~is_event, sf.col("raw_row")),
            }
        )
        .withColumn("event_id", sf.coalesce("event_id", sf.hex("content")))
        .select(*LOGGED_EVENT.column_names)
    )


def _by_kind(raw: DataFrame) -> DataFrame:
    """A row per event: one without a kind that says whether it was clicked is an impression, and maybe a click."""
    clicked = sf.lower(sf.trim("clicked"))
    is_shown = (sf.coalesce(sf.trim("kind"), sf.lit("")) == "") & clicked.isin("true", "false", "1", "0", "t", "f")
    shown = sf.when(clicked.isin("true", "1", "t"), sf.array(sf.lit("impression"), sf.lit("click")))
    kinds = sf.when(is_shown, shown.otherwise(sf.array(sf.lit("impression")))).otherwise(
        sf.array(sf.lower(sf.trim("kind")))
    )
    one_of_two = sf.when(is_shown & sf.col("event_id").isNotNull(), sf.concat("event_id", sf.lit("/"), "each"))
    return raw.withColumn("each", sf.explode(kinds)).withColumns(
        {"event_id": sf.coalesce(one_of_two, "event_id"), "kind": sf.col("each")}
    )


def _typed(raw: DataFrame, recipe: EventLogRecipe) -> DataFrame:
    position = sf.trim("position").try_cast("int") + (1 - recipe.first_position)
    day = sf.regexp_extract("delivery", r"(\d{4}-\d{2}-\d{2})", 1).try_cast("date")
    sent, received, told = _time("sent_at"), _time("received_at"), _time("event_time")
    # a clock that is wrong is as wrong when it sends as when it saw: what it says has passed in between counts
    time = sf.coalesce(received - (sent - told), told)
    if recipe.day_of_delivery:
        time = sf.coalesce(time, day.cast("timestamp"))
    ids = {name: sf.nullif(sf.trim(name), sf.lit("")) for name in ("event_id", "session_id", "visitor_id", "query_id")}
    return raw.withColumns(
        ids
        | {
            "product_id": sf.nullif(sf.trim("product_id"), sf.lit("")),
            "query": clean_text("query"),
            "locale": sf.coalesce(
                sf.nullif(sf.trim("locale"), sf.lit("")), sf.nullif(sf.lit(recipe.locale), sf.lit(""))
            ),
            "place": sf.nullif(sf.trim("position"), sf.lit("")),
            "position": position,
            "event_time": time,
            "came_before": sf.coalesce(received, (day + sf.expr("interval 1 day")).cast("timestamp")),
            "came_after": sf.coalesce(received, day.cast("timestamp")),
        }
    )


def _time(name: str) -> Column:
    """A time in ISO 8601, or in seconds or milliseconds since 1970."""
    text = sf.trim(name)
    number = text.try_cast("bigint")
    epoch = sf.when(text.rlike(r"^\d{9,10}$"), sf.timestamp_seconds(number)).when(
        text.rlike(r"^\d{12,13}$"), sf.timestamp_millis(number)
    )
    return sf.coalesce(epoch, sf.when(~text.rlike(r"^\d*$"), sf.try_to_timestamp(text)))


def _reason(recipe: EventLogRecipe) -> Column:
    def lacks(name: str) -> Column:
        return sf.col(name).isNull()

    is_known_kind = sf.coalesce(sf.col("kind").isin(*KINDS), sf.lit(False))
    may_lack = sf.col("kind").isin(*AFTER_SEARCH)
    texts = sf.concat_ws(
        "", *(sf.col(name) for name in ("event_id", "session_id", "visitor_id", "query", "product_id"))
    )
    ahead = sf.col("event_time") > sf.col("came_before") + sf.make_dt_interval(secs=sf.lit(recipe.max_skew_sec))
    behind = sf.col("event_time") < sf.col("came_after") - sf.make_dt_interval(days=sf.lit(recipe.max_late_days))
    rank = f"a rank from {recipe.first_position}"
    return reason_of(
        (sf.col("unparsed"), "the line is not a row of its file's format"),
        (sf.coalesce(sf.col("kind"), sf.lit("")) == PASSED_OVER, PASSED_OVER),
        (sf.contains(texts, sf.lit("\ufffd")), "the row holds bytes that are not UTF-8"),
        (lacks("session_id") & lacks("visitor_id"), "session_id and visitor_id are missing"),
        (~is_known_kind, f"kind is none of {', '.join(KINDS)}"),
        (lacks("product_id"), "product_id is missing"),
        (lacks("query_id") & lacks("query") & ~may_lack, "query_id and query are missing"),
        (sf.char_length("query") > recipe.max_query_chars, f"query is longer than {recipe.max_query_chars} characters"),
        (~sf.coalesce(sf.col("locale").rlike(_LOCALE), sf.lit(True)), "locale is not a language tag"),
        (
            ~sf.coalesce(sf.col("position") >= 1, may_lack & lacks("place")),
            f"position is not {rank}",
        ),
        (lacks("event_time"), "event_time is not a time in ISO 8601 or since 1970"),
        (ahead, "event_time is ahead of when the row came: a clock is wrong"),
        (behind, f"event_time is more than {recipe.max_late_days} days before the row came"),
    )


def _from_ubi(raw: DataFrame) -> DataFrame:
    """LOG_COLUMNS of UBI rows; a search's own row gives its text to events that name it and lack one."""
    attributes = sf.from_json("event_attributes", _UBI_ATTRIBUTES)
    texts = (
        raw.where(sf.col("user_query").isNotNull() & sf.col("query_id").isNotNull())
        .groupBy(sf.col("query_id").alias("search"))
        .agg(sf.min("user_query").alias("text"))
    )
    action = sf.col("action_name")
    kind = sf.coalesce(*(sf.when(action == theirs, sf.lit(ours)) for theirs, ours in _UBI_KINDS.items()))
    named = raw.join(texts, on=sf.col("query_id") == sf.col("search"), how="left").withColumn("told", attributes)
    given = {
        "session_id": sf.col("session_id"),
        "visitor_id": sf.col("client_id"),
        "query": sf.coalesce("user_query", "text"),
        "product_id": sf.col("told.object.object_id"),
        "kind": sf.when(~sf.col("unparsed"), sf.coalesce(kind, sf.lit(PASSED_OVER))),
        "position": sf.col("told.position.ordinal"),
        "event_time": sf.col("timestamp"),
    }
    columns = [given.get(name, sf.lit(None).cast("string")).alias(name) for name in LOG_COLUMNS]
    return named.select("dataset", "delivery", "file", "raw_row", "unparsed", *columns)


def tally_deliveries(logged: DataFrame) -> DataFrame:
    """Rows of each file: dataset, delivery, file, num_rows, num_quarantined and num_passed_over, as told by themselves.

    Args:
        logged: rows of logged_event.
    """
    is_passed_over = sf.coalesce(sf.col("reason") == PASSED_OVER, sf.lit(False))
    return logged.groupBy("dataset", "delivery", "file").agg(
        sf.count("*").alias("num_rows"),
        sf.count_if(sf.col("reason").isNotNull() & ~is_passed_over).alias("num_quarantined"),
        sf.count_if(is_passed_over).alias("num_passed_over"),
    )


def refused_of_deliveries(logged: DataFrame) -> DataFrame:
    """Rows of event_quarantine."""
    is_refused = sf.col("reason").isNotNull() & (sf.col("reason") != PASSED_OVER)
    part = sf.concat(sf.lit("delivery="), "delivery")
    return logged.where(is_refused).select("dataset", part.alias("part"), "delivery", "file", "row", "reason")
