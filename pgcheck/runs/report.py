"""The report: everything a run found, as one validated document (report.json).

Guarantee: numbers and names only, no timestamps and no machine, so that an unchanged run writes the same bytes on the
same platform; NaN and infinities are null.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from pgcheck.estimators.base import Claim, Estimator
from pgcheck.problem import Problem
from pgcheck.verdicts.verdict import Measurement, NotAsked, Status, Verdict, along, as_list, finite_or_none

LARGEST_TABLE = 10_000  # entries of a gradient that is written out
SCHEMA: Literal["pgcheck-report/1"] = "pgcheck-report/1"


class _Row(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ProblemRow(_Row):
    """A problem as it was run."""

    name: str
    about: str
    digest: str
    rollouts: int
    contexts: int
    actions: int
    steps: int
    rows: int
    group_sizes: list[int]
    discount: float
    on_policy: bool
    full_support: bool
    value: float
    gradient_norm: float
    gradient: list[list[float]]  # ∇J in logit space, [K, A]; empty if that has more than `LARGEST_TABLE` entries
    by_step: list[float | None]  # ⟨g_t, ∇J⟩/‖∇J‖² of each position, for its part g_t of ∇J; sums to 1


class ClaimRow(_Row):
    """A claim in words that a table can show."""

    kind: str
    conditions: list[str]
    scale: float | None = None
    reason: str = ""


class EstimatorRow(_Row):
    """An estimator as it was run."""

    name: str
    formula: str
    reference: str
    about: str
    couples: str
    claims: list[ClaimRow]


class StepRow(_Row):
    """See `pgcheck.verdicts.verdict.Step`."""

    along: float | None
    gap: float | None


class MeasurementRow(_Row):
    """See `pgcheck.verdicts.verdict.Measurement`; null stands for "no such number" (∇J = 0)."""

    estimator: str
    problem: str
    finding: Literal["unbiased", "proportional", "biased"]
    rel: float | None
    scale: float | None
    cosine: float | None
    off_axis: float | None
    bias: float | None
    size: float | None
    total_variance: float | None
    mse: float | None
    snr: float | None
    batches: int | None
    enumerated: int
    lane: str
    worst_context: int
    worst_action: int
    worst_step: int | None
    expected: list[list[float]]  # E ĝ in logit space, [K, A]; empty if that has more than `LARGEST_TABLE` entries
    by_step: list[StepRow]  # what each position contributes to it; empty if the engine does not say


class VerdictRow(_Row):
    """See `pgcheck.verdicts.verdict.Verdict`."""

    estimator: str
    check: str
    problem: str
    status: Status
    measured: float | None
    allowed: float
    claimed_scale: float | None = None
    reason: str = ""


class NotAskedRow(_Row):
    """A pair that was not judged."""

    estimator: str
    problem: str
    reason: str


class CaseRow(_Row):
    """A sentence, the number that decides it and the verdict; see `pgcheck.runs.cases`."""

    name: str
    says: str
    source: str
    truth: Literal["right", "wrong"]
    quantity: str
    subject: dict[str, str]  # arguments of the quantity: of several combinations, the one that says most against it
    asked: int  # number of combinations
    relation: str  # the sentence holds if the number does this
    value: float | None = None
    beside: dict[str, float] = {}  # other numbers that belong next to it
    holds: bool | None = None  # None: could not be decided
    number: str | None = None  # what the number is known to be
    status: Status
    because: str
    reason: str = ""  # why it is not PASS


class Report(_Row):
    """Everything a run found."""

    schema_: Literal["pgcheck-report/1"] = Field(default=SCHEMA, alias="schema")
    suite: str
    version: str
    problems: list[ProblemRow]
    estimators: list[EstimatorRow]
    measurements: list[MeasurementRow]
    verdicts: list[VerdictRow]
    not_asked: list[NotAskedRow]
    cases: list[CaseRow] = []

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    def count(self) -> Counter[Status]:
        """Verdicts by status."""
        return Counter(v.status for v in self.verdicts)

    @property
    def failures(self) -> list[VerdictRow]:
        """Verdicts that are not PASS, in the order of the run."""
        return [v for v in self.verdicts if v.status is not Status.PASS]

    @property
    def failed_cases(self) -> list[CaseRow]:
        """Cases that are not PASS, in the order of the run."""
        return [c for c in self.cases if c.status is not Status.PASS]

    @property
    def exit_code(self) -> int:
        """0: every verdict agrees with its claim; 1: one failed or is inconclusive; 5: nothing was checked."""
        if not self.verdicts and not self.cases:
            return 5
        return 1 if self.failures or self.failed_cases else 0

    def cell(self, estimator: str, problem: str) -> MeasurementRow | None:
        """The measurement of that pair, if it was taken."""
        return next((m for m in self.measurements if (m.estimator, m.problem) == (estimator, problem)), None)

    def to_json(self) -> str:
        """The document as text: keys in a fixed order, one row of a table a line, so that a diff reads well."""
        parts = []
        for key, value in self.model_dump(mode="json", by_alias=True).items():
            text = json.dumps(value, ensure_ascii=False)
            if isinstance(value, list) and value:
                rows = ",\n  ".join(json.dumps(row, ensure_ascii=False) for row in value)
                text = f"[\n  {rows}\n ]"
            parts.append(f" {json.dumps(key)}: {text}")
        return "{\n" + ",\n".join(parts) + "\n}\n"


def _table(x: Tensor) -> list[list[float]]:
    return as_list(x) if x.numel() <= LARGEST_TABLE else []


def problem_row(problem: Problem) -> ProblemRow:
    """A problem's line of the report."""
    t = problem.trajectories
    return ProblemRow(
        name=problem.name,
        about=problem.about,
        digest=problem.digest,
        rollouts=len(t),
        contexts=t.contexts,
        actions=t.actions,
        steps=t.paths.steps,
        rows=problem.rows,
        group_sizes=list(problem.sizes),
        discount=problem.discount,
        on_policy=problem.on_policy,
        full_support=problem.full_support,
        value=problem.value(),
        gradient_norm=float(problem.gradient().norm()),
        gradient=_table(problem.gradient()),
        by_step=[finite_or_none(x) for x in along(problem.gradient_by_step(), problem.gradient())],
    )


def claim_row(claim: Claim) -> ClaimRow:
    """A claim's entry of the report; a scale that depends on the problem is told in the verdicts."""
    scale = float(claim.scale) if isinstance(claim.scale, (int, float)) else None
    return ClaimRow(kind=claim.kind, conditions=[c.name for c in claim.conditions], scale=scale, reason=claim.reason)


def estimator_row(estimator: Estimator) -> EstimatorRow:
    """An estimator's line of the report."""
    words = {name: getattr(estimator, name) for name in ("name", "formula", "reference", "about", "couples")}
    return EstimatorRow(**words, claims=[claim_row(c) for c in estimator.claims])


def measurement_row(m: Measurement) -> MeasurementRow:
    """A measurement's line of the report."""
    same = ("estimator", "problem", "finding", "batches", "enumerated", "lane")
    maybe = ("rel", "scale", "cosine", "off_axis", "bias", "size", "total_variance", "mse", "snr")
    context, action = m.worst
    numbers: dict[str, Any] = {name: getattr(m, name) for name in same}
    numbers |= {name: finite_or_none(getattr(m, name)) for name in maybe}
    return MeasurementRow(
        **numbers,
        worst_context=context,
        worst_action=action,
        worst_step=m.worst_step,
        expected=_table(m.expected),
        by_step=[StepRow(along=finite_or_none(s.along), gap=finite_or_none(s.gap)) for s in m.by_step],
    )


def measurement_of(row: MeasurementRow, problem: Problem) -> Measurement:
    """The measurement that `row` was made from, on the `problem` it names; without what each position contributes. Of a row
    whose E ĝ is not written out there is none."""
    maybe = ("rel", "scale", "cosine", "off_axis", "bias", "size", "total_variance", "mse", "snr")
    numbers: dict[str, Any] = {name: math.nan if (x := getattr(row, name)) is None else x for name in maybe}
    same = ("estimator", "problem", "finding", "batches", "enumerated", "lane", "worst_step")
    numbers |= {name: getattr(row, name) for name in same}
    expected, truth = torch.tensor(row.expected, dtype=torch.float64), problem.gradient()
    return Measurement(**numbers, gradient_norm=float(truth.norm()), rows=problem.rows, expected=expected, truth=truth)


def verdict_row(v: Verdict) -> VerdictRow:
    """A verdict's line of the report."""
    same = ("estimator", "check", "problem", "status", "allowed", "claimed_scale", "reason")
    return VerdictRow(**{name: getattr(v, name) for name in same}, measured=finite_or_none(v.measured))


def not_asked_row(n: NotAsked) -> NotAskedRow:
    """The line of a pair that was not judged."""
    return NotAskedRow(estimator=n.estimator, problem=n.problem, reason=n.reason)
