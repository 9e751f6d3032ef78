"""Weights of rows: the same moments as position by position, whichever sum is kept."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pgcheck import Batch, Problem, strategies
from pgcheck.engines import scores
from pgcheck.engines.coefficients import per_row, unmasked_coefficients
from pgcheck.engines.enumeration import Batches
from pgcheck.engines.exact import accumulate, exact_moments
from pgcheck.engines.scores import Draws, RowSums, Scores, compensated_add, sums_at
from pgcheck.estimators.base import Estimator, find_estimator, from_coefficients, registered_estimators
from pgcheck.estimators.lookup import FILLED_BY  # noqa: F401  (fills the registries)
from pgcheck.registry import find_problem

NAMES = ("reinforce", "leave_one_out(batch)", "grpo", "cispo(notes)", "dr_grpo", "opo", "loo_std", "trajectory_is")
PLACES: dict[str, tuple[str, dict[str, object]]] = {
    "observations, two groups": ("dialogue/two-turn", {"groups": 2, "group_size": 2}),
    "unequal groups": ("lm/parity", {"groups": 2, "group_size": (2, 1)}),
    "contexts visited several times": ("mdp/two-state", {"groups": 1, "group_size": 3}),
    "lengths": ("tree/tokens", {"groups": 1, "group_size": 4}),
    "off-policy": ("off-policy/tree-truncated", {"groups": 1, "group_size": 2}),
}


def place(name: str) -> Problem:
    problem, sampling = PLACES[name]
    return find_problem(problem).with_sampling(**sampling)  # type: ignore[arg-type]


def position_by_position(e: Estimator) -> Estimator:
    """The same coefficients, in memory of their own."""
    return replace(e, coefficients=lambda batch: e.coefficients(batch).clone(), reads=None)


def assert_same(estimators: list[Estimator], problem: Problem) -> None:
    asked = [replace(e, reads=None) for e in estimators if e.fits(problem)]
    by_row, by_position = exact_moments(asked, problem), exact_moments(list(map(position_by_position, asked)), problem)
    for e, a, b in zip(asked, by_row, by_position, strict=True):
        size = math.sqrt(b.second_moment)
        torch.testing.assert_close(a.mean, b.mean, rtol=0, atol=1e-13 * size, msg=e.name)
        torch.testing.assert_close(a.by_step, b.by_step, rtol=0, atol=1e-13 * size, msg=e.name)
        torch.testing.assert_close(a.covariance, b.covariance, rtol=0, atol=1e-12 * size**2, msg=e.name)


@pytest.fixture(params=["sparse product", "pairs", "without MKL"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "without MKL":
        monkeypatch.setattr(scores, "_has_mkl", lambda: False)
    monkeypatch.setattr(scores, "by_pairs", lambda *_: request.param == "pairs")
    return str(request.param)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("name", PLACES)
def test_every_way_gives_the_same_moments(name: str) -> None:
    assert_same(list(map(find_estimator, NAMES)), place(name))


@given(strategies.problems(), st.sampled_from([find_estimator(name) for name in NAMES]), st.booleans())
def test_on_any_problem(problem: Problem, estimator: Estimator, pairs: bool) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scores, "by_pairs", lambda *_: pairs)
        assert_same([estimator], problem)


@pytest.mark.parametrize("name", PLACES)
def test_scores_are_gradients_of_log_probabilities(name: str) -> None:
    """By autograd, rollout by rollout; and the kept columns say it all."""
    problem = place(name)
    paths = problem.trajectories.paths
    found = Scores.of(problem.trajectories)
    assert found is not None
    z = problem.logits.clone().requires_grad_(True)
    for n in range(len(paths)):
        acts = paths.mask[n] > 0
        logp = torch.log_softmax(z, -1)[paths.context[n][acts], paths.action[n][acts]].sum()
        (expected,) = torch.autograd.grad(logp, z)
        torch.testing.assert_close(found.whole[n], expected.flatten(), rtol=0, atol=1e-15)
    assert found.kept.shape[1] <= problem.logits.shape[0] * (problem.logits.shape[1] - 1)
    again = found.whole_second(found.kept.T @ found.kept)
    torch.testing.assert_close(again, found.whole.T @ found.whole, rtol=0, atol=1e-12)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("shared", [False, True])
def test_sums_of_given_weights(shared: bool) -> None:
    """Random weights times −1.5, batch by batch in a plain loop, in two blocks; a block with a weight that is no number is not
    added."""
    problem = place("lengths")
    table, generator = problem.trajectories, torch.Generator().manual_seed(1)
    index = torch.randint(len(table), (50, 4), generator=generator)
    weight = torch.randn(50, 4, generator=generator, dtype=torch.float64)
    p = torch.rand(1 if shared else 50, generator=generator, dtype=torch.float64).expand(50)
    found_scores = Scores.of(table)
    assert found_scores is not None
    sums = RowSums(found_scores, 4, 50, found_scores.room(50))
    for part in (slice(0, 33), slice(33, 50)):
        assert sums.add(weight[part], Draws(index[part], p[part]), number=-1.5)
        for wrong in (math.nan, math.inf, -math.inf):
            spoiled = weight[part].clone()
            spoiled[7, 2] = wrong
            assert not sums.add(spoiled, Draws(index[part], p[part]))
    expected, second = torch.zeros(len(table), dtype=torch.float64), 0.0
    for w, n, q in zip(-1.5 * weight, index, p, strict=True):
        g = sum(x * found_scores.whole[i] for x, i in zip(w, n, strict=True))
        second = second + q * torch.outer(g, g)
        for x, i in zip(w, n, strict=True):
            expected[i] += q * x
    torch.testing.assert_close(sums.mean_weights(), expected, rtol=0, atol=1e-14)
    torch.testing.assert_close(sums.second(), second, rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [1, 7, 1000])
@pytest.mark.parametrize("parts", [1, 40])
def test_sums_at_places(size: int, parts: int) -> None:
    """One after the other, in a plain loop; places in two dimensions count as one list; each row has a factor, or all one."""
    generator = np.random.Generator(np.random.Philox(2))
    place, x = generator.integers(size, size=(40, 3), dtype=np.int32), generator.normal(size=(40, 3))
    factor = generator.normal(size=parts)
    plain, expected = [0.0] * size, [0.0] * size
    for m, (places, values) in enumerate(zip(place.tolist(), x.tolist(), strict=True)):
        for n, value in zip(places, values, strict=True):
            plain[n] += value
            expected[n] += value * factor[m % parts]
    np.testing.assert_allclose(sums_at(place, x, size, factor), expected, rtol=0, atol=1e-13)
    np.testing.assert_allclose(sums_at(place, x, size), plain, rtol=0, atol=1e-13)


def test_what_a_sum_of_two_loses_is_kept() -> None:
    """2⁶⁰ + 1 − 2⁶⁰ + 2⁻⁶⁰ …: in exact rationals, which float64 rounds at the end alone."""
    numbers = [2.0**60, 1.0, -(2.0**60), 2.0**-60, 3.0, -(2.0**40), 1e-9, 2.0**40]
    total, lost = torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    for x in numbers:
        compensated_add(total, lost, torch.tensor([x], dtype=torch.float64))
    assert float(total + lost) == float(sum(map(Fraction, numbers)))


def test_a_table_that_is_too_large_is_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = place("lengths")
    expected = exact_moments([find_estimator("batch_mean")], problem)[0]
    monkeypatch.setattr(scores, "_MOST_SCORES", 1)
    assert Scores.of(problem.trajectories) is None
    found = exact_moments([find_estimator("batch_mean")], problem)[0]
    torch.testing.assert_close(found.covariance, expected.covariance, rtol=0, atol=1e-12)


def test_nothing_but_a_row_s_weight_is_evaluated() -> None:
    """On-policy the ratio is one number, so that a whole family has one weight a row; off-policy it has not."""
    on, off = place("lengths"), place("off-policy")
    for problem, names in (
        (on, {"leave_one_out", "grpo", "dr_grpo", "cispo(notes)", "reinforce"}),
        (off, {"leave_one_out", "reinforce", "batch_mean"}),
    ):
        index = Batches(problem.trajectories, problem.sizes).random(5, seed=1)
        batch = problem.trajectories.batch(index, problem.group_labels)
        for name in names:
            assert per_row(unmasked_coefficients(find_estimator(name), batch)) is not None, name
        for name in {"reward_to_go"} | ({"grpo"} if problem is off else set()):
            assert per_row(unmasked_coefficients(find_estimator(name), batch)) is None, name


def test_a_function_may_be_one_number_a_row_on_some_blocks_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was summed by row and what was summed by position are put together."""
    problem = place("lengths")
    calls: list[int] = []

    def now_and_then(batch: Batch) -> Tensor:
        calls.append(1)
        c = (batch.episode_return / batch.rows).unsqueeze(-1).expand(batch.mask.shape)
        return c if len(calls) % 2 else c * batch.mask

    def sums(fn: Callable[[Batch], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        batches = Batches(problem.trajectories, problem.sizes)
        (found,) = accumulate([from_coefficients(fn)], problem.trajectories, batches)
        return found.mean, found.second, found.by_step

    monkeypatch.setattr("pgcheck.engines.exact._BLOCK_ELEMENTS", 1)
    monkeypatch.setattr("pgcheck.engines.exact._BLOCK_ROWS", 1)
    mixed = sums(now_and_then)
    assert len(calls) > 3
    for a, b in zip(mixed, sums(lambda b: (b.episode_return / b.rows).unsqueeze(-1) * b.mask), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)


def test_unmasked_coefficients_are_those_of_the_composition_where_the_policy_acts() -> None:
    for where in PLACES:
        problem = place(where)
        index = Batches(problem.trajectories, problem.sizes).random(20, seed=1)
        for e in registered_estimators().values():
            unmasked = getattr(e.coefficients, "unmasked", None)
            if unmasked is None or e.needs or not e.fits(problem):
                continue
            batch = problem.trajectories.batch(index, problem.group_labels)
            copied = batch.map(torch.Tensor.clone)  # nothing in it is repeated
            c = e.coefficients(copied)
            torch.testing.assert_close(unmasked(batch) * batch.mask, c, rtol=1e-12, atol=1e-14, msg=e.name)
            assert bool((c[batch.mask == 0] == 0).all()), e.name
