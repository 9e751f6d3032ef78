"""`LMTask`: prompts, a vocabulary and a reward on the finished text: what a language model is trained on, made small.

A policy writes at most `max_new_tokens` tokens after a prompt and stops at `eos`. Every completion is a rollout, its reward
sits on its last token, and the context of a token is what the model reads: prompt + everything after it so far. With a
`tool`, tokens that the policy did not write may follow one that it did; their mask is 0.

    completions of a prompt = Σ_{t ≤ T} (V − 1)^(t−1) + (V − 1)^T        (V^T without an eos)

A task comes in three sizes (`LMTask.size`): all its completions fit a *table*; or all its prefixes fit a *tree*, on which
J and ∇J are exact and batches are drawn; or neither does, and completions are *generated* by the model.

Guarantee: the number of completions is known, and refused where they do not fit, before one is made; the reward is called
twice on everything, in opposite order, and a reward that depends on anything but (prompt, completion) is an error.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from functools import cached_property
from itertools import islice
from numbers import Integral
from typing import Any, Literal

import torch
from torch import Tensor

from pgcheck.errors import BudgetError, ProblemError, in_words
from pgcheck.memory import free_memory, in_bytes
from pgcheck.trajectories import Paths, is_count

_SAME_REWARD = 1e-6  # a network in float32 may say as much else in a batch of another size

Tokens = tuple[int, ...]
Reward = Callable[[Any, Any], Any]
# (prompt, completion) -> float, both tuples of tokens; with batched=True, lists of those -> as many floats. A completion has
# everything after the prompt: the policy's tokens, a tool's, and the eos if it was written.
Tool = Callable[[Tokens, Tokens], Sequence[int]]
# (prompt, what follows it so far, the last token just written) -> tokens that are put after it, often none

TREE_COMPLETIONS = 4_000_000  # that a tree has at most: each is scored; about 16 columns of them, half a gigabyte
_SCORED_AT_ONCE = 65_536


@dataclass(frozen=True)
class PrefixTree:
    """The S prefixes of a task, by the number of tokens that the policy has written; those of the prompts come first.

    A completion is a prefix and a last token: `reward[s, a]` where `child[s, a]` is -1.
    """

    context: Tensor  # [S], what the model reads
    position: Tensor  # [S], tokens after the prompt
    child: Tensor  # [S, V], the prefix once token a is written, and what a tool says to it; -1: finished
    reward: Tensor  # [S, V], 0 where the text goes on
    begins: tuple[int, ...]  # prefixes begins[t] … begins[t + 1] − 1 wait for the policy's token number t

    def to(self, device: str) -> PrefixTree:
        """The tree in the memory of a device; itself, if it is there already."""
        if self.child.device == torch.device(device):
            return self
        return replace(self, **{x: getattr(self, x).to(device) for x in ("context", "position", "child", "reward")})

    @property
    def prompts(self) -> int:
        """Number of roots."""
        return self.begins[1]

    @property
    def steps(self) -> int:
        """T, most positions of a completion."""
        return int(self.position.max()) + 1


def _blocks(items: Iterator[tuple[int, Tokens]], size: int) -> Iterator[list[tuple[int, Tokens]]]:
    while block := list(islice(items, size)):
        yield block


@dataclass(frozen=True, eq=False)
class LMTask:
    """Prompts and a reward.

    Args:
        prompts: token ids of each, at least one token; drawn uniformly.
        vocab_size: V; tokens are 0 … V − 1.
        eos: the token that ends a completion; None: every completion has `max_new_tokens`.
        actions: the tokens that the policy may write, A of them; action a of a rollout is `actions[a]`. A language model is
            then the softmax over their logits alone. Default: every token, A = V.
        max_new_tokens: most tokens that the policy writes.
        reward: see `Reward`; what is correct is correct for these tokens and nothing else.
        batched: whether `reward` takes lists of prompts and completions.
        tool: see `Tool`; it is not asked after the last token.
        max_completions: most that are listed in a table.
        max_prefixes: most that are listed in a tree, where the completions are too many.
        returns: the values that the reward may take, if they are known: what is not listed is an error, and claims about
            rewards of 0 and 1 apply without a look at every completion.

    Raises:
        ProblemError: naming the argument, the value and the mend.
    """

    prompts: Sequence[Sequence[int]]
    _: KW_ONLY
    vocab_size: int
    eos: int | None
    max_new_tokens: int
    reward: Reward
    actions: Sequence[int] | None = None
    batched: bool = False
    tool: Tool | None = None
    max_completions: int = 10_000
    max_prefixes: int = 200_000
    returns: Sequence[float] | None = None

    def __post_init__(self) -> None:
        if not is_count(self.vocab_size) or self.vocab_size < 2:
            raise ProblemError(f"vocab_size: {self.vocab_size!r}; a policy needs at least two tokens to choose from.")
        if not is_count(self.max_new_tokens):
            raise ProblemError(f"max_new_tokens: {self.max_new_tokens!r}; it must be an integer of at least 1.")
        self._check_actions()
        if self.eos is not None and self.eos not in self._written:
            raise ProblemError(f"eos: {self.eos!r}; expected one of the tokens {self._tokens_in_words}, or None.")
        for name in ("reward", "tool"):
            if not callable(getattr(self, name)) and (name, self.tool) != ("tool", None):
                raise ProblemError(f"{name}: {getattr(self, name)!r}; expected a function of (prompt, completion).")
        asked: Any = self.prompts.tolist() if hasattr(self.prompts, "tolist") else self.prompts
        given = [tuple(p) if isinstance(p, Sequence) else () for p in asked] if isinstance(asked, Sequence) else []
        wrong = [i for i, prompt in enumerate(given) if not prompt or not all(map(self._is_token, prompt))]
        if wrong or not given:
            raise ProblemError(
                f"prompts: {asked[wrong[0]] if wrong else asked!r}; expected one prompt or more, each a sequence of one token"
                f" or more of 0 … {self.vocab_size - 1}."
            )
        if len(set(given)) < len(given):
            raise ProblemError(f"prompts: {next(p for p in given if given.count(p) > 1)} is given twice.")
        object.__setattr__(self, "prompts", tuple(given))
        if self.returns is not None:
            object.__setattr__(self, "returns", tuple(float(x) for x in self.returns))

    @property
    def size(self) -> Literal["table", "tree", "generated"]:
        """What of the task can be listed: every completion, every prefix, or neither."""
        if self._digits <= 18 and self.completions <= self.max_completions:
            return "table"
        few = self._digits <= 18 and self.prefix_count <= self.max_prefixes
        return "tree" if few and self.completions <= TREE_COMPLETIONS else "generated"

    def _check_actions(self) -> None:
        asked: Any = self.actions
        asked = asked.tolist() if hasattr(asked, "tolist") else asked
        if asked is None:
            object.__setattr__(self, "actions", tuple(range(self.vocab_size)))
            return
        given = list(asked) if isinstance(asked, Sequence) else []
        wrong = [x for x in given if not self._is_token(x)] or [x for x, n in Counter(given).items() if n > 1]
        if wrong or len(given) < 2:
            raise ProblemError(
                f"actions: {wrong[0] if wrong else asked!r}; expected two different tokens or more of 0 …"
                f" {self.vocab_size - 1}, those that the policy may write."
            )
        object.__setattr__(self, "actions", tuple(map(int, given)))

    @property
    def _tokens_in_words(self) -> str:
        return f"0 … {self.vocab_size - 1}" if len(self._written) == self.vocab_size else str(list(self._written))

    @cached_property
    def _written(self) -> dict[int, int]:
        """Token -> action."""
        return {token: a for a, token in enumerate(self.actions or ())}

    def _is_token(self, x: Any) -> bool:
        return isinstance(x, Integral) and not isinstance(x, bool) and 0 <= int(x) < self.vocab_size

    @property
    def completions(self) -> int:
        """N, of all prompts together."""
        return len(self.prompts) * self._completions_of(self.max_new_tokens)

    def _completions_of(self, tokens: int) -> int:
        if self.eos is None:
            return len(self._written) ** tokens
        others = len(self._written) - 1
        return sum(others**t for t in range(tokens)) + others**tokens

    @property
    def prefix_count(self) -> int:
        """S: every text after which the policy writes a token, of all prompts together."""
        others = len(self._written) - (self.eos is not None)
        return len(self.prompts) * sum(others**t for t in range(self.max_new_tokens))

    @property
    def _digits(self) -> float:
        """log₁₀ of the completions of one prompt, about: a number too long to write out is never made."""
        return self.max_new_tokens * math.log10(len(self._written) - (self.eos is not None))

    def too_many(self) -> str:
        """Why there is no table."""
        P, T = len(self.prompts), self.max_new_tokens
        fits = 0
        while P * self._completions_of(fits + 1) <= self.max_completions:
            fits += 1
        A = len(self._written)
        choices = f"vocab_size={A}" if self.vocab_size == A else f"{A} actions"
        number = f"{self.completions:,}" if self._digits < 12 else f"10^{self._digits:.0f}"
        nearest = (
            f"The nearest that fits: max_new_tokens={fits} ({P * self._completions_of(fits):,}); or s" if fits else "S"
        )
        return (
            f"max_new_tokens: {T} with {choices} and {P} prompt(s) makes {number} completions;"
            f" max_completions is {self.max_completions:,}. {nearest}hrink the vocabulary, give fewer prompts, or raise"
            " max_completions."
        )

    def too_many_prefixes(self) -> str:
        """Why there is no tree."""
        number = f"{self.prefix_count:,}" if self._digits < 12 else f"10^{self._digits:.0f}"
        return (
            f"max_new_tokens: {self.max_new_tokens} with vocab_size={self.vocab_size} and {len(self.prompts)} prompt(s)"
            f" makes {number} prefixes; at most {self.max_prefixes:,} (max_prefixes) with {TREE_COMPLETIONS:,} completions"
            " are listed, and J and ∇J are exact only there. Completions can still be drawn, by the model itself."
        )

    # -- the tree

    @cached_property
    def texts(self) -> tuple[tuple[int, Tokens, tuple[bool, ...]], ...]:
        """Every completion: number of the prompt, tokens, and which of them the policy wrote; short ones first.

        Raises:
            BudgetError: too many completions; with their number and what to change.
        """
        if self.size != "table":
            raise BudgetError(self.too_many())
        return tuple(
            (s, (*text, token), (*own, True))
            for t, level in enumerate(self.prefixes)
            for s, text, own in level
            for token in self._written
            if self.ends(t, token)
        )

    @cached_property
    def prefixes(self) -> tuple[list[tuple[int, Tokens, tuple[bool, ...]]], ...]:
        """Texts after which the policy writes its token number t, for each t; columns as those of `texts`.

        Raises:
            BudgetError: too many prefixes.
        """
        if self.size == "generated":
            raise BudgetError(self.too_many_prefixes())
        levels: list[list[tuple[int, Tokens, tuple[bool, ...]]]] = [[(s, (), ()) for s in range(len(self.prompts))]]
        for t in range(self.max_new_tokens - 1):
            grown = []
            for s, text, own in levels[-1]:
                for token in self._written:
                    if not self.ends(t, token):
                        said = self.said_by_tool(s, (*text, token))
                        grown.append((s, (*text, token, *said), (*own, True, *[False] * len(said))))
            levels.append(grown)
        return tuple(levels)

    def ends(self, t: int, token: int) -> bool:
        """Whether this token, number t of the policy's, is the last."""
        return token == self.eos or t + 1 == self.max_new_tokens

    def said_by_tool(self, s: int, text: Tokens) -> Tokens:
        """What follows `text`, which ends with a token of the policy's, before it writes again."""
        if self.tool is None:
            return ()
        where = f"after prompt {self.prompts[s]}, completion {text}"
        try:
            said, again = (tuple(self.tool(tuple(self.prompts[s]), text)) for _ in range(2))
        except Exception as error:
            raise ProblemError(f"tool: raises {in_words(error)} {where}.") from error
        if said != again:
            raise ProblemError(f"tool: says {said}, then {again} {where}; it must depend on nothing else.")
        if not all(map(self._is_token, said)):
            raise ProblemError(f"tool: says {said} {where}; expected tokens of 0 … {self.vocab_size - 1}.")
        return said

    @cached_property
    def contexts(self) -> tuple[Tokens, ...]:
        """What the model reads before each token that it writes, prompt + completion so far: `[K]`, short ones first."""
        found = {(*self.prompts[s], *text): None for level in self.prefixes for s, text, _ in level}
        return tuple(sorted(found, key=lambda tokens: (len(tokens), tokens)))

    def probe_completions(self) -> list[tuple[int, Tokens, tuple[bool, ...]]]:
        """One fixed random completion of each prompt, eight at most, as long as can be; columns as those of `texts`."""
        generator = torch.Generator().manual_seed(0)
        found = []
        for s in range(min(8, len(self.prompts))):
            text: Tokens = ()
            own: tuple[bool, ...] = ()
            for t in range(self.max_new_tokens):
                token = int(torch.randint(self.vocab_size, (), generator=generator))
                token = (token + 1) % self.vocab_size if token == self.eos else token
                said = () if self.ends(t, token) else self.said_by_tool(s, (*text, token))
                text, own = (*text, token, *said), (*own, True, *[False] * len(said))
            found.append((s, text, own))
        return found

    def probes(self) -> list[Tokens]:
        """Contexts of those: what a model will be asked to read."""
        found = {
            (*self.prompts[s], *text[:t]): None
            for s, text, own in self.probe_completions()
            for t in range(len(text))
            if own[t]
        }
        return list(found)

    def paths(self) -> Paths:
        """The table of all completions.

        Raises:
            ProblemError: the reward raises, is no finite number, or depends on more than (prompt, completion).
        """
        return self._paths

    @cached_property
    def _paths(self) -> Paths:
        T = max(len(text) for _, text, _ in self.texts)
        number = {tokens: k for k, tokens in enumerate(self.contexts)}
        states: dict[tuple[int, Tokens], int] = {}  # two prompts may meet in one context, never in one state
        state, context, action = [], [], []
        for s, text, own in self.texts:
            here = [t if t < len(text) and own[t] else None for t in range(T)]
            state.append([-1 if t is None else states.setdefault((s, text[:t]), len(states)) for t in here])
            context.append([-1 if t is None else number[(*self.prompts[s], *text[:t])] for t in here])
            action.append([-1 if t is None else self._written[text[t]] for t in here])
        end = torch.tensor([len(text) for _, text, _ in self.texts])
        scores = torch.tensor(self.scores([(s, text) for s, text, _ in self.texts]), dtype=torch.float64)
        reward = torch.zeros(len(end), T, dtype=torch.float64).scatter_(1, (end - 1)[:, None], scores[:, None])
        starts = len(self.prompts)
        return Paths(
            start=torch.tensor([s for s, _, _ in self.texts]), state=torch.tensor(state), context=torch.tensor(context),
            action=torch.tensor(action), reward=reward, mask=(torch.tensor(action) >= 0).to(torch.float64),
            env_probability=torch.ones(len(end)),
            start_probability=torch.full((starts,), 1.0 / starts, dtype=torch.float64), end=end,
        )  # fmt: skip

    @cached_property
    def tree(self) -> PrefixTree:
        """The tree of prefixes, every completion scored in blocks.

        Raises:
            BudgetError: too many prefixes.
            ProblemError: as `paths`.
        """
        self._refuse_a_large_tree()
        levels, V = self.prefixes, len(self._written)
        number = {tokens: k for k, tokens in enumerate(self.contexts)}
        states = [(s, text) for level in levels for s, text, _ in level]
        begins = [0]
        for level in levels:
            begins.append(begins[-1] + len(level))
        child = torch.full((len(states), V), -1)
        for t in range(len(levels) - 1):  # the children of a level in order are the next level
            goes_on = torch.tensor([not self.ends(t, token) for token in self._written])
            onward = child[begins[t] : begins[t + 1]]
            onward[goes_on.expand_as(onward)] = torch.arange(begins[t + 1], begins[t + 2])
        reward = torch.zeros(len(states), V, dtype=torch.float64)
        reward[child < 0] = torch.tensor(
            [x for block in _blocks(self._finished(levels), _SCORED_AT_ONCE) for x in self.scores(block)],
            dtype=torch.float64,
        )
        return PrefixTree(
            context=torch.tensor([number[(*self.prompts[s], *text)] for s, text in states]),
            position=torch.tensor([len(text) for _, text in states]),
            child=child, reward=reward, begins=tuple(begins),
        )  # fmt: skip

    @property
    def tree_bytes(self) -> int:
        """What the tree takes while it is made, about: texts of prefixes, tables over tokens, completions being scored."""
        each = 500 + 40 * self.max_new_tokens + 52 * len(self._written)
        return self.prefix_count * each + 250 * min(self.completions, _SCORED_AT_ONCE)

    def _refuse_a_large_tree(self) -> None:
        if self.size == "tree" and self.tree_bytes > (free := free_memory()):
            raise BudgetError(
                f"max_prefixes: the tree of {self.prefix_count:,} prefixes takes {in_bytes(self.tree_bytes)};"
                f" {in_bytes(free)} are free. Shorten max_new_tokens, shrink the vocabulary, or give fewer prompts."
            )

    def _finished(self, levels: Sequence[list[tuple[int, Tokens, tuple[bool, ...]]]]) -> Iterator[tuple[int, Tokens]]:
        """Completions, in the order of (prefix, last token)."""
        for t, level in enumerate(levels):
            last = [token for token in self._written if self.ends(t, token)]
            for s, text, _ in level:
                for token in last:
                    yield s, (*text, token)

    # -- the reward

    def scores(self, texts: Sequence[tuple[int, Tokens]]) -> list[float]:
        """The reward of each (number of the prompt, completion), asked for twice.

        Raises:
            ProblemError: it raises, is no finite number, or depends on more than (prompt, completion).
        """
        prompts, completions = [tuple(self.prompts[s]) for s, _ in texts], [text for _, text in texts]
        first = self._scored(prompts, completions)
        second = self._asked_again(prompts, completions)
        for prompt, text, a, b in zip(prompts, completions, first, second, strict=True):
            if not math.isclose(a, b, rel_tol=_SAME_REWARD, abs_tol=_SAME_REWARD):
                raise ProblemError(
                    f"reward: {a:.6g}, and {b:.6g} when asked again, for prompt {prompt}, completion {text}; it must depend on"
                    " nothing else: no randomness, no state, no other row."
                )
            if self.returns is not None and a not in self.returns:
                raise ProblemError(
                    f"returns: {list(self.returns)}, but the reward is {a:.6g} for prompt {prompt}, completion {text}; list"
                    " every value, or leave it out."
                )
        return first

    def _asked_again(self, prompts: list[Tokens], texts: list[Tokens]) -> list[float]:
        """From the last to the first, and the last one alone: what looks at other rows, all of them or those before, then says
        something else."""
        return [
            *(self._scored(prompts[-2::-1], texts[-2::-1])[::-1] if len(texts) > 1 else []),
            *self._scored(prompts[-1:], texts[-1:]),
        ]

    def _scored(self, prompts: list[Tokens], texts: list[Tokens]) -> list[float]:
        if self.batched:
            try:
                given = self.reward(list(prompts), list(texts))
                found = given.tolist() if hasattr(given, "tolist") else list(given)
            except Exception as error:
                raise ProblemError(
                    f"reward: raises {in_words(error)} on {len(texts)} completions, the first of them prompt {prompts[0]},"
                    f" completion {texts[0]}."
                ) from error
            if len(texts) == 1 and not isinstance(found, list):
                found = [found]  # squeezed
            if not isinstance(found, list) or len(found) != len(texts):
                got = f"{len(found)} values" if isinstance(found, list) else "one value"
                raise ProblemError(
                    f"reward: returned {got} for {len(texts)} completions, the last of them prompt {prompts[-1]},"
                    f" completion {texts[-1]}; with batched=True, return one number for each."
                )
        else:
            found = [self._asked(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
        return [self._number(x, prompt, text) for x, prompt, text in zip(found, prompts, texts, strict=True)]

    def _asked(self, prompt: Tokens, text: Tokens) -> Any:
        try:
            return self.reward(prompt, text)
        except Exception as error:
            raise ProblemError(f"reward: raises {in_words(error)} on prompt {prompt}, completion {text}.") from error

    def _number(self, x: Any, prompt: Tokens, text: Tokens) -> float:
        try:
            value = float(x)
        except Exception:
            value = math.nan
        if not math.isfinite(value):
            raise ProblemError(
                f"reward: {x!r} for prompt {prompt}, completion {text}; expected one finite number."
            ) from None
        return value


# -- verifiable tasks; token 0 is the eos


def parity(*, max_new_tokens: int = 3, vocab_size: int = 3) -> LMTask:
    """Prompt 1 asks for an odd number of 1s, prompt 2 for an even one."""
    return LMTask(
        [(1,), (2,)], vocab_size=vocab_size, eos=0, max_new_tokens=max_new_tokens,
        reward=lambda prompt, text: float(text.count(1) % 2 == prompt[0] % 2),
    )  # fmt: skip


def sum_mod(k: int = 3, *, max_new_tokens: int = 3, vocab_size: int = 4) -> LMTask:
    """The tokens written add up to those of the prompt, modulo k."""
    return LMTask(
        [(1, 1), (1, 2)], vocab_size=vocab_size, eos=0, max_new_tokens=max_new_tokens,
        reward=lambda prompt, text: float(sum(text) % k == sum(prompt) % k),
    )  # fmt: skip


def brackets(*, max_new_tokens: int = 3) -> LMTask:
    """1 opens and 2 closes: 1 if the prompt is closed and the eos written, half of it if it may still be closed."""

    def score(prompt: Tokens, text: Tokens) -> float:
        depth = 0
        for token in (*prompt, *text):
            depth += {1: 1, 2: -1}.get(token, 0)
            if depth < 0:
                return 0.0
        return 1.0 if depth == 0 and text[-1] == 0 else 0.5 / (1 + depth)

    return LMTask([(1,), (1, 1)], vocab_size=3, eos=0, max_new_tokens=max_new_tokens, reward=score)


def copy(*, max_new_tokens: int = 3, vocab_size: int = 4) -> LMTask:
    """Write the prompt again, then the eos: the share of places that are right."""

    def score(prompt: Tokens, text: Tokens) -> float:
        wanted = (*prompt, 0)
        return sum(a == b for a, b in zip(wanted, text, strict=False)) / max(len(wanted), len(text))

    return LMTask([(1, 2), (3, 1)], vocab_size=vocab_size, eos=0, max_new_tokens=max_new_tokens, reward=score)


def length(*, max_new_tokens: int = 3, vocab_size: int = 4, cost: float = 0.25) -> LMTask:
    """A point for every 1, less `cost` for every token: long is good where it is right."""
    return LMTask(
        [(2,)], vocab_size=vocab_size, eos=0, max_new_tokens=max_new_tokens,
        reward=lambda prompt, text: text.count(1) - cost * len(text),
    )  # fmt: skip


def tool_dialogue(*, max_new_tokens: int = 3, cost: float = 0.25) -> LMTask:
    """Answer 1 or 2, or write 3 first: then a tool says 4 and the right answer, and what it says is not the policy's."""

    def answer(prompt: Tokens) -> int:
        return 1 + sum(prompt) % 2

    def score(prompt: Tokens, text: Tokens) -> float:
        final = next((token for token in reversed(text) if token), None)
        return float(final == answer(prompt)) - cost * text.count(3)

    return LMTask(
        [(1, 2), (2, 2)], vocab_size=5, eos=0, max_new_tokens=max_new_tokens, reward=score,
        tool=lambda prompt, text: (4, answer(prompt)) if text[-1] == 3 else (),
    )  # fmt: skip
