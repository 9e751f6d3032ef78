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

import numpy as np
import scipy
import torch
from torch import Tensor

from pgcheck.statistics.guarded import Floats

WITNESSES = ("par", "parw", "dense", "white", "sparse", "defl")
TWO_SIDED = 2  # the first two have a direction without a sign
LOUD = 16
_QUIET = 1e-12  # a coordinate's variance below this share of the largest is rounding
_PARALLEL = 1e-10  # of a vector, is no part across another
_SHRINK = 1e-3  # a loud direction keeps at least this share


def thresholds(level: float) -> Floats:
    """The z that each witness must reach, `[6]`, so that one does by chance with probability `level` at most.

    `level` is split evenly; for a direction without a sign either side counts.
    """
    sides = np.array([2.0] * TWO_SIDED + [1.0] * (len(WITNESSES) - TWO_SIDED))
    return -np.asarray(scipy.special.ndtri(level / len(WITNESSES) / sides))


@dataclass(frozen=True)
class Loud:
    """The loudest directions `[..., P, L]` of a pilot, and the share that is kept along each, `[..., L]`."""

    directions: Tensor
    kept: Tensor


def loud_directions(d: Tensor) -> Loud:
    """Of draws `[m, P]`: eigenvectors of their covariance, kept in the ratio of the next eigenvalue to each."""
    centred = d - d.mean(0)
    if centred.shape[1] <= len(centred):
        return loudest(*torch.linalg.eigh(centred.T @ centred))
    value, vector = torch.linalg.eigh(centred @ centred.T)
    value = value.clamp(min=0.0)
    size = torch.where(value > _QUIET * value[-1], value.sqrt(), torch.inf)
    return loudest(value, centred.T @ vector / size)


def loudest(value: Tensor, vector: Tensor) -> Loud:
    """The last 16 of eigenvalues `[..., m]` in ascending order, with their vectors `[..., P, m]`."""
    number = min(LOUD, value.shape[-1] - 1)
    value = value.clamp(min=0.0)
    top = value[..., value.shape[-1] - number :]
    rest = value[..., -number - 1].unsqueeze(-1)
    live = top > _QUIET * value[..., -1:]
    kept = torch.where(live, rest / torch.where(live, top, 1.0), 1.0).clamp(min=_SHRINK)
    # contiguous, as a layout decides the order of sums, and a checkpoint keeps none
    return Loud(vector[..., vector.shape[-1] - number :].contiguous(), kept.contiguous())


def directions(total: Tensor, squares: Tensor, n: int, *, along: Tensor, loud: Loud, aside: bool) -> Tensor:
    """Unit directions `[..., P, 7]`: the six witnesses, and the mean of D across μ*.

    Args:
        total, squares: Σ D and Σ D² of the n earlier draws, `[..., P]`.
        along: μ*/‖μ*‖, `[P]`.
        aside: make the learned ones orthogonal to μ*.
    """
    mean = total / n
    s2 = squares / n - mean**2
    live = s2 > _QUIET * s2.amax(-1, keepdim=True)
    precision = torch.where(live, 1 / torch.where(live, s2, 1.0), 0.0)
    white = mean * precision
    z = (mean * (n * precision).sqrt()).abs()
    threshold = z.amax(-1, keepdim=True).clamp(max=math.sqrt(2 * math.log(max(along.numel(), 2))))
    sparse = torch.where(z >= threshold, white, 0.0)
    share = (1 - loud.kept) * (loud.directions.mT @ mean.unsqueeze(-1)).squeeze(-1)
    deflated = mean - (loud.directions @ share.unsqueeze(-1)).squeeze(-1)
    learned = torch.stack([along * precision, mean, white, sparse, deflated, mean], -1)
    if aside:
        learned = _across(learned, along)
    else:
        learned[..., -1:] = _across(learned[..., -1:], along)
    size = learned.norm(dim=-2, keepdim=True)
    learned = torch.where(size > 0, learned / torch.where(size > 0, size, 1.0), 0.0)
    return torch.cat([along.unsqueeze(-1).expand(*mean.shape, 1), learned], -1)


def _across(x: Tensor, along: Tensor) -> Tensor:
    """What vectors `[..., P, m]` have across a unit vector; 0 where that is rounding, of which any part may lie along it."""
    left = x
    for _ in range(2):  # once leaves a part along it that is as large as the rounding of x
        left = left - along.unsqueeze(-1) * (along @ left).unsqueeze(-2)
    return torch.where(left.norm(dim=-2, keepdim=True) > _PARALLEL * x.norm(dim=-2, keepdim=True), left, 0.0)
