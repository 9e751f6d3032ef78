"""Losses that look at no log-probability, but at most at the ratio to that of the behavior policy, are asked only once.

    loss = Σ_(i,t) f_it(logp_it − behavior_logp_it) + w_it logp_it + constant          c = −∂loss/∂logp

where f and w depend on rewards, masks, groups …. Such a loss is run with log-probabilities that are not known
(`pgcheck.estimators.unknown`). What gets through has not looked at them, so that c is a function of the columns that the batch
was asked for, the log-ratio among them; and a batch with the same numbers in those has the same c: after other actions, on
another problem, and (where there is no ratio, or it is 1) at another θ.

Guarantee: nothing is remembered of a loss before it was found to be a function of its batch (`LossCoefficients.remember`), nor
of a batch on which it looks at more, whether or not it catches the refusal; and the first of every block are compared with
what autograd says at the log-probabilities that they have. Not seen is a loss that, on few batches only, asks for the type of a
tensor, catches what the copy `torch.tensor(x)` of an unknown number raises, or changes what autograd saves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pgcheck.batch import COLUMNS, Batch, row_by_row
from pgcheck.estimators.unknown import Run, Unknowns

_MOST = 200_000  # batches that are kept
_PATIENCE = 8  # batches tried, before it is known whether a loss is worth it
_VERIFIED = 2  # batches of a block that are also asked of autograd

_DERIVED = frozenset(name for name, x in vars(Batch).items() if isinstance(x, row_by_row))
_ASKED = (frozenset(COLUMNS) | _DERIVED) - {"logp"}
_RATIO = {"behavior_logp", "ratio"}  # what is known of these is logp − behavior_logp
_PLAIN = {"discount", "discount_clock", "kl_coefficient", "entropy_coefficient", "action_logits", "group", "side"}
_NEVER_MIND = _PLAIN | {"logp", "same_group", "_part"}  # part of what batches that are compared have in common

_Columns = tuple[str, ...]


class Memory:
    """The coefficients of batches on which a loss was linear, by what it asked of them."""

    def __init__(self, value: Callable[[Batch], Tensor], loop: Callable[[Batch], Tensor]) -> None:
        self._value, self._loop = value, loop  # of one batch [B, T], its loss; of several, c by autograd
        self._known: dict[Any, dict[_Columns, dict[bytes, Tensor]]] = {}
        self._tried = self._linear = self._kept = 0

    @property
    def pays(self) -> bool:
        """Whether the loss is linear on most batches; a guess before the first few."""
        return self._tried < _PATIENCE or 2 * self._linear > self._tried

    def recall(self, batch: Batch, out: Tensor) -> Tensor:
        """Fills `out` `[M, B, T]` with c where it is known or found here; the batches that are left."""
        M = batch.reward.shape[0]
        if not self.pays or batch.logp.dtype != torch.float64:
            return torch.arange(M)
        known = self._known.setdefault(_kind(batch), {})
        keys = {asked: _bytes(batch, asked) for asked in known}
        shape, d = batch.logp.shape[1:], (batch.logp - batch.behavior_logp).flatten(1).tolist()
        one = batch.by_number()
        left: list[int] = []
        at: list[int] = []
        found: list[Tensor] = []
        new: list[int] = []
        for m in range(M):
            c = next((x for asked, key in keys.items() if (x := known[asked].get(key[m])) is not None), None)
            if c is None and self.pays:
                run = Run(d[m])
                answer = self._run(one(m, Unknowns(run, shape)), run)
                if answer is not None:
                    c, asked = answer
                    if asked not in keys:
                        keys[asked], known[asked] = _bytes(batch, asked), {}
                    known[asked][keys[asked][m]] = c
                    new.append(m)
            if c is None:
                left.append(m)
            else:
                at.append(m)
                found.append(c)
        if at:
            out[at] = torch.stack(found)
        self._kept += len(new)
        if not self._verified(batch, out, new[:_VERIFIED]):
            self._known, self._tried, self._linear = {}, _PATIENCE, 0
            return torch.arange(M)
        if self._kept > _MOST:
            self._known, self._kept = {}, 0
        return torch.tensor(left, dtype=torch.int64)

    def _run(self, one: Batch, run: Run) -> tuple[Tensor, _Columns] | None:
        """c, and the columns that the loss has asked for; None where it looks at more, or where c is not finite."""
        self._tried += 1
        try:
            c = run.coefficients(self._value(one)).view(one.shape)
        except Exception:  # whatever is wrong, the loop says
            return None
        finally:
            run.end()
        asked = vars(one).keys() - _NEVER_MIND
        if not asked <= _ASKED:
            return None
        self._linear += 1
        return c, tuple(sorted(asked))

    def _verified(self, batch: Batch, out: Tensor, some: list[int]) -> bool:
        if not some:
            return True
        rows = torch.tensor(some)
        expected = self._loop(batch.map(lambda x: x[rows]))
        return torch.allclose(out[rows], expected, rtol=1e-12, atol=1e-15 * float(expected.abs().max().clamp(min=1.0)))


def _kind(batch: Batch) -> tuple[Any, ...]:
    """What batches that are compared have in common."""
    numbers = batch.discount, batch.discount_clock, batch.kl_coefficient, batch.entropy_coefficient
    return batch.reward.shape[1:], batch.reward.dtype, *numbers, *sorted(batch.side)


def _bytes(batch: Batch, asked: _Columns) -> list[bytes]:
    """For each batch of a block `[M, B, T]`, its groups, side tables and the columns `asked` for, as bytes."""
    columns = [
        batch.group,
        *(batch.side[x] for x in sorted(batch.side)),
        *(getattr(batch, x) for x in asked if x not in _RATIO),
    ]
    if not _RATIO.isdisjoint(asked):
        columns.append(batch.logp - batch.behavior_logp)
    as_floats = (x.double() if x.is_floating_point() else x.to(torch.int64).view(torch.float64) for x in columns)
    return [row.tobytes() for row in torch.cat([x.flatten(1) for x in as_floats], 1).detach().numpy()]
