"""Problems that single sentences about policy gradients are decided on: as small as the sentence allows.

They are no test bed for estimators (that is `pgcheck.named_problems`): each has one thing in it, and most have numbers
that can be worked out by hand.

Guarantee: every problem pins its number of rollouts and contexts in a test.
"""

from __future__ import annotations

import math

import torch

from pgcheck.envs.tabular import TabularMDP
from pgcheck.named_problems import TWO_STATE_LOGITS, bandit, named, two_state
from pgcheck.problem import Problem

COINS = (0.01, 0.1, 0.3, 0.5, 0.8)
FAIR_STEPS = (2, 3, 4)


def coin(p: float) -> Problem:
    """One prompt, two answers, reward 1 and 0; the right one has probability p, so that J = p."""
    return Problem(bandit([[1.0, 0.0]], [1.0]), [[math.log(p / (1.0 - p)), 0.0]], groups=1, group_size=4)


for p in COINS:

    def _coin(p: float = p) -> Problem:
        return coin(p)

    _coin.__doc__ = f"One prompt with a right and a wrong answer, reward 1 and 0, the right one with probability {p:g}."
    named(f"notes/coin-{p:g}", belongs_to=None)(_coin)


def fair_bandits(steps: int) -> Problem:
    """`steps` independent fair bandits in a row, +1 or −1 each, a logit row for each of them."""
    transition = torch.zeros(steps, 2, steps, dtype=torch.float64)
    for s in range(steps):
        transition[s, :, min(s + 1, steps - 1)] = 1.0
    env = TabularMDP(transition, [[1.0, -1.0]] * steps, [1.0] + [0.0] * (steps - 1), horizon=steps)
    return Problem(env, [[0.0, 0.0]] * steps, groups=1, group_size=1)


for steps in FAIR_STEPS:

    def _fair(steps: int = steps) -> Problem:
        return fair_bandits(steps)

    _fair.__doc__ = f"{steps} independent fair bandits in a row, +1 or −1 each, the rewards summed; one rollout."
    named(f"notes/fair-bandits-{steps}", belongs_to=None)(_fair)


def _two_steps(reward: list[list[float]], logits: list[list[float]], **settings: object) -> Problem:
    """State 0, then state 1, whatever is done; one rollout."""
    transition = [[[0.0, 1.0], [0.0, 1.0]]] * 2
    return Problem(TabularMDP(transition, reward, [1.0, 0.0], horizon=2), logits, group_size=1, **settings)  # type: ignore[arg-type]


@named("notes/entry-fee", belongs_to=None)
def _entry_fee() -> Problem:
    """The first step costs 1 whatever is done, the second pays 2 or 0 by a fair coin: what was paid before is a
    baseline."""
    return _two_steps([[-1.0, -1.0], [2.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]])


@named("notes/three-arm", belongs_to=None)
def _three_arm() -> Problem:
    """One prompt, three arms of reward 0, 1 and 2: not binary, so that a std turns the direction."""
    return Problem(bandit([[0.0, 1.0, 2.0]], [1.0]), [[-1.0, 0.5, 0.0]], groups=1, group_size=4)


@named("notes/two-prompts", belongs_to=None)
def _two_prompts() -> Problem:
    """Two prompts of equal chance, an easy one (.9) and a hard one (.2), reward 1 and 0."""
    logits = [[math.log(p / (1.0 - p)), 0.0] for p in (0.9, 0.2)]
    return Problem(bandit([[1.0, 0.0]] * 2, [0.5, 0.5]), logits, groups=2, group_size=4)


@named("notes/prompts-apart", belongs_to=None)
def _prompts_apart() -> Problem:
    """Two prompts of equal chance: one pays 1 or 0, the other 11 or 10, by a fair coin each."""
    return Problem(bandit([[1.0, 0.0], [11.0, 10.0]], [0.5, 0.5]), [[0.0, 0.0]] * 2, groups=2, group_size=4)


@named("notes/pessimal-undiscounted", belongs_to=None)
def _pessimal_undiscounted() -> Problem:
    """`mdp/pessimal` with γ = 1."""
    transition = torch.zeros(3, 2, 3, dtype=torch.float64)
    transition[0, 0, 1] = transition[0, 1, 2] = 1.0
    transition[1:, :, 0] = 1.0
    env = TabularMDP(transition, [[0.0, 0.0], [1.0 - 0.75, 1.0], [-0.75, 0.0]], [1, 0, 0], horizon=2)
    return Problem(env, [[0.4, 0.0]], contexts=[0, 0, 0], groups=1, group_size=4)


@named("notes/with-reference", belongs_to=None)
def _with_reference() -> Problem:
    """`mdp/two-state` less the KL to a reference policy: what a penalty is the gradient of."""
    return Problem(
        two_state(1.0), TWO_STATE_LOGITS[1.0], ref_logits=[[0.0, 0.6], [-0.5, 0.2]], kl_coefficient=1.0,
        groups=1, group_size=2,
    )  # fmt: skip


@named("notes/drifted-steps", belongs_to=None)
def _drifted_steps() -> Problem:
    """Two steps that nothing connects, drawn by another policy: E[w²] is the product over the steps."""
    behavior = [[0.5, 0.0], [-0.3, 0.2]]
    return _two_steps([[1.0, 0.0], [0.0, 2.0]], [[0.0, 0.6], [0.4, 0.0]], behavior_logits=behavior)
