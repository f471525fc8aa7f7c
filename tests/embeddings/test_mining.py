"""Bands and draws, by hand."""

import numpy as np
import pytest

from conf.load import ConfigError, validate
from embeddings.mining import MiningRecipe, assign_bands, select_candidates

KEY = ("shop", "q1")
PRODUCTS = [f"p{rank}" for rank in range(1, 21)]


def recipe(**changes):
    defaults = {"depth": 20, "max_hard_negatives_per_query": 3, "max_hard_positives_per_query": 2, "seed": 7}
    return MiningRecipe(**{**defaults, **changes})


@pytest.mark.parametrize(
    ("depth", "bands"),
    [(4, ["top", "top", "tail", "tail"]), (5, ["top", "top", "tail", "tail", "tail"]), (2, ["top", "tail"])],
)
def test_ranks_up_to_half_the_depth_are_the_top_band(depth, bands):
    assert assign_bands(np.arange(1, depth + 1), depth).tolist() == bands


@pytest.mark.parametrize("rank", [0, 101])
def test_ranks_outside_the_depth_are_refused(rank):
    with pytest.raises(ValueError, match=r"1\.\.100"):
        assign_bands([1, rank], 100)


def test_the_draw_respects_bands_and_caps_and_comes_by_rank():
    candidates = select_candidates(KEY, PRODUCTS, (), recipe=recipe())
    assert [c.band for c in candidates] == ["top"] * 3 + ["tail"] * 2
    assert [c.rank for c in candidates] == sorted(c.rank for c in candidates)
    for candidate in candidates:
        assert candidate.product_id == f"p{candidate.rank}"
        assert (candidate.band == "top") == (candidate.rank <= 10)


def test_graded_products_are_never_drawn_and_do_not_count_against_the_caps():
    judged = {"p2", "p15", "p16", "elsewhere"}
    everything = recipe(max_hard_negatives_per_query=99, max_hard_positives_per_query=99)
    drawn = [c.product_id for c in select_candidates(KEY, PRODUCTS, judged, recipe=everything)]
    assert drawn == [product for product in PRODUCTS if product not in judged]
    few = select_candidates(KEY, PRODUCTS, {f"p{rank}" for rank in range(1, 9)}, recipe=recipe())
    assert [c.band for c in few] == ["top"] * 2 + ["tail"] * 2


def test_caps_beyond_the_band_take_all_of_it_and_zero_takes_none():
    everything = recipe(max_hard_negatives_per_query=99, max_hard_positives_per_query=99)
    assert [c.product_id for c in select_candidates(KEY, PRODUCTS, (), recipe=everything)] == PRODUCTS
    nothing = recipe(max_hard_negatives_per_query=0, max_hard_positives_per_query=0)
    assert select_candidates(KEY, PRODUCTS, (), recipe=nothing) == []


def test_skipped_ranks_are_not_drawn():
    everything = recipe(max_hard_negatives_per_query=99, skip_top=3)
    ranks = [c.rank for c in select_candidates(KEY, PRODUCTS, (), recipe=everything) if c.band == "top"]
    assert ranks == [4, 5, 6, 7, 8, 9, 10]


def test_products_past_the_depth_are_ignored_and_short_lists_keep_the_bands_of_the_depth():
    everything = recipe(depth=10, max_hard_negatives_per_query=99, max_hard_positives_per_query=99)
    assert [c.rank for c in select_candidates(KEY, PRODUCTS, (), recipe=everything)] == list(range(1, 11))
    short = select_candidates(KEY, PRODUCTS[:6], (), recipe=everything)
    assert [c.band for c in short] == ["top"] * 5 + ["tail"]
    assert select_candidates(KEY, [], (), recipe=everything) == []


def test_the_draw_depends_on_seed_and_query_alone():
    draws = {
        key: select_candidates(key, PRODUCTS, (), recipe=recipe(seed=seed))
        for seed, *key_parts in ((7, "shop", "q1"), (7, "shop", "q2"), (7, "other", "q1"), (8, "shop", "q3"))
        for key in [tuple(key_parts)]
    }
    assert select_candidates(KEY, PRODUCTS, (), recipe=recipe()) == draws[KEY]
    assert len({tuple(draw) for draw in draws.values()}) == len(draws)
    assert draws[KEY] != select_candidates(KEY, PRODUCTS, (), recipe=recipe(seed=8))


def test_every_ungraded_product_of_a_band_can_be_drawn():
    drawn = {
        c.product_id for q in range(200) for c in select_candidates(("shop", str(q)), PRODUCTS, (), recipe=recipe())
    }
    assert drawn == set(PRODUCTS)


@pytest.mark.parametrize("wrong", [{"depth": 1}, {"depth": 4096}, {"skip_top": -1}, {"depht": 100}])
def test_recipes_out_of_bounds_are_refused(wrong):
    with pytest.raises(ConfigError):
        validate(MiningRecipe, wrong, source="test")
