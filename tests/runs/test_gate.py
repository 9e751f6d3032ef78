"""The gate: every change is seen, none passes, and a file that is not a baseline is an error or a failure.

What a number of a report must be is worked out elsewhere (tests/engines); here reports are made by hand or changed by hand,
and the oracle is what was changed.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pgcheck.engines.exact import exact_moments
from pgcheck.engines.monte_carlo import Sampling
from pgcheck.errors import UsageError
from pgcheck.estimators.base import find_estimator
from pgcheck.estimators.broken import BROKEN
from pgcheck.estimators.lookup import FILLED_BY  # noqa: F401  (fills the registries)
from pgcheck.registry import find_problem
from pgcheck.render.gate import headline, message, shown, summary, why_not
from pgcheck.runs.baseline import (
    EMPTY,
    WHOLE,
    Baseline,
    ExactEntry,
    baseline_of,
    entry_of,
    read_baseline,
    read_report,
)
from pgcheck.runs.gate import Gate, compare, exit_code
from pgcheck.runs.report import CaseRow, MeasurementRow, ProblemRow, Report, merged
from pgcheck.runs.runner import run
from pgcheck.statistics.two_sample import fixed_directions
from pgcheck.verdicts.verdict import Status

PROBLEMS = ("bandit/two-arm", "dialogue/two-turn", "bandit/stationary")
ESTIMATORS = ("leave_one_out", "grpo", "batch_mean")


@pytest.fixture(scope="module")
def report() -> Report:
    return run([find_estimator(x) for x in ESTIMATORS], [find_problem(x) for x in PROBLEMS], suite="small")


@pytest.fixture(scope="module")
def baseline(report: Report) -> Baseline:
    return baseline_of(report)


def with_measurement(report: Report, estimator: str, problem: str, **changes: Any) -> Report:
    rows = [
        m.model_copy(update=changes) if (m.estimator, m.problem) == (estimator, problem) else m
        for m in report.measurements
    ]
    return report.model_copy(update={"measurements": rows})


def kinds(gate: Gate) -> list[tuple[str, str, str]]:
    return [(d.kind, d.estimator, d.problem) for d in gate.differences]


# -- what agrees


def test_a_run_agrees_with_itself(report: Report, baseline: Baseline) -> None:
    found = compare(report, baseline)
    assert (found.exit_code, found.differences) == (0, [])
    assert len(found.same) == len(baseline.entries) + len(baseline.estimators) == 9 + 3
    assert "9 entries as in the baseline" in summary(found)


def test_rounding_of_another_machine_is_no_change(report: Report, baseline: Baseline) -> None:
    """Every number off by 1e-13 of what it is a sum of: a hash would have changed."""
    for m in report.measurements:
        assert m.size is not None
        moved = [[x + 1e-13 * m.size for x in row] for row in m.expected]
        changes = {
            "expected": moved,
            "total_variance": (m.total_variance or 0.0) + 1e-13 * m.size**2,
            "scale": None if m.scale is None else m.scale + 1e-13,
            "off_axis": None if m.off_axis is None else m.off_axis + 1e-13,
        }
        assert compare(with_measurement(report, m.estimator, m.problem, **changes), baseline).exit_code == 0


def test_the_file_is_sorted_a_row_a_line_and_survives_to_the_bit(baseline: Baseline, tmp_path: Path) -> None:
    path = tmp_path / "baseline.json"
    path.write_text(baseline.to_json())
    again = read_baseline(path)
    assert again.to_json() == baseline.to_json()
    assert compare_rows(again, baseline)
    lines = [json.loads(line.strip().rstrip(",")) for line in path.read_text().splitlines() if line.startswith("  {")]
    assert len(lines) == 12
    names = [(x["estimator"], x["problem"]) for x in lines if "problem" in x]
    assert names == sorted(names)
    assert all(x["engine"] == "exact" for x in lines if "problem" in x)


def compare_rows(a: Baseline, b: Baseline) -> bool:
    return sorted(a.entries, key=lambda e: e.key) == sorted(b.entries, key=lambda e: e.key)


def test_the_order_of_a_file_does_not_matter(report: Report, baseline: Baseline) -> None:
    turned = baseline.model_copy(update={"entries": baseline.entries[::-1], "estimators": baseline.estimators[::-1]})
    assert compare(report, turned).exit_code == 0
    assert turned.to_json() == baseline.to_json()


# -- what is a change


@pytest.mark.parametrize("step", [1e-8, -1e-6, 0.1])
@pytest.mark.parametrize("name", ["total_variance", "expected", "scale", "rel", "off_axis", "cosine", "size"])
def test_a_change_of_any_number_is_seen(report: Report, baseline: Baseline, name: str, step: float) -> None:
    cell = report.cell("grpo", "dialogue/two-turn")
    assert cell is not None
    assert cell.size is not None
    old = getattr(cell, name)
    new = [[x + step * cell.size for x in old[0]], *old[1:]] if name == "expected" else old + step
    changed = with_measurement(report, "grpo", "dialogue/two-turn", **{name: new})
    found = compare(changed, baseline)
    assert kinds(found) == [("changed", "grpo", "dialogue/two-turn")]
    assert found.exit_code == 1
    assert found.updatable
    assert headline(found.differences[0]).startswith("grpo on dialogue/two-turn: ")


def test_a_change_says_which_way(report: Report, baseline: Baseline) -> None:
    """(B − 1)/B = 3/4 of the gradient, taken for all of it: read it from the batch mean's own row."""
    (row,) = [e for e in baseline.entries if e.key == ("batch_mean", "dialogue/two-turn")]
    assert row.scale == pytest.approx(0.75, rel=1e-12)
    cell = report.cell("batch_mean", "dialogue/two-turn")
    right = report.cell("leave_one_out", "dialogue/two-turn")
    assert cell is not None
    assert right is not None
    louder = (cell.total_variance or 0.0) * 1.3
    words = [
        (
            right.model_copy(update={"estimator": "batch_mean"}),
            "scale 0.75 → 1, rel 0.25 → 0, now unbiased (was proportional)",
        ),
        (cell.model_copy(update={"total_variance": louder}), "variance 0.08474 → 0.1102, grew ×1.3"),
        (cell.model_copy(update={"total_variance": louder / 2.6}), "variance 0.08474 → 0.04237, fell ×0.5"),
    ]
    for new, said in words:
        rows = [new if (m.estimator, m.problem) == row.key else m for m in report.measurements]
        found = compare(report.model_copy(update={"measurements": rows}), baseline)
        (d,) = found.differences
        assert said in headline(d)
        assert message(d, "ACCEPT").endswith("\n  next      if this is meant: ACCEPT")


def test_a_change_too_small_for_four_digits_is_named_by_its_size(report: Report, baseline: Baseline) -> None:
    cell = report.cell("grpo", "dialogue/two-turn")
    assert cell is not None
    assert cell.size is not None
    moved = [[x + 1e-7 * cell.size for x in row] for row in cell.expected]
    found = compare(with_measurement(report, "grpo", "dialogue/two-turn", expected=moved), baseline)
    assert "E ĝ moved by 2.449e-07 of its size" in headline(found.differences[0])  # √6 numbers moved by 1e-7


def test_what_is_new_and_what_is_gone(report: Report, baseline: Baseline) -> None:
    fewer = report.model_copy(update={"measurements": [m for m in report.measurements if m.estimator != "grpo"]})
    found = compare(fewer, baseline)
    assert kinds(found) == [("orphaned", "grpo", p) for p in sorted(PROBLEMS)]
    assert "was deleted, renamed or deselected" in headline(found.differences[0])
    found = compare(report, baseline_of(fewer))
    assert kinds(found) == [("missing", "grpo", p) for p in sorted(PROBLEMS)]
    assert found.updatable
    assert found.accepted().to_json() == baseline.to_json()


def test_an_estimator_that_is_gone_stands_for_its_entries(report: Report, baseline: Baseline) -> None:
    rows = {
        "measurements": [m for m in report.measurements if m.estimator != "grpo"],
        "estimators": [e for e in report.estimators if e.name != "grpo"],
        "verdicts": [v for v in report.verdicts if v.estimator != "grpo"],
    }
    found = compare(report.model_copy(update=rows), baseline)
    assert len(found.differences) == 4
    assert [(d.kind, d.estimator, d.problem) for d in shown(found)] == [("orphaned", "grpo", "")]


def test_a_problem_that_is_another_one(report: Report, baseline: Baseline) -> None:
    rows = [p.model_copy(update={"digest": "0" * 16}) if p.name == "bandit/two-arm" else p for p in report.problems]
    found = compare(report.model_copy(update={"problems": rows}), baseline)
    assert kinds(found) == [("problem", e, "bandit/two-arm") for e in sorted(ESTIMATORS)]
    assert "digest 70f7e11bcec24a8f → 0000000000000000" in headline(found.differences[0])


def test_claims_and_checks_that_are_gone(report: Report, baseline: Baseline) -> None:
    fewer = report.model_copy(update={"verdicts": [v for v in report.verdicts if v.check != "row_order"]})
    found = compare(fewer, baseline)
    assert {d.kind for d in found.differences} == {"checks"}
    assert "row_order 3 → 0" in headline(found.differences[0])
    claimless = [e.model_copy(update={"claims": []}) if e.name == "grpo" else e for e in report.estimators]
    found = compare(report.model_copy(update={"estimators": claimless}), baseline)
    (d,) = found.differences
    assert d.kind == "claims"
    assert headline(d).endswith("→ none")


# -- what no update accepts


def test_a_failing_run_makes_no_baseline() -> None:
    broken = run(
        [BROKEN["sign_flipped"].estimator, find_estimator("grpo")], [find_problem("dialogue/two-turn")], suite="x"
    )
    assert broken.failures
    found = compare(broken, EMPTY)
    assert not found.updatable
    assert ("verdict", "sign_flipped", "dialogue/two-turn") in kinds(found)
    assert "mend them first: sign_flipped on dialogue/two-turn: unbiased is FAIL" in why_not(found)
    with pytest.raises(ValueError, match="fails"):
        found.accepted()
    failing = {"sign_flipped": {v.check: "on purpose" for v in broken.failures}}
    assert compare(broken, EMPTY, expected=failing).updatable
    assert (exit_code(broken, {}), exit_code(broken, failing)) == (1, 0)


def test_an_expected_failure_is_strict(report: Report, baseline: Baseline) -> None:
    found = compare(
        report, baseline, expected={"leave_one_out": {"unbiased": "it once was"}, "absent": {"finite": "?"}}
    )
    assert kinds(found) == [("stale", "leave_one_out", "")]
    assert not found.updatable
    assert "take 'unbiased' out of expected_failed_checks" in message(found.differences[0], "ACCEPT")


def test_inconclusive_is_never_expected(report: Report, baseline: Baseline) -> None:
    rows = [
        v.model_copy(update={"status": Status.INCONCLUSIVE}) if v.check == "unbiased" else v for v in report.verdicts
    ]
    undecided = report.model_copy(update={"verdicts": rows})
    found = compare(undecided, baseline, expected={"leave_one_out": {"unbiased": "?"}})
    assert {d.kind for d in found.differences} == {"verdict"}
    assert not found.updatable


@pytest.mark.parametrize("name", ["bias", "size", "total_variance"])
def test_a_number_that_is_none(report: Report, baseline: Baseline, name: str) -> None:
    found = compare(with_measurement(report, "grpo", "bandit/two-arm", **{name: None}), baseline)
    assert kinds(found) == [("number", "grpo", "bandit/two-arm")]
    assert not found.updatable
    nan = with_measurement(report, "grpo", "bandit/two-arm", expected=[[math.nan, 0.0]])
    assert kinds(compare(nan, baseline)) == [("number", "grpo", "bandit/two-arm")]


def test_nothing_is_no_pass() -> None:
    empty = Report(suite="s", version="0", problems=[], estimators=[], measurements=[], verdicts=[], not_asked=[])
    found = compare(empty, EMPTY)
    assert found.exit_code == 5
    assert "nothing was compared" in summary(found)


def test_a_report_of_two_runs_is_refused(report: Report, baseline: Baseline) -> None:
    for table in ("measurements", "problems", "estimators"):
        rows = getattr(report, table)
        with pytest.raises(UsageError, match="is there twice"):
            compare(report.model_copy(update={table: [*rows, rows[0]]}), baseline)
    with pytest.raises(UsageError, match="not among the problems"):
        compare(report.model_copy(update={"problems": report.problems[1:]}), baseline)


# -- the sketch


def large(mean: np.ndarray) -> tuple[MeasurementRow, ProblemRow]:
    size = float(np.linalg.norm(mean))
    nothing: dict[str, Any] = dict.fromkeys(("worst_step", "batches", "snr"), None)
    numbers = dict.fromkeys(("rel", "scale", "cosine", "off_axis", "bias", "total_variance", "mse"), 0.5)
    m = MeasurementRow(
        estimator="e", problem="p", finding="biased", size=size, enumerated=1, lane="", worst_context=0, worst_action=0,
        expected=mean.tolist(), by_step=[], **nothing, **numbers,
    )  # fmt: skip
    p = ProblemRow(
        name="p", about="", digest="d", rollouts=1, contexts=mean.shape[0], actions=mean.shape[1], steps=1, rows=1,
        group_sizes=[1], discount=1.0, on_policy=True, full_support=True, value=0.0,
        gradient_norm=size, gradient=[], by_step=[],
    )  # fmt: skip
    return m, p


def report_of(mean: np.ndarray) -> Report:
    m, p = large(mean)
    return Report(suite="s", version="0", problems=[p], estimators=[], measurements=[m], verdicts=[], not_asked=[])


def test_the_sketch_has_the_length_of_what_it_stands_for() -> None:
    """E‖sketch‖² = ‖E ĝ‖²: the mean over many vectors, by the law of large numbers to 2%."""
    generator = np.random.default_rng(0)
    x = generator.normal(size=(400, 20))
    ratio = (
        (fixed_directions(400).T @ fixed_directions(400)).trace() / 400,
        np.mean(((fixed_directions(400) @ x) ** 2).sum(0) / (x**2).sum(0)),
    )
    assert ratio[0] == pytest.approx(1.0, abs=0.02)
    assert ratio[1] == pytest.approx(1.0, abs=0.3)


@given(st.integers(0, 99), st.floats(1e-7, 1.0), st.booleans())
def test_a_change_of_one_coordinate_shows_in_the_sketch(at: int, step: float, several: bool) -> None:
    """One coordinate of a hundred moved, or two against each other, by 1e-7 of the length or more."""
    mean = np.sin(np.arange(100.0)).reshape(50, 2)
    entry = entry_of(*large(mean))
    assert entry is not None
    assert entry.mean is None
    assert mean.size > WHOLE
    changed = mean.copy()
    changed.flat[at] += step * np.linalg.norm(mean)
    if several:
        changed.flat[(at + 37) % 100] -= step * np.linalg.norm(mean)
    base = baseline_of(report_of(mean))
    assert compare(report_of(mean), base).exit_code == 0
    assert compare(report_of(changed), base).exit_code == 1


# -- Cov ĝ


def test_a_covariance_that_changes_under_its_trace_is_seen(report: Report, baseline: Baseline) -> None:
    """Variance moved from one action to another: E ĝ, tr Cov ĝ and everything printed stay what they are."""
    cell = report.cell("grpo", "dialogue/two-turn")
    assert cell is not None
    problem = find_problem("dialogue/two-turn")
    covariance = exact_moments([find_estimator("grpo")], problem)[0].covariance
    assert covariance is not None
    v = np.random.RandomState(1992).uniform(-math.sqrt(3 / 8), math.sqrt(3 / 8), (8, len(covariance)))[:4]
    np.testing.assert_allclose(cell.spread, np.einsum("ji,ik,jk->j", v, covariance.numpy(), v), rtol=1e-12)
    turned = covariance.numpy().copy()
    turned[0, 0] += 1e-6
    turned[-1, -1] -= 1e-6
    assert turned.trace() == pytest.approx(cell.total_variance, rel=1e-12)
    spread = np.einsum("ji,ik,jk->j", v, turned, v).tolist()
    found = compare(with_measurement(report, "grpo", "dialogue/two-turn", spread=spread), baseline)
    assert kinds(found) == [("changed", "grpo", "dialogue/two-turn")]
    assert "E ĝ moved by 0 of its size, variance by 0, variance along a fixed direction by " in headline(
        found.differences[0]
    )


def test_a_covariance_that_is_too_large_is_kept_by_its_trace(report: Report) -> None:
    entry = baseline_of(with_measurement(report, "grpo", "dialogue/two-turn", spread=[])).entries
    assert [e.spread for e in entries_of(entry, "grpo", "dialogue/two-turn")] == [None]


def entries_of(entries: Any, estimator: str, problem: str) -> list[Any]:
    return [e for e in entries if e.key == (estimator, problem)]


# -- cases

CASE = CaseRow(
    name="a-sentence", says="It is so.", source="a book", truth="right", quantity="scale", subject={"estimator": "grpo"},
    asked=1, relation="= 1", value=1.0, holds=True, number="1", status=Status.PASS, because="of it",
)  # fmt: skip


def cases(*rows: CaseRow) -> Report:
    return Report(
        suite="s", version="0", problems=[], estimators=[], measurements=[], verdicts=[], not_asked=[], cases=list(rows)
    )


def test_the_number_of_a_case_is_held() -> None:
    base = baseline_of(cases(CASE))
    found = compare(cases(CASE), base)
    assert (found.exit_code, summary(found)) == (0, "1 cases as in the baseline")
    assert compare(cases(CASE.model_copy(update={"value": 1.0 + 1e-12})), base).exit_code == 0
    changes = {
        "value": (0.75, "value 1 → 0.75"),
        "holds": (False, "holds True → False"),
        "truth": ("wrong", "truth right → wrong"),
        "subject": ({"estimator": "rloo"}, "subject estimator=grpo → estimator=rloo"),
        "asked": (2, "asked 1 → 2"),
        "relation": ("> 1", "relation = 1 → > 1"),
        "number": (None, "number 1 → None"),
    }
    for name, (value, said) in changes.items():
        found = compare(cases(CASE.model_copy(update={name: value})), base)
        assert kinds(found) == [("changed", "a-sentence", "")]
        assert said in headline(found.differences[0])
        assert found.accepted().cases[0] != base.cases[0]
    again = CASE.model_copy(update={"name": "b"})
    assert kinds(compare(cases(CASE, again), base)) == [("missing", "b", "")]
    assert kinds(compare(cases(again), base)) == [("missing", "b", ""), ("orphaned", "a-sentence", "")][::-1]
    undecided = CASE.model_copy(update={"value": None, "holds": None, "status": Status.INCONCLUSIVE, "reason": "?"})
    found = compare(cases(undecided), base)
    assert kinds(found) == [("verdict", "a-sentence", "")]
    assert not found.updatable


# -- sampled entries

DRAWN = ("leave_one_out", "batch_mean")
ON = ("bandit/two-arm", "dialogue/two-turn")


def drawn(seed: int = 0, draws: int = 4096, estimators: tuple[Any, ...] = DRAWN) -> Report:
    chosen = [find_estimator(e) if isinstance(e, str) else e for e in estimators]
    sampling = Sampling(seed=seed, draws=draws, tolerance=0.5)
    return run(
        chosen, [find_problem(x) for x in ON], checks=["unbiased"], engine="monte_carlo", sampling=sampling, suite="d"
    )


@pytest.fixture(scope="module")
def sample() -> Report:
    return drawn()


def without_verdicts(report: Report) -> Report:
    """The claims of what is changed here on purpose are not what is tested."""
    return report.model_copy(update={"verdicts": []})


def replaced(name: str, change: Any) -> Any:
    """The estimator of that name with other coefficients."""
    e = find_estimator(name)
    return dataclasses.replace(e, coefficients=lambda batch: change(e.coefficients(batch), batch))


def test_a_sample_holds_what_the_draws_say(sample: Report) -> None:
    """Scores against the draws themselves, by `Problem.sample` and autograd through a table."""
    problem = find_problem("bandit/two-arm")
    e = find_estimator("leave_one_out")
    cell = sample.cell("leave_one_out", "bandit/two-arm")
    assert cell is not None
    assert cell.sampled is not None
    n = cell.batches
    assert n == 4096
    batch = problem.sample(n, seed=0)
    z = torch.zeros(n, *problem.logits.shape, dtype=torch.float64).add(problem.logits).requires_grad_()
    logp = torch.log_softmax(z, -1)[torch.arange(n)[:, None, None], batch.context, batch.action]
    (x,) = torch.autograd.grad((e.coefficients(batch).detach() * logp * batch.mask).sum(), z)
    x, g = x.flatten(1).numpy(), problem.gradient().reshape(-1).numpy()
    v = np.random.RandomState(1992).uniform(-math.sqrt(3 / 8), math.sqrt(3 / 8), (8, len(g)))
    expected = {"scale": x @ g / (g @ g), "mse": ((x - g) ** 2).sum(1)} | {f"v{i + 1}": x @ v[i] for i in range(8)}
    for name, y in expected.items():
        s = cell.sampled.scores[name]
        got = [s.mean, s.error, s.low, s.high]
        assert got == pytest.approx([y.mean(), y.std(ddof=1) / math.sqrt(n), y.min(), y.max()], rel=1e-9, abs=1e-12)
    assert cell.sampled.first == pytest.approx(v @ x[:1024].mean(0), abs=1e-12)


def test_the_same_draws_agree_to_the_bit_and_whatever_moves_is_seen(sample: Report) -> None:
    base = baseline_of(sample)
    assert {e.engine for e in base.entries} == {"monte_carlo"}
    found = compare(sample, base)
    assert (found.exit_code, found.tested) == (0, {})
    for change in (
        lambda c, batch: c * (1 + 1e-6),
        lambda c, batch: torch.where(batch.reward > 0, c, c * (1 - 1e-5)),
    ):
        moved = drawn(estimators=(replaced("leave_one_out", change), "batch_mean"))
        found = compare(without_verdicts(moved), base)
        changed = [key for key in kinds(found) if key[0] == "changed"]
        assert changed == [("changed", "leave_one_out", p) for p in sorted(ON)]
        assert "on the same 4,096 draws of seed 0" in headline(found.differences[0])
        assert found.tested == {}


def test_other_draws_of_the_same_estimator_are_no_change(sample: Report) -> None:
    """Other seeds, and other numbers of draws of the same seed and of another."""
    base = baseline_of(sample)
    for seed, draws in ((1, 4096), (2, 8192), (0, 6144)):
        found = compare(drawn(seed, draws), base)
        assert found.differences == []
        assert found.exit_code == 0
        tested = {key for key, t in found.tested.items() if not t.rejects}
        assert tested <= {(e, p) for e in DRAWN for p in ON}
        assert tested or seed == 0  # a verdict may come before the draws that were added
        if seed:
            assert "(4 of them by two-sample tests, together at 1e-06)" in summary(found)


def test_other_draws_of_another_estimator_are_red(sample: Report) -> None:
    """Scale, direction and noise, each told with its numbers, its p-value and the level."""
    base = baseline_of(sample)
    changes = {
        "scale": lambda c, batch: 2 * c,
        "gone": lambda c, batch: 0 * c,
        "mse": lambda c, batch: c + 2 * torch.sin(17.0 * batch.logp.sum((-1, -2), keepdim=True) + 5 * batch.reward),
    }
    for change in changes.values():
        other = drawn(7, estimators=(replaced("leave_one_out", change), "batch_mean"))
        found = compare(without_verdicts(other), base)
        assert ("changed", "leave_one_out", "dialogue/two-turn") in kinds(found)
        assert not any(e == "batch_mean" and kind == "changed" for kind, e, _ in kinds(found))
        d = next(d for d in found.differences if d.kind == "changed")
        assert d.test is not None
        assert d.test.p <= d.test.level
        assert d.test.level == pytest.approx(1e-6 / (4 * 10 * 144))
        said = headline(d)
        assert re.search(
            r" ± .* → .* ± .*, (grew|fell).*: by chance with p ≤ \S+, below 1\.7e-10 \(4,096 draws of seed 0", said
        )
        assert "next      if this is meant: ACCEPT" in message(d, "ACCEPT")


def test_another_engine_is_a_change(report: Report, sample: Report) -> None:
    exact = run([find_estimator(e) for e in DRAWN], [find_problem(x) for x in ON], checks=["unbiased"], suite="d")
    found = compare(sample, baseline_of(exact))
    assert {d.kind for d in found.differences if d.problem} == {"changed"}
    assert "the engine is another one: exact → monte_carlo" in headline(found.differences[0])


def test_numbers_that_are_said_to_be_of_other_draws(sample: Report) -> None:
    """An edited seed, or an edited number of draws, is no way around an exact comparison."""
    base = baseline_of(sample)
    for change in ({"seed": 1}, {"batches": 8192}, {"seed": 1, "batches": 8192}):
        edited = base.model_copy(update={"entries": [e.model_copy(update=change) for e in base.entries]})
        found = compare(sample, edited)
        assert {d.kind for d in found.differences} == {"changed"}
        assert "the baseline was edited" in headline(found.differences[0])


def test_a_report_without_what_a_test_takes_has_no_number(sample: Report) -> None:
    """As written by a pgcheck that did not keep it."""
    old = with_measurement(sample, "batch_mean", "bandit/two-arm", sampled=None)
    assert ("number", "batch_mean", "bandit/two-arm") in kinds(compare(old, baseline_of(sample)))


# -- files that are no baseline, made by Hypothesis


@pytest.fixture(scope="module")
def everything(report: Report, sample: Report) -> Report:
    """A report with exact entries, sampled ones and cases."""
    problems = [p for p in sample.problems if p.name not in {x.name for x in report.problems}]
    renamed = [m.model_copy(update={"estimator": f"{m.estimator}, drawn"}) for m in sample.measurements]
    return report.model_copy(
        update={
            "problems": [*report.problems, *problems],
            "measurements": [*report.measurements, *renamed],
            "cases": [CASE],
        }
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, everything: Report) -> Path:
    at = tmp_path_factory.mktemp("gate")
    (at / "good.json").write_text(baseline_of(everything).to_json())
    return at


def outcome(folder: Path, report: Report, text: str | bytes) -> int:
    """0, 1, or 2 for an error of the tree; anything else is a traceback, and fails the test."""
    path = folder / "bad.json"
    path.write_bytes(text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text)
    try:
        found = compare(report, read_baseline(path))
    except UsageError as error:
        return 2 if str(path) in str(error) else -1
    for d in found.differences:
        assert message(d, "ACCEPT")
    return found.exit_code


@given(st.binary(max_size=200) | st.text(max_size=200).map(lambda x: x.encode("utf-8", "surrogatepass")))
def test_malformed(folder: Path, everything: Report, text: bytes) -> None:
    assert outcome(folder, everything, text) == 2


@given(st.floats(0.0, 1.0, exclude_max=True))
def test_truncated(folder: Path, everything: Report, part: float) -> None:
    text = (folder / "good.json").read_text()
    assert outcome(folder, everything, text[: int(part * (len(text) - 2))]) == 2


@given(st.integers(2, 99) | st.text(max_size=20))
def test_newer_schema(folder: Path, everything: Report, version: int | str) -> None:
    text = (folder / "good.json").read_text()
    data = json.loads(text) | {"schema": f"pgcheck-baseline/{version}"}
    if data["schema"] != "pgcheck-baseline/2":
        assert outcome(folder, everything, json.dumps(data)) == 2


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=3), x, max_size=3),
    max_leaves=5,
)


def spots(x: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a document."""
    items = x.items() if isinstance(x, dict) else enumerate(x) if isinstance(x, list) else []
    return [path] * bool(path) + [p for key, y in items for p in spots(y, (*path, key))]


def put(x: Any, path: tuple[Any, ...], value: Any) -> Any:
    """The document with another value at one place; `...`: with nothing there."""
    for key in path[:-1]:
        x = x[key]
    if value is ...:
        del x[path[-1]]
    else:
        x[path[-1]] = value


@given(st.data())
def test_hand_edited(folder: Path, everything: Report, data: st.DataObject) -> None:
    """Any value anywhere in place of what stands there, or nothing: an error or a failure, unless nothing changed but
    rounding."""
    document = json.loads((folder / "good.json").read_text())
    path = data.draw(st.sampled_from(spots(document)))
    old = document
    for key in path:
        old = old[key]
    near = st.floats(-10.0, 10.0).filter(lambda x: abs(x) > 1e-6).map(lambda x: old + x) if type(old) is float else JSON
    value = data.draw(st.just(...) | near | JSON)
    if value is not ... and (value == old or (value is None and old is None)):
        return
    if isinstance(old, (int, float)) and isinstance(value, (int, float)) and abs(value - old) <= 1e-6:
        return
    put(document, path, value)
    assert outcome(folder, everything, json.dumps(document)) in (1, 2)


def test_twice_in_a_file(folder: Path, everything: Report) -> None:
    """A merge that kept both sides."""
    for table in ("entries", "estimators", "cases"):
        document = json.loads((folder / "good.json").read_text())
        document[table].append(document[table][0])
        assert outcome(folder, everything, json.dumps(document)) == 2


def test_an_engine_of_a_newer_pgcheck(folder: Path) -> None:
    """Entries of another engine are rows with another tag, under the same schema; this pgcheck says that it is too old."""
    document = json.loads((folder / "good.json").read_text())
    document["entries"][0]["engine"] = "quantum"
    (folder / "bad.json").write_text(json.dumps(document))
    with pytest.raises(
        UsageError, match=r"engine is 'quantum', and this pgcheck reads 'exact' and 'monte_carlo': update"
    ):
        read_baseline(folder / "bad.json")


@pytest.mark.parametrize("read", [read_baseline, read_report])
def test_files_that_cannot_be_read(read: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not there; to write it, run: pgcheck"):
        read(tmp_path / "absent.json")
    with pytest.raises(UsageError, match="cannot read"):
        read(tmp_path)
    (tmp_path / "latin").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="not a text file"):
        read(tmp_path / "latin")


# -- merging


def test_reports_of_single_estimators_make_the_report_of_all(report: Report) -> None:
    """Whoever enumerates them: alone or together, the numbers are the same to the bit."""
    problems = [find_problem(x) for x in PROBLEMS]
    singly = merged([run([find_estimator(x)], problems, suite="one") for x in ESTIMATORS], suite="small")
    for table in ("problems", "estimators", "measurements"):
        assert getattr(singly, table) == getattr(report, table), table

    def key(v: Any) -> tuple[str, str, str]:
        return v.estimator, v.check, v.problem

    assert sorted(singly.verdicts, key=key) == sorted(report.verdicts, key=key)
    with pytest.raises(UsageError, match="is given twice"):
        merged([report, report], suite="twice")
    other = [p.model_copy(update={"digest": "other"}) for p in report.problems]
    with pytest.raises(UsageError, match="two different problems"):
        merged([report, report.model_copy(update={"problems": other, "estimators": []})], suite="two")
    assert isinstance(baseline_of(singly).entries[0], ExactEntry)
