"""Strategies: what is drawn is well formed, within its bounds, has what was asked for, and shrinks to what is documented."""

from __future__ import annotations

import math
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, find, given, settings
from hypothesis import strategies as st

import pgcheck
from pgcheck import Problem, strategies
from pgcheck.engines.enumeration import Batches
from pgcheck.engines.exact import exact_moments
from pgcheck.estimators.base import find_estimator
from pgcheck.policies import LMPolicy
from pgcheck.render.code import problem_code

SMALLEST = """\
pgcheck.Problem(
    pgcheck.TabularMDP(transition=[[[1], [1]]], reward=[[{rewards}]], initial=[1], horizon=1),
    [[0, 0]],
    group_size={rows},
    name="random/problem",
)"""


def smallest(problems: st.SearchStrategy[Problem], holds: Callable[[Problem], bool], examples: int = 60) -> Problem:
    return find(problems, holds, settings=settings(max_examples=examples, database=None, derandomize=True))


def is_biased(name: str) -> Callable[[Problem], bool]:
    def holds(problem: Problem) -> bool:
        (moments,) = exact_moments([find_estimator(name)], problem)
        return float((moments.mean - problem.gradient()).abs().max()) > 1e-9

    return holds


# -- bounds


@given(strategies.problems(policy=("table", "linear", "module")))
def test_bounds_are_kept(problem: Problem) -> None:
    env = problem.env
    assert isinstance(env, pgcheck.TabularMDP)
    assert 2 <= env.actions <= 3
    assert 1 <= env.horizon <= 3
    assert env.count_paths() <= 12
    assert 1 <= problem.rows <= 4
    assert Batches(problem.trajectories, problem.sizes).count <= 2000
    assert env.initial[0] > 0
    assert 0 not in env.observation | env.terminal


@settings(max_examples=30)
@given(strategies.problems(max_batches=40, max_rows=6, min_rows=2, grouping="one", max_rollouts=6))
def test_the_number_of_batches_is_bounded(problem: Problem) -> None:
    # 6 rollouts, 2 rows: 21 batches; so there is always a plan of at most 40
    assert Batches(problem.trajectories, problem.sizes).count <= 40
    assert problem.groups == 1


@settings(max_examples=30)
@given(st.data())
def test_what_is_asked_for_is_there(data: st.DataObject) -> None:
    problem = data.draw(
        strategies.problems(
            observation=True, terminal=True, off_policy=True, full_support=True, discounts=(0.9,), clocks=("action",),
            min_group_size=2, grouping="equal", max_starts=1,
        )
    )  # fmt: skip
    paths = problem.trajectories.paths
    assert bool(((paths.mask == 0) & (torch.arange(paths.steps) < paths.end.unsqueeze(-1))).any())
    assert not problem.on_policy
    assert problem.full_support
    assert (paths.discount, paths.discount_clock) == (0.9, "action")
    assert min(problem.sizes) >= 2
    assert len(set(problem.sizes)) == 1
    assert len(problem.env.starts) == 1  # type: ignore[union-attr]


@settings(max_examples=30)
@given(st.data())
def test_terms_of_the_objective(data: st.DataObject) -> None:
    kl, entropy = data.draw(st.booleans()), data.draw(st.booleans())
    problem = data.draw(strategies.problems(kl=kl, entropy=entropy))
    assert (problem.kl_coefficient > 0, problem.entropy_coefficient > 0) == (kl, entropy)
    assert (problem.ref_logits is not None) == kl
    same = eval(problem_code(problem), {"pgcheck": pgcheck})
    assert same.digest == problem.digest


@settings(max_examples=30)
@given(strategies.problems(full_support=False))
def test_truncated_support_is_broken(problem: Problem) -> None:
    assert not problem.full_support


@settings(max_examples=30)
@given(strategies.problems(off_policy=False, observation=False, terminal=False))
def test_what_is_ruled_out_is_not_there(problem: Problem) -> None:
    assert problem.on_policy
    assert problem.fixed_length
    assert bool((problem.trajectories.paths.mask == 1).all())


@settings(max_examples=40)
@given(strategies.problems(reward="outcome", rewards=(0.0, 1.0), discounts=(1.0,), max_states=2))
def test_an_outcome_comes_last_and_is_binary(problem: Problem) -> None:
    paths = problem.trajectories.paths
    assert set(paths.reward.sum(-1).tolist()) <= {0.0, 1.0}
    early = torch.arange(paths.steps) < paths.end.unsqueeze(-1) - 1
    assert not bool(paths.reward[early].any())


@given(strategies.problems())
def test_every_truth_can_be_had(problem: Problem) -> None:
    assert torch.isfinite(problem.gradient()).all()
    assert math.isclose(problem.value("enumeration"), problem.value("dynamic_programming"), abs_tol=1e-12)


@pytest.mark.parametrize("kind", ["stale", "drifted", "temperature", "truncated"])
def test_behaviors_differ_in_the_first_context(kind: strategies.BehaviorKind) -> None:
    @settings(max_examples=30)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        logits = data.draw(strategies.policies(3, 3))().detach()
        behavior = data.draw(strategies.behaviors(logits, kinds=[kind]))
        assert behavior.shape == logits.shape
        gap = torch.softmax(behavior[0], -1) - torch.softmax(logits[0], -1)
        assert float(gap.abs().max()) > 1e-6
        assert bool((behavior > -math.inf).any(-1).all())
        assert bool(torch.isinf(behavior[0]).any()) == (kind == "truncated")

    check()


@settings(max_examples=30)
@given(st.data())
def test_batches_are_of_the_problem(data: st.DataObject) -> None:
    problem = data.draw(strategies.problems())
    batch = data.draw(strategies.batches(problem, logits=True))
    assert batch.reward.shape == (problem.rows, problem.env.horizon)  # type: ignore[union-attr]
    assert batch.logits.shape == (*batch.reward.shape, problem.logits.shape[1])
    assert batch.group.tolist() == problem.group_labels.tolist()
    assert bool(torch.isfinite(batch.behavior_logp).all())  # what the sampler cannot draw is not in a batch
    # rows of a group share their start, so all of them act first in its context
    for g in range(problem.groups):
        first = batch.context[batch.group == g, 0]
        assert len(set(first.tolist())) == 1


def test_there_is_some_of_everything() -> None:
    """No feature is so rare that a property test misses it."""
    seen: Counter[str] = Counter()

    @settings(max_examples=200, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(strategies.problems())
    def look(problem: Problem) -> None:
        paths = problem.trajectories.paths
        facts = {
            "off-policy": not problem.on_policy,
            "broken support": not problem.full_support,
            "observation": bool(problem.env.observation),  # type: ignore[union-attr]
            "ragged": not problem.fixed_length,
            "three steps": paths.steps == 3,
            "discounted": problem.discount < 1,
            "action clock": paths.discount_clock == "action",
            "random moves": bool((paths.env_probability < 1).any()),
            "two starts": len(paths.start_probability) > 1,
            "unequal groups": len(set(problem.sizes)) > 1,
            "shared contexts": problem.contexts is not None,
        }
        seen.update(name for name, holds in facts.items() if holds)
        seen["all"] += 1

    look()
    facts = [name for name in seen if name != "all"]
    assert len(facts) == 11
    assert min(seen[name] for name in facts) >= seen["all"] / 40, seen


# -- shrinking


def test_the_smallest_problem_of_all() -> None:
    problem = smallest(strategies.problems(), lambda _: True)
    assert problem_code(problem) == SMALLEST.format(rewards="0, 0", rows=1)


def test_the_smallest_problem_on_which_the_batch_mean_is_biased() -> None:
    """Two arms, two rows: with one row there is nobody to compare with, and equal rewards have no gradient."""
    problem = smallest(strategies.problems(off_policy=False, min_rows=2, max_states=2), is_biased("batch_mean"))
    assert problem_code(problem) == SMALLEST.format(rewards="1, 0", rows=2)


def test_the_smallest_problem_on_which_a_missing_weight_is_a_bias() -> None:
    """γ^t can be missed from the second step on, so two steps and γ < 1 are needed, and a reward in a second step."""
    problem = smallest(
        strategies.problems(off_policy=False, max_states=2), is_biased("reward_to_go_undiscounted_weight")
    )
    env = problem.env
    assert isinstance(env, pgcheck.TabularMDP)
    assert (env.states, env.actions, env.horizon, problem.rows) == (1, 2, 2, 1)
    assert env.discount == 0.5
    assert env.reward.tolist() == [[1.0, 0.0]]
    assert problem.logits.tolist() == [[0.0, 0.0]]


def test_the_smallest_sampler_that_breaks_support() -> None:
    problem = smallest(strategies.problems(), lambda p: not p.full_support)
    assert problem.behavior_logits.tolist() == [[0.0, -math.inf]]
    assert problem.trajectories.paths.steps == 1


def test_baselines_shrink_to_zero() -> None:
    found = find(strategies.baselines(), lambda _: True, settings=settings(database=None))
    assert found == strategies.ConstantBaseline(0.0)


# -- baselines and estimators


@settings(max_examples=40)
@given(st.data())
def test_a_table_baseline_looks_up_state_and_step(data: st.DataObject) -> None:
    baseline = data.draw(strategies.baselines())
    problem = data.draw(strategies.problems())
    batch = data.draw(strategies.batches(problem))
    b = baseline(batch)
    assert b.shape == batch.reward.shape
    for i, row in enumerate(batch.state.tolist()):
        for t, s in enumerate(row):
            if isinstance(baseline, strategies.ConstantBaseline):
                expected = baseline.value
            elif 0 <= s < len(baseline.table):  # type: ignore[attr-defined]
                expected = baseline.table[s][t]  # type: ignore[attr-defined]
            else:
                expected = 0.0
            assert float(b[i, t]) == expected


@given(st.data())
def test_compositions_are_what_they_claim(data: st.DataObject) -> None:
    estimator = data.draw(strategies.estimators())
    (claim,) = estimator.claims
    names = {c.name for c in claim.conditions}
    bounds: dict[str, Any] = {"off_policy": False} if "on-policy" in names else {"full_support": True}
    if "γ = 1" in names:
        bounds["discounts"] = (1.0,)
    if "equal lengths" in names:
        bounds |= {"observation": False, "terminal": False}
    problem = data.draw(strategies.problems(min_rows=2, min_group_size=estimator.min_group_size, **bounds))
    assert claim.applies(problem)
    (moments,) = exact_moments([estimator], problem)
    scale = claim.scale_on(problem)
    assert scale is not None
    size = max(1.0, math.sqrt(moments.second_moment))
    torch.testing.assert_close(moments.mean, scale * problem.gradient(), rtol=0, atol=1e-11 * size)


@settings(max_examples=30)
@given(strategies.unbiased_estimators())
def test_unbiased_ones_claim_it(estimator: pgcheck.Estimator) -> None:
    assert [c.kind for c in estimator.claims] == ["unbiased"]


# -- usage


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ({"min_group_size": 5}, "no 'any' plan has 1 to 4 rows in groups of 5"),
        ({"grouping": "rows", "min_group_size": 2}, "no 'rows' plan"),
        ({"min_horizon": 4, "max_horizon": 4}, "no room for 4 steps"),
        ({"observation": True, "max_horizon": 1}, "no room for 2 steps"),
    ],
)
def test_bounds_that_leave_nothing(bounds: dict[str, Any], message: str) -> None:
    with pytest.raises(pgcheck.UsageError, match=message):
        find(strategies.problems(**bounds), lambda _: True, settings=settings(database=None))


@pytest.mark.parametrize("command", ["import pgcheck, pgcheck.api", "from pgcheck.cli import app"])
def test_hypothesis_is_imported_only_when_used(command: str) -> None:
    code = f"import sys; {command}; assert not {{'hypothesis'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# -- language models


@settings(max_examples=40)
@given(st.data())
def test_language_models_are_within_their_bounds(data: st.DataObject) -> None:
    """At most 20 completions; 400 batches leave room for two rows of any of them."""
    off_policy, full_support, tool, eos = (data.draw(st.sampled_from([None, True, False])) for _ in range(4))
    wanted = strategies.lm_problems(
        off_policy=off_policy, full_support=full_support, tool=tool, eos=eos, min_rows=2, max_batches=400
    )  # fmt: skip
    problem = data.draw(wanted)
    table = problem.trajectories
    assert len(table) <= 20
    assert Batches(table, problem.sizes).count <= 400
    assert 2 <= problem.rows <= 4
    assert isinstance(problem.policy, LMPolicy)
    assert problem.full_support or full_support is not True
    if full_support is False:
        assert not problem.full_support
    elif off_policy is not None:
        assert problem.on_policy is not off_policy
    if eos is False and tool is False:
        assert problem.fixed_length
    if tool is False:
        assert bool((table.paths.mask.cumsum(-1)[:, -1:] == table.paths.end.unsqueeze(-1)).all())


def test_language_models_shrink() -> None:
    """To one prompt, two tokens of which one is written, and rewards 0; where a bias shows, one reward of 1."""
    plain = smallest(strategies.lm_problems(), lambda p: True)
    assert len(plain.trajectories) == 2
    assert float(plain.trajectories.paths.reward.abs().sum()) == 0
    shown = smallest(
        strategies.lm_problems(off_policy=False, min_group_size=2, max_prompts=1, max_vocab=2, max_new_tokens=1),
        is_biased("batch_mean"),
    )
    assert (len(shown.trajectories), shown.sizes) == (2, (2,))
    assert sorted(shown.trajectories.paths.reward.flatten().tolist()) == [0.0, 1.0]
