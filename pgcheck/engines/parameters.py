"""Estimates in parameters: ĝ_θ of every draw, `[M, P]`.

    ĝ_θ = (dz/dθ)ᵀ x,     x [K, A] = L C: the estimate in logits

A language model reads the rows of a draw once, and its backward pass is mapped over draws (`torch.func.vmap`), hundreds at a
time: no Python between them, and nothing of θ left out. An estimator costs a backward pass of its own, which a sketch
(`pgcheck.engines.sketch`) spares where there are many of them.

Guarantee: a model that cannot be mapped is asked draw by draw, for the same numbers; memory is predicted and refused before
it is taken.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from weakref import WeakSet

import torch
from torch import Tensor, nn

from pgcheck.engines.moments import Moments, View
from pgcheck.engines.monte_carlo import Known
from pgcheck.errors import BudgetError, UsageError
from pgcheck.generation import MEMORY, Written
from pgcheck.policies.tabular import in_parameters
from pgcheck.policies.transformer import LMPolicy
from pgcheck.problem import Problem
from pgcheck.statistics.sequential import GRAIN, Settings
from pgcheck.trajectories import Trajectories

_TOKENS_AT_ONCE = 2**15  # of mapped draws, and
_BYTES_AT_ONCE = 2**28  # that their gradients and weights may take
_UNMAPPED: WeakSet[nn.Module] = WeakSet()  # models that cannot be


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
        return torch.cat(list(estimates_in_parameters(c, table, index, self.problem)))

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

    def told(self, moments: Moments, asked: Settings) -> Moments:
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


def estimates_in_parameters(c: Tensor, table: Trajectories, index: Tensor, problem: Problem) -> Iterator[Tensor]:
    """ĝ_θ `[m, P]` of some batches after the other: at once if the model can be mapped, else each by itself."""
    policy = policy_of(table, problem)
    if not isinstance(policy, LMPolicy):
        yield from one_by_one(c, table, index, policy)
        return
    P = sum(p.numel() for p in policy.parameters())
    tokens = index.shape[1] * policy.tokens.shape[1]
    size = max(1, min(_TOKENS_AT_ONCE // tokens, _BYTES_AT_ONCE // (8 * (3 * P + 2 * tokens * table.actions))))
    for weights, rows in zip(c.split(size), index.split(size), strict=True):
        found = None
        if size > 1 and policy.model not in _UNMAPPED:
            try:
                found = _mapped(weights, table, rows, policy)
            except (RuntimeError, NotImplementedError):  # it was called before, unmapped, and said nothing
                _UNMAPPED.add(policy.model)
        yield torch.cat(list(one_by_one(weights, table, rows, policy))) if found is None else found


class _Reader(nn.Module):
    """A language model on rows of tokens, the actions' logits alone."""

    def __init__(self, policy: LMPolicy) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, tokens: Tensor, length: Tensor) -> Tensor:
        return self.policy.says(tokens, length)


def _mapped(c: Tensor, table: Trajectories, index: Tensor, policy: LMPolicy) -> Tensor:
    """One backward pass, mapped over batches: each reads the rows on whose way its own contexts lie."""
    paths, A = table.paths, table.actions
    named = {name: p.detach() for name, p in _Reader(policy).named_parameters()}
    home = next(iter(named.values())).device
    rows, acts = index.to(policy.where.device), paths.mask[index] > 0
    context = paths.context[index].clamp(min=0)
    last = context.gather(2, (paths.end[index] - 1).unsqueeze(-1)).squeeze(-1).to(rows.device)
    text = policy.where[0, last]
    tokens, length = policy.tokens[text], policy.length[text]
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
    return torch.cat([g.flatten(1) for g in found.values()], 1).to(c.device)


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
