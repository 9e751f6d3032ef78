"""A run fails closed: every pair is measured, not asked with a reason, or failed; nothing is dropped in silence."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from pgcheck.batch import Batch
from pgcheck.errors import EstimatorError, UnknownNameError, UsageError
from pgcheck.estimators.base import Estimator, biased, find_estimator, from_coefficients, proportional, unbiased
from pgcheck.estimators.from_loss import from_loss
from pgcheck.estimators.lookup import FILLED_BY  # noqa: F401  (fills the registries)
from pgcheck.problem import Problem
from pgcheck.registry import find_problem
from pgcheck.runs.report import Report
from pgcheck.runs.runner import RICH_PROBLEMS, Expectation, richness, run
from pgcheck.verdicts.verdict import Status

TWO_ARM = find_problem("bandit/two-arm")
PESSIMAL = find_problem("mdp/pessimal")
DIALOGUE = find_problem("dialogue/two-turn")
ALONE = find_problem("degenerate/group-of-one")
SMALL = [TWO_ARM, PESSIMAL]


def estimator(name: str) -> Estimator:
    return find_estimator(name)


def told(report: Report) -> list[tuple[str, str, str, Status]]:
    return [(v.estimator, v.check, v.problem, v.status) for v in report.verdicts]


def per_row(x: Tensor, batch: Batch) -> Tensor:
    return x.unsqueeze(-1) * batch.mask / batch.rows


def nan_at_discount(batch: Batch) -> Tensor:
    """NaN on problems with γ < 1 only."""
    return per_row(batch.episode_return * (1.0 if batch.discount == 1 else float("nan")), batch)


def dropout(batch: Batch) -> Tensor:
    return per_row(torch.nn.functional.dropout(batch.episode_return, 0.5), batch)


def made(fn: object, **settings: object) -> Estimator:
    return from_coefficients(fn, **({"couples": "trajectory"} | settings))  # type: ignore[arg-type]


# -- what comes out


def test_a_sound_estimator() -> None:
    report = run([estimator("reinforce")], SMALL)
    assert report.exit_code == 0
    assert [(m.estimator, m.problem) for m in report.measurements] == [("reinforce", p.name) for p in SMALL]
    assert {("reinforce", "unbiased", p.name, Status.PASS) for p in SMALL} <= set(told(report))
    assert report.not_asked == []


def test_a_wrong_claim() -> None:
    wrong = made(lambda b: 2 * per_row(b.episode_return, b), name="doubled")
    report = run([wrong], SMALL)
    assert report.exit_code == 1
    assert {(v.check, v.problem, v.status) for v in report.failures} == {
        ("unbiased", p.name, Status.FAIL) for p in SMALL
    }


def test_the_same_run_without_claims_checks_no_bias() -> None:
    """No claim, no verdict on E ĝ: the pairs are not asked, and say so; they are measured all the same."""
    report = run([made(lambda b: per_row(b.episode_return, b), name="silent", claims=())], SMALL)
    assert not {v.check for v in report.verdicts} & {"unbiased", "proportional", "biased"}
    assert [(n.problem, n.reason) for n in report.not_asked] == [
        (p.name, "no claim is made under these conditions") for p in SMALL
    ]
    assert len(report.measurements) == 2


def test_groups_too_small_are_not_asked() -> None:
    report = run([estimator("grpo"), estimator("reinforce")], [ALONE, TWO_ARM])
    assert [(n.estimator, n.problem) for n in report.not_asked] == [("grpo", ALONE.name)]
    assert "groups of at least 2" in report.not_asked[0].reason  # the batch has four rows
    assert report.cell("grpo", ALONE.name) is None
    assert not [v for v in report.verdicts if (v.estimator, v.problem) == ("grpo", ALONE.name)]


@pytest.mark.parametrize("names", [["grpo"], ["grpo", "leave_one_out"]])
def test_nothing_checked(names: list[str]) -> None:
    report = run([estimator(n) for n in names], [ALONE])
    assert (report.verdicts, report.exit_code) == ([], 5)


@pytest.mark.parametrize(("estimators", "problems"), [([], SMALL), (["reinforce"], []), ([], [])])
def test_an_empty_run_checks_nothing(estimators: list[str], problems: list[Problem]) -> None:
    assert run([estimator(n) for n in estimators], problems).exit_code == 5


def test_no_checks_check_nothing() -> None:
    assert run([estimator("reinforce")], SMALL, checks=[]).exit_code == 5


# -- usage


def test_duplicates_are_refused() -> None:
    with pytest.raises(UsageError, match="estimators: 'reinforce' is given twice"):
        run([estimator("reinforce"), made(lambda b: b.mask, name="reinforce")], SMALL)
    with pytest.raises(UsageError, match="problems: 'bandit/two-arm' is given twice"):
        run([estimator("reinforce")], [TWO_ARM, PESSIMAL, TWO_ARM])


def test_an_unknown_check_is_refused() -> None:
    """Not taken for one that nobody fails."""
    with pytest.raises(UnknownNameError, match=r"unknown check 'unbiassed'\. Did you mean 'unbiased'"):
        run([estimator("reinforce")], SMALL, checks=["unbiassed", "finite"])


def test_a_wrong_declaration_is_an_error() -> None:
    mean = made(lambda b: per_row(b.episode_return - b.episode_return.mean(-1, keepdim=True), b), name="coupled")
    with pytest.raises(EstimatorError, match="declared couples='trajectory'"):
        run([mean], [DIALOGUE])


# -- fail closed


def test_nan_on_some_problems() -> None:
    """`finite` fails where it happens; the rest is measured."""
    report = run([made(nan_at_discount)], SMALL)
    assert report.exit_code == 1
    assert [(v.check, v.problem, v.status, v.measured) for v in report.failures] == [
        ("finite", PESSIMAL.name, Status.FAIL, None)
    ]
    assert "nan" in report.failures[0].reason
    assert [m.problem for m in report.measurements] == [TWO_ARM.name]
    assert ("nan_at_discount", "finite", "", Status.PASS) not in told(report)


def test_nan_does_not_hide_the_others() -> None:
    """The neighbours on the same batches are measured without it."""
    report = run([made(nan_at_discount), estimator("reinforce")], SMALL)
    assert {m.problem for m in report.measurements if m.estimator == "reinforce"} == {p.name for p in SMALL}
    assert not [v for v in report.failures if v.estimator == "reinforce"]


def test_nan_is_told_whatever_was_asked_for() -> None:
    """`checks = ["unbiased"]` is no way to leave out the problem that cannot be judged."""
    report = run([made(nan_at_discount)], SMALL, checks=["unbiased"])
    assert report.exit_code == 1
    assert [(v.check, v.problem) for v in report.failures] == [("finite", PESSIMAL.name)]


def test_too_large_is_inconclusive() -> None:
    """Named with the numbers it would take; not a pass, and exit code 1."""
    report = run([estimator("leave_one_out(batch)")], [TWO_ARM, DIALOGUE], budget=100)
    assert report.exit_code == 1
    (v,) = report.failures
    assert (v.check, v.problem, v.status, v.measured) == ("unbiased", DIALOGUE.name, Status.INCONCLUSIVE, None)
    assert "465" in v.reason
    assert [m.problem for m in report.measurements] == [TWO_ARM.name]


def test_too_large_is_told_whatever_was_asked_for() -> None:
    report = run([estimator("leave_one_out(batch)")], [TWO_ARM, DIALOGUE], budget=100, checks=["finite"])
    assert report.exit_code == 1
    assert [(v.problem, v.status) for v in report.failures] == [(DIALOGUE.name, Status.INCONCLUSIVE)]


def test_what_was_not_enumerated_is_not_finite() -> None:
    """`finite` speaks of every batch of every problem."""
    report = run([estimator("leave_one_out(batch)")], [TWO_ARM, DIALOGUE], budget=100)
    assert ("leave_one_out(batch)", "finite", "", Status.PASS) not in told(report)


def test_a_biased_claim_does_not_hide_what_was_too_large() -> None:
    """The bias shows on the small problem; the large one is inconclusive all the same."""
    claimed = made(lambda b: 2 * per_row(b.episode_return, b), name="doubled", claims=(biased("it is doubled"),))
    coupled = made(lambda b: 2 * per_row(b.episode_return, b), name="coupled", claims=claimed.claims, couples="batch")
    report = run([claimed, coupled], [TWO_ARM, DIALOGUE], budget=100)
    assert [(v.estimator, v.check, v.problem) for v in report.failures] == [("coupled", "biased", DIALOGUE.name)]


@pytest.mark.parametrize("checks", [None, ["unbiased"], ["finite"]])
def test_what_is_random_gets_that_verdict_and_no_other(checks: list[str] | None) -> None:
    """Whatever was asked for: next to a sound one, silence would be a pass."""
    report = run([made(dropout), estimator("reinforce")], SMALL, checks=checks)
    assert report.exit_code == 1
    own = [v for v in report.verdicts if v.estimator == "dropout"]
    assert [v.check for v in own if v.status is Status.FAIL] == ["deterministic"]
    assert not [v for v in own if v.check in ("unbiased", "finite")]
    assert not [m for m in report.measurements if m.estimator == "dropout"]
    assert [m for m in report.measurements if m.estimator == "reinforce"]


def test_coefficients_whose_squares_overflow() -> None:
    """Finite, but nothing that can be averaged: 1e200² is none. Never a pass, not where ∇J = 0 either."""
    huge = made(lambda b: 1e200 * per_row(b.episode_return, b), name="huge")
    for name in ("bandit/stationary", "bandit/two-arm"):
        report = run([huge], [find_problem(name)])
        assert report.exit_code == 1
        assert "unbiased" not in {v.check for v in report.verdicts if v.status is Status.PASS}


# -- which checks, and where


def test_only_the_checks_that_were_asked_for() -> None:
    report = run([estimator("leave_one_out")], [DIALOGUE], checks=["row_order", "unbiased"])
    assert {v.check for v in report.verdicts} == {"row_order", "unbiased"}


def test_a_check_that_was_not_asked_for_is_not_run() -> None:
    """Not even where it would fail: mask_respected would."""
    unmasked = from_loss(
        lambda b: -(b.episode_return[:, None] * b.logp).sum(-1).mean(), couples="trajectory", name="unmasked"
    )
    assert run([unmasked], [DIALOGUE], checks=["unbiased", "row_order"]).exit_code == 0
    assert run([unmasked], [DIALOGUE]).exit_code == 1


def test_single_batch_checks_run_on_different_problems() -> None:
    """The richest ones, none of them twice at two θ, and one with a single group: unequal groups hide what equal groups
    show, and those who splits a batch between them."""
    problems = [q for name in ("dialogue/unequal-groups", "dialogue/two-turn", "bandit/two-arm") for q in _at_two(name)]
    report = run([estimator("leave_one_out")], problems)
    where = {v.problem.partition("@")[0] for v in report.verdicts if v.check == "row_order"}
    assert where == {"dialogue/unequal-groups", "dialogue/two-turn", "bandit/two-arm"}
    assert len(where) == RICH_PROBLEMS + 1


def _at_two(name: str) -> Sequence[Problem]:
    return [find_problem(name), find_problem(name).at(1)]


def test_a_reshape_that_equal_groups_allow_is_found_out() -> None:
    """[G, P] for [P, G] where the groups are equal, right where they are not: found among both kinds."""

    def tiled(batch: Batch) -> Tensor:
        loo = estimator("leave_one_out").coefficients
        P = int(batch.group.unique().numel())
        if batch.rows % P or P == 1:
            return loo(batch)
        R = batch.episode_return.unflatten(-1, (batch.rows // P, P))
        mean = (R.sum(-2, keepdim=True) - R) / (R.shape[-2] - 1)
        return per_row((R - mean).flatten(-2), batch)

    problems = [q for name in ("dialogue/unequal-groups", "dialogue/two-turn") for q in _at_two(name)]
    report = run([made(tiled, couples="batch")], problems)
    assert {v.check for v in report.failures} == {"row_order"}


def test_richness_prefers_what_can_show_more() -> None:
    """Unequal groups over equal ones, an observation over none, ragged over straight."""
    order = ["dialogue/unequal-groups", "dialogue/two-turn", "chain/absorbing", "bandit/contextual", "bandit/two-arm"]
    values = [richness(find_problem(name)) for name in order]
    assert values == sorted(values, reverse=True)


# -- expectations


@pytest.mark.parametrize(
    ("name", "finding", "status"),
    [
        ("reinforce", "unbiased", Status.PASS),
        ("reinforce", "biased", Status.FAIL),
        ("batch_mean", "proportional", Status.PASS),
        ("batch_mean", "unbiased", Status.FAIL),
        ("batch_mean", "biased", Status.FAIL),  # a factor is told from a direction
    ],
)
def test_expectations_in_both_directions(name: str, finding: str, status: Status) -> None:
    expected = Expectation(name, TWO_ARM.name, finding)  # type: ignore[arg-type]
    report = run([estimator(name)], [TWO_ARM], expectations=[expected])
    (v,) = [v for v in report.verdicts if v.check == "expected_finding"]
    assert (v.problem, v.status) == (TWO_ARM.name, status)
    assert v.reason.startswith(f"expected {finding}, found ")
    assert report.exit_code == (0 if status is Status.PASS else 1)


def test_an_expectation_without_a_measurement_fails() -> None:
    """Not asked, or not among the problems: no measurement, no pass."""
    for where in (ALONE.name, DIALOGUE.name):
        report = run([estimator("grpo")], [ALONE, TWO_ARM], expectations=[Expectation("grpo", where, "biased")])
        (v,) = [v for v in report.verdicts if v.check == "expected_finding"]
        assert (v.status, v.measured) == (Status.FAIL, None)
        assert "no measurement" in v.reason


def test_expectations_are_judged_whatever_checks_were_asked_for() -> None:
    expected = [Expectation("reinforce", TWO_ARM.name, "biased")]
    report = run([estimator("reinforce")], [TWO_ARM], checks=["finite"], expectations=expected)
    assert report.exit_code == 1


# -- the rest


def test_neighbours_change_nothing() -> None:
    """Alone or with others on the same batches: the same numbers, to the bit."""
    names = ["leave_one_out(batch)", "cispo", "batch_mean"]
    together = run([estimator(n) for n in names], [DIALOGUE])
    for name in names:
        alone = run([estimator(name)], [DIALOGUE])
        assert alone.measurements[0] == together.cell(name, DIALOGUE.name)


def test_the_tolerance_is_passed_on() -> None:
    nearly = made(lambda b: (1 + 1e-6) * per_row(b.episode_return, b), name="nearly")
    assert run([nearly], [TWO_ARM]).exit_code == 1
    assert run([nearly], [TWO_ARM], rtol=1e-3).exit_code == 0


def test_progress_is_told() -> None:
    calls: list[tuple[str, int, int]] = []
    run([estimator("reinforce")], SMALL, progress=lambda *x: calls.append(x))
    assert [x for x in calls if x[0] == "problems"] == [("problems", 0, 2), ("problems", 1, 2)]


def test_several_claims_are_judged_each_where_it_holds() -> None:
    """Unbiased at γ = 1 and biased below, as an entry of the zoo says."""
    report = run([estimator("reward_to_go_undiscounted_weight")], SMALL)
    assert ("reward_to_go_undiscounted_weight", "unbiased", TWO_ARM.name, Status.PASS) in told(report)
    (v,) = [v for v in report.verdicts if v.check == "biased"]
    assert (v.problem, v.reason, v.status) == ("", PESSIMAL.name, Status.PASS)


def test_claims_contradict_each_other() -> None:
    """Both are judged; one of them fails."""
    both = made(lambda b: per_row(b.episode_return, b), name="both", claims=(unbiased(), proportional(0.5)))
    report = run([both], [TWO_ARM])
    assert {(v.check, v.claimed_scale) for v in report.failures} == {("proportional", 0.5)}
