"""`Batch` helpers against plain loops, alone and under `torch.func.vmap`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pgcheck.batch import DISCOUNT_CLOCKS, Batch, LogitsNotAsked
from tests.worlds import random_world

HELPERS = ("clock", "discount_weight", "episode_return", "reward_to_go", "length", "ratio", "same_group")


def make(seed: int, shape: tuple[int, ...], discount: float, clock: str) -> Batch:
    """A batch of the given leading dimensions, rows and positions with numbers drawn from `seed`."""
    rng = Random(seed)

    def draw(fn: Callable[[], float], *size: int) -> Tensor:
        count = int(torch.tensor(size).prod())
        return torch.tensor([fn() for _ in range(count)], dtype=torch.float64).reshape(size)

    mask = draw(lambda: float(rng.random() < 0.6), *shape)
    acts = mask > 0
    minus = torch.full(shape, -1, dtype=torch.int64)

    def index() -> Tensor:
        return torch.where(acts, draw(lambda: rng.randrange(3), *shape).long(), minus)

    return Batch(
        state=index(),
        context=index(),
        action=index(),
        reward=draw(lambda: rng.uniform(-2, 2), *shape),
        mask=mask,
        logp=draw(lambda: -rng.random(), *shape) * mask,
        behavior_logp=draw(lambda: -rng.random(), *shape) * mask,
        ref_logp=draw(lambda: -rng.random(), *shape) * mask,
        value=draw(lambda: rng.uniform(-2, 2), *shape[:-1], shape[-1] + 1),
        group=draw(lambda: rng.randrange(-2, 3), *shape[:-1]).long(),
        discount=discount,
        discount_clock=clock,  # type: ignore[arg-type]
        side={"table": draw(rng.random, *shape)},
    )


def batches() -> st.SearchStrategy[Batch]:
    """Any leading dimensions, γ and clock."""
    lead = st.sampled_from([(), (2,), (2, 3)])
    rows, steps = st.integers(1, 4), st.integers(1, 5)
    shapes = st.tuples(lead, rows, steps).map(lambda x: (*x[0], x[1], x[2]))
    discounts = st.sampled_from([0.0, 0.5, 0.9, 1.0])
    return st.builds(make, st.integers(0, 10**6), shapes, discounts, st.sampled_from(DISCOUNT_CLOCKS))


# -- the helpers as loops over one row of plain floats


def clock_of(mask: list[float], clock: str) -> list[int]:
    if clock == "position":
        return list(range(len(mask)))
    out, acted = [], 0
    for m in mask:
        acted += int(m)
        out.append(max(acted - 1, 0))
    return out


def flat(x: Tensor) -> Any:
    """All rows, one after another: `[rows, ...]` as nested lists."""
    return x.reshape(-1, x.shape[-1]).tolist()


@given(batches())
def test_clock(batch: Batch) -> None:
    """t itself, or the number of acts up to and including t less one."""
    assert batch.clock.shape == batch.reward.shape
    for mask, found in zip(flat(batch.mask), flat(batch.clock), strict=True):
        assert found == clock_of(mask, batch.discount_clock)


@given(batches())
def test_sums_of_rewards(batch: Batch) -> None:
    """γ^t, R = Σ γ^t r_t and Ĝ_t = Σ_{k≥t} γ^{k−t} r_k, each written out; 0⁰ = 1."""
    gamma = batch.discount
    returns, lengths = batch.episode_return.reshape(-1).tolist(), batch.length.reshape(-1).tolist()
    assert batch.episode_return.shape == batch.length.shape == batch.reward.shape[:-1]
    for i, (mask, reward) in enumerate(zip(flat(batch.mask), flat(batch.reward), strict=True)):
        e = clock_of(mask, batch.discount_clock)
        steps = range(len(reward))
        assert flat(batch.discount_weight)[i] == pytest.approx([gamma ** e[t] for t in steps], abs=1e-14)
        assert returns[i] == pytest.approx(sum(gamma ** e[t] * reward[t] for t in steps), abs=1e-13)
        to_go = [sum(gamma ** (e[k] - e[t]) * reward[k] for k in steps if k >= t) for t in steps]
        assert flat(batch.reward_to_go)[i] == pytest.approx(to_go, abs=1e-13)
        assert lengths[i] == sum(mask)


@given(batches())
def test_the_return_is_what_is_to_go_at_the_start(batch: Batch) -> None:
    """The clock starts at 0, so R = Ĝ_0."""
    torch.testing.assert_close(batch.episode_return, batch.reward_to_go[..., 0], rtol=0, atol=1e-13)


@given(batches())
def test_same_group(batch: Batch) -> None:
    """1 where labels are equal, whatever the labels."""
    B = batch.rows
    assert batch.same_group.shape == (*batch.reward.shape[:-2], B, B)
    for labels, found in zip(flat(batch.group), batch.same_group.reshape(-1, B, B).tolist(), strict=True):
        assert found == [[float(i == j) for j in labels] for i in labels]


@given(batches())
def test_helpers_under_vmap(batch: Batch) -> None:
    """vmap over the leading dimensions gives what broadcasting gives."""
    many = batch.map(lambda x: torch.stack([x, x.flip(0)]))

    def helpers(tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
        one = batch.with_tensors(tensors)
        return tuple(getattr(one, name) for name in HELPERS)

    for name, found in zip(HELPERS, torch.func.vmap(helpers)(many.tensors()), strict=True):
        torch.testing.assert_close(found, getattr(many, name), rtol=0, atol=1e-14)


@given(batches())
def test_ratio(batch: Batch) -> None:
    """π/π_old where the policy acts, else 1; ∂ratio/∂log π = ratio · mask."""
    rows = zip(flat(batch.ratio), flat(batch.logp), flat(batch.behavior_logp), flat(batch.mask), strict=True)
    for found, logp, old, mask in rows:
        expected = [math.exp(x) / math.exp(y) if acts else 1.0 for x, y, acts in zip(logp, old, mask, strict=True)]
        assert found == pytest.approx(expected, rel=1e-14)
    leaf = batch.logp.clone().requires_grad_(True)
    (slope,) = torch.autograd.grad(replace(batch, logp=leaf).ratio.sum(), leaf)
    torch.testing.assert_close(slope, batch.ratio * batch.mask, rtol=1e-14, atol=0)


@given(batches(), st.integers(0, 10**6))
def test_a_gathered_batch_is_the_batch_of_its_rows(batch: Batch, seed: int) -> None:
    """What is gathered, and what each row has by itself, is what the gathered tensors give; so is what replaces them."""
    if batch.reward.dim() > 2:
        batch = batch.map(lambda x: x[(0,) * (batch.reward.dim() - 2)])
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(batch.rows, (4, 3), generator=generator)
    labels = torch.tensor([0, 1, 0])
    gathered = Batch.gathered(batch, index, labels)
    for name, x in batch.tensors().items():
        if name != "group":
            assert torch.equal(gathered.tensors()[name], x[index])
    plain = Batch.gathered(batch, index, labels).map(torch.clone)
    for name in HELPERS:
        torch.testing.assert_close(getattr(gathered, name), getattr(plain, name), rtol=0, atol=1e-14)
    doubled = replace(gathered, reward=2 * gathered.reward)
    torch.testing.assert_close(doubled.episode_return, 2 * plain.episode_return, rtol=0, atol=1e-14)


@given(batches())
def test_helpers_are_differentiable_in_the_rewards(batch: Batch) -> None:
    """∂R/∂r_t = γ^t, and under vmap∘grad too; no data-dependent control flow."""

    def total(reward: Tensor) -> Tensor:
        return replace(batch, reward=reward).episode_return.sum()

    (by_autograd,) = torch.autograd.grad(total(leaf := batch.reward.clone().requires_grad_(True)), leaf)
    torch.testing.assert_close(by_autograd, batch.discount_weight, rtol=0, atol=1e-14)
    stacked = torch.stack([batch.reward, 2 * batch.reward])
    found = torch.func.vmap(torch.func.grad(total))(stacked)
    torch.testing.assert_close(found[1], batch.discount_weight, rtol=0, atol=1e-14)


@pytest.mark.parametrize("clock", DISCOUNT_CLOCKS)
def test_gamma_zero_by_hand(clock: str) -> None:
    """act, observe, act paying 1, 2, 4 at γ = 0: by position Ĝ = (1, 2, 4); by action (1 + 2, 2, 4), since 0⁰ = 1."""
    batch = replace(
        make(0, (1, 3), 0.0, clock),
        reward=torch.tensor([[1.0, 2.0, 4.0]], dtype=torch.float64),
        mask=torch.tensor([[1.0, 0.0, 1.0]], dtype=torch.float64),
    )
    first = 1.0 if clock == "position" else 3.0
    assert batch.reward_to_go.tolist() == [[first, 2.0, 4.0]]
    assert batch.episode_return.tolist() == [first]


def test_an_opening_observation_does_not_run_the_action_clock() -> None:
    """observe, act, act: exponents 0, 0, 1 by action and 0, 1, 2 by position."""
    mask = torch.tensor([[0.0, 1.0, 1.0]], dtype=torch.float64)
    by = {clock: replace(make(0, (1, 3), 0.5, clock), mask=mask).clock.tolist() for clock in DISCOUNT_CLOCKS}
    assert by == {"action": [[0.0, 0.0, 1.0]], "position": [[0.0, 1.0, 2.0]]}


def test_float32_stays_float32() -> None:
    """Helpers do not change the precision."""
    batch = make(1, (2, 3), 0.9, "action").map(lambda x: x.float() if x.is_floating_point() else x)
    assert {getattr(batch, name).dtype for name in HELPERS} == {torch.float32}


def test_logits_only_when_asked_for() -> None:
    """An estimator with `leaf="logp"` that reads the logits is told how to get them."""
    batch = make(1, (2, 3), 0.9, "position")
    with pytest.raises(LogitsNotAsked, match=r'leaf="logits"'):
        _ = batch.logits
    logits = torch.zeros(2, 3, 4, dtype=torch.float64)
    assert replace(batch, action_logits=logits).logits is logits


def test_map_touches_every_tensor() -> None:
    """Fields and side tables; the original keeps its own."""
    batch = make(1, (2, 3), 0.9, "position")
    mapped = batch.map(lambda x: x + 1)
    assert set(mapped.tensors()) == set(batch.tensors())
    assert "side.table" in batch.tensors()
    for name, x in batch.tensors().items():
        assert torch.equal(mapped.tensors()[name], x + 1)
    assert (mapped.discount, mapped.discount_clock) == (0.9, "position")


def test_with_tensors_is_the_inverse_of_tensors() -> None:
    """`b.with_tensors(b.tensors())` is b; a part replaces that part; helpers are computed anew."""
    batch = make(1, (2, 3), 0.9, "position")
    before = batch.episode_return
    for name, x in batch.with_tensors(batch.tensors()).tensors().items():
        assert x is batch.tensors()[name]
    doubled = batch.with_tensors({"reward": 2 * batch.reward, "side.table": batch.mask})
    torch.testing.assert_close(doubled.episode_return, 2 * before, rtol=0, atol=1e-14)
    assert doubled.side["table"] is batch.mask
    assert doubled.logp is batch.logp


@pytest.mark.parametrize("clock", DISCOUNT_CLOCKS)
def test_no_batches_are_some(clock: str) -> None:
    """Of none of them each helper has none, in its shape."""
    some, none = (make(0, (n, 3, 4), 0.9, clock) for n in (1, 0))
    for name in HELPERS:
        assert getattr(none, name).shape == (0, *getattr(some, name).shape[1:]), name


def test_rows_and_leading_dimensions() -> None:
    """B is the last dimension but one of the rewards."""
    assert make(1, (2, 3), 0.9, "position").rows == 2
    assert make(1, (7, 5, 2, 3), 0.9, "position").rows == 2


@pytest.mark.parametrize("clock", DISCOUNT_CLOCKS)
def test_a_table_of_rollouts_as_a_batch(clock: str) -> None:
    """Ĝ of every row equals the tree's, E R equals J."""
    problem = random_world(8, clock=clock).problem()
    table = problem.trajectories
    weight = table.probability * table.paths.start_probability[table.paths.start]
    found = float((weight * table.rows_as_batch().episode_return).sum())
    assert found == pytest.approx(problem.value("dynamic_programming"), abs=1e-13)


@given(st.integers(0, 2**16), st.sampled_from(DISCOUNT_CLOCKS), st.booleans())
def test_one_by_one_is_each_batch_of_a_block(seed: int, clock: str, made_before: bool) -> None:
    """Every column, helper and side table, whether or not the block had made it already; `ratio` follows the leaf."""
    block = make(seed, (3, 2, 4), 0.9, clock)
    if made_before:
        for name in HELPERS:
            getattr(block, name)
    leaf = (block.logp * 0.5).requires_grad_(True)
    parts = list(block.one_by_one(logp=leaf))
    assert len(parts) == 3
    for m, found in enumerate(parts):
        expected = replace(block.map(lambda x, m=m: x[m]), logp=leaf[m].detach())  # type: ignore[misc]
        for name in (*expected.tensors(), *HELPERS):
            a, b = (x.side["table"] if name == "side.table" else getattr(x, name).detach() for x in (found, expected))
            assert torch.equal(a, b), name
        assert (found.discount, found.discount_clock) == (block.discount, block.discount_clock)
        with pytest.raises(LogitsNotAsked):
            found.logits  # noqa: B018
        with pytest.raises(AttributeError, match="has no attribute 'rewards'"):
            found.rewards  # noqa: B018
    total = torch.stack([part.ratio.sum() for part in parts]).sum()
    (gradient,) = torch.autograd.grad(total, leaf)
    torch.testing.assert_close(gradient, ((leaf - block.behavior_logp) * block.mask).exp().detach() * block.mask)
