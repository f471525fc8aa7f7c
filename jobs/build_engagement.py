"""Behaviour per pair, corrected for position."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from conf.load import settings
from jobs import job
from lake.runs import RunRecord
from lake.schemas import ENGAGEMENT
from lake.spark import SparkPlacement
from spark_etl.recipes import EngagementRecipe


@settings
class Inputs:
    """Tables read."""

    search_event: job.TableVersion = "newest"


@settings
class Placement:
    """Where Spark runs."""

    spark: SparkPlacement = SparkPlacement()


@settings
class Config:
    """Settings of build_engagement."""

    lake: job.LakeRoot = job.DEFAULT_LAKE
    setting: job.SettingName = "dev"
    inputs: Inputs = Inputs()
    recipe: EngagementRecipe = EngagementRecipe()
    placement: Placement = Placement()


def run(config: Config) -> RunRecord:
    """Replaces the engagement; without events it has no row."""
    from lake import spark as lake_spark
    from spark_etl.engagement import build_engagement

    current = job.begin(config, "build_engagement")
    spark = lake_spark.session(config.placement.spark)
    tables = lake_spark.pinned_rows(spark, current.lake, current.inputs)
    engagement = build_engagement(tables["search_event"], config.recipe).persist()
    rows = engagement.count()
    written = lake_spark.replace(spark, current.lake, ENGAGEMENT, engagement, run_id=current.run_id)
    engagement.unpersist()
    return current.finish(rows=rows, outputs={ENGAGEMENT.name: written})


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of the job."""
    return job.main("build_engagement", Config, run, argv)


if __name__ == "__main__":
    sys.exit(main())
