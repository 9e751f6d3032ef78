"""Every rollout in one table: everything is exact, and batches are rows of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from pgcheck import truth
from pgcheck.envs.tabular import TabularMDP
from pgcheck.errors import ProblemError
from pgcheck.sampling import SplitSampler, Stream, TableSampler
from pgcheck.trajectories import Paths, SideTable, Trajectories
from pgcheck.worlds.base import Policies, TruthMethod, World, as_bytes

_SOURCE = "row of the table"  # a column that says where the rows of a table come from while it is made


@dataclass(frozen=True)
class Listed(World):
    """`paths` under `policies`; `process`, where there is one: the MDP that they are of, and the context of each state."""

    paths: Paths
    policies: Policies
    process: tuple[TabularMDP, Sequence[int]] | None = None
    enumerable = True

    @classmethod
    def of(cls, env: TabularMDP, contexts: Sequence[int], policies: Policies) -> Listed:
        """An MDP whose states read `contexts` `[S]`.

        Raises:
            BudgetError: its rollouts are too many.
        """
        paths = env.paths()
        read = torch.where(paths.state >= 0, torch.tensor(list(contexts))[paths.state.clamp(min=0)], paths.state)
        return cls(replace(paths, context=read), policies, (env, contexts))

    @cached_property
    def _table(self) -> Trajectories:
        table = Trajectories.under(self.paths, *self.policies.tables)
        return replace(table, **self.policies.coefficients)

    # -- facts

    @property
    def discount(self) -> float:
        return self.paths.discount

    @property
    def steps(self) -> int:
        return self.paths.steps

    @property
    def rollouts(self) -> int:
        return len(self._table)

    @property
    def most_decisions(self) -> int:
        return int(self.paths.mask.sum(-1).max())

    @property
    def reward_size(self) -> float:
        return float(self.paths.reward.abs().sum(-1).max())

    @property
    def on_policy(self) -> bool:
        return bool(torch.allclose(self._table.logp, self._table.behavior_logp, rtol=0, atol=1e-14))

    @property
    def full_support(self) -> bool:
        return bool((self._table.behavior_probability[self._table.probability > 0] > 0).all())

    @property
    def fixed_length(self) -> bool:
        length = self.paths.mask.sum(-1)
        return bool((length == length[0]).all())

    @property
    def one_start(self) -> bool:
        return int((self.paths.start_probability > 0).sum()) == 1

    @property
    def binary_return(self) -> bool:
        R = truth.returns(self.paths)
        return bool((torch.minimum(R.abs(), (R - 1.0).abs()) <= 1e-12).all())

    # -- truth

    def value(self, method: TruthMethod | None = None) -> Callable[[Tensor], Tensor]:
        if method == "dynamic_programming":
            if self.process is None:
                raise ProblemError(
                    "method: dynamic programming needs an environment; this problem is a table of rollouts."
                )
            env, contexts = self.process
            return lambda z: truth.value_by_dynamic_programming(env, z, contexts, self.policies.cost(z))
        paths = self._table.paths  # found to fit the policies, and to sum to one
        return lambda z: truth.value_by_enumeration(paths, z, self.policies.cost(z))

    @property
    def _differentiated(self) -> Callable[[Tensor], Tensor]:
        """J, by dynamic programming if it can be."""
        return self.value("enumeration" if self.process is None else "dynamic_programming")

    def gradient(self, method: TruthMethod) -> Tensor:
        if method == "enumeration":
            return truth.gradient_by_enumeration(self._table, self.policies.cost())
        if method == "dynamic_programming":
            return truth.gradient_by_autograd(self.value(method), self.policies.logits)
        return truth.gradient_by_central_differences(self._differentiated, self.policies.logits)

    def agreed_gradient(self, problem: str) -> Tensor:
        first, second = (
            truth.gradient_by_autograd(self._differentiated, self.policies.logits),
            self.gradient("enumeration"),
        )
        kl, table = abs(self.policies.kl_coefficient), self._table
        terms = self.paths.reward.abs()  # that R is a sum of, and those of the cost, which may cancel
        terms = terms - (kl + abs(self.policies.entropy_coefficient)) * table.logp - kl * table.ref_logp
        return truth.agreed_gradient(first, second, size=float(terms.sum(-1).max()), problem=problem)

    def gradient_by_step(self) -> Tensor:
        return truth.gradient_by_step(self._table, self.policies.cost())

    # -- rollouts

    def table(self, needs: Sequence[SideTable] = ()) -> Trajectories:
        return self._with(needs)[0]

    def _with(self, needs: Sequence[SideTable]) -> tuple[Trajectories, Tensor | None]:
        """The table with what is needed; and where its rows are others, the row of the table without that each is part of."""
        if not needs:
            return self._table, None
        if (key := tuple(needs)) not in self._made:
            own = torch.arange(len(self._table))
            table = self._table.with_side(**{_SOURCE: own})
            for provide in key:
                table = provide(table)
            side = dict(table.side)
            source = side.pop(_SOURCE, own)
            self._made[key] = replace(table, side=side), None if torch.equal(source, own) else source
        return self._made[key]

    @cached_property
    def _made(self) -> dict[tuple[SideTable, ...], tuple[Trajectories, Tensor | None]]:
        return {}

    def sampler(
        self, labels: Tensor, stream: Stream, *, needs: Sequence[SideTable], problem: str, device: str
    ) -> TableSampler | SplitSampler:
        table, source = self._with(needs)
        if source is None:
            return TableSampler(table.to(device), labels, stream)
        return SplitSampler(TableSampler(self._table.to(device), labels, stream), table.to(device), source.to(device))

    def can_draw(self, needs: Sequence[SideTable]) -> bool:
        return True

    # -- identity

    def identity(self, tables: Sequence[bytes], sizes: tuple[int, ...]) -> Iterator[bytes]:
        p, _ = self.paths, self._table  # found to fit the policies
        yield from as_bytes(p.start, p.state, p.context, p.action, p.reward, p.mask)
        yield from as_bytes(p.env_probability, p.start_probability, p.end)
        yield from tables
        yield repr((float(self.discount), p.discount_clock, sizes)).encode()
        yield self.policies.priced
