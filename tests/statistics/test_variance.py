"""Ratios of variances: moments against numpy on the whole sample, intervals against the definition, coverage."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from pgcheck.statistics.variance import Pairs, break_even, log_ratio_error, mean_squared_error, merged, variance_ratio


def columns(n: int, *, seed: int = 0, sigma: float = 0.5, rho: float = 0.8) -> tuple[np.ndarray, np.ndarray]:
    """Two correlated log-normal columns."""
    rng = np.random.default_rng(seed)
    z, w = rng.standard_normal((2, n))
    return np.exp(sigma * z), 2 * np.exp(sigma * (rho * z + math.sqrt(1 - rho**2) * w))


@given(cuts=st.lists(st.integers(1, 999), max_size=6, unique=True), r=st.floats(0.01, 10.0))
def test_merged_moments_are_those_of_the_whole(cuts: list[int], r: float) -> None:
    a, b = columns(1000)
    edges = [0, *sorted(cuts), 1000]
    pairs = merged([Pairs.of(a[i:j], b[i:j]) for i, j in itertools.pairwise(edges)])
    y = a - r * b
    mean, error, skew, share = pairs.difference(r)
    assert mean == pytest.approx(y.mean(), abs=1e-12)
    assert error == pytest.approx(y.std(ddof=1) / math.sqrt(1000), rel=1e-9)
    assert skew == pytest.approx(stats.skew(y) / math.sqrt(1000), rel=1e-7, abs=1e-9)
    exact = ((y - y.mean()) ** 2).max() / ((y - y.mean()) ** 2).sum()
    assert share == pytest.approx(exact, rel=1e-8)
    assert np.array_equal(pairs.extremes, Pairs.of(a, b).extremes)
    assert len(pairs.extremes) < 40


def test_the_interval_is_the_set_of_ratios_that_are_not_rejected() -> None:
    a, b = columns(4000)
    got = variance_ratio(Pairs.of(a, b))
    grid = np.linspace(got.value * 0.9, got.value * 1.1, 801)
    kept = []
    for r in grid:
        y = a - r * b
        T = y.mean() / (y.std(ddof=1) / math.sqrt(len(y)))
        s = stats.skew(y) / math.sqrt(len(y))
        H = T + s * T**2 / 3 + s**2 * T**3 / 27 + s / 6
        if min(abs(T), abs(H)) <= stats.t.ppf(0.975, len(y) - 1) or T * H < 0:
            kept.append(r)
    assert got.low == pytest.approx(min(kept), abs=2 * (grid[1] - grid[0]))
    assert got.high == pytest.approx(max(kept), abs=2 * (grid[1] - grid[0]))


def test_common_random_numbers_narrow_it_and_cost_scales_it() -> None:
    a, b = columns(4000, rho=0.99)
    rng = np.random.default_rng(1)
    close, far = variance_ratio(Pairs.of(a, b)), variance_ratio(Pairs.of(a, rng.permutation(b)))
    assert close.high - close.low < 0.3 * (far.high - far.low)
    dear = variance_ratio(Pairs.of(a, b), cost=8.0)
    assert (dear.value, dear.low, dear.high) == (8 * close.value, 8 * close.low, 8 * close.high)
    width = math.log(close.high / close.low) / 2 / 1.96
    assert width == pytest.approx(log_ratio_error(Pairs.of(a, b)), rel=0.02)


def test_the_same_estimator_has_ratio_one() -> None:
    a, _ = columns(1000)
    got = variance_ratio(Pairs.of(a, a))
    assert got.value == 1.0
    assert got.low == pytest.approx(1.0, abs=1e-5)
    assert got.high == pytest.approx(1.0, abs=1e-5)


def test_a_few_draws_that_decide_are_refused() -> None:
    a, b = columns(1000, sigma=2.5, rho=0.0)
    assert math.isnan(variance_ratio(Pairs.of(a, b)).low)


def test_coverage_of_the_ratio() -> None:
    """A rate of .945 to .965 gives fewer, or more, hits than these with probability < 1e-8."""
    hits, given_ = 0, 0
    for seed in range(600):
        a, b = columns(2000, seed=seed)
        got = variance_ratio(Pairs.of(a, b))
        if not math.isnan(got.low):
            given_ += 1
            hits += got.low <= 0.5 <= got.high
    assert given_ > 540
    assert stats.binom.cdf(hits, given_, 0.945) > 1e-8
    assert stats.binom.sf(hits - 1, given_, 0.965) > 1e-8


def test_break_even() -> None:
    star = break_even(0.0, 4.0, 0.5, 1.0)
    assert star == 12.0  # (4 − 1)/.25
    assert mean_squared_error(0.0, 4.0, batches=star) == mean_squared_error(0.5, 1.0, batches=star)
    assert math.isnan(break_even(0.0, 1.0, 0.5, 4.0))  # the unbiased one is better at every N
