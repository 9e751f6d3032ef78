"""What an estimator declares is verified by substitution on random batches before the engine relies on it.

* purity: a function of its batch (`pgcheck.engines.purity`);
* `couples`: coefficients computed from the own row or group alone are those of the whole batch;
* no dependence on the order of rows: without it, ordered tuples are enumerated instead of multisets;
* `reads`: other rows of the same class give the same coefficients (`pgcheck.engines.lumped`).

Guarantee: a wrong declaration that shows on any of the 64 random batches is an error, never a wrong number.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from operator import itemgetter
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from pgcheck.batch import Batch
from pgcheck.engines.coefficients import coefficients_of
from pgcheck.engines.enumeration import Batches
from pgcheck.engines.lumped import Lumps, substituted
from pgcheck.engines.purity import find_impurity
from pgcheck.errors import EstimatorError
from pgcheck.estimators.base import Estimator
from pgcheck.estimators.from_loss import is_looped
from pgcheck.problem import Problem
from pgcheck.trajectories import SideTable, Trajectories

PROBES = 64  # random batches on which declarations are verified
PURITY_PROBES = 8  # of them: state and randomness show on any


def verify_purity(estimator: Estimator, problem: Problem, table: Trajectories) -> None:
    """Raise `EstimatorError` if the estimator writes to its inputs, draws random numbers or keeps state."""
    few = probe(problem, table, estimator, few=True)[1]
    impurity = find_impurity(estimator, few)
    if impurity is not None:
        raise EstimatorError(f"estimator '{estimator.name}' {impurity.what}: {impurity.mend}.")


_Key = tuple[tuple[SideTable, ...], int, bool, bool, bool]
_probes: WeakKeyDictionary[Problem, dict[_Key, tuple[Tensor, Batch]]] = WeakKeyDictionary()


def probe(
    problem: Problem,
    table: Trajectories,
    estimator: Estimator,
    number: int = PROBES,
    *,
    moved: bool = False,
    few: bool = False,
) -> tuple[Tensor, Batch]:
    """The random batches on which declarations are verified: rollouts `[M, B]`, and the batch; made once a problem. `moved`:
    with their rows in each of `row_orders`, one after the other. `few`: the first of them, in memory of their own."""
    key = estimator.needs, number // 4 if is_looped(estimator) else number, estimator.leaf == "logits", moved, few
    kept = _probes.setdefault(problem, {})
    if key not in kept:
        index = Batches(table, problem.sizes).random(key[1], seed=0)
        if moved:
            index = torch.cat([index[:, order] for order in row_orders(problem)])
        batch = table.batch(index, problem.group_labels, logits=key[2])
        kept[key] = index, batch.map(lambda x: x[:PURITY_PROBES]) if few else batch
    return kept[key]


def _close(a: Tensor, b: Tensor) -> bool:
    return bool(torch.allclose(a, b, rtol=1e-9, atol=1e-12 * max(1.0, float(b.abs().max()))))


def verify_couples(estimator: Estimator, problem: Problem, table: Trajectories) -> None:
    """Coefficients computed from what `couples` allows, put together, are those of the whole batch."""
    if estimator.couples == "batch" or (estimator.couples == "group" and problem.groups == 1):
        return
    _, batch = probe(problem, table, estimator)
    whole = coefficients_of(estimator, batch)
    sizes = problem.sizes if estimator.couples == "group" else (1,) * problem.rows
    parts, low = [], 0
    for size in sizes:
        part = batch.map(itemgetter((slice(None), slice(low, low + size))))
        part = replace(part, group=part.group - part.group[:, :1])  # enumerated alone, a group is number 0
        parts.append(coefficients_of(estimator, part) * (size / problem.rows))
        low += size
    if not _close(torch.cat(parts, 1), whole):
        what = "other groups" if estimator.couples == "group" else "other rows"
        raise EstimatorError(
            f"estimator '{estimator.name}' is declared couples='{estimator.couples}', but its coefficients change with"
            f" {what} of the batch (beyond the 1/B of the batch average); declare couples='batch'."
        )


def verify_reads(estimator: Estimator, table: Trajectories, lumps: Lumps, problem: str) -> None:
    """Raise `EstimatorError` unless other rows of the same class leave a row's coefficients as they are."""
    label = torch.zeros(lumps.size, dtype=torch.int64)
    index = torch.cat(substituted(lumps, PROBES, seed=0))
    here, there = coefficients_of(estimator, table.batch(index, label, logits=estimator.leaf == "logits"))[:, 0].chunk(
        2
    )
    if not _close(here, there):
        raise EstimatorError(
            f"estimator '{estimator.name}' is declared reads={estimator.reads!r}, but its coefficients change"
            " when other rows are replaced by rollouts with the same values of those; leave `reads` out or add to it."
        )


def row_order_is_free(estimator: Estimator, problem: Problem, table: Trajectories) -> bool:
    """ĝ does not move when rows are permuted inside their groups and groups of equal size among each other."""
    orders = row_orders(problem)
    if not orders:
        return True
    here = coefficients_of(estimator, probe(problem, table, estimator)[1])
    return same_in_any_order(here, coefficients_of(estimator, probe(problem, table, estimator, moved=True)[1]), orders)


def same_in_any_order(here: Tensor, moved: Tensor, orders: list[Tensor]) -> bool:
    """Whether coefficients `[M, B, …]` move with their rows: `moved` are those of the batches in each of the `orders`."""
    return _close(moved, torch.cat([here[:, order] for order in orders]))


def row_orders(problem: Problem) -> list[Tensor]:
    """Row orders `[B]` that together generate every exchange of rows in a group, and of groups of one size.

    A transposition of the first two and a rotation generate all permutations; one permutation alone can miss an
    estimator that happens to be invariant under it (a roll, a pairing, a fixed row).
    """
    return [*_row_orders(problem.sizes)]


@functools.cache
def _row_orders(sizes: tuple[int, ...]) -> tuple[Tensor, ...]:
    first = [0]
    for size in sizes:
        first.append(first[-1] + size)
    blocks = [list(range(low, low + size)) for low, size in zip(first, sizes, strict=False)]

    def generators(n: int) -> list[list[int]]:
        found = [[1, 0, *range(2, n)]] if n > 1 else []
        return found + ([[*range(1, n), 0]] if n > 2 else [])

    orders = []
    for size in sorted(set(sizes)):
        same = [g for g, s in enumerate(sizes) if s == size]
        for inside in generators(size):
            moved = list(blocks)
            moved[same[0]] = [blocks[same[0]][i] for i in inside]
            orders.append(moved)
        for among in generators(len(same)):
            moved = list(blocks)
            for g, h in zip(same, among, strict=True):
                moved[g] = blocks[same[h]]
            orders.append(moved)
    return tuple(torch.tensor([i for block in order for i in block]) for order in orders)
