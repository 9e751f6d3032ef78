"""Rows compared with the other rows of their prompt: standardised, clipped, averaged over tokens, by equal states."""

from __future__ import annotations

import math

from pgcheck.estimators import advantages as adv
from pgcheck.estimators import aggregation as agg
from pgcheck.estimators import ratios
from pgcheck.estimators.base import (
    biased,
    binary_return,
    fixed_length,
    off_policy,
    on_policy,
    one_start,
    proportional,
    several_starts,
    unbiased,
)
from pgcheck.estimators.zoo.composition import NOTES, add, compose, mean_over_rows, own_share_of_groups
from pgcheck.problem import Problem

DR_GRPO_LENGTH = 4  # of every row, whatever its own


def difficulty(problem: Problem) -> float:
    """E[σ²/(σ + ε)] / (p(1 − p) T), σ² = q̂(1 − q̂), q̂ ~ Bin(G, p)/G, ε = 1e-6: w_G(p)/T of Davis & Recht, with the ε.

    The advantage is (1 − q̂)/(σ + ε) on success and −q̂/(σ + ε) on failure; E[S | success] = ∇p/p and E[S | failure] =
    −∇p/(1 − p). The mean over G rows is q̂(1 − q̂)/(σ + ε) · ∇p/(p(1 − p)).
    """
    p, T = problem.value(), problem.most_decisions

    def of_group(G: int) -> float:
        total = 0.0
        for n in range(1, G):  # unanimous groups have σ = 0
            variance = n / G * (1 - n / G)
            chance = math.comb(G, n) * p ** (n - 1) * (1 - p) ** (G - n - 1)  # of n successes, over p(1 − p)
            total += chance * variance / (math.sqrt(variance) + 1e-6)
        return total

    return mean_over_rows(problem, of_group) / T


def own_share_over_constant(problem: Problem) -> float:
    """(G − 1)/(4G): the own share of the group mean over the constant length; Σ_g (G_g − 1)/(4B) for unequal groups."""
    return own_share_of_groups(problem) / DR_GRPO_LENGTH


# -- one token mean

add(
    "cispo(notes)",
    compose(adv.standardised_return("group"), ratio=ratios.token_ratio, aggregation=agg.token_mean),
    "batch",
    claims=(
        biased("std, own sample and the random normaliser Σ|o|", on_policy),
        biased("token ratio, std, own sample and the random normaliser Σ|o|", off_policy),
        proportional(difficulty, on_policy, one_start, binary_return, fixed_length),
    ),
    formula="Σ_{i,t} sg(r_t) (R_i − mean)/std ∇log π_t / Σ_i |o_i|",
    reference=f"{NOTES}; arXiv 2506.13585 without the clip",
    about="CISPO as the notes write it: group-standardised returns, token ratios, one token mean over the batch.",
    shift_invariant=True,
    reads=("return", "length"),
)

add(
    "cispo",
    compose(
        adv.standardised_return("group"),
        ratio=ratios.clipped_ratio(low=None, high=0.1),
        aggregation=agg.token_mean,
    ),
    "batch",
    claims=(
        biased("std, own sample and the random normaliser Σ|o|", on_policy),
        biased("clipped token ratio, std, own sample and the random normaliser Σ|o|", off_policy),
        proportional(difficulty, on_policy, one_start, binary_return, fixed_length),
    ),
    formula="Σ_{i,t} sg(clip(r_t, 0, 1 + ε_high)) (R_i − mean)/std ∇log π_t / Σ_i |o_i|,  ε_high = .1",
    reference="MiniMax-M1, arXiv 2506.13585, equations 4–5",
    about="Clips the weight, not the gradient: no token is silenced. Biased by its ratio, its std and its normaliser.",
    shift_invariant=True,
    reads=("return", "length"),
)

# -- standardised by the group or the batch

add(
    "grpo",
    compose(adv.standardised_return("group"), ratio=ratios.ppo_clip(), aggregation=agg.sequence_mean),
    "group",
    claims=(
        biased("the std and the lengths the sum is divided by depend on the own rollout", on_policy),
        biased("token ratio, clip, std and lengths", off_policy),
        proportional(difficulty, on_policy, one_start, binary_return, fixed_length),
    ),
    formula="Σ_t ∂min(r_t A, clip(r_t, 1 ± .2) A)/∂log π_t ∇log π_t / |o_i|,  A = (R_i − mean)/std",
    reference="DeepSeekMath, arXiv 2402.03300, equation 3; Davis & Recht, arXiv 2510.13651, for binary rewards",
    about="With 0/1 returns, one prompt and equal lengths: E ĝ = w_G(p)/T ∇p, a different weight for each difficulty.",
    shift_invariant=True,
    reads=("return",),
)

add(
    "dr_grpo",
    compose(
        adv.return_minus(adv.mean_return("group")),
        ratio=ratios.ppo_clip(),
        aggregation=agg.constant_length(DR_GRPO_LENGTH),
    ),
    "group",
    claims=(
        proportional(own_share_over_constant, on_policy),
        biased("token ratio and clip", off_policy),
    ),
    formula="Σ_t ∂min(r_t A, clip(r_t, 1 ± .2) A)/∂log π_t ∇log π_t / 4,  A = R_i − mean",
    reference="Dr. GRPO, arXiv 2503.20783, section 3.2",
    about="GRPO without the std and with one length for all rows (4, here): E ĝ = (G−1)/(4G) ∇J, the right direction.",
    shift_invariant=True,
    reads=("return",),
)

add(
    "dapo",
    compose(adv.standardised_return("group"), ratio=ratios.ppo_clip(low=0.2, high=0.28), aggregation=agg.token_mean),
    "batch",
    claims=(
        biased("std, own sample and the random normaliser Σ|o|", on_policy),
        biased("token ratio, clip, std, own sample and the random normaliser Σ|o|", off_policy),
        proportional(difficulty, on_policy, one_start, binary_return, fixed_length),
    ),
    formula="Σ_{i,t} ∂min(r_t A, clip(r_t, .8, 1.28) A)/∂log π_t ∇log π_t / Σ_i |o_i|,  A = (R_i − mean)/std",
    reference="DAPO, arXiv 2503.14476, equation 8, tokens counted over the whole batch; without dynamic sampling",
    about="Clip-higher and one token mean: long rows no longer weigh less by token, and the step size is random.",
    shift_invariant=True,
    on_policy_limit="cispo(notes)",
    reads=("return", "length"),
)

add(
    "gspo",
    compose(
        adv.standardised_return("group"),
        ratio=ratios.sequence_clip(low=3e-4, high=4e-4),
        aggregation=agg.sequence_mean,
    ),
    "group",
    claims=(
        biased("the std and the lengths the sum is divided by depend on the own rollout", on_policy),
        biased("w^{1/|o|} is no importance weight; clip, std and lengths", off_policy),
        proportional(difficulty, on_policy, one_start, binary_return, fixed_length),
    ),
    formula="Σ_t ∂min(s A, clip(s, 1 − 3e-4, 1 + 4e-4) A)/∂log π_t ∇log π_t,  s = w^{1/|o_i|},  A = (R_i − mean)/std",
    reference="GSPO, arXiv 2507.18071, equations 5–7 and section 5.1 for the clip",
    about="∂s/∂log π_t = s/|o|: the mean over tokens comes with the ratio. On-policy it is GRPO, length bias and all.",
    shift_invariant=True,
    on_policy_limit="grpo",
    reads=("return",),
)

add(
    "loo_std",
    compose(adv.standardised_by_others("group", eps=0.1)),
    "group",
    claims=(
        proportional(None, on_policy, one_start, reason="κ = E[1/(std of the others + ε)]"),
        biased("each prompt has a factor of its own, E[1/(std + ε)]", on_policy, several_starts),
    ),
    formula="(R_i − mean of the others)/(std of the others + ε) S_i,  ε = .1",
    reference="leave-one-out mean and std; pgcheck",
    about="The divisor does not see the own return, so on one prompt the direction is exact; ε > 0 where others agree.",
    min_group_size=3,
    shift_invariant=True,
    reads=("return",),
)

add(
    "reinforce_pp",
    compose(adv.token_standardised(adv.undiscounted_weight_to_go), ratio=ratios.ppo_clip(), aggregation=agg.token_mean),
    "batch",
    "reinforce++",
    claims=(
        biased("batch mean and std contain the own sample, and count every token", on_policy),
        biased("token ratio, clip, batch mean and std", off_policy),
    ),
    formula="Σ_{i,t} (Ĝ_{i,t} − mean over tokens)/√(var over tokens + ε) ∇log π_t / Σ_i |o_i|",
    reference="REINFORCE++, arXiv 2501.03262 v9",
    about="Whitened over all tokens of the batch, as the public code does; the bias vanishes as 1/B at γ = 1.",
    min_group_size=1,
)

add(
    "reinforce_pp(group)",
    compose(
        adv.token_standardised(adv.return_minus(adv.mean_return("group"))),
        ratio=ratios.ppo_clip(),
        aggregation=agg.token_mean,
    ),
    "batch",
    "reinforce++_baseline",
    claims=(
        biased("group mean and batch std contain the own sample, and count every token", on_policy),
        biased("token ratio, clip, group mean and batch std", off_policy),
    ),
    formula="Σ_{i,t} whiten(R_i − mean_G R) ∇log π_t / Σ_i |o_i|",
    reference="REINFORCE++-baseline, arXiv 2501.03262 v9",
    about="Group mean first, then whitened over all tokens of the batch.",
    shift_invariant=True,
)

# -- groups of equal states

add(
    "gigpo",
    compose(
        adv.total(
            adv.standardised_return("group"),
            adv.anchor_state_advantage(own="include", alone="zero advantage", std=True),
            weights=(1.0, 1.0),
        ),
        aggregation=agg.sequence_mean,
    ),
    "group",
    claims=(biased("in-sample mean and std at both levels, and a singleton state gets no signal", on_policy),),
    formula="Σ_t ((R_i − mean)/std + ω (Ĝ_t − mean over equal states)/std) ∇log π_t / |o_i|,  ω = 1",
    reference="GiGPO, arXiv 2505.10978, equations 3–8",
    about="Episode advantage plus step advantage over the positions of the group that share a state.",
)

add(
    "gigpo_step(leave_one_out)",
    compose(adv.anchor_state_advantage(own="exclude", alone="no baseline")),
    "group",
    claims=(unbiased(on_policy),),
    formula="Σ_t γ^t (Ĝ_t − mean of Ĝ over equal states of the other rows; 0 if there are none) ∇log π_t",
    reference="GiGPO's step level (arXiv 2505.10978) made unbiased; pgcheck",
    about="The own rollout is left out whole, and a state nobody else visits falls back to no baseline.",
)

add(
    "gigpo_step(singleton_zero)",
    compose(adv.anchor_state_advantage(own="exclude", alone="zero advantage")),
    "group",
    claims=(biased("a state nobody else visits gets no signal at all", on_policy),),
    formula="as gigpo_step(leave_one_out), but 0 · ∇log π_t at a state nobody else visits",
    reference="GiGPO, arXiv 2505.10978: the singleton group",
    about="The same with the other fallback: rare states are never learned from.",
)

add(
    "gigpo_step(in_sample)",
    compose(adv.anchor_state_advantage(own="include", alone="no baseline")),
    "group",
    claims=(biased("the own return is in the mean it is compared with", on_policy),),
    formula="Σ_t γ^t (Ĝ_t − mean of Ĝ over equal states, own included) ∇log π_t",
    reference="GiGPO, arXiv 2505.10978, equation 7 without F_norm",
    about="The own rollout in the mean: shrinks the signal by a random amount.",
)
