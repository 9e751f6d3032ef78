"""The variance comparison report: the numbers of the frames on the page and in the files, intervals wherever there are any,
and a script that works in a browser, at a phone's width as well."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas as pd
import pytest
from matplotlib.backends.backend_svg import FigureCanvasSVG

import pgcheck
from pgcheck.estimators.lookup import as_estimator
from pgcheck.render import comparison as render
from pgcheck.render.comparison import report_html, takeaways, when, with_interval, write_tables
from pgcheck.render.figures import SETTINGS
from pgcheck.render.messages import number
from pgcheck.render.plots import KEYS, PRINT, drawings, marker
from pgcheck.runs.compare import Comparison, Sweeps
from pgcheck.verdicts.variance import relative
from tests.render.pages import HOSTILE, Page, assert_self_contained, column_of, in_browser

SWEEPS = Sweeps(groups=(1, 2), group_sizes=(2, 3), staleness=(0.0, 1.0))
# on-policy, off-policy, and one without a direction
PROBLEMS = ("dialogue/two-turn", "off-policy/dialogue-stale", "bandit/stationary")


@cache
def rich() -> Comparison:
    hostile = replace(as_estimator("grpo"), name=HOSTILE, about="<script>alert(1)</script>")
    return pgcheck.comparison(
        ["reinforce", "leave_one_out", "batch_mean", hostile, "vineppo"], list(PROBLEMS), sweeps=SWEEPS
    )


@cache
def with_intervals() -> Comparison:
    """As an engine that samples fills the columns: intervals of 10% either way; no blocks."""
    c = pgcheck.comparison(["reinforce", "grpo"], "dialogue/two-turn", sweeps=SWEEPS)
    tables = {name: table.copy() for name, table in c.tables.items() if name != "blocks"}
    for table in tables.values():
        for name in ("scale", "rel", "variance", "mse", "snr"):
            if name in table and f"{name}_low" in table:
                table[f"{name}_low"], table[f"{name}_high"] = 0.9 * table[name], 1.1 * table[name]
    columns = [
        x for x in tables["comparison"] if not x.startswith(("ratio", "batches_to", "rollouts_to", "better", "break"))
    ]
    tables["comparison"] = relative(tables["comparison"][columns].assign(batches=1000))
    return replace(c, tables=tables)


@cache
def alone() -> Comparison:
    return pgcheck.comparison(["reinforce"], "bandit/two-arm", sweeps=Sweeps((), (), ()))


@pytest.fixture(scope="module")
def text() -> str:
    return report_html(rich())


@pytest.fixture(scope="module")
def with_intervals_text() -> str:
    return report_html(with_intervals())


@pytest.fixture(scope="module")
def page(text: str) -> Page:
    return Page(text)


def test_self_contained(text: str, with_intervals_text: str) -> None:
    assert_self_contained("rich", text)
    assert_self_contained("intervals", with_intervals_text)
    assert_self_contained("alone", report_html(alone()))


def test_the_same_bytes_twice(text: str) -> None:
    assert report_html(rich()) == text


def test_names_are_data(page: Page) -> None:
    assert not page.find("b", id="x")
    assert all("alert(1)" not in e.text for e in page.find("script"))
    assert any(e.text.endswith(HOSTILE) for e in page.find("button", class_="chip"))


def test_results_are_the_frame(page: Page) -> None:
    """A row for every line of the frame, with its numbers; the value behind a cell is that of the frame to the bit."""
    frame = rich().tables["comparison"]
    (results,) = page.find("table", id="results")
    rows = [e for e in page.find("tr") if re.fullmatch(r"e\d+", e.attrs.get("class", "")) and e.text in results.text]
    for r in frame.to_dict("records"):
        fitting = [e.text for e in rows if r["estimator"] in e.text and r["problem"] in e.text]
        assert any(number(r["variance"]) in t and r["finding"] in t for t in fitting), r
    values = {e.attrs["data-v"] for e in page.find("td") if "data-v" in e.attrs}
    for column in ("variance", "ratio", "snr", "cost"):
        assert {str(float(x)) for x in frame[column] if math.isfinite(x)} <= values


def test_every_figure_has_its_numbers(page: Page, text: str) -> None:
    """A table of its own below it, or a link to the results; and each estimator has a mark in it."""
    figures = re.findall(r"<figure>.*?</figure>", text, re.S)
    assert len(figures) >= 3 * 10
    for f in figures:
        assert 'href="#table"' in f or "<table" in f
        assert "<figcaption><b>" in f
        label = re.search(r'aria-label="(\S+) on (\S+)"', f)
        assert label
    on_policy = [f for f in figures if "on dialogue/two-turn" in f]
    for f in on_policy:
        svg = f[f.index("<svg") : f.index("</svg>")]
        for i in range(5):
            assert f'class="e{i}"' in svg, (f[:200], i)


def test_stationary_points_have_no_direction(text: str) -> None:
    """∇J = 0: no figure of bias relative to it, no — taken for a number."""
    names = {m[0] for m in re.findall(r'aria-label="(\S+) on (bandit/stationary)"', text)}
    assert "ratios" in names
    assert not {"staleness-bias", "groups-rollouts", "group_sizes-rollouts"} & names


def intervals(c: Comparison) -> dict[str, set[str]]:
    """By figure, whose intervals are in it: lines and bands of their own, apart from points and curves."""
    tables = {name: t.assign(number=t["estimator"].map({"reinforce": 0, "grpo": 1})) for name, t in c.tables.items()}
    out = {}
    for d in drawings(tables, c.problems[0].gradient_norm):
        with mpl.rc_context(SETTINGS):
            figure = d.made(PRINT, FigureCanvasSVG)
        out[d.name] = {x.get_gid() for ax in figure.axes for x in ax.collections}
    return out


def test_intervals_are_drawn_wherever_they_have_a_length(with_intervals_text: str) -> None:
    """Of every estimator in every figure of something sampled; none where numbers are exact; and in words, both ends."""
    c = with_intervals()
    exact = pgcheck.comparison(["reinforce", "grpo"], "dialogue/two-turn", sweeps=SWEEPS)
    plain, found = intervals(exact), intervals(c)
    assert all(not drawn for drawn in plain.values())
    assert set(found) == set(plain) - {"blocks"}  # those are of exact moments only
    for name, drawn in found.items():
        expected = {"steps": set(), "sources": set(), "ratios": {"e1"}}  # the reference is 1 of itself
        assert drawn == expected.get(name, {"e0", "e1"}), name
    assert "are sampled (95%)" in with_intervals_text
    assert re.search(r"\d \[[\d.e-]+, [\d.e-]+\]", with_intervals_text)
    assert "nothing was sampled" in report_html(exact)


def test_words() -> None:
    assert with_interval({"x": 1.5, "x_low": 1.25, "x_high": 1.75}, "x") == "1.5 [1.25, 1.75]"
    assert with_interval({"x": 1.5, "x_low": 1.5, "x_high": 1.5}, "x") == with_interval({"x": 1.5}, "x") == "1.5"
    assert with_interval({"x": math.inf}, "x") == "∞"
    assert with_interval({"x": None}, "x") == "—"
    assert with_interval({"x": 1.5, "x_low": math.nan, "x_high": math.nan}, "x") == "1.5 [no interval]"
    assert when("same", math.nan, "batches") == "equal"
    assert when("below", 1234.5, "batches") == "below 1.23e+03 batches"
    assert when("below", 0.7, "batches") == "never"  # there is no such batch
    assert when("above", 0.7, "batches") == "always"
    assert when("above", 70.0, "rollouts", least=4.0) == "above 70 rollouts"
    assert when("never", math.nan, "batches") == "never"


def test_takeaways() -> None:
    """The quietest, the cheapest, who wins while biased, who points elsewhere: by hand from the frame."""
    table = rich().tables["comparison"].query("problem == 'dialogue/two-turn'")
    reference, quietest, winning, elsewhere = takeaways(table)
    assert reference.startswith("Reference: reinforce, unbiased, tr Cov 0.1858, SNR 0.3609, 4 rollouts a batch.")
    ratio = table.set_index("estimator")["ratio"]
    assert quietest == (
        f"Quietest of the unbiased: vineppo(K=1), {number(ratio['vineppo(K=1)'])} × the variance of reinforce."
        f" For equal rollouts: reinforce, 1 ×; a batch of vineppo(K=1) takes {number(table['cost'].iloc[-1])} rollouts."
    )
    assert winning.startswith(
        "More biased than reinforce, and yet of lower MSE at a small budget of rollouts: batch_mean below "
    )
    assert elsewhere.startswith(f"1 of 5 point elsewhere than ∇J, furthest {HOSTILE} (off_axis ")
    assert takeaways(alone().tables["comparison"]) == [
        "Reference: reinforce, unbiased, tr Cov 0.00045, SNR 6, 4 rollouts a batch."
    ]


def test_marks_tell_a_hundred_estimators_apart() -> None:
    assert len({(marker(i), PRINT.of(i)) for i in range(100)}) == 100


# -- the script


def test_sorting_by_a_link(text: str, with_intervals_text: str, tmp_path: Path) -> None:
    """By the numbers behind the cells: intervals, ∞ and — included."""
    frame = rich().tables["comparison"]
    found = json.loads(in_browser(text, column_of("results", 8), tmp_path, hash_="#sort=results,8,ascending"))
    assert found == [number(x) for x in sorted(frame["snr"])]
    column = column_of("results", 5)
    found = json.loads(in_browser(with_intervals_text, column, tmp_path, hash_="#sort=results,5,descending"))
    ordered = with_intervals().tables["comparison"].sort_values("variance", ascending=False)
    assert [x.partition(" ")[0] for x in found] == [number(x) for x in ordered["variance"]]
    assert "[" in found[0]


def test_choosing(text: str, tmp_path: Path) -> None:
    """Words and a finding choose rows of the results; a button hides its estimator in every table and figure."""
    script = """(() => {
      const visible = () => [...document.getElementById("results").tBodies[0].rows]
        .filter((r) => getComputedStyle(r).display !== "none")
        .map((r) => [r.cells[0].textContent, r.cells[1].textContent, r.cells[2].textContent]);
      const out = {};
      choice.elements.words.value = "DIALOGUE-stale"; choice.oninput(); out.words = visible();
      out.said = document.getElementById("shown").textContent;
      choice.elements.words.value = ""; choice.elements.finding.value = "proportional"; choice.oninput();
      out.finding = visible();
      choice.elements.finding.value = ""; choice.oninput(); out.all = visible().length;
      const drawn = () => all("svg[role=img] .e1").filter((g) => getComputedStyle(g).display !== "none").length;
      out.before = drawn(); chips[1].click(); out.after = drawn(); out.without = visible().length;
      out.pressed = chips.map((chip) => chip.getAttribute("aria-pressed"));
      everyone.click(); out.back = drawn(); out.again = everyone.hidden;
      return JSON.stringify(out);
    })()"""
    out = json.loads(in_browser(text, script, tmp_path))
    assert {row[2] for row in out["words"]} == {"off-policy/dialogue-stale"}
    assert len(out["words"]) == 5
    assert out["said"] == "5 of 15 rows"
    frame = rich().tables["comparison"]
    assert len(out["finding"]) == (frame["finding"] == "proportional").sum() > 0
    assert {row[1] for row in out["finding"]} == {"proportional"}
    assert out["all"] == 15
    assert out["before"] == out["back"] > 30
    assert out["after"] == 0
    assert out["without"] == 12
    assert out["pressed"] == ["true", "false", "true", "true", "true"]
    assert out["again"] is True


@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_does_not_scroll_sideways(text: str, tmp_path: Path, width: int) -> None:
    """With every section open; tables and the row of buttons scroll inside their boxes."""
    script = """(() => { for (const d of all("details")) d.open = true;
      return `${innerWidth} ${document.documentElement.scrollWidth}`; })()"""
    assert in_browser(text, script, tmp_path, width=width) == f"{width} {width}"


@pytest.mark.parametrize("width", [390, 1280])
def test_letters_of_figures_can_be_read(text: str, tmp_path: Path, width: int) -> None:
    """Figures scale with the page: no text below 8 CSS pixels, no label outside of its figure."""
    script = """(() => {
      const small = [], outside = [];
      for (const svg of all("svg[role=img]")) {
        const box = svg.getBoundingClientRect();
        for (const t of all("text", svg)) {
          const r = t.getBoundingClientRect();
          if (!r.width) continue;
          if (r.height < 8) small.push(t.textContent);
          if (r.left < box.left - 1 || r.right > box.right + 1 || r.bottom > box.bottom + 1)
            outside.push(`${svg.getAttribute("aria-label")}: ${t.textContent}`);
        }
      }
      return JSON.stringify([small, outside]);
    })()"""
    assert json.loads(in_browser(text, script, tmp_path, width=width)) == [[], []]


def test_csv_of_a_table(text: str, tmp_path: Path) -> None:
    script = "csv(document.getElementById('p0-staleness-bias-staleness'))"
    rows = list(csv.reader(io.StringIO(in_browser(text, script, tmp_path))))
    frame = rich().tables["staleness"].query("problem == 'dialogue/two-turn'")
    assert [row[0] for row in rows[1:]] == [" ".join(x.split()) for x in frame["estimator"]]
    at = rows[0].index("tr Cov")
    assert [row[at] for row in rows[1:]] == [number(x) for x in frame["variance"]]


# -- files


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], str]:
    """All files of a comparison, and what is said beside them."""
    return write_tables(with_intervals(), tmp_path_factory.mktemp("written"))


def test_files(tmp_path: Path, written: tuple[list[Path], str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A CSV for each table, to the bit; an SVG and a PNG of each figure, with a legend; one line where pyarrow lacks."""
    monkeypatch.setattr(render.importlib.util, "find_spec", lambda name: None)
    c = with_intervals()
    files, remark = write_tables(c, tmp_path / "out")
    assert "pip install 'pgcheck[parquet]'" in remark
    assert len(files) == len(list((tmp_path / "out").iterdir()))
    for name, table in c.tables.items():
        path = tmp_path / "out" / f"{name}.csv"
        if table.empty:
            assert not path.exists()
            continue
        rows = list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"))))
        for column in table.select_dtypes(float):
            assert [float(r[column] or "nan") for r in rows] == pytest.approx(
                table[column].tolist(), rel=0, nan_ok=True
            )
    figures = sorted(p for p in files if p.suffix == ".svg")
    assert len(figures) == 11  # no blocks without moments
    for p in figures:
        text = p.read_text()
        assert text.startswith("<?xml")
        assert "#1100" not in text  # no stand-in is left
        if not any(p.stem.endswith(f"-{name}") for name in KEYS):
            assert PRINT.of(0) in text
            assert text.count("grpo") >= 1
        png = p.with_suffix(".png").read_bytes()
        assert png.startswith(b"\x89PNG")
    again = [p for p in written[0] if p.suffix != ".parquet"]
    assert [p.read_bytes() for p in files] == [p.read_bytes() for p in again]


def test_parquet(tmp_path: Path, written: tuple[list[Path], str]) -> None:
    """What is written reads back equal, to the bit and the type."""
    pytest.importorskip("pyarrow", reason="pyarrow is not installed; Parquet files were not written")
    for c, (files, remark) in ((alone(), write_tables(alone(), tmp_path)), (with_intervals(), written)):
        assert not remark
        found = {p.stem: p for p in files if p.suffix == ".parquet"}
        assert set(found) == {name for name, table in c.tables.items() if not table.empty}
        for name, path in found.items():
            pd.testing.assert_frame_equal(pd.read_parquet(path), c.tables[name])


def test_global_state_is_left_alone() -> None:
    before: dict[str, Any] = dict(mpl.rcParams)
    report_html(alone())
    assert dict(mpl.rcParams) == before
