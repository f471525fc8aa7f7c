"""Evidence: what the words of a pair, and an encoder, say beside a labeller's answer, and the head that reads all.

A fine-tuned model sees meaning, but neither how rare a word of the query is in the shop nor that a misspelt word stands
a letter away from one of the title; both tell an exact product from a partial one. Nine numbers of a pair say it. A
logistic regression of P(grade 2 given grade >= 1) on hinges of them and of the answer makes a better one of it. Of what
is irrelevant words tell a tuned model nothing new, but tuning on few grades of 0 forgets some of what a pretrained
encoder's cosine knows of unrelated products: where it is asked for, it is a tenth number, and a second regression reads
it for P(grade >= 1), which else stays the answer's. Both are fitted on validation queries, which no labeller learned
from, so that they know how far the answer is to be trusted, as in stacking. Words cost a processor 0.05 ms per pair,
whatever the labeller's size; the cosine costs what the encoder does.

Cites: Wolpert 1992, Stacked generalization; of numbers like these in product search, the winners' notes of the Home
Depot search relevance competition.
"""

# N pairs, E numbers of evidence, F those and two of the answer, H hinges of them

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Final, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from embeddings.guideline import ProductFields, neutralise, products_of
from embeddings.text import TextRecipe, product_text, rarity

EVIDENCE_FILE: Final = "evidence.json"
ENCODER_FOLDER: Final = "evidence_encoder"
"""Beside the file, where there is a cosine."""
EVIDENCE: Final = (
    "likeness of the query's least alike word to a word of the title",
    "mean likeness of the query's words, weighted by rarity",
    "likeness of its last word",
    "rarity of its rarest word",
    "mean rarity of its words",
    "mean place in the title of its words that stand there, 0 first; -1 without any",
    "number of its words",
    "number of the title's words",
    "share of its words in any text of the product, weighted by rarity",
)
"""Meaning of each number; likeness is the share of common letter triples, rarity log((N + 1) / (n + 1/2)) of n of N."""
PAIRS_FOR_HEAD: Final = 1000
"""Pairs that a head is fitted on at least, no query counting as more than ten; it has about 45 weights."""
_MAX_WORDS: Final = 400
"""Of a text that are read: a description of megabytes says no more."""
_RIDGE: Final = 10.0
_RIDGE_OF_RELEVANCE: Final = 1.0
_LIMIT: Final = 3.0
"""Deviations past which a number counts as this: what a tuning set hardly holds is not extrapolated."""
_SMALLEST: Final = 1e-6
_UNIT = re.compile(r"[^\W\d_]+|\d+(?:\.\d+)?")


def units(text: str | None) -> list[str]:
    """Runs of letters and numbers in lower case, without a plural's s, in their order."""
    found = _UNIT.findall((text or "").lower())[:_MAX_WORDS]
    return [word[:-1] if len(word) > 3 and word.endswith("s") else word for word in found]


@lru_cache(maxsize=100_000)
def _triples(word: str) -> frozenset[str]:
    padded = f" {word} "
    return frozenset(padded[start : start + 3] for start in range(len(padded) - 2))


def _likeness(word: str, others: set[str]) -> float:
    """Largest share of common letter triples with one of the others; 1 where it is among them."""
    if word in others:
        return 1.0
    own = _triples(word)
    return max((len(own & theirs) / len(own | theirs) for theirs in map(_triples, others)), default=0.0)


class EvidenceHead:
    """Reads evidence beside a labeller's answer.

    Args:
        num_texts: titles that the words were counted in.
        counts: of these, how many hold a word; one that is missing here is in none or one.
        centre: subtracted from the numbers, [F].
        scale: they are divided by it then, [F].
        exact: weights of P(grade 2 given grade >= 1), the constant last, [H + 1].
        relevant: weights of P(grade >= 1) for the answer's two logits and the cosine, the constant last, [4]; empty
            without an encoder: that probability stays the answer's.
        encoder: sentence-transformers folder whose cosine is a number too; empty for none.
    """

    def __init__(
        self,
        num_texts: int,
        counts: Mapping[str, int],
        centre: Sequence[float],
        scale: Sequence[float],
        exact: Sequence[float],
        relevant: Sequence[float] = (),
        encoder: str = "",
    ) -> None:
        self.num_texts, self.counts = num_texts, dict(counts)
        self.centre_F, self.scale_F = np.array(centre), np.array(scale)
        self.exact_H, self.relevant_4 = np.array(exact), np.array(relevant)
        self.encoder = encoder

    def numbers(self, queries: Sequence[str], products: Sequence[ProductFields]) -> NDArray[np.float64]:
        """The numbers named in EVIDENCE and, with an encoder, its cosine, [N, E]; 0 for likeness without words."""
        asked = [neutralise(query) for query in queries]
        found = [self._numbers(units(query), product) for query, product in zip(asked, products, strict=True)]
        number_NE = np.array(found, dtype=np.float64).reshape(-1, len(EVIDENCE))
        if not self.encoder or not asked:
            return number_NE
        return np.concatenate([number_NE, self._cosines(asked, products)[:, None]], axis=1)

    def numbers_of(self, rows: pa.Table) -> NDArray[np.float64]:
        """The numbers of rows with columns query and title and any other text column of a product, [N, E]."""
        return self.numbers(rows["query"].to_pylist(), products_of(rows))

    def __call__(self, answer_N3: NDArray[np.floating], number_NE: NDArray[np.floating]) -> NDArray[np.float64]:
        """Probabilities of the grades, [N, 3]; nan where the answer is."""
        standard_NF = (np.concatenate([_logits(answer_N3), number_NE], axis=1) - self.centre_F) / self.scale_F
        exact_N = _chance(_hinges(standard_NF), self.exact_H)
        relevant_N = 1 - answer_N3[:, 0].astype(np.float64)
        if self.relevant_4.size:
            relevant_N = _chance(_answer_and_last(standard_NF), self.relevant_4)
        return np.stack([1 - relevant_N, relevant_N * (1 - exact_N), relevant_N * exact_N], axis=1)

    @cached_property
    def _model(self) -> Any:
        from embeddings.encoder import load_encoder

        return load_encoder(self.encoder)[0]

    def _cosines(self, queries: Sequence[str], products: Sequence[ProductFields]) -> NDArray[np.float64]:
        """Cosine of each query with the product's title and brand, [N]."""
        from embeddings.labeller_baseline import pair_cosines

        texts = [product_text(product.title, product.brand, None, None, TextRecipe()) for product in products]
        return pair_cosines(list(queries), texts, self._model).astype(np.float64)

    def _numbers(self, asked: list[str], product: ProductFields) -> list[float]:
        title = units(product.title)
        first: dict[str, int] = {}
        for place, word in enumerate(title):
            first.setdefault(word, place)
        everywhere = {word for text in product for word in units(text)}
        known = set(first)
        likeness = [_likeness(word, known) for word in asked] or [0.0]
        rareness = [rarity(self.num_texts, self.counts.get(word, 0)) for word in asked] or [0.0]
        total = max(sum(rareness), _SMALLEST)
        places = [first[word] / len(title) for word in asked if word in first]
        return [
            min(likeness),
            sum(map(float.__mul__, likeness, rareness)) / total,
            likeness[-1],
            max(rareness),
            sum(rareness) / len(rareness),
            sum(places) / len(places) if places else -1.0,
            float(len(asked)),
            float(len(title)),
            sum(rare for word, rare in zip(asked, rareness, strict=False) if word in everywhere) / total,
        ]

    def text(self) -> str:
        """What the file holds that `load` reads; of an encoder, that there is one."""
        values = {
            "num_texts": self.num_texts,
            "counts": dict(sorted(self.counts.items())),
            "centre": self.centre_F.tolist(),
            "scale": self.scale_F.tolist(),
            "exact": self.exact_H.tolist(),
            "relevant": self.relevant_4.tolist(),
            "encoder": ENCODER_FOLDER if self.encoder else "",
        }
        return json.dumps(values, ensure_ascii=False) + "\n"

    @classmethod
    def load(cls, folder: str | Path) -> Self | None:
        """The head in a labeller's folder; None where it has none."""
        path = Path(folder, EVIDENCE_FILE)
        if not path.is_file():
            return None
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if values["encoder"]:
            values["encoder"] = str(Path(folder, values["encoder"]))
        return cls(**values)


def fit_evidence_head(
    counted: Sequence[str],
    rows: pa.Table,
    answer_N3: NDArray[np.floating],
    share_N2: NDArray[np.floating],
    weight_N: NDArray[np.floating],
    encoder: str = "",
) -> EvidenceHead | None:
    """The likeliest head by pairs that the labeller did not learn from, under a ridge.

    Args:
        counted: titles that words are counted in, each product's once.
        rows: pairs with columns query, title and the other texts of a product; with an encoder random ones among them,
            so that P(grade >= 1) learns no other rates than the labeller has.
        answer_N3: what the labeller answers to them, uncalibrated.
        share_N2: shares of raters at or above grades 1 and 2.
        weight_N: what each pair counts.
        encoder: sentence-transformers folder whose cosine is evidence too; empty for none.

    Returns:
        None where the weights sum to less than `PAIRS_FOR_HEAD`.
    """
    if weight_N.sum() < PAIRS_FOR_HEAD:
        return None
    counts = {word: n for word, n in Counter(w for text in counted for w in set(units(text))).items() if n > 1}
    head = EvidenceHead(len(counted), counts, [0.0], [1.0], [0.0], encoder=encoder)
    input_NF = np.concatenate([_logits(answer_N3), head.numbers_of(rows)], axis=1)
    centre_F, scale_F = input_NF.mean(axis=0), input_NF.std(axis=0) + _SMALLEST
    standard_NF = (input_NF - centre_F) / scale_F
    share_1_N, share_2_N = np.asarray(share_N2, dtype=np.float64).T
    exact_N = np.divide(share_2_N, share_1_N, out=np.zeros(len(share_1_N)), where=share_1_N > 0)
    exact = _fit(_hinges(standard_NF), exact_N, weight_N * share_1_N, _RIDGE)
    relevant = _fit(_answer_and_last(standard_NF), share_1_N, weight_N, _RIDGE_OF_RELEVANCE) if encoder else []
    place = ([_rounded(value) for value in centre_F], [_rounded(value) for value in scale_F])
    return EvidenceHead(len(counted), counts, *place, exact, relevant, encoder)


def _fit(
    input_NH: NDArray[np.float64], target_N: NDArray[np.float64], weight_N: NDArray[np.floating], ridge: float
) -> list[float]:
    """Weights of a logistic regression, the constant, which no ridge holds, last."""
    from scipy.optimize import minimize

    def loss(weight_H: NDArray[np.float64]) -> tuple[float, Any]:
        logit_N = input_NH @ weight_H[:-1] + weight_H[-1]
        value = (weight_N * (np.logaddexp(0, logit_N) - target_N * logit_N)).sum()
        slope_N = weight_N * (1 / (1 + np.exp(-logit_N)) - target_N)
        slope_H = np.append(slope_N @ input_NH + ridge * weight_H[:-1], slope_N.sum())
        return float(value + ridge * (weight_H[:-1] ** 2).sum() / 2), slope_H

    found = minimize(loss, np.zeros(input_NH.shape[1] + 1), jac=True, method="L-BFGS-B", options={"maxiter": 1000})
    return [_rounded(value) for value in found.x]


def _chance(input_NH: NDArray[np.float64], weight_H: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(1 / (1 + np.exp(-(input_NH @ weight_H[:-1] + weight_H[-1]))))


def _answer_and_last(standard_NF: NDArray[np.float64]) -> NDArray[np.float64]:
    """The answer's two logits and the last number, bounded, [N, 3]."""
    return np.clip(standard_NF[:, [0, 1, -1]], -_LIMIT, _LIMIT)


def _logits(answer_N3: NDArray[np.floating]) -> NDArray[np.float64]:
    """Of P(grade >= 1) and of P(grade 2 given grade >= 1), [N, 2]."""
    zero_N, one_N, two_N = np.maximum(answer_N3.astype(np.float64), _SMALLEST).T
    return np.stack([np.log((one_N + two_N) / zero_N), np.log(two_N / one_N)], axis=1)


def _hinges(standard_NF: NDArray[np.float64]) -> NDArray[np.float64]:
    """Each number, and how far it is above 0, above 1 and below -1: curves with three knots, [N, 4 F]."""
    bounded_NF = np.clip(standard_NF, -_LIMIT, _LIMIT)
    parts = (bounded_NF, np.maximum(bounded_NF, 0), np.maximum(bounded_NF - 1, 0), np.maximum(-1 - bounded_NF, 0))
    return np.concatenate(parts, axis=1)


def _rounded(value: float) -> float:
    """Six digits, so that a refit on the same pairs has the same file and the labeller the same fingerprint."""
    return float(f"{value:.6g}")
