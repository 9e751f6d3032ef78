"""What a judge is asked, and what it says: `Settings` and `Judgement`, in which no draw is looked at.

Guarantee: settings that cannot be kept are refused before a draw is spent; a judgement is numbers only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from pgcheck.errors import UsageError
from pgcheck.statistics.panel import WITNESSES
from pgcheck.statistics.status import Status

GRAIN = 1024  # draws summed at once; every sum is a merge of these
CONFIDENCE = 0.95  # of intervals that are printed, all looks together
SHARE = 1024  # one check's share of the error budget of a run is 1/1024
LEAST_LEVEL = 1e-5  # single tests below this level were not measured

Mode = Literal["nonzero", "exceeds"]


@dataclass(frozen=True)
class Settings:
    """What one check may get wrong, and when it looks."""

    rtol: float = 0.05
    atol: float = 0.0
    alpha: float = 1e-6 / SHARE
    beta: float = 1e-3
    mode: Mode = "nonzero"  # what FAIL proves: ‖b‖ > 0, or ‖b‖ > Δ
    first: int = 4096
    looks: int = 10
    rarest: float | None = None  # the least probability of an event that must not be missed
    # lo ≤ ⟨D, v⟩ ≤ hi for every unit v, that is ‖D‖ ≤ max(−lo, hi), D = X − κ μ* (X itself if κ is open)
    bounds: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        for name in ("rtol", "atol"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise UsageError(f"{name}: {getattr(self, name)!r}; it must be a number of at least 0.")
        if self.rtol == 0 and self.atol == 0:
            raise UsageError(
                "rtol: 0; no finite sample shows that a bias is exactly 0. Give a tolerance (rtol=0.05), or take the exact"
                " engine."
            )
        for name in ("alpha", "beta"):
            if not 0 < getattr(self, name) < 0.5:
                raise UsageError(f"{name}: {getattr(self, name)!r}; an error rate is between 0 and 1/2.")
        if self.mode not in ("nonzero", "exceeds"):
            raise UsageError(f"mode: {self.mode!r}; it must be 'nonzero' or 'exceeds'.")
        if self.looks < 1:
            raise UsageError(f"looks: {self.looks!r}; there must be at least 1.")
        if self.rarest is not None and not 0 < self.rarest < 1:
            raise UsageError(f"rarest: {self.rarest!r}; it is a probability, between 0 and 1.")
        if self.bounds is not None and not (
            len(self.bounds) == 2 and all(map(math.isfinite, self.bounds)) and self.bounds[0] < 0 < self.bounds[1]
        ):
            raise UsageError(
                f"bounds: {self.bounds!r}; expected (lo, hi) with lo < 0 < hi, between which all scores lie."
            )
        least = math.ceil(20 * math.log(1 / self.alpha))
        if self.first < least:
            raise UsageError(
                f"first: {self.first} draws are too few for alpha = {self.alpha:.3g}; the least is {least}, so that an event of"
                " probability 1/20 is seen."
            )

    @property
    def stages(self) -> int:
        """Independent tests that must all reject: the trigger and the parts of the confirming draws."""
        s = 2
        while self.alpha ** (1 / s) / (len(WITNESSES) * self.looks) < LEAST_LEVEL and s < 8:
            s += 1
        return s

    @property
    def stage_level(self) -> float:
        """Level of each stage, alpha^(1/stages)."""
        return float(self.alpha ** (1 / self.stages))

    @property
    def first_look(self) -> int:
        """The draws of the first look: `first`, or what `rarest` asks for, in whole grains for each confirming part."""
        n = max(self.first, math.ceil(math.log(1 / self.alpha) / self.rarest) if self.rarest else 0)
        unit = GRAIN * (self.stages - 1)
        return -(-n // unit) * unit

    def grains_at_once(self, grain: int, most: int) -> int:
        """Of the grains from number `grain` on, how many can be taken as one, `most` or up to the next place where something is
        decided or started: directions, a look, the end of a confirming part."""
        first = self.first_look // GRAIN
        if grain >= first:
            part = first * 2 ** int(math.log2(grain // first)) // (self.stages - 1)
            stop = (grain // part + 1) * part
        else:
            learns = max(1, first // 4)
            stop = learns if grain < learns else first
        return min(most, stop - grain)

    def look_after(self, n: float, draws: int) -> int:
        """The first look at `n` draws or more that comes after `draws`."""
        look = self.first_look
        while look < n or look <= draws:
            look *= 2
        return look

    @property
    def bound(self) -> float:
        """R ≥ ‖D‖; infinite if no bounds are known."""
        return math.inf if self.bounds is None else max(-self.bounds[0], self.bounds[1])

    @property
    def most_draws(self) -> int:
        """After these no verdict is to come: a trigger at the last look, confirmed."""
        return int(self.first_look * 2**self.looks)


def confidence_after(draws: int, settings: Settings) -> float:
    """Confidence of intervals after so many draws, so that those of whichever look a run stops at miss 5% of the time."""
    look = 1 + max(0, math.ceil(math.log2(draws / settings.first_look)))
    return 1 - (1 - CONFIDENCE) / (look * (look + 1))


@dataclass(frozen=True)
class Interval:
    """A number with its bounds, NaN where the tails do not allow any."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Tails:
    """Whether the scores along μ*, and along the noisiest direction, may be trusted at this n; of the first that may not."""

    refused: bool
    skewness_of_mean: float  # a = skewness/√n; refused at .10
    largest_share: float  # of one draw in the variance; refused at .05
    pareto_k: float  # tail index; at 1/2 the variance is infinite
    effective_draws: float  # (Σ‖D‖)² / Σ‖D‖²
    constant: bool  # all scores the same to 1e-9


@dataclass(frozen=True)
class Judgement:
    """What the draws so far say. `rel`, `missed` and `effect` are in units of ‖κ μ*‖ (κ̂ μ* if κ is open), NaN if that is 0."""

    status: Status
    draws: int
    rel: float  # √max(U, 0): U is an unbiased estimate of ‖b‖²
    missed: float  # a bias of this size is missed with probability β of this look
    bias: float  # rel, in the units of X
    missed_bias: float  # missed, in the units of X
    allowed: float  # Δ, in the units of X
    scale: Interval  # ⟨E X, μ*⟩ / ‖μ*‖²
    off_axis: Interval  # of E X, the part across μ*, as a share
    variance: Interval  # tr Cov X
    witness: str | None  # that failed it, or triggered last
    effect: Interval | None  # size of the bias along the witness, from the confirming draws alone
    needed: int | None  # draws at which a verdict is to be expected; None: none in sight, or not needed
    tails: Tails
    note: str  # "nonzero": PASS though a bias below Δ is proven · "tails" · "constant" · ""
    rarest: float  # an event less likely than this may not have been seen: ln(1/α)/draws
