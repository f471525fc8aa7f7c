"""How near the vectors of a placement (int8, bfloat16, another device) come to the exact ones, and what that costs.

Q queries, P products, D width of a vector.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from embeddings.metrics import GAINS, ndcg

_DEPTH = 100


@dataclass(frozen=True)
class ParityReport:
    """A placement's vectors beside the exact ones of the same texts.

    Attributes:
        num_queries: that were compared.
        num_products: likewise.
        mean_cosine: of a text's two vectors, over queries and products.
        min_cosine: of the text that suffers most.
        max_score_error: largest difference of a query's score with a product.
        overlap_at_100: share of the exact first 100 products (all, where there are fewer) that the placement finds
            among its own first 100, mean over queries.
        ndcg_at_10: of the placement's ranking over the products; None without grades.
        exact_ndcg_at_10: of the exact vectors' ranking.
    """

    num_queries: int
    num_products: int
    mean_cosine: float
    min_cosine: float
    max_score_error: float
    overlap_at_100: float
    ndcg_at_10: float | None = None
    exact_ndcg_at_10: float | None = None

    @property
    def ndcg_loss(self) -> float | None:
        """Share of NDCG@10 that the placement loses, negative where it gains; None without grades."""
        if self.ndcg_at_10 is None or not self.exact_ndcg_at_10:
            return None
        return 1 - self.ndcg_at_10 / self.exact_ndcg_at_10


def compare_vectors(
    exact_QD: NDArray[np.float32],
    exact_PD: NDArray[np.float32],
    placed_QD: NDArray[np.float32],
    placed_PD: NDArray[np.float32],
    *,
    grades: Sequence[Mapping[int, int]] | None = None,
) -> ParityReport:
    """The report on normalised vectors of the same queries and products, ties in favour of the earlier product.

    Args:
        exact_QD: of the queries, by the float32 encoder.
        exact_PD: of the products.
        placed_QD: of the same queries, by the placement; normalised again, since it may round.
        placed_PD: of the same products.
        grades: per query, the grade (0, 1, 2) of its judged products by their row; others count as 0, and queries
            without a grade above 0 do not count.

    Raises:
        ValueError: no query, no product, other shapes, or grades of another number of queries.
    """
    if exact_QD.shape != placed_QD.shape or exact_PD.shape != placed_PD.shape or not len(exact_QD) * len(exact_PD):
        shapes = [vectors.shape for vectors in (exact_QD, exact_PD, placed_QD, placed_PD)]
        raise ValueError(f"parity: expected vectors of the same queries and products from both, got {shapes}")
    if grades is not None and len(grades) != len(exact_QD):
        raise ValueError(f"parity: expected the grades of {len(exact_QD)} queries, got {len(grades)}")
    exact_QD, exact_PD, placed_QD, placed_PD = map(_unit, (exact_QD, exact_PD, placed_QD, placed_PD))
    cosine = np.concatenate([(exact_QD * placed_QD).sum(axis=1), (exact_PD * placed_PD).sum(axis=1)])
    depth, error, overlap = min(_DEPTH, len(exact_PD)), 0.0, []
    ndcg_exact: list[float] = []
    ndcg_placed: list[float] = []
    for row in range(len(exact_QD)):
        exact_P, placed_P = exact_PD @ exact_QD[row], placed_PD @ placed_QD[row]
        error = max(error, float(np.abs(exact_P - placed_P).max()))
        exact_K, placed_K = (np.argsort(-score_P, kind="stable")[:depth] for score_P in (exact_P, placed_P))
        overlap.append(np.intersect1d(exact_K, placed_K).size / depth)
        graded = {} if grades is None else grades[row]
        ideal = [GAINS[grade] for grade in graded.values()]
        if max(ideal, default=0) > 0:
            for values, best_K in ((ndcg_exact, exact_K), (ndcg_placed, placed_K)):
                values.append(ndcg([GAINS[graded.get(int(product), 0)] for product in best_K[:10]], ideal, 10))
    return ParityReport(
        num_queries=len(exact_QD),
        num_products=len(exact_PD),
        mean_cosine=float(cosine.mean()),
        min_cosine=float(cosine.min()),
        max_score_error=error,
        overlap_at_100=float(np.mean(overlap)),
        ndcg_at_10=float(np.mean(ndcg_placed)) if ndcg_placed else None,
        exact_ndcg_at_10=float(np.mean(ndcg_exact)) if ndcg_exact else None,
    )


def _unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    norm = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / norm.clip(min=np.finfo(np.float32).tiny), dtype=np.float32)
