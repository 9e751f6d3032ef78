"""Other processes that evaluate numbered tasks, for whoever puts the results together in order.

Workers are forked, so whatever a task needs is there as it is: closures, lambdas, models; only numbers are sent to them and
results sent back. A task that raises, and one whose worker has died, is done by the process that asked, which then sees the
error itself.

Guarantee: results come in the order of their tasks, whatever the number of workers; no worker outlives the process that
started it.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import pickle
import signal
import warnings
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Generic, TypeVar, cast

import torch
from numpy.typing import NDArray

from pgcheck.errors import UsageError

Result = TypeVar("Result")
_AHEAD = 2  # tasks that each worker is given before a result is taken


def check_workers(workers: int, device: str = "cpu") -> None:
    """Raise `UsageError` where so many processes cannot be had."""
    if workers == 1:
        return
    if device != "cpu":
        raise UsageError(f"workers: {workers} processes on device {device!r}; only on the CPU are there several.")
    if torch.cuda.is_available() or not hasattr(os, "fork"):
        why = (
            "torch allows none where it sees a GPU: hide it with CUDA_VISIBLE_DEVICES=''"
            if hasattr(os, "fork")
            else "there is none here"
        )
        raise UsageError(f"workers: {workers} processes are made by fork, and {why}.")


class Workers(Generic[Result]):
    """`task` of arguments, evaluated in `count` forked processes; use it as a context."""

    def __init__(self, count: int, task: Callable[..., Result]) -> None:
        self.task = task
        self._pending: deque[tuple[int, tuple[Any, ...]]] = deque()
        self._given = 0
        self._ends: list[Connection | None] = []
        self._processes = []
        context = multiprocessing.get_context("fork")
        for _ in range(count):
            ours, theirs = context.Pipe()
            others = [end for end in self._ends if end is not None]
            process = context.Process(target=_work, args=(task, theirs, [ours, *others]), daemon=True)
            with warnings.catch_warnings():  # of threads, jax's among them: nothing that has any is used in a worker
                warnings.simplefilter("ignore", RuntimeWarning)
                warnings.simplefilter("ignore", DeprecationWarning)
                process.start()
            theirs.close()
            self._ends.append(ours)
            self._processes.append(process)

    @property
    def hungry(self) -> bool:
        """Whether there should be more tasks under way."""
        return len(self._pending) < _AHEAD * len(self._ends)

    def give(self, *arguments: Any) -> None:
        """The next task."""
        at = self._given % len(self._ends)
        self._given += 1
        self._pending.append((at, arguments))
        end = self._ends[at]
        if end is not None:
            try:
                end.send(arguments)
            except OSError:
                self._ends[at] = None

    def take(self) -> Result:
        """The result of the earliest task that was not taken yet."""
        at, arguments = self._pending.popleft()
        end = self._ends[at]
        if end is not None:
            try:
                done, result = pickle.loads(end.recv_bytes())
                if done:
                    return cast(Result, result)
            except (EOFError, OSError):
                self._ends[at] = None
        return self.task(*arguments)

    def __enter__(self) -> Workers[Result]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for end, process in zip(self._ends, self._processes, strict=True):
            if end is not None:
                end.close()
            process.terminate()
            process.join()


def _work(task: Callable[..., Any], end: Connection, others: list[Connection]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that asked says what is to happen
    for other in others:  # so that the end of that process is the end of the pipe
        other.close()
    with suppress(EOFError, OSError):
        while True:
            arguments = end.recv()
            try:
                answer = (True, task(*arguments))
            except Exception:
                answer = (False, None)
            end.send_bytes(_packed(answer))  # send() would put tensors in shared memory, one file each


class _Pickler(pickle.Pickler):
    """Tensors as arrays: fifty times as fast as what torch makes of them."""

    def reducer_override(self, x: Any) -> Any:
        return (_unpacked, (x.detach().numpy(),)) if type(x) is torch.Tensor else NotImplemented


def _packed(answer: Any) -> bytes:
    out = io.BytesIO()
    _Pickler(out, protocol=5).dump(answer)
    return out.getvalue()


def _unpacked(x: NDArray[Any]) -> torch.Tensor:
    """In memory of torch's own, aligned as there: sums of it come out the same."""
    return torch.from_numpy(x).clone()
