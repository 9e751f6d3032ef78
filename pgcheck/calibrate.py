"""The checker is checked: how often each stage of a sampled verdict is wrong, against what it promises.

Where ĝ can be enumerated it has a finite law, and a sample of n draws is a multinomial count over its values; so thousands
of runs of one look are made at once. What is measured:

* **trigger** and **confirm** on estimators without a bias, recorded apart and without stopping, at nominal 1e-1, 1e-2, 1e-3:
  a false FAIL takes both, on independent draws;
* **certificate** with a bias planted exactly at the tolerance, in four directions: a false PASS;
* **coverage** of every interval that a verdict prints;
* **power**: draws to a FAIL, against the test that knows the direction of the bias beforehand.

Directions, scores and certificates are those of `pgcheck.statistics`; how a look puts them together is written here a second
time, and the two are compared in the tests.

Guarantee: rates carry Clopper–Pearson bounds (99%); families are never pooled, as one in which the guard refuses would
flatter another. The error rate of a whole verdict, 1e-6 for a run, is *inferred* from the stages and their independence.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import special
from torch import Tensor

from pgcheck.engines.coefficients import estimates
from pgcheck.engines.enumeration import Batches
from pgcheck.engines.moments import Progress
from pgcheck.engines.threads import one_thread
from pgcheck.errors import UsageError
from pgcheck.estimators.lookup import as_estimator
from pgcheck.registry import find_problem
from pgcheck.statistics.certificate import GRAM, p_value, stretch, upper_bound
from pgcheck.statistics.guarded import Floats, Scores, interval, z_of, z_scores
from pgcheck.statistics.panel import TWO_SIDED, WITNESSES, directions, loudest, thresholds
from pgcheck.statistics.sequential import CONFIDENCE, GRAIN, Judge, Settings, total_variance
from pgcheck.statistics.status import Status
from pgcheck.statistics.variance import Pairs, variance_ratio

NOMINAL = (0.1, 0.01, 0.001)
BOUND = 0.99  # of the Clopper–Pearson bounds, each side at half the rest
ALLOWED = 1.3  # an upper bound below this times nominal is what the calibration must reach
SHAPES = ("along the gradient", "dense", "one coordinate", "noisiest direction")
RUNS = 20_000
_CHUNK = 250  # runs at once


@dataclass(frozen=True)
class Law:
    """A random vector with finitely many values: ĝ of one batch."""

    name: str
    family: str
    values: Tensor  # [N, P]
    probability: Floats  # [N]

    @cached_property
    def mean(self) -> Tensor:
        """E X, [P]."""
        return torch.from_numpy(self.probability) @ self.values

    @cached_property
    def covariance(self) -> Tensor:
        """Cov X, [P, P]."""
        d = self.values - self.mean
        return d.T @ (d * torch.from_numpy(self.probability).unsqueeze(-1))

    def draws(self, number: int, rng: np.random.Generator) -> Tensor:
        """`number` draws, `[number, P]`."""
        at = np.searchsorted(np.cumsum(self.probability)[:-1], rng.random(number), side="right")
        return self.values[torch.from_numpy(at)]


def estimator_law(estimator: str, problem: str, *, family: str) -> Law:
    """ĝ of every batch of a named problem that is small enough."""
    e, p = as_estimator(estimator), find_problem(problem)
    table = p.trajectories_with(e.needs)
    batches = Batches(table, p.sizes)
    (index, weight), *rest = batches.blocks(batches.count)
    assert not rest
    values = estimates(e, table, index, batches.labels)
    return Law(f"{estimator} on {problem}", family, values, weight.numpy() / float(weight.sum()))


def _gaussian(P: int, *, number: int) -> Law:
    """Equally likely values that a Gaussian would take."""
    rng = np.random.Generator(np.random.Philox(P))
    return Law(f"Gaussian values, P = {P}", "light", _around(rng.standard_normal((number, P)), P), _equal(number))


def _weighted(σ: float, P: int, *, number: int) -> Law:
    """Log-normal importance weights (their quantiles) times a noisy vector."""
    rng = np.random.Generator(np.random.Philox(P))
    weight = np.exp(σ * special.ndtri((np.arange(number) + 0.5) / number) - σ**2 / 2)
    values = weight[:, None] * (0.3 + rng.standard_normal((number, P)))
    return Law(f"log-normal weights, σ = {σ:g}, P = {P}", "heavy-tailed", torch.from_numpy(values), _equal(number))


def _sparse(P: int, *, number: int) -> Law:
    """A reward that is paid once in a hundred draws."""
    rng = np.random.Generator(np.random.Philox(P))
    values = np.concatenate([np.zeros((1, P)), 0.3 + rng.standard_normal((number - 1, P))])
    paid = np.full(number - 1, 0.01 / (number - 1))
    return Law(f"paid once in a hundred, P = {P}", "rare event", torch.from_numpy(values), np.array([0.99, *paid]))


def _around(noise: Floats, P: int) -> Tensor:
    return torch.from_numpy(noise - noise.mean(0) + 0.1 / math.sqrt(P) * np.cos(np.arange(P)))


def _equal(number: int) -> Floats:
    return np.full(number, 1 / number)


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


# -- many runs of one look and its confirmation


@dataclass(frozen=True)
class Looks:
    """The first look of many runs of a judge, and the confirmation of its strongest witness, triggered or not."""

    evidence: Floats  # [R, 2, 6]: as Judge._evidence
    along: Scores  # of R kinds: the scores along μ*
    spread: Scores  # of R kinds: ‖X − c‖²
    gap: Floats  # [R]: ‖X̄ − c‖²
    statistic: Floats  # U, [R]
    largest: Floats  # λ, [R]
    square: Floats  # tr Σ², [R]
    confirming: Floats  # z-scores, [R, parts]
    confirming_refused: NDArray[np.bool_]  # [R, parts]
    effect: Scores  # of R kinds: all confirming draws
    effect_mean: Floats  # [R]: what they have as their mean
    n: int


def weighted_scores(y: Tensor, counts: Tensor) -> Scores:
    """Moments of values y `[R, N]`, or `[N]` for all runs, that occur `counts` `[R, N]` times: R kinds of score."""
    n = float(counts[0].sum())
    y = y.expand(counts.shape)
    mean = (counts * y).sum(1) / n
    d = y - mean.unsqueeze(1)
    cd2 = counts * d * d
    seen = counts > 0
    low, high = torch.where(seen, y, torch.inf).amin(1), torch.where(seen, y, -torch.inf).amax(1)
    return Scores(int(n), *(x.numpy() for x in (mean, cd2.sum(1), (cd2 * d).sum(1), low, high)))


def counted_segments(
    law: Law, settings: Settings, runs: int, rng: np.random.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Counts `[segments, R, N]` of: the Gram block of each grain, the rest of each grain, the confirming parts."""
    grains, parts = settings.first_look // GRAIN, settings.stages - 1

    def counts(n: int, number: int) -> Tensor:
        return torch.from_numpy(rng.multinomial(n, law.probability, size=(number, runs)).astype(np.float64))

    return counts(GRAM, grains), counts(GRAIN - GRAM, grains), counts(settings.first_look // parts, parts)


def look(
    law: Law, settings: Settings, segments: tuple[Tensor, Tensor, Tensor], *, bias: Tensor, shift: float = 0.0
) -> Looks:
    """One look of R runs at D = X − E X + `bias`, and the confirmation.

    Args:
        shift: what a mean must exceed (Δ, in mode `exceeds`).
    """
    gram, rest, confirming = segments
    grains, runs, _ = gram.shape
    n, P = settings.first_look, len(law.mean)
    target = law.mean - bias
    d = law.values - target
    d2, norms2 = d * d, (d * d).sum(1)
    along = target / target.norm()
    products = (d.unsqueeze(2) * d.unsqueeze(1)).reshape(len(d), P * P)

    tops, squares = [], []
    for block in gram:
        M = (block @ products).reshape(runs, P, P)
        tops.append(torch.linalg.eigvalsh(M)[:, -1] / GRAM)
        squares.append(((M * M).sum((1, 2)) - block @ norms2.square()).clamp(min=0.0) / (GRAM * (GRAM - 1)))
    top, square = torch.stack(tops).mean(0), torch.stack(squares)
    trace = square.mean(0) + 2 * (square.var(0, correction=0) / (grains - 1)).sqrt()

    mean = gram[0] @ d / GRAM
    pilot = (gram[0] @ products).reshape(runs, P, P) - GRAM * mean.unsqueeze(2) * mean.unsqueeze(1)
    loud = loudest(*torch.linalg.eigh(pilot))
    learned = max(1, grains // 4)
    every = gram + rest
    known, scored, total = every[:learned].sum(0), every[learned:].sum(0), every.sum(0)

    def learn(counts: Tensor) -> Tensor:
        seen = int(counts[0].sum())
        return directions(counts @ d, counts @ d2, seen, along=along, loud=loud, aside=False)[..., : len(WITNESSES)]

    v = learn(known)
    evidence = np.zeros((runs, 2, len(WITNESSES)))
    scores_along = weighted_scores(d @ along, total)
    for w in range(len(WITNESSES)):
        of_witness = scores_along if w == 0 else weighted_scores(v[:, :, w] @ d.T, scored)
        evidence[:, 0, w] = z_scores(of_witness.plus(-shift))
        evidence[:, 1, w] = z_scores(of_witness.times(-1.0).plus(-shift))
    evidence[:, 1, TWO_SIDED:] = -np.inf
    ratio = evidence / thresholds(settings.stage_level / settings.looks)
    best = torch.from_numpy(ratio.max(1).argmax(1))
    sign = np.where(evidence[np.arange(runs), 0, best] >= evidence[np.arange(runs), 1, best], 1.0, -1.0)
    frozen = learn(total)[torch.arange(runs), :, best] * torch.from_numpy(sign).unsqueeze(1)
    y = frozen @ d.T
    parts = [weighted_scores(y, c) for c in confirming]

    S, centre = total @ d, every[0] @ d / GRAIN
    spread = norms2 - 2 * centre @ d.T + centre.square().sum(1, keepdim=True)
    return Looks(
        evidence=evidence,
        along=scores_along,
        spread=weighted_scores(spread, total),
        gap=(S / n - centre).square().sum(1).numpy(),
        statistic=((S.square().sum(1) - total @ norms2) / (n * (n - 1))).numpy(),
        largest=torch.minimum(top, trace.sqrt()).numpy(),
        square=trace.numpy(),
        confirming=np.stack([z_scores(p.plus(-shift)) for p in parts], 1),
        confirming_refused=np.stack([p.refused for p in parts], 1),
        effect=weighted_scores(y, confirming.sum(0)),
        effect_mean=(frozen @ bias).numpy(),
        n=n,
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

    @property
    def rates_by_question(self) -> list[Rate]:
        """The rates of all laws, question by question, in the order in which the questions came up."""
        order = {what: i for i, what in enumerate(dict.fromkeys(r.what for r in self.rates))}
        return sorted(self.rates, key=lambda r: order[r.what])


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


def _pieces(runs: int) -> list[int]:
    return [_CHUNK] * (runs // _CHUNK) + ([runs % _CHUNK] if runs % _CHUNK else [])


def null_rates(law: Law, *, runs: int, rng: np.random.Generator, settings: Settings | None = None) -> list[Rate]:
    """False alarms of both stages, and coverage of the intervals that one look gives, without a bias."""
    settings = settings or Settings()
    fired, confirmed = dict.fromkeys(NOMINAL, 0), dict.fromkeys(NOMINAL, 0)
    refused, parts, parts_refused = 0, 0, 0
    covered = {"scale": [0, 0], "variance": [0, 0], "effect": [0, 0]}
    total = float(law.covariance.diagonal().sum())
    for piece in _pieces(runs):
        x = look(law, settings, counted_segments(law, settings, piece, rng), bias=torch.zeros_like(law.mean))
        refused += int(x.along.refused.sum())
        parts += x.confirming.size
        parts_refused += int(x.confirming_refused.sum())
        for τ in NOMINAL:
            fired[τ] += int((x.evidence >= thresholds(τ)).any((1, 2)).sum())
            confirmed[τ] += int((x.confirming >= z_of(τ)).sum())
        low, high = interval(x.along, confidence=CONFIDENCE)
        _count(covered["scale"], low, 0.0, high)
        _, low, high = total_variance(x.spread, x.gap)
        _count(covered["variance"], low, total, high)
        low, high = interval(x.effect, confidence=CONFIDENCE)
        _count(covered["effect"], low, x.effect_mean, high)
    out = [rate("trigger", law, "", τ, runs=runs, events=fired[τ], refused=refused / runs) for τ in NOMINAL]
    out += [
        rate("confirm", law, "", τ, runs=parts, events=confirmed[τ], refused=parts_refused / parts) for τ in NOMINAL
    ]
    return out + [_coverage(law, name, missed, given, runs) for name, (missed, given) in covered.items()]


def _count(counts: list[int], low: Floats, truth: float | Floats, high: Floats) -> None:
    """Add the intervals that miss the truth, and those that are given at all."""
    given = np.isfinite(low)
    counts[0] += int((given & ((low > truth) | (high < truth))).sum())
    counts[1] += int(given.sum())


def _coverage(law: Law, name: str, missed: int, given: int, runs: int) -> Rate:
    """Misses among the intervals that were given."""
    return rate(
        "interval misses", law, name, round(1 - CONFIDENCE, 9), runs=given, events=missed, refused=1 - given / runs
    )


def false_passes(law: Law, *, runs: int, rng: np.random.Generator, settings: Settings | None = None) -> list[Rate]:
    """Certificates given although the bias is exactly the tolerance, in four directions.

    The tolerance is the one that U = 0 certifies at 1e-4 with the true λ and tr Σ²: a tighter one is never certified.
    """
    settings = settings or Settings()
    n, top = settings.first_look, float(torch.linalg.eigvalsh(law.covariance)[-1])
    square = float((law.covariance**2).sum())
    Δ = upper_bound(0.0, 1e-4, n=n, largest=top, square=square)
    out = []
    for shape in SHAPES:
        passed, refused = dict.fromkeys(NOMINAL, 0), 0
        for piece in _pieces(runs):
            x = look(law, settings, counted_segments(law, settings, piece, rng), bias=planted(law, shape, Δ))
            gate = x.along.refused
            refused += int(gate.sum())
            a = x.along.skewness_of_mean
            for τ in NOMINAL:
                passed[τ] += sum(
                    p_value(U, Δ, n=n, largest=λ, square=s, stretch=stretch(skewness, τ)) <= τ
                    for U, λ, s, skewness, out_of in zip(x.statistic, x.largest, x.square, a, gate, strict=True)
                    if not out_of
                )
        out += [
            rate("certificate", law, shape, τ, runs=runs, events=passed[τ], refused=refused / runs) for τ in NOMINAL
        ]
    return out


def exceeding_rates(law: Law, *, runs: int, rng: np.random.Generator, settings: Settings | None = None) -> list[Rate]:
    """False alarms of both stages of mode `exceeds`, the bias being exactly the tolerance, along the gradient."""
    settings = replace(settings or Settings(), mode="exceeds")
    top = float(torch.linalg.eigvalsh(law.covariance)[-1])
    Δ = upper_bound(0.0, 1e-4, n=settings.first_look, largest=top, square=float((law.covariance**2).sum()))
    fired, confirmed, refused = dict.fromkeys(NOMINAL, 0), dict.fromkeys(NOMINAL, 0), 0
    parts, parts_refused = 0, 0
    for piece in _pieces(runs):
        segments = counted_segments(law, settings, piece, rng)
        x = look(law, settings, segments, bias=planted(law, SHAPES[0], Δ), shift=Δ)
        refused += int(x.along.refused.sum())
        parts, parts_refused = parts + x.confirming.size, parts_refused + int(x.confirming_refused.sum())
        for τ in NOMINAL:
            fired[τ] += int((x.evidence >= thresholds(τ)).any((1, 2)).sum())
            confirmed[τ] += int((x.confirming >= z_of(τ)).sum())
    out = [
        rate("trigger of exceeds", law, SHAPES[0], τ, runs=runs, events=fired[τ], refused=refused / runs)
        for τ in NOMINAL
    ]
    return out + [
        rate("confirm of exceeds", law, SHAPES[0], τ, runs=parts, events=confirmed[τ], refused=parts_refused / parts)
        for τ in NOMINAL
    ]


def other_coverage(law: Law, *, runs: int, rng: np.random.Generator) -> list[Rate]:
    """Coverage of what takes single draws: the part of E X off the gradient, none or some, and ratios of variances."""
    size = float(law.mean.norm())
    along, P = law.mean / size, len(law.mean)
    aside = torch.from_numpy(np.random.Generator(np.random.Philox(P)).standard_normal(P))
    aside -= along * (along @ aside)
    aside *= float(law.covariance.diagonal().sum()) ** 0.5 * 0.1 / aside.norm()
    counts = {"off_axis, none": [0, 0], "off_axis, some": [0, 0], "variance ratio": [0, 0]}
    weight = torch.linspace(0.5, 2.0, P, dtype=torch.float64)
    truth = float(law.covariance.diagonal().sum()) / float((law.covariance.diagonal() * weight**2).sum())
    settings = Settings(looks=1)
    for _ in range(runs):
        x = law.draws(settings.first_look, rng)
        for name, off in (("off_axis, none", 0.0 * aside), ("off_axis, some", aside)):
            judge = Judge(law.mean, settings)
            for grain in (x + off).split(GRAIN):
                judge.update(grain)
            share = float(off.norm()) / math.hypot(float(off.norm()), size)
            got = judge.verdict().off_axis
            _count(counts[name], np.array([got.low]), share, np.array([got.high]))
        centred = x - law.mean
        pairs = Pairs.of(centred.square().sum(1).numpy(), (centred * weight).square().sum(1).numpy())
        ratio = variance_ratio(pairs)
        _count(counts["variance ratio"], np.array([ratio.low]), truth, np.array([ratio.high]))
    return [_coverage(law, name, missed, given, runs) for name, (missed, given) in counts.items()]


def verdict_on(
    law: Law, rng: np.random.Generator, *, bias: Tensor | None = None, settings: Settings
) -> tuple[Status, int]:
    """A whole judge on draws of a law whose mean is μ* + bias."""
    judge = Judge(law.mean if bias is None else law.mean - bias, settings)
    while not judge.decided:
        judge.update(law.draws(GRAIN, rng))
    return judge.verdict().status, judge.draws


def power(law: Law, shape: str, ratio: float, *, runs: int, rng: np.random.Generator, settings: Settings) -> Power:
    """Draws to FAIL for a bias of `ratio` times the standard deviation along it, whatever that is of ‖μ*‖."""
    direction = planted(law, shape, 1.0)
    noise = math.sqrt(float(direction @ law.covariance @ direction))
    bias = direction * (ratio * noise)
    results = [verdict_on(law, rng, bias=bias, settings=settings) for _ in range(runs)]
    failed = [n for status, n in results if status is Status.FAIL]
    oracle = (z_of(settings.alpha) / ratio) ** 2
    size = float(bias.norm() / (law.mean - bias).norm())
    return Power(law.name, shape, size, runs, len(failed), float(np.median(failed)) if failed else math.inf, oracle)


def end_to_end(law: Law, *, runs: int, rng: np.random.Generator) -> EndToEnd:
    """Verdicts at the default error rates; the tolerance is one that some looks can certify."""
    tight = upper_bound(
        0.0,
        1e-4,
        n=4 * Settings().first_look,
        largest=float(torch.linalg.eigvalsh(law.covariance)[-1]),
        square=float((law.covariance**2).sum()),
    )
    settings = Settings(rtol=0.0, atol=tight, looks=4)
    got = [verdict_on(law, rng, settings=settings) for _ in range(runs)]
    count = {s: sum(status is s for status, _ in got) for s in Status}
    return EndToEnd(
        law.name, law.family, runs, count[Status.PASS], count[Status.FAIL], count[Status.INCONCLUSIVE],
        max(n for _, n in got),
    )  # fmt: skip


@one_thread()
def calibrate(
    over: Sequence[Law] | None = None, *, runs: int = RUNS, seed: int = 0, progress: Progress | None = None
) -> Calibration:
    """Measure all of it.

    Args:
        over: the laws; None: `laws()`.
        runs: of one look, for each law; certificates get a quarter for each direction of the bias.
        progress: called before each law.
    """
    if runs < 100:
        raise UsageError(f"runs: {runs}; fewer than 100 say nothing about a rate.")
    chosen = laws() if over is None else tuple(over)
    rates: list[Rate] = []
    powers: list[Power] = []
    verdicts: list[EndToEnd] = []
    few = max(2, runs // 1000)
    for i, law in enumerate(chosen):
        if progress is not None:
            progress(law.name, i, len(chosen))

        def rng(what: str, law: Law = law) -> np.random.Generator:
            """A stream for each law and question, so that none moves another's numbers."""
            return np.random.Generator(np.random.Philox([seed, zlib.crc32(f"{law.name} {what}".encode())]))

        rates += null_rates(law, runs=runs, rng=rng("null"))
        rates += false_passes(law, runs=max(100, runs // 4), rng=rng("planted"))
        rates += exceeding_rates(law, runs=max(100, runs // 4), rng=rng("exceeds"))
        rates += other_coverage(law, runs=max(20, runs // 100), rng=rng("single draws"))
        verdicts.append(end_to_end(law, runs=few, rng=rng("verdicts")))
        if law.family in ("light", "skewed"):
            settings = Settings(rtol=0.0, atol=1e-9, looks=7)  # too tight to be certified: only a FAIL ends it
            powers += [
                power(law, shape, ratio, runs=few, rng=rng(f"{shape} {ratio}"), settings=settings)
                for shape in SHAPES[:2]
                for ratio in (0.1, 0.05, 0.025)
            ]
    return Calibration(seed, tuple(rates), tuple(powers), tuple(verdicts))
