"""Every error a user can meet, in one document: `tests/snapshots/errors.md`. Wording is reviewed like code.

`cases.py` says how to add one. Then write the document anew and read the diff:

    PGCHECK_UPDATE_SNAPSHOTS=1 python -m pytest tests/errors

Every place in pgcheck/ that makes an error of the tree in `errors.py` must be reached by a case, or be listed in `UNREACHED`
with the reason.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from pgcheck import errors
from tests.errors import cases
from tests.errors.cases import TOPICS, sections
from tests.errors.running import ROOT, Outcome, run_case
from tests.once import Once

DOCUMENT = ROOT / "tests" / "snapshots" / "errors.md"
UPDATE = "PGCHECK_UPDATE_SNAPSHOTS"
TREE = {name for name, x in vars(errors).items() if inspect.isclass(x) and issubclass(x, errors.PgcheckError)}

UNREACHED = {
    ("pgcheck/bench.py", "PgcheckError"): "a rival of the benchmark disagrees: a defect of pgcheck",
    ("pgcheck/truth.py", "TruthError"): "two derivations of ∇J disagree: a defect of pgcheck",
}

Outcomes = Callable[[str], list[Outcome]]


@pytest.fixture(scope="session")
def outcomes(once: Once) -> Outcomes:
    """Of the cases of a section, run once."""
    return lambda title: once(f"errors: {title}", lambda: [run_case(c) for c in sections()[title]])


def document(outcomes: Outcomes) -> str:
    parts = ["# Errors\n\nEvery error a user can meet, as it is said. Written by `tests/errors`; do not edit.\n"]
    for title in sections():
        parts.append(f"## {title}\n")
        for o in outcomes(title):
            kind = "sh" if o.case.code.startswith("$") else "python"
            parts.append(f"### {o.case.title}\n\n```{kind}\n{o.case.code}\n```\n```text\n{o.text}\n```\n")
    return "\n".join(parts)


@pytest.mark.parametrize("title", sections())
def test_every_case_ends_in_an_error_of_the_tree(outcomes: Outcomes, title: str) -> None:
    """Nothing passes, nothing ends in a traceback; commands give their exit code and speak on stderr only."""
    assert not [(o.case.title, o.text) for o in outcomes(title) if not o.ended_well]


@pytest.mark.parametrize("title", sections())
def test_titles_are_unique(title: str) -> None:
    names = [c.title for c in sections()[title]]
    assert len(set(names)) == len(names)


def test_every_topic_is_read() -> None:
    files = {path.stem for path in Path(__file__).parent.glob("*.py")}
    assert files == {*TOPICS, "at_hand", "cases", "running", "test_errors"}


def test_the_document_is_as_reviewed(outcomes: Outcomes) -> None:
    new = document(outcomes)
    if os.environ.get(UPDATE):
        DOCUMENT.write_text(new, encoding="utf-8")
    old = DOCUMENT.read_text(encoding="utf-8") if DOCUMENT.exists() else ""
    diff = "".join(difflib.unified_diff(old.splitlines(True), new.splitlines(True), "reviewed", "now"))
    assert not diff, f"{diff}\nIf these words are meant: {UPDATE}=1 python -m pytest tests/errors"


def test_the_document_names_no_machine(outcomes: Outcomes) -> None:
    text = document(outcomes)
    for path in (str(ROOT), str(Path.home()), tempfile.gettempdir(), "site-packages", "0x"):
        assert path not in text, path


def sites() -> dict[tuple[str, str], list[range]]:
    """(file, what is made) → lines of every place in the package that makes an error of the tree."""
    found: dict[tuple[str, str], list[range]] = {}
    for path in sorted((ROOT / "pgcheck").rglob("*.py")):
        if path == Path(errors.__file__):
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        raised = {id(n.exc) for n in ast.walk(tree) if isinstance(n, ast.Raise)}
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            # a variable that holds a class of the tree, or an expression that picks one
            chosen = id(node) in raised and not isinstance(node.func, ast.Attribute)
            chosen = chosen and (name.islower() or not isinstance(node.func, ast.Name))
            if name.rpartition(".")[2] in TREE or chosen:
                lines = range(node.lineno, (node.end_lineno or node.lineno) + 1)
                found.setdefault((str(path.relative_to(ROOT)), name), []).append(lines)
    return found


def test_every_error_has_a_case(outcomes: Outcomes) -> None:
    """Every constructor call of the tree in the package is reached, and no exemption is stale."""
    met = {site for title in sections() for o in outcomes(title) for site in o.met}
    missing = {
        (file, name): [lines.start for lines in places if not any((file, n) in met for n in lines)]
        for (file, name), places in sites().items()
    }
    missing = {key: lines for key, lines in missing.items() if lines}
    forgotten = {key: lines for key, lines in missing.items() if key not in UNREACHED}
    assert not forgotten, f"no case reaches {forgotten}; see the top of {Path(cases.__file__).name}"
    assert set(UNREACHED) == set(missing) & set(UNREACHED), "an exemption that is reached, or gone"


def test_every_kind_of_error_is_shown(outcomes: Outcomes) -> None:
    """One example of each class at least, but for the bases and what only pgcheck's own defects raise."""
    shown = {o.text.partition(":")[0] for title in sections() for o in outcomes(title)}
    assert TREE - {"PgcheckError", "TruthError"} <= shown
