"""A problem as code that makes it again.

Guarantee: `eval` of what `problem_code` returns, with `pgcheck` at hand, is a problem of the same digest: every number is
written so that it reads back to the last bit; those that a module computes are pinned to nine decimals first.
"""

from __future__ import annotations

import json
import math
import shlex
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from pgcheck.envs.tabular import TabularMDP
from pgcheck.errors import UnknownNameError
from pgcheck.estimators.base import find_estimator
from pgcheck.estimators.broken import BROKEN
from pgcheck.problem import Problem
from pgcheck.trajectories import Paths

_WIDTH = 100
_NAME, _ABOUT = Problem.__dataclass_fields__["name"].default, Problem.__dataclass_fields__["about"].default


def literal(x: Any) -> str:
    """A number, a string or nested lists of them; whole numbers without their `.0`."""
    if isinstance(x, Tensor):
        return literal(x.tolist())
    if isinstance(x, (list, tuple)):
        inner = ", ".join(map(literal, x))
        return f"[{inner}]"
    if isinstance(x, float) and not math.isfinite(x):
        return f'float("{x}")'
    if isinstance(x, float) and x.is_integer() and abs(x) < 1e6 and str(x) != "-0.0":
        return str(int(x))
    return json.dumps(x, ensure_ascii=False) if isinstance(x, str) else repr(x)


def _argument(name: str, x: Any, indent: str) -> str:
    """`name=literal`; a long table a row a line."""
    start = f"{indent}{name}=" if name else indent
    text = _text(x)
    if isinstance(x, Tensor) and x.dim() > 1 and len(start) + len(text) >= _WIDTH:
        rows = "".join(f"{indent}    {literal(row)},\n" for row in x)
        text = f"[\n{rows}{indent}]"
    elif isinstance(x, Tensor) and len(text) >= _WIDTH:
        inner = indent + "    "
        text = f"[\n{textwrap.fill(text[1:-1], _WIDTH, initial_indent=inner, subsequent_indent=inner)}\n{indent}]"
    return f"{start}{text},\n"


class Code(str):
    """Code, not a string to be quoted."""


def _text(x: Any) -> str:
    return x if isinstance(x, Code) else literal(x)


def _call(name: str, positional: Sequence[Any], named: dict[str, Any], indent: str) -> Code:
    words = [*map(_text, positional), *(f"{key}={_text(x)}" for key, x in named.items())]
    if len(indent) + len(short := f"{name}({', '.join(words)})") < _WIDTH and "\n" not in short:
        return Code(short)
    inner = indent + "    "
    lines = [_argument("", x, inner) for x in positional] + [_argument(key, x, inner) for key, x in named.items()]
    return Code(f"{name}(\n{''.join(lines)}{indent})")


def _without(defaults: dict[str, Any], **given: Any) -> dict[str, Any]:
    return {name: x for name, x in given.items() if name not in defaults or x != defaults[name]}


def _environment(env: TabularMDP | Paths, indent: str) -> Code:
    law = _without(
        {"discount": 1.0, "discount_clock": "position"}, discount=env.discount, discount_clock=env.discount_clock
    )
    if isinstance(env, TabularMDP):
        law |= _without(
            {"terminal": [], "observation": []}, terminal=sorted(env.terminal), observation=sorted(env.observation)
        )
        return _call(
            "pgcheck.TabularMDP",
            [],
            {name: getattr(env, name) for name in ("transition", "reward", "initial", "horizon")} | law,
            indent,
        )
    columns = ("start", "state", "context", "action", "reward", "mask", "env_probability", "start_probability", "end")
    return _call("pgcheck.Paths", [], {name: getattr(env, name) for name in columns} | law, indent)


def problem_code(problem: Problem) -> str:
    """`pgcheck.Problem(…)`, an expression. The policy is written as its table of logits, whatever made them: they are what
    decides every expectation in logit space."""
    given = {name: getattr(problem, name) for name in ("behavior_logits", "ref_logits")}
    more = {name: problem.pinned(x) for name, x in given.items() if x is not None}
    more |= {name: x for name in ("kl_coefficient", "entropy_coefficient") if (x := getattr(problem, name))}
    plan = {"groups": problem.groups} if problem.groups > 1 else {}
    where = {} if problem.contexts is None else {"contexts": list(problem.contexts)}
    words = _without({"name": _NAME, "about": _ABOUT}, name=problem.name, about=problem.about)
    settings = more | plan | {"group_size": problem.group_size} | where | words
    env = problem.env if isinstance(problem.env, TabularMDP) else problem.trajectories.paths
    return _call("pgcheck.Problem", [_environment(env, "    "), problem.pinned(problem.logits)], settings, "")


def estimator_code(command: str) -> str:
    """What `lookup.command_name` returned, for Python: a name that pgcheck can look up is a string."""
    name = command.strip("'")
    if shell_name(command):
        return literal(name)
    return name if name.isidentifier() else "your_loss"


def shell_name(command: str) -> str:
    """What `lookup.command_name` returned, for a shell; "" for code that the command line cannot find: a lambda, or what is
    made inside a function."""
    name = command.strip("'")
    if ":" not in name and name not in BROKEN:
        try:
            find_estimator(name)
        except UnknownNameError:
            return ""
    return shlex.quote(name)


def check_code(problem: Problem, *, estimator: str, asked: Mapping[str, str | None] | None = None) -> str:
    """What to paste to see an estimator fail on `problem`: `estimator` as `lookup.command_name` has it, and what else
    `check_estimator` was asked."""
    more = "".join(f", {name}={_text(x)}" for name, x in (asked or {}).items() if x is not None)
    check = f"pgcheck.check_estimator({estimator_code(estimator)}, problem{more})"
    return f"import pgcheck\n\nproblem = {problem_code(problem)}\n{check}"
