"""`Problem`: the sampling plan, facts, digest, other θ, the registry, and what is refused."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given

from pgcheck.errors import ProblemError, UnknownNameError
from pgcheck.policies import LinearPolicy
from pgcheck.problem import Problem
from pgcheck.registry import find_problem, register_problem, registered_problems
from tests.worlds import World, random_world, shares, two_arm_env, two_arm_paths, two_state_env, worlds

LOGITS = [[0.3, -0.1], [0.7, 0.2], [0.0, 0.0]]


def two_state(**changes: Any) -> Problem:
    return Problem(two_state_env(), LOGITS, **changes)


# -- the sampling plan


@pytest.mark.parametrize(
    ("groups", "group_size", "sizes", "labels"),
    [
        (1, 4, (4,), [0, 0, 0, 0]),
        (3, 1, (1, 1, 1), [0, 1, 2]),
        (2, 2, (2, 2), [0, 0, 1, 1]),
        (3, (1, 3, 2), (1, 3, 2), [0, 1, 1, 1, 2, 2]),
        (2, [2, 1], (2, 1), [0, 0, 1]),
    ],
)
def test_rows_are_the_groups_one_after_another(
    groups: int, group_size: Any, sizes: tuple[int, ...], labels: list[int]
) -> None:
    """B = Σ sizes; row i carries the number of its group."""
    for problem in (
        two_state(groups=groups, group_size=group_size),
        two_state().with_sampling(groups=groups, group_size=group_size),
    ):
        assert problem.sizes == sizes
        assert problem.rows == sum(sizes)
        assert problem.group_labels.tolist() == labels


def test_sampling_leaves_everything_else() -> None:
    """Another batch shape, the same truth."""
    problem = random_world(4, off_policy=True, shared=True).problem()
    other = problem.with_sampling(groups=5, group_size=3)
    assert torch.equal(problem.gradient(), other.gradient())
    assert torch.equal(problem.logits, other.logits)
    assert other.behavior_logits is not None
    assert torch.equal(problem.behavior_logits, other.behavior_logits)
    assert problem.sizes == (2, 2)


# -- facts


@given(worlds())
def test_facts(world: World) -> None:
    """on_policy, full_support, fixed_length and γ, each against the world's own account."""
    problem = world.problem()
    table = problem.trajectories
    lengths = {sum(row) for row in table.paths.mask.tolist()}
    assert problem.fixed_length == (len(lengths) == 1)
    visited = set(table.paths.context[table.paths.mask > 0].tolist())
    behavior = world.policy() if world.behavior is None else shares(world.behavior)
    assert problem.on_policy == all(world.policy()[k] == behavior[k] for k in visited)
    assert problem.full_support
    assert problem.discount == float(world.discount)


def test_on_policy_compares_probabilities_not_logits() -> None:
    """softmax(z + c) = softmax(z)."""
    assert two_state(behavior_logits=[[z + 3.0 for z in row] for row in LOGITS]).on_policy
    assert not two_state(behavior_logits=[[0.0, 0.0]] * 3).on_policy


def test_broken_support() -> None:
    """A behaviour policy that never takes action 1 in state 1 leaves out rollouts of the target."""
    problem = two_state(behavior_logits=[[0.0, 0.0], [0.0, -math.inf], [0.0, 0.0]])
    assert not problem.full_support
    assert sorted(problem.trajectories.behavior_probability.tolist()) == [0.0, 0.0, 0.5, 0.5]
    assert not problem.on_policy


def test_contexts_are_what_the_policy_sees() -> None:
    """context = contexts[state] where the policy acts, −1 elsewhere; the state stays."""
    env = two_state_env()
    paths = Problem(env, [[0.0, 0.0]], contexts=[0, 0, 0]).trajectories.paths
    assert torch.equal(paths.context, torch.zeros_like(paths.context))
    assert torch.equal(paths.state, env.paths().state)


def test_from_trajectories_is_the_constructor() -> None:
    """A table of rollouts instead of an environment."""
    problem = Problem.from_trajectories(two_arm_paths(), [[0.2, -0.2]], groups=2, group_size=3, name="toy/table")
    assert problem.digest == Problem(two_arm_paths(), [[0.2, -0.2]], groups=2, group_size=3).digest
    assert problem.name == "toy/table"
    expected = Problem(two_arm_env(), [[0.2, -0.2]])
    assert problem.value() == pytest.approx(expected.value("dynamic_programming"), abs=1e-15)
    torch.testing.assert_close(problem.gradient(), expected.gradient(), rtol=0, atol=1e-15)


def test_side_tables_are_applied_in_order() -> None:
    """`trajectories_with([f, g])` is g(f(table)); the cached table is left alone."""
    problem = two_state()
    table = problem.trajectories_with(
        [lambda t: t.with_side(a=t.logp), lambda t: t.with_side(b=2 * t.side["a"])],
    )
    assert torch.equal(table.side["b"], 2 * problem.trajectories.logp)
    assert not problem.trajectories.side


def test_frozen() -> None:
    """A problem does not change."""
    with pytest.raises(FrozenInstanceError):
        two_state().groups = 3  # type: ignore[misc]


# -- digest

ENV: dict[str, Any] = {"discount": 0.9}
CHANGES: dict[str, Callable[[], Problem]] = {
    "transition": lambda: Problem(
        two_state_env(transition=[[[0.0, 0.5, 0.5]] * 2, [[0.0, 0.0, 1.0]] * 2, [[0.0, 0.0, 1.0]] * 2], **ENV), LOGITS
    ),
    "reward": lambda: Problem(two_state_env(reward=[[0.0, 1.0], [1.0, 2.5], [0.0, 0.0]], **ENV), LOGITS),
    "initial": lambda: Problem(two_state_env(initial=[0.5, 0.5, 0.0], **ENV), LOGITS),
    "initial, same starts": lambda: Problem(two_state_env(initial=[0.25, 0.75, 0.0], **ENV), LOGITS),
    "horizon": lambda: Problem(two_state_env(horizon=1, **ENV), LOGITS),
    "longer horizon": lambda: Problem(two_state_env(horizon=3, **ENV), LOGITS),
    "discount": lambda: Problem(two_state_env(discount=0.8), LOGITS),
    "clock": lambda: Problem(two_state_env(discount_clock="action", **ENV), LOGITS),
    "terminal": lambda: Problem(two_state_env(terminal=[1], **ENV), LOGITS),
    "observation": lambda: Problem(
        two_state_env(reward=[[0.0, 1.0], [2.0, 2.0], [0.0, 0.0]], observation=[1], **ENV), LOGITS
    ),
    "contexts": lambda: Problem(two_state_env(**ENV), LOGITS, contexts=[0, 2, 1]),
    "policy": lambda: Problem(two_state_env(**ENV), [[0.3, -0.1], [0.7, 0.2 + 1e-12], [0.0, 0.0]]),
    "behavior": lambda: Problem(two_state_env(**ENV), LOGITS, behavior_logits=[[0.0, 0.0]] * 3),
    "reference": lambda: Problem(two_state_env(**ENV), LOGITS, ref_logits=[[0.0, 0.0]] * 3),
    "KL": lambda: Problem(two_state_env(**ENV), LOGITS, ref_logits=[[0.0, 0.0]] * 3, kl_coefficient=0.5),
    "more KL": lambda: Problem(two_state_env(**ENV), LOGITS, ref_logits=[[0.0, 0.0]] * 3, kl_coefficient=1.0),
    "entropy": lambda: Problem(two_state_env(**ENV), LOGITS, entropy_coefficient=0.5),
    "KL and entropy": lambda: Problem(
        two_state_env(**ENV), LOGITS, ref_logits=[[0.0, 0.0]] * 3, kl_coefficient=0.5, entropy_coefficient=0.5
    ),
    "groups": lambda: Problem(two_state_env(**ENV), LOGITS, groups=2, group_size=2),
    "group_size": lambda: Problem(two_state_env(**ENV), LOGITS, group_size=5),
    "order of groups": lambda: Problem(two_state_env(**ENV), LOGITS, groups=2, group_size=(1, 3)),
    "order of groups, the other": lambda: Problem(two_state_env(**ENV), LOGITS, groups=2, group_size=(3, 1)),
}


def test_digest_changes_with_every_ingredient() -> None:
    """All of them, and the plain problem, pairwise different."""
    digests = {name: build().digest for name, build in CHANGES.items()}
    digests["plain"] = Problem(two_state_env(**ENV), LOGITS).digest
    assert len(set(digests.values())) == len(digests)
    assert all(re.fullmatch(r"[0-9a-f]{16}", d) for d in digests.values())


@pytest.mark.parametrize("name", CHANGES)
def test_digest_is_stable(name: str) -> None:
    """Built twice from scratch, the same; the name and the sentence for reports do not matter."""
    problem = CHANGES[name]()
    assert CHANGES[name]().digest == problem.digest
    assert replace(problem, name="other/name", about="another sentence").digest == problem.digest


def test_digest_does_not_see_the_last_bits_of_a_module() -> None:
    """Another machine's matrix product: 1e-16 off. A table is the numbers that it was given."""

    class Noisy(torch.nn.Module):
        def __init__(self, noise: float) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.tensor([[0.3, -0.1], [0.7, 0.2], [0.0, 0.0]], dtype=torch.float64))
            self.noise = noise

        def forward(self, one_hot: torch.Tensor) -> torch.Tensor:
            return one_hot.to(self.weight.dtype) @ self.weight + self.noise

    digests = [Problem(two_state_env(**ENV), Noisy(noise)).digest for noise in (0.0, 1e-16, 1e-6)]
    assert digests[0] == digests[1]
    assert digests[0] != digests[2]


def test_digest_does_not_see_how_a_number_is_written() -> None:
    """γ = 1 and γ = 1.0, a group of 4 and (4,), lists and tensors."""
    one = Problem(two_arm_paths(discount=1), [[0.0, 0.0]], group_size=4)
    same = Problem(two_arm_paths(discount=1.0), torch.zeros(1, 2), group_size=(4,))
    assert one.digest == same.digest


# -- another θ


def test_at_zero_is_the_problem_itself() -> None:
    """Draw 0 is θ as given."""
    problem = two_state()
    assert problem.at(0) is problem


@pytest.mark.parametrize("off_policy", [False, True])
def test_at_moves_theta_and_nothing_else(off_policy: bool) -> None:
    """Draws differ from each other and from the original; what draws the batches stays if it was given."""
    problem = random_world(4, off_policy=off_policy).problem()
    draws = [problem.at(i) for i in range(4)]
    assert len({p.digest for p in draws}) == 4
    for i, p in enumerate(draws[1:], 1):
        assert p.name == f"{problem.name}@{i}"
        assert (p.sizes, p.contexts, p.env) == (problem.sizes, problem.contexts, problem.env)
        assert p.on_policy == (not off_policy)
        if off_policy:
            assert torch.equal(p.behavior_logits, problem.behavior_logits)
        assert not torch.allclose(p.gradient(), problem.gradient())


def test_at_is_a_function() -> None:
    """Same draw, same bytes, also from a problem built anew; the original is not moved."""
    problem = two_state()
    before = problem.logits
    assert problem.at(1).digest == problem.at(1).digest == two_state().at(1).digest
    assert torch.equal(problem.at(2).logits, two_state().at(2).logits)
    assert torch.equal(problem.logits, before)


def test_at_draws_a_normal_of_deviation_one_half() -> None:
    """θ' − θ over 4 000 numbers: |mean| and |sd − 1/2| within five standard errors, 0.5/√n and 0.5/√2n."""
    n = 1000
    env = two_arm_env(transition=[[[1.0]] * (4 * n)], reward=[[0.0] * (4 * n)])
    problem = Problem(env, torch.zeros(1, 4 * n))
    moved = problem.at(1).logits
    assert abs(float(moved.mean())) < 5 * 0.5 / math.sqrt(4 * n)
    assert abs(float(moved.std()) - 0.5) < 5 * 0.5 / math.sqrt(8 * n)


def test_at_moves_parameters_not_logits() -> None:
    """z' = x w' stays in the range of the features: contexts with equal features keep equal logits."""
    features = torch.tensor([[1.0], [1.0], [2.0]], dtype=torch.float64)
    moved = Problem(two_state_env(), LinearPolicy(features, [[0.5, -0.5]])).at(3).logits
    assert torch.equal(moved[0], moved[1])
    torch.testing.assert_close(moved[2], 2 * moved[0], rtol=0, atol=1e-15)


def test_global_random_state_is_untouched() -> None:
    """Building, moving and solving a problem draws nothing from the shared streams of torch and numpy."""
    torch_before, numpy_before = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    moved = random_world(4, off_policy=True).problem().at(1)
    _ = moved.gradient(), moved.digest, moved.parameter_gradient()
    assert torch.equal(torch.random.get_rng_state(), torch_before)
    assert bool((np.random.get_state()[1] == numpy_before).all())


def test_at_does_not_depend_on_the_global_seed() -> None:
    """The draw's number is the only seed."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        one = two_state().at(1).logits
        torch.manual_seed(2)
        assert torch.equal(two_state().at(1).logits, one)


# -- the registry


@pytest.fixture
def empty_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """A registry of its own for the test."""
    monkeypatch.setattr("pgcheck.registry._BUILDERS", {})


@pytest.mark.usefixtures("empty_registry")
def test_registered_problems_are_found() -> None:
    """By name, and at another θ by `name@draw`."""
    register_problem("toy/one", lambda: two_state(name="toy/one"))
    register_problem("toy/two", lambda: two_state(name="toy/two", group_size=2))
    assert list(registered_problems()) == ["toy/one", "toy/two"]
    assert find_problem("toy/two").sizes == (2,)
    assert find_problem("toy/one@0").digest == find_problem("toy/one").digest == two_state().digest
    assert find_problem("toy/one@2").digest == two_state().at(2).digest
    assert find_problem("toy/one@2").name == "toy/one@2"


@pytest.mark.usefixtures("empty_registry")
def test_a_name_is_taken_once() -> None:
    """The second registration raises, the first stays."""
    register_problem("toy/one", two_state)
    with pytest.raises(ProblemError, match=r"problem 'toy/one' is registered already; choose another name"):
        register_problem("toy/one", lambda: two_state(group_size=2))
    assert find_problem("toy/one").sizes == (4,)


@pytest.mark.usefixtures("empty_registry")
def test_the_list_of_problems_is_a_copy() -> None:
    """Changing it does not change the registry."""
    registered_problems()["toy/one"] = two_state
    assert registered_problems() == {}


@pytest.mark.usefixtures("empty_registry")
def test_an_unknown_name_suggests_the_nearest() -> None:
    """A misspelling is answered with the name meant; gibberish with the list."""
    register_problem("bandit/two-arm", two_state)
    register_problem("mdp/two-state", two_state)
    with pytest.raises(UnknownNameError, match=r"unknown problem 'bandit/two-arms'\. Did you mean 'bandit/two-arm'\?"):
        find_problem("bandit/two-arms")
    with pytest.raises(UnknownNameError, match=r"unknown problem 'zzzz'\. `pgcheck list problems` shows them all"):
        find_problem("zzzz")


@pytest.mark.usefixtures("empty_registry")
@pytest.mark.parametrize("draw", ["x", "-1", "1.5", "1@2", "²"])
def test_a_draw_is_a_number(draw: str) -> None:
    """What follows @ is a natural number."""
    register_problem("mdp/two-state", two_state)
    with pytest.raises(UnknownNameError, match="After the @ stands the number of a θ: mdp/two-state@1"):
        find_problem(f"mdp/two-state@{draw}")


# -- what is refused

BAD: list[tuple[dict[str, Any], str]] = [
    ({"groups": 0}, r"groups: 0; it must be an integer of at least 1"),
    ({"groups": -2}, r"groups: -2; .*at least 1"),
    ({"groups": 1.5}, r"groups: 1\.5; it must be an integer"),
    ({"groups": "2"}, r"groups: '2'; it must be an integer"),
    ({"group_size": 0}, r"group_size: 0; expected a positive integer or 1 of them"),
    ({"group_size": 2.5}, r"group_size: 2\.5; expected a positive integer"),
    ({"group_size": None}, r"group_size: None; expected a positive integer"),
    ({"groups": 2, "group_size": (2, 0)}, r"group_size: \(2, 0\); expected a positive integer or 2 of them"),
    ({"groups": 2, "group_size": (2, 1.5)}, r"group_size: \(2, 1\.5\); expected a positive integer"),
    ({"groups": 2, "group_size": (2,)}, r"group_size: \(2,\); expected a positive integer or 2 of them, one a group"),
    ({"group_size": ()}, r"group_size: \(\); expected a positive integer"),
    ({"contexts": [0, 1]}, r"contexts: \[0, 1\]; expected one context ≥ 0 for each of 3 states"),
    ({"contexts": [0, 1, -1]}, r"contexts: \[0, 1, -1\]; expected one context ≥ 0"),
    ({"contexts": [0, 1, 1.5]}, r"contexts: \[0, 1, 1\.5\]; expected one context"),
    ({"contexts": ["a", "b", "c"]}, r"contexts: \['a', 'b', 'c'\]; expected one context"),
    ({"behavior_logits": [[0.0, 0.0]]}, r"behavior_logits: shape \[1, 2\], expected \[3, 2\] as the policy's"),
    ({"behavior_logits": [[0.0, math.nan]] * 3}, r"behavior_logits: every logit must be finite or -inf"),
    ({"behavior_logits": [[0.0, math.inf]] * 3}, r"behavior_logits: every logit must be finite or -inf"),
    ({"behavior_logits": [[-math.inf, -math.inf]] * 3}, r"behavior_logits: .*one in each row finite"),
    ({"behavior_logits": "uniform"}, r"behavior_logits: cannot be read"),
    ({"ref_logits": [[0.0, 0.0, 0.0]] * 3}, r"ref_logits: shape \[3, 3\], expected \[3, 2\]"),
    ({"ref_logits": [[0.0, -math.inf]] * 3}, r"ref_logits: every logit must be finite\."),
    ({"ref_logits": [[0.0, math.nan]] * 3}, r"ref_logits: every logit must be finite\."),
    ({"ref_logits": [[0.0], [0.0, 1.0]]}, r"ref_logits: cannot be read"),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=[f"{next(iter(c))}-{i}" for i, (c, _) in enumerate(BAD)])
def test_bad_input_is_named(changes: dict[str, Any], message: str) -> None:
    """Field, value and what it must be."""
    with pytest.raises(ProblemError, match=message):
        two_state(**changes)


def test_paths_carry_their_own_contexts() -> None:
    """Contexts beside a table of rollouts are a contradiction."""
    with pytest.raises(
        ProblemError, match=r"contexts: rollouts given as `Paths` carry their own contexts; leave it out"
    ):
        Problem(two_arm_paths(), [[0.0, 0.0]], contexts=[0])


def test_something_else_than_an_environment() -> None:
    """A list is neither a `TabularMDP` nor `Paths`."""
    with pytest.raises(ProblemError, match="env: "):
        Problem([[1.0, 0.0]], [[0.0, 0.0]])  # type: ignore[arg-type]


def test_truth_methods_that_do_not_apply() -> None:
    """Dynamic programming needs dynamics; an unknown method is named with the known ones."""
    problem = Problem(two_arm_paths(), [[0.0, 0.0]])
    for truth in (problem.value, problem.gradient):
        with pytest.raises(ProblemError, match=r"method: dynamic programming needs an environment"):
            truth("dynamic_programming")
    with pytest.raises(ProblemError, match=r"method: 'guess' is not one of dynamic_programming, enumeration, central"):
        problem.gradient("guess")  # type: ignore[arg-type]


def test_an_unknown_method_for_the_value() -> None:
    """J by an unknown method is refused as ∇J is, not silently enumerated."""
    with pytest.raises(ProblemError, match=r"method: 'guess' is not one of dynamic_programming"):
        two_state().value("guess")  # type: ignore[arg-type]


def test_a_problem_in_which_the_policy_never_acts() -> None:
    """Only observations: there is no gradient to estimate, and the message says so."""
    env = two_arm_env(reward=[[1.0, 1.0]], observation=[0])
    with pytest.raises(ProblemError, match=r"never acts|no action|does not act"):
        Problem(env, [[0.0, 0.0]]).trajectories  # noqa: B018
