"""report.html: one file, nothing fetched, light and dark; whole without JavaScript, sortable with it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup, escape

from pgcheck.render.frames import measurements, overview
from pgcheck.render.messages import failure_messages, first_sentence, number, sampled_words, seen_words, with_ends
from pgcheck.render.tables import case_message, case_rows, cells, columns, matrix, summary
from pgcheck.runs.report import Report
from pgcheck.verdicts.checks import registered_checks
from pgcheck.verdicts.verdict import Status

if TYPE_CHECKING:
    from pgcheck.render.figures import StepBar


def html(report: Report, messages: Mapping[str, str] | None = None) -> str:
    """The report as a self-contained page: what fails, the matrix, and of each estimator what it does and why."""
    across = columns(report)
    table = measurements(report)
    rows: dict[str, Any] = {e.name: [] for e in report.estimators}
    for m in report.measurements:
        rows[m.estimator].append(m)
    pairs = table.to_dict("records")
    page = {
        "report": report,
        "cells": cells(report),
        "matrix": matrix(report),
        "columns": across,
        "several": len(report.estimators) > 1,
        "thetas": max((len(c.members) for c in across), default=0),
        "first": {p.name: i + 1 for i, p in enumerate(report.problems)},
        "number_of": {e.name: i + 1 for i, e in enumerate(report.estimators)},
        "summary": summary(report),
        "families": [(name, len(list(group))) for name, group in groupby(c.family for c in across)],
        "failures": {name: _parts(text) for name, text in failure_messages(report, messages).items()},
        "measurements": rows,
        "times_least": {(r["estimator"], r["problem"]): _number_or_none(r["times_least"]) for r in pairs},
        "overview_rows": {
            name: {key: _number_or_none(row[key]) for key in ("asked", "biased", "worst_rel", "times_least")}
            for name, row in overview(report).iterrows()
        },
        "checks": _checks(report),
        "cases": case_rows(report),
        "failed_cases": [{"name": c.name, "part": _parts(case_message(c))[0]} for c in report.failed_cases],
        **(_figures(report, table) if pairs else {"sheets": {}, "figures": {}, "overview": None}),
    }
    return environment().get_template("report.html").render(page)


def environment() -> Environment:
    """Templates with the filters that numbers and names go through."""
    env = Environment(
        loader=PackageLoader("pgcheck.render"),
        autoescape=select_autoescape(default=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters["number"] = number
    env.filters["short"] = _short
    env.globals["with_ends"], env.globals["sampled_words"] = with_ends, sampled_words
    env.globals["seen_words"] = seen_words
    env.filters["breakable"] = _breakable
    return env


def _number_or_none(x: float | None) -> float | None:
    return None if pd.isna(x) else x


def _short(x: float | None) -> str:
    """Three digits, one of what is small; what is zero but for rounding is 0."""
    if x is None:
        return "—"
    if abs(x) < 5e-10:
        return "0"
    return f"{x:.3g}" if abs(x) >= 1e-3 else f"{x:.0e}"


def _breakable(name: str) -> Markup:
    """A name that may go on in the next line after an underscore or a dot, and before a parenthesis."""
    return Markup(re.sub(r"[_.:]|(?=\()", r"\g<0><wbr>", str(escape(name))))


# -- failures


@dataclass(frozen=True)
class Part:
    """A paragraph of a failure message: its first line, and what it says by term."""

    headline: str
    rows: Sequence[tuple[str, str]]


def _parts(message: str) -> list[Part]:
    """Paragraphs of "headline, then `  term      text` lines"; other lines go on with what stands before them."""
    parts = []
    for paragraph in message.split("\n\n"):
        first, *lines = paragraph.split("\n")
        rows: list[tuple[str, str]] = []
        for line in lines:
            term = re.fullmatch(r"  (?=\S)(.{9}) (.+)", line)
            if term:
                rows.append((term[1].strip(), term[2]))
            elif rows:
                rows[-1] = (rows[-1][0], f"{rows[-1][1]} {line.strip()}")
            else:
                first += f" {line.strip()}"
        parts.append(Part(first, rows))
    return parts


def _checks(report: Report) -> dict[str, dict[str, Any]]:
    """How many verdicts of each status a check gave, of which of them nobody expected it, and what it asks."""
    known = registered_checks()
    counts: dict[str, dict[str, Any]] = {}
    for v in report.verdicts:
        about = first_sentence(known[v.check].page) if v.check in known else "what the suite expects on one problem"
        row = counts.setdefault(v.check, {"PASS": 0, "FAIL": 0, "INCONCLUSIVE": 0, "bad": set(), "about": about})
        row[v.status.value] += 1
        if v.status is not Status.PASS and not v.expected:
            row["bad"].add(v.status.value)
    return counts


# -- figures


def _figures(report: Report, table: pd.DataFrame) -> dict[str, Any]:
    from pgcheck.render import figures as f  # seaborn takes a second to import, and only this page needs it

    several = len(report.estimators) > 1
    bias, variance = f.bias_sheet(report), f.variance_sheet(report) if several else None
    figures = {}
    for name, own in table.groupby("estimator"):
        steps = f.telling_steps(report, str(name))
        figures[name] = {
            "bias": bias.dots(own),
            "pale": not own["asked"].all(),
            "variance": variance and variance.dots(own),
            "steps": [(m, _bars(bars)) for m, bars in steps],
            "wrong": any(b.gap > 1e-9 for _, bars in steps for b in bars),
        }
    overall = f.overview_sheet(report) if several else None
    return {
        "sheets": {sheet.name: sheet for sheet in (bias, variance, overall) if sheet},
        "figures": figures,
        "overview": overall and f.overview_dots(report, overall),
    }


def _bars(bars: Sequence[StepBar]) -> dict[str, Any]:
    """Where the bars of one problem stand: x from 30 to 225 for the range of its numbers, 15 a position."""
    ends = [0.0, *(b.along for b in bars), *(b.truth for b in bars)]
    low, high = min(ends), max(ends)
    unit = 195 / (high - low if high > low else 1.0)

    def bar(value: float) -> tuple[float, float]:
        return round(30 + (min(value, 0.0) - low) * unit, 1), round(abs(value) * unit, 1)

    rows = []
    for i, b in enumerate(bars):
        (x, width), (true_x, true_width) = bar(b.along), bar(b.truth)
        rows.append({"bar": b, "x": x, "width": width, "true_x": true_x, "true_width": true_width, "y": 17 + 15 * i})
    return {"rows": rows, "zero": round(30 - low * unit, 1), "height": 21 + 15 * len(bars)}
