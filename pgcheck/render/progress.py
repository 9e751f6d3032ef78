"""A progress bar on stderr for what takes longer than two seconds; nothing where stderr is no terminal."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a check of a few seconds does not wait for it
    from rich.progress import Progress, TaskID

PATIENCE = 2.0  # seconds


class ProgressBar:
    """Call it with (what, done, total); use it as a context. One line for each `what` that is under way."""

    def __init__(self, *, enabled: bool | None = None) -> None:
        self.enabled = sys.stderr.isatty() if enabled is None else enabled
        self.began = time.monotonic()
        self.bar: Progress | None = None
        self.tasks: dict[str, TaskID] = {}
        self.notes: dict[str, str] = {}

    def note(self, what: str, text: str) -> None:
        """What is known so far, shown behind `what` the next time it is told of."""
        self.notes[what] = text

    def __call__(self, what: str, done: int, total: int) -> None:
        if not self.enabled or (self.bar is None and time.monotonic() - self.began < PATIENCE):
            return
        if self.bar is None:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self.bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self.bar.start()
        if what not in self.tasks:
            self.tasks[what] = self.bar.add_task(what, total=total)
        shown = f"{what}  {self.notes[what]}" if self.notes.get(what) else what
        self.bar.update(self.tasks[what], completed=done, total=total, visible=done < total, description=shown)

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()
