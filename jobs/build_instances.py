"""Graded pairs into the instances that the encoder learns from."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from typing import Annotated

from conf.load import ConfigError, meaning, settings
from jobs import job, labelling
from lake.runs import Run, RunRecord
from lake.schemas import TRAINING_INSTANCE
from lake.spark import SparkPlacement
from spark_etl.recipes import InstancesRecipe


@settings
class Inputs:
    """Tables read."""

    query: job.TableVersion = "newest"
    catalog_product: job.TableVersion = "newest"
    annotation_consensus: job.TableVersion = "newest"
    audit_verdict: job.TableVersion = ""
    candidate_pair: job.TableVersion = "newest"
    pair_grade: job.TableVersion = "newest"
    mined_pair: job.TableVersion = ""
    class_rate: job.TableVersion = ""
    labeller: Annotated[str, meaning("folder of the labeller whose grades count; empty: the newest grade")] = ""
    stronger: Annotated[str, meaning("folder of the labeller that its abstentions went to; empty: none")] = ""


@settings
class Placement:
    """Where Spark runs."""

    spark: SparkPlacement = SparkPlacement()


@settings
class Config:
    """Settings of build_instances."""

    lake: job.LakeRoot = job.DEFAULT_LAKE
    setting: job.SettingName = "dev"
    inputs: Inputs = Inputs()
    recipe: InstancesRecipe = InstancesRecipe()
    placement: Placement = Placement()


def run(config: Config) -> RunRecord:
    """Replaces the instances of the recipe's stage.

    Raises:
        ConfigError: stage 2 is asked for without mined pairs.
    """
    from pyspark.sql import functions as sf

    from lake import spark as lake_spark
    from spark_etl.instances import build_instances

    current = job.begin(config, "build_instances")
    spark = lake_spark.session(config.placement.spark)
    tables = lake_spark.pinned_rows(spark, current.lake, current.inputs)
    stage = config.recipe.stage
    if stage == 2 and "mined_pair" not in tables:
        raise ConfigError("build_instances: stage 2 needs inputs.mined_pair; give inputs.mined_pair=newest")
    with lake_spark.keeping() as keep:
        instances = keep(build_instances(tables, _with_labeller(config, current)))
        pairs = instances.select(sf.explode(sf.arrays_zip("grades", "sources")).alias("pair")).select("pair.*")
        by_kind = pairs.groupBy("grades", "sources").agg(sf.count("*").alias("count")).collect()
        counts = {"pairs": sum(row["count"] for row in by_kind)}
        for row in by_kind:
            for name in (f"grade_{row['grades']}", row["sources"]):
                counts[name] = counts.get(name, 0) + row["count"]
        rows = instances.count()
        where = f"stage = {stage}"
        written = lake_spark.replace(
            spark, current.lake, TRAINING_INSTANCE, instances, run_id=current.run_id, where=where
        )
    return current.finish(rows=rows, outputs={TRAINING_INSTANCE.name: written}, counts=counts)


def _with_labeller(config: Config, current: Run) -> InstancesRecipe:
    """The recipe with the fingerprints of the labellers that the inputs name."""

    def fingerprint(name: str) -> str:
        named = labelling.labeller_fingerprint(current.lake, getattr(config.inputs, name), f"inputs.{name}")
        return named or getattr(config.recipe, name)

    return dataclasses.replace(config.recipe, labeller=fingerprint("labeller"), stronger=fingerprint("stronger"))


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of the job."""
    return job.main("build_instances", Config, run, argv)


if __name__ == "__main__":
    sys.exit(main())
