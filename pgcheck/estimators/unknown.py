"""Log-probabilities that are not known: what a loss does with them, where that is linear or only looks at their ratios.

An `Unknown` is Σ_(i,t) (p_it logp_it + q_it behavior_logp_it) + a known number, for each entry of a tensor. It can be indexed,
added up and multiplied by what is known; then its p and q are kept as it goes. Where p = −q it is a function of d = logp −
behavior_logp, which is known: then it becomes the tensor that it is, and anything can be done to it. Everything else is
refused: to be compared, turned into a number, exponentiated, multiplied by itself. The rules are few and as in NumPy.

Guarantee: what gets through has looked at no log-probability, only at d.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._pytree import tree_map_only


class NotLinearError(RuntimeError):
    """Something was asked of an `Unknown` that it has no answer to."""


class Unknown(Tensor):
    """See the module; `w` `[…, 2·B·T + 1]` is p, q and the number; `d` `[B·T]` is the leaf."""

    w: NDArray[np.float64]
    d: Tensor

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not torch.is_grad_enabled():
            raise NotLinearError
        kwargs = kwargs or {}
        if func in _RULES:
            try:
                return _RULES[func](*args, **kwargs)
            except (NotLinearError, TypeError):
                pass
        args, kwargs = tree_map_only(Unknown, known_value, (args, kwargs))
        return func(*args, **kwargs)


def unknowns(d: Tensor) -> tuple[Unknown, Unknown]:
    """The log-probabilities of a batch, and those of its behavior policy, `[B, T]` like d, their difference."""
    rows, steps = d.shape
    n = d.numel()
    every, leaf = np.eye(2 * n, 2 * n + 1), d.detach().flatten().requires_grad_(True)
    p, q = every[:n].reshape(rows, steps, -1), every[n:].reshape(rows, steps, -1)
    return _unknown(p, leaf), _unknown(q, leaf)


def weights(x: Unknown) -> Tensor:
    """p, `[…, B·T]`: the gradient."""
    return torch.from_numpy(x.w[..., : len(x.d)].copy())


def known_value(x: Unknown) -> Tensor:
    """The tensor that it is, if it is a function of d.

    Raises:
        NotLinearError: it is not.
    """
    n = len(x.d)
    p, q, number = x.w[..., :n], x.w[..., n:-1], x.w[..., -1]
    if (p + q).any():
        raise NotLinearError
    known = torch.from_numpy(number.copy())
    return known + torch.from_numpy(p.copy()) @ x.d if p.any() else known


def _unknown(w: NDArray[np.float64], leaf: Tensor) -> Unknown:
    new: Unknown = Tensor._make_subclass(Unknown, _NAN)  # what gets around the rules sees this
    new.w, new.d = w, leaf
    return new


_NAN = torch.full((), math.nan, dtype=torch.float64)
_RULES: dict[Any, Callable[..., Any]] = {}


def _rule(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """For the methods of a tensor and the functions of `torch` with these names."""

    def register(rule: Callable[..., Any]) -> Callable[..., Any]:
        for name in names:
            for owner in (Tensor, torch):
                if hasattr(owner, name):
                    _RULES[getattr(owner, name)] = rule
        return rule

    return register


def _known(x: Any) -> Any:
    """A number or an array."""
    if isinstance(x, Tensor):
        if isinstance(x, Unknown) or x.requires_grad:
            raise NotLinearError
        return x.numpy()
    return x


def _factor(x: Any) -> Any:
    """A number, or an array `[…, 1]`."""
    if isinstance(x, (float, int)):
        return float(x)
    array: NDArray[Any] = np.asarray(_known(x))
    if array.dtype.kind not in "fiub":
        raise NotLinearError
    return array[..., None].astype(np.float64)


def _shape(x: Any) -> tuple[int, ...]:
    return x.w.shape[:-1] if isinstance(x, Unknown) else np.shape(_known(x))


def _sum_of(a: Any, b: Any, sign: float) -> Unknown:
    """a + sign · b."""
    if isinstance(a, Unknown) and isinstance(b, Unknown):
        return _unknown(a.w + b.w if sign > 0 else a.w - b.w, a.d)
    x, w, number = (a, a.w, sign * _factor(b)) if isinstance(a, Unknown) else (b, sign * b.w, _factor(a))
    if isinstance(number, float):
        w = w.copy()
        w[..., -1] += number
    else:
        w = np.broadcast_to(w, (*np.broadcast_shapes(w.shape[:-1], number.shape[:-1]), w.shape[-1])).copy()
        w[..., -1:] += number
    return _unknown(w, x.d)


@_rule("add", "__add__", "__radd__")
def _add(a: Any, b: Any) -> Unknown:
    return _sum_of(a, b, 1.0)


@_rule("sub", "__sub__", "subtract")
def _subtract(a: Any, b: Any) -> Unknown:
    return _sum_of(a, b, -1.0)


@_rule("__rsub__", "rsub")
def _subtract_from(a: Any, b: Any) -> Unknown:
    return _sum_of(b, a, -1.0)


@_rule("mul", "__mul__", "__rmul__", "multiply")
def _times(a: Any, b: Any) -> Unknown:
    x, factor = (a, b) if isinstance(a, Unknown) else (b, a)
    return _unknown(x.w * _factor(factor), x.d)


@_rule("div", "__truediv__", "divide", "true_divide")
def _over(a: Any, b: Any) -> Unknown:
    if not isinstance(a, Unknown):
        raise NotLinearError
    with np.errstate(all="ignore"):
        return _unknown(a.w / np.asarray(_factor(b)), a.d)


@_rule("neg", "__neg__", "negative")
def _minus(x: Unknown) -> Unknown:
    return _unknown(-x.w, x.d)


@_rule("detach")
def _detach(x: Unknown) -> Unknown:
    """logp = behavior_logp + d, without a gradient."""
    n, w = len(x.d), x.w.copy()
    w[..., -1] += w[..., :n] @ x.d.detach().numpy()
    w[..., n:-1] += w[..., :n]
    w[..., :n] = 0.0
    return _unknown(w, x.d)


@_rule("__iadd__", "add_")
def _add_to(total: Any, x: Any) -> Any:
    return _becomes(total, _sum_of(total, x, 1.0))


@_rule("__isub__", "sub_")
def _subtract_off(total: Any, x: Any) -> Any:
    return _becomes(total, _sum_of(total, x, -1.0))


def _becomes(total: Any, new: Unknown) -> Any:
    """For everybody who holds that number; who looks at its memory sees NaN."""
    if _shape(total) or _shape(new):
        raise NotLinearError
    if not isinstance(total, Unknown):
        total.fill_(math.nan)
        total.__class__ = Unknown
    total.w, total.d = new.w, new.d
    return total


@_rule("__getitem__")
def _at(x: Unknown, index: Any) -> Unknown:
    places = index if isinstance(index, tuple) else (index,)
    if all(type(i) in (int, slice) for i in places):
        return _unknown(x.w[places], x.d)
    if not all(isinstance(i, (int, list, Tensor)) for i in places):
        raise NotLinearError  # beside a slice, places from a tensor are another matter in NumPy
    return _unknown(x.w[tuple(_known(i) for i in places)], x.d)


def _reduced(x: Any, dim: Any, keepdim: bool) -> tuple[Unknown, int]:
    n = x.w.ndim - 1
    dims = range(n) if dim is None else dim if isinstance(dim, (tuple, list)) else (dim,)
    axes = tuple(d + n if d < 0 else d for d in dims)
    if any(not 0 <= a < n for a in axes):
        raise NotLinearError
    return _unknown(x.w.sum(axes, keepdims=keepdim), x.d), math.prod(x.w.shape[a] for a in axes)


@_rule("sum")
def _sum(x: Any, dim: Any = None, keepdim: bool = False) -> Unknown:
    return _reduced(x, dim, keepdim)[0]


@_rule("mean")
def _mean(x: Any, dim: Any = None, keepdim: bool = False) -> Unknown:
    total, n = _reduced(x, dim, keepdim)
    return _over(total, n)


@_rule("dot", "inner", "matmul", "__matmul__", "__rmatmul__")
def _dot(a: Any, b: Any) -> Unknown:
    if not len(_shape(a)) == len(_shape(b)) == 1:
        raise NotLinearError
    return _sum(_times(a, b))


@_rule("where")
def _where(condition: Any, a: Any, b: Any) -> Unknown:
    holds = np.asarray(_known(condition), dtype=bool)
    left, right = (x if isinstance(x, Unknown) else torch.as_tensor(x) for x in (a, b))
    return _sum_of(left * torch.from_numpy(holds), right * torch.from_numpy(~holds), 1.0)


@_rule("masked_fill")
def _filled(x: Any, mask: Any, value: Any) -> Unknown:
    return _where(mask, value, x)


def _alike(several: Sequence[Any]) -> tuple[list[NDArray[np.float64]], Tensor]:
    x = next(x for x in several if isinstance(x, Unknown))
    zero = _unknown(np.zeros_like(x.w[(0,) * (x.w.ndim - 1)]), x.d)
    return [(y if isinstance(y, Unknown) else _add(zero, y)).w for y in several], x.d


@_rule("stack")
def _stack(several: Sequence[Any], dim: int = 0) -> Unknown:
    ws, leaf = _alike(several)
    return _unknown(np.stack(ws, dim - 1 if dim < 0 else dim), leaf)


@_rule("cat", "concat")
def _cat(several: Sequence[Any], dim: int = 0) -> Unknown:
    ws, leaf = _alike(several)
    return _unknown(np.concatenate(ws, dim - 1 if dim < 0 else dim), leaf)


@_rule("unbind")
def _unbind(x: Any, dim: int = 0) -> tuple[Unknown, ...]:
    if dim != 0 or x.w.ndim < 2:
        raise NotLinearError
    return tuple(_unknown(w, x.d) for w in x.w)


@_rule("__iter__")
def _iter(x: Any) -> Iterator[Unknown]:
    return iter(_unbind(x))


@_rule("reshape", "view")
def _reshape(x: Any, *shape: Any) -> Unknown:
    sizes = shape[0] if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else shape
    return _unknown(x.w.reshape(*sizes, x.w.shape[-1]), x.d)


@_rule("flatten", "ravel")
def _flat(x: Any) -> Unknown:
    return _reshape(x, -1)


@_rule("unsqueeze")
def _unsqueeze(x: Any, dim: int) -> Unknown:
    return _unknown(np.expand_dims(x.w, dim - 1 if dim < 0 else dim), x.d)


@_rule("clone", "double", "contiguous")
def _same(x: Any) -> Unknown:
    return _unknown(x.w, x.d)


# -- what is known of it

_PROPERTIES: dict[str, Callable[[Any], Any]] = {
    "shape": lambda x: torch.Size(_shape(x)),
    "ndim": lambda x: x.w.ndim - 1,
    "dtype": lambda x: torch.float64,
    "device": lambda x: torch.device("cpu"),
    "requires_grad": lambda x: bool(x.w[..., : len(x.d)].any()),
}
_RULES |= {getattr(Tensor, name).__get__: rule for name, rule in _PROPERTIES.items()}


@_rule("dim", "ndimension")
def _dim(x: Any) -> int:
    return len(_shape(x))


@_rule("size")
def _size(x: Any, dim: int | None = None) -> Any:
    return torch.Size(_shape(x)) if dim is None else _shape(x)[dim]


@_rule("__len__")
def _len(x: Any) -> int:
    return _shape(x)[0]


@_rule("numel")
def _numel(x: Any) -> int:
    return math.prod(_shape(x))
