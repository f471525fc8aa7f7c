"""Pairs whose behaviour contradicts their human grade: loved but grade 0, ignored but grade 2."""

from __future__ import annotations

from pyspark.sql import DataFrame
from pyspark.sql import functions as sf

from lake.schemas import AUDIT_CONFLICT, Grade
from spark_etl.recipes import AuditRecipe

_ACCURACY = 10_000
"""Of percentile_approx: quantiles are exact up to so many distinct rates per data set."""


def find_conflicts(engagement: DataFrame, consensus: DataFrame, recipe: AuditRecipe) -> DataFrame:
    """Conflicts with their priority: |log corrected rate| x sqrt(impressions), the evidence against the grade.

    Quantiles are taken per data set over all pairs shown at least `min_impressions` times, judged or not.
    """
    shown = engagement.where(sf.col("impressions") >= recipe.min_impressions)
    bounds = shown.groupBy("dataset").agg(
        sf.percentile_approx("corrected_rate", recipe.loved_quantile, _ACCURACY).alias("loved_above"),
        sf.percentile_approx("corrected_rate", recipe.ignored_quantile, _ACCURACY).alias("ignored_below"),
    )
    judged = shown.join(
        consensus.select("dataset", "query_id", "product_id", "grade"),
        on=["dataset", "query_id", "product_id"],
        how="inner",
    ).join(sf.broadcast(bounds), on="dataset", how="inner")
    is_loved = (sf.col("corrected_rate") > sf.col("loved_above")) & (sf.col("clicks") >= recipe.min_clicks)
    is_ignored = sf.col("corrected_rate") < sf.col("ignored_below")
    kind = sf.when(is_loved & (sf.col("grade") == int(Grade.IRRELEVANT)), "loved_but_irrelevant").when(
        is_ignored & (sf.col("grade") == int(Grade.EXACT)), "ignored_but_exact"
    )
    priority = sf.abs(sf.log("corrected_rate")) * sf.sqrt("impressions")
    return (
        judged.withColumns({"kind": kind, "priority": priority})
        .where(sf.col("kind").isNotNull())
        .select(*AUDIT_CONFLICT.column_names)
    )
