"""Estimators that are wrong on purpose, each next to the sound one it was made from.

Guarantee: every entry claims what its sound version claims, and differs from it by one mistake, the one in its docstring.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pgcheck.batch import Batch
from pgcheck.estimators.base import Claim, Couples, Estimator, biased, find_estimator, from_coefficients, on_policy
from pgcheck.estimators.from_loss import from_loss
from pgcheck.estimators.zoo import NOTES  # noqa: F401  (fills the registry)


@dataclass(frozen=True)
class Broken:
    """A mistake, and the checks that must find it."""

    estimator: Estimator
    sound: Estimator
    caught_by: tuple[str, ...]  # each of them fails
    moves: bool  # whether E ĝ changes; else only single batches show the mistake

    @property
    def mistake(self) -> str:
        """What is wrong, in one sentence."""
        fn = self.estimator.coefficients
        return " ".join((getattr(fn, "loss", fn).__doc__ or "").split())


BROKEN: dict[str, Broken] = {}


def broken(
    sound: str, *caught_by: str, moves: bool = True, couples: Couples | None = None, loss: bool = False, **settings: Any
) -> Callable[[Callable[[Batch], Any]], Callable[[Batch], Any]]:
    """Register a coefficient function (or a loss) as the broken version of the zoo's `sound`, with its claims."""

    def decorate(fn: Callable[[Batch], Any]) -> Callable[[Batch], Any]:
        base = find_estimator(sound)
        made = (from_loss if loss else from_coefficients)(
            fn,
            couples=couples or base.couples,
            name=fn.__name__,
            claims=base.claims,
            **({"min_group_size": base.min_group_size} | settings),
        )
        BROKEN[fn.__name__] = Broken(made, base, caught_by, moves)
        return fn

    return decorate


def per_row(x: Tensor, batch: Batch) -> Tensor:
    """c = x_i / B at every policy position, from one number a row."""
    return x.unsqueeze(-1) * batch.mask / batch.rows


def others(batch: Batch) -> Tensor:
    """Number of other rows in the group, `[..., B]`."""
    return batch.same_group.sum(-1) - 1.0


def group_sum(x: Tensor, batch: Batch) -> Tensor:
    """Σ_j over the group, own row included, `[..., B]`."""
    return (batch.same_group @ x.unsqueeze(-1)).squeeze(-1)


# -- credit in time


@broken("reward_to_go", "unbiased")
def discount_weight_missing(batch: Batch) -> Tensor:
    """Ĝ_t without γ^t."""
    return batch.reward_to_go * batch.mask / batch.rows


@broken("reward_to_go", "unbiased")
def to_go_off_by_one(batch: Batch) -> Tensor:
    """γ^t Ĝ_{t+1}: the reward of the action itself is lost."""
    later = torch.nn.functional.pad(batch.reward_to_go[..., 1:], (0, 1))
    return batch.discount_weight * later * batch.mask / batch.rows


@broken("reward_to_go", "unbiased")
def to_go_reversed(batch: Batch) -> Tensor:
    """The cumulative sum runs forwards: rewards up to t instead of from t on."""
    return (batch.discount_weight * batch.reward).cumsum(-1) * batch.mask / batch.rows


@broken("reward_to_go", "unbiased")
def to_go_not_discounted(batch: Batch) -> Tensor:
    """γ^t Σ_{k≥t} r_k: the sum itself is not discounted."""
    to_go = batch.reward.flip(-1).cumsum(-1).flip(-1)
    return batch.discount_weight * to_go * batch.mask / batch.rows


@broken("reinforce", "unbiased")
def clock_of_positions(batch: Batch) -> Tensor:
    """γ^t counts observations as well, where the problem's clock counts actions."""
    steps = torch.arange(batch.reward.shape[-1], dtype=batch.reward.dtype)
    return per_row((batch.discount**steps * batch.reward).sum(-1), batch)


@broken("reinforce", "unbiased")
def observation_reward_dropped(batch: Batch) -> Tensor:
    """Rewards are masked like log-probabilities: what an observation position pays is lost."""
    return per_row((batch.discount_weight * batch.reward * batch.mask).sum(-1), batch)


@broken("reinforce", "unbiased")
def reward_before_observation_dropped(batch: Batch) -> Tensor:
    """Only the last turn is scored: a reward at an action that an observation follows is lost."""
    acts_later = batch.mask.flip(-1).cumsum(-1).flip(-1) - batch.mask > 0
    acts_next = torch.nn.functional.pad(batch.mask[..., 1:], (0, 1)) > 0
    kept = torch.where(acts_later & ~acts_next, 0.0, batch.reward)
    return per_row((batch.discount_weight * kept).sum(-1), batch)


@broken("reward_to_go", "unbiased")
def eos_dropped(batch: Batch) -> Tensor:
    """The coefficient of each row's last token is lost (labels shifted by one)."""
    more = batch.mask.flip(-1).cumsum(-1).flip(-1) - batch.mask > 0
    return batch.discount_weight * batch.reward_to_go * more / batch.rows


# -- baselines


@broken("baselined(value)", "unbiased", "reward_shift", shift_invariant=True)
def baseline_sees_next_state(batch: Batch) -> Tensor:
    """V(s_{t+1}) for V(s_t), an off-by-one in the value tensor."""
    return batch.discount_weight * (batch.reward_to_go - batch.value[..., 1:]) * batch.mask / batch.rows


@broken("leave_one_out", "unbiased")
def own_sample_in_the_mean(batch: Batch) -> Tensor:
    """The mean runs over the whole group, the own return included."""
    R = batch.episode_return
    return per_row(R - group_sum(R, batch) / (others(batch) + 1.0), batch)


@broken("leave_one_out", "reward_shift", moves=False, shift_invariant=True)
def sum_of_others_over_group_size(batch: Batch) -> Tensor:
    """Σ of the others divided by G for G − 1: no bias, but the mean reward is no longer taken away."""
    R = batch.episode_return
    return per_row(R - (group_sum(R, batch) - R) / (others(batch) + 1.0), batch)


@broken("leave_one_out", "unbiased")
def divided_by_std(batch: Batch) -> Tensor:
    """The leave-one-out advantage divided by the standard deviation of the group."""
    R, n = batch.episode_return, others(batch) + 1.0
    mean = group_sum(R, batch) / n
    spread = ((R.unsqueeze(-2) - mean.unsqueeze(-1)) ** 2 * batch.same_group).sum(-1) / n
    return per_row((R - mean) * n / (n - 1.0) / (spread.sqrt() + 1e-3), batch)


@broken("leave_one_out", "unbiased")
def alive_only(batch: Batch) -> Tensor:
    """The mean of the others at t runs over those still alive at t."""
    alive = (batch.mask.flip(-1).cumsum(-1).flip(-1) > 0).to(batch.reward.dtype)
    to_go = batch.reward_to_go * alive
    among = batch.same_group @ alive
    mean = (batch.same_group @ to_go) / among.clamp(min=1.0)  # [..., B, T]
    return batch.discount_weight * (batch.reward_to_go - mean) * batch.mask / batch.rows


@broken("leave_one_out", "unbiased")
def negative_advantages_dropped(batch: Batch) -> Tensor:
    """Only what did better than the others is learned from."""
    R = batch.episode_return
    return per_row((R - (group_sum(R, batch) - R) / others(batch)).clamp(min=0.0), batch)


# -- groups


@broken("batch_mean(group)", "proportional", couples="batch")
def groups_merged(batch: Batch) -> Tensor:
    """One mean over all prompts for one mean each."""
    R = batch.episode_return
    return per_row(R - R.mean(-1, keepdim=True), batch)


def _groups(batch: Batch) -> int:
    return int(batch.group.unique().numel())


def _reshaped(batch: Batch) -> bool:
    return batch.rows % _groups(batch) == 0 and _groups(batch) > 1


@broken("leave_one_out", "row_order", moves=False, couples="batch")
def tiled_for_repeated(batch: Batch) -> Tensor:
    """Rows are taken as tiled [a, b, a, b] where they are repeated [a, a, b, b]: the baseline is another prompt's."""
    R, P = batch.episode_return, _groups(batch)
    if not _reshaped(batch):
        return find_estimator("leave_one_out").coefficients(batch)
    table = R.unflatten(-1, (batch.rows // P, P))  # [..., G, P]
    G = table.shape[-2]
    mean = (table.sum(-2, keepdim=True) - table) / (G - 1)
    return per_row((table - mean).flatten(-2), batch)


@broken("leave_one_out", "unbiased", "row_order", couples="batch")
def advantages_transposed(batch: Batch) -> Tensor:
    """Advantages by prompt are flattened in the other order: a row gets another row's advantage."""
    R, P = batch.episode_return, _groups(batch)
    if not _reshaped(batch):
        return find_estimator("leave_one_out").coefficients(batch)
    table = R.unflatten(-1, (P, batch.rows // P))
    G = table.shape[-1]
    adv = table - (table.sum(-1, keepdim=True) - table) / (G - 1)
    return per_row(adv.mT.flatten(-2), batch)


@broken("leave_one_out", "group_labels", moves=False)
def group_ids_as_positions(batch: Batch) -> Tensor:
    """Group ids are taken as 0, 1, …: any other id has no mean."""
    R, ids = batch.episode_return, torch.arange(batch.rows)
    member = (batch.group.unsqueeze(-1) == ids).to(R.dtype)  # [..., B, ids]
    total = (member.mT @ R.unsqueeze(-1)).squeeze(-1)  # [..., ids]
    of_row = (member @ total.unsqueeze(-1)).squeeze(-1)
    return per_row(R - (of_row - R) / others(batch), batch)


# -- aggregation


@broken("reinforce", "unbiased", loss=True)
def sign_flipped(batch: Batch) -> Tensor:
    """J itself is handed to the optimiser that minimises."""
    return (batch.episode_return[:, None] * batch.logp * batch.mask).sum(-1).mean()


@broken("reinforce", "unbiased", couples="batch", loss=True)
def summed_over_rows(batch: Batch) -> Tensor:
    """The sum over rows for the mean."""
    return -(batch.episode_return[:, None] * batch.logp * batch.mask).sum()


@broken("reinforce", "unbiased", couples="batch", loss=True)
def divided_by_rows_twice(batch: Batch) -> Tensor:
    """The mean of what was divided by B already."""
    return -(batch.episode_return[:, None] * batch.logp * batch.mask).sum(-1).mean() / batch.rows


@broken("reinforce", "unbiased", loss=True)
def divided_by_own_length(batch: Batch) -> Tensor:
    """The mean over each row's tokens: short rows weigh more."""
    return -((batch.episode_return[:, None] * batch.logp * batch.mask).sum(-1) / batch.length).mean()


@broken("reinforce", "unbiased", couples="batch", loss=True)
def token_mean(batch: Batch) -> Tensor:
    """The mean over all tokens of the batch: its number depends on the actions."""
    return -(batch.episode_return[:, None] * batch.logp * batch.mask).sum() / batch.mask.sum()


@broken("reinforce", "unbiased", "padding_length", couples="batch", loss=True)
def mean_over_padding(batch: Batch) -> Tensor:
    """(loss · mask).mean(), which divides by B · T."""
    return -(batch.episode_return[:, None] * batch.logp * batch.mask).mean()


@broken("reinforce", "mask_respected", moves=False, loss=True)
def mask_ignored(batch: Batch) -> Tensor:
    """No mask: tokens of tools and of padding are trained on."""
    return -(batch.episode_return[:, None] * batch.logp).sum(-1).mean()


@broken("reinforce", "unbiased", "mask_respected")
def mask_shifted(batch: Batch) -> Tensor:
    """The mask is one position late against the log-probabilities."""
    late = torch.nn.functional.pad(batch.mask[..., :-1], (1, 0))
    return batch.episode_return.unsqueeze(-1) * late / batch.rows


# -- off-policy


def log_ratio(batch: Batch) -> Tensor:
    """Σ_t log r_t over policy positions, `[..., B]`."""
    return ((batch.logp - batch.behavior_logp) * batch.mask).sum(-1)


@broken("trajectory_is", "unbiased", "weights_average_to_one", weight=lambda b: (-log_ratio(b)).exp())
def ratio_inverted(batch: Batch) -> Tensor:
    """π_old/π for π/π_old."""
    return per_row((-log_ratio(batch)).exp() * batch.episode_return, batch)


@broken("trajectory_is", "unbiased")
def token_ratio_for_trajectory_ratio(batch: Batch) -> Tensor:
    """Each position weighted by its own ratio alone."""
    ratio = ((batch.logp - batch.behavior_logp) * batch.mask).exp()
    return ratio * batch.discount_weight * batch.reward_to_go * batch.mask / batch.rows


@broken("trajectory_is", "unbiased", "weights_average_to_one", weight=lambda b: log_ratio(b).exp().clamp(max=1.0))
def ratio_truncated(batch: Batch) -> Tensor:
    """w clipped at 1."""
    return per_row(log_ratio(batch).exp().clamp(max=1.0) * batch.episode_return, batch)


@broken("trajectory_is", "padding_content", moves=False)
def ratio_over_observations(batch: Batch) -> Tensor:
    """w multiplied over every position of the row, tool tokens and padding included."""
    w = (batch.logp - batch.behavior_logp).sum(-1, keepdim=True).exp()
    return w * batch.discount_weight * batch.reward_to_go * batch.mask / batch.rows


@broken("trajectory_is", "unbiased")
def ratio_to_reference(batch: Batch) -> Tensor:
    """π/π_ref for π/π_old."""
    w = ((batch.logp - batch.ref_logp) * batch.mask).sum(-1).exp()
    return per_row(w * batch.episode_return, batch)


@broken("per_decision_is", "unbiased")
def weights_of_later_decisions(batch: Batch) -> Tensor:
    """w_{k:T} for w_{0:k}: the cumulative product runs backwards."""
    later = ((batch.logp - batch.behavior_logp) * batch.mask).flip(-1).cumsum(-1).flip(-1).exp()
    paid = later * batch.discount_weight * batch.reward
    return paid.flip(-1).cumsum(-1).flip(-1) * batch.mask / batch.rows


@broken("token_is", "unbiased", "on_policy_limit", on_policy_limit="reward_to_go")
def ratio_clamped_at_epsilon(batch: Batch) -> Tensor:
    """The ratio itself is clamped at ε = .2, not at 1 + ε."""
    ratio = ((batch.logp - batch.behavior_logp) * batch.mask).exp().clamp(max=0.2)
    return ratio * batch.discount_weight * batch.reward_to_go * batch.mask / batch.rows


# -- what breaks a run


@broken("leave_one_out", "finite", moves=False)
def nan_where_all_agree(batch: Batch) -> Tensor:
    """Divides by the standard deviation and multiplies by it again: 0/0 on a unanimous group."""
    R, n = batch.episode_return, others(batch) + 1.0
    adv = R - (group_sum(R, batch) - R) / (n - 1.0)
    spread = (((R.unsqueeze(-2) - R.unsqueeze(-1)) ** 2 * batch.same_group).sum(-1) / n).sqrt()
    return per_row(adv / spread * spread, batch)


@broken("reinforce", "deterministic", moves=False)
def dropout_left_on(batch: Batch) -> Tensor:
    """Dropout on the advantage."""
    return per_row(torch.nn.functional.dropout(batch.episode_return, 0.5), batch)


_calls = itertools.count()


@broken("reinforce", "stateless", moves=False)
def running_baseline(batch: Batch) -> Tensor:
    """The baseline moves with every call."""
    return per_row(batch.episode_return - 0.01 * next(_calls), batch)


@broken("leave_one_out", "inputs_unchanged", moves=False)
def rewards_centred_in_place(batch: Batch) -> Tensor:
    """`reward -= mean`: whoever reads the batch next gets other rewards."""
    c = find_estimator("leave_one_out").coefficients(batch)
    batch.reward.sub_(batch.reward.mean())
    return c


@broken("baselined(value)", "detached", moves=False, loss=True)
def critic_not_detached(batch: Batch) -> Tensor:
    """The advantage carries a gradient into the critic."""
    adv = batch.discount_weight * (batch.reward_to_go - batch.value[..., :-1])
    return -(adv * batch.logp * batch.mask).sum(-1).mean()


@broken("leave_one_out", "float32", moves=False)
def cancels_in_float32(batch: Batch) -> Tensor:
    """A large constant keeps returns positive: R − mean is then a difference of large numbers."""
    R = batch.episode_return + 1e5
    return per_row(R - (group_sum(R, batch) - R) / others(batch), batch)


@broken("reinforce", "float32", moves=False)
def overflows_in_float32(batch: Batch) -> Tensor:
    """A factor beyond 3e38 that is divided out again."""
    return per_row(batch.episode_return * 1e39 / 1e39, batch)


def claiming(estimator: Estimator, *claims: Claim) -> Estimator:
    """The same estimator with other claims."""
    return replace(estimator, claims=claims)


# -- a claim that is out of date: of bias where there is none

STALE = Broken(
    estimator=replace(find_estimator("reward_to_go"), name="mended", claims=(biased("γ^t is missing", on_policy),)),
    sound=find_estimator("reward_to_go_undiscounted_weight"),
    caught_by=("biased",),
    moves=True,
)
