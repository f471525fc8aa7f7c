"""A position-based click model: a click needs a shopper who looks at the place and a product that attracts.

Clicks of a pair at place k are expected to be impressions_k x examination_k x attraction (Craswell et al. 2008;
Chuklin, Markov and de Rijke 2015, ch. 3). These means are fitted by expectation maximisation of a Poisson likelihood
with an attraction for every pair: the looks that a pair is expected to have had give its attraction, all attractions
the clicks expected at a place, and its clicks over these the new examination. Only pairs that were shown at several
places tell examination from attraction, so only they take part. The fit needs no prior and is right in the mean however
attraction spreads and whatever the shop puts where (Hausman, Hall and Griliches 1984; Wooldridge 1999); that of single
clicks with the most probable attraction of every pair was up to a tenth off.

Only counts per pair and place are needed, which add up over days. No state but the few examinations goes from round to
round: counts are kept in memory once, and the plan stays as short as at first.

Shapes: K bins of places.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import exp, inf, log, sqrt

from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as sf

from spark_etl.recipes import ClickModelRecipe

logger = logging.getLogger(__name__)

PAIR = ("dataset", "query_id", "product_id")
_LEAST_EXAMINATION = 1e-6


@dataclass(frozen=True)
class Round:
    """What a round of the fit came to.

    Attributes:
        log_likelihood: of the clicks of pairs that were shown at several places, which no round lowers.
        change: largest change of an examination since the round before.
    """

    log_likelihood: float
    change: float


@dataclass(frozen=True)
class ClickModel:
    """How often shoppers look at each place of a data set's result lists.

    Attributes:
        dataset: whose events it was fitted to.
        first_position_K: first place of each bin, from the top.
        examination_K: looks per impression, 1 at the first place, which is looked at most.
        impressions_K: products shown there.
        clicks_K: clicks there.
        rounds: in their order.
        converged: whether the last round changed examinations by less than the tolerance. A data set with too few
            clicks is not fitted; then all places count as looked at.
    """

    dataset: str
    first_position_K: tuple[int, ...]
    examination_K: tuple[float, ...]
    impressions_K: tuple[int, ...]
    clicks_K: tuple[int, ...]
    rounds: tuple[Round, ...]
    converged: bool


def bin_of(position: Column, recipe: ClickModelRecipe) -> Column:
    """The first place of the bin that a place is in."""
    inside = sf.filter(sf.lit(list(recipe.first_positions)), lambda first: first <= position)
    return sf.array_max(inside)


def fit_click_models(counts: DataFrame, recipe: ClickModelRecipe) -> list[ClickModel]:
    """A model per data set, in the order of their names.

    Args:
        counts: PAIR, position, impressions and clicks, one row per pair and place. A click without its impression
            counts as shown.
    """
    binned = counts.select(
        *PAIR,
        bin_of(sf.col("position"), recipe).alias("first"),
        sf.greatest("impressions", "clicks").alias("shown"),
        "clicks",
    ).persist()
    try:
        totals = (
            binned.groupBy("dataset", "first")
            .agg(sf.sum("shown").alias("shown"), sf.sum("clicks").alias("clicks"))
            .orderBy("dataset", "first")
            .collect()
        )
        datasets = list(dict.fromkeys(row["dataset"] for row in totals))
        return [
            _fit(
                binned.where(sf.col("dataset") == dataset),
                dataset,
                [(row["first"], row["shown"], row["clicks"]) for row in totals if row["dataset"] == dataset],
                recipe,
            )
            for dataset in datasets
        ]
    finally:
        binned.unpersist()


def places_frame(spark: SparkSession, models: Iterable[ClickModel]) -> DataFrame:
    """Rows of the table click_model."""
    rows = [
        (model.dataset, *place, model.converged)
        for model in models
        for place in zip(model.first_position_K, model.examination_K, model.impressions_K, model.clicks_K, strict=True)
    ]
    schema = "dataset string, first_position int, examination double, impressions bigint, clicks bigint"
    return spark.createDataFrame(rows, f"{schema}, converged boolean")


def rounds_frame(spark: SparkSession, models: Iterable[ClickModel]) -> DataFrame:
    """Rows of the table click_model_round."""
    rows = [
        (model.dataset, number, one.log_likelihood, one.change)
        for model in models
        for number, one in enumerate(model.rounds, start=1)
    ]
    schema = "dataset string, round int, log_likelihood double, change double"
    return spark.createDataFrame(rows, schema)


def _fit(
    binned: DataFrame, dataset: str, totals: Sequence[tuple[int, int, int]], recipe: ClickModelRecipe
) -> ClickModel:
    first_K, shown_K, clicks_K = (tuple(column) for column in zip(*totals, strict=True))
    rates_K = [clicks / shown if shown else 0.0 for shown, clicks in zip(shown_K, clicks_K, strict=True)]
    if sum(clicks_K) < recipe.min_clicks or not clicks_K[0]:
        logger.warning(
            "click model of %s: %d clicks, %d of them at the first place; too few to fit, all places count as seen",
            dataset,
            sum(clicks_K),
            clicks_K[0],
        )
        return ClickModel(dataset, first_K, (1.0,) * len(first_K), shown_K, clicks_K, (), False)
    examination_K = _held(rate / rates_K[0] for rate in rates_K)
    at_place = {
        f"{name}_{place}": sf.sum(sf.when(sf.col("first") == first, sf.col(name)).otherwise(0))
        for name in ("shown", "clicks")
        for place, first in enumerate(first_K)
    }
    several = " + ".join(f"int(shown_{place} > 0)" for place in range(len(first_K)))
    pairs = (
        binned.groupBy(*PAIR)
        .agg(sf.sum("clicks").alias("clicked"), *(column.alias(name) for name, column in at_place.items()))
        .where(f"clicked > 0 AND {several} > 1")
        .drop(*PAIR)
        .persist()
    )
    try:
        of_several = pairs.agg(*(sf.sum(f"clicks_{place}") for place in range(len(first_K)))).collect()[0]
        fit = _Fit(pairs, [clicks or 0 for clicks in of_several])
        if not any(fit.clicks_K):
            logger.warning(
                "click model of %s: no clicked product was at several places; clicks per impression stand for looks",
                dataset,
            )
        examination_K, rounds = _iterate(fit, examination_K, recipe)
    finally:
        pairs.unpersist()
    converged = rounds[-1].change < recipe.tolerance
    told = "converged" if converged else "stopped before it converged; raise recipe.click_model.max_rounds"
    logger.info("click model of %s: %d rounds, %s", dataset, len(rounds), told)
    return ClickModel(dataset, first_K, tuple(examination_K), shown_K, clicks_K, tuple(rounds), converged)


@dataclass(frozen=True)
class _Fit:
    """One round of expectation and maximisation over the pairs of a data set that were shown at several places."""

    pairs: DataFrame
    clicks_K: Sequence[int]

    def step(self, examination_K: Sequence[float]) -> tuple[list[float], Round]:
        """The new examinations, and what the given ones come to."""
        names = [f"look_{place}" for place in range(len(examination_K))]
        # as data, not as literals: the code that Spark generates is then that of the first round
        spark = self.pairs.sparkSession
        looks = spark.createDataFrame([tuple(examination_K)], ", ".join(f"{name} double" for name in names))
        seen = sf.expr(" + ".join(f"shown_{place} * {name}" for place, name in enumerate(names)))
        attracted = self.pairs.crossJoin(sf.broadcast(looks)).withColumn("attraction", sf.col("clicked") / seen)
        totals = [f"sum(shown_{place} * attraction)" for place in range(len(names))]
        totals.append("sum(clicked * ln(attraction) - clicked)")
        *due_K, likelihood = (value or 0.0 for value in attracted.agg(*map(sf.expr, totals)).collect()[0])
        likelihood += sum(
            clicks * log(look) for clicks, look in zip(self.clicks_K, examination_K, strict=True) if clicks
        )
        # at a place without clicks of such pairs nothing is known beyond where the fit began
        new_K = [
            clicks / due if clicks else look
            for clicks, due, look in zip(self.clicks_K, due_K, examination_K, strict=True)
        ]
        found_K = _held(look / new_K[0] for look in new_K)
        change = max(abs(new - old) for new, old in zip(found_K, examination_K, strict=True))
        return found_K, Round(likelihood, change)


def _held(looks: Iterable[float]) -> list[float]:
    """Looks with that at the first place held at 1 and none above it."""
    return [1.0, *(min(max(look, _LEAST_EXAMINATION), 1.0) for look in list(looks)[1:])]


def _iterate(fit: _Fit, start_K: Sequence[float], recipe: ClickModelRecipe) -> tuple[list[float], list[Round]]:
    """Rounds until the examinations stand still, two of three plain, the third from a point further along their way.

    Cites: Varadhan and Roland 2008, SQUAREM with steplength S3; the jump is dropped where it lowers the likelihood.
    """
    rounds: list[Round] = []

    def step(looks_K: Sequence[float], least: float = -inf) -> list[float] | None:
        """The next examinations; None where the likelihood of the given ones is below `least`."""
        found_K, one = fit.step(looks_K)
        if one.log_likelihood < least:
            return None
        rounds.append(one)
        return None if one.change < recipe.tolerance or len(rounds) >= recipe.max_rounds else found_K

    looks_K = list(start_K)
    while (first_K := step(looks_K)) is not None:
        second_K = step(first_K)
        if second_K is None:
            return first_K, rounds
        jump_K = _jump(looks_K, first_K, second_K)
        looks_K = second_K
        if jump_K is not None:
            before = len(rounds)
            onward_K = step(jump_K, rounds[-1].log_likelihood)
            if onward_K is None and len(rounds) > before:
                return jump_K, rounds
            looks_K = onward_K or second_K
    return looks_K, rounds


def _jump(from_K: Sequence[float], first_K: Sequence[float], second_K: Sequence[float]) -> list[float] | None:
    """Where two steps point to, extrapolated on the logarithms; None where they do not slow down."""
    at_K, one_K, two_K = ([log(look) for look in looks] for looks in (from_K, first_K, second_K))
    step_K = [one - at for at, one in zip(at_K, one_K, strict=True)]
    bend_K = [two - one - step for one, two, step in zip(one_K, two_K, step_K, strict=True)]
    length, bend = (sqrt(sum(value * value for value in values)) for values in (step_K, bend_K))
    if bend <= 0 or length <= bend:
        return None
    far = length / bend
    return _held(
        exp(at + 2 * far * step + far * far * bent) for at, step, bent in zip(at_K, step_K, bend_K, strict=True)
    )
