"""J and ∇J: three derivations of the package, and one that shares nothing with it, on random problems."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings

from pgcheck import Problem, TabularMDP, strategies
from pgcheck.engines.exact import exact_moments
from pgcheck.estimators.base import find_estimator
from pgcheck.estimators.lookup import FILLED_BY  # noqa: F401  (fills the registries)
from tests.properties import oracle
from tests.properties.oracle import close, everything

EVERY_POLICY = ("table", "linear", "module")


def return_size(problem: Problem) -> float:
    env = problem.env
    assert isinstance(env, TabularMDP)
    return float(env.reward.abs().max()) * env.horizon


@given(strategies.problems(policy=EVERY_POLICY))
def test_three_truths_and_the_tree_agree(problem: Problem) -> None:
    expected, size = oracle.gradient(problem), return_size(problem)
    for method in ("dynamic_programming", "enumeration"):
        close(problem.gradient(method), expected, size=size, atol=1e-13)  # type: ignore[arg-type]
    close(problem.gradient("central_differences"), expected, size=size, atol=1e-10)
    z = [[complex(x) for x in row] for row in problem.logits.tolist()]
    env = problem.env
    assert isinstance(env, TabularMDP)
    J = oracle.value(problem, [z] * env.horizon).real
    for method in ("dynamic_programming", "enumeration"):
        assert math.isclose(problem.value(method), J, abs_tol=1e-13 * max(1.0, size))  # type: ignore[arg-type]


@settings(max_examples=30)
@given(strategies.problems(policy=EVERY_POLICY))
def test_each_steps_share_of_the_gradient(problem: Problem) -> None:
    """E[γ^t Ĝ_t ∇log π_t] is the derivative of J by the policy of step t alone."""
    size = return_size(problem)
    close(problem.gradient_by_step(), oracle.gradient_by_step(problem), size=size, atol=1e-13)
    close(problem.gradient_by_step().sum(0), problem.gradient(), size=size, atol=1e-13)


@settings(max_examples=20)
@given(strategies.problems(max_rollouts=8, max_batches=200, max_rows=3, min_rows=2, min_group_size=2))
def test_each_positions_share_of_the_expectation(problem: Problem) -> None:
    """`by_step` of the engine: coefficients of all positions but one set to 0, over every ordered batch."""
    estimators = [find_estimator(name) for name in ("reinforce", "leave_one_out", "grpo", "batch_mean(reward_to_go)")]
    batches = everything(problem)
    for e, moments in zip(estimators, exact_moments(estimators, problem), strict=True):
        assert moments.by_step is not None
        c = torch.where(batches.batch.mask > 0, e.coefficients(batches.batch), 0.0)
        for t, found in enumerate(moments.by_step):
            only = torch.zeros_like(c)
            only[..., t] = c[..., t]
            close(found, batches.mean(batches.estimates(only)), size=float(c.abs().max()))
        close(moments.by_step.sum(0), moments.mean, size=float(c.abs().max()))


@settings(max_examples=15)
@given(strategies.problems(policy=("linear", "module"), max_states=2))
def test_the_way_to_the_parameters(problem: Problem) -> None:
    """∇_θ J by central differences of fourth order in every parameter, J by the tree."""
    found = problem.parameter_gradient()
    env = problem.env
    assert isinstance(env, TabularMDP)
    policy, expected = problem.policy, []

    def J() -> float:  # noqa: N802
        z = [[complex(x) for x in row] for row in policy().detach().tolist()]
        return oracle.value(problem, [z] * env.horizon).real

    h = 1e-3
    with torch.no_grad():
        for p in policy.parameters():
            flat = p.view(-1)
            for i in range(flat.numel()):
                before, at = float(flat[i]), []
                for step in (h, -h, 2 * h, -2 * h):
                    flat[i] = before + step
                    at.append(J())
                flat[i] = before
                expected.append((8 * (at[0] - at[1]) - (at[2] - at[3])) / (12 * h))
    close(found, torch.tensor(expected, dtype=torch.float64), size=return_size(problem), atol=1e-9)
