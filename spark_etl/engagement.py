"""Behaviour per pair, freed of the places at which products were shown.

Two ways: clicks over expected clicks (COEC; Zhang and Jones 2007), where an impression at place k is expected to bring
the data set's mean click rate at k, whatever is shown there; and the rates per look of a position-based click model,
which tells what good products gain from their places from what places gain from good products; see
`spark_etl.rates` for what a pair with few looks is taken to have.
"""

from __future__ import annotations

from collections.abc import Iterable

from pyspark.sql import DataFrame
from pyspark.sql import functions as sf

from spark_etl.click_model import PAIR, ClickModel, bin_of
from spark_etl.quantiles import with_part
from spark_etl.rates import QUERY_KEY, with_rates
from spark_etl.recipes import EngagementRecipe
from spark_etl.visits import COUNTS

_UNKNOWN = 0


def sum_days(place_counts: DataFrame) -> DataFrame:
    """Events of every pair by place over all days: what all else is made of.

    Args:
        place_counts: rows of that table.
    """
    return place_counts.groupBy(*PAIR, "position").agg(*(sf.sum(name).alias(name) for name in COUNTS.values()))


def build_engagement(counts: DataFrame, models: Iterable[ClickModel], recipe: EngagementRecipe) -> DataFrame:
    """Counts, both corrected rates, and the breadth and stratum of the query, of every pair that has an event.

    Args:
        counts: as of `sum_days`, persisted by the caller, since several passes read it.
        models: one of each data set of the counts.
    """
    mean_rates = (
        counts.groupBy("dataset", "position")
        .agg(sf.sum("impressions").alias("shown"), sf.sum("clicks").alias("clicked"))
        .where(sf.col("shown") > 0)
        .select("dataset", "position", (sf.col("clicked") / sf.col("shown")).alias("mean_rate"))
    )
    placed = counts.join(sf.broadcast(mean_rates), on=["dataset", "position"], how="left")
    placed = placed.withColumn("first", bin_of(sf.col("position"), recipe.click_model))
    placed = placed.join(sf.broadcast(_looks(counts, models)), on=["dataset", "first"], how="left")
    look, shown = sf.coalesce("look", sf.lit(1.0)), sf.greatest("impressions", "clicks")
    pairs = (
        placed.groupBy(*PAIR)
        .agg(
            *(sf.sum(name).alias(name) for name in COUNTS.values()),
            sf.sum(sf.col("impressions") * sf.coalesce("mean_rate", sf.lit(0.0))).alias("expected_clicks"),
            sf.sum(shown * look).alias("trials"),
            sf.sum(shown * look * look).alias("squares"),
        )
        .persist()
    )
    prior_clicks = sf.lit(recipe.prior_clicks)
    corrected = (sf.col("clicks") + prior_clicks) / (sf.col("expected_clicks") + prior_clicks)
    try:
        stratified = pairs.join(_strata(pairs, recipe.num_strata), on=list(QUERY_KEY), how="inner")
        found = with_rates(stratified.withColumn("corrected_rate", corrected), recipe)
    finally:
        pairs.unpersist()
    return found.withColumnRenamed("trials", "examinations").drop("squares")


def _looks(counts: DataFrame, models: Iterable[ClickModel]) -> DataFrame:
    rows = [
        (model.dataset, first, look)
        for model in models
        for first, look in zip(model.first_position_K, model.examination_K, strict=True)
    ]
    return counts.sparkSession.createDataFrame(rows, "dataset string, first int, look double")


def _strata(pairs: DataFrame, num_strata: int) -> DataFrame:
    """Each query's breadth and its stratum: 1 (narrow) to `num_strata`; 0 and no breadth with fewer than two clicks.

    Breadth is the number of products over which clicks would have to be spread evenly for two of them to meet as often
    as they do: 1 / P(two clicks are on one product), estimated without bias from any number of clicks (Simpson 1949).
    """
    clicks = sf.col("clicks")
    met = sf.sum(clicks * (clicks - 1))
    both = sf.sum(clicks) * (sf.sum(clicks) - 1)
    breadth = sf.when(both > 0, both / sf.greatest(met, sf.lit(1)))
    queries = with_part(
        pairs.groupBy(*QUERY_KEY).agg(breadth.alias("breadth")), "part", "breadth", ["dataset"], num_strata
    )
    return queries.select(*QUERY_KEY, "breadth", sf.coalesce(sf.col("part") + 1, sf.lit(_UNKNOWN)).alias("stratum"))
