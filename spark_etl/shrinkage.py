"""Rates of rare events, drawn to what is expected of them: empirical Bayes with a Beta prior fitted by moments.

The successes of a pair, or of a query, are those of `trials` looks, each with its own rate; rates vary by a Beta
distribution. Impressions at places that shoppers look at less count as part of a look: trials need not be whole.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as sf

_STRENGTHS = (0.5, 1e5)
"""Looks that a prior may be worth: where rates hardly differ moments give any number, or none."""
_Z = 1.959964
"""Of a 95 % interval."""
_ROWS, _TRIALS = 0, 1
"""Places among a class' sums."""


class Prior(NamedTuple):
    """A Beta distribution, as pseudo looks with and without a success."""

    successes: float
    failures: float


def fit_priors(
    rates: DataFrame, successes: Sequence[str], by: Sequence[str], *, min_rows: int = 1
) -> dict[tuple[Any, ...], dict[str, Prior]]:
    """The prior of each class and kind of success, by the class' values of `by`.

    Of successes C, looks E = sum n_k t_k and squares S = sum n_k t_k^2 over impressions n_k at places looked at with
    chance t_k, E[(C - m E)^2] = v (E^2 - S) + m E - m^2 S, which is solved for the variance v of the rates around their
    mean m.

    Args:
        rates: `by` and, one row for each rate, `trials`, `squares` and the columns of successes.
        min_rows: a class with fewer rates, or without a look, takes the prior of all classes that share its values but
            the last; it is left out where they have no look either.
    """
    trials = sf.col("trials")
    of_each = [total for name in map(sf.col, successes) for total in (name, name * name, name * trials)]
    totals = [sf.lit(1), trials, sf.col("squares"), trials * trials, *of_each]
    sums = [sf.sum(total).cast("double").alias(f"sum_{place}") for place, total in enumerate(totals)]
    rows = rates.groupBy(*by).agg(*sums).collect()
    known = {tuple(row[: len(by)]): np.array(row[len(by) :], dtype=float) for row in rows if row[len(by)]}
    pooled: dict[tuple[Any, ...], NDArray[np.float64]] = defaultdict(lambda: np.zeros(len(sums)))
    for key, own in known.items():
        pooled[key[:-1]] += own
    chosen = {key: own if own[_ROWS] >= min_rows and own[_TRIALS] else pooled[key[:-1]] for key, own in known.items()}
    return {key: _priors(found, successes) for key, found in chosen.items() if found[_TRIALS]}


def _priors(sums: NDArray[np.float64], successes: Sequence[str]) -> dict[str, Prior]:
    """The prior of each kind of success from a class' sums, as `fit_priors` makes them."""
    _, trials, squares, trials_2, *of_each = sums.tolist()
    priors = {}
    for place, name in enumerate(successes):
        total, total_2, mixed = of_each[3 * place : 3 * place + 3]
        mean = total / trials
        spread = total_2 - 2 * mean * mixed + mean * mean * trials_2
        known = trials_2 - squares
        variance = (spread - total + mean * mean * squares) / known if known > 0 else 0.0
        priors[name] = prior_of(mean, variance)
    return priors


def prior_of(mean: float, variance: float) -> Prior:
    """The Beta distribution of a mean and variance; of the largest strength where the rates do not seem to vary."""
    mean = min(max(mean, 1e-9), 1 - 1e-9)
    least, most = _STRENGTHS
    strength = mean * (1 - mean) / variance - 1 if variance > 0 else most
    strength = min(max(strength, least), most)
    return Prior(mean * strength, (1 - mean) * strength)


def strength_around(mean: Column, successes: Column) -> Column:
    """Aggregate: looks that a Beta prior is worth which has a mean of its own for every pair; as `fit_priors` finds it.

    Variances of rates are taken as m (1 - m) / (strength + 1), with the same strength for all means m. A pair counts
    about once, as in a likelihood: by the squares of their looks a few pairs that all shoppers see would decide.

    Args:
        mean: of a pair; beside it columns `trials` and `squares`.
    """
    trials, squares = sf.col("trials"), sf.col("squares")
    off = successes - mean * trials
    once = sf.greatest(trials, sf.lit(1.0)) ** -2
    variance = sf.sum(once * (off * off - mean * trials + mean * mean * squares))
    at_most = sf.sum(once * mean * (1 - mean) * (trials * trials - squares))
    least, most = map(sf.lit, _STRENGTHS)
    return sf.when(variance > 0, sf.least(sf.greatest(at_most / variance - 1, least), most)).otherwise(most)


def posterior(successes: Column, trials: Column, prior: tuple[Column, Column]) -> tuple[Column, Column, Column]:
    """Mean of the rate after what was seen, and the ends of its 95 % interval.

    The interval is normal on the scale of log odds, with the mean and variance that the Beta distribution has there:
    its ends are within .02 of the exact ones from three hits and three misses on, and too wide with less.
    """
    hits, misses = successes + prior[0], sf.greatest(trials - successes, sf.lit(0.0)) + prior[1]
    centre = _digamma(hits) - _digamma(misses)
    reach = _Z * sf.sqrt(_trigamma(hits) + _trigamma(misses))
    return (
        hits / (hits + misses),
        1 / (1 + sf.exp(-(centre - reach))),
        1 / (1 + sf.exp(-(centre + reach))),
    )


def _digamma(value: Column) -> Column:
    """By recurrence from value + 3, where the asymptotic series is exact to 1e-4."""
    far = value + 3
    return sf.log(far) - 1 / (2 * far) - 1 / (12 * far * far) - 1 / value - 1 / (value + 1) - 1 / (value + 2)


def _trigamma(value: Column) -> Column:
    far = value + 3
    series = 1 / far + 1 / (2 * far * far) + 1 / (6 * far * far * far)
    return series + 1 / (value * value) + 1 / ((value + 1) * (value + 1)) + 1 / ((value + 2) * (value + 2))
