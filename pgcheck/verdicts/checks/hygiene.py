"""Whether the estimator is a clean function of its batch: no randomness, no state, no writing, no stray gradient."""

from __future__ import annotations

from operator import itemgetter

import torch

from pgcheck.engines.coefficients import coefficients_of
from pgcheck.engines.purity import KINDS, find_impurity
from pgcheck.estimators.base import Estimator
from pgcheck.estimators.from_loss import LossCoefficients
from pgcheck.problem import Problem
from pgcheck.verdicts.checks.base import check, compared, gather, probe_index
from pgcheck.verdicts.verdict import Status, Verdict


def _purity(name: str, estimator: Estimator, problem: Problem) -> Verdict | None:
    """None where an impurity that is looked for earlier was found: this one was then not looked for."""
    impurity = find_impurity(estimator, gather(estimator, problem, probe_index(estimator, problem)))
    if impurity is None or KINDS.index(impurity.kind) > KINDS.index(name):
        return Verdict(estimator.name, name, problem.name, Status.PASS, 0.0, 0.0)
    if impurity.kind != name:
        return None
    reason = f"{impurity.what}; {impurity.mend}"
    return Verdict(estimator.name, name, problem.name, Status.FAIL, impurity.measured, 0.0, reason=reason)


@check("hygiene")
def check_inputs_unchanged(estimator: Estimator, problem: Problem) -> Verdict | None:
    """The estimator leaves its batch as it found it.

    What it does: compares every tensor of the batch before and after.
    Why it matters: an in-place write (`adv -= adv.mean()`) reaches whoever reads the batch next: the next loss term, the
    next epoch, the logger.
    Example: returns centred where they are stored.
        def loss(batch):
            adv = batch.reward.sub_(batch.reward.mean())
            return -(adv.clone() * batch.logp * batch.mask).sum(-1).mean()
    What to do: write out of place, x = x - m.
    References: PyTorch, notes on autograd mechanics, in-place operations."""
    return _purity("inputs_unchanged", estimator, problem)


@check("hygiene")
def check_deterministic(estimator: Estimator, problem: Problem) -> Verdict | None:
    """The same batch gives the same coefficients, to the bit, and no global random generator is drawn from.

    What it does: evaluates a batch twice and watches the global generators of Python, numpy and torch.
    Why it matters: an expectation over batches is exact only for a function of the batch. Noise in the loss is variance
    that nobody asked for.
    Example: dropout on the advantage.
        def loss(batch):
            adv = torch.nn.functional.dropout(batch.episode_return, 0.1)
            return -(adv[:, None] * batch.logp * batch.mask).sum(-1).mean()
    What to do: take dropout and noise out of the loss; randomness that belongs to the estimator is a side table.
    References: PyTorch, notes on reproducibility; VinePPO, arXiv 2410.01679, whose continuations are such a table."""
    return _purity("deterministic", estimator, problem)


@check("hygiene")
def check_stateless(estimator: Estimator, problem: Problem) -> Verdict | None:
    """A batch gives the same coefficients whatever came before it.

    What it does: evaluates a batch, others, and the batch again.
    Why it matters: a running mean of rewards makes the bias depend on the training history.
    Example: a baseline that follows the rewards seen so far.
        seen = []
        def loss(batch):
            seen.append(float(batch.episode_return.mean()))
            adv = batch.episode_return - sum(seen) / len(seen)
            return -(adv[:, None] * batch.logp * batch.mask).sum(-1).mean()
    What to do: pass the running statistic in as a constant; taken from earlier batches only, it is no bias.
    References: Sutton & Barto 2018, section 2.8, a running mean of rewards as the baseline."""
    return _purity("stateless", estimator, problem)


@check("hygiene", asked="of losses")
def check_detached(estimator: Estimator, problem: Problem) -> Verdict | None:
    """The policy loss sends no gradient into `batch.value`, the critic's output (losses only).

    What it does: makes `value` a leaf next to `logp` and looks at ∂loss/∂value.
    Why it matters: an advantage that is not detached trains the critic with the policy's loss, towards advantages that
    are large instead of right. The policy's own gradient looks fine.
    Example: the advantage straight from the critic.
        def loss(batch):
            adv = batch.discount_weight * (batch.reward_to_go - batch.value[..., :-1])
            return -(adv * batch.logp * batch.mask).sum(-1).mean()
    What to do: `adv = (returns - batch.value[..., :-1]).detach()`.
    References: A3C, arXiv 1602.01783, algorithm S3, where the policy's step takes V as a constant."""
    fn = estimator.coefficients
    if not isinstance(fn, LossCoefficients):
        return None
    index = probe_index(estimator, problem)[:4]
    batch = gather(estimator, problem, index)
    largest = 0.0
    for m in range(len(index)):
        one = batch.map(itemgetter(m)).map(torch.clone)
        value = one.value.clone().requires_grad_(True)
        named = {"value": value, "logp": one.logp.clone().requires_grad_(True)}
        loss = fn.value(one.with_tensors(named))
        if not loss.requires_grad:
            continue
        (leak,) = torch.autograd.grad(loss, value, allow_unused=True)
        largest = max(largest, 0.0 if leak is None else float(leak.abs().max()))
    status = Status.PASS if largest == 0.0 else Status.FAIL
    return Verdict(estimator.name, "detached", problem.name, status, largest, 0.0)


@check("hygiene")
def check_float32(estimator: Estimator, problem: Problem) -> Verdict | None:
    """In float32 the coefficients agree with float64 to 1e-3 of the largest.

    What it does: evaluates random batches in both.
    Why it matters: training runs in float32 or less; a difference of large numbers, or an exponential of a long sum,
    loses everything there while the float64 check is green.
    Example: a large constant that keeps returns positive, and is subtracted with the mean.
        def loss(batch):
            r = batch.episode_return + 1e6
            others = (r.sum() - r) / (len(r) - 1)
            return -((r - others)[:, None] * batch.logp * batch.mask).sum(-1).mean()
    What to do: subtract in log space, centre before squaring, do not divide by a variance of nearly equal numbers.
    References: Higham 2002, Accuracy and Stability of Numerical Algorithms, section 1.7."""
    batch = gather(estimator, problem, probe_index(estimator, problem))
    single = batch.map(lambda x: x.to(torch.float32) if x.is_floating_point() else x)
    return compared(
        "float32", estimator, problem, coefficients_of(estimator, single), coefficients_of(estimator, batch), allowed=1e-3
    )  # fmt: skip
