"""One human grade per pair, from marks and experts' verdicts."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from conf.load import settings
from jobs import job, quality
from lake.runs import RunRecord
from lake.schemas import ANNOTATION_CONSENSUS
from lake.spark import SparkPlacement
from spark_etl.recipes import ConsensusRecipe


@settings
class Inputs:
    """Tables read."""

    human_annotation: job.TableVersion = "newest"
    audit_verdict: job.TableVersion = ""


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
    """Replaces the consensus; pairs whose marks tie have no row.

    Raises:
        GateError: the consensus is not what the last one lets expect.
    """
    from lake import spark as lake_spark
    from spark_etl.consensus import build_consensus, with_verdicts

    current = job.begin(config, "build_consensus")
    spark = lake_spark.session(config.placement.spark)
    tables = lake_spark.pinned_rows(spark, current.lake, current.inputs)
    consensus = build_consensus(tables["human_annotation"], config.recipe)
    if "audit_verdict" in tables:
        consensus = with_verdicts(consensus, tables["audit_verdict"])
    consensus = consensus.persist()
    by_judge = lake_spark.count_by(consensus, "judge")
    with quality.gated(current, {ANNOTATION_CONSENSUS: consensus}, config.recipe.quality):
        written = lake_spark.replace(spark, current.lake, ANNOTATION_CONSENSUS, consensus, run_id=current.run_id)
    consensus.unpersist()
    return current.finish(rows=sum(by_judge.values()), outputs={ANNOTATION_CONSENSUS.name: written}, counts=by_judge)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of the job."""
    return job.main("build_consensus", Config, run, argv)


if __name__ == "__main__":
    sys.exit(main())
