"""Ranking losses against float64 loops over the formulas, pair by pair, that share no code with them."""

import math

import pytest
import torch

from embeddings.graded_loss import with_in_batch
from embeddings.ranking_losses import (
    cosent_loss,
    infonce_loss,
    loss_by_grades,
    pairwise_logistic_loss,
    pooled_logistic_loss,
    rg_loss,
    triplet_loss,
)
from tests.graded_rows import random_rows, unpadded

FORMATS = [[2, 1, 0], [2, 0], [1, 0], [2, 1], [1], [3, 1, 0]]
TAU = torch.tensor(0.2, dtype=torch.float64)


def out_of(scores, grades):
    """Score and grade of the better one, then of the worse one, for each two of different grades."""
    rows = list(zip(scores, grades, strict=True))
    return [(*better, *worse) for better in rows for worse in rows if better[1] > worse[1]]


def infonce_by_hand(scores, grades):
    total = weight = 0.0
    for score, grade in zip(scores, grades, strict=True):
        negatives = [s for s, g in zip(scores, grades, strict=True) if g < grade]
        if grade > 0 and negatives:
            own = math.exp(score / 0.2)
            total -= grade * math.log(own / (own + sum(math.exp(s / 0.2) for s in negatives)))
            weight += grade
    return total / weight


def cosent_by_hand(scores, grades):
    return math.log(1 + sum(math.exp(20 * (low - high)) for high, _, low, _ in out_of(scores, grades)))


def triplet_by_hand(scores, grades):
    hinges = [max(0.1 * (g_high - g_low) - (high - low), 0) for high, g_high, low, g_low in out_of(scores, grades)]
    return sum(hinges) / len(hinges)


def logistic_by_hand(scores, grades):
    losses = [math.log(1 + math.exp(-20 * (high - low))) for high, _, low, _ in out_of(scores, grades)]
    return sum(losses) / len(losses)


def rg_by_hand(scores, grades, *, keep_interaction):
    logits = [score / 0.2 for score in scores]
    mean = sum(logits) / len(logits)
    loss = mean + sum(o * o for o in logits) / len(logits) / 2 - (mean**2 / 2 if keep_interaction else 0)
    return loss - sum(g * o for g, o in zip(grades, logits, strict=True)) / sum(grades)


LOSSES = {
    "infonce": (lambda s, g, **how: infonce_loss(s, g, TAU, **how), infonce_by_hand),
    "cosent": (cosent_loss, cosent_by_hand),
    "triplet": (triplet_loss, triplet_by_hand),
    "pairwise logistic": (pairwise_logistic_loss, logistic_by_hand),
    "rgx": (rg_loss, lambda s, g: rg_by_hand(s, g, keep_interaction=True)),
    "rg2": (
        lambda s, g, **how: rg_loss(s, g, keep_interaction=False, **how),
        lambda s, g: rg_by_hand(s, g, keep_interaction=False),
    ),
}
every_loss = pytest.mark.parametrize(("loss", "by_hand"), LOSSES.values(), ids=LOSSES)


@every_loss
@pytest.mark.parametrize("seed", range(5))
def test_a_loss_equals_its_formula(loss, by_hand, seed):
    similarity, grade = random_rows(FORMATS, seed)
    expected = [by_hand(scores, grades) for scores, grades in unpadded(similarity, grade) if len(set(grades)) > 1]

    assert loss(similarity, grade, reduction="sum").item() == pytest.approx(sum(expected), rel=1e-9)
    assert loss(similarity, grade).item() == pytest.approx(sum(expected) / len(expected), rel=1e-9)
    assert loss(similarity.bfloat16(), grade).dtype == torch.float32


@every_loss
def test_a_loss_passes_gradcheck(loss, by_hand):
    similarity, grade = random_rows(FORMATS, seed=7)
    assert torch.autograd.gradcheck(lambda s: loss(s, grade), (similarity.requires_grad_(),))


def test_infonce_passes_gradcheck_in_its_temperature():
    similarity, grade = random_rows(FORMATS, seed=8)
    tau = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: infonce_loss(similarity, grade, t), (tau,))


@every_loss
@pytest.mark.parametrize("padding", [float("nan"), float("inf"), 1e30])
def test_padding_changes_neither_loss_nor_gradient(loss, by_hand, padding):
    similarity, grade = random_rows(FORMATS, seed=11)
    grade[2] = -1
    found = []
    for scores in (similarity, similarity.masked_fill(grade < 0, padding)):
        leaf = scores.clone().requires_grad_()
        with torch.autograd.set_detect_anomaly(True):
            value = loss(leaf, grade)
            value.backward()
        found.append((value.detach(), leaf.grad))
    for clean, same in zip(*found, strict=True):
        torch.testing.assert_close(clean, same, rtol=0, atol=0)


@every_loss
@pytest.mark.parametrize("grades", [[2, 2, 2], [0, 0, 0], [1, -1, -1], [-1, -1, -1]])
def test_a_row_without_two_grades_gives_zero_with_zero_gradient(loss, by_hand, grades):
    similarity = torch.tensor([[0.3, 0.9, -0.4]], requires_grad=True)
    value = loss(similarity, torch.tensor([grades], dtype=torch.int8))
    value.backward()
    assert value.item() == 0
    assert (similarity.grad == 0).all()


@every_loss
def test_matrices_of_two_shapes_are_refused(loss, by_hand):
    with pytest.raises(ValueError, match="pad grades with -1"):
        loss(torch.zeros(2, 3), torch.zeros(2, 4, dtype=torch.int8))


def test_the_pooled_loss_compares_pairs_of_all_queries_and_counts_each_two_grades_alike():
    similarity, grade = random_rows(FORMATS, seed=3)
    rows = [pair for scores, grades in unpadded(similarity, grade) for pair in zip(scores, grades, strict=True)]
    by_grades = {}
    for high, g_high, low, g_low in out_of(*zip(*rows, strict=True)):
        by_grades.setdefault((g_high, g_low), []).append(math.log(1 + math.exp(-20 * (high - low))))
    assert len({len(losses) for losses in by_grades.values()}) > 1
    expected = sum(sum(losses) / len(losses) for losses in by_grades.values()) / len(by_grades)

    found = pooled_logistic_loss(similarity.flatten(), grade.flatten())

    assert found.item() == pytest.approx(expected, rel=1e-9)
    leaf = similarity.flatten().masked_fill(grade.flatten() < 0, math.nan).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda s: pooled_logistic_loss(s, grade.flatten()), (similarity.flatten().requires_grad_(),)
    )
    pooled_logistic_loss(leaf, grade.flatten()).backward()
    assert leaf.grad.isfinite().all()


def test_the_order_loss_of_each_two_grades_is_that_of_their_comparisons():
    similarity, grade = random_rows(FORMATS, seed=6)
    by_grades = {}
    for row in unpadded(similarity, grade):
        for high, g_high, low, g_low in out_of(*row):
            by_grades.setdefault((g_high, g_low), []).append(math.log(1 + math.exp(-20 * (high - low))))
    found = loss_by_grades(similarity.masked_fill(grade < 0, math.nan), grade)
    assert found == pytest.approx({key: sum(losses) / len(losses) for key, losses in by_grades.items()}, rel=1e-6)
    assert {(2, 1), (1, 0)} <= found.keys()


def test_a_focus_weighs_comparisons_that_are_far_in_order_less():
    similarity, grade = random_rows(FORMATS, seed=5)

    def focused(comparisons, focus):
        lags = [-20 * (high - low) for high, _, low, _ in comparisons]
        weights = [(1 / (1 + math.exp(-lag))) ** focus for lag in lags]
        return sum(w * math.log(1 + math.exp(lag)) for w, lag in zip(weights, lags, strict=True)) / sum(weights)

    rows = [list(out_of(*row)) for row in unpadded(similarity, grade)]
    expected = [focused(row, 2.0) for row in rows if row]
    found = pairwise_logistic_loss(similarity, grade, focus=2.0)
    assert found.item() == pytest.approx(sum(expected) / len(expected), rel=1e-9)
    assert found > pairwise_logistic_loss(similarity, grade)

    pairs = [pair for scores, grades in unpadded(similarity, grade) for pair in zip(scores, grades, strict=True)]
    by_grades = {}
    for comparison in out_of(*zip(*pairs, strict=True)):
        by_grades.setdefault((comparison[1], comparison[3]), []).append(comparison)
    expected = [focused(comparisons, 2.0) for comparisons in by_grades.values()]
    found = pooled_logistic_loss(similarity.flatten(), grade.flatten(), focus=2.0)
    assert found.item() == pytest.approx(sum(expected) / len(expected), rel=1e-9)


def test_a_focus_on_rows_in_perfect_order_stays_finite():
    leaf = torch.tensor([[40.0, -40.0]], requires_grad=True)
    grade = torch.tensor([[2, 0]], dtype=torch.int8)
    (pairwise_logistic_loss(leaf, grade, focus=3.0) + pooled_logistic_loss(leaf[0], grade[0], focus=3.0)).backward()
    assert leaf.grad.isfinite().all()


def test_the_pooled_loss_of_one_grade_is_zero_with_zero_gradient():
    leaf = torch.tensor([0.3, 0.9, 0.1], requires_grad=True)
    value = pooled_logistic_loss(leaf, torch.tensor([1, 1, -1], dtype=torch.int8))
    value.backward()
    assert value.item() == 0
    assert (leaf.grad == 0).all()
    with pytest.raises(ValueError, match="one shape"):
        pooled_logistic_loss(torch.zeros(3), torch.zeros(4, dtype=torch.int8))


def test_infonce_of_one_positive_and_other_queries_products_is_multiple_negatives_ranking():
    generator = torch.Generator().manual_seed(0)
    query, document = (
        torch.nn.functional.normalize(torch.randn(4, 8, generator=generator, dtype=torch.float64), dim=1)
        for _ in range(2)
    )
    similarity_QU = query @ document.T
    own_QP, grade_QP = similarity_QU.diagonal()[:, None], torch.ones(4, 1, dtype=torch.int8)
    is_foreign_QU = ~torch.eye(4, dtype=torch.bool)

    # no ceiling: even a product closer than the query's own is a negative
    found = infonce_loss(*with_in_batch(own_QP, grade_QP, similarity_QU, is_foreign_QU, None), TAU)

    expected = torch.nn.functional.cross_entropy(similarity_QU / TAU, torch.arange(4))
    torch.testing.assert_close(found, expected)


def test_cosent_of_one_query_is_that_of_sentence_transformers():
    from sentence_transformers.sentence_transformer.losses import CoSENTLoss

    similarity, grade = random_rows([[2, 1, 0]], seed=3, num_queries=1)
    is_there = grade[0] >= 0
    theirs = CoSENTLoss(None)
    scores, labels = similarity[0][is_there], grade[0][is_there].double()
    theirs.similarity_fct = lambda left, right: left
    expected = theirs.compute_loss_from_embeddings([scores, scores], labels)
    torch.testing.assert_close(cosent_loss(similarity, grade), expected, check_dtype=False, rtol=1e-6, atol=1e-6)
