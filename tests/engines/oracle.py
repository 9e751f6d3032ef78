"""Brute force over ordered tuples of rollouts, in plain Python floats; and the small problems it can afford.

    E ĝ = Σ_(starts) Σ_(tuples) Π q(s_g) Π μ(τ_i | s_g) ĝ(τ_1, …, τ_B)
    ĝ[k,a] = Σ_(i,t at k) c[i,t] (1[a = a_it] − π(a|k))

Guarantee: shares no code with `pgcheck.engines`. No multiset, no multinomial weight, no block, nothing assumed about
which rows a coefficient looks at: every tuple of starts, and for each every tuple of rollouts, is one batch `[B, T]`.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pgcheck.batch import Batch
from pgcheck.envs.tabular import TabularMDP
from pgcheck.estimators.base import Estimator
from pgcheck.problem import Problem
from pgcheck.trajectories import Paths, Trajectories


def softmax(logits: Sequence[float]) -> list[float]:
    """exp(z_a) / Σ_b exp(z_b)."""
    weights = [math.exp(z - max(logits)) for z in logits]
    return [w / math.fsum(weights) for w in weights]


def rollout_chances(problem: Problem) -> list[float]:
    """μ(τ | s) = P_env(τ | s) Π_t μ(a_t | k_t) of every rollout, from the logits by hand."""
    paths = problem.trajectories.paths
    logits = problem.logits if problem.behavior_logits is None else problem.behavior_logits
    mu = [softmax(row) for row in logits.tolist()]
    chances = []
    for n, p in enumerate(paths.env_probability.tolist()):
        for k, a, m in zip(paths.context[n].tolist(), paths.action[n].tolist(), paths.mask[n].tolist(), strict=True):
            p *= mu[k][a] if m else 1.0
        chances.append(p)
    return chances


def every_batch(table: Trajectories, sizes: Sequence[int], chances: Sequence[float]) -> list[tuple[Batch, float]]:
    """Every ordered batch `[B, T]` with its probability."""
    starts = table.paths.start.tolist()
    q = table.paths.start_probability.tolist()
    labels = torch.tensor([g for g, size in enumerate(sizes) for _ in range(size)])
    batches = []
    for drawn in itertools.product(range(len(q)), repeat=len(sizes)):
        if any(q[s] == 0 for s in drawn):
            continue
        start_of_row = [s for s, size in zip(drawn, sizes, strict=True) for _ in range(size)]
        choices = [[n for n in range(len(starts)) if starts[n] == s and chances[n] > 0] for s in start_of_row]
        for rows in itertools.product(*choices):
            p = math.prod(q[s] for s in drawn) * math.prod(chances[n] for n in rows)
            batches.append((table.batch(torch.tensor(rows), labels), p))
    return batches


def gradient_of(coefficients: Tensor, batch: Batch, policy: Sequence[Sequence[float]]) -> list[list[float]]:
    """ĝ of one batch by position, T lists of K·A numbers: coefficients `[B, T]` times the score, or `[B, T, A]` as they
    are."""
    A = len(policy[0])
    g = [[0.0] * (len(policy) * A) for _ in range(batch.mask.shape[1])]
    context, action, mask, c = (x.tolist() for x in (batch.context, batch.action, batch.mask, coefficients))
    for i, row in enumerate(mask):
        for t, acts in enumerate(row):
            if not acts:
                continue
            k = context[i][t]
            for a in range(A):
                if coefficients.dim() == 3:
                    g[t][k * A + a] += c[i][t][a]
                else:
                    g[t][k * A + a] += c[i][t] * ((a == action[i][t]) - policy[k][a])
    return g


def brute_force(
    estimator: Estimator, batches: Sequence[tuple[Batch, float]], logits: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """E ĝ `[K, A]`, Cov ĝ `[K·A, K·A]` and E ĝ_t `[T, K, A]` over `batches`, by two passes: the mean first, then
    E (ĝ − E ĝ)(ĝ − E ĝ)ᵀ."""
    policy = [softmax(row) for row in logits.tolist()]
    by_step = []
    for batch, p in batches:
        seen = batch
        if estimator.leaf == "logits":
            seen = replace(batch, action_logits=logits[batch.context.clamp(min=0)])
        by_step.append((gradient_of(estimator.coefficients(seen), batch, policy), p))
    cells = logits.numel()
    drawn = [([math.fsum(step[x] for step in g) for x in range(cells)], p) for g, p in by_step]
    assert math.isclose(math.fsum(p for _, p in drawn), 1.0, abs_tol=1e-12)
    mean = [math.fsum(p * g[x] for g, p in drawn) for x in range(cells)]
    weights = [p for _, p in drawn]
    off = [[g[x] - mean[x] for g, _ in drawn] for x in range(cells)]
    weighted = [list(map(operator.mul, weights, row)) for row in off]
    cov = [[math.fsum(map(operator.mul, row, other)) for other in off] for row in weighted]
    steps = [[math.fsum(p * g[t][x] for g, p in by_step) for x in range(cells)] for t in range(len(by_step[0][0]))]
    return (
        torch.tensor(mean, dtype=torch.float64).reshape(logits.shape),
        torch.tensor(cov, dtype=torch.float64),
        torch.tensor(steps, dtype=torch.float64).reshape(-1, *logits.shape),
    )


# -- problems small enough for it


def bandit(rewards: Sequence[float], logits: Sequence[float], **settings: Any) -> Problem:
    """One step, one context, one arm for each reward: N = A rollouts."""
    arms = len(rewards)
    columns: dict[str, Any] = {
        "start": [0] * arms,
        "state": [[0]] * arms,
        "context": [[0]] * arms,
        "action": [[a] for a in range(arms)],
        "reward": [[r] for r in rewards],
        "mask": [[1.0]] * arms,
        "env_probability": [1.0] * arms,
    }
    return Problem(Paths(**columns, start_probability=torch.ones(1)), [list(logits)], **settings)


def walk(**settings: Any) -> Problem:
    """Two states, two actions, two steps, γ = .8; action 1 in state 0 leads to state 1. N = 4, states recur over t."""
    stay, go = [1.0, 0.0], [0.0, 1.0]
    env = TabularMDP([[stay, go], [go, stay]], [[0.3, -0.2], [1.0, 0.5]], [1.0, 0.0], horizon=2, discount=0.8)
    return Problem(env, [[0.4, -0.1], [-0.3, 0.2]], **settings)


def dialogue(**settings: Any) -> Problem:
    """Two prompts; action 0 ends the episode, action 1 is followed by an observation that pays, then by a last action.

    States 0, 1 prompts, 2, 3 observations, 4, 5 second turns in *one* shared context, 6 the end. N = 3 for each prompt,
    with one or two policy positions; γ = .9.
    """

    def to(state: int) -> list[float]:
        return [float(s == state) for s in range(7)]

    transition = [[to(6), to(2)], [to(6), to(3)], [to(4)] * 2, [to(5)] * 2, [to(6)] * 2, [to(6)] * 2, [to(6)] * 2]
    reward = [[0.5, -0.2], [1.2, 0.1], [0.7, 0.7], [-0.4, -0.4], [0.0, 2.0], [1.0, -1.0], [0.0, 0.0]]
    env = TabularMDP(
        transition, reward, [0.4, 0.6, 0, 0, 0, 0, 0], horizon=3, discount=0.9, terminal=[6], observation=[2, 3]
    )
    logits = [[0.2, -0.3], [-0.5, 0.4], [0.1, 0.6]]
    # observation and terminal states take no action; the context named for them is never used
    return Problem(env, logits, contexts=[0, 1, 2, 2, 2, 2, 2], **settings)
