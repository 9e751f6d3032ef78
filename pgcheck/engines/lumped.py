"""Exact moments of one large group from class counts.

Most estimators see *other* rows only through a few numbers (`Estimator.reads`: the return, the length). Rollouts of one
start with equal numbers form a class; given how many rows fall in each class (a count vector m, Σ_k m_k = G), the
rollouts inside a class are independent, and row i's coefficients depend on its own rollout and m alone. So with x_n(m)
the contribution of a row with rollout n, and μ_k, Σ_k its mean and covariance over class k,

    E[x | m] = Σ_k m_k μ_k(m)      E[x xᵀ | m] = E[x|m] E[x|m]ᵀ + Σ_k m_k Σ_k(m)

and m is multinomial. With 4 classes, G = 16 and 15 rollouts that is 969 count vectors instead of 1.45e8 multisets.

Guarantee: the same moments as the enumeration of multisets, to rounding; `reads` is verified by substitution first
(`pgcheck.engines.declarations`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pgcheck.batch import Batch
from pgcheck.engines.coefficients import cells_of, coefficients_of, gradient_map, scattered, step_sums
from pgcheck.engines.enumeration import arrangements, count_multisets, unrank_multisets
from pgcheck.engines.moments import Progress, Sums
from pgcheck.errors import EstimatorError
from pgcheck.estimators.base import Estimator
from pgcheck.trajectories import Trajectories

_BLOCK_ELEMENTS = 250_000  # positions evaluated at once

READABLE = {
    "return": lambda rows: rows.episode_return.unsqueeze(-1),
    "length": lambda rows: rows.length.unsqueeze(-1),
}


@dataclass(frozen=True)
class StartClasses:
    """The classes of one start."""

    probability: float  # of the start
    members: tuple[NDArray[np.int64], ...]  # rollouts of each class

    @property
    def rollouts(self) -> NDArray[np.int64]:
        """All of them, class by class."""
        return np.concatenate(self.members)


@dataclass(frozen=True)
class Lumps:
    """Classes of every start, for groups of `size`."""

    starts: tuple[StartClasses, ...]
    size: int

    @property
    def evaluations(self) -> int:
        """Batches to evaluate: for each count vector with a row to spare in class k, every rollout of k."""
        # the other G − 1 rows form any multiset of classes, whatever the own rollout is
        return sum(count_multisets(len(s.members), self.size - 1) * len(s.rollouts) for s in self.starts)


def lump(estimator: Estimator, table: Trajectories, sizes: Sequence[int]) -> Lumps | None:
    """The classes, if the estimator declares what it reads and one group is all it looks at.

    Raises:
        EstimatorError: `reads` names something unknown.
    """
    if estimator.reads is None or len(sizes) != 1 or estimator.couples == "trajectory" or sizes[0] < 2:
        return None
    unknown = [name for name in estimator.reads if name not in READABLE]
    if unknown:
        raise EstimatorError(f"reads: {unknown[0]!r} is not one of {', '.join(READABLE)}.")
    rows: Batch = table.rows_as_batch()
    columns = [READABLE[name](rows) for name in estimator.reads]
    features = np.round(torch.cat(columns, -1).numpy(), 12) + 0.0 if columns else np.zeros((len(table), 0))
    start, possible = table.paths.start.numpy(), table.behavior_probability.numpy() > 0
    starts = []
    for s, q in enumerate(table.paths.start_probability.tolist()):
        classes: dict[tuple[float, ...], list[int]] = {}
        for n in np.flatnonzero((start == s) & possible) if q > 0 else ():
            classes.setdefault(tuple(features[n]), []).append(int(n))
        if classes:
            starts.append(StartClasses(q, tuple(np.array(members) for members in classes.values())))
    return Lumps(tuple(starts), sizes[0])


def lumped_sums(estimator: Estimator, table: Trajectories, lumps: Lumps, progress: Progress | None = None) -> Sums:
    """E x and E x xᵀ of one group."""
    logits = estimator.leaf == "logits"
    cells = table.contexts * table.actions
    mean, second = torch.zeros(cells, dtype=torch.float64), torch.zeros(cells, cells, dtype=torch.float64)
    per_position = (table.actions,) if logits else ()
    of_rollout = torch.zeros(len(table), table.paths.steps, *per_position, dtype=torch.float64)
    done = 0
    for s in lumps.starts:
        C, G = len(s.members), lumps.size
        total = count_multisets(C, G)
        block = max(1, _BLOCK_ELEMENTS // (len(s.rollouts) * G * table.paths.steps))
        mass = [table.behavior_probability[torch.from_numpy(m)] for m in s.members]
        law = np.array([float(q.sum()) for q in mass])
        for low in range(0, total, block):
            rows = unrank_multisets(np.arange(low, min(low + block, total)), C, G)  # classes of the G rows, sorted
            chance = torch.from_numpy(s.probability * arrangements(rows) * law[rows].prod(1))
            expected = torch.zeros(len(rows), cells, dtype=torch.float64)
            spread = torch.zeros(cells, cells, dtype=torch.float64)
            for k, members in enumerate(s.members):
                count = (rows == k).sum(1)
                has = count > 0
                if not has.any():
                    continue
                c = own_coefficients(estimator, table, s, rows[has], k, logits)  # [m, n, T]
                cell = cells_of(table, torch.from_numpy(members).unsqueeze(-1), logits=logits).repeat(len(c), 1)
                x = scattered(c.flatten(0, 1).flatten(1), cell, cells).unflatten(0, c.shape[:2])  # [m, n, cells]
                inside = mass[k] / mass[k].sum()
                mu = (inside.unsqueeze(-1) * x).sum(1)
                times = torch.from_numpy(count[has].astype(float))
                at = torch.from_numpy(np.flatnonzero(has))
                own = inside.reshape(-1, *[1] * (c.dim() - 2))
                of_rollout[torch.from_numpy(members)] += own * torch.tensordot(chance[at] * times, c, dims=1)
                expected[at] += times.unsqueeze(-1) * mu
                centred = (x - mu.unsqueeze(1)) * inside.sqrt().unsqueeze(-1)
                weighted = centred * (chance[at] * times).sqrt().reshape(-1, 1, 1)
                flat = weighted.reshape(-1, cells)
                spread += flat.T @ flat
                done += len(x) * len(members)
            mean += chance @ expected
            second += expected.T @ (expected * chance.unsqueeze(-1)) + spread
            if progress is not None:
                progress(f"{estimator.name}: class counts", done, lumps.evaluations)
    to_gradient = gradient_map(table, logits=logits)
    between = torch.zeros_like(second)
    by_step = step_sums(of_rollout, table) @ to_gradient.T
    return Sums(to_gradient @ mean, to_gradient @ second @ to_gradient.T, between, lumps.evaluations, by_step)


def own_coefficients(
    estimator: Estimator, table: Trajectories, start: StartClasses, rows: NDArray[np.int64], k: int, logits: bool
) -> Tensor:
    """Coefficients `[m, n, T]` (or `[m, n, T, A]`) of a row of class k, for every rollout n of it, given the classes `rows`
    `[m, G]`."""
    first = np.array([members[0] for members in start.members])
    own = start.members[k]
    others = first[rows]  # representatives
    place = (rows == k).argmax(1)  # the own row stands where its class first occurs
    index = np.repeat(others[:, None, :], len(own), axis=1)
    index[np.arange(len(rows))[:, None], np.arange(len(own)), place[:, None]] = own
    index = index.reshape(-1, rows.shape[1])
    batch = table.batch(torch.from_numpy(index), torch.zeros(rows.shape[1], dtype=torch.int64), logits=logits)
    c = coefficients_of(estimator, batch)
    at = torch.from_numpy(np.repeat(place, len(own)))
    return c[torch.arange(len(at)), at].to(torch.float64).unflatten(0, (len(rows), len(own)))


def substituted(lumps: Lumps, number: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """Two sets of batches `[number, G]` that differ only in rows 1.., rollout for rollout of the same class."""
    generator = np.random.Generator(np.random.Philox(seed))
    start = generator.integers(len(lumps.starts), size=number)
    before = np.empty((number, lumps.size), dtype=np.int64)
    after = before.copy()
    for i, s in enumerate(lumps.starts):
        at = np.flatnonzero(start == i)
        sizes = np.array([len(members) for members in s.members])
        first = np.cumsum(sizes) - sizes  # of each class, among the rollouts
        chosen = generator.integers(len(sizes), size=(len(at), lumps.size - 1))
        before[at, 0] = after[at, 0] = s.rollouts[generator.integers(len(s.rollouts), size=len(at))]
        for batch in (before, after):
            batch[at, 1:] = s.rollouts[first[chosen] + generator.integers(sizes[chosen])]
    return torch.from_numpy(before), torch.from_numpy(after)
