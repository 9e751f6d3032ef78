"""Ratios: how a coefficient is corrected for data from another policy, `(Batch, advantage) -> [..., B, T]`, or what
broadcasts to it: `[..., B, 1]`, one number.

All of them multiply the coefficient, so none carries a gradient: what a paper writes as sg(·) is already done.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pgcheck.batch import Batch, narrowed

Ratio = Callable[[Batch, Tensor], Tensor]


def none(batch: Batch, adv: Tensor) -> Tensor:
    """1."""
    return torch.ones((), dtype=torch.float64)


def token_ratio(batch: Batch, adv: Tensor) -> Tensor:
    """r_t = π(a_t | k_t) / π_old(a_t | k_t); on-policy one number, 1."""
    return narrowed(batch.ratio)


def trajectory_weight(batch: Batch) -> Tensor:
    """w(τ) = Π_t r_t, `[..., B]`."""
    return ((batch.logp - batch.behavior_logp) * batch.mask).sum(-1).exp()


def trajectory_ratio(batch: Batch, adv: Tensor) -> Tensor:
    """w(τ) at every position."""
    return trajectory_weight(batch).unsqueeze(-1)


def truncated_weight(cap: float) -> Ratio:
    """min(w, cap)."""

    def ratio(batch: Batch, adv: Tensor) -> Tensor:
        return trajectory_ratio(batch, adv).clamp(max=cap)

    return ratio


def masked_weight(cap: float) -> Ratio:
    """w up to the cap, 0 above it."""

    def ratio(batch: Batch, adv: Tensor) -> Tensor:
        w = trajectory_ratio(batch, adv)
        return torch.where(w > cap, torch.zeros_like(w), w)

    return ratio


def self_normalised_weight(batch: Batch, adv: Tensor) -> Tensor:
    """B w_i / Σ_j w_j over the batch."""
    log_w = ((batch.logp - batch.behavior_logp) * batch.mask).sum(-1)
    return (batch.rows * torch.softmax(log_w, -1)).unsqueeze(-1)


def clipped_ratio(*, low: float | None, high: float) -> Ratio:
    """clip(r_t, 1 − low, 1 + high): the weight is clipped, the gradient stays (CISPO). `low=None`: no lower bound."""

    def ratio(batch: Batch, adv: Tensor) -> Tensor:
        floor = 0.0 if low is None else 1.0 - low
        return token_ratio(batch, adv).clamp(floor, 1.0 + high)

    return ratio


def ppo_clip(*, low: float = 0.2, high: float = 0.2) -> Ratio:
    """The derivative of min(r A, clip(r, 1 − low, 1 + high) A) by log π: r where it is not clipped, else 0."""

    def ratio(batch: Batch, adv: Tensor) -> Tensor:
        return _silenced_outside(token_ratio(batch, adv), adv, low=low, high=high)

    return ratio


def sequence_clip(*, low: float, high: float) -> Ratio:
    """PPO's rule for s = w^{1/|o|}, the geometric mean of the token ratios of a row (GSPO).

    ∂s/∂log π_t = s/|o|; the 1/|o| is `aggregation.sequence_mean`.
    """

    def ratio(batch: Batch, adv: Tensor) -> Tensor:
        log_w = ((batch.logp - batch.behavior_logp) * batch.mask).sum(-1)
        s = (log_w / batch.length.clamp(min=1.0)).exp().unsqueeze(-1)
        return _silenced_outside(s, adv, low=low, high=high)

    return ratio


def _silenced_outside(r: Tensor, adv: Tensor, *, low: float, high: float) -> Tensor:
    """r, but 0 where it has left [1 − low, 1 + high] on the side the advantage pushes to."""
    if r.numel() == 1 and 1.0 - low <= float(r) <= 1.0 + high:  # on-policy
        return r
    above, below, up = r > 1.0 + high, r < 1.0 - low, adv >= 0
    return torch.where((above & up) | (below & ~up), 0.0, r)
