"""Exact mean and covariance of ĝ, by enumerating what one coefficient may look at.

* `couples="trajectory"`: every rollout (N). ĝ is the mean over rows; rows of a group share their start, so
  Cov ĝ = B⁻² Σ_g (G_g E_s[Cov(x|s)] + G_g² Cov_s(E[x|s])).
* `couples="group"`: every group outcome. ĝ = Σ_g (G_g / B) ĝ_g over independent groups.
* `couples="batch"`: every multiset of groups of multisets of rollouts (`pgcheck.engines.enumeration`).
* one group of an estimator that declares what it `reads` of other rows: class counts, where they are fewer
  (`pgcheck.engines.lumped`).

One block at a time: index rows → gather → coefficients of every estimator on the same batches → scatter to contexts and
actions, C[k,a] = Σ_(i,t) c[i,t] 1[k_it = k, a_it = a] → moments of C by one matrix product. ĝ = L C is linear with
L = I − π(·|k)1ᵀ in each context, so E ĝ = L E C and Cov ĝ = L Cov C Lᵀ at the end, once. Coefficients that are one number
a row skip the positions (`pgcheck.engines.scores`).

Guarantee: no sampling, no seed; float64 with compensated block sums, so that a true zero comes out near 1e-15. What an
estimator declares (`couples`, no dependence on the order of rows) is verified by substitution before it is relied on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from pgcheck.batch import Batch
from pgcheck.engines.coefficients import (
    cells_of,
    coefficients_of,
    factored,
    factored_coefficients,
    gradient_map,
    per_row,
    scattered,
    step_sums,
)
from pgcheck.engines.declarations import row_order_is_free, verify_couples, verify_purity, verify_reads
from pgcheck.engines.enumeration import Batches
from pgcheck.engines.lumped import Lumps, lump, lumped_sums
from pgcheck.engines.moments import Moments, Progress, Sums, covariance_from
from pgcheck.engines.scores import Draws, RowSums, Scores, compensated_add
from pgcheck.engines.threads import one_thread
from pgcheck.engines.traces import accumulate_traces, into_gradient, keeps_covariance, lumped_traces
from pgcheck.errors import BudgetError, NotFiniteError, UsageError, names_problem
from pgcheck.estimators.base import Couples, Estimator
from pgcheck.estimators.from_loss import LossCoefficients, is_looped
from pgcheck.memory import keep_freed_memory
from pgcheck.problem import Problem
from pgcheck.trajectories import SideTable, Trajectories, is_count

DEFAULT_BUDGET = 5_000_000
LOOP_COST = 300  # one batch in a Python loop costs about this many vectorised ones
_BLOCK_ELEMENTS = 120_000  # positions of a block: what stays in cache
_BLOCK_ROWS = 2**20  # rows of a block of which no position is looked at
_LUMP_COST = 4  # one evaluation given class counts takes about as long as so many batches
_PAIR_COST = 100  # adding one product to its place costs about this many multiplications of a matrix product


@dataclass(frozen=True)
class _Plan:
    """Estimators that are evaluated on the same blocks."""

    couples: Couples
    needs: tuple[SideTable, ...]
    ordered: bool
    size: int  # rows of the group, for couples="group"
    logits: bool


@one_thread()
@names_problem
def exact_moments(
    estimators: Sequence[Estimator],
    problem: Problem,
    *,
    budget: int = DEFAULT_BUDGET,
    covariance: bool | None = None,
    functions: bool = False,
    progress: Progress | None = None,
) -> list[Moments]:
    """E ĝ and Cov ĝ of every estimator on `problem`, all of them on the same batches.

    Args:
        budget: most batches evaluated for one estimator (a loss that only runs in a loop counts 300 for each).
        covariance: whether Cov ĝ `[K·A, K·A]` is kept, or its trace alone. Default: where K·A is at most 2048.
        functions: the estimators are known to be functions of their batch; else that is tried first.
        progress: called between blocks.

    Raises:
        BudgetError: naming the number of batches, the budget and the nearest sampling plan that fits; or the memory it takes.
        EstimatorError: a declaration that does not hold, or coefficients that are not finite.
    """
    if not is_count(budget):
        raise UsageError(f"budget: {budget!r}; it must be an integer of at least 1.")
    keep = not estimators or keeps_covariance(problem.trajectories, estimators, covariance)
    plans: dict[_Plan, list[int]] = {}
    parts: dict[int, dict[int, Sums]] = {}
    for i, e in enumerate(estimators):
        table = problem.trajectories_with(e.needs)
        if not functions:
            verify_purity(e, problem, table)
        if isinstance(e.coefficients, LossCoefficients):
            e.coefficients.remember()
        verify_couples(e, problem, table)
        ordered = e.couples != "trajectory" and not row_order_is_free(e, problem, table)
        sizes = sorted(set(problem.sizes)) if e.couples == "group" else [0]
        for size in sizes:
            plan = _Plan(e.couples, e.needs, ordered, size, e.leaf == "logits")
            lumps = None if ordered else lump(e, table, _sizes_of(plan, problem))
            if lumps is not None:
                verify_reads(e, table, lumps, problem.name)
            if lumps is None or not _pays(lumps, e, Batches(table, _sizes_of(plan, problem)).count, budget):
                plans.setdefault(plan, []).append(i)
                continue
            _refuse_if_too_large(e, problem, table, lumps.evaluations, plan, budget)
            parts.setdefault(i, {})[size] = (lumped_sums if keep else lumped_traces)(e, table, lumps, progress)
    for plan, members in plans.items():
        table = problem.trajectories_with(plan.needs)
        batches = Batches(table, _sizes_of(plan, problem), plan.ordered)
        for i in members:
            _refuse_if_too_large(estimators[i], problem, table, batches.count, plan, budget)
        asked = [estimators[i] for i in members]
        name = f"{problem.name}: {', '.join(e.name for e in asked[:3])}"
        # only a plan of single rollouts asks for the law given the start
        by_start = plan.couples == "trajectory"
        sums = (accumulate if keep else accumulate_traces)(
            asked, table, batches, by_start=by_start, name=name, progress=progress
        )
        for i, part in zip(members, sums, strict=True):
            parts.setdefault(i, {})[plan.size] = part
    return [_assemble(e, problem, parts[i]) for i, e in enumerate(estimators)]


def _sizes_of(plan: _Plan, problem: Problem) -> tuple[int, ...]:
    if plan.couples == "trajectory":
        return (1,)
    return (plan.size,) if plan.couples == "group" else problem.sizes


class Blocks(Protocol):
    """What is summed over: batches of rollouts with their probabilities (`pgcheck.engines.enumeration.Batches`)."""

    @property
    def labels(self) -> Tensor:
        """The group of each row, `[B]`."""

    @property
    def count(self) -> int:
        """Number of batches."""

    def blocks(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Blocks of (rollouts `[M, B]`, probability `[M]`), M ≤ `size`."""


def accumulate(
    estimators: Sequence[Estimator],
    table: Trajectories,
    batches: Blocks,
    *,
    by_start: bool = False,
    name: str = "",
    progress: Progress | None = None,
) -> list[Sums]:
    """E x and E x xᵀ of each estimator, x = ĝ of one of `batches`; all estimators (of one leaf) on the same blocks.

    `by_start`: also Cov_s(E[x | s]), for batches of one row.
    """
    logits, rows = estimators[0].leaf == "logits", len(batches.labels)
    scores = None if logits else Scores.of(table)
    of_rows = [j for j, e in enumerate(estimators) if scores is not None and _one_a_row(e, table, batches.labels)]
    small = large = max(64, _BLOCK_ELEMENTS // (rows * table.paths.steps))
    by_row: dict[int, RowSums] = {}
    if scores is not None and of_rows:
        keep_freed_memory()
        large, room = max(64, _BLOCK_ROWS // rows), scores.room(batches.count)
        by_row = {j: RowSums(scores, rows, batches.count, room) for j in of_rows}
    by_position = {
        j: _PositionSums(table, logits=logits, by_start=by_start) for j in range(len(estimators)) if j not in by_row
    }
    done, began = 0, time.monotonic()
    for index, weight in batches.blocks(large):
        left = [j for j in range(len(estimators)) if j not in by_row]  # position by position
        if by_row:
            batch, draws = table.batch(index, batches.labels), Draws(index, weight)
            left += [j for j, sums in by_row.items() if not _added(sums, estimators[j], batch, draws)]
        for part, q in zip(index.split(small), weight.split(small), strict=True) if left else ():
            batch, here = table.batch(part, batches.labels, logits=logits), _Block(table, part, q.unsqueeze(-1), logits)
            for j in left:
                c = coefficients_of(estimators[j], batch).to(torch.float64)
                if j not in by_position:
                    by_position[j] = _PositionSums(table, logits=logits, by_start=by_start)
                by_position[j].add(c, here)
        done += len(index)
        if progress is not None and time.monotonic() - began > 2.0:
            progress(name, done, batches.count)
    return [
        _finished(table, batches.count, by_position.get(j), by_row.get(j), logits=logits, by_start=by_start)
        for j in range(len(estimators))
    ]


def _added(sums: RowSums, estimator: Estimator, batch: Batch, draws: Draws) -> bool:
    """Whether some batches could be added row by row: not where a coefficient depends on the position, or is not finite."""
    number, c = factored_coefficients(estimator, batch)
    w = per_row(c)
    return w is not None and sums.add(w.to(torch.float64), draws, number=number)


def _one_a_row(estimator: Estimator, table: Trajectories, labels: Tensor) -> bool:
    """Whether every row has one coefficient, as one batch tells."""
    one = table.batch(torch.zeros(1, len(labels), dtype=torch.int64), labels)
    _, c = factored(estimator, one)
    return isinstance(c, Tensor) and c.dim() == 3 and per_row(c) is not None


@dataclass(frozen=True)
class _Block:
    """Some batches, and what every estimator needs of them."""

    table: Trajectories
    index: Tensor  # [M, B]
    weight: Tensor  # [M, 1] probability
    logits: bool

    @cached_property
    def cell(self) -> Tensor:
        """Of each coefficient, `[M, n]`."""
        return cells_of(self.table, self.index, logits=self.logits)

    @cached_property
    def pairs(self) -> Tensor:
        """Of each two coefficients of a batch, the cell among (K·A)²."""
        cells = self.table.contexts * self.table.actions
        return (self.cell.unsqueeze(2) * cells + self.cell.unsqueeze(1)).flatten()

    @cached_property
    def start(self) -> Tensor:
        """Of the first row, `[M]`."""
        return self.table.paths.start[self.index[:, 0]]


class _PositionSums:
    """What is summed of one estimator whose coefficients differ from position to position."""

    def __init__(self, table: Trajectories, *, logits: bool, by_start: bool) -> None:
        self.table, self.logits, self.by_start = table, logits, by_start
        cells, starts = table.contexts * table.actions, len(table.paths.start_probability) if by_start else 1
        per_position = (table.actions,) if logits else ()
        self.first = torch.zeros(starts, cells, dtype=torch.float64)
        self.lost = torch.zeros_like(self.first)
        self.second = torch.zeros(cells, cells, dtype=torch.float64)
        self.of_rollout = torch.zeros(len(table), table.paths.steps, *per_position, dtype=torch.float64)

    def add(self, c: Tensor, here: _Block) -> None:
        """Batches with coefficients `[M, B, T]` (or `[M, B, T, A]`)."""
        cells = len(self.second)
        x = scattered(c, here.cell, cells)
        wx = x * here.weight
        self.add_first(wx.sum(0, keepdim=True) if not self.by_start else wx, here.start if self.by_start else None)
        flat = c.flatten(1)
        weighted = flat * here.weight
        if not self.logits and _PAIR_COST * here.cell.shape[1] ** 2 < cells**2:
            # x = Σ c e_cell, so that x xᵀ = Σ c c' e_cell e_cell'ᵀ
            products = flat.unsqueeze(2) * weighted.unsqueeze(1)
            self.second.view(-1).index_add_(0, here.pairs, products.flatten())
        else:
            self.second += x.T @ wx
        self.of_rollout.index_add_(0, here.index.flatten(), weighted.view(c.shape).flatten(0, 1))

    def add_first(self, x: Tensor, start: Tensor | None) -> None:
        of_start = x if start is None else torch.zeros_like(self.first).index_add_(0, start, x)
        compensated_add(self.first, self.lost, of_start)

    def sums(self) -> tuple[Tensor, Tensor, Tensor]:
        """E C given each start, times its probability, `[starts, K·A]`; E c of each rollout's positions; E ĝ ĝᵀ."""
        to_gradient = gradient_map(self.table, logits=self.logits)
        return self.first + self.lost, self.of_rollout, to_gradient @ self.second @ to_gradient.T


def _sums_of_rows(rows: RowSums, table: Trajectories, *, by_start: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The same of what was summed row by row."""
    cells, starts = table.contexts * table.actions, len(table.paths.start_probability) if by_start else 1
    spent = rows.mean_weights().unsqueeze(-1) * table.paths.mask  # [N, T]
    place = table.cell + (table.paths.start.unsqueeze(-1) * cells if by_start else 0)
    first = torch.zeros(starts * cells, dtype=torch.float64).index_add_(0, place.flatten(), spent.flatten())
    return first.view(starts, cells), spent, rows.second()


def _finished(
    table: Trajectories,
    evaluated: int,
    positions: _PositionSums | None,
    rows: RowSums | None,
    *,
    logits: bool,
    by_start: bool,
) -> Sums:
    parts = [] if positions is None else [positions.sums()]
    if rows is not None:
        parts.append(_sums_of_rows(rows, table, by_start=by_start))
    first, of_rollout, second = parts[0] if len(parts) == 1 else (a + b for a, b in zip(*parts, strict=True))
    given = into_gradient(first, table, logits=logits)  # [starts, K·A]: P(s) E[x|s]
    mean = given.sum(0)
    between = torch.zeros_like(second)
    if by_start:
        some = table.paths.start_probability > 0
        q = table.paths.start_probability[some].unsqueeze(-1)
        between = (given[some] / q).T @ given[some] - torch.outer(mean, mean)
    by_step = into_gradient(step_sums(of_rollout, table), table, logits=logits)
    return Sums(mean, second, between, evaluated, by_step)


def _assemble(estimator: Estimator, problem: Problem, parts: dict[int, Sums]) -> Moments:
    K, A = problem.trajectories.contexts, problem.trajectories.actions
    B, sizes = problem.rows, problem.sizes
    evaluated = sum(part.evaluated for part in parts.values())
    if estimator.couples == "trajectory":
        mean, between = parts[0].mean, parts[0].between
        within = covariance_from(parts[0].second, mean) - between
        cov = within / B + between * sum(g * g for g in sizes) / B**2
        by_step = parts[0].by_step
    elif estimator.couples == "group":
        mean = torch.stack([parts[g].mean * (g / B) for g in sizes]).sum(0)
        cov = torch.stack([covariance_from(parts[g].second, parts[g].mean) * (g / B) ** 2 for g in sizes]).sum(0)
        by_step = torch.stack([parts[g].by_step * (g / B) for g in sizes]).sum(0)
    else:
        mean, cov, by_step = parts[0].mean, covariance_from(parts[0].second, parts[0].mean), parts[0].by_step
    if not bool(torch.isfinite(mean).all() and torch.isfinite(cov).all()):
        raise NotFiniteError(
            f"estimator '{estimator.name}' has coefficients so large that their squares overflow in float64."
        )
    fn = estimator.coefficients
    lane = fn.lane or "loop" if isinstance(fn, LossCoefficients) else "coefficients"
    whole, trace = ((cov + cov.T) / 2, None) if cov.dim() else (None, float(cov))
    return Moments(mean.reshape(K, A), whole, None, evaluated, lane, problem.policy, by_step.reshape(-1, K, A), trace)


# -- the budget


def _cost(estimator: Estimator) -> int:
    """Of one batch, in vectorised ones."""
    return LOOP_COST if is_looped(estimator) else 1


def _pays(lumps: Lumps, estimator: Estimator, batches: int, budget: int) -> bool:
    """Whether class counts take less time than `batches` batches, or fit where these do not."""
    n = lumps.evaluations
    in_time = n * (_LUMP_COST if _cost(estimator) == 1 else 1)
    return batches > max(n, min(in_time, budget))


def _refuse_if_too_large(
    estimator: Estimator, problem: Problem, table: Trajectories, count: int, plan: _Plan, budget: int
) -> None:
    cost = _cost(estimator)
    if count * cost <= budget:
        return
    why = f", at {LOOP_COST} each because the loss only runs in a loop" if cost > 1 else ""
    how = "ordered batches (the estimator depends on the order of its rows)" if plan.ordered else "batches"
    nearest = _nearest_that_fits(estimator, problem, table, plan, budget // cost)
    raise BudgetError(
        f"estimator '{estimator.name}' on '{problem.name}' needs {count:,} {how}{why} ({len(table):,} rollouts,"
        f" groups={problem.groups}, group_size={problem.group_size}); the budget is {budget:,}. {nearest}"
    )


def _nearest_that_fits(estimator: Estimator, problem: Problem, table: Trajectories, plan: _Plan, budget: int) -> str:
    found = nearest_plan(
        problem, table, budget=budget, ordered=plan.ordered, one_group=plan.couples == "group", fits=estimator.fits
    )
    if found is None:
        return 'No smaller batch fits; raise the budget, shorten the horizon, or sample: engine="auto".'
    groups, size, n = found
    return (
        f"The nearest that fits: groups={groups}, group_size={size} ({n:,} batches); or pass a larger budget, or sample:"
        ' engine="auto".'
    )


def nearest_plan(
    problem: Problem,
    table: Trajectories,
    *,
    budget: int,
    ordered: bool,
    one_group: bool = False,
    fits: Callable[[Problem], bool] = lambda problem: True,
) -> tuple[int, int, int] | None:
    """(groups, group_size, batches) of the plan with the most rows, then the most groups, that fits the budget; `one_group`:
    groups are enumerated one at a time."""
    largest = max(problem.sizes)
    found = []
    for groups in range(problem.groups, 0, -1):
        for size in range(largest, 0, -1):
            n = Batches(table, (size,) if one_group else (size,) * groups, ordered).count
            if n <= budget and fits(problem.with_sampling(groups=groups, group_size=size)):
                found.append((groups * size, groups, size, n))
                break
    return max(found)[1:] if found else None
