"""Estimators side by side: the table of `pgcheck.compare`, and everything the variance comparison report shows, as frames.

A sweep measures the same estimators on the same problem with one thing moved: the number of groups in a batch, the size of
the group, or how far the policy that draws the batches is behind. Sampled engines fill the same columns.

Guarantee: numbers and names only; what could not be measured is a row of `missing` with the reason, never an empty plot.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pandas as pd
import torch

from pgcheck.engines.choice import Engine, checked_sampling, moments_by
from pgcheck.engines.exact import DEFAULT_BUDGET
from pgcheck.engines.moments import Moments, Progress
from pgcheck.engines.monte_carlo import Sampling
from pgcheck.errors import BudgetError, UsageError
from pgcheck.estimators.base import Estimator
from pgcheck.policies.decoding import Between, Decoding
from pgcheck.policies.tabular import SoftmaxTable
from pgcheck.problem import Problem
from pgcheck.runs.report import EstimatorRow, ProblemRow, estimator_row, problem_row
from pgcheck.trajectories import is_count
from pgcheck.verdicts.quantities import find_quantity
from pgcheck.verdicts.variance import (
    approximations,
    blocks,
    cost,
    paired,
    relative,
    row_of,
    sources,
    step_covariance,
    step_rows,
)  # fmt: skip
from pgcheck.verdicts.verdict import Space, measure


@dataclass(frozen=True)
class Sweeps:
    """Where to measure besides the problem as it is; `()` leaves a sweep out.

    Args:
        groups: numbers of groups in a batch, of the problem's group size.
        group_sizes: sizes of the group, one group a batch.
        staleness: how far the logits that draw the batches are on the way from the policy's (0) to those of an older one
            (1): the problem's own behavior policy, or else the policy at another θ (`Problem.at(1)`).
        budget: most batches of a point that are enumerated, and
        draws: most that are drawn.
    """

    groups: tuple[int, ...] = (1, 2, 3, 4, 6, 8)
    group_sizes: tuple[int, ...] = (1, 2, 3, 4, 6, 8, 12, 16)
    staleness: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    budget: int = 100_000
    draws: int = 16_384

    def __post_init__(self) -> None:
        for name in ("groups", "group_sizes"):
            wrong = [x for x in getattr(self, name) if not is_count(x)]
            if wrong:
                raise UsageError(f"{name}: {wrong[0]!r}; each must be an integer of at least 1.")
        for x in self.staleness:
            if not (isinstance(x, (int, float)) and 0 <= x < math.inf):
                raise UsageError(f"staleness: {x!r}; each must be a number of at least 0.")


KEYS = ("estimator", "problem")
NO_SWEEPS = Sweeps((), (), ())


@dataclass(frozen=True)
class Comparison:
    """What the report is made of: `tables` by name, one row for each number or group of numbers that belong together."""

    estimators: list[EstimatorRow]
    problems: list[ProblemRow]
    relative_to: str
    space: Space
    tables: Mapping[str, pd.DataFrame]


def measured(
    estimators: Sequence[Estimator],
    problem: Problem,
    *,
    relative_to: str | None = None,
    space: Space = "logits",
    budget: int = DEFAULT_BUDGET,
    engine: Engine = "exact",
    sampling: Sampling | None = None,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """The lines of `pgcheck.compare` of these estimators on one problem, all on the same batches; what is drawn, beside the
    draws of `relative_to` (default: the first)."""
    beside = _number_of(relative_to, estimators)
    found = moments_by(
        engine, estimators, problem, budget=budget, sampling=sampling, scales=[(1.0, None)] * len(estimators),
        beside=beside, parameters=space == "parameters", progress=progress,
    )  # fmt: skip
    return _lines(estimators, problem, found, space, beside)


def _number_of(name: str | None, estimators: Sequence[Estimator]) -> int | None:
    return next((i for i, e in enumerate(estimators) if name in (None, e.name)), None)


def _lines(
    estimators: Sequence[Estimator], problem: Problem, found: Sequence[Moments], space: Space, beside: int | None
) -> pd.DataFrame:
    rows = []
    for e, m in zip(estimators, found, strict=True):
        row = row_of(e, problem, measure(e, problem, m, space=space))
        if m.pairs is not None and beside is not None:
            base_cost = cost(estimators[beside], problem)
            row |= paired(m.pairs, cost=row["cost"], base_cost=base_cost, confidence=m.confidence)
        rows.append(row)
    return pd.DataFrame(rows)


def compared(
    estimators: Sequence[Estimator],
    problems: Sequence[Problem],
    *,
    relative_to: str | None = None,
    space: Space = "logits",
    budget: int = DEFAULT_BUDGET,
    engine: Engine = "exact",
    sampling: Sampling | None = None,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """The table of `pgcheck.compare`."""
    how: dict[str, Any] = {"space": space, "budget": budget, "engine": engine, "sampling": sampling}
    how["relative_to"] = relative_to
    rows = [measured(estimators, p, **how, progress=progress) for p in problems]
    return relative(pd.concat(rows, ignore_index=True), to=relative_to) if rows else pd.DataFrame()


@dataclass
class _Tables:
    """Rows as they are found."""

    rows: dict[str, list[pd.DataFrame]] = field(default_factory=dict)
    missing: list[dict[str, str]] = field(default_factory=list)

    def add(self, name: str, lines: pd.DataFrame | Iterable[Mapping[str, Any]], more: Mapping[str, Any]) -> None:
        table = lines if isinstance(lines, pd.DataFrame) else pd.DataFrame(list(lines))
        if len(table):
            at = len(KEYS) if set(KEYS) <= set(table) else 0  # what is moved stands behind the names
            for i, (column, value) in enumerate(more.items()):
                table.insert(at + i, column, value)
            self.rows.setdefault(name, []).append(table)

    def miss(self, estimator: str, problem: Problem, what: str, reason: str) -> None:
        self.missing.append({"estimator": estimator, "problem": problem.name, "what": what, "reason": reason})

    def frames(self) -> dict[str, pd.DataFrame]:
        found = {name: pd.concat(tables, ignore_index=True) for name, tables in self.rows.items()}
        return {**found, "missing": pd.DataFrame(self.missing, columns=["estimator", "problem", "what", "reason"])}


def comparison(
    estimators: Sequence[Estimator],
    problems: Sequence[Problem],
    *,
    relative_to: str | None = None,
    space: Space = "logits",
    sweeps: Sweeps = NO_SWEEPS,
    budget: int = DEFAULT_BUDGET,
    engine: Engine = "exact",
    sampling: Sampling | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Measure, sweep, and split by step, source and block.

    Tables: `comparison` (the columns of `pgcheck.compare`), `steps`, `sources`, `approximations`, `blocks`; the sweeps
    `groups`, `group_sizes`, `staleness` with the columns of `comparison` and what was moved; `missing`.

    Where it is sampled, numbers of `comparison` and of the sweeps have their intervals; splits by step and source are always
    enumerated, and blocks are of exact moments.

    Raises:
        UnknownNameError: `relative_to` is none of the estimators.
        BudgetError: a problem as it is does not fit the budget; a point of a sweep that does not is `missing`.
    """
    made, how, reference = _Tables(), checked_sampling(sampling), relative_to or estimators[0].name
    for p in problems:
        found = moments_by(
            engine,
            estimators,
            p,
            budget=budget,
            sampling=how,
            scales=[(1.0, None)] * len(estimators),
            beside=(beside := _number_of(reference, estimators)),
            parameters=space == "parameters",
            progress=progress,
        )
        made.add("comparison", relative(_lines(estimators, p, found, space, beside), to=reference), {})
        for i, (e, m) in enumerate(zip(estimators, found, strict=True)):
            if progress is not None:
                progress(f"{p.name}: by step, source and block", i, len(estimators))
            _blocks(made, e, p, m)
            _splits(made, e, p)
        short = replace(how, draws=min(how.draws, sweeps.draws), checkpoint=None)
        for name, moved, q in _points(p, sweeps):
            if progress is not None:
                progress(f"{p.name}: {name}", 0, 1)
            how_there: dict[str, Any] = {"budget": sweeps.budget, "engine": engine, "sampling": short}
            at = partial(measured, problem=q, space=space, relative_to=reference, **how_there)
            lines = _point(made, at, estimators, p, q, _point_name(name, moved))
            if len(lines):
                made.add(name, _relative_if_there(lines, reference), moved)
    return Comparison(
        [estimator_row(e) for e in estimators], [problem_row(p) for p in problems],
        reference, space, made.frames(),
    )  # fmt: skip


def _relative_if_there(lines: pd.DataFrame, reference: str) -> pd.DataFrame:
    return relative(lines, to=reference) if (lines["estimator"] == reference).any() else lines


def _points(problem: Problem, sweeps: Sweeps) -> Iterable[tuple[str, dict[str, float], Problem]]:
    """(sweep, what is moved, the problem so moved)."""
    size = problem.sizes[0]
    plans = [("groups", g, size) for g in sweeps.groups] + [("group_sizes", 1, G) for G in sweeps.group_sizes]
    for name, groups, G in plans:
        moved: dict[str, float] = {"groups": groups, "group_size": G, "rows": groups * G}
        yield name, moved, problem.with_sampling(groups=groups, group_size=G)
    for fraction in sweeps.staleness:
        stale = replace(problem, behavior_logits=stale_logits(problem, fraction))
        rows = math.nan
        if problem.enumerable:
            rows = 1.0 / find_quantity("second_moment_of_weight")(problem=stale).value
        yield "staleness", {"staleness": fraction, "effective_rows": rows}, stale


def _point_name(sweep: str, moved: Mapping[str, float]) -> str:
    name = {"groups": "groups", "group_sizes": "group_size", "staleness": "staleness"}[sweep]
    return f"{name} = {moved[name]:g}"


def stale_logits(problem: Problem, fraction: float) -> Any:
    """Logits `fraction` of the way to an older policy's; where that one never acts so, nor do these, but at 0. Of a task that
    models write: a model that says them, in float64 and without cuts; None at 0."""
    if problem.written:
        how: Any = problem.behavior_logits or Decoding(problem.at(1).policy)
        return Between(problem.policy, how.model, fraction=fraction, temperature=how.temperature) if fraction else None
    old = problem.at(1).logits if problem.behavior_logits is None else problem.behavior_logits
    if fraction == 0.0:
        return problem.logits
    return torch.where(torch.isinf(old), old, (1.0 - fraction) * problem.logits + fraction * old)


def _point(
    made: _Tables,
    at: Callable[[Sequence[Estimator]], pd.DataFrame],
    estimators: Sequence[Estimator],
    problem: Problem,
    moved: Problem,
    what: str,
) -> pd.DataFrame:
    """The lines of those estimators that fit, each on its own if they do not all."""
    asked = [e for e in estimators if e.fits(moved)]
    for e in estimators:
        if e not in asked:
            made.miss(e.name, problem, what, "too small a batch for it")
    try:
        return at(asked) if asked else pd.DataFrame()
    except BudgetError:
        pass
    lines = []
    for e in asked:
        try:
            lines.append(at([e]))
        except BudgetError:
            made.miss(e.name, problem, what, "more batches than the budget of a sweep")
    return pd.concat(lines, ignore_index=True) if lines else pd.DataFrame()


def _blocks(made: _Tables, estimator: Estimator, problem: Problem, found: Moments) -> None:
    spaces: tuple[Space, ...] = ("logits",) if isinstance(problem.policy, SoftmaxTable) else ("logits", "parameters")
    if found.batches is not None:
        made.miss(estimator.name, problem, "blocks", "sampled: there are no intervals for blocks")
        return
    for space in spaces:
        try:
            per_block = blocks(found, problem, space=space)
        except BudgetError:
            made.miss(estimator.name, problem, f"blocks of {space}", "more logits × parameters than fit")
            continue
        total = sum(per_block.values())
        rows = [
            {"block": name, "variance": v, "share": v / total if total > 0 else 0.0} for name, v in per_block.items()
        ]
        made.add("blocks", rows, {"estimator": estimator.name, "problem": problem.name, "space": space})


_SPLIT_BUDGET = 200_000  # batches


def _splits(made: _Tables, estimator: Estimator, problem: Problem) -> None:
    names = {"estimator": estimator.name, "problem": problem.name}
    if not problem.enumerable:
        made.miss(estimator.name, problem, "steps and sources", "too many rollouts to be listed")
        return
    covariance = step_covariance(estimator, problem, budget=_SPLIT_BUDGET)
    if covariance is None:
        made.miss(estimator.name, problem, "steps", "too many batches to split by step")
    else:
        made.add("steps", step_rows(covariance), names)
    parts = sources(estimator, problem)
    if parts is None:
        made.miss(estimator.name, problem, "sources", "weights on logits, or too many batches to split by source")
        return
    made.add("sources", parts, names)
    made.add("approximations", [approximations(estimator, problem) or {}], names)
