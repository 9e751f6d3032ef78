"""Identities between estimators, row by row and in expectation, on random problems."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pgcheck import Problem, TabularMDP, strategies
from pgcheck.batch import Batch
from pgcheck.engines.exact import exact_moments
from pgcheck.estimators import advantages as adv
from pgcheck.estimators import ratios
from pgcheck.estimators.base import find_estimator, from_coefficients
from pgcheck.estimators.lookup import FILLED_BY  # noqa: F401  (fills the registries)
from pgcheck.estimators.zoo import compose
from tests.properties import oracle
from tests.properties.oracle import close, everything

SMALL = {"max_rollouts": 8, "max_batches": 200, "max_rows": 3}
ON_POLICY = SMALL | {"off_policy": False}


@settings(max_examples=30)
@given(strategies.problems(min_rows=2, grouping="one", **ON_POLICY))
def test_leave_one_out_is_the_batch_mean_rescaled(problem: Problem) -> None:
    """R_i − mean of the others = B/(B−1) · (R_i − mean), so E of the second is (B−1)/B ∇J."""
    batches, B = everything(problem), problem.rows
    loo, mean = (batches.of(find_estimator(name)) for name in ("leave_one_out", "batch_mean"))
    close(loo, B / (B - 1) * mean, size=abs(loo).max())
    close(batches.mean(mean), (B - 1) / B * oracle.gradient(problem), size=abs(loo).max())


@settings(max_examples=30)
@given(strategies.problems(min_rows=2, grouping="one", **ON_POLICY))
def test_leave_one_out_compares_pairs(problem: Problem) -> None:
    """RLOO = Σ_{i<j} (R_i − R_j)(S_i − S_j) / (B(B−1)) on every batch."""
    batches, B = everything(problem), problem.rows
    R = batches.batch.episode_return.numpy()  # [M, B]
    S = batches.score.sum(1)[batches.rows]  # [M, B, K·A]
    pairs = sum((R[:, i] - R[:, j])[:, None] * (S[:, i] - S[:, j]) for i, j in itertools.combinations(range(B), 2)) / (
        B * (B - 1)
    )
    close(batches.of(find_estimator("leave_one_out")), pairs, size=abs(pairs).max())


@settings(max_examples=30)
@given(strategies.problems(full_support=True, **SMALL))
def test_scores_average_to_zero_in_every_state(problem: Problem) -> None:
    """E[∇log π(a_t|k_t) | s_t, t] = 0, under the sampler with the weight of the rollout."""
    one = everything(problem, (1,))
    w = ratios.trajectory_weight(one.batch)[:, 0].numpy()
    for t in range(one.score.shape[1]):
        states = one.batch.state[:, 0, t].numpy()
        for s in set(states.tolist()) - {-1}:
            scores = one.score[one.rows[:, 0], t] * (states == s)[:, None]
            close(one.mean(w[:, None] * scores), np.zeros(scores.shape[1]))


@settings(max_examples=30)
@given(strategies.problems(**SMALL))
def test_the_dynamics_drop_out(problem: Problem) -> None:
    """∇ log P(τ) = Σ_t ∇log π(a_t|k_t), P with the start's and the environment's own probabilities; by autograd on P itself."""
    paths, z = problem.trajectories.paths, problem.logits.requires_grad_(True)
    pi = torch.softmax(z, -1)
    scores = oracle.scores(problem).sum(1)
    for n in range(len(paths)):
        chance = paths.start_probability[paths.start[n]] * paths.env_probability[n]
        for k, a in zip(paths.context[n].tolist(), paths.action[n].tolist(), strict=True):
            chance = chance * pi[k, a] if k >= 0 else chance
        (whole,) = torch.autograd.grad(chance, z, retain_graph=True, allow_unused=True)
        close(torch.zeros_like(z) if whole is None else whole / chance.item(), scores[n])


@settings(max_examples=30)
@given(st.data())
def test_a_baseline_changes_nothing_in_the_mean(data: st.DataObject) -> None:
    problem = data.draw(strategies.problems(**ON_POLICY))
    b = data.draw(strategies.baselines())
    one = everything(problem, (1,))
    plain, baselined = (
        one.of(from_coefficients(compose(a), couples="trajectory")) for a in (adv.discounted_to_go, adv.to_go_minus(b))
    )
    close(one.mean(baselined), one.mean(plain), size=abs(baselined).max())


@settings(max_examples=30)
@given(strategies.problems(off_policy=True, **SMALL))
def test_importance_weights_are_masses(problem: Problem) -> None:
    """E_old[w] is the mass of the rollouts that the sampler can draw: 1 with full support, less without."""
    one = everything(problem, (1,))
    table = problem.trajectories
    reached = sum(
        float(q * p)
        for q, p, b in zip(
            table.paths.start_probability[table.paths.start], table.probability, table.behavior_probability, strict=True
        )
        if b > 0
    )
    mean = float(one.mean(ratios.trajectory_weight(one.batch)[:, 0].numpy()))
    assert math.isclose(mean, reached, abs_tol=1e-12)
    assert (mean > 1 - 1e-12) == problem.full_support


@settings(max_examples=30)
@given(strategies.problems(off_policy=True, full_support=True, **SMALL))
def test_the_second_moment_of_the_weights_is_a_divergence(problem: Problem) -> None:
    """E_old[w²] = exp D₂(π‖old), D₂ = log Σ_τ p_π² / p_old, and by the chain rule, backward over the tree of rollouts."""
    one, env = everything(problem, (1,)), problem.env
    assert isinstance(env, TabularMDP)
    found = float(one.mean(ratios.trajectory_weight(one.batch)[:, 0].numpy() ** 2))
    pi = oracle.policy(problem)
    old = oracle.policy(Problem(env, problem.behavior_logits, contexts=problem.contexts))
    contexts = range(env.states) if problem.contexts is None else problem.contexts

    def below(s: int, left: int) -> float:
        if left == 0 or s in env.terminal:
            return 1.0
        onward = [sum(p * below(s2, left - 1) for s2, p in enumerate(row) if p) for row in env.transition[s].tolist()]
        if s in env.observation:
            return onward[0]
        k = contexts[s]
        return sum(p * p / q * x for p, q, x in zip(pi[k], old[k], onward, strict=True))

    expected = sum(q * below(s, env.horizon) for s, q in enumerate(env.initial.tolist()) if q)
    assert math.isclose(found, expected, rel_tol=1e-11)


# -- surrogates


def surrogate_gradient(problem: Problem, h: object, advantage: Tensor) -> Tensor:
    """∇ of E_old Σ_t h(π/π_old) Â_t at θ, by autograd on the sum over rollouts; θ_old and Â are fixed."""
    z = problem.logits.clone().requires_grad_(True)
    paths, table = problem.trajectories.paths, problem.trajectories
    logp = torch.log_softmax(z, -1)[paths.context.clamp(min=0), paths.action.clamp(min=0)]
    possible = table.behavior_probability > 0
    old = torch.where(paths.mask > 0, table.behavior_logp, 0.0)
    r = torch.where(paths.mask > 0, logp - old, 0.0)[possible].exp()
    chance = (table.behavior_probability * paths.start_probability[paths.start])[possible]
    total = (chance.unsqueeze(-1) * h(r) * (advantage * paths.mask)[possible]).sum()  # type: ignore[operator]
    return torch.autograd.grad(total, z)[0]


@settings(max_examples=30)
@given(strategies.problems(**SMALL))
def test_token_ratios_are_the_gradient_of_the_linear_surrogate(problem: Problem) -> None:
    """E_old Σ_t r_t γ^t Ĝ_t ∇log π_t = ∇ E_old Σ_t r_t γ^t Ĝ_t (Kakade & Langford 2002; TRPO)."""
    one = everything(problem, (1,))
    rows = problem.trajectories.rows_as_batch()
    expected = surrogate_gradient(problem, lambda r: r, rows.discount_weight * rows.reward_to_go)
    close(one.mean(one.of(find_estimator("token_is"))), expected, size=abs(expected).max())


@settings(max_examples=40)
@given(problem=strategies.problems(**SMALL), high=st.sampled_from([0.1, 0.2, 0.5]))
def test_a_clipped_weight_is_the_gradient_of_a_logarithm_above_the_cap(problem: Problem, high: float) -> None:
    """clip(r, 0, c) ∇log π = ∇ h_c(r) with h_c(r) = r up to c = 1 + ε, c (1 + log(r/c)) above."""
    c = 1 + high
    one = everything(problem, (1,))
    fn = compose(adv.discounted_to_go, ratio=ratios.clipped_ratio(low=None, high=high))
    rows = problem.trajectories.rows_as_batch()
    expected = surrogate_gradient(
        problem,
        lambda r: torch.where(r <= c, r, c * (1 + torch.log(r / c))),
        rows.discount_weight * rows.reward_to_go,
    )
    close(one.mean(one.of(from_coefficients(fn, couples="trajectory"))), expected, size=abs(expected).max())


# -- binary rewards: the weight that a standard deviation puts on a prompt


def weight(G: int, p: float) -> float:
    """w_G(p) = E √(q̂(1−q̂)) / (p(1−p)), q̂ ~ Bin(G, p)/G (Davis & Recht, arXiv 2510.13651)."""
    spread = math.fsum(
        math.comb(G, k) * p**k * (1 - p) ** (G - k) * math.sqrt(k / G * (1 - k / G)) for k in range(G + 1)
    )
    return spread / (p * (1 - p))


@pytest.mark.parametrize("G", range(2, 9))
@settings(max_examples=8)
@given(data=st.data())
def test_a_standard_deviation_weighs_prompts_by_their_difficulty(data: st.DataObject, G: int) -> None:
    """One prompt, 0/1 outcome, no ε: E[(R − mean)/std S] = w_G(p) ∇p."""
    problem = data.draw(
        strategies.problems(
            off_policy=False, reward="outcome", rewards=(0.0, 1.0), discounts=(1.0,), max_starts=1, observation=False,
            terminal=False, max_rollouts=4, max_horizon=2, max_states=2,
        )
    ).with_sampling(groups=1, group_size=G)  # fmt: skip
    standardised = from_coefficients(compose(adv.standardised_return("group", eps=0.0)), couples="group")
    (moments,) = exact_moments([standardised], problem)
    p = problem.value("enumeration")
    scale = weight(G, p) if 1e-9 < p < 1 - 1e-9 else 0.0
    close(moments.mean, scale * oracle.gradient(problem), size=scale)


def test_groups_of_two_and_three_have_no_difficulty_bias() -> None:
    for p in (0.01, 0.3, 0.5, 0.9):
        assert math.isclose(weight(2, p), 1.0, rel_tol=1e-12)
        assert math.isclose(weight(3, p), math.sqrt(2), rel_tol=1e-12)
    assert [round(weight(G, 0.01) / weight(G, 0.5), 3) for G in (4, 8, 16, 64)] == [1.069, 1.406, 1.930, 3.395]


# -- a counterexample, kept


@settings(max_examples=20)
@given(strategies.problems(discounts=(1.0,), **ON_POLICY))
def test_reward_to_go_needs_no_weight_at_gamma_one(problem: Problem) -> None:
    one = everything(problem, (1,))
    found = one.of(find_estimator("reward_to_go_undiscounted_weight"))
    close(one.mean(found), oracle.gradient(problem), size=abs(found).max())


def test_the_smallest_problem_on_which_it_does() -> None:
    """One state, two steps, γ = ½, arm 0 pays 1: each step's own share of ∇J in z_0 is ¼; without ½ the second counts twice."""
    env = TabularMDP([[[1.0], [1.0]]], [[1.0, 0.0]], [1.0], horizon=2, discount=0.5)
    one = everything(problem := Problem(env, [[0.0, 0.0]], group_size=1))
    close(oracle.gradient(problem), torch.tensor([[0.375, -0.375]]))
    close(one.mean(one.of(find_estimator("reward_to_go_undiscounted_weight"))), np.array([0.5, -0.5]))


def test_batches_are_seen_in_full() -> None:
    """The oracle's own size: 2 rollouts, 3 rows, 8 ordered batches."""
    problem = Problem(TabularMDP([[[1.0], [1.0]]], [[1.0, 0.0]], [1.0], horizon=1), [[0.0, 0.0]], group_size=3)
    batches = everything(problem)
    assert isinstance(batches.batch, Batch)
    assert len(batches.chance) == 8
    assert np.allclose(batches.chance, 1 / 8)
