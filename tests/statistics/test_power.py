"""Designs: the constants of the formula, and that judges do stop where the design says."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from pgcheck.errors import UsageError
from pgcheck.statistics.power import (
    Noise,
    certifiable_bias,
    constant,
    design,
    detectable_bias,
    looks,
    min_draws_for_fail,
    min_draws_for_pass,
)
from pgcheck.statistics.sequential import GRAIN, Judge, Settings
from pgcheck.statistics.status import Status


@pytest.mark.parametrize(("r_eff", "c"), [(1, 23), (10, 13), (100, 8.5), (1e4, 6.3)])
def test_the_constant_of_the_certificate(r_eff: float, c: float) -> None:
    """23, 13, 8.5, 6.3 were measured with looks that double, which costs √2 in the median."""
    assert math.sqrt(2) * constant(r_eff) == pytest.approx(c, rel=0.04)


def test_the_constants_at_both_ends_in_closed_form() -> None:
    """Rank one: P((Δ + A Z)² ≤ A²) = Φ(1 − Δ/A) up to 1e-7, so that Δ/A = 1 + z. Many directions: Δ² = z B."""
    z = stats.norm.isf(1e-3)
    assert constant(1) == pytest.approx((1 + z) ** 2, rel=2e-3)
    assert constant(1e10) == pytest.approx(z * math.sqrt(2), rel=2e-3)


def test_noise_of_a_covariance() -> None:
    mu = torch.tensor([3.0, 4.0], dtype=torch.float64)
    noise = Noise.of(torch.diag(torch.tensor([4.0, 12.0], dtype=torch.float64)), mu)
    assert noise.nsr == pytest.approx(4 / 5)
    assert noise.r_eff == pytest.approx(256 / 160)
    assert noise.top == pytest.approx(0.75)
    assert noise.along == pytest.approx((0.36 * 4 + 0.64 * 12) / 16)


def gaussian_judge(noise: Noise, P: int, bias: float, settings: Settings, seed: int) -> Judge:
    """On Gaussian draws of P equally loud directions."""
    generator = torch.Generator().manual_seed(seed)
    mu = torch.zeros(P, dtype=torch.float64)
    mu[0] = 1.0
    judge = Judge(mu, settings)
    while not judge.decided:
        judge.update(
            mu * (1 + bias) + noise.nsr / math.sqrt(P) * torch.randn(GRAIN, P, generator=generator, dtype=torch.float64)
        )
    return judge


def test_judges_stop_where_the_design_says() -> None:
    """In 6 runs each, the median is at the look named or next to it."""
    settings = Settings(looks=8)
    noise = Noise.flat(6.0, 16.0)
    named = min_draws_for_pass(noise, settings)
    got = [gaussian_judge(noise, 16, 0.0, settings, seed) for seed in range(6)]
    assert all(j.verdict().status is Status.PASS for j in got)
    assert named is not None
    assert named / 2 <= np.median([j.draws for j in got]) <= 2 * named
    noise = Noise.flat(20.0, 16.0)
    named = min_draws_for_fail(noise, 0.2, settings)
    assert named is not None
    got = [gaussian_judge(noise, 16, 0.2, settings, seed) for seed in range(6)]
    assert all(j.verdict().status is Status.FAIL for j in got)
    assert named / 2 <= np.median([j.draws for j in got]) <= 2 * named


def test_what_a_budget_shows_is_what_takes_that_budget() -> None:
    settings, noise = Settings(), Noise(8.0, 30.0, 0.1, 0.05)
    for n in looks(settings)[1:]:
        shown = detectable_bias(noise, n, settings)
        assert min_draws_for_fail(noise, shown * 1.001, settings) == n
        met = certifiable_bias(noise, n, settings)
        assert min_draws_for_pass(noise, replace(settings, rtol=met * 1.001)) == n
    assert detectable_bias(noise, 4096, settings) == math.inf


def test_budgets_below_the_first_look_name_the_least() -> None:
    with pytest.raises(UsageError, match="4096 for a PASS and 8192"):
        design(Noise.flat(3.0, 4.0), Settings(), budget=100)
