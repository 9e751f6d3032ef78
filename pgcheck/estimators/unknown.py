"""Tensors of log-probabilities that are not known, to find out what a loss does with them.

An `Unknown` is a tensor of forms (`pgcheck.estimators.forms`). They are indexed, stacked and summed by rules that are few
and as in NumPy; what has no rule is done by torch, to the tensor that a function of d = logp − behavior_logp is. All the
rest is refused: what is not known has no exponential, and is not compared.

Guarantee: what gets through has looked at no log-probability, only at d. A refusal is noted (`Run.refused`), so that it counts
also where the loss catches the exception. To all that gets around these rules an `Unknown` is a tensor on the device "meta",
which has no numbers to look at.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._pytree import tree_map_only

from pgcheck.estimators.forms import Form, NotLinearError


class Run:
    """One call of a loss with unknown log-probabilities."""

    def __init__(self, d: list[float]) -> None:
        self.d = d
        self.refused = False
        self.written: list[tuple[Tensor, Tensor]] = []  # numbers that unknown ones were added to, and what they were

    @cached_property
    def leaf(self) -> Tensor:
        """d `[n]`, of which functions that torch evaluates have their derivatives."""
        return torch.tensor(self.d, dtype=torch.float64, requires_grad=True)

    def coefficients(self, loss: Tensor) -> Tensor:
        """−∂loss/∂logp `[n]`.

        Raises:
            NotLinearError: something was refused, the loss is of another run, or c is not finite.
        """
        if self.refused or (isinstance(loss, Unknown) and loss.run is not self):
            raise NotLinearError
        if isinstance(loss, Unknown):
            terms = loss.forms.terms
            c = [-terms.get(k, 0.0) for k in range(len(self.d))]
        elif loss.requires_grad:
            c = (-torch.autograd.grad(loss, self.leaf)[0]).tolist()
        else:
            c = [0.0 * float(loss)] * len(self.d)  # a constant; NaN where that is
        if not all(map(math.isfinite, c)):
            raise NotLinearError
        return torch.tensor(c, dtype=torch.float64)

    def end(self) -> None:
        """What was added to is again what it was: it may live longer than the call."""
        for x, value in self.written:
            x.__class__ = Tensor
            vars(x).clear()
            x.copy_(value)


class Unknown(Tensor):
    """See the module."""

    run: Run
    forms: Any  # a Form, or an array of them
    tracked: bool  # whether torch would say that it requires a gradient
    shared = False  # whether it is, or has, a view: then nothing is written to it

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _ask(func, args, kwargs or {})


Forms = NDArray[np.object_]


class Unknowns(Mapping[str, Tensor]):
    """`logp` and `behavior_logp` `[B, T]` of one run, each made when it is read."""

    def __init__(self, run: Run, shape: torch.Size) -> None:
        self._run, self._shape = run, shape

    def __getitem__(self, name: str) -> Unknown:
        n, first = len(self._run.d), ("logp", "behavior_logp").index(name)
        forms = np.empty(n, dtype=object)
        forms[:] = [Form(self._run.d, 0.0, terms, False) for terms in _leaf(first * n, n)]
        new = _new(self._run, forms.reshape(self._shape), first == 0)
        new.shared = True
        return new

    def __iter__(self) -> Iterator[str]:
        return iter(("logp", "behavior_logp"))

    def __contains__(self, name: object) -> bool:
        return name == "logp" or name == "behavior_logp"

    def __len__(self) -> int:
        return 2


@functools.lru_cache(32)
def _leaf(first: int, n: int) -> list[dict[int, float]]:
    return [{first + k: 1.0} for k in range(n)]


def _new(run: Run, forms: Any, tracked: bool) -> Unknown:
    new: Unknown = _made(Unknown, _NOWHERE)
    new.run, new.forms, new.tracked = run, forms, tracked
    return new


def _ask(func: Any, args: Any, kwargs: Any) -> Any:
    """By its rule if that has an answer; else of the tensors that are known."""
    try:
        if not torch.is_grad_enabled() or "out" in kwargs:  # perhaps the forward of an autograd.Function
            raise NotLinearError
        if (rule := _RULES.get(func)) is not None:
            try:
                return rule(*args, **kwargs)
            except Exception:
                if func not in _FUNCTIONS:
                    raise
        known = _value if func in _LOOKS else _as_tensor if func in _FUNCTIONS else _refuse
        args, kwargs = tree_map_only(Unknown, known, (args, kwargs))
        return func(*args, **kwargs)
    except Exception:
        tree_map_only(Unknown, _note, (args, kwargs))
        raise


def _note(x: Unknown) -> None:
    x.run.refused = True


def _refuse(x: Unknown) -> Tensor:
    raise NotLinearError


def _value(x: Unknown) -> Tensor:
    """The value of a function of d, without a gradient."""
    if isinstance(x.forms, Form):
        return torch.tensor(x.forms.of_d().number, dtype=torch.float64)
    return torch.tensor([form.of_d().number for form in x.forms.flat], dtype=torch.float64).view(x.forms.shape)


def _as_tensor(x: Unknown) -> Tensor:
    """The tensor that a function of d is."""
    value = _value(x)
    if not x.tracked:
        return value
    leaf = x.run.leaf
    forms = [form.of_d() for form in np.ravel(x.forms)]
    rows = torch.tensor([[form.terms.get(k, 0.0) for k in range(len(leaf))] for form in forms], dtype=torch.float64)
    return value + (rows @ (leaf - leaf.detach())).view(value.shape)


# -- numbers and forms side by side

_WHOLE_NUMBERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def _constant(x: Any, beside: Unknown) -> Any:
    """A number, or an array of them."""
    if type(x) is float:
        return x
    if isinstance(x, (float, int, np.number)):
        return float(x)
    if not isinstance(x, Tensor) or isinstance(x, Unknown) or x.requires_grad:
        raise NotLinearError
    if x.dtype is torch.float64:
        return x.numpy().astype(object) if x.dim() else float(x)
    if x.dtype not in _WHOLE_NUMBERS and (not x.is_floating_point() or (x.dim() > 0) > (_dims(beside) > 0)):
        raise NotLinearError  # beside numbers, torch calculates in the precision of an array
    return x.numpy().astype(np.float64).astype(object) if x.dim() else float(x)


def _each(fn: Callable[..., Form], *xs: Any) -> Any:
    """`fn` of forms and numbers; for each entry of arrays."""
    for x in xs:
        if type(x) is np.ndarray:
            return _for_each(fn, len(xs))(*xs)
    return fn(*xs)


@functools.lru_cache(32)
def _for_each(fn: Callable[..., Form], number: int) -> Callable[..., Any]:
    return np.frompyfunc(fn, number, 1)


def _with(fn: Callable[[Form, Any], Form], a: Any, b: Any) -> Unknown:
    """`fn` of the unknown one and the other, which may be known."""
    if not isinstance(a, Unknown):
        a, b = b, a
    if isinstance(b, Unknown):
        if a.run is not b.run:
            raise NotLinearError
        x, y, tracked = a.forms, b.forms, a.tracked or b.tracked
    else:
        x, y, tracked = a.forms, b if type(b) is float else _constant(b, a), a.tracked
    if type(x) is Form and type(y) is not np.ndarray:
        return _new(a.run, fn(x, y), tracked)
    return _new(a.run, _each(fn, x, y), tracked)


def _dims(x: Unknown) -> int:
    return x.forms.ndim if type(x.forms) is np.ndarray else 0


def _beside(several: Sequence[Any]) -> tuple[Run, list[Any], bool]:
    """The run of those that are unknown; the forms of all, those of constants look at nothing; and whether one is tracked."""
    unknown = [x for x in several if isinstance(x, Unknown)]
    least = min(unknown, key=_dims)
    if any(x.run is not least.run for x in unknown):
        raise NotLinearError
    constant = np.frompyfunc(lambda number: Form(least.run.d, number, {}, True), 1, 1)
    forms = [x.forms if isinstance(x, Unknown) else constant(_constant(x, least)) for x in several]
    return least.run, forms, any(x.tracked for x in unknown)


_made = Tensor._make_subclass
_NOWHERE = torch.empty((), dtype=torch.float64, device="meta")
_RULES: dict[Any, Callable[..., Any]] = {}


def _rule(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """For the methods of a tensor and the functions of `torch` with these names."""

    def register(rule: Callable[..., Any]) -> Callable[..., Any]:
        for name in names:
            for owner in (Tensor, torch):
                if hasattr(owner, name):
                    _RULES[getattr(owner, name)] = rule
            if hasattr(Tensor, name):
                setattr(Unknown, name, _method(getattr(Tensor, name), rule))
        return rule

    return register


def _method(func: Any, rule: Callable[..., Any]) -> Callable[..., Any]:
    """Asked directly: the way by `__torch_function__` takes as long again as the rule."""

    def method(*args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            try:
                return rule(*args, **kwargs)
            except Exception:
                pass
        return _ask(func, args, kwargs)

    return method


# -- sums and products


@_rule("add", "__add__", "__radd__")
def _add(a: Any, b: Any) -> Unknown:
    return _with(Form.plus, a, b)


@_rule("sub", "__sub__", "subtract")
def _subtract(a: Any, b: Any) -> Unknown:
    return _with(Form.minus, a, b) if isinstance(a, Unknown) else _add(_minus(b), a)


@_rule("__rsub__", "rsub")
def _subtract_from(a: Any, b: Any) -> Unknown:
    return _subtract(b, a)


@_rule("mul", "__mul__", "__rmul__", "multiply")
def _times(a: Any, b: Any) -> Unknown:
    if isinstance(a, Unknown) and isinstance(b, Unknown) and a.tracked != b.tracked:
        weight = _value(a if b.tracked else b)  # which has no gradient; what it is a weight of need not be known
        return _times(b if b.tracked else a, weight)
    return _with(Form.times, a, b)


@_rule("div", "__truediv__", "divide", "true_divide")
def _over(a: Any, b: Any) -> Unknown:
    if not isinstance(a, Unknown):
        raise NotLinearError
    return _new(a.run, _each(Form.over, a.forms, _constant(b, a)), a.tracked)


@_rule("neg", "__neg__", "negative")
def _minus(x: Unknown) -> Unknown:
    return _times(x, -1.0)


@_rule("__iadd__", "add_")
def _add_to(total: Any, x: Any) -> Any:
    return _becomes(total, _add(total, x))


@_rule("__isub__", "sub_")
def _subtract_off(total: Any, x: Any) -> Any:
    return _becomes(total, _subtract(total, x))


def _becomes(total: Any, new: Unknown) -> Any:
    """For everybody who holds that number; who looks at its memory sees NaN."""
    if _shape(total) or _shape(new):
        raise NotLinearError
    if not isinstance(total, Unknown):
        if total.dtype != torch.float64 or total._is_view():
            raise NotLinearError
        new.run.written.append((total, total.clone()))
        total.fill_(math.nan)
        total.__class__ = Unknown
    elif total.shared:
        raise NotLinearError
    total.run, total.forms, total.tracked = new.run, new.forms, new.tracked
    return total


def _reduced(x: Any, dim: Any, keepdim: bool) -> tuple[Unknown, int]:
    n = _dims(x)
    if dim is None and n and x.forms.size and not keepdim:
        return _new(x.run, Form.total(list(x.forms.flat)), x.tracked), x.forms.size
    dims = range(n) if dim is None else dim if isinstance(dim, (tuple, list)) else (dim,)
    axes = tuple(d + n if d < 0 else d for d in dims)
    if n == 0 and not axes:
        return _new(x.run, x.forms, x.tracked), 1
    number = math.prod(x.forms.shape[a] for a in axes)
    if not axes or number == 0:
        raise NotLinearError
    return _new(x.run, x.forms.sum(axes, keepdims=keepdim), x.tracked), number


@_rule("sum")
def _sum(x: Any, dim: Any = None, keepdim: bool = False) -> Unknown:
    return _reduced(x, dim, keepdim)[0]


@_rule("mean")
def _mean(x: Any, dim: Any = None, keepdim: bool = False) -> Unknown:
    total, n = _reduced(x, dim, keepdim)
    return _over(total, n)


@_rule("dot", "inner", "matmul", "__matmul__", "__rmatmul__")
def _dot(a: Any, b: Any) -> Unknown:
    if len(_shape(a)) != 1 or _shape(a) != _shape(b) or not a.dtype == b.dtype == torch.float64:
        raise NotLinearError
    return _sum(_times(a, b))


# -- functions of d


@_rule("detach")
def _detach(x: Unknown) -> Unknown:
    return _view(_each(Form.detached, x.forms), x, tracked=False)


@_rule("exp")
def _exponential(x: Unknown) -> Unknown:
    return _new(x.run, _each(Form.exp, x.forms), x.tracked)


@_rule("clamp", "clip")
def _clamp(x: Unknown, min: Any = None, max: Any = None) -> Unknown:
    low, high = (-math.inf if min is None else min), (math.inf if max is None else max)
    if not isinstance(low, (float, int)) or not isinstance(high, (float, int)) or not low <= high:
        raise NotLinearError
    return _new(x.run, _each(Form.clamped, x.forms, float(low), float(high)), x.tracked)


@_rule("min", "minimum")
def _min(a: Any, b: Any) -> Unknown:
    return _with(Form.smaller, _tensor(a), _tensor(b))


@_rule("max", "maximum")
def _max(a: Any, b: Any) -> Unknown:
    return _with(Form.larger, _tensor(a), _tensor(b))


def _tensor(x: Any) -> Tensor:
    if not isinstance(x, Tensor):
        raise NotLinearError
    return x


def _of_torch(names: str) -> set[Any]:
    return {getattr(owner, name) for name in names.split() for owner in (Tensor, torch) if hasattr(owner, name)}


# what only looks at the values of a tensor
_LOOKS = _of_torch(
    "item tolist __float__ __int__ __bool__ __format__ isnan isfinite isinf sign argmax argmin"
    " lt le gt ge eq ne __lt__ __le__ __gt__ __ge__ __eq__ __ne__"
)
# what makes a new tensor, and touches nothing else
_FUNCTIONS = _LOOKS | _of_torch(
    "exp exp2 expm1 log log1p log2 sqrt rsqrt square pow __pow__ __rpow__ reciprocal abs __abs__ sigmoid tanh relu"
    " clamp clip clamp_min clamp_max min max minimum maximum amin amax where add __add__ __radd__ sub __sub__ __rsub__"
    " mul __mul__ __rmul__ div __truediv__ __rtruediv__ neg __neg__ sum mean prod cumsum cumprod logsumexp softmax"
    " log_softmax std var dot matmul __matmul__ __rmatmul__ stack cat"
)


# -- places and shapes


def _view(forms: Any, x: Unknown, *, tracked: bool | None = None) -> Unknown:
    if type(forms) is np.ndarray and forms.ndim == 0:
        forms = forms[()]
    new = _new(x.run, forms, x.tracked if tracked is None else tracked)
    new.shared = x.shared = True
    return new


@_rule("__getitem__")
def _at(x: Unknown, index: Any) -> Unknown:
    places = index if type(index) is tuple else (index,)
    if not _WHOLE.issuperset(map(type, places)):
        places = _places(places)
    if not places:
        return _view(x.forms, x)
    return _view(x.forms[places], x)  # where they are too many, a number has none, and NumPy says no


_WHOLE = {int}


def _places(several: Sequence[Any]) -> tuple[Any, ...]:
    places = tuple(map(_place, several))
    if any(type(i) is np.ndarray for i in places) and any(isinstance(i, slice) for i in places):
        raise NotLinearError  # which NumPy puts in another order
    return places


def _place(i: Any) -> Any:
    """For NumPy: a whole number, a slice or an array of whole numbers or of truths."""
    if isinstance(i, Tensor) and not isinstance(i, Unknown) and i.dtype in (torch.int64, torch.bool):
        return i.numpy() if i.dim() else _place(i.item())
    if isinstance(i, list) and all(type(k) is int for k in i):
        return np.array(i, dtype=np.int64)
    if type(i) is int or isinstance(i, np.integer) or (isinstance(i, slice) and (i.step is None or i.step > 0)):
        return i
    raise NotLinearError


@_rule("where")
def _where(condition: Any, a: Any, b: Any) -> Unknown:
    if not isinstance(condition, Tensor) or isinstance(condition, Unknown) or condition.dtype != torch.bool:
        raise NotLinearError
    run, (x, y), tracked = _beside([a, b])
    return _new(run, _each(_chosen, condition.numpy(), x, y), tracked)


def _chosen(holds: bool, x: Form, y: Form) -> Form:
    return x if holds else y


@_rule("masked_fill")
def _filled(x: Any, mask: Any, value: Any) -> Unknown:
    filled = _where(mask, value, x)
    if _shape(filled) != _shape(x):
        raise NotLinearError
    return filled


def _joined(fn: Callable[..., Any], several: Sequence[Any], dim: int) -> Unknown:
    run, forms, tracked = _beside([_tensor(x) for x in several])
    return _new(run, fn([_array(x) for x in forms], dim), tracked)


def _array(forms: Any) -> Forms:
    array = np.empty(np.shape(forms), dtype=object)
    array[()] = forms
    return array


@_rule("stack")
def _stack(several: Sequence[Any], dim: int = 0) -> Unknown:
    return _joined(np.stack, several, dim)


@_rule("cat", "concat")
def _cat(several: Sequence[Any], dim: int = 0) -> Unknown:
    return _joined(np.concatenate, several, dim)


@_rule("unbind")
def _unbind(x: Any, dim: int = 0) -> tuple[Unknown, ...]:
    if dim != 0 or _dims(x) == 0:
        raise NotLinearError
    return tuple(_view(forms, x) for forms in x.forms)


@_rule("__iter__")
def _iter(x: Any) -> Iterator[Unknown]:
    return iter(_unbind(x))


@_rule("reshape", "view")
def _reshape(x: Any, *shape: Any) -> Unknown:
    sizes = shape[0] if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else shape
    return _view(_array(x.forms).reshape(sizes), x)


@_rule("flatten", "ravel")
def _flat(x: Any) -> Unknown:
    return _reshape(x, -1)


@_rule("unsqueeze")
def _unsqueeze(x: Any, dim: int) -> Unknown:
    return _view(np.expand_dims(x.forms, dim), x)


@_rule("clone")
def _clone(x: Any) -> Unknown:
    return _new(x.run, x.forms, x.tracked)


@_rule("double", "contiguous")
def _itself(x: Any) -> Unknown:
    return x


# -- what is known of it


def _shape(x: Any) -> tuple[int, ...]:
    return np.shape(x.forms) if isinstance(x, Unknown) else tuple(x.shape)


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


_PROPERTIES: dict[str, Callable[[Any], Any]] = {
    "shape": lambda x: torch.Size(_shape(x)),
    "ndim": _dims,
    "dtype": lambda x: torch.float64,
    "device": lambda x: torch.device("cpu"),
    "requires_grad": lambda x: x.tracked,
}
for _name, _property in _PROPERTIES.items():
    setattr(Unknown, _name, property(_property))


def _like(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A new tensor of known numbers, which asks of another for no more than its shape and precision."""
    return lambda x, *args, **kwargs: fn(torch.zeros(_shape(x), dtype=torch.float64), *args, **kwargs)


for _name in ("new_zeros", "new_ones", "new_full"):
    _rule(_name)(_like(getattr(Tensor, _name)))
for _name in ("zeros_like", "ones_like", "full_like"):
    _rule(_name)(_like(getattr(torch, _name)))
