"""Policies: tables, linear ones and modules are logits `[K, A]` and a Jacobian dz/dθ."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pgcheck.errors import ProblemError
from pgcheck.policies import LinearPolicy, ModulePolicy, SoftmaxTable, as_policy
from pgcheck.policies.tabular import logit_jacobian
from pgcheck.problem import Problem
from tests.worlds import World, return_scale, two_arm_env, two_arm_paths, worlds


class Tied(nn.Module):
    """z = x W + W₀₀, the matrix used twice; and a parameter of no effect."""

    def __init__(self, contexts: int, actions: int, generator: torch.Generator) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(contexts, actions, generator=generator, dtype=torch.float64))
        self.idle = nn.Parameter(torch.ones(2, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.weight[0, 0] * x.sum(-1, keepdim=True).cos()


def filled(module: nn.Module, generator: torch.Generator) -> nn.Module:
    """Every parameter a standard normal of `generator`."""
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return module


def network(inputs: int, actions: int) -> nn.Module:
    """One hidden layer; its default initialisation, which draws from the global stream, is overwritten by `filled`."""
    with torch.random.fork_rng():
        return nn.Sequential(
            nn.Linear(inputs, 3, dtype=torch.float64), nn.Tanh(), nn.Linear(3, actions, dtype=torch.float64)
        )


def build(kind: str, contexts: int, actions: int, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    if kind == "table":
        return SoftmaxTable(normal(contexts, actions))
    if kind == "linear":
        return LinearPolicy(normal(contexts, 2), normal(2, actions))
    if kind == "network":
        return ModulePolicy(filled(network(contexts, actions), generator), contexts=contexts)
    if kind == "network on features":
        return ModulePolicy(filled(network(2, actions), generator), normal(contexts, 2))
    return ModulePolicy(Tied(contexts, actions, generator), contexts=contexts)


KINDS = ("table", "linear", "network", "network on features", "tied")


def differences(value: Callable[[nn.Module], Tensor], policy: nn.Module, step: float = 1e-3) -> Tensor:
    """Fourth-order central differences of `value` in every parameter, in the order of `parameters()`: `[..., P]`."""
    columns = []
    for i, p in enumerate(policy.parameters()):
        for j in range(p.numel()):

            def at(h: float, i: int = i, j: int = j) -> Tensor:
                moved = copy.deepcopy(policy)
                with torch.no_grad():
                    list(moved.parameters())[i].view(-1)[j] += h
                return value(moved)

            columns.append((8 * (at(step) - at(-step)) - (at(2 * step) - at(-2 * step))) / (12 * step))
    return torch.stack(columns, -1)


@settings(max_examples=25)
@given(worlds(max_states=3, max_horizon=2), st.sampled_from(KINDS), st.integers(0, 1000))
def test_parameter_gradient_is_the_derivative_in_theta(world: World, kind: str, seed: int) -> None:
    """(dz/dθ)ᵀ ∇_z J = ∇_θ J, the latter by moving each θ_j."""
    policy = build(kind, len(world.weights), world.actions, seed)
    problem = world.problem(policy)
    way = "dynamic_programming"
    expected = differences(lambda moved: torch.tensor(world.problem(moved).value(way), dtype=torch.float64), policy)
    torch.testing.assert_close(problem.parameter_gradient(), expected, rtol=0, atol=1e-8 * return_scale(world))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_logit_jacobian(kind: str, seed: int) -> None:
    """dz/dθ `[K·A, P]`, columns in the order of `parameters()`, against differences of the logits."""
    policy = build(kind, 3, 2, seed)
    jacobian = logit_jacobian(policy)
    assert jacobian.shape == (6, sum(p.numel() for p in policy.parameters()))
    assert not jacobian.requires_grad
    expected = differences(lambda moved: moved().detach().reshape(-1), policy)
    torch.testing.assert_close(jacobian, expected, rtol=0, atol=1e-8)


def test_the_jacobian_of_a_table_is_the_identity() -> None:
    """θ = z."""
    assert torch.equal(logit_jacobian(SoftmaxTable([[0.1, 0.2], [0.3, 0.4]])), torch.eye(4, dtype=torch.float64))


def test_linear_logits_are_features_times_weight() -> None:
    """z[k, a] = Σ_f x[k, f] w[f, a], with three different sizes."""
    x = torch.tensor([[1.0, 2.0], [0.0, -1.0], [0.5, 0.0]], dtype=torch.float64)
    w = torch.tensor([[1.0, 0.0, 2.0, -1.0], [3.0, 1.0, 0.0, 0.5]], dtype=torch.float64)
    assert torch.equal(LinearPolicy(x, w)().detach(), x @ w)


def test_a_module_sees_one_hot_contexts() -> None:
    """Row k of the logits is column k of the weights."""
    linear = nn.Linear(3, 2, bias=False, dtype=torch.float64)
    problem_policy = as_policy(linear, 3)
    assert isinstance(problem_policy, ModulePolicy)
    assert torch.equal(problem_policy().detach(), linear.weight.detach().T)


def test_the_callers_tables_are_copied() -> None:
    """A later change of the caller's array does not move the policy."""
    logits = torch.tensor([[0.0, 1.0]], dtype=torch.float64)
    policy = as_policy(logits, 1)
    logits += 1.0
    assert policy().tolist() == [[0.0, 1.0]]


def test_a_policy_is_wrapped_once() -> None:
    """`as_policy` of a policy is that policy, not a module over one-hot contexts around it."""
    for policy in (SoftmaxTable([[0.0, 1.0]]), LinearPolicy([[2.0]], [[0.0, 1.0]])):
        again = as_policy(policy, 1)
        assert type(again) is type(policy)
        assert torch.equal(again(), policy())


def test_a_later_step_of_the_callers_optimiser_does_not_reach_the_problem() -> None:
    """A problem is frozen: J, ∇J and the table stay those of one θ, whatever becomes of the module."""
    module = nn.Linear(1, 2, bias=False, dtype=torch.float64)
    problem = Problem(two_arm_env(), module)
    value, gradient, logits = problem.value(), problem.gradient(), problem.logits
    with torch.no_grad():
        module.weight += torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    assert problem.value() == value
    assert torch.equal(problem.logits, logits)
    assert torch.equal(problem.gradient("dynamic_programming"), gradient)


def test_the_callers_module_is_left_in_its_precision() -> None:
    """A float32 model handed in for checking is float32 afterwards."""
    module = nn.Linear(1, 2)
    Problem(two_arm_env(), module)
    assert module.weight.dtype == torch.float32


def test_a_float32_module_is_judged_in_float64() -> None:
    """z is computed in double precision from the module's weights."""
    module = nn.Linear(1, 2, bias=False)
    expected = module.weight.detach().to(torch.float64).T
    problem = Problem(two_arm_env(), module)
    assert problem.logits.dtype == torch.float64
    torch.testing.assert_close(problem.logits, expected, rtol=0, atol=1e-15)


BAD: list[tuple[Any, str]] = [
    ([0.0, 1.0], r"policy_logits: shape \[2\], expected \[K, A\]"),
    ([[[0.0, 1.0]]], r"policy_logits: shape \[1, 1, 2\], expected \[K, A\]"),
    ([[0.0, 1.0, 2.0]], r"policy_logits: shape \[1, 3\], expected \[1, 2\] \(contexts, actions\)"),
    ([[0.0, 1.0], [0.0, 1.0]], r"policy_logits: shape \[2, 2\], expected \[1, 2\]"),
    ([[0.0, math.nan]], r"policy_logits: every logit must be finite"),
    ([[0.0, -math.inf]], r"policy_logits: every logit must be finite \(a behaviour policy's may be -inf\)"),
    ("uniform", r"policy_logits: cannot be read as an array of numbers"),
    ([[0.0], [1.0, 2.0]], r"policy_logits: cannot be read as an array of numbers"),
    (None, r"policy_logits: cannot be read as an array of numbers"),
]


@pytest.mark.parametrize(("logits", "message"), BAD, ids=[str(i) for i in range(len(BAD))])
def test_bad_logits_are_named(logits: Any, message: str) -> None:
    """Field, what it is, what it must be."""
    with pytest.raises(ProblemError, match=message):
        Problem(two_arm_env(), logits)


@pytest.mark.parametrize(("logits", "found"), [([[0.0, math.nan]], "nan"), ([[math.inf, 0.0]], "inf")])
def test_the_message_says_which_logit(logits: Any, found: str) -> None:
    """The offending value is part of the message."""
    with pytest.raises(ProblemError, match=rf"policy_logits: .*{found}\b(?!\))"):
        Problem(two_arm_env(), logits)


def test_a_table_too_small_for_the_rollouts() -> None:
    """Rollouts given as `Paths` use an action that the table does not have."""
    problem = Problem(two_arm_paths(), [[0.0]])
    with pytest.raises(ProblemError, match=r"policy_logits: shape \[1, 1\].*use context 0 and action 1"):
        _ = problem.trajectories


def test_linear_shapes() -> None:
    """Features `[K, F]` and weight `[F, A]` share F."""
    with pytest.raises(
        ProblemError, match=r"features, weight: shapes \[3, 2\] and \[4, 2\], expected \[K, F\] and \[F, A\]"
    ):
        LinearPolicy(torch.zeros(3, 2), torch.zeros(4, 2))
    with pytest.raises(ProblemError, match=r"features, weight: shapes \[2\] and \[2, 2\]"):
        LinearPolicy(torch.zeros(2), torch.zeros(2, 2))


def test_a_module_needs_inputs() -> None:
    """Neither inputs nor a number of contexts."""
    with pytest.raises(ProblemError, match=r"policy: a module needs its inputs \[K, F\], or contexts=K"):
        ModulePolicy(nn.Linear(1, 2))
