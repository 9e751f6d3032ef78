"""What several tests look at, computed once a run: by the first worker of pytest-xdist that asks; the others read its file.

Guarantee: nothing outlives the run, so nothing can be stale.
"""

from __future__ import annotations

import contextlib
import os
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import pytest
from filelock import FileLock, Timeout

T = TypeVar("T")


class Once:
    """`once(name, make)` is `make()`, of this process or of another; in a run a name stands for one value."""

    def __init__(self, factory: pytest.TempPathFactory) -> None:
        self._known: dict[str, Any] = {}
        self._shared = "PYTEST_XDIST_WORKER" in os.environ
        base = factory.getbasetemp()
        self.folder: Path = base.parent if self._shared else base  # of the run, for what `make` writes

    def __call__(self, name: str, make: Callable[[], T]) -> T:
        return self.each({name: make})[name]

    def each(self, makes: Mapping[str, Callable[[], T]]) -> dict[str, T]:
        """Several: while another worker makes one of them, this one makes the next."""
        for wait in (False, True):
            for name, make in makes.items():
                if name not in self._known:
                    self._find(name, make, wait)
        return {name: self._known[name] for name in makes}

    def _find(self, name: str, make: Callable[[], Any], wait: bool) -> None:
        if not self._shared:
            self._known[name] = make()
            return
        file = self.folder / f"{name.replace('/', '_')}.pickle"
        with contextlib.suppress(Timeout), FileLock(file.with_suffix(".lock"), blocking=wait):
            if not file.exists():
                file.write_bytes(pickle.dumps(make()))
            self._known[name] = pickle.loads(file.read_bytes())
