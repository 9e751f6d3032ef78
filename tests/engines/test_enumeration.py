"""Multisets, their weights, and batches made of them."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch

from pgcheck.engines.enumeration import (
    Batches,
    arrangements,
    count_multisets,
    every_multiset,
    unrank_multisets,
    unrank_tuples,
)
from pgcheck.problem import Problem
from tests.engines.oracle import bandit, dialogue, every_batch, rollout_chances, walk

PAIRS = [(1, 1), (1, 4), (2, 1), (2, 5), (3, 3), (5, 2), (6, 4)]


@pytest.mark.parametrize(("n", "size"), PAIRS)
def test_multisets_are_those_of_itertools(n: int, size: int) -> None:
    """Ranks 0 … C(n+k−1, k) − 1 give every non-decreasing row exactly once."""
    count = count_multisets(n, size)
    assert count == math.comb(n + size - 1, size)
    rows = [tuple(row) for row in unrank_multisets(np.arange(count), n, size).tolist()]
    assert all(list(row) == sorted(row) for row in rows)
    assert len(set(rows)) == count
    assert sorted(rows) == list(itertools.combinations_with_replacement(range(n), size))


@pytest.mark.parametrize(("n", "size"), PAIRS)
def test_tuples_are_those_of_itertools(n: int, size: int) -> None:
    """Ranks 0 … n^k − 1 count in base n, first element slowest."""
    rows = unrank_tuples(np.arange(n**size), n, size).tolist()
    assert [tuple(row) for row in rows] == list(itertools.product(range(n), repeat=size))


@pytest.mark.parametrize(("n", "size"), PAIRS)
def test_arrangements_count_the_orderings(n: int, size: int) -> None:
    """k!/Π m_j! orderings of each multiset; they add up to the n^k tuples."""
    rows = unrank_multisets(np.arange(count_multisets(n, size)), n, size)
    ways = arrangements(rows)
    for row, found in zip(rows.tolist(), ways.tolist(), strict=True):
        expected = math.factorial(size) / math.prod(math.factorial(m) for m in Counter(row).values())
        assert found == pytest.approx(expected, rel=1e-14)
    assert ways.sum() == pytest.approx(n**size, rel=1e-14)


@pytest.mark.parametrize(("n", "size"), [*PAIRS, (0, 2), (7, 1)])
def test_all_at_once_they_are_in_the_order_of_their_ranks(n: int, size: int) -> None:
    """Row by row what unranking gives, with k!/Π m_j! · Π p."""
    p = np.random.Generator(np.random.Philox(1)).random(n)
    rows, weight = every_multiset(p, size)
    np.testing.assert_array_equal(rows, unrank_multisets(np.arange(count_multisets(n, size) if n else 0), n, size))
    for row, found in zip(rows.tolist(), weight.tolist(), strict=True):
        ways = math.factorial(size) / math.prod(math.factorial(m) for m in Counter(row).values())
        assert found == pytest.approx(ways * math.prod(p[i] for i in row), rel=1e-14)


def test_a_rank_can_be_unranked_alone() -> None:
    """Any block without the ones before it, up to the last of C(40, 12) = 5.6e9 multisets."""
    n, size = 29, 12
    last = math.comb(40, 12) - 1
    np.testing.assert_array_equal(unrank_multisets(np.array([0, last]), n, size), [[0] * size, [n - 1] * size])
    ranks = np.array([17, last // 3, last - 5])
    together = unrank_multisets(ranks, n, size)
    for rank, row in zip(ranks, together, strict=True):
        np.testing.assert_array_equal(unrank_multisets(np.array([rank]), n, size)[0], row)
        # and back: rank = Σ_i C(row_i + i, i + 1)
        assert sum(math.comb(int(c) + i, i + 1) for i, c in enumerate(row)) == rank


SIZES = [(1,), (3,), (2, 2), (1, 1, 1), (2, 1), (1, 2, 1), (3, 2)]


def _count(members: list[int], sizes: tuple[int, ...], ordered: bool) -> int:
    """Per group Σ_s C(n_s+G−1, G); groups of equal size form multisets again, and distinct sizes multiply."""
    total = 1
    for size, groups in Counter(sizes).items():
        outcomes = sum(n**size if ordered else math.comb(n + size - 1, size) for n in members)
        total *= outcomes**groups if ordered else math.comb(outcomes + groups - 1, groups)
    return total


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("sizes", SIZES)
def test_batches_are_counted_before_they_are_made(sizes: tuple[int, ...], ordered: bool) -> None:
    problem = dialogue(groups=len(sizes), group_size=sizes)
    batches = Batches(problem.trajectories, sizes, ordered)
    assert batches.count == _count([3, 3], sizes, ordered)
    made = torch.cat([rows for rows, _ in batches.blocks(100)])
    assert made.shape == (batches.count, sum(sizes))
    assert len({tuple(row) for row in made.tolist()}) == batches.count


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("sizes", SIZES)
def test_weights_are_a_probability_distribution(sizes: tuple[int, ...], ordered: bool) -> None:
    """Σ weight = 1, off-policy as well: batches are drawn by the behaviour policy."""
    behavior = [[-0.1, 0.2], [0.3, 0.1], [0.5, -0.2]]
    problem = dialogue(groups=len(sizes), group_size=sizes, behavior_logits=behavior)
    total = sum(float(w.sum()) for _, w in Batches(problem.trajectories, sizes, ordered).blocks(64))
    assert total == pytest.approx(1.0, abs=1e-14)


def _law(problem: Problem, sizes: tuple[int, ...]) -> Counter[tuple[tuple[int, ...], ...]]:
    """Probability of each batch up to the order of rows in a group and of groups of one size."""
    table, rows_of = problem.trajectories, {}
    for n in range(len(table)):
        rows_of[tuple(table.paths.state[n].tolist()), tuple(table.paths.action[n].tolist())] = n
    law: Counter[tuple[tuple[int, ...], ...]] = Counter()
    for batch, p in every_batch(table, sizes, rollout_chances(problem)):
        found = [rows_of[tuple(s), tuple(a)] for s, a in zip(batch.state.tolist(), batch.action.tolist(), strict=True)]
        law[_canonical(found, sizes)] += p  # type: ignore[assignment]
    return law


def _canonical(rows: list[int], sizes: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    groups, low = [], 0
    for size in sizes:
        groups.append(tuple(sorted(rows[low : low + size])))
        low += size
    return tuple(sorted(groups, key=lambda g: (len(g), g)))


@pytest.mark.parametrize("sizes", [(3,), (2, 2), (2, 1), (1, 1, 1)])
def test_each_batch_has_its_own_probability(sizes: tuple[int, ...]) -> None:
    """Multiset by multiset, the weight is the sum over the ordered tuples that make it."""
    problem = dialogue(groups=len(sizes), group_size=sizes)
    expected = _law(problem, sizes)
    index, weight = next(Batches(problem.trajectories, sizes).blocks(10**6))
    assert len(index) == len(expected)
    for rows, p in zip(index.tolist(), weight.tolist(), strict=True):
        assert p == pytest.approx(expected[_canonical(rows, sizes)], abs=1e-15)


@pytest.mark.parametrize("size", [1, 7, 64, 10**6])
def test_blocks_of_any_size_are_the_same_list(size: int) -> None:
    """Slicing does not change what is enumerated: rows and weights are those of one big block."""
    sizes = (2, 1, 2)
    batches = Batches(dialogue(groups=3, group_size=sizes).trajectories, sizes)
    parts = list(batches.blocks(size))
    whole = batches.block(np.arange(batches.count))
    assert all(len(rows) <= size for rows, _ in parts)
    assert torch.equal(torch.cat([rows for rows, _ in parts]), whole[0])
    assert torch.equal(torch.cat([w for _, w in parts]), whole[1])


def test_rows_of_a_group_share_their_start() -> None:
    sizes = (2, 3)
    table = dialogue(groups=2, group_size=sizes).trajectories
    for rows, _ in Batches(table, sizes).blocks(1000):
        start = table.paths.start[rows]
        assert bool((start[:, :2] == start[:, :1]).all())
        assert bool((start[:, 2:] == start[:, 2:3]).all())


def test_what_cannot_happen_is_left_out() -> None:
    """Rollouts of behaviour probability 0 and starts of probability 0 are no members."""
    problem = bandit([1.0, 0.0, 2.0], [0.0, 0.1, 0.2], behavior_logits=[[0.0, -math.inf, 0.0]], group_size=2)
    index, weight = next(Batches(problem.trajectories, (2,)).blocks(100))
    assert sorted(tuple(row) for row in index.tolist()) == [(0, 0), (0, 2), (2, 2)]
    assert float(weight.sum()) == pytest.approx(1.0, abs=1e-15)
    assert set(Batches(problem.trajectories, (2,)).random(50, seed=0).flatten().tolist()) == {0, 2}


def test_random_batches_respect_the_starts() -> None:
    """Rows of a group share a start, every start and every rollout of it comes, and the seed decides all."""
    sizes = (3, 2)
    table = dialogue(groups=2, group_size=sizes).trajectories
    batches = Batches(table, sizes)
    drawn = batches.random(400, seed=5)
    assert drawn.shape == (400, 5)
    start = table.paths.start[drawn]
    assert bool((start[:, :3] == start[:, :1]).all())
    assert bool((start[:, 3:] == start[:, 3:4]).all())
    assert bool((start[:, 0] != start[:, 3]).any())
    assert set(drawn.flatten().tolist()) == set(range(6))
    assert torch.equal(drawn, batches.random(400, seed=5))
    assert not torch.equal(drawn, batches.random(400, seed=6))


def test_random_leaves_global_generators_alone() -> None:
    state, torch_state = np.random.get_state()[1].copy(), torch.get_rng_state()
    Batches(walk().trajectories, (2,)).random(10, seed=0)
    assert np.array_equal(np.random.get_state()[1], state)
    assert torch.equal(torch.get_rng_state(), torch_state)
