"""Advantages: what multiplies ∇log π_t, `Batch -> [..., B, T]` or `[..., B, 1]` (one number a row).

A baseline is a number subtracted from a return; `over` says whose rows it looks at. Statistics of one number a row take
`over="group"` or `"batch"`; all of them accept any group labels and groups of unequal size. A statistic over peers is
`[..., B]`, or `[..., 1]` where all rows of each batch are known to share it.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pgcheck.batch import Batch

Advantage = Callable[[Batch], Tensor]  # [..., B, T] or [..., B, 1]
Over = Literal["group", "batch"]


def peers(batch: Batch, over: Over) -> Tensor:
    """1. where row j counts for row i, itself included, `[..., B, B]`; `[B, B]` where all batches share it, `[1, B]` where all
    rows do."""
    labels = batch.known_labels
    if over == "batch" or (labels is not None and len(set(labels)) == 1):
        return torch.ones(1, batch.rows, dtype=batch.episode_return.dtype, device=batch.group.device)
    return _shared(batch.same_group)


def without_self(same: Tensor) -> Tensor:
    """The peers of each row but itself."""
    return same * (1.0 - _itself(same))


def _itself(same: Tensor) -> Tensor:
    """1. where row j is row i, `[B, B]`."""
    return torch.eye(same.shape[-1], dtype=same.dtype, device=same.device)


def _shared(same: Tensor) -> Tensor:
    """`[B, B]` where all batches share it (an expanded tensor), else as it is."""
    return same[0] if same.dim() == 3 and same.stride(0) == 0 else same


def sum_of_peers(x: Tensor, same: Tensor) -> Tensor:
    """Σ_j same_ij x_j for `x` `[..., B]`; or with any other weights in place of `same`."""
    shared = _shared(same)
    if shared.dim() > 2:
        return (shared @ x.unsqueeze(-1)).squeeze(-1)
    return (x @ shared[0]).unsqueeze(-1) if len(shared) == 1 else x @ shared.mT


def number_of_peers(same: Tensor) -> Tensor:
    """Σ_j same_ij, also without the leading dimensions where all batches share it."""
    return _shared(same).sum(-1)


Weights = Callable[[Tensor], Tensor]  # same_ij `[..., B, B]` (or `[1, B]`) -> W, `[..., B, B]` (or `[1, B]`)


def shares(same: Tensor) -> Tensor:
    """same_ij / Σ_j same_ij: what each peer is of a mean; 0 throughout for a row without peers."""
    return same / number_of_peers(same).clamp(min=1.0).unsqueeze(-1)


def shares_of_others(same: Tensor) -> Tensor:
    """The same without row i: 1/(n − 1) for each of the others."""
    return shares(without_self(same))


@dataclass(frozen=True)
class Rest:
    """I − W: what is left of a return without its baseline W R."""

    weights: Weights

    def __call__(self, same: Tensor) -> Tensor:
        return _itself(same) - self.weights(same)


@dataclass(frozen=True)
class Spread:
    """same_ij / (Σ_j same_ij − ddof): what makes a variance of squared deviations."""

    ddof: int

    def __call__(self, same: Tensor) -> Tensor:
        return same / (number_of_peers(same) - self.ddof).clamp(min=1.0).unsqueeze(-1)


def weighted(weights: Weights, x: Tensor, batch: Batch, over: Over) -> Tensor:
    """W x of `x` `[..., B]`, as `sum_of_peers`; what W is of known labels is found once, and where it tells no two peers apart
    a sum over each group is enough."""
    if (known := batch.known_labels) is None:
        return sum_of_peers(x, weights(peers(batch, over)))
    labels = known if over == "group" else (0,) * len(known)
    size = _size_of_each(labels)
    alike = None if size is None else _own_and_all(weights, size, x.dtype)
    if size is None or alike is None:
        return sum_of_peers(x, _of_labels(weights, labels, x.dtype, x.device))
    own, every = alike
    rows = x if size == len(labels) else x.unflatten(-1, (-1, size))
    total = ((rows @ rows.new_ones(size)) * every).unsqueeze(-1)
    if own == 0.0:
        return total if rows is x else total.expand(rows.shape).flatten(-2)
    out = torch.add(total, rows, alpha=own)
    return out if rows is x else out.flatten(-2)


@functools.lru_cache(maxsize=256)
def _size_of_each(labels: tuple[int, ...]) -> int | None:
    """G, where groups are as large, one after the other."""
    size, number = labels.count(labels[0]), len(set(labels))
    runs = sum(a != b for a, b in itertools.pairwise(labels)) + 1
    return size if runs == number and all(labels.count(x) == size for x in set(labels)) else None


@functools.lru_cache(maxsize=256)
def _own_and_all(weights: Weights, size: int, dtype: torch.dtype) -> tuple[float, float] | None:
    """What W = a I + b 1 1ᵀ of a group of `size` rows has as a and b; None if it is not such a sum."""
    W = weights(torch.ones(size, size, dtype=dtype))
    b = float(W[0, -1]) if size > 1 else 0.0
    a = float(W[0, 0]) - b
    same = torch.allclose(W, a * torch.eye(size, dtype=dtype) + b, rtol=0, atol=4 * torch.finfo(dtype).eps)
    return (a, b) if same else None


@functools.lru_cache(maxsize=256)
def _of_labels(weights: Weights, labels: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """W of rows with these labels, `[B, B]`."""
    group = torch.tensor(labels, device=device)
    return weights((group.unsqueeze(-1) == group).to(dtype))


def mean_of_peers(x: Tensor, same: Tensor) -> Tensor:
    """Σ_j same_ij x_j / Σ_j same_ij for `x` `[..., B]`; 0 for a row without peers."""
    return sum_of_peers(x, same) / number_of_peers(same).clamp(min=1.0)


def std_of_peers(x: Tensor, same: Tensor, *, ddof: int = 0) -> Tensor:
    """Standard deviation over the peers of each row, itself included; 0 where fewer than ddof + 1 peers."""
    spread = sum_of_peers((x - mean_of_peers(x, same)) ** 2, same)  # peers have one mean
    return (spread / (number_of_peers(same) - ddof).clamp(min=1.0)).sqrt()


def std_of_others(x: Tensor, others: Tensor) -> Tensor:
    """Standard deviation over the peers but itself: each row has a mean of its own; 0 for a row without others."""
    spread = ((x.unsqueeze(-2) - mean_of_peers(x, others).unsqueeze(-1)) ** 2 * others).sum(-1)
    return (spread / number_of_peers(others).clamp(min=1.0)).sqrt()


# -- returns


def episode_return(batch: Batch) -> Tensor:
    """R = Σ_k γ^k r_k, `[..., B, 1]`."""
    return batch.episode_return.unsqueeze(-1)


def discounted_to_go(batch: Batch) -> Tensor:
    """γ^t Ĝ_t."""
    return batch.discount_weight * batch.reward_to_go


def undiscounted_weight_to_go(batch: Batch) -> Tensor:
    """Ĝ_t without γ^t."""
    return batch.reward_to_go


def per_decision(batch: Batch) -> Tensor:
    """Σ_{k≥t} w_{0:k} γ^k r_k, with w_{0:k} the product of the ratios of positions 0..k."""
    w = ((batch.logp - batch.behavior_logp) * batch.mask).cumsum(-1).exp()
    return (w * batch.discount_weight * batch.reward).flip(-1).cumsum(-1).flip(-1)


# -- baselines


def to_go_minus(baseline: Callable[[Batch], Tensor]) -> Advantage:
    """γ^t (Ĝ_t − b_t), with b `[..., B, T]` from `baseline`."""

    def advantage(batch: Batch) -> Tensor:
        return batch.discount_weight * (batch.reward_to_go - baseline(batch))

    return advantage


@dataclass(frozen=True)
class OfReturns:
    """b = W R: a baseline that is a sum of returns, with weights that depend on who is whose peer alone."""

    weights: Weights
    over: Over

    def __call__(self, batch: Batch) -> Tensor:
        return weighted(self.weights, batch.episode_return, batch, self.over)


def return_minus(baseline: Callable[[Batch], Tensor]) -> Advantage:
    """R − b, with b `[..., B]` from `baseline`."""

    def advantage(batch: Batch) -> Tensor:
        if isinstance(baseline, OfReturns):
            return weighted(Rest(baseline.weights), batch.episode_return, batch, baseline.over).unsqueeze(-1)
        return (batch.episode_return - baseline(batch)).unsqueeze(-1)

    return advantage


def constant(value: float) -> Callable[[Batch], Tensor]:
    """b_t = value."""

    def baseline(batch: Batch) -> Tensor:
        return torch.full_like(batch.reward, value)

    return baseline


def state_value(batch: Batch) -> Tensor:
    """b_t = V^π(s_t)."""
    return batch.value[..., :-1]


def next_state_value(batch: Batch) -> Tensor:
    """b_t = V^π(s_{t+1}): it depends on a_t through s_{t+1}."""
    return batch.value[..., 1:]


def next_action_value(batch: Batch) -> Tensor:
    """b_t = Q^π at the next state and action of the policy, 0 after the last; side table `action_value` `[..., B, T]`."""
    return next_policy_position(batch.side["action_value"], batch)


def half_own_return(batch: Batch) -> Tensor:
    """b_t = Ĝ_t / 2: a baseline fitted halfway to the very return it is subtracted from."""
    return 0.5 * batch.reward_to_go


def side_column(name: str) -> Callable[[Batch], Tensor]:
    """b from the side table `name`."""

    def baseline(batch: Batch) -> Tensor:
        return batch.side[name]

    return baseline


def mean_return(over: Over) -> Callable[[Batch], Tensor]:
    """b = mean of R over the peers, own row included, `[..., B]`."""
    return OfReturns(shares, over)


def mean_of_others(over: Over) -> Callable[[Batch], Tensor]:
    """b_i = mean of R over the peers but i, `[..., B]`; a row without others gets no baseline (0)."""
    return OfReturns(shares_of_others, over)


def length_weighted_mean(*, own: Literal["exclude", "include"]) -> Callable[[Batch], Tensor]:
    """b_i = Σ_j |o_j| R_j / Σ_j |o_j| over the group, with or without row i, `[..., B]`; 0 where there is nobody."""

    def baseline(batch: Batch) -> Tensor:
        same = batch.same_group if own == "include" else without_self(batch.same_group)
        total = sum_of_peers(batch.length * batch.episode_return, same)
        return total / sum_of_peers(batch.length, same).clamp(min=1.0)

    return baseline


def batch_mean_to_go(batch: Batch) -> Tensor:
    """b_t = mean over all B rows of Ĝ_{j,t}, which is zero after the end."""
    return batch.reward_to_go.mean(-2, keepdim=True)


def alive_mean_to_go(batch: Batch) -> Tensor:
    """b_t = mean of Ĝ_{j,t} over the rows j that still have a policy position at or after t."""
    alive = (batch.mask.flip(-1).cumsum(-1).flip(-1) > 0).to(batch.reward.dtype)
    total = (batch.reward_to_go * alive).sum(-2, keepdim=True)
    return total / alive.sum(-2, keepdim=True).clamp(min=1.0)


# -- normalised by a standard deviation


def standardised_return(over: Over, *, ddof: int = 0, eps: float = 1e-6) -> Advantage:
    """(R − mean) / (std + ε) over the peers; 0 where they agree up to rounding, whatever ε: 0/0 is not rounding/rounding."""
    deviation, spread = Rest(shares), Spread(ddof)

    def advantage(batch: Batch) -> Tensor:
        centred = weighted(deviation, batch.episode_return, batch, over)
        std = weighted(spread, centred * centred, batch, over).sqrt_()  # [..., B], or [..., 1]
        divisor = (std + eps).masked_fill_(std <= batch.rounding, torch.inf)
        adv = centred / divisor if centred.requires_grad else centred.div_(divisor)
        return adv.unsqueeze(-1)

    return advantage


def standardised_by_others(over: Over, *, eps: float) -> Advantage:
    """(R_i − mean)/(std + ε), mean and std over the peers but i: the divisor does not see the own return."""

    def advantage(batch: Batch) -> Tensor:
        R, others = batch.episode_return, without_self(peers(batch, over))
        return ((R - mean_of_peers(R, others)) / (std_of_others(R, others) + eps)).unsqueeze(-1)

    return advantage


def token_standardised(advantage: Advantage, *, eps: float = 1e-8) -> Advantage:
    """(A − mean) / √(var + ε), mean and variance over all policy positions of the batch: long rows weigh more."""

    def whitened(batch: Batch) -> Tensor:
        adv = advantage(batch).expand(batch.mask.shape)
        tokens = batch.mask.sum((-1, -2), keepdim=True).clamp(min=1.0)
        mean = (adv * batch.mask).sum((-1, -2), keepdim=True) / tokens
        var = ((adv - mean) ** 2 * batch.mask).sum((-1, -2), keepdim=True) / tokens
        return (adv - mean) / (var + eps).sqrt()

    return whitened


# -- values in place of returns


def next_policy_position(x: Tensor, batch: Batch) -> Tensor:
    """At t, the entry of `x` `[..., B, T]` at the next policy position after t; 0 if there is none."""
    out = []
    following = torch.zeros_like(x[..., 0])
    for t in range(x.shape[-1] - 1, -1, -1):
        out.append(following)
        following = torch.where(batch.mask[..., t] > 0, x[..., t], following)
    return torch.stack(out[::-1], -1)


def wrong_value(batch: Batch) -> Tensor:
    """A critic's V(s_t), which is wrong; side table `wrong_value` `[..., B, T+1]`."""
    return batch.side["wrong_value"][..., :-1]


def temporal_difference(value: Callable[[Batch], Tensor]) -> Advantage:
    """γ^t δ_t = γ^t (Σ_{t≤k<t'} γ^{k−t} r_k + γ^{t'−t} V(s_t') − V(s_t)), t' the next policy position after t.

    What observations in between pay belongs to the decision before them; V is 0 after the last decision.
    """

    def advantage(batch: Batch) -> Tensor:
        paid, v = discounted_to_go(batch), batch.discount_weight * value(batch)
        return paid - next_policy_position(paid, batch) + next_policy_position(v, batch) - v

    return advantage


def gae(decay: float, value: Callable[[Batch], Tensor]) -> Advantage:
    """γ^t A_t with A_t = δ_t + λ γ^{t'−t} A_t', t' the next policy position: generalised advantage estimation.

    λ = `decay` counts decisions: an observation between two of them decays nothing. Nothing is bootstrapped from an
    observation or from padding.
    """
    difference = temporal_difference(value)

    def advantage(batch: Batch) -> Tensor:
        delta, out = difference(batch), []
        following = torch.zeros_like(delta[..., 0])
        for t in range(delta.shape[-1] - 1, -1, -1):
            following = torch.where(batch.mask[..., t] > 0, delta[..., t] + decay * following, following)
            out.append(following)
        return torch.stack(out[::-1], -1)

    return advantage


# -- groups of equal states

Fallback = Literal["no baseline", "zero advantage"]


def anchor_state_advantage(
    *, own: Literal["exclude", "include"], alone: Fallback, std: bool = False, eps: float = 1e-6
) -> Advantage:
    """γ^t (Ĝ_t − mean of Ĝ over the positions of the group in the same state), GiGPO's step-level advantage.

    Args:
        own: whether the row's own positions are part of the mean (and std).
        alone: what a position gets that no other row of the group shares its state with.
        std: divide by the standard deviation of those returns plus ε.
    """

    def advantage(batch: Batch) -> Tensor:
        B, T = batch.mask.shape[-2:]
        to_go = batch.reward_to_go
        flat_state, flat_to_go = batch.state.flatten(-2), to_go.flatten(-2)
        acts = batch.mask.flatten(-2)
        same = (flat_state.unsqueeze(-1) == flat_state.unsqueeze(-2)).to(to_go.dtype)
        same = same * acts.unsqueeze(-1) * acts.unsqueeze(-2)
        row = torch.arange(B, device=to_go.device).unsqueeze(-1).expand(B, T).flatten()  # the row of each position
        same = same * batch.same_group[..., row, :][..., row]  # [..., BT, BT]
        others = same * (row.unsqueeze(-1) != row).to(to_go.dtype)
        shared = others.sum(-1) > 0
        counted = others if own == "exclude" else same
        n = counted.sum(-1).clamp(min=1.0)
        mean = (counted @ flat_to_go.unsqueeze(-1)).squeeze(-1) / n
        adv = flat_to_go - mean
        if std:
            spread = ((flat_to_go.unsqueeze(-2) - mean.unsqueeze(-1)) ** 2 * counted).sum(-1) / n
            spread = spread.sqrt()
            agree = spread <= mean.abs() * (16 * torch.finfo(spread.dtype).eps)
            adv = torch.where(agree, 0.0, adv / (spread + eps))
        adv = torch.where(shared, adv, flat_to_go if alone == "no baseline" else torch.zeros_like(adv))
        return batch.discount_weight * adv.unflatten(-1, (B, T))

    return advantage


def total(*advantages: Advantage, weights: tuple[float, ...]) -> Advantage:
    """Σ_j weight_j · advantage_j."""

    def advantage(batch: Batch) -> Tensor:
        parts = [w * a(batch).expand(batch.mask.shape) for w, a in zip(weights, advantages, strict=True)]
        return torch.stack(parts).sum(0)

    return advantage


# -- for another objective than J


def _choose(n: Tensor, r: int) -> Tensor:
    """Binomials C(n, r) of whole n ≥ 0."""
    out = torch.ones_like(n)
    for j in range(r):
        out = out * (n - j) / (j + 1)
    return out


def expected_maximum(k: int, *, over_others: bool = False) -> Advantage:
    """k · mean over the (k−1)-subsets I of the other rows of the group of max(R_i, max_I R); k ≥ 2.

    ∇E max of k = E[max · Σ S over the k rows] = k E[max S_i] by symmetry, and the mean over I uses every set that row i
    is in. `over_others` subtracts max_I R, which does not depend on row i. With fewer than k − 1 others: 0.
    """

    def advantage(batch: Batch) -> Tensor:
        R, same = batch.episode_return, batch.same_group
        index = torch.arange(batch.rows, device=R.device)
        lower, tie = R.unsqueeze(-1) < R.unsqueeze(-2), R.unsqueeze(-1) == R.unsqueeze(-2)
        before = (lower | (tie & (index.unsqueeze(-1) < index))).to(R.dtype) * same  # i stands before j in its group
        rank = before.sum(-2, keepdim=True) - before  # of j without i
        largest = _choose(rank, k - 2) * without_self(same)  # number of sets I in which j is the largest
        best = torch.maximum(R.unsqueeze(-1), R.unsqueeze(-2)) - (R.unsqueeze(-2) if over_others else 0.0)
        return (k * (largest * best).sum(-1) / largest.sum(-1).clamp(min=1.0)).unsqueeze(-1)

    return advantage


def mean_over_successes(*, centered: bool = False) -> Advantage:
    """1[R_i > ½]/q̂ with q̂ the share of successes in the group, less 1 if `centered`; 0 where nobody succeeds."""

    def advantage(batch: Batch) -> Tensor:
        success = (batch.episode_return > 0.5).to(batch.reward.dtype)
        rate = mean_of_peers(success, batch.same_group)
        some = rate > 0
        share = (success - rate if centered else success) / rate.where(some, torch.ones_like(rate))
        return share.where(some, torch.zeros_like(share)).unsqueeze(-1)

    return advantage


def best_of_group(batch: Batch) -> Tensor:
    """1 for the row with the largest return of its group, times G; shared where several are largest."""
    R, same = batch.episode_return, batch.same_group
    best = R.unsqueeze(-2).expand(same.shape).masked_fill(same == 0, -torch.inf).amax(-1)
    wins = (best <= R).to(R.dtype)
    return (wins / mean_of_peers(wins, same)).unsqueeze(-1)
