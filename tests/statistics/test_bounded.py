"""Bounded scores: wealth and bounds by hand and by exact binomial sums; a judge that needs no tails; a bet after the fact."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from pgcheck.errors import UsageError
from pgcheck.statistics.bounded import BETS, Wealth, bounded_bias, bounded_interval, mean_above
from pgcheck.statistics.guarded import Floats, Scores
from pgcheck.statistics.sequential import GRAIN, Judge, Judgement, Settings
from pgcheck.statistics.status import Status

ONE_IN_1E8 = 1e-8


def test_wealth_is_the_mean_of_products() -> None:
    y, m, bound = [1, -2, 2, 1, -1], Fraction(1, 4), 2
    products = [Fraction(1)] * BETS
    for j in range(BETS):
        λ = Fraction(1, 2) / (bound + m) / 2**j
        for x in y:
            products[j] *= 1 + λ * (x - m)
    column = np.array(y, dtype=float)[:, None]
    whole = Wealth.none(1).after(column, np.array([0.25]), 2.0)
    parts = Wealth.none(1).after(column[:2], np.array([0.25]), 2.0).after(column[2:], np.array([0.25]), 2.0)
    for wealth in (whole, parts):
        assert wealth.total([0]) == pytest.approx(math.log(sum(products) / BETS), abs=1e-12)
        assert wealth.of_kind[0] == pytest.approx(wealth.total([0]), abs=1e-12)


def rare(p: float, shape: tuple[int, ...], rng: np.random.Generator) -> Floats:
    """Scores of mean 0 that are p − 1 with probability p: a t that missed all of those is infinite."""
    return p - (rng.random(shape) < p)


def alarms(wealth: type[Wealth], α: float, *, paths: int = 1000) -> int:
    """How many paths of 20 blocks of 100 draws ever reach 1/α, of two kinds, without a bias."""
    rng = np.random.default_rng(0)
    found = 0
    for _ in range(paths // 500):
        # 500 paths of 2 kinds at once: kinds 2i and 2i + 1 belong to path i
        w, fired = wealth.none(1000), np.zeros(500, dtype=bool)
        for _ in range(20):
            w = w.after(rare(0.02, (100, 1000), rng), np.zeros(1000), 1.0)
            each = np.logaddexp(*w.of_kind.reshape(500, 2).T) - math.log(2)
            fired |= each >= math.log(1 / α)
        found += int(fired.sum())
    return found


class Hindsight(Wealth):
    """Of each block, the bet that would have been best."""

    def after(self, y: Floats, m: Floats, bound: float) -> Hindsight:
        gain = super().after(y, m, bound).log - self.log
        return Hindsight(self.log + gain.max(0))

    @staticmethod
    def none(kinds: int) -> Hindsight:
        return Hindsight(np.zeros((BETS, kinds)))


def test_without_a_bias_wealth_hardly_ever_grows_and_a_bet_after_the_fact_is_noticed() -> None:
    sound = alarms(Wealth, 0.05)
    assert stats.binom.sf(sound - 1, 1000, 0.05) > ONE_IN_1E8
    assert stats.binom.sf(alarms(Hindsight, 0.05) - 1, 1000, 0.05) < ONE_IN_1E8


def zero_one(n: int, k: int) -> Scores:
    """Moments of k ones among n."""
    return Scores.of(np.concatenate([np.ones(k), np.zeros(n - k)])[:, None])


def test_the_bound_is_maurer_and_pontils() -> None:
    n, k, level = 50, 7, 0.01
    mean, L = k / n, math.log(2 / level)
    variance = n / (n - 1) * mean * (1 - mean)
    expected = mean + math.sqrt(2 * variance * L / n) + 7 * L / (3 * (n - 1))
    assert mean_above(zero_one(n, k), 1.0, level)[0] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("p", [0.001, 0.02, 0.3, 0.5])
def test_intervals_cover_exactly(p: float) -> None:
    """All outcomes of 400 draws that are 1 with probability p, weighted."""
    n, missed = 400, 0.0
    for k in range(n + 1):
        low, high = bounded_interval(zero_one(n, k), 1.0, confidence=0.9)
        if not low[0] <= p <= high[0]:
            missed += stats.binom.pmf(k, n, p)
    assert missed <= 0.1


@pytest.mark.parametrize(("p", "c"), [(0.01, 0.0), (0.01, 0.3), (0.4, 0.1)])
def test_the_bound_on_a_bias_holds_exactly(p: float, c: float) -> None:
    """D is 1 − c or −c: its bias is p − c, and 400 draws have as many outcomes as numbers of ones."""
    n, β, missed = 400, 0.2, 0.0
    for k in range(n + 1):
        d = np.concatenate([np.full(k, 1 - c), np.full(n - k, -c)])
        if bounded_bias(abs(d.mean()), Scores.of((d**2)[:, None]), 1.0, β) < abs(p - c):
            missed += stats.binom.pmf(k, n, p)
    assert missed <= β


MU = torch.tensor([0.6, 0.0, 0.8, 0.0], dtype=torch.float64)


def paid(bias: Tensor, seed: int = 0, *, scale: float = 1.0):
    """Draws of mean scale · μ* + bias that are far from it once in two hundred, ‖D‖ ≤ 5 for small biases."""
    generator = torch.Generator().manual_seed(seed)
    side = torch.tensor([0.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    while True:
        hit = (torch.rand(GRAIN, generator=generator, dtype=torch.float64) < 0.005).to(torch.float64) - 0.005
        noise = torch.rand(GRAIN, 4, generator=generator, dtype=torch.float64) - 0.5
        yield scale * MU + bias + 4.0 * hit.unsqueeze(1) * (MU + side) / math.sqrt(2) + 0.3 * noise


def judged(settings: Settings, draws, *, scale: float | None = 1.0) -> Judgement:
    """Until decided."""
    judge = Judge(MU, settings, scale=scale)
    for x in draws:
        judge.update(x)
        if judge.decided:
            return judge.verdict()
    raise AssertionError


@pytest.mark.parametrize("mode", ["nonzero", "exceeds"])
def test_a_judge_with_bounds_decides_where_tails_forbid_it(mode: str) -> None:
    none, some = torch.zeros(4, dtype=torch.float64), torch.tensor([0.0, 0.0, -0.3, 0.0], dtype=torch.float64)
    settings = Settings(rtol=0.1, bounds=(-5.0, 5.0), looks=8, mode=mode)  # type: ignore[arg-type]
    good, bad = judged(settings, paid(none)), judged(settings, paid(some))
    assert (good.status, bad.status) == (Status.PASS, Status.FAIL)
    assert good.missed <= 0.1
    assert good.scale.low < 1.0 < good.scale.high
    assert bad.scale.low < 1 - 0.24 < bad.scale.high
    assert bad.witness is not None
    assert bad.effect is None
    early = judged(Settings(rtol=0.1, looks=1), paid(none))
    assert (early.status, early.note) == (Status.INCONCLUSIVE, "tails")
    assert judged(Settings(rtol=0.1, looks=1, bounds=(-5.0, 5.0)), paid(none)).note == ""


@pytest.mark.parametrize("mode", ["nonzero", "exceeds"])
def test_a_judge_with_bounds_and_an_open_scale(mode: str) -> None:
    settings = Settings(rtol=0.1, bounds=(-6.0, 6.0), looks=9, mode=mode)  # type: ignore[arg-type]
    none, aside = torch.zeros(4, dtype=torch.float64), torch.tensor([0.0, 0.0, 0.0, 0.4], dtype=torch.float64)
    assert judged(settings, paid(none, scale=0.8), scale=None).status is Status.PASS
    assert judged(settings, paid(aside, scale=0.8), scale=None).status is Status.FAIL
    assert judged(settings, paid(none, scale=-0.8), scale=None).status is Status.FAIL


def test_without_a_bias_judges_with_bounds_do_not_fail() -> None:
    """α = .1 and one look: of 60 judges more than 23 with probability < 1e-8."""
    none = torch.zeros(4, dtype=torch.float64)
    settings = Settings(rtol=0.01, alpha=0.1, bounds=(-5.0, 5.0), looks=1)
    failed = sum(judged(settings, paid(none, seed)).status is Status.FAIL for seed in range(60))
    assert stats.binom.sf(failed - 1, 60, 0.1) > ONE_IN_1E8


def test_resumed_it_says_the_same() -> None:
    settings = Settings(bounds=(-5.0, 5.0))
    grains = [x for x, _ in zip(paid(torch.full((4,), 0.05, dtype=torch.float64)), range(6), strict=False)]
    whole, part = Judge(MU, settings), Judge(MU, settings)
    for i, x in enumerate(grains):
        whole.update(x)
        if i == 2:
            part = Judge.from_state(MU, settings, state=part.state())
        part.update(x)
    a, b = whole.state(), part.state()
    assert all(a[k].numpy().tobytes() == b[k].numpy().tobytes() for k in a)
    assert repr(whole.verdict()) == repr(part.verdict())


def test_a_draw_beyond_its_bounds_is_named() -> None:
    x = MU.expand(GRAIN, 4).clone()
    x[5, 1] = 7.0
    with pytest.raises(UsageError, match="draw 5 of the stream lies 7 from"):
        Judge(MU, Settings(bounds=(-3.0, 5.0))).update(x)


@pytest.mark.parametrize("bounds", [(0.0, 1.0), (1.0, -1.0), (-1.0, math.inf), (1.0,)])
def test_bounds_that_say_nothing_are_refused(bounds: tuple) -> None:
    with pytest.raises(UsageError, match="bounds"):
        Settings(bounds=bounds)
