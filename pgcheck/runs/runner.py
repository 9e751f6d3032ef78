"""Estimators × problems → `Report`.

For each problem, all estimators are enumerated on the same batches. Hygiene comes first: an estimator that is random,
stateful or writes to its inputs gets that verdict and no other.

Guarantee: every pair ends up in exactly one of three places: measured, not asked (with the reason), or failed by
`finite` or INCONCLUSIVE (too large), never silently dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import metadata

from pgcheck.engines.choice import Engine, checked_sampling, moments_by
from pgcheck.engines.exact import DEFAULT_BUDGET
from pgcheck.engines.moments import Moments, Progress
from pgcheck.engines.monte_carlo import Sampling
from pgcheck.engines.purity import KINDS
from pgcheck.engines.threads import one_thread
from pgcheck.errors import BudgetError, NotFiniteError, UsageError
from pgcheck.estimators.base import Estimator
from pgcheck.problem import Problem
from pgcheck.runs import report as rows
from pgcheck.runs.cases import Case, judge_case
from pgcheck.runs.report import CaseRow, Report
from pgcheck.verdicts.checks import find_check, registered_checks
from pgcheck.verdicts.checks.bias import claims_on, judge_claims, scales_on
from pgcheck.verdicts.verdict import RTOL, Finding, Measurement, NotAsked, Space, Status, Verdict, measure

RICH_PROBLEMS = 2  # on how many problems the single-batch checks run, and on one with a single group


@dataclass(frozen=True)
class Expectation:
    """What a suite expects on one problem, claim or no claim."""

    estimator: str
    problem: str
    finding: Finding


def richness(problem: Problem) -> tuple[bool, bool, bool, bool, int]:
    """How much a single batch of the problem can show: unequal groups, observations, ragged rows, several groups."""
    paths = problem.probe_table().paths
    inside = (paths.mask == 0) & (paths.mask.flip(-1).cumsum(-1).flip(-1) > 0)
    return (
        len(set(problem.sizes)) > 1,
        bool(inside.any()),
        not problem.fixed_length,
        problem.groups > 1 and problem.rows > problem.groups,
        problem.rows,
    )


def refuse_duplicates(estimators: Sequence[Estimator], problems: Sequence[Problem]) -> None:
    """Raise `UsageError` for two estimators of one name, or two problems: their rows could not be told apart."""
    for what, names in (("estimators", [e.name for e in estimators]), ("problems", [p.name for p in problems])):
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise UsageError(f"{what}: '{min(twice)}' is given twice; give one of them another name.")


def wanted_checks(checks: Sequence[str] | None) -> list[str]:
    """The names asked for; None: every check.

    Raises:
        UsageError: a name for a list of names, or one that is unknown.
    """
    if isinstance(checks, str):
        raise UsageError(f"checks: {checks!r}; expected a list of names, [{checks!r}].")
    return [find_check(name).name for name in (registered_checks() if checks is None else checks)]


@one_thread()
def run(
    estimators: Sequence[Estimator],
    problems: Sequence[Problem],
    *,
    suite: str = "",
    checks: Sequence[str] | None = None,
    expectations: Sequence[Expectation] = (),
    cases: Sequence[Case] = (),
    budget: int = DEFAULT_BUDGET,
    rtol: float = RTOL,
    engine: Engine = "exact",
    sampling: Sampling | None = None,
    space: Space = "logits",
    progress: Progress | None = None,
) -> Report:
    """Judge every estimator on every problem.

    Args:
        checks: names of checks to run; default, all of them.
        expectations: findings expected on single problems, on top of the claims.
        cases: sentences to decide, each by a number of its own.
        budget: most batches enumerated for one estimator on one problem.
        rtol: tolerance of exact verdicts.
        engine: `"auto"` samples where the batches are more than the budget, `"monte_carlo"` everywhere.
        sampling: tolerance, error rates, seed and number of draws of sampled verdicts.
        space: where E ĝ is held against ∇J; `"parameters"`: those of the policy that the problem has.

    Raises:
        UsageError: two estimators of one name, or two problems; an unknown check.
        EstimatorError: coefficients of the wrong shape, no gradient, or a wrong `couples`.
    """
    refuse_duplicates(estimators, problems)
    wanted = set(wanted_checks(checks))
    how = checked_sampling(sampling)
    verdicts: list[Verdict] = []
    not_asked: list[NotAsked] = []
    clean = []
    for e in estimators:
        impure = _hygiene_first(e, problems)
        verdicts += impure
        if all(v.status is Status.PASS for v in impure):
            clean.append(e)
    found: dict[tuple[str, str], Measurement] = {}
    for done, problem in enumerate(problems):
        if progress is not None:
            progress("problems", done, len(problems))
        asked = []
        for e in clean:
            why_not = why_not_measured(e, problem)
            if why_not:
                not_asked.append(NotAsked(e.name, problem.name, why_not))
            else:
                asked.append(e)
        for e, moments in _moments(asked, problem, engine, budget, how, space, progress):
            if isinstance(moments, Moments):
                found[e.name, problem.name] = measure(e, problem, moments, rtol=rtol, space=space)
                if not claims_on(e, problem):
                    not_asked.append(NotAsked(e.name, problem.name, "no claim is made under these conditions"))
            else:
                verdicts.append(_refused(e, problem, moments))
    for e in clean:
        pairs = [(p, m) for p in problems if (m := found.get((e.name, p.name))) is not None]
        refused = any(v.estimator == e.name and v.status is not Status.PASS for v in verdicts)
        exact = all(m.batches is None for _, m in pairs)
        if pairs and exact and not refused:  # the engine saw every batch of every problem
            verdicts.append(Verdict(e.name, "finite", "", Status.PASS, 0.0, 0.0))
        verdicts += judge_claims(e, [p for p, _ in pairs], [m for _, m in pairs], rtol=rtol, tolerance=how.tolerance)
        verdicts += _single_batch_checks(e, [p for p, _ in pairs], wanted)
    verdicts += [_judge_expectation(x, found) for x in expectations]
    undecided = {(x.estimator, x.problem) for x in expectations if x.finding == "inconclusive"}
    verdicts = [
        replace(v, expected=True) if v.status is Status.INCONCLUSIVE and (v.estimator, v.problem) in undecided else v
        for v in verdicts
    ]
    return Report(
        suite=suite,
        version=metadata.version("pgcheck"),
        problems=[rows.problem_row(p) for p in problems],
        estimators=[rows.estimator_row(e) for e in estimators],
        measurements=[rows.measurement_row(m, space=space) for m in found.values()],
        verdicts=[
            rows.verdict_row(v, alpha=how.alpha, beta=how.beta)
            for v in verdicts
            if v.check in wanted or _always_shown(v)
        ],
        not_asked=[rows.not_asked_row(n) for n in not_asked],
        cases=_judged(cases, progress),
    )


def _judged(cases: Sequence[Case], progress: Progress | None) -> list[CaseRow]:
    judged = []
    for done, case in enumerate(cases):
        if progress is not None:
            progress("cases", done, len(cases))
        judged.append(judge_case(case))
    return judged


def why_not_measured(e: Estimator, problem: Problem) -> str:
    """Why the batches of a problem are not enumerated for an estimator; "" if they are."""
    if not e.fits(problem):
        few = f"groups of at least {e.min_group_size}" if e.min_group_size > 1 else "at least 2 rows to compare"
        return f"needs {few}"
    if not problem.plain_objective and not claims_on(e, problem):
        return "it is made for another objective"
    if not problem.can_draw(e.needs):
        what = ", ".join(type(need).__name__ for need in e.needs)
        return f"needs a table of all rollouts for {what}"
    return ""


def _always_shown(v: Verdict) -> bool:
    """A suite's own expectation; and what kept an estimator from being judged."""
    unjudged = v.check in (*KINDS, "finite") and v.status is not Status.PASS
    return v.check == "expected_finding" or unjudged or v.status is Status.INCONCLUSIVE


def _hygiene_first(estimator: Estimator, problems: Sequence[Problem]) -> list[Verdict]:
    problem = next((p for p in problems if estimator.fits(p)), None)
    if problem is None:
        return []
    verdicts = (registered_checks()[name].run for name in KINDS)
    return [v for run_check in verdicts if run_check and (v := run_check(estimator, problem)) is not None]


def _moments(
    estimators: Sequence[Estimator],
    problem: Problem,
    engine: Engine,
    budget: int,
    sampling: Sampling,
    space: Space,
    progress: Progress | None,
) -> list[tuple[Estimator, Moments | NotFiniteError | BudgetError]]:
    """Moments of all at once; if one of them cannot be had, by halves."""
    scales = [scales_on(e, problem) for e in estimators]
    try:
        found = moments_by(
            engine, estimators, problem, budget=budget, sampling=sampling, scales=scales,
            parameters=space == "parameters", progress=progress,
        )  # fmt: skip
        return list(zip(estimators, found, strict=True))
    except (NotFiniteError, BudgetError) as error:
        if len(estimators) == 1:
            return [(estimators[0], error)]
        half = len(estimators) // 2
        parts = estimators[:half], estimators[half:]
        return [pair for part in parts for pair in _moments(part, problem, engine, budget, sampling, space, progress)]


def _refused(estimator: Estimator, problem: Problem, error: NotFiniteError | BudgetError) -> Verdict:
    if isinstance(error, NotFiniteError):
        return Verdict(
            estimator.name, "finite", problem.name, Status.FAIL, float("nan"), 0.0, reason=str(error.args[0])
        )
    claims = claims_on(estimator, problem)
    name = claims[0].kind if claims else "finite"
    return Verdict(estimator.name, name, problem.name, Status.INCONCLUSIVE, float("nan"), RTOL, reason=str(error))


def _single_batch_checks(estimator: Estimator, problems: Sequence[Problem], wanted: set[str]) -> list[Verdict]:
    """Invariance and hygiene on the problems whose batches can show most, different ones (not one at two θ)."""
    rich: dict[str, Problem] = {}
    for problem in sorted(problems, key=richness, reverse=True):
        rich.setdefault(problem.name.partition("@")[0], problem)
    chosen = list(rich.values())[:RICH_PROBLEMS]
    # several groups of equal size hide who splits a batch between them: one group as well
    chosen += [p for p in rich.values() if p.groups == 1 and p.rows > 2 and p not in chosen][:1]
    verdicts = []
    for c in registered_checks().values():
        if c.run is None or c.name in KINDS or c.name not in wanted:
            continue
        # a bias check belongs to every problem, a single-batch check to the telling ones
        for problem in problems if c.kind == "bias" else chosen:
            try:
                verdict = c.run(estimator, problem)
            except Exception as error:  # the changed batch was too much for it, and that is what the check is for
                reason = str(error.args[0]) if isinstance(error, UsageError) else f"{type(error).__name__}: {error}"
                verdict = Verdict(estimator.name, c.name, problem.name, Status.FAIL, float("nan"), 0.0, reason=reason)
            if verdict is not None:
                verdicts.append(verdict)
    return verdicts


def _judge_expectation(x: Expectation, found: dict[tuple[str, str], Measurement]) -> Verdict:
    m = found.get((x.estimator, x.problem))
    status = Status.PASS if m is not None and m.finding == x.finding else Status.FAIL
    reason = f"expected {x.finding}, found {m.finding if m else 'no measurement'}"
    measured = m.distance(1.0) if m else float("nan")
    return Verdict(x.estimator, "expected_finding", x.problem, status, measured, RTOL, reason=reason)
