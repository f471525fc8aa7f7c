"""Product vectors on disk: a catalogue in id order, cut into runs of products, one `.npy` file each.

Beside every file of vectors lies a `.parquet` with its product ids. The vectors are renamed into place last, so a
shard is complete exactly when its `.npy` is there.

P products, D width of a vector.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

_DEFAULT_ROWS = 5_000
"""Products of a shard unless told otherwise: a minute of encoding on two cores, so little is lost, and progress shows
every minute."""
_PAIR_BLOCK = 16_384
"""Pairs scored at once: 50 MB of float64 at width 384."""


@dataclass(frozen=True)
class Shard:
    """A run of the catalogue's products and where their vectors lie."""

    number: int
    path: str
    first_row: int
    num_rows: int

    @property
    def is_complete(self) -> bool:
        """Whether the vectors are there, all of them."""
        return has_rows(self.path, self.num_rows)

    def vectors(self) -> NDArray[np.float32]:
        """The vectors [P, D], mapped into memory, not read."""
        vector_PD: NDArray[np.float32] = np.load(self.path, mmap_mode="r", allow_pickle=False)
        return vector_PD


def plan_shards(folder: str | Path, num_products: int, num_shards: int) -> list[Shard]:
    """Contiguous shards whose sizes differ by at most one.

    Args:
        folder: where their files lie or will lie.
        num_products: size of the catalogue.
        num_shards: at most one per product; 0 takes one per 5,000 products.
    """
    wanted = num_shards or -(-num_products // _DEFAULT_ROWS)
    count = max(1, min(wanted, num_products))
    bounds = [num_products * number // count for number in range(count + 1)]
    return [
        Shard(number, str(Path(folder, f"shard-{number:05d}-of-{count:05d}.npy")), start, end - start)
        for number, (start, end) in enumerate(itertools.pairwise(bounds))
    ]


def write_vectors(path: str | Path, vector_PD: NDArray[np.float32], ids: Sequence[str]) -> None:
    """Writes ids and vectors; a reader sees the whole file of vectors or none."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as place:
        vectors, names = Path(place, "vectors.npy"), Path(place, "ids.parquet")
        np.save(vectors, np.ascontiguousarray(vector_PD, dtype=np.float32), allow_pickle=False)
        pq.write_table(pa.table({"id": pa.array(ids, pa.string())}), names)
        os.replace(names, target.with_suffix(".parquet"))
        os.replace(vectors, target)


def has_rows(path: str | Path, num_rows: int) -> bool:
    """Whether a file of that many vectors is there."""
    try:
        vector_PD: NDArray[np.float32] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError):
        return False
    return vector_PD.ndim == 2 and len(vector_PD) == num_rows


def read_rows(shards: Sequence[Shard], row_N: NDArray[np.int64]) -> NDArray[np.float32]:
    """Vectors [N, D] of catalogue rows, in the order asked for; only those rows are read."""
    shard_N = shard_of_rows(shards, row_N)
    width = shards[0].vectors().shape[1]
    vector_ND = np.empty((len(row_N), width), dtype=np.float32)
    for shard in shards:
        asked = np.flatnonzero(shard_N == shard.number)
        vector_ND[asked] = shard.vectors()[row_N[asked] - shard.first_row]
    return vector_ND


def shard_of_rows(shards: Sequence[Shard], row_N: NDArray[np.int64]) -> NDArray[np.int64]:
    """Number of the shard that holds each catalogue row."""
    starts = np.array([shard.first_row for shard in shards])
    return np.searchsorted(starts, row_N, side="right") - 1


def texts_print(*columns: Sequence[str]) -> str:
    """16 hex digits over columns of text in their order; names what was encoded."""
    digest = hashlib.sha256()
    for column in columns:
        for text in column:
            encoded = text.encode()
            digest.update(len(encoded).to_bytes(8, "big") + encoded)
    return digest.hexdigest()[:16]


def pair_scores(
    shards: Sequence[Shard], query_QD: NDArray[np.float32], query_N: NDArray[np.int64], row_N: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Cosines of N pairs of a query and a catalogue row, rounded once to float32 as the search does."""
    score_N = np.empty(len(row_N), dtype=np.float64)
    for start in range(0, len(row_N), _PAIR_BLOCK):
        block = slice(start, start + _PAIR_BLOCK)
        products = np.multiply(query_QD[query_N[block]], read_rows(shards, row_N[block]), dtype=np.float64)
        score_N[block] = products.sum(axis=1).astype(np.float32)
    return score_N
