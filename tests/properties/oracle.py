"""What the properties are held against: J by complex recursion on the environment, E ĝ over every ordered batch.

Guarantee: no dynamic programming, enumeration, scatter or moment code of the package is used here; of the package come the
table of rollouts that batches are gathered from, and what is under test: the coefficients.
"""

from __future__ import annotations

import cmath
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pgcheck.batch import Batch
from pgcheck.estimators.base import Estimator
from pgcheck.problem import Problem
from pgcheck.trajectories import SideTable

Floats = NDArray[np.float64]
STEP = 1e-30  # of the complex derivative, whose error is of the order of its square


def softmax(row: Sequence[complex]) -> list[complex]:
    top = max(x.real for x in row)
    e = [cmath.exp(x - top) for x in row]
    return [x / sum(e) for x in e]


def value(problem: Problem, logits: Sequence[Sequence[Sequence[complex]]]) -> complex:
    """J when the policy at step t has logits `[T][K][A]`[t]: the sum over the tree of rollouts, by recursion.

    An action of probability π costs β log π/π_ref + α log π where the objective has such terms.
    """
    env = problem.env
    P, r = env.transition.tolist(), env.full_reward.tolist()  # type: ignore[union-attr]
    contexts = range(env.states) if problem.contexts is None else problem.contexts  # type: ignore[union-attr]
    pi = [[softmax(row) for row in table] for table in logits]
    beta, alpha = problem.kl_coefficient, problem.entropy_coefficient
    ref = [softmax(row) for row in problem.ref_logits.tolist()] if beta else []
    by_action = env.discount_clock == "action"

    def below(s: int, t: int, acted: int) -> complex:
        if s in env.terminal or t == env.horizon:  # type: ignore[union-attr]
            return 0j
        nobody = s in env.observation  # type: ignore[union-attr]
        now = acted + (not nobody)
        weight = env.discount ** (max(now - 1, 0) if by_action else t)
        total = 0j
        for a in range(1 if nobody else env.actions):  # type: ignore[union-attr]
            chance = 1.0 if nobody else pi[t][contexts[s]][a]
            cost = 0j if nobody else (alpha + beta) * cmath.log(chance)
            if beta and not nobody:
                cost -= beta * cmath.log(ref[contexts[s]][a])
            for s2, p in enumerate(P[s][a]):
                if p:
                    total += chance * p * (weight * (r[s][a][s2] - cost) + below(s2, t + 1, now))
        return total

    return sum((q * below(s, 0, 0) for s, q in enumerate(env.initial.tolist()) if q), 0j)  # type: ignore[union-attr]


def gradient_by_step(problem: Problem) -> Tensor:
    """∂J / ∂z_t[k, a], `[T, K, A]`, where only the policy at step t is perturbed: by the complex step. Σ_t is ∇J."""
    z, T = problem.logits.tolist(), problem.env.horizon  # type: ignore[union-attr]
    out = torch.zeros(T, *problem.logits.shape, dtype=torch.float64)
    for t, k, a in itertools.product(*map(range, out.shape)):
        tables = [[list(map(complex, row)) for row in z] for _ in range(T)]
        tables[t][k][a] += 1j * STEP
        out[t, k, a] = value(problem, tables).imag / STEP
    return out


def gradient(problem: Problem) -> Tensor:
    """∇J, `[K, A]`."""
    z, T = problem.logits.tolist(), problem.env.horizon  # type: ignore[union-attr]
    out = torch.zeros_like(problem.logits)
    for k, a in itertools.product(*map(range, out.shape)):
        table = [list(map(complex, row)) for row in z]
        table[k][a] += 1j * STEP
        out[k, a] = value(problem, [table] * T).imag / STEP
    return out


def policy(problem: Problem) -> list[list[float]]:
    return [[p.real for p in softmax([complex(x) for x in row])] for row in problem.logits.tolist()]


@dataclass(frozen=True)
class Everything:
    """Every ordered batch of a problem."""

    batch: Batch  # [M, B, T]
    chance: Floats  # [M]
    rows: NDArray[np.int64]  # [M, B], rollouts
    score: Floats  # [N, T, K·A], ∇log π of each position, 0 where nobody acts
    place: Floats  # [N, T, K], 1 at the context of each position, 0 where nobody acts

    def estimates(self, coefficients: Tensor) -> Floats:
        """ĝ of each batch, `[M, K·A]`, from c `[M, B, T]`, or from weights on the logits `[M, B, T, A]`."""
        c = coefficients.numpy()
        if c.ndim == 3:
            return np.einsum("mbt,mbtx->mx", c, self.score[self.rows])
        return np.einsum("mbta,mbtk->mka", c, self.place[self.rows]).reshape(len(c), -1)

    def of(self, estimator: Estimator) -> Floats:
        """ĝ of each batch, `[M, K·A]`."""
        c, mask = estimator.coefficients(self.batch), self.batch.mask > 0
        return self.estimates(torch.where(mask if c.dim() == mask.dim() else mask.unsqueeze(-1), c, 0.0))

    def mean(self, x: Floats) -> Floats:
        """E x over batches, of `[M, ...]`."""
        return np.tensordot(self.chance, x, 1)

    def variance(self, x: Floats) -> float:
        """tr Cov x of `[M, ...]`, by two passes."""
        gap = x - self.mean(x)
        return float(self.chance @ (gap**2).reshape(len(gap), -1).sum(1))


def everything(problem: Problem, sizes: Sequence[int] | None = None, needs: Sequence[SideTable] = ()) -> Everything:
    """Every ordered batch: a start for each group, then a rollout for each row."""
    sizes = problem.sizes if sizes is None else sizes
    table = problem.trajectories_with(needs)
    start, q = table.paths.start.tolist(), table.paths.start_probability.tolist()
    p = table.behavior_probability.tolist()
    rows, chance = [], []
    for drawn in itertools.product([s for s, x in enumerate(q) if x > 0], repeat=len(sizes)):
        of_row = [s for s, size in zip(drawn, sizes, strict=True) for _ in range(size)]
        members = [[n for n in range(len(p)) if start[n] == s and p[n] > 0] for s in of_row]
        for row in itertools.product(*members):
            rows.append(row)
            chance.append(math.prod(q[s] for s in drawn) * math.prod(p[n] for n in row))
    assert math.isclose(math.fsum(chance), 1.0, abs_tol=1e-12)
    labels = torch.tensor([g for g, size in enumerate(sizes) for _ in range(size)])
    index = torch.tensor(rows)
    context = table.paths.context.unsqueeze(-1) == torch.arange(len(problem.logits))
    return Everything(
        table.batch(index, labels, logits=True),
        np.array(chance),
        index.numpy(),
        scores(problem, needs),
        context.numpy().astype(float),
    )


def scores(problem: Problem, needs: Sequence[SideTable] = ()) -> Floats:
    """1[a = a_t] − π(a | k_t) at the context of each position, `[N, T, K·A]`."""
    paths, pi = problem.trajectories_with(needs).paths, policy(problem)
    K, A = problem.logits.shape
    out = np.zeros((len(paths), paths.steps, K, A))
    for n, (contexts, actions) in enumerate(zip(paths.context.tolist(), paths.action.tolist(), strict=True)):
        for t, (k, a) in enumerate(zip(contexts, actions, strict=True)):
            if k >= 0:
                out[n, t, k] = [(b == a) - pi[k][b] for b in range(A)]
    return out.reshape(len(paths), paths.steps, K * A)


def close(found: Tensor | Floats, expected: Tensor | Floats, *, size: float = 1.0, atol: float = 1e-11) -> None:
    """Equal to `atol` of `size`, at least 1."""
    a, b = (np.asarray(x, dtype=np.float64).reshape(-1) for x in (found, expected))
    np.testing.assert_allclose(a, b, rtol=0, atol=atol * max(1.0, size))
