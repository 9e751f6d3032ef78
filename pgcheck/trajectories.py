"""Tables of everything that can happen: `Paths` (what the environment allows) and `Trajectories` (with a policy).

A finite problem is a table of N distinct rollouts. `Paths` has what the environment decides; `Trajectories.under` adds,
for a pair of policies, each row's probability given its start, its log-probabilities and the exact value function. A
batch is rows of that table: `Trajectories.batch` gathers them for M batches at once.

Guarantee: probabilities given each start sum to one under the target policy (checked at 1e-9), and so do those of the
behaviour policy; the table is float64.
"""

from __future__ import annotations

import functools
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from pgcheck.batch import COLUMNS, DISCOUNT_CLOCKS, Batch, DiscountClock, Late
from pgcheck.errors import ProblemError


@dataclass(frozen=True)
class Paths(Late):
    """N distinct rollouts as the environment allows them; -1 stands for "no policy input here", "no action here".

    Args:
        start: `[N]`, index of the start state or prompt in `start_probability`.
        state, context, action: `[N, T]`.
        reward, mask: `[N, T]`.
        env_probability: `[N]`, the product of the environment's own transition probabilities given the start.
        start_probability: `[starts]`.
        discount: γ in [0, 1].
        discount_clock: what γ counts, `"position"` or `"action"` (see `Batch.clock`).
        end: `[N]`, number of real positions (policy or observation) of a row; what follows is padding. Default: up to
            the last position with a mask or a reward.

    Raises:
        ProblemError: naming the column, the row and the mend.
    """

    start: Tensor
    state: Tensor
    context: Tensor
    action: Tensor
    reward: Tensor
    mask: Tensor
    env_probability: Tensor
    start_probability: Tensor
    discount: float = 1.0
    discount_clock: DiscountClock = "position"
    end: Tensor = field(default_factory=lambda: None)  # type: ignore[assignment]  # filled in __post_init__

    def __post_init__(self) -> None:
        for name in ("start", "state", "context", "action"):
            self._set(name, as_table(name, getattr(self, name), dtype=torch.int64))
        for name in ("reward", "mask", "env_probability", "start_probability"):
            self._set(name, as_table(name, getattr(self, name)))
        shape = tuple(self.reward.shape)
        if len(shape) != 2 or 0 in shape:
            raise ProblemError(f"reward: shape {shape}, expected [N, T] with at least one trajectory and one position.")
        for name in ("state", "context", "action", "mask"):
            if tuple(getattr(self, name).shape) != shape:
                raise ProblemError(
                    f"{name}: shape {tuple(getattr(self, name).shape)}, expected {shape} as `reward` has."
                )
        for name in ("start", "env_probability"):
            if tuple(getattr(self, name).shape) != shape[:1]:
                raise ProblemError(f"{name}: shape {tuple(getattr(self, name).shape)}, expected {shape[:1]}.")
        if self.end is None:
            real = (self.mask != 0) | (self.reward != 0)
            self._set("end", (real * torch.arange(1, shape[1] + 1, device=real.device)).amax(-1).clamp(min=1))
        self._set("end", as_table("end", self.end, dtype=torch.int64))
        if tuple(self.end.shape) != shape[:1]:
            raise ProblemError(f"end: shape {tuple(self.end.shape)}, expected {shape[:1]}.")
        self._check_values()

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _check_values(self) -> None:
        if not isinstance(self.discount, (int, float)) or not 0.0 <= self.discount <= 1.0:
            raise ProblemError(f"discount: {self.discount!r} is outside [0, 1].")
        if self.discount_clock not in DISCOUNT_CLOCKS:
            raise ProblemError(f"discount_clock: {self.discount_clock!r} is not one of {', '.join(DISCOUNT_CLOCKS)}.")
        if not bool(torch.isfinite(self.reward).all()):
            n, t = (int(i) for i in (~torch.isfinite(self.reward)).nonzero()[0])
            raise ProblemError(
                f"reward: trajectory {n}, position {t} is {float(self.reward[n, t])}; it must be finite."
            )
        odd = (self.mask != 0) & (self.mask != 1)
        if bool(odd.any()):
            raise ProblemError(f"mask: has an entry {float(self.mask[odd][0])}; entries must be 0 or 1.")
        p = self.env_probability
        wrong = ~((p >= 0) & (p <= 1 + 1e-9))  # a NaN is wrong, too
        if bool(wrong.any()):
            n = int(wrong.nonzero()[0, 0])
            raise ProblemError(f"env_probability: trajectory {n} has {float(p[n])}; it must be a probability.")
        real = ((self.mask != 0) | (self.reward != 0)) * torch.arange(1, self.steps + 1, device=self.mask.device)
        outside = (self.end < real.amax(-1).clamp(min=1)) | (self.end > self.steps)
        if bool(outside.any()):
            n = int(outside.nonzero()[0, 0])
            raise ProblemError(
                f"end: trajectory {n} ends after {int(self.end[n])} positions; it must be at least"
                f" {max(int(real[n].max()), 1)}, its last mask or reward, and at most T = {self.steps}."
            )
        acts = self.mask == 1
        for name in ("state", "context", "action"):
            column = getattr(self, name)
            if not bool(((column >= 0) == acts).all()):
                n, t = (int(i) for i in ((column >= 0) != acts).nonzero()[0])
                raise ProblemError(
                    f"{name}: trajectory {n}, position {t} is {int(column[n, t])} where mask is {int(self.mask[n, t])};"
                    " it must be ≥ 0 where mask is 1 and -1 where mask is 0."
                )
        check_distribution("start_probability", self.start_probability)
        unknown = (self.start < 0) | (self.start >= len(self.start_probability))
        if bool(unknown.any()):
            first = int(self.start[unknown][0])
            raise ProblemError(f"start: has an entry {first}; entries must lie in [0, {len(self.start_probability)}).")

    @property
    def steps(self) -> int:
        """T, the number of positions of a row."""
        return int(self.reward.shape[1])

    def __len__(self) -> int:
        return int(self.reward.shape[0])


def is_count(x: Any) -> bool:
    """An integer, Python's or numpy's, of at least 1."""
    return isinstance(x, Integral) and not isinstance(x, bool) and int(x) >= 1


def as_table(name: str, x: Any, *, dtype: torch.dtype = torch.float64) -> Tensor:
    """`x` as a tensor of its own.

    Raises:
        ProblemError: naming the argument, if it cannot be read as an array of numbers.
    """
    try:
        return torch.as_tensor(x, dtype=dtype).detach().clone()
    except (TypeError, ValueError, RuntimeError):
        raise ProblemError(f"{name}: cannot be read as an array of numbers: {reprlib.repr(x)}.") from None


def check_distribution(name: str, row: Tensor) -> None:
    """Raise `ProblemError` unless `row` `[n]` is a probability vector (sum within 1e-9 of one)."""
    if not bool(torch.isfinite(row).all()):
        raise ProblemError(f"{name}: has an entry that is not finite: {row.tolist()}.")
    if bool((row < 0).any()):
        raise ProblemError(f"{name}: has a negative probability {float(row.min())}.")
    total = float(row.sum())
    if abs(total - 1.0) > 1e-9:
        raise ProblemError(f"{name}: sums to {total:.12g}, not to 1; divide it by its sum if that is what you mean.")


def row_logp(logits: Tensor, context: Tensor, action: Tensor, mask: Tensor) -> Tensor:
    """log π(a | k) at every position, 0 where mask is 0; `logits` `[K, A]`, the rest `[..., T]`."""
    logp = torch.log_softmax(logits, -1)[context.clamp(min=0), action.clamp(min=0)]
    return torch.where(mask > 0, logp, torch.zeros_like(logp))


@dataclass(frozen=True)
class Trajectories(Late):
    """`Paths` under a target, a behaviour and a reference policy: everything a batch is gathered from."""

    paths: Paths
    logits: Tensor  # [K, A] of the target policy
    logp: Tensor  # [N, T]
    behavior_logp: Tensor  # [N, T]
    ref_logp: Tensor  # [N, T]
    value: Tensor  # [N, T+1]
    probability: Tensor  # [N] given the start, under the target policy; NaN in a table of rollouts that were drawn
    behavior_probability: Tensor  # [N] given the start, under the policy that draws the batches
    kl_coefficient: float = 0.0  # β and α of the objective, for the batches
    entropy_coefficient: float = 0.0
    side: Mapping[str, Tensor] = field(default_factory=dict)  # [N, *]

    @classmethod
    def under(cls, paths: Paths, logits: Tensor, behavior_logits: Tensor, ref_logits: Tensor) -> Trajectories:
        """The table of `paths` under three policies given by their logits `[K, A]`.

        Raises:
            ProblemError: the paths of a start do not sum to one (some are missing, or a probability is wrong).
        """
        contexts, actions = logits.shape
        if not bool((paths.mask > 0).any()):
            raise ProblemError("mask: the policy never acts in any rollout, so there is no gradient to estimate.")
        if int(paths.context.max()) >= contexts or int(paths.action.max()) >= actions:
            raise ProblemError(
                f"policy_logits: shape [{contexts}, {actions}], but the trajectories use context "
                f"{int(paths.context.max())} and action {int(paths.action.max())}."
            )
        where = (paths.context, paths.action, paths.mask)
        logp, behavior, ref = (row_logp(z, *where) for z in (logits, behavior_logits, ref_logits))
        probability = paths.env_probability * logp.sum(-1).exp()
        behavior_probability = paths.env_probability * behavior.sum(-1).exp()
        for name, p in (("policy", probability), ("behavior policy", behavior_probability)):
            total = torch.zeros_like(paths.start_probability).index_add_(0, paths.start, p)
            wrong = ((total - 1.0).abs() > 1e-9) & (paths.start_probability > 0)
            if bool(wrong.any()):
                s = int(wrong.nonzero()[0, 0])
                raise ProblemError(
                    f"trajectories of start {s}: probabilities under the {name} sum to {float(total[s]):.12g}, not to 1;"
                    " some trajectories are missing or `env_probability` is wrong."
                )
        return cls(
            paths=paths, logits=logits, logp=logp, behavior_logp=behavior, ref_logp=ref,
            value=_values(paths, probability), probability=probability, behavior_probability=behavior_probability,
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def contexts(self) -> int:
        """K."""
        return int(self.logits.shape[0])

    @property
    def actions(self) -> int:
        """A."""
        return int(self.logits.shape[1])

    def rows_as_batch(self) -> Batch:
        """The whole table as one batch `[N, T]`, every row a group of its own."""
        return self._table

    @cached_property
    def _table(self) -> Batch:
        p, own = self.paths, ("logp", "behavior_logp", "ref_logp", "value")
        later = {name: functools.partial(getattr, p, name) for name in COLUMNS if name not in own}
        later |= {name: make for name, make in vars(self).get("_later", {}).items() if name in own}
        known: dict[str, Any] = {name: getattr(self, name) for name in own if name not in later}
        return Batch.known(
            later, **known, group=torch.arange(len(self)), discount=p.discount, discount_clock=p.discount_clock,
            kl_coefficient=self.kl_coefficient, entropy_coefficient=self.entropy_coefficient, side=self.side,
            action_logits=None, lists_all=not bool(self.probability.isnan().any()),
        )  # fmt: skip

    @cached_property
    def _table_with_logits(self) -> Batch:
        return replace(self._table, action_logits=self.logits[self.paths.context.clamp(min=0)])

    @cached_property
    def cell(self) -> Tensor:
        """Index of (context, action) among the K·A cells, `[N, T]`; any where the policy does not act."""
        if "cell" in (later := vars(self).get("_later", {})):
            return later["cell"]()
        return self.paths.context.clamp(min=0) * self.actions + self.paths.action.clamp(min=0)

    @cached_property
    def logit_cells(self) -> Tensor:
        """Indices of all actions of the context among the K·A cells, `[N, T, A]`."""
        return (self.paths.context.clamp(min=0) * self.actions).unsqueeze(-1) + torch.arange(
            self.actions, device=self.logits.device
        )

    def batch(self, index: Tensor, group: Tensor, *, logits: bool = False) -> Batch:
        """Gather rows `index` `[..., B]` into a batch; `group` `[B]` labels the rows."""
        return Batch.gathered(self._table_with_logits if logits else self._table, index, group)

    def take(self, rows: Tensor) -> Trajectories:
        """The table of `rows` `[N']` only (repeats allowed); probabilities are carried along, not renormalised."""
        columns = ("start", "state", "context", "action", "reward", "mask", "env_probability", "end")
        paths = replace(self.paths, **{name: getattr(self.paths, name)[rows] for name in columns})
        per_row = ("logp", "behavior_logp", "ref_logp", "value", "probability", "behavior_probability")
        return replace(
            self,
            paths=paths,
            side={name: x[rows] for name, x in self.side.items()},
            **{name: getattr(self, name)[rows] for name in per_row},
        )

    def to(self, device: str) -> Trajectories:
        """The table in the memory of a device; itself, if it is there already."""
        if self.logits.device == torch.device(device):
            return self
        there: dict[str, Any] = {f.name: getattr(self.paths, f.name) for f in fields(self.paths)}
        there = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in there.items()}
        moved: dict[str, Any] = {
            f.name: x.to(device) for f in fields(self) if isinstance(x := getattr(self, f.name), Tensor)
        }
        return replace(
            self, paths=Paths.known(**there), side={name: x.to(device) for name, x in self.side.items()}, **moved
        )

    def with_side(self, **columns: Tensor) -> Trajectories:
        """The table with side columns `[N, *]` added."""
        return replace(self, side={**self.side, **columns})


def conditional_mean(x: Tensor, weight: Tensor, keys: Sequence[tuple[Any, ...]]) -> Tensor:
    """E[x | key] for every row: `x` `[n]`, `weight` `[n]`, one hashable key a row; 0 where a key has no weight."""
    ids: dict[tuple[Any, ...], int] = {}
    index = torch.tensor([ids.setdefault(key, len(ids)) for key in keys], dtype=torch.int64)
    zero = torch.zeros(len(ids), dtype=x.dtype)
    total = zero.index_add(0, index, weight)
    mean = zero.index_add(0, index, weight * x) / total.where(total > 0, torch.ones_like(total))
    return mean[index]


def _values(paths: Paths, probability: Tensor) -> Tensor:
    """V^π at every position, `[N, T+1]`: E[Ĝ_t | state, t] where the policy acts; on an observation position
    E[Ĝ_t | the states and actions before it]; 0 after the end."""
    weight = probability * paths.start_probability[paths.start]
    rows = Batch(
        state=paths.state, context=paths.context, action=paths.action, reward=paths.reward, mask=paths.mask,
        logp=paths.reward, behavior_logp=paths.reward, ref_logp=paths.reward, value=paths.reward, group=paths.start,
        discount=paths.discount, discount_clock=paths.discount_clock,
    )  # fmt: skip
    to_go = rows.reward_to_go
    state, action, start, end = (x.tolist() for x in (paths.state, paths.action, paths.start, paths.end))
    out = torch.zeros(len(paths), paths.steps + 1, dtype=torch.float64)
    for t in range(paths.steps):
        keys: list[tuple[Any, ...]] = []
        for n in range(len(paths)):
            if t >= end[n]:
                keys.append(("end",))
            elif state[n][t] >= 0:
                keys.append(("state", state[n][t]))
            else:
                keys.append(("history", start[n], *state[n][:t], *action[n][:t]))
        alive = (paths.end > t).to(torch.float64)
        out[:, t] = conditional_mean(to_go[:, t], weight, keys) * alive
    return out


SideTable = Callable[[Trajectories], Trajectories]
# What an estimator needs beyond the rows: adds side columns to the table, or (auxiliary draws) splits its rows.
