"""`World`: what a problem asks of an environment under its policies, and `Policies`, three of them over the same contexts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from pgcheck import truth
from pgcheck.sampling import Sampler, Stream
from pgcheck.trajectories import SideTable, Trajectories

TruthMethod = Literal["dynamic_programming", "enumeration", "central_differences"]


@dataclass(frozen=True)
class Policies:
    """The target, the behaviour and the reference policy, `[K, A]` logits each, and the coefficients of the objective's KL
    term (β, target to reference) and entropy term (α)."""

    logits: Tensor
    behavior_logits: Tensor
    ref_logits: Tensor
    kl_coefficient: float = 0.0
    entropy_coefficient: float = 0.0

    @property
    def tables(self) -> tuple[Tensor, Tensor, Tensor]:
        """The three tables of logits."""
        return self.logits, self.behavior_logits, self.ref_logits

    @property
    def coefficients(self) -> dict[str, Any]:
        """β and α, by the names that a batch has them under."""
        return {"kl_coefficient": self.kl_coefficient, "entropy_coefficient": self.entropy_coefficient}

    def cost(self, logits: Tensor | None = None) -> Tensor | None:
        """What each action costs in J under `logits` (default: the target's), `[K, A]`; None: nothing."""
        z = self.logits if logits is None else logits
        return truth.action_cost(z, self.ref_logits, kl=self.kl_coefficient, entropy=self.entropy_coefficient)

    @property
    def priced(self) -> bytes:
        """The coefficients, as a problem's identity has them."""
        return b"" if self.plain_objective else repr((self.kl_coefficient, self.entropy_coefficient)).encode()

    @property
    def plain_objective(self) -> bool:
        """The objective is the return alone."""
        return self.kl_coefficient == 0 and self.entropy_coefficient == 0

    def same_law(self, contexts: Tensor | slice = slice(None)) -> bool:
        """Target and behaviour agree in log π, in those contexts."""
        a, b = (torch.log_softmax(z, -1)[contexts] for z in (self.logits, self.behavior_logits))
        return bool(torch.allclose(a, b, rtol=0, atol=1e-14))

    def dearest(self, steps: int) -> float:
        """The most that a rollout of `steps` positions pays, in absolute value."""
        cost = self.cost()
        return 0.0 if cost is None else steps * float(cost.abs().max())


class World(ABC):
    """An environment under its policies."""

    enumerable: ClassVar[bool] = False  # every rollout is in `table()`

    # -- facts

    @property
    @abstractmethod
    def discount(self) -> float:
        """γ."""

    @property
    @abstractmethod
    def steps(self) -> int:
        """T, the number of positions of a row."""

    @property
    @abstractmethod
    def rollouts(self) -> int:
        """N, the number of distinct rollouts; of those that are too many to be listed, before merging."""

    @property
    @abstractmethod
    def most_decisions(self) -> int:
        """The most policy positions of a rollout."""

    @property
    @abstractmethod
    def reward_size(self) -> float | None:
        """The largest Σ_t |r_t| of a rollout; None: not known."""

    @property
    @abstractmethod
    def on_policy(self) -> bool:
        """The behaviour policy is the target policy."""

    @property
    @abstractmethod
    def full_support(self) -> bool:
        """Every rollout the target policy can produce, the behaviour policy can produce."""

    @property
    @abstractmethod
    def fixed_length(self) -> bool:
        """Every rollout has the same number of policy positions."""

    @property
    @abstractmethod
    def one_start(self) -> bool:
        """Every rollout begins in the same start state, or from the same prompt."""

    @property
    @abstractmethod
    def binary_return(self) -> bool:
        """Every rollout is known to return 0 or 1, to rounding."""

    # -- truth

    @abstractmethod
    def value(self, method: TruthMethod | None = None) -> Callable[[Tensor], Tensor]:
        """J as a function of the target's logits `[K, A]`, differentiable in them."""

    @abstractmethod
    def gradient(self, method: TruthMethod) -> Tensor:
        """∇J in logit space, `[K, A]`."""

    @abstractmethod
    def agreed_gradient(self, problem: str) -> Tensor:
        """∇J, `[K, A]`, as two derivations have it; `problem` is named where they differ.

        Raises:
            TruthError: they differ.
        """

    @abstractmethod
    def gradient_by_step(self) -> Tensor:
        """E[γ^t Ĝ_t ∇log π(a_t | k_t)] of each position, `[T, K, A]`; their sum is ∇J."""

    # -- rollouts

    @abstractmethod
    def table(self, needs: Sequence[SideTable] = ()) -> Trajectories:
        """Every rollout, with the side columns (and auxiliary draws) that an estimator `needs`.

        Raises:
            BudgetError: they are too many.
        """

    @abstractmethod
    def sampler(
        self, labels: Tensor, stream: Stream, *, needs: Sequence[SideTable], problem: str, device: str
    ) -> Sampler:
        """Numbered draws of batches whose rows are in the groups `labels` `[B]`, with what an estimator `needs`.

        Raises:
            BudgetError: it cannot be had; `problem` is named.
        """

    def can_draw(self, needs: Sequence[SideTable]) -> bool:
        """Whether the sampler can give what an estimator `needs`."""
        return not needs

    # -- identity

    @abstractmethod
    def identity(self, tables: Sequence[bytes], sizes: tuple[int, ...]) -> Iterator[bytes]:
        """Everything that decides an expectation; `tables` of logits as the problem has them, `sizes` of the groups."""


def as_bytes(*columns: Tensor) -> Iterator[bytes]:
    """The numbers of each."""
    for x in columns:
        yield x.detach().cpu().contiguous().view(-1).numpy().tobytes()
