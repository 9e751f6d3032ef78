"""torchrl's advantages in the exact engine: the claims, the coefficients in plain loops, and what its code does unasked."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import pgcheck
from pgcheck.batch import Batch
from pgcheck.engines.enumeration import Batches
from pgcheck.engines.exact import exact_moments
from pgcheck.errors import BiasError, EstimatorError, UsageError
from pgcheck.estimators.base import Estimator, find_estimator, from_coefficients
from pgcheck.problem import Problem
from pgcheck.registry import find_problem
from pgcheck.runs.suite import load_suite
from pgcheck.trajectories import Paths
from pgcheck.verdicts.verdict import Measurement, measure

pytest.importorskip("torchrl", reason="torchrl is not installed: pip install 'pgcheck[test]'")

from torchrl.objectives.value import functional

from pgcheck.adapters import torchrl as adapter

RAGGED = ("dialogue/unequal-groups", "dialogue/two-turn-action-clock", "chain/absorbing", "off-policy/dialogue-stale")


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Tensors of a hundred numbers: waiting for a second thread costs four times the work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def judged(estimator: Estimator, problem: Problem | str) -> Measurement:
    p = find_problem(problem) if isinstance(problem, str) else problem
    return measure(estimator, p, exact_moments([estimator], p)[0])


def own(coefficients: Callable[[Batch], Tensor]) -> Estimator:
    return from_coefficients(coefficients, couples="trajectory", name="own")


def drawn(name: str, number: int = 6) -> Batch:
    """`number` random batches of the problem, `[M, B, T]`."""
    problem = find_problem(name)
    index = Batches(problem.trajectories, problem.sizes).random(number, seed=3)
    return problem.trajectories.batch(index, problem.group_labels)


# -- the claims


@pytest.mark.parametrize("estimator", adapter.ENTRIES, ids=lambda e: e.name)
def test_claims_hold_on_every_problem(estimator: Estimator) -> None:
    report = pgcheck.check_estimator(estimator, "all")
    decided = {v.check for v in report.verdicts}
    assert {claim.kind for claim in estimator.claims} <= decided


def test_every_claim_has_a_problem_that_decides_it() -> None:
    problems = pgcheck.as_problems("all")
    idle = [(e.name, c) for e in adapter.ENTRIES for c in e.claims if not any(c.applies(p) for p in problems)]
    assert idle == []


def test_suite_runs_and_holds_every_entry() -> None:
    suite = load_suite("torchrl")
    assert suite.resolve_estimators() == list(adapter.ENTRIES)
    report = suite.run()
    assert report.exit_code == 0
    assert sum(v.check == "expected_finding" for v in report.verdicts) == len(suite.expect) == 9


def test_entries_are_stated_and_importable_by_path() -> None:
    for e in adapter.ENTRIES:
        assert e.formula
        assert e.about
        assert "torchrl" in e.reference
        attribute = e.name.removeprefix("torchrl.")
        assert pgcheck.as_estimator(f"pgcheck.adapters.torchrl:{attribute}") is e


@pytest.mark.parametrize("estimator", [adapter.reward_to_go, adapter.gae], ids=lambda e: e.name)
def test_missing_discount_weight_is_caught_and_named(estimator: Estimator) -> None:
    with pytest.raises(BiasError, match="in expectation this is `reward_to_go_undiscounted_weight`") as caught:
        pgcheck.check_estimator(estimator, claim="unbiased")
    assert {v.check for v in caught.value.report.failures} == {"unbiased"}
    # two steps, γ = .5, and the second step counts twice: E ĝ = −2 ∇J exactly
    assert judged(estimator, "mdp/pessimal").scale == pytest.approx(-2.0, abs=1e-12)


# -- the coefficients, in loops over rows and steps


def loop(batch: Batch, row: Callable[..., list[float]]) -> Tensor:
    """`row(r, V, mask, logp, old, clock)` of every row of every batch, over B, 0 where mask is 0."""
    columns = (batch.reward, batch.value, batch.mask, batch.logp, batch.behavior_logp, batch.clock)
    flat = [x.reshape(-1, x.shape[-1]).tolist() for x in columns]
    rows = torch.tensor([row(*row_columns) for row_columns in zip(*flat, strict=True)], dtype=torch.float64)
    return rows.reshape(batch.reward.shape) / batch.rows * batch.mask


def to_go_row(gamma: float, weighted: bool) -> Callable[..., list[float]]:
    def row(r, V, mask, logp, old, clock):  # type: ignore[no-untyped-def]
        T = len(r)
        Ghat = [math.fsum(gamma ** (k - t) * r[k] for k in range(t, T)) for t in range(T)]
        return [(gamma ** clock[t] if weighted else 1.0) * Ghat[t] for t in range(T)]

    return row


def gae_row(gamma: float, lmbda: float, weighted: bool, own_clock: bool = False) -> Callable[..., list[float]]:
    def row(r, V, mask, logp, old, clock):  # type: ignore[no-untyped-def]
        T = len(r)
        g = [gamma ** (clock[k + 1] - clock[k]) if own_clock and k + 1 < T else gamma for k in range(T)]
        delta = [r[k] + g[k] * V[k + 1] - V[k] for k in range(T)]
        adv = [math.fsum(math.prod(x * lmbda for x in g[t:k]) * delta[k] for k in range(t, T)) for t in range(T)]
        return [(gamma ** clock[t] if weighted else 1.0) * adv[t] for t in range(T)]

    return row


def vtrace_row(
    gamma: float, rho_bar: float, c_bar: float, weighted: bool, before: bool = False
) -> Callable[..., list[float]]:
    """IMPALA equation 1: v_s = V(s) + Σ_k γ^{k−s} (Π_{s≤i<k} c_i) ρ_k δ_k, not its recursion."""

    def row(r, V, mask, logp, old, clock):  # type: ignore[no-untyped-def]
        T = len(r)
        ratio = [math.exp(logp[k] - old[k]) if mask[k] else 1.0 for k in range(T)]
        rho, c = [min(rho_bar, x) for x in ratio], [min(c_bar, x) for x in ratio]
        delta = [rho[k] * (r[k] + gamma * V[k + 1] - V[k]) for k in range(T)]
        v = [
            V[s] + math.fsum(gamma ** (k - s) * math.prod(c[s:k]) * delta[k] for k in range(s, T)) for s in range(T + 1)
        ]
        adv = [rho[t] * (r[t] + gamma * v[t + 1] - V[t]) for t in range(T)]
        front = [math.prod(ratio[:t]) if before else 1.0 for t in range(T)]
        return [front[t] * (gamma ** clock[t] if weighted else 1.0) * adv[t] for t in range(T)]

    return row


LOOPS: dict[str, Callable[[float], Callable[..., list[float]]]] = {
    "reward_to_go": lambda g: to_go_row(g, False),
    "reward_to_go_discounted": lambda g: to_go_row(g, True),
    "gae": lambda g: gae_row(g, 0.95, False),
    "gae_discounted": lambda g: gae_row(g, 0.95, True),
    "gae_lambda_1": lambda g: gae_row(g, 1.0, False),
    "gae_lambda_1_discounted": lambda g: gae_row(g, 1.0, True),
    "gae_own_clock": lambda g: gae_row(g, 0.95, True, own_clock=True),
    "gae_float_gamma": lambda g: gae_row(g, 0.95, True),
    "vtrace": lambda g: vtrace_row(g, 1.0, 1.0, False),
    "vtrace_discounted": lambda g: vtrace_row(g, 1.0, 1.0, True),
    "vtrace_unclipped": lambda g: vtrace_row(g, math.inf, math.inf, True),
    "vtrace_weighted": lambda g: vtrace_row(g, math.inf, 1.0, True, before=True),
}


@pytest.mark.parametrize("name", RAGGED)
@pytest.mark.parametrize("estimator", adapter.ENTRIES, ids=lambda e: e.name)
def test_coefficients_are_the_formula(estimator: Estimator, name: str) -> None:
    batch = drawn(name)
    before = {key: x.clone() for key, x in batch.tensors().items()}
    c = estimator.coefficients(batch)
    assert c.dtype == torch.float64
    expected = loop(batch, LOOPS[estimator.name.removeprefix("torchrl.")](batch.discount))
    atol = 1e-6 if estimator is adapter.gae_float_gamma else 1e-12  # γ in float32
    torch.testing.assert_close(c, expected, rtol=0, atol=atol)
    assert all(torch.equal(x, before[key]) for key, x in batch.tensors().items())


@pytest.mark.parametrize("estimator", adapter.ENTRIES, ids=lambda e: e.name)
def test_leading_dimensions_are_batches(estimator: Estimator) -> None:
    batch = drawn("off-policy/dialogue-stale")
    c = estimator.coefficients(batch)
    folded = estimator.coefficients(batch.map(lambda x: x.unflatten(0, (2, 3))))
    one = estimator.coefficients(batch.map(lambda x: x[4]))
    torch.testing.assert_close(folded, c.unflatten(0, (2, 3)), rtol=0, atol=1e-15)
    torch.testing.assert_close(one, c[4], rtol=0, atol=1e-15)


def test_on_policy_vtrace_is_gae_with_lambda_1() -> None:
    batch = drawn("dialogue/two-turn-0.9")
    baselined = find_estimator("baselined(value)").coefficients(batch)
    for e in (adapter.gae_lambda_1_discounted, adapter.vtrace_discounted, adapter.vtrace_weighted):
        torch.testing.assert_close(e.coefficients(batch), baselined, rtol=0, atol=1e-14)


@pytest.mark.parametrize("lmbda", [0.0, 0.3, 1.0])
def test_gae_with_an_exact_critic_is_unbiased_for_every_lambda(lmbda: float) -> None:
    gae = own(adapter.compose(adapter.weighted_by_discount(adapter.gae_advantage(lmbda))))
    for name in ("mdp/two-state-0.9", "chain/absorbing", "dialogue/two-turn-0.9"):
        assert judged(gae, name).finding == "unbiased"


@pytest.mark.parametrize("c_bar", [0.5, 1.0, math.inf])
def test_the_clip_on_c_has_no_part_in_the_bias_when_v_is_exact(c_bar: float) -> None:
    vtrace = adapter.weighted_by_discount(adapter.vtrace_advantage(math.inf, c_bar))
    found = judged(own(adapter.compose(vtrace, ratio=adapter.ratio_before)), "off-policy/tree-stale")
    assert found.finding == "unbiased"


# -- where a row ends


def closing_observation() -> Problem:
    """One action, then an observation that pays 1 or 0: after a₁ with chance .8, after a₂ with .3."""
    action = [[0, -1], [0, -1], [1, -1], [1, -1]]
    place = [[0, -1]] * 4
    reward = [[0.0, 1.0], [0.0, 0.0]] * 2
    paths = Paths(
        [0] * 4, place, place, action, reward, [[1, 0]] * 4, [0.8, 0.2, 0.3, 0.7], [1.0], discount=0.9, end=[2] * 4
    )  # type: ignore[arg-type]
    return Problem.from_trajectories(paths, [[0.3, -0.2]], groups=1, group_size=2, name="dialogue/closing")


def test_a_row_ends_after_its_last_reward_not_after_its_last_action() -> None:
    problem = closing_observation()
    assert adapter.done(problem.trajectories.rows_as_batch()).tolist() == [[False, True]] * 4
    for e in (adapter.reward_to_go_discounted, adapter.gae_discounted, adapter.vtrace_discounted):
        assert judged(e, problem).finding == "unbiased"

    def cut_short(batch: Batch) -> Tensor:
        at_last_action = batch.mask > 0
        to_go = functional.reward2go(
            adapter.rows_of(batch.reward), adapter.rows_of(at_last_action), gamma=batch.discount
        )
        return to_go.reshape(batch.reward.shape)

    assert judged(own(adapter.compose(cut_short)), problem).rel == 1.0  # the only reward is gone


def test_done_on_ragged_and_empty_rows() -> None:
    batch = drawn("chain/absorbing")
    last = batch.length.to(torch.int64) - 1
    assert torch.equal(adapter.done(batch).to(torch.int64).argmax(-1), last)
    assert bool((adapter.done(batch).sum(-1) == 1).all())
    empty = batch.map(torch.zeros_like)
    assert not bool(adapter.done(empty).any())
    assert bool((adapter.gae.coefficients(empty) == 0).all())


# -- what torchrl does unasked


def distant_reward(lag: int, gamma: float) -> Problem:
    """One action; a₁ pays 1 `lag` positions later."""
    action = torch.full((2, lag + 1), -1)
    action[:, 0] = torch.tensor([0, 1])
    place = torch.where(action >= 0, 0, -1)
    reward = torch.zeros(2, lag + 1)
    reward[0, -1] = 1.0
    zero, one = torch.tensor([0, 0]), torch.ones(2)
    paths = Paths(zero, place, place, action, reward, (action >= 0) * 1.0, one, torch.ones(1), discount=gamma)
    return Problem.from_trajectories(paths, [[0.3, 0.0]], groups=1, group_size=2, name=f"distant/{lag}")


@pytest.mark.parametrize(("gamma", "lag"), [(0.5, 23), (0.9, 152)])
def test_reward2go_drops_rewards_beyond_a_horizon(gamma: float, lag: int) -> None:
    assert lag == int(math.log(1e-7) / math.log(gamma))
    assert judged(adapter.reward_to_go_discounted, distant_reward(lag - 1, gamma)).finding == "unbiased"
    dropped = judged(adapter.reward_to_go_discounted, distant_reward(lag, gamma))
    assert (dropped.rel, dropped.scale) == (1.0, 0.0)  # nothing is left of the signal
    assert judged(adapter.gae_discounted, distant_reward(lag, gamma)).finding == "unbiased"


@pytest.mark.parametrize("gamma", [0.0, 1e-8])
def test_reward2go_cannot_do_without_a_future(gamma: float) -> None:
    rewards, done = torch.ones(1, 3, 1), torch.zeros(1, 3, 1, dtype=torch.bool)
    with pytest.raises(IndexError):
        functional.reward2go(rewards, done, gamma)
    batch = replace(drawn("mdp/two-state"), discount=gamma)
    with pytest.raises(EstimatorError, match="its filter is empty"):
        adapter.reward_to_go.coefficients(batch)


def test_vectorised_gae_is_the_loop_but_for_lambda_0() -> None:
    batch = drawn("dialogue/two-turn-0.9")
    arguments = adapter.transitions(batch)
    gamma = adapter.same_gamma(batch)
    serial, _ = functional.generalized_advantage_estimate(gamma, 0.95, **arguments)
    vectorised, _ = functional.vec_generalized_advantage_estimate(gamma, 0.95, **arguments)
    torch.testing.assert_close(vectorised, serial, rtol=0, atol=1e-14)
    with pytest.raises(IndexError):
        functional.vec_generalized_advantage_estimate(gamma, 0.0, **arguments)


def test_a_float_gamma_is_rounded_to_float32() -> None:
    for name, rounded in {"chain/absorbing": True, "tree/tokens-0.8": True, "mdp/two-state-0.5": False}.items():
        rel = judged(adapter.gae_float_gamma, name).rel
        assert 1e-8 < rel < 1e-7 if rounded else rel < 1e-14
        assert judged(adapter.gae_discounted, name).rel < 1e-14


def test_float_thresholds_are_rounded_to_float32() -> None:
    one = torch.ones(1, 1, 1, dtype=torch.float64)
    ratio, over = one * math.log(1.5), one > 0
    clipped, _ = functional.vtrace_advantage_estimate(1.0, ratio, 0 * one, 0 * one, 0 * one, one, over, rho_thresh=1.1)
    assert float(clipped) == float(torch.tensor(1.1, dtype=torch.float32)) != 1.1  # ρ̄ · r with r = 1


def test_vtrace_is_documented_with_its_policies_swapped() -> None:
    # the docstring calls log_pi the collecting actor's and log_mu the current one's; the code has ρ = exp(log_pi − log_mu)
    def as_documented(batch: Batch) -> Tensor:
        return adapter.vtrace_unclipped.coefficients(replace(batch, logp=batch.behavior_logp, behavior_logp=batch.logp))

    problem = find_problem("off-policy/contextual-drifted")
    assert judged(adapter.vtrace_unclipped, problem).finding == "unbiased"
    assert judged(own(as_documented), problem).rel == pytest.approx(0.848, abs=1e-3)
    # one arm of one prompt, by hand: as documented, the row weighs μ/π where it should weigh π/μ
    row = problem.trajectories.rows_as_batch()
    ratio = (row.logp - row.behavior_logp).exp()
    torch.testing.assert_close(as_documented(row) * ratio**2, adapter.vtrace_unclipped.coefficients(row))


def test_a_gamma_for_each_position_mends_the_other_clock() -> None:
    name = "dialogue/two-turn-action-clock"
    assert judged(adapter.gae_discounted, name).rel == pytest.approx(0.0718, abs=1e-4)
    assert judged(adapter.gae_own_clock, name).finding == "unbiased"


# -- without torchrl


def test_missing_library_is_one_line_with_the_pip_command(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in sys.modules if n.partition(".")[0] == "torchrl"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "pgcheck.adapters.torchrl")
    with pytest.raises(UsageError, match=r"pip install 'pgcheck\[test\]'") as caught:
        importlib.import_module("pgcheck.adapters.torchrl")
    assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match=r"needs torchrl .* pip install torchrl"):
        pgcheck.as_estimator("pgcheck.adapters.torchrl:gae")
