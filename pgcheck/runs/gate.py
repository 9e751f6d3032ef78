"""The gate: a report against a baseline that was reviewed and committed; whatever changed is seen and named.

Exact numbers have no noise, so there is no percentage to tune: E ĝ and tr Cov ĝ are compared at `RTOL` of what they are
sums of, and every number that follows from them at the tolerance that follows from that.

    E ĝ, its sketch    RTOL · size          rel, scale          RTOL · size / ‖∇J‖
    tr Cov ĝ           RTOL · size²         cosine, off_axis    RTOL · size / ‖E ĝ‖        size = max(‖∇J‖, √E‖ĝ‖²)

Where ‖∇J‖ or ‖E ĝ‖ is below RTOL · size, a number that is divided by it is rounding, and null. The sketch is E ĝ seen
from eight fixed directions: a short digest that a last bit does not turn into another one, as it does a hash.

Guarantee: everything in a baseline is compared. What is in the run and not in the baseline, or the other way round, a
problem that is not the same, a claim or a check that is gone, a number that is none, a verdict against its claim: each is
a difference, and none passes. A baseline is never made from a run that fails for another reason than change.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pgcheck.errors import UsageError
from pgcheck.runs.report import SCHEMA as REPORT_SCHEMA
from pgcheck.runs.report import EstimatorRow, MeasurementRow, ProblemRow, Report, VerdictRow
from pgcheck.verdicts.verdict import RTOL, Finding, Status

SCHEMA: Literal["pgcheck-baseline/1"] = "pgcheck-baseline/1"
WHOLE = 64  # E ĝ of at most so many numbers is kept as it is, else its sketch
DIRECTIONS = 8

ExpectedFailures = Mapping[str, Mapping[str, str]]  # estimator → check → reason


class _Row(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ExactEntry(_Row):
    """One estimator on one problem, by enumeration. An entry of another engine is another row with another tag."""

    estimator: str
    problem: str
    engine: Literal["exact"]
    digest: str  # of the problem
    finding: Finding
    rel: float | None
    scale: float | None
    cosine: float | None
    off_axis: float | None
    size: float
    total_variance: float
    mean: list[list[float]] | None  # E ĝ, [K, A], if it has no more than WHOLE numbers
    sketch: list[float] | None  # else ⟨E ĝ, v_j⟩, [DIRECTIONS]

    @model_validator(mode="after")
    def _is_one_vector(self) -> ExactEntry:
        if (self.mean is None) == (self.sketch is None):
            raise ValueError("mean or sketch: one of them is null, and the other is not")
        if self.mean is not None and (not self.mean or len({len(row) for row in self.mean}) > 1):
            raise ValueError("mean: its rows are not of one length")
        return self

    @property
    def key(self) -> tuple[str, str]:
        """What tells it from other entries."""
        return self.estimator, self.problem

    @property
    def vector(self) -> np.ndarray:
        """E ĝ, or its sketch."""
        return np.array(self.sketch if self.mean is None else self.mean, dtype=float)


class EstimatorEntry(_Row):
    """What an estimator claims, and on how many problems each check was asked of it."""

    estimator: str
    claims: list[str]
    checks: dict[str, int]


class Baseline(_Row):
    """A baseline file."""

    schema_: Literal["pgcheck-baseline/1"] = Field(alias="schema")
    estimators: list[EstimatorEntry]
    entries: list[ExactEntry]

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, populate_by_name=True, title="baseline"
    )

    def to_json(self) -> str:
        """The document as text: sorted, a row a line, every float as its shortest exact decimal."""
        tables = {"estimators": sorted(self.estimators, key=lambda e: e.estimator)}
        rows: dict[str, list[Any]] = {**tables, "entries": sorted(self.entries, key=lambda e: e.key)}
        parts = [f' "schema": {json.dumps(self.schema_)}']
        for name, table in rows.items():
            lines = ",\n  ".join(json.dumps(row.model_dump(mode="json"), ensure_ascii=False) for row in table)
            parts.append(f' "{name}": [\n  {lines}\n ]' if table else f' "{name}": []')
        return "{\n" + ",\n".join(parts) + "\n}\n"


EMPTY = Baseline(schema=SCHEMA, estimators=[], entries=[])

Kind = Literal["changed", "problem", "claims", "checks", "missing", "orphaned", "verdict", "stale", "number"]
# "stale": a check that is expected to fail, and does not; "number": E ĝ or tr Cov ĝ is none
CHANGES: tuple[Kind, ...] = ("changed", "problem", "claims", "checks", "missing", "orphaned")  # that an update accepts


@dataclass(frozen=True)
class Difference:
    """One reason not to pass. `problem` is "" for what is said of an estimator as a whole."""

    kind: Kind
    estimator: str
    problem: str
    before: ExactEntry | EstimatorEntry | None = None
    after: ExactEntry | EstimatorEntry | None = None
    verdict: VerdictRow | None = None
    check: str = ""
    reason: str = ""

    @property
    def is_change(self) -> bool:
        """An update of the baseline accepts it."""
        return self.kind in CHANGES


@dataclass(frozen=True)
class Gate:
    """What a comparison found; `same` are the rows of the baseline that agree with the run."""

    same: list[ExactEntry | EstimatorEntry]
    differences: list[Difference]

    @property
    def exit_code(self) -> int:
        """0: nothing differs; 1: something does; 5: there was nothing to compare."""
        return 1 if self.differences else 0 if any(isinstance(x, ExactEntry) for x in self.same) else 5

    @property
    def updatable(self) -> bool:
        """Nothing stands against making a baseline of the run."""
        return all(d.is_change for d in self.differences)

    def accepted(self) -> Baseline:
        """The baseline with every change accepted.

        Raises:
            ValueError: it is not `updatable`.
        """
        if not self.updatable:
            raise ValueError("a baseline is not made of a run that fails")
        rows = [*self.same, *(d.after for d in self.differences if d.after is not None)]
        return Baseline(
            schema=SCHEMA,
            estimators=[x for x in rows if isinstance(x, EstimatorEntry)],
            entries=[x for x in rows if isinstance(x, ExactEntry)],
        )


# -- from a report to a baseline


def directions(size: int) -> np.ndarray:
    """The fixed directions of the sketch, `[DIRECTIONS, size]`, scaled so that ‖sketch‖² is ‖E ĝ‖² on average.

    `RandomState` gives the same numbers with every numpy (NEP 19).
    """
    bound = math.sqrt(3.0 / DIRECTIONS)
    return np.random.RandomState(1992).uniform(-bound, bound, (DIRECTIONS, size))


def entry_of(m: MeasurementRow, problem: ProblemRow) -> ExactEntry | None:
    """The entry of a measurement; None if E ĝ or tr Cov ĝ is no number."""
    mean = np.array(m.expected, dtype=float)
    if m.size is None or m.total_variance is None or m.bias is None or not np.isfinite(mean).all():
        return None
    floor, length = RTOL * m.size, float(np.linalg.norm(mean))
    if m.size > 0 and (problem.gradient_norm or 0.0) <= floor:
        m = m.model_copy(update={"rel": None, "scale": None, "cosine": None, "off_axis": None})
    if length <= floor:
        m = m.model_copy(update={"cosine": None, "off_axis": None})
    return ExactEntry(
        estimator=m.estimator,
        problem=m.problem,
        engine="exact",
        digest=problem.digest,
        finding=m.finding,
        **{name: getattr(m, name) for name in ("rel", "scale", "cosine", "off_axis", "size", "total_variance")},
        mean=m.expected if mean.size <= WHOLE else None,
        sketch=(directions(mean.size) @ mean.ravel()).tolist() if mean.size > WHOLE else None,
    )


def claims_in_words(row: EstimatorRow) -> list[str]:
    """“proportional × 0.75 (on-policy, γ = 1)” of every claim."""
    words = []
    for c in row.claims:
        scale = "" if c.scale is None else f" × {c.scale:g}"
        words.append(f"{c.kind}{scale}" + (f" ({', '.join(c.conditions)})" if c.conditions else ""))
    return words


def baseline_of(report: Report) -> Baseline:
    """Everything of a report that a later run is held against; measurements that are no numbers are left out.

    Raises:
        UsageError: rows that cannot be told apart, or a measurement of a problem that is not in the report.
    """
    problems = {p.name: p for p in report.problems}
    _refuse_twice("report", "problem", (p.name for p in report.problems))
    _refuse_twice("report", "estimator", (e.name for e in report.estimators))
    _refuse_twice("report", "measurement", (f"{m.estimator}, {m.problem}" for m in report.measurements))
    stray = next((m for m in report.measurements if m.problem not in problems), None)
    if stray is not None:
        raise UsageError(
            f"report: '{stray.problem}' is measured, but it is not among the problems; run the suite anew."
        )
    asked: dict[str, Counter[str]] = {e.name: Counter() for e in report.estimators}
    for v in report.verdicts:
        asked.setdefault(v.estimator, Counter())[v.check] += 1
    made = [entry_of(m, problems[m.problem]) for m in report.measurements]
    return Baseline(
        schema=SCHEMA,
        estimators=[
            EstimatorEntry(estimator=e.name, claims=claims_in_words(e), checks=dict(sorted(asked[e.name].items())))
            for e in report.estimators
        ],
        entries=[entry for entry in made if entry is not None],
    )


def _refuse_twice(where: str, what: str, names: Iterable[str]) -> None:
    twice = [name for name, n in Counter(names).items() if n > 1]
    if twice:
        raise UsageError(f"{where}: {what} '{twice[0]}' is there twice; it does not come from one run of pgcheck.")


# -- reading


def read_report(path: Path) -> Report:
    """A report.json.

    Raises:
        UsageError: it is not there, not JSON, or of another schema.
    """
    try:
        return Report.model_validate_json(_text(path, "report", "pgcheck run SUITE --out DIR"))
    except ValidationError as error:
        raise UsageError(f"report: {path}: {_fault(error, path, REPORT_SCHEMA)} Run the suite anew.") from None


def read_baseline(path: Path, command: str = "pgcheck gate --update") -> Baseline:
    """A baseline file; `command` writes it.

    Raises:
        UsageError: it is not there, not JSON, of another schema, or has a row twice.
    """
    text = _text(path, "baseline", command)
    try:
        found = Baseline.model_validate_json(text)
    except ValidationError as error:
        fault = _fault(error, path, SCHEMA)
        raise UsageError(f"baseline: {path}: {fault} To write it anew, delete it and run: {command}") from None
    _refuse_twice(f"baseline: {path}", "entry", (f"{e.estimator}, {e.problem}" for e in found.entries))
    _refuse_twice(f"baseline: {path}", "estimator", (e.estimator for e in found.estimators))
    return found


def _text(path: Path, what: str, command: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UsageError(f"{what}: {path} is not there; to write it, run: {command}") from None
    except UnicodeDecodeError:
        raise UsageError(f"{what}: {path}: not a text file in UTF-8.") from None
    except OSError as error:
        raise UsageError(f"{what}: cannot read {path}: {error.strerror}.") from None


def _fault(error: ValidationError, path: Path, schema: str) -> str:
    """The first fault in words; another schema says more than what follows from it."""
    faults = error.errors(include_url=False)
    first = min(faults, key=lambda e: (e["loc"][-1:] != ("schema",), e["loc"][-1:] != ("engine",)))
    field = ".".join(str(x + 1 if isinstance(x, int) else x) for x in first["loc"])
    if first["loc"][-1:] in (("schema",), ("engine",)) and first["type"] != "missing":
        known = schema if field == "schema" else "exact"
        return f"its {first['loc'][-1]} is {first['input']!r}, and this pgcheck reads {known!r}: update pgcheck."
    return f"{field + ': ' if field else ''}{first['msg'].rstrip('.')}."


# -- comparing


def compare(report: Report, baseline: Baseline, *, expected: ExpectedFailures | None = None) -> Gate:
    """Hold a report against a baseline.

    Args:
        expected: checks that are expected to fail, with reasons; one that does not fail is a difference.

    Raises:
        UsageError: the report does not come from one run.
    """
    now = baseline_of(report)
    same: list[ExactEntry | EstimatorEntry] = []
    differences = list(against_claims(report, expected or {}))
    entries = {e.key: e for e in now.entries}
    norms = {p.name: p.gradient_norm or 0.0 for p in report.problems}
    numberless = {(m.estimator, m.problem) for m in report.measurements} - set(entries)
    differences += [Difference("number", *key) for key in sorted(numberless)]
    before_entries = {e.key: e for e in baseline.entries}
    for key in sorted({*entries, *before_entries} - numberless):
        before, after = before_entries.get(key), entries.get(key)
        kind = _kind(before, after, norms.get(key[1], 0.0))
        if kind is not None:
            differences.append(Difference(kind, *key, before=before, after=after))
        elif before is not None:
            same.append(before)
    before_rows, rows = ({e.estimator: e for e in b.estimators} for b in (baseline, now))
    for name in sorted({*rows, *before_rows}):
        old, new = before_rows.get(name), rows.get(name)
        kind = _kind_of_estimator(old, new)
        if kind is not None:
            differences.append(Difference(kind, name, "", before=old, after=new))
        elif old is not None:
            same.append(old)
    return Gate(same, differences)


def against_claims(report: Report, expected: ExpectedFailures) -> Iterator[Difference]:
    """What fails without being expected to, and what is expected to fail and does not."""
    for v in report.failures:
        if v.status is Status.INCONCLUSIVE or v.check not in expected.get(v.estimator, {}):
            yield Difference("verdict", v.estimator, v.problem, verdict=v, check=v.check)
    for c in report.failed_cases:
        yield Difference("verdict", c.name, "", check="case", reason=c.reason or str(c.status))
    failed = {(v.estimator, v.check) for v in report.failures}
    names = {e.name for e in report.estimators}
    for estimator, checks in expected.items():
        for name, reason in checks.items():
            if estimator in names and (estimator, name) not in failed:
                yield Difference("stale", estimator, "", check=name, reason=reason)


def exit_code(report: Report, expected: ExpectedFailures) -> int:
    """That of a run some of whose checks are expected to fail: 0, 1, or 5 if nothing was checked."""
    if report.exit_code == 5:
        return 5
    return 1 if any(True for _ in against_claims(report, expected)) else 0


def _kind(before: ExactEntry | None, after: ExactEntry | None, gradient_norm: float) -> Kind | None:
    if before is None:
        return "missing"
    if after is None:
        return "orphaned"
    if before.digest != after.digest:
        return "problem"
    return None if agree(before, after, gradient_norm) else "changed"


def _kind_of_estimator(before: EstimatorEntry | None, after: EstimatorEntry | None) -> Kind | None:
    if before is None or after is None:
        return "missing" if before is None else "orphaned"
    if before.claims != after.claims:
        return "claims"
    return "checks" if before.checks != after.checks else None


def agree(before: ExactEntry, after: ExactEntry, gradient_norm: float) -> bool:
    """Every number of two entries of one problem agrees, each to its tolerance."""
    size, a, b = after.size, before.vector, after.vector
    of_mean = RTOL * size
    of_truth = _over(of_mean, gradient_norm)
    of_angle = _over(of_mean, float(np.linalg.norm(b))) + of_truth
    return (
        before.finding == after.finding
        and (before.mean is None) == (after.mean is None)
        and a.shape == b.shape
        and bool((abs(a - b) <= of_mean).all())
        and _near(before.size, after.size, of_mean)
        and _near(before.total_variance, after.total_variance, RTOL * size**2)
        and all(_near(getattr(before, x), getattr(after, x), of_truth) for x in ("rel", "scale"))
        and all(_near(getattr(before, x), getattr(after, x), of_angle) for x in ("cosine", "off_axis"))
    )


def _over(a: float, b: float) -> float:
    return a / b if b > 0 else 0.0


def _near(a: float | None, b: float | None, tolerance: float) -> bool:
    return a is b if a is None or b is None else abs(a - b) <= tolerance
