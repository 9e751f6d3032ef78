"""Every check has a page, somebody who trips it and somebody who passes; what does not apply is not passed."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pgcheck.batch import Batch
from pgcheck.errors import UnknownNameError
from pgcheck.estimators.base import Estimator, find_estimator, from_coefficients
from pgcheck.estimators.broken import BROKEN, STALE
from pgcheck.estimators.from_loss import from_loss
from pgcheck.estimators.lookup import FILLED_BY  # noqa: F401  (fills the registries)
from pgcheck.problem import Problem
from pgcheck.registry import find_problem
from pgcheck.runs.runner import run
from pgcheck.verdicts.checks import Check, find_check, registered_checks
from pgcheck.verdicts.checks.base import add_check
from pgcheck.verdicts.verdict import Status, Verdict

CHECKS = registered_checks()

# Who trips it, and where; the sound version passes in the same place
TRIPPED: dict[str, tuple[str, str]] = {
    "unbiased": ("discount_weight_missing", "mdp/two-state-0.9"),
    "proportional": ("groups_merged", "bandit/contextual"),
    "biased": ("mended", "mdp/two-state-0.9"),
    "finite": ("nan_where_all_agree", "degenerate/all-equal"),
    "weights_average_to_one": ("ratio_inverted", "off-policy/dialogue-stale"),
    "same_as": ("max_for_min", "off-policy/dialogue-stale"),
    "inputs_unchanged": ("rewards_centred_in_place", "dialogue/two-turn"),
    "deterministic": ("dropout_left_on", "dialogue/two-turn"),
    "stateless": ("running_baseline", "dialogue/two-turn"),
    "detached": ("critic_not_detached", "dialogue/two-turn"),
    "float32": ("cancels_in_float32", "dialogue/two-turn"),
    "mask_respected": ("mask_ignored", "dialogue/two-turn"),
    "padding_content": ("ratio_over_observations", "dialogue/two-turn"),
    "padding_length": ("mean_over_padding", "dialogue/two-turn"),
    "row_order": ("tiled_for_repeated", "dialogue/two-turn"),
    "group_labels": ("group_ids_as_positions", "dialogue/two-turn"),
    "reward_shift": ("sum_of_others_over_group_size", "dialogue/two-turn"),
    "on_policy_limit": ("ratio_clamped_at_epsilon", "off-policy/dialogue-stale"),
}


def pair(name: str) -> tuple[Estimator, Estimator]:
    entry = STALE if name == "mended" else BROKEN[name]
    sound = entry.sound
    if name == "critic_not_detached":  # the check is asked of losses
        loss = lambda b: -(b.discount_weight * (b.reward_to_go - b.value[..., :-1]).detach() * b.logp * b.mask).sum(-1).mean()  # noqa: E731  # fmt: skip
        sound = from_loss(loss, couples="trajectory", name="critic_detached")
    # declared alike, so that the sound one is asked as well
    return entry.estimator, replace(
        sound,
        shift_invariant=entry.estimator.shift_invariant,
        on_policy_limit=entry.estimator.on_policy_limit,
        same_as=entry.estimator.same_as,
        claims=sound.claims if name != "critic_not_detached" else entry.sound.claims,
    )


def statuses(estimator: Estimator, problem: Problem, check: str) -> set[Status]:
    report = run([estimator], [problem], checks=[check])
    return {v.status for v in report.verdicts if v.check == check}


# -- pages


@pytest.mark.parametrize("name", CHECKS)
def test_every_check_has_a_page(name: str) -> None:
    """A first sentence, then what it does, why it matters, what to do; each with words after it."""
    page = inspect.cleandoc(CHECKS[name].page)
    assert page.split("\n\n")[0].replace("\n", " ").rstrip().endswith(".")
    for heading in ("What it does:", "Why it matters:", "What to do:"):
        assert re.search(re.escape(heading) + r" \S+ \S+ \S+", page), heading


@pytest.mark.parametrize("name", CHECKS)
def test_the_page_fits_a_terminal(name: str) -> None:
    assert max(map(len, inspect.cleandoc(CHECKS[name].page).splitlines())) <= 120


def test_a_check_is_registered_once_and_with_a_page() -> None:
    with pytest.raises(ValueError, match="unbiased"):
        add_check("unbiased", "bias", "A page.", None)
    with pytest.raises(ValueError, match="no page"):
        add_check("another", "bias", " \n ", None)
    assert "another" not in registered_checks()


def test_an_unknown_check_suggests_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown check 'unbiassed'\. Did you mean 'unbiased'"):
        find_check("unbiassed")


# -- both ways


def test_every_check_has_somebody_who_trips_it() -> None:
    assert list(TRIPPED) == list(CHECKS)


@pytest.mark.parametrize("name", TRIPPED)
def test_the_broken_one_trips_it(name: str) -> None:
    estimator, where = TRIPPED[name]
    assert statuses(pair(estimator)[0], find_problem(where), name) == {Status.FAIL}


@pytest.mark.parametrize("name", TRIPPED)
def test_the_sound_one_passes(name: str) -> None:
    estimator, where = TRIPPED[name]
    assert statuses(pair(estimator)[1], find_problem(where), name) == {Status.PASS}


@pytest.mark.parametrize("name", [n for n, c in CHECKS.items() if c.run is not None])
def test_a_check_gives_the_same_verdict_twice(name: str) -> None:
    estimator, where = TRIPPED[name]
    if estimator == "running_baseline":
        return
    first, second = (applied(CHECKS[name], pair(estimator)[0], find_problem(where)) for _ in range(2))
    assert first is not None
    assert second is not None
    if estimator != "dropout_left_on":
        assert first.measured == second.measured
    assert first.status is second.status
    assert (first.estimator, first.check, first.problem) == (estimator, name, where)


# -- not applicable is not passed


def applied(check: Check, estimator: Estimator, problem: Problem) -> Verdict | None:
    assert check.run is not None
    return check.run(estimator, problem)


SINGLE = find_problem("dialogue/two-turn").with_sampling(groups=1, group_size=1)
NOT_APPLICABLE: list[tuple[str, Estimator, Problem]] = [
    ("weights_average_to_one", find_estimator("reinforce"), find_problem("off-policy/dialogue-stale")),  # no weight
    ("weights_average_to_one", find_estimator("trajectory_is"), find_problem("off-policy/tree-truncated")),  # E w < 1
    ("detached", find_estimator("baselined(value)"), find_problem("dialogue/two-turn")),  # coefficients, no loss
    ("mask_respected", BROKEN["mask_ignored"].estimator, find_problem("bandit/contextual")),  # nothing is masked
    ("padding_content", BROKEN["ratio_over_observations"].estimator, find_problem("mdp/two-state")),
    ("row_order", find_estimator("reinforce"), SINGLE),  # one row
    ("reward_shift", find_estimator("reinforce"), find_problem("dialogue/two-turn")),  # not declared
    ("reward_shift", find_estimator("leave_one_out"), find_problem("degenerate/group-of-one")),  # no baseline there
    ("on_policy_limit", find_estimator("reinforce"), find_problem("off-policy/dialogue-stale")),  # not declared
    ("same_as", find_estimator("reinforce"), find_problem("off-policy/dialogue-stale")),  # not declared
]


@pytest.mark.parametrize(("name", "estimator", "problem"), NOT_APPLICABLE)
def test_what_does_not_apply_is_none(name: str, estimator: Estimator, problem: Problem) -> None:
    assert applied(CHECKS[name], estimator, problem) is None


@pytest.mark.parametrize(("name", "estimator", "problem"), NOT_APPLICABLE)
def test_what_does_not_apply_is_in_no_report(name: str, estimator: Estimator, problem: Problem) -> None:
    report = run([estimator], [problem], checks=[name])
    assert not [v for v in report.verdicts if v.check == name]
    assert report.exit_code != 0


def test_what_is_not_measured_is_not_finite() -> None:
    """No enumeration, no verdict on every coefficient of it."""
    report = run([find_estimator("grpo")], [find_problem("degenerate/group-of-one")])
    assert report.verdicts == []


# -- the numbers


def measured(check: str, estimator: Estimator, problem: Problem) -> float:
    verdict = applied(CHECKS[check], estimator, problem)
    assert verdict is not None
    return verdict.measured


def per_row(x: Callable[[Batch], Tensor], **settings: object) -> Estimator:
    return from_coefficients(lambda b: x(b).unsqueeze(-1) * b.mask / b.rows, couples="trajectory", **settings)  # type: ignore[arg-type]


def test_mask_respected_is_relative_to_the_largest_coefficient() -> None:
    """c = R/B at every position, masked or not: as large outside as inside."""
    assert measured("mask_respected", BROKEN["mask_ignored"].estimator, find_problem("dialogue/two-turn")) == 1.0


def test_padding_length_by_hand() -> None:
    """÷ B T with T = 3, then 5: c shrinks to 3/5."""
    found = measured("padding_length", BROKEN["mean_over_padding"].estimator, find_problem("dialogue/two-turn"))
    assert found == pytest.approx(0.4, abs=1e-12)


def test_on_policy_limit_by_hand() -> None:
    """The ratio is 1 on-policy; clamped at .2 it is off by .8."""
    found = measured(
        "on_policy_limit", BROKEN["ratio_clamped_at_epsilon"].estimator, find_problem("off-policy/dialogue-stale")
    )
    assert found == pytest.approx(0.8, abs=1e-12)


def test_weights_average_to_one_by_hand() -> None:
    """π = (.9, .1), μ = (.5, .5): E_μ[min(w, 1)] = Σ min(π, μ) = .6, and E_μ[w] = 1."""
    problem = replace(find_problem("bandit/two-arm"), behavior_logits=[[0.0, 0.0]], name="bandit/even-sampler")
    weight = lambda b: ((b.logp - b.behavior_logp) * b.mask).sum(-1).exp()  # noqa: E731
    right = per_row(lambda b: weight(b) * b.episode_return, weight=weight)
    clipped = per_row(lambda b: weight(b) * b.episode_return, weight=lambda b: weight(b).clamp(max=1.0))
    assert measured("weights_average_to_one", right, problem) == pytest.approx(0.0, abs=1e-15)
    assert measured("weights_average_to_one", clipped, problem) == pytest.approx(0.4, abs=1e-15)


def test_reward_shift_by_hand() -> None:
    """R − ½ mean with R + .75: c moves by .75/2; in a group of two with R = r for all, the largest |c| is B⁻¹ r/2."""
    problem = find_problem("bandit/two-arm").with_sampling(groups=1, group_size=2)
    half = from_coefficients(
        lambda b: (b.episode_return - 0.5 * b.episode_return.mean(-1, keepdim=True)).unsqueeze(-1) * b.mask / b.rows,
        shift_invariant=True,
    )
    # returns are 1 and 0; the largest coefficient is that of R = 1 next to 0: (1 − ¼)/2
    assert measured("reward_shift", half, problem) == pytest.approx((0.75 / 2) / (1 - 0.25))


def test_row_order_sees_what_one_permutation_would_miss() -> None:
    """The first row has no coefficient: a swap of the last two leaves that as it is."""
    first_out = from_coefficients(
        lambda b: b.episode_return.unsqueeze(-1) * b.mask * (torch.arange(b.rows) > 0).unsqueeze(-1) / b.rows
    )
    assert statuses(first_out, find_problem("mdp/two-state"), "row_order") == {Status.FAIL}


def test_float32_overflow_is_a_failure_with_its_reason() -> None:
    """Infinite in float32: the verdict of that check, not the end of the run."""
    report = run([BROKEN["overflows_in_float32"].estimator], [find_problem("dialogue/two-turn")])
    failed = {v.check: v for v in report.failures}
    assert set(failed) == {"float32"}
    assert "overflows_in_float32" in failed["float32"].reason


def test_a_loss_that_raises_on_other_group_ids_fails_that_check() -> None:
    """Ids as indices: 101 is out of bounds, and that is what the check is for."""

    def indexed(batch: Batch) -> Tensor:
        R, n = batch.episode_return, batch.same_group.sum(-1)
        total = torch.zeros_like(R).scatter_add(-1, batch.group, R)
        return (R - (total.gather(-1, batch.group) - R) / (n - 1)).unsqueeze(-1) * batch.mask / batch.rows

    estimator = from_coefficients(indexed, couples="group")
    report = run([estimator], [find_problem("dialogue/two-turn")])
    assert {v.check for v in report.failures} == {"group_labels"}
    assert "out of bounds" in report.failures[0].reason


def test_dropping_one_coordinate_of_a_logits_estimator_trips_the_mask_check() -> None:
    """Weights `[B, T, A]` are looked at position by position as well."""
    everywhere = from_coefficients(
        lambda b: torch.zeros_like(b.logits) + b.episode_return[..., None, None], leaf="logits", couples="trajectory"
    )
    assert measured("mask_respected", everywhere, find_problem("dialogue/two-turn")) == 1.0


def test_a_problem_without_masked_positions_asks_nothing_of_the_mask() -> None:
    """`mask_ignored` is right where every position is the policy's own."""
    report = run([BROKEN["mask_ignored"].estimator], [find_problem("mdp/two-state")])
    assert report.exit_code == 0
    assert "mask_respected" not in {v.check for v in report.verdicts}


def test_what_was_not_looked_for_does_not_pass() -> None:
    """A random loss: whether it keeps state as well was not found out, so `stateless` is silent, not PASS."""
    report = run([BROKEN["dropout_left_on"].estimator], [find_problem("dialogue/two-turn")])
    assert {v.check: v.status.value for v in report.verdicts} == {"inputs_unchanged": "PASS", "deterministic": "FAIL"}
    report = run([BROKEN["rewards_centred_in_place"].estimator], [find_problem("dialogue/two-turn")])
    assert {v.check: v.status.value for v in report.verdicts} == {"inputs_unchanged": "FAIL"}
