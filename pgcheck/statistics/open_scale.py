"""E x = κ g for some κ > 0, where g is not known: every draw gives an x, and an r with E r = g.

û is a direction that was fixed before the draws, with ⟨g, û⟩ > 0. Looks, witnesses and stages are those of
`pgcheck.statistics.sequential`; what is another matter is that κ has to be found from the noise of x and r.

* What κ may be: {κ > 0 : the guarded t of ⟨x − κ r, û⟩ does not reject} (Fieller 1954, with the guarded t).
* FAIL: along a witness v, learned from earlier draws, the guarded t of ⟨x − κ r, v⟩ rejects at *every* κ that may be; or none
  may be, as ⟨x, û⟩ is negative and ⟨r, û⟩ positive. If E x = κ g, a stage is wrong only if it leaves κ out, for which a fifth
  of its level is spent, or if the test of v rejects at κ itself, for which the rest is. Each confirming part finds its own κ.
* PASS: with κ₀ from earlier draws, the certificate on the draws since then that ‖E x − κ₀ g‖ < κ₀ ‖g‖ sin(arctan δ). An E x
  whose part across g is δ times the one along it, or more, is at least as far as that from κ₀ g, *whatever* κ₀ is: that a
  poor κ₀ costs power is all it does.

Guarantee: no error rate rests on how well κ is known. T is least at an end of an interval of κ where it is positive all over;
H, and the guards, are looked at in `_GRID` places of it. The price, beside a reference that is known: certificates rest on half
of the draws, and the noise of r is in all.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from pgcheck.errors import UsageError
from pgcheck.statistics.certificate import GRAM, Spectrum, upper_bound
from pgcheck.statistics.grain import Grain
from pgcheck.statistics.guarded import Floats, Scores, interval, z_of, z_scores
from pgcheck.statistics.panel import TWO_SIDED, WITNESSES, Loud, directions, loud_directions, thresholds
from pgcheck.statistics.sequential import (
    GRAIN,
    SLACK,
    Interval,
    Judge,
    Judgement,
    Settings,
    Tails,
    check_grains,
    confidence_after,
    refuse_not_finite,
    total_variance,
)
from pgcheck.statistics.status import Status
from pgcheck.statistics.variance import Pairs, ratio_of_means

_GRID = 9
ON_SCALE = 0.2  # of a stage's level, what is spent on κ
_LEAST = 1e-6  # of the ratio, a κ that stands for all below it
_W = len(WITNESSES)
_NO_TAILS = Tails(False, math.nan, math.nan, math.nan, math.nan, False)


def scales_left(along: Pairs, level: float) -> Floats | None:
    """Places all over an interval of κ > 0 that leaves out E a/E b with probability `level` at most, of pairs (⟨x, û⟩, ⟨r, û⟩);
    None: there is no such interval yet."""
    found = ratio_of_means(along, confidence=1 - level)
    if not (math.isfinite(found.low) and math.isfinite(found.high)):
        return None
    places = np.geomspace(max(found.low, _LEAST * found.value), found.high, _GRID)
    return None if any(bool(along.minus(κ).refused[0]) for κ in places) else places


def turned_round(along: Pairs) -> float:
    """The z-score of “E a ≥ 0 or E b ≤ 0”: no κ > 0 makes E a = κ E b where it is refuted."""
    a, b = (z_scores(_column(along, i))[0] for i in (0, 1))
    return max(0.0, min(-float(a), float(b)))


def _column(pairs: Pairs, i: int) -> Scores:
    rows = pairs.extremes[:, i]
    parts = (pairs.mean[i], pairs.second[2 * i], pairs.third[3 * i], rows.min(), rows.max())
    return Scores(pairs.n, *(np.array([float(x)]) for x in parts))


def unexplained(across: Pairs, places: Floats | None, slack: tuple[float, float]) -> tuple[float, float]:
    """Over all κ that are left, the least z-score of “E(a − κ b) is above the slack”, and of “… below minus the slack”.

    Of pairs (⟨x, v⟩, ⟨r, v⟩); 0 where some κ explains them. The slack is that of x, and κ times that of r.
    """
    up = down = math.inf
    for κ in () if places is None else places.tolist():
        y, room = across.minus(κ), slack[0] + κ * slack[1]
        up = min(up, float(z_scores(y.plus(-room))[0]))
        down = min(down, float(z_scores(y.times(-1.0).plus(-room))[0]))
    return (max(up, 0.0), max(down, 0.0)) if math.isfinite(up) else (0.0, 0.0)


class _Block(Judge):
    """The draws since κ₀ was fixed, of which only the certificate is asked."""

    def certified(self, spent: int) -> bool:
        """Whether ‖E x − κ₀ g‖ is shown to be small, looks that spent something counted from `spent`."""
        self._spent = spent
        return self._certified()

    @property
    def spent(self) -> int:
        """Looks that spent something of β so far."""
        return self._spent

    def size_at_most(self, level: float) -> float:
        """What ‖E x − κ₀ g‖ exceeds with probability `level` at most."""
        return upper_bound(self._statistic(), level, **self._law(self._whole, level))  # type: ignore[arg-type]

    def _look_after(self, n: float) -> int:
        return math.ceil(n)  # looks are those of another


class OpenJudge:
    """Eats grains of pairs of draws in order and decides at looks; see the module.

    Args:
        reference: û times what ‖g‖ is taken to be, `[P]`; it must not come from the draws that are eaten, and ⟨g, û⟩ must be
            above 0. A tolerance is relative to its length: let `settings` allow for ‖g‖ being less.
        settings: of mode `nonzero`, without `bounds`.

    Raises:
        UsageError: other settings, a scale, or a reference of length 0.
    """

    paired = True

    def __init__(self, reference: Tensor, settings: Settings, *, scale: float | None = None) -> None:
        if scale is not None:
            raise UsageError(f"scale: {scale!r}; one that is given is for a Judge.")
        if settings.mode != "nonzero":
            raise UsageError(
                f"mode: {settings.mode!r}; where ∇J is estimated and κ is open, only 'nonzero' can be judged."
            )
        if settings.bounds is not None:
            raise UsageError(
                f"bounds: {settings.bounds!r}; where ∇J is estimated and κ is open they prove nothing. Leave them out, or claim"
                " a fixed scale, as in proportional(0.5)."
            )
        self.settings = settings
        self._reference = reference.detach().to(torch.float64).reshape(-1)
        self._norm, P = float(self._reference.norm()), len(self._reference)
        if not (math.isfinite(self._norm) and self._norm > 0):
            raise UsageError("reference: its norm must be a number above 0, and a part of what it stands for.")
        self._along = self._reference / self._norm
        self.decided, self.draws, self.next_look = False, 0, settings.first_look
        zero = torch.zeros_like(self._reference)
        self._x, self._r, self._xx, self._xr, self._rr, self._absx, self._absr = (zero.clone() for _ in range(7))
        self._centre = zero.clone()
        self._v = zero.new_zeros(P, _W + 1)  # the witnesses, and the one that is confirmed
        self._v[:, 0] = self._along
        self._loud = Loud(zero.new_zeros(P, 0), zero.new_ones(0))
        self._spread = Scores.none(1)
        self._ever: Pairs | None = None  # along û: all draws
        self._witnessed: list[Pairs | None] = [None] * (_W - 1)  # those that are learned, since they were
        self._fresh: list[list[Pairs | None]] = self._no_parts()  # along û and the frozen one
        self._block: _Block | None = None  # since κ₀ was fixed
        self._before: _Block | None = None  # that of the last look
        self._looked, self._spent, self._eps = 0, 0, float(torch.finfo(torch.float64).eps)
        self._frozen, self._frozen_at, self._last = -1, 1, -1
        self._passed, self._failed, self._shown = False, False, False
        self._effect = np.full(3, np.nan)

    def _no_parts(self) -> list[list[Pairs | None]]:
        return [[None, None] for _ in range(self.settings.stages - 1)]

    @property
    def spectrum(self) -> Spectrum:
        """Of the noise of x − κ₀ r, from some of the draws."""
        block = self._before or self._block
        return Spectrum() if block is None else block.spectrum

    # -- eating

    def update(self, draws: Tensor | Grain, reference_draws: Tensor | None = None) -> None:
        """Take the next grain `[1024, P]`, or several as a `Judge` may, and the r of each; after a verdict nothing is done.

        Raises:
            UsageError: a wrong shape, or no r. NotFiniteError: a NaN or infinity, with the number of its draw.
        """
        if self.decided:
            return
        if isinstance(draws, Grain):
            x, self._eps = draws.x, max(self._eps, draws.eps)
        else:
            x = draws
        if reference_draws is None:
            P = len(self._reference)
            raise UsageError(f"reference_draws: shape None; a grain against this reference is [{GRAIN}, {P}].")
        check_grains(self.settings, self.draws, len(self._reference), draws=x, reference_draws=reference_draws)
        if x.dtype.is_floating_point:
            self._eps = max(self._eps, float(torch.finfo(x.dtype).eps))
        x, r = (
            d.detach().to(device=self._reference.device, dtype=torch.float64).contiguous() for d in (x, reference_draws)
        )
        for d in (x, r):
            refuse_not_finite(d, self.draws)
        self._x += x.sum(0)
        self._r += r.sum(0)
        self._xx += (x * x).sum(0)
        self._xr += (x * r).sum(0)
        self._rr += (r * r).sum(0)
        self._absx += x.abs().sum(0)
        self._absr += r.abs().sum(0)
        if self.draws == 0:
            self._centre = x[:GRAIN].mean(0)
            self._loud = loud_directions((x - r * self._ratio)[:GRAM])
        self.draws += len(x)
        self._spread = self._spread.merge(Scores.of((x - self._centre).square().sum(1, keepdim=True).cpu().numpy()))
        a, b = ((d @ self._v).cpu().numpy() for d in (x, r))
        self._ever = _merged(self._ever, a[:, 0], b[:, 0])
        if self._block is not None:
            self._block.update(x, r)
            for i in range(_W - 1):
                self._witnessed[i] = _merged(self._witnessed[i], a[:, i + 1], b[:, i + 1])
        if self._frozen >= 0:
            part = self._fresh[(self.draws - 1 - self._frozen_at) * len(self._fresh) // self._frozen_at]
            for i, w in enumerate((0, _W)):
                part[i] = _merged(part[i], a[:, w], b[:, w])
        if self._block is None and self.draws == self._learns_at:
            self._learn()
        if self.draws == self.next_look:
            self._look()

    @property
    def _learns_at(self) -> int:
        return max(GRAIN, self.settings.first_look // 4 // GRAIN * GRAIN)

    @property
    def _ratio(self) -> float:
        """Some κ > 0: ⟨Σ x, û⟩/⟨Σ r, û⟩ if it is one."""
        κ = self._signed_ratio
        return abs(κ) if math.isfinite(κ) and κ != 0 else 1.0

    @property
    def _signed_ratio(self) -> float:
        below = float(self._r @ self._along)
        return float(self._x @ self._along) / below if below != 0 else math.nan

    def _learn(self) -> None:
        """κ₀ and the directions, from every draw so far; what rests on them starts again."""
        κ = self._ratio
        squares = self._xx - 2 * κ * self._xr + κ**2 * self._rr
        made = directions(self._x - κ * self._r, squares, self.draws, along=self._along, loud=self._loud, aside=True)
        self._v[:, 1:_W] = made[:, 1:_W]
        self._witnessed = [None] * (_W - 1)
        self._block = _Block(self._reference, self._of_block, scale=κ)

    @property
    def _of_block(self) -> Settings:
        """For ‖E x − κ₀ g‖, which is (δ κ₀ ‖g‖ + atol)/√(1 + δ²) at least where E x is so far across g."""
        s = self.settings
        shrink = 1 / math.hypot(1.0, s.rtol)
        never = 4 * s.most_draws  # it looks when it is asked
        return replace(s, rtol=s.rtol * shrink, atol=s.atol * shrink, first=never, bounds=None, rarest=None)

    # -- looking

    def _look(self) -> None:
        assert self._block is not None
        passed = self._block.certified(self._spent)
        self._spent = self._block.spent
        if self._frozen >= 0:
            self._confirm()
        level = self.settings.stage_level / self.settings.looks
        evidence = self._evidence(level)
        ratio = evidence.max(0) / thresholds((1 - ON_SCALE) * level)
        best = int(ratio.argmax())
        fired = bool(ratio[best] >= 1.0)
        self._looked += 1
        self._shown = self._shown or self._failed
        if passed:
            self.decided, self._passed, self._failed = True, True, False
        elif self._failed or self._looked >= self.settings.looks + fired:  # the last look's trigger is still confirmed
            self.decided = True
        self._before = self._block
        if self.decided:
            return
        self._learn()
        self._frozen = -1
        if fired:
            sign = 1.0 if evidence[0, best] >= evidence[1, best] else -1.0
            self._v[:, _W] = sign * self._v[:, best]
            self._frozen, self._frozen_at, self._last = best, self.draws, best
            self._fresh, self._effect = self._no_parts(), np.full(3, np.nan)
        self.next_look = 2 * self.draws

    def _evidence(self, level: float) -> Floats:
        """Z-scores `[2, 6]` of “above 0 at every κ that may be” and “below 0 …”."""
        assert self._ever is not None
        out = np.full((2, _W), -np.inf)
        out[1, 0] = turned_round(self._ever)  # κ > 0 is what is claimed
        places = scales_left(self._ever, ON_SCALE * level)
        for w, pairs in enumerate(self._witnessed, 1):
            assert pairs is not None
            out[:, w] = unexplained(pairs, places, self._slack(self._v[:, w]))
        out[1, TWO_SIDED:] = -np.inf  # a learned direction has a sign
        return out

    def _slack(self, v: Tensor) -> tuple[float, float]:
        """What rounding of the draws could make of the means of ⟨x, v⟩ and ⟨r, v⟩."""
        size = SLACK * self._eps / self.draws
        return size * float(self._absx @ v.abs()), size * float(self._absr @ v.abs())

    def _confirm(self) -> None:
        """Every part of the fresh draws must reject by itself, one-sided."""
        level = self.settings.stage_level
        self._failed = min(self._confirming_z(level)) >= z_of((1 - ON_SCALE) * level)
        sums: list[Pairs] = []
        for i in (0, 1):
            first, *rest = (part[i] for part in self._fresh)
            assert first is not None
            for p in rest:
                assert p is not None
                first = first.merge(p)
            sums.append(first)
        along, across = sums
        half = (1 + confidence_after(self.draws, self.settings)) / 2
        places = scales_left(along, 1 - half)
        if self._frozen == 0 or places is None:
            return
        ends = [interval(across.minus(κ), confidence=half) for κ in places.tolist()]
        middle = float(across.minus(self._ratio).mean[0])
        self._effect = np.array([middle, min(float(e[0][0]) for e in ends), max(float(e[1][0]) for e in ends)])

    def _confirming_z(self, level: float) -> list[float]:
        out = []
        for along, across in self._fresh:
            assert along is not None
            assert across is not None
            if self._frozen == 0:
                out.append(turned_round(along))
                continue
            places = scales_left(along, ON_SCALE * level)
            out.append(unexplained(across, places, self._slack(self._v[:, _W]))[0])
        return out

    # -- telling

    def verdict(self) -> Judgement:
        """What is known now; INCONCLUSIVE until decided. `bias` is ‖E x − κ g‖ at the κ where ⟨x − κ r, û⟩ is 0 on average."""
        if self.draws == 0:
            raise UsageError(f"draws: 0; a verdict takes at least one grain of {GRAIN}.")
        assert self._ever is not None
        n, confidence = self.draws, confidence_after(self.draws, self.settings)
        κ, tail = self._signed_ratio, (1 - confidence) / 2
        found = ratio_of_means(self._ever, confidence=confidence)
        d = self._x - κ * self._r
        squares = float((self._xx - 2 * κ * self._xr + κ**2 * self._rr).sum())
        bias = math.sqrt(max((float(d @ d) - squares) / (n * (n - 1)), 0.0))
        unit = abs(κ) * self._norm
        block = self._before or self._block
        missed, off, said = math.nan, math.nan, None
        if block is not None and block.draws:
            κ0 = self._norm * float(block.scale or 1.0)
            β = self.settings.beta / 2 ** max(self._spent, 1)
            missed = block.size_at_most(β) / κ0 * math.hypot(1.0, self.settings.rtol)
            off, said = min(block.size_at_most(tail) / κ0, 1.0), block.verdict()
        status = Status.PASS if self._passed else Status.FAIL if self._failed else Status.INCONCLUSIVE
        tails = _NO_TAILS if said is None else said.tails
        note = ""
        if status is Status.PASS:
            note = "nonzero" if self._shown else ""
        elif status is Status.INCONCLUSIVE and tails.refused:
            note = "constant" if tails.constant else "tails"
        gap = (self._x / n - self._centre).square().sum().reshape(1).cpu().numpy()
        spread = total_variance(self._spread, gap, confidence=confidence)
        of_block = None if said is None or status is not Status.INCONCLUSIVE else said.needed
        return Judgement(
            status=status,
            draws=n,
            rel=bias / unit if unit > 0 else math.nan,
            missed=missed,
            bias=bias,
            missed_bias=missed * unit,
            allowed=self.settings.rtol * unit + self.settings.atol,
            scale=Interval(κ, found.low, found.high),
            off_axis=Interval(bias / math.hypot(bias, unit) if unit > 0 else math.nan, 0.0, off),
            variance=Interval(*(float(x[0]) for x in spread)),
            witness=WITNESSES[self._last] if self._last >= 0 else None,
            effect=Interval(*(float(x) / unit for x in self._effect)) if self._last > 0 and unit > 0 else None,
            needed=None if of_block is None else self.settings.look_after(2 * of_block, n),
            tails=tails,
            note=note,
            rarest=math.log(1 / self.settings.alpha) / n,
        )

    # -- checkpoints

    def state(self) -> dict[str, Tensor]:
        """Everything, as tensors: a judge made `from_state` goes on to the same bytes."""
        out = {name: getattr(self, f"_{name}").clone() for name in _TENSORS}
        out |= {"loud": self._loud.directions.clone(), "kept": self._loud.kept.clone()}
        out["spread"] = torch.from_numpy(self._spread.rows)
        out["effect"] = torch.from_numpy(self._effect.copy())
        for name, pairs in self._named_pairs.items():
            if pairs is not None:
                out |= {f"{name}.{part}": x for part, x in pairs.state().items()}
        for name, block in (("block", self._block), ("before", self._before)):
            if block is not None:
                out |= {f"{name}.{part}": x for part, x in block.state().items()}
                out[f"{name}.κ"] = torch.tensor(float(block.scale or 1.0), dtype=torch.float64)
        out["numbers"] = torch.tensor([float(getattr(self, name)) for name in _NUMBERS], dtype=torch.float64)
        return out

    @property
    def _named_pairs(self) -> dict[str, Pairs | None]:
        named = {"ever": self._ever} | {f"witness{i}": p for i, p in enumerate(self._witnessed)}
        return named | {f"part{i}{j}": p for i, part in enumerate(self._fresh) for j, p in enumerate(part)}

    @classmethod
    def from_state(
        cls, reference: Tensor, settings: Settings, *, state: dict[str, Tensor], scale: float | None = None
    ) -> OpenJudge:
        """The judge that `state()` was taken from; reference and settings must be the same."""
        judge = cls(reference, settings, scale=scale)
        if tuple(state["x"].shape) != tuple(judge._x.shape):
            raise UsageError("state: it belongs to another reference or to other settings.")
        for name in _TENSORS:
            setattr(judge, f"_{name}", state[name].contiguous().clone())
        judge._loud = Loud(state["loud"].contiguous().clone(), state["kept"].contiguous().clone())
        judge._spread, judge._effect = Scores.from_rows(state["spread"].numpy()), state["effect"].numpy().copy()
        judge._ever = _pairs_from(state, "ever")
        judge._witnessed = [_pairs_from(state, f"witness{i}") for i in range(_W - 1)]
        judge._fresh = [[_pairs_from(state, f"part{i}{j}") for j in (0, 1)] for i in range(len(judge._fresh))]
        for name in ("block", "before"):
            if of := _under(state, name):
                κ = float(of.pop("κ"))
                setattr(judge, f"_{name}", _Block.from_state(judge._reference, judge._of_block, state=of, scale=κ))
        for name, value in zip(_NUMBERS, state["numbers"].tolist(), strict=True):
            setattr(judge, name, type(getattr(judge, name))(value))
        return judge


_TENSORS = ("x", "r", "xx", "xr", "rr", "absx", "absr", "centre", "v")
_NUMBERS = (
    "decided", "draws", "next_look", "_looked", "_spent", "_eps", "_frozen", "_frozen_at", "_last", "_passed", "_failed",
    "_shown",
)  # fmt: skip


def _under(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    start = f"{name}."
    return {key.removeprefix(start): x for key, x in state.items() if key.startswith(start)}


def _pairs_from(state: dict[str, Tensor], name: str) -> Pairs | None:
    of = _under(state, name)
    return Pairs.from_state(of) if of else None


def _merged(old: Pairs | None, a: Floats, b: Floats) -> Pairs:
    new = Pairs.of(a, b)
    return new if old is None else old.merge(new)
