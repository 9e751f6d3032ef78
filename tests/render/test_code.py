"""Problems as code: what is printed makes the same problem again."""

from __future__ import annotations

import math
import shlex
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings

import pgcheck
from pgcheck import strategies
from pgcheck.estimators.lookup import FILLED_BY  # noqa: F401  (fills the registries)
from pgcheck.registry import find_problem, registered_problems
from pgcheck.render.code import check_code, estimator_code, literal, problem_code, shell_name
from tests.worlds import two_arm_env, two_arm_paths


def made_again(problem: pgcheck.Problem) -> pgcheck.Problem:
    made = eval(problem_code(problem), {"pgcheck": pgcheck})
    assert isinstance(made, pgcheck.Problem)
    return made


@given(strategies.problems(reference=None, policy=("table", "linear", "module")))
def test_code_makes_the_same_problem(problem: pgcheck.Problem) -> None:
    again = made_again(problem)
    assert again.digest == problem.digest
    printed = replace(problem, policy=problem.pinned(problem.logits))  # those that a module computes are rounded
    assert torch.equal(again.gradient(), printed.gradient())


@settings(max_examples=20)
@given(strategies.problems())
def test_a_table_of_rollouts_as_code(problem: pgcheck.Problem) -> None:
    table = pgcheck.Problem(
        problem.trajectories.paths,
        problem.logits,
        behavior_logits=problem.behavior_logits,
        groups=problem.groups,
        group_size=problem.group_size,
    )
    assert made_again(table).digest == table.digest == problem.digest


@pytest.mark.parametrize("name", registered_problems())
def test_every_named_problem(name: str) -> None:
    problem = find_problem(name)
    again = made_again(problem)
    assert (again.digest, again.name, again.about) == (problem.digest, problem.name, problem.about)
    assert all(len(line) < 200 for line in problem_code(problem).splitlines() if "about=" not in line)  # a state a line


def test_the_smallest_reads_at_a_glance() -> None:
    problem = pgcheck.Problem(two_arm_env(), [[0.0, -0.5]], group_size=2)
    assert problem_code(problem) == (
        "pgcheck.Problem(\n"
        "    pgcheck.TabularMDP(transition=[[[1], [1]]], reward=[[1, 0]], initial=[1], horizon=1),\n"
        "    [[0, -0.5]],\n"
        "    group_size=2,\n"
        ")"
    )


def test_settings_are_printed_where_they_differ_from_the_default() -> None:
    problem = pgcheck.Problem(
        two_arm_paths(discount=0.5), [[0.0, 0.0]], behavior_logits=[[0.0, -math.inf]], groups=2, group_size=(2, 1)
    )
    code = problem_code(problem)
    assert 'behavior_logits=[[0, float("-inf")]]' in code
    assert "groups=2" in code
    assert "group_size=[2, 1]" in code
    assert "discount=0.5" in code
    assert "contexts" not in code
    assert "discount_clock" not in code


@pytest.mark.parametrize(
    ("x", "text"),
    [
        (1.0, "1"),
        (-2.0, "-2"),
        (0.1 + 0.2, "0.30000000000000004"),
        (-0.0, "-0.0"),
        (math.inf, 'float("inf")'),
        (1e300, "1e+300"),
        (True, "True"),
        ('say "no"', '"say \\"no\\""'),
        (torch.tensor([[1, 2]]), "[[1, 2]]"),
        ((), "[]"),
    ],
)
def test_literals_read_back(x: object, text: str) -> None:
    assert literal(x) == text
    back = eval(text)
    assert repr(back) == repr(x if not isinstance(x, (torch.Tensor, tuple)) else back) or float(back) == float(x)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("command", "text"),
    [
        ("grpo", '"grpo"'),
        ("'baselined(value)'", '"baselined(value)"'),
        ("my_losses:mine", '"my_losses:mine"'),
        ("mine", "mine"),
    ],
)
def test_estimators_by_name_or_by_their_own(command: str, text: str) -> None:
    assert estimator_code(command) == text


@pytest.mark.parametrize(
    ("command", "text"),
    [
        ("mine:loss", "mine:loss"),
        ("mine:REGISTRY[a]", "'mine:REGISTRY[a]'"),
        ("mine.py:make(eps=0.1)", "'mine.py:make(eps=0.1)'"),
        ("rloo", "rloo"),
        ("'gae(0.95)'", "'gae(0.95)'"),
        ("token_mean", "token_mean"),  # of those that are wrong on purpose
        ("made_inside", ""),
        ("<lambda>", ""),
    ],
)
def test_estimators_for_a_shell(command: str, text: str) -> None:
    """Quoted where a shell reads brackets; nothing where the command line would find nothing."""
    assert shell_name(command) == text
    assert shlex.split(text) == ([command.strip("'")] if text else [])


def test_what_is_pasted_runs() -> None:
    problem = pgcheck.Problem(two_arm_env(), [[0.0, 0.0]], group_size=2)
    code = check_code(problem, estimator="batch_mean", asked={"claim": "unbiased", "same_as": None})
    with pytest.raises(pgcheck.BiasError, match=r"scale 0\.5"):
        exec(code, {})
    exec(check_code(problem, estimator="leave_one_out"), {})
