"""The largest eigenvalue of symmetric matrices without a negative one, proven from above.

A Lanczos recurrence (Golub & Van Loan 2013, 10.1) of some twenty products with a vector has the largest eigenvalue to rounding
where the next ones are not close to it; what it finds, θ, is never above it. That nothing is above θ(1 + 1e-12) is then proven
by a Cholesky factorisation of θ(1 + 1e-12) − G, which breaks down otherwise. Of a 256 x 256 matrix that is a third of the time
of all eigenvalues; small matrices, and those on which the recurrence has not settled in forty steps, have them all computed.

Guarantee: what is returned is at most 1e-12 of itself above the largest eigenvalue, and below it by no more than rounding.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Matrix = NDArray[np.float64]

_SMALL = 128  # rows of a matrix below which all eigenvalues are as fast
_STEPS = (20, 40)
_BACK = 4  # steps before, at which it must have been the same
_ROOM = 1e-12


def largest_eigenvalues(grams: Tensor) -> Tensor:
    """Of matrices `[m, s, s]`, `[m]`."""
    if grams.shape[-1] < _SMALL or grams.device.type != "cpu":
        return torch.linalg.eigvalsh(grams)[..., -1]
    return torch.stack([_largest(gram) for gram in grams])


def _largest(gram: Tensor) -> Tensor:
    found = _ritz(gram.numpy())
    if found is not None:
        above = found * (1 + _ROOM)
        rest = torch.diag_embed(gram.new_full((len(gram),), above)) - gram
        if not int(torch.linalg.cholesky_ex(rest).info):
            return gram.new_tensor(above)
    return torch.linalg.eigvalsh(gram)[-1]


def _ritz(gram: Matrix) -> float | None:
    """The largest eigenvalue of the matrix as a Krylov space sees it, once that has settled."""
    v = np.random.Generator(np.random.Philox(len(gram))).standard_normal(len(gram))
    v /= np.sqrt(v @ v)
    before, β = np.zeros_like(v), 0.0
    diagonal: list[float] = []
    beside: list[float] = []
    for step in range(1, _STEPS[-1] + 1):
        w = gram @ v
        w -= β * before
        diagonal.append(float(v @ w))
        w -= diagonal[-1] * v
        β = float(np.sqrt(w @ w))
        if not β > _ROOM * abs(diagonal[0]):  # the space is all that there is to see from this start
            return None
        if step in _STEPS:
            now, then = (_top(diagonal[:k], beside[: k - 1]) for k in (step, step - _BACK))
            if now - then <= _ROOM * now:
                return now
        beside.append(β)
        before, v = v, w / β
    return None


def _top(diagonal: list[float], beside: list[float]) -> float:
    return float(np.linalg.eigvalsh(np.diag(diagonal) + np.diag(beside, -1))[-1])
