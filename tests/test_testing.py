"""`assert_unbiased`, `assert_proportional`, and `pgcheck.testing` without pytest."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref

import pytest
from torch import Tensor

import pgcheck
from pgcheck import testing
from pgcheck.batch import Batch


def centred(batch: Batch) -> Tensor:
    r = batch.episode_return
    return -((r - r.mean())[:, None] * batch.logp * batch.mask).sum(-1).mean()


def test_assert_unbiased() -> None:
    testing.assert_unbiased("leave_one_out", "bandit/two-arm")
    with pytest.raises(AssertionError, match="centred is not unbiased: 1 of 1 problems"):
        testing.assert_unbiased(centred, "bandit/two-arm")


def test_assert_unbiased_judges_the_claim_it_names() -> None:
    """An entry that claims a bias, rightly, is no unbiased one."""
    with pytest.raises(pgcheck.BiasError, match="grpo is not unbiased"):
        testing.assert_unbiased("grpo", "dialogue/two-turn")


def test_assert_proportional() -> None:
    """B = 4: subtracting the batch mean leaves (B − 1)/B = 3/4 of ∇J."""
    testing.assert_proportional(centred, "bandit/two-arm")
    testing.assert_proportional(centred, "bandit/two-arm", scale=3 / 4)
    testing.assert_proportional(centred, "mdp/two-state", scale=lambda p: (p.rows - 1) / p.rows)
    with pytest.raises(pgcheck.BiasError, match="centred is not proportional"):
        testing.assert_proportional(centred, "bandit/two-arm", scale=2 / 3)
    with pytest.raises(pgcheck.BiasError, match="grpo is not proportional"):
        testing.assert_proportional("grpo", "dialogue/two-turn")


def test_settings_are_passed_on() -> None:
    testing.assert_unbiased(centred, "bandit/two-arm", rtol=0.5)  # off by 19% of √E‖ĝ‖²
    with pytest.raises(pgcheck.CheckFailed, match="the budget is 1"):
        testing.assert_unbiased(centred, "bandit/two-arm", budget=1)


def test_what_is_not_judged_is_not_asserted() -> None:
    """A random loss, a NaN, no problem: none of them is unbiased."""
    import torch

    def noisy(batch: Batch) -> Tensor:
        return -(torch.rand(()) * batch.logp * batch.mask).sum()

    def nan(batch: Batch) -> Tensor:
        return centred(batch) * torch.nan

    for loss, words in ((noisy, "draws random numbers"), (nan, "returns nan")):
        with pytest.raises(AssertionError, match=words):
            testing.assert_unbiased(loss, "bandit/two-arm")
    with pytest.raises(AssertionError, match="no problem was given"):
        testing.assert_unbiased(centred, [])


def test_importing_it_does_not_import_pytest() -> None:
    code = "import sys, pgcheck.testing; assert 'pytest' not in sys.modules; pgcheck.testing.assert_unbiased"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_nothing_is_kept_when_the_items_are_gone() -> None:
    """Estimators and reports belong to the decorator, not to the module."""

    class Loss:
        __name__ = "loss"

        def __call__(self, batch: Batch) -> Tensor:
            return centred(batch)

    loss = Loss()
    decorator = testing.parametrize_with_checks([loss], problems="bandit/two-arm", checks=["finite"])
    (item,) = decorator.args[1]
    item.values[1](loss)
    gone = weakref.ref(loss)
    del decorator, item, loss
    gc.collect()
    assert gone() is None
