"""The library's doors: `check_estimator`, `compare`, `moments`."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal, get_args

import pandas as pd

from pgcheck.engines.exact import DEFAULT_BUDGET, exact_moments
from pgcheck.engines.moments import Moments, Progress
from pgcheck.errors import BiasError, CheckFailed, UnknownNameError, UsageError
from pgcheck.estimators.base import Claim, Estimator, find_estimator, proportional, unbiased
from pgcheck.estimators.lookup import AnyEstimator, as_estimator, as_estimators, command_name
from pgcheck.problem import Problem, problem_sets, registered_problems
from pgcheck.render.code import Code, check_code
from pgcheck.render.messages import BIAS_CHECKS, failure_message
from pgcheck.render.progress import ProgressBar
from pgcheck.runs.report import Report, measurement_of, not_asked_row, verdict_row
from pgcheck.runs.runner import refuse_duplicates, run
from pgcheck.runs.suite import problems_matching
from pgcheck.verdicts.diagnose import diagnose, find_mistake, find_swap
from pgcheck.verdicts.verdict import RTOL, NotAsked, Space, Status, Verdict, measure

AnyProblem = Problem | str
Engine = Literal["exact"]

THETAS = 2


def as_problems(problems: AnyProblem | Sequence[AnyProblem]) -> list[Problem]:
    """Problems from a set ("core": on-policy; "off-policy"; "penalized": with a KL or entropy term in the objective; "all";
    each at two θ), ids, patterns, or as they are.

    Raises:
        UnknownNameError: no such problem; suggests the nearest.
    """
    if isinstance(problems, Problem):
        return [problems]
    if not isinstance(problems, str | Sequence):
        raise UsageError(f"problems: {problems!r}; expected a set, an id, a pattern, a Problem, or a list of those.")
    if not isinstance(problems, str):
        return [p for entry in problems for p in as_problems(entry)]
    sets = problem_sets()
    if problems in sets:
        return problems_matching([problems], thetas=THETAS)
    if "/" not in problems and "*" not in problems:
        raise UnknownNameError("problem", problems, [*sets, *registered_problems()], hint=f"Sets: {', '.join(sets)}.")
    return problems_matching([problems])


def as_claim(claim: str | Claim) -> Claim:
    """A claim by its name, `"unbiased"` or `"proportional"`, or as it is.

    Raises:
        UsageError: neither.
    """
    if isinstance(claim, Claim):
        return claim
    made = {"unbiased": unbiased(), "proportional": proportional()}
    if claim not in made:
        raise UsageError(f"claim: {claim!r}; expected 'unbiased', 'proportional', or a pgcheck Claim.")
    return made[claim]


def check_estimator(
    estimator: AnyEstimator,
    problems: AnyProblem | Sequence[AnyProblem] | None = None,
    *,
    claim: str | Claim | None = None,
    same_as: str | None = None,
    checks: Sequence[str] | None = None,
    budget: int = DEFAULT_BUDGET,
    rtol: float = RTOL,
    search: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Judge an estimator's claims, exactly, and everything else a correct loss has.

    Args:
        estimator: a loss `batch -> scalar`, an `Estimator`, or the name of one.
        problems: `"core"` (every on-policy problem at two θ), `"off-policy"`, `"penalized"` (a KL or entropy term in the
            objective: read `batch.kl_coefficient`), `"all"`, an id, a pattern, a `Problem`, or several of those. Default:
            `"core"`; with `same_as`, `"all"`.
        claim: what to judge instead of the estimator's own claims; a plain loss claims `"unbiased"`.
        same_as: name of the estimator that it implements: it must give the same estimate from every batch, and without
            `claim` it claims what that one claims.
        checks: names of checks; default, all.
        budget: most batches enumerated on one problem.
        progress: called with (what, done, total); default, a bar on stderr after two seconds, if that is a terminal.
        rtol: tolerance relative to max(‖∇J‖, √E‖ĝ‖²).
        search: hunt for a counterexample among random problems as well, of the same kind as `problems` (on-policy if those
            are); the smallest ends the message, as code. A few seconds; the same problems every time.

    Returns:
        The report, if every check passed. A search is a verdict of it with problem "", which says how many problems it saw.

    Raises:
        BiasError: E ĝ contradicts the claim.
        CheckFailed: any other check failed, or nothing could be checked.
        UsageError: the estimator or a problem cannot be used; no estimator of the name `same_as`.
    """
    if not (isinstance(rtol, (int, float)) and 0.0 < rtol < 1.0):
        raise UsageError(f"rtol: {rtol!r}; it must lie between 0 and 1.")
    e = as_estimator(estimator)
    if same_as is not None:
        other = find_estimator(same_as)
        e = replace(e, same_as=other.name, claims=other.claims)
    if claim is not None:
        e = replace(e, claims=(as_claim(claim),))
    chosen = as_problems(("core" if same_as is None else "all") if problems is None else problems)
    with ProgressBar() as bar:
        report = run([e], chosen, suite="check", checks=checks, budget=budget, rtol=rtol, progress=progress or bar)
    named, words = report, ""
    smallest: list[Problem] = []
    if search and report.measurements and any(c.kind in (checks or BIAS_CHECKS) for c in e.claims):
        asked = {"same_as": same_as, "claim": claim if isinstance(claim, str) or claim is None else Code("claim")}
        command = command_name(estimator)
        report, smallest, words = _searched(report, e, chosen, checks=checks, rtol=rtol, command=command, asked=asked)
    judged = any(v.check in BIAS_CHECKS for v in report.verdicts)
    nothing = not report.verdicts or (checks is None and not judged and not report.failures)
    if report.exit_code == 0 and not nothing:
        return report
    if nothing:
        raise CheckFailed(nothing_checked(e, chosen), report=report)
    shown = named if named.failures else report  # a random problem is explained where no named one fails
    message = explain_failure(e, [*chosen, *smallest], shown, command=command_name(estimator)) + words
    kind = BiasError if any(v.check in BIAS_CHECKS for v in report.failures) else CheckFailed
    raise kind(message, report=report)


def nothing_checked(estimator: Estimator, problems: Sequence[Problem]) -> str:
    """Why no claim of the estimator was judged on these problems."""
    why = (
        f"no claim applies on the {len(problems)} problem(s) given, or their batches are too small (it needs groups of"
        f" {estimator.min_group_size})"
    )
    return f"{estimator.name}: nothing was checked: {why if problems else 'no problem was given'}."


def _searched(
    report: Report,
    e: Estimator,
    problems: Sequence[Problem],
    *,
    checks: Sequence[str] | None,
    rtol: float,
    command: str,
    asked: Mapping[str, str | None],
) -> tuple[Report, list[Problem], str]:
    """The report with what a search found added to it, the counterexample, and the words for a failure message."""
    from pgcheck.search import search as hunt

    verdicts, not_asked, words = [], [], ""
    smallest: list[Problem] = []
    for found in hunt(e, problems, rtol=rtol):
        if found.smallest is not None:
            smallest.append(found.smallest)
            code = textwrap.indent(check_code(found.smallest, estimator=command, asked=asked), "    ")
            words = f"\n\nThe smallest of {found.problems} random problems on which it fails:\n\n{code}"
        elif found.problems:
            reason = f"no counterexample among {found.problems} random problems"
            verdicts.append(Verdict(e.name, found.claim.kind, "", Status.PASS, found.worst, rtol, reason=reason))
        else:
            not_asked.append(NotAsked(e.name, "", "search: no random problem met the claim's conditions"))
    if all(c.kind == "biased" for c in e.claims):
        not_asked.append(NotAsked(e.name, "", "search: one problem does not refute a claim of bias"))
    rows = {"verdicts": list(map(verdict_row, verdicts)), "not_asked": list(map(not_asked_row, not_asked))}
    report = _joined(report, report.model_copy(update={"problems": [], "measurements": [], **rows}))
    if smallest:
        report = _joined(report, run([e], smallest, suite="check", checks=checks, rtol=rtol))
    return report, smallest, words


def _joined(report: Report, more: Report) -> Report:
    """The rows of both."""
    tables = ("problems", "measurements", "verdicts", "not_asked")
    return report.model_copy(update={name: [*getattr(report, name), *getattr(more, name)] for name in tables})


def explain_failure(
    estimator: Estimator, problems: Sequence[Problem], report: Report, command: str | None = None
) -> str:
    """The failure message of one estimator, with a cause found by trying."""
    measured = {m.problem: m for m in report.measurements if m.estimator == estimator.name}
    failed = {v.problem for v in report.failures if v.estimator == estimator.name and v.check in BIAS_CHECKS}
    found = swap = None
    if failed & set(measured):
        pairs = [p for p in problems if p.name in measured and measured[p.name].expected]
        numbers = [measurement_of(measured[p.name], p) for p in pairs]
        if pairs:
            found, swap = diagnose(estimator, pairs, numbers), find_swap(estimator, pairs, numbers)
    differs = any((v.estimator, v.check) == (estimator.name, "same_as") for v in report.failures)
    mistake = find_mistake(estimator, problems) if differs else None
    return failure_message(report, estimator.name, diagnosis=found, swap=swap, mistake=mistake, command=command)


def moments(
    estimator: AnyEstimator,
    problem: AnyProblem,
    *,
    engine: Engine = "exact",
    budget: int = DEFAULT_BUDGET,
    progress: Progress | None = None,
) -> Moments:
    """E ĝ and Cov ĝ of one batch, in logit space.

    Raises:
        BudgetError: the batches are too many to enumerate; the message has the numbers and the nearest plan that fits.
    """
    if engine != "exact":
        raise UsageError(f"engine: {engine!r} is not one of exact.")
    chosen = as_problems(problem)
    if len(chosen) != 1:
        raise UsageError(
            f"problem: {problem!r} names {len(chosen)} problems; moments are of one, compare takes several."
        )
    one = chosen[0]
    with ProgressBar() as bar:
        (found,) = exact_moments([as_estimator(estimator)], one, budget=budget, progress=progress or bar)
    return found


def compare(
    estimators: Sequence[AnyEstimator],
    problems: AnyProblem | Sequence[AnyProblem],
    *,
    space: Space = "logits",
    budget: int = DEFAULT_BUDGET,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Bias and variance of several estimators on the same batches, one row each.

    Columns: estimator, problem, finding, rel, scale, cosine, off_axis, bias, variance (tr Cov ĝ of one batch), mse, snr,
    batches (None: exact).

    Args:
        space: `"parameters"`: of E ĝ_θ = (dz/dθ)ᵀ E ĝ against ∇_θ J, and tr Cov ĝ_θ (NaN where more
            logits × parameters than fit make it); the finding in logits holds for every θ.

    Raises:
        UsageError: two estimators of one name, or two problems; no such space.
        BudgetError: more batches, or more memory, than fit.
    """
    if space not in get_args(Space):
        raise UsageError(f"space: {space!r} is not one of {', '.join(get_args(Space))}.")
    rows = []
    chosen = as_estimators(estimators)
    names = ("estimator", "problem", "finding", "rel", "scale", "cosine", "off_axis", "bias")
    on = as_problems(problems)
    refuse_duplicates(chosen, on)
    with ProgressBar() as bar:
        for p in on:
            for e, m in zip(chosen, exact_moments(chosen, p, budget=budget, progress=progress or bar), strict=True):
                x = measure(e, p, m, space=space)
                more = {"variance": x.total_variance, "mse": x.mse, "snr": x.snr, "batches": x.batches}
                rows.append({**{name: getattr(x, name) for name in names}, **more})
    return pd.DataFrame(rows)
