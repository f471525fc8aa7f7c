"""Which retrieved products are worth a grade.

An encoder ranks products for every training query. A grade 0 in the better half of the top k is a hard negative, a
grade 1 or 2 in the worse half a hard positive; the rest the encoder already has right.

Q queries, K retrieved products of each, best first, J judged products of a query, D width of a vector.
"""

from __future__ import annotations

import hashlib
from typing import Annotated, Final

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
    least_score: Annotated[float, meaning("products below it are left out", "cosine", ge=-1, le=1)] = -1.0
    most_score: Annotated[float, meaning("products above it are left out", "cosine", ge=-1, le=1)] = 1.0
    ceiling: Annotated[
        float | None,
        meaning(
            "products of the top band are left out above this share of the lowest cosine of the query's products of "
            "its best grade, likely positives that nobody graded; null keeps them for the labeller",
            gt=0,
            le=1,
        ),
    ] = None
    margin: Annotated[
        float | None,
        meaning("the same with this much below that lowest cosine; null keeps them", "cosine", ge=0, le=2),
    ] = None
    duplicate_cosine: Annotated[
        float | None,
        meaning(
            "products as near as this to a judged or better ranked one of the query are its copies and left out; null "
            "keeps them",
            "cosine",
            gt=0,
            le=1,
        ),
    ] = None
    category_levels: Annotated[
        int,
        meaning(
            "first levels of the category path that a product must share with one of the query's products of its best "
            "grade; 0 asks for none",
            "levels",
            ge=0,
        ),
    ] = 0
    seed: Annotated[int, meaning("seed of the draws, combined with each query's key", ge=0)] = 0


def assign_bands(rank: ArrayLike, depth: int) -> NDArray[np.str_]:
    """The band of each rank, counted from 1: "top" up to depth/2, "tail" after it.

    Raises:
        ValueError: a rank is outside 1..depth.
    """
    ranks = np.asarray(rank)
    if ranks.size and not (ranks.min() >= 1 and ranks.max() <= depth):
        raise ValueError(f"assign_bands: expected ranks in 1..{depth}, got {ranks.min()}..{ranks.max()}")
    return np.where(2 * ranks <= depth, TOP, TAIL)


def at_share(lowest_positive: ArrayLike, share: float) -> NDArray[np.float64]:
    """The cosine at a share of a query's lowest positive, as a margin below it, so that it keeps its sense below 0."""
    lowest = np.asarray(lowest_positive, dtype=np.float64)
    return lowest - (1 - share) * np.abs(lowest)


def open_places(
    score_QK: NDArray[np.floating], lowest_positive_Q: NDArray[np.floating], recipe: MiningRecipe
) -> NDArray[np.bool_]:
    """Which places of the rankings rank and score leave open for a draw.

    Args:
        score_QK: cosines, best first.
        lowest_positive_Q: of each query's products of its best grade; nan where it has none above 0, and then neither
            ceiling nor margin holds.
        recipe: score band, ranks skipped, ceiling and margin.

    Cites: Moreira et al. 2024 (arXiv 2407.15831) for ceiling (TopK-PercPos) and margin (TopK-MarginPos).
    """
    depth = score_QK.shape[1]
    rank_K = np.arange(1, depth + 1)
    is_open_QK = (score_QK >= recipe.least_score) & (score_QK <= recipe.most_score) & (rank_K > recipe.skip_top)
    is_top_K = assign_bands(rank_K, max(recipe.depth, depth)) == TOP
    lowest_Q1 = np.asarray(lowest_positive_Q, dtype=np.float64)[:, None]
    bounds = []
    if recipe.ceiling is not None:
        bounds.append(at_share(lowest_Q1, recipe.ceiling))
    if recipe.margin is not None:
        bounds.append(lowest_Q1 - recipe.margin)
    for bound_Q1 in bounds:
        is_open_QK &= ~is_top_K | ~(score_QK > bound_Q1)
    return np.asarray(is_open_QK, dtype=bool)


def without_copies(
    is_open_K: NDArray[np.bool_], vector_KD: NDArray[np.float32], judged_JD: NDArray[np.float32], cosine: float
) -> NDArray[np.bool_]:
    """The open places of one query without copies of a judged product or of an open one before.

    Args:
        is_open_K: places left open so far.
        vector_KD: normalised vectors of the retrieved products.
        judged_JD: of the products that are judged already.
        cosine: from which two products count as one.
    """
    kept = is_open_K.copy()
    if len(judged_JD):
        kept &= (vector_KD @ judged_JD.T).max(axis=1) < cosine
    is_copy_KK = vector_KD @ vector_KD.T >= cosine
    for place in np.flatnonzero(kept):
        if kept[place]:
            kept[place + 1 :] &= ~is_copy_KK[place, place + 1 :]
    return kept


def select_candidates(
    query_key: tuple[str, str], is_open_K: NDArray[np.bool_], recipe: MiningRecipe
) -> NDArray[np.int64]:
    """Places of candidates for hard pairs of one query, ascending: a draw of each band's open ones.

    The draw depends on the recipe's seed and the query's key alone, not on other queries or the order of work.

    Args:
        query_key: (dataset, query_id).
        is_open_K: places that may be drawn; those past the recipe's depth are ignored.
        recipe: depth, caps and seed.
    """
    is_open = is_open_K[: recipe.depth]
    is_top = assign_bands(np.arange(1, len(is_open) + 1), recipe.depth) == TOP
    generator = np.random.default_rng(_seed_of(recipe.seed, *query_key))
    caps = (recipe.max_hard_negatives_per_query, recipe.max_hard_positives_per_query)
    drawn = [
        generator.permutation(np.flatnonzero(is_open & in_band))[:cap]
        for in_band, cap in zip((is_top, ~is_top), caps, strict=True)
    ]
    return np.sort(np.concatenate(drawn))


def _seed_of(seed: int, dataset: str, query_id: str) -> int:
    # the separator cannot occur in an id read from text, so no two keys share a string
    digest = hashlib.sha256("\0".join((str(seed), dataset, query_id)).encode()).digest()
    return int.from_bytes(digest[:8], "big")
