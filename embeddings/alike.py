"""Orders in which neighbours are alike, so that a step's other products are near misses and not strangers.

In a step of queries by chance, another query's products are easy to tell apart and teach little. Where its queries come
in groups of one corner of the space, they are hard negatives at no cost: nothing more is encoded.

Cites: Hofstaetter et al. 2021 (arXiv 2104.06967), topic-aware sampling; Morris and Rush 2024 (arXiv 2410.02525).
"""

# N rows, D their width

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

_BUCKET: Final = 4096
"""Rows among which companions are looked for; their similarities are held at once, 64 MiB."""
_ROUNDS: Final = 5
"""Of parting rows by the means of their halves: the edge comes to run where there are few."""


def alike_order(vector_ND: NDArray[np.float32], size: int, seed: int) -> NDArray[np.int64]:
    """A permutation of the rows whose runs of `size` are a row, drawn by chance, and its nearest that are left.

    More rows than fit a bucket are parted first, in halves of whole runs, by balanced 2-means from two rows drawn by
    chance. The runs come in random order; the last may be short.

    Args:
        vector_ND: normalised.
        size: rows of a run.
        seed: of all draws; equal vectors, size and seed give equal orders.
    """
    generator = np.random.default_rng(seed)
    runs = [
        run
        for bucket in _buckets(vector_ND, generator.permutation(len(vector_ND)), size, generator)
        for run in _runs(vector_ND, bucket, size)
    ]
    # a short run at the end shifts none
    short = [run for run in runs if len(run) < size]
    whole = [run for run in runs if len(run) == size]
    return np.concatenate([*(whole[place] for place in generator.permutation(len(whole))), *short])


def _buckets(
    vector_ND: NDArray[np.float32], rows: NDArray[np.int64], size: int, generator: np.random.Generator
) -> list[NDArray[np.int64]]:
    if len(rows) <= max(_BUCKET, size):
        return [rows]
    middle = len(rows) // size // 2 * size
    first, second = generator.choice(rows, 2, replace=False)
    apart_D = vector_ND[first] - vector_ND[second]
    for _ in range(_ROUNDS):
        nearer = rows[np.argsort(vector_ND[rows] @ apart_D, kind="stable")]
        apart_D = vector_ND[nearer[middle:]].mean(axis=0) - vector_ND[nearer[:middle]].mean(axis=0)
    return [
        bucket
        for half in (nearer[:middle], nearer[middle:])
        for bucket in _buckets(vector_ND, generator.permutation(half), size, generator)
    ]


def _runs(vector_ND: NDArray[np.float32], rows: NDArray[np.int64], size: int) -> list[NDArray[np.int64]]:
    """The bucket's rows, which come by chance, with their nearest."""
    similarity_BB = vector_ND[rows] @ vector_ND[rows].T
    is_left = np.ones(len(rows), dtype=bool)
    found = []
    for place in range(len(rows)):
        if is_left[place]:
            score = np.where(is_left, similarity_BB[place], -np.inf)
            score[place] = np.inf
            run = np.argsort(-score, kind="stable")[: min(size, is_left.sum())]
            is_left[run] = False
            found.append(rows[run])
    return found
