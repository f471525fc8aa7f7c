"""Rates per look of pairs, drawn to what their query, and their share of its looks, let expect.

Empirical Bayes in three steps, each fitted to all pairs of a data set. A query's rate is that of its class of queries
and of all its pairs but the one at hand, whose own events are so counted once. How large a share of its query's looks a
pair got is what the shop's own ranker thinks of it: each part of the pairs by that share has more or fewer successes
than their queries let expect. Around the product of the two the rates of pairs vary by a Beta distribution, worth as
many looks as their spread in the data set says (Efron and Morris 1973; Morris 1983).
"""

from __future__ import annotations

from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as sf

from spark_etl.attraction import with_attraction
from spark_etl.quantiles import as_data, with_part
from spark_etl.recipes import EngagementRecipe
from spark_etl.shrinkage import fit_priors, posterior, strength_around

QUERY_KEY = ("dataset", "query_id")
CLASS = ("dataset", "stratum")
RATES = {"clicks": "click_rate", "carts": "cart_rate", "purchases": "purchase_rate"}
"""Column of successes -> name of their rate."""
_LEAST_MEAN, _MOST_MEAN = 1e-9, 0.99


def with_rates(pairs: DataFrame, recipe: EngagementRecipe) -> DataFrame:
    """Adds each rate per look, as NAME_low and NAME_high its 95 % interval, and attraction.

    All are null where a data set has no look.

    Args:
        pairs: QUERY_KEY, product_id, stratum (of the query), trials, squares and the columns of RATES; see
            `fit_priors`.
    """
    placed = _with_expected(pairs, recipe).persist()
    try:
        exposed = with_part(placed, "part", "share_of_looks", ["dataset"], recipe.num_exposures)
        lifts = _lifts(exposed, recipe.prior_clicks)
        lifted = exposed.join(sf.broadcast(lifts), on=["dataset", "part"], how="left")
        meant = lifted.withColumns({f"{name}_mean": _lifted(name) for name in RATES})
        means = {name: sf.col(f"{name}_mean") for name in RATES}
        known = [strength_around(mean, sf.col(name)).alias(f"{name}_strength") for name, mean in means.items()]
        strengths = as_data(meant.groupBy("dataset").agg(*known))
        attracting = with_attraction(meant, list(RATES), _MOST_MEAN)
    finally:
        placed.unpersist()
    strong = attracting.join(sf.broadcast(strengths), on="dataset", how="left")
    columns: dict[str, Column] = {}
    for name, rate in RATES.items():
        strength = sf.col(f"{name}_strength")
        prior = (means[name] * strength, (1 - means[name]) * strength)
        interval = posterior(sf.col(name).cast("double"), sf.col("trials"), prior)
        columns |= dict(zip((rate, f"{rate}_low", f"{rate}_high"), interval, strict=True))
    used = [f"{name}_{what}" for name in RATES for what in ("mean", "lift", "strength")]
    return strong.withColumns(columns).drop(*used, "share_of_looks", "part")


def _with_expected(pairs: DataFrame, recipe: EngagementRecipe) -> DataFrame:
    """Adds `share_of_looks`, of the query's, and NAME_mean: the query's rate by what all its other pairs brought."""
    queries = pairs.groupBy(*QUERY_KEY, "stratum").agg(
        *(sf.sum(name).alias(name) for name in (*RATES, "trials", "squares"))
    )
    priors = fit_priors(queries, list(RATES), CLASS, min_rows=recipe.min_queries_per_class)
    rows = [(*key, *(end for name in RATES for end in found[name])) for key, found in priors.items()]
    ends = [f"{name}_{end}" for name in RATES for end in ("hits", "misses")]
    schema = ", ".join(["dataset string", "stratum int", *(f"{end} double" for end in ends)])
    known = pairs.sparkSession.createDataFrame(rows, schema)
    joined = pairs.join(sf.broadcast(known), on=list(CLASS), how="left")
    query = Window.partitionBy(*QUERY_KEY)
    looks = sf.sum("trials").over(query)
    columns = {"share_of_looks": sf.try_divide("trials", looks)}
    for name in RATES:
        others = sf.sum(name).over(query) - sf.col(name)
        misses = sf.greatest(looks - sf.col("trials") - others, sf.lit(0.0))
        hits = others + sf.col(f"{name}_hits")
        columns[f"{name}_mean"] = hits / (hits + misses + sf.col(f"{name}_misses"))
    return joined.withColumns(columns).drop(*ends)


def _lifts(exposed: DataFrame, prior_clicks: float) -> DataFrame:
    """Per part of the pairs by their share of looks NAME_lift: successes over those that their queries let expect."""
    found = [(sf.sum(name), sf.sum(sf.col("trials") * sf.col(f"{name}_mean")), name) for name in RATES]
    lifts = [((seen + prior_clicks) / (due + prior_clicks)).alias(f"{name}_lift") for seen, due, name in found]
    return as_data(exposed.groupBy("dataset", "part").agg(*lifts))


def _lifted(name: str) -> Column:
    mean = sf.col(f"{name}_mean") * sf.coalesce(f"{name}_lift", sf.lit(1.0))
    return sf.when(mean.isNotNull(), sf.least(sf.greatest(mean, sf.lit(_LEAST_MEAN)), sf.lit(_MOST_MEAN)))
