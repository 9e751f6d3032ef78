"""The gate: a report against a baseline that was reviewed and committed; whatever changed is seen and named.

Exact numbers have no noise, so there is no percentage to tune: E ĝ and Cov ĝ are compared at `RTOL` of what they are sums
of, and every number that follows from them at the tolerance that follows from that.

    E ĝ, its sketch         RTOL · size          rel, scale          RTOL · size / ‖∇J‖
    tr Cov ĝ, its spread    RTOL · size²         cosine, off_axis    RTOL · size / ‖E ĝ‖        size = max(‖∇J‖, √E‖ĝ‖²)

Where ‖∇J‖ or ‖E ĝ‖ is below RTOL · size, a number that is divided by it is rounding, and null.

A sampled entry of the same seed is the same draws, numbered, so that it has no noise either: its first 1024 draws, and all
numbers if there are as many draws, are compared in the same way. Otherwise each of its scores goes through a two-sample
test (`pgcheck.statistics.two_sample`), all tests of a comparison together at `ALPHA`: an unchanged estimator is red once in
a million comparisons at most, whatever its tails. What is a finding of chance, and not of the estimator, is not compared then.

Guarantee: everything in a baseline is compared. What is in the run and not in the baseline, or the other way round, a
problem that is not the same, a claim or a check that is gone, a number that is none, a verdict against its claim: each is
a difference, and none passes. A baseline is never made from a run that fails for another reason than change.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pgcheck.runs.baseline import (
    SCHEMA,
    SCORES,
    Baseline,
    CaseEntry,
    Entry,
    EstimatorEntry,
    ExactEntry,
    SampledEntry,
    baseline_of,
)
from pgcheck.runs.report import Report, VerdictRow
from pgcheck.statistics.two_sample import level_of, p_value
from pgcheck.verdicts.verdict import RTOL, Status

ROOT_RTOL = 1e-6  # of numbers of a sample that are roots, or quotients, of what is noise

ExpectedFailures = Mapping[str, Mapping[str, str]]  # estimator → check → reason
Row = Entry | EstimatorEntry | CaseEntry

Kind = Literal["changed", "problem", "claims", "checks", "missing", "orphaned", "verdict", "stale", "number"]
# "stale": a check that is expected to fail, and does not; "number": E ĝ or tr Cov ĝ is none
CHANGES: tuple[Kind, ...] = ("changed", "problem", "claims", "checks", "missing", "orphaned")  # that an update accepts


@dataclass(frozen=True)
class Test:
    """The score of two samples that says most against their being of one law."""

    score: str  # one of `SCORES`
    p: float
    level: float

    @property
    def rejects(self) -> bool:
        """It is not chance."""
        return self.p <= self.level


@dataclass(frozen=True)
class Difference:
    """One reason not to pass. `problem` is "" for what is said of an estimator as a whole, or of a case."""

    kind: Kind
    estimator: str  # or the name of a case
    problem: str
    before: Row | None = None
    after: Row | None = None
    verdict: VerdictRow | None = None
    check: str = ""
    reason: str = ""
    test: Test | None = None  # of two samples with different draws

    @property
    def is_change(self) -> bool:
        """An update of the baseline accepts it."""
        return self.kind in CHANGES


@dataclass(frozen=True)
class Gate:
    """What a comparison found; `same` are the rows of the baseline that agree with the run, `tested` those of them that a
    two-sample test was needed for."""

    same: list[Row]
    differences: list[Difference]
    tested: Mapping[tuple[str, str], Test]

    @property
    def exit_code(self) -> int:
        """0: nothing differs; 1: something does; 5: there was nothing to compare."""
        compared = any(not isinstance(x, EstimatorEntry) for x in self.same)
        return 1 if self.differences else 0 if compared else 5

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
            entries=[x for x in rows if isinstance(x, Entry)],
            cases=[x for x in rows if isinstance(x, CaseEntry)],
        )


def compare(
    report: Report, baseline: Baseline, *, expected: ExpectedFailures | None = None, sampled: int | None = None
) -> Gate:
    """Hold a report against a baseline.

    Args:
        expected: checks that are expected to fail, with reasons; one that does not fail is a difference.
        sampled: the sampled entries that share `ALPHA`; default, those of this baseline.

    Raises:
        UsageError: the report does not come from one run.
    """
    now = baseline_of(report)
    same: list[Row] = []
    differences = list(against_claims(report, expected or {}))
    entries, before_entries = ({e.key: e for e in b.entries} for b in (now, baseline))
    norms = {p.name: p.gradient_norm or 0.0 for p in report.problems}
    numberless = {(m.estimator, m.problem) for m in report.measurements} - set(entries)
    differences += [Difference("number", *key) for key in sorted(numberless)]
    tested = two_sample_tests(before_entries, entries, sampled_entries(baseline) if sampled is None else sampled)
    for key in sorted({*entries, *before_entries} - numberless):
        before, after = before_entries.get(key), entries.get(key)
        kind = _kind(before, after, norms.get(key[1], 0.0), tested.get(key))
        if kind is not None:
            differences.append(Difference(kind, *key, before=before, after=after, test=tested.get(key)))
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
    before_cases, cases = ({c.case: c for c in b.cases} for b in (baseline, now))
    undecided = {c.name for c in report.cases} - set(cases)  # a verdict says so
    for name in sorted({*cases, *before_cases} - undecided):
        was, is_now = before_cases.get(name), cases.get(name)
        kind = _kind_of_case(was, is_now)
        if kind is not None:
            differences.append(Difference(kind, name, "", before=was, after=is_now))
        elif was is not None:
            same.append(was)
    return Gate(same, differences, {key: t for key, t in tested.items() if not t.rejects})


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


def _kind(before: Entry | None, after: Entry | None, gradient_norm: float, test: Test | None) -> Kind | None:
    if before is None:
        return "missing"
    if after is None:
        return "orphaned"
    if before.digest != after.digest:
        return "problem"
    if isinstance(before, ExactEntry) and isinstance(after, ExactEntry):
        agreed = agree(before, after, gradient_norm)
    elif isinstance(before, SampledEntry) and isinstance(after, SampledEntry):
        agreed = samples_agree(before, after, test)
    else:
        agreed = False
    return None if agreed else "changed"


def _kind_of_estimator(before: EstimatorEntry | None, after: EstimatorEntry | None) -> Kind | None:
    if before is None or after is None:
        return "missing" if before is None else "orphaned"
    if before.claims != after.claims:
        return "claims"
    return "checks" if before.checks != after.checks else None


def _kind_of_case(before: CaseEntry | None, after: CaseEntry | None) -> Kind | None:
    if before is None or after is None:
        return "missing" if before is None else "orphaned"
    room = RTOL * max(1.0, abs(after.value))
    near = before.model_copy(update={"value": after.value}) == after and abs(before.value - after.value) <= room
    return None if near else "changed"


# -- exact entries


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
        and (before.spread is None) == (after.spread is None)
        and all(_near(x, y, RTOL * size**2) for x, y in zip(before.spread or [], after.spread or [], strict=True))
        and all(_near(getattr(before, x), getattr(after, x), of_truth) for x in ("rel", "scale"))
        and all(_near(getattr(before, x), getattr(after, x), of_angle) for x in ("cosine", "off_axis"))
    )


def _over(a: float, b: float) -> float:
    return a / b if b > 0 else 0.0


def _near(a: float | None, b: float | None, tolerance: float) -> bool:
    return a is b if a is None or b is None else abs(a - b) <= tolerance


# -- sampled entries


def same_draws(before: SampledEntry, after: SampledEntry) -> bool:
    """They are the same draws, all of them."""
    return (before.seed, before.batches) == (after.seed, after.batches)


def sampled_entries(baseline: Baseline) -> int:
    """Their number."""
    return sum(isinstance(e, SampledEntry) for e in baseline.entries)


def two_sample_tests(
    before: Mapping[tuple[str, str], Entry], after: Mapping[tuple[str, str], Entry], sampled: int
) -> dict[tuple[str, str], Test]:
    """The worst of the tests of every pair of samples of one problem that are not the same draws; each is at its share of
    `ALPHA`, split over the scores of `sampled` entries."""
    pairs: dict[tuple[str, str], tuple[SampledEntry, SampledEntry]] = {}
    for key in sorted(set(before) & set(after)):
        a, b = before[key], after[key]
        if (
            isinstance(a, SampledEntry)
            and isinstance(b, SampledEntry)
            and a.digest == b.digest
            and not same_draws(a, b)
        ):
            pairs[key] = a, b
    level = level_of(sampled * len(SCORES))
    found = {}
    for key, (a, b) in pairs.items():
        p = {x: p_value(a.score(x), b.score(x), a.batches, b.batches, nested=a.seed == b.seed) for x in SCORES}
        worst = min(SCORES, key=lambda x: p[x])
        found[key] = Test(worst, p[worst], level)
    return found


def samples_agree(before: SampledEntry, after: SampledEntry, test: Test | None) -> bool:
    """Two samples of one problem: the same numbers where they are the same draws, else no sign of another law."""
    first = all(_near(x, y, RTOL * _largest(before, after)) for x, y in zip(before.first, after.first, strict=True))
    whole = all(_same_score(name, before, after) for name in SCORES)
    if same_draws(before, after):
        size = after.size
        return (
            first
            and whole
            and before.finding == after.finding
            and _near(before.size, after.size, RTOL * size)
            and _near(before.total_variance, after.total_variance, RTOL * size**2)
            and all(
                _near(getattr(before, x), getattr(after, x), ROOT_RTOL) for x in ("rel", "scale", "cosine", "off_axis")
            )
        )
    noisy = any(error > 0 for _, error, _, _ in after.scores.values())
    if noisy and (whole or (first and before.seed != after.seed)):
        return False  # other draws give other numbers: what is said of them is not what they were
    return (first or before.seed != after.seed) and test is not None and not test.rejects


def _same_score(name: str, before: SampledEntry, after: SampledEntry) -> bool:
    """To `RTOL` of the largest draw, or of what a draw has to be seen beside."""
    a, b = before.scores[name], after.scores[name]
    room = RTOL * max(*map(abs, (*a, *b)), {"scale": 1.0, "mse": after.size**2}.get(name, after.size))
    return all(_near(x, y, room) for x, y in zip(a, b, strict=True))


def _largest(*entries: SampledEntry) -> float:
    """The largest coordinate of a draw, along the fixed directions."""
    return max(abs(x) for e in entries for name in SCORES[2:] for x in e.scores[name][2:])
