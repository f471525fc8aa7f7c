"""The gates before the tables of the Spark jobs, on real Spark and Delta, through the jobs' command lines."""

import gzip
import json
import re
from datetime import date
from pathlib import Path

import pyarrow as pa
import pytest
from deltalake import write_deltalake

from conf.load import ConfigError, fingerprint, load_job
from jobs import build_audit, build_consensus, build_engagement, cli, ingest, ingest_events, job, quality
from lake import runs, tables
from lake.schemas import (
    ANNOTATION_CONSENSUS,
    AUDIT_CONFLICT,
    CATALOG_PRODUCT,
    CLICK_MODEL,
    CLICK_MODEL_ROUND,
    ENGAGEMENT,
    GOLD_QUESTION,
    HUMAN_ANNOTATION,
    PLACE_COUNT,
    QUERY,
    SEARCH_EVENT,
    TABLE_QUALITY,
)

pytestmark = pytest.mark.usefixtures("spark")
WRITTEN = {
    "ingest": {CATALOG_PRODUCT, QUERY, HUMAN_ANNOTATION, GOLD_QUESTION},
    "build_consensus": {ANNOTATION_CONSENSUS},
    "build_engagement": {CLICK_MODEL, CLICK_MODEL_ROUND, ENGAGEMENT},
    "build_audit": {AUDIT_CONFLICT},
}
MODULES = {
    "ingest": ingest,
    "ingest_events": ingest_events,
    "build_consensus": build_consensus,
    "build_engagement": build_engagement,
    "build_audit": build_audit,
}
GRADES = (0, 1, 2)


def lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress("\n".join(json.dumps(row) for row in rows).encode()))


def deliver(lake, *, brand="acme", grade=lambda place: GRADES[place % 3], num_marks=900):
    """A raw folder of 200 products, 150 queries, marks and a day's log."""
    raw = Path(lake.path("raw", "shop"))
    products = [{"product_id": f"p{n}", "title": f"title {n}", "brand": brand, "price": 1 + n % 50} for n in range(200)]
    lines(raw / "catalog" / "part.jsonl.gz", products)
    lines(raw / "queries" / "part.jsonl.gz", [{"query_id": f"q{n}", "query": f"query {n}"} for n in range(150)])
    pairs = [(f"q{n % 150}", f"p{n % 150 + n // 150}") for n in range(1500)]
    marks = [
        {"query_id": query, "product_id": product, "mark": "m", "scale": "s", "grade": grade(place)}
        for place, (query, product) in enumerate(pairs[:num_marks])
    ]
    lines(raw / "annotations" / "part.jsonl.gz", marks)
    deliver_day(raw, 1)


def deliver_day(raw, day, clicks=(1, 4, 7)):
    """1,500 impressions, each in a visit of its own; `clicks` tens of each hundred are clicked."""
    events = [
        {"visitor_id": f"v{place}", "query_id": f"q{place % 150}", "product_id": f"p{place % 150 + place // 150}"}
        | {"kind": kind, "position": place % 10 + 1, "event_time": f"2026-01-0{day}T03:04:05Z"}
        for place in range(1500)
        for kind in ("impression", *("click" for one in clicks if place // 10 % 10 == one))
    ]
    lines(raw / "events" / f"2026-01-0{day}" / "part.jsonl.gz", events)


def main(lake, name, *words):
    """Exit code of a job."""
    folder = {"ingest": ["inputs.raw=[raw/shop]"], "ingest_events": ["inputs.logs=[raw/shop]"]}
    raw = folder.get(name, [])
    return MODULES[name].main(["dev", f"lake={lake.root}", *raw, *words])


def versions(lake, name):
    return {spec.name: tables.version(lake, spec) for spec in WRITTEN[name]}


def measured(lake, **where):
    rows = tables.rows(lake, TABLE_QUALITY).to_pylist()
    return [row for row in rows if all(row[name] == value for name, value in where.items())]


def test_a_broken_delivery_is_stopped_before_any_table_and_the_next_good_one_compares_with_the_last_good(lake, capsys):
    deliver(lake)
    assert main(lake, "ingest") == job.DONE
    good = runs.newest(lake, "ingest").run_id
    assert {row["standard"] for row in measured(lake)} == {None}
    before = versions(lake, "ingest")

    deliver(lake, brand=None, num_marks=450)
    assert main(lake, "ingest") == job.GATE_SAID_NO
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "ingest: catalog_product of shop: null_rate/brand 1, expected at most 0.18" in said
    # 900 x .8 - 3.719 x (720 x 1.8)^.5 = 586.1, by hand
    assert "human_annotation of shop: rows 450, expected at least 586 (max_row_drop; 900 before)" in said
    stopped = re.search(r"recipe\.quality\.accept=(\w+)$", said)[1]
    assert versions(lake, "ingest") == before
    assert runs.newest(lake, "ingest").run_id == good
    told = measured(lake, run_id=stopped)
    broken = {(row["table_name"], row["metric"]) for row in told if not row["met"]}
    assert broken == {("catalog_product", "null_rate/brand"), ("human_annotation", "rows")}
    assert {row["published"] for row in told} == {False}

    deliver(lake, grade=lambda place: min(place % 3 + 1, 2))
    assert main(lake, "ingest") == job.GATE_SAID_NO
    assert re.search(r"human_annotation of shop: drift/grade 0\.4\d*, expected at most", capsys.readouterr().err)
    assert versions(lake, "ingest") == before

    deliver(lake, num_marks=870)
    assert main(lake, "ingest") == job.DONE
    assert {row["standard"] for row in measured(lake, run_id=runs.newest(lake, "ingest").run_id)} == {good}
    assert len(tables.rows(lake, HUMAN_ANNOTATION)) == 870

    capsys.readouterr()
    assert cli.main(["quality", "human_annotation", f"lake={lake.root}"]) == job.DONE
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("450 !", "stopped", "published", "870", ">= 586, <= 2,"))
    assert cli.main(["quality", "human_annotation", f"lake={lake.root}", "runs=1", "--json"]) == job.DONE
    assert {row["published"] for row in json.loads(capsys.readouterr().out)} == {True}


@pytest.mark.slow
def test_every_table_of_the_four_jobs_is_measured_before_it_is_written(lake):
    """Five jobs: a minute."""
    deliver(lake)
    for name, specs in WRITTEN.items():
        if name == "build_engagement":
            assert main(lake, "ingest_events") == job.DONE
        words = ["recipe.min_wrong_probability=0.01", "recipe.min_impressions=1"] if name == "build_audit" else []
        assert main(lake, name, *words) == job.DONE
        record = runs.newest(lake, name)
        rows = measured(lake, run_id=record.run_id)
        assert {row["table_name"] for row in rows} == {spec.name for spec in specs} == set(record.outputs)
        told = {row["table_name"]: row["value"] for row in rows if row["metric"] == "rows"}
        assert told == {spec.name: len(tables.rows(lake, spec)) for spec in specs}
        assert told != dict.fromkeys(told, 0)


def put_marks(lake, grades):
    rows = [
        {"dataset": "shop", "query_id": f"q{n}", "product_id": "p", "annotator": None, "mark_number": 1, "mark": "m"}
        | {"scale": "s", "num_marks": 1, "grade": grade, "grade_value": float(grade)}
        for n, grade in enumerate(grades)
    ]
    table = pa.Table.from_pylist(rows, schema=HUMAN_ANNOTATION.schema)
    write_deltalake(lake.table(HUMAN_ANNOTATION.name), table, mode="overwrite")


def test_a_change_is_accepted_once_and_is_the_standard_then(lake, capsys, caplog):
    put_marks(lake, [n % 3 for n in range(600)])
    assert main(lake, "build_consensus") == job.DONE
    put_marks(lake, [1 + n % 2 for n in range(600)])
    assert main(lake, "build_consensus") == job.GATE_SAID_NO
    accept = re.search(r"recipe\.quality\.accept=\w+$", capsys.readouterr().err.strip())[0]

    put_marks(lake, [1 + n % 2 for n in range(200)])
    assert main(lake, "build_consensus", accept) == job.GATE_SAID_NO, "rows were not what it accepts"
    assert "annotation_consensus of shop: rows 200" in capsys.readouterr().err
    put_marks(lake, [1 + n % 2 for n in range(600)])
    assert main(lake, "build_consensus", accept) == job.DONE
    accepted = measured(lake, run_id=runs.newest(lake, "build_consensus").run_id, met=False)
    assert {(row["metric"], row["published"]) for row in accepted} == {
        ("drift/grade", True),
        ("drift/at_least_1", True),
    }

    assert main(lake, "build_consensus") == job.DONE, "it is the standard now"
    put_marks(lake, [n % 3 for n in range(600)])
    assert main(lake, "build_consensus", accept) == job.GATE_SAID_NO
    assert "is spent, since a later run has published" in caplog.text
    assert main(lake, "build_consensus", "recipe.quality.accept=nobody") == job.BAD_USAGE
    assert "no stopped run of build_consensus" in capsys.readouterr().err
    assert main(lake, "build_consensus", "recipe.quality.accept=all") == job.DONE


def test_a_data_set_that_is_gone_and_an_empty_first_run_are_noticed(lake, capsys):
    put_marks(lake, [])
    few = "recipe.quality.min_rows=1"
    assert main(lake, "build_consensus", few) == job.GATE_SAID_NO
    assert "annotation_consensus of all data sets: rows 0, expected at least 1 (min_rows)" in capsys.readouterr().err
    assert not tables.exists(lake, ANNOTATION_CONSENSUS)
    put_marks(lake, [n % 3 for n in range(300)])
    assert main(lake, "build_consensus", few) == job.DONE
    put_marks(lake, [])
    assert main(lake, "build_consensus") == job.GATE_SAID_NO
    assert "annotation_consensus of shop: rows 0, expected at least" in capsys.readouterr().err


def test_a_day_of_a_log_with_doubled_clicks_is_not_published(lake, capsys):
    deliver(lake)
    assert main(lake, "ingest") == main(lake, "ingest_events") == job.DONE
    before = tables.version(lake, SEARCH_EVENT)
    deliver_day(Path(lake.path("raw", "shop")), 2, clicks=(0, 1, 4, 5, 7, 8))
    assert main(lake, "ingest_events") == job.GATE_SAID_NO
    said = capsys.readouterr().err
    assert "search_event of shop: drift/kind" in said
    assert tables.version(lake, SEARCH_EVENT) == before
    accept = re.search(r"recipe\.quality\.accept=\w+$", said.strip())[0]
    assert main(lake, "ingest_events", accept) == job.DONE
    assert len(set(tables.rows(lake, SEARCH_EVENT)["event_day"].to_pylist())) == 2


def put_events(lake, clicks_of_ten):
    """2,000 pairs, each shown at ten places and clicked at as many of them as `clicks_of_ten` says of its number."""
    places = [(n, place, (place + n // 7) % 10 < clicks_of_ten(n)) for n in range(2000) for place in range(1, 11)]
    columns = {
        "dataset": ["shop"] * len(places),
        "query_id": [f"q{n % 100}" for n, _, _ in places],
        "product_id": [f"p{n}" for n, _, _ in places],
        "position": [place for _, place, _ in places],
        "impressions": [1] * len(places),
        "clicks": [int(is_clicked) for _, _, is_clicked in places],
        "carts": [0] * len(places),
        "purchases": [0] * len(places),
        "event_day": [date(2026, 1, 1)] * len(places),
    }
    table = pa.Table.from_pydict(columns, schema=PLACE_COUNT.schema)
    write_deltalake(lake.table(PLACE_COUNT.name), table, mode="overwrite")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_doubled_clicks_change_neither_engagement_nor_the_click_model(lake, capsys):
    put_events(lake, lambda n: n % 4)
    assert main(lake, "build_engagement") == job.DONE
    before = versions(lake, "build_engagement")
    put_events(lake, lambda n: 2 * (n % 4))
    assert main(lake, "build_engagement") == job.GATE_SAID_NO
    said = capsys.readouterr().err
    assert "engagement of shop: drift/clicks" in said
    assert versions(lake, "build_engagement") == before
    broken = {row["metric"] for row in measured(lake, met=False)}
    assert "drift/click_rate" in broken
    assert not {"rows", "drift/impressions"} & broken


def test_a_gate_is_no_part_of_what_a_run_is():
    strict = ["recipe.quality.max_drift=0", "recipe.quality.accept=x"]
    for name, module in MODULES.items():
        plain, gated = (load_job(module.Config, name, "dev", words).recipe for words in ([], strict))
        assert gated.quality.max_drift == 0
        assert fingerprint(name, plain) == fingerprint(name, gated)


def test_no_shipped_setting_accepts_anything():
    for name, module in MODULES.items():
        for setting in ("dev", "nightly"):
            assert not load_job(module.Config, name, setting).recipe.quality.accept


def test_a_body_that_fails_leaves_no_published_row(lake):
    put_marks(lake, [0, 1, 2])
    current = job.begin(load_job(build_consensus.Config, "build_consensus", "dev", [f"lake={lake.root}"]), "any")
    with pytest.raises(ZeroDivisionError), quality.gated(current, {}, current.recipe.quality):
        1 / 0  # noqa: B018
    assert not tables.exists(lake, TABLE_QUALITY)
    with pytest.raises(ConfigError, match="no stopped run of any"):
        quality._accepted(current, "nobody")
