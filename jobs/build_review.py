"""A batch of doubtful pairs for experts, drawn by traffic, category and kind of doubt, in part at random."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import reduce
from typing import TYPE_CHECKING

from conf.load import settings
from jobs import job
from lake.runs import RunRecord
from lake.schemas import AUDIT_VERDICT, REVIEW_QUEUE, REVIEW_ROUTE
from lake.spark import SparkPlacement
from lake.tables import equal_to
from spark_etl.recipes import ReviewRecipe

if TYPE_CHECKING:
    from pyspark.sql import DataFrame


@settings
class Inputs:
    """Tables read."""

    audit_conflict: job.TableVersion = "newest"
    engagement: job.TableVersion = "newest"
    catalog_product: job.TableVersion = "newest"
    audit_verdict: job.TableVersion = job.IF_THERE
    review_queue: job.TableVersion = job.IF_THERE
    review_route: job.TableVersion = job.IF_THERE


@settings
class Placement:
    """Where Spark runs."""

    spark: SparkPlacement = SparkPlacement()


@settings
class Config:
    """Settings of build_review."""

    lake: job.LakeRoot = job.DEFAULT_LAKE
    setting: job.SettingName = "dev"
    inputs: Inputs = Inputs()
    recipe: ReviewRecipe = ReviewRecipe()
    placement: Placement = Placement()


def run(config: Config) -> RunRecord:
    """Adds a batch, named by the run, to the queue."""
    from pyspark.sql import functions as sf

    from lake import spark as lake_spark
    from spark_etl.review import draw_pairs, plan_strata, query_traffic, waiting_conflicts, with_stratum

    current = job.begin(config, "build_review")
    spark = lake_spark.session(config.placement.spark)
    tables = lake_spark.pinned_rows(spark, current.lake, current.inputs)
    queue = tables.get(REVIEW_QUEUE.name)
    num_batches = queue.select("batch").distinct().count() if queue is not None else 0
    waiting = waiting_conflicts(tables["audit_conflict"], queue, settled(tables), config.recipe)
    traffic = query_traffic(tables["engagement"], config.recipe)
    products = tables["catalog_product"].select("dataset", "product_id", "category")
    with lake_spark.keeping() as keep:
        waiting = keep(with_stratum(waiting, traffic, products))
        strata = plan_strata(waiting, config.recipe)
        drawn = draw_pairs(waiting, strata, num_batches, config.recipe)
        # a letter first, since a run's id may be all digits, which in a list of settings would be a number
        batch = f"review-{current.run_id}"
        rows = drawn.withColumns({"batch": sf.lit(batch), "created_at": sf.lit(current.started_at).cast("timestamp")})
        where = equal_to({"batch": batch})
        written = lake_spark.replace(spark, current.lake, REVIEW_QUEUE, rows, run_id=current.run_id, where=where)
    num_random, num_first = sum(one.num_random for one in strata), sum(one.num_first for one in strata)
    return current.finish(
        rows=num_random + num_first,
        outputs={REVIEW_QUEUE.name: written},
        counts={
            "waiting": sum(one.size for one in strata),
            "strata": len(strata),
            "at_random": num_random,
            "by_priority": num_first,
            "strata_without_random": sum(not one.num_random for one in strata),
            "waiting_without_random": sum(one.size for one in strata if not one.num_random),
        },
    )


def settled(tables: Mapping[str, DataFrame]) -> DataFrame | None:
    """The pairs that need no review, with the time since when: those with a verdict, and those that labellers kept."""
    from spark_etl.review import PAIR

    found = []
    if AUDIT_VERDICT.name in tables:
        found.append(tables[AUDIT_VERDICT.name].withColumnRenamed("decided_at", "settled_at"))
    if REVIEW_ROUTE.name in tables:
        found.append(tables[REVIEW_ROUTE.name].where("route = 'kept'").withColumnRenamed("created_at", "settled_at"))
    frames = [frame.select(*PAIR, "settled_at") for frame in found]
    return reduce(lambda one, other: one.unionByName(other), frames) if frames else None


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of the job."""
    return job.main("build_review", Config, run, argv)


if __name__ == "__main__":
    sys.exit(main())
