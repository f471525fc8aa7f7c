"""Nearest products over a catalogue's vectors: parts of it times blocks of queries, over a pool of Ray actors.

Vectors are files, so any actor can do any piece of work: an actor stays with the part that its memory holds already, a
piece whose actor died or lags behind goes to another, and blocks of queries that are done are kept for a run that goes
on. What is found is exact and the same to the bit, whatever the number of parts, blocks and actors
(`embeddings.exact`), or what an index of each part names (`embeddings.ann`), whose recall is then measured on a sample.
Actors import torch or FAISS, never both, since loading both can crash.

Q queries, B queries of a block, P products, K found products, D width of a vector.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import ray
from numpy.typing import NDArray
from ray.exceptions import ObjectLostError, RayActorError

from embeddings.exact_size import exact_search_bytes
from embeddings.index_recipe import TRAINED, IndexRecipe, part_file
from embeddings.sampling import evenly_spread
from embeddings.topk import merge_topk
from embeddings.vectors import CatalogVectors
from lake.progress import write_progress
from lake.storage import atomic_file, check_space
from ray_apps.cluster import check_memory, check_resources

log = logging.getLogger(__name__)

_PART_ROWS: Final = 1_000_000
"""Rows of a part: 770 MB of float16 at width 384, which page caches of small nodes hold."""
_BLOCK_QUERIES: Final = 8_192
"""Queries of a block at most, for which a part's tiles are read and converted once."""
_LEAST_BLOCK: Final = 2_048
_MOST_LOSSES: Final = 20
"""Actors lost in one search, after which it ends: something kills them all."""
_LATE: Final = 2.0
"""A piece of work that takes so many times the mean is given to an idle actor as well."""
_LATE_SEC: Final = 10.0
_TORCH_BYTES: Final = 350_000_000
"""Memory of an actor that has loaded torch, before it searches: 339 MB measured, on a CPU."""
_FAISS_BYTES: Final = 80_000_000
"""Memory of an actor that has loaded FAISS, before it searches: 77 MB measured."""
_FOUND_BYTES: Final = 12
"""Of a neighbour: score and row."""
_PROBED_QUERIES: Final = 200
"""Queries on which the recall of an index is measured."""


@dataclass(frozen=True)
class Search:
    """Queries to be looked up in one catalogue.

    Attributes:
        vectors: of the catalogue.
        query_QD: query vectors, float32.
        is_kept_P: which catalogue rows may be found; None takes all.
        index: kind of search.
        index_folder: where files of an index are kept from run to run, those of the newest catalogue.
    """

    vectors: CatalogVectors
    query_QD: NDArray[np.float32]
    is_kept_P: NDArray[np.bool_] | None = None
    index: IndexRecipe = field(default_factory=IndexRecipe)
    index_folder: str = ""

    def rows(self) -> NDArray[np.int64]:
        """Rows that may be found, as they lie on disk."""
        kept = np.arange(len(self.vectors)) if self.is_kept_P is None else np.flatnonzero(self.is_kept_P)
        return self.vectors.in_file_order(kept)

    @property
    def num_scores(self) -> int:
        """Inner products that it takes."""
        return len(self.query_QD) * (len(self.vectors) if self.is_kept_P is None else int(self.is_kept_P.sum()))


class Neighbours(NamedTuple):
    """The best products of each query, best first; equal scores by ascending row. K may be below what was asked.

    Where an index named fewer products, the last places have score -inf and row 0. `recall` is the share of the exact
    neighbours that were found, on a sample of queries.
    """

    score_QK: NDArray[np.float32]
    row_QK: NDArray[np.int64]
    recall: float = 1.0


def mine(
    searches: Sequence[Search],
    k: int,
    *,
    num_actors: int,
    threads_per_actor: int,
    use_gpu: bool = False,
    own_scores: float = 0.0,
    run_folder: str = "",
) -> list[Neighbours]:
    """The k nearest products of every query, one search after the other over the same actors.

    Args:
        searches: catalogues and their queries.
        k: products per query.
        num_actors: at most.
        threads_per_actor: CPUs and threads of an actor.
        use_gpu: gives each actor a GPU.
        own_scores: searches of up to so many inner products in all are done in this process, unless a GPU is wanted.
        run_folder: keeps finished blocks of queries for a run that goes on, and its progress; empty: neither.

    Raises:
        ConfigError: the cluster has not the CPUs, GPUs or memory.
        RuntimeError: actors die again and again.
    """
    is_exact = all(search.index.kind == "exact" for search in searches)
    if is_exact and not use_gpu and sum(search.num_scores for search in searches) <= own_scores:
        return [_search_here(search, k, num_actors * threads_per_actor) for search in searches]
    jobs = [SearchJob(search, k, num_actors, run_folder) for search in searches]
    # an index is measured in any case
    size = min(num_actors, max(max(len(job.waiting), int(job.uses_index)) for job in jobs))
    if size:
        for uses_index in {job.uses_index for job in jobs}:
            own = [job for job in jobs if job.uses_index == uses_index]
            most = max(job.num_bytes for job in own)
            with SearchPool(size, threads_per_actor, use_gpu=use_gpu, num_bytes=most, uses_index=uses_index) as pool:
                for job in own:
                    pool.run(job)
    return [job.neighbours() for job in jobs]


def actor_bytes(num_queries: int, num_products: int, num_searched: int, width: int, k: int, index: IndexRecipe) -> int:
    """Memory of a search actor on CPUs at most, in bytes, beside the mapped files of vectors and libraries.

    Args:
        num_queries: to be looked up.
        num_products: of the catalogue.
        num_searched: of them that may be found.
        width: of a vector.
        k: products per query.
        index: that of a part is held as well.
    """
    of_index = index.num_bytes(-(-num_searched // _num_parts(num_searched)), width)
    of_library = _TORCH_BYTES if index.kind == "exact" else _FAISS_BYTES
    of_search = exact_search_bytes(width, min(num_queries, _BLOCK_QUERIES), k)
    # where each row of the catalogue lies: in Ray's store, once per node
    return of_library + of_search + 8 * num_products + of_index


def found_bytes(num_queries: int, k: int) -> int:
    """What the neighbours of finished queries take of the disk, until the run ends."""
    return num_queries * k * _FOUND_BYTES


def _num_parts(num_rows: int) -> int:
    return max(1, -(-num_rows // _PART_ROWS))


def drop_kept(run_folder: str) -> None:
    """Removes what searches of a run kept, once the run needs it no more."""
    shutil.rmtree(_kept_folder(run_folder), ignore_errors=True)


def _kept_folder(run_folder: str) -> Path:
    return Path(run_folder, "neighbours")


def _search_here(search: Search, k: int, threads: int) -> Neighbours:
    """The search in this process, whose number of threads stays."""
    from embeddings.exact import ExactSearch
    from embeddings.lanes import torch_threads

    with torch_threads(threads):
        return Neighbours(*ExactSearch(search.vectors, search.rows()).search(search.query_QD, k))


def _print_of(facts: tuple[object, ...], *arrays: NDArray[Any]) -> str:
    """16 hex digits over facts and arrays."""
    digest = hashlib.sha256(repr(facts).encode())
    for array in arrays:
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()[:16]


class _Piece(NamedTuple):
    """A part of the catalogue for a block of queries."""

    part: int
    block: int


class SearchJob:
    """One search, cut into pieces, and what is done of it.

    Args:
        search: what is looked up.
        k: products per query.
        num_actors: that will share it.
        run_folder: keeps finished blocks of queries; empty keeps none.
    """

    def __init__(self, search: Search, k: int, num_actors: int, run_folder: str) -> None:
        self.search, self.k, self.run_folder = search, k, run_folder
        rows, num_queries = search.rows(), len(search.query_QD)
        self.parts = np.array_split(rows, _num_parts(len(rows)))
        wanted = min(-(-num_actors // len(self.parts)), -(-num_queries // _LEAST_BLOCK))
        count = max(1, wanted, -(-num_queries // _BLOCK_QUERIES))
        bounds = [num_queries * number // count for number in range(count + 1)]
        self.blocks = [slice(*pair) for pair in itertools.pairwise(bounds)]
        vectors = search.vectors
        catalog = _print_of(vectors.paths, rows, vectors.file_P, vectors.place_P)
        self.uses_index = search.index.kind != "exact"
        if self.uses_index and not search.index_folder:
            raise ValueError("SearchJob: an index needs index_folder, where its files are kept")
        self.index_folder = Path(search.index_folder, _print_of((catalog, search.index.built_by)))
        of_job = _print_of((catalog, k, count, search.index), search.query_QD)
        self._folder = _kept_folder(run_folder) / of_job if run_folder else None
        self.recall = 1.0
        self._found: dict[int, Neighbours] = {}
        self._left = dict.fromkeys(range(count), len(self.parts))
        for block in self._left:
            kept = self._kept(block)
            if kept is not None:
                self._found[block], self._left[block] = kept, 0
        # part by part, so that an actor reads its part once for all blocks
        numbers = range(len(self.parts))
        self.waiting = [_Piece(part, block) for part in numbers for block, left in self._left.items() if left]
        self._done: set[_Piece] = set()
        self.total = len(self.waiting)

    @property
    def num_bytes(self) -> int:
        """Memory of an actor at most, in bytes, beside the mapped files."""
        most = max(block.stop - block.start for block in self.blocks)
        search, searched = self.search, sum(len(part) for part in self.parts)
        return actor_bytes(most, len(search.vectors), searched, search.query_QD.shape[1], self.k, search.index)

    def check_space(self) -> None:
        """Looks whether the disk has room for what is still to be written.

        Raises:
            LakeError: it has less.
        """
        index, width = self.search.index, self.search.query_QD.shape[1]
        if self.uses_index:
            sizes = [len(part) for number, part in enumerate(self.parts) if not self._has_index(number)]
            check_space(self.index_folder, sum(index.num_bytes(size, width) for size in sizes), "index files")
        if self._folder is not None:
            rows = sum(self.blocks[block].stop - self.blocks[block].start for block, left in self._left.items() if left)
            check_space(self._folder, found_bytes(rows, self.k), "neighbours of finished queries")

    @property
    def is_done(self) -> bool:
        """Whether all blocks are found."""
        return not any(self._left.values())

    @property
    def num_done(self) -> int:
        """Pieces of work done."""
        return len(self._done)

    def is_piece_done(self, piece: _Piece) -> bool:
        """Whether another actor was sooner."""
        return piece in self._done

    def take(self, piece: _Piece, found: Neighbours) -> None:
        """Merges what a piece of work found into its block, and keeps the block where it is the last."""
        if piece in self._done:
            return
        self._done.add(piece)
        before = self._found.get(piece.block)
        if before is not None:
            merged = merge_topk([before.score_QK, found.score_QK], [before.row_QK, found.row_QK], self.k)
            found = Neighbours(*merged)
        self._found[piece.block] = found
        self._left[piece.block] -= 1
        if not self._left[piece.block]:
            self._keep(piece.block, found)

    def neighbours(self) -> Neighbours:
        """All blocks, in the order of the queries."""
        found = [self._found[block] for block in sorted(self._found)]
        score_QK, row_QK = (np.concatenate([part[side] for part in found]) for side in (0, 1))
        return Neighbours(score_QK, np.where(np.isneginf(score_QK), 0, row_QK), self.recall)

    def measure(self, exact: Neighbours, sample: NDArray[np.int64]) -> None:
        """Notes the recall by the exact neighbours of a sample of queries."""
        found = self.neighbours().row_QK[sample]
        both = sum(np.intersect1d(*pair).size for pair in zip(found, exact.row_QK, strict=True))
        self.recall = both / max(1, exact.row_QK.size)

    def _has_index(self, part: int) -> bool:
        return Path(self.index_folder, part_file(part)).is_file()

    def _kept(self, block: int) -> Neighbours | None:
        if self._folder is None or not (path := self._path(block)).is_file():
            return None
        with np.load(path, allow_pickle=False) as arrays:
            return Neighbours(arrays["score_QK"], arrays["row_QK"])

    def _keep(self, block: int, found: Neighbours) -> None:
        if self._folder is None:
            return
        with atomic_file(self._path(block)) as fresh:
            np.savez(fresh, score_QK=found.score_QK, row_QK=found.row_QK)

    def _path(self, block: int) -> Path:
        return Path(str(self._folder), f"block-{block:05d}-of-{len(self.blocks):05d}.npz")


@dataclass
class _Member:
    """An actor, the part that it read last, and the piece of work it is at."""

    actor: Any
    part: int | None = None
    piece: _Piece | None = None
    since: float = 0.0


@dataclass
class _Given:
    """References of a job's arrays in Ray's store, put there once."""

    vectors: Any
    parts: list[Any]
    blocks: dict[int, Any] = field(default_factory=dict)


class SearchPool:
    """Actors that search, replaced where they die; ended with the context.

    Args:
        size: number of actors.
        threads: CPUs and threads of each.
        use_gpu: gives each a GPU.
        num_bytes: memory of each, for which Ray looks for a node.
        uses_index: its jobs search an index, by FAISS.

    Raises:
        ConfigError: the cluster has not the CPUs, GPUs or memory.
    """

    def __init__(
        self, size: int, threads: int, *, use_gpu: bool = False, num_bytes: int = 0, uses_index: bool = False
    ) -> None:
        check_resources(size * threads, size * int(use_gpu))
        check_memory(num_bytes, "a search actor")
        self._threads, self._device = threads, "cuda" if use_gpu and not uses_index else "cpu"
        self._uses_index = uses_index
        self._options = ray.remote(_Searcher).options(
            num_cpus=threads, num_gpus=int(use_gpu), memory=num_bytes, scheduling_strategy="SPREAD"
        )
        self._members = [self._start() for _ in range(size)]
        self._losses = 0

    def run(self, job: SearchJob) -> None:
        """Does all pieces of a job."""
        log.info(
            "mine: %d queries over %d products (%d MB of vectors), %d parts times %d blocks, %d of %d pieces to do, "
            "%d actors of %d MB",
            len(job.search.query_QD),
            sum(len(part) for part in job.parts),
            job.search.vectors.num_bytes // 1_000_000,
            len(job.parts),
            len(job.blocks),
            len(job.waiting),
            len(job.parts) * len(job.blocks),
            len(self._members),
            job.num_bytes // 1_000_000,
        )
        job.check_space()
        given = _Given(ray.put(job.search.vectors), [ray.put(part) for part in job.parts])
        if job.uses_index:
            self._train(job, given)
        running: dict[Any, _Member] = {}
        started = time.monotonic()
        seconds: list[float] = []
        while not job.is_done:
            for member in self._members:
                if member.piece is None:
                    piece = self._next(job, member, seconds)
                    if piece is not None:
                        running[self._give(job, given, member, piece)] = member
            ready, _ = ray.wait(list(running), num_returns=1, timeout=_LATE_SEC)
            for reference in ready:
                member = running.pop(reference)
                piece, member.piece = member.piece, None
                try:
                    found = ray.get(reference)
                except (RayActorError, ObjectLostError) as error:
                    # what an actor found is lost with its node even after it was done
                    self._replace(job, member, piece, error)
                    continue
                seconds.append(time.monotonic() - member.since)
                if piece is not None:
                    job.take(piece, Neighbours(*found))
                self._tell(job, started)
        # late twins of finished pieces are not waited for
        for member in running.values():
            ray.kill(member.actor)
            member.actor, member.piece, member.part = self._start().actor, None, None
        if job.uses_index:
            self._probe(job, given)

    def __enter__(self) -> SearchPool:
        return self

    def __exit__(self, *error: object) -> None:
        for member in self._members:
            ray.kill(member.actor)

    def _start(self) -> _Member:
        return _Member(self._options.remote(self._threads, self._device, uses_index=self._uses_index))

    def _next(self, job: SearchJob, member: _Member, seconds: Sequence[float]) -> _Piece | None:
        """The next piece of the part that the actor has read, else of another; at the end a late one of others."""
        if job.waiting:
            own = (at for at, piece in enumerate(job.waiting) if piece.part == member.part)
            return job.waiting.pop(next(own, 0))
        if not seconds:
            return None
        bound = max(_LATE_SEC, _LATE * float(np.mean(seconds)))
        at_work = [other for other in self._members if other.piece is not None]
        pieces = [other.piece for other in at_work]
        late = [other for other in at_work if time.monotonic() - other.since > bound and pieces.count(other.piece) == 1]
        return min(late, key=lambda other: other.since).piece if late else None

    def _give(self, job: SearchJob, given: _Given, member: _Member, piece: _Piece) -> Any:
        if piece.block not in given.blocks:
            given.blocks[piece.block] = ray.put(np.ascontiguousarray(job.search.query_QD[job.blocks[piece.block]]))
        member.piece, member.part, member.since = piece, piece.part, time.monotonic()
        where = given.vectors, given.parts[piece.part], given.blocks[piece.block], job.k
        if not job.uses_index:
            return member.actor.search.remote(*where)
        return member.actor.search_index.remote(*where, str(job.index_folder), piece.part, job.search.index)

    def _train(self, job: SearchJob, given: _Given) -> None:
        """Learns what all parts of the index share, where no earlier run has, and drops other catalogues' files."""
        folder = job.index_folder
        for trained in folder.parent.glob(f"*/{TRAINED}"):
            if trained.parent != folder:
                shutil.rmtree(trained.parent, ignore_errors=True)
        rows, size = ray.put(np.concatenate(job.parts)), max(len(part) for part in job.parts)
        ray.get(self._members[0].actor.train.remote(str(folder), given.vectors, rows, job.search.index, size))

    def _probe(self, job: SearchJob, given: _Given) -> None:
        """Measures the recall of the index on queries spread over all."""
        sample = evenly_spread(len(job.search.query_QD), _PROBED_QUERIES)
        queries = ray.put(np.ascontiguousarray(job.search.query_QD[sample]))
        found = [
            self._members[part % len(self._members)].actor.nearest.remote(given.vectors, rows, queries, job.k)
            for part, rows in enumerate(given.parts)
        ]
        scores, rows = zip(*ray.get(found), strict=True)
        job.measure(Neighbours(*merge_topk(scores, rows, job.k)), sample)
        log.info("mine: the index finds %.4f of the %d nearest, on %d queries", job.recall, job.k, len(sample))

    def _replace(self, job: SearchJob, member: _Member, piece: _Piece | None, error: Exception) -> None:
        """Puts another actor in the place of one that died; its work goes back to what waits."""
        self._losses += 1
        if self._losses > _MOST_LOSSES:
            raise RuntimeError(
                f"mine: {self._losses} search actors died, the last with: {error}; look whether their memory is "
                "short (placement.num_search_actors) or a node is ill"
            ) from error
        log.warning("mine: a search actor died, another takes its place: %s", str(error).splitlines()[0])
        member.actor, member.part = self._start().actor, None
        others = {other.piece for other in self._members if other is not member}
        if piece is not None and not job.is_piece_done(piece) and piece not in others:
            job.waiting.append(piece)

    def _tell(self, job: SearchJob, started: float) -> None:
        log.info("mine: %d of %d pieces, %.1f s", job.num_done, job.total, time.monotonic() - started)
        if job.run_folder:
            write_progress(job.run_folder, done=job.num_done, total=job.total, note="pieces of work searched")


class _Searcher:
    """Actor that searches parts of catalogues."""

    def __init__(self, threads: int, device: str, *, uses_index: bool) -> None:
        self._device = device
        self._opened: tuple[tuple[str, int], Any] | None = None
        if uses_index:
            import faiss

            faiss.omp_set_num_threads(threads)
        else:
            import torch

            torch.set_num_threads(threads)

    def pid(self) -> int:
        """Process of the actor."""
        return os.getpid()

    def search(
        self, vectors: CatalogVectors, row_P: NDArray[np.int64], query_BD: NDArray[np.float32], k: int
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """The best k of each query among these rows."""
        from embeddings.exact import ExactSearch

        return ExactSearch(vectors, row_P, device=self._device).search(query_BD, k)

    def search_index(
        self,
        vectors: CatalogVectors,
        row_P: NDArray[np.int64],
        query_BD: NDArray[np.float32],
        k: int,
        folder: str,
        part: int,
        recipe: IndexRecipe,
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """The best k of each query that the index of a part names; builds the index where it is missing."""
        from embeddings.ann import IndexPart

        if self._opened is None or self._opened[0] != (folder, part):
            self._opened = None
            self._opened = (folder, part), IndexPart(folder, part, vectors, row_P, recipe)
        found: tuple[NDArray[np.float32], NDArray[np.int64]] = self._opened[1].search(query_BD, k)
        return found

    def train(
        self, folder: str, vectors: CatalogVectors, row_P: NDArray[np.int64], recipe: IndexRecipe, part_rows: int
    ) -> None:
        """Writes what all parts of an index share, where it is missing."""
        from embeddings.ann import train_index

        if not Path(folder, TRAINED).is_file():
            train_index(Path(folder, TRAINED), vectors, row_P, recipe, part_rows)

    def nearest(
        self, vectors: CatalogVectors, row_P: NDArray[np.int64], query_BD: NDArray[np.float32], k: int
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """The nearest rows without an index."""
        from embeddings.ann import nearest_rows

        return nearest_rows(vectors, row_P, query_BD, k)
