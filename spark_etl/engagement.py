"""Behaviour per pair, freed of the places at which products were shown.

Two ways: clicks over expected clicks (COEC; Zhang and Jones 2007), where an impression at place k is expected to bring
the data set's mean click rate at k, whatever is shown there; and the rates per look of a position-based click model,
which tells what good products gain from their places from what places gain from good products. Rates per look are drawn
to the mean of their class of queries, since broad queries spread their clicks over many products.
"""

from __future__ import annotations

from collections.abc import Iterable

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as sf

from spark_etl.click_model import PAIR, ClickModel, bin_of
from spark_etl.quantiles import with_part
from spark_etl.recipes import EngagementRecipe
from spark_etl.shrinkage import fit_priors, posterior
from spark_etl.visits import COUNTS

QUERY_KEY = ("dataset", "query_id")
RATES = {"clicks": "click_rate", "carts": "cart_rate", "purchases": "purchase_rate"}
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
        found = with_rates(stratified.withColumn("corrected_rate", corrected), recipe.min_pairs_per_class)
    finally:
        pairs.unpersist()
    return found.withColumnRenamed("trials", "examinations").drop("squares")


def with_rates(pairs: DataFrame, min_pairs: int) -> DataFrame:
    """Adds mean and interval of the rates per look under the prior of the pair's data set and stratum.

    Args:
        pairs: dataset, stratum, trials, squares and the columns of RATES.
        min_pairs: a class with fewer pairs takes the prior of its data set.
    """
    found = fit_priors(pairs, list(RATES), ("dataset", "stratum"), min_pairs=min_pairs)
    rows = [(*key, *(value for name in RATES for value in priors[name])) for key, priors in found.items()]
    names = [f"{name}_{end}" for name in RATES for end in ("hits", "misses")]
    schema = ", ".join(["dataset string", "stratum int", *(f"{name} double" for name in names)])
    priors = pairs.sparkSession.createDataFrame(rows, schema)
    joined = pairs.join(sf.broadcast(priors), on=["dataset", "stratum"], how="left")
    columns: dict[str, Column] = {}
    for name, rate in RATES.items():
        prior = (sf.col(f"{name}_hits"), sf.col(f"{name}_misses"))
        mean, low, high = posterior(sf.col(name).cast("double"), sf.col("trials"), prior)
        columns |= {rate: mean, f"{rate}_low": low, f"{rate}_high": high}
    return joined.withColumns(columns).drop(*names)


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
