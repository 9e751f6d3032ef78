"""Losses that loop over rows in Python: in expectation what their formula is for whole tensors, right or wrong.

Each loop comes with its formula, the coefficients c `[M, B, T]` of all batches at once, which shares nothing with losses. E ĝ
of the loop is compared with that of the formula, with what is remembered and without, and with ∇J.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pgcheck.batch import Batch
from pgcheck.engines.exact import exact_moments
from pgcheck.estimators.base import Estimator
from pgcheck.estimators.from_loss import LossCoefficients, from_loss
from pgcheck.problem import Problem
from tests.engines.oracle import dialogue

Loss = Callable[[Batch], Any]
Formula = Callable[[Batch], Tensor]  # c of all batches, to be masked and divided by B


# -- what is right


def reinforce(batch: Batch) -> Tensor:
    loss = 0.0
    for i in range(batch.rows):
        ret = sum(float(w) * float(r) for w, r in zip(batch.discount_weight[i], batch.reward[i], strict=True))
        loss = loss - ret * sum(batch.logp[i, t] for t, m in enumerate(batch.mask[i].tolist()) if m)
    return loss / batch.rows  # type: ignore[return-value]


def to_go(batch: Batch) -> Tensor:
    loss = batch.logp.new_zeros(())
    for i in range(batch.rows):
        future = 0.0
        for t in reversed(range(batch.shape[-1])):
            future = batch.reward[i, t].item() + batch.discount * future
            if batch.mask[i, t]:
                loss -= batch.discount**t * future * batch.logp[i, t]
    return loss / batch.rows


def others_of_the_group(batch: Batch) -> Tensor:
    rows = defaultdict(list)
    for i, g in enumerate(batch.group.tolist()):
        rows[g].append(i)
    terms = []
    for members in rows.values():
        for i in members:
            rest = np.mean([batch.episode_return[j].item() for j in members if j != i])
            terms.append(-(float(batch.episode_return[i]) - float(rest)) * (batch.logp[i] * batch.mask[i]).sum())
    return torch.stack(terms).mean()


def by_ratio(batch: Batch) -> Tensor:
    """π/π_old of the whole row, times its return."""
    total = 0.0
    for logp, old, mask, ret in zip(batch.logp, batch.behavior_logp, batch.mask, batch.episode_return, strict=True):
        total = total - torch.exp(((logp - old) * mask).sum()) * float(ret)
    return total / batch.rows  # type: ignore[return-value]


def weighted_score(batch: Batch) -> Tensor:
    """The same by a detached ratio and a score; on the policy it is 1."""
    total: Any = 0
    for i in range(batch.rows):
        here = [t for t in range(batch.shape[-1]) if batch.mask[i, t].item() == 1.0]
        gap = sum(batch.logp[i, t] - batch.behavior_logp[i, t] for t in here)
        total -= torch.as_tensor(gap).exp().detach() * batch.episode_return[i].item() * batch.logp[i][here].sum()
    return total / len(batch.logp)  # type: ignore[no-any-return]


def constant_baseline(batch: Batch) -> Tensor:
    parts = [
        -(float(r) - 0.7) * logp @ mask
        for r, logp, mask in zip(batch.episode_return, batch.logp, batch.mask, strict=True)
    ]
    return sum(parts[1:], parts[0]) / len(parts)


def all_pairs(batch: Batch) -> Tensor:
    """Leave-one-out as a sum over pairs of a group."""
    total = torch.zeros((), dtype=torch.float64)
    for i in range(batch.rows):
        for j in range(batch.rows):
            if i != j and int(batch.group[i]) == int(batch.group[j]):
                gap = float(batch.episode_return[i]) - float(batch.episode_return[j])
                total = (
                    total - gap * torch.where(batch.mask[i] > 0, batch.logp[i], torch.zeros_like(batch.logp[i])).sum()
                )
    return total / batch.rows


def positions_first(batch: Batch) -> Tensor:
    rewards = batch.reward.numpy()
    losses = {}
    for t in range(batch.shape[-1]):
        future = (batch.discount ** np.arange(t, batch.shape[-1]) * rewards[:, t:]).sum(1)
        for i in np.flatnonzero(batch.mask[:, t].numpy()):
            losses[i, t] = -float(future[i]) * batch.logp[i, t]
    return sum(losses.values()) / batch.rows  # type: ignore[return-value]


def stacked(batch: Batch) -> Tensor:
    scores = torch.stack(
        [sum(x for x, m in zip(row, mask, strict=True) if m) for row, mask in zip(batch.logp, batch.mask, strict=True)]
    )  # type: ignore[misc]
    return (
        -torch.dot(scores, torch.tensor([r - 1.0 for r in batch.episode_return.tolist()], dtype=torch.float64))
        / batch.rows
    )


def last_row(batch: Batch) -> Tensor:
    """One row alone; and the gap without exp, times a detached gap, which on the policy is nothing."""
    total = batch.logp[-1].sum() * float(batch.episode_return[-1])
    for i in range(batch.rows - 1):
        gap = batch.logp[i] - batch.behavior_logp[i]
        total = total - (gap.detach() * gap).sum()
    return -total


# -- what is wrong


def own_in_the_mean(batch: Batch) -> Tensor:
    total = 0.0
    for g in batch.group.unique():
        rows = [i for i in range(batch.rows) if batch.group[i] == g]
        mean = sum(float(batch.episode_return[i]) for i in rows) / len(rows)
        for i in rows:
            total = total - (float(batch.episode_return[i]) - mean) * (batch.logp[i] * batch.mask[i]).sum()
    return total / batch.rows  # type: ignore[return-value]


def by_the_length(batch: Batch) -> Tensor:
    rows = []
    for x, m, ret in zip(batch.logp, batch.mask, batch.episode_return, strict=True):
        rows.append(-(x * m).sum() * ret.item() / int(m.sum()))
    return torch.stack(rows).mean()


def flipped(batch: Batch) -> Tensor:
    return -1.0 * reinforce(batch)


def all_rows_added(batch: Batch) -> Tensor:
    return reinforce(batch) * batch.rows


def best_only(batch: Batch) -> Tensor:
    best = max(range(batch.rows), key=lambda i: float(batch.episode_return[i]) - 1e-6 * i)
    return -float(batch.episode_return[best]) * (batch.logp[best] * batch.mask[best]).sum()


def no_mask(batch: Batch) -> Tensor:
    """The mask one position late."""
    total = 0.0
    for i in range(batch.rows):
        for t in range(1, batch.shape[-1]):
            if batch.mask[i, t - 1] > 0:
                total = total - float(batch.episode_return[i]) * batch.logp[i, t]
    return total / batch.rows if isinstance(total, Tensor) else batch.logp.sum() * 0  # type: ignore[return-value]


def square_of_the_score(batch: Batch) -> Tensor:
    """Looks at the log-probabilities: c = R (1 + logp)."""
    total = 0.0
    for i in range(batch.rows):
        for t in range(batch.shape[-1]):
            if batch.mask[i, t] > 0:
                x = batch.logp[i, t]
                total = total - float(batch.episode_return[i]) * (x + 0.5 * x**2)
    return total / batch.rows  # type: ignore[return-value]


def steered(batch: Batch) -> Tensor:
    """A branch on what the policy thinks of an action."""
    total = 0.0
    for i in range(batch.rows):
        for t in range(batch.shape[-1]):
            if batch.mask[i, t] > 0:
                weight = 2.0 if math.exp(batch.logp[i, t]) > 0.5 else 1.0
                total = total - weight * float(batch.episode_return[i]) * batch.logp[i, t]
    return total / batch.rows  # type: ignore[return-value]


def none_below_zero(batch: Batch) -> Tensor:
    return (
        sum(
            (
                -float(r) * (x * m).sum()
                for r, x, m in zip(batch.episode_return, batch.logp, batch.mask, strict=True)
                if r > 0
            ),
            0.0 * batch.logp.sum(),
        )
        / batch.rows
    )


def clipped(batch: Batch) -> Tensor:
    """PPO, its baseline the mean of all; on the policy nothing is clipped."""
    mean = batch.episode_return.mean().item()
    total = torch.zeros((), dtype=torch.float64)
    for i in range(batch.rows):
        adv = float(batch.episode_return[i]) - mean
        for t in range(batch.shape[-1]):
            if batch.mask[i, t] != 0:
                ratio = (batch.logp[i, t] - batch.behavior_logp[i, t]).exp()
                total += -torch.min(ratio * adv, torch.clamp(ratio, 0.8, 1.2) * adv)
    return total / batch.rows


def _return(b: Batch) -> Tensor:
    return b.episode_return.unsqueeze(-1).expand(b.reward.shape)


def _steps(b: Batch) -> Tensor:
    return torch.arange(b.shape[-1], dtype=torch.float64)


def _future(b: Batch) -> Tensor:
    weighted = b.discount ** _steps(b) * b.reward
    return weighted.flip(-1).cumsum(-1).flip(-1)


def _other(b: Batch) -> Tensor:
    """The return of the other row of a group of two."""
    return b.episode_return.unflatten(-1, (2, 2)).flip(-1).flatten(-2)


def _of_the_row(x: Tensor, b: Batch) -> Tensor:
    return x.unsqueeze(-1).expand(b.reward.shape)


def _best(b: Batch) -> Tensor:
    first = (b.episode_return - 1e-6 * torch.arange(b.rows)).argmax(-1, keepdim=True)
    return torch.zeros_like(b.episode_return).scatter(-1, first, 1.0)


def _last(b: Batch) -> Tensor:
    out = torch.zeros_like(b.episode_return)
    out[..., -1] = 1.0
    return out


RIGHT: list[tuple[Loss, Formula]] = [
    (reinforce, _return),
    (to_go, _future),
    (others_of_the_group, lambda b: _of_the_row(b.episode_return - _other(b), b)),
    (by_ratio, _return),
    (weighted_score, _return),
    (constant_baseline, lambda b: _return(b) - 0.7),
    (last_row, lambda b: _return(b) * _of_the_row(_last(b), b) * b.rows),
    (all_pairs, lambda b: _of_the_row(b.episode_return - _other(b), b)),
    (positions_first, _future),
    (stacked, lambda b: _return(b) - 1.0),
]
WRONG: list[tuple[Loss, Formula]] = [
    (own_in_the_mean, lambda b: _of_the_row((b.episode_return - _other(b)) / 2, b)),
    (by_the_length, lambda b: _return(b) / b.mask.sum(-1, keepdim=True)),
    (flipped, lambda b: -_return(b)),
    (all_rows_added, lambda b: _return(b) * b.rows),
    (best_only, lambda b: _return(b) * _of_the_row(_best(b), b) * b.rows),
    (no_mask, lambda b: _return(b) * torch.nn.functional.pad(b.mask, (1, 0))[..., :-1]),
    (square_of_the_score, lambda b: _return(b) * (1.0 + b.logp)),
    (steered, lambda b: _return(b) * torch.where(b.logp.exp() > 0.5, 2.0, 1.0)),
    (none_below_zero, lambda b: _return(b).clamp(min=0.0)),
    (clipped, lambda b: _of_the_row(b.episode_return - b.episode_return.mean(-1, keepdim=True), b)),
]
LOOKS = {square_of_the_score, steered}


@pytest.fixture(scope="module")
def problem() -> Problem:
    return dialogue(groups=2, group_size=2)


def expectation(estimator: Estimator, problem: Problem) -> Tensor:
    return exact_moments([estimator], problem)[0].mean


@pytest.mark.parametrize(("loss", "formula"), RIGHT + WRONG, ids=lambda f: f.__name__)
def test_a_loop_has_the_expectation_of_its_formula(
    loss: Loss, formula: Formula, problem: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    looping = from_loss(loss)
    fn = looping.coefficients
    assert isinstance(fn, LossCoefficients)
    found = expectation(looping, problem)
    assert fn.lane == "loop"
    assert fn._memory is not None
    assert (fn._memory._linear > 0) == (loss not in LOOKS)

    expected = expectation(Estimator("formula", lambda b: formula(b) * b.mask / b.rows, couples="batch"), problem)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-13)

    monkeypatch.setattr(LossCoefficients, "remember", lambda self: None)
    torch.testing.assert_close(expectation(from_loss(loss), problem), found, rtol=1e-12, atol=1e-14)

    gap = float((found - problem.gradient()).norm() / problem.gradient().norm())
    assert gap < 1e-11 if (loss, formula) in RIGHT else gap > 1e-2
