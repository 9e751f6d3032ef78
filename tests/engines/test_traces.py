"""Mean and total variance without a covariance, against the covariance and against batches one by one."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pgcheck import Problem, TabularMDP, strategies
from pgcheck.engines import traces
from pgcheck.engines.coefficients import estimates, gradient_map
from pgcheck.engines.exact import exact_moments
from pgcheck.engines.traces import into_gradient, squared_norms
from pgcheck.errors import BudgetError, UsageError
from pgcheck.estimators.base import Estimator, find_estimator
from pgcheck.estimators.lookup import FILLED_BY  # noqa: F401  (fills the registries)
from pgcheck.registry import find_problem

# single rows, groups, batches; lumped; weights on every logit
NAMES = ("reinforce", "leave_one_out", "grpo", "cispo", "token_is", "batch_mean", "entropy_bonus(token)")
ESTIMATORS = [find_estimator(name) for name in NAMES]
PLACES = {
    "dialogue/two-turn": {"groups": 2, "group_size": 2},  # observations, two groups
    "mdp/two-state": {"groups": 1, "group_size": 3},  # one context visited several times
    "tree/tokens": {"groups": 1, "group_size": 5},  # class counts
    "off-policy/tree-truncated": {"groups": 1, "group_size": 2},
    "lm/parity": {"groups": 2, "group_size": (2, 1)},
}


def assert_same(estimators: list[Estimator], problem: Problem) -> None:
    asked = [e for e in estimators if e.fits(problem)]
    whole = exact_moments(asked, problem, covariance=True)
    for e, a, b in zip(asked, whole, exact_moments(asked, problem, covariance=False), strict=True):
        assert a.covariance is not None
        assert b.covariance is None
        size = math.sqrt(a.second_moment)
        torch.testing.assert_close(b.mean, a.mean, rtol=0, atol=1e-13 * size, msg=e.name)
        torch.testing.assert_close(b.by_step, a.by_step, rtol=0, atol=1e-13 * size, msg=e.name)
        assert b.total_variance == pytest.approx(a.total_variance, abs=1e-12 * size**2), e.name
        assert (a.enumerated, a.lane) == (b.enumerated, b.lane)


@pytest.mark.parametrize("place", PLACES)
def test_the_trace_is_that_of_the_covariance(place: str) -> None:
    assert_same(ESTIMATORS, find_problem(place).with_sampling(**PLACES[place]))  # type: ignore[arg-type]


@given(strategies.problems(), st.sampled_from(ESTIMATORS))
def test_on_any_problem(problem: Problem, estimator: Estimator) -> None:
    assert_same([estimator], problem)


@given(strategies.problems(), st.booleans())
def test_squared_norms_are_those_of_the_gradients(problem: Problem, logits: bool) -> None:
    """Random coefficients, scattered and multiplied out as matrices."""
    table = problem.trajectories
    generator = torch.Generator().manual_seed(0)
    shape = (4, 3, *([table.actions] if logits else []))
    c = torch.randn(shape, generator=generator, dtype=torch.float64)
    cell = torch.randint(table.contexts, (4, 3), generator=generator) * table.actions
    if not logits:
        cell += torch.randint(table.actions, (4, 3), generator=generator)
    x = torch.zeros(4, table.contexts * table.actions, dtype=torch.float64)
    for m in range(4):
        for i in range(3):
            here = slice(int(cell[m, i]), int(cell[m, i]) + table.actions) if logits else int(cell[m, i])
            x[m, here] += c[m, i]
    dense = x @ gradient_map(table, logits=logits).T
    torch.testing.assert_close(into_gradient(x, table, logits=logits), dense, rtol=0, atol=1e-13)
    found = squared_norms(c, cell, table, logits=logits)
    torch.testing.assert_close(found, dense.square().sum(-1), rtol=1e-12, atol=1e-13)


def test_one_token_of_many_in_closed_form() -> None:
    """A bandit of 3000 arms, 1/0 for odd and even ones, REINFORCE: E ĝ = p_a (r_a − J), and with
    ‖e_a − π‖² = 1 − 2 p_a + ‖π‖², E‖ĝ_row‖² = Σ_a p_a r_a (1 − 2 p_a + ‖π‖²)."""
    A = 3000
    logits = torch.linspace(-2, 2, A, dtype=torch.float64).unsqueeze(0)
    arm_reward = (torch.arange(A) % 2).to(torch.float64)
    stay = torch.ones(1, A, 1, dtype=torch.float64)
    env = TabularMDP(stay, arm_reward.unsqueeze(0), [1.0], horizon=1)
    problem = Problem(env, logits, group_size=4)
    p = torch.softmax(logits[0], -1)
    J = p @ arm_reward
    (m,) = exact_moments([find_estimator("reinforce")], problem, covariance=False)
    torch.testing.assert_close(m.mean[0], p * (arm_reward - J), rtol=0, atol=1e-16)
    row = (p * arm_reward) @ (1 - 2 * p + p @ p) - (p * (arm_reward - J)).square().sum()
    assert m.total_variance == pytest.approx(float(row) / 4, rel=1e-12)


def test_a_batch_at_a_time() -> None:
    """E‖ĝ‖² over every ordered batch of the two-armed bandit, by loops."""
    problem = find_problem("bandit/two-arm").with_sampling(groups=1, group_size=3)
    (m,) = exact_moments([find_estimator("grpo")], problem, covariance=False)
    table = problem.trajectories
    second = 0.0
    for n in range(8):
        rows = torch.tensor([[n >> i & 1 for i in range(3)]])
        chance = float(table.behavior_probability[rows[0]].prod())
        second += chance * float(estimates(find_estimator("grpo"), table, rows, problem.group_labels).square().sum())
    assert m.second_moment == pytest.approx(second, rel=1e-13)


def test_what_is_not_kept_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traces, "COVARIANCE_CELLS", 1)
    (m,) = exact_moments([find_estimator("reinforce")], find_problem("bandit/two-arm"))
    assert m.covariance is None
    with pytest.raises(UsageError, match=r"covariance: it was not kept, having 2² entries"):
        m.in_parameters()


def test_what_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traces, "free_memory", lambda: 40)
    for asked, words in ((True, "the covariance of 2 logits"), (False, "the coefficients of 2 rollouts")):
        with pytest.raises(BudgetError, match=words):
            exact_moments([find_estimator("reinforce")], find_problem("bandit/two-arm"), covariance=asked)
