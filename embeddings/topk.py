"""The first k of scored rows, ties by ascending row; results of shards merged into one.

Q queries, K found products, D width of a vector.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def best(score: NDArray[np.float32], row: NDArray[np.int64], k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The first k along the last axis by descending score, then ascending row."""
    order = np.lexsort((row, -score), axis=-1)[..., :k]
    return np.take_along_axis(score, order, axis=-1), np.take_along_axis(row, order, axis=-1)


def merge_topk(
    scores: Sequence[NDArray[np.float32]], rows: Sequence[NDArray[np.int64]], k: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The best k of several shards' results for the same queries; equal scores by ascending row.

    Exact when each shard gave its own best k (or all it has), and then the same for any sharding.

    Returns:
        score_QK float32 and row_QK int64, with fewer columns where the shards together have fewer than k.

    Raises:
        ValueError: no shards, or scores and rows do not match.
    """
    if not scores or [score.shape for score in scores] != [row.shape for row in rows]:
        raise ValueError("merge_topk: expected scores and rows of at least one shard in matching shapes")
    return best(np.concatenate(scores, axis=1), np.concatenate(rows, axis=1), k)


def check_vectors(where: str, vectors: NDArray[np.float32]) -> None:
    """Refuses what is no matrix of finite float32 vectors.

    Raises:
        ValueError: naming `where`, what was expected and what came.
    """
    if vectors.ndim != 2 or vectors.dtype != np.float32 or not np.isfinite(vectors).all():
        raise ValueError(
            f"{where}: expected a matrix of finite float32 vectors, got {vectors.dtype} of shape "
            f"{list(vectors.shape)}; check the encoder's output"
        )
