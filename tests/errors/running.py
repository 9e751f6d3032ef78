"""A case is run in a folder of its own; its words are kept without what is the machine's, with the lines that made them."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import pgcheck
from pgcheck import errors
from tests.errors.at_hand import FILES, NAMES
from tests.errors.cases import Case

ROOT = Path(__file__).parents[2]

Site = tuple[str, int]  # a file of the package and the first line of a call


@dataclass(frozen=True)
class Outcome:
    case: Case
    ended_well: bool
    text: str
    met: frozenset[Site]  # lines at which errors of the tree were made


_MODULES = ("mine", "fails")


def run_case(c: Case) -> Outcome:
    """Run one case in a folder of its own."""
    met: set[Site] = set()

    def remember(self: errors.PgcheckError, *args: Any) -> None:
        frame = sys._getframe(1)
        while frame.f_code.co_filename == errors.__file__ and frame.f_back is not None:
            frame = frame.f_back
        with contextlib.suppress(ValueError):
            met.add((str(Path(frame.f_code.co_filename).relative_to(ROOT)), frame.f_lineno))
        super(errors.PgcheckError, self).__init__(*args)

    path = list(sys.path)
    others = {name: sys.modules.pop(name) for name in _MODULES if name in sys.modules}  # of other tests
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.chdir(folder),
        mock.patch.object(errors.PgcheckError, "__init__", remember),
        warnings.catch_warnings(),
    ):
        for name, text in FILES.items():
            Path(name).write_text(text, encoding="utf-8")
        text, ended_well = (_command if c.code.startswith("$") else _statements)(c)
        text = text.replace(str(Path(folder).resolve()), "FOLDER").replace(folder, "FOLDER")
        text = re.sub(r"\b\de-1[4-9]\b", "0", text)  # rounding, which is the machine's
        text = re.sub(r"\b(in|about) [\d.,]+ s\b", r"\1 … s", text)  # as are its seconds
    sys.path[:] = path
    for name in _MODULES:
        sys.modules.pop(name, None)
    sys.modules.update(others)
    return Outcome(c, ended_well, text.strip(), frozenset(met))


def _statements(c: Case) -> tuple[str, bool]:
    names = NAMES | {"pgcheck": pgcheck, "torch": torch}
    try:
        exec(compile(c.code, "example.py", "exec"), names | {"__name__": "example"})
    except errors.PgcheckError as error:
        return f"{type(error).__name__}: {error}", True
    except Exception as error:
        return f"{type(error).__name__}: {error}", False
    return "(no error)", False


def _command(c: Case) -> tuple[str, bool]:
    from pgcheck.cli import main

    out, err = io.StringIO(), io.StringIO()
    argv = shlex.split(c.code.removeprefix("$"))
    environment = {"COLUMNS": "100", "TERM": "dumb", "NO_COLOR": "1"}
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch.object(sys, "argv", argv),
        mock.patch.dict(os.environ, environment),
    ):
        try:
            main()
            code: object = 0
        except SystemExit as stop:
            code = stop.code
    said = err.getvalue()
    return said, code == c.exit_code and bool(said.strip()) and not out.getvalue() and "Traceback" not in said
