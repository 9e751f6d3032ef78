"""The equivalence certificate: how large a bias the statistic U could have missed.

    U = (‖ΣD‖² − Σ‖D‖²) / (n(n−1)),  E U = ‖b‖²

If ‖b‖ = Δ along the noisiest direction, U is distributed as (Δ + A Z)² − A² + B Z′, with A² = λ/n and B² = 2(tr Σ² − λ²)/n²,
where λ is the largest eigenvalue of Σ = Cov D. So

    p(U; Δ) = P((Δ + A Z)² − A² + B Z′ ≤ U)

is the probability of a U so small under a bias of Δ; it falls with Δ, and the Δ with p = β is an upper bound on ‖b‖ that is
wrong with probability β.

λ and the bias are estimated from the same draws, so a skewed direction makes the lower tail of U heavier, and an error of λ
makes it heavier still. A is stretched by what both do to the quantile of a t, z = z(β), with a the skewness of a mean (the
larger of those along μ* and along the noisiest direction) and ε the relative error of λ:

    (1 + |a| (2z² + 1)/(6z)) · (1 + ε² (z² + 1)/8)

Without the first, a reward paid once in a hundred passed at 2.4 times β = 1e-3; with a only along μ* and without the second,
importance weights at 1.7 times.

Guarantee: calibrated, not conservative; λ is biased upwards on purpose and tr Σ² carries two standard errors. A U below 0
is taken as 0, which only raises p.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy
import torch
from torch import Tensor

from pgcheck.statistics.eigenvalues import largest_eigenvalues
from pgcheck.statistics.guarded import Floats, z_of

Numbers = float | Floats

GRAM = 256  # draws of one Gram block
_BLOCKS = 32  # of each doubling of n
_MOST_POWER = 59  # of 2, of draws
_Z = np.linspace(-9, 9, 721)
_WEIGHT = np.exp(-(_Z**2) / 2) / np.exp(-(_Z**2) / 2).sum()


@dataclass(frozen=True)
class Spectrum:
    """What U's law needs of Σ, from Gram blocks of 256 draws; sums (or `[R]` of R runs), so that it merges."""

    blocks: int = 0
    top: Numbers = 0.0  # Σ of the largest eigenvalue of DᵀD/256
    square: Numbers = 0.0  # Σ of mean_{i≠j} ⟨D_i, D_j⟩²
    square2: Numbers = 0.0  # Σ of its square

    def add(self, d: Tensor) -> Spectrum:
        """With one more block `[256, P]`, or several `[m, 256, P]`."""
        return self.with_blocks(*of_blocks(d.reshape(-1, *d.shape[-2:])))

    def with_blocks(self, tops: list[float], squares: list[float]) -> Spectrum:
        """With more blocks, of which this is known."""
        found = self
        for top, square in zip(tops, squares, strict=True):
            found = found.with_block(top, square)
        return found

    def with_block(self, top: Numbers, square: Numbers) -> Spectrum:
        """With one more block, of which this is known."""
        return Spectrum(self.blocks + 1, self.top + top, self.square + square, self.square2 + square**2)

    @property
    def trace_of_square(self) -> Any:
        """Tr Σ² with two standard errors on top."""
        return self.square / self.blocks + 2 * self._error_of_square

    @property
    def _error_of_square(self) -> Any:
        spread = self.square2 / self.blocks - (self.square / self.blocks) ** 2
        return np.sqrt(np.maximum(spread, 0.0) / max(self.blocks - 1, 1))

    @property
    def error(self) -> Any:
        """Relative error of λ: half of that of tr Σ², which is λ² where the error of λ matters."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(self.square > 0, self._error_of_square / (2 * self.square / self.blocks), 0.0)

    @property
    def largest(self) -> Any:
        """The λ = min(mean top eigenvalue of the blocks, √tr Σ²)."""
        return self.at_least(0.0)

    def at_least(self, variance: Numbers) -> Any:
        """The λ where the variance along some direction is known as well, from more draws."""
        return np.minimum(np.maximum(self.top / self.blocks, variance), np.sqrt(self.trace_of_square))


Blocks = tuple[list[float], list[float]]  # the largest eigenvalue of each, and the mean square of its products


def gram_blocks(x: Tensor, first: int, size: int) -> Tensor:
    """The first 256 draws `[m, 256, P]` of some of the grains of `size` draws in `x` `[k · size, P]`: about 32 in each doubling
    of n; they are grains number `first` and on."""
    taken = [
        i for i in range(len(x) // size) if (first + i) % max(1, 2 ** ((first + i).bit_length() - 1) // _BLOCKS) == 0
    ]
    parts = x.unflatten(0, (-1, size))[:, :GRAM]
    return parts if len(taken) == len(parts) else parts[taken]


def of_blocks(d: Tensor) -> Blocks:
    """The largest eigenvalue of Σ_i D_i D_iᵀ / m, and the mean of ⟨D_i, D_j⟩² over i ≠ j, of draws `[..., m, P]`, one of each
    block.

    DᵀD and DDᵀ have the same eigenvalues; the smaller is made.
    """
    return _of_grams(_grams(d), torch.linalg.vector_norm(d, dim=-1).square())


def of_block(d: Tensor) -> tuple[float, float]:
    """That of one block `[m, P]`."""
    (top,), (square,) = of_blocks(d.unsqueeze(0))
    return top, square


def of_blocks_and_across(d: Tensor, along: Tensor) -> tuple[Blocks, Blocks]:
    """That of D, and that of D − ⟨D, a⟩ a for a unit vector a = `along` `[P]`."""
    par = d @ along
    if (
        d.shape[-1] < d.shape[-2]
    ):  # of few coordinates, which D may fill with one direction: what is left is made by itself
        both = torch.cat([d, d - par.unsqueeze(-1) * along])
        found = of_blocks(both)
    else:
        grams, norms2 = _grams(d), torch.linalg.vector_norm(d, dim=-1).square()
        across = grams - par.unsqueeze(-1) * par.unsqueeze(-2)
        found = _of_grams(torch.cat([grams, across]), torch.cat([norms2, norms2 - par.square()]))
    tops, squares = found
    m = len(d)
    return (tops[:m], squares[:m]), (tops[m:], squares[m:])


def _grams(d: Tensor) -> Tensor:
    return d.mT @ d if d.shape[-1] < d.shape[-2] else d @ d.mT


def _of_grams(grams: Tensor, norms2: Tensor) -> Blocks:
    m = norms2.shape[-1]
    off = (grams.square().sum((-1, -2)) - norms2.square().sum(-1)).clamp(min=0.0) / (m * (m - 1))
    return (largest_eigenvalues(grams) / m).tolist(), off.tolist()


def stretch(skewness_of_mean: Numbers, level: float, error: Numbers = 0.0) -> Any:
    """The factor on A for scores of this skewness, λ having this relative error: t's quantile is z + a(2z² + 1)/6 to second
    order, and z(1 + (z² + 1)/4ν) with ν = 2/ε² degrees of freedom."""
    z = z_of(level)
    return (1 + np.abs(skewness_of_mean) * (2 * z**2 + 1) / (6 * z)) * (1 + np.square(error) * (z**2 + 1) / 8)


def p_value(
    U: Numbers, Δ: float, *, n: float, largest: Numbers, square: Numbers, stretch: Numbers = 1.0
) -> Any:  # of numbers a number, of arrays `[R]` an array
    """The probability p(U; Δ) of a statistic at most max(U, 0) under a bias of size Δ in the noisiest direction."""
    if not any(not isinstance(x, float) and np.ndim(x) for x in (U, largest, square, stretch)):
        U, A = max(float(U), 0.0), math.sqrt(largest / n) * float(stretch)
        B = math.sqrt(max(2 * (float(square) - float(largest) ** 2), 0.0)) / n
        law = _over_par if 2 * Δ * A < B else _without_noise if A <= 0 else _over_rest
        return float(law(np.asarray(U), Δ, np.asarray(A), np.asarray(B)) @ _WEIGHT)
    rows = np.broadcast_arrays(*(np.atleast_1d(np.asarray(x, dtype=float)) for x in (U, largest, square, stretch)))
    U_, top, square_, factor = (x[:, None] for x in rows)
    U_ = np.maximum(U_, 0.0)
    A = np.sqrt(top / n) * factor
    B = np.sqrt(np.maximum(2 * (square_ - top**2), 0.0)) / n
    # integrate over the one of Z, Z′ that matters less, so that what is left inside is smooth
    inside = (2 * Δ * A < B)[:, 0]
    flat = (A <= 0)[:, 0] & ~inside  # no noise at all
    inner = np.empty((len(U_), len(_Z)))
    for rows_of, law in ((inside, _over_par), (flat, _without_noise), (~inside & ~flat, _over_rest)):
        if rows_of.any():
            inner[rows_of] = law(U_[rows_of], Δ, A[rows_of], B[rows_of])
    return inner @ _WEIGHT


def _over_par(U: Floats, Δ: float, A: Floats, B: Floats) -> Floats:
    return np.asarray(scipy.special.ndtr((U - (Δ + A * _Z) ** 2 + A**2) / B))


def _over_rest(U: Floats, Δ: float, A: Floats, B: Floats) -> Floats:
    root = np.sqrt(np.maximum(U + A**2 - B * _Z, 0.0))
    return np.asarray(scipy.special.ndtr((root - Δ) / A) - scipy.special.ndtr((-root - Δ) / A))


def _without_noise(U: Floats, Δ: float, A: Floats, B: Floats) -> Floats:
    return np.asarray(np.broadcast_to(Δ**2 <= U, (*U.shape[:-1], len(_Z))), dtype=float)


def upper_bound(U: float, β: float, *, n: int, largest: float, square: float, stretch: float = 1.0) -> float:
    """The Δ with p(U; Δ) = β; 0 where even no bias at all makes so small a U less likely than β."""

    @functools.cache  # the ends are asked for again
    def excess(Δ: float) -> float:  # as z-scores, in which it is almost a line
        p = float(p_value(U, Δ, n=n, largest=largest, square=square, stretch=stretch))
        return z_of(β) - z_of(min(max(p, 1e-300), 1 - 1e-16))

    if excess(0.0) <= 0:
        return 0.0
    high = math.sqrt(max(U, 0.0)) + math.sqrt(largest / n) + (2 * square) ** 0.25 / math.sqrt(n)
    if high == 0:
        return 0.0
    while excess(high) > 0:
        high *= 2

    return float(scipy.optimize.brentq(excess, 0.0, high, xtol=1e-12 * high, rtol=1e-10))


def draws_to_certify(Δ: float, β: float, *, largest: float, square: float, U: float = 0.0) -> float:
    """The n at which a statistic of U certifies Δ at level β; infinite if ‖b‖² = U is not below Δ²."""
    if Δ**2 <= U:
        return math.inf

    def fails(n: float) -> bool:
        return bool(p_value(U, Δ, n=n, largest=largest, square=square) > β)

    below, power = 1, 2  # of 2, at which it still fails, and does not
    while fails(2.0**power):
        if power == _MOST_POWER:
            return math.inf
        below, power = power, min(2 * power, _MOST_POWER)
    while power > below + 1:
        half = (below + power) // 2
        below, power = (half, power) if fails(2.0**half) else (below, half)
    low, high = 2.0**below, 2.0**power
    while high > low * 1.001:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if fails(middle) else (low, middle)
    return math.ceil(high)
