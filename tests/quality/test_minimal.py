"""Every check and every problem earns its place: without it a mistake survives, or an invariance goes unguarded."""

from __future__ import annotations

import pytest

from pgcheck.problem import registered_problems
from pgcheck.runs.report import Report
from pgcheck.verdicts.checks import registered_checks

BASES = list(registered_problems())


def base(problem: str) -> str:
    return problem.partition("@")[0]


@pytest.mark.parametrize("check", registered_checks())
def test_without_the_check_a_mistake_survives(judged: Report, check: str) -> None:
    """Some broken estimator fails it and no other."""
    caught_by: dict[str, set[str]] = {}
    for v in judged.failures:
        caught_by.setdefault(v.estimator, set()).add(v.check)
    assert [name for name, checks in caught_by.items() if checks == {check}]
