"""Pairs that wait for a grade of the labeller, for train queries only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import reduce

from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as sf

from lake.schemas import CANDIDATE_PAIR
from spark_etl.recipes import SamplePairsRecipe

PAIR = ("dataset", "query_id", "product_id")
QUERY_KEY = ("dataset", "query_id")


def sample_pairs(tables: Mapping[str, DataFrame], recipe: SamplePairsRecipe) -> DataFrame:
    """Candidate pairs of the recipe's sources: no pair has a consensus grade, every query is a train query.

    Args:
        tables: table -> rows: query, catalog_product and annotation_consensus; human_annotation, engagement and
            mined_pair where their source is asked for.
    """
    train = tables["query"].where(sf.col("split") == "train").select(*QUERY_KEY)
    judged = tables["annotation_consensus"]
    draw: dict[str, Callable[[], DataFrame]] = {
        "annotated": lambda: tables["human_annotation"].select(*PAIR).distinct(),
        "sampled": lambda: draw_products(train, tables, recipe),
        "engagement": lambda: most_shown(train, tables["engagement"], judged, recipe),
        "mined": lambda: tables["mined_pair"].select(*PAIR).distinct(),
    }
    frames = [
        draw[source]()
        .join(judged, on=list(PAIR), how="left_anti")
        .join(train, on=list(QUERY_KEY), how="left_semi")
        .withColumn("source", sf.lit(source))
        for source in recipe.sources
    ]
    return reduce(DataFrame.unionByName, frames).select(*CANDIDATE_PAIR.column_names)


def num_needed(recipe: SamplePairsRecipe) -> Column:
    """Products to sample for a query with `positives` grades above 0 and `negatives` grades of 0.

    Grade 0 is the share s of an instance when negatives >= s / (1 - s) x positives.
    """
    odds = recipe.irrelevant_share / (1 - recipe.irrelevant_share)
    lacking = sf.greatest(odds * sf.col("positives") - sf.col("negatives"), sf.lit(0.0))
    # Rounded first: 13 x .65 / .35 x 1.2 must not become one more by the last binary digit.
    needed = sf.ceil(sf.round(lacking * (1 + recipe.slack), 9))
    return sf.least(needed, sf.lit(recipe.max_sampled_per_query)).cast("int")


def draw_products(train: DataFrame, tables: Mapping[str, DataFrame], recipe: SamplePairsRecipe) -> DataFrame:
    """Random products of the query's own data set, as many as its instance lacks of grade 0.

    The catalogue stands once in an order given by a hash of seed and product; a query takes the products from a
    place given by the hash of seed and query on, round the end, passing over those it has marks for. So its sample
    is uniform and without repetition, needs one join, and depends neither on other queries nor on the cluster.
    """
    judged = tables["annotation_consensus"]
    is_positive = sf.col("grade") > 0
    wanted = (
        judged.join(train, on=list(QUERY_KEY), how="left_semi")
        .groupBy(*QUERY_KEY)
        .agg(sf.count_if(is_positive).alias("positives"), sf.count_if(~is_positive).alias("negatives"))
        .withColumn("needed", num_needed(recipe))
        .where(sf.col("needed") > 0)
    )
    seen = judged.select(*PAIR)
    if "human_annotation" in tables:
        seen = seen.unionByName(tables["human_annotation"].select(*PAIR)).distinct()
    num_seen = seen.groupBy(*QUERY_KEY).agg(sf.count("*").alias("num_seen"))
    numbered, sizes = _in_random_order(tables["catalog_product"], recipe.seed)
    steps = sf.least(sf.col("needed") + sf.col("num_seen"), sf.col("num_products"))
    start = sf.pmod(sf.xxhash64(sf.lit(recipe.seed), *QUERY_KEY), sf.col("num_products"))
    draws = (
        wanted.join(num_seen, on=list(QUERY_KEY), how="inner")
        .join(sf.broadcast(sizes), on="dataset", how="inner")
        .select(
            *QUERY_KEY,
            "needed",
            "num_products",
            start.alias("start"),
            sf.explode(sf.sequence(sf.lit(1), steps)).alias("step"),
        )
        .withColumn("place", sf.pmod(sf.col("start") + sf.col("step"), sf.col("num_products")))
    )
    fresh = draws.join(numbered, on=["dataset", "place"], how="inner").join(seen, on=list(PAIR), how="left_anti")
    order = sf.row_number().over(Window.partitionBy(*QUERY_KEY).orderBy("step"))
    return fresh.withColumn("order", order).where(sf.col("order") <= sf.col("needed")).select(*PAIR)


def _in_random_order(products: DataFrame, seed: int) -> tuple[DataFrame, DataFrame]:
    """Products with their `place` (0, 1, ...) in the data set's random order, and `num_products` per data set."""
    shuffled = Window.partitionBy("dataset").orderBy(sf.xxhash64(sf.lit(seed), "dataset", "product_id"), "product_id")
    numbered = products.select(
        "dataset", "product_id", (sf.row_number().over(shuffled) - 1).cast("bigint").alias("place")
    )
    return numbered, products.groupBy("dataset").agg(sf.count("*").alias("num_products"))


def most_shown(train: DataFrame, engagement: DataFrame, judged: DataFrame, recipe: SamplePairsRecipe) -> DataFrame:
    """Per train query the products that shoppers saw most often among those without a consensus."""
    waiting = (
        engagement.where(sf.col("impressions") > 0)
        .join(train, on=list(QUERY_KEY), how="left_semi")
        .join(judged, on=list(PAIR), how="left_anti")
    )
    order = sf.row_number().over(Window.partitionBy(*QUERY_KEY).orderBy(sf.desc("impressions"), "product_id"))
    return waiting.withColumn("order", order).where(sf.col("order") <= recipe.max_engagement_per_query).select(*PAIR)
