"""E x = κ g for some κ, g drawn as well: the interval of κ and what it leaves unexplained against dense grids, the cone that a
certificate rests on, verdicts on laws whose truth is known, and a judge that goes on from its state."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from pgcheck.calibrate import NOMINAL, estimator_law, laws_named, open_rates
from pgcheck.calibrate.open_scale import FirstLook, first_look, open_passes, open_triggers
from pgcheck.errors import NotFiniteError, UsageError
from pgcheck.statistics.certificate import upper_bound
from pgcheck.statistics.guarded import MARGIN, Floats
from pgcheck.statistics.open_scale import OpenJudge, scales_left, turned_round, unexplained
from pgcheck.statistics.sequential import GRAIN, Judge, Settings
from pgcheck.statistics.status import Status
from pgcheck.statistics.variance import Pairs

LIGHT = Settings(alpha=1e-4, first=2_048, looks=6)
P = 6
G = torch.cos(torch.arange(P, dtype=torch.float64))
ACROSS = torch.nn.functional.one_hot(torch.tensor(2), P).to(torch.float64)
ACROSS = (ACROSS - G * (ACROSS @ G) / (G @ G)) / (ACROSS - G * (ACROSS @ G) / (G @ G)).norm()


def z_of_plain(y: Floats) -> float:
    """The guarded z-score, written again: the smaller of t and Hall's."""
    n, mean, sd = len(y), y.mean(), y.std()
    T = mean / (MARGIN * sd / math.sqrt(n - 1))
    a = ((y - mean) ** 3).mean() / sd**3 / math.sqrt(n)
    H = T + a * T**2 / 3 + a**2 * T**3 / 27 + a / 6
    if T * H <= 0 or abs(a) >= 0.1 or np.abs(y - mean).max() ** 2 >= 0.05 * n * sd**2:
        return 0.0
    return float(math.copysign(stats.norm.isf(stats.t.sf(min(abs(T), abs(H)), n - 1)), T))


def drawn(seed: int, *, n: int = 2_000, shared: float = 0.7) -> tuple[Floats, Floats, Floats, Floats]:
    """⟨x, û⟩, ⟨r, û⟩, ⟨x, v⟩, ⟨r, v⟩ of skewed noise, with κ about ½."""
    rng = np.random.default_rng(seed)
    e, f = rng.gamma(16.0, size=(2, 2, n)) / 4 - 4.0
    b, d = 0.3 + e[0], 0.1 * rng.standard_normal() + e[1]
    a = 0.15 + 0.5 * (shared * e[0] + f[0])
    return a, b, 0.3 * rng.standard_normal() + 0.5 * (shared * e[1] + f[1]), d


@given(st.integers(0, 10_000), st.sampled_from([1e-1, 1e-2, 1e-4]))
def test_what_is_left_of_a_scale(seed: int, level: float) -> None:
    """Against a dense grid: the test rejects just outside and nowhere inside."""
    a, b, *_ = drawn(seed)
    places = scales_left(Pairs.of(a, b), level)
    if places is None:  # far away it does not reject, as b's own mean may be 0
        assert abs(z_of_plain(b)) < stats.norm.isf(level / 2) + 0.01
        return
    z = stats.norm.isf(level / 2)
    for κ in np.geomspace(places[0] * 1.001, places[-1] * 0.999, 50):
        assert abs(z_of_plain(a - κ * b)) < z
    for κ in (places[0] * 0.999, places[-1] * 1.001):
        assert abs(z_of_plain(a - κ * b)) > z


@given(st.integers(0, 10_000))
def test_what_no_scale_explains(seed: int) -> None:
    """The least z-score of nine places is that of two thousand."""
    a, b, c, d = drawn(seed)
    places = scales_left(Pairs.of(a, b), 1e-3)
    up, down = unexplained(Pairs.of(c, d), places, (0.0, 0.0))
    if places is None:
        assert (up, down) == (0.0, 0.0)
        return
    dense = np.array([z_of_plain(c - κ * d) for κ in np.geomspace(places[0], places[-1], 100)]).clip(-37.04, 37.04)
    assert up == pytest.approx(max(dense.min(), 0.0), abs=0.02)
    assert down == pytest.approx(max((-dense).min(), 0.0), abs=0.02)


@given(st.integers(0, 10_000), st.floats(0.01, 2.0), st.floats(0.01, 10.0), st.floats(0.0, 0.5))
def test_what_is_far_across_is_far_from_every_multiple(seed: int, δ: float, κ: float, atol: float) -> None:
    """The cone: an E x, δ times as long across g as along it, plus atol, is (δ κ ‖g‖ + atol)/√(1 + δ²) from κ g at least."""
    rng = np.random.default_rng(seed)
    g = rng.standard_normal(4)
    along = rng.standard_normal() * 2  # ⟨E x, g⟩/‖g‖², also below 0
    across = rng.standard_normal(4)
    across -= g * (across @ g) / (g @ g)
    size = np.linalg.norm(g)
    across *= (δ * max(along, 0.0) * size + atol) * (1 + rng.exponential()) / np.linalg.norm(across)
    gap = np.linalg.norm(along * g + across - κ * g)
    assert gap >= (δ * κ * size + atol) / math.hypot(1.0, δ) * (1 - 1e-12)


def test_a_turned_estimator_has_no_scale() -> None:
    a, b, *_ = drawn(1, n=4_000)
    assert turned_round(Pairs.of(-a, b)) > 3
    assert turned_round(Pairs.of(a, b)) == 0
    assert turned_round(Pairs.of(-a, b)) == pytest.approx(min(z_of_plain(a), z_of_plain(b)), rel=1e-9)


def grains(κ: float, off: float, seed: int, *, noise: float = 1.0) -> Any:
    """Pairs with E x = κ (g + off · ‖g‖ · across) and E r = g; x has most of the noise of r."""
    rng = torch.Generator().manual_seed(seed)

    def normal() -> Tensor:
        return noise * torch.randn(GRAIN, P, generator=rng, dtype=torch.float64)

    while True:
        z = normal()
        yield κ * (G + off * float(G.norm()) * ACROSS) + abs(κ) * (0.8 * z + 0.6 * normal()), G + z


def judged(κ: float, off: float, seed: int, settings: Settings = LIGHT, turned: float = 0.2) -> OpenJudge:
    û = G / G.norm() + turned * ACROSS.roll(1)
    judge = OpenJudge(û * float(G.norm()) / û.norm(), settings)
    for x, r in grains(κ, off, seed):
        judge.update(x, r)
        if judge.decided:
            return judge
    raise AssertionError


@pytest.mark.parametrize("κ", [0.25, 3.0])
@pytest.mark.parametrize(
    ("off", "status"), [(0.0, Status.PASS), (0.01, Status.PASS), (0.2, Status.FAIL), (1.0, Status.FAIL)]
)
def test_verdicts(κ: float, off: float, status: Status) -> None:
    """With what is said of κ and of the part across g, three seeds each: fixed, their outcomes are facts."""
    for seed in range(3):
        v = judged(κ, off, seed).verdict()
        assert v.status is status
        assert v.off_axis.low <= off / math.hypot(1, off) <= v.off_axis.high
        assert v.rel == pytest.approx(off, abs=0.25 * off + 0.02)
        if off == 0:
            assert v.scale.low < κ < v.scale.high
        if status is Status.PASS:
            assert v.missed <= LIGHT.rtol * (1 + 1e-9)
        else:
            assert v.effect is not None
            assert 0 < v.effect.low < v.effect.value < v.effect.high


def test_a_negative_scale_fails() -> None:
    for seed in range(3):
        v = judged(-0.5, 0.0, seed).verdict()
        assert (v.status, v.witness) == (Status.FAIL, "par")


def test_without_a_signal_nothing_is_said() -> None:
    """Noise a hundred times ‖g‖: κ is not bounded, so nothing can be off it."""
    judge = OpenJudge(G, Settings(alpha=1e-4, first=2_048, looks=2))
    for x, r in grains(0.5, 5.0, 0, noise=200.0):
        judge.update(x, r)
        if judge.decided:
            break
    v = judge.verdict()
    assert v.status is Status.INCONCLUSIVE
    assert v.needed is None or v.needed > v.draws


def test_the_certificate_is_that_of_a_judge_whose_scale_was_fixed_before() -> None:
    """β spent once, on the draws after the first quarter of the first look, at their ratio along û."""
    settings = Settings(rtol=0.2, alpha=1e-4, first=4_096)
    source = grains(0.5, 0.0, 5)
    pairs = [next(source) for _ in range(4)]
    judge = OpenJudge(G, settings)
    for x, r in pairs:
        judge.update(x, r)
    κ0 = float(pairs[0][0].sum(0) @ G) / float(pairs[0][1].sum(0) @ G)
    # 3 072 draws are no look of a Judge's own, so U is made here, and its law read off
    d = torch.cat([x - κ0 * r for x, r in pairs[1:]])
    U = (float(d.sum(0).square().sum()) - float(d.square().sum())) / (len(d) * (len(d) - 1))
    block = judge._before
    assert block is not None
    assert block.scale == pytest.approx(κ0, rel=1e-12)
    assert block._statistic() == pytest.approx(U, rel=1e-9)
    assert block._allowed == pytest.approx(κ0 * float(G.norm()) * math.sin(math.atan(0.2)), rel=1e-12)
    assert isinstance(block, Judge)


def test_a_judge_goes_on_from_its_state() -> None:
    """To the same bytes, cut off after every grain of a run that triggers and confirms."""
    source = grains(0.5, 0.2, 0)
    pairs = [next(source) for _ in range(16)]
    whole = OpenJudge(G, LIGHT)
    cut = OpenJudge(G, LIGHT)
    for x, r in pairs:
        whole.update(x, r)
        cut.update(x, r)
        cut = OpenJudge.from_state(G, LIGHT, state={k: t.clone() for k, t in cut.state().items()})
        assert repr(cut.verdict()) == repr(whole.verdict())
    assert whole.decided
    assert whole.verdict().status is Status.FAIL
    with pytest.raises(UsageError, match="another reference"):
        OpenJudge.from_state(G[:3], LIGHT, state=whole.state())


def false_alarms(seed: int, scales: Callable[[Pairs, float], Floats | None]) -> int:
    """Of 200 confirmations at nominal 1/10, E x = ½ g: û is five times as noisy as the witness, and both see as much of g."""
    rng, alarms = np.random.default_rng(seed), 0
    for _ in range(200):
        e, f = rng.standard_normal((2, 2, 500)) * np.array([5.0, 1.0]).reshape(2, 1)
        (a, b), (c, d) = ((0.5 * (2.0 + x) + 0.3 * y, 2.0 + x) for x, y in zip(e, f, strict=True))
        places = scales(Pairs.of(a, b), 0.02)
        alarms += unexplained(Pairs.of(c, d), places, (0.0, 0.0))[0] >= stats.norm.isf(0.08)
    return alarms


def test_false_alarms_and_the_mutant_that_trusts_one_scale() -> None:
    """No more of them than nominal; with κ taken to be its estimate its error looks like a bias."""
    assert stats.binom.sf(false_alarms(1, scales_left) - 1, 200, 0.1) > 1e-8
    mutant = false_alarms(1, lambda along, level: np.array([along.mean[0] / along.mean[1]]))
    assert stats.binom.sf(mutant - 1, 200, 0.1) < 1e-8


def test_a_slice_of_the_calibration() -> None:
    law = estimator_law("leave_one_out", "chain/linear-policy", family="light")
    rates = open_rates(law, runs=60, rng=np.random.default_rng(1))
    assert {(r.nominal, r.detail) for r in rates} == {(τ, f"‖g‖ {k} standard errors") for τ in NOMINAL for k in (8, 30)}
    for r in rates:
        assert stats.binom.sf(r.events - 1, r.runs, r.nominal) > 1e-8


class FirstLookOnly(OpenJudge):
    """Stops at its first look, before anything is decided."""

    def _look(self) -> None:
        self.decided = True

    def evidence(self, level: float) -> Floats:
        """The strongest of both sides, of each witness."""
        return self._evidence(level).max(0)


@pytest.mark.parametrize(
    "name", ["leave_one_out on chain", "Gaussian values, P = 32", "log-normal weights, σ = 1, P = 2"]
)
def test_a_first_look_is_that_of_the_judge(name: str) -> None:
    """What the calibration makes of all draws at once is what the judge makes of four grains, without a bias and with one."""
    (law,), rng = laws_named([name]), np.random.default_rng(2)
    n, δ, noise, g = Settings().first_look, 0.3, law.values - law.mean, 3.0 * law.mean
    û = g / g.norm() + 0.4 * noise[0] / noise[0].norm()
    û = û / û.norm()
    for off in (0.0, 0.0, 0.7):
        i, j = (torch.from_numpy(rng.choice(len(noise), n, p=law.probability)) for _ in range(2))
        x = 0.5 * (g + 0.8 * noise[i] + 0.6 * noise[j]) + off * float(g.norm()) * noise[1] / noise[1].norm()
        r = g + noise[i]
        look, judge = first_look(x, r, û), FirstLookOnly(û * float(g.norm()), Settings(rtol=δ))
        for a, b in zip(x.split(GRAIN), r.split(GRAIN), strict=True):
            judge.update(a, b)
        for τ in NOMINAL:
            assert look.evidence(τ) == pytest.approx(judge.evidence(τ), rel=1e-6, abs=1e-6)
        block = judge._block
        assert block is not None
        assert look.scale == pytest.approx(block.scale, rel=1e-12)
        size = look.scale * float(g.norm()) * δ / math.hypot(1.0, δ)
        assert block._allowed == pytest.approx(size, rel=1e-12)
        for τ in (0.4, 0.1, 1e-3):
            p, law_of = -1.0, block._law(block._whole, τ)
            if not bool(block._ever.refused[[0, 2]].any()):
                p = block._certificate(block._statistic(), size, **law_of)
            assert look.refused == (p < 0)
            assert look.passes(size, τ) == (0 <= p <= τ)
            for Δ in (0.8, 1.25):  # just there its p-value is the level
                if p > 0:
                    bound = upper_bound(block._statistic(), τ, **law_of)
                    assert look.passes(Δ * bound, τ) == (Δ > 1)


def test_a_slice_of_both_other_stages() -> None:
    """Each bound fails with probability < 1e-8 if the rate is nominal or below."""
    law = estimator_law("leave_one_out", "chain/linear-policy", family="light")
    alarms = open_triggers(law, runs=60, rng=np.random.default_rng(1))
    passes = open_passes(law, runs=150, rng=np.random.default_rng(1))
    assert len(alarms) == 2 * len(NOMINAL)
    assert len(passes) == 4 * len(NOMINAL)
    for r in (*alarms, *passes):
        assert stats.binom.sf(r.events - 1, r.runs, r.nominal) > 1e-8
    assert sum(r.events for r in passes) > 0  # it is not hiding behind a wide margin


def test_a_certificate_that_forgets_the_cone_passes_too_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the tolerance, not of the sine of its angle, far more than nominal pass where the angle is wide."""
    law = estimator_law("leave_one_out", "chain/linear-policy", family="light")
    sound = first_look

    def wide(x: Tensor, r: Tensor, û: Tensor) -> FirstLook:
        look = sound(x, r, û)
        return replace(look, scale=look.scale * math.hypot(1.0, 0.5))

    monkeypatch.setattr("pgcheck.calibrate.open_scale.first_look", wide)
    at_a_tenth, *_ = open_passes(law, runs=1_000, rng=np.random.default_rng(1), rtols=[0.5])
    assert stats.binom.sf(at_a_tenth.events - 1, at_a_tenth.runs, at_a_tenth.nominal) < 1e-8


def test_bad_input() -> None:
    with pytest.raises(UsageError, match="only 'nonzero' can be judged"):
        OpenJudge(G, Settings(mode="exceeds"))
    with pytest.raises(UsageError, match="one that is given is for a Judge"):
        OpenJudge(G, LIGHT, scale=1.0)
    with pytest.raises(UsageError, match="its norm must be"):
        OpenJudge(0 * G, LIGHT)
    judge = OpenJudge(G, LIGHT)
    x, r = next(grains(1.0, 0.0, 0))
    with pytest.raises(UsageError, match="draws: 0"):
        judge.verdict()
    with pytest.raises(UsageError, match="reference_draws: shape None"):
        judge.update(x)
    with pytest.raises(UsageError, match=r"draws: shape \[3, 6\]"):
        judge.update(x[:3], r)
    judge.update(x, r)
    r[7, 1] = math.nan
    with pytest.raises(NotFiniteError, match="draw 1031"):
        judge.update(x, r)
