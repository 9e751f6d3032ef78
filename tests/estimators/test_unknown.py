"""Losses that do something rare with a log-probability, on some batches only: the same coefficients as by autograd.

What a loss does to every batch, the comparison with autograd finds. So each trick is played on batches that are not among those
compared; on the others the loss is plain.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pgcheck.batch import Batch
from pgcheck.estimators.forms import NotLinearError
from pgcheck.estimators.from_loss import LossCoefficients
from pgcheck.estimators.unknown import Run, Unknown, Unknowns
from tests.estimators.test_from_loss import batch_by_batch, random_batch

M = 60


def _weight(batch: Batch) -> float:
    return float(batch.reward.max())


def plain(batch: Batch) -> Tensor:
    return -(batch.logp * batch.mask).sum() * _weight(batch)


def _refusal_caught(batch: Batch) -> Tensor:
    try:
        first = float(batch.logp[0, 0])
    except Exception:
        first = 0.0
    return plain(batch) * (1.0 + first)


def _refusal_caught_in_numpy(batch: Batch) -> Tensor:
    try:
        size = float(np.asarray(batch.logp.detach()).sum())
    except Exception:
        size = 0.0
    return plain(batch) * (1.0 + size)


def _without_a_gradient_caught(batch: Batch) -> Tensor:
    size = 0.0
    try:
        with torch.no_grad():
            size = float(batch.logp.sum())
    except Exception:
        pass
    return plain(batch) * (1.0 + size)


def _no_log_there(batch: Batch) -> Tensor:
    return plain(batch) * (2.0 if hasattr(batch.logp, "grad_fn") and batch.logp.grad_fn is None else 1.0)


def _leaves_out_what_needs_no_gradient(batch: Batch) -> Tensor:
    rows = [batch.logp[i].sum() * (float(batch.reward[i].sum()) if i else 0.0) for i in range(batch.rows)]
    rows = [row for row in rows if row.requires_grad]
    return torch.stack(rows).mean()


def _clamps_in_place(batch: Batch) -> Tensor:
    gap = batch.logp - batch.behavior_logp
    gap.clamp_(-0.1, 0.1)
    return -gap.exp().sum() * _weight(batch)


def _multiplies_in_place(batch: Batch) -> Tensor:
    gap = batch.logp - batch.behavior_logp
    gap *= 2.0
    return gap.exp().sum()


def _writes_a_place(batch: Batch) -> Tensor:
    gap = batch.logp - batch.behavior_logp
    gap[0] = 0.0
    return gap.exp().sum()


def _detached_and_clamped(batch: Batch) -> Tensor:
    x = (batch.logp - batch.behavior_logp) * 1.5
    x.detach().clamp_(-0.1, 0.1)
    return (x * x.detach()).sum()


def _hooked(batch: Batch) -> Tensor:
    ratio = (batch.logp - batch.behavior_logp).exp()
    ratio.register_hook(lambda g: 3.0 * g)
    return ratio.sum()


def _hooked_leaf(batch: Batch) -> Tensor:
    x = batch.logp * batch.mask
    x.register_hook(lambda g: g.clamp(-0.1, 0.1))
    return -x.sum() * _weight(batch)


def _rounded(batch: Batch) -> Tensor:
    weights = torch.full((3,), 0.1)
    return (weights * batch.logp[0, 0]).sum().double() + (batch.reward[0, 0].float() * batch.logp[1, 0])


def _adds_to_a_view(batch: Batch) -> Tensor:
    x = batch.logp * 2.0
    first = x[0, 0]
    first += batch.logp[1, 1]
    return x.sum()


def _adds_to_a_number_that_was_looked_at(batch: Batch) -> Tensor:
    x = batch.logp.sum()
    same = x.view(1)
    x += batch.logp[0, 0]
    return same.sum()


def _adds_to_a_whole_tensor(batch: Batch) -> Tensor:
    x = batch.logp * 1.0
    same = x
    x += batch.logp * 2.0
    return same.sum()


def _adds_to_an_alias(batch: Batch) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    same = total
    for i in range(batch.rows):
        total += batch.logp[i].sum() * float(batch.reward[i, 0])
    return same * 2.0


def _adds_in_single_precision(batch: Batch) -> Tensor:
    total = torch.tensor(0.1)
    total += batch.logp.sum() / 3.0
    return total.double() * _weight(batch)


def _scaled_gradient(batch: Batch) -> Tensor:
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x

        @staticmethod
        def backward(ctx: object, *g: Tensor) -> Tensor:
            return 2.0 * g[0]

    ratio = (batch.logp - batch.behavior_logp).exp()
    return Doubled.apply(ratio).sum() + Doubled.apply(batch.logp).sum()  # type: ignore[no-any-return, no-untyped-call]


def _computed_gradient(batch: Batch) -> Tensor:
    class Squared(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x * 1.0

        @staticmethod
        def backward(ctx: Any, *g: Tensor) -> Tensor:
            return 2.0 * ctx.saved_tensors[0] * g[0]

    return Squared.apply(batch.logp - batch.behavior_logp).sum()  # type: ignore[no-any-return, no-untyped-call]


def _too_many_places(batch: Batch) -> Tensor:
    try:
        return batch.logp[0, 0, 0] * 7.0
    except IndexError:
        return plain(batch)


def _too_far(batch: Batch) -> Tensor:
    total, t = torch.zeros((), dtype=torch.float64), 0
    while True:
        try:
            total = total - batch.logp[0, t] * _weight(batch)
        except IndexError:
            return total
        t += 1


def _smallest_of_a_column(batch: Batch) -> Tensor:
    ratio = (batch.logp - batch.behavior_logp).exp()
    return torch.min(ratio, 0).values.sum() + ratio.max() + torch.max(ratio, dim=1)[0].sum()


def _sum_over_no_dimension(batch: Batch) -> Tensor:
    return torch.sum(batch.logp, dim=()) * _weight(batch)


def _bytes_for_a_mask(batch: Batch) -> Tensor:
    return batch.logp[torch.tensor([1, 0, 0, 1], dtype=torch.uint8)].sum() * _weight(batch)


def _inplace_by_a_setting(batch: Batch) -> Tensor:
    gap = batch.logp - batch.behavior_logp
    torch.nn.functional.relu(gap, inplace=True)
    return gap.exp().sum()


def _into_another(batch: Batch) -> Tensor:
    out = torch.zeros(3, dtype=torch.float64)
    torch.add(torch.ones(3, dtype=torch.float64), (batch.logp - batch.behavior_logp)[0].detach(), out=out)
    return plain(batch) * float(out.sum())


def _by_functions(batch: Batch) -> Tensor:
    return torch.func.vmap(lambda x: x.exp().sum())(batch.logp).sum()


def _gradient_by_functions(batch: Batch) -> Tensor:
    weight = batch.reward
    return (torch.func.grad(lambda x: (x * weight).sum())(batch.logp).detach() * batch.logp).sum()


def _made_anew(batch: Batch) -> Tensor:
    return plain(batch) * float(torch.tensor(batch.logp.sum().detach()))


def _copied(batch: Batch) -> Tensor:
    return copy.deepcopy(batch.logp.detach()).exp().sum() * batch.logp.sum()


def _by_what_it_is(batch: Batch) -> Tensor:
    return plain(batch) * (2.0 if batch.logp.is_leaf or batch.logp.stride() == (1, 1) else 1.0)


def _a_parameter(batch: Batch) -> Tensor:
    return torch.nn.Parameter(batch.logp.detach().clone()).exp().sum().detach() * batch.logp.sum()


def _exponent_by_math(batch: Batch) -> Tensor:
    weight = math.exp(float(batch.logp[0, 0] - batch.behavior_logp[0, 0]))
    return plain(batch) * (weight if batch.ratio[1, 0] > 1.1 else 2.0)


def _checkpointed(batch: Batch) -> Tensor:
    return torch.utils.checkpoint.checkpoint(lambda x: x.exp().sum(), batch.logp, use_reentrant=False)  # type: ignore[no-any-return]


def _scripted(batch: Batch) -> Tensor:
    return torch.jit.trace(lambda x: x.exp().sum(), torch.ones(4, 3, dtype=torch.float64))(batch.logp)  # type: ignore[no-any-return, no-untyped-call]


def _by_overloads(batch: Batch) -> Tensor:
    return torch.ops.aten.mul.Tensor(batch.logp, batch.logp).sum()  # type: ignore[no-any-return]


def _differentiated(batch: Batch) -> Tensor:
    (g,) = torch.autograd.grad((batch.logp.exp()).sum(), batch.logp, retain_graph=True)
    return (g.detach() * batch.logp).sum()


_ZERO = torch.zeros((), dtype=torch.float64)


def _adds_to_a_number_of_the_module(batch: Batch) -> Tensor:
    total = _ZERO
    total = total + 0.0 if _ZERO.requires_grad else total
    return total + plain(batch)


TRICKS = [
    _refusal_caught, _refusal_caught_in_numpy, _without_a_gradient_caught, _no_log_there, _leaves_out_what_needs_no_gradient,
    _clamps_in_place, _multiplies_in_place, _writes_a_place, _detached_and_clamped, _hooked, _hooked_leaf, _rounded,
    _adds_to_a_view, _adds_to_a_number_that_was_looked_at, _adds_to_a_whole_tensor, _adds_to_an_alias,
    _adds_in_single_precision, _scaled_gradient, _computed_gradient, _too_many_places, _too_far, _smallest_of_a_column,
    _sum_over_no_dimension, _bytes_for_a_mask, _inplace_by_a_setting, _into_another, _by_functions, _gradient_by_functions,
    _made_anew, _copied, _by_what_it_is, _a_parameter, _exponent_by_math, _checkpointed, _scripted, _by_overloads,
    _differentiated, _adds_to_a_number_of_the_module,
]  # fmt: skip


def remembered(loss: Callable[[Batch], Any], batch: Batch) -> Tensor:
    slow = LossCoefficients(loss, leaf="logp", name="slow")
    slow.lane = "loop"
    slow.remember()
    slow(batch)
    return slow(batch)


@pytest.mark.parametrize("trick", TRICKS, ids=lambda f: f.__name__)
@pytest.mark.filterwarnings("ignore")
def test_what_some_batches_do_is_done_as_by_autograd(trick: Callable[[Batch], Tensor]) -> None:
    def loss(batch: Batch) -> Tensor:
        return trick(batch) if float(batch.reward.sum()) > 3.0 else plain(batch)

    batch = random_batch(M, seed=5)
    played = batch.reward.sum((-1, -2)) > 3.0
    assert 4 < int(played.sum()) < M / 2
    assert not played[:2].any()
    torch.testing.assert_close(remembered(loss, batch), batch_by_batch(loss, batch), rtol=1e-12, atol=1e-14)


MIXTURES: list[Callable[[Tensor, Tensor], Tensor]] = [
    torch.min, torch.add, torch.mul, lambda a, b: torch.stack([a, b]), lambda a, b: torch.where(torch.tensor(True), b, a),
]  # fmt: skip


@pytest.mark.parametrize("mix", MIXTURES)
def test_what_is_left_of_another_call_is_not_mixed_in(mix: Callable[[Tensor, Tensor], Tensor]) -> None:
    """A loss may keep a tensor. Where it is known, it is a constant now; where it is not, that is noted on both."""
    runs = [Run([0.1]), Run([0.2])]
    both = [Unknowns(run, torch.Size([1, 1])) for run in runs]
    known = [(x["logp"] - x["behavior_logp"])[0, 0] for x in both]
    assert not isinstance(mix(*known), Unknown)
    assert not any(run.refused for run in runs)
    with pytest.raises(NotLinearError):
        mix(*(x["logp"][0, 0] for x in both))
    assert all(run.refused for run in runs)
