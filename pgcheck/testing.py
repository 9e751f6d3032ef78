"""pgcheck in your own tests: `assert_unbiased`, `assert_proportional`, and one pytest item for each estimator and check.

    @pgcheck.testing.parametrize_with_checks([my_loss], expected_failed_checks={"unbiased": "divides by the group std"})
    def test_estimators(estimator, check):
        check(estimator)

Guarantee: an item passes only if its check was asked and passed. What is not asked of an estimator is skipped with the
reason; a claim that could not be judged fails; an expected failure is strict, so one that passes, or is no longer asked,
fails. The batches of an estimator are enumerated once a process, when the first of its items runs. pytest is imported
when `parametrize_with_checks` is called, not before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pgcheck.api import AnyProblem, as_claim, as_problems, check_estimator, explain_failure, nothing_checked
from pgcheck.engines.choice import Engine, checked_engine
from pgcheck.engines.exact import DEFAULT_BUDGET
from pgcheck.engines.monte_carlo import Sampling
from pgcheck.engines.purity import KINDS
from pgcheck.errors import BiasError, CheckFailed, UsageError
from pgcheck.estimators.base import Claim, Estimator, proportional, unbiased
from pgcheck.estimators.lookup import AnyEstimator, as_estimator, as_estimators, command_name
from pgcheck.problem import Problem
from pgcheck.render.messages import BIAS_CHECKS
from pgcheck.runs.report import Report, VerdictRow
from pgcheck.runs.runner import Expectation, refuse_duplicates, run, wanted_checks
from pgcheck.verdicts.checks import Check, find_check
from pgcheck.verdicts.verdict import RTOL, Status

Share = Callable[[str, Callable[[], Report]], Report]
# (name of an estimator, what makes its report) → the report, made by whichever process is first

ExpectedFailures = Mapping[str, str] | Callable[[Any], Mapping[str, str]]
# {check: reason} for every estimator, or a function from an estimator, as it was given, to that


def assert_unbiased(
    estimator: AnyEstimator, problems: AnyProblem | Sequence[AnyProblem] = "core", **settings: Any
) -> None:
    """E ĝ = ∇J on every problem; `settings` as of `pgcheck.check_estimator`: `rtol`, `budget`.

    Raises:
        BiasError: an AssertionError that says what, where, measured, allowed, cause, next.
        CheckFailed: it is random, stateful, not finite, …, or nothing could be checked; an AssertionError, too.
    """
    __tracebackhide__ = True
    check_estimator(estimator, problems, claim=unbiased(), checks=["unbiased"], **settings)


def assert_proportional(
    estimator: AnyEstimator,
    problems: AnyProblem | Sequence[AnyProblem] = "core",
    *,
    scale: float | Callable[[Problem], float] | None = None,
    **settings: Any,
) -> None:
    """E ĝ = `scale` · ∇J on every problem; without a scale, E ĝ = κ ∇J for some κ > 0. Raises as `assert_unbiased`."""
    __tracebackhide__ = True
    check_estimator(estimator, problems, claim=proportional(scale), checks=["proportional"], **settings)


def parametrize_with_checks(
    estimators: Sequence[AnyEstimator],
    *,
    expected_failed_checks: ExpectedFailures | None = None,
    problems: AnyProblem | Sequence[AnyProblem] = "core",
    claim: str | Claim | None = None,
    checks: Sequence[str] | None = None,
    budget: int = DEFAULT_BUDGET,
    rtol: float = RTOL,
    engine: Engine = "exact",
    sampling: Sampling | None = None,
) -> Any:
    """A pytest decorator for tests of `(estimator, check)`: one item for each pair, with ids like `my_loss-unbiased`.

    Args:
        estimators: losses, `Estimator`s or names; each is handed to the test as it was given.
        expected_failed_checks: {check: reason}, or a function from an estimator to that. These items are strict xfails.
        problems, claim, checks, budget, rtol, engine, sampling: as of `pgcheck.check_estimator`.

    Raises:
        UsageError: (at collection) pytest is not installed; an unknown check or problem, a reason that is empty, two
            estimators of one name.
    """
    try:
        import pytest
    except ImportError:
        raise UsageError(
            "pgcheck.testing.parametrize_with_checks needs pytest; install it: pip install 'pgcheck[pytest]'."
        ) from None
    as_estimators(estimators)  # refuses what is no list
    names = wanted_checks(checks)
    how = How(budget, rtol, checked_engine(engine), sampling)
    judge = Judge(as_problems(problems), names, None if claim is None else as_claim(claim), how)
    made = [judge.add(given) for given in estimators]
    refuse_duplicates(made, judge.problems)
    items = []
    for given, e in zip(estimators, made, strict=True):
        expected = expected_failures(expected_failed_checks, given)
        for name in names:
            mark = pytest.mark.xfail(reason=expected[name], strict=True, raises=CheckFailed) if name in expected else ()
            check = EstimatorCheck(find_check(name), judge, expected_to_fail=name in expected)
            items.append(pytest.param(given, check, id=f"{e.name}-{name}", marks=mark))
    return pytest.mark.parametrize(("estimator", "check"), items)


def expected_failures(given: ExpectedFailures | None, estimator: AnyEstimator) -> Mapping[str, str]:
    """{check: reason} of one estimator.

    Raises:
        UsageError: an unknown check, or a reason that is empty.
    """
    expected = given(estimator) if callable(given) else given or {}
    if not isinstance(expected, Mapping):
        raise UsageError(f"expected_failed_checks: {expected!r}; expected {{check: reason}}, or a function to that.")
    for name, reason in expected.items():
        find_check(name)
        if not isinstance(reason, str) or not reason.strip():
            raise UsageError(f"expected_failed_checks: {name!r} has {reason!r}; expected the reason, in words.")
    return expected


@dataclass(frozen=True)
class How:
    """How expectations are had; as of `pgcheck.check_estimator`."""

    budget: int = DEFAULT_BUDGET
    rtol: float = RTOL
    engine: Engine = "exact"
    sampling: Sampling | None = None


class Judge:
    """Reports of estimators on one set of problems, each made once; they go when the items go."""

    def __init__(self, problems: list[Problem], checks: list[str], claim: Claim | None, how: How) -> None:
        self.problems, self.checks, self.claim, self.how = problems, checks, claim, how
        self.share: Share = lambda name, make: make()
        self.expectations: list[Expectation] = []  # of a suite
        self.commands: dict[str, str] = {}  # what the command line calls an estimator, where its code does not say
        self._made: dict[int, tuple[AnyEstimator, Estimator]] = {}  # by id; the estimator is kept, so its id is its own
        self._reports: dict[int, Report] = {}
        self._messages: dict[tuple[int, str], str] = {}

    def add(self, given: AnyEstimator) -> Estimator:
        if id(given) not in self._made:
            e = as_estimator(given)
            self._made[id(given)] = given, e if self.claim is None else replace(e, claims=(self.claim,))
        return self._made[id(given)][1]

    def report(self, given: AnyEstimator) -> Report:
        e = self.add(given)
        if id(given) not in self._reports:
            self._reports[id(given)] = self.share(e.name, lambda: self._judged(e))
        return self._reports[id(given)]

    def _judged(self, e: Estimator) -> Report:
        how, expected = self.how, self.expected_of(e)
        return run(
            [e], self.problems, suite="pytest", checks=self.checks, expectations=expected, budget=how.budget, rtol=how.rtol,
            engine=how.engine, sampling=how.sampling,
        )  # fmt: skip

    def expected_of(self, e: Estimator) -> list[Expectation]:
        """What the suite says of an estimator, problem by problem."""
        return [x for x in self.expectations if x.estimator == e.name]

    def begun(self, given: AnyEstimator) -> bool:
        """Its report is made."""
        return id(given) in self._reports

    def explain(self, given: AnyEstimator, check: str, failed: Sequence[VerdictRow]) -> str:
        """The message of a check that failed, with the cause; the same however many items show it."""
        if (id(given), check) not in self._messages:
            report = self.report(given)
            passed = [v for v in report.verdicts if v.check == check and v.status is Status.PASS]
            shown = report.model_copy(update={"verdicts": [*passed, *failed]})
            e = self.add(given)
            command = self.commands.get(e.name) or command_name(given)
            self._messages[id(given), check] = explain_failure(e, self.problems, shown, command=command)
        return self._messages[id(given), check]


def _against(v: VerdictRow) -> bool:
    """It fails; that it is undecided is not what the suite says."""
    return v.status is not Status.PASS and not v.expected


@dataclass(frozen=True)
class EstimatorCheck:
    """One check as a callable: `check(estimator)` returns, skips the item, or raises `CheckFailed` (or `BiasError`)."""

    check: Check
    judge: Judge
    expected_to_fail: bool = False
    problem: str = ""  # on this problem only

    def __repr__(self) -> str:
        return self.check.name

    def __call__(self, estimator: AnyEstimator) -> None:
        """Judge `estimator` by this check.

        Raises:
            BiasError, CheckFailed: it fails, or its claim could not be judged.
            UsageError: it was expected to fail, but the check is not asked of it.
        """
        __tracebackhide__ = True
        import pytest

        e, report = self.judge.add(estimator), self.judge.report(estimator)
        name = self.check.name
        of_check = [v for v in report.verdicts if v.check == name]
        own = [v for v in of_check if self.problem in ("", v.problem)]
        claimed = name in {c.kind for c in e.claims}
        in_the_way = [v for v in report.failures if v.check in (*KINDS, "finite")] if claimed else []
        if self.problem and own:
            in_the_way = []  # whatever it is, it was not here
        if any(_against(v) for v in own) or in_the_way:
            failed = [v for v in of_check if _against(v)] or in_the_way
            message = self.judge.explain(estimator, name, failed)
            if failed == in_the_way:
                message = f"{e.name}: {name} could not be judged.\n{message}"
            elif self.problem:
                message = f"{e.name} on {self.problem}: {name} is {own[0].status}.\n{message}"
            raise (BiasError if any(v.check in BIAS_CHECKS for v in failed) else CheckFailed)(message, report=report)
        if claimed and not own:
            raise CheckFailed(nothing_checked(e, self.judge.problems), report=report)
        if not own and self.expected_to_fail:
            raise UsageError(f"{e.name}: {name} is expected to fail, but it is not asked: {self._why_not(report)}.")
        if not own:
            pytest.skip(f"{name} is not asked of {e.name}: {self._why_not(report)}")

    def _why_not(self, report: Report) -> str:
        first = next((v.check for v in report.failures), None)
        if first in KINDS:
            return f"nothing else is, because it fails {first}"
        if not report.measurements:
            return report.not_asked[0].reason if report.not_asked else "none of its batches were enumerated"
        return f"only asked {self.check.asked}" if self.check.asked else "not all of its batches were enumerated"
