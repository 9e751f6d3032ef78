"""Which engine: exact by enumeration, sampled, or whichever fits.

Guarantee: nothing is sampled that was asked for exactly; `auto` samples only what the exact engine refuses for its size.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Literal, get_args

from pgcheck.engines.exact import DEFAULT_BUDGET, exact_moments
from pgcheck.engines.lanes import Scale
from pgcheck.engines.moments import Moments, Progress
from pgcheck.engines.monte_carlo import Sampling, monte_carlo
from pgcheck.engines.sketch import default_space
from pgcheck.engines.stored import Stored
from pgcheck.errors import BudgetError, UsageError
from pgcheck.estimators.base import Estimator
from pgcheck.problem import Problem

Engine = Literal["exact", "monte_carlo", "auto"]


def checked_engine(engine: str) -> Engine:
    """The name of an engine.

    Raises:
        UsageError: it is none.
    """
    for known in get_args(Engine):
        if engine == known:
            return known
    raise UsageError(f"engine: {engine!r} is not one of {', '.join(get_args(Engine))}.")


def checked_sampling(sampling: Sampling | None) -> Sampling:
    """The settings of sampled verdicts, or those that nobody changed.

    Raises:
        UsageError: no `Sampling`.
    """
    if not isinstance(sampling, Sampling | None):
        raise UsageError(f"sampling: {sampling!r}; expected pgcheck.Sampling(…), as in pgcheck.Sampling(seed=1).")
    return sampling or Sampling()


def engine_on(engine: str | None, problems: Iterable[Problem]) -> Engine:
    """The engine asked for; if none is, exact, but for problems whose rollouts cannot be listed, where it must be `auto`."""
    if engine is not None:
        return checked_engine(engine)
    return "exact" if all(p.enumerable for p in problems) else "auto"


def moments_by(
    engine: Engine,
    estimators: Sequence[Estimator],
    problem: Problem,
    *,
    budget: int = DEFAULT_BUDGET,
    sampling: Sampling | None = None,
    scales: Sequence[Sequence[Scale]] | None = None,
    beside: int | None = None,
    parameters: bool = False,
    progress: Progress | None = None,
) -> list[Moments]:
    """E ĝ and Cov ĝ of every estimator, all on the same batches; `sampling`, `scales` and `beside` (as of
    `monte_carlo`) where drawn, there in parameters if those are asked for.

    Raises:
        BudgetError: `exact`, and the batches are too many; or what an estimator needs cannot be sampled.
    """
    how = checked_sampling(sampling)
    if engine == "exact" and how.reference is not None:
        raise UsageError(
            "reference: what was estimated before is for sampled verdicts; engine='auto' or 'monte_carlo'."
        )
    if engine == "exact":
        return exact_moments(estimators, problem, budget=budget, progress=progress)
    found: dict[int, Moments] = {}
    if engine == "auto" and problem.enumerable and how.reference is None:
        try:
            return exact_moments(estimators, problem, budget=budget, progress=progress)
        except BudgetError:
            for i, e in enumerate(estimators) if len(estimators) > 1 else ():  # those that fit stay exact
                with suppress(BudgetError):
                    found[i] = exact_moments([e], problem, budget=budget, progress=progress)[0]
    rest = [i for i in range(len(estimators)) if i not in found]
    drawn = [estimators[i] for i in rest]
    space = default_space(
        problem, parameters=parameters, directions=how.directions, seed=how.seed, beta=how.beta,
        device=how.device, reference=how.reference, first_look=how.settings.first_look,
    )  # fmt: skip
    sampled = monte_carlo(
        drawn,
        problem,
        scales=None if scales is None else [scales[i] for i in rest],
        beside=rest.index(beside) if beside in rest else None,
        settings=how.settings,
        seed=how.seed,
        draws=min(how.draws, space.most_draws) if isinstance(space, Stored) else how.draws,
        space=space,
        device=how.device,
        workers=how.workers,
        checkpoint=how.file_of(problem, drawn),
        progress=progress,
    )
    found |= dict(zip(rest, sampled, strict=True))
    return [found[i] for i in range(len(estimators))]
