"""`pgcheck.check_training_step`: right steps pass, wrong ones fail, for the reason that is theirs."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pgcheck
from pgcheck.engines.direct import StepRunner, TrainingStep, direct_estimates, direct_moments
from pgcheck.engines.exact import exact_moments
from pgcheck.estimators.base import find_estimator
from pgcheck.problem import Problem
from tests import training_steps as steps
from tests.examples import gradient_accumulation
from tests.training_steps import Bag

Step = Callable[[Any, Any], None]


def score(prompt: Any, text: Any) -> float:
    return float(sum(text) % 2 == prompt[0] % 2) + 0.3 * len(text)


def task(**changes: Any) -> pgcheck.LMTask:
    """Two prompts of unequal length, 7 completions each, of 1 or 2 tokens."""
    given = {"vocab_size": 3, "eos": 0, "max_new_tokens": 2, "reward": score}
    return pgcheck.LMTask(changes.pop("prompts", [(1,), (2, 1)]), **{**given, **changes})


def ragged(**changes: Any) -> pgcheck.LMTask:
    """One prompt, 4 completions of 1 to 3 tokens: few enough for every order of four rows."""
    return task(prompts=[(1,)], vocab_size=2, max_new_tokens=3, **changes)


def tool_task() -> pgcheck.LMTask:
    return task(prompts=[(1,)], tool=lambda prompt, text: (2, 1) if text[-1] == 1 else ())


PLAN = {"groups": 1, "group_size": 3}


def check(step: Step, model: nn.Module | None = None, on: Any = None, **settings: Any) -> pgcheck.Report:
    on = task() if on is None else on
    model = Bag(on.vocab_size) if model is None else model
    return pgcheck.check_training_step(step, model, on, **{**PLAN, **settings})


def drifted() -> Bag:
    return Bag(3, seed=5)


def with_frozen_embedding() -> Bag:
    model = Bag(3)
    model.token.weight.requires_grad_(False)
    return model


# -- right ones

RIGHT: list[tuple[Step, dict[str, Any]]] = [
    (steps.rloo, {}),
    (steps.rloo, {"groups": 2, "group_size": 2, "on": task(prompts=[(1,), (1, 1)], vocab_size=2)}),
    (steps.reinforce, {"groups": 3, "group_size": 1}),
    (steps.accumulated, {}),
    (steps.by_cross_entropy, {}),
    (steps.ratio_to_old, {}),
    (steps.ratio_to_itself, {}),
    (steps.loss_scaled_and_unscaled, {}),
    (steps.by_autograd_grad, {}),
    (steps.rows_shuffled, {}),
    (steps.as_in_verl, {"padding": "left"}),
    (steps.as_in_verl, {"padding": "left", "pad_token_id": 2}),
    (steps.rloo, {"on": tool_task()}),
    (steps.trajectory_weighted, {"behavior": drifted(), "group_size": 2}),
    (steps.frozen_embedding, {"model": with_frozen_embedding()}),
    (steps.dr_grpo, {"claim": "proportional"}),
    (steps.grpo, {"same_as": "grpo"}),
    (steps.grpo, {"same_as": "grpo", "behavior": drifted()}),
    (steps.rloo, {"model": pgcheck.TinyGPT(3, width=4, layers=1, heads=1), "group_size": 2}),
    (gradient_accumulation.token_mean_of_the_batch, {"same_as": "cispo(notes)", "on": ragged(), "group_size": 4}),
]


@pytest.mark.parametrize(("step", "settings"), RIGHT, ids=[f"{i}-{s.__name__}" for i, (s, _) in enumerate(RIGHT)])
def test_a_right_step_passes(step: Step, settings: dict[str, Any]) -> None:
    report = check(step, **settings)
    assert report.exit_code == 0
    asked = {v.check for v in report.verdicts}
    assert asked & {"unbiased", "proportional", "same_as"}
    assert {"deterministic", "stateless", "finite"} <= asked


# -- wrong ones

WRONG: list[tuple[Step, dict[str, Any], str]] = [
    (steps.not_shifted, {}, "scored by the logits of its own column"),
    (steps.gathers_the_token_before, {}, "gathered is the token one column before"),
    (steps.mask_not_shifted, {}, "the mask is one column too late"),
    (steps.prompt_in_the_mask, {}, "the mask lets the prompt in"),
    (steps.eos_dropped, {"on": ragged()}, "the mask leaves out the eos"),
    (steps.padding_trained_on, {}, "the mask lets padding in"),
    (steps.tool_trained_on, {"on": tool_task()}, "lets in what the tool said"),
    (steps.averaged_over_the_row, {}, "mean of the other rows of the group) ∇log π, averaged over each row's tokens"),
    (steps.advantages_per_micro_batch, {"on": ragged(), "group_size": 4}, "(return − mean)/std of the micro-batch of 2 rows"),
    (steps.mean_per_micro_batch, {"on": ragged(), "group_size": 4}, "(2−1)/2, for micro-batches of 2 rows"),
    (steps.divided_by_accumulation_twice, {}, "0.3333 (here 1/B"),
    (steps.old_with_gradient, {}, "zero on every batch"),
    (steps.another_temperature, {}, "the logits are divided by 0.7"),
    (steps.logits_gathered, {}, "without log_softmax"),
    (steps.loss_scale_left_in, {}, "1024 × ∇J"),
    (steps.sign_flipped, {}, "the sign is flipped"),
    (steps.own_row_in_the_mean, {}, "0.6667 (here (B−1)/B"),
    (steps.clipped, {}, "its norm is cut off at 0.05"),
    (steps.trunk_detached, {}, "in all parameters but token.weight, position.weight, hidden.weight"),
    (steps.ratio_missing, {"behavior": drifted()}, "(the return) ∇log π, summed over tokens"),
    (
        gradient_accumulation.token_mean_of_each_micro_batch,
        {"on": ragged(), "group_size": 4},
        "averaged over the tokens of each micro-batch of 2 row",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("step", "settings", "cause"), WRONG, ids=[s.__name__ for s, _, _ in WRONG])
def test_a_wrong_step_fails_for_its_reason(step: Step, settings: dict[str, Any], cause: str) -> None:
    with pytest.raises(pgcheck.BiasError) as caught:
        check(step, **settings)
    assert cause in str(caught.value), str(caught.value)
    assert {v.check for v in caught.value.report.failures} == {"unbiased"}


def test_another_estimator_than_it_is_said_to_be() -> None:
    with pytest.raises(pgcheck.CheckFailed) as caught:
        check(steps.rloo, same_as="grpo")
    assert not isinstance(caught.value, pgcheck.BiasError)
    assert [v.check for v in caught.value.report.failures] == ["same_as"]
    assert "in expectation this is ∇J exactly" in str(caught.value)


def test_a_claim_of_bias_is_refuted_by_an_unbiased_step() -> None:
    with pytest.raises(pgcheck.BiasError, match="rloo is not biased"):
        check(steps.rloo, claim=pgcheck.biased("by mistake"))
    assert check(steps.averaged_over_the_row, claim=pgcheck.biased("by its lengths")).exit_code == 0


# -- hygiene


def dropout(model: nn.Module, r: Any) -> None:
    model.train()
    steps.rloo(model, r)


def optimizer_step(model: nn.Module, r: Any) -> None:
    steps.rloo(model, r)
    torch.optim.SGD(model.parameters(), lr=0.1).step()


def every_second_call() -> Step:
    """Gradient accumulation over calls: the gradient of the call before is added."""
    left: list[Tensor] = []

    def step(model: nn.Module, r: Any) -> None:
        steps.rloo(model, r)
        own = [p.grad.clone() for p in model.parameters()]  # type: ignore[union-attr]
        for p, before in zip(model.parameters(), left, strict=False):
            p.grad += before
        left[:] = own

    return step


def running_baseline() -> Step:
    mean = [0.0]

    def step(model: nn.Module, r: Any) -> None:
        mean[0] += 0.1 * (float(r.rewards.mean()) - mean[0])
        steps.rows_loss(model, r, r.rewards - mean[0]).backward()

    return step


def std_of_unanimous(model: nn.Module, r: Any) -> None:
    adv = (r.rewards - r.rewards.mean()) / r.rewards.std(unbiased=False)
    steps.rows_loss(model, r, adv).backward()


HYGIENE = [
    (dropout, "deterministic", "the model has dropout, module 'dropout'"),
    (optimizer_step, "stateless", "changes the model: 'token.weight' is not what it was"),
    (every_second_call(), "stateless", "keeps state from one call to the next"),
    (running_baseline(), "stateless", "keeps state from one call to the next"),
    (std_of_unanimous, "finite", "1 [2] [2]"),
]


@pytest.mark.parametrize(
    ("step", "failed", "words"), HYGIENE, ids=["dropout", "optimizer", "over calls", "running", "nan"]
)
def test_an_unclean_step_gets_that_verdict(step: Step, failed: str, words: str) -> None:
    with pytest.raises(pgcheck.CheckFailed) as caught:
        check(step, Bag(3, dropout=0.5))
    assert not isinstance(caught.value, pgcheck.BiasError)
    assert [v.check for v in caught.value.report.failures] == [failed]
    assert words in str(caught.value)


def test_a_counter_that_shows_late_is_found() -> None:
    calls = [0]

    def step(model: nn.Module, r: Any) -> None:
        calls[0] += 1
        steps.rows_loss(model, r, r.rewards + (calls[0] > 60)).backward()

    with pytest.raises(pgcheck.EstimatorError, match="gives another gradient from the same batch after"):
        check(step)


def test_an_optimizer_that_steps_now_and_then_is_found() -> None:
    calls = [0]

    def step(model: nn.Module, r: Any) -> None:
        calls[0] += 1
        steps.rloo(model, r)
        if calls[0] % 50 == 0:
            torch.optim.SGD(model.parameters(), lr=0.1).step()

    with pytest.raises(pgcheck.EstimatorError, match="though not on every call"):
        check(step)


def test_what_becomes_of_a_gradient_that_is_there() -> None:
    def zeroes_half(model: Any, r: Any) -> None:
        model.head.zero_grad()
        steps.rloo(model, r)

    def zeroes(model: nn.Module, r: Any) -> None:
        model.zero_grad()
        steps.rloo(model, r)

    with pytest.raises(
        pgcheck.EstimatorError, match=r"zeroes the \.grad of some parameters and adds to that of others"
    ):
        check(zeroes_half)
    reason = "it adds to a .grad that is there; zero gradients between batches"
    assert [n.reason for n in check(steps.rloo).not_asked] == [reason]
    assert check(zeroes).not_asked == []


def test_a_step_may_write_to_its_rollouts_and_leave_the_model_in_train_mode() -> None:
    def step(model: nn.Module, r: Any) -> None:
        model.train()
        r.rewards.sub_(r.rewards.mean()).mul_(r.rows / (r.rows - 1))
        steps.rows_loss(model, r, r.rewards).backward()

    assert check(step).exit_code == 0


def test_the_model_and_the_random_state_of_the_caller_stay_as_they_are() -> None:
    model = Bag(3).float()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    state = torch.get_rng_state()
    check(steps.rows_shuffled, model)
    assert all(torch.equal(x, before[name]) and x.dtype == torch.float32 for name, x in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(state, torch.get_rng_state())


# -- numbers


@pytest.mark.parametrize(("step", "name"), [(steps.rloo, "leave_one_out"), (steps.grpo, "grpo")])
@pytest.mark.parametrize("behavior", [None, drifted()], ids=["on-policy", "off-policy"])
def test_the_moments_are_those_of_the_exact_engine(step: Step, name: str, behavior: nn.Module | None) -> None:
    """E ĝ_θ = (dz/dθ)ᵀ E ĝ and tr Cov ĝ_θ = Σ Cov ĝ · (dz/dθ)(dz/dθ)ᵀ; the engine knows nothing of tokens."""
    problem = Problem(task(prompts=[(1,)]), Bag(3), behavior_logits=behavior, groups=1, group_size=3)
    (expected,) = exact_moments([find_estimator(name)], problem)
    found = direct_moments(StepRunner(TrainingStep(step, name), problem))
    torch.testing.assert_close(found.mean, expected.mean_in_parameters(), rtol=1e-9, atol=1e-12)
    assert found.total_variance == pytest.approx(expected.total_variance_in_parameters(), rel=1e-9)
    assert found.enumerated == math.comb(7 + 2, 3)


def by_hand(step: Step, model: Bag, on: pgcheck.LMTask, rows: int) -> tuple[Tensor, float]:
    """E ĝ and E ‖ĝ‖² over every ordered batch: completions, chances, padding and masks written out in plain Python."""
    V, texts = on.vocab_size, []
    for length in range(1, on.max_new_tokens + 1):
        for text in itertools.product(range(V), repeat=length):
            done = text[-1] == 0 or length == on.max_new_tokens
            if done and 0 not in text[:-1]:
                texts.append(text)
    (prompt,) = on.prompts
    L = len(prompt) + on.max_new_tokens
    with torch.no_grad():
        chance = []
        for text in texts:
            logp = torch.log_softmax(model(torch.tensor([[*prompt, *text]]))[0], -1)
            chance.append(math.exp(sum(float(logp[len(prompt) + t - 1, a]) for t, a in enumerate(text))))
    mean = torch.zeros(sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    second, total = 0.0, 0.0
    for drawn in itertools.product(range(len(texts)), repeat=rows):
        ids = [[*prompt, *texts[n], *[0] * (L - len(prompt) - len(texts[n]))] for n in drawn]
        masks = [[0] * len(prompt) + [1] * len(texts[n]) + [0] * (L - len(prompt) - len(texts[n])) for n in drawn]
        batch = pgcheck.Rollouts(
            input_ids=torch.tensor(ids), attention_mask=torch.tensor(masks), position_ids=torch.tensor(masks),
            response_mask=torch.tensor(masks), rewards=torch.tensor([score(prompt, texts[n]) for n in drawn]).double(),
            token_level_rewards=torch.zeros(rows, L), old_log_probs=torch.zeros(rows, L), ref_log_probs=torch.zeros(rows, L),
            uid=torch.zeros(rows, dtype=torch.int64), prompt_length=torch.full((rows,), len(prompt)), prompt_width=len(prompt),
        )  # fmt: skip
        model.zero_grad()
        step(model, batch)
        x = -torch.cat([p.grad.flatten() for p in model.parameters()])  # type: ignore[union-attr]
        q = math.prod(chance[n] for n in drawn)
        mean, second, total = mean + q * x, second + q * float(x @ x), total + q
    assert total == pytest.approx(1.0, abs=1e-12)
    return mean, second


@pytest.mark.parametrize(
    "step", [steps.rloo, gradient_accumulation.token_mean_of_each_micro_batch], ids=["any order", "in every order"]
)
def test_the_moments_by_hand(step: Step) -> None:
    model = Bag(2)
    problem = Problem(ragged(), model, groups=1, group_size=4)
    found = direct_moments(StepRunner(TrainingStep(step, "step"), problem))
    mean, second = by_hand(step, model, ragged(), 4)
    torch.testing.assert_close(found.mean, mean, rtol=1e-6, atol=1e-8)
    assert found.second_moment == pytest.approx(second, rel=1e-6)
    assert found.ordered == (step is not steps.rloo)
    assert found.enumerated == (4**4 if found.ordered else math.comb(4 + 3, 4))


def test_one_batch_after_the_other() -> None:
    problem = Problem(task(), Bag(3), groups=1, group_size=2)
    step = TrainingStep(steps.reinforce, "reinforce")
    index = torch.tensor([[0, 3], [5, 5], [9, 7]])
    found = direct_estimates(step, problem, index)
    runner = StepRunner(step, problem)
    assert found.shape == (3, sum(p.numel() for p in Bag(3).parameters()))
    torch.testing.assert_close(found, torch.stack([runner(row) for row in index]), rtol=0, atol=0)
    # ĝ of two rows is the mean of what each gives alone
    alone = direct_estimates(step, problem.with_sampling(groups=1, group_size=1), torch.tensor([[9], [7]]))
    torch.testing.assert_close(found[2], alone.mean(0), rtol=1e-12, atol=1e-14)


# -- other policies, and the document


def tabular_step(model: nn.Module, batch: pgcheck.Batch) -> None:
    """A module over one-hot contexts, on the `Batch` of a tabular problem."""
    K = next(model.parameters()).shape[1]
    logits = model(torch.eye(K, dtype=torch.float64))[batch.context.clamp(min=0)]
    logp = steps.chosen(logits, batch.action.clamp(min=0)) * batch.mask
    (-(batch.discount_weight * batch.reward_to_go * logp).sum(-1).mean()).backward()


def table_step(table: Any, batch: pgcheck.Batch) -> None:
    logp = steps.chosen(table()[batch.context.clamp(min=0)], batch.action.clamp(min=0)) * batch.mask
    (-(batch.reward_to_go * logp).sum(-1).mean()).backward()


def test_a_step_on_any_other_problem() -> None:
    problem = pgcheck.as_problems("chain/absorbing")[0]
    module = nn.Linear(problem.logits.shape[0], problem.logits.shape[1])
    report = pgcheck.check_training_step(tabular_step, module, problem, groups=2, group_size=1)
    assert report.exit_code == 0
    assert [p.name for p in report.parameters] == ["weight", "bias"]
    with pytest.raises(pgcheck.BiasError, match="`reward_to_go_undiscounted_weight`"):
        pgcheck.check_training_step(table_step, None, problem, groups=2, group_size=1)


def test_a_named_language_problem_and_another_model_on_it() -> None:
    """TinyGPT has room for what is read before the last token, and for no more."""

    def reads_less(model: nn.Module, r: Any) -> None:
        logp = steps.chosen(model(r.input_ids[:, :-1]), r.input_ids[:, 1:])
        steps.rows_loss(model, r, r.rewards, logp=logp).backward()

    assert pgcheck.check_training_step(reads_less, None, "lm/parity", groups=1, group_size=1).exit_code == 0
    with pytest.raises(pgcheck.EstimatorError, match=r"the model's context is \d tokens; feed it input_ids\[:, :-1\]"):
        pgcheck.check_training_step(steps.reinforce, None, "lm/parity", groups=1, group_size=1)
    report = pgcheck.check_training_step(steps.reinforce, Bag(3), "lm/parity", groups=1, group_size=1)
    assert [p.name for p in report.parameters] == [name for name, _ in Bag(3).named_parameters()]


def test_the_report_has_its_numbers_and_reads_back() -> None:
    with pytest.raises(pgcheck.BiasError) as caught:
        check(steps.trunk_detached)
    report = caught.value.report
    again = pgcheck.Report.model_validate_json(report.to_json())
    assert again == report
    (m,) = report.measurements
    assert (m.worst_context, m.expected, m.lane, m.enumerated) == (None, [], "direct", 2 * math.comb(9, 3))
    gaps = {p.name: p.gap for p in report.parameters}
    assert gaps["head.weight"] < 1e-12 < gaps["token.weight"]
    assert m.bias == pytest.approx(math.sqrt(sum(g * g for g in gaps.values())))
    assert "parameters" in json.loads(report.to_json())
    assert "parameters" not in json.loads(pgcheck.check_estimator("leave_one_out", "bandit/two-arm").to_json())
