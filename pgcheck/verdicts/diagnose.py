"""Why an estimator is biased: found by trying, not by guessing.

`identify` compares E ĝ with the exact expectations of the whole zoo (and of ∇J itself) over several problems, up to a
factor; `pattern` finds a fact of the problems that separates those with a bias from those without.

Guarantee: an identity is reported only if it holds at 1e-9 on every problem with a bias where it could be tried, or all
but a few, which are named; and those problems tell it from a multiple of ∇J.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from pgcheck.engines.exact import exact_moments
from pgcheck.errors import PgcheckError
from pgcheck.estimators.base import Estimator, registered_estimators
from pgcheck.problem import Problem
from pgcheck.verdicts.verdict import RTOL, Measurement

TRIED_PROBLEMS = 6
_FEW = 0.25  # of the problems may be exceptions to an identity
SINGLE_PRECISION = 1e-5  # no real bias is this small on every problem; float32 inside a loss is
_TRY_BUDGET = 60_000


@dataclass(frozen=True)
class Diagnosis:
    """What was found.

    `kind` "identity": E ĝ = factor · E[subject] on all `problems` but those of `except_on`. "pattern": wrong exactly where
    the fact `subject` holds. "necessary": wrong only where it holds, though not everywhere there. "rounding": the largest
    bias is what float32 loses.
    """

    kind: str
    subject: str  # an estimator, "the gradient" or a fact
    factor: str  # "", "−1", "B", "1/B", "1/T", "(B−1)/B", … or a number
    problems: int  # compared
    except_on: tuple[str, ...] = ()  # problems with a bias on which the identity does not hold


@dataclass(frozen=True)
class _Factor:
    name: str
    of: Callable[[Problem], float]


_FACTORS = (
    _Factor("", lambda p: 1.0),
    _Factor("−1", lambda p: -1.0),
    _Factor("B", lambda p: float(p.rows)),
    _Factor("1/B", lambda p: 1.0 / p.rows),
    _Factor("(B−1)/B", lambda p: (p.rows - 1) / p.rows),
    _Factor("B/(B−1)", lambda p: p.rows / (p.rows - 1) if p.rows > 1 else float("nan")),
    _Factor("1/T", lambda p: 1.0 / p.trajectories.paths.steps),
    _Factor("(G−1)/G", lambda p: (p.rows - p.groups) / p.rows),
)


def identify(estimator: Estimator, problems: Sequence[Problem], measured: Sequence[Measurement]) -> Diagnosis | None:
    """The zoo entry (or ∇J) that has the same expectation up to a factor, if there is one."""
    biased = [(p, m) for p, m in zip(problems, measured, strict=True) if m.finding != "unbiased" and m.size > 0]
    ordered = _one_of_each_family_first(biased)
    if not ordered:
        return None
    truth = _match("the gradient", [(p, m, m.truth) for p, m in ordered])
    if truth is not None:
        return truth
    for candidate in registered_estimators().values():
        if candidate.name == estimator.name:
            continue
        first = _explained(candidate, ordered[:TRIED_PROBLEMS])
        if len(first) < max(1, min(len(ordered), TRIED_PROBLEMS) - 1) or _is_multiple_of_truth(first):
            continue
        found = _match(candidate.name, first)
        if found is not None:
            rest = [row for pair in ordered[TRIED_PROBLEMS:] if (row := _row(candidate, *pair)) is not None]
            except_on = tuple(row[0].name for row in rest if not _holds(found, row))
            if len(except_on) <= (len(first) + len(rest)) * _FEW:
                return replace(found, problems=len(first) + len(rest), except_on=except_on)
    return None


_Row = tuple[Problem, Measurement, Tensor]


def _row(candidate: Estimator, p: Problem, m: Measurement) -> _Row | None:
    """E of the candidate there; None where it is too large or not defined."""
    if not candidate.fits(p):
        return None
    try:
        (moments,) = exact_moments([candidate], p, budget=_TRY_BUDGET)
    except PgcheckError:
        return None
    return p, m, moments.mean


def _explained(candidate: Estimator, pairs: Sequence[tuple[Problem, Measurement]]) -> list[_Row]:
    """Rows up to the first (of two or more) that no factor explains together with those before."""
    rows: list[_Row] = []
    for p, m in pairs:
        row = _row(candidate, p, m)
        if row is None:
            continue
        rows.append(row)
        if len(rows) > 1 and _match(candidate.name, rows) is None:
            break
    return rows


def _holds(found: Diagnosis, row: _Row) -> bool:
    p, m, other = row
    factor = next((f.of(p) for f in _FACTORS if f.name == found.factor), None)
    scale = float(found.factor) if factor is None else factor
    return float((m.expected - scale * other).norm()) <= RTOL * m.size


def _is_multiple_of_truth(rows: Sequence[_Row]) -> bool:
    """Such a candidate is no cause: with one factor too many, anything proportional to ∇J fits it."""
    for _, m, other in rows:
        g = m.truth
        scale = float((other * g).sum() / (g * g).sum()) if float(g.norm()) > 0 else 0.0
        if float((other - scale * g).norm()) > RTOL * m.size:
            return False
    return True


def _one_of_each_family_first(
    pairs: Sequence[tuple[Problem, Measurement]],
) -> list[tuple[Problem, Measurement]]:
    """Problems of different kinds tell estimators apart best; cheap ones first among equals."""
    cheap = sorted(pairs, key=lambda pair: pair[1].enumerated)
    seen: set[str] = set()
    first: list[tuple[Problem, Measurement]] = []
    rest: list[tuple[Problem, Measurement]] = []
    for pair in cheap:
        family = pair[0].name.partition("/")[0]
        (rest if family in seen else first).append(pair)
        seen.add(family)
    return first + rest


def _match(subject: str, rows: Sequence[_Row]) -> Diagnosis | None:
    """E ĝ = factor · other on every row, for a known factor or one constant."""
    if all(float(other.norm()) <= RTOL * m.size for _, m, other in rows):
        return None
    # on a single problem B, T and any number are one and the same
    factors = list(_FACTORS if len(rows) > 1 else _FACTORS[:2])
    _, m0, first = next(row for row in rows if float(row[2].norm()) > RTOL * row[1].size)
    constant = float((m0.expected * first).sum() / (first * first).sum())
    if len(rows) > 2 and abs(constant) > 1e-6:
        short = f"{constant:.6g}"
        name = short if abs(float(short) - constant) <= 1e-12 * abs(constant) else repr(constant)
        factors.append(_Factor(name, lambda _: constant))
    for factor in factors:
        if all(float((m.expected - factor.of(p) * other).norm()) <= RTOL * m.size for p, m, other in rows):
            return Diagnosis("identity", subject, factor.name, len(rows))
    return None


@dataclass(frozen=True)
class _Fact:
    name: str
    holds: Callable[[Problem], bool]


def _has_observation(p: Problem) -> bool:
    paths = p.trajectories.paths
    return bool(((paths.mask == 0) & (paths.mask.flip(-1).cumsum(-1).flip(-1) > 0)).any())


_FACTS = (
    _Fact(
        "γ < 1 counts actions instead of positions",
        lambda p: p.discount < 1 and p.trajectories.paths.discount_clock == "action",
    ),
    _Fact("γ < 1", lambda p: p.discount < 1),
    _Fact("the batch is off-policy", lambda p: not p.on_policy),
    _Fact("the sampler's support is broken", lambda p: not p.full_support),
    _Fact("there are observation positions inside rows", _has_observation),
    _Fact("rows differ in length", lambda p: not p.fixed_length),
    _Fact("episodes have more than one step", lambda p: p.trajectories.paths.steps > 1),
    _Fact("groups differ in size", lambda p: len(set(p.sizes)) > 1),
    _Fact("the batch has more than one group", lambda p: p.groups > 1),
    _Fact("a group has more than one row", lambda p: p.rows > p.groups),
)


def pattern(problems: Sequence[Problem], measured: Sequence[Measurement]) -> Diagnosis | None:
    """A fact that holds on every problem with a bias and on none without, if there are both kinds."""
    wrong = [p for p, m in zip(problems, measured, strict=True) if m.finding != "unbiased"]
    right = [p for p, m in zip(problems, measured, strict=True) if m.finding == "unbiased"]
    if not wrong or len(right) < 2:
        return None
    for fact in _FACTS:
        if all(fact.holds(p) for p in wrong) and not any(fact.holds(p) for p in right):
            return Diagnosis("pattern", fact.name, "", len(wrong) + len(right))
    for fact in _FACTS:  # necessary, though not sufficient: by luck a bias may vanish
        if all(fact.holds(p) for p in wrong) and sum(not fact.holds(p) for p in right) >= len(right) / 2:
            return Diagnosis("necessary", fact.name, "", len(wrong) + len(right))
    return None


def diagnose(estimator: Estimator, problems: Sequence[Problem], measured: Sequence[Measurement]) -> Diagnosis | None:
    """What it is in expectation; failing that, where it goes wrong. A bias the size of float32 rounding is named first."""
    largest = max((m.distance(1.0) for m in measured), default=0.0)
    if RTOL < largest < SINGLE_PRECISION:
        return Diagnosis("rounding", "float32", "", len(measured))
    return identify(estimator, problems, measured) or pattern(problems, measured)
