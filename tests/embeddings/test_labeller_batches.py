from collections import Counter

import numpy as np
import pytest

from embeddings.labeller import LabellerRecipe
from embeddings.labeller_batches import epoch_batches, groups_of, part_of, preferences_of

QUERIES = [f"query {row // 4}" for row in range(100)]
LENGTHS = [3 + row % 11 for row in range(100)]


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_an_epoch_holds_every_pair_once_and_depends_on_seed_and_epoch_alone(weight):
    recipe = LabellerRecipe(batch_size=7, preference_weight=weight)
    groups = groups_of(QUERIES, recipe)

    batches = epoch_batches(LENGTHS, groups, recipe, 3)

    assert sorted(row for batch in batches for row in batch) == list(range(100))
    assert len(batches) == 15
    assert batches == epoch_batches(LENGTHS, groups, recipe, 3) != epoch_batches(LENGTHS, groups, recipe, 4)


def test_with_preferences_a_querys_pairs_stand_together_and_without_they_do_not():
    def most_of_one_query(weight):
        recipe = LabellerRecipe(batch_size=8, preference_weight=weight)
        batches = epoch_batches(LENGTHS, groups_of(QUERIES, recipe), recipe, 0)
        return np.mean([max(Counter(QUERIES[row] for row in batch).values()) for batch in batches])

    assert most_of_one_query(0.5) > 3.5
    assert most_of_one_query(0.0) < 3


@pytest.mark.parametrize("weight", [0.0, 0.5])
@pytest.mark.parametrize("world_size", [1, 3])
def test_workers_share_a_batch_and_no_group_is_parted(weight, world_size):
    recipe = LabellerRecipe(batch_size=16, preference_weight=weight)
    groups = groups_of(QUERIES, recipe)
    batch = epoch_batches(LENGTHS, groups, recipe, 0)[0]

    parts = [part_of(batch, groups, rank, world_size) for rank in range(world_size)]

    assert sorted(row for part in parts for row in part) == sorted(batch)
    owner = {}
    for rank, part in enumerate(parts):
        assert all(owner.setdefault(groups[row], rank) == rank for row in part)
    if not weight:
        assert parts == [batch[rank::world_size] for rank in range(world_size)]


def test_a_product_is_preferred_within_its_query_from_half_a_grade_on():
    values = np.array([2.0, 1.0, 0.0, 0.25, 1.75, 2.0])
    groups = np.array([0, 0, 0, 0, 0, 1])

    found = preferences_of([5, 0, 1, 2, 3, 4], values, groups, 0.25)

    pairs = list(zip(found.better_P.tolist(), found.worse_P.tolist(), strict=True))
    assert sorted(pairs) == [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (4, 1), (4, 2), (4, 3)]
    weight = dict(zip(pairs, found.weight_P.tolist(), strict=True))
    # wide: from 1.5 grades on
    assert {pair for pair, value in weight.items() if value == pytest.approx(0.25 / 4)} == {
        (0, 2),
        (0, 3),
        (4, 2),
        (4, 3),
    }
    assert sum(weight.values()) == pytest.approx(1)


def test_one_kind_of_preference_has_all_the_weight_and_a_worker_those_of_its_rows():
    values, groups = np.array([2.0, 1.0, 1.0, 0.0, 2.0, 2.0]), np.array([0, 0, 1, 1, 2, 2])

    found = preferences_of(range(6), values, groups, 0.5)
    own = found.of([4, 3, 2])

    assert found.weight_P.tolist() == [0.5, 0.5]
    assert (own.better_P.tolist(), own.worse_P.tolist(), own.weight_P.tolist()) == ([2], [1], [0.5])
    assert len(found.of([0]).weight_P) == 0
    assert len(preferences_of([4, 5], values, groups, 0.5).weight_P) == 0
