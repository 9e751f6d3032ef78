"""Small random worlds in plain Python, and what happens in them worked out by recursion over the tree of rollouts.

A `World` is nested tuples of fractions: nothing of torch, nothing of the package. Its policy is given by integer weights,
π(a | k) = w[k][a] / Σ w[k], so that J and every probability are exact fractions; the package gets the logits log w.

Guarantee: `walk`, `oracle_value`, `oracle_gradient` and `state_value` share no code with `pgcheck`.
"""

from __future__ import annotations

import cmath
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from random import Random
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from pgcheck.envs.tabular import TabularMDP
from pgcheck.problem import Problem
from pgcheck.trajectories import Paths

Numbers = tuple[Any, ...]
DISCOUNTS = (Fraction(0), Fraction(1, 2), Fraction(9, 10), Fraction(1))


@dataclass(frozen=True)
class World:
    """A finite MDP, two policies and a sampling plan."""

    transition: Numbers  # [S][A][S]
    reward: Numbers  # [S][A] or [S][A][S]
    initial: Numbers  # [S]
    horizon: int
    discount: Fraction
    clock: str
    terminal: tuple[int, ...]
    observation: tuple[int, ...]
    contexts: tuple[int, ...] | None
    weights: Numbers  # [K][A] of the target policy
    behavior: Numbers | None  # [K][A]
    sizes: tuple[int, ...]

    @property
    def states(self) -> int:
        return len(self.initial)

    @property
    def actions(self) -> int:
        return len(self.transition[0])

    def context(self, state: int) -> int:
        return state if self.contexts is None else self.contexts[state]

    def paid(self, state: int, action: int, following: int) -> Fraction:
        r = self.reward[state][action]
        return r[following] if isinstance(r, tuple) else r

    def env(self) -> TabularMDP:
        return TabularMDP(
            floats(self.transition),
            floats(self.reward),
            floats(self.initial),
            horizon=self.horizon,
            discount=float(self.discount),
            terminal=self.terminal,
            observation=self.observation,
            discount_clock=self.clock,  # type: ignore[arg-type]
        )

    def problem(self, policy: Any = None) -> Problem:
        """With the table log w, or with another policy over the same contexts."""
        return Problem(
            self.env(),
            logs(self.weights) if policy is None else policy,
            behavior_logits=None if self.behavior is None else logs(self.behavior),
            groups=len(self.sizes),
            group_size=self.sizes,
            contexts=self.contexts,
        )

    def policy(self) -> list[list[Fraction]]:
        """π(a | k), `[K][A]`."""
        return shares(self.weights)


def floats(x: Any) -> Any:
    """Nested tuples of fractions as nested lists of floats."""
    return [floats(y) for y in x] if isinstance(x, tuple) else float(x)


def logs(weights: Numbers) -> list[list[float]]:
    return [[math.log(w) for w in row] for row in weights]


def shares(weights: Numbers) -> list[list[Fraction]]:
    return [[Fraction(w, sum(row)) for w in row] for row in weights]


# -- what happens in a world


@dataclass(frozen=True)
class Rollout:
    """One rollout: its positions (state, action or None, reward), exponents of γ, and chance given the start."""

    start: int  # number of the start state among those of positive probability
    steps: tuple[tuple[int, int | None, Fraction], ...]
    env_probability: Fraction
    probability: Any  # given the start, under the policy asked for
    exponents: tuple[int, ...]

    def seen(self) -> tuple[Any, ...]:
        """What policy and estimator see of it: no state where nobody acts."""
        return (self.start, tuple((-1, -1, r) if a is None else (s, a, r) for s, a, r in self.steps))

    def to_go(self, discount: Any, t: int = 0) -> Any:
        """Σ_{k≥t} γ^{e_k − e_t} r_k."""
        later = range(t, len(self.steps))
        e = self.exponents
        return sum((discount ** (e[k] - e[t]) * self.steps[k][2] for k in later), Fraction(0))

    def discounted(self, discount: Any) -> Any:
        """R = Σ_t γ^{e_t} r_t."""
        return sum((discount**e * r for e, (_, _, r) in zip(self.exponents, self.steps, strict=True)), Fraction(0))


def walk(world: World, policy: Sequence[Sequence[Any]]) -> list[Rollout]:
    """Every rollout of positive environment probability, not merged; by recursion."""
    found: list[Rollout] = []

    def go(start: int, s: int, steps: tuple[Any, ...], exponents: tuple[int, ...], env: Fraction, chance: Any) -> None:
        if s in world.terminal or len(steps) == world.horizon:
            found.append(Rollout(start, steps, env, chance, exponents))
            return
        nobody = s in world.observation
        acted = sum(a is not None for _, a, _ in steps) + (not nobody)
        exponent = len(steps) if world.clock == "position" else max(acted - 1, 0)
        for a in [None] if nobody else range(world.actions):
            for s2, q in enumerate(world.transition[s][a or 0]):
                if q > 0:
                    taken = chance if a is None else chance * policy[world.context(s)][a]
                    step = (s, a, world.paid(s, a or 0, s2))
                    go(start, s2, (*steps, step), (*exponents, exponent), env * q, taken * q)

    for number, s in enumerate(s for s, q in enumerate(world.initial) if q > 0):
        go(number, s, (), (), Fraction(1), Fraction(1))
    return found


def start_chances(world: World) -> list[Fraction]:
    return [q for q in world.initial if q > 0]


def oracle_value(world: World, policy: Sequence[Sequence[Any]]) -> Any:
    """J = Σ_s₀ q(s₀) Σ_τ p(τ | s₀) R(τ); a fraction if `policy` is."""
    q = start_chances(world)
    return sum(q[x.start] * x.probability * x.discounted(world.discount) for x in walk(world, policy))


def oracle_gradient(world: World) -> Tensor:
    """∇J by the complex step: ∂J/∂z = Im J(z + ih) / h. J is analytic in z, so the error is of order h² = 1e-60."""
    z, h = logs(world.weights), 1e-30
    out = torch.zeros(len(z), len(z[0]), dtype=torch.float64)
    for k in range(len(z)):
        for a in range(len(z[0])):
            policy = []
            for j, row in enumerate(z):
                e = [cmath.exp(x + (1j * h if (j, b) == (k, a) else 0)) for b, x in enumerate(row)]
                policy.append([x / sum(e) for x in e])
            out[k, a] = (_complex_value(world, policy) / h).imag
    return out


def _complex_value(world: World, policy: Sequence[Sequence[complex]]) -> complex:
    """J by recursion, a sum over the tree without listing it; complex floats throughout."""
    gamma = float(world.discount)

    def below(s: int, left: int, t: int, acted: int) -> complex:
        if s in world.terminal or left == 0:
            return 0j
        nobody = s in world.observation
        now = acted + (not nobody)
        weight = gamma ** (t if world.clock == "position" else max(now - 1, 0))
        total = 0j
        for a in [None] if nobody else range(world.actions):
            chance = 1.0 if a is None else policy[world.context(s)][a]
            for s2, q in enumerate(world.transition[s][a or 0]):
                if q > 0:
                    r = float(world.paid(s, a or 0, s2))
                    total += chance * float(q) * (weight * r + below(s2, left - 1, t + 1, now))
        return total

    return sum((float(q) * below(s, world.horizon, 0, 0) for s, q in enumerate(world.initial) if q > 0), 0j)


def to_go_law(world: World, policy: Sequence[Sequence[Any]], state: int, left: int) -> dict[Any, Any]:
    """Law of Ĝ from an acting `state` with `left` positions to go: {value: probability}."""

    def below(s: int, left: int) -> dict[Any, Any]:
        if s in world.terminal or left == 0:
            return {Fraction(0): Fraction(1)}
        nobody = s in world.observation
        law: dict[Any, Any] = {}
        for a in [None] if nobody else range(world.actions):
            chance = 1 if a is None else policy[world.context(s)][a]
            for s2, q in enumerate(world.transition[s][a or 0]):
                # someone has acted before (in `state`): γ^1 on every position, or on every action after it
                counts = world.clock == "position" or s2 not in world.observation
                gamma = world.discount if counts else Fraction(1)
                for g, p in (below(s2, left - 1) if q > 0 else {}).items():
                    value = world.paid(s, a or 0, s2) + gamma * g
                    law[value] = law.get(value, Fraction(0)) + chance * q * p
        return law

    return below(state, left)


def mean_of(law: dict[Any, Any]) -> Any:
    return sum(x * p for x, p in law.items())


def variance_of(law: dict[Any, Any]) -> Any:
    return sum(x * x * p for x, p in law.items()) - mean_of(law) ** 2


def state_value(world: World, policy: Sequence[Sequence[Any]], state: int, left: int) -> Any:
    """V(s) with `left` positions to go, by the backward recursion; s acts."""
    return mean_of(to_go_law(world, policy, state, left))


def score_of(world: World, rollout: Rollout) -> list[Tensor]:
    """∇ log π(a_t | k_t) in logit space of each position, `[K, A]`, zero where nobody acts."""
    pi = torch.tensor(floats(tuple(tuple(row) for row in world.policy())), dtype=torch.float64)
    out = []
    for s, a, _ in rollout.steps:
        step = torch.zeros_like(pi)
        if a is not None:
            step[world.context(s)] -= pi[world.context(s)]
            step[world.context(s), a] += 1.0
        out.append(step)
    return out


# -- random worlds


def random_world(
    seed: int,
    *,
    states: int = 3,
    actions: int = 2,
    horizon: int = 3,
    branches: int = 2,
    discount: Fraction = Fraction(9, 10),
    clock: str = "position",
    terminal: bool = True,
    observation: bool = True,
    wide_reward: bool = False,
    shared: bool = False,
    off_policy: bool = False,
    sizes: tuple[int, ...] = (2, 2),
) -> World:
    """A world of this shape with fractions drawn from `seed`; state 0 acts and is a start."""
    rng = Random(seed)

    def law(support: int, through: int | None) -> tuple[Fraction, ...]:
        chosen = rng.sample(range(states), min(support, states))
        if through is not None and through not in chosen:
            chosen[0] = through
        raw = {x: rng.randint(1, 4) for x in chosen}
        return tuple(Fraction(raw.get(x, 0), sum(raw.values())) for x in range(states))

    over = (states - 1,) if terminal and states > 1 else ()
    free = states - 1 - len(over)
    looks = (
        tuple(range(1, 1 + min(free, 2))) if observation and free else ()
    )  # two, so that what was done before matters
    transition, reward = [], []
    for s in range(states):
        # state 0 leads to the observations, each by its action, and they lead back: act, a gap in the row, act
        through = [looks[a] if s == 0 and a < len(looks) else 0 if s in looks else None for a in range(actions)]
        rows = [law(rng.randint(1, branches), x) for x in through]
        # few distinct values, so that rollouts tie and merge
        pays: list[Any] = [tuple(Fraction(rng.randint(-4, 4), 2) for _ in range(states)) for _ in range(actions)]
        if not wide_reward:
            pays = [pay[0] for pay in pays]
        if s in looks:
            rows, pays = [rows[0]] * actions, [pays[0]] * actions
        transition.append(tuple(rows))
        reward.append(tuple(pays))
    begin = [0] + [s for s in range(1, states) if s not in over and rng.random() < 0.5]
    raw = {s: rng.randint(1, 3) for s in begin}
    contexts = tuple(rng.randrange(2) for _ in range(states)) if shared else None
    number = states if contexts is None else max(contexts) + 1

    def weights() -> Numbers:
        return tuple(tuple(rng.randint(1, 5) for _ in range(actions)) for _ in range(number))

    return World(
        transition=tuple(transition),
        reward=tuple(reward),
        initial=tuple(Fraction(raw.get(s, 0), sum(raw.values())) for s in range(states)),
        horizon=horizon,
        discount=discount,
        clock=clock,
        terminal=over,
        observation=looks,
        contexts=contexts,
        weights=weights(),
        behavior=weights() if off_policy else None,
        sizes=sizes,
    )


@st.composite
def worlds(
    draw: st.DrawFn, *, max_states: int = 4, max_actions: int = 3, max_horizon: int = 3, max_branches: int = 2
) -> World:
    """Worlds with every feature on or off; at most (actions · branches)^horizon rollouts from a start."""
    return random_world(
        draw(st.integers(0, 10**6)),
        # the largest first and twice: small worlds have few features
        states=draw(st.sampled_from((max_states, *range(max_states, 0, -1)))),
        actions=draw(st.sampled_from((2, *range(max_actions, 0, -1)))),
        horizon=draw(st.sampled_from((max_horizon, *range(max_horizon, 0, -1)))),
        branches=draw(st.sampled_from((max_branches, *range(max_branches, 0, -1)))),
        discount=draw(st.sampled_from(DISCOUNTS)),
        clock=draw(st.sampled_from(("position", "action"))),
        terminal=draw(st.sampled_from((True, True, False))),
        observation=draw(st.sampled_from((True, True, False))),
        wide_reward=draw(st.booleans()),
        shared=draw(st.booleans()),
        off_policy=draw(st.booleans()),
        sizes=draw(st.sampled_from(((1,), (3,), (2, 2), (1, 3, 2)))),
    )


def return_scale(world: World) -> float:
    """An upper bound of |R|, at least 1: what absolute tolerances are multiples of."""
    flat = [abs(r) for row in world.reward for pay in row for r in (pay if isinstance(pay, tuple) else (pay,))]
    return max(1.0, float(max(flat)) * world.horizon)


# -- hand-made ones


def two_arm_env(**changes: Any) -> TabularMDP:
    """One state, two actions that pay 1 and 0, one position."""
    given: dict[str, Any] = {
        "transition": [[[1.0], [1.0]]],
        "reward": [[1.0, 0.0]],
        "initial": [1.0],
        "horizon": 1,
    }
    return TabularMDP(**(given | changes))


def two_state_env(**changes: Any) -> TabularMDP:
    """States 0 and 1 act, 2 is terminal; every action moves on by one state; action a in state s pays s + a."""
    move = [[[0.0, 1.0, 0.0]] * 2, [[0.0, 0.0, 1.0]] * 2, [[0.0, 0.0, 1.0]] * 2]
    given: dict[str, Any] = {
        "transition": move,
        "reward": [[0.0, 1.0], [1.0, 2.0], [0.0, 0.0]],
        "initial": [1.0, 0.0, 0.0],
        "horizon": 2,
        "terminal": [2],
    }
    return TabularMDP(**(given | changes))


def two_arm_columns(**changes: Any) -> dict[str, Any]:
    """Columns of `Paths` of the two-armed bandit: rollout n takes action n and is paid 1 − n."""
    given: dict[str, Any] = {
        "start": [0, 0],
        "state": [[0], [0]],
        "context": [[0], [0]],
        "action": [[0], [1]],
        "reward": [[1.0], [0.0]],
        "mask": [[1.0], [1.0]],
        "env_probability": [1.0, 1.0],
        "start_probability": [1.0],
    }
    return given | changes


def two_arm_paths(**changes: Any) -> Paths:
    return Paths(**two_arm_columns(**changes))
