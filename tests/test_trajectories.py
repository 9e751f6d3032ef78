"""`Paths` and `Trajectories`: probabilities, values, padding, gathering, and what is refused."""

from __future__ import annotations

import math
from collections import defaultdict
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given

from pgcheck.errors import ProblemError
from pgcheck.problem import Problem
from pgcheck.side import ActionValues
from pgcheck.trajectories import Paths, Trajectories, check_distribution, conditional_mean, row_logp
from tests.worlds import (
    World,
    random_world,
    return_scale,
    shares,
    start_chances,
    state_value,
    two_arm_columns,
    two_arm_paths,
    walk,
    worlds,
)


@given(worlds())
def test_probabilities_sum_to_one_from_every_start(world: World) -> None:
    """Σ_τ p(τ | s₀) = 1 under the target and the behaviour policy."""
    table = world.problem().trajectories
    for p in (table.probability, table.behavior_probability):
        assert bool((p > 0).all())
        for start in range(len(table.paths.start_probability)):
            assert float(p[table.paths.start == start].sum()) == pytest.approx(1.0, abs=1e-12)


@given(worlds())
def test_probabilities_are_those_of_the_tree(world: World) -> None:
    """p(τ | s₀) = Π P(s' | s, a) Π π(a | k), in fractions, summed over the rollouts that look the same."""
    table = world.problem().trajectories
    behavior = world.weights if world.behavior is None else world.behavior
    p = table.paths
    for policy, found in ((world.policy(), table.probability), (shares(behavior), table.behavior_probability)):
        expected: dict[Any, Fraction] = defaultdict(Fraction)
        for x in walk(world, policy):
            expected[x.seen()] += x.probability
        for n in range(len(table)):
            end = int(p.end[n])
            columns = (p.state[n].tolist(), p.action[n].tolist(), p.reward[n].tolist())
            steps = tuple((s, a, Fraction(r)) for s, a, r in list(zip(*columns, strict=True))[:end])
            assert float(found[n]) == pytest.approx(float(expected[int(p.start[n]), steps]), abs=1e-12)


@given(worlds())
def test_log_probabilities(world: World) -> None:
    """logp[n, t] = log w[k][a] / Σ w[k] where the policy acts, else 0; the reference is the policy where none is given."""
    table = world.problem().trajectories
    behavior = world.weights if world.behavior is None else world.behavior
    p = table.paths
    for policy, found in (
        (world.policy(), table.logp),
        (shares(behavior), table.behavior_logp),
        (world.policy(), table.ref_logp),
    ):
        for n in range(len(table)):
            for t in range(p.steps):
                k, a = int(p.context[n, t]), int(p.action[n, t])
                expected = math.log(policy[k][a]) if p.mask[n, t] > 0 else 0.0
                assert float(found[n, t]) == pytest.approx(expected, abs=1e-12)


@given(worlds())
def test_value_where_the_policy_acts(world: World) -> None:
    """V(s, t) = Σ_a π(a|s) Σ_s' P(s'|s,a) (r + γ V(s', t+1)), in fractions; one number for a state and t."""
    table = world.problem().trajectories
    p, memo = table.paths, {}
    for n, t in (p.mask > 0).nonzero().tolist():
        at = (int(p.state[n, t]), world.horizon - t)
        if at not in memo:
            memo[at] = float(state_value(world, world.policy(), *at))
        assert float(table.value[n, t]) == pytest.approx(memo[at], abs=1e-12 * return_scale(world))


@given(worlds())
def test_value_on_observations_and_after_the_end(world: World) -> None:
    """At an observation: E[Ĝ_t | states and actions so far], by the tree; from `end` to T: 0."""
    table, gamma = world.problem().trajectories, world.discount
    top: dict[Any, Fraction] = defaultdict(Fraction)
    mass: dict[Any, Fraction] = defaultdict(Fraction)
    for x in walk(world, world.policy()):
        start, seen = x.seen()
        chance = start_chances(world)[start] * x.probability
        for t, (s, _, _) in enumerate(seen):
            if s < 0:
                history = (start, *((s, a) for s, a, _ in seen[:t]), t)
                top[history] += chance * x.to_go(gamma, t)
                mass[history] += chance
    p = table.paths
    assert table.value.shape == (len(table), p.steps + 1)
    for n in range(len(table)):
        end = int(p.end[n])
        assert not bool(table.value[n, end:].any())
        for t in range(end):
            if p.mask[n, t] == 0:
                before = zip(p.state[n, :t].tolist(), p.action[n, :t].tolist(), strict=True)
                history = (int(p.start[n]), *before, t)
                expected = float(top[history] / mass[history])
                assert float(table.value[n, t]) == pytest.approx(expected, abs=1e-12 * return_scale(world))


@given(worlds())
def test_the_value_at_the_start_averages_to_the_objective(world: World) -> None:
    """Σ q(s₀) p(τ | s₀) V(·, 0) = J."""
    problem = world.problem()
    table = problem.trajectories
    weight = table.probability * table.paths.start_probability[table.paths.start]
    found = float((weight * table.value[:, 0]).sum())
    assert found == pytest.approx(problem.value("dynamic_programming"), abs=1e-12 * return_scale(world))


def one_state_two_starts() -> Paths:
    """Starts of chance 1/4 and 3/4 share a state: action 0 pays 4 from the first start, 8 from the second, action 1 0."""
    return Paths(
        **two_arm_columns(
            start=[0, 0, 1, 1],
            state=[[0]] * 4,
            context=[[0]] * 4,
            action=[[0], [1], [0], [1]],
            reward=[[4.0], [0.0], [8.0], [0.0]],
            mask=[[1.0]] * 4,
            env_probability=[1.0] * 4,
            start_probability=[0.25, 0.75],
        )
    )


def test_the_value_of_a_state_averages_over_the_starts_that_reach_it() -> None:
    """V = π(0) (4/4 + 3·8/4) = 7/2 with π(0) = 1/2, whoever draws: E[Ĝ | state], not E[Ĝ | state, start]."""
    table = Problem(one_state_two_starts(), [[0.0, 0.0]], behavior_logits=[[2.0, 0.0]]).trajectories
    assert table.value[:, 0].tolist() == pytest.approx([3.5] * 4, abs=1e-14)


def test_an_action_value_averages_over_the_starts_that_reach_the_state() -> None:
    """Q(0) = 4/4 + 3·8/4 = 7 and Q(1) = 0."""
    table = ActionValues()(Problem(one_state_two_starts(), [[0.0, 0.0]]).trajectories)
    assert table.side["action_value"][:, 0].tolist() == pytest.approx([7.0, 0.0, 7.0, 0.0], abs=1e-14)


# -- gathering


def test_a_batch_is_rows_of_the_table() -> None:
    """Every field of `batch(index, group)[m, b]` is row index[m, b]."""
    table = random_world(2, off_policy=True).problem().trajectories
    table = table.with_side(extra=torch.arange(len(table), dtype=torch.float64))
    index = torch.tensor([[0, 3, 3], [1, 0, 2]])
    batch = table.batch(index, torch.tensor([0, 0, 1]))
    for name in ("state", "context", "action", "reward", "mask"):
        assert torch.equal(getattr(batch, name), getattr(table.paths, name)[index])
    for name in ("logp", "behavior_logp", "ref_logp", "value"):
        assert torch.equal(getattr(batch, name), getattr(table, name)[index])
    assert batch.group.tolist() == [[0, 0, 1], [0, 0, 1]]
    assert torch.equal(batch.side["extra"], index.to(torch.float64))
    assert batch.action_logits is None
    assert (batch.discount, batch.discount_clock) == (table.paths.discount, table.paths.discount_clock)


def test_logits_come_when_asked_for() -> None:
    """`log_softmax(batch.logits)` at the action is `logp` where the mask is 1."""
    table = random_world(2).problem().trajectories
    rows = table.batch(torch.arange(len(table)), torch.arange(len(table)), logits=True)
    assert rows.logits.shape == (*rows.reward.shape, table.actions)
    drawn = torch.log_softmax(rows.logits, -1).gather(-1, rows.action.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(drawn * rows.mask, rows.logp, rtol=0, atol=1e-15)


def test_take_keeps_rows_together() -> None:
    """Rows with repeats, side columns included; probabilities as they were."""
    table = random_world(2, off_policy=True).problem().trajectories
    table = table.with_side(extra=table.logp.sum(-1))
    rows = torch.tensor([2, 0, 2])
    taken = table.take(rows)
    assert len(taken) == 3
    for name in ("start", "state", "context", "action", "reward", "mask", "env_probability", "end"):
        assert torch.equal(getattr(taken.paths, name), getattr(table.paths, name)[rows])
    for name in ("logp", "behavior_logp", "ref_logp", "value", "probability", "behavior_probability"):
        assert torch.equal(getattr(taken, name), getattr(table, name)[rows])
    assert torch.equal(taken.side["extra"], taken.logp.sum(-1))
    assert (table.contexts, table.actions) == tuple(table.logits.shape)


def test_with_side_adds_and_replaces() -> None:
    """Columns already there stay, the original is untouched."""
    table = random_world(2).problem().trajectories
    one = table.with_side(a=table.logp)
    two = one.with_side(b=table.value, a=table.value)
    assert set(table.side) == set()
    assert torch.equal(one.side["a"], table.logp)
    assert torch.equal(two.side["a"], table.value)
    assert set(two.side) == {"a", "b"}


def test_conditional_mean() -> None:
    """E[x | key] = Σ w x / Σ w within a key: (1·1 + 3·5)/4 = 4; no weight, no value."""
    x = torch.tensor([1.0, 5.0, 7.0, 9.0], dtype=torch.float64)
    weight = torch.tensor([1.0, 3.0, 2.0, 0.0], dtype=torch.float64)
    found = conditional_mean(x, weight, [("a",), ("a",), ("b",), ("c",)])
    assert found.tolist() == [4.0, 4.0, 7.0, 0.0]


def test_row_logp_takes_impossible_actions() -> None:
    """log 0 = −∞ where the action is drawn, 0 where the mask is 0."""
    logits = torch.tensor([[0.0, -math.inf]], dtype=torch.float64)
    k, a = torch.tensor([0, 0, -1]), torch.tensor([0, 1, -1])
    assert row_logp(logits, k, a, torch.tensor([1.0, 1.0, 0.0])).tolist() == [0.0, -math.inf, 0.0]


# -- the default of `end`


def test_end_defaults_to_the_last_mask_or_reward() -> None:
    """Row 0 ends after its act, row 1 after the reward on an observation."""
    columns = two_arm_columns(
        state=[[0, -1, -1]] * 2,
        context=[[0, -1, -1]] * 2,
        action=[[0, -1, -1], [1, -1, -1]],
        mask=[[1.0, 0.0, 0.0]] * 2,
        reward=[[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]],
    )
    assert Paths(**columns).end.tolist() == [1, 2]
    assert Paths(**columns, end=[3, 2]).end.tolist() == [3, 2]


def test_columns_become_tensors() -> None:
    """Lists in, int64 and float64 out."""
    paths = two_arm_paths()
    assert {paths.start.dtype, paths.state.dtype, paths.action.dtype, paths.end.dtype} == {torch.int64}
    assert {paths.reward.dtype, paths.mask.dtype, paths.env_probability.dtype} == {torch.float64}
    assert (len(paths), paths.steps) == (2, 1)


# -- what is refused

BAD: list[tuple[dict[str, Any], str]] = [
    ({"reward": [1.0, 0.0]}, r"reward: shape \(2,\), expected \[N, T\]"),
    ({"reward": [[], []]}, r"reward: shape \(2, 0\), expected \[N, T\] with at least one"),
    ({"action": [[0]]}, r"action: shape \(1, 1\), expected \(2, 1\) as `reward` has"),
    ({"mask": [[1.0, 1.0]] * 2}, r"mask: shape \(2, 2\), expected \(2, 1\)"),
    ({"start": [0]}, r"start: shape \(1,\), expected \(2,\)"),
    ({"env_probability": [[1.0], [1.0]]}, r"env_probability: shape \(2, 1\), expected \(2,\)"),
    ({"discount": 1.5}, r"discount: 1\.5 is outside \[0, 1\]"),
    ({"discount": math.nan}, r"discount: nan is outside \[0, 1\]"),
    ({"discount_clock": "turn"}, r"discount_clock: 'turn' is not one of position, action"),
    ({"reward": [[1.0], [math.nan]]}, r"reward: trajectory 1, position 0 is nan; it must be finite"),
    ({"mask": [[1.0], [0.5]]}, r"mask: .*must be 0 or 1"),
    ({"state": [[0], [-1]]}, r"state: trajectory 1, position 0 is -1 where mask is 1; it must be ≥ 0"),
    ({"context": [[-1], [0]]}, r"context: trajectory 0, position 0 is -1 where mask is 1"),
    ({"mask": [[1.0], [0.0]]}, r"state: trajectory 1, position 0 is 0 where mask is 0; .*-1 where mask is 0"),
    ({"start_probability": [0.5]}, r"start_probability: sums to 0\.5, not to 1"),
    ({"start_probability": [1.5, -0.5]}, r"start_probability: has a negative probability -0\.5"),
    ({"start_probability": [math.nan]}, r"start_probability: has an entry that is not finite"),
    ({"start": [0, 1]}, r"start: .*\[0, 1\)"),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=[f"{next(iter(c))}-{i}" for i, (c, _) in enumerate(BAD)])
def test_bad_columns_are_named(changes: dict[str, Any], message: str) -> None:
    """Column, row and what it must be."""
    with pytest.raises(ProblemError, match=message):
        two_arm_paths(**changes)


UNSEEN: list[tuple[dict[str, Any], str]] = [
    ({"env_probability": [1.0, math.nan]}, r"env_probability: .*(nan|not finite)"),
    ({"env_probability": [1.0, -0.5]}, r"env_probability: .*-0\.5"),
    ({"end": [1]}, r"end: .*shape \(1,\)"),
    ({"end": [0, 1]}, r"end: .*0"),
    ({"end": [1, 7]}, r"end: .*7"),
    ({"mask": [[1.0], [0.5]]}, r"mask: .*0\.5"),
    ({"start": [0, 4]}, r"start: .*\b4\b"),
    ({"reward": "coins"}, r"reward: cannot be read"),
    ({"action": [[0], [1, 1]]}, r"action: cannot be read"),
    ({"discount": "0.9"}, r"discount: '0\.9'"),
]


@pytest.mark.parametrize(
    ("changes", "message"), UNSEEN, ids=[f"{next(iter(c))}-{i}" for i, (c, _) in enumerate(UNSEEN)]
)
def test_columns_that_would_spoil_a_verdict(changes: dict[str, Any], message: str) -> None:
    """Nothing unusable gets through, and the message has the value."""
    with pytest.raises(ProblemError, match=message):
        two_arm_paths(**changes)


def test_not_a_number_as_probability_is_no_table() -> None:
    """A NaN must not pass for a sum of one."""
    columns = two_arm_columns(env_probability=[1.0, math.nan])
    with pytest.raises(ProblemError):
        _ = Problem(Paths(**columns), [[0.0, 0.0]]).trajectories


def test_rollouts_that_do_not_add_up() -> None:
    """With the second arm's rollout missing, π(0) = 1/2 is all there is."""
    columns = {name: x[:1] if isinstance(x, list) else x for name, x in two_arm_columns().items()}
    problem = Problem(Paths(**columns), [[0.0, 0.0]])
    with pytest.raises(ProblemError, match=r"start 0: probabilities under the policy sum to 0\.5, not to 1; .*missing"):
        _ = problem.trajectories


def test_rollouts_missing_under_the_behaviour_policy_only() -> None:
    """The target never takes action 2 (up to e^−800), the behaviour policy does, and its rollout is missing."""
    problem = Problem(two_arm_paths(), [[0.0, 0.0, -800.0]], behavior_logits=[[0.0, 0.0, 0.0]])
    with pytest.raises(ProblemError, match=r"start 0: probabilities under the behavior policy sum to 0\.666666666667"):
        _ = problem.trajectories


def test_a_start_without_rollouts() -> None:
    """Start 1 has probability 1/2 and no row."""
    problem = Problem(two_arm_paths(start_probability=[0.5, 0.5]), [[0.0, 0.0]])
    with pytest.raises(ProblemError, match=r"start 1: probabilities under the policy sum to 0, not to 1"):
        _ = problem.trajectories


def test_a_start_that_never_happens_needs_no_rollouts() -> None:
    """Probability 0 is not a missing rollout."""
    problem = Problem(two_arm_paths(start_probability=[1.0, 0.0]), [[0.0, 0.0]])
    assert isinstance(problem.trajectories, Trajectories)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([0.5, 0.4], r"here: sums to 0\.9, not to 1; divide it by its sum"),
        ([1.5, -0.5], r"here: has a negative probability -0\.5"),
        ([math.inf, 0.0], r"here: has an entry that is not finite: \[inf, 0\.0\]"),
    ],
)
def test_check_distribution(row: list[float], message: str) -> None:
    """A law is non-negative and sums to one within 1e-9."""
    with pytest.raises(ProblemError, match=message):
        check_distribution("here", torch.tensor(row, dtype=torch.float64))
    check_distribution("here", torch.tensor([0.5, 0.5 + 9e-10], dtype=torch.float64))
