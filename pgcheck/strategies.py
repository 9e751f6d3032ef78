"""Hypothesis strategies: random problems small enough to enumerate, and what runs on them.

    from hypothesis import given
    from pgcheck import exact_moments, strategies

    @given(strategies.problems(min_group_size=2))
    def test_my_estimator(problem): ...

Guarantee: nothing is drawn and thrown away (no `assume`, no filter), every problem drawn is well formed and has at most
`max_batches` batches, counted before one of them is made; expectations over them are exact, so no such test can flake.

**Shrinking.** A shorter description comes first: fewer actions, steps and states, one start, no observation, no terminal
state, no randomness of the environment, γ = 1, on-policy, the fewest rows. Then every number goes to the first of its list:
rewards 0, 1, −1, …, logits 0, 1, −1, …, probabilities ½, ¼, …. The smallest problem of all is one state, two actions,
one step, rewards 0, logits 0; the smallest that shows anything pays 1 for the second action.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from pgcheck.batch import DISCOUNT_CLOCKS, Batch, DiscountClock
from pgcheck.engines.enumeration import count_multisets
from pgcheck.envs.language import LMTask, Tokens
from pgcheck.envs.tabular import TabularMDP
from pgcheck.errors import UsageError
from pgcheck.estimators import advantages as adv
from pgcheck.estimators import aggregation as agg
from pgcheck.estimators import ratios
from pgcheck.estimators.base import (
    COUPLES,
    Claim,
    Condition,
    Couples,
    Estimator,
    fixed_length,
    from_coefficients,
    full_support,
    on_policy,
    proportional,
    unbiased,
    undiscounted,
)
from pgcheck.estimators.zoo import compose, own_share_of_batch, own_share_of_groups
from pgcheck.policies.tabular import LinearPolicy, ModulePolicy, SoftmaxTable
from pgcheck.policies.transformer import TinyGPT
from pgcheck.problem import Problem
from pgcheck.trajectories import SideTable

# Short numbers, the plainest first: what is drawn shrinks towards the front.
REWARDS = (0.0, 1.0, -1.0, 2.0, 0.5, -0.5, 3.0, -2.0, 0.3, 1.7)
LOGITS = (0.0, 1.0, -1.0, 0.5, -0.5, 2.0, -2.0, 0.3, -0.7, 1.2)
DISCOUNTS = (1.0, 0.5, 0.9, 0.0)
SHARES = (0.5, 0.25, 0.75, 0.1, 0.9)  # of the first of two outcomes
TEMPERATURES = (2.0, 0.5, 1.5, 0.8)
COEFFICIENTS = (1.0, 0.5, 2.0, 0.1)  # of a KL or entropy term, where there is one

RewardKind = Literal["dense", "outcome"]  # at every step; only with the last action of an episode
PolicyKind = Literal["table", "linear", "module"]
BehaviorKind = Literal["drifted", "stale", "temperature", "truncated"]
Grouping = Literal["any", "equal", "one", "rows"]  # "rows": independent rollouts, every group of one


def _flag(draw: st.DrawFn, wanted: bool | None) -> bool:
    """`wanted` None: either."""
    return draw(st.booleans()) if wanted is None else wanted


def _grid(draw: st.DrawFn, rows: int, columns: int, values: int) -> list[list[int]]:
    """Indices of values, `rows` × `columns` of them, 0 the plainest."""
    one = st.integers(0, values - 1)
    return [[draw(one) for _ in range(columns)] for _ in range(rows)]


def _folded(grid: list[list[int]], rows: int, columns: int, values: Sequence[Any]) -> list[list[Any]]:
    """A table of `rows` × `columns` values from a larger grid of indices, which is folded onto it and added up: a number that
    matters is not lost when the state or the action it was drawn for goes, and what was uniform stays so."""
    return [
        [values[sum(sum(row[a::columns]) for row in grid[s::rows]) % len(values)] for a in range(columns)]
        for s in range(rows)
    ]


# -- environments

_LOOKS, _OPTIONS = 2, 12  # most observation states; what a choice among next states is drawn from


@dataclass(frozen=True)
class _Roles:
    """Which state does what: acting states first, then observations, then the terminal one."""

    actions: int
    horizon: int
    starts: int
    layer: tuple[int, ...]  # of acting and observation states; all 0 where states may recur
    acting: int
    ends: bool

    @property
    def observed(self) -> range:
        return range(self.acting, len(self.layer))

    @property
    def states(self) -> int:
        return len(self.layer) + self.ends

    def choices(self, state: int) -> int:
        """Moves of its own that the state has: one where nobody acts."""
        return 1 if state in self.observed else self.actions

    def onward(self, state: int) -> list[int]:
        """Where a move may lead, the plainest first; an observation leads to acting states."""
        if max(self.layer) > 0:
            following = [s for s, t in enumerate(self.layer) if t == self.layer[state] + 1] or [state]
        else:
            following = list(range(self.acting if state in self.observed else len(self.layer)))
        return following + ([len(self.layer)] if self.ends and state not in self.observed else [])


_Move = list[tuple[int, float]]  # (next state, probability), one or two of them


def _rollouts(roles: _Roles, moves: list[list[_Move]]) -> list[int]:
    """Number of rollouts from each start."""
    to_end = [1] * roles.states
    for _ in range(roles.horizon):
        to_end = [sum(to_end[s2] for move in own for s2, _ in move) for own in moves] + [1] * roles.ends
    return to_end[: roles.starts]


@dataclass(frozen=True)
class _Drawn:
    """An environment, and how many rollouts each start has (before those that look the same are merged)."""

    env: TabularMDP
    roles: _Roles
    rollouts: list[int]


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """What `mdps` and `problems` take as keywords.

    Args:
        max_states: most acting states; of each step with `reward="outcome"`. Up to two observation states and one terminal
            state come on top.
        max_rollouts: most rollouts of all starts together, before those that look the same are merged.
        min_horizon: fewest positions of the longest episode.
        reward: `"dense"`: r(s, a) or r(s, a, s') at every step. `"outcome"`: every step has states of its own, and only the
            last position of an episode pays.
        rewards: their values; `(0.0, 1.0)` for a binary reward.
        discounts: values of γ; `(1.0,)` for none.
        clocks: what γ counts.
        observation, terminal, random_moves: True asks for it, False rules it out, None leaves it open. Without observation
            and terminal states every rollout has the same length.

    Raises:
        UsageError: no room for two actions over so many steps.
    """

    max_states: int = 3
    max_actions: int = 3
    max_horizon: int = 3
    max_starts: int = 2
    min_starts: int = 1
    max_rollouts: int = 12
    min_horizon: int = 1
    reward: RewardKind = "dense"
    rewards: Sequence[float] = REWARDS
    discounts: Sequence[float] = DISCOUNTS
    clocks: Sequence[DiscountClock] = DISCOUNT_CLOCKS
    observation: bool | None = None
    terminal: bool | None = None
    random_moves: bool | None = None

    def __post_init__(self) -> None:
        if 2**self.shortest > self.room or self.shortest > self.max_horizon:
            raise UsageError(
                f"max_rollouts, max_horizon: {self.max_rollouts}, {self.max_horizon}; no room for {self.shortest} steps."
            )
        if self.min_starts > min(self.max_starts, self.max_states):
            raise UsageError(f"min_starts: {self.min_starts}; max_starts and max_states leave fewer.")

    @property
    def shortest(self) -> int:
        """Fewest positions that have room for what is asked."""
        return max(self.min_horizon, 2 if self.observation or self.terminal else 1)

    @property
    def room(self) -> int:
        """Most rollouts of one start."""
        return self.max_rollouts // self.min_starts

    @property
    def layers(self) -> int:
        """Most steps with states of their own."""
        return self.max_horizon if self.reward == "outcome" else 1

    @property
    def most_acting(self) -> int:
        """Most acting states in all."""
        return self.layers * self.max_states


def _mdp(draw: st.DrawFn, b: Bounds) -> _Drawn:
    # What there is. A number that others leave no room for is cut, not drawn from a smaller range: see the module.
    A, H = draw(st.integers(2, b.max_actions)), draw(st.integers(b.shortest, b.max_horizon))
    A = min(A, math.floor(b.room ** (1 / b.shortest) + 1e-9))
    H = min(H, math.floor(math.log(b.room, A) + 1e-9))
    starts = min(draw(st.integers(b.min_starts, b.max_starts)), b.max_states, b.max_rollouts // A**H)
    widths = [max(draw(st.integers(1, b.max_states)), 1 if t else starts) for t in range(b.layers)][:H]
    layer = [t for t, width in enumerate(widths) for _ in range(width)]
    looks = draw(st.integers(1 if b.observation else 0, 0 if b.observation is False else _LOOKS)) if H > 1 else 0
    ends = _flag(draw, b.terminal) and H > 1
    roles = _Roles(A, H, starts, (*layer, *[min(1, len(widths) - 1)] * looks), len(layer), ends)
    risky, by_next = _flag(draw, b.random_moves), draw(st.booleans()) and b.reward == "dense"
    gamma, share = draw(st.sampled_from(b.discounts)), draw(st.sampled_from(SHARES))
    clock = draw(st.sampled_from(b.clocks))

    def table(values: Sequence[Any]) -> list[list[Any]]:
        """A value for each acting state and action, then for each observation state."""
        acts, sees = _grid(draw, b.most_acting, b.max_actions, len(values)), _grid(draw, _LOOKS, 1, len(values))
        return _folded(acts, roles.acting, A, values) + (_folded(sees, looks, 1, values) if looks else [])

    # Where its moves lead; the last actions of state 0 to what else there is, so that it is met.
    moves: list[list[_Move]] = []
    for s, row in enumerate(table(range(_OPTIONS))):
        onward = roles.onward(s)
        moves.append([[(onward[x % len(onward)], 1.0)] for x in row])
    last = len(roles.layer)
    met = [*list(roles.observed)[:1], *[last] * ends]
    moves[0] = [*moves[0][: A - len(met)], *([(s, 1.0)] for s in met)]
    if risky:
        second, shares = table(range(_OPTIONS)), table(SHARES)
        for s, own in enumerate(moves):
            for a, before in enumerate(own):
                to, p = before[0][0], shares[s][a]
                others = [to, *(x for x in roles.onward(s) if x != to)]
                other = others[second[s][a] % len(others)]
                if other != to:
                    own[a] = [(to, p), (other, round(1 - p, 6))]
                if sum(_rollouts(roles, moves)) > b.max_rollouts:
                    own[a] = before

    # What they pay.
    S = roles.states
    pays = table(b.rewards)
    otherwise = table(b.rewards) if by_next and risky else pays
    transition, pay = torch.zeros(S, A, S, dtype=torch.float64), torch.zeros(S, A, S, dtype=torch.float64)
    transition[last:, :, last:] = 1.0
    for s, own in enumerate(moves):
        over = slice(None) if b.reward == "dense" or roles.layer[s] == H - 1 else slice(last, None)
        for a, move in enumerate(own):
            where = slice(None) if s in roles.observed else a  # nobody acts: the same for every action
            pay[s, where, over] = pays[s][a]
            if len(move) > 1 and b.reward == "dense":
                pay[s, where, move[1][0]] = otherwise[s][a]
            for s2, p in move:
                transition[s, where, s2] = p
    each = round((1 - share) / max(starts - 1, 1), 3)
    law = [1.0] if starts == 1 else [round(1 - (starts - 1) * each, 3), *[each] * (starts - 1)]
    env = TabularMDP(
        transition,
        pay[..., 0] if bool((pay == pay[..., :1]).all()) else pay,
        [*law, *[0.0] * (S - starts)],
        horizon=H,
        discount=gamma,
        terminal=[last] if ends else [],
        observation=list(roles.observed),
        discount_clock=clock,
    )
    return _Drawn(env, roles, _rollouts(roles, moves))


@st.composite
def mdps(draw: st.DrawFn, **bounds: Any) -> TabularMDP:
    """Finite MDPs within `Bounds(**bounds)`; state 0 acts and is a start."""
    return _mdp(draw, Bounds(**bounds)).env


# -- policies


@st.composite
def policies(
    draw: st.DrawFn, contexts: int, actions: int, *, kinds: Sequence[PolicyKind] = ("table", "linear", "module")
) -> nn.Module:
    """Policies over so many contexts: a table of logits; linear features; a module, two tanh units that contexts share."""
    kind = draw(st.sampled_from(kinds)) if len(kinds) > 1 else kinds[0]
    if kind == "table":
        return SoftmaxTable(_logits(draw, contexts, actions))
    if kind == "linear":
        features = draw(st.integers(1, 2))
        return LinearPolicy(_logits(draw, contexts, features), _logits(draw, features, actions))
    module = nn.Sequential(nn.Linear(contexts, 2), nn.Tanh(), nn.Linear(2, actions)).to(torch.float64)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(_logits(draw, 1, p.numel()).reshape(p.shape))
    return ModulePolicy(module, contexts=contexts)


def _logits(draw: st.DrawFn, rows: int, columns: int, *, most: tuple[int, int] = (0, 0)) -> Tensor:
    """`[rows, columns]`, from a grid of `most` rows and columns."""
    grid = _grid(draw, max(rows, most[0]), max(columns, most[1]), len(LOGITS))
    return torch.tensor(_folded(grid, rows, columns, LOGITS), dtype=torch.float64)


@st.composite
def behaviors(
    draw: st.DrawFn,
    logits: Tensor,
    *,
    kinds: Sequence[BehaviorKind] = ("stale", "drifted", "temperature", "truncated"),
) -> Tensor:
    """Logits `[K, A]` of a sampler that differs from π = softmax(`logits`) in context 0.

    `"stale"`: the policy before an update of one logit; `"drifted"`: another policy; `"temperature"`: softer or sharper
    (stale where π is even in context 0); `"truncated"`: some actions cut off, at least one in context 0 and never all.
    """
    return _behavior(draw, logits, kinds, most=(0, 0))


def _behavior(draw: st.DrawFn, logits: Tensor, kinds: Sequence[BehaviorKind], *, most: tuple[int, int]) -> Tensor:
    kind = draw(st.sampled_from(kinds)) if len(kinds) > 1 else kinds[0]
    K, A = logits.shape
    out = logits.clone()
    if kind == "truncated":
        first, fewer = (_folded(_grid(draw, max(K, most[0]), 1, A), K, 1, range(A)) for _ in range(2))
        for k in range(K):
            kept = A - fewer[k][0] if k else max(A - 1 - fewer[k][0], 1)
            out[k, [(first[k][0] + kept + j) % A for j in range(A - kept)]] = -math.inf
    elif kind == "temperature" and bool((logits[0] != logits[0, 0]).any()):
        out = (logits / draw(st.sampled_from(TEMPERATURES))).round(decimals=4)
    else:
        moved = out[0, 0] + draw(st.sampled_from([x for x in LOGITS if x]))
        if kind == "drifted":
            out[1:] = _logits(draw, K, A, most=most)[1:]
        out[0, 0] = moved
    return out


# -- problems


@functools.cache
def _plans(max_rows: int, grouping: Grouping) -> tuple[tuple[int, ...], ...]:
    """Group sizes, largest first, of at most `max_rows` rows: fewer rows first, then fewer groups."""

    def parts(rows: int, largest: int) -> list[tuple[int, ...]]:
        if rows == 0:
            return [()]
        return [(n, *rest) for n in range(min(rows, largest), 0, -1) for rest in parts(rows - n, n)]

    allowed: dict[Grouping, Callable[[tuple[int, ...]], bool]] = {
        "any": lambda sizes: True,
        "equal": lambda sizes: len(set(sizes)) == 1,
        "one": lambda sizes: len(sizes) == 1,
        "rows": lambda sizes: set(sizes) == {1},
    }
    every = [sizes for rows in range(1, max_rows + 1) for sizes in sorted(parts(rows, rows), key=len)]
    return tuple(sizes for sizes in every if allowed[grouping](sizes))


def _count_batches(rollouts: Sequence[int], sizes: tuple[int, ...]) -> int:
    """Batches of groups of these sizes, as multisets of multisets."""
    count = 1
    for size in set(sizes):
        outcomes = sum(count_multisets(n, size) for n in rollouts)
        count *= count_multisets(outcomes, sizes.count(size))
    return count


def _plans_within(grouping: Grouping, *, min_group_size: int, min_rows: int, max_rows: int) -> list[tuple[int, ...]]:
    plans = [s for s in _plans(max_rows, grouping) if min(s) >= min_group_size and sum(s) >= min_rows]
    if not plans:
        raise UsageError(
            f"grouping: no '{grouping}' plan has {min_rows} to {max_rows} rows in groups of {min_group_size} or more."
        )
    return plans


def _affordable(plans: Sequence[tuple[int, ...]], rollouts: Sequence[int], most: int) -> tuple[int, ...] | None:
    """The last of the plans with at most so many batches."""
    return next((s for s in reversed(plans) if _count_batches(rollouts, s) <= most), None)


@st.composite
def problems(
    draw: st.DrawFn,
    *,
    off_policy: bool | None = None,
    full_support: bool | None = None,
    shared_contexts: bool | None = None,
    reference: bool | None = False,
    kl: bool | None = False,
    entropy: bool | None = False,
    grouping: Grouping = "any",
    min_group_size: int = 1,
    min_rows: int = 1,
    max_rows: int = 4,
    max_batches: int = 2000,
    policy: Sequence[PolicyKind] = ("table",),
    name: str = "random/problem",
    **bounds: Any,
) -> Problem:
    """Problems: an MDP within `Bounds(**bounds)`, its policies and a sampling plan.

    Args:
        off_policy: True: the sampler is another policy; False: it is the policy; None: either.
        full_support: False: the sampler is truncated (so it is off-policy); True: it is not; None: either.
        shared_contexts: whether states may share a context.
        reference: whether there is a reference policy of its own.
        kl, entropy: whether the objective has a KL to the reference, which is then there, and an entropy term.
        grouping: `"any"`: groups of any sizes; `"equal"` sizes; `"one"` group; `"rows"`: every row a group.
        min_group_size, min_rows, max_rows: rows of the smallest group, and of a batch.
        max_batches: most batches (multisets, as the exact engine counts them); where no plan is as small, the smallest.
        policy: kinds of target policy, as in `policies`.

    Raises:
        UsageError: no sampling plan has such sizes.
    """
    plans = _plans_within(grouping, min_group_size=min_group_size, min_rows=min_rows, max_rows=max_rows)
    chosen = draw(st.integers(0, len(plans) - 1))
    b = Bounds(**bounds)
    drawn = _mdp(draw, b)
    env, acting = drawn.env, drawn.roles.acting
    sizes = _affordable(plans[: chosen + 1], drawn.rollouts, max_batches) or plans[0]

    contexts = None
    if _flag(draw, shared_contexts):
        contexts = [0]
        for (place,) in _grid(draw, b.most_acting - 1, 1, b.most_acting)[: acting - 1]:
            contexts.append(place % (max(contexts) + 2))
        contexts += [0] * (env.states - acting)  # never read: nobody acts there
    K = env.states if contexts is None else max(contexts) + 1
    most = (b.most_acting, b.max_actions)
    target: nn.Module
    if tuple(policy) == ("table",):
        used = min(K, acting)  # nobody acts in the states after those
        target = SoftmaxTable(nn.functional.pad(_logits(draw, used, env.actions, most=most), (0, 0, 0, K - used)))
    else:
        target = draw(policies(K, env.actions, kinds=policy))
    penalty, bonus = (draw(st.sampled_from(COEFFICIENTS)) if _flag(draw, x) else 0.0 for x in (kl, entropy))
    ref = _logits(draw, K, env.actions, most=most) if _flag(draw, True if penalty else reference) else None
    behavior = None
    if _flag(draw, True if full_support is False else off_policy):
        behavior = _behavior(draw, target().detach(), _BEHAVIORS[full_support], most=most)
    return Problem(
        env,
        target,
        behavior_logits=behavior,
        ref_logits=ref,
        kl_coefficient=penalty,
        entropy_coefficient=bonus,
        contexts=contexts,
        groups=len(sizes),
        group_size=sizes[0] if len(set(sizes)) == 1 else sizes,
        name=name,
    )


_BEHAVIORS: dict[bool | None, tuple[BehaviorKind, ...]] = {
    None: ("stale", "drifted", "temperature", "truncated"),
    True: ("stale", "drifted", "temperature"),
    False: ("truncated",),
}


# -- language models


@dataclass(frozen=True)
class TableReward:
    """Each completion of each prompt has a value of its own; the rest 0."""

    values: Mapping[tuple[Tokens, Tokens], float]

    def __call__(self, prompt: Tokens, text: Tokens) -> float:
        return self.values.get((prompt, text), 0.0)


def _tool(prompt: Tokens, text: Tokens) -> Tokens:
    """Answers every 1 with the last token of the prompt."""
    return prompt[-1:] if text[-1] == 1 else ()


@st.composite
def lm_tasks(
    draw: st.DrawFn,
    *,
    max_vocab: int = 3,
    max_new_tokens: int = 3,
    max_prompts: int = 2,
    max_completions: int = 20,
    rewards: Sequence[float] = REWARDS,
    eos: bool | None = None,
    tool: bool | None = None,
) -> LMTask:
    """Tasks with a reward drawn for each completion; `eos` and `tool`: True asks for one, False rules it out.

    The simplest: one prompt, two tokens, one of them written, no eos, no tool, rewards 0.
    """
    V, T = draw(st.integers(2, max_vocab)), draw(st.integers(1, max_new_tokens))
    prompts = [(1,), (1, 1)][: min(draw(st.integers(1, max_prompts)), 2)]
    stops, answers = _flag(draw, eos), _flag(draw, tool)

    def task(tokens: int, reward: Callable[[Tokens, Tokens], float]) -> LMTask:
        return LMTask(
            prompts, vocab_size=V, eos=0 if stops else None, max_new_tokens=tokens, reward=reward,
            tool=_tool if answers else None,
        )  # fmt: skip

    found = [task(t, TableReward({})) for t in range(T, 0, -1)]
    plain = next((x for x in found if x.completions <= max_completions), found[-1])
    values = {(prompts[s], text): draw(st.sampled_from(rewards)) for s, text, _ in plain.texts}
    return task(plain.max_new_tokens, TableReward(values))


@st.composite
def lm_problems(
    draw: st.DrawFn,
    *,
    off_policy: bool | None = None,
    full_support: bool | None = None,
    grouping: Grouping = "any",
    min_group_size: int = 1,
    min_rows: int = 1,
    max_rows: int = 4,
    max_batches: int = 2000,
    name: str = "random/lm",
    **task: Any,
) -> Problem:
    """A task of `lm_tasks(**task)` with a transformer of 4 units and one or two layers; the rest as in `problems`.

    Raises:
        UsageError: no sampling plan has such sizes.
    """
    plans = _plans_within(grouping, min_group_size=min_group_size, min_rows=min_rows, max_rows=max_rows)
    chosen = draw(st.integers(0, len(plans) - 1))
    drawn = draw(lm_tasks(**task))
    rollouts = [drawn.completions // len(drawn.prompts)] * len(drawn.prompts)
    sizes = _affordable(plans[: chosen + 1], rollouts, max_batches) or plans[0]
    layers, seed = draw(st.integers(1, 2)), draw(st.integers(0, 99))
    model = TinyGPT(drawn.vocab_size, context=max(map(len, drawn.contexts)), width=4, layers=layers, seed=seed)
    problem = Problem(
        drawn, model, groups=len(sizes), group_size=sizes[0] if len(set(sizes)) == 1 else sizes, name=name
    )  # fmt: skip
    if not _flag(draw, True if full_support is False else off_policy):
        return problem
    behavior = _behavior(draw, problem.logits, _BEHAVIORS[full_support], most=(0, 0))
    return replace(problem, behavior_logits=behavior)


# Keywords of `problems` by the name of the condition they meet, or make likely ("unequal lengths").
_MEET: dict[str, dict[str, Any]] = {
    "on-policy": {"off_policy": False},
    "off-policy": {"off_policy": True},
    "full support": {"full_support": True},
    "broken support": {"full_support": False},
    "γ = 1": {"discounts": (1.0,)},
    "γ < 1": {"discounts": tuple(x for x in DISCOUNTS if x < 1)},
    "one start": {"max_starts": 1},
    "several starts": {"min_starts": 2, "max_states": 3},
    "0/1 returns": {"reward": "outcome", "rewards": (0.0, 1.0), "discounts": (1.0,)},
    "equal lengths": {"observation": False, "terminal": False},
    "unequal lengths": {"terminal": True, "max_horizon": 3},
    "one decision": {"max_horizon": 1},
    "return − β KL": {"kl": True},
    "return + α entropy": {"entropy": True},
}


def bounds_for(estimator: Estimator, claim: Claim | None = None) -> dict[str, Any]:
    """Keywords of `problems` for those that an estimator can be asked on, and that meet the conditions of a claim.

    A condition of your own is unknown here: draw, and see whether `claim.applies(problem)`.
    """
    bounds: dict[str, Any] = {
        "min_group_size": estimator.min_group_size,
        "min_rows": 1 if estimator.couples == "trajectory" else 2,
        "max_rows": max(4, estimator.min_group_size),
    }
    for condition in claim.conditions if claim else ():
        bounds |= _MEET.get(condition.name, {})
    return bounds


@st.composite
def batches(draw: st.DrawFn, problem: Problem, *, needs: Sequence[SideTable] = (), logits: bool = False) -> Batch:
    """One batch `[B, T]` that the problem can draw, with the side tables of `needs`; the first rollouts are the plainest."""
    table = problem.trajectories_with(needs)
    possible = (table.behavior_probability > 0) & (table.paths.start_probability[table.paths.start] > 0)
    members = [
        torch.nonzero(possible & (table.paths.start == s)).flatten().tolist()
        for s in range(len(table.paths.start_probability))
    ]
    rows = []
    for size in problem.sizes:
        own = draw(st.sampled_from([m for m in members if m]))
        rows += [draw(st.sampled_from(own)) for _ in range(size)]
    return table.batch(torch.tensor(rows), problem.group_labels, logits=logits)


# -- baselines and estimators


@dataclass(frozen=True)
class TableBaseline:
    """b(s, t) = table[s][t], 0 for states and steps beyond it; a batch gives b `[..., B, T]`."""

    table: tuple[tuple[float, ...], ...]  # [S][T]

    def __call__(self, batch: Batch) -> Tensor:
        S, T = len(self.table), batch.reward.shape[-1]
        rows = [list(row[:T]) + [0.0] * (T - len(row)) for row in self.table] + [[0.0] * T]
        known = torch.where((batch.state >= 0) & (batch.state < S), batch.state, S)
        return torch.tensor(rows, dtype=batch.reward.dtype)[known, torch.arange(T)]


@dataclass(frozen=True)
class ConstantBaseline:
    """b = value."""

    value: float

    def __call__(self, batch: Batch) -> Tensor:
        return torch.full_like(batch.reward, self.value)


Baseline = Callable[[Batch], Tensor]


def baselines(*, states: int = 4, steps: int = 3) -> st.SearchStrategy[Baseline]:
    """Baselines that leave E ĝ alone: constants, and functions of the state and the step. Shrink to b = 0."""
    constants: st.SearchStrategy[Baseline] = st.sampled_from(REWARDS).map(ConstantBaseline)
    row = st.tuples(*[st.sampled_from(REWARDS)] * steps)
    tables: st.SearchStrategy[Baseline] = st.lists(row, min_size=states, max_size=states).map(
        lambda rows: TableBaseline(tuple(rows))
    )
    return constants | tables


Scale = Callable[[Problem], float]


@dataclass(frozen=True)
class _Part:
    """A part of a composition, and what it does to E ĝ where `conditions` hold: a factor κ."""

    name: str
    part: Any
    couples: Couples = "trajectory"
    scale: Scale | None = None  # None: 1
    conditions: tuple[Condition, ...] = ()


def _per_position(problem: Problem) -> float:
    return 1.0 / float(problem.trajectories.paths.mask[0].sum())


_ADVANTAGES = (
    _Part("R", adv.episode_return),
    _Part("γ^t Ĝ", adv.discounted_to_go),
    _Part("Ĝ", adv.undiscounted_weight_to_go, conditions=(undiscounted,)),
    _Part("γ^t (Ĝ − V)", adv.to_go_minus(adv.state_value)),
    _Part("R − others of the group", adv.return_minus(adv.mean_of_others("group")), "group"),
    _Part("R − others of the batch", adv.return_minus(adv.mean_of_others("batch")), "batch"),
    _Part("R − mean of the group", adv.return_minus(adv.mean_return("group")), "group", own_share_of_groups),
    _Part("R − mean of the batch", adv.return_minus(adv.mean_return("batch")), "batch", own_share_of_batch),
)
_RATIOS = (
    _Part("1", ratios.none, conditions=(on_policy,)),
    _Part("w", ratios.trajectory_ratio, conditions=(full_support,)),
    _Part("r_t", ratios.token_ratio, conditions=(on_policy,)),
    _Part("clip(r_t)", ratios.clipped_ratio(low=0.2, high=0.2), conditions=(on_policy,)),
)
_AGGREGATIONS = (
    _Part("mean of rows", agg.mean_of_rows),
    _Part("mean of sequences", agg.sequence_mean, scale=_per_position, conditions=(fixed_length,)),
    _Part("mean of tokens", agg.token_mean, "batch", _per_position, (fixed_length,)),
)


@st.composite
def estimators(draw: st.DrawFn, *, unbiased_only: bool = False) -> Estimator:
    """Compositions advantage × ratio × aggregation whose claim is known: unbiased, or proportional with κ, conditions and
    all. Shrink to REINFORCE."""

    def one_of(parts: Sequence[_Part]) -> _Part:
        return draw(st.sampled_from([p for p in parts if p.scale is None or not unbiased_only]))

    advantage, ratio, aggregation = one_of(_ADVANTAGES), one_of(_RATIOS), one_of(_AGGREGATIONS)
    if advantage.couples == "trajectory" and draw(st.booleans()):
        baseline = draw(baselines())
        subtracted = functools.partial(_minus, advantage.part, baseline)
        advantage = replace(advantage, name=f"{advantage.name} − γ^t {baseline}", part=subtracted)
    parts = (advantage, ratio, aggregation)
    scales = [p.scale for p in parts if p.scale is not None]
    conditions = tuple(dict.fromkeys(c for p in parts for c in p.conditions))
    couples = max((p.couples for p in parts), key=COUPLES.index)
    claim = (
        proportional(lambda problem: math.prod(scale(problem) for scale in scales), *conditions)
        if scales
        else unbiased(*conditions)
    )
    return from_coefficients(
        compose(advantage.part, ratio=ratio.part, aggregation=aggregation.part),
        couples=couples,
        name=" × ".join(p.name for p in parts),
        claims=(claim,),
        min_group_size=2 if couples == "group" else 1,
    )


def unbiased_estimators() -> st.SearchStrategy[Estimator]:
    """Those of `estimators` that claim E ĝ = ∇J."""
    return estimators(unbiased_only=True)


def _minus(advantage: adv.Advantage, baseline: Baseline, batch: Batch) -> Tensor:
    """A − γ^t b."""
    return advantage(batch) - batch.discount_weight * baseline(batch)
