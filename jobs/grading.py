"""Pairs into the ledger: what every job that grades shares, from the address of a pair to the row that holds its grade.

A pair that the ledger holds is never asked again; what was answered is written part by part, so that a death loses a
part at most, and each address is there once whoever grades at the same time (`lake.ledger`).
"""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Annotated

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from conf.load import meaning, settings
from embeddings.anchors import AnchorRecipe, drift_sentence, measure_drift, read_anchors
from embeddings.calibration import PROBABILITIES, grades_of, probabilities_of
from embeddings.labeller import LabellerCard, load_labeller_card
from jobs import job, labelling
from lake import ledger, tables
from lake.ledger import Ledger
from lake.progress import write_progress
from lake.runs import Run
from lake.schemas import PAIR_GRADE, QUARANTINE
from lake.storage import Lake
from ray_apps.placements import LabelPlacement

log = logging.getLogger(__name__)

ANCHOR = "anchor-"
"""Before the number of an anchor, where a pair's number would stand."""
BLOCK_PAIRS = 10_000
"""Pairs whose texts are put together at a time."""
STRONGER = "stronger/"
"""What names of the stronger labeller's counts and metrics begin with."""
LEDGER_KEYS = (*labelling.PAIR, "query_hash", "product_hash", "address")


@settings
class GradingRecipe:
    """What is refused. Grades follow from labeller and texts alone."""

    anchors: Annotated[AnchorRecipe, meaning("when the answers to the labeller's anchors stop the run")] = (
        AnchorRecipe()
    )
    max_rejected_fraction: Annotated[
        float, meaning("share of answers without a distribution past which the run fails", ge=0, le=1)
    ] = 0.01
    abstain_risk: Annotated[
        float,
        meaning(
            "expected squared error from which on a grade is an abstention: it is written, and a stronger judge is "
            "asked where there is one; what that one's answer costs, over what a squared error costs",
            gt=0,
        ),
    ] = 0.6


@dataclasses.dataclass
class Graded:
    """What grading did.

    Attributes:
        reused: pairs that the ledger held.
        asked: texts that the engine was asked for.
        labelled: rows written.
        rejected: answers that were no distribution.
        doubles: rows that another run had written in the meantime.
        abstained: answers whose expected squared error is above the recipe's.
        tokens: of the pairs, as the model reads them.
        cached_tokens: of these, not computed anew.
        start_sec: until its first answers.
        answer_sec: from those to its last.
        first_pairs: answers that came with the first.
    """

    reused: int = 0
    asked: int = 0
    labelled: int = 0
    rejected: int = 0
    doubles: int = 0
    abstained: int = 0
    tokens: int = 0
    cached_tokens: int = 0
    start_sec: float = 0.0
    answer_sec: float = 0.0
    first_pairs: int = 0

    @property
    def pairs_per_sec(self) -> float:
        """Steady rate of the engine, its start apart; of the whole where all answers came at once."""
        if self.answer_sec > 0 and self.asked > self.first_pairs:
            return (self.asked - self.first_pairs) / self.answer_sec
        return self.asked / max(self.start_sec, 1e-9)

    def counts(self) -> dict[str, int]:
        """For the run record."""
        names = ("reused", "asked", "labelled", "rejected", "abstained")
        return {name: getattr(self, name) for name in names} | {"written_meanwhile": self.doubles}

    def metrics(self, placement: LabelPlacement) -> dict[str, float]:
        """For the run record; nothing where the engine was not asked."""
        if not self.asked:
            return {}
        seconds = self.start_sec + self.answer_sec
        return {
            "pairs_per_sec": self.pairs_per_sec,
            "tokens_per_sec": self.pairs_per_sec * self.tokens / self.asked,
            "tokens_per_pair": self.tokens / self.asked,
            "cached_tokens_per_pair": self.cached_tokens / self.asked,
            "start_sec": self.start_sec,
            "engine_hours": seconds * placement.num_engines / 3600,
            "cost": placement.cost(seconds),
            "num_engines": placement.num_engines,
            "on_gpu": placement.use_gpu,
            "is_vllm": placement.engine_for(self.asked) == "vllm",
        }


@dataclasses.dataclass(frozen=True)
class Cascade:
    """What grading did with a stronger labeller behind the first.

    Attributes:
        first: of all pairs.
        stronger: of the first's abstentions; None where they go nowhere.
    """

    first: Graded
    stronger: Graded | None = None

    @property
    def labelled(self) -> int:
        """Rows written by both."""
        return self.first.labelled + (self.stronger.labelled if self.stronger else 0)

    def counts(self) -> dict[str, int]:
        """For the run record, the stronger labeller's under its prefix."""
        second = self.stronger.counts() if self.stronger else {}
        return self.first.counts() | {f"{STRONGER}{name}": value for name, value in second.items()}

    def metrics(self, placement: LabelPlacement) -> dict[str, float]:
        """The same; hours and money are those of both together."""
        first, second = (done.metrics(placement) if done else {} for done in (self.first, self.stronger))
        metrics = first | {f"{STRONGER}{name}": value for name, value in second.items()}
        shared = {name for name in ("engine_hours", "cost") if name in first or name in second}
        return metrics | {name: first.get(name, 0.0) + second.get(name, 0.0) for name in shared}


def addressed(keys: pa.Table, card: LabellerCard) -> pa.Table:
    """The pairs with the content address of their grade under a labeller.

    Args:
        keys: columns query_hash and product_hash.
        card: of the labeller.
    """
    hashes = zip(keys["query_hash"].to_pylist(), keys["product_hash"].to_pylist(), strict=True)
    return keys.append_column("address", pa.array([card.address(*both) for both in hashes], pa.string()))


def held_grades(
    lake: Lake, keys: pa.Table, cards: Sequence[LabellerCard]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """What the ledger holds of pairs by several labellers: probabilities, [J, N, 3], and grades, [J, N]; else nan, -1.

    Args:
        lake: that holds the ledger.
        keys: columns query_hash and product_hash; pairs of equal texts have equal grades.
        cards: of the labellers.
    """
    probability_JN3 = np.full((len(cards), len(keys), 3), np.nan)
    grade_JN = np.full((len(cards), len(keys)), -1, dtype=np.int64)
    for judge, card in enumerate(cards):
        addresses = addressed(keys, card)["address"]
        held = ledger.rows_at(lake, addresses, ["address", "grade", *PROBABILITIES])
        row = pc.index_in(addresses, value_set=held["address"].combine_chunks())
        is_held_N, row_K = pc.is_valid(row).to_numpy(), row.drop_null().to_numpy()
        probability_JN3[judge, is_held_N] = probabilities_of(held)[row_K]
        grade_JN[judge, is_held_N] = held["grade"].to_numpy()[row_K]
    return probability_JN3, grade_JN


def waiting_pairs(lake: Lake, keys: pa.Table) -> pa.Table:
    """Those of the pairs whose address the ledger does not hold, one per address, in their order."""
    if not tables.exists(lake, PAIR_GRADE):
        return first_of_each(keys)
    held = Ledger(lake, keys["address"]).holds(keys["address"])
    return first_of_each(keys.filter(pa.array(~held, pa.bool_())))


def first_of_each(keys: pa.Table) -> pa.Table:
    """One pair per address, the first: equal texts are graded once."""
    place = pa.array(np.arange(len(keys)))
    kept = keys.append_column("place", place).group_by("address").aggregate([("place", "min")])["place_min"]
    return keys.take(kept.combine_chunks().sort())


def grade_pairs(
    current: Run,
    keys: pa.Table,
    texts: labelling.PairTexts,
    folder: str,
    recipe: GradingRecipe,
    placement: LabelPlacement,
) -> Graded:
    """Grades the pairs that the ledger does not hold, and writes them there.

    Args:
        current: the run.
        keys: of `texts.keys`, `addressed`.
        texts: that they refer to.
        folder: of the labeller.
        recipe: what is refused.
        placement: engine and portions.

    Raises:
        GateError: the labeller answers otherwise than when it was tuned; nothing is written.
        ValueError: too many answers are no distribution.
    """
    card, book = load_labeller_card(folder), Ledger(current.lake, keys["address"])
    missing = keys.filter(pa.array(~book.holds(keys["address"]), pa.bool_()))
    waiting = first_of_each(missing).sort_by([("query_hash", "ascending"), ("address", "ascending")])
    found = Graded(reused=len(keys) - len(missing))
    log.info("%s: %d texts to grade, %d pairs are in the ledger", current.job, len(waiting), found.reused)
    if len(waiting):
        waiting = with_superseded(current.lake, waiting)
        for rows, answers in _timed(_checked(waiting, texts, folder, recipe, placement), found):
            _write(current, card, book, waiting.take(pa.array(rows)), answers, recipe, found)
            write_progress(
                current.lake.path("runs", current.fingerprint),
                done=found.asked,
                total=len(waiting),
                note=f"pairs graded, {found.pairs_per_sec:.0f}/s",
            )
        found.doubles = book.doubles
        ledger.compact(current.lake)
    # of all texts, not of those asked now: a run that goes on after a death meets the bad ones again
    total = max(pc.count_distinct(keys["address"]).as_py(), 1)
    if found.rejected > recipe.max_rejected_fraction * total:
        raise ValueError(
            f"{current.job}: {found.rejected} of {total} answers were no distribution over the grades, more than "
            f"recipe.max_rejected_fraction={recipe.max_rejected_fraction}; see the quarantine table"
        )
    return found


def grade_with_stronger(
    current: Run,
    keys: pa.Table,
    texts: labelling.PairTexts,
    folders: tuple[str, str],
    recipe: GradingRecipe,
    placement: LabelPlacement,
) -> Cascade:
    """Grades pairs, and puts those on which the labeller abstains before a stronger one, whose rows supersede its own.

    Asking pays where a grade's expected squared error times what such an error costs is more than the answer costs.
    Which pairs those are is read from the ledger, so that a run that goes on after a death finds the same.

    Args:
        current: the run.
        keys: of `texts.keys`, `addressed` under the first labeller.
        texts: that they refer to.
        folders: of the first labeller and of the stronger one, empty for none.
        recipe: when a grade is an abstention, and what is refused.
        placement: engine and portions.
    """
    found = grade_pairs(current, keys, texts, folders[0], recipe, placement)
    if not folders[1]:
        return Cascade(found)
    held = ledger.rows_at(current.lake, keys["address"], ["grade", *PROBABILITIES])
    is_doubtful = expected_squared_error(probabilities_of(held), held["grade"].to_numpy()) > recipe.abstain_risk
    doubtful = keys.take(held["row"].filter(pa.array(is_doubtful, pa.bool_()))).drop_columns(["address"])
    doubtful = addressed(doubtful, load_labeller_card(folders[1]))
    return Cascade(found, grade_pairs(current, doubtful, texts, folders[1], recipe, placement))


Part = tuple[NDArray[np.int64], pa.Table]
"""Rows of the waiting pairs, and the answers to them: columns p0, p1, p2, tokens, cached_tokens."""


def _timed(parts: Iterator[Part], found: Graded) -> Iterator[Part]:
    """Counts what the engine did, and how long until its first answers and from those to its last."""
    began = first = time.monotonic()
    for rows, answers in parts:
        now = time.monotonic()
        if not found.asked:
            found.start_sec, found.first_pairs, first = now - began, len(rows), now
        found.answer_sec = now - first
        found.asked += len(rows)
        found.tokens += pc.sum(answers["tokens"]).as_py()
        found.cached_tokens += pc.sum(answers["cached_tokens"]).as_py()
        yield rows, answers


def _checked(
    waiting: pa.Table, texts: labelling.PairTexts, folder: str, recipe: GradingRecipe, placement: LabelPlacement
) -> Iterator[Part]:
    """Answers to the pairs, held back until those to the labeller's anchors have been found in order.

    Raises:
        GateError: the labeller answers otherwise than when it was tuned.
    """
    from ray_apps.label import label_pairs

    anchors = read_anchors(folder)
    num_anchors = len(anchors) if anchors is not None else 0
    answer_N3, held, num_missing = np.full((num_anchors, 3), np.nan), [], num_anchors
    blocks = _blocks(waiting, texts, anchors)
    for part in label_pairs(blocks, folder, placement, num_pairs=num_anchors + len(waiting)):
        is_anchor = pc.starts_with(part["address"], ANCHOR)
        own, part = part.filter(is_anchor), part.filter(pc.invert(is_anchor))
        if anchors is not None and len(own):
            rows = [int(name.removeprefix(ANCHOR)) for name in own["address"].to_pylist()]
            answer_N3[rows] = probabilities_of(own)
            num_missing -= len(own)
            if not num_missing:
                _check_anchors(anchors, answer_N3, recipe)
        if len(part):
            held.append((np.array(part["address"].to_pylist(), dtype=np.int64), part))
        if not num_missing:
            yield from held
            held.clear()
    if num_missing:
        raise ValueError(f"{num_missing} of {num_anchors} anchors got no answer; nothing was written")


def _blocks(waiting: pa.Table, texts: labelling.PairTexts, anchors: pa.Table | None) -> Iterator[pa.Table]:
    """The anchors, then the pairs' texts, with their numbers for addresses.

    Without their data set: people did not choose these pairs, so the class rates of its judged pairs are not theirs.
    """
    names = ["query", *labelling.TEXTS]
    if anchors is not None:
        numbers = pa.array([f"{ANCHOR}{row:04d}" for row in range(len(anchors))], pa.string())
        yield anchors.select(names).append_column("address", numbers)
    for start in range(0, len(waiting), BLOCK_PAIRS):
        block = waiting.slice(start, BLOCK_PAIRS)
        numbers = pa.array([f"{start + row:012d}" for row in range(len(block))], pa.string())
        yield texts.take(block, names).append_column("address", numbers)


def _check_anchors(anchors: pa.Table, answer_N3: NDArray[np.floating], recipe: GradingRecipe) -> None:
    drift = measure_drift(anchors, answer_N3)
    log.info("%d anchors, largest change of a probability %.2g", len(anchors), drift.largest_change)
    if wrong := drift_sentence(drift, recipe.anchors):
        raise job.GateError(
            f"on its {len(anchors)} anchors the labeller answers otherwise than at tuning: {wrong}; "
            "nothing was written; see what changed in the engine, or tune the labeller again"
        )


def expected_squared_error(probability_N3: NDArray[np.floating], grade_N: NDArray[np.integer]) -> NDArray[np.float64]:
    """Of grades under a judge's probabilities, [N]: 0 where it is certain, up to 4."""
    distance_N3 = np.arange(3)[None, :] - np.asarray(grade_N)[:, None]
    return np.asarray((probability_N3 * distance_N3**2).sum(axis=1), dtype=np.float64)


def _write(
    current: Run,
    card: LabellerCard,
    book: Ledger,
    keys: pa.Table,
    answers: pa.Table,
    recipe: GradingRecipe,
    found: Graded,
) -> None:
    """Puts a part of the answers into the ledger, and those that are no distribution into quarantine."""
    is_good_N = np.isfinite(answers["p0"].to_numpy())
    bad = keys.filter(pa.array(~is_good_N))
    _quarantine(current, bad)
    found.rejected += len(bad)
    good, probability_N3 = keys.filter(pa.array(is_good_N)), probabilities_of(answers)[is_good_N]
    if not len(good):
        return
    grade_N = grades_of(card.calibrations, [""] * len(good), probability_N3)
    found.abstained += int((expected_squared_error(probability_N3, grade_N) > recipe.abstain_risk).sum())
    rows = ledger_rows(
        current,
        good,
        probability_N3,
        grade_N,
        judge="labeller",
        labeller=card.fingerprint,
        guideline=card.guideline,
        prompt=card.prompt,
        decoding=card.decoding,
    )
    found.labelled += book.append(rows.sort_by("address"), run_id=current.run_id)


def ledger_rows(
    current: Run,
    keys: pa.Table,
    probability_N3: NDArray[np.floating],
    grade_N: NDArray[np.integer],
    *,
    judge: str,
    labeller: str | pa.ChunkedArray,
    guideline: str = "",
    prompt: str = "",
    decoding: str = "",
) -> pa.Table:
    """Rows of the ledger, written now.

    Args:
        current: the run that writes them.
        keys: columns of LEDGER_KEYS and supersedes.
        probability_N3: of the grades.
        grade_N: the grade.
        judge: kind of judge.
        labeller: who judged, of all rows or of each.
        guideline: of a labeller, its version.
        prompt: of a labeller.
        decoding: of a labeller.
    """
    columns = {name: keys[name] for name in (*LEDGER_KEYS, "supersedes")}
    columns |= {name: pa.array(probability_N3[:, place]) for place, name in enumerate(PROBABILITIES)}
    columns["grade"] = pa.array(grade_N, pa.int8())
    told = {"judge": judge, "labeller": labeller, "guideline": guideline, "prompt": prompt, "decoding": decoding}
    for name, value in (told | {"run_id": current.run_id}).items():
        columns[name] = pa.array([value] * len(keys), pa.string()) if isinstance(value, str) else value
    columns["created_at"] = pa.array([datetime.now(UTC)] * len(keys), pa.timestamp("us", tz="UTC"))
    return pa.table(columns)


def with_superseded(lake: Lake, keys: pa.Table) -> pa.Table:
    """The pairs with the address of the newest row of their texts, which theirs will supersede."""
    before = ledger.newest_of_pairs(lake, keys["query_hash"], keys["product_hash"])
    return keys.append_column("supersedes", pa.array(before, pa.string()))


def _quarantine(current: Run, keys: pa.Table) -> None:
    """Writes pairs whose answer was no distribution, with the reason; the next run asks for them again."""
    if not len(keys):
        return
    part = f"answers-{keys['address'][0].as_py()[:16]}"
    rows = [
        {
            "run_id": current.run_id,
            "part": part,
            "row_number": number,
            "dataset": row["dataset"],
            "table_name": PAIR_GRADE.name,
            "row": json.dumps({name: row[name] for name in LEDGER_KEYS}),
            "reason": "the labeller's answer is no probability distribution over the grades",
            "created_at": datetime.now(UTC),
        }
        for number, row in enumerate(keys.to_pylist())
    ]
    data = pa.Table.from_pylist(rows, schema=QUARANTINE.schema)
    tables.append_once(current.lake, QUARANTINE, data, run_id=current.run_id, part=part)
