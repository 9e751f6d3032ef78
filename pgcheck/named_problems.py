"""The named problems: small enough to enumerate, and together without a blind spot.

What hides a bias: one step or equal lengths hide every length and credit error; one prompt with 0/1 rewards, or groups
of two, hide the std; no observation inside a row hides the multi-turn family; on-policy hides every ratio; γ = 1 hides
γ^t; a scale error shows only in `scale`; one θ may be a lucky one (`NAME@1` is the same problem at another θ). Those of
`kl/` and `entropy/` have a penalty or a bonus in their objective: one step hides where a token leads, γ = 1 hides a term
that is not discounted.

Guarantee: every problem pins its number of rollouts and contexts in a test.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from pgcheck.batch import DiscountClock
from pgcheck.envs import language
from pgcheck.envs.language import LMTask
from pgcheck.envs.tabular import TabularMDP
from pgcheck.policies.decoding import Decoding, truncated
from pgcheck.policies.transformer import TinyGPT
from pgcheck.problem import Problem
from pgcheck.registry import find_problem, register_problem

INF = math.inf


def named(
    name: str,
    *,
    belongs_to: str | None = "core",
    double_of: str | None = None,
    heavy: bool = False,
) -> Callable[[Callable[[], Problem]], Callable[[], Problem]]:
    """Register a builder as `name`, with its docstring as the problem's `about`; see `pgcheck.registry.register_problem`."""

    def decorate(build: Callable[[], Problem]) -> Callable[[], Problem]:
        about = " ".join((build.__doc__ or "").split())

        @functools.cache
        def built() -> Problem:
            problem = build()
            object.__setattr__(problem, "name", name)
            object.__setattr__(problem, "about", about)
            return problem

        told = about if heavy else None
        belongs = None if heavy else belongs_to
        register_problem(name, built, belongs_to=belongs, double_of=double_of, heavy=told)
        return built

    return decorate


# -- bandits


def bandit(rewards: Sequence[Sequence[float]], initial: Sequence[float]) -> TabularMDP:
    """One step; `rewards[s][a]`."""
    S, A = len(rewards), len(rewards[0])
    stay = torch.eye(S, dtype=torch.float64).unsqueeze(1).expand(S, A, S)
    return TabularMDP(stay, rewards, initial, horizon=1)


@named("bandit/two-arm")
def _two_arm() -> Problem:
    """Two arms, reward 1 and 0, π(a₁) = .9: where V^π is a worse baseline than none at all."""
    return Problem(bandit([[1.0, 0.0]], [1.0]), [[math.log(9.0), 0.0]], groups=1, group_size=4)


CONTEXTUAL_REWARDS = [[1.0, 0.0, -0.5], [0.2, 2.0, 0.7], [-1.0, 0.4, 0.3]]
CONTEXTUAL_LOGITS = [[0.3, -0.2, 0.1], [-0.4, 0.5, 0.0], [0.2, 0.6, -0.7]]


@named("bandit/contextual")
def _contextual() -> Problem:
    """Three prompts of different spread, three arms, nine reward values: shows what a std does between prompts."""
    return Problem(bandit(CONTEXTUAL_REWARDS, [0.5, 0.3, 0.2]), CONTEXTUAL_LOGITS, groups=2, group_size=3)


@named("bandit/stationary")
def _stationary() -> Problem:
    """∇J = 0: both arms have the mean reward .5, one surely, one as a coin with skewed faces. Any drift is bias."""
    # State 0 acts; the reward depends on where it goes: arm 0 pays .5; arm 1 pays 2 with .4 and -.5 with .6.
    transition = torch.zeros(3, 2, 3, dtype=torch.float64)
    transition[0, 0, 1] = 1.0
    transition[0, 1, 1], transition[0, 1, 2] = 0.4, 0.6
    reward = torch.zeros(3, 2, 3, dtype=torch.float64)
    reward[0, 0, 1], reward[0, 1, 1], reward[0, 1, 2] = 0.5, 2.0, -0.5
    env = TabularMDP(transition, reward, [1, 0, 0], horizon=1, terminal=[1, 2])
    return Problem(env, [[0.4, -0.3]] * 3, groups=1, group_size=3)


@named("bandit/extreme", double_of="bandit/contextual")
def _extreme() -> Problem:
    """Probabilities of 1 − 1e-6 and 1e-6 next to an even choice: what divides by π or by a std shows here."""
    return Problem(bandit([[0.0, 1.0], [1.0, 0.5]], [0.5, 0.5]), [[13.8, 0.0], [0.0, 0.3]], groups=2, group_size=2)


@named("degenerate/all-equal")
def _all_equal() -> Problem:
    """Two prompts; in one, every arm pays 1, so all its groups have std 0. The other has three reward values."""
    return Problem(
        bandit([[1.0, 1.0, 1.0], [0.0, 1.0, 3.0]], [0.6, 0.4]),
        [[0.5, 0.0, -0.5], [0.1, 0.4, -0.2]],
        groups=2,
        group_size=3,
    )


@named("degenerate/group-of-one")
def _group_of_one() -> Problem:
    """Four prompts drawn, one rollout each: group statistics have nobody to compare with."""
    return Problem(
        bandit([[1.0, 0.0, 0.5], [0.3, -1.0, 2.0]], [0.7, 0.3]),
        [[0.2, 0.0, -0.3], [0.4, -0.1, 0.6]],
        groups=4,
        group_size=1,
    )


# -- MDPs


def two_state(discount: float, *, steps: int = 3) -> TabularMDP:
    """Two states, two actions, a reward at each step, stochastic moves on one action only."""
    transition = [[[1.0, 0.0], [0.3, 0.7]], [[0.0, 1.0], [1.0, 0.0]]]
    reward = [[1.0, -0.5], [0.3, 2.0]]
    return TabularMDP(transition, reward, [0.6, 0.4], horizon=steps, discount=discount)


TWO_STATE_LOGITS = {1.0: [[0.2, -0.4], [0.5, 0.1]], 0.9: [[-0.3, 0.4], [0.0, 0.6]], 0.5: [[0.7, 0.0], [-0.2, 0.3]]}


@named("mdp/two-state")
def _two_state() -> Problem:
    """A reward at each of two steps, γ = 1, two start states: credit assignment without discount."""
    return Problem(two_state(1.0, steps=2), TWO_STATE_LOGITS[1.0], groups=1, group_size=3)


@named("mdp/two-state-0.9", double_of="mdp/two-state")
def _two_state_9() -> Problem:
    """The same dynamics with γ = .9: a missing γ^t shows."""
    return Problem(two_state(0.9), TWO_STATE_LOGITS[0.9], groups=1, group_size=3)


@named("mdp/two-state-0.5", double_of="mdp/two-state")
def _two_state_5() -> Problem:
    """The same dynamics with γ = .5: a missing γ^t shows strongly."""
    return Problem(two_state(0.5), TWO_STATE_LOGITS[0.5], groups=2, group_size=1)


def absorbing_chain(discount: float) -> TabularMDP:
    """Three states in a row and an exit; action 0 walks on (and may slip), action 1 leaves with what the state pays."""
    transition = torch.zeros(4, 2, 4, dtype=torch.float64)
    for s in range(3):
        transition[s, 0, min(s + 1, 2)] = 1.0
        transition[s, 1, 3] = 1.0
    transition[3, :, 3] = 1.0
    transition[1, 0, 2], transition[1, 0, 3] = 0.75, 0.25
    reward = torch.zeros(4, 2, 4, dtype=torch.float64)
    reward[0, 1, :], reward[1, 1, :], reward[2, 1, :] = 0.5, 1.5, 3.0
    reward[:3, 0, :] = -0.25
    return TabularMDP(transition, reward, [0.7, 0.3, 0, 0], horizon=3, discount=discount, terminal=[3])


@named("chain/absorbing")
def _chain() -> Problem:
    """A walk that ends when the policy leaves or slips: lengths 1, 2 and 3, and the length depends on the actions."""
    return Problem(absorbing_chain(0.9), [[0.3, -0.2], [0.1, 0.4], [-0.3, 0.2], [0.0, 0.0]], groups=2, group_size=2)


@named("chain/linear-policy")
def _chain_linear() -> Problem:
    """The walk under a policy with linear features: fewer parameters than logits, γ = 1."""
    from pgcheck.policies import LinearPolicy

    features = [[1.0, 0.0], [1.0, 0.5], [1.0, 1.0], [1.0, 1.5]]
    policy = LinearPolicy(features, [[0.2, -0.1], [-0.4, 0.3]])
    return Problem(absorbing_chain(1.0), policy, groups=1, group_size=3)


@named("mdp/pessimal")
def _pessimal() -> Problem:
    """Two steps, one context: a₁ at t = 0 pays +1 at t = 1, a₁ at t = 1 pays −.75, γ = .5. Without γ^t, ascent goes to
    the worst policy."""
    # states: 0 first step; 1, 2 second step after a₁ or a₂. Action 0 is a₁.
    transition = torch.zeros(3, 2, 3, dtype=torch.float64)
    transition[0, 0, 1] = transition[0, 1, 2] = 1.0
    transition[1:, :, 0] = 1.0
    reward = [[0.0, 0.0], [1.0 - 0.75, 1.0], [-0.75, 0.0]]
    env = TabularMDP(transition, reward, [1, 0, 0], horizon=2, discount=0.5)
    return Problem(env, [[0.4, 0.0]], contexts=[0, 0, 0], groups=1, group_size=4)


# -- dialogues: an observation between two turns


def two_turn(discount: float, clock: DiscountClock, *, prompts: tuple[float, float] = (0.4, 0.6)) -> TabularMDP:
    """A prompt, one of two; the policy answers at once, or asks a tool, sees one of two results, and answers then.

    States 0, 1 prompts, of probabilities `prompts`; 2, 3 the tool's turn after each, which pays as well; 4–7 second turns; 8
    the end.
    """
    S, end = 9, 8
    transition = torch.zeros(S, 2, S, dtype=torch.float64)
    reward = torch.zeros(S, 2, S, dtype=torch.float64)
    for prompt, (direct, ask) in enumerate([(0.5, -0.2), (1.2, 0.1)]):
        tool = 2 + prompt
        transition[prompt, 0, end], transition[prompt, 1, tool] = 1.0, 1.0
        reward[prompt, 0, end], reward[prompt, 1, tool] = direct, ask
        good, poor = 4 + 2 * prompt, 5 + 2 * prompt
        p = (0.3, 0.8)[prompt]
        transition[tool, :, good], transition[tool, :, poor] = p, 1.0 - p
        reward[tool, :, poor] = 0.7
    for s, (first, second) in zip(range(4, 8), [(0.0, 2.0), (1.0, -1.0), (-0.5, 0.4), (0.3, 1.5)], strict=True):
        transition[s, :, end] = 1.0
        reward[s, 0, end], reward[s, 1, end] = first, second
    transition[end, :, end] = 1.0
    return TabularMDP(
        transition, reward, [*prompts, *[0.0] * 7], horizon=3, discount=discount, terminal=[end], observation=[2, 3],
        discount_clock=clock,
    )  # fmt: skip


TWO_TURN_CONTEXTS = [0, 1, 0, 0, 2, 2, 2, 2, 0]  # second turns share one context
TWO_TURN_LOGITS = [[0.2, -0.3], [-0.5, 0.4], [0.1, 0.6]]


@named("dialogue/two-turn")
def _dialogue() -> Problem:
    """Answer, or ask a tool and answer after its observation: mask 0 and a reward in mid-row, γ = 1."""
    return Problem(two_turn(1.0, "position"), TWO_TURN_LOGITS, contexts=TWO_TURN_CONTEXTS, groups=2, group_size=2)


@named("dialogue/two-turn-0.9", double_of="dialogue/unequal-groups")
def _dialogue_9() -> Problem:
    """The dialogue with γ = .9 that counts positions, observations included."""
    return Problem(
        two_turn(0.9, "position"), [[-0.1, 0.3], [0.4, 0.0], [0.5, -0.2]], contexts=TWO_TURN_CONTEXTS, groups=2, group_size=2
    )  # fmt: skip


@named("dialogue/two-turn-action-clock")
def _dialogue_action() -> Problem:
    """The dialogue with γ = .9 that counts the policy's own positions: the observation discounts nothing."""
    return Problem(
        two_turn(0.9, "action"), TWO_TURN_LOGITS, contexts=TWO_TURN_CONTEXTS, groups=1, group_size=3
    )  # fmt: skip


@named("dialogue/unequal-groups")
def _dialogue_unequal() -> Problem:
    """One prompt of the dialogue, γ = .9 by position: one group of three rollouts and one of two."""
    env = two_turn(0.9, "position", prompts=(1.0, 0.0))
    first, _, second = TWO_TURN_LOGITS
    return Problem(env, [first, second], contexts=[0, 0, 0, 0, 1, 1, 1, 1, 0], groups=2, group_size=(3, 2))


# -- token trees: history-tabular language models


def _two_tastes(prompt: int, text: list[int]) -> float:
    """Prompt 0 wants as many x as y, prompt 1 wants it short and ending in x."""
    if prompt == 0:
        return 1.0 if text and text.count(1) == text.count(2) else 0.25 * len(text)
    return 2.0 - 0.5 * len(text) if text and text[-1] == 1 else 0.0


def _ends_in_x(prompt: int, text: list[int]) -> float:
    """Right or wrong."""
    return 1.0 if text and text[-1] == 1 else 0.0


def token_tree(
    discount: float = 1.0, *, prompts: int = 2, score: Callable[[int, list[int]], float] = _two_tastes
) -> TabularMDP:
    """Prompts, tokens {EOS, x, y}, at most three of them; the completed text is scored when it ends.

    Every prefix is a state of its own.
    """
    prefixes = [(prompt, *text) for n in range(3) for prompt in range(prompts) for text in _texts(n)]
    number = {prefix: i for i, prefix in enumerate(prefixes)}
    S, end = len(prefixes) + 1, len(prefixes)
    transition = torch.zeros(S, 3, S, dtype=torch.float64)
    reward = torch.zeros(S, 3, S, dtype=torch.float64)
    for prefix, s in number.items():
        for token in range(3):
            text = (*prefix, token)
            s2 = number.get(text, end) if token else end
            transition[s, token, s2] = 1.0
            if s2 == end:
                reward[s, token, s2] = score(prefix[0], [x for x in text[1:] if x])
    transition[end, :, end] = 1.0
    initial = [0.0] * S
    for prompt in range(prompts):
        initial[number[(prompt,)]] = 1.0 / prompts
    return TabularMDP(transition, reward, initial, horizon=3, discount=discount, terminal=[end])


def _texts(n: int) -> list[tuple[int, ...]]:
    return [()] if n == 0 else [(*text, x) for text in _texts(n - 1) for x in (1, 2)]


def token_tree_logits(seed: int, scale: float = 0.6) -> torch.Tensor:
    """`[15, 3]`: one row for each prefix of `token_tree` and one for its end."""
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(15, 3, generator=generator, dtype=torch.float64)).round(decimals=2)


@named("tree/tokens", double_of="tree/binary")
def _tree() -> Problem:
    """A history-tabular language model: V = 3, at most 3 tokens, two prompts, reward at the end."""
    return Problem(token_tree(), token_tree_logits(11), groups=1, group_size=3)


@named("tree/tokens-0.8", double_of="tree/binary")
def _tree_8() -> Problem:
    """The token tree with γ = .8 on the final reward; a batch of two prompts with one completion each."""
    return Problem(token_tree(0.8), token_tree_logits(12), groups=2, group_size=1)


@named("tree/extreme", double_of="tree/binary")
def _tree_extreme() -> Problem:
    """The token tree with logits of standard deviation 6: near-certain tokens next to even ones."""
    return Problem(token_tree(), token_tree_logits(13, scale=6.0), groups=1, group_size=3)


@named("tree/binary")
def _tree_binary() -> Problem:
    """One prompt, right (the text ends in x) or wrong, one to three tokens: where pass@k and log p are functions of J."""
    return Problem(token_tree(prompts=1, score=_ends_in_x), token_tree_logits(15)[:8], groups=1, group_size=4)


@named("tree/binary-fixed")
def _tree_binary_fixed() -> Problem:
    """One prompt, two tokens, right (they differ) or wrong: equal lengths, where a std is a weight of the prompt."""
    # states: the empty text, x, y, the end
    transition = torch.zeros(4, 2, 4, dtype=torch.float64)
    transition[0, 0, 1] = transition[0, 1, 2] = 1.0
    transition[1:, :, 3] = 1.0
    env = TabularMDP(transition, [[0, 0], [0, 1], [1, 0], [0, 0]], [1, 0, 0, 0], horizon=2, terminal=[3])
    return Problem(env, [[0.4, -0.2], [0.1, -0.6], [-0.5, 0.3], [0.0, 0.0]], groups=1, group_size=4)


# -- off-policy versions


@named("off-policy/contextual-drifted", belongs_to="off-policy")
def _contextual_drifted() -> Problem:
    """The contextual bandit, one step: batches from a policy that drifted by about half a nat."""
    behavior = (torch.tensor(CONTEXTUAL_LOGITS, dtype=torch.float64) * -0.5).tolist()
    return Problem(
        bandit(CONTEXTUAL_REWARDS, [0.5, 0.3, 0.2]), CONTEXTUAL_LOGITS, behavior_logits=behavior, groups=2, group_size=2
    )


@named("off-policy/two-state-drifted", double_of="off-policy/dialogue-stale")
def _two_state_drifted() -> Problem:
    """The dense two-state MDP, γ = .9: batches from another policy, three ratios a row."""
    return Problem(
        two_state(0.9), TWO_STATE_LOGITS[0.9], behavior_logits=[[0.3, -0.1], [0.5, 0.0]], groups=1, group_size=2
    )


@named("off-policy/dialogue-stale", belongs_to="off-policy")
def _dialogue_stale() -> Problem:
    """The dialogue, γ = .9: batches from the policy before a large update; observation positions carry no ratio."""
    return Problem(
        two_turn(0.9, "position"), TWO_TURN_LOGITS, contexts=TWO_TURN_CONTEXTS,
        behavior_logits=[[-0.1, 0.2], [0.3, 0.1], [0.5, -0.2]], groups=2, group_size=2,
    )  # fmt: skip


@named("off-policy/tree-stale", double_of="off-policy/dialogue-stale")
def _tree_stale() -> Problem:
    """The token tree: batches from a policy several updates old."""
    return Problem(
        token_tree(), token_tree_logits(11), behavior_logits=token_tree_logits(14), groups=1, group_size=2
    )  # fmt: skip


@named("off-policy/tree-truncated", belongs_to="off-policy")
def _tree_truncated() -> Problem:
    """The token tree sampled with the least likely token cut off in every context (top-2): support is broken."""
    logits = token_tree_logits(11)
    least = logits.argmin(-1, keepdim=True)
    return Problem(
        token_tree(), logits, behavior_logits=logits.scatter(-1, least, -INF), groups=1, group_size=2
    )  # fmt: skip


@named("off-policy/contextual-truncated", belongs_to="off-policy")
def _contextual_truncated() -> Problem:
    """The contextual bandit sampled without the first arm: its gradient cannot be seen."""
    behavior = torch.tensor(CONTEXTUAL_LOGITS, dtype=torch.float64)
    behavior[:, 0] = -INF
    return Problem(
        bandit(CONTEXTUAL_REWARDS, [0.5, 0.3, 0.2]), CONTEXTUAL_LOGITS, behavior_logits=behavior, groups=2, group_size=2
    )


# -- a KL or entropy term in the objective


@named("kl/contextual", belongs_to="penalized")
def _kl_contextual() -> Problem:
    """The contextual bandit less half the KL to a reference: one decision, where a token's KL is the row's."""
    ref = [[0.0, 0.5, -0.3], [0.6, -0.4, 0.2], [-0.5, 0.1, 0.3]]
    return Problem(
        bandit(CONTEXTUAL_REWARDS, [0.5, 0.3, 0.2]), CONTEXTUAL_LOGITS, ref_logits=ref, kl_coefficient=0.5,
        groups=2, group_size=2,
    )  # fmt: skip


@named("kl/dialogue", belongs_to="penalized")
def _kl_dialogue() -> Problem:
    """The dialogue, γ = .9, less half the KL to a reference: an observation has none; a later turn's is discounted."""
    return Problem(
        two_turn(0.9, "position"), TWO_TURN_LOGITS, contexts=TWO_TURN_CONTEXTS,
        ref_logits=[[-0.4, 0.3], [0.2, 0.0], [0.7, -0.1]], kl_coefficient=0.5, groups=2, group_size=2,
    )  # fmt: skip


@named("kl/tree", belongs_to="penalized")
def _kl_tree() -> Problem:
    """The token tree less .3 times the KL to a reference: where the text ends, so does its KL."""
    return Problem(
        token_tree(), token_tree_logits(11), ref_logits=token_tree_logits(16), kl_coefficient=0.3, groups=1, group_size=2
    )  # fmt: skip


@named("entropy/contextual", belongs_to="penalized")
def _entropy_contextual() -> Problem:
    """The contextual bandit plus half the entropy: one decision, where a token's entropy is the row's."""
    return Problem(
        bandit(CONTEXTUAL_REWARDS, [0.5, 0.3, 0.2]), CONTEXTUAL_LOGITS, entropy_coefficient=0.5, groups=2, group_size=2
    )


@named("entropy/tree", belongs_to="penalized")
def _entropy_tree() -> Problem:
    """The token tree plus half the entropy of the text: more tokens have more of it."""
    return Problem(token_tree(), token_tree_logits(12), entropy_coefficient=0.5, groups=1, group_size=2)


@named("entropy/fork", belongs_to="penalized")
def _entropy_fork() -> Problem:
    """Nothing but entropy: stop (.4), or go on (.6) to an even choice. The first choice is more even with less going on,
    and the row has more entropy with more of it: the bonus of each token points the wrong way."""
    env = TabularMDP(
        [[[0, 0, 1], [0, 1, 0]], [[0, 0, 1]] * 2, [[0, 0, 1]] * 2], [[0, 0]] * 3, [1, 0, 0], horizon=2, terminal=[2]
    )  # fmt: skip
    return Problem(env, [[0.0, math.log(1.5)], [0.0, 0.0], [0.0, 0.0]], entropy_coefficient=1.0, groups=1, group_size=2)


# -- language models: a transformer writes, a program pays; one of them among the MDPs, the others for `pgcheck run lm`


def small_transformer(task: LMTask, seed: int, *, layers: int = 1) -> TinyGPT:
    """Just large enough for the task."""
    longest = max(map(len, task.contexts))
    return TinyGPT(task.vocab_size, context=longest, width=8, layers=layers, seed=seed)


def written_by(task: LMTask, seed: int, *, layers: int = 1, **plan: int) -> Problem:
    """The task with a small transformer of that seed."""
    return Problem(task, small_transformer(task, seed, layers=layers), **plan)  # type: ignore[arg-type]  # sizes only


@named("lm/parity")
def _parity() -> Problem:
    """A transformer writes up to three of {EOS, 1, 2}; prompt 1 wants an odd number of 1s, prompt 2 an even one."""
    return written_by(language.parity(), 21, groups=1, group_size=3)


@named("lm/sum-mod-3", belongs_to=None)
def _sum_mod_3() -> Problem:
    """A transformer of two layers writes up to three digits that must add up to those of the prompt, modulo 3."""
    return written_by(language.sum_mod(3), 22, layers=2, groups=1, group_size=2)


@named("lm/brackets", belongs_to=None)
def _brackets() -> Problem:
    """Close the brackets of the prompt in up to three tokens; half the reward, or less, while they can still be closed."""
    return written_by(language.brackets(), 23, groups=1, group_size=3)


@named("lm/copy", belongs_to=None)
def _copy() -> Problem:
    """Write the prompt again: the reward is the share of places that are right, so credit differs from token to token."""
    return written_by(language.copy(), 24, groups=1, group_size=2)


@named("lm/length", belongs_to=None)
def _length() -> Problem:
    """Every token costs, every 1 pays: return and length go together, which is where normalising by length shows."""
    return written_by(language.length(), 25, groups=1, group_size=4)


@named("lm/tool-dialogue", belongs_to=None)
def _tool_dialogue() -> Problem:
    """Answer, or ask a tool first: what it says stands in the row, is read by the transformer, and is not the policy's."""
    return written_by(language.tool_dialogue(), 26, groups=1, group_size=2)


def _one_prompt() -> LMTask:
    return LMTask(
        [(2, 1)], vocab_size=3, eos=0, max_new_tokens=3, reward=lambda prompt, text: text.count(1) - 0.5 * len(text)
    )


@named("lm/stale", belongs_to=None)
def _lm_stale() -> Problem:
    """Completions of a transformer of other weights, at temperature .8; no tool, no observation, three ratios a row."""
    task = _one_prompt()
    old = Problem(task, small_transformer(task, 28)).logits / 0.8
    return replace(written_by(task, 27, groups=1, group_size=2), behavior_logits=old)


@named("lm/top-k", belongs_to=None)
def _lm_top_k() -> Problem:
    """A transformer sampled with top-k = 2 of 3 tokens, as serving engines do: support is broken."""
    problem = written_by(_one_prompt(), 27, groups=1, group_size=2)
    return replace(problem, behavior_logits=truncated(problem.logits, top_k=2))


# -- language models whose completions are too many for a table; drawn, never enumerated


@named("lm-large/sum-mod", belongs_to=None, heavy=True)
def _large_sum_mod() -> Problem:
    """A transformer of 26 thousand parameters writes up to five of eight tokens: 39 216 completions, a tree with exact ∇J."""
    task = language.sum_mod(3, max_new_tokens=5, vocab_size=8)
    return Problem(task, TinyGPT(8, context=7, seed=31), groups=1, group_size=8)


@named("lm-large/sum-mod-stale", belongs_to=None, heavy=True)
def _large_sum_mod_stale() -> Problem:
    """The same, drawn by other weights at temperature .9."""
    problem = _large_sum_mod()
    old = Decoding(TinyGPT(8, context=7, seed=32), temperature=0.9)
    return Problem(
        language.sum_mod(3, max_new_tokens=5, vocab_size=8), problem.policy, behavior_logits=old, group_size=8
    )


@named("lm-large/written", belongs_to=None, heavy=True)
def _written() -> Problem:
    """A small transformer writes up to sixteen of eight tokens, 10^13 completions: nothing can be listed, ∇J is not known."""
    task = replace(language.sum_mod(3, max_new_tokens=16, vocab_size=8), returns=(0, 1))
    return Problem(task, TinyGPT(8, context=17, width=8, layers=1, seed=33), groups=1, group_size=4)


# -- too long or too large to be enumerated, but for ∇J


def _logits(contexts: int, actions: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(contexts, actions, generator=generator, dtype=torch.float64)


def _walk(horizon: int, *, discount: float) -> TabularMDP:
    """Five places in a row; a step goes where it should eight times of ten, and the last place pays."""
    S = 5
    move = torch.zeros(S, 2, S, dtype=torch.float64)
    for s in range(S):
        for a, to in enumerate((max(s - 1, 0), min(s + 1, S - 1))):
            move[s, a, to] += 0.8
            move[s, a, s] += 0.2
    pay = torch.tensor([[0.1, 0.0]] + [[0.0, 0.0]] * (S - 2) + [[1.0, 1.0]], dtype=torch.float64)
    return TabularMDP(move, pay, [0.4, 0.3, 0.3, 0.0, 0.0], horizon=horizon, discount=discount)


@named("sampled/walk-50", heavy=True)
def _walk_50() -> Problem:
    """Fifty steps on a line of five places: more rollouts than could ever be listed."""
    return Problem(_walk(50, discount=0.9), 0.5 * _logits(5, 2, 41), groups=8, group_size=2)


@named("sampled/token-tree", heavy=True)
def _token_tree() -> Problem:
    """Six tokens out of eight, 8^6 completions; each that follows the one before it, by one, is paid 1/6."""
    V, T = 8, 6
    over = 1 + (T - 1) * V  # before it: the start, then place and last token
    move = torch.zeros(over + 1, V, over + 1, dtype=torch.float64)
    pay = torch.zeros(over + 1, V, dtype=torch.float64)
    for s in range(over):
        t, last = (0, V - 1) if s == 0 else (1 + (s - 1) // V, (s - 1) % V)
        for v in range(V):
            move[s, v, over if t + 1 == T else 1 + t * V + v] = 1.0
        pay[s, (last + 1) % V] = 1 / T
    move[over, :, over] = 1.0
    env = TabularMDP(move, pay, [1.0] + [0.0] * over, horizon=T, terminal=[over])
    return Problem(env, _logits(over + 1, V, 42), groups=1, group_size=16)


@named("sampled/groups-16", heavy=True)
def _groups_16() -> Problem:
    """Two dialogues a batch, sixteen rollouts of each."""
    return replace(find_problem("dialogue/two-turn"), groups=2, group_size=16)


@named("sampled/groups-64", heavy=True)
def _groups_64() -> Problem:
    """One dialogue a batch, sixty-four rollouts of it."""
    return replace(find_problem("dialogue/two-turn"), groups=1, group_size=64)


@named("sampled/heavy-weights", heavy=True)
def _heavy_weights() -> Problem:
    """Thirty steps drawn by a policy far from the one that is trained: weights of whole rollouts have no usable tail."""
    logits = 0.5 * _logits(5, 2, 41)
    return Problem(_walk(30, discount=0.9), logits, behavior_logits=-1.5 * logits, groups=8, group_size=2)
