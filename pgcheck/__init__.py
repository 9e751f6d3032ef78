"""pgcheck: what a policy-gradient estimator really estimates.

    import pgcheck
    pgcheck.check_estimator(my_loss)      # raises pgcheck.BiasError, or returns a Report

Names are imported on first use, so that `import pgcheck` and `pgcheck --help` do not wait for torch.

PYTEST_DONT_REWRITE: pytest rewrites the packages of its plugins, and warns of one that was imported before it; there is no
assert here to rewrite.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_WHERE = {
    "pgcheck.api": ("as_problems", "check_estimator", "check_training_step", "compare", "comparison", "moments"),
    "pgcheck.batch": ("Batch",),
    "pgcheck.engines.direct": ("TrainingStep", "direct_estimates"),
    "pgcheck.engines.exact": ("exact_moments",),
    "pgcheck.engines.moments": ("Moments",),
    "pgcheck.engines.monte_carlo": ("Sampling", "monte_carlo"),
    "pgcheck.engines.parameters": ("ParameterSpace",),
    "pgcheck.engines.stored": ("reference_draws",),
    "pgcheck.engines.sketch": ("SketchSpace", "sketch_moments"),
    "pgcheck.envs.language": ("LMTask",),
    "pgcheck.envs.tabular": ("TabularMDP",),
    "pgcheck.errors": (
        "BiasError", "BudgetError", "CheckFailed", "EstimatorError", "NotFiniteError", "PgcheckError", "ProblemError",
        "SuiteError", "TruthError", "UnknownNameError", "UsageError",
    ),
    "pgcheck.estimators.base": ("Claim", "Estimator", "biased", "from_coefficients", "proportional", "unbiased"),
    "pgcheck.estimators.from_loss": ("from_loss",),
    "pgcheck.estimators.lookup": ("as_estimator",),
    "pgcheck.envs.text": ("text_task",),
    "pgcheck.policies": ("Decoding", "HFPolicy", "LinearPolicy", "ModulePolicy", "SoftmaxTable", "TinyGPT"),
    "pgcheck.problem": ("Problem",),
    "pgcheck.rollouts": ("Rollouts",),
    "pgcheck.runs.compare": ("Comparison", "Sweeps"),
    "pgcheck.runs.report": ("Report",),
    "pgcheck.trajectories": ("Paths", "Trajectories"),
}  # fmt: skip
_SUBMODULES = ("strategies", "testing")
_MODULE_OF = {name: module for module, names in _WHERE.items() for name in names}

__all__ = sorted([*_MODULE_OF, *_SUBMODULES])

if TYPE_CHECKING:
    from pgcheck import strategies, testing
    from pgcheck.api import as_problems, check_estimator, check_training_step, compare, comparison, moments
    from pgcheck.batch import Batch
    from pgcheck.engines.direct import TrainingStep, direct_estimates
    from pgcheck.engines.exact import exact_moments
    from pgcheck.engines.moments import Moments
    from pgcheck.engines.monte_carlo import Sampling, monte_carlo
    from pgcheck.engines.parameters import ParameterSpace
    from pgcheck.engines.sketch import SketchSpace, sketch_moments
    from pgcheck.engines.stored import reference_draws
    from pgcheck.envs.language import LMTask
    from pgcheck.envs.tabular import TabularMDP
    from pgcheck.envs.text import text_task
    from pgcheck.errors import (
        BiasError,
        BudgetError,
        CheckFailed,
        EstimatorError,
        NotFiniteError,
        PgcheckError,
        ProblemError,
        SuiteError,
        TruthError,
        UnknownNameError,
        UsageError,
    )
    from pgcheck.estimators.base import Claim, Estimator, biased, from_coefficients, proportional, unbiased
    from pgcheck.estimators.from_loss import from_loss
    from pgcheck.estimators.lookup import as_estimator
    from pgcheck.policies import Decoding, HFPolicy, LinearPolicy, ModulePolicy, SoftmaxTable, TinyGPT
    from pgcheck.problem import Problem
    from pgcheck.rollouts import Rollouts
    from pgcheck.runs.compare import Comparison, Sweeps
    from pgcheck.runs.report import Report
    from pgcheck.trajectories import Paths, Trajectories


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return importlib.import_module(f"pgcheck.{name}")
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'pgcheck' has no attribute '{name}'")
    return getattr(importlib.import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return list(__all__)
