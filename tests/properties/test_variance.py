"""Where the variance of an estimate comes from: baselines, the environment, the actions."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pgcheck import Problem, strategies
from pgcheck.engines.exact import exact_moments
from pgcheck.estimators import advantages as adv
from pgcheck.estimators.base import find_estimator, from_coefficients
from pgcheck.estimators.lookup import FILLED_BY  # noqa: F401  (fills the registries)
from pgcheck.estimators.zoo import compose
from pgcheck.side import OptimalBaselines
from tests.properties.oracle import Everything, Floats, close, everything

ON_POLICY = {"max_rollouts": 8, "off_policy": False, "grouping": "rows", "max_rows": 1}


@settings(max_examples=30)
@given(problem=strategies.problems(**ON_POLICY), b=st.sampled_from(strategies.REWARDS))
def test_the_price_of_another_constant(problem: Problem, b: float) -> None:
    """Var(b) = Var(b*) + E‖S‖² (b − b*)² over single rollouts, b* = E[‖S‖² R] / E[‖S‖²]."""
    one = everything(problem)
    R = one.batch.episode_return[:, 0].numpy()
    S = one.score.sum(1)[one.rows[:, 0]]
    norm = (S**2).sum(1)
    best = float(one.mean(norm * R) / one.mean(norm))
    estimators = [
        from_coefficients(compose(adv.return_minus(lambda batch, x=x: adv.constant(x)(batch)[..., 0])),
                          couples="trajectory", name=str(x)) for x in (b, best)
    ]  # fmt: skip
    found, least = (m.total_variance for m in exact_moments(estimators, problem))
    size = max(1.0, found)
    assert math.isclose(found, least + float(one.mean(norm)) * (b - best) ** 2, abs_tol=1e-11 * size)
    assert math.isclose(found, one.variance((R - b)[:, None] * S), abs_tol=1e-11 * size)
    (shipped,) = exact_moments([find_estimator("baselined(optimal_constant)")], problem)
    assert math.isclose(shipped.total_variance, least, abs_tol=1e-11 * size)


@settings(max_examples=30)
@given(st.data())
def test_no_state_baseline_has_less_variance_than_the_joint_optimum(data: st.DataObject) -> None:
    """Of all b(s, t) together, over independent rollouts; E ĝ is the same for all."""
    problem = data.draw(strategies.problems(**ON_POLICY))
    b = data.draw(strategies.baselines())
    one = everything(problem, needs=(OptimalBaselines(),))
    other = one.of(from_coefficients(compose(adv.to_go_minus(b)), couples="trajectory"))
    best = one.of(find_estimator("baselined(optimal_state_joint)"))
    assert one.variance(best) <= one.variance(other) + 1e-11 * max(1.0, one.variance(other))
    close(one.mean(best), one.mean(other), size=abs(other).max())


# -- Σ_τ + Σ_a + Σ_s (Tucker et al., arXiv 1802.10031)


@dataclass(frozen=True)
class Split:
    """tr Var of one step's term (Ĝ_t − b(s_t)) ∇log π(a_t | k_t), given that there is a step t."""

    tau: float  # E tr Var(term | s_t, a_t): what comes after the action
    action: float  # E tr Var(E[term | s_t, a_t] | s_t)
    state: float  # tr Var(E[term | s_t])


def split(one: Everything, term: Floats, t: int) -> Split:
    """By conditional means over rollouts grouped by (s_t, a_t), and by s_t; `term` `[M, K·A]`."""
    state, action = one.batch.state[:, 0, t].numpy(), one.batch.action[:, 0, t].numpy()
    here = np.flatnonzero(state >= 0)
    chance = one.chance[here] / one.chance[here].sum()

    def given(keys: list[tuple[int, ...]]) -> Floats:
        """E[term | key] of each rollout."""
        mass: dict[tuple[int, ...], float] = defaultdict(float)
        total: dict[tuple[int, ...], Floats] = defaultdict(lambda: np.zeros(term.shape[1]))
        for m, key, p in zip(here, keys, chance, strict=True):
            mass[key] += p
            total[key] = total[key] + p * term[m]
        return np.array([total[key] / mass[key] if mass[key] else total[key] for key in keys])

    by_pair = given(list(zip(state[here].tolist(), action[here].tolist(), strict=True)))
    by_state = given([(s,) for s in state[here].tolist()])
    mean = chance @ term[here]

    def spread(x: Floats, around: Floats) -> float:
        return float(chance @ ((x - around) ** 2).sum(1))

    return Split(spread(term[here], by_pair), spread(by_pair, by_state), spread(by_state, mean))


@settings(max_examples=30)
@given(st.data())
def test_variance_is_that_of_what_follows_plus_the_action_plus_the_state(data: st.DataObject) -> None:
    """Σ_τ + Σ_a + Σ_s is the variance of each step's term; a baseline in (s, t) moves only Σ_a.

    By E[b ∇log π | s] = 0 it moves it by E[(b² − 2 b Ĝ) ‖∇log π‖²].
    """
    problem = data.draw(strategies.problems(**ON_POLICY))
    b = data.draw(strategies.baselines())
    one = everything(problem)
    to_go = one.batch.reward_to_go[:, 0].numpy()
    baseline = b(one.batch)[:, 0].numpy()
    for t in range(to_go.shape[1]):
        here = one.batch.state[:, 0, t].numpy() >= 0
        if one.chance[here].sum() < 1e-12:
            continue
        score = one.score[one.rows[:, 0], t]
        plain, moved = to_go[:, t : t + 1] * score, (to_go - baseline)[:, t : t + 1] * score
        p = one.chance[here] / one.chance[here].sum()
        parts, parts_moved = split(one, plain, t), split(one, moved, t)
        for x, s in ((plain, parts), (moved, parts_moved)):
            whole = float(p @ ((x[here] - p @ x[here]) ** 2).sum(1))
            assert math.isclose(s.tau + s.action + s.state, whole, abs_tol=1e-11 * max(1.0, whole))
        size = max(1.0, parts.tau + parts.action + parts_moved.action)
        assert math.isclose(parts.tau, parts_moved.tau, abs_tol=1e-11 * size)
        assert math.isclose(parts.state, parts_moved.state, abs_tol=1e-11 * size)
        norm = (score[here] ** 2).sum(1)
        shift = float(p @ (norm * (baseline[here, t] ** 2 - 2 * baseline[here, t] * to_go[here, t])))
        assert math.isclose(parts_moved.action - parts.action, shift, abs_tol=1e-11 * size)


@settings(max_examples=25)
@given(strategies.problems(max_rollouts=8, max_batches=200, max_rows=3, min_rows=2, min_group_size=2, off_policy=False))
def test_the_covariance_of_the_engine_is_that_over_every_batch(problem: Problem) -> None:
    for name in ("reinforce", "leave_one_out", "grpo"):
        e = find_estimator(name)
        (moments,) = exact_moments([e], problem)
        batches = everything(problem)
        estimates = batches.of(e)
        variance = batches.variance(estimates)
        assert math.isclose(moments.total_variance, variance, abs_tol=1e-11 * max(1.0, variance))
