"""Two independent samples: the guarded t of a difference of their means.

Of scores a (n_a of them) and b (n_b), with v_a = Σ(a−ā)²/(n_a(n_a−1)) and κ_a = Σ(a−ā)³/n_a³, likewise b:

    T = (ā − f b̄)/√(v_a + f²v_b)        skewness of ā − f b̄:  (κ_a − f³κ_b)/(v_a + f²v_b)^1.5, with n for n−1 in v
    degrees of freedom (Welch 1947):  (v_a + f²v_b)² / (v_a²/(n_a−1) + f⁴v_b²/(n_b−1))

which are those of one sample with Welch's degrees of freedom: `difference` returns its moments, and everything of
`pgcheck.statistics.guarded` holds for them. “The mean has grown by more than 5%” is shown at level α if
`z_scores(difference(new, old, factor=1.05))` reaches z(α).

Guarantee: with f = 0, or a b without noise, it is the one-sample test. What n_b → ∞ leaves is the test against a known mean.
"""

from __future__ import annotations

import numpy as np

from pgcheck.errors import UsageError
from pgcheck.statistics.guarded import Scores


def difference(a: Scores, b: Scores, *, factor: float = 1.0) -> Scores:
    """Moments of one sample whose mean, error, skewness and largest share are those of ā − factor · b̄.

    Its `n` is one more than Welch's degrees of freedom, rounded down (the least of all kinds of score).

    Raises:
        UsageError: fewer than two scores on a side.
    """
    if min(a.n, b.n) < 2:
        raise UsageError(f"scores: {a.n} and {b.n}; a difference takes at least two on each side.")
    b = b.times(factor)
    va, vb = a.error**2, b.error**2
    v = va + vb
    with np.errstate(divide="ignore", invalid="ignore"):
        freedom = np.where(v > 0, v**2 / (va**2 / (a.n - 1) + vb**2 / (b.n - 1)), np.inf)
    n = int(max(min(np.floor(freedom + 1e-6).min(), a.n + b.n - 2), 1)) + 1
    m2, biased = v * n * (n - 1), a.m2 / a.n**2 + b.m2 / b.n**2
    with np.errstate(divide="ignore", invalid="ignore"):
        skewness = np.where(v > 0, (a.m3 / a.n**3 - b.m3 / b.n**3) / biased**1.5, 0.0)
        share = np.where(v > 0, np.maximum(a.largest_share * va, b.largest_share * vb) / v, 0.0)
    mean, far = a.mean - b.mean, np.sqrt(share * m2)
    return Scores(n, mean, m2, skewness * m2**1.5, mean - far, mean + far)
