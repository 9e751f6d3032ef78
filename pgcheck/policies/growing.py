"""Prefixes that grow together, a few tokens at a time: what is new is read, what was read before is kept.

    keys, values of a token  ──▶  one row of a store, for all prefixes that it is part of        [N, D] for each layer
    prefix                   ──▶  the rows of its tokens, and which of them are padding          [U, S]

A prefix of t tokens then costs one token where reading it whole costs t: drawing 1 024 batches of four completions takes a
fifth of the time for six tokens of 50 and a `TinyGPT` of 29 thousand weights, a third for sixteen of eight tokens and one of
1 160. A model takes part if its `forward` has `keep` (as `TinyGPT`) or is that of a model of
transformers with a cache of keys and values. On some prefixes of every level it is found to say the same, or is read whole from
there on (a window that slides is seen once a text is longer). So are models in other precisions than float64, and where what is
kept would take more than `KEPT` bytes.

Guarantee: logits are those of whole texts, to rounding.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from pgcheck.policies.huggingface import TokensToLogits, logits_of

KEPT = 2**29  # bytes of keys and values
_TOKENS_AT_ONCE = 2**13  # of whole texts,
_ROWS_AT_ONCE = 2**9  # that grow: what stays in cache, and
_SEEN_AT_ONCE = 2**15  # tokens that are looked back at
_TRIED = 8  # prefixes of each level that are read both ways
_FORGETFUL: WeakSet[nn.Module] = WeakSet()  # models whose keys and values say something else

Kept = list[tuple[Tensor, Tensor]]  # keys and values of each layer, [n, heads, S, d] each
Reader = Callable[[nn.Module, Tensor, Tensor, Tensor, Kept], tuple[Tensor, Kept]]
# (model, new tokens [n, m], their positions [n, m], which of S + m tokens each sees [n, m, S + m], what is kept of S) ->
# logits [n, m, V], keys and values of S + m


class Growing:
    """A model on the levels of a tree of prefixes, the prompts first.

    Args:
        model: tokens `[n, L]` → logits `[n, L, V]`, in float64 or not.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._reader = None if model in _FORGETFUL else _reader_of(model)
        self._store: Kept = []  # [heads, N, d] of each layer
        self._rows = torch.zeros(0)  # [U, S] of the last level, in the store
        self._seen = torch.zeros(0)  # [U, S], which are tokens
        self._length = torch.zeros(0)

    def read(self, tokens: Tensor, length: Tensor, parent: Tensor | None = None) -> Tensor:
        """Logits after each prefix of the next level, `[U, V]`: prefixes `tokens` `[U, L]` of `length` `[U]`, each grown out of
        prefix `parent` `[U]` of the level before; None: these are the first."""
        found = None
        if self._reader is not None:
            try:
                found = self._grown(self._reader, tokens, length, parent)
                if found is not None and not self._agrees(found, tokens, length):
                    _FORGETFUL.add(self.model)
                    found = None
            except Exception:  # it may have an attention of its own; read whole it says what is wrong
                _FORGETFUL.add(self.model)
        if found is None:
            self._reader, self._store = None, []
            return _whole(self.model, tokens, length)
        return found

    def _agrees(self, found: Tensor, tokens: Tensor, length: Tensor) -> bool:
        some = torch.linspace(0, len(tokens) - 1, min(_TRIED, len(tokens)), device=tokens.device).long()
        some[0] = length.argmax()
        with torch.no_grad():
            alone = _whole(self.model, tokens[some], length[some])
        return bool((found[some] - alone).abs().max() <= 1e-10 * (1 + alone.abs().max()))

    def _grown(self, reader: Reader, tokens: Tensor, length: Tensor, parent: Tensor | None) -> Tensor | None:
        U, device = len(tokens), tokens.device
        if parent is None:
            old = torch.zeros(U, dtype=torch.int64, device=device)
            rows, seen = old.new_zeros(U, 0), torch.zeros(U, 0, dtype=torch.bool, device=device)
        else:
            old, rows, seen = self._length[parent], self._rows[parent], self._seen[parent]
        m = int((length - old).max())
        if self._bytes(U * m) > KEPT:
            return None
        position = old.unsqueeze(1) + torch.arange(m, device=device)
        real = position < length.unsqueeze(1)
        new = torch.where(real, tokens.gather(1, position.clamp(max=tokens.shape[1] - 1)), 0)
        before = torch.ones(
            m, m, dtype=torch.bool, device=device
        ).tril()  # padding sees itself, so that it sees something
        attend = torch.cat([seen.unsqueeze(1).expand(U, m, -1), before.expand(U, m, m)], -1)
        said, kept = [], []
        most = min(_ROWS_AT_ONCE, _TOKENS_AT_ONCE // m, _SEEN_AT_ONCE // attend.shape[-1])
        for part in torch.arange(U, device=device).split(max(1, most)):
            past = [(k[:, rows[part]].transpose(0, 1), v[:, rows[part]].transpose(0, 1)) for k, v in self._store]
            z, now = reader(self.model, new[part], position[part], attend[part], past)
            said.append(z[torch.arange(len(part), device=device), (length - old)[part] - 1])
            kept.append([tuple(x[:, :, -m:].transpose(0, 1).flatten(1, 2) for x in pair) for pair in now])
        first = self._store[0][0].shape[1] if self._store else 0
        layers = [tuple(map(lambda *x: torch.cat(x, 1), *pairs)) for pairs in zip(*kept, strict=True)]
        self._store = (
            [(torch.cat([a, k], 1), torch.cat([b, v], 1)) for (a, b), (k, v) in zip(self._store, layers, strict=True)]
            if self._store
            else [(k, v) for k, v in layers]
        )
        own = first + torch.arange(U * m, device=device).view(U, m)
        self._rows, self._seen, self._length = torch.cat([rows, own], 1), torch.cat([seen, real], 1), length
        return torch.cat(said)

    def _bytes(self, more: int) -> int:
        """What the store takes with so many tokens more."""
        held = sum(x.nbytes for pair in self._store for x in pair)
        return held + (0 if not held else more * held // self._store[0][0].shape[1])


def _reader_of(model: nn.Module) -> Reader | None:
    if next(model.parameters(), torch.zeros(())).dtype != torch.float64:
        return None
    if isinstance(model, TokensToLogits):
        taken = set(inspect.signature(model.model.forward).parameters)
        cached = next((name for name in ("cache", "past_key_values") if name in taken), None)  # as the version calls it
        if cached is None or not {"attention_mask", "position_ids"} <= taken:
            return None
        return partial(_of_transformers, cached)
    return _keeping if "keep" in inspect.signature(model.forward).parameters else None


def _whole(model: nn.Module, tokens: Tensor, length: Tensor) -> Tensor:
    size = max(1, _TOKENS_AT_ONCE // tokens.shape[1])
    out = []
    for some, ends in zip(tokens.split(size), length.split(size), strict=True):
        some = some[:, : int(ends.max())]
        out.append(model(some)[torch.arange(len(some), device=some.device), ends - 1])
    return torch.cat(out)


def _keeping(model: nn.Module, tokens: Tensor, position: Tensor, attend: Tensor, past: Kept) -> tuple[Tensor, Kept]:
    now: Kept = []

    def keep(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if past:
            before = past[len(now)]
            k, v = torch.cat([before[0], k], 2), torch.cat([before[1], v], 2)
        now.append((k, v))
        return k, v

    z: Tensor = model(tokens, position=position, attend=attend, keep=keep)
    return z, now


def _of_transformers(
    cached: str, model: nn.Module, tokens: Tensor, position: Tensor, attend: Tensor, past: Kept
) -> tuple[Tensor, Kept]:
    from transformers import DynamicCache

    home = next(model.parameters())
    cache = DynamicCache()
    for layer, (k, v) in enumerate(past):
        cache.update(k, v, layer)
    ahead = torch.zeros(attend.shape, dtype=home.dtype, device=home.device).masked_fill(~attend, -torch.inf)
    asked = {
        "attention_mask": ahead.unsqueeze(1),
        "position_ids": position,
        cached: cache,
        "use_cache": True,
    }
    z = logits_of(model.model, tokens, **asked)  # type: ignore[arg-type]
    now: list[Any] = list(cache.layers)
    return z, [(layer.keys, layer.values) for layer in now]
