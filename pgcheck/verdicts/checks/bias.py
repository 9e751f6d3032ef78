"""Claims about ĝ: about its mean, judged on moments (`unbiased`, `proportional`, `biased`); that it is another's
(`same_as`); and the finiteness of every coefficient.

A claim holds over a set of problems: `unbiased` and `proportional` on every problem that meets its conditions, `biased`
on at least one (every bias vanishes somewhere). Both directions are tested: an entry that claims bias fails if none is
found.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from pgcheck.estimators.base import Claim, Estimator, find_estimator
from pgcheck.problem import Problem
from pgcheck.verdicts.checks.base import SAME, add_check, check, estimates_gap
from pgcheck.verdicts.verdict import RTOL, Measurement, Status, Verdict

add_check(
    "unbiased",
    "bias",
    """E ĝ = ∇J, in logit space, on every problem that meets the claim's conditions.

    What it does: enumerates every batch, sums the estimates weighted by probability, and compares with the exact
    gradient. Judged at 1e-9 of max(‖∇J‖, √E‖ĝ‖²): there is no sampling error, so no luck.
    Why it matters: a bias does not average out. It is the part of the error that more data cannot remove, and its
    direction decides what is learned in the end. Unbiased in logit space means unbiased under every parametrisation.
    Example: leave-one-out (RLOO) passes; with the own return in the baseline it fails, with scale (B−1)/B.
        def loss(batch):
            r = batch.episode_return
            return -((r - r.mean())[:, None] * batch.logp * batch.mask).sum(-1).mean()
    What to do: read `scale` and `off_axis`. off_axis = 0: the direction is right and only the step size is off. Else
    look at what the coefficient of a row may not depend on: its own later actions, its own return, its own length.
    References: Williams 1992; Sutton et al. 2000, theorem 1.""",
    None,
    asked="of estimators that claim it",
)
add_check(
    "proportional",
    "bias",
    """E ĝ = κ ∇J, with the κ that is claimed, or some κ > 0 if none is.

    What it does: the same enumeration as `unbiased`, compared with κ ∇J.
    Why it matters: a constant factor is a learning rate; a factor that changes from prompt to prompt is a new objective.
    Example: subtracting the batch mean gives κ = (B−1)/B exactly; dividing by the batch's std as well gives no κ at all.
        def my_loss(batch):
            r = batch.episode_return
            adv = (r - r.mean()) / (r.std() + 1e-6)
            return -(adv[:, None] * batch.logp * batch.mask).sum(-1).mean()
        estimator = pgcheck.from_loss(my_loss, claims=(pgcheck.proportional(),))
    What to do: if off_axis is not zero the factor differs between contexts; look for a std, a length or a group size
    that depends on the rollout itself.
    References: Kool, van Hoof & Welling 2019; Davis & Recht, arXiv 2510.13651.""",
    None,
    asked="of estimators that claim it",
)
add_check(
    "biased",
    "bias",
    """E ĝ ≠ ∇J on at least one problem that meets the claim's conditions.

    What it does: the same enumeration as `unbiased`; passes as soon as one problem shows a bias.
    Why it matters: a claim of bias is a claim, too. If an estimator that is known to be biased comes out unbiased
    everywhere, either it was fixed and its entry is stale, or the problems have a blind spot.
    Example: GRPO and CISPO pass, as does any baseline that is downstream of the action. A stale claim fails.
        def mended(batch):
            weight = batch.discount_weight * batch.reward_to_go
            return -(weight * batch.logp * batch.mask).sum(-1).mean()
        estimator = pgcheck.from_loss(mended, claims=(pgcheck.biased("γ^t is missing"),))
    What to do: if this fails, claim `unbiased()`; or add a problem that shows the bias.
    References: Nota & Thomas, arXiv 1906.07073; Davis & Recht, arXiv 2510.13651.""",
    None,
    asked="of estimators that claim it",
)
add_check(
    "finite",
    "hygiene",
    """Every coefficient of every batch the problem can draw is finite.

    What it does: the enumeration visits all-equal groups, groups of one and extreme probabilities; one NaN fails it.
    Why it matters: one unanimous group with std 0 turns a training step into NaN.
    Example: (R − mean)/std without ε on a prompt whose every completion scores 1.
        def loss(batch):
            r = batch.episode_return
            adv = (r - r.mean()) / r.std()
            return -(adv[:, None] * batch.logp * batch.mask).sum(-1).mean()
    What to do: add an ε to the divisor, or give such groups coefficient 0.
    References: DeepSeekMath, arXiv 2402.03300, equation 3; DAPO, arXiv 2503.14476, which leaves unanimous groups out.""",
    None,
)


@check("bias", asked="of estimators that declare their importance weight, where support is full")
def check_weights_average_to_one(estimator: Estimator, problem: Problem) -> Verdict | None:
    """E_behavior[w] = 1 for an estimator that declares its importance weight w (asked where support is full).

    What it does: sums w over the rollouts of the behaviour policy, exactly.
    Why it matters: E_behavior[w] is the mass of the target policy that the behaviour policy can reach. Below 1 there are
    completions it never sees (top-p, top-k), and no reweighting brings them back.
    Example: a truncated ratio, or a product of token ratios over observation positions, is not 1 on average.
        def weight(batch):
            return ((batch.logp - batch.behavior_logp) * batch.mask).sum(-1).exp().clamp(max=1.0)
        def coefficients(batch):
            return (weight(batch) * batch.episode_return)[..., None] * batch.mask / batch.rows
        estimator = pgcheck.from_coefficients(coefficients, couples="trajectory", weight=weight)
    What to do: take the ratio over policy positions only, and do not clip it if you claim unbiasedness.
    References: Precup, Sutton & Singh 2000."""
    if estimator.weight is None or not problem.full_support or not problem.enumerable:
        return None
    table = problem.trajectories_with(estimator.needs)
    possible = (table.behavior_probability > 0).nonzero().squeeze(-1)
    w = estimator.weight(table.batch(possible, possible))
    chance = (table.behavior_probability * table.paths.start_probability[table.paths.start])[possible]
    measured = abs(float((chance * w).sum()) - 1.0)
    status = Status.PASS if measured <= RTOL else Status.FAIL
    return Verdict(estimator.name, "weights_average_to_one", problem.name, status, measured, RTOL)


@check("bias", asked="of estimators that declare what they are the same_as")
def check_same_as(estimator: Estimator, problem: Problem) -> Verdict | None:
    """Every batch gives the estimate of the estimator that it is an implementation of (asked where `same_as` is declared).

    What it does: draws random batches of the problem, off-policy ones included, computes ĝ in logit space from the
    coefficients of both, and compares them to 1e-5 of the largest: an ε of 1e-6 in a divisor does not show, one of 1e-4
    does. Equal batch by batch is more than equal on average.
    Why it matters: a published estimator that is known to be biased cannot be told from a broken copy of it by its bias.
    Most mistakes around a clip show only off-policy, and only on one side of it.
    Example: a ratio that is not detached where the estimator multiplies log π by it; torch.max for torch.min in PPO.
        def loss(batch):
            ratio = ((batch.logp - batch.behavior_logp) * batch.mask).exp()
            weight = ratio * batch.discount_weight * batch.reward_to_go
            return -(weight * batch.logp * batch.mask).sum(-1).mean()
        estimator = pgcheck.from_loss(loss, same_as="token_is")
    What to do: compare term by term with the formula (`pgcheck explain grpo`); a difference that is meant is another
    estimator: leave `same_as` out.
    References: PPO, arXiv 1707.06347, equation 7; MiniMax-M1, arXiv 2506.13585, equations 4–5."""
    if estimator.same_as is None:
        return None
    other = find_estimator(estimator.same_as)
    if not other.fits(problem):
        return None
    measured = estimates_gap(estimator, other, problem)
    status = Status.PASS if measured <= SAME else Status.FAIL  # NaN fails
    return Verdict(estimator.name, "same_as", problem.name, status, measured, SAME)


def claims_on(estimator: Estimator, problem: Problem) -> list[Claim]:
    """The claims whose conditions this problem meets."""
    return [claim for claim in estimator.claims if claim.applies(problem)]


def scales_on(estimator: Estimator, problem: Problem) -> tuple[float | None, ...]:
    """The κ at which a sample has to be judged for the claims that this problem meets; 1 without any."""
    claimed = dict.fromkeys(1.0 if c.kind == "biased" else c.scale_on(problem) for c in claims_on(estimator, problem))
    return tuple(claimed) or (1.0,)


def judge_claims(
    estimator: Estimator,
    problems: Sequence[Problem],
    measured: Sequence[Measurement],
    *,
    rtol: float = RTOL,
    tolerance: float = math.nan,
) -> list[Verdict]:
    """A verdict for every claim that any of the problems can decide; `measured[i]` belongs to `problems[i]`.

    `rtol` is of exact measurements, `tolerance` of sampled ones.
    """
    verdicts = []
    for claim in estimator.claims:
        pairs = [(p, m) for p, m in zip(problems, measured, strict=True) if claim.applies(p)]
        if not pairs:
            continue
        if claim.kind == "biased":
            verdicts.append(_judge_biased(estimator, claim, [m for _, m in pairs], rtol, tolerance))
        else:
            verdicts.extend(_judge_equal(estimator, claim, p, m, rtol, tolerance) for p, m in pairs)
    return verdicts


def _judge_equal(
    estimator: Estimator, claim: Claim, problem: Problem, m: Measurement, rtol: float, tolerance: float
) -> Verdict:
    scale = claim.scale_on(problem)
    if m.batches is not None:
        return _judge_sampled(estimator, claim, problem, m, tolerance)
    # an open κ is the measured one, but a negative one is no proportionality; where ∇J = 0, every κ says E ĝ = 0
    used = scale if scale is not None else (max(m.scale, 0.0) if math.isfinite(m.scale) else 0.0)
    gap = m.distance(used)
    right = gap <= rtol and (scale is not None or used > 0 or m.gradient_norm == 0)
    return Verdict(
        estimator=estimator.name,
        check=claim.kind,
        problem=problem.name,
        status=Status.PASS if right else Status.FAIL,
        measured=gap,
        allowed=rtol,
        claim=claim.kind,
        claimed_scale=scale,
        numbers=_numbers(m),
    )


def _judge_sampled(estimator: Estimator, claim: Claim, problem: Problem, m: Measurement, tolerance: float) -> Verdict:
    """What the judge of this κ says; where ∇J = 0 there is none."""
    scale = claim.scale_on(problem)
    j = m.judgements.get(scale)
    return Verdict(
        estimator=estimator.name,
        check=claim.kind,
        problem=problem.name,
        status=Status.INCONCLUSIVE if j is None else j.status,
        measured=m.rel if j is None else j.rel,
        allowed=tolerance,
        claim=claim.kind,
        claimed_scale=scale,
        numbers=_numbers(m),
        sample=j,
        reason="" if j is not None else _why_not_judged(m),
    )


def _why_not_judged(m: Measurement) -> str:
    if m.view is None or m.view.against is None:
        return "∇J = 0: a sample says nothing relative to it"
    return "∇J is not known, and a pilot of some thousand batches does not tell it from 0: there is no tolerance"


def _judge_biased(
    estimator: Estimator, claim: Claim, measured: Sequence[Measurement], rtol: float, tolerance: float
) -> Verdict:
    if any(m.batches is not None for m in measured):
        return _judge_biased_sampled(estimator, measured, rtol, tolerance)
    worst = max(measured, key=lambda m: m.distance(1.0))
    largest = worst.distance(1.0)
    return Verdict(
        estimator=estimator.name,
        check="biased",
        problem="",
        status=Status.PASS if math.isfinite(largest) and largest > rtol else Status.FAIL,
        measured=largest,
        allowed=rtol,
        claim="biased",
        numbers={**_numbers(worst), "problems": float(len(measured))},
        reason=worst.problem,
    )


def _judge_biased_sampled(
    estimator: Estimator, measured: Sequence[Measurement], rtol: float, tolerance: float
) -> Verdict:
    """PASS if a bias is proven on one of them; FAIL, the claim is stale, if there is shown to be none on any."""

    def shown(m: Measurement) -> Status:
        """FAIL: there is a bias."""
        if m.batches is None:
            return Status.PASS if m.distance(1.0) <= rtol else Status.FAIL
        return m.judgements[1.0].status if 1.0 in m.judgements else Status.INCONCLUSIVE

    found = [shown(m) for m in measured]
    told = [m for m, s in zip(measured, found, strict=True) if s is Status.FAIL] or measured
    worst = max(told, key=lambda m: m.rel if math.isfinite(m.rel) else -1.0)
    small = all(s is Status.PASS for s in found)
    return Verdict(
        estimator=estimator.name,
        check="biased",
        problem="",
        status=Status.PASS if Status.FAIL in found else Status.FAIL if small else Status.INCONCLUSIVE,
        measured=worst.rel,
        allowed=tolerance,
        claim="biased",
        numbers={**_numbers(worst), "problems": float(len(measured))},
        sample=worst.judgements.get(1.0),
        reason=worst.problem,
    )


def _numbers(m: Measurement) -> dict[str, float]:
    return {"rel": m.rel, "scale": m.scale, "cosine": m.cosine, "off_axis": m.off_axis, "variance": m.total_variance}
