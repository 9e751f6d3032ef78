"""Exact mean and covariance of ĝ, by enumerating what one coefficient may look at.

* `couples="trajectory"`: every rollout (N). ĝ is the mean over rows; rows of a group share their start, so
  Cov ĝ = B⁻² Σ_g (G_g E_s[Cov(x|s)] + G_g² Cov_s(E[x|s])).
* `couples="group"`: every group outcome. ĝ = Σ_g (G_g / B) ĝ_g over independent groups.
* `couples="batch"`: every multiset of groups of multisets of rollouts (`pgcheck.engines.enumeration`).

One block at a time: index rows → gather → coefficients of every estimator on the same batches → scatter to contexts and
actions, C[k,a] = Σ_(i,t) c[i,t] 1[k_it = k, a_it = a] → moments of C by one matrix product. ĝ = L C is linear with
L = I − π(·|k)1ᵀ in each context, so E ĝ = L E C and Cov ĝ = L Cov C Lᵀ at the end, once.

Guarantee: no sampling, no seed; float64 with compensated block sums, so that a true zero comes out near 1e-15. What an
estimator declares (`couples`, no dependence on the order of rows) is verified by substitution before it is relied on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pgcheck.batch import Batch
from pgcheck.engines.enumeration import Batches
from pgcheck.engines.moments import Moments, covariance_from
from pgcheck.engines.purity import find_impurity
from pgcheck.errors import BudgetError, EstimatorError, NotFiniteError
from pgcheck.estimators.base import Couples, Estimator
from pgcheck.estimators.from_loss import LossCoefficients
from pgcheck.problem import Problem
from pgcheck.trajectories import SideTable, Trajectories

DEFAULT_BUDGET = 5_000_000
LOOP_COST = 300  # one batch in a Python loop costs about this many vectorised ones
_BLOCK_ELEMENTS = 120_000  # positions of a block: what stays in cache
_PROBES = 64  # random batches on which declarations are verified

Progress = Callable[[str, int, int], None]
# (what, batches done, batches in all): called between blocks of anything that has run for two seconds


@dataclass(frozen=True)
class _Plan:
    """Estimators that are evaluated on the same blocks."""

    couples: Couples
    needs: tuple[SideTable, ...]
    ordered: bool
    size: int  # rows of the group, for couples="group"
    logits: bool


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
    c = torch.where(mask > 0, c, torch.zeros_like(c))
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


def exact_moments(
    estimators: Sequence[Estimator],
    problem: Problem,
    *,
    budget: int = DEFAULT_BUDGET,
    progress: Progress | None = None,
) -> list[Moments]:
    """E ĝ and Cov ĝ of every estimator on `problem`, all of them on the same batches.

    Args:
        budget: most batches evaluated for one estimator (a loss that only runs in a loop counts 300 for each).
        progress: called between blocks.

    Raises:
        BudgetError: naming the number of batches, the budget and the nearest sampling plan that fits.
        EstimatorError: a declaration that does not hold, or coefficients that are not finite.
    """
    found: dict[int, Moments] = {}
    plans: dict[_Plan, list[int]] = {}
    for i, e in enumerate(estimators):
        table = problem.trajectories_with(e.needs)
        _, probe = _probe(problem, table, e)
        impurity = find_impurity(e, probe)
        if impurity is not None:
            raise EstimatorError(f"estimator '{e.name}' {impurity.what}: {impurity.mend}.")
        _verify_couples(e, problem, table)
        ordered = e.couples != "trajectory" and not _row_order_is_free(e, problem, table)
        sizes = sorted(set(problem.sizes)) if e.couples == "group" else [0]
        for size in sizes:
            plans.setdefault(_Plan(e.couples, e.needs, ordered, size, e.leaf == "logits"), []).append(i)
    parts: dict[int, dict[int, tuple[Tensor, Tensor, Tensor, int]]] = {}
    for plan, members in plans.items():
        table = problem.trajectories_with(plan.needs)
        batches = Batches(table, _sizes_of(plan, problem), plan.ordered)
        for i in members:
            _refuse_if_too_large(estimators[i], problem, table, batches, plan, budget)
        sums = _accumulate([estimators[i] for i in members], table, batches, plan, problem, progress)
        for i, (mean, second, between) in zip(members, sums, strict=True):
            parts.setdefault(i, {})[plan.size] = (mean, second, between, batches.count)
    for i, e in enumerate(estimators):
        found[i] = _assemble(e, problem, parts[i])
    return [found[i] for i in range(len(estimators))]


def _sizes_of(plan: _Plan, problem: Problem) -> tuple[int, ...]:
    if plan.couples == "trajectory":
        return (1,)
    return (plan.size,) if plan.couples == "group" else problem.sizes


def _accumulate(
    estimators: Sequence[Estimator],
    table: Trajectories,
    batches: Batches,
    plan: _Plan,
    problem: Problem,
    progress: Progress | None,
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(E x, E x xᵀ, Cov_s(E[x|s])) of one evaluation x `[K·A]`, for each estimator."""
    K, A = table.contexts, table.actions
    cells = K * A
    starts = len(table.paths.start_probability)
    first = [torch.zeros(starts, cells, dtype=torch.float64) for _ in estimators]
    lost = [torch.zeros_like(f) for f in first]
    second = [torch.zeros(cells, cells, dtype=torch.float64) for _ in estimators]
    B, T = sum(batches.sizes), table.paths.steps
    block = max(64, _BLOCK_ELEMENTS // (B * T))
    done, began = 0, time.monotonic()
    # only a plan of single rollouts asks for the law given the start; elsewhere one row holds them all
    by_start = plan.couples == "trajectory"
    for index, weight in batches.blocks(block):
        M = len(index)
        batch = table.batch(index, batches.labels, logits=plan.logits)
        cell = batch.context.clamp(min=0) * A + batch.action.clamp(min=0)  # [M, B, T]
        if plan.logits:
            cell = (batch.context.clamp(min=0) * A).unsqueeze(-1) + torch.arange(A)
        cell = cell.flatten(1)
        start = table.paths.start[index[:, 0]] if by_start else None
        for j, e in enumerate(estimators):
            c = coefficients_of(e, batch)
            x = torch.zeros(M, cells, dtype=torch.float64).scatter_add_(1, cell, c.to(torch.float64).flatten(1))
            wx = x * weight.unsqueeze(-1)
            block_sum = torch.zeros_like(first[j])
            if start is None:
                block_sum[0] = wx.sum(0)
            else:
                block_sum.index_add_(0, start, wx)
            _compensated_add(first[j], lost[j], block_sum)
            second[j] += x.T @ wx
        done += M
        if progress is not None and time.monotonic() - began > 2.0:
            progress(f"{problem.name}: {', '.join(e.name for e in estimators[:3])}", done, batches.count)
    to_gradient = torch.eye(cells, dtype=torch.float64) if plan.logits else _centering(table)
    out = []
    for j in range(len(estimators)):
        given = (first[j] + lost[j]) @ to_gradient.T  # [starts, K·A]: P(s) E[x|s]
        mean = given.sum(0)
        q = table.paths.start_probability
        between = torch.zeros(cells, cells, dtype=torch.float64)
        if by_start:
            some = q > 0
            between = (given[some] / q[some].unsqueeze(-1)).T @ given[some] - torch.outer(mean, mean)
        out.append((mean, to_gradient @ second[j] @ to_gradient.T, between))
    return out


def _compensated_add(total: Tensor, lost: Tensor, x: Tensor) -> None:
    """Neumaier's sum: `lost` collects what `total` rounds away."""
    new = total + x
    lost += torch.where(total.abs() >= x.abs(), (total - new) + x, (x - new) + total)
    total.copy_(new)


def _centering(table: Trajectories) -> Tensor:
    """L with ĝ = L C: ĝ[k,a] = C[k,a] − π(a|k) Σ_b C[k,b], `[K·A, K·A]`."""
    pi = torch.softmax(table.logits, -1)
    K, A = pi.shape
    blocks = torch.eye(A, dtype=pi.dtype) - pi.unsqueeze(-1).expand(K, A, A)
    return torch.block_diag(*blocks)


def _assemble(estimator: Estimator, problem: Problem, parts: dict[int, tuple[Tensor, Tensor, Tensor, int]]) -> Moments:
    K, A = problem.trajectories.contexts, problem.trajectories.actions
    B, sizes = problem.rows, problem.sizes
    evaluated = sum(part[3] for part in parts.values())
    if estimator.couples == "trajectory":
        mean, second, between = parts[0][:3]
        within = covariance_from(second, mean) - between
        cov = within / B + between * sum(g * g for g in sizes) / B**2
    elif estimator.couples == "group":
        mean = torch.stack([parts[g][0] * (g / B) for g in sizes]).sum(0)
        cov = torch.stack([covariance_from(parts[g][1], parts[g][0]) * (g / B) ** 2 for g in sizes]).sum(0)
    else:
        mean, second = parts[0][:2]
        cov = covariance_from(second, mean)
    fn = estimator.coefficients
    lane = fn.lane or "loop" if isinstance(fn, LossCoefficients) else "coefficients"
    return Moments(mean.reshape(K, A), (cov + cov.T) / 2, None, evaluated, lane, problem.policy)


# -- what is declared is verified


def _probe(problem: Problem, table: Trajectories, estimator: Estimator, number: int = _PROBES) -> tuple[Tensor, Batch]:
    loop = isinstance(estimator.coefficients, LossCoefficients) and estimator.coefficients.lane == "loop"
    index = Batches(table, problem.sizes).random(number // 4 if loop else number, seed=0)
    return index, table.batch(index, problem.group_labels, logits=estimator.leaf == "logits")


def _close(a: Tensor, b: Tensor) -> bool:
    return bool(torch.allclose(a, b, rtol=1e-9, atol=1e-12 * max(1.0, float(b.abs().max()))))


def _verify_couples(estimator: Estimator, problem: Problem, table: Trajectories) -> None:
    """Coefficients computed from what `couples` allows, put together, are those of the whole batch."""
    if estimator.couples == "batch" or (estimator.couples == "group" and problem.groups == 1):
        return
    _, batch = _probe(problem, table, estimator)
    whole = coefficients_of(estimator, batch)
    sizes = problem.sizes if estimator.couples == "group" else (1,) * problem.rows
    parts, low = [], 0
    for size in sizes:
        part = batch.map(lambda x, low=low, size=size: x[:, low : low + size])  # type: ignore[misc]
        part = replace(part, group=part.group - part.group[:, :1])  # enumerated alone, a group is number 0
        parts.append(coefficients_of(estimator, part) * (size / problem.rows))
        low += size
    if not _close(torch.cat(parts, 1), whole):
        what = "other groups" if estimator.couples == "group" else "other rows"
        raise EstimatorError(
            f"estimator '{estimator.name}' is declared couples='{estimator.couples}', but its coefficients change with"
            f" {what} of the batch (beyond the 1/B of the batch average); declare couples='batch'."
        )


def _row_order_is_free(estimator: Estimator, problem: Problem, table: Trajectories) -> bool:
    """ĝ does not move when rows are permuted inside their groups and groups of equal size among each other."""
    index, batch = _probe(problem, table, estimator)
    labels, here = problem.group_labels, coefficients_of(estimator, batch)
    for order in row_orders(problem):
        moved = table.batch(index[:, order], labels, logits=estimator.leaf == "logits")
        if not _close(coefficients_of(estimator, moved), here[:, order]):
            return False
    return True


def row_orders(problem: Problem) -> list[Tensor]:
    """Row orders `[B]` that together generate every exchange of rows in a group, and of groups of one size.

    A transposition of the first two and a rotation generate all permutations; one permutation alone can miss an
    estimator that happens to be invariant under it (a roll, a pairing, a fixed row).
    """
    first = [0]
    for size in problem.sizes:
        first.append(first[-1] + size)
    blocks = [list(range(low, low + size)) for low, size in zip(first, problem.sizes, strict=False)]

    def generators(n: int) -> list[list[int]]:
        found = [[1, 0, *range(2, n)]] if n > 1 else []
        return found + ([[*range(1, n), 0]] if n > 2 else [])

    orders = []
    for size in sorted(set(problem.sizes)):
        same = [g for g, s in enumerate(problem.sizes) if s == size]
        for inside in generators(size):
            moved = list(blocks)
            moved[same[0]] = [blocks[same[0]][i] for i in inside]
            orders.append(moved)
        for among in generators(len(same)):
            moved = list(blocks)
            for g, h in zip(same, among, strict=True):
                moved[g] = blocks[same[h]]
            orders.append(moved)
    return [torch.tensor([i for block in order for i in block]) for order in orders]


# -- the budget


def _refuse_if_too_large(
    estimator: Estimator, problem: Problem, table: Trajectories, batches: Batches, plan: _Plan, budget: int
) -> None:
    fn = estimator.coefficients
    cost = LOOP_COST if isinstance(fn, LossCoefficients) and fn.lane == "loop" else 1
    if batches.count * cost <= budget:
        return
    why = f", at {LOOP_COST} each because the loss only runs in a loop" if cost > 1 else ""
    how = "ordered batches (the estimator depends on the order of its rows)" if plan.ordered else "batches"
    nearest = _nearest_that_fits(estimator, problem, table, plan, budget // cost)
    raise BudgetError(
        f"estimator '{estimator.name}' on '{problem.name}' needs {batches.count:,} {how}{why} ({len(table):,} rollouts,"
        f" groups={problem.groups}, group_size={problem.group_size}); the budget is {budget:,}. {nearest}"
    )


def _nearest_that_fits(estimator: Estimator, problem: Problem, table: Trajectories, plan: _Plan, budget: int) -> str:
    """The plan with the most rows, then the most groups, that fits."""
    largest = max(problem.sizes)
    fits = []
    for groups in range(problem.groups, 0, -1):
        for size in range(largest, 0, -1):
            sizes = (size,) if plan.couples == "group" else (size,) * groups
            n = Batches(table, sizes, plan.ordered).count
            if n <= budget and estimator.fits(problem.with_sampling(groups=groups, group_size=size)):
                fits.append((groups * size, groups, size, n))
                break
    if not fits:
        return "No smaller batch fits; raise the budget or shorten the horizon."
    _, groups, size, n = max(fits)
    return f"The nearest that fits: groups={groups}, group_size={size} ({n:,} batches); or pass a larger budget."
