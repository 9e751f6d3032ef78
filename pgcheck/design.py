"""How many batches a verdict on an estimator takes, and which group size wastes the fewest rollouts.

Noise comes from the exact covariance of one batch, or where batches cannot be enumerated from a pilot of some thousand draws,
which no run draws again; every answer then has its interval. Rollouts are what is paid, for each group size that can be
enumerated, or for powers of two:

    cost(G) = B · tr Cov ĝ / ‖E ĝ‖²       (the rollouts at which signal and noise are equal; B rows a batch)

which is the variance per rollout where the estimator is unbiased, and does not reward one for a small scale where it is not.

Guarantee: a sampled design is judged in the space, and with the reference, in which the verdict would be given. Its intervals
hold 95% of the time as far as eight Gram blocks tell of tr Σ²; they are plans, not verdicts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy import special
from torch import Tensor

from pgcheck.engines.choice import Engine
from pgcheck.engines.coefficients import coefficients_of
from pgcheck.engines.exact import DEFAULT_BUDGET, exact_moments
from pgcheck.engines.moments import Progress
from pgcheck.engines.monte_carlo import LogitSpace, Space, monte_carlo
from pgcheck.engines.sketch import default_space
from pgcheck.engines.trusted import Beside
from pgcheck.errors import BudgetError, UsageError
from pgcheck.estimators.base import Estimator
from pgcheck.problem import Problem
from pgcheck.statistics.certificate import GRAM, of_block
from pgcheck.statistics.guarded import CONSTANT, Scores, interval
from pgcheck.statistics.power import Design, Noise, design
from pgcheck.statistics.sequential import GRAIN, Settings
from pgcheck.trajectories import is_count

LARGEST_GROUP = 32
SWEPT_BATCHES = 2**18  # enumerated at most for a group size other than the problem's own; seconds for a plain loss
PILOT = 2_048  # draws
_ROUNDING = 1e-14  # a gradient below this part of the rewards is 0
_APART = 2**33  # seeds of pilots are above that
_ASKED = 4  # numbers that an answer rests on, each with its interval
_SILENT = 1e-12  # noise below this part of ‖∇J‖ is none


@dataclass(frozen=True)
class GroupSize:
    """One group size; of a pilot, `cost` has an interval."""

    group_size: int
    rows: int
    variance: float  # tr Cov ĝ of a batch
    cost: float  # rows · tr Cov ĝ / ‖E ĝ‖²
    cost_low: float  # 95%; exactly: the cost itself
    cost_high: float


@dataclass(frozen=True)
class Pilot:
    """What a pilot leaves open: the design if the noise is as small, and as large, as its draws allow."""

    draws: int
    quietest: Design | None  # None: its tails, or the length of ∇J, allow no bound
    loudest: Design | None


@dataclass(frozen=True)
class Plan:
    """A design for one estimator on one problem."""

    estimator: str
    problem: str
    design: Design
    group_sizes: tuple[GroupSize, ...]  # those that fit; empty where the problem has groups of unequal size
    pilot: Pilot | None = None  # None: from exact moments

    @property
    def best(self) -> GroupSize | None:
        """The one that wastes the fewest rollouts."""
        told = [g for g in self.group_sizes if math.isfinite(g.cost)]
        return min(told, key=lambda g: g.cost) if told else None

    @property
    def as_good(self) -> list[int]:
        """Other group sizes that the pilot does not tell from the best."""
        best = self.best
        return (
            []
            if best is None
            else [g.group_size for g in self.group_sizes if g != best and g.cost_low < best.cost_high]
        )


def plan(
    estimator: Estimator,
    problem: Problem,
    settings: Settings,
    *,
    draws: int | None = None,
    budget: int | None = None,
    engine: Engine = "auto",
    pilot: int = PILOT,
    seed: int = 0,
    progress: Progress | None = None,
) -> Plan:
    """The design, from exact moments or a pilot.

    Args:
        draws: batches that may be drawn.
        budget: most batches enumerated, of the problem and of each other group size; default, that of `exact_moments`, and
            `SWEPT_BATCHES`.
        engine: `exact`, `monte_carlo` (a pilot), or `auto`: a pilot where batches cannot be enumerated.
        pilot: its draws, in whole 1024s; for every group size as many.
        seed: of the pilot.

    Raises:
        BudgetError: `exact`, and the problem's own batches cannot be enumerated.
        UsageError: `pilot` or `seed` is no count, or a pilot that does not tell ∇J from 0.
    """
    for name, x, least in (("pilot", pilot, GRAIN), ("seed", seed, 0)):
        if not (x == 0 or is_count(x)) or x < least:
            raise UsageError(f"{name}: {x!r}; it must be an integer of at least {least:,}.")
    if engine != "monte_carlo" and (engine == "exact" or problem.enumerable):
        try:
            (m,) = exact_moments([estimator], problem, budget=budget or DEFAULT_BUDGET, progress=progress)
        except BudgetError:
            if engine == "exact":
                raise
        else:
            noise = Noise.of(m.whole_covariance, problem.gradient().flatten())
            sizes = _group_sizes(estimator, problem, budget or SWEPT_BATCHES, progress)
            return Plan(estimator.name, problem.name, design(noise, settings, budget=draws), sizes)
    number = -(-pilot // GRAIN) * GRAIN
    about, low, high = _sampled_noise(estimator, problem, number, seed)
    ends = (None if x is None else design(x, settings, budget=draws) for x in (low, high))
    open_ = Pilot(number, *ends)
    sizes = _sampled_group_sizes(estimator, problem, number, seed, progress)
    return Plan(estimator.name, problem.name, design(about, settings, budget=draws), sizes, open_)


def _group_sizes(
    estimator: Estimator, problem: Problem, budget: int, progress: Progress | None
) -> tuple[GroupSize, ...]:
    sizes = []
    if isinstance(problem.group_size, int):
        for size in range(1, LARGEST_GROUP + 1):
            other = problem.with_sampling(groups=problem.groups, group_size=size)
            if not estimator.fits(other):
                continue
            if progress is not None:
                progress(f"group size {size}", size, LARGEST_GROUP)
            try:
                (x,) = exact_moments([estimator], other, budget=budget)
            except BudgetError:
                break
            rows = other.rows
            signal = float((x.mean**2).sum())
            if signal > 0:
                cost = rows * x.total_variance / signal
                sizes.append(GroupSize(size, rows, x.total_variance, cost, cost, cost))
    return tuple(sizes)


# -- from a pilot


def _space_of(problem: Problem, seed: int) -> Space:
    found = default_space(problem, seed=seed)
    return LogitSpace(problem.gradient().reshape(-1)) if found is None else found


def _sampled_group_sizes(
    estimator: Estimator, problem: Problem, number: int, seed: int, progress: Progress | None
) -> tuple[GroupSize, ...]:
    sizes = []
    tried = [2**k for k in range(LARGEST_GROUP.bit_length())] if isinstance(problem.group_size, int) else []
    for size in tried:
        other = problem.with_sampling(groups=problem.groups, group_size=size)
        if not estimator.fits(other):
            continue
        if progress is not None:
            progress(f"group size {size}", size, LARGEST_GROUP)
        space = _space_of(other, seed)
        (m,) = monte_carlo([estimator], other, draws=number, seed=_APART + seed, space=space)
        rows, snr = other.rows, m.intervals["snr"]
        ends = [rows / x**2 if x > 0 else math.inf for x in (snr.value, snr.high, snr.low)]
        sizes.append(GroupSize(size, rows, m.total_variance, *ends))
    return tuple(sizes)


def _sampled_noise(
    estimator: Estimator, problem: Problem, number: int, seed: int
) -> tuple[Noise, Noise | None, Noise | None]:
    """Of what a judge would look at: about, and at least and at most."""
    space = _space_of(problem, seed)
    d = _differences(estimator, problem, space, number, seed)
    size = float(space.reference.norm())
    if size <= _ROUNDING * problem.reward_size:
        raise UsageError(
            f"{problem.name}: ∇J is 0, or a pilot of some thousand batches does not tell it from 0; there is no tolerance to"
            " plan for."
        )
    confidence = 1 - 0.05 / _ASKED
    lengths: tuple[float, ...] = (1.0, 1.0)  # of ∇J in units of what it is taken to be: at most, at least
    if isinstance(space, Beside) and space.length is not None:
        lengths = tuple(float(x[0]) / size for x in reversed(interval(space.length, confidence=confidence)))
    gap = d - d.mean(0)
    if float(gap.square().sum()) <= CONSTANT**2 * float(d.square().sum()):
        raise UsageError(
            f"{problem.name}: every batch of the pilot gives the same estimate; there is no noise to plan for."
        )
    along = gap @ (space.reference / size)
    scores = Scores.of(torch.stack([gap.square().sum(1), along.square()], 1).numpy())
    low, high = interval(scores, confidence=confidence)
    total, of_along = ((float(scores.mean[i]), float(low[i]), float(high[i])) for i in (0, 1))
    blocks = [of_block(b) for b in gap.split(GRAM)]
    top = float(np.mean([t for t, _ in blocks]))
    square = np.array([s for _, s in blocks])
    spread = (
        float(special.stdtrit(len(square) - 1, (1 + confidence) / 2))
        * float(square.std(ddof=1))
        / math.sqrt(len(square))
    )

    def noise(at: int, squares: float, length: float) -> Noise | None:
        """From these of the numbers, in units of ‖μ*‖ = `length`."""
        t, a = total[at], of_along[at]
        if not (t > (_SILENT * size) ** 2 and math.isfinite(t) and math.isfinite(a) and length > 0):
            return None
        squares = min(max(squares, a**2), t**2)
        λ = max(squares / t, a) if at == 1 else min(max(top, a), math.sqrt(squares))  # from below, and from above
        return Noise(math.sqrt(t) / length, t**2 / squares, λ / t, min(a / t, 1.0))

    about, least, most = float(square.mean()), float(square.mean()) - spread, float(square.mean()) + spread
    middle = noise(0, about, size)
    assert middle is not None  # it has noise
    return middle, noise(1, least, size * lengths[0]), noise(2, most, size * lengths[1])


def _differences(estimator: Estimator, problem: Problem, space: Space, number: int, seed: int) -> Tensor:
    """D of every draw of the pilot, `[number, P]`."""
    sampler, parts = problem.sampler(seed=_APART + seed, needs=estimator.needs), []
    for first in range(0, number, GRAM):
        table, index = sampler.draw(first, GRAM)
        c = coefficients_of(estimator, table.batch(index, sampler.labels, logits=estimator.leaf == "logits"))
        x, r = space.project(c, table, index), space.drawn(table, index, first, estimator)
        parts.append(x - (space.reference if r is None else r))
    return torch.cat(parts).to(torch.float64)
