"""`Estimator`: coefficients of ∇log π, what they may look at, and what is claimed of them.

    ĝ = Σ_{i,t} c[i,t] ∇ log π(a_it | k_it),        c = coefficients(batch), [..., B, T]

**Sign**: coefficients ascend J. Losses are minimised, so a loss gives c = −∂loss/∂logp. **The batch average is inside
c**: ĝ is the estimate of the whole batch, so REINFORCE over B rows has c = R_i / B.

Guarantee: a name is registered once; a claim is data and is tested in both directions (an entry that claims bias and
turns out unbiased fails as well).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import Tensor

from pgcheck.batch import Batch
from pgcheck.errors import EstimatorError, UnknownNameError, UsageError
from pgcheck.problem import Problem
from pgcheck.trajectories import SideTable

Coefficients = Callable[[Batch], Tensor]
# Batch [..., B, T] -> c [..., B, T], or [..., B, T, A] (with leaf="logits": weight on every action's logit). One that has a
# second function `factored` beside it is asked for that by the engines, which mask by themselves: Batch -> (number, tensor),
# whose product is c where mask is 1.

Couples = Literal["trajectory", "group", "batch"]
# What one coefficient may look at: its own row, its own group, everything.
COUPLES: tuple[Couples, ...] = ("trajectory", "group", "batch")

Leaf = Literal["logp", "logits"]
ClaimKind = Literal["unbiased", "proportional", "biased"]


@dataclass(frozen=True)
class Condition:
    """A fact of the problem under which a claim is made."""

    name: str
    holds: Callable[[Problem], bool]


on_policy = Condition("on-policy", lambda p: p.on_policy)
off_policy = Condition("off-policy", lambda p: not p.on_policy)
full_support = Condition("full support", lambda p: p.full_support)
broken_support = Condition("broken support", lambda p: not p.full_support)
undiscounted = Condition("γ = 1", lambda p: p.discount == 1.0)
discounted = Condition("γ < 1", lambda p: p.discount < 1.0)
one_start = Condition("one start", lambda p: p.one_start)
several_starts = Condition("several starts", lambda p: not p.one_start)
binary_return = Condition("0/1 returns", lambda p: p.binary_return)
fixed_length = Condition("equal lengths", lambda p: p.fixed_length)
ragged = Condition("unequal lengths", lambda p: not p.fixed_length)
one_decision = Condition("one decision", lambda p: p.most_decisions == 1)

# which objective a claim is about; a claim with none of them is about whatever the problem's is
return_alone = Condition("return alone", lambda p: p.plain_objective)
kl_penalty = Condition("return − β KL", lambda p: p.kl_coefficient != 0 and p.entropy_coefficient == 0)
entropy_bonus = Condition("return + α entropy", lambda p: p.entropy_coefficient != 0 and p.kl_coefficient == 0)
OBJECTIVES = (return_alone, kl_penalty, entropy_bonus)


@dataclass(frozen=True)
class Claim:
    """What is claimed of E ĝ on the problems that meet every condition.

    `unbiased`: E ĝ = ∇J on each of them. `proportional`: E ĝ = κ ∇J on each, with `scale` κ (a number, a function of
    the problem, or None for "some κ > 0"). `biased`: E ĝ ≠ ∇J on at least one; `reason` says why.
    """

    kind: ClaimKind
    conditions: tuple[Condition, ...] = ()
    scale: float | Callable[[Problem], float] | None = None
    reason: str = ""

    def applies(self, problem: Problem) -> bool:
        """Every condition holds."""
        return all(c.holds(problem) for c in self.conditions)

    def scale_on(self, problem: Problem) -> float | None:
        """κ on this problem; None if the claim leaves it open."""
        if self.kind == "unbiased":
            return 1.0
        return self.scale(problem) if callable(self.scale) else self.scale


def of_return(*claims: Claim) -> tuple[Claim, ...]:
    """The claims; those that name no objective are about the return alone."""
    return tuple(
        c if any(x in OBJECTIVES for x in c.conditions) else replace(c, conditions=(*c.conditions, return_alone))
        for c in claims
    )


def unbiased(*conditions: Condition) -> Claim:
    """E ĝ = ∇J."""
    return Claim("unbiased", conditions)


def proportional(
    scale: float | Callable[[Problem], float] | None = None, *conditions: Condition, reason: str = ""
) -> Claim:
    """E ĝ = κ ∇J with κ = `scale`; without it, for some κ > 0.

    Raises:
        UsageError: a scale that is neither a number nor a function of the problem.
    """
    if not (scale is None or callable(scale) or isinstance(scale, (int, float))):
        raise UsageError(f"scale: {scale!r}; expected a number, or a function of the problem.")
    return Claim("proportional", conditions, scale, reason)


def biased(reason: str, *conditions: Condition) -> Claim:
    """E ĝ ≠ ∇J on at least one problem."""
    return Claim("biased", conditions, reason=reason)


@dataclass(frozen=True)
class Estimator:
    """A policy-gradient estimator.

    Args:
        name: as in reports and on the command line.
        coefficients: c of a batch; must not depend on the order of rows within a group, or of groups.
        couples: what one coefficient may look at; the engine verifies it before it relies on it.
        claims: what is true of its expectation.
        formula: ĝ in one line.
        reference: paper and equation.
        about: what to know about it.
        min_group_size: smaller groups are not asked of it; default 2 where rows are coupled, 1 where they are not.
            A statistic over the whole batch may say 1: it needs two rows, not two in a group.
        needs: side tables beyond the rows (`pgcheck.side`).
        reads: what a coefficient reads of *other* rows, of "return" and "length"; lets a large group be enumerated by
            class counts. Default: unknown, everything.
        leaf: `"logits"` if the coefficients are `[..., B, T, A]`, weights on every action's logit.
        shift_invariant: ĝ does not move when the same constant is added to every row's return.
        on_policy_limit: name of the estimator it equals, row by row, when the batch is on-policy.
        same_as: name of the estimator whose implementation it is: the same estimate from every batch.
        weight: the importance weight of each row `[..., B]`, if it has one; E_behavior[w] = 1 is then checked.
    """

    name: str
    coefficients: Coefficients
    couples: Couples
    claims: tuple[Claim, ...] = ()
    formula: str = ""
    reference: str = ""
    about: str = ""
    min_group_size: int = field(default=0)
    needs: tuple[SideTable, ...] = ()
    reads: tuple[str, ...] | None = None
    leaf: Leaf = "logp"
    shift_invariant: bool = False
    on_policy_limit: str | None = None
    same_as: str | None = None
    weight: Callable[[Batch], Tensor] | None = None

    def __post_init__(self) -> None:
        if self.couples not in COUPLES:
            raise EstimatorError(f"couples: {self.couples!r} is not one of {', '.join(COUPLES)}.")
        if self.leaf not in ("logp", "logits"):
            raise EstimatorError(f"leaf: {self.leaf!r} is not one of logp, logits.")
        if not isinstance(self.claims, tuple) or not all(isinstance(claim, Claim) for claim in self.claims):
            raise EstimatorError(f"claims: {self.claims!r}; expected a tuple of claims, such as (pgcheck.unbiased(),).")
        if self.min_group_size == 0:
            object.__setattr__(self, "min_group_size", 1 if self.couples == "trajectory" else 2)

    def fits(self, problem: Problem) -> bool:
        """Whether the problem's groups (and, for coupled rows, its batches) are large enough to ask."""
        return min(problem.sizes) >= self.min_group_size and (self.couples == "trajectory" or problem.rows >= 2)


def from_coefficients(
    fn: Coefficients,
    *,
    couples: Couples = "batch",
    name: str | None = None,
    claims: tuple[Claim, ...] | None = None,
    **settings: Any,
) -> Estimator:
    """An estimator from a function `Batch [..., B, T] -> c [..., B, T]` (ascent direction, batch average inside).

    Without `claims` it is taken to claim `unbiased()`.
    """
    return Estimator(
        name=name or str(getattr(fn, "__name__", "estimator")),
        coefficients=fn,
        couples=couples,
        claims=(unbiased(),) if claims is None else claims,
        **settings,
    )


# -- the registry

_ESTIMATORS: dict[str, Estimator] = {}
_ALIASES: dict[str, str] = {}


def register(estimator: Estimator, *aliases: str) -> Estimator:
    """Add a named estimator.

    Raises:
        EstimatorError: a name is taken, or the entry has no claim, formula or reference.
    """
    for name in (estimator.name, *aliases):
        if name in _ESTIMATORS or name in _ALIASES:
            raise EstimatorError(f"estimator '{name}' is registered already; choose another name.")
    for what in ("claims", "formula", "reference", "about"):
        if not getattr(estimator, what):
            raise EstimatorError(f"estimator '{estimator.name}': {what} is empty; a registered entry states it.")
    _ESTIMATORS[estimator.name] = estimator
    _ALIASES.update(dict.fromkeys(aliases, estimator.name))
    return estimator


def registered_estimators() -> dict[str, Estimator]:
    """Every registered estimator by name, in order of registration."""
    return dict(_ESTIMATORS)


def find_estimator(name: str) -> Estimator:
    """The registered estimator of that name or alias.

    Raises:
        UnknownNameError: no such estimator; suggests the nearest.
    """
    found = _ESTIMATORS.get(_ALIASES.get(name, name))
    if found is None:
        hint = "`pgcheck list estimators` shows them all; your own is pkg.mod:function."
        raise UnknownNameError("estimator", name, [*_ESTIMATORS, *_ALIASES], hint=hint)
    return found
