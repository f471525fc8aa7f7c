"""How well cosines separate the grades: AUC between grades, margins inside queries, and their intervals.

Pooled AUCs ask whether one threshold serves all queries, per-query means whether each query's own order is
right.
"""

# N judged pairs, Q queries

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from embeddings.metrics import Interval, percentile_interval
from embeddings.text import words

GRADE_PAIRS: Final = {"auc_2v1": (2, 1), "auc_1v0": (1, 0), "auc_2v0": (2, 0)}


def auc(scores_high: ArrayLike, scores_low: ArrayLike) -> float:
    """Chance that a score of the first sample exceeds one of the second, ties half; O(n log n).

    Raises:
        ValueError: a sample is empty.

    Cites: Mann and Whitney 1947.
    """
    high, low = np.asarray(scores_high), np.sort(np.asarray(scores_low))
    if high.size == 0 or low.size == 0:
        raise ValueError(
            f"auc: expected two samples, got {high.size} and {low.size} scores; leave the pair of grades out"
        )
    below, up_to = np.searchsorted(low, high, side="left"), np.searchsorted(low, high, side="right")
    return float((below + up_to).sum() / (2.0 * high.size * low.size))


def separation(scores: ArrayLike, grades: ArrayLike, query_index: ArrayLike) -> dict[str, float]:
    """Separation of the grades by score; a value that the grades present do not define is left out.

    Keys: `auc_2v1`, `auc_1v0`, `auc_2v0` pooled over all pairs, the same with `_per_query` as the mean over
    queries that hold both grades; `average_margin` and `worst_case_margin` as the mean over queries with
    grades 2 and 0 of mean(2) - mean(0) and min(2) - max(0); `mean_score_0`, `mean_score_1`, `mean_score_2`.

    Args:
        scores: a cosine per judged pair.
        grades: its grade, 0, 1 or 2.
        query_index: an integer per pair; equal for pairs of one query, any values, any order.

    Raises:
        ValueError: the three differ in length.

    Cites: Xi et al. 2026 (arXiv 2602.17654), Table 5 for the margins.
    """
    score_N, grade_N, query_N = _aligned(scores, grades, query_index)
    of_grade = {grade: score_N[grade_N == grade] for grade in (0, 1, 2)}
    values = {f"mean_score_{grade}": float(of.mean()) for grade, of in of_grade.items() if of.size}
    for name, (high, low) in GRADE_PAIRS.items():
        if of_grade[high].size and of_grade[low].size:
            values[name] = auc(of_grade[high], of_grade[low])
    per_query: dict[str, list[float]] = {}
    by_query = np.argsort(query_N, kind="stable")
    starts = np.flatnonzero(np.diff(query_N[by_query])) + 1
    for members in np.split(by_query, starts):
        for name, value in _query_separation(score_N[members], grade_N[members]).items():
            per_query.setdefault(name, []).append(value)
    return values | {name: float(np.mean(of_queries)) for name, of_queries in per_query.items()}


def bootstrap_auc_difference(
    scores_a: ArrayLike,
    scores_b: ArrayLike,
    grades: ArrayLike,
    query_index: ArrayLike,
    *,
    resamples: int = 1000,
    seed: int,
) -> dict[str, Interval]:
    """Pooled AUC of model a minus that of model b per pair of grades, with intervals over queries.

    Both models see the same resamples, and a query is drawn with all its pairs, so neither the pairs'
    dependence inside a query nor that between the models is lost. Scores are sorted once; a resample only
    reweights the pairs, in O(N). Resamples that lack a grade are left out of that pair's interval.

    Args:
        scores_a: a cosine per judged pair; of several models a row each, whose AUCs are averaged.
        scores_b: those of the other model or models, for the same pairs.
        grades: 0, 1 or 2 per pair.
        query_index: an integer per pair, equal for pairs of one query.
        resamples: number of draws.
        seed: the same seed gives the same intervals.

    Returns:
        An interval for each of `auc_2v1`, `auc_1v0`, `auc_2v0` whose grades are present.
    """
    sides = [np.atleast_2d(np.asarray(scores, dtype=np.float64)) for scores in (scores_a, scores_b)]
    for score_N in (*sides[0], *sides[1]):
        _, grade_N, query_N = _aligned(score_N, grades, query_index)
    _, query_N = np.unique(query_N, return_inverse=True)
    pairs = {
        name: tuple(_mean_of([_weighted_auc(score_N, grade_N, high, low) for score_N in side]) for side in sides)
        for name, (high, low) in GRADE_PAIRS.items()
        if (grade_N == high).any() and (grade_N == low).any()
    }
    generator = np.random.default_rng(seed)
    num_queries = int(query_N.max(initial=-1)) + 1
    resampled: dict[str, list[float]] = {name: [] for name in pairs}
    for _ in range(resamples if pairs else 0):
        times_Q = np.bincount(generator.integers(num_queries, size=num_queries), minlength=num_queries)
        weight_N = times_Q[query_N].astype(np.float64)
        for name, (auc_a, auc_b) in pairs.items():
            resampled[name].append(auc_a(weight_N) - auc_b(weight_N))
    return {
        name: _interval(auc_a(np.ones(len(grade_N))) - auc_b(np.ones(len(grade_N))), resampled[name])
        for name, (auc_a, auc_b) in pairs.items()
    }


def token_overlap(query: str, title: str) -> float:
    """Share of the query's distinct alphanumeric tokens found in the title, case ignored.

    0 for a query without any.
    """
    wanted = set(words(query))
    return len(wanted & set(words(title))) / len(wanted) if wanted else 0.0


def _query_separation(score_N: NDArray[np.float64], grade_N: NDArray[Any]) -> dict[str, float]:
    """AUCs and margins inside one query, where its grades define them."""
    of_grade = {grade: score_N[grade_N == grade] for grade in (0, 1, 2)}
    values = {
        f"{name}_per_query": auc(of_grade[high], of_grade[low])
        for name, (high, low) in GRADE_PAIRS.items()
        if of_grade[high].size and of_grade[low].size
    }
    if of_grade[2].size and of_grade[0].size:
        values["average_margin"] = float(of_grade[2].mean() - of_grade[0].mean())
        values["worst_case_margin"] = float(of_grade[2].min() - of_grade[0].max())
    return values


def _weighted_auc(
    score_N: NDArray[np.float64], grade_N: NDArray[Any], high: int, low: int
) -> Callable[[NDArray[np.float64]], float]:
    """AUC of two grades as a function of the pairs' weights, nan where a grade has no weight; sorts once."""
    members = np.flatnonzero((grade_N == high) | (grade_N == low))
    members = members[np.argsort(score_N[members], kind="stable")]
    ordered, is_high = score_N[members], grade_N[members] == high
    below, up_to = (np.searchsorted(ordered, ordered[is_high], side=side) for side in ("left", "right"))

    def weigh(weight_N: NDArray[np.float64]) -> float:
        weight = weight_N[members]
        weight_high = weight[is_high]
        low_mass = np.concatenate([[0.0], np.cumsum(np.where(is_high, 0.0, weight))])
        pairs = weight_high.sum() * low_mass[-1]
        return float(weight_high @ (low_mass[below] + low_mass[up_to]) / (2 * pairs)) if pairs else float("nan")

    return weigh


def _mean_of(
    values: Sequence[Callable[[NDArray[np.float64]], float]],
) -> Callable[[NDArray[np.float64]], float]:
    return lambda weight_N: float(np.mean([value(weight_N) for value in values]))


def _interval(difference: float, resampled: list[float]) -> Interval:
    defined = np.array(resampled)
    return percentile_interval(difference, defined[~np.isnan(defined)])


def _aligned(
    scores: ArrayLike, grades: ArrayLike, query_index: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[Any], NDArray[Any]]:
    score_N, grade_N, query_N = (
        np.asarray(scores, dtype=np.float64),
        np.asarray(grades),
        np.asarray(query_index),
    )
    if not score_N.shape == grade_N.shape == query_N.shape:
        raise ValueError(
            f"separation: expected a score, a grade and a query per pair, got {score_N.size}, {grade_N.size} "
            f"and {query_N.size}; align them by pair"
        )
    return score_N, grade_N, query_N
