"""Any Hugging Face `AutoModelForCausalLM` as a policy, as it is: `Problem(task, model)`.

    z(θ)[k, a] = logits of the model after context k, at token actions[a]        [K, A]

Prompts of unequal length are padded on the right, with the attention mask and the positions that go with it, and without a
cache: padding is never seen, and a token's position does not depend on the row it stands in.

A verdict is in float64, and such a model is not by itself: norms, rotary angles and the softmax of attention ask for float32
whatever the weights are. Within `float64_throughout` that request is answered in float64. A copy in the precision in which
rollouts are drawn (`HFPolicy(model, task, dtype=torch.bfloat16)`) computes as it stands, and its bias is measured.

Guarantee: transformers is not imported here; what a model says at a prefix was found to be the same alone and padded, on every
call; memory is predicted before the model is copied.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from pgcheck.errors import BudgetError, ProblemError
from pgcheck.memory import free_memory, in_bytes
from pgcheck.policies.prefixes import Branching
from pgcheck.policies.transformer import LMPolicy
from pgcheck.seeding import random_state_kept

_TOKENS_AT_ONCE = 512  # of one forward and backward pass: activations are kept for these


class Task(Protocol):
    """What a policy needs of an `LMTask`."""

    @property
    def contexts(self) -> Sequence[Sequence[int]]: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def actions(self) -> Sequence[int] | None: ...


def is_hugging_face(model: Any) -> bool:
    """A torch module with a configuration as transformers' models have one."""
    return isinstance(model, nn.Module) and callable(getattr(getattr(model, "config", None), "to_dict", None))


class float64_throughout(TorchFunctionMode):  # noqa: N801  (a context)
    """Within, whatever asks torch for float32 gets float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.float:
            return args[0].to(torch.float64)
        wider = {torch.float32: torch.float64}
        args = [wider.get(x, x) if isinstance(x, torch.dtype) else x for x in args]
        kwargs = {name: wider.get(x, x) if isinstance(x, torch.dtype) else x for name, x in (kwargs or {}).items()}
        return func(*args, **kwargs)


class HFPolicy(LMPolicy):
    """A causal language model of transformers (or PEFT) on the contexts of a task.

    Args:
        model: as `AutoModelForCausalLM` gives it.
        task: an `LMTask` whose tokens are the model's.
        dtype: of weights and arithmetic; logits come out in float64.
        copy: False: the model is used as it is, not copied, for several problems at once. It must have `dtype` already, and
            its owner leaves it as it is.

    Raises:
        ProblemError: no logits, NaN, another vocabulary, a context too short, dropout left on, padding that is seen.
        BudgetError: it does not fit the memory that is free; with the numbers.
    """

    def __init__(self, model: nn.Module, task: Task, *, dtype: torch.dtype = torch.float64, copy: bool = True) -> None:
        if not is_hugging_face(model):
            raise ProblemError(f"model: {type(model).__name__}; expected a causal language model of transformers.")
        given = next(model.parameters()).dtype
        if not copy and given != dtype:
            raise ProblemError(
                f"copy: False, but the weights are {given}; give a model in {dtype}, or let it be copied."
            )
        self.__dict__.update(shared=not copy)  # before there is a module to have attributes
        self._refuse_what_does_not_fit(model, task, dtype.itemsize)
        super().__init__(model, task.contexts, vocab_size=task.vocab_size, actions=task.actions, dtype=dtype)

    def _copied(self, model: nn.Module) -> nn.Module:
        return model if self.shared else copy.deepcopy(model).to(self.dtype)

    def _refuse_what_does_not_fit(self, model: nn.Module, task: Task, size: int) -> None:
        weights = sum(p.numel() for p in model.parameters()) * size
        kept = 1 + max(map(len, task.contexts)) - min(map(len, task.contexts))
        said = 3 * size * task.vocab_size * kept * max(1, _TOKENS_AT_ONCE // max(map(len, task.contexts)))
        table = 8 * 6 * len(task.contexts) * len(task.actions or range(task.vocab_size))
        need = (0 if self.shared else weights) + said + table
        if need > (free := free_memory()):
            raise BudgetError(
                f"model: a copy of {8 * size} bits a number takes {in_bytes(weights)}, its logits"
                f" {in_bytes(said)} at once and {in_bytes(table)} in tables ({len(task.contexts):,} contexts, vocabulary"
                f" {task.vocab_size:,}); {in_bytes(free)} are free. Take a smaller model, fewer prompts, or `actions`."
            )

    least_shared, most_pairs = 64, math.inf  # a token costs more than what it attends to

    @property
    def tokens_at_once(self) -> int:  # type: ignore[override]
        return _TOKENS_AT_ONCE

    @property
    def first(self) -> int:
        return int(self.where[1].min()) if self._takes("logits_to_keep") else 0

    def _takes(self, name: str) -> bool:
        return name in self._parameters_taken

    def _says(self, tokens: Tensor, length: Tensor) -> Tensor:
        device = next(self.model.parameters()).device
        position = torch.arange(tokens.shape[1], device=device)
        tokens = tokens.to(device)
        asked: dict[str, Any] = {
            "attention_mask": (position < length.to(device).unsqueeze(-1)).long(),
            "position_ids": position.expand(tokens.shape),
            "use_cache": False,
            "logits_to_keep": position[self.first :],
        }
        asked = {name: x for name, x in asked.items() if self._takes(name)}
        return logits_of(self.model, tokens, **asked).to("cpu", torch.float64)

    def _check(self, texts: list[tuple[int, ...]]) -> None:
        super()._check(texts)
        if self.dtype != torch.float64 or not {"attention_mask", "position_ids"} <= set(self._parameters_taken):
            return
        rows = self.parts[0]
        if self._branching(rows) is None:
            return
        here = self(rows)
        self.__dict__["_branches"] = True
        try:
            there = self(rows)
        except Exception:  # a model with an attention of its own: its rows are read as they are
            there = torch.full_like(here, torch.nan)
        self.__dict__["_branches"] = bool((here - there).abs().max() <= self._tolerance * (1 + here.abs().max()))

    @property
    def reads_branches(self) -> bool:
        """If it was found to say the same of them."""
        return self.__dict__.get("_branches", False)

    @property
    def _parameters_taken(self) -> Mapping[str, Any]:
        return inspect.signature(self.model.forward).parameters

    def _says_branching(self, texts: Branching) -> Tensor:
        home = next(self.model.parameters())
        ahead = torch.zeros(texts.attend.shape, dtype=home.dtype).masked_fill(~texts.attend.cpu(), -torch.inf)
        asked: dict[str, Any] = {
            "attention_mask": ahead.unsqueeze(1).to(home.device),
            "position_ids": texts.position.to(home.device),
            "use_cache": False,
        }
        if self._takes("logits_to_keep"):  # tokens of a text stand in the order of their positions
            least = int((texts.position < self.first).cumprod(1).sum(1).min())
            asked["logits_to_keep"] = torch.arange(least, texts.tokens.shape[1], device=home.device)
        return logits_of(self.model, texts.tokens.to(home.device), **asked).to("cpu", torch.float64)

    def _what_is_random(self) -> str:
        named = super()._what_is_random()
        if named or not self.model.training:
            return named
        config: Mapping[str, Any] = self.model.config.to_dict()  # type: ignore[operator, union-attr]
        rates = [
            f"config.{name} = {x}" for name, x in config.items() if isinstance(x, float) and x > 0 and "drop" in name
        ]
        return f" It is in train mode and has dropout ({rates[0]})." if rates else " It is in train mode."


def logits_of(model: nn.Module, tokens: Tensor, **asked: Any) -> Tensor:
    """What a model of transformers says, `[n, L, V]`; one in float64 says it in float64 throughout.

    Raises:
        ProblemError: it has no logits.
    """
    if next(model.parameters()).dtype == torch.float64:
        # the plain kernel: it has a batched and a forward-mode derivative, and no float32 in it
        with float64_throughout(), sdpa_kernel(SDPBackend.MATH):
            out = model(input_ids=tokens, **asked)
    else:
        out = model(input_ids=tokens, **asked)
    if not isinstance(found := getattr(out, "logits", None), Tensor):
        raise ProblemError(f"model: {type(model).__name__} returns no logits; load it by AutoModelForCausalLM.")
    return found


class TokensToLogits(nn.Module):
    """A model of transformers as a plain one, tokens `[n, L]` → logits `[n, L, V]`, for completions that it writes itself."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return logits_of(self.model, tokens, use_cache=False)


def perturbed(model: nn.Module, *, relative: float, seed: int) -> nn.Module:
    """A copy of which every weight is moved by a normal draw of `relative` times the root mean square of its tensor: what a
    sampler has that missed some updates."""
    moved = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad(), random_state_kept():
        for p in moved.parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float32).to(p)
            p.add_(noise * (relative * p.square().mean().sqrt()))
    return moved
