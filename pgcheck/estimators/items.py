"""What Python sees of a tensor while a loss runs on many batches at once: `x.item()`, branches, numbers and lists.

Under `torch.func.vmap` a tensor has a value for each batch and no single one. Three ways around that, each a
`TorchFunctionMode`: `LogItems`, where what `.item()` returns only goes to a log; `Branches`, where every branch is answered in
advance; `Watch`, where the values are those that one batch has.

Guarantee: what would steer the loss in another way than these raises `ItemSteersTheLossError`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

_MOST_BRANCHES = 64  # on one path; a loop that waits for data could else wait for ever


class Logged:
    """What `.item()` returns under vmap: good for a log line, and for nothing that would steer the loss.

    No float, so that `math.sqrt`, `float` or a torch function cannot turn it into one that compares.
    """

    def _refuse(self, *_: object) -> NoReturn:
        raise ItemSteersTheLossError

    __bool__ = __float__ = __int__ = __index__ = __lt__ = __le__ = __gt__ = __ge__ = __eq__ = __ne__ = _refuse
    __hash__ = object.__hash__

    def _log(self, *_: object) -> Logged:
        return Logged()

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = _log
    __neg__ = __pos__ = __abs__ = __pow__ = __rpow__ = __round__ = _log

    def __format__(self, spec: str) -> str:
        return format(math.nan, spec)

    def __repr__(self) -> str:
        return "nan"


class ItemSteersTheLossError(RuntimeError):
    pass


class LogItems(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.item:
            return Logged()
        return func(*args, **(kwargs or {}))


class Item:
    """What `.item()` returns in the lane that goes branch by branch: a number that each batch has for itself. Comparing it is a
    branch; calculating with it gives another such number, or a tensor. It is no float, and cannot be made one."""

    def __init__(self, value: Tensor, branches: Branches) -> None:
        self.value, self.branches = value.detach(), branches

    def _refuse(self, *_: object) -> NoReturn:
        raise ItemSteersTheLossError

    __float__ = __int__ = __index__ = _refuse
    __hash__ = object.__hash__

    def __bool__(self) -> bool:
        return self.branches.decide(self.value != 0)

    def __format__(self, spec: str) -> str:
        return format(math.nan, spec)

    def __repr__(self) -> str:
        return "nan"


def _calculates(name: str) -> Callable[..., Any]:
    def method(self: Item, *others: Any) -> Any:
        found = getattr(self.value, name)(*(x.value if isinstance(x, Item) else x for x in others))
        return found if any(isinstance(x, Tensor) for x in others) else Item(found, self.branches)

    return method


def _compares(name: str) -> Callable[[Item, Any], Any]:
    def method(self: Item, other: Any) -> Any:
        found = getattr(self.value, name)(other.value if isinstance(other, Item) else other)
        return found if isinstance(other, Tensor) else self.branches.decide(found)

    return method


for _name in ("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "neg", "pos", "abs", "pow", "rpow"):
    setattr(Item, f"__{_name}__", _calculates(f"__{_name}__"))
for _name in ("lt", "le", "gt", "ge", "eq", "ne"):
    setattr(Item, f"__{_name}__", _compares(f"__{_name}__"))


class Branches(TorchFunctionMode):
    """Answers every branch as `path` says, and True after its end; `met` are the conditions that were asked for."""

    def __init__(self, path: tuple[bool, ...]) -> None:
        super().__init__()
        self.path = path
        self.met: list[Tensor] = []

    def decide(self, condition: Tensor) -> bool:
        if len(self.met) == _MOST_BRANCHES:
            raise ItemSteersTheLossError
        self.met.append(condition.detach().reshape(()) != 0)
        return self.answer(len(self.met) - 1)

    def answer(self, n: int) -> bool:
        return self.path[n] if n < len(self.path) else True

    def conditions(self) -> Tensor:
        """All of them, `[n]`."""
        return torch.stack(self.met) if self.met else torch.zeros(0, dtype=torch.bool)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.item:
            return Item(args[0], self)
        if func is Tensor.__bool__:
            return self.decide(args[0])
        args, kwargs = tree_map_only(Item, lambda x: x.value, (args, kwargs or {}))
        return func(*args, **kwargs)


_READ = (
    Tensor.item,
    Tensor.__float__,
    Tensor.__int__,
    Tensor.__bool__,
    Tensor.__index__,
    Tensor.tolist,
    Tensor.nonzero,
)
_INDEXED = (Tensor.__getitem__, Tensor.__setitem__)


class Watch(TorchFunctionMode):
    """Notes every tensor that becomes a number, a list or the mask of an index, in `seen`; with `given`, the values that a
    batch has seen, these are what it becomes."""

    def __init__(self, given: list[Tensor] | None = None) -> None:
        super().__init__()
        self.given = given
        self.seen: list[Tensor] = []

    def known(self, x: Tensor) -> Tensor:
        self.seen.append(x.detach())
        if self.given is None:
            return self.seen[-1]
        if len(self.seen) > min(len(self.given), _MOST_BRANCHES):
            raise ItemSteersTheLossError
        return self.given[len(self.seen) - 1]

    def values(self) -> Tensor:
        """All that was seen, `[n]`."""
        none = torch.zeros(0, dtype=torch.float64)
        return torch.cat([none, *(x.reshape(-1).to(torch.float64) for x in self.seen)])

    def _places(self, index: Any) -> tuple[Any, ...]:
        """Masks in an index as whole numbers."""
        out: list[Any] = []
        for i in index if isinstance(index, tuple) else (index,):
            is_mask = isinstance(i, Tensor) and i.dtype == torch.bool and i.dim() > 0
            out += self.known(i).nonzero(as_tuple=True) if is_mask else [i]
        return tuple(out)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _READ:
            args = (self.known(args[0]), *args[1:])
        elif func in _INDEXED:
            args = (args[0], self._places(args[1]), *args[2:])
        return func(*args, **(kwargs or {}))
