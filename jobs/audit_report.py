"""What reviews found: grades re-judged and changed with intervals, by slice, and the paper's figures beside ours."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Annotated, Any

import pyarrow as pa

from conf.load import ConfigError, meaning, settings
from embeddings.audit_report import ReviewedPair, audit_page, report_rows
from jobs import job
from jobs.labelling import PAIR, read
from lake import tables
from lake.runs import Run, RunRecord
from lake.schemas import (
    ANNOTATION_CONSENSUS,
    AUDIT_CONFLICT,
    AUDIT_REPORT,
    AUDIT_VERDICT,
    JUDGES_PREFIX,
    REVIEW_QUEUE,
    REVIEW_ROUTE,
    TableSpec,
)
from lake.storage import replace_text

ASKED = [*PAIR, "batch", "traffic", "category", "kind", "stratum_size", "inclusion_probability", "grade", "created_at"]
DECIDED = [*PAIR, "grade", "expert", "decided_at", "guideline", "batch"]


@settings
class Inputs:
    """The queue and what came of it."""

    review_queue: job.TableVersion = "newest"
    audit_conflict: job.TableVersion = "newest"
    annotation_consensus: job.TableVersion = "newest"
    audit_verdict: job.TableVersion = job.IF_THERE
    review_route: job.TableVersion = job.IF_THERE


@settings
class AuditReportRecipe:
    """What is reported."""

    batches: Annotated[tuple[str, ...], meaning("batches of the queue; none: all")] = ()


@settings
class Config:
    """Settings of audit_report."""

    lake: job.LakeRoot = job.DEFAULT_LAKE
    setting: job.SettingName = "dev"
    inputs: Inputs = Inputs()
    recipe: AuditReportRecipe = AuditReportRecipe()
    placement: job.InProcess = job.InProcess()


def run(config: Config) -> RunRecord:
    """A row per slice in audit_report, and one Markdown page under reports/.

    Raises:
        ConfigError: a batch is not in the queue, or the queue is empty.
    """
    current = job.begin(config, "audit_report")
    queue = _queue(current, config.recipe.batches)
    pairs = reviewed_pairs(queue, _rows(current, AUDIT_VERDICT, DECIDED), _rows(current, REVIEW_ROUTE, ROUTED))
    num_conflicts, num_labels = (
        len(read(current, spec, ["dataset"])) for spec in (AUDIT_CONFLICT, ANNOTATION_CONSENSUS)
    )
    rows = report_rows(pairs, num_conflicts, num_labels)
    now = datetime.now(UTC)
    data = pa.Table.from_pylist(
        [row | {"run_id": current.run_id, "created_at": now} for row in rows], schema=AUDIT_REPORT.schema
    )
    tables.append_once(current.lake, AUDIT_REPORT, data, run_id=current.run_id, part="report")
    page = f"reports/audit-{current.fingerprint}.md"
    subtitle = f"Run {current.run_id}, {now:%Y-%m-%d %H:%M} UTC; batches {', '.join(sorted({p.batch for p in pairs}))}."
    replace_text(current.lake.path(page), audit_page(subtitle, rows, num_conflicts, num_labels))
    figures = {row["name"]: row["share"] for row in rows if row["slice"] == "figure" and row["share"] is not None}
    return current.finish(
        rows=len(rows),
        outputs={AUDIT_REPORT.name: tables.version(current.lake, AUDIT_REPORT) or 0, "report": page},
        counts={
            "queued": len(pairs),
            "judged": sum(pair.verdict is not None or pair.is_kept for pair in pairs),
            "changed": sum(pair.is_changed for pair in pairs),
        },
        metrics=figures,
    )


ROUTED = [*PAIR, "batch", "route", "joint_grade"]


def _queue(current: Run, batches: Sequence[str]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = read(current, REVIEW_QUEUE, ASKED).to_pylist()
    known = {row["batch"] for row in rows}
    if not known or not known.issuperset(batches):
        raise ConfigError(
            f"recipe.batches={list(batches)}: the queue holds {', '.join(sorted(known)) or 'no batch'}; "
            "run build_review, or name batches that are there"
        )
    return [row for row in rows if not batches or row["batch"] in batches]


def _rows(current: Run, spec: TableSpec, columns: list[str]) -> list[dict[str, Any]]:
    """Rows of a table that may not be there yet."""
    found: list[dict[str, Any]] = read(current, spec, columns).to_pylist() if spec.name in current.inputs else []
    return found


def reviewed_pairs(
    queue: Sequence[Mapping[str, Any]], verdicts: Sequence[Mapping[str, Any]], routes: Sequence[Mapping[str, Any]]
) -> list[ReviewedPair]:
    """Every queued pair with the newest verdict of its batch, or, of those without a batch, since it was queued."""
    # of two at the same time the one that counts in the consensus comes last
    in_order = sorted(verdicts, key=lambda row: (row["expert"], row["grade"]), reverse=True)
    in_order.sort(key=lambda row: row["decided_at"])
    newest = {(row["batch"], *_pair(row)): row for row in in_order}
    routed = {(row["batch"], *_pair(row)): row for row in routes}
    pairs = []
    for row in queue:
        key = (row["batch"], *_pair(row))
        verdict, without_batch = newest.get(key), newest.get((None, *_pair(row)))
        if verdict is None and without_batch is not None and without_batch["decided_at"] >= row["created_at"]:
            verdict = without_batch
        route = routed.get(key)
        pairs.append(
            ReviewedPair(
                batch=row["batch"],
                stratum=(row["dataset"], row["traffic"], row["category"], row["kind"]),
                stratum_size=row["stratum_size"],
                is_random=row["inclusion_probability"] is not None,
                grade=row["grade"],
                verdict=verdict["grade"] if verdict else None,
                guideline=(verdict["guideline"] or "") if verdict else "",
                is_by_person=verdict is not None and not verdict["expert"].startswith(JUDGES_PREFIX),
                is_kept=verdict is None and route is not None and route["route"] == "kept",
                joint_grade=route["joint_grade"] if route else None,
            )
        )
    return pairs


def _pair(row: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(row[name] for name in PAIR)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of the job."""
    return job.main("audit_report", Config, run, argv)


if __name__ == "__main__":
    sys.exit(main())
