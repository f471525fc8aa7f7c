"""Losses that learn from how sure a grade is: shares of raters, or a labeller's probabilities.

What is known of a pair is the share at or above each grade, as the labeller itself learns (`labeller_losses`):
P(grade >= 1) and P(grade >= 2). A clean grade has shares of 0 and 1. The teacher's score of a pair, where one number is
wanted, is their mean: 1 for a sure 2, one half for a sure 1, 0 for a sure 0, as the circle loss has its centres.
"""

# Q queries, P products of a query's row, padded to the longest, B boundaries between grades

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from embeddings.losses import Reduction, at_least_float32, masked_logsumexp, over_queries
from embeddings.recipes import Teacher


def margin_mse_loss(
    similarity_QP: Tensor, share_QPB: Tensor, *, spread: float = 0.5, reduction: Reduction = "mean"
) -> Tensor:
    """Mean squared difference between the leads of two products in cosine and by the teacher.

    Over all pairs of a row this is twice the variance of what the cosines are off the teacher's scores, so that an
    offset common to a query is free.

    Args:
        similarity_QP: cosine similarities; padding may hold anything.
        share_QPB: shares at or above each grade but 0; nan masks a pair out. Carries no gradient.
        spread: cosine between a sure 2 and a sure 0.
        reduction: "mean" or "sum" over queries that have two products.

    Returns:
        Scalar, differentiable; 0 with zero gradient if no query qualifies.

    Raises:
        ValueError: shapes do not fit.

    Cites: Hofstaetter et al. 2020 (arXiv 2010.02666); 2021 (arXiv 2104.06967), section 3.
    """
    score_QP, present_QP, teacher_QP = _with_teacher(similarity_QP, share_QPB)
    count_Q = present_QP.sum(dim=1)
    off_QP = (score_QP - spread * teacher_QP).masked_fill(~present_QP, 0.0)
    mean_Q1 = off_QP.sum(dim=1, keepdim=True) / count_Q.clamp(min=1)[:, None]
    variance_Q = (off_QP - mean_Q1).masked_fill(~present_QP, 0.0).square().sum(dim=1) / (count_Q - 1).clamp(min=1)
    return over_queries(2 * variance_Q, count_Q > 1, reduction)


def listwise_kl_loss(
    similarity_QP: Tensor,
    share_QPB: Tensor,
    temperature: Tensor,
    *,
    teacher: Teacher = "shares",
    teacher_temperature: float = 0.2,
    reduction: Reduction = "mean",
) -> Tensor:
    """KL divergence of two softmaxes over the products of a row, the teacher's and that of the cosines.

    The mean share ranks products whose grades differ. Log odds also tell apart those that all likely have one grade, as
    the nearest products of a query mostly do.

    Args:
        similarity_QP: cosine similarities; padding may hold anything.
        share_QPB: shares at or above each grade but 0; nan masks a pair out. Carries no gradient.
        temperature: of the cosines, positive scalar; receives a gradient.
        teacher: "shares", whose mean lies in [0, 1], or "logits", log odds of a share, clipped to 1e-3 of certainty, of
            which each next boundary counts half as much.
        teacher_temperature: of the teacher's scores.
        reduction: "mean" or "sum" over queries that have two products.

    Returns:
        Scalar, differentiable, at least 0; 0 with zero gradient if no query qualifies.

    Raises:
        ValueError: shapes do not fit.

    Cites: Hinton et al. 2015 (arXiv 1503.02531); Cao et al. 2007 (ListNet) for the softmax over a query's documents.
    """
    score_QP, present_QP, teacher_QP = _with_teacher(similarity_QP, share_QPB)
    if teacher == "logits":
        weight_B = 0.5 ** torch.arange(share_QPB.shape[2], device=score_QP.device)
        logit_QPB = share_QPB.detach().to(score_QP.dtype).nan_to_num(0.5).logit(eps=1e-3)
        teacher_QP = (logit_QPB * weight_B).sum(dim=2).masked_fill(~present_QP, 0.0)
    logit_QP, wanted_QP = score_QP / temperature, teacher_QP / teacher_temperature
    log_found_QP = logit_QP - masked_logsumexp(logit_QP, present_QP)[:, None]
    log_wanted_QP = wanted_QP - masked_logsumexp(wanted_QP, present_QP)[:, None]
    loss_QP = (log_wanted_QP.exp() * (log_wanted_QP - log_found_QP)).masked_fill(~present_QP, 0.0)
    return over_queries(loss_QP.sum(dim=1), present_QP.sum(dim=1) > 1, reduction)


def ordinal_kl_loss(
    similarity_QP: Tensor, share_QPB: Tensor, steepness: Tensor, boundary_B: Tensor, *, reduction: Reduction = "mean"
) -> Tensor:
    """KL divergence of the shares at or above each grade and a logistic of the cosine with common boundaries.

    The boundaries are the same for all queries, so that cosines get an absolute scale: 'at least grade 1' begins at one
    cosine everywhere. Both they and the steepness are learned with the encoder.

    Args:
        similarity_QP: cosine similarities; padding may hold anything.
        share_QPB: shares at or above each grade but 0; nan masks a pair out. Carries no gradient.
        steepness: positive scalar, logits for a cosine of 1; receives a gradient.
        boundary_B: cosine of even odds of each grade but 0; receives a gradient.
        reduction: "mean" or "sum" over queries of the mean over a query's products.

    Returns:
        Scalar, differentiable, at least 0; 0 with zero gradient without any product.

    Raises:
        ValueError: shapes do not fit.

    Cites: McCullagh 1980, "Regression models for ordinal data" (proportional odds).
    """
    score_QP, present_QP, _ = _with_teacher(similarity_QP, share_QPB)
    share_QPB = share_QPB.to(score_QP.dtype).nan_to_num()
    logit_QPB = steepness * (score_QP[:, :, None] - boundary_B)
    entropy_QPB = -(torch.xlogy(share_QPB, share_QPB) + torch.xlogy(1 - share_QPB, 1 - share_QPB))
    loss_QPB = binary_cross_entropy_with_logits(logit_QPB, share_QPB, reduction="none") - entropy_QPB
    count_Q = present_QP.sum(dim=1)
    total_Q = loss_QPB.sum(dim=2).masked_fill(~present_QP, 0.0).sum(dim=1)
    return over_queries(total_Q / count_Q.clamp(min=1), count_Q > 0, reduction)


def _with_teacher(similarity_QP: Tensor, share_QPB: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cosines, which pairs count, and the teacher's scores in [0, 1], [Q, P] each; 0 where a pair does not count."""
    if share_QPB.ndim != 3 or similarity_QP.shape != share_QPB.shape[:2]:
        raise ValueError(
            f"losses: expected similarities [queries, products] and shares [queries, products, boundaries], got "
            f"{list(similarity_QP.shape)} and {list(share_QPB.shape)}; pad shares with nan"
        )
    present_QP = ~share_QPB.isnan().any(dim=2)
    score_QP = at_least_float32(similarity_QP).masked_fill(~present_QP, 0.0)
    teacher_QP = share_QPB.detach().to(score_QP.dtype).mean(dim=2).masked_fill(~present_QP, 0.0)
    return score_QP, present_QP, teacher_QP
