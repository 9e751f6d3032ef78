"""`Moments`: mean and covariance of the gradient estimate of one whole batch, in logit space.

Guarantee: numbers only. Exact moments have `batches=None`; a sampled engine says how many it drew.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from pgcheck.errors import UsageError
from pgcheck.policies.tabular import in_parameters, logit_gram, logit_jacobian
from pgcheck.statistics.guarded import Scores
from pgcheck.statistics.sequential import Interval, Judgement
from pgcheck.statistics.variance import Pairs

Progress = Callable[[str, int, int], None]
# (what, batches done, batches in all): called between blocks of anything that has run for two seconds


@dataclass(frozen=True)
class Sums:
    """What a way of enumerating hands over: moments of one evaluation x `[K·A]`, exact. Of `second` and `between`, the traces
    (0-dimensional) where the matrices are not kept."""

    mean: Tensor  # E x
    second: Tensor  # E x xᵀ
    between: Tensor  # Cov_s(E[x | s]) over starts; 0 where x is a whole batch or group
    evaluated: int
    by_step: Tensor  # E x of each position, [T, K·A]; their sum is E x


@dataclass(frozen=True)
class View:
    """Where sampled moments are, if not in logits: all parameters, or a few directions among them."""

    reference: Tensor | None  # [R], what is known of ∇_θ J there
    parameters: int  # P
    directions: int | None = None  # random ones, across ∇J where it is known; None: all of θ
    against: str | None = None  # an unbiased estimator on the same rollouts, that stands for ∇J where this is not known
    shown: float = (
        1.0  # the share of a bias's length that is seen at least; verdicts, and what could be missed, allow for it
    )


@dataclass(frozen=True)
class Moments:
    """E ĝ and Cov ĝ of one batch."""

    mean: Tensor  # [K, A]
    covariance: Tensor | None  # [K·A, K·A]; None: too large to be kept
    batches: int | None  # number drawn; None: every batch was enumerated
    enumerated: int = 0  # number of distinct batches evaluated
    lane: str = "coefficients"  # how the coefficients were evaluated
    policy: nn.Module | None = None  # the way to the parameters
    by_step: Tensor | None = None  # [T, K, A], the part of E ĝ that the coefficients of position t contribute
    trace: float | None = None  # tr Cov ĝ, where the covariance is not kept
    seed: int | None = None  # of the stream that was drawn from; None: exact
    intervals: Mapping[str, Interval] = field(default_factory=dict)
    # of sampled moments, by name: scale, rel, bias, off_axis, variance, mse, snr; 95%, NaN where the tails allow none
    judgements: Mapping[float | None, Judgement] = field(default_factory=dict)
    # of sampled moments, for each κ that E ĝ = κ ∇J was judged at, None for "some κ > 0"
    pairs: Pairs | None = None
    # of sampled moments: ‖ĝ − E ĝ‖² beside that of the estimator it was compared to, draw by draw
    scores: Scores | None = None  # of sampled moments: what an account keeps of each draw (`pgcheck.engines.accounts`)
    first: Tensor | None = None  # of sampled moments: the mean of the first grain of draws, [P]
    view: View | None = None  # None: in logits
    confidence: float = (
        0.95  # of `intervals`, so that those of whatever number of draws a run stops at hold 95% of the time
    )

    @property
    def total_variance(self) -> float:
        """tr Cov ĝ."""
        return float(self.whole_covariance.diagonal().sum()) if self.trace is None else self.trace

    @property
    def second_moment(self) -> float:
        """E ‖ĝ‖² = tr Cov ĝ + ‖E ĝ‖²."""
        return self.total_variance + float((self.mean**2).sum())

    def in_parameters(self) -> tuple[Tensor, Tensor]:
        """Mean `[P]` and covariance `[P, P]` of ĝ_θ: (dz/dθ)ᵀ E ĝ and (dz/dθ)ᵀ Cov ĝ (dz/dθ).

        Raises:
            UsageError: the moments were made without a policy, or their covariance was not kept.
        """
        covariance, jacobian = self.whole_covariance, logit_jacobian(self._to_parameters)
        return jacobian.T @ self.mean.reshape(-1), jacobian.T @ covariance @ jacobian

    def mean_in_parameters(self) -> Tensor:
        """E ĝ_θ = (dz/dθ)ᵀ E ĝ, `[P]`: one backward pass, however large P is.

        Raises:
            UsageError: the moments were made without a policy.
        """
        return in_parameters(self._to_parameters, self.mean)

    def total_variance_in_parameters(self) -> float:
        """tr Cov ĝ_θ = Σ Cov ĝ · (dz/dθ)(dz/dθ)ᵀ, without a `[P, P]` matrix.

        Raises:
            UsageError: the moments were made without a policy, or their covariance was not kept.
            BudgetError: dz/dθ has too many entries.
        """
        return self.total_variance_by(logit_gram(self._to_parameters))

    def total_variance_by(self, gram: Tensor) -> float:
        """The same with (dz/dθ)(dz/dθ)ᵀ at hand."""
        return float((self.whole_covariance * gram).sum())

    @property
    def whole_covariance(self) -> Tensor:
        if self.covariance is None:
            raise UsageError(
                f"covariance: it was not kept, having {self.mean.numel():,}² entries; total_variance and the mean are exact."
                " On a smaller problem, or with exact_moments(…, covariance=True) where it fits, it is there."
            )
        return self.covariance

    @property
    def _to_parameters(self) -> nn.Module:
        if self.policy is None:
            raise UsageError("policy: these moments were made without one, so there are no parameters to go to.")
        return self.policy


def covariance_from(second: Tensor, mean: Tensor) -> Tensor:
    """E[x xᵀ] − E[x] E[x]ᵀ, symmetrised; of traces, the trace."""
    if second.dim() == 0:
        return second - mean @ mean
    cov = second - torch.outer(mean, mean)
    return (cov + cov.T) / 2
