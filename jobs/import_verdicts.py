"""Experts' answers to a batch of the review queue into verdicts; what cannot be used goes to quarantine."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa

from conf.load import ConfigError, meaning, settings
from embeddings.review_records import (
    PLACE,
    argilla_answers,
    as_read,
    is_argilla,
    parse_grade,
    parse_time,
    plain_cell,
    table_answer,
)
from jobs import job
from jobs.label_file import read_pairs
from lake import tables
from lake.runs import Run, RunRecord
from lake.schemas import AUDIT_VERDICT, CONSENSUS, JUDGES_PREFIX, QUARANTINE, REVIEW_QUEUE

FORMATS = (".csv", ".parquet", ".jsonl", ".json")
REQUIRED = ("dataset", "query_id", "product_id", "verdict", "expert")
LATEST = timedelta(days=1)
"""How far ahead a verdict may lie, for clocks and zones; one further ahead would count for ever."""
NO_ROW = "the line is not a row of its file's format"
CONTRADICTION = "the same expert gives the pair another grade at the same time"

Pair = tuple[str, str, str]


@settings
class Inputs:
    """What experts answered, and the queue that asked them."""

    file: Annotated[str, meaning("CSV, Parquet or JSON lines as exported and filled in, or what Argilla exports")] = ""
    review_queue: job.TableVersion = "newest"
    audit_verdict: job.TableVersion = job.IF_THERE


@settings
class VerdictRecipe:
    """How answers are read."""

    experts: Annotated[dict[str, str], meaning("names of experts by the ids that the file has for them")] = (
        dataclasses.field(default_factory=dict)
    )
    decided_at: Annotated[str, meaning("time of answers that have none, as Argilla's; empty: such are refused")] = ""
    max_rejected_fraction: Annotated[
        float, meaning("share of the answers that may be quarantined before the run fails", "0..1", ge=0, le=1)
    ] = 0.1


@settings
class Config:
    """Settings of import_verdicts."""

    lake: job.LakeRoot = job.DEFAULT_LAKE
    setting: job.SettingName = "dev"
    inputs: Inputs = Inputs()
    recipe: VerdictRecipe = VerdictRecipe()
    placement: job.InProcess = job.InProcess()


@dataclasses.dataclass
class Answer:
    """An answer as given, with the verdict it makes or the reason why it makes none.

    Attributes:
        given: as of `table_answer` or `argilla_answers`.
        raw: the row as read.
        verdict: a row of audit_verdict.
        reason: why it is refused.
        is_repeated: whether the file or the lake holds the same verdict already.
    """

    given: Mapping[str, Any]
    raw: str
    verdict: dict[str, Any] = dataclasses.field(default_factory=dict)
    reason: str = ""
    is_repeated: bool = False

    @property
    def key(self) -> tuple[Any, ...]:
        """What a verdict is told by."""
        return tuple(self.verdict[name] for name in AUDIT_VERDICT.key)


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
    _refuse_contradictions(answers)
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


def read_answers(path: str) -> tuple[list[Answer], int]:
    """The answers of a file, lines that are no rows among them with the reason; and how many pairs have none.

    Raises:
        ConfigError: no such file, a format we do not read, or a column is missing.
        ValueError: the file cannot be read as what its name says.
    """
    if not Path(path).is_file() or Path(path).suffix not in FORMATS:
        raise ConfigError(f"inputs.file={path!r}: expected an existing file that ends in {', '.join(FORMATS)}")
    rows, unread = _read_json(path) if Path(path).suffix in (".jsonl", ".json") else _read_table(path)
    answers = [Answer({}, line, reason=NO_ROW) for line in unread]
    num_blank = 0
    for row in rows:
        given = list(argilla_answers(row)) if is_argilla(row) else [table_answer(row)]
        found = [Answer(one, as_read(row)) for one in given if one is not None]
        num_blank += not found
        answers += found
    return answers, num_blank


def _read_table(path: str) -> tuple[list[dict[str, Any]], list[str]]:
    table, unread = read_pairs(path, required=(), added=())
    names = table.column_names
    missing = [name for name in REQUIRED if name not in names]
    if missing and not is_argilla(dict.fromkeys(names)):
        raise ConfigError(f"{path}: column {missing[0]!r} is missing; fill in a file that export_review wrote")
    rows: list[dict[str, Any]] = table.to_pylist()
    if path.endswith(".csv"):
        rows = [{name: plain_cell(cell) if cell else cell for name, cell in row.items()} for row in rows]
    return rows, unread


def _read_json(path: str) -> tuple[list[dict[str, Any]], list[str]]:
    """Objects of a list, or of lines."""
    text = Path(path).read_text(encoding="utf-8-sig")
    if path.endswith(".json"):
        try:
            found = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: cannot be read as json: {error}") from error
        listed = found if isinstance(found, list) else [found]
        return [row for row in listed if isinstance(row, dict)], [as_read(r) for r in listed if not isinstance(r, dict)]
    rows, unread = [], []
    for line in text.split("\n"):
        try:
            row = json.loads(line) if line.strip() else None
        except json.JSONDecodeError:
            row = line
        if isinstance(row, dict):
            rows.append(row)
        elif row is not None:
            unread.append(line)
    return rows, unread


def _batches_of_pairs(current: Run) -> dict[Pair, list[str]]:
    """Batches that asked for a pair, the newest last."""
    version = int(current.inputs[REVIEW_QUEUE.name])
    names = [*PLACE, "created_at"]
    queue = tables.rows(current.lake, REVIEW_QUEUE, version=version, columns=names).sort_by("created_at")
    found: dict[Pair, list[str]] = {}
    for row in queue.select(list(PLACE)).to_pylist():
        found.setdefault((row["dataset"], row["query_id"], row["product_id"]), []).append(row["batch"])
    return found


def check_answer(answer: Answer, batches: Mapping[Pair, Sequence[str]], recipe: VerdictRecipe) -> None:
    """Puts the verdict or the reason into the answer.

    Args:
        answer: to be checked.
        batches: of every pair of the queue, the newest last.
        recipe: names of experts and the time of answers without one.
    """
    given = {name: _text(value) for name, value in answer.given.items()}
    given |= {name: str(answer.given[name]) for name in PLACE if answer.given[name] is not None}
    pair = (given["dataset"], given["query_id"], given["product_id"])
    asked = batches.get(pair, ())
    expert = recipe.experts.get(given["expert"], given["expert"])
    is_known = bool(asked) and given["batch"] in ("", *asked)
    reasons = [
        (not is_known, "the pair is not in the queue" + (f" of batch {given['batch']}" if given["batch"] else "")),
        (not given["verdict"], "there is no verdict"),
        (not expert, "expert is missing"),
        (expert == CONSENSUS or expert.startswith(JUDGES_PREFIX), f"expert {expert!r} is no name of a person"),
    ]
    answer.reason = next((reason for is_broken, reason in reasons if is_broken), "")
    if answer.reason:
        return
    try:
        grade, decided_at = parse_grade(answer.given["verdict"]), _time_of(answer, recipe)
    except ValueError as error:
        answer.reason = str(error)
        return
    answer.verdict = dict(zip(("dataset", "query_id", "product_id"), pair, strict=True)) | {
        "grade": grade,
        "expert": expert,
        "decided_at": decided_at,
        "note": given["note"] or None,
        "guideline": given["guideline"] or None,
        "batch": given["batch"] or asked[-1],
    }


def _text(value: Any) -> str:
    return "" if value is None else str(value).strip()


def _time_of(answer: Answer, recipe: VerdictRecipe) -> datetime:
    told = answer.given["decided_at"]
    if not _text(told):
        told = recipe.decided_at
    if not _text(told):
        raise ValueError("decided_at is missing; give recipe.decided_at=TIME for answers that have none")
    decided_at = parse_time(told)
    if decided_at > datetime.now(UTC) + LATEST:
        raise ValueError(f"decided_at {decided_at.isoformat()} lies in the future")
    return decided_at


def _refuse_contradictions(answers: Iterable[Answer]) -> None:
    """Of answers by the same expert to a pair at one time: all where grades differ, the later where the rest does."""
    by_key: dict[tuple[Any, ...], list[Answer]] = {}
    for answer in answers:
        if not answer.reason:
            by_key.setdefault(answer.key, []).append(answer)
    for first, *others in by_key.values():
        if any(other.verdict["grade"] != first.verdict["grade"] for other in others):
            for answer in (first, *others):
                answer.reason = CONTRADICTION
            continue
        for other in others:
            other.is_repeated = other.verdict == first.verdict
            if not other.is_repeated:
                other.reason = "another row of the same expert, pair and time has the same grade and other content"


def _compare_with_lake(current: Run, answers: Iterable[Answer]) -> None:
    """Marks what the lake holds already, and refuses what contradicts it."""
    if not tables.exists(current.lake, AUDIT_VERDICT):
        return
    # the newest rows, whatever the inputs are pinned to: what was written since must not be written again
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
            "dataset": _text(answer.given.get("dataset")),
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
