"""Policies instead of dropping, against the formulas written out entry by entry."""

import math

import pytest
import torch

from sparsevlm.core.policy import bounded_gradient, gumbel, policy_weights, rate_loss, straight_through


def test_weights_are_those_of_the_formula():
    torch.manual_seed(0)
    n, eps, later = 5, 1e-2, 3
    scores, policy = torch.randn(n, n), torch.tensor([1.0, 0.0, 0.3, 1.0, 0.0])
    logits = scores.masked_fill(torch.ones(n, n).triu(1).bool(), -math.inf)
    weights, leak = policy_weights(logits, policy, torch.eye(n).bool(), eps, unseen=later)
    for i in range(n):
        highest = max(float(scores[i, j]) for j in range(i + 1))  # dropped keys, too
        raised = [math.exp(float(scores[i, j]) - highest) * (1 if i == j else float(policy[j])) for j in range(i + 1)]
        raised += [0.0] * (n - i - 1)
        total = sum(raised) + eps
        want = [(e + eps / (n + later)) / total for e in raised]
        torch.testing.assert_close(weights[i], torch.tensor(want))
        assert float(leak[i]) == pytest.approx(eps / (n + later) / total)
        assert float(weights[i].sum() + later * leak[i]) == pytest.approx(1)


def test_decisions_are_hard_and_their_gradient_is_that_of_the_soft_ones():
    scores = torch.tensor([[0.2, -0.4], [1.0, 2.0]], requires_grad=True)
    noise, temperature = torch.tensor([[0.5, 0.1], [0.0, 0.3]]), 0.7
    decisions = straight_through(scores, noise, temperature)
    assert decisions.tolist() == [1.0, 0.0]
    (gradient,) = torch.autograd.grad(decisions.sum(), scores)
    soft = ((scores + noise) / temperature).softmax(-1)[:, 0]
    (want,) = torch.autograd.grad(soft.sum(), scores)
    torch.testing.assert_close(gradient, want)
    drawn = straight_through(torch.tensor([0.8, 0.2]).log().expand(4000, 2), gumbel((4000, 2)), 1.0)
    assert drawn.mean().item() == pytest.approx(0.8, abs=0.03)


def test_rate_loss_and_bounded_gradient():
    decisions = torch.tensor([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
    assert rate_loss(decisions, 0.25).item() == pytest.approx((0.25**2 + 0.75**2) / 2)
    counts = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]]).bool()
    assert rate_loss(decisions, 0.5, counts).item() == pytest.approx((0 + 0.25) / 2)
    x = torch.zeros(3, requires_grad=True)
    (bounded_gradient(x.clone(), 0.02) * torch.tensor([5.0, -5.0, 0.01])).sum().backward()
    torch.testing.assert_close(x.grad, torch.tensor([0.02, -0.02, 0.01]))
