"""Variance compared: what one estimator's noise is next to another's, what it costs, and where it comes from.

With m = E ĝ, b = m − ∇J, V = tr Cov ĝ of one batch and c its cost in rollouts, averaging N batches leaves

    MSE(N) = ‖b‖² + V/N,    and two estimators A, B are even at    N* = (V_A − V_B)/(‖b_B‖² − ‖b_A‖²);

at a budget of R rollouts N = R/c, so that R* is the same with V c in place of V. V/V' alone flatters whoever takes shorter
steps; the batches that have as much signal for their noise, (V/κ²)/(V'/κ'²), do not: signal is κ‖∇J‖, κ = ⟨m, ∇J⟩/‖∇J‖²,
the part of E ĝ along ∇J, as a step in another direction is none.

Functions on frames need the columns they name and nothing of where the numbers come from: exact rows have NAME_low =
NAME = NAME_high, sampled ones an interval.

Guarantee: exact rows keep the accuracy of `pgcheck.engines.exact`; a variance below 1e-12 of the largest of its problem,
and the bias of what was found unbiased, count as 0.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import pandas as pd
import torch
from torch import Tensor

from pgcheck.engines.coefficients import cells_of, coefficients_of, gradient_map
from pgcheck.engines.declarations import row_order_is_free
from pgcheck.engines.enumeration import Batches
from pgcheck.engines.moments import Moments
from pgcheck.errors import UnknownNameError
from pgcheck.estimators.base import Estimator
from pgcheck.problem import Problem
from pgcheck.statistics.guarded import interval
from pgcheck.statistics.variance import Pairs, variance_ratio
from pgcheck.trajectories import Trajectories
from pgcheck.verdicts.quantities import APPROXIMATIONS, contributions, parts_by_step
from pgcheck.verdicts.verdict import Measurement, Space

ROUNDING = 1e-12
MEASURED = ("scale", "rel", "bias", "variance", "mse", "snr")  # columns with an interval

PAIRED = tuple(f"{name}{end}" for name in ("ratio", "gap", "gap_of_rollouts") for end in ("_low", "", "_high"))

Better = Literal["always", "never", "below", "above", "same"]
# when an estimator's MSE is less than the reference's: with fewer batches than N*, with more, with any number, with none


def cost(estimator: Estimator, problem: Problem) -> float:
    """Rollouts that one batch takes, expected: its B rows, and what is rolled out for side columns (the continuations of
    VinePPO, the greedy rollout of ReMax)."""
    asked = (getattr(need, "extra_rollouts", None) for need in estimator.needs)
    return problem.rows + sum(extra(problem) for extra in asked if extra is not None)


def row_of(estimator: Estimator, problem: Problem, x: Measurement) -> dict[str, Any]:
    """A measurement as a line of `pgcheck.compare`."""
    same = ("estimator", "problem", "finding", "rel", "scale", "cosine", "off_axis", "bias")
    numbers = {"variance": x.total_variance, "mse": x.mse, "snr": x.snr}
    row: dict[str, Any] = {name: getattr(x, name) for name in same}
    row |= {**numbers, "batches": x.batches, "cost": cost(estimator, problem)}
    if x.view is not None:  # a sample that is not in logits
        row |= {name: getattr(x.view, name) for name in ("parameters", "directions", "against")}
    return row | x.ends


def paired(found: Pairs, *, cost: float, base_cost: float, confidence: float) -> dict[str, float]:
    """Columns of what pairs of draws say of V/V', and of V − V' for batches and for rollouts; without those that their tails
    allow no interval of. `relative` reads them."""
    ratio = variance_ratio(found, confidence=confidence)
    out = {"ratio": ratio.value, "ratio_low": ratio.low, "ratio_high": ratio.high}
    for name, c, other in (("gap", 1.0, 1.0), ("gap_of_rollouts", cost, base_cost)):
        scores = found.minus(other / c)
        low, high = interval(scores, confidence=confidence)
        ends = zip(("_low", "", "_high"), (low, scores.mean, high), strict=True)
        out |= {f"{name}{end}": float(x[0]) * c for end, x in ends}
    return {name: x for name, x in out.items() if math.isfinite(x)}


# -- against a reference


def relative(table: pd.DataFrame, *, to: str | None = None) -> pd.DataFrame:
    """The table with each row compared to the reference `to` (default: the first estimator) on the same problem.

    Added: `relative_to`; `ratio`, tr Cov over the reference's; `batches_to_match`, the
    batches that have as much signal for their noise as one batch of the reference (∞ where E ĝ points away from ∇J, NaN
    where ∇J = 0); `rollouts_to_match`, the same in units of the reference's cost; `better` and `break_even`, when its MSE
    is below the reference's and N*; `better_per_rollout` and `break_even_rollouts`, the same for equal numbers of
    rollouts, R*. N* and R* are NaN where there are none.

    Numbers have ends NAME_low and NAME_high, made of the ends of what they are made of: each end takes its inputs at their
    worst, so that it misses only where one of k inputs does, at most k·5% of the time, whatever depends on what (Bonferroni).
    Where the table has the columns of `paired`, which draws in pairs make narrow, V/V' and V − V' are those. So `ratio` holds
    95% of the time, N* and R* (V − V' and both ‖b‖²) at least 85%, `batches_to_match` and `rollouts_to_match` (V/V' and both
    scales) at least 85%; without pairs V and V' are two inputs: 90%, 80%, 80%. Where no bias was found, ‖b‖ is taken to be 0.

    Raises:
        UnknownNameError: no estimator of that name in the table.
    """
    if table.empty:
        return table
    names = list(dict.fromkeys(table["estimator"]))
    reference = names[0] if to is None else to
    if reference not in names:
        raise UnknownNameError("estimator", reference, names, hint=f"Compared are {', '.join(names)}.")
    rows = []
    for _, group in table.groupby("problem", sort=False):
        records = [{str(k): v for k, v in r.items()} for r in group.to_dict("records")]
        floor = ROUNDING * max(r["variance"] for r in records)
        base = next(r for r in records if r["estimator"] == reference)
        for r in records:
            own = {name: x for name, x in r.items() if name not in PAIRED}
            rows.append(own | {"relative_to": reference} | _against(r, base, floor))
    return pd.DataFrame(rows, index=table.index)


def _against(row: Mapping[str, Any], base: Mapping[str, Any], floor: float) -> dict[str, Any]:
    (low, V, high), (base_low, U, base_high) = (_with_ends(r, floor) for r in (row, base))
    k, h = (
        {end: float(r.get(f"scale{end}", r["scale"])) for end in ("_low", "", "_high")} for r in (row, base)
    )  # fmt: skip
    ratio = (_quotient(low, base_high), _quotient(V, U), _quotient(high, base_low))
    if (given := _given(row, "ratio")) is not None:
        ratio = (low, V, high) = given
        base_low = U = base_high = 1.0
    found = {
        "ratio": ratio,
        "batches_to_match": (
            _quotient(noise(k["_high"], low), noise(h["_low"], base_high)),
            _quotient(noise(k[""], V), noise(h[""], U)),
            _quotient(noise(k["_low"], high), noise(h["_high"], base_low)),
        ),
    }
    if row is base:
        found = {name: (x[1],) * 3 for name, x in found.items()}
    price = row["cost"] / base["cost"]
    found["rollouts_to_match"] = tuple(x * price for x in found["batches_to_match"])
    out: dict[str, Any] = {
        f"{name}{end}": x for name, three in found.items() for end, x in zip(("_low", "", "_high"), three, strict=True)
    }
    for better, even, gap, c, d in (
        ("better", "break_even", "gap", 1.0, 1.0),
        ("better_per_rollout", "break_even_rollouts", "gap_of_rollouts", row["cost"], base["cost"]),
    ):
        (low, V, high), (base_low, U, base_high) = (
            [x * y for x in _with_ends(r, floor)] for r, y in ((row, c), (base, d))
        )
        gaps = _given(row, gap) or (low - base_high, V - U, high - base_low)
        out[better], out[even] = break_even((squared_bias(row), U + gaps[1]), (squared_bias(base), U))
        ends = break_even_ends((gaps[0], gaps[2]), _bias_ends(row), _bias_ends(base))
        if low == high and base_low == base_high:  # exact: no wider than rounding
            ends = out[even], out[even]
        out |= {f"{even}_low": ends[0], f"{even}_high": ends[1]}
    return out


def _given(row: Mapping[str, Any], name: str) -> tuple[float, float, float] | None:
    """A number and its ends, where the row has them."""
    low, x, high = (float(row.get(f"{name}{end}", math.nan)) for end in ("_low", "", "_high"))
    return None if math.isnan(low + x + high) else (low, x, high)


def _bias_ends(row: Mapping[str, Any]) -> tuple[float, float]:
    """Ends of ‖b‖²; 0 of what was found unbiased."""
    low, high = (float(row.get(f"bias_{end}", row["bias"])) for end in ("low", "high"))
    return (low**2, high**2) if squared_bias(row) > 0 else (0.0, 0.0)


def break_even_ends(
    gap: tuple[float, float], squares: tuple[float, float], other: tuple[float, float]
) -> tuple[float, float]:
    """The least and the largest N* > 0 with N* (‖b'‖² − ‖b‖²) = V − V', from ends of V − V' and of both ‖b‖²; NaN if there is
    none, or an end is not known."""
    less, most = other[0] - squares[1], other[1] - squares[0]
    if any(map(math.isnan, (*gap, less, most))):
        return math.nan, math.nan
    found = []
    for (low, high), (d, e) in ((gap, (less, most)), ((-gap[1], -gap[0]), (-most, -less))):
        if high > 0 and e > 0:  # both positive, then both negative
            found.append((max(low, 0.0) / e, high / d if d > 0 else math.inf))
    return (min(x for x, _ in found), max(y for _, y in found)) if found else (math.nan, math.nan)


def _with_ends(row: Mapping[str, Any], floor: float) -> tuple[float, float, float]:
    low, V, high = (max(float(row[name]), 0.0) for name in ("variance_low", "variance", "variance_high"))
    return (low, V, high) if floor < V else (0.0, 0.0, 0.0 if low == high else high)


def noise(scale: float, variance: float) -> float:
    """V/κ²: batches, up to the factor ‖∇J‖², until the average has as much signal as noise; ∞ for κ ≤ 0."""
    if math.isnan(scale):
        return math.nan
    return variance / scale**2 if scale > 1e-12 else math.inf


def _quotient(a: float, b: float) -> float:
    if math.isnan(a) or math.isnan(b) or (a == 0 and b == 0) or (math.isinf(a) and math.isinf(b)):
        return math.nan
    return math.inf if b == 0 else a / b


def squared_bias(row: Mapping[str, Any]) -> float:
    """‖b‖² of a line of `pgcheck.compare`, 0 where it was found unbiased."""
    return 0.0 if row["finding"] == "unbiased" else float(row["bias"]) ** 2


def break_even(one: tuple[float, float], other: tuple[float, float]) -> tuple[Better, float]:
    """When ‖b‖² + V/N of `one` = (‖b‖², V) is less than that of `other`, and N*, NaN where there is none.

    Differences below 1e-9 of the larger are none.
    """
    db, dv = (_difference(x, y) for x, y in zip(one, other, strict=True))
    if db == 0 and dv == 0:
        return "same", math.nan
    if db * dv >= 0:  # no worse in both, or no better in both
        return ("always" if db < 0 or dv < 0 else "never"), math.nan
    return ("below" if db > 0 else "above"), -dv / db


def _difference(x: float, y: float) -> float:
    return 0.0 if abs(x - y) <= 1e-9 * max(x, y) else x - y


def mse_curves(table: pd.DataFrame, rollouts: Sequence[float]) -> pd.DataFrame:
    """MSE at budgets of so many rollouts, one row each: ‖b‖² + V c/R, with the ends that those of V give."""
    rows = []
    for record in table.to_dict("records"):
        r = {str(k): v for k, v in record.items()}
        for R in rollouts:
            at = {name: squared_bias(r) + r[f"variance{name}"] * r["cost"] / R for name in ("", "_low", "_high")}
            rows.append({"estimator": r["estimator"], "problem": r["problem"], "rollouts": R}
                        | {f"mse{name}": x for name, x in at.items()})  # fmt: skip
    return pd.DataFrame(rows)


# -- by block of coordinates


def blocks(moments: Moments, problem: Problem, *, space: Space = "logits") -> dict[str, float]:
    """tr Cov ĝ of each block: of the logits of a context, or of a named parameter of the policy. They sum to tr Cov ĝ.

    Raises:
        BudgetError: `space="parameters"` with more logits × parameters than fit.
    """
    if space == "logits":
        per_context = moments.whole_covariance.diagonal().reshape(problem.logits.shape).sum(-1)
        return {f"context {k}": float(v) for k, v in enumerate(per_context)}
    return {name: float((moments.whole_covariance * gram).sum()) for name, gram in _grams(problem).items()}


@functools.lru_cache(maxsize=4)
def _grams(problem: Problem) -> dict[str, Tensor]:
    """(dz/dθ)(dz/dθ)ᵀ of each named parameter: tr of its block of Cov ĝ_θ is Σ Cov ĝ · Gram."""
    named = dict(problem.policy.named_parameters())
    columns = problem.logit_jacobian().split([p.numel() for p in named.values()], dim=-1)
    return {name: J @ J.T for name, J in zip(named, columns, strict=True)}


# -- by step


def step_covariance(estimator: Estimator, problem: Problem, *, budget: int) -> Tensor | None:
    """C[t,u] = tr Cov(ĝ_t, ĝ_u), `[T, T]`, of the parts of ĝ that the coefficients of each position contribute; its sum is
    tr Cov ĝ. None with more than `budget` batches: class counts do not tell positions apart.
    """
    table, sizes = problem.trajectories_with(estimator.needs), problem.sizes
    ordered = estimator.couples != "trajectory" and not row_order_is_free(estimator, problem, table)
    by_couples: dict[str, list[tuple[int, ...]]] = {
        "trajectory": [(1,)], "group": [(g,) for g in sorted(set(sizes))], "batch": [sizes],
    }  # fmt: skip
    plans = by_couples[estimator.couples]
    parts = [Batches(table, plan, ordered) for plan in plans]
    if sum(part.count for part in parts) > budget:
        return None
    B = problem.rows
    if estimator.couples == "trajectory":  # rows of a group share their start: see `pgcheck.engines.exact`
        second, given = _step_products(estimator, table, parts[0])
        q = table.paths.start_probability.clamp(min=1e-300).reshape(-1, 1, 1)
        mean = given.sum(0)
        between = torch.einsum("stc,suc->tu", given / q, given) - mean @ mean.T
        return (second - mean @ mean.T - between) / B + between * sum(g * g for g in sizes) / B**2
    total = torch.zeros(table.paths.steps, table.paths.steps, dtype=torch.float64)
    for plan, part in zip(plans, parts, strict=True):
        second, given = _step_products(estimator, table, part)
        mean = given.sum(0)
        weight = sizes.count(plan[0]) * (plan[0] / B) ** 2 if estimator.couples == "group" else 1.0
        total += weight * (second - mean @ mean.T)
    return total


def _step_products(estimator: Estimator, table: Trajectories, batches: Batches) -> tuple[Tensor, Tensor]:
    """E ⟨ĝ_t, ĝ_u⟩ `[T, T]`, and P(s) E[ĝ_t | s] of the start of the first row, `[starts, T, K·A]`."""
    logits, cells, T = estimator.leaf == "logits", table.contexts * table.actions, table.paths.steps
    to_gradient = gradient_map(table, logits=logits)
    second = torch.zeros(T, T, dtype=torch.float64)
    given = torch.zeros(len(table.paths.start_probability), T, cells, dtype=torch.float64)
    for index, weight in batches.blocks(max(64, 500_000 // (T * cells))):
        c = coefficients_of(estimator, table.batch(index, batches.labels, logits=logits)).to(torch.float64)
        cell = cells_of(table, index, logits=logits).reshape(c.shape)
        step = torch.arange(T).reshape(-1, *[1] * (c.dim() - 3))
        x = torch.zeros(len(index), T * cells, dtype=torch.float64)
        x.scatter_add_(1, (cell + cells * step).flatten(1), c.flatten(1))
        g = x.unflatten(1, (T, cells)) @ to_gradient.T
        wg = weight.reshape(-1, 1, 1) * g
        second += torch.einsum("mtc,muc->tu", wg, g)
        given.index_add_(0, table.paths.start[index[:, 0]], wg)
    return second, given


def step_rows(covariance: Tensor) -> list[dict[str, float]]:
    """A line for each position: `variance` of its own, and `share` of tr Cov ĝ, its covariances with others included."""
    total = float(covariance.sum())
    return [
        {"step": t, "variance": float(row[t]), "share": float(row.sum()) / total if total > 0 else math.nan}
        for t, row in enumerate(covariance)
    ]


# -- by source


def sources(estimator: Estimator, problem: Problem) -> list[dict[str, float]] | None:
    """Σ_τ + Σ_a + Σ_s (Tucker et al., arXiv 1802.10031) of each position's term B c_t ∇log π_t of one row, what the other
    rows do counted with what follows the action; None where it cannot be enumerated (see `contributions`)."""
    rows = contributions(estimator, problem)
    if rows is None:
        return None
    return [{"step": t, **part, "variance": part.pop("steps")} for t, part in enumerate(parts_by_step(rows))]


def approximations(estimator: Estimator, problem: Problem) -> dict[str, float] | None:
    """The variance of one row's Σ_t B c_t ∇log π_t, "none", next to the two approximations of
    `pgcheck.verdicts.quantities.approximate_variance`."""
    rows = contributions(estimator, problem)
    return None if rows is None else {name: rule(rows) for name, rule in APPROXIMATIONS.items()}
