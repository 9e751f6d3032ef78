"""Tasks as tables of completions, against a recursion over completions in plain Python."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator

import pytest
import torch

from pgcheck.engines.exact import exact_moments
from pgcheck.envs import language
from pgcheck.envs.language import LMTask, Tokens
from pgcheck.errors import ProblemError
from pgcheck.estimators.base import find_estimator
from pgcheck.estimators.lookup import FILLED_BY  # noqa: F401  (fills the registries)
from pgcheck.policies import SoftmaxTable, TinyGPT
from pgcheck.problem import Problem

SHIPPED = {
    "parity": language.parity(),
    "sum_mod": language.sum_mod(),
    "brackets": language.brackets(),
    "copy": language.copy(),
    "length": language.length(),
    "tool_dialogue": language.tool_dialogue(),
}


def small(**changes: object) -> LMTask:
    given = {"vocab_size": 3, "eos": 0, "max_new_tokens": 2, "reward": lambda prompt, text: float(len(text))}
    return LMTask([(1,), (2, 1)], **(given | changes))  # type: ignore[arg-type]


def walk(task: LMTask, prompt: Tokens, model: torch.nn.Module) -> Iterator[tuple[float, Tokens]]:
    """Every completion with its probability: one token at a time, the model asked for one text at a time."""

    def onward(text: Tokens, left: int) -> Iterator[tuple[float, Tokens]]:
        with torch.no_grad():
            chance = torch.softmax(model(torch.tensor([[*prompt, *text]]))[0, -1], -1).tolist()
        for token, p in enumerate(chance):
            longer = (*text, token)
            if token == task.eos or left == 1:
                yield p, longer
                continue
            said = task.tool(prompt, longer) if task.tool else ()
            for q, whole in onward((*longer, *said), left - 1):
                yield p * q, whole

    return onward((), task.max_new_tokens)


def texts_of(task: LMTask, problem: Problem, start: int) -> dict[Tokens, tuple[float, float]]:
    """Completion → (probability, return), read off the table: actions, and what a later context says of other tokens."""
    table = problem.trajectories
    found = {}
    for n in range(len(table)):
        if int(table.paths.start[n]) != start:
            continue
        prompt, mask = tuple(task.prompts[start]), table.paths.mask[n].tolist()
        last = max(t for t in range(len(mask)) if mask[t])
        read = task.contexts[int(table.paths.context[n, last])][len(prompt) :]
        text = (*read, int(table.paths.action[n, last]))
        own = [token for token, m in zip(text, mask, strict=False) if m]
        assert own == [a for a in table.paths.action[n].tolist() if a >= 0]
        assert len(text) == int(table.paths.end[n])
        found[text] = (float(table.probability[n]), float(table.paths.reward[n].sum()))
    return found


@pytest.mark.parametrize("name", SHIPPED)
def test_the_table_is_the_tree(name: str) -> None:
    """Completions, their probabilities and returns, and J, by recursion."""
    task = SHIPPED[name]
    model = TinyGPT(task.vocab_size, width=8, layers=2, seed=3)
    problem = Problem(task, model)
    value = 0.0
    for start, prompt in enumerate(task.prompts):
        walked = {text: p for p, text in walk(task, tuple(prompt), model)}
        found = texts_of(task, problem, start)
        assert found.keys() == walked.keys()
        assert len(found) == task.completions // len(task.prompts)
        for text, (p, r) in found.items():
            assert p == pytest.approx(walked[text], rel=1e-12)
            assert r == task.reward(tuple(prompt), text)
            value += p * r / len(task.prompts)
    assert problem.value() == pytest.approx(value, rel=1e-12)


def test_completions_are_counted_before_they_are_made() -> None:
    """Σ_{t ≤ T} (V−1)^(t−1) + (V−1)^T, and V^T without an eos: 781 of six tokens and four steps."""
    for V, T in itertools.product((2, 3, 4), (1, 2, 3)):
        for eos in (None, 0, V - 1):
            task = LMTask([(1,)], vocab_size=V, eos=eos, max_new_tokens=T, reward=lambda prompt, text: 0.0)
            assert task.completions == len(task.texts) == len({text for _, text, _ in task.texts})
    big = LMTask([(1,)], vocab_size=6, eos=0, max_new_tokens=4, reward=lambda prompt, text: 0.0)
    assert big.completions == 781
    assert len(big.contexts) == 1 + 5 + 25 + 125


def test_two_prompts_that_meet() -> None:
    """Prompt 1 and a 2, and prompt 12: one context, as the model reads the same, and two states."""
    task = LMTask(
        [(1,), (1, 2)], vocab_size=3, eos=0, max_new_tokens=2, reward=lambda prompt, text: len(prompt) + sum(text)
    )
    assert len(task.contexts) == len(set(task.contexts)) == 5  # 1, 11, 12; 121, 122; prompt 12 is read already
    paths = task.paths()
    assert len(set(paths.state[paths.mask > 0].tolist())) == 6
    shared = task.contexts.index((1, 2))
    assert set(paths.start[(paths.context == shared).any(-1)].tolist()) == {0, 1}
    problem = Problem(task, TinyGPT(3, width=4, layers=1), group_size=2)
    (moments,) = exact_moments([find_estimator("leave_one_out")], problem)
    assert float((moments.mean - problem.gradient()).abs().max()) < 1e-15


def test_a_tool_is_no_choice() -> None:
    """What it says is in the context of the next token, has mask 0, and no gradient; it is not asked after the last."""
    asked = []

    def tool(prompt: Tokens, text: Tokens) -> Tokens:
        asked.append((prompt, text))
        return (2, 2) if text[-1] == 1 else ()

    task = LMTask([(1,)], vocab_size=3, eos=0, max_new_tokens=2, reward=lambda p, text: float(len(text)), tool=tool)
    paths = task.paths()
    assert set(asked) == {((1,), (1,)), ((1,), (2,))}
    rows = dict(zip([text for _, text, _ in task.texts], paths.mask.tolist(), strict=True))
    assert rows[(1, 2, 2, 0)] == [1, 0, 0, 1]
    assert rows[(2, 0)] == [1, 1, 0, 0]
    assert rows[(0,)] == [1, 0, 0, 0]
    assert task.contexts == ((1,), (1, 2), (1, 1, 2, 2))
    assert Counter(paths.end.tolist()) == {1: 1, 2: 3, 4: 3}


def test_batched_rewards_are_the_same() -> None:
    calls = []

    def batched(prompts: list[Tokens], texts: list[Tokens]) -> torch.Tensor:
        calls.append(len(texts))
        return torch.tensor([float(len(text)) for text in texts])

    one, many = small(), small(reward=batched, batched=True)
    assert torch.equal(one.paths().reward, many.paths().reward)
    assert calls == [
        many.completions,
        many.completions - 1,
        1,
    ]  # and again: from the last to the first, one of them alone
    assert many.paths() is many.paths()


REWARDS = {
    "parity": ([((1,), (1, 0), 1), ((1,), (1, 1, 0), 0), ((2,), (0,), 1), ((2,), (2, 1, 2), 0)]),
    "sum_mod": ([((1, 1), (2, 0), 1), ((1, 1), (1, 1, 3), 1), ((1, 2), (1, 0), 0), ((1, 2), (0,), 1)]),
    "brackets": ([((1,), (2, 0), 1), ((1,), (2, 2, 0), 0), ((1, 1), (2, 2, 0), 1), ((1,), (1, 0), 0.5 / 3)]),
    "copy": ([((1, 2), (1, 2, 0), 1), ((1, 2), (1, 0), 1 / 3), ((3, 1), (0,), 0)]),
    "length": ([((2,), (1, 1, 1), 2.25), ((2,), (0,), -0.25)]),
    "tool_dialogue": ([((1, 2), (2, 0), 1), ((2, 2), (3, 4, 1, 1, 0), 0.75), ((1, 2), (3, 4, 2, 0), 0.75)]),
}


@pytest.mark.parametrize("name", SHIPPED)
def test_rewards_by_hand(name: str) -> None:
    for prompt, text, expected in REWARDS[name]:
        assert SHIPPED[name].reward(prompt, text) == pytest.approx(expected)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_task_can_be_learned(name: str) -> None:
    """Its reward varies from every prompt, and every completion's is finite."""
    task = SHIPPED[name]
    for prompt in task.prompts:
        rewards = {task.reward(tuple(prompt), text) for s, text, _ in task.texts if task.prompts[s] == prompt}
        assert len(rewards) > 1
        assert all(map(math.isfinite, rewards))


def test_a_table_of_logits_is_a_policy_as_well() -> None:
    """One row for each context: a language model without parameters in common."""
    task = small()
    K, V = len(task.contexts), task.vocab_size
    problem = Problem(task, torch.zeros(K, V))
    assert isinstance(problem.policy, SoftmaxTable)
    assert problem.value() == pytest.approx(1 / 3 + 2 / 3 * 2, rel=1e-12)  # one token or two, evenly


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda prompt, text: 1 / (len(text) - 1), r"raises ZeroDivisionError.* on prompt \(1,\), completion \(0,\)"),
        (lambda prompt, text: math.nan, r"nan for prompt \(1,\), completion \(0,\)"),
        (
            lambda prompt, text: [1.0, 2.0],
            r"\[1.0, 2.0\] for prompt \(1,\), completion \(0,\); expected one finite number",
        ),
        (lambda prompt, text: None, r"None for prompt \(1,\)"),
    ],
)
def test_a_wrong_reward_shows_the_completion(wrong: language.Reward, said: str) -> None:
    with pytest.raises(ProblemError, match=said):
        small(reward=wrong).paths()


def test_a_batched_reward_may_squeeze_and_round() -> None:
    """A network in float32 says a number of its own for one text, and the last bits as they come."""

    def squeezed(prompts: list[Tokens], texts: list[Tokens]) -> torch.Tensor:
        return torch.tensor([len(text) / 3 + 1e-8 * len(texts) for text in texts]).squeeze()

    assert small(reward=squeezed, batched=True).paths().reward.sum() > 0


def test_a_reward_that_looks_elsewhere() -> None:
    """At a counter; at its neighbor; at the mean of all."""
    counter = itertools.count()
    with pytest.raises(ProblemError, match=r"when asked again, for prompt \(1,\), completion \(0,\)"):
        small(reward=lambda prompt, text: float(next(counter))).paths()
    ranked = small(batched=True, reward=lambda prompts, texts: list(range(len(texts))))

    def centred(prompts: list[Tokens], texts: list[Tokens]) -> list[float]:
        """In whatever order they are asked, the same."""
        lengths = [float(len(text)) for text in texts]
        return [x - sum(lengths) / len(lengths) for x in lengths]

    with pytest.raises(ProblemError, match="no other row"):
        small(reward=centred, batched=True).paths()
    with pytest.raises(ProblemError, match="no other row"):
        ranked.paths()
