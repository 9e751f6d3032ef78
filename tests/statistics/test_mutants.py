"""The procedure, broken on purpose: each mutant is noticed by a test that the sound procedure passes.

Rates are judged with bounds that a sound procedure breaks with probability < 1e-8 (binomial).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from scipy import stats

from pgcheck import calibrate
from pgcheck.calibrate import SHAPES, planted
from pgcheck.statistics import sequential
from pgcheck.statistics.certificate import p_value, upper_bound
from pgcheck.statistics.finite import Law
from pgcheck.statistics.guarded import Floats, Scores, z_of
from pgcheck.statistics.panel import TWO_SIDED, WITNESSES, thresholds
from pgcheck.statistics.sequential import GRAIN, Judge, Settings
from pgcheck.statistics.stacked import Counts, Looks, certificates, drawn_counts, look
from pgcheck.statistics.status import Status

ONE_IN_1E8 = 1e-8


@cache
def law() -> Law:
    """Leave-one-out on a small chain."""
    return next(x for x in calibrate.laws() if x.name == "leave_one_out on chain/linear-policy")


def looks(runs: int, *, counts: Counts | None = None) -> Looks:
    """Many runs of one look, without a bias."""
    x = law()
    given = counts or drawn_counts(x, Settings(), runs, np.random.default_rng(7))
    return look(x, Settings(), given, bias=torch.zeros_like(x.mean))


def too_often(events: int, runs: int, nominal: float) -> bool:
    """More events than a rate of `nominal` would give once in 1e8."""
    return bool(stats.binom.sf(events - 1, runs, nominal) < ONE_IN_1E8)


def verdict(judge: type[Judge], *, bias: float, settings: Settings = Settings(looks=3), most: int = 2**15) -> Judge:  # noqa: B008
    """A whole judge on Gaussian draws of eight coordinates, `bias` along μ*."""
    mu = torch.ones(8, dtype=torch.float64) / math.sqrt(8)
    generator = torch.Generator().manual_seed(11)
    made = judge(mu, settings)
    while not made.decided and made.draws < most:
        made.update(mu * (1 + bias) + 3.0 * torch.randn(GRAIN, 8, generator=generator, dtype=torch.float64))
    return made


class Flipped(Judge):
    """The frozen direction has the wrong sign."""

    def _freeze(self, witness: int, sign: float) -> None:
        super()._freeze(witness, -sign)


def test_a_flipped_sign_is_noticed() -> None:
    for bias in (0.5, -0.5):
        assert verdict(Judge, bias=bias).verdict().status is Status.FAIL
        assert verdict(Flipped, bias=bias).verdict().status is not Status.FAIL


def test_a_forgotten_root_of_n_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test without √n passes everything."""
    sound = verdict(Judge, bias=0.5)
    assert sound.verdict().status is Status.FAIL
    monkeypatch.setattr(Scores, "error", property(lambda y: np.sqrt(y.m2 / max(y.n - 1, 1))))
    assert verdict(Judge, bias=0.5).verdict().status is not Status.FAIL


def test_a_root_of_n_forgotten_the_other_way_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error too small rejects everything."""
    x = looks(300)
    assert not too_often(int((x.confirming >= z_of(0.1)).sum()), x.confirming.size, 0.1)
    monkeypatch.setattr(Scores, "error", property(lambda y: np.sqrt(y.m2) / y.n / max(y.n - 1, 1)))
    x = looks(300)
    assert too_often(int((x.confirming >= z_of(0.1)).sum()), x.confirming.size, 0.1)


def alarms_of_par(at: Callable[[float], Floats]) -> tuple[int, int]:
    """How often the first witness alone alarms, when the six share .6, that is .1 for each."""
    x = looks(2000)
    return int((x.evidence[:, :, 0].max(1) >= at(0.6)[0]).sum()), len(x.evidence)


def test_one_sided_thresholds_for_a_two_sided_test_are_noticed() -> None:
    def one_sided(level: float) -> Floats:
        return np.full(len(WITNESSES), stats.norm.isf(level / len(WITNESSES)))

    assert not too_often(*alarms_of_par(thresholds), 0.1)
    assert too_often(*alarms_of_par(one_sided), 0.1)
    sides = [2.0] * TWO_SIDED + [1.0] * (len(WITNESSES) - TWO_SIDED)
    assert sides * stats.norm.sf(thresholds(0.03)) == pytest.approx([0.005] * len(WITNESSES))


def test_a_plug_in_certificate_is_noticed() -> None:
    """The variance of U at the estimated bias: noise that cancels the bias shrinks the estimate."""
    x, runs = law(), 2000
    λ, square = float(torch.linalg.eigvalsh(x.covariance)[-1]), float((x.covariance**2).sum())
    Δ = upper_bound(0.0, 1e-4, n=Settings().first_look, largest=λ, square=square)
    counts = drawn_counts(x, Settings(), runs, np.random.default_rng(7), parts=0)
    (got,) = certificates(x, counts, [planted(x, SHAPES[3], Δ)])

    def plug_in(U: float, Δ: float, *, n: int, largest: float, square: float) -> float:
        variance = 4 * max(U, 0.0) * largest / n + 2 * square / n**2
        return float(stats.norm.cdf((max(U, 0.0) - Δ**2) / math.sqrt(variance)))

    def passes(certificate: Callable[..., float]) -> int:
        each = zip(got.statistic, got.spectrum.largest, got.spectrum.trace_of_square, strict=True)
        return sum(certificate(U, Δ, n=got.along.n, largest=top, square=s) <= 1e-3 for U, top, s in each)

    assert not too_often(passes(p_value), runs, 1.3e-3)
    assert too_often(passes(plug_in), runs, 1.3e-3)


def test_a_confirmation_on_the_draws_that_triggered_is_noticed() -> None:
    x = law()
    fair = drawn_counts(x, Settings(), 1500, np.random.default_rng(7))
    whole = fair.gram.sum(0) + fair.known + fair.scored
    reused = replace(fair, fresh=whole.unsqueeze(0))
    honest, winning = (looks(1500, counts=c) for c in (fair, reused))
    assert not too_often(int((honest.confirming >= z_of(0.01)).sum()), honest.confirming.size, 0.01)
    assert too_often(int((winning.confirming >= z_of(0.01)).sum()), winning.confirming.size, 0.01)


class Reusing(Judge):
    """Scores of the trigger's last block go into every confirming part."""

    def _freeze(self, witness: int, sign: float) -> None:
        block = sequential.Scores(*(x if i == 0 else x.copy() for i, x in enumerate(vars(self._last_block).values())))
        super()._freeze(witness, sign)
        self._parts = [block[witness : witness + 1].times(sign) for _ in self._parts]

    def _learn(self) -> None:
        self._last_block = self._block
        super()._learn()


class Eager:
    """Triggers at every look, so that only the confirmation stands between no bias and a FAIL."""

    def _fires(self, ratio: float) -> bool:
        return True

    def _certified(self) -> bool:
        return False


def test_a_judge_that_keeps_the_trigger_in_its_confirmation_is_noticed() -> None:
    """Evidence of a trigger is selected to be large: kept, it lifts the z-scores that confirm nothing."""

    class Sound(Eager, Judge):
        pass

    class Mutant(Eager, Reusing):
        pass

    def confirming(kind: type[Judge]) -> list[float]:
        out: list[float] = []
        mu = torch.ones(8, dtype=torch.float64)
        for seed in range(40):
            generator = torch.Generator().manual_seed(seed)
            judge = kind(mu, Settings(looks=1))
            while judge.draws < 8192:
                x = mu + torch.randn(GRAIN, 8, generator=generator, dtype=torch.float64)
                if judge.draws == 7168:
                    judge._confirm = lambda j=judge: out.extend(j._confirming_z())  # type: ignore[method-assign]
                judge.update(x)
        return out

    # the mean of 80 independent z-scores has standard error .11; 5.6 of them are 1 in 1e8
    assert abs(np.mean(confirming(Sound))) < 5.6 / math.sqrt(80)
    assert np.mean(confirming(Mutant)) > 5.6 / math.sqrt(80)


class Uncertified(Judge):
    """Never passes, so that its triggers are seen."""

    def _certified(self) -> bool:
        return False


class KeepsTheSize(Uncertified):
    """Mode `exceeds`: |C| of the shifted scores."""

    def _evidence(self) -> Floats:
        C = super()._evidence()
        C[:, :TWO_SIDED] = np.abs(C[:, :TWO_SIDED])
        return C


def test_the_absolute_value_after_the_shift_is_noticed() -> None:
    settings = Settings(mode="exceeds", rtol=0.5, looks=3)
    sound, mutant = (verdict(kind, bias=0.0, settings=settings, most=4096) for kind in (Uncertified, KeepsTheSize))
    assert sound._last < 0
    assert mutant._last >= 0
    assert WITNESSES[mutant._last] in ("par", "parw")
