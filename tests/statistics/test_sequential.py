"""The judge: verdicts on planted biases, what it prints, checkpoints, bad input."""

from __future__ import annotations

import math
from dataclasses import astuple

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from pgcheck.errors import NotFiniteError, UsageError
from pgcheck.statistics.open_scale import OpenJudge
from pgcheck.statistics.sequential import GRAIN, Judge, Judgement, Settings, confidence_after
from pgcheck.statistics.status import Status


def reference(P: int) -> Tensor:
    """A unit vector."""
    x = torch.linspace(-1, 2, P, dtype=torch.float64).sin() + 0.1
    return x / x.norm()


def stream(P: int, *, mean: Tensor, noise: float, seed: int = 0):
    """Grains of Gaussian draws with √tr Cov = `noise`."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield mean + noise / math.sqrt(P) * torch.randn(GRAIN, P, generator=generator, dtype=torch.float64)


def judged(judge: Judge, draws, *, most: int = 2**21) -> Judgement:
    """Feed until decided."""
    for x in draws:
        judge.update(x)
        if judge.decided or judge.draws >= most:
            return judge.verdict()
    raise AssertionError


def across(mu: Tensor) -> Tensor:
    """A unit vector orthogonal to `mu`."""
    x = torch.ones_like(mu)
    x -= mu * (mu @ x)
    return x / x.norm()


SHAPES = {
    "none": lambda mu: 0 * mu,
    "scale": lambda mu: -0.3 * mu,
    "dense": lambda mu: 0.3 * across(mu),
    "one": lambda mu: 0.3 * torch.nn.functional.one_hot(torch.tensor(3), len(mu)).to(mu),
}


@pytest.mark.parametrize("mode", ["nonzero", "exceeds"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_planted_bias_is_found_and_none_is_certified(shape: str, mode: str) -> None:
    mu = reference(24)
    judge = Judge(mu, Settings(mode=mode))  # type: ignore[arg-type]
    v = judged(judge, stream(24, mean=mu + SHAPES[shape](mu), noise=6.0))
    assert v.status is (Status.PASS if shape == "none" else Status.FAIL)
    assert v.missed <= 0.05 if shape == "none" else v.effect is not None and 0.1 < v.effect.value < 0.35


@pytest.mark.parametrize("mode", ["nonzero", "exceeds"])
@pytest.mark.parametrize("factor", [0.4, 1.0])
def test_an_open_scale_passes_whatever_it_is(mode: str, factor: float) -> None:
    mu = reference(24)
    v = judged(Judge(mu, Settings(mode=mode), scale=None), stream(24, mean=factor * mu, noise=2.0))  # type: ignore[arg-type]
    assert v.status is Status.PASS
    assert v.scale.low < factor < v.scale.high


@pytest.mark.parametrize("mode", ["nonzero", "exceeds"])
@pytest.mark.parametrize(("along", "aside"), [(0.7, 0.3), (-0.7, 0.0)])
def test_an_open_scale_fails_off_axis_and_backwards(mode: str, along: float, aside: float) -> None:
    mu = reference(24)
    judge = Judge(mu, Settings(mode=mode), scale=None)  # type: ignore[arg-type]
    v = judged(judge, stream(24, mean=along * mu + aside * across(mu), noise=4.0))
    assert v.status is Status.FAIL


def test_a_wrong_fixed_scale_fails() -> None:
    mu = reference(24)
    v = judged(Judge(mu, Settings(), scale=0.75), stream(24, mean=mu, noise=4.0))
    assert v.status is Status.FAIL
    assert judged(Judge(mu, Settings(), scale=0.75), stream(24, mean=0.75 * mu, noise=4.0)).status is Status.PASS


@pytest.mark.parametrize("at", [1, 4, 5, 9])
@pytest.mark.parametrize("scale", [1.0, None])
def test_resumed_from_its_state_a_judge_says_the_same(at: int, scale: float | None) -> None:
    mu = reference(7)
    grains = [x for x, _ in zip(stream(7, mean=mu * 0.8 + 0.1, noise=5.0), range(16), strict=False)]
    whole = Judge(mu, Settings(), scale=scale)
    part = Judge(mu, Settings(), scale=scale)
    for i, x in enumerate(grains):
        whole.update(x)
        if i == at:
            part = Judge.from_state(mu, Settings(), state=part.state(), scale=scale)
        part.update(x)
    a, b = whole.state(), part.state()
    assert a.keys() == b.keys()
    assert all(a[k].numpy().tobytes() == b[k].numpy().tobytes() for k in a)
    assert repr(whole.verdict()) == repr(part.verdict())


@pytest.mark.parametrize(
    ("alpha", "first", "rarest"),
    [(1e-6 / 1024, 4096, None), (1e-4, 2048, None), (1e-9, 10_000, None), (1e-3, 1024, 1e-3)],
)
def test_grains_are_taken_together_up_to_where_something_happens(
    alpha: float, first: int, rarest: float | None
) -> None:
    """To the looks, where directions are learned, and the ends of confirming parts, and over none of them."""
    s = Settings(alpha=alpha, first=first, rarest=rarest)
    looks = [s.first_look // GRAIN * 2**k for k in range(8)]
    parts = [n + n * j // (s.stages - 1) for n in looks for j in range(1, s.stages)]
    stops = sorted({max(1, looks[0] // 4), *looks, *parts})
    for grain in range(looks[-1]):
        ahead = next(x for x in stops if x > grain) - grain
        assert [s.grains_at_once(grain, most) for most in (1, 3, 10**9)] == [1, min(3, ahead), ahead]


@pytest.mark.parametrize("what", ["fails", "passes", "open", "bounded", "beside a reference", "an open one beside it"])
def test_grains_that_are_taken_together_are_judged_as_one_by_one(what: str) -> None:
    """The same decisions after the same draws; sums are the same to rounding."""
    mu, κ = reference(7), None if what in ("open", "an open one beside it") else 1.0
    bounds = (-40.0, 40.0) if what == "bounded" else None
    s, paired = Settings(rtol=0.2, bounds=bounds), "beside" in what
    bias = 0.0 if what == "passes" else 0.1
    grains = [x for x, _ in zip(stream(7, mean=mu + bias, noise=5.0), range(64), strict=False)]
    other = [x for x, _ in zip(stream(7, mean=mu, noise=1.0, seed=1), range(64), strict=False)]
    kind = OpenJudge if what == "an open one beside it" else Judge
    single, together = kind(mu, s, scale=κ), kind(mu, s, scale=κ)
    for x, r in zip(grains, other, strict=True):
        single.update(x, r if paired else None)
    at = 0
    while at < 64:
        size = s.grains_at_once(at, 8)
        x, r = (torch.cat(part[at : at + size]) for part in (grains, other))
        together.update(x, r if paired else None)
        at += size
    assert single.decided
    assert together.draws == single.draws
    a, b = single.verdict(), together.verdict()
    assert (a.status, a.witness, a.note, a.needed) == (b.status, b.witness, b.note, b.needed)
    assert a.status is (Status.PASS if what == "passes" else Status.FAIL)
    numbers = [(v.rel, v.missed, *astuple(v.scale), *astuple(v.variance)) for v in (a, b)]
    assert numbers[0] == pytest.approx(numbers[1], rel=1e-9, nan_ok=True)
    for name, x in single.state().items():
        one, same = x.nan_to_num(), together.state()[name].nan_to_num()
        largest = float(one.abs().max()) if one.numel() else 0.0
        assert torch.allclose(one, same, rtol=1e-9, atol=1e-9 * (1 + largest)), name


def test_a_nan_is_named_by_its_draw() -> None:
    mu = reference(5)
    judge = Judge(mu, Settings())
    grains = stream(5, mean=mu, noise=1.0)
    judge.update(next(grains))
    x = next(grains)
    x[17, 2] = math.nan
    with pytest.raises(NotFiniteError, match="draw 1041 "):
        judge.update(x)


def test_identical_draws_get_no_verdict() -> None:
    mu = reference(5)
    judge = Judge(mu, Settings(looks=2))
    v = judged(judge, iter([mu.expand(GRAIN, 5).clone() * 1.1] * 20), most=16 * GRAIN)
    assert v.status is Status.INCONCLUSIVE
    assert v.note == "constant"
    assert v.needed is None


def test_two_samples_on_the_same_random_numbers() -> None:
    mu = reference(6)
    generator = torch.Generator().manual_seed(3)
    judge = Judge(mu * 1.3, Settings())  # the reference itself is off; only the draws of it count
    while not judge.decided:
        r = mu + 10 * torch.randn(GRAIN, 6, generator=generator, dtype=torch.float64)
        judge.update(r + 0.5 * torch.randn(GRAIN, 6, generator=generator, dtype=torch.float64), r)
    assert judge.verdict().status is Status.PASS
    assert judge.draws <= 16384


@pytest.mark.parametrize(
    "change", [{"rtol": 0.0}, {"alpha": 0.0}, {"beta": 1.0}, {"first": 64}, {"mode": "both"}, {"rarest": 2.0}]
)
def test_settings_that_say_nothing_are_refused(change: dict) -> None:
    with pytest.raises(UsageError, match=next(iter(change))):
        Settings(**change)


def test_references_that_say_nothing_are_refused() -> None:
    zero = torch.zeros(3, dtype=torch.float64)
    with pytest.raises(UsageError, match="atol"):
        Judge(zero, Settings())
    v = judged(Judge(zero, Settings(atol=0.1)), stream(3, mean=zero, noise=1.0))
    assert v.status is Status.PASS
    assert math.isnan(v.rel)
    with pytest.raises(UsageError, match="a grain"):
        Judge(reference(3), Settings()).update(torch.zeros(GRAIN, 4))


def test_the_numbers_are_those_of_the_whole_sample() -> None:
    """U, variance, scale and the scores along μ*, from all draws at once by numpy."""
    mu = reference(9)
    grains = [x for x, _ in zip(stream(9, mean=mu + 0.2, noise=3.0), range(8), strict=False)]
    judge = Judge(mu, Settings())
    for x in grains:
        judge.update(x)
    v = judge.verdict()
    x = np.concatenate([g.numpy() for g in grains])
    d = x - mu.numpy()
    n = len(x)
    gram_sum = d.sum(0) @ d.sum(0) - (d**2).sum()
    assert v.bias == pytest.approx(math.sqrt(gram_sum / n / (n - 1)), rel=1e-9)
    assert v.variance.value == pytest.approx(np.trace(np.cov(x.T)), rel=1e-9)
    y = d @ mu.numpy()
    assert v.scale.value == pytest.approx(1 + y.mean(), rel=1e-9)
    c = y - y.mean()
    assert v.tails.skewness_of_mean == pytest.approx((c**3).mean() / (c**2).mean() ** 1.5 / math.sqrt(n), rel=1e-6)
    assert v.tails.largest_share == pytest.approx((c**2).max() / (c**2).sum(), rel=1e-9)


def ends_of_runs(ratio: float, confidence: list[float], *, runs: int, seed: int) -> tuple[int, int]:
    """Intervals that miss, and runs that end in a FAIL, of a normal score of mean `ratio` and variance 1, by its sums alone.

    Looks at 4096 · 2^k; one test at z = 3 triggers, one on as many fresh draws at z = 3 confirms.
    """
    rng = np.random.default_rng(seed)
    n, total = 4096, ratio * 4096 + 64 * rng.standard_normal(runs)
    missed = ended = 0
    for look in range(len(confidence) - 1):
        fresh = ratio * n + math.sqrt(n) * rng.standard_normal(len(total))
        stops = (total >= 3 * math.sqrt(n)) & (fresh >= 3 * math.sqrt(n))
        total = total + fresh
        n *= 2
        off = np.abs(total[stops] / n - ratio) * math.sqrt(n)
        missed += int((off > stats.norm.isf((1 - confidence[look + 1]) / 2)).sum())
        ended += int(stops.sum())
        total = total[~stops]
    return missed, ended


def test_intervals_pay_for_the_looks_at_which_a_run_may_stop() -> None:
    """A run that stops early has found too much: intervals that do not mind miss more often than they say."""
    settings = Settings()
    spent = [confidence_after(4096 * 2**k, settings) for k in range(8)]
    assert sum(1 - x for x in spent) < 0.05
    assert confidence_after(1024, settings) == spent[0] == pytest.approx(0.975)
    assert confidence_after(4097, settings) == spent[1] == pytest.approx(1 - 0.05 / 6)
    plain, ended = ends_of_runs(0.025, [0.95] * 8, runs=40_000, seed=0)
    assert ended > 39_000
    assert stats.binom.sf(plain - 1, ended, 0.05) < 1e-8
    honest, ended = ends_of_runs(0.025, spent, runs=40_000, seed=0)
    assert stats.binom.sf(honest - 1, ended, 0.05) > 1e-8
    assert stats.binom.cdf(honest, ended, 0.05) < 1e-8
