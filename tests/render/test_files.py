"""Files that are whole whenever the process is killed."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from pgcheck.render import files

# jax warns at a fork, where an earlier test has imported it; a child here writes files, and touches neither jax nor torch
pytestmark = pytest.mark.filterwarnings(r"ignore:os\.fork\(\) was called:RuntimeWarning")

CALLS = ("mkstemp", "fdopen", "fsync", "chmod", "replace")


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("nth", [1, 2])
def test_killed_before_or_after_any_call(tmp_path: Path, call: str, after: bool, nth: int) -> None:
    """SIGKILL at each step of writing two files: each is the old one or the new one."""
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for path in paths:
        path.write_text("old")
    pid = os.fork()
    if pid == 0:
        at = {"mkstemp": files.tempfile, "fdopen": os, "fsync": os, "chmod": Path, "replace": Path}[call]
        whole, seen = getattr(at, call), []

        def killed(*args: object, **kwargs: object) -> object:
            seen.append(1)
            if len(seen) == nth and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = whole(*args, **kwargs)
            if len(seen) == nth:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(at, call, killed)
        files.write_all(dict.fromkeys(paths, "new" * 10000))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    found = [path.read_text() for path in paths]
    assert all(text in ("old", "new" * 10000) for text in found)
    if call != "replace":
        assert found == ["old", "old"]


def test_what_a_kill_leaves_is_gone_after_the_next_write(tmp_path: Path) -> None:
    """Killed between writing and moving; what is younger may be another process's, and other files are nobody's business."""
    path = tmp_path / "report[1].json"  # a name that a pattern would read otherwise
    pid = os.fork()
    if pid == 0:
        Path.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment,method-assign]
        files.write_all({path: "new"})
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".report[1].json.pgcheck-")
    (tmp_path / ".report[1].json.mine").touch()
    (tmp_path / ".report[1].json.pgcheck-young").touch()
    long_ago = time.time() - 2 * files.STALE
    for name in (left, tmp_path / ".report[1].json.mine"):
        os.utime(name, (long_ago, long_ago))
    files.write_all({path: "new"})
    kept = {"report[1].json", ".report[1].json.mine", ".report[1].json.pgcheck-young"}
    assert {x.name for x in tmp_path.iterdir()} == kept
