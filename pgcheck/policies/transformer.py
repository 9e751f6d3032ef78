"""A language model as a policy: `TinyGPT`, a transformer on one screen, and `LMPolicy`, any model on a tree of prefixes.

A model maps tokens `[n, L]` to logits `[n, L, V]`, those at position i for the token after it. It enters pgcheck as every
policy does, by its logits z(θ) `[K, V]` at the K contexts of a task: one forward pass over the longest prefixes gives those
of all shorter ones as well, as a causal model computes them on the way.

Guarantee: float64 (or what a `Decoding` asks for); what a model says at a prefix was found to be the same alone and on the
way, and on every call (where there are thousands of prefixes, at some of each length).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace

import torch
from torch import Tensor, nn

from pgcheck.errors import ProblemError, in_words
from pgcheck.seeding import random_state_kept


class Block(nn.Module):
    """x + Attention(Norm(x)), then x + MLP(Norm(x))."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:  # [n, L, D]
        q, k, v = (
            y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.qkv(self.norm_attention(x)).chunk(3, -1)
        )
        score = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])  # [n, heads, L, L]
        ahead = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        seen = torch.softmax(score.masked_fill(ahead, -math.inf), -1) @ v
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.norm_mlp(x))))


class TinyGPT(nn.Module):
    """A pre-norm transformer: tokens `[n, L]` → logits `[n, L, V]`, L ≤ `context`; float64, weights drawn from `seed`.

    Weights have standard deviation 1/√fan-in and three decimals, so that they do not depend on the machine; with the default
    width two layers have 25 thousand.
    """

    def __init__(
        self, vocab_size: int, *, context: int = 16, width: int = 32, layers: int = 2, heads: int = 2, seed: int = 0
    ) -> None:
        super().__init__()
        if width % heads:
            raise ProblemError(f"width, heads: {width}, {heads}; the width must be a multiple of the heads.")
        self.context = context
        with random_state_kept():  # torch draws weights of its own
            self.token, self.position = nn.Embedding(vocab_size, width), nn.Embedding(context, width)
            self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
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

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.position(torch.arange(tokens.shape[1], device=tokens.device))
        logits: Tensor = self.head(self.norm(self.blocks(x)))
        return logits


_TOKENS_AT_ONCE = 2**13  # what stays in cache
_CHECKED = 256  # prefixes of each length


def rows_at_once(length: int) -> int:
    """Texts of that length which a model is given at once."""
    return max(1, _TOKENS_AT_ONCE // length)


class LMPolicy(nn.Module):
    """A model on the contexts of a task: called with nothing, it returns logits `[K, V]`.

    Args:
        model: tokens `[n, L]` → logits `[n, L, V]`; it is copied, and computes in float64.
        contexts: token ids of each, prompt and prefix.
        vocab_size: V.
        dtype: of weights and arithmetic.

    Raises:
        ProblemError: the model raises, says NaN or another vocabulary, is not deterministic, or not causal.
    """

    def __init__(
        self,
        model: nn.Module,
        contexts: Sequence[Sequence[int]],
        *,
        vocab_size: int,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).to(dtype)  # the caller's own stays as it is
        self.dtype = dtype
        texts = [tuple(tokens) for tokens in contexts]
        longest = max(map(len, texts))
        room = getattr(model, "context", None)
        if isinstance(room, int) and longest > room:
            raise ProblemError(
                f"model: its context is {room} tokens, but it must read {longest}: the longest prompt and all new tokens but"
                f" the last. Shorten those, or give it a context of {longest}."
            )
        inside = {tokens[:i] for tokens in texts for i in range(len(tokens))}
        place: dict[tuple[int, ...], tuple[int, int]] = {}
        leaves = [tokens for tokens in texts if tokens not in inside]
        for row, leaf in enumerate(leaves):
            for i in range(len(leaf)):
                place.setdefault(leaf[: i + 1], (row, i))
        self.tokens: Tensor
        self.where: Tensor
        padded = [leaf + (0,) * (longest - len(leaf)) for leaf in leaves]  # what follows is not seen
        self.register_buffer("tokens", torch.tensor(padded))
        self.register_buffer("where", torch.tensor([place[tokens] for tokens in texts]).T)
        with random_state_kept(), torch.no_grad():
            self._check(texts, vocab_size)

    @classmethod
    def reading(cls, model: nn.Module, tokens: Tensor, where: Tensor) -> LMPolicy:
        """`model` itself, on contexts that end at position `where[1]` of the rows `where[0]` of `tokens` `[n, L]`."""
        policy = cls.__new__(cls)
        nn.Module.__init__(policy)
        policy.model, policy.dtype = model, torch.float64
        policy.register_buffer("tokens", tokens)
        policy.register_buffer("where", where)
        return policy

    def forward(self, rows: slice | None = None) -> Tensor:
        """Logits `[K, V]`; with `rows`, those of `contexts_of(rows)`."""
        if rows is None and len(parts := self.parts) > 1:
            back = torch.cat([self.contexts_of(part) for part in parts]).argsort()
            return torch.cat([self(part) for part in parts])[back]
        rows = rows or slice(0, len(self.tokens))
        row, position = self.where[:, self.contexts_of(rows)]
        logits: Tensor = self.model(self.tokens[rows])[row - rows.start, position]
        return logits

    def at(self, contexts: Tensor) -> LMPolicy:
        """The same model, on some of the contexts."""
        part = copy.copy(self)
        rows, row = torch.unique(self.where[0, contexts], return_inverse=True)
        part._buffers = {
            **self._buffers,
            "tokens": self.tokens[rows],
            "where": torch.stack([row, self.where[1, contexts]]),
        }
        return part

    @property
    def texts(self) -> list[tuple[int, ...]]:
        """What the model reads in each context: prompt and prefix."""
        return [tuple(self.tokens[row, : position + 1].tolist()) for row, position in self.where.T.tolist()]

    @property
    def parts(self) -> list[slice]:
        """The rows, as many at once as a forward pass takes."""
        return self.in_parts_of(None)

    def in_parts_of(self, tokens: int | None) -> list[slice]:
        """The rows, so many at once that a forward pass reads about so many tokens."""
        n, L = self.tokens.shape
        size = rows_at_once(L) if tokens is None else max(1, tokens // L)
        return [slice(low, min(low + size, n)) for low in range(0, n, size)]

    def contexts_of(self, rows: slice) -> Tensor:
        """The contexts that `forward` reads off these rows; each context is read off one."""
        return ((self.where[0] >= rows.start) & (self.where[0] < rows.stop)).nonzero().flatten()

    def _check(self, texts: list[tuple[int, ...]], vocab_size: int) -> None:
        read = self.tokens[self.parts[0]]
        n, L = read.shape
        try:
            found, again = self.model(read), self.model(read)
        except Exception as error:
            raise ProblemError(f"model: called with tokens [{n}, {L}], it raises {in_words(error)}.") from error
        shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
        if shape != [n, L, vocab_size]:
            raise ProblemError(
                f"model: called with tokens [{n}, {L}], it returns {shape}; expected logits [{n}, {L}, {vocab_size}], the last"
                " of them the task's vocab_size."
            )
        here: Tensor = self()
        if not bool(torch.isfinite(here).all()):
            k, a = (int(i) for i in (~torch.isfinite(here)).nonzero()[0])
            raise ProblemError(
                f"model: the logit of token {a} after {texts[k]} is {float(here[k, a])}; it must be finite."
            )
        if not torch.equal(found, again):
            noisy = [name for name, m in self.model.named_modules() if m.training and "Dropout" in type(m).__name__]
            why = f" It is in train mode and has dropout (module '{noisy[0]}')." if noisy else ""
            raise ProblemError(f"model: two calls with the same tokens differ.{why} Call model.eval() first.")
        for size in sorted(set(map(len, texts))):
            own = [k for k, tokens in enumerate(texts) if len(tokens) == size]
            own = own[:: -(-len(own) // _CHECKED)]
            alone = self.model(torch.tensor([texts[k] for k in own]))[:, -1]
            gap = (alone - here[own]).abs().amax(-1)
            slack = 1e-9 if self.dtype == torch.float64 else 32 * torch.finfo(self.dtype).eps
            if bool((gap > slack * (1 + here.abs().max())).any()):
                k = own[int(gap.argmax())]
                raise ProblemError(
                    f"model: its logits after {texts[k]} change by {float(gap.max()):.3g} with what follows or stands beside"
                    " it: it is not causal, or it looks at other rows (batch norm in train mode)."
                )


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


@dataclass(frozen=True, eq=False)
class Decoding:
    """How a serving engine writes: weights, precision, temperature and truncation of the behaviour policy.

    Args:
        model: a language model; None: that of the policy.
        temperature: what logits are divided by.
        top_k, top_p: see `truncated`.
        dtype: of the copy of the model that writes; its logits are then float64 numbers.

    Raises:
        ProblemError: naming the argument and the value.
    """

    model: nn.Module | None = None
    _: KW_ONLY
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    dtype: torch.dtype = torch.float64

    def __post_init__(self) -> None:
        if not isinstance(self.temperature, (int, float)) or not 0 < self.temperature < math.inf:
            raise ProblemError(f"temperature: {self.temperature!r}; it must be a finite number above 0.")
        if not isinstance(self.dtype, torch.dtype) or not self.dtype.is_floating_point:
            raise ProblemError(f"dtype: {self.dtype!r}; expected a floating-point type, torch.bfloat16 for example.")

    @property
    def plain(self) -> bool:
        """The model's own law, in float64."""
        return self.temperature == 1 and not self.truncates and self.dtype == torch.float64

    @property
    def truncates(self) -> bool:
        """Some tokens may never be drawn."""
        return self.top_k is not None or (self.top_p is not None and self.top_p < 1)

    def of(self, logits: Tensor) -> Tensor:
        """Logits `[K, V]` of the law that is drawn from, of those of the model."""
        return truncated(logits.to(torch.float64) / self.temperature, top_k=self.top_k, top_p=self.top_p)

    def by(self, policy: nn.Module) -> Decoding:
        """The same, with the model given: that of the policy if there was none."""
        return replace(self, model=policy) if self.model is None else self


def truncated(logits: Tensor, *, top_k: int | None = None, top_p: float | None = None) -> Tensor:
    """`logits` `[K, V]` with -inf for every token that a sampler cuts off: all but the `top_k` most likely, and all but the
    fewest of those whose probability adds up to `top_p`. Ties go to the lower token."""
    V = logits.shape[-1]
    if not (top_k is None or 1 <= top_k <= V) or not (top_p is None or 0.0 < top_p <= 1.0):
        raise ProblemError(
            f"top_k, top_p: {top_k!r}, {top_p!r}; nothing may be left to sample: 1 ≤ top_k ≤ {V}, 0 < top_p ≤ 1."
        )
    if top_k is None and (top_p is None or top_p == 1):
        return logits
    order = logits.argsort(dim=-1, descending=True, stable=True)
    mass = torch.softmax(logits, -1).gather(-1, order)
    keep = torch.arange(V, device=logits.device) < (V if top_k is None else top_k)
    if top_p is not None:
        left = torch.softmax(logits.gather(-1, order).masked_fill(~keep, -math.inf), -1)
        keep = keep & (left.cumsum(-1) - left < top_p - 1e-12)
    keep = keep.expand_as(mass)
    return logits.masked_fill(~torch.zeros_like(keep).scatter(-1, order, keep), -math.inf)
