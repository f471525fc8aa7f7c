"""Exact nearest products over sharded vectors: FAISS shards in Ray actors, queries fanned out, results merged.

The processes that import FAISS never import torch (loading both can crash), hence vectors come from files and even
the merge runs in the actors. What is found is the same to the bit for any number of shards and actors.

Q queries, P products, K found products, D width of a vector.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import ray
from numpy.typing import NDArray

from embeddings.shards import Shard, shard_of_rows
from ray_apps.cluster import check_resources

log = logging.getLogger(__name__)

_BLOCK_QUERIES = 1024
"""Queries of one remote call: 1.5 MB at width 384, and a line of progress every few seconds."""


@dataclass(frozen=True)
class Search:
    """Queries to be looked up in one catalogue.

    Attributes:
        shards: files of the catalogue's vectors.
        query_QD: query vectors, float32.
        is_kept_P: which catalogue rows may be found; None takes all.
    """

    shards: Sequence[Shard]
    query_QD: NDArray[np.float32]
    is_kept_P: NDArray[np.bool_] | None = None


class Neighbours(NamedTuple):
    """The best products of each query, best first; equal scores by ascending row. K may be below what was asked."""

    score_QK: NDArray[np.float32]
    row_QK: NDArray[np.int64]
    shard_QK: NDArray[np.int64]


def mine(searches: Sequence[Search], k: int, *, num_actors: int, threads_per_actor: int) -> list[Neighbours]:
    """The k nearest products of every query, one search after the other over the same actors.

    Args:
        searches: catalogues and their queries.
        k: products per query.
        num_actors: at most; an actor holds one or more shards.
        threads_per_actor: CPUs and FAISS threads of an actor.
    """
    size = min(num_actors, max(len(search.shards) for search in searches))
    check_resources(size * threads_per_actor)
    remote = ray.remote(_ShardHolder)
    actors = [remote.options(num_cpus=threads_per_actor).remote(threads_per_actor) for _ in range(size)]
    try:
        return [_search(actors, search, k) for search in searches]
    finally:
        for actor in actors:
            ray.kill(actor)


def _search(actors: Sequence[Any], search: Search, k: int) -> Neighbours:
    num_bytes = sum(shard.vectors().nbytes for shard in search.shards) + 12 * k * len(search.query_QD)
    log.info(
        "mine: %d queries over %d products in %d shards, about %d MB",
        len(search.query_QD),
        sum(shard.num_rows for shard in search.shards),
        len(search.shards),
        num_bytes // 1_000_000,
    )
    holders = actors[: len(search.shards)]
    loaded = []
    for number, holder in enumerate(holders):
        own = list(search.shards[number :: len(holders)])
        kept = [
            None if search.is_kept_P is None else search.is_kept_P[shard.first_row : shard.first_row + shard.num_rows]
            for shard in own
        ]
        loaded.append(holder.load.remote(own, kept))
    ray.get(loaded)
    merged = []
    for number, start in enumerate(range(0, len(search.query_QD), _BLOCK_QUERIES)):
        block = ray.put(search.query_QD[start : start + _BLOCK_QUERIES])
        found = [holder.search.remote(block, k) for holder in holders]
        merged.append(holders[number % len(holders)].merge.remote(k, *found))
    started, parts = time.monotonic(), []
    for number, reference in enumerate(merged, start=1):
        parts.append(ray.get(reference))
        log.info("mine: block %d of %d, %.1f s", number, len(merged), time.monotonic() - started)
    score_QK, row_QK = (np.concatenate([part[side] for part in parts]) for side in (0, 1))
    return Neighbours(score_QK, row_QK, shard_of_rows(search.shards, row_QK))


class _ShardHolder:
    """Actor that holds FAISS indexes of its shards."""

    def __init__(self, threads: int) -> None:
        import faiss

        faiss.omp_set_num_threads(threads)
        self._indexes: list[Any] = []

    def load(self, shards: Sequence[Shard], kept: Sequence[NDArray[np.bool_] | None]) -> None:
        """Takes these shards in place of the former ones."""
        from embeddings.ann import FlatShard

        self._indexes = []
        for shard, is_kept in zip(shards, kept, strict=True):
            row_P = np.arange(shard.first_row, shard.first_row + shard.num_rows)
            vector_PD = shard.vectors()
            if is_kept is not None:
                row_P, vector_PD = row_P[is_kept], vector_PD[is_kept]
            self._indexes.append(FlatShard(np.asarray(vector_PD), row_P))

    def search(self, query_QD: NDArray[np.float32], k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """The best k among the actor's own products."""
        return self.merge(k, *(index.search(query_QD, k) for index in self._indexes))

    def merge(
        self, k: int, *found: tuple[NDArray[np.float32], NDArray[np.int64]]
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """The best k of several results for the same queries."""
        from embeddings.ann import merge_topk

        return merge_topk([score for score, _ in found], [row for _, row in found], k)
