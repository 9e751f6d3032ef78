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

import numpy as np
import torch
from torch import Tensor

from pgcheck.engines.coefficients import cells_of, coefficients_of, step_sums
from pgcheck.engines.enumeration import Batches, arrangements, count_multisets, unrank_multisets
from pgcheck.engines.lumped import Lumps, own_coefficients
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
    cells, T = table.contexts * table.actions, table.paths.steps
    of_rollout = torch.zeros(len(table), T, *([table.actions] if logits else []), dtype=torch.float64)
    square = torch.zeros((), dtype=torch.float64)
    place = table.logit_cells if logits else table.cell
    done = 0
    for s in lumps.starts:
        C, G = len(s.members), lumps.size
        total = count_multisets(C, G)
        block = max(1, _BLOCK_ELEMENTS // max(len(s.rollouts) * G * T * (table.actions if logits else 1), cells))
        mass = [table.behavior_probability[torch.from_numpy(m)] for m in s.members]
        law = np.array([float(q.sum()) for q in mass])
        for low in range(0, total, block):
            rows = unrank_multisets(np.arange(low, min(low + block, total)), C, G)
            chance = torch.from_numpy(s.probability * arrangements(rows) * law[rows].prod(1))
            expected = torch.zeros(len(rows), cells, dtype=torch.float64)
            for k, members in enumerate(s.members):
                count = (rows == k).sum(1)
                has = count > 0
                if not has.any():
                    continue
                c = own_coefficients(estimator, table, s, rows[has], k, logits)  # [m, n, T(, A)]
                own = torch.from_numpy(members)
                inside = mass[k] / mass[k].sum()
                times = torch.from_numpy(count[has].astype(float))
                at = torch.from_numpy(np.flatnonzero(has))
                weighted = c * inside.reshape(1, -1, *[1] * (c.dim() - 2))
                of_rollout[own] += torch.tensordot(chance[at] * times, weighted, dims=1)
                mu = torch.zeros(len(at), cells, dtype=torch.float64)
                mu.scatter_add_(1, place[own].flatten().expand(len(at), -1), weighted.flatten(1))
                expected[at] += times.unsqueeze(-1) * mu
                cell = table.cell[own].expand(len(at), -1, -1).flatten(0, 1)
                sizes = squared_norms(c.flatten(0, 1), cell, table, logits=logits).reshape(len(at), -1)
                spread = sizes @ inside - into_gradient(mu, table, logits=logits).square().sum(-1)
                square += (chance[at] * times) @ spread
                done += len(at) * len(members)
            square += chance @ into_gradient(expected, table, logits=logits).square().sum(-1)
            if progress is not None:
                progress(f"{estimator.name}: class counts", done, lumps.evaluations)
    return _finished(of_rollout, square, torch.zeros_like(square), table, logits=logits, evaluated=lumps.evaluations)
