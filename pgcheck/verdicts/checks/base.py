"""What a check is, and the table of them.

Guarantee: a check that does not apply returns None and is reported as not asked; it never returns PASS for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pgcheck.batch import Batch
from pgcheck.engines.coefficients import estimates
from pgcheck.engines.enumeration import Batches
from pgcheck.errors import UnknownNameError, names_problem
from pgcheck.estimators.base import Estimator
from pgcheck.problem import Problem
from pgcheck.verdicts.verdict import Status, Verdict

PROBES = 48  # random batches a check looks at
_BYTES_AT_ONCE = 2**28  # that estimates in logits may take: of a task that is written, K·A may be many millions
SAME = 1e-5  # of the largest: below, two implementations of one formula may differ by their ε

Kind = Literal["bias", "invariance", "hygiene"]
Run = Callable[[Estimator, Problem], Verdict | None]
# One estimator on one problem; None where the check does not apply


@dataclass(frozen=True)
class Check:
    """A named check; `run` is None for those that judge moments (see `checks.bias`). The docstring is its page."""

    name: str
    kind: Kind
    page: str
    run: Run | None
    asked: str = ""  # of whom and where, in words; "" if of every estimator on every problem


_CHECKS: dict[str, Check] = {}


def check(kind: Kind, *, asked: str = "") -> Callable[[Run], Run]:
    """Register `check_NAME` as check NAME; its docstring is what `pgcheck explain NAME` prints."""

    def decorate(fn: Run) -> Run:
        run = names_problem(fn)
        add_check(fn.__name__.removeprefix("check_"), kind, fn.__doc__ or "", run, asked=asked)
        return run

    return decorate


def add_check(name: str, kind: Kind, page: str, run: Run | None, *, asked: str = "") -> None:
    """Register a check by name.

    Raises:
        ValueError: the name is taken or the page is empty.
    """
    if name in _CHECKS or not page.strip():
        raise ValueError(f"check '{name}' is registered already, or has no page")
    _CHECKS[name] = Check(name, kind, page, run, asked)


def registered_checks() -> dict[str, Check]:
    """Every check by name."""
    return dict(_CHECKS)


def find_check(name: str) -> Check:
    """The check of that name.

    Raises:
        UnknownNameError: no such check; suggests the nearest.
    """
    if name not in _CHECKS:
        raise UnknownNameError("check", name, _CHECKS)
    return _CHECKS[name]


# -- what the checks share


def probe_index(estimator: Estimator, problem: Problem) -> Tensor:
    """Rollouts of `PROBES` random batches, `[M, B]`, the same on every call."""
    table = problem.probe_table(estimator.needs)
    return Batches(table, problem.sizes).random(PROBES, seed=7)


def gather(estimator: Estimator, problem: Problem, index: Tensor) -> Batch:
    """The batches of `index`."""
    table = problem.probe_table(estimator.needs)
    return table.batch(index, problem.group_labels, logits=estimator.leaf == "logits")


def estimates_gap(estimator: Estimator, other: Estimator, problem: Problem) -> float:
    """The largest difference between the ĝ of both over `PROBES` random batches, relative to the largest of `other`'s."""
    table = problem.probe_table(tuple(dict.fromkeys((*estimator.needs, *other.needs))))
    index = Batches(table, problem.sizes).random(PROBES, seed=7)
    sizes, gaps = [], []
    for some in index.split(max(1, _BYTES_AT_ONCE // (8 * 6 * table.contexts * table.actions))):
        found, expected = (estimates(e, table, some, problem.group_labels) for e in (estimator, other))
        sizes.append(expected.abs().max())
        gaps.append((found - expected).abs().max())
    size, gap = float(torch.stack(sizes).max()), float(torch.stack(gaps).max())
    return gap / size if size > 0 else gap


def compared(
    name: str, estimator: Estimator, problem: Problem, found: Tensor, expected: Tensor, *, allowed: float
) -> Verdict:
    """PASS if the largest difference is within `allowed` of the largest expected coefficient."""
    size = float(expected.abs().max())
    gap = float((found.to(torch.float64) - expected.to(torch.float64)).abs().max())
    measured = gap / size if size > 0 else gap
    status = Status.PASS if measured <= allowed else Status.FAIL  # NaN fails
    return Verdict(estimator.name, name, problem.name, status, measured, allowed)
