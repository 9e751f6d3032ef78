"""What continuous integration reads: JUnit XML, SARIF 2.1.0, GitHub annotations and step summaries.

Guarantee: one outcome is one test case, one result, one annotation; what is inconclusive is a failure of its own type, in
each of them; text is escaped as the reader of each undoes it.
"""

from __future__ import annotations

import json
import os
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Literal
from urllib.parse import quote
from xml.etree import ElementTree as ET

from pgcheck.errors import UsageError
from pgcheck.estimators.base import Estimator
from pgcheck.estimators.lookup import source_of
from pgcheck.render.gate import headline, message, subject
from pgcheck.render.messages import first_sentence, number
from pgcheck.runs.baseline import CaseEntry, Entry, SampledEntry
from pgcheck.runs.gate import Difference, ExpectedFailures, Gate, Test, against_claims
from pgcheck.runs.report import Report
from pgcheck.verdicts.checks import registered_checks
from pgcheck.verdicts.verdict import Status

Place = tuple[str, int]  # file, relative to the working directory where it lies below it, with slashes; line from 1
State = Literal["passed", "failed", "inconclusive"]

GATE_RULES = {
    "changed": "The estimator's mean or covariance, or the number of a case, is not that of the baseline.",
    "unchanged": "The estimator's mean and covariance, or the number of a case, are those of the baseline.",
    "problem": "The problem is not that of the baseline.",
    "claims": "The estimator's claims are not those of the baseline.",
    "checks": "Checks were asked on other problems than in the baseline.",
    "missing": "The run has an entry that the baseline has not.",
    "orphaned": "The baseline has an entry that the run has not.",
    "stale": "A check that is expected to fail does not.",
    "number": "The estimator's mean or variance is no number.",
    "case": "A sentence is contradicted by the number that decides it.",
    "nothing_checked": "Nothing was checked.",
}


@dataclass(frozen=True)
class Outcome:
    """One verdict as CI shows it."""

    subject: str  # grpo-lm/binary-reward
    rule: str  # a check, or one of GATE_RULES
    state: State
    line: str = ""
    text: str = ""
    place: Place | None = None
    properties: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.subject}-{self.rule}"


def places_of(estimators: Sequence[Estimator], root: Path) -> dict[str, Place]:
    """Where each estimator that is the user's begins."""
    found = {}
    for e in estimators:
        source = source_of(e)
        if source is not None:
            file, line = source[0].resolve(), source[1]
            shown = file.relative_to(root.resolve()) if file.is_relative_to(root.resolve()) else file
            found[e.name] = shown.as_posix(), line
    return found


def engines_of(report: Report) -> defaultdict[tuple[str, str], dict[str, str]]:
    """Engine and seed of each (estimator, problem); under problem "", sampled if one of its problems is."""
    found: defaultdict[tuple[str, str], dict[str, str]] = defaultdict(lambda: {"engine": "exact"})
    for m in report.measurements:
        if m.batches is not None:
            for problem in (m.problem, ""):
                found[m.estimator, problem] = {"engine": "monte_carlo", "seed": str(m.seed)}
    return found


def outcomes_of_run(
    report: Report, messages: Mapping[str, str], places: Mapping[str, Place], expected: ExpectedFailures
) -> list[Outcome]:
    """Every verdict and case of a report."""
    wrong = {(d.estimator, d.problem, d.check) for d in against_claims(report, expected)}
    engines = engines_of(report)
    out = []
    for v in report.verdicts:
        bad = (v.estimator, v.problem, v.check) in wrong
        state: State = "passed" if not bad else "failed" if v.status is Status.FAIL else "inconclusive"
        name = f"{v.estimator}-{v.problem}" if v.problem else v.estimator
        line = f"{v.estimator}: {v.check} is {v.status}" + (f" on {v.problem}" if v.problem else "")
        numbers = {"measured": number(v.measured), "allowed": number(v.allowed), **engines[v.estimator, v.problem]}
        text = messages.get(v.estimator, line) if bad else ""
        out.append(Outcome(name, v.check, state, line, text, places.get(v.estimator), numbers))
    for c in report.cases:
        state = "passed" if c.status is Status.PASS else "failed" if c.status is Status.FAIL else "inconclusive"
        out.append(Outcome(c.name, "case", state, f"{c.name}: {c.status}", c.reason or c.says))
    stale = [d for d in against_claims(report, expected) if d.kind == "stale"]
    out += [_of_difference(d, "", {}, places) for d in stale]
    return out or [Outcome(report.suite, "nothing_checked", "failed", "nothing was checked", "nothing was checked")]


def outcomes_of_gate(
    gate: Gate, command: str, messages: Mapping[str, str], places: Mapping[str, Place]
) -> list[Outcome]:
    """Every entry that agrees, and every difference."""
    out = []
    for x in gate.same:
        if isinstance(x, CaseEntry):
            out.append(Outcome(x.case, "unchanged", "passed"))
        elif isinstance(x, Entry):
            found = _drawn(x) | _of_test(gate.tested.get(x.key))
            out.append(Outcome(f"{x.estimator}-{x.problem}", "unchanged", "passed", properties=found))
    out += [_of_difference(d, command, messages, places) for d in gate.differences]
    return out or [Outcome("gate", "nothing_checked", "failed", "nothing was compared", "nothing was compared")]


def _of_difference(d: Difference, command: str, messages: Mapping[str, str], places: Mapping[str, Place]) -> Outcome:
    undecided = d.verdict is not None and d.verdict.status is Status.INCONCLUSIVE
    rule = d.check if d.kind == "verdict" else d.kind
    state: State = "inconclusive" if undecided else "failed"
    text = message(d, command, messages)
    entry = d.after or d.before
    found = (_drawn(entry) if isinstance(entry, Entry) else {}) | _of_test(d.test)
    return Outcome(subject(d), rule, state, headline(d), text, places.get(d.estimator), found)


def _drawn(entry: Entry) -> dict[str, str]:
    if not isinstance(entry, SampledEntry):
        return {"engine": entry.engine}
    return {"engine": entry.engine, "seed": str(entry.seed), "batches": str(entry.batches)}


def _of_test(test: Test | None) -> dict[str, str]:
    return {} if test is None else {"p": f"{test.p:.3g}", "level": f"{test.level:.3g}"}


def junit(outcomes: Sequence[Outcome], suite: str) -> str:
    """JUnit XML: a test case each; an inconclusive one is a failure of type `inconclusive`."""
    bad = [o for o in outcomes if o.state != "passed"]
    counts = {"tests": str(len(outcomes)), "failures": str(len(bad)), "errors": "0"}
    root = ET.Element("testsuites", {"name": "pgcheck", **counts})
    of_suite = ET.SubElement(root, "testsuite", {"name": _xml(suite), **counts, "skipped": "0"})
    for o in outcomes:
        at = {"file": _xml(o.place[0]), "line": str(o.place[1])} if o.place else {}
        case = ET.SubElement(of_suite, "testcase", {"classname": "pgcheck", "name": _xml(o.name), **at})
        if o.properties:
            of_case = ET.SubElement(case, "properties")
            for name, value in o.properties.items():
                ET.SubElement(of_case, "property", {"name": name, "value": _xml(value)})
        if o.state != "passed":
            kind = "inconclusive" if o.state == "inconclusive" else o.rule
            ET.SubElement(case, "failure", {"type": kind, "message": _xml(o.line)}).text = _xml(o.text)
    ET.indent(root, " ")
    return f'<?xml version="1.0" encoding="utf-8"?>\n{ET.tostring(root, encoding="unicode")}\n'


def _xml(text: str) -> str:
    """Without the characters that XML 1.0 cannot hold in any form."""
    return re.sub("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "�", text)


def sarif(outcomes: Sequence[Outcome]) -> str:
    """SARIF 2.1.0: a result for every outcome that is not passed, at the user's function."""
    bad = [o for o in outcomes if o.state != "passed"]
    names = sorted({o.rule for o in bad})
    pages = {name: c.page for name, c in registered_checks().items()} | GATE_RULES
    rules = [{"id": n, "shortDescription": {"text": first_sentence(pages.get(n, n))}} for n in names]
    results = []
    for o in bad:
        result: dict[str, object] = {
            "ruleId": o.rule,
            "ruleIndex": names.index(o.rule),
            "level": "error",
            "message": {"text": o.text or o.line},
            "partialFingerprints": {"pgcheck/v1": o.name},
            "properties": {"state": o.state, **o.properties},
        }
        if o.place:
            where = {"artifactLocation": {"uri": quote(o.place[0])}, "region": {"startLine": o.place[1]}}
            result["locations"] = [{"physicalLocation": where}]
        results.append(result)
    driver = {"name": "pgcheck", "version": metadata.version("pgcheck"), "rules": rules}
    schema = "https://json.schemastore.org/sarif-2.1.0.json"
    made = {"$schema": schema, "version": "2.1.0", "runs": [{"tool": {"driver": driver}, "results": results}]}
    return json.dumps(made, indent=1, ensure_ascii=False) + "\n"


def github(outcomes: Sequence[Outcome]) -> str:
    """`::error` workflow commands, one a line, that point at the user's function."""
    lines = []
    for o in outcomes:
        if o.state != "passed":
            at = {"file": o.place[0], "line": str(o.place[1])} if o.place else {}
            fields = {**at, "title": f"pgcheck: {o.name}" + (" (inconclusive)" if o.state == "inconclusive" else "")}
            shown = ",".join(f"{name}={_property(value)}" for name, value in fields.items())
            lines.append(f"::error {shown}::{_data(o.text or o.line)}\n")
    return "".join(lines)


def _data(text: str) -> str:
    """As @actions/core escapes the data of a command."""
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")


def step_summary(outcomes: Sequence[Outcome], title: str) -> str:
    """Markdown for the page of a workflow run."""
    bad = [o for o in outcomes if o.state != "passed"]
    lines = [f"### pgcheck: {title}", "", f"{len(outcomes) - len(bad)} of {len(outcomes)} as they should be.", ""]
    if bad:
        lines += ["| verdict | | |", "|---|---|---|"]
        lines += [f"| `{_cell(o.name)}` | {o.state} | {_cell(o.line)} |" for o in bad]
        for text in dict.fromkeys(o.text for o in bad if o.text):
            fence = "`" * (max((len(x) for x in re.findall("`+", text)), default=0) + 3)
            lines += ["", f"{fence}text", text, fence]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return re.sub(r"([\\|<>])", r"\\\1", text).replace("\n", " ")


def on_github(environment: Mapping[str, str] = os.environ) -> bool:
    """Inside a GitHub workflow."""
    return environment.get("GITHUB_ACTIONS") == "true"


def tell_github(outcomes: Sequence[Outcome], title: str, environment: Mapping[str, str] = os.environ) -> str:
    """The annotations to print; the summary is appended to $GITHUB_STEP_SUMMARY."""
    where = environment.get("GITHUB_STEP_SUMMARY")
    if where:
        try:
            with open(where, "a", encoding="utf-8") as file:
                file.write(step_summary(outcomes, title))
        except OSError as error:
            raise UsageError(f"GITHUB_STEP_SUMMARY: cannot write {where}: {error.strerror}.") from None
    return github(outcomes)
