"""From what a user writes to an `Estimator`: a name of the zoo, `pkg.mod:function` and its kin, a plain loss.

Importing this module fills the registries of estimators and problems.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib
import inspect
import re
import sys
import types
from collections.abc import Callable, Mapping, Sequence
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
from pgcheck.registry import find_problem
from pgcheck.seeding import random_state_kept

AnyEstimator = Estimator | str | Callable[..., Any]

FILLED_BY = (named_problems, notes_problems, pretrained_problems, zoo)
PACKAGE = Path(__file__).parent.parent


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
    return [made for e in estimators for made in _each(e)]


def _each(estimator: AnyEstimator) -> list[Estimator]:
    """A registry counts as its entries."""
    from_code = isinstance(estimator, str) and ":" in estimator
    return all_imported(str(estimator)) if from_code else [as_estimator(estimator)]


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


_PATH = re.compile(
    r"(?P<where>.+?\.py|[\w.]+):(?P<what>[^\W\d][\w.]*)(?:\[(?P<key>[^\[\]]+)\]|(?P<call>\(.*\)))?", re.DOTALL
)
_FORMS = "pkg.mod:function, path/to/file.py:function, pkg.mod:make(eps=0.2), pkg.mod:REGISTRY, pkg.mod:REGISTRY[name]"


def imported(path: str) -> Estimator:
    """The one estimator that `path` names, as of `all_imported`.

    Raises:
        UsageError: as `all_imported`; or it names a whole registry.
    """
    found = _looked_up(path)
    if isinstance(found, dict):
        raise UsageError(
            f"estimator '{path}': a registry of {', '.join(found)}; name one: {path}[{next(iter(found))}]."
        )
    return found


def all_imported(path: str) -> list[Estimator]:
    """Estimators from the user's code; the current directory is importable.

        pkg.mod:function            a loss or an `Estimator`; so is path/to/file.py:function
        pkg.mod:make(eps=0.2)       what a factory returns; its arguments are literals
        pkg.mod:REGISTRY            every entry of a mapping of name → loss or `Estimator`
        pkg.mod:REGISTRY[name]      one of them

    Raises:
        UsageError: the module, the attribute or the entry is not there; importing or calling it fails; it is no estimator.
    """
    found = _looked_up(path)
    return list(found.values()) if isinstance(found, dict) else [found]


def _looked_up(path: str) -> Estimator | dict[str, Estimator]:
    parts = _PATH.fullmatch(path)
    if parts is None:
        raise UsageError(f"estimator '{path}': expected {_FORMS}.")
    where, what, key = parts["where"], parts["what"], parts["key"]
    found: Any = _module_of_file(path, Path(where)) if where.endswith(".py") else _module(path, where)
    for part in what.split("."):
        if not hasattr(found, part):
            raise UsageError(f"estimator '{path}': '{where}' has no attribute '{what}'.{nearest(part, dir(found))}")
        found = getattr(found, part)
    if parts["call"] is not None:
        return _made(path, _called(path, found, parts["call"]), what + parts["call"])
    if not isinstance(found, Mapping):
        if key is not None:
            raise UsageError(f"estimator '{path}': '{what}' is no registry, a mapping of name → loss.")
        return _made(path, found, what)
    if not found or not all(isinstance(name, str) and name for name in found):
        raise UsageError(f"estimator '{path}': a registry maps names to losses, one at least; this is {found!r}.")
    if key is not None and key not in found:
        raise UsageError(f"estimator '{path}': '{what}' has no entry '{key}'.{nearest(key, found)}")
    chosen = found if key is None else {key: found[key]}
    made = {name: replace(_made(f"{path}[{name}]", x, name), name=name) for name, x in chosen.items()}
    return made if key is None else made[key]


def _made(path: str, found: Any, name: str) -> Estimator:
    if not (isinstance(found, Estimator) or callable(found)):
        raise UsageError(f"estimator '{path}': {found!r} is neither an Estimator nor a loss `batch -> scalar`.")
    made = as_estimator(found)
    return made if isinstance(found, Estimator) else replace(made, name=name)


def _module(path: str, name: str) -> Any:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        return importlib.import_module(name)
    except UsageError:
        raise
    except (Exception, SystemExit) as error:
        raise UsageError(
            f"estimator '{path}': importing '{name}' failed: {in_words(error).rstrip('.')}. It is looked for in the"
            " current directory and among the installed packages."
        ) from error


def _module_of_file(path: str, file: Path) -> Any:
    """The module of a file, run once a process; what lies beside the file is importable, as for a script."""
    if not file.is_file():
        raise UsageError(f"estimator '{path}': there is no file {file}.")
    full = file.resolve()
    name = f"{file.stem}_{hashlib.sha256(str(full).encode()).hexdigest()[:8]}"
    if name not in sys.modules:
        if str(full.parent) not in sys.path:
            sys.path.insert(0, str(full.parent))
        module = sys.modules[name] = types.ModuleType(name)
        module.__file__ = str(full)
        try:
            exec(compile(full.read_bytes(), str(full), "exec"), module.__dict__)
        except (Exception, SystemExit) as error:
            del sys.modules[name]
            if isinstance(error, UsageError):
                raise
            raise UsageError(f"estimator '{path}': importing {file} failed: {in_words(error).rstrip('.')}.") from error
    return sys.modules[name]


def _called(path: str, make: Any, call: str) -> Any:
    """What a factory returns for literal arguments; nothing else is evaluated."""
    try:
        node: Any = ast.parse("f" + call, mode="eval").body
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
            raise ValueError("more than one call")
        args = [ast.literal_eval(x) for x in node.args]
        named = {str(k.arg): ast.literal_eval(k.value) for k in node.keywords}
        if any(k.arg is None for k in node.keywords):
            raise ValueError("**arguments")
    except (SyntaxError, ValueError):
        raise UsageError(
            f"estimator '{path}': arguments of a factory are literals, as in make(0.2, over='group')."
        ) from None
    try:
        return make(*args, **named)
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(f"estimator '{path}': calling it failed: {in_words(error).rstrip('.')}.") from error


def source_of(estimator: Estimator) -> tuple[Path, int] | None:
    """The file and the line where the user's function begins; None if it has none, or is pgcheck's own."""
    code: Any = getattr(estimator.coefficients, "loss", estimator.coefficients)
    while isinstance(code, functools.partial):
        code = code.func
    code = inspect.unwrap(code)
    code = getattr(code, "__code__", None) or getattr(vars(type(code)).get("__call__"), "__code__", None)
    if code is None:
        return None
    file = Path(code.co_filename)
    return (file, code.co_firstlineno) if file.is_file() and not file.is_relative_to(PACKAGE) else None
