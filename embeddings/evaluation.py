"""Retrieval and separation of one encoder on judged queries, and what it gains over another.

Queries are ranked over the full catalogue; judged pairs are scored whether the ranking reaches them or not.

Q queries, P products, N judged pairs, S encoders that differ in their seed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from embeddings.metrics import GAINS, Interval, ndcg, paired_bootstrap, per_query_metrics
from embeddings.separation import GRADE_PAIRS, bootstrap_auc_difference, separation, token_overlap

DEPTH: Final = 100
"""Places of a ranking that the metrics look at."""
MIN_OVERLAP: Final = 0.7
"""Share of the query's tokens in the title from which a pair counts as lexically alike (the paper's Table 5)."""
_GRID: Final = 200
"""Candidate thresholds: quantiles of the scores, fine enough for two digits of cosine."""


@dataclass(frozen=True)
class JudgedQuery:
    """A query with its graded products.

    Attributes:
        grades: product id -> consensus grade.
        truth: product id -> true grade above 0, where a simulation knows it.
    """

    query_id: str
    text: str
    grades: Mapping[str, int]
    truth: Mapping[str, int] | None = None


@dataclass(frozen=True)
class Measured:
    """What one encoder did on the judged queries, in their order.

    Attributes:
        rankings: product ids of each query, best first.
        per_query: metrics of each query; None where it has no grade above 0.
        score_N: cosine of every judged pair, query by query, products in id order.
        grade_N: its grade.
        query_N: position of its query.
        metrics: means over queries and values over all pairs.
    """

    rankings: Sequence[Sequence[str]]
    per_query: list[dict[str, float] | None]
    score_N: NDArray[np.float64]
    grade_N: NDArray[np.int8]
    query_N: NDArray[np.int64]
    metrics: dict[str, float]

    @property
    def num_queries(self) -> int:
        """Queries measured."""
        return sum(metrics is not None for metrics in self.per_query)


def judged_pairs(queries: Sequence[JudgedQuery]) -> list[tuple[int, str, int]]:
    """(position of the query, product id, grade) of every judged pair, in the order of `Measured`."""
    return [
        (place, product_id, query.grades[product_id])
        for place, query in enumerate(queries)
        for product_id in sorted(query.grades)
    ]


def measure(
    queries: Sequence[JudgedQuery],
    rankings: Sequence[Sequence[str]],
    score_N: NDArray[np.floating],
    titles: Mapping[str, str],
) -> Measured:
    """Metrics of one encoder.

    Args:
        queries: with their grades.
        rankings: product ids of each query, best first, 100 or the whole catalogue.
        score_N: cosines of `judged_pairs(queries)`.
        titles: of every judged product, for the overlap of words.
    """
    pairs = judged_pairs(queries)
    query_N = np.array([place for place, _, _ in pairs], dtype=np.int64)
    grade_N = np.array([grade for _, _, grade in pairs], dtype=np.int8)
    scores = np.asarray(score_N, dtype=np.float64)
    starts = np.searchsorted(query_N, np.arange(len(queries) + 1))
    per_query: list[dict[str, float] | None] = []
    for place, (query, ranking) in enumerate(zip(queries, rankings, strict=True)):
        own = range(starts[place], starts[place + 1])
        # pairs stand in id order, so a stable sort breaks ties by product id
        by_score = sorted(own, key=lambda pair: -scores[pair])
        metrics = per_query_metrics(ranking, query.grades, [pairs[pair][1] for pair in by_score])
        if metrics is not None and query.truth:
            metrics["truth_ndcg@10"] = _truth_ndcg(ranking, query.truth)
        per_query.append(metrics)
    overlap_N = np.array([token_overlap(queries[place].text, titles[product]) for place, product, _ in pairs])
    alike_N = overlap_N >= MIN_OVERLAP
    alike = separation(scores[alike_N], grade_N[alike_N], query_N[alike_N])
    margins = ("average_margin", "worst_case_margin")
    return Measured(
        rankings,
        per_query,
        scores,
        grade_N,
        query_N,
        _means(per_query)
        | separation(scores, grade_N, query_N)
        | {f"overlap_{name}": alike[name] for name in margins if name in alike},
    )


def gains(new: Sequence[Measured], old: Sequence[Measured], *, seed: int) -> dict[str, Interval]:
    """Mean paired differences new - old with 95 % bootstrap intervals over queries: all per-query metrics and AUCs.

    Each side is one encoder, or several that differ in their seed, whose values are averaged before queries are drawn.

    Raises:
        ValueError: a side holds no encoder.
    """
    if not new or not old:
        raise ValueError("gains: expected at least one encoder on either side")
    means = [_mean_per_query(side) for side in (new, old)]
    both = [(a, b) for a, b in zip(*means, strict=True) if a is not None and b is not None]
    found: dict[str, Interval] = {}
    for name in dict.fromkeys(name for metrics, _ in both for name in metrics):
        values = [(a[name], b[name]) for a, b in both if name in a and name in b]
        found[name] = paired_bootstrap([a for a, _ in values], [b for _, b in values], seed=seed)
    grade_N, query_N = new[0].grade_N, new[0].query_N
    if any((grade_N == high).any() and (grade_N == low).any() for high, low in GRADE_PAIRS.values()):
        ours_SN, theirs_SN = (np.stack([one.score_N for one in side]) for side in (new, old))
        found |= bootstrap_auc_difference(ours_SN, theirs_SN, grade_N, query_N, seed=seed)
    return found


def mean_metrics(measured: Sequence[Measured]) -> dict[str, float]:
    """Means over encoders of the metrics that all of them have."""
    names = [name for name in measured[0].metrics if all(name in one.metrics for one in measured)]
    return {name: float(np.mean([one.metrics[name] for one in measured])) for name in names}


def fit_thresholds(scores: ArrayLike, grades: ArrayLike) -> tuple[float, float] | None:
    """The two cosines at which cutting scores into grades 0, 1, 2 agrees best with the grades given.

    Agreement is the quadratic weighted kappa; among equals the lowest pair of thresholds wins.

    Returns:
        Least score of grade 1 and of grade 2; None where the grades given are not at least two.
    """
    score_N, grade_N = np.asarray(scores, dtype=np.float64), np.asarray(grades)
    if len(np.unique(grade_N)) < 2:
        return None
    cuts = np.unique(np.quantile(score_N, np.linspace(0, 1, _GRID)))
    cuts = np.append(cuts, np.nextafter(cuts[-1], np.inf))  # above all scores: no pair need be of the upper grade
    below = np.array([[np.count_nonzero(score_N[grade_N == g] < cut) for g in range(3)] for cut in cuts])
    total_G = np.bincount(grade_N.astype(np.int64), minlength=3)
    low, high = np.triu_indices(len(cuts))
    # counts [pairs of cuts, predicted grade, grade]
    confusion = np.stack([below[low], below[high] - below[low], total_G - below[high]], axis=1).astype(np.float64)
    distance = np.subtract.outer(np.arange(3), np.arange(3)) ** 2.0
    predicted = confusion.sum(axis=2)
    observed = (confusion * distance).sum(axis=(1, 2))
    expected = np.einsum("kp,g,pg->k", predicted, total_G.astype(np.float64), distance) / total_G.sum()
    kappa = 1 - observed / np.maximum(expected, 1e-12)
    best = int(np.argmax(kappa))
    return float(cuts[low[best]]), float(cuts[high[best]])


def _mean_per_query(side: Sequence[Measured]) -> list[dict[str, float] | None]:
    """Of each query the metrics' means over the encoders; which queries and metrics there are hangs on grades alone."""
    found: list[dict[str, float] | None] = []
    for of_query in zip(*(one.per_query for one in side), strict=True):
        known = [metrics for metrics in of_query if metrics is not None]
        found.append({name: float(np.mean([each[name] for each in known])) for name in known[0]} if known else None)
    return found


def _means(per_query: Sequence[Mapping[str, float] | None]) -> dict[str, float]:
    """Mean of each metric over the queries that define it."""
    values: dict[str, list[float]] = {}
    for metrics in per_query:
        for name, value in (metrics or {}).items():
            values.setdefault(name, []).append(value)
    return {name: float(np.mean(of_queries)) for name, of_queries in values.items()}


def _truth_ndcg(ranking: Sequence[str], truth: Mapping[str, int]) -> float:
    gained = [GAINS[truth.get(product, 0)] for product in ranking[:10]]
    return ndcg(gained, [GAINS[grade] for grade in truth.values()], 10)
