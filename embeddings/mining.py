"""Which retrieved products are worth a grade.

The stage 1 encoder ranks products for every training query. A grade 0 in the better half of the top k is a hard
negative, a grade 1 or 2 in the worse half a hard positive; the rest the encoder already has right.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from typing import Annotated, Final, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from conf.load import meaning, settings

TOP: Final = "top"
TAIL: Final = "tail"


@settings
class MiningRecipe:
    """How deep to look and how many pairs per query to send to the labeller."""

    depth: Annotated[
        int, meaning("k: retrieved products per query; the paper used 100 to 200", "ranks", ge=2, le=2048)
    ] = 100
    max_hard_negatives_per_query: Annotated[
        int,
        meaning("ungraded products drawn from ranks up to k/2, candidates for hard negatives", "pairs", ge=0),
    ] = 10
    max_hard_positives_per_query: Annotated[
        int,
        meaning("ungraded products drawn from ranks past k/2, candidates for hard positives", "pairs", ge=0),
    ] = 10
    skip_top: Annotated[
        int,
        meaning(
            "first ranks left out of the top band; from k/2 on no hard negatives remain",
            "ranks",
            ge=0,
            le=2048,
        ),
    ] = 0
    seed: Annotated[int, meaning("seed of the draws, combined with each query's key", ge=0)] = 0


class HardCandidate(NamedTuple):
    """A retrieved product without a grade that may be a hard pair."""

    product_id: str
    rank: int
    band: str


def assign_bands(rank: ArrayLike, depth: int) -> NDArray[np.str_]:
    """The band of each rank, counted from 1: "top" up to depth/2, "tail" after it.

    Raises:
        ValueError: a rank is outside 1..depth.
    """
    ranks = np.asarray(rank)
    if ranks.size and not (ranks.min() >= 1 and ranks.max() <= depth):
        raise ValueError(f"assign_bands: expected ranks in 1..{depth}, got {ranks.min()}..{ranks.max()}")
    return np.where(2 * ranks <= depth, TOP, TAIL)


def select_candidates(
    query_key: tuple[str, str], retrieved: Sequence[str], judged: Collection[str], *, recipe: MiningRecipe
) -> list[HardCandidate]:
    """Candidates for hard pairs of one query, by rank: a draw of each band's products that have no grade yet.

    The draw depends on the recipe's seed and the query's key alone, not on other queries or the order of
    work.

    Args:
        query_key: (dataset, query_id).
        retrieved: product ids, best first; those past the recipe's depth are ignored.
        judged: products of the query that are graded already; an instance holds them anyway.
        recipe: depth, caps and seed.
    """
    products = retrieved[: recipe.depth]
    bands = assign_bands(np.arange(1, len(products) + 1), recipe.depth)
    is_open = np.array([product not in judged for product in products], dtype=bool)
    is_open[: recipe.skip_top] = False
    generator = np.random.default_rng(_seed_of(recipe.seed, *query_key))
    chosen = np.zeros(len(products), dtype=bool)
    for band, cap in (
        (TOP, recipe.max_hard_negatives_per_query),
        (TAIL, recipe.max_hard_positives_per_query),
    ):
        chosen[generator.permutation(np.flatnonzero((bands == band) & is_open))[:cap]] = True
    return [HardCandidate(products[place], int(place) + 1, str(bands[place])) for place in np.flatnonzero(chosen)]


def _seed_of(seed: int, dataset: str, query_id: str) -> int:
    # the separator cannot occur in an id read from text, so no two keys share a string
    digest = hashlib.sha256("\0".join((str(seed), dataset, query_id)).encode()).digest()
    return int.from_bytes(digest[:8], "big")
