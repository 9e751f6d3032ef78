"""Problems of a real language model: SmolLM2-135M-Instruct answers short questions, and its gradient is exact.

One token out of the whole vocabulary (49 152 answers to a prompt), one of four words, or up to two digits. The samplers are
what serving makes of a policy: a copy in bfloat16, a copy that missed some updates, a temperature, a cut at top-p.

Guarantee: nothing is loaded before one of these is asked for by name or family; all of them share one model.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from pgcheck.envs.language import LMTask
from pgcheck.envs.text import text_task
from pgcheck.named_problems import named
from pgcheck.policies.decoding import Decoding
from pgcheck.policies.huggingface import HFPolicy, perturbed
from pgcheck.policies.smollm import smollm2
from pgcheck.problem import Problem

CAPITALS = {
    "The capital of France is": "Paris",
    "The capital of Japan is": "Tokyo",
    "The capital of Italy is": "Rome",
    "The capital of Egypt is": "Cairo",
}
QUESTIONS = {
    "Is fire hot? Yes.\nIs the sun cold? No.\nIs ice cold?": "Yes",
    "Is fire hot? Yes.\nIs the sun cold? No.\nIs snow black?": "No",
    "Is fire hot? Yes.\nIs the sun cold? No.\nIs water wet?": "Yes",
}
SUMS = {"12 + 30 = ": "42", "7 + 8 = ": "15", "3 + 4 = ": "7"}


def _right(answers: dict[str, str]) -> Callable[[str, str], float]:
    return lambda prompt, text: float(text.strip() == answers[prompt])


def _task(answers: dict[str, str], **settings: Any) -> LMTask:
    lm = smollm2()
    return text_task(lm.tokenizer, list(answers), reward=_right(answers), max_completions=10**6, **settings)


def _written(answers: dict[str, str], group_size: int, **settings: Any) -> tuple[Problem, LMTask]:
    task = _task(answers, **settings)
    return Problem(task, HFPolicy(smollm2().model, task, copy=False), groups=1, group_size=group_size), task


@functools.cache
def _capitals() -> tuple[Problem, LMTask]:
    return _written(CAPITALS, 8)


@functools.cache
def _questions() -> tuple[Problem, LMTask]:
    return _written(QUESTIONS, 4, actions=[" Yes", " No", " yes", " no"])


@functools.cache
def _sums() -> tuple[Problem, LMTask]:
    return _written(SUMS, 4, actions=list("0123456789"), max_new_tokens=2)


def _drawn_by(found: tuple[Problem, LMTask], sampler: Any) -> Problem:
    """The problem with rollouts drawn by a sampler, a policy over the same task, or another model."""
    problem, task = found
    if isinstance(sampler, torch.nn.Module):
        with torch.no_grad():
            sampler = HFPolicy(sampler, task)().detach()
    return replace(problem, behavior_logits=sampler)


def _in_bfloat16(task: LMTask) -> torch.Tensor:
    with torch.no_grad():
        return HFPolicy(smollm2().model, task, dtype=torch.bfloat16)()


def _stale() -> torch.nn.Module:
    return perturbed(smollm2().model, relative=0.01, seed=1)


@named("pretrained/capitals", heavy=True)
def _pretrained_capitals() -> Problem:
    """SmolLM2 names four capitals with one token of its 49 152: two that it knows, one that it half knows, one it does not."""
    return _capitals()[0]


@named("pretrained/capitals-bf16", heavy=True)
def _capitals_bf16() -> Problem:
    """The same, drawn by a copy in bfloat16, as inference engines do: ratios are near 1, but not 1."""
    return _drawn_by(_capitals(), _in_bfloat16(_capitals()[1]))


@named("pretrained/capitals-stale", heavy=True)
def _capitals_stale() -> Problem:
    """The same, drawn by a copy whose weights are off by 1% of their size, a few updates old."""
    return _drawn_by(_capitals(), _stale())


@named("pretrained/capitals-temperature", heavy=True)
def _capitals_temperature() -> Problem:
    """The same, drawn at temperature .7: full support, and large weights on what is rarely drawn."""
    return _drawn_by(_capitals(), Decoding(temperature=0.7))


@named("pretrained/capitals-top-p", heavy=True)
def _capitals_top_p() -> Problem:
    """The same, drawn with top-p = .8: of 49 152 tokens a few are ever drawn, and no weight can bring the others back."""
    return _drawn_by(_capitals(), Decoding(top_p=0.8))


@named("pretrained/yes-no", heavy=True)
def _yes_no() -> Problem:
    """SmolLM2 answers three questions with one of four words."""
    return _questions()[0]


@named("pretrained/sums", heavy=True)
def _pretrained_sums() -> Problem:
    """SmolLM2 adds two numbers in up to two digits: completions of unequal length, rewarded if right."""
    return _sums()[0]


@named("pretrained/sums-stale", heavy=True)
def _sums_stale() -> Problem:
    """The sums, drawn by a copy whose weights are off by 1% of their size: two ratios a row."""
    return _drawn_by(_sums(), _stale())


@named("pretrained/sums-bf16", heavy=True)
def _sums_bf16() -> Problem:
    """The sums, drawn by a copy in bfloat16."""
    return _drawn_by(_sums(), _in_bfloat16(_sums()[1]))


@named("pretrained/sums-top-p", heavy=True)
def _sums_top_p() -> Problem:
    """The sums, drawn at temperature .8 with top-p = .9: support is broken at both tokens."""
    return _drawn_by(_sums(), Decoding(temperature=0.8, top_p=0.9))
