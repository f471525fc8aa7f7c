"""The page of `label_catalog`: what was graded, what it took beside the plan, how far the judge can be trusted."""

from __future__ import annotations

from collections.abc import Mapping

import pyarrow as pa
import pyarrow.compute as pc

from embeddings import report as page
from embeddings.calibration import PROBABILITIES
from embeddings.labeller import LabellerCard
from embeddings.labeller_report import SHOWN, interval_cell
from embeddings.metrics import Interval
from jobs.grading import STRONGER
from lake import tables
from lake.schemas import CATALOG_PRODUCT, LABELLER_EVALUATION, PAIR_GRADE, QUERY
from lake.storage import Lake

MOST_SHOWN = 25
"""Pairs of the greatest value that are listed."""
PLANNED = {"pairs": "asked", "tokens": "tokens", "engine_hours": "engine_hours", "cost": "cost"}


def catalog_page(
    subtitle: str,
    lake: Lake,
    run_id: str,
    card: LabellerCard,
    waiting: pa.Table,
    counts: Mapping[str, int],
    metrics: Mapping[str, float],
) -> str:
    """One self-contained HTML page.

    Args:
        subtitle: which run this is.
        lake: that holds ledger and evaluation.
        run_id: of this run.
        card: of the labeller.
        waiting: what was before the run: keys with address, sources, relevance, demand, value.
        counts: of the run.
        metrics: of the run, planned and taken.
    """
    names = ["address", "grade", *PROBABILITIES]
    written = tables.rows(lake, PAIR_GRADE, columns=names, where=[("run_id", "=", run_id)])
    row = pc.index_in(waiting["address"], value_set=written["address"].combine_chunks())
    graded = waiting.append_column("row", row).filter(pc.is_valid(row))
    for name in names[1:]:
        graded = graded.append_column(name, written[name].take(graded["row"]))
    graded = graded.sort_by([("value", "descending"), ("address", "ascending")])
    counted = [[name.replace("_", " "), f"{value:,}"] for name, value in counts.items()]
    sheets = [
        page.Sheet("What was done", ["", "number"], counted),
        page.Sheet("Plan and what it took", ["", "planned", "taken", "off by"], plan_rows(counts, metrics)),
        page.Sheet("Speed", ["", ""], [[n, f"{metrics[n]:,.1f}"] for n in RATES if n in metrics]),
        page.Sheet("Grades by what found the pair", ["found by", "pairs", "0", "1", "2"], _by_source(graded)),
        page.Sheet(
            "The most valuable pairs of this run", TOP, _top(lake, graded), "value: searches x chance of relevance"
        ),
        _agreement(lake, card),
    ]
    return page.render("Assay: the catalogue's grades", subtitle, [], "", sheets)


RATES = ("pairs_per_sec", "tokens_per_sec", "tokens_per_pair", "cached_tokens_per_pair", "start_sec")
TOP = ["query", "product", "value", "grade", *PROBABILITIES]


def plan_rows(counts: Mapping[str, int], metrics: Mapping[str, float]) -> list[list[str]]:
    """Planned and taken pairs, tokens, engine-hours and money, and by how much the plan was off."""
    taken = {name: metrics.get(name, 0.0) for name in ("engine_hours", "cost")}
    taken |= {"asked": float(counts["asked"]), "tokens": counts["asked"] * metrics.get("tokens_per_pair", 0.0)}
    rows = []
    names = dict(PLANNED)
    if "planned_stronger_pairs" in metrics:
        names["stronger_pairs"], taken["stronger"] = "stronger", float(counts[f"{STRONGER}asked"])
    for name, own in names.items():
        planned, value = metrics[f"planned_{name}"], taken[own]
        off = f"{value / planned - 1:+.1%}" if planned else "-"
        rows.append([name.replace("_", "-"), f"{planned:,.4g}", f"{value:,.4g}", off])
    return rows


def _by_source(graded: pa.Table) -> list[list[str]]:
    rows = []
    for source in sorted(set(pc.list_flatten(graded["sources"]).to_pylist())):
        own = graded.filter(pa.array([source in found for found in graded["sources"].to_pylist()], pa.bool_()))
        by_grade = [pc.sum(pc.equal(own["grade"], grade)).as_py() or 0 for grade in range(3)]
        rows.append([source, f"{len(own):,}", *(f"{number / len(own):.1%}" for number in by_grade)])
    return rows


def _top(lake: Lake, graded: pa.Table) -> list[list[str]]:
    first = graded.slice(0, MOST_SHOWN)
    sides = ((QUERY, "query_id", "text"), (CATALOG_PRODUCT, "product_id", "title"))
    shown = []
    for spec, key, text in sides:
        wanted = [("dataset", "in", first["dataset"].to_pylist()), (key, "in", first[key].to_pylist())]
        found = tables.rows(lake, spec, columns=["dataset", key, text], where=wanted).to_pylist() if len(first) else []
        shown.append({(row["dataset"], row[key]): row[text] for row in found})
    rows = []
    for row in first.to_pylist():
        names = [texts.get((row["dataset"], row[key]), "") for texts, (_, key, _) in zip(shown, sides, strict=True)]
        rows.append([*names, f"{row['value']:.2f}", str(row["grade"]), *(f"{row[name]:.3f}" for name in PROBABILITIES)])
    return rows


def _agreement(lake: Lake, card: LabellerCard) -> page.Sheet:
    """Agreement with people of the newest evaluate_labeller that measured this labeller."""
    title = "Agreement with people on test queries"
    rows = []
    if tables.exists(lake, LABELLER_EVALUATION):
        rows = tables.rows(lake, LABELLER_EVALUATION).sort_by([("created_at", "descending")]).to_pylist()
    own = [row for row in rows if card.fingerprint in row["judge"] and not row["slice"].startswith("injection")]
    if not own:
        at_tuning = [[name, f"{value:.3f}"] for name, value in sorted(card.metrics.items())]
        return page.Sheet(title, ["", "at tuning"], at_tuning, "Run evaluate_labeller for intervals and slices.")
    lines = []
    for row in own:
        if row["run_id"] == own[0]["run_id"]:
            values, low, high = (dict(row[name]) for name in ("metrics", "low", "high"))
            found = {name: Interval(values[name], low[name], high[name]) for name in SHOWN if name in values}
            cells = [interval_cell(found.get(name)) for name in SHOWN]
            lines.append([row["dataset"], row["slice"] or "all", f"{row['num_pairs']:,}", *cells])
    note = "In brackets: 95 % interval, bootstrap over queries. From the newest run of evaluate_labeller."
    return page.Sheet(title, ["data set", "slice", "pairs", *SHOWN], lines, note)
