"""What an estimator may see: `Batch`, rows of token positions with their rewards and log-probabilities.

Letters used everywhere: `M` batches at once, `B` rows (rollouts) of a batch, `T` positions of a row, `K` contexts,
`A` actions, `N` trajectories, `G` group size, `P` parameters. "..." stands for leading batch dimensions, often none.

Guarantee: a `Batch` holds rollouts and nothing of the problem that made them, so an estimator cannot look up the
answer. Everything here is written in out-of-place torch operations without data-dependent control flow: it works
under `torch.func.vmap` and autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple, Self

import torch
from torch import Tensor

from pgcheck.errors import nearest

DiscountClock = Literal["position", "action"]
DISCOUNT_CLOCKS: tuple[DiscountClock, ...] = ("position", "action")


class LogitsNotAsked(AttributeError):
    """`batch.logits` was read by an estimator whose leaf is `logp`."""


class _Gathered(NamedTuple):
    """Where a batch comes from: `rows` `[..., B]` of a table `[N, T]`, groups by their `labels` `[B]`."""

    table: Batch
    rows: Tensor
    labels: Tensor


class _Block:
    """M batches, of which single ones are taken: a column is split into its M parts when first read of any."""

    def __init__(self, batch: Batch, leaf: Mapping[str, Tensor]) -> None:
        self._batch, self._leaf = batch, leaf
        self._parts: dict[str, tuple[Tensor, ...]] = {}

    def part(self, name: str, m: int) -> Tensor:
        """Column (or quantity) `name` of batch m."""
        if name not in self._parts:
            column = self._leaf[name] if name in self._leaf else getattr(self._batch, name)
            with torch.enable_grad():  # the first that reads it may do so under no_grad
                self._parts[name] = column.unbind(0)
        return self._parts[name][m]


class _Part(NamedTuple):
    """Batch number `m` of a block; some columns are its own."""

    block: _Block
    m: int
    own: Mapping[str, Tensor]


class Late:
    """Attributes of a dataclass that are made when first read; `_later` says how."""

    @classmethod
    def known(cls, later: Mapping[str, Callable[[], Tensor]] | None = None, **columns: Any) -> Self:
        """Of columns that are known to be right, some of them `later`: nothing is checked or copied."""
        made = object.__new__(cls)
        vars(made).update(columns, _later=later or {})
        return made

    def __getattr__(self, name: str) -> Any:
        make = vars(self).get("_later", {}).get(name)
        if make is None:
            raise AttributeError(f"'{type(self).__name__}' has no attribute '{name}'")
        vars(self)[name] = (value := make())
        return value


def gathered_rows(x: Tensor, index: Tensor) -> Tensor:
    """`x[index]`, three times as fast: numbers and rows are copied by numpy; of all rows in order nothing is copied."""
    if x.dim() > 1 and index.numel() == len(x) and index.device.type == "cpu" and _in_order(index):
        return x.unflatten(0, index.shape)
    if x.dim() <= 2 and x.device.type == "cpu" and not x.requires_grad:
        return torch.from_numpy(x.numpy().take(index.numpy(), axis=0))
    return x.index_select(0, index.flatten()).unflatten(0, index.shape)


def _in_order(index: Tensor) -> bool:
    """Whether it counts from 0."""
    return index.is_contiguous() and torch.equal(index.view(-1), torch.arange(index.numel()))


def narrowed(x: Tensor) -> Tensor:
    """`x` with size 1 in place of each dimension along which it is repeated in the same memory."""
    return x[tuple(slice(1) if stride == 0 else slice(None) for stride in x.stride())]


def scaled(number: float, x: Tensor) -> Tensor:
    """`number` times `x`, repeated in memory as `x` is."""
    return x if number == 1.0 else (number * narrowed(x)).expand(x.shape)


class row_by_row(cached_property[Tensor]):  # noqa: N801  (a decorator)
    """A quantity that each row has by itself, whatever else is in the batch.

    In a batch gathered from a table it is computed once for the N rows of the table, and gathered like a column, or where it
    is the same number throughout, repeated without copies (`narrowed`); one that no gradient passes through is computed once
    for the M batches of a block.
    """

    def __get__(self, batch: Any, owner: Any = None) -> Any:
        if batch is not None and (source := vars(batch).get("_source")) is not None:
            name = self.func.__name__
            x: Tensor = getattr(source.table, name)
            one = source.table.repeated_number(name)
            value = gathered_rows(x, source.rows) if one is None else one.expand(*source.rows.shape, *x.shape[1:])
            vars(batch)[name] = value
            return value
        if batch is not None and (part := vars(batch).get("_part")) is not None and self.func.__name__ != "ratio":
            name = self.func.__name__
            vars(batch)[name] = (value := part.block.part(name, part.m).clone())  # to be written to, as if made here
            return value
        return super().__get__(batch, owner)


@dataclass(frozen=True)
class Batch(Late):
    """One batch of B rollouts (or M of them, in the leading dimensions), padded to T positions.

    `mask` is 1 exactly where the policy chose the token. Observation (tool, environment) positions inside a row and
    padding after its end are 0 there; `logp`s are 0 and `state`, `context`, `action` are -1 where mask is 0. `reward`
    is 0 on padding but may sit on an observation position.
    """

    state: Tensor  # [..., B, T] int64, the environment's state where the policy acts
    context: Tensor  # [..., B, T] int64, the policy's input; several states may share one
    action: Tensor  # [..., B, T] int64
    reward: Tensor  # [..., B, T]
    mask: Tensor  # [..., B, T] 1. or 0.
    logp: Tensor  # [..., B, T] log π(a_t | k_t), nats
    behavior_logp: Tensor  # [..., B, T] the same under the policy that drew the batch
    ref_logp: Tensor  # [..., B, T] the same under the reference policy
    value: Tensor  # [..., B, T+1] exact V^π of the state and t, of the reward alone, 0 after the end
    group: Tensor  # [..., B] int64, rows of one start state or prompt draw share an id
    discount: float
    discount_clock: DiscountClock = "position"
    kl_coefficient: float = 0.0  # β of the objective, E Σ γ^t (r_t − β log π/π_ref − α log π)
    entropy_coefficient: float = 0.0  # α of the objective
    side: Mapping[str, Tensor] = field(default_factory=dict)  # [..., B, *] what the estimator declared that it needs
    action_logits: Tensor | None = None  # [..., B, T, A], read it as `logits`
    lists_all: bool = False  # whether the rows are a table of all rollouts that there are, not of some that were drawn

    @classmethod
    def gathered(cls, table: Batch, index: Tensor, labels: Tensor) -> Batch:
        """Rows `index` `[..., B]` of `table` `[N, T]` in the groups `labels` `[B]`; a column is gathered when first read."""
        batch = object.__new__(cls)
        side = _Columns(table.side, index)
        vars(batch).update(_source=_Gathered(table, index, labels), discount=table.discount, side=side)
        vars(batch).update(discount_clock=table.discount_clock, group=labels.expand(index.shape), action_logits=None)
        vars(batch).update(kl_coefficient=table.kl_coefficient, entropy_coefficient=table.entropy_coefficient)
        if table.action_logits is not None:
            vars(batch)["action_logits"] = gathered_rows(table.action_logits, index)
        return batch

    def one_by_one(self, **leaf: Tensor) -> Iterator[Batch]:
        """The M batches `[B, T]` of a block `[M, B, T]`, with `leaf` in place of its columns; they share its memory."""
        return map(self.by_number(**leaf), range(len(self.group)))

    def by_number(self, **leaf: Tensor) -> Callable[..., Batch]:
        """Makes batch number m of a block, as `one_by_one` does, with other columns `[B, T]` if given."""
        block = _Block(self, leaf)
        plain = {"discount": self.discount, "discount_clock": self.discount_clock, "action_logits": None}
        plain |= {"kl_coefficient": self.kl_coefficient, "entropy_coefficient": self.entropy_coefficient}
        groups, sides = self.group.unbind(0), {name: x.unbind(0) for name, x in self.side.items()}

        def one(m: int, own: Mapping[str, Tensor] = {}) -> Batch:
            batch = object.__new__(type(self))
            side = {name: x[m] for name, x in sides.items()}
            vars(batch).update(plain, group=groups[m], side=side, _part=_Part(block, m, own))
            if self.action_logits is not None:
                vars(batch)["action_logits"] = block.part("action_logits", m)
            return batch

        return one

    def __getattr__(self, name: str) -> Any:  # only for what is not there (yet)
        if name == "logits":  # the property has raised
            raise LogitsNotAsked('batch.logits is there only for estimators made with leaf="logits"')
        source, part = vars(self).get("_source"), vars(self).get("_part")
        if name in vars(self).get("_later", ()):
            return super().__getattr__(name)
        if part is not None and name in COLUMNS:
            vars(self)[name] = (value := part.own[name] if name in part.own else part.block.part(name, part.m))
            return value
        if source is None or name not in COLUMNS:
            known = [] if name.startswith("_") else [x for x in (*dir(type(self)), *COLUMNS) if not x.startswith("_")]
            raise AttributeError(f"'Batch' has no attribute '{name}'.{nearest(name, known, cutoff=0.6)}")
        vars(self)[name] = (value := gathered_rows(getattr(source.table, name), source.rows))
        return value

    @property
    def logits(self) -> Tensor:
        """Logits of every action, `[..., B, T, A]`; only for estimators with `leaf="logits"`."""
        if self.action_logits is None:
            raise AttributeError
        return self.action_logits

    def repeated_number(self, name: str) -> Tensor | None:
        """The number that a quantity of the rows is everywhere, 0-dimensional, if it is one; of a table, asked once."""
        known: dict[str, Tensor | None] = vars(self).setdefault("_repeated", {})
        if name not in known:
            first = (x := getattr(self, name)).flatten()[0]
            known[name] = first if bool((x == first).all()) else None
        return known[name]

    @property
    def shape(self) -> torch.Size:
        """`[..., B, T]`; nothing is gathered to know it."""
        source: _Gathered | None = vars(self).get("_source")
        if source is not None:
            return torch.Size((*source.rows.shape, source.table.reward.shape[-1]))
        return self.reward.shape

    @property
    def known_labels(self) -> tuple[int, ...] | None:
        """`group` of every batch, where it is known to be the same."""
        source: _Gathered | None = vars(self).get("_source")
        return None if source is None else tuple(source.labels.tolist())

    @property
    def rows(self) -> int:
        """B, the number of rollouts."""
        return int(self.group.shape[-1])

    @row_by_row
    def clock(self) -> Tensor:
        """Exponent of γ at each position, `[..., B, T]`.

        `discount_clock="position"`: t itself. `"action"`: the number of policy positions up to and including t, less
        one (not below 0), so that an observation position discounts nothing.
        """
        if self.discount_clock == "position":
            return self._positions.expand(self.reward.shape)
        return (self.mask.cumsum(-1) - 1.0).clamp(min=0.0)

    @row_by_row
    def discount_weight(self) -> Tensor:
        """γ^t (by the problem's clock), `[..., B, T]`."""
        if self.discount_clock == "position":  # the same in every row
            return (self.discount**self._positions).expand(self.reward.shape)
        return self.discount**self.clock

    @property
    def _positions(self) -> Tensor:
        """0, 1, …, `[T]`."""
        return torch.arange(self.reward.shape[-1], dtype=self.reward.dtype, device=self.reward.device)

    @row_by_row
    def episode_return(self) -> Tensor:
        """R = Σ_t γ^t r_t, `[..., B]`."""
        return (self.discount_weight * self.reward).sum(-1)

    @row_by_row
    def return_size(self) -> Tensor:
        """Σ_t |γ^t r_t|, of which the rounding of R is a part, `[..., B]`."""
        return (self.discount_weight * self.reward).abs().sum(-1)

    @cached_property
    def rounding(self) -> Tensor:
        """Returns that differ by less are the same number: 16 ulp of the largest Σ_t |γ^t r_t| of the rows, `[..., 1]`; in a
        batch gathered from a table of all rollouts that there are, of those, `[1]`, so that it is known once for all batches.
        """
        source: _Gathered | None = vars(self).get("_source")
        if source is not None and source.table.lists_all:
            return source.table.rounding
        return self.return_size.amax(-1, keepdim=True) * (16 * torch.finfo(self.return_size.dtype).eps)

    @row_by_row
    def reward_to_go(self) -> Tensor:
        """Ĝ_t = Σ_{k≥t} γ^{k−t} r_k = r_t + γ Ĝ_{t+1}, `[..., B, T]`."""
        steps = self.reward.shape[-1]
        out = [self.reward[..., -1]]
        for t in range(steps - 2, -1, -1):
            gamma = self.discount ** (self.clock[..., t + 1] - self.clock[..., t])
            out.append(self.reward[..., t] + gamma * out[-1])
        return torch.stack(out[::-1], -1)

    @row_by_row
    def length(self) -> Tensor:
        """Number of policy positions of each row, `[..., B]`."""
        return self.mask.sum(-1)

    @row_by_row
    def inverse_length(self) -> Tensor:
        """1 / length, and 1 for a row without a policy position, `[..., B]`."""
        return 1.0 / self.length.clamp(min=1.0)

    @row_by_row
    def ratio(self) -> Tensor:
        """r_t = π(a_t|k_t) / π_old(a_t|k_t), 1 where mask is 0, `[..., B, T]`."""
        return ((self.logp - self.behavior_logp) * self.mask).exp()

    @cached_property
    def same_group(self) -> Tensor:
        """1. where rows i and j share a group, `[..., B, B]`; any labels will do."""
        source: _Gathered | None = vars(self).get("_source")
        if source is not None:  # the labels of every batch are the same
            same = source.labels.unsqueeze(-1) == source.labels.unsqueeze(-2)
            return same.to(source.table.reward.dtype).expand(*source.rows.shape, -1)
        return (self.group.unsqueeze(-1) == self.group.unsqueeze(-2)).to(self.reward.dtype)

    def map(self, fn: Callable[[Tensor], Tensor]) -> Batch:
        """A new batch with `fn` applied to every tensor."""
        new = object.__new__(type(self))
        for name in _FIELDS:
            x = getattr(self, name)
            vars(new)[name] = fn(x) if isinstance(x, Tensor) else x
        vars(new)["side"] = {name: fn(x) for name, x in self.side.items()}
        return new

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by name; side tables as `side.NAME`."""
        named = {f.name: x for f in fields(self) if isinstance(x := getattr(self, f.name), Tensor)}
        return named | {f"side.{name}": x for name, x in self.side.items()}

    def with_tensors(self, named: Mapping[str, Tensor]) -> Batch:
        """The batch with the tensors of `named` (keys as in `tensors`) in place of its own."""
        side = {name: named.get(f"side.{name}", x) for name, x in self.side.items()}
        own: dict[str, Any] = {k: v for k, v in named.items() if not k.startswith("side.")}
        return replace(self, side=side, **own)


_FIELDS = tuple(f.name for f in fields(Batch) if f.name != "side")
COLUMNS = ("state", "context", "action", "reward", "mask", "logp", "behavior_logp", "ref_logp", "value")


class _Columns(Mapping[str, Tensor]):
    """Side columns, gathered when first read."""

    def __init__(self, columns: Mapping[str, Tensor], index: Tensor) -> None:
        self._columns, self._index = columns, index
        self._read: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._read:
            self._read[name] = gathered_rows(self._columns[name], self._index)
        return self._read[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns)

    def __len__(self) -> int:
        return len(self._columns)
