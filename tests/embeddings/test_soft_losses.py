"""Losses of soft grades against float64 loops over the formulas that share no code with them."""

import math

import numpy as np
import pytest
import torch

from embeddings.soft_losses import listwise_kl_loss, margin_mse_loss, ordinal_kl_loss

TAU = torch.tensor(0.3, dtype=torch.float64)
STEEPNESS = torch.tensor(7.0, dtype=torch.float64)
BOUNDARY = torch.tensor([0.2, 0.6], dtype=torch.float64)


def random_shares(seed, num_queries=5):
    """Padded similarities [Q, P] and shares [Q, P, 2]; a query has one to six products, some of clean grades."""
    generator = np.random.default_rng(seed)
    similarity, share = np.zeros((num_queries, 7)), np.full((num_queries, 7, 2), np.nan)
    for row in range(num_queries):
        places = generator.permutation(7)[: 1 if row == 0 else generator.integers(2, 7)]
        similarity[row, places] = generator.uniform(-1, 1, len(places))
        above = np.sort(generator.uniform(size=(len(places), 2)), axis=1)[:, ::-1]
        share[row, places] = np.where(generator.uniform(size=(len(places), 1)) < 0.3, above.round(), above)
    return torch.tensor(similarity), torch.tensor(share)


def rows_of(similarity, share):
    for scores, shares in zip(similarity.tolist(), share.tolist(), strict=True):
        yield [(s, tuple(above)) for s, above in zip(scores, shares, strict=True) if not math.isnan(above[0])]


def margin_mse_by_hand(row):
    if len(row) < 2:
        return None
    off = [
        ((a - b) - 0.5 * (sum(x) / 2 - sum(y) / 2)) ** 2
        for i, (a, x) in enumerate(row)
        for j, (b, y) in enumerate(row)
        if i != j
    ]
    return sum(off) / len(off)


def listwise_by_hand(row):
    if len(row) < 2:
        return None
    wanted = [math.exp(sum(above) / 2 / 0.2) for _, above in row]
    found = [math.exp(score / 0.3) for score, _ in row]
    wanted, found = ([value / sum(part) for value in part] for part in (wanted, found))
    return sum(w * math.log(w / f) for w, f in zip(wanted, found, strict=True))


def listwise_of_odds_by_hand(row):
    if len(row) < 2:
        return None

    def odds(share):
        clipped = min(max(share, 1e-3), 1 - 1e-3)
        return clipped / (1 - clipped)

    wanted = [odds(above[0]) * odds(above[1]) ** 0.5 for _, above in row]
    found = [math.exp(score / 0.3) for score, _ in row]
    wanted, found = ([value / sum(part) for value in part] for part in (wanted, found))
    return sum(w * math.log(w / f) for w, f in zip(wanted, found, strict=True))


def ordinal_by_hand(row):
    def divergence(share, score, boundary):
        odds = 1 / (1 + math.exp(-7 * (score - boundary)))
        parts = [(share, odds), (1 - share, 1 - odds)]
        return sum(p * math.log(p / q) for p, q in parts if p > 0)

    return sum(divergence(p, s, b) for s, above in row for p, b in zip(above, (0.2, 0.6), strict=True)) / len(row)


LOSSES = {
    "margin mse": (margin_mse_loss, margin_mse_by_hand),
    "listwise kl": (lambda s, t, **how: listwise_kl_loss(s, t, TAU, **how), listwise_by_hand),
    "listwise kl of odds": (
        lambda s, t, **how: listwise_kl_loss(s, t, TAU, teacher="logits", teacher_temperature=1.0, **how),
        listwise_of_odds_by_hand,
    ),
    "ordinal kl": (lambda s, t, **how: ordinal_kl_loss(s, t, STEEPNESS, BOUNDARY, **how), ordinal_by_hand),
}
every_loss = pytest.mark.parametrize(("loss", "by_hand"), LOSSES.values(), ids=LOSSES)


@every_loss
@pytest.mark.parametrize("seed", range(5))
def test_a_loss_equals_its_formula(loss, by_hand, seed):
    similarity, share = random_shares(seed)
    expected = [value for row in rows_of(similarity, share) if (value := by_hand(row)) is not None]

    assert loss(similarity, share, reduction="sum").item() == pytest.approx(sum(expected), rel=1e-9)
    assert loss(similarity, share).item() == pytest.approx(sum(expected) / len(expected), rel=1e-9)


@every_loss
def test_a_loss_passes_gradcheck(loss, by_hand):
    similarity, share = random_shares(7)
    assert torch.autograd.gradcheck(lambda s: loss(s, share), (similarity.requires_grad_(),))


def test_learned_scales_pass_gradcheck():
    similarity, share = random_shares(8)
    free = [value.clone().requires_grad_() for value in (TAU, STEEPNESS, BOUNDARY)]
    assert torch.autograd.gradcheck(lambda t: listwise_kl_loss(similarity, share, t), (free[0],))
    assert torch.autograd.gradcheck(lambda k, b: ordinal_kl_loss(similarity, share, k, b), (free[1], free[2]))


@every_loss
def test_padding_changes_neither_loss_nor_gradient(loss, by_hand):
    similarity, share = random_shares(11)
    share[2] = torch.nan
    found = []
    for scores in (similarity, similarity.masked_fill(share.isnan().any(dim=2), torch.nan)):
        leaf = scores.clone().requires_grad_()
        with torch.autograd.set_detect_anomaly(True):
            value = loss(leaf, share)
            value.backward()
        found.append((value.detach(), leaf.grad))
    for clean, same in zip(*found, strict=True):
        torch.testing.assert_close(clean, same, rtol=0, atol=0)


def test_each_loss_is_least_where_the_cosines_say_what_the_teacher_does():
    share = torch.tensor([[[1.0, 1.0], [1.0, 0.0], [0.0, 0.0]]], dtype=torch.float64)
    wanted = torch.tensor([[1.0, 0.5, 0.0]], dtype=torch.float64)

    # cosines half a unit apart for a sure 2 and a sure 0, at any height
    torch.testing.assert_close(margin_mse_loss(0.5 * wanted + 0.3, share), torch.tensor(0.0, dtype=torch.float64))
    exact = listwise_kl_loss(wanted * 0.3 / 0.2, share, TAU)
    torch.testing.assert_close(exact, torch.tensor(0.0, dtype=torch.float64))
    in_bands = ordinal_kl_loss(torch.tensor([[0.9, 0.4, 0.0]]), share, STEEPNESS, BOUNDARY)
    for scores in ([0.4, 0.4, 0.0], [0.9, 0.8, 0.0], [1.0, 0.5, 0.4]):
        assert ordinal_kl_loss(torch.tensor([scores]), share, STEEPNESS, BOUNDARY) > in_bands


@every_loss
def test_shapes_that_do_not_fit_are_refused(loss, by_hand):
    with pytest.raises(ValueError, match="pad shares with nan"):
        loss(torch.zeros(2, 3), torch.zeros(2, 4, 2))
