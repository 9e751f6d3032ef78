"""Gradient estimates in θ, seen through a few directions: x = v·ĝ_θ = Σ_(i,t) c[i,t] ∂log π(a_it | k_it)/∂v.

∂logits/∂v of every context is one forward-mode pass of the model, whatever the number of batches and of estimators: an
estimator then costs its coefficients, and a weighted sum of rows of a table. On a task whose contexts can be listed that
pass is made once for a whole run. Where a model writes, contexts are others in every table of rollouts; one backward pass of
each distinct row, times all v, is then less than a forward pass for each v, and as good for every estimator with one
coefficient a row (`pgcheck.engines.parameters`). Others cost backward passes of their own, mapped over draws.

With u = ∇J/‖∇J‖ (where it is known) and D random directions v of independent normal numbers, the coordinates are

    x₀ = ⟨ĝ, u⟩,        x_d = ⟨ĝ − u ⟨ĝ, u⟩, v_d⟩ / √D        so that E_v ⟨x, y⟩ = ⟨ĝ_x, ĝ_y⟩:

what lies along ∇J is exact; across it, the squared length of any one vector (a bias) is seen as ‖b‖² χ²_D/D. So a bias
across ∇J that is orthogonal to all D directions is not seen at all, but that has probability 0: of its length at least
√(χ²_D(β)/D) is seen, .61 for D = 32 and β = 5e-4, but for a chance of β that the directions are unlucky, and verdicts here
are given with a tolerance so much smaller. Whoever knows the seed could hide a bias from them; another seed shows it.

Guarantee: where the model has no forward-mode derivative, backward passes give the same numbers; memory is predicted and
refused before it is taken.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal, TypeVar, cast

import scipy
import torch
from torch import Tensor, nn

from pgcheck.engines.moments import Moments, Progress, View
from pgcheck.engines.monte_carlo import MOST_COORDINATES, Known, Space
from pgcheck.engines.parameters import (
    ParameterSpace,
    as_seen,
    by_draws,
    by_rows,
    kept_for,
    number_of_parameters,
    tightened,
)
from pgcheck.engines.stored import stored
from pgcheck.engines.threads import one_thread
from pgcheck.engines.trusted import BETA, PILOT, Paired, coefficients_on, paired, trusted_estimator, trusted_estimators
from pgcheck.errors import BudgetError, UsageError, names_problem
from pgcheck.estimators.base import Estimator
from pgcheck.generation import MEMORY, Written, draws_at_once
from pgcheck.policies.tabular import in_parts
from pgcheck.policies.transformer import LMPolicy
from pgcheck.problem import Problem
from pgcheck.sampling import Stream
from pgcheck.statistics.sequential import GRAIN, Interval, Settings
from pgcheck.trajectories import Trajectories, is_count

DIRECTIONS = 32
_AT_ONCE = 40  # directions of one forward-mode pass, and
_TOKENS_AT_ONCE = 2048  # tokens: what stays in cache
T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class SketchSpace(Known):
    """x `[count, R]`, the coordinates above: R = D + 1, or D where ∇J is not known or 0.

    Args:
        directions: `[R, P]`, what each coordinate is the product with.
        reference: `[R]`, the coordinates of ∇J; None: not known.
        random: D; the directions before the last D are chosen.
        how: by which passes of the model; None: forward ones where it has them, and backward ones where a model writes: 1 024
            draws of `lm-large/written` take 3.3 s by 33 forward passes, .28 s by backward ones mapped over draws, of one
            estimator, and .20 s by those of its rows, of all whose coefficients do not change within a row.
    """

    problem: Problem
    directions: Tensor
    reference: Tensor | None
    random: int = 0
    how: Literal["forward", "backward"] | None = None

    @classmethod
    def of(
        cls,
        problem: Problem,
        *,
        directions: int = DIRECTIONS,
        seed: int = 0,
        along: Tensor | None = None,
        how: Literal["forward", "backward"] | None = None,
    ) -> SketchSpace:
        """D directions that `seed` and the problem decide, and that of ∇J; or `along` `[P]`, where ∇J is not known.

        Raises:
            UsageError: `directions` is no count.
            BudgetError: the tables do not fit.
        """
        if not is_count(directions):
            raise UsageError(f"directions: {directions!r}; it must be an integer of at least 1.")
        P = number_of_parameters(problem)
        _refuse_if_too_large(problem, directions, P)
        even = Stream(seed, (problem.digest, "sketches")).uniforms(0, directions, P)
        v = torch.special.ndtri(even.clamp(min=2.0**-54)) / math.sqrt(directions)
        g = along if problem.written else problem.parameter_gradient()
        if g is None:
            return cls(problem, v, None, directions, how)
        if not (size := float(g.norm())):
            return cls(problem, v, v.new_zeros(len(v)), directions, how)
        u = (g / size).unsqueeze(0)
        reference = None if problem.written else torch.cat([g.new_tensor([size]), g.new_zeros(len(v))])
        return cls(problem, torch.cat([u, v - (v @ u.T) * u]), reference, directions, how)

    @classmethod
    def paired(cls, problem: Problem, *, directions: int = DIRECTIONS, seed: int = 0, pilot: int = PILOT) -> Paired:
        """As `of`, beside a trusted estimator on the same rollouts (`pgcheck.engines.trusted`).

        Raises:
            UsageError, BudgetError: as `of` and `trusted_estimators`.
        """

        def around(u: Tensor | None) -> SketchSpace:
            return cls.of(problem, directions=directions, seed=seed, along=u)

        return paired(problem, around, seed=seed, pilot=pilot)

    def seen(self, x: Tensor) -> Tensor:
        """The products of a vector `[P]` with the directions."""
        return self.directions @ x

    def shows(self, beta: float) -> float:
        """√(χ²/D) of D degrees of freedom, at its quantile beta: a normal direction sees ⟨b, v⟩ ~ N(0, ‖b‖²)."""
        return min(1.0, math.sqrt(float(scipy.stats.chi2.ppf(beta, self.random)) / self.random)) if self.random else 1.0

    def settings(self, asked: Settings) -> Settings:
        """With a tolerance that allows for what the directions do not see."""
        return tightened(asked, self.shows(asked.beta / 2))

    def view(self, shown: float = 1.0) -> View:
        """Of how many directions."""
        return View(self.reference, self.directions.shape[1], self.random, shown=shown)

    def said(self, moments: Moments, view: View) -> Moments:
        """With the chance of the directions in every interval."""
        return as_seen(_widened(moments, self.random) if self.random else moments, view)

    def told(self, moments: Moments, asked: Settings, e: Estimator) -> Moments:
        """The same."""
        return self.said(moments, self.view(self.shows(asked.beta / 2)))

    @cached_property
    def lane(self) -> Literal["forward", "backward"]:
        """Whether forward passes are to be made, and the policy has a forward-mode derivative."""
        if self.how is not None or self.problem.written:
            return self.how or "backward"
        policy = self.problem.policy
        if isinstance(policy, LMPolicy):
            policy = policy.at(torch.tensor([0]))
        try:
            next(tangents(policy, self.directions[:1]))
        except (RuntimeError, NotImplementedError):  # it was called before, without a tangent, and said nothing
            return "backward"
        return "forward"

    def project(self, c: Tensor, table: Trajectories, index: Tensor) -> Tensor:
        """x `[M, R]` of the batches `index` `[M, B]` with coefficients `c` `[M, B, T]` (`[M, B, T, A]`: on logits)."""
        backward, onto = self.lane == "backward", self._onto.to(c.device)
        if backward or isinstance(table, Written):  # whose contexts are others every time
            x = by_rows(c, table, index, self.problem, self, onto)
            if x is not None:
                return x
        if backward:
            return by_draws(c, table, index, self.problem, onto)
        scores, place = self._scores(table, on_logits=c.dim() == 4)
        weight = c.to(torch.float64).flatten(1)
        return nn.functional.embedding_bag(place[index].flatten(1), scores, mode="sum", per_sample_weights=weight)

    @cached_property
    def _onto(self) -> Tensor:
        return self.directions.T.contiguous()

    def _scores(self, table: Trajectories, *, on_logits: bool) -> tuple[Tensor, Tensor]:
        """∂log π/∂v (`on_logits`: ∂z/∂v) as a table `[C, R]`, and which row of it each position of a rollout has."""
        if isinstance(table, Written):
            name = "logits" if on_logits else "logp"
            return kept_for(self, name, (table,), lambda: self._of_written(table, on_logits))
        device = table.logits.device
        if on_logits:
            return self._listed.flatten(0, 1).to(device), table.logit_cells
        return self._listed_scores.flatten(0, 1).to(device), table.cell

    @cached_property
    def _listed(self) -> Tensor:
        """∂z/∂v of every context of the problem, `[K, A, R]`: once for a whole run."""
        parts = list(tangents(self.problem.policy, self.directions))
        dz = torch.cat([found for _, _, found in parts])
        contexts = [k for k, _, _ in parts if k is not None]
        return dz[torch.cat(contexts).argsort()] if contexts else dz

    @cached_property
    def _listed_scores(self) -> Tensor:
        pi = torch.softmax(self.problem.logits, -1).unsqueeze(1)
        return self._listed - pi @ self._listed

    def _of_written(self, table: Written, on_logits: bool) -> tuple[Tensor, Tensor]:
        """Of the tokens that are in the table, or of all that could be."""
        K, A = table.logits.shape
        context, action = table.paths.context.flatten(), table.paths.action.flatten()
        _refuse_bytes((K * A if on_logits else len(context)) * len(self.directions) * 8, "a table of rollouts")
        out = table.logits.new_zeros(K * A if on_logits else len(context), len(self.directions))
        for contexts, z, dz in tangents(table.policy, self.directions.to(out.device)):
            k = torch.arange(K, device=z.device) if contexts is None else contexts
            if on_logits:
                out.view(K, A, -1)[k] = dz
                continue
            inside = k.new_full((K + 1,), -1)
            inside[k] = torch.arange(len(k), device=k.device)
            here = inside[context]  # padding has context -1, which is the last entry
            hit = here >= 0
            mean = (torch.softmax(z, -1).unsqueeze(1) @ dz).squeeze(1)
            out[hit] = dz[here[hit], action[hit]] - mean[here[hit]]
        place = (
            table.logit_cells if on_logits else torch.arange(len(out), device=out.device).view(table.paths.action.shape)
        )
        return out, place


def tangents(policy: nn.Module, directions: Tensor) -> Iterator[tuple[Tensor | None, Tensor, Tensor]]:
    """Some contexts at a time (None: all), their logits `[k, A]`, and ∂z/∂v of each direction `[R, P]`, `[k, A, R]`."""
    named = {name: p.detach() for name, p in policy.named_parameters()}
    sizes = [p.numel() for p in named.values()]
    v = {
        name: part.reshape(-1, *p.shape)
        for (name, p), part in zip(named.items(), directions.split(sizes, 1), strict=True)
    }
    for rows, contexts in in_parts(policy, tokens=_TOKENS_AT_ONCE):

        def logits(parameters: dict[str, Tensor], rows: tuple[slice, ...] = rows) -> Tensor:
            z: Tensor = torch.func.functional_call(policy, parameters, rows)
            return z

        def along(tangent: dict[str, Tensor], f: object = logits) -> tuple[Tensor, Tensor]:
            return torch.func.jvp(f, (named,), (tangent,))  # type: ignore[arg-type, return-value]

        found = []
        with torch.no_grad(), warnings.catch_warnings():
            # torch reads its own table of forward derivatives with a function that it has deprecated
            warnings.filterwarnings("ignore", message=".*torch.jit.script", category=DeprecationWarning)
            for low in range(0, len(directions), _AT_ONCE):
                some = {name: x[low : low + _AT_ONCE] for name, x in v.items()}
                z, dz = torch.func.vmap(along, out_dims=(None, 0))(some)  # type: ignore[arg-type]
                found.append(dz.detach())
        yield contexts, z, torch.cat(found).permute(1, 2, 0)


def _refuse_bytes(need: int, what: str) -> None:
    if need > MEMORY:
        raise BudgetError(
            f"directions: their derivatives of {what} take {need / 2**30:.1f} GiB; {MEMORY / 2**30:.0f} GiB are allowed. Take"
            " fewer directions."
        )


def _refuse_if_too_large(problem: Problem, directions: int, P: int) -> None:
    _refuse_bytes(directions * P * 8 * 3, f"{P:,} parameters")
    if not problem.written:
        K, A = problem.logits.shape
        _refuse_bytes(2 * K * A * (directions + 1) * 8, f"{K:,} contexts with {A:,} actions")


# -- moments


@dataclass(frozen=True)
class SketchMoments:
    """Moments of ĝ_θ, and of its difference from ∇J, in the coordinates of a sketch; unbiased in both.

    Across ∇J a form vᵀAv of normal numbers has mean tr A and variance 2 tr A²; that of a covariance of effective rank
    r = (tr A)²/tr A² acts like χ² of D·r degrees of freedom over D directions, that of a bias (rank one) is χ² of D. A
    spread between few such numbers would understate their error where they are too small, so it is not used.
    """

    batches: int | None  # None: every batch was enumerated
    along: int  # how many of the coordinates lie along ∇J, 0 or 1; the others are random
    mean: Tensor  # [R]
    covariance: Tensor  # [R, R], of one batch
    bias: Tensor  # [R], the mean of ĝ − ∇J, or of ĝ − r with a trusted estimate r where ∇J is not known
    bias_covariance: Tensor  # [R, R], of one batch
    spread: float  # variance of ‖x − E x‖² over draws

    @property
    def total_variance(self) -> float:
        """tr Cov ĝ_θ of one batch."""
        return float(self.covariance.diagonal().sum())

    @property
    def total_variance_error(self) -> float:
        """Its standard error: of the directions and of the draws."""
        _, across, freedom = self._across
        return math.hypot(across * math.sqrt(2 / freedom), self._drawn)

    def total_variance_interval(self, level: float = 0.95) -> tuple[float, float]:
        """χ² for the directions, normal for the draws; at half of what may be missed each."""
        along, across, freedom = self._across
        missed = (1 - level) / 4
        by_chance = float(scipy.stats.norm.isf(missed)) * self._drawn
        low, high = (across * freedom / float(scipy.stats.chi2.isf(q, freedom)) for q in (missed, 1 - missed))
        return along + low - by_chance, along + high + by_chance

    @property
    def _drawn(self) -> float:
        return math.sqrt(self.spread / self.batches) if self.batches else 0.0

    @property
    def _across(self) -> tuple[float, float, float]:
        """tr Cov along ∇J and across it, and the degrees of freedom of the latter: D·r."""
        S = self.covariance[self.along :, self.along :]
        across = float(S.diagonal().sum())
        return self.total_variance - across, across, len(S) * effective_rank(S)

    @property
    def bias_square(self) -> float:
        """‖E ĝ_θ − ∇_θ J‖²; may be below 0 where it is small."""
        return float(self._bias_squares.sum())

    @property
    def bias_square_error(self) -> float:
        """Its standard error: of the directions and of the draws."""
        n, S, b = self.batches, self.bias_covariance, self.bias
        drawn = 2 * float((S * S).sum()) / n**2 + 4 * max(float(b @ S @ b), 0.0) / n if n else 0.0
        across = self._bias_squares[self.along :]
        return math.sqrt(drawn + 2 / len(across) * max(float(across.sum()), 0.0) ** 2)

    @property
    def _bias_squares(self) -> Tensor:
        return self.bias**2 - (self.bias_covariance.diagonal() / self.batches if self.batches else 0.0)

    def bias_interval(self, level: float = 0.95) -> Tensor:
        """Of the bias along each direction, by Student's t, `[R, 2]`."""
        if self.batches is None:
            return torch.stack([self.bias, self.bias], -1)
        half = (
            float(scipy.stats.t.ppf((1 + level) / 2, self.batches - 1))
            * (self.bias_covariance.diagonal() / self.batches).sqrt()
        )
        return torch.stack([self.bias - half, self.bias + half], -1)


_UNLUCKY = 0.0025  # each end of what directions may do to an interval is left out so often


def _widened(moments: Moments, random: int) -> Moments:
    """Intervals with the chance of the directions in them: χ² of D·r degrees of freedom for tr Cov, of D for a bias."""
    x, R = moments.intervals, moments.mean.numel()
    low, high = (math.sqrt(random / float(scipy.stats.chi2.isf(q, random))) for q in (_UNLUCKY, 1 - _UNLUCKY))
    scaled = {name: _times(x[name], low, high) for name in ("bias", "rel")}
    V = x["variance"]
    cov = moments.covariance
    along = R - random
    held = 0.0 if cov is None else float(cov.diagonal()[:along].sum())
    freedom = random * (1.0 if cov is None else effective_rank(cov[along:, along:]))
    ends = (freedom / float(scipy.stats.chi2.isf(q, freedom)) for q in (_UNLUCKY, 1 - _UNLUCKY))
    least, most = (held + (V.value - held) * end for end in ends)
    variance = Interval(V.value, max(least - (V.value - V.low), 0.0), most + (V.high - V.value))
    b = scaled["bias"]
    mse = Interval(x["mse"].value, b.low**2 + variance.low, b.high**2 + variance.high)
    S = x["snr"]
    shrunk = (
        low * math.sqrt(V.high / variance.high),
        high * math.sqrt(V.low / variance.low) if variance.low else math.inf,
    )
    new = {**x, **scaled, "variance": variance, "mse": mse, "snr": _times(S, *shrunk)}
    told = {κ: replace(j, off_axis=_times(j.off_axis, low, high, most=1.0)) for κ, j in moments.judgements.items()}
    return replace(moments, intervals=new, judgements=told)


def _times(x: Interval, low: float, high: float, *, most: float = math.inf) -> Interval:
    return Interval(x.value, x.low * low, min(x.high * high, most))


def effective_rank(S: Tensor) -> float:
    """r = (tr A)²/tr A² of a covariance A that is seen as S `[D, D]` along D directions; at least 1."""
    D, trace = len(S), float(S.diagonal().sum())
    square = float((S * S).sum() - (S.diagonal() ** 2).sum()) / max(D - 1, 1) * D  # of tr A², from D (D − 1) pairs
    return max(trace**2 / square, 1.0) if square > 0 else 1.0


def default_space(
    problem: Problem,
    *,
    parameters: bool = False,
    directions: int = DIRECTIONS,
    seed: int = 0,
    beta: float = BETA,
    device: str = "cpu",
    reference: Tensor | Path | str | None = None,
    first_look: int = 0,
) -> Space | None:
    """Where sampled verdicts are given: None, in logits, as long as these can be listed and are few, and `parameters` are not
    asked for; else in parameters, as long as those are few; else along directions. Beside a trusted estimator where there is
    one, unless ∇J is known and parameters are asked for; beside stored estimates if a `reference` is given, in parameters.

    Raises:
        UsageError, BudgetError: as `SketchSpace.paired`; as `stored`.
    """
    if reference is None and not parameters and not problem.written and problem.logits.numel() <= MOST_COORDINATES:
        return None
    few = number_of_parameters(problem) <= MOST_COORDINATES

    def around(u: Tensor | None) -> ParameterSpace | SketchSpace:
        if few:
            return ParameterSpace(problem)
        return SketchSpace.of(problem, directions=directions, seed=seed, along=u)

    if reference is not None:
        return cast(Space, stored(reference, problem, around, first_look=first_look))
    if not problem.written and (parameters or not trusted_estimators(problem)):
        return cast(Space, around(None))  # ∇J is known
    return paired(problem, around, seed=seed, beta=beta, device=device)


def exact_in_sketch(moments: Moments, space: SketchSpace) -> SketchMoments:
    """Exact moments in logit space, carried to a sketch: tr Cov ĝ_θ of a model whose dz/dθ does not fit, for D passes.

    Raises:
        UsageError: ∇J of the problem is not known, or there is no forward mode.
    """
    if space.reference is None or space.lane == "backward":
        raise UsageError("space: exact moments need a list of contexts and a policy with a forward-mode derivative.")
    dz = space._listed.flatten(0, 1)
    mean, cov = dz.T @ moments.mean.flatten(), dz.T @ moments.whole_covariance @ dz
    return SketchMoments(
        None, int(len(mean) > 0 and bool(space.reference[0])), mean, cov, mean - space.reference, cov, 0.0
    )


class _Sums:
    """n, mean and scatter of rows, added grain by grain (Chan et al. 1983)."""

    def __init__(self, R: int) -> None:
        self.n, self.mean, self.scatter = 0, torch.zeros(R, dtype=torch.float64), torch.zeros(R, R, dtype=torch.float64)

    def add(self, x: Tensor) -> None:
        n, mean = len(x), x.mean(0)
        centred, gap = x - mean, mean - self.mean
        self.scatter += centred.T @ centred + torch.outer(gap, gap) * (self.n * n / (self.n + n))
        self.mean += gap * (n / (self.n + n))
        self.n += n

    @property
    def covariance(self) -> Tensor:
        return self.scatter / (self.n - 1)


@one_thread()
@names_problem
def sketch_moments(
    estimators: Sequence[Estimator],
    problem: Problem,
    *,
    batches: int,
    directions: int = 32,
    seed: int = 0,
    space: SketchSpace | None = None,
    progress: Progress | None = None,
) -> list[SketchMoments]:
    """Moments of every estimator in one sketch, from the same `batches` draws.

    Raises:
        UsageError: too few batches; where ∇J is not known, no trusted estimator.
        BudgetError: the tables of the sketch do not fit.
        EstimatorError: coefficients that are not finite, or an estimator that needs more than its rows.
    """
    if not is_count(batches) or batches < 2:
        raise UsageError(f"batches: {batches!r}; a variance needs two or more.")
    space = space or SketchSpace.of(problem, directions=directions, seed=seed)
    asked = list(estimators)
    if space.reference is None:
        asked.append(trusted_estimator(problem))
    R = len(space.directions)
    sums, gaps = [_Sums(R) for _ in asked], [_Sums(R) for _ in asked]
    squares = [_Sums(1) for _ in asked]
    centers: list[Tensor] = []
    samplers = {e.needs: problem.sampler(seed=seed, needs=e.needs) for e in asked}
    began = time.monotonic()
    size = min(draws_at_once(s, GRAIN) for s in samplers.values())
    for first in range(0, batches, size):
        drawn = {needs: s.draw(first, min(size, batches - first)) for needs, s in samplers.items()}
        found = []
        for e in asked:
            table, index = drawn[e.needs]
            found.append(space.project(coefficients_on(e, table, index, problem.group_labels), table, index))
        centers = centers or [x.mean(0) for x in found]
        for j, x in enumerate(found):
            sums[j].add(x)
            squares[j].add(((x - centers[j]) ** 2).sum(-1, keepdim=True))
            if space.reference is None:
                gaps[j].add(x - found[-1])
        if progress is not None and time.monotonic() - began > 2.0:
            progress(f"{problem.name}: sketch", min(first + size, batches), batches)
    along = int(space.reference is not None and bool(space.reference[0]))
    out = []
    for total, gap, square in list(zip(sums, gaps, squares, strict=True))[: len(estimators)]:
        known = space.reference is not None
        bias = total.mean - space.reference if space.reference is not None else gap.mean
        spread = float(square.covariance)
        of = total if known else gap
        out.append(SketchMoments(batches, along, total.mean, total.covariance, bias, of.covariance, spread))
    return out
