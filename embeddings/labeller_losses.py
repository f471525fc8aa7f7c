"""Losses of the labeller: logits of the three grades against what a pair's raters said.

The target is a pair of shares, of the raters at or above grade 1 and at or above grade 2. They are 0 or 1 where all
agree; a mean such as 1.33 of three raters is (1, 0.33), which is no clean 1.
"""

# N pairs, 3 grades, 2 boundaries between them, P preferences

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional


def rater_distribution(share_N2: Tensor) -> Tensor:
    """Shares of raters that gave the grades 0, 1 and 2, [N, 3]."""
    at_least_1_N, at_least_2_N = share_N2.unbind(1)
    return torch.stack([1 - at_least_1_N, at_least_1_N - at_least_2_N, at_least_2_N], dim=1)


def grade_cross_entropy(logits_N3: Tensor, share_N2: Tensor) -> Tensor:
    """Cross-entropy of each pair between the raters' distribution over the grades and the labeller's, [N].

    Args:
        logits_N3: of the grades 0, 1 and 2.
        share_N2: shares of raters at or above grades 1 and 2, in [0, 1], falling; 0 and 1 where all agree.
    """
    return -(rater_distribution(share_N2) * functional.log_softmax(logits_N3, dim=1)).sum(dim=1)


def ordinal_loss(logits_N3: Tensor, share_N2: Tensor) -> Tensor:
    """Binary cross-entropies of P(grade >= 1) and P(grade >= 2), summed per pair, [N].

    A labeller that calls an exact product irrelevant errs in both, so that far errors cost more than near ones, while
    the probabilities stay those of a softmax over three grades. Boundaries as targets are those of Frank and Hall 2001,
    who train one classifier for each.

    Args:
        logits_N3: of the grades 0, 1 and 2.
        share_N2: shares of raters at or above grades 1 and 2, in [0, 1].
    """
    log_N3 = functional.log_softmax(logits_N3, dim=1)
    above_N2 = torch.stack([torch.logsumexp(log_N3[:, 1:], dim=1), log_N3[:, 2]], dim=1)
    below_N2 = torch.stack([log_N3[:, 0], torch.logsumexp(log_N3[:, :2], dim=1)], dim=1)
    return -(share_N2 * above_N2 + (1 - share_N2) * below_N2).sum(dim=1)


def preference_loss(logits_N3: Tensor, better_P: Tensor, worse_P: Tensor) -> Tensor:
    """How far the labeller is from putting the better of two products first, [P].

    The logarithm of the Bradley-Terry model on a pair's score, log(P(grade >= 1) + P(2)) - log(P(grade < 2) + P(0)): of
    the expected grade e that is log(e / (2 - e)).

    Args:
        logits_N3: of the grades 0, 1 and 2.
        better_P: rows of the products that people graded higher.
        worse_P: rows of those they are compared with.
    """
    zero_N, one_N, two_N = functional.log_softmax(logits_N3, dim=1).unbind(1)
    score_N = torch.logaddexp(one_N, two_N + math.log(2)) - torch.logaddexp(one_N, zero_N + math.log(2))
    return functional.softplus(score_N[worse_P] - score_N[better_P])
