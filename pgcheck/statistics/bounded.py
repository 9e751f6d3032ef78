"""Verdicts that rest on a bound instead of on tails: ‖D‖ ≤ R for every draw, as where rewards and ratios are bounded.

FAIL by betting. If E y ≤ m of scores |y| ≤ R, then Π(1 + λ(y_i − m)) with 0 ≤ λ ≤ 1/(2(R + m)), set before the draws, is a
supermartingale that starts at 1; so is the mean K of such products over directions, signs and λ = 1/(2(R + m)) · 2⁻ʲ, j < 16.
By Ville's inequality P(K ever reaches 1/α) ≤ α, whatever the law, however often one looks (Waudby-Smith & Ramdas 2024). The
mixture over λ loses ln 16, and 9% of the growth where λ is off by √2. No confirmation is needed.

PASS by concentration of vectors. With probability 1 − β, L = ln(4/β), q_i = ‖D_i‖² and s² its sample variance

    v = q̄ + s √(2L/n) + 7R²L/(3(n−1))  ≥  E‖D‖²                        (Maurer & Pontil 2009, theorem 4, at β/2)
    ‖b‖  ≤  ‖D̄‖ + √(2vL/n) + 2RL/n                                     (Pinelis 1994; Smale & Zhou 2007, lemma 2, at β/2)

Guarantee: exact at every n; no diagnostic of a tail is asked. The price: n grows with tr Σ, where the certificate of
`pgcheck.statistics.certificate` needs tr Σ/√r_eff.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import scipy

from pgcheck.statistics.guarded import Floats, Scores

BETS = 16  # values of λ, each half of the one before


@dataclass(frozen=True)
class Wealth:
    """Logarithms of what each bet has become, `[bets, kinds]`."""

    log: Floats

    @staticmethod
    def none(kinds: int) -> Wealth:
        """Before the first draw: 1 each."""
        return Wealth(np.zeros((BETS, kinds)))

    def after(self, y: Floats, m: Floats, bound: float) -> Wealth:
        """After scores `[n, kinds]` of at most `bound`, bet to have a mean above m `[kinds]` ≥ 0."""
        most = 0.5 / (bound + m)
        gain = y - m
        return Wealth(
            self.log + np.stack([np.log1p(most * 2.0**-j * gain).sum(0) for j in range(BETS)]),
        )

    def total(self, kinds: slice | list[int]) -> float:
        """Log of the mean wealth over bets and these kinds: ln 1/α is reached with probability α if no mean is above m."""
        chosen = self.log[:, kinds]
        return float(scipy.special.logsumexp(chosen) - math.log(chosen.size))

    @property
    def of_kind(self) -> Floats:
        """Log of the mean wealth of each kind, `[kinds]`."""
        return np.asarray(scipy.special.logsumexp(self.log, axis=0) - math.log(BETS))


def mean_above(q: Scores, bound: float, level: float) -> Floats:
    """What E q exceeds with probability `level` at most, of 0 ≤ q ≤ bound."""
    L = math.log(2 / level)
    return q.mean + np.sqrt(2 * q.m2 / (q.n - 1) * L / q.n) + 7 * bound * L / (3 * (q.n - 1))


def bounded_interval(y: Scores, bound: float, *, confidence: float) -> tuple[Floats, Floats]:
    """Of the mean of |y| ≤ bound: wrong at most 1 − confidence of the time, at any n."""
    shifted, level = y.plus(bound), (1 - confidence) / 2  # in [0, 2·bound]
    high = mean_above(shifted, 2 * bound, level) - bound
    low = bound - mean_above(shifted.times(-1.0).plus(2 * bound), 2 * bound, level)
    return np.maximum(low, -bound), np.minimum(high, bound)


def bounded_bias(size: float, q: Scores, bound: float, β: float) -> float:
    """What ‖b‖ exceeds with probability β at most: `size` = ‖D̄‖, `q` one kind of score, ‖D‖²."""
    L = math.log(4 / β)
    v = float(mean_above(q, bound**2, β / 2)[0])
    return size + math.sqrt(2 * v * L / q.n) + 2 * bound * L / q.n
