"""Shared settings: Hypothesis profiles and the contract problem."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests.once import Once

settings.register_profile(
    "ci", derandomize=True, max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("thorough", max_examples=2000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
# Tensors here are tiny: handing them to a second thread costs more than it brings, the more so under pytest-xdist.
torch.set_num_threads(1)

settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture
def forks() -> None:
    """For a test that has several processes evaluate draws: they are forked."""
    if torch.cuda.is_available():
        pytest.skip("no process is forked where torch sees a GPU; CUDA_VISIBLE_DEVICES='' hides it")


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Once:
    """Shared by all modules and by all workers."""
    return Once(tmp_path_factory)


@pytest.fixture(scope="session")
def contract() -> dict[str, Any]:
    """The worked example, computed elsewhere by brute force over ordered tuples."""
    data: dict[str, Any] = json.loads((Path(__file__).parent / "two_turn.json").read_text())
    return data
