"""What a labeller must beat: the commonest grade, and the cosine of a pretrained encoder with two thresholds."""

# N pairs, T thresholds

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer

from embeddings.encoder import encode
from embeddings.metrics import labeller_agreement

NUM_QUANTILES = 40
"""Thresholds tried per boundary."""


def majority_grades(train_grade_N: NDArray[np.integer], num_pairs: int) -> NDArray[np.int64]:
    """The commonest grade of the train pairs for every pair."""
    return np.full(num_pairs, np.bincount(train_grade_N, minlength=3).argmax())


def pair_cosines(queries: list[str], products: list[str], encoder: SentenceTransformer) -> NDArray[np.float32]:
    """Cosine of each query and product text under the encoder."""
    query_ND, product_ND = encode(encoder, queries, "query"), encode(encoder, products, "document")
    return np.asarray((query_ND * product_ND).sum(axis=1))


def fit_thresholds(cosine_N: NDArray[np.floating], grade_N: NDArray[np.integer]) -> tuple[float, float]:
    """The two cosines above which a pair is partial and exact, of best quadratic kappa among train quantiles."""
    cuts_T = np.quantile(cosine_N, np.linspace(0, 1, NUM_QUANTILES + 2)[1:-1])
    best, chosen = -2.0, (float(cuts_T[0]), float(cuts_T[-1]))
    for index, low in enumerate(cuts_T):
        for high in cuts_T[index:]:
            kappa = labeller_agreement(grade_N, threshold_grades(cosine_N, (low, high)))["quadratic_weighted_kappa"]
            if kappa > best:
                best, chosen = kappa, (float(low), float(high))
    return chosen


def threshold_grades(cosine_N: NDArray[np.floating], thresholds: tuple[float, float]) -> NDArray[np.int64]:
    """Grade of each cosine: the number of thresholds it reaches."""
    return np.searchsorted(np.array(thresholds), cosine_N, side="right").astype(np.int64)
