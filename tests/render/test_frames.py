"""Tables hold the report's numbers to the bit; what is derived in them is derived again by loops."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path
from statistics import median

import pandas as pd
import pytest

from pgcheck.render.files import write_report
from pgcheck.render.frames import csv as as_csv
from pgcheck.render.frames import frames, measurements, overview
from pgcheck.runs.report import MeasurementRow
from tests.render.pages import case_report, lone_report, rich_report


def read(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def number(field: str) -> float | None:
    return float(field) if field else None


def test_csv_files_round_trip(tmp_path: Path) -> None:
    """Read by the standard library, every float is the one of report.json."""
    report = rich_report()
    write_report(report, tmp_path)
    rows = read((tmp_path / "measurements.csv").read_text())
    assert len(rows) == len(report.measurements) > 0
    for row, m in zip(rows, report.measurements, strict=True):
        assert (row["estimator"], row["problem"], row["finding"]) == (m.estimator, m.problem, m.finding)
        for name in ("rel", "scale", "cosine", "off_axis", "bias", "size", "total_variance", "mse", "snr"):
            assert number(row[name]) == getattr(m, name)
    for row, v in zip(read((tmp_path / "verdicts.csv").read_text()), report.verdicts, strict=True):
        assert (row["check"], row["status"], number(row["measured"])) == (v.check, v.status.value, v.measured)
    for row, p in zip(read((tmp_path / "problems.csv").read_text()), report.problems, strict=True):
        assert (row["name"], row["digest"], row["group_sizes"]) == (p.name, p.digest, "+".join(map(str, p.group_sizes)))
    steps = iter(read((tmp_path / "steps.csv").read_text()))
    truth = {p.name: p.by_step for p in report.problems}
    for m in report.measurements:
        for t, s in enumerate(m.by_step):
            row = next(steps)
            assert (row["estimator"], row["problem"], row["step"]) == (m.estimator, m.problem, str(t))
            assert [number(row[x]) for x in ("along", "gap", "truth")] == [s.along, s.gap, truth[m.problem][t]]


def test_every_table_has_its_file(tmp_path: Path) -> None:
    """Empty tables have none."""
    written = {path.name for path in write_report(lone_report(), tmp_path)}
    assert written == {path.name for path in tmp_path.iterdir()}
    assert {"measurements.csv", "verdicts.csv", "problems.csv", "estimators.csv"} <= written
    assert "not_asked.csv" not in written


def test_times_least() -> None:
    """Over the least variance among the unbiased of the problem; rounding is no variance."""

    def real(m: MeasurementRow) -> float:
        assert m.total_variance is not None
        assert m.size is not None
        return m.total_variance if m.total_variance > 1e-12 * m.size**2 else 0.0

    report = rich_report()
    table = measurements(report)
    seen = {}
    for m, got in zip(report.measurements, table["times_least"], strict=True):
        here = [x for x in report.measurements if x.problem == m.problem]
        fair = [real(x) for x in here if x.finding == "unbiased" and real(x) > 0]
        least = min(fair or [real(x) for x in here if real(x) > 0])
        assert got == pytest.approx(real(m) / least, rel=1e-15)
        seen[m.estimator, m.problem] = got
    # π(a₁) = .9 with rewards 1 and 0: the optimal constant leaves no variance at all
    assert seen["baselined(optimal_constant)", "bandit/two-arm"] == 0
    assert all(math.isfinite(x) for x in seen.values())


def test_overview() -> None:
    """Over the pairs a claim speaks of, in the order of the report; nothing of an estimator that was never measured."""
    report = rich_report()
    made = overview(report)
    assert list(made.index) == [e.name for e in report.estimators]
    silent = {(n.estimator, n.problem) for n in report.not_asked}
    own = [m for m in report.measurements if m.estimator == "reinforce" and ("reinforce", m.problem) not in silent]
    assert ("reinforce", "off-policy/dialogue-stale") in silent
    row = made.loc["reinforce"]
    assert (row["worst"], row["asked"], row["biased"]) == ("unbiased", len(own), 0)
    assert row["worst_rel"] == max(m.rel for m in own if m.rel is not None)
    assert row["off_axis"] == median(m.off_axis for m in own if m.off_axis is not None)
    assert made.loc["grpo", "worst"] == "biased"
    assert pd.isna(made.loc["nan", "worst"])


def test_cases_have_a_table() -> None:
    """Arguments and numbers beside as name=value."""
    good, bad = read(as_csv(frames(case_report())["cases"]))
    assert (good["name"], good["subject"], good["beside"]) == (
        "good", "estimator=batch_mean; problem=mdp/two-state", "bias=0.25",
    )  # fmt: skip
    assert (number(good["value"]), number(bad["value"]), bad["status"]) == (0.75, None, "FAIL")


def test_a_name_in_a_table_is_one_field() -> None:
    """Commas, quotes and line breaks of a name do not break a row."""
    report = rich_report()
    assert {row["estimator"] for row in read(as_csv(frames(report)["measurements"]))} == {
        m.estimator for m in report.measurements
    }
