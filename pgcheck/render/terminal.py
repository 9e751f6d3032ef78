"""What a terminal shows."""

from __future__ import annotations

from itertools import groupby

import pandas as pd
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pgcheck.render.tables import (
    COMPARISON,
    Cell,
    Column,
    case_message,
    case_rows,
    columns,
    comparison_rows,
    legend,
    matrix,
    summary,
)
from pgcheck.runs.report import Report

_STYLE = {"unbiased": "green", "proportional": "cyan", "biased": "yellow", "inconclusive": "magenta", "none": "dim"}
_ROOMY = 92  # from here on, families are headed by their whole names
_NARROW = 120  # below this many columns a comparison leaves out the last two of its numbers that others imply


def stdout_console() -> Console:
    """A console on stdout as wide as the terminal; in a pipe nothing is cut."""
    console = Console()
    return console if console.is_terminal else Console(width=200)


def _span(name: str, group: list[Column], console: Console) -> int:
    """Columns a family takes: its whole name where there is room, else a symbol a problem."""
    return max(len(name), len(group)) if console.width >= _ROOMY else len(group)


def print_matrix(report: Report, console: Console) -> None:
    """The verdict matrix, if anything was measured, then the cases, if there are any, and the summary."""
    if report.estimators or not report.cases:
        _print_matrix(report, console)
    if report.cases:
        _print_cases(report, console)
    console.print(summary(report))


def _print_matrix(report: Report, console: Console) -> None:
    """An estimator a line, a symbol for each problem, grouped by family."""
    shown = matrix(report)
    families = [(name, list(group)) for name, group in groupby(columns(report), key=lambda c: c.family)]
    width = max((len(e.name) for e in report.estimators), default=0)
    head = Text(" " * (width + 1))
    for name, group in families:
        head.append(f" {name:<{len(group)}}"[: 1 + _span(name, group, console)], style="dim")
    console.print(head, no_wrap=True, crop=False, overflow="ignore")
    for e in report.estimators:
        line = Text(f"{e.name:<{width + 1}}")
        for name, group in families:
            line.append(" ")
            for column in group:
                cell = shown[e.name, column.name]
                line.append("!" if cell.contradicts else cell.symbol, style=_style(cell))
            line.append(" " * (_span(name, group, console) - len(group)))
        console.print(line, no_wrap=True, crop=False, overflow="ignore")
    console.print()
    console.print(Text(legend(report), style="dim"))
    for name, group in families:
        short = [column.name.partition("/")[2] for column in group]
        console.print(Text(f"{name}: {', '.join(short)}", style="dim"))
    console.print()


def _print_cases(report: Report, console: Console) -> None:
    """A sentence a line: what is held of it, the number that decides it, and when the sentence would hold."""
    table = Table(box=None, pad_edge=False)
    for name in ("case", "it is", "number", "holds if", ""):
        table.add_column(name, justify="right" if name == "number" else "left", no_wrap=True)
    for c in case_rows(report):
        held = Text(c.truth, style="green" if c.truth == "right" else "yellow")
        status = Text(c.status, style="bold red" if c.contradicts else "dim")
        table.add_row(Text(c.name), held, c.number, Text(c.relation), status)
    console.print(table)
    console.print()
    for row in report.failed_cases:
        console.print(Text(case_message(row)))
        console.print()


def _style(cell: Cell) -> str:
    if cell.contradicts:
        return "bold red"
    return _STYLE[cell.finding] if cell.asked else "dim"


def print_comparison(table: pd.DataFrame, console: Console) -> None:
    """One table for each problem."""
    hidden = {"cosine", "MSE"} if console.width < _NARROW else set()
    for problem, rows in comparison_rows(table).items():
        drawn = table[table["problem"] == problem]["batches"].dropna()
        how = f"{int(drawn.max()):,} batches drawn, with 95% intervals" if len(drawn) else "exact"
        shown = Table(title=f"{problem} ({how})", title_justify="left", box=None, pad_edge=False)
        for i, name in enumerate(COMPARISON):
            if name not in hidden:
                shown.add_column(name, justify="left" if i < 2 else "right", no_wrap=True)
        for row in rows:
            styled: list[str | Text] = [row[0], Text(row[1], style=_STYLE[row[1]]), *row[2:]]
            shown.add_row(*(x for name, x in zip(COMPARISON, styled, strict=True) if name not in hidden))
        console.print(shown)
