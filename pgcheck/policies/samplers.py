"""What a sampler does to a policy: temperature, top-k, top-p. They belong to the *behaviour* policy.

    Problem(task, model, behavior_logits=Sampler(temperature=0.8, top_p=0.9))

The policy that is trained has no temperature and full support; what draws its rollouts may have neither, and then importance
weights no longer average to one: E_old[w] is the mass that is kept, for one token Σ_{a kept} π(a).

Guarantee: temperature first, then top-k, then top-p, as serving engines do; ties go to the lower token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pgcheck.errors import ProblemError


@dataclass(frozen=True)
class Sampler:
    """A function from the policy's logits `[K, A]` to those of what draws from it; -inf is never drawn.

    Args:
        temperature: logits are divided by it; above 0.
        top_k: how many tokens are kept.
        top_p: the least probability that the kept ones have together.

    Raises:
        ProblemError: a temperature that is not a positive number; nothing would be left to sample.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        t = self.temperature
        if not isinstance(t, (int, float)) or isinstance(t, bool) or not 0.0 < t < math.inf:
            raise ProblemError(f"temperature: {t!r}; expected a positive number (greedy decoding is top_k=1).")

    def __call__(self, logits: Tensor) -> Tensor:
        return truncated(logits / self.temperature, top_k=self.top_k, top_p=self.top_p)


def truncated(logits: Tensor, *, top_k: int | None = None, top_p: float | None = None) -> Tensor:
    """`logits` `[K, V]` with -inf for every token that a sampler cuts off: all but the `top_k` most likely, and all but the
    fewest of those whose probability adds up to `top_p`. Ties go to the lower token."""
    V = logits.shape[-1]
    if not (top_k is None or 1 <= top_k <= V) or not (top_p is None or 0.0 < top_p <= 1.0):
        raise ProblemError(
            f"top_k, top_p: {top_k!r}, {top_p!r}; nothing may be left to sample: 1 ≤ top_k ≤ {V}, 0 < top_p ≤ 1."
        )
    order = logits.argsort(dim=-1, descending=True, stable=True)
    mass = torch.softmax(logits, -1).gather(-1, order)
    keep = torch.arange(V) < (V if top_k is None else top_k)
    if top_p is not None:
        left = torch.softmax(logits.gather(-1, order).masked_fill(~keep, -math.inf), -1)
        keep = keep & (left.cumsum(-1) - left < top_p - 1e-12)
    keep = keep.expand_as(mass)
    return logits.masked_fill(~torch.zeros_like(keep).scatter(-1, order, keep), -math.inf)
