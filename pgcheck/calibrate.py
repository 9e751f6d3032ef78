"""The checker is checked: how often each stage of a sampled verdict is wrong, against what it promises.

Where ĝ can be enumerated it has a finite law, and a sample of n draws is a multinomial count over its values
(`pgcheck.statistics.finite`), so that 1e5 looks are made in about a minute (`pgcheck.statistics.stacked`). What is measured:

* **trigger** and **confirm** on estimators without a bias, recorded apart and without stopping, at nominal 1e-1, 1e-2, 1e-3:
  a false FAIL takes both, on independent draws;
* **certificate** with a bias planted exactly at the tolerance, in four directions: a false PASS;
* both stages of mode `exceeds`, with a bias planted exactly at the tolerance;
* a confirming part where κ is open and the reference drawn as well (`pgcheck.statistics.open_scale`);
* **intervals**: how often one that is given misses, after a fixed number of draws and at whichever look a run stopped;
* **power**: draws to a FAIL, against the test that knows the direction of the bias beforehand.

Guarantee: rates carry Clopper–Pearson bounds (99%); families are never pooled, as one in which the guard refuses would
flatter another; every law and question has a stream of its own, so that neither the set of laws, nor that of questions, nor the
number of processes moves a number, and more looks go on where fewer ended. The error rate of a whole verdict, 1e-6 for a run,
is *inferred* from the stages and their independence.
"""

from __future__ import annotations

import math
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch
from scipy import special
from torch import Tensor

from pgcheck.engines.accounts import Account
from pgcheck.engines.coefficients import estimates
from pgcheck.engines.enumeration import Batches
from pgcheck.engines.moments import Progress
from pgcheck.engines.threads import one_thread
from pgcheck.errors import UnknownNameError, UsageError
from pgcheck.estimators.lookup import as_estimator
from pgcheck.registry import find_problem
from pgcheck.statistics.certificate import GRAM, upper_bound
from pgcheck.statistics.finite import Law
from pgcheck.statistics.grain import Grain
from pgcheck.statistics.guarded import Floats, interval, z_of
from pgcheck.statistics.open_scale import ON_SCALE, scales_left, unexplained
from pgcheck.statistics.sequential import (
    CONFIDENCE,
    GRAIN,
    Interval,
    Judge,
    Judgement,
    Settings,
    confidence_after,
    total_variance,
)
from pgcheck.statistics.stacked import Looks, certificates, drawn_counts, look
from pgcheck.statistics.status import Status
from pgcheck.statistics.variance import Pairs, variance_ratio

NOMINAL = (0.1, 0.01, 0.001)
BOUND = 0.99  # of the Clopper–Pearson bounds, each side at half the rest
ALLOWED = 1.3  # an upper bound below this times nominal is what the calibration must reach
SHAPES = ("along the gradient", "dense", "one coordinate", "noisiest direction")
RATIOS = (0.1, 0.05, 0.025)  # of a planted bias to the standard deviation along it
RUNS = 32_000
QUESTIONS = ("null", "planted", "exceeds", "open", "ratio", "verdicts", "power")  # what a stream is for
_PARTS = 4  # confirming parts of each look: twice what the settings take
_CHUNK = 250  # looks at once
_PILOT = 1_000  # looks that decide how many follow
_FEW = 6  # a direction in which hardly anything passes is measured on this part of the runs
_MANY = 16  # coordinates
_MISS = round(1 - CONFIDENCE, 9)


# -- laws


def estimator_law(estimator: str, problem: str, *, family: str) -> Law:
    """ĝ of every batch of a named problem that is small enough."""
    e, p = as_estimator(estimator), find_problem(problem)
    table = p.trajectories_with(e.needs)
    batches = Batches(table, p.sizes)
    (index, weight), *rest = batches.blocks(batches.count)
    assert not rest
    values = estimates(e, table, index, batches.labels)
    return Law.of(f"{estimator} on {problem}", family, values, weight.numpy() / float(weight.sum()))


def _gaussian(P: int, *, number: int) -> Law:
    """Equally likely values that a Gaussian would take."""
    rng = np.random.Generator(np.random.Philox(P))
    return Law.of(f"Gaussian values, P = {P}", "light", _around(rng.standard_normal((number, P)), P), _equal(number))


def _weighted(σ: float, P: int, *, number: int) -> Law:
    """Log-normal importance weights (their quantiles) times a noisy vector."""
    rng = np.random.Generator(np.random.Philox(P))
    weight = np.exp(σ * special.ndtri((np.arange(number) + 0.5) / number) - σ**2 / 2)
    values = weight[:, None] * (0.3 + rng.standard_normal((number, P)))
    return Law.of(f"log-normal weights, σ = {σ:g}, P = {P}", "heavy-tailed", torch.from_numpy(values), _equal(number))


def _sparse(P: int, *, number: int) -> Law:
    """A reward that is paid once in a hundred draws."""
    rng = np.random.Generator(np.random.Philox(P))
    values = np.concatenate([np.zeros((1, P)), 0.3 + rng.standard_normal((number - 1, P))])
    paid = np.full(number - 1, 0.01 / (number - 1))
    return Law.of(f"paid once in a hundred, P = {P}", "rare event", torch.from_numpy(values), np.array([0.99, *paid]))


def _around(noise: Floats, P: int) -> Tensor:
    return torch.from_numpy(noise - noise.mean(0) + 0.1 / math.sqrt(P) * np.cos(np.arange(P)))


def _equal(number: int) -> Floats:
    return np.full(number, 1 / number)


def laws_named(starts: Sequence[str]) -> tuple[Law, ...]:
    """Those of `laws()` whose names start so.

    Raises:
        UnknownNameError: none does.
    """
    every = laws()
    for start in starts:
        if not any(law.name.startswith(start) for law in every):
            raise UnknownNameError(
                "law", start, [law.name for law in every], hint="`reports/calibration/` names them all."
            )
    return tuple(law for law in every if law.name.startswith(tuple(starts)))


def laws() -> tuple[Law, ...]:
    """What the calibration runs over: real estimators and made-up ones, light to wild."""
    return (
        _gaussian(2, number=200),
        _gaussian(32, number=300),
        estimator_law("leave_one_out", "dialogue/two-turn", family="light"),
        estimator_law("leave_one_out", "chain/linear-policy", family="light"),
        estimator_law("reinforce", "mdp/two-state-0.5", family="skewed"),
        estimator_law("reinforce", "tree/tokens-0.8", family="skewed"),
        _weighted(0.5, 2, number=300),
        _weighted(1.0, 2, number=300),
        _weighted(1.0, 32, number=300),
        _weighted(1.5, 32, number=300),
        estimator_law("trajectory_is", "off-policy/two-state-drifted", family="heavy-tailed"),
        estimator_law("trajectory_is", "off-policy/tree-stale", family="heavy-tailed"),
        estimator_law("reinforce", "notes/coin-0.01", family="rare event"),
        estimator_law("reinforce", "chain/absorbing", family="rare event"),
        _sparse(32, number=300),
    )


# -- rates


@dataclass(frozen=True)
class Rate:
    """How often something happened in `runs` trials, against a nominal rate."""

    what: str  # trigger, confirm, certificate, coverage: …
    law: str
    family: str
    detail: str  # the shape of the planted bias, or which interval
    nominal: float
    runs: int
    events: int
    refused: float  # share of trials in which the guard refused; they count as no event
    low: float  # Clopper–Pearson bounds, 99%
    high: float

    @property
    def rate(self) -> float:
        """Events over runs."""
        return self.events / self.runs if self.runs else math.nan


def clopper_pearson(events: int, runs: int, *, confidence: float = BOUND) -> tuple[float, float]:
    """Exact bounds on a probability."""
    tail = (1 - confidence) / 2
    low = float(special.betaincinv(events, runs - events + 1, tail)) if events else 0.0
    high = float(special.betaincinv(events + 1, runs - events, 1 - tail)) if events < runs else 1.0
    return low, high


def rate(what: str, law: Law, detail: str, nominal: float, *, runs: int, events: int, refused: float) -> Rate:
    """With its bounds."""
    return Rate(what, law.name, law.family, detail, nominal, runs, events, refused, *clopper_pearson(events, runs))


@dataclass(frozen=True)
class Power:
    """Draws to a FAIL of whole judges, against the test at the same α that knows the direction of the bias."""

    law: str
    detail: str
    size: float  # ‖b‖/‖μ*‖
    runs: int
    failed: int
    median_draws: float
    oracle_draws: float

    @property
    def ratio(self) -> float:
        """Median draws over those of the oracle."""
        return self.median_draws / self.oracle_draws


@dataclass(frozen=True)
class EndToEnd:
    """Verdicts of whole judges, with the default error rates, on an estimator without a bias."""

    law: str
    family: str
    runs: int
    passed: int
    failed: int
    inconclusive: int
    most_draws: int


@dataclass(frozen=True)
class Calibration:
    """Everything that was measured."""

    seed: int
    rates: tuple[Rate, ...]
    power: tuple[Power, ...]
    verdicts: tuple[EndToEnd, ...]
    made_by: tuple[str, ...] = ()  # commands that give it again, in this order

    def with_more(self, other: Calibration) -> Calibration:
        """With what the other measured in the place of what this has of the same law and question.

        Raises:
            UsageError: it is of another seed.
        """
        if other.seed != self.seed:
            raise UsageError(
                f"seed: {other.seed}, and what is there was measured with {self.seed}; figures of two seeds are not mixed."
            )
        new = {_key(r): r for r in other.rates}
        rates = [new.pop(_key(r), r) for r in self.rates]
        powered, ended = {p.law for p in other.power}, {v.law: v for v in other.verdicts}
        verdicts = [ended.pop(v.law, v) for v in self.verdicts]
        return replace(
            self,
            rates=(*rates, *new.values()),
            power=(*(p for p in self.power if p.law not in powered), *other.power),
            verdicts=(*verdicts, *ended.values()),
            made_by=(*self.made_by, *other.made_by),
        )

    @property
    def rates_by_question(self) -> list[Rate]:
        """The rates of all laws, question by question, in the order in which the questions came up."""
        order = {what: i for i, what in enumerate(dict.fromkeys(r.what for r in self.rates))}
        return sorted(self.rates, key=lambda r: order[r.what])


def _key(r: Rate) -> tuple[str, str, str, float]:
    return r.what, r.law, r.detail, r.nominal


def planted(law: Law, shape: str, size: float) -> Tensor:
    """A bias `[P]` of norm `size`."""
    P = len(law.mean)
    if shape == "along the gradient":
        v = law.mean
    elif shape == "dense":
        v = torch.from_numpy(np.random.Generator(np.random.Philox(P)).standard_normal(P))
    elif shape == "one coordinate":
        v = torch.nn.functional.one_hot(torch.tensor(P // 2), P).to(torch.float64)
    else:
        v = torch.linalg.eigh(law.covariance)[1][:, -1]
    return v * (size / v.norm())


def _pieces(runs: int) -> Iterator[int]:
    """Sizes of the chunks that make `runs`."""
    for at in range(0, runs, _CHUNK):
        yield min(_CHUNK, runs - at)


# -- stages


def null_rates(law: Law, *, runs: int, rng: np.random.Generator, settings: Settings | None = None) -> list[Rate]:
    """False alarms of both stages, and coverage of the intervals that one look gives, without a bias."""
    settings = settings or Settings()
    stages = _Stages(law, "", "trigger", "confirm")
    scale, variance, effect = (_Misses() for _ in range(3))
    total = float(law.covariance.diagonal().sum())
    for piece in _pieces(runs):
        x = look(law, settings, drawn_counts(law, settings, piece, rng, parts=_PARTS), bias=torch.zeros_like(law.mean))
        stages.add(x)
        scale.add(*interval(x.along, confidence=CONFIDENCE), 0.0)
        variance.add(*total_variance(x.spread, x.gap)[1:], total)
        effect.add(*interval(x.effect, confidence=CONFIDENCE), x.effect_mean)
    out = stages.rates()
    for name, missed in (("scale", scale), ("variance", variance), ("effect", effect)):
        out.append(missed.rate("fixed draws", law, name))
    return out


def exceeding_rates(law: Law, *, runs: int, rng: np.random.Generator, settings: Settings | None = None) -> list[Rate]:
    """False alarms of both stages of mode `exceeds`, the bias being exactly the tolerance, along the gradient."""
    settings = replace(settings or Settings(), mode="exceeds")
    Δ = _tolerance(law, settings.first_look)
    stages = _Stages(law, SHAPES[0], "trigger of exceeds", "confirm of exceeds")
    for piece in _pieces(runs):
        counts = drawn_counts(law, settings, piece, rng, parts=_PARTS)
        stages.add(look(law, settings, counts, bias=planted(law, SHAPES[0], Δ), shift=Δ))
    return stages.rates()


class _Stages:
    """False alarms of a trigger and of the confirming parts."""

    def __init__(self, law: Law, detail: str, *names: str) -> None:
        self.law, self.detail, self.names = law, detail, names
        self.events: Counter[tuple[str, float]] = Counter()
        self.trials: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()

    def add(self, x: Looks) -> None:
        trigger, confirm = self.names
        self.trials.update({trigger: len(x.evidence), confirm: x.confirming.size})
        self.refused.update({trigger: int(x.along.refused.sum()), confirm: int(x.confirming_refused.sum())})
        for τ in NOMINAL:
            self.events[trigger, τ] += int(x.triggers(τ).sum())
            self.events[confirm, τ] += int((x.confirming >= z_of(τ)).sum())

    def rates(self) -> list[Rate]:
        return [
            rate(
                what, self.law, self.detail, τ, runs=(n := self.trials[what]), events=self.events[what, τ],
                refused=self.refused[what] / n,
            )
            for what in self.names
            for τ in NOMINAL
        ]  # fmt: skip


def _tolerance(law: Law, n: int) -> float:
    """The Δ that U = 0 certifies at 1e-4 after n draws, with the true λ and tr Σ²."""
    top = float(torch.linalg.eigvalsh(law.covariance)[-1])
    return upper_bound(0.0, 1e-4, n=n, largest=top, square=float((law.covariance**2).sum()))


def false_passes(law: Law, *, runs: int, rng: np.random.Generator, settings: Settings | None = None) -> list[Rate]:
    """Certificates given although the bias is exactly the tolerance, in four directions.

    The tolerance is the one that U = 0 certifies at 1e-4: a tighter one is never certified. A direction in which less than half
    of what is allowed passes among the first looks, which are then thrown away, is measured on a sixth of the runs.
    """
    settings = settings or Settings()
    Δ = _tolerance(law, settings.first_look)
    biases = {shape: planted(law, shape, Δ) for shape in SHAPES}
    wanted = dict.fromkeys(SHAPES, runs)
    if runs > _PILOT:
        pilot = _false_passes(law, settings, biases, Δ, dict.fromkeys(SHAPES, _PILOT), rng)
        quiet = {r.detail for r in pilot if r.nominal == NOMINAL[0] and r.rate < r.nominal / 2}
        wanted = {shape: runs // _FEW if shape in quiet else runs for shape in SHAPES}
    return _false_passes(law, settings, biases, Δ, wanted, rng)


def _false_passes(
    law: Law, settings: Settings, biases: dict[str, Tensor], Δ: float, wanted: dict[str, int], rng: np.random.Generator
) -> list[Rate]:
    done, refused, passed = Counter[str](), Counter[str](), Counter[tuple[str, float]]()
    for piece in _pieces(max(wanted.values())):
        shapes = [shape for shape in SHAPES if done[shape] < wanted[shape]]
        counts = drawn_counts(law, settings, piece, rng, parts=0)
        for shape, x in zip(shapes, certificates(law, counts, [biases[s] for s in shapes]), strict=True):
            done[shape] += piece
            refused[shape] += int(x.refused.sum())
            for τ, some in zip(NOMINAL, x.passes(Δ, NOMINAL), strict=True):
                passed[shape, τ] += int(some.sum())
    return [
        rate("certificate", law, shape, τ, runs=n, events=passed[shape, τ], refused=refused[shape] / n)
        for shape, n in done.items()
        for τ in NOMINAL
    ]


# -- an open κ, the reference drawn as well

_OPEN = 0.5  # κ
_SHARED = 0.8  # correlation of the noise of x and of r
_LENGTHS = (8, 30)  # ‖g‖ in standard errors of ⟨r̄, g⟩/‖g‖


def open_rates(law: Law, *, runs: int, rng: np.random.Generator) -> list[Rate]:
    """False alarms of a confirming part where E x = κ g, and g is known only from an r beside each x.

    The noise of both is the law's. û is 45° off g, and so is the witness, across û: it sees as much of g as û does, so that an
    error in κ looks like a bias. Refused: κ is not bounded.
    """
    if len(law.mean) == 1:
        return []
    n = Settings().first_look // (Settings().stages - 1)
    g = law.mean.numpy() / float(law.mean.norm())
    turned = rng.standard_normal(len(g))
    turned -= g * (turned @ g)
    turned /= np.linalg.norm(turned)
    û, v = (g + turned) / math.sqrt(2), (g - turned) / math.sqrt(2)
    noise = (law.values - law.mean).numpy()
    error = math.sqrt(float(law.probability @ (noise @ g) ** 2) / n)
    out = []
    for length in _LENGTHS:
        events, refused = Counter[float](), 0
        for _ in range(runs):
            i, j = rng.choice(len(noise), (2, n), p=law.probability)
            along, across = (
                Pairs.counted(
                    _OPEN * (length * error * (g @ w) + _SHARED * e[i] + math.sqrt(1 - _SHARED**2) * e[j]),
                    length * error * (g @ w) + e[i],
                    np.ones(n),
                )
                for w, e in ((û, noise @ û), (v, noise @ v))
            )
            for τ in NOMINAL:
                places = scales_left(along, ON_SCALE * τ)
                refused += places is None and τ == NOMINAL[0]
                events[τ] += unexplained(across, places, (0.0, 0.0))[0] >= z_of((1 - ON_SCALE) * τ)
        detail = f"‖g‖ {length} standard errors"
        out += [
            rate("confirm of open κ", law, detail, τ, runs=runs, events=events[τ], refused=refused / runs)
            for τ in NOMINAL
        ]
    return out


# -- intervals


class _Misses:
    """Of intervals: tried, given, and wrong."""

    def __init__(self) -> None:
        self.tried, self.given, self.missed = 0, 0, 0

    def add(self, low: Floats, high: Floats, truth: float | Floats) -> None:
        low, high = np.atleast_1d(low), np.atleast_1d(high)
        given, slack = np.isfinite(low), 1e-9 * np.abs(truth) + 1e-12
        self.tried += len(low)
        self.given += int(given.sum())
        self.missed += int((given & ((low > truth + slack) | (high < truth - slack))).sum())

    def rate(self, what: str, law: Law, name: str) -> Rate:
        """Misses among the intervals that were given."""
        refused = 1 - self.given / max(self.tried, 1)
        return rate(f"misses, {what}", law, name, _MISS, runs=self.given, events=self.missed, refused=refused)


def ratio_misses(law: Law, *, runs: int, rng: np.random.Generator) -> Rate:
    """The interval of a ratio of variances: of X, and of X with its coordinates weighted .5 … 2."""
    d = (law.values - law.mean).numpy()
    weight = np.linspace(0.5, 2.0, d.shape[1])
    a, b = (d**2).sum(1), ((d * weight) ** 2).sum(1)
    truth, misses = float(law.probability @ a) / float(law.probability @ b), _Misses()
    for piece in _pieces(runs):
        for c in law.counts(Settings().first_look, piece, rng).numpy():
            got = variance_ratio(Pairs.counted(a, b, c))
            misses.add(np.array(got.low), np.array(got.high), truth)
    return misses.rate("fixed draws", law, "variance ratio")


@dataclass(frozen=True)
class Ended:
    """A whole run: the verdict, the intervals of its account, and what they should contain."""

    verdict: Judgement
    intervals: dict[str, Interval]
    truth: dict[str, float]


def run_to_the_end(law: Law, rng: np.random.Generator, *, bias: Tensor, settings: Settings) -> Ended:
    """A judge and an account on draws of a law whose mean is μ* + bias, until the judge has decided."""
    target = law.mean - bias
    judge, account, centre = Judge(target, settings), None, None
    while not judge.decided:
        x = Grain.of(law.draws(GRAIN, rng), centre)
        centre = x.centre
        new = Account.of_grain(x, target, blocks=x.x[:GRAM].unsqueeze(0))
        account = new if account is None else account.merge(new)
        judge.update(x)
    assert account is not None
    v = judge.verdict()
    said = account.intervals(target, confidence=confidence_after(v.draws, settings))
    of_judge = {"scale": v.scale, "off_axis": v.off_axis, "variance": v.variance}
    size, total = float(target.norm()), float(law.covariance.diagonal().sum())
    κ = float(law.mean @ target) / size**2
    truth = {
        "scale": κ, "off_axis": float((law.mean - κ * target).norm() / law.mean.norm()), "variance": total,
        "bias": float(bias.norm()), "mse": total + float(bias @ bias), "snr": float(law.mean.norm()) / math.sqrt(total),
    }  # fmt: skip
    if v.effect is not None:
        of_judge["effect"], truth["effect"] = v.effect, judge.along_witness(bias) / size
    return Ended(v, of_judge | {k: said[k] for k in ("bias", "mse", "snr")}, truth)


class _Endings:
    """What whole runs of a law said."""

    def __init__(self, law: Law) -> None:
        self.law, self.misses = law, dict[str, _Misses]()

    def add(self, ended: Ended) -> Judgement:
        for name, x in ended.intervals.items():
            of = self.misses.setdefault(name, _Misses())
            of.add(np.array(x.low), np.array(x.high), ended.truth[name])
        return ended.verdict

    def rates(self, what: str) -> list[Rate]:
        return [m.rate(what, self.law, name) for name, m in self.misses.items()]


def end_to_end(law: Law, *, runs: int, rng: np.random.Generator) -> tuple[EndToEnd, list[Rate]]:
    """Whole runs without a bias, at the default error rates; the tolerance is one that some looks can certify."""
    settings = Settings(rtol=0.0, atol=_tolerance(law, 4 * Settings().first_look), looks=4)
    endings, none = _Endings(law), torch.zeros_like(law.mean)
    got = [endings.add(run_to_the_end(law, rng, bias=none, settings=settings)) for _ in range(runs)]
    count = Counter(v.status for v in got)
    verdicts = EndToEnd(
        law.name, law.family, runs, count[Status.PASS], count[Status.FAIL], count[Status.INCONCLUSIVE],
        max(v.draws for v in got),
    )  # fmt: skip
    return verdicts, endings.rates("after stopping, no bias")


def powers(law: Law, *, runs: int, rng: np.random.Generator) -> tuple[list[Power], list[Rate]]:
    """Draws to FAIL for biases along the gradient and dense, of `RATIOS` times the standard deviation along them."""
    settings = Settings(rtol=0.0, atol=1e-9, looks=7)  # too tight to be certified: only a FAIL ends it
    endings, out = _Endings(law), []
    for shape in SHAPES[:2]:
        direction = planted(law, shape, 1.0)
        noise = math.sqrt(float(direction @ law.covariance @ direction))
        for ratio in RATIOS:
            bias = direction * (ratio * noise)
            got = [endings.add(run_to_the_end(law, rng, bias=bias, settings=settings)) for _ in range(runs)]
            failed = [v.draws for v in got if v.status is Status.FAIL]
            median = float(np.median(failed)) if failed else math.inf
            size = float(bias.norm() / (law.mean - bias).norm())
            oracle = (z_of(settings.alpha) / ratio) ** 2
            out.append(Power(law.name, shape, size, runs, len(failed), median, oracle))
    return out, endings.rates("after stopping, a bias")


# -- all of it


def _stream(law: Law, what: str, seed: int) -> np.random.Generator:
    """One for each law and question."""
    return np.random.Generator(np.random.Philox([seed, zlib.crc32(f"{law.name} {what}".encode())]))


@one_thread()
def _of_looks(law: Law, runs: int, seed: int, questions: Sequence[str]) -> list[Rate]:
    """What single looks say; those with a bias take four times as long in many coordinates, and are half as many."""
    half = runs if len(law.mean) <= _MANY else max(100, runs // 2)
    of = {
        "null": lambda rng: null_rates(law, runs=runs, rng=rng),
        "planted": lambda rng: false_passes(law, runs=2 * half, rng=rng),
        "exceeds": lambda rng: exceeding_rates(law, runs=max(100, half // 2), rng=rng),
        "open": lambda rng: open_rates(law, runs=max(10, half // 8), rng=rng),
        "ratio": lambda rng: [ratio_misses(law, runs=max(20, half // 25), rng=rng)],
    }
    return [r for name, ask in of.items() if name in questions for r in ask(_stream(law, name, seed))]


@one_thread()
def _of_whole_runs(
    law: Law, runs: int, seed: int, questions: Sequence[str]
) -> tuple[list[EndToEnd], list[Power], list[Rate]]:
    """What judges say that look until they have decided."""
    verdicts, power, misses = list[EndToEnd](), list[Power](), list[Rate]()
    if "verdicts" in questions:
        ended, misses = end_to_end(law, runs=max(4, runs // 320), rng=_stream(law, "verdicts", seed))
        verdicts.append(ended)
    if "power" in questions and law.family in ("light", "skewed"):
        power, more = powers(law, runs=max(2, runs // 2000), rng=_stream(law, "power", seed))
        misses = misses + more
    return verdicts, power, misses


def calibrate(
    over: Sequence[Law] | None = None,
    *,
    runs: int = RUNS,
    seed: int = 0,
    workers: int = 1,
    questions: Sequence[str] = QUESTIONS,
    progress: Progress | None = None,
) -> Calibration:
    """Measure all of it, or some questions.

    Args:
        over: the laws; None: `laws()`.
        runs: looks of each law without a bias; twice as many with one (as many in more than 16 coordinates); whole runs are
            fewer, as they take longer.
        workers: processes; any number gives the same figures.
        questions: some of `QUESTIONS`.
        progress: called before each law.

    Raises:
        UsageError: fewer than 100 runs, or a question that there is not.
    """
    if runs < 100:
        raise UsageError(f"runs: {runs}; fewer than 100 say nothing about a rate.")
    for q in questions:
        if q not in QUESTIONS:
            raise UnknownNameError("question", q, QUESTIONS, hint=f"Questions: {', '.join(QUESTIONS)}.")
    chosen = laws() if over is None else tuple(over)
    every = (chosen, *([x] * len(chosen) for x in (runs, seed, questions)))

    def told(what: str, found: Iterator[Any]) -> list[Any]:
        out = []
        for i, law in enumerate(chosen):
            if progress is not None:
                progress(f"{law.name}, {what}", i, len(chosen))
            out.append(next(found))
        return out

    with ExitStack() as stack:
        run = map if workers == 1 else stack.enter_context(_pool(workers)).map
        looks, whole = run(_of_looks, *every), run(_of_whole_runs, *every)
        rates = [r for of_law in told("looks", iter(looks)) for r in of_law]
        ended = told("whole runs", iter(whole))
    return Calibration(
        seed,
        (*rates, *(r for _, _, misses in ended for r in misses)),
        tuple(p for _, power, _ in ended for p in power),
        tuple(v for verdicts, _, _ in ended for v in verdicts),
    )


def _pool(workers: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(workers, mp_context=get_context("spawn"))
