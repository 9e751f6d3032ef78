"""The cause of a sampled failure, where nothing is enumerated: what it is on the same draws."""

from __future__ import annotations

import pytest
import torch

import pgcheck
import pgcheck.named_problems
from pgcheck.estimators.base import registered_estimators
from pgcheck.estimators.broken import BROKEN
from pgcheck.registry import find_problem
from pgcheck.verdicts.same_draws import find_cause_of_sample, find_same_draws


def centred(batch):
    """The own return is in the mean."""
    r = batch.episode_return
    return -((r - r.mean())[:, None] * batch.logp * batch.mask).sum(-1).mean()


def summed(batch):
    r = batch.episode_return
    others = (r.sum() - r) / (batch.rows - 1)
    return -((r - others)[:, None] * batch.logp * batch.mask).sum()


def divided(batch):
    """By a standard deviation over B − 1, with another ε."""
    r = batch.episode_return
    adv = (r - r.mean()) / (r.std() + 1e-6)
    return -(adv[:, None] * batch.logp * batch.mask).sum(-1).mean()


def cubed(batch):
    """Nothing that is known."""
    return -((batch.episode_return**3)[:, None] * batch.logp * batch.mask).sum(-1).mean()


LONG = ("sampled/walk-50", "sampled/groups-16")  # one has no table of rollouts, the other too many batches


def test_a_loss_is_recognised():
    problems, n = [find_problem(name) for name in LONG], len(LONG)

    def cause(loss):
        found = find_same_draws(pgcheck.from_loss(loss), problems, seed=5)
        return None if found is None else (found.kind, found.factor, found.subject, found.problems)

    assert cause(centred) == ("draw by draw", "", "batch_mean", n)
    assert cause(divided) == ("draw by draw", "√((B−1)/B)", "divided_by_std_of_the_batch", n)
    assert cause(cubed) is None
    kind, factor, subject, _ = cause(summed)
    assert (kind, factor) == ("draw by draw", "B")
    assert subject in ("leave_one_out(batch)", "leave_one_out")


@pytest.mark.parametrize("name", ["grpo", "divided_by_std_of_the_batch"])
def test_a_part_of_a_known_one(name):
    """κ = 0.37; found under that name, or as an equal of it."""
    problems = [find_problem(name) for name in ("dialogue/two-turn", "sampled/groups-16")]
    e = registered_estimators().get(name) or BROKEN[name].estimator
    for κ in (0.37,):
        mine = pgcheck.from_coefficients(lambda b, κ=κ: κ * e.coefficients(b), couples="batch", name="mine")
        found = find_same_draws(mine, problems)
        assert (found.factor, found.kind) == (str(κ), "draw by draw")
        other = registered_estimators().get(found.subject) or BROKEN[found.subject].estimator
        for p in problems:
            batch = p.sample(32, seed=9)
            torch.testing.assert_close(other.coefficients(batch), e.coefficients(batch), rtol=1e-5, atol=1e-9)


def test_what_is_not_the_same_on_some_draws_is_not_reported():
    """Batches in which nobody acts first are left alone, one in a few: batch_mean on the others."""
    p = find_problem("sampled/groups-16")
    known = registered_estimators()["batch_mean"]

    def mostly(batch):
        rare = (batch.action[..., 0, 0] == 1) & (batch.action[..., 1, 0] == 1)
        return known.coefficients(batch) * torch.where(rare, 2.0, 1.0)[..., None, None]

    batch = p.sample(64, seed=0)
    assert 0 < int(((batch.action[:, 0, 0] == 1) & (batch.action[:, 1, 0] == 1)).sum()) < 64
    assert find_same_draws(pgcheck.from_coefficients(mostly, couples="batch"), [p]) is None


def test_expectations_where_batches_can_be_enumerated():
    """Sampled for speed, it is small enough to be enumerated after all, and equal in expectation only."""
    problems = [find_problem(name) for name in ("dialogue/two-turn", "mdp/two-state", "bandit/two-arm")]

    def noisy(batch):  # E = (B−1)/B ∇J of the row mean, plus what cancels: the score of the first row times one, E = 0
        c = batch.episode_return[..., None] * batch.mask / batch.rows
        return 0.5 * c + torch.cat([batch.mask[..., :1, :], torch.zeros_like(batch.mask[..., 1:, :])], -2)

    e = pgcheck.from_coefficients(noisy, couples="batch")
    assert find_same_draws(e, problems) is None
    found = find_cause_of_sample(e, problems)
    assert (found.kind, found.subject, found.factor) == ("identity", "the gradient", "0.5")


def test_the_message_says_so():
    how = {"engine": "monte_carlo", "checks": ["unbiased"], "sampling": pgcheck.Sampling(draws=16_384)}
    with pytest.raises(pgcheck.BiasError) as caught:
        pgcheck.check_estimator(centred, "dialogue/two-turn", **how)
    text = str(caught.value)
    assert "cause     on the same draws this is `batch_mean`, batch by batch, on 1 problem(s)" in text
    assert "which is  The own return is in the mean" in text
