"""The checker is checked: how often each stage of a sampled verdict is wrong, against what it promises.

Where ĝ can be enumerated it has a finite law, and a sample of n draws is a multinomial count over its values
(`pgcheck.statistics.finite`), so that 1e5 looks are made in about a minute (`pgcheck.statistics.stacked`). What is measured:

* **trigger** and **confirm** on estimators without a bias, recorded apart and without stopping, at nominal 1e-1, 1e-2, 1e-3:
  a false FAIL takes both, on independent draws;
* **certificate** with a bias planted exactly at the tolerance, in four directions: a false PASS;
* both stages of mode `exceeds`, with a bias planted exactly at the tolerance;
* all three where κ is open and the reference drawn as well (`pgcheck.statistics.open_scale`);
* **intervals**: how often one that is given misses, after a fixed number of draws and at whichever look a run stopped;
* **power**: draws to a FAIL, against the test that knows the direction of the bias beforehand: as if its scores were normal,
  and as it is at α (`pgcheck.calibrate.oracle`).

Guarantee: rates carry Clopper–Pearson bounds (99%); families are never pooled, as one in which the guard refuses would
flatter another; every law and question has a stream of its own, so that neither the set of laws, nor that of questions, nor the
number of processes moves a number, and more looks go on where fewer ended (where κ is open, those of the first
setting). The error rate of a whole verdict, 1e-6 for a run, is *inferred* from the stages and their independence.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from multiprocessing import get_context
from typing import Any

import numpy as np

from pgcheck.calibrate.endings import end_to_end, powers
from pgcheck.calibrate.laws import UNTOLD, estimator_law, laws, laws_named
from pgcheck.calibrate.looks import SHAPES, exceeding_rates, false_passes, null_rates, planted, ratio_misses
from pgcheck.calibrate.open_scale import open_passes, open_rates, open_triggers
from pgcheck.calibrate.rates import ALLOWED, NOMINAL, Calibration, EndToEnd, Power, Rate, clopper_pearson, rate
from pgcheck.engines.moments import Progress
from pgcheck.engines.threads import one_thread
from pgcheck.errors import UnknownNameError, UsageError
from pgcheck.statistics.finite import Law

__all__ = [
    "ALLOWED", "NOMINAL", "QUESTIONS", "RUNS", "SHAPES", "Calibration", "EndToEnd", "Power", "Rate", "calibrate",
    "clopper_pearson", "estimator_law", "false_passes", "laws", "laws_named", "null_rates", "open_rates", "planted", "rate",
    "ratio_misses",
]  # fmt: skip

RUNS = 32_000
QUESTIONS = (  # what a stream is for
    "null", "planted", "exceeds", "open", "open-trigger", "open-planted", "ratio", "verdicts", "power",
)  # fmt: skip
_MANY = 16  # coordinates


def _stream(law: Law, what: str, seed: int) -> np.random.Generator:
    """One for each law and question."""
    return np.random.Generator(np.random.Philox([seed, zlib.crc32(f"{law.name} {what}".encode())]))


@one_thread()
def _of_looks(law: Law, runs: int, seed: int, questions: Sequence[str]) -> list[Rate]:
    """What single looks say; those with a bias take four times as long in many coordinates, and are half as many."""
    half = runs if len(law.mean) <= _MANY else max(100, runs // 2)
    of = {
        "null": lambda rng: null_rates(law, runs=runs, rng=rng),
        "planted": lambda rng: false_passes(law, runs=2 * half, rng=rng),
        "exceeds": lambda rng: exceeding_rates(law, runs=max(100, half // 2), rng=rng),
        "open": lambda rng: open_rates(law, runs=max(10, half // 8), rng=rng),
        "open-trigger": lambda rng: open_triggers(law, runs=max(10, half // 8), rng=rng),
        "open-planted": lambda rng: open_passes(law, runs=max(10, half // 2), rng=rng),
        "ratio": lambda rng: [ratio_misses(law, runs=max(20, half // 25), rng=rng)],
    }
    return [r for name, ask in of.items() if name in questions for r in ask(_stream(law, name, seed))]


@one_thread()
def _of_whole_runs(
    law: Law, runs: int, seed: int, questions: Sequence[str]
) -> tuple[list[EndToEnd], list[Power], list[Rate]]:
    """What judges say that look until they have decided."""
    verdicts, power, misses = list[EndToEnd](), list[Power](), list[Rate]()
    if "verdicts" in questions:
        ended, misses = end_to_end(law, runs=max(4, runs // 320), rng=_stream(law, "verdicts", seed))
        verdicts.append(ended)
    if "power" in questions and law.family != UNTOLD:  # a bias has no size beside its noise
        power, more = powers(law, runs=max(2, runs // 2000), rng=_stream(law, "power", seed))
        misses = misses + more
    return verdicts, power, misses


def calibrate(
    over: Sequence[Law] | None = None,
    *,
    runs: int = RUNS,
    seed: int = 0,
    workers: int = 1,
    questions: Sequence[str] = QUESTIONS,
    progress: Progress | None = None,
) -> Calibration:
    """Measure all of it, or some questions.

    Args:
        over: the laws; None: `laws()`.
        runs: looks of each law without a bias; twice as many with one (as many in more than 16 coordinates); whole runs are
            fewer, as they take longer.
        workers: processes; any number gives the same figures.
        questions: some of `QUESTIONS`.
        progress: called before each law.

    Raises:
        UsageError: fewer than 100 runs, or a question that there is not.
    """
    if runs < 100:
        raise UsageError(f"runs: {runs}; fewer than 100 say nothing about a rate.")
    for q in questions:
        if q not in QUESTIONS:
            raise UnknownNameError("question", q, QUESTIONS, hint=f"Questions: {', '.join(QUESTIONS)}.")
    chosen = laws() if over is None else tuple(over)
    every = (chosen, *([x] * len(chosen) for x in (runs, seed, questions)))

    def told(what: str, found: Iterator[Any]) -> list[Any]:
        out = []
        for i, law in enumerate(chosen):
            if progress is not None:
                progress(f"{law.name}, {what}", i, len(chosen))
            out.append(next(found))
        return out

    with ExitStack() as stack:
        run = map if workers == 1 else stack.enter_context(_pool(workers)).map
        looks, whole = run(_of_looks, *every), run(_of_whole_runs, *every)
        rates = [r for of_law in told("looks", iter(looks)) for r in of_law]
        ended = told("whole runs", iter(whole))
    return Calibration(
        seed,
        (*rates, *(r for _, _, misses in ended for r in misses)),
        tuple(p for _, power, _ in ended for p in power),
        tuple(v for verdicts, _, _ in ended for v in verdicts),
    )


def _pool(workers: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(workers, mp_context=get_context("spawn"))
