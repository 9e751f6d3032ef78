"""A language model as a policy: `TinyGPT`, a transformer on one screen, and `LMPolicy`, any model on a tree of prefixes.

A model maps tokens `[n, L]` to logits `[n, L, V]`, those at position i for the token after it. It enters pgcheck as every
policy does, by its logits z(θ) `[K, V]` at the K contexts of a task: one forward pass over the longest prefixes gives those
of all shorter ones as well, as a causal model computes them on the way; and where many rows share prefixes, those are read
once if the model knows how (`TinyGPT` does, and transformers' models).

Guarantee: float64 (or what a `Decoding` asks for); what a model says at a prefix was found to be the same alone and on the
way, and on every call (where there are thousands of prefixes, at some of each length).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from pgcheck.errors import BudgetError, ProblemError, in_words
from pgcheck.memory import free_memory, in_bytes, kept_by
from pgcheck.policies.prefixes import LEAST_TOKENS, MOST_PAIRS, Branching, branching
from pgcheck.seeding import random_state_kept

Keep = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
# (keys, values) `[n, heads, L, d]` of a layer's tokens -> those of the S tokens that `attend` is about, kept ones first


class Block(nn.Module):
    """x + Attention(Norm(x)), then x + MLP(Norm(x))."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(
        self, x: Tensor, attend: Tensor, keep: Keep | None = None
    ) -> Tensor:  # [n, L, D], [L, S] or [n, 1, L, S]
        q, k, v = (
            y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.qkv(self.norm_attention(x)).chunk(3, -1)
        )
        if keep is not None:
            k, v = keep(k, v)
        score = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])  # [n, heads, L, S]
        seen = torch.softmax(score.masked_fill(~attend, -math.inf), -1) @ v
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.norm_mlp(x))))


class TinyGPT(nn.Module):
    """A pre-norm transformer: tokens `[n, L]` → logits `[n, L, V]`, L ≤ `context`; float64, weights drawn from `seed`.

    Weights have standard deviation 1/√fan-in and three decimals, so that they do not depend on the machine; with the default
    width two layers have 25 thousand. Given `position` `[n, L]` and `attend` `[n, L, L]`, where each token stands and what it
    sees, it reads texts with branches (`pgcheck.policies.prefixes`); with `keep`, texts that go on (`Keep`).
    """

    reads_branches = True

    def __init__(
        self, vocab_size: int, *, context: int = 16, width: int = 32, layers: int = 2, heads: int = 2, seed: int = 0
    ) -> None:
        super().__init__()
        if width % heads:
            raise ProblemError(f"width, heads: {width}, {heads}; the width must be a multiple of the heads.")
        self.context = context
        with random_state_kept():  # torch draws weights of its own
            self.token, self.position = nn.Embedding(vocab_size, width), nn.Embedding(context, width)
            self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
            self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocab_size)
        self.to(torch.float64)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, p in self.named_parameters():
                if p.dim() > 1:
                    drawn = torch.randn(p.shape, generator=generator, dtype=p.dtype)
                    p.copy_((drawn / math.sqrt(p.shape[-1])).round(decimals=3))
                elif name.endswith("bias"):
                    p.zero_()

    def forward(
        self,
        tokens: Tensor,
        position: Tensor | None = None,
        attend: Tensor | None = None,
        keep: Keep | None = None,
    ) -> Tensor:
        L, device = tokens.shape[1], tokens.device
        x = self.token(tokens) + self.position(torch.arange(L, device=device) if position is None else position)
        seen = torch.ones(L, L, dtype=torch.bool, device=device).tril() if attend is None else attend.unsqueeze(1)
        for block in self.blocks:
            x = block(x, seen, keep)
        logits: Tensor = self.head(self.norm(x))
        return logits


_CHECKED = 256  # prefixes of each length
PASS = 1.25  # what a pass takes at its peak, of what it keeps: gradients of activations come and go


class LMPolicy(nn.Module):
    """A model on the contexts of a task: called with nothing, it returns logits `[K, A]`.

    Args:
        model: tokens `[n, L]` → logits `[n, L, V]`; it is copied.
        contexts: token ids of each, prompt and prefix.
        vocab_size: V.
        actions: the A tokens that may be written: only their logits are read. Default: all of them.
        dtype: of weights and arithmetic; logits are float64 numbers.

    Raises:
        ProblemError: the model raises, says NaN or another vocabulary, is not deterministic, or not causal.
    """

    tokens_at_once = 2**13  # that a forward pass reads: what stays in cache
    least_shared, most_pairs = LEAST_TOKENS, MOST_PAIRS  # when shared prefixes are read once
    shared = False  # whether the model is its owner's, who leaves it as it is

    def __init__(
        self,
        model: nn.Module,
        contexts: Sequence[Sequence[int]],
        *,
        vocab_size: int,
        actions: Sequence[int] | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        super().__init__()
        texts = [tuple(tokens) for tokens in contexts]
        self.vocab_size, self.dtype = vocab_size, dtype
        self.actions = tuple(range(vocab_size) if actions is None else actions)
        self._columns = None if len(self.actions) == vocab_size else torch.tensor(self.actions)
        self._place(texts, *_room(model))
        self.model = self._copied(model)
        with random_state_kept(), torch.no_grad():
            self._fit()
            self._check(texts)

    def _fit(self) -> None:
        """So many rows at once that a forward and a backward pass of them take half of what is free.

        Raises:
            BudgetError: not even one row does.
        """
        n, L = self.tokens.shape
        weights = list(self.model.parameters())
        try:
            one, two = self.bytes_of_pass(1), self.bytes_of_pass(2)
        except Exception:  # `_check` says what is wrong
            return
        free = free_memory(weights[0].device if weights else "cpu")
        room, each = free / 2 - one, two - one
        if room < 0:
            raise BudgetError(
                f"model: a forward and a backward pass of one row of {L} tokens take {in_bytes(one)}, gradients of"
                f" {sum(p.numel() for p in weights):,} weights included; {in_bytes(free)} are free, of which half may be taken."
                " Take a smaller model, shorter prompts or fewer new tokens."
            )
        self.__dict__["rows_that_fit"] = n if each <= 0 else min(n, 1 + int(room / each))

    def bytes_of_pass(self, rows: int) -> float:
        """What a forward and a backward pass of so many rows take at their peak: what they keep, and gradients of weights."""
        one, two = self._kept
        weights = sum(p.numel() * p.element_size() for p in self.model.parameters())
        return PASS * (one + (two - one) * (rows - 1)) + 2 * weights

    def bytes_of_row(self) -> float:
        """What one more row takes."""
        one, two = self._kept
        return PASS * max(two - one, one if len(self.tokens) == 1 else 0)

    @cached_property
    def _kept(self) -> tuple[int, int]:
        """By a pass of one row, and of two."""
        weights = list(self.model.parameters())
        first = [min(k, len(self.tokens)) for k in (1, 2)]
        one, two = (kept_by(partial(self._says, self.tokens[:k], self.length[:k]), besides=weights) for k in first)
        return one, two

    def _copied(self, model: nn.Module) -> nn.Module:
        return copy.deepcopy(model).to(self.dtype)  # the caller's own stays as it is

    @classmethod
    def reading(cls, model: nn.Module, tokens: Tensor, where: Tensor) -> LMPolicy:
        """`model` itself, on contexts that end at position `where[1]` of the rows `where[0]` of `tokens` `[n, L]`."""
        policy = cls.__new__(cls)
        nn.Module.__init__(policy)
        policy.model, policy.dtype = model, torch.float64
        policy._columns = None
        policy.register_buffer("tokens", tokens)
        policy.register_buffer("length", torch.full_like(tokens[:, 0], tokens.shape[1]))
        policy.register_buffer("where", where)
        with random_state_kept():
            policy._fit()
        return policy

    def _place(self, texts: list[tuple[int, ...]], room: int | None, why: str) -> None:
        longest = max(map(len, texts))
        if room is not None and longest > room:
            raise ProblemError(
                f"model: its context is {room} tokens{why}, but it must read {longest}: the longest prompt and all new tokens"
                f" but the last. Shorten those, or give it a context of {longest}."
            )
        inside = {tokens[:i] for tokens in texts for i in range(len(tokens))}
        place: dict[tuple[int, ...], tuple[int, int]] = {}
        leaves = [tokens for tokens in texts if tokens not in inside]
        for row, leaf in enumerate(leaves):
            for i in range(len(leaf)):
                place.setdefault(leaf[: i + 1], (row, i))
        self.tokens: Tensor
        self.length: Tensor
        self.where: Tensor
        padded = [leaf + (0,) * (longest - len(leaf)) for leaf in leaves]  # what follows is not seen
        self.register_buffer("tokens", torch.tensor(padded))
        self.register_buffer("length", torch.tensor([len(leaf) for leaf in leaves]))
        self.register_buffer("where", torch.tensor([place[tokens] for tokens in texts]).T)

    def _says(self, tokens: Tensor, length: Tensor) -> Tensor:
        """What the model says of rows `tokens` `[n, L]`, of which the first `length` `[n]` are real."""
        said: Tensor = self.model(tokens)
        return said

    @property
    def first(self) -> int:
        """The position of the tokens that the first logits of `_says` follow."""
        return 0

    def says(self, tokens: Tensor, length: Tensor) -> Tensor:
        """Logits of the actions after each token of rows `tokens` `[n, L]`, from position `first` on, `[n, L − first, A]`."""
        said = self._says(tokens, length)
        return said if self._columns is None else said[..., self._columns.to(said.device)]

    def forward(self, rows: slice | None = None) -> Tensor:
        """Logits `[K, A]`; with `rows`, those of `contexts_of(rows)`."""
        if rows is None and len(parts := self.parts) > 1:
            back = torch.cat([self.contexts_of(part) for part in parts]).argsort()
            return torch.cat([self(part) for part in parts])[back]
        rows = rows or slice(0, len(self.tokens))
        texts = self._branching(rows) if self.reads_branches else None
        if texts is None:
            return self._read(self._says(self.tokens[rows], self.length[rows]), rows)
        row, position = self.where[:, self.contexts_of(rows)]
        said = self._says_branching(texts)
        U, here = texts.tokens.shape[1], texts.place[row - (rows.start or 0), position]
        z = said[here // U, here % U - (U - said.shape[1])]
        return z if self._columns is None else z[:, self._columns.to(z.device)]

    @property
    def reads_branches(self) -> bool:
        """Whether prefixes that rows share are read once."""
        return getattr(self.model, "reads_branches", False)

    def _branching(self, rows: slice) -> Branching | None:
        kept = self.__dict__.setdefault("_branchings", {})
        if (key := (rows.start, rows.stop)) not in kept:
            limits: dict[str, Any] = {"least": self.least_shared, "most_pairs": self.most_pairs}
            kept[key] = branching(self.tokens[rows], self.length[rows], **limits)
        found: Branching | None = kept[key]
        return found

    def _says_branching(self, texts: Branching) -> Tensor:
        """What the model says of m texts with branches, `[m, U, V]`, or of their last tokens alone."""
        said: Tensor = self.model(texts.tokens, position=texts.position, attend=texts.attend)
        return said

    def at(self, contexts: Tensor) -> LMPolicy:
        """The same model, on some of the contexts."""
        part = copy.copy(self)
        part.__dict__["_branchings"] = {}
        rows, row = torch.unique(self.where[0, contexts], return_inverse=True)
        part._buffers = {
            **self._buffers,
            "tokens": self.tokens[rows],
            "length": self.length[rows],
            "where": torch.stack([row, self.where[1, contexts]]),
        }
        return part

    @property
    def texts(self) -> list[tuple[int, ...]]:
        """What the model reads in each context: prompt and prefix."""
        return [tuple(self.tokens[row, : position + 1].tolist()) for row, position in self.where.T.tolist()]

    def _read(self, said: Tensor, rows: slice) -> Tensor:
        k = self.contexts_of(rows)
        row, position = self.where[:, k]
        z = said[row - (rows.start or 0), position - self.first]
        return z if self._columns is None else z[:, self._columns.to(z.device)]

    @property
    def parts(self) -> list[slice]:
        """The rows, as many at once as a forward pass takes."""
        return self.in_parts_of(self.tokens_at_once)

    def in_parts_of(self, tokens: int) -> list[slice]:
        """The rows, so many at once that a forward pass reads about so many tokens."""
        n, L = self.tokens.shape
        size = max(1, min(tokens // L, self.__dict__.get("rows_that_fit", n)))
        return [slice(low, min(low + size, n)) for low in range(0, n, size)]

    def contexts_of(self, rows: slice) -> Tensor:
        """The contexts that `forward` reads off these rows; each context is read off one."""
        return ((self.where[0] >= rows.start) & (self.where[0] < rows.stop)).nonzero().flatten()

    def _check(self, texts: list[tuple[int, ...]]) -> None:
        z = []
        for rows in self.parts:
            found = self._tried(self.tokens[rows], self.length[rows])
            again = self._tried(self.tokens[rows], self.length[rows])
            if not torch.equal(found.nan_to_num(), again.nan_to_num()):
                why = self._what_is_random()
                raise ProblemError(f"model: two calls with the same tokens differ.{why} Call model.eval() first.")
            z.append(self._read(found, rows))
        here = torch.cat(z)[torch.cat([self.contexts_of(rows) for rows in self.parts]).argsort()]
        if not bool(torch.isfinite(here).all()):
            k, a = (int(i) for i in (~torch.isfinite(here)).nonzero()[0])
            raise ProblemError(
                f"model: the logit of token {self.actions[a]} after {texts[k]} is {float(here[k, a])}; it must be finite."
            )
        for size in sorted(set(map(len, texts))):
            own = [k for k, tokens in enumerate(texts) if len(tokens) == size]
            own = own[:: -(-len(own) // _CHECKED)]
            for low in range(0, len(own), at_once := max(1, self.tokens_at_once // size)):
                self._check_alone(texts, own[low : low + at_once], here)

    def _tried(self, tokens: Tensor, length: Tensor) -> Tensor:
        n, L = tokens.shape
        try:
            found = self._says(tokens, length)
        except ProblemError:
            raise
        except Exception as error:
            most = int(tokens.max())
            why = f" Has it a token {most}? vocab_size is {self.vocab_size}." if isinstance(error, IndexError) else ""
            raise ProblemError(f"model: called with tokens [{n}, {L}], it raises {in_words(error)}.{why}") from error
        shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
        if shape != [n, L - self.first, self.vocab_size]:
            raise ProblemError(
                f"model: called with tokens [{n}, {L}], it returns {shape}; expected logits [{n}, {L - self.first},"
                f" {self.vocab_size}], the last of them the task's vocab_size."
            )
        return found

    def _what_is_random(self) -> str:
        noisy = [name for name, m in self.model.named_modules() if m.training and "Dropout" in type(m).__name__]
        return f" It is in train mode and has dropout (module '{noisy[0]}')." if noisy else ""

    @property
    def _tolerance(self) -> float:
        return 1e-9 if self.dtype == torch.float64 else 32 * torch.finfo(self.dtype).eps

    def _check_alone(self, texts: list[tuple[int, ...]], own: list[int], here: Tensor) -> None:
        tokens = torch.tensor([texts[k] for k in own])
        said = self._says(tokens, torch.full((len(own),), tokens.shape[1]))[:, -1]
        alone = said if self._columns is None else said[:, self._columns]
        gap = (alone - here[own]).abs().amax(-1)
        if bool((gap > self._tolerance * (1 + here.abs().max())).any()):
            k = own[int(gap.argmax())]
            raise ProblemError(
                f"model: its logits after {texts[k]} change by {float(gap.max()):.3g} with what follows or stands beside"
                " it: it is not causal, or it looks at other rows (batch norm in train mode)."
            )


def _room(model: nn.Module) -> tuple[int | None, str]:
    """Most tokens that the model reads, and which of its fields says so."""
    for owner, name in ((model, "context"), (getattr(model, "config", None), "max_position_embeddings")):
        room = getattr(owner, name, None)
        if isinstance(room, int):
            return room, "" if owner is model else f" (config.{name})"
    return None, ""


class LanguageModel(nn.Module):
    """A model whose contexts cannot be listed: a policy for drawn completions only; made of a copy, in float64.

    Args:
        model: tokens `[n, L]` → logits `[n, L, V]`.
        probes: contexts on which it is found to be a causal model of `vocab_size` tokens.

    Raises:
        ProblemError: as `LMPolicy`.
    """

    def __init__(
        self,
        model: nn.Module,
        probes: Sequence[Sequence[int]],
        *,
        vocab_size: int,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        super().__init__()
        self.model = LMPolicy(model, probes, vocab_size=vocab_size, dtype=dtype).model

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.model(tokens)
        return logits
