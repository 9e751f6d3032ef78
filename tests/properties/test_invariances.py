"""What a correct loss does not notice, on random batches: padding, the order of rows, the names of groups, a shift."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pgcheck import Problem, strategies
from pgcheck.batch import Batch
from pgcheck.estimators.base import Estimator, registered_estimators
from pgcheck.estimators.lookup import FILLED_BY  # noqa: F401  (fills the registries)

ZOO = [e for e in registered_estimators().values() if e.leaf == "logp"]
each = pytest.mark.parametrize("estimator", ZOO, ids=[e.name for e in ZOO])
few = settings(max_examples=4)


def drawn(data: st.DataObject, estimator: Estimator, **bounds: object) -> tuple[Problem, Batch]:
    asked = {**strategies.bounds_for(estimator), "max_rollouts": 8, **bounds}
    problem = data.draw(strategies.problems(**asked))
    return problem, data.draw(strategies.batches(problem, needs=estimator.needs))


def acting(estimator: Estimator, batch: Batch) -> Tensor:
    """Coefficients of the policy's own positions."""
    return torch.where(batch.mask > 0, estimator.coefficients(batch), 0.0)


def same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-10 * max(1.0, float(b.abs().max())))


@each
@few
@given(data=st.data(), junk=st.sampled_from([-7.0, -0.5]))
def test_what_stands_on_masked_positions(data: st.DataObject, estimator: Estimator, junk: float) -> None:
    _, batch = drawn(data, estimator, terminal=True)
    outside = batch.mask == 0
    changed = {
        name: torch.where(outside, junk * (i + 1), getattr(batch, name))
        for i, name in enumerate(("logp", "behavior_logp", "ref_logp"))
    }
    ids = {name: torch.where(outside, 0, getattr(batch, name)) for name in ("state", "context", "action")}
    same(acting(estimator, batch.with_tensors(changed | ids)), acting(estimator, batch))


@each
@few
@given(data=st.data(), more=st.integers(1, 3))
def test_more_padding(data: st.DataObject, estimator: Estimator, more: int) -> None:
    _, batch = drawn(data, estimator)
    T = batch.reward.shape[-1]
    longer = {}
    for name, x in batch.tensors().items():
        if name == "group" or x.dim() < 2 or x.shape[-1] not in (T, T + 1):
            continue
        fill = -1 if x.dtype == torch.int64 else 0
        longer[name] = torch.nn.functional.pad(x, (0, more), value=fill)
    same(acting(estimator, batch.with_tensors(longer))[..., :T], acting(estimator, batch))


@each
@few
@given(data=st.data())
def test_the_order_of_rows(data: st.DataObject, estimator: Estimator) -> None:
    """Any order at all: rows carry the label of their group with them."""
    problem, batch = drawn(data, estimator, min_rows=2)
    order = torch.tensor(data.draw(st.permutations(range(problem.rows))))
    shuffled = batch.with_tensors({name: x[order] for name, x in batch.tensors().items()})
    same(acting(estimator, shuffled), acting(estimator, batch)[order])


@each
@few
@given(data=st.data())
def test_the_names_of_groups(data: st.DataObject, estimator: Estimator) -> None:
    problem, batch = drawn(data, estimator)
    names = torch.tensor(data.draw(st.permutations(range(-3, problem.groups + 2))))
    same(acting(estimator, replace(batch, group=names[batch.group])), acting(estimator, batch))


SHIFTED = [e for e in ZOO if e.shift_invariant]


@pytest.mark.parametrize("estimator", SHIFTED, ids=[e.name for e in SHIFTED])
@settings(max_examples=10)
@given(data=st.data(), shift=st.sampled_from([0.75, -3.0]))
def test_the_same_shift_of_all_returns(data: st.DataObject, estimator: Estimator, shift: float) -> None:
    _, batch = drawn(data, estimator, min_rows=2, min_group_size=max(2, estimator.min_group_size))
    extra = torch.zeros_like(batch.reward)
    extra[..., 0] = shift
    shifted = replace(batch, reward=batch.reward + extra, value=batch.value + torch.nn.functional.pad(extra, (0, 1)))
    same(acting(estimator, shifted), acting(estimator, batch))


LIMITS = [e for e in ZOO if e.on_policy_limit]


@pytest.mark.parametrize("estimator", LIMITS, ids=[e.name for e in LIMITS])
@settings(max_examples=10)
@given(data=st.data())
def test_the_on_policy_limit(data: st.DataObject, estimator: Estimator) -> None:
    limit = registered_estimators()[str(estimator.on_policy_limit)]
    _, batch = drawn(data, estimator, off_policy=False)
    same(acting(estimator, batch), acting(limit, batch))
