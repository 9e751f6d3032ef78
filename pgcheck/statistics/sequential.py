"""The sequential judge: PASS, FAIL or INCONCLUSIVE for E X = κ μ*, from grains of draws, both error rates controlled.

One draw X_i ∈ R^P is the estimate of one whole batch; D_i = X_i − κ μ*, b = E D, Δ = rtol · ‖κ μ*‖ + atol. Looks are at
n_k = first · 2^k, k < `looks`; between them nothing is decided.

* PASS: the certificate (`pgcheck.statistics.certificate`) shows ‖b‖ < Δ; a bias of Δ passes with probability β at most.
  β/2, β/4, … is spent at the looks at which U = 0 would pass. Looked at before FAIL.
* FAIL: a witness of the panel *triggers*, and its direction, frozen, is *confirmed* on as many fresh draws as were used so
  far. With s stages (trigger and s − 1 disjoint parts of the fresh draws) each is a test at level α^(1/s), the trigger's
  split over looks and witnesses; as parts are independent, an unbiased estimator fails with probability α at most. s is
  the least that leaves every single test at 1e-5 or above, the range in which its rate was measured. If not confirmed, the
  draws are pooled and the judge goes on.
* INCONCLUSIVE: neither after all looks, or tails that no test of this n can be trusted with.

Intervals hold at whichever look a run stops: what one may miss, 1 − CONFIDENCE, is spent as 1/2, 1/6, … 1/(m(m+1)) over the
looks m = 1, 2, …

Where `bounds` of every score ⟨D, v⟩, ‖v‖ = 1, are known, all of this is exact instead, without a word about tails: FAIL by
betting on the witnesses, PASS by concentration of ‖D̄‖ (`pgcheck.statistics.bounded`), β spent as 1/(m(m+1)) at look m.

With `scale=None` (E X = κ μ*, some κ > 0) everything is done across μ*, Δ = rtol · κ_low ‖μ*‖, and κ < 0 is a FAIL.

Guarantee: memory O(P); sums are made per grain and merged in order, so the same draws give the same bytes, also when resumed
from `state()`. No event rarer than ln(1/α)/n is ever seen: `rarest` makes the first look late enough for it.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from pgcheck.errors import NotFiniteError, UsageError
from pgcheck.statistics.bounded import Wealth, bounded_bias, bounded_interval
from pgcheck.statistics.certificate import (
    GRAM,
    Spectrum,
    draws_to_certify,
    gram_blocks,
    of_blocks_and_across,
    p_value,
    stretch,
    upper_bound,
)
from pgcheck.statistics.grain import Grain
from pgcheck.statistics.guarded import Floats, Scores, draws_for_tails, interval, pareto_k, z_of, z_scores
from pgcheck.statistics.judgement import (
    CONFIDENCE,
    GRAIN,
    SHARE,
    Interval,
    Judgement,
    Mode,
    Settings,
    Tails,
    confidence_after,
)
from pgcheck.statistics.panel import TWO_SIDED, WITNESSES, Loud, directions, loud_directions, thresholds
from pgcheck.statistics.status import Status

__all__ = [
    "CONFIDENCE",
    "GRAIN",
    "SHARE",
    "Interval",
    "Judge",
    "Judgement",
    "Mode",
    "Settings",
    "Tails",
    "confidence_after",
]

_TAIL = 256  # largest scores kept for the tail index
SLACK = 32  # roundings of the draws' own dtype that may look like a bias
_W = len(WITNESSES)
_ASIDE, _CONFIRM = _W, _W + 1  # columns of the directions after the witnesses
_LOUDEST, _SPREAD = _CONFIRM + 1, _CONFIRM + 2  # and of the scores after those
_TAILS = [0, 2]  # scores that the certificate rests on: along μ*, and along the noisiest direction


class Judge:
    """Eats grains of draws in order and decides at looks; see the module.

    Args:
        reference: μ*, `[P]`.
        scale: the κ of the claim E X = κ μ*; None: any κ > 0.
    """

    def __init__(self, reference: Tensor, settings: Settings, *, scale: float | None = 1.0) -> None:
        self.settings, self.scale = settings, scale
        self._reference = reference.detach().to(torch.float64).reshape(-1)
        if not bool(torch.isfinite(self._reference).all()):
            raise UsageError("reference: it must be finite.")
        P, size = len(self._reference), float(self._reference.norm())
        self._norm = size
        self._target = self._reference * (0.0 if scale is None else scale)
        self._allowed = settings.rtol * float(self._target.norm()) + settings.atol
        if size == 0 if scale is None else self._allowed == 0:
            raise UsageError(
                "reference: its norm is 0, and a relative tolerance says nothing about it. Give an absolute one (atol=…)"
                + (" and a fixed scale." if scale is None else ".")
            )
        self._along = self._reference / size if size > 0 else _any_direction(P).to(self._reference.device)
        self.decided = False
        self.next_look = settings.first_look
        zero = torch.zeros_like(self._reference)
        self._sum, self._total, self._squares, self._power = (zero.clone() for _ in range(4))  # ΣX, ΣD, ΣD², ΣX²
        self._centre = zero.clone()  # mean X of the first grain
        self._norms2, self._norms = 0.0, 0.0  # Σ‖D‖², Σ‖D‖
        self._v = zero.new_zeros(P, _CONFIRM + 1)
        self._v[:, 0] = self._along
        self._loud = Loud(zero.new_zeros(P, 0), zero.new_ones(0))
        self._whole, self._across = Spectrum(), Spectrum()
        self._q = Scores.none(1)  # ‖D‖²: all draws
        self._wealth = Wealth.none(_W + TWO_SIDED)  # of the witnesses, and of the negatives of those without a sign
        self._ever = Scores.none(3)  # along μ*, ‖X − centre‖², along the noisiest direction of the pilot: all draws
        self._block = Scores.none(_W + 1)  # of the directions in use: the draws they have not seen
        self._parts = [Scores.none(1) for _ in range(settings.stages - 1)]  # of the frozen direction
        self._tail = np.zeros(0)
        self._z = np.zeros((2, _W))  # Σ_j 2^j z_j of mean > shift and of mean < −shift
        self._weight2 = 0.0  # Σ_j 4^j
        self._looked, self._spent, self._eps = 0, 0, float(torch.finfo(torch.float64).eps)
        self._frozen = -1  # witness being confirmed
        self._frozen_at = 1
        self._shown = False  # a bias was proven
        self._failed = False
        self._passed = False
        self._last = -1  # witness that triggered last
        self._effect = np.full(3, np.nan)
        self._aside_low = 0.0

    @property
    def draws(self) -> int:
        """Draws eaten so far."""
        return self._ever.n

    @property
    def paired(self) -> bool:
        """Whether it can be given draws of the reference."""
        return self.scale is not None

    @property
    def spectrum(self) -> Spectrum:
        """Of the noise of D, from some of the draws."""
        return self._whole

    @property
    def _confidence(self) -> float:
        return confidence_after(self.draws, self.settings)

    # -- eating

    def update(self, draws: Tensor | Grain, reference_draws: Tensor | None = None) -> None:
        """Take the next grain `[1024, P]`, or several at once (`Settings.grains_at_once`); after a verdict nothing is done.

        Args:
            draws: by themselves, or with what others need of them as well, around the mean of the first grain.
            reference_draws: draws r_i of an unbiased estimator on the same random numbers, as many: then D = X − κ r, and
                `reference` only says where to look and how large the tolerance is.

        Raises:
            UsageError: a wrong shape. NotFiniteError: a NaN or infinity, with the number of its draw.
        """
        if self.decided:
            return
        x, r = self._checked(draws, reference_draws)
        if self.draws == 0:
            self._centre = x.centre
        # D = d − at; with an open κ what is judged lies across μ*
        d, at, origin = x, self._target, torch.zeros_like(self._target)
        if r is not None:
            d, at = Grain(x.x - r * float(self.scale or 0.0), origin), origin
        elif self.scale is None:
            d, at = Grain(x.x - torch.outer(x.along(self._along.unsqueeze(1)).squeeze(0), self._along), origin), origin
        if self.draws == 0:
            self._loud = loud_directions(d.x[:GRAM] - at)
        self._add_spectrum(d.x, at)
        y, norms2 = self._scores(x, d, at), d.distances_from(at)
        if self.settings.bounds is not None:
            self._bet(y, norms2)
        self._sum += x.total_from(origin)
        self._power += x.squares_from(origin)
        self._total += d.total_from(at)
        self._squares += d.squares_from(at)
        self._norms2 += float(norms2.sum())
        self._norms += float(norms2.sqrt().sum())
        y[_SPREAD] = x.spread
        kept = y.cpu().numpy().T
        new = Scores.of(kept)
        self._ever = self._ever.merge(new[[0, _SPREAD, _LOUDEST]])
        self._block = self._block.merge(new[:_CONFIRM])
        if self._frozen >= 0:
            part = (self.draws - 1 - self._frozen_at) * len(self._parts) // self._frozen_at
            self._parts[part] = self._parts[part].merge(new[_CONFIRM:_LOUDEST])
        self._keep_largest(np.abs(kept[:, 0]))
        if self.draws == self._learns_at:
            self._learn()
        if self.draws == self.next_look:
            self._look()

    def _checked(self, draws: Tensor | Grain, reference_draws: Tensor | None) -> tuple[Grain, Tensor | None]:
        device = self._reference.device
        check_grains(
            self.settings, self.draws, len(self._reference), draws=draws.x if isinstance(draws, Grain) else draws,
            reference_draws=reference_draws,
        )  # fmt: skip
        if reference_draws is not None and self.scale is None:
            raise UsageError("reference_draws: with an estimated reference the scale must be given.")
        if isinstance(draws, Tensor):
            draws = Grain.of(draws.to(device), self._centre if self.draws else None)
        self._eps = max(self._eps, draws.eps)
        refuse_not_finite(draws.x, self.draws, total=draws.total)
        if reference_draws is None:
            return draws, None
        r = reference_draws.detach().to(device=device, dtype=torch.float64).contiguous()
        refuse_not_finite(r, self.draws)
        return draws, r

    def _scores(self, x: Grain, d: Grain, at: Tensor) -> Tensor:
        """⟨D, v⟩ of every direction in use, and of the noisiest of the pilot, `[9, n]`, with an open κ X along μ*; and a row to
        be filled."""
        loudest = self._loud.directions[:, -1:] if self._loud.kept.numel() else self._along.unsqueeze(1)
        v = torch.cat([self._v, loudest], 1)
        y = d.along(v, at, room=1)
        if self.scale is None:
            par = x.along(self._along.unsqueeze(1))
            y[:1] = par
            y[_CONFIRM:_LOUDEST] += par * (self._along @ self._v[:, _CONFIRM])
            if self.settings.mode == "exceeds":  # v·b > δ κ‖μ*‖ is (v − δ μ*/‖μ*‖)·E X > 0
                y[1:_LOUDEST] -= self.settings.rtol * par
        return y

    def _bet(self, y: Tensor, norms2: Tensor) -> None:
        """On the witnesses as they are; with an open κ what lies along μ* is none of `norms2`."""
        whole = norms2 if self.scale is not None else norms2 + y[0].square()
        far = whole > (self.settings.bound * (1 + 1e-9)) ** 2
        if bool(far.any()):
            first = int(far.nonzero()[0, 0])
            raise UsageError(
                f"bounds: {self.settings.bounds}; draw {self.draws + first} of the stream lies {float(whole[first].sqrt()):.6g}"
                " from the reference, beyond them, so that nothing is proven."
            )
        bound, shifts = self.settings.bound, self._shifts()
        if self.scale is None and self.settings.mode == "exceeds":
            bound *= 1 + self.settings.rtol
        both = torch.cat([y[:_W], -y[:TWO_SIDED]]).cpu().numpy().T
        self._wealth = self._wealth.after(both, np.concatenate([shifts, shifts[:TWO_SIDED]]), bound)
        self._q = self._q.merge(Scores.of(norms2.unsqueeze(1).cpu().numpy()))

    def _add_spectrum(self, d: Tensor, at: Tensor) -> None:
        """The Gram blocks of these grains."""
        blocks = gram_blocks(d, self.draws // GRAIN, GRAIN) - at
        if self.scale is None:
            self._whole = self._whole.add(blocks)
            return
        whole, across = of_blocks_and_across(blocks, self._along)
        self._whole, self._across = self._whole.with_blocks(*whole), self._across.with_blocks(*across)

    def _keep_largest(self, size: Floats) -> None:
        if len(self._tail) == _TAIL:
            size = size[size > self._tail[0]]
        if len(size):
            every = np.concatenate([self._tail, size])
            self._tail = np.sort(np.partition(every, -_TAIL)[-_TAIL:] if len(every) > _TAIL else every)

    @property
    def _learns_at(self) -> int:
        """Directions are first learned within the first look's draws, from a quarter of them."""
        return max(GRAIN, self.settings.first_look // 4 // GRAIN * GRAIN)

    def _learn(self) -> None:
        """Directions from every draw so far; their scores start again."""
        self._v[:, :_CONFIRM] = directions(
            self._total, self._squares, self.draws, along=self._along, loud=self._loud, aside=self.scale is None
        )
        self._block = Scores.none(_CONFIRM)

    # -- looking

    def _look(self) -> None:
        if self.settings.bounds is not None:
            self._look_within_bounds()
            return
        passed = self._certified()
        if self._frozen >= 0:
            self._confirm()
        evidence = self._evidence()
        ratio = evidence.max(0) / thresholds(self.settings.stage_level / self.settings.looks)
        best = int(ratio.argmax())
        fired = self._fires(float(ratio[best]))
        self._looked += 1
        self._shown = self._shown or self._failed
        if passed:
            self.decided, self._passed, self._failed = True, True, False
        elif self._failed or self._looked >= self.settings.looks + fired:  # the last look's trigger is still confirmed
            self.decided = True
        if self.decided:
            return
        aside = self._block[_ASIDE]
        if not bool(self._v[:, _ASIDE].any()):  # so far, nothing is across
            self._aside_low = 0.0
        else:
            self._aside_low = float(interval(aside, confidence=self._confidence)[0]) if aside.n > 1 else math.nan
        self._learn()
        self._frozen = -1
        if fired:
            self._freeze(best, 1.0 if evidence[0, best] >= evidence[1, best] else -1.0)
        self.next_look = 2 * self.draws

    def _look_within_bounds(self) -> None:
        kinds = list(range(_W + TWO_SIDED))
        if self.scale is None:  # κ > 0 is what is claimed; in mode `exceeds` scores are shifted to one side
            kinds = kinds[1:-1] if self.settings.mode == "exceeds" else kinds[1:]
        self._failed = self._wealth.total(kinds) >= math.log(1 / self.settings.alpha)
        self._passed = self._exact_bias(self._exact_level) <= self._tolerance(self._exact_level / 10)
        self._looked += 1
        self._shown = self._failed
        if self._failed:
            best = kinds[int(self._wealth.of_kind[kinds].argmax())]
            self._last = best if best < _W else best - _W
            self._failed = not self._passed
        self.decided = self._passed or self._failed or self._looked >= self.settings.looks
        if not self.decided:
            self._learn()
            self.next_look = 2 * self.draws

    @property
    def _exact_level(self) -> float:
        """Of β, what the next look may spend; a tenth of it on κ where that is open."""
        return self.settings.beta / ((self._looked + 1) * (self._looked + 2))

    def _exact_bias(self, level: float) -> float:
        level *= 0.9 if self.scale is None else 1.0
        return bounded_bias(float(self._total.norm()) / self.draws, self._q, self.settings.bound, level)

    def _evidence(self) -> Floats:
        """Z-scores `[2, 6]` of “the mean is above the shift” and “… below minus the shift”, over all looks so far.

        `par` is scored on all draws; the others block by block, C = Σ_j 2^j z_j / √(Σ_j 4^j), as their directions change.
        """
        weight = 2.0**self._looked
        shift = self._shifts()
        up, down = z_scores(self._block[:_W].plus(-shift)), z_scores(self._block[:_W].times(-1.0).plus(-shift))
        self._z += weight * np.stack([up, down])
        self._weight2 += weight**2
        C = self._z / math.sqrt(self._weight2)
        along = self._ever[:1]
        C[0, 0], C[1, 0] = z_scores(along.plus(-shift[0]))[0], z_scores(along.times(-1.0).plus(-shift[0]))[0]
        C[1, TWO_SIDED:] = -np.inf  # a learned direction has a sign
        if self.scale is None:
            C[0, 0] = -np.inf  # κ > 0 is what is claimed
            if self.settings.mode == "exceeds":  # its scores are shifted by δ κ‖μ*‖ to one side
                C[1, 1] = -np.inf
        return C

    def _shifts(self) -> Floats:
        """What a mean must exceed, for each witness: Δ in mode `exceeds`, and what rounding of the draws could make."""
        slack = SLACK * self._eps * (self._size @ self._v[:, :_W].abs()).cpu().numpy()
        if self.settings.mode == "exceeds" and self.scale is not None:
            slack = slack + self._allowed
        return np.asarray(slack)

    @property
    def _size(self) -> Tensor:
        """√(mean of X²) of each coordinate, `[P]`."""
        return (self._power / max(self.draws, 1)).sqrt()

    def _fires(self, ratio: float) -> bool:
        """Whether the strongest witness, in units of its threshold, triggers."""
        return ratio >= 1.0

    def _freeze(self, witness: int, sign: float) -> None:
        """Confirm this direction, learned from every draw so far, on as many fresh ones."""
        self._v[:, _CONFIRM] = sign * self._v[:, witness]
        self._frozen, self._frozen_at, self._last = witness, self.draws, witness
        self._parts, self._effect = [Scores.none(1) for _ in self._parts], np.full(3, np.nan)

    def _confirm(self) -> None:
        """Every part of the fresh draws must reject by itself, one-sided."""
        z = self._confirming_z()
        self._failed = bool(min(z) >= z_of(self.settings.stage_level))
        together = self._parts[0]
        for part in self._parts[1:]:
            together = together.merge(part)
        low, high = interval(together, confidence=self._confidence)
        self._effect = np.array([float(together.mean[0]), float(low[0]), float(high[0])])

    def _confirming_z(self) -> list[float]:
        shift = self._confirming_shift()
        return [float(z_scores(part.plus(-shift))[0]) for part in self._parts]

    def _confirming_shift(self) -> float:
        slack = SLACK * self._eps * float(self._size @ self._v[:, _CONFIRM].abs())
        if self.settings.mode == "exceeds" and self.scale is not None:
            slack += self._allowed
        return slack

    # -- the certificate

    def _statistic(self) -> float:
        n = self.draws
        return (float(self._total @ self._total) - self._norms2) / (n * (n - 1))

    def _law(self, spectrum: Spectrum, level: float) -> dict[str, float]:
        a = float(np.abs(self._ever.skewness_of_mean[_TAILS]).max())
        largest, square = spectrum.at_least(self._ever.m2[2] / self.draws), spectrum.trace_of_square
        return {"n": self.draws, "largest": largest, "square": square, "stretch": stretch(a, level, spectrum.error)}

    def _level(self) -> float:
        """What the certificate may spend at the next look that it can pass."""
        return self.settings.beta / 2 ** (self._spent + 1)

    def _tolerance(self, level: float) -> float:
        """Δ; with an open κ that of the least κ, itself wrong with probability `level` at most (0: none is shown)."""
        if self.scale is not None:
            return self._allowed
        low = float(self._interval_along(1 - 2 * level)[0][0])
        return self.settings.rtol * max(low, 0.0) + self.settings.atol if math.isfinite(low) else 0.0

    def _interval_along(self, confidence: float) -> tuple[Floats, Floats]:
        """Of the mean of the scores along μ*."""
        if self.settings.bounds is not None:
            return bounded_interval(self._ever[:1], self.settings.bound, confidence=confidence)
        return interval(self._ever[:1], confidence=confidence)

    def _certified(self) -> bool:
        level = self._level()
        if self.scale is None:
            level *= 0.9
        Δ = self._tolerance(self._level() * 0.1)
        law = self._law(self._whole, level)
        if bool(self._ever.refused[_TAILS].any()) or self._certificate(0.0, Δ, **law) > level:
            return False
        self._spent += 1
        return self._certificate(self._statistic(), Δ, **law) <= level

    def _certificate(self, U: float, Δ: float, **law: float) -> float:
        return p_value(U, Δ, **law)

    # -- telling

    def along_witness(self, x: Tensor) -> float:
        """⟨x, v⟩ of the direction v that was last confirmed."""
        return float(x @ self._v[:, _CONFIRM])

    def verdict(self) -> Judgement:
        """What is known now; INCONCLUSIVE until decided."""
        n, norm = self.draws, self._norm
        if n == 0:
            raise UsageError(f"draws: 0; a verdict takes at least one grain of {GRAIN}.")
        along = self._ever[:1]
        kappa = self._scale_interval(along)
        unit = self._target_norm(kappa.value)
        U, β = self._statistic(), self.settings.beta / 2 ** max(self._spent, 1)
        if self.settings.bounds is not None:
            m = max(self._looked, 1)
            β = self.settings.beta / (m * (m + 1))
            missed = self._exact_bias(β)
        else:
            missed = upper_bound(U, β, **self._law(self._whole, β))  # type: ignore[arg-type]
        bias = math.sqrt(max(U, 0.0))
        tails = self._tails()
        status = Status.PASS if self._passed else Status.FAIL if self._failed else Status.INCONCLUSIVE
        note = ""
        if status is Status.PASS:
            note = "nonzero" if self._shown else ""
        elif status is Status.INCONCLUSIVE and tails.refused and self.settings.bounds is None:
            note = "constant" if tails.constant else "tails"
        allowed = self._allowed if self.scale is not None else self._tolerance(β * 0.1)
        effect = (
            Interval(*(float(x) / unit if unit > 0 else math.nan for x in self._effect))
            if self._last >= 0 and self.settings.bounds is None
            else None
        )
        return Judgement(
            status=status,
            draws=n,
            rel=bias / unit if unit > 0 else math.nan,
            missed=missed / unit if unit > 0 else math.nan,
            bias=bias,
            missed_bias=missed,
            allowed=allowed,
            scale=kappa,
            off_axis=self._off_axis_interval(kappa) if norm > 0 else Interval(*[math.nan] * 3),
            variance=self._variance_interval(),
            witness=WITNESSES[self._last] if self._last >= 0 else None,
            effect=effect,
            needed=self._needed(U, allowed, tails) if status is Status.INCONCLUSIVE else None,
            tails=tails,
            note=note,
            rarest=math.log(1 / self.settings.alpha) / n,
        )

    def _target_norm(self, kappa: float) -> float:
        return float(self._target.norm()) if self.scale is not None else abs(kappa) * self._norm

    def _scale_interval(self, along: Scores) -> Interval:
        if self._norm == 0:
            return Interval(*[math.nan] * 3)
        low, high = self._interval_along(self._confidence)
        known = 0.0 if self.scale is None else self.scale
        return Interval(*(known + float(x[0]) / self._norm for x in (along.mean, low, high)))

    def _off_axis_interval(self, kappa: Interval) -> Interval:
        n, along = self.draws, self._ever[:1]
        U, spectrum = self._statistic(), self._whole
        if self.scale is not None:
            mean, m2 = float(along.mean[0]), float(along.m2[0])
            U -= mean**2 - m2 / (n * (n - 1))  # ((Σy)² − Σy²)/(n(n−1)) of the scores along μ*
            spectrum = self._across
        tail = (1 - self._confidence) / 2
        high = upper_bound(U, tail, **self._law(spectrum, tail))  # type: ignore[arg-type]
        low = 0.0 if self._looked == 0 else max(self._aside_low, 0.0)

        def share(aside: float, κ: float) -> float:
            total = math.hypot(aside, κ * self._norm)
            return aside / total if total > 0 else math.nan

        if tuple(map(math.isfinite, (kappa.low, kappa.high))) != (True, True):
            return Interval(share(math.sqrt(max(U, 0.0)), kappa.value), math.nan, math.nan)
        ends = sorted((abs(kappa.low), abs(kappa.high)))
        least = 0.0 if kappa.low < 0 < kappa.high else ends[0]
        return Interval(share(math.sqrt(max(U, 0.0)), kappa.value), share(low, ends[1]), share(high, least))

    def _variance_interval(self) -> Interval:
        gap = (self._sum / self.draws - self._centre).square().sum().reshape(1).cpu().numpy()
        return Interval(*(float(x[0]) for x in total_variance(self._ever[1:2], gap, confidence=self._confidence)))

    def _tails(self) -> Tails:
        refused = self._ever.refused
        of = self._ever[2:] if refused[2] and not refused[0] else self._ever[:1]
        body = self._tail[-max(5, min(_TAIL, int(3 * math.sqrt(self.draws)))) :]
        return Tails(
            refused=bool(of.refused[0]),
            skewness_of_mean=float(of.skewness_of_mean[0]),
            largest_share=float(of.largest_share[0]),
            pareto_k=pareto_k(body, cutoff=float(body[0])),
            effective_draws=self._norms**2 / self._norms2 if self._norms2 > 0 else 0.0,
            constant=bool(of.constant[0]),
        )

    def _needed(self, U: float, allowed: float, tails: Tails) -> int | None:
        """Draws at which a verdict is to be expected if the bias is what U says, rounded up to a look."""
        if self.settings.bounds is not None:
            return self._needed_within_bounds(allowed)
        if tails.constant:
            return None
        n = float(draws_for_tails(self._ever)[_TAILS].max()) if tails.refused else 0.0
        law = {"largest": self._whole.largest, "square": self._whole.trace_of_square}
        noise = math.sqrt(2 * law["square"]) / self.draws + 2 * math.sqrt(max(U, 0.0) * law["largest"] / self.draws)
        known = U if U > 2 * noise else 0.0  # noqa: SIM300
        if allowed > 0 and known < allowed**2:
            n = max(n, draws_to_certify(allowed, self._level(), U=known, **law))
        elif known > 0:  # along a direction as noisy as the noisiest, a trigger and its confirmation
            least = allowed if self.settings.mode == "exceeds" else 0.0
            z = z_of(self.settings.stage_level / (_W * self.settings.looks))
            n = max(n, 2 * (z / (math.sqrt(known) - least)) ** 2 * law["largest"])
        else:
            return None
        return self._look_after(n) if math.isfinite(n) else None

    def _needed_within_bounds(self, allowed: float) -> int | None:
        """The look at which D̄ as it is would pass; None: it is outside, and what is left is to wait for a FAIL."""
        size, q, R = float(self._total.norm()) / self.draws, self._q, self.settings.bound
        size = math.sqrt(max(size**2 - float(q.mean[0]) / self.draws, 0.0))  # less what noise makes of it
        if size >= allowed:
            return None
        n = self.draws
        while n < 2**60:
            n *= 2
            later = Scores(n, q.mean, q.m2 * (n / q.n), q.m3, q.low, q.high)
            noise = float(q.mean[0]) / n
            if bounded_bias(math.sqrt(size**2 + noise), later, R, self._exact_level) <= allowed:
                return self._look_after(n)
        return None

    def _look_after(self, n: float) -> int:
        return self.settings.look_after(n, self.draws)

    # -- checkpoints

    def state(self) -> dict[str, Tensor]:
        """Everything, as tensors: a judge made `from_state` goes on to the same bytes."""
        f64 = torch.float64
        scores = {"ever": self._ever, "block": self._block, "q": self._q} | {
            f"part{i}": p for i, p in enumerate(self._parts)
        }
        out = {name: getattr(self, f"_{name}").clone() for name in _TENSORS}
        out |= {"loud": self._loud.directions.clone(), "kept": self._loud.kept.clone()}
        out |= {name: torch.from_numpy(s.rows) for name, s in scores.items()}
        out |= {name: torch.from_numpy(getattr(self, f"_{name}").copy()) for name in _ARRAYS}
        out["wealth"] = torch.from_numpy(self._wealth.log.copy())
        for name in ("whole", "across"):
            s = getattr(self, f"_{name}")
            out[name] = torch.tensor([s.blocks, s.top, s.square, s.square2], dtype=f64)
        out["numbers"] = torch.tensor([float(getattr(self, name)) for name in _NUMBERS], dtype=f64)
        return out

    @classmethod
    def from_state(
        cls, reference: Tensor, settings: Settings, *, state: dict[str, Tensor], scale: float | None = 1.0
    ) -> Judge:
        """The judge that `state()` was taken from; reference, settings and scale must be the same."""
        judge = cls(reference, settings, scale=scale)
        if tuple(state["total"].shape) != tuple(judge._total.shape) or f"part{settings.stages - 1}" in state:
            raise UsageError("state: it belongs to another reference or to other settings.")
        for name in _TENSORS:
            setattr(judge, f"_{name}", state[name].contiguous().clone())
        judge._loud = Loud(state["loud"].contiguous().clone(), state["kept"].contiguous().clone())
        for name in _ARRAYS:
            setattr(judge, f"_{name}", state[name].numpy().copy())
        judge._ever, judge._block, judge._q = (Scores.from_rows(state[name].numpy()) for name in ("ever", "block", "q"))
        judge._wealth = Wealth(state["wealth"].numpy().copy())
        judge._parts = [Scores.from_rows(state[f"part{i}"].numpy()) for i in range(settings.stages - 1)]
        for name in ("whole", "across"):
            blocks, *sums = state[name].tolist()
            setattr(judge, f"_{name}", Spectrum(int(blocks), *sums))
        for name, value in zip(_NUMBERS, state["numbers"].tolist(), strict=True):
            kind = type(getattr(judge, name))
            setattr(judge, name, kind(value))
        return judge


_TENSORS = ("total", "sum", "squares", "power", "centre", "v")
_ARRAYS = ("tail", "z", "effect")
_NUMBERS = (
    "decided", "next_look", "_norms2", "_norms", "_weight2", "_looked", "_spent", "_eps", "_frozen", "_frozen_at",
    "_shown", "_failed", "_passed", "_last", "_aside_low",
)  # fmt: skip


def check_grains(settings: Settings, before: int, P: int, **given: Tensor | None) -> None:
    """Raise `UsageError` unless all that is given after so many draws is grains that can be taken at once, of P coordinates."""
    first, *_ = (x for x in given.values() if x is not None)
    grains = len(first) // GRAIN if first.dim() else 0
    for name, x in given.items():
        if x is not None and (tuple(x.shape) != (grains * GRAIN, P) or not grains):
            raise UsageError(f"{name}: shape {list(x.shape)}; a grain against this reference is [{GRAIN}, {P}].")
    if grains > (most := settings.grains_at_once(before // GRAIN, grains)):
        raise UsageError(f"draws: {grains} grains, of which something is decided after {most}; give those first.")


def refuse_not_finite(x: Tensor, before: int, *, total: Tensor | None = None) -> None:
    """Raise for the first of draws `[n, P]` that is not finite; so many came before them. `total`: some sum of all of them."""
    if bool(torch.isfinite((x if total is None else total).sum())):
        return
    bad = ~torch.isfinite(x).all(1)
    if bool(bad.any()):
        raise NotFiniteError(f"draw {before + int(bad.nonzero()[0, 0])} of the stream is NaN or infinite.")


def total_variance(spread: Scores, gap: Floats, *, confidence: float = CONFIDENCE) -> tuple[Floats, Floats, Floats]:
    """Tr Cov X with its interval, from scores ‖X − c‖² and gap = ‖X̄ − c‖², c a mean of few draws: E‖X − c‖² − ‖E X − c‖²."""
    value = (spread.mean - gap) * spread.n / (spread.n - 1)
    low, high = interval(spread, confidence=confidence)
    shift = value - spread.mean
    return value, np.maximum(low + shift, 0.0), high + shift


def _any_direction(P: int) -> Tensor:
    """Where there is no μ*: signs drawn once and for all."""
    signs = np.random.Generator(np.random.Philox(P)).integers(0, 2, P) * 2 - 1
    return torch.from_numpy(signs / math.sqrt(P))
