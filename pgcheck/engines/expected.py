"""E ĝ alone, of many estimators on one small problem.

    E ĝ = L Σ_m P(m) C(m)

over all batches m of coefficients C(m) `[B, T]`, L the linear map that makes coefficients into ĝ = Σ c ∇log π. Batches are
listed once for all estimators, whatever they couple; beside these, in the same call, the random batches on which the order of
rows must make no difference. `pgcheck.engines.exact` has the variance as well, and problems of any size; this costs one call of
the coefficients.

Guarantee: what it returns is what `exact_moments` returns, to rounding; what it cannot answer, it leaves out.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pgcheck.engines.coefficients import coefficients_of, gradient_map
from pgcheck.engines.declarations import PROBES, row_orders, same_in_any_order
from pgcheck.engines.enumeration import Batches
from pgcheck.engines.threads import one_thread
from pgcheck.errors import PgcheckError
from pgcheck.estimators.base import Estimator, Leaf
from pgcheck.estimators.from_loss import is_looped
from pgcheck.problem import Problem
from pgcheck.trajectories import SideTable

_MOST = 120_000  # positions of all batches together


@one_thread()
def expected_gradients(estimators: Sequence[Estimator], problem: Problem) -> list[Tensor | None]:
    """E ĝ `[K, A]` of each, in logit space. None where there are too many batches, the order of rows is not free, the loss runs
    only in a loop, or something is wrong with the coefficients."""
    alike: dict[tuple[tuple[SideTable, ...], Leaf], list[int]] = {}
    for i, e in enumerate(estimators):
        if not is_looped(e):
            alike.setdefault((e.needs, e.leaf), []).append(i)
    found: list[Tensor | None] = [None] * len(estimators)
    for members in alike.values():
        for i, x in zip(members, _of_one_table([estimators[i] for i in members], problem), strict=True):
            found[i] = x
    return found


def _of_one_table(estimators: Sequence[Estimator], problem: Problem) -> list[Tensor | None]:
    table, logits = problem.trajectories_with(estimators[0].needs), estimators[0].leaf == "logits"
    batches = Batches(table, problem.sizes)
    if batches.count * problem.rows * table.paths.steps * (table.actions if logits else 1) > _MOST:
        return [None] * len(estimators)
    ((index, weight),) = batches.blocks(batches.count)
    orders, probes = row_orders(problem), batches.random(PROBES, seed=0)
    moved = [probes, *(probes[:, order] for order in orders)] if orders else []
    batch = table.batch(torch.cat([index, *moved]), batches.labels, logits=logits)
    place = (table.logit_cells if logits else table.cell).flatten()
    rollouts, q = index.flatten(), weight.reshape(-1, *[1] * (3 if logits else 2))
    to_gradient = gradient_map(table, logits=logits)
    found: list[Tensor | None] = []
    for e in estimators:
        try:
            c, *several = coefficients_of(e, batch).to(torch.float64).split([len(index), *map(len, moved)])
        except PgcheckError:
            found.append(None)
            continue
        if several and not same_in_any_order(several[0], torch.cat(several[1:]), orders):
            found.append(None)
            continue
        spent = torch.zeros(len(table), *c.shape[2:], dtype=torch.float64).index_add_(
            0, rollouts, (c * q).flatten(0, 1)
        )
        cells = torch.zeros(len(to_gradient), dtype=torch.float64).index_add_(0, place, spent.flatten())
        found.append((to_gradient @ cells).view(table.contexts, table.actions))
    return found
