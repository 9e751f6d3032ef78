"""The certificate against simulation of the law that it assumes, and against closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from pgcheck.statistics.certificate import GRAM, Spectrum, draws_to_certify, of_block, p_value, stretch, upper_bound

LAWS = {  # eigenvalues of Σ
    "rank one": [4.0],
    "one loud": [4.0, *[0.01] * 50],
    "flat": [0.1] * 64,
    "falling": [1 / (i + 1) for i in range(40)],
}


@pytest.mark.parametrize("name", LAWS)
def test_the_probability_is_that_of_the_quadratic_form(name: str) -> None:
    """U of Gaussian D with the bias along the first axis: U = Σ_i λ_i/n (Z_i + δ_i)² − tr Σ/n.

    p is not below the simulated rate by more than 4 standard errors and 8%, nor above it by more than 30%: Z′ stands for a
    sum of squares, whose lower tail is thinner.
    """
    λ, n, runs = np.array(LAWS[name]), 4096, 100_000
    rng = np.random.default_rng(0)
    top, square = λ.max(), (λ**2).sum()
    Δ = upper_bound(0.0, 0.01, n=n, largest=top, square=square)
    U = (Δ + math.sqrt(top / n) * rng.standard_normal(runs)) ** 2 - λ.sum() / n
    for rest in λ[1:]:
        U += rest / n * rng.standard_normal(runs) ** 2
    for level in (0.05, 0.02):
        at = float(np.quantile(U, level))
        if at < 0:
            continue
        error = math.sqrt(level / runs)
        p = p_value(at, Δ, n=n, largest=top, square=square)
        assert 0.92 * level - 4 * error <= p <= 1.3 * level + 4 * error


def test_rank_one_in_closed_form() -> None:
    A = 0.1
    for U, Δ in ((0.0, 0.5), (0.3, 0.7), (0.01, 0.2)):
        root = math.sqrt(U + A**2)
        expected = stats.norm.cdf((root - Δ) / A) - stats.norm.cdf((-root - Δ) / A)
        assert p_value(U, Δ, n=100, largest=1.0, square=1.0) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("share", [1e-8, 1e-4, 0.01, 0.3, 0.9, 1 - 1e-9])
def test_it_does_not_matter_which_variable_is_integrated_first(share: float) -> None:
    """λ from none to all of √tr Σ²: by direct integration over both on a fine grid."""
    n, square, Δ, U = 1000, 2.0, 0.15, 0.004
    largest = math.sqrt(share * square)
    A, B = math.sqrt(largest / n), math.sqrt(2 * (square - largest**2)) / n
    z = (np.arange(3000) + 0.5) / 3000
    z = stats.norm.ppf(z)
    brute = float(((Δ + A * z[:, None]) ** 2 - A**2 + B * z <= U).mean())
    assert p_value(U, Δ, n=n, largest=largest, square=square) == pytest.approx(brute, abs=2e-3)


def test_of_arrays_it_is_that_of_each_number() -> None:
    """In every regime: smooth over Z′, smooth over Z, and without noise."""
    U, largest, square = (
        np.array([0.004, 0.001, -1.0, 0.02]),
        np.array([0.7, 1e-6, 0.0, 0.0]),
        np.array([2.0, 5.0, 0.0, 0.0]),
    )
    together = p_value(U, 0.1, n=500, largest=largest, square=square, stretch=1.2)
    each = [
        p_value(*x[:1], 0.1, n=500, largest=x[1], square=x[2], stretch=1.2)
        for x in zip(U, largest, square, strict=True)
    ]
    assert together == pytest.approx(each, rel=1e-12)
    assert together[3] == 1.0
    assert together[2] == 0.0


def test_the_bound_is_where_the_probability_is_beta() -> None:
    law = {"n": 5000, "largest": 0.7, "square": 2.0}
    for U in (-0.01, 0.0, 0.002, 0.1):
        Δ = upper_bound(U, 1e-3, **law)
        assert p_value(U, Δ, **law) == pytest.approx(1e-3, rel=1e-6)
        assert math.sqrt(max(U, 0.0)) <= Δ
    assert p_value(-5.0, 0.1, **law) == p_value(0.0, 0.1, **law)


def test_without_noise_the_bound_is_the_statistic() -> None:
    assert p_value(0.04, 0.19, n=10, largest=0.0, square=0.0) == 1.0
    assert p_value(0.04, 0.21, n=10, largest=0.0, square=0.0) == 0.0


def test_draws_to_certify_certify() -> None:
    law = {"largest": 3.0, "square": 20.0}
    n = int(draws_to_certify(0.1, 1e-3, **law))
    assert p_value(0.0, 0.1, n=n, **law) <= 1e-3 < p_value(0.0, 0.1, n=int(n * 0.99), **law)
    assert draws_to_certify(0.1, 1e-3, U=0.02, **law) == math.inf


@pytest.mark.parametrize("P", [3, 400])
def test_a_gram_block_is_its_definition(P: int) -> None:
    d = torch.randn(GRAM, P, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.1
    top, square = of_block(d)
    gram = (d @ d.T).numpy()
    assert top == pytest.approx(np.linalg.norm(d.numpy(), 2) ** 2 / GRAM, rel=1e-9)
    assert square == pytest.approx(
        np.mean([gram[i, j] ** 2 for i in range(GRAM) for j in range(GRAM) if i != j]), rel=1e-9
    )


def test_the_spectrum_of_many_blocks() -> None:
    """Estimates of λ and tr Σ² are above the truth, by less than half (λ) and a tenth (tr Σ²)."""
    λ = torch.tensor([2.0, 1.0, *[0.05] * 30], dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    spectrum = Spectrum()
    for _ in range(200):
        spectrum = spectrum.add(λ.sqrt() * torch.randn(GRAM, 32, generator=generator, dtype=torch.float64))
    assert 2.0 < spectrum.largest < 3.0
    exact = float((λ**2).sum())
    assert exact < spectrum.trace_of_square < 1.1 * exact


@pytest.mark.parametrize("level", [0.1, 0.01, 0.001])
def test_an_uncertain_noise_stretches_like_a_t(level: float) -> None:
    """A variance with relative error ε is that of 2/ε² degrees of freedom."""
    for error in (0.05, 0.1):
        exact = stats.t.isf(level, 2 / error**2) / stats.norm.isf(level)
        assert stretch(0.0, level, error) == pytest.approx(exact, rel=0.002)
        assert stretch(0.0, level, error) > 1
    assert stretch(0.05, level, 0.1) == pytest.approx(stretch(0.05, level) * stretch(0.0, level, 0.1))


def test_the_error_of_the_noise_is_that_of_its_blocks() -> None:
    """Of rank one: λ² is tr Σ², so that the relative error of λ is half the one of tr Σ², which is what m blocks show."""
    squares = np.array([1.0, 1.5, 0.7, 1.2])
    whole = Spectrum()
    for x in squares:
        whole = whole.with_block(math.sqrt(x), x)
    assert whole.error == pytest.approx(stats.sem(squares) / squares.mean() / 2)
    assert whole.trace_of_square == pytest.approx(squares.mean() + 2 * stats.sem(squares))
    assert whole.at_least(1.08) == pytest.approx(1.08)
    assert whole.at_least(99.0) == pytest.approx(math.sqrt(whole.trace_of_square))
    assert whole.at_least(0.0) == whole.largest == pytest.approx(np.sqrt(squares).mean())


def test_many_at_once_are_each_alone() -> None:
    rng = np.random.default_rng(0)
    U, top = rng.uniform(0, 0.02, 40), rng.uniform(0.1, 2.0, 40)
    square = top**2 * rng.uniform(1.0, 300.0, 40)
    square[:5], top[5:7], square[5:7] = top[:5] ** 2, 0.0, 0.0  # of rank one; without noise
    many = p_value(U, 0.1, n=4096, largest=top, square=square)
    each = [p_value(u, 0.1, n=4096, largest=t, square=s) for u, t, s in zip(U, top, square, strict=True)]
    assert many == pytest.approx(each, rel=1e-12)
    assert isinstance(each[0], float)
