"""Every check and every problem earns its place: without it a mistake survives, or a truth has nowhere to be seen.

Guarantee: for every problem of the sets that estimators are judged on, some mistake is caught on it alone (`earned`), or a
statement holds on it alone of all (`GUARDS`). What is the double of another belongs to no set, so a redundant one cannot
hide.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from pgcheck.engines.exact import exact_moments
from pgcheck.estimators.base import find_estimator
from pgcheck.estimators.broken import BROKEN, STALE
from pgcheck.policies import LMPolicy
from pgcheck.problem import Problem
from pgcheck.registry import doubles, find_problem, problem_sets
from pgcheck.runs.report import Report
from pgcheck.verdicts.checks import registered_checks
from pgcheck.verdicts.verdict import Measurement, measure

BED = problem_sets()["all"]
PROBLEMS = [*BED, *doubles()]  # the notes have problems of their own


@pytest.mark.parametrize("check", registered_checks())
def test_without_the_check_a_mistake_survives(judged: Report, check: str) -> None:
    """Some broken estimator fails it and no other."""
    caught_by: dict[str, set[str]] = {}
    for v in judged.failures:
        caught_by.setdefault(v.estimator, set()).add(v.check)
    assert [name for name, checks in caught_by.items() if checks == {check}]


def caught_on(judged: Report) -> dict[str, set[str]]:
    """On which problems (doubles are not among them) each broken estimator fails.

    Checks of single batches choose their problems among those there are ("wherever"): they need none in particular.
    """
    found: dict[str, set[str]] = {}
    for v in judged.failures:
        where = found.setdefault(v.estimator, set())
        where.add(v.problem.partition("@")[0] if registered_checks()[v.check].kind == "bias" else "wherever")
    return found


def earned(judged: Report) -> dict[str, list[str]]:
    """The broken estimators that nothing catches but this problem (at either θ), by problem."""
    alone: dict[str, list[str]] = {}
    for name, where in caught_on(judged).items():
        if len(where) == 1:
            alone.setdefault(*where, []).append(name)
    return alone


# -- what only one problem shows


@dataclass(frozen=True)
class Guard:
    """A statement that holds on one problem of all; whoever takes the problem away loses it."""

    holds: Callable[[Problem], bool]
    says: str


GUARDS: dict[str, Guard] = {}


def guarded_by(problem: str) -> Callable[[Callable[[Problem], bool]], Callable[[Problem], bool]]:
    def decorate(fn: Callable[[Problem], bool]) -> Callable[[Problem], bool]:
        GUARDS[problem] = Guard(fn, fn.__doc__ or "")
        return fn

    return decorate


@functools.cache
def measured(estimator: str, problem: Problem) -> Measurement:
    e = find_estimator(estimator)
    return measure(e, problem, exact_moments([e], problem)[0])


def steps(p: Problem) -> int:
    return p.trajectories.paths.steps


@guarded_by("bandit/two-arm")
def the_value_is_a_worse_baseline_than_none(p: Problem) -> bool:
    """With one step, so that no credit can be to blame: one rollout has .0576 with V^π and .0009 without, in the difference
    of the logits."""
    if not p.on_policy or steps(p) > 1:
        return False
    return measured("baselined(value)", p).total_variance > measured("reinforce", p).total_variance


@guarded_by("bandit/contextual")
def the_std_of_a_prompt_is_a_direction_error(p: Problem) -> bool:
    """One step, and the others' std alone in the divisor: each prompt has a factor of its own, and the sum is off the axis."""
    if steps(p) > 1 or not p.on_policy or not find_estimator("loo_std").fits(p):
        return False
    return measured("loo_std", p).finding == "biased" and measured("loo_std", p).off_axis > 1e-3


@guarded_by("degenerate/all-equal")
def nothing_is_to_be_learned_from_one_of_the_prompts(p: Problem) -> bool:
    """Every rollout of a prompt has the same return, so its ∇J is 0; that of another prompt is not."""
    t = p.trajectories
    R, start = t.rows_as_batch().episode_return, t.paths.start
    spread = [float(R[start == s].std(correction=0)) for s in start.unique().tolist()]
    return min(spread) == 0.0 < max(spread)


@guarded_by("mdp/two-state")
def lengths_are_a_scale_and_gamma_is_one(p: Problem) -> bool:
    """Equal lengths over several steps with rewards on the way, γ = 1: neither length nor γ^t can be wrong, only credit is
    left. The reward-to-go is quieter than the return."""
    if not (p.fixed_length and p.discount == 1.0 and p.on_policy and steps(p) > 1):
        return False
    return measured("reward_to_go", p).total_variance < 0.9 * measured("reinforce", p).total_variance


@guarded_by("mdp/pessimal")
def ascent_goes_to_the_worst_policy(p: Problem) -> bool:
    """Without γ^t the estimate points away from ∇J_γ (Nota & Thomas 2020): −.25 p(1−p) for +.125 p(1−p)."""
    return p.on_policy and measured("reward_to_go_undiscounted_weight", p).scale < 0


@guarded_by("chain/absorbing")
def the_reward_to_go_is_louder_than_the_return(p: Problem) -> bool:
    """Dropping rewards that do not depend on the action may raise the variance, γ < 1."""
    if not p.on_policy or p.discount == 1.0:
        return False
    return measured("reward_to_go", p).total_variance > measured("reinforce", p).total_variance * (1 + 1e-9)


@guarded_by("kl/contextual")
def a_token_answers_for_the_whole_kl(p: Problem) -> bool:
    """One decision with a KL in the objective: k2 of the token is exact, k3 still pulls by the other KL."""
    return bool(p.kl_coefficient) and measured("kl_loss(k2, token)", p).finding == "unbiased"


@guarded_by("kl/dialogue")
def the_kl_is_discounted(p: Problem) -> bool:
    """γ < 1: k2 of the row, which has no γ^t, is not the KL of the objective."""
    return bool(p.kl_coefficient) and measured("kl_loss(k2, sequence)", p).finding == "biased"


@guarded_by("kl/tree")
def the_kl_of_the_row_is_more_than_its_tokens(p: Problem) -> bool:
    """k2 of the row is exact, of tokens it is not."""
    tokens, row = (measured(f"kl_loss(k2, {what})", p).finding for what in ("token", "sequence"))
    return bool(p.kl_coefficient) and (tokens, row) == ("biased", "unbiased")


@guarded_by("entropy/contextual")
def a_token_answers_for_the_whole_entropy(p: Problem) -> bool:
    """One decision with an entropy bonus: that of the token is exact."""
    return bool(p.entropy_coefficient) and measured("entropy_bonus(token)", p).finding == "unbiased"


@guarded_by("entropy/fork")
def the_bonus_points_the_other_way(p: Problem) -> bool:
    """The bonus of each token lowers the entropy of the row."""
    return bool(p.entropy_coefficient) and measured("entropy_bonus(token)", p).cosine < 0


@guarded_by("entropy/tree")
def the_bonus_is_off_the_axis(p: Problem) -> bool:
    """Next to a reward, and uphill: what is wrong with the bonus is its direction."""
    m = measured("entropy_bonus(token)", p)
    return bool(p.entropy_coefficient) and m.cosine > 0 and m.off_axis > 1e-2


@guarded_by("chain/linear-policy")
def there_are_fewer_parameters_than_logits(p: Problem) -> bool:
    """A verdict in parameters would miss what they cannot move: logits up to a constant, of rank below K(A − 1)."""
    K, A = p.logits.shape
    moved = p.logit_jacobian().unflatten(0, (K, A))
    return bool(torch.linalg.matrix_rank((moved - moved.mean(1, keepdim=True)).flatten(0, 1)) < K * (A - 1))


@guarded_by("lm/parity")
def a_network_moves_the_logits_of_all_contexts_together(p: Problem) -> bool:
    """More parameters than logits, and still no context can be moved without the others: a transformer reads them all."""
    return isinstance(p.policy, LMPolicy) and sum(x.numel() for x in p.policy.parameters()) > p.logits.numel()


@guarded_by("tree/binary")
def pass_at_k_is_a_function_of_j_whatever_the_lengths(p: Problem) -> bool:
    """One prompt, 0/1 returns, lengths that depend on the actions: pass@2 ascends in the direction of ∇J all the same."""
    return p.on_policy and not p.fixed_length and measured("pkpo", p).finding == "proportional"


@guarded_by("off-policy/contextual-drifted")
def one_ratio_is_enough_for_one_step(p: Problem) -> bool:
    """Off-policy, and the token ratio is exact."""
    return not p.on_policy and measured("token_is", p).finding == "unbiased"


@guarded_by("off-policy/contextual-truncated")
def one_ratio_is_not_enough_where_support_is_broken(p: Problem) -> bool:
    """One step, so that the ratio is right, and still a bias: what is never sampled is never seen."""
    return p.plain_objective and steps(p) == 1 and measured("trajectory_is", p).finding == "biased"


@guarded_by("off-policy/tree-truncated")
def whole_rollouts_are_out_of_reach(p: Problem) -> bool:
    """The sampler cuts tokens off at every step, and the mass of what it can reach, E_old[w], falls step by step."""
    return steps(p) > 1 and not p.full_support and measured("trajectory_is", p).finding == "biased"


@pytest.mark.parametrize("name", GUARDS)
def test_the_statement_holds_there_and_nowhere_else(name: str) -> None:
    assert [other for other in PROBLEMS if GUARDS[name].holds(find_problem(other))] == [name], GUARDS[name].says


@pytest.mark.parametrize("name", BED)
def test_without_the_problem_something_is_lost(judged: Report, name: str) -> None:
    """A mistake survives, or a statement holds nowhere."""
    assert name in earned(judged) or name in GUARDS


def test_without_the_doubles_nothing_survives(judged: Report) -> None:
    """They are not among the problems that the broken are judged on, and every one of those is caught there."""
    assert {p.name.partition("@")[0] for p in judged.problems} == set(BED)
    assert caught_on(judged).keys() == {*BROKEN, STALE.estimator.name}
    assert set(doubles().values()) <= set(BED)
    assert not doubles().keys() & (GUARDS.keys() | set(BED))
