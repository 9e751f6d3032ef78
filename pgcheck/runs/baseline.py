"""The baseline: what was accepted of a run, as a file that is reviewed and committed; a row a line, sorted.

Of an exact measurement E ĝ is kept as it is if it has at most `WHOLE` numbers, else as seen from the fixed directions of
`pgcheck.statistics.two_sample`: a short digest that a last bit does not turn into another one, as it does a hash. Cov ĝ is
kept as tr Cov ĝ and the variance along the first of these directions. Of a sampled one, what a test against another sample
takes. Of a case, its number.

Guarantee: a file that is not a baseline of this schema is one error, which says how to write it anew. The schema has a
number: it goes up when what is kept changes.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pgcheck.errors import UsageError
from pgcheck.runs.report import SCHEMA as REPORT_SCHEMA
from pgcheck.runs.report import CaseRow, EstimatorRow, MeasurementRow, ProblemRow, Report
from pgcheck.statistics.two_sample import DIRECTIONS, Score, fixed_directions
from pgcheck.verdicts.verdict import RTOL, SPREAD, Finding

SCHEMA: Literal["pgcheck-baseline/2"] = "pgcheck-baseline/2"
WHOLE = 64
SCORES = ("scale", "mse", *(f"v{i + 1}" for i in range(DIRECTIONS)))


class _Row(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class _Measured(_Row):
    """One estimator on one problem. `engine` tells the kinds apart."""

    estimator: str
    problem: str

    @property
    def key(self) -> tuple[str, str]:
        """What tells it from other entries."""
        return self.estimator, self.problem


class ExactEntry(_Measured):
    """By enumeration."""

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
    spread: list[float] | None  # Var ⟨ĝ, v_j⟩, [SPREAD]; null where Cov ĝ is too large to be kept

    @model_validator(mode="after")
    def _is_one_vector(self) -> ExactEntry:
        if (self.mean is None) == (self.sketch is None):
            raise ValueError("mean or sketch: one of them is null, and the other is not")
        if self.mean is not None and (not self.mean or len({len(row) for row in self.mean}) > 1):
            raise ValueError("mean: its rows are not of one length")
        if self.spread is not None and len(self.spread) != SPREAD:
            raise ValueError(f"spread: {len(self.spread)} numbers; they are {SPREAD}")
        return self

    @property
    def vector(self) -> np.ndarray:
        """E ĝ, or its sketch."""
        return np.array(self.sketch if self.mean is None else self.mean, dtype=float)


class SampledEntry(_Measured):
    """By sampling: draws 0 … batches − 1 of a seed."""

    engine: Literal["monte_carlo"]
    digest: str  # of the problem
    finding: Finding
    seed: int = Field(ge=0)
    batches: int = Field(ge=2)
    rel: float | None
    scale: float | None
    cosine: float | None
    off_axis: float | None
    size: float
    total_variance: float
    first: list[float]  # the mean of the first 1024 draws, along the fixed directions, [DIRECTIONS]
    scores: dict[str, tuple[float, float, float, float]]  # mean, its standard error, least and largest, of `SCORES`

    @model_validator(mode="after")
    def _is_a_sample(self) -> SampledEntry:
        if len(self.first) != DIRECTIONS:
            raise ValueError(f"first: {len(self.first)} numbers; they are {DIRECTIONS}")
        if set(self.scores) != set(SCORES):
            raise ValueError(f"scores: {', '.join(self.scores)}; they are {', '.join(SCORES)}")
        for name, (_, error, low, high) in self.scores.items():
            if error < 0 or low > high:
                raise ValueError(
                    f"scores: {name} is of no sample: a standard error below 0, or no least below a largest"
                )
        return self

    def score(self, name: str) -> Score:
        """One of the scores."""
        return Score(*self.scores[name])


Entry = ExactEntry | SampledEntry


class EstimatorEntry(_Row):
    """What an estimator claims, and on how many problems each check was asked of it."""

    estimator: str
    claims: list[str]
    checks: dict[str, int]


class CaseEntry(_Row):
    """A sentence of a suite, and the number that decides it."""

    case: str
    truth: Literal["right", "wrong"]
    quantity: str
    subject: dict[str, str]
    asked: int
    relation: str
    number: str | None
    value: float
    holds: bool


class Baseline(_Row):
    """A baseline file."""

    schema_: Literal["pgcheck-baseline/2"] = Field(alias="schema")
    estimators: list[EstimatorEntry]
    entries: list[Annotated[Entry, Field(discriminator="engine")]]
    cases: list[CaseEntry]

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, populate_by_name=True, title="baseline"
    )

    @property
    def empty(self) -> bool:
        """There is nothing in it that a run could be held against."""
        return not self.entries and not self.cases

    def to_json(self) -> str:
        """The document as text: sorted, a row a line, every float as its shortest exact decimal."""
        rows: dict[str, list[Any]] = {
            "estimators": sorted(self.estimators, key=lambda e: e.estimator),
            "entries": sorted(self.entries, key=lambda e: e.key),
            "cases": sorted(self.cases, key=lambda c: c.case),
        }
        parts = [f' "schema": {json.dumps(self.schema_)}']
        for name, table in rows.items():
            lines = ",\n  ".join(json.dumps(row.model_dump(mode="json"), ensure_ascii=False) for row in table)
            parts.append(f' "{name}": [\n  {lines}\n ]' if table else f' "{name}": []')
        return "{\n" + ",\n".join(parts) + "\n}\n"


EMPTY = Baseline(schema=SCHEMA, estimators=[], entries=[], cases=[])


# -- from a report to a baseline


def entry_of(m: MeasurementRow, problem: ProblemRow) -> Entry | None:
    """The entry of a measurement; None if E ĝ or tr Cov ĝ is no number, or a sample has not what a test takes."""
    mean = np.array(m.expected, dtype=float)
    if m.size is None or m.total_variance is None or m.bias is None or not np.isfinite(mean).all():
        return None
    floor, length = RTOL * m.size, float(np.linalg.norm(mean))
    if m.size > 0 and (problem.gradient_norm or 0.0) <= floor:  # a number that is divided by rounding is rounding
        m = m.model_copy(update={"rel": None, "scale": None, "cosine": None, "off_axis": None})
    if length <= floor:
        m = m.model_copy(update={"cosine": None, "off_axis": None})
    nothing = m.size == 0  # every return is the same, and the variance is rounding
    common: dict[str, Any] = {
        "estimator": m.estimator,
        "problem": m.problem,
        "digest": problem.digest,
        "finding": m.finding,
        **{name: getattr(m, name) for name in ("rel", "scale", "cosine", "off_axis", "size")},
        "total_variance": 0.0 if nothing else m.total_variance,
    }
    if m.batches is not None:
        if m.sampled is None or m.seed is None:
            return None
        scores = {name: (x.mean, x.error, x.low, x.high) for name, x in m.sampled.scores.items()}
        drawn: dict[str, Any] = {"seed": m.seed, "batches": m.batches, "first": m.sampled.first, "scores": scores}
        return SampledEntry(engine="monte_carlo", **common, **drawn)
    spread = [0.0 if nothing else x for x in m.spread]
    return ExactEntry(
        engine="exact",
        **common,
        mean=m.expected if mean.size <= WHOLE else None,
        sketch=(fixed_directions(mean.size) @ mean.ravel()).tolist() if mean.size > WHOLE else None,
        spread=spread or None,
    )


def case_entry(c: CaseRow) -> CaseEntry | None:
    """The entry of a case; None if it has no number."""
    if c.value is None or c.holds is None:
        return None
    same = ("truth", "quantity", "subject", "asked", "relation", "number", "value", "holds")
    return CaseEntry(case=c.name, **{name: getattr(c, name) for name in same})


def claims_in_words(row: EstimatorRow) -> list[str]:
    """“proportional × 0.75 (on-policy, γ = 1)” of every claim."""
    words = []
    for c in row.claims:
        scale = "" if c.scale is None else f" × {c.scale:g}"
        words.append(f"{c.kind}{scale}" + (f" ({', '.join(c.conditions)})" if c.conditions else ""))
    return words


def baseline_of(report: Report) -> Baseline:
    """Everything of a report that a later run is held against; what is no number is left out.

    Raises:
        UsageError: rows that cannot be told apart, or a measurement of a problem that is not in the report.
    """
    problems = {p.name: p for p in report.problems}
    _refuse_twice("report", "problem", (p.name for p in report.problems))
    _refuse_twice("report", "estimator", (e.name for e in report.estimators))
    _refuse_twice("report", "measurement", (f"{m.estimator}, {m.problem}" for m in report.measurements))
    _refuse_twice("report", "case", (c.name for c in report.cases))
    stray = next((m for m in report.measurements if m.problem not in problems), None)
    if stray is not None:
        raise UsageError(
            f"report: '{stray.problem}' is measured, but it is not among the problems; run the suite anew."
        )
    asked: dict[str, Counter[str]] = {e.name: Counter() for e in report.estimators}
    for v in report.verdicts:
        asked.setdefault(v.estimator, Counter())[v.check] += 1
    made = [entry_of(m, problems[m.problem]) for m in report.measurements]
    cases = [case_entry(c) for c in report.cases]
    return Baseline(
        schema=SCHEMA,
        estimators=[
            EstimatorEntry(estimator=e.name, claims=claims_in_words(e), checks=dict(sorted(asked[e.name].items())))
            for e in report.estimators
        ],
        entries=[entry for entry in made if entry is not None],
        cases=[case for case in cases if case is not None],
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
        raise UsageError(f"report: {path}: {_fault(error, REPORT_SCHEMA)} Run the suite anew.") from None


def read_baseline(path: Path, command: str = "pgcheck gate --update") -> Baseline:
    """A baseline file; `command` writes it.

    Raises:
        UsageError: it is not there, not JSON, of another schema, or has a row twice.
    """
    text = _text(path, "baseline", command)
    try:
        found = Baseline.model_validate_json(text)
    except ValidationError as error:
        fault = _fault(error, SCHEMA)
        raise UsageError(f"baseline: {path}: {fault} To write it anew, delete it and run: {command}") from None
    _refuse_twice(f"baseline: {path}", "entry", (f"{e.estimator}, {e.problem}" for e in found.entries))
    _refuse_twice(f"baseline: {path}", "estimator", (e.estimator for e in found.estimators))
    _refuse_twice(f"baseline: {path}", "case", (c.case for c in found.cases))
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


def _fault(error: ValidationError, schema: str) -> str:
    """The first fault in words; another schema says more than what follows from it."""
    faults = error.errors(include_url=False)
    versions = [e for e in faults if e["loc"] == ("schema",) and e["type"] != "missing"]
    if versions:
        found = versions[0]["input"]
        return f"its schema is {found!r}, and this pgcheck reads {schema!r}: {_way_on(found, schema)}."
    tags = [e for e in faults if e["type"] == "union_tag_invalid"]
    if tags:
        tag = tags[0]["ctx"]["tag"]
        return f"its engine is {tag!r}, and this pgcheck reads 'exact' and 'monte_carlo': update pgcheck."
    first = faults[0]
    field = ".".join(str(x + 1 if isinstance(x, int) else x) for x in first["loc"])
    return f"{field + ': ' if field else ''}{first['msg'].rstrip('.')}."


def _way_on(found: Any, schema: str) -> str:
    name, _, number = schema.partition("/")
    older = re.fullmatch(rf"{name}/([0-9]+)", str(found))
    return "it is an older one" if older and int(older[1]) < int(number) else "update pgcheck"
