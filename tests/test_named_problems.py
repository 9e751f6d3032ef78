"""Every named problem pins its size; its three gradients agree; together they have no blind spot."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import pytest
import torch

from pgcheck import truth
from pgcheck.errors import ProblemError, UnknownNameError
from pgcheck.estimators.lookup import FILLED_BY  # noqa: F401  (fills the registries)
from pgcheck.policies import LinearPolicy
from pgcheck.problem import Problem
from pgcheck.registry import find_problem, heavy_problems, register_problem, registered_problems
from pgcheck.trajectories import Paths

# N rollouts and K contexts of each, with the count that gives them
TREE = (30, 15)  # per prompt 1 text of one token (EOS), 2 of two, 4·3 of three: 15; 1+2+4 prefixes each, and the end
TWO_STATE = (
    26,
    2,
)  # n(s0) = 2, 6, 16 and n(s1) = 2, 4, 10 for 1, 2, 3 steps: n'(s0) = 2n(s0)+n(s1), n'(s1) = n(s0)+n(s1)
DIALOGUE = (10, 3)  # per prompt 1 answer at once, 2 results · 2 answers: 5; two prompts, one context for second turns
CHAIN = (10, 4)  # from s0: leave; walk and leave; walk and slip; twice walk and leave or stay: 5; from s1 the same
CONTEXTUAL = (9, 3)  # three prompts, three arms
SIZES = {
    "bandit/two-arm": (2, 1),  # two arms
    "bandit/contextual": CONTEXTUAL,
    "bandit/stationary": (3, 3),  # one face of arm 0, two of arm 1; two terminal states have a context as well
    "bandit/extreme": (4, 2),  # two prompts, two arms
    "degenerate/all-equal": (6, 2),  # two prompts, three arms
    "degenerate/group-of-one": (6, 2),  # the same
    "mdp/two-state": (10, 2),  # two steps: 6 + 4
    "mdp/two-state-0.9": TWO_STATE,
    "mdp/two-state-0.5": TWO_STATE,
    "chain/absorbing": CHAIN,
    "chain/linear-policy": CHAIN,
    "mdp/pessimal": (4, 1),  # 2² actions, one context for all three states
    "dialogue/two-turn": DIALOGUE,
    "dialogue/two-turn-0.9": DIALOGUE,
    "dialogue/two-turn-action-clock": DIALOGUE,
    "dialogue/unequal-groups": (5, 2),  # one prompt of the same
    "tree/tokens": TREE,
    "tree/tokens-0.8": TREE,
    "tree/extreme": TREE,
    "tree/binary": (15, 8),  # one prompt of the same
    "tree/binary-fixed": (4, 4),  # 2² texts; the empty one, x, y, the end
    "off-policy/contextual-drifted": CONTEXTUAL,
    "off-policy/two-state-drifted": TWO_STATE,
    "off-policy/dialogue-stale": DIALOGUE,
    "off-policy/tree-stale": TREE,
    "off-policy/tree-truncated": TREE,
    "off-policy/contextual-truncated": CONTEXTUAL,
    "kl/contextual": CONTEXTUAL,
    "kl/dialogue": DIALOGUE,
    "kl/tree": TREE,
    "entropy/contextual": CONTEXTUAL,
    "entropy/tree": TREE,
    "entropy/fork": (3, 3),  # stop, or go on and choose; the end has a context as well
    "lm/parity": (30, 14),  # per prompt 1, 2 and 4·3 completions as above, and 1 + 2 + 4 prefixes, all of them read
    "lm/sum-mod-3": (80, 26),  # per prompt 1 + 3 + 9·4 completions, 1 + 3 + 9 prefixes
    "lm/brackets": (30, 11),  # as parity, but prompt 11 and two of its prefixes are those of prompt 1
    "lm/copy": (80, 26),
    "lm/length": (40, 13),  # one prompt
    "lm/tool-dialogue": (170, 42),  # per prompt 1 + 4 + 16·5, and 1 + 4 + 16; what the tool says adds nothing
    "lm/stale": (15, 7),
    "lm/top-k": (15, 7),
    **{f"notes/coin-{p}": (2, 1) for p in ("0.01", "0.1", "0.3", "0.5", "0.8")},  # right or wrong
    **{f"notes/fair-bandits-{T}": (2**T, T) for T in (2, 3, 4)},
    "notes/entry-fee": (4, 2),  # two steps of two actions, a context each
    "notes/three-arm": (3, 1),
    "notes/two-prompts": (4, 2),
    "notes/prompts-apart": (4, 2),
    "notes/pessimal-undiscounted": (4, 1),
    "notes/with-reference": TWO_STATE,
    "notes/drifted-steps": (4, 2),
}


@functools.cache
def problem_at(name: str, draw: int) -> Problem:
    return find_problem(name).at(draw)


def every_problem() -> list[Problem]:
    return [problem_at(name, 0) for name in SIZES]


both_thetas = pytest.mark.parametrize("draw", [0, 1])
each_problem = pytest.mark.parametrize("name", SIZES)


def test_the_table_is_complete() -> None:
    assert list(SIZES) == list(registered_problems())


@each_problem
def test_rollouts_and_contexts_are_pinned(name: str) -> None:
    table = problem_at(name, 0).trajectories
    assert (len(table), table.contexts) == SIZES[name]


@each_problem
def test_it_introduces_itself(name: str) -> None:
    """`family/setting`, and one sentence or two."""
    problem = problem_at(name, 0)
    assert problem.name == name
    assert name.count("/") == 1
    assert problem.about.endswith(".")
    assert "\n" not in problem.about


@each_problem
@both_thetas
def test_three_derivations_agree(name: str, draw: int) -> None:
    """Dynamic programming (of an environment), the sum over rollouts, central differences; in units of the largest return."""
    problem = problem_at(name, draw)
    size = max(1.0, float(truth.returns(problem.trajectories.paths).abs().max()))
    agreed = problem.gradient()
    methods = {"dynamic_programming": 1e-12, "enumeration": 1e-12, "central_differences": 1e-9}
    if isinstance(problem.env, Paths):
        del methods["dynamic_programming"]
        assert "lm" in name
    for method, allowed in methods.items():
        gap = float((problem.gradient(method) - agreed).abs().max())  # type: ignore[arg-type]
        assert gap <= allowed * size, method
    if "dynamic_programming" in methods:
        assert problem.value("dynamic_programming") == pytest.approx(problem.value("enumeration"), abs=1e-12 * size)


@each_problem
@both_thetas
def test_probabilities_add_up(name: str, draw: int) -> None:
    """Σ_τ p(τ | s₀) = 1 under the target and the behaviour policy; the rows of ∇J add up to 0, as a softmax's do."""
    problem = problem_at(name, draw)
    table = problem.trajectories
    assert float(table.paths.start_probability.sum()) == pytest.approx(1.0, abs=1e-12)
    for chance in (table.probability, table.behavior_probability):
        for start in range(len(table.paths.start_probability)):
            assert float(chance[table.paths.start == start].sum()) == pytest.approx(1.0, abs=1e-12)
    assert float(problem.gradient().sum(-1).abs().max()) <= 1e-12


@each_problem
def test_the_second_theta_is_another_one(name: str) -> None:
    """NAME@1 moves the policy and nothing else."""
    first, second = problem_at(name, 0), problem_at(name, 1)
    assert second.name == f"{name}@1"
    assert float((first.logits - second.logits).abs().max()) > 0.01
    assert second.sizes == first.sizes
    assert torch.equal(second.trajectories.paths.reward, first.trajectories.paths.reward)
    if not first.on_policy:
        assert torch.equal(second.trajectories.behavior_probability, first.trajectories.behavior_probability)
    again = find_problem(f"{name}@1")
    assert again.digest == second.digest


def test_no_two_are_the_same() -> None:
    digests = [problem_at(name, draw).digest for name in SIZES for draw in (0, 1)]
    assert len(set(digests)) == len(digests)


# -- no blind spot


def returns_by_start(p: Problem) -> list[set[float]]:
    """The values of R from each start."""
    t = p.trajectories
    R = truth.returns(t.paths)
    return [
        {round(x, 9) for x in R[t.paths.start == s].tolist()}
        for s, q in enumerate(t.paths.start_probability.tolist())
        if q > 0
    ]


def observed_inside(p: Problem) -> bool:
    """A position nobody chose before one that somebody chose."""
    mask = p.trajectories.paths.mask
    later = mask.flip(-1).cumsum(-1).flip(-1) > 0
    return bool(((mask == 0) & later).any())


def paid_on_observation(p: Problem) -> bool:
    paths = p.trajectories.paths
    return bool(((paths.mask == 0) & (paths.reward != 0)).any())


def probabilities(p: Problem) -> torch.Tensor:
    return torch.softmax(p.logits, -1)


def states(p: Problem) -> int:
    return int(p.trajectories.paths.state.max()) + 1


SPOTS: dict[str, Callable[[Problem], bool]] = {
    "an observation inside a row": observed_inside,
    "a reward on an observation": paid_on_observation,
    "rows of unequal length": lambda p: not p.fixed_length,
    "γ < 1 that counts positions, where the clocks differ": lambda p: (
        p.discount < 1 and p.trajectories.paths.discount_clock == "position" and observed_inside(p)
    ),
    "γ < 1 that counts actions, where the clocks differ": lambda p: (
        p.discount < 1 and p.trajectories.paths.discount_clock == "action" and observed_inside(p)
    ),
    "γ = 1 over several steps": lambda p: p.discount == 1 and p.trajectories.paths.steps > 1,
    "at least three returns from each of two prompts": lambda p: sum(len(v) >= 3 for v in returns_by_start(p)) >= 2,
    "rewards before the last step": lambda p: bool((p.trajectories.paths.reward[:, 0] != 0).any() and not one_step(p)),
    "one step": lambda p: one_step(p),
    "off-policy with full support": lambda p: not p.on_policy and p.full_support,
    "off-policy over several steps": lambda p: not p.on_policy and not one_step(p),
    "off-policy with observations": lambda p: not p.on_policy and observed_inside(p),
    "broken support": lambda p: not p.full_support,
    "a prompt whose groups all agree, next to one whose groups do not": lambda p: (
        min(p.sizes) >= 2 and {len(v) == 1 for v in returns_by_start(p)} == {True, False}
    ),
    "groups of one": lambda p: p.sizes == (1,) * p.groups and p.groups > 2,
    "∇J = 0 with rewards that vary": lambda p: (
        float(p.gradient().abs().max()) == 0.0 and max(len(v) for v in returns_by_start(p)) > 1
    ),
    "fewer contexts than states": lambda p: p.trajectories.contexts < states(p),
    "fewer parameters than logits": lambda p: p.logit_jacobian().shape[1] < p.logits.numel(),
    "probabilities below 1e-5": lambda p: bool((probabilities(p) < 1e-5).any()),
    "groups of unequal size": lambda p: len(set(p.sizes)) > 1,
    "groups of more than two": lambda p: min(p.sizes) > 2,
    "one group": lambda p: p.groups == 1,
    "several groups of several rows": lambda p: p.groups > 1 and min(p.sizes) > 1,
    "several rows of one step that share a prompt": lambda p: one_step(p) and max(p.sizes) > 1,
    "one prompt, right or wrong, several steps of unequal length": lambda p: right_or_wrong(p) and not p.fixed_length,
    "one prompt, right or wrong, several steps of equal length": lambda p: right_or_wrong(p) and p.fixed_length,
    "random moves": lambda p: bool(((p.trajectories.paths.env_probability % 1.0) != 0).any()),
}


def right_or_wrong(p: Problem) -> bool:
    return returns_by_start(p) == [{0.0, 1.0}] and not one_step(p)


def one_step(p: Problem) -> bool:
    return p.trajectories.paths.steps == 1


@pytest.mark.parametrize("spot", SPOTS)
def test_something_shows(spot: str) -> None:
    assert [p.name for p in every_problem() if SPOTS[spot](p)]


@pytest.mark.parametrize("spot", [s for s in SPOTS if "off-policy" not in s and "support" not in s])
def test_something_shows_on_policy(spot: str) -> None:
    """What hides nothing about ratios is in the default set already."""
    assert [p.name for p in every_problem() if SPOTS[spot](p) and p.on_policy]


def test_the_linear_policy_is_one() -> None:
    """Two features, two actions: P = 4 parameters for K·A = 8 logits."""
    problem = problem_at("chain/linear-policy", 0)
    assert isinstance(problem.policy, LinearPolicy)
    assert tuple(problem.logit_jacobian().shape) == (8, 4)


# -- numbers that can be had by hand


def test_two_arm_by_hand() -> None:
    """π(a₁) = .9, r = (1, 0): J = .9, ∂J/∂z₁ = p(1 − p) = .09."""
    problem = problem_at("bandit/two-arm", 0)
    assert problem.value() == pytest.approx(0.9, abs=1e-15)
    assert problem.gradient()[0].tolist() == pytest.approx([0.09, -0.09], abs=1e-15)


def test_pessimal_by_hand() -> None:
    """J = γ E[1[a_0 = a₁] − .75 · 1[a_1 = a₁]] = .5 (p − .75 p): ∂J/∂z₁ = .125 p(1 − p)."""
    problem = problem_at("mdp/pessimal", 0)
    p = 1 / (1 + math.exp(-0.4))
    assert problem.value() == pytest.approx(0.125 * p, abs=1e-15)
    assert float(problem.gradient()[0, 0]) == pytest.approx(0.125 * p * (1 - p), abs=1e-15)


@both_thetas
def test_stationary_at_every_theta(draw: int) -> None:
    """Both arms pay .5 on average (.4 · 2 − .6 · .5 = .5): J does not move."""
    problem = problem_at("bandit/stationary", draw)
    assert problem.value() == pytest.approx(0.5, abs=1e-15)
    assert float(problem.gradient().abs().max()) <= 1e-16


def test_right_or_wrong_by_hand() -> None:
    """Two tokens that differ: π(x) π(y|x) + π(y) π(x|y)."""
    problem = problem_at("tree/binary-fixed", 0)
    x, y_after_x, x_after_y = (1 / (1 + math.exp(-d)) for d in (0.4 + 0.2, -0.6 - 0.1, -0.5 - 0.3))
    assert problem.value() == pytest.approx(x * y_after_x + (1 - x) * x_after_y, abs=1e-15)


def test_texts_that_end_in_x() -> None:
    """The return of every text of `tree/binary`, token by token: x is 1, EOS is 0."""
    paths = problem_at("tree/binary", 0).trajectories.paths
    for action, reward in zip(paths.action.tolist(), paths.reward.tolist(), strict=True):
        text = [a for a in action if a > 0]
        assert sum(reward) == float(text[-1:] == [1])


# -- the registry


def test_a_name_is_taken_once() -> None:
    with pytest.raises(ProblemError, match=r"bandit/two-arm.*registered already"):
        register_problem("bandit/two-arm", lambda: problem_at("bandit/two-arm", 0))


@pytest.mark.parametrize(
    ("wrong", "nearest"), [("bandit/two-arms", "bandit/two-arm"), ("dialog/two-turn", "dialogue/two-turn")]
)
def test_an_unknown_name_suggests_the_nearest(wrong: str, nearest: str) -> None:
    with pytest.raises(UnknownNameError, match=f"unknown problem '{wrong}'.*Did you mean '{nearest}'"):
        find_problem(wrong)


@pytest.mark.parametrize("wrong", ["bandit/two-arm@x", "bandit/two-arm@-1", "@1", ""])
def test_a_theta_is_a_number(wrong: str) -> None:
    with pytest.raises(UnknownNameError):
        find_problem(wrong)


# -- those that can only be drawn

SAMPLED = {  # completions, prefixes: Σ 7^t for t < 5 and 7^5 more, of two prompts; Σ 7^t for t < 5 of each
    "lm-large/sum-mod": (2 * (2_801 + 16_807), 2 * 2_801),
    "lm-large/sum-mod-stale": (2 * (2_801 + 16_807), 2 * 2_801),
    "lm-large/written": (2 * (sum(7**t for t in range(16)) + 7**16), None),
}


def test_sampled_problems() -> None:
    """Not among those that are enumerated; of the sizes they say; drawn, and the gradient known where prefixes are few."""
    assert list(SAMPLED) == [name for name in heavy_problems() if name.startswith("lm-large/")]
    assert not set(SAMPLED) & set(registered_problems())
    for name, (completions, prefixes) in SAMPLED.items():
        problem = find_problem(name)
        assert problem.name == name
        assert problem.env.completions == completions
        assert problem.written == (prefixes is None)
        batch = problem.sample(16, seed=1)
        assert set(batch.reward.unique().tolist()) == {0.0, 1.0}
        assert problem.binary_return
        assert problem.on_policy == ("stale" not in name)
        if prefixes:
            assert problem.env.prefix_count == len(problem.env.tree.reward) == prefixes
            assert float(problem.gradient().norm()) > 1e-3
    with pytest.raises(UnknownNameError, match="lm-large/sum-mod"):
        find_problem("lm-large/sum-mud")
