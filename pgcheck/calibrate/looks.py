"""What the first look says, thousands of times: both stages of a FAIL, the certificate, and a ratio of variances.

Guarantee: the counts of a law's values stand for its draws (`pgcheck.statistics.stacked`); more looks go on where fewer ended.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from pgcheck.calibrate.rates import NOMINAL, Misses, Rate, rate
from pgcheck.statistics.certificate import upper_bound
from pgcheck.statistics.finite import Law
from pgcheck.statistics.guarded import interval, z_of
from pgcheck.statistics.sequential import CONFIDENCE, Settings, total_variance
from pgcheck.statistics.stacked import Looks, certificates, drawn_counts, look
from pgcheck.statistics.variance import Pairs, variance_ratio

SHAPES = ("along the gradient", "dense", "one coordinate", "noisiest direction")
_PARTS = 4  # confirming parts of each look: twice what the settings take
_CHUNK = 250  # looks at once
_PILOT = 1_000  # looks that decide how many follow
_FEW = 6  # a direction in which hardly anything passes is measured on this part of the runs


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


def pieces(runs: int) -> Iterator[int]:
    """Sizes of the chunks that make `runs`."""
    for at in range(0, runs, _CHUNK):
        yield min(_CHUNK, runs - at)


def null_rates(law: Law, *, runs: int, rng: np.random.Generator, settings: Settings | None = None) -> list[Rate]:
    """False alarms of both stages, and coverage of the intervals that one look gives, without a bias."""
    settings = settings or Settings()
    stages = _Stages(law, "", "trigger", "confirm")
    scale, variance, effect = (Misses() for _ in range(3))
    total = float(law.covariance.diagonal().sum())
    for piece in pieces(runs):
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
    Δ = tolerance(law, settings.first_look)
    stages = _Stages(law, SHAPES[0], "trigger of exceeds", "confirm of exceeds")
    for piece in pieces(runs):
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


def tolerance(law: Law, n: int) -> float:
    """The Δ that U = 0 certifies at 1e-4 after n draws, with the true λ and tr Σ²."""
    top = float(torch.linalg.eigvalsh(law.covariance)[-1])
    return upper_bound(0.0, 1e-4, n=n, largest=top, square=float((law.covariance**2).sum()))


def false_passes(law: Law, *, runs: int, rng: np.random.Generator, settings: Settings | None = None) -> list[Rate]:
    """Certificates given although the bias is exactly the tolerance, in four directions.

    The tolerance is the one that U = 0 certifies at 1e-4: a tighter one is never certified. A direction in which less than half
    of what is allowed passes among the first looks, which are then thrown away, is measured on a sixth of the runs.
    """
    settings = settings or Settings()
    Δ = tolerance(law, settings.first_look)
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
    for piece in pieces(max(wanted.values())):
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


def ratio_misses(law: Law, *, runs: int, rng: np.random.Generator) -> Rate:
    """The interval of a ratio of variances: of X, and of X with its coordinates weighted .5 … 2."""
    d = (law.values - law.mean).numpy()
    weight = np.linspace(0.5, 2.0, d.shape[1])
    a, b = (d**2).sum(1), ((d * weight) ** 2).sum(1)
    truth, misses = float(law.probability @ a) / float(law.probability @ b), Misses()
    for piece in pieces(runs):
        for c in law.counts(Settings().first_look, piece, rng).numpy():
            got = variance_ratio(Pairs.counted(a, b, c))
            misses.add(np.array(got.low), np.array(got.high), truth)
    return misses.rate("fixed draws", law, "variance ratio")
