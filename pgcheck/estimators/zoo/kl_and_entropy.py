"""A KL to the reference or an entropy bonus in the objective: in the reward, as a loss of each token or of the row.

The objective is E Σ_t γ^t (r_t − β log π/π_ref − α log π); d_t = log π/π_ref of a token, D = Σ_t d_t. All of them are REINFORCE
with a penalty, so that what is wrong is wrong with the penalty; without β and α they are REINFORCE.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pgcheck.batch import Batch
from pgcheck.estimators import advantages as adv
from pgcheck.estimators import aggregation as agg
from pgcheck.estimators import penalties
from pgcheck.estimators.base import (
    biased,
    discounted,
    entropy_bonus,
    kl_penalty,
    on_policy,
    one_decision,
    unbiased,
    undiscounted,
)
from pgcheck.estimators.zoo.composition import add, compose

TANG_MUNOS = "Tang & Munos, arXiv 2506.09477"
SCHULMAN = "Schulman 2020, Approximating KL divergence"

# -- KL in the reward

add(
    "kl_in_reward(k1)",
    compose(penalties.in_reward(adv.episode_return, penalties.kl_cost(penalties.k1))),
    "trajectory",
    claims=(unbiased(on_policy), unbiased(on_policy, kl_penalty)),
    formula="Σ_t γ^t (r_t − β d_t) S",
    reference=f"Ziegler et al., arXiv 1909.08593, equation 2; {TANG_MUNOS}",
    about="The exact gradient of the return less β KL: the gradient of log π inside the reward has mean 0.",
)

add(
    "kl_in_reward(k3)",
    compose(penalties.in_reward(adv.episode_return, penalties.kl_cost(penalties.k3))),
    "trajectory",
    claims=(
        unbiased(on_policy),
        biased("the KL's estimate is unbiased, but its own gradient is not of mean 0 and is left out", on_policy, kl_penalty),
    ),
    formula="Σ_t γ^t (r_t − β (e^{−d_t} − 1 + d_t)) S",
    reference=f"{SCHULMAN}; {TANG_MUNOS}",
    about="The quieter estimate of the same KL, in the reward: what is lost is E ∇k3, the pull of the forward KL.",
)  # fmt: skip

# -- KL as a loss

add(
    "kl_loss(k1, token)",
    compose(adv.episode_return, penalty=penalties.token_loss(penalties.k1)),
    "trajectory",
    "kl_loss(k1, sequence)",
    claims=(
        unbiased(on_policy),
        biased("the penalty's expected gradient is E ∇log π = 0: the KL is left out", on_policy, kl_penalty),
    ),
    formula="Σ_t (R − β) ∇log π_t",
    reference=TANG_MUNOS,
    about="log π − log π_ref as a loss, of tokens or of the row: it does nothing but add noise.",
)

add(
    "kl_loss(k2, token)",
    compose(adv.episode_return, penalty=penalties.token_loss(penalties.k2)),
    "trajectory",
    claims=(
        unbiased(on_policy),
        unbiased(on_policy, kl_penalty, one_decision, undiscounted),
        biased("a token's effect on the KL of later tokens is left out", on_policy, kl_penalty),
    ),
    formula="Σ_t (R − β d_t) ∇log π_t",
    reference=TANG_MUNOS,
    about="Exact where the policy acts once. Else each token answers for its own KL only, not for where it leads.",
)

add(
    "kl_loss(k2, sequence)",
    compose(adv.episode_return, penalty=penalties.sequence_loss(penalties.k2)),
    "trajectory",
    claims=(
        unbiased(on_policy),
        unbiased(on_policy, kl_penalty, undiscounted),
        biased("the KL of the row is not discounted", on_policy, kl_penalty, discounted),
    ),
    formula="(R − β D) S",
    reference=TANG_MUNOS,
    about="½D² as a loss is the exact gradient of KL(π‖π_ref) over whole rows: ∇½D² = D S.",
)

add(
    "kl_loss(k3, token)",
    compose(adv.episode_return, penalty=penalties.token_loss(penalties.k3)),
    "trajectory",
    claims=(
        unbiased(on_policy),
        biased("pulls each token to the reference by the forward KL, at states that stay as they are", on_policy, kl_penalty),
    ),
    formula="Σ_t (R − β (1 − e^{−d_t})) ∇log π_t",
    reference=f"GRPO's β: DeepSeekMath, arXiv 2402.03300, equation 4; {TANG_MUNOS}",
    about="With more than one decision it is the gradient of no divergence, nor of any other function.",
)  # fmt: skip

add(
    "kl_loss(k3, sequence)",
    compose(adv.episode_return, penalty=penalties.sequence_loss(penalties.k3)),
    "trajectory",
    claims=(
        unbiased(on_policy),
        biased("descends the forward KL(π_ref‖π) in place of KL(π‖π_ref)", on_policy, kl_penalty),
    ),
    formula="(R − β (1 − e^{−D})) S",
    reference=TANG_MUNOS,
    about="k3 of the whole row as a loss: E[(1 − p_ref/p) S] = −E_ref[S], exactly the gradient of KL(π_ref‖π).",
)

# -- entropy

add(
    "entropy_in_reward",
    compose(penalties.in_reward(adv.episode_return, penalties.entropy_cost)),
    "trajectory",
    claims=(unbiased(on_policy), unbiased(on_policy, entropy_bonus)),
    formula="Σ_t γ^t (r_t − α log π_t) S",
    reference="Williams & Peng 1991, Connection Science 3; maximum-entropy RL: arXiv 1702.08165",
    about="The exact gradient of the return plus α times the entropy of the whole row.",
)


def with_entropy_of_tokens(batch: Batch) -> Tensor:
    """(R (1[a = a_t] − π(a|k_t)) + α ∂H(π(·|k_t))/∂z_a) / B, `[..., B, T, A]`: R S and the bonus as weights on the logits."""
    pi = torch.softmax(batch.logits, -1)
    drawn = (batch.action.unsqueeze(-1) == torch.arange(pi.shape[-1], device=pi.device)).to(pi.dtype)
    ascent = adv.episode_return(batch).unsqueeze(-1) * (drawn - pi)
    ascent = ascent + batch.entropy_coefficient * penalties.entropy_slope(batch)
    return (agg.mean_of_rows(batch) * batch.mask).unsqueeze(-1) * ascent


add(
    "entropy_bonus(token)",
    with_entropy_of_tokens,
    "trajectory",
    "entropy_bonus",
    claims=(
        unbiased(on_policy),
        unbiased(on_policy, entropy_bonus, one_decision, undiscounted),
        biased("a token's effect on the entropy of later tokens is left out", on_policy, entropy_bonus),
    ),
    formula="R S + α Σ_t ∇H(π(·|k_t))",
    reference="A3C: Mnih et al., arXiv 1602.01783, section 4.1",
    about="The usual bonus. Exact where the policy acts once; else it may even lower the entropy of the row.",
    leaf="logits",
)
