"""The laws that a calibration runs over: real estimators and made-up ones, light to wild."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from scipy import special
from torch import Tensor

from pgcheck.engines.coefficients import estimates
from pgcheck.engines.enumeration import Batches
from pgcheck.errors import UnknownNameError
from pgcheck.estimators.lookup import as_estimator
from pgcheck.registry import find_problem
from pgcheck.statistics.finite import Law
from pgcheck.statistics.guarded import Floats

UNTOLD = "infinite variance"  # the family of which no number of draws tells the noise
_LEAST = 1e-9  # probability of the largest weight of a Pareto law
_VECTORS = 4  # that each of its weights may weigh


def estimator_law(estimator: str, problem: str, *, family: str) -> Law:
    """ĝ of every batch of a named problem that is small enough."""
    e, p = as_estimator(estimator), find_problem(problem)
    table = p.trajectories_with(e.needs)
    batches = Batches(table, p.sizes)
    (index, weight), *rest = batches.blocks(batches.count)
    assert not rest
    values = estimates(e, table, index, batches.labels)
    return Law.of(f"{estimator} on {problem}", family, values, weight.numpy() / float(weight.sum()))


def _gaussian(P: int, *, number: int) -> Law:
    """Equally likely values that a Gaussian would take."""
    rng = np.random.Generator(np.random.Philox(P))
    return Law.of(f"Gaussian values, P = {P}", "light", _around(rng.standard_normal((number, P)), P), _equal(number))


def _weighted(σ: float, P: int, *, number: int) -> Law:
    """Log-normal importance weights (their quantiles) times a noisy vector."""
    rng = np.random.Generator(np.random.Philox(P))
    weight = np.exp(σ * special.ndtri((np.arange(number) + 0.5) / number) - σ**2 / 2)
    values = weight[:, None] * (0.3 + rng.standard_normal((number, P)))
    return Law.of(f"log-normal weights, σ = {σ:g}, P = {P}", "heavy-tailed", torch.from_numpy(values), _equal(number))


def _sparse(P: int, *, number: int) -> Law:
    """A reward that is paid once in a hundred draws."""
    rng = np.random.Generator(np.random.Philox(P))
    values = np.concatenate([np.zeros((1, P)), 0.3 + rng.standard_normal((number - 1, P))])
    paid = np.full(number - 1, 0.01 / (number - 1))
    return Law.of(f"paid once in a hundred, P = {P}", "rare event", torch.from_numpy(values), np.array([0.99, *paid]))


def _pareto(index: float, P: int) -> Law:
    """Weights with P(w > x) = x^−index, cut off where that is 1e-9: for index ≤ 2 of a variance that no sample shows. They
    weigh vectors that all point one way, so that a sample without its large weights has too short a mean, and looks tame."""
    rng = np.random.Generator(np.random.Philox(P))
    beyond = np.append(np.geomspace(1.0, _LEAST, 94), 0.0)  # P(w > x) at the ends of bins, a fifth less each
    weight = np.append(np.sqrt(beyond[:-2] * beyond[1:-1]), _LEAST) ** (-1 / index)
    vectors = 1 + 0.3 * rng.standard_normal((_VECTORS, len(weight), P))
    values = (weight[:, None] * vectors).reshape(-1, P)
    probability = np.tile(-np.diff(beyond) / _VECTORS, _VECTORS)
    return Law.of(f"Pareto weights, index {index:g}, P = {P}", UNTOLD, torch.from_numpy(values), probability)


def _around(noise: Floats, P: int) -> Tensor:
    return torch.from_numpy(noise - noise.mean(0) + 0.1 / math.sqrt(P) * np.cos(np.arange(P)))


def _equal(number: int) -> Floats:
    return np.full(number, 1 / number)


def laws_named(starts: Sequence[str]) -> tuple[Law, ...]:
    """Those of `laws()` whose names start so.

    Raises:
        UnknownNameError: none does.
    """
    every = laws()
    for start in starts:
        if not any(law.name.startswith(start) for law in every):
            raise UnknownNameError(
                "law", start, [law.name for law in every], hint="`reports/calibration/` names them all."
            )
    return tuple(law for law in every if law.name.startswith(tuple(starts)))


def laws() -> tuple[Law, ...]:
    """What the calibration runs over: real estimators and made-up ones, light to wild."""
    return (
        _gaussian(2, number=200),
        _gaussian(32, number=300),
        estimator_law("leave_one_out", "dialogue/two-turn", family="light"),
        estimator_law("leave_one_out", "chain/linear-policy", family="light"),
        estimator_law("reinforce", "mdp/two-state-0.5", family="skewed"),
        estimator_law("reinforce", "tree/tokens-0.8", family="skewed"),
        _weighted(0.5, 2, number=300),
        _weighted(1.0, 2, number=300),
        _weighted(1.0, 32, number=300),
        _weighted(1.5, 32, number=300),
        estimator_law("trajectory_is", "off-policy/two-state-drifted", family="heavy-tailed"),
        estimator_law("trajectory_is", "off-policy/tree-stale", family="heavy-tailed"),
        estimator_law("reinforce", "notes/coin-0.01", family="rare event"),
        estimator_law("reinforce", "chain/absorbing", family="rare event"),
        _sparse(32, number=300),
        _pareto(1.5, 2),
        _pareto(2.0, 2),
    )
