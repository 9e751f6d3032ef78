"""From a batch to C[k,a]: coefficients, checked, and scattered to contexts and actions.

    C[k,a] = Σ_(i,t) c[i,t] 1[k_it = k, a_it = a]        ĝ = L C,  ĝ[k,a] = C[k,a] − π(a|k) Σ_b C[k,b]

Guarantee: coefficients that leave this module are of the right shape, finite, and 0 wherever the policy did not act.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pgcheck.batch import Batch, gathered_rows
from pgcheck.errors import EstimatorError, NotFiniteError
from pgcheck.estimators.base import Estimator
from pgcheck.trajectories import Trajectories


def coefficients_of(estimator: Estimator, batch: Batch) -> Tensor:
    """c of a batch, with everything that is no policy position set to 0.

    Raises:
        EstimatorError: not a tensor, wrong shape.
        NotFiniteError: NaN or infinity, showing the first such batch.
    """
    c = estimator.coefficients(batch)
    if not isinstance(c, Tensor):
        raise EstimatorError(f"estimator '{estimator.name}' returned {type(c).__name__}, not a torch tensor.")
    expected = tuple(batch.reward.shape) + ((batch.logits.shape[-1],) if estimator.leaf == "logits" else ())
    if tuple(c.shape) != expected:
        raise EstimatorError(
            f"estimator '{estimator.name}' returned coefficients of shape {list(c.shape)}, expected {list(expected)}, one for"
            " each position of the batch."
        )
    mask = batch.mask if estimator.leaf == "logp" else batch.mask.unsqueeze(-1)
    if bool(torch.isfinite(c.sum())):  # then every term is
        return c * mask
    c = torch.where(mask > 0, c, 0.0)
    if not bool(torch.isfinite(c).all()):
        raise NotFiniteError(_not_finite(estimator, batch, c))
    return c


def _not_finite(estimator: Estimator, batch: Batch, c: Tensor) -> str:
    if c.dim() == batch.reward.dim() and c.dim() == 2:
        rewards, first = batch.reward, c
    else:
        bad = (~torch.isfinite(c)).flatten(1).any(-1).nonzero()[0, 0]
        rewards, first = batch.reward[bad], c[bad]
    value = float(first[~torch.isfinite(first)][0])
    return (
        f"estimator '{estimator.name}' returns {value} on the batch with rewards {rewards.tolist()}. Most likely a division by"
        " a standard deviation, a length or a group size that is zero there; add an ε or give such rows coefficient 0."
    )


def cells_of(table: Trajectories, index: Tensor, *, logits: bool) -> Tensor:
    """Where each coefficient of the batches `index` `[M, B]` goes, among the K·A cells: `[M, B·T]` (or `[M, B·T·A]`)."""
    return gathered_rows(table.logit_cells if logits else table.cell, index).flatten(1)


def scattered(c: Tensor, cell: Tensor, cells: int) -> Tensor:
    """C of every batch, `[M, cells]`, from coefficients `[M, …]` and their places `[M, …]`."""
    return torch.zeros(len(c), cells, dtype=torch.float64).scatter_add_(1, cell, c.to(torch.float64).flatten(1))


def step_sums(expected: Tensor, table: Trajectories) -> Tensor:
    """C of each position, `[T, K·A]`, from `expected` `[N, T]` (or `[N, T, A]`): E Σ_i c[i,t] 1[row i is rollout n]."""
    place = table.logit_cells if expected.dim() == 3 else table.cell
    out = torch.zeros(table.paths.steps, table.contexts * table.actions, dtype=torch.float64)
    return out.scatter_add_(1, place.transpose(0, 1).flatten(1), expected.transpose(0, 1).flatten(1))


def gradient_map(table: Trajectories, *, logits: bool) -> Tensor:
    """L with ĝ = L C, `[K·A, K·A]`; the identity for coefficients that are weights on logits already."""
    pi = torch.softmax(table.logits, -1)
    K, A = pi.shape
    if logits:
        return torch.eye(K * A, dtype=torch.float64)
    blocks = torch.eye(A, dtype=pi.dtype) - pi.unsqueeze(-1).expand(K, A, A)
    return torch.block_diag(*blocks)
