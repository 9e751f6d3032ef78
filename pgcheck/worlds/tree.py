"""Every prefix of what a language model may write, in one tree: J and ∇J by two recursions, batches drawn token by token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pgcheck import truth
from pgcheck.envs.language import PrefixTree
from pgcheck.sampling import Stream, TreeSampler
from pgcheck.trajectories import SideTable
from pgcheck.worlds.base import Policies, TruthMethod, as_bytes
from pgcheck.worlds.task import OfTask


@dataclass(frozen=True)
class Tree(OfTask):
    """The tree of `task` under `policies`."""

    policies: Policies

    @property
    def tree(self) -> PrefixTree:
        """The prefixes, every completion scored."""
        return self.task.tree

    # -- facts

    @property
    def steps(self) -> int:
        return self.tree.steps

    @property
    def reward_size(self) -> float:
        return float(self.tree.reward.abs().max())

    @property
    def on_policy(self) -> bool:
        return self.policies.same_law()

    @property
    def full_support(self) -> bool:
        return bool(torch.isfinite(self.policies.behavior_logits).all())

    @property
    def binary_return(self) -> bool:
        R = self.tree.reward[self.tree.child < 0]
        return bool((torch.minimum(R.abs(), (R - 1.0).abs()) <= 1e-12).all())

    # -- truth

    def value(self, method: TruthMethod | None = None) -> Callable[[Tensor], Tensor]:
        tree, cost = self.tree, self.policies.cost
        if method == "enumeration":
            return lambda z: truth.tree_value(tree, z, cost(z))
        return lambda z: truth.tree_values(tree, z, cost(z))[1][: tree.prompts].mean()

    def gradient(self, method: TruthMethod) -> Tensor:
        if method == "dynamic_programming":
            return self.gradient_by_step().sum(0)
        by = truth.gradient_by_autograd if method == "enumeration" else truth.gradient_by_central_differences
        return by(self.value("enumeration"), self.policies.logits)

    def agreed_gradient(self, problem: str) -> Tensor:
        size = self.reward_size + self.policies.dearest(self.steps)
        first, second = self.gradient("enumeration"), self.gradient("dynamic_programming")
        return truth.agreed_gradient(first, second, size=size, problem=problem)

    def gradient_by_step(self) -> Tensor:
        return truth.tree_gradient_by_step(self.tree, self.policies.logits, self.policies.cost())

    # -- rollouts

    def sampler(
        self, labels: Tensor, stream: Stream, *, needs: Sequence[SideTable], problem: str, device: str
    ) -> TreeSampler:
        self._check_no_needs(needs, problem)
        value = truth.tree_values(self.tree, self.policies.logits)[1].to(device)
        z, behavior, ref = (x.to(device) for x in self.policies.tables)
        return TreeSampler(self.tree.to(device), z, behavior, ref, value, labels, stream, **self.policies.coefficients)

    # -- identity

    def identity(self, tables: Sequence[bytes], sizes: tuple[int, ...]) -> Iterator[bytes]:
        tree = self.tree
        yield from as_bytes(tree.context, tree.position, tree.child, tree.reward)
        yield from tables
        yield repr((self.discount, "position", sizes)).encode()
        yield self.policies.priced
