"""Numbers and statuses: how far E ĝ is from ∇J, and what a check concluded.

For g = ∇J and m = E ĝ:

    rel = ‖m − g‖ / ‖g‖      scale = ⟨m, g⟩ / ‖g‖²      cosine = ⟨m, g⟩ / (‖m‖ ‖g‖)
    off_axis = ‖m − scale · g‖ / ‖m‖      MSE = ‖m − g‖² + tr Cov ĝ      SNR = ‖m‖ / √tr Cov ĝ

and for the parts m_t, g_t that position t contributes (Σ_t m_t = m, Σ_t g_t = g): along = ⟨m_t, g⟩ / ‖g‖², which sums to
`scale`; gap = ‖m_t − g_t‖ / ‖g‖.

Guarantee: an exact verdict is decided at `RTOL` of max(‖g‖, √E‖ĝ‖²), which is never zero unless ĝ is; so a stationary
point (g = 0) is judged like any other. A sampled one is decided by its judges (`pgcheck.statistics.sequential`), and its
numbers are free of the noise that ‖m̂ − g‖² has in it: rel² = ‖m̂ − g‖²/‖g‖² less its expectation at no bias, 0 if
negative. Words about verdicts are written in `pgcheck.render` only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from pgcheck.engines.moments import Moments, View
from pgcheck.errors import UsageError
from pgcheck.estimators.base import ClaimKind, Estimator
from pgcheck.problem import Problem
from pgcheck.statistics.sequential import Interval, Judgement
from pgcheck.statistics.status import Status as Status
from pgcheck.statistics.two_sample import Score, fixed_directions, scores_of
from pgcheck.statistics.variance import Pairs

RTOL = 1e-9
SPREAD = 4  # directions along which the variance of an exact ĝ is told; any change of Cov ĝ moves them

Finding = Literal["unbiased", "proportional", "biased", "inconclusive"]  # the last of samples only
Space = Literal["logits", "parameters"]


@dataclass(frozen=True)
class Direction:
    """Where m = E ĝ points, seen from g; NaN where g = 0 makes a number meaningless."""

    rel: float
    scale: float
    cosine: float
    off_axis: float


def direction(mean: Tensor, gradient: Tensor) -> Direction:
    """The numbers of `mean` against `gradient`, both `[K, A]`."""
    m, g = mean.reshape(-1), gradient.reshape(-1)
    size_m, size_g = float(m.norm()), float(g.norm())
    dot = float(m @ g)
    scale = dot / size_g**2 if size_g > 0 else math.nan
    return Direction(
        rel=float((m - g).norm()) / size_g if size_g > 0 else math.nan,
        scale=scale,
        cosine=dot / (size_m * size_g) if size_m > 0 and size_g > 0 else math.nan,
        off_axis=float((m - scale * g).norm()) / size_m if size_m > 0 and size_g > 0 else math.nan,
    )


@dataclass(frozen=True)
class Step:
    """What one position contributes to m = E ĝ, seen from g; NaN where g = 0."""

    along: float  # ⟨m_t, g⟩ / ‖g‖²
    gap: float  # ‖m_t − g_t‖ / ‖g‖


def along(by_step: Tensor, gradient: Tensor) -> list[float]:
    """⟨x_t, g⟩ / ‖g‖² of parts `[T, K, A]` of a gradient; NaN where g = 0."""
    g = gradient.reshape(-1)
    shares: list[float] = (by_step.reshape(len(by_step), -1) @ g / (g @ g)).tolist()
    return shares


def steps(by_step: Tensor, truth: Tensor, gradient: Tensor) -> tuple[Step, ...]:
    """The numbers of the parts `by_step` against the true ones, both `[T, K, A]`, whose sum is g = `gradient`."""
    gaps = ((by_step - truth).reshape(len(truth), -1).norm(dim=-1) / gradient.norm()).tolist()
    return tuple(Step(a, b) for a, b in zip(along(by_step, gradient), gaps, strict=True))


@dataclass(frozen=True)
class Sampled:
    """What is kept of a sample of ĝ so that another one can be held against it (`pgcheck.statistics.two_sample`)."""

    first: tuple[float, ...]  # ⟨v, mean of the first grain of draws⟩, of every fixed direction
    scores: Mapping[str, Score]  # scale, mse, and v1, v2, …: the fixed directions


@dataclass(frozen=True)
class Measurement:
    """What was measured of one estimator on one problem; no opinion in it but `finding`."""

    estimator: str
    problem: str
    finding: Finding
    rel: float
    scale: float
    cosine: float
    off_axis: float
    bias: float  # ‖E ĝ − g‖
    size: float  # max(‖g‖, √E‖ĝ‖²), what `bias` is judged against
    gradient_norm: float
    total_variance: float
    mse: float
    snr: float
    rows: int  # B
    batches: int | None  # drawn; None: exact
    enumerated: int
    lane: str
    expected: Tensor  # E ĝ [K, A]
    truth: Tensor  # g [K, A]
    worst_step: int | None = None  # the position that contributes most to the bias of the worst context and action
    by_step: tuple[Step, ...] = ()  # one for each position; empty if the engine does not split E ĝ
    seed: int | None = None  # of what was drawn
    intervals: Mapping[str, Interval] = field(default_factory=dict)  # of what was drawn, by the names above; 95%
    judgements: Mapping[float | None, Judgement] = field(default_factory=dict)  # by the κ of E ĝ = κ g
    pairs: Pairs | None = None  # of what was drawn, beside the estimator that it is compared to
    spread: tuple[float, ...] = ()  # Var ⟨ĝ, v⟩ along the first `SPREAD` fixed directions; empty if Cov ĝ is not kept
    sampled: Sampled | None = None  # of what was drawn
    view: View | None = None  # where a sample was taken, if not in logits: `expected` and `truth` are `[1, R]` there

    @property
    def worst(self) -> tuple[int, int]:
        """The (context, action) with the largest bias."""
        gap = (self.expected - self.truth).abs()
        at = int(gap.argmax())
        return at // gap.shape[1], at % gap.shape[1]

    @property
    def ends(self) -> dict[str, float]:
        """NAME_low and NAME_high of rel, scale, bias, variance, mse, snr: the 95% interval; of an exact number, the number."""
        names = ("rel", "scale", "bias", "variance", "mse", "snr")
        exact = {name: self.total_variance if name == "variance" else getattr(self, name) for name in names}
        out = {}
        for name in names:
            x = self.intervals.get(name)
            out[f"{name}_low"], out[f"{name}_high"] = (exact[name],) * 2 if x is None else (x.low, x.high)
        return out

    def distance(self, scale: float) -> float:
        """‖E ĝ − scale · g‖ / max(‖g‖, √E‖ĝ‖²); infinite if anything in it is not a finite number."""
        gap = float((self.expected - scale * self.truth).norm())
        if not (math.isfinite(gap) and math.isfinite(self.size)):
            return math.inf
        if self.size == 0:
            return 0.0 if gap == 0 else math.inf
        return gap / self.size


def measure(
    estimator: Estimator, problem: Problem, moments: Moments, *, rtol: float = RTOL, space: Space = "logits"
) -> Measurement:
    """Judge moments against the truth of the problem.

    `space="parameters"`: E ĝ_θ against ∇_θ J and with tr Cov ĝ_θ, both gradients as `[1, P]`; not split by step. Unbiased in
    logits is unbiased in every parametrisation, so that is what claims are judged in.
    """
    if moments.batches is not None:
        return _measure_sampled(estimator, problem, moments, space)
    g, m, variance = problem.gradient(), moments.mean, moments.total_variance
    split = moments.by_step is not None and space == "logits"
    if space == "parameters":
        g, m = (x.unsqueeze(0) for x in (problem.parameter_gradient(), moments.mean_in_parameters()))
        variance = _variance_in_parameters(problem, moments)
    numbers = {name: getattr(moments, name) for name in ("batches", "enumerated", "lane")}
    if space == "logits":
        numbers["spread"] = _spread(moments)
    found = judged(estimator.name, problem, m, g, variance, rtol=rtol, known=space == "logits", **numbers)
    if not split or moments.by_step is None:
        return found
    by_step = steps(moments.by_step, problem.gradient_by_step(), found.truth)
    return replace(found, worst_step=_worst_step(moments, problem), by_step=by_step)


def _spread(moments: Moments) -> tuple[float, ...]:
    if moments.covariance is None:
        return ()
    v = torch.from_numpy(fixed_directions(moments.mean.numel())[:SPREAD]).to(moments.covariance)
    return tuple(((v @ moments.covariance) * v).sum(1).tolist())


def judged(
    name: str,
    problem: Problem,
    m: Tensor,
    g: Tensor,
    variance: float,
    *,
    rtol: float = RTOL,
    known: bool = True,
    **run: Any,
) -> Measurement:
    """Judge m = E ĝ against g, both of one shape, in logits or in parameters; `variance` is tr Cov ĝ there (not
    `known`: it may be NaN), and `run` says how they were had: batches, enumerated, lane."""
    numbers = direction(m, g)
    # E‖ĝ‖² ≥ ‖E ĝ‖²; said again because a variance of 0 is known to rounding only
    norms = [float(g.norm()), float(m.norm())]
    if known or not math.isnan(variance):  # what is not known makes the tolerance no wider
        norms.append(math.sqrt(max(variance + float((m**2).sum()), 0.0)))
    size = max(norms) if all(map(math.isfinite, norms)) else math.nan  # a NaN must not hide in the maximum
    # Where every return is the same, g is 0 but for rounding, and so may ĝ be: rounding is not judged against rounding.
    rounding = 16 * torch.finfo(g.dtype).eps * problem.reward_size
    if size <= rounding:
        m, g, size = torch.zeros_like(m), torch.zeros_like(g), 0.0
        numbers = direction(m, g)
    bias = float((m - g).norm())
    finding: Finding = "biased"
    if not math.isfinite(size):
        pass  # nothing is within a tolerance that is no number
    elif bias <= rtol * size:
        finding = "unbiased"
    elif numbers.scale > 0 and float((m - numbers.scale * g).norm()) <= rtol * size:
        finding = "proportional"
    return Measurement(
        estimator=name,
        problem=problem.name,
        finding=finding,
        rel=numbers.rel,
        scale=numbers.scale,
        cosine=numbers.cosine,
        off_axis=numbers.off_axis,
        bias=bias,
        size=size,
        gradient_norm=float(g.norm()),
        total_variance=variance,
        mse=bias**2 + variance,
        snr=float(m.norm()) / math.sqrt(variance) if not variance <= 0 else math.inf,
        rows=problem.rows,
        expected=m,
        truth=g,
        **run,
    )


def _measure_sampled(estimator: Estimator, problem: Problem, moments: Moments, space: Space) -> Measurement:
    """The engine's numbers, and the finding of its judges."""
    if space == "parameters":
        raise UsageError('space: "parameters" of a sample; take the exact engine, or the logits.')
    m, x, view = moments.mean, moments.intervals, moments.view
    known = problem.gradient() if view is None else view.reference
    assert known is not None
    g = known.cpu().reshape(m.shape)
    size_g, scale, variance = float(g.norm()), x["scale"].value, moments.total_variance
    # ‖E ĝ‖ without bias, as everything here
    length = math.sqrt(max(float((m**2).sum()) - variance / max(moments.batches or 1, 1), 0.0))
    off_axis = {name: j.off_axis for name, j in moments.judgements.items()}
    intervals = {**x, "off_axis": next(iter(off_axis.values()))} if off_axis else dict(x)
    if view is not None and view.against is not None:  # m has the noise of a difference
        length = abs(scale) * size_g / math.sqrt(max(1 - intervals["off_axis"].value ** 2, 1e-12))
    size = max(size_g, math.sqrt(max(variance + length**2, 0.0)))
    return Measurement(
        estimator=estimator.name,
        problem=problem.name,
        finding=_sampled_finding(moments.judgements),
        rel=x["rel"].value,
        scale=scale,
        cosine=max(-1.0, min(1.0, scale * size_g / length)) if length > 0 else math.nan,
        off_axis=intervals["off_axis"].value,
        bias=x["bias"].value,
        size=size,
        gradient_norm=size_g,
        total_variance=variance,
        mse=x["mse"].value,
        snr=x["snr"].value,
        rows=problem.rows,
        batches=moments.batches,
        enumerated=moments.enumerated,
        lane=moments.lane,
        expected=m,
        truth=g,
        seed=moments.seed,
        intervals=intervals,
        judgements=moments.judgements,
        pairs=moments.pairs,
        sampled=_sampled(moments),
        view=view,
    )


def _sampled(moments: Moments) -> Sampled | None:
    if moments.scores is None or moments.first is None:
        return None
    seen = fixed_directions(len(moments.first)) @ moments.first.cpu().numpy()
    scale, mse, _, *along = scores_of(moments.scores)  # without those about a centre that is a draw's own
    named = {"scale": scale, "mse": mse} | {f"v{i + 1}": x for i, x in enumerate(along)}
    return Sampled(tuple(seen.tolist()), named)


def _sampled_finding(judgements: Mapping[float | None, Judgement]) -> Finding:
    status = {κ: j.status for κ, j in judgements.items()}
    one = status.pop(1.0, Status.FAIL)  # if it was not asked for, only the rest decides
    if one is not Status.FAIL:
        return "unbiased" if one is Status.PASS else "inconclusive"
    if Status.PASS in status.values():
        return "proportional"
    return "biased" if Status.FAIL in status.values() or 1.0 in judgements else "inconclusive"


def _variance_in_parameters(problem: Problem, moments: Moments) -> float:
    """tr Cov ĝ_θ; NaN where it would take a covariance or a Jacobian that does not fit."""
    try:
        return moments.total_variance_by(problem.logit_gram())  # the Gram matrix is made once for all estimators
    except UsageError:
        return math.nan


def _worst_step(moments: Moments, problem: Problem) -> int | None:
    if moments.by_step is None:
        return None
    at = int((moments.mean - problem.gradient()).abs().argmax())
    gap = moments.by_step.flatten(1)[:, at] - problem.gradient_by_step().flatten(1)[:, at]
    return int(gap.abs().argmax())


@dataclass(frozen=True)
class Verdict:
    """What one check concluded of one estimator, on one problem or (problem = "") on a set."""

    estimator: str
    check: str
    problem: str
    status: Status
    measured: float
    allowed: float
    claim: ClaimKind | None = None
    claimed_scale: float | None = None
    numbers: Mapping[str, float] = field(default_factory=dict)
    sample: Judgement | None = None  # of a sampled verdict
    expected: bool = False  # that it is INCONCLUSIVE is what the suite says
    reason: str = ""  # a machine's remark: which tensor, which error; sentences are made in `render`


@dataclass(frozen=True)
class NotAsked:
    """A pair that was not judged, and why; it never counts as passed."""

    estimator: str
    problem: str
    reason: str


def finite_or_none(x: float) -> float | None:
    """For JSON: NaN and infinities have no number there."""
    return x if math.isfinite(x) else None


def as_list(x: Tensor) -> list[list[float]]:
    """A `[K, A]` tensor for JSON."""
    values: list[list[float]] = x.to(torch.float64).tolist()
    return values
