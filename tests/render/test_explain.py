"""Pages: every part of every page is there, what is code runs, and numbers are those that other doors give."""

from __future__ import annotations

import functools
import re
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

import pgcheck
from pgcheck.errors import UnknownNameError
from pgcheck.estimators.base import registered_estimators
from pgcheck.estimators.broken import BROKEN
from pgcheck.estimators.lookup import as_estimator
from pgcheck.registry import registered_problems
from pgcheck.render import explain as pages
from pgcheck.render.explain import PARTS, WIDTH, example_code, page_parts
from pgcheck.runs.runner import run
from pgcheck.runs.suite import load_suite
from pgcheck.verdicts.checks import registered_checks
from pgcheck.verdicts.quantities import registered_quantities
from pgcheck.verdicts.verdict import Status

as_estimator("grpo")  # fills the registries
CHECKS = registered_checks()
explain = functools.cache(pages.explain)
NAMES = {
    **dict.fromkeys(CHECKS, "check"),
    **dict.fromkeys(registered_problems(), "problem"),
    **dict.fromkeys(registered_estimators(), "estimator"),
    **dict.fromkeys(BROKEN, "mistake"),
    **dict.fromkeys(registered_quantities(), "quantity"),
}


def parts_of(page: str) -> dict[str, str]:
    """Part → text: a part begins with its name alone on a line, and its lines are indented."""
    found: dict[str, list[str]] = {}
    current: list[str] = []
    for line in page.split("\n"):
        if line in {part for parts in PARTS.values() for part in parts}:
            current = found[line] = []
        else:
            assert not found or not line or line.startswith("  "), line
            current.append(line[2:])
    return {part: "\n".join(lines).strip("\n") for part, lines in found.items()}


@pytest.mark.parametrize("name", NAMES)
def test_every_page_has_every_part(name: str) -> None:
    """In the order of its kind, none of them empty, and no line but code is wider than the page."""
    page = explain(name)
    parts = parts_of(page)
    assert tuple(parts) == PARTS[NAMES[name]]
    assert all(text.strip() for text in parts.values())
    code = parts.pop("Example") if NAMES[name] == "mistake" else ""
    wide = [line for line in page.split("\n") if len(line) > WIDTH and line[2:] not in code.split("\n")]
    assert not wide
    assert not [line for line in page.split("\n") if line != line.rstrip()]


def test_no_name_is_two_things() -> None:
    """Else one of the pages could not be had."""
    every = [*CHECKS, *registered_problems(), *registered_estimators(), *BROKEN, *registered_quantities()]
    assert sorted(every) == sorted(NAMES)


@pytest.mark.parametrize("name", CHECKS)
def test_the_example_of_a_check_fails_it(name: str) -> None:
    """The code on the page is run as it stands, and the check says FAIL, on-policy or off."""
    code = example_code(CHECKS[name].page)
    assert textwrap.indent(code, "    ") in parts_of(explain(name))["Example"]
    names: dict[str, Any] = {"pgcheck": pgcheck, "torch": torch}
    exec(code, names)
    made = names["estimator"] if "estimator" in names else pgcheck.from_loss(names["loss"])
    reports = [run([made], pgcheck.as_problems(p), checks=[name]) for p in ("dialogue/*", "off-policy/dialogue-stale")]
    assert Status.FAIL in {v.status for report in reports for v in report.verdicts if v.check == name}


@pytest.mark.parametrize("name", CHECKS)
def test_a_check_is_taken_apart_without_loss(name: str) -> None:
    """Every line of the docstring is on the page: parts are recognised, none is swallowed by the one before."""
    lead, parts = page_parts(CHECKS[name].page)
    words = re.sub(r"\W+", "", CHECKS[name].page)
    again = lead + "".join(part + "".join(lines) for part, lines in parts.items())
    assert re.sub(r"\W+", "", again) == words


@pytest.mark.parametrize("name", BROKEN)
def test_a_mistake_is_told_where_it_belongs(name: str) -> None:
    """On the page of its sound version, and on those of the checks that catch it."""
    entry = BROKEN[name]
    assert name in parts_of(explain(entry.sound.name))["Mistakes made from it"]
    for check in entry.caught_by:
        assert re.search(rf"\b{name}\b", parts_of(explain(check))["Example"])
        assert check in parts_of(explain(name))["What it is"]


def beyond_rounding(row: list[str]) -> list[str]:
    """What is printed, but for zeros."""
    return ["0" if re.fullmatch(r"\d(\.\d+)?e-1\d", word) else word for word in row]


@pytest.mark.parametrize("name", [name for name, entry in BROKEN.items() if entry.moves])
def test_the_numbers_of_a_mistake_show_it(name: str) -> None:
    """Some example problem tells it from its sound version."""
    rows = [line.strip() for line in parts_of(explain(name))["Example"].split("\n")]
    names = (name, BROKEN[name].sound.name)  # some have a space in them
    found = {who: [row.removeprefix(who).split() for row in rows if row.startswith(f"{who}  ")] for who in names}
    here, sound = found.values()
    assert len(here) == len(sound) == 3
    assert [beyond_rounding(row) for row in here] != [beyond_rounding(row) for row in sound]


@pytest.mark.parametrize("name", registered_quantities())
def test_a_quantity_is_told_whole_with_what_it_decides(name: str) -> None:
    """Every word of its docstring, every argument, and every case of the lecture notes that it decides."""
    parts = parts_of(explain(name))
    entry = registered_quantities()[name]
    assert re.sub(r"\W+", "", parts["What it is"]) == re.sub(r"\W+", "", entry.page)
    assert [line.split()[0] for line in parts["Arguments"].split("\n")] == list(entry.parameters)
    decided = [case.name for case in load_suite("notes").case if case.quantity == name]
    assert re.findall(r"^notes +(\S+) \(", parts["Sentences that it decides"], re.MULTILINE) == decided


def test_the_numbers_of_an_estimator_are_those_of_compare() -> None:
    """The example's command prints what the page shows."""
    example = parts_of(explain("grpo"))["Example"]
    problems = re.findall(r"--problem (\S+)", example)
    table = pgcheck.compare(["grpo"], problems)
    shown = [line.split()[1:] for line in example.split("\n") if line.split()[:1] == ["grpo"]]
    for row, (_, expected) in zip(shown, table.iterrows(), strict=True):
        assert row[0] == expected["finding"]
        wanted = [expected[x] for x in ("rel", "scale", "off_axis", "variance")]
        assert [float(x) for x in row[1:]] == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "shows", "hides"),
    [
        (
            "bandit/two-arm",
            ["nothing else is in the way"],
            ["one step only", "γ = 1", "one start", "on-policy", "two values"],
        ),
        ("mdp/two-state-0.9", ["more than one step", "γ < 1"], ["rows of one length", "on-policy"]),
        ("dialogue/two-turn", ["observation positions", "several lengths", "several starts"], ["γ = 1", "on-policy"]),
        ("dialogue/two-turn-action-clock", ["a γ that counts actions"], ["groups of one size"]),
        ("dialogue/unequal-groups", ["groups of unequal size"], ["on-policy"]),
        ("degenerate/group-of-one", [], ["groups of one: nothing"]),
        ("off-policy/dialogue-stale", ["an old policy"], []),
        ("off-policy/tree-truncated", ["an old policy"], ["the sampler cannot draw"]),
    ],
)
def test_what_a_problem_is_for(name: str, shows: list[str], hides: list[str]) -> None:
    """Facts of the named problems, read off their definitions."""
    lines = re.split(r"\n(?=shows|hides)", parts_of(explain(name))["What it is for"])
    for kind, words in (("shows", shows), ("hides", hides)):
        for word in words:
            assert any(line.startswith(kind) and word in " ".join(line.split()) for line in lines), (kind, word)
    assert ("an old policy" in "".join(lines)) == name.startswith("off-policy/")


def test_a_problem_at_another_theta_has_a_page() -> None:
    first, second = (parts_of(explain(name))["Numbers"] for name in ("dialogue/two-turn", "dialogue/two-turn@1"))
    assert first.split("\n")[0] == second.split("\n")[0]
    assert first != second


def test_an_alias_has_the_page_of_its_estimator() -> None:
    assert explain("rloo") == explain("leave_one_out").replace("compare leave_one_out", "compare rloo", 1)


def test_a_loss_of_ones_own_has_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pages_of_mine.py").write_text(
        'def own(batch):\n    """Returns as they come."""\n'
        "    return -(batch.episode_return[:, None] * batch.logp * batch.mask).sum(-1).mean()\n"
    )
    monkeypatch.chdir(tmp_path)
    page = explain("pages_of_mine:own")
    assert page.startswith("estimator own\n\nReturns as they come.")
    assert tuple(parts_of(page)) == PARTS["estimator"]
    assert "pgcheck compare pages_of_mine:own leave_one_out" in page


def test_no_such_page() -> None:
    for name, near in (
        ("unbised", "unbiased"),
        ("token_men", "token_mean"),
        ("gropo", "grpo"),
        ("mdp/two", "mdp/two-state"),
    ):
        with pytest.raises(UnknownNameError, match=f"Did you mean '{near}"):
            explain(name)
