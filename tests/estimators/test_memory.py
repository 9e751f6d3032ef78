"""Losses that look at no log-probability are asked once: the same coefficients as by autograd, batch by batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from pgcheck.batch import Batch
from pgcheck.engines.exact import exact_moments
from pgcheck.errors import EstimatorError
from pgcheck.estimators.forms import NotLinearError
from pgcheck.estimators.from_loss import LossCoefficients, from_loss
from pgcheck.estimators.unknown import Run, Unknown, Unknowns
from tests.engines.oracle import dialogue
from tests.estimators.test_from_loss import batch_by_batch, random_batch

Loss = Callable[[Batch], Tensor]
M = 40


def rows_and_groups(batch: Batch) -> Tensor:
    """Leave-one-out in Python."""
    total = torch.zeros((), dtype=torch.float64)
    same = total
    for g in set(batch.group.tolist()):
        rows = [i for i in range(batch.rows) if int(batch.group[i]) == g]
        for i in rows:
            rest = [float(batch.episode_return[j]) for j in rows if j != i]
            for t in range(batch.shape[-1]):
                if float(batch.mask[i, t]) > 0:
                    total -= (float(batch.episode_return[i]) - sum(rest) / len(rest)) * batch.logp[i, t]
    return same / batch.rows


def by_numpy(batch: Batch) -> Tensor:
    r = batch.episode_return.numpy()
    adv = np.where(r > r.mean(), r - r.mean(), 0.5)
    return (
        sum(-(row * m).sum() * float(a) / int(m.sum()) for row, m, a in zip(batch.logp, batch.mask, adv, strict=True))
        / 4
    )  # type: ignore[no-any-return]


def stacked(batch: Batch) -> Tensor:
    best = int(batch.episode_return.argmax())
    rows = [batch.logp[i] * (2.0 if i == best else -1.0) for i in range(batch.rows)]
    return torch.stack(rows).mean() + torch.cat(rows)[batch.mask.flatten() > 0].sum() + float(batch.reward.sum())


def clipped(batch: Batch) -> Tensor:
    total: Tensor | float = 0.0
    for i in range(batch.rows):
        a = float(batch.episode_return[i]) - float(batch.episode_return.mean())
        for t in range(batch.shape[-1]):
            if batch.mask[i, t]:
                ratio = (batch.logp[i, t] - batch.behavior_logp[i, t]).exp()
                total = total - torch.min(ratio * a, ratio.clamp(0.8, 1.2) * a)
                total = total * (2.0 if float(ratio.detach()) > 1.1 else 1.0)
    return total if isinstance(total, Tensor) else batch.logp.sum()


def weighted(batch: Batch) -> Tensor:
    """The detached ratio times the score."""
    w = batch.ratio.prod(-1).detach()
    late = (batch.logp.detach() - batch.behavior_logp).sum(-1).exp()
    return (
        -((w + late + float(batch.reward.max())) @ (batch.logp * batch.mask).sum(-1)) if w.max() > 0.1 else plain(batch)
    )


def plain(batch: Batch) -> Tensor:
    return -(batch.logp * batch.mask * float(batch.reward.max())).sum()


def elsewhere(batch: Batch) -> Batch:
    """At another θ, with the same ratios."""
    moved = torch.randn(batch.logp.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    # to multiples of 2⁻²⁰, so that the difference is the same to the bit
    behavior = ((batch.behavior_logp + moved) * 2**20).round() / 2**20
    ratio = ((batch.logp - batch.behavior_logp) * 2**20).round() / 2**20
    return replace(batch, logp=behavior + ratio, behavior_logp=behavior)


def asked(loss: Loss, *batches: Batch) -> tuple[list[Tensor], list[int]]:
    """c of each in turn, and how often the loss was called for it."""
    calls: list[int] = []

    def counted(one: Batch) -> Tensor:
        calls.append(1)
        return loss(one)

    slow = LossCoefficients(counted, leaf="logp", name="slow")
    slow.lane = "loop"
    slow.remember()
    out, number = [], []
    for batch in batches:
        before = len(calls)
        out.append(slow(batch))
        number.append(len(calls) - before)
    return out, number


@pytest.mark.parametrize("loss", [rows_and_groups, by_numpy, stacked, clipped, weighted])
def test_what_looks_at_no_log_probability_is_asked_once(loss: Loss) -> None:
    here = elsewhere(random_batch(M))
    there = elsewhere(here)
    found, calls = asked(loss, here, there)
    for c, batch in zip(found, (here, there), strict=True):
        torch.testing.assert_close(c, batch_by_batch(loss, batch), rtol=1e-12, atol=1e-14)
    assert M < calls[0] <= M + 2
    assert calls[1] == 0


def _reads_a_number(batch: Batch) -> Tensor:
    return plain(batch) * (2.0 if float(batch.logp[0, 0]) < -1.0 else 1.0)


def _reads_them_as_a_tensor(batch: Batch) -> Tensor:
    return plain(batch) * (2.0 if torch.tensor(batch.logp[0, 0].detach()) < -1.0 else 1.0)


def _reads_a_list(batch: Batch) -> Tensor:
    return plain(batch) * (2.0 if torch.tensor(list(batch.logp[0])).sum() < -2.0 else 1.0)


def _without_a_gradient(batch: Batch) -> Tensor:
    with torch.no_grad():
        size = batch.logp.sum() / 10
    return plain(batch) + size * batch.logp.sum()


def _exponential(batch: Batch) -> Tensor:
    return -(batch.logp.exp() * float(batch.reward.max())).sum()


def _square(batch: Batch) -> Tensor:
    return (batch.logp * batch.logp).sum() * float(batch.reward.max())


def _masked_by_itself(batch: Batch) -> Tensor:
    return plain(batch) + torch.where(batch.logp < -1.0, batch.logp, 0.0).sum()


def _by_another_clock(batch: Batch) -> Tensor:
    return plain(batch) + (batch.logp[:, 1] - batch.behavior_logp[:, 0]).exp().sum()


def _through_a_function(batch: Batch) -> Tensor:
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, *g: Tensor) -> Tensor:
            return 2.0 * g[0]

    return Doubled.apply(batch.logp).sum() * float(batch.reward.max())  # type: ignore[no-any-return, no-untyped-call]


@pytest.mark.parametrize(
    "loss",
    [
        _reads_a_number, _reads_them_as_a_tensor, _reads_a_list, _without_a_gradient, _exponential, _square,
        _masked_by_itself, _by_another_clock, _through_a_function,
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_looks_at_one_is_asked_anew(loss: Loss) -> None:
    here = elsewhere(random_batch(M))
    there = elsewhere(here)
    found, calls = asked(loss, here, there)
    for c, batch in zip(found, (here, there), strict=True):
        torch.testing.assert_close(c, batch_by_batch(loss, batch), rtol=1e-12, atol=1e-14)
    assert calls[1] >= M


def test_only_some_batches_look() -> None:
    """A branch on rewards: on one side the loss is linear."""

    def loss(batch: Batch) -> Tensor:
        return _exponential(batch) if float(batch.reward.sum()) > 4.0 else plain(batch)

    here = random_batch(M)
    number = int((here.reward.sum((-1, -2)) > 4.0).sum())
    assert 0 < number < M / 4
    found, calls = asked(loss, here, here)
    for c in found:
        torch.testing.assert_close(c, batch_by_batch(loss, here), rtol=1e-12, atol=1e-14)
    assert calls[1] == 2 * number  # tried, and by autograd


@pytest.mark.parametrize("column", ["reward", "mask", "action", "ref_logp", "value", "group", "behavior_logp"])
def test_a_column_that_was_asked_for_counts(column: str) -> None:
    """Another number in one of them, and the loss is asked again."""

    def loss(batch: Batch) -> Tensor:
        return plain(batch) * float(getattr(batch, column).sum())

    here = random_batch(M)
    x = getattr(here, column)
    there = replace(here, **{column: 1 - x if column == "mask" else x + 1})
    found, _ = asked(loss, here, there)
    for c, batch in zip(found, (here, there), strict=True):
        torch.testing.assert_close(c, batch_by_batch(loss, batch), rtol=1e-12, atol=1e-14)
    assert not torch.allclose(found[0], found[1])


@pytest.mark.parametrize("change", [{"discount": 0.5}, {"kl_coefficient": 0.3}, {"discount_clock": "action"}])
def test_the_settings_of_a_batch_count(change: dict[str, object]) -> None:
    def loss(batch: Batch) -> Tensor:
        return plain(batch) * (batch.discount + batch.kl_coefficient + (batch.discount_clock == "action"))

    here = random_batch(M)
    found, _ = asked(loss, here, replace(here, **change))  # type: ignore[arg-type]
    assert not torch.allclose(found[0], found[1])
    torch.testing.assert_close(found[1], batch_by_batch(loss, replace(here, **change)), rtol=1e-12, atol=1e-14)  # type: ignore[arg-type]


def test_state_is_found_out_though_the_loss_is_remembered() -> None:
    calls: list[int] = []
    from_when = 10**9

    def loss(batch: Batch) -> Tensor:
        calls.append(1)
        return plain(batch) * (1.0 + 0.1 * max(0, len(calls) - from_when))

    estimator, problem = from_loss(loss), dialogue(groups=1, group_size=2)
    exact_moments([estimator], problem)
    from_when = len(calls)
    with pytest.raises(EstimatorError, match="keeps state"):
        exact_moments([estimator], problem)


OPERATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sums": lambda x: (x.sum(0) - x.sum(-1, keepdim=True).mean() + x[0] * 2).sum(),
    "places": lambda x: x[[0, 2]].sum() + x[torch.tensor([1, 3]), 2].sum() - 3 * x[1:, 0].mean() + x[:, -1][0],
    "masks": lambda x: x[torch.arange(12).view(4, 3) % 2 == 0].sum() + x.masked_fill(torch.arange(3) > 1, 1.0)[1].sum(),
    "where": lambda x: torch.where(torch.arange(3) > 0, x, -x).sum() + torch.where(torch.arange(3) > 1, 2.0, x[0]).sum(),
    "shapes": lambda x: x.reshape(2, 6)[1, 2] + x.view(-1)[3] - x.flatten()[4],
    "dot": lambda x: torch.dot(x[0], torch.tensor([1.0, 2.0, 3.0], dtype=x.dtype)) + (1 - x[1]).sum() / 3,
    "broadcast": lambda x: (x.unsqueeze(-1) * torch.arange(2.0, dtype=x.dtype) + torch.ones(5, 1, 1, 1, dtype=x.dtype)).sum(),
    "lists": lambda x: torch.stack([x[0, 0], torch.ones((), dtype=x.dtype), x[1, 2]]).sum() + sum(row.sum() for row in x),
    "lengths": lambda x: sum((x[i, t] for i in range(len(x)) for t in range(x.shape[1])), -x[0, 0]) / x.numel(),
}  # fmt: skip


@pytest.mark.parametrize("name", OPERATIONS)
def test_weights_are_those_of_autograd(name: str) -> None:
    g = torch.Generator().manual_seed(3)
    x = torch.randn(4, 3, generator=g, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(OPERATIONS[name](x), x)
    run = Run([0.0] * 12)
    out = OPERATIONS[name](Unknowns(run, x.shape)["logp"])
    assert isinstance(out, Unknown)
    torch.testing.assert_close(-run.coefficients(out).view(4, 3), expected, rtol=1e-14, atol=1e-15)


def test_a_difference_has_its_value() -> None:
    d = torch.randn(4, 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    both = Unknowns(Run(d.flatten().tolist()), d.shape)
    p, q = both["logp"], both["behavior_logp"]
    for x, value in ((2 * (p - q) + 1, 2 * d + 1), (p.detach() - q, d), (p - p.detach(), 0 * d)):
        torch.testing.assert_close(torch.tensor(x.tolist(), dtype=x.dtype), value, rtol=1e-15, atol=0)
    assert (p - q).requires_grad
    assert not (p.detach() - q).requires_grad
    for y in (p, q, p + q, p - 2 * q, p[0] - q[1]):
        with pytest.raises(NotLinearError):
            y.tolist()
