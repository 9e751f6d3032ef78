"""Tasks whose prefixes fit and whose completions do not: against the table of all completions, and differences of J."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor, nn

import pgcheck
from pgcheck.envs import language
from pgcheck.envs.language import LMTask
from pgcheck.errors import BudgetError
from pgcheck.estimators.lookup import FILLED_BY  # noqa: F401  (fills the registries)
from pgcheck.policies import TinyGPT, truncated
from pgcheck.problem import Problem
from pgcheck.worlds.listed import Listed
from pgcheck.worlds.tree import Tree

FALSE_ALARM = 1e-9  # of each statistical test
COLUMNS = ("state", "context", "action", "reward", "mask", "logp", "behavior_logp", "ref_logp", "value")


def open_ended() -> LMTask:
    """No eos; a tool that may speak twice; prompts that meet in one context."""
    return LMTask(
        [(1,), (1, 2)], vocab_size=3, eos=None, max_new_tokens=3, reward=lambda prompt, text: len(text) + 0.5 * text[0],
        tool=lambda prompt, text: (2, 2) if text[-1] == 1 else (),
    )  # fmt: skip


TASKS = {
    "parity": language.parity(),
    "tool": language.tool_dialogue(),
    "open-ended": open_ended(),
    "copy": language.copy(),
}
SETTINGS = {
    "on-policy": {},
    "stale": {"behavior": lambda z: z / 0.7 + 0.1},
    "top-k": {"behavior": lambda z: truncated(z, top_k=2)},
    "penalized": {"ref": lambda z: z.flip(-1), "kl_coefficient": 0.3, "entropy_coefficient": -0.2},
}


def both(task: LMTask, setting: str, **plan: int) -> tuple[Problem, Problem]:
    """The problem as a table and as a tree; the same logits as a table of parameters and from a model."""
    given: dict[str, Any] = dict(SETTINGS[setting])
    model = TinyGPT(task.vocab_size, width=8, layers=2, seed=3)
    z = Problem(task, model).logits
    logits = {f"{who}_logits": given.pop(who)(z) for who in ("behavior", "ref") if who in given}
    small, large = (Problem(t, model, **logits, **given, **plan) for t in (task, replace(task, max_completions=1)))
    assert isinstance(small.world, Listed)
    assert isinstance(large.world, Tree)
    return small, large


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", TASKS)
def test_the_tree_says_what_the_table_says(name: str, setting: str) -> None:
    """J, ∇J in every way and by position, in parameters, and the facts that claims refer to."""
    small, large = both(TASKS[name], setting, group_size=3)
    assert torch.equal(small.logits, large.logits)
    few_roundings = 1e-15 * small.reward_size  # of what is subtracted, π Σ p R from p R
    for method in ("enumeration", "dynamic_programming"):
        assert large.value(method) == pytest.approx(small.value(), abs=1e-14)
        torch.testing.assert_close(large.gradient(method), small.gradient(), rtol=0, atol=few_roundings)
    torch.testing.assert_close(large.gradient(), small.gradient(), rtol=0, atol=few_roundings)
    torch.testing.assert_close(large.gradient_by_step(), small.gradient_by_step(), rtol=0, atol=few_roundings)
    torch.testing.assert_close(large.parameter_gradient(), small.parameter_gradient(), rtol=0, atol=1e-13)
    for fact in (
        "on_policy",
        "full_support",
        "discount",
        "plain_objective",
        "fixed_length",
        "one_start",
        "binary_return",
    ):
        assert getattr(large, fact) == getattr(small, fact), fact


def rows_of(problem: Problem) -> dict[tuple[int, ...], dict[str, Tensor]]:
    """Every rollout of the table by its start and actions: what a batch says of it, and its probability."""
    table = problem.trajectories
    batch = table.rows_as_batch()
    return {
        (int(table.paths.start[n]), *table.paths.action[n].tolist()): {
            name: getattr(batch, name)[n] for name in COLUMNS
        }
        | {"p": table.paths.start_probability[table.paths.start[n]] * table.behavior_probability[n]}
        for n in range(len(table))
    }


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", TASKS)
def test_what_is_drawn(name: str, setting: str) -> None:
    """Each row is that of the table, column by column, and comes with its probability; rows of a group share the prompt."""
    small, large = both(TASKS[name], setting, groups=2, group_size=2)
    sampler = large.sampler(seed=3)
    table, index = sampler.draw(0, 3_000)
    batch, known = table.batch(index, sampler.labels), rows_of(small)
    start = table.paths.start[index]
    assert bool((start[:, 0::2] == start[:, 1::2]).all())
    states: dict[int, int] = {}  # the tree counts them in another order
    seen = dict.fromkeys(known, 0)
    for m in range(3_000):
        for b in range(4):
            key = (int(start[m, b]), *batch.action[m, b].tolist())
            seen[key] += b == 0  # one row of each batch, so that they are independent
            for column in COLUMNS[1:] if m < 100 else ():
                expected = known[key][column]
                torch.testing.assert_close(getattr(batch, column)[m, b], expected, rtol=0, atol=1e-13, msg=column)
            for here, there in zip(batch.state[m, b].tolist(), known[key]["state"].tolist(), strict=True):
                assert states.setdefault(here, there) == there
    assert len(set(states.values())) == len(states)
    chance = {key: float(row["p"]) for key, row in known.items()}
    assert not any(n for key, n in seen.items() if chance[key] == 0)
    often = [key for key in known if chance[key] * 3_000 >= 5]
    counts = [seen[key] for key in often] + [3_000 - sum(seen[key] for key in often)]
    means = [chance[key] * 3_000 for key in often] + [3_000 * (1 - sum(chance[key] for key in often))]
    if means[-1] < 1e-6:
        assert counts.pop() == 0
        means.pop()
    assert stats.chisquare(counts, [x * 3_000 / sum(means) for x in means]).pvalue > FALSE_ALARM


def test_draws_do_not_depend_on_the_asking() -> None:
    _, problem = both(TASKS["tool"], "stale", groups=2, group_size=3)
    whole, later = problem.sample(12, seed=4), problem.sample(5, seed=4, first=7)
    for name, x in later.tensors().items():
        assert torch.equal(x, whole.tensors()[name][7:]), name
    assert not torch.equal(problem.sample(12, seed=5).action, whole.action)


def test_a_digest_is_of_everything() -> None:
    task = replace(TASKS["copy"], max_completions=1)
    model = TinyGPT(4, width=8, seed=3)
    z = Problem(task, model).logits
    problems = [
        Problem(task, model),
        Problem(task, TinyGPT(4, width=8, seed=4)),
        Problem(task, model, group_size=3),
        Problem(task, model, behavior_logits=z + torch.eye(4)[0]),
        Problem(task, model, ref_logits=z),
        Problem(task, model, entropy_coefficient=0.1),
        Problem(replace(task, reward=lambda prompt, text: task.reward(prompt, text) + (len(text) == 2)), model),
        Problem(replace(task, prompts=[(1, 2), (3, 2)]), model),
    ]
    assert len({p.digest for p in problems}) == len(problems)
    assert Problem(task, model).digest == problems[0].digest


def test_the_gradient_of_a_large_one() -> None:
    """5 622 completions a prompt: ∇J in 8 thousand parameters against central differences along random directions."""
    task = replace(language.sum_mod(3, max_new_tokens=5, vocab_size=6), max_completions=1)
    problem = Problem(task, TinyGPT(6, width=16, layers=1, seed=1), group_size=4)
    found = problem.parameter_gradient()
    theta = nn.utils.parameters_to_vector(problem.policy.parameters()).detach()
    policy, value = problem.policy, problem.world.value("dynamic_programming")
    generator, h = torch.Generator().manual_seed(0), 1e-3

    def at(x: Tensor) -> float:
        nn.utils.vector_to_parameters(x, policy.parameters())
        with torch.no_grad():
            return float(value(policy()))

    for _ in range(3):
        v = torch.randn(theta.shape, generator=generator, dtype=torch.float64)
        v /= v.norm()
        near, far = (at(theta + k * h * v) - at(theta - k * h * v) for k in (1, 2))
        assert (8 * near - far) / (12 * h) == pytest.approx(float(found @ v), abs=1e-10)


def test_in_parts_as_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits and gradients of a model that reads three rows at a time."""
    small, _ = both(TASKS["tool"], "on-policy")
    z, g = small.logits, small.parameter_gradient()
    monkeypatch.setattr("pgcheck.policies.transformer.LMPolicy.tokens_at_once", 3 * small.policy.tokens.shape[1])
    assert len(small.policy.parts) > 1
    again, _ = both(TASKS["tool"], "on-policy")
    torch.testing.assert_close(again.logits, z, rtol=0, atol=1e-14)
    torch.testing.assert_close(again.parameter_gradient(), g, rtol=0, atol=1e-15)


def test_sizes() -> None:
    """By the number of completions, then of prefixes."""
    given: dict[str, Any] = {"vocab_size": 8, "eos": 0, "reward": lambda prompt, text: 0.0}
    sizes = {T: LMTask([(1,)], max_new_tokens=T, **given).size for T in (4, 5, 6, 7, 40)}
    assert sizes == {4: "table", 5: "tree", 6: "tree", 7: "tree", 40: "generated"}
    task = LMTask([(1,), (2, 1)], max_new_tokens=3, **given)
    assert task.prefix_count == 2 * (1 + 7 + 49) == len(task.tree.reward)
    assert task.completions == int((task.tree.child < 0).sum())


def test_what_needs_every_completion_is_refused() -> None:
    _, problem = both(TASKS["parity"], "on-policy")
    for ask in (lambda: problem.trajectories, problem.env.paths, lambda: problem.env.texts):
        with pytest.raises(BudgetError, match="makes 30 completions; max_completions is 1"):
            ask()
    needy = pgcheck.as_estimator("vineppo")
    with pytest.raises(BudgetError, match="needs more than its rows"):
        problem.sampler(needs=needy.needs)
