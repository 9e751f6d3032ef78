"""Finite-horizon tabular MDPs, with states in which the policy does not act.

An episode starts in s_0 ~ `initial` and runs for at most `horizon` positions. At a position the policy draws
a ~ π(·|s), the environment draws s' ~ P(·|s, a) and pays r(s, a) or r(s, a, s'). An episode ends early on reaching a
`terminal` state, so lengths vary. In an `observation` state nobody acts (a tool's answer, the other side's turn): the
position has mask 0, may pay a reward, and its dynamics do not depend on an action.

Guarantee: `paths` lists every rollout of non-zero environment probability exactly once; rollouts that look the same to
policy and estimator are merged, their probabilities added.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from pgcheck.batch import DISCOUNT_CLOCKS, DiscountClock
from pgcheck.errors import BudgetError, ProblemError
from pgcheck.trajectories import Paths, as_table, check_distribution, is_count

MAX_PATHS = 200_000


class TabularMDP:
    """A finite MDP with horizon, discount, absorbing and observation states.

    Args:
        transition: `[S, A, S]`, P(s' | s, a).
        reward: `[S, A]` or `[S, A, S]`.
        initial: `[S]`, law of the start state.
        horizon: most positions of an episode, ≥ 1.
        discount: γ in [0, 1].
        terminal: states in which the episode is over; nothing is paid there.
        observation: states in which the policy does not act; their rows of `transition` and `reward` must not depend
            on the action.
        discount_clock: what γ counts, `"position"` or `"action"` (see `Batch.clock`).

    Raises:
        ProblemError: naming the argument, the entry and the mend.
    """

    def __init__(
        self,
        transition: Any,
        reward: Any,
        initial: Any,
        *,
        horizon: int,
        discount: float = 1.0,
        terminal: Sequence[int] = (),
        observation: Sequence[int] = (),
        discount_clock: DiscountClock = "position",
    ) -> None:
        self.transition = _table("transition", transition)
        self.reward = _table("reward", reward)
        self.initial = _table("initial", initial)
        if self.transition.dim() != 3 or self.transition.shape[0] != self.transition.shape[2]:
            raise ProblemError(f"transition: shape {list(self.transition.shape)}, expected [S, A, S].")
        self.states, self.actions = int(self.transition.shape[0]), int(self.transition.shape[1])
        S, A = self.states, self.actions
        if tuple(self.reward.shape) not in {(S, A), (S, A, S)}:
            raise ProblemError(f"reward: shape {list(self.reward.shape)}, expected [{S}, {A}] or [{S}, {A}, {S}].")
        if tuple(self.initial.shape) != (S,):
            raise ProblemError(f"initial: shape {list(self.initial.shape)}, expected [{S}].")
        if not is_count(horizon):
            raise ProblemError(f"horizon: {horizon!r}; it must be an integer of at least 1.")
        if not isinstance(discount, (int, float)) or not 0.0 <= discount <= 1.0:
            raise ProblemError(f"discount: {discount!r}; γ must lie in [0, 1].")
        if discount_clock not in DISCOUNT_CLOCKS:
            raise ProblemError(f"discount_clock: {discount_clock!r} is not one of {', '.join(DISCOUNT_CLOCKS)}.")
        self.horizon, self.discount, self.discount_clock = int(horizon), float(discount), discount_clock
        for name, listed in (("terminal", terminal), ("observation", observation)):
            if not isinstance(listed, Iterable):
                raise ProblemError(f"{name}: {listed!r}; expected a list of states, [{listed!r}].")
        self.terminal, self.observation = frozenset(terminal), frozenset(observation)
        for name, states in (("terminal", self.terminal), ("observation", self.observation)):
            for s in states:
                if s not in range(S):
                    raise ProblemError(f"{name}: state {s!r} is outside [0, {S}).")
        both = self.terminal & self.observation
        if both:
            raise ProblemError(f"observation: state {min(both)} is also terminal; it can be one of the two.")
        off = (self.transition < 0).any(-1) | ((self.transition.sum(-1) - 1.0).abs() > 1e-9)
        for s, a in off.nonzero().tolist():
            if s not in self.terminal:
                check_distribution(f"transition[{s}, {a}]", self.transition[s, a])
        check_distribution("initial", self.initial)
        self.full_reward = self.reward if self.reward.dim() == 3 else self.reward.unsqueeze(-1).expand(S, A, S)
        for s in self.observation:
            same = self.transition[s] == self.transition[s, :1], self.full_reward[s] == self.full_reward[s, :1]
            if not all(bool(x.all()) for x in same):
                raise ProblemError(
                    f"observation: state {s} has a transition or a reward that depends on the action, but no action is"
                    " taken there; make its rows equal."
                )
        for s in range(S):
            if self.initial[s] > 0 and s in self.terminal:
                raise ProblemError(
                    f"initial: state {s} is terminal, so an episode would be over before its first action."
                )

    @property
    def starts(self) -> list[int]:
        """The states an episode may start in; `Paths.start` indexes this list."""
        return [s for s in range(self.states) if self.initial[s] > 0]

    def moves(self, state: int) -> list[tuple[int, int, float, float]]:
        """(action, next state, probability, reward) of everything that can happen in `state`; action -1 for none."""
        nobody = state in self.observation
        p = self.transition[state, :1] if nobody else self.transition[state]
        a, s2 = torch.nonzero(p > 0, as_tuple=True)
        taken = [-1] * len(a) if nobody else a.tolist()
        return list(zip(taken, s2.tolist(), p[a, s2].tolist(), self.full_reward[state][a, s2].tolist(), strict=True))

    def count_paths(self) -> int:
        """Number of rollouts before merging; computed without listing them."""
        to_end = [1] * self.states
        branches = [[m[1] for m in self.moves(s)] if s not in self.terminal else [] for s in range(self.states)]
        for _ in range(self.horizon):
            to_end = [sum(to_end[s2] for s2 in b) if b else 1 for b in branches]
        return sum(to_end[s] for s in self.starts)

    def paths(self, *, limit: int = MAX_PATHS) -> Paths:
        """Every rollout, with the state itself as its context.

        Raises:
            BudgetError: more than `limit` rollouts.
        """
        n = self.count_paths()
        if n > limit:
            raise BudgetError(
                f"the environment has {n:,} rollouts of horizon {self.horizon}, more than the {limit:,} allowed; "
                "shorten the horizon, or make transitions deterministic where they need not be random."
            )
        merged: dict[tuple[Any, ...], float] = {}
        branches = [self.moves(s) if s not in self.terminal else [] for s in range(self.states)]
        for start_index, start in enumerate(self.starts):
            open_paths: list[tuple[int, tuple[tuple[int, int, float], ...], float]] = [(start, (), 1.0)]
            while open_paths:
                s, steps, p = open_paths.pop()
                if s in self.terminal or len(steps) == self.horizon:
                    key = (start_index, steps)
                    merged[key] = merged.get(key, 0.0) + p
                    continue
                # reversed: the stack then yields rollouts in lexicographic order
                for a, s2, q, r in reversed(branches[s]):
                    open_paths.append((s2, (*steps, (s if a >= 0 else -1, a, r)), p * q))
        N, T = len(merged), self.horizon
        state = torch.full((N, T), -1, dtype=torch.int64)
        action, reward = state.clone(), torch.zeros(N, T, dtype=torch.float64)
        for n, (_, steps) in enumerate(merged):
            for t, (s, a, r) in enumerate(steps):
                state[n, t], action[n, t], reward[n, t] = s, a, r
        return Paths(
            start=torch.tensor([key[0] for key in merged]),
            state=state,
            context=state.clone(),
            action=action,
            reward=reward,
            mask=(action >= 0).to(torch.float64),
            env_probability=torch.tensor(list(merged.values()), dtype=torch.float64),
            start_probability=self.initial[torch.tensor(self.starts)],
            discount=self.discount,
            discount_clock=self.discount_clock,
            end=torch.tensor([len(key[1]) for key in merged]),
        )


def _table(name: str, x: Any) -> Tensor:
    table = as_table(name, x)
    if not bool(torch.isfinite(table).all()):
        where = [int(i) for i in (~torch.isfinite(table)).nonzero()[0]]
        raise ProblemError(f"{name}: entry {where} is {float(table[tuple(where)])}; it must be finite.")
    return table
