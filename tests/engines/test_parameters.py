"""Estimates in parameters, mapped over draws, against one backward pass a draw."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import pgcheck
from pgcheck.engines import parameters
from pgcheck.engines.coefficients import coefficients_of
from pgcheck.envs import language
from pgcheck.policies import TinyGPT
from tests.engines.test_sketch import KINDS, problem


@pytest.mark.parametrize("kind", KINDS)
def test_mapped_asone_by_one(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A backward pass that is mapped over draws against one a draw; in parts; on logits; of some of the tokens."""
    task = replace(language.tool_dialogue(), actions=[0, 1, 2, 3]) if kind != "written" else language.tool_dialogue()
    p = problem(kind, task, groups=2, model=TinyGPT(5, width=8, seed=3))
    for name in ("grpo", "entropy_bonus(token)"):
        e = pgcheck.as_estimator(name)
        table, index = p.sampler(seed=2).draw(0, 9)
        c = coefficients_of(e, table.batch(index, p.group_labels, logits=e.leaf == "logits"))
        policy = parameters.policy_of(table, p)
        expected = torch.cat(list(parameters.one_by_one(c, table, index, policy)))
        monkeypatch.setattr(parameters, "_TOKENS_AT_ONCE", 4 * 4 * policy.tokens.shape[1])
        found = list(parameters.estimates_in_parameters(c, table, index, p))
        assert sorted(torch.cat([which for which, _ in found]).tolist()) == list(range(9))
        assert len(found) > 1
        for which, x in found:
            torch.testing.assert_close(x, expected[which], rtol=0, atol=1e-13)
