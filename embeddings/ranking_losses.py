"""Losses of other recipes that learn from grades: softmax over negatives, pairs in order, quadratic surrogates.

All but the pooled one compare a query with the products of its row, as the paper's two do (`losses`), so that any of
them can stand in a weighted sum with those and with products of other queries beside a query's own
(`graded_loss.with_in_batch`, which gives these grade 0). In all of them the grades of a row matter by their order;
where they weigh, it is said.
"""

# Q queries, P products of a query's row, padded to the longest, N pairs of all queries

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

import torch
from torch import Tensor
from torch.nn.functional import softplus

from embeddings.losses import Reduction, at_least_float32, check_shapes, masked_logsumexp, over_queries

_LEAST_WEIGHT = 1e-6
"""Below it the mean weight of comparisons is not scaled up to 1: all of them are in order."""


def infonce_loss(
    similarity_QP: Tensor, grade_QP: Tensor, temperature: Tensor, *, reduction: Reduction = "mean"
) -> Tensor:
    """Softmax of each positive against the products of lower grades in its row, other positives left out.

    With one product above 0 in a row and products of other queries beside it this is multiple negatives ranking (MNRL);
    with graded negatives among its own, MNRL with hard negatives. A positive weighs by its grade; what is graded below
    it is its negative, so that grade 1 is pushed below grade 2.

    Args:
        similarity_QP: cosine similarities; padding may hold anything.
        grade_QP: int8 grades; -1 masks a pair out.
        temperature: positive scalar; receives a gradient.
        reduction: "mean" or "sum" over queries that have a positive and a lower grade.

    Returns:
        Scalar, differentiable; 0 with zero gradient if no query qualifies.

    Raises:
        ValueError: the two matrices differ in shape.

    Cites: van den Oord et al. 2018 (arXiv 1807.03748); Henderson et al. 2017 (arXiv 1705.00652), section 4.4.
    """
    check_shapes(similarity_QP, grade_QP)
    logit_QP = at_least_float32(similarity_QP).masked_fill(grade_QP < 0, 0.0) / temperature
    # a step without any positive has a gradient too, of 0: data-parallel training waits for it
    total_Q, weight_Q = 0.0 * logit_QP.sum(dim=1), logit_QP.new_zeros(len(logit_QP))
    for grade, own_QP, lower_QP in _boundaries(grade_QP):
        counted_QP = own_QP & lower_QP.any(dim=1, keepdim=True)
        against_Q1 = masked_logsumexp(logit_QP, lower_QP)[:, None]
        loss_QP = softplus(against_Q1 - logit_QP).masked_fill(~counted_QP, 0.0)
        total_Q = total_Q + grade * loss_QP.sum(dim=1)
        weight_Q = weight_Q + grade * counted_QP.sum(dim=1)
    return over_queries(total_Q / weight_Q.clamp(min=1.0), weight_Q > 0, reduction)


def cosent_loss(
    similarity_QP: Tensor, grade_QP: Tensor, *, scale: float = 20.0, reduction: Reduction = "mean"
) -> Tensor:
    """CoSENT masked to the query: log(1 + sum over pairs out of order of exp(scale * (lower - higher cosine))).

    The original takes one logarithm over all pairs of a batch; here each query has its own, since cosines of different
    queries are not to be compared and a sum over queries is what workers can share.

    Args:
        similarity_QP: cosine similarities; padding may hold anything.
        grade_QP: int8 grades; -1 masks a pair out.
        scale: inverse temperature.
        reduction: "mean" or "sum" over queries that have at least two grades.

    Returns:
        Scalar, differentiable; 0 with zero gradient if no query qualifies.

    Raises:
        ValueError: the two matrices differ in shape.

    Cites: Su 2022, "CoSENT"; the class of that name in sentence-transformers, whose default scale this is.
    """
    check_shapes(similarity_QP, grade_QP)
    score_QP = scale * at_least_float32(similarity_QP).masked_fill(grade_QP < 0, 0.0)
    terms, any_Q = [], torch.zeros(len(score_QP), dtype=torch.bool, device=score_QP.device)
    for _, own_QP, lower_QP in _boundaries(grade_QP):
        both_Q = own_QP.any(dim=1) & lower_QP.any(dim=1)
        # all pairs of this grade and a lower one at once: their sum of exponentials factorises
        term_Q = masked_logsumexp(-score_QP, own_QP) + masked_logsumexp(score_QP, lower_QP)
        terms.append(term_Q.masked_fill(~both_Q, -torch.inf))
        any_Q |= both_Q
    if not terms:
        return score_QP.sum() * 0.0
    term_QG = torch.stack([*terms, torch.zeros_like(terms[0])], dim=1)
    return over_queries(masked_logsumexp(term_QG, term_QG > -torch.inf), any_Q, reduction)


def triplet_loss(
    similarity_QP: Tensor, grade_QP: Tensor, *, margin: float = 0.1, reduction: Reduction = "mean"
) -> Tensor:
    """Hinge of each two products of different grades: the better one shall lead by `margin` for each grade between.

    Args:
        similarity_QP: cosine similarities; padding may hold anything.
        grade_QP: int8 grades; -1 masks a pair out.
        margin: lead for one grade, in cosine.
        reduction: "mean" or "sum" over queries of the mean over a query's pairs.

    Returns:
        Scalar, differentiable; 0 with zero gradient if no query has two grades.

    Raises:
        ValueError: the two matrices differ in shape.

    Cites: Huang et al. 2020 (arXiv 2006.11632), section 2.2, for two grades; the paper's baseline has three.
    """
    lead_QPP, gap_QPP = _leads(similarity_QP, grade_QP)
    return _over_pairs((margin * gap_QPP - lead_QPP).clamp(min=0.0), gap_QPP > 0, reduction)


def pairwise_logistic_loss(
    similarity_QP: Tensor, grade_QP: Tensor, *, scale: float = 20.0, focus: float = 0.0, reduction: Reduction = "mean"
) -> Tensor:
    """Log loss of the order of each two products of different grades, the logit being `scale` times the lead.

    With a focus, a pair weighs by (1 - p)^focus, p being the probability that the logit gives to its right order, so
    that pairs which are in order by far do not dominate; the weights of a query's pairs have mean 1 and no gradient.

    Args:
        similarity_QP: cosine similarities; padding may hold anything.
        grade_QP: int8 grades; -1 masks a pair out.
        scale: inverse temperature.
        focus: exponent of the weights; 0: all pairs weigh alike.
        reduction: "mean" or "sum" over queries of the mean over a query's pairs.

    Returns:
        Scalar, differentiable; 0 with zero gradient if no query has two grades.

    Raises:
        ValueError: the two matrices differ in shape.

    Cites: Burges et al. 2005, "Learning to rank using gradient descent" (RankNet); Lin et al. 2017 (arXiv 1708.02002).
    """
    lead_QPP, gap_QPP = _leads(similarity_QP, grade_QP)
    return _logistic(-scale * lead_QPP, gap_QPP > 0, focus, reduction)


@torch.no_grad()
def loss_by_grades(similarity_QP: Tensor, grade_QP: Tensor, *, scale: float = 20.0) -> dict[tuple[int, int], float]:
    """Mean of `pairwise_logistic_loss` over all comparisons of each two grades, the higher one first; to be watched.

    Args:
        similarity_QP: cosine similarities; padding may hold anything.
        grade_QP: int8 grades; -1 masks a pair out.
        scale: inverse temperature.
    """
    lead_QPP, gap_QPP = _leads(similarity_QP, grade_QP)
    loss_QPP = softplus(-scale * lead_QPP)
    found, grades = {}, [grade for grade in torch.unique(grade_QP).tolist() if grade >= 0]
    for low, high in combinations(grades, 2):
        is_pair_QPP = (gap_QPP > 0) & (grade_QP == high)[:, :, None] & (grade_QP == low)[:, None, :]
        if is_pair_QPP.any():
            found[high, low] = loss_QPP[is_pair_QPP].mean().item()
    return found


def pooled_logistic_loss(similarity_N: Tensor, grade_N: Tensor, *, scale: float = 20.0, focus: float = 0.0) -> Tensor:
    """Log loss of the order of each two pairs of different grades, whichever their queries are.

    The mean over each two grades counts alike, however rare one is: a smooth bound on one minus the mean AUC between
    grades over all pairs of a step, so that a cosine comes to mean the same beside every query. Losses inside a query
    leave that open.

    Args:
        similarity_N: cosine similarities of all pairs; padding may hold anything.
        grade_N: int8 grades; -1 masks a pair out.
        scale: inverse temperature.
        focus: as in `pairwise_logistic_loss`, the weights having mean 1 over the comparisons of two grades.

    Returns:
        Scalar, differentiable; 0 with zero gradient if all pairs have one grade.

    Raises:
        ValueError: the two differ in shape.

    Cites: Gao and Zhou 2015 (arXiv 1208.0645): minimising it maximises AUC.
    """
    check_shapes(similarity_N[None], grade_N[None])
    score_N = at_least_float32(similarity_N).masked_fill(grade_N < 0, 0.0)
    scores = [score_N[grade_N == grade] for grade in torch.unique(grade_N).tolist() if grade >= 0]
    lags = [scale * (low[None, None] - high[None, :, None]) for low, high in combinations(scores, 2)]
    losses = [_logistic(lag, torch.ones_like(lag, dtype=torch.bool), focus, "mean") for lag in lags]
    return torch.stack(losses).mean() if losses else 0.0 * score_N.sum()


def rg_loss(
    similarity_QP: Tensor,
    grade_QP: Tensor,
    *,
    temperature: float = 0.2,
    keep_interaction: bool = True,
    reduction: Reduction = "mean",
) -> Tensor:
    """Second-order Taylor approximation of the softmax loss over a row: RGx, or RG2 without the interaction term.

    For logits o of the N products of a row: mean(o) + mean(o^2) / 2 - mean(o)^2 / 2 minus the logits of the positives,
    which weigh by grade. RG2 leaves out mean(o)^2 / 2 and is an upper bound. Quadratic in the vectors of either side.

    Args:
        similarity_QP: cosine similarities; padding may hold anything.
        grade_QP: int8 grades; -1 masks a pair out.
        temperature: logits are the cosines over it; the approximation holds for small logits.
        keep_interaction: RGx; without, RG2.
        reduction: "mean" or "sum" over queries that have a positive and a lower grade.

    Returns:
        Scalar, differentiable; constants that no gradient sees are left out.

    Raises:
        ValueError: the two matrices differ in shape.

    Cites: Pu et al. 2025 (arXiv 2506.09454), from its stated expansion; its own weights are not known to us.
    """
    check_shapes(similarity_QP, grade_QP)
    present_QP = grade_QP >= 0
    logit_QP = at_least_float32(similarity_QP).masked_fill(~present_QP, 0.0) / temperature
    count_Q = present_QP.sum(dim=1).clamp(min=1)
    mean_Q, square_Q = logit_QP.sum(dim=1) / count_Q, logit_QP.square().sum(dim=1) / count_Q
    weight_QP = grade_QP.clamp(min=0).to(logit_QP.dtype)
    attraction_Q = (weight_QP * logit_QP).sum(dim=1) / weight_QP.sum(dim=1).clamp(min=1.0)
    loss_Q = mean_Q + square_Q / 2 - attraction_Q
    if keep_interaction:
        loss_Q = loss_Q - mean_Q.square() / 2
    has_lower_Q = (present_QP & (grade_QP < grade_QP.amax(dim=1, keepdim=True))).any(dim=1)
    return over_queries(loss_Q, (weight_QP > 0).any(dim=1) & has_lower_Q, reduction)


def _boundaries(grade_QP: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Each grade above 0 that occurs, with the marks of its products and of those graded lower."""
    for grade in torch.unique(grade_QP).tolist():
        if grade > 0:
            yield grade, grade_QP == grade, (grade_QP >= 0) & (grade_QP < grade)


def _leads(similarity_QP: Tensor, grade_QP: Tensor) -> tuple[Tensor, Tensor]:
    """By how much the first product's cosine and grade exceed the second's, [Q, P, P] each; a masked pair has gap 0."""
    check_shapes(similarity_QP, grade_QP)
    score_QP = at_least_float32(similarity_QP).masked_fill(grade_QP < 0, 0.0)
    both_QPP = (grade_QP >= 0)[:, :, None] & (grade_QP >= 0)[:, None, :]
    gap_QPP = (grade_QP[:, :, None] - grade_QP[:, None, :]).to(score_QP.dtype).masked_fill(~both_QPP, 0.0)
    return score_QP[:, :, None] - score_QP[:, None, :], gap_QPP


def _logistic(lag_QPP: Tensor, is_pair_QPP: Tensor, focus: float, reduction: Reduction) -> Tensor:
    """Log loss of lags as logits; with a focus, pairs weigh by how far they are from their order."""
    loss_QPP = softplus(lag_QPP)
    if focus:
        weight_QPP = torch.sigmoid(lag_QPP.detach()).pow(focus) * is_pair_QPP
        count_Q = is_pair_QPP.sum(dim=(1, 2)).clamp(min=1)
        mean_Q = (weight_QPP.sum(dim=(1, 2)) / count_Q).clamp(min=_LEAST_WEIGHT)
        loss_QPP = loss_QPP * weight_QPP / mean_Q[:, None, None]
    return _over_pairs(loss_QPP, is_pair_QPP, reduction)


def _over_pairs(loss_QPP: Tensor, counted_QPP: Tensor, reduction: Reduction) -> Tensor:
    total_Q = loss_QPP.masked_fill(~counted_QPP, 0.0).sum(dim=(1, 2))
    count_Q = counted_QPP.sum(dim=(1, 2))
    return over_queries(total_Q / count_Q.clamp(min=1), count_Q > 0, reduction)
