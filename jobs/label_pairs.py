"""Grades the candidate pairs that have no row in the ledger."""

from __future__ import annotations

import hashlib
import json
import logging
import sys
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Annotated

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from conf.load import meaning, settings
from embeddings.anchors import AnchorRecipe, drift_sentence, measure_drift, read_anchors
from embeddings.calibration import grades_of, probabilities_of
from embeddings.labeller import LabellerCard, load_labeller_card
from jobs import job, labelling
from lake import tables
from lake.progress import write_progress
from lake.runs import Run, RunRecord
from lake.schemas import CANDIDATE_PAIR, PAIR_GRADE, QUARANTINE, SOURCES, CandidateSource
from ray_apps.placements import LabelPlacement

log = logging.getLogger(__name__)

ANCHOR = "anchor-"
"""Before the number of an anchor, where its address would stand."""


@settings
class Inputs:
    """Pairs, their texts and the judge."""

    candidate_pair: job.TableVersion = "newest"
    query: job.TableVersion = "newest"
    catalog_product: job.TableVersion = "newest"
    labeller: Annotated[str, meaning("folder of the labeller, below the lake or anywhere; empty: the newest")] = ""


@settings
class LabelRecipe:
    """Which candidates are graded and what is refused. Grades follow from labeller and texts alone."""

    sources: Annotated[
        tuple[CandidateSource, ...], meaning("sources of the candidates that are graded", min_length=1)
    ] = SOURCES

    anchors: Annotated[AnchorRecipe, meaning("when the answers to the labeller's anchors stop the run")] = (
        AnchorRecipe()
    )
    max_rejected_fraction: Annotated[
        float, meaning("share of answers without a distribution past which the run fails", ge=0, le=1)
    ] = 0.01


@settings
class Config:
    """Settings of label_pairs."""

    lake: job.LakeRoot = job.DEFAULT_LAKE
    setting: job.SettingName = "dev"
    inputs: Inputs = Inputs()
    recipe: LabelRecipe = LabelRecipe()
    placement: LabelPlacement = LabelPlacement()


def run(config: Config) -> RunRecord:
    """Candidate pairs without a ledger row -> ledger, part by part; what is there already is never asked again."""
    config = labelling.with_newest_labeller(config)
    current = job.begin(config, "label_pairs")
    folder = labelling.labeller_folder(current.lake, config.inputs.labeller)
    card = load_labeller_card(folder)
    candidates = labelling.read(current, CANDIDATE_PAIR, [*labelling.PAIR, "source"])
    candidates = candidates.filter(pc.is_in(candidates["source"], value_set=pa.array(config.recipe.sources)))
    candidates = candidates.group_by(labelling.PAIR).aggregate([])
    pairs = with_addresses(labelling.with_texts(current, candidates), card)
    waiting = without_ledger_rows(current, pairs)
    counts = {
        "candidates": len(candidates),
        "without_text": len(candidates) - len(pairs),
        "reused": len(pairs) - len(waiting),
    }
    waiting = first_of_each(waiting)
    log.info("label_pairs: %d texts to grade, %s", len(waiting), counts)
    labelled = rejected = 0
    if len(waiting):
        run_folder = current.lake.path("runs", current.fingerprint)
        for answers in checked_answers(waiting, folder, config):
            part = answers.join(waiting, "address", join_type="inner")
            good = pc.is_finite(part["p0"])
            labelled += append(current, card, part.filter(good))
            rejected += quarantine(current, part.filter(pc.invert(good)))
            write_progress(run_folder, done=labelled + rejected, total=len(waiting), note="pairs graded")
    # of all texts, not of those asked now: a run that goes on after a death meets the bad ones again
    total = max(pc.count_distinct(pairs["address"]).as_py(), 1)
    if rejected > config.recipe.max_rejected_fraction * total:
        raise ValueError(
            f"label_pairs: {rejected} of {total} answers were no distribution over the grades, more than "
            f"recipe.max_rejected_fraction={config.recipe.max_rejected_fraction}; see the quarantine table"
        )
    tables.create(current.lake, PAIR_GRADE)
    counts |= {"labelled": labelled, "rejected": rejected}
    return current.finish(
        rows=labelled, outputs={"pair_grade": tables.version(current.lake, PAIR_GRADE) or 0}, counts=counts
    )


def checked_answers(waiting: pa.Table, folder: str, config: Config) -> Iterator[pa.Table]:
    """Answers to the pairs, part by part, held back until those to the labeller's anchors have been found in order.

    Raises:
        GateError: the labeller answers otherwise than when it was tuned.
    """
    from ray_apps.label import label_pairs

    # without their data set: people did not choose these pairs, so its judged pairs' class rates are not theirs
    asked = waiting.select(["address", "query", *labelling.TEXTS])
    anchors = read_anchors(folder)
    if anchors is None:
        yield from label_pairs(asked, folder, config.placement)
        return
    names = [f"{ANCHOR}{row:04d}" for row in range(len(anchors))]
    first = anchors.append_column("address", pa.array(names, pa.string()))
    answer_N3, held, num_missing = np.full((len(anchors), 3), np.nan), [], len(anchors)
    for part in label_pairs(asked, folder, config.placement, first):
        is_anchor = pc.starts_with(part["address"], ANCHOR)
        own, part = part.filter(is_anchor), part.filter(pc.invert(is_anchor))
        if len(own):
            rows = [int(name.removeprefix(ANCHOR)) for name in own["address"].to_pylist()]
            answer_N3[rows] = probabilities_of(own)
            num_missing -= len(own)
            if not num_missing:
                check_anchors(anchors, answer_N3, config)
        if len(part):
            held.append(part)
        if not num_missing:
            yield from held
            held.clear()
    if num_missing:
        raise ValueError(f"label_pairs: {num_missing} of {len(anchors)} anchors got no answer; nothing was written")


def check_anchors(anchors: pa.Table, answer_N3: NDArray[np.floating], config: Config) -> None:
    """Stops before anything is published where the answers to the anchors are not those at tuning.

    Raises:
        GateError: they are further away than the recipe allows.
    """
    drift = measure_drift(anchors, answer_N3)
    log.info("label_pairs: %d anchors, largest change of a probability %.2g", len(anchors), drift.largest_change)
    if wrong := drift_sentence(drift, config.recipe.anchors):
        raise job.GateError(
            f"label_pairs: on its {len(anchors)} anchors the labeller answers otherwise than at tuning: {wrong}; "
            "nothing was written; see what changed in the engine, or tune the labeller again"
        )


def with_addresses(pairs: pa.Table, card: LabellerCard) -> pa.Table:
    """The pairs with their content address under this labeller."""
    hashes = zip(pairs["query_hash"].to_pylist(), pairs["product_hash"].to_pylist(), strict=True)
    return pairs.append_column("address", pa.array([card.address(*both) for both in hashes], pa.string()))


def without_ledger_rows(current: Run, pairs: pa.Table) -> pa.Table:
    """The pairs whose address the ledger does not hold."""
    if not tables.exists(current.lake, PAIR_GRADE):
        return pairs
    held = tables.rows(current.lake, PAIR_GRADE, columns=["address"])["address"]
    return pairs.filter(pc.invert(pc.is_in(pairs["address"], value_set=held.combine_chunks())))


def first_of_each(pairs: pa.Table) -> pa.Table:
    """One pair per address, the first in key order: equal texts are graded once."""
    place = pa.array(np.arange(len(pairs)))
    kept = pairs.append_column("place", place).group_by("address").aggregate([("place", "min")])["place_min"]
    return pairs.take(kept.combine_chunks().sort())


def append(current: Run, card: LabellerCard, part: pa.Table) -> int:
    """Writes a part of the ledger; its name is its content, so a replay finds it there."""
    if not len(part):
        return 0
    part = part.sort_by("address")
    probability_N3 = probabilities_of(part)
    constant = {
        "judge": "labeller",
        "labeller": card.fingerprint,
        "guideline": card.guideline,
        "prompt": card.prompt,
        "decoding": card.decoding,
        "run_id": current.run_id,
    }
    rows = part.select(["address", *labelling.PAIR, "query_hash", "product_hash", "p0", "p1", "p2"])
    rows = rows.append_column(
        "grade", pa.array(grades_of(card.calibrations, [""] * len(rows), probability_N3), pa.int8())
    )
    for name, value in constant.items():
        rows = rows.append_column(name, pa.array([value] * len(rows), pa.string()))
    written = pa.array([datetime.now(UTC)] * len(rows), pa.timestamp("us", tz="UTC"))
    name = hashlib.sha256("".join(part["address"].to_pylist()).encode()).hexdigest()[:16]
    tables.append_once(
        current.lake, PAIR_GRADE, rows.append_column("created_at", written), run_id=current.fingerprint, part=name
    )
    return len(part)


def quarantine(current: Run, part: pa.Table) -> int:
    """Writes pairs whose answer was no distribution, with the reason; the next run asks for them again."""
    rows = [
        {
            "run_id": current.run_id,
            "part": f"answers-{part['address'][0].as_py()[:16]}",
            "row_number": number,
            "dataset": row["dataset"],
            "table_name": PAIR_GRADE.name,
            "row": json.dumps({name: row[name] for name in ("address", *labelling.PAIR, "query", "title")}),
            "reason": "the labeller's answer is no probability distribution over the grades",
            "created_at": datetime.now(UTC),
        }
        for number, row in enumerate(part.to_pylist())
    ]
    if rows:
        data = pa.Table.from_pylist(rows, schema=QUARANTINE.schema)
        tables.append_once(current.lake, QUARANTINE, data, run_id=current.run_id, part=rows[0]["part"])
    return len(rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of the job."""
    return job.main("label_pairs", Config, run, argv)


if __name__ == "__main__":
    sys.exit(main())
