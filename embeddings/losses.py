"""The two losses of Mine and Refine, over padded matrices of cosine similarities.

Both compare a query with the products of its row: in the paper those of its own instance alone, since a random product
of the batch is not reliably grade 0; `graded_loss.with_in_batch` adds others under a guard. Stage 1 (`supcon_loss`)
orders the grades of an instance, stage 2 (`circle_loss`) pulls each grade into its own band of cosines. Both take any
number of grades from 0 up. Everything is computed in at least float32, whatever precision the encoder ran in.

Losses of other recipes, for comparison and for sums: `ranking_losses` (of grades), `soft_losses` (of probabilities).
"""

# Q queries, P products of a query's instance, padded to the longest

from __future__ import annotations

from itertools import combinations
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import softplus

from embeddings.recipes import GradeBands, GradeMargins

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
    check_shapes(similarity_QP, grade_QP)
    present_QP = grade_QP >= 0
    contrast_Q = torch.where((grade_QP == 0).any(dim=1), 0, 1)
    positive_QP = grade_QP > contrast_Q[:, None]
    has_contrast_Q = positive_QP.any(dim=1) & (present_QP & ~positive_QP).any(dim=1)

    logit_QP = at_least_float32(similarity_QP).masked_fill(~present_QP, 0.0) / temperature
    weight_QP = grade_QP.to(logit_QP.dtype) * positive_QP
    attraction_Q = (weight_QP * logit_QP).sum(dim=1) / weight_QP.sum(dim=1).clamp(min=1.0)
    loss_Q = masked_logsumexp(logit_QP, present_QP) - attraction_Q
    return over_queries(loss_Q, has_contrast_Q, reduction)


def circle_loss(
    similarity_QP: Tensor, grade_QP: Tensor, margins: GradeMargins | GradeBands, *, reduction: Reduction = "mean"
) -> Tensor:
    """Circle loss of several classes: each pair of grades in an instance is driven apart around its own boundaries.

    An instance of more than two grades, for which the paper writes no case, gets the sum of its cases.
    Negatives are averaged and positives summed, as the paper has it; the pairs' own weights carry no
    gradient.

    Args:
        similarity_QP: cosine similarities; padding may hold anything.
        grade_QP: int8 grades; -1 masks a pair out.
        margins: scale, and boundaries and optima of each grade: the paper's three, or any number.
        reduction: "mean" or "sum" over queries that have at least two grades.

    Returns:
        Scalar, differentiable; 0 with zero gradient if no query qualifies.

    Raises:
        ValueError: the two matrices differ in shape.

    Cites: Xi et al. 2026 (arXiv 2602.17654), eqs 3-5; Sun et al. 2020 (arXiv 2002.10857).
    """
    check_shapes(similarity_QP, grade_QP)
    score_QP = at_least_float32(similarity_QP).masked_fill(grade_QP < 0, 0.0)
    pulls, pushes = [], []
    for grade, band in enumerate(margins.bands):
        of_grade_QP = grade_QP == grade
        weight_p_QP = (band.optimum_p - score_QP).clamp(min=0.0).detach()
        weight_n_QP = (score_QP - band.optimum_n).clamp(min=0.0).detach()
        pull_QP = -margins.gamma * weight_p_QP * (score_QP - band.boundary_p)
        push_QP = margins.gamma * weight_n_QP * (score_QP - band.boundary_n)
        count_Q = of_grade_QP.sum(dim=1)
        pulls.append(masked_logsumexp(pull_QP, of_grade_QP))
        # the mean over negatives without leaving log space, where exp(gamma * ..) would overflow float32
        pushes.append(masked_logsumexp(push_QP, of_grade_QP) - count_Q.clamp(min=1).to(score_QP.dtype).log())
    total_Q = score_QP.new_zeros(len(score_QP))
    qualifies_Q = torch.zeros_like(total_Q, dtype=torch.bool)
    for negative, positive in combinations(range(len(margins.bands)), 2):
        both_Q = (grade_QP == positive).any(dim=1) & (grade_QP == negative).any(dim=1)
        total_Q = total_Q + softplus(pulls[positive] + pushes[negative]).masked_fill(~both_Q, 0.0)
        qualifies_Q |= both_Q
    return over_queries(total_Q, qualifies_Q, reduction)


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
    off_QU = at_least_float32(similarity_QU) - target_QU
    return (weight_QU * (off_QU - (weight_QU * off_QU).sum()).square()).sum()


def masked_logsumexp(logit_QP: Tensor, mask_QP: Tensor) -> Tensor:
    """Log-sum-exp over the masked-in entries; 0 with zero gradient for a row that has none.

    A row of nothing but -inf has a nan gradient; the fill after it hides that, but anomaly detection would
    stop there, so such a row is made constant first.
    """
    empty_Q = ~mask_QP.any(dim=1)
    filled_QP = logit_QP.masked_fill(~mask_QP, -torch.inf).masked_fill(empty_Q[:, None], 0.0)
    return filled_QP.logsumexp(dim=1).masked_fill(empty_Q, 0.0)


def over_queries(loss_Q: Tensor, counted_Q: Tensor, reduction: Reduction) -> Tensor:
    """Sum or mean of the losses of the queries that count; 0 with zero gradient without any."""
    total = loss_Q.masked_fill(~counted_Q, 0.0).sum()
    return total if reduction == "sum" else total / counted_Q.sum().clamp(min=1)


def at_least_float32(tensor: Tensor) -> Tensor:
    """As it is, or wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def check_shapes(similarity_QP: Tensor, grade_QP: Tensor) -> None:
    """Raises a ValueError where they are no two matrices of one shape."""
    if similarity_QP.ndim != 2 or similarity_QP.shape != grade_QP.shape:
        raise ValueError(
            f"losses: expected similarities and grades of one shape [queries, products], got "
            f"{list(similarity_QP.shape)} and {list(grade_QP.shape)}; pad grades with -1"
        )
