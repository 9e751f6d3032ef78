"""Completions that a model writes itself, where even the prefixes of a task are too many to list.

Rows of all batches grow together, one token a step: unique prefixes are read once, the law of the next token is that of the
`Decoding`, and the token is found from the draw's own uniforms. The log-probability recorded is that of this law, as
generated; log-probabilities of the policy and the reference are computed afterwards in float64 over whole texts, as a
trainer does (teacher forcing). Contexts are numbered within the table that a call makes.

Guarantee: what is written is decided by (seed, problem, number of the draw) up to the rounding of logits, which may depend
on what else is read in the same call; rewards are asked for as for a table, twice, in blocks, once a completion.
"""

from __future__ import annotations

import copy
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor, nn

from pgcheck.envs.language import LMTask, Tokens
from pgcheck.errors import BudgetError, ProblemError
from pgcheck.memory import free_memory, in_bytes
from pgcheck.policies.decoding import Decoding
from pgcheck.policies.growing import Growing
from pgcheck.policies.transformer import LanguageModel, LMPolicy
from pgcheck.sampling import Sampler, Stream, inverted
from pgcheck.trajectories import Paths, Trajectories, row_logp

MEMORY = 2**31  # bytes that the logits of one call may take


@dataclass(frozen=True)
class Written(Trajectories):
    """Rollouts that a model wrote. Their values and probabilities are not known (NaN)."""

    _: KW_ONLY
    policy: LMPolicy  # the target policy on the contexts of this table: logits [K, V]
    decoding: Decoding  # how they were written

    @cached_property
    def recomputed(self) -> Tensor:
        """`behavior_logp` once more, `[N, T]`: whole texts at once, in float64; -inf where that cuts a token off."""
        assert isinstance(self.decoding.model, LanguageModel)
        reader = LMPolicy.reading(self.decoding.model.model, self.policy.tokens, self.policy.where)
        with torch.no_grad():
            return row_logp(self.decoding(reader()), self.paths.context, self.paths.action, self.paths.mask)


@dataclass(frozen=True)
class _Level:
    """Unique prefixes after which the policy writes its token number t."""

    tokens: Tensor  # [U, L], prompt and text, 0 after its end
    length: Tensor  # [U]
    prompt: Tensor  # [U]
    parent: Tensor  # [U], the prefix of the level before it (of a prompt: itself)

    def read(self, reader: Growing, t: int) -> Tensor:
        """Logits `[U, V]`, float64 numbers; the level is number t of those that the reader is given."""
        with torch.no_grad():
            return reader.read(self.tokens, self.length, self.parent if t else None).to(torch.float64)

    def texts(self, task: LMTask) -> list[tuple[int, Tokens]]:
        """Number of the prompt, and what follows it."""
        rows = zip(self.tokens.tolist(), self.length.tolist(), self.prompt.tolist(), strict=True)
        return [(s, tuple(line[len(task.prompts[s]) : size])) for line, size, s in rows]


@dataclass(frozen=True)
class _Step:
    """A token of every row that was not finished: `[n]` each."""

    row: Tensor
    prefix: Tensor  # in its level
    token: Tensor
    logp: Tensor  # as it was drawn


@dataclass(frozen=True)
class WritingSampler:
    """Batches written by a model: a prompt for each group, then one token after another."""

    task: LMTask
    policy: LanguageModel
    decoding: Decoding  # with a LanguageModel in float64
    ref: LanguageModel
    labels: Tensor  # [B]
    stream: Stream
    kl_coefficient: float = 0.0
    entropy_coefficient: float = 0.0
    device: torch.device | str = "cpu"

    @cached_property
    def _writer(self) -> nn.Module:
        assert isinstance(self.decoding.model, LanguageModel)
        own, model = self.decoding.dtype != torch.float64, self.decoding.model.model
        return copy.deepcopy(model).to(self.decoding.dtype) if own else model

    def draw(self, first: int, count: int) -> tuple[Written, Tensor]:
        """As `Sampler.draw`: a table of `count` · B rows, each drawn once.

        Raises:
            BudgetError: the logits of so many contexts do not fit.
            ProblemError: the reward or the tool breaks its contract, or a logit is not finite.
        """
        task, N, V = self.task, count * len(self.labels), int(self.task.vocab_size)
        self._refuse_if_too_large(count)
        groups = int(self.labels[-1]) + 1
        u = self.stream.uniforms(first, count, groups + len(self.labels) * task.max_new_tokens).to(self.device)
        start = (u[:, :groups] * len(task.prompts)).long().clamp(max=len(task.prompts) - 1)
        start, u = start[:, self.labels.to(self.device)].flatten(), u[:, groups:].reshape(N, -1)
        prompts = torch.arange(len(task.prompts), device=self.device)
        levels = [_level(task.prompts, prompts, prompts, self.device)]
        row, at, steps = torch.arange(N, device=self.device), start, []
        writer, said = Growing(self._writer), []
        for t in range(task.max_new_tokens):
            said.append(levels[-1].read(writer, t))
            self._refuse_not_finite(levels[-1], said[-1])
            logp = torch.log_softmax(self.decoding(said[-1]), -1)
            law = logp.exp().cumsum(-1)
            token = inverted((law / law[:, -1:])[at], u[row, t])
            steps.append(_Step(row, at, token, logp[at, token]))
            onward = token != (-1 if task.eos is None else int(task.eos))
            if t + 1 == task.max_new_tokens or not bool(onward.any()):
                break
            row = row[onward]
            pairs, at = torch.unique(at[onward] * V + token[onward], return_inverse=True)
            levels.append(self._grown(levels[-1], pairs // V, pairs % V))
        return self._table(levels, steps, start, said), torch.arange(N, device=self.device).reshape(count, -1)

    def bytes_of(self, count: int) -> int:
        """What so many draws take at most, in logits (of every prefix, as they come and in a table; of a level, with its law)
        and in texts."""
        task, V, longest = self.task, int(self.task.vocab_size), max(map(len, self.task.prompts))
        rows = count * len(self.labels)
        prefixes = [min(rows, len(task.prompts) * V ** min(t, 40)) for t in range(task.max_new_tokens)]
        return (2 * sum(prefixes) + 6 * prefixes[-1]) * V * 8 + sum(
            n * (200 + 40 * (longest + t)) for t, n in enumerate(prefixes)
        )

    def _refuse_if_too_large(self, count: int) -> None:
        T, V, need = self.task.max_new_tokens, int(self.task.vocab_size), self.bytes_of(count)
        if need > (room := min(MEMORY, free_memory(self.device))):
            fits = max(1, bisect_right(range(1, count), room, key=self.bytes_of))
            raise BudgetError(
                f"{count:,} batches of {len(self.labels)} rows and {T} tokens of a vocabulary of {V:,} take up to"
                f" {in_bytes(need)} of logits and texts; {in_bytes(room)} are allowed. Draw {fits:,} at a time, or restrict"
                " the vocabulary."
            )

    def _refuse_not_finite(self, level: _Level, z: Tensor) -> None:
        if bool(torch.isfinite(z).all()):
            return
        k, a = (int(i) for i in (~torch.isfinite(z)).nonzero()[0])
        text = tuple(level.tokens[k, : level.length[k]].tolist())
        raise ProblemError(f"model: the logit of token {a} after {text} is {float(z[k, a])}; it must be finite.")

    def _logits(self, model: LanguageModel, levels: list[_Level], written: list[Tensor]) -> Tensor:
        """What a model says at every prefix, `[K, V]`; `written`: what the writer said."""
        if model.model is self._writer:
            return torch.cat(written)
        reader = Growing(model.model)
        return torch.cat([level.read(reader, t) for t, level in enumerate(levels)])

    def _grown(self, level: _Level, parent: Tensor, token: Tensor) -> _Level:
        """The next level: those prefixes with these tokens, and what a tool says to them."""
        length = level.length[parent]
        tokens = torch.nn.functional.pad(level.tokens[parent], (0, 1))
        tokens[torch.arange(len(tokens), device=tokens.device), length] = token
        prompt = level.prompt[parent]
        grown = _Level(tokens, length + 1, prompt, parent)
        if self.task.tool is None:
            return grown
        spoken = [
            (*self.task.prompts[s], *text, *self.task.said_by_tool(s, text)) for s, text in grown.texts(self.task)
        ]
        return _level(spoken, prompt, parent, self.device)

    def _table(self, levels: list[_Level], steps: list[_Step], start: Tensor, written: list[Tensor]) -> Written:
        task, N, device = self.task, len(start), self.device
        offsets = list(accumulate((len(level.length) for level in levels), initial=0))
        told = torch.tensor([len(p) for p in task.prompts], device=device)
        row, token, recorded = (torch.cat([getattr(x, name) for x in steps]) for name in ("row", "token", "logp"))
        k = torch.cat([x.prefix + low for x, low in zip(steps, offsets, strict=False)])
        column = torch.cat([level.length - told[level.prompt] for level in levels])[k]
        T = int(column.max()) + 1
        context, action = torch.full((N, T), -1, device=device), torch.full((N, T), -1, device=device)
        behavior_logp, reward = (torch.zeros(N, T, dtype=torch.float64, device=device) for _ in range(2))
        context[row, column], action[row, column], behavior_logp[row, column] = k, token, recorded
        every, mask = torch.arange(N, device=device), (action >= 0).to(torch.float64)
        end = (mask * torch.arange(1, T + 1, device=device)).amax(-1).long()
        reward[every, end - 1] = self._scored(levels, context[every, end - 1], action[every, end - 1])
        paths = Paths(
            start=start, state=context, context=context, action=action, reward=reward, mask=mask, end=end,
            env_probability=torch.ones(N, dtype=torch.float64, device=device),
            start_probability=torch.full((len(told),), 1.0 / len(told), dtype=torch.float64, device=device),
        )  # fmt: skip
        policy = LMPolicy.reading(self.policy.model, *_whole_texts(levels, offsets))
        logits = self._logits(self.policy, levels, written)
        logp = row_logp(logits, context, action, mask)
        ref_logp = logp
        if self.ref is not self.policy:
            ref_logp = row_logp(self._logits(self.ref, levels, written), context, action, mask)
        unknown = torch.full((N, T + 1), torch.nan, dtype=torch.float64, device=device)
        return Written(
            paths, logits, logp, behavior_logp, ref_logp, unknown, unknown[:, 0], unknown[:, 0],
            kl_coefficient=self.kl_coefficient, entropy_coefficient=self.entropy_coefficient,
            policy=policy, decoding=self.decoding,
        )  # fmt: skip

    def _scored(self, levels: list[_Level], context: Tensor, token: Tensor) -> Tensor:
        """Rewards of rows that end with `token` after `context`, `[N]`; equal completions are asked for once."""
        V, lines = int(self.task.vocab_size), [line for level in levels for line in level.texts(self.task)]
        pairs, back = torch.unique(context * V + token, return_inverse=True)
        texts = [(lines[x // V][0], (*lines[x // V][1], x % V)) for x in pairs.tolist()]
        return torch.tensor(self.task.scores(texts), dtype=torch.float64, device=context.device)[back]


def draws_at_once(sampler: Sampler, most: int) -> int:
    """`most` draws, or a half, a quarter, … of them, so that what a model writes fits `MEMORY`; whatever is free now."""
    while isinstance(sampler, WritingSampler) and most > 1 and sampler.bytes_of(most) > MEMORY:
        most //= 2
    return most


def _level(texts: Sequence[Sequence[int]], prompt: Tensor, parent: Tensor, device: torch.device | str) -> _Level:
    longest = max(map(len, texts))
    padded = torch.tensor([(*text, *[0] * (longest - len(text))) for text in texts], device=device)
    return _Level(padded, torch.tensor(list(map(len, texts)), device=device), prompt, parent)


def _whole_texts(levels: list[_Level], offsets: list[int]) -> tuple[Tensor, Tensor]:
    """Prefixes that are not on the way to others, `[n, L]`, and for every prefix the row on whose way it is, and where."""
    row = torch.full((offsets[-1],), -1, device=levels[0].tokens.device)
    leaves, n = [], 0
    for t in reversed(range(len(levels))):
        own = row[offsets[t] : offsets[t + 1]]
        alone = own < 0
        own[alone] = torch.arange(n, n + int(alone.sum()), device=row.device)
        n += int(alone.sum())
        leaves.append(levels[t].tokens[alone])
        if t:
            above = row[offsets[t - 1] : offsets[t]]
            above.scatter_reduce_(0, levels[t].parent, own, "amax")
    longest = max(level.tokens.shape[1] for level in levels)
    tokens = torch.cat([torch.nn.functional.pad(x, (0, longest - x.shape[1])) for x in leaves])
    return tokens, torch.stack([row, torch.cat([level.length for level in levels]) - 1])


@dataclass(frozen=True)
class Mismatch:
    """Between the log-probabilities recorded when a batch was written and those that a trainer computes.

    `mean` and `largest` of |log π − log π_old| over tokens, in nats; `ratio` and `ratio_square`, the means over rows of
    w = π/π_old and w² (1 and 1 where there is no gap); `rounding`, the largest |recorded − recomputed| under the law that was
    written by, in float64; `outside`, the share of tokens that this law would have cut off. The last two are known where
    a model wrote: None elsewhere.
    """

    tokens: int
    mean: float
    largest: float
    ratio: float
    ratio_square: float
    rounding: float | None = None
    outside: float | None = None


def mismatch(table: Trajectories, index: Tensor) -> Mismatch:
    """Of the rows `index` of a table."""
    rows = index.flatten()
    acts = table.paths.mask[rows] > 0
    gap = (table.logp - table.behavior_logp)[rows]
    w, each = gap.sum(-1).exp(), gap[acts].abs()
    found = Mismatch(int(acts.sum()), float(each.mean()), float(each.max()), float(w.mean()), float((w * w).mean()))
    if not isinstance(table, Written):
        return found
    again = (table.recomputed - table.behavior_logp)[rows][acts]
    inside = again > -torch.inf
    largest = float(again[inside].abs().max()) if bool(inside.any()) else 0.0
    return replace(found, rounding=largest, outside=1.0 - float(inside.double().mean()))
