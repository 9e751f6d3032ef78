"""What an estimator is, told by its estimates: those of a known one from the same drawn batches, times a factor.

A sampled E ĝ is known to a few percent, which does not tell one mistake from another. But two estimators can be compared draw
by draw: where ĝ = κ ĝ' from each of 32 batches, the one is κ times the other, whatever both are on average.

Guarantee: an identity is reported only if it holds on every problem tried, with one named κ or one number, to 1e-5 of the
largest estimate: an ε of 1e-6 in a divisor does not show.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import itemgetter

import torch
from torch import Tensor

from pgcheck.engines.coefficients import estimates
from pgcheck.engines.exact import exact_moments
from pgcheck.engines.threads import one_thread
from pgcheck.errors import PgcheckError
from pgcheck.estimators.base import Estimator
from pgcheck.problem import Problem
from pgcheck.trajectories import SideTable, Trajectories
from pgcheck.verdicts.checks.base import SAME
from pgcheck.verdicts.diagnose import TRY_BUDGET, Diagnosis, candidates, diagnose, named_factor
from pgcheck.verdicts.verdict import RTOL, measure

DRAWS = 32
FEW = 2  # that are tried first
_PROBLEMS = 4


@one_thread()
def find_cause_of_sample(estimator: Estimator, problems: Sequence[Problem], *, seed: int = 0) -> Diagnosis | None:
    """The known estimator that it is draw by draw; failing that, in expectation, where batches can be enumerated after all."""
    return find_same_draws(estimator, problems, seed=seed) or _in_expectation(estimator, problems)


@one_thread()
def find_same_draws(estimator: Estimator, problems: Sequence[Problem], *, seed: int = 0) -> Diagnosis | None:
    """The first of the known estimators, mistakes among them, whose ĝ times a factor it gives from every draw; one that needs
    no factor before one that does, one that is the same to rounding before one that is not."""
    own: list[tuple[_Draws, Tensor]] = []
    for p in problems:
        if p.written or len(own) == _PROBLEMS:
            continue
        draws = _Draws(p, seed)
        if (x := draws.of(estimator, DRAWS)) is not None and float(x.abs().max()) > 0:
            own.append((draws, x))
    found = []
    for c in candidates() if own else ():
        if c.estimator.coefficients is estimator.coefficients:
            continue
        factors: list[tuple[Problem, float]] = []
        largest = 0.0
        for draws, x in own:
            factor, gap = draws.factor(x, c.estimator, FEW)
            if gap <= SAME:
                factor, gap = draws.factor(x, c.estimator, DRAWS)
            largest = max(largest, gap)
            if not largest <= SAME:
                break
            factors.append((draws.problem, factor))
        name = named_factor(factors, rtol=SAME) if len(factors) == len(own) else None
        if name is not None:
            rounding = largest <= RTOL
            cause = Diagnosis("draw by draw", c.estimator.name, name, len(own), mistake=c.mistake)
            found.append(((not rounding, name != ""), cause))
    return min(found, key=itemgetter(0))[1] if found else None


@dataclass
class _Draws:
    """The first batches of a problem's stream, with whatever side columns are asked for."""

    problem: Problem
    seed: int
    tables: dict[tuple[SideTable, ...], tuple[Trajectories, Tensor]] = field(default_factory=dict)

    def factor(self, x: Tensor, e: Estimator, count: int) -> tuple[float, float]:
        """The κ that fits x = κ ĝ best from the first `count`, and the largest of |x − κ ĝ| over that of |x|."""
        x = x[:count]
        if float(x.abs().max()) == 0:
            return math.nan, 0.0  # more of them will tell
        y = self.of(e, count)
        size = 0.0 if y is None else float((y * y).sum())
        if y is None or size == 0:
            return math.nan, math.inf
        κ = float((x * y).sum()) / size
        return κ, float((x - κ * y).abs().max() / x.abs().max())

    def of(self, e: Estimator, count: int) -> Tensor | None:
        """ĝ of the first `count`, `[count, K·A]`; None where it cannot be had."""
        p = self.problem
        if not e.fits(p) or not p.can_draw(e.needs):
            return None
        try:
            if e.needs not in self.tables:
                self.tables[e.needs] = p.sampler(seed=self.seed, needs=e.needs).draw(0, DRAWS)
            table, index = self.tables[e.needs]
            return estimates(e, table, index[:count], p.group_labels)
        except PgcheckError:
            return None


def _in_expectation(estimator: Estimator, problems: Sequence[Problem]) -> Diagnosis | None:
    pairs = []
    for p in problems:
        if p.enumerable and estimator.fits(p):
            try:
                (m,) = exact_moments([estimator], p, budget=TRY_BUDGET)
            except PgcheckError:
                continue
            pairs.append((p, measure(estimator, p, m)))
    known = [(p, m) for p, m in pairs if bool(torch.isfinite(m.expected).all())]
    return diagnose(estimator, *map(list, zip(*known, strict=True))) if known else None
