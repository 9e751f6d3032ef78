"""Hunting for a counterexample: random problems on which a claim should hold, and the smallest on which it does not.

Named problems have blind spots, as every finite set has. `search` draws problems of the same kind (`pgcheck.strategies`),
judges each exactly as a named one, and lets Hypothesis shrink what fails.

Guarantee: the same estimator gets the same problems on every call; the number of problems and of batches is bounded; a
counterexample is a fact, not a sample. Nothing found is no proof: `Searched` says how much was looked at.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import hypothesis
from hypothesis.errors import NoSuchExample

from pgcheck import strategies
from pgcheck.engines.exact import LOOP_COST, exact_moments
from pgcheck.engines.threads import one_thread
from pgcheck.errors import BudgetError, NotFiniteError
from pgcheck.estimators.base import (
    Claim,
    Estimator,
    broken_support,
    entropy_bonus,
    full_support,
    kl_penalty,
    off_policy,
    on_policy,
    return_alone,
    undiscounted,
)
from pgcheck.problem import Problem
from pgcheck.seeding import random_state_kept
from pgcheck.verdicts.checks.bias import judge_claims
from pgcheck.verdicts.verdict import RTOL, Status, measure

EXAMPLES = 200
BATCHES = 300_000  # evaluated in all; a loss that only runs in a loop counts 300 for each
NAME = "random/counterexample"

# Small ones first, each with a share of the examples: what fails there is found at once, and is near its smallest already.
_BOXES: tuple[tuple[float, dict[str, Any]], ...] = (
    (0.2, {"max_actions": 2, "max_states": 1, "max_horizon": 1}),
    (0.3, {"max_actions": 2, "max_states": 2, "max_horizon": 2, "observation": False, "random_moves": False}),
    (0.5, {}),
)
_SETTINGS = hypothesis.settings(
    database=None, deadline=None, derandomize=True, phases=(hypothesis.Phase.generate, hypothesis.Phase.shrink),
    verbosity=hypothesis.Verbosity.quiet, print_blob=False,
)  # fmt: skip


@dataclass(frozen=True)
class Searched:
    """What a search for one claim came to."""

    claim: Claim
    problems: int  # different ones that were judged
    worst: float  # the largest distance from the claim, where it held
    smallest: Problem | None  # the smallest on which it does not


def search(
    estimator: Estimator, like: Sequence[Problem] = (), *, examples: int = EXAMPLES, rtol: float = RTOL
) -> list[Searched]:
    """Random problems for each claim that one problem can refute (`unbiased`, `proportional`) and that applies to any of
    `like`; up to the first with a counterexample.

    What all of `like` share of on- or off-policy, support, objective and γ = 1, the random problems share as well: a loss
    that is judged on-policy is not refuted off-policy.

    Raises:
        EstimatorError: the estimator breaks its contract on one of them.
    """
    found = []
    for claim in estimator.claims:
        if claim.kind == "biased" or (like and not any(claim.applies(p) for p in like)):
            continue
        found.append(_search(estimator, claim, _bounds(estimator, claim, like), examples, rtol))
        if found[-1].smallest is not None:
            break
    return found


def _bounds(estimator: Estimator, claim: Claim, like: Sequence[Problem]) -> dict[str, Any]:
    """Of `strategies.problems`."""
    kinds = (on_policy, off_policy, full_support, broken_support, undiscounted, return_alone, kl_penalty, entropy_bonus)
    shared = tuple(c for c in kinds if like and all(map(c.holds, like)))
    return strategies.bounds_for(estimator, replace(claim, conditions=shared + claim.conditions))


def _search(estimator: Estimator, claim: Claim, bounds: dict[str, Any], examples: int, rtol: float) -> Searched:
    judge = _Judge(replace(estimator, claims=(claim,)), rtol)
    smallest: Problem | None = None
    for share, box in _BOXES:
        problems = strategies.problems(max_batches=BATCHES // 500, name=NAME, **(box | bounds))
        settings = hypothesis.settings(_SETTINGS, max_examples=max(1, round(share * examples)))
        with random_state_kept(), one_thread(), contextlib.suppress(NoSuchExample):
            smallest = hypothesis.find(problems, judge.fails, settings=settings, random=Random(0))
            break
    held = [d for d in judge.distance.values() if d <= rtol]
    return Searched(claim, len(judge.distance), max(held, default=0.0), smallest)


class _Judge:
    """Judges a problem once, until its batches are spent; after that, nothing new fails, so that shrinking comes to an end."""

    def __init__(self, estimator: Estimator, rtol: float) -> None:
        self.estimator, self.rtol = estimator, rtol
        self.distance: dict[str, float] = {}  # from the claim, by digest; beyond rtol, it fails
        self.spent = 0

    def fails(self, problem: Problem) -> bool:
        known = self.distance.get(problem.digest)
        if known is None:
            known = self._measure(problem) if self.spent < BATCHES else None
        if known is None:
            return False
        self.distance[problem.digest] = known
        return not known <= self.rtol

    def _measure(self, problem: Problem) -> float | None:
        """None where it cannot be asked."""
        (claim,) = self.estimator.claims
        if not claim.applies(problem) or not self.estimator.fits(problem):
            return None
        try:
            (moments,) = exact_moments([self.estimator], problem)
        except NotFiniteError:
            return float("inf")
        except BudgetError:
            return None
        self.spent += moments.enumerated * (LOOP_COST if moments.lane == "loop" else 1)
        (verdict,) = judge_claims(
            self.estimator, [problem], [measure(self.estimator, problem, moments, rtol=self.rtol)], rtol=self.rtol
        )
        return verdict.measured if verdict.status is Status.PASS else max(verdict.measured, 2 * self.rtol)
