"""Losses against a float64 loop over the paper's formulas, pair by pair, that shares no code with them."""

import math
from itertools import pairwise

import pytest
import torch

from conf.load import ConfigError, fingerprint, validate
from embeddings.losses import circle_loss, lexical_loss, supcon_loss
from embeddings.recipes import GradeMargins, even_bands
from tests.graded_rows import random_rows, unpadded

FORMATS = {
    "2-1-0": [2, 1, 0],
    "2-0": [2, 0],
    "1-0": [1, 0],
    "2-1": [2, 1],
}
MARGINS = GradeMargins()
SLACK = {2: (1.25, 0.75), 1: (0.60, 0.40)}  # O_p, D_p of a positive grade
SLACK_NEGATIVE = {1: (0.30, 0.60), 0: (-0.25, 0.25)}  # O_n, D_n of a negative grade


def supcon_by_hand(scores, grades, tau):
    if len(set(grades)) < 2:
        return 0.0
    positives = [i for i, grade in enumerate(grades) if grade > min(grades)]
    denominator = sum(math.exp(score / tau) for score in scores)
    total = sum(grades[i] for i in positives)
    return -sum(grades[i] * math.log(math.exp(scores[i] / tau) / denominator) for i in positives) / total


def circle_by_hand(scores, grades, gamma):
    loss = 0.0
    for high, low in ((2, 0), (1, 0), (2, 1)):
        positives = [s for s, g in zip(scores, grades, strict=True) if g == high]
        negatives = [s for s, g in zip(scores, grades, strict=True) if g == low]
        if positives and negatives:
            (o_p, d_p), (o_n, d_n) = SLACK[high], SLACK_NEGATIVE[low]
            pull = sum(math.exp(-gamma * max(o_p - s, 0) * (s - d_p)) for s in positives)
            push = sum(math.exp(-gamma * min(o_n - s, 0) * (s - d_n)) for s in negatives)
            loss += math.log(1 + pull * push / len(negatives))
    return loss


def circle_gradient_by_hand(scores, grades, gamma):
    """d loss / d score with the weights held constant, in closed form."""
    gradient = [0.0] * len(scores)
    for high, low in ((2, 0), (1, 0), (2, 1)):
        positives = [i for i, g in enumerate(grades) if g == high]
        negatives = [i for i, g in enumerate(grades) if g == low]
        if positives and negatives:
            (o_p, d_p), (o_n, d_n) = SLACK[high], SLACK_NEGATIVE[low]
            slope_p = {i: -gamma * max(o_p - scores[i], 0) for i in positives}
            slope_n = {i: -gamma * min(o_n - scores[i], 0) for i in negatives}
            term_p = {i: math.exp(slope_p[i] * (scores[i] - d_p)) for i in positives}
            term_n = {i: math.exp(slope_n[i] * (scores[i] - d_n)) for i in negatives}
            product = sum(term_p.values()) * sum(term_n.values()) / len(negatives)
            saturation = product / (1 + product)
            for slope, term in ((slope_p, term_p), (slope_n, term_n)):
                for i in slope:
                    gradient[i] += saturation * slope[i] * term[i] / sum(term.values())
    return gradient


def gradient_of(loss, similarity):
    (gradient,) = torch.autograd.grad(loss, similarity)
    return gradient


@pytest.mark.parametrize("name", [*FORMATS, "mixed"])
@pytest.mark.parametrize("seed", range(5))
def test_supcon_equals_the_formula_for_every_instance_format(name, seed):
    formats = list(FORMATS.values()) if name == "mixed" else [FORMATS[name]]
    similarity, grade = random_rows(formats, seed)
    by_hand = [supcon_by_hand(scores, grades, 0.07) for scores, grades in unpadded(similarity, grade)]
    tau = torch.tensor(0.07, dtype=torch.float64)
    assert supcon_loss(similarity, grade, tau).item() == pytest.approx(sum(by_hand), rel=1e-9)
    mean = supcon_loss(similarity, grade, tau, reduction="mean").item()
    assert mean == pytest.approx(sum(by_hand) / len(by_hand), rel=1e-9)
    in_float32 = supcon_loss(similarity.float(), grade, tau.float()).item()
    assert in_float32 == pytest.approx(sum(by_hand), rel=1e-6)


@pytest.mark.parametrize("name", [*FORMATS, "mixed"])
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("gamma", [4.0, 32.0, 128.0])
def test_circle_equals_the_formula_for_every_instance_format(name, seed, gamma):
    formats = list(FORMATS.values()) if name == "mixed" else [FORMATS[name]]
    similarity, grade = random_rows(formats, seed)
    margins = GradeMargins(gamma=gamma)
    by_hand = [circle_by_hand(scores, grades, gamma) for scores, grades in unpadded(similarity, grade)]
    assert circle_loss(similarity, grade, margins, reduction="sum").item() == pytest.approx(sum(by_hand), rel=1e-8)
    mean = circle_loss(similarity, grade, margins).item()
    assert mean == pytest.approx(sum(by_hand) / len(by_hand), rel=1e-8)
    in_float32 = circle_loss(similarity.float(), grade, margins).item()
    assert in_float32 == pytest.approx(sum(by_hand) / len(by_hand), rel=1e-6)


def test_supcon_passes_gradcheck_in_similarity_and_temperature():
    similarity, grade = random_rows(list(FORMATS.values()), seed=7)
    tau = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    similarity.requires_grad_()
    for reduction in ("sum", "mean"):
        assert torch.autograd.gradcheck(
            lambda s, t, reduction=reduction: supcon_loss(s, grade, t, reduction=reduction), (similarity, tau)
        )


@pytest.mark.parametrize("seed", range(5))
def test_circle_gradient_is_that_of_constant_pair_weights(seed):
    similarity, grade = random_rows(list(FORMATS.values()), seed)
    similarity.requires_grad_()
    gradient = gradient_of(circle_loss(similarity, grade, MARGINS, reduction="sum"), similarity)
    for row, (scores, grades) in enumerate(unpadded(similarity.detach(), grade)):
        expected = circle_gradient_by_hand(scores, grades, MARGINS.gamma)
        assert gradient[row][grade[row] >= 0].tolist() == pytest.approx(expected, rel=1e-6, abs=1e-9)
    assert (gradient[grade < 0] == 0).all()


def test_circle_passes_gradcheck_once_its_weights_are_frozen():
    """Finite differences see the weights move; so here the weights enter as constants."""
    similarity, grade = random_rows(list(FORMATS.values()), seed=3)
    frozen = similarity.clone()

    def with_frozen_weights(free):
        total = free.new_zeros(())
        for row in range(len(free)):
            for high, low in ((2, 0), (1, 0), (2, 1)):
                positive, negative = grade[row] == high, grade[row] == low
                if positive.any() and negative.any():
                    (o_p, d_p), (o_n, d_n) = SLACK[high], SLACK_NEGATIVE[low]
                    weight_p = (o_p - frozen[row][positive]).clamp(min=0)
                    weight_n = (frozen[row][negative] - o_n).clamp(min=0)
                    pull = torch.exp(-8.0 * weight_p * (free[row][positive] - d_p)).sum()
                    push = torch.exp(8.0 * weight_n * (free[row][negative] - d_n)).mean()
                    total = total + torch.log1p(pull * push)
        return total

    free = similarity.clone().requires_grad_()
    assert torch.autograd.gradcheck(with_frozen_weights, (free,))
    similarity.requires_grad_()
    ours = circle_loss(similarity, grade, GradeMargins(gamma=8.0), reduction="sum")
    torch.testing.assert_close(
        gradient_of(ours, similarity), gradient_of(with_frozen_weights(free), free), rtol=1e-9, atol=1e-12
    )


def test_circle_of_two_grades_is_the_ordinary_circle_loss_but_for_the_mean_over_negatives():
    """With O_p = 1 + m, D_p = 1 - m, O_n = -m, D_n = m of Sun et al., and 1/|neg| inside the log."""
    m, gamma = 0.25, 16.0
    margins = GradeMargins(gamma=gamma, optimum_2p=1 + m, boundary_2p=1 - m, optimum_0n=-m, boundary_0n=m)
    positives, negatives = [0.9, 0.3, -0.2], [0.1, 0.6, -0.5, 0.4]
    ordinary = math.log(
        1
        + sum(math.exp(gamma * max(s + m, 0) * (s - m)) for s in negatives)
        * sum(math.exp(-gamma * max(1 + m - s, 0) * (s - 1 + m)) for s in positives)
        / len(negatives)
    )
    similarity = torch.tensor([positives + negatives], dtype=torch.float64)
    grade = torch.tensor([[2, 2, 2, 0, 0, 0, 0]], dtype=torch.int8)
    assert circle_loss(similarity, grade, margins).item() == pytest.approx(ordinary, rel=1e-9)


@pytest.mark.parametrize("num_grades", [2, 4, 5])
def test_circle_of_any_number_of_grades_is_the_sum_over_all_two_of_them(num_grades):
    bands = even_bands(num_grades, gamma=16.0)
    similarity, grade = random_rows([range(num_grades), [0, num_grades - 1]], seed=num_grades)

    def by_hand(scores, grades):
        loss = 0.0
        for low in range(num_grades):
            for high in range(low + 1, num_grades):
                above, below = bands.bands[high], bands.bands[low]
                positives = [s for s, g in zip(scores, grades, strict=True) if g == high]
                negatives = [s for s, g in zip(scores, grades, strict=True) if g == low]
                if positives and negatives:
                    pull = sum(math.exp(-16 * max(above.optimum_p - s, 0) * (s - above.boundary_p)) for s in positives)
                    push = sum(math.exp(16 * max(s - below.optimum_n, 0) * (s - below.boundary_n)) for s in negatives)
                    loss += math.log(1 + pull * push / len(negatives))
        return loss

    expected = sum(by_hand(*row) for row in unpadded(similarity, grade))
    assert circle_loss(similarity, grade, bands, reduction="sum").item() == pytest.approx(expected, rel=1e-8)


def test_even_bands_of_three_grades_are_near_the_papers_and_leave_no_overlap():
    bands = even_bands(3).bands
    paper = GradeMargins().bands
    for ours, theirs in ((bands[0].boundary_n, paper[0].boundary_n), (bands[2].optimum_p, paper[2].optimum_p)):
        assert ours == pytest.approx(theirs)
    assert bands[1].boundary_p == pytest.approx(paper[1].boundary_p, abs=0.02)
    assert bands[1].boundary_n == pytest.approx(paper[1].boundary_n, abs=0.02)
    for lower, higher in pairwise(even_bands(6).bands):
        assert lower.boundary_n < higher.boundary_p
    with pytest.raises(ValueError, match="at least 2 grades"):
        even_bands(1)


def test_supcon_weighs_an_exact_positive_twice_a_partial_one():
    similarity = torch.tensor([[0.8, 0.5, 0.1]], dtype=torch.float64, requires_grad=True)
    grade = torch.tensor([[2, 1, 0]], dtype=torch.int8)
    gradient = gradient_of(supcon_loss(similarity, grade, torch.tensor(1.0, dtype=torch.float64)), similarity)
    share = torch.softmax(similarity.detach(), dim=1)
    torch.testing.assert_close(gradient, share - torch.tensor([[2 / 3, 1 / 3, 0]], dtype=torch.float64))


DEGENERATE = {
    "one grade": [[2, 2, 2]],
    "only irrelevant": [[0, 0, 0]],
    "one product": [[1, -1, -1]],
    "nothing but padding": [[-1, -1, -1]],
}


@pytest.mark.parametrize("grades", DEGENERATE.values(), ids=DEGENERATE)
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_instances_without_contrast_give_zero_with_zero_gradient(grades, reduction):
    similarity = torch.tensor([[0.3, 0.9, -0.4]], requires_grad=True)
    tau = torch.tensor(0.05, requires_grad=True)
    grade = torch.tensor(grades, dtype=torch.int8)
    supcon = supcon_loss(similarity, grade, tau, reduction=reduction)
    circle = circle_loss(similarity, grade, MARGINS, reduction=reduction)
    assert supcon.item() == circle.item() == 0
    (supcon + circle).backward()
    assert (similarity.grad == 0).all()
    assert tau.grad == 0


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (0, 0)])
def test_an_empty_batch_gives_zero_that_can_be_differentiated(shape):
    similarity = torch.zeros(shape, requires_grad=True)
    grade = torch.zeros(shape, dtype=torch.int8)
    loss = supcon_loss(similarity, grade, torch.tensor(0.05)) + circle_loss(similarity, grade, MARGINS)
    loss.backward()
    assert loss.item() == 0


@pytest.mark.parametrize("padding", [float("nan"), float("inf"), 1e30])
def test_padding_changes_neither_loss_nor_gradient_whatever_it_holds(padding):
    similarity, grade = random_rows(list(FORMATS.values()), seed=11)
    grade[2] = -1  # a query of nothing but padding
    dirty = similarity.masked_fill(grade < 0, padding)
    for loss in (
        lambda s, t: supcon_loss(s, grade, t),
        lambda s, t: circle_loss(s, grade, MARGINS) + 0 * t,
    ):
        values = []
        for scores in (similarity, dirty):
            leaf, tau = (
                scores.clone().requires_grad_(),
                torch.tensor(0.1, dtype=torch.float64, requires_grad=True),
            )
            with torch.autograd.set_detect_anomaly(True):  # no nan on the way back either
                value = loss(leaf, tau)
                value.backward()
            values.append((value.detach(), leaf.grad, tau.grad))
        for clean, same in zip(*values, strict=True):
            torch.testing.assert_close(clean, same, rtol=0, atol=0)


def test_extreme_scale_and_temperature_stay_finite():
    similarity = torch.tensor([[-1.0, 1.0, 1.0, -1.0]], requires_grad=True)
    grade = torch.tensor([[2, 1, 0, 1]], dtype=torch.int8)
    loss = circle_loss(similarity, grade, GradeMargins(gamma=512.0))
    loss = loss + supcon_loss(similarity, grade, torch.tensor(1e-3))
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(similarity.grad).all()


def test_half_precision_similarities_are_computed_in_float32():
    similarity, grade = random_rows(list(FORMATS.values()), seed=5)
    half = similarity.to(torch.bfloat16)
    for loss in (
        lambda s: circle_loss(s, grade, MARGINS),
        lambda s: supcon_loss(s, grade, torch.tensor(0.05)),
    ):
        assert loss(half).dtype == torch.float32
        torch.testing.assert_close(loss(half), loss(half.float()), rtol=0, atol=0)


def test_circle_loss_is_least_with_each_grade_in_its_band():
    grade = torch.tensor([[2, 1, 0]], dtype=torch.int8)
    separated = circle_loss(torch.tensor([[0.95, 0.5, 0.0]]), grade, MARGINS)
    for scores in ([0.5, 0.5, 0.0], [0.95, 0.9, 0.0], [0.95, 0.5, 0.5]):
        assert circle_loss(torch.tensor([scores]), grade, MARGINS) > separated + 0.1


@pytest.mark.parametrize(
    "loss", [lambda s, g: circle_loss(s, g, MARGINS), lambda s, g: supcon_loss(s, g, torch.ones(()))]
)
def test_matrices_of_different_shape_are_refused(loss):
    with pytest.raises(ValueError, match="pad grades with -1"):
        loss(torch.zeros(2, 3), torch.zeros(2, 4, dtype=torch.int8))


def test_margins_are_settings_with_bounds_and_identity():
    assert validate(GradeMargins, {"gamma": 80.0}, source="test") == GradeMargins(gamma=80.0)
    assert fingerprint(GradeMargins()) != fingerprint(GradeMargins(optimum_1n=0.4))
    for wrong in ({"gamma": 0.0}, {"gamma": 513.0}, {"boundary_2p": 1.5}, {"boundary_3p": 0.5}):
        with pytest.raises(ConfigError):
            validate(GradeMargins, wrong, source="test")


def test_lexical_loss_equals_the_weighted_variance_by_hand():
    generator = torch.Generator().manual_seed(3)
    similarity = torch.rand(4, 5, generator=generator, dtype=torch.float64) * 2 - 1
    target = torch.rand(4, 5, generator=generator, dtype=torch.float64) * 2 - 1
    pairs = list(zip(similarity.flatten().tolist(), target.flatten().tolist(), strict=True))
    weights = [max(wanted, 0.0) + 0.1 for _, wanted in pairs]
    mean = sum(w * (own - wanted) for w, (own, wanted) in zip(weights, pairs, strict=True)) / sum(weights)
    squares = [w * (own - wanted - mean) ** 2 for w, (own, wanted) in zip(weights, pairs, strict=True)]
    assert lexical_loss(similarity, target).item() == pytest.approx(sum(squares) / sum(weights), abs=1e-12)
    # a common offset is free
    assert lexical_loss(target - 0.3, target).item() == pytest.approx(0.0, abs=1e-12)
    assert torch.autograd.gradcheck(lambda own: lexical_loss(own, target), similarity.requires_grad_())


def test_lexical_loss_refuses_matrices_of_different_shape():
    with pytest.raises(ValueError, match=r"one shape, got \[2, 3\] and \[2, 4\]"):
        lexical_loss(torch.zeros(2, 3), torch.zeros(2, 4))
