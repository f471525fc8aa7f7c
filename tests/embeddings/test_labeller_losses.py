import math

import torch

from embeddings.labeller_losses import grade_cross_entropy, ordinal_loss, preference_loss, rater_distribution

LOGITS = [[0.3, -1.2, 2.0], [1.0, 0.0, -1.0], [30.0, 0.0, -30.0]]
SHARES = [[1.0, 1 / 3], [0.0, 0.0], [1.0, 1.0]]


def reference():
    """Both losses of each pair, by loops."""
    rows = []
    for logits, (above_0, above_1) in zip(LOGITS, SHARES, strict=True):
        total = sum(math.exp(value) for value in logits)
        p0, p1, p2 = (math.exp(value) / total for value in logits)
        plain = (1 - above_0) * math.log(p0) + (above_0 - above_1) * math.log(p1) + above_1 * math.log(p2)
        ordinal = above_0 * math.log(p1 + p2) + (1 - above_0) * math.log(p0)
        ordinal += above_1 * math.log(p2) + (1 - above_1) * math.log(p0 + p1)
        rows.append((-plain, -ordinal))
    return torch.tensor(rows, dtype=torch.float64).T


def test_losses_equal_loops_and_pass_gradcheck():
    logits, shares = (torch.tensor(rows, dtype=torch.float64) for rows in (LOGITS, SHARES))
    plain_N, ordinal_N = reference()
    torch.testing.assert_close(grade_cross_entropy(logits, shares), plain_N, rtol=0, atol=1e-6)
    torch.testing.assert_close(ordinal_loss(logits, shares), ordinal_N, rtol=0, atol=1e-6)
    near = logits[:2].clone().requires_grad_()
    for loss in (grade_cross_entropy, ordinal_loss):
        assert torch.autograd.gradcheck(lambda values, loss=loss: loss(values, shares[:2]), near)


def test_a_far_error_costs_more_than_a_near_one_only_by_the_ordinal_loss():
    exact = torch.tensor([[1.0, 1.0]])
    near, far = torch.tensor([[-9.0, 9.0, 0.0]]), torch.tensor([[9.0, -9.0, 0.0]])
    assert ordinal_loss(far, exact) > 1.8 * ordinal_loss(near, exact)
    torch.testing.assert_close(grade_cross_entropy(far, exact), grade_cross_entropy(near, exact))


def test_shares_are_a_distribution_over_the_grades():
    torch.testing.assert_close(
        rater_distribution(torch.tensor([[1.0, 0.25], [0.4, 0.0]])), torch.tensor([[0.0, 0.75, 0.25], [0.6, 0.4, 0.0]])
    )


def test_preference_loss_is_bradley_terry_on_the_log_odds_of_the_expected_grade():
    logits = torch.tensor(LOGITS[:2], dtype=torch.float64, requires_grad=True)
    better, worse = torch.tensor([0, 1]), torch.tensor([1, 0])
    scores = []
    for row in LOGITS[:2]:
        total = sum(math.exp(value) for value in row)
        expected = (math.exp(row[1]) + 2 * math.exp(row[2])) / total
        scores.append(math.log(expected / (2 - expected)))
    gap = scores[0] - scores[1]

    found_P = preference_loss(logits, better, worse)

    wanted_P = torch.tensor([math.log1p(math.exp(-gap)), math.log1p(math.exp(gap))], dtype=torch.float64)
    torch.testing.assert_close(found_P, wanted_P, rtol=0, atol=1e-9)
    assert torch.autograd.gradcheck(lambda values: preference_loss(values, better, worse), logits)
