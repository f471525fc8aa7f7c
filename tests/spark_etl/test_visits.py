"""What events of a day say of each other: visits, repetitions, bots, and how purchases find their searches."""

from datetime import UTC, datetime, timedelta

import pytest

from lake.schemas import LOGGED_EVENT
from spark_etl.checked import REPEATED
from spark_etl.recipes import VisitRecipe
from spark_etl.visits import count_places, judge_days, list_new_queries, refused_of_days, tally_days

SCHEMA = "dataset string, delivery string, file string, event_id string, session_id string, visitor_id string, "
SCHEMA += "query_id string, query string, normalised string, product_id string, kind string, position int, "
SCHEMA += "event_time timestamp, user_agent string, content bigint, reason string, row string, event_day date"
MORNING = datetime(2026, 11, 1, 8, tzinfo=UTC)


def event(event_id, kind, product="p1", seconds=0.0, *, position=1, query="q1", **rest):
    """A row of logged_event."""
    time = MORNING + timedelta(seconds=seconds)
    row = dict.fromkeys(LOGGED_EVENT.column_names) | {"dataset": "shop", "delivery": "a", "file": "f"}
    row |= {"event_id": event_id, "visitor_id": "v", "query_id": query, "product_id": product, "kind": kind}
    row |= {"position": position, "event_time": time, "event_day": time.date(), "content": hash(event_id) % 1000}
    return row | rest


def judge(spark, rows, **recipe):
    frame = spark.createDataFrame([tuple(row[name] for name in LOGGED_EVENT.column_names) for row in rows], SCHEMA)
    queries = spark.createDataFrame(
        [("shop", "q1", "red shoe"), ("shop", "q2", "tv"), ("shop", "q0", "tv")],
        "dataset string, query_id string, normalised string",
    )
    products = spark.createDataFrame([("shop", f"p{n}") for n in range(1, 9)], "dataset string, product_id string")
    return judge_days(frame, queries, products, VisitRecipe(**recipe)).persist()


def reasons(judged):
    return {row["event_id"]: row["reason"] for row in judged.collect()}


def test_visits_end_after_a_pause_and_sessions_of_the_log_stay(spark):
    minutes = {"a": 0, "b": 29, "c": 58, "d": 89}
    rows = [event(name, "impression", seconds=60 * at, position=n) for n, (name, at) in enumerate(minutes.items(), 1)]
    rows += [event("s", "impression", seconds=5, session_id="given"), event("w", "impression", visitor_id="w")]
    found = {row["event_id"]: row["session_id"] for row in judge(spark, rows).collect()}
    assert [found[name] for name in "abcd"] == ["v/20261101/1"] * 3 + ["v/20261101/2"]
    assert (found["s"], found["w"]) == ("given", "w/20261101/1")


def test_a_row_that_came_twice_counts_once_and_one_that_differs_is_refused(spark):
    first = event("e", "impression", content=5)
    rows = [first, first | {"delivery": "b"}, first | {"delivery": "c", "content": 6, "position": 3}]
    rows.append(first | {"event_day": (MORNING - timedelta(days=1)).date(), "content": 9})
    judged = judge(spark, rows).collect()
    by_delivery = {(row["delivery"], str(row["event_day"])): row["reason"] for row in judged}
    assert by_delivery == {
        ("a", "2026-11-01"): None,
        ("a", "2026-10-31"): None,
        ("b", "2026-11-01"): REPEATED,
        ("c", "2026-11-01"): "another row has the same event_id and other content",
    }


def test_the_same_again_within_a_second_is_one_event(spark):
    rows = [event("shown", "impression", seconds=0)]
    rows += [event(f"c{n}", "click", seconds=at) for n, at in enumerate((5.0, 5.8, 6.5, 9.0))]
    rows += [event("other", "click", seconds=5.2, position=2), event("cart", "cart", seconds=5.3)]
    found = reasons(judge(spark, rows))
    assert {name for name, reason in found.items() if reason == REPEATED} == {"c1", "c2"}
    assert [found[name] for name in ("shown", "c0", "c3", "other", "cart")] == [None] * 5


def test_bots_go_by_the_day_the_minute_and_the_agent(spark):
    rows = [event(f"busy{n}", "impression", seconds=90 * n, visitor_id="busy", position=n + 1) for n in range(6)]
    for visitor, pause in (("fast", 10), ("slow", 40)):
        rows += [event(f"{visitor}", "impression", visitor_id=visitor)]
        rows += [event(f"{visitor}{n}", "click", seconds=pause * n + 2, visitor_id=visitor) for n in range(4)]
    rows += [event("agent", "impression", visitor_id="agent", user_agent="Mozilla/5.0 (compatible; GoogleBot/2.1)")]
    rows += [event("human", "impression", visitor_id="human", user_agent="Mozilla/5.0")]
    found = reasons(judge(spark, rows, max_events_per_day=5, max_clicks_per_min=3))
    assert {found[f"busy{n}"] for n in range(6)} == {"the visitor has more than 5 events that day: a bot"}
    assert {found[name] for name in ("fast", "fast0", "fast3")} == {
        "the visitor has more than 3 clicks in a minute: a bot"
    }
    assert found["agent"] == "the visitor's user_agent is a bot's"
    assert [found[name] for name in ("slow", "slow0", "slow3", "human")] == [None] * 4


def test_carts_and_purchases_take_the_search_of_the_last_look(spark):
    lacks = {"query": None, "position": None}
    rows = [
        event("early", "purchase", seconds=-9, **lacks),
        event("shown", "impression", seconds=0, position=4),
        event("click", "click", seconds=1, position=4),
        event("cart", "cart", seconds=2, **lacks),
        event("again", "impression", seconds=3, position=2, query="q2"),
        event("bought", "purchase", seconds=4, **lacks),
        event("told", "purchase", seconds=9, query="q1", position=7),
        event("elsewhere", "cart", product="p2", seconds=5, **lacks),
        event("half", "cart", product="p3", seconds=5, position=None),
    ]
    judged = judge(spark, rows)
    found = {row["event_id"]: (row["query_id"], row["position"]) for row in judged.collect() if not row["reason"]}
    assert found == {
        "shown": ("q1", 4),
        "click": ("q1", 4),
        "cart": ("q1", 4),
        "again": ("q2", 2),
        "bought": ("q2", 2),
        "told": ("q1", 7),
    }
    refused = {name: reason for name, reason in reasons(judged).items() if reason}
    assert refused == {
        "early": "no query is told, and the visit did not look at the product before",
        "elsewhere": "no query is told, and the visit did not look at the product before",
        "half": "no position is told, and the visit did not look at the product before",
    }


@pytest.mark.parametrize("keep", [True, False])
def test_clicks_on_what_was_not_shown_are_refused_but_after_midnight_or_where_kept(spark, keep):
    rows = [
        event("shown", "impression"),
        event("good", "click", seconds=1),
        event("other_query", "click", seconds=2, query="q2"),
        event("other_product", "click", product="p2", seconds=3),
        event("after_midnight", "click", product="p3", seconds=-8 * 3600 + 600, visitor_id="w"),
    ]
    found = reasons(judge(spark, rows, keep_unseen=keep))
    unseen = None if keep else "a click on a pair that the log does not show in the visit"
    assert found == dict.fromkeys(("shown", "good", "after_midnight")) | dict.fromkeys(
        ("other_query", "other_product"), unseen
    )


def test_queries_are_known_by_id_or_text_and_others_are_listed_or_refused(spark):
    text = {"query": None, "kind": "impression"}
    rows = [
        event("id", "impression", position=1),
        event("text", **text, position=2, normalised="tv"),
        event("both", "impression", query="unheard", normalised="tv", position=3),
        event("new", **text, position=4, normalised="blue hat"),
        event("lost", "impression", query="unheard", position=5),
        event("product", "impression", product="p99", position=6),
    ]
    for row in rows:
        row["query"] = (row["normalised"] or "").title() or None
    judged = judge(spark, rows)
    found = {row["event_id"]: row for row in judged.collect()}
    # two queries have the text tv: the first id is taken
    assert [found[name]["query_id"] for name in ("id", "text", "both")] == ["q1", "q0", "q0"]
    assert found["new"]["query_id"].startswith("log:")
    assert (found["lost"]["reason"], found["product"]["reason"]) == (
        "query_id is not in the data set",
        "product_id is not in the data set",
    )
    (listed,) = list_new_queries(judged).collect()
    assert (listed["text"], listed["normalised"], listed["num_visits"], listed["num_events"]) == (
        "Blue Hat",
        "blue hat",
        1,
        1,
    )
    assert reasons(judge(spark, rows, new_queries=False))["new"] == "query is not in the data set"


def test_counts_tallies_and_quarantine_hold_every_row(spark):
    rows = [event(f"i{n}", "impression", position=n, seconds=n) for n in (1, 2, 3)]
    rows += [event("c", "click", seconds=9), event("c", "click", seconds=9, delivery="b")]
    rows += [event("x", "click", product="p99")]
    judged = judge(spark, rows)
    counts = {
        row["position"]: (row["impressions"], row["clicks"])
        for row in count_places(judged.where("reason IS NULL")).collect()
    }
    assert counts == {1: (1, 1), 2: (1, 0), 3: (1, 0)}
    tally = {
        row["delivery"]: (row["num_kept"], row["num_quarantined"], row["num_repeated"])
        for row in tally_days(judged).collect()
    }
    assert tally == {"a": (4, 1, 0), "b": (0, 0, 1)}
    (refused,) = refused_of_days(judged).collect()
    assert (refused["part"], refused["reason"]) == ("day=2026-11-01", "product_id is not in the data set")
    assert '"product_id":"p99"' in refused["row"]
