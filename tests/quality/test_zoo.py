"""No false alarms: the zoo does what it claims, every claim of it on every problem that meets the conditions."""

from __future__ import annotations

import pytest

from pgcheck.estimators.base import registered_estimators
from pgcheck.estimators.lookup import as_estimator
from pgcheck.render.messages import BIAS_CHECKS
from pgcheck.runs.report import Report
from tests.quality.conftest import problems


def kinds(name: str) -> set[str]:
    return {claim.kind for claim in as_estimator(name).claims}


def test_no_zoo_entry_is_flagged(core: Report) -> None:
    assert core.failures == []
    assert core.exit_code == 0
    assert len(core.estimators) == len(registered_estimators())


@pytest.mark.parametrize("name", registered_estimators())
def test_every_claim_of_the_zoo_is_judged(core: Report, name: str) -> None:
    """On at least one problem; and every entry has a verdict on its expectation."""
    estimator = as_estimator(name)
    measured = {m.problem for m in core.measurements if m.estimator == name}
    for claim in estimator.claims:
        assert [p.name for p in problems() if claim.applies(p) and p.name in measured], claim
        assert [v for v in core.verdicts if v.estimator == name and v.check == claim.kind], claim
    assert [v for v in core.verdicts if v.estimator == name and v.check in BIAS_CHECKS]


@pytest.mark.parametrize("name", [name for name in registered_estimators() if kinds(name) != {"biased"}])
def test_equalities_hold_to_rounding(core: Report, name: str) -> None:
    """E ĝ = κ ∇J within 1e-12 of the size on every problem that meets the conditions: none is left out."""
    estimator = as_estimator(name)
    for claim in estimator.claims:
        if claim.kind == "biased":
            continue
        where = [p for p in problems() if claim.applies(p) and estimator.fits(p)]
        found = {v.problem: v.measured for v in core.verdicts if (v.estimator, v.check) == (name, claim.kind)}
        assert {p.name for p in where} <= set(found)
        assert max(found[p.name] or 0.0 for p in where) <= 1e-12


@pytest.mark.parametrize("name", [name for name in registered_estimators() if "biased" in kinds(name)])
def test_biases_are_no_rounding(core: Report, name: str) -> None:
    """A claim of bias is shown by more than a thousandth of the size."""
    shown = [v for v in core.verdicts if (v.estimator, v.check) == (name, "biased")]
    assert min(v.measured or 0.0 for v in shown) > 1e-3


def test_every_pair_is_accounted_for(core: Report) -> None:
    """Measured, or not asked with the reason: 1 of the two for each pair; no claim is passed without a measurement."""
    measured = {(m.estimator, m.problem) for m in core.measurements}
    not_asked = {(n.estimator, n.problem) for n in core.not_asked}
    pairs = {(e.name, p.name) for e in core.estimators for p in core.problems}
    assert measured | not_asked == pairs
    assert all(n.reason for n in core.not_asked)
    for v in core.verdicts:
        if v.check in BIAS_CHECKS and v.problem:
            assert (v.estimator, v.problem) in measured
