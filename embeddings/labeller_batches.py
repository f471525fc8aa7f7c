"""What a step of tuning the labeller holds: its pairs, each worker's part of them, and which product is preferred.

All of it follows from (seed, epoch) and the tuning set; how many workers share a step changes none of it.
"""

# N pairs of the tuning set, B of a step, P preferences

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from embeddings.labeller import LabellerRecipe

BUCKET_BATCHES: Final = 16
"""Pairs of similar length are drawn together from windows of this many batches, which halves the padding."""
LEAST_GAP: Final = 0.5
"""Difference of the mean grades from which a product is preferred to another: below, it may be the raters' chance."""
WIDE_GAP: Final = 1.5
"""From here on a preference is wide, mostly of grade 2 to 0; a narrow one crosses one boundary."""


class Preferences(NamedTuple):
    """Products of one query of which people graded one higher.

    Attributes:
        better_P: rows of the tuning set.
        worse_P: rows of the same queries.
        weight_P: summing to 1 over a step; wide and narrow preferences share it.
    """

    better_P: NDArray[np.int64]
    worse_P: NDArray[np.int64]
    weight_P: NDArray[np.float64]

    def of(self, rows: Sequence[int]) -> Preferences:
        """Those between rows of a worker's part, as places in it."""
        place = {row: number for number, row in enumerate(rows)}
        place_P2 = np.array([[place.get(row, -1) for row in side.tolist()] for side in self[:2]], dtype=np.int64).T
        is_here_P = (place_P2 >= 0).all(axis=1)
        better, worse = place_P2[is_here_P].T
        return Preferences(better, worse, self.weight_P[is_here_P])


def groups_of(queries: Sequence[str], recipe: LabellerRecipe) -> NDArray[np.int64]:
    """Numbers, equal for pairs that a step holds together: those of a query where products are compared, else none."""
    if not recipe.preference_weight:
        return np.arange(len(queries))
    return np.unique(np.asarray(queries), return_inverse=True)[1].astype(np.int64)


def epoch_batches(
    lengths: Sequence[int], group_N: NDArray[np.int64], recipe: LabellerRecipe, epoch: int
) -> list[list[int]]:
    """Rows of every batch of an epoch, over all workers: a function of (seed, epoch) and the first two alone.

    Args:
        lengths: tokens of each pair.
        group_N: of `groups_of`; a group that meets the end of a batch is cut.
        recipe: names seed and size.
        epoch: counted from 0.
    """
    rng, size = np.random.default_rng([recipe.seed, epoch]), recipe.batch_size
    order_N = np.argsort(group_N, kind="stable")
    groups = [rows.tolist() for rows in np.split(order_N, np.flatnonzero(np.diff(group_N[order_N])) + 1)]
    order = [row for number in rng.permutation(len(groups)) for row in groups[number]]
    width = {row: max(lengths[other] for other in rows) for rows in groups for row in rows}
    batches, window = [], size * BUCKET_BATCHES
    for start in range(0, len(order), window):
        # a stable sort: the rows of a group have one width and stay together
        near = sorted(order[start : start + window], key=lambda row: width[row])
        batches += [near[first : first + size] for first in range(0, len(near), size)]
    return [batches[index] for index in rng.permutation(len(batches))]


def part_of(batch: Sequence[int], group_N: NDArray[np.int64], rank: int, world_size: int) -> list[int]:
    """A worker's rows of a batch: whole groups, in turn."""
    turn: dict[int, int] = {}
    return [row for row in batch if turn.setdefault(int(group_N[row]), len(turn)) % world_size == rank]


def preferences_of(
    batch: Sequence[int], value_N: NDArray[np.floating], group_N: NDArray[np.int64], wide_share: float
) -> Preferences:
    """The preferences between a batch's rows.

    Easy contrasts and hard ones teach more together than either alone (arXiv 2412.15282), and a batch holds them in
    other numbers than wanted. Where it holds one kind only, that has all of the weight.

    Args:
        batch: rows over all workers.
        value_N: mean grade that the raters gave, in [0, 2].
        group_N: of `groups_of`, by query.
        wide_share: share of the weight that wide preferences have.
    """
    row_B = np.asarray(batch, dtype=np.int64)
    gap_BB = value_N[row_B][:, None] - value_N[row_B]
    is_together_BB = group_N[row_B][:, None] == group_N[row_B]
    better_P, worse_P = np.nonzero(is_together_BB & (gap_BB >= LEAST_GAP))
    is_wide_P = gap_BB[better_P, worse_P] >= WIDE_GAP
    num_wide, num = int(is_wide_P.sum()), len(is_wide_P)
    if num_wide in (0, num):
        weight_P = np.full(num, 1 / max(num, 1))
    else:
        weight_P = np.where(is_wide_P, wide_share / num_wide, (1 - wide_share) / (num - num_wide))
    return Preferences(row_B[better_P], row_B[worse_P], weight_P)
