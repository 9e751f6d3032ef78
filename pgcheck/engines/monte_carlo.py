"""Sampled moments and verdicts: every estimator on the same numbered draws, until each is judged or the draws are spent.

A draw is one whole batch (`pgcheck.sampling`). Draws are evaluated in grains of 1024 consecutive ones: rollouts → coefficients
→ C[k,a] → x = ĝ in the space of the verdict, `[1024, P]`. A grain goes to the estimator's account (mergeable moments,
`pgcheck.engines.accounts`) and to one judge for each scale that is claimed of it (`pgcheck.statistics.sequential`). An
estimator whose judges have all decided is not evaluated any more.

Guarantee: what is found of an estimator is a function of (problem, seed, settings) to the bit, whatever is judged beside it,
however many grains are done between checkpoints, and whether it was interrupted; memory does not grow with the draws.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from pgcheck.engines.accounts import Account
from pgcheck.engines.coefficients import cells_of, coefficients_of, scattered
from pgcheck.engines.declarations import verify_purity
from pgcheck.engines.moments import Moments, Progress
from pgcheck.engines.threads import one_thread
from pgcheck.errors import BudgetError, NotFiniteError, UsageError, names_problem
from pgcheck.estimators.base import Estimator
from pgcheck.estimators.from_loss import LossCoefficients
from pgcheck.problem import Problem
from pgcheck.sampling import Sampler, as_device
from pgcheck.statistics.sequential import CONFIDENCE, GRAIN, SHARE, Judge, Settings, confidence_after
from pgcheck.trajectories import SideTable, Trajectories, is_count

DEFAULT_DRAWS = 262_144  # most draws of one problem
MOST_COORDINATES = 16_384  # P: a grain of them is 128 MiB
_BLOCK_ELEMENTS = 120_000  # positions evaluated at once
_GRAMS = 32  # grains of each doubling whose spectrum is taken
_FORMAT = "pgcheck-checkpoint/1"
_ROUNDING = 1e-14  # a gradient below this part of the rewards is 0
_FIRST = 64  # draws whose estimates are part of a checkpoint's identity

Scale = float | None


class Space(Protocol):
    """Where estimates live."""

    @property
    def reference(self) -> Tensor:
        """What they should be on average, `[P]`."""

    def project(self, c: Tensor, table: Trajectories, index: Tensor) -> Tensor:
        """Estimates `[count, P]` from coefficients `[count, B, T]` (or `[count, B, T, A]`) of the rows `index` `[count, B]`."""


@dataclass(frozen=True)
class LogitSpace:
    """ĝ in logit space, against ∇J."""

    reference: Tensor  # [K·A]

    def project(self, c: Tensor, table: Trajectories, index: Tensor) -> Tensor:
        """ĝ = L C."""
        logits = c.dim() == 4
        cells = table.contexts * table.actions
        x = scattered(c, cells_of(table, index, logits=logits), cells)
        if logits:
            return x
        pi = torch.softmax(table.logits, -1)
        parts = x.unflatten(-1, pi.shape)
        return (parts - pi * parts.sum(-1, keepdim=True)).flatten(-2)


@dataclass(frozen=True)
class Sampling:
    """How a run samples and what its verdicts may get wrong.

    Args:
        seed: of the draws; the same seed gives the same bytes.
        draws: most draws for one problem.
        tolerance: δ; a bias below δ ‖∇J‖ is none.
        alpha: P(some correct estimator of the run fails); each check gets 1/1024 of it, so that one more moves no other's.
        beta: P(an estimator whose bias is δ ‖∇J‖ passes), for each check.
        device: where coefficients are evaluated, as torch names it.
    """

    seed: int = 0
    draws: int = DEFAULT_DRAWS
    tolerance: float = 0.05
    alpha: float = 1e-6
    beta: float = 1e-3
    device: str = "cpu"

    def __post_init__(self) -> None:
        _check_counts(seed=self.seed, draws=self.draws)
        if not (isinstance(self.tolerance, (int, float)) and 0 < self.tolerance < 1):
            raise UsageError(
                f"tolerance: {self.tolerance!r}; no finite sample shows that a bias is 0, so it must lie between 0 and 1. The"
                " exact engine has none."
            )
        for name in ("alpha", "beta"):
            x = getattr(self, name)
            if not (isinstance(x, (int, float)) and 0 < x < 0.5):
                raise UsageError(f"{name}: {x!r}; an error rate lies between 0 and 1/2.")

    @property
    def settings(self) -> Settings:
        """Of one check."""
        return Settings(rtol=self.tolerance, alpha=self.alpha / SHARE, beta=self.beta)


@one_thread()
@names_problem
def monte_carlo(
    estimators: Sequence[Estimator],
    problem: Problem,
    *,
    scales: Sequence[Sequence[Scale]] | None = None,
    settings: Settings | None = None,
    seed: int = 0,
    draws: int = DEFAULT_DRAWS,
    space: Space | None = None,
    device: str = "cpu",
    block: int = 16,
    checkpoint: Path | None = None,
    progress: Progress | None = None,
) -> list[Moments]:
    """Draw until every estimator is judged, or the draws are spent. Where ∇J = 0, nothing can be judged relative to it.

    Args:
        scales: for each estimator the κ of claims E ĝ = κ ∇J to judge, None for "some κ > 0"; without any, all draws are used.
        settings: tolerance and error rates of every judge.
        draws: most draws; rounded up to whole grains of 1024.
        space: where the verdict is given; default, logits.
        device: where coefficients are evaluated, as torch names it.
        block: grains between two checkpoints, and calls of `progress`.
        checkpoint: a file that is written after each block, and from which a run that was cut off goes on.

    Raises:
        UsageError: `seed`, `draws` or `block` is no count; too few draws to look once; a checkpoint of another run.
        BudgetError: more coordinates than fit; the problem's `needs` cannot be sampled.
        EstimatorError: random, stateful, or of the wrong shape.
        NotFiniteError: NaN or infinity, with the draw that shows it.
    """
    settings, device = settings or Settings(), as_device(device)
    _check_counts(seed=seed, draws=draws, block=block)
    scales = [()] * len(estimators) if scales is None else scales
    if any(scales) and draws < settings.first_look:
        raise UsageError(
            f"draws: {draws:,} are too few for alpha = {settings.alpha:.3g}; the first look is at {settings.first_look:,}."
        )
    for e in estimators:
        verify_purity(e, problem, problem.probe_table(e.needs))
    where = LogitSpace(problem.gradient().reshape(-1).to(device)) if space is None else space
    if len(where.reference) > MOST_COORDINATES:
        raise BudgetError(
            f"'{problem.name}' has {len(where.reference):,} logits; verdicts are sampled for at most {MOST_COORDINATES:,}, as"
            " 1,024 estimates are held at once. Let contexts share logits, or look along a few directions:"
            " monte_carlo(…, space=SketchSpace.of(problem, directions=32)) of pgcheck.engines."
        )
    if float(where.reference.norm()) <= _ROUNDING * problem.reward_size:
        scales = [()] * len(estimators)
    run = _Run(estimators, problem, where, seed, device, settings, scales)
    last = -(-draws // GRAIN)
    if checkpoint is not None:
        run.resume(checkpoint, draws=last * GRAIN)
    while run.active and run.grain < last:
        for _ in range(min(block, last - run.grain)):
            run.step()
        if checkpoint is not None:
            run.save(checkpoint, draws=last * GRAIN)
        if progress is not None:
            _tell(run, progress, last * GRAIN)
    return [run.found(i) for i in range(len(estimators))]


def _check_counts(**given: Any) -> None:
    for name, x in given.items():
        if not (is_count(x) or (name == "seed" and x == 0 and not isinstance(x, bool))):
            least = 0 if name == "seed" else 1
            raise UsageError(f"{name}: {x!r}; it must be an integer of at least {least}.")


@dataclass
class _Lane:
    """One estimator: what is known of it."""

    estimator: Estimator
    judges: dict[Scale, Judge]
    account: Account | None = None
    centre: Tensor | None = None

    def take(self, x: Tensor, reference: Tensor, grain: int) -> None:
        if self.centre is None:
            self.centre = x.mean(0)
        gram = grain % max(1, 2 ** max(grain.bit_length() - 1, 0) // _GRAMS) == 0
        new = Account.of(x, reference, centre=self.centre, gram=gram)
        self.account = new if self.account is None else self.account.merge(new)
        for judge in self.judges.values():
            judge.update(x)

    @property
    def done(self) -> bool:
        return bool(self.judges) and all(j.decided for j in self.judges.values())


@dataclass
class _Run:
    """The loop over grains."""

    estimators: Sequence[Estimator]
    problem: Problem
    space: Space
    seed: int
    device: str
    settings: Settings
    scales: Sequence[Sequence[Scale]]
    grain: int = 0  # the next
    lanes: list[_Lane] = field(init=False)

    def __post_init__(self) -> None:
        self.lanes = [
            _Lane(e, {κ: Judge(self.space.reference, self.settings, scale=κ) for κ in asked})
            for e, asked in zip(self.estimators, self.scales, strict=True)
        ]
        needs = dict.fromkeys(e.needs for e in self.estimators)
        self._samplers: dict[tuple[SideTable, ...], Sampler] = {
            n: self.problem.sampler(seed=self.seed, needs=n, device=self.device) for n in needs
        }
        positions = self.problem.rows * self.problem.steps
        self._rows = GRAIN
        while self._rows > 1 and self._rows * positions > _BLOCK_ELEMENTS:
            self._rows //= 2

    @property
    def active(self) -> list[_Lane]:
        return [lane for lane in self.lanes if not lane.done]

    def step(self) -> None:
        """One grain, for every estimator that is not judged yet."""
        active = self.active
        first = self.grain * GRAIN
        for lane, x in zip(active, self._estimates([a.estimator for a in active], first, GRAIN), strict=True):
            lane.take(x, self.space.reference, self.grain)
        self.grain += 1

    def _estimates(self, estimators: Sequence[Estimator], first: int, count: int) -> list[Tensor]:
        """ĝ of draws number first … first + count − 1 of each estimator, `[count, P]`."""
        parts: list[list[Tensor]] = [[] for _ in estimators]
        together: dict[tuple[tuple[SideTable, ...], bool], list[int]] = {}
        for i, e in enumerate(estimators):
            together.setdefault((e.needs, e.leaf == "logits"), []).append(i)
        for low in range(first, first + count, self._rows):
            drawn: dict[tuple[SideTable, ...], tuple[Trajectories, Tensor]] = {}
            for (needs, logits), members in together.items():
                sampler = self._samplers[needs]
                if needs not in drawn:
                    drawn[needs] = sampler.draw(low, min(self._rows, first + count - low))
                table, index = drawn[needs]
                batch = table.batch(index, sampler.labels, logits=logits)
                for i in members:
                    try:
                        c = coefficients_of(estimators[i], batch)
                    except NotFiniteError:
                        self._name_draw(estimators[i], low, len(index))
                        raise
                    parts[i].append(self.space.project(c, table, index))
        return [torch.cat(x) for x in parts]

    def _name_draw(self, estimator: Estimator, first: int, count: int) -> None:
        """Raise for the first draw that is not finite, with what reproduces it."""
        sampler = self._samplers[estimator.needs]
        for number in range(first, first + count):
            table, index = sampler.draw(number, 1)
            try:
                coefficients_of(estimator, table.batch(index, sampler.labels, logits=estimator.leaf == "logits"))
            except NotFiniteError as error:
                how = f"problem.sample(1, seed={self.seed}, first={number})"
                raise NotFiniteError(
                    f"draw {number:,} of seed {self.seed}, which {how} gives again: {error.args[0]}"
                ) from None

    def found(self, i: int) -> Moments:
        """What is known of an estimator."""
        lane = self.lanes[i]
        assert lane.account is not None
        fn = lane.estimator.coefficients
        how = fn.lane or "loop" if isinstance(fn, LossCoefficients) else "coefficients"
        P = len(self.space.reference)
        K, A = (1, P) if self.problem.written else self.problem.logits.shape
        return lane.account.moments(
            self.space.reference,
            shape=(K, A) if P == K * A else (1, P),
            confidence=confidence_after(lane.account.n, self.settings) if lane.judges else CONFIDENCE,
            enumerated=lane.account.n,
            lane=how,
            policy=self.problem.policy,
            seed=self.seed,
            judgements={κ: judge.verdict() for κ, judge in lane.judges.items()},
        )

    # -- checkpoints

    def _identity(self, draws: int) -> dict[str, Any]:
        """What must be the same for a run to be gone on with; the first estimates stand for the estimators themselves."""
        h = hashlib.sha256()
        for x in self._estimates(self.estimators, 0, _FIRST):
            h.update(x.cpu().numpy().tobytes())
        return {
            "format": _FORMAT,
            "version": metadata.version("pgcheck"),
            "problem": self.problem.digest,
            "seed": self.seed,
            "draws": draws,
            "settings": repr((self.settings, [list(x) for x in self.scales])),
            "estimators": [e.name for e in self.estimators],
            "first estimates": h.hexdigest(),
        }

    def save(self, path: Path, *, draws: int) -> None:
        """Written beside, then moved: a kill leaves the old file or the new one."""
        lanes = [
            {
                "account": None if a.account is None else a.account.state(),
                "centre": a.centre,
                "judges": [j.state() for j in a.judges.values()],
            }
            for a in self.lanes
        ]
        beside = path.with_name(path.name + ".part")
        torch.save({"identity": self._identity(draws), "grain": self.grain, "lanes": lanes}, beside)
        os.replace(beside, path)

    def resume(self, path: Path, *, draws: int) -> None:
        """Go on from the file, if there is one.

        Raises:
            UsageError: it cannot be read, or is of another run.
        """
        if not path.exists():
            return
        try:
            kept = torch.load(path, weights_only=True, map_location=self.device)
            there = kept["identity"]
        except Exception as error:
            raise UsageError(
                f"checkpoint: {path} is no checkpoint of pgcheck ({type(error).__name__}); delete it."
            ) from None
        here = self._identity(draws)
        for name, x in here.items():
            if there.get(name) != x:
                was = f", {there.get(name)!r}, not {x!r}" if name != "first estimates" else ""
                raise UsageError(
                    f"checkpoint: {path} is of another run: its {name} differ{was}. Delete it, or name another file."
                )
        self.grain = kept["grain"]
        for lane, state in zip(self.lanes, kept["lanes"], strict=True):
            lane.centre = state["centre"]
            lane.account = None if state["account"] is None else Account.from_state(state["account"])
            lane.judges = {
                κ: Judge.from_state(self.space.reference, self.settings, state=s, scale=κ)
                for κ, s in zip(lane.judges, state["judges"], strict=True)
            }


def _tell(run: _Run, progress: Progress, most: int) -> None:
    """How far, and how far it seems to go; with the estimate so far where the bar shows one."""
    done, ends, words = run.grain * GRAIN, [run.grain * GRAIN], ""
    for lane in run.active:
        said = [j.verdict() for j in lane.judges.values() if not j.decided]
        ends += [min(v.needed or most, most) for v in said] or [most]
        if said and not words:
            v = said[0]
            words = f"{lane.estimator.name} rel {v.rel:.3g} (≤ {v.missed:.3g}), scale {v.scale.low:.4g} … {v.scale.high:.4g}"
    note = getattr(progress, "note", None)
    if note is not None:
        note(run.problem.name, words)
    progress(run.problem.name, done, max(ends))
