"""What a function does, in words that are the same in every process: its source and what that refers to.

    source, comments and docstring aside · values in its closure and of the globals it names · those of functions among them

Functions of other packages are their names; objects are the source of their class, with the fields of a frozen dataclass or
the weights of a module. What else an object keeps may change while it is used, and is left out. Of a function without a
source (typed at a prompt) its constants and the names that it uses are all that is told.

Guarantee: no address, no bytecode, no order of a set; the same text gives the same words whatever the patch version of Python.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import hashlib
import inspect
import numbers
import re
import sysconfig
import textwrap
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from enum import Enum
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch

_DEPTH = 12  # of values in values
Seen = frozenset[int]  # functions that are being described, by id: one may call itself


def described(x: Any, *, seen: Seen = frozenset(), depth: int = _DEPTH) -> str:
    """Words for a function, or a value that one refers to."""
    if id(x) in seen or depth == 0:
        return "…"
    again = functools.partial(described, seen=seen | {id(x)}, depth=depth - 1)
    if x is None or x is ... or isinstance(x, (numbers.Number, str, bytes, range, Enum)):
        return repr(x.item() if isinstance(x, np.generic) else x)
    if isinstance(x, re.Pattern):
        return repr((x.pattern, x.flags))
    if isinstance(x, (torch.Tensor, np.ndarray)):
        held = np.ascontiguousarray(x.detach().cpu().to(torch.float64) if isinstance(x, torch.Tensor) else x)
        return f"array {list(held.shape)} {hashlib.sha256(held.tobytes()).hexdigest()}"
    if isinstance(x, (list, tuple)):
        return f"[{', '.join(map(again, x))}]"
    if isinstance(x, (set, frozenset)):
        return f"{{{', '.join(sorted(map(again, x)))}}}"
    if isinstance(x, Mapping):
        return f"{{{', '.join(f'{again(k)}: {again(v)}' for k, v in x.items())}}}"
    if isinstance(x, functools.partial):
        return f"{again(x.func)} of {again(x.args)}, {again(x.keywords)}"
    if isinstance(x, MethodType):
        return f"{again(x.__func__)} of {again(x.__self__)}"
    if isinstance(x, FunctionType):
        return _of_function(x, again)
    if isinstance(x, (ModuleType, BuiltinFunctionType)):
        return x.__name__
    if isinstance(x, type):
        return f"{x.__module__}.{x.__qualname__}"
    return _of_object(x, again)


def _of_object(x: Any, again: Callable[[Any], str]) -> str:
    kept: Any = None
    if isinstance(x, torch.nn.Module):
        kept = dict(x.state_dict())
    elif dataclasses.is_dataclass(x) and getattr(x, "__dataclass_params__").frozen:  # noqa: B009
        kept = {f.name: getattr(x, f.name) for f in dataclasses.fields(x)}
    source = ""
    with suppress(OSError, TypeError, SyntaxError):
        if not _of_a_library(inspect.getfile(type(x))):
            source = ast.unparse(_without_docstrings(ast.parse(textwrap.dedent(inspect.getsource(type(x))))))
    return f"{again(type(x))} {source} {again(kept)}"


def _of_a_library(file: str) -> bool:
    return "-packages" in file or file.startswith(sysconfig.get_paths()["stdlib"])


def _of_function(f: FunctionType, again: Callable[[Any], str]) -> str:
    code = f.__code__
    source = _source_of(code)
    named = sorted({name for part in _codes(code) for name in part.co_names if name in f.__globals__})
    home = _package(f)
    refers = {
        **{name: f.__globals__[name] for name in named},
        **{name: _held(cell) for name, cell in zip(code.co_freevars, f.__closure__ or (), strict=True)},
    }
    told = [
        f"{name} = {x.__module__}.{x.__qualname__}"
        if isinstance(x, FunctionType) and _package(x) != home and _of_a_library(x.__code__.co_filename)
        else f"{name} = {again(x)}"
        for name, x in refers.items()
    ]
    defaults = again([f.__defaults__, f.__kwdefaults__])
    return "\n".join([source or _without_source(code), defaults, *told])


def _package(f: FunctionType) -> str:
    return str(f.__module__).partition(".")[0]


def _held(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for x in code.co_consts:
        if isinstance(x, CodeType):
            yield from _codes(x)


def _without_source(code: CodeType) -> str:
    return repr(
        [
            (part.co_varnames, part.co_names, [described(x) for x in part.co_consts if not isinstance(x, CodeType)])
            for part in _codes(code)
        ]
    )


@functools.lru_cache(maxsize=64)
def _parsed(text: str) -> list[ast.AST]:
    kinds = (ast.Lambda, ast.FunctionDef, ast.AsyncFunctionDef)
    return [node for node in ast.walk(ast.parse(text)) if isinstance(node, kinds)]


def _source_of(code: CodeType) -> str | None:
    """Of the function that was compiled to `code`; of all that it may be, where several stand in a line."""
    try:
        lines, _ = inspect.findsource(code)
        nodes: list[Any] = _parsed("".join(lines))
    except (OSError, TypeError, SyntaxError, IndexError):
        return None

    def begins(node: Any) -> int:
        return min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", ()))])

    places: list[Any] = [
        p for p in code.co_positions() if None not in p and p[2:] != (0, 0)
    ]  # not that of its beginning

    def holds(node: Any) -> bool:
        first, last = (node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset)
        return bool(places) and all(first <= (low, begin) and (high, end) <= last for low, high, begin, end in places)

    name = code.co_name
    named = [n for n in nodes if begins(n) == code.co_firstlineno and getattr(n, "name", "<lambda>") == name]
    found = [n for n in named if holds(n)] or named
    if found and holds(found[0]):  # the innermost
        found = [min(found, key=lambda n: (n.end_lineno - n.lineno, n.end_col_offset - n.col_offset))]
    told = sorted(ast.unparse(_without_docstrings(n)) for n in found)
    if len(found) > 1:  # Python 3.12 does not say where the constant stands that a lambda returns
        told.append(_without_source(code))
    return "\n".join(told) or None


def _without_docstrings(tree: ast.AST) -> ast.AST:
    """A copy."""
    tree = ast.parse(ast.unparse(tree))
    for node in ast.walk(tree):
        if (
            isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
            and ast.get_docstring(node) is not None
        ):
            node.body = node.body[1:] or [ast.Pass()]
    return tree
