"""The gate inside pytest: one item for each verdict, one for each entry of the baseline, and the report of all.

Items of `[tool.pgcheck]` stand under the node `pgcheck`, those of a marked test under that test:

    pgcheck::grpo-dialogue/two-turn-unbiased       the claim on one problem
    pgcheck::grpo-row_order                        a check that looks at single batches
    pgcheck::grpo-dialogue/two-turn-unchanged      the numbers of the baseline; -missing, if it has none
    pgcheck::old-dialogue/two-turn-orphaned        an entry of the baseline that nothing asks for any more
    pgcheck::batch-mean-is-biased-case             a case of the suite, and -unchanged, its number

What there is to judge is known before anything is judged, so that `-k`, `--lf`, JUnit and pytest-xdist see it. An
estimator's batches are enumerated once, when the first of its items runs: workers of pytest-xdist share what one of them
found (`pgcheck.verdict_tasks.Shared`), and send it; the controller writes.

Guarantee: report.json has the same bytes whatever the order of the tests, the number of workers and the seed. A session
that was asked for a gate and judged nothing does not pass. A baseline is written only if every estimator was judged, and
nothing failed for another reason than change.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pgcheck.api import as_claim, as_problems
from pgcheck.engines.choice import checked_engine
from pgcheck.engines.exact import DEFAULT_BUDGET
from pgcheck.engines.monte_carlo import Sampling
from pgcheck.errors import CheckFailed, PgcheckError, UsageError
from pgcheck.estimators.base import Claim
from pgcheck.estimators.lookup import AnyEstimator, all_imported, as_estimators
from pgcheck.problem import Problem
from pgcheck.render import gate as words
from pgcheck.render.ci import places_of
from pgcheck.render.files import write_all
from pgcheck.render.provenance import provenance, provenance_path
from pgcheck.runs.baseline import EMPTY, Baseline, ExactEntry, read_baseline
from pgcheck.runs.config import load_config, plan
from pgcheck.runs.gate import Difference, Gate, compare, sampled_entries
from pgcheck.runs.report import Report, merged
from pgcheck.runs.runner import Expectation, wanted_checks
from pgcheck.testing import EstimatorCheck, How, Judge, Share, expected_failures
from pgcheck.verdict_tasks import FINDING, CaseTask, Shared, Task, known_rows
from pgcheck.verdicts.checks import find_check
from pgcheck.verdicts.verdict import RTOL, Status

NODE = "pgcheck"
COMPARED = ("unchanged", "missing", "orphaned")


class InconclusiveWarning(UserWarning):
    """A verdict that could not be reached, under `--pgcheck-inconclusive=warn`."""


@dataclass
class Verdict:
    """What one item asks."""

    session: Session
    task: Task | CaseTask | None  # None: nothing asks for this entry any more
    of_case: bool
    estimator: str  # or the name of a case
    problem: str
    rule: str  # a check, "case", or one of COMPARED
    node: pytest.Item | None = None
    checked: bool = False

    @property
    def id(self) -> str:
        return "-".join(x for x in (self.estimator, self.problem, self.rule) if x)

    @property
    def marks(self) -> list[pytest.MarkDecorator]:
        reason = self.task.expected.get(self.rule) if self.task else None
        return [pytest.mark.xfail(reason=reason, strict=True, raises=CheckFailed)] if reason else []

    def bind(self, node: pytest.Item) -> Verdict:
        """The same question, asked by `node`."""
        return replace(self, node=node)

    def check(self) -> None:
        """Return if it is as it should be; skip where the check is not asked of this estimator.

        Raises:
            BiasError, CheckFailed: it is not.
            UsageError: it is expected to fail, but not asked; or the estimator breaks its contract.
        """
        __tracebackhide__ = True
        self.checked = True
        if self.rule in COMPARED or self.task is None:
            self._compare()
        elif isinstance(self.task, CaseTask):
            self._decide(self.task)
        else:
            self._judge(self.task)

    def _record(self, measured: float | None, allowed: float | None, **more: float) -> None:
        if self.node is not None:
            seed, engine = self.session.engine_of(self)
            numbers = {"measured": measured, "allowed": allowed, "seed": seed, "engine": engine, **more}
            self.node.user_properties += [(name, "none" if x is None else x) for name, x in numbers.items()]

    def _decide(self, task: CaseTask) -> None:
        __tracebackhide__ = True
        (row,) = task.report.cases
        self._record(row.value, None)
        if row.status is Status.INCONCLUSIVE and self.session.lenient:
            warnings.warn(InconclusiveWarning(f"{self.id} is inconclusive: {row.reason}"), stacklevel=2)
        elif row.status is not Status.PASS:
            raise CheckFailed(f"{row.name} is {row.status}: {row.reason}\n  says      {row.says}", report=task.report)

    def _judge(self, task: Task) -> None:
        __tracebackhide__ = True
        own = [v for v in task.report.verdicts if v.check == self.rule and self.problem in ("", v.problem)]
        worst = max(own, key=lambda v: (v.status is not Status.PASS, v.measured or 0.0), default=None)
        if worst:
            self._record(worst.measured, worst.allowed)
        against = {v.status for v in own if not v.expected} - {Status.PASS}
        if self.session.lenient and worst and against == {Status.INCONCLUSIVE}:
            warnings.warn(InconclusiveWarning(f"{self.id} is inconclusive: {worst.reason}"), stacklevel=2)
            return
        if self.rule == FINDING:
            if worst is None or worst.status is not Status.PASS:
                raise CheckFailed(f"{self.id}: {worst.reason if worst else 'not judged'}", report=task.report)
            return
        expected = self.rule in task.expected
        EstimatorCheck(find_check(self.rule), task.judge, expected, self.problem)(task.given)

    def _compare(self) -> None:
        __tracebackhide__ = True
        gate = self.session.compared(self)
        found = next((d for d in gate.differences if d.kind not in ("verdict", "stale")), None)
        test = found.test if found else next(iter(gate.tested.values()), None)
        told = {} if test is None else {"p": test.p, "level": test.level}
        self._record(*_moved(found), **told)
        if found is not None and not (found.is_change and self.session.update):
            raise CheckFailed(words.message(found, self.session.accept))


def _moved(found: Difference | None) -> tuple[float | None, float | None]:
    """How far an exact E ĝ is from that of the baseline, and how far it may be."""
    if found is None or not (isinstance(found.before, ExactEntry) and isinstance(found.after, ExactEntry)):
        return None, None
    a, b = found.before.vector, found.after.vector
    return float(np.linalg.norm(a - b)) if a.shape == b.shape else math.inf, RTOL * found.after.size


class VerdictItem(pytest.Item):
    """An item of `[tool.pgcheck]`, or one that an orphaned entry makes."""

    def __init__(self, *, verdict: Verdict, **rest: Any) -> None:
        super().__init__(**rest)
        self.verdict = verdict
        for mark in verdict.marks:
            self.add_marker(mark)

    def runtest(self) -> None:
        self.verdict.bind(self).check()

    def repr_failure(self, excinfo: Any, style: Any = None) -> Any:
        """The message says it all; a traceback is for what is no verdict."""
        if isinstance(excinfo.value, PgcheckError):
            return f"{type(excinfo.value).__name__}: {excinfo.value}"
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Path, int | None, str]:
        place = self.verdict.session.place_of(self.verdict)
        return (self.path, None, self.name) if place is None else (Path(place[0]), place[1] - 1, self.name)


class _Node(pytest.Collector):
    def collect(self) -> list[pytest.Item]:
        return []


class Session:
    """What a pytest session asks for, and what came of it. Registered as a plugin; on a worker it only collects and sends."""

    def __init__(self, config: pytest.Config) -> None:
        option = config.option
        self.config = config
        self.update: bool = option.pgcheck_update
        self.seed: int | None = option.pgcheck_seed
        self.lenient = option.pgcheck_inconclusive == "warn"
        settings = load_config(config.rootpath)
        named = option.pgcheck_baseline or settings.baseline
        self.asked = any((option.pgcheck_baseline, self.update, option.pgcheck_suite, option.pgcheck_report))
        base = config.invocation_params.dir if option.pgcheck_baseline else config.rootpath
        self.path: Path | None = base / named if named and self.asked else None
        self.report_path = config.invocation_params.dir / option.pgcheck_report if option.pgcheck_report else None
        if self.update and self.path is None:
            raise UsageError("baseline: none to update; name it with --pgcheck-baseline, or in [tool.pgcheck].")
        self.accept = f"pytest --pgcheck-baseline={named} --pgcheck-update"
        self.baseline: Baseline | None = None
        if self.path is not None:
            fresh = self.update and not self.path.exists()
            self.baseline = EMPTY if fresh else read_baseline(self.path, self.accept)
        self.tasks: list[Task | CaseTask] = []
        self.own: list[Task | CaseTask] = []
        self.share: Share = Shared(getattr(config, "workerinput", {}).get(NODE)).report
        if self.asked and (settings.estimators or option.pgcheck_suite or settings.suite):
            made = plan(settings, suite=option.pgcheck_suite)
            checks = wanted_checks(made.suite.checks)
            how = How(made.suite.budget, RTOL, made.suite.engine, self._seeded(made.suite.sampling))
            judge = self._judge(made.resolve_problems(), checks, None, how)
            judge.commands.update(made.commands)
            judge.expectations = [Expectation(x.estimator, x.problem, x.finding) for x in made.suite.expect]
            self.own = [Task(e, judge, made.expected.get(e.name, {})) for e in made.resolve_estimators()]
            if made.estimators is None:
                self.own += [CaseTask(case, self.share) for case in made.suite.case]
            self._add(self.own)
        self.judged = self.deselected = 0
        self.found = _Found()
        self.said: list[str] = []

    def _seeded(self, sampling: Sampling | None) -> Sampling | None:
        """With the seed of this session, if it was given one."""
        return sampling if self.seed is None else replace(sampling or Sampling(), seed=self.seed)

    def _judge(self, problems: list[Problem], checks: list[str], claim: Claim | None, how: How) -> Judge:
        judge = Judge(problems, checks, claim, how)
        judge.share = self.share
        return judge

    def _add(self, tasks: Sequence[Task | CaseTask]) -> None:
        for task in tasks:
            if any((t.of_case, t.name) == (task.of_case, task.name) for t in self.tasks):
                raise UsageError(f"estimators: '{task.name}' is given twice; give one of them another name.")
            self.tasks.append(task)

    # -- collecting

    def parametrize(self, metafunc: pytest.Metafunc, mark: pytest.Mark, fixture: str) -> None:
        """One item of a marked test for each verdict.

        Raises:
            UsageError: the mark, or the test, is not as it must be.
        """
        if fixture not in metafunc.fixturenames:
            raise UsageError(f"{metafunc.function.__name__} is marked pgcheck, and must take the fixture {fixture}.")
        tasks = self._marked(*mark.args, **mark.kwargs)
        self._add(tasks)
        verdicts = [v for task in tasks for v in self.verdicts_of(task)]
        metafunc.parametrize(fixture, [pytest.param(v, id=v.id, marks=v.marks) for v in verdicts], indirect=True)

    def _marked(
        self,
        estimators: Sequence[AnyEstimator] | None = None,
        *,
        problems: Any = "core",
        claim: Any = None,
        checks: Sequence[str] | None = None,
        expected_failed_checks: Any = None,
        budget: int = DEFAULT_BUDGET,
        engine: str = "exact",
        sampling: Sampling | None = None,
    ) -> list[Task]:
        """The tasks of `@pytest.mark.pgcheck(…)`; arguments as of `pgcheck.testing.parametrize_with_checks`. A registry is all
        its entries."""
        as_estimators(estimators or [])  # refuses what is no list, or empty
        how = How(budget, RTOL, checked_engine(engine), self._seeded(sampling))
        made = None if claim is None else as_claim(claim)
        judge = self._judge(as_problems(problems), wanted_checks(checks), made, how)
        return [
            Task(x, judge, expected_failures(expected_failed_checks, x))
            for given in estimators or []
            for x in (all_imported(given) if isinstance(given, str) and ":" in given else [given])
        ]

    def verdicts_of(self, task: Task | CaseTask) -> list[Verdict]:
        """What there is to ask of a task."""
        named = (task.of_case, task.name)
        found = [Verdict(self, task, *named, problem, rule) for problem, rule in task.questions()]
        if self.baseline is not None:
            known = known_rows(self.baseline)
            rows = [(*named, problem) for problem in task.rows()]
            found += [Verdict(self, task, *key, "unchanged" if key in known else "missing") for key in rows]
        return found

    @pytest.hookimpl(tryfirst=True)  # before -k and -m choose among the items
    def pytest_collection_modifyitems(self, session: pytest.Session, items: list[pytest.Item]) -> None:
        verdicts = [v for task in self.own for v in self.verdicts_of(task)]
        if self.baseline is not None:
            asked = {(t.of_case, t.name, problem) for t in self.tasks for problem in t.rows()}
            verdicts += [Verdict(self, None, *key, "orphaned") for key in sorted(known_rows(self.baseline) - asked)]
        if verdicts:
            node = _Node.from_parent(session, name=NODE, nodeid=NODE)
            items += [VerdictItem.from_parent(node, name=v.id, verdict=v) for v in verdicts]

    # -- judging

    def compared(self, verdict: Verdict) -> Gate:
        """One row held against the baseline."""
        before = self.baseline or EMPTY
        report = verdict.task.report if verdict.task else merged([], suite="pytest")
        nothing: dict[str, list[Any]] = {"estimators": [], "entries": [], "cases": []}
        name, problem = verdict.estimator, verdict.problem
        if verdict.of_case:
            part = nothing | {"cases": [c for c in before.cases if c.case == name]}
        elif problem:
            part = nothing | {"entries": [e for e in before.entries if e.key == (name, problem)]}
            cells = [m for m in report.measurements if m.problem == problem]
            report = report.model_copy(update={"measurements": cells, "estimators": [], "verdicts": []})
        else:
            part = nothing | {"estimators": [e for e in before.estimators if e.estimator == name]}
            report = report.model_copy(update={"measurements": []})
        return compare(report, before.model_copy(update=part), sampled=sampled_entries(before))

    def engine_of(self, verdict: Verdict) -> tuple[int | None, str]:
        """The seed and the engine of what a verdict is about; exact ones have the session's seed, if it has one."""
        task = verdict.task
        measured = [] if task is None or not task.begun else task.report.measurements
        seeds = [m.seed for m in measured if m.batches is not None and verdict.problem in ("", m.problem)]
        return (seeds[0], "monte_carlo") if seeds else (self.seed, "exact")

    def place_of(self, verdict: Verdict) -> tuple[str, int] | None:
        """Where the estimator's code begins."""
        if not isinstance(verdict.task, Task):
            return None
        return places_of([verdict.task.estimator], self.config.rootpath).get(verdict.estimator)

    # -- the end

    def pytest_deselected(self, items: Sequence[pytest.Item]) -> None:
        self.deselected += sum(isinstance(x, VerdictItem) or "pgcheck" in x.keywords for x in items)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.judged += report.when == "call" and any(name == "engine" for name, _ in report.user_properties)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """(pytest-xdist) A worker is done."""
        self.found.add(_Found(**getattr(node, "workeroutput", {}).get(NODE, {})))

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """A worker sends; whoever has everything writes, and sees to it that doing nothing is not taken for success."""
        self.found.add(self._own_findings())
        if hasattr(self.config, "workeroutput"):
            self.config.workeroutput[NODE] = vars(self.found)
            return
        if self.config.option.collectonly or not self.asked:
            return
        problem = self._finish()
        if problem:
            self.said.append(problem)
            nothing = self.judged == 0
            code = pytest.ExitCode.NO_TESTS_COLLECTED if nothing else pytest.ExitCode.TESTS_FAILED
            session.exitstatus = session.exitstatus or code

    def _own_findings(self) -> _Found:
        names = {id(t): f"case {t.name}" if t.of_case else t.name for t in self.tasks}
        estimators = [t.estimator for t in self.tasks if isinstance(t, Task)]
        return _Found(
            planned={names[id(t)]: dict(t.expected) for t in self.tasks},
            reports={names[id(t)]: t.report.to_json() for t in self.tasks if t.begun},
            places=places_of(estimators, self.config.rootpath),
        )

    def _finish(self) -> str:
        """Write what was asked for; what is wrong, in words, or ""."""
        found = self.found
        if self.judged == 0:
            return "nothing was checked: nothing was asked for, or all of it was deselected"
        if found.torn:
            return f"'{min(found.torn)}' gave two reports that differ on two workers: it is not deterministic"
        unjudged = sorted(set(found.planned) - set(found.reports))
        if unjudged:
            wanted = "; nothing was written" if self.update or self.report_path else ""
            self.said += [f"not judged: {', '.join(unjudged)}{wanted}"]
            return "a part of what was to be written was not judged" if wanted else ""
        reports = [Report.model_validate_json(found.reports[name]) for name in sorted(found.reports)]
        report = merged(reports, suite="pytest")
        texts = {}
        if self.report_path is not None:
            beside = provenance(report, seed=self.seed, places=found.places)
            texts = {self.report_path: report.to_json(), provenance_path(self.report_path): beside}
        refused = ""
        if self.update and self.path is not None and self.baseline is not None:
            gate = compare(report, self.baseline, expected=found.planned)
            if gate.updatable and not gate.accepted().empty:
                texts[self.path] = gate.accepted().to_json()
            else:
                refused = f"not written: {self.path}: {words.why_not(gate)}"
        write_all(texts)
        self.said += [f"written: {path}" for path in texts]
        return refused

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if self.deselected:
            terminalreporter.write_line(f"pgcheck: {self.deselected} verdicts were deselected")
        for text in self.said:
            terminalreporter.write_line(f"pgcheck: {text}")


@dataclass
class _Found:
    """What one process planned and found; plain data, for pytest-xdist."""

    planned: dict[str, dict[str, str]] = field(default_factory=dict)  # estimator or case → checks expected to fail
    reports: dict[str, str] = field(default_factory=dict)  # estimator or case → report.json
    places: dict[str, tuple[str, int]] = field(default_factory=dict)
    torn: list[str] = field(default_factory=list)  # estimators of which two processes found two things

    def add(self, other: _Found) -> None:
        """What another process found as well."""
        both = set(self.reports) & set(other.reports)
        self.torn += [*other.torn, *(name for name in both if self.reports[name] != other.reports[name])]
        self.planned |= other.planned
        self.reports |= other.reports
        self.places |= other.places
