"""The same where κ is open and the reference drawn as well (`pgcheck.statistics.open_scale`).

Every draw has an x and an r beside it, E r = g and, without a bias, E x = ½ g. Both noises are the law's: that of x is .8 of
that of r and .6 of another draw. The first look of an `OpenJudge` is made once more from all its draws at once (`first_look`);
directions, places of κ, z-scores, thresholds and the certificate are its own functions.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from pgcheck.calibrate.looks import SHAPES, planted, tolerance
from pgcheck.calibrate.rates import NOMINAL, Rate, rate
from pgcheck.statistics.certificate import GRAM, Spectrum, p_value, stretch
from pgcheck.statistics.finite import Law
from pgcheck.statistics.guarded import Floats, Scores, z_of
from pgcheck.statistics.open_scale import ON_SCALE, scales_left, turned_round, unexplained
from pgcheck.statistics.panel import WITNESSES, directions, loud_directions, thresholds
from pgcheck.statistics.sequential import GRAIN, Settings
from pgcheck.statistics.variance import Pairs

_OPEN = 0.5  # κ
_SHARED = 0.8  # correlation of the noise of x and of r
_LENGTHS = (8, 30)  # ‖g‖ in standard errors of ⟨r̄, g⟩/‖g‖
_RTOLS = (Settings().rtol, 0.5)  # δ


def open_rates(law: Law, *, runs: int, rng: np.random.Generator) -> list[Rate]:
    """False alarms of a confirming part.

    û is 45° off g, and so is the witness, across û: it sees as much of g as û does, so that an error in κ looks like a bias.
    Refused: κ is not bounded.
    """
    if len(law.mean) == 1:
        return []
    n = Settings().first_look // (Settings().stages - 1)
    g = law.mean.numpy() / float(law.mean.norm())
    turned = _across(g, rng)
    û, v = (g + turned) / math.sqrt(2), (g - turned) / math.sqrt(2)
    noise = (law.values - law.mean).numpy()
    out = []
    for length in _LENGTHS:
        events, refused = Counter[float](), 0
        for _ in range(runs):
            i, j = rng.choice(len(noise), (2, n), p=law.probability)
            along, across = (
                Pairs.counted(
                    _OPEN * (length * _error(law, n) * (g @ w) + _SHARED * e[i] + math.sqrt(1 - _SHARED**2) * e[j]),
                    length * _error(law, n) * (g @ w) + e[i],
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


def _across(g: Floats, rng: np.random.Generator) -> Floats:
    """A unit vector across g, any."""
    turned = rng.standard_normal(len(g))
    turned -= g * (turned @ g)
    return np.asarray(turned / np.linalg.norm(turned))


def _error(law: Law, n: int) -> float:
    """Of ⟨r̄, g⟩/‖g‖ after n draws."""
    g = law.mean / law.mean.norm()
    return math.sqrt(float(g @ law.covariance @ g) / n)


@dataclass(frozen=True)
class FirstLook:
    """What the first look of an `OpenJudge` reads."""

    seen: tuple[Floats, Floats]  # of x and of r along û and each witness that is learned, [4096, 6]
    statistic: float  # U of the draws since κ₀ was fixed, as of the certificate
    spectrum: Spectrum
    scores: Scores  # ⟨x − κ₀ r, ·⟩ along û, and along the noisiest direction
    scale: float  # κ₀

    @cached_property
    def along(self) -> Pairs:
        """(⟨x, û⟩, ⟨r, û⟩) of all draws."""
        return Pairs.of(*(y[:, 0] for y in self.seen))

    @cached_property
    def witnessed(self) -> list[Pairs]:
        """The same of the witnesses that are learned, since they were."""
        return [Pairs.of(*(y[GRAIN:, w] for y in self.seen)) for w in range(1, len(WITNESSES))]

    def evidence(self, level: float) -> Floats:
        """The z-score of each witness, `[6]`, with what a test at `level` spends on κ."""
        places = scales_left(self.along, ON_SCALE * level)
        of_learned = (unexplained(pairs, places, (0.0, 0.0)) for pairs in self.witnessed)
        two_sided, *signed = of_learned
        return np.array([turned_round(self.along), max(two_sided), *(up for up, _ in signed)])

    def triggers(self, level: float) -> bool:
        """Whether a witness reaches its threshold."""
        return bool((self.evidence(level) >= thresholds((1 - ON_SCALE) * level)).any())

    @property
    def refused(self) -> bool:
        """Whether the tails allow no certificate."""
        return bool(self.scores.refused.any())

    def passes(self, Δ: float, level: float) -> bool:
        """Whether ‖E x − κ₀ g‖ ≥ Δ is excluded; never where the guard refuses."""
        if self.refused:
            return False
        a = float(np.abs(self.scores.skewness_of_mean).max())
        largest = self.spectrum.at_least(self.scores.m2[1] / self.scores.n)
        law = {"largest": largest, "square": self.spectrum.trace_of_square}
        factor = stretch(a, level, self.spectrum.error)
        return bool(p_value(self.statistic, Δ, n=self.scores.n, stretch=factor, **law) <= level)


def first_look(x: Tensor, r: Tensor, û: Tensor) -> FirstLook:
    """Of draws `[4096, P]` and what is beside each; κ₀ and the directions from the first 1,024."""
    known = slice(0, GRAIN)
    κ = abs(float((x[known] @ û).sum() / (r[known] @ û).sum()))
    loud = loud_directions((x[known] - κ * r[known])[:GRAM])
    d = x[known] - κ * r[known]
    v = directions(d.sum(0), (d * d).sum(0), GRAIN, along=û, loud=loud, aside=True)[:, 1 : len(WITNESSES)]
    a, b = ((y @ torch.cat([û.unsqueeze(1), v], 1)).numpy() for y in (x, r))
    d = x[GRAIN:] - κ * r[GRAIN:]
    n, norms2 = len(d), (d * d).sum(1)
    spectrum = Spectrum()
    for block in d.split(GRAIN):
        spectrum = spectrum.add(block[:GRAM])
    loudest = loud_directions(d[:GRAM])
    noisiest = loudest.directions[:, -1] if loudest.kept.numel() else û
    return FirstLook(
        (a, b),
        float((d.sum(0).square().sum() - norms2.sum()) / (n * (n - 1))),
        spectrum,
        Scores.of(torch.stack([d @ û, d @ noisiest], 1).numpy()),
        κ,
    )


def open_triggers(law: Law, *, runs: int, rng: np.random.Generator) -> list[Rate]:
    """False alarms of the first stage, û 45° off g."""
    if len(law.mean) == 1:
        return []
    g, out = (law.mean / law.mean.norm()).numpy(), []
    û = torch.from_numpy((g + _across(g, rng)) / math.sqrt(2))
    for length in _LENGTHS:
        events, refused = Counter[float](), 0
        draw = _drawing(
            law, torch.from_numpy(g) * length * _error(law, Settings().first_look), torch.zeros(len(g)), rng
        )
        for _ in range(runs):
            look = first_look(*draw(), û)
            refused += scales_left(look.along, ON_SCALE * NOMINAL[0]) is None
            for τ in NOMINAL:
                if not look.triggers(τ):
                    break  # a lower level leaves more of κ, and asks for more
                events[τ] += 1
        detail = f"‖g‖ {length} standard errors"
        out += [
            rate("trigger of open κ", law, detail, τ, runs=runs, events=events[τ], refused=refused / runs)
            for τ in NOMINAL
        ]
    return out


def open_passes(law: Law, *, runs: int, rng: np.random.Generator, rtols: Sequence[float] = _RTOLS) -> list[Rate]:
    """Certificates although E x is exactly δ times as long across g as along it, δ of `rtols`; in three directions, and for a
    large δ in the noisiest.

    û leans towards the bias just so that κ₀ g comes as near to E x as it may be. ‖g‖ is such that U = 0 certifies δ at 1e-4.
    """
    if len(law.mean) == 1:
        return []
    g, out, n = law.mean / law.mean.norm(), [], Settings().first_look - GRAIN
    for δ in rtols:
        noise = math.hypot(_SHARED * _OPEN - _OPEN * (1 + δ**2), _OPEN * math.sqrt(1 - _SHARED**2))
        # κ₀ = κ (1 + δ²), and the tolerance κ₀ ‖g‖ δ/√(1 + δ²)
        length = noise * tolerance(law, n) / (_OPEN * δ * math.hypot(1.0, δ))
        for shape in SHAPES[1:] if δ < 0.2 else SHAPES[-1:]:
            u = planted(law, shape, 1.0)
            u = u - g * (u @ g)
            u = u / u.norm()
            û = (g + δ * u) / math.hypot(1.0, δ)
            draw = _drawing(law, g * length, _OPEN * δ * length * u, rng)
            events, refused = Counter[float](), 0
            for _ in range(runs):
                look = first_look(*draw(), û)
                refused += look.refused
                Δ = look.scale * length * δ / math.hypot(1.0, δ)
                for τ in NOMINAL:
                    events[τ] += look.passes(Δ, τ)
            detail = f"{shape}, δ = {δ:g}"
            out += [
                rate("certificate of open κ", law, detail, τ, runs=runs, events=events[τ], refused=refused / runs)
                for τ in NOMINAL
            ]
    return out


def _drawing(law: Law, g: Tensor, bias: Tensor, rng: np.random.Generator) -> Callable[[], tuple[Tensor, Tensor]]:
    """Draws of x and r for one first look, E r = g and E x = κ g + bias."""
    noise, upto = law.values - law.mean, np.cumsum(law.probability)[:-1]

    def draw() -> tuple[Tensor, Tensor]:
        i, j = (
            torch.from_numpy(np.searchsorted(upto, rng.random(Settings().first_look), side="right")) for _ in range(2)
        )
        e = noise[i]
        x = _OPEN * (_SHARED * e + math.sqrt(1 - _SHARED**2) * noise[j]) + (_OPEN * g + bias)
        return x, g + e

    return draw
