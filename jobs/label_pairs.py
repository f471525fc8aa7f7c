"""Grades the candidate pairs that have no row in the ledger."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import pyarrow as pa
import pyarrow.compute as pc

from conf.load import meaning, settings
from embeddings.labeller import load_labeller_card
from jobs import job, labelling
from jobs.cost import CostPlan, plan_cost
from jobs.grading import GradingRecipe, addressed, grade_with_stronger, waiting_pairs
from lake import tables
from lake.runs import Run, RunRecord
from lake.schemas import CANDIDATE_PAIR, PAIR_GRADE, SOURCES, CandidateSource
from ray_apps.placements import LabelPlacement


@settings
class Inputs:
    """Pairs, their texts and the judge."""

    candidate_pair: job.TableVersion = "newest"
    query: job.TableVersion = "newest"
    catalog_product: job.TableVersion = "newest"
    labeller: Annotated[str, meaning("folder of the labeller, below the lake or anywhere; empty: the newest")] = ""
    stronger: Annotated[str, meaning("folder of the labeller that abstentions go to; empty: none")] = ""


@settings
class LabelRecipe(GradingRecipe):
    """Which candidates are graded and what is refused. Grades follow from labeller and texts alone."""

    sources: Annotated[
        tuple[CandidateSource, ...], meaning("sources of the candidates that are graded", min_length=1)
    ] = SOURCES


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
    config = with_models(config)
    current = job.begin(config, "label_pairs")
    folders, texts = labelling.labeller_folders(current.lake, config.inputs), labelling.PairTexts(current)
    candidates = read_candidates(current, config.recipe)
    keys = addressed(texts.keys(candidates), load_labeller_card(folders[0]))
    graded = grade_with_stronger(current, keys, texts, folders, config.recipe, config.placement)
    return current.finish(
        rows=graded.labelled,
        outputs={"pair_grade": tables.version(current.lake, PAIR_GRADE) or 0},
        counts={"candidates": len(candidates), "without_text": len(candidates) - len(keys)} | graded.counts(),
        metrics=graded.metrics(config.placement),
    )


def plan(config: Config) -> CostPlan:
    """What `run` would take now; writes nothing."""
    config = with_models(config)
    current = job.pin(config, "label_pairs")
    folders, texts = labelling.labeller_folders(current.lake, config.inputs), labelling.PairTexts(current)
    keys = addressed(texts.keys(read_candidates(current, config.recipe)), load_labeller_card(folders[0]))
    return plan_cost(current, waiting_pairs(current.lake, keys), texts, folders, config.recipe, config.placement)


def with_models(config: Config) -> Config:
    """The config with the lake's newest labeller where it names none."""
    return labelling.with_newest_labeller(config)  # type: ignore[no-any-return]


def read_candidates(current: Run, recipe: LabelRecipe) -> pa.Table:
    """The pairs of the recipe's sources, each once."""
    candidates = labelling.read(current, CANDIDATE_PAIR, [*labelling.PAIR, "source"])
    candidates = candidates.filter(pc.is_in(candidates["source"], value_set=pa.array(recipe.sources)))
    return candidates.group_by(labelling.PAIR).aggregate([])


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of the job."""
    return job.main("label_pairs", Config, run, argv)


if __name__ == "__main__":
    sys.exit(main())
