"""What corrects for data from another policy: importance weights, whole, by decision, by token, clipped, normalised."""

from __future__ import annotations

from pgcheck.estimators import advantages as adv
from pgcheck.estimators import ratios
from pgcheck.estimators.base import biased, full_support, off_policy, on_policy, unbiased
from pgcheck.estimators.zoo.composition import NOTES, add, compose

# -- importance weights

add(
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

add(
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

add(
    "token_is",
    compose(adv.discounted_to_go, ratio=ratios.token_ratio),
    "trajectory",
    claims=(unbiased(on_policy), biased("the ratios of all other steps are missing", off_policy)),
    formula="Σ_t r_t γ^t Ĝ_t ∇log π_t",
    reference=f"{NOTES}; it is the gradient of the surrogate of Kakade & Langford 2002 and TRPO (arXiv 1502.05477)",
    about="One ratio per token. Off-policy it is right for one step only.",
    on_policy_limit="reward_to_go",
)

add(
    "ppo_clip",
    compose(adv.to_go_minus(adv.state_value), ratio=ratios.ppo_clip()),
    "trajectory",
    claims=(unbiased(on_policy), biased("token ratio, and no signal from clipped tokens", off_policy)),
    formula="Σ_t ∂min(r_t A_t, clip(r_t, 1 ± .2) A_t)/∂log π_t ∇log π_t,  A_t = γ^t (Ĝ_t − V^π(s_t))",
    reference="Schulman et al. 2017, arXiv 1707.06347, equation 7; γ^t and the exact V added",
    about="A token whose ratio has left the band on the side its advantage pushes to is silent.",
    shift_invariant=True,
    on_policy_limit="baselined(value)",
)

add(
    "tis",
    compose(adv.discounted_to_go, ratio=ratios.truncated_weight(2.0)),
    "trajectory",
    "truncated_is",
    claims=(unbiased(on_policy), biased("weights above the cap are cut", off_policy)),
    formula="min(w, 2) Σ_t γ^t Ĝ_t ∇log π_t",
    reference="Ionides 2008, J. Comput. Graph. Stat. 17, with a constant cap",
    about="Truncation bounds the variance; ‖bias‖ ≤ max‖Σ_t γ^t Ĝ_t ∇log π_t‖ · E_π[(1 − 2/w)₊].",
    on_policy_limit="reward_to_go",
)

add(
    "mis",
    compose(adv.discounted_to_go, ratio=ratios.masked_weight(2.0)),
    "trajectory",
    "masked_is",
    claims=(unbiased(on_policy), biased("rows with a weight above the cap are dropped", off_policy)),
    formula="1[w ≤ 2] w Σ_t γ^t Ĝ_t ∇log π_t",
    reference="rejection at a cap; pgcheck",
    about="Where truncation keeps a row at the cap, masking drops it: ‖bias‖ ≤ max‖·‖ · P_π(w > 2).",
    on_policy_limit="reward_to_go",
)

add(
    "self_normalised_is",
    compose(adv.discounted_to_go, ratio=ratios.self_normalised_weight),
    "batch",
    "wis",
    claims=(unbiased(on_policy), biased("the own weight is in the sum it is divided by", off_policy)),
    formula="Σ_i (w_i / Σ_j w_j) Σ_t γ^t Ĝ_t ∇log π_t",
    reference="weighted importance sampling: Precup, Sutton & Singh 2000, section 2",
    about="Weights that add up to one over the batch: no single row explodes, for a bias of order 1/B.",
    min_group_size=1,
    on_policy_limit="reward_to_go",
)
