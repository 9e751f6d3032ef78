"""What the whole folder looks at."""

from __future__ import annotations

import functools

import pytest

from pgcheck.api import as_problems
from pgcheck.estimators.broken import BROKEN, STALE
from pgcheck.problem import Problem
from pgcheck.runs.report import Report, merged
from pgcheck.runs.runner import run
from pgcheck.runs.suite import load_suite
from tests.once import Once


@functools.cache
def problems() -> list[Problem]:
    """The shipped set, on-policy and off, each at two θ."""
    return as_problems("all")


@pytest.fixture(scope="session")
def core(made: dict[str, Report]) -> Report:
    """The shipped suite, whole."""
    return made["core"]


@pytest.fixture(scope="session")
def judged(made: dict[str, Report]) -> Report:
    """Every broken estimator on every problem that is no double, by every check."""
    return merged([report for name, report in made.items() if name != "core"], suite="broken")


@pytest.fixture(scope="session")
def made(once: Once) -> dict[str, Report]:
    """In parts, which the workers share out. One that is not finite would send all others through the engine one by one."""
    entries = [*BROKEN.values(), STALE]
    finite = [x.estimator for x in entries if "finite" not in x.caught_by]
    parts = {f"broken {i}": finite[i::3] for i in range(3)}
    parts["broken, not finite"] = [x.estimator for x in entries if "finite" in x.caught_by]
    makes = {name: functools.partial(run, part, problems()) for name, part in parts.items()}
    return once.each({"core": lambda: load_suite("core").run(), **makes})
