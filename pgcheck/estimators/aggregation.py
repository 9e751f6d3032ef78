"""Aggregations: the weight of each position in the batch average, `Batch -> [..., B, T]`, broadcastable."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pgcheck.batch import Batch, narrowed

Aggregation = Callable[[Batch], Tensor]


def mean_of_rows(batch: Batch) -> Tensor:
    """Sum over positions, mean over rows: 1/B."""
    return torch.tensor(1.0 / batch.rows, dtype=torch.float64)


def sequence_mean(batch: Batch) -> Tensor:
    """Mean over the positions of each row, then over rows: 1 / (B |o_i|)."""
    return (narrowed(batch.inverse_length) / batch.rows).unsqueeze(-1)


def constant_length(length: int) -> Aggregation:
    """One length for every row, whatever its own: 1 / (B · length)."""

    def aggregation(batch: Batch) -> Tensor:
        return mean_of_rows(batch) / length

    return aggregation


def token_mean(batch: Batch) -> Tensor:
    """Mean over all policy positions of the batch: 1 / Σ_i |o_i|."""
    length = narrowed(batch.length)
    total = length.sum(-1, keepdim=True) * (batch.rows / length.shape[-1])
    return 1.0 / total.clamp(min=1.0).unsqueeze(-1)
