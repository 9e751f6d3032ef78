"""Training steps in parameters: whether one is an estimator batch by batch, and why its expectation is not ∇_θ J."""

from __future__ import annotations

import torch

from pgcheck.engines.coefficients import estimates
from pgcheck.engines.direct import StepRunner, direct_estimates
from pgcheck.engines.enumeration import Batches
from pgcheck.errors import UsageError
from pgcheck.estimators.base import Estimator

SAME_BATCHES = 32  # random batches on which a step is compared with an estimator


def same_as_gap(runner: StepRunner, estimator: Estimator) -> float:
    """The largest ‖ĝ_θ − ĝ_θ of `estimator`‖ over random batches, relative to the largest of the latter.

    Raises:
        UsageError: its groups are too small for the estimator, or it draws for itself.
    """
    problem = runner.problem
    table = problem.trajectories_with(estimator.needs)
    if not estimator.fits(problem) or len(table) != len(problem.trajectories):
        raise UsageError(
            f"same_as: '{estimator.name}' needs groups of at least {estimator.min_group_size} on '{problem.name}', and no draws"
            " of its own."
        )
    index = Batches(table, problem.sizes).random(SAME_BATCHES, seed=7)
    logits = estimates(estimator, table, index, problem.group_labels).unflatten(1, (table.contexts, -1))
    expected = torch.stack([runner.trained(problem.in_parameters(x)) for x in logits])
    found = direct_estimates(runner.step, problem, index)
    size, gap = float(expected.norm(dim=1).max()), float((found - expected).norm(dim=1).max())
    return gap / size if size > 0 else gap
