"""Random vectors with finitely many values, and their samples as counts.

A sample of n draws matters only through how often each value came up: counts are multinomial, and statistics of thousands of
samples are sums over values, weighted with counts `[runs, N]`.

Guarantee: mean and covariance are exact, so that a statistic is held against the truth.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from pgcheck.errors import UsageError
from pgcheck.statistics.guarded import Floats, Scores


@dataclass(frozen=True)
class Law:
    """A random vector that takes N values."""

    name: str
    family: str
    values: Tensor  # [N, P]
    probability: Floats  # [N]

    @staticmethod
    def of(name: str, family: str, values: Tensor, probability: Floats) -> Law:
        """With equal values merged."""
        if len(values) != len(probability) or not np.isclose(probability.sum(), 1.0):
            raise UsageError(f"probability: {len(values)} values need as many probabilities, of sum 1.")
        rows, index = torch.unique(values, dim=0, return_inverse=True)
        merged = np.bincount(index.numpy(), weights=probability / probability.sum())
        return Law(name, family, rows, merged.astype(np.float64))

    @cached_property
    def mean(self) -> Tensor:
        """E X, [P]."""
        return torch.from_numpy(self.probability) @ self.values

    @cached_property
    def covariance(self) -> Tensor:
        """Cov X, [P, P]."""
        d = self.values - self.mean
        return d.T @ (d * torch.from_numpy(self.probability).unsqueeze(-1))

    def draws(self, number: int, rng: np.random.Generator) -> Tensor:
        """`number` draws, `[number, P]`."""
        at = np.searchsorted(np.cumsum(self.probability)[:-1], rng.random(number), side="right")
        return self.values[torch.from_numpy(at)]

    def counts(self, number: int, runs: int, rng: np.random.Generator) -> Tensor:
        """How often each value comes up in `number` draws, `[runs, N]`."""
        return torch.from_numpy(rng.multinomial(number, self.probability, size=runs).astype(np.float64))


def weighted_scores(y: Tensor, counts: Tensor) -> Scores:
    """Moments of values y `[R, N]`, or `[N]` for all runs, that occur `counts` `[R, N]` times: R kinds of score."""
    n = float(counts[0].sum())
    y = y.expand(counts.shape)
    mean = (counts * y).sum(1) / n
    d = y - mean.unsqueeze(1)
    cd2 = counts * d * d
    seen = counts > 0
    low, high = torch.where(seen, y, torch.inf).amin(1), torch.where(seen, y, -torch.inf).amax(1)
    return Scores(int(n), *(x.numpy() for x in (mean, cd2.sum(1), (cd2 * d).sum(1), low, high)))
