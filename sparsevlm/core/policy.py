"""Training with decisions instead of dropping: all tokens stay, attention weighs keys by a policy.

Source: Dynamic-LLaVA (arXiv 2412.00876v4, sections 3.3 and A.4; Osilly/dynamic_llava e1469bc), after DynamicViT.
"""

from __future__ import annotations

import torch
from torch import Tensor

EPS = 1e-6


def straight_through(log_probabilities: Tensor, noise: Tensor, temperature: float) -> Tensor:
    """Draw decisions whose gradient is that of their Gumbel softmax.

    Args:
        log_probabilities: [..., 2], class 0 = keep.
        noise: [..., 2] Gumbel noise (`gumbel`).
        temperature: of the softmax.

    Returns:
        [...] ones where the token stays, zeros elsewhere.
    """
    soft = ((log_probabilities + noise) / temperature).softmax(-1)
    hard = torch.zeros_like(soft).scatter_(-1, soft.argmax(-1, keepdim=True), 1.0)
    return (hard - soft.detach() + soft)[..., 0]


def gumbel(
    shape: tuple[int, ...] | torch.Size, generator: torch.Generator | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Draw Gumbel noise, as `torch.nn.functional.gumbel_softmax` does."""
    return -torch.empty(shape, dtype=dtype).exponential_(generator=generator).log()


def policy_weights(
    logits: Tensor, policy: Tensor, own: Tensor, eps: float = EPS, unseen: int = 0
) -> tuple[Tensor, Tensor]:
    """Compute the attention weights of rows whose keys stay to the degree that a policy says (MaskedSoftmax).

    w_ij = (e_ij + eps / N) / (sum_j e_ij + eps) with e_ij = exp(s_ij - max_j s_ij) P_ij, where P_ij is the policy of
    key j, and 1 where j is the row's own token. The maximum is over all keys that the row may see, dropped ones, too;
    N counts keys that it may not see (later ones) as well, to each of which eps / N leaks.

    Args:
        logits: [..., T, S], -inf where a row may not see a key.
        policy: [..., S] in [0, 1], broadcast over the rows.
        own: [T, S] bool, a row's own token.
        eps: keeps a row defined whose keys are all dropped; 0 = as if the dropped keys were gone.
        unseen: keys of the sequence that are not among the S.

    Returns:
        weights [..., T, S], and what each unseen key gets [..., T, 1].
    """
    policy = torch.where(own, 1.0, policy[..., None, :])
    raised = (logits - logits.amax(-1, keepdim=True).detach()).exp() * policy
    total = raised.sum(-1, keepdim=True) + eps
    leak = eps / (logits.shape[-1] + unseen)
    return (raised + leak) / total, leak / total


def rate_loss(decisions: Tensor, rate: float, counts: Tensor | None = None) -> Tensor:
    """Compute the mean over samples of (rate - mean decision)^2.

    Args:
        decisions: [B, N].
        rate: share that shall stay.
        counts: [B, N] bool, which decisions count; None = all.
    """
    if counts is None:
        return (rate - decisions.mean(1)).square().mean()
    counts = counts.to(decisions.dtype)
    return (rate - (decisions * counts).sum(1) / counts.sum(1).clamp(min=1)).square().mean()


def bounded_gradient(x: Tensor, limit: float) -> Tensor:
    """Clamp the gradient that flows back through `x` to +-`limit`, entry by entry."""
    if x.requires_grad:
        x.register_hook(lambda gradient: gradient.clamp(-limit, limit))
    return x
