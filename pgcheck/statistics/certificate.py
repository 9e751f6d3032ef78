"""The equivalence certificate: how large a bias the statistic U could have missed.

    U = (‖ΣD‖² − Σ‖D‖²) / (n(n−1)),  E U = ‖b‖²

If ‖b‖ = Δ along the noisiest direction, U is distributed as (Δ + A Z)² − A² + B Z′, with A² = λ/n and B² = 2(tr Σ² − λ²)/n²,
where λ is the largest eigenvalue of Σ = Cov D. So

    p(U; Δ) = P((Δ + A Z)² − A² + B Z′ ≤ U)

is the probability of a U so small under a bias of Δ; it falls with Δ, and the Δ with p = β is an upper bound on ‖b‖ that is
wrong with probability β.

λ and the bias are estimated from the same draws, so a skewed direction makes the lower tail of U heavier: A is stretched by
1 + |a| (2z² + 1)/(6z), z = z(β), what the skewness a of a mean does to the quantile of its t (without it, a reward paid once
in a hundred passed at 2.4 times β = 1e-3).

Guarantee: calibrated, not conservative; λ is biased upwards on purpose and tr Σ² carries two standard errors. A U below 0
is taken as 0, which only raises p.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy import special
from torch import Tensor

from pgcheck.statistics.guarded import z_of

GRAM = 256  # draws of one Gram block
_Z = np.linspace(-9, 9, 721)
_WEIGHT = np.exp(-(_Z**2) / 2) / np.exp(-(_Z**2) / 2).sum()


@dataclass(frozen=True)
class Spectrum:
    """What U's law needs of Σ, from Gram blocks of 256 draws; sums, so that it merges."""

    blocks: int = 0
    top: float = 0.0  # Σ of the largest eigenvalue of DᵀD/256
    square: float = 0.0  # Σ of mean_{i≠j} ⟨D_i, D_j⟩²
    square2: float = 0.0  # Σ of its square

    def add(self, d: Tensor) -> Spectrum:
        """With one more block `[256, P]`."""
        top, square = of_block(d)
        return Spectrum(self.blocks + 1, self.top + top, self.square + square, self.square2 + square**2)

    @property
    def trace_of_square(self) -> float:
        """Tr Σ² with two standard errors on top."""
        mean = self.square / self.blocks
        spread = max(self.square2 / self.blocks - mean**2, 0.0)
        return mean + 2 * math.sqrt(spread / max(self.blocks - 1, 1))

    @property
    def largest(self) -> float:
        """Λ = min(mean top eigenvalue of the blocks, √tr Σ²)."""
        return min(self.top / self.blocks, math.sqrt(self.trace_of_square))


def of_block(d: Tensor) -> tuple[float, float]:
    """The largest eigenvalue of Σ_i D_i D_iᵀ / m, and the mean of ⟨D_i, D_j⟩² over i ≠ j, of draws `[m, P]`.

    DᵀD and DDᵀ have the same eigenvalues; the smaller is made.
    """
    m = len(d)
    gram = d.T @ d if d.shape[1] < m else d @ d.T
    off = float((gram * gram).sum()) - float((d * d).sum(1).square().sum())
    return float(torch.linalg.eigvalsh(gram)[-1]) / m, max(off, 0.0) / (m * (m - 1))


def stretch(skewness_of_mean: float, level: float) -> float:
    """The factor on A for scores of this skewness: t's quantile is z + a(2z² + 1)/6 to second order."""
    z = z_of(level)
    return 1 + abs(skewness_of_mean) * (2 * z**2 + 1) / (6 * z)


def p_value(U: float, Δ: float, *, n: int, largest: float, square: float, stretch: float = 1.0) -> float:
    """The probability p(U; Δ) of a statistic at most max(U, 0) under a bias of size Δ in the noisiest direction."""
    U = max(U, 0.0)
    A = math.sqrt(largest / n) * stretch
    B = math.sqrt(max(2 * (square - largest**2), 0.0)) / n
    if A == 0 and B == 0:
        return float(Δ**2 <= U)
    # integrate over the one of Z, Z′ that matters less, so that what is left inside is smooth
    if 2 * Δ * A < B:
        inner = special.ndtr((U - (Δ + A * _Z) ** 2 + A**2) / B)
    else:
        root = np.sqrt(np.maximum(U + A**2 - B * _Z, 0.0))
        inner = special.ndtr((root - Δ) / A) - special.ndtr((-root - Δ) / A)
    return float((_WEIGHT * inner).sum())


def upper_bound(U: float, β: float, *, n: int, largest: float, square: float, stretch: float = 1.0) -> float:
    """The Δ with p(U; Δ) = β; 0 where even no bias at all makes so small a U less likely than β."""

    def excess(Δ: float) -> float:
        return p_value(U, Δ, n=n, largest=largest, square=square, stretch=stretch) - β

    if excess(0.0) <= 0:
        return 0.0
    high = math.sqrt(max(U, 0.0)) + math.sqrt(largest / n) + (2 * square) ** 0.25 / math.sqrt(n)
    if high == 0:
        return 0.0
    while excess(high) > 0:
        high *= 2
    from scipy import optimize  # takes as long to import as half of torch, and exact verdicts never ask for it

    return float(optimize.brentq(excess, 0.0, high, xtol=1e-12 * high, rtol=1e-10))


def draws_to_certify(Δ: float, β: float, *, largest: float, square: float, U: float = 0.0) -> float:
    """The n at which a statistic of U certifies Δ at level β; infinite if ‖b‖² = U is not below Δ²."""
    if Δ**2 <= U:
        return math.inf
    low, high = 2.0, 4.0

    def fails(n: float) -> bool:
        return p_value(U, Δ, n=n, largest=largest, square=square) > β  # type: ignore[arg-type]

    while fails(high):
        low, high = high, high * 2
        if high > 1e18:
            return math.inf
    while high > low * 1.001:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if fails(middle) else (low, middle)
    return math.ceil(high)
