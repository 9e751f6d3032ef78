"""A grain of draws, and what several who look at it need of it, made once.

With c a point near the mean, g_i = x_i − c and s = c − t for another point t:

    Σ(x − t) = Σg + n s      Σ(x − t)² = Σg² + 2 s Σg + n s²      ‖x_i − t‖² = ‖g_i‖² + 2⟨g_i, s⟩ + ‖s‖²

so that the draws are gone through a few times, however many points they are seen from.

Guarantee: nothing cancels that is not small beside the noise of a draw; a grain that was sent to another process is the same
bytes there, with all that was summed of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

PRODUCTS_UP_TO = 512  # P up to which products of coordinates are summed
_FIRST = 1024  # draws whose mean is near enough
_FEW = 64  # coordinates up to which a product is a faster sum
_SIDE = 96  # columns of a block of a symmetric product


@dataclass(frozen=True, eq=False)
class Grain:
    """Draws x `[n, P]` around c `[P]`, float64."""

    x: Tensor
    centre: Tensor
    eps: float = torch.finfo(torch.float64).eps  # of what the draws were computed in

    @classmethod
    def of(cls, x: Tensor, centre: Tensor | None = None) -> Grain:
        """Draws of any dtype; around the mean of the first 1024 of them if not told otherwise."""
        exact = x.detach().to(torch.float64).contiguous()
        return cls(exact, exact[:_FIRST].mean(0) if centre is None else centre, torch.finfo(x.dtype).eps)

    @cached_property
    def off(self) -> Tensor:
        """The g of each draw, `[n, P]`."""
        return self.x - self.centre

    @cached_property
    def total(self) -> Tensor:
        """Σg, `[P]`."""
        return self.off.T @ self.off.new_ones(len(self.off))

    @cached_property
    def spread(self) -> Tensor:
        """‖g‖² of each draw, `[n]`."""
        if self.x.shape[1] <= _FEW:
            return self.off.square() @ self.off.new_ones(self.x.shape[1])
        return torch.linalg.vector_norm(self.off, dim=1).square()

    @cached_property
    def squares(self) -> Tensor:
        """Σg² of each coordinate, `[P]`."""
        if self.x.shape[1] <= PRODUCTS_UP_TO:
            return self.products.diagonal()
        return torch.linalg.vector_norm(self.off, dim=0).square()

    @cached_property
    def products(self) -> Tensor:
        """Σ g gᵀ, `[P, P]`."""
        return _symmetric(self.off)

    def along(self, v: Tensor, t: Tensor | None = None, *, room: int = 0) -> Tensor:
        """⟨x − t, v⟩ of each column of `v` `[P, k]` and draw, `[k, n]`; without `t`, ⟨x, v⟩. `room`: so many rows more, to be
        filled."""
        middle, k = self.centre if t is None else self.centre - t, v.shape[1]
        out = self.off.new_empty(k + room, len(self.off))
        torch.addmm((middle @ v).unsqueeze(1), v.T.contiguous(), self.off.T, out=out[:k])
        return out

    def total_from(self, t: Tensor) -> Tensor:
        """Σ(x − t), `[P]`."""
        return self.total + len(self.x) * (self.centre - t)

    def squares_from(self, t: Tensor) -> Tensor:
        """Σ(x − t)² of each coordinate, `[P]`."""
        s = self.centre - t
        return self.squares + s * (2 * self.total + len(self.x) * s)

    def distances_from(self, t: Tensor) -> Tensor:
        """‖x − t‖² of each draw, `[n]`; kept until another point is asked for."""
        known: tuple[Tensor, Tensor] | None = vars(self).get("_distances")
        if known is None or not torch.equal(known[0], t):
            s = self.centre - t
            far = torch.addmv(self.spread, self.off, s, alpha=2.0).add_(s @ s)
            known = vars(self)["_distances"] = t, far.clamp_(min=0.0)
        return known[1]

    def __getstate__(self) -> dict[str, Any]:
        """What is sent to another process: not what is made of the draws there, and the products to nobody."""
        names = ("x", "centre", "total", "spread", "squares")
        return {"eps": self.eps} | {name: getattr(self, name).contiguous() for name in names}


def _symmetric(g: Tensor) -> Tensor:
    """gᵀg, the half above the diagonal mirrored, as not every BLAS gives both the same last bit; of many columns, the blocks
    of that half alone."""
    P = g.shape[1]
    if P <= 2 * _SIDE:
        return _mirrored(g.T @ g)
    parts = g.split(_SIDE, 1)
    out = g.new_empty(P, P)
    for i, a in enumerate(parts):
        low = i * _SIDE
        here = a.T @ g[:, low:]
        out[low : low + a.shape[1], low:] = here
        out[low:, low : low + a.shape[1]] = here.T
        out[low : low + a.shape[1], low : low + a.shape[1]] = _mirrored(here[:, : a.shape[1]])
    return out


def _mirrored(x: Tensor) -> Tensor:
    return x.triu().add_(x.triu(1).T)
