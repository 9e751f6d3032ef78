"""Estimators from anywhere; what cannot be had is in tests/errors."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from pgcheck.estimators.base import Estimator
from pgcheck.estimators.lookup import all_imported, as_estimators, imported, source_of
from pgcheck.registry import find_problem
from pgcheck.verdicts.checks.base import estimates_gap

CODE = """
import helper_of_shelf
import pgcheck

def loss(batch):
    return -helper_of_shelf.times * (batch.episode_return[:, None] * batch.logp * batch.mask).sum(-1).mean()

def make(times=1.0, *, of="return"):
    def inner(batch):
        return times * loss(batch)
    return inner

class Holder:
    def __call__(self, batch):
        return loss(batch)

held = Holder()
REGISTRY = {"plain": loss, "double": make(2.0), "entry": pgcheck.from_loss(loss, name="other", couples="trajectory")}
"""


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "shelf.py").write_text(CODE)
    (tmp_path / "package" / "helper_of_shelf.py").write_text("times = 1.0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "package")])
    return tmp_path / "package" / "shelf.py"


def factor(e: Estimator) -> float:
    """How many times REINFORCE it is, from the largest gap to it: |f − 1| for f times."""
    return 1.0 + estimates_gap(e, imported_reinforce(), find_problem("bandit/two-arm"))


def imported_reinforce() -> Estimator:
    from pgcheck.estimators.base import find_estimator

    return find_estimator("reinforce")


@pytest.mark.parametrize(
    ("path", "name", "times"),
    [
        ("package.shelf:loss", "loss", 1),
        ("package/shelf.py:loss", "loss", 1),
        ("package/shelf.py:make(2.0)", "make(2.0)", 2),
        ("package.shelf:make(times=3, of='return')", "make(times=3, of='return')", 3),
        ("package.shelf:held", "held", 1),
        ("package/shelf.py:REGISTRY[double]", "double", 2),
        ("package/shelf.py:REGISTRY[entry]", "entry", 1),
    ],
)
def test_one(shelf: Path, path: str, name: str, times: float) -> None:
    e = imported(path)
    assert e.name == name
    assert factor(e) == pytest.approx(times, rel=1e-12)
    assert [x.name for x in all_imported(path)] == [name]


def test_a_registry_is_its_entries(shelf: Path) -> None:
    made = as_estimators(["reinforce", "package/shelf.py:REGISTRY"])
    assert [e.name for e in made] == ["reinforce", "plain", "double", "entry"]
    assert made[-1].couples == "trajectory"


def test_a_file_is_run_once(shelf: Path) -> None:
    assert imported("package/shelf.py:loss").coefficients.loss is imported("package/shelf.py:loss").coefficients.loss  # type: ignore[attr-defined]


def test_where_it_is(shelf: Path) -> None:
    lines = CODE.splitlines()
    assert source_of(imported("package/shelf.py:loss")) == (shelf, lines.index("def loss(batch):") + 1)
    assert source_of(imported("package/shelf.py:make(2.0)")) == (shelf, lines.index("    def inner(batch):") + 1)
    assert source_of(imported("package/shelf.py:held")) == (shelf, lines.index("    def __call__(self, batch):") + 1)
    assert source_of(imported_reinforce()) is None
