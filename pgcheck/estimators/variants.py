"""Knobs on which implementations of one estimator differ; not entries of the zoo, and used by name where they matter.

    pgcheck compare grpo pgcheck.estimators.variants:grpo_ddof_1 --problem notes/three-arm

* ε in the denominator of GRPO: 0, 1e-6 (the zoo, verl), 1e-4 (TRL); ddof 0 or 1.
* what a clip bound of CISPO means: 1 + ε_high (MiniMax-M1, verl), or the bound itself (TRL).
* over what a token mean runs: the batch, or each micro-batch of an accumulated step.
"""

from __future__ import annotations

from torch import Tensor

from pgcheck.batch import Batch
from pgcheck.estimators import advantages as adv
from pgcheck.estimators import aggregation as agg
from pgcheck.estimators import ratios
from pgcheck.estimators.base import Estimator
from pgcheck.estimators.zoo import compose


def _grpo(name: str, *, eps: float, ddof: int = 0) -> Estimator:
    advantage = adv.standardised_return("group", eps=eps, ddof=ddof)
    parts = compose(advantage, ratio=ratios.ppo_clip(), aggregation=agg.sequence_mean)
    return Estimator(name, parts, "group", shift_invariant=True, reads=("return",))


grpo_eps_0 = _grpo("grpo_eps_0", eps=0.0)
grpo_eps_1e_4 = _grpo("grpo_eps_1e_4", eps=1e-4)
grpo_ddof_1 = _grpo("grpo_ddof_1", eps=0.0, ddof=1)


def group_token_mean(batch: Batch) -> Tensor:
    """Each group a micro-batch with a token mean of its own, then the mean over them."""
    same = batch.same_group
    tokens = (same @ batch.length.unsqueeze(-1)).squeeze(-1).clamp(min=1.0)
    return (same.sum(-1) / batch.rows / tokens).unsqueeze(-1)


def _token_mean(name: str, aggregation: agg.Aggregation) -> Estimator:
    return Estimator(name, compose(adv.return_minus(adv.mean_of_others("group")), aggregation=aggregation), "batch")


token_mean = _token_mean("token_mean", agg.token_mean)
token_mean_of_micro_batches = _token_mean("token_mean_of_micro_batches", group_token_mean)


def _absolute_bound(batch: Batch, advantage: Tensor) -> Tensor:
    """min(r_t, ε_high) with ε_high = .2."""
    return ratios.token_ratio(batch, advantage).clamp(max=0.2)


_standardised = adv.standardised_return("group")
cispo_absolute = Estimator(
    "cispo_absolute", compose(_standardised, ratio=_absolute_bound, aggregation=agg.token_mean), "batch"
)
cispo_relative = Estimator(
    "cispo_relative",
    compose(_standardised, ratio=ratios.clipped_ratio(low=None, high=0.2), aggregation=agg.token_mean),
    "batch",
)


def _pairwise(batch: Batch) -> Tensor:
    """Σ_j (R_i − R_j) / (G (G − 1)) over the group, from Σ_{i<j} (R_i − R_j)(S_i − S_j) = Σ_i S_i Σ_j (R_i − R_j)."""
    R, same = batch.episode_return, batch.same_group
    n = same.sum(-1)
    gaps = (same * (R.unsqueeze(-1) - R.unsqueeze(-2))).sum(-1)
    return (gaps / (batch.rows * (n - 1.0).clamp(min=1.0))).unsqueeze(-1) * batch.mask


pairwise_differences = Estimator("pairwise_differences", _pairwise, "group", reads=("return",))


group_of_one = Estimator("group_of_one", compose(_standardised), "group", min_group_size=1)
