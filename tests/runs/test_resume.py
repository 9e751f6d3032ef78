"""Runs that are cut off, and runs in several processes: the report has the bytes of one that was left alone."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import sys
import time
from pathlib import Path

import pytest

import pgcheck
from pgcheck.cli import main

SUITE = """
name = "small"
about = "two problems, sampled"
engine = "monte_carlo"
draws = 49152
tolerance = 0.02
estimators = ["leave_one_out", "grpo"]
problems = ["dialogue/two-turn", "off-policy/contextual-drifted"]
"""


def command(out: str, *arguments: str) -> None:
    """`pgcheck run` in this folder; report.json goes to `out`."""
    sys.argv = ["pgcheck", "run", "small.toml", "--json", *arguments]
    with open(out, "w") as file, contextlib.redirect_stdout(file), contextlib.suppress(SystemExit):
        main()


@pytest.fixture
def whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """The report of a run that nothing happened to; the test is in its folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", sys.argv)
    (tmp_path / "small.toml").write_text(SUITE)
    command("whole.json")
    text = (tmp_path / "whole.json").read_bytes()
    assert len(json.loads(text)["measurements"]) == 4
    return text


def test_a_killed_run_goes_on_to_the_same_report(tmp_path: Path, whole: bytes) -> None:
    folder = tmp_path / "kept"

    def written() -> list[tuple[str, int]]:
        return sorted((file.name, file.stat().st_ino) for file in folder.glob("*.checkpoint"))

    for saves in (1, 2, 1):  # each time from where the one before was killed
        process = multiprocessing.get_context("fork").Process(target=command, args=("killed.json", "--resume", "kept"))
        process.start()
        for _ in range(saves):
            before, end = written(), time.monotonic() + 120
            while written() == before and process.is_alive() and time.monotonic() < end:
                time.sleep(0.002)
        assert process.is_alive()
        process.kill()
        process.join()
        assert (tmp_path / "killed.json").read_bytes() == b""
    command("killed.json", "--resume", "kept")
    assert (tmp_path / "killed.json").read_bytes() == whole


@pytest.mark.usefixtures("forks")
def test_processes_change_no_byte(tmp_path: Path, whole: bytes) -> None:
    command("three.json", "--workers", "3", "--resume", "kept")
    assert (tmp_path / "three.json").read_bytes() == whole


@pytest.mark.usefixtures("forks")
def test_the_same_from_the_library(tmp_path: Path) -> None:
    """`compare` goes on as well, with a loss that could not be sent to another process, and settings are held to."""

    def of_return(batch):
        return batch.episode_return.unsqueeze(-1) * batch.mask / batch.rows

    mine = pgcheck.from_coefficients(of_return, couples="trajectory", name="mine")
    plain = pgcheck.Sampling(draws=4096, tolerance=0.2, alpha=1e-3)

    def table(sampling: pgcheck.Sampling) -> str:
        found = pgcheck.compare([mine, "grpo"], "dialogue/two-turn", engine="monte_carlo", sampling=sampling)
        return json.dumps(found.to_dict("records"))

    kept = pgcheck.Sampling(draws=4096, tolerance=0.2, alpha=1e-3, workers=2, checkpoint=tmp_path / "kept")
    assert table(plain) == table(kept) == table(kept)
    assert len(list((tmp_path / "kept").iterdir())) == 1
    with pytest.raises(pgcheck.UsageError, match="its seed is 0, not 1"):
        table(pgcheck.Sampling(draws=4096, tolerance=0.2, alpha=1e-3, seed=1, checkpoint=tmp_path / "kept"))
