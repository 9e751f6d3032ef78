"""E ĝ alone is that of brute force over ordered tuples; and what cannot be had in this way is left out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pgcheck.batch import Batch
from pgcheck.engines.expected import expected_gradients
from pgcheck.estimators.base import Estimator, from_coefficients
from pgcheck.estimators.from_loss import from_loss
from pgcheck.estimators.lookup import as_estimator
from pgcheck.problem import Problem
from tests.engines.oracle import brute_force, dialogue, every_batch, rollout_chances, walk

NAMES = ("reinforce", "reward_to_go", "leave_one_out", "grpo", "batch_mean")


def _entropy(batch: Batch) -> Tensor:
    logp = torch.log_softmax(batch.logits, -1)
    return ((logp.exp() * logp).sum(-1) * batch.mask).sum() / batch.rows


def _first_row(batch: Batch) -> Tensor:
    return batch.episode_return[..., :1, None] * batch.mask


def _nan(batch: Batch) -> Tensor:
    return torch.full_like(batch.reward, torch.nan)


FIRST_ROW, NAN = (from_coefficients(fn, couples="batch", name=fn.__name__) for fn in (_first_row, _nan))


@pytest.mark.parametrize(
    "problem",
    [walk(groups=1, group_size=2), dialogue(groups=2, group_size=2), dialogue(groups=2, group_size=(2, 1))],
    ids=["walk", "two groups", "unequal groups"],
)
def test_brute_force(problem: Problem) -> None:
    """Whatever is coupled, and whichever leaf."""
    known = [e for name in NAMES if (e := as_estimator(name)).fits(problem)]
    estimators: list[Estimator] = [*known, from_loss(_entropy, leaf="logits")]
    batches = every_batch(problem.trajectories, problem.sizes, rollout_chances(problem))
    for e, found in zip(estimators, expected_gradients(estimators, problem), strict=True):
        assert found is not None, e.name
        expected, _, _ = brute_force(e, batches, problem.logits)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)


def test_left_out() -> None:
    """Multisets are not enough where the first row counts more; and NaN has no expectation."""
    sound = as_estimator("reinforce")
    found = expected_gradients([FIRST_ROW, NAN, sound], walk(groups=1, group_size=3))
    assert [x is None for x in found] == [True, True, False]


def test_too_many_batches() -> None:
    """4 rollouts, 40 rows: C(43, 3) = 12 341 batches of 80 positions."""
    assert expected_gradients([as_estimator("reinforce")], walk(groups=1, group_size=40)) == [None]
