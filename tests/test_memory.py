"""Memory: what is predicted against what a process of its own took at its peak; and what does not fit is refused."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

import pgcheck
from pgcheck import generation
from pgcheck.envs import language
from pgcheck.errors import BudgetError
from pgcheck.memory import free_memory, in_bytes, kept_by
from pgcheck.policies import TinyGPT
from pgcheck.policies.transformer import LMPolicy
from pgcheck.problem import Problem
from tests.once import Once

EACH_ALONE = """
import itertools, json, os, sys, torch
import pgcheck.api, pgcheck.engines.parameters
torch.set_num_threads(1)
def told(name):  # ru_maxrss would have the peak of the process that started this one in it
    return next(1024 * int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))
def now(): return told("VmRSS")
def peak(): return told("VmHWM")
for code in json.loads(sys.argv[1]):  # in a process of its own, which has taken nothing but what is imported
    if os.fork() == 0:
        open("/proc/self/clear_refs", "w").write("5")  # its peak is what it has now
        exec(code)
        sys.stdout.flush()
        os._exit(0)
    assert os.wait()[1] == 0
"""
PASS = """
from pgcheck.policies.tabular import in_parameters
from pgcheck.policies.transformer import LMPolicy
from pgcheck.policies import TinyGPT
width, layers, length, rows = {size}
texts = [(1, *t, *[2] * (length - 6)) for t in itertools.islice(itertools.product(range(5), repeat=5), rows)]
policy = LMPolicy(TinyGPT(8, context=length, width=width, layers=layers), texts, vocab_size=8)
LMPolicy.tokens_at_once, LMPolicy.reads_branches = rows * length, False
predicted, x = policy.bytes_of_pass(rows), torch.ones(len(texts), 8, dtype=torch.float64)
base = now()
in_parameters(policy, x)
print(predicted, peak() - base)
"""
TREE = """
import pgcheck.api
from pgcheck.envs.language import LMTask
vocabulary, tokens, prompts = {size}
task = LMTask([(1, i) for i in range(prompts)], vocab_size=vocabulary, eos=0, max_new_tokens=tokens,
              reward=lambda prompt, text: float(sum(text) % 3 == 0), max_completions=1, max_prefixes=10**6)
base = now()
task.tree
print(task.tree_bytes, peak() - base)
"""


MAPPED = """
from pgcheck.engines import parameters
from pgcheck.envs.language import LMTask
from pgcheck.policies import TinyGPT
from pgcheck.problem import Problem
width, layers, tokens, draws, onto = {size}
task = LMTask([(1, 2)], vocab_size=8, eos=None, max_new_tokens=tokens, reward=lambda prompt, text: 1.0)
p = Problem(task, TinyGPT(8, context=tokens + 2, width=width, layers=layers), group_size=4)
table, index = p.sampler().draw(0, draws)
v = torch.ones(parameters.number_of_parameters(p), onto, dtype=torch.float64) if onto else None
plan = parameters._Plan.of(table.policy, rows=4, actions=8, width=onto)
parameters._TOKENS_AT_ONCE, parameters._BYTES_AT_ONCE = 10**9, 10**12
predicted = plan.bytes_of(draws, tokens + 1)
few = parameters.by_draws(torch.ones(2, 4, tokens), table, index[:2], p, v)  # what comes with the first call
base = now()
for which, x in parameters.estimates_in_parameters(torch.ones(draws, 4, tokens), table, index, p, v):
    assert len(x) == draws
print(predicted, peak() - base)
"""
DRAWN = """
from pgcheck.engines import parameters
from pgcheck.envs.language import LMTask
from pgcheck.policies import TinyGPT
from pgcheck.problem import Problem
vocabulary, tokens, draws = {size}
task = LMTask([(1, 2)], vocab_size=vocabulary, eos=None, max_new_tokens=tokens, reward=lambda prompt, text: 1.0)
sampler = Problem(task, TinyGPT(vocabulary, context=tokens + 2, width=4, layers=1), group_size=4).sampler()
sampler.draw(0, 1)
base = now()
table = sampler.draw(0, draws)
print(sampler.bytes_of(draws), peak() - base)
"""


CASES = [
    (PASS, (64, 2, 16, 600)), (PASS, (128, 3, 8, 900)), (PASS, (48, 2, 48, 300)),
    (TREE, (8, 6, 2)), (TREE, (30, 4, 2)), (TREE, (3, 14, 1)),
    (MAPPED, (64, 2, 24, 40, 3)), (MAPPED, (96, 2, 24, 40, 0)),
    (DRAWN, (500, 6, 3_000)), (DRAWN, (50, 16, 4_000)),
]  # fmt: skip


@pytest.fixture(scope="module")
def measured(once: Once) -> list[str]:
    """Of each case what is predicted, and what was taken."""
    codes = json.dumps([code.format(size=size) for code, size in CASES])
    run = [sys.executable, "-c", EACH_ALONE, codes]
    return once("memory", lambda: subprocess.run(run, capture_output=True, text=True, check=True).stdout.splitlines())


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says what a process took")
@pytest.mark.parametrize("case", range(len(CASES)))
def test_what_is_predicted_is_taken(case: int, measured: list[str]) -> None:
    """Within a factor of 1.5 either way."""
    assert len(measured) == len(CASES)
    predicted, taken = map(float, measured[case].split())
    assert 1 / 1.5 < predicted / taken < 1.5


def test_what_a_backward_pass_keeps() -> None:
    """Of y = exp(x w): x, for the gradient of w, and y, which is returned as well; a view is no memory of its own."""
    w, x = torch.ones(4, 8, dtype=torch.float64, requires_grad=True), torch.ones(3, 4, dtype=torch.float64)
    assert kept_by(lambda: torch.exp(x.view(3, 4) @ w), besides=[w]) == x.nbytes + 2 * 3 * 8 * 8
    assert free_memory() > 0
    assert in_bytes(3 * 2**20) == "3 MiB"


def test_rows_at_once_are_those_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Less memory, more passes, the same numbers; and none at all is refused, before the model is checked."""
    task = language.sum_mod(3, max_new_tokens=4, vocab_size=6)
    model = TinyGPT(6, context=6, width=16)
    whole = LMPolicy(model, task.contexts, vocab_size=6)
    assert len(whole.parts) == 1
    need = 2 * (whole.bytes_of_pass(20) + 1)
    monkeypatch.setattr("pgcheck.policies.transformer.free_memory", lambda device: need)
    some = LMPolicy(model, task.contexts, vocab_size=6)
    assert {p.stop - p.start for p in some.parts[:-1]} == {20}
    torch.testing.assert_close(some(), whole(), rtol=0, atol=1e-13)
    monkeypatch.setattr("pgcheck.policies.transformer.free_memory", lambda device: 2**20)
    with pytest.raises(BudgetError, match=r"one row of 5 tokens take .* 1 MiB are free"):
        Problem(task, TinyGPT(6, context=6, width=128))


def test_what_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    task = language.sum_mod(3, max_new_tokens=6, vocab_size=8)
    monkeypatch.setattr("pgcheck.envs.language.free_memory", lambda: 10 * 2**20)
    with pytest.raises(BudgetError, match=r"the tree of 39,216 prefixes takes 5.* MiB; 10 MiB are free"):
        _ = task.tree
    monkeypatch.setattr("pgcheck.generation.free_memory", lambda device: 10**6)
    written = Problem(
        language.sum_mod(3, max_new_tokens=16, vocab_size=8), TinyGPT(8, context=18, width=8), group_size=4
    )
    with pytest.raises(BudgetError, match=r"38\.1 MiB of logits and texts; 977 KiB are allowed\. Draw 22 at a time"):
        written.sampler().draw(0, 1_000)
    written.sampler().draw(0, 22)
    assert pgcheck.BudgetError is BudgetError


def test_a_grain_is_drawn_in_parts_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A large vocabulary takes more draws of fewer batches, and says the same."""
    task = language.sum_mod(3, max_new_tokens=16, vocab_size=8)
    p, e = Problem(task, TinyGPT(8, context=18, width=8), group_size=4), pgcheck.as_estimator("grpo")
    (whole,) = pgcheck.sketch_moments([e], p, batches=1_024, directions=3)
    monkeypatch.setattr("pgcheck.generation.MEMORY", need := p.sampler().bytes_of(300))
    (some,) = pgcheck.sketch_moments([e], p, batches=1_024, directions=3)
    torch.testing.assert_close(some.mean, whole.mean, rtol=0, atol=1e-12)
    torch.testing.assert_close(some.covariance, whole.covariance, rtol=0, atol=1e-12)
    drawn = generation.draws_at_once(p.sampler(), 1_024)
    assert drawn == 256
    assert p.sampler().bytes_of(drawn) <= need
