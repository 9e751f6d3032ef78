"""Processes that cannot be listed, against the same ones listed: values, gradient, facts, rollouts."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from hypothesis import assume, given

import pgcheck
import pgcheck.named_problems
from pgcheck import strategies
from pgcheck.envs.tabular import TabularMDP
from pgcheck.errors import BudgetError
from pgcheck.estimators.base import registered_estimators
from pgcheck.problem import Problem
from pgcheck.process import Laws
from pgcheck.registry import find_problem, registered_problems
from pgcheck.side import ActionValues, AllActionValues, OptimalBaselines, WrongValues
from pgcheck.worlds.long import Long

SMALL = [name for name in registered_problems() if isinstance(find_problem(name).env, TabularMDP)]


def as_if_too_many(problem):
    """The same problem, which does not list its rollouts."""
    same = replace(problem)
    vars(same)["world"] = Long.of(problem.env, problem.contexts or range(problem.env.states), problem.world.policies)
    return same


@pytest.mark.parametrize("name", SMALL)
def test_gradient_values_and_facts_are_those_of_the_table(name):
    p = find_problem(name)
    q = as_if_too_many(p)
    size = max(p.reward_size, 1.0)
    assert torch.allclose(q.gradient(), p.gradient("enumeration"), rtol=0, atol=1e-12 * size)
    assert torch.allclose(q.gradient_by_step(), p.gradient_by_step(), rtol=0, atol=1e-12 * size)
    assert q.value() == pytest.approx(p.value(), abs=1e-12 * size)
    facts = (
        "on_policy",
        "full_support",
        "fixed_length",
        "one_start",
        "binary_return",
        "most_decisions",
        "steps",
        "discount",
    )
    assert {f: getattr(q, f) for f in facts} == {f: getattr(p, f) for f in facts}
    assert q.reward_size == pytest.approx(p.reward_size, abs=1e-12)


@given(strategies.problems())
def test_gradients_agree_on_random_problems(p):
    assume(isinstance(p.env, TabularMDP))
    q = as_if_too_many(p)
    size = max(p.reward_size, 1.0) + 10 * (abs(p.kl_coefficient) + abs(p.entropy_coefficient))
    assert torch.allclose(q.gradient(), p.gradient("enumeration"), rtol=0, atol=1e-11 * size)
    assert torch.allclose(q.gradient_by_step(), p.gradient_by_step(), rtol=0, atol=1e-11 * size)


def rows_by_rollout(paths, *columns):
    """{rollout: what the columns say of it}; a rollout is its start, states, actions, rewards and length."""
    out = {}
    for n in range(len(paths.reward)):
        key = (
            int(paths.start[n]),
            *(tuple(x[n].tolist()) for x in (paths.state, paths.action, paths.reward)),
            int(paths.end[n]),
        )
        out.setdefault(key, []).append([x[n] for x in columns])
    return out


@pytest.mark.parametrize("name", SMALL)
def test_drawn_rows_are_rows_of_the_table_and_come_as_often(name):
    p = find_problem(name).with_sampling(groups=2, group_size=2)
    q = as_if_too_many(p)
    needs = (ActionValues(), AllActionValues(), WrongValues())
    table = p.trajectories_with(needs)
    draws = 1500
    drawn, index = q.sampler(seed=2, needs=needs).draw(0, draws)
    assert index.tolist() == torch.arange(4 * draws).reshape(draws, 4).tolist()

    def columns(t):
        return (
            t.value,
            t.logp,
            t.behavior_logp,
            t.ref_logp,
            t.paths.mask,
            t.paths.context,
            *(t.side[n] for n in sorted(t.side)),
        )

    chance = table.behavior_probability * table.paths.start_probability[table.paths.start]
    listed = rows_by_rollout(table.paths, chance, *columns(table))
    found = rows_by_rollout(drawn.paths, *columns(drawn))
    assert found.keys() <= listed.keys()
    for key, rows in found.items():
        ((probability, *expected),) = listed[key]
        n, share = 4 * draws, len(rows) / (4 * draws)
        # rows of a group share their start: at most twice the variance of independent ones
        error = math.sqrt(2 * float(probability) * (1 - float(probability)) / n)
        assert abs(share - float(probability)) <= 5.5 * error + 1e-12, key
        for x, y in zip(rows[0], expected, strict=True):
            assert torch.allclose(
                x.to(torch.float64), y.to(torch.float64), rtol=0, atol=1e-11 * max(p.reward_size, 1.0)
            ), key


def test_rows_of_a_group_share_their_start_and_groups_do_not():
    name = next(n for n in SMALL if not find_problem(n).one_start)
    q = as_if_too_many(find_problem(name).with_sampling(groups=2, group_size=3))
    table, index = q.sampler().draw(0, 200)
    start = table.paths.start[index]
    assert (start[:, :3] == start[:, :1]).all()
    assert (start[:, 3:] == start[:, 3:4]).all()
    assert (start[:, 0] != start[:, 3]).any()


def test_a_draw_does_not_depend_on_the_block_it_is_asked_in():
    q = as_if_too_many(find_problem("dialogue/two-turn"))
    sampler = q.sampler(seed=4)
    whole = sampler.draw(0, 12)[0]
    parts = [sampler.draw(first, count)[0] for first, count in ((0, 5), (5, 1), (6, 6))]
    for column in ("value", "logp"):
        assert torch.equal(torch.cat([getattr(t, column) for t in parts]), getattr(whole, column))
    assert torch.equal(torch.cat([t.paths.reward for t in parts]), whole.paths.reward)


def test_what_only_a_table_gives_is_refused_with_the_reason():
    q = as_if_too_many(find_problem("mdp/two-state"))
    assert not q.can_draw((OptimalBaselines(),))
    with pytest.raises(BudgetError, match="OptimalBaselines"):
        q.sampler(needs=(OptimalBaselines(),))
    some = [e for e in registered_estimators().values() if e.needs and q.can_draw(e.needs)]
    assert some  # critics are asked


def chain(T=50):
    """Two states, T steps: 4^T rollouts."""
    move = torch.tensor([[[0.9, 0.1], [0.2, 0.8]], [[0.7, 0.3], [0.1, 0.9]]], dtype=torch.float64)
    pay = torch.tensor([[0.0, 0.1], [1.0, 0.3]], dtype=torch.float64)
    env = TabularMDP(move, pay, [0.5, 0.5], horizon=T, discount=0.9)
    return Problem(env, torch.tensor([[0.3, -0.2], [-0.5, 0.1]]), groups=4, group_size=2, name="test/chain")


def test_a_long_chain_is_judged():
    p = chain()
    assert not p.enumerable
    g = p.gradient()
    differences = p.gradient("central_differences")
    assert torch.allclose(g, differences, rtol=0, atol=1e-8)
    m = pgcheck.moments("reward_to_go", p, engine="monte_carlo", draws=8192)
    error = (m.covariance.diagonal() / 8192).sqrt().reshape(g.shape)
    assert ((m.mean - g).abs() <= 5 * error).all()
    assert torch.equal(p.sample(3, seed=1).reward, p.sample(3, seed=1).reward)
    assert p.digest != replace(p, env=chain(51).env).digest


def test_a_chain_has_no_table():
    with pytest.raises(BudgetError, match="rollouts"):
        _ = chain().trajectories
    with pytest.raises(BudgetError, match="OptimalBaselines"):
        pgcheck.moments("baselined(optimal_state)", chain(), engine="monte_carlo")


@pytest.mark.parametrize("outcomes", [1, 2, 5, 8, 9, 12])
def test_a_law_is_inverted(outcomes: int) -> None:
    """Against a walk along the weights in exact fractions; rows without any weight are not drawn from."""
    generator = torch.Generator().manual_seed(outcomes)
    weight = torch.randint(0, 4, (7, outcomes), generator=generator).to(torch.float64)
    weight[:, 0] += 1.0
    weight[3] = 0.0
    drawn = [r for r in range(7) for _ in range(300) if r != 3]
    n = torch.randint(0, 2**53, (len(drawn),), generator=generator)
    found = Laws.of(weight).draw(torch.tensor(drawn), n)
    for r, x, outcome in zip(drawn, n.tolist(), found.tolist(), strict=True):
        left = Fraction(x, 2**53) * int(weight[r].sum())
        expected = next(j for j in range(outcomes) if (left := left - int(weight[r, j])) < 0)
        assert outcome == expected
