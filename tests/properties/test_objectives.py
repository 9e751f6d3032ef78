"""What estimators of groups and critics ascend, on random problems: objectives written out over pairs of rollouts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pgcheck import Problem, strategies
from pgcheck.engines.exact import exact_moments
from pgcheck.estimators import advantages as adv
from pgcheck.estimators.base import find_estimator, from_coefficients
from pgcheck.estimators.lookup import FILLED_BY  # noqa: F401  (fills the registries)
from pgcheck.estimators.zoo import compose
from tests.properties import oracle
from tests.properties.oracle import close, everything

ON_POLICY = {"off_policy": False, "max_rollouts": 8, "max_batches": 200}


def gradient_over_pairs(problem: Problem, f: Tensor) -> Tensor:
    """∇ Σ_s q(s) Σ_{n,m from s} p_n p_m f[n, m], by autograd in the probabilities of rollouts."""
    paths, z = problem.trajectories.paths, problem.logits.requires_grad_(True)
    logp = torch.log_softmax(z, -1)[paths.context.clamp(min=0), paths.action.clamp(min=0)] * paths.mask
    p = paths.env_probability * logp.sum(-1).exp()
    together = (paths.start.unsqueeze(-1) == paths.start) * paths.start_probability[paths.start]
    return torch.autograd.grad((together * torch.outer(p, p) * f).sum(), z)[0]


def returns(problem: Problem) -> Tensor:
    return problem.trajectories.rows_as_batch().episode_return


def expected(name: str, problem: Problem) -> tuple[Tensor, float]:
    """E ĝ over every ordered batch, and the size of what was averaged."""
    batches = everything(problem)
    estimates = batches.of(find_estimator(name))
    return torch.from_numpy(batches.mean(estimates)), float(abs(estimates).max())


@settings(max_examples=30)
@given(strategies.problems(terminal=True, grouping="equal", min_group_size=2, max_rows=2, **ON_POLICY))
def test_weighing_by_length_in_pairs_ascends_another_objective(problem: Problem) -> None:
    """`opo` at G = 2: ½J − ¼ E[(R₁ − R₂)(L₁ − L₂)/(L₁ + L₂)]."""
    R, L = returns(problem), problem.trajectories.paths.mask.sum(-1)
    f = 0.25 * (R.unsqueeze(-1) + R) - 0.25 * (R.unsqueeze(-1) - R) * (L.unsqueeze(-1) - L) / (L.unsqueeze(-1) + L)
    found, size = expected("opo", problem)
    close(found, gradient_over_pairs(problem, f), size=size)


@pytest.mark.parametrize("name", ["pkpo", "pkpo(minus_one)"])
@settings(max_examples=20)
@given(problem=strategies.problems(min_group_size=2, max_rows=4, **ON_POLICY))
def test_pass_at_two_is_the_better_of_two(problem: Problem, name: str) -> None:
    """For any rewards: ∇ E max(R₁, R₂), two rollouts of one prompt."""
    R = returns(problem)
    found, size = expected(name, problem)
    close(found, gradient_over_pairs(problem, torch.maximum(R.unsqueeze(-1), R)), size=size)


@settings(max_examples=30)
@given(
    strategies.problems(max_starts=1, min_group_size=3, grouping="one", max_rows=3, max_rollouts=6, off_policy=False)
)
def test_the_std_of_the_others_keeps_the_direction(problem: Problem) -> None:
    """`loo_std` at G = 3 on one prompt: κ = E[1/(|R₁ − R₂|/2 + ε)], the population std of two others, ε = .1."""
    R, p = returns(problem), problem.trajectories.probability
    scale = float((torch.outer(p, p) / (0.5 * (R.unsqueeze(-1) - R).abs() + 0.1)).sum())
    found, size = expected("loo_std", problem)
    close(found, scale * oracle.gradient(problem), size=size)


@settings(max_examples=30)
@given(problem=strategies.problems(max_rows=1, **ON_POLICY), decay=st.sampled_from([0.0, 0.3, 0.95, 1.0]))
def test_with_the_exact_value_every_decay_is_unbiased(problem: Problem, decay: float) -> None:
    one = everything(problem, (1,))
    estimates = one.of(from_coefficients(compose(adv.gae(decay, adv.state_value)), couples="trajectory"))
    close(one.mean(estimates), oracle.gradient(problem), size=abs(estimates).max())


@settings(max_examples=30)
@given(data=st.data())
def test_without_decay_only_the_own_value_is_left(data: st.DataObject) -> None:
    """λ = 1: γ^t (Ĝ_t − V(s_t)), row by row, as the values of later states cancel."""
    problem = data.draw(strategies.problems(**ON_POLICY))
    batch = data.draw(strategies.batches(problem))
    a, b = (compose(x)(batch) for x in (adv.gae(1.0, adv.state_value), adv.to_go_minus(adv.state_value)))
    close(a, b, size=float(b.abs().max()))


@settings(max_examples=25)
@given(data=st.data())
def test_all_actions_at_once_have_the_least_variance(data: st.DataObject) -> None:
    """Where no context recurs in a row, steps fall on coordinates of their own, and each step's term is the conditional mean of
    any other given s_t (Rao & Blackwell)."""
    problem = data.draw(
        strategies.problems(
            reward="outcome", observation=False, shared_contexts=False, grouping="rows", max_states=2, **ON_POLICY
        )
    )  # fmt: skip
    baselined = from_coefficients(
        compose(adv.to_go_minus(data.draw(strategies.baselines()))), couples="trajectory", name="b(s, t)"
    )
    shipped = [find_estimator(n) for n in ("reward_to_go", "gae", "actor_critic", "baselined(optimal_state_joint)")]
    least, *others = (
        m.total_variance for m in exact_moments([find_estimator("all_action"), baselined, *shipped], problem)
    )
    assert all(least <= other + 1e-11 * max(1.0, other) for other in others)
