"""What is expected of a data set's rows of a table: enough of them, no new nulls, no drift. Pure, without Spark.

Drift is the Jensen-Shannon distance with logarithms to base 2 (Endres and Schindelin 2003): 0 for equal
distributions, 1 for such that share no value. The population stability index is infinite where a value comes or goes
and needs invented counts there; this needs none. And it is a metric, so what chance adds to it can be told apart: by
the triangle inequality a measured distance is at most the true one and those of both samples from their own
distributions. The distance that chance alone exceeds once in 10,000 times is therefore added to the bound.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import ceil, floor, log, log2, sqrt
from statistics import NormalDist
from typing import Any

from spark_etl.recipes import QualityRecipe

NUM_QUANTILES = 99
"""The 1 % quantile to that of 99 %: how exactly a profile knows a numeric column."""
NUM_BINS = 10
BLUR = 1.25
"""Rates that are drawn to a prior stand close together, and with a hair's change of the prior all would change sides of
an edge between them: two equal days were .4 apart, as far as clicks from twice as many. With this factor .1."""
OTHERS = "other values"
"""Counts as one value: what is beyond the commonest of a column that should have few."""

FALSE_ALARMS = 1e-4
_Z = NormalDist().inv_cdf(1 - FALSE_ALARMS)
_GRID_ERROR = 1e-4
"""Of shares of bins by quantiles: as that of a sample of 10,000 rows. Of ten equally frequent values, the worst case,
two samples of 300,000 rows were up to .022 apart by it."""


@dataclass(frozen=True)
class Profile:
    """What one pass finds of a data set's rows of a table.

    Attributes:
        nulls: column that may be null -> rows without a value.
        counts: column of few values -> value -> rows.
        quantiles: numeric column -> its NUM_QUANTILES quantiles; none where all rows lack a value.
    """

    rows: int
    nulls: Mapping[str, int] = field(default_factory=dict)
    counts: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    quantiles: Mapping[str, Sequence[float]] = field(default_factory=dict)

    def num_values(self, column: str) -> int:
        """Rows that hold a value of the column."""
        return self.rows - self.nulls.get(column, 0)


@dataclass(frozen=True)
class Measure:
    """One measured value of a table's data set and what was expected of it.

    Attributes:
        metric: rows, null_rate/<column>, share/<column>/<value>, median/<column> or drift/<column>.
        at_least: smallest value expected, where there is one; likewise at_most.
        setting: of the recipe, from which the bound comes; empty without one.
        before: the value of the last published run, where it is of the same kind.
        quantiles: of a median: all quantiles of the column.
    """

    metric: str
    value: float
    at_least: float | None = None
    at_most: float | None = None
    setting: str = ""
    before: float | None = None
    quantiles: Sequence[float] | None = None

    @property
    def met(self) -> bool:
        """Whether the value is within its bounds."""
        is_enough = self.at_least is None or self.value >= self.at_least
        return is_enough and (self.at_most is None or self.value <= self.at_most)


def bounds_of(recipe: QualityRecipe, table: str) -> QualityRecipe:
    """The recipe with a table's own bounds in the place of those of all."""
    own: dict[str, Any] = next((asdict(one) for one in recipe.tables if one.table == table), {})
    return replace(recipe, **{name: value for name, value in own.items() if name != "table" and value is not None})


def measure(profile: Profile, last: Profile | None, bounds: QualityRecipe) -> list[Measure]:
    """All measures of a profile; compared with the last published one unless there is none or it had no rows."""
    standard = last if last is not None and last.rows else None
    found = [_rows(profile, standard, bounds)]
    if not profile.rows:
        return found
    found += [_null_rate(column, profile, standard, bounds) for column in profile.nulls]
    for column, counts in profile.counts.items():
        size = profile.num_values(column)
        found += [Measure(f"share/{column}/{value}", count / size) for value, count in sorted(counts.items())]
    for column, quantiles in profile.quantiles.items():
        found.append(Measure(f"median/{column}", quantiles[len(quantiles) // 2], quantiles=tuple(quantiles)))
    return found + (_drifts(profile, standard, bounds) if standard is not None else [])


def profile_of(measures: Mapping[str, tuple[float, Sequence[float] | None]]) -> Profile:
    """The profile behind measures: metric -> value and quantiles."""
    rows = round(measures["rows"][0])
    nulls, quantiles = {}, {}
    shares: dict[str, dict[str, float]] = {}
    for metric, (value, known) in measures.items():
        kind, _, column = metric.partition("/")
        if kind == "null_rate":
            nulls[column] = round(value * rows)
        elif kind == "share":
            name, _, category = column.partition("/")
            shares.setdefault(name, {})[category] = value
        elif kind == "median" and known is not None:
            quantiles[column] = list(known)
    counts = {
        column: {value: round(share * (rows - nulls.get(column, 0))) for value, share in held.items()}
        for column, held in shares.items()
    }
    return Profile(rows, nulls, counts, quantiles)


def shannon_distance(one: Sequence[float], other: Sequence[float]) -> float:
    """Jensen-Shannon distance of two distributions over the same bins, in [0, 1].

    Cites: Endres and Schindelin 2003, with logarithms to base 2.
    """
    total = 0.0
    for p, q in zip(one, other, strict=True):
        total += sum(share * log2(2 * share / (p + q)) for share in (p, q) if share > 0)
    return sqrt(min(max(total / 2, 0.0), 1.0))


def distance_by_chance(size: int, other_size: int, num_bins: int) -> float:
    """What the distance of two samples of one distribution exceeds with FALSE_ALARMS.

    Pearson's statistic of two samples is chi-squared with a degree of freedom per bin but one, and the squared distance
    is at most that over 4 times the harmonic sum of the sizes (Topsoe 2000).
    """
    return sqrt(_chi_squared(num_bins - 1) * (1 / size + 1 / other_size + _GRID_ERROR) / 4) if num_bins > 1 else 0.0


def shares_between(quantiles: Sequence[float], edges: Sequence[float]) -> list[float]:
    """Shares of a column's rows up to each edge, between two edges and above the last, from its quantiles.

    A value within BLUR of an edge counts for both its sides in part.
    """
    below = [_share_up_to(quantiles, edge) for edge in edges]
    return [high - low for low, high in zip([0.0, *below], [*below, 1.0], strict=True)]


def _rows(profile: Profile, standard: Profile | None, bounds: QualityRecipe) -> Measure:
    if standard is None:
        return Measure("rows", profile.rows, float(bounds.min_rows), setting="min_rows")
    held, most = standard.rows * (1 - bounds.max_row_drop), standard.rows * (1 + bounds.max_row_growth)
    # of counts that vary by chance as such of independent events do
    least = floor(held - _Z * sqrt(held * (2 - bounds.max_row_drop)))
    most = ceil(most + _Z * sqrt(most * (2 + bounds.max_row_growth)))
    setting = "max_row_growth" if profile.rows > most else "max_row_drop" if least > bounds.min_rows else "min_rows"
    return Measure("rows", profile.rows, float(max(least, bounds.min_rows)), float(most), setting, standard.rows)


def _null_rate(column: str, profile: Profile, standard: Profile | None, bounds: QualityRecipe) -> Measure:
    rate = profile.nulls[column] / profile.rows
    if standard is None or column not in standard.nulls:
        return Measure(f"null_rate/{column}", rate)
    before = standard.nulls[column] / standard.rows
    # Agresti and Caffo 2000: one row with and one without a null more, so that a rate of 0 leaves room for chance
    usual = (standard.nulls[column] + 1) / (standard.rows + 2)
    highest = min(usual + bounds.max_null_rate_rise, 1.0)
    chance = _Z * sqrt(usual * (1 - usual) / standard.rows + highest * (1 - highest) / profile.rows)
    most = min(before + bounds.max_null_rate_rise + chance, 1.0)
    return Measure(f"null_rate/{column}", rate, None, most, "max_null_rate_rise", before)


def _drifts(profile: Profile, standard: Profile, bounds: QualityRecipe) -> list[Measure]:
    """Of every column of which both profiles hold a distribution."""
    found = []
    for column in (*profile.counts, *profile.quantiles):
        pair = _distributions(column, profile, standard)
        if pair is None:
            continue
        num_bins = sum(p + q > 0 for p, q in zip(*pair, strict=True))
        chance = distance_by_chance(profile.num_values(column), standard.num_values(column), num_bins)
        most = min(bounds.max_drift + chance, 1.0)
        found.append(Measure(f"drift/{column}", shannon_distance(*pair), None, most, "max_drift"))
    return found


def _distributions(column: str, profile: Profile, standard: Profile) -> tuple[list[float], list[float]] | None:
    """Shares now and before, over values or over tenths of before; None where one has no value."""
    if not (profile.num_values(column) and standard.num_values(column)):
        return None
    if column in profile.counts and column in standard.counts:
        now, before = profile.counts[column], standard.counts[column]
        values = sorted({*now, *before})
        return _normed([now.get(one, 0) for one in values]), _normed([before.get(one, 0) for one in values])
    if column in profile.quantiles and column in standard.quantiles:
        known = standard.quantiles[column]
        step = (len(known) + 1) // NUM_BINS
        edges = sorted(set(known[step - 1 :: step]))
        return shares_between(profile.quantiles[column], edges), shares_between(known, edges)
    return None


def _normed(counts: Sequence[int]) -> list[float]:
    total = sum(counts)
    return [count / total for count in counts]


def _share_up_to(quantiles: Sequence[float], edge: float) -> float:
    """Share of rows at or below an edge; those near it count in part."""
    return sum(_part_up_to(value, edge) for value in quantiles) / len(quantiles)


def _part_up_to(value: float, edge: float) -> float:
    if value == 0 or edge == 0 or (value > 0) != (edge > 0):
        return float(value <= edge)
    steps = log(abs(edge) / abs(value)) / (2 * log(BLUR))
    return min(max(0.5 + (steps if edge > 0 else -steps), 0.0), 1.0)


def _chi_squared(freedom: int) -> float:
    """The quantile at 1 - FALSE_ALARMS. Cites: Wilson and Hilferty 1931."""
    spread = 2 / (9 * freedom)
    return float(freedom * (1 - spread + _Z * sqrt(spread)) ** 3)
