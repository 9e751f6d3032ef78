"""A language model as a policy: `TinyGPT`, a transformer on one screen, and `LMPolicy`, any model on a tree of prefixes.

A model maps tokens `[n, L]` to logits `[n, L, V]`, those at position i for the token after it. It enters pgcheck as every
policy does, by its logits z(θ) `[K, V]` at the K contexts of a task: one forward pass over the longest prefixes gives those
of all shorter ones as well, as a causal model computes them on the way.

Guarantee: float64; what a model says at a prefix was found to be the same alone and on the way, and on every call.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

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
        ahead = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
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
        x = self.token(tokens) + self.position(torch.arange(tokens.shape[1]))
        logits: Tensor = self.head(self.norm(self.blocks(x)))
        return logits


class LMPolicy(nn.Module):
    """A model on the contexts of a task: called with nothing, it returns logits `[K, V]`.

    Args:
        model: tokens `[n, L]` → logits `[n, L, V]`; it is copied, and computes in float64.
        contexts: token ids of each, prompt and prefix.
        vocab_size: V.

    Raises:
        ProblemError: the model raises, says NaN or another vocabulary, is not deterministic, or not causal.
    """

    def __init__(self, model: nn.Module, contexts: Sequence[Sequence[int]], *, vocab_size: int) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).to(torch.float64)  # the caller's own stays as it is
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

    def forward(self, part: int | None = None) -> Tensor:
        row, position = self.where
        if part is None:
            return self.model(self.tokens)[row, position]
        return self.model(self.tokens[part : part + 1])[0, position[self.parts[part]]]

    @property
    def texts(self) -> list[tuple[int, ...]]:
        """What the model reads in each context: prompt and prefix."""
        return [tuple(self.tokens[row, : position + 1].tolist()) for row, position in self.where.T.tolist()]

    @property
    def parts(self) -> list[Tensor]:
        """The contexts that `forward` reads off each of its rows; each context is read off one."""
        return [(self.where[0] == row).nonzero().flatten() for row in range(len(self.tokens))]

    def _check(self, texts: list[tuple[int, ...]], vocab_size: int) -> None:
        n, L = self.tokens.shape
        try:
            found, again = self.model(self.tokens), self.model(self.tokens)
        except Exception as error:
            raise ProblemError(f"model: called with tokens [{n}, {L}], it raises {in_words(error)}.") from error
        shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
        if shape != [n, L, vocab_size]:
            raise ProblemError(
                f"model: called with tokens [{n}, {L}], it returns {shape}; expected logits [{n}, {L}, {vocab_size}], the last"
                " of them the task's vocab_size."
            )
        here = found[self.where[0], self.where[1]]
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
            alone = self.model(torch.tensor([texts[k] for k in own]))[:, -1]
            gap = (alone - here[own]).abs().amax(-1)
            if bool((gap > 1e-9 * (1 + here.abs().max())).any()):
                k = own[int(gap.argmax())]
                raise ProblemError(
                    f"model: its logits after {texts[k]} change by {float(gap.max()):.3g} with what follows or stands beside"
                    " it: it is not causal, or it looks at other rows (batch norm in train mode)."
                )


def truncated(logits: Tensor, *, top_k: int | None = None, top_p: float | None = None) -> Tensor:
    """`logits` `[K, V]` with -inf for every token that a sampler cuts off: all but the `top_k` most likely, and all but the
    fewest of those whose probability adds up to `top_p`. Ties go to the lower token."""
    V = logits.shape[-1]
    if not (top_k is None or 1 <= top_k <= V) or not (top_p is None or 0.0 < top_p <= 1.0):
        raise ProblemError(
            f"top_k, top_p: {top_k!r}, {top_p!r}; nothing may be left to sample: 1 ≤ top_k ≤ {V}, 0 < top_p ≤ 1."
        )
    order = logits.argsort(dim=-1, descending=True, stable=True)
    mass = torch.softmax(logits, -1).gather(-1, order)
    keep = torch.arange(V) < (V if top_k is None else top_k)
    if top_p is not None:
        left = torch.softmax(logits.gather(-1, order).masked_fill(~keep, -math.inf), -1)
        keep = keep & (left.cumsum(-1) - left < top_p - 1e-12)
    keep = keep.expand_as(mass)
    return logits.masked_fill(~torch.zeros_like(keep).scatter(-1, order, keep), -math.inf)
