"""`pgcheck design` in words."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from pgcheck.design import Plan
from pgcheck.render.messages import number
from pgcheck.statistics.power import looks
from pgcheck.statistics.sequential import SHARE


def design_text(plan: Plan) -> str:
    """A paragraph of lines, label and number."""
    d, s = plan.design, plan.design.settings
    size = s.rtol * (2 if s.mode == "exceeds" else 1)
    shown = "twice the tolerance" if s.mode == "exceeds" else "the size of the tolerance"
    rows = [
        ("noise", f"√tr Cov ĝ/‖∇J‖ = {number(d.noise.nsr)} a batch, spread over {number(d.noise.r_eff)} directions"),
        ("asked", f"rtol {number(s.rtol)}, α = {number(s.alpha * SHARE)} for the run, β = {number(s.beta)} a check"),
        ("PASS", _draws(d.pass_draws, d.pass_draws_exactly, plan)),
        ("FAIL", f"{_draws(d.fail_draws, d.oracle_draws, plan)} for a bias {shown} ({number(size)}) along ∇J"),
        ("budget", f"{d.budget:,} batches show a bias of {number(d.detectable)}, and certify {number(d.certifiable)}"),
    ]
    if plan.best is not None:
        tried = plan.group_sizes
        least, most = tried[0].group_size, tried[-1].group_size
        rows.append(
            (
                "group size",
                f"{plan.best.group_size} wastes the fewest rollouts ({number(plan.best.cost)} of them until signal and noise"
                f" are equal; tried {least} to {most})",
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
