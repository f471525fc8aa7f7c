"""Pairs whose human grade is in doubt by behaviour, labeller and marks, for an expert to look at."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated

from conf.load import meaning, settings
from jobs import job, labelling, quality
from lake.runs import RunRecord
from lake.schemas import AUDIT_CONFLICT
from lake.spark import SparkPlacement
from lake.tables import exists
from spark_etl.recipes import AuditRecipe

if TYPE_CHECKING:
    from pyspark.sql import DataFrame


@settings
class Inputs:
    """Tables read."""

    engagement: job.TableVersion = "newest"
    annotation_consensus: job.TableVersion = "newest"
    labeller_oof: Annotated[
        job.TableVersion, meaning("grades of labellers that had not learned from the pair; empty: not asked")
    ] = ""
    labeller: Annotated[str, meaning("folder of the labeller among them; empty: the only one there is")] = ""


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
    """Replaces the conflicts.

    Raises:
        GateError: the conflicts are not what the last ones let expect.
    """
    from lake import spark as lake_spark
    from spark_etl.audit import find_conflicts, with_found_at

    current = job.begin(config, "build_audit")
    spark = lake_spark.session(config.placement.spark)
    tables = lake_spark.pinned_rows(spark, current.lake, current.inputs)
    labeller = labelling.labeller_fingerprint(current.lake, config.inputs.labeller) if "labeller_oof" in tables else ""
    with lake_spark.keeping() as keep:
        scored = keep(scored_pairs(tables, config.recipe, labeller))
        conflicts = find_conflicts(scored, config.recipe)
        # how long a pair has been in doubt is no part of what is computed, so the rows of before are no input
        is_there = exists(current.lake, AUDIT_CONFLICT)
        earlier = lake_spark.rows(spark, current.lake, AUDIT_CONFLICT) if is_there else None
        conflicts = keep(with_found_at(conflicts, current.started_at, earlier))
        by_kind = lake_spark.count_by(conflicts, "kind")
        with quality.gated(current, {AUDIT_CONFLICT: conflicts}, config.recipe.quality):
            written = lake_spark.replace(spark, current.lake, AUDIT_CONFLICT, conflicts, run_id=current.run_id)
    return current.finish(rows=sum(by_kind.values()), outputs={AUDIT_CONFLICT.name: written}, counts=by_kind)


def scored_pairs(tables: Mapping[str, DataFrame], recipe: AuditRecipe, labeller: str) -> DataFrame:
    """Every judged pair with its evidence, from the job's inputs by name; see `spark_etl.audit.score_pairs`.

    Args:
        labeller: fingerprint of the one whose grades count, where there are any; empty: the only one.
    """
    from spark_etl.audit import grades_out_of_fold, score_pairs

    graded = grades_out_of_fold(tables["labeller_oof"], labeller) if "labeller_oof" in tables else None
    return score_pairs(tables["engagement"], tables["annotation_consensus"], recipe, graded)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of the job."""
    return job.main("build_audit", Config, run, argv)


if __name__ == "__main__":
    sys.exit(main())
