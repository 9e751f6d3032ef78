"""The report: everything a run found, as one validated document (report.json).

Guarantee: numbers and names only, no timestamps and no machine, so that an unchanged run writes the same bytes on the
same platform; NaN and infinities are null.
"""

from __future__ import annotations

import functools
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from importlib import metadata
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from pgcheck.errors import UsageError
from pgcheck.estimators.base import Claim, Estimator
from pgcheck.problem import Problem
from pgcheck.statistics.sequential import Interval, Judgement
from pgcheck.verdicts.verdict import (
    Measurement,
    NotAsked,
    Sampled,
    Space,
    Status,
    Verdict,
    along,
    as_list,
    finite_or_none,
)

LARGEST_TABLE = 10_000  # entries of a gradient that is written out
SCHEMA: Literal["pgcheck-report/1"] = "pgcheck-report/1"


def _left_out(empty: Any) -> Any:
    """A field that not every engine fills; the document leaves it out where it is `empty`."""
    return Field(default=empty, json_schema_extra={"left_out": True})


class _Row(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


@functools.cache
def _empty_fields(kind: type[_Row]) -> dict[str, Any]:
    """The fields of a row made by `_left_out`, and what they are when empty."""
    return {name: f.default for name, f in kind.model_fields.items() if f.json_schema_extra == {"left_out": True}}


class ProblemRow(_Row):
    """A problem as it was run."""

    name: str
    about: str
    digest: str
    rollouts: int
    contexts: int | None  # null: a model writes, and they cannot be listed
    actions: int
    steps: int
    rows: int
    group_sizes: list[int]
    discount: float
    on_policy: bool
    full_support: bool
    value: float | None  # null, as is the norm: not known, where contexts cannot be listed
    gradient_norm: float | None
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


class ScoreRow(_Row):
    """One number of a draw, over all draws; see `pgcheck.statistics.two_sample.Score`."""

    mean: float
    error: float
    low: float
    high: float


class SampledRow(_Row):
    """See `pgcheck.verdicts.verdict.Sampled`."""

    first: list[float]
    scores: dict[str, ScoreRow]


class MeasurementRow(_Row):
    """See `pgcheck.verdicts.verdict.Measurement`; null stands for "no such number" (∇J = 0)."""

    estimator: str
    problem: str
    finding: Literal["unbiased", "proportional", "biased", "inconclusive"]
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
    worst_context: int | None  # of a verdict in parameters: null
    worst_action: int | None
    worst_step: int | None
    expected: list[list[float]]  # E ĝ in logits, [K, A]; empty if in parameters, or of over `LARGEST_TABLE` entries
    by_step: list[StepRow]  # what each position contributes to it; empty if the engine does not say
    seed: int | None = _left_out(None)  # of the `batches` that were drawn
    low: dict[str, float | None] = _left_out(
        {}
    )  # ends of 95% intervals, by the names above; null where the tails allow none
    high: dict[str, float | None] = _left_out({})
    spread: list[float] = _left_out([])  # Var ⟨ĝ, v⟩ of an exact ĝ along fixed directions; empty if Cov ĝ is not kept
    sampled: SampledRow | None = _left_out(None)  # what a later sample is held against
    parameters: int | None = _left_out(None)  # P, of a sample that was seen in parameters, as the logits are too many
    directions: int | None = _left_out(None)  # random ones among them, along which alone it was seen
    against: str | None = _left_out(
        None
    )  # the unbiased estimator on the same rollouts that it was judged by its difference from
    shown: float | None = _left_out(
        None
    )  # the part of a bias's length that is seen at least; verdicts allow for it; null: all


class SampleRow(_Row):
    """What a sampled verdict rests on; see `pgcheck.statistics.sequential.Judgement`."""

    batches: int
    missed: float | None  # a bias of this part of ‖κ ∇J‖ would have been missed with probability beta
    alpha: float  # of the whole run
    beta: float
    scale_low: float | None
    scale_high: float | None
    witness: str | None  # along which the bias was proven, or shows
    needed: int | None  # batches at which a verdict is to be expected
    note: str
    skewness: float | None  # of the mean of the scores along ∇J
    largest_share: float | None  # of one batch in their variance
    pareto_k: float | None
    effective_batches: float | None


class ParameterRow(_Row):
    """What one named parameter has of E ĝ_θ and of ∇_θ J: their norms, and the norm of the difference."""

    estimator: str
    problem: str
    name: str
    expected_norm: float
    gradient_norm: float
    gap: float


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
    sample: SampleRow | None = _left_out(None)
    expected: bool = _left_out(False)  # the suite says that this is not decided


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
    parameters: list[ParameterRow] = []  # of verdicts in parameters; left out of the document where there are none

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    def count(self) -> Counter[Status]:
        """Verdicts by status."""
        return Counter(v.status for v in self.verdicts)

    @property
    def failures(self) -> list[VerdictRow]:
        """Verdicts that are not PASS, in the order of the run; without those expected to be undecided."""
        return [v for v in self.verdicts if v.status is not Status.PASS and not v.expected]

    @property
    def sampled(self) -> int:
        """Number of measurements that were sampled."""
        return sum(m.batches is not None for m in self.measurements)

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
            if key == "parameters" and not value:
                continue
            if isinstance(value, list):
                value = [_without_empty(row, as_dict) for row, as_dict in zip(getattr(self, key), value, strict=True)]
            text = json.dumps(value, ensure_ascii=False)
            if isinstance(value, list) and value:
                rows = ",\n  ".join(json.dumps(row, ensure_ascii=False) for row in value)
                text = f"[\n  {rows}\n ]"
            parts.append(f" {json.dumps(key)}: {text}")
        return "{\n" + ",\n".join(parts) + "\n}\n"


def merged(reports: Sequence[Report], *, suite: str) -> Report:
    """One report of several, of different estimators, in the order given; problems in the order in which they first come.

    Raises:
        UsageError: two problems of one name, or two estimators.
    """
    problems: dict[str, ProblemRow] = {}
    names: list[str] = []
    for report in reports:
        for p in report.problems:
            if problems.setdefault(p.name, p).digest != p.digest:
                raise UsageError(f"problems: '{p.name}' is two different problems; give one of them another name.")
        names += [e.name for e in report.estimators]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UsageError(f"estimators: '{twice}' is given twice; give one of them another name.")
    place = {name: i for i, name in enumerate(problems)}
    measurements = [m for report in reports for m in report.measurements]
    return Report(
        suite=suite,
        version=reports[0].version if reports else metadata.version("pgcheck"),
        problems=list(problems.values()),
        estimators=[e for report in reports for e in report.estimators],
        measurements=sorted(measurements, key=lambda m: place[m.problem]),
        verdicts=[v for report in reports for v in report.verdicts],
        not_asked=[n for report in reports for n in report.not_asked],
        cases=[c for report in reports for c in report.cases],
    )


def _without_empty(row: _Row, as_dict: dict[str, Any]) -> dict[str, Any]:
    empty = _empty_fields(type(row))
    return {name: x for name, x in as_dict.items() if name not in empty or x != empty[name]}


def _table(x: Tensor) -> list[list[float]]:
    return as_list(x) if x.numel() <= LARGEST_TABLE else []


def problem_row(problem: Problem) -> ProblemRow:
    """A problem's line of the report."""
    contexts, actions = (None, problem.actions) if problem.written else problem.logits.shape
    return ProblemRow(
        name=problem.name,
        about=problem.about,
        digest=problem.digest,
        rollouts=problem.rollouts,
        contexts=contexts,
        actions=actions,
        steps=problem.steps,
        rows=problem.rows,
        group_sizes=list(problem.sizes),
        discount=problem.discount,
        on_policy=problem.on_policy,
        full_support=problem.full_support,
        **_truth(problem),
    )


def _truth(problem: Problem) -> dict[str, Any]:
    if problem.written:
        return {"value": None, "gradient_norm": None, "gradient": [], "by_step": []}
    g = problem.gradient()
    shares = [finite_or_none(x) for x in along(problem.gradient_by_step(), g)]
    return {"value": problem.value(), "gradient_norm": float(g.norm()), "gradient": _table(g), "by_step": shares}


def claim_row(claim: Claim) -> ClaimRow:
    """A claim's entry of the report; a scale that depends on the problem is told in the verdicts."""
    scale = float(claim.scale) if isinstance(claim.scale, (int, float)) else None
    return ClaimRow(kind=claim.kind, conditions=[c.name for c in claim.conditions], scale=scale, reason=claim.reason)


def estimator_row(estimator: Estimator) -> EstimatorRow:
    """An estimator's line of the report."""
    words = {name: getattr(estimator, name) for name in ("name", "formula", "reference", "about", "couples")}
    return EstimatorRow(**words, claims=[claim_row(c) for c in estimator.claims])


def measurement_row(m: Measurement, *, space: Space = "logits") -> MeasurementRow:
    """A measurement's line of the report; `space` is that of its E ĝ."""
    same = ("estimator", "problem", "finding", "batches", "enumerated", "lane")
    maybe = ("rel", "scale", "cosine", "off_axis", "bias", "size", "total_variance", "mse", "snr")
    seen: dict[str, Any] = {}
    if m.view is not None:
        seen = {name: getattr(m.view, name) for name in ("parameters", "directions", "against")}
        seen["shown"] = None if m.view.shown == 1.0 else m.view.shown
    elif space == "parameters":
        seen = {"parameters": m.truth.numel()}
    space = space if m.view is None else "parameters"
    context, action = m.worst if space == "logits" else (None, None)
    numbers: dict[str, Any] = {name: getattr(m, name) for name in same}
    numbers |= {name: finite_or_none(getattr(m, name)) for name in maybe}
    return MeasurementRow(
        **numbers,
        worst_context=context,
        worst_action=action,
        worst_step=m.worst_step,
        expected=_table(m.expected) if space == "logits" else [],
        by_step=[StepRow(along=finite_or_none(s.along), gap=finite_or_none(s.gap)) for s in m.by_step],
        seed=m.seed,
        low={name: finite_or_none(x.low) for name, x in m.intervals.items()},
        high={name: finite_or_none(x.high) for name, x in m.intervals.items()},
        **seen,
        spread=list(m.spread),
        sampled=None if m.sampled is None else _sampled_row(m.sampled),
    )


def _sampled_row(sampled: Sampled) -> SampledRow:
    return SampledRow(
        first=list(sampled.first), scores={name: ScoreRow(**asdict(x)) for name, x in sampled.scores.items()}
    )


def measurement_of(row: MeasurementRow, problem: Problem) -> Measurement:
    """The measurement that `row` was made from, on the `problem` it names; without what each position contributes. Of a row
    whose E ĝ is not written out there is none."""
    maybe = ("rel", "scale", "cosine", "off_axis", "bias", "size", "total_variance", "mse", "snr")
    numbers: dict[str, Any] = {name: math.nan if (x := getattr(row, name)) is None else x for name in maybe}
    same = ("estimator", "problem", "finding", "batches", "enumerated", "lane", "worst_step")
    numbers |= {name: getattr(row, name) for name in same}
    expected, truth = torch.tensor(row.expected, dtype=torch.float64), problem.gradient()
    numbers["seed"] = row.seed
    numbers["intervals"] = {
        name: Interval(numbers[_FIELD.get(name, name)], *(_or_nan(x[name]) for x in (row.low, row.high)))
        for name in row.low
    }
    return Measurement(**numbers, gradient_norm=float(truth.norm()), rows=problem.rows, expected=expected, truth=truth)


_FIELD = {"variance": "total_variance"}  # of an interval's name


def _or_nan(x: float | None) -> float:
    return math.nan if x is None else x


def verdict_row(v: Verdict, *, alpha: float = math.nan, beta: float = math.nan) -> VerdictRow:
    """A verdict's line of the report; `alpha` and `beta` are the error rates of a sampled one."""
    same = ("estimator", "check", "problem", "status", "allowed", "claimed_scale", "reason", "expected")
    sample = None if v.sample is None else sample_row(v.sample, alpha=alpha, beta=beta)
    return VerdictRow(**{name: getattr(v, name) for name in same}, measured=finite_or_none(v.measured), sample=sample)


def sample_row(j: Judgement, *, alpha: float, beta: float) -> SampleRow:
    """What a sampled verdict rests on."""
    return SampleRow(
        batches=j.draws,
        missed=finite_or_none(j.missed),
        alpha=alpha,
        beta=beta,
        scale_low=finite_or_none(j.scale.low),
        scale_high=finite_or_none(j.scale.high),
        witness=j.witness,
        needed=j.needed,
        note=j.note,
        skewness=finite_or_none(j.tails.skewness_of_mean),
        largest_share=finite_or_none(j.tails.largest_share),
        pareto_k=finite_or_none(j.tails.pareto_k),
        effective_batches=finite_or_none(j.tails.effective_draws),
    )


def not_asked_row(n: NotAsked) -> NotAskedRow:
    """The line of a pair that was not judged."""
    return NotAskedRow(estimator=n.estimator, problem=n.problem, reason=n.reason)
