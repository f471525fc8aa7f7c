"""Which doubtful pairs experts see: a stratified draw, in part at random, so that what they find tells of all.

A stratum is a data set, a class of the query's traffic, the first level of the product's category and the kind of the
conflict. Strata share the budget by the summed priority of their conflicts, none getting less than a floor. A first
part of the budget is drawn at random, with a known chance per stratum; the rest takes the largest priorities left.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import NamedTuple

from pyspark.sql import Column, DataFrame, SparkSession, Window
from pyspark.sql import functions as sf

from lake.schemas import REVIEW_QUEUE
from spark_etl.recipes import ReviewRecipe

PAIR = ("dataset", "query_id", "product_id")
QUERY_KEY = ("dataset", "query_id")
STRATUM = ("dataset", "traffic", "category", "kind")
LEVEL_SIGN = ">"
"""Between the levels of a category path."""


class Stratum(NamedTuple):
    """A stratum with what the plan gives it.

    Attributes:
        key: values of STRATUM.
        size: conflicts that wait for review.
        priority: their sum.
        num_random: pairs drawn at random.
        num_first: pairs taken by priority beside them.
    """

    key: tuple[str, ...]
    size: int
    priority: float
    num_random: int = 0
    num_first: int = 0


def query_traffic(engagement: DataFrame, recipe: ReviewRecipe) -> DataFrame:
    """Per query that shoppers saw products of, its `traffic`: head, torso or tail of the data set's impressions.

    Queries stand in the order of their impressions; a query is in the class in which the share of those before it ends.
    """
    per_query = engagement.groupBy(*QUERY_KEY).agg(sf.sum("impressions").alias("seen")).where("seen > 0")
    dataset = Window.partitionBy("dataset")
    before = dataset.orderBy(sf.desc("seen"), "query_id").rowsBetween(Window.unboundedPreceding, -1)
    share = sf.coalesce(sf.sum("seen").over(before), sf.lit(0)) / sf.sum("seen").over(dataset)
    # rounded: .5 + .4 is not below .9, whatever their last binary digits
    torso_ends = round(recipe.head_share + recipe.torso_share, 9)
    traffic = (
        sf.when(share < recipe.head_share, "head").when(sf.round(share, 9) < torso_ends, "torso").otherwise("tail")
    )
    return per_query.select(*QUERY_KEY, traffic.alias("traffic"))


def waiting_conflicts(
    conflicts: DataFrame, queue: DataFrame | None, settled: DataFrame | None, recipe: ReviewRecipe
) -> DataFrame:
    """The conflicts without those that an open batch holds or that were settled since they came up.

    Args:
        conflicts: rows of audit_conflict.
        queue: rows of review_queue, all batches; None: none was drawn yet.
        settled: PAIR and settled_at of every verdict and of pairs that judges kept; None: none.
        recipe: names batches that were given up.
    """
    if "found_at" not in conflicts.columns:  # of a lake that build_audit has not written since it has the column
        conflicts = conflicts.withColumn("found_at", sf.lit(None).cast("timestamp"))
    newest = None
    if settled is not None:
        newest = settled.groupBy(*PAIR).agg(sf.max("settled_at").alias("settled_at"))
        # Experts may give the day alone. A conflict of a lake that did not keep since when it stands counts as older.
        day_of = sf.date_trunc("day", "found_at")
        is_settled = sf.coalesce(sf.col("settled_at") >= day_of, sf.col("settled_at").isNotNull())
        conflicts = conflicts.join(newest, on=list(PAIR), how="left").where(~is_settled).drop("settled_at")
    if queue is None:
        return conflicts
    asked = queue.where(~sf.col("batch").isin(list(recipe.abandoned))) if recipe.abandoned else queue
    asked = asked.groupBy(*PAIR).agg(sf.max("created_at").alias("asked_at"))
    if newest is not None:
        is_older = sf.col("settled_at") < sf.date_trunc("day", "asked_at")
        asked = asked.join(newest, on=list(PAIR), how="left").where(sf.coalesce(is_older, sf.lit(True)))
    return conflicts.join(asked, on=list(PAIR), how="left_anti")


def with_stratum(conflicts: DataFrame, traffic: DataFrame, products: DataFrame) -> DataFrame:
    """The conflicts with `traffic`, tail for queries nobody saw, and `category`, the first level or an empty text.

    Args:
        conflicts: as of `waiting_conflicts`.
        traffic: as of `query_traffic`.
        products: dataset, product_id and category.
    """
    # only the conflicts' products, so that the catalogue is not shuffled where these fit a broadcast
    wanted = conflicts.select("dataset", "product_id").distinct()
    first = sf.trim(sf.split_part("category", sf.lit(LEVEL_SIGN), sf.lit(1)))
    categories = products.join(wanted, on=["dataset", "product_id"], how="left_semi").select(
        "dataset", "product_id", first.alias("category")
    )
    return (
        conflicts.join(traffic, on=list(QUERY_KEY), how="left")
        .join(categories, on=["dataset", "product_id"], how="left")
        .fillna({"traffic": "tail", "category": ""})
    )


def plan_strata(waiting: DataFrame, recipe: ReviewRecipe) -> list[Stratum]:
    """Every stratum with its share of the budget; a small table, found at once.

    Args:
        waiting: as of `with_stratum`.
        recipe: budget, order and floor.
    """
    rows = waiting.groupBy(*STRATUM).agg(sf.count("*").alias("size"), sf.sum("priority").alias("priority")).collect()
    # rounded, since engines add in any order
    strata = sorted(
        Stratum(tuple(row[name] for name in STRATUM), row["size"], round(row["priority"], 6)) for row in rows
    )
    sizes, weights = [one.size for one in strata], [one.priority for one in strata]
    at_random = recipe.budget if recipe.order == "random" else round(recipe.budget * recipe.random_share)
    random = allocate(sizes, weights, [recipe.min_per_stratum] * len(strata), at_random)
    first = allocate(
        [size - drawn for size, drawn in zip(sizes, random, strict=True)],
        weights,
        [recipe.min_per_stratum - drawn for drawn in random],
        # a random part that the strata could not take whole leaves its rest to the other
        recipe.budget - sum(random) if recipe.order == "priority" else 0,
    )
    return [
        one._replace(num_random=drawn, num_first=taken) for one, drawn, taken in zip(strata, random, first, strict=True)
    ]


def allocate(sizes: Sequence[int], weights: Sequence[float], floors: Sequence[int], budget: int) -> list[int]:
    """How much of a budget each stratum gets: its floor, then by weight, never more than its size.

    Floors are filled in turns, a pair to each stratum by falling weight, so that a budget below their sum reaches as
    many strata as it can. The rest goes to the stratum that is furthest below its proportional share (Webster's
    method), so that the whole budget is used as long as any stratum has room.

    Args:
        sizes: most that each stratum can take.
        weights: at least 0.
        floors: fewest that each shall get; below 0 counts as 0.
        budget: to be shared.
    """
    given, left = [0] * len(sizes), budget
    by_weight = sorted(range(len(sizes)), key=lambda place: (-weights[place], place))
    least = [max(0, min(floor, size)) for floor, size in zip(floors, sizes, strict=True)]
    for turn in range(max(least, default=0)):
        for place in by_weight:
            if left and given[place] == turn < least[place]:
                given[place] += 1
                left -= 1
    if sum(sizes) - sum(given) <= left:
        return list(sizes)
    # strata without any weight come last
    waiting = [(_standing(weights[place], given[place]), place) for place in range(len(sizes))]
    heapq.heapify(waiting)
    while left and waiting:
        _, place = heapq.heappop(waiting)
        if given[place] < sizes[place]:
            given[place] += 1
            left -= 1
            heapq.heappush(waiting, (_standing(weights[place], given[place]), place))
    return given


def _standing(weight: float, given: int) -> float:
    """The lower, the further below its share a stratum is that has so much."""
    return (given + 0.5) / weight if weight > 0 else float("inf")


def draw_pairs(waiting: DataFrame, strata: Sequence[Stratum], batch_number: int, recipe: ReviewRecipe) -> DataFrame:
    """The batch: columns of review_queue but batch and created_at.

    Random pairs are the first of their stratum by a hash of seed, batch and pair. In the queue they stand in the order
    of that hash over all strata, and those by priority in that of their priority, spread evenly among each other: so
    whatever beginning of the queue is reviewed, its random pairs are a random draw of each stratum.

    Args:
        waiting: as of `with_stratum`.
        strata: as of `plan_strata`.
        batch_number: how many batches there were before; a pair that stayed behind is not behind for ever.
        recipe: its seed.
    """
    planned = _as_frame(waiting.sparkSession, strata)
    lot = sf.xxhash64(sf.lit(recipe.seed), sf.lit(batch_number), *PAIR)
    in_stratum = Window.partitionBy(*STRATUM)
    by_lot = in_stratum.orderBy("lot", *PAIR)
    by_priority = in_stratum.orderBy("is_random", sf.desc("priority"), *PAIR)
    drawn = (
        waiting.join(sf.broadcast(planned), on=list(STRATUM))
        .withColumn("lot", lot)
        .withColumn("is_random", sf.row_number().over(by_lot) <= sf.col("num_random"))
        .withColumn("place", sf.row_number().over(by_priority))
        .where(sf.col("is_random") | (sf.col("place") <= sf.col("num_first")))
    )
    chance = sf.when(sf.col("is_random"), sf.col("num_random") / sf.col("stratum_size"))
    names = [name for name in REVIEW_QUEUE.column_names if name not in ("batch", "created_at")]
    return drawn.withColumns({"inclusion_probability": chance, "rank": _rank()}).select(*names)


def _rank() -> Column:
    """Place in the queue: both parts spread evenly, a random pair before the other where they meet."""
    part = Window.partitionBy("is_random")
    own = sf.when(sf.col("is_random"), sf.col("lot")).otherwise(0)
    place = sf.row_number().over(part.orderBy(own, sf.desc("priority"), *PAIR))
    share = (place - 0.5) / sf.count("*").over(part)
    return sf.row_number().over(Window.partitionBy().orderBy(share, sf.desc("is_random"), *PAIR)).cast("int")


def _as_frame(spark: SparkSession, strata: Sequence[Stratum]) -> DataFrame:
    kinds = ", ".join(f"{name} string" for name in STRATUM)
    rows = [(*one.key, one.size, one.num_random, one.num_first) for one in strata]
    return spark.createDataFrame(rows, f"{kinds}, stratum_size bigint, num_random int, num_first int")
