"""JUnit, SARIF, GitHub: read back by other readers; what is inconclusive fails, with a type of its own."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

import pgcheck
from pgcheck.render.ci import Outcome, github, junit, on_github, places_of, sarif, step_summary

TEXT = st.text(max_size=30)
OUTCOMES = st.lists(
    st.builds(
        Outcome,
        subject=TEXT,
        rule=st.sampled_from(["unbiased", "changed", "row_order"]),
        state=st.sampled_from(["passed", "failed", "inconclusive"]),
        line=TEXT,
        text=TEXT,
        place=st.none() | st.tuples(st.text(min_size=1, max_size=9), st.integers(1, 99)),
        properties=st.dictionaries(st.sampled_from(["measured", "engine"]), TEXT),
    ),
    max_size=4,
)
ONE = Outcome("e-p", "unbiased", "failed", "it is 5% off", "line one\nline: two, 100%", ("a b/c,d:e.py", 7))


def legible(text: str) -> str:
    """What XML 1.0 can hold, as a reader gives it back."""
    held = "".join(
        c if c in "\t\n\r" or " " <= c <= "\ud7ff" or "\ue000" <= c <= "\ufffd" or c > "\uffff" else "�" for c in text
    )
    return held.replace("\r\n", "\n").replace("\r", "\n")


@given(OUTCOMES)
def test_junit_is_xml_and_counts_right(outcomes: list[Outcome]) -> None:
    (suite,) = ET.fromstring(junit(outcomes, "s").encode()).iter("testsuite")
    cases = list(suite.iter("testcase"))
    assert len(cases) == int(suite.attrib["tests"]) == len(outcomes)
    bad = [o for o in outcomes if o.state != "passed"]
    failures = [f for c in cases for f in c.iter("failure")]
    assert len(failures) == int(suite.attrib["failures"]) == len(bad)
    for f, o in zip(failures, bad, strict=True):
        assert f.attrib["type"] == ("inconclusive" if o.state == "inconclusive" else o.rule)
        assert (f.text or "") == legible(o.text)


@given(OUTCOMES)
def test_sarif_has_a_result_for_everything_that_did_not_pass(outcomes: list[Outcome]) -> None:
    data = json.loads(sarif(outcomes))
    assert data["version"] == "2.1.0"
    (made,) = data["runs"]
    rules = [r["id"] for r in made["tool"]["driver"]["rules"]]
    bad = [o for o in outcomes if o.state != "passed"]
    assert len(made["results"]) == len(bad)
    for result, o in zip(made["results"], bad, strict=True):
        assert rules[result["ruleIndex"]] == result["ruleId"] == o.rule
        assert result["level"] == "error"
        assert ("locations" in result) == (o.place is not None)
        for x in result.get("locations", []):
            uri = x["physicalLocation"]["artifactLocation"]["uri"]
            assert re.fullmatch(r"[A-Za-z0-9._~%/-]+", uri)


SCHEMA = os.environ.get("SARIF_SCHEMA")


@pytest.mark.skipif(
    not SCHEMA,
    reason="SARIF_SCHEMA=sarif-2.1.0-rtm.5.json names the official schema; npm pack @microsoft/jest-sarif has it",
)
@given(OUTCOMES)
def test_sarif_is_valid_by_the_official_schema(outcomes: list[Outcome]) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.Draft4Validator(json.loads(Path(SCHEMA or "").read_text())).validate(json.loads(sarif(outcomes)))


def unescaped(text: str) -> str:
    """As the runner of GitHub undoes it: the percent sign last."""
    for code, char in (("%0D", "\r"), ("%0A", "\n"), ("%3A", ":"), ("%2C", ","), ("%25", "%")):
        text = text.replace(code, char)
    return text


@given(OUTCOMES)
def test_an_annotation_is_one_line_and_comes_back_whole(outcomes: list[Outcome]) -> None:
    bad = [o for o in outcomes if o.state != "passed"]
    lines = github(outcomes).split("\n")[:-1]
    assert len(lines) == len(bad)
    for line, o in zip(lines, bad, strict=True):
        assert "\r" not in line
        head, _, data = line.removeprefix("::error ").partition("::")
        fields = dict(x.split("=", 1) for x in head.split(","))
        assert unescaped(data) == (o.text or o.line)
        if o.place:
            assert (unescaped(fields["file"]), fields["line"]) == (o.place[0], str(o.place[1]))


def test_an_annotation_to_the_letter() -> None:
    """A comma or colon would end a property, a newline the command."""
    assert github([ONE]) == (
        "::error file=a b/c%2Cd%3Ae.py,line=7,title=pgcheck%3A e-p-unbiased::line one%0Aline: two, 100%25\n"
    )


def test_the_summary_escapes_what_would_end_a_cell_or_a_block() -> None:
    text = step_summary([Outcome("a|b", "unbiased", "failed", "<b>|", "```\nfence"), ONE], "t")
    assert "| `a\\|b-unbiased` | failed | \\<b\\>\\| |" in text
    assert "``````text\n```\nfence\n``````" in text
    assert "0 of 2 as they should be" in text


def test_where_a_loss_is(tmp_path: Path) -> None:
    """Relative to the folder it is below, with the line of its `def`; nothing for pgcheck's own."""

    def here(batch: Any) -> Any:
        return -(batch.logp * batch.mask).sum()

    own = pgcheck.from_loss(here)
    root = Path(__file__).parent.parent
    line = here.__code__.co_firstlineno
    assert places_of([own, pgcheck.as_estimator("grpo")], root) == {"here": ("render/test_ci.py", line)}
    assert places_of([own], tmp_path) == {"here": (str(Path(__file__)), line)}


@pytest.mark.parametrize(("value", "expected"), [("true", True), ("", False), ("false", False)])
def test_on_github(value: str, expected: bool) -> None:
    assert on_github({"GITHUB_ACTIONS": value}) is expected
    assert not on_github({})
