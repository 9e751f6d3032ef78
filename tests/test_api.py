"""The library's doors: what goes in, what comes out, what the messages say, and what is left alone."""

from __future__ import annotations

import functools
import inspect
import math
import random
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

import pgcheck
from pgcheck import Batch
from pgcheck.registry import registered_problems

SOUND_PROBLEM = "dialogue/two-turn"


def reinforce(batch: Batch) -> Tensor:
    return -(batch.episode_return[:, None] * batch.logp * batch.mask).sum(-1).mean()


DOUBLES = {
    "bandit/extreme", "mdp/two-state-0.9", "mdp/two-state-0.5", "dialogue/two-turn-0.9", "tree/tokens", "tree/tokens-0.8",
    "tree/extreme", "off-policy/two-state-drifted", "off-policy/tree-stale",
}  # fmt: skip  # what they show, others show (tests/quality/test_minimal.py)


def grpo_like(batch: Batch) -> Tensor:
    """The first loss of the README: divides by the standard deviation of the batch."""
    r = batch.episode_return
    adv = (r - r.mean()) / (r.std() + 1e-6)
    return -(adv[:, None] * batch.logp * batch.mask).sum(-1).mean()


def flipped(batch: Batch) -> Tensor:
    return -reinforce(batch)


def summed(batch: Batch) -> Tensor:
    return reinforce(batch) * batch.rows


def unmasked(batch: Batch) -> Tensor:
    return -(batch.episode_return[:, None] * batch.logp).sum(-1).mean()


def own_mdp(**changes: Any) -> pgcheck.TabularMDP:
    """Two states, two actions, two steps; action 1 in state 0 pays, state 1 pays 1."""
    transition = [[[0.5, 0.5], [0.0, 1.0]], [[1.0, 0.0], [0.0, 1.0]]]
    given: dict[str, Any] = {
        "transition": transition,
        "reward": [[0.0, 2.0], [1.0, 1.0]],
        "initial": [1.0, 0.0],
        "horizon": 2,
        "discount": 0.9,
    }
    return pgcheck.TabularMDP(**(given | changes))


LOGITS = [[0.3, -0.1], [0.0, 0.4]]


def own_problem(**changes: Any) -> pgcheck.Problem:
    return pgcheck.Problem(own_mdp(), LOGITS, **({"groups": 1, "group_size": 2, "name": "mine/two-state"} | changes))


# -- the public names


@pytest.mark.parametrize("name", pgcheck.__all__)
def test_public_names_can_be_imported_and_are_documented(name: str) -> None:
    found = getattr(pgcheck, name)
    assert inspect.getdoc(found)
    assert name in dir(pgcheck)


def test_every_function_says_what_its_arguments_are() -> None:
    """Each is named in the docstring of the module, the function or its types."""
    for name in ("check_estimator", "from_loss"):
        fn = getattr(pgcheck, name)
        doc = inspect.getdoc(fn) or ""
        for argument in inspect.signature(fn).parameters:
            assert f"{argument}:" in doc or argument in ("claims", "settings"), f"{name}({argument})"


@pytest.mark.parametrize("name", ["check_estimator", "compare", "moments", "from_loss", "from_coefficients", "Problem"])
def test_two_positional_arguments_at_most(name: str) -> None:
    kinds = [p.kind for p in inspect.signature(getattr(pgcheck, name)).parameters.values()]
    assert kinds.count(inspect.Parameter.POSITIONAL_OR_KEYWORD) <= 2


def test_no_other_names() -> None:
    with pytest.raises(AttributeError, match="no attribute 'check_estimators'"):
        pgcheck.check_estimators  # type: ignore[attr-defined]  # noqa: B018


def test_importing_pgcheck_waits_for_nothing() -> None:
    """Names come on first use; torch and pandas are not imported before."""
    code = "import sys, pgcheck; assert not {'torch', 'pandas', 'scipy', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_exception_tree() -> None:
    """A mistake is a ValueError, a verdict an AssertionError; one base for all."""
    assert issubclass(pgcheck.BiasError, pgcheck.CheckFailed)
    assert issubclass(pgcheck.CheckFailed, AssertionError)
    assert issubclass(pgcheck.NotFiniteError, pgcheck.EstimatorError)
    for name in ("ProblemError", "EstimatorError", "SuiteError", "UnknownNameError", "BudgetError"):
        assert issubclass(getattr(pgcheck, name), pgcheck.UsageError)
    assert issubclass(pgcheck.UsageError, ValueError)
    assert not issubclass(pgcheck.CheckFailed, ValueError)
    for name in pgcheck.__all__:
        if name.endswith(("Error", "Failed")):
            assert issubclass(getattr(pgcheck, name), pgcheck.PgcheckError)


# -- check_estimator


@pytest.mark.parametrize(
    "estimator",
    ["reinforce", "rloo", reinforce, pgcheck.from_loss(reinforce, couples="trajectory"), pgcheck.as_estimator("grpo")],
    ids=["name", "alias", "loss", "from_loss", "estimator"],
)
def test_what_holds_returns_a_report(estimator: Any) -> None:
    report = pgcheck.check_estimator(estimator, SOUND_PROBLEM)
    assert isinstance(report, pgcheck.Report)
    assert report.exit_code == 0
    assert [p.name for p in report.problems] == [SOUND_PROBLEM]


def test_coefficients_of_ones_own() -> None:
    def rloo(batch: Batch) -> Tensor:
        R, n = batch.episode_return, batch.same_group.sum(-1) - 1
        others = ((batch.same_group @ R.unsqueeze(-1)).squeeze(-1) - R) / n
        return (R - others).unsqueeze(-1) * batch.mask / batch.rows

    estimator = pgcheck.from_coefficients(rloo, couples="group")
    assert estimator.name == "rloo"
    assert pgcheck.check_estimator(estimator, SOUND_PROBLEM).exit_code == 0


def test_the_default_is_every_on_policy_problem_at_two_thetas() -> None:
    report = pgcheck.check_estimator("reinforce", checks=["unbiased"])
    judged = [p.name for p in report.problems]
    assert judged == [x for name in judged[::2] for x in (name, f"{name}@1")]
    others = ("off-policy/", "kl/", "entropy/", "notes/")
    apart = {name for name in registered_problems() if name.startswith(others)} | DOUBLES
    apart |= {name for name in registered_problems() if name.startswith("lm/") and name != "lm/parity"}
    assert set(judged[::2]) == set(registered_problems()) - apart


@pytest.mark.parametrize(
    ("problems", "names"),
    [
        ("off-policy", {n for n in registered_problems() if n.startswith("off-policy/")} - DOUBLES),
        ("penalized", {n for n in registered_problems() if n.startswith(("kl/", "entropy/"))}),
        ("all", {n for n in registered_problems() if not n.startswith(("notes/", "lm/"))} - DOUBLES | {"lm/parity"}),
        ("notes/*", {n for n in registered_problems() if n.startswith("notes/")}),
        ("mdp/*", {n for n in registered_problems() if n.startswith("mdp/")}),
        (["bandit/two-arm", "mdp/pessimal"], {"bandit/two-arm", "mdp/pessimal"}),
    ],
)
def test_sets_of_problems(problems: Any, names: set[str]) -> None:
    found = pgcheck.as_problems(problems)
    assert {p.name.partition("@")[0] for p in found} == names


def test_a_problem_of_ones_own() -> None:
    problem = own_problem()
    assert pgcheck.as_problems(problem) == [problem]
    assert pgcheck.check_estimator("leave_one_out", problem).problems[0].name == "mine/two-state"
    both = pgcheck.as_problems([problem, "bandit/two-arm"])
    assert [p.name for p in both] == ["mine/two-state", "bandit/two-arm"]


def test_a_wrong_loss_raises() -> None:
    with pytest.raises(pgcheck.BiasError) as caught:
        pgcheck.check_estimator(grpo_like, SOUND_PROBLEM)
    assert isinstance(caught.value.report, pgcheck.Report)
    assert caught.value.report.exit_code == 1
    assert caught.value.report.failures


def test_a_check_that_is_not_about_bias_raises_its_base() -> None:
    with pytest.raises(pgcheck.CheckFailed, match="unmasked fails mask_respected") as caught:
        pgcheck.check_estimator(unmasked, SOUND_PROBLEM)
    assert not isinstance(caught.value, pgcheck.BiasError)


@pytest.mark.parametrize("claim", ["proportional", pgcheck.proportional(), pgcheck.proportional(lambda p: p.rows)])
def test_another_claim(claim: Any) -> None:
    """The sum over rows is B times the gradient: not unbiased, but proportional."""
    with pytest.raises(pgcheck.BiasError, match="not unbiased"):
        pgcheck.check_estimator(summed, SOUND_PROBLEM)
    assert pgcheck.check_estimator(summed, SOUND_PROBLEM, claim=claim).exit_code == 0


def test_a_claim_of_bias_is_a_claim() -> None:
    """No bias found: the claim is stale, and that is an error as well."""
    assert pgcheck.check_estimator("grpo", SOUND_PROBLEM, claim=pgcheck.biased("std")).exit_code == 0
    with pytest.raises(pgcheck.BiasError, match="claims to be biased, but no bias was found"):
        pgcheck.check_estimator("reinforce", SOUND_PROBLEM, claim=pgcheck.biased("it is not"))


def ppo_like(batch: Batch, *, pessimistic: Callable[..., Tensor]) -> Tensor:
    """GRPO's loss, written with the maximum of two losses (or with another choice between them)."""
    same = (batch.group[:, None] == batch.group[None, :]).to(batch.reward.dtype)
    R, n = batch.episode_return, same.sum(1)
    mean = same @ R / n
    std = ((R[None, :] - mean[:, None]) ** 2 * same).sum(1).div(n).sqrt()
    adv = ((R - mean) / (std + 1e-6))[:, None]
    ratio = (batch.logp - batch.behavior_logp).exp()
    loss = pessimistic(-adv * ratio, -adv * ratio.clamp(0.8, 1.2))
    return ((loss * batch.mask).sum(-1) / batch.length).mean()


def test_an_implementation_is_held_to_what_it_implements() -> None:
    """On off-policy problems too; its claims are those of the published one, bias and all."""
    right, wrong = (functools.partial(ppo_like, pessimistic=f) for f in (torch.maximum, torch.minimum))
    where = ["dialogue/two-turn", "off-policy/dialogue-stale"]
    report = pgcheck.check_estimator(right, where, same_as="grpo")
    assert {v.problem for v in report.verdicts if v.check == "same_as"} == set(where)
    assert [v.check for v in report.verdicts if v.check in ("unbiased", "biased")] == ["biased", "biased"]
    with pytest.raises(pgcheck.CheckFailed) as caught:
        pgcheck.check_estimator(wrong, where, same_as="grpo")
    assert {(v.check, v.problem) for v in caught.value.report.failures} == {("same_as", "off-policy/dialogue-stale")}


def test_the_name_of_what_it_implements_is_looked_up() -> None:
    with pytest.raises(pgcheck.UsageError, match=r"unknown estimator 'grop'\. Did you mean 'grpo'"):
        pgcheck.check_estimator(reinforce, same_as="grop")
    pgcheck.check_estimator(reinforce, SOUND_PROBLEM, same_as="rloo", claim="unbiased", checks=["unbiased"])


def test_some_checks() -> None:
    report = pgcheck.check_estimator(unmasked, SOUND_PROBLEM, checks=["unbiased", "row_order"])
    assert {v.check for v in report.verdicts} == {"unbiased", "row_order"}


def test_a_tolerance() -> None:
    def nearly(batch: Batch) -> Tensor:
        return (1 + 1e-6) * reinforce(batch)

    with pytest.raises(pgcheck.BiasError):
        pgcheck.check_estimator(nearly, SOUND_PROBLEM)
    assert pgcheck.check_estimator(nearly, SOUND_PROBLEM, rtol=1e-3).exit_code == 0


def test_too_large_for_the_budget_is_not_a_pass() -> None:
    """465 multisets of two groups of two: C(30 + 1, 2)."""
    with pytest.raises(pgcheck.CheckFailed, match=r"INCONCLUSIVE(.|\n)*465"):
        pgcheck.check_estimator(reinforce, SOUND_PROBLEM, budget=100)


@pytest.mark.parametrize(
    ("estimator", "problems", "settings"),
    [
        ("grpo", "degenerate/group-of-one", {}),  # groups too small
        ("reinforce", "off-policy/tree-stale", {}),  # no claim off-policy
        ("reinforce", [], {}),
        ("reinforce", SOUND_PROBLEM, {"checks": []}),
        (
            pgcheck.from_coefficients(lambda b: b.mask, claims=(), name="silent"),
            SOUND_PROBLEM,
            {"checks": ["unbiased"]},
        ),
    ],
)
def test_nothing_checked_is_not_a_pass(estimator: Any, problems: Any, settings: dict[str, Any]) -> None:
    with pytest.raises(pgcheck.CheckFailed, match="nothing was checked") as caught:
        pgcheck.check_estimator(estimator, problems, **settings)
    assert not caught.value.report.failures


# -- messages


def message(fn: Callable[[], Any]) -> str:
    with pytest.raises(pgcheck.CheckFailed) as caught:
        fn()
    return str(caught.value)


def lines(text: str) -> dict[str, str]:
    """The labelled lines of a message."""
    pairs = [line[2:].split(maxsplit=1) for line in text.splitlines() if line.startswith("  ")]
    return {pair[0]: pair[1] for pair in pairs}


def test_what_a_bias_message_says() -> None:
    """What, where, measured, allowed, most likely cause, next command."""
    text = message(lambda: pgcheck.check_estimator(flipped, ["bandit/two-arm", "mdp/pessimal", SOUND_PROBLEM]))
    assert text.startswith("flipped is not unbiased: 3 of 3 problems contradict the claim.\n")
    said = lines(text)
    assert list(said) == ["what", "where", "measured", "allowed", "cause", "next"]
    assert "E ĝ = ∇J does not hold on" in said["what"]
    assert "exact" in said["what"]
    assert "context" in said["where"]
    assert "∇J = " in said["where"]
    assert all(word in said["measured"] for word in ("rel 2", "scale -1", "cosine -1", "off_axis"))
    assert said["allowed"] == "1e-09"
    assert "sign is flipped" in said["cause"]
    assert said["next"].startswith("pgcheck compare ")
    assert ":flipped 'reward_to_go' --problem " in said["next"]


def test_the_numbers_of_a_message_by_hand() -> None:
    """π(a₁) = .9, r = (1, 0): ∇J = ±.09, and −∇J is 2 ‖∇J‖ away from it; E‖ĝ‖² of B = 4 rows is below."""
    said = lines(message(lambda: pgcheck.check_estimator(flipped, "bandit/two-arm")))
    assert "E ĝ = -0.09, ∇J = +0.09" in said["where"]
    # one row: E‖R S‖² = .9 · 2 · .1² = .018; ‖∇J‖² = .0162; four rows: .0162 + (.018 − .0162)/4 = .01665
    share = 2 * math.sqrt(0.0162) / math.sqrt(0.01665)
    assert said["measured"].startswith(f"{share:.4g} of max(‖∇J‖, √E‖ĝ‖²)")


def test_a_factor_alone_is_noted() -> None:
    text = message(lambda: pgcheck.check_estimator(summed, [SOUND_PROBLEM, "bandit/two-arm", "mdp/two-state"]))
    assert "summed over rows where the mean is meant" in lines(text)["cause"]
    assert "claim proportional()" in lines(text)["note"]


def test_a_known_estimator_is_recognised() -> None:
    """Without γ^t it is a well-known one; the next command compares with that."""

    def no_discount_weight(batch: Batch) -> Tensor:
        return -(batch.reward_to_go * batch.logp * batch.mask).sum(-1).mean()

    said = lines(message(lambda: pgcheck.check_estimator(no_discount_weight, ["mdp/*", "chain/*"])))
    assert "`reward_to_go_undiscounted_weight`" in said["cause"]
    assert '"reward_to_go_undiscounted_weight"' in said["next"]


def test_an_unknown_one_is_told_by_where_it_is_wrong() -> None:
    """Squared returns: not the expectation of anything known, and wrong wherever it was tried."""

    def squared(batch: Batch) -> Tensor:
        return -((batch.episode_return**2 + batch.episode_return)[:, None] * batch.logp * batch.mask).sum(-1).mean()

    said = lines(message(lambda: pgcheck.check_estimator(squared, ["bandit/contextual", SOUND_PROBLEM])))
    assert said["cause"] == "no known estimator has this expectation"


def test_a_standardised_return_is_recognised_whatever_its_epsilon() -> None:
    """torch.std divides by B − 1: a factor √((B−1)/B) of the shelf's, to the ε in the divisor."""
    said = lines(message(lambda: pgcheck.check_estimator(grpo_like, ["bandit/contextual", SOUND_PROBLEM])))
    assert "√((B−1)/B) × `divided_by_std_of_the_batch`" in said["cause"]
    assert "%" in said["cause"]


def test_what_another_message_says() -> None:
    text = message(lambda: pgcheck.check_estimator(unmasked, SOUND_PROBLEM))
    said = lines(text)
    assert list(said) == ["what", "where", "measured", "allowed", "next"]
    assert "mask 0" in said["what"]
    assert said["where"] == SOUND_PROBLEM
    assert said["next"] == "pgcheck explain mask_respected"


def test_all_that_failed_is_in_the_message() -> None:
    def twice_wrong(batch: Batch) -> Tensor:
        return -(batch.episode_return[:, None] * batch.logp).mean()

    text = message(lambda: pgcheck.check_estimator(twice_wrong, SOUND_PROBLEM))
    assert "twice_wrong is not unbiased" in text
    for check in ("mask_respected", "padding_length"):
        assert f"twice_wrong fails {check}." in text


def test_a_random_loss_is_named_so() -> None:
    def noisy(batch: Batch) -> Tensor:
        return (
            -(torch.nn.functional.dropout(batch.episode_return, 0.5)[:, None] * batch.logp * batch.mask).sum(-1).mean()
        )

    for checks in (None, ["unbiased"]):
        text = message(lambda checks=checks: pgcheck.check_estimator(noisy, SOUND_PROBLEM, checks=checks))  # type: ignore[misc]
        assert "noisy fails deterministic" in text
        assert "draws random numbers" in text


# -- losses that break


def test_nan_on_some_batches_names_the_batch() -> None:
    """0/0 where all returns agree: a failed check that shows the first such batch."""

    def no_epsilon(batch: Batch) -> Tensor:
        r = batch.episode_return
        return -(((r - r.mean()) / r.std())[:, None] * batch.logp * batch.mask).sum(-1).mean()

    text = message(lambda: pgcheck.check_estimator(no_epsilon, "degenerate/all-equal"))
    assert "no_epsilon fails finite" in text
    rows = [line.split() for line in text.splitlines() if line.endswith("nan")]
    assert [(row[0], row[1], row[3:]) for row in rows] == [(str(i), str(i // 3), ["1", "nan"]) for i in range(6)]
    assert "standard deviation" in text


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (lambda b: (b.episode_return[:, None] * b.logp.detach() * b.mask).mean(), "has no gradient"),
        (lambda b: b.episode_return.mean(), "has no gradient"),
        (lambda b: (b.episode_return[:, None] * b.logp * b.mask).sum(-1), r"shape \[4\], not a scalar"),
        (lambda b: 3.0, "returned float, not a torch tensor"),
        (lambda b: None, "returned None, not a torch tensor"),
    ],
)
def test_what_is_no_loss(loss: Callable[[Batch], Any], words: str) -> None:
    with pytest.raises(pgcheck.EstimatorError, match=words):
        pgcheck.check_estimator(loss, SOUND_PROBLEM)


@pytest.mark.parametrize(
    ("coefficients", "words"),
    [
        (lambda b: b.episode_return, r"shape \[\d+, 4\], expected \[\d+, 4, 3\]"),
        (lambda b: 1.0, "returned float, not a torch tensor"),
    ],
)
def test_what_are_no_coefficients(coefficients: Any, words: str) -> None:
    with pytest.raises(pgcheck.EstimatorError, match=words):
        pgcheck.check_estimator(pgcheck.from_coefficients(coefficients), SOUND_PROBLEM)


def test_an_error_of_the_loss_names_loss_problem_line_and_shape() -> None:
    """The user's own exception is its cause."""

    def typo(batch: Batch) -> Tensor:
        return batch.rewards.sum()  # type: ignore[attr-defined, no-any-return]

    words = r"loss 'typo' raises at test_api\.py:\d+, on a batch \[B, T\] = \[4, 3\]: AttributeError: .*'rewards'"
    with pytest.raises(pgcheck.EstimatorError, match=f"on '{SOUND_PROBLEM}': {words}") as caught:
        pgcheck.check_estimator(typo, SOUND_PROBLEM)
    assert isinstance(caught.value.__cause__, AttributeError)


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        (lambda: pgcheck.check_estimator("reinforc"), pgcheck.UnknownNameError, "Did you mean 'reinforce'"),
        (lambda: pgcheck.check_estimator("no_module_of_that_name:f"), pgcheck.UsageError, "no_module_of_that_name"),
        (lambda: pgcheck.check_estimator("pgcheck.api:nothing"), pgcheck.UsageError, "has no attribute 'nothing'"),
        (lambda: pgcheck.check_estimator(3), pgcheck.EstimatorError, "3 is neither"),  # type: ignore[arg-type]
        (lambda: pgcheck.check_estimator("reinforce", "bandit/two"), pgcheck.UnknownNameError, "bandit/two-arm"),
        (lambda: pgcheck.check_estimator("reinforce", claim="unbised"), pgcheck.UsageError, "claim: 'unbised'"),
        (
            lambda: pgcheck.check_estimator("reinforce", "bandit/two-arm", checks=["unbiassed"]),
            pgcheck.UnknownNameError,
            "Did you mean 'unbiased'",
        ),
        (
            lambda: pgcheck.check_estimator("reinforce", ["bandit/two-arm", "bandit/two-arm"]),
            pgcheck.UsageError,
            "'bandit/two-arm' is given twice",
        ),
        (
            lambda: pgcheck.moments("reinforce", "bandit/two-arm", engine="guess"),  # type: ignore[arg-type]
            pgcheck.UsageError,
            "engine: 'guess'",
        ),
        (lambda: pgcheck.moments("reinforce", "bandit/*"), pgcheck.UsageError, "bandit"),
        (lambda: pgcheck.compare(["reinforce", "grpoo"], "bandit/two-arm"), pgcheck.UnknownNameError, "'grpo'"),
    ],
)
def test_input_that_cannot_be_used(call: Callable[[], Any], kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        call()


# -- what a loss may be


def test_a_loss_that_reads_logits_gets_them() -> None:
    """An entropy bonus: weight on actions not drawn; the leaf is found out."""

    def with_entropy(batch: Batch, weight: float = 0.1) -> Tensor:
        every = torch.log_softmax(batch.logits, -1)
        entropy = -(every.exp() * every).sum(-1)
        return reinforce(batch) - weight * (entropy * batch.mask).sum(-1).mean()

    assert pgcheck.as_estimator(with_entropy).leaf == "logits"
    assert pgcheck.as_estimator(reinforce).leaf == "logp"
    with pytest.raises(pgcheck.BiasError):
        pgcheck.check_estimator(with_entropy, SOUND_PROBLEM)

    def weightless(batch: Batch) -> Tensor:
        return with_entropy(batch, weight=0.0)

    assert pgcheck.check_estimator(weightless, SOUND_PROBLEM).exit_code == 0


def test_leaf_logits_and_leaf_logp_give_the_same_moments() -> None:
    by_logp = pgcheck.moments(pgcheck.from_loss(reinforce, leaf="logp"), SOUND_PROBLEM)
    by_logits = pgcheck.moments(pgcheck.from_loss(reinforce, leaf="logits"), SOUND_PROBLEM)
    torch.testing.assert_close(by_logits.mean, by_logp.mean, rtol=0, atol=1e-15)
    torch.testing.assert_close(by_logits.covariance, by_logp.covariance, rtol=0, atol=1e-15)


def test_an_object_that_can_be_called() -> None:
    class Loss:
        def __call__(self, batch: Batch) -> Tensor:
            return reinforce(batch)

    report = pgcheck.check_estimator(Loss(), SOUND_PROBLEM)
    assert report.estimators[0].name == "Loss"


def test_no_error_at_the_probe_is_swallowed() -> None:
    """What fails on the problem that a loss is tried on first, and nowhere else, is judged elsewhere as it is."""

    def three_rows_only(batch: Batch) -> Tensor:
        if batch.rows != 3:
            raise NotImplementedError
        return reinforce(batch)

    assert pgcheck.check_estimator(three_rows_only, "mdp/two-state").exit_code == 0
    with pytest.raises(pgcheck.EstimatorError, match=r"'three_rows_only' raises at .*: NotImplementedError$"):
        pgcheck.check_estimator(three_rows_only, SOUND_PROBLEM)


# -- compare and moments


COLUMNS = ["estimator", "problem", "finding", "rel", "scale", "cosine", "off_axis", "bias", "variance", "mse", "snr"]

ENDS = [f"{name}_{end}" for name in ("rel", "scale", "bias", "variance", "mse", "snr") for end in ("low", "high")]
RELATIVE = [
    *(f"{name}{end}" for name in ("ratio", "batches_to_match", "rollouts_to_match") for end in ("_low", "", "_high")),
    *("better", "break_even", "break_even_low", "break_even_high", "better_per_rollout"),
    *(f"break_even_rollouts{end}" for end in ("", "_low", "_high")),
]  # fmt: skip


def test_compare() -> None:
    table = pgcheck.compare(["rloo", "grpo", grpo_like], [SOUND_PROBLEM, "bandit/two-arm"])
    assert isinstance(table, pd.DataFrame)
    assert list(table.columns) == [*COLUMNS, "batches", "cost", *ENDS, "relative_to", *RELATIVE]
    for name in ("scale", "rel", "variance", "mse", "snr", "ratio", "rollouts_to_match"):
        for end in ("low", "high"):
            assert list(table[f"{name}_{end}"]) == list(table[name])  # exact
    assert list(table["estimator"]) == ["leave_one_out", "grpo", "grpo_like"] * 2
    assert list(table["problem"]) == [SOUND_PROBLEM] * 3 + ["bandit/two-arm"] * 3
    assert table["batches"].isna().all()
    assert list(table["finding"][:3]) == ["unbiased", "biased", "biased"]
    assert table["mse"].to_numpy() == pytest.approx((table["bias"] ** 2 + table["variance"]).to_numpy())


def test_compare_by_hand() -> None:
    """Two arms, p = .9, r = (1, 0), B = 4. In z₁ alone one row of REINFORCE has variance p(1−p)² − (p(1−p))² = .0009;
    with V = .9 it has p(1−p)(2p−1)² − … = .0576; in both coordinates the double; four rows, a quarter."""
    table = pgcheck.compare(["reinforce", "baselined(value)"], "bandit/two-arm").set_index("estimator")
    assert table["variance"]["reinforce"] == pytest.approx(2 * 0.0009 / 4, abs=1e-15)
    assert table["variance"]["baselined(value)"] == pytest.approx(2 * 0.0576 / 4, abs=1e-15)
    assert table["mse"]["reinforce"] == pytest.approx(0.00045, abs=1e-15)
    # ‖∇J‖ = .09 √2
    assert table["snr"]["reinforce"] == pytest.approx(0.09 * math.sqrt(2) / math.sqrt(0.00045))


def test_compare_asks_no_claims() -> None:
    """It measures off-policy and on groups of one as well."""
    table = pgcheck.compare(["reinforce"], ["off-policy/contextual-drifted", "degenerate/group-of-one"])
    assert list(table["finding"]) == ["biased", "unbiased"]


@pytest.mark.parametrize(
    ("estimators", "problems", "name"),
    [
        ([reinforce, reinforce], "bandit/two-arm", "reinforce"),
        ([lambda b: reinforce(b), lambda b: 2 * reinforce(b)], "bandit/two-arm", "<lambda>"),
        (["rloo", "leave_one_out"], "bandit/two-arm", "leave_one_out"),
        (["rloo"], ["bandit/two-arm", "bandit/*"], "bandit/two-arm"),
    ],
)
def test_compare_refuses_rows_that_could_not_be_told_apart(estimators: list[Any], problems: Any, name: str) -> None:
    """As a run does: a table with one name for two losses says nothing of either."""
    with pytest.raises(pgcheck.UsageError, match=f"'{name}' is given twice"):
        pgcheck.compare(estimators, problems)


def test_moments() -> None:
    problem = own_problem()
    found = pgcheck.moments("leave_one_out", problem, engine="exact")
    torch.testing.assert_close(found.mean, problem.gradient(), rtol=0, atol=1e-14)
    assert found.batches is None
    assert tuple(found.covariance.shape) == (4, 4)
    assert found.total_variance == pytest.approx(float(found.covariance.trace()))
    mean, covariance = found.in_parameters()
    torch.testing.assert_close(mean, problem.parameter_gradient(), rtol=0, atol=1e-14)
    assert tuple(covariance.shape) == (4, 4)


def test_moments_refuse_what_does_not_fit() -> None:
    with pytest.raises(pgcheck.BudgetError, match="465"):
        pgcheck.moments(reinforce, SOUND_PROBLEM, budget=100)


# -- problems of one's own


def test_a_problem_by_hand() -> None:
    """From state 0: with p₀ = π(a₁|0), J = 2 p₀ + .9 E[second reward]; state 1 pays 1, state 0 pays 2 p₀ again.

    P(s₁ = 1) = p₀ + (1 − p₀)/2, so J = 2 p₀ + .9 ((1 + p₀)/2 + (1 − p₀)/2 · 2 p₀).
    """
    problem = own_problem()
    p = 1 / (1 + math.exp(0.3 + 0.1))
    assert problem.value() == pytest.approx(2 * p + 0.9 * ((1 + p) / 2 + (1 - p) * p), abs=1e-14)
    # dJ/dp · p (1 − p); state 1 pays the same for both actions
    slope = (2 + 0.9 * (0.5 + 1 - 2 * p)) * p * (1 - p)
    assert problem.gradient().flatten().tolist() == pytest.approx([-slope, slope, 0.0, 0.0], abs=1e-14)
    assert problem.parameter_gradient().tolist() == pytest.approx(problem.gradient().flatten().tolist(), abs=1e-15)


def test_off_policy_of_ones_own() -> None:
    problem = own_problem(behavior_logits=[[0.0, 0.0], [0.0, 0.0]])
    assert pgcheck.check_estimator("trajectory_is", problem).exit_code == 0
    with pytest.raises(pgcheck.BiasError):
        pgcheck.check_estimator("reinforce", problem, claim="unbiased")


def test_a_table_of_rollouts_of_ones_own() -> None:
    """The two-armed bandit as its two rollouts: ∇J = p(1 − p) (1, −1)."""
    paths = pgcheck.Paths(
        start=[0, 0], state=[[0], [0]], context=[[0], [0]], action=[[0], [1]], reward=[[1.0], [0.0]],
        mask=[[1.0], [1.0]], env_probability=[1.0, 1.0], start_probability=[1.0],
    )  # fmt: skip
    problem = pgcheck.Problem.from_trajectories(paths, [[math.log(9.0), 0.0]], groups=1, group_size=3)
    assert problem.gradient()[0].tolist() == pytest.approx([0.09, -0.09], abs=1e-15)
    assert pgcheck.check_estimator("leave_one_out", problem).exit_code == 0


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: own_problem(groups=0), "groups: 0"),
        (lambda: own_problem(group_size=0), "group_size: 0"),
        (lambda: own_problem(groups=2, group_size=(2, 2, 2)), "group_size"),
        (lambda: pgcheck.Problem(own_mdp(), [[0.0, 0.0]]), "policy_logits"),
        (lambda: own_problem(behavior_logits=[[0.0, 0.0]]), "behavior_logits"),
        (lambda: own_problem(ref_logits=[[0.0, -math.inf], [0.0, 0.0]]), "ref_logits"),
        (lambda: own_mdp(discount=1.5), "discount"),
        (lambda: own_mdp(horizon=0), "horizon"),
        (lambda: own_mdp(initial=[0.5, 0.6]), "initial"),
    ],
)
def test_what_is_no_problem(make: Callable[[], Any], words: str) -> None:
    with pytest.raises(pgcheck.ProblemError, match=words):
        make()


# -- what is left alone


def global_states() -> tuple[Any, ...]:
    return (torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate())  # type: ignore[index]


def untouched(before: tuple[Any, ...]) -> bool:
    now = global_states()
    return torch.equal(before[0], now[0]) and np.array_equal(before[1], now[1]) and before[2] == now[2]


@pytest.mark.parametrize(
    "call",
    [
        lambda: pgcheck.check_estimator(reinforce, SOUND_PROBLEM),
        lambda: pgcheck.compare(["rloo", "vineppo"], SOUND_PROBLEM),
        lambda: pgcheck.moments("grpo", "mdp/two-state@1"),
        lambda: own_problem().at(1).gradient(),
    ],
)
def test_global_generators_are_untouched(call: Callable[[], Any]) -> None:
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    torch.rand(3)
    before = global_states()
    call()
    assert untouched(before)


def test_global_generators_are_untouched_when_it_fails() -> None:
    def noisy(batch: Batch) -> Tensor:
        return reinforce(batch) * torch.rand(()) * np.random.rand()

    before = global_states()
    with pytest.raises(pgcheck.CheckFailed, match="deterministic"):
        pgcheck.check_estimator(noisy, SOUND_PROBLEM)
    assert untouched(before)


def test_other_devices_are_not_seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody's CUDA generator is set: it would not be set back."""
    seeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    pgcheck.check_estimator(reinforce, "bandit/two-arm")
    assert seeded == []


def test_the_default_dtype_does_not_matter() -> None:
    """Verdicts are float64 either way."""
    expected = pgcheck.moments("grpo", SOUND_PROBLEM).mean
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        assert torch.equal(pgcheck.moments("grpo", SOUND_PROBLEM).mean, expected)
    finally:
        torch.set_default_dtype(before)


def test_twice_the_same() -> None:
    first, second = (pgcheck.check_estimator("cispo", SOUND_PROBLEM).to_json() for _ in range(2))
    assert first == second


def test_nothing_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    pgcheck.check_estimator("reinforce", SOUND_PROBLEM)
    pgcheck.compare(["rloo"], SOUND_PROBLEM)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == ""


def test_the_space_of_a_verdict() -> None:
    """The report says where; numbers are those of `measure` there."""
    problem = pgcheck.as_problems("chain/linear-policy")[0]
    (m,) = pgcheck.exact_moments([pgcheck.as_estimator("grpo")], problem)
    g = problem.parameter_gradient()
    rel = float((m.mean_in_parameters() - g).norm() / g.norm())
    found = pgcheck.check_estimator("grpo", problem, checks=["biased"], space="parameters").measurements[0]
    assert found.rel == pytest.approx(rel, rel=1e-9)
    for space, size in (("logits", None), ("parameters", 4)):
        report = pgcheck.check_estimator("leave_one_out", problem, checks=["unbiased"], space=space)  # type: ignore[arg-type]
        (row,) = report.measurements
        assert row.parameters == size
        assert row.rel is not None
        assert row.rel < 1e-9
    with pytest.raises(pgcheck.BiasError, match="in 4 parameters") as failed:
        pgcheck.check_estimator("grpo", problem, claim="unbiased", space="parameters")
    assert lines(str(failed.value))["next"].endswith(" --problem chain/linear-policy --space parameters")
