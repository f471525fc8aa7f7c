"""One human grade per pair, from marks and experts' verdicts."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated

from conf.load import meaning, settings
from jobs import job, quality
from lake.runs import RunRecord
from lake.schemas import ANNOTATION_CONSENSUS, ANNOTATOR_CONFUSION, DAWID_SKENE_ROUND, TableSpec
from lake.spark import SparkPlacement
from spark_etl.recipes import ConsensusRecipe

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

    from spark_etl.annotator_model import AnnotatorModel

log = logging.getLogger(__name__)


@settings
class Inputs:
    """Tables read."""

    human_annotation: job.TableVersion = "newest"
    audit_verdict: job.TableVersion = ""
    gold_question: Annotated[
        job.TableVersion, meaning("pairs of known grade, read by recipe.method=dawid_skene; empty: none")
    ] = ""


@settings
class Placement:
    """Where Spark runs."""

    spark: SparkPlacement = SparkPlacement()


@settings
class Config:
    """Settings of build_consensus."""

    lake: job.LakeRoot = job.DEFAULT_LAKE
    setting: job.SettingName = "dev"
    inputs: Inputs = Inputs()
    recipe: ConsensusRecipe = ConsensusRecipe()
    placement: Placement = Placement()


def run(config: Config) -> RunRecord:
    """Replaces the consensus; pairs whose marks tie have no row. By dawid_skene also the annotators' matrices.

    Raises:
        GateError: the consensus is not what the last one lets expect.
    """
    from lake import spark as lake_spark
    from spark_etl import consensus, dawid_skene

    current = job.begin(config, "build_consensus")
    spark = lake_spark.session(config.placement.spark)
    tables = lake_spark.pinned_rows(spark, current.lake, current.inputs)
    frames: dict[TableSpec, DataFrame] = {}
    models: list[AnnotatorModel] = []
    with lake_spark.keeping() as keep:
        if config.recipe.method == "majority":
            agreed = consensus.build_consensus(tables["human_annotation"], config.recipe)
        else:
            if config.recipe.min_agreement:
                log.warning("recipe.min_agreement is of method=majority; by dawid_skene recipe.min_probability bounds")
            marks = keep(prepare(tables))
            models = dawid_skene.fit_annotators(marks, config.recipe.dawid_skene)
            probabilities = dawid_skene.grade_probabilities(marks, models)
            agreed = consensus.most_probable(tables["human_annotation"], probabilities, config.recipe)
            frames[ANNOTATOR_CONFUSION] = dawid_skene.confusion_frame(spark, models)
            frames[DAWID_SKENE_ROUND] = dawid_skene.rounds_frame(spark, models)
        if "audit_verdict" in tables:
            agreed = consensus.with_verdicts(agreed, tables["audit_verdict"])
        agreed = keep(agreed)
        by_judge = lake_spark.count_by(agreed, "judge")
        with quality.gated(current, {ANNOTATION_CONSENSUS: agreed}, config.recipe.quality):
            outputs = {
                spec.name: lake_spark.replace(spark, current.lake, spec, frame, run_id=current.run_id)
                for spec, frame in (frames | {ANNOTATION_CONSENSUS: agreed}).items()
            }
    rounds = {f"rounds/{model.dataset}": len(model.rounds) for model in models}
    return current.finish(rows=sum(by_judge.values()), outputs=outputs, counts=by_judge | rounds)


def prepare(tables: Mapping[str, DataFrame]) -> DataFrame:
    """Marks as the fit reads them, with the grades that gold questions and verdicts tell."""
    from spark_etl import dawid_skene, gold

    known = gold.known_grades(tables.get("gold_question"), tables.get("audit_verdict"))
    return dawid_skene.prepare_marks(tables["human_annotation"], known)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of the job."""
    return job.main("build_consensus", Config, run, argv)


if __name__ == "__main__":
    sys.exit(main())
