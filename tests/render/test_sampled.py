"""Sampled verdicts as they are told: in the terminal, Markdown, HTML, JUnit and SARIF; and reports of before there were any."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from xml.etree import ElementTree

import pytest
from rich.console import Console

import pgcheck.named_problems
from pgcheck.engines.monte_carlo import Sampling
from pgcheck.estimators.base import unbiased
from pgcheck.estimators.lookup import as_estimator
from pgcheck.registry import find_problem
from pgcheck.render import ci
from pgcheck.render.html import html
from pgcheck.render.markdown import markdown
from pgcheck.render.messages import failure_messages
from pgcheck.render.terminal import print_matrix
from pgcheck.runs.report import Report
from pgcheck.runs.runner import run

HOW = Sampling(draws=8192, seed=3, tolerance=0.1, beta=0.01, alpha=1e-4)


@pytest.fixture(scope="module")
def report() -> Report:
    """One of each: PASS, FAIL and INCONCLUSIVE; a constant times the score is noise alone."""
    wrong = replace(as_estimator("batch_mean"), name="centred", claims=(unbiased(),))
    loud = as_estimator("leave_one_out")
    noisy = pgcheck.from_coefficients(
        lambda b: loud.coefficients(b) + 2.0 * b.mask,
        couples="batch",
        name="noisy",
        claims=(unbiased(),),
    )
    chosen = [loud, wrong, noisy]
    problem = find_problem("dialogue/two-turn")
    found = run(chosen, [problem], engine="monte_carlo", checks=["unbiased"], sampling=HOW, suite="s")
    assert [v.status.value for v in found.verdicts] == ["PASS", "FAIL", "INCONCLUSIVE"]
    return found


def test_every_door_says_how_sure_it_is(report: Report) -> None:
    """The draws, both error rates, what was excluded, and the seed; the same words at each door."""
    messages = failure_messages(report)
    terminal = Console(file=io.StringIO(), width=160)
    print_matrix(report, terminal)
    shown = terminal.file.getvalue()  # type: ignore[attr-defined]
    assert "1 PASS, 1 FAIL, 1 INCONCLUSIVE. 3 sampled measurements" in shown
    assert "? the sample does not decide" in shown
    for text in (markdown(report, messages), html(report, messages)):
        assert "PASS after 8,192 batches: the bias is below 0.1" in text
        assert "is excluded, at an error rate of 0.01" in text
        assert "FAIL after 8,192 batches: a bias is proven, along ∇J (`par`)" in text
        assert "at an error rate of 0.0001 for the whole run" in text
        assert "INCONCLUSIVE after 8,192 batches" in text
        assert "seed 3; in brackets 95%" in text


def test_a_build_fails_on_what_was_not_decided(report: Report) -> None:
    outcomes = ci.outcomes_of_run(report, failure_messages(report), {}, {})
    suite = ElementTree.fromstring(ci.junit(outcomes, "s")).find("testsuite")
    assert suite is not None
    failures = {case.get("name"): case.find("failure") for case in suite.iter("testcase")}
    types = sorted(x.get("type") or "" for x in failures.values() if x is not None)
    assert len(types) == 2
    assert "inconclusive" in types
    results = json.loads(ci.sarif(outcomes))["runs"][0]["results"]
    assert len(results) == 2
    assert report.exit_code == 1


def test_a_report_of_before_there_were_samples_is_read(report: Report) -> None:
    """Rows without any field of samples, and without those that came after."""
    p, e = find_problem("dialogue/two-turn"), as_estimator("leave_one_out")
    exact = json.loads(run([e], [p], checks=["unbiased"], suite="s").to_json())
    for row in (*exact["measurements"], *exact["verdicts"]):
        for name in (
            "seed",
            "low",
            "high",
            "sample",
            "sampled",
            "expected_inconclusive",
            "parameters",
            "directions",
            "against",
        ):
            row.pop(name, None)
    old = Report.model_validate(exact)
    assert old.measurements[0].seed is None
    assert old.verdicts[0].sample is None
    for text in (markdown(old, {}), html(old, {})):
        assert "after" not in text or "batches: the bias" not in text
    again = Report.model_validate_json(report.to_json())
    assert again == report
