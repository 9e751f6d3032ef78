"""Before spending: draws that a verdict takes, and the bias that a budget shows.

For the noise of one draw in units of ‖μ*‖ (NSR = √tr Σ/‖μ*‖, r_eff = (tr Σ)²/tr Σ²), without a bias the certificate is
to be expected at

    n = c · NSR² / (δ² √r_eff),        c ≈ 16.7 (r_eff = 1), 9.2 (10), 6.1 (100), 4.6 (≥ 1e4) at β = 1e-3

times √2 in the median for rounding up to a look. A bias of size ε along a direction of standard deviation σ triggers at
n = (z σ/ε)², z the trigger's threshold; as many draws again confirm it.

Guarantee: the numbers are medians for known Σ (at the n named, a verdict is about as likely as not), rounded up to a look of
the schedule; no promise is made beyond the last look.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pgcheck.errors import UsageError
from pgcheck.statistics.certificate import draws_to_certify, p_value, upper_bound
from pgcheck.statistics.guarded import z_of
from pgcheck.statistics.panel import WITNESSES
from pgcheck.statistics.sequential import Settings


@dataclass(frozen=True)
class Noise:
    """Of one draw, in units of ‖μ*‖."""

    nsr: float  # √tr Σ/‖μ*‖
    r_eff: float  # (tr Σ)²/tr Σ², 1 … P
    top: float  # λ_max/tr Σ
    along: float  # μ*ᵀΣμ*/‖μ*‖²/tr Σ

    def __post_init__(self) -> None:
        if not (math.isfinite(self.nsr) and self.nsr > 0):
            raise UsageError(
                f"nsr: {self.nsr!r}; it must be a number above 0. An estimator without noise needs one draw."
            )
        if not self.r_eff >= 1:
            raise UsageError(f"r_eff: {self.r_eff!r}; it is at least 1.")

    @staticmethod
    def flat(nsr: float, r_eff: float) -> Noise:
        """Of r_eff equally loud directions."""
        return Noise(nsr, r_eff, 1 / r_eff, 1 / r_eff)

    @staticmethod
    def of(covariance: Tensor, reference: Tensor) -> Noise:
        """Of a covariance `[P, P]`, seen from μ* `[P]`."""
        size, total = float(reference.norm()), float(covariance.diagonal().sum())
        if size == 0:
            raise UsageError("reference: its norm is 0, so that no noise is large or small beside it.")
        u = reference / size
        if total <= 0:
            return Noise(math.sqrt(max(total, 0.0)) / size, 1.0, 1.0, 1.0)
        return Noise(
            math.sqrt(total) / size,
            max(1.0, total**2 / float((covariance**2).sum())),
            float(torch.linalg.eigvalsh(covariance)[-1]) / total,
            float(u @ covariance @ u) / total,
        )

    @property
    def law(self) -> dict[str, float]:
        """What the certificate reads of Σ/‖μ*‖²."""
        return {"largest": self.top * self.nsr**2, "square": self.nsr**4 / self.r_eff}


def looks(settings: Settings) -> list[int]:
    """The draws of every look."""
    return [settings.first_look * 2**k for k in range(settings.looks)]


def min_draws_for_pass(noise: Noise, settings: Settings) -> int | None:
    """The look at which an estimator without a bias is certified as likely as not; None: beyond the last."""
    for n in looks(settings):
        if p_value(0.0, settings.rtol, n=n, **noise.law) <= settings.beta / 2:
            return n
    return None


def draws_for_pass(noise: Noise, settings: Settings) -> float:
    """The same without a schedule."""
    return draws_to_certify(settings.rtol, settings.beta / 2, **noise.law)


def trigger_z(settings: Settings) -> float:
    """What the scores along μ* must reach to trigger (two-sided)."""
    return z_of(settings.stage_level / (2 * len(WITNESSES) * settings.looks))


def min_draws_for_fail(noise: Noise, size: float, settings: Settings) -> int | None:
    """Draws, the confirming ones included, to a FAIL for a bias of `size`·‖μ*‖ along μ*; None: beyond the last look."""
    margin = size - (settings.rtol if settings.mode == "exceeds" else 0.0)
    if margin <= 0:
        return None
    for n in looks(settings):
        if n >= (_fail_z(settings) * noise.nsr * math.sqrt(noise.along) / margin) ** 2:
            return 2 * n
    return None


def _fail_z(settings: Settings) -> float:
    """Trigger and every confirming part, each as likely as not."""
    return max(trigger_z(settings), z_of(settings.stage_level) * math.sqrt(settings.stages - 1))


def oracle_draws(noise: Noise, size: float, settings: Settings) -> float:
    """Draws of the one test at α that knows the direction beforehand."""
    return (z_of(settings.alpha) * noise.nsr * math.sqrt(noise.along) / size) ** 2


def detectable_bias(noise: Noise, budget: int, settings: Settings) -> float:
    """The least bias along μ*, in units of ‖μ*‖, that `budget` draws show as likely as not; ∞ if they reach no confirmation."""
    triggers = [n for n in looks(settings) if 2 * n <= budget]
    if not triggers:
        return math.inf
    least = settings.rtol if settings.mode == "exceeds" else 0.0
    return least + _fail_z(settings) * noise.nsr * math.sqrt(noise.along / triggers[-1])


def certifiable_bias(noise: Noise, budget: int, settings: Settings) -> float:
    """The least tolerance, in units of ‖μ*‖, that an estimator without a bias meets with `budget` draws; ∞ before a look."""
    reached = [n for n in looks(settings) if n <= budget]
    return upper_bound(0.0, settings.beta / 2, n=reached[-1], **noise.law) if reached else math.inf


@dataclass(frozen=True)
class Design:
    """What a sampled verdict on an estimator with this noise takes."""

    noise: Noise
    settings: Settings
    pass_draws: int | None  # look at which no bias is certified
    pass_draws_exactly: float  # without a schedule
    fail_draws: int | None  # for a bias of the tolerance (twice that in mode `exceeds`) along μ*
    oracle_draws: float  # for the same
    budget: int
    detectable: float  # with the budget
    certifiable: float  # with the budget


def design(noise: Noise, settings: Settings, *, budget: int | None = None) -> Design:
    """All of it; the default budget is all looks."""
    if budget is not None and budget < settings.first_look:
        raise UsageError(
            f"budget: {budget} draws are less than the first look; the least is {settings.first_look} for a PASS and"
            f" {2 * settings.first_look} for a FAIL."
        )
    if settings.rtol == 0:
        raise UsageError("rtol: 0; a design is made for a relative tolerance.")
    most = settings.most_draws if budget is None else budget
    size = settings.rtol * (2 if settings.mode == "exceeds" else 1)
    return Design(
        noise=noise,
        settings=settings,
        pass_draws=min_draws_for_pass(noise, settings),
        pass_draws_exactly=draws_for_pass(noise, settings),
        fail_draws=min_draws_for_fail(noise, size, settings),
        oracle_draws=oracle_draws(noise, size, settings),
        budget=most,
        detectable=detectable_bias(noise, most, settings),
        certifiable=certifiable_bias(noise, most, settings),
    )


def constant(r_eff: float, *, beta: float = 1e-3) -> float:
    """The c of n = c · NSR²/(δ² √r_eff), for r_eff equally loud directions."""
    noise = Noise.flat(1.0, r_eff)
    δ = 1e-3 / r_eff**0.25
    return draws_to_certify(δ, beta, **noise.law) * δ**2 * math.sqrt(r_eff)
