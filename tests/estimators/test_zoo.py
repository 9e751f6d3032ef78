"""The zoo, row by row against its formula in plain loops; then identities and numbers in closed form."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

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
from pgcheck.estimators.zoo import compose
from pgcheck.problem import Problem
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
    V: list[list[float]]
    group: list[int]
    gamma: float
    clock: DiscountClock
    side: dict[str, list]  # type: ignore[type-arg]

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

    def w(self, i: int, t: int) -> float:
        """w_{0:t} = Π_{k≤t} r_k."""
        return math.prod(self.ratio(i, k) for k in range(t + 1))

    def peers(self, i: int) -> list[int]:
        return [j for j in range(self.B) if self.group[j] == self.group[i]]

    def length(self, i: int) -> float:
        """|o_i|."""
        return sum(self.mask[i])

    @property
    def tokens(self) -> float:
        """Σ_i |o_i|."""
        return sum(self.length(i) for i in range(self.B))


def mean(xs: Sequence[float]) -> float:
    return math.fsum(xs) / len(xs)


def std(xs: Sequence[float]) -> float:
    """Population standard deviation."""
    return math.sqrt(mean([(x - mean(xs)) ** 2 for x in xs]))


def clipped_surrogate_slope(r: float, A: float) -> float:
    """∂ min(r A, clip(r, .8, 1.2) A) / ∂ log π = r A where the unclipped side is the smaller, else 0."""
    clip = min(max(r, 0.8), 1.2)
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


def everyone(b: Rows) -> range:
    return range(b.B)


# c[i,t] at a policy position (i, t)
FORMULAS: dict[str, Callable[[Rows, int, int], float]] = {
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
        side={
            "action_value": draw(B, T) * mask,
            "continuation_value": draw(B, T) * mask,
            "optimal_constant": draw(1).expand(B).clone(),
            "optimal_state": draw(B, T) * mask,
            "optimal_state_joint": draw(B, T) * mask,
        },
    )


def as_rows(batch: Batch) -> Rows:
    return Rows(
        state=batch.state.tolist(),
        r=batch.reward.tolist(),
        mask=batch.mask.tolist(),
        logp=batch.logp.tolist(),
        old=batch.behavior_logp.tolist(),
        V=batch.value.tolist(),
        group=batch.group.tolist(),
        gamma=batch.discount,
        clock=batch.discount_clock,
        side={name: x.tolist() for name, x in batch.side.items()},
    )


def by_formula(name: str, batch: Batch) -> Tensor:
    b = as_rows(batch)
    return torch.tensor(
        [[FORMULAS[name](b, i, t) if b.mask[i][t] else 0.0 for t in range(b.T)] for i in range(b.B)],
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
@pytest.mark.parametrize("G", range(2, 7))
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
