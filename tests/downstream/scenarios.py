"""Runs pytest and pgcheck many times over, each in a process of its own that does not wait for torch.

    python scenarios.py requests.json

Reads [{"folder", "run": ["pytest" | "pgcheck", arguments …], "edit": [file, from, to] | null, "kill_after": seconds | null,
"log"}, …] and prints their exit codes as JSON; a killed one has the code of its signal, negative.
"""

import json
import os
import signal
import sys
import time
import traceback
import warnings
from pathlib import Path

import pytest

import pgcheck.cli
import pgcheck.verdict_items

# what this project does not use, and whose import is half of a run
LEAN = "-p no:hypothesispytest -p no:anyio --assert=plain"


def child(request: dict) -> int:
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(request["folder"])
    sys.path.insert(0, request["folder"])
    program, *arguments = request["run"]
    if program == "pytest":
        os.environ["PYTEST_ADDOPTS"] = LEAN
        return int(pytest.main(arguments))
    sys.argv = ["pgcheck", *arguments]
    try:
        pgcheck.cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def run(request: dict) -> int:
    if request.get("edit"):
        name, old, new = request["edit"]
        path = Path(request["folder"], name)
        path.write_text(path.read_text().replace(old, new))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # threads of a library, at a fork
        pid = os.fork()
    if pid == 0:
        code = 70
        try:
            code = child(request)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    if request.get("kill_after") is not None:
        time.sleep(request["kill_after"])
        os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


if __name__ == "__main__":
    sys.stdout.write(json.dumps([run(x) for x in json.loads(Path(sys.argv[1]).read_text())]))
