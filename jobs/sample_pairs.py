"""Pairs for the labeller: marks without consensus, sampled products, what shoppers saw, mined pairs."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from conf.load import ConfigError, settings
from jobs import job
from lake.runs import RunRecord
from lake.schemas import CANDIDATE_PAIR
from lake.spark import SparkPlacement
from lake.tables import one_of
from spark_etl.recipes import SamplePairsRecipe

NEEDS = {"annotated": "human_annotation", "engagement": "engagement", "mined": "mined_pair"}
"""Source of candidates -> the table it comes from."""


@settings
class Inputs:
    """Tables read."""

    query: job.TableVersion = "newest"
    catalog_product: job.TableVersion = "newest"
    annotation_consensus: job.TableVersion = "newest"
    human_annotation: job.TableVersion = "newest"
    engagement: job.TableVersion = "newest"
    mined_pair: job.TableVersion = ""


@settings
class Placement:
    """Where Spark runs."""

    spark: SparkPlacement = SparkPlacement()


@settings
class Config:
    """Settings of sample_pairs."""

    lake: job.LakeRoot = job.DEFAULT_LAKE
    setting: job.SettingName = "dev"
    inputs: Inputs = Inputs()
    recipe: SamplePairsRecipe = SamplePairsRecipe()
    placement: Placement = Placement()


def run(config: Config) -> RunRecord:
    """Replaces the candidates of the recipe's sources; those of other sources stay.

    Raises:
        ConfigError: a source is asked for whose table is not among the inputs.
    """
    from lake import spark as lake_spark
    from spark_etl.pairs import sample_pairs

    current = job.begin(config, "sample_pairs")
    spark = lake_spark.session(config.placement.spark)
    tables = lake_spark.pinned_rows(spark, current.lake, current.inputs)
    for source, table in NEEDS.items():
        if source in config.recipe.sources and table not in tables:
            raise ConfigError(f"sample_pairs: the source {source} needs inputs.{table}; give inputs.{table}=newest")
    with lake_spark.keeping() as keep:
        pairs = keep(sample_pairs(tables, config.recipe))
        by_source = lake_spark.count_by(pairs, "source")
        where = one_of("source", config.recipe.sources)
        written = lake_spark.replace(spark, current.lake, CANDIDATE_PAIR, pairs, run_id=current.run_id, where=where)
    return current.finish(rows=sum(by_source.values()), outputs={CANDIDATE_PAIR.name: written}, counts=by_source)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of the job."""
    return job.main("sample_pairs", Config, run, argv)


if __name__ == "__main__":
    sys.exit(main())
