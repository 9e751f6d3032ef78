"""From what a user writes to an `Estimator`: a name of the zoo, `pkg.mod:function`, a plain loss.

Importing this module fills the registries of estimators and problems.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pgcheck import named_problems, notes_problems, pretrained_problems
from pgcheck.batch import LogitsNotAsked
from pgcheck.errors import EstimatorError, UsageError, in_words, nearest
from pgcheck.estimators import zoo
from pgcheck.estimators.base import Estimator, find_estimator, registered_estimators
from pgcheck.estimators.from_loss import from_loss
from pgcheck.problem import find_problem
from pgcheck.seeding import random_state_kept

AnyEstimator = Estimator | str | Callable[..., Any]

FILLED_BY = (named_problems, notes_problems, pretrained_problems, zoo)


def as_estimator(estimator: AnyEstimator) -> Estimator:
    """An estimator as it is, by name, by `pkg.mod:function`, or from a plain callable taken as a loss over one batch `[B, T]`.

    A loss that reads `batch.logits` gets `leaf="logits"`.

    Raises:
        UnknownNameError: no estimator of that name.
        UsageError: `pkg.mod:function` cannot be imported.
        EstimatorError: neither an estimator, nor a name, nor callable.
    """
    if isinstance(estimator, Estimator):
        return estimator
    if isinstance(estimator, str):
        return imported(estimator) if ":" in estimator else _named(estimator)
    if not callable(estimator):
        raise EstimatorError(
            f"estimator: {estimator!r} is neither an Estimator, nor the name of one, nor a loss `batch -> scalar`."
        )
    made = from_loss(estimator)
    probe = find_problem("dialogue/two-turn")
    try:
        with random_state_kept():
            made.coefficients(probe.trajectories.batch(torch.arange(probe.rows), probe.group_labels))
    except LogitsNotAsked:
        return from_loss(estimator, leaf="logits")
    except Exception:  # the run will meet it, and say on which problem
        return made
    return made


def _named(name: str) -> Estimator:
    """An entry of the zoo; failing that, of the shelf of those that are wrong on purpose."""
    from pgcheck.estimators.broken import BROKEN

    return BROKEN[name].estimator if name in BROKEN else find_estimator(name)


def as_estimators(estimators: Sequence[AnyEstimator]) -> list[Estimator]:
    """Several, in their order.

    Raises:
        UsageError: not a list, or an empty one.
    """
    if isinstance(estimators, str) or not isinstance(estimators, Sequence) or not estimators:
        raise UsageError(f"estimators: {estimators!r}; expected a list of losses, estimators or names.")
    return [as_estimator(e) for e in estimators]


def command_name(estimator: AnyEstimator) -> str:
    """How the command line names it: a registered name, or `module:function` for code of the user's."""
    if isinstance(estimator, str):
        return f"'{estimator}'" if "(" in estimator else estimator  # a shell would read the brackets
    name = estimator.name if isinstance(estimator, Estimator) else str(getattr(estimator, "__name__", "your_loss"))
    if isinstance(estimator, Estimator):
        if registered_estimators().get(estimator.name) is estimator:
            return command_name(estimator.name)
        estimator = getattr(estimator.coefficients, "loss", estimator.coefficients)
    module = getattr(estimator, "__module__", "your_module")
    if module == "__main__":
        module = Path(getattr(sys.modules["__main__"], "__file__", None) or "your_module.py").stem
    qualified = str(getattr(estimator, "__qualname__", "<instance>"))
    return name if "<" in qualified else f"{module}:{qualified}"  # what is made inside a function has no path


def imported(path: str) -> Estimator:
    """The estimator `pkg.mod:attribute`; the current directory is importable.

    Raises:
        UsageError: the module or the attribute is not there, or importing it fails.
    """
    module_name, _, attribute = path.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module_name)
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(
            f"estimator '{path}': importing '{module_name}' failed: {in_words(error).rstrip('.')}. It is looked for in the"
            " current directory and among the installed packages."
        ) from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            near = nearest(part, dir(found))
            raise UsageError(f"estimator '{path}': '{module_name}' has no attribute '{attribute}'.{near}")
        found = getattr(found, part)
    if not (isinstance(found, Estimator) or callable(found)):
        raise UsageError(f"estimator '{path}': {found!r} is neither an Estimator nor a loss `batch -> scalar`.")
    made = as_estimator(found)
    return made if isinstance(found, Estimator) else replace(made, name=path.rpartition(":")[2])
