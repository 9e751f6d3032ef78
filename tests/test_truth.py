"""J and ∇J: dynamic programming, enumeration, central differences, and a recursion in fractions all agree."""

from __future__ import annotations

import cmath
import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pgcheck import truth
from pgcheck.envs.tabular import TabularMDP
from pgcheck.errors import TruthError
from pgcheck.problem import Problem
from tests.worlds import (
    World,
    logs,
    oracle_gradient,
    oracle_value,
    random_world,
    return_scale,
    shares,
    start_chances,
    two_arm_env,
    two_state_env,
    walk,
    worlds,
)

METHODS = ("dynamic_programming", "enumeration", "central_differences")
EXACT = 1e-12  # of the largest return: rounding only
DIFFERENCED = 1e-9  # fourth order, step 1e-3: h⁴ J⁽⁵⁾ / 30 + 1e-16 R / h


def assert_close(found: Tensor, expected: Tensor, atol: float) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


@given(worlds())
def test_value_is_the_fraction(world: World) -> None:
    """J = Σ q(s₀) p(τ | s₀) R(τ), summed in fractions, by every method."""
    problem = world.problem()
    expected = float(oracle_value(world, world.policy()))
    for method in METHODS:
        assert problem.value(method) == pytest.approx(expected, abs=EXACT * return_scale(world), rel=0)


@given(worlds())
def test_gradients_agree(world: World) -> None:
    """∇J by dynamic programming, enumeration and differences equals the complex-step derivative of the recursion."""
    problem, scale = world.problem(), return_scale(world)
    expected = oracle_gradient(world)
    assert problem.gradient().shape == expected.shape
    for method, tolerance in zip((None, *METHODS), (EXACT, EXACT, EXACT, DIFFERENCED), strict=True):
        assert_close(problem.gradient(method), expected, tolerance * scale)


@given(worlds())
def test_a_gradient_in_logits_sums_to_zero_in_every_context(world: World) -> None:
    """softmax(z + c) = softmax(z), so Σ_a ∂J/∂z[k, a] = 0."""
    gradient = world.problem().gradient()
    assert_close(gradient.sum(-1), torch.zeros_like(gradient[:, 0]), EXACT * return_scale(world))


@given(worlds())
def test_returns(world: World) -> None:
    """Σ_τ p(τ) R(τ)^m for m = 1, 2 from `returns` and from the tree: the same law of R, merged or not."""
    table = world.problem().trajectories
    found = truth.returns(table.paths)
    weight = table.probability * table.paths.start_probability[table.paths.start]
    for m in (1, 2):
        expected = sum(
            start_chances(world)[x.start] * x.probability * x.discounted(world.discount) ** m
            for x in walk(world, world.policy())
        )
        assert float((weight * found**m).sum()) == pytest.approx(float(expected), abs=EXACT * return_scale(world) ** m)


@given(worlds(max_horizon=2))
def test_enumeration_is_differentiable(world: World) -> None:
    """autograd of Σ_τ p(τ) R(τ) is the score-function sum."""
    problem = world.problem()
    paths = problem.trajectories.paths
    by_autograd = truth.gradient_by_autograd(lambda z: truth.value_by_enumeration(paths, z), problem.logits)
    assert_close(by_autograd, problem.gradient("enumeration"), EXACT * return_scale(world))


@given(worlds(), st.integers(0, 10**6))
def test_terms_of_the_objective(world: World, seed: int) -> None:
    """J − β KL + α H from the list of rollouts: chances as fractions for the value, the complex step for the gradient."""
    rng = Random(seed)
    beta, alpha = rng.choice([0.0, 0.5, 2.0]), rng.choice([0.0, 0.25, 1.0])
    ref = tuple(tuple(rng.randint(1, 5) for _ in row) for row in world.weights)
    problem = replace(world.problem(), ref_logits=logs(ref), kl_coefficient=beta, entropy_coefficient=alpha)
    scale = 10 * return_scale(world)  # β log 5 of each step

    def objective(policy: Sequence[Sequence[Any]]) -> Any:
        total, q, pi_ref = 0.0, start_chances(world), shares(ref)
        for x in walk(world, policy):
            cost = sum(
                float(world.discount) ** e
                * (
                    (beta + alpha) * cmath.log(policy[world.context(s)][a])
                    - beta * math.log(pi_ref[world.context(s)][a])
                )
                for e, (s, a, _) in zip(x.exponents, x.steps, strict=True)
                if a is not None
            )
            total += float(q[x.start]) * x.probability * (float(x.discounted(world.discount)) - cost)
        return total

    for method in METHODS:
        assert problem.value(method) == pytest.approx(objective(world.policy()).real, abs=EXACT * scale, rel=0)
    expected, h = torch.zeros_like(problem.logits), 1e-30
    for k, a in itertools.product(*map(range, expected.shape)):
        e = [
            [cmath.exp(x + 1j * h * ((j, b) == (k, a))) for b, x in enumerate(row)]
            for j, row in enumerate(logs(world.weights))
        ]
        expected[k, a] = objective([[x / sum(row) for x in row] for row in e]).imag / h
    for method, tolerance in zip((None, *METHODS), (EXACT, EXACT, EXACT, DIFFERENCED), strict=True):
        assert_close(problem.gradient(method), expected, tolerance * scale)


def test_two_arms_by_hand() -> None:
    """J = p, ∂J/∂z = (p(1−p), −p(1−p)) with p = π(a = 0) = 3/4: 3/16."""
    problem = Problem(two_arm_env(), [[torch.tensor(3.0, dtype=torch.float64).log(), 0.0]])
    assert problem.value() == pytest.approx(0.75, abs=1e-15)
    assert_close(problem.gradient(), torch.tensor([[3 / 16, -3 / 16]], dtype=torch.float64), 1e-15)


@pytest.mark.parametrize(("clock", "second"), [("position", Fraction(1, 4)), ("action", Fraction(1, 2))])
def test_the_two_clocks_by_hand(clock: str, second: Fraction) -> None:
    """act (pays a), observe (pays 2), act (pays a): R = a₀ + γ^{1 or 0}·2 + γ^{2 or 1} a₂ with γ = 1/2, π = 1/2."""
    env = TabularMDP(
        [[[0.0, 1.0]] * 2, [[1.0, 0.0]] * 2],
        [[0.0, 1.0], [2.0, 2.0]],
        [1.0, 0.0],
        horizon=3,
        discount=0.5,
        observation=[1],
        discount_clock=clock,  # type: ignore[arg-type]
    )
    problem = Problem(env, [[0.0, 0.0], [0.0, 0.0]])
    expected = Fraction(1, 2) + 2 * (Fraction(1, 2) if clock == "position" else 1) + second / 2
    for method in METHODS:
        assert problem.value(method) == pytest.approx(float(expected), abs=1e-14)
    # both acts are at context 0: ∂J/∂z₁ = (1 + γ^e) π(1 − π)
    for method in METHODS:
        assert_close(
            problem.gradient(method),
            torch.tensor([[-1.0, 1.0], [0.0, 0.0]], dtype=torch.float64) * float((1 + second) / 4),
            DIFFERENCED,
        )


def test_without_discount_the_clocks_agree() -> None:
    """γ = 1: what γ counts does not matter."""
    values, gradients = [], []
    for clock in ("position", "action"):
        problem = random_world(11, discount=Fraction(1), clock=clock).problem()
        values.append(problem.value())
        gradients.append(problem.gradient())
    assert values[0] == values[1]
    assert torch.equal(gradients[0], gradients[1])


def test_full_discount_sees_the_first_position_only() -> None:
    """γ = 0, position clock, 0⁰ = 1: J = E r_0, whatever the horizon."""
    longer = random_world(5, horizon=3, discount=Fraction(0))
    shorter = random_world(5, horizon=1, discount=Fraction(1))
    assert longer.problem().value() == pytest.approx(shorter.problem().value(), abs=1e-14)
    assert_close(longer.problem().gradient(), shorter.problem().gradient(), 1e-14)


def test_a_context_that_is_never_seen_has_no_gradient() -> None:
    """States 0 and 1 share context 0, context 1 belongs to nobody."""
    problem = Problem(two_state_env(), [[0.3, -0.1], [2.0, 5.0]], contexts=[0, 0, 1])
    for method in METHODS:
        assert problem.gradient(method)[1].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e9])
def test_agreement_is_relative_to_the_returns(scale: float) -> None:
    """r → λr gives ∇J → λ∇J, at any λ."""
    world = random_world(7)
    base, env = world.problem(), world.env()
    scaled = TabularMDP(
        env.transition,
        env.reward * scale,
        env.initial,
        horizon=env.horizon,
        discount=env.discount,
        terminal=sorted(env.terminal),
        observation=sorted(env.observation),
    )
    assert_close(Problem(scaled, base.logits).gradient() / scale, base.gradient(), EXACT * return_scale(world))


def test_a_policy_that_is_almost_certain() -> None:
    """Logits ±300: p(1−p) underflows to e^−600, and the derivations still agree."""
    problem = Problem(two_arm_env(), [[300.0, -300.0]])
    assert problem.value() == 1.0
    assert float(problem.gradient().abs().max()) < 1e-100


def test_disagreement_is_a_truth_error() -> None:
    """A gap above the tolerance, or a NaN, names the problem and asks for a report."""
    zero = torch.zeros(1, 2, dtype=torch.float64)
    assert truth.agreed_gradient(zero, zero, size=1.0, problem="toy/one") is zero
    for other in (zero + 1e-3, zero * torch.nan):
        with pytest.raises(TruthError, match=r"toy/one: two derivations of ∇J differ by (0\.001|nan).*pgcheck bug"):
            truth.agreed_gradient(zero, other, size=1.0, problem="toy/one")


def test_returns_of_zero_need_no_special_case() -> None:
    """Nothing is ever paid: J = 0 and ∇J = 0 exactly."""
    problem = Problem(two_state_env(reward=[[0.0, 0.0]] * 3), [[0.3, -0.1]] * 3)
    assert problem.value() == 0.0
    assert not bool(problem.gradient().any())


@pytest.mark.parametrize("seed", range(5))
def test_rewards_that_cancel_are_no_disagreement(seed: int) -> None:
    """Paid 0.1, 0.2, −0.3: R = 0 up to rounding of terms of size 0.3, which is what agreement must be relative to."""
    chain = [
        [[0.0, 1.0, 0.0, 0.0]] * 3,
        [[0.0, 0.0, 1.0, 0.0]] * 3,
        [[0.0, 0.0, 0.0, 1.0]] * 3,
        [[0.0] * 3 + [1.0]] * 3,
    ]
    env = TabularMDP(
        chain,
        [[0.1] * 3, [0.2] * 3, [-0.3] * 3, [0.0] * 3],
        [1.0, 0.0, 0.0, 0.0],
        horizon=3,
        terminal=[3],
    )
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(seed))
    gradient = Problem(env, logits).gradient()
    assert_close(gradient, torch.zeros_like(gradient), 1e-15)
