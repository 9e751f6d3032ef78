"""Witnesses: directions along which a bias is looked for, each made for another shape of it.

| witness | direction, from earlier draws only (s² = variance of each coordinate) | sees |
|---|---|---|
| par | μ* | errors of scale, (B−1)/B |
| parw | μ*/s² | errors of scale under unequal noise |
| dense | mean D | a bias spread over coordinates |
| white | mean D / s² | a bias in quiet coordinates |
| sparse | the same, where a coordinate stands out | one layer, one token |
| defl | mean D, shrunk on the 16 loudest directions of the first 256 draws | a bias under a few loud directions |

Guarantee: a direction never looks at the draws that it is scored on, so that each test is of one mean of independent scores,
whatever P is. No covariance is inverted, no coordinate corrected for P.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

WITNESSES = ("par", "parw", "dense", "white", "sparse", "defl")
TWO_SIDED = 2  # the first two have a direction without a sign
LOUD = 16
_QUIET = 1e-12  # a coordinate's variance below this share of the largest is rounding
_SHRINK = 1e-3  # a loud direction keeps at least this share


@dataclass(frozen=True)
class Loud:
    """The loudest directions `[P, L]` of a pilot, and the share that is kept along each, `[L]`."""

    directions: Tensor
    kept: Tensor


def loud_directions(d: Tensor) -> Loud:
    """Of draws `[m, P]`: eigenvectors of their covariance, kept in the ratio of the next eigenvalue to each."""
    centred = d - d.mean(0)
    small = centred.shape[1] <= len(centred)
    value, vector = torch.linalg.eigh(centred.T @ centred if small else centred @ centred.T)
    value, vector = value.flip(0).clamp(min=0.0), vector.flip(1)
    number = min(LOUD, len(value) - 1, int((value > _QUIET * value[0]).sum()))
    top, rest = value[:number], value[number] if number < len(value) else value.new_zeros(())
    padded = torch.zeros(d.shape[1], LOUD, dtype=d.dtype)
    kept = torch.ones(LOUD, dtype=d.dtype)
    padded[:, :number] = vector[:, :number] if small else centred.T @ vector[:, :number] / top.sqrt()
    kept[:number] = (rest / top).clamp(min=_SHRINK)
    return Loud(padded, kept)


def directions(total: Tensor, squares: Tensor, n: int, *, along: Tensor, loud: Loud, aside: bool) -> Tensor:
    """Unit directions `[P, 7]`: the six witnesses, and the mean of D across μ*.

    Args:
        total, squares: Σ D and Σ D² of the n earlier draws, `[P]`.
        along: μ*/‖μ*‖.
        aside: make the learned ones orthogonal to μ*.
    """
    mean = total / n
    s2 = squares / n - mean**2
    live = s2 > _QUIET * s2.max()
    precision = torch.where(live, 1 / torch.where(live, s2, 1.0), 0.0)
    white = mean * precision
    z = (mean * (n * precision).sqrt()).abs()
    threshold = min(math.sqrt(2 * math.log(max(len(mean), 2))), float(z.max()))
    sparse = torch.where(z >= threshold, white, 0.0)
    deflated = mean - loud.directions @ ((1 - loud.kept) * (loud.directions.T @ mean))
    across = mean - along * (along @ mean)
    learned = torch.stack([along * precision, mean, white, sparse, deflated, across], 1)
    if aside:
        learned = learned - torch.outer(along, along @ learned)
    size = learned.norm(dim=0)
    learned = torch.where(size > 0, learned / torch.where(size > 0, size, 1.0), 0.0)
    return torch.cat([along.unsqueeze(1), learned], 1)
