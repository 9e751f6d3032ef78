"""Side tables: what some estimators need beyond the rows, added to the table of rollouts by name.

Each class is a `SideTable`: called with `Trajectories` it returns them with more columns, or (auxiliary draws) with each
row split into one for every outcome of the draw, probabilities and all. Everything after that, enumeration of batches
included, does not know that it happened; so the draw's own randomness is part of the estimator's variance. What has to be
rolled out for a column says so in `extra_rollouts`; what is computed (a value, an optimal baseline) costs none.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pgcheck.errors import BudgetError, UsageError
from pgcheck.problem import Problem
from pgcheck.process import Process
from pgcheck.trajectories import Trajectories, conditional_mean

MAX_ROWS = 200_000


def score(table: Trajectories) -> Tensor:
    """∇ log π(a_t | k_t) of every position, `[N, T, K·A]`; 0 where the policy does not act."""
    p = table.paths
    pi = torch.softmax(table.logits, -1)
    K, A = pi.shape
    s = torch.zeros(len(table), p.steps, K, A, dtype=pi.dtype)
    for n, t in (p.mask > 0).nonzero().tolist():
        k, a = int(p.context[n, t]), int(p.action[n, t])
        s[n, t, k] = -pi[k]
        s[n, t, k, a] += 1.0
    return s.flatten(2)


def _weight(table: Trajectories) -> Tensor:
    return table.probability * table.paths.start_probability[table.paths.start]


def _action_values(table: Trajectories, process: Process) -> Tensor:
    """Q_t(s_t, ·) at every position, `[N, T, A]`; of any state where the policy does not act."""
    q = process.values[1].to(table.logits.device)
    steps = torch.arange(table.paths.steps, device=q.device)
    return q[steps, table.paths.state.clamp(min=0)]


def _state_keys(table: Trajectories, t: int) -> list[tuple[Any, ...]]:
    return [(s,) for s in table.paths.state[:, t].tolist()]


@dataclass(frozen=True)
class ActionValues:
    """Column `action_value` `[N, T]`: Q^π(s_t, a_t) = E[Ĝ_t | s_t, a_t], 0 where the policy does not act."""

    def __call__(self, table: Trajectories) -> Trajectories:
        p, to_go = table.paths, table.rows_as_batch().reward_to_go
        q = torch.zeros_like(p.reward)
        for t in range(p.steps):
            keys = list(zip(p.state[:, t].tolist(), p.action[:, t].tolist(), strict=True))
            q[:, t] = conditional_mean(to_go[:, t], _weight(table), keys) * p.mask[:, t]
        return table.with_side(action_value=q)

    def drawn(self, table: Trajectories, process: Process) -> Trajectories:
        """The same by dynamic programming, for rollouts that were drawn."""
        q = _action_values(table, process)
        own = q.gather(-1, table.paths.action.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        return table.with_side(action_value=own * table.paths.mask)


@dataclass(frozen=True)
class AllActionValues:
    """Column `all_action_values` `[N, T, A]`: Q^π(s_t, a) of every action, the ones not taken as well; 0 where the policy
    does not act, and for what never happens."""

    def __call__(self, table: Trajectories) -> Trajectories:
        p, to_go, weight = table.paths, table.rows_as_batch().reward_to_go, _weight(table)
        q = torch.zeros(*p.reward.shape, table.actions, dtype=torch.float64)
        for t in range(p.steps):
            keys = _state_keys(table, t)
            for a in range(table.actions):
                took = weight * (p.action[:, t] == a)  # every row of the state gets the mean over those that took a
                q[:, t, a] = conditional_mean(to_go[:, t], took, keys) * p.mask[:, t]
        return table.with_side(all_action_values=q)

    def drawn(self, table: Trajectories, process: Process) -> Trajectories:
        """The same by dynamic programming, for rollouts that were drawn."""
        return table.with_side(all_action_values=_action_values(table, process) * table.paths.mask.unsqueeze(-1))


@dataclass(frozen=True)
class WrongValues:
    """Column `wrong_value` `[N, T+1]`: V^π plus an error that depends on (state, t) alone, as a critic's in training.

    Errors are seeded normal draws of standard deviation `size`, in units of reward. Observation positions have a value as
    well. After the end it says `after_end`; a critic run over padding says anything there.
    """

    size: float = 0.5
    after_end: float = 0.0

    def __call__(self, table: Trajectories) -> Trajectories:
        states = torch.nn.functional.pad(table.paths.state, (0, 1), value=-1).unique()
        return self._added(table, states)

    def drawn(self, table: Trajectories, process: Process) -> Trajectories:
        """The same errors for rollouts that were drawn."""
        return self._added(table, torch.cat([torch.tensor([-1]), process.reached.nonzero().squeeze(-1)]))

    def _added(self, table: Trajectories, states: Tensor) -> Trajectories:
        """With errors of the states, in ascending order, -1 among them."""
        p, at = table.paths, torch.arange(table.paths.steps + 1)
        generator = torch.Generator().manual_seed(5)
        error = self.size * torch.randn(len(states), len(at), generator=generator, dtype=torch.float64)
        state = torch.nn.functional.pad(p.state, (0, 1), value=-1)
        of_row = torch.searchsorted(states.to(state.device), state)
        device = table.value.device
        over = at.to(device) >= p.end.unsqueeze(-1)
        wrong = table.value + error.to(device)[of_row, at.to(device)]
        return table.with_side(wrong_value=wrong.masked_fill(over, self.after_end))


@dataclass(frozen=True)
class GreedyReturn:
    """Column `greedy_return` `[N]`: E[R | start] of the policy that takes the likeliest action everywhere (the first of
    several); the expectation is over the environment's moves, so with none at random it is the greedy rollout's return."""

    def __call__(self, table: Trajectories) -> Trajectories:
        p = table.paths
        likeliest = table.logits.argmax(-1)[p.context.clamp(min=0)]
        greedy = ((p.action == likeliest) | (p.mask == 0)).all(-1)
        paid = p.env_probability * greedy * table.rows_as_batch().episode_return
        by_start = torch.zeros_like(p.start_probability).index_add(0, p.start, paid)
        return table.with_side(greedy_return=by_start[p.start])

    def extra_rollouts(self, problem: Problem) -> float:
        """One greedy rollout for each group of a batch: it is the same for all its rows."""
        return float(problem.groups)


@dataclass(frozen=True)
class OptimalBaselines:
    """The variance-minimising baselines (Greensmith, Bartlett & Baxter 2004, for the first).

    `optimal_constant` `[N]`: b* = E[‖S‖² R] / E[‖S‖²], S = Σ_t ∇log π_t, for coefficients R − b.
    `optimal_state` `[N, T]`: E[‖s_t‖² Ĝ_t | s] / E[‖s_t‖² | s], each (state, t) on its own, for γ^t (Ĝ_t − b).
    `optimal_state_joint` `[N, T]`: all b(s, t) at once, the least total variance of Σ_t γ^t (Ĝ_t − b(s_t, t)) ∇log π_t:
    normal equations ⟨Y_j, Y_k⟩ b_k = ⟨X, Y_j⟩ with X the estimate without baseline, Y_j the part that b_j multiplies.
    """

    def __call__(self, table: Trajectories) -> Trajectories:
        p, rows = table.paths, table.rows_as_batch()
        to_go, weight, s = rows.reward_to_go, _weight(table), score(table)
        norm = (s.sum(1) ** 2).sum(-1)
        R = rows.episode_return
        size = float((weight * norm).sum())
        best = float((weight * norm * R).sum()) / size if size > 0 else 0.0

        state = torch.zeros_like(p.reward)
        columns: dict[tuple[int, int], Tensor] = {}
        gamma = rows.discount_weight
        for t in range(p.steps):
            step_norm = (s[:, t] ** 2).sum(-1)
            keys = _state_keys(table, t)
            top = conditional_mean(step_norm * to_go[:, t], weight, keys)
            bottom = conditional_mean(step_norm, weight, keys)
            state[:, t] = torch.where(bottom > 0, top / bottom.clamp(min=1e-300), 0.0) * p.mask[:, t]
            for at in sorted({int(x) for x in p.state[:, t].tolist() if x >= 0}):
                here = (p.state[:, t] == at).to(to_go.dtype)
                columns[at, t] = (here * gamma[:, t]).unsqueeze(-1) * s[:, t]
        Y = torch.stack(list(columns.values()))  # [J, N, KA]
        X = ((gamma * to_go).unsqueeze(-1) * s).sum(1)  # [N, KA]
        root = weight.sqrt().unsqueeze(-1)
        normal = (Y * root).flatten(1) @ (Y * root).flatten(1).T
        right = (Y * root).flatten(1) @ (X * root).flatten()
        b = torch.linalg.pinv(normal, hermitian=True) @ right
        joint = torch.zeros_like(p.reward)
        for (at, t), value in zip(columns, b, strict=True):
            joint[:, t] += (p.state[:, t] == at).to(to_go.dtype) * value
        return table.with_side(
            optimal_constant=torch.full_like(R, best), optimal_state=state, optimal_state_joint=joint
        )


@dataclass(frozen=True)
class Continuations:
    """Column `continuation_value` `[N, T]`: V̂(s_t), the mean of `draws` fresh rollouts from (s_t, t), under the target
    policy, drawn independently for every policy position of every row (VinePPO, arXiv 2410.01679, section 4).

    Each row is split into one for every joint outcome of its draws.

    Raises:
        BudgetError: more than 200 000 rows.
    """

    draws: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.draws, int) or self.draws < 1:
            raise UsageError(f"draws: {self.draws!r}; it must be an integer of at least 1.")

    def __call__(self, table: Trajectories) -> Trajectories:
        p, to_go = table.paths, table.rows_as_batch().reward_to_go
        weight = _weight(table).tolist()
        returns: dict[tuple[int, int], list[tuple[float, float]]] = {}
        for t in range(p.steps):
            for n, s in enumerate(p.state[:, t].tolist()):
                if s >= 0 and weight[n] > 0:
                    returns.setdefault((s, t), []).append((float(to_go[n, t]), weight[n]))
        size = float(to_go.abs().max()) or 1.0
        mean = {visit: self._law_of_mean(_merged(law, size), size) for visit, law in returns.items()}
        for t in range(p.steps):  # a rollout of no chance stays one row, whatever its draws would be
            for n, s in enumerate(p.state[:, t].tolist()):
                if s >= 0:
                    mean.setdefault((s, t), [(float(to_go[n, t]), 1.0)])
        visited = [[(s, t) for t, s in enumerate(row) if s >= 0] for row in p.state.tolist()]
        count = sum(math.prod(len(mean[v]) for v in visits) for visits in visited)
        if count > MAX_ROWS:
            raise BudgetError(
                f"{self.draws} continuations at every position give {count:,} outcomes of one rollout, more than the "
                f"{MAX_ROWS:,} allowed; use fewer draws or a shorter horizon."
            )
        source, chance, columns = [], [], []
        for n, visits in enumerate(visited):
            drawn, factor = _every_outcome([mean[v] for v in visits])
            column = torch.zeros(len(factor), p.steps, dtype=torch.float64)
            column[:, [t for _, t in visits]] = drawn
            source.append(torch.full((len(factor),), n))
            chance.append(factor)
            columns.append(column)
        split, factor = table.take(torch.cat(source)), torch.cat(chance)
        split = replace(
            split,
            probability=split.probability * factor,
            behavior_probability=split.behavior_probability * factor,
        )
        return split.with_side(continuation_value=torch.cat(columns))

    def extra_rollouts(self, problem: Problem) -> float:
        """`draws` for each policy position of a batch, expected: B · draws · E_behavior[Σ mask]. A continuation from a late
        position is shorter than a rollout and counts as one."""
        p = problem.trajectories.paths
        chance = problem.trajectories.behavior_probability * p.start_probability[p.start]
        return problem.rows * self.draws * float(chance @ p.mask.sum(-1))

    def _law_of_mean(self, law: list[tuple[float, float]], scale: float) -> list[tuple[float, float]]:
        """Law of the mean of `draws` i.i.d. values, by repeated convolution."""
        size = sum(q for _, q in law)
        sums = [(0.0, 1.0)]
        for _ in range(self.draws):
            sums = _merged([(x + v, px * q / size) for x, px in sums for v, q in law], scale)
        return [(x / self.draws, q) for x, q in sums]


def _every_outcome(laws: list[list[tuple[float, float]]]) -> tuple[Tensor, Tensor]:
    """Joint outcomes of independent draws: values `[m, draws]` and probabilities `[m]`."""
    values, chances = torch.zeros(1, 0, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    for law in laws:
        value, q = torch.tensor(law, dtype=torch.float64).unbind(-1)
        repeated = values.repeat_interleave(len(law), 0)
        values = torch.cat([repeated, value.repeat(len(values)).unsqueeze(-1)], -1)
        chances = torch.outer(chances, q).flatten()
    return values, chances


def _merged(law: list[tuple[float, float]], scale: float) -> list[tuple[float, float]]:
    """(value, probability) pairs; values equal to 1e-12 of `scale` become one, their mean, so that E is kept exactly."""
    mass: dict[float, float] = {}
    first: dict[float, float] = {}
    for value, q in law:
        key = round(value / scale, 12)
        mass[key] = mass.get(key, 0.0) + q
        first[key] = first.get(key, 0.0) + q * value
    return [(first[key] / q, q) for key, q in mass.items()]
