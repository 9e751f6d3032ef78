"""Why an estimator is biased: found by trying, not by guessing.

`identify` compares E ĝ with ∇J, with the exact expectations of the whole zoo and with those of estimators that are wrong
on purpose, up to a factor, and where none of them explains it with those of every advantage of the zoo in every average
(`assembled`); `pattern` finds a fact of the problems that separates those with a bias from those without;
`find_swap` exchanges one part of a composition for a part of a known one until the claim holds.

Guarantee: an identity is reported only if it holds at 1e-9 on every problem where it could be tried, or all but a few,
which are named; and those problems tell it from a multiple of ∇J. One that holds to half a percent only (another ε in a
divisor) is said to hold nearly, and how nearly. A swap is reported only if the claim holds with it on
every problem.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from pgcheck.batch import Batch
from pgcheck.engines.coefficients import coefficients_of
from pgcheck.engines.declarations import probe
from pgcheck.engines.exact import exact_moments
from pgcheck.engines.expected import expected_gradients
from pgcheck.errors import PgcheckError
from pgcheck.estimators import aggregation, ratios
from pgcheck.estimators.aggregation import Aggregation
from pgcheck.estimators.base import COUPLES, Coefficients, Couples, Estimator, registered_estimators
from pgcheck.estimators.broken import BROKEN
from pgcheck.estimators.ratios import Ratio
from pgcheck.estimators.zoo import Composition
from pgcheck.problem import Problem
from pgcheck.verdicts.checks.base import SAME, estimates_gap
from pgcheck.verdicts.verdict import RTOL, Measurement

TRIED_PROBLEMS = 6
_FEW = 0.25  # of the problems may be exceptions to an identity
NEARLY = 5e-3  # of the size: another ε in a divisor, not another estimator
SINGLE_PRECISION = 1e-5  # no real bias is this small on every problem; float32 inside a loss is
TRY_BUDGET = 60_000


@dataclass(frozen=True)
class Diagnosis:
    """What was found.

    `kind` "identity": E ĝ = factor · E[subject] on all `problems` but those of `except_on`. "batch by batch": the same ĝ as
    `subject`'s from every batch that was tried; "draw by draw": factor times it, from drawn ones. "pattern": wrong exactly
    where the fact `subject` holds. "necessary": wrong only where it holds, though not everywhere there. "rounding": the largest
    bias is what float32 loses.
    """

    kind: str
    subject: str  # an estimator, a fact, or "the gradient": of J, "… without the KL penalty", "… of the return alone"
    factor: str  # "", "−1", "B", "1/B", "1/T", "(B−1)/B", … or a number; or several, between " × "
    problems: int  # compared
    except_on: tuple[str, ...] = ()  # problems on which the identity does not hold
    mistake: str = ""  # what is wrong with `subject`, where that is known
    gap: float = 0.0  # the largest ‖E ĝ − factor · E[subject]‖ over the size, where that is more than rounding
    made: tuple[str, ...] = ()  # what `subject` is assembled with, where that is not its own: see `assembled`
    same_here: tuple[str, ...] = ()  # of a number found on a single problem: the known factors that it is there


_FACTORS: dict[str, Callable[[Problem], float]] = {
    "": lambda p: 1.0,
    "−1": lambda p: -1.0,
    "B": lambda p: float(p.rows),
    "1/B": lambda p: 1.0 / p.rows,
    "(B−1)/B": lambda p: (p.rows - 1) / p.rows,
    "B/(B−1)": lambda p: p.rows / (p.rows - 1) if p.rows > 1 else math.nan,
    "1/T": lambda p: 1.0 / p.steps,
    "(G−1)/G": lambda p: (p.rows - p.groups) / p.rows,
    "√((B−1)/B)": lambda p: math.sqrt((p.rows - 1) / p.rows),
    "√((G−1)/G)": lambda p: math.sqrt((p.rows - p.groups) / p.rows),
}
_OWN = ("(G−1)/G", "(B−1)/B")  # what the own return in a mean leaves; often beside a divisor
_PRODUCTS = tuple(f"{own} × {divisor}" for own in _OWN for divisor in ("1/T", "1/B", "B", "−1"))


def _value(factor: str, p: Problem) -> float:
    """A product of named factors and numbers."""
    return math.prod(_FACTORS[x](p) if x in _FACTORS else float(x) for x in factor.split(" × "))


def named_factor(found: Sequence[tuple[Problem, float]], *, rtol: float = RTOL) -> str | None:
    """The name of what every one of these numbers is on its problem: a known factor, or one number."""
    for name in (*_FACTORS, *_PRODUCTS):
        if all(abs(x - _value(name, p)) <= rtol * abs(x) for p, x in found):
            return name
    first = found[0][1]
    return f"{first:.10g}" if all(abs(x - first) <= rtol * abs(x) for _, x in found) else None


@dataclass(frozen=True)
class Candidate:
    """A known estimator that the one in question may be in expectation; `mistake` says what is wrong with it, if it is one
    of those that are wrong on purpose."""

    estimator: Estimator
    mistake: str = ""
    entry: str = ""  # of the zoo, whose advantage it has
    made: tuple[str, ...] = ()  # what it has otherwise


def candidates() -> list[Candidate]:
    """The zoo, then the shelf of estimators that are wrong on purpose, as far as their mistake moves E ĝ."""
    wrong = [Candidate(x.estimator, x.mistake) for x in BROKEN.values() if x.moves]
    return [*(Candidate(e) for e in registered_estimators().values()), *wrong]


WITHOUT_DISCOUNT = "with γ = 1"
PER_ROW, PER_TOKEN = "averaged over the tokens of each row", "averaged over all tokens of the batch"
CLIPPED = "times the ratio of each token, clipped as in PPO"
_AVERAGES: dict[str, Aggregation] = {
    "summed over the tokens of each row": aggregation.mean_of_rows,
    PER_ROW: aggregation.sequence_mean,
    PER_TOKEN: aggregation.token_mean,
}
_WEIGHTS: dict[str, Ratio] = {
    "without a ratio": ratios.none,
    "times the ratio of each token": ratios.token_ratio,
    CLIPPED: ratios.ppo_clip(),
}


def assembled(problems: Sequence[Problem]) -> list[Candidate]:
    """Every advantage of the zoo in each average, where γ < 1 without it too, and off-policy with each weight: often a loss
    is the advantage of one paper in the average of another. Without those that are one of the zoo already."""
    discounts = ("", WITHOUT_DISCOUNT) if any(p.discount < 1 for p in problems) else ("",)
    off_policy = not all(p.on_policy for p in problems)
    found, seen = [], set()
    for e in registered_estimators().values():
        own = e.coefficients
        if not isinstance(own, Composition) or own.penalty is not None or e.needs or own.advantage in seen:
            continue
        seen.add(own.advantage)
        weights = _WEIGHTS if off_policy else {"": own.ratio}
        for discount, (weight, ratio), (average, of_rows) in product(discounts, weights.items(), _AVERAGES.items()):
            words = (discount, weight if ratio != own.ratio else "", average if of_rows != own.aggregation else "")
            if made := tuple(x for x in words if x):
                mixed = replace(own, ratio=ratio, aggregation=of_rows)
                couples: Couples = "batch" if of_rows is aggregation.token_mean else e.couples
                c = functools.partial(_without_discount, mixed) if discount else mixed
                new = Estimator(" ".join((e.name, *made)), c, couples, min_group_size=e.min_group_size)
                found.append(Candidate(new, entry=e.name, made=made))
    return found


def _without_discount(coefficients: Coefficients, batch: Batch) -> Tensor:
    return coefficients(replace(batch, discount=1.0))


def identify(estimator: Estimator, problems: Sequence[Problem], measured: Sequence[Measurement]) -> Diagnosis | None:
    """∇J, the zoo entry or the known mistake that has the same expectation up to a factor, if there is one.

    A sieve: of the `TRIED_PROBLEMS` that tell most apart every candidate is tried on the cheapest, those left on the next, and
    so on; what is left is compared on all the others, those without a bias included.
    """
    pairs = [(p, m) for p, m in zip(problems, measured, strict=True) if m.size > 0]
    wrong = [(p, m) for p, m in pairs if m.finding != "unbiased"]
    if not wrong:
        return None
    ordered = _telling_first(wrong)
    truth = _match("the gradient", [(p, m, m.truth) for p, m in ordered])
    simple = truth or _without_a_term(ordered) or _on_one_problem(pairs)
    if simple is not None:
        return simple
    return _identified(candidates(), estimator, ordered, pairs) or _identified(
        assembled([p for p, _ in pairs]), estimator, ordered, pairs
    )


def _identified(
    known: Sequence[Candidate],
    estimator: Estimator,
    ordered: Sequence[tuple[Problem, Measurement]],
    pairs: Sequence[tuple[Problem, Measurement]],
) -> Diagnosis | None:
    """The best of the `known` that explain E ĝ on the problems with a bias, `ordered`, and on `pairs`, all of them."""
    left: dict[str, tuple[Candidate, list[_Row]]] = {
        c.estimator.name: (c, []) for c in known if c.estimator.coefficients is not estimator.coefficients
    }
    tried = ordered[:TRIED_PROBLEMS]
    for p, m in sorted(tried, key=lambda pair: pair[1].enumerated):
        left = _sieved(left, p, m)
    place = {p.name: i for i, (p, _) in enumerate(tried)}
    rest = [*ordered[TRIED_PROBLEMS:], *((p, m) for p, m in pairs if m.finding == "unbiased")]
    matches = []
    for candidate, unordered in left.values():
        rows = sorted(unordered, key=lambda row: place[row[0].name])
        if len(rows) < max(1, len(tried) - 1) or _is_multiple_of_truth(rows):
            continue
        exact = _match(candidate.entry or candidate.estimator.name, rows)
        match = exact or _match(candidate.entry or candidate.estimator.name, rows, rtol=NEARLY)
        if match is not None:
            matches.append((exact is None, match, candidate, rows))
    found: list[Diagnosis] = []
    for nearly, match, candidate, rows in sorted(matches, key=lambda x: (x[0], x[1].factor != "")):
        if found and min(map(_merit, found)) <= (nearly, 0, match.factor != ""):
            break  # what comes is no better
        rtol = NEARLY if nearly else RTOL
        every = rows + [row for p, m in rest for row in _rows([candidate.estimator], p, m).values()]
        gaps = {row[0].name: _gap(match, row) for row in every}
        except_on = tuple(name for name, gap in gaps.items() if not gap <= rtol)
        if len(except_on) <= len(every) * _FEW:
            gap = max(gap for name, gap in gaps.items() if name not in except_on) if nearly else 0.0
            n, wrong_in = len(every), candidate.mistake
            found.append(
                replace(match, problems=n, except_on=except_on, mistake=wrong_in, gap=gap, made=candidate.made)
            )
    # of equals, the first
    return min(found, key=_merit, default=None)


def _merit(d: Diagnosis) -> tuple[bool, int, bool]:
    """Of two identities, the one with less is better."""
    return d.gap > 0, len(d.except_on), d.factor != ""


_TERMS = (
    ("the gradient of the return alone", ("kl_coefficient", "entropy_coefficient")),
    ("the gradient without the KL penalty", ("kl_coefficient",)),
    ("the gradient without the entropy bonus", ("entropy_coefficient",)),
)
_TERM_WORDS = {"kl_coefficient": "KL penalty", "entropy_coefficient": "entropy bonus"}


def _without_a_term(pairs: Sequence[tuple[Problem, Measurement]]) -> Diagnosis | None:
    """∇ of the objective without its KL penalty, its entropy bonus or both, if that is what is estimated."""
    for subject, names in _TERMS:
        missing = [name for name in names if any(getattr(p, name) for p, _ in pairs)]
        if len(missing) < len(names) == 1 or not missing:
            continue
        zero: dict[str, Any] = dict.fromkeys(names, 0.0)
        bare = [replace(p, **zero) for p, _ in pairs]
        rows = [(p, m, q.gradient()) for (p, m), q in zip(pairs, bare, strict=True)]
        found = _match(subject, rows)
        if all(float(x.norm()) <= RTOL * m.size for _, m, g in rows for x in (g, m.expected)):  # nothing but that term
            found = Diagnosis("identity", subject, "", len(rows))
        if found is not None:
            what = " and the ".join(f"{_TERM_WORDS[name]} (batch.{name})" for name in missing)
            are = "is" if len(missing) == 1 else "are"
            return replace(found, mistake=f"the {what} of the objective {are} missing")
    return None


def _on_one_problem(pairs: Sequence[tuple[Problem, Measurement]]) -> Diagnosis | None:
    """κ ∇J on the only problem there is, where the gradient has free numbers enough for that to be a finding."""
    if len(pairs) != 1:
        return None
    ((p, m),) = pairs
    g, paths = m.truth, p.trajectories.paths
    free = len(torch.unique(paths.context[paths.mask > 0])) * (g.shape[1] - 1)
    size = float((g * g).sum())
    if free < 2 or size == 0:
        return None
    scale = float((m.expected * g).sum()) / size
    if abs(scale) * math.sqrt(size) <= RTOL * m.size or float((m.expected - scale * g).norm()) > RTOL * m.size:
        return None
    same = tuple(x for x in [*_FACTORS][2:] if abs(_value(x, p) - scale) <= 1e-9 * abs(scale))
    return Diagnosis("identity", "the gradient", f"{scale:.6g}", 1, same_here=same)


_Row = tuple[Problem, Measurement, Tensor]


def _sieved(
    left: dict[str, tuple[Candidate, list[_Row]]], p: Problem, m: Measurement
) -> dict[str, tuple[Candidate, list[_Row]]]:
    """Those that some factor still explains on this problem and the ones before, or that cannot be asked here."""
    rows = _rows([c.estimator for c, _ in left.values()], p, m)
    out = {}
    for name, (candidate, before) in left.items():
        now = [*before, rows[name]] if name in rows else before
        telling = [row for row in now if not _both_zero(row)]
        if not telling or _match(name, now, rtol=NEARLY) is not None or (len(telling) == 1 and _parallel(telling[0])):
            out[name] = (candidate, now)
    return out


def _rows(estimators: Sequence[Estimator], p: Problem, m: Measurement) -> dict[str, _Row]:
    """E of each estimator there by name; without those that are too large or not defined. What is claimed to be κ ∇J, and
    tested to be, is not enumerated again."""
    expected: dict[str, Tensor] = {}
    asked = []
    for e in estimators:
        scale = _claimed_scale(e, p)
        if scale is not None:
            expected[e.name] = scale * m.truth
        elif e.fits(p):
            asked.append(e)
    expected |= expectations(asked, p)
    return {name: (p, m, x) for name, x in expected.items()}


def expectations(estimators: Sequence[Estimator], p: Problem) -> dict[str, Tensor]:
    """E ĝ of each by name, without those where it cannot be had."""
    found = {e.name: x for e, x in zip(estimators, expected_gradients(estimators, p), strict=True) if x is not None}
    return found | _enumerated([e for e in estimators if e.name not in found], p)


def _enumerated(estimators: Sequence[Estimator], p: Problem) -> dict[str, Tensor]:
    """All at once; if one of them cannot be had, by halves. That they are functions of their batch is not tried again."""
    try:
        moments = exact_moments(estimators, p, budget=TRY_BUDGET, functions=True)
    except PgcheckError:
        if len(estimators) == 1:
            return {}
        half = len(estimators) // 2
        return _enumerated(estimators[:half], p) | _enumerated(estimators[half:], p)
    return {e.name: x.mean for e, x in zip(estimators, moments, strict=True)}


def _claimed_scale(e: Estimator, p: Problem) -> float | None:
    """κ of a zoo entry that is κ ∇J on this problem; the claims of broken ones are false."""
    if registered_estimators().get(e.name) is not e or not e.fits(p):
        return None
    scales = [claim.scale_on(p) for claim in e.claims if claim.kind != "biased" and claim.applies(p)]
    return scales[0] if scales else None


def _both_zero(row: _Row) -> bool:
    """Nothing is expected of either, which every factor explains."""
    _, m, other = row
    return all(float(x.norm()) <= RTOL * m.size for x in (m.expected, other))


def _parallel(row: _Row) -> bool:
    """One vector is nearly a multiple of the other."""
    _, m, other = row
    size = float((other * other).sum())
    if size == 0:
        return False
    return float((m.expected - float((m.expected * other).sum()) / size * other).norm()) <= NEARLY * m.size


def _gap(found: Diagnosis, row: _Row) -> float:
    p, m, other = row
    return float((m.expected - _value(found.factor, p) * other).norm()) / m.size


def _is_multiple_of_truth(rows: Sequence[_Row]) -> bool:
    """Such a candidate is no cause: with one factor too many, anything proportional to ∇J fits it."""
    for _, m, other in rows:
        g = m.truth
        scale = float((other * g).sum() / (g * g).sum()) if float(g.norm()) > 0 else 0.0
        if float((other - scale * g).norm()) > RTOL * m.size:
            return False
    return True


def _telling_first(pairs: Sequence[tuple[Problem, Measurement]]) -> list[tuple[Problem, Measurement]]:
    """One of each family before the second of any, and of each family one where E ĝ is no multiple of ∇J, if there is one;
    first those whose gradient has several free numbers, cheap ones first.

    In a gradient of one free number everything is a multiple of everything. A γ that counts actions comes last: getting
    the clock wrong as well is a mistake of its own, and shall not hide the other."""

    def late(pair: tuple[Problem, Measurement]) -> tuple[bool, bool, int]:
        p, m = pair
        return p.discount < 1 and p.trajectories.paths.discount_clock == "action", m.truth.numel() < 6, m.enumerated

    by_price = sorted(pairs, key=late)
    first: dict[str, tuple[Problem, Measurement]] = {}
    for p, m in by_price:
        family = p.name.partition("/")[0]
        if family not in first or (m.off_axis > RTOL and not first[family][1].off_axis > RTOL):
            first[family] = (p, m)
    chosen = {p.name for p, _ in first.values()}
    return [*first.values(), *(pair for pair in by_price if pair[0].name not in chosen)]


def _match(subject: str, rows: Sequence[_Row], *, rtol: float = RTOL) -> Diagnosis | None:
    """E ĝ = factor · other on every row to `rtol` of the size, for a known factor or one constant."""
    if all(float(other.norm()) <= RTOL * m.size for _, m, other in rows):
        return None
    # on a single problem B, T and any number are one and the same
    factors = [*_FACTORS, *_PRODUCTS] if len(rows) > 1 else ["", "−1"]
    if len(rows) > 2:
        factors += [x for x in (_with_constant(base, rows) for base in ("", *_OWN)) if x]
    for factor in factors:
        if all(float((m.expected - _value(factor, p) * other).norm()) <= rtol * m.size for p, m, other in rows):
            return Diagnosis("identity", subject, factor, len(rows))
    return None


def _with_constant(base: str, rows: Sequence[_Row]) -> str:
    """`base` times the number that fits the first row that is not 0; nothing where that is 0, or `base` the same everywhere."""
    sizes = {_value(base, p) for p, _, _ in rows}
    p0, m0, first = next(row for row in rows if float(row[2].norm()) > RTOL * row[1].size)
    along = float((m0.expected * first).sum() / (first * first).sum())
    if (base and len(sizes) == 1) or abs(along) <= 1e-6 or not _value(base, p0):
        return ""
    constant = along / _value(base, p0)
    short = f"{constant:.6g}"
    name = short if abs(float(short) - constant) <= 1e-12 * abs(constant) else f"{constant:.12g}"
    return f"{name} × {base}" if base else name


def find_mistake(estimator: Estimator, problems: Sequence[Problem]) -> Diagnosis | None:
    """Of the known mistakes in what `estimator` is the `same_as`: the one whose estimate it gives from every batch tried."""
    for x in BROKEN.values():
        if x.sound.name != estimator.same_as:
            continue
        fitting = [p for p in problems if estimator.fits(p) and x.estimator.fits(p)]
        if fitting and all(estimates_gap(estimator, x.estimator, p) <= SAME for p in fitting):
            return Diagnosis("batch by batch", x.estimator.name, "", len(fitting), mistake=x.mistake)
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


# -- one part of a composition for another


@dataclass(frozen=True)
class Swap:
    """With the `part` ("aggregation", "ratio" or "advantage") of the zoo's `donor` in place of its own, the estimator
    meets its claim on all `problems`."""

    part: str
    donor: str
    name: str  # of the part put in, where it has one of its own
    problems: int


_PARTS = ("aggregation", "ratio", "advantage")  # tried in this order: the last changes most


def find_swap(estimator: Estimator, problems: Sequence[Problem], measured: Sequence[Measurement]) -> Swap | None:
    """The part of a zoo entry that mends the estimator, if it is a composition and one part is to blame; of several, the
    one with which the coefficients change least, and of equals the first."""
    pairs = _telling_first([(p, m) for p, m in zip(problems, measured, strict=True) if m.size > 0])
    wrong = [(p, m) for p, m in pairs if m.finding != "unbiased"]
    if not isinstance(estimator.coefficients, Composition) or not wrong:
        return None
    right = [pair for pair in pairs if pair[1].finding == "unbiased"]
    for part in _PARTS:
        promising = [
            (round(sum(_change(estimator, made, p) for p, _ in pairs[:TRIED_PROBLEMS]), 9), i, made, donor)
            for i, (made, donor) in enumerate(_with_other(part, estimator))
            if all(_unbiased_on(made, p, m) for p, m in wrong[:2])
        ]
        for _, _, made, donor in sorted(promising, key=itemgetter(0, 1)):
            if all(_unbiased_on(made, p, m) for p, m in wrong[2:] + right):
                other = getattr(made.coefficients, part)
                name = "" if "<" in getattr(other, "__qualname__", "<") else other.__name__
                return Swap(part, donor.name, name, len(pairs))
    return None


def _with_other(part: str, estimator: Estimator) -> list[tuple[Estimator, Estimator]]:
    """The estimator with each other `part` that the zoo has, and the first entry that has it."""
    own: Any = estimator.coefficients
    seen, out = [getattr(own, part)], []
    for donor in registered_estimators().values():
        other = getattr(donor.coefficients, part, None)
        if other is None or other in seen:
            continue
        seen.append(other)
        made = replace(
            estimator,
            coefficients=replace(own, **{part: other}),
            couples=max(estimator.couples, donor.couples, key=COUPLES.index),
            needs=tuple(dict.fromkeys((*estimator.needs, *donor.needs))),
            reads=None,
        )
        out.append((made, donor))
    return out


def _change(a: Estimator, b: Estimator, p: Problem) -> float:
    """1 − |cosine| of the coefficients of both over random batches."""
    table = p.trajectories_with(b.needs)
    _, batch = probe(p, table, b)
    x, y = coefficients_of(a, batch).flatten(), coefficients_of(b, batch).flatten()
    return 1.0 - abs(float(torch.nn.functional.cosine_similarity(x, y, dim=0)))


def _unbiased_on(estimator: Estimator, p: Problem, m: Measurement) -> bool:
    found = expectations([estimator], p).get(estimator.name)
    return found is not None and float((found - m.truth).norm()) <= RTOL * m.size


def diagnose(estimator: Estimator, problems: Sequence[Problem], measured: Sequence[Measurement]) -> Diagnosis | None:
    """What it is in expectation; failing that, where it goes wrong. A bias the size of float32 rounding is named first."""
    largest = max((m.distance(1.0) for m in measured), default=0.0)
    if RTOL < largest < SINGLE_PRECISION:
        return Diagnosis("rounding", "float32", "", len(measured))
    return identify(estimator, problems, measured) or pattern(problems, measured)
