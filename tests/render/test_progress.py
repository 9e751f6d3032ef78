"""The progress bar appears after its patience has run out, on stderr, and is gone afterwards."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from pgcheck import api
from pgcheck.render import progress
from pgcheck.render.progress import ProgressBar


def test_nothing_within_two_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar(enabled=True) as bar:
        bar("work", 1, 10)
        assert bar.bar is None
    assert capsys.readouterr() == ("", "")


def test_a_bar_after_that(monkeypatch: pytest.MonkeyPatch) -> None:
    """One task for each thing under way, with what is done of it; finished ones are hidden."""
    screen = io.StringIO()
    monkeypatch.setattr(progress, "PATIENCE", 0.0)
    monkeypatch.setattr("rich.console.Console", lambda stderr: Console(file=screen, force_terminal=True, width=100))
    with ProgressBar(enabled=True) as bar:
        bar("tree/tokens: grpo", 3, 10)
        bar("problems", 1, 2)
        bar("tree/tokens: grpo", 10, 10)
        assert bar.bar is not None
        first, second = bar.bar.tasks
        assert (first.completed, first.total, first.visible) == (10, 10, False)
        assert (second.completed, second.total, second.visible) == (1, 2, True)
    assert "problems" in screen.getvalue()


def test_silent_without_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(progress, "PATIENCE", 0.0)
    with ProgressBar() as bar:
        bar("work", 1, 10)
    assert capsys.readouterr() == ("", "")


def test_the_engine_reports_between_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Called with (what, done, total); done reaches the total."""
    from pgcheck.engines import exact

    clock = iter(range(0, 10**6, 10))
    monkeypatch.setattr(exact.time, "monotonic", lambda: float(next(clock)))
    monkeypatch.setattr(exact, "_BLOCK_ELEMENTS", 1)
    monkeypatch.setattr(exact, "_BLOCK_ROWS", 1)
    seen: list[tuple[str, int, int]] = []
    found = api.moments("reinforce_pp", "dialogue/two-turn", progress=lambda *call: seen.append(call))
    assert seen[-1][1] == seen[-1][2] == found.enumerated
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)
    assert seen[0][0] == "dialogue/two-turn: reinforce_pp"
