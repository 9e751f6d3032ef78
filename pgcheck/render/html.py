"""report.html: one file, nothing fetched, light and dark."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from pgcheck.render.messages import failure_message, number
from pgcheck.render.tables import cells, summary
from pgcheck.runs.report import Report


def html(report: Report) -> str:
    """The report as a self-contained page: matrix first, the numbers of a cell one click away."""
    env = Environment(
        loader=PackageLoader("pgcheck.render"),
        autoescape=select_autoescape(default=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters["number"] = number
    failing = dict.fromkeys(v.estimator for v in report.failures)
    families = [(name, len(list(ps))) for name, ps in groupby(p.name.partition("/")[0] for p in report.problems)]
    checks: dict[str, dict[str, Any]] = {}
    for v in report.verdicts:
        row = checks.setdefault(v.check, {"PASS": 0, "FAIL": 0, "INCONCLUSIVE": 0})
        row[v.status.value] += 1
    return env.get_template("report.html").render(
        report=report,
        cells=cells(report),
        summary=summary(report),
        families=families,
        failures={name: failure_message(report, name) for name in failing},
        measurements={e.name: [m for m in report.measurements if m.estimator == e.name] for e in report.estimators},
        checks=checks,
    )
