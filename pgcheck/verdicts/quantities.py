"""Quantities: the numbers that decide sentences about policy gradients, each an exact function of what it is given.

A quantity is a function with keyword arguments only; `estimator`, `against` are estimators, `problem`, `other` problems.
Its docstring is its page: the formula, the units, the source.

Guarantee: enumerated in float64, without sampling, to `RTOL` relative to max(1, |number|); Jacobians by central
differences of exact expectations keep that as well.
"""

from __future__ import annotations

import functools
import inspect
import math
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pgcheck.engines.coefficients import coefficients_of, estimates
from pgcheck.engines.declarations import row_order_is_free
from pgcheck.engines.enumeration import Batches
from pgcheck.engines.exact import exact_moments
from pgcheck.engines.moments import Moments
from pgcheck.envs.tabular import TabularMDP
from pgcheck.errors import UnknownNameError, UsageError
from pgcheck.estimators import advantages as adv
from pgcheck.estimators.base import Estimator
from pgcheck.estimators.zoo import Composition, compose
from pgcheck.problem import Problem
from pgcheck.side import OptimalBaselines, score
from pgcheck.truth import value_by_enumeration
from pgcheck.verdicts.verdict import RTOL, Measurement, measure


@dataclass(frozen=True)
class Found:
    """A number, and others that belong next to it."""

    value: float
    beside: Mapping[str, float]


Number = float | Found


@dataclass(frozen=True)
class Quantity:
    """A named function; `parameters` has the type of each argument, `required` those without a default."""

    name: str
    page: str
    fn: Callable[..., Number]
    parameters: Mapping[str, type]
    required: frozenset[str]

    def __call__(self, **arguments: object) -> Found:
        """The number, as `Found`."""
        out = self.fn(**arguments)
        return out if isinstance(out, Found) else Found(out, {})


_QUANTITIES: dict[str, Quantity] = {}


def quantity(fn: Callable[..., Number]) -> Callable[..., Number]:
    """Register a function under its name.

    Raises:
        ValueError: the name is taken, there is no docstring, or an argument is not keyword-only.
    """
    name, page, signature = fn.__name__, inspect.getdoc(fn) or "", inspect.signature(fn)
    keyword = all(p.kind is p.KEYWORD_ONLY for p in signature.parameters.values())
    if name in _QUANTITIES or not page or not keyword:
        raise ValueError(f"quantity '{name}': registered already, or no page, or an argument that is not keyword-only")
    hints = typing.get_type_hints(fn)
    parameters = {p: hints[p] for p in signature.parameters}
    required = frozenset(p for p, x in signature.parameters.items() if x.default is x.empty)
    _QUANTITIES[name] = Quantity(name, page, fn, parameters, required)
    return fn


def registered_quantities() -> dict[str, Quantity]:
    """Every quantity by name."""
    return dict(_QUANTITIES)


def find_quantity(name: str) -> Quantity:
    """The quantity of that name.

    Raises:
        UnknownNameError: no such quantity; suggests the nearest.
    """
    if name not in _QUANTITIES:
        raise UnknownNameError("quantity", name, _QUANTITIES, hint=f"There are: {', '.join(_QUANTITIES)}.")
    return _QUANTITIES[name]


@functools.lru_cache(maxsize=512)
def _moments(estimator: Estimator, problem: Problem) -> Moments:
    return exact_moments([estimator], problem)[0]


def _measured(estimator: Estimator, problem: Problem) -> Measurement:
    return measure(estimator, problem, _moments(estimator, problem))


def _variance(estimator: Estimator, problem: Problem) -> float:
    """tr Cov ĝ, 0 if it is 0 but for rounding: what is divided by it must not become a number."""
    m = _moments(estimator, problem)
    return m.total_variance if m.total_variance > 1e-12 * m.second_moment else 0.0


def _squared_bias(estimator: Estimator, problem: Problem) -> float:
    """‖E ĝ − ∇J‖², 0 if it is 0 but for rounding."""
    m = _measured(estimator, problem)
    return 0.0 if m.finding == "unbiased" else m.bias**2


# -- what E ĝ is


@quantity
def bias(*, estimator: Estimator, problem: Problem) -> Number:
    """‖E ĝ − ∇J‖ / max(‖∇J‖, √E‖ĝ‖²): 0 where it is unbiased, also where ∇J = 0."""
    return _measured(estimator, problem).distance(1.0)


@quantity
def rel(*, estimator: Estimator, problem: Problem) -> Number:
    """‖E ĝ − ∇J‖ / ‖∇J‖."""
    return _measured(estimator, problem).rel


@quantity
def scale(*, estimator: Estimator, problem: Problem) -> Number:
    """⟨E ĝ, ∇J⟩ / ‖∇J‖²: the factor κ of E ĝ = κ ∇J, where it is one. With one prompt of reward 1 or 0, J = p and this
    is the weight w(p) of E ĝ = w(p) ∇p (Davis & Recht, arXiv 2510.13651)."""
    return _measured(estimator, problem).scale


@quantity
def cosine(*, estimator: Estimator, problem: Problem) -> Number:
    """⟨E ĝ, ∇J⟩ / (‖E ĝ‖ ‖∇J‖)."""
    return _measured(estimator, problem).cosine


@quantity
def off_axis(*, estimator: Estimator, problem: Problem) -> Number:
    """The part of E ĝ that is not along ∇J, over ‖E ĝ‖: 0 where all that is wrong is the length of the step."""
    return _measured(estimator, problem).off_axis


@quantity
def component(*, estimator: Estimator, problem: Problem, context: int = 0, action: int = 0) -> Number:
    """(E ĝ)[context, action], in reward per nat of logit."""
    return float(_moments(estimator, problem).mean[context, action])


@quantity
def scale_ratio(*, estimator: Estimator, problem: Problem, other: Problem) -> Number:
    """`scale` on `problem` over `scale` on `other`: how differently two difficulties are weighted."""
    over, under = _measured(estimator, problem).scale, _measured(estimator, other).scale
    return Found(over / under, {"scale": over, "scale on the other": under})


@quantity
def difference(*, estimator: Estimator, against: Estimator, problem: Problem) -> Number:
    """‖E ĝ − E ĝ'‖ / ‖E ĝ'‖ of two estimators on the same problem."""
    a, b = _moments(estimator, problem).mean, _moments(against, problem).mean
    return float((a - b).norm() / b.norm())


@quantity
def scale_against(*, estimator: Estimator, against: Estimator, problem: Problem) -> Number:
    """⟨E ĝ, E ĝ'⟩ / ‖E ĝ'‖²: the length of the step in units of the other's."""
    a, b = _moments(estimator, problem).mean, _moments(against, problem).mean
    return float((a * b).sum() / (b * b).sum())


@quantity
def batchwise_gap(*, estimator: Estimator, against: Estimator, problem: Problem, factor: float = 1.0) -> Number:
    """max over every batch of ‖ĝ − factor · ĝ'‖ / max over every batch of ‖ĝ'‖: 0 if they agree batch by batch."""
    table = problem.trajectories_with((*estimator.needs, *against.needs))
    batches = Batches(table, problem.sizes)
    gap = size = 0.0
    for index, _ in batches.blocks(4096):
        ours, theirs = (estimates(e, table, index, batches.labels) for e in (estimator, against))
        gap = max(gap, float((ours - factor * theirs).norm(dim=-1).max()))
        size = max(size, float(theirs.norm(dim=-1).max()))
    return gap / size


@quantity
def bias_exponent(*, estimator: Estimator, problem: Problem, rows: int, more_rows: int) -> Number:
    """−log(bias₂/bias₁) / log(B₂/B₁) of the bias in direction (`off_axis`), one group of B rows: 1 if it falls as 1/B."""
    first, second = (
        _measured(estimator, problem.with_sampling(groups=1, group_size=b)).off_axis for b in (rows, more_rows)
    )
    if min(first, second) < RTOL:
        raise UsageError(f"estimator '{estimator.name}': has no error of direction on '{problem.name}' to follow.")
    value = -math.log(second / first) / math.log(more_rows / rows)
    return Found(value, {f"off_axis at {rows}": first, f"off_axis at {more_rows}": second})


@quantity
def off_axis_of_fixed_prompts(*, estimator: Estimator, problem: Problem, sizes: list) -> Number:
    """`off_axis` of Σ_s (G_s/B) E ĝ_s against Σ_s (G_s/B) ∇J_s, where a batch has every prompt once, with G_s rows each."""
    env = problem.env
    if not isinstance(env, TabularMDP) or len(sizes) != len(env.starts):
        raise UsageError(
            f"sizes: {sizes!r}; the problem needs an environment, and a group size for each of its starts."
        )
    found = torch.zeros_like(problem.logits)
    truth = torch.zeros_like(found)
    for start, size in zip(env.starts, sizes, strict=True):
        initial = torch.zeros_like(env.initial)
        initial[start] = 1.0
        alone = TabularMDP(
            env.transition, env.reward, initial, horizon=env.horizon, discount=env.discount, terminal=tuple(env.terminal),
            observation=tuple(env.observation), discount_clock=env.discount_clock,
        )  # fmt: skip
        one = replace(problem, env=alone, groups=1, group_size=size)
        found += size * _moments(estimator, one).mean
        truth += size * one.gradient()
    along = float((found * truth).sum() / (truth * truth).sum())
    return float((found - along * truth).norm() / found.norm())


@quantity
def scale_of_mixed_groups(*, estimator: Estimator, problem: Problem) -> Number:
    """`scale` of E[ĝ | not all returns of the group are equal]: what a filter of unanimous groups does to the step
    (dynamic sampling, DAPO, arXiv 2503.14476)."""
    table = problem.trajectories_with(estimator.needs)
    batches = Batches(table, problem.sizes)
    total, kept = torch.zeros(table.contexts * table.actions, dtype=torch.float64), 0.0
    for index, weight in batches.blocks(4096):
        R = table.batch(index, batches.labels).episode_return
        mixed = weight * ((R.amax(-1) - R.amin(-1)) > 1e-12)
        total += mixed @ estimates(estimator, table, index, batches.labels)
        kept += float(mixed.sum())
    g = problem.gradient().reshape(-1)
    return float(total @ g / (g @ g)) / kept


# -- whether it is the gradient of anything


def _jacobian(f: Callable[[Tensor], Tensor], z: Tensor, *, step: float = 1e-2) -> Tensor:
    """∂f/∂z at `z` `[K, A]` for f `[n]`, `[n, K·A]`: central differences of sixth order, so that a step this wide, with
    its little rounding, still leaves about 1e-12."""
    columns = []
    for unit in torch.eye(z.numel(), dtype=z.dtype):
        e = step * unit.reshape(z.shape)
        odd = [f(z + h * e) - f(z - h * e) for h in (1, 2, 3)]
        columns.append((45 * odd[0] - 9 * odd[1] + odd[2]) / (60 * step))
    return torch.stack(columns, -1)


def _field(estimator: Estimator, problem: Problem, logits: Tensor) -> Tensor:
    """E ĝ `[K·A]` at other logits of the policy; a behaviour policy that was given stays, otherwise it moves along."""
    ref = problem.logits if problem.ref_logits is None else problem.ref_logits
    moved = replace(problem, policy=logits, ref_logits=ref)
    return exact_moments([estimator], moved)[0].mean.reshape(-1)


@quantity
def asymmetry(*, estimator: Estimator, problem: Problem) -> Number:
    """‖D − Dᵀ‖ / ‖D + Dᵀ‖ of D = ∂E ĝ/∂z, the Jacobian of the field z ↦ E ĝ over the logits: 0 for the gradient of a
    function, whatever the function (Nota & Thomas, arXiv 1906.07073). Central differences of sixth order."""
    D = _jacobian(lambda z: _field(estimator, problem, z), problem.logits)
    return float((D - D.T).norm() / (D + D.T).norm())


@quantity
def surrogate_gap(
    *, estimator: Estimator, problem: Problem, surrogate: str, low: float = 0.2, high: float = 0.2
) -> Number:
    """‖E ĝ − ∇S‖ / ‖∇S‖ with S(θ) = E_old Σ_{i,t} a_it h(r_it, A_it), r = π_θ/π_old, at fixed π_old, advantage A and
    aggregation weight a; ∇S by autograd through r.

    `surrogate`: "ratio" h = r A (CPI, TRPO, arXiv 1502.05477); "capped" h = r A up to c = 1 + high and c (1 + log(r/c)) A
    above; "clip" h = min(r A, clip(r, 1 − low, 1 + high) A) (PPO, arXiv 1707.06347).
    """
    forms = {"ratio": _ratio_form, "capped": _capped_form, "clip": _clip_form}
    if surrogate not in forms:
        raise UsageError(f"surrogate: {surrogate!r} is not one of {', '.join(forms)}.")
    parts = _composition(estimator)
    table = problem.trajectories_with(estimator.needs)
    p = table.paths
    leaf = problem.logits.requires_grad_(True)
    batches = Batches(table, problem.sizes)
    total = torch.zeros_like(leaf)
    for index, weight in batches.blocks(4096):
        batch = table.batch(index, batches.labels)
        logp = torch.log_softmax(leaf, -1)[p.context.clamp(min=0), p.action.clamp(min=0)][index]
        r = torch.where(batch.mask > 0, (logp - batch.behavior_logp).exp(), torch.zeros_like(logp))
        A = parts.advantage(batch).expand(batch.mask.shape)
        h = forms[surrogate](r, A, low, high) * parts.aggregation(batch) * batch.mask
        (part,) = torch.autograd.grad((weight * h.sum((-1, -2))).sum(), leaf)
        total += part
    return float((_moments(estimator, problem).mean - total).norm() / total.norm())


def _composition(estimator: Estimator) -> Composition:
    if not isinstance(estimator.coefficients, Composition) or estimator.coefficients.penalty is not None:
        raise UsageError(f"estimator '{estimator.name}': its advantage and aggregation cannot be told apart.")
    return estimator.coefficients


def _ratio_form(r: Tensor, A: Tensor, low: float, high: float) -> Tensor:
    return r * A


def _capped_form(r: Tensor, A: Tensor, low: float, high: float) -> Tensor:
    c = 1.0 + high
    return torch.where(r <= c, r, c * (1.0 + (r.clamp(min=c) / c).log())) * A


def _clip_form(r: Tensor, A: Tensor, low: float, high: float) -> Tensor:
    return torch.minimum(r * A, r.clamp(1.0 - low, 1.0 + high) * A)


# -- variance


@quantity
def total_variance(*, estimator: Estimator, problem: Problem) -> Number:
    """tr Cov ĝ of one batch, over the [K, A] logits. Where one context has two actions, the two coordinates are ± the
    same number: twice the variance in the one logit difference."""
    return _moments(estimator, problem).total_variance


@quantity
def variance_ratio(*, estimator: Estimator, against: Estimator, problem: Problem) -> Number:
    """tr Cov ĝ / tr Cov ĝ' on the same problem."""
    a, b = _variance(estimator, problem), _variance(against, problem)
    return Found(a / b, {"variance": a, "the other's": b})


@quantity
def mse_ratio(*, estimator: Estimator, against: Estimator, problem: Problem, batches: int = 1) -> Number:
    """(‖bias‖² + tr Cov/n) / (the same of the other), after averaging n batches."""
    a, b = (_squared_bias(e, problem) + _variance(e, problem) / batches for e in (estimator, against))
    return Found(a / b, {"MSE": a, "the other's": b})


@quantity
def break_even(*, estimator: Estimator, against: Estimator, problem: Problem) -> Number:
    """N* = (Var' − Var) / (‖bias‖² − ‖bias'‖²): with fewer batches than N*, `estimator`, more biased and quieter, has the
    lower MSE."""
    louder = _variance(against, problem) - _variance(estimator, problem)
    return louder / (_squared_bias(estimator, problem) - _squared_bias(against, problem))


@dataclass(frozen=True)
class Contributions:
    """x_t = B c_t ∇log π_t of every row of every batch, a row a batch where rows are independent; `chance` sums to 1."""

    x: Tensor  # [N, T, K·A]
    c: Tensor  # [N, T], B c_t
    s: Tensor  # [N, T, K·A], ∇log π_t
    chance: Tensor  # [N]
    state: Tensor  # [N, T], -1 where the policy does not act
    action: Tensor  # [N, T]

    def mean(self, x: Tensor) -> Tensor:
        return torch.einsum("n,n...->...", self.chance, x)

    def variance(self, x: Tensor) -> float:
        """tr Cov of `x` `[N, K·A]`."""
        return float(self.mean((x**2).sum(-1)) - (self.mean(x) ** 2).sum())


@functools.lru_cache(maxsize=16)
def contributions(estimator: Estimator, problem: Problem, *, most: int = 5_000_000) -> Contributions | None:
    """Of a row of a batch, any of them with equal chance. None where coefficients weigh every action's logit, or where
    rows are coupled and there would be more than `most` numbers."""
    table, coupled = problem.trajectories_with(estimator.needs), estimator.couples != "trajectory"
    ordered = coupled and not row_order_is_free(estimator, problem, table)
    batches = Batches(table, problem.sizes if coupled else (1,), ordered)
    B, p = len(batches.labels), table.paths
    numbers = batches.count * B * p.steps * table.contexts * table.actions
    if estimator.leaf == "logits" or (coupled and numbers > most):
        return None
    blocks = list(batches.blocks(4096))
    index, chance = (torch.cat(column) for column in zip(*blocks, strict=True))
    c = torch.cat([coefficients_of(estimator, table.batch(i, batches.labels)) for i, _ in blocks]).flatten(0, 1) * B
    rows, s = index.flatten(), score(table)
    s = s[rows]
    return Contributions(
        c.unsqueeze(-1) * s, c, s, chance.repeat_interleave(B) / B, p.state[rows], p.action[rows]
    )  # fmt: skip


def _contributions(estimator: Estimator, problem: Problem) -> Contributions:
    coupled = estimator.couples != "trajectory"
    found = None if coupled else contributions(estimator, problem)
    if found is None:
        why = "its rows are coupled" if coupled else "it weighs actions that were not drawn"
        raise UsageError(f"estimator '{estimator.name}': this quantity is about single rollouts, and {why}.")
    return found


def _exact(rows: Contributions) -> float:
    return rows.variance(rows.x.sum(1))


def _without_cross_terms(rows: Contributions) -> float:
    return sum(rows.variance(rows.x[:, t]) for t in range(rows.x.shape[1]))


def _independent(rows: Contributions) -> float:
    product = rows.mean((rows.s**2).sum(-1)) * rows.mean(rows.c**2)  # [T]
    return float(product.sum() - (rows.mean(rows.x) ** 2).sum())


APPROXIMATIONS = {"none": _exact, "no cross terms": _without_cross_terms, "independent": _independent}


def _approximation(name: str) -> Callable[[Estimator, Problem], float]:
    if name not in APPROXIMATIONS:
        raise UsageError(f"approximation: {name!r} is not one of {', '.join(APPROXIMATIONS)}.")
    return lambda estimator, problem: APPROXIMATIONS[name](_contributions(estimator, problem))


@quantity
def approximate_variance(*, estimator: Estimator, problem: Problem, approximation: str) -> Number:
    """The variance of one rollout's Σ_t c_t ∇log π_t as it is approximated, over the exact one.

    "no cross terms": Σ_t Var(c_t ∇log π_t). "independent": Σ_t (E‖∇log π_t‖² E c_t² − ‖E c_t ∇log π_t‖²).
    """
    found, exact = (_approximation(name)(estimator, problem) for name in (approximation, "none"))
    return Found(found / exact, {"approximation": found, "exact": exact})


@quantity
def rank_agreement(*, estimator: Estimator, against: Estimator, problem: Problem, approximation: str) -> Number:
    """(v − v')/max(v, v') · (u − u')/max(u, u'), v the exact variances of two estimators and u the approximate ones
    (`approximate_variance`): positive if the approximation ranks the two as the exact variance does."""
    v, u = ([_approximation(name)(e, problem) for e in (estimator, against)] for name in ("none", approximation))
    value = (v[0] - v[1]) / max(v) * (u[0] - u[1]) / max(u)
    return Found(value, {"exact": v[0], "the other's": v[1], "approximation": u[0], "the other's approximation": u[1]})


@quantity
def optimal_constant_identity(*, problem: Problem, baseline: float) -> Number:
    """(Var(b) − Var(b*)) / (E‖S‖² (b − b*)²) for (R − b) S of one rollout, b* = E[‖S‖²R]/E[‖S‖²]: 1 for every b
    (Greensmith, Bartlett & Baxter 2004)."""
    best = Estimator(
        "R − b*", compose(adv.return_minus(adv.side_column("optimal_constant"))), "trajectory", needs=(OptimalBaselines(),)
    )  # fmt: skip
    other = Estimator("R − b", compose(lambda batch: (batch.episode_return - baseline).unsqueeze(-1)), "trajectory")
    rows = _contributions(other, problem)
    b_star = float(problem.trajectories_with(best.needs).side["optimal_constant"][0])
    size = float(rows.mean((rows.s.sum(1) ** 2).sum(-1)))
    return (_exact(rows) - _exact(_contributions(best, problem))) / (size * (baseline - b_star) ** 2)


PARTS = ("rollout", "action", "state")


def parts_by_step(rows: Contributions) -> list[dict[str, float]]:
    """Σ_τ, Σ_a and Σ_s of each position's x_t, and `steps`, Var(x_t), which is their sum."""
    out = []
    for t in range(rows.x.shape[1]):
        x, s, a = rows.x[:, t], rows.state[:, t], rows.action[:, t]
        given_both, given_state = rows_mean(x, rows.chance, s, a), rows_mean(x, rows.chance, s)
        out.append({
            "rollout": float(rows.mean(((x - given_both) ** 2).sum(-1))),
            "action": float(rows.mean(((given_both - given_state) ** 2).sum(-1))),
            "state": float(rows.mean(((given_state - rows.mean(x)) ** 2).sum(-1))),
            "steps": rows.variance(x),
        })  # fmt: skip
    return out


def _parts(estimator: Estimator, problem: Problem) -> dict[str, float]:
    by_step = parts_by_step(_contributions(estimator, problem))
    return {name: sum(step[name] for step in by_step) for name in (*PARTS, "steps")}


def rows_mean(x: Tensor, weight: Tensor, *keys: Tensor) -> Tensor:
    """E[x | keys] at every row: `x` `[n, d]`, `weight` `[n]`, integer keys `[n]`."""
    _, index = torch.unique(torch.stack(keys, -1), dim=0, return_inverse=True)
    n = int(index.max()) + 1
    total = torch.zeros(n, dtype=x.dtype).index_add_(0, index, weight)
    mean = torch.zeros(n, x.shape[1], dtype=x.dtype).index_add_(0, index, weight.unsqueeze(-1) * x)
    return (mean / total.where(total > 0, torch.ones_like(total)).unsqueeze(-1))[index]


@quantity
def variance_share(*, estimator: Estimator, problem: Problem, part: str) -> Number:
    """One part of Σ_t Var(x_t), x_t = c_t ∇log π_t of one rollout, over the whole; Var = Σ_τ + Σ_a + Σ_s (Tucker et al.,
    arXiv 1802.10031): "rollout" E Var(x|s,a), "action" E Var(E[x|s,a] | s), "state" Var E[x|s]; "all" their sum."""
    found = _parts(estimator, problem)
    named = found | {"all": sum(found[p] for p in PARTS)}
    if part not in named or part == "steps":
        raise UsageError(f"part: {part!r} is not one of {', '.join(PARTS)}, all.")
    return Found(named[part] / found["steps"], {p: found[p] for p in PARTS})


@quantity
def variance_part_change(*, estimator: Estimator, against: Estimator, problem: Problem, part: str) -> Number:
    """How much of one part of `variance_share` two estimators differ in, over the whole variance of the second."""
    if part not in PARTS:
        raise UsageError(f"part: {part!r} is not one of {', '.join(PARTS)}.")
    a, b = _parts(estimator, problem), _parts(against, problem)
    return Found((a[part] - b[part]) / b["steps"], {"its": a[part], "the other's": b[part]})


# -- scores and weights


@quantity
def mean_score(*, problem: Problem) -> Number:
    """max over t and s of ‖E[∇log π(a_t|k_t) | s_t = s]‖ under the policy that draws the batches."""
    table = problem.trajectories
    p, s = table.paths, score(table)
    chance = table.behavior_probability * p.start_probability[p.start]
    return max(float(rows_mean(s[:, t], chance, p.state[:, t]).norm(dim=-1).max()) for t in range(p.steps))


@quantity
def dynamics_gap(*, problem: Problem) -> Number:
    """max over rollouts of ‖∇_z log p(τ) − Σ_t ∇log π(a_t|k_t)‖, ∇ log p by central differences of the probability of the
    rollout, the environment's part included: 0 if the dynamics drop out."""
    found = _jacobian(lambda z: replace(problem, policy=z).trajectories.probability.log(), problem.logits)
    return float((found - score(problem.trajectories).sum(1)).norm(dim=-1).max())


def _weights(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """P_old of each rollout that it can draw `[n]`, its ratios `[n, T]` (1 where nobody acts), and w `[n]`."""
    table = problem.trajectories
    p = table.paths
    chance = table.behavior_probability * p.start_probability[p.start]
    drawn = chance > 0
    r = (table.logp - table.behavior_logp)[drawn].exp()
    return chance[drawn], r, r.prod(-1)


@quantity
def mean_weight(*, problem: Problem) -> Number:
    """E_old[w], w = Π_t π/π_old: 1, or what the old policy can still draw of the policy."""
    chance, _, w = _weights(problem)
    return float(chance @ w)


@quantity
def second_moment_of_weight(*, problem: Problem) -> Number:
    """E_old[w²] = exp(D₂(π‖π_old)), D₂ the Rényi divergence of order 2 in nats: the effective sample size is 1/E[w²] of
    the rows (Kong 1992; Metelli et al., arXiv 1809.06098)."""
    chance, _, w = _weights(problem)
    return float(chance @ w**2)


@quantity
def chi_square_product(*, problem: Problem) -> Number:
    """Π_t (1 + χ²_t) / E_old[w²], with 1 + χ²_t = E_old[r_t²] of each step on its own: 1 where χ² does not depend on the
    state."""
    chance, r, w = _weights(problem)
    product, exact = float((chance @ r**2).prod()), float(chance @ w**2)
    return Found(product / exact, {"product": product, "E[w²]": exact})


@quantity
def chi_square_recursion(*, problem: Problem) -> Number:
    """E_{s₀} U_0(s₀) / E_old[w²] with the backward recursion U_t(s) = Σ_a π(a|s)²/π_old(a|s) Σ_s' P(s'|s,a) U_{t+1}(s'),
    U = 1 at the end."""
    env = problem.env
    if not isinstance(env, TabularMDP):
        raise UsageError("problem: the recursion needs an environment; this problem is a table of rollouts.")
    of_state = torch.arange(env.states) if problem.contexts is None else torch.tensor(list(problem.contexts))
    behavior = problem.logits if problem.behavior_logits is None else problem.behavior_logits
    pi, old = (torch.softmax(z, -1)[of_state] for z in (problem.logits, behavior))
    weight = torch.where(old > 0, pi**2 / old.clamp(min=1e-300), torch.zeros_like(pi))
    for s in env.observation:
        weight[s] = torch.eye(env.actions, dtype=weight.dtype)[0]
    over = torch.tensor([s in env.terminal for s in range(env.states)])
    U = torch.ones(env.states, dtype=torch.float64)
    for _ in range(env.horizon):
        ahead = (torch.nan_to_num(env.transition) * U).sum(-1)
        U = torch.where(over, torch.ones_like(U), (weight * ahead).sum(-1))
    chance, _, w = _weights(problem)
    return float(env.initial @ U) / float(chance @ w**2)


@quantity
def truncation_bound(*, estimator: Estimator, problem: Problem, cap: float) -> Number:
    """‖bias‖ / (‖f‖∞ E_π[(1 − cap/w)₊]) for min(w, cap) f, f = Σ_t A_t ∇log π_t of one rollout with the estimator's own
    advantage: at most 1, as bias = −E_π[(1 − cap/w)₊ f] (Ionides 2008)."""
    parts = _composition(estimator)
    table = problem.trajectories
    p = table.paths
    chance = table.probability * p.start_probability[p.start]
    A = parts.advantage(table.rows_as_batch()).expand(p.mask.shape) * p.mask
    largest = float((A.unsqueeze(-1) * score(table)).sum(1).norm(dim=-1).max())
    w = (table.logp - table.behavior_logp).sum(-1).exp()
    lost = float(chance @ (1.0 - cap / w).clamp(min=0.0))
    bias = _measured(estimator, problem).bias
    return Found(bias / (largest * lost), {"bias": bias, "bound": largest * lost})


# -- in the parameters of a policy


@quantity
def parameter_bias(*, estimator: Estimator, problem: Problem) -> Number:
    """‖E ĝ_θ − ∇_θ J‖ / ‖∇_θ J‖ in all parameters of the policy, one backward pass each: (dz/dθ)ᵀ E ĝ, (dz/dθ)ᵀ ∇_z J."""
    g, m = problem.parameter_gradient(), _moments(estimator, problem).mean_in_parameters()
    size = float(g.norm())
    along = float(m @ g) / size**2
    return Found(
        float((m - g).norm()) / size,
        {"scale": along, "cosine": along * size / float(m.norm()), "parameters": float(len(g))},
    )


@quantity
def directional_gap(*, problem: Problem, directions: int) -> Number:
    """max over random directions v of |v·∇_θ J − ∂J/∂v| / ‖∇_θ J‖_v, ∂J/∂v by central differences of fourth order of J at
    θ + h v. Each parameter moves in proportion to the root mean square of its tensor, seeded; ‖·‖_v is the standard deviation
    of v·∇_θ J over v."""
    policy, paths = problem.policy, problem.trajectories.paths
    named = {name: p.detach() for name, p in policy.named_parameters()}
    gradient = dict(zip(named, problem.parameter_gradient().split([p.numel() for p in named.values()]), strict=True))
    rms = {name: p.square().mean().sqrt() for name, p in named.items()}
    size = math.sqrt(sum(float(rms[name]) ** 2 * float(g.square().sum()) for name, g in gradient.items()))
    h, worst = 1e-4, 0.0

    def value(v: Mapping[str, Tensor], step: float) -> float:
        moved = {name: torch.add(p, v[name], alpha=step) for name, p in named.items()}
        with torch.no_grad():
            return float(value_by_enumeration(paths, torch.func.functional_call(policy, moved, ())))

    for seed in range(directions):
        generator = torch.Generator().manual_seed(seed)
        v = {name: torch.randn(p.shape, generator=generator).to(p) * rms[name] for name, p in named.items()}
        near, far = (value(v, k * h) - value(v, -k * h) for k in (1, 2))
        slope = sum(float(v[name].reshape(-1) @ g) for name, g in gradient.items())
        worst = max(worst, abs((8 * near - far) / (12 * h) - slope))
    return Found(worst / size, {"‖∇J‖_v": size})
