"""Every claim of the zoo that one problem can refute, on random problems that meet its conditions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pgcheck import strategies
from pgcheck.engines.exact import exact_moments
from pgcheck.estimators.base import Claim, Estimator, registered_estimators
from pgcheck.estimators.lookup import FILLED_BY  # noqa: F401  (fills the registries)
from tests.properties import oracle

CLAIMS = [
    (e, claim) for e in registered_estimators().values() for claim in e.claims if claim.kind != "biased"
]  # fmt: skip


def test_there_are_claims() -> None:
    assert len(CLAIMS) > 15
    assert {claim.kind for _, claim in CLAIMS} == {"unbiased", "proportional"}


@pytest.mark.parametrize(("estimator", "claim"), CLAIMS, ids=[f"{e.name}-{c.kind}" for e, c in CLAIMS])
@settings(max_examples=10)
@given(data=st.data())
def test_a_claim_holds_on_random_problems(data: st.DataObject, estimator: Estimator, claim: Claim) -> None:
    """E ĝ over every ordered batch is κ ∇J by the complex step; the engine, with its multisets, says the same."""
    bounds = {"max_rollouts": 8, **strategies.bounds_for(estimator, claim)}
    bounds["max_rows"] = max(3, estimator.min_group_size)
    problem = data.draw(strategies.problems(max_batches=150, shared_contexts=None, **bounds))
    assume(claim.applies(problem))
    (moments,) = exact_moments([estimator], problem)
    truth = oracle.gradient(problem)
    scale = claim.scale_on(problem)
    sizes = (1,) if estimator.couples == "trajectory" else problem.sizes
    batches = oracle.everything(problem, sizes, estimator.needs)
    estimates = batches.of(estimator)
    mean, size = batches.mean(estimates), float(abs(estimates).max())
    oracle.close(moments.mean, mean, size=size)
    if scale is None:  # some κ > 0: along ∇J, and not against it
        g = truth.reshape(-1).numpy()
        scale = float(mean @ g) / float(g @ g) if float(g @ g) > 1e-20 else 0.0
        assert scale >= 0
    oracle.close(mean, scale * truth, size=size)
    assert torch.isfinite(moments.covariance).all()
