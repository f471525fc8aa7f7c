"""Approximate indexes of parts of a catalogue, as FAISS files: built once, read by any process, scored exactly.

An index names candidates; their scores are computed from the vectors themselves (`vectors.inner_products`), so that
what is found is ordered as an exact search would order it, and only what the index misses is missing.

Imported by processes without torch: loading FAISS beside a CUDA build of torch can crash.

Q queries, P products of a part, K found products, C candidates, D width of a vector.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import faiss
import numpy as np
from numpy.typing import NDArray

from embeddings.index_recipe import TRAINED, IndexRecipe, part_file
from embeddings.topk import best, check_vectors, merge_topk
from embeddings.vectors import CatalogVectors
from lake.storage import atomic_file

_ADDED_ROWS: Final = 65_536
_LEAST_PER_LIST: Final = 39
"""Vectors per list below which FAISS warns that k-means has too few (faiss 1.15, ClusteringParameters)."""


def train_index(
    path: str | Path, vectors: CatalogVectors, row_P: NDArray[np.int64], recipe: IndexRecipe, part_rows: int
) -> None:
    """Writes the empty index that all parts share: its lists and codes are learned from a sample of all rows.

    Args:
        path: file that is written.
        vectors: of the catalogue.
        row_P: rows that are indexed, of all parts.
        recipe: kind of index.
        part_rows: rows of a part, which the number of lists follows where the recipe leaves it open.
    """
    sample = np.random.default_rng(recipe.seed).permutation(len(row_P))[: recipe.train_rows]
    sample_SD = vectors.take(vectors.in_file_order(row_P[np.sort(sample)]))
    lists = min(recipe.lists or round(4 * np.sqrt(part_rows)), max(1, len(sample_SD) // _LEAST_PER_LIST))
    index: Any = faiss.index_factory(vectors.width, recipe.factory(lists, vectors.width), faiss.METRIC_INNER_PRODUCT)
    if recipe.kind == "hnsw":
        index.hnsw.efConstruction = recipe.links_looked_at
    index.train(sample_SD)
    _write(index, path)


class IndexPart:
    """The index of one part of a catalogue, built where its file is missing.

    Args:
        folder: holds the trained index and the parts' files.
        number: of the part.
        vectors: of the catalogue.
        row_P: the part's rows, as they lie on disk.
        recipe: kind of index.
    """

    def __init__(
        self, folder: str | Path, number: int, vectors: CatalogVectors, row_P: NDArray[np.int64], recipe: IndexRecipe
    ) -> None:
        self._vectors, self._row_P, self._recipe = vectors, row_P, recipe
        path = Path(folder, part_file(number))
        if not path.is_file():
            self._build(Path(folder, TRAINED), path)
        # lists stay in the file and are read as they are probed
        index: Any = faiss.read_index(str(path), faiss.IO_FLAG_MMAP if recipe.has_lists else 0)
        if recipe.has_lists:
            index.nprobe = recipe.probes
        else:
            index.hnsw.efSearch = recipe.links_looked_at
        self._index = index

    def search(self, query_QD: NDArray[np.float32], k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """The best k of the candidates that the index names, equal scores by ascending row.

        Where it names fewer, places are filled up with score -inf and the row that no catalogue has.

        Returns:
            score_QK float32 and row_QK int64.
        """
        check_vectors("IndexPart.search", query_QD)
        width = min(len(self._row_P), k + self._recipe.spare)
        _, place_QC = self._index.search(np.ascontiguousarray(query_QD), width)
        query_N, column_N = np.nonzero(place_QC >= 0)
        row_N = self._row_P[place_QC[query_N, column_N]]
        score_QC = np.full(place_QC.shape, -np.inf, dtype=np.float32)
        row_QC = np.full(place_QC.shape, np.iinfo(np.int64).max, dtype=np.int64)
        row_QC[query_N, column_N] = row_N
        score_QC[query_N, column_N] = self._vectors.pair_scores(query_QD, query_N, row_N)
        return best(score_QC, row_QC, k)

    def _build(self, trained: Path, path: Path) -> None:
        index = faiss.read_index(str(trained))
        for start in range(0, len(self._row_P), _ADDED_ROWS):
            index.add(self._vectors.take(self._row_P[start : start + _ADDED_ROWS]))
        _write(index, path)


def nearest_rows(
    vectors: CatalogVectors, row_P: NDArray[np.int64], query_QD: NDArray[np.float32], k: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The nearest rows by FAISS without an index, in tiles: what an index is measured by.

    Scores are float32 sums as FAISS rounds them, so that neighbours nearer to each other than that may be exchanged.
    """
    score_QK = np.empty((len(query_QD), 0), dtype=np.float32)
    row_QK = np.empty((len(query_QD), 0), dtype=np.int64)
    for start in range(0, len(row_P), _ADDED_ROWS):
        rows = row_P[start : start + _ADDED_ROWS]
        score, place = faiss.knn(query_QD, vectors.take(rows), min(k, len(rows)), faiss.METRIC_INNER_PRODUCT)
        score_QK, row_QK = merge_topk([score_QK, score], [row_QK, rows[place]], k)
    return score_QK, row_QK


def _write(index: Any, path: str | Path) -> None:
    with atomic_file(path) as fresh:
        faiss.write_index(index, str(fresh))
