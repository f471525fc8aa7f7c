"""What analysts ask of a lake: where grades are in doubt and why, what shoppers do by place and by grade.

Every answer is one row per class and small enough for a plot, whatever the lake's size; what is not so says so.
"""

from __future__ import annotations

from functools import reduce

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as sf

from lake.schemas import Grade
from spark_etl.audit import GRADES, PAIR
from spark_etl.quantiles import ACCURACY, as_data
from spark_etl.rates import QUERY_KEY, RATES
from spark_etl.recipes import AuditRecipe

_Z_95 = 1.959963984540054
"""Of the standard normal distribution, 97.5 % lie below."""
NUM_PARTS = 20
"""Parts of equal width in which probabilities are counted."""
QUARTILES = (0.25, 0.5, 0.75)


def count_conflicts(conflicts: DataFrame) -> DataFrame:
    """Conflicts by data set, kind, grade and stratum, how many are expected to be wrong, and how often they were shown.

    Args:
        conflicts: rows of audit_conflict.
    """
    return (
        conflicts.groupBy("dataset", "kind", "grade", "stratum")
        .agg(
            sf.count("*").alias("num_pairs"),
            sf.sum("wrong_probability").alias("expected_wrong"),
            sf.sum("impressions").alias("impressions"),
        )
        .orderBy("dataset", "kind", "grade", "stratum")
    )


def conflict_shares(conflicts: DataFrame, consensus: DataFrame) -> DataFrame:
    """By data set and human grade: judged pairs, those in doubt, and their share.

    Args:
        conflicts: rows of audit_conflict.
        consensus: rows of annotation_consensus.
    """
    by_grade = ["dataset", "grade"]
    judged = consensus.groupBy(*by_grade).agg(sf.count("*").alias("num_judged"))
    doubted = conflicts.groupBy(*by_grade).agg(sf.count("*").alias("num_conflicts"))
    found = judged.join(doubted, on=by_grade, how="left").fillna({"num_conflicts": 0})
    return found.withColumn("share", sf.col("num_conflicts") / sf.col("num_judged")).orderBy(*by_grade)


def doubt_histogram(conflicts: DataFrame) -> DataFrame:
    """Conflicts by data set, kind and part of the range of wrong_probability; `from_probability` is where it begins.

    Conflicts without that probability, of lakes of before, are left out.
    """
    part = sf.least(sf.floor(sf.col("wrong_probability") * NUM_PARTS), sf.lit(NUM_PARTS - 1))
    return (
        conflicts.where(sf.col("wrong_probability").isNotNull())
        .groupBy("dataset", "kind", (part / NUM_PARTS).alias("from_probability"))
        .agg(sf.count("*").alias("num_pairs"))
        .orderBy("dataset", "kind", "from_probability")
    )


def first_conflicts(conflicts: DataFrame, queries: DataFrame, products: DataFrame, num: int) -> DataFrame:
    """The `num` conflicts of the greatest priority with their texts and the grade that all evidence makes likeliest.

    Args:
        conflicts: rows of audit_conflict.
        queries: rows of the table query.
        products: rows of catalog_product.
        num: few, since they are found at once, so that queries and catalogue are read once for them alone.
    """
    in_order = [sf.desc("priority"), *(sf.asc(name) for name in PAIR)]
    first = with_texts(as_data(conflicts.orderBy(*in_order).limit(num)), queries, products)
    return (
        first.withColumn("likely_grade", _likeliest("posterior"))
        .orderBy(*in_order)
        .select(
            *("dataset", "query", "title", "kind", "grade", "likely_grade", "wrong_probability", "num_marks"),
            *("impressions", "clicks", "purchases", "stratum", "click_rate", "click_rate_low", "click_rate_high"),
            *("p0", "p1", "p2", "posterior_0", "posterior_1", "posterior_2"),
            *("priority", "found_at", "brand", "category", "query_id", "product_id"),
        )
    )


def with_texts(pairs: DataFrame, queries: DataFrame, products: DataFrame) -> DataFrame:
    """Adds `query`, `title`, `brand` and `category` to few pairs; null where the lake no longer has the text.

    Args:
        pairs: few enough to be sent to every worker.
        queries: rows of the table query.
        products: rows of catalog_product.
    """
    asked = queries.select(*QUERY_KEY, sf.col("text").alias("query"))
    shown = products.select("dataset", "product_id", "title", "brand", "category")
    for texts, key in ((asked, list(QUERY_KEY)), (shown, ["dataset", "product_id"])):
        few = texts.join(sf.broadcast(pairs.select(*key).distinct()), on=key, how="left_semi")
        pairs = pairs.join(sf.broadcast(few), on=key, how="left")
    return pairs


def newest_report(report: DataFrame) -> DataFrame:
    """The rows of audit_report that its newest run wrote."""
    newest = report.agg(sf.max_by("run_id", "created_at").alias("run_id"))
    return report.join(sf.broadcast(newest), on="run_id", how="left_semi").orderBy("part", "slice", "name")


def explain_query(judged: DataFrame, annotations: DataFrame, query: DataFrame, recipe: AuditRecipe) -> DataFrame:
    """The judged pairs of queries with marks, evidence, and `why`, in words, each is in doubt or not; most wrong first.

    Args:
        judged: as of `spark_etl.audit.judge_pairs`.
        annotations: rows of human_annotation.
        query: dataset and query_id of few queries.
        recipe: that of `judged`.
    """
    key = sf.broadcast(query.select(*QUERY_KEY))
    marks = _marks(annotations.join(key, on=list(QUERY_KEY), how="left_semi"))
    pairs = judged.join(key, on=list(QUERY_KEY), how="left_semi").join(marks, on=list(PAIR), how="left")
    return pairs.withColumns({"likely_grade": _likeliest("posterior"), "why": _reason(recipe)}).orderBy(
        sf.desc("wrong_probability"), *PAIR
    )


def _marks(annotations: DataFrame) -> DataFrame:
    """Per pair `marks`: who gave which grade, as text."""
    several = sf.format_string("mean of %d: %.2f", "num_marks", "grade_value")
    mark = sf.when(sf.col("num_marks") > 1, several).otherwise(sf.col("grade").cast("string"))
    named = sf.concat_ws(" ", "annotator", mark)
    return annotations.groupBy(*PAIR).agg(sf.concat_ws(", ", sf.sort_array(sf.collect_list(named))).alias("marks"))


def _likeliest(prefix: str) -> Column:
    """The grade of the greatest of three probabilities, the lowest of equal ones; null where they are."""
    best = sf.greatest(*(f"{prefix}_{grade}" for grade in GRADES))
    return sf.coalesce(*(sf.when(sf.col(f"{prefix}_{grade}") == best, grade) for grade in GRADES))


def _reason(recipe: AuditRecipe) -> Column:
    """All rules that a pair meets with the numbers that they compare, or why it meets none."""
    loved = sf.format_string(
        f"grade 0, but %.4f clicks per look are above %.4f, the {recipe.loved_quantile} quantile of stratum %d, "
        f"and %d clicks are at least {recipe.min_clicks}",
        *("click_rate", "loved_above", "stratum", "clicks"),
    )
    ignored = sf.format_string(
        f"grade 2, but %.4f clicks per look are below %.4f, the {recipe.ignored_quantile} quantile of stratum %d",
        *("click_rate", "ignored_below", "stratum"),
    )
    said = sf.element_at(sf.array("p0", "p1", "p2"), sf.col("labeller_names") + 1)
    usual = sf.element_at("sure_of", sf.col("labeller_names") + 1)
    named = sf.format_string(
        "the labeller gives grade %d %.3f, no less than %.3f on average where people give it",
        *("labeller_names", said, usual),
    )
    doubtful = sf.format_string(
        f"by all evidence other grades have %.3f, at least {recipe.min_wrong_probability}", "wrong_probability"
    )
    is_doubtful = sf.col("wrong_probability") >= recipe.min_wrong_probability
    reasons = sf.concat_ws(
        "; ",
        sf.when(sf.col("is_loved") & (sf.col("grade") == int(Grade.IRRELEVANT)), loved),
        sf.when(sf.col("is_ignored") & (sf.col("grade") == int(Grade.EXACT)), ignored),
        sf.when(sf.col("labeller_names").isNotNull(), named),
        sf.when(is_doubtful, doubtful),
    )
    seldom = sf.coalesce("impressions", sf.lit(0)) < recipe.min_impressions
    no_rule = sf.format_string(
        f"no conflict: other grades have %.3f, below {recipe.min_wrong_probability}%s",
        "wrong_probability",
        sf.when(seldom, f"; shown less than {recipe.min_impressions} times, so not judged by clicks alone").otherwise(
            ""
        ),
    )
    return sf.when(sf.col("kind").isNull(), no_rule).otherwise(reasons)


def click_rates_by_place(place_counts: DataFrame, click_model: DataFrame) -> DataFrame:
    """Per place: the raw click rate with Wilson's 95 % interval, that of the first place as 1, and the fitted looks.

    `relative_rate` falls with the place for two reasons, fewer looks and worse products; `examination` for the first
    alone, so it lies above where the ranking is good.

    Args:
        place_counts: rows of that table.
        click_model: rows of that table, a bin of places each.
    """
    places = place_counts.groupBy("dataset", "position").agg(
        sf.sum("impressions").alias("impressions"), sf.sum("clicks").alias("clicks")
    )
    shown, clicks = sf.col("impressions"), sf.least("clicks", "impressions")
    rate, square = sf.try_divide(clicks, shown), sf.lit(_Z_95**2)
    centre = (clicks + square / 2) / (shown + square)
    reach = _Z_95 * sf.sqrt(clicks * (1 - rate) + square / 4) / (shown + square)
    rated = places.withColumns(
        {"click_rate": rate, "click_rate_low": centre - reach, "click_rate_high": centre + reach}
    )
    bins = click_model.select("dataset", "first_position", "examination", "converged")
    is_bin = (sf.col("at.dataset") == sf.col("bin.dataset")) & (sf.col("first_position") <= sf.col("position"))
    best = sf.max_by(sf.struct("first_position", "examination", "converged"), "first_position").alias("looks")
    looks = (
        rated.alias("at")
        .join(sf.broadcast(bins).alias("bin"), on=is_bin, how="inner")
        .groupBy("at.dataset", "position")
        .agg(best)
        .select("dataset", "position", "looks.*")
    )
    first = rated.groupBy("dataset").agg(sf.min_by("click_rate", "position").alias("first_rate"))
    joined = rated.join(sf.broadcast(looks), on=["dataset", "position"], how="left")
    joined = joined.join(sf.broadcast(first), on="dataset", how="left")
    relative = sf.try_divide("click_rate", "first_rate")
    return joined.withColumn("relative_rate", relative).drop("first_rate").orderBy("dataset", "position")


def rates_by_grade(engagement: DataFrame, consensus: DataFrame) -> DataFrame:
    """Clicks, carts and purchases per look by data set, human grade and stratum; a row per rate and class.

    `rate` is all events over all looks of the class with its 95 % interval, for which pairs are drawn and looks are
    not: the variance is that of a ratio of means. Null ends: fewer than two pairs, or no event. `quartile_1` to
    `quartile_3` are of the single pairs' rates as the table engagement draws them to their class.

    Args:
        engagement: rows of that table; pairs that nobody looked at are left out.
        consensus: rows of annotation_consensus.

    Cites: Cochran 1977, Sampling Techniques, section 2.11.
    """
    looks = sf.col("examinations")
    seen = engagement.where(looks > 0).join(consensus.select(*PAIR, "grade"), on=list(PAIR), how="inner")
    sums = {
        f"{part}_{name}": value
        for name, rate in RATES.items()
        for part, value in (
            ("sum", sf.sum(name)),
            ("square", sf.sum(sf.col(name) * sf.col(name))),
            ("cross", sf.sum(sf.col(name) * looks)),
            ("quartiles", sf.percentile_approx(rate, list(QUARTILES), ACCURACY)),
        )
    }
    classes = seen.groupBy("dataset", "stratum", "grade").agg(
        sf.count("*").alias("num_pairs"),
        sf.sum(looks).alias("looks"),
        sf.sum(looks * looks).alias("square_looks"),
        *(value.alias(name) for name, value in sums.items()),
    )
    held = ("dataset", "stratum", "grade", "num_pairs", "looks")
    parts = [classes.select(*held, *_rate(name, rate)) for name, rate in RATES.items()]
    return reduce(DataFrame.unionByName, parts).orderBy("dataset", "name", "stratum", "grade")


def _rate(counted: str, name: str) -> list[Column]:
    """Name, events, rate with interval and quartiles of one of the rates, of a class' sums."""
    events, looks, pairs = sf.col(f"sum_{counted}"), sf.col("looks"), sf.col("num_pairs")
    rate = events / looks
    squares = sf.col(f"square_{counted}") - 2 * rate * sf.col(f"cross_{counted}") + rate * rate * sf.col("square_looks")
    # sums that cancel may fall below 0 by rounding
    spread = sf.sqrt(sf.greatest(squares, sf.lit(0.0)) * pairs / (pairs - 1)) / looks
    reach = sf.when((pairs > 1) & (events > 0), _Z_95 * spread)
    quartiles = [sf.element_at(f"quartiles_{counted}", place).alias(f"quartile_{place}") for place in (1, 2, 3)]
    # greatest would pass over a null
    low = sf.when(reach.isNotNull(), sf.greatest(rate - reach, sf.lit(0.0)))
    ends = (low.alias("low"), (rate + reach).alias("high"))
    return [sf.lit(name).alias("name"), events.alias("num_events"), rate.alias("rate"), *ends, *quartiles]
