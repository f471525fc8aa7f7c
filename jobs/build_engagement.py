"""Behaviour per pair, freed of position by a click model, and the click model itself."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from conf.load import settings
from jobs import job, quality
from lake.runs import RunRecord
from lake.schemas import CLICK_MODEL, CLICK_MODEL_ROUND, ENGAGEMENT
from lake.spark import SparkPlacement
from spark_etl.recipes import EngagementRecipe


@settings
class Inputs:
    """Tables read."""

    place_count: job.TableVersion = "newest"


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
    """Replaces click model and engagement; without events they have no row.

    Raises:
        GateError: behaviour is not what the last one lets expect.
    """
    from lake import spark as lake_spark
    from spark_etl import click_model, engagement

    current = job.begin(config, "build_engagement")
    spark = lake_spark.session(config.placement.spark)
    tables = lake_spark.pinned_rows(spark, current.lake, current.inputs)
    with lake_spark.keeping() as keep:
        counts = keep(engagement.sum_days(tables["place_count"]))
        models = click_model.fit_click_models(counts, config.recipe.click_model)
        pairs = keep(engagement.build_engagement(counts, models, config.recipe))
        rows = pairs.count()
        frames = {
            CLICK_MODEL: click_model.places_frame(spark, models),
            CLICK_MODEL_ROUND: click_model.rounds_frame(spark, models),
            ENGAGEMENT: pairs,
        }
        with quality.gated(current, frames, config.recipe.quality):
            outputs = {
                spec.name: lake_spark.replace(spark, current.lake, spec, frame, run_id=current.run_id)
                for spec, frame in frames.items()
            }
    return current.finish(
        rows=rows,
        outputs=outputs,
        counts={f"rounds/{model.dataset}": len(model.rounds) for model in models},
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of the job."""
    return job.main("build_engagement", Config, run, argv)


if __name__ == "__main__":
    sys.exit(main())
