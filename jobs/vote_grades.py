"""Several labellers' grades of the same pairs into one: the mean of their probabilities, as a row of the ledger."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from typing import Annotated

import numpy as np
import pyarrow as pa

from conf.load import ConfigError, meaning, settings
from embeddings.labeller import load_labeller_card
from jobs import job, labelling
from jobs.grading import (
    addressed,
    expected_squared_error,
    first_of_each,
    held_grades,
    ledger_rows,
    with_superseded,
)
from lake import tables
from lake.ledger import Ledger
from lake.runs import RunRecord
from lake.schemas import CANDIDATE_PAIR, PAIR_GRADE


@settings
class Inputs:
    """Pairs, and the labellers that have graded them."""

    candidate_pair: job.TableVersion = "newest"
    query: job.TableVersion = "newest"
    catalog_product: job.TableVersion = "newest"
    pair_grade: job.TableVersion = "newest"
    labellers: Annotated[tuple[str, ...], meaning("folders of two labellers or more")] = ()


@settings
class VoteRecipe:
    """When the judges are too far apart."""

    abstain_risk: Annotated[
        float, meaning("expected squared error of the joint grade from which on it counts as an abstention", gt=0)
    ] = 0.6


@settings
class Config:
    """Settings of vote_grades."""

    lake: job.LakeRoot = job.DEFAULT_LAKE
    setting: job.SettingName = "dev"
    inputs: Inputs = Inputs()
    recipe: VoteRecipe = VoteRecipe()
    placement: job.InProcess = job.InProcess()


def run(config: Config) -> RunRecord:
    """A row of kind votes for every pair that all labellers have graded; which grades count then, build_instances says.

    Raises:
        ConfigError: fewer than two labellers.
    """
    if len(config.inputs.labellers) < 2:
        raise ConfigError("inputs.labellers: votes need two labellers; give inputs.labellers=[DIR,DIR]")
    current = job.begin(config, "vote_grades")
    texts = labelling.PairTexts(current)
    candidates = labelling.read(current, CANDIDATE_PAIR, labelling.PAIR).group_by(labelling.PAIR).aggregate([])
    folders = [labelling.labeller_folder(current.lake, value, "inputs.labellers") for value in config.inputs.labellers]
    cards = [load_labeller_card(folder) for folder in folders]
    keys = first_of_each(addressed(texts.keys(candidates), cards[0])).drop_columns(["address"])
    electorate = electorate_of([card.fingerprint for card in cards])
    probability_JN3, _ = held_grades(current.lake, keys, cards)
    joint_N3 = probability_JN3.mean(axis=0)
    is_judged = np.isfinite(joint_N3[:, 0])
    keys, joint_N3 = keys.filter(pa.array(is_judged)), joint_N3[is_judged]
    hashes = zip(keys["query_hash"].to_pylist(), keys["product_hash"].to_pylist(), strict=True)
    keys = keys.append_column("address", pa.array([address(electorate, *both) for both in hashes], pa.string()))
    grade_N = joint_N3.argmax(axis=1)
    book, written = Ledger(current.lake, keys["address"]), 0
    is_fresh = ~book.holds(keys["address"])
    if is_fresh.any():
        fresh, decoding = with_superseded(current.lake, keys.filter(pa.array(is_fresh))), f"mean of {len(cards)}"
        rows = ledger_rows(
            current, fresh, joint_N3[is_fresh], grade_N[is_fresh], judge="votes", labeller=electorate, decoding=decoding
        )
        written = book.append(rows, run_id=current.run_id)
    risk_N = expected_squared_error(joint_N3, grade_N)
    apart_N = np.ptp(probability_JN3[:, is_judged].argmax(axis=2), axis=0)
    return current.finish(
        rows=written,
        outputs={PAIR_GRADE.name: tables.version(current.lake, PAIR_GRADE) or 0},
        counts={
            "texts": len(is_judged),
            "not_graded_by_all": len(is_judged) - len(keys),
            "labelled": written,
            "reused": len(keys) - written,
            "abstained": int((risk_N > config.recipe.abstain_risk).sum()),
            "judges_differ": int((apart_N > 0).sum()),
            "judges_differ_by_2": int((apart_N > 1).sum()),
        },
    )


def electorate_of(fingerprints: Sequence[str]) -> str:
    """What the rows' column labeller holds: a hash of the judges, in any order."""
    return "votes-" + hashlib.sha256(" ".join(sorted(fingerprints)).encode()).hexdigest()[:16]


def address(electorate: str, query_hash: str, product_hash: str) -> str:
    """Content address of a joint grade."""
    return hashlib.sha256("\x1f".join((electorate, query_hash, product_hash)).encode()).hexdigest()


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of the job."""
    return job.main("vote_grades", Config, run, argv)


if __name__ == "__main__":
    sys.exit(main())
