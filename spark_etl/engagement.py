"""Behaviour per pair, corrected for the place at which products were shown.

Clicks over expected clicks (COEC; Zhang and Jones 2007): an impression at position k is expected to bring the
data set's mean click rate at k, whatever is shown there. A pair with as many clicks as expected has rate 1.
"""

from __future__ import annotations

from pyspark.sql import DataFrame
from pyspark.sql import functions as sf

from spark_etl.recipes import EngagementRecipe

PAIR = ("dataset", "query_id", "product_id")
_COUNTS = {"impression": "impressions", "click": "clicks", "cart": "carts", "purchase": "purchases"}


def build_engagement(events: DataFrame, recipe: EngagementRecipe) -> DataFrame:
    """Counts, expected clicks and corrected rate of every pair that has an event."""
    counts = [sf.count_if(sf.col("kind") == kind).alias(name) for kind, name in _COUNTS.items()]
    by_place = events.groupBy(*PAIR, "position").agg(*counts)
    rates = (
        by_place.groupBy("dataset", "position")
        .agg(sf.sum("impressions").alias("shown"), sf.sum("clicks").alias("clicked"))
        .where(sf.col("shown") > 0)
        .select("dataset", "position", (sf.col("clicked") / sf.col("shown")).alias("click_rate"))
    )
    expected = sf.sum(sf.col("impressions") * sf.coalesce("click_rate", sf.lit(0.0)))
    prior = sf.lit(recipe.prior_clicks)
    corrected = (sf.col("clicks") + prior) / (sf.col("expected_clicks") + prior)
    return (
        by_place.join(sf.broadcast(rates), on=["dataset", "position"], how="left")
        .groupBy(*PAIR)
        .agg(*(sf.sum(name).alias(name) for name in _COUNTS.values()), expected.alias("expected_clicks"))
        .withColumn("corrected_rate", corrected)
    )
