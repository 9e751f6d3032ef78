"""A comparison holds what `compare` says of the problem as it is and as it is moved, and says what is missing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

import pgcheck
from pgcheck.envs import language
from pgcheck.policies import Decoding, TinyGPT
from pgcheck.problem import Problem
from pgcheck.registry import find_problem
from pgcheck.runs import compare
from pgcheck.runs.compare import Comparison, Sweeps, stale_logits
from tests.engines.oracle import rollout_chances

NAMES = ["reinforce", "leave_one_out", "grpo", "vineppo"]
SWEEPS = Sweeps(groups=(1, 3), group_sizes=(1, 2, 5), staleness=(0.0, 0.5, 1.0))
NUMBERS = ["rel", "scale", "off_axis", "bias", "variance", "mse", "snr", "cost", "ratio", "rollouts_to_match"]


@pytest.fixture(scope="module")
def found() -> Comparison:
    return pgcheck.comparison(NAMES, "dialogue/two-turn", sweeps=SWEEPS)


def same(lines: pd.DataFrame, problem: Problem, *, names: Sequence[str] = NAMES) -> None:
    """The lines are what `compare` gives for this problem."""
    expected = pgcheck.compare(names, problem)
    assert list(lines["estimator"]) == list(expected["estimator"])
    assert list(lines["finding"]) == list(expected["finding"])
    np.testing.assert_array_equal(lines[NUMBERS].to_numpy(float), expected[NUMBERS].to_numpy(float))


def test_the_problem_as_it_is(found: Comparison) -> None:
    pd.testing.assert_frame_equal(found.tables["comparison"], pgcheck.compare(NAMES, "dialogue/two-turn"))
    assert found.relative_to == "reinforce"
    assert [e.name for e in found.estimators] == ["reinforce", "leave_one_out", "grpo", "vineppo(K=1)"]


def test_sweeps(found: Comparison) -> None:
    """Each point is the comparison on the problem so moved; the sampling plan stands in the row."""
    problem = find_problem("dialogue/two-turn")
    for groups in (1, 3):
        lines = found.tables["groups"].query("groups == @groups")
        same(lines, problem.with_sampling(groups=groups, group_size=2))
        assert (lines["rows"] == 2 * groups).all()
    for size in (2, 5):
        lines = found.tables["group_sizes"].query("group_size == @size")
        same(lines, problem.with_sampling(groups=1, group_size=size))
    same(found.tables["group_sizes"].query("group_size == 1"), problem.with_sampling(groups=1, group_size=1),
         names=["reinforce", "vineppo"])  # fmt: skip


def test_staleness(found: Comparison) -> None:
    """0 is on-policy; 1 the policy of another θ; between them logits are mixed. Effective rows: 1/E_old[w²] by hand."""
    problem = find_problem("dialogue/two-turn")
    old = problem.at(1).logits
    for x in (0.0, 0.5, 1.0):
        lines = found.tables["staleness"].query("staleness == @x")
        stale = replace(problem, behavior_logits=(1 - x) * problem.logits + x * old)
        same(lines, stale)
        paths = problem.trajectories.paths
        q = paths.start_probability.tolist()
        both = zip(paths.start.tolist(), rollout_chances(problem), rollout_chances(stale), strict=True)
        square = math.fsum(q[s] * p * p / mu for s, p, mu in both)
        assert lines["effective_rows"].tolist() == [pytest.approx(1 / square, rel=1e-12)] * 4
    assert (found.tables["staleness"].query("staleness == 0")["finding"] != "biased").sum() == 3


def test_staleness_of_a_problem_with_a_sampler_of_its_own() -> None:
    """It goes to that one; where that one never acts so, the support is broken at once."""
    problem = find_problem("off-policy/tree-truncated")
    assert torch.equal(stale_logits(problem, 0.0), problem.logits)
    assert torch.equal(stale_logits(problem, 1.0), problem.behavior_logits)
    half = stale_logits(problem, 0.5)
    assert torch.equal(torch.isinf(half), torch.isinf(problem.behavior_logits))
    assert torch.equal(half[torch.isfinite(half)], problem.logits[torch.isfinite(half)])  # nothing else was changed


def test_splits_add_up(found: Comparison) -> None:
    total = found.tables["comparison"].set_index("estimator")["variance"]
    blocks = found.tables["blocks"].groupby("estimator")["variance"].sum()
    for name in total.index:
        assert blocks[name] == pytest.approx(total[name], rel=1e-12)
    shares = found.tables["steps"].groupby("estimator")["share"].sum()
    assert shares.tolist() == pytest.approx([1.0] * 4, rel=1e-12)
    sources = found.tables["sources"].groupby("estimator")[["rollout", "action", "state"]].sum().sum(axis=1)
    without = found.tables["approximations"].set_index("estimator")["no cross terms"]
    for name in total.index:
        assert sources[name] == pytest.approx(without[name], rel=1e-12)


def test_parameters_have_names() -> None:
    """A transformer's blocks, next to the logits', and the comparison in its parameters."""
    made = pgcheck.comparison(["reinforce", "grpo"], "lm/stale", space="parameters", sweeps=Sweeps((), (), ()))
    blocks = made.tables["blocks"]
    assert set(blocks["space"]) == {"logits", "parameters"}
    in_parameters = blocks[blocks["space"] == "parameters"].groupby("estimator")["variance"].sum()
    for name, variance in made.tables["comparison"].set_index("estimator")["variance"].items():
        assert in_parameters[name] == pytest.approx(variance, rel=1e-10)


def test_what_is_missing_has_a_reason() -> None:
    sweeps = Sweeps(groups=(1, 4), group_sizes=(1,), staleness=(), budget=1000)
    made = pgcheck.comparison(["reinforce", "batch_mean"], "dialogue/two-turn", sweeps=sweeps)
    missing = made.tables["missing"]
    assert missing[["estimator", "what", "reason"]].to_dict("split")["data"] == [
        ["batch_mean", "groups = 4", "more batches than the budget of a sweep"],
        ["batch_mean", "group_size = 1", "too small a batch for it"],
    ]
    lines = made.tables["groups"]
    assert list(zip(lines["estimator"], lines["groups"], strict=True)) == [
        ("reinforce", 1),
        ("batch_mean", 1),
        ("reinforce", 4),
    ]


def test_the_reference_may_be_missing() -> None:
    """Where it does not fit a point, the others are shown, compared with nothing."""
    sweeps = Sweeps(groups=(), group_sizes=(1,), staleness=())
    made = pgcheck.comparison(["batch_mean", "reinforce"], "dialogue/two-turn", sweeps=sweeps)
    (line,) = made.tables["group_sizes"].to_dict("records")
    assert line["estimator"] == "reinforce"
    assert math.isnan(line.get("ratio", math.nan))


def test_another_engine_fills_the_same_columns() -> None:
    """Sampled: nine of ten 95% intervals hold the exact numbers, in the ratios as well, at four fixed seeds; splits stay exact,
    blocks have no intervals."""
    exact = pgcheck.comparison(["reinforce", "grpo"], "dialogue/two-turn", sweeps=Sweeps((2,), (), ()))
    held = list[bool]()
    for seed in range(1, 5):
        made = pgcheck.comparison(
            ["reinforce", "grpo"], "dialogue/two-turn", engine="monte_carlo",
            sampling=pgcheck.Sampling(seed=seed, draws=8192), sweeps=Sweeps((2,), (), (), draws=4096),
        )  # fmt: skip
        assert set(made.tables) == set(exact.tables) - {"blocks"}
        for name in ("comparison", "groups"):
            found, known = made.tables[name], exact.tables[name]
            assert list(found.columns) == list(known.columns)
            assert (found["variance_low"] < found["variance_high"]).all()
            assert (found["batches"] <= (8192 if name == "comparison" else 4096)).all()
            for column in ("variance", "ratio", "rollouts_to_match"):
                low, high = found[f"{column}_low"], found[f"{column}_high"]
                held += ((low <= known[column]) & (known[column] <= high)).tolist()
    assert len(held) == 48
    assert sum(held) >= 44
    pd.testing.assert_frame_equal(made.tables["steps"], exact.tables["steps"])
    assert set(made.tables["missing"]["what"]) == {"blocks"}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"groups": (1, 0)}, "groups: 0; each must be an integer"),
        ({"group_sizes": (2.5,)}, "group_sizes: 2.5; each must be an integer"),
        ({"staleness": (0.0, -1.0)}, "staleness: -1.0; each must be a number of at least 0"),
        ({"staleness": (math.nan,)}, "staleness: nan"),
    ],
)
def test_wrong_sweeps(wrong: dict[str, tuple[float, ...]], message: str) -> None:
    with pytest.raises(pgcheck.UsageError, match=message):
        Sweeps(**wrong)  # type: ignore[arg-type]


def test_unknown_reference() -> None:
    with pytest.raises(pgcheck.UnknownNameError, match="unknown estimator 'grpo'"):
        pgcheck.comparison(["reinforce"], "bandit/two-arm", relative_to="grpo")


def test_a_sample_in_parameters() -> None:
    """Of a transformer: every number within its interval, or a width of it, of the exact one; no longer in logits."""
    prompts = [(1, 2), (2, 2)]
    task = pgcheck.LMTask(
        prompts, vocab_size=4, eos=0, max_new_tokens=3, reward=lambda _, text: float(sum(text) % 3 == 0)
    )
    problem = pgcheck.Problem(task, pgcheck.TinyGPT(4, width=4), group_size=4)
    sampling = pgcheck.Sampling(seed=1, draws=4096, tolerance=0.3, alpha=1e-3)
    names = ["leave_one_out", "grpo"]
    exact, logits = (pgcheck.compare(names, problem, space=space) for space in ("parameters", "logits"))  # type: ignore[arg-type]
    found = pgcheck.compare(names, problem, space="parameters", engine="monte_carlo", sampling=sampling)
    for i in range(2):
        for name in ("scale", "variance", "ratio"):
            low, high = found[f"{name}_low"][i], found[f"{name}_high"][i]
            assert low - (high - low) <= exact[name][i] <= high + (high - low), name
        assert not found["variance_low"][i] <= logits["variance"][i] <= found["variance_high"][i]
    assert list(found["batches"]) == [4096, 4096]


@pytest.mark.parametrize("how", [None, Decoding(TinyGPT(3, width=8, seed=5), temperature=0.8)])
def test_an_old_model_that_writes(how: Decoding | None) -> None:
    """Its law, where completions are too many to be listed, is that of the logits where they can be; and it is swept over."""
    task, model = language.parity(), TinyGPT(3, width=8, seed=3)
    listed, written = (
        Problem(t, model, behavior_logits=how, group_size=2)
        for t in (task, replace(task, max_completions=1, max_prefixes=1))
    )
    for fraction in (0.0, 0.5, 1.0):
        known = torch.log_softmax(stale_logits(listed, fraction), -1)
        moved = replace(written, behavior_logits=stale_logits(written, fraction))
        assert moved.on_policy == (fraction == 0)
        table, _ = moved.sampler(seed=1).draw(0, 40)
        number = {text: k for k, text in enumerate(task.contexts)}
        texts = table.policy.texts
        for n, t in (table.paths.mask > 0).nonzero().tolist():
            k = number[texts[int(table.paths.context[n, t])]]
            expected = float(known[k, table.paths.action[n, t]])
            assert float(table.behavior_logp[n, t]) == pytest.approx(expected, abs=1e-12)
    e = [pgcheck.as_estimator("trajectory_is")]
    found = compare.comparison(
        e,
        [written],
        sweeps=Sweeps((), (), (1.0,), draws=4_096),
        engine="auto",
        sampling=pgcheck.Sampling(draws=4_096),
    ).tables["staleness"]
    assert list(found["staleness"]) == [1.0]
    assert bool((found["variance"] > 0).all())
