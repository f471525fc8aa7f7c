"""The two losses of Mine and Refine, over padded matrices of cosine similarities.

Both compare a query with the products of its row: in the paper those of its own instance alone, since a random product
of the batch is not reliably grade 0; `training.with_in_batch` adds others under a guard. Stage 1 (`supcon_loss`) orders
the grades of an instance, stage 2 (`circle_loss`) pulls each grade into its own band of cosines. Everything is computed
in at least float32, whatever precision the encoder ran in.
"""

# Q queries, P products of a query's instance, padded to the longest

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from embeddings.recipes import GradeMargins as GradeMargins

Reduction = Literal["sum", "mean"]


def supcon_loss(
    similarity_QP: Tensor, grade_QP: Tensor, temperature: Tensor, *, reduction: Reduction = "sum"
) -> Tensor:
    """Label-weighted supervised contrastive loss inside each query's instance.

    The lowest grade of an instance is its contrast, the grades above are its positives, weighted by grade.
    The denominator runs over the whole instance, positives included.

    Args:
        similarity_QP: cosine similarities; padding may hold anything.
        grade_QP: int8 grades; -1 masks a pair out.
        temperature: positive scalar, usually learned; receives a gradient.
        reduction: "sum" over queries, as the paper found better, or "mean" over queries that have a contrast.

    Returns:
        Scalar, differentiable; a query with fewer than two grades adds 0 with zero gradient.

    Raises:
        ValueError: the two matrices differ in shape.

    Cites: Xi et al. 2026 (arXiv 2602.17654), eq. 2; Khosla et al. 2020 (arXiv 2004.11362).
    """
    _check_shapes(similarity_QP, grade_QP)
    present_QP = grade_QP >= 0
    contrast_Q = torch.where((grade_QP == 0).any(dim=1), 0, 1)
    positive_QP = grade_QP > contrast_Q[:, None]
    has_contrast_Q = positive_QP.any(dim=1) & (present_QP & ~positive_QP).any(dim=1)

    logit_QP = _at_least_float32(similarity_QP).masked_fill(~present_QP, 0.0) / temperature
    weight_QP = grade_QP.to(logit_QP.dtype) * positive_QP
    attraction_Q = (weight_QP * logit_QP).sum(dim=1) / weight_QP.sum(dim=1).clamp(min=1.0)
    loss_Q = _masked_logsumexp(logit_QP, present_QP) - attraction_Q
    return _reduce(loss_Q, has_contrast_Q, reduction)


def circle_loss(
    similarity_QP: Tensor, grade_QP: Tensor, margins: GradeMargins, *, reduction: Reduction = "mean"
) -> Tensor:
    """Three-class circle loss: each pair of grades in an instance is driven apart around its own boundaries.

    An instance with all three grades, for which the paper writes no case, gets the sum of its three cases.
    Negatives are averaged and positives summed, as the paper has it; the pairs' own weights carry no
    gradient.

    Args:
        similarity_QP: cosine similarities; padding may hold anything.
        grade_QP: int8 grades; -1 masks a pair out.
        margins: boundaries, optima and scale.
        reduction: "mean" or "sum" over queries that have at least two grades.

    Returns:
        Scalar, differentiable; 0 with zero gradient if no query qualifies.

    Raises:
        ValueError: the two matrices differ in shape.

    Cites: Xi et al. 2026 (arXiv 2602.17654), eqs 3-5; Sun et al. 2020 (arXiv 2002.10857).
    """
    _check_shapes(similarity_QP, grade_QP)
    score_QP = _at_least_float32(similarity_QP).masked_fill(grade_QP < 0, 0.0)
    cases = [_circle_case(score_QP, grade_QP, case) for case in _grade_cases(margins)]
    loss_Q = torch.stack([loss for loss, _ in cases]).sum(dim=0)
    qualifies_Q = torch.stack([qualifies for _, qualifies in cases]).any(dim=0)
    return _reduce(loss_Q, qualifies_Q, reduction)


def lexical_loss(similarity_QU: Tensor, target_QU: Tensor) -> Tensor:
    """Weighted variance of what the similarities are off their targets; an offset common to all of them is free.

    A pair weighs by its target and a little more, since the many far pairs of a step decide no ranking.

    Args:
        similarity_QU: cosine similarities of all queries and products of a step.
        target_QU: what they should be; carries no gradient.

    Returns:
        Scalar, differentiable.

    Raises:
        ValueError: the two matrices differ in shape.
    """
    if similarity_QU.shape != target_QU.shape:
        raise ValueError(
            f"lexical_loss: expected similarities and targets of one shape, got {list(similarity_QU.shape)} and "
            f"{list(target_QU.shape)}"
        )
    weight_QU = target_QU.clamp(min=0.0) + 0.1
    weight_QU = weight_QU / weight_QU.sum()
    off_QU = _at_least_float32(similarity_QU) - target_QU
    return (weight_QU * (off_QU - (weight_QU * off_QU).sum()).square()).sum()


class _GradeCase(NamedTuple):
    """Two grades of an instance, the higher as positive, with the optimum O and boundary D of either role."""

    positive: int
    negative: int
    optimum_p: float
    boundary_p: float
    optimum_n: float
    boundary_n: float
    gamma: float


def _grade_cases(of: GradeMargins) -> tuple[_GradeCase, ...]:
    """Eqs 3, 4 and 5."""
    return (
        _GradeCase(2, 0, of.optimum_2p, of.boundary_2p, of.optimum_0n, of.boundary_0n, of.gamma),
        _GradeCase(1, 0, of.optimum_1p, of.boundary_1p, of.optimum_0n, of.boundary_0n, of.gamma),
        _GradeCase(2, 1, of.optimum_2p, of.boundary_2p, of.optimum_1n, of.boundary_1n, of.gamma),
    )


def _circle_case(score_QP: Tensor, grade_QP: Tensor, case: _GradeCase) -> tuple[Tensor, Tensor]:
    """Loss of one pair of grades per query (0 where a grade is missing), and where both are present."""
    positive_QP, negative_QP = grade_QP == case.positive, grade_QP == case.negative
    weight_p_QP = (case.optimum_p - score_QP).clamp(min=0.0).detach()
    weight_n_QP = (score_QP - case.optimum_n).clamp(min=0.0).detach()
    pull_Q = _masked_logsumexp(-case.gamma * weight_p_QP * (score_QP - case.boundary_p), positive_QP)
    push_Q = _masked_logsumexp(case.gamma * weight_n_QP * (score_QP - case.boundary_n), negative_QP)
    num_negatives_Q = negative_QP.sum(dim=1)
    both_Q = positive_QP.any(dim=1) & (num_negatives_Q > 0)
    # log(1 + sum_p sum_n / |n|) without leaving log space, where exp(gamma * ..) would overflow float32
    loss_Q = softplus(pull_Q + push_Q - num_negatives_Q.clamp(min=1).to(score_QP.dtype).log())
    return loss_Q.masked_fill(~both_Q, 0.0), both_Q


def _masked_logsumexp(logit_QP: Tensor, mask_QP: Tensor) -> Tensor:
    """Log-sum-exp over the masked-in entries; 0 with zero gradient for a row that has none.

    A row of nothing but -inf has a nan gradient; the fill after it hides that, but anomaly detection would
    stop there, so such a row is made constant first.
    """
    empty_Q = ~mask_QP.any(dim=1)
    filled_QP = logit_QP.masked_fill(~mask_QP, -torch.inf).masked_fill(empty_Q[:, None], 0.0)
    return filled_QP.logsumexp(dim=1).masked_fill(empty_Q, 0.0)


def _reduce(loss_Q: Tensor, counted_Q: Tensor, reduction: Reduction) -> Tensor:
    total = loss_Q.masked_fill(~counted_Q, 0.0).sum()
    return total if reduction == "sum" else total / counted_Q.sum().clamp(min=1)


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _check_shapes(similarity_QP: Tensor, grade_QP: Tensor) -> None:
    if similarity_QP.ndim != 2 or similarity_QP.shape != grade_QP.shape:
        raise ValueError(
            f"losses: expected similarities and grades of one shape [queries, products], got "
            f"{list(similarity_QP.shape)} and {list(grade_QP.shape)}; pad grades with -1"
        )
