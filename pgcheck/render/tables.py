"""The verdict matrix and the summary line, as data that every format shows: one cell for each estimator and problem."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from pgcheck.render.messages import BIAS_CHECKS, number
from pgcheck.runs.report import CaseRow, MeasurementRow, ProblemRow, Report, VerdictRow
from pgcheck.verdicts.verdict import Status

SYMBOL = {"unbiased": "=", "inconclusive": "?", "proportional": "∝", "biased": "≠", "none": "·"}
LEGEND = "= E ĝ is ∇J    ∝ E ĝ is κ ∇J    ≠ E ĝ is neither    · not asked    ! contradicts the claim"
SAMPLED_LEGEND = "    ? the sample does not decide"


def legend(report: Report) -> str:
    """What the symbols of the matrix mean."""
    return LEGEND + (SAMPLED_LEGEND if report.sampled else "")


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


_ORDER = ("none", "unbiased", "inconclusive", "proportional", "biased")


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
        "inconclusive": "∇J=0" if m.rel is None else f"{number(m.rel)}, at most {number(m.high.get('rel'))}",
    }[m.finding]
    return Cell(SYMBOL[m.finding], text, m.finding, wrong is not None, not reason, reason, m)


def summary(report: Report) -> str:
    """One line: how many verdicts and cases, how many of each status."""
    lines = []
    if report.verdicts or not report.cases:
        exact, expected = len(report.measurements) - report.sampled, sum(v.expected for v in report.verdicts)
        known = f" ({expected} of them as the suite expects)" if expected else ""
        made = [f"{n} {how}" for n, how in ((exact, "exact"), (report.sampled, "sampled")) if n] or ["0 exact"]
        lines.append(
            f"{len(report.verdicts)} verdicts: {_by_status(report.count())}{known}. {' and '.join(made)} measurements of"
            f" {len(report.estimators)} estimators on {len(report.problems)} problems; {len(report.not_asked)} pairs not"
            " asked."
        )
    if report.cases:
        lines.append(f"{len(report.cases)} cases: {_by_status(Counter(c.status for c in report.cases))}.")
    return " ".join(lines)


def _by_status(count: Counter[Status]) -> str:
    return ", ".join(f"{count[s]} {s}" for s in (Status.PASS, Status.FAIL, Status.INCONCLUSIVE))


@dataclass(frozen=True)
class CaseText:
    """A case in words, for a line of a table."""

    name: str
    says: str
    source: str
    truth: str
    number: str
    of: str  # what the number is of, as a call
    relation: str
    status: str
    contradicts: bool
    because: str
    beside: str  # numbers that belong next to it, and of how many it is the worst


def case_rows(report: Report) -> list[CaseText]:
    """The cases of the report, in its order."""
    return [_case_text(c) for c in report.cases]


def _case_text(c: CaseRow) -> CaseText:
    words = [x if not _is_number(x) and name != "group_size" else f"{name}={x}" for name, x in c.subject.items()]
    among = [f"the worst of {c.asked} asked"] if c.asked > 1 and c.value is not None else []
    return CaseText(
        name=c.name,
        says=c.says,
        source=c.source,
        truth=c.truth,
        number=number(c.value),
        of=f"{c.quantity}({', '.join(words)})",
        relation=c.relation,
        status=c.status.value,
        contradicts=c.status is not Status.PASS,
        because=c.because,
        beside=", ".join([*(f"{name} {number(x)}" for name, x in c.beside.items()), *among]),
    )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return text.startswith("[")
    return True


def case_message(c: CaseRow) -> str:
    """Everything a reader needs about a case that did not pass."""
    text = _case_text(c)
    rows = [
        ("says", c.says),
        ("held", f"{c.truth}: {c.because}"),
        ("number", f"{text.of} = {number(c.value)}" + (f" ({text.beside})" if text.beside else "")),
        ("holds if", c.relation + (f", on all of {c.asked}" if c.asked > 1 else "")),
        ("found", c.reason),
    ]
    return f"case {c.name} is {c.status}.\n" + "\n".join(f"  {name:<9} {x}" for name, x in rows)


COMPARISON = ("estimator", "found", "rel", "scale", "cosine", "off_axis", "tr Cov", "× least", "MSE", "SNR")


def comparison_rows(table: pd.DataFrame) -> dict[str, list[tuple[str, ...]]]:
    """The rows of `pgcheck.compare` by problem, as text in the order of `COMPARISON`.

    "× least" is the total variance over the least of those that are unbiased (of all, if none is); what is below 1e-12 of
    the largest counts as no variance at all.
    """
    out: dict[str, list[tuple[str, ...]]] = {}
    for problem, rows in table.groupby("problem", sort=False):
        some = rows[rows["variance"] > 1e-12 * rows["variance"].max()]
        fair = some[some["finding"] == "unbiased"]
        least = float((fair if len(fair) else some)["variance"].min())  # NaN, where there is none
        out[str(problem)] = [
            (
                r["estimator"],
                r["finding"],
                *(_with_ends(r, name) for name in ("rel", "scale", "cosine", "off_axis", "variance")),
                number(r["variance"] / least) if least > 0 else "—",
                _with_ends(r, "mse"),
                _with_ends(r, "snr"),
            )
            for r in rows.to_dict("records")
        ]
    return out


def _with_ends(row: Mapping[Any, Any], name: str) -> str:
    """A number, and behind it the 95% interval of one that was sampled."""
    value, low, high = (row.get(key, math.nan) for key in (name, f"{name}_low", f"{name}_high"))
    text = number(_finite(value))
    return f"{text} [{low:.3g}, {high:.3g}]" if math.isfinite(low) and math.isfinite(high) and low < high else text


def _finite(x: float) -> float | None:
    return x if math.isfinite(x) else None
