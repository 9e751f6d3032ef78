"""Rates with their bounds, and everything that a calibration says, as data.

Guarantee: a rate carries Clopper–Pearson bounds (99%), and what is measured anew takes the place of what was there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from scipy import special

from pgcheck.errors import UsageError
from pgcheck.statistics.finite import Law
from pgcheck.statistics.guarded import Floats
from pgcheck.statistics.sequential import CONFIDENCE

NOMINAL = (0.1, 0.01, 0.001)
BOUND = 0.99  # of the Clopper–Pearson bounds, each side at half the rest
ALLOWED = 1.3  # an upper bound below this times nominal is what the calibration must reach
MISS = round(1 - CONFIDENCE, 9)


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
    family: str
    detail: str
    size: float  # ‖b‖/‖μ*‖
    runs: int
    failed: int
    median_draws: float | None  # None: at least half of the runs end without a FAIL
    oracle_draws: float  # of a normal law, (z_α σ/‖b‖)²
    exact_draws: float  # of the law itself, where the test is at α (`pgcheck.calibrate.oracle`)

    @property
    def ratio(self) -> float:
        """Median draws over those of the oracle; inf where there is no median."""
        return self._over(self.oracle_draws)

    @property
    def exact_ratio(self) -> float:
        """The same over those of the test that is at α."""
        return self._over(self.exact_draws)

    def _over(self, draws: float) -> float:
        return math.inf if self.median_draws is None else self.median_draws / draws


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


class Misses:
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
        return rate(f"misses, {what}", law, name, MISS, runs=self.given, events=self.missed, refused=refused)
