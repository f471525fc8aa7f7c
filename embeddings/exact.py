"""Exact top-k by inner product over vectors on disk, in tiles, on a processor or a graphics card.

A tile of products is multiplied with a block of queries in the fastest arithmetic of the device (bfloat16 on AMX and
tensor cores, else float32), which is wrong by a bound that is computed from what rounding did to these very vectors.
Whatever could still be among the first k by that bound is kept; the few products kept at the end are scored exactly
(`vectors.inner_products`) and ordered. So the result is the exact one, ties by ascending row, to the bit and on every
device, however products are cut into tiles and queries into blocks. Memory is a tile's and a block's, whatever the
catalogue's size: the vectors themselves are files mapped into memory.

Q queries, B queries of a block, T products of a tile, G groups of neighbouring products, H groups that may hold a hit,
K found products, C candidates, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from embeddings.backbone import has_fast_bf16
from embeddings.exact_size import BLOCK_QUERIES, MIN_ROOM, SPARE, TILE_ROWS
from embeddings.topk import best, check_vectors
from embeddings.vectors import CatalogVectors, row_sums

_GROUP: Final = 32
"""Neighbouring scores that are looked at one by one only where their highest reaches the bound."""
_PAIRS: Final = (2_048, 65_536)
"""Pairs scored exactly at once on a processor, 6 MB of float64 at width 384, and on a card."""
_FLOAT32_UNIT: Final = 2.0**-24
_LEAST_LENGTH: Final = 1e-10
"""Below it squares leave float32; above it a length in float64 would only take longer."""


class ExactSearch:
    """Looks up the nearest products of queries among rows of a catalogue.

    Args:
        vectors: of the catalogue.
        row_P: rows that may be found.
        device: where tiles are multiplied.
        bf16: multiply in bfloat16; None where the device is fast at it. Changes the time, not the result.
    """

    def __init__(
        self, vectors: CatalogVectors, row_P: NDArray[np.int64], *, device: str = "cpu", bf16: bool | None = None
    ) -> None:
        self._vectors, self._row_P = vectors, vectors.in_file_order(np.asarray(row_P, dtype=np.int64))
        self._device = torch.device(device)
        is_rounded = has_fast_bf16(device) if bf16 is None else bf16
        self._kind = torch.bfloat16 if is_rounded else torch.float32

    def __len__(self) -> int:
        return len(self._row_P)

    def search(self, query_QD: NDArray[np.float32], k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """The best min(k, number of rows) products of each query, equal scores by ascending row.

        A score is the float64 inner product rounded once to float32.

        Returns:
            score_QK float32 and row_QK int64.

        Raises:
            ValueError: queries are not finite float32 of the catalogue's width, or k is below 1.
        """
        check_vectors("ExactSearch.search", query_QD)
        depth = min(k, len(self))
        if k < 1 or (depth and query_QD.shape[1] != self._vectors.width):
            raise ValueError(
                f"ExactSearch.search: expected k >= 1 and queries of width {self._vectors.width}, "
                f"got k={k} and width {query_QD.shape[1]}"
            )
        if not depth or not len(query_QD):
            return np.empty((len(query_QD), depth), np.float32), np.empty((len(query_QD), depth), np.int64)
        with torch.inference_mode(), _full_sums():
            blocks = [
                _Block(torch.from_numpy(np.ascontiguousarray(part)).to(self._device), depth, self._kind)
                for part in np.split(query_QD, range(BLOCK_QUERIES, len(query_QD), BLOCK_QUERIES))
            ]
            # taken once: fresh memory for every product of matrices costs as long as computing it
            scratch = torch.empty((BLOCK_QUERIES, TILE_ROWS + _GROUP), dtype=self._kind, device=self._device)
            for at in range(0, len(self), TILE_ROWS):
                tile = _Tile(self._read(self._row_P[at : at + TILE_ROWS]), at, self._kind)
                for block in blocks:
                    block.look_at(tile, scratch)
            found = [self._settle(block, depth) for block in blocks]
        score_QK, row_QK = (np.concatenate([part[side] for part in found]) for side in (0, 1))
        return score_QK, row_QK

    def _read(self, row_T: NDArray[np.int64]) -> Tensor:
        """Vectors [T, D] of rows, float32, on the device; converted there, since numpy takes long over float16."""
        stored_TD, scale_T = self._vectors.take_stored(row_T)
        vector_TD = torch.from_numpy(stored_TD).to(self._device).float()
        if scale_T is not None:
            vector_TD *= torch.from_numpy(scale_T).to(self._device)[:, None]
        return vector_TD

    def _settle(self, block: _Block, depth: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Scores a block's candidates exactly and takes the first."""
        query_C, place_C = block.candidates()
        row_C = self._row_P[place_C]
        score_C = self._score(block.query_BD, query_C, place_C)
        # candidates come query by query; ragged rows are filled up with what no product can beat to the last place
        counts = np.bincount(query_C, minlength=len(block.query_BD))
        width = int(counts.max())
        score_BC = np.full((len(counts), width), -np.inf, dtype=np.float32)
        row_BC = np.full((len(counts), width), np.iinfo(np.int64).max, dtype=np.int64)
        place = np.arange(len(query_C)) - np.repeat(np.cumsum(counts) - counts, counts)
        score_BC[query_C, place], row_BC[query_C, place] = score_C, row_C
        return best(score_BC, row_BC, depth)

    def _score(self, query_BD: Tensor, query_C: NDArray[np.int64], place_C: NDArray[np.int64]) -> NDArray[np.float32]:
        """What `vectors.inner_products` gives for pairs of a query and a place in the search's order."""
        score_C = np.empty(len(place_C), dtype=np.float32)
        query_BD, size = query_BD.double(), _PAIRS[self._device.type == "cuda"]
        # places follow one another as products lie on disk
        order_C = np.argsort(place_C, kind="stable")
        for start in range(0, len(order_C), size):
            chosen = order_C[start : start + size]
            product_ND = self._read(self._row_P[place_C[chosen]]).double()
            product_ND.mul_(query_BD[torch.from_numpy(query_C[chosen]).to(self._device)])
            score_C[chosen] = row_sums(product_ND).float().cpu().numpy()
        return score_C


class _Tile:
    """Products of one step, rounded, with what rounding did to them; their own vectors are lost."""

    def __init__(self, vector_TD: Tensor, start: int, kind: torch.dtype) -> None:
        self.start, self.size = start, len(vector_TD)
        rounded = vector_TD.to(kind)
        self.longest = _longest(vector_TD)
        self.residual = _longest(vector_TD.sub_(rounded))
        lacking = -self.size % _GROUP
        self.rounded_DT = (functional.pad(rounded, (0, 0, 0, lacking)) if lacking else rounded).T


class _Block:
    """Queries of one step and their candidates so far."""

    def __init__(self, query_BD: Tensor, depth: int, kind: torch.dtype) -> None:
        self.query_BD, self._depth, self._kind = query_BD, depth, kind
        self._rounded_BD = query_BD.to(kind)
        self._length_B1 = torch.linalg.vector_norm(query_BD.double(), dim=1, keepdim=True)
        self._residual_B1 = torch.linalg.vector_norm(query_BD.double() - self._rounded_BD.double(), dim=1, keepdim=True)
        size, room = len(query_BD), max(MIN_ROOM, SPARE * depth)
        self._full_at = 3 * room // 4
        self._score_BC = torch.full((size, room), -torch.inf, dtype=kind, device=query_BD.device)
        self._place_BC = torch.zeros((size, room), dtype=torch.int32, device=query_BD.device)
        self._count_B = torch.zeros(size, dtype=torch.int64, device=query_BD.device)
        self._least_B1 = torch.full((size, 1), -torch.inf, dtype=torch.float64, device=query_BD.device)
        """What k products so far reach at least, exactly scored."""
        self._error_B1 = torch.zeros((size, 1), dtype=torch.float64, device=query_BD.device)
        """Most by which a product so far can be off."""

    def look_at(self, tile: _Tile, scratch: Tensor) -> None:
        """Takes what could be among the first k from a tile, whose scores are computed into the scratch memory."""
        size, width = len(self._rounded_BD), tile.rounded_DT.shape[1]
        score_BT = torch.mm(self._rounded_BD, tile.rounded_DT, out=scratch.view(-1)[: size * width].view(size, width))
        if tile.size < score_BT.shape[1]:
            score_BT[:, tile.size :] = -torch.inf
        error_B1 = self._error_of(tile)
        self._error_B1 = torch.maximum(self._error_B1, error_B1)
        score_BTG = score_BT.view(len(score_BT), _GROUP, -1)
        reach_B1 = self._reach(error_B1)
        if bool((reach_B1 > 0).all()):
            # bits of numbers above 0 are in the numbers' order, and integers are compared several times as fast
            bits = torch.int16 if self._kind == torch.bfloat16 else torch.int32
            is_near_BG = score_BTG.view(bits).amax(dim=1) >= reach_B1.view(bits)
        else:
            highest_BG = score_BTG.amax(dim=1)
            if highest_BG.shape[1] >= self._depth:
                # k groups have a product that reaches the k-th highest of their best
                self._raise(highest_BG.topk(self._depth, dim=1).values[:, -1:], error_B1)
                reach_B1 = self._reach(error_B1)
            is_near_BG = highest_BG >= reach_B1
        query_H, group_H = is_near_BG.nonzero(as_tuple=True)
        near_HT = score_BTG[query_H, :, group_H]
        hit_C, column_C = ((near_HT >= reach_B1[query_H]) & (near_HT > -torch.inf)).nonzero(as_tuple=True)
        place_C = tile.start + column_C * score_BTG.shape[2] + group_H[hit_C]
        self._add(query_H[hit_C], near_HT[hit_C, column_C], place_C)
        if int(self._count_B.max()) > self._full_at:
            self.prune()

    def prune(self) -> None:
        """Drops candidates that can no longer be among the first k."""
        width = int(self._count_B.max())
        if width <= self._depth:
            return
        score_BC, place_BC = self._score_BC[:, :width], self._place_BC[:, :width]
        self._raise(score_BC.topk(self._depth, dim=1).values[:, -1:], self._error_B1)
        keep_BC = (score_BC >= self._reach(self._error_B1)) & (score_BC > -torch.inf)
        query_C, column_C = keep_BC.nonzero(as_tuple=True)
        score_C, place_C = score_BC[query_C, column_C], place_BC[query_C, column_C]
        score_BC.fill_(-torch.inf)
        self._count_B.zero_()
        self._add(query_C, score_C, place_C)
        # where ties or a wide bound leave many, the next look comes when there are twice as many
        self._full_at = max(self._full_at, 2 * int(self._count_B.max()))

    def candidates(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(query of the block, place in the search's order) of every candidate, query by query."""
        self.prune()
        query_C, column_C = (self._score_BC > -torch.inf).nonzero(as_tuple=True)
        return query_C.cpu().numpy(), self._place_BC[query_C, column_C].long().cpu().numpy()

    def _error_of(self, tile: _Tile) -> Tensor:
        """Bound on |float32 sum of the rounded products - exact inner product| (Higham 2002, s. 3.1, for the sum)."""
        width = self.query_BD.shape[1]
        rounding = self._residual_B1 * tile.longest + (self._length_B1 + self._residual_B1) * tile.residual
        length = (self._length_B1 + self._residual_B1) * (tile.longest + tile.residual)
        # units that multiply bfloat16 take subnormal numbers for 0
        underflow = 4 * width * float(np.finfo(np.float32).smallest_normal) * (1 + length)
        error_B1: Tensor = 1.01 * (rounding + (width + 2) * _FLOAT32_UNIT * length) + underflow
        return error_B1

    def _raise(self, kth_B1: Tensor, error_B1: Tensor) -> None:
        """Notes that k products have these rounded scores or higher, each off by at most the error."""
        self._least_B1 = torch.maximum(self._least_B1, kth_B1.double() - _spacing(kth_B1) - error_B1)

    def _reach(self, error_B1: Tensor) -> Tensor:
        """What a rounded score must reach so that the exact one, off by at most the error, may be among the first k."""
        bound_B1 = self._least_B1 - error_B1
        lowered_B1 = bound_B1.to(self._kind)
        # rounding is monotone: what is not below the bound is, rounded, not below the bound rounded down
        below_B1 = lowered_B1 - _spacing(lowered_B1).to(self._kind)
        return torch.where(lowered_B1.double() > bound_B1, below_B1, lowered_B1)

    def _add(self, query_C: Tensor, score_C: Tensor, place_C: Tensor) -> None:
        """Appends candidates, which come query by query."""
        fresh_B = torch.bincount(query_C, minlength=len(self._count_B))
        total_B = self._count_B + fresh_B
        if int(total_B.max()) > self._score_BC.shape[1]:
            self._widen(int(total_B.max()))
        first_B = torch.cumsum(fresh_B, dim=0) - fresh_B
        column_C = torch.arange(len(query_C), device=query_C.device) - first_B[query_C] + self._count_B[query_C]
        self._score_BC[query_C, column_C] = score_C
        self._place_BC[query_C, column_C] = place_C.int()
        self._count_B = total_B

    def _widen(self, width: int) -> None:
        more = max(width, 2 * self._score_BC.shape[1]) - self._score_BC.shape[1]
        self._score_BC = functional.pad(self._score_BC, (0, more), value=-torch.inf)
        self._place_BC = functional.pad(self._place_BC, (0, more))


@contextmanager
def _full_sums() -> Iterator[None]:
    """Sums of bfloat16 products in float32 on graphics cards too, as the bound takes for granted."""
    kept = torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = kept


def _longest(vector_TD: Tensor) -> float:
    """Length of the longest vector, rounded up."""
    if not len(vector_TD):
        return 0.0
    longest = float(torch.linalg.vector_norm(vector_TD, dim=1).max())
    if longest < _LEAST_LENGTH:
        longest = float(torch.linalg.vector_norm(vector_TD, dim=1, dtype=torch.float64).max())
    return 1.001 * longest


def _spacing(score: Tensor) -> Tensor:
    """An upper bound on the distance of neighbouring numbers of the score's kind at the score, float64."""
    info = torch.finfo(score.dtype)
    return torch.clamp(score.double().abs() * info.eps, min=float(info.smallest_normal))
