"""Estimators that are wrong on purpose, each next to the sound one it was made from.

They serve twice: a checker that lets one of them pass is no checker, and where a user's loss has the same expectation as
one of them, its mistake is the likely cause. The docstring of an entry says it in a sentence.

Guarantee: every entry claims what its sound version claims, and differs from it by one mistake, the one in its docstring.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from pgcheck.batch import Batch
from pgcheck.estimators import advantages
from pgcheck.estimators.base import (
    Coefficients,
    Couples,
    Estimator,
    biased,
    find_estimator,
    from_coefficients,
    on_policy,
    return_alone,
)
from pgcheck.estimators.from_loss import Loss, from_loss
from pgcheck.estimators.zoo import NOTES  # noqa: F401  (fills the registry)
from pgcheck.side import ActionValues, AllActionValues, WrongValues


@dataclass(frozen=True)
class Broken:
    """A mistake, and the checks that must find it."""

    estimator: Estimator
    sound: Estimator
    caught_by: tuple[str, ...]  # each of them fails, and no other
    moves: bool  # whether E ĝ changes; else only single batches show the mistake
    shows_on: str = ""  # a problem that shows it, where the usual examples do not

    @property
    def mistake(self) -> str:
        """What is wrong, in one sentence."""
        fn = self.estimator.coefficients
        return " ".join((getattr(fn, "loss", fn).__doc__ or "").split())


BROKEN: dict[str, Broken] = {}


def broken(
    sound: str,
    *caught_by: str,
    moves: bool = True,
    couples: Couples | None = None,
    loss: bool = False,
    shows_on: str = "",
    **settings: Any,
) -> Callable[[Coefficients | Loss], Coefficients | Loss]:
    """Register a coefficient function (or a loss) as the broken version of the zoo's `sound`, with its claims.

    `settings` as of `Estimator`; one that `same_as` must catch declares to be the sound one, batch by batch.
    """

    def decorate(fn: Coefficients | Loss) -> Coefficients | Loss:
        base = find_estimator(sound)
        same = {"same_as": sound} if "same_as" in caught_by else {}
        name = str(getattr(fn, "__name__", ""))
        made = (from_loss if loss else from_coefficients)(
            fn,
            couples=couples or base.couples,
            name=name,
            claims=base.claims,
            **({"min_group_size": base.min_group_size} | same | settings),
        )
        if name in BROKEN or not fn.__doc__:
            raise ValueError(f"broken estimator '{name}' is there already, or does not say what is wrong")
        BROKEN[name] = Broken(made, base, caught_by, moves, shows_on)
        return fn

    return decorate


# -- what several of them share


def per_row(x: Tensor, batch: Batch) -> Tensor:
    """c = x_i / B at every policy position, from one number a row."""
    return x.unsqueeze(-1) * batch.mask / batch.rows


def others(batch: Batch) -> Tensor:
    """Number of other rows in the group, `[..., B]`."""
    return batch.same_group.sum(-1) - 1.0


def group_sum(x: Tensor, batch: Batch) -> Tensor:
    """Σ_j over the group, own row included, `[..., B]`."""
    return (batch.same_group @ x.unsqueeze(-1)).squeeze(-1)


def mean_of_others(batch: Batch) -> Tensor:
    """Mean return of the other rows of the group, `[..., B]`."""
    return (group_sum(batch.episode_return, batch) - batch.episode_return) / others(batch)


def from_here(x: Tensor) -> Tensor:
    """Σ_{k≥t} x_k, `[..., B, T]`."""
    return x.flip(-1).cumsum(-1).flip(-1)


def acts_later(batch: Batch) -> Tensor:
    """Whether the policy acts again after t, `[..., B, T]`."""
    return from_here(batch.mask) - batch.mask > 0


def before_observation(batch: Batch) -> Tensor:
    """Whether an observation comes between t and a later turn of the policy."""
    acts_next = pad(batch.mask[..., 1:], (0, 1)) > 0
    return acts_later(batch) & ~acts_next


def number_of_groups(batch: Batch) -> int:
    """How many different labels there are."""
    return int(batch.group.unique().numel())


def first_half(batch: Batch) -> Tensor:
    """1. where rows i and j are in the same of two micro-batches, `[B, B]`."""
    half = torch.arange(batch.rows) < (batch.rows + 1) // 2
    return (half.unsqueeze(-1) == half).to(batch.reward.dtype)


# -- credit in time


@broken("reward_to_go", "unbiased")
def discount_weight_missing(batch: Batch) -> Tensor:
    """γ^t is missing in front of Ĝ_t."""
    return batch.reward_to_go * batch.mask / batch.rows


@broken("reward_to_go", "unbiased")
def to_go_off_by_one(batch: Batch) -> Tensor:
    """The reward-to-go starts one step late (Ĝ_{t+1}): the reward of the action itself is lost."""
    later = pad(batch.reward_to_go[..., 1:], (0, 1))
    return batch.discount_weight * later * batch.mask / batch.rows


@broken("reward_to_go", "unbiased")
def to_go_reversed(batch: Batch) -> Tensor:
    """The cumulative sum runs forwards: rewards up to t instead of from t on."""
    return (batch.discount_weight * batch.reward).cumsum(-1) * batch.mask / batch.rows


@broken("reward_to_go", "unbiased")
def to_go_not_discounted(batch: Batch) -> Tensor:
    """The rewards inside the reward-to-go are not discounted: γ^t Σ_{k≥t} r_k."""
    return batch.discount_weight * from_here(batch.reward) * batch.mask / batch.rows


@broken("reinforce", "unbiased")
def clock_of_positions(batch: Batch) -> Tensor:
    """γ^t counts observations as well, where the problem's clock counts actions."""
    steps = torch.arange(batch.reward.shape[-1], dtype=batch.reward.dtype)
    return per_row((batch.discount**steps * batch.reward).sum(-1), batch)


@broken("reinforce", "unbiased")
def clock_of_actions(batch: Batch) -> Tensor:
    """γ^t counts the policy's own tokens only, where the problem's clock counts every position."""
    acted = (batch.mask.cumsum(-1) - 1.0).clamp(min=0.0)
    return per_row((batch.discount**acted * batch.reward).sum(-1), batch)


@broken("reinforce", "unbiased")
def observation_reward_dropped(batch: Batch) -> Tensor:
    """Rewards are masked like log-probabilities: what an observation position pays is lost."""
    return per_row((batch.discount_weight * batch.reward * batch.mask).sum(-1), batch)


@broken("reward_to_go_undiscounted_weight", "unbiased")
def rewards_masked_before_the_sum(batch: Batch) -> Tensor:
    """The reward-to-go of masked rewards, (reward · mask).cumsum: what an observation position pays is lost."""
    return from_here(batch.reward * batch.mask) * batch.mask / batch.rows


@broken("reinforce", "unbiased")
def reward_before_observation_dropped(batch: Batch) -> Tensor:
    """Only the last turn is scored: a reward at an action that an observation follows is lost."""
    kept = torch.where(before_observation(batch), 0.0, batch.reward)
    return per_row((batch.discount_weight * kept).sum(-1), batch)


@broken("reinforce", "unbiased")
def last_reward_only(batch: Batch) -> Tensor:
    """Only the reward at the row's last token counts, as if rewards came at the end alone."""
    last = batch.mask * (~acts_later(batch)).to(batch.mask.dtype)
    return per_row((batch.discount_weight * batch.reward * last).sum(-1), batch)


@broken("reinforce", "unbiased", "padding_length")
def reward_of_the_last_column(batch: Batch) -> Tensor:
    """reward[:, -1] is taken for the final reward: in a row that ended earlier that is padding."""
    return per_row(batch.discount_weight[..., -1] * batch.reward[..., -1], batch)


@broken("reward_to_go", "unbiased")
def eos_dropped(batch: Batch) -> Tensor:
    """The coefficient of each row's last token is lost (labels shifted by one)."""
    return batch.discount_weight * batch.reward_to_go * acts_later(batch) * batch.mask / batch.rows


@broken("reward_to_go", "unbiased")
def first_token_dropped(batch: Batch) -> Tensor:
    """The coefficient of each row's first token is lost: the shift of the labels is applied twice."""
    first = batch.mask.cumsum(-1) == 1.0
    return batch.discount_weight * batch.reward_to_go * batch.mask * ~first / batch.rows


@broken("reinforce", "unbiased")
def only_the_last_turn_trained(batch: Batch) -> Tensor:
    """Tokens before an observation are masked out as prompt: only the last turn is learned from."""
    observed_later = from_here(before_observation(batch).to(batch.mask.dtype)) > 0
    return per_row(batch.episode_return, batch) * ~observed_later


@broken("reinforce", "unbiased")
def pad_token_is_eos(batch: Batch) -> Tensor:
    """The mask is built from token ids, and the id of the pad token (0) is one the policy chooses: EOS is not trained."""
    return per_row(batch.episode_return, batch) * (batch.action != 0)


@broken("reinforce", "unbiased", "padding_length")
def overlong_rows_dropped(batch: Batch) -> Tensor:
    """Rows that fill the tensor to its last column are taken for truncated and left out."""
    return per_row(batch.episode_return, batch) * (1.0 - batch.mask[..., -1:])


@broken("reinforce", "unbiased")
def rewards_clipped(batch: Batch) -> Tensor:
    """Rewards are clipped to [−1, 1]: larger ones count as one."""
    return per_row((batch.discount_weight * batch.reward.clamp(-1.0, 1.0)).sum(-1), batch)


# -- baselines


@broken("baselined(value)", "unbiased", "reward_shift", shift_invariant=True)
def baseline_sees_next_state(batch: Batch) -> Tensor:
    """The baseline is V(s_{t+1}) for V(s_t), an off-by-one in the value tensor: it depends on the action."""
    return batch.discount_weight * (batch.reward_to_go - batch.value[..., 1:]) * batch.mask / batch.rows


@broken("baselined(value)", "unbiased", needs=(ActionValues(),))
def baseline_sees_the_action(batch: Batch) -> Tensor:
    """The baseline is Q(s_t, a_t): the critic was given the action it is a baseline for."""
    return batch.discount_weight * (batch.reward_to_go - batch.side["action_value"]) * batch.mask / batch.rows


@broken("leave_one_out", "unbiased")
def own_sample_in_the_mean(batch: Batch) -> Tensor:
    """The mean runs over the whole group, the own return included."""
    R = batch.episode_return
    return per_row(R - group_sum(R, batch) / (others(batch) + 1.0), batch)


@broken("leave_one_out", "unbiased")
def best_of_group_as_baseline(batch: Batch) -> Tensor:
    """The largest return of the group is the baseline, the own return included."""
    R = batch.episode_return
    among = torch.where(batch.same_group > 0, R.unsqueeze(-2), -torch.inf)
    return per_row(R - among.amax(-1), batch)


@broken("leave_one_out", "unbiased")
def leaves_out_a_token(batch: Batch) -> Tensor:
    """The mean leaves out one token instead of its whole rollout: the own return is still in it."""
    R, length = batch.episode_return, batch.length
    tokens = group_sum(length, batch)
    mean = (group_sum(length * R, batch) - R) / (tokens - 1.0)
    return per_row(R - mean, batch)


@broken("leave_one_out", "reward_shift", moves=False, shift_invariant=True)
def sum_of_others_over_group_size(batch: Batch) -> Tensor:
    """The sum over the others is divided by G for G − 1: no bias, but the mean reward is no longer taken away."""
    R = batch.episode_return
    return per_row(R - (group_sum(R, batch) - R) / (others(batch) + 1.0), batch)


@broken("batch_mean(group)", "proportional")
def divided_by_std(batch: Batch) -> Tensor:
    """The group's mean is taken away, and its standard deviation divided by, the own return in both."""
    return per_row(advantages.standardised_return("group")(batch).squeeze(-1), batch)


@broken("batch_mean", "proportional")
def divided_by_std_of_the_batch(batch: Batch) -> Tensor:
    """The batch's mean is taken away, and its standard deviation divided by, the own return in both."""
    return per_row(advantages.standardised_return("batch")(batch).squeeze(-1), batch)


@broken("leave_one_out", "unbiased")
def alive_only(batch: Batch) -> Tensor:
    """The mean of the group at t runs over those still alive at t, the own rollout included."""
    alive = (from_here(batch.mask) > 0).to(batch.reward.dtype)
    among = batch.same_group @ alive
    mean = (batch.same_group @ (batch.reward_to_go * alive)) / among.clamp(min=1.0)  # [..., B, T]
    return batch.discount_weight * (batch.reward_to_go - mean) * batch.mask / batch.rows


@broken("leave_one_out", "unbiased")
def negative_advantages_dropped(batch: Batch) -> Tensor:
    """Only what did better than the others is learned from: negative advantages are clamped to 0."""
    return per_row((batch.episode_return - mean_of_others(batch)).clamp(min=0.0), batch)


@broken("leave_one_out", "unbiased")
def best_of_group_only(batch: Batch) -> Tensor:
    """Only the best rollout of the group is kept."""
    R = batch.episode_return
    best = torch.where(batch.same_group > 0, R.unsqueeze(-2), -torch.inf).amax(-1)
    return per_row((R - mean_of_others(batch)) * (best <= R), batch)


@broken("batch_mean(reward_to_go)", "proportional", "padding_length")
def mean_over_the_wrong_axis(batch: Batch) -> Tensor:
    """The mean is taken over the positions of the own row (dim=-1) instead of over the rows."""
    mean = batch.reward_to_go.mean(-1, keepdim=True)
    return batch.discount_weight * (batch.reward_to_go - mean) * batch.mask / batch.rows


@broken("gigpo_step(leave_one_out)", "unbiased", shows_on="mdp/two-state")
def own_position_left_out_only(batch: Batch) -> Tensor:
    """The mean over equal states leaves out the own position, not the own rollout, which may come there twice."""
    B, T = batch.mask.shape[-2:]
    to_go, state, acts = (x.flatten(-2) for x in (batch.reward_to_go, batch.state, batch.mask))
    group = batch.group.unsqueeze(-1).expand(batch.mask.shape).flatten(-2)
    same = (state.unsqueeze(-1) == state.unsqueeze(-2)) & (group.unsqueeze(-1) == group.unsqueeze(-2))
    same = same.to(to_go.dtype) * acts.unsqueeze(-1) * acts.unsqueeze(-2) * (1.0 - torch.eye(B * T, dtype=to_go.dtype))
    mean = (same @ to_go.unsqueeze(-1)).squeeze(-1) / same.sum(-1).clamp(min=1.0)
    return batch.discount_weight * (to_go - mean).unflatten(-1, (B, T)) * batch.mask / batch.rows


@broken("opo(leave_one_out)", "unbiased")
def own_length_in_the_weights(batch: Batch) -> Tensor:
    """The length-weighted mean leaves out the own return, but divides by lengths that include the own."""
    R, length = batch.episode_return, batch.length
    mean = (group_sum(length * R, batch) - length * R) / group_sum(length, batch)
    return per_row(R - mean, batch)


@broken("loo_std", "proportional")
def own_sample_in_the_std(batch: Batch) -> Tensor:
    """The mean is that of the others, but the standard deviation is the group's, the own return included."""
    R = batch.episode_return
    std = advantages.std_of_peers(R, batch.same_group)
    return per_row((R - mean_of_others(batch)) / (std + 0.1), batch)


# -- values in place of returns


def one_step_errors(value: Tensor, batch: Batch) -> Tensor:
    """γ^t δ_t from a value `[..., B, T+1]`, from one decision to the next (`advantages.temporal_difference`)."""
    return advantages.temporal_difference(lambda _: value[..., :-1])(batch)


def discounted_sum(x: Tensor, decay: Tensor | float) -> Tensor:
    """y_t = x_t + decay_t y_{t+1}, `[..., B, T]`."""
    factor = torch.as_tensor(decay, dtype=x.dtype).expand(x.shape)
    out = [x[..., -1]]
    for t in range(x.shape[-1] - 2, -1, -1):
        out.append(x[..., t] + factor[..., t] * out[-1])
    return torch.stack(out[::-1], -1)


@broken("gae(wrong_value)", "same_as", needs=(WrongValues(),))
def decay_over_observations(batch: Batch) -> Tensor:
    """A_t = δ_t + γλ A_{t+1} runs over every position: it decays over observations, not from decision to decision."""
    delta = one_step_errors(batch.side["wrong_value"], batch) / batch.discount_weight * batch.mask
    adv = discounted_sum(delta, batch.discount * 0.95)
    return batch.discount_weight * adv * batch.mask / batch.rows


@broken("gae(wrong_value)", "same_as", needs=(WrongValues(),))
def bootstraps_from_observations(batch: Batch) -> Tensor:
    """The next value is that of the next position, where the critic never learned what an observation is worth."""
    v, one = batch.side["wrong_value"], torch.ones_like(batch.reward[..., :1])
    ahead = torch.cat([batch.discount_weight[..., 1:], one], -1)
    delta = batch.discount_weight * (batch.reward - v[..., :-1]) + ahead * v[..., 1:]
    decay = torch.where(batch.mask > 0, 0.95, 1.0)
    return discounted_sum(delta * (from_here(batch.mask) > 0), decay) * batch.mask / batch.rows


@broken("gae(wrong_value, λ=1)", "unbiased", needs=(WrongValues(after_end=1.0),))
def bootstraps_from_padding(batch: Batch) -> Tensor:
    """Values after the end are not set to 0: what the critic says of padding is added to the last reward."""
    v, last = batch.side["wrong_value"], batch.mask * ~acts_later(batch)
    beyond = (batch.discount * batch.discount_weight * v[..., 1:] * last).sum(-1, keepdim=True)
    paid = batch.discount_weight * (batch.reward_to_go - v[..., :-1])
    return (paid + beyond) * batch.mask / batch.rows


@broken("actor_critic", "unbiased")
def end_taken_for_a_cut(batch: Batch) -> Tensor:
    """An episode that ended is bootstrapped as if it had been cut off: the value of its last state stands for 0."""
    delta = one_step_errors(batch.value, batch)
    last = batch.mask * ~acts_later(batch)
    return (delta + batch.discount * batch.discount_weight * batch.value[..., :-1] * last) * batch.mask / batch.rows


@broken("gae(0.95)", "unbiased")
def gae_without_discount_weight(batch: Batch) -> Tensor:
    """γ^t is missing in front of the generalised advantage."""
    adv = advantages.gae(0.95, advantages.state_value)(batch)
    return adv / batch.discount_weight * batch.mask / batch.rows


@broken("gae(wrong_value)", "same_as", needs=(WrongValues(),))
def discount_for_decay(batch: Batch) -> Tensor:
    """The recursion decays by γλ over errors that carry their γ^t already: discounted twice."""
    delta = one_step_errors(batch.side["wrong_value"], batch) * batch.mask
    decay = torch.where(batch.mask > 0, 0.95 * batch.discount, 1.0)
    return discounted_sum(delta, decay) * batch.mask / batch.rows


@broken("all_action", "unbiased", loss=False, leaf="logits", needs=(AllActionValues(),))
def policy_weight_missing(batch: Batch) -> Tensor:
    """Σ_a Q(s, a) ∇log π(a) for Σ_a π(a) Q(s, a) ∇log π(a): every action counts alike, likely or not."""
    pi, q = torch.softmax(batch.logits, -1), batch.side["all_action_values"]
    slope = q - pi * q.sum(-1, keepdim=True)
    return (batch.discount_weight * batch.mask / batch.rows).unsqueeze(-1) * slope


# -- groups


@broken("batch_mean(group)", "proportional", couples="batch")
def groups_merged(batch: Batch) -> Tensor:
    """One mean over all prompts instead of one mean each."""
    R = batch.episode_return
    return per_row(R - R.mean(-1, keepdim=True), batch)


def _reshaped(batch: Batch) -> bool:
    return batch.rows % number_of_groups(batch) == 0 and number_of_groups(batch) > 1


@broken("leave_one_out", "row_order", moves=False, couples="batch")
def tiled_for_repeated(batch: Batch) -> Tensor:
    """Rows are taken as tiled [a, b, a, b] where they are repeated [a, a, b, b]: the baseline is another prompt's."""
    R, P = batch.episode_return, number_of_groups(batch)
    if not _reshaped(batch):
        return find_estimator("leave_one_out").coefficients(batch)
    table = R.unflatten(-1, (batch.rows // P, P))  # [..., G, P]
    G = table.shape[-2]
    mean = (table.sum(-2, keepdim=True) - table) / (G - 1)
    return per_row((table - mean).flatten(-2), batch)


@broken("leave_one_out", "unbiased", "row_order", couples="batch")
def advantages_transposed(batch: Batch) -> Tensor:
    """Advantages by prompt are flattened in the other order: a row gets another row's advantage."""
    R, P = batch.episode_return, number_of_groups(batch)
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


@broken("leave_one_out", "unbiased", couples="batch", shows_on="dialogue/unequal-groups")
def group_size_from_the_configuration(batch: Batch) -> Tensor:
    """The factor G/(G−1) that mends the in-sample mean uses one G for all groups, though they differ in size."""
    R, G = batch.episode_return, max(batch.rows // number_of_groups(batch), 2)
    return per_row((R - group_sum(R, batch) / (others(batch) + 1.0)) * G / (G - 1), batch)


@broken("leave_one_out", "unbiased", couples="batch")
def unanimous_groups_filtered(batch: Batch) -> Tensor:
    """Groups whose returns all agree are filtered out and the mean runs over the rest: easy and hard prompts lose weight."""
    adv = batch.episode_return - mean_of_others(batch)
    disagree = ((batch.episode_return.unsqueeze(-1) - batch.episode_return.unsqueeze(-2)).abs() > 1e-9).to(adv.dtype)
    kept = ((disagree * batch.same_group).sum(-1) > 0).to(adv.dtype)
    return (adv * kept / kept.sum(-1, keepdim=True).clamp(min=1.0)).unsqueeze(-1) * batch.mask


@broken("leave_one_out(batch)", "unbiased", shows_on="degenerate/group-of-one")
def alone_is_no_signal(batch: Batch) -> Tensor:
    """A row that is alone in its group is compared with itself: its advantage is 0, it is never learned from."""
    adv = find_estimator("leave_one_out(batch)").coefficients(batch)
    return torch.where((others(batch) > 0).unsqueeze(-1), adv, torch.zeros_like(adv))


@broken("reinforce", "unbiased", couples="group", min_group_size=2)
def duplicates_counted_once(batch: Batch) -> Tensor:
    """Equal rollouts of a group are counted once: probable ones lose weight."""
    same = (batch.action.unsqueeze(-2) == batch.action.unsqueeze(-3)) & (
        batch.state.unsqueeze(-2) == batch.state.unsqueeze(-3)
    )
    copies = (same.all(-1).to(batch.reward.dtype) * batch.same_group).sum(-1)
    return per_row(batch.episode_return / copies, batch)


# -- aggregation


@broken("reinforce", "unbiased", loss=True)
def sign_flipped(batch: Batch) -> Tensor:
    """The sign is flipped: J itself is handed to an optimiser that minimises."""
    return (batch.episode_return[:, None] * batch.logp * batch.mask).sum(-1).mean()


@broken("reinforce", "unbiased", couples="batch", loss=True)
def summed_over_rows(batch: Batch) -> Tensor:
    """The loss is the sum over rows instead of the mean."""
    return -(batch.episode_return[:, None] * batch.logp * batch.mask).sum()


@broken("reinforce", "unbiased", couples="batch", loss=True)
def divided_by_rows_twice(batch: Batch) -> Tensor:
    """The mean of what was divided by B already."""
    return -(batch.episode_return[:, None] * batch.logp * batch.mask).sum(-1).mean() / batch.rows


@broken("reinforce", "unbiased", loss=True)
def divided_by_accumulation_twice(batch: Batch) -> Tensor:
    """The loss is divided by the number of accumulation steps twice, by the code and by the trainer (2 of them, here)."""
    steps, half = 2, (batch.rows + 1) // 2
    J = batch.episode_return * (batch.logp * batch.mask).sum(-1) / batch.rows
    return -(J[:half].sum() + J[half:].sum()) / steps


@broken("reinforce", "unbiased", "row_order", couples="batch", loss=True)
def micro_batch_means_summed(batch: Batch) -> Tensor:
    """The means of the micro-batches are added up and not divided by their number."""
    J, half = batch.episode_return * (batch.logp * batch.mask).sum(-1), (batch.rows + 1) // 2
    return -(J[:half].mean() + J[half:].mean())


@broken("reinforce", "row_order", moves=False, couples="batch", loss=True)
def rows_weighted_by_their_micro_batch(batch: Batch) -> Tensor:
    """The means of two micro-batches of unequal size are averaged: a row weighs what its place in the batch says."""
    J, half = batch.episode_return * (batch.logp * batch.mask).sum(-1), (batch.rows + 1) // 2
    return -(J[:half].mean() + J[half:].mean()) / 2


@broken("batch_mean", "proportional", "row_order")
def mean_over_the_micro_batch(batch: Batch) -> Tensor:
    """The mean that is subtracted runs over a micro-batch: each holds a larger share of its own return."""
    R, same = batch.episode_return, first_half(batch)
    return per_row(R - (R @ same) / same.sum(-1), batch)


@broken("reinforce", "unbiased", loss=True)
def divided_by_own_length(batch: Batch) -> Tensor:
    """The mean over each row's tokens (mean log-probability times summed return): short rows weigh more."""
    return -((batch.episode_return[:, None] * batch.logp * batch.mask).sum(-1) / batch.length).mean()


@broken("reinforce", "unbiased", couples="batch", loss=True)
def token_mean(batch: Batch) -> Tensor:
    """The mean over all tokens of the batch: their number depends on the actions."""
    return -(batch.episode_return[:, None] * batch.logp * batch.mask).sum() / batch.mask.sum()


@broken("leave_one_out", "unbiased")
def divided_by_mean_length(batch: Batch) -> Tensor:
    """Divided by the mean length of the group, the own length included."""
    R, n = batch.episode_return, others(batch) + 1.0
    return per_row((R - mean_of_others(batch)) / (group_sum(batch.length, batch) / n), batch)


@broken("reinforce", "unbiased", "padding_length", couples="batch", loss=True)
def mean_over_padding(batch: Batch) -> Tensor:
    """(loss · mask).mean() divides by B · T, the width of the padded tensor."""
    return -(batch.episode_return[:, None] * batch.logp * batch.mask).mean()


@broken("reinforce", "unbiased", couples="batch", loss=True)
def broadcast_to_all_pairs(batch: Batch) -> Tensor:
    """Returns [B] times log-probabilities [B, 1] broadcast to [B, B]: every row is trained on every row's return."""
    return -(batch.episode_return * (batch.logp * batch.mask).sum(-1, keepdim=True)).mean()


@broken("reinforce", "mask_respected", moves=False, loss=True)
def mask_ignored(batch: Batch) -> Tensor:
    """No mask: tokens of tools and of padding are trained on."""
    return -(batch.episode_return[:, None] * batch.logp).sum(-1).mean()


@broken("reinforce", "unbiased", "mask_respected")
def mask_shifted(batch: Batch) -> Tensor:
    """The mask is one position late against the log-probabilities."""
    return batch.episode_return.unsqueeze(-1) * pad(batch.mask[..., :-1], (1, 0)) / batch.rows


# -- log-probabilities from logits


def chosen(logp: Tensor, batch: Batch) -> Tensor:
    """log π of the actions taken, from log π of all, `[..., B, T, A]` → `[..., B, T]`."""
    return logp.gather(-1, batch.action.clamp(min=0).unsqueeze(-1)).squeeze(-1) * batch.mask


@broken("reinforce", "unbiased", loss=True, leaf="logits")
def temperature_applied_again(batch: Batch) -> Tensor:
    """Log-probabilities are computed at temperature .7, where the sampler drew at 1."""
    logp = chosen(torch.log_softmax(batch.logits / 0.7, -1), batch)
    return -(batch.episode_return[:, None] * logp).sum(-1).mean()


@broken("reinforce", "unbiased", "padding_content", "padding_length", "mask_respected", loss=True, leaf="logits")
def softmax_over_positions(batch: Batch) -> Tensor:
    """log_softmax runs over the positions (dim=1) instead of over the actions."""
    return -(batch.episode_return[:, None] * chosen(torch.log_softmax(batch.logits, 1), batch)).sum(-1).mean()


@broken("reinforce", "unbiased", "mask_respected", loss=True, leaf="logits")
def labels_not_shifted(batch: Batch) -> Tensor:
    """Logits of position t are scored with the token of t + 1: one shift too many."""
    every = torch.log_softmax(torch.cat([batch.logits[:, :1], batch.logits[:, :-1]], 1), -1)
    return -(batch.episode_return[:, None] * chosen(every, batch)).sum(-1).mean()


@broken("reinforce", "unbiased", loss=True)
def probability_for_log_probability(batch: Batch) -> Tensor:
    """The loss has π where log π belongs: each token's gradient is scaled by its own probability."""
    return -(batch.episode_return[:, None] * batch.logp.exp() * batch.mask).sum(-1).mean()


@broken("reinforce", "unbiased", loss=True)
def penalty_not_detached(batch: Batch) -> Tensor:
    """The KL penalty inside the advantage is not detached: log π is multiplied by the gradient of another log π."""
    adv = batch.episode_return - 0.1 * ((batch.logp - batch.ref_logp) * batch.mask).sum(-1)
    return -(adv[:, None] * batch.logp * batch.mask).sum(-1).mean()


# -- off-policy


def log_ratio(batch: Batch) -> Tensor:
    """Σ_t log r_t over policy positions, `[..., B]`."""
    return ((batch.logp - batch.behavior_logp) * batch.mask).sum(-1)


def token_ratio(batch: Batch) -> Tensor:
    """r_t, `[..., B, T]`; 1 where the policy does not act."""
    return ((batch.logp - batch.behavior_logp) * batch.mask).exp()


@broken("trajectory_is", "unbiased", "weights_average_to_one", weight=lambda b: (-log_ratio(b)).exp())
def ratio_inverted(batch: Batch) -> Tensor:
    """The ratio is upside down: π_old/π for π/π_old."""
    return per_row((-log_ratio(batch)).exp() * batch.episode_return, batch)


@broken("trajectory_is", "unbiased", loss=True)
def ratio_missing(batch: Batch) -> Tensor:
    """The advantage multiplies log π − log π_old without exp: the gradient carries no ratio, as if the batch were fresh."""
    return -(batch.episode_return[:, None] * (batch.logp - batch.behavior_logp) * batch.mask).sum(-1).mean()


@broken("trajectory_is", "unbiased")
def ratio_applied_twice(batch: Batch) -> Tensor:
    """The ratio is in the loss and in the sampler's correction as well: w² for w."""
    return per_row((2.0 * log_ratio(batch)).exp() * batch.episode_return, batch)


@broken("trajectory_is", "unbiased")
def token_ratio_for_trajectory_ratio(batch: Batch) -> Tensor:
    """Each position is weighted by its own ratio alone, for the ratio of the whole rollout."""
    return token_ratio(batch) * batch.discount_weight * batch.reward_to_go * batch.mask / batch.rows


@broken("trajectory_is", "unbiased", "weights_average_to_one", weight=lambda b: log_ratio(b).exp().clamp(max=1.0))
def ratio_truncated(batch: Batch) -> Tensor:
    """The rollout's ratio is truncated at 1."""
    return per_row(log_ratio(batch).exp().clamp(max=1.0) * batch.episode_return, batch)


@broken("trajectory_is", "unbiased")
def ratio_geometric(batch: Batch) -> Tensor:
    """The mean of the log-ratios for their sum: the geometric mean of the token ratios is no importance weight."""
    return per_row((log_ratio(batch) / batch.length).exp() * batch.episode_return, batch)


@broken("token_is", "weights_average_to_one", weight=lambda b: (log_ratio(b) / b.length).exp())
def geometric_mean_as_weight(batch: Batch) -> Tensor:
    """The row's weight is the geometric mean of its token ratios: over the sampler's batches it does not average to one."""
    weight = (log_ratio(batch) / batch.length).exp().unsqueeze(-1)
    return weight * batch.discount_weight * batch.reward_to_go * batch.mask / batch.rows


@broken("trajectory_is", "unbiased", couples="batch")
def ratio_self_normalised(batch: Batch) -> Tensor:
    """The weights are divided by their sum over the batch, the own weight included."""
    w = log_ratio(batch).exp()
    return (w / w.sum(-1, keepdim=True) * batch.episode_return).unsqueeze(-1) * batch.mask


@broken("trajectory_is", "padding_content", moves=False)
def ratio_over_observations(batch: Batch) -> Tensor:
    """The ratio is multiplied over every position of the row, tool tokens and padding included."""
    w = (batch.logp - batch.behavior_logp).sum(-1, keepdim=True).exp()
    return w * batch.discount_weight * batch.reward_to_go * batch.mask / batch.rows


@broken("trajectory_is", "unbiased")
def ratio_to_reference(batch: Batch) -> Tensor:
    """The ratio is taken to the reference policy: π/π_ref for π/π_old."""
    w = ((batch.logp - batch.ref_logp) * batch.mask).sum(-1).exp()
    return per_row(w * batch.episode_return, batch)


@broken("per_decision_is", "unbiased")
def weights_of_later_decisions(batch: Batch) -> Tensor:
    """w_{k:T} for w_{0:k}: the cumulative product of the ratios runs backwards."""
    later = from_here((batch.logp - batch.behavior_logp) * batch.mask).exp()
    return from_here(later * batch.discount_weight * batch.reward) * batch.mask / batch.rows


@broken("per_decision_is", "unbiased")
def weight_of_the_decision_before(batch: Batch) -> Tensor:
    """w_{0:k−1} for w_{0:k}: the ratio of the action that earned the reward is missing."""
    log_w = ((batch.logp - batch.behavior_logp) * batch.mask).cumsum(-1)
    before = pad(log_w[..., :-1], (1, 0)).exp()
    return from_here(before * batch.discount_weight * batch.reward) * batch.mask / batch.rows


@broken("per_decision_is", "unbiased")
def weight_starts_at_the_action(batch: Batch) -> Tensor:
    """w_{t:k} for w_{0:k}: the ratios of the actions before t, by which it came there, are missing."""
    log_w = ((batch.logp - batch.behavior_logp) * batch.mask).cumsum(-1)
    before = pad(log_w[..., :-1], (1, 0))
    paid = from_here(log_w.exp() * batch.discount_weight * batch.reward)
    return paid * (-before).exp() * batch.mask / batch.rows


@broken("token_is", "unbiased", "on_policy_limit", on_policy_limit="reward_to_go")
def ratio_clamped_at_epsilon(batch: Batch) -> Tensor:
    """The ratio itself is clamped at ε = .2, not at 1 + ε."""
    return token_ratio(batch).clamp(max=0.2) * batch.discount_weight * batch.reward_to_go * batch.mask / batch.rows


# -- clipped surrogates: CISPO, and GRPO's use of PPO


def standardised(batch: Batch) -> Tensor:
    """(R − mean)/std over the group, `[..., B, 1]`."""
    return advantages.standardised_return("group")(batch)


def token_mean_of(x: Tensor, batch: Batch) -> Tensor:
    """Σ x / Σ|o|, as CISPO averages."""
    return (x * batch.mask).sum() / batch.mask.sum()


def sequence_mean_of(x: Tensor, batch: Batch) -> Tensor:
    """Mean over each row's tokens, then over rows, as GRPO averages."""
    return ((x * batch.mask).sum(-1) / batch.length).mean()


@broken("cispo", "same_as", "proportional", loss=True)
def ratio_not_detached(batch: Batch) -> Tensor:
    """The clipped ratio that multiplies log π is not detached: its own gradient is added, times log π."""
    ratio = token_ratio(batch).clamp(max=1.1)
    return -token_mean_of(ratio * standardised(batch) * batch.logp, batch)


@broken("cispo", "same_as", "proportional", loss=True)
def log_probability_detached(batch: Batch) -> Tensor:
    """The log-probability is detached in place of the ratio: the gradient is multiplied by log π."""
    ratio = token_ratio(batch).clamp(max=1.1)
    return -token_mean_of(ratio * standardised(batch) * batch.logp.detach(), batch)


@broken("cispo", "same_as", loss=True)
def clipped_tokens_lose_their_gradient(batch: Batch) -> Tensor:
    """The ratio is clamped under autograd: where it is clipped, the token's gradient is 0 instead of bounded."""
    return -token_mean_of(token_ratio(batch).clamp(max=1.1) * standardised(batch), batch)


@broken("cispo", "same_as", loss=True)
def clipped_on_the_wrong_side(batch: Batch) -> Tensor:
    """The ratio is clipped from below (min=1 − ε) where it is to be clipped from above."""
    ratio = token_ratio(batch).detach().clamp(min=0.9)
    return -token_mean_of(ratio * standardised(batch) * batch.logp, batch)


@broken("reinforce_pp", "on_policy_limit", loss=True, on_policy_limit="reinforce_pp")
def clip_bound_is_epsilon_itself(batch: Batch) -> Tensor:
    """The upper clip bound is ε itself, not 1 + ε: every ratio near one is cut down to it."""
    ratio = token_ratio(batch).detach().clamp(max=0.2)
    adv = advantages.token_standardised(advantages.undiscounted_weight_to_go)(batch)
    return -token_mean_of(ratio * adv * batch.logp, batch)


@broken("cispo(notes)", "proportional")
def divided_by_rows_for_tokens(batch: Batch) -> Tensor:
    """The sum over tokens is divided by the number of rows, not of tokens: the step grows with the length."""
    return token_ratio(batch) * standardised(batch) * batch.mask / batch.rows


@broken("cispo", "same_as", "row_order", loss=True)
def micro_batch_means_averaged(batch: Batch) -> Tensor:
    """Token means of micro-batches are averaged: the mean of means is not the mean over the batch."""
    x = token_ratio(batch).detach().clamp(max=1.1) * standardised(batch) * batch.logp * batch.mask
    half = (batch.rows + 1) // 2
    means = [x[part].sum() / batch.mask[part].sum() for part in (slice(half), slice(half, None))]
    return -(means[0] + means[1]) / 2


@broken("grpo", "same_as", loss=True)
def max_for_min(batch: Batch) -> Tensor:
    """torch.max for torch.min: clipped where it may still move, free where it is to stop."""
    ratio, adv = token_ratio(batch), standardised(batch)
    return -sequence_mean_of(torch.maximum(ratio * adv, ratio.clamp(0.8, 1.2) * adv), batch)


@broken("grpo", "same_as", loss=True)
def clip_without_min(batch: Batch) -> Tensor:
    """The clipped ratio alone, without the minimum: a token that went the wrong way can no longer be called back."""
    return -sequence_mean_of(token_ratio(batch).clamp(0.8, 1.2) * standardised(batch), batch)


@broken("grpo", "same_as", "proportional", loss=True)
def clip_bounds_as_offsets(batch: Batch) -> Tensor:
    """The ratio is clamped to (−ε, ε), as if it were a difference, and not to (1 − ε, 1 + ε)."""
    ratio, adv = token_ratio(batch), standardised(batch)
    return -sequence_mean_of(torch.minimum(ratio * adv, ratio.clamp(-0.2, 0.2) * adv), batch)


@broken("grpo", "same_as", "proportional", loss=True)
def policies_swapped(batch: Batch) -> Tensor:
    """exp(log π_old − log π): old and new policy change places in the ratio."""
    ratio, adv = ((batch.behavior_logp - batch.logp) * batch.mask).exp(), standardised(batch)
    return -sequence_mean_of(torch.minimum(ratio * adv, ratio.clamp(0.8, 1.2) * adv), batch)


@broken("grpo", "same_as", loss=True)
def old_policy_recomputed(batch: Batch) -> Tensor:
    """The old log-probabilities are recomputed with the new policy: the ratio is always 1 and never clipped."""
    ratio, adv = (batch.logp - batch.logp.detach()).exp(), standardised(batch)
    return -sequence_mean_of(torch.minimum(ratio * adv, ratio.clamp(0.8, 1.2) * adv), batch)


@broken("grpo", "same_as", "proportional", loss=True)
def one_ratio_for_the_row(batch: Batch) -> Tensor:
    """The product of the row's ratios stands at every token, where each token has its own."""
    ratio, adv = log_ratio(batch).exp().unsqueeze(-1) * torch.ones_like(batch.mask), standardised(batch)
    return -sequence_mean_of(torch.minimum(ratio * adv, ratio.clamp(0.8, 1.2) * adv), batch)


@broken("grpo", "same_as", "proportional", loss=True)
def std_with_bessel(batch: Batch) -> Tensor:
    """The standard deviation is divided by G − 1 (torch.std), the paper's by G."""
    ratio, adv = token_ratio(batch), advantages.standardised_return("group", ddof=1)(batch)
    return -sequence_mean_of(torch.minimum(ratio * adv, ratio.clamp(0.8, 1.2) * adv), batch)


@broken("grpo", "same_as", loss=True, couples="batch")
def std_of_the_batch(batch: Batch) -> Tensor:
    """The group's mean is subtracted, but the standard deviation is that of the whole batch."""
    centred = batch.episode_return - group_sum(batch.episode_return, batch) / (others(batch) + 1.0)
    ratio, adv = token_ratio(batch), (centred / (batch.episode_return.std(correction=0) + 1e-6))[:, None]
    return -sequence_mean_of(torch.minimum(ratio * adv, ratio.clamp(0.8, 1.2) * adv), batch)


@broken("grpo", "padding_length", loss=True)
def row_mean_over_padding(batch: Batch) -> Tensor:
    """The mean over a row's positions counts padding: it divides by the width of the tensor."""
    ratio, adv = token_ratio(batch), standardised(batch)
    return -(torch.minimum(ratio * adv, ratio.clamp(0.8, 1.2) * adv) * batch.mask).mean(-1).mean()


@broken("gspo", "same_as", "proportional", loss=True)
def log_ratios_summed(batch: Batch) -> Tensor:
    """The sequence ratio is the product of the token ratios, where the paper takes their geometric mean."""
    s, adv = log_ratio(batch).exp(), standardised(batch).squeeze(-1)
    return -torch.minimum(s * adv, s.clamp(1 - 3e-4, 1 + 4e-4) * adv).mean()


@broken("dapo", "same_as", loss=True, shows_on="off-policy/tree-stale")
def clip_bounds_swapped(batch: Batch) -> Tensor:
    """The two clip bounds change places: .28 below and .2 above."""
    ratio, adv = token_ratio(batch), standardised(batch)
    return -token_mean_of(torch.minimum(ratio * adv, ratio.clamp(0.72, 1.2) * adv), batch)


@broken("tis", "same_as")
def truncated_by_token(batch: Batch) -> Tensor:
    """Each token's ratio is truncated at the cap, not their product."""
    w = (token_ratio(batch).clamp(max=2.0).log()).sum(-1, keepdim=True).exp()
    return w * batch.discount_weight * batch.reward_to_go * batch.mask / batch.rows


@broken("dr_grpo", "proportional", loss=True, couples="batch")
def divided_by_the_longest_row(batch: Batch) -> Tensor:
    """Divided by the longest row of the batch instead of a constant: the length is random again."""
    R, ratio = batch.episode_return, token_ratio(batch)
    adv = (R - group_sum(R, batch) / (others(batch) + 1.0))[:, None]
    x = torch.minimum(ratio * adv, ratio.clamp(0.8, 1.2) * adv) * batch.mask
    return -(x.sum(-1) / batch.length.max()).mean()


@broken("pkpo", "proportional")
def pass_at_k_of_the_rate(batch: Batch) -> Tensor:
    """pass@k is taken from the observed rate, 1 − (1 − q̂)^k, as if rows were drawn again and again from the group."""
    R, n = batch.episode_return, others(batch) + 1.0
    return per_row(R * 2.0 * (1.0 - group_sum(R, batch) / n), batch)


# -- what breaks a run


@broken("leave_one_out", "finite", moves=False)
def nan_where_all_agree(batch: Batch) -> Tensor:
    """The advantage is divided by a standard deviation that is 0 where a group agrees (and multiplied by it again): 0/0."""
    R, n = batch.episode_return, others(batch) + 1.0
    adv = R - (group_sum(R, batch) - R) / (n - 1.0)
    spread = (((R.unsqueeze(-2) - R.unsqueeze(-1)) ** 2 * batch.same_group).sum(-1) / n).sqrt()
    return per_row(adv / spread * spread, batch)


@broken("reinforce", "deterministic", moves=False)
def dropout_left_on(batch: Batch) -> Tensor:
    """Dropout is left on: the same batch gives another gradient the next time."""
    return per_row(torch.nn.functional.dropout(batch.episode_return, 0.5), batch)


_calls = itertools.count()


@broken("reinforce", "stateless", moves=False)
def running_baseline(batch: Batch) -> Tensor:
    """A running baseline moves with every call: the estimate depends on what came before the batch."""
    return per_row(batch.episode_return - 0.01 * next(_calls), batch)


@broken("leave_one_out", "inputs_unchanged", moves=False)
def rewards_centred_in_place(batch: Batch) -> Tensor:
    """Rewards are centred in place (reward -= mean): whoever reads the batch next gets other rewards."""
    c = find_estimator("leave_one_out").coefficients(batch)
    batch.reward.sub_(batch.reward.mean())
    return c


@broken("baselined(value)", "detached", moves=False, loss=True)
def critic_not_detached(batch: Batch) -> Tensor:
    """The advantage is not detached: the policy's loss trains the critic."""
    adv = batch.discount_weight * (batch.reward_to_go - batch.value[..., :-1])
    return -(adv * batch.logp * batch.mask).sum(-1).mean()


@broken("leave_one_out", "float32", moves=False)
def cancels_in_float32(batch: Batch) -> Tensor:
    """A large constant keeps returns positive: R − mean is then a difference of large numbers, lost in float32."""
    R = batch.episode_return + 1e5
    return per_row(R - (group_sum(R, batch) - R) / others(batch), batch)


@broken("reinforce", "float32", moves=False)
def overflows_in_float32(batch: Batch) -> Tensor:
    """A factor beyond 3e38 is multiplied in and divided out again: infinite in float32."""
    return per_row(batch.episode_return * 1e39 / 1e39, batch)


# -- entropy and KL


@broken("entropy_in_reward", "unbiased", loss=True, shows_on="entropy/tree")
def entropy_of_what_was_drawn(batch: Batch) -> Tensor:
    """The entropy bonus is −log π of the drawn tokens, differentiated: that averages to zero, and no entropy is gained."""
    S = (batch.logp * batch.mask).sum(-1)
    return -(batch.episode_return * S - batch.entropy_coefficient * S).mean()


@broken("entropy_in_reward", "unbiased", shows_on="entropy/tree")
def entropy_cost_added(batch: Batch) -> Tensor:
    """α log π is added to the reward where it is to be taken away: entropy is paid for."""
    cost = batch.entropy_coefficient * batch.logp * batch.mask
    return per_row((batch.discount_weight * (batch.reward + cost)).sum(-1), batch)


@broken("kl_in_reward(k1)", "unbiased", shows_on="kl/tree")
def kl_of_the_policies_swapped(batch: Batch) -> Tensor:
    """log π_ref/π in the reward, for log π/π_ref: the policy is driven away from the reference."""
    cost = batch.kl_coefficient * (batch.ref_logp - batch.logp) * batch.mask
    return per_row((batch.discount_weight * (batch.reward - cost)).sum(-1), batch)


# -- a claim that is out of date: of bias where there is none

STALE = Broken(
    estimator=replace(
        find_estimator("reward_to_go"), name="mended", claims=(biased("γ^t is missing", on_policy, return_alone),)
    ),
    sound=find_estimator("reward_to_go_undiscounted_weight"),
    caught_by=("biased",),
    moves=True,
)
