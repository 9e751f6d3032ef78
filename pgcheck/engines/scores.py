"""Sums over batches in which every row has one weight: ĝ = Σ_i w_i S_(n_i), with the score S_n = Σ_t ∇log π(a_nt | k_nt).

Most estimators are such: an advantage of the row, whatever the position. Then nothing is ever done position by position. Of
blocks of batches with weights w `[M, B]`, rollouts n `[M, B]` and probabilities p `[M]` two sums are kept,

* Σ p w of each rollout, `[N]`: E ĝ and its parts by position follow;
* E ĝ ĝᵀ, either as Σ x xᵀ of x = √p Σ_i w_i S_(n_i), one sparse product with the table S; or, where a gradient has many
  coordinates, as Sᵀ V S with the products V = Σ p w_i w_j of each pair of rollouts, `[N, N]`.

In every context the score adds up to 0 over actions, so the last action's column is left out of S, and so are contexts that
are never reached: r ≤ K(A − 1) columns.

Guarantee: the sums of `pgcheck.engines.exact`, to rounding.
"""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pgcheck.batch import narrowed
from pgcheck.engines.traces import into_gradient
from pgcheck.trajectories import Trajectories

_MOST_PAIRS = 4_000_000  # of rollouts, N²
_MOST_SCORES = 4_000_000  # N · K·A
_BLOCK = 16_000  # batches whose pairs stay in cache
_ONE = np.ones(1)
_ROOM = 3 * 2**17  # coordinates of gradients that do


@dataclass(frozen=True)
class Draws:
    """Which rollouts some batches are made of, and their probabilities, as the sums need them; made once for all estimators."""

    index: Tensor  # [M, B]
    probability: Tensor  # [M]

    @classmethod
    def plain(cls, index: Tensor) -> Draws:
        """Of batches that were drawn: each counts once."""
        return cls(index, torch.ones(len(index), dtype=torch.float64))

    @functools.cached_property
    def shared(self) -> float | None:
        """The probability of each batch, if all have one."""
        p = narrowed(self.probability)
        return float(p[0]) if len(p) == 1 or bool((p == p[0]).all()) else None

    @functools.cached_property
    def root(self) -> Tensor:
        """√p of each row, `[M, B]`."""
        return self.probability.sqrt().unsqueeze(-1).expand(self.index.shape).contiguous()

    @functools.cached_property
    def rollouts(self) -> Tensor:
        """`index` as sparse products take it, `[M·B]` int32."""
        return self.index.reshape(-1).to(torch.int32)

    def combine(self, weight: Tensor, rows: Tensor, out: Tensor, *, low: int = 0) -> None:
        """`out` `[m, r]` = Σ_i weight[·, i] rows[index[·, i]] of m batches from number `low` on, from `weight` `[M, B]` and
        `rows` `[N, r]`."""
        M, B = len(out), self.index.shape[1]
        shape, first, here = (M, len(rows)), _first(M, B), slice(low * B, (low + M) * B)
        index, values = self.rollouts[here], weight.reshape(-1)[here]
        if _has_mkl():
            matrix = torch.sparse_csr_tensor(first, index, values, shape, check_invariants=False)
            out.addmm_(matrix, rows, beta=0)
        else:
            from scipy import sparse

            matrix = sparse.csr_array((values.numpy(), index.numpy(), first.numpy()), shape)
            out.copy_(torch.from_numpy(matrix @ rows.numpy()))


@functools.lru_cache(maxsize=8)
def _first(M: int, B: int) -> Tensor:
    """Where each of M batches begins among their rows, and the last one ends."""
    return torch.arange(0, M * B + 1, B, dtype=torch.int32)


def sums_at(
    place: NDArray[np.int32], x: NDArray[np.float64], size: int, factor: NDArray[np.float64] = _ONE
) -> NDArray[np.float64]:
    """Σ x of each place, `[size]`, each of as many equal parts as there are factors times its own; in one pass where
    `np.bincount` looks for the least and the largest place first."""
    from scipy import sparse

    M = len(factor)
    parts = sparse.csc_array((x.reshape(-1), place.reshape(-1), _first(M, x.size // M).numpy()), shape=(size, M))
    out: NDArray[np.float64] = parts @ factor
    return out


@functools.cache
def _has_mkl() -> bool:
    """Whether torch multiplies sparse matrices. That it calls them new is said once, and here not to the user."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor([0, 0], torch.zeros(0, dtype=torch.int64), torch.zeros(0), (1, 1))
    return torch.backends.mkl.is_available()


def scores_of(table: Trajectories) -> Tensor:
    """S `[N, K·A]` of every rollout."""
    counts = torch.zeros(len(table), table.contexts * table.actions, dtype=torch.float64)
    return into_gradient(counts.scatter_add_(1, table.cell, table.paths.mask), table, logits=False)


@dataclass(frozen=True)
class Scores:
    """The scores of every rollout."""

    whole: Tensor  # [N, K·A]
    columns: Tensor  # [K·A] whether a column is kept
    actions: int

    @classmethod
    def of(cls, table: Trajectories) -> Scores | None:
        """S of a table, made once; None if it is too large."""
        N, cells = len(table), table.contexts * table.actions
        if N * cells > _MOST_SCORES:
            return None
        known: Scores | None = vars(table).get("_scores")
        if known is None:
            whole = scores_of(table)
            kept = (whole != 0).any(0)
            kept.view(table.contexts, table.actions)[:, -1] = False
            known = vars(table)["_scores"] = cls(whole, kept, table.actions)
        return known

    @functools.cached_property
    def kept(self) -> Tensor:
        """`[N, r]`."""
        return self.whole[:, self.columns].contiguous()

    @functools.cached_property
    def padded(self) -> Tensor:
        """The same with columns of zeros at the end: products take up to twice as long where 4 or 8 do not divide r."""
        r = self.kept.shape[1]
        return torch.nn.functional.pad(self.kept, (0, -r % (4 if r <= 24 else 8)))

    @functools.cached_property
    def _lift(self) -> Tensor:
        """What makes all columns of the kept ones, `[K·A, r]`."""
        lift = torch.eye(len(self.columns), dtype=torch.float64)
        parts = lift.view(-1, self.actions, len(self.columns))
        parts[:, -1] -= parts.sum(1)
        return lift[:, self.columns]

    def room(self, count: int) -> Tensor:
        """Where gradients of some of `count` batches are put, `[·, r]`: few enough to stay in cache until they are summed."""
        r = self.padded.shape[1]
        return torch.empty(min(count, max(64, _ROOM // max(1, r))), r, dtype=torch.float64)

    def whole_second(self, second: Tensor) -> Tensor:
        """x xᵀ `[K·A, K·A]` of that of the kept columns, or of the padded ones."""
        r = self.kept.shape[1]
        return self._lift @ second[:r, :r] @ self._lift.T


def by_pairs(N: int, r: int, cells: int, rows: int, count: int) -> bool:
    """Whether products of pairs of rollouts are cheaper than gradients of r coordinates, for `count` batches of `rows` rows.

    In nanoseconds, measured: a pair takes nine, and each that there could be six in every block; a row of the sparse product
    2.5 and a sixth for each coordinate; a step of the dense one a 25th.
    """
    pairs = 4.5 * rows * (rows + 1) * count + N * N * (6 * count / _BLOCK + cells / 15)
    return N * N <= _MOST_PAIRS and pairs < (rows * (2.5 + r / 6) + r * r / 25 + 5) * count


class RowSums:
    """The two sums of one estimator, over `count` batches of `rows` rows; its `Scores.room` may be that of others."""

    def __init__(self, scores: Scores, rows: int, count: int, room: Tensor) -> None:
        N, r = scores.padded.shape
        self.scores, self._room = scores, room
        self._expected, self._lost = np.zeros(N), np.zeros(N)
        self._paired = by_pairs(N, r, scores.whole.shape[1], rows, count)
        side = N if self._paired else r
        self._second = torch.zeros(side, side, dtype=torch.float64)

    def add(self, weight: Tensor, draws: Draws, *, number: float = 1.0) -> bool:
        """Batches with `number` times `weight` `[M, B]`; whether they were added: not if some weight is no number."""
        p = draws.shared
        factor = number * (draws.probability.numpy() if p is None else np.full(1, p))
        sums = sums_at(draws.rollouts.numpy(), weight.numpy(), len(self._expected), factor)
        if not np.isfinite(sums.sum()):
            return False
        compensated_add(self._expected, self._lost, sums)
        w, square = (weight * draws.root, 1.0) if p is None else (weight, p)
        (self._add_pairs if self._paired else self._add_gradients)(w, draws, square * number**2)
        return True

    def _add_gradients(self, w: Tensor, draws: Draws, factor: float) -> None:
        for low in range(0, len(w), len(self._room)):
            x = self._room[: len(w) - low]
            draws.combine(w, self.scores.padded, x, low=low)
            self._second.addmm_(x.T, x, alpha=factor)

    def _add_pairs(self, w: Tensor, draws: Draws, factor: float) -> None:
        N, index = len(self._second), draws.rollouts.view(w.shape).numpy()
        for low in range(0, len(w), _BLOCK):
            n, v = (np.ascontiguousarray(x[low : low + _BLOCK].T) for x in (index, w.numpy()))
            places = [n[i] * N + n[i:] for i in range(len(n))]
            products = [v[i] * v[i:] for i in range(len(n))]
            for x in products:
                x[0] *= 0.5  # a row with itself: it is added to its mirror image, as the others are
            added = sums_at(np.concatenate(places), np.concatenate(products), N * N)
            self._second += factor * torch.from_numpy(added.reshape(N, N))

    def mean_weights(self) -> Tensor:
        """E Σ_i w_i 1[n_i = n], `[N]`."""
        return torch.from_numpy(self._expected + self._lost)

    def second(self) -> Tensor:
        """E ĝ ĝᵀ, `[K·A, K·A]`."""
        if self._paired:
            S = self.scores.whole
            return S.T @ (self._second + self._second.T) @ S
        return self.scores.whole_second(self._second)


def compensated_add(total: Any, lost: Any, x: Any) -> None:
    """Knuth's sum of two, of tensors or of arrays: `lost` collects what `total` rounds away."""
    new = total + x
    of_x = new - total
    lost += (total - (new - of_x)) + (x - of_x)
    total[...] = new
