"""Experts' answers as read from a file: each with the verdict it makes, or the reason why it makes none."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any

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
from jobs.label_file import read_pairs
from lake.schemas import AUDIT_VERDICT, CONSENSUS, JUDGES_PREFIX

FORMATS = (".csv", ".parquet", ".jsonl", ".json")
REQUIRED = ("dataset", "query_id", "product_id", "verdict", "expert")
LATEST = timedelta(days=1)
"""How far ahead a verdict may lie, for clocks and zones; one further ahead would count for ever."""
NO_ROW = "the line is not a row of its file's format"
CONTRADICTION = "the same expert gives the pair another grade at the same time"

Pair = tuple[str, str, str]


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


def check_answer(answer: Answer, batches: Mapping[Pair, Sequence[str]], recipe: VerdictRecipe) -> None:
    """Puts the verdict or the reason into the answer.

    Args:
        answer: to be checked.
        batches: of every pair of the queue, the newest last.
        recipe: names of experts and the time of answers without one.
    """
    given = {name: text_of(value) for name, value in answer.given.items()}
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


def text_of(value: Any) -> str:
    """A cell as text without outer blanks; empty for none."""
    return "" if value is None else str(value).strip()


def _time_of(answer: Answer, recipe: VerdictRecipe) -> datetime:
    told = answer.given["decided_at"]
    if not text_of(told):
        told = recipe.decided_at
    if not text_of(told):
        raise ValueError("decided_at is missing; give recipe.decided_at=TIME for answers that have none")
    decided_at = parse_time(told)
    if decided_at > datetime.now(UTC) + LATEST:
        raise ValueError(f"decided_at {decided_at.isoformat()} lies in the future")
    return decided_at


def refuse_contradictions(answers: Iterable[Answer]) -> None:
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
