"""Drawing batches: numbered draws that do not depend on how they are asked for.

A *draw* is one whole batch of B rows. Draw number i of a stream is made from uniforms of its own, `width` of them, which a
counter-based generator (Philox 4×64, Salmon et al. 2011) gives for i alone; rows are found from them by inverting the law
of the start and of the rollout given the start.

Guarantee: draw i of (seed, problem) is the same whatever was drawn before it, in blocks of any size and in any order, and for
every estimator; global generators are not touched.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from pgcheck.trajectories import Trajectories

_PER_COUNT = 4  # 64-bit numbers that one step of the counter gives


@dataclass(frozen=True)
class Stream:
    """Independent uniforms for numbered draws.

    Args:
        seed: whatever number the user gave.
        names: what the stream is for (a problem's digest, "rollouts"); streams of other names are independent.
    """

    seed: int
    names: tuple[str, ...]

    @cached_property
    def _key(self) -> np.ndarray:
        text = "|".join((str(self.seed), *self.names))
        return np.frombuffer(hashlib.sha256(text.encode()).digest()[:16], dtype=np.uint64)

    def uniforms(self, first: int, count: int, width: int) -> Tensor:
        """Draws number first … first + count − 1: `[count, width]` in [0, 1), float64."""
        steps = -(-width // _PER_COUNT)
        philox = np.random.Philox(key=self._key, counter=first * steps)
        numbers = np.random.Generator(philox).random((count, steps * _PER_COUNT))
        return torch.from_numpy(numbers)[:, :width]


class Sampler(Protocol):
    """Where numbered batches come from."""

    @property
    def labels(self) -> Tensor:
        """The group of each row, `[B]`."""

    def draw(self, first: int, count: int) -> tuple[Trajectories, Tensor]:
        """Draws number first … first + count − 1: a table of rollouts and the rows of it that they are, `[count, B]`.

        The table need not be the same from call to call, nor hold anything that was not drawn.
        """


@dataclass(frozen=True)
class TableSampler:
    """Batches from the table of all rollouts: a start for each group by its probability, then rollouts by that of the
    behaviour policy."""

    table: Trajectories
    labels: Tensor  # [B]
    stream: Stream

    @cached_property
    def _starts(self) -> Tensor:
        q = self.table.paths.start_probability
        return q.cumsum(0) / q.sum()

    @cached_property
    def _rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """Rollouts sorted by start `[N]`, s + P(rollout ≤ this | s) of each, and where those of each start begin."""
        start = self.table.paths.start
        order = start.argsort(stable=True)
        p, of = self.table.behavior_probability[order], start[order]
        below = torch.cat([p.new_zeros(1), p.cumsum(0)])
        first = torch.searchsorted(of, torch.arange(len(self._starts) + 1))
        mass = (below[first[1:]] - below[first[:-1]])[of]
        return order, of + ((below[1:] - below[first[:-1]][of]) / mass).clamp(max=1.0), first

    def draw(self, first: int, count: int) -> tuple[Trajectories, Tensor]:
        groups = int(self.labels[-1]) + 1
        u = self.stream.uniforms(first, count, groups + len(self.labels))
        start = torch.searchsorted(self._starts, u[:, :groups].contiguous(), right=True).clamp(
            max=len(self._starts) - 1
        )
        order, upto, begins = self._rows
        of_row = start[:, self.labels]
        place = torch.searchsorted(upto, (of_row + u[:, groups:]).contiguous(), right=True)
        # s + u is rounded, and may have become s + 1
        place = torch.minimum(place, begins[of_row + 1] - 1)
        return self.table, order[place]
