"""What experts get to see of a doubtful pair, and what they answer: cells of a spreadsheet and records of Argilla.

Argilla 2's record is an object with `id` (its external id), `fields`, `metadata`, `suggestions` by question and, when
it comes back, `responses`: by question a list of value and user, or flattened into `grade.responses`,
`grade.responses.users` and `grade.responses.status`, or, from its server, a list of answers with status and times.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from datetime import UTC, date, datetime
from typing import Any
from urllib.parse import quote, unquote

from lake.schemas import Grade

GRADE_NAMES = {int(grade): grade.name.lower() for grade in Grade}
QUESTION, NOTE = "grade", "note"
"""Questions that experts answer in Argilla."""
SUBMITTED = "submitted"
PLACE = ("batch", "dataset", "query_id", "product_id")
"""What says which pair of which batch a row is about."""
ANSWER = (*PLACE, "verdict", "expert", "decided_at", "note", "guideline")
"""What an answer holds, as it was given."""
KINDS = {
    "loved_but_irrelevant": "shoppers choose it more often than other products, though people call it irrelevant",
    "ignored_but_exact": "shoppers pass it over, though people call it exact",
    "labeller_disagrees": "a labeller that never saw this pair gives another grade",
    "doubtful": "raters, shoppers and labeller together make the grade doubtful",
}
FORMULA = re.compile(r"'*(?:[\t\r\n]|\s*[=+\-@\uff0b\uff0d\uff1d\uff20])")
"""Begins a cell that a spreadsheet would run, behind any apostrophes; the last four are full-width signs."""


def guarded_cell(text: str) -> str:
    """The text with an apostrophe before it where a spreadsheet would run it; `plain_cell` takes it off again."""
    return f"'{text}" if FORMULA.match(text) else text


def plain_cell(text: str) -> str:
    """The text as it was before `guarded_cell`; other texts stay as they are."""
    return text[1:] if text.startswith("'") and FORMULA.match(text) else text


def evidence_in_words(row: Mapping[str, Any]) -> str:
    """What puts a grade in doubt, for a person to read.

    Args:
        row: of review_queue.
    """
    told = [f"{KINDS.get(row['kind'], row['kind'])}."]
    if row["impressions"]:
        told.append(
            f"Shown {row['impressions']} times, {row['clicks']} clicks, {row['purchases']} purchases: "
            f"{row['corrected_rate']:.1f} times the clicks of an average product at its places."
        )
    else:
        told.append("No shopper was shown it.")
    if row["click_rate"] is not None:
        told.append(
            f"Clicks per look {row['click_rate']:.2f} (95 % interval {row['click_rate_low']:.2f} to "
            f"{row['click_rate_high']:.2f})."
        )
    for name, columns in (("Labeller", "p"), ("All evidence", "posterior_")):
        shares = [row[f"{columns}{grade}"] for grade in GRADE_NAMES]
        if None not in shares:
            listed = ", ".join(f"{GRADE_NAMES[grade]} {share:.0%}" for grade, share in enumerate(shares))
            told.append(f"{name}: {listed}.")
    if row["num_marks"] is not None:
        told.append(f"Raters behind the grade: {row['num_marks']}.")
    return " ".join([told[0][0].upper() + told[0][1:], *told[1:]])


def argilla_record(row: Mapping[str, Any]) -> dict[str, Any]:
    """A pair as a record of Argilla; the grade that all evidence makes most probable is suggested.

    Args:
        row: of the export: PLACE, the texts, human_grade, kind, evidence, guideline, and what `suggestion_of` reads.
    """
    shown = {name: row[name] or "" for name in ("query", "title", "brand", "category", "description", "evidence")}
    grade = f"{row['human_grade']} {row['human_grade_name']}"
    return {
        "id": record_id(row),
        "fields": shown | {"human_grade": grade},
        "metadata": {name: row[name] for name in (*PLACE, "kind", "guideline", "rank")},
        "suggestions": suggestion_of(row),
        "responses": {},
        "vectors": {},
    }


def suggestion_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """The most probable grade of the audit, by question; empty where the audit gave no probabilities."""
    shares = [row[f"posterior_{grade}"] for grade in GRADE_NAMES]
    if None in shares:
        return {}
    grade = max(GRADE_NAMES, key=lambda one: shares[one])
    return {QUESTION: {"value": GRADE_NAMES[grade], "score": shares[grade], "agent": "audit"}}


def record_id(row: Mapping[str, Any]) -> str:
    """The external id of a pair: its parts, each quoted as in a URL, joined by strokes."""
    return "/".join(quote(str(row[name]), safe="") for name in PLACE)


def place_of(identity: str) -> dict[str, str]:
    """The parts of an external id; empty where it is none of `record_id`."""
    parts = identity.split("/")
    return dict(zip(PLACE, map(unquote, parts), strict=True)) if len(parts) == len(PLACE) else {}


def is_argilla(row: Mapping[str, Any]) -> bool:
    """Whether an object is a record of Argilla and not a row of the exported table."""
    return "responses" in row or f"{QUESTION}.responses" in row


def table_answer(row: Mapping[str, Any]) -> dict[str, Any] | None:
    """The answer in a row of the exported table; None where the expert left it blank."""
    answer = {name: row.get(name) for name in ANSWER}
    return None if all(_is_blank(answer[name]) for name in ("verdict", "note")) else answer


def argilla_answers(record: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The submitted answers in a record of Argilla, one per user; where no status is told, all count as submitted."""
    metadata = record.get("metadata")
    metadata = metadata if isinstance(metadata, Mapping) else record
    place = place_of(str(record.get("external_id") or record.get("id") or ""))
    fixed = {name: metadata.get(name) for name in PLACE} | place | {"guideline": metadata.get("guideline")}
    for response in _responses(record):
        if response.pop("status") in (None, SUBMITTED):
            yield fixed | {"decided_at": record.get("updated_at")} | response


def _responses(record: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Verdict, expert, note, status and, where told, decided_at of every user's response, in any of three shapes."""
    responses = record.get("responses")
    if isinstance(responses, list):
        for one in responses:
            values = {name: value.get("value") for name, value in (one.get("values") or {}).items()}
            told = {"decided_at": one["updated_at"]} if one.get("updated_at") else {}
            yield {
                "verdict": values.get(QUESTION),
                "note": values.get(NOTE),
                "expert": one.get("user_id"),
                "status": one.get("status"),
            } | told
        return
    by_question = responses if isinstance(responses, Mapping) else _unflattened(record)
    notes = {one["user_id"]: one["value"] for one in by_question.get(NOTE) or []}
    for one in by_question.get(QUESTION) or []:
        yield {
            "verdict": one["value"],
            "expert": one["user_id"],
            "status": one.get("status"),
            "note": notes.get(one["user_id"]),
        }


def _unflattened(record: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    found = {}
    for question in (QUESTION, NOTE):
        columns = [record.get(f"{question}.responses{part}") or [] for part in ("", ".users", ".status")]
        size = max(map(len, columns))
        padded = [[*column, *[None] * (size - len(column))] for column in columns]
        found[question] = [
            {"value": value, "user_id": user, "status": status} for value, user, status in zip(*padded, strict=True)
        ]
    return found


def parse_grade(value: Any) -> int:
    """A grade given as its number or its name.

    Raises:
        ValueError: it is neither.
    """
    text = str(value).strip().lower()
    by_text = {name: grade for grade, name in GRADE_NAMES.items()} | {str(grade): grade for grade in GRADE_NAMES}
    grade = by_text.get(text.removesuffix(".0"))
    if grade is None or isinstance(value, bool):
        raise ValueError(f"verdict {value!r} is none of 0, 1, 2, {', '.join(GRADE_NAMES.values())}")
    return grade


def parse_time(value: Any) -> datetime:
    """A time as ISO 8601 or a day; without a zone it is UTC.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(value, date) and not isinstance(value, datetime):
        value = datetime(value.year, value.month, value.day)
    try:
        found = value if isinstance(value, datetime) else datetime.fromisoformat(str(value).strip())
        return found.replace(tzinfo=UTC) if found.tzinfo is None else found.astimezone(UTC)
    except (ValueError, OverflowError):
        raise ValueError(f"decided_at {str(value)!r} is no time as in 2026-01-31 or 2026-01-31T12:00:00Z") from None


def as_read(row: Mapping[str, Any]) -> str:
    """A row as JSON, the same for the same content, for quarantine and for telling rows apart."""
    return json.dumps(row, ensure_ascii=False, sort_keys=True, default=str)


def _is_blank(value: Any) -> bool:
    return value is None or not str(value).strip()
