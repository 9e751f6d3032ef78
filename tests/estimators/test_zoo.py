"""The zoo, row by row against its formula in plain loops; then identities and numbers in closed form."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from pgcheck.batch import DISCOUNT_CLOCKS, Batch, DiscountClock
from pgcheck.engines.exact import exact_moments
from pgcheck.engines.moments import Moments
from pgcheck.envs.tabular import TabularMDP
from pgcheck.estimators import advantages as adv
from pgcheck.estimators import aggregation as agg
from pgcheck.estimators import ratios
from pgcheck.estimators.base import Estimator, find_estimator, from_coefficients, registered_estimators
from pgcheck.estimators.lookup import FILLED_BY  # noqa: F401  (fills the registries)
from pgcheck.estimators.zoo import compose
from pgcheck.estimators.zoo.groups import difficulty
from pgcheck.problem import Problem
from pgcheck.registry import find_problem, registered_problems
from pgcheck.side import WrongValues
from tests.engines.oracle import bandit, dialogue, walk

# -- the formulas, in loops over rows and steps of one batch


@dataclass(frozen=True)
class Rows:
    """One batch as lists, with the letters of the papers."""

    state: list[list[int]]
    r: list[list[float]]
    mask: list[list[float]]
    logp: list[list[float]]
    old: list[list[float]]
    ref: list[list[float]]
    V: list[list[float]]
    group: list[int]
    gamma: float
    clock: DiscountClock
    action: list[list[int]]
    beta: float
    alpha: float
    side: dict[str, list]  # type: ignore[type-arg]
    logits: list[list[list[float]]]

    @property
    def B(self) -> int:  # noqa: N802
        return len(self.r)

    @property
    def T(self) -> int:  # noqa: N802
        return len(self.r[0])

    def exponent(self, i: int, t: int) -> float:
        """Of γ: t, or the number of actions up to and including t, less one."""
        return t if self.clock == "position" else max(sum(self.mask[i][: t + 1]) - 1, 0)

    def weight(self, i: int, t: int) -> float:
        """γ^t."""
        return self.gamma ** self.exponent(i, t)

    def R(self, i: int) -> float:  # noqa: N802
        """Σ_k γ^k r_k."""
        return math.fsum(self.weight(i, k) * self.r[i][k] for k in range(self.T))

    def to_go(self, i: int, t: int) -> float:
        """Ĝ_t = Σ_{k≥t} γ^{k−t} r_k."""
        return math.fsum(
            self.gamma ** (self.exponent(i, k) - self.exponent(i, t)) * self.r[i][k] for k in range(t, self.T)
        )

    def ratio(self, i: int, t: int) -> float:
        """r_t = π/π_old."""
        return math.exp(self.logp[i][t] - self.old[i][t]) if self.mask[i][t] else 1.0

    def d(self, i: int, t: int) -> float:
        """log π/π_ref."""
        return self.logp[i][t] - self.ref[i][t] if self.mask[i][t] else 0.0

    def D(self, i: int) -> float:  # noqa: N802
        """Of the row."""
        return math.fsum(self.d(i, t) for t in range(self.T))

    def shaped(self, i: int, cost: Callable[[int], float]) -> float:
        """Σ_t γ^t (r_t − cost_t), what an action costs."""
        return self.R(i) - math.fsum(self.weight(i, t) * cost(t) for t in self.acts(i))

    def w(self, i: int, t: int) -> float:
        """w_{0:t} = Π_{k≤t} r_k."""
        return math.prod(self.ratio(i, k) for k in range(t + 1))

    def peers(self, i: int) -> list[int]:
        return [j for j in range(self.B) if self.group[j] == self.group[i]]

    def length(self, i: int) -> float:
        """|o_i|."""
        return sum(self.mask[i])

    def acts(self, i: int) -> list[int]:
        """t_0 < t_1 < …, where the policy acts."""
        return [t for t in range(self.T) if self.mask[i][t]]

    @property
    def tokens(self) -> float:
        """Σ_i |o_i|."""
        return sum(self.length(i) for i in range(self.B))


def mean(xs: Sequence[float]) -> float:
    return math.fsum(xs) / len(xs)


def std(xs: Sequence[float]) -> float:
    """Population standard deviation."""
    return math.sqrt(mean([(x - mean(xs)) ** 2 for x in xs]))


def clipped_surrogate_slope(r: float, A: float, low: float = 0.2, high: float = 0.2) -> float:
    """∂ min(r A, clip(r, 1 − low, 1 + high) A) / ∂ log r = r A where the unclipped side is the smaller, else 0."""
    clip = min(max(r, 1 - low), 1 + high)
    return r * A if r * A <= clip * A else 0.0


def standardised(b: Rows, i: int) -> float:
    """(R_i − mean)/(std + 1e-6) over the group; 0 where it is unanimous."""
    R = [b.R(j) for j in b.peers(i)]
    return (b.R(i) - mean(R)) / (std(R) + 1e-6) if std(R) > 0 else 0.0


def whitened(b: Rows, A: Callable[[int, int], float], i: int, t: int) -> float:
    """(A − mean)/√(var + 1e-8), mean and variance over all policy positions of the batch."""
    values = [A(j, k) for j in range(b.B) for k in range(b.T) if b.mask[j][k]]
    return (A(i, t) - mean(values)) / math.sqrt(std(values) ** 2 + 1e-8)


def same_state(b: Rows, i: int, t: int, *, own: bool) -> list[float]:
    """Ĝ of every policy position of the group in the state of (i, t); without `own`, of the other rows only."""
    return [
        b.to_go(j, k)
        for j in b.peers(i)
        for k in range(b.T)
        if b.mask[j][k] and b.state[j][k] == b.state[i][t] and (own or j != i)
    ]


def gigpo_step(b: Rows, i: int, t: int, *, own: bool, alone: str, by_std: bool = False) -> float:
    """γ^t (Ĝ_t − mean over equal states)[/(std + 1e-6)]; nobody else there: γ^t Ĝ_t or 0."""
    if not same_state(b, i, t, own=False):
        return b.weight(i, t) * b.to_go(i, t) if alone == "no baseline" else 0.0
    anchors = same_state(b, i, t, own=own)
    return b.weight(i, t) * (b.to_go(i, t) - mean(anchors)) / (std(anchors) + 1e-6 if by_std else 1.0)


def alive_mean(b: Rows, t: int) -> float:
    alive = [j for j in range(b.B) if any(b.mask[j][t:])]
    return mean([b.to_go(j, t) for j in alive])


def others_mean(b: Rows, i: int, rows: Sequence[int]) -> float:
    others = [b.R(j) for j in rows if j != i]
    return mean(others) if others else 0.0


def vineppo(b: Rows, i: int, t: int) -> float:
    """γ^t (Σ_{t≤k<t'} γ^{k−t} r_k + γ^{t'−t} V̂(s_t') − V̂(s_t)), t' the next position where the policy acts."""
    V = b.side["continuation_value"]
    following = next((k for k in range(t + 1, b.T) if b.mask[i][k]), b.T)
    out = math.fsum(b.weight(i, k) * b.r[i][k] for k in range(t, following)) - b.weight(i, t) * V[i][t]
    return out + (b.weight(i, following) * V[i][following] if following < b.T else 0.0)


def q_next(b: Rows, i: int, t: int) -> float:
    after = [k for k in range(t + 1, b.T) if b.mask[i][k]]
    return float(b.side["action_value"][i][after[0]]) if after else 0.0


def opo(b: Rows, i: int, rows: Sequence[int]) -> float:
    """R_i − Σ |o_j| R_j / Σ |o_j|."""
    return b.R(i) - math.fsum(b.length(j) * b.R(j) for j in rows) / math.fsum(b.length(j) for j in rows)


def others(b: Rows, i: int) -> list[int]:
    return [j for j in b.peers(i) if j != i]


def standardised_by_others(b: Rows, i: int) -> float:
    R = [b.R(j) for j in others(b, i)]
    return (b.R(i) - mean(R)) / (std(R) + 0.1)


def delta(b: Rows, V: list[list[float]], i: int, j: int) -> float:
    """γ^{t_j} δ_j of the j-th decision: what is paid up to the next one, which may be at or after an observation."""
    acts = [*b.acts(i), b.T]
    here, following = acts[j], acts[j + 1]
    paid = math.fsum(b.weight(i, k) * b.r[i][k] for k in range(here, following))
    later = b.weight(i, following) * V[i][following] if following < b.T else 0.0
    return paid + later - b.weight(i, here) * V[i][here]


def gae(b: Rows, V: list[list[float]], i: int, t: int, decay: float) -> float:
    """Σ_{j≥n} λ^{j−n} γ^{t_j} δ_j, t the n-th decision of row i; no recursion."""
    acts = b.acts(i)
    n = acts.index(t)
    return math.fsum(decay ** (j - n) * delta(b, V, i, j) for j in range(n, len(acts)))


def best_of_sets(b: Rows, i: int, *, minus_one: bool) -> float:
    """k · mean over the other member of each pair: max(R_i, R_j), or what row i adds to R_j; k = 2."""
    scores = [max(b.R(i), b.R(j)) - (b.R(j) if minus_one else 0.0) for j in others(b, i)]
    return 2 * mean(scores)


def over_successes(b: Rows, i: int, *, centered: bool) -> float:
    """r_i/r̄, or (r_i − r̄)/r̄, r = 1[R > ½]."""
    r = {j: float(b.R(j) > 0.5) for j in b.peers(i)}
    rate = mean(list(r.values()))
    return 0.0 if rate == 0 else (r[i] - rate if centered else r[i]) / rate


def winner(b: Rows, i: int) -> float:
    best = max(b.R(j) for j in b.peers(i))
    winners = [j for j in b.peers(i) if b.R(j) == best]
    return len(b.peers(i)) / len(winners) if i in winners else 0.0


def all_action(b: Rows, i: int, t: int) -> list[float]:
    """γ^t ∂/∂z_a Σ_c π_c Q_c = γ^t Σ_c Q_c π_c (1[a = c] − π_a)."""
    z, Q = b.logits[i][t], b.side["all_action_values"][i][t]
    pi = [math.exp(x) / math.fsum(math.exp(y) for y in z) for x in z]
    A = range(len(z))
    return [b.weight(i, t) * math.fsum(Q[c] * pi[c] * ((a == c) - pi[a]) for c in A) / b.B for a in A]


def bonus(b: Rows, i: int, t: int) -> list[float]:
    """R (1[a = a_t] − π_a) + α ∂/∂z_a (−Σ_c π_c log π_c), ∂π_c/∂z_a = π_c (1[a = c] − π_a)."""
    z = b.logits[i][t]
    pi = [math.exp(x) / math.fsum(math.exp(y) for y in z) for x in z]
    A = range(len(z))
    slope = [-math.fsum((math.log(pi[c]) + 1) * pi[c] * ((a == c) - pi[a]) for c in A) for a in A]
    return [(b.R(i) * ((a == b.action[i][t]) - pi[a]) + b.alpha * slope[a]) / b.B for a in A]


def everyone(b: Rows) -> range:
    return range(b.B)


# c[i,t] at a policy position (i, t); of every action, for all_action
FORMULAS: dict[str, Callable[[Rows, int, int], float | list[float]]] = {
    "reinforce": lambda b, i, t: b.R(i) / b.B,
    "reward_to_go": lambda b, i, t: b.weight(i, t) * b.to_go(i, t) / b.B,
    "reward_to_go_undiscounted_weight": lambda b, i, t: b.to_go(i, t) / b.B,
    "baselined(constant)": lambda b, i, t: b.weight(i, t) * (b.to_go(i, t) - 0.5) / b.B,
    "baselined(value)": lambda b, i, t: b.weight(i, t) * (b.to_go(i, t) - b.V[i][t]) / b.B,
    "baselined(optimal_constant)": lambda b, i, t: (b.R(i) - b.side["optimal_constant"][i]) / b.B,
    "baselined(optimal_state)": lambda b, i, t: b.weight(i, t) * (b.to_go(i, t) - b.side["optimal_state"][i][t]) / b.B,
    "baselined(optimal_state_joint)": lambda b, i, t: (
        b.weight(i, t) * (b.to_go(i, t) - b.side["optimal_state_joint"][i][t]) / b.B
    ),
    "baselined(next_state)": lambda b, i, t: b.weight(i, t) * (b.to_go(i, t) - b.V[i][t + 1]) / b.B,
    "baselined(next_action)": lambda b, i, t: b.weight(i, t) * (b.to_go(i, t) - q_next(b, i, t)) / b.B,
    "baselined(own_return)": lambda b, i, t: b.weight(i, t) * (b.to_go(i, t) - 0.5 * b.to_go(i, t)) / b.B,
    "batch_mean": lambda b, i, t: (b.R(i) - mean([b.R(j) for j in everyone(b)])) / b.B,
    "batch_mean(group)": lambda b, i, t: (b.R(i) - mean([b.R(j) for j in b.peers(i)])) / b.B,
    "batch_mean(reward_to_go)": lambda b, i, t: (
        b.weight(i, t) * (b.to_go(i, t) - mean([b.to_go(j, t) for j in everyone(b)])) / b.B
    ),
    "batch_mean_alive": lambda b, i, t: b.weight(i, t) * (b.to_go(i, t) - alive_mean(b, t)) / b.B,
    "leave_one_out": lambda b, i, t: (b.R(i) - others_mean(b, i, b.peers(i))) / b.B,
    "leave_one_out(batch)": lambda b, i, t: (b.R(i) - others_mean(b, i, everyone(b))) / b.B,
    "trajectory_is": lambda b, i, t: b.w(i, b.T - 1) * b.weight(i, t) * b.to_go(i, t) / b.B,
    "per_decision_is": lambda b, i, t: math.fsum(b.w(i, k) * b.weight(i, k) * b.r[i][k] for k in range(t, b.T)) / b.B,
    "token_is": lambda b, i, t: b.ratio(i, t) * b.weight(i, t) * b.to_go(i, t) / b.B,
    "cispo(notes)": lambda b, i, t: b.ratio(i, t) * standardised(b, i) / b.tokens,
    "cispo": lambda b, i, t: min(b.ratio(i, t), 1.1) * standardised(b, i) / b.tokens,
    "grpo": lambda b, i, t: clipped_surrogate_slope(b.ratio(i, t), standardised(b, i)) / (b.B * b.length(i)),
    "reinforce_pp": lambda b, i, t: clipped_surrogate_slope(b.ratio(i, t), whitened(b, b.to_go, i, t)) / b.tokens,
    "reinforce_pp(group)": lambda b, i, t: (
        clipped_surrogate_slope(
            b.ratio(i, t),
            whitened(b, lambda j, k: b.R(j) - mean([b.R(m) for m in b.peers(j)]), i, t),
        )
        / b.tokens
    ),
    "vineppo(K=1)": lambda b, i, t: vineppo(b, i, t) / b.B,
    "vineppo(K=2)": lambda b, i, t: vineppo(b, i, t) / b.B,
    "gigpo": lambda b, i, t: (
        (standardised(b, i) + gigpo_step(b, i, t, own=True, alone="zero", by_std=True)) / (b.B * b.length(i))
    ),
    "gigpo_step(leave_one_out)": lambda b, i, t: gigpo_step(b, i, t, own=False, alone="no baseline") / b.B,
    "gigpo_step(singleton_zero)": lambda b, i, t: gigpo_step(b, i, t, own=False, alone="zero") / b.B,
    "gigpo_step(in_sample)": lambda b, i, t: gigpo_step(b, i, t, own=True, alone="no baseline") / b.B,
    "opo": lambda b, i, t: opo(b, i, b.peers(i)) / b.B,
    "opo(leave_one_out)": lambda b, i, t: opo(b, i, others(b, i)) / b.B,
    "remax": lambda b, i, t: (b.R(i) - b.side["greedy_return"][i]) / b.B,
    "ppo_clip": lambda b, i, t: (
        clipped_surrogate_slope(b.ratio(i, t), b.weight(i, t) * (b.to_go(i, t) - b.V[i][t])) / b.B
    ),
    "tis": lambda b, i, t: min(b.w(i, b.T - 1), 2.0) * b.weight(i, t) * b.to_go(i, t) / b.B,
    "mis": lambda b, i, t: (b.w(i, b.T - 1) if b.w(i, b.T - 1) <= 2 else 0.0) * b.weight(i, t) * b.to_go(i, t) / b.B,
    "self_normalised_is": lambda b, i, t: (
        b.w(i, b.T - 1) / math.fsum(b.w(j, b.T - 1) for j in everyone(b)) * b.weight(i, t) * b.to_go(i, t)
    ),
    "dr_grpo": lambda b, i, t: (
        clipped_surrogate_slope(b.ratio(i, t), b.R(i) - mean([b.R(j) for j in b.peers(i)])) / (b.B * 4)
    ),
    "dapo": lambda b, i, t: clipped_surrogate_slope(b.ratio(i, t), standardised(b, i), high=0.28) / b.tokens,
    "gspo": lambda b, i, t: (  # ∂s/∂log π_t = s/|o|
        clipped_surrogate_slope(b.w(i, b.T - 1) ** (1 / b.length(i)), standardised(b, i), low=3e-4, high=4e-4)
        / (b.B * b.length(i))
    ),
    "loo_std": lambda b, i, t: standardised_by_others(b, i) / b.B,
    "gae(0.95)": lambda b, i, t: gae(b, b.V, i, t, 0.95) / b.B,
    "actor_critic": lambda b, i, t: delta(b, b.V, i, b.acts(i).index(t)) / b.B,
    "gae(wrong_value)": lambda b, i, t: gae(b, b.side["wrong_value"], i, t, 0.95) / b.B,
    "gae(wrong_value, λ=1)": lambda b, i, t: (
        b.weight(i, t) * (b.to_go(i, t) - b.side["wrong_value"][i][t]) / b.B  # the sum telescopes
    ),
    "all_action": all_action,
    "pkpo": lambda b, i, t: best_of_sets(b, i, minus_one=False) / b.B,
    "pkpo(minus_one)": lambda b, i, t: best_of_sets(b, i, minus_one=True) / b.B,
    "maxrl": lambda b, i, t: over_successes(b, i, centered=False) / b.B,
    "maxrl(centered)": lambda b, i, t: over_successes(b, i, centered=True) / b.B,
    "best_of_n": lambda b, i, t: winner(b, i) / b.B,
    "kl_in_reward(k1)": lambda b, i, t: b.shaped(i, lambda k: b.beta * b.d(i, k)) / b.B,
    "kl_in_reward(k3)": lambda b, i, t: b.shaped(i, lambda k: b.beta * (math.exp(-b.d(i, k)) - 1 + b.d(i, k))) / b.B,
    "kl_loss(k1, token)": lambda b, i, t: (b.R(i) - b.beta) / b.B,
    "kl_loss(k2, token)": lambda b, i, t: (b.R(i) - b.beta * b.d(i, t)) / b.B,
    "kl_loss(k2, sequence)": lambda b, i, t: (b.R(i) - b.beta * b.D(i)) / b.B,
    "kl_loss(k3, token)": lambda b, i, t: (b.R(i) - b.beta * (1 - math.exp(-b.d(i, t)))) / b.B,
    "kl_loss(k3, sequence)": lambda b, i, t: (b.R(i) - b.beta * (1 - math.exp(-b.D(i)))) / b.B,
    "entropy_in_reward": lambda b, i, t: b.shaped(i, lambda k: b.alpha * b.logp[i][k]) / b.B,
    "entropy_bonus(token)": bonus,
}


def random_batch(seed: int, *, clock: DiscountClock = "position", on_policy: bool = False) -> Batch:
    """Five rows of up to four positions in groups of 2 and 3: ragged, with observation positions that may pay.

    States recur inside and across rows and groups; some have a visitor alone.
    """
    g = torch.Generator().manual_seed(seed)
    B, T = 5, 4

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    end = torch.randint(1, T + 1, (B, 1), generator=g)
    real = (torch.arange(T) < end).to(torch.float64)
    mask = (torch.rand(B, T, generator=g) < 0.7).to(torch.float64) * real
    mask[:, 0] = 1.0
    logp = draw(B, T).abs().neg() * mask
    state = torch.randint(0, 3, (B, T), generator=g)
    nothing = torch.full_like(state, -1)
    state = torch.where(mask > 0, state, nothing)
    return Batch(
        state=state,
        context=state.clone(),
        action=torch.where(mask > 0, torch.randint(0, 2, (B, T), generator=g), nothing),
        reward=draw(B, T) * real,
        mask=mask,
        logp=logp,
        behavior_logp=logp.clone() if on_policy else logp - 0.3 * draw(B, T) * mask,
        ref_logp=logp - 0.3 * draw(B, T) * mask,
        value=draw(B, T + 1),
        group=torch.tensor([0, 0, 1, 1, 1]),
        discount=0.8,
        discount_clock=clock,
        kl_coefficient=0.4,
        entropy_coefficient=0.7,
        side={
            "action_value": draw(B, T) * mask,
            "continuation_value": draw(B, T) * mask,
            "optimal_constant": draw(1).expand(B).clone(),
            "optimal_state": draw(B, T) * mask,
            "optimal_state_joint": draw(B, T) * mask,
            "greedy_return": draw(B),
            "wrong_value": draw(B, T + 1),
            "all_action_values": draw(B, T, 2),
        },
        action_logits=draw(B, T, 2),
    )


def as_rows(batch: Batch) -> Rows:
    batch = batch if batch.action_logits is not None else replace(batch, action_logits=batch.mask.unsqueeze(-1))
    return Rows(
        state=batch.state.tolist(),
        r=batch.reward.tolist(),
        mask=batch.mask.tolist(),
        logp=batch.logp.tolist(),
        old=batch.behavior_logp.tolist(),
        ref=batch.ref_logp.tolist(),
        V=batch.value.tolist(),
        group=batch.group.tolist(),
        gamma=batch.discount,
        clock=batch.discount_clock,
        beta=batch.kl_coefficient,
        alpha=batch.entropy_coefficient,
        action=batch.action.tolist(),
        side={name: x.tolist() for name, x in batch.side.items()},
        logits=batch.logits.tolist(),
    )


def by_formula(name: str, batch: Batch) -> Tensor:
    b = as_rows(batch)
    nothing: float | list[float] = [0.0] * 2 if find_estimator(name).leaf == "logits" else 0.0
    return torch.tensor(
        [[FORMULAS[name](b, i, t) if b.mask[i][t] else nothing for t in range(b.T)] for i in range(b.B)],
        dtype=torch.float64,
    )


def test_every_entry_has_its_formula_here() -> None:
    assert set(FORMULAS) == set(registered_estimators())


@pytest.mark.parametrize("clock", DISCOUNT_CLOCKS)
@pytest.mark.parametrize("name", FORMULAS)
def test_coefficients_are_the_formula(name: str, clock: DiscountClock) -> None:
    """c[i,t], scalar by scalar, on random off-policy batches of unequal groups; 0 where the policy does not act."""
    estimator = find_estimator(name)
    for seed in range(4):
        batch = random_batch(seed, clock=clock)
        torch.testing.assert_close(estimator.coefficients(batch), by_formula(name, batch), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("name", FORMULAS)
def test_many_batches_at_once_are_one_at_a_time(name: str) -> None:
    """`[M1, M2, B, T]` is M1·M2 times `[B, T]`."""
    batches = [random_batch(seed) for seed in range(4)]
    stacked = batches[0].with_tensors(
        {key: torch.stack([b.tensors()[key] for b in batches]).unflatten(0, (2, 2)) for key in batches[0].tensors()}
    )
    found = find_estimator(name).coefficients(stacked)
    for m, batch in enumerate(batches):
        torch.testing.assert_close(
            found[m // 2, m % 2], find_estimator(name).coefficients(batch), rtol=1e-13, atol=1e-15
        )


@pytest.mark.parametrize("name", FORMULAS)
def test_any_labels_of_groups_will_do(name: str) -> None:
    """Labels 0, 0, 1, 1, 1 or 7, 7, 3, 3, 3: what matters is who shares one."""
    batch = random_batch(1)
    relabelled = batch.with_tensors({"group": torch.tensor([7, 7, 3, 3, 3])})
    coefficients = find_estimator(name).coefficients
    torch.testing.assert_close(coefficients(relabelled), coefficients(batch), rtol=0, atol=1e-15)


def test_the_random_batches_reach_every_case() -> None:
    """Clipped and unclipped ratios, observation positions that pay, a state with a visitor alone, and one shared."""
    batches = [random_batch(seed) for seed in range(4)]
    r = torch.cat([(b.logp - b.behavior_logp).exp()[b.mask > 0] for b in batches])
    assert bool((r > 1.2).any())
    assert bool((r < 0.8).any())
    assert bool(((r > 0.8) & (r < 1.1)).any())
    assert any(bool(((b.mask == 0) & (b.reward != 0)).any()) for b in batches)
    visits = [
        bool(same_state(as_rows(b), i, t, own=False))
        for b in batches
        for i in range(5)
        for t in range(4)
        if b.mask[i, t]
    ]
    assert {True, False} == set(visits)


# -- identities on every batch, no expectation taken


def ascent(c: Tensor, batch: Batch, score: Tensor) -> Tensor:
    """Σ_{i,t} c[i,t] ∇log π_t, with `score` `[B, T, P]`."""
    return (c.unsqueeze(-1) * score * batch.mask.unsqueeze(-1)).sum((0, 1))


def random_score(batch: Batch, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*batch.mask.shape, 6, generator=g, dtype=torch.float64)


@pytest.mark.parametrize("seed", range(3))
def test_leave_one_out_is_the_batch_mean_enlarged(seed: int) -> None:
    """R_i − mean of the others = B/(B−1) (R_i − R̄), B = 5."""
    batch = random_batch(seed)
    loo, in_sample = (find_estimator(n).coefficients(batch) for n in ("leave_one_out(batch)", "batch_mean"))
    torch.testing.assert_close(loo, in_sample * 5 / 4, rtol=0, atol=1e-15)
    one_group = batch.with_tensors({"group": torch.zeros(5, dtype=torch.int64)})
    torch.testing.assert_close(find_estimator("leave_one_out").coefficients(one_group), loo, rtol=0, atol=1e-15)


@pytest.mark.parametrize("seed", range(3))
def test_leave_one_out_is_a_sum_over_pairs(seed: int) -> None:
    """ĝ = Σ_{i<j} (R_i − R_j)(S_i − S_j) / (B(B−1)), as gradients: S_i a random vector for each step."""
    batch = random_batch(seed)
    score = random_score(batch)
    S = (score * batch.mask.unsqueeze(-1)).sum(1)
    R = batch.episode_return
    pairs = sum((R[i] - R[j]) * (S[i] - S[j]) for i, j in itertools.combinations(range(5), 2))
    found = ascent(find_estimator("leave_one_out(batch)").coefficients(batch), batch, score)
    torch.testing.assert_close(found, torch.as_tensor(pairs / 20), rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", [n for n, e in registered_estimators().items() if e.on_policy_limit])
def test_on_policy_it_is_its_limit(name: str) -> None:
    """Row by row, once π_old = π."""
    estimator = find_estimator(name)
    batch = random_batch(2, on_policy=True)
    limit = find_estimator(str(estimator.on_policy_limit))
    torch.testing.assert_close(estimator.coefficients(batch), limit.coefficients(batch), rtol=0, atol=1e-14)
    off = random_batch(2)
    assert not torch.allclose(estimator.coefficients(off), limit.coefficients(off))


@pytest.mark.parametrize("name", [n for n, e in registered_estimators().items() if e.shift_invariant])
def test_shift_invariant_ones_ignore_a_constant(name: str) -> None:
    """The same number on every row's return (paid at the first position, and known to V) moves no coefficient."""
    batch = random_batch(3)
    paid = torch.zeros_like(batch.reward)
    paid[:, 0] = 2.5
    known = torch.zeros_like(batch.value)
    known[:, 0] = 2.5
    moved = batch.with_tensors({"reward": batch.reward + paid, "value": batch.value + known})
    coefficients = find_estimator(name).coefficients
    torch.testing.assert_close(coefficients(moved), coefficients(batch), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", [n for n, e in registered_estimators().items() if e.weight])
def test_weights_have_expectation_one(name: str) -> None:
    """E_old[w] = Σ_τ π_old(τ) w(τ) = 1 under full support."""
    weight = find_estimator(name).weight
    assert weight is not None
    table = dialogue(behavior_logits=[[-0.4, 0.2], [0.3, 0.1], [0.9, -0.2]]).trajectories
    chance = table.behavior_probability * table.paths.start_probability[table.paths.start]
    assert float((weight(table.rows_as_batch()) * chance).sum()) == pytest.approx(1.0, abs=1e-14)


@pytest.mark.parametrize("returns", [[0.1] * 3, [0.3, 0.3, 0.3], [1.0] * 7, [-0.7] * 6, [0.1 + 0.2] * 5])
@pytest.mark.parametrize("eps", [0.0, 1e-6])
def test_a_unanimous_group_has_advantage_zero(returns: list[float], eps: float) -> None:
    """Exactly 0, whatever ε and however the mean of equal numbers rounds."""
    batch = bandit(returns, [0.0] * len(returns)).trajectories.rows_as_batch()
    one_group = batch.with_tensors({"group": torch.zeros(len(returns), dtype=torch.int64)})
    found = adv.standardised_return("group", eps=eps)(one_group)
    assert found.flatten().tolist() == [0.0] * len(returns)


def test_std_with_ddof_one_is_the_sample_one() -> None:
    batch = random_batch(0)
    found = adv.standardised_return("group", ddof=1, eps=0.0)(batch).flatten()
    for rows in ([0, 1], [2, 3, 4]):
        R = batch.episode_return[rows]
        torch.testing.assert_close(found[rows], (R - R.mean()) / R.std(correction=1), rtol=1e-12, atol=0)


def test_a_clip_keeps_the_gradient_or_drops_it() -> None:
    """CISPO clips the weight on both sides; PPO silences a token only on the side its advantage pushes to."""
    batch = random_batch(0)
    r = (batch.logp - batch.behavior_logp).exp()
    up, down = torch.ones_like(r), -torch.ones_like(r)
    both = ratios.clipped_ratio(low=0.2, high=0.1)(batch, up)
    torch.testing.assert_close(both, r.clamp(0.8, 1.1), rtol=0, atol=0)
    assert torch.equal(ratios.ppo_clip()(batch, up), torch.where(r > 1.2, 0.0, r))
    assert torch.equal(ratios.ppo_clip()(batch, down), torch.where(r < 0.8, 0.0, r))
    assert torch.equal(ratios.ppo_clip(low=0.5, high=0.05)(batch, up), torch.where(r > 1.05, 0.0, r))


def test_aggregations_add_up() -> None:
    """Σ over positions of weight · mask: B rows of |o_i|/B; rows of 1/B each; one in all."""
    batch = random_batch(1)
    totals = [float((f(batch) * batch.mask).sum()) for f in (agg.mean_of_rows, agg.sequence_mean, agg.token_mean)]
    assert totals == pytest.approx([float(batch.mask.sum()) / 5, 1.0, 1.0], abs=1e-15)


# -- expectations in closed form


def moments(estimator: str | Estimator, problem: Problem) -> Moments:
    asked = find_estimator(estimator) if isinstance(estimator, str) else estimator
    return exact_moments([asked], problem)[0]


def two_arms(p: float, **settings: int) -> Problem:
    """Binary reward: arm 0 pays 1, with probability p."""
    return bandit([1.0, 0.0], [math.log(p / (1 - p)), 0.0], **settings)


def w_G(p: float, G: int) -> float:  # noqa: N802
    """E √(q̂(1−q̂)) / (p(1−p)), q̂ ~ Bin(G, p)/G."""
    total = math.fsum(
        math.comb(G, n) * p**n * (1 - p) ** (G - n) * math.sqrt(n / G * (1 - n / G)) for n in range(G + 1)
    )
    return total / (p * (1 - p))


GRPO_NO_EPS = from_coefficients(
    compose(adv.standardised_return("group", eps=0.0), ratio=ratios.ppo_clip(), aggregation=agg.sequence_mean),
    couples="group",
    name="grpo(eps=0)",
)


@pytest.mark.parametrize("p", [0.01, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("G", range(2, 9))
def test_grpo_weighs_difficulty(G: int, p: float) -> None:
    """Binary reward, one prompt, one step, ε = 0, population std: E ĝ = w_G(p) ∇p, ∇p = p(1−p) (1, −1)."""
    found = moments(GRPO_NO_EPS, two_arms(p, group_size=G)).mean
    slope = w_G(p, G) * p * (1 - p)
    torch.testing.assert_close(found, torch.tensor([[slope, -slope]], dtype=torch.float64), rtol=0, atol=1e-13)


@pytest.mark.parametrize(("G", "constant"), [(2, 1.0), (3, math.sqrt(2.0))])
def test_grpo_of_two_or_three_is_blind_to_difficulty(G: int, constant: float) -> None:
    """w_2 = ½·2p(1−p)/(p(1−p)) = 1; w_3 = (√2/3)·3p(1−p)/(p(1−p)) = √2."""
    for p in (0.01, 0.2, 0.5, 0.97):
        problem = two_arms(p, group_size=G)
        torch.testing.assert_close(
            moments(GRPO_NO_EPS, problem).mean, constant * problem.gradient(), rtol=0, atol=1e-13
        )


@pytest.mark.parametrize(("G", "ratio"), [(4, 1.069), (8, 1.406), (16, 1.930), (64, 3.395)])
def test_grpo_prefers_the_hard_and_the_easy(G: int, ratio: float) -> None:
    """w_G(.01)/w_G(.5), to the three decimals of the table; measured as E ĝ over ∇J on both."""

    def weight(p: float) -> float:
        problem = two_arms(p, group_size=G)
        return float(moments(GRPO_NO_EPS, problem).mean[0, 0] / problem.gradient()[0, 0])

    assert weight(0.01) / weight(0.5) == pytest.approx(ratio, abs=5e-4)


def test_grpo_in_the_limit_ascends_the_arcsine() -> None:
    """w_G(p) → 1/√(p(1−p)) = d(2 arcsin √p)/dp; at p = .5, G = 200 within 1/G of it."""
    assert w_G(0.5, 200) == pytest.approx(2.0, rel=1 / 200)
    problem = two_arms(0.5, group_size=200)
    found = float(moments(GRPO_NO_EPS, problem).mean[0, 0])
    assert found == pytest.approx(w_G(0.5, 200) / 4, rel=1e-11)


SHAPES: list[tuple[int, ...]] = [(2,), (5,), (2, 2), (1, 1, 1), (3, 1)]


@pytest.mark.parametrize("sizes", SHAPES)
@pytest.mark.parametrize("name", ["batch_mean", "batch_mean(reward_to_go)"])
def test_batch_mean_keeps_its_share(name: str, sizes: tuple[int, ...]) -> None:
    """(B−1)/B of ∇J: E[R_j S_i] = 0 for j ≠ i, also for rows of one prompt, as E[S | prompt] = 0."""
    B = sum(sizes)
    for build in (walk, dialogue):
        problem = build(groups=len(sizes), group_size=sizes)
        torch.testing.assert_close(moments(name, problem).mean, (B - 1) / B * problem.gradient(), rtol=0, atol=1e-14)


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_group_mean_keeps_its_share(groups: int) -> None:
    """(G−1)/G of ∇J for equal groups, prompts differing or not."""
    problem = dialogue(groups=groups, group_size=3)
    torch.testing.assert_close(
        moments("batch_mean(group)", problem).mean, 2 / 3 * problem.gradient(), rtol=0, atol=1e-14
    )


UNBIASED_ON_POLICY = [
    name
    for name, e in registered_estimators().items()
    if any(c.kind == "unbiased" and "γ = 1" not in {x.name for x in c.conditions} for c in e.claims)
]


@pytest.mark.parametrize("name", UNBIASED_ON_POLICY)
def test_unbiased_ones_are_unbiased(name: str) -> None:
    """E ĝ = ∇J, on states that recur and on prompts with observation positions."""
    for problem in (walk(group_size=3), dialogue(groups=2, group_size=2)):
        torch.testing.assert_close(moments(name, problem).mean, problem.gradient(), rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", ["trajectory_is", "per_decision_is"])
def test_importance_weights_are_unbiased_off_policy(name: str) -> None:
    """E_old ĝ = ∇J under full support; a token ratio is not."""
    for problem in (
        walk(group_size=2, behavior_logits=[[-0.3, 0.5], [0.6, -0.1]]),
        dialogue(groups=2, group_size=2, behavior_logits=[[-0.4, 0.2], [0.3, 0.1], [0.9, -0.2]]),
    ):
        gradient = problem.gradient()
        torch.testing.assert_close(moments(name, problem).mean, gradient, rtol=0, atol=1e-14)
        assert float((moments("token_is", problem).mean - gradient).norm()) > 0.01 * float(gradient.norm())


def test_token_ratio_is_the_gradient_of_the_surrogate() -> None:
    """E_old Σ r_t γ^t Ĝ_t ∇log π_t = ∇_π L, L(π) = Σ_τ π_old(τ) Σ_t r_t(π) γ^t Ĝ_t, by autograd in the logits."""
    problem = walk(group_size=1, behavior_logits=[[-0.3, 0.5], [0.6, -0.1]])
    table = problem.trajectories
    rows, p = table.rows_as_batch(), table.paths
    z = problem.logits.requires_grad_(True)
    logp = torch.log_softmax(z, -1)[p.context, p.action]
    r = (logp - table.behavior_logp).exp()
    surrogate = (table.behavior_probability.unsqueeze(-1) * r * rows.discount_weight * rows.reward_to_go).sum()
    (expected,) = torch.autograd.grad(surrogate, z)
    torch.testing.assert_close(moments("token_is", problem).mean, expected, rtol=0, atol=1e-14)


BIASED = [name for name, e in registered_estimators().items() if e.claims[0].kind == "biased"]


@pytest.mark.parametrize("name", BIASED)
def test_biased_ones_are_biased(name: str) -> None:
    """‖E ĝ − ∇J‖ > 1% of ‖∇J‖ on at least one of two on-policy problems."""
    gaps = []
    for problem in (walk(group_size=3), dialogue(groups=2, group_size=2)):
        gradient = problem.gradient()
        gaps.append(float((moments(name, problem).mean - gradient).norm() / gradient.norm()))
    assert max(gaps) > 0.01


# -- VinePPO


def continuation_laws(problem: Problem) -> dict[tuple[int, int], list[tuple[float, float]]]:
    """(Ĝ_t, probability) of a fresh rollout from (s, t), from the table of rollouts by hand."""
    table = problem.trajectories
    rows = as_rows(table.rows_as_batch())
    laws: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for n, p in enumerate(table.probability.tolist()):
        for t in range(rows.T):
            if rows.mask[n][t]:
                laws.setdefault((rows.state[n][t], t), []).append((rows.to_go(n, t), p))
    return {visit: [(x, p / math.fsum(q for _, q in law)) for x, p in law] for visit, law in laws.items()}


@pytest.mark.parametrize("K", [1, 2])
def test_vineppo_moments_by_hand(K: int) -> None:
    """One rollout of `walk` and K fresh continuations from both of its states, every outcome in a loop."""
    problem = walk(group_size=1)
    laws = continuation_laws(problem)
    table = problem.trajectories
    rows = as_rows(table.rows_as_batch())
    pi = torch.softmax(problem.logits, -1).tolist()
    first, second, total = [0.0] * 4, 0.0, 0.0
    for n, p in enumerate(table.probability.tolist()):
        s0, s1 = rows.state[n]
        a0, a1 = table.paths.action[n].tolist()
        for draws in itertools.product(*[laws[s0, 0]] * K, *[laws[s1, 1]] * K):
            chance = p * math.prod(q for _, q in draws)
            V0, V1 = mean([x for x, _ in draws[:K]]), mean([x for x, _ in draws[K:]])
            c0 = rows.r[n][0] + 0.8 * V1 - V0
            c1 = 0.8 * (rows.r[n][1] - V1)
            g = [0.0] * 4
            for s, a, c in ((s0, a0, c0), (s1, a1, c1)):
                for b in range(2):
                    g[2 * s + b] += c * ((a == b) - pi[s][b])
            total += chance
            second += chance * math.fsum(x * x for x in g)
            first = [f + chance * x for f, x in zip(first, g, strict=True)]
    assert total == pytest.approx(1.0, abs=1e-13)
    found = moments(f"vineppo(K={K})", problem)
    assert found.mean.flatten().tolist() == pytest.approx(first, abs=1e-13)
    assert found.total_variance == pytest.approx(second - math.fsum(x * x for x in first), abs=1e-12)


def test_vineppo_quietens_with_more_continuations() -> None:
    """Unbiased for every K, and Var = Var(exact V) + E[noise]/K: from K = 1 to 2 the noise halves.

    Given the rollout, the draws are independent of it with mean V, so their noise adds a term proportional to 1/K.
    """

    def exact_v(batch: Batch) -> Tensor:
        """γ^t (r_t + γ V(s_{t+1}) − V(s_t)); `walk` acts at every position."""
        td = batch.reward + batch.discount * batch.value[..., 1:] - batch.value[..., :-1]
        return batch.discount_weight * td * batch.mask / batch.rows

    problem = walk(group_size=2)
    limit = moments(from_coefficients(exact_v, couples="trajectory"), problem)
    one, two = (moments(f"vineppo(K={K})", problem) for K in (1, 2))
    for found in (limit, one, two):
        torch.testing.assert_close(found.mean, problem.gradient(), rtol=0, atol=1e-14)
    assert limit.total_variance < two.total_variance < one.total_variance
    noise = one.total_variance - limit.total_variance
    assert two.total_variance - limit.total_variance == pytest.approx(noise / 2, rel=1e-10)


# -- variances in closed form


@pytest.mark.parametrize(
    ("baseline", "variance"),
    [
        # s = ∂log π/∂(z₀ − z₁) is .1 with probability .9 (reward 1), −.9 with probability .1 (reward 0)
        (0.0, 0.9 * 0.1**2 - 0.09**2),  # = .0009: R s is .1 or 0, mean p(1−p) = .09
        (0.9, 0.9 * (0.1 * 0.1) ** 2 + 0.1 * (0.9 * 0.9) ** 2 - 0.09**2),  # = .0576: V = .9
        (0.1, 0.0),  # b*: (1 − .1)(.1) = (0 − .1)(−.9) = .09, always
    ],
)
def test_the_value_can_be_worse_than_no_baseline(baseline: float, variance: float) -> None:
    """Two arms, p = .9, r = (1, 0); the gradient in `[K, A]` has two coordinates ±x, so twice the variance."""
    problem = two_arms(0.9, group_size=1)
    estimator = from_coefficients(compose(adv.return_minus(lambda b: baseline * b.reward.sum(-1) ** 0)))
    found = moments(estimator, problem)
    assert found.total_variance == pytest.approx(2 * variance, abs=1e-15)
    assert float(found.covariance[0, 0]) == pytest.approx(variance, abs=1e-15)
    torch.testing.assert_close(found.mean, problem.gradient(), rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    ("name", "variance"),
    [("reinforce", 0.0009), ("baselined(value)", 0.0576), ("baselined(optimal_constant)", 0.0)],
)
def test_the_entries_have_those_variances(name: str, variance: float) -> None:
    found = moments(name, two_arms(0.9, group_size=1))
    assert found.total_variance == pytest.approx(2 * variance, abs=1e-14)


def test_variance_grows_with_the_square_of_the_distance_to_the_optimum() -> None:
    """Var(b) = Var(b*) + E‖S‖² (b − b*)² over single rollouts."""
    problem = dialogue(group_size=1)
    side = problem.trajectories_with(find_estimator("baselined(optimal_constant)").needs).side
    best = float(side["optimal_constant"][0])

    def variance(b: float) -> float:
        shifted = compose(adv.return_minus(lambda batch: torch.full_like(batch.episode_return, b)))
        return moments(from_coefficients(shifted, couples="trajectory"), problem).total_variance

    least = moments("baselined(optimal_constant)", problem).total_variance
    assert variance(best) == pytest.approx(least, abs=1e-14)
    size = variance(best + 1.0) - least  # E‖S‖²
    assert size > 0
    for distance in (-2.0, -0.5, 0.25, 3.0):
        assert variance(best + distance) - least == pytest.approx(size * distance**2, rel=1e-11)


def test_the_joint_optimum_is_the_least_of_all_state_baselines() -> None:
    """Below V, below the stepwise optimum, below any random table b(s, t)."""
    for problem in (walk(group_size=1), dialogue(groups=2, group_size=1)):
        least = moments("baselined(optimal_state_joint)", problem).total_variance
        others = ["reward_to_go", "baselined(value)", "baselined(constant)", "baselined(optimal_state)"]
        assert all(least <= moments(n, problem).total_variance + 1e-14 for n in others)
        g = torch.Generator().manual_seed(0)
        joint = find_estimator("baselined(optimal_state_joint)")
        for _ in range(5):
            table = 0.3 * torch.randn(7, 3, generator=g, dtype=torch.float64)

            def moved(batch: Batch, table: Tensor = table) -> Tensor:
                T = batch.mask.shape[-1]
                return batch.side["optimal_state_joint"] + table[batch.state.clamp(min=0), torch.arange(T)]

            tried = Estimator("moved", compose(adv.to_go_minus(moved)), "trajectory", needs=joint.needs)
            assert moments(tried, problem).total_variance > least


@pytest.mark.parametrize("T", [1, 2, 3, 5])
@pytest.mark.parametrize(("name", "share"), [("reinforce", 1 / 4), ("reward_to_go", 1 / 8)])
def test_summed_fair_bandits(name: str, share: float, T: int) -> None:
    """T independent fair ±1 bandits, each a context of its own: total variance T(T−1)/4 or T(T−1)/8 in the T logit
    differences, and double in `[K, A]`.

    r_t = 2 s_t with s_t = ±½. Coordinate t of R S is r_t s_t + Σ_{k≠t} r_k s_t = ½ + Σ_{k≠t} r_k s_t: variance (T−1)/4.
    With reward-to-go only the k > t remain: (T−1−t)/4, which adds up to T(T−1)/8.
    """
    following = [[[float(s2 == s + 1) for s2 in range(T + 1)]] * 2 for s in range(T)] + [[[0.0] * T + [1.0]] * 2]
    env = TabularMDP(following, [[1.0, -1.0]] * T + [[0.0, 0.0]], [1.0] + [0.0] * T, horizon=T, terminal=[T])
    problem = Problem(env, torch.zeros(T + 1, 2), group_size=1)
    found = moments(name, problem)
    assert found.total_variance == pytest.approx(2 * share * T * (T - 1), abs=1e-13)
    torch.testing.assert_close(found.mean[:T], torch.tensor([[0.5, -0.5]] * T, dtype=torch.float64), rtol=0, atol=1e-14)


def test_without_the_outer_discount_ascent_goes_to_the_worst_policy() -> None:
    """Two steps, one parameter p = π(a1): a1 at t = 0 pays +1 at t = 1, a1 at t = 1 pays −.75, γ = .5.

    J_γ = γ(p − .75p), so ∇J_γ = +.125 p(1−p) in the logit difference, and ∇J_1 = +.25 p(1−p). Without γ^t in front, the
    first step has weight γ·1 and the second −.75: the update is (.5 − .75) p(1−p) = −.25 p(1−p).
    """
    p = 0.3
    chose, did_not, end = 1, 2, 3

    def to(state: int) -> list[float]:
        return [float(s == state) for s in range(4)]

    def two_steps(discount: float) -> Problem:
        env = TabularMDP(
            [[to(chose), to(did_not)], [to(end)] * 2, [to(end)] * 2, [to(end)] * 2],
            [[0.0, 0.0], [1.0 - 0.75, 1.0], [-0.75, 0.0], [0.0, 0.0]],
            to(0),
            horizon=2,
            discount=discount,
            terminal=[end],
        )
        return Problem(env, [[math.log(p / (1 - p)), 0.0]], contexts=[0, 0, 0, 0], group_size=2)

    def slope(x: Tensor) -> float:
        """Of the logit difference: `[K, A]` = (x, −x)."""
        assert float(x[0, 0]) == pytest.approx(-float(x[0, 1]), abs=1e-15)
        return float(x[0, 0]) / (p * (1 - p))

    discounted = two_steps(0.5)
    assert slope(discounted.gradient()) == pytest.approx(0.125, abs=1e-13)
    assert slope(two_steps(1.0).gradient()) == pytest.approx(0.25, abs=1e-13)
    assert slope(moments("reward_to_go", discounted).mean) == pytest.approx(0.125, abs=1e-13)
    assert slope(moments("reward_to_go_undiscounted_weight", discounted).mean) == pytest.approx(-0.25, abs=1e-13)


def test_unequal_groups_share_one_factor() -> None:
    """Groups of 3 and 1, either from either prompt: Σ_g (G_g − 1)/B = ½ of ∇J, in its direction.

    The factor would turn into a direction error if the size of a group depended on its prompt; here it does not.
    """
    problem = dialogue(groups=2, group_size=(3, 1))
    torch.testing.assert_close(moments("batch_mean(group)", problem).mean, 0.5 * problem.gradient(), rtol=0, atol=1e-14)


@pytest.mark.parametrize("B", [2, 4, 8])
def test_bias_of_reinforce_pp_falls_as_one_over_the_batch(B: int) -> None:
    """One step, binary reward, p = ½: E ĝ = w_B(½) ∇J, as for GRPO over the batch, and w_B(½) = 2 (1 − O(1/B)).

    Its ε = 1e-8 stands under the root, beside a variance of at least (B−1)/B² ≥ .1: relative error below 1e-7.
    """
    problem = two_arms(0.5, groups=B, group_size=1)
    found = float(moments("reinforce_pp", problem).mean[0, 0] / problem.gradient()[0, 0])
    assert found == pytest.approx(w_G(0.5, B), rel=1e-7)
    assert 0 < 1 - found / 2 < 1.1 / B  # limit 1/σ = 2


# -- difficulty, with several steps


def softmax(z: Sequence[float]) -> list[float]:
    return [math.exp(x) / math.fsum(math.exp(y) for y in z) for x in z]


def two_tokens(**settings: int | tuple[int, ...]) -> Problem:
    """One prompt, two tokens of two; it is right if they differ. p = π(x) π(y|x) + π(y) π(x|y)."""
    env = TabularMDP(
        [[[0, 1, 0, 0], [0, 0, 1, 0]], *[[[0, 0, 0, 1]] * 2] * 3],
        [[0, 0], [0, 1], [1, 0], [0, 0]],
        [1, 0, 0, 0],
        horizon=2,
        terminal=[3],
    )
    return Problem(env, [[0.7, -0.2], [0.3, 0.9], [-0.4, 0.6], [0.0, 0.0]], **settings)  # type: ignore[arg-type]


def chance_of_two_tokens() -> float:
    x, after_x, after_y = softmax([0.7, -0.2]), softmax([0.3, 0.9]), softmax([-0.4, 0.6])
    return x[0] * after_x[1] + x[1] * after_y[0]


@pytest.mark.parametrize("G", range(2, 9))
def test_grpo_weighs_difficulty_over_several_steps(G: int) -> None:
    """Equal lengths T = 2: E ĝ = w_G(p)/T ∇p, the mean over tokens folded in."""
    problem = two_tokens(group_size=G)
    expected = w_G(chance_of_two_tokens(), G) / 2 * problem.gradient()
    torch.testing.assert_close(moments(GRPO_NO_EPS, problem).mean, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("sizes", [(2,), (5,), (3, 2), (2, 2)])
def test_the_claimed_weight_is_that_of_the_paper(sizes: tuple[int, ...]) -> None:
    """`difficulty` = Σ_g (G_g/B) w_G(p)/T, less what ε = 1e-6 takes: at most ε/σ ≤ 1e-6 G of it."""
    problem = two_tokens(groups=len(sizes), group_size=sizes)
    expected = math.fsum(G * w_G(chance_of_two_tokens(), G) for G in sizes) / sum(sizes) / 2
    assert difficulty(problem) == pytest.approx(expected, rel=1e-5)
    assert difficulty(problem) < expected


@pytest.mark.parametrize(("sure", "terms"), [(-800.0, 4.0), (800.0, 1.0)])
def test_factors_of_a_prompt_that_is_never_or_always_solved(sure: float, terms: float) -> None:
    """p = 0 or 1 to the last bit: κ is its limit, not 0/0."""
    problem = bandit([1.0, 0.0], [sure, 0.0], group_size=4)
    assert problem.value() in (0.0, 1.0)
    # of the mixed groups, only those with one success (or one failure) of four: 4 · √(1/4 · 3/4)
    assert difficulty(problem) == pytest.approx(math.sqrt(3.0), rel=1e-5)
    (claim,) = (c for c in find_estimator("maxrl").claims if c.applies(problem))
    assert claim.scale_on(problem) == pytest.approx(terms)  # Σ_{j<4} (1 − p)^j


@pytest.mark.parametrize("name", ["grpo", "cispo(notes)", "cispo", "dapo", "gspo"])
def test_all_that_divide_by_the_std_have_that_weight(name: str) -> None:
    problem = two_tokens(groups=2, group_size=2)
    expected = w_G(chance_of_two_tokens(), 2) / 2 * problem.gradient()
    torch.testing.assert_close(moments(name, problem).mean, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("sizes", [(2,), (4,), (2, 2), (3, 1)])
def test_a_constant_length_keeps_the_direction(sizes: tuple[int, ...]) -> None:
    """Dr. GRPO: Σ_g (G_g − 1)/B over the constant 4, on rows of one and of two tokens."""
    problem = dialogue(groups=len(sizes), group_size=sizes)
    expected = (sum(sizes) - len(sizes)) / sum(sizes) / 4 * problem.gradient()
    torch.testing.assert_close(moments("dr_grpo", problem).mean, expected, rtol=0, atol=1e-14)


# -- baselines that know the lengths, the others' spread, the greedy rollout


def test_opo_of_two_ascends_its_own_objective() -> None:
    """½J − ¼E[(R₁−R₂)(L₁−L₂)/(L₁+L₂)], both rollouts of one prompt, differentiated in the logits."""
    problem = dialogue(groups=1, group_size=2)
    table = problem.trajectories
    rows, p = table.rows_as_batch(), table.paths
    R, L = rows.episode_return, rows.length
    z = problem.logits.requires_grad_(True)
    logp = (torch.log_softmax(z, -1)[p.context.clamp(min=0), p.action.clamp(min=0)] * p.mask).sum(-1)
    chance = p.env_probability * logp.exp()  # given the start
    same = (p.start.unsqueeze(-1) == p.start).to(torch.float64) * p.start_probability[p.start]
    pairs = torch.outer(chance, chance) * same
    lengths = (L.unsqueeze(-1) - L) / (L.unsqueeze(-1) + L)
    objective = (pairs * (0.5 * R.unsqueeze(-1) - 0.25 * (R.unsqueeze(-1) - R) * lengths)).sum()
    (expected,) = torch.autograd.grad(objective, z)
    torch.testing.assert_close(moments("opo", problem).mean, expected, rtol=0, atol=1e-14)
    assert float((expected - 0.5 * problem.gradient()).norm()) > 0.01


@pytest.mark.parametrize("G", [3, 4, 6])
def test_the_std_of_the_others_is_a_factor_of_the_prompt(G: int) -> None:
    """Two prompts of different spread: in each context E ĝ = κ ∇J, κ = E[1/(σ + ε)] over G − 1 draws of that prompt."""
    rewards, logits, start = [[1.0, 0.0], [3.0, -2.0]], [[0.4, 0.0], [-0.3, 0.2]], [0.4, 0.6]
    stay = [[[1.0, 0.0]] * 2, [[0.0, 1.0]] * 2]
    problem = Problem(TabularMDP(stay, rewards, start, horizon=1), logits, group_size=G)
    found = moments("loo_std", problem).mean
    for s in range(2):
        p = softmax(logits[s])[0]
        factor = 0.0
        for draws in itertools.product(range(2), repeat=G - 1):
            chance = math.prod(p if a == 0 else 1 - p for a in draws)
            factor += chance / (std([rewards[s][a] for a in draws]) + 0.1)
        torch.testing.assert_close(found[s], factor * problem.gradient()[s], rtol=0, atol=1e-12)


def test_remax_is_quiet_where_the_policy_is_nearly_greedy() -> None:
    """Two arms, p = .9, b = 1: R − b is 0 with probability .9 and −1 else. Var in the logit difference p³(1−p)."""
    found = moments("remax", two_arms(0.9, group_size=1))
    # ĝ = 0 or −1 · (−.9): second moment .1 · .81, mean .09
    assert found.total_variance == pytest.approx(2 * (0.1 * 0.81 - 0.09**2), abs=1e-14)


# -- off-policy


def drifted() -> list[Problem]:
    return [
        walk(group_size=2, behavior_logits=[[-0.9, 0.8], [0.9, -0.6]]),
        dialogue(groups=1, group_size=2, behavior_logits=[[-0.9, 0.8], [0.7, -0.9], [0.9, -0.2]]),
    ]


@pytest.mark.parametrize("cap", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("cut", [ratios.truncated_weight, ratios.masked_weight])
def test_the_bias_of_a_capped_weight_is_bounded(cut: Callable[[float], ratios.Ratio], cap: float) -> None:
    """E_old[min(w, c) f] − E_π f = −E_π[(1 − c/w)₊ f]; masked, −E_π[1[w > c] f]. So ‖bias‖ ≤ max‖f‖ E_π[…]."""
    for problem in drifted():
        table = problem.trajectories
        rows, p = as_rows(table.rows_as_batch()), table.paths
        pi = torch.softmax(problem.logits, -1).tolist()
        most, lost = 0.0, 0.0
        for n, chance in enumerate((table.probability * p.start_probability[p.start]).tolist()):
            f = torch.zeros_like(problem.logits)
            for t in rows.acts(n):
                k, a = int(p.context[n, t]), int(p.action[n, t])
                for b in range(2):
                    f[k, b] += rows.weight(n, t) * rows.to_go(n, t) * ((a == b) - pi[k][b])
            most = max(most, float(f.norm()))
            w = rows.w(n, rows.T - 1)
            lost += chance * (max(1 - cap / w, 0.0) if cut is ratios.truncated_weight else float(w > cap))
        capped = from_coefficients(compose(adv.discounted_to_go, ratio=cut(cap)), couples="trajectory")
        bias = float((moments(capped, problem).mean - problem.gradient()).norm())
        assert bias <= most * lost + 1e-14
        assert (bias > 1e-3) == (lost > 0)


def test_normalising_by_the_weights_costs_one_over_the_batch() -> None:
    """Bias times B tends to a constant: from B = 8 to 16 it changes by less than a tenth, and the bias halves."""
    bias = {}
    for B in (8, 16):
        problem = bandit([1.0, 0.0], [0.8, 0.0], groups=B, group_size=1, behavior_logits=[[0.0, 0.3]])
        bias[B] = float((moments("self_normalised_is", problem).mean - problem.gradient()).norm())
    assert bias[8] > 1e-3
    assert bias[16] / bias[8] == pytest.approx(0.5, rel=0.1)


# -- critics


def test_bootstrapping_from_a_wrong_value_costs_less_as_decay_rises() -> None:
    """λ = 0, .5, .8, .95, 1: the bias falls all the way, to 0."""
    for problem in (walk(group_size=2), dialogue(groups=1, group_size=2)):
        biases = []
        for decay in (0.0, 0.5, 0.8, 0.95, 1.0):
            e = Estimator("gae", compose(adv.gae(decay, adv.wrong_value)), "trajectory", needs=(WrongValues(),))
            biases.append(float((moments(e, problem).mean - problem.gradient()).norm()))
        assert biases == sorted(biases, reverse=True)
        assert biases[0] > 0.01
        assert biases[-1] < 1e-14


@pytest.mark.parametrize("after_end", [0.0, 5.0])
def test_nothing_is_bootstrapped_from_padding(after_end: float) -> None:
    """What a critic says after the end, or on an observation, is not read: `dialogue` has both."""
    table = WrongValues(after_end=after_end)(dialogue().trajectories)
    batch = table.batch(torch.arange(len(table)), torch.arange(len(table)))
    nobody = torch.nn.functional.pad(batch.mask, (0, 1)) == 0
    wild = batch.with_tensors({"side.wrong_value": torch.where(nobody, 100.0, batch.side["wrong_value"])})
    for decay in (0.0, 0.7, 1.0):
        found = adv.gae(decay, adv.wrong_value)
        torch.testing.assert_close(found(wild) * batch.mask, found(batch) * batch.mask, rtol=0, atol=0)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("clock", DISCOUNT_CLOCKS)
def test_the_ends_of_gae(clock: DiscountClock, seed: int) -> None:
    """λ = 1 is the return less the value; λ = 0 the one-step difference."""
    batch = random_batch(seed, clock=clock)
    acts = batch.mask > 0
    whole, one_step = (adv.gae(decay, adv.state_value)(batch)[acts] for decay in (1.0, 0.0))
    torch.testing.assert_close(whole, adv.to_go_minus(adv.state_value)(batch)[acts], rtol=0, atol=1e-14)
    torch.testing.assert_close(one_step, adv.temporal_difference(adv.state_value)(batch)[acts], rtol=0, atol=0)


PLAIN = [name for name in registered_problems() if (p := find_problem(name)).on_policy and p.plain_objective]
ON_POLICY = [f"{name}{theta}" for name in PLAIN for theta in ("", "@1")]


@pytest.mark.parametrize("name", ON_POLICY)
def test_all_actions_have_the_least_variance(name: str) -> None:
    """Below every unbiased entry that scores the sampled action alone, on every named problem.

    Where no context recurs in a row it has to be: ĝ[k] = 1[k is visited] x_k, and all actions replace x_k by E[x_k | s, t].
    Elsewhere steps covary, and it happens to be (the next test has a problem where it is not).
    """
    problem = find_problem(name)
    found = moments("all_action", problem)
    torch.testing.assert_close(found.mean, problem.gradient(), rtol=0, atol=1e-12)
    size = 1e-12 * max(1.0, moments("reinforce", problem).total_variance)
    others = ("reinforce", "reward_to_go", "baselined(value)", "baselined(optimal_state_joint)", "actor_critic", "gae")
    for other in others:
        assert found.total_variance <= moments(other, problem).total_variance + size, other


def test_all_actions_can_be_louder_than_a_critic() -> None:
    """Two steps, one context, p = π(a) = .4: the score of the first step cancels what the second varies with the state.

    After a, a pays δ = −(1−2p)/(p(1−p)); nothing else is paid but 4/3 for a at first, so that Q(a) − Q(b) = 1. In the
    logit difference: all actions, p(1−p)δ after a and 0 after b, variance p³(1−p)³δ². One-step critic: the first step adds
    (1−p)² or p², which makes both means equal; left is the second action after a: p · p(1−p) δ² (1−2p)².
    """
    p = 0.4
    delta_a = -(1 - 2 * p) / (p * (1 - p))
    first, after_a, after_b = range(3)
    transition = torch.zeros(3, 2, 3)
    transition[first, 0, after_a] = transition[first, 1, after_b] = 1.0
    transition[1:, :, first] = 1.0
    env = TabularMDP(transition, [[1 - p * delta_a, 0.0], [delta_a, 0.0], [0.0, 0.0]], [1.0, 0.0, 0.0], horizon=2)
    problem = Problem(env, [[math.log(p / (1 - p)), 0.0]], contexts=[0, 0, 0], group_size=1)
    loud, quiet = moments("all_action", problem), moments("actor_critic", problem)
    assert loud.total_variance == pytest.approx(2 * p**3 * (1 - p) ** 3 * delta_a**2, abs=1e-14)
    assert quiet.total_variance == pytest.approx(2 * p**2 * (1 - p) * delta_a**2 * (1 - 2 * p) ** 2, abs=1e-14)
    assert quiet.total_variance < loud.total_variance / 3


def test_all_actions_of_one_state_leave_nothing_to_chance() -> None:
    """One prompt, one step: ĝ is ∇J in every batch."""
    assert abs(moments("all_action", two_arms(0.9, group_size=1)).total_variance) < 1e-15


# -- other objectives


def pass_at_k(p: float, k: int) -> float:
    return 1 - (1 - p) ** k


def subsets_of_others(R: Sequence[float], i: int, k: int, *, over_others: bool) -> float:
    """k · mean over the (k−1)-subsets I of the rows but i, listed."""
    scores = []
    for I in itertools.combinations([j for j in range(len(R)) if j != i], k - 1):  # noqa: E741
        best = max(R[j] for j in I)
        scores.append(max(R[i], best) - (best if over_others else 0.0))
    return k * mean(scores)


@pytest.mark.parametrize("over_others", [False, True])
@pytest.mark.parametrize("k", [2, 3, 4, 5])
def test_every_set_of_k_is_scored_by_its_best(k: int, over_others: bool) -> None:
    """Two groups of five and six with ties, shuffled among each other, against the list of all subsets."""
    labels = torch.tensor([0, 1, 0, 1, 1, 0, 1, 0, 1, 0, 1])
    R = [0.3, 1.0, -0.5, 0.0, 1.0, 0.3, 2.0, 0.3, 1.0, 0.7, 0.0]
    batch = bandit(R, [0.0] * 11).trajectories.rows_as_batch().with_tensors({"group": labels})
    found = adv.expected_maximum(k, over_others=over_others)(batch).flatten().tolist()
    for group in (0, 1):
        rows = [i for i in range(11) if int(labels[i]) == group]
        own = [R[i] for i in rows]
        expected = [subsets_of_others(own, i, k, over_others=over_others) for i in range(len(own))]
        assert [found[i] for i in rows] == pytest.approx(expected, abs=1e-14)


@pytest.mark.parametrize("k", [2, 3, 4])
@pytest.mark.parametrize("successes", range(6))
def test_pkpo_on_right_and_wrong(successes: int, k: int) -> None:
    """n = 5: k/n for a success, (k/n) ρ(n−1, c, k−1) for a failure, ρ(n, c, k) = 1 − C(n−c, k)/C(n, k)."""
    n, c = 5, successes
    R = [1.0] * c + [0.0] * (n - c)
    batch = bandit(R, [0.0] * n).trajectories.rows_as_batch()
    batch = batch.with_tensors({"group": torch.zeros(n, dtype=torch.int64)})
    failure = 1 - math.comb(n - 1 - c, k - 1) / math.comb(n - 1, k - 1) if c < n else 0.0
    expected = [k / n] * c + [k / n * failure] * (n - c)
    assert (adv.expected_maximum(k)(batch).flatten() / n).tolist() == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("over_others", [False, True])
@pytest.mark.parametrize(("k", "G"), [(2, 2), (2, 5), (3, 3), (3, 5), (4, 5)])
def test_pkpo_ascends_pass_at_k(k: int, G: int, over_others: bool) -> None:
    """E ĝ = k(1−p)^{k−1} ∇p, whatever the group: a difference quotient of pass@k in p times ∇p."""
    e = from_coefficients(compose(adv.expected_maximum(k, over_others=over_others)), couples="group")
    p, h = chance_of_two_tokens(), 1e-6
    slope = (pass_at_k(p + h, k) - pass_at_k(p - h, k)) / (2 * h)
    problem = two_tokens(group_size=G)
    torch.testing.assert_close(moments(e, problem).mean, slope * problem.gradient(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("k", [2, 3])
def test_pkpo_ascends_the_expected_best_of_k(k: int) -> None:
    """Five rewards: ∇ Σ over k-tuples of Π π · max, by autograd; the two forms differ in variance alone."""
    R = [0.3, 1.0, -0.5, 0.0, 1.0]
    problem = bandit(R, [0.2, -0.4, 0.1, 0.5, 0.0], group_size=4)
    z = problem.logits.requires_grad_(True)
    pi = torch.softmax(z[0], -1)
    objective = sum(
        math.prod((pi[a] for a in arms), start=torch.ones(())) * max(R[a] for a in arms)
        for arms in itertools.product(range(5), repeat=k)
    )
    (expected,) = torch.autograd.grad(torch.as_tensor(objective), z)
    plain, less = (
        moments(from_coefficients(compose(adv.expected_maximum(k, over_others=x)), couples="group"), problem)
        for x in (False, True)
    )
    for found in (plain, less):
        torch.testing.assert_close(found.mean, expected, rtol=0, atol=1e-13)
    assert less.total_variance < plain.total_variance


OBJECTIVES: dict[str, Callable[[float, int], float]] = {
    # objective as a function of p, on groups of G
    "pkpo": lambda p, G: pass_at_k(p, 2),
    "pkpo(minus_one)": lambda p, G: pass_at_k(p, 2),
    "maxrl": lambda p, G: -math.fsum((1 - p) ** j / j for j in range(1, G + 1)),
    "maxrl(centered)": lambda p, G: -math.fsum((1 - p) ** j / j for j in range(1, G)),
    "best_of_n": lambda p, G: -math.fsum((1 - p) ** j / j for j in range(1, G)),
}


@pytest.mark.parametrize("G", [2, 3, 6])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_over_several_prompts_each_has_its_slope(name: str, G: int) -> None:
    """Two prompts, p = .3 and .8: E ĝ in the context of each is q κ(p) ∇p, κ a difference quotient of the objective."""
    start, chance = [0.4, 0.6], [0.3, 0.8]
    stay = [[[1.0, 0.0]] * 2, [[0.0, 1.0]] * 2]
    env = TabularMDP(stay, [[1.0, 0.0]] * 2, start, horizon=1)
    problem = Problem(env, [[math.log(p / (1 - p)), 0.0] for p in chance], group_size=G)
    found = moments(name, problem).mean
    h = 1e-6
    for s, (q, p) in enumerate(zip(start, chance, strict=True)):
        slope = (OBJECTIVES[name](p + h, G) - OBJECTIVES[name](p - h, G)) / (2 * h)
        assert float(found[s, 0]) == pytest.approx(q * slope * p * (1 - p), abs=1e-9)


@pytest.mark.parametrize("sizes", [(2,), (5,), (3, 2)])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_on_one_prompt_the_claim_is_its_slope(name: str, sizes: tuple[int, ...]) -> None:
    """κ of the claim, from the objective; groups of unequal size each in their share of the rows."""
    problem = two_tokens(groups=len(sizes), group_size=sizes)
    p, h = chance_of_two_tokens(), 1e-6
    slopes = [(OBJECTIVES[name](p + h, G) - OBJECTIVES[name](p - h, G)) / (2 * h) for G in sizes]
    expected = math.fsum(G * x for G, x in zip(sizes, slopes, strict=True)) / sum(sizes)
    (claim,) = (c for c in find_estimator(name).claims if c.applies(problem))
    assert claim.kind == "proportional"
    assert claim.scale_on(problem) == pytest.approx(expected, abs=1e-9)
