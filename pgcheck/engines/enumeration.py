"""Every batch a problem can draw, with its probability, in blocks of index rows.

Rows of a batch are exchangeable inside a group and groups of equal size among each other, so a batch is a multiset: of
rollouts inside each group, and of groups. A multiset of k out of n has C(n+k−1, k) values and the multinomial weight
k!/Π m_j! · Π p_j^m_j. An estimator that depends on the order of rows gets ordered tuples instead, n^k of them.

Guarantee: the number of batches is known before the first is made; any block can be made without the ones before it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pgcheck.trajectories import Trajectories

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

_TABLE_LIMIT = 2_000_000  # group outcomes kept as a table; above it they are made again in every block


def count_multisets(n: int, size: int) -> int:
    """C(n + size − 1, size)."""
    return math.comb(n + size - 1, size)


@functools.lru_cache(maxsize=64)
def _binomials(n: int, k: int) -> Ints:
    """C(c, k) for c = 0 … n − 1, `[n]`, by C(c, k) = Σ_{j<c} C(j, k − 1)."""
    row = np.ones(n, dtype=np.int64)
    for _ in range(k):
        row = np.concatenate([[0], np.cumsum(row)[:-1]])
    return row


def unrank_multisets(rank: Ints, n: int, size: int) -> Ints:
    """Multisets number `rank` `[M]` of `size` out of n, as non-decreasing rows `[M, size]`.

    By the combinatorial number system: rank = Σ_i C(c_i, i) with c_1 < c_2 < … and element_i = c_i − (i − 1).
    """
    out = np.empty((len(rank), size), dtype=np.int64)
    rest = rank.copy()
    for i in range(size, 1, -1):
        below = _binomials(n + i, i)
        c = np.searchsorted(below, rest, side="right") - 1
        rest -= below[c]
        out[:, i - 1] = c - (i - 1)
    out[:, 0] = rest  # C(c, 1) = c
    return out


def every_multiset(p: Floats, size: int) -> tuple[Ints, Floats]:
    """All multisets of `size` out of n in the order of their ranks, `[C, size]`, and the multinomial probability of each under
    `p` `[n]`.

    In that order the multisets whose largest element is c are those of `size` − 1 elements of 0 … c, which come first among
    their own, with c added; k!/Π m_j! gets the factor k / (how often c is in it by then).
    """
    n = len(p)
    rows, weight, times = np.empty((1, 0), dtype=np.int64), np.ones(1), np.zeros(1)  # times: of the largest element
    for k in range(1, size + 1):
        prefix = [count_multisets(c + 1, k - 1) for c in range(n)]
        before, w, run = rows, weight, times
        rows, weight, times = np.empty((sum(prefix), k), dtype=np.int64), np.empty(sum(prefix)), np.ones(sum(prefix))
        low = 0
        for c, (m, smaller) in enumerate(zip(prefix, [0, *prefix], strict=False)):
            at = slice(low, low + m)
            rows[at, : k - 1], rows[at, k - 1] = before[:m], c
            times[low + smaller : low + m] = run[smaller:m] + 1 if k > 1 else 1
            weight[at] = w[:m] * (k * p[c]) / times[at]
            low += m
    return rows, weight


def unrank_tuples(rank: Ints, n: int, size: int) -> Ints:
    """Tuples number `rank` `[M]` in base n, `[M, size]`."""
    out = np.empty((len(rank), size), dtype=np.int64)
    rest = rank.copy()
    for i in range(size - 1, -1, -1):
        rest, out[:, i] = np.divmod(rest, n)
    return out


def arrangements(rows: Ints) -> Floats:
    """Number of orderings of each non-decreasing row `[M, k]`: k!/Π m_j!, built as Π_i i / (run length so far)."""
    run = np.ones(len(rows))
    out = np.ones(len(rows))
    for i in range(1, rows.shape[1]):
        run = np.where(rows[:, i] == rows[:, i - 1], run + 1, 1.0)
        out *= (i + 1) / run
    return out


def _choices(n: int, size: int, ordered: bool) -> int:
    return n**size if ordered else count_multisets(n, size)


def _unrank(rank: Ints, n: int, size: int, ordered: bool) -> tuple[Ints, Floats]:
    if ordered:
        return unrank_tuples(rank, n, size), np.ones(len(rank))
    rows = unrank_multisets(rank, n, size)
    return rows, arrangements(rows)


@dataclass(frozen=True)
class GroupOutcomes:
    """What one group of `size` rollouts can be: for each start, the multisets (or tuples) of its rollouts."""

    members: tuple[Ints, ...]  # rollouts of each start
    start_probability: Floats  # [starts]
    probability: Floats  # [N] given the start
    size: int
    ordered: bool

    @cached_property
    def offsets(self) -> list[int]:
        """First outcome number of each start, and the total at the end."""
        total = [0]
        for m in self.members:
            total.append(total[-1] + _choices(len(m), self.size, self.ordered))
        return total

    @property
    def count(self) -> int:
        """Number of outcomes."""
        return self.offsets[-1]

    def rows(self, number: Ints) -> tuple[Ints, Floats]:
        """Rollouts `[M, size]` and probability `[M]` of outcomes `number` `[M]`."""
        if self.table is None:
            return self._make(number)
        rows, weight = self.table
        return rows[number], weight[number]

    @cached_property
    def table(self) -> tuple[Ints, Floats] | None:
        """The rows and probabilities of all outcomes, if they can be kept."""
        if self.count > _TABLE_LIMIT:
            return None
        if self.ordered:
            return self._make(np.arange(self.count))
        rows, weight = np.empty((self.count, self.size), dtype=np.int64), np.empty(self.count)
        for s, members in enumerate(self.members):
            at = slice(self.offsets[s], self.offsets[s + 1])
            local, weight[at] = every_multiset(self.probability[members], self.size)
            weight[at] *= self.start_probability[s]
            rows[at] = members[local]
        return rows, weight

    def _make(self, number: Ints) -> tuple[Ints, Floats]:
        rows = np.empty((len(number), self.size), dtype=np.int64)
        weight = np.empty(len(number))
        for s, members in enumerate(self.members):
            at = (number >= self.offsets[s]) & (number < self.offsets[s + 1])
            local, ways = _unrank(number[at] - self.offsets[s], len(members), self.size, self.ordered)
            rows[at] = members[local]
            weight[at] = self.start_probability[s] * ways * self.probability[rows[at]].prod(1)
        return rows, weight


@dataclass(frozen=True)
class Batches:
    """Every batch with the given group sizes; `rows` come in the order of `sizes`."""

    table: Trajectories
    sizes: tuple[int, ...]
    ordered: bool = False

    @cached_property
    def _outcomes(self) -> dict[int, GroupOutcomes]:
        paths = self.table.paths
        probability = self.table.behavior_probability.numpy()
        start = paths.start.numpy()
        members = tuple(
            np.flatnonzero((start == s) & (probability > 0)) if q > 0 else np.empty(0, dtype=np.int64)
            for s, q in enumerate(paths.start_probability.tolist())
        )
        q = paths.start_probability.numpy()
        return {size: GroupOutcomes(members, q, probability, size, self.ordered) for size in sorted(set(self.sizes))}

    @cached_property
    def _classes(self) -> list[tuple[GroupOutcomes, list[int], int]]:
        """For each distinct size: its outcomes, which groups have it, and how many choices they have together."""
        classes = []
        for size, outcomes in self._outcomes.items():
            groups = [g for g, s in enumerate(self.sizes) if s == size]
            classes.append((outcomes, groups, _choices(outcomes.count, len(groups), self.ordered)))
        return classes

    @property
    def count(self) -> int:
        """Number of batches to evaluate."""
        return math.prod(choices for *_, choices in self._classes)

    @cached_property
    def labels(self) -> Tensor:
        """The group of each row, `[B]`."""
        return torch.repeat_interleave(torch.arange(len(self.sizes)), torch.tensor(self.sizes))

    def blocks(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Blocks of (rollouts `[M, B]`, probability `[M]`), M ≤ `size`."""
        (outcomes, groups, _), *others = self._classes
        if len(groups) == 1 and not others and outcomes.table is not None:
            rows, weight = map(torch.from_numpy, outcomes.table)
            yield from zip(rows.split(size), weight.split(size), strict=True)
            return
        for low in range(0, self.count, size):
            yield self.block(np.arange(low, min(low + size, self.count)))

    def block(self, rank: Ints) -> tuple[Tensor, Tensor]:
        """Batches number `rank` `[M]`."""
        first = np.concatenate([[0], np.cumsum(self.sizes)])
        rows = np.empty((len(rank), int(first[-1])), dtype=np.int64)
        weight = np.ones(len(rank))
        rest = rank
        for outcomes, groups, choices in self._classes:
            rest, own = np.divmod(rest, choices)
            numbers, ways = _unrank(own, outcomes.count, len(groups), self.ordered)
            weight = weight * ways
            for column, g in enumerate(groups):
                rows[:, first[g] : first[g + 1]], p = outcomes.rows(numbers[:, column])
                weight = weight * p
        return torch.from_numpy(rows), torch.from_numpy(weight)

    def random(self, number: int, *, seed: int) -> Tensor:
        """`number` batches `[number, B]` in which every start and every rollout of it is equally likely."""
        generator = np.random.Generator(np.random.Philox(seed))
        members = next(iter(self._outcomes.values())).members
        length = np.array([len(m) for m in members])
        first = np.concatenate([[0], np.cumsum(length)])[:-1]
        every, starts = np.concatenate(members), np.flatnonzero(length)
        columns = []
        for size in self.sizes:
            start = generator.choice(starts, size=(number, 1))
            columns.append(every[first[start] + (generator.random((number, size)) * length[start]).astype(np.int64)])
        return torch.from_numpy(np.concatenate(columns, 1))
