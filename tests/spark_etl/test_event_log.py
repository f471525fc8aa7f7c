"""Rows of a log into typed events: what each may lack, how it is refused, and that none is lost."""

import json
import os
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from conf.load import ConfigError, load
from spark_etl.event_log import PASSED_OVER, read_log, refused_of_deliveries, tally_deliveries
from spark_etl.recipes import EventLogRecipe

DAY = "2026-11-01"
GOOD = {"visitor_id": "v", "query": "red shoe", "product_id": "p", "kind": "click", "position": 2}
GOOD |= {"event_time": f"{DAY}T12:00:00Z"}


def read(spark, tmp_path, lines, recipe=None, name=f"{DAY}/part.jsonl"):
    """The rows of one file of a log."""
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    path.write_text(text, encoding="utf-8")
    delivery = name.rpartition("/")[0]
    found = read_log(spark, "shop", {path: (delivery, name)}, recipe or EventLogRecipe(), tmp_path).collect()
    return sorted((row.asDict() for row in found), key=lambda row: row["event_id"])


REFUSED = {
    "session_id and visitor_id are missing": {"visitor_id": " "},
    "kind is none of impression, click, cart, purchase": {"kind": "glance"},
    "product_id is missing": {"product_id": None},
    "query_id and query are missing": {"query": ""},
    "query is longer than 1000 characters": {"query": "x" * 1001},
    "locale is not a language tag": {"locale": "martian!"},
    "position is not a rank from 1": {"position": -3},
    "event_time is not a time in ISO 8601 or since 1970": {"event_time": "yesterday"},
    "event_time is ahead of when the row came: a clock is wrong": {"event_time": "2026-11-02T00:06:00Z"},
    "event_time is more than 30 days before the row came": {"event_time": "2026-10-01T00:00:00Z"},
}


def test_every_rule_refuses_what_it_names_and_keeps_the_row_as_read(spark, tmp_path):
    rows = [GOOD | change | {"event_id": f"{n:02}"} for n, change in enumerate(REFUSED.values())]
    good = GOOD | {"event_id": "z"}
    found = read(spark, tmp_path, [*rows, good, '{"event_id": "broken', "7"])
    by_id = {row["event_id"]: row for row in found}
    assert [by_id[f"{n:02}"]["reason"] for n in range(len(rows))] == list(REFUSED)
    assert all((row["event_day"] is None) == (row["reason"] is not None) for row in found)
    assert json.loads(by_id["06"]["row"])["position"] == "-3"
    broken = [row["row"] for row in found if row["reason"] == "the line is not a row of its file's format"]
    assert sorted(broken) == ["7", '{"event_id": "broken']
    assert (by_id["z"]["normalised"], by_id["z"]["position"], by_id["z"]["row"]) == ("red shoe", 2, None)
    assert str(by_id["z"]["event_day"]) == DAY


def test_times_are_read_in_three_forms_and_freed_of_the_clock_of_the_shopper(spark, tmp_path):
    noon = datetime(2026, 11, 1, 12, tzinfo=UTC)
    forms = {
        "a": {"event_time": "2026-11-01T13:00:00+01:00"},
        "b": {"event_time": int(noon.timestamp())},
        "c": {"event_time": int(noon.timestamp() * 1000)},
        # the shopper's clock is a day ahead: ten seconds passed on it before it sent
        "d": {"event_time": "2026-11-02T12:00:00Z", "sent_at": "2026-11-02T12:00:10Z"}
        | {"received_at": "2026-11-01T12:00:10Z"},
    }
    found = read(spark, tmp_path, [GOOD | change | {"event_id": name} for name, change in forms.items()])
    assert [row["reason"] for row in found] == [None] * 4
    assert {row["event_time"].astimezone(UTC) for row in found} == {noon}


def test_a_log_of_what_was_shown_names_its_columns_and_gives_impressions_and_clicks(spark, tmp_path):
    recipe = EventLogRecipe(
        columns={"session_id": "sess", "position": "rank", "product_id": "doc"}, first_position=0, day_of_delivery=True
    )
    rows = [
        {"sess": "s1", "query": "tv", "rank": 0, "doc": 77, "clicked": True},
        {"sess": "s1", "query": "tv", "rank": 1, "doc": 78, "clicked": False},
        {"sess": "s1", "query": "tv", "rank": 2, "doc": 79, "clicked": "perhaps"},
    ]
    found = read(spark, tmp_path, rows, recipe)
    kept = sorted((row["product_id"], row["position"], row["kind"]) for row in found if row["reason"] is None)
    assert kept == [("77", 1, "click"), ("77", 1, "impression"), ("78", 2, "impression")]
    assert [row["reason"] for row in found if row["reason"]] == ["kind is none of impression, click, cart, purchase"]
    assert {str(row["event_day"]) for row in found if row["reason"] is None} == {DAY}


def test_user_behavior_insights_are_read_in_bulk_form_and_searches_give_their_text(spark, tmp_path):
    search = {"query_id": "u1", "client_id": "c", "user_query": "Red Shoe", "timestamp": f"{DAY}T10:00:00Z"}
    event = {"query_id": "u1", "client_id": "c", "session_id": "s", "timestamp": f"{DAY}T10:00:01.5Z"}

    def about(product, ordinal):
        return {"event_attributes": {"object": {"object_id": product}, "position": {"ordinal": ordinal}}}

    lines = [
        {"index": {"_index": "ubi_queries", "_id": "1"}},
        search,
        {"index": {"_index": "ubi_events"}},
        event | {"action_name": "impression"} | about("p1", 0),
        event | {"action_name": "add_to_cart"} | about("p1", 0),
        event | {"action_name": "type_filter"} | about("p1", 0),
        event | {"action_name": "click"} | about("p1", "first"),
        '{"index"',
    ]
    found = read(spark, tmp_path, lines, EventLogRecipe(source="ubi", first_position=0))
    kept = [row for row in found if row["reason"] is None]
    assert sorted((row["kind"], row["product_id"], row["position"]) for row in kept) == [
        ("cart", "p1", 1),
        ("impression", "p1", 1),
    ]
    assert {(row["query"], row["visitor_id"], row["session_id"]) for row in kept} == {("Red Shoe", "c", "s")}
    reasons = sorted(row["reason"] for row in found if row["reason"])
    assert reasons == [PASSED_OVER] * 4 + [
        "position is not a rank from 0",
        "the line is not a row of its file's format",
    ]


@pytest.mark.skipif(not os.environ.get("ASSAY_DATA"), reason="ASSAY_DATA does not name the folder with data")
def test_the_sample_of_user_behavior_insights_adds_up(spark, tmp_path):
    path = Path(os.environ["ASSAY_DATA"], "ubi", "events.ndjson.gz")
    logged = read_log(spark, "ubi", {path: ("", "e")}, EventLogRecipe(source="ubi", first_position=0), tmp_path)
    kinds = {row["kind"]: row["count"] for row in logged.where("reason IS NULL").groupBy("kind").count().collect()}
    (tally,) = tally_deliveries(logged).collect()
    assert tally["num_rows"] == 7818
    assert sum(kinds.values()) + tally["num_quarantined"] + tally["num_passed_over"] == 7818
    assert kinds["impression"] + kinds["click"] > 2000
    assert set(kinds) == {"impression", "click", "cart", "purchase"}


ODD = st.one_of(
    st.none(),
    st.integers(-5, 10**20),
    st.floats(),
    st.booleans(),
    st.text(max_size=8),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
    st.sampled_from(["click", "impression", "cart", DAY, f"{DAY}T01:02:03Z", "1764547200", "p1", "true", "de-AT"]),
)
ROW = st.dictionaries(st.sampled_from([*GOOD, "event_id", "locale", "sent_at", "received_at", "clicked", "else"]), ODD)
LINE = st.one_of(
    ROW.map(json.dumps).map(str.encode),
    st.just(json.dumps(GOOD).encode()),
    st.text(st.characters(exclude_characters="\r\n", exclude_categories=("Cs",)), min_size=1).map(str.encode),
    st.binary(min_size=1, max_size=20).map(lambda raw: b"\xff" + raw.replace(b"\n", b"").replace(b"\r", b"")),
    st.just('{"query": "schön"}'.encode("latin-1")),
)


@settings(max_examples=4, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
@given(files=st.lists(st.lists(LINE, max_size=30), min_size=6, max_size=8))
def test_whatever_the_bytes_every_line_is_an_event_or_refused_with_a_reason(spark, tmp_path_factory, files):
    """A line of spaces and tabs is no row; a row that says it was clicked is two."""
    folder = tmp_path_factory.mktemp("log")
    paths = {}
    for number, lines in enumerate(files):
        path = folder / f"{number} a+b%.jsonl"
        path.write_bytes(b"\n".join(lines))
        paths[path] = ("", path.name)
    logged = read_log(spark, "shop", paths, EventLogRecipe(), folder).persist()
    counted = {row["file"]: row for row in tally_deliveries(logged).collect()}
    events = {row["file"]: row["count"] for row in logged.where("reason IS NULL").groupBy("file").count().collect()}
    refused = {row["file"]: row["count"] for row in refused_of_deliveries(logged).groupBy("file").count().collect()}
    twice = logged.where("event_id IS NOT NULL AND kind = 'click' AND event_id LIKE '%/click'").count()
    logged.unpersist()
    for path, lines in zip(paths, files, strict=True):
        # a zero byte or the mark of UTF-8 before blanks may be read as part of how they are encoded
        rows = sum(1 for line in lines if line.replace(b"\xef\xbb\xbf", b"").strip(b" \t\x00"))
        at_most = sum(1 for line in lines if line.strip(b" \t"))
        found = counted[path.name]["num_rows"] if path.name in counted else 0
        assert rows <= found <= at_most + twice + sum(b"clicked" in line for line in lines), (path.name, lines)
        assert found == events.get(path.name, 0) + refused.get(path.name, 0)
        good = json.dumps(GOOD).encode()
        assert events.get(path.name, 0) >= lines.count(good)


def test_an_unknown_column_of_the_log_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"'rank' is no column of an event"):
        load(EventLogRecipe, {"columns": {"rank": "position"}}, source="test")
