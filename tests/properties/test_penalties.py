"""KL and entropy in the objective, on random problems: what each estimator of a penalty is the gradient of, if of anything.

p, p_ref: chances of a rollout under π and π_ref; d_t = log π/π_ref of a position, D = Σ_t d_t = log p/p_ref.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pgcheck import Problem, check_estimator, exact_moments, strategies
from pgcheck.batch import Batch
from pgcheck.errors import BiasError
from pgcheck.estimators import advantages as adv
from pgcheck.estimators import penalties
from pgcheck.estimators.base import find_estimator, from_coefficients
from pgcheck.estimators.from_loss import from_loss
from pgcheck.estimators.lookup import FILLED_BY  # noqa: F401  (fills the registries)
from pgcheck.estimators.penalties import k1, k2, k3
from pgcheck.estimators.zoo import compose
from pgcheck.registry import find_problem
from pgcheck.verdicts.quantities import asymmetry
from tests.properties import oracle
from tests.properties.oracle import close, everything

METHODS = ("dynamic_programming", "enumeration", "central_differences")
KL = {"off_policy": False, "max_rollouts": 8, "max_rows": 1, "shared_contexts": None, "kl": True}
ENTROPY = {"off_policy": False, "max_rollouts": 8, "max_rows": 1, "shared_contexts": None, "entropy": True}
ESTIMATES = {"k1": k1, "k2": k2, "k3": k3}


def nothing(batch: Batch) -> Tensor:
    return torch.zeros_like(batch.reward)


def expected(coefficients: Callable[[Batch], Tensor], problem: Problem) -> Tensor:
    """E ĝ over every rollout."""
    batches = everything(problem, (1,))
    estimates = batches.of(from_coefficients(coefficients, couples="trajectory"))
    return torch.from_numpy(batches.mean(estimates))


def pull(problem: Problem, penalty: penalties.Penalty) -> Tensor:
    """E of what a penalty alone adds to ĝ."""
    return expected(compose(nothing, penalty=penalty), problem)


def plain(problem: Problem) -> Problem:
    return replace(problem, kl_coefficient=0.0, entropy_coefficient=0.0)


def chances(problem: Problem, z: Tensor) -> Tensor:
    """p of each rollout, its start included, `[N]`."""
    paths = problem.trajectories.paths
    logp = torch.log_softmax(z, -1)[paths.context.clamp(min=0), paths.action.clamp(min=0)]
    p = paths.env_probability * paths.start_probability[paths.start]
    return p * torch.where(paths.mask > 0, logp, 0.0).sum(-1).exp()


def slope(problem: Problem, f: Callable[[Tensor], Tensor]) -> Tensor:
    z = problem.logits.requires_grad_(True)
    return torch.autograd.grad(f(z), z)[0]


def reverse_kl(problem: Problem) -> Tensor:
    """∇KL(p‖p_ref)."""
    q = chances(problem, problem.ref_logits)
    live = q > 0
    return slope(problem, lambda z: (chances(problem, z) * (chances(problem, z) / q).log())[live].sum())


def forward_kl(problem: Problem) -> Tensor:
    """∇KL(p_ref‖p)."""
    q = chances(problem, problem.ref_logits)
    live = q > 0
    return slope(problem, lambda z: (q * (q / chances(problem, z)).log())[live].sum())


def where_it_stands(problem: Problem, f: Callable[[Tensor, Tensor], Tensor], *, weight: bool = False) -> Tensor:
    """Σ_t E[∇f(π(·|k_t), π_ref(·|k_t))], the contexts drawn by a π that is held; `weight`: γ^t in front."""
    table = problem.trajectories
    paths, batch = table.paths, table.rows_as_batch()
    chance = chances(problem, problem.logits).unsqueeze(-1) * paths.mask
    chance = chance * batch.discount_weight if weight else chance
    visits = torch.zeros(len(problem.logits), dtype=torch.float64)
    visits.index_add_(0, paths.context.clamp(min=0).flatten(), chance.flatten())
    ref = torch.softmax(problem.logits if problem.ref_logits is None else problem.ref_logits, -1)
    return slope(problem, lambda z: (visits * f(torch.softmax(z, -1), ref)).sum())


def backward(pi: Tensor, ref: Tensor) -> Tensor:
    return (pi * (pi / ref).log()).sum(-1)


def forward(pi: Tensor, ref: Tensor) -> Tensor:
    return (ref * (ref / pi).log()).sum(-1)


def entropy(pi: Tensor, ref: Tensor) -> Tensor:
    return -(pi * pi.log()).sum(-1)


# -- the objective


@given(strategies.problems(kl=None, entropy=None, reference=None, shared_contexts=None, max_rows=1))
def test_the_derivations_agree(problem: Problem) -> None:
    """With either term, both or none: value and gradient by every method, against a complex recursion on the environment."""
    tables = [[[complex(x) for x in row] for row in problem.logits.tolist()]] * problem.env.horizon  # type: ignore[union-attr]
    value, gradient = oracle.value(problem, tables).real, oracle.gradient(problem)
    for method in METHODS:
        close(torch.tensor(problem.value(method)), torch.tensor(value), atol=1e-12)
    for method, atol in zip((None, *METHODS), (1e-11, 1e-11, 1e-11, 1e-8), strict=True):
        close(problem.gradient(method), gradient, atol=atol)
    close(problem.gradient_by_step(), oracle.gradient_by_step(problem))


@given(strategies.problems(discounts=(1.0,), kl=True, entropy=None, shared_contexts=None, max_rows=1))
def test_it_is_the_kl_of_rollouts(problem: Problem) -> None:
    """γ = 1: J less β Σ_τ p log(p/p_ref) plus α Σ_τ p (−Σ_t log π), by the chances of whole rollouts."""
    p, q = (chances(problem, z) for z in (problem.logits, problem.ref_logits))
    live = p > 0
    kl = float((p * (p / q).log())[live].sum())
    H = -float((p * problem.trajectories.logp.sum(-1)).sum())
    beta, alpha = problem.kl_coefficient, problem.entropy_coefficient
    assert problem.value() == pytest.approx(plain(problem).value() - beta * kl + alpha * H, abs=1e-12)
    assert kl >= -1e-15


@given(strategies.problems(kl=True, max_rows=1))
def test_without_coefficients_nothing_is_left(problem: Problem) -> None:
    """β = α = 0 is the problem as if it had never had them, bytes and all."""
    bare = replace(plain(problem))
    assert (bare.plain_objective, problem.plain_objective) == (True, False)
    assert bare.digest != problem.digest
    close(bare.gradient(), oracle.gradient(bare))


# -- the KL


@pytest.mark.parametrize("name", ["kl_in_reward(k1)", "entropy_in_reward"])
@settings(max_examples=25)
@given(data=st.data())
def test_in_the_reward_any_advantage_will_do(data: st.DataObject, name: str) -> None:
    """Leave-one-out over the group, and γ^t reward-to-go with a baseline, of r_t − β d_t (or r_t − α log π_t)."""
    kind = {"kl": True} if name.startswith("kl") else {"entropy": True}
    rows = {"min_group_size": 2, "max_rows": 3, "max_rollouts": 6, "max_batches": 150, "off_policy": False}
    problem = data.draw(strategies.problems(**rows, **kind))
    cost = penalties.kl_cost(k1) if name.startswith("kl") else penalties.entropy_cost
    baselines = adv.return_minus(adv.mean_of_others("group")), adv.to_go_minus(data.draw(strategies.baselines()))
    for baselined, couples in zip(baselines, ("group", "trajectory"), strict=True):
        e = from_coefficients(compose(penalties.in_reward(baselined, cost)), couples=couples)
        (moments,) = exact_moments([e], problem)
        close(moments.mean, oracle.gradient(problem), size=math.sqrt(moments.second_moment))


@settings(max_examples=30)
@given(strategies.problems(**KL))
def test_k1_as_a_loss_does_nothing(problem: Problem) -> None:
    for penalty in (penalties.token_loss(k1), penalties.sequence_loss(k1)):
        close(pull(problem, penalty), torch.zeros_like(problem.logits), atol=1e-13)


@settings(max_examples=30)
@given(strategies.problems(**KL))
def test_k2_of_the_row_descends_the_reverse_kl(problem: Problem) -> None:
    """E[D S] = ∇KL(p‖p_ref), whatever γ is."""
    close(pull(problem, penalties.sequence_loss(k2)), -problem.kl_coefficient * reverse_kl(problem))


@settings(max_examples=30)
@given(strategies.problems(**KL))
def test_k3_of_the_row_descends_the_forward_kl(problem: Problem) -> None:
    """E[(1 − p_ref/p) S] = −E_ref[S] = ∇KL(p_ref‖p): softmax policies have the support, and E S = 0."""
    close(pull(problem, penalties.sequence_loss(k3)), -problem.kl_coefficient * forward_kl(problem))


@pytest.mark.parametrize(("estimate", "divergence"), [(k2, backward), (k3, forward)], ids=["k2", "k3"])
@settings(max_examples=30)
@given(problem=strategies.problems(**KL))
def test_of_tokens_a_divergence_where_it_stands(
    problem: Problem, estimate: penalties.Estimate, divergence: Callable[[Tensor, Tensor], Tensor]
) -> None:
    """Σ_t E ∇KL of π(·|k_t), one way or the other, the visits held: half of a gradient."""
    pulled = pull(problem, penalties.token_loss(estimate))
    close(pulled, -problem.kl_coefficient * where_it_stands(problem, divergence))


@settings(max_examples=30)
@given(strategies.problems(**KL))
def test_k3_in_the_reward_misses_the_forward_kl_where_it_stands(problem: Problem) -> None:
    """E[k3 S] = ∇E k3 − E ∇k3: the bias is β Σ_t γ^t E ∇k3_t."""
    found = expected(find_estimator("kl_in_reward(k3)").coefficients, problem)
    bias = problem.kl_coefficient * where_it_stands(problem, forward, weight=True)
    close(found.reshape_as(bias), oracle.gradient(problem) + bias)


@pytest.mark.parametrize("name", ["notes/with-reference", "kl/dialogue", "notes/with-reference@1"])
def test_only_tokens_are_the_gradient_of_nothing(name: str) -> None:
    """‖D − Dᵀ‖/‖D + Dᵀ‖ of the field's Jacobian."""
    problem = find_problem(name)
    for estimator in ("kl_loss(k3, token)", "kl_loss(k2, token)"):
        assert asymmetry(estimator=find_estimator(estimator), problem=problem) > 1e-3  # type: ignore[operator]
    for estimator in ("kl_loss(k3, sequence)", "kl_loss(k2, sequence)", "kl_in_reward(k1)"):  # whatever γ is
        assert asymmetry(estimator=find_estimator(estimator), problem=problem) < 1e-9  # type: ignore[operator]


def test_two_arms_by_hand() -> None:
    """π = p, π_ref = q of the first arm: ∂KL(π‖ref)/∂z = p(1−p)(logit p − logit q), ∂KL(ref‖π)/∂z = p − q."""
    p, q, beta = 0.9, 0.25, 0.5
    problem = replace(find_problem("bandit/two-arm"), ref_logits=[[math.log(q / (1 - q)), 0.0]], kl_coefficient=beta)
    kl = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    assert problem.value() == pytest.approx(p - beta * kl, abs=1e-15)
    both = np.array([1.0, -1.0])
    log_odds = math.log(p / (1 - p)) - math.log(q / (1 - q))
    close(problem.gradient(), p * (1 - p) * (1 - beta * log_odds) * both, atol=1e-15)
    for penalty in (penalties.token_loss(k2), penalties.sequence_loss(k2)):
        close(pull(problem, penalty), -beta * p * (1 - p) * log_odds * both, atol=1e-15)
    for penalty in (penalties.token_loss(k3), penalties.sequence_loss(k3)):
        close(pull(problem, penalty), -beta * (p - q) * both, atol=1e-15)


# -- the entropy


@settings(max_examples=30)
@given(strategies.problems(**ENTROPY))
def test_a_bonus_for_each_token_where_it_stands(problem: Problem) -> None:
    """E ĝ = ∇J + α Σ_t E ∇H(π(·|k_t)), the visits held, and no γ^t."""
    batches = everything(problem, (1,))
    found = batches.mean(batches.of(find_estimator("entropy_bonus(token)")))
    close(found, oracle.gradient(plain(problem)) + problem.entropy_coefficient * where_it_stands(problem, entropy))


def test_the_bonus_in_the_opposite_direction() -> None:
    """π(go on) = p = .6, then a fair coin. H = h(p) + p log 2, dH/dz = p(1−p)(log 2 − log p/(1−p)) > 0; the bonus of each
    token gives −p(1−p) log p/(1−p) < 0 there, and 0 at the coin."""
    p = 0.6
    problem = find_problem("entropy/fork")
    right, wrong = math.log(2) - math.log(p / (1 - p)), -math.log(p / (1 - p))
    assert problem.value() == pytest.approx(-p * math.log(p) - (1 - p) * math.log(1 - p) + p * math.log(2), abs=1e-15)
    at = np.array([[-1.0, 1.0], [0.0, 0.0], [0.0, 0.0]])
    close(problem.gradient(), p * (1 - p) * right * at, atol=1e-15)
    (moments,) = exact_moments([find_estimator("entropy_bonus(token)")], problem)
    close(moments.mean, p * (1 - p) * wrong * at, atol=1e-15)
    assert right > 0 > wrong


# -- as a stranger writes it


def rloo_with(k: str, *, token: bool) -> Callable[[Batch], Tensor]:
    """RLOO, with the KL as a loss; d is differentiated."""

    def loss(batch: Batch) -> Tensor:
        d = (batch.logp - batch.ref_logp) * batch.mask
        d = d if token else d.sum(-1, keepdim=True)
        kl = {"k1": d, "k2": d**2 / 2, "k3": torch.exp(-d) - 1 + d}[k]
        kl = (kl * batch.mask).sum(-1) if token else kl[:, 0]
        r = batch.episode_return
        n = batch.same_group.sum(-1)
        others = ((batch.same_group * r).sum(-1) - r) / (n - 1)
        policy = ((r - others)[:, None] * batch.logp * batch.mask).sum(-1)
        return (batch.kl_coefficient * kl - policy).mean()

    return loss


@pytest.mark.parametrize("token", [True, False])
@pytest.mark.parametrize("k", ESTIMATES)
def test_coefficients_are_the_derivative_of_the_loss(k: str, token: bool) -> None:
    """By autograd through the loss as it is written; batch by batch."""
    problem = find_problem("kl/dialogue")
    scheme = (penalties.token_loss if token else penalties.sequence_loss)(ESTIMATES[k])
    ours = compose(adv.return_minus(adv.mean_of_others("group")), penalty=scheme)
    batches = everything(problem)
    written = from_loss(rloo_with(k, token=token)).coefficients(batches.batch)
    assert bool((batches.batch.ref_logp != batches.batch.logp).any())
    torch.testing.assert_close(ours(batches.batch), written, rtol=1e-12, atol=1e-14)


def test_a_loss_with_a_kl_is_judged_by_the_objective_of_the_problem() -> None:
    """k2 of the row passes where γ = 1; of tokens, it fails on the tree; without a penalty, everywhere."""
    undiscounted = ["kl/contextual", "notes/with-reference", "kl/tree"]
    assert check_estimator(rloo_with("k2", token=False), undiscounted).exit_code == 0
    with pytest.raises(BiasError, match="kl/tree"):
        check_estimator(rloo_with("k2", token=True), ["kl/contextual", "kl/tree"])
    with pytest.raises(BiasError, match="3 of 3 problems"):
        check_estimator(rloo_with("k1", token=True), undiscounted)


def test_a_random_search_keeps_the_objective() -> None:
    with pytest.raises(BiasError, match=r"random problems on which it fails(.|\n)*kl_coefficient="):
        check_estimator(rloo_with("k2", token=True), "kl/tree", search=True)
