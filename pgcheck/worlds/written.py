"""Nothing can be listed: a language model writes the completions itself, and what is known is what was written."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NoReturn, TypeVar

import torch
from torch import Tensor, nn

from pgcheck.errors import BudgetError
from pgcheck.fingerprint import described
from pgcheck.generation import WritingSampler
from pgcheck.policies.decoding import Decoding
from pgcheck.policies.transformer import LanguageModel
from pgcheck.sampling import Stream
from pgcheck.trajectories import SideTable
from pgcheck.worlds.base import TruthMethod, as_bytes
from pgcheck.worlds.task import OfTask

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class ByModels(OfTask):
    """Models: the policy, that and how it is decoded when batches are written (None: the policy as it is), the reference."""

    policy: LanguageModel
    behavior: Decoding | None
    ref: LanguageModel | None
    kl_coefficient: float = 0.0
    entropy_coefficient: float = 0.0

    @property
    def _writer(self) -> nn.Module:
        """The model that writes the batches."""
        how = self.behavior
        return self.policy if how is None or how.model is None else how.model

    # -- facts

    @property
    def steps(self) -> int:
        """Of completions as long as can be, a fixed random one of each prompt."""
        return max(len(text) for _, text, _ in self.task.probe_completions())

    @property
    def reward_size(self) -> None:
        return None

    @property
    def on_policy(self) -> bool:
        how = self.behavior
        return how is None or (how.plain and self._says_the_same(self._writer))

    def _says_the_same(self, writer: nn.Module) -> bool:
        """As the policy: it has the same weights, and does the same with them."""
        if writer is self.policy:
            return True
        texts = [torch.tensor([text]) for text in self.task.probes()[:8]]
        with torch.no_grad():
            return _same_weights(writer, self.policy) and all(
                torch.allclose(writer(x), self.policy(x), rtol=0, atol=1e-12) for x in texts
            )

    @property
    def full_support(self) -> bool:
        return self.behavior is None or not self.behavior.truncates

    @property
    def binary_return(self) -> bool:
        """If the task says so (`returns`)."""
        return bool(self.task.returns) and {*(self.task.returns or ())} <= {0.0, 1.0}

    # -- truth

    def _unlisted(self) -> NoReturn:
        raise BudgetError(self.task.too_many_prefixes())

    def value(self, method: TruthMethod | None = None) -> Callable[[Tensor], Tensor]:
        self._unlisted()

    def gradient(self, method: TruthMethod) -> Tensor:
        self._unlisted()

    def agreed_gradient(self, problem: str) -> Tensor:
        self._unlisted()

    def gradient_by_step(self) -> Tensor:
        self._unlisted()

    # -- rollouts

    def sampler(
        self, labels: Tensor, stream: Stream, *, needs: Sequence[SideTable], problem: str, device: str
    ) -> WritingSampler:
        self._check_no_needs(needs, problem)
        policy = _moved(self.policy, device)
        how = Decoding(policy) if self.behavior is None else replace(self.behavior, model=_moved(self._writer, device))
        ref = policy if self.ref is None else _moved(self.ref, device)
        prices = {"kl_coefficient": self.kl_coefficient, "entropy_coefficient": self.entropy_coefficient}
        return WritingSampler(self.task, policy, how, ref, labels, stream, **prices, device=device)

    # -- identity

    def identity(self, tables: Sequence[bytes], sizes: tuple[int, ...]) -> Iterator[bytes]:
        """Over the weights, what the models say on a few texts, what those are paid, and the source of reward and tool: all
        that is known of them."""
        task, how = self.task, self.behavior
        yield repr((task.prompts, task.vocab_size, task.eos, task.max_new_tokens, task.returns)).encode()
        texts = task.probes()
        yield repr(texts).encode()
        yield repr(task.scores([(s, t) for s, t, _ in task.probe_completions()])).encode()
        yield f"{described(task.reward)}\n{described(task.tool)}".encode()
        yield b"none" if how is None else repr((how.temperature, how.top_k, how.top_p, how.dtype)).encode()
        for model in (self.policy, None if how is None else how.model, self.ref):
            yield b"none" if model is None else b"model"
            if model is None:
                continue
            yield from as_bytes(*model.parameters(), *model.buffers())
            with torch.no_grad():
                said = torch.cat([model(torch.tensor([text]))[0, -1] for text in texts[:8]])
            yield from as_bytes(said.round(decimals=9) + 0.0)
        yield repr((sizes, self.kl_coefficient, self.entropy_coefficient)).encode()


def _same_weights(a: nn.Module, b: nn.Module) -> bool:
    here, there = (dict(m.named_parameters()) for m in (a, b))
    return here.keys() == there.keys() and all(torch.equal(here[name], there[name]) for name in here)


def _moved(model: M, device: str) -> M:
    """On the device; a copy, if it is elsewhere."""
    here = next(model.parameters(), torch.zeros(())).device
    return model if here == torch.device(device) else copy.deepcopy(model).to(device)
