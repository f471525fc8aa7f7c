"""Bands, bounds and draws, by hand."""

import numpy as np
import pytest

from conf.load import ConfigError, validate
from embeddings.mining import MiningRecipe, assign_bands, open_places, select_candidates, without_copies

KEY = ("shop", "q1")
ALL = np.ones(20, dtype=bool)


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
    places = select_candidates(KEY, ALL, recipe())
    assert places.tolist() == sorted(places)
    assert (places < 10).tolist() == [True] * 3 + [False] * 2


def test_places_that_are_not_open_are_never_drawn_and_do_not_count_against_the_caps():
    everything = recipe(max_hard_negatives_per_query=99, max_hard_positives_per_query=99)
    is_open = ALL.copy()
    is_open[[1, 14, 15]] = False
    assert select_candidates(KEY, is_open, everything).tolist() == np.flatnonzero(is_open).tolist()
    few = select_candidates(KEY, np.arange(20) >= 8, recipe())
    assert (few < 10).tolist() == [True] * 2 + [False] * 2


def test_caps_beyond_the_band_take_all_of_it_and_zero_takes_none():
    everything = recipe(max_hard_negatives_per_query=99, max_hard_positives_per_query=99)
    assert select_candidates(KEY, ALL, everything).tolist() == list(range(20))
    nothing = recipe(max_hard_negatives_per_query=0, max_hard_positives_per_query=0)
    assert select_candidates(KEY, ALL, nothing).size == 0


def test_places_past_the_depth_are_ignored_and_short_lists_keep_the_bands_of_the_depth():
    everything = recipe(depth=10, max_hard_negatives_per_query=99, max_hard_positives_per_query=99)
    assert select_candidates(KEY, ALL, everything).tolist() == list(range(10))
    one_tail = recipe(depth=10, max_hard_negatives_per_query=99, max_hard_positives_per_query=0)
    assert select_candidates(KEY, ALL[:6], one_tail).tolist() == list(range(5))
    assert select_candidates(KEY, ALL[:0], everything).size == 0


def test_the_draw_depends_on_seed_and_query_alone():
    draws = {
        (key, seed): tuple(select_candidates(key, ALL, recipe(seed=seed)))
        for key in (KEY, ("shop", "q2"), ("other", "q1"))
        for seed in (7, 8)
    }
    assert tuple(select_candidates(KEY, ALL, recipe())) == draws[KEY, 7]
    assert len(set(draws.values())) == len(draws)


def test_ranks_skipped_and_scores_outside_the_band_are_not_open():
    scores = np.linspace(0.9, 0.5, 5)[None]
    none = np.array([np.nan])
    assert open_places(scores, none, recipe(depth=5)).all()
    assert open_places(scores, none, recipe(depth=5, skip_top=2)).tolist() == [[False, False, True, True, True]]
    banded = recipe(depth=5, least_score=0.6, most_score=0.8)
    assert open_places(scores, none, banded).tolist() == [[False, True, True, True, False]]


@pytest.mark.parametrize(
    ("changes", "lowest", "is_open"),
    [
        ({"ceiling": 0.95}, 0.8, [False, False, True, True]),
        ({"ceiling": 1.0}, 0.8, [False, True, True, True]),
        ({"margin": 0.15}, 0.8, [False, False, False, True]),
        ({"ceiling": 0.95, "margin": 0.15}, 0.8, [False, False, False, True]),
        ({"ceiling": 0.5}, np.nan, [True, True, True, True]),
        ({"ceiling": 0.9}, -0.1, [False, False, False, True]),
    ],
)
def test_likely_positives_of_the_top_band_are_not_open(changes, lowest, is_open):
    """The last place is of the tail band, where a high cosine is no reason to leave a product out."""
    scores = np.array([[0.9, 0.8, 0.7, 0.69]])
    asked = recipe(depth=6, **changes)
    assert open_places(scores, np.array([lowest]), asked).tolist() == [is_open]


def test_copies_of_judged_and_of_better_ranked_products_are_left_out():
    angles = np.radians([0, 1, 40, 41, 80, 42])
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    judged = vectors[4:5]
    is_open = np.array([False, True, True, True, True, True])
    kept = without_copies(is_open, vectors, judged, 0.9995)
    assert kept.tolist() == [False, True, True, False, False, True]
    assert without_copies(is_open, vectors, judged[:0], 0.9995).tolist() == [False, True, True, False, True, True]


@pytest.mark.parametrize("key", ["depth", "skip_top", "ceiling", "least_score", "duplicate_cosine"])
def test_settings_out_of_range_are_refused(key):
    with pytest.raises(ConfigError, match=key):
        validate(MiningRecipe, {key: -3}, source="mining")
