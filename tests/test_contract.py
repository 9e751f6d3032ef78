"""The worked two-turn example is reproduced field by field: ragged, masked, two prompts, off-policy."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pgcheck.engines.exact import exact_moments
from pgcheck.estimators import zoo  # noqa: F401  (fills the registry)
from pgcheck.estimators.base import Estimator, find_estimator
from pgcheck.problem import Problem
from pgcheck.trajectories import Paths
from pgcheck.verdicts.verdict import direction

TOLERANCE = 1e-9
NAMES = {
    "reward_to_go": "reward_to_go",
    "reward_to_go_undiscounted_weight": "reward_to_go_undiscounted_weight",
    "baselined(value)": "baselined(value)",
    "batch_mean over the batch": "batch_mean",
    "leave_one_out over the group": "leave_one_out",
    "trajectory_is (reward-to-go form, gamma^t)": "trajectory_is",
    "cispo over the group, eps_high .1, ddof 0, eps 1e-6, token mean over the batch": "cispo",
}


def problem_of(contract: dict[str, Any], *, off_policy: bool, groups: int, group_size: int) -> Problem:
    rows = contract["trajectories"]
    columns = ("start", "state", "context", "action", "reward", "mask", "env_probability")
    paths = Paths(
        **{name: [row[name] for row in rows] for name in columns},
        start_probability=contract["start_probability"],
        discount=contract["discount"],
    )
    return Problem(
        paths,
        contract["logits"],
        behavior_logits=contract["behavior_logits"] if off_policy else None,
        groups=groups,
        group_size=group_size,
        name="dialogue/contract",
    )


def tensor(x: Any) -> torch.Tensor:
    return torch.as_tensor(x, dtype=torch.float64)


def assert_close(found: torch.Tensor, expected: Any) -> None:
    torch.testing.assert_close(found.to(torch.float64), tensor(expected), rtol=0, atol=TOLERANCE)


def test_probabilities_value_and_gradient(contract: dict[str, Any]) -> None:
    problem = problem_of(contract, off_policy=True, groups=2, group_size=2)
    table = problem.trajectories
    assert_close(table.probability, [r["probability_given_start"] for r in contract["trajectories"]])
    assert_close(table.behavior_probability, [r["behavior_probability_given_start"] for r in contract["trajectories"]])
    assert problem.value() == pytest.approx(contract["J"], abs=TOLERANCE)
    for method in (None, "enumeration", "central_differences"):
        assert_close(problem.gradient(method), contract["gradient"])
    acts = table.paths.mask > 0
    assert_close(table.value[:, :-1][acts], tensor(contract["value_by_state"])[table.paths.state[acts]])
    assert bool((table.value[torch.arange(len(table)), table.paths.end] == 0).all())


def test_every_field_of_the_batch(contract: dict[str, Any]) -> None:
    problem = problem_of(contract, off_policy=True, groups=2, group_size=2)
    given = contract["batch"]
    batch = problem.trajectories.batch(torch.tensor(given["trajectory"]), torch.tensor(given["group"]))
    for name in ("state", "context", "action", "mask", "reward", "logp", "behavior_logp", "episode_return",
                 "reward_to_go", "length"):  # fmt: skip
        assert_close(getattr(batch, name), given[name])


@pytest.mark.parametrize("row", range(6))
def test_coefficients_and_gradient_of_one_batch(contract: dict[str, Any], row: int) -> None:
    expected = contract["batch_estimates"][row]
    problem = problem_of(contract, off_policy=True, groups=2, group_size=2)
    given = contract["batch"]
    batch = problem.trajectories.batch(torch.tensor(given["trajectory"]), torch.tensor(given["group"]))
    c = find_estimator(NAMES[expected["estimator"]]).coefficients(batch)
    assert_close(c, expected["coefficients"])
    # ĝ[k,a] = Σ c (1[a = a_it] − π(a|k)), written out
    pi = torch.softmax(problem.logits, -1)
    g = torch.zeros_like(pi)
    for i in range(batch.rows):
        for t in range(3):
            if batch.mask[i, t] > 0:
                k = batch.context[i, t]
                g[k] -= c[i, t] * pi[k]
                g[k, batch.action[i, t]] += c[i, t]
    assert_close(g, expected["gradient"])


@pytest.mark.parametrize("row", range(9))
def test_expectations_and_variances(contract: dict[str, Any], row: int) -> None:
    expected = contract["expectations"][row]
    sampling = {name: expected[name] for name in ("off_policy", "groups", "group_size")}
    problem = problem_of(contract, **sampling)
    estimator: Estimator = find_estimator(NAMES[expected["estimator"]])
    (moments,) = exact_moments([estimator], problem)
    assert moments.batches is None
    assert_close(moments.mean, expected["expected_gradient"])
    assert moments.total_variance == pytest.approx(expected["total_variance"], abs=TOLERANCE)
    measured = direction(moments.mean, problem.gradient())
    for name in ("rel", "scale", "cosine", "off_axis"):
        # the file's ∇J is by finite differences, good to 1e-10
        assert getattr(measured, name) == pytest.approx(expected[name], abs=TOLERANCE)
