"""Everything pgcheck raises on purpose, as one tree.

    PgcheckError
    ├── UsageError (ValueError)         what was handed in cannot be used; the message names field, value and mend
    │   ├── ProblemError                an environment, a policy or a sampling plan
    │   ├── EstimatorError              a loss or coefficient function that breaks its contract
    │   │   └── NotFiniteError          … by returning NaN or infinity
    │   ├── SuiteError                  a suite file
    │   ├── UnknownNameError            no such estimator, problem, check or suite
    │   └── BudgetError                 exact enumeration does not fit the stated budget
    ├── TruthError                      two derivations of J or ∇J disagree: a defect of pgcheck, never of the caller
    └── CheckFailed (AssertionError)    a check ran to its end, and the estimator failed it
        └── BiasError                   … one of `unbiased`, `proportional`, `biased`

Guarantee: a user's mistake surfaces as a `UsageError` before any verdict is given; a verdict is never an error of
another kind.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable, Iterable
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def nearest(name: str, known: Iterable[str], *, cutoff: float = 0.4) -> str:
    """“ Did you mean …?” with the first known name that goes on after an underscore, or the most similar; nothing if there is
    none."""
    names = list(known)
    begun = [x for x in names if x.startswith(f"{name}_")]
    near = begun or difflib.get_close_matches(str(name), names, n=1, cutoff=cutoff)
    return f" Did you mean '{near[0]}'?" if near else ""


def in_words(error: BaseException) -> str:
    """“Type: message” of an exception of somebody else's."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


class PgcheckError(Exception):
    """Base of everything pgcheck raises on purpose."""


class UsageError(PgcheckError, ValueError):
    """The input cannot be used as it is."""


class ProblemError(UsageError):
    """An environment, policy or sampling plan is not well formed."""


class EstimatorError(UsageError):
    """A loss or a coefficient function breaks its contract (shape, NaN, no gradient, state, randomness) or raises.

    `problem` is where that was met, if it was met on one.
    """

    problem: str = ""

    def __str__(self) -> str:
        return f"on '{self.problem}': {self.args[0]}" if self.problem else super().__str__()


class NotFiniteError(EstimatorError):
    """Coefficients are NaN or infinite on some batch."""


class SuiteError(UsageError):
    """A suite file cannot be read."""


class UnknownNameError(UsageError):
    """No entry of that name."""

    def __init__(self, kind: str, name: str, known: Iterable[str], *, hint: str | None = None) -> None:
        more = hint or f"`pgcheck list {kind}s` shows them all."
        super().__init__(f"unknown {kind} '{name}'.{nearest(name, known)} {more}")


class BudgetError(UsageError):
    """The exact expectation needs more work than the stated budget allows."""


class TruthError(PgcheckError):
    """Independent derivations of J or ∇J disagree."""


class CheckFailed(PgcheckError, AssertionError):
    """An estimator failed a check. `report` holds every verdict behind the message."""

    def __init__(self, message: str, *, report: Any = None) -> None:
        super().__init__(message)
        self.report = report


class BiasError(CheckFailed):
    """An estimator's expectation is not what its claim says."""


def names_problem(fn: Callable[P, T]) -> Callable[P, T]:
    """A function of (estimators, problem) whose `EstimatorError`s say on which problem they were met."""

    @functools.wraps(fn)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return fn(*args, **kwargs)
        except EstimatorError as error:
            problem: Any = args[1] if len(args) > 1 else kwargs["problem"]
            error.problem = error.problem or problem.name
            raise

    return wrapped
