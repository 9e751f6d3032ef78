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
    Why it matters: an in-place write (`adv -= adv.mean()`) reaches whoever reads the batch next.
    What to do: write out of place."""
    return _purity("inputs_unchanged", estimator, problem)


@check("hygiene")
def check_deterministic(estimator: Estimator, problem: Problem) -> Verdict | None:
    """The same batch gives the same coefficients, to the bit, and no global random generator is drawn from.

    What it does: evaluates a batch twice and watches the global generators of Python, numpy and torch.
    Why it matters: an expectation over batches is exact only for a function of the batch.
    What to do: take dropout and noise out of the loss; randomness that belongs to the estimator is a side table."""
    return _purity("deterministic", estimator, problem)


@check("hygiene")
def check_stateless(estimator: Estimator, problem: Problem) -> Verdict | None:
    """A batch gives the same coefficients whatever came before it.

    What it does: evaluates a batch, others, and the batch again.
    Why it matters: a running mean of rewards makes the bias depend on the training history.
    What to do: pass the running statistic in as a constant."""
    return _purity("stateless", estimator, problem)


@check("hygiene", asked="of losses")
def check_detached(estimator: Estimator, problem: Problem) -> Verdict | None:
    """The policy loss sends no gradient into `batch.value`, the critic's output (losses only).

    What it does: makes `value` a leaf next to `logp` and looks at ∂loss/∂value.
    Why it matters: an advantage that is not detached trains the critic with the policy's loss, towards advantages that
    are large instead of right. The policy's own gradient looks fine.
    What to do: `adv = (returns - batch.value[..., :-1]).detach()`."""
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
    What to do: subtract in log space, centre before squaring, do not divide by a variance of nearly equal numbers."""
    batch = gather(estimator, problem, probe_index(estimator, problem))
    single = batch.map(lambda x: x.to(torch.float32) if x.is_floating_point() else x)
    return compared(
        "float32", estimator, problem, coefficients_of(estimator, single), coefficients_of(estimator, batch), allowed=1e-3
    )  # fmt: skip
