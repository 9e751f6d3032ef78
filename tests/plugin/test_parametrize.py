"""`parametrize_with_checks` as a user's test suite meets it: items, ids, outcomes, exit codes."""

from __future__ import annotations

import textwrap
from collections.abc import Callable

import pytest

pytest_plugins = "pytester"

LOSSES = """
import pgcheck
import torch

def sound(batch):
    weight = batch.discount_weight * batch.reward_to_go
    return -(weight * batch.logp * batch.mask).sum(-1).mean()

def my_loss(batch):
    r = batch.episode_return
    adv = (r - r.mean()) / (r.std() + 1e-6)
    return -(adv[:, None] * batch.logp * batch.mask).sum(-1).mean()

def random(batch):
    return -(torch.rand(()) * batch.logp * batch.mask).sum(-1).mean()
"""

CHECKS = ["unbiased", "proportional", "finite", "deterministic", "row_order", "padding_length", "reward_shift"]

Suite = Callable[..., pytest.RunResult]


@pytest.fixture
def suite(pytester: pytest.Pytester) -> Suite:
    """Run a test file that parametrizes over the arguments given; a few checks on two problems unless told otherwise."""

    def run(
        arguments: str,
        *options: str,
        problems: str = '["dialogue/two-turn", "mdp/two-state"]',
        checks: list[str] | None = CHECKS,
    ) -> pytest.RunResult:
        test = f"""
        @pgcheck.testing.parametrize_with_checks({arguments}, problems={problems}, checks={checks})
        def test_estimators(estimator, check):
            check(estimator)
        """
        pytester.makepyfile(test_mine=LOSSES + textwrap.dedent(test))
        return pytester.runpytest_inprocess("--import-mode=importlib", "-W", "error", "-ra", *options)

    return run


def test_one_item_a_check_with_readable_ids(suite: Suite) -> None:
    from pgcheck.verdicts.checks import registered_checks

    found = suite("[my_loss, sound]", "--collect-only", "-q", checks=None).outlines
    ids = [line.partition("[")[2].rstrip("]") for line in found if "test_estimators[" in line]
    assert ids == [f"{name}-{check}" for name in ("my_loss", "sound") for check in registered_checks()]


def test_what_is_not_asked_is_skipped_with_the_reason(suite: Suite) -> None:
    """A loss that claims to be unbiased is not asked whether it is proportional."""
    result = suite("[sound]")
    result.assert_outcomes(passed=5, skipped=2)
    assert result.ret == 0
    result.stdout.fnmatch_lines_random(
        [
            "SKIPPED*proportional is not asked of sound: only asked of estimators that claim it",
            "SKIPPED*reward_shift is not asked of sound: only asked of estimators that declare shift_invariant*",
        ]
    )


def test_a_failure_says_everything(suite: Suite) -> None:
    """The item that fails carries the whole message, and no frame of pgcheck."""
    result = suite("[my_loss]")
    result.assert_outcomes(passed=4, skipped=2, failed=1)
    assert result.ret == 1
    result.stdout.fnmatch_lines(["*_ test_estimators[[]my_loss-unbiased] _*"])
    for word in ("what ", "where ", "measured ", "allowed ", "cause ", "next "):
        result.stdout.fnmatch_lines([f"E*  {word}*"])
    result.stdout.fnmatch_lines(["*pgcheck compare test_mine:my_loss *"])
    result.stdout.no_fnmatch_line("*testing.py*raise*")


def test_a_call_in_a_test_shows_the_test_and_the_message(pytester: pytest.Pytester) -> None:
    """Not the hundred lines of `check_estimator`; a defect below it keeps its frames."""
    pytester.makepyfile(
        """
        import pgcheck

        def half(batch):
            return -0.5 * (batch.episode_return[:, None] * batch.logp * batch.mask).sum(-1).mean()

        def test_half():
            pgcheck.check_estimator(half, "bandit/two-arm")

        def test_refused():
            pgcheck.check_estimator(half, "bandit/none")
        """
    )
    result = pytester.runpytest_inprocess("-p", "no:cacheprovider")
    result.assert_outcomes(failed=2)
    result.stdout.fnmatch_lines(["*BiasError: half is not unbiased*", "*test_a_call*.py:*: BiasError"])
    result.stdout.no_fnmatch_line("*raise kind(*")
    result.stdout.fnmatch_lines(["*raise UnknownNameError*"])


def test_an_expected_failure_is_shown_with_its_reason(suite: Suite) -> None:
    result = suite('[my_loss], expected_failed_checks={"unbiased": "divides by the std"}')
    result.assert_outcomes(passed=4, skipped=2, xfailed=1)
    assert result.ret == 0
    result.stdout.fnmatch_lines(["XFAIL*my_loss-unbiased* - divides by the std"])


def test_an_expected_failure_that_passes_fails(suite: Suite) -> None:
    result = suite('[sound], expected_failed_checks={"unbiased": "it did once"}')
    result.assert_outcomes(passed=4, skipped=2, failed=1)
    assert result.ret == 1
    result.stdout.fnmatch_lines(["*XPASS(strict)*it did once*"])


def test_an_expected_failure_that_is_not_asked_fails(suite: Suite) -> None:
    """Its expectation is stale: a skip would hide that."""
    result = suite('[sound], expected_failed_checks={"reward_shift": "no baseline"}')
    result.assert_outcomes(passed=5, skipped=1, failed=1)
    result.stdout.fnmatch_lines(["*reward_shift is expected to fail, but it is not asked*"])


def test_an_error_is_no_expected_failure(suite: Suite) -> None:
    """A loss that breaks its contract was not expected to fail the check."""
    result = suite('[lambda batch: batch.logp], expected_failed_checks={"unbiased": "?"}', checks=["unbiased"])
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        ["*EstimatorError: on 'dialogue/two-turn': loss '<lambda>' returned a tensor of shape*"]
    )


def test_expectations_may_depend_on_the_estimator(suite: Suite) -> None:
    """As in scikit-learn: a function from the estimator, as it was given, to a mapping."""
    result = suite("[my_loss, sound], expected_failed_checks=lambda e: {'unbiased': 'std'} if e is my_loss else {}")
    result.assert_outcomes(passed=9, skipped=4, xfailed=1)


def test_a_claim_that_could_not_be_judged_fails(suite: Suite) -> None:
    """A random loss has no expectation to judge: its claim fails, it is not skipped."""
    result = suite('[random], expected_failed_checks={"deterministic": "it samples"}')
    outcomes = result.parseoutcomes()
    assert outcomes["failed"] == 1
    assert outcomes["xfailed"] == 1
    result.stdout.fnmatch_lines(["*CheckFailed: random: unbiased could not be judged.*"])
    result.stdout.fnmatch_lines(
        ["SKIPPED*row_order is not asked of random: nothing else is, because it fails determin*"]
    )


def test_a_claim_that_no_problem_can_decide_fails(suite: Suite) -> None:
    result = suite('["leave_one_out"]', checks=["unbiased"], problems='"off-policy/*"')
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*leave_one_out: nothing was checked*"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ('[sound], expected_failed_checks={"unbaised": "?"}', "Did you mean 'unbiased'"),
        ('[sound], claim="unbaised"', "expected 'unbiased', 'proportional'"),
        ("[sound, sound]", "'sound' is given twice"),
        ('["leave_one_ot"]', "Did you mean 'leave_one_out'"),
    ],
)
def test_typos_are_met_at_collection(suite: Suite, arguments: str, words: str) -> None:
    result = suite(arguments)
    result.assert_outcomes(errors=1)
    assert result.ret == 2
    result.stdout.fnmatch_lines([f"*{words}*"])


def test_moments_are_shared_between_the_items_of_an_estimator(suite: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    """One run of the engine for each estimator, however many items; failing items look for the cause once more."""
    from pgcheck import testing

    calls: list[str] = []

    def counted(estimators: list[object], *rest: object, **settings: object) -> object:
        calls.append(estimators[0].name)  # type: ignore[attr-defined]
        return run(estimators, *rest, **settings)  # type: ignore[arg-type]

    run = testing.run
    monkeypatch.setattr(testing, "run", counted)
    suite('[my_loss, sound], expected_failed_checks=lambda e: {"unbiased": "std"} if e is my_loss else {}')
    assert calls == ["my_loss", "sound"]


def test_names_claims_and_problems(suite: Suite) -> None:
    """Names of the zoo and a claim in place of their own."""
    result = suite('["batch_mean"], claim="proportional"')
    assert result.ret == 0
    result.stdout.fnmatch_lines(["SKIPPED*unbiased is not asked of batch_mean: only asked of estimators that claim it"])
    assert suite('["batch_mean"], claim="unbiased"', checks=["unbiased"]).ret == 1
