"""What the whole folder looks at, computed once: by the first pytest-xdist worker that asks; the others read its file."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

from pgcheck.api import as_problems
from pgcheck.estimators.broken import BROKEN, STALE
from pgcheck.problem import Problem
from pgcheck.runs.report import Report
from pgcheck.runs.runner import run
from pgcheck.runs.suite import load_suite

Once = Callable[[str, Callable[[], Report]], Report]


@functools.cache
def problems() -> list[Problem]:
    """The shipped set, on-policy and off, each at two θ."""
    return as_problems("all")


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Once:
    """The report of that name, made by `make` unless another worker of this run has made it."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return lambda _, make: make()
    folder: Path = tmp_path_factory.getbasetemp().parent  # shared by the workers of one run

    def shared(name: str, make: Callable[[], Report]) -> Report:
        file = folder / f"{name}.json"
        with FileLock(file.with_suffix(".lock")):
            if not file.exists():
                file.write_text(make().to_json(), encoding="utf-8")
        return Report.model_validate_json(file.read_text(encoding="utf-8"))

    return shared


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
