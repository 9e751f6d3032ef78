"""A tabular MDP whose rollouts are too many to be listed: dynamic programming, and drawing position after position."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from pgcheck import truth
from pgcheck.envs.tabular import TabularMDP
from pgcheck.errors import BudgetError
from pgcheck.process import Process, ProcessSampler
from pgcheck.sampling import Stream
from pgcheck.trajectories import SideTable, Trajectories
from pgcheck.worlds.base import Policies, TruthMethod, World, as_bytes


@dataclass(frozen=True)
class Long(World):
    """`process` under `policies`."""

    process: Process
    policies: Policies

    @classmethod
    def of(cls, env: TabularMDP, contexts: Sequence[int], policies: Policies) -> Long:
        """An MDP whose states read `contexts` `[S]`."""
        return cls(Process(env, list(contexts), *policies.tables), policies)

    # -- facts

    @property
    def discount(self) -> float:
        return self.process.env.discount

    @property
    def steps(self) -> int:
        return self.process.env.horizon

    @property
    def rollouts(self) -> int:
        return self.process.env.count_paths()

    @property
    def most_decisions(self) -> int:
        return self.process.decisions[1]

    @property
    def reward_size(self) -> float:
        return self.process.reward_size

    @property
    def on_policy(self) -> bool:
        return self.process.on_policy

    @property
    def full_support(self) -> bool:
        return self.process.full_support

    @property
    def fixed_length(self) -> bool:
        least, most = self.process.decisions
        return least == most

    @property
    def one_start(self) -> bool:
        return len(self.process.env.starts) == 1

    @property
    def binary_return(self) -> bool:
        """Of returns too many to tell, no."""
        returns = self.process.returns
        return returns is not None and all(min(abs(R), abs(R - 1.0)) <= 1e-8 for R in returns)

    # -- truth

    def value(self, method: TruthMethod | None = None) -> Callable[[Tensor], Tensor]:
        if method == "enumeration":
            self.table()
        env, contexts, cost = self.process.env, self.process.contexts, self.policies.cost
        return lambda z: truth.value_by_dynamic_programming(env, z, contexts, cost(z))

    def gradient(self, method: TruthMethod) -> Tensor:
        by = truth.gradient_by_central_differences if method == "central_differences" else truth.gradient_by_autograd
        return by(self.value(method), self.policies.logits)

    def agreed_gradient(self, problem: str) -> Tensor:
        size = self.reward_size + self.policies.dearest(self.steps)
        first, second = self.gradient("dynamic_programming"), self.gradient_by_step().sum(0)
        return truth.agreed_gradient(first, second, size=size, problem=problem)

    def gradient_by_step(self) -> Tensor:
        return self.process.gradient_by_step(self.policies.cost())

    # -- rollouts

    def table(self, needs: Sequence[SideTable] = ()) -> Trajectories:
        return Trajectories.under(self.process.env.paths(), *self.policies.tables)  # which refuses, with the numbers

    def sampler(
        self, labels: Tensor, stream: Stream, *, needs: Sequence[SideTable], problem: str, device: str
    ) -> ProcessSampler:
        for need in needs:
            if not hasattr(need, "drawn"):
                raise BudgetError(
                    f"{problem}: `{type(need).__name__}` is computed from the table of all rollouts, and there are too many"
                    f" of them ({self.rollouts:.3g}); judge such an estimator on a smaller problem."
                )
        provide = tuple(need.drawn for need in needs)  # type: ignore[attr-defined]
        return ProcessSampler(self.process, labels, stream, provide, **self.policies.coefficients, device=device)

    def can_draw(self, needs: Sequence[SideTable]) -> bool:
        return all(hasattr(need, "drawn") for need in needs)

    # -- identity

    def identity(self, tables: Sequence[bytes], sizes: tuple[int, ...]) -> Iterator[bytes]:
        env, p = self.process.env, self.policies
        yield from as_bytes(env.transition, env.full_reward, env.initial, self.process.context)
        yield from tables
        facts = (env.horizon, env.discount, env.discount_clock, sorted(env.terminal), sorted(env.observation), sizes)
        yield repr((facts, p.kl_coefficient, p.entropy_coefficient)).encode()
