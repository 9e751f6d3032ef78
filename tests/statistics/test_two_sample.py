"""The difference of two means: against scipy's Welch test, against one sample, and at its nominal rate."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from pgcheck.errors import UsageError
from pgcheck.statistics.guarded import MARGIN, Scores, interval, z_of, z_scores
from pgcheck.statistics.two_sample import difference

ONE_IN_1E8 = 1e-8


def test_without_skewness_it_is_welchs() -> None:
    """Samples that are symmetric by construction: H is T."""
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((300, 1)), 2.5 * rng.standard_normal((800, 1))
    a, b = np.concatenate([a, -a]) + 0.3, np.concatenate([b, -b])
    d = difference(Scores.of(a), Scores.of(b), factor=1.2)
    expected = stats.ttest_ind(a[:, 0], 1.2 * b[:, 0], equal_var=False)
    assert d.mean[0] / d.error[0] == pytest.approx(expected.statistic, rel=1e-12)
    assert d.n == int(expected.df) + 1
    assert stats.norm.sf(z_scores(d)[0]) == pytest.approx(
        stats.t.sf(expected.statistic / MARGIN, expected.df), rel=1e-3
    )
    ends = expected.confidence_interval(0.95)
    low, high = interval(d)
    assert high[0] - low[0] == pytest.approx(MARGIN * (ends.high - ends.low), rel=1e-5)
    assert high[0] + low[0] == pytest.approx(ends.high + ends.low, rel=1e-9)


def test_against_a_sample_without_noise_it_is_the_one_sample_test() -> None:
    y = np.random.default_rng(1).exponential(size=(2000, 2))
    d = difference(Scores.of(y), Scores.of(np.full((50, 2), 0.9)))
    one = Scores.of(y - 0.9)
    assert z_scores(d) == pytest.approx(z_scores(one), rel=1e-9)
    assert interval(d)[0] == pytest.approx(interval(one)[0], rel=1e-9)
    assert d.skewness_of_mean == pytest.approx(one.skewness_of_mean, rel=1e-9)
    assert d.largest_share == pytest.approx(one.largest_share, rel=1e-9)


def test_the_skewness_is_that_of_the_difference_of_means() -> None:
    """Third cumulants of independent means add: κ₃(ā) = κ₃/n². An exponential has κ₂ = 1, κ₃ = 2."""
    rng = np.random.default_rng(2)
    d = difference(Scores.of(rng.exponential(size=(400_000, 1))), Scores.of(rng.exponential(size=(100_000, 1))))
    exact = (2 / 400_000**2 - 2 / 100_000**2) / (1 / 400_000 + 1 / 100_000) ** 1.5
    assert d.skewness_of_mean[0] == pytest.approx(exact, rel=0.1)


def test_swapped_it_changes_its_sign_only() -> None:
    rng = np.random.default_rng(3)
    a, b = Scores.of(rng.exponential(size=(900, 1))), Scores.of(rng.standard_normal((500, 1)) + 0.9)
    assert z_scores(difference(a, b)) == pytest.approx(-z_scores(difference(b, a)), rel=1e-12)


def test_a_sample_with_one_huge_score_is_refused() -> None:
    rng = np.random.default_rng(4)
    y = rng.standard_normal((1000, 1))
    wild = y.copy()
    wild[7] = 40.0
    calm = Scores.of(rng.standard_normal((1000, 1)))
    assert not difference(Scores.of(y), calm).refused[0]
    assert difference(Scores.of(wild), calm).refused[0]
    assert difference(calm, Scores.of(wild)).refused[0]
    assert z_scores(difference(calm, Scores.of(wild)))[0] == 0


def test_two_samples_without_noise_are_refused() -> None:
    flat = Scores.of(np.ones((10, 1)))
    assert difference(flat, flat).refused[0]
    with pytest.raises(UsageError, match="1 and 10"):
        difference(Scores.of(np.ones((1, 1))), flat)


@pytest.mark.parametrize("sizes", [(400, 1600), (1000, 1000)])
def test_it_keeps_its_level(sizes: tuple[int, int]) -> None:
    """Skewed samples of unequal size and noise, 8 000 kinds of score at once."""
    rng = np.random.default_rng(5)
    a, b = (rng.gamma(4.0, size=(n, 8_000)) for n in sizes)
    z = z_scores(difference(Scores.of(a), Scores.of(3 * b), factor=1 / 3))
    for level in (0.1, 0.01):
        for events in (int((z >= z_of(level)).sum()), int((z <= -z_of(level)).sum())):
            assert stats.binom.sf(events - 1, 8_000, 1.1 * level) > ONE_IN_1E8
            assert stats.binom.cdf(events, 8_000, 0.8 * level) > ONE_IN_1E8
