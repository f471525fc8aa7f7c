"""Exact top-k by inner product over shards of a catalogue, the same to the bit however it is sharded.

FAISS finds candidates fast, but its BLAS rounds differently with the size of batch and shard, and among equal
scores at the k-th place it keeps any. So each shard asks for more than k, scores the candidates again row by
row, and widens until nothing outside could still reach the first k. The price is k dot products per query in
numpy, small beside the shard's P in FAISS, and a wider search for the few queries whose k-th place is
crowded.

Imported by processes without torch: loading FAISS beside a CUDA build of torch can crash.
"""

# Q queries, P products of the shard, K found products, C candidates, D width

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import faiss
import numpy as np
from numpy.typing import NDArray

_SPARE: Final = 32
"""Candidates beyond k at first; enough for float32 rounding in catalogues up to some millions."""
_WIDEN: Final = 4
_MAX_CANDIDATES: Final = 1 << 20
"""Candidates held at once (some 40 MB): bounds memory where ties make a search as wide as the shard."""
_SCORE_ROWS: Final = 4096
_FLOAT32_UNIT: Final = 2.0**-24


class FlatShard:
    """Vectors of one shard of the catalogue and their rows in the whole of it."""

    def __init__(self, vector_PD: NDArray[np.float32], row_P: NDArray[np.int64]) -> None:
        """Copies the vectors into an index; both arrays can be dropped by the caller.

        Raises:
            ValueError: not a float32 matrix of finite values, or not one row number per vector.
        """
        _check_vectors("FlatShard", vector_PD)
        if row_P.shape != (len(vector_PD),):
            raise ValueError(f"FlatShard: expected {len(vector_PD)} row numbers, got shape {list(row_P.shape)}")
        self._index: Any = faiss.IndexFlatIP(vector_PD.shape[1])
        self._index.add(np.ascontiguousarray(vector_PD))
        # a view on the index's own memory: scoring needs no second copy of the vectors
        stored: NDArray[np.float32] = faiss.rev_swig_ptr(self._index.get_xb(), vector_PD.size)
        self._vector_PD = stored.reshape(len(vector_PD), vector_PD.shape[1])
        self._row_P = row_P.astype(np.int64)
        self._longest = float(np.sqrt(np.einsum("pd,pd->p", vector_PD, vector_PD, dtype=np.float64).max(initial=0.0)))

    def __len__(self) -> int:
        return len(self._row_P)

    def search(self, query_QD: NDArray[np.float32], k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """The best min(k, size of the shard) products of each query, equal scores by ascending row.

        A score is the float64 inner product rounded once to float32: it depends on the two vectors alone.

        Returns:
            score_QK float32 and row_QK int64.

        Raises:
            ValueError: queries are not finite float32 of the shard's width, or k is below 1.
        """
        _check_vectors("FlatShard.search", query_QD)
        if query_QD.shape[1] != self._vector_PD.shape[1] or k < 1:
            raise ValueError(
                f"FlatShard.search: expected k >= 1 and queries of width {self._vector_PD.shape[1]}, "
                f"got k={k} and width {query_QD.shape[1]}"
            )
        depth = min(k, len(self))
        score_QK = np.empty((len(query_QD), depth), dtype=np.float32)
        row_QK = np.empty((len(query_QD), depth), dtype=np.int64)
        pending, width = np.arange(len(query_QD) if depth else 0), min(len(self), depth + _SPARE)
        while pending.size:
            num_blocks = min(pending.size, -(-pending.size * width // _MAX_CANDIDATES))
            unsettled = []
            for block in np.array_split(pending, num_blocks):
                score_QK[block], row_QK[block], settled = self._attempt(query_QD[block], depth, width=width)
                unsettled.append(block[~settled])
            pending, width = np.concatenate(unsettled), min(len(self), width * _WIDEN)
        return score_QK, row_QK

    def _attempt(
        self, query_QD: NDArray[np.float32], depth: int, *, width: int
    ) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.bool_]]:
        """The first `depth` among `width` candidates of each query, and whether they surely are the first."""
        near_QC, position_QC = self._index.search(np.ascontiguousarray(query_QD), width)
        score_QC = np.stack([self._score(*pair) for pair in zip(query_QD, position_QC, strict=True)])
        score_QK, row_QK = _best(score_QC, self._row_P[position_QC], depth)
        # what FAISS left out scores at most near[-1] plus rounding; from the k-th score on, look further
        reach_Q = near_QC[:, -1].astype(np.float64) + self._rounding(query_QD)
        settled_Q = (reach_Q < score_QK[:, -1]) | (width == len(self))
        return score_QK, row_QK, settled_Q

    def _score(self, query_D: NDArray[np.float32], position_C: NDArray[np.int64]) -> NDArray[np.float32]:
        """Inner products by row: products of float32 are exact in float64, their sum is rounded once."""
        parts = [position_C[at : at + _SCORE_ROWS] for at in range(0, position_C.size, _SCORE_ROWS)]
        sums = [np.multiply(self._vector_PD[part], query_D, dtype=np.float64).sum(axis=1) for part in parts]
        score_C: NDArray[np.float32] = np.concatenate(sums).astype(np.float32)
        return score_C

    def _rounding(self, query_QD: NDArray[np.float32]) -> NDArray[np.float64]:
        """Bound on the error of float32 inner products in any order of summation (Higham 2002, s. 3.1)."""
        width = query_QD.shape[1]
        length_Q = np.linalg.norm(query_QD.astype(np.float64), axis=1)
        underflow = width * float(np.finfo(np.float32).smallest_subnormal)
        relative = 1.01 * (width + 2) * _FLOAT32_UNIT
        bound_Q: NDArray[np.float64] = relative * length_Q * self._longest + underflow
        return bound_Q


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
    return _best(np.concatenate(scores, axis=1), np.concatenate(rows, axis=1), k)


def _best(score: NDArray[np.float32], row: NDArray[np.int64], k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The first k along the last axis by descending score, then ascending row."""
    order = np.lexsort((row, -score), axis=-1)[..., :k]
    return np.take_along_axis(score, order, axis=-1), np.take_along_axis(row, order, axis=-1)


def _check_vectors(where: str, vectors: NDArray[np.float32]) -> None:
    if vectors.ndim != 2 or vectors.dtype != np.float32 or not np.isfinite(vectors).all():
        raise ValueError(
            f"{where}: expected a matrix of finite float32 vectors, got {vectors.dtype} of shape "
            f"{list(vectors.shape)}; check the encoder's output"
        )
