"""The gate inside pytest: its items, its options, and that it costs nothing unasked. In a whole project: tests/downstream."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytest_plugins = "pytester"

LOSSES = """
def sound(batch):
    weight = batch.discount_weight * batch.reward_to_go
    return -(weight * batch.logp * batch.mask).sum(-1).mean()

def wrong(batch):
    r = batch.episode_return
    return -((r - r.mean())[:, None] * batch.logp * batch.mask).sum(-1).mean()
"""
CONFIG = """
[tool.pgcheck]
problems = ["bandit/two-arm"]
thetas = 1
checks = ["unbiased", "proportional", "finite", "row_order"]
baseline = "baseline.json"
estimators = ["losses_of_gate.py:sound", {path = "losses_of_gate.py:wrong", expected_failed_checks = {unbiased = "own sample"}}]
"""
MARKED = """
import pytest

@pytest.mark.pgcheck(["reinforce"], problems="bandit/two-arm", checks=["unbiased"])
def test_marked(pgcheck_verdict):
    BODY

def test_other():
    pass
"""
IDS = [
    *("sound-bandit/two-arm-unbiased", "sound-finite", "sound-row_order"),
    *("wrong-bandit/two-arm-unbiased", "wrong-finite", "wrong-row_order"),
]

Suite = Callable[..., pytest.RunResult]


@pytest.fixture
def suite(pytester: pytest.Pytester) -> Suite:
    """Run a project with two losses in its config and a marked test."""
    pytester.makepyprojecttoml(CONFIG)
    pytester.makepyfile(losses_of_gate=LOSSES)

    def run(*options: str, body: str = "pgcheck_verdict.check()", test: str = MARKED) -> pytest.RunResult:
        pytester.makepyfile(test_mine=test.replace("BODY", body))
        given = ("-p", "pgcheck.pytest_plugin", "--import-mode=importlib", "-W", "error", "-ra", *options)
        return pytester.runpytest_inprocess(*given)

    return run


def test_without_an_option_there_are_the_marked_items_alone(suite: Suite) -> None:
    result = suite("-v")
    result.assert_outcomes(passed=2)
    result.stdout.fnmatch_lines(["*test_marked[[]reinforce-bandit/two-arm-unbiased] PASSED*"])


def test_it_imports_nothing_unasked(tmp_path: Path) -> None:
    """Neither torch, nor pgcheck beyond the doors; also with a test to run."""
    code = (
        "import sys, pytest\n"
        "code = pytest.main(['-q', '-p', 'pgcheck.pytest_plugin', '-p', 'no:cacheprovider', '--collect-only'])\n"
        "assert 'pgcheck.pytest_plugin' in sys.modules\n"
        "heavy = {'torch', 'pgcheck.verdict_items', 'pgcheck.errors', 'pydantic', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_ids_before_anything_is_judged(suite: Suite) -> None:
    suite("--pgcheck-update").assert_outcomes(passed=13, xfailed=1)
    result = suite("--pgcheck-baseline=baseline.json", "--collect-only", "-q")
    found = {line for line in result.outlines if "::" in line}
    compared = {f"{e}{p}-unchanged" for e in ("sound", "wrong") for p in ("", "-bandit/two-arm")}
    own = {f"pgcheck::{x}" for x in {*IDS, *compared}}
    marks = ("reinforce-bandit/two-arm-unbiased", "reinforce-unchanged", "reinforce-bandit/two-arm-unchanged")
    assert found == own | {f"test_mine.py::test_marked[{x}]" for x in marks} | {"test_mine.py::test_other"}
    assert result.ret == 0


def test_what_is_gone_is_an_item_that_k_and_lf_see(suite: Suite, pytester: pytest.Pytester) -> None:
    suite("--pgcheck-update")
    pytester.makepyprojecttoml(CONFIG.replace('"losses_of_gate.py:sound", ', ""))
    result = suite("--pgcheck-baseline=baseline.json")
    result.assert_outcomes(passed=8, xfailed=1, failed=2)
    result.stdout.fnmatch_lines(["FAILED pgcheck::sound-bandit/two-arm-orphaned*"])
    suite("--pgcheck-baseline=baseline.json", "-k", "orphaned").assert_outcomes(failed=2, deselected=9)
    suite("--pgcheck-baseline=baseline.json", "--lf").assert_outcomes(failed=2, deselected=9)


def test_what_is_new_is_an_item_that_fails(suite: Suite, pytester: pytest.Pytester) -> None:
    suite("--pgcheck-update")
    pytester.makepyprojecttoml(CONFIG.replace('["bandit/two-arm"]', '["bandit/two-arm", "dialogue/two-turn"]'))
    result = suite("--pgcheck-baseline=baseline.json")
    result.stdout.fnmatch_lines(["FAILED pgcheck::wrong-dialogue/two-turn-missing*"])
    assert result.ret == 1


@pytest.mark.parametrize(
    ("test", "body", "words"),
    [
        (MARKED, "pass", "nothing was checked: the test does not call pgcheck_verdict.check()"),
        ("def test_bare(pgcheck_verdict):\n    BODY", "pass", "pgcheck_verdict belongs to a test that is marked"),
        (MARKED.replace("(pgcheck_verdict)", "()"), "pass", "must take the fixture pgcheck_verdict"),
        (MARKED.replace('["reinforce"]', '["reinforce", "reinforce"]'), "pass", "'reinforce' is given twice"),
    ],
)
def test_a_marked_test_that_checks_nothing_does_not_pass(suite: Suite, test: str, body: str, words: str) -> None:
    result = suite(body=body, test=test)
    assert result.ret != 0
    result.stdout.fnmatch_lines([f"*{words}*"])


def test_deselecting_everything_is_no_pass(suite: Suite) -> None:
    suite("--pgcheck-update")
    result = suite("--pgcheck-baseline=baseline.json", "-k", "test_other")
    assert result.ret == 5
    result.stdout.fnmatch_lines(["pgcheck: 13 verdicts were deselected", "pgcheck: nothing was checked: *"])


def test_a_report_of_a_part_is_not_written(suite: Suite, pytester: pytest.Pytester) -> None:
    suite("--pgcheck-update")
    result = suite("--pgcheck-report=report.json", "-k", "sound")
    assert result.ret == 1
    result.stdout.fnmatch_lines(["pgcheck: not judged: reinforce, wrong; nothing was written"])
    assert not (pytester.path / "report.json").exists()


def test_inconclusive_fails_unless_a_warning_will_do(suite: Suite, pytester: pytest.Pytester) -> None:
    """A budget of one batch decides nothing."""
    pytester.makepyprojecttoml(CONFIG.replace('baseline = "baseline.json"', "budget = 1"))
    failed = suite("--pgcheck-suite=core", "-k", "sound and unbiased")
    assert failed.ret == 1
    failed.stdout.fnmatch_lines(["*the budget is 1*"])
    warned = suite("--pgcheck-suite=core", "--pgcheck-inconclusive=warn", "-W", "default", "-k", "sound and unbiased")
    assert warned.ret == 0
    warned.stdout.fnmatch_lines(["*InconclusiveWarning*is inconclusive*"])
