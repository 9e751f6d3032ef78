"""Coefficients that ascend another objective than J: pass@k, the likelihood of success, the best of n.

With 0/1 returns on one prompt, p = J and every such objective is a function of p, so E ĝ = κ(p) ∇J; over several prompts
each has a factor of its own, and the direction is another one. Success means R > ½.
"""

from __future__ import annotations

from pgcheck.estimators import advantages as adv
from pgcheck.estimators.base import biased, binary_return, on_policy, one_start, proportional, several_starts
from pgcheck.estimators.zoo.composition import add, compose, mean_over_rows
from pgcheck.problem import Problem

PASS_K = 2


def slope_of_pass_at_k(problem: Problem) -> float:
    """k(1 − p)^{k−1} = d(1 − (1 − p)^k)/dp, k = 2."""
    return float(PASS_K * (1 - problem.value()) ** (PASS_K - 1))


def slope_of_likelihood(problem: Problem) -> float:
    """(1 − (1 − p)^G)/p = Σ_{j<G} (1 − p)^j, the derivative of the first G terms of log p = −Σ_j (1 − p)^j / j.

    E[Σ_i r_i S_i / K; K ≥ 1] = P(K ≥ 1) E[S | success] and E[S | success] = ∇p/p.
    """
    p = problem.value()
    return mean_over_rows(problem, lambda G: sum((1 - p) ** j for j in range(G)))


def slope_of_likelihood_short_of_one(problem: Problem) -> float:
    """(1 − (1 − p)^{G−1})/p = Σ_{j<G−1} (1 − p)^j, one term of log p less.

    The control variate −Σ S/G is missing where nobody succeeds, which costs (1 − p)^{G−1} ∇p; a group in which nobody
    succeeds and all share in being best gives that away in the same way.
    """
    p = problem.value()
    return mean_over_rows(problem, lambda G: sum((1 - p) ** j for j in range(G - 1)))


add(
    "pkpo",
    compose(adv.expected_maximum(PASS_K)),
    "group",
    "pkpo(k=2)",
    claims=(
        biased("ascends the mean over prompts of E max of 2 (pass@2)", on_policy, several_starts),
        proportional(slope_of_pass_at_k, on_policy, one_start, binary_return),
    ),
    formula="k · mean over (k−1)-subsets I of the others of max(R_i, max_I R) · S_i,  k = 2",
    reference="PKPO, arXiv 2505.15201, the unbiased estimator s(g) of ∇ max_g@k",
    about="Every set of k rows is scored by its best, and each row of it gets that score: unbiased for pass@k.",
    reads=("return",),
)

add(
    "pkpo(minus_one)",
    compose(adv.expected_maximum(PASS_K, over_others=True)),
    "group",
    claims=(
        biased("ascends the mean over prompts of E max of 2 (pass@2)", on_policy, several_starts),
        proportional(slope_of_pass_at_k, on_policy, one_start, binary_return),
    ),
    formula="k · mean over (k−1)-subsets I of the others of max(R_i − max_I R, 0) · S_i,  k = 2",
    reference="PKPO, arXiv 2505.15201, the baseline s^(loo−1)",
    about="The same less the best of the set without the own row: what the row itself adds. Quieter, same mean.",
    shift_invariant=True,
    reads=("return",),
)

add(
    "maxrl",
    compose(adv.mean_over_successes()),
    "group",
    claims=(
        biased("ascends a truncated log p for each prompt: hard ones weigh more", on_policy, several_starts),
        proportional(slope_of_likelihood, on_policy, one_start, binary_return),
    ),
    formula="1[R_i > ½] G/K S_i,  K the successes of the group; 0 if there are none",
    reference="MaxRL, arXiv 2602.02710",
    about="The mean score over successes only. It ascends −Σ_{j≤G} (1 − p)^j / j, the first G terms of log p.",
    reads=("return",),
)

add(
    "maxrl(centered)",
    compose(adv.mean_over_successes(centered=True)),
    "group",
    claims=(
        biased("ascends a truncated log p for each prompt: hard ones weigh more", on_policy, several_starts),
        proportional(slope_of_likelihood_short_of_one, on_policy, one_start, binary_return),
    ),
    formula="(1[R_i > ½] − K/G)/(K/G) S_i; 0 if there are no successes",
    reference="MaxRL, arXiv 2602.02710, with the mean score as control variate",
    about="Centered by the success rate; dropping groups without success then costs one term of log p.",
    reads=("return",),
)

add(
    "best_of_n",
    compose(adv.best_of_group),
    "group",
    "raft",
    claims=(
        biased("imitates the best of each group: ascends another objective", on_policy, several_starts),
        proportional(slope_of_likelihood_short_of_one, on_policy, one_start, binary_return),
    ),
    formula="1[R_i = max] G/(number of the best) S_i",
    reference="RAFT, arXiv 2304.06767: fine-tuning on the best of each group; ties share",
    about="Supervised learning on the winner of each group; a group of failures is imitated as well.",
    shift_invariant=True,
    reads=("return",),
)
