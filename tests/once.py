"""What several tests look at, computed once a run: by the first worker of pytest-xdist that asks; the others read its file.

Guarantee: nothing outlives the run, so nothing can be stale.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
from filelock import FileLock

T = TypeVar("T")


class Once:
    """`once(name, make)` is `make()`, of this process or of another; in a run a name stands for one value."""

    def __init__(self, factory: pytest.TempPathFactory) -> None:
        self._known: dict[str, Any] = {}
        shared = "PYTEST_XDIST_WORKER" in os.environ
        self._folder: Path | None = factory.getbasetemp().parent if shared else None  # of all workers of one run

    def __call__(self, name: str, make: Callable[[], T]) -> T:
        if name not in self._known:
            self._known[name] = make() if self._folder is None else self._read(self._folder, name, make)
        known: T = self._known[name]
        return known

    def _read(self, folder: Path, name: str, make: Callable[[], Any]) -> Any:
        file = folder / f"{name.replace('/', '_')}.pickle"
        with FileLock(file.with_suffix(".lock")):
            if not file.exists():
                file.write_bytes(pickle.dumps(make()))
        return pickle.loads(file.read_bytes())
