"""The cases, by section; one file a topic.

To add one, append three lines to its section in the file of its topic:

    case("what went wrong", '''
    pgcheck.check_estimator("grop")
    ''')

The code is run as it stands, in a folder of its own, with `pgcheck`, `torch` and all that `at_hand.py` has; it must end in an
error. Code that starts with `$` is a command line; it must end with exit code 2 (or `exit_code=`) and say why on stderr.
"""

from __future__ import annotations

import functools
import importlib
import textwrap
from collections.abc import Callable
from dataclasses import dataclass

# in the order of the document
TOPICS = ("losses", "arguments", "problems", "models", "suites", "sampling", "command_line", "gate")


@dataclass(frozen=True)
class Case:
    title: str
    code: str
    exit_code: int


_SECTIONS: dict[str, list[Case]] = {}


def section(title: str) -> Callable[..., None]:
    """Start a section; returns the function that adds cases to it."""
    cases = _SECTIONS.setdefault(title, [])

    def case(title: str, code: str, *, exit_code: int = 2) -> None:
        cases.append(Case(title, textwrap.dedent(code).strip(), exit_code))

    return case


@functools.cache
def sections() -> dict[str, list[Case]]:
    """All of them."""
    for topic in TOPICS:
        importlib.import_module(f"tests.errors.{topic}")
    return _SECTIONS
