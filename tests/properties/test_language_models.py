"""What holds on tables holds on transformers: claims in logits, gradients in parameters."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pgcheck import strategies, truth
from pgcheck.engines.exact import exact_moments
from pgcheck.estimators.base import Claim, Estimator, entropy_bonus, find_estimator, kl_penalty
from pgcheck.problem import Problem
from tests.properties import oracle
from tests.properties.test_claims import CLAIMS

KEYWORDS = ("off_policy", "full_support", "min_group_size", "min_rows", "max_rows")
TINY = {"max_completions": 8, "max_batches": 60}
# Random language models have no KL or entropy term in their objective
PLAIN = [(e, claim) for e, claim in CLAIMS if not {kl_penalty, entropy_bonus} & {*claim.conditions}]


def gradient(problem: Problem) -> Tensor:
    """∇J by the complex step of Σ_τ p(τ) R(τ), rollout by rollout."""
    paths, z = problem.trajectories.paths, problem.logits.tolist()
    rows = list(zip(paths.start.tolist(), paths.context.tolist(), paths.action.tolist(), strict=True))
    q, R = paths.start_probability.tolist(), paths.reward.sum(-1).tolist()

    def value(logits: list[list[complex]]) -> complex:
        pi = [oracle.softmax(row) for row in logits]
        total = 0j
        for (s, contexts, actions), r in zip(rows, R, strict=True):
            chance = [pi[k][a] for k, a in zip(contexts, actions, strict=True) if k >= 0]
            total += q[s] * math.prod(chance) * r
        return total

    out = torch.zeros_like(problem.logits)
    for k in range(out.shape[0]):
        for a in range(out.shape[1]):
            moved = [list(map(complex, row)) for row in z]
            moved[k][a] += 1j * oracle.STEP
            out[k, a] = value(moved).imag / oracle.STEP
    return out


@pytest.mark.parametrize(("estimator", "claim"), PLAIN, ids=[f"{e.name}-{c.kind}" for e, c in PLAIN])
@settings(max_examples=4)
@given(data=st.data())
def test_a_claim_holds_on_random_transformers(data: st.DataObject, estimator: Estimator, claim: Claim) -> None:
    """E ĝ over every ordered batch is κ ∇J; the engine, with its multisets and class counts, says the same."""
    asked = strategies.bounds_for(estimator, claim)
    plan = {key: asked[key] for key in KEYWORDS if key in asked} | {"max_rows": max(3, estimator.min_group_size)}
    binary = {"rewards": (0.0, 1.0), "max_prompts": 1} if "rewards" in asked else {}
    even = {"eos": False} if asked.get("terminal") is False else {}
    problem = data.draw(strategies.lm_problems(**TINY, **plan, **binary, **even))
    assume(claim.applies(problem))
    (moments,) = exact_moments([estimator], problem)
    truth_, scale = gradient(problem), claim.scale_on(problem)
    batches = oracle.everything(problem, (1,) if estimator.couples == "trajectory" else problem.sizes, estimator.needs)
    estimates = batches.of(estimator)
    mean, size = batches.mean(estimates), float(abs(estimates).max())
    oracle.close(moments.mean, mean, size=size)
    if scale is None:  # some κ > 0: along ∇J, and not against it
        g = truth_.reshape(-1).numpy()
        scale = float(mean @ g) / float(g @ g) if float(g @ g) > 1e-20 else 0.0
        assert scale >= 0
    oracle.close(mean, scale * truth_, size=size)


@pytest.mark.parametrize(
    ("name", "factor"),
    [("leave_one_out", lambda B: 1.0), ("token_is", lambda B: 1.0), ("batch_mean", lambda B: 1 - 1 / B)],
)
@settings(max_examples=15)
@given(data=st.data())
def test_the_best_known_factors_in_parameters(data: st.DataObject, name: str, factor: object) -> None:
    """RLOO is unbiased, a token's ratio does nothing on-policy, the batch mean costs (B − 1)/B: of ∇_θ J."""
    problem = data.draw(strategies.lm_problems(off_policy=False, min_group_size=2, max_completions=10, max_batches=400))
    (moments,) = exact_moments([find_estimator(name)], problem)
    truth_ = problem.in_parameters(gradient(problem))
    oracle.close(moments.mean_in_parameters(), factor(problem.rows) * truth_, size=float(truth_.abs().max()))  # type: ignore[operator]


@settings(max_examples=10)
@given(problem=strategies.lm_problems(), seed=st.integers(0, 99))
def test_the_gradient_in_parameters_along_random_directions(problem: Problem, seed: int) -> None:
    """Central differences of fourth order of J(θ + h v), the policy computed anew at each."""
    theta = nn.utils.parameters_to_vector(problem.policy.parameters()).detach()
    v = torch.randn(theta.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    v /= v.norm()
    paths, found = problem.trajectories.paths, float(problem.parameter_gradient() @ v)

    def at(h: float) -> float:
        nn.utils.vector_to_parameters(theta + h * v, problem.policy.parameters())
        return float(truth.value_by_enumeration(paths, problem.policy().detach()))

    h = 1e-3
    size = max(1.0, float(paths.reward.abs().max()))
    slope = (8 * (at(h) - at(-h)) - (at(2 * h) - at(-2 * h))) / (12 * h)
    assert abs(slope - found) <= 1e-7 * size * max(1.0, abs(found))
