"""Writes the HTML report of the newest evaluation: score distributions, tables, worst queries."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np

from conf.load import ConfigError, meaning, settings
from embeddings import report as page
from jobs import job
from lake import runs, tables
from lake.runs import Run, RunRecord
from lake.schemas import CATALOG_PRODUCT, EVALUATION, EVALUATION_PAIR, EVALUATION_QUERY
from lake.storage import LakeError, replace_text

MODELS = ("pretrained", "stage1", "stage2")
RETRIEVAL = (
    "ndcg@10",
    "ndcg@50",
    "ndcg@100",
    "recall@10",
    "recall@50",
    "recall@100",
    "precision@10",
    "judged_ndcg@10",
    "judged@10",
)
SEPARATION = ("auc_2v1", "auc_1v0", "auc_2v0", "auc_2v1_per_query", "auc_1v0_per_query", "auc_2v0_per_query")
MARGINS = ("average_margin", "worst_case_margin")
AGREEMENT = ("accuracy", "within_1", "quadratic_weighted_kappa")


@settings
class Inputs:
    """The newest evaluation at these versions."""

    evaluation: job.TableVersion = "newest"
    evaluation_query: job.TableVersion = "newest"
    evaluation_pair: job.TableVersion = "newest"
    catalog_product: job.TableVersion = "newest"
    labeller: Annotated[str, meaning("folder of the labeller that is shown, below the lake; empty: the newest")] = ""


@settings
class ReportRecipe:
    """What the report shows."""

    num_worst_queries: Annotated[int, meaning("queries with the lowest NDCG@10 shown", "queries", ge=0)] = 15


@settings
class Config:
    """Settings of report."""

    lake: job.LakeRoot = job.DEFAULT_LAKE
    setting: job.SettingName = "dev"
    inputs: Inputs = Inputs()
    recipe: ReportRecipe = ReportRecipe()
    placement: job.InProcess = job.InProcess()


def run(config: Config) -> RunRecord:
    """One file under reports/, named by what it shows."""
    current = job.begin(config, "report")
    rows = _newest_evaluation(current)
    last = [row["model"] for row in rows][-1]
    html = page.render(
        f"Assay: {', '.join(sorted({row['dataset'] for row in rows}))}",
        f"run {rows[0]['run_id']}, {rows[0]['created_at']:%Y-%m-%d %H:%M} UTC, split {rows[0]['split']}",
        _plots(current, rows),
        "Cosine of query and product for every judged pair of the evaluated queries, by human grade. Bars are "
        "quartiles, circles means. Training should move the grades apart and make each of them narrow.",
        [
            _metric_sheet("Retrieval over the full catalogue", rows, RETRIEVAL),
            _metric_sheet("Separation of the grades", rows, (*SEPARATION, *MARGINS)),
            *_labeller_sheets(current, config.inputs.labeller),
            *_worst_sheets(current, rows, last, config.recipe.num_worst_queries),
            _steps_sheet(current),
        ],
    )
    name = f"reports/{current.fingerprint}.html"
    replace_text(current.lake.path(name), html)
    return current.finish(rows=len(rows), outputs={"report": name})


def _newest_evaluation(current: Run) -> list[dict[str, Any]]:
    rows = tables.rows(current.lake, EVALUATION, version=int(current.inputs["evaluation"])).to_pylist()
    if not rows:
        raise LakeError(f"evaluation: no rows in lake={current.lake.root}; run evaluate_retrieval first")
    newest = max(rows, key=lambda row: row["created_at"])["run_id"]
    order = {name: place for place, name in enumerate(MODELS)}
    kept = [row for row in rows if row["run_id"] == newest]
    for row in kept:
        for name in ("metrics", "gain_over_pretrained", "gain_low", "gain_high"):
            row[name] = dict(row[name])
    return sorted(kept, key=lambda row: (row["dataset"], order.get(row["model"], len(order)), row["model"]))


def _plots(current: Run, rows: Sequence[dict[str, Any]]) -> list[str]:
    pairs = tables.rows(
        current.lake,
        EVALUATION_PAIR,
        version=int(current.inputs["evaluation_pair"]),
        columns=["dataset", "model", "grade", "score"],
        where=[("run_id", "=", rows[0]["run_id"])],
    ).to_pandas()
    figures = []
    for row in rows:
        held = pairs[(pairs["dataset"] == row["dataset"]) & (pairs["model"] == row["model"])]
        by_grade = {
            grade: np.asarray(held.loc[held["grade"] == grade, "score"], dtype=np.float64) for grade in page.GRADE_NAMES
        }
        figures.append(page.violin(f"{row['dataset']}: {row['model']}", by_grade))
    return figures


def _metric_sheet(title: str, rows: Sequence[dict[str, Any]], names: Sequence[str]) -> page.Sheet:
    shown = [name for name in names if any(name in row["metrics"] for row in rows)]
    left_out = sum({row["dataset"]: row["num_queries_left_out"] for row in rows}.values())
    return page.Sheet(
        title,
        ["data set", "model", "queries", *shown],
        [
            [row["dataset"], row["model"], f"{row['num_queries']:,}", *(_cell(row, name) for name in shown)]
            for row in rows
        ],
        f"Brackets: 95 % interval of the paired difference to pretrained, bootstrap over queries. Unjudged products "
        f"count as grade 0; {left_out} queries without a grade above 0 are left out.",
    )


def _cell(row: dict[str, Any], name: str) -> str:
    value = row["metrics"].get(name)
    if value is None:
        return "-"
    low, high = row["gain_low"].get(name), row["gain_high"].get(name)
    return f"{value:.4f}" if low is None else f"{value:.4f} [{low:+.3f} {high:+.3f}]"


def _labeller_sheets(current: Run, folder: str) -> list[page.Sheet]:
    tunings = [record for record in runs.records(current.lake) if record.job == "tune_labeller"]
    if folder:
        tunings = [record for record in tunings if record.outputs["labeller"] == folder]
        if not tunings:
            raise ConfigError(
                f"inputs.labeller={folder!r}: no tune_labeller of lake={current.lake.root} wrote it; "
                "assay runs lists what did run"
            )
    if not tunings:
        return []
    record = tunings[-1]
    kinds = (("fine-tuned", ""), ("majority class", "majority_"), ("pretrained cosine", "cosine_"))
    lines = [
        [
            title,
            *(f"{record.metrics[prefix + key]:.3f}" if prefix + key in record.metrics else "-" for key in AGREEMENT),
        ]
        for title, prefix in kinds
    ]
    return [page.Sheet("Labeller against people, test queries", ["labeller", *AGREEMENT], lines)]


def _worst_sheets(current: Run, rows: Sequence[dict[str, Any]], model: str, count: int) -> list[page.Sheet]:
    found = tables.rows(
        current.lake,
        EVALUATION_QUERY,
        version=int(current.inputs["evaluation_query"]),
        where=[("run_id", "=", rows[0]["run_id"]), ("model", "=", model)],
    ).to_pylist()
    if not count or not found:
        return []
    worst = sorted(found, key=lambda row: (dict(row["metrics"])["ndcg@10"], row["dataset"], row["query_id"]))[:count]
    wanted = sorted({product for row in worst for product in row["top_product_ids"][:3]})
    catalog = tables.rows(
        current.lake,
        CATALOG_PRODUCT,
        version=int(current.inputs["catalog_product"]),
        columns=["dataset", "product_id", "title"],
        where=[("product_id", "in", wanted)],
    ).to_pylist()
    titles = {(row["dataset"], row["product_id"]): row["title"] for row in catalog}
    lines = [
        [
            row["query"],
            f"{dict(row['metrics'])['ndcg@10']:.3f}",
            " | ".join(titles.get((row["dataset"], product), product)[:70] for product in row["top_product_ids"][:3]),
        ]
        for row in worst
    ]
    return [page.Sheet(f"Worst queries of {model}", ["query", "ndcg@10", "its three best products"], lines)]


def _steps_sheet(current: Run) -> page.Sheet:
    lines = [
        [record.job, record.setting, f"{record.rows:,}", f"{record.seconds:.1f}", record.run_id, record.fingerprint]
        for record in runs.records(current.lake)
    ]
    return page.Sheet("Runs in this lake", ["job", "setting", "rows", "seconds", "run", "fingerprint"], lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of the job."""
    return job.main("report", Config, run, argv)


if __name__ == "__main__":
    sys.exit(main())
