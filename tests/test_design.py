"""`plan`: group sizes against moments by hand, and what is refused."""

from __future__ import annotations

import pytest

from pgcheck.design import plan
from pgcheck.engines.exact import exact_moments
from pgcheck.errors import BudgetError
from pgcheck.estimators.lookup import as_estimator
from pgcheck.registry import find_problem
from pgcheck.statistics.sequential import Settings


def test_the_best_group_size_of_leave_one_out_on_two_arms() -> None:
    """Var of RLOO over G i.i.d. rows per rollout is σ² + τ²/(G − 1)-like: it falls with G, so the largest is best."""
    e, problem = as_estimator("leave_one_out"), find_problem("bandit/two-arm")
    got = plan(e, problem, Settings())
    assert [g.group_size for g in got.group_sizes] == list(range(2, 33))
    costs = [g.cost for g in got.group_sizes]
    assert costs == sorted(costs, reverse=True)
    assert got.best == got.group_sizes[-1]
    for g in got.group_sizes[:3]:
        (m,) = exact_moments([e], problem.with_sampling(groups=1, group_size=g.group_size))
        assert g.cost == pytest.approx(g.group_size * float(m.covariance.trace()) / float(m.mean.norm() ** 2))


def test_what_cannot_be_enumerated_is_refused() -> None:
    with pytest.raises(BudgetError):
        plan(as_estimator("leave_one_out"), find_problem("tree/tokens"), Settings(), budget=10)
