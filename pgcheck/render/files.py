"""Report files on disk: whole or not at all, and beside report.json where it comes from.

Guarantee: whenever the process is killed, a file that was there is the old one or the new one, whole. What a killed process
leaves beside it, `.NAME.pgcheck-…`, nothing reads, and the next write of that file removes.
"""

from __future__ import annotations

import glob
import os
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from pgcheck.errors import UsageError
from pgcheck.render.frames import csv, frames
from pgcheck.render.html import html
from pgcheck.render.markdown import markdown
from pgcheck.render.provenance import provenance
from pgcheck.runs.report import Report

STALE = 60.0  # seconds; a file that waits for its place waits for far less


def write_report(
    report: Report,
    folder: Path,
    messages: Mapping[str, str] | None = None,
    *,
    places: Mapping[str, tuple[str, int]] | None = None,
    device: str = "cpu",
) -> list[Path]:
    """report.json, report.md, report.html, the tables as CSV and the provenance in `folder`; all rendered before the first
    is written.

    `messages`: the failure message of each estimator that failed, if they were worked out with a cause.
    `places`: file and line of the user's estimators. `device`: where samples were evaluated.
    """
    texts = {
        "report.json": report.to_json(),
        "report.provenance.json": provenance(report, places=places, device=device),
        "report.md": markdown(report, messages),
        "report.html": html(report, messages),
        **{f"{name}.csv": csv(table) for name, table in frames(report).items()},
    }
    return write_all({folder / name: text for name, text in texts.items()})


def write_all(contents: Mapping[Path, str | bytes]) -> list[Path]:
    """Write every file beside its place first, then move all of them there.

    Raises:
        UsageError: a folder cannot be made or written to.
    """
    waiting: list[tuple[Path, Path]] = []
    try:
        for path, content in contents.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            _remove_leftovers(path)
            handle, name = tempfile.mkstemp(dir=path.parent, prefix=_beside(path))
            waiting.append((Path(name), path))
            with os.fdopen(handle, "wb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())  # else a crash may keep the new name and lose what it names
            Path(name).chmod(0o644)
        for temporary, path in waiting:
            temporary.replace(path)
    except OSError as error:
        raise UsageError(f"out: cannot write {error.filename}: {error.strerror}.") from None
    finally:
        for temporary, _ in waiting:
            temporary.unlink(missing_ok=True)
    return list(contents)


def refuse_file(folder: Path | None) -> None:
    """Before the work that makes what is to be written there.

    Raises:
        UsageError: the folder is a file, or would be in one.
    """
    there = next((path for path in (folder, *folder.parents) if os.path.exists(path)), None) if folder else None
    if there is not None and not there.is_dir():
        raise UsageError(f"out: cannot write {folder}: {there} is a file, not a folder.")


def _beside(path: Path) -> str:
    return f".{path.name}.pgcheck-"


def _remove_leftovers(path: Path) -> None:
    """Of processes that were killed; one that is writing now keeps its own."""
    for found in path.parent.glob(f"{glob.escape(_beside(path))}*"):
        with suppress(OSError):  # gone, or another user's
            if time.time() - found.stat().st_mtime > STALE:
                found.unlink()
