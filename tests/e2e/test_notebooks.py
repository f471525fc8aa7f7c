"""The notebooks on a small audited shop: cell by cell in this process, and as `make notebook` runs them."""

import ast
import io
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import matplotlib
import pytest

from conf.load import load_job
from embeddings.audit_report import PAPER, ReviewedPair, report_rows
from jobs import build_audit, build_consensus, build_engagement, ingest, ingest_events, measure_annotators, simulate
from lake import tables
from lake.schemas import AUDIT_CONFLICT, AUDIT_REPORT, CLICK_MODEL_ROUND
from lake.storage import Lake
from notebooks.render import Cell, NotebookError, parse
from tests.fakes import put

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted(path for path in (ROOT / "notebooks").glob("*.py") if path.name != "render.py")
JOBS = {
    simulate: ("num_products=80", "num_queries=12", "num_sessions=300", "annotated_products_per_query=10"),
    ingest: (),
    ingest_events: (),
    build_consensus: ("method=dawid_skene",),
    build_engagement: (),
    build_audit: ("min_impressions=5", "min_wrong_probability=0.05"),
    measure_annotators: (),
}


@pytest.fixture(scope="module")
def shop(tmp_path_factory, spark):
    """A lake in which a shop was audited, its annotators measured, and three conflicts reviewed."""
    lake = Lake(str(tmp_path_factory.mktemp("shop") / "lake"))
    for module, recipe in JOBS.items():
        name = module.__name__.removeprefix("jobs.")
        words = [f"lake={lake.root}", *(f"recipe.{word}" for word in recipe)]
        module.run(load_job(module.Config, name, "dev", words))
        if module is simulate:
            # a log comes in a folder per delivery
            (log,) = Path(lake.path("raw", "market", "events")).glob("*.gz")
            delivered = log.parent / "2026-01" / log.name
            delivered.parent.mkdir()
            log.rename(delivered)
    pairs = [
        ReviewedPair("b", ("market", "head", "", "doubtful"), 9, True, grade, verdict=0, joint_grade=0)
        for grade in (0, 1, 2)
    ]
    for run_id, day in (("first", 1), ("second", 2)):
        rows = report_rows(pairs[:day], num_conflicts=9, num_labels=100)
        put(
            lake,
            AUDIT_REPORT,
            [row | {"run_id": run_id, "created_at": datetime(2026, 1, day, tzinfo=UTC)} for row in rows],
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
        assert (recipe.min_impressions, recipe.min_wrong_probability) == (5, 0.05)
        assert counts.loc["All", "All"].squeeze() == len(conflicts) > 0
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
        # of a pair of one grade some mark must be given
        assert confusion.T.groupby("true_grade").sum().T.to_numpy().ravel() == pytest.approx(1, abs=0.01)
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
        clicks = whole.loc[("market", "click_rate")]
        assert clicks[0] < clicks[2]
        assert drawn == 3

    def test_a_lake_without_reviews_and_confusions_still_shows_the_rest(
        self, shop, spark, monkeypatch, tmp_path, capsys
    ):
        lake = Lake(str(tmp_path / "lake"))
        Path(lake.path("tables")).mkdir(parents=True)
        for name in ("run_record", "audit_conflict", "annotation_consensus", "query", "catalog_product"):
            Path(lake.table(name)).symlink_to(shop.table(name))
        shown, drawn = run_cells("audit_overview", lake, spark, monkeypatch)
        assert (len(shown), drawn) == (4, 2)
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
    assert "stderr" not in html.split("<body", 1)[1].split("</style>")[-1]
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
