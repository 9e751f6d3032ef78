"""The known estimators, as compositions that read like their papers: advantage × ratio × aggregation.

    c[i,t] = aggregation · ratio[i,t] · advantage[i,t] · mask[i,t]

Every entry carries its claim, its formula and its source. S = Σ_t ∇log π_t, Ĝ_t = Σ_{k≥t} γ^{k−t} r_k,
R = Σ_k γ^k r_k, r_t = π/π_old, w = Π_t r_t; sums over rows are means over the B rows unless the entry says otherwise.

Guarantee: every claim here is tested on every named problem that meets its conditions, in both directions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pgcheck.batch import Batch
from pgcheck.estimators import advantages as adv
from pgcheck.estimators import aggregation as agg
from pgcheck.estimators import ratios
from pgcheck.estimators.base import (
    Coefficients,
    Couples,
    Estimator,
    biased,
    discounted,
    full_support,
    off_policy,
    on_policy,
    proportional,
    register,
    unbiased,
    undiscounted,
)
from pgcheck.problem import Problem
from pgcheck.side import ActionValues, Continuations, OptimalBaselines

NOTES = "policy-gradient lecture notes"


@dataclass(frozen=True)
class Composition:
    """c = aggregation · ratio · advantage · mask, `[..., B, T]`; the parts can be read, and swapped one at a time."""

    advantage: adv.Advantage
    ratio: ratios.Ratio
    aggregation: agg.Aggregation

    def __call__(self, batch: Batch) -> Tensor:
        a = self.advantage(batch)
        return self.aggregation(batch) * self.ratio(batch, a) * a * batch.mask


def compose(
    advantage: adv.Advantage,
    *,
    ratio: ratios.Ratio = ratios.none,
    aggregation: agg.Aggregation = agg.mean_of_rows,
) -> Composition:
    """advantage × ratio × aggregation; by default no ratio, and the mean over rows."""
    return Composition(advantage, ratio, aggregation)


def _add(name: str, coefficients: Coefficients, couples: Couples, *aliases: str, **words: Any) -> Estimator:
    return register(Estimator(name, coefficients, couples, **words), *aliases)


def own_share_of_batch(problem: Problem) -> float:
    """(B − 1)/B: what is left of g when the own row is in a batch-wide mean."""
    return (problem.rows - 1) / problem.rows


def own_share_of_groups(problem: Problem) -> float:
    """Σ_g (G_g − 1)/B = (G − 1)/G for equal groups."""
    return (problem.rows - problem.groups) / problem.rows


# -- no baseline

_add(
    "reinforce",
    compose(adv.episode_return),
    "trajectory",
    claims=(unbiased(on_policy),),
    formula="R S",
    reference="Williams 1992, Machine Learning 8",
    about="The score-function estimator with the whole return at every step: unbiased, and the loudest of all.",
)

_add(
    "reward_to_go",
    compose(adv.discounted_to_go),
    "trajectory",
    claims=(unbiased(on_policy),),
    formula="Σ_t γ^t Ĝ_t ∇log π_t",
    reference=f"{NOTES}, γ^k form; Sutton et al. 2000, theorem 1",
    about="Rewards before an action do not depend on it and are dropped. γ^t outside is part of the gradient of J_γ.",
)

_add(
    "reward_to_go_undiscounted_weight",
    compose(adv.undiscounted_weight_to_go),
    "trajectory",
    claims=(
        unbiased(on_policy, undiscounted),
        biased("γ^t is missing: later steps weigh too much; it is the gradient of no function", on_policy, discounted),
    ),
    formula="Σ_t Ĝ_t ∇log π_t",
    reference=f"{NOTES}, algorithm box; Nota & Thomas, arXiv 1906.07073",
    about="What most code does with γ < 1: discounted returns, but no γ^t in front of the score.",
)  # fmt: skip

# -- baselines in the state

_add(
    "baselined(constant)",
    compose(adv.to_go_minus(adv.constant(0.5))),
    "trajectory",
    claims=(unbiased(on_policy),),
    formula="Σ_t γ^t (Ĝ_t − ½) ∇log π_t",
    reference=NOTES,
    about="Any number that does not depend on the action may be subtracted; one half, here.",
)

_add(
    "baselined(value)",
    compose(adv.to_go_minus(adv.state_value)),
    "trajectory",
    claims=(unbiased(on_policy),),
    formula="Σ_t γ^t (Ĝ_t − V^π(s_t)) ∇log π_t",
    reference=f"{NOTES}; Sutton et al. 2000",
    about="The exact state value as baseline. Unbiased; usually quieter than none, though not always.",
    shift_invariant=True,
)

_add(
    "baselined(optimal_constant)",
    compose(adv.return_minus(adv.side_column("optimal_constant"))),
    "trajectory",
    claims=(unbiased(on_policy),),
    formula="(R − b*) S,  b* = E[‖S‖² R] / E[‖S‖²]",
    reference="Greensmith, Bartlett & Baxter 2004, JMLR 5, theorem 8",
    about="The constant with the least total variance: Var(b) = Var(b*) + E‖S‖² (b − b*)² over single rollouts.",
    needs=(OptimalBaselines(),),
)

_add(
    "baselined(optimal_state)",
    compose(adv.to_go_minus(adv.side_column("optimal_state"))),
    "trajectory",
    claims=(unbiased(on_policy),),
    formula="Σ_t γ^t (Ĝ_t − b(s_t)) ∇log π_t,  b(s) = E[‖∇log π_t‖² Ĝ_t | s] / E[‖∇log π_t‖² | s]",
    reference="Greensmith, Bartlett & Baxter 2004, JMLR 5, section 4, step by step",
    about="Each step's own best state baseline; it ignores the covariance between steps.",
    needs=(OptimalBaselines(),),
)

_add(
    "baselined(optimal_state_joint)",
    compose(adv.to_go_minus(adv.side_column("optimal_state_joint"))),
    "trajectory",
    claims=(unbiased(on_policy),),
    formula="Σ_t γ^t (Ĝ_t − b(s_t, t)) ∇log π_t,  b solves the normal equations with cross-step covariances",
    reference="least squares; derivation in `pgcheck.side.OptimalBaselines`",
    about="All state baselines at once: no baseline in (s, t) has less total variance over independent rollouts.",
    needs=(OptimalBaselines(),),
)

# -- baselines that see too much

_add(
    "baselined(next_state)",
    compose(adv.to_go_minus(adv.next_state_value)),
    "trajectory",
    claims=(biased("the baseline V(s_{t+1}) is downstream of the action", on_policy),),
    formula="Σ_t γ^t (Ĝ_t − V^π(s_{t+1})) ∇log π_t",
    reference=f"{NOTES}: the counterexample to “anything apart from the current action”",
    about="An off-by-one in the value index. What depends on a_t through the next state takes part of the signal away.",
)

_add(
    "baselined(next_action)",
    compose(adv.to_go_minus(adv.next_action_value)),
    "trajectory",
    claims=(biased("the baseline Q(s_{t+1}, a_{t+1}) is downstream of the action", on_policy),),
    formula="Σ_t γ^t (Ĝ_t − Q^π(s_{t+1}, a_{t+1})) ∇log π_t",
    reference=f"{NOTES}: the counterexample to “anything apart from the current action”",
    about="A baseline that looks at the next action; it does not see a_t, and still depends on it.",
    needs=(ActionValues(),),
)

_add(
    "baselined(own_return)",
    compose(adv.to_go_minus(adv.half_own_return)),
    "trajectory",
    claims=(biased("the baseline contains the return it is subtracted from", on_policy),),
    formula="Σ_t γ^t (Ĝ_t − ½ Ĝ_t) ∇log π_t",
    reference=f"{NOTES}: the counterexample to “anything apart from the current action”",
    about="A baseline fitted to the very rollout it is used on; halfway, here. Shows in the scale alone.",
)

# -- baselines from the other rows

_add(
    "batch_mean",
    compose(adv.return_minus(adv.mean_return("batch"))),
    "batch",
    claims=(proportional(own_share_of_batch, on_policy),),
    formula="(R_i − mean_B R) S_i",
    reference=f"{NOTES}, final comment",
    about="The own return is in the mean and cancels 1/B of the signal: E ĝ = (B−1)/B ∇J, exactly.",
    shift_invariant=True,
    min_group_size=1,
    reads=("return",),
)

_add(
    "batch_mean(group)",
    compose(adv.return_minus(adv.mean_return("group"))),
    "group",
    claims=(proportional(own_share_of_groups, on_policy),),
    formula="(R_i − mean_G R) S_i",
    reference=f"{NOTES}, final comment; the mean-only advantage of arXiv 2503.20783",
    about="The same over each group: E ĝ = (G−1)/G ∇J.",
    shift_invariant=True,
    reads=("return",),
)

_add(
    "batch_mean(reward_to_go)",
    compose(adv.to_go_minus(adv.batch_mean_to_go)),
    "batch",
    claims=(proportional(own_share_of_batch, on_policy),),
    formula="Σ_t γ^t (Ĝ_{i,t} − mean_B Ĝ_{j,t}) ∇log π_t,  Ĝ = 0 after the end",
    reference=f"{NOTES}, final comment",
    about="The mean at each t runs over all B rows, finished ones counting zero; that keeps the factor (B−1)/B exact.",
    min_group_size=1,
)

_add(
    "batch_mean_alive",
    compose(adv.to_go_minus(adv.alive_mean_to_go)),
    "batch",
    claims=(biased("who is alive at t depends on the own actions, so the own share of the mean is random", on_policy),),
    formula="Σ_t γ^t (Ĝ_{i,t} − mean over rows alive at t of Ĝ_{j,t}) ∇log π_t",
    reference="variant of the notes' batch mean; pgcheck",
    about="The mean at t over the rows still running: the number of them is random, and a direction error follows.",
    min_group_size=1,
)

_add(
    "leave_one_out",
    compose(adv.return_minus(adv.mean_of_others("group"))),
    "group",
    "rloo",
    claims=(unbiased(on_policy),),
    formula="(R_i − mean of the others in the group) S_i = Σ_{i<j} (R_i − R_j)(S_i − S_j) / (G(G−1))",
    reference="Kool, van Hoof & Welling 2019; Ahmadian et al., arXiv 2402.14740",
    about="RLOO: the baseline of a row is the mean return of the other rows of its group. Unbiased for G ≥ 2.",
    shift_invariant=True,
    reads=("return",),
)

_add(
    "leave_one_out(batch)",
    compose(adv.return_minus(adv.mean_of_others("batch"))),
    "batch",
    claims=(unbiased(on_policy),),
    formula="(R_i − mean of the others in the batch) S_i = B/(B−1) · batch_mean",
    reference="Kool, van Hoof & Welling 2019; Ahmadian et al., arXiv 2402.14740",
    about="RLOO over the whole batch, whatever the prompts: unbiased too, and louder where prompts differ.",
    shift_invariant=True,
    min_group_size=1,
    reads=("return",),
)

# -- importance weights

_add(
    "trajectory_is",
    compose(adv.discounted_to_go, ratio=ratios.trajectory_ratio),
    "trajectory",
    claims=(unbiased(full_support),),
    formula="w(τ) Σ_t γ^t Ĝ_t ∇log π_t",
    reference=f"{NOTES}; Precup, Sutton & Singh 2000",
    about="The whole rollout's importance weight: unbiased wherever the old policy can go, with variance exp(D₂).",
    on_policy_limit="reward_to_go",
    weight=ratios.trajectory_weight,
)

_add(
    "per_decision_is",
    compose(adv.per_decision),
    "trajectory",
    claims=(unbiased(full_support),),
    formula="Σ_t (Σ_{k≥t} w_{0:k} γ^k r_k) ∇log π_t",
    reference="Precup, Sutton & Singh 2000, section 3",
    about="Each reward carries only the ratios of the actions before it.",
    on_policy_limit="reward_to_go",
    weight=ratios.trajectory_weight,
)

_add(
    "token_is",
    compose(adv.discounted_to_go, ratio=ratios.token_ratio),
    "trajectory",
    claims=(unbiased(on_policy), biased("the ratios of all other steps are missing", off_policy)),
    formula="Σ_t r_t γ^t Ĝ_t ∇log π_t",
    reference=f"{NOTES}; it is the gradient of the surrogate of Kakade & Langford 2002 and TRPO (arXiv 1502.05477)",
    about="One ratio per token. Off-policy it is right for one step only.",
    on_policy_limit="reward_to_go",
)

_add(
    "cispo(notes)",
    compose(adv.standardised_return("group"), ratio=ratios.token_ratio, aggregation=agg.token_mean),
    "batch",
    claims=(
        biased("std, own sample and the random normaliser Σ|o|", on_policy),
        biased("token ratio, std, own sample and the random normaliser Σ|o|", off_policy),
    ),
    formula="Σ_{i,t} sg(r_t) (R_i − mean)/std ∇log π_t / Σ_i |o_i|",
    reference=f"{NOTES}; arXiv 2506.13585 without the clip",
    about="CISPO as the notes write it: group-standardised returns, token ratios, one token mean over the batch.",
    shift_invariant=True,
    reads=("return", "length"),
)

_add(
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
    ),
    formula="Σ_{i,t} sg(clip(r_t, 0, 1 + ε_high)) (R_i − mean)/std ∇log π_t / Σ_i |o_i|,  ε_high = .1",
    reference="MiniMax-M1, arXiv 2506.13585, equations 4–5",
    about="Clips the weight, not the gradient: no token is silenced. Biased by its ratio, its std and its normaliser.",
    shift_invariant=True,
    reads=("return", "length"),
)

# -- standardised by the group or the batch

_add(
    "grpo",
    compose(adv.standardised_return("group"), ratio=ratios.ppo_clip(), aggregation=agg.sequence_mean),
    "group",
    claims=(
        biased("the std and the lengths the sum is divided by depend on the own rollout", on_policy),
        biased("token ratio, clip, std and lengths", off_policy),
    ),
    formula="Σ_t ∂min(r_t A, clip(r_t, 1 ± .2) A)/∂log π_t ∇log π_t / |o_i|,  A = (R_i − mean)/std",
    reference="DeepSeekMath, arXiv 2402.03300, equation 3; Davis & Recht, arXiv 2510.13651, for binary rewards",
    about="With binary rewards, one prompt and equal lengths: E ĝ = w_G(p) ∇p, a different weight for each difficulty.",
    shift_invariant=True,
    reads=("return",),
)

_add(
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

_add(
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

# -- values from more rollouts

for draws in (1, 2):
    _add(
        f"vineppo(K={draws})",
        compose(adv.continuation_advantage),
        "trajectory",
        *(("vineppo",) if draws == 1 else ()),
        claims=(unbiased(on_policy),),
        formula=f"Σ_t γ^t (r_t + γ V̂(s_{{t+1}}) − V̂(s_t)) ∇log π_t,  V̂ = mean of {draws} continuation(s)",
        reference="VinePPO, arXiv 2410.01679, section 4; γ^t added",
        about=f"Monte Carlo values from {draws} fresh continuation(s) at every step: unbiased for every K.",
        needs=(Continuations(draws),),
    )

# -- groups of equal states

_add(
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

_add(
    "gigpo_step(leave_one_out)",
    compose(adv.anchor_state_advantage(own="exclude", alone="no baseline")),
    "group",
    claims=(unbiased(on_policy),),
    formula="Σ_t γ^t (Ĝ_t − mean of Ĝ over equal states of the other rows; 0 if there are none) ∇log π_t",
    reference="GiGPO's step level (arXiv 2505.10978) made unbiased; pgcheck",
    about="The own rollout is left out whole, and a state nobody else visits falls back to no baseline.",
)

_add(
    "gigpo_step(singleton_zero)",
    compose(adv.anchor_state_advantage(own="exclude", alone="zero advantage")),
    "group",
    claims=(biased("a state nobody else visits gets no signal at all", on_policy),),
    formula="as gigpo_step(leave_one_out), but 0 · ∇log π_t at a state nobody else visits",
    reference="GiGPO, arXiv 2505.10978: the singleton group",
    about="The same with the other fallback: rare states are never learned from.",
)

_add(
    "gigpo_step(in_sample)",
    compose(adv.anchor_state_advantage(own="include", alone="no baseline")),
    "group",
    claims=(biased("the own return is in the mean it is compared with", on_policy),),
    formula="Σ_t γ^t (Ĝ_t − mean of Ĝ over equal states, own included) ∇log π_t",
    reference="GiGPO, arXiv 2505.10978, equation 7 without F_norm",
    about="The own rollout in the mean: shrinks the signal by a random amount.",
)
