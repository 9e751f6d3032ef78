"""Values that stand in for returns: fresh continuations, bootstrapped estimates, all actions at once."""

from __future__ import annotations

import torch
from torch import Tensor

from pgcheck.batch import Batch
from pgcheck.estimators import advantages as adv
from pgcheck.estimators import aggregation as agg
from pgcheck.estimators.base import biased, off_policy, on_policy, unbiased
from pgcheck.estimators.zoo.composition import add, compose
from pgcheck.side import AllActionValues, Continuations, WrongValues

GAE = "Schulman et al., arXiv 1506.02438, equation 16; γ^t added, λ counts decisions"

# -- values from more rollouts

for draws in (1, 2):
    add(
        f"vineppo(K={draws})",
        compose(adv.temporal_difference(adv.side_column("continuation_value"))),
        "trajectory",
        *(("vineppo",) if draws == 1 else ()),
        claims=(unbiased(on_policy),),
        formula=f"Σ_t γ^t (r_t + γ V̂(s_{{t+1}}) − V̂(s_t)) ∇log π_t,  V̂ = mean of {draws} continuation(s)",
        reference="VinePPO, arXiv 2410.01679, section 4; γ^t added",
        about=f"Monte Carlo values from {draws} fresh continuation(s) at every step: unbiased for every K.",
        needs=(Continuations(draws),),
    )

# -- temporal differences

add(
    "gae(0.95)",
    compose(adv.gae(0.95, adv.state_value)),
    "trajectory",
    "gae",
    claims=(unbiased(on_policy),),
    formula="Σ_i γ^{t_i} (Σ_{j≥i} γ^{t_j−t_i} λ^{j−i} δ_j) ∇log π_{t_i},  t_0 < t_1 < … where the policy acts,  λ = .95",
    reference=GAE,
    about="With the exact V it is unbiased for every λ; so errors of the recursion show under a wrong V only.",
    shift_invariant=True,
)

add(
    "actor_critic",
    compose(adv.gae(0.0, adv.state_value)),
    "trajectory",
    "gae(0)",
    claims=(unbiased(on_policy),),
    formula="Σ_t γ^t (r_t + γ V^π(s_{t+1}) − V^π(s_t)) ∇log π_t",
    reference="Sutton et al. 2000; GAE with λ = 0",
    about="The one-step temporal difference, from decision to decision; unbiased because V is exact.",
    shift_invariant=True,
)

add(
    "gae(wrong_value)",
    compose(adv.gae(0.95, adv.wrong_value)),
    "trajectory",
    claims=(biased("λ < 1 bootstraps from a value that is wrong", on_policy),),
    formula="gae(0.95) with V^π + error(s, t) in place of V^π",
    reference=GAE,
    about="A critic as it is in training. The bias falls to 0 as λ → 1.",
    needs=(WrongValues(),),
)

add(
    "gae(wrong_value, λ=1)",
    compose(adv.gae(1.0, adv.wrong_value)),
    "trajectory",
    "gae(wrong_value,lambda=1)",
    claims=(unbiased(on_policy),),
    formula="Σ_t γ^t (Ĝ_t − V^π(s_t) − error(s_t, t)) ∇log π_t",
    reference=GAE,
    about="At λ = 1 the values of later states cancel, and what is left is a baseline in the state: unbiased, however wrong.",
    needs=(WrongValues(),),
)

# -- all actions at once


def expected_over_actions(batch: Batch) -> Tensor:
    """γ^t π(a|k) (Q(s, a) − Σ_b π(b|k) Q(s, b)) / B, `[..., B, T, A]`: Σ_a Q(s, a) ∇π(a|k) as weights on the logits."""
    pi, q = torch.softmax(batch.logits, -1), batch.side["all_action_values"]
    slope = pi * (q - (pi * q).sum(-1, keepdim=True))
    return (agg.mean_of_rows(batch) * batch.discount_weight * batch.mask).unsqueeze(-1) * slope


add(
    "all_action",
    expected_over_actions,
    "trajectory",
    "expected_gradient",
    claims=(unbiased(on_policy), biased("states are visited as the old policy does", off_policy)),
    formula="Σ_t γ^t Σ_a π(a|k_t) Q^π(s_t, a) ∇log π(a|k_t)",
    reference="mean actor-critic: Asadi et al., arXiv 1709.00503; expected policy gradients: arXiv 1706.05374",
    about="The score has no sampled action: least variance if no context recurs within a row, and nearly always else.",
    needs=(AllActionValues(),),
    leaf="logits",
)
