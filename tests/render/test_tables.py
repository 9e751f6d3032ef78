"""The matrix shows what was found, and of several θ the one that says most against the estimator."""

from __future__ import annotations

import io
import math

import pandas as pd
from rich.console import Console

from pgcheck.estimators.base import unbiased
from pgcheck.estimators.lookup import as_estimator
from pgcheck.registry import find_problem
from pgcheck.render.messages import number
from pgcheck.render.tables import cells, columns, comparison_rows, matrix, summary
from pgcheck.render.terminal import print_matrix
from pgcheck.runs.report import Report
from pgcheck.runs.runner import run


def small_report() -> Report:
    from dataclasses import replace

    liar = replace(as_estimator("grpo"), name="liar", claims=(unbiased(),))
    estimators = [as_estimator("leave_one_out"), as_estimator("batch_mean"), as_estimator("grpo"), liar]
    names = ["bandit/stationary", "bandit/stationary@1", "dialogue/two-turn", "degenerate/group-of-one"]
    return run(estimators, [find_problem(name) for name in names], suite="small")


def test_symbols() -> None:
    """=, ∝, ≠ by what was found; · where it was not asked; ! where it contradicts the claim."""
    found = cells(small_report())
    assert found["leave_one_out", "dialogue/two-turn"].symbol == "="
    assert found["batch_mean", "dialogue/two-turn"].symbol == "∝"
    assert found["batch_mean", "dialogue/two-turn"].text == "×0.75"  # (B − 1)/B with B = 4
    assert found["grpo", "dialogue/two-turn"].symbol == "≠"
    assert not found["grpo", "dialogue/two-turn"].contradicts
    assert found["grpo", "degenerate/group-of-one"].symbol == "·"
    assert "at least 2" in found["grpo", "degenerate/group-of-one"].why
    assert found["liar", "dialogue/two-turn"].contradicts


def test_a_column_is_a_problem_at_all_its_theta() -> None:
    """If the second θ were found biased where the first is not, the column would show the second."""
    report = small_report()
    first = columns(report)[0]
    assert (first.name, first.members) == ("bandit/stationary", ("bandit/stationary", "bandit/stationary@1"))
    rows = [
        m.model_copy(update={"finding": "biased"}) if m.problem == "bandit/stationary@1" else m
        for m in report.measurements
    ]
    changed = report.model_copy(update={"measurements": rows})
    shown = matrix(changed)["leave_one_out", "bandit/stationary"]
    assert shown.finding == "biased"
    assert shown.measurement is not None
    assert shown.measurement.problem == "bandit/stationary@1"


def test_terminal_lines_are_one_symbol_a_column() -> None:
    report = small_report()
    screen = io.StringIO()
    print_matrix(report, Console(file=screen, width=80))
    lines = {line.split()[0]: line.split()[1:] for line in screen.getvalue().splitlines() if line.strip()}
    assert lines["leave_one_out"] == ["=", "=", "·"]
    assert lines["liar"] == ["!", "!", "·"]
    assert summary(report).split(":")[0] == f"{len(report.verdicts)} verdicts"


def test_numbers() -> None:
    """Four digits; one for what is rounding error; a dash where there is no number."""
    assert [number(x) for x in (0.123456, 4.12345e-16, 0.0, None, 12345.678)] == [
        "0.1235",
        "4e-16",
        "0",
        "—",
        "1.235e+04",
    ]


def test_comparison_measures_variance_against_the_best_unbiased_one() -> None:
    """A biased estimator can be quieter (below 1); the reference is the quietest of the unbiased ones."""
    columns_ = ("estimator", "problem", "finding", "rel", "scale", "cosine", "off_axis", "variance", "mse", "snr")
    rows = [
        ("a", "p", "unbiased", 0.0, 1.0, 1.0, 0.0, 2.0, 2.0, 1.0),
        ("b", "p", "unbiased", 0.0, 1.0, 1.0, 0.0, 4.0, 4.0, 1.0),
        ("c", "p", "biased", 0.5, 0.5, 1.0, math.nan, 1.0, 1.2, math.inf),
    ]
    shown = comparison_rows(pd.DataFrame(rows, columns=list(columns_)))["p"]
    assert [row[7] for row in shown] == ["1", "2", "0.5"]
    assert shown[2][5] == "—"
    assert shown[2][9] == "—"


def test_what_is_rounding_is_no_variance_to_measure_against() -> None:
    """Two arms: the best constant has variance 0, or 1e-33; the others are measured against the least that is one."""
    columns_ = ("estimator", "problem", "finding", "rel", "scale", "cosine", "off_axis", "variance", "mse", "snr")
    rows = [
        (name, "p", "unbiased", 0.0, 1.0, 1.0, 0.0, v, v, 1.0) for name, v in [("a", 1e-33), ("b", 2.0), ("c", 3.0)]
    ]
    shown = comparison_rows(pd.DataFrame(rows, columns=list(columns_)))["p"]
    assert [row[7] for row in shown] == ["5e-34", "1", "1.5"]
    still = [(name, "p", "unbiased", 0.0, 1.0, 1.0, 0.0, 0.0, 0.0, math.inf) for name in "ab"]
    assert [row[7] for row in comparison_rows(pd.DataFrame(still, columns=list(columns_)))["p"]] == ["—", "—"]
