"""report.json: numbers and names, valid JSON, the same bytes for the same run."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from pydantic import ValidationError

from pgcheck.errors import UsageError
from pgcheck.estimators.base import find_estimator, from_coefficients, proportional
from pgcheck.estimators.broken import BROKEN
from pgcheck.estimators.lookup import FILLED_BY  # noqa: F401  (fills the registries)
from pgcheck.registry import find_problem
from pgcheck.runs import report as rows
from pgcheck.runs.report import SCHEMA, Report
from pgcheck.runs.runner import Expectation, run
from pgcheck.verdicts.verdict import NotAsked, Status, Verdict

ESTIMATORS = ("reinforce", "batch_mean", "grpo", "reward_to_go_undiscounted_weight")
# a stationary point (no direction), NaN, groups of one (not asked) and an off-policy problem (no claim) among them
PROBLEMS = (
    *("bandit/two-arm", "bandit/stationary", "degenerate/group-of-one", "dialogue/two-turn@1"),
    *("mdp/pessimal", "off-policy/contextual-drifted"),
)


def made() -> Report:
    estimators = [find_estimator(name) for name in ESTIMATORS]
    estimators += [BROKEN[name].estimator for name in ("nan_where_all_agree", "sign_flipped", "dropout_left_on")]
    expectations = [Expectation("grpo", "bandit/two-arm", "unbiased"), Expectation("grpo", PROBLEMS[2], "biased")]
    return run(estimators, [find_problem(name) for name in PROBLEMS], suite="mixed", expectations=expectations)


@pytest.fixture(scope="module")
def report() -> Report:
    return made()


def strict(text: str) -> Any:
    """JSON as the standard has it: NaN and Infinity are errors."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} in JSON")

    return json.loads(text, parse_constant=refuse)


# -- JSON


def test_round_trip(report: Report) -> None:
    text = report.to_json()
    again = Report.model_validate_json(text)
    assert again == report
    assert again.to_json() == text


def test_it_is_json_to_the_letter(report: Report) -> None:
    """No NaN, though there are numbers that are none."""
    data = strict(report.to_json())
    assert data["schema"] == SCHEMA == "pgcheck-report/1"
    (still,) = [m for m in data["measurements"] if (m["estimator"], m["problem"]) == ("reinforce", "bandit/stationary")]
    assert [still[name] for name in ("rel", "scale", "cosine", "off_axis")] == [None] * 4
    assert [v for v in data["verdicts"] if v["measured"] is None]


def test_the_same_run_gives_the_same_bytes(report: Report) -> None:
    assert made().to_json() == report.to_json()


def test_nothing_of_the_machine_or_the_clock(report: Report) -> None:
    """Keys are those of the schema; none of them is a time, a path or a host."""
    keys = {key for row in _dicts(strict(report.to_json())) for key in row}
    assert not {k for k in keys if any(word in k for word in ("time", "date", "host", "path", "user", "seed"))}


def _dicts(x: Any) -> list[dict[str, Any]]:
    if isinstance(x, dict):
        return [x, *(d for y in x.values() for d in _dicts(y))]
    return [d for y in x for d in _dicts(y)] if isinstance(x, list) else []


def test_a_row_of_a_table_is_a_line(report: Report) -> None:
    """A changed number shows as one changed line of a diff."""
    lines = report.to_json().splitlines()
    for m in report.measurements:
        (line,) = [x for x in lines if f'"estimator": "{m.estimator}", "problem": "{m.problem}", "finding"' in x]
        assert strict(line.rstrip(","))["bias"] == m.bias


def test_numbers_survive_to_the_bit(report: Report) -> None:
    again = Report.model_validate_json(report.to_json())
    for a, b in zip(report.measurements, again.measurements, strict=True):
        assert (a.expected, a.bias, a.total_variance) == (b.expected, b.bias, b.total_variance)


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d | {"extra": 1},
        lambda d: d | {"schema": "pgcheck-report/0"},
        lambda d: {k: v for k, v in d.items() if k != "verdicts"},
        lambda d: d | {"verdicts": [d["verdicts"][0] | {"status": "MAYBE"}]},
        lambda d: d | {"measurements": [d["measurements"][0] | {"finding": "fine"}]},
    ],
)
def test_another_document_is_refused(report: Report, change: Any) -> None:
    with pytest.raises(ValidationError):
        Report.model_validate(change(strict(report.to_json())))


# -- what is in it


def test_problems_are_pinned_by_digest(report: Report) -> None:
    assert [p.name for p in report.problems] == list(PROBLEMS)
    for row in report.problems:
        problem = find_problem(row.name)
        assert row.digest == problem.digest
        assert (row.rollouts, row.contexts) == (len(problem.trajectories), problem.trajectories.contexts)
        assert row.rows == sum(row.group_sizes) == problem.rows
        assert row.gradient == problem.gradient().tolist()
        assert row.gradient_norm == pytest.approx(math.hypot(*(x for line in row.gradient for x in line)), rel=1e-14)


def test_a_changed_problem_has_another_digest() -> None:
    """A reward, a logit, γ or the sampling plan."""
    base = find_problem("dialogue/two-turn")
    others = [base.at(1), base.with_sampling(groups=1, group_size=4), find_problem("dialogue/two-turn-0.9")]
    assert len({p.digest for p in [base, *others]}) == 4
    assert rows.problem_row(base).digest == rows.problem_row(find_problem("dialogue/two-turn")).digest


def test_estimators_carry_their_claims(report: Report) -> None:
    row = next(e for e in report.estimators if e.name == "reward_to_go_undiscounted_weight")
    assert [(c.kind, c.conditions) for c in row.claims] == [
        ("unbiased", ["on-policy", "γ = 1", "return alone"]),
        ("biased", ["on-policy", "γ < 1", "return alone"]),
    ]
    assert row.claims[1].reason
    assert row.formula
    assert row.reference


def test_the_claimed_factor_is_in_the_verdicts(report: Report) -> None:
    """(B − 1)/B: 3/4 at B = 4, 2/3 at B = 3."""
    own = [v for v in report.verdicts if (v.estimator, v.check) == ("batch_mean", "proportional")]
    scales = {v.problem: v.claimed_scale for v in own}
    assert (scales["bandit/two-arm"], scales["bandit/stationary"]) == pytest.approx((3 / 4, 2 / 3))


@pytest.mark.parametrize("scale", [0.5, 1])
def test_a_claimed_number_is_told(scale: float) -> None:
    e = from_coefficients(lambda b: b.mask, claims=(proportional(scale),))
    assert rows.estimator_row(e).claims[0].scale == scale


def test_every_measurement_says_where_it_is_worst(report: Report) -> None:
    by_name = {p.name: p for p in report.problems}
    for m in report.measurements:
        truth = by_name[m.problem].gradient
        gaps = [abs(a - b) for x, y in zip(m.expected, truth, strict=True) for a, b in zip(x, y, strict=True)]
        assert abs(m.expected[m.worst_context][m.worst_action] - truth[m.worst_context][m.worst_action]) == max(gaps)
        assert m.bias == pytest.approx(math.hypot(*gaps), rel=1e-12, abs=1e-300)


def test_positions_add_up(report: Report) -> None:
    """The parts of ∇J along itself sum to 1, those of E ĝ to its scale; null where there is no direction."""
    by_name = {p.name: p for p in report.problems}
    for p in report.problems:
        assert len(p.by_step) == p.steps
        if p.gradient_norm > 0:
            assert math.fsum(x for x in p.by_step if x is not None) == pytest.approx(1, rel=1e-12)
        else:
            assert p.by_step == [None] * p.steps
    for m in report.measurements:
        assert len(m.by_step) == by_name[m.problem].steps
        along = [s.along for s in m.by_step]
        if m.scale is None:
            assert along == [None] * len(along)
        else:
            assert math.fsum(x for x in along if x is not None) == pytest.approx(m.scale, rel=1e-11, abs=1e-12)
        if len(along) == 1 and m.rel is not None:  # one position has all of the bias
            assert m.by_step[0].gap == pytest.approx(m.rel, rel=1e-9, abs=1e-14)


def test_the_position_at_fault(report: Report) -> None:
    """mdp/pessimal pays γ·1 for a₁ at t = 0 and −.75 γ for a₁ at t = 1: 4 and −3 quarters of γ.

    Without γ^t = ½ at t = 1, the second is twice what it should be.
    """
    (row,) = [p for p in report.problems if p.name == "mdp/pessimal"]
    assert row.by_step == pytest.approx([4, -3], rel=1e-12)
    cell = report.cell("reward_to_go_undiscounted_weight", "mdp/pessimal")
    assert cell is not None
    assert [s.along for s in cell.by_step] == pytest.approx([4, -6], rel=1e-12)
    assert [s.gap for s in cell.by_step] == pytest.approx([0, 3], rel=1e-12, abs=1e-12)


def test_a_cell(report: Report) -> None:
    cell = report.cell("reinforce", "bandit/two-arm")
    assert cell is not None
    assert (cell.finding, cell.batches) == ("unbiased", None)
    assert report.cell("grpo", "degenerate/group-of-one") is None
    assert report.cell("nobody", "bandit/two-arm") is None


# -- counting


def verdict(status: Status) -> rows.VerdictRow:
    return rows.verdict_row(Verdict("e", "unbiased", "p", status, math.nan, 1e-9))


def with_verdicts(*statuses: Status) -> Report:
    empty: dict[str, Any] = {"problems": [], "estimators": [], "measurements": [], "not_asked": []}
    return Report(suite="s", version="0", verdicts=[verdict(s) for s in statuses], **empty)


@pytest.mark.parametrize(
    ("statuses", "code", "failures"),
    [
        ([], 5, 0),
        (["PASS"], 0, 0),
        (["PASS", "FAIL"], 1, 1),
        (["PASS", "INCONCLUSIVE"], 1, 1),
        (["FAIL", "INCONCLUSIVE"], 1, 2),
    ],
)
def test_exit_codes(statuses: list[str], code: int, failures: int) -> None:
    report = with_verdicts(*map(Status, statuses))
    assert (report.exit_code, len(report.failures)) == (code, failures)
    assert sum(report.count().values()) == len(statuses)


def test_rows_of_what_was_not_asked() -> None:
    row = rows.not_asked_row(NotAsked("e", "p", "because"))
    assert (row.estimator, row.problem, row.reason) == ("e", "p", "because")


def test_a_report_is_frozen(report: Report) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        report.suite = "another"  # type: ignore[misc]
    assert not issubclass(ValidationError, UsageError)
