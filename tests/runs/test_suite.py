"""Suite files: what can be said in them, and one error with file, field and mend for what cannot."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

import pgcheck.adapters
from pgcheck.engines.exact import DEFAULT_BUDGET
from pgcheck.errors import SuiteError, UnknownNameError
from pgcheck.estimators.base import registered_estimators
from pgcheck.estimators.lookup import FILLED_BY  # noqa: F401  (fills the registries)
from pgcheck.registry import doubles, registered_problems
from pgcheck.runs.suite import Suite, load_suite, problems_matching, shipped_suites
from pgcheck.verdicts.verdict import Status

SMALL = """
name = "small"
about = "Two estimators on two problems."
estimators = ["reinforce", "leave_one_out"]
problems = ["bandit/two-arm", "mdp/pessimal"]
"""


def write(folder: Path, text: str) -> str:
    path = folder / "mine.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


# -- the shipped ones


def test_core_is_shipped() -> None:
    assert "core" in shipped_suites()


@pytest.mark.parametrize("name", shipped_suites())
def test_shipped_suites_can_be_read(name: str) -> None:
    if (Path(pgcheck.adapters.__path__[0]) / f"{name}.py").exists():
        pytest.importorskip(name)  # a library's own losses: an extra
    suite = load_suite(name)
    assert suite.name == name
    assert suite.about


def test_core_is_everything() -> None:
    """Every estimator, on every problem that is needed to catch a mistake, at two θ or more."""
    suite = load_suite("core")
    assert [e.name for e in suite.resolve_estimators()] == list(registered_estimators())
    names = [p.name for p in suite.resolve_problems()]
    assert suite.thetas >= 2
    needed = {name for name in registered_problems() if not name.startswith(("notes/", "lm/"))} - set(doubles())
    needed.add("lm/parity")  # the other transformers are a suite of their own
    assert set(names) == {x for name in needed for x in (name, *(f"{name}@{d}" for d in range(1, suite.thetas)))}
    own = {p.name for p in suite.resolve_problems(own=True)}
    assert own == {name for name in names if not name.startswith(("off-policy/", "kl/", "entropy/"))}


def test_a_set_keeps_families_together() -> None:
    families = [p.name.partition("/")[0] for p in load_suite("core").resolve_problems()]
    assert len([f for f, _ in itertools.groupby(families)]) == len(set(families))


def test_the_zoo_holds_on_transformers() -> None:
    """Every claim on every language model; what says it is unbiased is so on each of them."""
    report = load_suite("lm").run()
    assert report.exit_code == 0
    assert {p.name for p in report.problems} == {name for name in registered_problems() if name.startswith("lm/")}
    sampled = ("lm/stale", "lm/top-k")
    for name in ("leave_one_out", "reinforce"):
        found = {m.problem: m.finding for m in report.measurements if m.estimator == name}
        assert {x for problem, x in found.items() if problem not in sampled} == {"unbiased"}
    on_stale = {m.estimator: m.finding for m in report.measurements if m.problem == "lm/stale"}
    assert (on_stale["trajectory_is"], on_stale["token_is"]) == ("unbiased", "biased")
    assert report.cell("trajectory_is", "lm/top-k").finding == "biased"  # type: ignore[union-attr]


# -- reading


def test_a_small_file(tmp_path: Path) -> None:
    suite = load_suite(write(tmp_path, SMALL))
    assert (suite.name, suite.thetas, suite.checks, suite.budget) == ("small", 1, None, DEFAULT_BUDGET)
    assert [e.name for e in suite.resolve_estimators()] == ["reinforce", "leave_one_out"]
    assert [p.name for p in suite.resolve_problems()] == ["bandit/two-arm", "mdp/pessimal"]


def test_all_its_keys(tmp_path: Path) -> None:
    text = SMALL + 'thetas = 3\nchecks = ["unbiased", "finite"]\nbudget = 1000\n'
    text += '[[expect]]\nestimator = "reinforce"\nproblem = "bandit/two-arm@2"\nfinding = "unbiased"\n'
    suite = load_suite(write(tmp_path, text))
    assert [p.name for p in suite.resolve_problems()] == [
        *("bandit/two-arm", "bandit/two-arm@1", "bandit/two-arm@2"),
        *("mdp/pessimal", "mdp/pessimal@1", "mdp/pessimal@2"),
    ]
    report = suite.run()
    assert {v.check for v in report.verdicts} == {"unbiased", "finite", "expected_finding"}
    assert report.exit_code == 0


def test_an_alias_and_code_of_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`rloo`, and `module:function` from the current directory."""
    (tmp_path / "losses_of_a_user.py").write_text(
        "def mine(batch):\n    return -(batch.episode_return[:, None] * batch.logp * batch.mask).sum(-1).mean()\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    text = SMALL.replace('"reinforce", "leave_one_out"', '"rloo", "losses_of_a_user:mine"')
    suite = load_suite(write(tmp_path, text))
    assert [e.name for e in suite.resolve_estimators()] == ["leave_one_out", "mine"]
    assert suite.run().exit_code == 0


# -- patterns


def test_patterns() -> None:
    assert [p.name for p in problems_matching(["mdp/two-state*"])] == [
        *("mdp/two-state", "mdp/two-state-0.9", "mdp/two-state-0.5"),
    ]


def test_a_problem_comes_once_and_in_the_order_of_the_patterns() -> None:
    names = [p.name for p in problems_matching(["mdp/pessimal", "mdp/*", "mdp/pessimal"])]
    assert names[0] == "mdp/pessimal"
    assert len(names) == len(set(names)) == 4


def test_every_theta_stands_next_to_its_problem() -> None:
    names = [p.name for p in problems_matching(["bandit/two-arm", "mdp/pessimal"], thetas=2)]
    assert names == ["bandit/two-arm", "bandit/two-arm@1", "mdp/pessimal", "mdp/pessimal@1"]


def test_one_theta_by_its_name() -> None:
    (problem,) = problems_matching(["bandit/two-arm@3"])
    assert problem.name == "bandit/two-arm@3"


def test_a_theta_of_a_theta_is_not_the_same_name_twice() -> None:
    """`NAME@1` at two θ: whatever it means, two names."""
    names = [p.name for p in problems_matching(["bandit/two-arm@1"], thetas=2)]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("pattern", ["bandits/*", "bandit/two-arms", "nothing-like-it-at-all", "bandit/two-arms@1"])
def test_a_pattern_without_a_match(pattern: str) -> None:
    with pytest.raises(UnknownNameError, match="unknown problem"):
        problems_matching(["bandit/two-arm", pattern])


# -- one error each


BAD = {
    # what is wrong: (file, what the message says)
    "a typo in a key": (SMALL + "theta = 2\n", ["theta", "Did you mean 'thetas'"]),
    "an unknown key": (SMALL + "colour = 'red'\n", ["colour", "Fields:", "estimators", "budget"]),
    "an unknown estimator": (
        SMALL.replace("leave_one_out", "leave_one_uot"),
        ["estimator 'leave_one_uot'", "Did you mean 'leave_one_out'"],
    ),
    "an unknown problem": (
        SMALL.replace("mdp/pessimal", "mdp/pesimal"),
        ["problem 'mdp/pesimal'", "Did you mean 'mdp/pessimal'"],
    ),
    "an unknown check": (SMALL + 'checks = ["unbiasd"]\n', ["check 'unbiasd'", "Did you mean 'unbiased'"]),
    "estimators that are no list": (SMALL.replace('["reinforce", "leave_one_out"]', "3"), ["estimators"]),
    "estimators that are neither all nor a list": (
        SMALL.replace('["reinforce", "leave_one_out"]', '"reinforce"'),
        ["estimators", "reinforce"],
    ),
    "a number for a name": (SMALL.replace('"small"', "7"), ["field 'name'", "string", "7"]),
    "an empty name": (SMALL.replace('"small"', '""'), ["field 'name'"]),
    "no name": (SMALL.replace('name = "small"\n', ""), ["field 'name'", "missing"]),
    "no problems": (SMALL.replace('["bandit/two-arm", "mdp/pessimal"]', "[]"), ["field 'problems'"]),
    "no θ": (SMALL + "thetas = 0\n", ["field 'thetas'", "greater than or equal to 1", "0"]),
    "half a θ": (SMALL + "thetas = 1.5\n", ["field 'thetas'", "1.5"]),
    "a budget of nothing": (SMALL + "budget = 0\n", ["field 'budget'"]),
    "no TOML": ("name = \n", ["not a TOML file", "line 1"]),
    "a finding there is not": (
        SMALL + '[[expect]]\nestimator = "reinforce"\nproblem = "bandit/two-arm"\nfinding = "fine"\n',
        ["[[expect]] number 1, field 'finding'", "'unbiased', 'proportional', 'biased' or 'inconclusive'", "fine"],
    ),
    "a typo in an expectation": (
        SMALL + '[[expect]]\nestimater = "reinforce"\nproblem = "bandit/two-arm"\nfinding = "biased"\n',
        ["estimat"],
    ),
    "an expectation of another estimator": (
        SMALL + '[[expect]]\nestimator = "grpo"\nproblem = "bandit/two-arm"\nfinding = "biased"\n',
        ["estimator 'grpo'", "[[expect]] names the suite's own"],
    ),
    "an expectation on another problem": (
        SMALL + '[[expect]]\nestimator = "reinforce"\nproblem = "bandit/two-arm@1"\nfinding = "biased"\n',
        ["problem 'bandit/two-arm@1'", "Did you mean 'bandit/two-arm'", "[[expect]] names the suite's own"],
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_what_cannot_be_read(what: str, tmp_path: Path) -> None:
    """One line that begins with the file."""
    text, words = BAD[what]
    path = write(tmp_path, text)
    with pytest.raises(SuiteError) as caught:
        load_suite(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    for word in words:
        assert word in message


def test_no_such_module_in_a_suite(tmp_path: Path) -> None:
    """Names the path, as every other fault of the file does."""
    path = write(tmp_path, SMALL.replace('"leave_one_out"', '"no_such_module_here:loss"'))
    with pytest.raises(SuiteError, match=r"mine\.toml.*no_such_module_here"):
        load_suite(path)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_bytes(b'name = "\xff\xfe"')
    with pytest.raises(SuiteError, match="not a TOML file"):
        load_suite(str(path))


@pytest.mark.parametrize("name", ["cor", "no/such/file.toml"])
def test_a_suite_there_is_not(name: str) -> None:
    with pytest.raises(UnknownNameError, match=f"unknown suite '{name}'"):
        load_suite(name)
    if name == "cor":
        with pytest.raises(UnknownNameError, match="Did you mean 'core'"):
            load_suite(name)


def test_a_folder_is_no_suite(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="unknown suite"):
        load_suite(str(tmp_path))


# -- running


def test_other_estimators_in_place_of_its_own(tmp_path: Path) -> None:
    """Expectations of estimators that are not run are not asked."""
    text = SMALL + '[[expect]]\nestimator = "reinforce"\nproblem = "bandit/two-arm"\nfinding = "unbiased"\n'
    suite = load_suite(write(tmp_path, text))
    report = suite.run(estimators=[registered_estimators()["batch_mean"]])
    assert [e.name for e in report.estimators] == ["batch_mean"]
    assert "expected_finding" not in {v.check for v in report.verdicts}
    assert report.suite == "small"


def test_a_budget_in_place_of_its_own(tmp_path: Path) -> None:
    suite = load_suite(write(tmp_path, SMALL + 'checks = ["unbiased"]\n'))
    assert suite.run().exit_code == 0
    report = suite.run(budget=1)
    assert report.exit_code == 1
    assert {v.status for v in report.failures} == {Status.INCONCLUSIVE}


def test_a_suite_is_data() -> None:
    """Frozen, and equal if it says the same."""
    suite = Suite(name="x", estimators="all", problems=["bandit/*"])
    assert suite == Suite(name="x", estimators="all", problems=["bandit/*"])
    with pytest.raises(ValueError, match="frozen"):
        suite.name = "y"  # type: ignore[misc]
