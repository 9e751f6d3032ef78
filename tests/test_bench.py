"""The race is fair: every rival computes the same moments, a wrong one is refused, and what is timed is what ran."""

from __future__ import annotations

import itertools
import json
import math
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pgcheck import bench
from pgcheck.engines.coefficients import coefficients_of
from pgcheck.errors import PgcheckError
from pgcheck.estimators.lookup import as_estimator
from pgcheck.problem import Problem
from pgcheck.registry import find_problem
from pgcheck.render.bench import WHAT, bench_markdown

PROBLEMS: dict[str, Callable[[], Problem]] = {
    "two states": lambda: find_problem("mdp/two-state"),
    "ragged": lambda: find_problem("tree/tokens"),
    "walk of four": bench.walk_of_four,
}


def by_hand(problem: Problem, index: Tensor, estimator: str) -> tuple[Tensor, float]:
    """E ĝ and E‖ĝ‖² of the batches in plain loops: ĝ[k,a] = Σ_(i,t at k) c_i (1[a = a_it] − π(a|k))."""
    paths, pi = problem.trajectories.paths, torch.softmax(problem.logits, -1).tolist()
    mean, second = torch.zeros_like(problem.logits), 0.0
    for rows in index.tolist():
        B = len(rows)
        R = [math.fsum(paths.reward[n].tolist()) for n in rows]  # γ = 1
        centre = math.fsum(R) / B
        std = math.sqrt(math.fsum((r - centre) ** 2 for r in R) / B)
        g = torch.zeros_like(mean)
        for n, r in zip(rows, R, strict=True):
            length = float(paths.mask[n].sum())
            if estimator == "leave_one_out":
                c = (r - (math.fsum(R) - r) / (B - 1)) / B
            else:
                c = (r - centre) / (std + 1e-6) / length / B if std > 1e-12 else 0.0
            for k, a, m in zip(
                paths.context[n].tolist(), paths.action[n].tolist(), paths.mask[n].tolist(), strict=True
            ):
                if m:
                    g[k] -= c * torch.tensor(pi[k], dtype=torch.float64)
                    g[k, a] += c
        mean += g / len(index)
        second += float((g**2).sum()) / len(index)
    return mean, second


def rivals(problem: Problem, index: Tensor, estimator: str) -> dict[str, tuple[Tensor, float]]:
    data = bench.gather(problem, index)
    out = {
        "engine": bench.by_engine(problem, index, as_estimator(estimator)),
        "backward": bench.by_backward(data, estimator),
        "vmap": bench.by_vmap(data, estimator, block=7),
    }
    if bench.has_jax():
        out["jax"] = bench.jax_rival(data, estimator, block=7)()
    return out


@pytest.mark.parametrize("rows", [2, 3])
@pytest.mark.parametrize("estimator", ["leave_one_out", "grpo"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_every_rival_computes_the_same(name: str, estimator: str, rows: int) -> None:
    problem = PROBLEMS[name]().with_sampling(groups=1, group_size=rows)
    index = bench.Batches(problem.trajectories, problem.sizes).random(16, seed=3)
    mean, second = by_hand(problem, index, estimator)
    for rival, found in rivals(problem, index, estimator).items():
        torch.testing.assert_close(found[0], mean, rtol=0, atol=1e-12, msg=rival)
        assert found[1] == pytest.approx(second, rel=1e-12), rival


def test_jax_is_raced_where_it_is_installed() -> None:
    if not bench.has_jax():
        pytest.skip("jax is not installed (extra `bench`)")
    problem = find_problem("mdp/two-state").with_sampling(groups=1, group_size=2)
    index = bench.Batches(problem.trajectories, problem.sizes).random(16, seed=3)
    assert "jax" in rivals(problem, index, "grpo")


def test_a_rival_that_computes_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    right = bench.by_vmap
    monkeypatch.setattr(bench, "by_vmap", lambda *args, **kw: (right(*args, **kw)[0] * 1.001, right(*args, **kw)[1]))
    monkeypatch.setattr(bench, "SAMPLES", 200)
    monkeypatch.setattr(bench, "LOOP_SAMPLES", 10)
    with pytest.raises(PgcheckError, match=r"vmap\(grad\)' computes something else"):
        bench.gradient_samples(find_problem("mdp/two-state"), "grpo", 3, rounds=1)


def test_an_exact_engine_that_computes_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    right = bench.exact_moments
    monkeypatch.setattr(
        bench, "exact_moments", lambda *a, **kw: [replace(m, mean=1.001 * m.mean) for m in right(*a, **kw)]
    )
    monkeypatch.setattr(bench, "SAMPLES", 50)
    monkeypatch.setattr(bench, "LOOP_SAMPLES", 5)
    with pytest.raises(PgcheckError, match="'exact engine' computes something else"):
        bench.exact_verdicts(find_problem("mdp/two-state"), "leave_one_out", 2, rounds=1)


@pytest.mark.parametrize("estimator", ["leave_one_out", "grpo"])
def test_a_loop_through_the_model(estimator: str) -> None:
    """In parameters: dz/dθ of the loops in logit space."""
    problem = bench.digits_of_six(3)
    index = bench.Batches(problem.trajectories, problem.sizes).random(4, seed=3)
    mean, second = bench.model_by_backward(problem, index, estimator)
    each = [problem.in_parameters(by_hand(problem, index[m : m + 1], estimator)[0]) for m in range(4)]
    torch.testing.assert_close(mean, sum(each) / 4, rtol=0, atol=1e-12)
    assert second == pytest.approx(sum(float(g @ g) for g in each) / 4, rel=1e-10)


def test_a_sketch_that_computes_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    right = bench.ParameterSpace.project
    monkeypatch.setattr(bench.ParameterSpace, "project", lambda *args: right(*args) * 1.001)
    monkeypatch.setattr(bench, "LOOP_SAMPLES", 3)
    with pytest.raises(PgcheckError, match="'mapped backward passes' computes something else"):
        bench.sketched(bench.digits_of_six(2), batches=8, directions=2, rounds=1)
    with pytest.raises(PgcheckError, match="'loop of backward' computes something else"):
        bench.model_verdicts("grpo", 2, rounds=1)


def test_a_sample_of_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    right = bench.monte_carlo
    monkeypatch.setattr(
        bench, "monte_carlo", lambda *a, **kw: [replace(m, mean=1.001 * m.mean) for m in right(*a, **kw)]
    )
    with pytest.raises(PgcheckError, match="'coefficient engine' computes something else"):
        bench.sampled(find_problem("dialogue/two-turn"), draws=2048, rounds=1)


def test_contenders_run_in_turn() -> None:
    """a b | a b a b: once each to warm up, then round by round."""
    calls: list[str] = []
    rates = bench.in_turns({"a": (lambda: calls.append("a"), 6.0), "b": (lambda: calls.append("b"), 2.0)}, rounds=2)
    assert calls == ["a", "b"] * 3
    assert {name: len(x) for name, x in rates.items()} == {"a": 2, "b": 2}
    assert all(x > 0 for values in rates.values() for x in values)


def test_ratios_are_of_the_same_round() -> None:
    """Medians of 2/1, 3/6, 8/2: the median of ratios is 2, not the ratio of medians 3/2."""
    (r,) = bench._ratios("q", "s", "u", {"ours": [2.0, 3.0, 8.0], "rival": [1.0, 6.0, 2.0]})
    assert (r.ratio, r.least, r.largest) == (2.0, 0.5, 4.0)
    assert (r.ours, r.theirs) == (3.0, 2.0)


def test_one_core_is_given_back() -> None:
    if not hasattr(bench.os, "sched_getaffinity"):
        pytest.skip("the system cannot pin a process")
    before = bench.os.sched_getaffinity(0)
    with bench.one_core():
        assert len(bench.os.sched_getaffinity(0)) == 1
    assert bench.os.sched_getaffinity(0) == before


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "SAMPLES", 64)
    monkeypatch.setattr(bench, "LOOP_SAMPLES", 4)
    monkeypatch.setattr(bench, "MOST_TUPLES", 20_000)
    monkeypatch.setattr(bench, "VERDICTS", (("grpo", 2),))
    monkeypatch.setattr(bench, "ROWS", (3,))
    monkeypatch.setattr(bench, "DRAWS", 64)
    monkeypatch.setattr(bench, "WRITTEN", 16)
    monkeypatch.setattr(bench, "GIVEN", 2_048)
    monkeypatch.setattr(bench, "DIRECTIONS", 2)
    monkeypatch.setattr(bench, "SAMPLED", {"sampled/groups-16": (2048,)})


@pytest.mark.usefixtures("small")
def test_the_whole_race(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """`pgcheck bench --out`: every question answered, the files written, JSON and Markdown of the same numbers."""
    from pgcheck import cli

    monkeypatch.setattr(sys, "argv", ["pgcheck", "bench", "--rounds", "1", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 0
    rows = json.loads((tmp_path / "bench.json").read_text())
    assert {row["question"] for row in rows} == set(WHAT)
    assert all(row["ours"] > 0 and row["theirs"] > 0 and row["ratio"] > 0 for row in rows)
    text = (tmp_path / "bench.md").read_text()
    assert text == capsys.readouterr().out
    assert text.count("\n| ") == len(rows) + len(WHAT)  # and a head for each table
    again = bench_markdown([bench.Ratio(**row) for row in rows])
    assert again == text
    assert [asdict(bench.Ratio(**row)) for row in rows] == rows


@pytest.mark.parametrize("name", bench.SAMPLED)
def test_the_ten_of_a_sampled_race_are_apart(name: str) -> None:
    """No two give the same estimates, so that none is had for nothing beside another."""
    problem = find_problem(name)
    table, index = problem.sampler().draw(0, 64)
    batch = table.batch(index, problem.group_labels)
    found = [coefficients_of(as_estimator(e), batch).expand_as(batch.logp) * batch.mask for e in bench.APART]
    assert len(found) == 10
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(found, 2))
