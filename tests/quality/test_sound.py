"""No false alarms: sound losses, as people write them, pass everything."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pgcheck.batch import Batch
from pgcheck.estimators.base import Claim, Estimator, find_estimator, full_support, unbiased
from pgcheck.estimators.from_loss import from_loss
from pgcheck.problem import Problem
from pgcheck.runs.report import Report
from pgcheck.runs.runner import run
from tests.once import Once
from tests.quality.conftest import problems

SOUND: dict[str, Estimator] = {}


def sound(*claims: Claim, **settings: Any) -> Callable[[Callable[[Batch], Any]], Callable[[Batch], Any]]:
    def decorate(loss: Callable[[Batch], Any]) -> Callable[[Batch], Any]:
        made = from_loss(loss, claims=claims or (unbiased(),), **settings)
        SOUND[made.name] = made
        return loss

    return decorate


def others_mean(batch: Batch) -> Tensor:
    R = batch.episode_return
    same = (batch.group[:, None] == batch.group[None, :]).to(R.dtype) - torch.eye(len(R), dtype=R.dtype)
    return (same @ R) / same.sum(1)


@sound()
def reinforce_in_one_line(batch: Batch) -> Tensor:
    return -(batch.episode_return * (batch.logp * batch.mask).sum(-1)).mean()


@sound(couples="trajectory")
def reinforce_row_by_row(batch: Batch) -> Tensor:
    loss = batch.logp.new_zeros(())
    B, T = batch.reward.shape
    for i in range(B):
        for t in range(T):
            loss = loss - batch.mask[i, t] * batch.logp[i, t] * batch.episode_return[i] / B
    return loss


@sound(couples="trajectory")
def reward_to_go_with_einsum(batch: Batch) -> Tensor:
    adv = batch.discount_weight * batch.reward_to_go
    return -torch.einsum("bt,bt,bt->", adv, batch.logp, batch.mask) / batch.logp.shape[0]


@sound(couples="trajectory")
def reward_to_go_by_hand(batch: Batch) -> Tensor:
    """Rewards times γ^t, summed from the back with flips."""
    paid = batch.discount_weight * batch.reward
    to_go = paid.flip(-1).cumsum(-1).flip(-1)
    return (-(to_go.detach() * batch.logp) * batch.mask).sum(dim=1).mean(dim=0)


@sound(couples="group")
def rloo_with_a_matrix(batch: Batch) -> Tensor:
    adv = (batch.episode_return - others_mean(batch)).unsqueeze(1)
    return -(adv * batch.logp * batch.mask).sum(1).mean()


@sound(couples="group")
def rloo_prompt_by_prompt(batch: Batch) -> Tensor:
    """Branches on data: runs in a loop."""
    total = batch.logp.new_zeros(())
    for g in batch.group.unique().tolist():
        rows = batch.group == g
        R = batch.episode_return[rows]
        adv = (R - R.mean()) * len(R) / (len(R) - 1)
        total = total + (adv[:, None] * batch.logp[rows] * batch.mask[rows]).sum()
    return -total / batch.rows


@sound(couples="trajectory")
def actor_critic(batch: Batch) -> Tensor:
    adv = (batch.reward_to_go - batch.value[..., :-1]).detach()
    return -(batch.discount_weight * adv * batch.logp * batch.mask).sum() / len(batch.reward)


@sound(couples="trajectory")
def gae_of_one(batch: Batch) -> Tensor:
    """GAE with λ = 1; masked by a choice instead of a product."""
    adv = batch.discount_weight * (batch.reward_to_go - batch.value[..., :-1].detach())
    return -torch.where(batch.mask.bool(), adv * batch.logp, 0.0).sum(-1).mean()


@sound(couples="trajectory")
def with_metrics(batch: Batch) -> tuple[Tensor, dict[str, float]]:
    """Logs what it sees; returns a tuple."""
    loss = -((batch.episode_return - 0.3)[:, None] * batch.logp * batch.mask).sum(-1).mean()
    return loss, {"loss": loss.item(), "return": batch.episode_return.mean().item()}


@sound()
def ppo_first_step(batch: Batch) -> Tensor:
    """The ratio to the policy itself: 1, with the gradient of log π."""
    ratio = (batch.logp - batch.logp.detach()).exp()
    adv = batch.episode_return - others_mean(batch)
    return -(torch.minimum(ratio * adv[:, None], ratio.clamp(0.8, 1.2) * adv[:, None]) * batch.mask).sum(-1).mean()


@sound(leaf="logits", couples="trajectory")
def cross_entropy(batch: Batch) -> Tensor:
    """Weighted log-likelihood of the actions, from logits."""
    nll = torch.nn.functional.cross_entropy(batch.logits.mT, batch.action.clamp(min=0), reduction="none")
    return (batch.episode_return[:, None] * nll * batch.mask).sum(-1).mean()


@sound(unbiased(full_support), couples="trajectory")
def importance_sampled_return(batch: Batch) -> Tensor:
    """J itself as a function of θ: ∇ Σ w R = w R ∇log π."""
    log_w = ((batch.logp - batch.behavior_logp) * batch.mask).sum(-1)
    return -(log_w.exp() * batch.episode_return).mean()


@sound(unbiased(full_support), couples="trajectory")
def importance_sampled_rewards(batch: Batch) -> Tensor:
    """Each reward times the ratios up to it; differentiated, that is per-decision importance sampling."""
    w = torch.cumsum((batch.logp - batch.behavior_logp) * batch.mask, dim=-1).exp()
    return -(w * batch.discount_weight * batch.reward).sum(-1).mean()


@sound(unbiased(full_support))
def weighted_batch_in_halves(batch: Batch) -> Tensor:
    """Gradient accumulation done right: the sums of two micro-batches over one count."""
    log_w = ((batch.logp - batch.behavior_logp) * batch.mask).sum(-1)
    J = log_w.exp() * batch.episode_return
    half = batch.rows // 2
    return -(J[:half].sum() + J[half:].sum()) / batch.rows


def clipped_surrogate(batch: Batch) -> Tensor:
    """The loss of PPO with the group's advantage, as TRL and verl have it, a maximum of two losses, `[B, T]`."""
    R = batch.episode_return
    same = (batch.group[:, None] == batch.group[None, :]).to(R.dtype)
    mean = same @ R / same.sum(1)
    std = ((R[None, :] - mean[:, None]) ** 2 * same).sum(1).div(same.sum(1)).sqrt()
    adv = ((R - mean) / (std + 1e-6))[:, None]
    ratio = torch.exp(batch.logp - batch.behavior_logp)
    return torch.max(-adv * ratio, -adv * torch.clamp(ratio, 1 - 0.2, 1 + 0.2)) * batch.mask


@sound(*find_estimator("grpo").claims, same_as="grpo", couples="group")
def grpo_as_published(batch: Batch) -> Tensor:
    return (clipped_surrogate(batch).sum(-1) / batch.mask.sum(-1)).mean()


@sound(*find_estimator("cispo").claims, same_as="cispo")
def cispo_as_published(batch: Batch) -> Tensor:
    """The weight is detached, log π is not."""
    R = batch.episode_return
    same = (batch.group[:, None] == batch.group[None, :]).to(R.dtype)
    mean = same @ R / same.sum(1)
    adv = (R - mean) / (((R[None, :] - mean[:, None]) ** 2 * same).sum(1).div(same.sum(1)).sqrt() + 1e-6)
    weight = torch.exp(batch.logp - batch.behavior_logp).clamp(max=1.1).detach()
    return -(weight * adv[:, None] * batch.logp * batch.mask).sum() / batch.mask.sum()


@sound(*find_estimator("leave_one_out").claims, same_as="leave_one_out", leaf="logits", couples="group")
def rloo_from_logits(batch: Batch) -> Tensor:
    """Another leaf, the same estimate."""
    nll = torch.nn.functional.cross_entropy(batch.logits.mT, batch.action.clamp(min=0), reduction="none")
    return ((batch.episode_return - others_mean(batch))[:, None] * nll * batch.mask).sum(-1).mean()


class Configured:
    """A loss with settings, as frameworks have them."""

    def __init__(self, baseline: float) -> None:
        self.baseline = baseline

    def __call__(self, batch: Batch) -> Tensor:
        adv = batch.episode_return - self.baseline
        return -(adv[:, None] * batch.logp * batch.mask).sum(-1).mean()


SOUND["configured"] = from_loss(Configured(0.7), couples="trajectory", name="configured")
SOUND["partial"] = from_loss(
    functools.partial(lambda batch, scale: -(batch.logp * batch.mask).sum(-1) @ batch.episode_return * scale / batch.rows,
                      scale=1.0),
    name="partial",
)  # fmt: skip


def on_policy_only(name: str) -> bool:
    return not SOUND[name].claims[0].conditions


def bed() -> list[Problem]:
    """The problems of losses without a penalty, each once."""
    return [p for p in problems() if "@" not in p.name and p.plain_objective]


@pytest.fixture(scope="module")
def passed(once: Once) -> Report:
    """Losses that claim something of any sampler on all problems, plain ones on the on-policy set."""
    every = bed()
    on = [p for p in every if p.on_policy]
    plain = [e for name, e in SOUND.items() if on_policy_only(name)]
    others = [e for name, e in SOUND.items() if not on_policy_only(name)]

    def make() -> Report:
        report, rest = run(others, every), run(plain, on)
        return report.model_copy(update={"verdicts": report.verdicts + rest.verdicts})

    return once("sound", make)


def test_there_are_ten_sound_ones() -> None:
    assert len(SOUND) >= 10


@pytest.mark.parametrize("name", SOUND)
def test_sound_losses_pass_everything(passed: Report, name: str) -> None:
    assert not [(v.check, v.problem, v.measured) for v in passed.failures if v.estimator == name]
    asked = Counter(v.check for v in passed.verdicts if v.estimator == name)
    e = SOUND[name]
    on = [p for p in bed() if (p.on_policy or not on_policy_only(name)) and e.fits(p)]
    claimed = [p for p in on if any(c.applies(p) for c in e.claims)]
    assert asked["same_as" if e.same_as else "unbiased"] == len(on if e.same_as else claimed) >= 12
    assert set(asked) >= {"finite", "mask_respected", "padding_content", "padding_length", "row_order", "detached"}


def test_sound_losses_are_exact(passed: Report) -> None:
    """Three orders below what is allowed."""
    found = [(v.measured, v.allowed) for v in passed.verdicts if v.check in ("unbiased", "same_as")]
    assert all(measured is not None and measured <= 1e-3 * allowed for measured, allowed in found)
