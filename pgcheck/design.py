"""How many batches a verdict on an estimator takes, and which group size wastes the fewest rollouts.

Noise comes from the exact covariance of one batch. For each group size that can be enumerated, rollouts are what is paid:

    cost(G) = B · tr Cov ĝ / ‖E ĝ‖²       (the rollouts at which signal and noise are equal; B rows a batch)

which is the variance per rollout where the estimator is unbiased, and does not reward one for a small scale where it is not.
"""

from __future__ import annotations

from dataclasses import dataclass

from pgcheck.engines.exact import DEFAULT_BUDGET, exact_moments
from pgcheck.engines.moments import Progress
from pgcheck.errors import BudgetError
from pgcheck.estimators.base import Estimator
from pgcheck.problem import Problem
from pgcheck.statistics.power import Design, Noise, design
from pgcheck.statistics.sequential import Settings

LARGEST_GROUP = 32


@dataclass(frozen=True)
class GroupSize:
    """One group size, exactly."""

    group_size: int
    rows: int
    variance: float  # tr Cov ĝ of a batch
    cost: float  # rows · tr Cov ĝ / ‖E ĝ‖²


@dataclass(frozen=True)
class Plan:
    """A design for one estimator on one problem."""

    estimator: str
    problem: str
    design: Design
    group_sizes: tuple[GroupSize, ...]  # those that fit; empty where the problem has groups of unequal size

    @property
    def best(self) -> GroupSize | None:
        """The one that wastes the fewest rollouts."""
        return min(self.group_sizes, key=lambda g: g.cost) if self.group_sizes else None


def plan(
    estimator: Estimator,
    problem: Problem,
    settings: Settings,
    *,
    draws: int | None = None,
    budget: int = DEFAULT_BUDGET,
    progress: Progress | None = None,
) -> Plan:
    """The design, from exact moments.

    Args:
        draws: batches that may be drawn.
        budget: most batches enumerated.

    Raises:
        BudgetError: the problem's own batches cannot be enumerated.
    """
    (m,) = exact_moments([estimator], problem, budget=budget, progress=progress)
    noise = Noise.of(m.whole_covariance, problem.gradient().flatten())
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
                sizes.append(GroupSize(size, rows, x.total_variance, rows * x.total_variance / signal))
    return Plan(estimator.name, problem.name, design(noise, settings, budget=draws), tuple(sizes))
