"""Product vectors on disk, by content: a vector belongs to a text, whichever catalogues hold it.

A store is the folder of one encoder, data set and kind of number. Each of its files holds vectors (`.npy`) and beside
them the hashes of the texts (`.parquet`); a file is renamed into place when it is whole and never changed, so a night
with few new products writes a small file and reads the rest. A catalogue is a list of hashes; `VectorStore.vectors`
says in which file and place each of its rows lies.

N rows asked for, P products of a catalogue, D width of a vector.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

VectorType = Literal["float32", "float16", "int8"]
FILE_ROWS: Final = 20_000
"""Texts of a file at most: half a minute of encoding on two cores, which is what a killed run loses."""
QUERIES: Final = "queries-"
"""What names of files with query vectors begin with; they are no part of the catalogue's."""
_LEAST_HELD: Final = 1_000_000
"""Hashes of stored vectors looked through at once, 200 MB with their table; of large catalogues an eighth."""
_MOST_LOOKS: Final = 8
_ROWS_AT_ONCE: Final = 1_000_000
"""Rows of a catalogue whose places are compared at once."""
_BLOCK_PAIRS: Final = 2048
"""Inner products computed at once: 6 MB of float64 at width 384, which a core's cache holds."""


class StoreError(Exception):
    """A catalogue cannot be read from a store; the message says what is missing."""


class _Opened(NamedTuple):
    vector_PD: NDArray[np.generic]
    scale_P: NDArray[np.float32] | None


@lru_cache(maxsize=256)
def _open(path: str) -> _Opened:
    """A file mapped into memory; files never change, so that the mapping stays right."""
    vector_PD = np.load(path, mmap_mode="r", allow_pickle=False)
    if vector_PD.dtype != np.int8:
        return _Opened(vector_PD, None)
    return _Opened(vector_PD, pq.read_table(_sidecar(path), columns=["scale"])["scale"].to_numpy())


def _sidecar(path: str | Path) -> Path:
    return Path(path).with_suffix(".parquet")


def write_vectors(
    path: str | Path, vector_PD: NDArray[np.float32], hashes: Sequence[str], *, kind: VectorType = "float32"
) -> None:
    """Writes vectors and the hashes of their texts; a reader sees the whole file of vectors or none.

    Args:
        path: ends in `.npy`.
        vector_PD: what the encoder gave.
        hashes: of the texts, in the same order.
        kind: float16 halves the file and moves a cosine by less than .001; int8, symmetric with a scale per vector,
            quarters it and moves a cosine by less than .01.

    Raises:
        ValueError: vectors that are not finite, or not one hash each.
    """
    if vector_PD.ndim != 2 or len(hashes) != len(vector_PD) or not np.isfinite(vector_PD).all():
        raise ValueError(
            f"{path}: expected a matrix of finite vectors and as many hashes, got shape {list(vector_PD.shape)} and "
            f"{len(hashes)}; check the encoder's output"
        )
    columns: dict[str, pa.Array] = {"hash": pa.array(hashes, pa.string())}
    stored = vector_PD.astype(np.float32 if kind == "float32" else np.float16)
    if kind == "int8":
        scale_P = (np.abs(vector_PD).max(axis=1, initial=0.0) / 127).astype(np.float32)
        scale_P[scale_P == 0] = 1.0
        stored, columns["scale"] = np.rint(vector_PD / scale_P[:, None]).astype(np.int8), pa.array(scale_P)
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as place:
        values, names = Path(place, "vectors.npy"), Path(place, "hashes.parquet")
        np.save(values, np.ascontiguousarray(stored), allow_pickle=False)
        pq.write_table(pa.table(columns), names)
        os.replace(names, _sidecar(target))
        os.replace(values, target)


def has_rows(path: str | Path, num_rows: int) -> bool:
    """Whether a file of that many vectors is there."""
    try:
        vector_PD: NDArray[np.generic] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError):
        return False
    return vector_PD.ndim == 2 and len(vector_PD) == num_rows


def file_bytes(path: str | Path) -> int:
    """What a file of vectors and the hashes beside it take of the disk."""
    return Path(path).stat().st_size + _sidecar(path).stat().st_size


@dataclass(frozen=True)
class CatalogVectors:
    """Where the vector of each row of a catalogue lies.

    Attributes:
        paths: the files.
        file_P: which of them holds the row.
        place_P: at which place.
    """

    paths: tuple[str, ...]
    file_P: NDArray[np.int32]
    place_P: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.file_P)

    @property
    def width(self) -> int:
        """D; 0 of an empty catalogue."""
        return int(_open(self.paths[0]).vector_PD.shape[1]) if self.paths else 0

    @property
    def num_bytes(self) -> int:
        """Size of all its files, with what the catalogue does not use."""
        return sum(_open(path).vector_PD.nbytes for path in self.paths)

    def rows_of(self, number: int) -> int:
        """Vectors that a file holds, those that the catalogue does not use as well."""
        return len(_open(self.paths[number]).vector_PD)

    def in_file_order(self, row_N: NDArray[np.int64]) -> NDArray[np.int64]:
        """The rows as they lie on disk, so that reading them in turn reads files from front to back."""
        if self._are_in_file_order(row_N):
            return row_N
        ordered_N: NDArray[np.int64] = row_N[np.lexsort((self.place_P[row_N], self.file_P[row_N]))]
        return ordered_N

    def _are_in_file_order(self, row_N: NDArray[np.int64]) -> bool:
        for start in range(0, len(row_N), _ROWS_AT_ONCE):
            # with the next block's first
            block = row_N[start : start + _ROWS_AT_ONCE + 1]
            step_N, place_N = np.diff(self.file_P[block]), self.place_P[block]
            if not ((step_N > 0) | ((step_N == 0) & (place_N[1:] >= place_N[:-1]))).all():
                return False
        return True

    def distinct(self, row_N: NDArray[np.int64]) -> NDArray[np.int64]:
        """Ascending rows without those that share the vector of an earlier one of them."""
        first_F = np.cumsum([0, *map(self.rows_of, range(len(self.paths)))])
        holder_S = np.full(first_F[-1], -1, dtype=np.int32)
        # of what is written to one place the last stays: the first row
        backwards = row_N[::-1]
        holder_S[first_F[self.file_P[backwards]] + self.place_P[backwards]] = backwards
        return np.sort(holder_S[holder_S >= 0]).astype(np.int64)

    def take(self, row_N: NDArray[np.int64]) -> NDArray[np.float32]:
        """Vectors [N, D], float32, of these rows in their order; only they are read."""
        stored_ND, scale_N = self.take_stored(row_N)
        vector_ND = stored_ND.astype(np.float32)
        return vector_ND if scale_N is None else vector_ND * scale_N[:, None]

    def take_stored(self, row_N: NDArray[np.int64]) -> tuple[NDArray[np.generic], NDArray[np.float32] | None]:
        """The same as they are stored; of int8 with the factor of each vector, else None."""
        first = _open(self.paths[0])
        stored_ND = np.empty((len(row_N), self.width), dtype=first.vector_PD.dtype)
        scale_N = None if first.scale_P is None else np.empty(len(row_N), dtype=np.float32)
        file_N, place_N = self.file_P[row_N], self.place_P[row_N]
        for number in np.unique(file_N).tolist():
            asked = np.flatnonzero(file_N == number)
            opened, places = _open(self.paths[number]), place_N[asked]
            chosen, into = _run(places), _run(asked)
            stored_ND[into] = opened.vector_PD[chosen]
            if scale_N is not None and opened.scale_P is not None:
                scale_N[into] = opened.scale_P[chosen]
        return stored_ND, scale_N

    def pair_scores(
        self, query_QD: NDArray[np.float32], query_N: NDArray[np.int64], row_N: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """Inner products of N pairs of a query and a row of the catalogue, as the search computes them.

        Whatever the order of the pairs, files are read from front to back.
        """
        score_N = np.empty(len(row_N), dtype=np.float32)
        order_N = np.lexsort((self.place_P[row_N], self.file_P[row_N]))
        for start in range(0, len(row_N), _BLOCK_PAIRS):
            block = order_N[start : start + _BLOCK_PAIRS]
            score_N[block] = inner_products(query_QD[query_N[block]], self.take(row_N[block]))
        return score_N


class VectorStore:
    """The files of one encoder and data set.

    Args:
        folder: may be absent; holds the vectors of one encoder only.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def paths(self) -> list[str]:
        """Complete files, by name."""
        names = sorted(path for path in self.folder.glob("*.npy") if not path.name.startswith(QUERIES))
        return [str(path) for path in names]

    def missing(self, hashes: pa.Array | pa.ChunkedArray) -> pa.Array:
        """Hashes that no file holds, each once, in their order."""
        file_P, _ = self._find(hashes)
        return pc.unique(hashes.filter(pa.array(file_P < 0)).cast(pa.large_string()))

    def path_of(self, hashes: pa.Array | Sequence[str]) -> str:
        """The file that would hold the vectors of these texts."""
        return str(self.folder / f"{texts_print(hashes)}.npy")

    def vectors(self, hashes: pa.Array | pa.ChunkedArray) -> CatalogVectors:
        """Where the rows of a catalogue lie, by the hashes of their texts.

        Raises:
            StoreError: some have no vector yet.
        """
        file_P, place_P = self._find(hashes)
        if lacking := int((file_P < 0).sum()):
            raise StoreError(f"{self.folder}: {lacking} of {len(hashes)} products have no vectors; run embed_catalog")
        paths = self.paths()
        used = np.flatnonzero(np.bincount(file_P, minlength=len(paths)))
        number_F = np.zeros(len(paths), dtype=np.int32)
        number_F[used] = np.arange(len(used))
        return CatalogVectors(tuple(paths[number] for number in used.tolist()), number_F[file_P], place_P)

    def _find(self, hashes: pa.Array | pa.ChunkedArray) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """The first file that holds each hash, -1 where none does, and the place in it.

        Some files' hashes are held at once, since the hashes of millions of texts and their table are gigabytes.
        """
        file_P, place_P = np.full(len(hashes), -1, dtype=np.int32), np.zeros(len(hashes), dtype=np.int32)
        for first, held in self._held(max(_LEAST_HELD, len(hashes) // _MOST_LOOKS)):
            start_F = np.cumsum([0, *map(len, held)])
            found = pc.index_in(hashes, value_set=pa.concat_arrays(held).cast(hashes.type))
            entry_P = np.asarray(pc.fill_null(found, -1), dtype=np.int32)
            row_N = np.flatnonzero((entry_P >= 0) & (file_P < 0))
            file_N = np.searchsorted(start_F, entry_P[row_N], side="right") - 1
            file_P[row_N], place_P[row_N] = first + file_N, entry_P[row_N] - start_F[file_N]
            del found
            # Arrow keeps what it used
            pa.default_memory_pool().release_unused()
        return file_P, place_P

    def _held(self, count: int) -> Iterator[tuple[int, list[pa.Array]]]:
        """Hashes of neighbouring files, so many or a file's more at a time, and the number of the first file."""
        first, held = 0, []
        for number, path in enumerate(self.paths()):
            # 64 bytes a hash: a plain string array ends at 33 million
            held.append(
                pq.read_table(_sidecar(path), columns=["hash"])["hash"].cast(pa.large_string()).combine_chunks()
            )
            if sum(map(len, held)) >= count:
                yield first, held
                first, held = number + 1, []
        if held:
            yield first, held


def _run(place_N: NDArray[np.integer[Any]]) -> slice | NDArray[np.integer[Any]]:
    """The places as a slice where they follow one another, which is copied as a whole."""
    if len(place_N) and bool((np.diff(place_N) == 1).all()):
        return slice(int(place_N[0]), int(place_N[-1]) + 1)
    return place_N


def inner_products(left_ND: NDArray[np.float32], right_ND: NDArray[np.float32]) -> NDArray[np.float32]:
    """Row-wise inner products, rounded once to float32: they depend on the two vectors alone.

    Products of float32 are exact in float64; they are summed in halves, an order of plain additions that any device
    repeats to the bit.
    """
    score_N: NDArray[np.float64] = row_sums(np.multiply(left_ND, right_ND, dtype=np.float64))
    return score_N.astype(np.float32)


def row_sums(matrix_ND: Any) -> Any:
    """Sums of the rows of an array or tensor, in that order; its numbers are lost."""
    width = matrix_ND.shape[1]
    while width > 1:
        half = 1 << ((width - 1).bit_length() - 1)
        matrix_ND[:, : width - half] += matrix_ND[:, half:width]
        width = half
    return matrix_ND[:, 0]


def texts_print(*columns: pa.Array | pa.ChunkedArray | Sequence[str]) -> str:
    """16 hex digits over columns of text in their order; names what was encoded."""
    digest = hashlib.sha256()
    for column in columns:
        texts = column if isinstance(column, pa.Array | pa.ChunkedArray) else pa.array(column, pa.large_string())
        chunks = texts.chunks if isinstance(texts, pa.ChunkedArray) else [texts]
        digest.update(len(texts).to_bytes(8, "big"))
        for chunk in chunks:
            # where one text ends and the next begins is told by their lengths
            digest.update(pc.fill_null(pc.binary_length(chunk), -1).cast(pa.int64()).to_numpy().tobytes())
        for chunk in chunks:
            digest.update(_characters(chunk))
    return digest.hexdigest()[:16]


def _characters(texts: pa.Array) -> memoryview:
    """The characters of texts, one after the other, as they lie in memory."""
    whole = pc.fill_null(texts, "").cast(pa.large_string())
    _, offsets, data = whole.buffers()
    if data is None or not len(whole):
        return memoryview(b"")
    bounds = np.frombuffer(offsets, dtype=np.int64)[whole.offset : whole.offset + len(whole) + 1]
    return memoryview(data)[int(bounds[0]) : int(bounds[-1])]
