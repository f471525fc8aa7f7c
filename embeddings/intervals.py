"""Shares with intervals: Wilson's for one draw, and Yan and Su's for a draw by strata."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

Z_95 = 1.959963984540054
"""Of the standard normal distribution, 97.5 % lie below."""


class Share(NamedTuple):
    """A share with its 95 % interval."""

    value: float
    low: float
    high: float


class Draw(NamedTuple):
    """What a random draw of a population found.

    Attributes:
        size: pairs of the population.
        trials: pairs drawn; may be a fraction where pairs count in part.
        successes: those among them that have what is counted.
    """

    size: float
    trials: float
    successes: float

    @property
    def share(self) -> float:
        """Successes per trial."""
        return self.successes / self.trials

    @property
    def effective_trials(self) -> float:
        """Trials that would tell as much of an endless population; infinite where all were drawn."""
        if self.trials >= self.size:
            return math.inf
        return self.trials * (self.size - 1) / (self.size - self.trials)


def wilson(share: float, trials: float, z: float = Z_95) -> tuple[float, float]:
    """Both ends of the score interval of a share.

    Args:
        share: observed.
        trials: behind it; infinite for a share that is known.
        z: quantile of the standard normal distribution.

    Cites: Wilson 1927, JASA 22.
    """
    if math.isinf(trials):
        return share, share
    centre, half = (share + z * z / (2 * trials)) / (1 + z * z / trials), z * _spread(share, trials, z)
    return max(0.0, centre - half), min(1.0, centre + half)


def _spread(share: float, trials: float, z: float) -> float:
    """Half the width of the score interval per unit of z."""
    if math.isinf(trials):
        return 0.0
    return math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials)) / (1 + z * z / trials)


def stratified_share(draws: Sequence[Draw]) -> Share | None:
    """The share of all populations together, each by its size; None without any trial.

    The ends are the weighted sums of the strata's own score intervals at a quantile lowered so far that the sum is as
    wide as its variance says. So strata of one pair, or without any success, do not make it look certain. One stratum
    gives Wilson's interval. Draws without a trial are left out: the share is that of the others.

    Cites: Yan and Su 2010, Statistics in Biopharmaceutical Research 2(3).
    """
    tried = [draw for draw in draws if draw.trials > 0]
    total = sum(draw.size for draw in tried)
    if not total:
        return None
    weights = [draw.size / total for draw in tried]
    spreads = [
        weight * _spread(draw.share, draw.effective_trials, Z_95) for weight, draw in zip(weights, tried, strict=True)
    ]
    lowered = Z_95 * math.hypot(*spreads) / sum(spreads) if sum(spreads) else 0.0
    ends = [wilson(draw.share, draw.effective_trials, lowered) for draw in tried]
    value, low, high = (
        sum(weight * part for weight, part in zip(weights, parts, strict=True))
        for parts in ([draw.share for draw in tried], *zip(*ends, strict=True))
    )
    return Share(value, min(low, value), max(high, value))
