"""`plan`: group sizes against moments by hand, pilots against exact designs, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from torch import Tensor

from pgcheck import design
from pgcheck.design import Plan, plan
from pgcheck.engines.exact import exact_moments
from pgcheck.engines.stored import reference_draws
from pgcheck.errors import BudgetError
from pgcheck.estimators.base import Estimator
from pgcheck.estimators.lookup import as_estimator
from pgcheck.registry import find_problem
from pgcheck.render.design import design_json, design_text
from pgcheck.statistics.power import Design
from pgcheck.statistics.sequential import Settings
from tests.engines.test_sketch import problem as written


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


def test_other_group_sizes_are_enumerated_as_far_as_that_is_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The problem's own batches are 30; of other sizes only those within the limit are, or within the budget that is given."""
    e, problem = as_estimator("leave_one_out"), find_problem("dialogue/two-turn")

    def fits(size: int, budget: int) -> bool:
        try:
            exact_moments([e], problem.with_sampling(groups=problem.groups, group_size=size), budget=budget)
        except BudgetError:
            return False
        return True

    monkeypatch.setattr(design, "SWEPT_BATCHES", 100)
    swept, asked = plan(e, problem, Settings()), plan(e, problem, Settings(), budget=1_000)
    for made, budget in ((swept, 100), (asked, 1_000)):
        assert [g.group_size for g in made.group_sizes] == [g for g in range(2, 33) if fits(g, budget)]
    assert 0 < len(swept.group_sizes) < len(asked.group_sizes) < 31
    assert swept.design == asked.design


def test_what_cannot_be_enumerated_is_refused_or_drawn() -> None:
    e, problem = as_estimator("leave_one_out"), find_problem("tree/tokens")
    with pytest.raises(BudgetError):
        plan(e, problem, Settings(), budget=10, engine="exact")
    drawn = plan(e, problem, Settings(), budget=10, pilot=1_024)
    assert drawn.pilot is not None
    assert drawn.pilot.draws == 1_024


@pytest.mark.parametrize(
    ("name", "problem"),
    [("leave_one_out", "dialogue/two-turn"), ("grpo", "dialogue/two-turn"), ("reinforce", "mdp/two-state")],
)
def test_a_pilot_against_the_exact_design(name: str, problem: str) -> None:
    """What is exact lies between the ends of 95% intervals, for seven seeds of eight at least; seeds are fixed, so that this is
    a fact."""
    e, p = as_estimator(name), find_problem(problem)
    exact = plan(e, p, Settings(), engine="exact")
    costs = {g.group_size: g.cost for g in exact.group_sizes}
    assert exact.pilot is None

    def between(drawn: Plan) -> bool:
        assert drawn.pilot is not None
        low, high = drawn.pilot.quietest, drawn.pilot.loudest
        assert low is not None
        assert high is not None
        numbers: list[Callable[[Design], float]] = [
            lambda d: d.noise.nsr, lambda d: d.pass_draws_exactly, lambda d: d.detectable, lambda d: d.certifiable,
            lambda d: d.oracle_draws,
        ]  # fmt: skip
        for get in numbers[2:]:
            assert get(low) <= get(drawn.design) <= get(high)
        assert [g.group_size for g in drawn.group_sizes] == [
            2**k for k in range(6) if 2**k in costs or 2**k > max(costs)
        ]
        assert drawn.best is not None
        assert set(drawn.as_good) <= {g.group_size for g in drawn.group_sizes} - {drawn.best.group_size}
        return all(get(low) < get(exact.design) < get(high) for get in numbers) and all(
            g.cost_low < costs[g.group_size] < g.cost_high for g in drawn.group_sizes if g.group_size in costs
        )

    drawn = [plan(e, p, Settings(), engine="monte_carlo", pilot=4_096, seed=seed) for seed in range(8)]
    assert sum(map(between, drawn)) >= 7


def test_a_pilot_where_the_gradient_is_not_known() -> None:
    """A model writes: the noise is that of the difference from a trusted estimator, against a length that ∇J has at least."""
    e = as_estimator("grpo")
    drawn = plan(e, written("written", group_size=(4,)), Settings(), pilot=4_096)  # a tuple: no other sizes are tried
    (x, r), g = (
        [estimates_of(e), estimates_of(as_estimator("leave_one_out"))],
        written(group_size=4).parameter_gradient(),
    )
    exact = float((x - r).var(0).sum()) ** 0.5 / float(g.norm())
    assert drawn.pilot is not None
    assert drawn.pilot.quietest is not None
    assert drawn.pilot.loudest is not None
    assert drawn.pilot.quietest.noise.nsr < 1.05 * exact  # r is leave-one-out but for a 32nd part
    assert drawn.pilot.loudest.noise.nsr > 0.95 * exact
    assert drawn.best is None


def estimates_of(e: Estimator) -> Tensor:
    """ĝ_θ of two thousand draws of the table, `[n, P]`."""
    return reference_draws(e, written(group_size=4), draws=2_048)


def test_a_design_in_words_and_as_data() -> None:
    e, p = as_estimator("leave_one_out"), find_problem("bandit/two-arm")
    exact, drawn = (plan(e, p, Settings(), engine=x) for x in ("exact", "monte_carlo"))
    assert "[" not in design_text(exact)
    assert "a pilot of 2,048 batches; in brackets, what it leaves open" in design_text(drawn)
    assert design_json(exact)["pilot"] is None
    assert design_json(drawn)["pilot"]["draws"] == 2_048
    json.dumps(design_json(drawn), allow_nan=False)
