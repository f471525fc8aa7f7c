"""The Spark jobs on real Spark and real Delta: what they write, refuse and leave alone."""

import csv
import gzip
import json
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import write_deltalake

from conf.load import ConfigError, load_job
from jobs import (
    build_audit,
    build_consensus,
    build_engagement,
    build_instances,
    ingest,
    ingest_events,
    measure_annotators,
    sample_pairs,
)
from lake import spark as lake_spark
from lake import tables
from lake.schemas import (
    ANNOTATION_AGREEMENT,
    ANNOTATION_CONSENSUS,
    ANNOTATOR_CONFUSION,
    ANNOTATOR_QUALITY,
    AUDIT_VERDICT,
    CANDIDATE_PAIR,
    CATALOG_PRODUCT,
    DAWID_SKENE_ROUND,
    HUMAN_ANNOTATION,
    MINED_PAIR,
    PAIR_GRADE,
    QUARANTINE,
    QUERY,
    SEARCH_EVENT,
    TRAINING_INSTANCE,
)
from tests.fakes import put

JOBS = {
    "ingest": ingest,
    "ingest_events": ingest_events,
    "build_consensus": build_consensus,
    "measure_annotators": measure_annotators,
    "build_engagement": build_engagement,
    "build_audit": build_audit,
    "sample_pairs": sample_pairs,
    "build_instances": build_instances,
}
MARKS = ("query_id", "product_id", "mark", "scale", "num_marks", "annotator", "grade")
BROKEN = ['{"product_id": "broken', '{"product_id": "no title"}', '{"product_id": "x", "title": "t", "price": "?"}']
pytestmark = pytest.mark.usefixtures("spark")


def run(lake, job, *overrides):
    return JOBS[job].run(load_job(JOBS[job].Config, job, "dev", [f"lake={lake.root}", *overrides]))


def write_raw(lake, dataset="shop", *, num_products=40, num_broken=0, num_queries=40, extra_queries=(), packing="gz"):
    """A raw folder: every query has marks 2, 1, 0 on products p0, p1, p2; product numbers run from 0."""
    folder = Path(lake.path("raw", dataset))
    for part in ("catalog", "queries", "annotations", "events"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"product_id": f"p{n}", "title": f"title {n}", "price": n + 0.5}) for n in range(num_products)]
    lines += [
        '{"product_id": "broken',
        '{"product_id": "no title"}',
        '{"product_id": "x", "title": "t", "price": "?"}',
    ][:num_broken]
    text = "\n".join(lines).encode()
    if packing == "zst":
        (folder / "catalog" / "part.jsonl.zst").write_bytes(pa.compress(text, "zstd", asbytes=True))
    else:
        (folder / "catalog" / "part.jsonl.gz").write_bytes(gzip.compress(text))
    with gzip.open(folder / "queries" / "part.csv.gz", "wt", newline="") as stream:
        rows = [(f"q{n}", f'query "{n}", inch', "") for n in range(num_queries)]
        csv.writer(stream).writerows([("query_id", "query", "split"), *rows, *extra_queries])
    marks = [(f"q{n}", f"p{g}", str(g), "0-2", 1, None, 2 - g) for n in range(num_queries) for g in range(3)]
    schema = {"num_marks": pa.int32(), "grade": pa.int8()}
    columns = {
        name: pa.array(values, schema.get(name, pa.string()))
        for name, values in zip(MARKS, zip(*marks, strict=True), strict=True)
    }
    pq.write_table(pa.table(columns), folder / "annotations" / "part.parquet")
    return folder


def write_events(folder):
    events = [
        {"event_id": f"{kind}{n}", "session_id": "s", "query_id": f"q{n}", "product_id": "p9", "kind": kind}
        | {"position": 1, "event_time": "2026-01-02T03:04:05Z"}
        for n in range(10)
        for kind in ("impression", "click")[: 1 + n % 2]
    ]
    (folder / "events" / "part.jsonl").write_text("\n".join(json.dumps(event) for event in events))


def versions(lake):
    return {spec.name: tables.version(lake, spec) for spec in (CATALOG_PRODUCT, QUERY, HUMAN_ANNOTATION)}


def column(lake, spec, name, **where):
    return tables.rows(lake, spec, **where).column(name).to_pylist()


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize("setting", ["dev", "nightly"])
def test_every_setting_of_the_spark_jobs_loads(job, setting):
    assert load_job(JOBS[job].Config, job, setting).recipe


def test_raw_files_become_instances_and_bad_rows_quarantine(lake):
    folder = write_raw(lake, num_broken=2, num_products=38, extra_queries=[("long", "x" * 10_000, "")])
    write_events(folder)
    (folder / "rejected").mkdir()
    (folder / "rejected" / "part.jsonl").write_text(
        '{"table": "human_annotation", "row": "{\\"a\\": 1}", "reason": "odd"}\n'
    )
    record = run(lake, "ingest", "inputs.raw=[raw/shop]")
    assert (record.counts["catalog_product"], record.counts["catalog_product_rejected"]) == (38, 2)
    assert (record.counts["query"], record.counts["query_rejected"], record.counts["rejected_by_source"]) == (40, 1, 1)
    refused = {(row["table_name"], row["reason"]): row["row"] for row in tables.rows(lake, QUARANTINE).to_pylist()}
    assert refused.pop(("query", "query is longer than 1000 characters")).count("x") == 10_000
    assert refused == {
        ("catalog_product", "the line is not a row of its file's format"): '{"product_id": "broken',
        ("catalog_product", "title is missing"): '{"product_id":"no title"}',
        ("human_annotation", "odd"): '{"a": 1}',
    }
    assert 'query "0", inch' in column(lake, QUERY, "text")
    assert run(lake, "ingest_events", "inputs.logs=[raw/shop]").rows == 15
    assert column(lake, SEARCH_EVENT, "event_time")[0] == datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)

    assert run(lake, "build_consensus").rows == 120
    assert run(lake, "build_engagement").rows == 10
    assert run(lake, "build_audit", "recipe.min_impressions=1").rows == 0
    sampled = run(lake, "sample_pairs")
    train = {row["query_id"] for row in tables.rows(lake, QUERY).to_pylist() if row["split"] == "train"}
    assert set(column(lake, CANDIDATE_PAIR, "query_id")) <= train
    assert sampled.counts["sampled"] == 4 * len(train)  # 2 positives, 1 of grade 0: lacks 2.71, x 1.2 = 3.26, so 4

    grade_all(lake, labeller="one")
    instances = run(lake, "build_instances")
    assert set(column(lake, TRAINING_INSTANCE, "query_id")) == train
    assert instances.counts["grade_0"] / instances.counts["pairs"] >= 0.65
    assert instances.counts["human"] == 3 * len(train)


def grade_all(lake, labeller):
    """Every candidate gets grade 0 in the ledger."""
    queries = {row["query_id"]: row["query_hash"] for row in tables.rows(lake, QUERY).to_pylist()}
    products = {row["product_id"]: row["product_hash"] for row in tables.rows(lake, CATALOG_PRODUCT).to_pylist()}
    fixed = {"grade": 0, "p0": 0.8, "p1": 0.1, "p2": 0.1, "judge": "labeller", "labeller": labeller, "guideline": "v1"}
    fixed |= {"prompt": "p", "decoding": "classify", "run_id": "r", "created_at": datetime(2026, 1, 1, tzinfo=UTC)}
    rows = {
        (pair["query_id"], pair["product_id"]): {
            "address": f"{pair['query_id']} {pair['product_id']}",
            "query_hash": queries[pair["query_id"]],
            "product_hash": products[pair["product_id"]],
            **{name: pair[name] for name in ("dataset", "query_id", "product_id")},
            **fixed,
        }
        for pair in tables.rows(lake, CANDIDATE_PAIR).to_pylist()
    }
    ledger = pa.Table.from_pylist(list(rows.values()), schema=PAIR_GRADE.schema)
    tables.append_once(lake, PAIR_GRADE, ledger, run_id="r", part="0")


def write_crew(folder):
    """Three named annotators: two right, one who marks everything 2; gold of ten pairs, two rows of it of no use."""
    marks = [
        {"query_id": f"q{n}", "product_id": f"p{g}", "annotator": who, "guideline": f"v{1 + n % 2}"}
        | {"mark": str(given), "scale": "0-2", "num_marks": 1, "grade": given}
        for n in range(40)
        for g in range(3)
        for who, given in (("ann", 2 - g), ("bob", 2 - g), ("cyd", 2))
        if who != "ann" or n % 4  # every fourth query has two annotators, who tie where they differ
    ]
    names = ("query_id", "product_id", "mark", "scale", "annotator", "guideline")
    types = {"num_marks": pa.int32(), "grade": pa.int8()} | dict.fromkeys(names, pa.string())
    columns = {name: pa.array([mark[name] for mark in marks], kind) for name, kind in types.items()}
    pq.write_table(pa.table(columns), folder / "annotations" / "part.parquet")
    (folder / "gold").mkdir()
    gold = [{"query_id": f"q{n}", "product_id": "p2", "grade": 0, "source": "panel"} for n in range(10)]
    gold += [{"query_id": "q11", "product_id": "p2", "grade": 7}, {"query_id": "no", "product_id": "p2", "grade": 0}]
    (folder / "gold" / "part.jsonl").write_text("\n".join(json.dumps(row) for row in gold))


def test_dawid_skene_settles_ties_and_annotators_are_measured_by_gold_and_by_each_other(lake):
    write_crew(write_raw(lake))
    ingested = run(lake, "ingest", "inputs.raw=[raw/shop]", "recipe.max_rejected_fraction=0.2")
    assert (ingested.counts["gold_question"], ingested.counts["gold_question_rejected"]) == (10, 2)
    refused = [row["reason"] for row in tables.rows(lake, QUARANTINE).to_pylist()]
    assert sorted(refused) == ["grade is not 0, 1 or 2", "query_id is not in the data set"]
    put(
        lake,
        AUDIT_VERDICT,
        [
            {"dataset": "shop", "query_id": "q0", "product_id": "p0", "grade": 1, "expert": "eva"}
            | {"decided_at": datetime(2026, 1, 1, tzinfo=UTC)}
        ],
    )
    known = ["inputs.gold_question=newest", "inputs.audit_verdict=newest"]
    assert run(lake, "build_consensus").rows == 120 - 2 * 10  # ties of 2 with 1 and with 0
    voted = tables.rows(lake, ANNOTATION_CONSENSUS).to_pylist()
    assert {(row["method"], row["p2"]) for row in voted} == {("majority", None)}
    assert not tables.exists(lake, ANNOTATOR_CONFUSION)

    record = run(lake, "build_consensus", "recipe.method=dawid_skene", *known)
    assert record.counts["rounds/shop"] == tables.rows(lake, DAWID_SKENE_ROUND).num_rows
    rows = tables.rows(lake, ANNOTATION_CONSENSUS).to_pylist()
    assert len(rows) == 120
    assert {row["method"]: row["judge"] for row in rows} == {
        "dawid_skene": "human",
        "gold": "human",
        "verdict": "expert",
    }
    for row in rows:
        right = 1 if row["method"] == "verdict" else 2 - int(row["product_id"][1:])
        assert row["grade"] == right, row
        if row["method"] != "verdict":
            assert row["p0"] + row["p1"] + row["p2"] == pytest.approx(1)
            assert row[f"p{right}"] > 0.8
    blind = [row for row in tables.rows(lake, ANNOTATOR_CONFUSION).to_pylist() if row["annotator"] == "cyd"]
    assert all((row["probability"] > 0.8) == (row["grade"] == 2) for row in blind)

    measured = run(lake, "measure_annotators", *known)
    quality = {
        (row["annotator"], row["slice"], row["value"]): row for row in tables.rows(lake, ANNOTATOR_QUALITY).to_pylist()
    }
    ann, cyd = quality["ann", "all", ""], quality["cyd", "all", ""]
    assert (ann["num_gold"], ann["gold_accuracy"], cyd["num_gold"], cyd["num_verdicts"]) == (7, 1.0, 11, 1)
    assert (cyd["gold_accuracy"], cyd["gold_bias"]) == (0.0, (10 * 2 + 1) / 11)
    assert cyd["kappa"] == pytest.approx(0.0)
    assert cyd["bias"] == pytest.approx(1.0)
    assert {key[2] for key in quality if key[1] == "guideline"} == {"v1", "v2"}
    agreement = {(row["slice"], row["value"]): row for row in tables.rows(lake, ANNOTATION_AGREEMENT).to_pylist()}
    assert agreement["all", ""]["num_pairs"] == 120
    assert measured.metrics["alpha_ordinal/shop"] == agreement["all", ""]["alpha_ordinal"]


def test_a_table_from_before_a_column_is_read_with_nulls(lake, spark):
    write_raw(lake)
    run(lake, "ingest", "inputs.raw=[raw/shop]")
    before = tables.rows(lake, HUMAN_ANNOTATION).drop_columns(["guideline"])
    path = lake.table(HUMAN_ANNOTATION.name)
    write_deltalake(path, before, mode="overwrite", schema_mode="overwrite")
    assert "guideline" not in spark.read.format("delta").load(path).columns
    found = lake_spark.rows(spark, lake, HUMAN_ANNOTATION)
    assert found.where("guideline IS NULL").count() == 120
    assert dict(found.dtypes)["guideline"] == "string"
    assert run(lake, "measure_annotators").counts["annotator_quality"] == 0


def test_too_many_bad_rows_fail_the_run_and_change_no_table(lake):
    write_raw(lake)
    run(lake, "ingest", "inputs.raw=[raw/shop]")
    before = versions(lake)
    write_raw(lake, num_products=20, num_broken=3)
    with pytest.raises(ValueError, match=r"catalog_product: 3 rows of shop \(13\.0%\).*quarantine") as caught:
        run(lake, "ingest", "inputs.raw=[raw/shop]")
    assert versions(lake) == before
    assert len(column(lake, CATALOG_PRODUCT, "product_id")) == 40
    reasons = column(lake, QUARANTINE, "reason")
    assert sorted(reasons) == [
        "price is not a number",
        "the line is not a row of its file's format",
        "title is missing",
    ]
    assert column(lake, QUARANTINE, "run_id")[0] in str(caught.value)


def test_a_log_may_lack_and_zst_is_read(lake):
    write_raw(lake, packing="zst")
    record = run(lake, "ingest", "inputs.raw=[raw/shop]")
    assert record.counts["catalog_product"] == 40
    assert run(lake, "ingest_events", "inputs.logs=[raw/shop]").rows == 0
    assert run(lake, "build_engagement").rows == 0


def test_a_data_set_that_would_be_dropped_is_refused(lake):
    write_raw(lake, "shop")
    write_raw(lake, "other")
    run(lake, "ingest", "inputs.raw=[raw/shop]")
    with pytest.raises(ValueError, match=r"also holds shop, which this run would drop.*another lake=DIR"):
        run(lake, "ingest", "inputs.raw=[raw/other]")
    record = run(lake, "ingest", "inputs.raw=[raw/shop, raw/other]")
    assert record.counts["query"] == 80
    splits = {}
    for row in tables.rows(lake, QUERY).to_pylist():
        splits.setdefault(row["normalised"], set()).add(row["split"])
    assert all(len(found) == 1 for found in splits.values())


def cut(path):
    path.write_bytes(path.read_bytes()[:-40])


DAMAGE = {
    "corrupt parquet": (
        lambda raw: cut(raw / "annotations" / "part.parquet"),
        r"part\.parquet: is not a whole Parquet file",
    ),
    "cut gzip": (lambda raw: cut(raw / "catalog" / "part.jsonl.gz"), r"part\.jsonl\.gz: cannot be read"),
    "no catalogue": (lambda raw: (raw / "catalog" / "part.jsonl.gz").unlink(), r"shop/catalog: no data file for shop"),
    "empty catalogue": (
        lambda raw: (raw / "catalog" / "part.jsonl.gz").write_bytes(gzip.compress(b"")),
        r"shop/catalog: is empty",
    ),
    "unknown format": (lambda raw: (raw / "queries" / "notes.xlsx").touch(), r"notes\.xlsx: expected \.jsonl"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_input_ends_in_one_sentence_that_names_the_file(lake, damage):
    break_it, sentence = DAMAGE[damage]
    break_it(write_raw(lake, num_products=2000 if damage == "cut gzip" else 40))
    with pytest.raises(ValueError, match=sentence) as caught:
        run(lake, "ingest", "inputs.raw=[raw/shop]")
    assert "\n" not in str(caught.value)
    assert set(versions(lake).values()) == {None}


def test_a_missing_raw_folder_is_named(lake):
    with pytest.raises(ValueError, match=r"raw/nowhere: no such folder"):
        run(lake, "ingest", "inputs.raw=[raw/nowhere]")


def test_pinned_versions_are_read_and_other_sources_stay(lake):
    write_raw(lake)
    run(lake, "ingest", "inputs.raw=[raw/shop]")
    first = run(lake, "build_consensus")
    assert run(lake, "build_consensus", "recipe.min_agreement=1.0").inputs == first.inputs
    run(lake, "ingest_events", "inputs.logs=[raw/shop]")
    run(lake, "build_engagement")
    with pytest.raises(ConfigError, match=r"source mined needs inputs\.mined_pair"):
        run(lake, "sample_pairs", "recipe.sources=[mined]")
    tables.create(lake, PAIR_GRADE)
    run(lake, "sample_pairs", "recipe.sources=[sampled]")
    with pytest.raises(ConfigError, match=r"stage 2 needs inputs\.mined_pair"):
        run(lake, "build_instances", "recipe.stage=2")
    train = next(row["query_id"] for row in tables.rows(lake, QUERY).to_pylist() if row["split"] == "train")
    mined = {"dataset": "shop", "query_id": train, "product_id": "p30", "rank": 1, "score": 0.9, "band": "top"}
    mined |= {"shard": 0, "model": "m", "round": 1, "run_id": "r"}
    tables.replace(lake, MINED_PAIR, pa.Table.from_pylist([mined], schema=MINED_PAIR.schema), run_id="r")
    sampled = sorted(column(lake, CANDIDATE_PAIR, "product_id"))
    pinned = f"inputs.annotation_consensus='{first.outputs['annotation_consensus']}'"
    record = run(lake, "sample_pairs", "recipe.sources=[mined]", "inputs.mined_pair=newest", pinned)
    assert record.inputs["annotation_consensus"] == first.outputs["annotation_consensus"]
    assert int(record.inputs["annotation_consensus"]) < tables.version(lake, ANNOTATION_CONSENSUS)
    assert record.counts == {"mined": 1}
    assert sorted(column(lake, CANDIDATE_PAIR, "product_id")) == sorted([*sampled, "p30"])
