"""`pgcheck design` in words."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from pgcheck.design import Plan
from pgcheck.render.messages import number
from pgcheck.statistics.power import Design, looks
from pgcheck.statistics.sequential import SHARE


def design_text(plan: Plan) -> str:
    """A paragraph of lines, label and number."""
    d, s = plan.design, plan.design.settings
    size = s.rtol * (2 if s.mode == "exceeds" else 1)
    shown = "twice the tolerance" if s.mode == "exceeds" else "the size of the tolerance"
    source = (
        "" if plan.pilot is None else f" (a pilot of {plan.pilot.draws:,} batches; in brackets, what it leaves open)"
    )

    def ends(get: Callable[[Design], float | int | None]) -> str:
        """What the pilot leaves open."""
        if plan.pilot is None:
            return ""
        of = [None if x is None else get(x) for x in (plan.pilot.quietest, plan.pilot.loudest)]
        return f" [{', '.join('?' if x is None else f'{x:,}' if isinstance(x, int) else number(x) for x in of)}]"

    noise = f"√tr Cov/‖∇J‖ = {number(d.noise.nsr)}{ends(lambda x: x.noise.nsr)} a batch"
    rows = [
        ("noise", f"{noise}, spread over {number(d.noise.r_eff)}{ends(lambda x: x.noise.r_eff)} directions{source}"),
        ("asked", f"rtol {number(s.rtol)}, α = {number(s.alpha * SHARE)} for the run, β = {number(s.beta)} a check"),
        ("PASS", _draws(d.pass_draws, d.pass_draws_exactly, plan) + ends(lambda x: x.pass_draws)),
        (
            "FAIL",
            f"{_draws(d.fail_draws, d.oracle_draws, plan)}{ends(lambda x: x.fail_draws)} for a bias {shown} ({number(size)})"
            " along ∇J",
        ),
        (
            "budget",
            f"{d.budget:,} batches show a bias of {number(d.detectable)}{ends(lambda x: x.detectable)}, and certify"
            f" {number(d.certifiable)}{ends(lambda x: x.certifiable)}",
        ),
    ]
    if plan.best is not None:
        tried, best = plan.group_sizes, plan.best
        between = "" if plan.pilot is None else f" [{number(best.cost_low)}, {number(best.cost_high)}]"
        others = f"; not told from {', '.join(map(str, plan.as_good))}" if plan.as_good else ""
        rows.append(
            (
                "group size",
                f"{best.group_size} wastes the fewest rollouts ({number(best.cost)}{between} of them until signal and noise"
                f" are equal; tried {tried[0].group_size} to {tried[-1].group_size}{others})",
            )
        )
    head = f"{plan.estimator} on {plan.problem}, looks at {', '.join(f'{n:,}' for n in looks(s)[:3])}, …"
    return "\n".join([head, *(f"  {label:<11}{text}" for label, text in rows)])


def _draws(at: int | None, exactly: float, plan: Plan) -> str:
    if at is not None:
        return f"about {at:,} batches"
    return f"beyond the last look at {looks(plan.design.settings)[-1]:,} (some {number(exactly)} batches)"


def design_json(plan: Plan) -> dict[str, Any]:
    """The same as data; infinite numbers are null."""
    out = asdict(plan) | {"best_group_size": plan.best.group_size if plan.best else None}
    return {k: _finite(v) for k, v in out.items()}


def _finite(x: Any) -> Any:
    if isinstance(x, dict):
        return {k: _finite(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return [_finite(v) for v in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x
