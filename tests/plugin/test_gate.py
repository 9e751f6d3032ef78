"""The gate inside pytest: its items, its options, and that it costs nothing unasked. In a whole project: tests/downstream."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree as ET

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


# -- what is sampled, cases and registries

SAMPLED = """
[tool.pgcheck]
problems = ["bandit/two-arm"]
thetas = 1
checks = ["unbiased", "finite"]
engine = "monte_carlo"
draws = 4096
tolerance = 0.5
baseline = "baseline.json"
estimators = ["losses_of_gate.py:sound"]
"""


def properties(path: Path, name: str) -> dict[str, str]:
    (case,) = [c for c in ET.parse(path).getroot().iter("testcase") if c.attrib["name"] == name]
    return {p.attrib["name"]: p.attrib["value"] for p in case.iter("property")}


def test_sampled_estimators_by_the_same_seed_and_by_others(suite: Suite, pytester: pytest.Pytester) -> None:
    """The same draws compare exactly; other seeds by a test, whose p-value and level are told; neither is red."""
    pytester.makepyprojecttoml(SAMPLED)
    assert suite("--pgcheck-update", test="").ret == 0
    held = json.loads((pytester.path / "baseline.json").read_text())
    assert [(e["engine"], e["seed"], e["batches"]) for e in held["entries"]] == [("monte_carlo", 0, 4096)]
    for seed in (0, 5):
        result = suite("--pgcheck-baseline=baseline.json", f"--pgcheck-seed={seed}", "--junitxml=x.xml", test="")
        assert result.ret == 0
        told = properties(pytester.path / "x.xml", "sound-bandit/two-arm-unchanged")
        assert (told["seed"], told["engine"]) == (str(seed), "monte_carlo")
        assert ("p" in told) == (seed == 5)
        if seed == 5:
            assert float(told["p"]) > float(told["level"])
        claim = properties(pytester.path / "x.xml", "sound-bandit/two-arm-unbiased")
        assert (claim["seed"], claim["engine"]) == (str(seed), "monte_carlo")
    pytester.makepyfile(losses_of_gate=LOSSES.replace("return -(weight", "return 0.5 * -(weight"))
    for seed, said in ((0, "*on the same 4,096 draws of seed 0*"), (6, "*by chance with p ≤ *below *")):
        result = suite("--pgcheck-baseline=baseline.json", f"--pgcheck-seed={seed}", "-k", "unchanged", test="")
        assert result.ret == 1
        result.stdout.fnmatch_lines([said])


CASES = """
name = "mixed"
estimators = ["leave_one_out"]
problems = ["bandit/two-arm"]
checks = ["unbiased"]

[[expect]]
estimator = "leave_one_out"
problem = "bandit/two-arm"
finding = "unbiased"

[[case]]
name = "own-sample"
says = "The own sample in the mean scales the gradient by (B-1)/B."
source = "algebra"
truth = "right"
quantity = "scale"
estimator = "batch_mean"
problem = "bandit/two-arm"
equals = "(B-1)/B"
because = "The own return cancels 1/B of the signal."
"""


def test_cases_and_expectations_of_a_suite_are_items(suite: Suite, pytester: pytest.Pytester) -> None:
    pytester.makepyprojecttoml('[tool.pgcheck]\nsuite = "mixed.toml"\nbaseline = "baseline.json"')
    (pytester.path / "mixed.toml").write_text(CASES)
    suite("--pgcheck-update", test="").assert_outcomes(passed=6)
    result = suite("--pgcheck-baseline=baseline.json", "-v", test="")
    result.assert_outcomes(passed=6)
    for name in ("own-sample-case", "own-sample-unchanged", "leave_one_out-bandit/two-arm-expected_finding"):
        result.stdout.fnmatch_lines([f"pgcheck::{name} PASSED*"])
    (pytester.path / "mixed.toml").write_text(CASES.replace('"(B-1)/B"', "0.9").replace('"unbiased"\n', '"biased"\n'))
    result = suite("--pgcheck-baseline=baseline.json", "-v", test="")
    result.assert_outcomes(passed=3, failed=3)
    result.stdout.fnmatch_lines(["*own-sample is FAIL: the sentence does not hold*"])
    result.stdout.fnmatch_lines(["*leave_one_out-bandit/two-arm-expected_finding: expected biased, found unbiased*"])
    result.stdout.fnmatch_lines(["*own-sample: relation = (B-1)/B → = 0.9; holds True → False*"])
    (pytester.path / "mixed.toml").write_text(CASES[: CASES.index("[[case]]")])
    result = suite("--pgcheck-baseline=baseline.json", test="")
    result.assert_outcomes(passed=4, failed=1)
    result.stdout.fnmatch_lines(["FAILED pgcheck::own-sample-orphaned*"])


def test_the_marker_takes_a_registry_or_one_entry_of_it(suite: Suite, pytester: pytest.Pytester) -> None:
    pytester.makepyfile(losses_of_gate=LOSSES + "\nREGISTRY = {'one': sound, 'two': sound}\n")
    for given, names in (("REGISTRY", ["one", "two"]), ("REGISTRY[two]", ["two"])):
        test = MARKED.replace('["reinforce"]', f'["losses_of_gate.py:{given}"]')
        found = suite("--collect-only", "-q", test=test).outlines
        assert [x for x in found if "test_marked" in x] == [
            f"test_mine.py::test_marked[{name}-bandit/two-arm-unbiased]" for name in names
        ]


# -- workers


def test_an_estimator_is_enumerated_once_for_all_workers(suite: Suite, pytester: pytest.Pytester) -> None:
    """A loss that writes down who enumerates it; and nothing is left in the folder that workers share."""
    seen = pytester.path / "seen"
    noting = LOSSES.replace(
        "def sound(batch):",
        f"import os\n\ndef sound(batch):\n    open({str(seen)!r}, 'a').write(f'{{os.getpid()}}\\n')",
    )
    pytester.makepyfile(losses_of_gate=noting)
    before = set(Path(tempfile.gettempdir()).glob("pgcheck-*"))
    plugins = ["-p", "pgcheck.pytest_plugin", "-p", "xdist", "-p", "no:hypothesispytest", "-p", "no:anyio"]
    result = pytester.runpytest_subprocess(*plugins, "-n2", "--pgcheck-update", "--pgcheck-report=report.json")
    assert result.ret == 0, result.outlines
    judging = seen.read_text().split()
    counts = {pid: judging.count(pid) for pid in judging}
    # whoever only collects calls it to see whether it is a loss; whoever judges, many more times
    assert sum(n > max(counts.values()) / 2 for n in counts.values()) == 1, counts
    assert set(Path(tempfile.gettempdir()).glob("pgcheck-*")) <= before
