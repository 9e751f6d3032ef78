"""report.md: the matrix, the failures, the numbers."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from pgcheck.render.messages import count, failure_messages, number, sampled_words, seen_words, with_ends
from pgcheck.render.tables import COMPARISON, case_message, case_rows, columns, comparison_rows, legend, matrix, summary
from pgcheck.runs.report import Report, VerdictRow


def markdown(report: Report, messages: Mapping[str, str] | None = None) -> str:
    """The report as GitHub-flavoured Markdown."""
    lines = [f"# pgcheck: {report.suite or 'report'}", "", summary(report), ""]
    for message in (*failure_messages(report, messages).values(), *map(case_message, report.failed_cases)):
        lines += ["```text", message, "```", ""]
    if report.cases:
        lines += _cases(report)
    if report.estimators or not report.cases:
        lines += _matrix(report)
    return "\n".join(lines)


def _cases(report: Report) -> list[str]:
    lines = ["## Cases", "", "Each sentence, what is held of it, and the exact number that decides it.", ""]
    lines += ["| sentence | it is | number | it would hold if | because |", "|---|---|--:|---|---|"]
    for c in case_rows(report):
        held = f"**{c.truth}, {c.status}!**" if c.contradicts else c.truth
        number_of = f"{c.number}<br>`{c.of}`" + (f"<br>{c.beside}" if c.beside else "")
        says = f"{c.says}<br>`{c.name}` ({c.source})"
        lines.append("| " + " | ".join(_cell(x) for x in (says, held, number_of, c.relation, c.because)) + " |")
    return [*lines, ""]


def _cell(text: str) -> str:
    """A bar would end the cell."""
    return text.replace("|", "\\|")


def _matrix(report: Report) -> list[str]:
    shown, across = matrix(report), columns(report)
    lines = ["## Verdict matrix", "", legend(report).replace("    ", "; "), ""]
    lines.append("| estimator | " + " | ".join(str(i + 1) for i in range(len(across))) + " |")
    lines.append("|---|" + ":-:|" * len(across))
    for e in report.estimators:
        row = [shown[e.name, column.name] for column in across]
        marks = [f"**{c.symbol}!**" if c.contradicts else c.symbol for c in row]
        lines.append(f"| `{e.name}` | " + " | ".join(marks) + " |")
    lines += ["", "## Problems", "", "| # | id | N | K | B | γ | ‖∇J‖ | about |", "|--:|---|--:|--:|--:|--:|--:|---|"]
    for i, column in enumerate(across):
        p = column.row
        names = ", ".join(f"`{name}`" for name in column.members)
        lines.append(
            f"| {i + 1} | {names} | {count(p.rollouts)} | {'—' if p.contexts is None else p.contexts} | {p.rows}"
            f" | {p.discount:g} | {number(p.gradient_norm)} | {p.about} |"
        )
    lines += ["", "## Numbers", ""]
    for e in report.estimators:
        claims = "; ".join(_claim_words(c.kind, c.conditions, c.reason) for c in e.claims)
        lines += [f"### `{e.name}`", "", e.about, "", f"ĝ = {e.formula}", "", f"Claim: {claims}.", ""]
        lines += ["| problem | finding | rel | scale | cosine | off_axis | tr Cov | MSE | SNR |"]
        lines += ["|---|---|--:|--:|--:|--:|--:|--:|--:|"]
        for m in report.measurements:
            if m.estimator == e.name:
                lines.append(f"| `{m.problem}` | {m.finding} | " + " | ".join(with_ends(m, x) for x in _NUMBERS) + " |")
        lines += [f"- {_sampled_line(v, report)}" for v in report.verdicts if v.estimator == e.name and v.sample]
        lines.append("")
    return lines


_NUMBERS = ("rel", "scale", "cosine", "off_axis", "total_variance", "mse", "snr")


def _sampled_line(v: VerdictRow, report: Report) -> str:
    where = f" on `{v.problem}`" if v.problem else ""
    seen = seen_words(report.cell(v.estimator, v.problem or v.reason))
    said = f"{sampled_words(v)}{'; ' if seen else ''}{seen}"
    return f"{v.check}{where}: {said}{' (as the suite expects)' if v.expected else ''}."


def _claim_words(kind: str, conditions: list[str], reason: str) -> str:
    under = f" ({', '.join(conditions)})" if conditions else ""
    because = f": {reason}" if reason else ""
    return f"{kind}{under}{because}"


def comparison_markdown(table: pd.DataFrame) -> str:
    """The table of `pgcheck.compare` as Markdown."""
    lines = []
    for problem, rows in comparison_rows(table).items():
        lines += [
            f"## {problem}",
            "",
            "| " + " | ".join(COMPARISON) + " |",
            "|---|---|" + "--:|" * (len(COMPARISON) - 2),
        ]
        lines += ["| " + " | ".join(row) + " |" for row in rows]
        lines.append("")
    return "\n".join(lines)
