"""An estimator is judged by its difference from one that is known to be unbiased, on the same rollouts.

    D_i = x_i − κ r_i,        E D = E x − κ ∇J,  as E r = ∇J

where ∇J is not known; and where it is, but what is noise in x is so in r as well: D has the bias of x and less variance. r is
the one of `TRUSTED` that claims to be unbiased there and is nearest to x, on rollouts of the pilot, with a 32nd part of
another, so that no estimator is r itself and every difference has a law.

How long ∇J is, which a tolerance δ ‖∇J‖ needs, is told where it is not known by a pilot of draws of their own: one half gives
a direction û, the other ⟨r, û⟩, whose mean is at most ‖∇J‖.

Guarantee: the tolerance is that of a length which ∇J has at least (at the error rate of the verdict), so that a PASS means
what it says; what is estimated of a bias does not depend on the pilot.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from pgcheck.batch import Batch
from pgcheck.engines.coefficients import coefficients_of
from pgcheck.engines.moments import Moments, View
from pgcheck.engines.parameters import by_draws, kept_for, policy_of, tightened, total_in_parameters
from pgcheck.errors import PgcheckError, UsageError
from pgcheck.estimators.base import Estimator, registered_estimators
from pgcheck.generation import draws_at_once
from pgcheck.problem import Problem
from pgcheck.statistics.guarded import Scores, interval
from pgcheck.statistics.open_scale import OpenJudge
from pgcheck.statistics.sequential import GRAIN, Interval, Judge, Settings
from pgcheck.trajectories import Trajectories

TRUSTED = ("leave_one_out", "reinforce", "trajectory_is", "kl_in_reward(k1)", "entropy_in_reward")
PILOT = 2 * GRAIN  # draws of each half of a pilot at first, and
MOST_PILOT = 8 * GRAIN  # where that does not tell ∇J from 0
BETA = 1e-3  # of a verdict, if not told otherwise
_TRIED = 256  # draws by which the nearest is chosen
_PART = 1 / 32  # of the other trusted estimator
_PILOTS: WeakKeyDictionary[Problem, dict[tuple[object, ...], tuple[Tensor, Scores, bool]]] = WeakKeyDictionary()


class Seen(Protocol):
    """A space in which a vector in parameters is seen, in its length or a share of it."""

    @property
    def problem(self) -> Problem: ...
    def project(self, c: Tensor, table: Trajectories, index: Tensor) -> Tensor: ...

    def seen(self, x: Tensor) -> Tensor:
        """Coordinates `[R]` of a vector `[P]`."""

    def shows(self, beta: float) -> float:
        """The share of a vector's length that its coordinates have at least, with probability 1 − beta."""

    def view(self, shown: float) -> View:
        """What it is, for a report."""

    def said(self, moments: Moments, view: View) -> Moments:
        """What was found here, as said of ĝ_θ."""


@dataclass(frozen=True, eq=False)
class Beside:
    """Another space, in which an unbiased estimate of ∇J lies beside every other."""

    inside: Seen
    reference: Tensor  # [R], ∇J, or what a pilot says of it: 0 if it does not tell it from 0
    length: Scores | None  # of ⟨r, û⟩; None: ∇J is known
    against: str  # what r is, in a report

    def project(self, c: Tensor, table: Trajectories, index: Tensor) -> Tensor:
        """As `inside`."""
        return self.inside.project(c, table, index)

    def judge_of(self, scale: float | None) -> type[Judge | OpenJudge]:
        """Of an open κ, one that finds it from the draws: where ∇J is known as well, as x has most of the noise of r."""
        return OpenJudge if scale is None else Judge

    def shows(self, beta: float) -> float:
        """That of `inside`, and of ⟨∇J, û⟩ as it is at least over what it is about."""
        if self.length is None:
            return self.inside.shows(beta)
        low, about = _at_least(self.length, beta), float(self.length.mean[0])
        return self.inside.shows(beta / 2) * max(low, 0.0) / about if about > 0 and low > 0 else 0.0

    def settings(self, asked: Settings) -> Settings:
        """With a tolerance that allows for what is not seen."""
        return tightened(asked, self.shows(asked.beta / 2))

    def compared_with(self, e: Estimator) -> str:
        """What r is for this estimator, in a report."""
        return self.against

    def told(self, moments: Moments, asked: Settings, e: Estimator) -> Moments:
        """With what it was compared with."""
        view = self.inside.view(self.shows(asked.beta / 2) if moments.judgements else 1.0)
        found = self.inside.said(moments, replace(view, reference=self.reference, against=self.compared_with(e)))
        return found if self.length is None else _with_pilot(found, self.length)


@dataclass(frozen=True, eq=False)
class Paired(Beside):
    """r is what a trusted estimator says of the same rollouts."""

    trusted: tuple[Estimator, ...]  # the first is that of the pilot
    seed: int = 0

    def drawn(self, table: Trajectories, index: Tensor, first: int, e: Estimator) -> Tensor:
        """What the trusted estimator that is nearest to `e` says of the same rollouts; made once for all that are compared
        with it."""
        r = self.nearest(e)
        labels = self.inside.problem.group_labels.to(index.device)
        return kept_for(
            self,
            f"drawn by {self.trusted.index(r)}",
            (table, index),
            lambda: self.project(coefficients_on(r, table, index, labels), table, index),
        )

    def nearest(self, e: Estimator) -> Estimator:
        """The trusted estimator from which `e` differs least in mean square, on rollouts that no verdict sees."""
        if e not in self._nearest:
            self._nearest[e] = self.trusted[0] if len(self.trusted) == 1 else self._found_nearest(e)
        return self._nearest[e]

    @cached_property
    def _nearest(self) -> dict[Estimator, Estimator]:
        return {}

    def _found_nearest(self, e: Estimator) -> Estimator:
        sampler = self.inside.problem.sampler(seed=-1 - self.seed, needs=e.needs)
        table, index = sampler.draw(0, draws_at_once(sampler, _TRIED))
        try:
            x, *others = (
                self.project(coefficients_on(one, table, index, sampler.labels), table, index)
                for one in (e, *self.trusted)
            )
        except PgcheckError:  # which the verdict will say better
            return self.trusted[0]
        gaps = torch.stack([(x - r).square().sum(1).mean() for r in others])
        return self.trusted[int(gaps.argmin())]

    def compared_with(self, e: Estimator) -> str:
        """The nearest."""
        return self.nearest(e).name


def _with_pilot(found: Moments, length: Scores) -> Moments:
    """What is said in units of ‖∇J‖, with the error of the pilot in it."""
    (low,), (high,) = interval(length)
    about = float(length.mean[0])
    if not 0 < low <= about:
        return found
    more, less = about / float(low), about / float(high)
    rel, scale = found.intervals["rel"], found.intervals["scale"]
    ends = [
        1 + (x - 1) * (more if (x < 1) is low_end else less) for x, low_end in ((scale.low, True), (scale.high, False))
    ]
    said = {"rel": Interval(rel.value, rel.low * less, rel.high * more), "scale": Interval(scale.value, *ends)}
    judged = dict(found.judgements)
    if None in judged:  # which has its κ from r itself
        off = judged[None].off_axis
        judged[None] = replace(judged[None], off_axis=replace(off, high=min(off.high * more, 1.0)))
    return replace(found, intervals={**found.intervals, **said}, judgements=judged)


def paired(
    problem: Problem,
    around: Callable[[Tensor | None], Seen],
    *,
    seed: int = 0,
    pilot: int = PILOT,
    beta: float = BETA,
    device: str = "cpu",
) -> Paired:
    """Beside a trusted estimator, in the space `around` ∇J (None), or where this is not known around the direction of a
    pilot's mean, which is drawn once for a problem; `beta` as of the verdict.

    Raises:
        UsageError: no estimator is known to be unbiased there.
    """
    trusted = trusted_mixtures(problem)
    if not problem.written:
        inside = around(None)
        return Paired(inside, inside.seen(problem.parameter_gradient()), None, trusted[0].name, trusted, seed)
    kept, key = _PILOTS.setdefault(problem, {}), (seed, pilot, beta, device)
    if key not in kept:
        kept[key] = _piloted(trusted[0], problem, seed=seed, pilot=pilot, beta=beta, device=device)
    u, scores, told = kept[key]
    inside = around(u)
    g = inside.seen(u) * (float(scores.mean[0]) if told else 0.0)
    return Paired(inside, g, scores, trusted[0].name, trusted, seed)


def _piloted(
    r: Estimator, problem: Problem, *, seed: int, pilot: int, beta: float, device: str
) -> tuple[Tensor, Scores, bool]:
    """û `[P]`, the scores ⟨r, û⟩, and whether they tell ∇J from 0 at the level that a tolerance is given."""
    sampler = problem.sampler(seed=-1 - seed, device=device)  # users' seeds are ≥ 0

    def drawn(first: int, last: int) -> Iterator[tuple[Tensor, Trajectories, Tensor]]:
        """Coefficients, tables and rows of those draws."""
        for low in range(first, last, size := draws_at_once(sampler, GRAIN)):
            table, index = sampler.draw(low, min(size, last - low))
            yield coefficients_on(r, table, index, sampler.labels), table, index

    def total(first: int, last: int) -> Tensor:
        """Σ r, by one backward pass."""
        each = (
            total_in_parameters(c.flatten(0, 1), table, index.flatten(), policy_of(table, problem)).cpu()
            for c, table, index in drawn(first, last)
        )
        return torch.stack(list(each)).sum(0)

    direction = total(0, pilot)
    while True:
        u = direction / size if (size := float(direction.norm())) > 0 else direction
        scores = Scores.none(1)
        for c, table, index in drawn(pilot, 2 * pilot):
            x = by_draws(c, table, index, problem, u.unsqueeze(1).to(c.device))
            scores = scores.merge(Scores.of(x.cpu().numpy()))
        low = float(interval(scores)[0][0])
        if low > 0.5 * float(scores.mean[0]) or 2 * pilot > MOST_PILOT:
            return u, scores, _at_least(scores, beta / 2) > 0
        direction, pilot = direction + total(pilot, 2 * pilot), 2 * pilot


def _at_least(length: Scores, beta: float) -> float:
    """A bound of ⟨∇J, û⟩ from below, wrong with probability β/2 at most; NaN where there is none."""
    return float(interval(length, confidence=1 - beta / 2, sides=1)[0][0])


def coefficients_on(e: Estimator, table: Trajectories, index: Tensor, labels: Tensor) -> Tensor:
    """Of the batches `index` `[M, B]` of a table."""
    return coefficients_of(e, table.batch(index, labels, logits=e.leaf == "logits"))


def trusted_estimators(problem: Problem) -> list[Estimator]:
    """Those of `TRUSTED` that are known to be unbiased there.

    Raises:
        UsageError: none is, as support is broken.
    """
    known = [registered_estimators()[name] for name in TRUSTED]
    found = [e for e in known if e.fits(problem) and any(c.kind == "unbiased" and c.applies(problem) for c in e.claims)]
    if not found and problem.written:
        raise UsageError(
            f"{problem.name}: ∇J is not known, and no estimator is known to be unbiased, as the behaviour policy never writes"
            " some of the completions; compare on a task whose prefixes can be listed."
        )
    return found


def trusted_estimator(problem: Problem) -> Estimator:
    """The first of `trusted_estimators`."""
    return trusted_estimators(problem)[0]


def trusted_mixtures(problem: Problem) -> tuple[Estimator, ...]:
    """Each of `trusted_estimators`, with a 32nd part of another (of the first the last), of rewards that are less by half of
    the largest: that moves no expectation, as E ∇log p = 0, and is no other's copy."""
    known = trusted_estimators(problem)
    cost = 0.5 * problem.reward_size or 1.0
    return tuple(_mixed(e, _paid_less(known[0] if i else known[-1], cost)) for i, e in enumerate(known))


def _mixed(first: Estimator, second: Estimator) -> Estimator:
    def coefficients(batch: Batch) -> Tensor:
        return (1 - _PART) * first.coefficients(batch) + _PART * second.coefficients(batch)

    return replace(first, coefficients=coefficients, couples="batch", reads=None)


def _paid_less(e: Estimator, cost: float) -> Estimator:
    def coefficients(batch: Batch) -> Tensor:
        place = torch.arange(1, batch.mask.shape[-1] + 1, device=batch.mask.device)
        last = (batch.mask * place).argmax(-1, keepdim=True)
        taken = torch.zeros_like(batch.reward).scatter_(-1, last, cost)
        return e.coefficients(batch.with_tensors({"reward": batch.reward - taken}))

    return replace(e, coefficients=coefficients, reads=None)
