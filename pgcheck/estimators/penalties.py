"""Penalties: what a KL or entropy term of the objective adds, in the reward or as a loss of its own.

    objective  E Σ_t γ^t (r_t − β log π/π_ref − α log π)        d_t = log π/π_ref of a token, D = Σ_t d_t of a row

* **In the reward**: r_t − β k(d_t) enters the return, and no gradient goes through it (`in_reward`, an advantage).
* **As a loss**: β k(d), differentiated by log π: c = −β k'(d), of each token, or of the whole row (`token_loss`,
  `sequence_loss`: what `compose` takes as `penalty`). As in common code, no γ^t weighs it.

k estimates the KL by samples of π: k1 = d, k2 = d²/2, k3 = e^{−d} − 1 + d (Schulman 2020, "Approximating KL divergence").
That the mean of k is the KL says nothing about the mean of ∇k (Tang & Munos, arXiv 2506.09477).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pgcheck.batch import Batch
from pgcheck.estimators.advantages import Advantage

Penalty = Callable[[Batch], Tensor]  # [..., B, T] or [..., B, 1], added to ratio · advantage: it ascends


@dataclass(frozen=True)
class Estimate:
    """An estimate of a KL from d = log π/π_ref of what π drew, and its derivative by log π."""

    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]


k1 = Estimate(lambda d: d, torch.ones_like)
k2 = Estimate(lambda d: d**2 / 2, lambda d: d)
k3 = Estimate(lambda d: torch.expm1(-d) + d, lambda d: -torch.expm1(-d))


def log_ratio(batch: Batch) -> Tensor:
    """d_t = log π/π_ref, 0 where the policy does not act, `[..., B, T]`."""
    return (batch.logp - batch.ref_logp) * batch.mask


# -- in the reward


def kl_cost(estimate: Estimate) -> Callable[[Batch], Tensor]:
    """β k(d_t), `[..., B, T]`."""

    def cost(batch: Batch) -> Tensor:
        return batch.kl_coefficient * estimate.value(log_ratio(batch))

    return cost


def entropy_cost(batch: Batch) -> Tensor:
    """α log π(a_t|k_t), `[..., B, T]`."""
    return batch.entropy_coefficient * batch.logp * batch.mask


def in_reward(advantage: Advantage, cost: Callable[[Batch], Tensor]) -> Advantage:
    """The advantage with r_t − cost_t in place of r_t; `batch.value` stays that of the reward."""

    def shaped(batch: Batch) -> Tensor:
        return advantage(replace(batch, reward=batch.reward - cost(batch)))

    return shaped


# -- as a loss


def token_loss(estimate: Estimate) -> Penalty:
    """−β k'(d_t): descends Σ_t k(d_t) as if the tokens before did not decide where the others are drawn."""

    def penalty(batch: Batch) -> Tensor:
        return -batch.kl_coefficient * estimate.slope(log_ratio(batch))

    return penalty


def sequence_loss(estimate: Estimate) -> Penalty:
    """−β k'(D), one number a row: descends k(Σ_t d_t)."""

    def penalty(batch: Batch) -> Tensor:
        return -batch.kl_coefficient * estimate.slope(log_ratio(batch).sum(-1, keepdim=True))

    return penalty


def entropy_slope(batch: Batch) -> Tensor:
    """∂H(π(·|k_t))/∂z_a = −π_a (log π_a + H), `[..., B, T, A]`: weights on the logits."""
    log_pi = torch.log_softmax(batch.logits, -1)
    pi = log_pi.exp()
    return -pi * (log_pi - (pi * log_pi).sum(-1, keepdim=True))
