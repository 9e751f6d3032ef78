"""Direction numbers, findings and the tolerance they are decided at, on vectors made by hand."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor

from pgcheck.engines.exact import exact_moments
from pgcheck.engines.moments import Moments
from pgcheck.envs.tabular import TabularMDP
from pgcheck.estimators.base import Estimator, biased, find_estimator, from_coefficients, proportional, unbiased
from pgcheck.estimators.lookup import FILLED_BY  # noqa: F401  (fills the registries)
from pgcheck.problem import Problem
from pgcheck.registry import find_problem
from pgcheck.verdicts.checks.bias import judge_claims
from pgcheck.verdicts.verdict import (
    RTOL,
    Direction,
    Measurement,
    Status,
    along,
    as_list,
    direction,
    finite_or_none,
    measure,
    steps,
)

NAN = math.nan


def tensor(x: Any) -> Tensor:
    return torch.tensor(x, dtype=torch.float64)


# -- positions


def test_steps() -> None:
    """g = (3, 4). m_0 = 2g is all along it; m_1 = (−4, 3) is all beside it; of g, position 0 has all."""
    g = tensor([[3.0, 4.0]])
    by_step, truth = tensor([[[6.0, 8.0]], [[-4.0, 3.0]]]), tensor([[[3.0, 4.0]], [[0.0, 0.0]]])
    first, second = steps(by_step, truth, g)
    assert (first.along, first.gap) == (2.0, 1.0)
    assert (second.along, second.gap) == (0.0, 1.0)
    assert along(truth, g) == [1.0, 0.0]


def test_steps_without_a_direction() -> None:
    (only,) = steps(tensor([[[1.0, -1.0]]]), tensor([[[0.0, 0.0]]]), tensor([[0.0, 0.0]]))
    assert math.isnan(only.along)
    assert not math.isfinite(only.gap)


def test_an_engine_that_does_not_split_has_no_steps() -> None:
    problem = find_problem("mdp/pessimal")
    moments = Moments(problem.gradient(), torch.zeros(2, 2, dtype=torch.float64), None)
    estimator = from_coefficients(lambda b: b.mask, name="whole")
    assert measure(estimator, problem, moments).by_step == ()


# -- direction


@pytest.mark.parametrize(
    ("mean", "gradient", "expected"),
    [
        # m = g
        ([[3.0, 4.0]], [[3.0, 4.0]], Direction(0.0, 1.0, 1.0, 0.0)),
        # m = g/2: ‖m − g‖ = ‖g‖/2
        ([[1.5, 2.0]], [[3.0, 4.0]], Direction(0.5, 0.5, 1.0, 0.0)),
        # m = −2g: ‖−3g‖/‖g‖ = 3
        ([[-6.0, -8.0]], [[3.0, 4.0]], Direction(3.0, -2.0, -1.0, 0.0)),
        # ‖g‖ = ‖m‖ = 5, ⟨m, g⟩ = 24: scale = cosine = 24/25; ‖m − g‖ = √2; sin = √(1 − .96²) = .28
        ([[4.0, 3.0]], [[3.0, 4.0]], Direction(math.sqrt(2) / 5, 0.96, 0.96, 0.28)),
        # orthogonal: ⟨m, g⟩ = 0, ‖m − g‖² = ‖m‖² + ‖g‖² = 2 · 25
        ([[-4.0, 3.0]], [[3.0, 4.0]], Direction(math.sqrt(2), 0.0, 0.0, 1.0)),
        # the shape does not matter: two contexts, m = (1, 1, 0, 0), g = (1, 0, 0, 0)
        ([[1.0, 1.0], [0.0, 0.0]], [[1.0, 0.0], [0.0, 0.0]], Direction(1.0, 1.0, math.sqrt(0.5), math.sqrt(0.5))),
        # m = 0 has no direction
        ([[0.0, 0.0]], [[3.0, 4.0]], Direction(1.0, 0.0, NAN, NAN)),
        # g = 0 has neither size nor direction
        ([[3.0, 4.0]], [[0.0, 0.0]], Direction(NAN, NAN, NAN, NAN)),
        ([[0.0, 0.0]], [[0.0, 0.0]], Direction(NAN, NAN, NAN, NAN)),
    ],
)
def test_direction(mean: list[list[float]], gradient: list[list[float]], expected: Direction) -> None:
    found = direction(tensor(mean), tensor(gradient))
    for f in fields(Direction):
        assert getattr(found, f.name) == pytest.approx(getattr(expected, f.name), abs=1e-15, nan_ok=True), f.name


def test_direction_knows_no_units() -> None:
    """All four are ratios: m and g times 1000 leave them as they are."""
    m, g = tensor([[1.0, -2.0], [0.5, 3.0]]), tensor([[2.0, 0.0], [-1.0, 1.0]])
    small, large = direction(m, g), direction(1000 * m, 1000 * g)
    for f in fields(Direction):
        assert getattr(large, f.name) == pytest.approx(getattr(small, f.name), rel=1e-14)


def test_pythagoras() -> None:
    """cosine² + off_axis² = 1, and rel² = (scale − 1)² + (off_axis ‖m‖/‖g‖)²."""
    m, g = tensor([[1.0, -2.0], [0.5, 3.0]]), tensor([[2.0, 0.0], [-1.0, 1.0]])
    d = direction(m, g)
    assert d.cosine**2 + d.off_axis**2 == pytest.approx(1.0, abs=1e-14)
    off = d.off_axis * float(m.norm() / g.norm())
    assert d.rel**2 == pytest.approx((d.scale - 1) ** 2 + off**2, abs=1e-14)


# -- measure: π(a₁) = .9, r = (1, 0), so g = .09 (1, −1) and ‖g‖ = .09 √2


ANY = from_coefficients(lambda batch: batch.mask, couples="trajectory", name="any")
G = tensor([[0.09, -0.09]])
SIZE_G = 0.09 * math.sqrt(2)


def problem(name: str = "bandit/two-arm") -> Problem:
    return find_problem(name)


def moments(mean: Tensor, variance: float = 0.0) -> Moments:
    """Of total variance `variance`, all of it in the first coordinate."""
    n = mean.numel()
    covariance = torch.zeros(n, n, dtype=torch.float64)
    covariance[0, 0] = variance
    return Moments(mean, covariance, None, enumerated=7)


def measured(mean: Tensor, variance: float = 0.0, name: str = "bandit/two-arm", **settings: Any) -> Measurement:
    return measure(ANY, problem(name), moments(mean, variance), **settings)


@pytest.mark.parametrize(
    ("mean", "finding"),
    [
        (G, "unbiased"),
        (0.5 * G, "proportional"),
        (3.0 * G, "proportional"),
        (-G, "biased"),  # a negative factor is the other way, not a step size
        (0.0 * G, "biased"),
        (tensor([[0.09, 0.0]]), "biased"),
        (tensor([[0.09, NAN]]), "biased"),  # fail closed
        (tensor([[math.inf, 0.0]]), "biased"),
    ],
)
def test_finding(mean: Tensor, finding: str) -> None:
    assert measured(mean).finding == finding


def test_numbers_of_a_measurement() -> None:
    """m = 2g, tr Cov = .01: bias = ‖g‖, MSE = ‖g‖² + .01, SNR = 2‖g‖/.1, size = √(‖2g‖² + .01)."""
    m = measured(2 * G, 0.01)
    assert (m.estimator, m.problem, m.rows, m.batches, m.enumerated) == ("any", "bandit/two-arm", 4, None, 7)
    assert m.gradient_norm == pytest.approx(SIZE_G, abs=1e-16)
    assert m.bias == pytest.approx(SIZE_G, abs=1e-16)
    assert (m.rel, m.scale, m.cosine) == pytest.approx((1.0, 2.0, 1.0), abs=1e-14)
    assert m.off_axis == pytest.approx(0.0, abs=1e-14)
    assert m.total_variance == pytest.approx(0.01)
    assert m.mse == pytest.approx(SIZE_G**2 + 0.01, abs=1e-16)
    assert m.snr == pytest.approx(20 * SIZE_G)
    assert m.size == pytest.approx(math.sqrt(4 * SIZE_G**2 + 0.01), abs=1e-16)
    assert m.distance(1.0) == pytest.approx(SIZE_G / m.size)
    assert m.distance(2.0) == pytest.approx(0.0, abs=1e-15)
    assert torch.equal(m.expected, 2 * G)
    assert m.truth.flatten().tolist() == pytest.approx([0.09, -0.09])


def test_size_is_that_of_the_gradient_for_a_quiet_estimator() -> None:
    """E‖ĝ‖² < ‖g‖²: ‖g‖ is what counts."""
    assert measured(0.5 * G).size == pytest.approx(SIZE_G)


def test_no_variance_no_noise() -> None:
    assert measured(G).snr == math.inf


@pytest.mark.parametrize(("share", "finding"), [(0.9, "unbiased"), (1.1, "biased")])
@pytest.mark.parametrize("rtol", [RTOL, 1e-3])
def test_the_tolerance_is_relative_to_the_size(share: float, finding: str, rtol: float) -> None:
    """A bias of .9 (1.1) times rtol · √E‖ĝ‖² off the axis, at a variance of 1 that dwarfs ‖g‖²."""
    off = tensor([[1.0, 1.0]]) / math.sqrt(2)
    allowed = rtol * math.sqrt(1.0 + SIZE_G**2)
    assert measured(G + share * allowed * off, 1.0, rtol=rtol).finding == finding


def test_a_factor_is_proportional_within_the_tolerance_only() -> None:
    """Off the axis by more than rtol it is a direction error, whatever the factor."""
    off = tensor([[1.0, 1.0]]) / math.sqrt(2)
    assert measured(0.5 * G + 1e-11 * off).finding == "proportional"
    assert measured(0.5 * G + 1e-9 * off).finding == "biased"


def test_the_worst_entry() -> None:
    """|m − g| is largest in context 1, action 2."""
    problem = find_problem("degenerate/all-equal")
    mean = problem.gradient().clone()
    mean[0, 0] += 0.1
    mean[1, 2] -= 0.2
    assert measure(ANY, problem, moments(mean)).worst == (1, 2)


# -- a stationary point: ∇J = 0


STILL = torch.zeros(3, 2, dtype=torch.float64)


def drift(by: float) -> Tensor:
    moved = STILL.clone()
    moved[0] = tensor([by, -by])
    return moved


def test_at_a_stationary_point_the_size_is_the_noise() -> None:
    """‖g‖ = 0, E‖ĝ‖² = 1: a drift of 1e-12 is rounding, one of 1e-6 is not."""
    still = measured(drift(1e-12), 1.0, "bandit/stationary")
    moving = measured(drift(1e-6), 1.0, "bandit/stationary")
    assert still.size == pytest.approx(1.0)
    assert (still.finding, moving.finding) == ("unbiased", "biased")
    for m in (still, moving):
        assert all(math.isnan(x) for x in (m.rel, m.scale, m.cosine, m.off_axis))


def test_an_estimator_that_is_zero_at_a_stationary_point() -> None:
    """ĝ = 0 and g = 0: nothing to divide by, and nothing wrong."""
    m = measured(STILL, 0.0, "bandit/stationary")
    assert (m.finding, m.size, m.distance(1.0), m.distance(0.0)) == ("unbiased", 0.0, 0.0, 0.0)


@pytest.mark.parametrize("bad", [NAN, math.inf])
@pytest.mark.parametrize("name", ["bandit/two-arm", "bandit/stationary"])
@pytest.mark.parametrize("variance", [0.0, 1.0, NAN])
def test_not_a_number_is_never_within_the_tolerance(bad: float, name: str, variance: float) -> None:
    """Nor is a mean beside which every norm overflows."""
    mean = problem(name).gradient().clone()
    mean[0, 0] = bad
    m = measured(mean, variance, name)
    assert m.finding == "biased"
    assert not m.distance(1.0) <= RTOL


@pytest.mark.parametrize("name", ["bandit/two-arm", "bandit/stationary"])
def test_an_unknown_variance_is_never_within_the_tolerance(name: str) -> None:
    """What overflows when squared has a variance of inf − inf."""
    m = measured(problem(name).gradient() + 1e-3, NAN, name)
    assert m.finding == "biased"
    assert not m.distance(1.0) <= RTOL


# -- claims


def claims_of(claim: str) -> Estimator:
    made = {
        "unbiased": unbiased(),
        "some κ > 0": proportional(),
        "κ = .5": proportional(0.5),
        "κ = 1 − 1/B": proportional(lambda p: 1 - 1 / p.rows),
        "biased": biased("because"),
    }
    return from_coefficients(lambda batch: batch.mask, name="claimant", claims=(made[claim],))


@pytest.mark.parametrize(
    ("mean", "agrees_with"),
    [
        (G, {"unbiased", "some κ > 0"}),
        (0.5 * G, {"some κ > 0", "κ = .5", "biased"}),
        (0.75 * G, {"some κ > 0", "κ = 1 − 1/B", "biased"}),  # B = 4
        (-G, {"biased"}),
        (0.0 * G, {"biased"}),
        (tensor([[0.09, 0.0]]), {"biased"}),
    ],
)
@pytest.mark.parametrize("claim", ["unbiased", "some κ > 0", "κ = .5", "κ = 1 − 1/B", "biased"])
def test_claims_in_both_directions(mean: Tensor, agrees_with: set[str], claim: str) -> None:
    estimator = claims_of(claim)
    (verdict,) = judge_claims(estimator, [problem()], [measured(mean)])
    assert verdict.status is (Status.PASS if claim in agrees_with else Status.FAIL)
    assert verdict.claim == estimator.claims[0].kind == verdict.check


@pytest.mark.parametrize("claim", ["unbiased", "some κ > 0", "κ = .5", "κ = 1 − 1/B"])
def test_at_a_stationary_point_every_factor_says_zero(claim: str) -> None:
    where = problem("bandit/stationary")
    (right,) = judge_claims(claims_of(claim), [where], [measured(drift(1e-12), 1.0, where.name)])
    (wrong,) = judge_claims(claims_of(claim), [where], [measured(drift(1e-6), 1.0, where.name)])
    assert (right.status, wrong.status) == (Status.PASS, Status.FAIL)


def test_biased_needs_one_problem_and_unbiased_all() -> None:
    """A bias on one of two problems: one verdict for the claim of bias, with the worst; two for the other."""
    pairs = [problem(), problem("bandit/two-arm").at(1)]
    found = [measured(G), measure(ANY, pairs[1], moments(2 * pairs[1].gradient()))]
    (bias,) = judge_claims(claims_of("biased"), pairs, found)
    assert (bias.status, bias.problem, bias.reason) == (Status.PASS, "", "bandit/two-arm@1")
    equal = judge_claims(claims_of("unbiased"), pairs, found)
    assert [(v.status, v.problem) for v in equal] == [(Status.PASS, pairs[0].name), (Status.FAIL, pairs[1].name)]


def test_a_claim_without_a_problem_has_no_verdict() -> None:
    """No problem meets the condition: not judged, rather than passed."""
    from pgcheck.estimators.base import off_policy

    estimator = from_coefficients(lambda batch: batch.mask, name="claimant", claims=(biased("because", off_policy),))
    assert judge_claims(estimator, [problem()], [measured(G)]) == []


@pytest.mark.parametrize("bad", [NAN, math.inf])
@pytest.mark.parametrize("claim", ["unbiased", "some κ > 0", "κ = .5"])
@pytest.mark.parametrize("name", ["bandit/two-arm", "bandit/stationary"])
def test_not_a_number_fails_every_claim_of_equality(bad: float, claim: str, name: str) -> None:
    mean = problem(name).gradient().clone()
    mean[0, 0] = bad
    (verdict,) = judge_claims(claims_of(claim), [problem(name)], [measured(mean, NAN, name)])
    assert verdict.status is Status.FAIL


# -- for JSON


def test_what_has_no_number_is_null() -> None:
    assert [finite_or_none(x) for x in (1.5, 0.0, NAN, math.inf, -math.inf)] == [1.5, 0.0, None, None, None]
    assert as_list(torch.tensor([[1, 2], [3, 4]])) == [[1.0, 2.0], [3.0, 4.0]]


@pytest.mark.parametrize("name", ["leave_one_out", "batch_mean", "grpo", "reinforce"])
def test_rounding_is_not_judged_against_rounding(name: str) -> None:
    """Both arms pay 1: ∇J is 0 up to 1e-16, and centered coefficients are 0 on every batch."""
    stay = [[[1.0], [1.0]]]
    problem = Problem(TabularMDP(stay, [[1.0, 1.0]], [1.0], horizon=1), [[0.0, 1.2]], group_size=2)
    e = find_estimator(name)
    m = measure(e, problem, exact_moments([e], problem)[0])
    assert m.finding == "unbiased"
    assert m.distance(1.0) <= RTOL
    assert m.distance(0.5) <= RTOL


def test_a_small_bias_is_still_judged() -> None:
    """Rewards of 1e-6: the batch mean of two rows is half of ∇J there, as anywhere."""
    stay = [[[1.0], [1.0]]]
    problem = Problem(TabularMDP(stay, [[1e-6, 0.0]], [1.0], horizon=1), [[0.0, 1.2]], group_size=2)
    e = find_estimator("batch_mean")
    m = measure(e, problem, exact_moments([e], problem)[0])
    assert m.finding == "proportional"
    assert m.scale == pytest.approx(0.5, rel=1e-12)
