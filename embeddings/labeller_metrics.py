"""How well a labeller's probabilities agree with people: grades, order, and how far the probabilities can be believed.

All are of pairs whose human grade is known. Order is by the expected grade, sureness of the most probable one;
intervals come from resampling queries, since the pairs of a query resemble each other.
"""

# N pairs, B bins, Q queries

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import numpy as np
from numpy.typing import NDArray

from embeddings.calibration import expected_grade
from embeddings.metrics import Interval, labeller_agreement, percentile_interval
from embeddings.separation import GRADE_PAIRS, auc

NUM_BINS: Final = 10
NUM_FLOOR_DRAWS: Final = 100


def labeller_metrics(
    probability_N3: NDArray[np.floating], answered_N: NDArray[np.integer], grade_N: NDArray[np.integer]
) -> dict[str, float]:
    """Agreement of calibrated probabilities with human grades; what the grades present do not define is left out.

    Keys: `accuracy`, `within_1`, `quadratic_weighted_kappa`, `macro_f1` of the answered grades; `recall_0` and
    `precision_0` of grade 0 among them; `auc_2v1`, `auc_1v0`, `auc_2v0` of the expected grade, pooled;
    `ece` (`calibration_error`); `nll`, mean of -log of the human grade's probability, in nats.

    Raises:
        ValueError: no pairs.
    """
    expected_N = expected_grade(probability_N3)
    agreement = labeller_agreement(grade_N, answered_N)
    confusion = np.array(agreement["confusion"])
    found = {name: agreement[name] for name in ("accuracy", "within_1", "quadratic_weighted_kappa")}
    found["macro_f1"] = _macro_f1(confusion)
    for name, total in (("recall_0", confusion[0].sum()), ("precision_0", confusion[:, 0].sum())):
        if total:
            found[name] = float(confusion[0, 0] / total)
    for name, (high, low) in GRADE_PAIRS.items():
        if (grade_N == high).any() and (grade_N == low).any():
            found[name] = auc(expected_N[grade_N == high], expected_N[grade_N == low])
    given_N = probability_N3[np.arange(len(grade_N)), grade_N]
    return found | {
        "ece": calibration_error(probability_N3, grade_N),
        "nll": float(-np.log(np.maximum(given_N, 1e-30)).mean()),
    }


def calibration_error(
    probability_N3: NDArray[np.floating], grade_N: NDArray[np.integer], bins: int = NUM_BINS
) -> float:
    """Expected calibration error of the most probable grade, over bins of equally many pairs.

    Cites: Guo et al. 2017 (arXiv 1706.04599), equation 3; equal mass as in Nguyen and O'Connor 2015.
    """
    sure_N, right_N = probability_N3.max(axis=1), probability_N3.argmax(axis=1) == grade_N
    return _binned_gap(sure_N, right_N, bins)


def calibration_floor(probability_N3: NDArray[np.floating], *, seed: int, bins: int = NUM_BINS) -> float:
    """Mean calibration error that a perfect judge with these probabilities would show on as many pairs.

    Its grades are drawn from the probabilities themselves, so what is left is chance.
    """
    generator, sure_N = np.random.default_rng(seed), probability_N3.max(axis=1)
    draws = (_binned_gap(sure_N, generator.random(len(sure_N)) < sure_N, bins) for _ in range(NUM_FLOOR_DRAWS))
    return float(np.mean(list(draws)))


def reliability(
    probability_N3: NDArray[np.floating], grade_N: NDArray[np.integer], bins: int = NUM_BINS
) -> list[tuple[float, float, int]]:
    """Of each bin: mean probability of the most probable grade, share that was right, pairs."""
    sure_N, right_N = probability_N3.max(axis=1), probability_N3.argmax(axis=1) == grade_N
    groups = np.array_split(np.argsort(sure_N, kind="stable"), bins)
    return [(float(sure_N[rows].mean()), float(right_N[rows].mean()), len(rows)) for rows in groups if len(rows)]


def fit_line(x_N: NDArray[np.floating], y_N: NDArray[np.floating]) -> tuple[float, float]:
    """Slope and intercept of least squares."""
    slope, intercept = np.polyfit(x_N, y_N, 1)
    return float(slope), float(intercept)


def root_mean_square(error_N: NDArray[np.floating]) -> float:
    """Root of the mean square."""
    return float(np.sqrt(np.mean(np.square(error_N))))


def bootstrap_queries(
    measure: Callable[[NDArray[np.int64]], Mapping[str, float]],
    query_N: NDArray[np.integer],
    *,
    resamples: int,
    seed: int,
) -> dict[str, Interval]:
    """Each metric with its 95 % interval under resampling of queries, a query with all its pairs.

    Args:
        measure: metrics of the pairs in these rows; a row may be given several times.
        query_N: an integer per pair; equal for pairs of one query.
        resamples: number of draws; one that does not define a metric is left out of its interval.
        seed: the same seed gives the same intervals.
    """
    order = np.argsort(query_N, kind="stable")
    members = np.split(order, np.flatnonzero(np.diff(query_N[order])) + 1)
    generator, drawn = np.random.default_rng(seed), []
    for _ in range(resamples):
        chosen = generator.integers(len(members), size=len(members))
        drawn.append(measure(np.concatenate([members[query] for query in chosen])))
    whole = measure(np.arange(len(query_N)))
    return {
        name: percentile_interval(value, np.array([found[name] for found in drawn if name in found]))
        for name, value in whole.items()
    }


def _binned_gap(sure_N: NDArray[np.floating], right_N: NDArray[np.bool_], bins: int) -> float:
    groups = np.array_split(np.argsort(sure_N, kind="stable"), bins)
    return float(sum(abs(sure_N[rows].sum() - right_N[rows].sum()) for rows in groups) / len(sure_N))


def _macro_f1(confusion: NDArray[np.integer]) -> float:
    """Mean F1 over the grades that people gave."""
    held = confusion.sum(axis=1) > 0
    both = confusion.sum(axis=0) + confusion.sum(axis=1)
    return float((2 * np.diag(confusion)[held] / both[held]).mean())
