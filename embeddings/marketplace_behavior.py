"""How people behave in the simulated marketplace: annotated pairs, their marks, and search sessions."""

# N products, S sessions, M pool of a query, V positions shown, R annotated pairs, A annotators, K marks

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from embeddings.marketplace_recipe import MarketplaceRecipe
from embeddings.marketplace_words import TYPES
from embeddings.marketplace_world import Products, Query, draw, product_id

SCALE = "grade 0..2"
_ANNOTATED_SHARES = ((2, 0.35), (1, 0.3), (0, 0.2))  # exact, partial, hard irrelevant; the rest is random
_NUM_EXTRA_RESULTS = 16  # products beyond the annotated ones that a query's ranker may show
_CLICK_OF_GRADE = np.array([0.03, 0.2, 0.5])
_CART_OF_GRADE = np.array([0.05, 0.2, 0.45])
_PURCHASE_OF_CART = 0.5
_SESSIONS_PER_CHUNK = 4096
_FIRST_SECOND = np.datetime64("2026-01-01T00:00:00", "s")
_NUM_SECONDS = 30 * 24 * 3600


@dataclass(frozen=True)
class Pool:
    """The products that annotators and sessions of one query can see, the annotated ones first."""

    row_M: NDArray[np.int64]
    grade_M: NDArray[np.int8]
    num_annotated: int


def query_id(row: int) -> str:
    """The id of a query by its row."""
    return f"Q{row:06d}"


def choose_annotated(
    recipe: MarketplaceRecipe,
    products: Products,
    query: tuple[int, Query],
    graded: tuple[NDArray[np.int64], NDArray[np.int8]],
) -> Pool:
    """Picks a query's annotated products: exact, partial, hard irrelevant (same department) and random ones.

    Args:
        recipe: how many products a query has, and the seed.
        products: the whole catalogue.
        query: the query's row and the query.
        graded: rows that could have a grade above 0, ascending, and their grades.
    """
    query_row, (row_n, grade_n) = query[0], graded
    department = TYPES[query[1].intent.type_id].department
    nearby = [products.of_type(t) for t, kind in enumerate(TYPES) if kind.department == department]
    hard_n = np.setdiff1d(np.concatenate(nearby), row_n[grade_n > 0])
    wanted, chosen = recipe.annotated_products_per_query, []
    for grade, share in _ANNOTATED_SHARES:
        candidate_n = hard_n if grade == 0 else row_n[grade_n == grade]
        chance_n = draw(recipe.seed, "annotated", _pair_key(query_row, candidate_n))[:, 0]
        chosen.append(candidate_n[np.argsort(chance_n)][: round(wanted * share)])
    anywhere = draw(recipe.seed, "random pair", np.array([query_row]), 4 * wanted)[0] * len(products.type_N)
    # Some queries have few matches: random products fill up what is missing.
    chosen_R = _distinct(np.concatenate([*chosen, anywhere.astype(np.int64)]))[:wanted]
    best_n = np.lexsort((row_n, -products.popularity_N[row_n], -grade_n))
    pool_M = _distinct(np.append(chosen_R, row_n[best_n[: wanted + _NUM_EXTRA_RESULTS]]))
    pool_M = pool_M[: len(chosen_R) + _NUM_EXTRA_RESULTS]
    at_M = np.searchsorted(row_n, pool_M).clip(max=len(row_n) - 1)
    grade_M = np.where(row_n[at_M] == pool_M, grade_n[at_M], 0).astype(np.int8)
    return Pool(pool_M, grade_M, len(chosen_R))


def annotate(recipe: MarketplaceRecipe, pools: Sequence[Pool]) -> tuple[pa.Table, pa.Table]:
    """The marks of all annotated pairs, and the planted errors among them."""
    query_R = np.repeat(np.arange(len(pools)), [pool.num_annotated for pool in pools])
    product_R = np.concatenate([pool.row_M[: pool.num_annotated] for pool in pools])
    grade_R = np.concatenate([pool.grade_M[: pool.num_annotated] for pool in pools])
    key_R = _pair_key(query_R, product_R)
    chance_R, direction_R = draw(recipe.seed, "planted", key_R, 2).T
    num_planted = round(recipe.planted_error_share * len(key_R))
    is_planted_R = np.zeros(len(key_R), bool)
    is_planted_R[np.argsort(chance_R, kind="stable")[:num_planted]] = True
    # Mostly the far grade: exact pairs marked 0 that shoppers love, irrelevant ones marked 2 they ignore.
    planted_R = _wrong_grade(grade_R, direction_R, far_share=0.7)
    seen_R = np.where(is_planted_R, planted_R, grade_R)

    num_marks, rate_A = recipe.marks_per_pair, np.array(recipe.annotator_error_rates)
    annotator_RK = np.argsort(draw(recipe.seed, "annotators", key_R, len(rate_A)), axis=1)[:, :num_marks]
    error_RK, kind_RK = np.split(draw(recipe.seed, "marks", key_R, 2 * num_marks), 2, axis=1)
    is_error_RK = (error_RK < rate_A[annotator_RK]) & ~is_planted_R[:, None]
    wrong_RK = _wrong_grade(np.repeat(seen_R[:, None], num_marks, axis=1), kind_RK, far_share=0.12)
    if recipe.annotator_kinds:
        blind_RK = np.floor(kind_RK * 3).astype(np.int8)
        by_kind = {"spammer": blind_RK, "high": seen_R[:, None] + 1, "low": seen_R[:, None] - 1}
        kind_A = np.array(recipe.annotator_kinds)
        for kind, given in by_kind.items():
            wrong_RK = np.where(kind_A[annotator_RK] == kind, np.clip(given, 0, 2), wrong_RK)
    mark = np.where(is_error_RK, wrong_RK, seen_R[:, None]).ravel().astype(np.int8)
    query_ids = pa.array([query_id(row) for row in query_R.tolist()])
    product_ids = pa.array([product_id(row) for row in product_R.tolist()])
    repeat = pa.array(np.repeat(np.arange(len(key_R)), num_marks))
    marks = pa.table(
        {
            "query_id": query_ids.take(repeat),
            "product_id": product_ids.take(repeat),
            "mark": pa.array(mark).cast(pa.string()),
            "scale": pa.repeat(SCALE, len(mark)),
            "num_marks": pa.repeat(1, len(mark)),
            "annotator": pa.array([f"A{row + 1:02d}" for row in annotator_RK.ravel().tolist()]),
            "grade": mark,
            "grade_value": mark.astype(np.float64),
        }
    )
    planted = pa.table(
        {
            "query_id": query_ids,
            "product_id": product_ids,
            "true_grade": grade_R,
            "planted_grade": planted_R.astype(np.int8),
        }
    ).filter(pa.array(is_planted_R))
    return marks, planted


def session_lines(
    recipe: MarketplaceRecipe, products: Products, pools: Sequence[Pool], counts: Counter[str]
) -> Iterator[str]:
    """The events as JSON lines, session by session; adds the number of each kind to `counts`."""
    num_queries = len(pools)
    popular_Q = np.argsort(draw(recipe.seed, "query popularity", np.arange(num_queries))[:, 0])
    share_Q = np.arange(1, num_queries + 1) ** -recipe.query_skew
    cumulative_Q = np.cumsum(share_Q) / share_Q.sum()
    padded = _pad(recipe, pools, products)
    for start in range(0, recipe.num_sessions, _SESSIONS_PER_CHUNK):
        session_S = np.arange(start, min(start + _SESSIONS_PER_CHUNK, recipe.num_sessions))
        draw_S2 = draw(recipe.seed, "session", session_S, 2)
        query_S = popular_Q[np.searchsorted(cumulative_Q, draw_S2[:, 0]).clip(max=num_queries - 1)]
        shown_SV, depth_SV = _search(recipe, padded, session_S, query_S)
        second_S = _FIRST_SECOND + (draw_S2[:, 1] * _NUM_SECONDS).astype("timedelta64[s]")
        yield from _event_lines((session_S, query_S, second_S), shown_SV, depth_SV, counts)


@dataclass(frozen=True)
class _PaddedPools:
    row_QM: NDArray[np.int64]
    grade_QM: NDArray[np.int8]
    popularity_QM: NDArray[np.float64]
    cheapness_QM: NDArray[np.float64]
    standing_QM: NDArray[np.float64]


def _gumbel(uniform: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(-np.log(-np.log(uniform.clip(1e-12, 1 - 1e-12))))


def _pad(recipe: MarketplaceRecipe, pools: Sequence[Pool], products: Products) -> _PaddedPools:
    """Pools as one rectangle; -1 where a query has fewer products."""
    row_QM = np.full((len(pools), max(len(pool.row_M) for pool in pools)), -1)
    grade_QM = np.zeros(row_QM.shape, np.int8)
    for row, pool in enumerate(pools):
        row_QM[row, : len(pool.row_M)] = pool.row_M
        grade_QM[row, : len(pool.row_M)] = pool.grade_M
    low_T, high_T = np.log(np.array([kind.price for kind in TYPES])).T
    type_QM = products.type_N[row_QM]
    log_price_QM = np.log(products.price_N[row_QM])
    cheapness_QM = 0.5 - (log_price_QM - low_T[type_QM]) / (high_T - low_T)[type_QM]
    standing_QM = _gumbel(draw(recipe.seed, "ranker", np.arange(len(pools)), row_QM.shape[1]))
    return _PaddedPools(row_QM, grade_QM, np.log(products.popularity_N[row_QM]), cheapness_QM, standing_QM)


def _search(
    recipe: MarketplaceRecipe, pools: _PaddedPools, session_S: NDArray[Any], query_S: NDArray[Any]
) -> tuple[NDArray[np.int64], NDArray[np.int8]]:
    """Products shown, -1 for none, and how far each went: 0 shown, 1 click, 2 cart, 3 purchase."""
    row_SM, grade_SM = pools.row_QM[query_S], pools.grade_QM[query_S]
    effect_SM = recipe.popularity_effect * pools.popularity_QM[query_S]
    uniform_SM = draw(recipe.seed, "rank", session_S, row_SM.shape[1])
    noise_SM = recipe.rank_noise * _gumbel(uniform_SM) + recipe.ranker_error * pools.standing_QM[query_S]
    score_SM = np.where(row_SM >= 0, 0.6 * grade_SM + effect_SM + noise_SM, -np.inf)
    order_SV = np.argsort(-score_SM, axis=1)[:, : recipe.results_per_session]
    shown_SV = np.take_along_axis(row_SM, order_SV, axis=1)
    grade_SV = np.take_along_axis(grade_SM, order_SV, axis=1)
    cheap_SV = np.exp(recipe.price_effect * np.take_along_axis(pools.cheapness_QM[query_S], order_SV, axis=1))
    # Popularity is at least 1; centred on its mean log of .8.
    liked_SV = np.exp(np.take_along_axis(effect_SM, order_SV, axis=1) - 0.8 * recipe.popularity_effect)
    examined_V = np.arange(1, order_SV.shape[1] + 1) ** -float(recipe.position_bias)
    click_SV = examined_V * (_CLICK_OF_GRADE[grade_SV] * cheap_SV * liked_SV).clip(max=0.95)
    chance_SVK = draw(recipe.seed, "act", session_S, 3 * order_SV.shape[1]).reshape(*order_SV.shape, 3)
    clicked_SV = (chance_SVK[..., 0] < click_SV) & (shown_SV >= 0)
    carted_SV = clicked_SV & (chance_SVK[..., 1] < _CART_OF_GRADE[grade_SV] * cheap_SV)
    bought_SV = carted_SV & (chance_SVK[..., 2] < _PURCHASE_OF_CART * cheap_SV)
    return shown_SV, clicked_SV.astype(np.int8) + carted_SV + bought_SV


def _event_lines(
    sessions: tuple[NDArray[Any], NDArray[Any], NDArray[Any]],
    shown_SV: NDArray[Any],
    depth_SV: NDArray[Any],
    counts: Counter[str],
) -> Iterator[str]:
    """Every id is plain ASCII without quotes, so the JSON is formatted directly."""
    for session, query, second, shown_V, depth_V in zip(
        *(column.tolist() for column in sessions), shown_SV.tolist(), depth_SV.tolist(), strict=True
    ):
        for position, (product, depth) in enumerate(zip(shown_V, depth_V, strict=True), start=1):
            if product < 0:
                continue
            for step, kind in enumerate(("impression", "click", "cart", "purchase")[: depth + 1]):
                counts[kind] += 1
                # Shoppers read downwards at two seconds a result and take a minute per further step.
                time = np.datetime64(second, "s") + (2 * position + 60 * step)
                yield (
                    f'{{"event_id": "S{session:08d}-{position:02d}-{kind}", "session_id": "S{session:08d}", '
                    f'"query_id": "{query_id(query)}", "product_id": "{product_id(product)}", '
                    f'"kind": "{kind}", "position": {position}, "event_time": "{time}Z"}}'
                )


def _wrong_grade(grade: NDArray[np.int8], uniform: NDArray[np.float64], far_share: float) -> NDArray[np.int8]:
    """A wrong grade in place of each: from 0 and 2 the opposite end with `far_share`, from 1 either end."""
    from_end = np.where(uniform < far_share, 2 - grade, 1)
    return np.where(grade == 1, np.where(uniform < 0.5, 0, 2), from_end).astype(np.int8)


def _pair_key(query_row: NDArray[Any] | int, product_row: NDArray[Any]) -> NDArray[np.int64]:
    return np.asarray(np.asarray(query_row, np.int64) * 2**40 + product_row)


def _distinct(row: NDArray[np.int64]) -> NDArray[np.int64]:
    """Rows without repetition, in the order of their first occurrence."""
    _, first = np.unique(row, return_index=True)
    return row[np.sort(first)]
