"""Sampled moments and verdicts: every estimator on the same numbered draws, until each is judged or the draws are spent.

A draw is one whole batch (`pgcheck.sampling`). Draws are evaluated in grains of 1024 consecutive ones, up to 32
at once where they are small, by a schedule that depends on where the run looks and how large a draw is: rollouts → coefficients
→ C[k,a] → x = ĝ in the space of the verdict, `[1024, P]`. A grain goes to the estimator's account (mergeable moments,
`pgcheck.engines.accounts`) and to one judge for each scale that is claimed of it (`pgcheck.statistics.sequential`), once
for all whose estimates are the same (`pgcheck.engines.lanes`). An estimator whose judges have all decided is not evaluated
any more.

Guarantee: what is found of an estimator is a function of (problem, seed, settings) to the bit, whatever is judged beside it,
however many grains are done between checkpoints, in how many processes, and whether it was interrupted; memory does not grow
with the draws.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import astuple, dataclass, field, replace
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from pgcheck.batch import Batch, scaled
from pgcheck.engines.accounts import Account
from pgcheck.engines.coefficients import (
    cells_of,
    coefficients_of,
    factored_coefficients,
    finite,
    per_row,
    scattered,
)
from pgcheck.engines.declarations import verify_purity
from pgcheck.engines.lanes import AnyJudge, Grains, Lane, Record, Scale, evaluate, same_bits, take
from pgcheck.engines.moments import Moments, Progress
from pgcheck.engines.scores import Draws, scores_of
from pgcheck.engines.threads import one_thread
from pgcheck.engines.workers import Workers, check_workers
from pgcheck.errors import BudgetError, NotFiniteError, UsageError, names_problem
from pgcheck.estimators.base import Estimator
from pgcheck.estimators.from_loss import LossCoefficients
from pgcheck.generation import draws_at_once
from pgcheck.memory import keep_freed_memory
from pgcheck.problem import Problem
from pgcheck.sampling import Sampler, as_device
from pgcheck.statistics.sequential import CONFIDENCE, GRAIN, SHARE, Interval, Judge, Settings, confidence_after
from pgcheck.statistics.variance import Pairs
from pgcheck.trajectories import SideTable, Trajectories, is_count

DEFAULT_DRAWS = 262_144  # most draws of one problem
MOST_COORDINATES = 16_384  # P: a grain of them is 128 MiB
_AT_ONCE = 32  # grains that are taken as one
_MOST_NUMBERS = 2**21  # of an array of draws, or of what they are evaluated from
_FORMAT = "pgcheck-checkpoint/7"
_SCORES_A_POSITION = 8  # entries of a table of scores that cost as much as one position of the draws
_ROUNDING = 1e-14  # a gradient below this part of the rewards is 0
_FIRST = 64  # draws whose estimates are part of a checkpoint's identity


class Space(Protocol):
    """Where estimates live, and what is known of ∇J there."""

    @property
    def reference(self) -> Tensor:
        """What they should be on average, `[P]`."""

    def project(self, c: Tensor, table: Trajectories, index: Tensor) -> Tensor:
        """Estimates `[count, P]` from coefficients `[count, B, T]` (or `[count, B, T, A]`) of the rows `index` `[count, B]`."""

    def drawn(self, table: Trajectories, index: Tensor, first: int, e: Estimator) -> Tensor | None:
        """An unbiased estimate of ∇J beside draw `first` and those after it, `[count, P]`, to compare `e` with, where
        `reference` is not ∇J."""

    def judge_of(self, scale: Scale) -> type[AnyJudge]:
        """What judges E x = κ ∇J here; None: some κ > 0."""

    def settings(self, asked: Settings) -> Settings:
        """Those of a judge in this space, whose verdict then keeps what was asked for."""

    def told(self, moments: Moments, asked: Settings, e: Estimator) -> Moments:
        """What a judge and an account of `e` found here, as said of ĝ."""


class Known:
    """What a space does in which ∇J is known and nothing of an estimate is out of sight."""

    def drawn(self, table: Trajectories, index: Tensor, first: int, e: Estimator) -> Tensor | None:
        """None."""
        return None

    def judge_of(self, scale: Scale) -> type[AnyJudge]:
        """One to whom ∇J is known."""
        return Judge

    def settings(self, asked: Settings) -> Settings:
        """As asked."""
        return asked

    def told(self, moments: Moments, asked: Settings, e: Estimator) -> Moments:
        """As found."""
        return moments


class _Shared(NamedTuple):
    """What estimators with one weight a row have in common on the same draws."""

    table: Trajectories
    scores: Tensor  # [N, K·A]
    draws: Draws


@dataclass(frozen=True)
class LogitSpace(Known):
    """ĝ in logit space, against ∇J."""

    reference: Tensor  # [K·A]

    def project(self, c: Tensor, table: Trajectories, index: Tensor) -> Tensor:
        """ĝ = L C."""
        logits = c.dim() == 4
        x = scattered(c, cells_of(table, index, logits=logits), table.contexts * table.actions)
        if not logits:
            pi = torch.softmax(table.logits, -1)
            parts = x.unflatten(-1, pi.shape)
            parts.addcmul_(pi, (parts @ pi.new_ones(table.actions)).unsqueeze(-1), value=-1)
        return x

    def project_rows(self, w: Tensor, table: Trajectories, index: Tensor) -> Tensor | None:
        """The same from one number a row, `w` `[count, B]`: Σ_i w_i S_i of scores that all estimators share; None where they
        would cost more than they save."""
        N, cells, positions = len(table), table.contexts * table.actions, index.numel() * table.paths.steps
        if w.device.type != "cpu" or N * cells > _SCORES_A_POSITION * positions or cells > 32 * table.paths.steps:
            return None
        shared: _Shared | None = self.__dict__.get("_shared")
        if shared is None or shared.table is not table or shared.draws.index is not index:
            scores = scores_of(table) if shared is None or shared.table is not table else shared.scores
            shared = self.__dict__["_shared"] = _Shared(table, scores, Draws.plain(index))
        x = w.new_empty(len(w), cells, dtype=torch.float64)
        shared.draws.combine(w.to(torch.float64), shared.scores, x)
        return x


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
        workers: processes that evaluate draws; any number gives the same bytes.
        checkpoint: a folder that keeps how far each problem is, so that a run that was cut off goes on from there.
        directions: random ones along which estimates are seen where there are too many logits and parameters.
        bounds: (lo, hi) with lo ≤ ⟨ĝ − κ ∇J, v⟩ ≤ hi for every unit v, if they are known: verdicts then rest on them alone,
            and not on what the draws show of their tails.
        reference: `[n, P]`, n independent unbiased estimates of ∇_θ J that were made before, each of one batch, or a file of
            them (.npy, or .pt as of torch.save): verdicts are then given against these, and their noise is in both error rates.
            A draw of the run is put beside each, so that n is the most that are drawn (`pgcheck.engines.stored`).
    """

    seed: int = 0
    draws: int = DEFAULT_DRAWS
    tolerance: float = 0.05
    alpha: float = 1e-6
    beta: float = 1e-3
    device: str = "cpu"
    workers: int = 1
    checkpoint: Path | str | None = None
    directions: int = 32
    bounds: tuple[float, float] | None = None
    reference: Tensor | Path | str | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        _check_counts(seed=self.seed, draws=self.draws, workers=self.workers, directions=self.directions)
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
        return Settings(rtol=self.tolerance, alpha=self.alpha / SHARE, beta=self.beta, bounds=self.bounds)

    def file_of(self, problem: Problem, estimators: Sequence[Estimator]) -> Path | None:
        """Where it is kept how far these estimators are on this problem.

        Raises:
            UsageError: `checkpoint` is no folder, and cannot be made one.
        """
        if self.checkpoint is None:
            return None
        folder = Path(self.checkpoint)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"checkpoint: {folder} cannot be a folder ({type(error).__name__}).") from None
        names = "|".join([problem.name, *(e.name for e in estimators)])
        key = hashlib.sha256(names.encode()).hexdigest()[:8]
        return folder / f"{re.sub(r'[^A-Za-z0-9_.@-]+', '-', problem.name)}.{key}.checkpoint"


@one_thread()
@names_problem
def monte_carlo(
    estimators: Sequence[Estimator],
    problem: Problem,
    *,
    scales: Sequence[Sequence[Scale]] | None = None,
    beside: int | None = None,
    settings: Settings | None = None,
    seed: int = 0,
    draws: int = DEFAULT_DRAWS,
    space: Space | None = None,
    device: str = "cpu",
    block: int = 16,
    workers: int = 1,
    checkpoint: Path | None = None,
    progress: Progress | None = None,
) -> list[Moments]:
    """Draw until every estimator is judged, or the draws are spent. Where ∇J = 0, nothing can be judged relative
    to it, and what was to be judged gets as many draws as a first look.

    Args:
        scales: for each estimator the κ of claims E ĝ = κ ∇J to judge, None for "some κ > 0"; without any, all draws are used.
        beside: number of the estimator that the others' variance is compared to, draw by draw (`Moments.pairs`).
        settings: tolerance and error rates of every judge.
        draws: most draws; rounded up to whole grains of 1024.
        space: where the verdict is given; default, logits.
        device: where coefficients are evaluated, as torch names it.
        block: grains between two checkpoints, and calls of `progress`, at least.
        workers: processes that evaluate grains; this one judges them.
        checkpoint: a file that is written after each block, and from which a run that was cut off goes on.

    Raises:
        UsageError: `seed`, `draws`, `block` or `workers` is no count; too few draws to look once; a checkpoint of another run.
        BudgetError: more coordinates than fit; the problem's `needs` cannot be sampled.
        EstimatorError: random, stateful, or of the wrong shape.
        NotFiniteError: NaN or infinity, with the draw that shows it.
    """
    _check_counts(seed=seed, draws=draws, block=block, workers=workers)
    check_workers(workers, device)
    keep_freed_memory()
    settings, device = settings or Settings(), as_device(device)
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
            " monte_carlo(…, space=pgcheck.SketchSpace.of(problem, directions=32))."
        )
    if float(where.reference.norm()) <= _ROUNDING * problem.reward_size:
        draws = min(draws, settings.first_look) if any(scales) else draws  # enough to say what cannot be judged
        scales = [()] * len(estimators)
    run = _Run(estimators, problem, where, seed, device, settings, scales, beside)
    last = -(-draws // GRAIN)
    if checkpoint is not None:
        run.resume(checkpoint, draws=last * GRAIN)
    with run.in_processes(workers):
        while run.active and run.grain < last:
            until = min(run.grain + block, last)
            while run.active and run.grain < until:
                run.step(last)
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
class _Run:
    """The loop over grains."""

    estimators: Sequence[Estimator]
    problem: Problem
    space: Space
    seed: int
    device: str
    settings: Settings
    scales: Sequence[Sequence[Scale]]
    beside: int | None = None
    grain: int = 0  # the next
    lanes: list[Lane] = field(init=False)
    _workers: Workers[dict[int, Grains]] | None = field(init=False)

    def __post_init__(self) -> None:
        self.lanes = [
            Lane(e, Record({κ: self._judge(κ) for κ in asked}))
            for e, asked in zip(self.estimators, self.scales, strict=True)
        ]
        needs = dict.fromkeys(e.needs for e in self.estimators)
        self._samplers: dict[tuple[SideTable, ...], Sampler] = {
            n: self.problem.sampler(seed=self.seed, needs=n, device=self.device) for n in needs
        }
        self._stack, self._workers = ExitStack(), None
        self._told: dict[Record, Moments] = {}
        self._processes, self._given = 1, 0
        positions = self.problem.rows * self.problem.steps
        self._at_once = min(_AT_ONCE, max(1, _MOST_NUMBERS // (GRAIN * len(self.reference))))
        most = self._at_once * GRAIN
        self._rows = min([most, *(draws_at_once(sampler, most) for sampler in self._samplers.values())])
        while self._rows > 1 and self._rows * positions > _MOST_NUMBERS:
            self._rows //= 2
        self._logit_rows = self._rows  # of those on logits; the others' blocks do not depend on whether there are any
        while self._logit_rows > 1 and self._logit_rows * positions * self.problem.actions > _MOST_NUMBERS:
            self._logit_rows //= 2

    def _judge(self, scale: Scale) -> AnyJudge:
        return self.space.judge_of(scale)(self.reference, self.space.settings(self.settings), scale=scale)

    @cached_property
    def reference(self) -> Tensor:
        """What estimates should be on average, on their device."""
        return self.space.reference.to(self.device)

    @property
    def active(self) -> list[Lane]:
        """Those that are not judged yet."""
        return [lane for lane in self.lanes if not lane.record.done]

    @property
    def _undecided(self) -> list[int]:
        return [i for i, lane in enumerate(self.lanes) if not lane.record.done]

    def _size(self, grain: int, last: int) -> int:
        """Grains from number `grain` on that are drawn, evaluated and taken as one; what they are depends on no more than
        where the run looks, and on how much they hold."""
        return min(self.settings.grains_at_once(grain, self._at_once), last - grain)

    def step(self, last: int) -> None:
        """The next grains before `last`, for every estimator that is not judged yet."""
        evaluated = self._next(last)
        now = self._undecided
        if self.beside in now:
            of_other = evaluated[self.beside].draws.spread.cpu().numpy()
            for i in now:
                if i != self.beside:
                    self.lanes[i].pair(evaluated[i].draws.spread.cpu().numpy(), of_other)
        take([self.lanes[i] for i in now], [evaluated[i] for i in now])
        self.grain += self._size(self.grain, last)

    def _next(self, last: int) -> dict[int, Grains]:
        if self._workers is None:
            if self._processes == 1 or self.grain == 0:  # the first has the centres, which workers are to know
                return self._evaluated(self.grain, self._size(self.grain, last), self._undecided)
            self._workers = self._stack.enter_context(Workers(self._processes, self._evaluated))
            self._given = self.grain
        while self._workers.hungry and self._given < last:
            size = self._size(self._given, last)
            self._workers.give(self._given, size, self._undecided)
            self._given += size
        return self._workers.take()

    def _evaluated(self, grain: int, size: int, numbers: Sequence[int]) -> dict[int, Grains]:
        """What `size` grains are to be taken as, by number of the estimator."""
        lanes = [self.lanes[i] for i in numbers]
        found = self._estimates([lane.estimator for lane in lanes], grain * GRAIN, size * GRAIN)
        return dict(zip(numbers, evaluate(lanes, found, self.reference, grain), strict=True))

    @contextmanager
    def in_processes(self, count: int) -> Iterator[None]:
        """Within, grains are evaluated by so many processes."""
        self._processes = count
        with self._stack:
            yield

    def _estimates(self, estimators: Sequence[Estimator], first: int, count: int) -> list[tuple[Tensor, Tensor | None]]:
        """ĝ of draws number first … first + count − 1 of each estimator, `[count, P]`, and what is drawn beside it."""
        parts: list[list[Tensor]] = [[] for _ in estimators]
        others: list[list[Tensor]] = [[] for _ in estimators]
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
                at = low
                for part in index.split(self._logit_rows) if logits else (index,):
                    batch = table.batch(part, sampler.labels, logits=logits)
                    made: list[tuple[float, Tensor, Tensor]] = []
                    for i in members:
                        try:
                            parts[i].append(self._projected(estimators[i], batch, table, part, made))
                        except NotFiniteError:
                            self._name_draw(estimators[i], at, len(part))
                            raise
                        if (r := self.space.drawn(table, part, at, estimators[i])) is not None:
                            others[i].append(r)
                    at += len(part)
        joined: dict[tuple[int, ...], Tensor] = {}  # those of the same parts are one tensor
        for x in (*parts, *filter(None, others)):
            key = tuple(map(id, x))
            if key not in joined:
                joined[key] = x[0] if len(x) == 1 else torch.cat(x)
        return [(joined[tuple(map(id, x))], joined.get(tuple(map(id, r)))) for x, r in zip(parts, others, strict=True)]

    def _projected(
        self,
        estimator: Estimator,
        batch: Batch,
        table: Trajectories,
        index: Tensor,
        made: list[tuple[float, Tensor, Tensor]],
    ) -> Tensor:
        """ĝ of each batch. `made`: a number, one weight a row and ĝ of those that were asked before; the same give the same."""
        number, c = factored_coefficients(estimator, batch)
        logits = estimator.leaf == "logits"
        w, x = None if logits else per_row(c), None
        if w is not None:
            for other, v, found in made:
                if other == number and same_bits(v, w):
                    return found
            x = self._of_rows(number, w, table, index)
        if x is None:
            c = finite(scaled(number, c), estimator, batch)
            x = self.space.project(c * (batch.mask.unsqueeze(-1) if logits else batch.mask), table, index)
        if w is not None:
            made.append((number, w, x))
        return x

    def _of_rows(self, number: float, w: Tensor, table: Trajectories, index: Tensor) -> Tensor | None:
        """The same of weights of rows, without a look at positions where that is faster; None also if some is not finite."""
        x = self.space.project_rows(w, table, index) if isinstance(self.space, LogitSpace) else None
        if x is None or not bool(torch.isfinite(x.sum())):  # of which every coefficient is a part
            return None
        return x if number == 1.0 else x.mul_(number)

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
        fn = lane.estimator.coefficients
        how = fn.lane or "loop" if isinstance(fn, LossCoefficients) else "coefficients"
        found = replace(self._of_record(lane.record), lane=how)
        found = self.space.told(found, self.settings, lane.estimator)
        # a sketch's variance is a guess of that of ĝ, whose error no pair of draws shows
        sketched = found.view is not None and found.view.directions is not None
        if sketched or lane.pairs is None or self.beside is None:
            return found
        of_other = self.lanes[self.beside].record.off_centre
        return replace(found, pairs=lane.pairs.plus(-lane.record.off_centre, -of_other))

    def _of_record(self, record: Record) -> Moments:
        """The same, of whoever has this record; made once."""
        if record in self._told:
            return self._told[record]
        account, paired = record.accounts
        in_logits = isinstance(self.space, LogitSpace)
        K, A = self.problem.logits.shape if in_logits else (1, len(self.reference))
        confidence = confidence_after(account.n, self.settings) if record.judges else CONFIDENCE
        found = account.moments(
            self.reference,
            shape=(K, A),
            confidence=confidence,
            enumerated=account.n,
            policy=self.problem.policy if in_logits else None,
            seed=self.seed,
            judgements={κ: judge.verdict() for κ, judge in record.judges.items()},
            first=record.centre,
        )
        if paired is not None:
            found = _with_bias_of(found, paired, self.reference, confidence)
        self._told[record] = found
        return found

    # -- checkpoints

    @cached_property
    def _first_estimates(self) -> str:
        h = hashlib.sha256()
        for x, r in self._estimates(self.estimators, 0, _FIRST):
            for part in (x,) if r is None else (x, r):
                h.update(part.cpu().numpy().tobytes())
        return h.hexdigest()

    def _identity(self, draws: int) -> dict[str, Any]:
        """What must be the same for a run to be gone on with; the first estimates stand for the estimators themselves."""
        return {
            "format": _FORMAT,
            "version": metadata.version("pgcheck"),
            "problem": self.problem.digest,
            "seed": self.seed,
            "draws": draws,
            "settings": repr((self.settings, [list(x) for x in self.scales], self.beside)),
            "estimators": [e.name for e in self.estimators],
            "first estimates": self._first_estimates,
        }

    def save(self, path: Path, *, draws: int) -> None:
        """Written beside, then moved: a kill leaves the old file or the new one."""
        records = list(dict.fromkeys(lane.record for lane in self.lanes))
        of_records = [
            {
                "account": None if a.account is None else a.account.state(),
                "paired": None if a.paired is None else a.paired.state(),
                "centre": a.centre,
                "judges": [j.state() for j in a.judges.values()],
            }
            for a in records
        ]
        lanes = [
            {"record": records.index(a.record), "pairs": None if a.pairs is None else a.pairs.state()}
            for a in self.lanes
        ]
        beside = path.with_name(path.name + ".part")
        whole = {"identity": self._identity(draws), "grain": self.grain, "records": of_records, "lanes": lanes}
        torch.save(whole, beside)
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
                verb = "are" if name.endswith("s") else "is"
                how = f"{verb} others" if name == "first estimates" else f"{verb} {there.get(name)!r}, not {x!r}"
                raise UsageError(
                    f"checkpoint: {path} is of another run: its {name} {how}. Delete it, or keep this run elsewhere."
                )
        self.grain = kept["grain"]
        settings = self.space.settings(self.settings)
        records: dict[int, Record] = {}
        for lane, of_lane in zip(self.lanes, kept["lanes"], strict=True):
            number, pairs = of_lane["record"], of_lane["pairs"]
            lane.pairs = None if pairs is None else Pairs.from_state(pairs)
            lane.record = records.setdefault(number, lane.record)
            if lane.record.account is None:
                state = kept["records"][number]
                lane.record.centre = state["centre"]
                lane.record.account, lane.record.paired = (
                    None if state[name] is None else Account.from_state(state[name]) for name in ("account", "paired")
                )
                lane.record.judges = {
                    κ: type(judge).from_state(self.reference, settings, state=s, scale=κ)
                    for (κ, judge), s in zip(lane.record.judges.items(), state["judges"], strict=True)
                }


def _with_bias_of(found: Moments, paired: Account, reference: Tensor, confidence: float) -> Moments:
    """The moments of x, with what x − r says of the bias: its size, the scale, and what follows from them."""
    about = paired.intervals(reference, confidence=confidence)
    bias, variance = about["bias"], found.intervals["variance"]
    mse = Interval(*(b**2 + v for b, v in zip(astuple(bias), astuple(variance), strict=True)))
    kept = {name: about[name] for name in ("scale", "bias", "rel", "off_axis")}
    return replace(
        found, mean=paired.mean.reshape(found.mean.shape).cpu(), intervals={**found.intervals, **kept, "mse": mse}
    )


def _tell(run: _Run, progress: Progress, most: int) -> None:
    """How far, and how far it seems to go; with the estimate so far where the bar shows one."""
    done, ends, words = run.grain * GRAIN, [run.grain * GRAIN], ""
    for lane in run.active:
        said = [j.verdict() for j in lane.record.judges.values() if not j.decided]
        ends += [min(v.needed or most, most) for v in said] or [most]
        if said and not words:
            v = said[0]
            words = f"{lane.estimator.name} rel {v.rel:.3g} (≤ {v.missed:.3g}), scale {v.scale.low:.4g} … {v.scale.high:.4g}"
    note = getattr(progress, "note", None)
    if note is not None:
        note(run.problem.name, words)
    progress(run.problem.name, done, max(ends))
