"""Exact mean and total variance where the covariance does not fit: K·A cells have (K·A)² of it, 300 GB for one token of a real
vocabulary and four prompts.

tr Cov ĝ = E‖ĝ‖² − ‖E ĝ‖² needs no matrix. A batch touches few cells, C = Σ_i c_i e_(k_i, a_i), and with ĝ = L C

    ‖ĝ‖² = Σ_ij c_i c_j ⟨L e_i, L e_j⟩      ⟨L e_i, L e_j⟩ = 1[k_i = k_j] (1[a_i = a_j] − π_i − π_j + ‖π(·|k_i)‖²)

The mean needs only the expected coefficient of each rollout. With class counts (`pgcheck.engines.lumped`) the law of total
variance is summed as it stands there, traces in place of matrices.

Guarantee: the mean and tr Cov of `pgcheck.engines.exact` and `lumped`, to rounding; what does not fit is refused
before it is begun.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from pgcheck.engines.coefficients import cells_of, coefficients_of, step_sums
from pgcheck.engines.enumeration import Batches
from pgcheck.engines.lumped import Lumps, own_rows
from pgcheck.engines.moments import Progress, Sums
from pgcheck.errors import BudgetError
from pgcheck.estimators.base import Estimator
from pgcheck.memory import free_memory, in_bytes
from pgcheck.trajectories import Trajectories

COVARIANCE_CELLS = 2048  # K·A: a covariance of 32 MiB; above it only the trace is kept, unless it is asked for
_BLOCK_ELEMENTS = 2_000_000


def keeps_covariance(table: Trajectories, estimators: Sequence[Estimator], asked: bool | None) -> bool:
    """Whether the covariance is kept; by default, where it is small.

    Raises:
        BudgetError: it is asked for and does not fit, or what is kept without it does not.
    """
    cells = table.contexts * table.actions
    keep = cells <= COVARIANCE_CELLS if asked is None else asked
    per_rollout = table.paths.steps * max(table.actions if e.leaf == "logits" else 1 for e in estimators)
    need = 8 * len(estimators) * (len(table) * per_rollout + (3 * cells**2 if keep else 2 * cells))
    if need <= (free := free_memory()):
        return keep
    what = f"the covariance of {cells:,} logits ({table.contexts:,} contexts, {table.actions:,} actions)"
    mend = "leave covariance out: mean and total variance are exact without it; or take fewer contexts or actions."
    if not keep:
        what = f"the coefficients of {len(table):,} rollouts, {per_rollout:,} each"
        mend = "judge fewer estimators at once, or take fewer prompts or actions."
    raise BudgetError(
        f"{what} takes {in_bytes(need)} for {len(estimators)} estimator(s); {in_bytes(free)} are free. Most likely you can"
        f" {mend}"
    )


def into_gradient(x: Tensor, table: Trajectories, *, logits: bool) -> Tensor:
    """L x of `x` `[..., K·A]`: x[k,a] − π(a|k) Σ_b x[k,b]."""
    if logits:
        return x
    pi = torch.softmax(table.logits, -1)
    parts = x.unflatten(-1, pi.shape)
    return (parts - pi * parts.sum(-1, keepdim=True)).flatten(-2)


def squared_norms(c: Tensor, cell: Tensor, table: Trajectories, *, logits: bool) -> Tensor:
    """‖ĝ‖² `[M]` of coefficients `[M, n]` (or `[M, n, A]`) at the cells `[M, n]` (of an action, or the first of all)."""
    context = torch.div(cell, table.actions, rounding_mode="floor")
    same = context.unsqueeze(-1) == context.unsqueeze(-2)  # [M, n, n]
    if logits:
        return (same * (c @ c.transpose(-1, -2))).sum((-2, -1))
    pi = torch.softmax(table.logits, -1)
    p, size = pi.reshape(-1)[cell], pi.square().sum(-1)[context]
    between = (cell.unsqueeze(-1) == cell.unsqueeze(-2)).to(p.dtype) - p.unsqueeze(-1) - p.unsqueeze(-2)
    inner = same * (between + size.unsqueeze(-1))
    return torch.einsum("mi,mij,mj->m", c, inner, c)


def _finished(
    of_rollout: Tensor, square: Tensor, between: Tensor, table: Trajectories, *, logits: bool, evaluated: int
) -> Sums:
    by_step = into_gradient(step_sums(of_rollout, table), table, logits=logits)
    return Sums(by_step.sum(0), square, between, evaluated, by_step)


def accumulate_traces(
    estimators: Sequence[Estimator],
    table: Trajectories,
    batches: Batches,
    *,
    by_start: bool = False,
    name: str = "",
    progress: Progress | None = None,
) -> list[Sums]:
    """As `pgcheck.engines.exact.accumulate`, with traces for `second` and `between`."""
    logits = estimators[0].leaf == "logits"
    A = table.actions if logits else 1
    of_rollout = [
        torch.zeros(len(table), table.paths.steps, *([A] if logits else []), dtype=torch.float64) for _ in estimators
    ]
    square = [torch.zeros((), dtype=torch.float64) for _ in estimators]
    positions = len(batches.labels) * table.paths.steps
    done, began = 0, time.monotonic()
    for index, weight in batches.blocks(max(1, _BLOCK_ELEMENTS // (positions * max(positions, A)))):
        batch = table.batch(index, batches.labels, logits=logits)
        cell = cells_of(table, index, logits=False)
        for j, e in enumerate(estimators):
            c = coefficients_of(e, batch).to(torch.float64)
            square[j] += weight @ squared_norms(c.flatten(1, 2), cell, table, logits=logits)
            weighted = c * weight.reshape(-1, *[1] * (c.dim() - 1))
            of_rollout[j].index_add_(0, index.flatten(), weighted.flatten(0, 1))
        done += len(index)
        if progress is not None and time.monotonic() - began > 2.0:
            progress(name, done, batches.count)
    out = []
    for x, second in zip(of_rollout, square, strict=True):
        between = _between(x, table, logits=logits) if by_start else torch.zeros_like(second)
        out.append(_finished(x, second, between, table, logits=logits, evaluated=batches.count))
    return out


def _between(of_rollout: Tensor, table: Trajectories, *, logits: bool) -> Tensor:
    """tr Cov_s(E[x | s])."""
    paths = table.paths
    total = of_rollout.new_zeros(table.contexts * table.actions)
    square = of_rollout.new_zeros(())
    for s, q in enumerate(paths.start_probability.tolist()):
        if q > 0:
            own = of_rollout * (paths.start == s).reshape(-1, *[1] * (of_rollout.dim() - 1))
            x = into_gradient(step_sums(own, table).sum(0), table, logits=logits)
            square += x.square().sum() / q
            total += x
    return square - total.square().sum()


def lumped_traces(estimator: Estimator, table: Trajectories, lumps: Lumps, progress: Progress | None = None) -> Sums:
    """As `pgcheck.engines.lumped.lumped_sums`, with the trace for `second`."""
    logits = estimator.leaf == "logits"
    cells = table.contexts * table.actions
    place = table.logit_cells if logits else table.cell
    of_rollout = torch.zeros(len(table), *place.shape[1:], dtype=torch.float64)
    square = torch.zeros((), dtype=torch.float64)
    for own in own_rows(estimator, table, lumps, numbers=cells, progress=progress):
        c, weight = own.coefficients, own.weight
        of_rollout.index_add_(0, own.rollout, c * weight.reshape(-1, *[1] * (c.dim() - 1)))
        mu = torch.zeros(len(own.vector) * cells, dtype=torch.float64)
        where = place[own.rollout].flatten(1) + own.pair.unsqueeze(-1) * cells
        mu.index_add_(0, where.flatten(), (c.flatten(1) * own.inside.unsqueeze(-1)).flatten())
        means = mu.unflatten(0, (-1, cells))
        expected = into_gradient(own.over_vectors(means), table, logits=logits)
        sizes = squared_norms(c, table.cell[own.rollout], table, logits=logits)
        square += own.chance @ expected.square().sum(-1) + weight @ sizes
        square -= own.pair_weight @ into_gradient(means, table, logits=logits).square().sum(-1)
    return _finished(of_rollout, square, torch.zeros_like(square), table, logits=logits, evaluated=lumps.evaluations)
