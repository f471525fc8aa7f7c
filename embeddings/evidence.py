"""Evidence beside a labeller's answer: a second opinion by words and an encoder, and the head that weighs both.

A fine-tuned model reads a pair alone: neither how rare a word of the query is in the shop, nor that a misspelt word
stands a letter away from one of the title, nor whether the shop has much that is closer to the query. Numbers say it
(`evidence_words`, `evidence_encoder`). A logistic regression on hinges of them, fitted on the pairs that the labeller
is tuned on, is an opinion of its own; on human grades it is about as good as a small labeller, and errs elsewhere. A
second regression reads answer and opinion, fitted on validation queries, which neither learned from, so that it knows
how far each is to be trusted. Both tell P(grade >= 1) and P(grade 2 given grade >= 1). Curves bend at fixed places and
nowhere jump, as trees would: a number's last digit, which hangs on the machine, never moves a grade's probability much.

Words cost a processor 0.05 ms per pair whatever the labeller's size, the encoder what a small labeller does.

Cites: Wolpert 1992, Stacked generalization.
"""

# N pairs, E numbers of evidence, F inputs of a regression, H hinges of them

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from embeddings.calibration import of_boundaries
from embeddings.evidence_words import WordNumbers
from embeddings.guideline import ProductFields, neutralise, products_of

if TYPE_CHECKING:
    from embeddings.evidence_encoder import EncoderNumbers

EVIDENCE_FILE: Final = "evidence.json"
ENCODER_FOLDER: Final = "evidence_encoder"
"""Beside the file, where an encoder speaks too; with the vectors of the shop's titles."""
PAIRS_FOR_OPINION: Final = 1000
"""Pairs that an opinion is fitted on at least, no query counting as more than ten; it has about 110 weights."""
PAIRS_FOR_HEAD: Final = 250
"""The same of the pairs by which answer and opinion are weighed, with 17 weights."""
_RIDGE: Final = 10.0
_LIMIT: Final = 3.0
"""Deviations past which a number counts as this: what a tuning set hardly holds is not extrapolated."""
_SMALLEST: Final = 1e-6


@dataclasses.dataclass(frozen=True)
class GradedNumbers:
    """What a regression is fitted on.

    Attributes:
        number_NF: inputs.
        share_N2: shares of raters at or above grades 1 and 2.
        weight_N: what each pair counts.
    """

    number_NF: NDArray[np.float64]
    share_N2: NDArray[np.floating]
    weight_N: NDArray[np.floating]

    def take(self, rows: NDArray[np.intp]) -> GradedNumbers:
        """Some of the pairs."""
        return GradedNumbers(self.number_NF[rows], self.share_N2[rows], self.weight_N[rows])


@dataclasses.dataclass(frozen=True)
class GradeRegression:
    """Logits of P(grade >= 1) and of P(grade 2 given grade >= 1), both linear in hinges of standardised inputs.

    Attributes:
        centre: subtracted from the inputs, [F].
        scale: they are divided by it then, [F].
        relevant: weights of P(grade >= 1), the constant last, [H + 1].
        exact: weights of P(grade 2 given grade >= 1), the constant last, [H + 1].
    """

    centre: tuple[float, ...]
    scale: tuple[float, ...]
    relevant: tuple[float, ...]
    exact: tuple[float, ...]

    @classmethod
    def fit(cls, graded: GradedNumbers) -> GradeRegression:
        """The likeliest one under a ridge."""
        share_1_N, share_2_N = np.asarray(graded.share_N2, dtype=np.float64).T
        exact_N = np.divide(share_2_N, share_1_N, out=np.zeros(len(share_1_N)), where=share_1_N > 0)
        centre_F = graded.number_NF.mean(axis=0)
        scale_F = graded.number_NF.std(axis=0) + _SMALLEST
        hinge_NH = _hinges((graded.number_NF - centre_F) / scale_F)
        return cls(
            _rounded(centre_F),
            _rounded(scale_F),
            _fit(hinge_NH, share_1_N, graded.weight_N),
            _fit(hinge_NH, exact_N, graded.weight_N * share_1_N),
        )

    def __call__(self, number_NF: NDArray[np.float64]) -> NDArray[np.float64]:
        """The two logits of each pair, [N, 2]."""
        hinge_NH = _hinges((number_NF - np.array(self.centre)) / np.array(self.scale))
        weight_H2 = np.stack([self.relevant, self.exact], axis=1)
        return np.asarray(hinge_NH @ weight_H2[:-1] + weight_H2[-1])


class Evidence:
    """Computes what is said of a pair beside the labeller's answer.

    Args:
        words: what words say.
        encoder: folder of `evidence_encoder.write_evidence_encoder`; empty for none.
    """

    def __init__(self, words: WordNumbers, encoder: str = "") -> None:
        self.words, self.encoder = words, encoder

    @cached_property
    def _encoder_numbers(self) -> EncoderNumbers:
        from embeddings.evidence_encoder import EncoderNumbers

        return EncoderNumbers(self.encoder)

    def numbers(self, queries: Sequence[str], products: Sequence[ProductFields]) -> NDArray[np.float64]:
        """WORD_NUMBERS and, with an encoder, ENCODER_NUMBERS, [N, E]."""
        asked = [neutralise(query) for query in queries]
        number_NE = self.words(asked, products)
        if not self.encoder:
            return number_NE
        return np.concatenate([number_NE, self._encoder_numbers(asked, [item.title for item in products])], axis=1)

    def numbers_of(self, rows: pa.Table) -> NDArray[np.float64]:
        """The numbers of rows with columns query and title and any other text column of a product, [N, E]."""
        return self.numbers(rows["query"].to_pylist(), products_of(rows))


@dataclasses.dataclass(frozen=True)
class EvidenceHead:
    """Weighs evidence and a labeller's answer.

    Attributes:
        evidence: what is read beside the answer.
        opinion: what the numbers of the evidence say of the grade.
        weighing: reads the logits of the answer and those of the opinion.
    """

    evidence: Evidence
    opinion: GradeRegression
    weighing: GradeRegression

    def __call__(self, answer_N3: NDArray[np.floating], number_NE: NDArray[np.float64]) -> NDArray[np.float64]:
        """Probabilities of the grades, [N, 3]; nan where the answer is."""
        logit_N2 = self.weighing(_answer_and_opinion(answer_N3, self.opinion(number_NE)))
        return of_boundaries(*(1 / (1 + np.exp(-logit_N2))).T)

    def text(self) -> str:
        """What the file holds that `load` reads; of an encoder, that there is one."""
        values = {
            "words": self.evidence.words.values(),
            "opinion": dataclasses.asdict(self.opinion),
            "weighing": dataclasses.asdict(self.weighing),
            "encoder": ENCODER_FOLDER if self.evidence.encoder else "",
        }
        return json.dumps(values, ensure_ascii=False) + "\n"

    @classmethod
    def load(cls, folder: str | Path) -> Self | None:
        """The head in a labeller's folder; None where it has none."""
        path = Path(folder, EVIDENCE_FILE)
        if not path.is_file():
            return None
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        encoder = str(Path(folder, values["encoder"])) if values["encoder"] else ""
        regressions = [GradeRegression(**values[name]) for name in ("opinion", "weighing")]
        return cls(Evidence(WordNumbers(**values["words"]), encoder), *regressions)


def fit_evidence_head(
    evidence: Evidence, learned: GradedNumbers, held: GradedNumbers, answer_N3: NDArray[np.floating]
) -> EvidenceHead | None:
    """The head of pairs with the numbers of the evidence.

    Args:
        evidence: the numbers' kind.
        learned: judged pairs that the labeller learned from too.
        held: pairs that it did not learn from, random ones among them, of which neither answer nor opinion knows the
            rates.
        answer_N3: what it answers to these, uncalibrated.

    Returns:
        None where the weights of either sum to too little: `PAIRS_FOR_OPINION`, `PAIRS_FOR_HEAD`.
    """
    if learned.weight_N.sum() < PAIRS_FOR_OPINION or held.weight_N.sum() < PAIRS_FOR_HEAD:
        return None
    opinion = GradeRegression.fit(learned)
    read_NF = _answer_and_opinion(answer_N3, opinion(held.number_NF))
    return EvidenceHead(evidence, opinion, GradeRegression.fit(dataclasses.replace(held, number_NF=read_NF)))


def _answer_and_opinion(answer_N3: NDArray[np.floating], opinion_N2: NDArray[np.float64]) -> NDArray[np.float64]:
    """Logits of P(grade >= 1) and of P(grade 2 given grade >= 1), of both, [N, 4]."""
    zero_N, one_N, two_N = np.maximum(answer_N3.astype(np.float64), _SMALLEST).T
    answer_N2 = np.stack([np.log((one_N + two_N) / zero_N), np.log(two_N / one_N)], axis=1)
    return np.concatenate([answer_N2, opinion_N2], axis=1)


def _fit(
    input_NH: NDArray[np.float64], target_N: NDArray[np.float64], weight_N: NDArray[np.floating]
) -> tuple[float, ...]:
    """Weights of a logistic regression, the constant, which no ridge holds, last."""
    from scipy.optimize import minimize

    def loss(weight_H: NDArray[np.float64]) -> tuple[float, Any]:
        logit_N = input_NH @ weight_H[:-1] + weight_H[-1]
        value = (weight_N * (np.logaddexp(0, logit_N) - target_N * logit_N)).sum()
        slope_N = weight_N * (1 / (1 + np.exp(-logit_N)) - target_N)
        slope_H = np.append(slope_N @ input_NH + _RIDGE * weight_H[:-1], slope_N.sum())
        return float(value + _RIDGE * (weight_H[:-1] ** 2).sum() / 2), slope_H

    found = minimize(loss, np.zeros(input_NH.shape[1] + 1), jac=True, method="L-BFGS-B", options={"maxiter": 1000})
    return _rounded(found.x)


def _hinges(standard_NF: NDArray[np.float64]) -> NDArray[np.float64]:
    """Each number, and how far it is above 0, above 1 and below -1: curves with three knots, [N, 4 F]."""
    bounded_NF = np.clip(standard_NF, -_LIMIT, _LIMIT)
    parts = (bounded_NF, np.maximum(bounded_NF, 0), np.maximum(bounded_NF - 1, 0), np.maximum(-1 - bounded_NF, 0))
    return np.concatenate(parts, axis=1)


def _rounded(values: NDArray[np.float64]) -> tuple[float, ...]:
    """Six digits, so that a refit on the same pairs has the same file and the labeller the same fingerprint."""
    return tuple(float(f"{value:.6g}") for value in values)
