"""What the gate inside pytest judges: estimators on problems, and cases; each once, however many items ask about it.

Guarantee: which items there are is known without judging anything; what is judged has the same bytes in whichever process.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pgcheck.estimators.base import Estimator
from pgcheck.estimators.lookup import AnyEstimator
from pgcheck.problem import Problem
from pgcheck.render.files import write_all
from pgcheck.runs.baseline import Baseline
from pgcheck.runs.cases import Case
from pgcheck.runs.report import Report
from pgcheck.runs.runner import run, why_not_measured
from pgcheck.testing import Judge, Share

CASE, FINDING = "case", "expected_finding"  # rules that are no checks


@dataclass(frozen=True)
class Task:
    """One estimator on a set of problems, as it was given."""

    given: AnyEstimator
    judge: Judge
    expected: Mapping[str, str]
    of_case = False

    @property
    def estimator(self) -> Estimator:
        return self.judge.add(self.given)

    @property
    def name(self) -> str:
        return self.estimator.name

    @property
    def report(self) -> Report:
        return self.judge.report(self.given)

    @property
    def begun(self) -> bool:
        return self.judge.begun(self.given)

    def measured(self) -> list[Problem]:
        """The problems whose batches are enumerated."""
        return [p for p in self.judge.problems if not why_not_measured(self.estimator, p)]

    def rows(self) -> list[str]:
        """The problems that the baseline has a row for, "" for the estimator itself."""
        return ["", *(p.name for p in self.measured())]

    def questions(self) -> list[tuple[str, str]]:
        """(problem, check) of every verdict there is to ask for; problem is "" where one item is about all of them.

        What an estimator does not claim is not asked; the other checks are, and say themselves where they do not apply.
        """
        claims, asked = self.estimator.claims, []
        for name in self.judge.checks:
            of_kind = [c for c in claims if c.kind == name]
            on = [p.name for p in self.measured() if any(c.applies(p) for c in of_kind)]
            if name in ("unbiased", "proportional"):
                asked += [(problem, name) for problem in on]
            elif name != "biased" or on:
                asked.append(("", name))
        if not any(name in {c.kind for c in claims} for _, name in asked):  # its claim fails: no problem can decide it
            asked += [("", c.kind) for c in claims[:1] if c.kind in self.judge.checks]
        return asked + [(x.problem, FINDING) for x in self.judge.expected_of(self.estimator)]


@dataclass
class CaseTask:
    """One case of the suite."""

    case: Case
    share: Share
    expected: Mapping[str, str] = field(default_factory=dict)
    made: Report | None = None
    of_case = True

    @property
    def name(self) -> str:
        return self.case.name

    @property
    def report(self) -> Report:
        if self.made is None:
            self.made = self.share(f"case {self.name}", lambda: run([], [], suite="pytest", cases=[self.case]))
        return self.made

    @property
    def begun(self) -> bool:
        return self.made is not None

    def rows(self) -> list[str]:
        """As of `Task`."""
        return [""]

    def questions(self) -> list[tuple[str, str]]:
        """As of `Task`."""
        return [("", CASE)]


Key = tuple[bool, str, str]  # of a case?, estimator or case, problem: what a row of the baseline is known by


def known_rows(baseline: Baseline) -> set[Key]:
    """All of them."""
    return {
        *((False, e.estimator, "") for e in baseline.estimators),
        *((False, *e.key) for e in baseline.entries),
        *((True, c.case, "") for c in baseline.cases),
    }


class Shared:
    """Reports in a folder that the workers of one session share: the first to need one makes it, others wait for it.

    A worker that dies loses its lock, and the next makes the report; without a folder, everyone makes their own.
    """

    def __init__(self, folder: str | None) -> None:
        self.folder = None if folder is None else Path(folder)

    def report(self, name: str, make: Callable[[], Report]) -> Report:
        """The report of that name."""
        if self.folder is None:
            return make()
        from filelock import FileLock

        self.folder.mkdir(mode=0o700, exist_ok=True)
        path = self.folder / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.json"
        with FileLock(path.with_suffix(".lock")):
            if not path.exists():
                write_all({path: make().to_json()})
            return Report.model_validate_json(path.read_text(encoding="utf-8"))
