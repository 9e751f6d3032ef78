"""Figures of report.html as inline SVG: right in light and dark, and the same bytes for the same report.

What all estimators share (names, axes, the spread of the others) is a *sheet*, drawn once by seaborn and reused with
`<use>`; what one estimator adds to it is a few dots. So a page with fifty estimators carries three drawings, not 150.
Colours are stand-ins while matplotlib draws and CSS variables in the page; text stays text in the page's font.

Guarantee: no global state of matplotlib is changed, and nothing is drawn on a screen.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import pandas as pd
import seaborn as sns
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from pgcheck.render.frames import asked, measurements, overview
from pgcheck.render.tables import columns
from pgcheck.runs.report import MeasurementRow, Report

WIDTH = 360  # units of a figure, and CSS pixels on a phone
ROW = 14.0
TOP, BOTTOM = 32.0, 6.0
LETTER = 5.3  # width of a letter; a name that is longer than its place is cut, the table has it whole

_COLORS = {  # stand-ins, and what stands for them in the page
    "#010101": "var(--ink)",
    "#020202": "var(--faint)",
    "#030303": "var(--line)",
    "#040404": "var(--bar)",
}
INK, FAINT, LINE, BAR = _COLORS
SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "pgcheck",
    "font.size": 9.5,
    "font.family": "sans-serif",
    "text.parse_math": False,
}
FINDINGS = ("unbiased", "inconclusive", "proportional", "biased")
_WORST = {
    "unbiased": "always unbiased",
    "inconclusive": "somewhere not decided",
    "proportional": "at worst proportional",
    "biased": "biased somewhere",
}
_DECADES = {0.1: ".1", 1.0: "1", 10.0: "10", 100.0: "100"}


@dataclass(frozen=True)
class Panel:
    """A horizontal axis of a sheet: what is outside of [low, high] is shown as an arrow at its edge."""

    title: str
    low: float
    high: float
    ticks: Mapping[float, str]
    left: float
    width: float
    log: bool = False
    mark: float | None = None  # a line there

    def x(self, value: float) -> float:
        """Where a value is, in units of the figure."""
        if self.log:
            part = math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        else:
            part = (value - self.low) / (self.high - self.low)
        return self.left + self.width * min(max(part, 0.0), 1.0)


@dataclass(frozen=True)
class Sheet:
    """What all estimators share of a figure."""

    name: str
    height: float
    svg: Markup
    panels: Mapping[str, Panel]  # by the column of the table that is shown
    rows: Mapping[str, float]  # name -> y

    def dots(self, table: pd.DataFrame, *, row: str = "problem") -> Markup:
        """The marks of rows with `finding`, `asked`, `row` and a column for each panel."""
        marks: dict[str, list[str]] = {}
        for r in table.to_dict("records"):
            kind = str(r["finding"]) + ("" if r["asked"] else " pale")
            for name, panel in self.panels.items():
                value = r[name]
                if value is not None and math.isfinite(value):
                    inside = panel.low <= value <= panel.high
                    x, y = panel.x(value), self.rows[str(r[row]).partition("@")[0]]
                    if inside:
                        marks.setdefault(f"dots {kind}", []).append(f"M{x:.1f} {y:.1f}h0")
                    else:
                        out = 4 if value > panel.high else -4
                        marks.setdefault(f"off {kind}", []).append(f"M{x:.1f} {y - 4:.1f}l{out} 4l{-out} 4z")
        return Markup("").join(
            Markup('<path class="{}" d="{}"/>').format(kind, "".join(dict.fromkeys(marks[kind])))
            for kind in sorted(marks, reverse=True)  # pale ones first
        )


def bias_sheet(report: Report) -> Sheet:
    """scale and off_axis on every problem."""
    panels = {
        "scale": Panel("scale", -0.5, 2.0, {0.0: "0", 1.0: "1", 2.0: "2"}, 124, 124, mark=1.0),
        "off_axis": Panel("off_axis", 0.0, 1.0, {0.0: "0", 0.5: ".5", 1.0: "1"}, 266, 84, mark=0.0),
    }
    return _sheet("bias", panels, _problem_rows(report))


def variance_sheet(report: Report) -> Sheet:
    """tr Cov over that of the least unbiased one, on every problem; bars: the estimators of the report.

    A broad bar holds the middle half of them, a line all.
    """
    panels = {
        "times_least": Panel("tr Cov, × least of the unbiased", 0.1, 100.0, _DECADES, 124, 226, log=True, mark=1.0)
    }
    table = measurements(report)
    table["row"] = table["problem"].str.partition("@")[0]
    return _sheet("variance", panels, _problem_rows(report), table)


def overview_sheet(report: Report) -> Sheet:
    """Direction error and variance of every estimator over the problems its claims speak of.

    Estimators of one worst finding stand together, the one of least variance first.
    """
    panels = {
        "off_axis": Panel("off_axis", 0.0, 1.0, {0.0: "0", 0.5: ".5", 1.0: "1"}, 178, 72, mark=0.0),
        "times_least": Panel("tr Cov, × least", 0.1, 100.0, _DECADES, 266, 84, log=True, mark=1.0),
    }
    table, made = asked(measurements(report)), overview(report)
    rows: list[tuple[str, str, bool]] = []
    for finding in FINDINGS:
        group = made[made["worst"] == finding].sort_values("times_least", kind="stable")
        rows += [(f"/{finding}", _WORST[finding], True)] if len(group) else []
        rows += [(name, name, False) for name in group.index]
    return _sheet("overview", panels, rows, table.assign(row=table["estimator"]))


def overview_dots(report: Report, sheet: Sheet) -> Markup:
    """The medians, coloured by the worst that was found."""
    made = overview(report).dropna(subset="worst").reset_index(names="estimator")
    return sheet.dots(made.assign(finding=made["worst"], asked=True), row="estimator")


@dataclass(frozen=True)
class StepBar:
    """One position: along of E ĝ_t, the true one, and the gap."""

    step: int
    along: float
    truth: float
    gap: float


def telling_steps(report: Report, estimator: str, *, most: int = 4) -> list[tuple[MeasurementRow, list[StepBar]]]:
    """Per-step contributions on the problems where they are furthest from the truth, the worst first.

    One θ of a problem, and only problems of several steps. An estimator that is right at every step shows one problem.
    """
    truth = {p.name: p.by_step for p in report.problems}
    silent = {(n.estimator, n.problem) for n in report.not_asked}
    found = []
    for m in report.measurements:
        bars = [
            StepBar(t, s.along, g, s.gap)
            for t, (s, g) in enumerate(zip(m.by_step, truth[m.problem], strict=bool(m.by_step)))
            if s.along is not None and s.gap is not None and g is not None
        ]
        if m.estimator == estimator and len(bars) > 1:
            gap = round(max(b.gap for b in bars), 9)
            found.append(((m.estimator, m.problem) in silent, -gap, m, bars))
    chosen: dict[str, tuple[MeasurementRow, list[StepBar]]] = {}
    for unasked, gap, m, bars in sorted(found, key=lambda x: x[:2]):
        base = m.problem.partition("@")[0]
        if not chosen or (gap < 0 and base not in chosen and not unasked and len(chosen) < most):
            chosen.setdefault(base, (m, bars))
    return list(chosen.values())


# -- drawing


def _problem_rows(report: Report) -> list[tuple[str, str, bool]]:
    """(name, label, is a heading), families headed where they have a name."""
    rows, family = [], ""
    for c in columns(report):
        head, _, short = c.name.partition("/")
        if short and head != family:
            rows.append((f"{head}/", head, True))
        family = head if short else ""
        rows.append((c.name, short or c.name, False))
    return rows


def _sheet(
    name: str,
    panels: Mapping[str, Panel],
    rows: Sequence[tuple[str, str, bool]],
    spread: pd.DataFrame | None = None,
) -> Sheet:
    height = TOP + ROW * len(rows) + BOTTOM
    at = {key: TOP + ROW * (i + 0.5) for i, (key, _, _) in enumerate(rows)}
    with mpl.rc_context(SETTINGS):
        figure = Figure(figsize=(WIDTH / 72, height / 72), dpi=72)
        FigureCanvasSVG(figure)
        for i, (column, panel) in enumerate(panels.items()):
            box = (panel.left / WIDTH, BOTTOM / height, panel.width / WIDTH, (height - TOP - BOTTOM) / height)
            ax = figure.add_axes(box)
            _frame(ax, panel, rows, named=i == 0)
            if spread is not None:
                _bars(ax, panel, spread, column, {key: i for i, (key, _, _) in enumerate(rows)})
        return Sheet(name, height, inline(figure, name, _COLORS), panels, at)


def _frame(ax: Axes, panel: Panel, rows: Sequence[tuple[str, str, bool]], *, named: bool) -> None:
    ax.set_xscale("log" if panel.log else "linear")
    ax.set_xlim(panel.low, panel.high)
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.minorticks_off()
    ax.patch.set_visible(False)
    for side in ax.spines.values():
        side.set_visible(False)
    ax.xaxis.tick_top()
    ax.set_xticks(list(panel.ticks), list(panel.ticks.values()), color=FAINT)
    ax.tick_params(axis="both", length=0, pad=2)
    ax.set_title(panel.title, fontsize=9.5, color=INK, pad=15, loc="left")
    ax.hlines([i for i, r in enumerate(rows) if not r[2]], panel.low, panel.high, color=LINE, lw=0.6)
    ax.vlines(list(panel.ticks), -0.5, len(rows) - 0.5, color=LINE, lw=0.6)
    if panel.mark is not None:
        ax.axvline(panel.mark, color=FAINT, lw=0.9)
    ax.set_yticks([])
    for i, (_, label, heading) in enumerate(rows if named else ()):
        longest = int((panel.left - 6) / LETTER)
        short = label if len(label) <= longest else f"{label[: longest - 1]}…"
        beside = (-6, 0)
        ax.annotate(
            short,
            (0, i),
            xycoords=("axes fraction", "data"),
            xytext=beside,
            textcoords="offset points",
            ha="right",
            va="center",
            color=FAINT if heading else INK,
            fontsize=9.5,
            parse_math=False,
        )


def _bars(ax: Axes, panel: Panel, table: pd.DataFrame, column: str, row: Mapping[str, int]) -> None:
    shown = pd.DataFrame({"y": table["row"].map(row), "x": table[column].astype(float).clip(panel.low, panel.high)})
    shown = shown.dropna()
    if shown.empty:
        return
    for covered, width, color in ((100, 0.8, FAINT), (50, 6.0, BAR)):
        sns.pointplot(
            shown,
            x="x",
            y="y",
            ax=ax,
            orient="h",
            native_scale=True,
            estimator="median",
            errorbar=("pi", covered),  # percentiles, no resampling
            color=color,
            linestyle="none",
            marker="none",
            err_kws={"linewidth": width, "solid_capstyle": "butt"},
            legend=False,
        )
    ax.set(xlabel=None, ylabel=None, xlim=(panel.low, panel.high), ylim=(len(row) - 0.5, -0.5), yticks=[])


def inline(figure: Figure, name: str, colors: Mapping[str, str]) -> Markup:
    """The figure's SVG without its envelope: CSS colours for the stand-ins `colors`, ids of its own, no fonts; what was
    drawn with the gid e0, e1, … has it as class."""
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")), transparent=True)
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = text[text.index(">") + 1 : text.rindex("</svg>")]
    text = re.sub(r"<defs>\s*<style.*?</defs>", "", text, flags=re.S)
    text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.S)
    for color, variable in colors.items():
        text = text.replace(color, variable)
    text = re.sub(r' id="(e\d+)"', r' class="\1"', text)
    wanted = set(re.findall(r"#([\w-]+)[)\"]", text))
    text = re.sub(r' id="([^"]*)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in wanted else "", text)
    text = re.sub(r"#([\w-]+)([)\"])", lambda m: f"#{name}-{m[1]}{m[2]}", text)
    text = re.sub(r"font-family: [^;\"]*; ?|stroke-linejoin: miter; ?", "", text)
    text = re.sub(r' transform="rotate\(-0 [^"]*"', "", text)
    text = re.sub(r"(\d\.\d\d)\d+", r"\1", text)
    return Markup(re.sub(r"\n\s*", "\n", text).replace("xlink:href", "href").strip())
