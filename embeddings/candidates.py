"""Which queries a product may answer, before any judge is asked: by words, by an encoder, by what shoppers did.

And which of those pairs to grade first, where a budget ends before they do: a grade is worth as much as the query's
searches that the product stands a chance to be shown in.
"""

# Q queries, P products, N candidate pairs, J judged pairs, D width of a vector

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray

from conf.load import meaning, settings
from embeddings.lexical import WordWeights, word_set

BLOCK_ROWS = 1024
MIN_JUDGED = 200
"""Judged pairs from which on the chance of relevance is learned from them."""
SOURCES = ("engagement", "lexical", "embedding")


@settings
class CandidateRecipe:
    """How many queries are tried per product, by each way of finding them."""

    lexical_per_product: Annotated[int, meaning("queries by shared words", "queries", ge=0)] = 5
    embedding_per_product: Annotated[int, meaning("queries by the encoder's cosine", "queries", ge=0)] = 5
    engaged_per_product: Annotated[int, meaning("queries under which shoppers saw it most", "queries", ge=0)] = 10
    products_per_new_query: Annotated[
        int, meaning("products tried for a query that is new, by words and by cosine each", "products", ge=0)
    ] = 20
    min_coverage: Annotated[
        float,
        meaning("weighted share of the query's words that the product must hold to be found by words", ge=0, le=1),
    ] = 0.5


Pairs = tuple[NDArray[np.int64], NDArray[np.int64]]
"""Rows of the queries and of the products of pairs, [N] each."""


def nearest(of_AD: NDArray[np.float32], among_BD: NDArray[np.float32], k: int) -> Pairs:
    """The k rows of `among_BD` with the largest inner product, for each of `of_AD`: rows of the two, A x k pairs."""
    k = min(k, len(among_BD))
    if not k or not len(of_AD):
        return _none()
    found = []
    for start in range(0, len(of_AD), BLOCK_ROWS):
        score_AB = of_AD[start : start + BLOCK_ROWS] @ among_BD.T
        found.append(np.argpartition(-score_AB, k - 1, axis=1)[:, :k])
    return np.repeat(np.arange(len(of_AD)), k), np.concatenate(found).ravel().astype(np.int64)


class WordMatcher:
    """Queries and product texts by the words they share, weighted by how rare the words are among the products.

    Args:
        queries: texts.
        products: texts.
    """

    def __init__(self, queries: Sequence[str], products: Sequence[str]) -> None:
        weights = WordWeights(products)
        asked, held = [word_set(text) for text in queries], [word_set(text) for text in products]
        place = {word: number for number, word in enumerate(sorted(set().union(*asked)))}
        self._query_QW = _sparse(asked, place, weights)
        self._product_PW = _sparse([words & place.keys() for words in held], place, None)

    def queries_of(self, products: NDArray[np.int64], k: int, min_coverage: float) -> Pairs:
        """The k queries best covered by each of the products: rows of queries and products."""
        product_N, query_N = _best_rows(self._product_PW[products], self._query_QW, k, min_coverage)
        return query_N, products[product_N]

    def products_of(self, queries: NDArray[np.int64], k: int, min_coverage: float) -> Pairs:
        """The k products that cover each of the queries best."""
        query_N, product_N = _best_rows(self._query_QW[queries], self._product_PW, k, min_coverage)
        return queries[query_N], product_N

    def coverage(self, query_N: NDArray[np.int64], product_N: NDArray[np.int64]) -> NDArray[np.float64]:
        """Weighted share of the query's words that the product holds, of pairs, in [0, 1]."""
        coverage_N = np.empty(len(query_N))
        for start in range(0, len(query_N), BLOCK_ROWS):
            rows = slice(start, start + BLOCK_ROWS)
            shared = self._query_QW[query_N[rows]].multiply(self._product_PW[product_N[rows]])
            coverage_N[rows] = np.asarray(shared.sum(axis=1)).ravel()
        return coverage_N


def _sparse(word_sets: Sequence[frozenset[str]], place: dict[str, int], weights: WordWeights | None) -> Any:
    """Rows of word sets; with weights each row sums to 1, without its words are 1."""
    from scipy.sparse import csr_array

    indices, data, ends = [], [], [0]
    for words in word_sets:
        ordered = sorted(words)
        weight = [weights[word] if weights else 1.0 for word in ordered]
        total = sum(weight)
        if total:
            indices += [place[word] for word in ordered]
            data += [value / total for value in weight] if weights else weight
        ends.append(len(indices))
    return csr_array((data, indices, ends), shape=(len(word_sets), len(place)))


def _best_rows(of_AW: Any, among_BW: Any, k: int, least: float) -> Pairs:
    """Per row of the first matrix the k rows of the second with the largest product, none below `least` or at 0."""
    others_WB, left, right = among_BW.T.tocsr(), [], []
    for start in range(0, of_AW.shape[0] if k else 0, BLOCK_ROWS):
        score_AB = (of_AW[start : start + BLOCK_ROWS] @ others_WB).tocsr()
        for row in range(score_AB.shape[0]):
            span = slice(score_AB.indptr[row], score_AB.indptr[row + 1])
            value, column = score_AB.data[span], score_AB.indices[span]
            kept = (value >= least - 1e-9) & (value > 0)
            value, column = value[kept], column[kept]
            best = np.lexsort((column, -value))[:k]
            left.append(np.full(len(best), start + row))
            right.append(column[best])
    if not left:
        return _none()
    return np.concatenate(left).astype(np.int64), np.concatenate(right).astype(np.int64)


@dataclass(frozen=True)
class RelevancePrior:
    """Chance that a pair is relevant, before a judge has seen it: a logistic curve of its cosine and coverage.

    Attributes:
        weights: of cosine and coverage.
        bias: of the logit.
        num_judged: pairs it was fitted on; 0: the plain default.
    """

    weights: tuple[float, float] = (4.0, 4.0)
    bias: float = -4.0
    num_judged: int = 0

    def __call__(self, cosine_N: NDArray[np.floating], coverage_N: NDArray[np.floating]) -> NDArray[np.float64]:
        """Probabilities of grade 1 or 2, [N]."""
        logit_N = self.weights[0] * cosine_N + self.weights[1] * coverage_N + self.bias
        return np.asarray(1 / (1 + np.exp(-logit_N)), dtype=np.float64)


def fit_prior(
    cosine_J: NDArray[np.floating], coverage_J: NDArray[np.floating], is_relevant_J: NDArray[np.bool_]
) -> RelevancePrior:
    """The prior that judged pairs teach; the default where they are too few or all alike."""
    if len(is_relevant_J) < MIN_JUDGED or is_relevant_J.all() or not is_relevant_J.any():
        return RelevancePrior()
    from sklearn.linear_model import LogisticRegression

    fitted = LogisticRegression().fit(np.stack([cosine_J, coverage_J], axis=1), is_relevant_J)
    cosine, coverage = map(float, fitted.coef_[0])
    return RelevancePrior((cosine, coverage), float(fitted.intercept_[0]), len(is_relevant_J))


def union(found: Sequence[tuple[str, Pairs]], num_products: int) -> tuple[Pairs, list[list[str]]]:
    """Pairs of several sources, each once, in the order of their rows, with the sources that found it.

    Args:
        found: source and its pairs.
        num_products: rows of products are below this.
    """
    keys = [query_N * num_products + product_N for _, (query_N, product_N) in found]
    every = np.unique(np.concatenate([np.empty(0, np.int64), *keys]))
    sources: list[list[str]] = [[] for _ in every]
    for name in SOURCES:
        own = [key for (source, _), key in zip(found, keys, strict=True) if source == name]
        for place in np.flatnonzero(np.isin(every, np.concatenate([np.empty(0, np.int64), *own]))):
            sources[place].append(name)
    return (every // num_products, every % num_products), sources


def _none() -> Pairs:
    return np.empty(0, np.int64), np.empty(0, np.int64)
