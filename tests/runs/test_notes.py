"""The sentences of the suites: each decided by its number, none by luck, and none left out."""

from __future__ import annotations

import functools
import io
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pgcheck.errors import SuiteError, UsageError
from pgcheck.estimators.base import from_coefficients
from pgcheck.registry import registered_problems
from pgcheck.render.markdown import markdown
from pgcheck.render.tables import case_message, case_rows, summary
from pgcheck.render.terminal import print_matrix
from pgcheck.runs.cases import RELATIONS, Case, Subject, decide, formula, numbers_of, subjects
from pgcheck.runs.report import CaseRow, Report
from pgcheck.runs.suite import Suite, load_suite, read_suite, shipped_suites
from pgcheck.verdicts.quantities import Found, registered_quantities
from pgcheck.verdicts.verdict import Status

SUITES = ("notes", "off_policy")
CASES: dict[str, Case] = {f"{s}: {case.name}": case for s in SUITES for case in load_suite(s).case}


@functools.cache
def numbers(key: str) -> list[tuple[Subject, Found]]:
    return numbers_of(CASES[key], subjects(CASES[key]))


def judged(key: str, **changes: Any) -> CaseRow:
    """The verdict on a case, with parts of it changed."""
    return decide(CASES[key].model_copy(update=changes), numbers(key))


# -- what the suites say


@pytest.mark.parametrize("key", CASES)
def test_every_case_passes(key: str) -> None:
    row = judged(key)
    assert row.status is Status.PASS, case_message(row)
    assert row.holds == (row.truth == "right")
    assert row.reason == ""


@pytest.mark.parametrize("key", CASES)
def test_every_case_would_fail_if_the_opposite_were_held(key: str) -> None:
    row = judged(key, truth="wrong" if CASES[key].truth == "right" else "right")
    assert row.status is Status.FAIL
    assert row.reason


OPPOSITE = {
    "equals": "differs_from",
    "differs_from": "equals",
    "above": "at_most",
    "at_most": "above",
    "below": "at_least",
    "at_least": "below",
}


@pytest.mark.parametrize("key", [key for key, case in CASES.items() if len(case.relations) == 1])
def test_every_case_would_fail_under_the_opposite_relation_of_its_number(key: str) -> None:
    """Asked of the one combination that the report shows."""
    case = CASES[key]
    ((relation, amount),) = case.relations.items()
    shown = judged(key).subject
    one = [pair for pair in numbers(key) if {k: str(x) for k, x in pair[0].named.items()} == shown]
    assert decide(case, one).status is Status.PASS
    opposite = case.model_copy(update={relation: None, OPPOSITE[relation]: amount})
    assert decide(opposite, one).status is Status.FAIL


@pytest.mark.parametrize("key", [key for key, case in CASES.items() if case.number is not None])
def test_a_number_that_is_known_is_compared(key: str) -> None:
    row = judged(key, number=f"({CASES[key].number}) + 0.001")
    assert row.status is Status.FAIL
    assert "the number is not" in row.reason


TABLE_A = (
    "reinforce",
    "reward_to_go",
    "reward_to_go_undiscounted_weight",
    "baselined(constant)",
    "baselined(value)",
    "baselined(optimal_constant)",
    "baselined(optimal_state)",
    "baselined(optimal_state_joint)",
    "baselined(next_state)",
    "baselined(next_action)",
    "baselined(own_return)",
    "batch_mean",
    "batch_mean(group)",
    "batch_mean(reward_to_go)",
    "batch_mean_alive",
    "leave_one_out",
    "leave_one_out(batch)",
    "trajectory_is",
    "per_decision_is",
    "token_is",
    "cispo",
    "cispo(notes)",
    "grpo",
    "vineppo(K=1)",
    "vineppo(K=2)",
    "gigpo",
    "gigpo_step(leave_one_out)",
    "gigpo_step(singleton_zero)",
    "gigpo_step(in_sample)",
    "reinforce_pp",
    "reinforce_pp(group)",
)


def _named(case: Case, *keys: str) -> set[str]:
    listed = [case.arguments.get(key, []) for key in keys]
    return {x for one in listed for x in (one if isinstance(one, list) else [one])}


@pytest.mark.parametrize("name", TABLE_A)
def test_every_estimator_of_the_notes_is_spoken_of(name: str) -> None:
    assert any(name in _named(case, "estimator", "against") for case in load_suite("notes").case)


def test_every_quantity_decides_something() -> None:
    of_a_model = {case.quantity for case in read_suite(shipped_suites()["pretrained"]).case}
    assert {case.quantity for case in CASES.values()} | of_a_model | {"rel"} == set(registered_quantities())


def test_every_problem_of_the_notes_decides_something() -> None:
    used = {str(x) for case in CASES.values() for s in subjects(case) for x in s.named.values()}
    assert {name for name in registered_problems() if name.startswith("notes/")} <= used


def test_the_sentences_are_told_apart() -> None:
    for suite in SUITES:
        cases = load_suite(suite).case
        assert len({c.name for c in cases}) == len({c.says for c in cases}) == len(cases)
    assert len(load_suite("notes").case) >= 60


# -- running one


ONE = """
name = "mine"
[[case]]
name = "batch-mean"
says = "The batch mean keeps the gradient."
source = "me"
truth = "wrong"
quantity = "scale"
estimator = "batch_mean"
problem = ["mdp/two-state", "bandit/two-arm"]
equals = 1
because = "(B−1)/B"
"""


def read(folder: Path, text: str) -> Suite:
    path = folder / "mine.toml"
    path.write_text(text, encoding="utf-8")
    return load_suite(str(path))


def run(folder: Path, text: str = ONE) -> Report:
    return read(folder, text).run()


def test_a_suite_of_cases_alone(tmp_path: Path) -> None:
    report = run(tmp_path)
    (row,) = report.cases
    assert (report.exit_code, report.verdicts, report.failed_cases) == (0, [], [])
    assert (row.status, row.holds, row.asked, row.relation) == (Status.PASS, False, 2, "= 1")
    assert row.subject == {"estimator": "batch_mean", "problem": "mdp/two-state"}
    assert row.value == pytest.approx(2 / 3, rel=1e-12)
    assert summary(report) == "1 cases: 1 PASS, 0 FAIL, 0 INCONCLUSIVE."


def test_a_case_that_fails_fails_the_run(tmp_path: Path) -> None:
    report = run(tmp_path, ONE.replace('"wrong"', '"right"'))
    assert report.exit_code == 1
    assert [c.name for c in report.failed_cases] == ["batch-mean"]
    assert "the sentence does not hold" in case_message(report.failed_cases[0])
    assert "**right, FAIL!**" in markdown(report)


def test_the_same_bytes(tmp_path: Path) -> None:
    report = run(tmp_path)
    assert report.to_json() == run(tmp_path).to_json()
    assert Report.model_validate_json(report.to_json()) == report


def test_every_θ_is_a_problem_of_its_own(tmp_path: Path) -> None:
    (row,) = run(tmp_path, ONE.replace('["mdp/two-state", "bandit/two-arm"]', '"mdp/two-state*@1"')).cases
    assert row.asked == 3
    assert row.subject["problem"].endswith("@1")


def test_batches_of_another_shape(tmp_path: Path) -> None:
    (row,) = run(tmp_path, ONE + "groups = 1\ngroup_size = [2, 4]\n").cases
    assert (row.asked, row.subject["group_size"], row.value) == (4, "2", pytest.approx(0.5, rel=1e-12))
    uneven = (
        ONE.replace('["mdp/two-state", "bandit/two-arm"]', '"bandit/two-arm"') + "groups = 2\ngroup_size = [[3, 2]]\n"
    )
    (row,) = run(tmp_path, uneven).cases
    assert row.value == pytest.approx(4 / 5, rel=1e-12)


def test_a_number_that_is_no_number_decides_nothing(tmp_path: Path) -> None:
    """∇J = 0 there: neither "right" nor "wrong" passes."""
    for truth in ("right", "wrong"):
        text = ONE.replace('["mdp/two-state", "bandit/two-arm"]', '"bandit/stationary"').replace("wrong", truth)
        (row,) = run(tmp_path, text).cases
        assert (row.status, row.holds, row.value) == (Status.INCONCLUSIVE, None, None)
        assert "nan" in row.reason


def test_what_is_too_large_decides_nothing(tmp_path: Path) -> None:
    text = ONE.replace('["mdp/two-state", "bandit/two-arm"]', '"tree/tokens"').replace("batch_mean", "gigpo")
    report = run(tmp_path, text + "groups = 1\ngroup_size = 12\n")
    assert report.exit_code == 1
    assert report.cases[0].status is Status.INCONCLUSIVE
    assert "budget" in report.cases[0].reason


@pytest.mark.parametrize(
    "asked",
    [
        '"component"\ncontext = 9',  # there is no such context
        '"variance_ratio"\nagainst = "baselined(optimal_constant)"',  # over 0
        '"break_even"\nagainst = "batch_mean"',  # over 0
        '"bias_exponent"\nrows = 2\nmore_rows = 4',  # of a direction that is right
        '"variance_share"\npart = "all"',  # of coupled rows
    ],
)
def test_what_goes_wrong_on_the_way_decides_nothing(asked: str, tmp_path: Path) -> None:
    text = ONE.replace('["mdp/two-state", "bandit/two-arm"]', '"bandit/two-arm"').replace('"scale"', asked)
    report = run(tmp_path, text)
    assert report.exit_code == 1
    assert report.cases[0].status is Status.INCONCLUSIVE
    assert report.cases[0].reason


def test_other_estimators_are_not_spoken_of(tmp_path: Path) -> None:
    mine = from_coefficients(lambda batch: batch.mask, couples="trajectory", name="mine")
    with pytest.raises(UsageError, match="cases only"):
        read(tmp_path, ONE).run(estimators=[mine])


def test_cases_beside_estimators(tmp_path: Path) -> None:
    text = ONE.replace('name = "mine"', 'name = "mine"\nestimators = ["reinforce"]\nproblems = ["bandit/two-arm"]', 1)
    report = run(tmp_path, text)
    assert report.exit_code == 0
    assert report.verdicts
    assert "verdicts" in summary(report)
    assert "1 cases" in summary(report)
    assert "## Verdict matrix" in markdown(report)


def test_a_terminal_shows_a_sentence_a_line(tmp_path: Path) -> None:
    for truth, status in (("wrong", "PASS"), ("right", "FAIL")):
        out = io.StringIO()
        print_matrix(run(tmp_path, ONE.replace('"wrong"', f'"{truth}"')), Console(file=out, width=100))
        (line,) = [x for x in out.getvalue().splitlines() if x.startswith("batch-mean")]
        assert line.split() == ["batch-mean", truth, "0.6667", "=", "1", status]
        assert ("the sentence does not hold" in out.getvalue()) == (status == "FAIL")
        assert "E ĝ is" not in out.getvalue()  # nothing was measured, so there is no matrix


def test_a_page_shows_the_number_and_what_it_is_of(tmp_path: Path) -> None:
    page = markdown(run(tmp_path))
    (line,) = [x for x in page.splitlines() if "`batch-mean`" in x]
    assert "| wrong | 0.6667<br>`scale(batch_mean, mdp/two-state)`<br>the worst of 2 asked | = 1 |" in line
    assert "Verdict matrix" not in page


def test_case_rows_are_calls() -> None:
    row = judged("notes: grpo-weighs-all-difficulties-alike")
    report = load_suite("notes").model_copy(update={"case": [CASES["notes: grpo-weighs-all-difficulties-alike"]]}).run()
    (text,) = case_rows(report)
    assert text.of == (
        "scale_ratio(pgcheck.estimators.variants:grpo_eps_0, notes/coin-0.01, notes/coin-0.5, group_size=16)"
    )
    assert (text.number, text.relation, text.contradicts) == ("1.93", "= 1", False)
    assert row.beside["scale on the other"] == pytest.approx(1.9341226048784477)


# -- one error each


BAD = {
    # what is wrong: (file, what the message says after the case's name)
    "an unknown quantity": (ONE.replace('"scale"', '"scal"'), ["quantity 'scal'", "Did you mean 'scale'"]),
    "an unknown estimator": (
        ONE.replace('"batch_mean"', '"batch_meen"'),
        ["'batch_meen'", "Did you mean 'batch_mean'"],
    ),
    "an unknown problem": (ONE.replace("mdp/two-state", "mdp/two-stat"), ["'mdp/two-stat'", "Did you mean"]),
    "a pattern without a match": (ONE.replace("mdp/two-state", "mpd/*"), ["'mpd/*'"]),
    "a missing argument": (ONE.replace('estimator = "batch_mean"\n', ""), ["quantity 'scale' needs estimator"]),
    "a typo in an argument": (
        ONE.replace("estimator =", "estimater ="),
        ["key 'estimater'", "Did you mean 'estimator'"],
    ),
    "a typo in a relation": (ONE.replace("equals", "equal"), ["key 'equal'", "Did you mean 'equals'"]),
    "an argument of another quantity": (ONE + "baseline = 2\n", ["key 'baseline'", "'scale' takes estimator, problem"]),
    "no relation": (ONE.replace("equals = 1\n", ""), ["nothing decides it", "equals, differs_from, above"]),
    "a formula that does not parse": (ONE.replace("= 1\n", '= "(B-1"\n'), ["formula '(B-1'", "does not parse"]),
    "a formula with an unknown letter": (
        ONE.replace("= 1\n", '= "N/B"\n'),
        ["'N' is not understood", "B, T, gamma, G"],
    ),
    "a formula that would run code": (
        ONE.replace("= 1\n", "= \"__import__('os').getpid()\"\n"),
        ["is not understood"],
    ),
    "a formula without a value": (ONE.replace("= 1\n", '= "1/0"\n'), ["formula '1/0'", "division by zero"]),
    "a number that does not parse": (ONE + 'number = "two thirds"\n', ["formula 'two thirds'"]),
    "an empty list": (ONE.replace('"batch_mean"', "[]"), ["estimator: an empty list"]),
    "an empty list of sizes": (ONE + "group_size = []\n", ["group_size: an empty list"]),
    "groups of groups": (ONE + "groups = [[1, 2]]\n", ["groups: [1, 2]", "integer"]),
    "sizes of sizes": (ONE + "group_size = [[[1, 2]]]\n", ["group_size: [1, 2]", "integer"]),
    "a table for a number": (
        ONE.replace('"scale"', '"batchwise_gap"') + 'against = "batch_mean"\nfactor = {}\n',
        ["formula {}"],
    ),
    "an endless number": (ONE.replace("= 1\n", "= inf\n"), ["formula 'inf'", "it is inf"]),
    "a group size of nothing": (ONE + "group_size = 0\n", ["group_size: 0"]),
    "a group that is too small": (
        ONE.replace('"batch_mean"', '"leave_one_out"') + "groups = 3\ngroup_size = 1\n",
        ["'leave_one_out' needs groups of at least 2 on 'mdp/two-state'"],
    ),
    "a word for a number": (
        ONE.replace('"scale"', '"component"') + 'context = "first"\n',
        ["context: 'first'", "an integer"],
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_what_cannot_be_asked(what: str, tmp_path: Path) -> None:
    """One line with file and case."""
    text, words = BAD[what]
    with pytest.raises(SuiteError) as caught:
        read(tmp_path, text)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'mine.toml'}: case 'batch-mean': ")
    assert "\n" not in message
    for word in words:
        assert word in message


FAULTS = {
    "two of one name": (ONE + ONE.split("\n", 2)[2], ["case 'batch-mean' is there twice"]),
    "no truth": (ONE.replace('truth = "wrong"\n', ""), ["[[case]] number 1, field 'truth' is missing"]),
    "a truth there is not": (
        ONE.replace('"wrong"', '"maybe"'),
        ["[[case]] number 1, field 'truth'", "'right' or 'wrong'", "maybe"],
    ),
    "a name with capitals": (ONE.replace('"batch-mean"', '"Batch mean"'), ["[[case]] number 1, field 'name'"]),
    "no reason": (ONE.replace('because = "(B−1)/B"\n', ""), ["[[case]] number 1, field 'because' is missing"]),
    "a truth value for a number": (ONE.replace("equals = 1", "equals = true"), ["[[case]] number 1, field 'equals'"]),
    "a list for a relation": (ONE.replace("equals = 1", "equals = [1]"), ["[[case]] number 1, field 'equals'"]),
    "neither cases nor estimators": ('name = "mine"\n', ["field 'estimators'", "or cases"]),
    "problems without estimators": (ONE.replace("[[case]]", 'problems = ["mdp/*"]\n[[case]]'), ["field 'estimators'"]),
}


@pytest.mark.parametrize("what", FAULTS)
def test_what_is_no_case(what: str, tmp_path: Path) -> None:
    text, words = FAULTS[what]
    with pytest.raises(SuiteError) as caught:
        read(tmp_path, text)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'mine.toml'}: ")
    assert "\n" not in message
    for word in words:
        assert word in message


# -- formulas


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (0.25, 0.25),
        ("1/4", 0.25),
        ("-(2 + 1) * 3**2 - 1", -28.0),
        ("(B-1)/B", 0.75),
        ("sqrt(2)", math.sqrt(2)),
        ("log(exp(B))", 4.0),
        (" 2e-3 ", 0.002),
    ],
)
def test_formulas(text: float | str, expected: float) -> None:
    assert formula(text, {"B": 4.0}) == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "B B",
        "B.real",
        "[1]",
        "lambda: 1",
        "abs(1)",
        "True",
        "'1'",
        "sqrt(-1)",
        "10**10**10",
        "~1",
        "sqrt(1, 2)",
        "(-8)**0.5",
        "1e999",
        math.inf,
        math.nan,
        True,
    ],
)
def test_what_is_no_formula(text: Any) -> None:
    with pytest.raises(UsageError, match="formula"):
        formula(text, {"B": 4.0})


def test_relations_have_their_opposites() -> None:
    assert set(OPPOSITE) == set(RELATIONS)
