"""Judges of pairs side by side on human grades: the whole of a data set and its slices, with intervals over queries.

A judge is anything that gives a pair a distribution over the grades: a labeller, or a score such as a cosine that is
turned into one on calibration queries, as a labeller is calibrated on them.
"""

# N pairs

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Final

import numpy as np
from numpy.typing import NDArray

from conf.load import meaning, settings
from embeddings.calibration import expected_grade
from embeddings.labeller_metrics import (
    bootstrap_queries,
    calibration_floor,
    fit_line,
    labeller_metrics,
    reliability,
    root_mean_square,
)
from embeddings.metrics import Interval, labeller_agreement
from embeddings.separation import token_overlap
from embeddings.text import words

WHOLE: Final = ""
"""Name of the slice that holds every pair."""


@settings
class JudgeRecipe:
    """How judges are compared."""

    resamples: Annotated[int, meaning("resamples of the queries behind each interval", ge=20)] = 300
    min_slice_pairs: Annotated[int, meaning("smaller slices are not shown", "pairs", ge=1)] = 1000
    seed: Annotated[int, meaning("seed of the bootstrap and of the calibration floor", ge=0)] = 0


@dataclass(frozen=True)
class GradedPairs:
    """Human-graded pairs of one data set.

    Attributes:
        grade_N: consensus, 0, 1 or 2.
        value_N: mean of the raters on the scale of grades, in [0, 2].
        query_N: an integer per pair; equal for pairs of one query.
        is_test_N: whether the pair is measured; the others are calibration pairs.
        slices: name -> which pairs belong to it.
    """

    grade_N: NDArray[np.int8]
    value_N: NDArray[np.float64]
    query_N: NDArray[np.int64]
    is_test_N: NDArray[np.bool_]
    slices: Mapping[str, NDArray[np.bool_]]


@dataclass(frozen=True)
class MeasuredSlice:
    """A judge on a slice of the test pairs.

    Attributes:
        name: of the slice; empty for all pairs.
        metrics: metric -> value with its interval; `rmse` only where raters' means are known.
        ece_floor: calibration error that a perfect judge would show on these pairs.
        confusion: pairs by human grade (row) and judge's grade.
        reliability: of each tenth of the pairs by certainty: mean certainty, share that was right, pairs.
    """

    name: str
    num_pairs: int
    num_queries: int
    metrics: Mapping[str, Interval]
    ece_floor: float
    confusion: list[list[int]]
    reliability: list[tuple[float, float, int]]


def measure_judge(
    probability_N3: NDArray[np.floating], answered_N: NDArray[np.integer], pairs: GradedPairs, recipe: JudgeRecipe
) -> list[MeasuredSlice]:
    """A judge on all test pairs and on every slice that is large enough.

    Args:
        probability_N3: calibrated probabilities of all pairs.
        answered_N: the judge's grades of them.
        pairs: their human grades. The root mean square error is that of the line from expected grade to raters' mean
            which fits the calibration pairs best.
        recipe: intervals and slices.
    """
    expected_N, error_N = expected_grade(probability_N3), np.zeros(0)
    fitted = np.flatnonzero(~pairs.is_test_N)
    if len(fitted) > 1 and (pairs.value_N % 1 > 0).any():
        slope, intercept = fit_line(expected_N[fitted], pairs.value_N[fitted])
        error_N = slope * expected_N + intercept - pairs.value_N
    measured = []
    for name, is_member_N in {WHOLE: np.ones(len(expected_N), bool), **pairs.slices}.items():
        rows = np.flatnonzero(is_member_N & pairs.is_test_N)
        if len(rows) == 0 or (name and len(rows) < recipe.min_slice_pairs):
            continue

        def measure(drawn: NDArray[np.int64], rows: NDArray[np.intp] = rows) -> dict[str, float]:
            chosen = rows[drawn]
            found = labeller_metrics(probability_N3[chosen], answered_N[chosen], pairs.grade_N[chosen])
            return found | ({"rmse": root_mean_square(error_N[chosen])} if error_N.size else {})

        probability, grade = probability_N3[rows], pairs.grade_N[rows]
        measured.append(
            MeasuredSlice(
                name=name,
                num_pairs=len(rows),
                num_queries=len(np.unique(pairs.query_N[rows])),
                metrics=bootstrap_queries(measure, pairs.query_N[rows], resamples=recipe.resamples, seed=recipe.seed),
                ece_floor=calibration_floor(probability, seed=recipe.seed),
                confusion=labeller_agreement(grade, answered_N[rows])["confusion"],
                reliability=reliability(probability, grade),
            )
        )
    return measured


def slices_of_pairs(
    queries: list[str], titles: list[str], categories: list[str | None]
) -> dict[str, NDArray[np.bool_]]:
    """Slices by length of the query, by the share of its words in the title, and by the widest category."""
    length_N = np.array([len(words(query)) for query in queries])
    overlap_N = np.array([token_overlap(query, title) for query, title in zip(queries, titles, strict=True)])
    top_N = np.array([(category or "").split(" > ")[0] for category in categories], dtype=object)
    slices = {
        "query of 1-2 words": length_N <= 2,
        "query of 3 words": length_N == 3,
        "query of 4 or more words": length_N >= 4,
        "title holds no query word": overlap_N == 0,
        "title holds some query words": (overlap_N > 0) & (overlap_N < 1),
        "title holds all query words": overlap_N == 1,
    }
    return slices | {f"category {name}": top_N == name for name in sorted(set(top_N.tolist()) - {""})}


def score_probabilities(
    fitted_M: NDArray[np.floating], grade_M: NDArray[np.integer], score_N: NDArray[np.floating]
) -> NDArray[np.float64]:
    """Probabilities of the grades, [N, 3], that a score such as a cosine stands for, by regression on M pairs."""
    from sklearn.linear_model import LogisticRegression

    probability_N3, held = np.zeros((len(score_N), 3)), np.unique(grade_M)
    if len(held) == 1:
        probability_N3[:, held[0]] = 1.0
        return probability_N3
    scale = float(fitted_M.std()) or 1.0
    model = LogisticRegression(C=1e4, max_iter=1000).fit(fitted_M[:, None] / scale, grade_M)
    probability_N3[:, held] = model.predict_proba(score_N[:, None] / scale)
    return probability_N3


def rate_probabilities(grade_M: NDArray[np.integer], num_pairs: int) -> NDArray[np.float64]:
    """The class rates of M pairs for every pair: the judge that answers the commonest grade."""
    rate_3 = np.bincount(grade_M, minlength=3) / len(grade_M)
    return np.tile(rate_3, (num_pairs, 1))
