"""The verdict matrix and the summary line, as data that every format shows: one cell for each estimator and problem."""

from __future__ import annotations

from dataclasses import dataclass

from pgcheck.render.messages import BIAS_CHECKS, number
from pgcheck.runs.report import MeasurementRow, Report, VerdictRow
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


def cells(report: Report) -> dict[tuple[str, str], Cell]:
    """The whole matrix, by (estimator, problem)."""
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
