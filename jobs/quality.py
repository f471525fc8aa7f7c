"""The gate before a job's tables: they are profiled, compared with the last published ones, and stopped or let through.

What was measured and expected goes to `table_quality`, of stopped runs too, which never become the standard.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from rich.table import Table

from conf.load import ConfigError
from jobs.job import GateError
from lake import tables
from lake.runs import Run
from lake.schemas import TABLE_QUALITY, TableSpec
from lake.storage import Lake, LakeError
from spark_etl.expectations import Measure, Profile, bounds_of, measure, profile_of
from spark_etl.recipes import QualityRecipe

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

log = logging.getLogger(__name__)

ALL = "all"
MOST_NAMED = 4
"""Broken expectations that an error names; the table holds all."""

Broken = frozenset[tuple[str, str, str]]
"""Table, data set and metric of expectations that were not met."""


@dataclass(frozen=True)
class Standard:
    """What the last run that published a table measured: its data sets' profiles."""

    run_id: str | None = None
    profiles: Mapping[str, Profile] = field(default_factory=dict)


@dataclass(frozen=True)
class Finding:
    """A measure and where it was taken."""

    table: str
    dataset: str
    measure: Measure
    standard: str | None

    @property
    def key(self) -> tuple[str, str, str]:
        """By which it is accepted."""
        return self.table, self.dataset, self.measure.metric


@contextmanager
def gated(current: Run, frames: Mapping[TableSpec, DataFrame], recipe: QualityRecipe, part: str = "") -> Iterator[None]:
    """Lets the body publish the frames where all expectations are met or accepted; else it is never entered.

    Args:
        frames: table -> the rows that the body publishes, persisted where they are dear to compute.
        part: of a run that publishes the same tables several times.

    Raises:
        GateError: an expectation is not met; the history tells of it.
        ConfigError: the recipe accepts a run that was not stopped.
    """
    started = time.monotonic()
    accepted = _accepted(current, recipe.accept)
    found = check(current, frames, recipe)
    broken = [finding for finding in found if not finding.measure.met]
    if stopping := [finding for finding in broken if accepted is not None and finding.key not in accepted]:
        _record(current, found, part, published=False)
        raise GateError(_refusal(current, stopping))
    for finding in broken:
        log.warning("%s: accepted: %s", current.job, sentence(finding))
    seconds = time.monotonic() - started
    log.info("%s: %d tables, %d values measured in %.1f s", current.job, len(frames), len(found), seconds)
    yield
    _record(current, found, part, published=True)


def check(current: Run, frames: Mapping[TableSpec, DataFrame], recipe: QualityRecipe) -> list[Finding]:
    """Every measure of every data set; one that has rows in any of the tables is expected in all of them."""
    from spark_etl.quality import profile_rows

    profiles = {spec.name: profile_rows(frame, spec) for spec, frame in frames.items()}
    standards = _standards(current, list(profiles))
    datasets = {dataset for held in profiles.values() for dataset in held}
    found = []
    for table, held in profiles.items():
        standard, bounds = standards.get(table, Standard()), bounds_of(recipe, table)
        known = {dataset for dataset, profile in standard.profiles.items() if profile.rows}
        for dataset in sorted(datasets | known) or [""]:
            measures = measure(held.get(dataset, Profile(0)), standard.profiles.get(dataset), bounds)
            run_id = standard.run_id if dataset in standard.profiles else None
            found += [Finding(table, dataset, one, run_id) for one in measures]
    return found


def sentence(finding: Finding) -> str:
    """What was measured, expected and there before."""
    one = finding.measure
    is_low = one.at_least is not None and one.value < one.at_least
    limit = f"at least {_shown(one.metric, one.at_least)}" if is_low else f"at most {_shown(one.metric, one.at_most)}"
    before = f"; {_shown(one.metric, one.before)} before" if one.before is not None else ""
    place = f"{finding.table} of {finding.dataset or 'all data sets'}"
    return f"{place}: {one.metric} {_shown(one.metric, one.value)}, expected {limit} ({one.setting}{before})"


def history(lake: Lake, table: str, num_runs: int) -> list[dict[str, Any]]:
    """Rows of table_quality about a table in its newest runs, oldest first, without quantiles.

    Raises:
        LakeError: no run has measured the table.
    """
    names = [name for name in TABLE_QUALITY.column_names if name != "quantiles"]
    held = tables.rows(lake, TABLE_QUALITY, columns=names) if tables.exists(lake, TABLE_QUALITY) else None
    rows: list[dict[str, Any]] = [row for row in held.to_pylist() if row["table_name"] == table] if held else []
    if not rows:
        known = ", ".join(sorted(set(held.column("table_name").to_pylist()))) if held else "none"
        raise LakeError(f"quality: no run in lake={lake.root} has measured a table {table!r}; measured: {known}")
    rows.sort(key=lambda row: row["created_at"])
    newest = list(dict.fromkeys(row["run_id"] for row in rows))[-num_runs:]
    return [row for row in rows if row["run_id"] in newest]


def sheets(rows: Sequence[Mapping[str, Any]]) -> list[Table]:
    """The history as one sheet per job and data set: metrics down, runs across; `!` marks what was not as expected."""
    found = []
    for job, dataset in dict.fromkeys((row["job"], row["dataset"]) for row in rows):
        own = [row for row in rows if (row["job"], row["dataset"]) == (job, dataset)]
        by_run: dict[str, dict[str, Mapping[str, Any]]] = {}
        for row in own:
            by_run.setdefault(row["run_id"], {})[row["metric"]] = row
        title = f"{own[0]['table_name']} of {dataset or 'all data sets'}, by {job}"
        heads = [_head(run_id, list(held.values())) for run_id, held in by_run.items()]
        sheet = Table("metric", *heads, "expected", title=title, box=None)
        for metric in dict.fromkeys(row["metric"] for row in own):
            cells = [held.get(metric) for held in by_run.values()]
            sheet.add_row(metric, *(_cell(cell) for cell in cells), _expected(cells[-1]))
        found.append(sheet)
    return found


def _accepted(current: Run, accept: str) -> Broken | None:
    """What may be broken; None: anything."""
    if accept in ("", ALL):
        return None if accept else frozenset()
    rows = _rows(current, [("run_id", "=", accept), ("published", "=", False)])
    if not rows:
        raise ConfigError(
            f"recipe.quality.accept={accept!r}: no stopped run of {current.job} in lake={current.lake.root} has this "
            "id; assay quality TABLE lists them"
        )
    later = [("published", "=", True), ("created_at", ">", rows[0]["created_at"]), ("metric", "=", "rows")]
    if _rows(current, later):
        log.warning("%s: accept=%s is spent, since a later run has published; it is left out", current.job, accept)
        return frozenset()
    return frozenset((row["table_name"], row["dataset"], row["metric"]) for row in rows if not row["met"])


def _standards(current: Run, names: Sequence[str]) -> dict[str, Standard]:
    """Table -> what its last published run by this job measured."""
    heads = _rows(current, [("published", "=", True), ("metric", "=", "rows"), ("table_name", "in", list(names))])
    newest = {row["table_name"]: row["run_id"] for row in sorted(heads, key=lambda row: row["created_at"])}
    if not newest:
        return {}
    measured: dict[str, dict[str, dict[str, tuple[float, list[float] | None]]]] = {name: {} for name in newest}
    for row in _rows(current, [("run_id", "in", sorted(set(newest.values())))]):
        if newest.get(row["table_name"]) == row["run_id"]:
            values = measured[row["table_name"]].setdefault(row["dataset"], {})
            values[row["metric"]] = (row["value"], row["quantiles"])
    return {
        name: Standard(newest[name], {dataset: profile_of(values) for dataset, values in held.items()})
        for name, held in measured.items()
    }


def _rows(current: Run, where: list[tuple[str, str, Any]]) -> list[dict[str, Any]]:
    if not tables.exists(current.lake, TABLE_QUALITY):
        return []
    own = [("job", "=", current.job), *where]
    rows: list[dict[str, Any]] = tables.rows(current.lake, TABLE_QUALITY, where=own).to_pylist()
    return rows


def _record(current: Run, found: Sequence[Finding], part: str, *, published: bool) -> None:
    now = datetime.now(UTC)
    rows = [
        {
            "run_id": current.run_id,
            "job": current.job,
            "table_name": one.table,
            "dataset": one.dataset,
            "metric": one.measure.metric,
            "value": float(one.measure.value),
            "at_least": one.measure.at_least,
            "at_most": one.measure.at_most,
            "met": one.measure.met,
            "published": published,
            "standard": one.standard,
            "quantiles": one.measure.quantiles,
            "created_at": now,
        }
        for one in found
    ]
    names = ",".join(dict.fromkeys(one.table for one in found))
    tables.append_once(
        current.lake,
        TABLE_QUALITY,
        pa.Table.from_pylist(rows, schema=TABLE_QUALITY.schema),
        run_id=current.run_id,
        part=f"quality/{names}{part}",
    )


def _refusal(current: Run, stopping: Sequence[Finding]) -> str:
    named = "; ".join(sentence(finding) for finding in stopping[:MOST_NAMED])
    more = f"; and {len(stopping) - MOST_NAMED} more" if len(stopping) > MOST_NAMED else ""
    return (
        f"{current.job}: {named}{more}; nothing was published: see assay quality {stopping[0].table} "
        f"lake={current.lake.root}, then mend the input, or accept this once with "
        f"recipe.quality.accept={current.run_id}"
    )


def _head(run_id: str, rows: Sequence[Mapping[str, Any]]) -> str:
    is_broken = not all(row["met"] for row in rows)
    state = "stopped" if not rows[0]["published"] else "accepted" if is_broken else "published"
    return f"{run_id}\n{rows[0]['created_at']:%Y-%m-%d %H:%M}\n{state}"


def _cell(row: Mapping[str, Any] | None) -> str:
    return "-" if row is None else _shown(row["metric"], row["value"]) + ("" if row["met"] else " !")


def _expected(row: Mapping[str, Any] | None) -> str:
    ends = [] if row is None else [(">=", row["at_least"]), ("<=", row["at_most"])]
    return ", ".join(f"{sign} {_shown(row['metric'], end)}" for sign, end in ends if row and end is not None)


def _shown(metric: str, value: float | None) -> str:
    """A value as text; a bound of rows is rounded as it is compared."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if metric == "rows" else f"{value:.3g}"
