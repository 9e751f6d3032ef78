"""Losses as estimators: c = −∂loss/∂leaf, for all batches at once where the loss allows it.

A loss is any callable `Batch [B, T] -> scalar` (a tuple counts as its first element, as in `loss, metrics`). Three
lanes, tried in this order, with the same numbers:

* `vmap`: `torch.func.vmap` over the M batches, one backward pass for all;
* `vmap, logged items`: the same for losses that only fail because they log `x.item()`. Such a call returns a NaN that
  refuses to be compared: if it only reaches a log, nothing is lost; if it reaches the loss, the lane is abandoned;
* `vmap, by branch`: for losses that `x.item()` or a branch on data steers. Every branch gets its answer in advance, and the
  batches for which it is another one are evaluated again with that: once for each path that some batch takes;
* `loop`: batch by batch, slower. Of a large block some batches are watched: which numbers they turn into Python's
  (`float(x)`, `x.tolist()`, `x[mask]`). Where several see the same numbers, all batches that see them go together.

Guarantee: a vectorised lane is used only after it reproduced the loop on the first batches of the block, and a path through
its branches, or with the same numbers, only after it did so on a batch that takes it.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pgcheck.batch import Batch, LogitsNotAsked
from pgcheck.errors import EstimatorError, PgcheckError, in_words
from pgcheck.estimators.base import Claim, Couples, Estimator, Leaf, unbiased
from pgcheck.estimators.items import Branches, ItemSteersTheLossError, LogItems, Watch
from pgcheck.estimators.memory import Memory

Loss = Callable[[Batch], Any]
# Batch [B, T] -> a scalar to minimise, or a tuple that starts with one

_VERIFIED_BATCHES = 4
_BY_BRANCH = "vmap, by branch"
_LANES = ("vmap", "vmap, logged items", _BY_BRANCH, "loop")
_WATCHED = 16  # batches at once
_MANY = 512  # of which it pays to watch some


class LossCoefficients:
    """c = −∂loss/∂leaf of a loss; `lane` says how the last block was evaluated."""

    def __init__(self, loss: Loss, *, leaf: Leaf, name: str) -> None:
        self.loss, self.leaf, self.name = loss, leaf, name
        self.lane: str | None = None
        self._own_labels = False  # whether vmap gets labels for every batch, though they are all the same
        self._paths: set[tuple[torch.Size, tuple[bool, ...]]] = set()  # on which the lane by branch was compared
        self._together = True  # whether batches that see the same numbers can go together
        self._memory: Memory | None = None

    def __call__(self, batch: Batch) -> Tensor:
        leading = batch.reward.shape[:-2]
        flat = batch.map(lambda x: x.flatten(0, len(leading) - 1)) if len(leading) > 1 else batch
        if not leading:
            flat = batch.map(lambda x: x.unsqueeze(0))
            return self._loop(flat)[0]
        c = self._block(flat)
        return c.unflatten(0, leading) if len(leading) > 1 else c

    def value(self, batch: Batch) -> Tensor:
        """The loss of one batch `[B, T]`, a scalar tensor.

        Raises:
            EstimatorError: not a scalar tensor.
        """
        out = self.loss(batch)
        if isinstance(out, tuple) and out:
            out = out[0]
        if not isinstance(out, Tensor):
            what, mend = type(out).__name__, "leave out .item(), float() and the like."
            if out is None:
                what, mend = "None", "is its `return` missing?"
            elif callable(out):
                mend = f"if {self.name} makes losses, give what it returns: {self.name}(…)."
            raise EstimatorError(f"loss '{self.name}' returned {what}, not a torch tensor; {mend}")
        if out.dim() != 0:
            raise EstimatorError(
                f"loss '{self.name}' returned a tensor of shape {list(out.shape)}, not a scalar; end it with a sum or a"
                " mean over rows and positions."
            )
        return out

    def remember(self) -> None:
        """From now on the loss is not asked twice where it cannot answer otherwise (`pgcheck.estimators.memory`). To be called
        when it was found to be a function of its batch."""
        if self._memory is None and self.leaf == "logp":
            self._memory = Memory(self.value, self._loop)

    @contextlib.contextmanager
    def asked_anew(self) -> Iterator[None]:
        """In here every batch is evaluated, whatever is remembered."""
        memory, self._memory = self._memory, None
        try:
            yield
        finally:
            self._memory = memory

    def _block(self, batch: Batch) -> Tensor:
        if self.lane is None:
            self.lane = self._choose(batch)
        if self.lane == "loop":
            return self._loop_together(batch)
        try:
            return self._vmap(batch, self.lane)
        except EstimatorError:
            raise
        except Exception:  # a branch on data not met in earlier blocks
            self.lane = "loop"
            return self._loop(batch)

    def _choose(self, batch: Batch) -> str:
        first = batch.map(lambda x: x[:_VERIFIED_BATCHES])
        try:
            slow = self._loop(first)
        except EstimatorError:  # no gradient on the first few: a constant on degenerate batches, or nowhere
            self._loop(batch)
            return "loop"
        for self._own_labels, lane in itertools.product((False, True), _LANES[:-1]):
            try:
                fast = self._vmap(first, lane)
            except Exception:  # whatever vmap cannot do, the loop can; its own errors were raised above
                continue
            if torch.allclose(fast, slow, rtol=1e-10, atol=1e-14, equal_nan=lane == "vmap"):
                return lane
        return "loop"

    def _leaf_and_batch(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        named = batch.tensors()
        key = "logp" if self.leaf == "logp" else "action_logits"
        leaf = named[key].detach().clone().requires_grad_(True)
        return leaf, {**named, key: leaf}

    def _value_of(self, one: Batch) -> Tensor:
        if self.leaf == "logits":
            every = torch.log_softmax(one.logits, -1)
            logp = every.gather(-1, one.action.clamp(min=0).unsqueeze(-1)).squeeze(-1) * one.mask
            one = replace(one, logp=logp)
        return self.value(one)

    def _vmap(self, batch: Batch, lane: str) -> Tensor:
        if lane == _BY_BRANCH:
            return self._by_branch(batch)
        leaf, run = self._vectorised(batch, self._value_of)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if lane == "vmap":
                losses = run()
            else:
                with LogItems():
                    losses = run()
            c = self._gradient(losses, leaf)
        if lane != "vmap" and not bool(torch.isfinite(c).all()):
            raise ItemSteersTheLossError
        return c

    def _by_branch(self, batch: Batch) -> Tensor:
        """One run for each path that some batch takes."""
        M = batch.reward.shape[0]
        out: Tensor | None = None
        runs = 0
        todo: list[tuple[tuple[bool, ...], Tensor]] = [((), torch.arange(M))]
        while todo:
            path, members = todo.pop()
            runs += 1
            if runs > max(16, M // 8):
                raise ItemSteersTheLossError  # nearly every batch goes its own way
            some = batch.map(lambda x, rows=members: x[rows])  # type: ignore[misc]
            c, met = self._on_path(some, path)
            said = torch.tensor([*path, *[True] * (met.shape[1] - len(path))], dtype=torch.bool)
            wrong = met != said
            right = ~wrong.any(-1)
            if bool(right.any()):
                self._verify_path(some.map(lambda x, rows=right: x[rows][:1]), c[right][:1], tuple(said.tolist()))  # type: ignore[misc]
                out = torch.zeros(M, *c.shape[1:], dtype=c.dtype) if out is None else out
                out[members[right]] = c[right]
            first = wrong.int().argmax(-1) if bool(wrong.any()) else torch.zeros(len(wrong), dtype=torch.int64)
            for k in first[~right].unique().tolist():
                other = (*said[:k].tolist(), not bool(said[k]))
                todo.append((other, members[~right & (first == k)]))
        if out is None:
            raise ItemSteersTheLossError
        return out

    def _on_path(self, batch: Batch, path: tuple[bool, ...]) -> tuple[Tensor, Tensor]:
        """c of every batch, as if it went that way, and the conditions that it met there, `[M, n]`."""
        branches = Branches(path)

        def one(alone: Batch) -> tuple[Tensor, Tensor]:
            branches.met.clear()
            return self._value_of(alone), branches.conditions()

        leaf, run = self._vectorised(batch, one)
        try:
            with warnings.catch_warnings(), branches:
                warnings.simplefilter("ignore")
                losses, met = run()
        except EstimatorError as error:  # perhaps on a path that no batch takes: the loop will say
            raise ItemSteersTheLossError from error
        return self._gradient(losses, leaf) if losses.requires_grad else torch.zeros_like(leaf), met

    def _verify_path(self, one: Batch, found: Tensor, path: tuple[bool, ...]) -> None:
        key = (one.reward.shape[1:], path)
        if key in self._paths:
            return
        lane, self.lane = self.lane, "loop"  # where a constant has the gradient 0
        try:
            expected = self._loop(one)
        finally:
            self.lane = lane
        if not torch.allclose(found, expected, rtol=1e-10, atol=1e-14, equal_nan=True):
            raise ItemSteersTheLossError
        self._paths.add(key)

    def _vectorised(self, batch: Batch, fn: Callable[[Batch], Any]) -> tuple[Tensor, Callable[[], Any]]:
        """The leaf, and what `fn` says of every batch."""
        leaf, named = self._leaf_and_batch(batch)
        dims: dict[str, int | None] = dict.fromkeys(named, 0)
        same = bool((batch.group == batch.group[:1]).all())
        if same and not self._own_labels:  # a loss may loop over labels that are those of every batch
            named["group"], dims["group"] = batch.group[0], None
        run = torch.func.vmap(lambda x: fn(batch.with_tensors(x)), in_dims=(dims,), randomness="error")
        return leaf, lambda: run(named)

    def _loop_together(self, batch: Batch) -> Tensor:
        """As `_loop`, faster where the loss is linear, or many batches see the same numbers."""
        if self._memory is not None:
            out = torch.zeros_like(batch.logp)
            left = self._memory.recall(batch, out)
            if len(left) < len(out):
                if len(left):
                    out[left] = self._some_together(batch.map(lambda x: x[left]))
                return out
        return self._some_together(batch)

    def _some_together(self, batch: Batch) -> Tensor:
        M = batch.reward.shape[0]
        if self._together and M >= _MANY:
            out = torch.zeros_like(batch.logp if self.leaf == "logp" else batch.logits)
            try:
                left = self._same_numbers(batch, out)
            except Exception:  # the loop says what is wrong with the loss, if anything
                self._together = False
            else:
                if len(left):
                    out[left] = self._loop(batch.map(lambda x: x[left]))
                return out
        return self._loop(batch)

    def _same_numbers(self, batch: Batch, out: Tensor) -> Tensor:
        """Fills `out` for some batches; those that are left."""
        left = torch.arange(len(out))
        while len(left) > _WATCHED:
            picked = torch.linspace(0, len(left) - 1, _WATCHED).round().long()
            watched: dict[tuple[Any, ...], list[tuple[int, Watch]]] = {}
            for m in left[picked].tolist():
                with Watch() as watch:
                    out[m] = self._loop(batch.map(lambda x, m=m: x[m : m + 1]))[0]  # type: ignore[misc]
                key = (*(x.shape for x in watch.seen), *watch.values().tolist())
                watched.setdefault(key, []).append((m, watch))
            rest = torch.ones(len(left), dtype=torch.bool)
            rest[picked] = False
            left = left[rest]
            common = [several[0] for several in watched.values() if len(several) > 1]
            if not common:
                break
            for m, watch in common:
                members = torch.cat([torch.tensor([m]), left])
                c, right = self._with_numbers(batch.map(lambda x, rows=members: x[rows]), watch)  # type: ignore[misc]
                if not (bool(right[0]) and torch.allclose(c[0], out[m], rtol=1e-10, atol=1e-14, equal_nan=True)):
                    raise ItemSteersTheLossError
                out[members[right]] = c[right]
                left = left[~right[1:]]
        return left

    def _with_numbers(self, batch: Batch, watched: Watch) -> tuple[Tensor, Tensor]:
        """c of every batch as if it saw the numbers that one has seen; and which do, `[M]`."""
        watch = Watch(watched.seen)

        def one(alone: Batch) -> tuple[Tensor, Tensor]:
            watch.seen.clear()
            return self._value_of(alone), watch.values()

        leaf, run = self._vectorised(batch, one)
        with warnings.catch_warnings(), watch:
            warnings.simplefilter("ignore")
            losses, values = run()
        c = self._gradient(losses, leaf)
        return c, (values == watched.values()).all(-1)

    def _loop(self, batch: Batch) -> Tensor:
        key = "logp" if self.leaf == "logp" else "action_logits"
        leaf = getattr(batch, key).detach().clone().requires_grad_(True)
        losses = []
        for one in batch.one_by_one(**{key: leaf}):
            try:
                losses.append(self._value_of(one))
            except (PgcheckError, LogitsNotAsked):
                raise
            except Exception as error:
                where = f"{self._line_of(error)} on a batch [B, T] = {list(batch.reward.shape[1:])}"
                raise EstimatorError(f"loss '{self.name}' raises{where}: {in_words(error)}") from error
        return self._gradient(torch.stack(losses), leaf)

    def _line_of(self, error: Exception) -> str:
        """Where in the loss's own file it was raised, if that can be known."""
        own = getattr(getattr(self.loss, "__code__", None), "co_filename", None)
        lines = [line for frame, line in traceback.walk_tb(error.__traceback__) if frame.f_code.co_filename == own]
        return f" at {Path(own).name}:{lines[-1]}," if own and lines else ""

    def _gradient(self, losses: Tensor, leaf: Tensor) -> Tensor:
        if not losses.requires_grad and self.lane == "loop":
            return torch.zeros_like(leaf)  # a constant on these batches; elsewhere it had a gradient
        if not losses.requires_grad:
            raise self._no_gradient()
        try:
            (gradient,) = torch.autograd.grad(losses.sum(), leaf, allow_unused=True)
        except RuntimeError as error:
            why = str(error).splitlines()[0]
            if "inplace" in why:
                why = "it changes its inputs in place (x -= m); write out of place (x = x - m)."
            raise EstimatorError(f"loss '{self.name}' cannot be differentiated: {why}") from error
        if gradient is None:
            raise self._no_gradient()
        return -gradient.detach()

    def _no_gradient(self) -> EstimatorError:
        return EstimatorError(
            f"loss '{self.name}' has no gradient: it does not depend on batch.{self.leaf}. Use batch.{self.leaf} where the"
            " policy's log-probabilities enter, without .detach() and outside torch.no_grad()."
        )


def from_loss(
    loss: Loss,
    *,
    leaf: Leaf = "logp",
    couples: Couples = "batch",
    name: str | None = None,
    claims: tuple[Claim, ...] | None = None,
    **settings: Any,
) -> Estimator:
    """An estimator from a torch loss over one batch `[B, T]`, to be minimised.

    Args:
        loss: `Batch -> scalar`, or a tuple that starts with the scalar.
        leaf: `"logp"`: c = −∂loss/∂logp `[B, T]`. `"logits"`: −∂loss/∂logits `[B, T, A]`, for terms that put weight on
            actions not drawn (entropy, full KL); `batch.logp` is then computed from `batch.logits`.
        couples: what a row's coefficient may look at; `"batch"` is always safe, the others are cheaper to enumerate.
        name: default, the function's own.
        claims: default, `unbiased()`.

    Raises:
        EstimatorError: it cannot be called as `loss(batch)`; (when run) no gradient, not a scalar, NaN.
    """
    called = name or str(getattr(loss, "__name__", type(loss).__name__))
    _refuse_other_arguments(loss, called)
    return Estimator(
        name=called,
        coefficients=LossCoefficients(loss, leaf=leaf, name=called),
        couples=couples,
        claims=(unbiased(),) if claims is None else claims,
        leaf=leaf,
        **settings,
    )


def is_looped(estimator: Estimator) -> bool:
    """Whether it is a loss that only runs batch by batch, as far as is known."""
    return isinstance(estimator.coefficients, LossCoefficients) and estimator.coefficients.lane == "loop"


def _refuse_other_arguments(loss: Loss, called: str) -> None:
    if isinstance(loss, type):
        raise EstimatorError(f"loss '{called}' is a class; give an instance of it, {called}(…), or a function.")
    try:
        signature = inspect.signature(loss)
    except (TypeError, ValueError):  # of what is written in C, nothing is known
        return
    try:
        signature.bind(None)
    except TypeError as error:
        raise EstimatorError(
            f"loss '{called}' cannot be called as {called}(batch): {error}. A loss gets one argument, and takes from it what it"
            f" needs: lambda batch: {called}(batch.logp, …)."
        ) from None
