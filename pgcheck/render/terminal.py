"""What a terminal shows."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pgcheck.render.tables import LEGEND, cells, summary
from pgcheck.runs.report import Report

_STYLE = {"unbiased": "green", "proportional": "cyan", "biased": "yellow", "none": "dim"}


def print_matrix(report: Report, console: Console) -> None:
    """The verdict matrix: estimators down, problems across by number, their names underneath."""
    matrix = cells(report)
    table = Table(title=f"suite {report.suite}" if report.suite else None, show_lines=False, pad_edge=False, box=None)
    table.add_column("estimator", no_wrap=True)
    for i in range(len(report.problems)):
        table.add_column(str(i + 1), justify="center", no_wrap=True)
    for e in report.estimators:
        row: list[Text | str] = [e.name]
        for p in report.problems:
            cell = matrix[e.name, p.name]
            style = "bold red" if cell.contradicts else _STYLE[cell.finding] if cell.asked else "dim"
            row.append(Text(f"{cell.symbol}{'!' if cell.contradicts and cell.symbol != '!' else ''}", style=style))
        table.add_row(*row)
    console.print(table)
    console.print(Text(LEGEND, style="dim"))
    names = [f"{i + 1} {p.name}" for i, p in enumerate(report.problems)]
    console.print(Text("problems: " + ", ".join(names), style="dim"))
    console.print(summary(report))
