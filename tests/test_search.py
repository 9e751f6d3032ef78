"""The search for a counterexample: finds what named problems miss, keeps to the claim's domain, and says what it saw."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import pgcheck
from pgcheck import Batch
from pgcheck.api import as_problems
from pgcheck.estimators.base import Condition, biased, find_estimator, on_policy, proportional, unbiased
from pgcheck.estimators.lookup import as_estimator
from pgcheck.registry import find_problem
from pgcheck.render.code import problem_code
from pgcheck.search import EXAMPLES, search
from pgcheck.verdicts.verdict import RTOL
from tests.worlds import two_arm_env

FEW = 40


def reinforce(batch: Batch) -> Tensor:
    return -(batch.episode_return[:, None] * batch.logp * batch.mask).sum(-1).mean()


def batch_mean(batch: Batch) -> Tensor:
    r = batch.episode_return
    return -((r - r.mean())[:, None] * batch.logp * batch.mask).sum(-1).mean()


def blind_spot(batch: Batch) -> Tensor:
    """Right unless the best return of the batch is exactly −2, which no named problem has."""
    return reinforce(batch) * torch.where(batch.episode_return.max() == -2.0, 2.0, 1.0)


# -- what is found


def test_the_smallest_counterexample_of_the_batch_mean() -> None:
    (found,) = search(as_estimator(batch_mean))
    assert found.smallest is not None
    env = found.smallest.env
    assert isinstance(env, pgcheck.TabularMDP)
    assert (env.states, env.actions, env.horizon, found.smallest.sizes) == (1, 2, 1, (2,))
    assert env.reward.tolist() == [[0.0, 1.0]]
    assert found.smallest.logits.tolist() == [[0.0, 0.0]]


def test_sound_ones_have_none() -> None:
    (found,) = search(find_estimator("leave_one_out"))
    assert found.smallest is None
    assert found.problems > EXAMPLES / 3
    assert 0 <= found.worst < 1e-12


@pytest.mark.parametrize(
    "name", ["reinforce", "per_decision_is", "batch_mean(group)", "grpo", "gigpo_step(leave_one_out)"]
)
def test_no_claim_of_the_zoo_is_refuted(name: str) -> None:
    for found in search(find_estimator(name), examples=FEW):
        assert found.smallest is None
        assert found.problems > 10


def test_a_claim_of_bias_is_not_searched() -> None:
    assert search(find_estimator("baselined(next_state)")) == []


def test_a_function_of_coefficients_that_are_not_finite() -> None:
    def divides(batch: Batch) -> Tensor:
        return batch.episode_return.unsqueeze(-1) / batch.episode_return.unsqueeze(-1) * batch.mask

    (found,) = search(pgcheck.from_coefficients(divides, couples="trajectory"), examples=FEW)
    assert found.smallest is not None


def test_the_same_every_time_and_leaves_random_states_alone() -> None:
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    first, second = (search(as_estimator(blind_spot), examples=100)[0] for _ in range(2))
    assert first.smallest is not None
    assert second.smallest is not None
    assert problem_code(first.smallest) == problem_code(second.smallest)
    assert first.problems == second.problems
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    assert states[:2] == after[:2]
    assert torch.equal(states[2], after[2])


# -- where it looks


def problems_seen(like: list[pgcheck.Problem], *conditions: Condition) -> list[pgcheck.Problem]:
    seen: list[pgcheck.Problem] = []
    watch = Condition("watched", lambda p: p in like or not seen.append(p))
    search(pgcheck.from_coefficients(find_estimator("reinforce").coefficients, couples="trajectory",
           claims=(unbiased(watch, *conditions),)), like, examples=FEW)  # fmt: skip
    assert len(seen) > 5
    return seen


@pytest.mark.parametrize(
    ("like", "holds"),
    [
        ("mdp/two-state-0.9", lambda p: p.on_policy),
        ("mdp/two-state", lambda p: p.on_policy and p.discount == 1),
        ("off-policy/two-state-drifted", lambda p: not p.on_policy and p.full_support),
        ("off-policy/contextual-truncated", lambda p: not p.full_support),
    ],
)
def test_it_stays_with_problems_of_the_kind_given(like: str, holds: Callable[[pgcheck.Problem], bool]) -> None:
    assert all(map(holds, problems_seen([find_problem(like)])))


def test_without_problems_it_looks_everywhere() -> None:
    seen = problems_seen([])
    assert {p.on_policy for p in seen} == {True, False}
    assert {p.discount < 1 for p in seen} == {True, False}


def test_conditions_of_the_claim_are_met() -> None:
    assert all(p.on_policy for p in problems_seen(as_problems("all"), on_policy))


# -- through the library's door


def test_a_blind_spot_of_the_named_problems_is_found() -> None:
    pgcheck.check_estimator(blind_spot)
    with pytest.raises(pgcheck.BiasError) as caught:
        pgcheck.check_estimator(blind_spot, search=True)
    message = str(caught.value)
    assert re.search(r"blind_spot is not unbiased: 1 of \d+ problems", message)
    assert "random/counterexample" in message
    assert "reward=[[0, -2]]" in message
    report = caught.value.report
    (wrong,) = report.failures
    assert (wrong.check, wrong.problem) == ("unbiased", "random/counterexample")
    assert report.cell("blind_spot", "random/counterexample").finding != "unbiased"
    assert report.problems[-1].name == "random/counterexample"


def test_what_fails_on_named_problems_gets_the_smallest_as_well() -> None:
    with pytest.raises(pgcheck.BiasError) as caught:
        pgcheck.check_estimator(batch_mean, "mdp/two-state", search=True)
    message = str(caught.value)
    assert "worst of them" in message
    assert "'mdp/two-state'" in message
    code = message.partition("on which it fails:\n\n")[2]
    lines = [line.removeprefix("    ") for line in code.splitlines()]
    made: dict[str, Any] = {}
    exec("\n".join(lines[:-1]), made)  # the last line names this test module's function
    assert lines[-1].startswith("pgcheck.check_estimator(")
    with pytest.raises(pgcheck.BiasError, match=r"scale 0\.5"):
        pgcheck.check_estimator(batch_mean, made["problem"])


def test_a_sound_one_passes_and_the_report_says_how_much_was_seen() -> None:
    report = pgcheck.check_estimator("leave_one_out", "bandit/*", search=True)
    (row,) = [v for v in report.verdicts if v.check == "unbiased" and v.problem == ""]
    assert row.status == "PASS"
    assert row.measured is not None
    assert row.measured <= row.allowed == RTOL
    words = row.reason.split()
    assert words[:3] == ["no", "counterexample", "among"]
    assert int(words[3]) > EXAMPLES / 3
    assert words[4:] == ["random", "problems"]


def test_without_search_the_report_is_as_before() -> None:
    report = pgcheck.check_estimator("leave_one_out", "bandit/two-arm")
    assert not [v for v in report.verdicts if v.check == "unbiased" and v.problem == ""]


def test_a_claim_nobody_meets_is_reported_as_not_asked() -> None:
    never = Condition("named", lambda p: p.name == "bandit/two-arm")
    e = pgcheck.from_coefficients(
        find_estimator("reinforce").coefficients, couples="trajectory", claims=(unbiased(never),), name="choosy"
    )
    report = pgcheck.check_estimator(e, "bandit/two-arm", search=True)
    assert [n.reason for n in report.not_asked if n.problem == ""] == [
        "search: no random problem met the claim's conditions"
    ]
    assert not [v for v in report.verdicts if v.check == "unbiased" and v.problem == ""]


def test_a_claim_of_bias_is_reported_as_not_searched() -> None:
    e = pgcheck.from_coefficients(
        find_estimator("batch_mean").coefficients, claims=(biased("own sample"),), name="knows_it"
    )
    report = pgcheck.check_estimator(e, "bandit/two-arm", search=True)
    assert [n.reason for n in report.not_asked if n.problem == ""] == [
        "search: one problem does not refute a claim of bias"
    ]


def test_what_held_is_reported_next_to_what_did_not() -> None:
    """Two claims: the first has no counterexample, the second has."""
    e = pgcheck.from_coefficients(
        find_estimator("batch_mean").coefficients,
        claims=(proportional(None, on_policy), unbiased(on_policy)),
        name="two_claims",
    )
    with pytest.raises(pgcheck.BiasError) as caught:
        pgcheck.check_estimator(e, "bandit/two-arm", search=True)
    searched = [v for v in caught.value.report.verdicts if v.reason.startswith("no counterexample")]
    assert [(v.check, v.status) for v in searched] == [("proportional", "PASS")]
    assert "random problems on which it fails" in str(caught.value)


def test_not_a_number_is_a_failure_of_its_own() -> None:
    """Divides by the best return: no named bandit of these has one of 0 on a whole batch."""

    def divides(batch: Batch) -> Tensor:
        best = batch.episode_return.amax(-1, keepdim=True).unsqueeze(-1)
        return batch.episode_return.unsqueeze(-1) * best / best / batch.rows * batch.mask

    e = pgcheck.from_coefficients(divides, name="divides")
    problem = pgcheck.Problem(two_arm_env(reward=[[1.0, 2.0]]), [[0.0, 0.0]], group_size=2)
    pgcheck.check_estimator(e, problem, checks=["unbiased", "finite"])
    with pytest.raises(pgcheck.CheckFailed, match="fails finite") as caught:
        pgcheck.check_estimator(e, problem, checks=["unbiased", "finite"], search=True)
    assert {v.check for v in caught.value.report.failures} == {"finite"}


def test_other_checks_alone_are_not_searched() -> None:
    report = pgcheck.check_estimator(batch_mean, "bandit/two-arm", checks=["row_order"], search=True)
    assert {v.check for v in report.verdicts} == {"row_order"}


def test_a_claim_that_was_given_is_part_of_the_code() -> None:
    with pytest.raises(pgcheck.BiasError, match=r'check_estimator\("grpo", problem, claim="proportional"\)'):
        pgcheck.check_estimator("grpo", "bandit/contextual", claim="proportional", search=True)
