"""Nights of a shop's log on real Spark and Delta: what is read, judged again, repaired and refused."""

import gzip
import json
import random
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pytest

from conf.load import ConfigError, load_job
from jobs import build_engagement, ingest_events
from jobs.ingest_events import changed_deliveries, check_sums, day_batches
from lake import tables
from lake.schemas import (
    CATALOG_PRODUCT,
    CLICK_MODEL,
    ENGAGEMENT,
    EVENT_QUARANTINE,
    EVENT_TALLY,
    LOGGED_EVENT,
    LOGGED_QUERY,
    PLACE_COUNT,
    QUERY,
    SEARCH_EVENT,
)
from lake.storage import Lake

pytestmark = pytest.mark.usefixtures("spark")
FIRST = datetime(2026, 11, 1, tzinfo=UTC)
NUM_NIGHTS = 4
RESULTS = (SEARCH_EVENT, PLACE_COUNT, LOGGED_QUERY)


def run(lake, *overrides):
    words = [f"lake={lake.root}", "inputs.logs=[raw/shop]", "recipe.max_rejected_fraction=1.0", *overrides]
    return ingest_events.run(load_job(ingest_events.Config, "ingest_events", "dev", words))


def shop(folder) -> Lake:
    """A lake that knows 12 products and the queries "red shoe" and "tv"."""
    lake = Lake(str(folder))
    queries = [("q1", "Red Shoe", "red shoe"), ("q2", "TV", "tv")]
    rows = [
        {"dataset": "shop", "query_id": i, "text": t, "normalised": n, "query_hash": i, "split": "train"}
        for i, t, n in queries
    ]
    products = [
        {"dataset": "shop", "product_id": f"p{n}", "title": f"title {n}", "product_hash": str(n)} for n in range(12)
    ]
    # Spark owns both tables: this is what its writer does, without its ten seconds
    for spec, found in ((QUERY, rows), (CATALOG_PRODUCT, products)):
        table = tables.create(lake, spec)
        from deltalake import write_deltalake

        write_deltalake(table, pa.Table.from_pylist(found, schema=spec.schema), mode="append")
    return lake


def at(day, seconds):
    return (FIRST + timedelta(days=day, seconds=seconds)).isoformat()


def visit(day, number, queries=("Red  shoe", "tv", "a new one")):
    """A visit of a day: five products shown for a query, some clicked, and one click turned into cart and purchase."""
    chance = random.Random(f"{day}-{number}")
    start, query = 7200 + 60 * number, chance.choice(queries)
    visitor = {"visitor_id": f"v{number}"}
    rows = []
    for place, product in enumerate(chance.sample(range(12), 5), start=1):
        named = visitor | {"query": query, "product_id": f"p{product}", "position": place}
        rows.append(named | {"kind": "impression", "event_time": at(day, start)})
        if chance.random() < 0.6 / place:
            rows.append(named | {"kind": "click", "event_time": at(day, start + 10 * place)})
            if chance.random() < 0.5:
                bought = visitor | {"product_id": f"p{product}", "event_time": at(day, start + 10 * place + 5)}
                rows += [bought | {"kind": kind} for kind in ("cart", "purchase")]
    return rows


def night(day, num_visits=40):
    """A delivery: the day's visits, two of the day before that come late, and what no shop's log is free of."""
    rows = [row for number in range(num_visits) for row in visit(day, number)]
    if day:
        rows += visit(day - 1, 900) + visit(day - 1, 901)
    rows += rows[:3]  # sent twice
    rows.append(rows[0] | {"position": -4})
    rows.append(rows[0] | {"product_id": "p999"})
    return rows


def write(lake, delivery, rows, name="part.jsonl.gz"):
    folder = Path(lake.path("raw", "shop", "events", delivery))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(gzip.compress("\n".join(json.dumps(row) for row in rows).encode()))


def day_of(day):
    return (FIRST + timedelta(days=day)).date().isoformat()


def content(lake, spec):
    """All rows of a table, in one order."""
    return sorted(map(repr, tables.rows(lake, spec).to_pylist()))


def tally_of(lake):
    """File and day -> its counts."""
    rows = tables.rows(lake, EVENT_TALLY).to_pylist()
    return {(row["file"], row["event_day"]): tuple(row[name] for name in ingest_events.COUNTS) for row in rows}


@pytest.fixture(scope="module")
def nights(tmp_path_factory, spark):
    """Four nights, each ingested when it came, and the records of the runs."""
    lake = shop(tmp_path_factory.mktemp("nights"))
    records = []
    for day in range(NUM_NIGHTS):
        write(lake, day_of(day), night(day))
        records.append(run(lake))
    return lake, records


@pytest.fixture(scope="module")
def batch(tmp_path_factory, spark):
    """The same four nights in one run."""
    lake = shop(tmp_path_factory.mktemp("batch"))
    for day in range(NUM_NIGHTS):
        write(lake, day_of(day), night(day))
    run(lake, "placement.rows_per_batch=500")
    return lake


def test_nights_one_by_one_are_one_batch(nights, batch):
    lake, records = nights
    assert [record.counts["deliveries"] for record in records] == [1] * NUM_NIGHTS
    # each night brings rows of its own day and of the day before
    assert [record.counts["days"] for record in records] == [1, 2, 2, 2]
    check_equal(lake, batch)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_thirty_nights_one_by_one_are_one_batch(tmp_path):
    """About 5 minutes."""
    lake, batch = shop(tmp_path / "nights"), shop(tmp_path / "batch")
    for day in range(30):
        for one in (lake, batch):
            write(one, day_of(day), night(day))
        run(lake)
    run(batch, "placement.rows_per_batch=2000")
    check_equal(lake, batch)


def check_equal(lake, batch):
    """Events, counts, quarantine and tally are equal, and so is what is fitted to them."""
    for spec in (*RESULTS, EVENT_QUARANTINE):
        assert content(lake, spec) == content(batch, spec), spec.name
    assert tally_of(lake) == tally_of(batch)
    recipe = load_job(build_engagement.Config, "build_engagement", "dev", ["recipe.click_model.min_clicks=20"]).recipe
    for one in (lake, batch):
        build_engagement.run(build_engagement.Config(lake=one.root, recipe=recipe))
    pairs = [
        {(row["query_id"], row["product_id"]): row for row in tables.rows(one, ENGAGEMENT).to_pylist()}
        for one in (lake, batch)
    ]
    assert pairs[0].keys() == pairs[1].keys()
    for key, row in pairs[0].items():
        for name, value in row.items():
            other = pairs[1][key][name]
            assert other == (pytest.approx(value, rel=1e-9) if isinstance(value, float) else value), (key, name)
    looks = [tables.rows(one, CLICK_MODEL).sort_by("first_position") for one in (lake, batch)]
    assert looks[0]["converged"].to_pylist()[0]
    assert looks[0]["examination"].to_pylist() == pytest.approx(looks[1]["examination"].to_pylist(), abs=1e-4)


def test_the_rows_of_every_file_add_up(nights):
    lake, _ = nights
    read = {}
    for (file, _), (rows, kept, quarantined, repeated, passed_over) in tally_of(lake).items():
        assert rows == kept + quarantined + repeated + passed_over
        read[file] = read.get(file, 0) + rows
    assert read == {f"{day_of(day)}/part.jsonl.gz": len(night(day)) for day in range(NUM_NIGHTS)}
    reasons = tables.rows(lake, EVENT_QUARANTINE)["reason"].to_pylist()
    assert reasons.count("position is not a rank from 1") == NUM_NIGHTS
    assert reasons.count("product_id is not in the data set") == NUM_NIGHTS


def test_queries_are_found_by_their_normal_form_and_new_ones_listed(nights):
    lake, _ = nights
    assert {row["text"] for row in tables.rows(lake, LOGGED_QUERY).to_pylist()} == {"a new one"}
    new = tables.rows(lake, LOGGED_QUERY)["query_id"].to_pylist()[0]
    assert set(tables.rows(lake, SEARCH_EVENT)["query_id"].to_pylist()) == {"q1", "q2", new}


def test_carts_and_purchases_take_query_and_place_of_the_click_before(nights):
    lake, _ = nights
    events = tables.rows(lake, SEARCH_EVENT).to_pylist()
    clicked = {(e["session_id"], e["product_id"], e["query_id"], e["position"]) for e in events if e["kind"] == "click"}
    bought = [e for e in events if e["kind"] in ("cart", "purchase")]
    assert len(bought) > 20
    assert all((e["session_id"], e["product_id"], e["query_id"], e["position"]) in clicked for e in bought)


def test_a_night_run_twice_changes_nothing(nights):
    lake, _ = nights
    before = {spec.name: tables.version(lake, spec) for spec in ingest_events.TABLES_WRITTEN}
    record = run(lake)
    assert (record.rows, record.counts["deliveries"], record.counts["days"]) == (0, 0, 0)
    assert {spec.name: tables.version(lake, spec) for spec in ingest_events.TABLES_WRITTEN} == before


def test_a_late_delivery_repairs_its_days_and_touches_no_other(tmp_path, nights):
    """Night 1 comes after nights 2 and 3: days 0 and 1 are judged again, days 2 and 3 keep their files."""
    lake = shop(tmp_path)
    for day in (0, 2, 3):
        write(lake, day_of(day), night(day))
    run(lake)
    files = files_by_day(lake)
    write(lake, day_of(1), night(1))
    record = run(lake)
    assert (record.counts["deliveries"], record.counts["days"]) == (1, 2)
    later = files_by_day(lake)
    assert {day for day in later if later[day] != files.get(day)} == {day_of(0), day_of(1)}
    for spec in (*RESULTS, EVENT_QUARANTINE):
        assert content(lake, spec) == content(nights[0], spec), spec.name


def files_by_day(lake):
    found = {}
    for path in tables.open_table(lake, SEARCH_EVENT).file_uris():
        found.setdefault(path.split("event_day=")[1].split("/")[0], set()).add(Path(path).name)
    return found


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_corrected_delivery_takes_its_old_rows_back(tmp_path, nights, batch):
    lake = shop(tmp_path)
    wrong = [row | {"event_time": at(20, 60)} for row in visit(1, 7)]
    for day in range(NUM_NIGHTS):
        write(lake, day_of(day), night(day) if day != 1 else [*night(1), *wrong])
    run(lake, "recipe.log.max_skew_sec=2000000")
    assert day_of(20) in files_by_day(lake)
    write(lake, day_of(1), night(1))
    run(lake, "recipe.log.max_skew_sec=2000000")
    for spec in RESULTS:
        assert content(lake, spec) == content(batch, spec), spec.name
    assert not any("-21'" in key for key in map(str, tally_of(lake)))


def test_a_run_that_dies_half_way_is_made_good_by_the_next(tmp_path, monkeypatch, batch):
    """The run ends when the days' events are written and their counts are not, nor the tally."""
    lake = shop(tmp_path)
    for day in range(NUM_NIGHTS):
        write(lake, day_of(day), night(day))
    whole = ingest_events.Night._replace

    def dying(self, spec, frame, where):
        if spec is PLACE_COUNT:
            raise KeyboardInterrupt
        whole(self, spec, frame, where)

    monkeypatch.setattr(ingest_events.Night, "_replace", dying)
    with pytest.raises(KeyboardInterrupt):
        run(lake)
    monkeypatch.undo()
    run(lake)
    for spec in (*RESULTS, EVENT_QUARANTINE):
        assert content(lake, spec) == content(batch, spec), spec.name
    assert tally_of(lake) == tally_of(batch)


def test_too_many_bad_rows_stop_the_run_before_any_day_is_replaced(tmp_path):
    lake = shop(tmp_path)
    write(lake, "", night(0))  # files that are in no folder are a delivery, too
    run(lake)
    before = content(lake, SEARCH_EVENT)
    assert before
    write(lake, day_of(1), [row | {"kind": "glance"} for row in night(1)])
    with pytest.raises(ValueError, match=r"search_event: \d+ rows of shop \(100.0%\) are refused.*event_quarantine"):
        run(lake, "recipe.max_rejected_fraction=0.5")
    write(lake, day_of(1), [row | {"product_id": "p77"} for row in night(1)])
    with pytest.raises(ValueError, match=r"search_event: \d+ rows of shop \(\d+.\d%\) are refused"):
        run(lake, "recipe.max_rejected_fraction=0.5")
    assert content(lake, SEARCH_EVENT) == before


def test_a_log_of_an_unknown_data_set_is_refused(tmp_path):
    lake = shop(tmp_path)
    Path(lake.path("raw", "stranger", "events")).mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"query of lake=.* has no row of stranger; run ingest"):
        run(lake, "inputs.logs=[raw/stranger]")


def test_only_partitions_of_the_touched_days_are_read(nights, spark):
    """The plan of a day's rows has its day as a partition filter, and names no other file."""
    lake, _ = nights
    from lake.spark import rows

    day = f"event_day = DATE '{day_of(1)}'"
    files = rows(spark, lake, LOGGED_EVENT).where(day).select("_metadata.file_path").distinct().collect()
    assert files
    assert all(f"event_day={day_of(1)}" in row[0] for row in files)


def test_days_go_together_up_to_the_bound():
    sizes = {"2026-11-03": 5, "2026-11-01": 4, "2026-11-02": 6, "2026-11-04": 99, "2026-11-05": 0}
    assert day_batches(sizes, 10) == [["2026-11-01", "2026-11-02"], ["2026-11-03"], ["2026-11-04"], ["2026-11-05"]]


def test_a_delivery_is_new_or_changed_by_its_files():
    held = [{"delivery": "a", "file": "a/1", "event_day": "", "fingerprint": "x"}]
    held += [{"delivery": "gone", "file": "gone/1", "event_day": "", "fingerprint": "x"}]
    assert changed_deliveries({("a", "a/1"): "x"}, held) == set()
    assert changed_deliveries({("a", "a/1"): "y"}, held) == {"a"}
    assert changed_deliveries({("a", "a/1"): "x", ("a", "a/2"): "z", ("b", "b/1"): "x"}, held) == {"a", "b"}


def test_a_lost_row_is_an_error():
    row = {"delivery": "a", "file": "1", "num_rows": 3, "num_quarantined": 1, "num_passed_over": 0}
    with pytest.raises(RuntimeError, match=r"a/1: 3 rows were read and 1 judged"):
        check_sums([row], [row | {"num_rows": 1}])
