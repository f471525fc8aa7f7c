"""The fit of annotators' confusion matrices, given the marks that a round expects; see `spark_etl.dawid_skene`.

Shapes: A annotators, P patterns of marks, G grades of pairs, K marks (3 each), N sums of a round.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lake.schemas import Grade
from spark_etl.recipes import DawidSkeneRecipe

GRADES = tuple(int(grade) for grade in Grade)
_PRIOR_PAIRS = 1.0
"""Pairs of each grade added to a data set's, so that no grade is impossible."""
NEVER = -1e9
"""Logarithm of a probability that is 0."""

Matrix = NDArray[np.float64]


class Round(NamedTuple):
    """What a round of the fit came to; see the table dawid_skene_round."""

    stage: str
    log_likelihood: float
    log_posterior: float
    change: float


class Rater(NamedTuple):
    """Who shares a matrix: kind annotator and the name, or kind anonymous and the scale."""

    kind: str
    name: str


@dataclass(frozen=True)
class AnnotatorModel:
    """How the annotators of a data set mark.

    Attributes:
        rater_A: whose matrices these are.
        marks_AGK: marks expected of each, by the pair's grade and the grade marked.
        matrix_AGK: probability of each mark; rows sum to 1.
        pooled_GK: the matrix of all marks, to which they are drawn; pooled_marks_GK: the marks expected.
        share_G: pairs of each grade.
        rounds: in their order, those of the pooled matrix first.
        converged: whether both fits came to rest.
    """

    dataset: str
    rater_A: tuple[Rater, ...]
    marks_AGK: Matrix
    matrix_AGK: Matrix
    pooled_GK: Matrix
    pooled_marks_GK: Matrix
    share_G: Matrix
    rounds: tuple[Round, ...]
    converged: bool


@dataclass
class Fit:
    """A data set's fit on its way: matrices and shares, and what each round came to."""

    dataset: str
    rater_A: tuple[Rater, ...]
    recipe: DawidSkeneRecipe
    rounds: list[Round] = field(default_factory=list)
    is_done: bool = False
    converged: bool = False
    pooled_is_at_rest: bool = False

    def start(self, number_PK: Matrix, weight_P: Matrix, gold_P: Matrix) -> None:
        """Fits the pooled matrix, from which every annotator's starts.

        Args:
            number_PK: marks of each grade in each pattern.
            weight_P: pairs with the pattern.
            gold_P: their known grade; nan where it is not.
        """
        is_open_PG = np.isnan(gold_P)[:, None] | (gold_P[:, None] == np.array(GRADES))
        # votes for a start, with a thousandth of a mark where a gold grade has none
        self._take_pooled(_rows_to_one(np.where(is_open_PG, number_PK + 1e-3, 0)), number_PK, weight_P)
        while not self.pooled_is_at_rest and len(self.rounds) < self.recipe.max_rounds:
            score_PG = np.log(self.share_G) + number_PK @ np.log(self.pooled_GK).T
            score_PG = np.where(is_open_PG, score_PG, NEVER)
            evidence_P = np.logaddexp.reduce(score_PG, axis=1)
            likelihood = float(weight_P @ evidence_P)
            posterior = likelihood + _log_prior(self._pooled_prior(), self.pooled_GK) + self._log_shares()
            before = self.pooled_GK, self.share_G
            self._take_pooled(np.exp(score_PG - evidence_P[:, None]), number_PK, weight_P)
            change = _change((self.pooled_GK, before[0]), (self.share_G, before[1]))
            self.rounds.append(Round("pooled", likelihood, posterior, change))
            self.pooled_is_at_rest = change < self.recipe.tolerance
        self.prior_GK = self.recipe.prior_marks * self.pooled_GK
        self.matrix_AGK = np.repeat(self.pooled_GK[None], len(self.rater_A), axis=0)

    def _take_pooled(self, q_PG: Matrix, number_PK: Matrix, weight_P: Matrix) -> None:
        self.pooled_marks_GK = np.einsum("p,pg,pk->gk", weight_P, q_PG, number_PK)
        self.pooled_GK = _rows_to_one(self.pooled_marks_GK + self._pooled_prior())
        self.share_G = _rows_to_one(weight_P @ q_PG + _PRIOR_PAIRS)

    def _pooled_prior(self) -> Matrix:
        return self.recipe.prior_marks * _by_distance(self.recipe.distance_factor)

    def take(self, sums_AN: Matrix) -> None:
        """A round: what was expected under the matrices at hand, and the matrices that follow from it."""
        size = len(GRADES)
        self.marks_AGK = sums_AN[:, : size * size].reshape(-1, size, size)
        total_N = sums_AN[:, size * size :].sum(axis=0)
        likelihood = float(total_N[size])
        posterior = likelihood + _log_prior(self.prior_GK, self.matrix_AGK) + self._log_shares()
        matrix_AGK = _rows_to_one(self.marks_AGK + self.prior_GK)
        share_G = _rows_to_one(total_N[:size] + _PRIOR_PAIRS)
        change = _change((matrix_AGK, self.matrix_AGK), (share_G, self.share_G))
        self.rounds.append(Round("annotators", likelihood, posterior, change))
        at_rest = change < self.recipe.tolerance
        num_rounds = sum(one.stage == "annotators" for one in self.rounds)
        self.is_done = at_rest or num_rounds >= self.recipe.max_rounds
        self.converged = at_rest and self.pooled_is_at_rest
        if not self.is_done:
            self.matrix_AGK, self.share_G = matrix_AGK, share_G

    def model(self) -> AnnotatorModel:
        """What the fit came to."""
        return AnnotatorModel(
            self.dataset,
            self.rater_A,
            self.marks_AGK,
            self.matrix_AGK,
            self.pooled_GK,
            self.pooled_marks_GK,
            self.share_G,
            tuple(self.rounds),
            self.converged,
        )

    def _log_shares(self) -> float:
        return _PRIOR_PAIRS * float(np.log(self.share_G).sum())


def _by_distance(factor: float) -> Matrix:
    """A matrix whose rows fall by `factor` with each step from the diagonal and sum to 1."""
    grade_G = np.array(GRADES)
    return _rows_to_one(factor ** np.abs(grade_G[:, None] - grade_G).astype(float))


def _rows_to_one(value: Matrix) -> Matrix:
    return np.asarray(value / value.sum(axis=-1, keepdims=True))


def _log_prior(prior_GK: Matrix, matrix: Matrix) -> float:
    """Of matrices under the Dirichlet distribution of 1 + prior, without what is the same for all."""
    return float((prior_GK * np.log(matrix)).sum())


def _change(*pairs: tuple[Matrix, Matrix]) -> float:
    return max(float(np.abs(new - old).max()) for new, old in pairs)
