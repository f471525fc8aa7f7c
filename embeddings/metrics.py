"""Ranking metrics per query, agreement of a labeller with people, and bootstrap intervals over queries.

Gains are linear (0, .5, 1 for grades 0, 1, 2) and unjudged products count as grade 0; since that punishes an
encoder for finding relevant products nobody has judged, NDCG among judged products and the judged share of
the top are given beside it. Every metric equals its namesake in ir_measures.
"""

# Q queries, P products

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple, TypedDict

import numpy as np
from numpy.typing import ArrayLike, NDArray

GAINS: Final[Mapping[int, float]] = {0: 0.0, 1: 0.5, 2: 1.0}
CUTOFFS: Final = (10, 50, 100)
NUM_GRADES: Final = len(GAINS)


class Interval(NamedTuple):
    """A mean with its 95 % percentile bootstrap interval."""

    mean: float
    low: float
    high: float


class Agreement(TypedDict):
    """How far predicted grades agree with human ones; `confusion[human][predicted]` counts pairs."""

    accuracy: float
    within_1: float
    quadratic_weighted_kappa: float
    confusion: list[list[int]]


def ndcg(ranked_gains: Sequence[float], ideal_gains: Sequence[float], k: int) -> float:
    """Discounted gain of the first k places over the best that `ideal_gains`, in any order, allow.

    Raises:
        ValueError: no ideal gain is above 0.

    Cites: Järvelin and Kekäläinen 2002, with linear gains and the discount log2(rank + 1).
    """
    ideal = _discounted_gain(sorted(ideal_gains, reverse=True)[:k])
    if ideal <= 0:
        raise ValueError("ndcg: expected an ideal gain above 0, got none; leave such queries out")
    return _discounted_gain(ranked_gains[:k]) / ideal


def per_query_metrics(
    ranking: Sequence[str], judged: Mapping[str, int], judged_ranking: Sequence[str]
) -> dict[str, float] | None:
    """Metrics of one query at 10, 50 and 100, or None for a query without a grade above 0.

    Keys: `ndcg@k`, `recall@k` and `precision@k` (relevant from grade 1), `recall_exact@k` and
    `precision_exact@k` (grade 2; recall only where the query has a grade 2), `judged@10` (share of the
    ranking's first ten that have a grade) and `judged_ndcg@10`.

    Args:
        ranking: product ids of the catalogue, best first, at least 100 or all of them.
        judged: grade of every judged product of the query, whether the ranking reaches it or not.
        judged_ranking: the judged products alone, best first.

    Raises:
        ValueError: a product is ranked twice, or `judged_ranking` does not hold exactly the judged products.
    """
    top = ranking[: max(CUTOFFS)]
    if len(set(top)) != len(top):
        raise ValueError("per_query_metrics: expected each product once in the ranking, got repeats; deduplicate by id")
    if len(judged_ranking) != len(judged) or set(judged_ranking) != set(judged):
        raise ValueError(
            "per_query_metrics: expected judged_ranking to hold every judged product once, got another set"
        )
    if not any(grade > 0 for grade in judged.values()):
        return None
    top_grades = [judged.get(product, 0) for product in top]
    ranked_gains, ideal_gains = (
        [GAINS[grade] for grade in top_grades],
        [GAINS[grade] for grade in judged.values()],
    )
    metrics: dict[str, float] = {}
    for k in CUTOFFS:
        metrics[f"ndcg@{k}"] = ndcg(ranked_gains, ideal_gains, k)
        for suffix, lowest in (("", 1), ("_exact", 2)):
            num_relevant = sum(grade >= lowest for grade in judged.values())
            num_found = sum(grade >= lowest for grade in top_grades[:k])
            metrics[f"precision{suffix}@{k}"] = num_found / k
            if num_relevant:
                metrics[f"recall{suffix}@{k}"] = num_found / num_relevant
    metrics["judged@10"] = sum(product in judged for product in top[:10]) / max(len(top[:10]), 1)
    metrics["judged_ndcg@10"] = ndcg([GAINS[judged[product]] for product in judged_ranking], ideal_gains, 10)
    return metrics


def bootstrap_mean(values: ArrayLike, *, resamples: int = 2000, seed: int) -> Interval:
    """Mean over queries and its interval under resampling of queries; the same seed gives the same interval.

    Raises:
        ValueError: no values, or one is not finite.
    """
    value_Q = np.asarray(values, dtype=np.float64)
    if value_Q.size == 0 or not np.isfinite(value_Q).all():
        raise ValueError(
            f"bootstrap_mean: expected finite values, got {value_Q.size} of them; leave undefined ones out"
        )
    generator = np.random.default_rng(seed)
    means = np.array([value_Q[generator.integers(value_Q.size, size=value_Q.size)].mean() for _ in range(resamples)])
    return percentile_interval(float(value_Q.mean()), means)


def paired_bootstrap(values_a: ArrayLike, values_b: ArrayLike, *, resamples: int = 2000, seed: int) -> Interval:
    """Mean of a - b over the same queries in the same order, and its interval.

    Raises:
        ValueError: the two differ in length, are empty, or are not finite.
    """
    value_a_Q, value_b_Q = np.asarray(values_a, dtype=np.float64), np.asarray(values_b, dtype=np.float64)
    if value_a_Q.shape != value_b_Q.shape:
        raise ValueError(
            f"paired_bootstrap: expected the same queries twice, got {value_a_Q.size} and {value_b_Q.size}"
        )
    return bootstrap_mean(value_a_Q - value_b_Q, resamples=resamples, seed=seed)


def percentile_interval(mean: float, resampled: NDArray[np.float64]) -> Interval:
    """The interval that holds the middle 95 % of the resampled values."""
    low, high = np.percentile(resampled, [2.5, 97.5])
    return Interval(mean, float(low), float(high))


def labeller_agreement(human: ArrayLike, predicted: ArrayLike) -> Agreement:
    """Accuracy, share of pairs at most one grade apart, quadratic weighted kappa and confusion.

    Kappa is 0 where chance alone agrees fully: both gradings give one and the same grade throughout.

    Raises:
        ValueError: the two differ in length, are empty, or hold something else than 0, 1, 2.

    Cites: Cohen 1968 for the weighted kappa.
    """
    pair = np.asarray(human), np.asarray(predicted)
    if pair[0].shape != pair[1].shape or pair[0].size == 0:
        raise ValueError(f"labeller_agreement: expected two grades per pair, got {pair[0].size} and {pair[1].size}")
    if not all(np.isin(grades, list(GAINS)).all() for grades in pair):
        raise ValueError("labeller_agreement: expected grades 0, 1 and 2, got others; count violations before")
    confusion = np.zeros((NUM_GRADES, NUM_GRADES), dtype=np.int64)
    np.add.at(confusion, (pair[0].astype(np.int64), pair[1].astype(np.int64)), 1)
    total = confusion.sum()
    distance = np.abs(np.subtract.outer(np.arange(NUM_GRADES), np.arange(NUM_GRADES)))
    by_chance = np.outer(confusion.sum(axis=1), confusion.sum(axis=0)) / total
    expected = float((distance**2 * by_chance).sum())
    return Agreement(
        accuracy=float(confusion[distance == 0].sum() / total),
        within_1=float(confusion[distance <= 1].sum() / total),
        quadratic_weighted_kappa=1 - float((distance**2 * confusion).sum()) / expected if expected else 0.0,
        confusion=confusion.tolist(),
    )


def _discounted_gain(gains: Sequence[float]) -> float:
    return float(np.sum(np.asarray(gains, dtype=np.float64) / np.log2(np.arange(2, len(gains) + 2))))
