"""Exact moments: brute force says the same, whatever is enumerated and however it is cut into blocks."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pgcheck.batch import Batch
from pgcheck.engines import exact
from pgcheck.engines.exact import exact_moments
from pgcheck.engines.moments import Moments
from pgcheck.errors import BudgetError, EstimatorError
from pgcheck.estimators import zoo  # noqa: F401  (fills the registry)
from pgcheck.estimators.base import Estimator, find_estimator, from_coefficients, registered_estimators
from pgcheck.estimators.from_loss import from_loss
from pgcheck.estimators.lookup import FILLED_BY  # noqa: F401  (fills the registries)
from pgcheck.problem import Problem
from pgcheck.registry import find_problem
from tests.engines.oracle import bandit, brute_force, dialogue, every_batch, rollout_chances, walk

TOLERANCE = 1e-10
ORACLE_LIMIT = 1_500  # ordered tuples the brute force can afford

PROBLEMS: dict[str, Callable[[], Problem]] = {
    "one group of three": lambda: walk(group_size=3),
    "two groups of two, two prompts, masked": lambda: dialogue(groups=2, group_size=2),
    "unequal groups, two prompts, masked": lambda: dialogue(groups=2, group_size=(2, 1)),
    "unequal groups of one prompt": lambda: bandit([1.0, 0.25, -0.5], [0.3, -0.2, 0.4], groups=2, group_size=(3, 2)),
    "three rollouts, each its own group": lambda: dialogue(groups=3, group_size=1),
    "off-policy": lambda: walk(group_size=3, behavior_logits=[[-0.3, 0.5], [0.6, -0.1]]),
    "off-policy, two prompts, masked": lambda: dialogue(
        groups=2, group_size=2, behavior_logits=[[-0.4, 0.2], [0.3, 0.1], [0.9, -0.2]]
    ),
}


@functools.cache
def problem_of(name: str) -> Problem:
    return PROBLEMS[name]()


@functools.cache
def batches_of(name: str) -> list[tuple[Batch, float]]:
    problem = problem_of(name)
    return every_batch(problem.trajectories, problem.sizes, rollout_chances(problem))


def assert_same(found: Moments, expected: tuple[Tensor, Tensor, Tensor], tolerance: float = TOLERANCE) -> None:
    mean, covariance, by_step = expected
    torch.testing.assert_close(found.mean, mean, rtol=0, atol=tolerance)
    torch.testing.assert_close(found.covariance, covariance, rtol=0, atol=tolerance)
    torch.testing.assert_close(found.by_step, by_step, rtol=0, atol=tolerance)
    assert found.total_variance == pytest.approx(float(covariance.trace()), abs=10 * tolerance)
    assert found.batches is None


def assert_agrees_with_brute_force(estimator: Estimator, name: str) -> Moments:
    problem = problem_of(name)
    (found,) = exact_moments([estimator], problem)
    assert_same(found, brute_force(estimator, batches_of(name), problem.logits))
    return found


# -- against the oracle


@pytest.mark.parametrize("name", PROBLEMS)
def test_every_registered_estimator_agrees_with_brute_force(name: str) -> None:
    """Mean and covariance over ordered tuples, for all entries without side tables, in one call."""
    problem, batches = problem_of(name), batches_of(name)
    assert len(batches) <= ORACLE_LIMIT
    asked = [e for e in registered_estimators().values() if e.fits(problem) and not e.needs]
    assert len(asked) >= 10
    for estimator, found in zip(asked, exact_moments(asked, problem), strict=True):
        assert_same(found, brute_force(estimator, batches, problem.logits))


@pytest.mark.parametrize("sizes", [(2,), (1, 1)])
def test_side_tables_and_auxiliary_draws_agree_with_brute_force(sizes: tuple[int, ...]) -> None:
    """Side columns ride along; VinePPO's continuations split each rollout into their outcomes."""
    problem = walk(groups=len(sizes), group_size=sizes)
    asked = [e for e in registered_estimators().values() if e.fits(problem) and e.needs]
    assert {"vineppo(K=1)", "baselined(optimal_constant)", "baselined(next_action)"} <= {e.name for e in asked}
    for estimator in asked:
        if estimator.name == "vineppo(K=2)":
            continue  # 4 · 16 · 4 outcomes squared: too many for the oracle; its moments are judged with the zoo
        table = problem.trajectories_with(estimator.needs)
        batches = every_batch(table, sizes, table.behavior_probability.tolist())
        (found,) = exact_moments([estimator], problem)
        assert_same(found, brute_force(estimator, batches, problem.logits))


def entropy_loss(batch: Batch) -> Tensor:
    """REINFORCE with an entropy bonus: it puts weight on actions not drawn."""
    logp = torch.log_softmax(batch.logits, -1)
    entropy = -(logp.exp() * logp).sum(-1)
    return -((batch.episode_return.unsqueeze(-1) * batch.logp + 0.3 * entropy) * batch.mask).sum(-1).mean()


def token_mean_entropy_loss(batch: Batch) -> Tensor:
    """The same divided by the number of tokens of the whole batch: coupled."""
    logp = torch.log_softmax(batch.logits, -1)
    entropy = -(logp.exp() * logp).sum(-1)
    adv = (batch.episode_return - batch.episode_return.mean()).unsqueeze(-1)
    return -((adv * batch.logp + 0.3 * entropy) * batch.mask).sum() / batch.mask.sum()


@pytest.mark.parametrize("name", ["one group of three", "unequal groups, two prompts, masked", "off-policy"])
def test_losses_on_the_logits_agree_with_brute_force(name: str) -> None:
    assert_agrees_with_brute_force(from_loss(entropy_loss, leaf="logits", couples="trajectory"), name)
    assert_agrees_with_brute_force(from_loss(entropy_loss, leaf="logits", couples="batch"), name)
    assert_agrees_with_brute_force(from_loss(token_mean_entropy_loss, leaf="logits"), name)


def test_entropy_bonus_in_closed_form() -> None:
    """One step: ĝ = (1/B) Σ_i (R_i s_i + β ∇H) with ∇H[a] = −π_a (log π_a + H), the same in every batch."""
    problem = bandit([1.0, 0.0, 0.5], [0.3, -0.2, 0.4], group_size=3)
    (found,) = exact_moments([from_loss(entropy_loss, leaf="logits", couples="trajectory")], problem)
    (plain,) = exact_moments([find_estimator("reinforce")], problem)
    pi = torch.softmax(problem.logits, -1)
    entropy = -(pi * pi.log()).sum(-1, keepdim=True)
    torch.testing.assert_close(found.mean, problem.gradient() - 0.3 * pi * (pi.log() + entropy), rtol=0, atol=1e-14)
    torch.testing.assert_close(found.covariance, plain.covariance, rtol=0, atol=1e-14)


# -- order


def _less(baseline: Callable[[Tensor], Tensor]) -> Callable[[Batch], Tensor]:
    def coefficients(batch: Batch) -> Tensor:
        adv = batch.episode_return - baseline(batch.episode_return)
        return (adv / batch.rows).unsqueeze(-1) * batch.mask

    return coefficients


def first_row(R: Tensor) -> Tensor:
    """The first row's return is everybody's baseline."""
    return R[..., :1].expand(R.shape)


def second_row(R: Tensor) -> Tensor:
    return R[..., 1:2].expand(R.shape)


def next_row(R: Tensor) -> Tensor:
    """Row i is compared with row i + 1: invariant under rotations, not under transpositions."""
    return R.roll(-1, -1)


def tiled_means(R: Tensor) -> Tensor:
    """Group means *tiled* over rows where they should be *repeated*: row i gets the mean of group i mod groups."""
    means = R.unflatten(-1, (-1, 2)).mean(-1)
    return torch.cat([means] * 2, -1)


def repeated_means(R: Tensor) -> Tensor:
    return R.unflatten(-1, (-1, 2)).mean(-1).repeat_interleave(2, -1)


def next_group(R: Tensor) -> Tensor:
    """Each group of two is compared with the mean of the next group."""
    return R.unflatten(-1, (-1, 2)).mean(-1).roll(-1, -1).repeat_interleave(2, -1)


ORDERED_CASES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[], Problem]]] = {
    "first row, one group": (first_row, lambda: walk(group_size=3)),
    "first row, five rows": (first_row, lambda: bandit([1.0, 0.25, -0.5], [0.3, -0.2, 0.4], group_size=5)),
    "second row, five rows": (second_row, lambda: bandit([1.0, 0.25, -0.5], [0.3, -0.2, 0.4], group_size=5)),
    "next row, three rows": (next_row, lambda: bandit([1.0, 0.25, -0.5], [0.3, -0.2, 0.4], group_size=3)),
    "next row, four rows": (next_row, lambda: bandit([1.0, 0.25, -0.5], [0.3, -0.2, 0.4], group_size=4)),
    "tiled means": (tiled_means, lambda: dialogue(groups=2, group_size=2)),
    "next group": (next_group, lambda: bandit([1.0, 0.25, -0.5], [0.3, -0.2, 0.4], groups=3, group_size=2)),
    "next row, three groups of one": (next_row, lambda: dialogue(groups=3, group_size=1)),
}


@pytest.mark.parametrize("case", ORDERED_CASES)
def test_estimators_that_depend_on_the_order_of_rows(case: str) -> None:
    """Multisets would be wrong for them: they go through ordered tuples, and agree with brute force."""
    baseline, build = ORDERED_CASES[case]
    problem = build()
    estimator = from_coefficients(_less(baseline), couples="batch", name=case)
    batches = every_batch(problem.trajectories, problem.sizes, rollout_chances(problem))
    (found,) = exact_moments([estimator], problem)
    assert_same(found, brute_force(estimator, batches, problem.logits))
    assert found.enumerated == len(batches)


def test_the_tiled_mistake_changes_the_expectation() -> None:
    """Repeated group means keep (G−1)/G of ∇J; tiled ones do not. The cheap path is taken for the first alone."""
    problem = dialogue(groups=2, group_size=2)
    right, wrong = exact_moments(
        [from_coefficients(_less(repeated_means), name="right"), from_coefficients(_less(tiled_means), name="wrong")],
        problem,
    )
    torch.testing.assert_close(right.mean, 0.5 * problem.gradient(), rtol=0, atol=1e-14)
    assert float((wrong.mean - 0.5 * problem.gradient()).norm()) > 0.01 * float(problem.gradient().norm())
    outcomes = 2 * math.comb(3 + 1, 2)  # of one group: two prompts, multisets of 2 out of 3
    assert right.enumerated == math.comb(outcomes + 1, 2)
    assert wrong.enumerated == (2 * 3**2) ** 2


# -- what a coefficient may look at


@pytest.mark.parametrize("name", PROBLEMS)
def test_couples_is_only_a_matter_of_cost(name: str) -> None:
    """A trajectory or group estimator enumerated as `batch` has the same moments."""
    problem = problem_of(name)
    for short in ("reinforce", "trajectory_is", "leave_one_out", "grpo"):
        estimator = find_estimator(short)
        if estimator.fits(problem):
            wide = Estimator(short, estimator.coefficients, "batch", min_group_size=1)
            narrow, whole = exact_moments([estimator, wide], problem)
            assert_same(narrow, (whole.mean, whole.covariance, whole.by_step), 1e-13)
            assert narrow.enumerated <= whole.enumerated


def test_what_is_enumerated_is_counted() -> None:
    """N rollouts, group outcomes, or batches: the number evaluated is the binomial one."""
    problem = dialogue(groups=2, group_size=2)
    found = exact_moments([find_estimator(n) for n in ("reinforce", "leave_one_out", "batch_mean")], problem)
    outcomes = 2 * math.comb(3 + 1, 2)
    assert [m.enumerated for m in found] == [6, outcomes, math.comb(outcomes + 1, 2)]


@pytest.mark.parametrize(
    ("short", "declared"),
    [
        ("batch_mean", "trajectory"),
        ("batch_mean", "group"),
        ("leave_one_out", "trajectory"),
        ("cispo", "group"),
        ("batch_mean_alive", "group"),
    ],
)
def test_couples_declared_too_narrow_is_refused(short: str, declared: str) -> None:
    """The batch mean of two groups looks at other groups; saying otherwise must not give a number."""
    problem = dialogue(groups=2, group_size=2)
    lying = Estimator("lying", find_estimator(short).coefficients, declared)  # type: ignore[arg-type]
    with pytest.raises(EstimatorError, match=rf"'lying' is declared couples='{declared}'.*declare couples='batch'"):
        exact_moments([lying], problem)


@pytest.mark.parametrize("declared", ["trajectory", "group"])
def test_the_number_of_a_group_is_not_its_own_affair(declared: str) -> None:
    """c = R_i 1[group i is the first] / B keeps half of ∇J; enumerated alone, every group would be the first."""

    def only_the_first_group(batch: Batch) -> Tensor:
        return (batch.episode_return * (batch.group == 0) / batch.rows).unsqueeze(-1) * batch.mask

    problem = dialogue(groups=2, group_size=2)
    estimator = from_coefficients(only_the_first_group, couples=declared, name="first group")  # type: ignore[arg-type]
    try:
        (found,) = exact_moments([estimator], problem)
    except EstimatorError:
        return  # refused: as good as right
    torch.testing.assert_close(found.mean, 0.5 * problem.gradient(), rtol=0, atol=1e-12)


def test_couples_group_over_one_group_may_see_all_of_it() -> None:
    """With one group, the batch is the group."""
    estimator = Estimator("narrow", find_estimator("batch_mean").coefficients, "group")
    narrow, whole = exact_moments([estimator, find_estimator("batch_mean")], walk(group_size=3))
    assert_same(narrow, (whole.mean, whole.covariance, whole.by_step), 1e-14)


# -- blocks, and many at once


def _sampler(problem: Problem) -> list[Estimator]:
    names = ("reinforce", "batch_mean", "batch_mean_alive", "leave_one_out", "grpo", "gigpo", "cispo", "reinforce_pp")
    ordered = from_coefficients(_less(first_row), name="first row")
    return [e for e in map(find_estimator, names) if e.fits(problem)] + [ordered]


@pytest.mark.parametrize("elements", [1, 1_000, 10**9])
def test_moments_do_not_depend_on_the_block(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 64 batches, of a few hundred, or one for all."""
    problem = dialogue(groups=2, group_size=(3, 2))
    asked = _sampler(problem)
    usual = exact_moments(asked, problem)
    monkeypatch.setattr(exact, "_BLOCK_ELEMENTS", elements)
    monkeypatch.setattr(exact, "_BLOCK_ROWS", elements)
    for found, expected in zip(exact_moments(asked, problem), usual, strict=True):
        assert_same(found, (expected.mean, expected.covariance, expected.by_step), 1e-13)


def test_many_at_once_are_the_same_as_one_at_a_time() -> None:
    """Estimators on the same blocks do not disturb each other, and come back in the order asked."""
    problem = dialogue(groups=2, group_size=2)
    asked = [e for e in registered_estimators().values() if e.fits(problem) and not e.name.startswith("vineppo")]
    together = exact_moments(asked, problem)
    for estimator, found in zip(asked, together, strict=True):
        (alone,) = exact_moments([estimator], problem)
        assert torch.equal(found.mean, alone.mean)
        assert torch.equal(found.covariance, alone.covariance)
        assert found.enumerated == alone.enumerated


def test_one_that_changes_its_batch_is_refused() -> None:
    """All estimators share the blocks, so nobody may write to them."""

    def rude(batch: Batch) -> Tensor:
        R = batch.reward.sum(-1)
        batch.reward.mul_(0.0)
        return (R / batch.rows).unsqueeze(-1) * batch.mask

    with pytest.raises(EstimatorError, match=r"'rude' changes its inputs: batch\.reward"):
        exact_moments([from_coefficients(rude), find_estimator("batch_mean")], walk(group_size=2))


def test_the_same_call_gives_the_same_bytes() -> None:
    problem = dialogue(groups=2, group_size=2)
    asked = _sampler(problem)
    for a, b in zip(exact_moments(asked, problem), exact_moments(asked, problem), strict=True):
        assert torch.equal(a.mean, b.mean)
        assert torch.equal(a.covariance, b.covariance)


def test_a_true_zero_is_a_zero() -> None:
    """E[∇log π] = 0: a constant coefficient has no expectation, to rounding."""
    constant = from_coefficients(lambda batch: batch.mask / batch.rows, couples="trajectory", name="constant")
    (found,) = exact_moments([constant], dialogue(groups=2, group_size=2))
    assert float(found.mean.abs().max()) < 1e-15


def test_covariance_is_symmetric_and_falls_as_one_over_groups() -> None:
    """Independent groups: Cov of `groups` of them is Cov of one over `groups`."""
    one, four = (exact_moments([find_estimator("leave_one_out")], dialogue(groups=g, group_size=2))[0] for g in (1, 4))
    assert torch.equal(one.covariance, one.covariance.T)
    torch.testing.assert_close(four.covariance, one.covariance / 4, rtol=0, atol=1e-14)
    torch.testing.assert_close(four.mean, one.mean, rtol=0, atol=1e-15)


def test_progress_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """(what, done, of how many), once a run has lasted; the clock is made to jump."""
    ticks = iter(range(0, 10**6, 10))
    monkeypatch.setattr(exact.time, "monotonic", lambda: float(next(ticks)))
    monkeypatch.setattr(exact, "_BLOCK_ELEMENTS", 1)
    monkeypatch.setattr(exact, "_BLOCK_ROWS", 1)
    seen: list[tuple[str, int, int]] = []
    exact_moments(
        [find_estimator("batch_mean")],
        dialogue(groups=2, group_size=(3, 2)),
        progress=lambda what, done, total: seen.append((what, done, total)),
    )
    assert seen
    assert seen[-1][1] == seen[-1][2]
    assert "batch_mean" in seen[-1][0]


# -- the budget

_PLAN = re.compile(r"groups=(\d+), group_size=(\d+) \(([\d,]+) batches\)")


def _number(text: str) -> int:
    return int(text.replace(",", ""))


@pytest.mark.parametrize("budget", [5, 8, 30, 300, 4_000])
@pytest.mark.parametrize("short", ["batch_mean", "leave_one_out", "grpo"])
def test_budget_error_names_a_plan_that_fits(short: str, budget: int) -> None:
    """It says how many batches, how many are allowed, and a plan of sampling that runs within the budget."""
    problem = dialogue(groups=4, group_size=(30 if short == "leave_one_out" else 6))
    estimator = find_estimator(short)
    outcomes = 2 * math.comb(3 + problem.sizes[0] - 1, problem.sizes[0])
    needed = outcomes if estimator.couples == "group" else math.comb(outcomes + 3, 4)
    if needed <= budget:
        exact_moments([estimator], problem, budget=budget)
        return
    with pytest.raises(BudgetError) as caught:
        exact_moments([estimator], problem, budget=budget)
    message = str(caught.value)
    assert f"needs {needed:,} batches" in message
    assert f"the budget is {budget:,}" in message
    assert f"'{short}'" in message
    assert f"'{problem.name}'" in message
    plan = _PLAN.search(message)
    if plan is None:
        assert "No smaller batch fits" in message
        return
    smaller = problem.with_sampling(groups=int(plan[1]), group_size=int(plan[2]))
    assert estimator.fits(smaller), f"{short} needs groups of {estimator.min_group_size}; offered: {plan[0]}"
    (found,) = exact_moments([estimator], smaller, budget=budget)
    assert found.enumerated == _number(plan[3]) <= budget


def test_budget_error_when_nothing_fits() -> None:
    with pytest.raises(BudgetError, match="No smaller batch fits; raise the budget, shorten the horizon, or sample"):
        exact_moments([find_estimator("reinforce")], dialogue(), budget=5)


def test_budget_counts_ordered_tuples() -> None:
    """3^8 = 6561 ordered batches where C(10, 2) = 45 multisets would do."""
    problem = bandit([1.0, 0.25, -0.5], [0.3, -0.2, 0.4], group_size=8)
    ordered = from_coefficients(_less(first_row), name="first row")
    with pytest.raises(BudgetError, match=r"needs 6,561 ordered batches \(the estimator depends on the order"):
        exact_moments([ordered], problem, budget=1_000)
    exact_moments([find_estimator("batch_mean")], problem, budget=1_000)


def test_budget_charges_a_loss_that_runs_in_a_loop() -> None:
    """Each batch of the loop lane counts 300; the nearest plan is judged by the same price."""

    def branching(batch: Batch) -> Tensor:
        scale = 2.0 if batch.reward.numpy().sum() > 0.4 else 1.0
        return -(scale * batch.episode_return.unsqueeze(-1) * batch.logp * batch.mask).sum(-1).mean()

    problem = bandit([1.0, 0.25, -0.5], [0.3, -0.2, 0.4], group_size=8)
    with pytest.raises(BudgetError, match=r"needs 45 batches, at 300 each because the loss only runs in a loop") as e:
        exact_moments([from_loss(branching)], problem, budget=3_000)
    plan = _PLAN.search(str(e.value))
    assert plan is not None
    assert plan[0] == "groups=1, group_size=3 (10 batches)"  # C(5, 2) = 10, and 15 · 300 is too much


# -- broken coefficients


def test_not_a_number_shows_the_batch() -> None:
    """A group whose returns all agree has std 0; the message shows such a batch's rewards and the likely cause."""

    def divided(batch: Batch) -> Tensor:
        R = batch.episode_return
        adv = (R - R.mean(-1, keepdim=True)) / R.std(-1, keepdim=True)
        return (adv / batch.rows).unsqueeze(-1) * batch.mask

    problem = bandit([1.0, 0.0], [0.3, -0.2], group_size=2)
    table = r"row  group  actions  rewards  coefficients\n +0 +0 +(\d) +(\d) +nan\n +1 +0 +\1 +\2 +nan$"
    with pytest.raises(EstimatorError, match=rf"'divided' returns nan\. .*\n +{table}"):
        exact_moments([from_coefficients(divided)], problem)


def test_not_a_number_on_padding_does_not_matter() -> None:
    """Only policy positions have a coefficient."""

    def padded(with_: float) -> Callable[[Batch], Tensor]:
        return lambda batch: torch.where(batch.mask > 0, batch.episode_return.unsqueeze(-1) / batch.rows, with_)

    found, expected = exact_moments(
        [from_coefficients(padded(x), couples="trajectory") for x in (torch.nan, 0.0)], dialogue(group_size=2)
    )
    assert torch.equal(found.mean, expected.mean)


def test_infinity_is_refused() -> None:
    with pytest.raises(EstimatorError, match=r"'blows up' returns inf"):
        exact_moments([from_coefficients(lambda b: b.mask / 0.0, name="blows up")], walk(group_size=2))


def test_not_finite_in_a_logit_coefficient_is_refused() -> None:
    def broken(batch: Batch) -> Tensor:
        return torch.full_like(batch.logits, torch.nan)

    with pytest.raises(EstimatorError, match="'broken' returns nan"):
        exact_moments([from_coefficients(broken, leaf="logits")], walk(group_size=2))


@pytest.mark.parametrize(
    ("fn", "words"),
    [
        (lambda b: b.episode_return, r"shape \[64, 2\], expected \[64, 2, 2\]"),
        (lambda b: b.mask.sum(), r"shape \[\], expected \[64, 2, 2\]"),
        (lambda b: b.mask[..., :1], r"shape \[64, 2, 1\], expected \[64, 2, 2\]"),
        (lambda b: 1.0, "returned float, not a torch tensor"),
        (lambda b: None, "returned None, not a torch tensor"),
        (lambda b: b.mask.numpy(), "returned ndarray, not a torch tensor"),
    ],
)
def test_coefficients_of_the_wrong_kind_are_refused(fn: Callable[[Batch], Tensor], words: str) -> None:
    with pytest.raises(EstimatorError, match=rf"'wrong' .*{words}"):
        exact_moments([from_coefficients(fn, name="wrong")], walk(group_size=2))


def test_coefficients_in_single_precision_are_taken() -> None:
    """float32 coefficients are promoted, not refused; the answer is good to single precision."""
    single = from_coefficients(
        lambda b: ((b.episode_return / b.rows).unsqueeze(-1) * b.mask).float(), couples="trajectory", name="single"
    )
    problem = walk(group_size=2)
    (found,) = exact_moments([single], problem)
    torch.testing.assert_close(found.mean, problem.gradient(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["tree/tokens", "dialogue/unequal-groups", "off-policy/tree-stale", "lm/sum-mod-3"])
def test_second_moments_product_by_product(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """E x xᵀ from the few places that a batch touches, or by a matrix product: the same, rollouts of a place twice included."""
    estimators = [find_estimator(e) for e in ("reinforce", "grpo", "batch_mean")]
    problem = find_problem(name)
    found = {}
    for cost in (0, 10**12):
        monkeypatch.setattr(exact, "_PAIR_COST", cost)
        found[cost] = exact_moments(estimators, problem)
    for few, all_ in zip(found[0], found[10**12], strict=True):
        assert torch.equal(few.mean, all_.mean)
        torch.testing.assert_close(few.covariance, all_.covariance, rtol=0, atol=1e-14 * (1 + all_.second_moment))
