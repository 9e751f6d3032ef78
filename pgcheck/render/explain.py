"""`pgcheck explain`: the page of a check, an estimator or a problem, generated from docstrings and claims."""

from __future__ import annotations

import inspect

from pgcheck.errors import UnknownNameError
from pgcheck.estimators.base import Claim, Estimator, registered_estimators
from pgcheck.estimators.lookup import as_estimator
from pgcheck.problem import Problem, find_problem, registered_problems
from pgcheck.render.messages import number
from pgcheck.verdicts.checks import Check, registered_checks


def explain(name: str) -> str:
    """The page of whatever has that name.

    Raises:
        UnknownNameError: no check, estimator or problem of that name; suggests the nearest of all of them.
    """
    checks, estimators, problems = registered_checks(), registered_estimators(), registered_problems()
    if name in checks:
        return _check_page(checks[name])
    if name.partition("@")[0] in problems:
        return _problem_page(find_problem(name))
    try:
        return _estimator_page(as_estimator(name))
    except UnknownNameError:
        hint = "`pgcheck list checks`, `… estimators` and `… problems` show them all."
        raise UnknownNameError(
            "check, estimator or problem", name, [*checks, *estimators, *problems], hint=hint
        ) from None


def _check_page(check: Check) -> str:
    return f"check {check.name} ({check.kind})\n\n{inspect.cleandoc(check.page)}"


def _claim_line(claim: Claim) -> str:
    what = {"unbiased": "unbiased: E ĝ = ∇J", "proportional": "proportional: E ĝ = κ ∇J", "biased": "biased: E ĝ ≠ ∇J"}[
        claim.kind
    ]
    if callable(claim.scale):
        what += f", κ = {inspect.cleandoc(claim.scale.__doc__ or 'a function of B and G').split(':')[0]}"
    elif claim.scale is not None:
        what += f", κ = {claim.scale:g}"
    under = f"   where: {', '.join(c.name for c in claim.conditions)}" if claim.conditions else ""
    because = f"\n             {claim.reason}" if claim.reason else ""
    return f"  claim      {what}{under}{because}"


def _estimator_page(e: Estimator) -> str:
    see = {
        "trajectory": "its own rollout only",
        "group": "the rollouts of its group",
        "batch": "the whole batch",
    }[e.couples]
    lines = [
        f"estimator {e.name}",
        "",
        e.about or "(no description)",
        "",
        f"  ĝ          {e.formula or '(taken from a loss)'}",
        *(_claim_line(c) for c in e.claims),
        f"  looks at   {see}; groups of at least {e.min_group_size}",
        f"  source     {e.reference or '—'}",
        "",
        f"Its numbers: pgcheck compare '{e.name}' leave_one_out --problem dialogue/two-turn",
    ]
    return "\n".join(lines)


def _problem_page(p: Problem) -> str:
    t = p.trajectories
    g = p.gradient()
    rows = [f"    context {k}: " + "  ".join(f"{x:+.6f}" for x in g[k].tolist()) for k in range(t.contexts)]
    sizes = "+".join(str(s) for s in p.sizes)
    lines = [
        f"problem {p.name}",
        "",
        p.about,
        "",
        f"  rollouts   N = {len(t)} of up to {t.paths.steps} positions, {len(t.paths.start_probability)} start(s)",
        f"  policy     K = {t.contexts} contexts, A = {t.actions} actions",
        f"  batch      B = {p.rows} rows: groups of {sizes}",
        f"  discount   γ = {p.discount:g}, counted by {t.paths.discount_clock}",
        f"  sampler    {'the policy itself' if p.on_policy else 'another policy'}"
        + ("" if p.full_support else ", which cannot draw everything the policy can"),
        f"  J          {number(p.value())}",
        f"  ∇J         norm {number(float(g.norm()))}",
        *rows,
        f"  digest     {p.digest}",
    ]
    return "\n".join(lines)
