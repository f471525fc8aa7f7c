"""What the events of a day say of each other: visits, repetitions, bots, and purchases back to their searches.

A day stands for itself: visits end at midnight (UTC), a bot is one by its day, and a row that came twice is found
within its day. So a day can be judged again when rows of it come late, and comes out as if they had come in time.
All windows below but the first are over parts of a visitor's day, so that events are moved twice, not once per rule.
"""

from __future__ import annotations

from pyspark.sql import Column, DataFrame, Window, WindowSpec
from pyspark.sql import functions as sf

from spark_etl.checked import REPEATED, is_refused, outcomes, reason_of, refuse_repeats, refuse_unknown
from spark_etl.event_log import AFTER_SEARCH
from spark_etl.recipes import VisitRecipe

NEW_QUERY = "log:"
"""First part of the ids of queries that only the log knows."""
_DAY = ("dataset", "event_day")
_VISIT = ("visitor", "session_id", "product_id")
"""What happened to a product in a visit, beside the day."""
_MINUTE = 60
COUNTS = {"impression": "impressions", "click": "clicks", "cart": "carts", "purchase": "purchases"}
"""Kind of event -> its column in counts."""


def judge_days(logged: DataFrame, queries: DataFrame, products: DataFrame, recipe: VisitRecipe) -> DataFrame:
    """Every event of whole days with its query, visit and place, and the `reason` why it does not count, if any.

    The reason is REPEATED where the row equals one that counts.

    Args:
        logged: rows of logged_event that are events, all of their days.
        queries: rows of the query table.
        products: rows of catalog_product.
    """
    known = _add_reason(
        refuse_unknown(_with_query(logged, queries), products, ("dataset", "product_id")),
        (sf.col("query_is_lost"), "query_id is not in the data set"),
        *(() if recipe.new_queries else ((sf.col("is_new_query"), "query is not in the data set"),)),
    )
    once = refuse_repeats(known, (*_DAY, "event_id"), content="content", order=("delivery", "file", "content"))
    visited = _with_visits(once, recipe)
    return _trace(_refuse_same_again(visited, recipe), recipe)


def _with_query(events: DataFrame, queries: DataFrame) -> DataFrame:
    """Adds the query's id: as told where it is known, else by the text's normal form, else a new one."""
    by_id = queries.select("dataset", sf.col("query_id").alias("told_id"), "query_id")
    by_text = queries.groupBy("dataset", "normalised").agg(sf.min("query_id").alias("text_id"))
    joined = (
        events.withColumnRenamed("query_id", "told_id")
        .join(by_id, on=["dataset", "told_id"], how="left")
        .join(by_text, on=["dataset", "normalised"], how="left")
    )
    new_id = sf.concat(sf.lit(NEW_QUERY), sf.substring(sf.sha2("normalised", 256), 1, 16))
    is_known = sf.col("query_id").isNotNull() | sf.col("text_id").isNotNull()
    return joined.withColumns(
        {
            "query_id": sf.coalesce("query_id", "text_id", new_id),
            "is_new_query": ~is_known & sf.col("normalised").isNotNull(),
            "query_is_lost": ~is_known & sf.col("normalised").isNull() & sf.col("told_id").isNotNull(),
        }
    ).drop("told_id", "text_id")


def _with_live(frame: DataFrame, *key: str) -> tuple[DataFrame, WindowSpec]:
    """Rows that nothing was found against so far, by the day and what else is named, as a window over the frame.

    Its parts are columns of the frame, for Spark sorts once for windows whose columns are the same ones. The first is a
    hash, which tells most rows apart by the eight bytes that sorting compares first.
    """
    columns = {"hashed": sf.xxhash64(*_DAY, *key), "is_live": sf.col("reason").isNull()}
    return frame.withColumns(columns), Window.partitionBy(*_live_key(*key))


def _live_key(*key: str) -> tuple[str, ...]:
    return "hashed", *_DAY, *key, "is_live"


def _add_reason(frame: DataFrame, *rules: tuple[Column, Column | str]) -> DataFrame:
    return frame.withColumn("reason", sf.coalesce("reason", reason_of(*rules)))


def _with_visits(frame: DataFrame, recipe: VisitRecipe) -> DataFrame:
    """Adds the visit, and reasons against whole visitors.

    A session that the log tells is a visit; other visitors are on a new one after each pause of `inactivity_min`.
    """
    seconds = sf.unix_micros("event_time") / 1_000_000
    visitor = sf.coalesce("visitor_id", "session_id")
    # moved by less than the windows' keys, which serves them all: they differ in what reasons were found before
    moved = frame.withColumns({"visitor": visitor, "seconds": seconds}).repartition(*_DAY, "visitor")
    placed, day = _with_live(moved, "visitor")
    in_time = day.orderBy("seconds", "event_id")
    pause = sf.col("seconds") - sf.lag("seconds").over(in_time)
    # one click more than allowed, first to last; counting the minute before each row is a bot's clicks times its rows
    first_of_many = sf.expr(
        f"lag(clicked_at, {recipe.max_clicks_per_min}) IGNORE NULLS OVER "
        f"(PARTITION BY {', '.join(_live_key('visitor'))} ORDER BY seconds, event_id)"
    )
    clicked = placed.withColumn("clicked_at", sf.when(sf.col("kind") == "click", sf.col("seconds")))
    measured = clicked.withColumns(
        {
            "is_new": sf.coalesce((pause > recipe.inactivity_min * _MINUTE).cast("int"), sf.lit(1)),
            "is_fast": sf.coalesce(sf.col("clicked_at") - first_of_many <= _MINUTE, sf.lit(False)),
        }
    )
    numbered = measured.withColumns(
        {
            "visit": sf.sum("is_new").over(in_time.rowsBetween(Window.unboundedPreceding, 0)),
            "is_fast": sf.max("is_fast").over(day),
            "num_events": sf.count("*").over(day),
            "is_agent": sf.max(_is_bot_agent(recipe)).over(day),
        }
    )
    named = sf.concat_ws("/", "visitor", sf.date_format("event_day", "yyyyMMdd"), "visit")
    judged = _add_reason(
        numbered.withColumn("session_id", sf.coalesce("session_id", named)),
        (sf.col("is_agent"), "the visitor's user_agent is a bot's"),
        (
            sf.col("num_events") > recipe.max_events_per_day,
            f"the visitor has more than {recipe.max_events_per_day} events that day: a bot",
        ),
        (
            sf.col("is_fast"),
            f"the visitor has more than {recipe.max_clicks_per_min} clicks in a minute: a bot",
        ),
    )
    return judged.drop("is_new", "clicked_at", "visit", "is_fast", "num_events", "is_agent")


def _is_bot_agent(recipe: VisitRecipe) -> Column:
    if not recipe.bot_agents:
        return sf.lit(False)
    return sf.coalesce(sf.lower("user_agent").rlike(recipe.bot_agents.lower()), sf.lit(False))


def _refuse_same_again(frame: DataFrame, recipe: VisitRecipe) -> DataFrame:
    """The same visit, pair, kind and place within `repeat_sec` is the same event: the first one counts."""
    same = ("kind", "query_id", "position")
    placed, visit = _with_live(frame, *_VISIT)
    order = visit.orderBy(*same, "seconds", "event_id")
    is_same = sf.lit(True)
    for name in same:
        is_same = is_same & sf.col(name).eqNullSafe(sf.lag(name).over(order))
    is_soon = sf.col("seconds") - sf.lag("seconds").over(order) <= recipe.repeat_sec
    flagged = placed.withColumn("is_again", sf.coalesce(is_same & is_soon, sf.lit(False)))
    return _add_reason(flagged, (sf.col("is_again"), REPEATED)).drop("is_again")


def _trace(frame: DataFrame, recipe: VisitRecipe) -> DataFrame:
    """Carts and purchases that lack query or place take those of the visit's last look at the product.

    Refuses those that have none, and clicks on what the log does not show in the visit. The first minutes of a day are
    free of this rule, since their lists may have been shown before midnight.
    """
    placed, visit = _with_live(frame, *_VISIT)
    before = visit.orderBy("seconds", "event_id").rowsBetween(Window.unboundedPreceding, 0)
    is_later = sf.col("kind").isin(*AFTER_SEARCH)
    place = sf.when(~is_later, sf.struct("query_id", "position"))
    shown = sf.collect_set(sf.when(sf.col("kind") == "impression", sf.col("query_id"))).over(visit)
    told = placed.withColumns({"last_look": sf.last(place, ignorenulls=True).over(before), "shown": shown})
    traced = told.withColumns(
        {
            "query_id": sf.coalesce("query_id", "last_look.query_id"),
            "position": sf.coalesce("position", "last_look.position"),
        }
    )
    is_early = sf.col("seconds") % 86_400 < recipe.inactivity_min * _MINUTE
    is_unseen = (sf.col("kind") == "click") & ~sf.array_contains("shown", sf.col("query_id")) & ~is_early
    return _add_reason(
        traced,
        (sf.col("query_id").isNull(), "no query is told, and the visit did not look at the product before"),
        (sf.col("position").isNull(), "no position is told, and the visit did not look at the product before"),
        *(() if recipe.keep_unseen else ((is_unseen, "a click on a pair that the log does not show in the visit"),)),
    ).drop("last_look", "shown", "seconds", "visitor", "hashed", "is_live")


def count_places(events: DataFrame) -> DataFrame:
    """Rows of place_count."""
    counts = [sf.count_if(sf.col("kind") == kind).alias(name) for kind, name in COUNTS.items()]
    return events.groupBy(*_DAY, "query_id", "product_id", "position").agg(*counts)


def list_new_queries(judged: DataFrame) -> DataFrame:
    """Rows of logged_query."""
    asked = judged.where(sf.col("reason").isNull() & sf.col("is_new_query"))
    return asked.groupBy(*_DAY, "query_id").agg(
        sf.mode("query", deterministic=True).alias("text"),
        sf.first("normalised").alias("normalised"),
        sf.countDistinct("session_id").alias("num_visits"),
        sf.count("*").alias("num_events"),
    )


def tally_days(judged: DataFrame) -> DataFrame:
    """Rows of each file and day: dataset, delivery, file, event_day, kept, quarantined and repeated."""
    names = ("num_kept", "num_quarantined", "num_repeated")
    counted = (number.alias(name) for name, number in zip(names, outcomes(), strict=True))
    return judged.groupBy("dataset", "delivery", "file", "event_day").agg(*counted)


def refused_of_days(judged: DataFrame) -> DataFrame:
    """Rows of event_quarantine."""
    told = ("event_id", "session_id", "query_id", "query", "product_id", "kind", "position", "event_time")
    part = sf.concat(sf.lit("day="), sf.date_format("event_day", "yyyy-MM-dd"))
    row = sf.to_json(sf.struct(*told))
    return judged.where(is_refused()).select(
        "dataset", part.alias("part"), "delivery", "file", row.alias("row"), "reason"
    )
