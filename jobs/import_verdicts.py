"""Experts' answers to a batch of the review queue into verdicts; what cannot be used goes to quarantine."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Annotated, Any

import pyarrow as pa

from conf.load import meaning, settings
from embeddings.review_records import PLACE, as_read
from jobs import job
from jobs.answers import (
    CONTRADICTION,
    Answer,
    Pair,
    VerdictRecipe,
    check_answer,
    read_answers,
    refuse_contradictions,
    text_of,
)
from lake import tables
from lake.runs import Run, RunRecord
from lake.schemas import AUDIT_VERDICT, QUARANTINE, REVIEW_QUEUE


@settings
class Inputs:
    """What experts answered, and the queue that asked them."""

    file: Annotated[str, meaning("CSV, Parquet or JSON lines as exported and filled in, or what Argilla exports")] = ""
    review_queue: job.TableVersion = "newest"


@settings
class Config:
    """Settings of import_verdicts."""

    lake: job.LakeRoot = job.DEFAULT_LAKE
    setting: job.SettingName = "dev"
    inputs: Inputs = Inputs()
    recipe: VerdictRecipe = VerdictRecipe()
    placement: job.InProcess = job.InProcess()


def run(config: Config) -> RunRecord:
    """Appends a row per usable answer; the same file twice changes nothing the second time.

    Raises:
        ConfigError: no such file, or not one that answers the queue.
        ValueError: too many answers are refused; no verdict is written then.
    """
    current = job.begin(config, "import_verdicts")
    answers, num_blank = read_answers(config.inputs.file)
    batches = _batches_of_pairs(current)
    for answer in answers:
        if not answer.reason:
            check_answer(answer, batches, config.recipe)
    refuse_contradictions(answers)
    _compare_with_lake(current, answers)
    refused = [answer for answer in answers if answer.reason]
    _quarantine(current, refused)
    if len(refused) > config.recipe.max_rejected_fraction * len(answers):
        raise ValueError(
            f"import_verdicts: {len(refused)} of {len(answers)} answers of {config.inputs.file} are refused, above "
            f"recipe.max_rejected_fraction={config.recipe.max_rejected_fraction:g}; no verdict was written, the "
            f"reasons are in the table quarantine of lake={config.lake}, the first: {refused[0].reason}"
        )
    written = append_verdicts(
        current, [answer.verdict for answer in answers if not (answer.reason or answer.is_repeated)]
    )
    counts = {
        "rows": len(answers),
        "verdicts": written,
        "quarantined": len(refused),
        "repeated": len(answers) - len(refused) - written,
        "unanswered": num_blank,
        "experts_differ": _count_differing(answers),
    }
    version = tables.version(current.lake, AUDIT_VERDICT)
    return current.finish(rows=written, outputs={AUDIT_VERDICT.name: version or 0}, counts=counts)


def _batches_of_pairs(current: Run) -> dict[Pair, list[str]]:
    """Batches that asked for a pair, the newest last."""
    version = int(current.inputs[REVIEW_QUEUE.name])
    names = [*PLACE, "created_at"]
    queue = tables.rows(current.lake, REVIEW_QUEUE, version=version, columns=names).sort_by("created_at")
    found: dict[Pair, list[str]] = {}
    for row in queue.select(list(PLACE)).to_pylist():
        found.setdefault((row["dataset"], row["query_id"], row["product_id"]), []).append(row["batch"])
    return found


def _compare_with_lake(current: Run, answers: Iterable[Answer]) -> None:
    """Marks what the lake holds already, and refuses what contradicts it."""
    if not tables.exists(current.lake, AUDIT_VERDICT):
        return
    # the newest rows and no input: what was written by now must not be written again
    held = tables.rows(current.lake, AUDIT_VERDICT, columns=[*AUDIT_VERDICT.key, "grade"]).to_pylist()
    grades = {tuple(row[name] for name in AUDIT_VERDICT.key): row["grade"] for row in held}
    for answer in answers:
        if not answer.reason and answer.key in grades:
            answer.is_repeated = grades[answer.key] == answer.verdict["grade"]
            if not answer.is_repeated:
                answer.reason = f"{CONTRADICTION} in the lake"


def append_verdicts(current: Run, verdicts: Sequence[Mapping[str, Any]]) -> int:
    """Appends rows to audit_verdict, once for the same rows; returns how many were written."""
    if not verdicts:
        tables.create(current.lake, AUDIT_VERDICT)
        return 0
    rows = sorted(verdicts, key=lambda row: [str(row[name]) for name in AUDIT_VERDICT.key])
    data = pa.Table.from_pylist(rows, schema=AUDIT_VERDICT.schema)
    once = tables.append_once(current.lake, AUDIT_VERDICT, data, run_id=_digest(map(as_read, rows)), part="verdicts")
    return len(rows) if once else 0


def _quarantine(current: Run, refused: Sequence[Answer]) -> None:
    """Writes refused answers with their reasons, once for the same answers and reasons."""
    if not refused:
        return
    rows = [
        {
            "run_id": current.run_id,
            "part": "answers",
            "row_number": number,
            "dataset": text_of(answer.given.get("dataset")),
            "table_name": AUDIT_VERDICT.name,
            "row": answer.raw,
            "reason": answer.reason,
            "created_at": datetime.now(UTC),
        }
        for number, answer in enumerate(refused)
    ]
    data = pa.Table.from_pylist(rows, schema=QUARANTINE.schema)
    same = _digest(f"{answer.raw}\x1f{answer.reason}" for answer in refused)
    tables.append_once(current.lake, QUARANTINE, data, run_id=same, part="answers")


def _digest(texts: Iterable[str]) -> str:
    return hashlib.sha256("\x1e".join(texts).encode()).hexdigest()[:16]


def _count_differing(answers: Iterable[Answer]) -> int:
    """Pairs to which the file's experts give several grades."""
    grades: dict[tuple[Any, ...], set[int]] = {}
    for answer in answers:
        if not answer.reason:
            grades.setdefault(answer.key[:3], set()).add(answer.verdict["grade"])
    return sum(len(found) > 1 for found in grades.values())


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of the job."""
    return job.main("import_verdicts", Config, run, argv)


if __name__ == "__main__":
    sys.exit(main())
