"""The largest eigenvalue of symmetric matrices without a negative one, proven from above.

A Lanczos recurrence (Golub & Van Loan 2013, 10.1) of some twenty products with a vector has the largest eigenvalue to rounding
where the next ones are not close to it; what it finds, θ, is never above it. That nothing is above θ(1 + 1e-12) is then proven
by a Cholesky factorisation of θ(1 + 1e-12) − G, which breaks down otherwise. Of a 256 x 256 matrix that is a third of the time
of all eigenvalues; small matrices, and those on which the recurrence has not settled in forty steps, have them all computed.

Guarantee: what is returned is at most 1e-12 of itself above the largest eigenvalue, and below it by no more than rounding.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import scipy
import torch
from numpy.typing import NDArray
from torch import Tensor

Matrix = NDArray[Any]

_SMALL = 128  # rows of a matrix below which all eigenvalues are as fast
_STEPS = (20, 40)
_BACK = 4  # steps before, at which it must have been the same
_ROOM = 1e-12


def largest_eigenvalues(grams: Tensor) -> Tensor:
    """Of matrices `[m, s, s]`, `[m]`."""
    if grams.shape[-1] < _SMALL or grams.device.type != "cpu":
        return torch.linalg.eigvalsh(grams)[..., -1]
    found = _ritz(grams.numpy())
    return torch.stack([_proven(gram, θ) for gram, θ in zip(grams, found.tolist(), strict=True)])


def _proven(gram: Tensor, found: float) -> Tensor:
    if math.isfinite(found):
        above = found * (1 + _ROOM)
        rest = -gram.numpy()
        rest.flat[:: len(rest) + 1] += above
        if not scipy.linalg.lapack.dpotrf(rest, overwrite_a=True, clean=False)[1]:
            return gram.new_tensor(above)
    return torch.linalg.eigvalsh(gram)[-1]


def _ritz(grams: Matrix) -> Matrix:
    """The largest eigenvalue of each as a Krylov space sees it, once that has settled; else NaN."""
    number, size = grams.shape[:2]
    found, left = np.full(number, np.nan), np.arange(number)  # those that have not settled
    start = np.random.Generator(np.random.Philox(size)).standard_normal((1, size))
    v = np.repeat(start / np.sqrt(np.vecdot(start, start)), number, axis=0)
    before, β = np.zeros_like(v), np.zeros((number, 1))
    diagonal, beside = np.zeros((2, number, _STEPS[-1]))
    for step in range(1, _STEPS[-1] + 1):
        w = np.matmul(grams, v[:, :, None])[:, :, 0] - β * before
        diagonal[:, step - 1] = np.vecdot(v, w)
        w -= diagonal[:, step - 1, None] * v
        β = np.sqrt(np.vecdot(w, w))[:, None]
        goes_on = β[:, 0] > _ROOM * np.abs(diagonal[:, 0])  # else the space is all that there is to see from this start
        if step in _STEPS:
            now, then = (_tops(diagonal[:, :k], beside[:, : k - 1]) for k in (step, step - _BACK))
            settled = goes_on & (now - then <= _ROOM * now)
            found[left[settled]] = now[settled]
            goes_on &= ~settled
        beside[:, step - 1] = β[:, 0]
        if not goes_on.all():
            grams, diagonal, beside, left = (x[goes_on] for x in (grams, diagonal, beside, left))
            v, w, β = (x[goes_on] for x in (v, w, β))
            if not len(left):
                break
        before, v = v, w / β
    return found


def _tops(diagonal: Matrix, beside: Matrix) -> Matrix:
    """The largest eigenvalues of tridiagonal matrices, from their diagonals and what is beside these."""
    k = diagonal.shape[1]
    T = np.zeros((len(diagonal), k, k))
    T[:, range(k), range(k)] = diagonal
    T[:, range(1, k), range(k - 1)] = beside
    found: Matrix = np.linalg.eigvalsh(T)[:, -1]
    return found
