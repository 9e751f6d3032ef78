"""The calibration: its second derivation of a look against the judge, its bounds, and a slice of the measured rates."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from pgcheck.calibrate import (
    NOMINAL,
    SHAPES,
    Law,
    calibrate,
    clopper_pearson,
    counted_segments,
    estimator_law,
    false_passes,
    laws,
    look,
    null_rates,
    planted,
)
from pgcheck.engines.exact import exact_moments
from pgcheck.errors import UsageError
from pgcheck.estimators.lookup import as_estimator
from pgcheck.registry import find_problem
from pgcheck.statistics.certificate import stretch
from pgcheck.statistics.guarded import Floats, z_of, z_scores
from pgcheck.statistics.sequential import GRAIN, Judge, Settings

ONE_IN_1E8 = 1e-8


@cache
def law(name: str) -> Law:
    """One of the calibration's laws, by the start of its name."""
    return next(x for x in laws() if x.name.startswith(name))


class Recorder(Judge):
    """A judge that is never certified and always triggers: both stages of one look, whatever they say."""

    seen: Floats
    confirming: list[float]

    def _fires(self, ratio: float) -> bool:
        return self._looked == 0

    def _certified(self) -> bool:
        return False

    def _evidence(self) -> Floats:
        out = super()._evidence()
        if self._looked == 0:
            self.seen = out.copy()
        return out

    def _confirming_z(self) -> list[float]:
        self.confirming = super()._confirming_z()
        return self.confirming


def rows(values: Tensor, counts: Tensor) -> Tensor:
    """Draws `[n, P]` that have these counts `[N]`."""
    return values[torch.repeat_interleave(torch.arange(len(counts)), counts.to(torch.int64))]


@pytest.mark.parametrize("mode", ["nonzero", "exceeds"])
@pytest.mark.parametrize(
    "name", ["Gaussian values, P = 32", "leave_one_out on dialogue", "log-normal weights, σ = 1, P = 2"]
)
def test_the_judge_and_the_calibration_see_the_same_look(name: str, mode: Any) -> None:
    x = law(name)
    bias = planted(x, SHAPES[1], 0.3 * float(x.mean.norm()))
    mu = x.mean - bias
    settings = Settings(mode=mode)
    runs = 4
    segments = counted_segments(x, settings, runs, np.random.default_rng(5))
    shift = settings.rtol * float(mu.norm()) if mode == "exceeds" else 0.0
    batched = look(x, settings, segments, bias=bias, shift=shift)
    gram, rest, confirming = segments
    for r in range(runs):
        judge = Recorder(mu, settings)
        for g in range(len(gram)):
            judge.update(torch.cat([rows(x.values, gram[g, r]), rows(x.values, rest[g, r])]))
            if g == len(gram) - 1:
                v = judge.verdict()
                U, whole = judge._statistic(), judge._whole
        for part in confirming[:, r]:
            for grain in rows(x.values, part).split(GRAIN):
                judge.update(grain)
        assert np.allclose(judge.seen, batched.evidence[r], rtol=1e-6, atol=1e-6)
        assert np.allclose(judge.confirming, batched.confirming[r], rtol=1e-6, atol=1e-6)
        assert pytest.approx(batched.statistic[r], rel=1e-8) == U
        assert whole.largest == pytest.approx(batched.largest[r], rel=1e-9)
        assert whole.trace_of_square == pytest.approx(batched.square[r], rel=1e-9)
        assert v.tails.skewness_of_mean == pytest.approx(batched.along.skewness_of_mean[r], rel=1e-6)
        assert v.tails.largest_share == pytest.approx(batched.along.largest_share[r], rel=1e-6)


def test_a_law_has_the_moments_of_the_exact_engine() -> None:
    (m,) = exact_moments([as_estimator("leave_one_out")], find_problem("dialogue/two-turn"))
    x = estimator_law("leave_one_out", "dialogue/two-turn", family="light")
    assert torch.allclose(x.mean, m.mean.flatten(), atol=1e-14)
    assert torch.allclose(x.covariance, m.covariance, atol=1e-14)
    drawn = x.draws(200_000, np.random.default_rng(0))
    assert torch.allclose(torch.cov(drawn.T), x.covariance, atol=0.03)


def test_bounds_are_those_of_the_binomial() -> None:
    low, high = clopper_pearson(7, 200)
    assert stats.binom.sf(6, 200, low) == pytest.approx(0.005)
    assert stats.binom.cdf(7, 200, high) == pytest.approx(0.005)
    assert clopper_pearson(0, 50)[0] == 0.0
    assert clopper_pearson(50, 50)[1] == 1.0


@pytest.mark.parametrize("name", ["Gaussian values, P = 2", "leave_one_out on chain", "reinforce on mdp", "paid once"])
def test_a_slice_of_the_false_alarms(name: str) -> None:
    """Each bound fails with probability < 1e-8 if the rate is nominal or below."""
    for x in null_rates(law(name), runs=400, rng=np.random.default_rng(1)):
        if x.runs:
            assert stats.binom.sf(x.events - 1, x.runs, x.nominal) > ONE_IN_1E8, x


@pytest.mark.parametrize("name", ["Gaussian values, P = 2", "leave_one_out on chain"])
def test_a_slice_of_the_false_passes(name: str) -> None:
    """At 1.15 times nominal, which is what the approximation of U's law was measured to cost."""
    rates = false_passes(law(name), runs=400, rng=np.random.default_rng(2))
    for x in rates:
        assert stats.binom.sf(x.events - 1, x.runs, 1.15 * x.nominal) > ONE_IN_1E8, x
    worst = [x for x in rates if x.detail == SHAPES[3] and x.nominal == NOMINAL[0]]
    assert stats.binom.cdf(worst[0].events, 400, 0.05) > ONE_IN_1E8  # calibrated: not hiding behind a wide margin


def test_it_runs_whole_and_says_the_same_twice() -> None:
    small = [law("leave_one_out on chain")]
    a, b = (calibrate(small, runs=100, seed=3) for _ in range(2))
    assert a == b
    assert {x.what for x in a.rates} == {
        "trigger", "confirm", "certificate", "interval misses", "trigger of exceeds", "confirm of exceeds"
    }  # fmt: skip
    assert all(x.failed == 0 for x in a.verdicts)
    assert all(x.failed == x.runs for x in a.power)
    assert null_rates(small[0], runs=100, rng=np.random.default_rng(4)) != list(a.rates[:9])


def test_too_few_runs_are_refused() -> None:
    with pytest.raises(UsageError, match="runs: 5"):
        calibrate([law("Gaussian")], runs=5)


def test_a_plain_t_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the guard a family of heavy weights breaks the bounds that the slice asserts."""
    from pgcheck import calibrate as module
    from pgcheck.statistics.guarded import Scores

    assert module.z_scores is z_scores

    def plain(y: Scores) -> Floats:
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(y.m2 > 0, y.mean / y.error, 0.0)

    monkeypatch.setattr(module, "z_scores", plain)
    rates = [x for x in null_rates(law("paid once"), runs=3000, rng=np.random.default_rng(1)) if x.nominal == 0.001]
    assert any(stats.binom.sf(x.events - 1, x.runs, x.nominal) < ONE_IN_1E8 for x in rates)


@pytest.mark.parametrize("probability", [0.03, 0.04, 0.1])
def test_skewness_stretches_the_certificate(probability: float) -> None:
    """Exactly, for 0/1 scores of which k of n are 1: a bias of Δ passes if k/n + z · stretch · error ≤ probability."""
    n, β = 4096, 1e-3
    k = np.arange(1, n)
    q = k / n
    error, a = np.sqrt(q * (1 - q) / n), (1 - 2 * q) / np.sqrt(n * q * (1 - q))
    weight = stats.binom.pmf(k, n, probability)

    def passes(factor: Floats) -> float:
        return float(weight[q + z_of(β) * factor * error <= probability].sum())

    assert passes(np.array([stretch(x, β) for x in a])) < 1.3 * β
    assert passes(np.ones(n - 1)) > 1.5 * β
