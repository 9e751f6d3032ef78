"""What these are is the baseline's to say: both are biased on purpose."""

import pytest
from tinyrl.losses import cispo, ppo

import pgcheck

PROBLEMS = ["off-policy/dialogue-stale", "off-policy/contextual-drifted"]


@pytest.mark.pgcheck([ppo, cispo], problems=PROBLEMS, claim=pgcheck.Claim("biased", reason="it clips"))
def test_off_policy(pgcheck_verdict):
    pgcheck_verdict.check()


def test_nothing_of_pgcheck():
    assert PROBLEMS
