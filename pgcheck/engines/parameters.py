"""Estimates in parameters: ĝ_θ of every draw, `[M, P]`.

    ĝ_θ = (dz/dθ)ᵀ x,     x [K, A] = L C: the estimate in logits

A language model reads the rows of a draw once, and its backward pass is mapped over draws (`torch.func.vmap`), hundreds at a
time: no Python between them, and nothing of θ left out. An estimator costs a backward pass of its own, which a sketch
(`pgcheck.engines.sketch`) spares where there are many of them.

Guarantee: a model that cannot be mapped is asked draw by draw, for the same numbers; memory is predicted and refused before
it is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeVar
from weakref import WeakSet

import torch
from torch import Tensor, nn

from pgcheck.engines.moments import Moments, View
from pgcheck.engines.monte_carlo import Known
from pgcheck.errors import BudgetError, UsageError
from pgcheck.estimators.base import Estimator
from pgcheck.generation import MEMORY, Written
from pgcheck.memory import free_memory, in_bytes
from pgcheck.policies.tabular import in_parameters
from pgcheck.policies.transformer import LMPolicy
from pgcheck.problem import Problem
from pgcheck.statistics.sequential import GRAIN, Settings
from pgcheck.trajectories import Trajectories

_TOKENS_AT_ONCE = 2**15  # of mapped draws, and
_BYTES_AT_ONCE = 2**29  # that they may take
_MAPPED = 2.0  # what a mapped pass takes, of one that is not
_UNMAPPED: WeakSet[nn.Module] = WeakSet()  # models that cannot be
T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class ParameterSpace(Known):
    """x = ĝ_θ `[count, P]`, all of it."""

    problem: Problem

    def __post_init__(self) -> None:
        P = number_of_parameters(self.problem)
        if GRAIN * P * 8 > MEMORY:
            raise BudgetError(
                f"{GRAIN:,} estimates in {P:,} parameters take {GRAIN * P * 8 / 2**30:.1f} GiB; {MEMORY / 2**30:.0f} GiB are"
                " allowed. Take a sketch: pgcheck.SketchSpace.of(problem, directions=32)."
            )

    @cached_property
    def reference(self) -> Tensor:
        """∇_θ J.

        Raises:
            BudgetError: not even the prefixes of the task can be listed.
        """
        return self.problem.parameter_gradient()

    def project(self, c: Tensor, table: Trajectories, index: Tensor) -> Tensor:
        """ĝ_θ `[M, P]` of the batches `index` `[M, B]` with coefficients `c` `[M, B, T]` (`[M, B, T, A]`: on logits)."""
        x = by_rows(c, table, index, self.problem, self)
        return by_draws(c, table, index, self.problem) if x is None else x

    def seen(self, x: Tensor) -> Tensor:
        """Itself."""
        return x

    def shows(self, beta: float) -> float:
        """All of it."""
        return 1.0

    def view(self, shown: float = 1.0) -> View:
        """All of θ."""
        reference = None if self.problem.written else self.reference
        return View(reference, number_of_parameters(self.problem), shown=shown)

    def said(self, moments: Moments, view: View) -> Moments:
        """With where it is."""
        return as_seen(moments, view)

    def told(self, moments: Moments, asked: Settings, e: Estimator) -> Moments:
        """With where it is."""
        return self.said(moments, self.view())


def as_seen(moments: Moments, view: View) -> Moments:
    """The moments with `view`; and what a bias could have missed, as a part of all of its length."""
    told = {
        κ: replace(
            j, missed=j.missed / view.shown, missed_bias=j.missed_bias / view.shown, allowed=j.allowed / view.shown
        )
        for κ, j in moments.judgements.items()
    }
    return replace(moments, view=view, judgements=told)


def tightened(asked: Settings, shown: float) -> Settings:
    """The settings of a judge who sees at least `shown` of a bias's length, at half of the error rate asked for; the other
    half is that of `shown`."""
    return replace(asked, rtol=asked.rtol * shown, atol=asked.atol * shown, beta=asked.beta / 2)


def number_of_parameters(problem: Problem) -> int:
    """P.

    Raises:
        UsageError: the policy has none.
    """
    found = sum(p.numel() for p in problem.policy.parameters())
    if not found:
        raise UsageError("policy: it has no parameters, so there is nothing to take a gradient in.")
    return found


def policy_of(table: Trajectories, problem: Problem) -> nn.Module:
    """The policy over the contexts of a table."""
    return table.policy if isinstance(table, Written) else problem.policy


def kept_for(owner: object, name: str, key: tuple[object, ...], make: Callable[[], T]) -> T:
    """What was made last for the same objects: estimators come one after the other with the same rollouts."""
    last, found = owner.__dict__.get(f"_last_{name}", ((), None))
    if len(last) != len(key) or any(a is not b for a, b in zip(last, key, strict=True)):
        found = make()
        owner.__dict__[f"_last_{name}"] = key, found
    return found


def by_rows(
    c: Tensor, table: Trajectories, index: Tensor, problem: Problem, owner: object, onto: Tensor | None = None
) -> Tensor | None:
    """ĝ_θ `[M, P]` of the batches `index` `[M, B]`, or its products `[M, R]` with directions `onto` `[P, R]`, as sums of rows,
    which `owner` keeps for the next estimator; None: coefficients differ within a row, or rows are too many."""
    if not isinstance(policy_of(table, problem), LMPolicy) or (weight := _weights_of_rows(c, table, index)) is None:
        return None
    width = number_of_parameters(problem) if onto is None else onto.shape[1]
    rows = kept_for(owner, "rows", (table,), lambda: _rows_in_parameters(table, problem, onto, width, index.numel()))
    if rows is None:
        return None
    scores, place = rows
    return nn.functional.embedding_bag(place[index], scores, mode="sum", per_sample_weights=weight)


def by_draws(c: Tensor, table: Trajectories, index: Tensor, problem: Problem, onto: Tensor | None = None) -> Tensor:
    """The same, each batch by itself."""
    out: Tensor | None = None
    for which, x in estimates_in_parameters(c, table, index, problem, onto):
        out = x.new_empty(len(c), x.shape[1]) if out is None else out
        out[which] = x
    assert out is not None
    return out


def _weights_of_rows(c: Tensor, table: Trajectories, index: Tensor) -> Tensor | None:
    """The coefficient of each row `[M, B]`; None: there are several in one."""
    if c.dim() > 3:
        return None
    acts, c = table.paths.mask[index] > 0, c.to(torch.float64)
    first = c.gather(-1, acts.to(torch.uint8).argmax(-1, keepdim=True))
    return first.squeeze(-1) if bool(((c == first) | ~acts).all()) else None


def _rows_in_parameters(
    table: Trajectories, problem: Problem, onto: Tensor | None, width: int, most: int
) -> tuple[Tensor, Tensor] | None:
    """Σ_t ∇log π(a_t | k_t) of the distinct rows of a table, `[n, width]`, and which of them each row is; None: more than
    `most`, or than fit."""
    p = table.paths
    every = torch.arange(len(table), device=p.context.device)
    last = p.context[every, p.end - 1], p.action[every, p.end - 1]
    own, place = torch.unique(torch.stack([p.start, *last], 1), dim=0, return_inverse=True)
    if len(own) > most or len(own) * width * 8 > _BYTES_AT_ONCE / 2:
        return None
    rows = every.new_zeros(len(own)).scatter_reduce_(0, place, every, "amin", include_self=False)
    out = torch.empty(len(own), width, dtype=torch.float64, device=table.logits.device)
    for which, x in estimates_in_parameters(p.mask[rows].unsqueeze(1), table, rows.unsqueeze(1), problem, onto):
        out[which] = x
    return out, place


def estimates_in_parameters(
    c: Tensor, table: Trajectories, index: Tensor, problem: Problem, onto: Tensor | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Numbers of some batches `[m]` and their ĝ_θ `[m, P]` (with directions `onto` `[P, R]`: `[m, R]`), until all had their
    turn: at once if the model can be mapped, else each by itself."""
    policy = policy_of(table, problem)
    if not isinstance(policy, LMPolicy):
        for m, x in enumerate(one_by_one(c, table, index, policy)):
            yield torch.tensor([m], device=index.device), x if onto is None else x @ onto
        return
    plan = _Plan.of(policy, rows=index.shape[1], actions=table.actions, width=0 if onto is None else onto.shape[1])
    where = policy.where.to(index.device)
    last = table.paths.context[index, table.paths.end[index] - 1]
    longest = 1 + where[1][last].amax(-1)  # tokens of each batch's longest row
    order = longest.argsort(stable=True)
    low = 0
    while low < len(order):
        size = plan.fits(int(longest[order[low]]))
        size = plan.fits(int(longest[order[min(low + size, len(order)) - 1]]))  # those that follow are longer
        which = order[low : low + size]
        low += size
        weights, rows, found = c[which], index[which], None
        if len(which) > 1 and policy.model not in _UNMAPPED:
            try:
                found = _mapped(weights, table, rows, policy, int(longest[which[-1]]), onto)
            except (RuntimeError, NotImplementedError):  # it was called before, unmapped, and said nothing
                _UNMAPPED.add(policy.model)
        if found is None:
            found = torch.cat(list(one_by_one(weights, table, rows, policy)))
            found = found if onto is None else found @ onto
        yield which, found


@dataclass(frozen=True)
class _Plan:
    """How many batches are mapped at once: their activations, as a straight line in the tokens, and gradients."""

    rows: int  # of a batch
    actions: int
    parameters: int
    of_token: float  # bytes that a backward pass keeps
    onto: int  # directions; 0: gradients themselves are wanted
    free: int

    @classmethod
    def of(cls, policy: LMPolicy, *, rows: int, actions: int, width: int) -> _Plan:
        """Of the policy's rows, as long as they can be."""
        L, device = policy.tokens.shape[1], policy.tokens.device
        P = sum(p.numel() for p in policy.parameters())
        return cls(rows, actions, P, _MAPPED * policy.bytes_of_row() / L, width, free_memory(device))

    def bytes_of(self, batches: int, longest: int) -> float:
        """What a backward pass mapped over so many batches takes at its peak."""
        tokens = self.rows * longest
        return batches * (tokens * (self.of_token + 24 * self.actions) + 8 * self.parameters * (1 if self.onto else 2))

    def fits(self, longest: int) -> int:
        """Batches at once, with so many tokens a row.

        Raises:
            BudgetError: not even one.
        """
        each = self.bytes_of(1, longest)
        if each > self.free / 2:
            raise BudgetError(
                f"group_size: a backward pass of one batch of {self.rows} rows of {longest} tokens through a model of"
                f" {self.parameters:,} weights takes {in_bytes(each)}; {in_bytes(self.free)} are free, of which half may be"
                " taken. Take smaller groups, shorter texts or a smaller model."
            )
        room = min(_BYTES_AT_ONCE, self.free / 2)
        return max(1, min(_TOKENS_AT_ONCE // (self.rows * longest), int(room / each)))


class _Reader(nn.Module):
    """A language model on rows of tokens, the actions' logits alone."""

    def __init__(self, policy: LMPolicy) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, tokens: Tensor, length: Tensor) -> Tensor:
        return self.policy.says(tokens, length)


def _mapped(
    c: Tensor, table: Trajectories, index: Tensor, policy: LMPolicy, longest: int, onto: Tensor | None
) -> Tensor:
    """One backward pass, mapped over batches: each reads the rows on whose way its own contexts lie, `longest` tokens of
    them."""
    paths, A = table.paths, table.actions
    named = {name: p.detach() for name, p in _Reader(policy).named_parameters()}
    home = next(iter(named.values())).device
    rows, acts = index.to(policy.where.device), paths.mask[index] > 0
    context = paths.context[index].clamp(min=0)
    last = context.gather(2, (paths.end[index] - 1).unsqueeze(-1)).squeeze(-1).to(rows.device)
    text = policy.where[0, last]
    tokens, length = policy.tokens[text, :longest], policy.length[text].clamp(max=longest)
    place = policy.where[1][context.to(rows.device)].to(c.device) - policy.first
    x = c.to(torch.float64)
    if c.dim() == 3:
        x = -torch.softmax(table.logits, -1)[context] * c.unsqueeze(-1)
        x.scatter_add_(-1, paths.action[index].clamp(min=0).unsqueeze(-1), c.to(torch.float64).unsqueeze(-1))
    weight = x.new_zeros(*index.shape, tokens.shape[-1] - policy.first, A)
    weight.scatter_add_(2, place.clamp(min=0).unsqueeze(-1).expand_as(x), torch.where(acts.unsqueeze(-1), x, 0.0))
    reader = _Reader(policy)

    def value(parameters: dict[str, Tensor], tokens: Tensor, length: Tensor, weight: Tensor) -> Tensor:
        z: Tensor = torch.func.functional_call(reader, parameters, (tokens, length))
        return (z * weight.to(z.device, z.dtype)).sum()

    found = torch.func.vmap(torch.func.grad(value), in_dims=(None, 0, 0, 0))(
        named, tokens.to(home), length.to(home), weight
    )
    if onto is None:
        return torch.cat([g.flatten(1) for g in found.values()], 1).to(c.device)
    parts = onto.to(home).split([p.numel() for p in named.values()])
    out = torch.zeros(len(c), onto.shape[1], dtype=torch.float64, device=home)
    for g, v in zip(found.values(), parts, strict=True):
        out.addmm_(g.flatten(1), v)
    return out.to(c.device)


def one_by_one(c: Tensor, table: Trajectories, index: Tensor, policy: nn.Module) -> Iterator[Tensor]:
    """ĝ_θ `[1, P]` of one batch after the other: its C (`pgcheck.engines.coefficients`) and a backward pass."""
    for weights, rows in zip(c, index, strict=True):
        yield total_in_parameters(weights, table, rows, policy).unsqueeze(0)


def total_in_parameters(c: Tensor, table: Trajectories, rows: Tensor, policy: nn.Module) -> Tensor:
    """Σ of what rows `rows` `[n]` of a table give with coefficients `c` `[n, T]` (`[n, T, A]`), `[P]`: one backward pass."""
    A, home = table.actions, next(policy.parameters()).device
    acts = table.paths.mask[rows] > 0
    contexts, where = torch.unique(table.paths.context[rows][acts], return_inverse=True)
    x = torch.zeros(len(contexts), A, dtype=torch.float64, device=c.device)
    if c.dim() == 3:
        x.index_add_(0, where, c[acts].to(torch.float64))
    else:
        cell = where * A + table.paths.action[rows][acts]
        x.view(-1).index_add_(0, cell, c[acts].to(torch.float64))
        x -= torch.softmax(table.logits[contexts], -1) * x.sum(-1, keepdim=True)
    contexts, x = contexts.to(home), x.to(home)
    if isinstance(policy, LMPolicy):
        found = in_parameters(policy.at(contexts), x)
    else:
        found = in_parameters(policy, torch.zeros_like(table.logits, device=home).index_copy_(0, contexts, x))
    return found.to(c.device)
