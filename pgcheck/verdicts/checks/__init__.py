"""The checks, each a function from an estimator and a problem to a verdict.

`bias` judges E ĝ against the claims; `invariance` and `hygiene` judge single batches, for what a correct loss has
whatever its bias.
"""

from __future__ import annotations

from pgcheck.verdicts.checks import bias, hygiene, invariance  # noqa: F401  (fills the registry)
from pgcheck.verdicts.checks.base import Check, find_check, registered_checks

__all__ = ["Check", "find_check", "registered_checks"]
