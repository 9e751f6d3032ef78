"""Whether two samples of draws can be of one law: a test that holds for every law, every n and every level.

If nothing changed, the n₁ + n₂ = N draws of both are exchangeable: given their values, those of the first sample are drawn
without replacement from all N. A mean of such draws is no wilder than one drawn with replacement (Hoeffding 1963, theorem
4), so that Bernstein's inequality bounds its tail, with the mean m̄, the variance σ² and the largest deviation b of the pool:

    P(|m₁ − m̄| ≥ t) ≤ 2 exp(−n₁ t² / (2σ² + ⅔ b t))        m₁ − m̄ = (m₁ − m₂) n₂/N

Heavy tails make b large and the test blind; they never make it wrong. The price is √2 in the difference that is seen.

A sample is looked at through numbers of one draw: its scale along ∇J, its squared error, and its place along eight fixed
directions. Of each, (n, mean, error, least, largest) is all that the test needs.

Guarantee: no asymptotics. Draws that went on until a verdict have one of `STOPS` lengths; at each pair of lengths the bound
holds for the first n₁ and the first n₂ draws, so a level is divided by the number of pairs.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np

from pgcheck.statistics.guarded import Floats, Scores

DIRECTIONS = 8
STOPS = 12  # ten looks, a last confirmation, and the end of the draws
ALPHA = 1e-6  # chance that some test of a whole comparison rejects where nothing changed


@functools.lru_cache(maxsize=8)
def fixed_directions(size: int) -> Floats:
    """The same directions everywhere, `[DIRECTIONS, size]`, scaled so that ‖v·x‖² is ‖x‖² on average over directions.

    `RandomState` gives the same numbers with every numpy (NEP 19).
    """
    bound = math.sqrt(3.0 / DIRECTIONS)
    return np.random.RandomState(1992).uniform(-bound, bound, (DIRECTIONS, size))


@dataclass(frozen=True)
class Score:
    """One number of a draw, over n draws."""

    mean: float
    error: float  # the standard error of the mean
    low: float  # the least of the n
    high: float  # the largest


def scores_of(scores: Scores) -> list[Score]:
    """Each kind of score by itself."""
    columns = (scores.mean, scores.error, scores.low, scores.high)
    return [Score(*row) for row in zip(*(x.tolist() for x in columns), strict=True)]


def p_value(a: Score, b: Score, n_a: int, n_b: int, *, nested: bool = False) -> float:
    """A bound on the probability of means so far apart if both samples are of one law.

    Args:
        nested: the smaller sample is the beginning of the larger one.
    """
    if n_a > n_b:
        a, b, n_a, n_b = b, a, n_b, n_a
    ss_a, ss_b = (s.error**2 * n * (n - 1) for s, n in ((a, n_a), (b, n_b)))
    gap = b.mean - a.mean
    if nested:
        t, middle, variance, low, high = abs(gap), b.mean, ss_b / n_b, b.low, b.high
    else:
        N = n_a + n_b
        t, middle = abs(gap) * n_b / N, a.mean + gap * n_b / N
        variance = (ss_a + ss_b + gap**2 * n_a * n_b / N) / N
        low, high = min(a.low, b.low), max(a.high, b.high)
    room = 2 * variance + 2 / 3 * max(high - middle, middle - low) * t
    if t == 0 or room == 0:
        return 1.0
    return min(1.0, 2 * math.exp(-n_a * t**2 / room))


def level_of(tests: int) -> float:
    """What each of `tests` may spend of `ALPHA`."""
    return ALPHA / (max(tests, 1) * STOPS**2)
