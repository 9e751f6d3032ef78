"""The report as tables: one row for each row of report.json, for CSV files and for figures.

Guarantee: a number in a table is the number of the report to the bit; an empty field is "no such number".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
from pydantic import BaseModel

from pgcheck.runs.report import Report

ROUNDING = 1e-12  # a variance below this part of max(‖∇J‖, √E‖ĝ‖²)² is zero


def frames(report: Report) -> dict[str, pd.DataFrame]:
    """The tables by name; what has a shape of its own (the gradients, the steps) stays out of flat rows."""
    tables = {
        "measurements": measurements(report),
        "steps": steps(report),
        "verdicts": _flat(report.verdicts),
        "problems": _flat(report.problems),
        "estimators": _flat(report.estimators),
        "not_asked": _flat(report.not_asked),
        "cases": _flat(report.cases),
    }
    return {name: table for name, table in tables.items() if len(table)}


def csv(table: pd.DataFrame) -> str:
    """Comma-separated, every float as its shortest exact decimal."""
    return str(table.to_csv(index=False, lineterminator="\n"))


def measurements(report: Report) -> pd.DataFrame:
    """One row a measurement, whether a claim speaks of it, and how its variance compares.

    `times_least` is tr Cov over the least tr Cov of those that are unbiased on the same problem (of all, if none is).
    What is zero but for rounding, an optimal baseline on two arms, is 0 times the least and is nobody's reference.
    """
    table = _flat(report.measurements)
    if table.empty:
        return table
    silent = {(n.estimator, n.problem) for n in report.not_asked}
    table["asked"] = [pair not in silent for pair in zip(table["estimator"], table["problem"], strict=True)]
    variance, size = table["total_variance"].astype(float), table["size"].astype(float)
    variance = variance.mask(variance <= ROUNDING * size**2, 0.0)
    some, problem = variance.where(variance > 0), table["problem"]
    fair = some.where(table["finding"] == "unbiased").groupby(problem).transform("min")
    table["times_least"] = variance / fair.fillna(some.groupby(problem).transform("min"))
    return table


def overview(report: Report) -> pd.DataFrame:
    """One row an estimator, over the pairs that its claims speak of (over all measured ones, if they speak of none).

    Index: estimator, in the order of the report. Columns: the `worst` finding, on how many problems it is `biased` of
    those `asked`, `worst_rel`, and the medians of `off_axis` and `times_least`; empty where there is no such number.
    """
    table = asked(measurements(report))
    names = [e.name for e in report.estimators]
    if table.empty:
        return pd.DataFrame(index=names, columns=["worst", "asked", "biased", "worst_rel", "off_axis", "times_least"])
    order = ("unbiased", "inconclusive", "proportional", "biased")
    table["is_biased"], table["order"] = table["finding"] == "biased", table["finding"].map(order.index)
    made = table.groupby("estimator", sort=False).agg(
        worst=("order", lambda found: order[found.max()]),
        asked=("problem", "size"),
        biased=("is_biased", "sum"),
        worst_rel=("rel", "max"),
        off_axis=("off_axis", "median"),
        times_least=("times_least", "median"),
    )
    return made.reindex(names)


def asked(table: pd.DataFrame) -> pd.DataFrame:
    """The measurements that a claim speaks of; all of an estimator whose claims speak of none."""
    if table.empty:
        return table
    any_of = table["asked"].groupby(table["estimator"]).transform("any")
    return table[table["asked"] | ~any_of].copy()


def steps(report: Report) -> pd.DataFrame:
    """One row for each position of a measurement: along and gap of E ĝ_t, and the truth it is to be compared with."""
    truth = {p.name: p.by_step for p in report.problems}
    return pd.DataFrame(
        [
            {"estimator": m.estimator, "problem": m.problem, "step": t, **s.model_dump(), "truth": truth[m.problem][t]}
            for m in report.measurements
            for t, s in enumerate(m.by_step)
        ]
    )


_FOR_THE_GATE = {"spread", "sampled"}  # of a measurement


def _flat(rows: Sequence[BaseModel]) -> pd.DataFrame:
    return pd.DataFrame([_row(r) for r in rows])


def _row(row: BaseModel) -> dict[str, Any]:
    """Its plain fields; short lists and mappings are joined, lists of lists and of rows left out."""
    out: dict[str, Any] = {}
    for name, value in row.model_dump(mode="json", exclude=_FOR_THE_GATE).items():
        if isinstance(value, dict):
            out[name] = "; ".join(f"{key}={x}" for key, x in value.items())
        elif not isinstance(value, list):
            out[name] = value
        elif all(isinstance(x, (int, str)) for x in value):
            out[name] = "+".join(map(str, value))
    return out
