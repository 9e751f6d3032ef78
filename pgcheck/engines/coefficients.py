"""From a batch to C[k,a]: coefficients, checked, and scattered to contexts and actions.

    C[k,a] = Σ_(i,t) c[i,t] 1[k_it = k, a_it = a]        ĝ = L C,  ĝ[k,a] = C[k,a] − π(a|k) Σ_b C[k,b]

Guarantee: coefficients that leave this module are of the right shape, finite, and 0 wherever the policy did not act.
"""

from __future__ import annotations

from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from pgcheck.batch import Batch, LogitsNotAsked, gathered_rows, narrowed, scaled
from pgcheck.errors import EstimatorError, NotFiniteError, PgcheckError, in_words
from pgcheck.estimators.base import Estimator
from pgcheck.trajectories import Trajectories


def evaluated(estimator: Estimator, batch: Batch) -> Any:
    """Whatever the estimator returns for a batch; of a composition, before its mask.

    Raises:
        EstimatorError: it raised something of its own.
    """
    number, c = factored(estimator, batch)
    return c if number == 1.0 else scaled(number, c)


def factored(estimator: Estimator, batch: Batch) -> tuple[float, Any]:
    """The same as a number times the rest; only of a composition is it not 1."""
    fn = estimator.coefficients
    try:
        return fn.factored(batch) if hasattr(fn, "factored") else (1.0, fn(batch))
    except PgcheckError:
        raise
    except LogitsNotAsked:
        raise EstimatorError(
            f"estimator '{estimator.name}' reads batch.logits, which is there for estimators made with leaf=\"logits\"."
        ) from None
    except Exception as error:
        where = f"on batches [..., B, T] = {list(batch.shape)}"
        raise EstimatorError(f"estimator '{estimator.name}' raises {where}: {in_words(error)}") from error


def coefficients_of(estimator: Estimator, batch: Batch) -> Tensor:
    """c of a batch, with everything that is no policy position set to 0.

    Raises:
        EstimatorError: not a tensor, wrong shape, or an exception of its own.
        NotFiniteError: NaN or infinity, showing the first such batch.
    """
    c = unmasked_coefficients(estimator, batch)
    return c * (batch.mask if estimator.leaf == "logp" else batch.mask.unsqueeze(-1))


def unmasked_coefficients(estimator: Estimator, batch: Batch) -> Tensor:
    """The same, finite everywhere, with anything where the policy did not act.

    Raises:
        EstimatorError, NotFiniteError: as `coefficients_of`.
    """
    return finite(scaled(*factored_coefficients(estimator, batch)), estimator, batch)


def factored_coefficients(estimator: Estimator, batch: Batch) -> tuple[float, Tensor]:
    """The same as a number and a tensor, finite or not.

    Raises:
        EstimatorError: as `coefficients_of`.
    """
    number, c = factored(estimator, batch)
    if not isinstance(c, Tensor):
        what = "None" if c is None else type(c).__name__
        raise EstimatorError(f"estimator '{estimator.name}' returned {what}, not a torch tensor.")
    expected = tuple(batch.shape) + ((batch.logits.shape[-1],) if estimator.leaf == "logits" else ())
    if tuple(c.shape) != expected:
        raise EstimatorError(
            f"estimator '{estimator.name}' returned coefficients of shape {list(c.shape)}, expected {list(expected)}, one for"
            " each position of the batch."
        )
    if c.is_complex():
        raise EstimatorError(f"estimator '{estimator.name}' returned complex coefficients; they must be real.")
    return number, c


def finite(c: Tensor, estimator: Estimator, batch: Batch) -> Tensor:
    """Coefficients as they are given, if that is finite everywhere; else with 0 where the policy did not act.

    Raises:
        NotFiniteError: as `coefficients_of`.
    """
    if bool(torch.isfinite(narrowed(c).sum())):  # then every term is
        return c
    c = torch.where((batch.mask if estimator.leaf == "logp" else batch.mask.unsqueeze(-1)) > 0, c, 0.0)
    if not bool(torch.isfinite(c).all()):
        raise NotFiniteError(_not_finite(estimator, batch, c))
    return c


def per_row(c: Tensor) -> Tensor | None:
    """`[..., B]` of coefficients `[..., B, T]` that are one number a row, repeated in the same memory."""
    return c[..., 0] if c.stride(-1) == 0 else None


def _not_finite(estimator: Estimator, batch: Batch, c: Tensor) -> str:
    """The first batch on which some coefficient is no number, as a table."""
    while batch.reward.dim() > 2:
        bad = int((~torch.isfinite(c)).flatten(1).any(-1).nonzero()[0, 0])
        batch, c = batch.map(itemgetter(bad)), c[bad]
    value = float(c[~torch.isfinite(c)][0])
    if bool(torch.isnan(batch.value).all()):
        return (
            f"estimator '{estimator.name}' returns {value}. Most likely it reads batch.value: the value function of a task that"
            " is written by its model is not known (NaN). Judge it on a task whose prefixes can be listed."
        )
    return (
        f"estimator '{estimator.name}' returns {value}. Most likely a division by a standard deviation, a length or a group"
        f" size that is zero; add an ε, or give such rows coefficient 0. The first such batch:\n{table_of(batch, c)}"
    )


_SHOWN_ROWS = 12


def table_of(batch: Batch, c: Tensor) -> str:
    """One batch `[B, T]` with its coefficients as lines of text; – is an observation or padding."""
    per_position = c if c.dim() == batch.reward.dim() else c.sum(-1)  # an action's NaN is its position's
    cells = [("row", "group", "actions", "rewards", "coefficients")]
    for i in range(min(batch.rows, _SHOWN_ROWS)):
        acts = (batch.mask[i] > 0).tolist()
        cells.append(
            (
                str(i),
                str(int(batch.group[i])),
                " ".join(str(a) if here else "–" for a, here in zip(batch.action[i].tolist(), acts, strict=True)),
                " ".join(f"{r:.4g}" for r in batch.reward[i].tolist()),
                " ".join(f"{x:.4g}" if here else "–" for x, here in zip(per_position[i].tolist(), acts, strict=True)),
            )
        )
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["    " + "  ".join(x.ljust(w) for x, w in zip(row, widths, strict=True)).rstrip() for row in cells]
    if batch.rows > _SHOWN_ROWS:
        lines.append(f"    … and {batch.rows - _SHOWN_ROWS} more rows")
    return "\n".join(lines)


def cells_of(table: Trajectories, index: Tensor, *, logits: bool) -> Tensor:
    """Where each coefficient of the batches `index` `[M, B]` goes, among the K·A cells: `[M, B·T]` (or `[M, B·T·A]`)."""
    return gathered_rows(table.logit_cells if logits else table.cell, index).flatten(1)


def scattered(c: Tensor, cell: Tensor, cells: int) -> Tensor:
    """C of every batch, `[M, cells]`, from coefficients `[M, …]` and their places `[M, …]`."""
    return torch.zeros(len(c), cells, dtype=torch.float64, device=c.device).scatter_add_(
        1, cell, c.to(torch.float64).flatten(1)
    )


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


def estimates(estimator: Estimator, table: Trajectories, index: Tensor, labels: Tensor) -> Tensor:
    """ĝ in logit space of the batches `index` `[M, B]` in groups `labels` `[B]`, `[M, K·A]`."""
    logits, cells = estimator.leaf == "logits", table.contexts * table.actions
    c = coefficients_of(estimator, table.batch(index, labels, logits=logits))
    x = scattered(c, cells_of(table, index, logits=logits), cells)
    if logits:
        return x
    pi, parts = torch.softmax(table.logits, -1), x.unflatten(-1, table.logits.shape)
    return (parts - pi * parts.sum(-1, keepdim=True)).flatten(-2)  # L C, without L: contexts may be many
