"""Why an estimator is biased: found by trying, not by guessing.

`identify` compares E ĝ with the exact expectations of the whole zoo (and of ∇J itself) over several problems, up to a
factor; `pattern` finds a fact of the problems that separates those with a bias from those without.

Guarantee: an identity is reported only if it holds on every problem tried, at 1e-9, and those problems tell it from ∇J.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from pgcheck.engines.exact import exact_moments
from pgcheck.errors import PgcheckError
from pgcheck.estimators.base import Estimator, registered_estimators
from pgcheck.problem import Problem
from pgcheck.verdicts.verdict import RTOL, Measurement

TRIED_PROBLEMS = 6
SINGLE_PRECISION = 1e-5  # no real bias is this small on every problem; float32 inside a loss is
_TRY_BUDGET = 60_000


@dataclass(frozen=True)
class Diagnosis:
    """`kind` "identity": E ĝ = factor · E[subject] on all `problems`. "pattern": wrong exactly where `subject` holds.
    "rounding": the largest bias is what float32 loses.
    """

    kind: str
    subject: str  # an estimator, "the gradient" or a fact
    factor: str  # "", "−1", "B", "1/B", "1/T", "(B−1)/B", … or a number
    problems: int


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
    _Factor("G−1 over G", lambda p: (p.rows - p.groups) / p.rows),
)


def identify(estimator: Estimator, problems: Sequence[Problem], measured: Sequence[Measurement]) -> Diagnosis | None:
    """The zoo entry (or ∇J) that has the same expectation up to a factor, if there is one."""
    biased = [(p, m) for p, m in zip(problems, measured, strict=True) if m.finding != "unbiased" and m.size > 0]
    tried = _one_of_each_family_first(biased)[:TRIED_PROBLEMS]
    if not tried:
        return None
    truth = _match("the gradient", [(p, m, m.truth) for p, m in tried])
    if truth is not None:
        return truth
    for candidate in registered_estimators().values():
        if candidate.name == estimator.name:
            continue
        fitting = [(p, m) for p, m in tried if candidate.fits(p)]
        if len(fitting) < max(1, len(tried) - 1):
            continue
        rows = []
        try:
            for p, m in fitting:
                (moments,) = exact_moments([candidate], p, budget=_TRY_BUDGET)
                rows.append((p, m, moments.mean))
                if _match(candidate.name, rows) is None:
                    break
        except PgcheckError:
            continue
        found = _match(candidate.name, rows) if len(rows) == len(fitting) else None
        if found is not None:
            return found
    return None


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


def _match(subject: str, rows: Sequence[tuple[Problem, Measurement, Tensor]]) -> Diagnosis | None:
    """E ĝ = factor · other on every row, for a known factor or one constant."""
    if all(float(other.norm()) <= RTOL * m.size for _, m, other in rows):
        return None
    factors = list(_FACTORS)
    _, m0, first = next(row for row in rows if float(row[2].norm()) > RTOL * row[1].size)
    constant = float((m0.expected * first).sum() / (first * first).sum())
    if len(rows) > 2 and abs(constant) > 1e-6:
        factors.append(_Factor(f"{constant:.6g}", lambda _: constant))
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
            return Diagnosis("pattern", fact.name, "", len(wrong) + len(right))
    return None


def diagnose(estimator: Estimator, problems: Sequence[Problem], measured: Sequence[Measurement]) -> Diagnosis | None:
    """What it is in expectation; failing that, where it goes wrong. A bias the size of float32 rounding is named first."""
    largest = max((m.distance(1.0) for m in measured), default=0.0)
    if RTOL < largest < SINGLE_PRECISION:
        return Diagnosis("rounding", "float32", "", len(measured))
    return identify(estimator, problems, measured) or pattern(problems, measured)
