import dataclasses
import itertools

import numpy as np
import pytest

from embeddings.batches import (
    PADDING,
    BatchRecipe,
    Instance,
    InstanceSampler,
    collate,
    collate_part,
    draw_products,
    stable_seed,
)


def instance(number, grades, query=None):
    products = [f"product {number}-{place}" for place in range(len(grades))]
    return Instance(("shop", str(number)), query or f"query {number}", products, np.array(grades, dtype=np.int8))


def keys(instances):
    return [each.key for each in instances]


INSTANCES = [instance(number, [2, 1, 0][: 2 + number % 2]) for number in range(10)]


def test_every_instance_comes_once_per_epoch_in_another_order():
    sampler = InstanceSampler(INSTANCES, BatchRecipe(queries_per_step=4), seed=3)
    seen = [key for step in range(5) for key in keys(sampler.step_instances(step, 0, 1))]
    assert sorted(seen[:10]) == sorted(seen[10:]) == keys(INSTANCES)
    assert seen[:10] != seen[10:]


def test_workers_share_the_step_of_a_single_one():
    sampler = InstanceSampler(INSTANCES, BatchRecipe(queries_per_step=5), seed=3)
    for step in range(4):
        alone = keys(sampler.step_instances(step, 0, 1))
        for world_size in (2, 3):
            parts = [keys(sampler.step_instances(step, rank, world_size)) for rank in range(world_size)]
            assert sorted(key for part in parts for key in part) == sorted(alone)


def test_a_step_depends_on_seed_and_step_only():
    first, second = (InstanceSampler(INSTANCES, BatchRecipe(queries_per_step=4), seed=1) for _ in range(2))
    first.step_instances(0, 0, 1)
    assert keys(first.step_instances(7, 0, 1)) == keys(second.step_instances(7, 0, 1))
    other = InstanceSampler(INSTANCES, BatchRecipe(queries_per_step=4), seed=2)
    assert keys(first.step_instances(7, 0, 1)) != keys(other.step_instances(7, 0, 1))


def test_instances_of_one_grade_are_left_out_and_none_left_is_an_error():
    sampler = InstanceSampler([*INSTANCES, instance(99, [1, 1])], BatchRecipe(), seed=0)
    assert keys(sampler.instances) == keys(INSTANCES)
    with pytest.raises(ValueError, match="two grades under a query"):
        InstanceSampler([instance(99, [1, 1])], BatchRecipe(), seed=0)


def test_more_workers_than_queries_are_refused():
    with pytest.raises(ValueError, match="queries_per_step"):
        InstanceSampler(INSTANCES, BatchRecipe(queries_per_step=2), seed=0).step_instances(0, 0, 3)


def long_texts(texts, side):
    """Two tokens a query, of products a number of its own."""
    return np.array([2 if side == "query" else 3 + int(text.split("-")[1]) for text in texts])


def drawn_tokens(drawn):
    return sum(2 + long_texts([*one.products, *one.contrasts], "document").sum() for one in drawn)


def test_a_step_holds_as_many_whole_instances_as_its_tokens_allow():
    instances = [instance(number, [2, 1, 0, 0, 0, 0][: 2 + number % 5]) for number in range(40)]
    instances[7] = dataclasses.replace(instances[7], contrasts=[f"near {place}-{place}" for place in range(9)])
    recipe = BatchRecipe(queries_per_step=6, tokens_per_step=80, max_products_per_query=4, contrasts_per_query=2)
    sampler = InstanceSampler(instances, recipe, seed=0, count=long_texts)
    count = sampler.num_steps(2.0)
    steps = [sampler.step_instances(step, 0, 1) for step in range(count)]
    seen = [key for step in steps for key in keys(step)]
    assert sorted(seen[:40]) == sorted(seen[40:80]) == sorted(keys(instances))
    assert len(seen) - len(steps[-1]) < 80
    assert max(map(drawn_tokens, steps)) <= 80
    assert {len(step) for step in steps} > {4}
    # one more would not have fitted, or would have been too many queries
    largest = [2 + sum(sorted(long_texts(one.products, "document"))[-4:]) for one in instances]
    largest[7] += 11 + 10
    for step, following in itertools.pairwise(steps):
        wanted = sum(largest[int(one.key[1])] for one in [*step, following[0]])
        assert len(step) == 6 or wanted > 80
    # whichever step is asked for first, however many workers there are
    again = InstanceSampler(instances, recipe, seed=0, count=long_texts)
    for rank in range(2):
        assert keys(again.step_instances(count - 2, rank, 2)) == keys(steps[-2])[rank::2]


def test_tokens_that_hold_no_instance_or_no_worker_are_refused():
    few = BatchRecipe(tokens_per_step=13)
    with pytest.raises(ValueError, match="an instance may have 14 tokens; raise it, or lower max_products_per_query"):
        InstanceSampler(INSTANCES, few, seed=0, count=long_texts)
    with pytest.raises(ValueError, match="expected a count of tokens"):
        InstanceSampler(INSTANCES, few, seed=0)
    enough = InstanceSampler(INSTANCES, BatchRecipe(tokens_per_step=14), seed=0, count=long_texts)
    with pytest.raises(ValueError, match=r"and tokens_per_step: expected .* each of 2 workers, got 1 in step 0"):
        enough.step_instances(0, 0, 2)


def test_a_curriculum_brings_grade_1_in_over_its_epochs():
    instances = [instance(number, [2, 1, 0]) for number in range(40)] + [instance(99, [2, 1])]
    recipe = BatchRecipe(queries_per_step=41, curriculum_epochs=2)
    sampler = InstanceSampler(instances, recipe, seed=0)
    with_middle = []
    for epoch in range(3):
        drawn = sampler.step_instances(epoch, 0, 1)
        # what has no grade 0 keeps its grade 1, and nothing that is left out counts as ungraded
        assert all(set(each.grades) == {1, 2} for each in drawn if each.key[1] == "99")
        assert all({2, 0} <= set(each.grades) for each in drawn if each.key[1] != "99")
        assert all(len(each.products) + len(each.left_out) == 3 for each in drawn if each.key[1] != "99")
        with_middle.append(sum(1 in each.grades for each in drawn) - 1)
    assert 2 < with_middle[0] < 20 < with_middle[1] < 38
    assert with_middle[2] == 40
    again = InstanceSampler(instances, recipe, seed=0).step_instances(1, 0, 1)
    assert [each.products for each in again] == [each.products for each in sampler.step_instances(1, 0, 1)]


def test_contrasts_are_drawn_anew_each_epoch_and_hold_no_grade():
    whole = dataclasses.replace(instance(0, [2, 1, 0]), contrasts=[f"near {place}" for place in range(9)])
    other = dataclasses.replace(instance(1, [2, 0]), contrasts=[whole.products[1], "near 3"])
    sampler = InstanceSampler([whole, other], BatchRecipe(queries_per_step=2, contrasts_per_query=4), seed=0)
    steps = [{one.key: one for one in sampler.step_instances(step, 0, 1)} for step in range(2)]
    drawn = [step[whole.key].contrasts for step in steps]
    assert all(len(set(texts)) == 4 and set(texts) <= set(whole.contrasts) for texts in drawn)
    assert drawn[0] != drawn[1]
    assert [step[whole.key].products for step in steps] == [whole.products] * 2

    batch = collate([steps[0][whole.key], steps[0][other.key]])

    assert len(batch.document_texts) == len(set(batch.document_texts))
    foreign = [
        {text for text, is_so in zip(batch.document_texts, row, strict=True) if is_so} for row in batch.is_foreign
    ]
    assert foreign[0] == ({*other.products, *other.contrasts} | set(drawn[0])) - set(whole.products)
    assert foreign[1] == ({*whole.products, *drawn[0], *other.contrasts}) - set(other.products)
    assert batch.grades.tolist() == [[2, 1, 0], [2, 0, -1]]
    none = InstanceSampler([whole], BatchRecipe(contrasts_per_query=0), seed=0).step_instances(0, 0, 1)
    assert none[0].contrasts == []


def test_products_without_a_grade_are_drawn_beside_the_graded_and_have_shares_alone():
    graded = instance(0, [2, 1, 0, 0, 0])
    soft = [f"near {place}" for place in range(6)]
    whole = dataclasses.replace(
        graded,
        products=[*soft[:3], *graded.products, *soft[3:]],
        grades=np.array([-1] * 3 + graded.grades.tolist() + [-1] * 3, dtype=np.int8),
        shares=np.linspace(0.1, 0.9, 22, dtype=np.float32).reshape(11, 2),
    )
    share = dict(zip(whole.products, whole.shares.tolist(), strict=True))
    plain = BatchRecipe(max_products_per_query=3, soft_per_query=0)
    assert list(draw_products(whole, plain, 5).products) == list(draw_products(graded, plain, 5).products)

    drawn = [draw_products(whole, dataclasses.replace(plain, soft_per_query=4), seed) for seed in range(5)]

    for seed, one in enumerate(drawn):
        is_soft = one.grades < 0
        products = np.array(one.products)
        assert products[~is_soft].tolist() == list(draw_products(graded, plain, seed).products)
        assert len(set(products[is_soft])) == 4
        assert set(products[is_soft]) <= set(soft)
        assert np.isnan(one.shares[~is_soft]).all()
        assert one.shares[is_soft].tolist() == [share[text] for text in products[is_soft]]
        assert {*one.products, *one.left_out} == set(whole.products)
    assert len({tuple(one.products) for one in drawn}) > 1
    batch = collate([drawn[0]])
    assert not batch.is_foreign.any()
    assert sorted(batch.grades[0].tolist()) == [-1, -1, -1, -1, 0, 1, 2]


def test_an_instance_of_products_without_a_grade_teaches_no_order():
    bare = dataclasses.replace(
        instance(1, [2, 0]), grades=np.array([-1, -1], dtype=np.int8), shares=np.full((2, 2), 0.5, dtype=np.float32)
    )
    recipe = BatchRecipe(queries_per_step=1, soft_per_query=2)
    for needs_contrast in (True, False):
        sampler = InstanceSampler([instance(0, [2, 0]), bare], recipe, seed=0, needs_contrast=needs_contrast)
        assert [one.key for one in sampler.instances] == [instance(0, [2, 0]).key]


def test_a_product_of_shares_alone_may_be_a_contrast_of_its_query_drawn_or_not():
    bare = dataclasses.replace(
        instance(1, [2, 0, 0, 0]),
        grades=np.array([2, -1, -1, -1], dtype=np.int8),
        shares=np.full((4, 2), 0.5, dtype=np.float32),
    )
    contrast, *rest = bare.products[1:]
    bare = dataclasses.replace(bare, contrasts=[contrast])
    recipe = BatchRecipe(queries_per_step=1, soft_per_query=1)
    sampler = InstanceSampler([bare], recipe, seed=0, needs_contrast=False)
    seen = set()
    for step in range(8):
        (drawn,) = sampler.step_instances(step, 0, 1)
        batch = collate([drawn])
        foreign = [
            text for text, is_foreign in zip(batch.document_texts, batch.is_foreign[0], strict=True) if is_foreign
        ]
        assert foreign == [contrast]
        assert len(batch.document_texts) == len(set(batch.document_texts)) <= 3
        seen.update(drawn.products[1:])
    assert seen == {contrast, *rest}

    others = [dataclasses.replace(instance(0, [2]), products=[text]) for text in (contrast, rest[0])]
    batch = collate_part([[bare], others], 0)
    column = batch.document_texts.index(contrast)
    assert batch.is_foreign[0].tolist() == [place == column for place in range(batch.is_foreign.shape[1])]


def test_another_worker_s_contrasts_are_foreign_here_too():
    parts = [
        [dataclasses.replace(instance(0, [2, 0]), contrasts=["near"])],
        [dataclasses.replace(instance(1, [2, 0]), contrasts=["far"])],
    ]
    batch = collate_part(parts, 0)
    assert batch.document_texts == [*parts[0][0].products, "near"]
    assert batch.is_foreign.tolist() == [[False, False, True, True, True, True]]


def test_alike_queries_stand_together_in_every_epoch():
    instances = [instance(number, [2, 0], query=f"{word} {number}") for number, word in enumerate("abcd" * 5)]
    asked = []

    def encode(texts):
        asked.append(list(texts))
        return np.array([[float(text[0] == word) for word in "abcd"] for text in texts], dtype=np.float32)

    recipe = BatchRecipe(queries_per_step=10, alike_queries=5)
    sampler = InstanceSampler(instances, recipe, seed=0, encode=encode)

    steps = [sampler.step_instances(step, 0, 1) for step in range(6)]

    assert asked == [[one.query for one in instances]]
    runs = [["".join(one.query[0] for one in step[:5]), "".join(one.query[0] for one in step[5:])] for step in steps]
    assert all(len(set(run)) == 1 for step in runs for run in step)
    epochs = [keys(steps[start] + steps[start + 1]) for start in (0, 2, 4)]
    assert all(sorted(epoch) == sorted(keys(instances)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    halves = [sampler.step_instances(3, rank, 2) for rank in (0, 1)]
    assert keys(steps[3]) == keys([one for both in zip(*halves, strict=True) for one in both])
    with pytest.raises(ValueError, match="expected an encoder"):
        InstanceSampler(instances, recipe, seed=0).step_instances(0, 0, 1)


@pytest.mark.parametrize("grades", [[2] + [0] * 40, [1] * 40 + [0], [2] * 30 + [1], [2] + [1] * 20 + [0] * 20])
def test_a_draw_holds_every_grade_of_its_instance(grades):
    recipe = BatchRecipe(max_products_per_query=4)
    for seed in range(30):
        drawn = draw_products(instance(0, grades), recipe, seed)
        assert len(drawn.products) == len(drawn.grades) == len(set(drawn.products)) == 4
        assert set(drawn.grades.tolist()) == set(grades)


def test_a_draw_aims_at_the_share_of_irrelevant_and_fills_up_with_others():
    recipe = BatchRecipe(max_products_per_query=10, share_irrelevant=0.7)
    many = draw_products(instance(0, [2] * 30 + [1] * 30 + [0] * 30), recipe, 5)
    assert (many.grades == 0).sum() == 7
    few = draw_products(instance(0, [2] * 30 + [0] * 2), recipe, 5)
    assert (few.grades == 0).sum() == 2
    assert len(few.products) == 10


def test_drawn_products_keep_their_grades_and_differ_between_epochs():
    whole = instance(0, [2, 1, 0] * 10)
    grade = dict(zip(whole.products, whole.grades.tolist(), strict=True))
    draws = [draw_products(whole, BatchRecipe(), stable_seed(0, epoch, *whole.key)) for epoch in range(2)]
    for drawn in draws:
        assert [grade[text] for text in drawn.products] == drawn.grades.tolist()
    assert draws[0].products != draws[1].products


def test_collate_holds_each_text_once_and_pads():
    shared = [
        Instance(("a", "1"), "lamp", ["x", "y", "z"], np.array([2, 0, 1], dtype=np.int8)),
        Instance(("b", "1"), "lamp", ["z", "w"], np.array([0, 2], dtype=np.int8)),
    ]
    batch = collate(shared)
    assert batch.query_texts == ["lamp"]
    assert batch.document_texts == ["x", "y", "z", "w"]
    assert batch.query_index.tolist() == [0, 0]
    assert batch.document_index.tolist() == [[0, 1, 2], [2, 3, PADDING]]
    assert batch.grades.tolist() == [[2, 0, 1], [0, 2, PADDING]]
    assert batch.grades.dtype == np.int8


def test_products_of_other_queries_are_foreign_unless_graded_under_this_one():
    step = [
        Instance(("a", "1"), "lamp", ["x"], np.array([2], dtype=np.int8), left_out=["y", "not in this step"]),
        Instance(("a", "2"), "hose", ["y", "z"], np.array([2, 0], dtype=np.int8)),
        Instance(("b", "1"), "lamp", ["w"], np.array([1], dtype=np.int8)),
    ]
    batch = collate(step)
    assert batch.document_texts == ["x", "y", "z", "w"]
    assert batch.is_foreign.tolist() == [
        [False, False, True, False],
        [True, False, False, True],
        [False, False, True, False],
    ]


def test_what_is_not_drawn_stays_known_as_graded():
    whole = instance(0, [2, 1, 0] * 10)
    whole = Instance(whole.key, whole.query, whole.products, whole.grades, left_out=["skipped"])
    drawn = draw_products(whole, BatchRecipe(max_products_per_query=4), 3)
    assert drawn.left_out[0] == "skipped"
    assert sorted([*drawn.products, *drawn.left_out[1:]]) == sorted(whole.products)


@pytest.mark.parametrize(("share", "kept"), [(0.0, 10), (0.2, 10), (0.5, 6), (0.8, 3), (1.0, 3)])
def test_instances_without_grade_0_are_left_out_down_to_their_share(share, kept):
    some = [instance(number, [2, 1, 0] if number % 3 == 1 else [2, 1]) for number in range(10)]
    samplers = [InstanceSampler(some, BatchRecipe(share_with_irrelevant=share), seed) for seed in (0, 0, 1)]
    chosen = [[each.key for each in sampler.instances] for sampler in samplers]
    assert len(chosen[0]) == kept
    assert chosen[0] == chosen[1] == sorted(chosen[0], key=lambda key: int(key[1]))
    assert {some[1].key, some[4].key, some[7].key} <= set(chosen[0])
    assert (chosen[0] != chosen[2]) == (3 < kept < 10)
    without = [instance(number, [2, 1]) for number in range(4)]
    assert len(InstanceSampler(without, BatchRecipe(share_with_irrelevant=share), 0).instances) == 4


def test_a_draw_holds_at_most_so_many_of_a_grade():
    whole = instance(1, [2, 2, 2, 1, 1, 0, 0, 0, 0])
    recipe = BatchRecipe(max_products_per_query=5, max_per_grade=(2, 0, 1))

    for seed in range(5):
        drawn = draw_products(whole, recipe, seed)
        assert sorted(drawn.grades.tolist()) == [0, 0, 2]
        assert sorted([*drawn.products, *drawn.left_out]) == sorted(whole.products)
    everything = BatchRecipe(max_products_per_query=20, max_per_grade=(9, 9, 9))
    assert draw_products(whole, everything, 0) is whole
    # a grade without a place in the draw is no contrast
    with pytest.raises(ValueError, match="two grades"):
        InstanceSampler([instance(1, [2, 1])], recipe, seed=0)
    for limits in ((0, 0, 0), (-1, 1, 1)):
        with pytest.raises(ValueError, match="max_per_grade"):
            BatchRecipe(max_per_grade=limits)


def test_without_a_need_for_contrast_an_instance_with_a_positive_counts():
    instances = [instance(1, [2, 2]), instance(2, [0, 0]), instance(3, [2, 0])]
    kept = InstanceSampler(instances, BatchRecipe(), seed=0, needs_contrast=False).instances
    assert [one.key[1] for one in kept] == ["1", "3"]
    assert [one.key[1] for one in InstanceSampler(instances, BatchRecipe(), seed=0).instances] == ["3"]


def test_shares_go_with_their_products():
    shares = np.array([[0.9, 0.8], [0.5, 0.1], [0.2, 0.0]], dtype=np.float32)
    soft = Instance(("a", "1"), "lamp", ["x", "y", "z"], np.array([2, 1, 0], dtype=np.int8), shares)
    clean = Instance(("a", "2"), "hose", ["y"], np.array([2], dtype=np.int8))

    batch = collate([soft, clean])
    drawn = draw_products(soft, BatchRecipe(max_per_grade=(1, 0, 1)), 0)

    np.testing.assert_allclose(batch.shares[0], shares)
    assert batch.shares[1].tolist()[0] == [1, 1]
    assert np.isnan(batch.shares[1, 1:]).all()
    assert dict(zip(drawn.products, drawn.known_shares.tolist(), strict=True)) == {
        "x": pytest.approx([0.9, 0.8]),
        "z": pytest.approx([0.2, 0.0]),
    }


def test_a_worker_knows_which_products_of_others_are_foreign_to_its_queries():
    def of(number, query, products, left_out=()):
        return Instance(
            ("a", str(number)), query, products, np.array([2, 0][: len(products)], dtype=np.int8), None, left_out
        )

    own = [of(1, "lamp", ["x", "y"], ["v"]), of(2, "hose", ["y", "z"])]
    others = [[of(3, "rug", ["w", "x"])], [of(4, "sofa", ["v", "w"])]]

    batch = collate_part([others[0], own, others[1]], 1)

    # x is this worker's own; w is taken from the first that has it
    elsewhere = batch.elsewhere
    assert list(zip(elsewhere.rank_V.tolist(), elsewhere.row_V.tolist(), strict=True)) == [(0, 0), (2, 0)]
    assert elsewhere.most == 3
    # (rug, w), (rug, x), (sofa, v), (sofa, w)
    assert elsewhere.pair_M3.tolist() == [[0, 0, 0], [0, 0, 1], [2, 0, 0], [2, 0, 1]]
    assert elsewhere.grade_M.tolist() == [2, 0, 2, 0]
    assert elsewhere.most_queries == 2
    assert batch.document_texts == ["x", "y", "z"]
    assert batch.is_foreign.tolist() == [[False, False, True, True, False], [True, False, False, True, True]]
    alone = collate_part([own], 0)
    assert alone.elsewhere.rank_V.shape == alone.elsewhere.row_V.shape == alone.elsewhere.grade_M.shape == (0,)
    assert alone.is_foreign.shape == (2, 3)
