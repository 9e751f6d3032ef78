"""Mergeable moments of draws, and the intervals of everything that is printed of them.

Of draws x `[n, P]` with reference μ, an account keeps n, the mean, Σ(x − x̄)² of each coordinate (all of Σ(x − x̄)(x − x̄)ᵀ
where that is small), guarded scores of a few numbers of a draw, and the spectrum of its noise:

    y = ⟨x, μ⟩/‖μ‖²  (scale)      ‖x − μ‖²  (MSE of one batch)      ‖x − c‖², c any point near the mean  (variance)
    ⟨x, v⟩, v one of eight fixed directions  (what another sample is held against, `pgcheck.statistics.two_sample`)

    ‖bias‖² is estimated without bias by U = ‖x̄ − μ‖² − tr Cov/n = (‖Σ D‖² − Σ ‖D‖²)/(n(n−1)),  D = x − μ

Guarantee: float64; memory is that of one account however large n is; merging is associative but for rounding, and made in
one order by whoever needs the same bytes twice.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pgcheck.engines.moments import Moments
from pgcheck.errors import UsageError
from pgcheck.statistics.certificate import GRAM, Spectrum, upper_bound
from pgcheck.statistics.grain import PRODUCTS_UP_TO, Grain
from pgcheck.statistics.guarded import Scores, interval, z_of
from pgcheck.statistics.sequential import CONFIDENCE, Interval
from pgcheck.statistics.two_sample import fixed_directions

_ORDER = [0, 9, 10, *range(1, 9)]  # of the scores, as `Grain.along` and what is put beside it have them
_NONE = Interval(math.nan, math.nan, math.nan)


@functools.lru_cache(maxsize=8)
def _seen_along(size: int, device: torch.device) -> Tensor:
    return torch.from_numpy(fixed_directions(size).T.copy()).to(device)


@dataclass(frozen=True)
class Account:
    """Moments of n draws; `merge` puts two together."""

    n: int
    mean: Tensor  # [P]
    squares: Tensor  # [P], or [P, P] where P ≤ 512
    scores: Scores  # of y, ‖x − μ‖², ‖x − c‖², and the eight ⟨x, v⟩
    spectrum: Spectrum

    @classmethod
    def of(cls, x: Tensor, reference: Tensor, *, centre: Tensor, gram: bool = True) -> Account:
        """Of draws `[n, P]`; `gram`: their spectrum as well, from the first 256."""
        if x.dim() != 2 or x.shape[1:] != reference.shape:
            raise UsageError(f"reference: {len(reference)} numbers, but a draw has {list(x.shape[1:])}.")
        return cls.of_grain(Grain(x, centre), reference, blocks=x[:GRAM].unsqueeze(0) if gram else None)

    @classmethod
    def of_grain(cls, draws: Grain, reference: Tensor, *, blocks: Tensor | None) -> Account:
        """The same of a grain, around its centre; the spectrum from `blocks` of its draws, `[m, 256, P]`."""
        n, P = draws.x.shape
        size = float(reference @ reference)
        rows = draws.along(
            torch.cat([(reference / (size or 1.0)).unsqueeze(1), _seen_along(P, reference.device)], 1), room=2
        )
        rows[-2], rows[-1] = draws.distances_from(reference), draws.spread
        off = draws.total / n
        squares = (
            draws.products - torch.outer(off, draws.total) if P <= PRODUCTS_UP_TO else draws.squares - off * draws.total
        )
        spectrum = Spectrum() if blocks is None else Spectrum().add(blocks - reference)
        return cls(n, draws.centre + off, squares, Scores.of(rows.cpu().numpy().T)[_ORDER], spectrum)

    def merge(self, other: Account) -> Account:
        """Of the draws of both."""
        n, d = self.n + other.n, other.mean - self.mean
        between = (torch.outer(d, d) if self.squares.dim() == 2 else d * d) * (self.n * other.n / n)
        a, b = self.spectrum, other.spectrum
        return Account(
            n,
            self.mean + d * (other.n / n),
            self.squares + other.squares + between,
            self.scores.merge(other.scores),
            Spectrum(a.blocks + b.blocks, a.top + b.top, a.square + b.square, a.square2 + b.square2),
        )

    @property
    def trace(self) -> float:
        """tr Cov x."""
        whole = self.squares.diagonal() if self.squares.dim() == 2 else self.squares
        return float(whole.sum()) / (self.n - 1)

    @property
    def covariance(self) -> Tensor | None:
        """Cov x, where it is kept."""
        return self.squares / (self.n - 1) if self.squares.dim() == 2 else None

    def intervals(self, reference: Tensor, *, confidence: float = CONFIDENCE) -> dict[str, Interval]:
        """Everything that is said of these draws, with its interval; NaN where the tails allow none."""
        n, size, variance = self.n, float(reference.norm()), self.trace
        low, high = interval(self.scores[:3], confidence=confidence)
        tail = (1 - confidence) / 2
        U = float((self.mean - reference).square().sum()) - variance / n
        scale = Interval(float(self.scores.mean[0]), float(low[0]), float(high[0])) if size > 0 else _NONE
        bias = self._bias(U, scale, size, tail=tail)
        about = variance - float(self.scores.mean[2])  # what the centre is off, and n/(n−1)
        spread = Interval(variance, max(float(low[2]) + about, 0.0), float(high[2]) + about)
        mse = Interval(max(U, 0.0) + variance, max(float(low[1]), 0.0), float(high[1]))
        length2 = float(self.mean.square().sum()) - variance / n
        aside2 = max(U - self._along(size), 0.0) if size > 0 else math.nan
        out = {"scale": scale, "bias": bias, "variance": spread, "mse": mse}
        out["rel"] = Interval(*(x / size for x in (bias.value, bias.low, bias.high))) if size > 0 else _NONE
        out["snr"] = self._over_root(length2, spread, tail)
        off = math.sqrt(aside2 / length2) if length2 > 0 and size > 0 else math.nan
        out["off_axis"] = Interval(min(off, 1.0), math.nan, math.nan) if math.isfinite(off) else _NONE
        return out

    def _along(self, size: float) -> float:
        """The part of U along the reference: ((Σ y)² − Σ y²)/(n(n−1)), of D."""
        y, n = self.scores[0], self.n
        return float(size**2 * ((y.mean - 1.0) ** 2 - y.m2 / (n * (n - 1))))

    def _bias(self, U: float, scale: Interval, size: float, *, tail: float) -> Interval:
        """‖bias‖. From above by the certificate; from below by the better of two, each wrong half of `tail` of the time:
        |κ − 1| ‖μ‖ of a scale's interval, and U less what its law allows."""
        law = {"largest": self.spectrum.largest, "square": self.spectrum.trace_of_square}
        value = math.sqrt(max(U, 0.0))
        if bool(self.scores.refused[1]):
            return Interval(value, math.nan, math.nan)
        least = math.sqrt(max(U - z_of(tail / 2) * self._noise(U), 0.0))
        ends = interval(self.scores[:1], confidence=1 - tail)
        if size > 0 and all(np.isfinite(ends)):
            least = max(least, size * max(float(ends[0][0]) - 1.0, 1.0 - float(ends[1][0]), 0.0))
        return Interval(value, min(least, value), upper_bound(U, tail, n=self.n, **law))

    def _noise(self, square: float) -> float:
        """Standard deviation of an unbiased estimate of ‖b‖² = `square`."""
        law = self.spectrum
        return math.sqrt(2 * law.trace_of_square / self.n**2 + 4 * law.largest * max(square, 0.0) / self.n)

    def _over_root(self, length2: float, spread: Interval, tail: float) -> Interval:
        """‖E x‖/√(tr Cov x), of ‖E x‖² and its spread."""
        value = math.sqrt(max(length2, 0.0) / spread.value) if spread.value > 0 else math.inf
        room = z_of(tail / 2) * self._noise(length2)
        low = math.sqrt(max(length2 - room, 0.0) / spread.high) if spread.high > 0 else math.nan
        high = math.sqrt(max(length2 + room, 0.0) / spread.low) if spread.low > 0 else math.nan
        return Interval(value, low, high)

    def moments(
        self, reference: Tensor, *, shape: tuple[int, int], confidence: float = CONFIDENCE, **more: object
    ) -> Moments:
        """As `Moments`, `shape` `[K, A]`."""
        covariance = self.covariance
        trace = self.trace if covariance is None else None
        return Moments(
            self.mean.reshape(shape).cpu(),
            None if covariance is None else covariance.cpu(),
            self.n,
            trace=trace,
            intervals=self.intervals(reference, confidence=confidence),
            confidence=confidence,
            scores=self.scores,
            **more,  # type: ignore[arg-type]
        )

    def state(self) -> dict[str, Tensor]:
        """Everything, as tensors."""
        g = self.spectrum
        return {
            "mean": self.mean,
            "squares": self.squares,
            "scores": torch.from_numpy(self.scores.rows),
            "spectrum": torch.tensor([g.blocks, g.top, g.square, g.square2], dtype=torch.float64),
        }

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> Account:
        """What `state()` was taken from."""
        blocks, *sums = state["spectrum"].tolist()
        scores = Scores.from_rows(state["scores"].numpy())
        return cls(scores.n, state["mean"], state["squares"], scores, Spectrum(int(blocks), *sums))
