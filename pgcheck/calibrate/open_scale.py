"""The same where κ is open and the reference drawn as well (`pgcheck.statistics.open_scale`)."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np

from pgcheck.calibrate.rates import NOMINAL, Rate, rate
from pgcheck.statistics.finite import Law
from pgcheck.statistics.guarded import z_of
from pgcheck.statistics.open_scale import ON_SCALE, scales_left, unexplained
from pgcheck.statistics.sequential import Settings
from pgcheck.statistics.variance import Pairs

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
