"""A weighted sum of losses over the graded products of a step's queries, with what the losses learn themselves."""

# Q queries, P products of a query, padded, U distinct products of the step, D width of a vector, B boundaries

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from embeddings.losses import circle_loss, over_queries, supcon_loss
from embeddings.ranking_losses import (
    cosent_loss,
    infonce_loss,
    pairwise_logistic_loss,
    pooled_logistic_loss,
    rg_loss,
    triplet_loss,
)
from embeddings.recipes import TEMPERATURE_BOUNDS, LossName, LossRecipe, LossTerm
from embeddings.soft_losses import listwise_kl_loss, margin_mse_loss, ordinal_kl_loss


class StepTargets(NamedTuple):
    """What is known of the products of a step.

    Attributes:
        document_index_QP: row of each query's products among the step's; -1 pads.
        grade_QP: int8; -1 pads.
        share_QPB: shares of raters, or probabilities, at or above each grade but 0; nan pads.
        is_foreign_QU: whether a product has no grade under this query: it is there for others, or a contrast.
    """

    document_index_QP: Tensor
    grade_QP: Tensor
    share_QPB: Tensor
    is_foreign_QU: Tensor


class OtherPairs(NamedTuple):
    """Graded pairs of the step that other workers hold.

    Attributes:
        query_MD: vector of each pair's query.
        document_MD: vector of each pair's product.
        grade_M: int8.
    """

    query_MD: Tensor
    document_MD: Tensor
    grade_M: Tensor


class GradedLoss(nn.Module):
    """The recipe's losses over vectors, summed over queries.

    The parameters are what its terms learn beside the encoder: the temperature of a softmax, steepness and boundaries
    of `ordinal_kl`. A parameter that no term needs takes no gradient, so that data-parallel training waits for none.

    Args:
        recipe: terms and their scales.
        terms: the recipe's, or what its stage has by default.
        num_boundaries: grades but 0.

    Example:
        >>> loss = GradedLoss(recipe, recipe.terms)
        >>> total, cosine_QP = loss(query_QD, document_UD, targets)
    """

    def __init__(self, recipe: LossRecipe, terms: Sequence[LossTerm], *, num_boundaries: int = 2) -> None:
        super().__init__()
        self.recipe, self.terms = recipe, tuple(terms)
        names = {term.loss for term in self.terms}
        # learned as logarithms: a step changes them by a factor, and they cannot turn negative
        self.log_temperature = nn.Parameter(
            torch.tensor(math.log(recipe.temperature)), requires_grad=bool(names & WITH_TEMPERATURE)
        )
        if "ordinal_kl" in names:
            self.log_steepness = nn.Parameter(torch.tensor(math.log(recipe.ordinal_steepness)))
            first, last = recipe.ordinal_boundaries
            self.boundary_B = nn.Parameter(torch.linspace(first, last, num_boundaries))

    @property
    def temperature(self) -> Tensor:
        """Of a softmax over cosines."""
        return self.log_temperature.exp()

    def clamp(self) -> None:
        """Keeps what is learned where it means something; called after a step."""
        low, high = TEMPERATURE_BOUNDS
        self.log_temperature.data.clamp_(math.log(low), math.log(high))

    def forward(
        self, query_QD: Tensor, document_UD: Tensor, targets: StepTargets, others: OtherPairs | None = None
    ) -> tuple[Tensor, Tensor, Mapping[str, Tensor]]:
        """The weighted sum, the cosines of each query's products [Q, P], and what each term adds.

        Args:
            query_QD: normalised vectors.
            document_UD: normalised vectors of the step's distinct products.
            targets: what is known of them.
            others: pairs of other workers, which count in a loss over all pairs of a step.

        Raises:
            ValueError: the recipe wants a width that the vectors do not exceed.
        """
        parts: dict[str, Tensor] = {}
        cosine_QP = self._add(parts, query_QD, document_UD, targets, others)
        for width in self.recipe.matryoshka:
            if not 0 < width < query_QD.shape[1]:
                raise ValueError(f"matryoshka: expected widths below the vectors' {query_QD.shape[1]}, got {width}")
            self._add(parts, _short(query_QD, width), _short(document_UD, width), targets, _shorter(others, width))
        return torch.stack(list(parts.values())).sum(), cosine_QP, parts

    def _add(
        self,
        parts: dict[str, Tensor],
        query_QD: Tensor,
        document_UD: Tensor,
        targets: StepTargets,
        others: OtherPairs | None,
    ) -> Tensor:
        """Adds every term at the vectors' width to the parts; returns the cosines of each query's products."""
        cosine_QU = query_QD @ document_UD.T
        cosine_QP = cosine_QU.gather(1, targets.document_index_QP.clamp(min=0))
        for term in self.terms:
            value = self._of_term(term, cosine_QP, cosine_QU, targets, others)
            parts[term.loss] = parts.get(term.loss, 0.0) + term.weight * value
        return cosine_QP

    def _pooled(self, cosine_QP: Tensor, grade_QP: Tensor, others: OtherPairs | None) -> Tensor:
        """Over the pairs of all workers, times this one's queries: the workers' sum is that of one worker."""
        cosine_N, grade_N = cosine_QP.flatten(), grade_QP.flatten()
        if others is not None:
            cosine_N = torch.cat([cosine_N, (others.query_MD * others.document_MD).sum(dim=1)])
            grade_N = torch.cat([grade_N, others.grade_M])
        return len(grade_QP) * pooled_logistic_loss(
            cosine_N, grade_N, scale=self.recipe.order_scale, focus=self.recipe.order_focus
        )

    def _of_term(
        self,
        term: LossTerm,
        cosine_QP: Tensor,
        cosine_QU: Tensor,
        targets: StepTargets,
        others: OtherPairs | None,
    ) -> Tensor:
        recipe, grade_QP = self.recipe, targets.grade_QP
        if term.in_batch:
            cosine_QP, grade_QP = with_in_batch(
                cosine_QP, grade_QP, cosine_QU, targets.is_foreign_QU, recipe.in_batch_ceiling
            )
        match term.loss:
            case "supcon":
                return supcon_loss(cosine_QP, grade_QP, self.temperature, reduction="sum")
            case "circle":
                return circle_loss(cosine_QP, grade_QP, recipe.margins, reduction="sum")
            case "infonce":
                return infonce_loss(cosine_QP, grade_QP, self.temperature, reduction="sum")
            case "cosent":
                return cosent_loss(cosine_QP, grade_QP, scale=recipe.order_scale, reduction="sum")
            case "pairwise_logistic":
                return pairwise_logistic_loss(
                    cosine_QP, grade_QP, scale=recipe.order_scale, focus=recipe.order_focus, reduction="sum"
                )
            case "pooled_logistic":
                return self._pooled(cosine_QP, grade_QP, others)
            case "triplet":
                return triplet_loss(cosine_QP, grade_QP, margin=recipe.triplet_margin, reduction="sum")
            case "rg2" | "rgx":
                keep = term.loss == "rgx"
                return rg_loss(
                    cosine_QP, grade_QP, temperature=recipe.rg_temperature, keep_interaction=keep, reduction="sum"
                )
            case "margin_mse":
                return margin_mse_loss(cosine_QP, targets.share_QPB, spread=recipe.teacher_spread, reduction="sum")
            case "listwise_kl":
                return listwise_kl_loss(
                    cosine_QP,
                    targets.share_QPB,
                    self.temperature,
                    teacher=recipe.teacher,
                    teacher_temperature=recipe.teacher_temperature,
                    reduction="sum",
                )
            case "ordinal_kl":
                return ordinal_kl_loss(
                    cosine_QP, targets.share_QPB, self.log_steepness.exp(), self.boundary_B, reduction="sum"
                )
            case "background":
                return background_loss(cosine_QU, targets.is_foreign_QU, recipe.background_cosine)


def _short(vectors: Tensor, width: int) -> Tensor:
    return normalize(vectors[:, :width], dim=1)


def _shorter(pairs: OtherPairs | None, width: int) -> OtherPairs | None:
    if pairs is None:
        return None
    return OtherPairs(_short(pairs.query_MD, width), _short(pairs.document_MD, width), pairs.grade_M)


WITH_TEMPERATURE: frozenset[LossName] = frozenset({"supcon", "infonce", "listwise_kl"})
"""Losses that share the learned temperature."""


def with_in_batch(
    similarity_QP: Tensor, grade_QP: Tensor, similarity_QU: Tensor, is_foreign_QU: Tensor, ceiling: float | None
) -> tuple[Tensor, Tensor]:
    """Similarities and grades of the pairs, and beside them the step's other products as grade 0, [Q, P + U] each.

    A random product is not reliably irrelevant, the more so the closer it is: one above `ceiling` times the cosine of
    the query's best positive is masked out, and so is every product for a query without a positive. None lets all in.

    Cites: Moreira et al. 2024 (arXiv 2407.15831), whose share is of the best positive's score as well.
    """
    best_Q1 = similarity_QP.detach().masked_fill(grade_QP <= 0, -torch.inf).amax(dim=1, keepdim=True)
    limit_Q1 = torch.where(best_Q1 > -torch.inf, torch.inf, best_Q1) if ceiling is None else ceiling * best_Q1
    foreign_QU = (is_foreign_QU & (similarity_QU.detach() <= limit_Q1)).to(grade_QP.dtype) - 1
    return torch.cat([similarity_QP, similarity_QU], dim=1), torch.cat([grade_QP, foreign_QU], dim=1)


def background_loss(similarity_QU: Tensor, is_foreign_QU: Tensor, cosine: float) -> Tensor:
    """Squared distance between a query's mean cosine to the step's other products and a fixed one, summed over queries.

    Losses inside an instance leave a common offset of all cosines free; this holds it, at the mean, so that a single
    product that happens to be relevant moves it little.
    """
    count_Q = is_foreign_QU.sum(dim=1)
    mean_Q = similarity_QU.masked_fill(~is_foreign_QU, 0.0).sum(dim=1) / count_Q.clamp(min=1)
    return over_queries((mean_Q - cosine).square(), count_Q > 0, "sum")
