"""report.md: the matrix, the failures, the numbers."""

from __future__ import annotations

from pgcheck.render.messages import failure_message, number
from pgcheck.render.tables import LEGEND, cells, summary
from pgcheck.runs.report import Report


def markdown(report: Report) -> str:
    """The report as GitHub-flavoured Markdown."""
    matrix = cells(report)
    lines = [f"# pgcheck: {report.suite or 'report'}", "", summary(report), ""]
    for name in dict.fromkeys(v.estimator for v in report.failures):
        lines += ["```text", failure_message(report, name), "```", ""]
    lines += ["## Verdict matrix", "", LEGEND.replace("    ", " · "), ""]
    lines.append("| estimator | " + " | ".join(str(i + 1) for i in range(len(report.problems))) + " |")
    lines.append("|---|" + ":-:|" * len(report.problems))
    for e in report.estimators:
        row = []
        for p in report.problems:
            cell = matrix[e.name, p.name]
            row.append(f"**{cell.symbol}!**" if cell.contradicts else cell.symbol)
        lines.append(f"| `{e.name}` | " + " | ".join(row) + " |")
    lines += ["", "## Problems", "", "| # | id | N | K | B | γ | ‖∇J‖ | about |", "|--:|---|--:|--:|--:|--:|--:|---|"]
    for i, p in enumerate(report.problems):
        lines.append(
            f"| {i + 1} | `{p.name}` | {p.rollouts} | {p.contexts} | {p.rows} | {p.discount:g} | {number(p.gradient_norm)} "
            f"| {p.about} |"
        )
    lines += ["", "## Numbers", ""]
    for e in report.estimators:
        claims = "; ".join(_claim_words(c.kind, c.conditions, c.reason) for c in e.claims)
        lines += [f"### `{e.name}`", "", e.about, "", f"ĝ = {e.formula}", "", f"Claim: {claims}.", ""]
        lines += ["| problem | finding | rel | scale | cosine | off_axis | tr Cov | MSE | SNR |", "|---|---|--:|--:|--:|--:|--:|--:|--:|"]  # fmt: skip  # noqa: E501
        for m in report.measurements:
            if m.estimator == e.name:
                values = (m.rel, m.scale, m.cosine, m.off_axis, m.total_variance, m.mse, m.snr)
                lines.append(f"| `{m.problem}` | {m.finding} | " + " | ".join(number(x) for x in values) + " |")
        lines.append("")
    return "\n".join(lines)


def _claim_words(kind: str, conditions: list[str], reason: str) -> str:
    under = f" ({', '.join(conditions)})" if conditions else ""
    because = f": {reason}" if reason else ""
    return f"{kind}{under}{because}"
