"""The notebooks on the loop's shop: cell by cell in this process, and as `make notebook` runs them."""

import ast
import io
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import matplotlib
import numpy as np
import pytest

from conf.load import load_job
from embeddings.audit_report import PAPER, ReviewedPair, report_rows
from jobs import build_audit
from lake import tables
from lake.schemas import ANNOTATOR_CONFUSION, AUDIT_CONFLICT, AUDIT_REPORT, CLICK_MODEL_ROUND
from lake.storage import Lake
from notebooks.render import Cell, NotebookError, parse
from tests.fakes import put

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted(path for path in (ROOT / "notebooks").glob("*.py") if path.name != "render.py")
REVIEWED = [("market", "head", "", "doubtful")] * 2
CONFUSED = ((0.9, 0.1, 0.0), (0.2, 0.7, 0.1), (0.0, 0.1, 0.9))


def link(lake, *names, to):
    """Tables of another lake, to be read only."""
    Path(to.path("tables")).mkdir(parents=True, exist_ok=True)
    for name in names:
        Path(to.table(name)).symlink_to(lake.table(name))


@pytest.fixture(scope="module")
def shop(finished, tmp_path_factory):
    """The shop of the loop with what its jobs found, two reports of reviews, and an annotator's confusions."""
    lake = Lake(str(tmp_path_factory.mktemp("shop") / "lake"))
    link(finished[0], *(path.name for path in Path(finished[0].path("tables")).iterdir()), to=lake)
    pairs = [
        ReviewedPair("b", stratum, 9, True, grade, verdict=0, joint_grade=0) for grade, stratum in enumerate(REVIEWED)
    ]
    for run_id, day in (("first", 1), ("second", 2)):
        rows = report_rows(pairs[:day], num_conflicts=9, num_labels=100)
        written = {"run_id": run_id, "created_at": datetime(2026, 1, day, tzinfo=UTC)}
        put(lake, AUDIT_REPORT, [row | written for row in rows])
    told = {"dataset": "market", "kind": "annotator", "annotator": "A01", "marks": 1.0, "num_marks": 9.0}
    cells = [(true, grade, share) for true, shares in enumerate(CONFUSED) for grade, share in enumerate(shares)]
    put(
        lake,
        ANNOTATOR_CONFUSION,
        [
            told | {"true_grade": true, "grade": grade, "probability": share, "true_share": 1 / 3}
            for true, grade, share in cells
        ],
    )
    return lake


def run_cells(name, lake, spark, monkeypatch):
    """What the cells of a notebook show, and the figures that they draw, run in this process on the shared session."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    monkeypatch.setenv("ASSAY_LAKE", lake.root)
    monkeypatch.setenv("ASSAY_QUERY", "")
    names, shown = {"spark": spark}, []
    for cell in parse((ROOT / "notebooks" / f"{name}.py").read_text(encoding="utf-8"), name):
        if cell.is_markdown:
            continue
        tree = ast.parse(cell.text)
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, name, "exec"), names)
        if last is not None:
            shown.append(eval(compile(ast.Expression(last.value), name, "eval"), names))
    figures = [pyplot.figure(number) for number in pyplot.get_fignums()]
    for figure in figures:
        figure.savefig(io.BytesIO())
    pyplot.close("all")
    return [value for value in shown if value is not None], len(figures)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_short_and_defines_nothing(path):
    source = path.read_text(encoding="utf-8")
    assert len(source.splitlines()) < 60
    defined = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
    assert not [node for node in ast.walk(ast.parse(source)) if isinstance(node, defined)]
    cells = parse(source, path.stem)
    assert cells[0].is_markdown
    assert all(len(cell.text.splitlines()) <= 12 for cell in cells)


@pytest.mark.filterwarnings("ignore:FigureCanvasAgg is non-interactive:UserWarning")
class TestOnAShop:
    """Each notebook on the same lake; its numbers are those of the tables."""

    def test_the_overview_shows_all_conflicts_the_first_twenty_and_the_newest_review(self, shop, spark, monkeypatch):
        (recipe, counts, shares, first, report, figures), drawn = run_cells("audit_overview", shop, spark, monkeypatch)
        conflicts = tables.rows(shop, AUDIT_CONFLICT).to_pylist()
        assert recipe == load_job(build_audit.Config, "build_audit", "dev").recipe
        assert counts["All"].iloc[-1] == len(conflicts) > 0
        assert shares["num_conflicts"].sum() == len(conflicts)
        best = sorted(conflicts, key=lambda row: (-row["priority"], row["query_id"], row["product_id"]))[:20]
        assert list(first["product_id"]) == [row["product_id"] for row in best]
        assert first["title"].notna().all()
        # the second report has two pairs, of which one changed
        whole = report[(report["part"] == "random") & (report["slice"] == "all")]
        assert list(whole["num_changed"]) == [1]
        assert figures.loc["labels_changed", "paper"] == PAPER["labels_changed"]
        assert figures.loc["judges_differ", "share"] == pytest.approx(0.5)
        assert drawn == 2

    def test_a_drilldown_judges_the_pairs_as_the_audit_did(self, shop, spark, monkeypatch):
        (query, rules, evidence, bounds), drawn = run_cells("query_drilldown", shop, spark, monkeypatch)
        conflicts = tables.rows(shop, AUDIT_CONFLICT).to_pylist()
        first = min(conflicts, key=lambda row: (-row["priority"], row["query_id"], row["product_id"]))
        assert list(query["query_id"]) == [first["query_id"]]
        expected = sorted(
            (row["kind"], row["wrong_probability"]) for row in conflicts if row["query_id"] == first["query_id"]
        )
        found = rules.dropna(subset="kind")
        assert sorted(zip(found["kind"], found["wrong_probability"], strict=True)) == [
            (kind, pytest.approx(probability)) for kind, probability in expected
        ]
        assert list(rules["why"].str.startswith("no conflict")) == list(rules["kind"].isna())
        assert evidence["marks"].str.contains(", ").all()
        assert len(bounds) == 1
        assert drawn == 1

    def test_annotators_stand_with_kappa_bias_and_confusion(self, shop, spark, monkeypatch):
        (agreement, everyone, _, confusion), drawn = run_cells("annotator_quality", shop, spark, monkeypatch)
        assert agreement["slice"].iloc[0] == "all"
        assert len(everyone) == 5
        assert everyone["kappa"].is_monotonic_increasing
        assert confusion.to_numpy().reshape(3, 3) == pytest.approx(np.array(CONFUSED))
        assert drawn == 1

    def test_places_have_looks_beside_raw_rates_and_the_fit_its_rounds(self, shop, spark, monkeypatch):
        (places, fits), drawn = run_cells("position_bias", shop, spark, monkeypatch)
        assert list(places["position"]) == list(range(1, 11))
        assert places["examination"][0] == places["relative_rate"][0] == 1
        assert fits["round"].squeeze() == tables.rows(shop, CLICK_MODEL_ROUND).num_rows > 1
        assert drawn == 2

    def test_rates_stand_by_grade_and_stratum(self, shop, spark, monkeypatch):
        (rates, whole), drawn = run_cells("engagement_by_grade", shop, spark, monkeypatch)
        assert set(rates.index.get_level_values("name")) == {"click_rate", "cart_rate", "purchase_rate"}
        assert list(whole.columns) == [0, 1, 2]
        clicks = whole.xs("click_rate", level="name").loc["market"]
        assert clicks[0] < clicks[2]
        assert drawn == 3

    def test_a_lake_without_reviews_and_confusions_still_shows_the_rest(
        self, shop, spark, monkeypatch, tmp_path, capsys
    ):
        lake = Lake(str(tmp_path / "lake"))
        link(shop, "run_record", "audit_conflict", "annotation_consensus", "query", "catalog_product", to=lake)
        shown, drawn = run_cells("audit_overview", lake, spark, monkeypatch)
        assert (len(shown), drawn) == (5, 2)
        assert shown[-1].empty
        assert "audit_report writes it: assay run audit_report dev" in capsys.readouterr().out


def test_a_source_becomes_cells():
    source = "# Databricks notebook source\n# MAGIC %md\n# MAGIC # A title\n# MAGIC\n# MAGIC Text.\n\n"
    source += "# COMMAND ----------\n# why\nx = 1\n\n\n# COMMAND ----------\n\n# COMMAND ----------\n# MAGIC %md ## B\n"
    assert parse(source, "n") == [Cell(True, "# A title\n\nText."), Cell(False, "# why\nx = 1"), Cell(True, "## B")]


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("import os\n", "expected '# Databricks notebook source' as the first line, got 'import os'"),
        ("# Databricks notebook source\n# MAGIC %sql\n# MAGIC SELECT 1", "got '# MAGIC %sql'"),
        ("# Databricks notebook source\n# MAGIC %md A\nx = 1", "got '# MAGIC %md A'"),
    ],
)
def test_a_source_that_is_no_notebook_is_one_sentence(source, sentence):
    with pytest.raises(NotebookError, match=sentence):
        parse(source, "n")


def rendered(*words):
    """Exit code and output of the renderer, from a folder that is not the project's."""
    command = [sys.executable, str(ROOT / "notebooks" / "render.py"), *words]
    return subprocess.run(command, cwd="/", capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["overview"], "no such notebook; give one of annotator_quality, audit_overview"),
        (["audit_overview", "quiet=1"], "expected NAME and some of lake="),
    ],
)
def test_bad_usage_of_the_renderer_is_one_sentence(words, sentence):
    done = rendered(*words)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_make_notebook_writes_html_and_a_failed_cell_is_one_sentence(shop, tmp_path):
    """About a minute: a kernel and a Spark session of its own."""
    make = ["make", "-o", "install", f"BIN={Path(sys.executable).parent}", "notebook", f"LAKE={shop.root}"]
    done = subprocess.run([*make, "NAME=query_drilldown"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    html = Path(ROOT, done.stdout.splitlines()[-1]).read_text(encoding="utf-8")
    assert "wrong_probability" in html
    assert "image/png" in html
    assert "vnd.jupyter.stderr" not in html.rpartition("</head>")[2]
    assert 'src="http' not in html
    empty, out = tmp_path / "empty", tmp_path / "out.html"
    empty.mkdir()
    failed = rendered("position_bias", f"lake={empty}", f"out={out}")
    assert failed.returncode == 1
    assert "assay: notebook position_bias, cell 2: LakeError: place_count: no such table" in failed.stderr
    assert "ingest_events writes it" in failed.stderr
    assert not out.exists()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_notebook_runs_through_a_spark_connect_server(shop, connect_url, tmp_path):
    """About 2 minutes."""
    out = tmp_path / "out.html"
    done = rendered("query_drilldown", f"lake={shop.root}", f"connect_url={connect_url}", f"out={out}")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == str(out)
    assert "likely_grade" in out.read_text(encoding="utf-8")
