"""What a correct loss does not notice: padding, masked positions, the order of rows, the names of groups.

Each check changes a batch in a way that must not matter and compares coefficients. `reward_shift` and `on_policy_limit`
are asked of estimators that declare them.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from pgcheck.batch import Batch
from pgcheck.engines.coefficients import coefficients_of
from pgcheck.engines.declarations import row_orders
from pgcheck.estimators.base import Estimator, find_estimator
from pgcheck.problem import Problem
from pgcheck.verdicts.checks.base import check, compared, gather, probe_index
from pgcheck.verdicts.verdict import Status, Verdict

ALLOWED = 1e-9
_PADDING = 2  # columns appended


@check("invariance", asked="where a batch has positions with mask 0")
def check_mask_respected(estimator: Estimator, problem: Problem) -> Verdict | None:
    """No coefficient falls on a position the policy did not choose (mask 0): observations and padding.

    What it does: looks at the coefficients where mask is 0; they must be 0.
    Why it matters: log-probabilities of tool output and of padding tokens exist in real batches; a loss without the mask
    trains on them.
    Example: the mask is forgotten.
        def loss(batch):
            return -(batch.episode_return[:, None] * batch.logp).sum(-1).mean()
    What to do: multiply by `batch.mask`.
    References: Search-R1, arXiv 2503.09516, loss masking for retrieved tokens."""
    batch = gather(estimator, problem, probe_index(estimator, problem))
    c = estimator.coefficients(batch)
    outside = batch.mask == 0
    if not bool(outside.any()):
        return None
    per_position = c if estimator.leaf == "logp" else c.abs().sum(-1)
    found = torch.where(outside, per_position, torch.zeros_like(per_position))
    size = max(float(per_position.abs().max()), 1e-300)
    measured = float(found.abs().max()) / size
    status = Status.PASS if measured <= ALLOWED else Status.FAIL
    return Verdict(estimator.name, "mask_respected", problem.name, status, measured, ALLOWED)


@check("invariance", asked="where a batch has positions with mask 0")
def check_padding_content(estimator: Estimator, problem: Problem) -> Verdict | None:
    """What stands in masked positions does not matter: log-probabilities, ids.

    What it does: fills `logp`, `behavior_logp`, `ref_logp` (and logits) with junk where mask is 0, ids with 0 there, and
    compares the coefficients of the policy's own positions.
    Why it matters: a real batch has the model's log-probabilities of pad and tool tokens in these places.
    Example: a sequence ratio summed over the whole row.
        def loss(batch):
            w = (batch.logp - batch.behavior_logp).sum(-1).exp().detach()
            return -((w * batch.episode_return)[:, None] * batch.logp * batch.mask).sum(-1).mean()
    What to do: multiply by `batch.mask` before every sum over positions.
    References: GSPO, arXiv 2507.18071, equation 7: the sequence ratio is over the row's own tokens."""
    batch = gather(estimator, problem, probe_index(estimator, problem))
    outside = batch.mask == 0
    if not bool(outside.any()):
        return None
    junk = {
        "logp": torch.where(outside, -1.5, batch.logp),
        "behavior_logp": torch.where(outside, -0.25, batch.behavior_logp),
        "ref_logp": torch.where(outside, -3.0, batch.ref_logp),
        **{name: torch.where(outside, 0, getattr(batch, name)) for name in ("state", "context", "action")},
    }
    if batch.action_logits is not None:
        junk["action_logits"] = torch.where(outside.unsqueeze(-1), -0.7, batch.action_logits)
    found = coefficients_of(estimator, batch.with_tensors(junk))
    return compared(
        "padding_content", estimator, problem, found, coefficients_of(estimator, batch), allowed=ALLOWED
    )  # fmt: skip


def _longer(x: Tensor, fill: float) -> Tensor:
    return torch.cat([x, torch.full((*x.shape[:-1], _PADDING), fill, dtype=x.dtype)], -1)


@check("invariance")
def check_padding_length(estimator: Estimator, problem: Problem) -> Verdict | None:
    """More padding changes nothing: coefficients do not depend on T, the width of the tensor.

    What it does: appends two padding columns and compares the coefficients of the columns before them.
    Why it matters: T is set by the longest row of a batch or by the collator; a mean over it makes the step size, and
    with unequal micro-batches the direction, depend on packing.
    Example: a mean over everything, which divides by B · T.
        def loss(batch):
            return -(batch.episode_return[:, None] * batch.logp * batch.mask).mean()
    What to do: divide by the number of rows, by `mask.sum()`, or by a constant.
    References: Dr. GRPO, arXiv 2503.20783, on dividing by lengths; DAPO, arXiv 2503.14476, the token-level loss."""
    batch = gather(estimator, problem, probe_index(estimator, problem))
    T = batch.reward.shape[-1]
    ids = {name: _longer(getattr(batch, name), -1) for name in ("state", "context", "action")}
    numbers = ("reward", "mask", "logp", "behavior_logp", "ref_logp", "value")
    longer = {name: _longer(getattr(batch, name), 0.0) for name in numbers} | ids
    if batch.action_logits is not None:
        longer["action_logits"] = _longer(batch.action_logits.mT, 0.0).mT
    at = batch.reward.dim() - 1  # the axis of positions, where a side table has one
    for name, x in batch.side.items():
        if x.dim() > at and x.shape[at] in (T, T + 1):
            longer[f"side.{name}"] = _longer(x.movedim(at, -1), 0.0).movedim(-1, at)
    found = coefficients_of(estimator, batch.with_tensors(longer))
    found = found[..., :T] if estimator.leaf == "logp" else found[..., :T, :]
    return compared(
        "padding_length", estimator, problem, found, coefficients_of(estimator, batch), allowed=ALLOWED
    )  # fmt: skip


@check("invariance", asked="where a batch has at least two rows")
def check_row_order(estimator: Estimator, problem: Problem) -> Verdict | None:
    """Permuting rows inside a group, and groups among each other, permutes the coefficients.

    What it does: compares the coefficients of permuted batches with permuted coefficients, for a set of orders that
    generates all exchanges of rows in a group and of groups of one size.
    Why it matters: where rows stand in a batch is an accident of the sampler. A loss that depends on it pairs the wrong
    rows.
    Example: every row is compared with the one before it, be it another prompt's: no bias, and no baseline.
        def loss(batch):
            adv = batch.episode_return - batch.episode_return.roll(1)
            return -(adv[:, None] * batch.logp * batch.mask).sum(-1).mean()
    What to do: index by `batch.group`, not by position.
    References: Kool, van Hoof & Welling 2019: the samples of one input are exchangeable."""
    if problem.rows < 2:
        return None
    index = probe_index(estimator, problem)
    here = coefficients_of(estimator, gather(estimator, problem, index))
    orders = row_orders(problem)
    found = [coefficients_of(estimator, gather(estimator, problem, index[:, order])) for order in orders]
    expected = [here[:, order] for order in orders]
    return compared("row_order", estimator, problem, torch.cat(found), torch.cat(expected), allowed=ALLOWED)


@check("invariance")
def check_group_labels(estimator: Estimator, problem: Problem) -> Verdict | None:
    """The names of groups do not matter.

    What it does: replaces group ids 0, 1, … by other distinct integers, in another order.
    Why it matters: real ids are hashes or dataset indices.
    Example: ids taken as positions of a table.
        def loss(batch):
            r, ids = batch.episode_return, torch.arange(len(batch.group))
            member = (batch.group[:, None] == ids).to(r)  # [B, ids]
            mean = member @ (member.T @ r / member.sum(0).clamp(min=1))
            return -((r - mean)[:, None] * batch.logp * batch.mask).sum(-1).mean()
    What to do: compare ids for equality (`batch.same_group`).
    References: verl's `uid`, a random string for each prompt."""
    batch = gather(estimator, problem, probe_index(estimator, problem))
    renamed = replace(batch, group=101 - 7 * batch.group)
    return compared(
        "group_labels", estimator, problem, coefficients_of(estimator, renamed), coefficients_of(estimator, batch),
        allowed=ALLOWED,
    )  # fmt: skip


@check("invariance", asked="of estimators that declare shift_invariant, where every row has a baseline")
def check_reward_shift(estimator: Estimator, problem: Problem) -> Verdict | None:
    """Adding the same constant to every return changes nothing (asked of estimators that declare `shift_invariant`).

    What it does: adds a constant to the first reward of every row (and to the values of the first state).
    Why it matters: a baseline exists to remove exactly this; without the property the variance grows with the mean reward.
    Example: leave-one-out and group-standardised returns pass; the sum of the others divided by G does not.
        def coefficients(batch):
            r = batch.episode_return
            others = (batch.same_group @ r[..., None]).squeeze(-1) - r
            return (r - others / batch.same_group.sum(-1))[..., None] * batch.mask / batch.rows
        estimator = pgcheck.from_coefficients(coefficients, couples="group", shift_invariant=True)
    What to do: subtract a mean of returns before anything else.
    References: Williams 1992; Greensmith, Bartlett & Baxter 2004."""
    if not estimator.shift_invariant or not _baselined_everywhere(estimator, problem):
        return None
    batch = gather(estimator, problem, probe_index(estimator, problem))
    shift = torch.zeros_like(batch.reward)
    shift[..., 0] = 0.75
    moved: Batch = replace(
        batch, reward=batch.reward + shift, value=batch.value + torch.nn.functional.pad(shift, (0, 1))
    )
    return compared(
        "reward_shift", estimator, problem, coefficients_of(estimator, moved), coefficients_of(estimator, batch),
        allowed=ALLOWED,
    )  # fmt: skip


def _baselined_everywhere(estimator: Estimator, problem: Problem) -> bool:
    """A group of one has no baseline to take the shift away."""
    return estimator.couples != "group" or min(problem.sizes) >= 2


@check("invariance", asked="of estimators that declare an on_policy_limit")
def check_on_policy_limit(estimator: Estimator, problem: Problem) -> Verdict | None:
    """On-policy, the off-policy estimator is its on-policy limit, row by row (asked where `on_policy_limit` is declared).

    What it does: sets `behavior_logp` to `logp` and compares the coefficients with those of the named limit.
    Why it matters: the first step of every update is on-policy; a ratio that is not 1 there is wrong everywhere.
    Example: TRL's cispo clamps the ratio itself at ε_high; with .2 every on-policy gradient is scaled by .2.
        def coefficients(batch):
            ratio = ((batch.logp - batch.behavior_logp) * batch.mask).exp().clamp(max=0.2)
            return ratio * batch.discount_weight * batch.reward_to_go * batch.mask / batch.rows
        estimator = pgcheck.from_coefficients(
            coefficients, couples="trajectory", on_policy_limit="reward_to_go"
        )
    What to do: check the sign of the log-ratio and what its clip bounds are relative to.
    References: PPO, arXiv 1707.06347, section 3; MiniMax-M1, arXiv 2506.13585, equations 4–5."""
    if estimator.on_policy_limit is None:
        return None
    batch = gather(estimator, problem, probe_index(estimator, problem))
    batch = replace(batch, behavior_logp=batch.logp)
    limit = find_estimator(estimator.on_policy_limit)
    return compared(
        "on_policy_limit", estimator, problem, coefficients_of(estimator, batch), coefficients_of(limit, batch),
        allowed=ALLOWED,
    )  # fmt: skip
