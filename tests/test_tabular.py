"""`TabularMDP` lists every rollout once, and refuses what is not an MDP."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given

from pgcheck.envs.tabular import TabularMDP
from pgcheck.errors import BudgetError, ProblemError
from pgcheck.trajectories import Paths
from tests.worlds import World, random_world, start_chances, two_arm_env, two_state_env, walk, worlds


def rows_seen(paths: Paths) -> list[tuple[Any, ...]]:
    """Each row as `Rollout.seen` writes it."""
    out = []
    columns = (paths.state.tolist(), paths.action.tolist(), paths.reward.tolist())
    for n, start in enumerate(paths.start.tolist()):
        steps = list(zip(*(c[n] for c in columns), strict=True))[: int(paths.end[n])]
        out.append((start, tuple((s, a, Fraction(r)) for s, a, r in steps)))
    return out


@given(worlds())
def test_paths_are_the_leaves_of_the_tree(world: World) -> None:
    """One row for each rollout that looks different; its env_probability is the sum over the leaves that look the same."""
    env = world.env()
    leaves = walk(world, world.policy())
    assert env.count_paths() == len(leaves)
    expected: dict[tuple[Any, ...], Fraction] = {}
    for leaf in leaves:
        expected[leaf.seen()] = expected.get(leaf.seen(), Fraction(0)) + leaf.env_probability
    paths = env.paths()
    found = rows_seen(paths)
    assert len(set(found)) == len(found) == len(paths)
    assert set(found) == set(expected)
    for row, p in zip(found, paths.env_probability.tolist(), strict=True):
        assert p == pytest.approx(float(expected[row]), abs=1e-12)
    assert paths.start_probability.tolist() == pytest.approx([float(q) for q in start_chances(world)])
    assert env.starts == [s for s, q in enumerate(world.initial) if q > 0]


@given(worlds())
def test_padding(world: World) -> None:
    """mask = 1 ⇔ state, context, action ≥ 0; from `end` on, everything is -1 or 0; T is the horizon."""
    paths = world.env().paths()
    assert paths.steps == world.horizon
    acts = paths.mask == 1
    for column in (paths.state, paths.context, paths.action):
        assert torch.equal(column >= 0, acts)
        assert bool((column[~acts] == -1).all())
    padding = torch.arange(paths.steps) >= paths.end.unsqueeze(-1)
    assert not bool((acts & padding).any())
    assert not bool((paths.reward[padding] != 0).any())
    assert bool((paths.end >= 1).all())
    assert torch.equal(paths.context, paths.state)
    for s in world.observation:
        assert not bool((paths.state == s).any())


@given(worlds())
def test_the_listing_is_a_function_of_the_environment(world: World) -> None:
    """Twice the same rows in the same order; starts come in order."""
    once, again = world.env().paths(), world.env().paths()
    for name in ("start", "state", "action", "reward", "mask", "env_probability", "end"):
        assert torch.equal(getattr(once, name), getattr(again, name))
    assert once.start.tolist() == sorted(once.start.tolist())


def test_identical_rollouts_merge_and_their_probabilities_add_up() -> None:
    """From 0 to one of two states with the same pay, at the horizon: P = 1/4 + 3/4 = 1 for each action."""
    env = TabularMDP(
        [[[0.0, 0.25, 0.75]] * 2, [[0.0, 1.0, 0.0]] * 2, [[0.0, 0.0, 1.0]] * 2],
        [[1.0, 2.0], [0.0, 0.0], [0.0, 0.0]],
        [1.0, 0.0, 0.0],
        horizon=1,
    )
    assert env.count_paths() == 4
    paths = env.paths()
    assert paths.reward.tolist() == [[1.0], [2.0]]
    assert paths.env_probability.tolist() == [1.0, 1.0]


def test_an_early_end_is_not_a_full_length_rollout_that_pays_nothing() -> None:
    """An observation position that pays 0 is real, padding is not: the rows differ only in `end`."""
    env = TabularMDP(
        [[[0.0, 0.5, 0.5]], [[0.0, 0.0, 1.0]], [[0.0, 0.0, 1.0]]],
        [[0.0], [0.0], [0.0]],
        [1.0, 0.0, 0.0],
        horizon=2,
        terminal=[2],
        observation=[1],
    )
    paths = env.paths()
    assert sorted(paths.end.tolist()) == [1, 2]
    assert paths.env_probability.tolist() == [0.5, 0.5]


def test_a_transition_of_probability_zero_gives_no_rollout() -> None:
    """Two actions, deterministic moves, two positions: 2² rollouts."""
    env = two_state_env()
    assert env.count_paths() == len(env.paths()) == 4


def test_a_reward_may_depend_on_where_one_gets_to() -> None:
    """r(s, a) is r(s, a, s') constant in s'."""
    world = random_world(3, wide_reward=False)
    pays = tuple(tuple((r,) * world.states for r in row) for row in world.reward)
    narrow, wide = world.env(), replace(world, reward=pays).env()
    assert (narrow.reward.dim(), wide.reward.dim()) == (2, 3)
    assert torch.equal(narrow.paths().reward, wide.paths().reward)


def test_input_tables_are_copied() -> None:
    """A later change of the caller's array does not reach the environment."""
    reward = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    env = two_arm_env(reward=reward)
    reward += 5.0
    assert env.reward.tolist() == [[1.0, 0.0]]


def test_more_rollouts_than_allowed() -> None:
    """2^H rollouts of a bandit played H times; counted, not listed."""
    env = two_arm_env(horizon=40)
    assert env.count_paths() == 2**40
    with pytest.raises(BudgetError, match=r"1,099,511,627,776 rollouts of horizon 40.*200,000 allowed.*shorten"):
        env.paths()
    small = two_arm_env(horizon=3)
    assert len(small.paths(limit=8)) == 8
    with pytest.raises(BudgetError, match=r"8 rollouts of horizon 3, more than the 7 allowed"):
        small.paths(limit=7)


TRANSITION = [[[0.0, 1.0, 0.0]] * 2, [[0.0, 0.0, 1.0]] * 2, [[0.0, 0.0, 1.0]] * 2]


def with_row(row: list[float]) -> list[Any]:
    """`TRANSITION` with P(· | s=1, a=0) replaced."""
    return [TRANSITION[0], [row, TRANSITION[1][1]], TRANSITION[2]]


BAD: list[tuple[dict[str, Any], str]] = [
    ({"transition": with_row([0.5, 0.4, 0.0])}, r"transition\[1, 0\]: sums to 0\.9, not to 1; divide"),
    ({"transition": with_row([-0.5, 1.5, 0.0])}, r"transition\[1, 0\]: .*negative probability -0\.5"),
    ({"transition": with_row([math.nan, 1.0, 0.0])}, r"transition: entry \[1, 0, 0\] is nan; it must be finite"),
    ({"transition": [[0.5, 0.5]]}, r"transition: shape \[1, 2\], expected \[S, A, S\]"),
    ({"transition": [[[1.0, 0.0]] * 2] * 3}, r"transition: shape \[3, 2, 2\], expected \[S, A, S\]"),
    ({"transition": "dense"}, r"transition: cannot be read as an array of numbers"),
    ({"transition": [[[1.0], [1.0, 0.0]]]}, r"transition: cannot be read as an array of numbers"),
    ({"reward": [[0.0, 1.0]]}, r"reward: shape \[1, 2\], expected \[3, 2\] or \[3, 2, 3\]"),
    ({"reward": [[0.0, 1.0], [math.nan, 0.0], [0.0, 0.0]]}, r"reward: entry \[1, 0\] is nan; it must be finite"),
    ({"reward": [[0.0, math.inf], [0.0, 0.0], [0.0, 0.0]]}, r"reward: entry \[0, 1\] is inf; it must be finite"),
    ({"initial": [1.0, 0.0]}, r"initial: shape \[2\], expected \[3\]"),
    ({"initial": [0.5, 0.25, 0.0]}, r"initial: sums to 0\.75, not to 1; divide"),
    ({"initial": [1.5, -0.5, 0.0]}, r"initial: .*negative probability -0\.5"),
    ({"initial": [0.5, 0.0, 0.5]}, r"initial: state 2 is terminal"),
    ({"horizon": 0}, r"horizon: 0; it must be an integer of at least 1"),
    ({"horizon": -1}, r"horizon: -1; .*at least 1"),
    ({"horizon": 2.0}, r"horizon: 2\.0; .*integer"),
    ({"horizon": True}, r"horizon: True; .*integer"),
    ({"discount": 1.01}, r"discount: 1\.01; γ must lie in \[0, 1\]"),
    ({"discount": -0.1}, r"discount: -0\.1; γ must lie in \[0, 1\]"),
    ({"discount": math.nan}, r"discount: nan; γ must lie in \[0, 1\]"),
    ({"discount": "0.9"}, r"discount: '0\.9'; γ must lie in \[0, 1\]"),
    ({"discount_clock": "token"}, r"discount_clock: 'token' is not one of position, action"),
    ({"terminal": [3]}, r"terminal: state 3 is outside \[0, 3\)"),
    ({"observation": [-1]}, r"observation: state -1 is outside \[0, 3\)"),
    ({"observation": [2]}, r"observation: state 2 is also terminal"),
    (
        {"observation": [1]},
        r"observation: state 1 has a transition or a reward that depends on the action.*make its rows equal",
    ),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=[f"{next(iter(c))}-{i}" for i, (c, _) in enumerate(BAD)])
def test_bad_input_is_named(changes: dict[str, Any], message: str) -> None:
    """The message names the argument, the entry and what it must be."""
    with pytest.raises(ProblemError, match=message):
        two_state_env(**changes)


def test_observation_with_a_transition_that_depends_on_the_action() -> None:
    """The other half of the rule: equal rewards, unequal transitions."""
    move = [[[0.0, 1.0, 0.0]] * 2, [[0.0, 0.0, 1.0], [0.0, 1.0, 0.0]], [[0.0, 0.0, 1.0]] * 2]
    with pytest.raises(ProblemError, match=r"observation: state 1 .*depends on the action"):
        two_state_env(transition=move, reward=[[0.0, 1.0], [1.0, 1.0], [0.0, 0.0]], observation=[1])


@pytest.mark.parametrize("name", ["terminal", "observation"])
def test_a_bare_state_where_a_list_is_expected(name: str) -> None:
    """`terminal=2` for `terminal=[2]` is a usage error that names the argument."""
    with pytest.raises(ProblemError, match=rf"{name}: .*2"):
        two_state_env(**{name: 2})


def test_rows_of_a_terminal_state_are_not_looked_at() -> None:
    """P(· | terminal) is never used, so it need not be a law; nothing is paid there."""
    move = [*TRANSITION[:2], [[0.0, 0.0, 0.0]] * 2]
    plain, odd = two_state_env(), two_state_env(transition=move, reward=[[0.0, 1.0], [1.0, 2.0], [7.0, 7.0]])
    assert torch.equal(plain.paths().reward, odd.paths().reward)


def test_the_first_action_may_come_after_an_observation() -> None:
    """An episode may open with an observation: mask 0 at t = 0, a reward may sit there, `end` counts it."""
    env = TabularMDP(
        [[[0.0, 1.0]] * 2, [[0.0, 1.0]] * 2],
        [[3.0, 3.0], [0.0, 1.0]],
        [1.0, 0.0],
        horizon=2,
        observation=[0],
    )
    paths = env.paths()
    assert paths.mask.tolist() == [[0.0, 1.0]] * 2
    assert paths.reward.tolist() == [[3.0, 0.0], [3.0, 1.0]]
    assert paths.end.tolist() == [2, 2]
