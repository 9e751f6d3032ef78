"""Where rollouts are: named, refused where it is not there; on a GPU the same ones, and the same estimates."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import pgcheck
from pgcheck.engines.coefficients import coefficients_of
from pgcheck.engines.sketch import SketchSpace
from pgcheck.envs import language
from pgcheck.errors import UsageError
from pgcheck.estimators.lookup import FILLED_BY  # noqa: F401  (fills the registries)
from pgcheck.policies import Decoding, TinyGPT
from pgcheck.problem import Problem
from pgcheck.sampling import as_device

KINDS: dict[str, dict[str, Any]] = {
    "table": {},
    "tree": {"max_completions": 1},
    "written": {"max_completions": 1, "max_prefixes": 1},
}


def problem(kind: str) -> Problem:
    task = replace(language.tool_dialogue(), **KINDS[kind])
    model = TinyGPT(5, width=8, layers=2, seed=3)
    return Problem(task, model, behavior_logits=Decoding(temperature=1.2), group_size=3)


def test_names() -> None:
    assert as_device("cpu") == "cpu"
    assert as_device("auto") == ("cuda" if torch.cuda.is_available() else "cpu")
    for wrong in ("gpu", "cuda:99"):
        with pytest.raises(UsageError, match=f"device: '{wrong}' cannot be used here"):
            problem("table").sample(1, device=wrong)


@pytest.mark.parametrize("kind", KINDS)
def test_auto_is_the_cpu_where_there_is_nothing_else(kind: str) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    p = problem(kind)
    for name, x in p.sample(5, device="auto").tensors().items():
        torch.testing.assert_close(x, p.sample(5).tensors()[name], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kind", KINDS)
def test_on_a_gpu(kind: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("this machine has no GPU")
    p, e = problem(kind), pgcheck.as_estimator("grpo")
    found = []
    for device in ("cpu", "cuda"):
        sampler, space = p.sampler(seed=1, device=device), SketchSpace.of(p, directions=4)
        table, index = sampler.draw(0, 64)
        batch = table.batch(index, sampler.labels)
        assert batch.logp.device.type == device
        x = space.project(coefficients_of(e, batch), table, index)
        assert x.device.type == device
        found.append((batch, x))
    for name in ("action", "reward", "logp", "behavior_logp"):
        here, there = (getattr(batch, name).cpu() for batch, _ in found)
        torch.testing.assert_close(here, there, rtol=0, atol=1e-12, msg=name)
    torch.testing.assert_close(found[0][1], found[1][1].cpu(), rtol=0, atol=1e-11)
