"""Figures show the report's numbers: dots are read back through the axis that is drawn, bars through their frames."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest

from pgcheck.render import figures as f
from pgcheck.render.frames import measurements
from pgcheck.render.html import _bars
from pgcheck.runs.report import Report
from tests.render.pages import HOSTILE, Page, rich_report


def ticks(sheet: f.Sheet) -> list[tuple[float, float]]:
    """(label, x) of every tick drawn."""
    drawn = re.findall(r'<text [^>]*?x="([\d.]+)" y="[\d.]+">([\d.]+)</text>', sheet.svg)
    return [(float(label), float(x)) for x, label in drawn]


def dots(svg: str) -> Iterator[tuple[str, float, float]]:
    """(class, x, y) of every dot."""
    for e in Page(f"<svg>{svg}</svg>").find("path"):
        for x, y in re.findall(r"M([\d.]+) ([\d.]+)h0", e.attrs["d"]):
            yield e.attrs["class"], float(x), float(y)


def labels(sheet: f.Sheet) -> dict[str, float]:
    """y of every name beside the axis."""
    drawn = re.findall(r'text-anchor: end[^>]*? y="([\d.]+)">([^<]*)</text>', sheet.svg)
    return {label: float(y) for y, label in drawn}


def test_bias_dots_are_scale_and_off_axis() -> None:
    """Two ticks of an axis and straight lines between them give back each number, in the row of its problem."""
    report = rich_report()
    sheet = f.bias_sheet(report)
    (s0, x0), (s1, x1), _, (o0, u0), _, (o1, u1) = ticks(sheet)
    assert (s0, s1, o0, o1) == (0.0, 1.0, 0.0, 1.0)
    table = measurements(report)
    for name in ("reinforce", "batch_mean", "grpo"):
        own = [m for m in report.measurements if m.estimator == name and m.scale is not None]
        found = list(dots(sheet.dots(table[table["estimator"] == name])))
        shown_rows = {y for _, _, y in found}
        for m in own:
            y = sheet.rows[m.problem.partition("@")[0]]
            assert y in shown_rows
            assert labels(sheet)[m.problem.partition("/")[2].partition("@")[0]] == pytest.approx(y, abs=4)
            near = [(kind, x) for kind, x, at in found if at == y]
            assert m.scale is not None
            assert m.off_axis is not None
            if -0.5 <= m.scale <= 2:
                assert min(abs((x - x0) / (x1 - x0) - m.scale) for _, x in near) < 1e-3
            assert min(abs((x - u0) / (u1 - u0) - m.off_axis) for _, x in near) < 1e-3
            assert (
                all(kind.split()[1] == m.finding for kind, _ in near if "@" not in m.problem) or "dialogue" in m.problem
            )


def test_variance_dots_are_on_a_logarithmic_axis() -> None:
    report = rich_report()
    sheet = f.variance_sheet(report)
    at = dict(ticks(sheet))
    table = measurements(report)
    own = table[table["estimator"] == "leave_one_out"]
    found = {(x, y) for _, x, y in dots(sheet.dots(own))}
    decade = at[10.0] - at[1.0]
    for problem, value in zip(own["problem"], own["times_least"], strict=True):
        if 0.1 <= value <= 100:
            x = at[1.0] + decade * math.log10(value)
            assert min(abs(x - a) for a, y in found if y == sheet.rows[problem.partition("@")[0]]) < 0.1


def test_the_spread_of_the_others_is_drawn() -> None:
    """The bar of a problem runs from the first to the third quartile of the variances there, the line over all."""
    report = rich_report()
    sheet = f.variance_sheet(report)
    at = dict(ticks(sheet))
    table = measurements(report)
    values = table[table["problem"] == "chain/absorbing"]["times_least"].clip(0.1, 100)
    ends = np.percentile(np.log10(values), (0, 100, 25, 75))  # between two values, straight on the axis that is drawn
    expected = at[1.0] + (at[10.0] - at[1.0]) * ends
    y = sheet.rows["chain/absorbing"]
    lines = re.findall(r'<path d="M ([\d.]+) ([\d.]+) \nL ([\d.]+) ([\d.]+) \n" [^>]*stroke-width: ([\d.]+)', sheet.svg)
    here = {width: (float(a), float(c)) for a, b, c, d, width in lines if abs(float(b) - y) < 0.1 and b == d}
    assert (*here["0.8"], *here["6"]) == pytest.approx(tuple(expected), abs=0.1)


def test_what_is_outside_is_an_arrow_at_the_edge() -> None:
    report = rich_report()
    sheet = f.bias_sheet(report)
    row = {"finding": "biased", "asked": True, "problem": "bandit/two-arm"}
    table = pd.DataFrame([row | {"scale": 9.0, "off_axis": 0.5}, row | {"scale": -9.0, "off_axis": math.nan}])
    marks = Page(f"<svg>{sheet.dots(table)}</svg>").find("path", class_="off biased")
    panel = sheet.panels["scale"]
    edges = (panel.left + panel.width, panel.left)
    assert [float(x) for x in re.findall(r"M([\d.]+) ", marks[0].attrs["d"])] == pytest.approx(edges)
    assert len(list(dots(sheet.dots(table)))) == 1


def test_overview_groups_by_the_worst_finding() -> None:
    report = rich_report()
    sheet = f.overview_sheet(report)
    y = labels(sheet)
    assert y["always unbiased"] < y["reinforce"] < y["at worst proportional"] < y["batch_mean"] < y["biased somewhere"]
    assert y["biased somewhere"] < y["grpo"]
    assert "nan" not in y
    kinds = {kind for kind, _, at in dots(f.overview_dots(report, sheet)) if at == sheet.rows["batch_mean"]}
    assert kinds == {"dots proportional"}


def test_long_and_hostile_names() -> None:
    """A name with markup is text in the figure; one that is too long is cut."""
    sheet = f.overview_sheet(rich_report())
    Page(f"<svg>{sheet.svg}</svg>")
    assert "<b>" not in sheet.svg
    assert HOSTILE in sheet.rows


def test_telling_steps_are_the_most_wrong() -> None:
    """Without γ^t the later positions weigh too much: 1/γ at t = 1, so a gap of |1/γ − 1| of what is true there."""
    report = rich_report()
    (m, bars), *others = f.telling_steps(report, "reward_to_go_undiscounted_weight")
    assert m.problem == "mdp/pessimal"
    assert [b.along for b in bars] == pytest.approx([4, -6])  # truth 4 and −3, γ = .5
    assert [b.truth for b in bars] == pytest.approx([4, -3])
    assert [b.gap for b in bars] == pytest.approx([0, 3], abs=1e-12)
    gaps = [max(b.gap for b in bars) for _, bars in others]
    assert gaps == sorted(gaps, reverse=True)
    assert all(g > 1e-9 for g in gaps)
    assert len({m.problem.partition("@")[0] for m, _ in others}) == len(others)


def test_one_problem_is_enough_where_every_step_is_right() -> None:
    ((m, bars),) = f.telling_steps(rich_report(), "leave_one_out")
    assert m.finding == "unbiased"
    assert [b.along for b in bars] == pytest.approx([b.truth for b in bars], abs=1e-12)
    assert sum(b.along for b in bars) == pytest.approx(1)


def test_bars_have_the_length_of_their_numbers() -> None:
    made = _bars([f.StepBar(0, 2.0, 1.0, 1.0), f.StepBar(1, -1.0, 0.0, 1.0)])
    first, second = made["rows"]
    assert first["width"] == pytest.approx(2 * first["true_width"])
    assert first["x"] == first["true_x"] == made["zero"]
    assert second["x"] + second["width"] == pytest.approx(made["zero"])
    assert second["width"] == pytest.approx(first["true_width"])
    assert first["x"] + first["width"] == pytest.approx(225)


def every_sheet(report: Report) -> list[str]:
    return [make(report).svg for make in (f.bias_sheet, f.variance_sheet, f.overview_sheet)]


def test_the_same_bytes_and_no_global_state() -> None:
    before = dict(mpl.rcParams)
    first = every_sheet(rich_report())
    assert every_sheet(rich_report()) == first
    assert dict(mpl.rcParams) == before
    from matplotlib import pyplot

    assert pyplot.get_fignums() == []


def test_colors_are_variables() -> None:
    """Nothing in a figure has a color of its own, so that light and dark are both right."""
    for svg in every_sheet(rich_report()):
        assert not re.findall(r"#[0-9a-f]{6}|rgb\(", svg)
        assert "var(--" in svg
        assert "font-family" not in svg
