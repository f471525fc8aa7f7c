"""Pairs whose behaviour contradicts their human grade, for an expert to look at."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from conf.load import settings
from jobs import job
from lake.runs import RunRecord
from lake.schemas import AUDIT_CONFLICT
from lake.spark import SparkPlacement
from spark_etl.recipes import AuditRecipe


@settings
class Inputs:
    """Tables read."""

    engagement: job.TableVersion = "newest"
    annotation_consensus: job.TableVersion = "newest"


@settings
class Placement:
    """Where Spark runs."""

    spark: SparkPlacement = SparkPlacement()


@settings
class Config:
    """Settings of build_audit."""

    lake: job.LakeRoot = job.DEFAULT_LAKE
    setting: job.SettingName = "dev"
    inputs: Inputs = Inputs()
    recipe: AuditRecipe = AuditRecipe()
    placement: Placement = Placement()


def run(config: Config) -> RunRecord:
    """Replaces the conflicts."""
    from lake import spark as lake_spark
    from spark_etl.audit import find_conflicts

    current = job.begin(config, "build_audit")
    spark = lake_spark.session(config.placement.spark)
    tables = lake_spark.pinned_rows(spark, current.lake, current.inputs)
    conflicts = find_conflicts(tables["engagement"], tables["annotation_consensus"], config.recipe).persist()
    by_kind = lake_spark.count_by(conflicts, "kind")
    written = lake_spark.replace(spark, current.lake, AUDIT_CONFLICT, conflicts, run_id=current.run_id)
    conflicts.unpersist()
    return current.finish(rows=sum(by_kind.values()), outputs={AUDIT_CONFLICT.name: written}, counts=by_kind)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of the job."""
    return job.main("build_audit", Config, run, argv)


if __name__ == "__main__":
    sys.exit(main())
