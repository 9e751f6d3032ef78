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

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pgcheck.batch import Batch
from pgcheck.engines.coefficients import coefficients_of, gradient_map, scattered, step_sums
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


@dataclass(frozen=True)
class OwnRows:
    """Some count vectors m of one start, V of them. For each m and each class k in it there is a *pair*, Q of them; and for
    each rollout n of the class an *evaluation*, the coefficients of a row with rollout n in a group that m describes. The P
    evaluations come pair by pair, and pairs come vector by vector."""

    chance: Tensor  # [V] P(m), the start included
    vector: Tensor  # [Q] the number of m
    times: Tensor  # [Q] m_k
    pair: Tensor  # [P] the number of the pair
    rollout: Tensor  # [P] n
    inside: Tensor  # [P] P(n | k)
    coefficients: Tensor  # [P, T], or [P, T, A]; 0 where the policy does not act

    @property
    def pair_weight(self) -> Tensor:
        """P(m) m_k, `[Q]`."""
        return self.chance[self.vector] * self.times

    @property
    def weight(self) -> Tensor:
        """P(m) m_k P(n | k), `[P]`."""
        return self.pair_weight[self.pair] * self.inside

    def over_pairs(self, x: Tensor) -> Tensor:
        """Σ_n P(n | k) x, `[Q, …]`, of `x` `[P, …]`."""
        y = x * self.inside.unsqueeze(-1)
        return torch.zeros(len(self.vector), x.shape[1], dtype=x.dtype).index_add_(0, self.pair, y)

    def over_vectors(self, mu: Tensor) -> Tensor:
        """Σ_k m_k μ_k, `[V, …]`, of `mu` `[Q, …]`."""
        y = mu * self.times.unsqueeze(-1)
        return torch.zeros(len(self.chance), mu.shape[1], dtype=mu.dtype).index_add_(0, self.vector, y)


def own_rows(
    estimator: Estimator, table: Trajectories, lumps: Lumps, *, numbers: int, progress: Progress | None = None
) -> Iterator[OwnRows]:
    """Every evaluation that there is, in blocks; `numbers` are kept of one beside its coefficients, and of a pair."""
    logits = estimator.leaf == "logits"
    positions = lumps.size * table.paths.steps * (table.actions if logits else 1)
    label = torch.zeros(lumps.size, dtype=torch.int64)
    done = 0
    for s in lumps.starts:
        C, G = len(s.members), lumps.size
        size = np.array([len(m) for m in s.members])
        low_of = np.cumsum(size) - size  # where each class begins among the rollouts
        chance_of = table.behavior_probability.numpy()[s.rollouts]
        law = np.add.reduceat(chance_of, low_of)
        inside = chance_of / np.repeat(law, size)
        total = count_multisets(C, G)
        block = max(1, _BLOCK_ELEMENTS // (len(s.rollouts) * max(positions, numbers)))
        for low in range(0, total, block):
            rows = unrank_multisets(np.arange(low, min(low + block, total)), C, G)  # classes of the G rows, sorted
            count = (rows[:, None, :] == np.arange(C)[:, None]).sum(-1)
            vector, k = np.nonzero(count)
            place = (np.cumsum(count, 1) - count)[vector, k]  # the own row stands where its class first occurs
            pair = np.repeat(np.arange(len(k)), size[k])
            number = np.arange(len(pair)) + np.repeat(low_of[k] - np.cumsum(size[k]) + size[k], size[k])
            index = s.rollouts[low_of][rows[vector]][pair]  # representatives
            at = np.arange(len(pair)), place[pair]
            index[at] = s.rollouts[number]
            batch = table.batch(torch.from_numpy(index), label, logits=logits)
            c = coefficients_of(estimator, batch)[torch.from_numpy(at[0]), torch.from_numpy(at[1])]
            yield OwnRows(
                chance=torch.from_numpy(s.probability * arrangements(rows) * law[rows].prod(1)),
                vector=torch.from_numpy(vector),
                times=torch.from_numpy(count[vector, k].astype(float)),
                pair=torch.from_numpy(pair),
                rollout=torch.from_numpy(s.rollouts[number]),
                inside=torch.from_numpy(inside[number]),
                coefficients=c.to(torch.float64),
            )
            done += len(pair)
            if progress is not None:
                progress(f"{estimator.name}: class counts", done, lumps.evaluations)


def lumped_sums(estimator: Estimator, table: Trajectories, lumps: Lumps, progress: Progress | None = None) -> Sums:
    """E x and E x xᵀ of one group."""
    logits = estimator.leaf == "logits"
    cells = table.contexts * table.actions
    place = table.logit_cells if logits else table.cell
    second = torch.zeros(cells, cells, dtype=torch.float64)
    of_rollout = torch.zeros(len(table), *place.shape[1:], dtype=torch.float64)
    for own in own_rows(estimator, table, lumps, numbers=cells, progress=progress):
        c, weight = own.coefficients, own.weight
        of_rollout.index_add_(0, own.rollout, c * weight.reshape(-1, *[1] * (c.dim() - 1)))
        x = scattered(c, place[own.rollout].flatten(1), cells)
        mu = own.over_pairs(x)
        expected = own.over_vectors(mu)
        centred = x - mu[own.pair]
        second += expected.T @ (expected * own.chance.unsqueeze(-1)) + centred.T @ (centred * weight.unsqueeze(-1))
    to_gradient = gradient_map(table, logits=logits)
    by_step = step_sums(of_rollout, table) @ to_gradient.T
    between = torch.zeros_like(second)
    return Sums(by_step.sum(0), to_gradient @ second @ to_gradient.T, between, lumps.evaluations, by_step)


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
