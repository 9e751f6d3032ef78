"""The verdict matrix and the summary line, as data that every format shows: one cell for each estimator and problem."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pandas as pd

from pgcheck.render.messages import BIAS_CHECKS, number
from pgcheck.runs.report import MeasurementRow, ProblemRow, Report, VerdictRow
from pgcheck.verdicts.verdict import Status

SYMBOL = {"unbiased": "=", "proportional": "∝", "biased": "≠", "none": "·"}
LEGEND = "= E ĝ is ∇J    ∝ E ĝ is κ ∇J    ≠ E ĝ is neither    · not asked    ! contradicts the claim"


@dataclass(frozen=True)
class Cell:
    """What a matrix shows of one pair."""

    symbol: str
    text: str  # the number that says most
    finding: str
    contradicts: bool
    asked: bool
    why: str
    measurement: MeasurementRow | None


@dataclass(frozen=True)
class Column:
    """A problem at all its θ: one column of the matrix."""

    name: str
    members: tuple[str, ...]  # NAME, NAME@1, …
    row: ProblemRow

    @property
    def family(self) -> str:
        """What stands before the slash."""
        return self.name.partition("/")[0]


def columns(report: Report) -> list[Column]:
    """The columns of the matrix, in the order of the report."""
    by_base: dict[str, list[ProblemRow]] = {}
    for p in report.problems:
        by_base.setdefault(p.name.partition("@")[0], []).append(p)
    return [Column(base, tuple(p.name for p in rows), rows[0]) for base, rows in by_base.items()]


_ORDER = ("none", "unbiased", "proportional", "biased")


def matrix(report: Report) -> dict[tuple[str, str], Cell]:
    """The matrix by (estimator, column name): over the θ of a problem, the cell that says most against the estimator."""
    single = cells(report)
    return {
        (e.name, column.name): max(
            (single[e.name, member] for member in column.members),
            key=lambda c: (c.contradicts, _ORDER.index(c.finding)),
        )
        for e in report.estimators
        for column in columns(report)
    }


def cells(report: Report) -> dict[tuple[str, str], Cell]:
    """Every single cell, by (estimator, problem)."""
    measured = {(m.estimator, m.problem): m for m in report.measurements}
    reasons = {(n.estimator, n.problem): n.reason for n in report.not_asked}
    wrong: dict[tuple[str, str], VerdictRow] = {}
    for v in report.failures:
        if v.check in BIAS_CHECKS or v.check == "finite":
            wrong.setdefault((v.estimator, v.problem), v)
    return {
        (e.name, p.name): _cell(measured.get(k), reasons.get(k, ""), wrong.get(k))
        for e in report.estimators
        for p in report.problems
        for k in [(e.name, p.name)]
    }


def _cell(m: MeasurementRow | None, reason: str, wrong: VerdictRow | None) -> Cell:
    if m is None:
        why = wrong.reason if wrong else reason
        text = ("NaN" if wrong.check == "finite" else "too large") if wrong else ""
        return Cell("!" if wrong else SYMBOL["none"], text, "none", wrong is not None, wrong is not None, why, None)
    text = {
        "unbiased": "",
        "proportional": f"×{number(m.scale)}",
        "biased": number(m.rel) if m.rel is not None else "∇J=0",
    }[m.finding]
    return Cell(SYMBOL[m.finding], text, m.finding, wrong is not None, not reason, reason, m)


def summary(report: Report) -> str:
    """One line: how many verdicts, how many of each status."""
    count = report.count()
    parts = [f"{count[s]} {s}" for s in (Status.PASS, Status.FAIL, Status.INCONCLUSIVE)]
    pairs = len(report.measurements)
    return (
        f"{len(report.verdicts)} verdicts: {', '.join(parts)}. {pairs} exact measurements of {len(report.estimators)} "
        f"estimators on {len(report.problems)} problems; {len(report.not_asked)} pairs not asked."
    )


COMPARISON = ("estimator", "found", "rel", "scale", "cosine", "off_axis", "tr Cov", "× least", "MSE", "SNR")


def comparison_rows(table: pd.DataFrame) -> dict[str, list[tuple[str, ...]]]:
    """The rows of `pgcheck.compare` by problem, as text in the order of `COMPARISON`.

    "× least" is the total variance over the least of those that are unbiased (of all, if none is).
    """
    out: dict[str, list[tuple[str, ...]]] = {}
    for problem, rows in table.groupby("problem", sort=False):
        fair = rows[rows["finding"] == "unbiased"]
        least = float((fair if len(fair) else rows)["variance"].min())
        out[str(problem)] = [
            (
                r["estimator"],
                r["finding"],
                *(number(_finite(r[name])) for name in ("rel", "scale", "cosine", "off_axis", "variance")),
                number(r["variance"] / least) if least > 0 else "—",
                number(r["mse"]),
                number(_finite(r["snr"])),
            )
            for r in rows.to_dict("records")
        ]
    return out


def _finite(x: float) -> float | None:
    return x if math.isfinite(x) else None
