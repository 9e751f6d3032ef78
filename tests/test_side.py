"""Side tables against derivations of their own: action values, optimal baselines, fresh continuations."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from pgcheck.envs.tabular import TabularMDP
from pgcheck.errors import BudgetError, UsageError
from pgcheck.problem import Problem
from pgcheck.side import (
    ActionValues,
    AllActionValues,
    Continuations,
    GreedyReturn,
    OptimalBaselines,
    WrongValues,
    score,
)
from pgcheck.trajectories import Paths, Trajectories
from tests.worlds import (
    DISCOUNTS,
    World,
    mean_of,
    random_world,
    return_scale,
    score_of,
    start_chances,
    to_go_law,
    two_arm_columns,
    two_arm_env,
    variance_of,
    walk,
    worlds,
)

Baseline = Callable[[int, int], float]  # b(s, t)


# -- variances by the tree, not by the table


def columns_by_visit(table: Trajectories, column: Tensor) -> dict[tuple[int, int], float]:
    """A column that depends on (state, t) only, as a dictionary; checks that it does, and is 0 where nobody acts."""
    p, out = table.paths, {}
    assert column.shape == p.reward.shape
    assert not bool(column[p.mask == 0].any())
    for n, t in (p.mask > 0).nonzero().tolist():
        at = (int(p.state[n, t]), t)
        assert out.setdefault(at, float(column[n, t])) == pytest.approx(float(column[n, t]), abs=1e-12)
    return out


class Tree:
    """Every rollout with its chance (start included), scores, γ^t and Ĝ_t, as floats from fractions."""

    def __init__(self, world: World) -> None:
        gamma = world.discount
        self.rollouts = walk(world, world.policy())
        self.chance = [float(start_chances(world)[x.start] * x.probability) for x in self.rollouts]
        self.scores = [score_of(world, x) for x in self.rollouts]
        self.weights = [[float(gamma**e) for e in x.exponents] for x in self.rollouts]
        self.to_go = [[float(x.to_go(gamma, t)) for t in range(len(x.steps))] for x in self.rollouts]

    def second_moment(self, baseline: Baseline) -> float:
        """E ‖Σ_t γ^t (Ĝ_t − b(s_t, t)) ∇log π_t‖²; less ‖∇J‖², which no b changes, it is the total variance."""
        total = 0.0
        for x, p, s, w, g in zip(self.rollouts, self.chance, self.scores, self.weights, self.to_go, strict=True):
            estimate = sum(w[t] * (g[t] - baseline(x.steps[t][0], t)) * s[t] for t in range(len(x.steps)))
            total += p * float((estimate**2).sum())
        return total

    def whole_return(self, b: float) -> tuple[Tensor, float]:
        """E ĝ and E ‖ĝ‖² of ĝ = (R − b) S, S = Σ_t ∇log π_t."""
        mean, second = torch.zeros_like(self.scores[0][0]), 0.0
        for p, s, g in zip(self.chance, self.scores, self.to_go, strict=True):
            estimate = (g[0] - b) * sum(s)
            mean = mean + p * estimate
            second += p * float((estimate**2).sum())
        return mean, second

    def norm(self) -> float:
        """E ‖S‖²."""
        return sum(p * float((sum(s) ** 2).sum()) for p, s in zip(self.chance, self.scores, strict=True))


@given(worlds(max_horizon=2))
def test_scores(world: World) -> None:
    """∇ log π(a|k) = 1[a] − π(·|k) in the context's row, against the tree; E score = 0 at every position."""
    table = world.problem().trajectories
    found = score(table)
    assert found.shape == (len(table), table.paths.steps, table.contexts * table.actions)
    by_history = {x.seen(): s for x, s in zip(walk(world, world.policy()), Tree(world).scores, strict=True)}
    p = table.paths
    for n in range(len(table)):
        columns = (p.state[n].tolist(), p.action[n].tolist(), p.reward[n].tolist())
        steps = tuple((s, a, Fraction(r)) for s, a, r in list(zip(*columns, strict=True))[: int(p.end[n])])
        expected = by_history[int(p.start[n]), steps]
        for t in range(p.steps):
            step = expected[t].flatten() if t < len(expected) else torch.zeros_like(found[n, t])
            torch.testing.assert_close(found[n, t], step, rtol=0, atol=1e-14)
    weight = table.probability * p.start_probability[p.start]
    mean = (weight.reshape(-1, 1, 1) * found).sum(0)
    torch.testing.assert_close(mean, torch.zeros_like(mean), rtol=0, atol=1e-14)


# -- action values


@given(worlds())
def test_action_values(world: World) -> None:
    """Q(s, a, t) = Σ_s' P(s'|s,a) (r + γ V(s', t+1)): the law of Ĝ from s under the policy that is certain of a."""
    table = ActionValues()(world.problem().trajectories)
    p, q = table.paths, table.side["action_value"]
    assert q.shape == p.reward.shape
    assert not bool(q[p.mask == 0].any())
    memo: dict[tuple[int, int, int], float] = {}
    for n, t in (p.mask > 0).nonzero().tolist():
        at = (int(p.state[n, t]), int(p.action[n, t]), t)
        if at not in memo:
            memo[at] = float(action_value(world, *at))
        assert float(q[n, t]) == pytest.approx(memo[at], abs=1e-12 * return_scale(world))


def action_value(world: World, state: int, action: int, t: int) -> Fraction:
    total = Fraction(0)
    for s2, chance in enumerate(world.transition[state][action]):
        if chance > 0:
            counts = world.clock == "position" or s2 not in world.observation
            gamma = world.discount if counts else Fraction(1)
            law = to_go_law(world, world.policy(), s2, world.horizon - t - 1)
            total += chance * (world.paid(state, action, s2) + gamma * mean_of(law))
    return total


@given(worlds())
def test_values_average_action_values(world: World) -> None:
    """Σ_a π(a|s) Q(s, a, t) = V(s, t), on the table alone."""
    table = ActionValues()(world.problem().trajectories)
    p, pi = table.paths, torch.softmax(table.logits, -1)
    mean: dict[Any, dict[int, float]] = defaultdict(dict)
    value: dict[Any, float] = {}
    for n, t in (p.mask > 0).nonzero().tolist():
        at, a = (int(p.state[n, t]), t), int(p.action[n, t])
        mean[at][a] = float(pi[p.context[n, t], a] * table.side["action_value"][n, t])
        value[at] = float(table.value[n, t])
    for at, v in value.items():
        assert sum(mean[at].values()) == pytest.approx(v, abs=1e-12 * return_scale(world))


@given(worlds())
def test_values_of_all_actions(world: World) -> None:
    """Q(s, a, t) of every action at every act, from the tree; the taken one is column `action_value`."""
    table = AllActionValues()(ActionValues()(world.problem().trajectories))
    p, q = table.paths, table.side["all_action_values"]
    assert q.shape == (*p.reward.shape, world.actions)
    assert not bool(q[p.mask == 0].any())
    memo: dict[tuple[int, int, int], float] = {}
    for n, t in (p.mask > 0).nonzero().tolist():
        for a in range(world.actions):
            at = (int(p.state[n, t]), a, t)
            if at not in memo:
                memo[at] = float(action_value(world, *at))
            assert float(q[n, t, a]) == pytest.approx(memo[at], abs=1e-12 * return_scale(world))
    taken = q.gather(-1, p.action.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(taken, table.side["action_value"], rtol=0, atol=1e-14 * return_scale(world))


# -- wrong values, and the greedy policy


@given(worlds(), st.sampled_from([0.0, 7.0]))
def test_wrong_values(world: World, after_end: float) -> None:
    """V plus an error in (state, t) alone, wherever somebody may ask; a constant after the end."""
    table = WrongValues(size=0.25, after_end=after_end)(world.problem().trajectories)
    p, found = table.paths, table.side["wrong_value"]
    assert found.shape == (len(table), p.steps + 1)
    error: dict[tuple[int, int], float] = {}
    for n, end in enumerate(p.end.tolist()):
        assert found[n, end:].tolist() == [after_end] * (p.steps + 1 - end)
        for t in range(end):
            at, e = (int(p.state[n, t]), t), float(found[n, t] - table.value[n, t])
            assert error.setdefault(at, e) == pytest.approx(e, abs=1e-12 * return_scale(world))
            assert e != 0
    assert len({round(e, 9) for e in error.values()}) == len(error)


def test_wrong_values_are_the_same_every_time() -> None:
    """A fixed error: normal with the standard deviation asked for, whatever the global seed."""
    table = random_world(3).problem().trajectories
    once = WrongValues()(table).side["wrong_value"]
    torch.manual_seed(1)
    assert torch.equal(WrongValues()(table).side["wrong_value"], once)
    doubled = WrongValues(size=1.0)(table).side["wrong_value"] - table.value
    torch.testing.assert_close(doubled, 2 * (once - table.value), rtol=0, atol=1e-13)


@given(worlds())
def test_the_greedy_return(world: World) -> None:
    """E[R | start] by walking the tree under the policy that is certain of the likeliest action."""
    table = GreedyReturn()(world.problem().trajectories)
    greedy = []
    for row in world.policy():
        best = row.index(max(row))
        greedy.append([Fraction(a == best) for a in range(world.actions)])
    expected: dict[int, Fraction] = defaultdict(Fraction)
    for x in walk(world, greedy):
        expected[x.start] += x.probability * x.discounted(world.discount)
    for start, found in zip(table.paths.start.tolist(), table.side["greedy_return"].tolist(), strict=True):
        assert found == pytest.approx(float(expected[start]), abs=1e-12 * return_scale(world))


def test_of_two_likeliest_actions_the_first_is_greedy() -> None:
    """Two even arms that pay 1 and 0: the greedy return is 1."""
    table = GreedyReturn()(Problem(two_arm_env(), [[0.0, 0.0]]).trajectories)
    assert table.side["greedy_return"].tolist() == [1.0, 1.0]


# -- optimal baselines


@settings(max_examples=40)
@given(worlds(max_horizon=2), st.sampled_from([-2.0, 0.3, 1.0]))
def test_the_optimal_constant(world: World, shift: float) -> None:
    """Var(b) = Var(b*) + E‖S‖² (b − b*)² exactly, and E ĝ does not depend on b."""
    table = OptimalBaselines()(world.problem().trajectories)
    column = table.side["optimal_constant"]
    assert column.shape == (len(table),)
    best = float(column[0])
    assert bool((column == best).all())
    tree, size = Tree(world), return_scale(world) ** 2
    mean, least = tree.whole_return(best)
    moved_mean, moved = tree.whole_return(best + shift)
    torch.testing.assert_close(mean, moved_mean, rtol=0, atol=1e-12 * size)
    assert moved == pytest.approx(least + tree.norm() * shift**2, abs=1e-11 * size)


def test_the_optimal_constant_by_hand() -> None:
    """Two arms, p = π(0) = 3/4, R = 1[a = 0]. ‖S‖² = 2(1−p)² or 2p²: b* = p(1−p)²/(p(1−p)² + (1−p)p²) = 1 − p."""
    table = OptimalBaselines()(Problem(two_arm_env(), [[torch.tensor(3.0).double().log(), 0.0]]).trajectories)
    for name in ("optimal_constant", "optimal_state", "optimal_state_joint"):
        torch.testing.assert_close(table.side[name].flatten(), torch.full((2,), 0.25).double(), rtol=0, atol=1e-14)


@given(worlds(max_horizon=2))
def test_the_optimal_state_baseline(world: World) -> None:
    """b(s, t) = E[‖s_t‖² Ĝ_t | s] / E[‖s_t‖² | s]; ‖s_t‖² is a function of (s, a), so Q stands for Ĝ_t."""
    table = OptimalBaselines()(world.problem().trajectories)
    found = columns_by_visit(table, table.side["optimal_state"])
    for (s, t), b in found.items():
        pi = world.policy()[world.context(s)]
        norm = [
            (1 - pi[a]) ** 2 + sum(pi[c] ** 2 for c in range(world.actions) if c != a) for a in range(world.actions)
        ]
        bottom = sum(pi[a] * norm[a] for a in range(world.actions))
        top = sum(pi[a] * norm[a] * action_value(world, s, a, t) for a in range(world.actions) if norm[a] > 0)
        assert b == pytest.approx(float(top / bottom) if bottom > 0 else 0.0, abs=1e-11 * return_scale(world))


@settings(max_examples=40)
@given(worlds(max_horizon=3, max_actions=2, max_states=3), st.integers(0, 1000))
def test_the_joint_baseline_has_the_least_variance(world: World, seed: int) -> None:
    """No b(s, t) does better: not value, constant, optimal_state or none, and no perturbation in any direction."""
    table = OptimalBaselines()(world.problem().trajectories)
    joint = columns_by_visit(table, table.side["optimal_state_joint"])
    others = {
        "value": columns_by_visit(table, table.value[:, :-1] * table.paths.mask),
        "optimal_state": columns_by_visit(table, table.side["optimal_state"]),
        "optimal_constant": dict.fromkeys(joint, float(table.side["optimal_constant"][0])),
        "mean return": dict.fromkeys(joint, world.problem().value()),
        "none": dict.fromkeys(joint, 0.0),
    }
    generator = torch.Generator().manual_seed(seed)
    for scale in (1e-3, 1.0):
        noise = torch.randn(len(joint), generator=generator, dtype=torch.float64).tolist()
        others[f"perturbed by {scale}"] = {at: b + scale * x for (at, b), x in zip(joint.items(), noise, strict=True)}
    tree, slack = Tree(world), 1e-11 * return_scale(world) ** 2
    least = tree.second_moment(lambda s, t: joint.get((s, t), 0.0))
    for name, b in others.items():
        assert least <= tree.second_moment(lambda s, t, b=b: b.get((s, t), 0.0)) + slack, name


@settings(max_examples=30)
@given(worlds(max_horizon=2, max_actions=2, max_states=3), st.integers(0, 1000))
def test_the_joint_baseline_is_a_stationary_point(world: World, seed: int) -> None:
    """V is quadratic, so at its minimum V(b* + δ) = V(b* − δ) for every δ, however large."""
    table = OptimalBaselines()(world.problem().trajectories)
    joint = columns_by_visit(table, table.side["optimal_state_joint"])
    noise = torch.randn(len(joint), generator=torch.Generator().manual_seed(seed), dtype=torch.float64).tolist()
    delta = dict(zip(joint, noise, strict=True))
    tree = Tree(world)
    up, down = (
        tree.second_moment(lambda s, t, sign=sign: joint.get((s, t), 0.0) + sign * delta.get((s, t), 0.0))
        for sign in (1.0, -1.0)
    )
    assert up == pytest.approx(down, abs=1e-10 * return_scale(world) ** 2)


def test_one_action_has_nothing_to_reduce() -> None:
    """π = 1, so ∇log π = 0: E‖S‖² = 0 and every baseline is 0 rather than 0/0."""
    env = two_arm_env(transition=[[[1.0]]], reward=[[2.0]], horizon=2)
    table = OptimalBaselines()(Problem(env, [[0.4]]).trajectories)
    for name in ("optimal_constant", "optimal_state", "optimal_state_joint"):
        assert not bool(table.side[name].any())


def test_baselines_where_the_policy_never_acts() -> None:
    """No position, no baseline: a `UsageError`, or columns of zeros; not an error of torch."""
    env = two_arm_env(reward=[[1.0, 1.0]], observation=[0])
    try:
        table = OptimalBaselines()(Problem(env, [[0.0, 0.0]]).trajectories)
    except UsageError:
        return
    assert not bool(table.side["optimal_state_joint"].any())


# -- continuations


@settings(max_examples=30)
@given(worlds(max_states=3, max_actions=2, max_horizon=2), st.sampled_from([1, 2, 3]))
def test_continuations(world: World, draws: int) -> None:
    """In every row and at every act: E V̂ = V(s, t), Var V̂ = Var(Ĝ_t | s) / K; V̂'s of a row are independent."""
    plain = world.problem().trajectories
    plain = plain.with_side(row=torch.arange(len(plain), dtype=torch.float64))
    try:
        table = Continuations(draws)(plain)
    except BudgetError:
        assume(False)
    hat, source, scale = table.side["continuation_value"], table.side["row"].long(), return_scale(world)
    assert not bool(hat[table.paths.mask == 0].any())
    torch.testing.assert_close(table.paths.reward, plain.paths.reward[source], rtol=0, atol=0)
    for name in ("probability", "behavior_probability"):
        total = torch.zeros_like(plain.probability).index_add(0, source, getattr(table, name))
        torch.testing.assert_close(total, getattr(plain, name), rtol=0, atol=1e-12)
    chance = table.probability / plain.probability[source]  # of the draws, given the row

    def given_row(x: Tensor) -> Tensor:
        shape = (len(plain), *x.shape[1:])
        return torch.zeros(shape, dtype=x.dtype).index_add(0, source, chance.reshape(-1, *[1] * (x.dim() - 1)) * x)

    mean, square = given_row(hat), given_row(hat**2)
    memo: dict[tuple[int, int], tuple[float, float]] = {}
    for n, t in (plain.paths.mask > 0).nonzero().tolist():
        at = (int(plain.paths.state[n, t]), t)
        if at not in memo:
            law = to_go_law(world, world.policy(), at[0], world.horizon - t)
            memo[at] = float(mean_of(law)), float(variance_of(law))
        expected, variance = memo[at]
        assert float(mean[n, t]) == pytest.approx(expected, abs=1e-11 * scale)
        assert float(square[n, t] - mean[n, t] ** 2) == pytest.approx(variance / draws, abs=1e-10 * scale**2)
    if hat.shape[1] == 2:
        together = given_row(hat[:, 0] * hat[:, 1])
        torch.testing.assert_close(together, mean[:, 0] * mean[:, 1], rtol=0, atol=1e-11 * scale**2)


@settings(max_examples=20)
@given(worlds(max_states=3, max_actions=2, max_horizon=2))
def test_one_continuation_has_the_law_of_the_rest_of_the_rollout(world: World) -> None:
    """K = 1: V̂(s, t) takes each value of Ĝ_t with its probability, not only the right mean and variance."""
    plain = world.problem().trajectories
    plain = plain.with_side(row=torch.arange(len(plain), dtype=torch.float64))
    table = Continuations()(plain)
    n = 0  # every row has the same marginals at the same visit; the first will do
    here = table.side["row"] == n
    chance = (table.probability / plain.probability[n])[here].tolist()
    for t in range(plain.paths.steps):
        if plain.paths.mask[n, t] > 0:
            found: dict[float, float] = defaultdict(float)
            for v, q in zip(table.side["continuation_value"][here, t].tolist(), chance, strict=True):
                found[round(v, 9)] += q
            expected: dict[float, float] = defaultdict(float)
            for v, q in to_go_law(world, world.policy(), int(plain.paths.state[n, t]), world.horizon - t).items():
                expected[round(float(v), 9) + 0.0] += float(q)
            assert dict(found) == pytest.approx(dict(expected), abs=1e-12)


def test_two_continuations_by_hand() -> None:
    """A fair coin, K = 2: V̂ ∈ {0, 1/2, 1} with chances 1/4, 1/2, 1/4, beside each of the two rollouts."""
    table = Continuations(2)(Problem(two_arm_env(), [[0.0, 0.0]]).trajectories)
    for action in (0, 1):
        rows = table.paths.action[:, 0] == action
        hat, p = table.side["continuation_value"][rows, 0].tolist(), table.probability[rows].tolist()
        assert dict(zip(hat, p, strict=True)) == pytest.approx({0.0: 1 / 8, 0.5: 1 / 4, 1.0: 1 / 8}, abs=1e-15)


def test_continuations_follow_the_target_policy() -> None:
    """Off-policy, the row is the behaviour policy's, the draws are the target's."""
    logits, other = [[0.0, 0.0]], [[torch.tensor(3.0).double().log(), 0.0]]
    table = Continuations()(Problem(two_arm_env(), logits, behavior_logits=other).trajectories)
    joint = {
        (int(a), float(v)): float(p)
        for a, v, p in zip(
            table.paths.action[:, 0], table.side["continuation_value"][:, 0], table.behavior_probability, strict=True
        )
    }
    expected = {(0, 1.0): 3 / 8, (0, 0.0): 3 / 8, (1, 1.0): 1 / 8, (1, 0.0): 1 / 8}
    assert joint == pytest.approx(expected, abs=1e-14)


def test_continuations_of_a_table_that_was_split_before() -> None:
    """Other columns survive the split, and the second split still has the law of Ĝ."""
    once = Continuations(2)(ActionValues()(random_world(6, horizon=2).problem().trajectories))
    assert once.side["action_value"].shape == once.side["continuation_value"].shape
    twice = Continuations(1)(once)
    start = torch.zeros_like(twice.paths.start_probability).index_add(0, twice.paths.start, twice.probability)
    torch.testing.assert_close(start, torch.ones_like(start), rtol=0, atol=1e-12)


def test_too_many_outcomes() -> None:
    """Fifteen values at each of three positions are counted before they are listed."""
    pays = [[float(2**a) for a in range(5)]]
    env = two_arm_env(transition=[[[1.0]] * 5], reward=pays, horizon=3)
    with pytest.raises(BudgetError, match=r"2 continuations at every position give [\d,]+ outcomes.*fewer draws"):
        Continuations(2)(Problem(env, [[0.0] * 5]).trajectories)


@pytest.mark.parametrize("draws", [0, -1, 1.5])
def test_a_number_of_draws_that_is_none(draws: Any) -> None:
    """K is a positive integer."""
    with pytest.raises(UsageError, match=rf"draws: {draws}"):
        Continuations(draws)(Problem(two_arm_env(), [[0.0, 0.0]]).trajectories)


def impossible_rollouts(policy: Any, **changes: Any) -> Trajectories:
    return Problem(Paths(**two_arm_columns(**changes)), policy).trajectories


THREE = {
    "start": [0, 0, 0],
    "reward": [[1.0], [0.0], [5.0]],
    "mask": [[1.0]] * 3,
    "action": [[0], [1], [0]],
}
IMPOSSIBLE = {
    "probability zero in the environment": THREE
    | {"state": [[0], [0], [1]], "context": [[0]] * 3, "env_probability": [1.0, 1.0, 0.0]},
    "a start of probability zero": THREE
    | {
        "start": [0, 0, 1],
        "state": [[0], [0], [1]],
        "context": [[0]] * 3,
        "env_probability": [1.0, 1.0, 1.0],
        "start_probability": [1.0, 0.0],
    },
}


@pytest.mark.parametrize("changes", IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_rows_that_never_happen(changes: dict[str, Any]) -> None:
    """A row of no chance stays one, and changes no column of the others."""
    plain = Problem(Paths(**two_arm_columns()), [[0.0, 0.0]]).trajectories
    table = impossible_rollouts([[0.0, 0.0]], **changes)
    for provide in (ActionValues(), AllActionValues(), GreedyReturn(), OptimalBaselines()):
        for name, column in provide(plain).side.items():
            torch.testing.assert_close(provide(table).side[name][:2], column, rtol=0, atol=1e-14)
    split = Continuations()(table)
    happens = split.probability * split.paths.start_probability[split.paths.start] > 0
    assert int(happens.sum()) == 4


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_continuations_scale_with_the_rewards(scale: float) -> None:
    """r → λr gives V̂ → λV̂ with the same probabilities, at any λ."""
    base = Continuations()(Problem(two_arm_env(reward=[[1.0, 1.25]]), [[0.0, 0.0]]).trajectories)
    scaled = Continuations()(Problem(two_arm_env(reward=[[scale, 1.25 * scale]]), [[0.0, 0.0]]).trajectories)
    assert len(base) == len(scaled) == 4
    found = (scaled.side["continuation_value"] / scale).flatten().tolist()
    assert found == pytest.approx(base.side["continuation_value"].flatten().tolist(), rel=1e-12)


@pytest.mark.parametrize("discount", DISCOUNTS)
@pytest.mark.parametrize("clock", ["position", "action"])
def test_side_tables_under_every_clock(discount: Fraction, clock: str) -> None:
    """Q, V and the mean continuation are one number where the policy is certain: one action, one successor."""
    world = random_world(3, states=3, actions=1, branches=1, discount=discount, clock=clock, terminal=False)
    table = Continuations(3)(ActionValues()(world.problem().trajectories))
    acts = table.paths.mask > 0
    for column in (table.side["action_value"], table.side["continuation_value"]):
        torch.testing.assert_close(column[acts], table.value[:, :-1][acts], rtol=0, atol=1e-13)


def test_environments_that_differ_only_in_order_have_the_same_baselines() -> None:
    """Renaming actions permutes rows and nothing else."""
    world = random_world(9, observation=False, horizon=2)
    env = world.env()
    turned = TabularMDP(
        env.transition.flip(1),
        env.full_reward.flip(1),
        env.initial,
        horizon=env.horizon,
        discount=env.discount,
        terminal=sorted(env.terminal),
    )
    logits = world.problem().logits
    one, other = (OptimalBaselines()(Problem(e, z).trajectories) for e, z in ((env, logits), (turned, logits.flip(1))))
    for name in ("optimal_state", "optimal_state_joint"):
        a, b = (columns_by_visit(table, table.side[name]) for table in (one, other))
        assert a == pytest.approx(b, abs=1e-11)


@pytest.mark.parametrize(
    "provide", [OptimalBaselines(), ActionValues(), AllActionValues(), WrongValues(), GreedyReturn()]
)
def test_a_table_does_not_see_the_behaviour_policy(provide: Callable[[Trajectories], Trajectories]) -> None:
    """It is the target policy's: the same column whoever draws the batches."""
    world = random_world(12, off_policy=True)
    on = provide(replace(world, behavior=None).problem().trajectories)
    off = provide(world.problem().trajectories)
    for name, column in on.side.items():
        assert torch.equal(off.side[name], column)
