"""A vector field that is a gradient has a symmetric Jacobian; the expectations of some estimators are the gradient of nothing.

J[x, y] = ∂ E ĝ_x / ∂ z_y, by central differences of fourth order over the logits of a problem.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from pgcheck import Problem, TabularMDP, strategies
from pgcheck.engines.exact import exact_moments
from pgcheck.estimators import advantages as adv
from pgcheck.estimators import aggregation as agg
from pgcheck.estimators.base import Estimator, find_estimator, from_coefficients
from pgcheck.estimators.lookup import FILLED_BY  # noqa: F401  (fills the registries)
from pgcheck.estimators.zoo import compose
from pgcheck.policies import SoftmaxTable
from tests.properties import oracle

H = 2e-3


def moved(problem: Problem, cell: int, by: float) -> Problem:
    logits = problem.logits.clone()
    logits.view(-1)[cell] += by
    return replace(problem, policy=SoftmaxTable(logits))


def jacobian(problem: Problem, field: Callable[[Problem], Tensor]) -> Tensor:
    """`[K·A, K·A]`; error of the order of H⁴ and 1e-16 / H."""
    columns = []
    for cell in range(problem.logits.numel()):
        near, far = (field(moved(problem, cell, h)) - field(moved(problem, cell, -h)) for h in (H, 2 * H))
        columns.append(((8 * near - far) / (12 * H)).reshape(-1))
    return torch.stack(columns, 1)


def asymmetry(J: Tensor) -> float:
    """‖J − Jᵀ‖ / ‖J + Jᵀ‖; 0 where J vanishes."""
    size = float((J + J.T).norm())
    return float((J - J.T).norm()) / size if size > 1e-6 else 0.0


def expectation(estimator: Estimator) -> Callable[[Problem], Tensor]:
    return lambda problem: exact_moments([estimator], problem)[0].mean


ON_POLICY = {"off_policy": False, "max_rollouts": 6, "max_states": 2, "max_actions": 2, "max_rows": 2}


@settings(max_examples=12)
@given(strategies.problems(**ON_POLICY))
def test_the_gradient_is_a_gradient(problem: Problem) -> None:
    assert asymmetry(jacobian(problem, oracle.gradient)) < 1e-8


@settings(max_examples=6)
@given(strategies.problems(min_rows=2, min_group_size=2, **ON_POLICY))
def test_what_is_unbiased_is_the_gradient_of_something(problem: Problem) -> None:
    for name in ("leave_one_out", "batch_mean"):
        assert asymmetry(jacobian(problem, expectation(find_estimator(name)))) < 1e-8


def ragged(**settings: object) -> Problem:
    """Two states; in the first, one action ends the episode and the other leads to the second: lengths 1 and 2."""
    env = TabularMDP(
        [[[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]], [[0.0, 0.0, 1.0]] * 2, [[0.0, 0.0, 1.0]] * 2],
        [[0.5, 1.0], [2.0, -1.0], [0.0, 0.0]], [1.0, 0.0, 0.0], horizon=2, terminal=[2],
    )  # fmt: skip
    return Problem(env, [[0.3, -0.2], [-0.4, 0.6], [0.0, 0.0]], **settings)  # type: ignore[arg-type]


token_mean = from_coefficients(
    compose(adv.return_minus(adv.mean_of_others("group")), aggregation=agg.token_mean), name="token mean"
)


@pytest.mark.parametrize(
    ("estimator", "problem"),
    [
        (find_estimator("cispo(notes)"), ragged(group_size=3)),
        (from_coefficients(compose(adv.standardised_return("group")), couples="group"), ragged(group_size=3)),
        (token_mean, ragged(group_size=2)),
        (find_estimator("grpo"), ragged(group_size=3)),
        (find_estimator("reward_to_go_undiscounted_weight"), None),
    ],
    ids=["cispo(notes)", "mean and std", "token mean", "grpo", "no γ^t"],
)
def test_these_are_the_gradient_of_nothing(estimator: Estimator, problem: Problem | None) -> None:
    if problem is None:
        whole = ragged(group_size=1)
        env = whole.env
        assert isinstance(env, TabularMDP)
        discounted = TabularMDP(
            env.transition, env.reward, env.initial, horizon=2, discount=0.5, terminal=[2]
        )  # fmt: skip
        problem = Problem(discounted, whole.logits, group_size=1)
    J = jacobian(problem, expectation(estimator))
    assert asymmetry(J) > 1e-2
    assert asymmetry(jacobian(problem, oracle.gradient)) < 1e-8
