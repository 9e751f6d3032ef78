"""torchrl's advantage functions as estimators: the library's own code, judged by the exact engine.

    c[i,t] = A[i,t] · mask[i,t] / B,      A from `torchrl.objectives.value.functional`, with γ^t in front or without

`reward2go`, `generalized_advantage_estimate` and `vtrace_advantage_estimate` see rows `[M·B, T, 1]`, time at -2, values
exact, and `done` at the last position of the row where anything happens; none of their arithmetic is repeated here.
An entry is named on the command line as `pgcheck.adapters.torchrl:gae_discounted`.

What the exact expectation shows of torchrl 0.14.1:

* No function multiplies by γ^t. On-policy with γ < 1 what all of them give is `reward_to_go_undiscounted_weight`, whatever
  the λ; on `mdp/pessimal` that is −2 ∇J.
* One γ a position: observation positions are discounted too. Where the problem's γ counts actions everything is biased,
  by 7% of ‖∇J‖ on `dialogue/two-turn-action-clock` (10% without γ^t). A tensor of per-position γ `[.., T, 1]` mends it
  (`gae_own_clock`).
* V-trace corrects the action at t and what follows, not the states the old policy visits: without any clip it is off by
  .2% to 47% of ‖∇J‖ off-policy with several actions a row. With w_{0:t−1} in front and ρ̄ = ∞ it is unbiased; c̄ has no
  part in the bias when V is exact.
* The docstring of `vtrace_advantage_estimate` has `log_pi` and `log_mu` the wrong way round; the code has ρ = π/μ with
  π = `log_pi`. Called as documented, every ratio is inverted: unclipped, 85% instead of 0 on `off-policy/contextual-drifted`.
* A Python float γ is multiplied with an int32 mask, which makes float32 of it: .9 becomes .89999998, and in float64
  `generalized_advantage_estimate` and `vtrace_advantage_estimate` are off by 2e-8 to 7e-8. A 0-dim tensor of γ in the
  rewards' dtype is kept; the entries here pass one. Float thresholds ρ̄ and c̄ become float32 in the same way.
* `reward2go` drops every reward ⌊ln 1e-7 / ln γ⌋ steps ahead or more: 23 steps for γ = .5, 152 for .9. A single reward
  that far away gives no gradient at all. For γ < 1e-7, 0 included, it raises IndexError.
* `vec_generalized_advantage_estimate` has the same filter in γλ: the same numbers as the loop on short rows, IndexError for
  λ = 0.

Guarantee: every claim below is tested on every named problem that meets its conditions, in both directions.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pgcheck.batch import Batch
from pgcheck.errors import EstimatorError, UsageError
from pgcheck.estimators import ratios
from pgcheck.estimators.advantages import Advantage
from pgcheck.estimators.base import (
    Claim,
    Condition,
    Estimator,
    biased,
    broken_support,
    discounted,
    full_support,
    of_return,
    off_policy,
    on_policy,
    unbiased,
    undiscounted,
)
from pgcheck.estimators.zoo import compose
from pgcheck.problem import Problem

try:
    from torchrl.objectives.value import functional
except ImportError as error:
    raise UsageError(
        f"pgcheck.adapters.torchrl needs torchrl ({error}); install it: pip install 'pgcheck[test]', or pip install torchrl."
    ) from error

SHORTEST_DISCOUNT = 1e-7  # below it, reward2go has an empty filter


# -- what torchrl is given


def rows_of(x: Tensor) -> Tensor:
    """`[..., B, T]` as torchrl wants it, `[M·B, T, 1]`."""
    return x.reshape(-1, x.shape[-1], 1)


def done(batch: Batch) -> Tensor:
    """True at the last position of a row with an action, a reward or a value, `[..., B, T]`.

    Not at the last *action*: an observation after it may pay, and the value before it counts on that.
    """
    here = (batch.mask != 0) | (batch.reward != 0) | (batch.value[..., :-1] != 0)
    not_yet_over = here.flip(-1).cumsum(-1).flip(-1)
    return here & (not_yet_over == 1)


def same_gamma(batch: Batch) -> Tensor:
    """γ as a 0-dim tensor of the rewards' dtype."""
    return torch.as_tensor(batch.discount, dtype=batch.reward.dtype, device=batch.reward.device)


def gamma_by_clock(batch: Batch) -> Tensor:
    """γ^{clock(t+1) − clock(t)} at each position, `[M·B, T, 1]`: 1 where the next position is an observation that does
    not count."""
    step = torch.nn.functional.pad(batch.clock.diff(dim=-1), (0, 1), value=1.0)
    return rows_of(batch.discount**step)


def transitions(batch: Batch) -> dict[str, Tensor]:
    """The arguments that GAE and V-trace share."""
    return {
        "state_value": rows_of(batch.value[..., :-1]),
        "next_state_value": rows_of(batch.value[..., 1:]),
        "reward": rows_of(batch.reward),
        "done": rows_of(done(batch)),
    }


# -- torchrl's advantages


def reward2go(batch: Batch) -> Tensor:
    """Ĝ_t = Σ_{k≥t} γ^{k−t} r_k by `reward2go`.

    Raises:
        EstimatorError: γ < 1e-7, where torchrl raises IndexError.
    """
    if batch.discount < SHORTEST_DISCOUNT:
        raise EstimatorError(f"torchrl's reward2go cannot be called with γ = {batch.discount:g}: its filter is empty.")
    to_go = functional.reward2go(rows_of(batch.reward), rows_of(done(batch)), batch.discount)
    return to_go.reshape(batch.reward.shape)


def gae_advantage(lmbda: float, gamma: Any = same_gamma) -> Advantage:
    """A_t = Σ_{k≥t} (γλ)^{k−t} δ_k, δ_k = r_k + γ V(s_{k+1}) − V(s_k), by `generalized_advantage_estimate`."""

    def advantage(batch: Batch) -> Tensor:
        adv, _ = functional.generalized_advantage_estimate(gamma(batch), lmbda, **transitions(batch))
        return adv.reshape(batch.reward.shape)

    return advantage


def vtrace_advantage(rho_thresh: float = 1.0, c_thresh: float = 1.0) -> Advantage:
    """A_t = ρ_t (r_t + γ v_{t+1} − V(s_t)), v_t = V(s_t) + ρ_t δ_t + γ c_t (v_{t+1} − V(s_{t+1})), by
    `vtrace_advantage_estimate`; ρ_t = min(ρ̄, π/μ), c_t = min(c̄, π/μ). Observation positions have ratio 1."""

    def advantage(batch: Batch) -> Tensor:
        adv, _ = functional.vtrace_advantage_estimate(
            same_gamma(batch),
            rows_of(batch.logp * batch.mask),
            rows_of(batch.behavior_logp * batch.mask),
            **transitions(batch),
            rho_thresh=torch.as_tensor(rho_thresh, dtype=batch.reward.dtype),
            c_thresh=torch.as_tensor(c_thresh, dtype=batch.reward.dtype),
        )
        return adv.reshape(batch.reward.shape)

    return advantage


# -- what the user's loss puts around them


def weighted_by_discount(advantage: Advantage) -> Advantage:
    """γ^t A_t, γ^t by the problem's clock."""

    def weighted(batch: Batch) -> Tensor:
        return batch.discount_weight * advantage(batch)

    return weighted


def ratio_before(batch: Batch, adv: Tensor) -> Tensor:
    """w_{0:t−1}, the product of the ratios before t."""
    log_ratio = (batch.logp - batch.behavior_logp) * batch.mask
    return (log_ratio.cumsum(-1) - log_ratio).exp()


# -- the conditions of the claims


def _counts_positions(problem: Problem) -> bool:
    return problem.discount == 1.0 or problem.trajectories.paths.discount_clock == "position"


def _is_float32(problem: Problem) -> bool:
    return float(torch.tensor(problem.discount, dtype=torch.float32)) == problem.discount


def _one_decision(problem: Problem) -> bool:
    return bool((problem.trajectories.paths.mask.sum(-1) <= 1).all())


position_clock = Condition("γ counts positions", _counts_positions)
action_clock = Condition("γ counts actions", lambda p: not _counts_positions(p))
gamma_in_float32 = Condition("γ is a float32 number", _is_float32)
gamma_rounded = Condition("γ is not a float32 number", lambda p: not _is_float32(p))
one_decision = Condition("one action a row", _one_decision)
more_decisions = Condition("several actions a row", lambda p: not _one_decision(p))

NO_RATIO = biased("no importance ratio", off_policy)
OTHER_CLOCK = biased("observation positions are discounted, which the problem does not do", on_policy, action_clock)
BROKEN_SUPPORT = biased("no ratio brings back what the old policy never does", broken_support)
WITHOUT_WEIGHT: tuple[Claim, ...] = (
    unbiased(on_policy, undiscounted),
    biased("γ^t is missing: later steps weigh too much; it is the gradient of no function", on_policy, discounted),
)
WITH_WEIGHT: tuple[Claim, ...] = (unbiased(on_policy, position_clock), OTHER_CLOCK)

LIBRARY = "torchrl 0.14, torchrl.objectives.value.functional"
GAE = f"{LIBRARY}.generalized_advantage_estimate; Schulman et al., arXiv 1506.02438, equation 16"
VTRACE = f"{LIBRARY}.vtrace_advantage_estimate; IMPALA, Espeholt et al., arXiv 1802.01561, section 4.2"


# -- the entries

reward_to_go = Estimator(
    "torchrl.reward_to_go",
    compose(reward2go),
    "trajectory",
    claims=of_return(*WITHOUT_WEIGHT, NO_RATIO),
    formula="Σ_t Ĝ_t ∇log π_t",
    reference=f"{LIBRARY}.reward2go; Sutton et al. 2000 without γ^t",
    about="reward2go times log π, as it is usually written: right for γ = 1 only.",
)

reward_to_go_discounted = Estimator(
    "torchrl.reward_to_go_discounted",
    compose(weighted_by_discount(reward2go)),
    "trajectory",
    claims=of_return(*WITH_WEIGHT, NO_RATIO),
    formula="Σ_t γ^t Ĝ_t ∇log π_t",
    reference=f"{LIBRARY}.reward2go; Sutton et al. 2000, theorem 1",
    about="With γ^t in front it is the gradient of the discounted return, wherever γ counts positions.",
)

gae = Estimator(
    "torchrl.gae",
    compose(gae_advantage(0.95)),
    "trajectory",
    claims=of_return(*WITHOUT_WEIGHT, NO_RATIO),
    formula="Σ_t Σ_{k≥t} (γλ)^{k−t} δ_k ∇log π_t,  λ = .95, V = V^π",
    reference=GAE,
    about="GAE as PPO uses it, with an exact critic: its bias is that of the missing γ^t, λ adds none.",
    shift_invariant=True,
)

gae_discounted = Estimator(
    "torchrl.gae_discounted",
    compose(weighted_by_discount(gae_advantage(0.95))),
    "trajectory",
    claims=of_return(*WITH_WEIGHT, NO_RATIO),
    formula="Σ_t γ^t Σ_{k≥t} (γλ)^{k−t} δ_k ∇log π_t,  λ = .95, V = V^π",
    reference=GAE,
    about="With γ^t and an exact critic GAE is unbiased for every λ; a learned critic's error is what λ trades off.",
    shift_invariant=True,
)

gae_lambda_1 = Estimator(
    "torchrl.gae_lambda_1",
    compose(gae_advantage(1.0)),
    "trajectory",
    claims=of_return(*WITHOUT_WEIGHT, NO_RATIO),
    formula="Σ_t (Ĝ_t − V^π(s_t)) ∇log π_t",
    reference=GAE,
    about="λ = 1: the reward-to-go less the value of the state, without γ^t.",
    shift_invariant=True,
)

gae_lambda_1_discounted = Estimator(
    "torchrl.gae_lambda_1_discounted",
    compose(weighted_by_discount(gae_advantage(1.0))),
    "trajectory",
    claims=of_return(*WITH_WEIGHT, NO_RATIO),
    formula="Σ_t γ^t (Ĝ_t − V^π(s_t)) ∇log π_t",
    reference=GAE,
    about="λ = 1 with γ^t: `baselined(value)` coefficient by coefficient, wherever γ counts positions.",
    shift_invariant=True,
)

gae_own_clock = Estimator(
    "torchrl.gae_own_clock",
    compose(weighted_by_discount(gae_advantage(0.95, gamma_by_clock))),
    "trajectory",
    claims=of_return(unbiased(on_policy), NO_RATIO),
    formula="Σ_t γ^t Σ_{k≥t} (Π_{t≤j<k} γ_j λ) δ_k ∇log π_t,  γ_j = 1 before an observation that does not count",
    reference=f"{GAE}; γ as a tensor [.., T, 1]",
    about="One γ a position, so that an observation discounts nothing. The function says “scalar” and takes it.",
    shift_invariant=True,
)

gae_float_gamma = Estimator(
    "torchrl.gae_float_gamma",
    compose(weighted_by_discount(gae_advantage(0.95, lambda batch: batch.discount))),
    "trajectory",
    claims=of_return(
        unbiased(on_policy, position_clock, gamma_in_float32),
        biased("γ times an int32 mask is float32: .9 becomes .89999998", on_policy, position_clock, gamma_rounded),
        OTHER_CLOCK,
        NO_RATIO,
    ),
    formula="as gae_discounted, γ handed over as a Python float",
    reference=GAE,
    about="The same call with a Python float: a bias of 1e-8, seen in float64 only. torch's default dtype decides.",
    shift_invariant=True,
)

vtrace = Estimator(
    "torchrl.vtrace",
    compose(vtrace_advantage()),
    "trajectory",
    claims=of_return(*WITHOUT_WEIGHT, biased("clipped ratios, and states of the old policy", off_policy)),
    formula="Σ_t ρ_t (r_t + γ v_{t+1} − V^π(s_t)) ∇log π_t,  ρ̄ = c̄ = 1",
    reference=VTRACE,
    about="torchrl's defaults. On-policy every ratio is 1 and it is gae_lambda_1.",
    shift_invariant=True,
)

vtrace_discounted = Estimator(
    "torchrl.vtrace_discounted",
    compose(weighted_by_discount(vtrace_advantage())),
    "trajectory",
    claims=of_return(*WITH_WEIGHT, biased("clipped ratios, and states of the old policy", off_policy)),
    formula="Σ_t γ^t ρ_t (r_t + γ v_{t+1} − V^π(s_t)) ∇log π_t,  ρ̄ = c̄ = 1",
    reference=VTRACE,
    about="The defaults with γ^t. Off-policy the clip at 1 biases even a one-step problem.",
    shift_invariant=True,
)

vtrace_unclipped = Estimator(
    "torchrl.vtrace_unclipped",
    compose(weighted_by_discount(vtrace_advantage(math.inf, math.inf))),
    "trajectory",
    claims=of_return(
        *WITH_WEIGHT,
        unbiased(full_support, one_decision),
        biased("the states are those of the old policy: no ratio for the actions before t", off_policy, more_decisions),
        BROKEN_SUPPORT,
    ),
    formula="Σ_t γ^t ρ_t (r_t + γ v_{t+1} − V^π(s_t)) ∇log π_t,  ρ̄ = c̄ = ∞",
    reference=VTRACE,
    about="No clip at all: right for one action a row; with more, the state distribution of the old policy remains.",
    shift_invariant=True,
)

vtrace_weighted = Estimator(
    "torchrl.vtrace_weighted",
    compose(weighted_by_discount(vtrace_advantage(math.inf, 1.0)), ratio=ratio_before),
    "trajectory",
    claims=of_return(unbiased(full_support, position_clock), OTHER_CLOCK, BROKEN_SUPPORT),
    formula="Σ_t w_{0:t−1} γ^t ρ_t (r_t + γ v_{t+1} − V^π(s_t)) ∇log π_t,  ρ̄ = ∞, c̄ = 1",
    reference=f"{VTRACE}; Precup, Sutton & Singh 2000 for w_{{0:t−1}}",
    about="What it takes to be unbiased off-policy: the ratios before t in front, and ρ not clipped. c̄ may stay at 1.",
    shift_invariant=True,
    weight=ratios.trajectory_weight,
)

ENTRIES = (
    reward_to_go,
    reward_to_go_discounted,
    gae,
    gae_discounted,
    gae_lambda_1,
    gae_lambda_1_discounted,
    gae_own_clock,
    gae_float_gamma,
    vtrace,
    vtrace_discounted,
    vtrace_unclipped,
    vtrace_weighted,
)
