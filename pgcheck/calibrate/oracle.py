"""The test that knows everything beforehand but whether there is a bias: how many draws it takes.

It knows the direction of the bias and the law of the scores along it, so that its critical value is that of its level α to a
tail of 1e-9, and not a normal one: of 3 602 scores of which one in a hundred is paid, the normal one is exceeded 140 times as
often as α = 9.8e-10 says. Of a light law both are the same number.

    P(ȳ ≥ b) ≈ 1 − Φ(r + ln(u/r)/r),   r = √(2n (sb − K(s))),   u = s √(n K″(s)),   K′(s) = b

with the cumulants K of a score (Barndorff-Nielsen 1986, of Lugannani & Rice 1980).

Guarantee: exact for a normal law; else the tail is off by a factor of 1 + O(1/n), and on a lattice n by one of its steps.
"""

from __future__ import annotations

import math

import numpy as np
from scipy import optimize, special

from pgcheck.statistics.guarded import Floats

_MOST = 1e15  # draws


def oracle_draws(scores: Floats, probability: Floats, *, bias: float, alpha: float) -> float:
    """The n at which a mean of `bias` > 0 is just what a test at `alpha` of “the mean is 0” asks for: it is found half of the
    time.

    Of scores `[N]` of mean 0, with their probabilities. n ≥ 1 is not rounded; inf if no draw is as large as the bias.
    """
    if bias >= scores.max():
        return math.inf
    s = _tilt(scores, probability, bias)
    tilted = _tilted(scores, probability, s)
    rate = s * bias - float(special.logsumexp(s * scores, b=probability))
    spread = s * math.sqrt(float(tilted @ (scores - bias) ** 2))

    def log_tail(n: float) -> float:
        r, u = math.sqrt(2 * n * rate), spread * math.sqrt(n)
        return float(special.log_ndtr(-(r + math.log(u / r) / r)))

    if log_tail(1.0) <= math.log(alpha):
        return 1.0
    return float(optimize.brentq(lambda n: log_tail(n) - math.log(alpha), 1.0, _MOST, xtol=1e-6, rtol=1e-12))


def _tilted(scores: Floats, probability: Floats, s: float) -> Floats:
    """The law of weight e^(s y), `[N]`."""
    return np.asarray(special.softmax(s * scores + np.log(probability)))


def _tilt(scores: Floats, probability: Floats, bias: float) -> float:
    """The s whose tilted law has `bias` as its mean."""

    def short(s: float) -> float:
        return float(_tilted(scores, probability, s) @ scores) - bias

    high = 1 / math.sqrt(float(probability @ scores**2))
    while short(high) < 0:
        high *= 2
    return float(optimize.brentq(short, 0.0, high, xtol=1e-300, rtol=1e-14))
