"""Doubtful pairs from the queue to the experts and back, on real Spark and real Delta."""

import csv
import json
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

import ray_apps.label
from conf.load import ConfigError, load_job
from embeddings.calibration import Calibration
from embeddings.labeller import LabellerRecipe, load_labeller_card, save_labeller
from jobs import (
    audit_report,
    build_audit,
    build_consensus,
    build_review,
    explain,
    export_review,
    import_verdicts,
    record_human_grades,
    review_conflicts,
)
from lake import tables
from lake.schemas import (
    ANNOTATION_CONSENSUS,
    AUDIT_CONFLICT,
    AUDIT_REPORT,
    AUDIT_VERDICT,
    CATALOG_PRODUCT,
    ENGAGEMENT,
    HUMAN_ANNOTATION,
    PAIR_GRADE,
    QUARANTINE,
    QUERY,
    REVIEW_GRADE,
    REVIEW_QUEUE,
    REVIEW_ROUTE,
)
from tests.fakes import hash_of, put

JOBS = {
    "build_review": build_review,
    "export_review": export_review,
    "import_verdicts": import_verdicts,
    "audit_report": audit_report,
    "build_audit": build_audit,
    "build_consensus": build_consensus,
    "record_human_grades": record_human_grades,
    "review_conflicts": review_conflicts,
}
DAY = {number: datetime(2026, 1, number, 3, tzinfo=UTC) for number in range(1, 10)}


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize("setting", ["dev", "nightly"])
def test_every_setting_of_the_review_jobs_loads(job, setting):
    assert load_job(JOBS[job].Config, job, setting).recipe


def run(lake, job, *overrides):
    return JOBS[job].run(load_job(JOBS[job].Config, job, "dev", [f"lake={lake.root}", *overrides]))


@pytest.fixture
def doubtful(lake):
    """Three queries of falling traffic, twelve conflicts: four products each, whose people say 2."""
    put(
        lake,
        QUERY,
        [
            {"dataset": "s", "query_id": f"q{n}", "text": f"=query {n}", "normalised": f"query {n}"}
            | {"query_hash": hash_of(f"=query {n}"), "split": "train"}
            for n in range(3)
        ],
    )
    put(
        lake,
        CATALOG_PRODUCT,
        [
            {"dataset": "s", "product_id": f"p{n}", "title": f"title, {n}", "product_hash": f"hash {n}"}
            | {"category": "Garden > Tools" if n % 2 else None, "brand": "Åcme", "description": '-1 "deep"\nwell'}
            for n in range(4)
        ],
    )
    pairs = [{"dataset": "s", "query_id": f"q{q}", "product_id": f"p{p}"} for q in range(3) for p in range(4)]
    counts = {"clicks": 2, "carts": 1, "purchases": 1, "expected_clicks": 1.0, "corrected_rate": 1.5}
    put(lake, ENGAGEMENT, [pair | counts | {"impressions": (100, 50, 10)[int(pair["query_id"][1])]} for pair in pairs])
    counts = {"impressions": 20, "clicks": 2, "purchases": 1, "corrected_rate": 1.5}
    found = {"kind": "doubtful", "grade": 2, "posterior_0": 0.6, "posterior_1": 0.3, "posterior_2": 0.1}
    found |= {"wrong_probability": 0.9, "found_at": DAY[2]}
    put(lake, AUDIT_CONFLICT, [pair | counts | found | {"priority": 1 + n / 100} for n, pair in enumerate(pairs)])
    return lake


def queued(lake, **where):
    return tables.rows(lake, REVIEW_QUEUE).sort_by("rank").to_pylist()


@pytest.mark.usefixtures("spark")
def test_batches_follow_each_other_until_nothing_waits(doubtful):
    first = run(doubtful, "build_review", "recipe.budget=8")
    assert first.counts == {
        "waiting": 12,
        "strata": 6,
        "at_random": 2,
        "by_priority": 6,
        "strata_without_random": 4,
        "waiting_without_random": 8,
    }
    rows = queued(doubtful)
    assert [row["rank"] for row in rows] == list(range(1, 9))
    assert {row["batch"] for row in rows} == {f"review-{first.run_id}"}
    assert {(row["query_id"], row["traffic"]) for row in rows} == {("q0", "head"), ("q1", "torso"), ("q2", "tail")}
    assert {(row["product_id"] in ("p1", "p3"), row["category"]) for row in rows} == {(True, "Garden"), (False, "")}
    assert all(row["wrong_probability"] == 0.9 and row["found_at"] == DAY[2] for row in rows)

    second = run(doubtful, "build_review", "recipe.budget=8")
    assert (second.counts["waiting"], second.rows) == (4, 4)
    names = [(row["query_id"], row["product_id"]) for row in queued(doubtful)]
    assert len(set(names)) == len(names) == 12

    verdict = {"dataset": "s", "query_id": "q0", "product_id": "p0", "grade": 0, "expert": "eva", "decided_at": DAY[1]}
    put(doubtful, AUDIT_VERDICT, [verdict, verdict | {"product_id": "p1", "decided_at": DAY[3]}])
    route = {"batch": "b", "route": "kept", "labellers": "one", "run_id": "r", "created_at": DAY[3]}
    put(doubtful, REVIEW_ROUTE, [verdict | route | {"product_id": "p2"}])
    again = run(doubtful, "build_review", f"recipe.abandoned=[review-{first.run_id},review-{second.run_id}]")
    # what came up after its verdict waits again; of the rest one has a verdict and one was kept by labellers
    assert again.rows == 10


@pytest.fixture
def queue(doubtful):
    """Two batches without Spark: all twelve pairs in the second, the first of them also in the first."""
    found = tables.rows(doubtful, AUDIT_CONFLICT).to_pylist()
    fixed = {"traffic": "head", "category": "Garden", "stratum_size": 12}
    rows = [
        row
        | fixed
        | {"batch": "new", "rank": n + 1, "created_at": DAY[3], "inclusion_probability": 0.5 if n < 6 else None}
        for n, row in enumerate(found)
    ]
    put(doubtful, REVIEW_QUEUE, [rows[0] | {"batch": "old", "created_at": DAY[2]}, *rows])
    return doubtful


def filled(path, answers):
    """The exported CSV with cells set per product and query, as a spreadsheet would save it."""
    with open(path, encoding="utf-8-sig", newline="") as stream:
        names, *lines = csv.reader(stream)
    rows = [dict(zip(names, line, strict=True)) for line in lines]
    out = path.with_name("filled.csv")
    with open(out, "w", encoding="utf-8", newline="") as stream:
        sheet = csv.DictWriter(stream, names)
        sheet.writeheader()
        for row in rows:
            sheet.writerow(row | answers.get((row["query_id"], row["product_id"]), {}))
    return out


def test_the_newest_batch_is_exported_in_three_formats_with_texts_and_guideline(queue, tmp_path):
    record = run(queue, "export_review")
    assert (record.rows, record.outputs) == (12, {"review": "reviews/new"})
    folder = Path(queue.path("reviews", "new"))
    assert "exact" in (folder / "guideline.md").read_text()
    with open(folder / "review.csv", encoding="utf-8-sig", newline="") as stream:
        cells = list(csv.DictReader(stream))
    rows = parquet.read_table(folder / "review.parquet").to_pylist()
    records = [json.loads(line) for line in (folder / "argilla.jsonl").read_text().splitlines()]
    assert len(cells) == len(rows) == len(records) == 12
    first = rows[0]
    assert (first["query"], first["title"], first["description"]) == ("=query 0", "title, 0", '-1 "deep"\nwell')
    assert (first["human_grade"], first["human_grade_name"], first["guideline"], first["rank"]) == (2, "exact", "v1", 1)
    assert first["evidence"].startswith("Raters, shoppers and labeller together")
    assert (rows[1]["category"], first["category"], first["verdict"]) == ("Garden > Tools", None, None)
    assert (cells[0]["query"], cells[0]["description"]) == ("'=query 0", '\'-1 "deep"\nwell')
    assert (cells[0]["brand"], cells[0]["human_grade"], cells[0]["verdict"]) == ("Åcme", "2", "")
    assert [record["fields"]["query"] for record in records] == [row["query"] for row in rows]
    assert {record["metadata"]["guideline"] for record in records} == {"v1"}

    elsewhere = tmp_path / "outside"
    old = run(queue, "export_review", f"out={elsewhere}", "recipe.batch=old", "recipe.formats=[csv]")
    assert (old.rows, old.outputs["review"]) == (1, str(elsewhere))
    assert sorted(path.name for path in elsewhere.iterdir()) == ["guideline.md", "review.csv"]
    with pytest.raises(ConfigError, match=r"recipe.batch='none': the queue holds old, new"):
        run(queue, "export_review", "recipe.batch=none")


def test_a_pair_whose_product_is_gone_is_left_out_and_counted(queue):
    kept = [row for row in tables.rows(queue, CATALOG_PRODUCT).to_pylist() if row["product_id"] != "p3"]
    tables.open_table(queue, CATALOG_PRODUCT).delete()
    put(queue, CATALOG_PRODUCT, kept)
    assert run(queue, "export_review").counts == {"queued": 12, "without_text": 3}


def test_a_filled_in_sheet_becomes_verdicts_and_what_cannot_be_used_goes_to_quarantine(queue):
    run(queue, "export_review")
    answer = {"expert": "eva", "decided_at": "2026-01-05"}
    sheet = filled(
        Path(queue.path("reviews", "new", "review.csv")),
        {
            ("q0", "p0"): answer | {"verdict": "0", "note": "'=cell"},
            ("q0", "p1"): answer | {"verdict": "Exact", "note": "- as it is", "guideline": "v2"},
            ("q0", "p2"): answer | {"verdict": "3"},
            ("q0", "p3"): answer | {"verdict": "1", "expert": " "},
            ("q1", "p0"): answer | {"verdict": "1", "decided_at": "5.1.2026"},
            ("q1", "p1"): answer | {"verdict": "1", "decided_at": "2999-01-01"},
            ("q1", "p2"): answer | {"verdict": "1", "product_id": "p9"},
            ("q1", "p3"): answer | {"verdict": "1", "batch": "old"},
            ("q2", "p0"): answer | {"verdict": "1", "expert": "consensus"},
            ("q2", "p1"): answer | {"verdict": "", "note": "cannot tell"},
            ("q2", "p2"): answer | {"verdict": "1", "decided_at": ""},
        },
    )
    with open(sheet, "a", encoding="utf-8", newline="") as stream:
        stream.write("only,two\n")
    with pytest.raises(ValueError, match=r"10 of 12 answers of .* above recipe.max_rejected_fraction=0.1; no verdict"):
        run(queue, "import_verdicts", f"inputs.file={sheet}")
    assert not tables.exists(queue, AUDIT_VERDICT)

    record = run(queue, "import_verdicts", f"inputs.file={sheet}", "recipe.max_rejected_fraction=1")

    assert record.counts == {
        "rows": 12,
        "verdicts": 2,
        "quarantined": 10,
        "repeated": 0,
        "unanswered": 1,
        "experts_differ": 0,
    }
    first, second = tables.rows(queue, AUDIT_VERDICT).sort_by("product_id").to_pylist()
    assert first == {"dataset": "s", "query_id": "q0", "product_id": "p0", "grade": 0, "expert": "eva"} | {
        "decided_at": datetime(2026, 1, 5, tzinfo=UTC),
        "note": "=cell",
        "guideline": "v1",
        "batch": "new",
    }
    assert (second["grade"], second["note"], second["guideline"]) == (2, "- as it is", "v2")
    refused = tables.rows(queue, QUARANTINE).to_pylist()
    # the same rows for the same reasons, refused twice, stand there once
    assert sorted(row["reason"].split(";")[0] for row in refused) == [
        "decided_at '5.1.2026' is no time as in 2026-01-31 or 2026-01-31T12:00:00Z",
        "decided_at 2999-01-01T00:00:00+00:00 lies in the future",
        "decided_at is missing",
        "expert 'consensus' is no name of a person",
        "expert is missing",
        "the line is not a row of its file's format",
        "the pair is not in the queue of batch new",
        "the pair is not in the queue of batch old",
        "there is no verdict",
        "verdict '3' is none of 0, 1, 2, irrelevant, partial, exact",
    ]
    assert {row["table_name"] for row in refused} == {"audit_verdict"}
    lost = next(row for row in refused if row["reason"] == "the pair is not in the queue of batch new")
    assert json.loads(lost["row"])["product_id"] == "p9"

    versions = {spec.name: tables.version(queue, spec) for spec in (AUDIT_VERDICT, QUARANTINE)}
    again = run(queue, "import_verdicts", f"inputs.file={sheet}", "recipe.max_rejected_fraction=1")
    assert again.counts == record.counts | {"verdicts": 0, "repeated": 2}
    assert {spec.name: tables.version(queue, spec) for spec in (AUDIT_VERDICT, QUARANTINE)} == versions


def rows_of(*answers):
    """Rows of (product, verdict, expert, day, note)."""
    names = ("product_id", "verdict", "expert", "decided_at", "note")
    place = {"batch": "new", "dataset": "s", "query_id": "q0", "guideline": "v1"}
    return [place | dict(zip(names, answer, strict=True)) for answer in answers]


TOLD = rows_of(
    ("p0", 0, "eva", DAY[4], None),
    ("p0", 0, "eva", DAY[4], None),
    ("p0", 1, "eva", DAY[5], None),
    ("p0", 2, "ulf", DAY[4], None),
    ("p1", 1, "eva", DAY[4], None),
    ("p1", 2, "eva", DAY[4], None),
    ("p2", 1, "eva", DAY[4], None),
    ("p2", 1, "eva", DAY[4], "why"),
)


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "json"])
def test_doubles_are_repeated_and_contradictions_refused_whatever_the_format(queue, tmp_path, kind):
    path = tmp_path / f"answers.{kind}"
    if kind == "parquet":
        parquet.write_table(pa.Table.from_pylist(TOLD), path)
    else:
        texts = [json.dumps(row, default=str) for row in TOLD]
        path.write_text(f"[{','.join(texts)}]" if kind == "json" else "\n".join([*texts, "", "{broken"]))
    record = run(queue, "import_verdicts", f"inputs.file={path}", "recipe.max_rejected_fraction=0.5")
    broken = int(kind == "jsonl")
    assert record.counts == {"rows": 8 + broken, "verdicts": 4, "quarantined": 3 + broken, "repeated": 1} | {
        "unanswered": 0,
        "experts_differ": 1,
    }
    found = tables.rows(queue, AUDIT_VERDICT).to_pylist()
    assert sorted((row["product_id"], row["expert"], row["decided_at"].day, row["grade"]) for row in found) == [
        ("p0", "eva", 4, 0),
        ("p0", "eva", 5, 1),
        ("p0", "ulf", 4, 2),
        ("p2", "eva", 4, 1),
    ]
    reasons = tables.rows(queue, QUARANTINE)["reason"].to_pylist()
    assert sum(reason == "the same expert gives the pair another grade at the same time" for reason in reasons) == 2

    later = tmp_path / "later.jsonl"
    told = rows_of(("p0", 2, "eva", DAY[4], None), ("p0", 0, "eva", DAY[4], "new note"), ("p3", 2, "eva", DAY[4], None))
    later.write_text("\n".join(json.dumps(row, default=str) for row in told))
    record = run(queue, "import_verdicts", f"inputs.file={later}", "recipe.max_rejected_fraction=1")
    counts = {name: record.counts[name] for name in ("rows", "verdicts", "quarantined", "repeated")}
    assert counts == {"rows": 3, "verdicts": 1, "quarantined": 2, "repeated": 0}


def test_argilla_s_export_with_several_annotators_becomes_a_verdict_each(queue, tmp_path):
    run(queue, "export_review", "recipe.formats=[argilla]")
    records = [
        json.loads(line) for line in Path(queue.path("reviews", "new", "argilla.jsonl")).read_text().splitlines()
    ]
    records[0]["responses"] = {"grade": [{"value": "exact", "user_id": "u1"}, {"value": "partial", "user_id": "u2"}]}
    records[1] |= {"responses": [{"values": {"grade": {"value": "irrelevant"}}, "user_id": "u2", "status": "draft"}]}
    path = tmp_path / "argilla.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    words = [f"inputs.file={path}", "recipe.experts={u1: eva}"]
    with pytest.raises(ValueError, match=r"2 of 2 answers .* decided_at is missing; give recipe.decided_at=TIME"):
        run(queue, "import_verdicts", *words)
    record = run(queue, "import_verdicts", *words, "recipe.decided_at=2026-01-06")
    assert (record.rows, record.counts["unanswered"], record.counts["experts_differ"]) == (2, 11, 1)
    found = tables.rows(queue, AUDIT_VERDICT).sort_by("expert").to_pylist()
    assert [(row["expert"], row["grade"], row["batch"], row["guideline"]) for row in found] == [
        ("eva", 2, "new", "v1"),
        ("u2", 1, "new", "v1"),
    ]


def test_a_file_that_answers_no_queue_is_named(queue, tmp_path):
    (tmp_path / "a.csv").write_text("query,title\nx,y\n")
    with pytest.raises(ConfigError, match="column 'dataset' is missing; fill in a file that export_review wrote"):
        run(queue, "import_verdicts", f"inputs.file={tmp_path}/a.csv")
    with pytest.raises(ConfigError, match=r"expected an existing file that ends in \.csv, \.parquet"):
        run(queue, "import_verdicts", "inputs.file=none.xlsx")


@pytest.mark.usefixtures("spark")
def test_a_verdict_comes_back_into_consensus_and_ledger_as_new_rows(doubtful):
    pairs = [
        {name: row[name] for name in ("dataset", "query_id", "product_id")}
        for row in tables.rows(doubtful, AUDIT_CONFLICT).to_pylist()
    ]
    mark = {"annotator": "ann", "mark_number": 1, "mark": "m", "scale": "s", "num_marks": 1}
    put(doubtful, HUMAN_ANNOTATION, [pair | mark | {"grade": 2, "grade_value": 2.0} for pair in pairs])
    run(doubtful, "build_consensus")
    run(doubtful, "record_human_grades")
    doubted = run(doubtful, "build_audit", "recipe.min_wrong_probability=0.01")
    assert doubted.counts == {"doubtful": 12}
    since = {row["found_at"] for row in tables.rows(doubtful, AUDIT_CONFLICT).to_pylist()}
    # the fixture's conflicts were there before, and their doubt lasts
    assert since == {DAY[2]}
    batch = f"review-{run(doubtful, 'build_review', 'recipe.budget=12', 'recipe.order=random').run_id}"
    folder = Path(doubtful.path(run(doubtful, "export_review").outputs["review"]))
    answer = {"expert": "eva", "decided_at": f"{datetime.now(UTC):%Y-%m-%d}"}
    answers = {(f"q{query}", f"p{product}"): answer | {"verdict": 2} for query in range(3) for product in range(4)}
    answers |= {("q0", "p0"): answer | {"verdict": "irrelevant"}, ("q2", "p3"): answer | {"verdict": "partial"}}
    assert run(doubtful, "import_verdicts", f"inputs.file={filled(folder / 'review.csv', answers)}").rows == 12

    run(doubtful, "build_consensus", "inputs.audit_verdict=newest")
    record = run(doubtful, "record_human_grades", "inputs.audit_verdict=newest")

    consensus = tables.rows(doubtful, ANNOTATION_CONSENSUS).to_pylist()
    changed = {(row["query_id"], row["product_id"]): row["grade"] for row in consensus if row["grade"] != 2}
    assert changed == {("q0", "p0"): 0, ("q2", "p3"): 1}
    assert {row["judge"] for row in consensus} == {"expert"}
    assert record.counts["written"] == 12
    first, verdict = explain.explain(doubtful, "q0", "p0")["pair_grade"]
    assert (first["labeller"], first["grade"], first["is_newest"]) == ("consensus", 2, False)
    assert (verdict["labeller"], verdict["grade"], verdict["is_newest"]) == ("eva", 0, True)
    assert verdict["supersedes"] == first["address"]
    assert explain.explain(doubtful, "q0", "p0")["review_queue"][0]["batch"] == batch
    # the doubt lasts, and is settled
    run(doubtful, "build_audit", "recipe.min_wrong_probability=0.01")
    assert run(doubtful, "build_review").counts["waiting"] == 0

    record = run(doubtful, "audit_report")
    assert record.counts == {"queued": 12, "judged": 12, "changed": 2}
    assert record.metrics == {"labels_changed": pytest.approx(2 / 12), "labels_changed_so_far": pytest.approx(2 / 12)}
    rows = tables.rows(doubtful, AUDIT_REPORT).to_pylist()
    assert len({(row["part"], row["slice"], row["name"]) for row in rows}) == len(rows) == record.rows
    everything = next(row for row in rows if (row["part"], row["slice"]) == ("random", "all"))
    # all were drawn, so nothing is left to chance
    assert (everything["share"], everything["low"], everything["high"]) == pytest.approx((2 / 12,) * 3)
    by_version = [row["name"] for row in rows if (row["part"], row["slice"]) == ("random", "guideline")]
    assert by_version == ["v1"]
    page = Path(doubtful.path(record.outputs["report"])).read_text()
    assert page.startswith("# Review of doubtful grades")
    assert f"batches {batch}." in page


def test_a_report_takes_the_newest_verdict_of_the_batch_or_one_without_a_batch_since(queue):
    pair = {"dataset": "s", "query_id": "q0", "expert": "eva"}
    verdicts = [
        ("p0", 0, 4, "new"),
        ("p0", 1, 5, "new"),
        ("p0", 2, 6, "old"),
        ("p1", 0, 4, None),
        ("p2", 0, 2, None),
        ("p3", 1, 4, "old"),
    ]
    names = ("product_id", "grade", "decided_at", "batch")
    put(
        queue,
        AUDIT_VERDICT,
        [pair | dict(zip(names, row, strict=True)) | {"decided_at": DAY[row[2]]} for row in verdicts],
    )
    put(queue, ANNOTATION_CONSENSUS, [row | {"num_marks": 1, "agreement": 1.0, "judge": "human"} for row in JUDGED])

    record = run(queue, "audit_report", "recipe.batches=[new]")

    # p0 by its second verdict, p1 by the one without a batch; that of p2 is older than the queue, that of p3 another's
    assert record.counts == {"queued": 12, "judged": 2, "changed": 2}
    with pytest.raises(ConfigError, match=r"the queue holds new, old; run build_review, or name batches"):
        run(queue, "audit_report", "recipe.batches=[none]")


JUDGED = [
    {"dataset": "s", "query_id": f"q{n}", "product_id": "p0", "grade": 2, "at_least_1": 1.0, "at_least_2": 1.0}
    for n in range(3)
]


def test_labellers_settle_what_they_agree_on_and_the_rest_goes_to_experts():
    human = np.array([2, 2, 2, 2, 2, 2])
    first = [[0.1, 0.1, 0.8], [0.9, 0.1, 0.0], [0.9, 0.1, 0.0], [0.1, 0.2, 0.7], [0.5, 0.4, 0.1], [np.nan] * 3]
    second = [[0.2, 0.3, 0.5], [0.8, 0.1, 0.1], [0.7, 0.2, 0.1], [0.6, 0.4, 0.0], [0.1, 0.8, 0.1], [0.1, 0.1, 0.8]]
    probability, grade = np.array([first, second]), np.array([[2, 0, 0, 2, 0, -1], [2, 0, 0, 0, 1, 2]])

    def routed(**recipe):
        return review_conflicts.route_pairs(human, probability, grade, review_conflicts.ReviewRecipe(**recipe))

    accepted = routed(accept_agreed=True)
    assert accepted.route_N.tolist() == ["kept", "changed", "to_expert", "to_expert", "to_expert", "to_expert"]
    # the means of the fourth are .35, .3 and .35, of the fifth .3, .6 and .1
    assert accepted.joint_N.tolist() == [2, 0, 0, 0, 1, -1]
    np.testing.assert_allclose(accepted.least_N, [0.5, 0.8, 0.7, 0.1, 0.4, np.nan])
    assert routed().route_N.tolist() == ["kept", *["to_expert"] * 5]
    assert routed().agreed_N.tolist() == [False, True, False, False, False, False]
    assert routed(accept_agreed=True, min_probability=0.5).route_N.tolist()[:3] == ["kept", "changed", "changed"]


@pytest.fixture
def strict(tmp_path, labeller):
    """A labeller that differs from the fixture by its liking for 0."""
    recipe, target = LabellerRecipe(model=str(tmp_path / "model"), max_tokens=32), str(tmp_path / "strict")
    calibrations = {"": Calibration(bias=(20.0, 0.0, 0.0))}
    save_labeller(tmp_path / "weights", target, recipe, grade_token_ids=(), calibrations=calibrations, metrics={})
    return target


def test_labellers_judge_the_queue_again_once_and_their_routes_lead_the_export(queue, labeller, strict, monkeypatch):
    judges = f"inputs.labellers=[{labeller},{strict}]"
    torch = "placement.engine=torch"
    with pytest.raises(ConfigError, match="a review needs a labeller or more"):
        run(queue, "review_conflicts")

    record = run(queue, "review_conflicts", judges, torch)

    assert (record.counts["queued"], record.counts["asked"], record.counts["reused"]) == (12, 24, 0)
    cards = [load_labeller_card(folder) for folder in (labeller, strict)]
    rows = tables.rows(queue, REVIEW_GRADE).to_pylist()
    assert {(row["batch"], row["labeller"]) for row in rows} == {("new", card.fingerprint) for card in cards}
    in_ledger = {
        (row["query_id"], row["product_id"], row["labeller"]): (row["grade"], row["p0"])
        for row in tables.rows(queue, PAIR_GRADE).to_pylist()
    }
    assert len(in_ledger) == len(rows) == 24
    assert {
        (row["query_id"], row["product_id"], row["labeller"]): (row["grade"], row["p0"]) for row in rows
    } == in_ledger
    assert all(row["grade"] == 0 for row in rows if row["labeller"] == cards[1].fingerprint)
    routes = tables.rows(queue, REVIEW_ROUTE).to_pylist()
    # one of them calls all irrelevant, so none is kept at 2
    assert {row["route"] for row in routes} == {"to_expert"}
    assert record.counts["to_expert"] == len(routes) == 12
    assert not tables.exists(queue, AUDIT_VERDICT)

    def never(*_, **__):
        raise AssertionError("an engine was started")

    monkeypatch.setattr(ray_apps.label, "label_pairs", never)
    again = run(queue, "review_conflicts", f"inputs.labellers=[{strict}]", torch, "recipe.accept_agreed=true")
    assert (again.counts["asked"], again.counts["reused"], again.counts["changed"]) == (0, 12, 12)
    assert len(tables.rows(queue, REVIEW_GRADE)) == 12
    verdicts = tables.rows(queue, AUDIT_VERDICT).to_pylist()
    assert {row["expert"] for row in verdicts} == {f"judges:{cards[1].fingerprint}"}
    assert {(row["grade"], row["batch"], row["guideline"]) for row in verdicts} == {(0, "new", "v1")}
    assert len(verdicts) == again.counts["verdicts"] == 12
    once_more = run(queue, "review_conflicts", f"inputs.labellers=[{strict}]", torch, "recipe.accept_agreed=true")
    assert once_more.counts["verdicts"] == 0
    assert len(tables.rows(queue, AUDIT_VERDICT)) == 12


def test_pairs_that_labellers_kept_are_neither_exported_to_experts_nor_counted_as_open(queue, strict):
    with pytest.raises(ConfigError, match=r"batch new has no routes; run review_conflicts first"):
        run(queue, "export_review", "recipe.routes=[to_expert]")
    again = [row for row in queued(queue) if row["batch"] == "new"]
    lowered = {row["query_id"]: {"grade": 0} if row["query_id"] == "q0" else {} for row in again}
    put(queue, REVIEW_QUEUE, [row | lowered[row["query_id"]] | {"batch": "b3", "created_at": DAY[5]} for row in again])
    record = run(queue, "review_conflicts", f"inputs.labellers=[{strict}]", "placement.engine=torch")
    assert (record.counts["kept"], record.counts["agreed_on_another"], record.counts["to_expert"]) == (4, 8, 8)

    run(queue, "export_review", "recipe.routes=[to_expert]", "recipe.formats=[parquet]")
    rows = parquet.read_table(queue.path("reviews", "b3", "review.parquet")).to_pylist()
    assert {row["query_id"] for row in rows} == {"q1", "q2"}
    put(queue, ANNOTATION_CONSENSUS, [row | {"num_marks": 1, "agreement": 1.0, "judge": "human"} for row in JUDGED])
    report = run(queue, "audit_report", "recipe.batches=[b3]")
    assert report.counts == {"queued": 12, "judged": 4, "changed": 0}
    # the random six are four that were kept and two of the others
    assert report.metrics["judges_differ"] == pytest.approx(2 / 6)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_vllm_judges_the_queue_as_torch_does(queue, labeller):
    """About 2 minutes: real Ray Data and vLLM."""
    words = [f"inputs.labellers=[{labeller}]", "placement.engine=vllm", "placement.part_rows=5"]
    record = run(queue, "review_conflicts", *words)
    assert (record.counts["asked"], record.counts["rejected"]) == (12, 0)
    by_vllm = tables.rows(queue, REVIEW_GRADE).sort_by([("query_id", "ascending"), ("product_id", "ascending")])
    tables.open_table(queue, PAIR_GRADE).delete()
    assert run(queue, "review_conflicts", words[0], "placement.engine=torch").counts["asked"] == 12
    by_torch = tables.rows(queue, REVIEW_GRADE).sort_by([("query_id", "ascending"), ("product_id", "ascending")])
    for name in ("p0", "p1", "p2"):
        np.testing.assert_allclose(by_vllm[name].to_numpy(), by_torch[name].to_numpy(), atol=1e-3)
