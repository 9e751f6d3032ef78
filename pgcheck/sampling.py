"""Drawing batches: numbered draws that do not depend on how they are asked for.

A *draw* is one whole batch of B rows. Draw number i of a stream is made from uniforms of its own, `width` of them, which a
counter-based generator (Philox 4×64, Salmon et al. 2011) gives for i alone; rows are found from them by inverting the law
of the start and of the rollout given the start, or of each token given what stands before it.

Guarantee: draw i of (seed, problem) is the same whatever was drawn before it, in blocks of any size and in any order, and for
every estimator; global generators are not touched.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from pgcheck.batch import gathered_rows
from pgcheck.envs.language import PrefixTree
from pgcheck.errors import UsageError
from pgcheck.trajectories import Paths, Trajectories

BITS = 53  # of a uniform
_PER_COUNT = 4  # 64-bit numbers that one step of the counter gives
_FEW = 2  # comparisons that are faster than a guide
_MOST_TUPLES = 4096  # of rollouts that one number gives at once
_CELLS, _CELLS_AN_ENTRY = 2**17, 512  # of a guide, so that it stays in the cache and most cells have one outcome
_SHORT = 2**15  # outcomes that are kept in 16 bits there


def as_device(name: str) -> str:
    """A device of torch's by its name; "auto" is the GPU where there is one.

    Raises:
        UsageError: there is none of that name here.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError, TypeError) as error:
        why = (str(error) or type(error).__name__).splitlines()[0]
        raise UsageError(f"device: {name!r} cannot be used here ({why}); take 'cpu' or 'auto'.") from None
    return name


@dataclass(frozen=True)
class Stream:
    """Independent uniforms for numbered draws.

    Args:
        seed: whatever number the user gave.
        names: what the stream is for (a problem's digest, "rollouts"); streams of other names are independent.
    """

    seed: int
    names: tuple[str, ...]

    @cached_property
    def _key(self) -> np.ndarray:
        text = "|".join((str(self.seed), *self.names))
        return np.frombuffer(hashlib.sha256(text.encode()).digest()[:16], dtype=np.uint64)

    def numbers(self, first: int, count: int, width: int) -> Tensor:
        """Draws number first … first + count − 1: `[count, width]` in [0, 2^53), int64."""
        steps = -(-width // _PER_COUNT)
        philox = np.random.Philox(key=self._key, counter=first * steps)
        raw = philox.random_raw(count * steps * _PER_COUNT)
        raw >>= np.uint64(64 - BITS)
        return torch.from_numpy(raw.view(np.int64)).view(count, -1)[:, :width]

    def uniforms(self, first: int, count: int, width: int) -> Tensor:
        """The same as numbers in [0, 1), float64."""
        return self.numbers(first, count, width).to(torch.float64) * 2.0**-BITS


class Sampler(Protocol):
    """Where numbered batches come from."""

    @property
    def labels(self) -> Tensor:
        """The group of each row, `[B]`."""

    def draw(self, first: int, count: int) -> tuple[Trajectories, Tensor]:
        """Draws number first … first + count − 1: a table of rollouts and the rows of it that they are, `[count, B]`.

        The table need not be the same from call to call, nor hold anything that was not drawn.
        """


@dataclass(frozen=True)
class Laws:
    """Discrete laws, one for each row of a table of weights, drawn from by inversion: the first entry of a row with u below
    `upto`, or its last. A u is given as the integer 2^53 u, and as many bits of it are looked at as leave room for the row in
    62: all of them up to 511 rows.

    A guide table (Chen & Asau 1974; Devroye 1986, III.2.4) says the outcome wherever a whole cell [c/m, (c+1)/m) of u has one;
    m is a power of two, so that the cell is the leading bits. The rest is searched for.
    """

    upto: Tensor  # [entries] P(outcome ≤ this | row), ascending in each row
    outcome: Tensor  # [entries]
    last: Tensor  # [rows] the last entry of each

    @classmethod
    def of(cls, weight: Tensor) -> Laws:
        """Of weights `[rows, outcomes]`, each row of some positive sum or of none (then it must not be drawn from)."""
        row, outcome = (weight > 0).nonzero(as_tuple=True)
        begins = torch.searchsorted(row, torch.arange(len(weight) + 1, device=weight.device))
        p = weight / weight.sum(-1, keepdim=True)
        return cls(p.cumsum(-1)[row, outcome].clamp(max=1.0), outcome, begins[1:] - 1)

    @classmethod
    def of_entries(cls, weight: Tensor, row: Tensor, rows: int, outcome: Tensor) -> Laws:
        """Of positive weights `[entries]` of the outcomes of each row, which stand row by row: `row` ascends."""
        begins = torch.searchsorted(row, torch.arange(rows + 1, device=row.device))
        upto = torch.cat([weight.new_zeros(1), weight.cumsum(0)])
        low, high = upto[begins[:-1]], upto[begins[1:]]
        return cls(((upto[1:] - low[row]) / (high - low)[row]).clamp(max=1.0), outcome, begins[1:] - 1)

    @cached_property
    def _bits(self) -> int:
        """Of u, that are looked at."""
        return min(BITS, 62 - len(self.last).bit_length())

    @cached_property
    def _keys(self) -> Tensor:
        """2^bits (row + upto), rounded up: what a row's own bits of u must stay below, `[entries]`, ascending."""
        row = torch.searchsorted(self.last, torch.arange(len(self.upto), device=self.last.device))
        return (row << self._bits) + (self.upto * 2.0**self._bits).ceil().long()

    @cached_property
    def _few(self) -> tuple[Tensor, list[Tensor]] | None:
        """Of rows with few entries: the first of each `[rows]`, and from which u on it is the second, third, … of each."""
        first = torch.cat([self.last.new_zeros(1), self.last[:-1] + 1]).clamp(max=len(self.outcome) - 1)
        most = int((self.last - first).max())
        if most > _FEW:
            return None
        place = (first + torch.arange(most, device=first.device).unsqueeze(1)).clamp(max=len(self.upto) - 1)
        own = self._keys[place] - (torch.arange(len(first), device=first.device) << self._bits)
        return first, list(torch.where(place < self.last, own, 2**62))

    @cached_property
    def certain(self) -> Tensor | None:
        """The outcome of each row `[rows]`, where none has a second one."""
        return None if self._few is None or self._few[1] else self.outcome.index_select(0, self._few[0])

    @cached_property
    def _guide(self) -> tuple[int, Tensor]:
        """The log2 of m, and the outcome of each cell `[rows · m]`, −1 where there are several."""
        rows, entries, k = len(self.last), len(self.outcome), 0
        while rows << (k + 1) <= max(min(_CELLS_AN_ENTRY * entries, _CELLS), 4 * entries):
            k += 1
        edge = torch.arange((rows << k) + 1, device=self.last.device) << (self._bits - k)
        low = torch.searchsorted(self._keys, edge[:-1], right=True)
        one = low == torch.searchsorted(self._keys, edge[1:])  # none in between
        entry = torch.minimum(low, self.last.repeat_interleave(1 << k)).clamp(min=0)
        short = int(self.outcome.max()) < _SHORT
        return k, torch.where(one, self.outcome[entry], -1).to(torch.int16 if short else torch.int64)

    def draw(self, row: Tensor, number: Tensor) -> Tensor:
        """The outcome of each `row` `[..., n]`, or `[..., 1]`, at `number` = 2^53 u `[..., n]`."""
        if self._few is not None:
            return self._of_few(row, number)
        k, outcome = self._guide
        own = number.flatten()
        cell = own >> (BITS - k)
        if len(self.last) > 1:
            cell.view(number.shape).add_(row << k)
        found = gathered_rows(outcome, cell)
        several = _below_zero(found)
        if len(several):
            of = cell.index_select(0, several) >> k
            key = (of << self._bits) + (own.index_select(0, several) >> (BITS - self._bits))
            entry = torch.searchsorted(self._keys, key, right=True)
            entry = torch.minimum(entry, self.last.index_select(0, of))
            found.scatter_(0, several, self.outcome.index_select(0, entry).to(found.dtype))
        return found.to(torch.int64).view(number.shape)

    def _of_few(self, row: Tensor, number: Tensor) -> Tensor:
        assert self._few is not None
        first, rest = self._few
        own, alone = number.flatten() >> (BITS - self._bits), len(first) == 1
        row = first.new_zeros(1) if alone else row.expand_as(number).flatten()
        entry = first.index_select(0, row).expand(len(own))
        for upto in rest:
            entry = entry + (upto.index_select(0, row) <= own)
        return self.outcome.index_select(0, entry).view(number.shape)


def _below_zero(x: Tensor) -> Tensor:
    """Where; numpy is faster."""
    return torch.from_numpy(np.flatnonzero(x.numpy() < 0)) if x.device.type == "cpu" else (x < 0).nonzero().squeeze(1)


@dataclass(frozen=True)
class TableSampler:
    """Batches from the table of all rollouts: a start for each group by its probability, then rollouts by that of the
    behaviour policy; where they are few, one number gives several rows of a group."""

    table: Trajectories
    labels: Tensor  # [B]
    stream: Stream

    @cached_property
    def _start(self) -> Laws:
        return Laws.of(self.table.paths.start_probability.unsqueeze(0))

    @cached_property
    def _order(self) -> tuple[Tensor, Tensor]:
        """The rollouts that are drawn at all, start after start, and how many each start has."""
        start = self.table.paths.start
        order = start.argsort(stable=True)
        order = order[self.table.behavior_probability[order] > 0]
        return order, torch.bincount(start[order], minlength=len(self.table.paths.start_probability))

    @cached_property
    def _rows_a_number(self) -> int:
        """The k: it divides the size of every group, and the tuples of k rollouts are few."""
        size = math.gcd(*torch.bincount(self.labels).tolist())
        fitting = (k for k in range(size, 1, -1) if size % k == 0 and k < BITS)
        return next((k for k in fitting if float((self._order[1].double() ** k).sum()) <= _MOST_TUPLES), 1)

    @cached_property
    def _tuples(self) -> tuple[Tensor, Laws]:
        """Tuples of rollouts with one start `[·, k]`, and the law of their number given the start; made once a table."""
        made: dict[int, tuple[Tensor, Laws]] = vars(self.table).setdefault("_tuples", {})
        if self._rows_a_number not in made:
            made[self._rows_a_number] = self._made_tuples(self._rows_a_number)
        return made[self._rows_a_number]

    def _made_tuples(self, k: int) -> tuple[Tensor, Laws]:
        order, number = self._order
        device, tuples = order.device, number**k
        start = torch.arange(len(number), device=device).repeat_interleave(tuples)
        n, last = number[start].unsqueeze(1), tuples.cumsum(0) - 1
        place = torch.arange(len(start), device=device) - (last + 1 - tuples)[start]  # among those of its start
        digits = place.unsqueeze(1) // n ** torch.arange(k, device=device) % n
        rows = order[(number.cumsum(0) - number)[start].unsqueeze(1) + digits]
        p = self.table.behavior_probability[rows].prod(1)
        return rows, Laws.of_entries(p, start, len(number), torch.arange(len(rows), device=device))

    def draw(self, first: int, count: int) -> tuple[Trajectories, Tensor]:
        groups, k = int(self.labels[-1]) + 1, self._rows_a_number
        tuples, laws = self._tuples
        of_number = self.labels[::k]
        n = self.stream.numbers(first, count, groups + len(of_number)).to(self.labels.device)
        start = self._start.draw(of_number.new_zeros(1, 1), n[:, :groups])
        each, rest = len(of_number) // groups, len(of_number) % groups
        if rest or not torch.equal(of_number[::each], of_number[each - 1 :: each]):
            found = laws.draw(start.index_select(1, of_number), n[:, groups:])
        else:
            found = laws.draw(start.unsqueeze(-1), n[:, groups:].unflatten(1, (groups, each)))
        return self.table, gathered_rows(tuples, found.flatten()).view(count, -1)


@dataclass(frozen=True)
class SplitSampler:
    """Batches from a table in which each row of another is split, into one for every outcome of what is drawn beside it. The
    rollouts are those of `plain`, by the same numbers; what is drawn beside them has numbers of its own."""

    plain: TableSampler
    table: Trajectories
    source: Tensor  # [N] the row of `plain.table` that each is part of

    @property
    def labels(self) -> Tensor:
        """The group of each row, `[B]`."""
        return self.plain.labels

    @cached_property
    def _beside(self) -> tuple[Stream, Laws]:
        order = self.source.argsort(stable=True)
        order = order[self.table.behavior_probability[order] > 0]
        weight, row = self.table.behavior_probability[order], self.source[order]
        stream = replace(self.plain.stream, names=(*self.plain.stream.names, "beside"))
        return stream, Laws.of_entries(weight, row, len(self.plain.table), order)

    def draw(self, first: int, count: int) -> tuple[Trajectories, Tensor]:
        """As `Sampler.draw`."""
        stream, laws = self._beside
        _, index = self.plain.draw(first, count)
        return self.table, laws.draw(index, stream.numbers(first, count, len(self.labels)).to(index.device))


def inverted(law: Tensor, u: Tensor) -> Tensor:
    """The outcome of each row of cumulative probabilities `law` `[n, A]` (up to 1, exactly) at `u` `[n]` in [0, 1)."""
    return torch.searchsorted(law, u.unsqueeze(-1), right=True).squeeze(-1)


_GATHERED = 2**24  # entries of a law that are gathered at once


@dataclass(frozen=True)
class TreeSampler:
    """Batches from a tree of prefixes: a prompt for each group, then one token after another, all rows at once.

    Probabilities of whole rollouts are not filled in (NaN), values are: V of the reward alone.
    """

    tree: PrefixTree
    logits: Tensor  # [K, V] of the target policy
    behavior_logits: Tensor  # [K, V]
    ref_logits: Tensor  # [K, V]
    value: Tensor  # [S]
    labels: Tensor  # [B]
    stream: Stream
    kl_coefficient: float = 0.0
    entropy_coefficient: float = 0.0

    @cached_property
    def _law(self) -> Tensor:
        upto = torch.softmax(self.behavior_logits, -1).cumsum(-1)
        return upto / upto[:, -1:]

    @cached_property
    def _logps(self) -> list[Tensor]:
        return [torch.log_softmax(z, -1).flatten() for z in (self.logits, self.behavior_logits, self.ref_logits)]

    def draw(self, first: int, count: int) -> tuple[Trajectories, Tensor]:
        """As `Sampler.draw`: a table of `count` · B rows, each drawn once."""
        tree, device = self.tree, self.logits.device
        B, groups, T = len(self.labels), int(self.labels[-1]) + 1, tree.steps
        u = self.stream.uniforms(first, count, groups + B * (len(tree.begins) - 1)).to(device)
        prompt = (u[:, :groups] * tree.prompts).long().clamp(max=tree.prompts - 1)[:, self.labels].flatten()
        u = u[:, groups:].reshape(count * B, -1)  # [N, tokens]
        row, at = torch.arange(count * B, device=device), prompt
        state, context, action = (torch.full((count * B, T), -1, device=device) for _ in range(3))
        reward, value = (torch.zeros(count * B, T + x, dtype=torch.float64, device=device) for x in (0, 1))
        end = torch.zeros(count * B, dtype=torch.int64, device=device)
        for t in range(len(tree.begins) - 1):
            k, position = tree.context[at], tree.position[at]
            token = self._tokens(k, u[row, t])
            state[row, position], context[row, position], action[row, position] = at, k, token
            reward[row, position], value[row, position] = tree.reward[at, token], self.value[at]
            end[row] = position + 1
            goes_on = tree.child[at, token] >= 0
            row, at = row[goes_on], tree.child[at, token][goes_on]
        acts = action >= 0
        for t in range(T - 2, 0, -1):  # while a tool speaks, of the token that comes next
            value[:, t] = torch.where(acts[:, t], value[:, t], value[:, t + 1])
        paths = Paths(
            start=prompt, state=state, context=context, action=action, reward=reward, mask=acts.to(torch.float64),
            env_probability=torch.ones(count * B, dtype=torch.float64, device=device),
            start_probability=torch.full((tree.prompts,), 1.0 / tree.prompts, dtype=torch.float64, device=device), end=end,
        )  # fmt: skip
        cell = context.clamp(min=0) * self.logits.shape[1] + action.clamp(min=0)
        logp, behavior_logp, ref_logp = (torch.where(acts, x[cell], 0.0) for x in self._logps)
        unknown = torch.full((count * B,), torch.nan, dtype=torch.float64, device=device)
        table = Trajectories(
            paths, self.logits, logp, behavior_logp, ref_logp, value, unknown, unknown,
            kl_coefficient=self.kl_coefficient, entropy_coefficient=self.entropy_coefficient,
        )  # fmt: skip
        return table, torch.arange(count * B, device=device).reshape(count, B)

    def _tokens(self, context: Tensor, u: Tensor) -> Tensor:
        size = max(1, _GATHERED // self._law.shape[1])
        parts = zip(context.split(size), u.split(size), strict=True)
        return torch.cat([inverted(self._law[k], x) for k, x in parts])
