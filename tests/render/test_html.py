"""The page is well-formed, self-contained and the same bytes; its tables hold the report's numbers; its script works."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest

from pgcheck.render.html import html
from pgcheck.render.messages import number
from pgcheck.render.tables import columns
from pgcheck.runs.report import Report
from tests.render.pages import (
    HOSTILE,
    Page,
    assert_self_contained,
    case_report,
    column_of,
    in_browser,
    lone_report,
    rich_report,
)


@pytest.fixture(scope="module")
def text() -> str:
    return html(rich_report())


@pytest.fixture(scope="module")
def page(text: str) -> Page:
    return Page(text)


def empty_report() -> Report:
    nothing = {"problems": [], "estimators": [], "measurements": [], "verdicts": [], "not_asked": []}
    return Report(suite="", version="0", **nothing)


# -- the document


def test_well_formed_and_self_contained(text: str) -> None:
    assert_self_contained("rich", text)
    for name, report in {"lone": lone_report(), "empty": empty_report(), "cases": case_report()}.items():
        assert_self_contained(name, html(report))


def test_the_same_bytes_twice(text: str) -> None:
    assert html(rich_report()) == text


def test_names_are_data(text: str, page: Page) -> None:
    """Angle brackets, quotes and ampersands of a name show as themselves; no element is made of them."""
    assert not page.find("b", id="x")
    assert [e.text for e in page.find("title")] == ["pgcheck: a<b>&c"]
    assert all("alert(1)" not in e.text for e in page.find("script"))
    assert HOSTILE in [e.text for e in page.find("th", class_="name")]
    assert any(HOSTILE in e.attrs["aria-label"] for e in page.find("svg", role="img"))


def test_every_measurement_is_a_row(page: Page) -> None:
    """In the order of the report, with the numbers as every format writes them."""
    report = rich_report()
    for i, e in enumerate(report.estimators):
        own = [m for m in report.measurements if m.estimator == e.name]
        rows = {x.attrs["id"]: x for x in page.find("tr") if x.attrs.get("id", "").startswith(f"e{i + 1}p")}
        assert len(rows) == len(own)
        for m in own:
            row = rows[f"e{i + 1}p{[p.name for p in report.problems].index(m.problem) + 1}"]
            for value in (m.problem, m.finding, number(m.rel), number(m.off_axis), number(m.total_variance)):
                assert value in row.text


def test_failures_come_first(text: str) -> None:
    """Before the matrix, one paragraph of the message each, term by term."""
    assert text.index('id="failures"') < text.index('id="matrix"')
    page = Page(html(rich_report(), {HOSTILE: "it fails.\n  what      this\n            and that\n\nit fails again."}))
    failures = page.find("section", class_="failure")
    texts = [" ".join(e.text.split()) for e in failures]
    at = texts.index("it fails. whatthis and that")
    assert texts[at + 1] == "it fails again."
    assert 'id="failures"' not in html(lone_report())


def test_nobody_to_compare_with() -> None:
    """A lone estimator has no variance "against the others", and no column for it."""
    text = html(lone_report())
    assert "× least" not in text
    assert "sheet-variance" not in text.replace('id="sheet-variance"', "")


def test_the_matrix_has_one_cell_for_each_pair(page: Page) -> None:
    report = rich_report()
    cells = [e for e in page.find("td") if " on " in e.attrs.get("title", "")]
    assert len(cells) == len(report.estimators) * len(columns(report))
    contradicting = {e.attrs["title"].partition(" on ")[0] for e in cells if "contradicts" in e.attrs["class"]}
    assert contradicting == {HOSTILE, "nan"}


def test_sentences() -> None:
    """Each with what is held of it and its number; one that is not decided as held comes first of all, with the reason."""
    text = html(case_report())
    page = Page(text)
    good, bad = page.find("tr", id="case-good"), page.find("tr", id="case-bad")
    for part in (
        "κ < 1 & κ > 0.",
        "right",
        "0.75",
        "scale(batch_mean, mdp/two-state)",
        "< 1",
        "own return",
        "a lecture",
    ):
        assert part in good[0].text
    assert "FAIL" in bad[0].text
    assert "FAIL" not in good[0].text
    (failure,) = page.find("section", class_="failure")
    assert '<i>"x", y</i>' in failure.text
    assert "the sentence does not hold" in failure.text
    assert text.index('id="failures"') < text.index('id="cases-table"')
    assert not page.find("table", id="matrix")
    assert "1 of 2 sentences" in page.find("p", class_="verdict bad")[0].text


# -- the script


def test_sorting_by_a_link(text: str, tmp_path: Path) -> None:
    """#sort=TABLE,COLUMN,DIRECTION; numbers as numbers, dashes last either way."""
    for direction, sign in (("ascending", 1), ("descending", -1)):
        found = json.loads(
            in_browser(text, column_of("numbers-5", 2), tmp_path, hash_=f"#sort=numbers-5,2,{direction}")
        )
        report = rich_report()
        own = [m.rel for m in report.measurements if m.estimator == report.estimators[4].name]
        expected = sorted((x for x in own if x is not None), key=lambda x: sign * x)
        assert found == [number(x) for x in expected] + ["—"] * own.count(None)
        assert "—" in found


def test_filter_and_matrix_order(text: str, tmp_path: Path) -> None:
    """Words hide rows and sections alike; the head of a problem sorts by what was found there."""
    script = """(() => {
      const names = (rows) => [...rows].filter((r) => !r.hidden).map((r) => r.cells[0].textContent);
      const out = { filtered: names(matrix.tBodies[0].rows), said: document.getElementById("shown").textContent };
      out.sections = all("details").filter((d) => !d.hidden).length;
      controls.elements.words.value = ""; controls.elements.family.value = "mdp"; filter();
      out.columns = [...matrix.tHead.rows[1].cells].filter((th) => !th.hidden).map((th) => th.dataset.name);
      const problem = matrix.tHead.querySelector("[data-name='mdp/pessimal']");
      problem.querySelector("button").click();
      out.order = [...matrix.tBodies[0].rows].map((r) => r.cells[problem.cellIndex].className);
      all("tbody td:not([hidden]) a", matrix)[0].focus();
      const press = (key) => document.activeElement.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
      const place = () => { const td = document.activeElement.closest("td"); return [td.parentNode.rowIndex, td.cellIndex]; };
      out.places = [place(), ...["ArrowRight", "ArrowDown", "ArrowUp"].map((key) => (press(key), place()))];
      return JSON.stringify(out);
    })()"""
    out = json.loads(in_browser(text, script, tmp_path, hash_="#filter=optimal%20baseline"))
    assert out["filtered"] == ["baselined(optimal_constant)"]
    assert out["sections"] == 1
    assert out["said"].startswith(f"1 of {len(rich_report().estimators)}")
    assert out["columns"] == ["estimator", "mdp/pessimal", "biased", "worst rel", "times least"]
    # only the column of mdp/pessimal is shown: to the right of it there is no cell to go to
    assert out["places"] == [[2, 4], [2, 4], [4, 4], [2, 4]]
    contradicting = ["proportional contradicts", "none contradicts"]
    assert out["order"] == contradicting + ["biased"] + ["proportional"] * 2 + ["unbiased"] * 3


def test_csv_of_a_table(text: str, tmp_path: Path) -> None:
    """The browser's CSV is read back by Python's reader, the hostile name included."""
    script = "JSON.stringify([csv(matrix), csv(document.getElementById('numbers-5'))])"
    first, second = (list(csv.reader(io.StringIO(x))) for x in json.loads(in_browser(text, script, tmp_path)))
    report = rich_report()
    assert first[0] == ["estimator", *(c.name for c in columns(report)), "biased", "worst rel", "times least"]
    assert [row[0] for row in first[1:]] == [" ".join(e.name.split()) for e in report.estimators]
    own = [m for m in report.measurements if m.estimator == report.estimators[4].name]
    assert [row[:3] for row in second[1:]] == [[m.problem, m.finding, number(m.rel)] for m in own]


@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_does_not_scroll_sideways(text: str, tmp_path: Path, width: int) -> None:
    """With every section open; only tables scroll, inside their boxes."""
    script = """(() => { for (const d of all("details")) d.open = true;
      return `${innerWidth} ${document.documentElement.scrollWidth}`; })()"""
    assert in_browser(text, script, tmp_path, width=width) == f"{width} {width}"


def test_words_find_sentences(tmp_path: Path) -> None:
    script = """(() => {
      const input = document.querySelector("input[data-filter]");
      input.value = "OWN kappa".replace("kappa", "κ"); input.oninput();
      const table = document.getElementById("cases-table");
      return JSON.stringify([[...table.tBodies[0].rows].map((r) => getComputedStyle(r).display), csv(table)]);
    })()"""
    displayed, text = json.loads(in_browser(html(case_report()), script, tmp_path, width=390))
    assert displayed == ["block", "none"]  # cards, on a phone
    rows = list(csv.reader(io.StringIO(text)))
    assert [row[0] for row in rows] == ["sentence", "κ < 1 & κ > 0.", '<i>"x", y</i>']
