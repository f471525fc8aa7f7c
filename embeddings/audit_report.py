"""What reviews of doubtful pairs found: shares changed by slice with intervals, and the paper's figures beside ours.

The random part of the queue tells of all conflicts that waited: strata weigh by their size, which is the number drawn
over the chance of being drawn. The priority part tells of itself alone, as a hit rate. Pairs that labellers kept count
as judged and unchanged, but only in the share in which the other pairs of their stratum have a verdict by now: else an
unfinished review would look as if nothing changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from embeddings.intervals import Draw, Share, stratified_share, wilson

RANDOM, PRIORITY, BOTH = "random", "priority", "all"
FIGURES = ("judges_differ", "settled_against", "labels_changed", "labels_changed_so_far")
PAPER = {"judges_differ": 0.234, "settled_against": 0.818, "labels_changed": 0.0574}
"""Xi et al. 2026 (arXiv 2602.17654), on the audit of engagement: of conflicts those where stronger judges differ from
the person, of these those settled against the person, of labels those changed."""
MEANT = {
    "judges_differ": "conflicts where the labellers' joint grade is not the human one",
    "settled_against": "of these with an expert's verdict: settled against the human grade",
    "labels_changed": "human grades that would change if all conflicts were reviewed",
    "labels_changed_so_far": "human grades that have changed so far",
}


@dataclass(frozen=True)
class ReviewedPair:
    """A queued pair and what came of it.

    Attributes:
        batch: that asked.
        stratum: data set, traffic, category and kind.
        stratum_size: conflicts of the stratum that waited when the batch was drawn.
        is_random: whether it was drawn at random.
        grade: the human grade in doubt.
        verdict: the newest verdict's grade; None where none is in.
        guideline: version it was decided under; empty: unknown.
        is_by_person: whether a person decided.
        is_kept: whether labellers kept the human grade and no verdict says otherwise.
        joint_grade: of the labellers; None where they were not asked, or one gave none.
    """

    batch: str
    stratum: tuple[str, str, str, str]
    stratum_size: int
    is_random: bool
    grade: int
    verdict: int | None = None
    guideline: str = ""
    is_by_person: bool = True
    is_kept: bool = False
    joint_grade: int | None = None

    @property
    def is_changed(self) -> bool:
        """Whether the verdict is not the human grade."""
        return self.verdict is not None and self.verdict != self.grade


class _Found(NamedTuple):
    """Of a stratum: what it stands for, what was tried, what changed, and what of that went up."""

    draw: Draw
    num_up: int


Slicer = Callable[[ReviewedPair], str]
SLICES: dict[str, Slicer] = {
    "all": lambda _: "",
    "dataset": lambda pair: pair.stratum[0],
    "traffic": lambda pair: pair.stratum[1],
    "category": lambda pair: pair.stratum[2],
    "kind": lambda pair: pair.stratum[3],
    "stratum": lambda pair: " / ".join(pair.stratum),
    "batch": lambda pair: pair.batch,
}


def report_rows(pairs: Sequence[ReviewedPair], num_conflicts: int, num_labels: int) -> list[dict[str, Any]]:
    """Rows of audit_report but run_id and created_at.

    Args:
        pairs: all of the queue that the report is about.
        num_conflicts: conflicts there are now.
        num_labels: human grades there are.
    """
    rows = []
    for part in (RANDOM, PRIORITY):
        own = [pair for pair in pairs if pair.is_random == (part == RANDOM)]
        for name, slicer in SLICES.items():
            rows += [_row(part, name, value, held, _by_stratum(held)) for value, held in _parted(own, slicer).items()]
        rows += _by_guideline(part, own)
    return rows + _figures(pairs, rows, num_conflicts, num_labels)


def _parted(pairs: Iterable[ReviewedPair], slicer: Callable[[ReviewedPair], Any]) -> dict[Any, list[ReviewedPair]]:
    parts: dict[Any, list[ReviewedPair]] = {}
    for pair in pairs:
        parts.setdefault(slicer(pair), []).append(pair)
    return dict(sorted(parts.items()))


def _by_stratum(pairs: Sequence[ReviewedPair]) -> list[_Found]:
    return [_of_stratum(held) for held in _parted(pairs, lambda pair: (pair.batch, *pair.stratum)).values()]


def _of_stratum(pairs: Sequence[ReviewedPair]) -> _Found:
    num_decided = sum(pair.verdict is not None for pair in pairs)
    num_kept = sum(pair.is_kept for pair in pairs)
    num_open = len(pairs) - num_kept
    told = num_decided / num_open if num_open else 1.0
    changed = [pair for pair in pairs if pair.is_changed]
    draw = Draw(pairs[0].stratum_size, num_decided + num_kept * told, len(changed))
    return _Found(draw, sum(_is_up(pair) for pair in changed))


def _is_up(pair: ReviewedPair) -> bool:
    return pair.verdict is not None and pair.verdict > pair.grade


def _by_guideline(part: str, pairs: Sequence[ReviewedPair]) -> list[dict[str, Any]]:
    """By version of the guideline: pairs with a verdict, each standing for as many as all decided of its stratum do."""
    decided = [pair for pair in pairs if pair.verdict is not None]
    num_decided = {key: len(held) for key, held in _parted(decided, lambda pair: (pair.batch, *pair.stratum)).items()}
    rows = []
    for version, held in _parted(decided, lambda pair: pair.guideline).items():
        found = []
        for key, own in _parted(held, lambda pair: (pair.batch, *pair.stratum)).items():
            draw, num_up = _of_stratum(own)
            found.append(_Found(draw._replace(size=draw.size * len(own) / num_decided[key]), num_up))
        rows.append(_row(part, "guideline", version, held, found))
    return rows


def _row(
    part: str, slice_name: str, name: str, pairs: Sequence[ReviewedPair], found: Sequence[_Found]
) -> dict[str, Any]:
    changed = [pair for pair in pairs if pair.is_changed]
    num_up = sum(_is_up(pair) for pair in changed)
    tried = [one for one in found if one.draw.trials]
    up_share: float | None = num_up / len(changed) if changed else None
    if part == RANDOM:
        share = stratified_share([one.draw for one in found])
        if changed:
            of_each = [one.draw.size / one.draw.trials for one in tried]
            ups = sum(weight * one.num_up for weight, one in zip(of_each, tried, strict=True))
            up_share = ups / sum(weight * one.draw.successes for weight, one in zip(of_each, tried, strict=True))
    else:
        share = _plain_share(len(changed), sum(one.draw.trials for one in found))
    return {
        "part": part,
        "slice": slice_name,
        "name": name,
        "num_queued": len(pairs),
        "num_judged": sum(pair.verdict is not None or pair.is_kept for pair in pairs),
        "num_changed": len(changed),
        "num_up": num_up,
        "stands_for": sum(one.draw.size for one in tried) if part == RANDOM else None,
        "up_share": up_share,
        **_ends(share),
    }


def _plain_share(successes: int, trials: float) -> Share | None:
    return Share(successes / trials, *wilson(successes / trials, trials)) if trials else None


def _ends(share: Share | None) -> dict[str, float | None]:
    return dict(zip(("share", "low", "high"), share or (None, None, None), strict=True))


def _figures(
    pairs: Sequence[ReviewedPair], rows: Sequence[dict[str, Any]], num_conflicts: int, num_labels: int
) -> list[dict[str, Any]]:
    """The paper's three figures as ours are."""
    asked = [pair for pair in pairs if pair.joint_grade is not None]
    differing = [pair for pair in asked if pair.joint_grade != pair.grade]
    random = [pair for pair in asked if pair.is_random]
    draws = [
        Draw(held[0].stratum_size, len(held), sum(pair.joint_grade != pair.grade for pair in held))
        for held in _parted(random, lambda pair: (pair.batch, *pair.stratum)).values()
    ]
    settled = [pair for pair in differing if pair.verdict is not None and pair.is_by_person]
    against = sum(pair.is_changed for pair in settled)
    changed = next((row for row in rows if (row["part"], row["slice"]) == (RANDOM, "all")), None)
    of_labels = num_conflicts / num_labels if num_labels else 0.0
    known = changed is not None and changed["share"] is not None
    expected = Share(*(changed[end] * of_labels for end in ("share", "low", "high"))) if changed and known else None
    so_far = sum(pair.is_changed for pair in pairs)
    exact = so_far / num_labels if num_labels else None
    facts = (
        (RANDOM, random, [pair for pair in differing if pair.is_random], stratified_share(draws)),
        (BOTH, settled, [pair for pair in settled if pair.is_changed], _plain_share(against, len(settled))),
        (
            RANDOM,
            [pair for pair in pairs if pair.is_random],
            [p for p in pairs if p.is_random and p.is_changed],
            expected,
        ),
        (
            BOTH,
            pairs,
            [pair for pair in pairs if pair.is_changed],
            None if exact is None else Share(exact, exact, exact),
        ),
    )
    return [
        {
            "part": part,
            "slice": "figure",
            "name": name,
            "num_queued": len(of),
            "num_judged": sum(pair.verdict is not None or pair.is_kept for pair in of),
            "num_changed": len(counted),
            "num_up": sum(map(_is_up, counted)),
            "stands_for": None,
            "up_share": None,
            **_ends(share),
        }
        for name, (part, of, counted, share) in zip(FIGURES, facts, strict=True)
    ]


def audit_page(subtitle: str, rows: Sequence[dict[str, Any]], num_conflicts: int, num_labels: int) -> str:
    """The report as Markdown.

    Args:
        subtitle: which run this is.
        rows: of `report_rows`.
        num_conflicts: conflicts there are now.
        num_labels: human grades there are.
    """
    lines = ["# Review of doubtful grades", "", subtitle, ""]
    lines += [f"{num_conflicts:,} conflicts among {num_labels:,} human grades. Intervals are 95 %.", ""]
    for part, title, note in PARTS:
        own = [row for row in rows if row["part"] == part and row["slice"] != "figure"]
        lines += [f"## {title}", "", note, ""]
        if not own:
            lines += ["None of it was drawn.", ""]
            continue
        lines += [
            "| by | | asked | judged | changed | share changed | up | down |",
            "|---|---|---:|---:|---:|---|---:|---:|",
            *(_line(row) for row in own),
            "",
        ]
    lines += ["## Beside the paper", "", "| figure | ours | paper |", "|---|---|---|"]
    for row in rows:
        if row["slice"] == "figure":
            held_against = f"{PAPER[row['name']]:.2%}" if row["name"] in PAPER else ""
            lines.append(f"| {MEANT[row['name']]} | {_cell(row, digits=2)} | {held_against} |")
    return "\n".join([*lines, "", PAPER_NOTE, ""])


PARTS = (
    (
        RANDOM,
        "Drawn at random",
        "Tells of all conflicts that waited. Strata weigh by their size; intervals are Wilson's, of many Yan and Su's.",
    ),
    (PRIORITY, "Drawn by priority", "Tells of these pairs alone: how often a review by priority is worth it."),
)
PAPER_NOTE = (
    "The paper audited 30 % of its labels and changed 5.74 % of them (Mine and Refine, arXiv 2602.17654). Its "
    "conflicts are pairs of high engagement with grade 0 and of low engagement with grade 2."
)


def _line(row: dict[str, Any]) -> str:
    name = str(row["name"]).replace("|", "\\|") or ("" if row["slice"] == "all" else "(none)")
    ups = ["", ""] if row["up_share"] is None else [f"{row['up_share']:.0%}", f"{1 - row['up_share']:.0%}"]
    judged = f"{row['num_judged']:,} ({row['num_judged'] / row['num_queued']:.0%})"
    cells = [row["slice"], name, f"{row['num_queued']:,}", judged, f"{row['num_changed']:,}", _cell(row), *ups]
    return f"| {' | '.join(cells)} |"


def _cell(row: dict[str, Any], digits: int = 1) -> str:
    """A share with its interval, where it has one."""
    if row["share"] is None:
        return "unknown"
    value = f"{row['share']:.{digits}%}"
    if row["low"] == row["high"] == row["share"]:
        return value
    return f"{value} [{row['low']:.{digits}%}, {row['high']:.{digits}%}]"
