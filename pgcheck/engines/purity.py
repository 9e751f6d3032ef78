"""Whether an estimator is a function of its batch: the same numbers for the same batch, and the batch left as it was.

Guarantee: run before anything is enumerated, so that a random, stateful or mutating loss never gets a verdict.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pgcheck.batch import Batch
from pgcheck.engines.coefficients import evaluated
from pgcheck.errors import EstimatorError
from pgcheck.estimators.base import Estimator
from pgcheck.estimators.from_loss import LossCoefficients, is_looped
from pgcheck.seeding import (
    fixed_random_state,
    global_random_state,
    random_state_kept,
    same_random_state,
    set_global_random_state,
)

KINDS = ("inputs_unchanged", "deterministic", "stateless")  # in the order in which they are looked for


_LOOPED = 4  # batches that are enough where each takes its time: state and randomness show on any


@dataclass(frozen=True)
class Impurity:
    """`kind` is the name of the check that it fails, one of `KINDS`; the rest is for messages."""

    kind: str
    what: str
    mend: str
    measured: float


_DERIVED = (
    "clock", "discount_weight", "episode_return", "reward_to_go", "length", "inverse_length", "ratio", "same_group",
)  # fmt: skip


def copied(batch: Batch) -> Batch:
    """The batch in memory of its own."""
    return batch.map(torch.Tensor.clone)


def find_impurity(estimator: Estimator, batch: Batch) -> Impurity | None:
    """The first of: writes to its inputs; draws from a global random generator; keeps state from one call to the next.

    `batch` `[M, B, T]`, M ≥ 2. Global random state is as before when this returns.
    """
    fn = estimator.coefficients
    if is_looped(estimator):
        batch = _first(batch)
    with (
        random_state_kept() as before,
        fn.asked_anew() if isinstance(fn, LossCoefficients) else contextlib.nullcontext(),
    ):
        return _find(estimator, batch, before)


def _find(estimator: Estimator, batch: Batch, before_call: tuple[Any, ...]) -> Impurity | None:
    given = copied(batch)
    try:
        first = evaluated(estimator, given)
    except EstimatorError as error:  # autograd may notice first, or the batch it left behind is too much for the rest
        if "inplace" in str(error.__cause__):
            return Impurity(
                "inputs_unchanged", "changes its inputs in place", "write out of place, x = x - m", math.nan
            )
        raise
    if not isinstance(first, Tensor):
        return None  # the engine says so
    drew = not same_random_state(before_call, global_random_state())
    derived = [name for name in _DERIVED if name in vars(given)]  # computed once and shared by all estimators
    expected = batch.tensors() | {name: getattr(batch, name) for name in derived}
    for name, x in (given.tensors() | {name: getattr(given, name) for name in derived}).items():
        if not _equal(x, expected[name]):  # values that are not known are NaN
            moved = float((x.to(torch.float64) - expected[name].to(torch.float64)).abs().max())
            return Impurity(
                "inputs_unchanged", f"changes its inputs: batch.{name}", "write out of place, x = x - m", moved
            )
    if is_looped(estimator):  # as is known by now
        given, batch, first = _first(given), _first(batch), first[:_LOOPED]
    second = _from_seed(estimator, given, 1)  # it is as it was
    if drew or (not _equal(first, second) and _equal(second, _from_seed(estimator, given, 1))):
        return Impurity(
            "deterministic",
            "draws random numbers",
            "an exact verdict needs a function of the batch; take dropout and noise out",
            _gap(first, second),
        )
    evaluated(estimator, batch.map(lambda x: x.flip(0)))
    third = evaluated(estimator, copied(batch))
    if not _equal(first, second) or not _equal(first, third):
        return Impurity(
            "stateless",
            "keeps state from one batch to the next",
            "a running mean or a counter makes the result depend on what came before; pass it in as a constant",
            max(_gap(first, second), _gap(first, third)),
        )
    return None


def _first(batch: Batch) -> Batch:
    return batch.map(lambda x: x[:_LOOPED])


def _from_seed(estimator: Estimator, batch: Batch, seed: int) -> Any:
    set_global_random_state(fixed_random_state(seed))
    return evaluated(estimator, batch)


def _equal(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a, b) or (a.shape == b.shape and torch.equal(torch.nan_to_num(a), torch.nan_to_num(b)))


def _gap(a: Tensor, b: Tensor) -> float:
    return float((torch.nan_to_num(a) - torch.nan_to_num(b)).abs().max()) if a.shape == b.shape else float("nan")
