from typing import get_args

import pytest
import torch
from torch.nn.functional import normalize

from embeddings.graded_loss import GradedLoss, StepTargets, background_loss, with_in_batch
from embeddings.losses import circle_loss, supcon_loss
from embeddings.recipes import GradeMargins, LossName, LossRecipe, LossTerm


def step(seed=0, num_queries=3, num_products=9, width=16):
    """Vectors of a step in which each query has four of nine products, the last one of the first query padded."""
    generator = torch.Generator().manual_seed(seed)
    query, document = (
        normalize(torch.randn(count, width, generator=generator, dtype=torch.float64), dim=1).requires_grad_()
        for count in (num_queries, num_products)
    )
    index = torch.stack([torch.randperm(num_products, generator=generator)[:4] for _ in range(num_queries)])
    grade = torch.tensor([[2, 1, 0, -1], [2, 0, 0, 1], [1, 0, 2, 2]], dtype=torch.int8)
    index[grade < 0] = -1
    share = torch.rand(num_queries, 4, 1, generator=generator, dtype=torch.float64) * torch.tensor([1.0, 0.5])
    share[grade < 0] = torch.nan
    foreign = torch.ones(num_queries, num_products, dtype=torch.bool)
    for row, own in enumerate(index):
        foreign[row, own[own >= 0]] = False
    return query, document, StepTargets(index, grade, share, foreign)


def test_a_sum_is_that_of_its_terms_times_their_weights():
    query, document, targets = step()
    names = get_args(LossName)
    alone = {
        name: GradedLoss(LossRecipe(), [LossTerm(loss=name)]).double()(query, document, targets)[0].item()
        for name in names
    }
    terms = [LossTerm(loss=name, weight=0.5 + place) for place, name in enumerate(names)]

    total, cosine_QP, parts = GradedLoss(LossRecipe(), terms).double()(query, document, targets)

    assert all(value != 0 for value in alone.values())
    for place, (name, part) in enumerate(parts.items()):
        assert part.item() == pytest.approx((0.5 + place) * alone[name]), name
    assert total.item() == pytest.approx(sum(part.item() for part in parts.values()))
    expected = (query[1] * document[targets.document_index_QP[1, 2]]).sum()
    torch.testing.assert_close(cosine_QP[1, 2], expected)


def test_gradients_of_every_term_reach_the_vectors_and_what_it_learns():
    query, document, targets = step()
    terms = [LossTerm(loss=name) for name in get_args(LossName)]
    loss = GradedLoss(LossRecipe(matryoshka=(4, 8)), terms).double()

    def whole(query_QD, document_UD):
        return loss(query_QD, document_UD, targets)[0]

    whole(query, document).backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in loss.parameters())
    # the circle's weights are constants by definition, so finite differences would see more
    smooth = GradedLoss(LossRecipe(matryoshka=(4, 8)), [term for term in terms if term.loss != "circle"]).double()
    assert torch.autograd.gradcheck(lambda q, d: smooth(q, d, targets)[0], (query, document))


def test_shorter_widths_are_vectors_of_their_own():
    query, document, targets = step()
    terms = [LossTerm(loss="supcon"), LossTerm(loss="circle", weight=0.5)]

    whole, _, _ = GradedLoss(LossRecipe(matryoshka=(4,)), terms).double()(query, document, targets)

    expected = 0.0
    for width in (4, 16):
        short = [normalize(part[:, :width], dim=1) for part in (query, document)]
        cosine_QP = (short[0] @ short[1].T).gather(1, targets.document_index_QP.clamp(min=0))
        expected += supcon_loss(cosine_QP, targets.grade_QP, torch.tensor(0.2, dtype=torch.float64)).item()
        expected += 0.5 * circle_loss(cosine_QP, targets.grade_QP, GradeMargins(), reduction="sum").item()
    assert whole.item() == pytest.approx(expected)
    with pytest.raises(ValueError, match="widths below the vectors' 16, got 32"):
        GradedLoss(LossRecipe(matryoshka=(32,)), terms).double()(query, document, targets)


def test_a_term_without_anything_to_learn_leaves_the_temperature_alone():
    assert not GradedLoss(LossRecipe(), [LossTerm(loss="cosent")]).log_temperature.requires_grad
    assert GradedLoss(LossRecipe(), [LossTerm(loss="infonce")]).log_temperature.requires_grad


def test_in_batch_negatives_stand_below_the_ceiling_and_have_no_grade():
    own, grade = torch.tensor([[0.8, 0.2], [0.4, 0.1]]), torch.tensor([[2, 0], [0, -1]], dtype=torch.int8)
    every = torch.tensor([[0.8, 0.2, 0.73, 0.71, 0.3], [0.4, 0.9, 0.1, 0.2, -0.5]], requires_grad=True)
    is_foreign = torch.tensor([[False, False, True, True, False], [False, True, True, True, True]])

    similarity, grades = with_in_batch(own, grade, every, is_foreign, 0.9)

    # .73 is too near to the positive's .8; the fifth is graded under the query; the second query has no positive
    assert grades.tolist() == [[2, 0, -1, -1, -1, 0, -1], [0, -1, -1, -1, -1, -1, -1]]
    assert torch.equal(similarity, torch.cat([own, every], dim=1))
    supcon_loss(similarity, grades, torch.tensor(0.1)).backward()
    assert (every.grad != 0).tolist() == [[False, False, False, True, False], [False] * 5]
    _, unguarded = with_in_batch(own, grade, every, is_foreign, None)
    assert unguarded.tolist() == [[2, 0, -1, -1, 0, 0, -1], [0, -1, -1, -1, -1, -1, -1]]


def test_in_batch_products_enter_only_the_terms_that_ask_for_them():
    query, document, targets = step()

    def total(*terms):
        return GradedLoss(LossRecipe(), terms).double()(query, document, targets)[0].item()

    supcon, seen = LossTerm(loss="supcon"), LossTerm(loss="supcon", in_batch=True)
    circle = LossTerm(loss="circle")
    assert total(seen) > total(supcon)
    assert total(circle, seen) - total(circle, supcon) == pytest.approx(total(seen) - total(supcon))


def test_background_is_the_squared_distance_of_a_querys_mean():
    similarity = torch.tensor([[0.5, 0.1, 0.3], [0.2, 0.2, 0.9]])
    foreign = torch.tensor([[False, True, True], [False, False, False]])
    assert background_loss(similarity, foreign, 0.05).item() == pytest.approx((0.2 - 0.05) ** 2)
