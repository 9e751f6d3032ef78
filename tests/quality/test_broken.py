"""The checker is checked: what is wrong is caught by name, what is sound passes, and the zoo does what it claims."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pgcheck.api import as_problems
from pgcheck.batch import Batch
from pgcheck.estimators.base import Claim, Estimator, full_support, registered_estimators, unbiased
from pgcheck.estimators.broken import BROKEN, STALE, Broken
from pgcheck.estimators.from_loss import from_loss
from pgcheck.estimators.lookup import as_estimator
from pgcheck.problem import Problem
from pgcheck.render.messages import BIAS_CHECKS
from pgcheck.runs.report import Report
from pgcheck.runs.runner import run
from pgcheck.runs.suite import load_suite
from pgcheck.verdicts.checks import registered_checks
from pgcheck.verdicts.verdict import Status

ENTRIES: dict[str, Broken] = BROKEN | {STALE.estimator.name: STALE}


@functools.cache
def problems() -> list[Problem]:
    """The shipped set, on-policy and off, each at two θ."""
    return as_problems("all")


@pytest.fixture(scope="module")
def core() -> Report:
    """The shipped suite, whole."""
    return load_suite("core").run()


@pytest.fixture(scope="module")
def judged() -> Report:
    """Every broken estimator on every problem."""
    return run([x.estimator for x in ENTRIES.values()], problems())


def failed_checks(report: Report, estimator: str) -> set[str]:
    return {v.check for v in report.failures if v.estimator == estimator and v.status is Status.FAIL}


# -- wrong on purpose


def test_there_are_enough_of_them() -> None:
    assert len(ENTRIES) >= 20


def test_every_check_has_somebody_to_catch() -> None:
    caught_by = {check for x in ENTRIES.values() for check in x.caught_by}
    assert caught_by == set(registered_checks())


@pytest.mark.parametrize("name", ENTRIES)
def test_it_is_caught_by_name(judged: Report, name: str) -> None:
    assert set(ENTRIES[name].caught_by) <= failed_checks(judged, name)


@pytest.mark.parametrize("name", ENTRIES)
def test_nothing_else_cries_wolf(judged: Report, name: str) -> None:
    """A mistake that leaves E ĝ alone fails no claim; one that does not change with the padding fails no padding check."""
    expected = set(ENTRIES[name].caught_by)
    others = failed_checks(judged, name) - expected
    if name == "eos_dropped":  # a row that goes on after an observation keeps a coefficient there
        others -= {"mask_respected"}
    assert not others


@pytest.mark.parametrize("name", BROKEN)
def test_it_claims_what_its_sound_version_claims(name: str) -> None:
    x = BROKEN[name]
    assert x.estimator.claims == x.sound.claims
    assert x.estimator.name not in registered_estimators()
    fn = x.estimator.coefficients
    assert getattr(fn, "loss", fn).__doc__


@pytest.mark.parametrize("name", BROKEN)
def test_it_really_changes_the_expectation_or_is_not_said_to(judged: Report, core: Report, name: str) -> None:
    """E ĝ differs from the sound version's on some problem, by more than a hundredth of the size, or on none."""
    x = BROKEN[name]
    claimed = {p.name for p in problems() if any(c.applies(p) for c in x.sound.claims)}
    right = {m.problem: m for m in core.measurements if m.estimator == x.sound.name and m.problem in claimed}
    gaps = []
    for m in judged.measurements:
        if m.estimator == name and m.problem in right:
            gap = torch.tensor(m.expected).sub(torch.tensor(right[m.problem].expected)).norm()
            gaps.append(float(gap) / max(m.size, right[m.problem].size))
    if x.moves:
        assert max(gaps) > 1e-2
    else:
        assert max(gaps, default=0.0) < 1e-9


@pytest.mark.parametrize("name", [name for name, x in BROKEN.items() if x.moves])
def test_it_is_caught_at_both_thetas(judged: Report, name: str) -> None:
    """No luck: the claim fails at θ and at θ' of some problem."""
    failed = {v.problem for v in judged.failures if v.estimator == name and v.check in BIAS_CHECKS}
    assert any(f"{problem}@1" in failed for problem in failed)


def test_impure_ones_get_no_other_verdict(judged: Report) -> None:
    """What is random, stateful or writes to its inputs has no expectation to speak of."""
    for name in ("dropout_left_on", "running_baseline", "rewards_centred_in_place"):
        own = [v for v in judged.verdicts if v.estimator == name]
        assert {v.check for v in own} <= {"inputs_unchanged", "deterministic", "stateless"}
        assert not [m for m in judged.measurements if m.estimator == name]


# -- sound losses, as people write them


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


@pytest.fixture(scope="module")
def passed() -> dict[str, Report]:
    """Plain losses on the on-policy set; importance-sampled ones on all."""
    on = [p for p in problems() if p.on_policy]
    plain = [e for name, e in SOUND.items() if on_policy_only(name)]
    weighted = [e for name, e in SOUND.items() if not on_policy_only(name)]
    return {"plain": run(plain, on), "weighted": run(weighted, problems())}


def test_there_are_ten_sound_ones() -> None:
    assert len(SOUND) >= 10


@pytest.mark.parametrize("name", SOUND)
def test_sound_losses_pass_everything(passed: dict[str, Report], name: str) -> None:
    report = passed["plain" if on_policy_only(name) else "weighted"]
    assert not [(v.check, v.problem, v.measured) for v in report.failures if v.estimator == name]
    asked = Counter(v.check for v in report.verdicts if v.estimator == name)
    assert asked["unbiased"] >= 30
    assert set(asked) >= {"finite", "mask_respected", "padding_content", "padding_length", "row_order", "detached"}


def test_sound_losses_are_exact(passed: dict[str, Report]) -> None:
    """Three orders below what is allowed."""
    bias = [v for report in passed.values() for v in report.verdicts if v.check == "unbiased"]
    assert max(v.measured or 0.0 for v in bias) <= 1e-12


# -- the zoo


def kinds(name: str) -> set[str]:
    return {claim.kind for claim in as_estimator(name).claims}


def test_no_zoo_entry_is_flagged(core: Report) -> None:
    assert core.failures == []
    assert core.exit_code == 0
    assert len(core.estimators) == len(registered_estimators())


@pytest.mark.parametrize("name", registered_estimators())
def test_every_claim_of_the_zoo_is_judged(core: Report, name: str) -> None:
    """On at least one problem; and every entry has a verdict on its expectation."""
    estimator = as_estimator(name)
    measured = {m.problem for m in core.measurements if m.estimator == name}
    for claim in estimator.claims:
        assert [p.name for p in problems() if claim.applies(p) and p.name in measured], claim
        assert [v for v in core.verdicts if v.estimator == name and v.check == claim.kind], claim
    assert [v for v in core.verdicts if v.estimator == name and v.check in BIAS_CHECKS]


@pytest.mark.parametrize("name", [name for name in registered_estimators() if kinds(name) != {"biased"}])
def test_equalities_hold_to_rounding(core: Report, name: str) -> None:
    """E ĝ = κ ∇J within 1e-12 of the size on every problem that meets the conditions: none is left out."""
    estimator = as_estimator(name)
    for claim in estimator.claims:
        if claim.kind == "biased":
            continue
        where = [p for p in problems() if claim.applies(p) and estimator.fits(p)]
        found = {v.problem: v.measured for v in core.verdicts if (v.estimator, v.check) == (name, claim.kind)}
        assert {p.name for p in where} <= set(found)
        assert max(found[p.name] or 0.0 for p in where) <= 1e-12


@pytest.mark.parametrize("name", [name for name in registered_estimators() if "biased" in kinds(name)])
def test_biases_are_no_rounding(core: Report, name: str) -> None:
    """A claim of bias is shown by more than a thousandth of the size."""
    shown = [v for v in core.verdicts if (v.estimator, v.check) == (name, "biased")]
    assert min(v.measured or 0.0 for v in shown) > 1e-3


def test_every_pair_is_accounted_for(core: Report) -> None:
    """Measured, or not asked with the reason: 1 of the two for each pair; no claim is passed without a measurement."""
    measured = {(m.estimator, m.problem) for m in core.measurements}
    not_asked = {(n.estimator, n.problem) for n in core.not_asked}
    pairs = {(e.name, p.name) for e in core.estimators for p in core.problems}
    assert measured | not_asked == pairs
    assert all(n.reason for n in core.not_asked)
    for v in core.verdicts:
        if v.check in BIAS_CHECKS and v.problem:
            assert (v.estimator, v.problem) in measured
