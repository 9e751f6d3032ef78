"""Ratios of variances on the same random numbers, and what they are worth.

q_A,i = ‖X_A,i − c_A‖² of draw i, with c_A = E X_A (or any fixed point near it: a mean of earlier draws), so that
V_A = E q_A is the total variance. The ratio r = V_A/V_B has the interval

    {r : the guarded t of q_A,i − r q_B,i does not reject}                      (Fieller 1954, with the guarded t)

Guarantee: the interval is a function of mergeable sums of order three and of a few extreme rows; NaN where a few draws
decide the difference. For planning se(log r)² = (CV_A² + CV_B² − 2ρ CV_A CV_B)/n.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce

import numpy as np
import scipy
import torch
from torch import Tensor

from pgcheck.statistics.guarded import INTERVAL_SHARE, INTERVAL_SKEWNESS, MARGIN, Floats, Scores, hall
from pgcheck.statistics.sequential import Interval

_FURTHEST = 1e6  # an end further from the ratio than this factor is 0 or ∞


@dataclass(frozen=True)
class Pairs:
    """Mergeable moments of n pairs (a, b) of numbers, a and b deviations from their means below."""

    n: int
    mean: Floats  # [2]
    second: Floats  # [3]: Σa², Σab, Σb²
    third: Floats  # [4]: Σa³, Σa²b, Σab², Σb³
    extremes: Floats  # [·, 2]: a few rows, among them those of the largest and the smallest a − r b for every r > 0

    @staticmethod
    def of(a: Floats, b: Floats) -> Pairs:
        """Of two columns `[n]`."""
        rows = np.stack([a, b], 1)
        mean = rows.mean(0)
        x, y = (rows - mean).T
        return Pairs(
            len(rows),
            mean,
            np.array([(x * x).sum(), (x * y).sum(), (y * y).sum()]),
            np.array([(x * x * x).sum(), (x * x * y).sum(), (x * y * y).sum(), (y * y * y).sum()]),
            _extremes(rows),
        )

    @staticmethod
    def counted(a: Floats, b: Floats, counts: Floats) -> Pairs:
        """Of values that occur so many times, all `[N]`; every one that occurs is kept as an extreme."""
        n = int(counts.sum())
        seen = counts > 0
        rows, w = np.stack([a, b], 1)[seen], counts[seen]
        mean = w @ rows / n
        x, y = (rows - mean).T
        second = np.array([w @ (x * x), w @ (x * y), w @ (y * y)])
        third = np.array([w @ (x * x * x), w @ (x * x * y), w @ (x * y * y), w @ (y * y * y)])
        return Pairs(n, mean, second, third, rows)

    def merge(self, other: Pairs) -> Pairs:
        """Of both samples together: Σ(x + u)(y + v)(z + w) of each, u its mean's distance from the common one."""
        n = self.n + other.n
        mean = self.mean + (other.mean - self.mean) * (other.n / n)
        second, third = np.zeros(3), np.zeros(4)
        for part in (self, other):
            u, v = part.mean - mean
            aa, ab, bb = part.second
            second += part.second + part.n * np.array([u * u, u * v, v * v])
            third += part.third + np.array([3 * u * aa, v * aa + 2 * u * ab, u * bb + 2 * v * ab, 3 * v * bb])
            third += part.n * np.array([u**3, u * u * v, u * v * v, v**3])
        return Pairs(n, mean, second, third, _extremes(np.concatenate([self.extremes, other.extremes])))

    def plus(self, a: float, b: float) -> Pairs:
        """Of pairs (x + a, y + b)."""
        shift = np.array([a, b])
        return Pairs(self.n, self.mean + shift, self.second, self.third, self.extremes + shift)

    def state(self) -> dict[str, Tensor]:
        """Everything, as tensors."""
        parts = {"mean": self.mean, "second": self.second, "third": self.third, "extremes": self.extremes}
        return {"n": torch.tensor(self.n)} | {name: torch.from_numpy(x.copy()) for name, x in parts.items()}

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> Pairs:
        """What `state()` was taken from."""
        return cls(int(state["n"]), *(state[name].numpy().copy() for name in ("mean", "second", "third", "extremes")))

    def minus(self, r: float) -> Scores:
        """Scores a − r b, r > 0."""
        return Scores(self.n, *(np.array([x]) for x in self._sums(r)))

    def difference(self, r: float) -> tuple[float, float, float, float]:
        """Of y = a − r b: its mean, the error of it, the skewness of it, and the largest share."""
        mean, m2, m3, low, high = self._sums(r)
        if m2 == 0:
            return mean, 0.0, 0.0, 0.0
        far = max(high - mean, mean - low)
        return mean, math.sqrt(m2 / self.n / (self.n - 1)), m3 / m2**1.5, far**2 / m2

    def _sums(self, r: float) -> tuple[float, float, float, float, float]:
        """Of y = a − r b: the mean, Σ(y − ȳ)², Σ(y − ȳ)³, the least and the largest."""
        aa, ab, bb = self.second
        m2 = float(aa - 2 * r * ab + r * r * bb)
        if m2 <= 1e-12 * (aa + r * r * bb):  # rounding: a is r b, but for a constant
            m2 = 0.0
        m3 = float(self.third @ np.array([1.0, -3 * r, 3 * r * r, -(r**3)]))
        ends = self.extremes @ np.array([1.0, -r])
        return float(self.mean[0] - r * self.mean[1]), m2, m3, float(ends.min()), float(ends.max())


def _extremes(rows: Floats) -> Floats:
    """The rows `[≤ n, 2]` at which some a − r b, r > 0, is largest or smallest: two chains of their convex hull."""
    chains = [_chain(rows), _chain(rows[:, ::-1])[:, ::-1]]
    return np.unique(np.concatenate(chains), axis=0)


def _chain(rows: Floats) -> Floats:
    """The rows at which x − r y is largest for some r > 0, in the order of x."""
    rows = rows[np.lexsort((rows[:, 1], -rows[:, 0]))]  # x falls, and y grows among equal x
    best = np.minimum.accumulate(rows[:, 1])
    front = rows[np.concatenate([[True], rows[1:, 1] < best[:-1]])]  # no other has a larger x and a smaller y
    hull: list[tuple[float, float]] = []
    for x, y in front.tolist():
        while len(hull) > 1 and _turn(hull[-2], hull[-1], (x, y)) >= 0:
            hull.pop()
        hull.append((x, y))
    return np.array(hull)


def _turn(o: tuple[float, float], p: tuple[float, float], q: tuple[float, float]) -> float:
    return (p[0] - o[0]) * (q[1] - o[1]) - (p[1] - o[1]) * (q[0] - o[0])


def merged(parts: list[Pairs]) -> Pairs:
    """All parts, in their order."""
    return reduce(Pairs.merge, parts)


def variance_ratio(pairs: Pairs, *, cost: float = 1.0, confidence: float = 0.95) -> Interval:
    """V_A/V_B with the guarded Fieller interval, times `cost`; bounds as of `ratio_of_means`.

    Args:
        cost: cost of one batch of A in batches of B; the ratio is then that of the variances at equal cost.
    """
    found = ratio_of_means(pairs, confidence=confidence)
    return Interval(*(x * cost for x in (found.value, found.low, found.high)))


def ratio_of_means(pairs: Pairs, *, confidence: float = 0.95) -> Interval:
    """E a/E b, both above 0, with the guarded Fieller interval.

    Bounds are NaN where the tails do not allow any, 0 or ∞ where the data do not bound the ratio.
    """
    r = float(pairs.mean[0] / pairs.mean[1]) if pairs.mean[1] > 0 else math.nan
    if not (math.isfinite(r) and r > 0 and pairs.n > 1):
        return Interval(r, math.nan, math.nan)
    t = float(scipy.special.stdtrit(pairs.n - 1, (1 + confidence) / 2))

    def excess(side: float) -> Callable[[float], float]:
        def of(log_r: float) -> float:
            mean, error, a, _ = pairs.difference(math.exp(log_r))
            if error == 0:
                return -t if mean == 0 else math.copysign(math.inf, side * mean)
            T = side * mean / (MARGIN * error)
            return min(T, float(hall(np.asarray(T), np.asarray(side * a)))) - t

        return of

    ends = []
    for side in (1.0, -1.0):  # y = a − r b has a mean above 0 left of the ratio, below 0 right of it
        f = excess(side)
        end = math.log(r) - side * math.log(_FURTHEST)
        if f(end) <= 0:
            ends.append(0.0 if side > 0 else math.inf)
            continue
        step = 1e-6  # an end is bracketed from the ratio outwards, as f need not be monotone far away
        while f(math.log(r) - side * step) <= 0:
            step *= 2
        inner, outer = math.log(r) - side * step / 2, math.log(r) - side * step
        if step == 1e-6 or not math.isfinite(f(outer)):
            ends.append(math.exp(outer))
            continue
        low, high = sorted((inner, outer))
        ends.append(math.exp(scipy.optimize.brentq(f, low, high, xtol=1e-12)))
    wild = any(
        abs(a) >= INTERVAL_SKEWNESS or share >= INTERVAL_SHARE
        for _, _, a, share in (pairs.difference(x) for x in (ends[0], r, ends[1]) if math.isfinite(x))
    )
    if wild:
        return Interval(r, math.nan, math.nan)
    return Interval(r, ends[0], ends[1])


def log_ratio_error(pairs: Pairs) -> float:
    """Se(log r) by the delta method, √((CV_A² + CV_B² − 2ρ CV_A CV_B)/n): for planning, not for verdicts."""
    a, b = pairs.mean
    aa, ab, bb = pairs.second / (pairs.n - 1)
    return math.sqrt(max(aa / a**2 + bb / b**2 - 2 * ab / (a * b), 0.0) / pairs.n)


def mean_squared_error(bias: float, variance: float, *, batches: float) -> float:
    """‖b‖² + V/N, of the mean of N batches."""
    return bias**2 + variance / batches


def break_even(bias_a: float, variance_a: float, bias_b: float, variance_b: float) -> float:
    """N* = (V_A − V_B)/(‖b_B‖² − ‖b_A‖²), the number of batches at which A and B have the same MSE; NaN if there is none."""
    gap = bias_b**2 - bias_a**2
    star = (variance_a - variance_b) / gap if gap != 0 else math.nan
    return star if star > 0 else math.nan
