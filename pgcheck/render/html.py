"""report.html: one file, nothing fetched, light and dark."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from pgcheck.render.messages import failure_messages, number
from pgcheck.render.tables import cells, columns, comparison_rows, matrix, summary
from pgcheck.runs.report import Report


def html(report: Report, messages: Mapping[str, str] | None = None) -> str:
    """The report as a self-contained page: matrix first, the numbers of a cell one click away."""
    across = columns(report)
    families = [(name, len(list(group))) for name, group in groupby(column.family for column in across)]
    checks: dict[str, dict[str, Any]] = {}
    for v in report.verdicts:
        row = checks.setdefault(v.check, {"PASS": 0, "FAIL": 0, "INCONCLUSIVE": 0})
        row[v.status.value] += 1
    return (
        _environment()
        .get_template("report.html")
        .render(
            report=report,
            cells=cells(report),
            matrix=matrix(report),
            columns=across,
            first={p.name: i + 1 for i, p in enumerate(report.problems)},
            summary=summary(report),
            families=families,
            failures=failure_messages(report, messages),
            measurements={e.name: [m for m in report.measurements if m.estimator == e.name] for e in report.estimators},
            checks=checks,
        )
    )


def _environment() -> Environment:
    env = Environment(
        loader=PackageLoader("pgcheck.render"),
        autoescape=select_autoescape(default=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters["number"] = number
    return env


def comparison_html(table: pd.DataFrame) -> str:
    """The table of `pgcheck.compare` as a self-contained page."""
    return _environment().get_template("compare.html").render(rows=comparison_rows(table))
