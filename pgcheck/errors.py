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
from collections.abc import Iterable
from typing import Any


class PgcheckError(Exception):
    """Base of everything pgcheck raises on purpose."""


class UsageError(PgcheckError, ValueError):
    """The input cannot be used as it is."""


class ProblemError(UsageError):
    """An environment, policy or sampling plan is not well formed."""


class EstimatorError(UsageError):
    """A loss or a coefficient function breaks its contract (shape, NaN, no gradient, state, randomness)."""


class NotFiniteError(EstimatorError):
    """Coefficients are NaN or infinite on some batch."""


class SuiteError(UsageError):
    """A suite file cannot be read."""


class UnknownNameError(UsageError):
    """No entry of that name."""

    def __init__(self, kind: str, name: str, known: Iterable[str], *, hint: str | None = None) -> None:
        near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.4)
        nearest = f" Did you mean '{near[0]}'?" if near else ""
        more = hint or f"`pgcheck list {kind}s` shows them all."
        super().__init__(f"unknown {kind} '{name}'.{nearest} {more}")


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
