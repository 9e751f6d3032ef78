"""What the whole folder looks at."""

from __future__ import annotations

import functools

import pytest

from pgcheck.api import as_problems
from pgcheck.estimators.broken import BROKEN, STALE
from pgcheck.problem import Problem
from pgcheck.runs.report import Report
from pgcheck.runs.runner import run
from pgcheck.runs.suite import load_suite
from tests.once import Once


@functools.cache
def problems() -> list[Problem]:
    """The shipped set, on-policy and off, each at two θ."""
    return as_problems("all")


@pytest.fixture(scope="session")
def core(once: Once) -> Report:
    """The shipped suite, whole."""
    return once("core", lambda: load_suite("core").run())


def _judge_the_broken() -> Report:
    """One that is not finite would send all of them through the engine one by one, so it goes alone."""
    entries = [*BROKEN.values(), STALE]
    alone = [x.estimator for x in entries if "finite" in x.caught_by]
    report = run([x.estimator for x in entries if "finite" not in x.caught_by], problems())
    rest = run(alone, problems())
    parts = ("estimators", "measurements", "verdicts", "not_asked")
    return report.model_copy(update={part: getattr(report, part) + getattr(rest, part) for part in parts})


@pytest.fixture(scope="session")
def judged(once: Once) -> Report:
    """Every broken estimator on every problem that is no double, by every check."""
    return once("judged", _judge_the_broken)
