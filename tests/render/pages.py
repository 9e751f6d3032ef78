"""What tests of pages share: a report with everything in it, a reader of HTML, a browser."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass, field, replace
from functools import cache
from html import escape, unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from pgcheck.estimators.base import from_coefficients, unbiased
from pgcheck.estimators.lookup import as_estimator
from pgcheck.registry import find_problem
from pgcheck.runs.report import CaseRow, Report
from pgcheck.runs.runner import run
from pgcheck.verdicts.verdict import Status

# an off-policy problem (no claim), one without a direction, groups of one (not asked), one whose optimum has no variance
PROBLEMS = (
    *("bandit/two-arm", "bandit/stationary", "degenerate/group-of-one", "mdp/pessimal", "dialogue/two-turn"),
    *("dialogue/two-turn@1", "chain/absorbing", "off-policy/dialogue-stale"),
)
ESTIMATORS = (
    *("reinforce", "leave_one_out", "baselined(optimal_constant)", "batch_mean", "grpo"),
    "reward_to_go_undiscounted_weight",
)
HOSTILE = "<b>&\"x'</b>,\n=1+1"  # a name is data in HTML, in an attribute, in SVG and in a table


@cache
def rich_report() -> Report:
    liar = replace(as_estimator("grpo"), name=HOSTILE, claims=(unbiased(),), about="<script>alert(1)</script>")
    nan = from_coefficients(lambda b: b.mask * float("nan"), name="nan", couples="trajectory")
    estimators = [*(as_estimator(name) for name in ESTIMATORS), liar, nan]
    return run(estimators, [find_problem(name) for name in PROBLEMS], suite="a<b>&c")


@cache
def lone_report() -> Report:
    """One estimator, one problem of one step: nobody to compare with, nothing to split by position."""
    return run([as_estimator("reinforce")], [find_problem("bandit/two-arm")], suite="lone")


def sentence(name: str, *, status: Status, says: str = "κ < 1 & κ > 0.", value: float | None = 0.75) -> CaseRow:
    return CaseRow(
        name=name,
        says=says,
        source="a lecture",
        truth="right",
        quantity="scale",
        subject={"estimator": "batch_mean", "problem": "mdp/two-state"},
        asked=2,
        relation="< 1",
        value=value,
        beside={"bias": 0.25},
        holds=status is Status.PASS,
        status=status,
        because="The own return is in the mean.",
        reason="" if status is Status.PASS else "the sentence does not hold",
    )


@cache
def case_report() -> Report:
    """Sentences only: nothing was measured."""
    nothing: dict[str, Any] = {"problems": [], "estimators": [], "measurements": [], "verdicts": [], "not_asked": []}
    cases = [
        sentence("good", status=Status.PASS),
        sentence("bad", status=Status.FAIL, says='<i>"x", y</i>', value=None),
    ]
    return Report(suite="notes", version="0", cases=cases, **nothing)


VOID = {"meta", "input", "br", "wbr", "path", "use", "rect", "line"}


@dataclass
class Element:
    tag: str
    attrs: dict[str, str]
    texts: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(self.texts)


class Page(HTMLParser):
    """Every element with its own text; raises on a tag that does not close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[Element] = []
        self.open: list[Element] = []
        self.feed(text)
        self.close()
        assert not self.open, [e.tag for e in self.open]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), (tag, attrs)
        self.elements.append(Element(tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(self.elements[-1])

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(Element(tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop().tag == tag

    def handle_data(self, data: str) -> None:
        for e in self.open:
            e.texts.append(data)

    def find(self, tag: str, **attrs: str) -> list[Element]:
        wanted = {name.rstrip("_"): value for name, value in attrs.items()}
        return [e for e in self.elements if e.tag == tag and wanted.items() <= e.attrs.items()]


def assert_self_contained(name: str, text: str) -> None:
    """Tags close in order, ids are unique, every #link has its target, and nothing is fetched from anywhere."""
    page = Page(text)
    ids = [e.attrs["id"] for e in page.elements if "id" in e.attrs]
    assert len(ids) == len(set(ids)), name
    for e in page.elements:
        href = e.attrs.get("href", "#")
        assert href[0] == "#", (name, e)
        assert href == "#" or href[1:] in ids, (name, e)
        assert not {"src", "srcset", "xlink:href", "action", "background"} & set(e.attrs), (name, e)
        assert e.tag not in {"link", "iframe", "img", "object", "embed", "base"}, (name, e)
        style = e.attrs.get("style", "") + (e.text if e.tag == "style" else "")
        assert "@import" not in style
        assert all(target.startswith("#") for target in re.findall(r"url\((.*?)\)", style)), (name, e)
    assert set(re.findall(r"url\(#([\w-]+)\)", text)) <= set(ids), name
    assert page.find("meta", name="viewport")


def column_of(table: str, column: int) -> str:
    """The texts of a column, for `in_browser`."""
    rows = f'[...document.getElementById("{table}").tBodies[0].rows]'
    return f"JSON.stringify({rows}.map((r) => r.cells[{column}].textContent))"


def in_browser(page: str, script: str, folder: Path, *, hash_: str = "", width: int | None = None) -> str:
    """What `script` returns in a headless Chromium that has opened the page; skips where there is none.

    With a `width`, in CSS pixels, the page is opened in a frame of that width: a window of Chromium is not that narrow.
    """
    binary = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if binary is None:
        pytest.skip("no Chromium on the path; the page's script was not run")
    place = "document" if width is None else "parent.document"
    page = page.replace("</body>", f'<script>{place}.getElementById("answer").textContent = {script};</script></body>')
    answer = '<pre id="answer"></pre>'
    if width is None:
        page = page.replace("<body>", f"<body>{answer}")
    else:
        frame = f'<iframe style="border: 0; width: {width}px; height: 900px" srcdoc="{escape(page)}"></iframe>'
        page = f"<!doctype html><body>{answer}{frame}</body>"
    file = folder / "page.html"
    file.write_text(page, encoding="utf-8")
    quiet = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking")
    more = (
        "--disable-component-update",
        "--disable-sync",
        "--hide-scrollbars",
        f"--user-data-dir={folder / 'profile'}",
    )
    command = [binary, *quiet, *more, "--window-size=1400,900", "--dump-dom", f"{file.as_uri()}{hash_}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return unescape(done.stdout.partition(answer.partition("</")[0])[2].partition("</pre>")[0])
