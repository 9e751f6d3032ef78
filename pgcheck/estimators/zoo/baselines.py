"""Returns, and what is subtracted from them: baselines in the state, from the other rows, and those that see too much."""

from __future__ import annotations

from pgcheck.estimators import advantages as adv
from pgcheck.estimators.base import (
    biased,
    discounted,
    fixed_length,
    on_policy,
    proportional,
    ragged,
    unbiased,
    undiscounted,
)
from pgcheck.estimators.zoo.composition import NOTES, add, compose, own_share_of_batch, own_share_of_groups
from pgcheck.side import ActionValues, GreedyReturn, OptimalBaselines

# -- no baseline

add(
    "reinforce",
    compose(adv.episode_return),
    "trajectory",
    claims=(unbiased(on_policy),),
    formula="R S",
    reference="Williams 1992, Machine Learning 8",
    about="The score-function estimator with the whole return at every step: unbiased, and the loudest of all.",
)

add(
    "reward_to_go",
    compose(adv.discounted_to_go),
    "trajectory",
    claims=(unbiased(on_policy),),
    formula="Σ_t γ^t Ĝ_t ∇log π_t",
    reference=f"{NOTES}, γ^k form; Sutton et al. 2000, theorem 1",
    about="Rewards before an action do not depend on it and are dropped. γ^t outside is part of the gradient of J_γ.",
)

add(
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

add(
    "baselined(constant)",
    compose(adv.to_go_minus(adv.constant(0.5))),
    "trajectory",
    claims=(unbiased(on_policy),),
    formula="Σ_t γ^t (Ĝ_t − ½) ∇log π_t",
    reference=NOTES,
    about="Any number that does not depend on the action may be subtracted; one half, here.",
)

add(
    "baselined(value)",
    compose(adv.to_go_minus(adv.state_value)),
    "trajectory",
    claims=(unbiased(on_policy),),
    formula="Σ_t γ^t (Ĝ_t − V^π(s_t)) ∇log π_t",
    reference=f"{NOTES}; Sutton et al. 2000",
    about="The exact state value as baseline. Unbiased; usually quieter than none, though not always.",
    shift_invariant=True,
)

add(
    "baselined(optimal_constant)",
    compose(adv.return_minus(adv.side_column("optimal_constant"))),
    "trajectory",
    claims=(unbiased(on_policy),),
    formula="(R − b*) S,  b* = E[‖S‖² R] / E[‖S‖²]",
    reference="Greensmith, Bartlett & Baxter 2004, JMLR 5, theorem 8",
    about="The constant with the least total variance: Var(b) = Var(b*) + E‖S‖² (b − b*)² over single rollouts.",
    needs=(OptimalBaselines(),),
)

add(
    "baselined(optimal_state)",
    compose(adv.to_go_minus(adv.side_column("optimal_state"))),
    "trajectory",
    claims=(unbiased(on_policy),),
    formula="Σ_t γ^t (Ĝ_t − b(s_t)) ∇log π_t,  b(s) = E[‖∇log π_t‖² Ĝ_t | s] / E[‖∇log π_t‖² | s]",
    reference="Greensmith, Bartlett & Baxter 2004, JMLR 5, section 4, step by step",
    about="Each step's own best state baseline; it ignores the covariance between steps.",
    needs=(OptimalBaselines(),),
)

add(
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

add(
    "baselined(next_state)",
    compose(adv.to_go_minus(adv.next_state_value)),
    "trajectory",
    claims=(biased("the baseline V(s_{t+1}) is downstream of the action", on_policy),),
    formula="Σ_t γ^t (Ĝ_t − V^π(s_{t+1})) ∇log π_t",
    reference=f"{NOTES}: the counterexample to “anything apart from the current action”",
    about="An off-by-one in the value index. What depends on a_t through the next state takes part of the signal away.",
)

add(
    "baselined(next_action)",
    compose(adv.to_go_minus(adv.next_action_value)),
    "trajectory",
    claims=(biased("the baseline Q(s_{t+1}, a_{t+1}) is downstream of the action", on_policy),),
    formula="Σ_t γ^t (Ĝ_t − Q^π(s_{t+1}, a_{t+1})) ∇log π_t",
    reference=f"{NOTES}: the counterexample to “anything apart from the current action”",
    about="A baseline that looks at the next action; it does not see a_t, and still depends on it.",
    needs=(ActionValues(),),
)

add(
    "baselined(own_return)",
    compose(adv.to_go_minus(adv.half_own_return)),
    "trajectory",
    claims=(biased("the baseline contains the return it is subtracted from", on_policy),),
    formula="Σ_t γ^t (Ĝ_t − ½ Ĝ_t) ∇log π_t",
    reference=f"{NOTES}: the counterexample to “anything apart from the current action”",
    about="A baseline fitted to the very rollout it is used on; halfway, here. Shows in the scale alone.",
)

# -- baselines from the other rows

add(
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

add(
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

add(
    "batch_mean(reward_to_go)",
    compose(adv.to_go_minus(adv.batch_mean_to_go)),
    "batch",
    claims=(proportional(own_share_of_batch, on_policy),),
    formula="Σ_t γ^t (Ĝ_{i,t} − mean_B Ĝ_{j,t}) ∇log π_t,  Ĝ = 0 after the end",
    reference=f"{NOTES}, final comment",
    about="The mean at each t runs over all B rows, finished ones counting zero; that keeps the factor (B−1)/B exact.",
    min_group_size=1,
)

add(
    "batch_mean_alive",
    compose(adv.to_go_minus(adv.alive_mean_to_go)),
    "batch",
    claims=(biased("who is alive at t depends on the own actions, so the own share of the mean is random", on_policy),),
    formula="Σ_t γ^t (Ĝ_{i,t} − mean over rows alive at t of Ĝ_{j,t}) ∇log π_t",
    reference="variant of the notes' batch mean; pgcheck",
    about="The mean at t over the rows still running: the number of them is random, and a direction error follows.",
    min_group_size=1,
)

add(
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

add(
    "leave_one_out(batch)",
    compose(adv.return_minus(adv.mean_of_others("batch"))),
    "batch",
    claims=(unbiased(on_policy),),
    formula="(R_i − mean of the others in the batch) S_i = B/(B−1) · batch_mean",
    reference="Kool, van Hoof & Welling 2019; Ahmadian et al., arXiv 2402.14740",
    about="RLOO over the whole batch, whatever the prompts: unbiased too, and mostly louder where prompts differ.",
    shift_invariant=True,
    min_group_size=1,
    reads=("return",),
)

add(
    "opo",
    compose(adv.return_minus(adv.length_weighted_mean(own="include"))),
    "group",
    claims=(
        biased("the own return and the own length are in the mean", on_policy, ragged),
        proportional(own_share_of_groups, on_policy, fixed_length),
    ),
    formula="(R_i − Σ_j |o_j| R_j / Σ_j |o_j|) S_i",
    reference="OPO, arXiv 2505.23585, the length-weighted baseline",
    about="Long rows count more, as ‖S‖² grows with length. At G = 2 it ascends ½J − ¼E[(R₁−R₂)(L₁−L₂)/(L₁+L₂)].",
    shift_invariant=True,
    reads=("return", "length"),
)

add(
    "opo(leave_one_out)",
    compose(adv.return_minus(adv.length_weighted_mean(own="exclude"))),
    "group",
    claims=(unbiased(on_policy),),
    formula="(R_i − Σ_{j≠i} |o_j| R_j / Σ_{j≠i} |o_j|) S_i",
    reference="OPO, arXiv 2505.23585, made unbiased; pgcheck",
    about="The same weights over the other rows of the group: the baseline no longer sees the own rollout.",
    shift_invariant=True,
    reads=("return", "length"),
)

add(
    "remax",
    compose(adv.return_minus(adv.side_column("greedy_return"))),
    "trajectory",
    claims=(unbiased(on_policy),),
    formula="(R_i − b(s₀)) S_i,  b = E[R of the greedy policy | s₀]",
    reference="ReMax, arXiv 2310.10505, algorithm 1",
    about="The greedy rollout of the same prompt as baseline; where moves are random, its expected return.",
    needs=(GreedyReturn(),),
)
