"""The guarded t against its formulas on whole samples, by scipy and by fractions of the definition."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import optimize, stats

from pgcheck.statistics.guarded import MARGIN, Scores, draws_for_tails, hall, hall_inverse, interval, pareto_k, z_scores

samples = st.lists(st.floats(-100, 100).map(lambda x: round(x, 3)), min_size=2, max_size=40)


def column(y: list[float]) -> Scores:
    """One kind of score."""
    return Scores.of(np.array(y)[:, None])


def same(a: Scores, b: Scores, *, size: float) -> None:
    """Equal up to the rounding of numbers as large as `size`."""
    assert a.n == b.n
    for x, y, power in ((a.mean, b.mean, 1), (a.m2, b.m2, 2), (a.m3, b.m3, 3)):
        assert np.allclose(x, y, rtol=1e-9, atol=1e-11 * a.n * (1 + size) ** power)
    assert np.array_equal(a.low, b.low)
    assert np.array_equal(a.high, b.high)


@given(samples, samples, samples)
def test_merging_is_associative_and_gives_the_whole(a: list[float], b: list[float], c: list[float]) -> None:
    x, y, z = column(a), column(b), column(c)
    size = max(map(abs, a + b + c))
    same(x.merge(y).merge(z), x.merge(y.merge(z)), size=size)
    same(x.merge(y).merge(z), column(a + b + c), size=size)
    same(Scores.none(1).merge(x), x, size=size)
    same(x.merge(Scores.none(1)), x, size=size)


@given(samples, st.floats(-5, 5), st.floats(-5, 5))
def test_scaled_and_shifted(y: list[float], factor: float, shift: float) -> None:
    expected = column([factor * x + shift for x in y])
    same(column(y).times(factor).plus(shift), expected, size=max(map(abs, y)) * abs(factor) + abs(shift))


def drawn(name: str, n: int, seed: int = 0) -> np.ndarray:
    """Samples of laws with a light, a skewed and a heavy tail."""
    rng = np.random.default_rng(seed)
    return {
        "normal": lambda: rng.standard_normal(n) + 0.1,
        "exponential": lambda: rng.exponential(size=n) - 0.9,
        "log-normal": lambda: np.exp(rng.standard_normal(n) * 1.2) - 2.0,
        "rare": lambda: (rng.random(n) < 0.01) - 0.02,
    }[name]()


@pytest.mark.parametrize("n", [30, 500, 20_000])
@pytest.mark.parametrize("name", ["normal", "exponential", "log-normal", "rare"])
def test_the_z_score_is_its_formula(name: str, n: int) -> None:
    y = drawn(name, n)
    T = stats.ttest_1samp(y, 0.0).statistic / MARGIN
    a = stats.skew(y) / math.sqrt(n)
    H = T + a * T**2 / 3 + a**2 * T**3 / 27 + a / 6
    share = ((y - y.mean()) ** 2).max() / ((y - y.mean()) ** 2).sum()
    refused = abs(a) >= 0.1 or share >= 0.05
    p = stats.t.sf(min(abs(T), abs(H)), n - 1)
    expected = 0.0 if refused or T * H < 0 else math.copysign(stats.norm.isf(p), T)
    got = Scores.of(y[:, None])
    assert bool(got.refused[0]) == refused
    assert z_scores(got)[0] == pytest.approx(expected, abs=1e-8)
    low, high = interval(got)
    unbounded = abs(a) >= 0.2 or share >= 0.1
    assert bool(got.unbounded[0]) == unbounded
    if unbounded:
        assert math.isnan(low[0])
        return
    # the test inverted: the furthest means that either of T and H does not reject
    crit = stats.t.isf(0.025, n - 1)
    se = MARGIN * stats.sem(y)

    def h(mu: float) -> float:
        t = (y.mean() - mu) / se
        return t + a * t**2 / 3 + a**2 * t**3 / 27 + a / 6

    ends = [optimize.brentq(lambda mu, c=c: h(mu) - c, y.mean() - 9 * se, y.mean() + 9 * se) for c in (crit, -crit)]
    assert low[0] == pytest.approx(min(ends[0], y.mean() - crit * se), rel=1e-7, abs=1e-10)
    assert high[0] == pytest.approx(max(ends[1], y.mean() + crit * se), rel=1e-7, abs=1e-10)


@given(st.floats(-8, 8), st.floats(-0.2, 0.2))
def test_the_inverse_of_hall(T: float, a: float) -> None:
    assert hall_inverse(hall(np.array(T), np.array(a)), np.array(a)) == pytest.approx(T, abs=1e-5)


def test_constant_scores_are_refused() -> None:
    y = np.full((100, 1), 3.0) + 1e-12 * np.arange(100)[:, None]
    assert Scores.of(y).refused[0]
    assert z_scores(Scores.of(y))[0] == 0.0


def test_one_score_and_none_say_nothing() -> None:
    for y in (Scores.none(2), Scores.of(np.ones((1, 2)))):
        assert z_scores(y).tolist() == [0.0, 0.0]
        assert np.isnan(interval(y)[0]).all()


def test_the_draws_that_tame_a_tail() -> None:
    y = drawn("rare", 2000)
    assert draws_for_tails(Scores.of(y[:, None]))[0] == pytest.approx(100 * stats.skew(y) ** 2, rel=1e-3)


@pytest.mark.parametrize("k", [0.2, 0.5, 0.9])
def test_the_tail_index_of_a_pareto_law(k: float) -> None:
    """20 samples of 1000 from a generalized Pareto law: their mean k̂ is within .06 of k (its standard error is below .015)."""
    x = stats.genpareto.rvs(k, size=(20, 1000), random_state=0)
    assert np.mean([pareto_k(row, cutoff=0.0) for row in x]) == pytest.approx(k, abs=0.06)


def test_a_tail_of_fewer_than_five_has_no_index() -> None:
    assert math.isnan(pareto_k(np.ones(10), cutoff=1.0))
