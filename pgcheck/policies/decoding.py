"""How rollouts are written: temperature, top-k, top-p, precision. They belong to the *behaviour* policy.

    Problem(task, model, behavior_logits=Decoding(temperature=0.8, top_p=0.9))

The policy that is trained has no temperature and full support; what draws its rollouts may have neither, and then importance
weights no longer average to one: E_old[w] is the mass that is kept, for one token Σ_{a kept} π(a).

Guarantee: temperature first, then top-k, then top-p, as serving engines do; ties go to the lower token.
"""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass, replace

import torch
from torch import Tensor, nn

from pgcheck.errors import ProblemError


@dataclass(frozen=True, eq=False)
class Decoding:
    """How a serving engine writes: weights, precision, temperature and truncation of the behaviour policy. Also a function
    from logits `[K, A]` to those of what draws from them; -inf is never drawn.

    Args:
        model: a language model; None: that of the policy.
        temperature: what logits are divided by.
        top_k, top_p: see `truncated`.
        dtype: of the copy of the model that writes; its logits are then float64 numbers.

    Raises:
        ProblemError: naming the argument and the value.
    """

    model: nn.Module | None = None
    _: KW_ONLY
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    dtype: torch.dtype = torch.float64

    def __post_init__(self) -> None:
        if (
            not isinstance(self.temperature, (int, float))
            or isinstance(self.temperature, bool)
            or not 0 < self.temperature < math.inf
        ):
            raise ProblemError(
                f"temperature: {self.temperature!r}; expected a positive number (greedy decoding is top_k=1)."
            )
        if not isinstance(self.dtype, torch.dtype) or not self.dtype.is_floating_point:
            raise ProblemError(f"dtype: {self.dtype!r}; expected a floating-point type, torch.bfloat16 for example.")

    @property
    def plain(self) -> bool:
        """The model's own law, in float64."""
        return self.temperature == 1 and not self.truncates and self.dtype == torch.float64

    @property
    def truncates(self) -> bool:
        """Some tokens may never be drawn."""
        return self.top_k is not None or (self.top_p is not None and self.top_p < 1)

    def __call__(self, logits: Tensor) -> Tensor:
        """Logits `[K, V]` of the law that is drawn from, of those of the model."""
        return truncated(logits.to(torch.float64) / self.temperature, top_k=self.top_k, top_p=self.top_p)

    def by(self, policy: nn.Module) -> Decoding:
        """The same, with the model given: that of the policy if there was none."""
        return replace(self, model=policy) if self.model is None else self


def truncated(logits: Tensor, *, top_k: int | None = None, top_p: float | None = None) -> Tensor:
    """`logits` `[K, V]` with -inf for every token that a sampler cuts off: all but the `top_k` most likely, and all but the
    fewest of those whose probability adds up to `top_p`. Ties go to the lower token."""
    V = logits.shape[-1]
    if not (top_k is None or 1 <= top_k <= V) or not (top_p is None or 0.0 < top_p <= 1.0):
        raise ProblemError(
            f"top_k, top_p: {top_k!r}, {top_p!r}; nothing may be left to sample: 1 ≤ top_k ≤ {V}, 0 < top_p ≤ 1."
        )
    if top_k is None and (top_p is None or top_p == 1):
        return logits
    order = logits.argsort(dim=-1, descending=True, stable=True)
    mass = torch.softmax(logits, -1).gather(-1, order)
    keep = torch.arange(V, device=logits.device) < (V if top_k is None else top_k)
    if top_p is not None:
        left = torch.softmax(logits.gather(-1, order).masked_fill(~keep, -math.inf), -1)
        keep = keep & (left.cumsum(-1) - left < top_p - 1e-12)
    keep = keep.expand_as(mass)
    return logits.masked_fill(~torch.zeros_like(keep).scatter(-1, order, keep), -math.inf)


class Between(nn.Module):
    """Logits `fraction` of the way from those of one language model to those of another at a temperature."""

    def __init__(self, model: nn.Module, old: nn.Module, *, fraction: float, temperature: float = 1.0) -> None:
        super().__init__()
        self.model, self.old, self.fraction, self.temperature = model, old, fraction, temperature

    def forward(self, tokens: Tensor) -> Tensor:
        z: Tensor = (1.0 - self.fraction) * self.model(tokens) + self.fraction / self.temperature * self.old(tokens)
        return z
