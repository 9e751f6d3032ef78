"""Numbered draws: the same however they are asked for, and of the right law."""

import bisect
import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from scipy import stats

import pgcheck
from pgcheck.engines.enumeration import Batches
from pgcheck.estimators.lookup import FILLED_BY  # noqa: F401  (fills the registries)
from pgcheck.registry import find_problem, registered_problems
from pgcheck.sampling import Laws, Stream

BACKWARDS = torch.arange(9, -1, -1)  # of the ten rollouts of mdp/two-state
FALSE_ALARM = 1e-9  # of each statistical test below; about a hundred of them, with fixed seeds


@pytest.mark.parametrize("width", [1, 3, 4, 5, 8, 13])
def test_uniforms_belong_to_their_draw(width):
    stream = Stream(3, ("somewhere",))
    whole = stream.uniforms(0, 50, width)
    parts = [stream.uniforms(first, count, width) for first, count in [(0, 1), (1, 7), (8, 30), (38, 12)]]
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(stream.uniforms(41, 1, width)[0], whole[41])


def test_streams_of_other_names_and_seeds_differ():
    drawn = [Stream(s, n).uniforms(0, 4, 4) for s, n in [(0, ("a",)), (1, ("a",)), (0, ("b",)), (0, ("a", "b"))]]
    assert len({tuple(x.flatten().tolist()) for x in drawn}) == 4


def test_uniforms_are_those_of_numpy():
    stream = Stream(3, ("somewhere",))
    numpy = np.random.Generator(np.random.Philox(key=stream._key, counter=2 * 7)).random((5, 8))
    assert torch.equal(stream.uniforms(7, 5, 6), torch.from_numpy(numpy)[:, :6])


def test_uniforms_are_uniform():
    u = Stream(0, ("x",)).uniforms(0, 20_000, 3).numpy()
    assert u.min() >= 0.0
    assert u.max() < 1.0
    for column in u.T:
        assert stats.kstest(column, "uniform").pvalue > FALSE_ALARM
    assert abs(np.corrcoef(u.T) - np.eye(3)).max() < 6.5 / np.sqrt(20_000)


@pytest.mark.parametrize("name", registered_problems())
def test_rollouts_come_with_their_probability(name):
    problem = find_problem(name)
    draws = 4_000
    table, index = problem.sampler(seed=1).draw(0, draws)
    q = table.paths.start_probability[table.paths.start] * table.behavior_probability
    seen = torch.bincount(index[:, 0], minlength=len(table)).numpy()  # rows of one column are independent
    assert_as_often(seen, q.numpy(), draws)


def assert_as_often(seen, chance, draws):
    """Counts of independent draws against their probabilities."""
    expected = chance * draws
    assert not seen[expected == 0].any()
    rare = expected < 5  # their cells are put together
    seen, expected = (np.append(x[~rare], x[rare].sum()) for x in (seen, expected))
    keep = expected > 0
    if keep.sum() > 1:
        assert stats.chisquare(seen[keep], expected[keep] * (draws / expected[keep].sum())).pvalue > FALSE_ALARM


@pytest.mark.parametrize("name", ["off-policy/contextual-drifted", "dialogue/two-turn", "lm/parity"])
def test_whole_batches_come_with_their_probability(name):
    """Rows of a group share a start, groups do not: against the enumeration of all batches, as multisets."""
    problem = find_problem(name).with_sampling(groups=2, group_size=2)
    batches = Batches(problem.trajectories, problem.sizes)
    chance: dict[tuple[int, ...], float] = {}
    starts = problem.trajectories.paths.start
    for rows, p in batches.blocks(10_000):
        for key, q in zip((starts[rows]).sort(-1).values.tolist(), p.tolist(), strict=True):
            chance[tuple(key)] = chance.get(tuple(key), 0.0) + q
    _, index = problem.sampler(seed=2).draw(0, 20_000)
    seen: dict[tuple[int, ...], int] = {}
    for key in starts[index].sort(-1).values.tolist():
        seen[tuple(key)] = seen.get(tuple(key), 0) + 1
    keys = sorted(chance)
    assert set(seen) <= set(keys)
    if len(keys) > 1:
        observed = [seen.get(k, 0) for k in keys]
        assert stats.chisquare(observed, [chance[k] * 20_000 for k in keys]).pvalue > FALSE_ALARM


def test_sample_is_a_batch_that_does_not_depend_on_the_asking():
    problem = find_problem("dialogue/two-turn")
    whole = problem.sample(12, seed=4)
    assert whole.reward.shape == (12, problem.rows, problem.trajectories.paths.steps)
    later = problem.sample(5, seed=4, first=7)
    for name, x in later.tensors().items():
        assert torch.equal(x, whole.tensors()[name][7:]), name
    assert not torch.equal(problem.sample(12, seed=5).action, whole.action)


@pytest.mark.parametrize("name", ["mdp/two-state", "mdp/two-state-0.9", "dialogue/unequal-groups", "sampled/groups-16"])
def test_auxiliary_draws_leave_the_rollouts_as_they_are(name):
    """Estimators with other needs see the same rollouts: common random numbers; whether or not a number gives several rows."""
    problem = find_problem(name)
    plain, split = (problem.sampler(needs=pgcheck.as_estimator(e).needs).draw(7, 500) for e in ("grpo", "vineppo"))
    assert len(split[0]) > len(plain[0])
    for column in ("start", "state", "action", "reward"):
        here, there = (getattr(table.paths, column)[index] for table, index in (plain, split))
        assert torch.equal(here, there), column


def test_a_side_table_in_another_order_leaves_them_as_well():
    """As many rows, none split."""
    problem = find_problem("mdp/two-state")
    plain, moved = (problem.sampler(needs=needs).draw(0, 500) for needs in ((), (lambda table: table.take(BACKWARDS),)))
    assert not torch.equal(plain[1], moved[1])
    for column in ("start", "state", "action", "reward"):
        here, there = (getattr(table.paths, column)[index] for table, index in (plain, moved))
        assert torch.equal(here, there), column


def test_auxiliary_draws_come_with_their_probability():
    """Also given the rollout, and independent from row to row."""
    problem, draws = find_problem("mdp/two-state"), 20_000
    table, index = problem.sampler(seed=5, needs=pgcheck.as_estimator("vineppo").needs).draw(0, draws)
    chance = table.behavior_probability * table.paths.start_probability[table.paths.start]
    for row in range(problem.rows):
        assert_as_often(torch.bincount(index[:, row], minlength=len(table)).numpy(), chance.numpy(), draws)
    V = table.side["continuation_value"][index]  # [draws, B, T]
    start = table.paths.start[index[:, 0]]
    for first, second in itertools.combinations(range(problem.rows), 2):
        for s in start.unique().tolist():  # rows of a group share it, and nothing else
            x, y = (V[start == s][:, row, 0].numpy() for row in (first, second))
            assert stats.pearsonr(x, y).pvalue > FALSE_ALARM


def test_global_generators_are_left_alone():
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    find_problem("bandit/two-arm").sample(3)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])


@pytest.mark.parametrize("batches", [0, -1, 2.5, "3", True])
def test_a_number_of_batches_that_is_none_is_refused(batches):
    with pytest.raises(pgcheck.ProblemError, match="batches"):
        find_problem("bandit/two-arm").sample(batches)


def upto_of(weights: list[float]) -> list[float]:
    """P(outcome ≤ this), as it is summed up."""
    return [min(x, 1.0) for x in itertools.accumulate(weights)]


ADVERSE = {
    "a few": [[0.25, 0.5, 0.25], [1.0]],
    "alike": [[1 / 64] * 64, [1 / 128] * 128],
    "hardly anything before and after": [[2.0**-60] * 40 + [1.0 - 2.0**-40, 2.0**-41, 2.0**-41], [2.0**-300, 1.0]],
    "all in one cell": [[0.5, *[2.0**-52] * 1000, 0.5], [2.0**-30] * 100 + [1.0 - 100 * 2.0**-30]],
    "of no weight": [[0.0, 0.5, 0.0, 0.0, 0.5, 0.0], [0.0, 0.0, 1.0, 0.0]],
    "less than one": [[0.3, 0.3, 0.3999999], [0.1] * 9],
    "many rows": [[0.1, 0.2, 0.3, 0.15, 0.25]] * 3000,
}


@pytest.mark.parametrize("name", ADVERSE)
def test_a_guide_finds_what_bisection_finds(name):
    """At the edges of the unit interval, at and beside each boundary, at the edges of cells, and anywhere; in whole numbers."""
    upto = [upto_of(weights) for weights in ADVERSE[name]]
    last = list(itertools.accumulate(map(len, upto), initial=-1))[1:]
    outcome = np.random.default_rng(0).permutation(last[-1] + 1)
    laws = Laws(torch.tensor(np.concatenate(upto)), torch.from_numpy(outcome), torch.tensor(last))
    rng = np.random.default_rng(1)
    rows, ns, expected = [], [], []
    unseen = 2 ** max(0, len(last).bit_length() - 9)  # of 2^53 u, what is below the bits that are looked at
    for row in range(len(last))[:: max(1, len(last) // 50)]:
        ends = [int(Fraction(x) * 2**53) for x in upto[row]]
        n = [0, 1, 2**53 - 1, 2**53 - 2**8, *(i * 2**47 for i in range(64)), *rng.integers(0, 2**53, 100).tolist()]
        n += [x + i * unseen for x in ends for i in (-1, 0, 1)]
        n = [x for x in n if 0 <= x < 2**53]
        rows += [row] * len(n)
        ns += n
        bounds, seen = [Fraction(x) for x in upto[row]], [Fraction(x // unseen * unseen, 2**53) for x in n]
        entries = [bisect.bisect_right(bounds, u) for u in seen]
        expected += [outcome[min(last[row] - len(upto[row]) + 1 + i, last[row])] for i in entries]
    found = laws.draw(torch.tensor(rows), torch.tensor(ns))
    assert found.tolist() == expected
    assert set(expected) >= set(outcome[: last[0] + 1][np.array(ADVERSE[name][0]) >= 2.0**-7])
    few = laws._few is not None
    assert few == (name == "a few")
    wide = laws.draw(torch.tensor(rows[:1]).unsqueeze(1), torch.tensor([ns[:20]]))
    assert wide.tolist() == [expected[:20]]


@pytest.mark.parametrize(
    ("name", "k", "how"),
    [
        ("sampled/groups-16", 4, {}),
        ("sampled/groups-16", 3, {"groups": 3, "group_size": [3, 6, 9]}),
        ("sampled/groups-16", 1, {"groups": 3, "group_size": [3, 5, 6]}),
        ("dialogue/two-turn", 1, {"groups": 3, "group_size": [1, 2, 3]}),
        ("off-policy/contextual-drifted", 2, {"groups": 2, "group_size": 2}),
    ],
)
def test_one_number_gives_several_rows_of_a_group(name, k, how):
    """Against a walk through the tuples of rollouts of the group's start, the first row changing fastest."""
    problem = find_problem(name)
    sampler = (problem.with_sampling(**how) if how else problem).sampler(seed=4)
    table, index = sampler.draw(5, 40)
    labels = sampler.labels.tolist()
    groups, start, q = labels[-1] + 1, table.paths.start.tolist(), table.behavior_probability.tolist()
    u = sampler.stream.uniforms(5, 40, groups + len(labels) // k).tolist()
    starts = list(itertools.accumulate(table.paths.start_probability.tolist()))
    for drawn, rows in zip(u, index.tolist(), strict=True):
        of_group = [bisect.bisect_right(starts, x) for x in drawn[:groups]]
        for j, x in enumerate(drawn[groups:]):
            own = [i for i, s in enumerate(start) if s == of_group[labels[j * k]]]
            tuples = [t[::-1] for t in itertools.product(own, repeat=k)]
            upto = list(itertools.accumulate(math.prod(q[i] for i in t) for t in tuples))
            assert tuples[bisect.bisect_right(upto, x)] == tuple(rows[j * k : (j + 1) * k])
