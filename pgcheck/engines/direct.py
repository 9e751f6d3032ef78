"""The direct lane: a whole training step, run on every batch, its gradient read off `.grad`.

    step(model, rollouts)   leaves .grad;   a step minimises, so  ĝ_θ = −.grad      E ĝ_θ = Σ_batches p(batch) · (−.grad)

Nothing is assumed of how the gradient comes about: masks, shifts, gathers, micro-batches and gradient accumulation are inside
what is run. That costs one step for each batch, where the exact engine evaluates thousands at once; so problems are small
and the number of batches is known, and refused if too large, before the first. A step of a language model gets `Rollouts`,
one of any other policy the `Batch` `[B, T]`.

Guarantee: the model that a step gets is a copy in float64, with no `.grad`, the same before every call; a step that changes
its parameters, keeps state, draws random numbers that matter, or notices the order of rows is found out by trying: the first
three are named, the last gets every ordered tuple of rollouts instead of every multiset.
"""

from __future__ import annotations

import copy
import math
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pgcheck.batch import Batch
from pgcheck.engines.coefficients import table_of
from pgcheck.engines.declarations import row_orders
from pgcheck.engines.enumeration import Batches
from pgcheck.engines.exact import compensated_add, nearest_plan
from pgcheck.engines.moments import Progress
from pgcheck.engines.purity import Impurity
from pgcheck.engines.threads import one_thread
from pgcheck.errors import BudgetError, EstimatorError, NotFiniteError, PgcheckError, UsageError, in_words
from pgcheck.policies import LMPolicy, ModulePolicy
from pgcheck.problem import Problem
from pgcheck.rollouts import Padding, Rollouts, rollouts, token_table
from pgcheck.seeding import fixed_random_state, random_state_kept, set_global_random_state
from pgcheck.trajectories import is_count

Zeroing = Literal["replaces", "adds", "some", "neither"]
# What becomes of a .grad that is there already: it is zeroed, or added to; "neither" is a clip, or another function of it

Step = Callable[[nn.Module, Any], Any]
# (model, Rollouts or Batch) -> whatever; leaves .grad on the parameters of the model, of a loss to be minimised

DEFAULT_BUDGET = 20_000  # batches
PROBES = 12  # random batches on which the order of rows is tried
_BLOCK = 256  # batches between two looks at the clock


@dataclass(frozen=True, eq=False)
class TrainingStep:
    """A step and how its rollouts are laid out."""

    run: Step
    name: str
    padding: Padding = "right"
    pad_token_id: int = 0


@dataclass(frozen=True)
class DirectMoments:
    """E ĝ_θ and E ‖ĝ_θ‖² of one batch, over the parameters that take a gradient."""

    mean: Tensor  # [P]
    second_moment: float
    enumerated: int
    ordered: bool  # every order of rows was tried, because the gradient depends on it
    seconds: float
    zeroing: Zeroing
    norms: Tensor = field(repr=False)  # [n], ‖ĝ_θ‖ of every batch

    @property
    def total_variance(self) -> float:
        """tr Cov ĝ_θ."""
        return max(self.second_moment - float((self.mean**2).sum()), 0.0)


@dataclass(frozen=True, eq=False)
class StepRunner:
    """A step bound to a problem: `runner(index)` is ĝ_θ `[P]` of the batch of rollouts `index` `[B]`."""

    step: TrainingStep
    problem: Problem

    @cached_property
    def model(self) -> nn.Module:
        """What the step gets: the language model, or the module over contexts, as it was given; a table of logits is called
        with nothing."""
        policy = copy.deepcopy(self.problem.policy)
        inner = policy.model if isinstance(policy, LMPolicy) else policy
        return inner.module if isinstance(inner, ModulePolicy) else inner

    @cached_property
    def parameters(self) -> dict[str, nn.Parameter]:
        """θ by name: the parameters that take a gradient."""
        found = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        if not found:
            raise UsageError("model: none of its parameters takes a gradient.")
        return found

    @cached_property
    def _taken(self) -> Tensor:
        """Which entries of `policy.parameters()` those are."""
        every = self.problem.policy.parameters()
        return torch.cat([torch.full((p.numel(),), p.requires_grad) for p in every])

    def trained(self, x: Tensor) -> Tensor:
        """The part `[..., P]` of a gradient `[..., all parameters]` that a step can leave."""
        return x[..., self._taken]

    @cached_property
    def _tokens(self) -> Rollouts | None:
        if not isinstance(self.problem.policy, LMPolicy):
            return None
        return token_table(self.problem, padding=self.step.padding, pad_token_id=self.step.pad_token_id)

    @cached_property
    def _as_given(self) -> dict[str, Tensor]:
        return {name: x.detach().clone() for name, x in self.model.state_dict(keep_vars=True).items()}

    @cached_property
    def _modes(self) -> dict[str, bool]:
        return {name: m.training for name, m in self.model.named_modules()}

    def batch(self, index: Tensor) -> Rollouts | Batch:
        """What the step gets beside the model, in memory of its own."""
        labels = self.problem.group_labels
        if self._tokens is not None:
            return rollouts(self._tokens, index, labels)
        return self.problem.trajectories.batch(index, labels).map(torch.Tensor.clone)

    def __call__(self, index: Tensor, *, before: Tensor | None = None, seed: int = 0) -> Tensor:
        """ĝ_θ = −.grad. `before` `[P]`: a `.grad` that is there already; what is returned includes it.

        Raises:
            EstimatorError: the step raises, or leaves no gradient.
            NotFiniteError: one that is NaN or infinite; with the batch.
            StepChangedModelError: parameters or buffers are not as they were.
        """
        given, modes = self._as_given, self._modes
        for p in self.parameters.values():
            p.grad = None
        if before is not None:
            self._set(-before)
        set_global_random_state(fixed_random_state(seed))
        batch = self.batch(index)
        try:
            with torch.enable_grad():
                self.step.run(self.model, batch)
        except PgcheckError:
            raise
        except Exception as error:
            why = f"{self._who} raises{self._line_of(error)}: {in_words(error)}{self._no_room()}"
            raise EstimatorError(why) from error
        found = self._found()
        changed = [name for name, x in self.model.state_dict(keep_vars=True).items() if not torch.equal(x, given[name])]
        if changed:
            raise StepChangedModelError(changed[0])
        for name, m in self.model.named_modules():
            m.training = modes[name]
        if not bool(torch.isfinite(found.sum())) and not bool(torch.isfinite(found).all()):
            name = next(n for n, p in self.parameters.items() if p.grad is not None and not p.grad.isfinite().all())
            raise NotFiniteError(
                f"{self._who} leaves a gradient of '{name}' that is NaN or infinite. Most likely a division by a standard"
                f" deviation, a length or a count that is zero. The first such batch:\n{self.shown(index)}"
            )
        return found

    @property
    def _who(self) -> str:
        return f"training step '{self.step.name}'"

    def _found(self) -> Tensor:
        gradients = [p.grad for p in self.parameters.values()]
        if all(g is None for g in gradients):
            raise EstimatorError(
                f"{self._who} leaves no gradient: .grad is None on every parameter. Call backward() on a loss of the model"
                " that is the step's first argument (not of one from outside), and neither zero_grad() nor"
                " torch.autograd.grad after it."
            )
        parts = [
            (torch.zeros_like(p) if g is None else g.to_dense() if g.is_sparse else g).detach().reshape(-1)
            for p, g in zip(self.parameters.values(), gradients, strict=True)
        ]
        return -torch.cat(parts).to(torch.float64)

    def _set(self, gradient: Tensor) -> None:
        parts = gradient.split([p.numel() for p in self.parameters.values()])
        for p, part in zip(self.parameters.values(), parts, strict=True):
            p.grad = part.reshape(p.shape).clone()

    def _no_room(self) -> str:
        """A hint, if rows are longer than what the model can read."""
        room, L = getattr(self.model, "context", None), 0 if self._tokens is None else self._tokens.input_ids.shape[1]
        if not isinstance(room, int) or room >= L:
            return ""
        return f". Rows have {L} tokens and the model's context is {room} tokens; feed it input_ids[:, :-1], or give it {L}."

    def _line_of(self, error: Exception) -> str:
        own = getattr(getattr(self.step.run, "__code__", None), "co_filename", None)
        lines = [line for frame, line in traceback.walk_tb(error.__traceback__) if frame.f_code.co_filename == own]
        return f" at {Path(own).name}:{lines[-1]}" if own and lines else ""

    def restored(self) -> None:
        """Parameters, buffers and modes as they were given."""
        self.model.load_state_dict(self._as_given)

    def shown(self, index: Tensor) -> str:
        """A batch as lines of text."""
        if self._tokens is None:
            drawn = self.problem.trajectories.batch(index, self.problem.group_labels)
            return table_of(drawn, torch.zeros_like(drawn.mask))
        batch = rollouts(self._tokens, index, self.problem.group_labels)
        lines = [f"    {'uid':<5}{'reward':<10}input_ids (response in brackets)"]
        for i in range(batch.rows):
            tokens = [
                f"[{x}]" if own else str(x)
                for x, own, real in zip(
                    batch.input_ids[i].tolist(), batch.response_mask[i].tolist(), batch.attention_mask[i].tolist(),
                    strict=True,
                )
                if real
            ]  # fmt: skip
            lines.append(f"    {int(batch.uid[i]):<5}{float(batch.rewards[i]):<10.4g}{' '.join(tokens)}")
        return "\n".join(lines)


class StepChangedModelError(Exception):
    """The step moved a parameter or a buffer of the model."""


def direct_estimates(step: TrainingStep, problem: Problem, index: Tensor) -> Tensor:
    """ĝ_θ of the batches `index` `[n, B]` of rollouts, `[n, P]`: one run of the step for each.

    Raises:
        EstimatorError, NotFiniteError: as `StepRunner`.
    """
    runner = StepRunner(step, problem)
    with random_state_kept():
        return torch.stack([_run(runner, row) for row in index])


# -- what a step must not do


def find_step_impurity(runner: StepRunner) -> Impurity | None:
    """The first of: it changes the model; draws random numbers that matter; keeps state from one call to the next."""
    index = Batches(runner.problem.trajectories, runner.problem.sizes).random(2, seed=0)
    with random_state_kept():
        try:
            return _impurity(runner, index)
        except StepChangedModelError as error:
            runner.restored()
            return _moved(str(error))


def _moved(name: str) -> Impurity:
    return Impurity(
        "stateless",
        f"changes the model: '{name}' is not what it was before the call",
        "leave the gradient on .grad and take optimizer.step() out; batch norm keeps running statistics in train mode",
        math.nan,
    )


def _impurity(runner: StepRunner, index: Tensor) -> Impurity | None:
    first, again, reseeded = runner(index[0]), runner(index[0]), runner(index[0], seed=1)
    if not _differ(first, again) and _differ(first, reseeded):
        noisy = [name for name, m in runner.model.named_modules() if "Dropout" in type(m).__name__]
        why = f" (the model has dropout, module '{noisy[0]}': leave it in eval mode)" if noisy else ""
        mend = f"an exact verdict needs a function of the batch; take dropout and noise out, fix the order of rows{why}"
        return Impurity("deterministic", "draws random numbers that change the gradient", mend, _gap(first, reseeded))
    runner(index[1])
    after = runner(index[0])
    if _differ(first, again) or _differ(first, after):
        mend = "a running mean, a counter or an accumulation over several calls makes the gradient depend on what came before"
        return Impurity("stateless", "keeps state from one call to the next", mend, _gap(first, after))
    return None


def _gap(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / a.norm().clamp(min=1e-300))


def _differ(a: Tensor, b: Tensor) -> bool:
    return not torch.allclose(a, b, rtol=1e-12, atol=1e-14 * float(b.abs().max()))


def _zeroing(runner: StepRunner) -> Zeroing:
    """What becomes of a `.grad` that is there already."""
    index = Batches(runner.problem.trajectories, runner.problem.sizes).random(2, seed=0)
    left, clean = _run(runner, index[1]), _run(runner, index[0])
    left = left + left.abs().max().clamp(min=1e-6)  # nowhere zero
    found = _run(runner, index[0], before=left)
    near = 1e-9 * float(torch.stack([clean, left]).abs().max())
    sizes = [p.numel() for p in runner.parameters.values()]
    replaced, added = (
        [bool(gap.abs().max() <= near) for gap in (found - x).split(sizes)] for x in (clean, clean + left)
    )
    if all(replaced):
        return "replaces"
    if all(added):
        return "adds"
    return "some" if all(a or b for a, b in zip(added, replaced, strict=True)) else "neither"


# -- every batch


@one_thread()
def direct_moments(
    runner: StepRunner, *, budget: int = DEFAULT_BUDGET, progress: Progress | None = None
) -> DirectMoments:
    """E ĝ_θ and E ‖ĝ_θ‖² over every batch, one run of the step for each.

    Raises:
        BudgetError: with the number of batches, how long they would take, and the nearest sampling plan that fits.
        EstimatorError, NotFiniteError: as `StepRunner`; also state that shows only after many calls.
    """
    if not is_count(budget):
        raise UsageError(f"budget: {budget!r}; it must be an integer of at least 1.")
    problem = runner.problem
    with random_state_kept():
        began = time.monotonic()
        ordered = not _order_is_free(runner)
        batches = Batches(problem.trajectories, problem.sizes, ordered)
        if batches.count > budget:
            one = _seconds_of_one(runner)
            raise BudgetError(_too_many(runner, batches, budget, one))
        mean = torch.zeros(sum(p.numel() for p in runner.parameters.values()), dtype=torch.float64)
        lost, second, norms, done = torch.zeros_like(mean), 0.0, [], 0
        first: tuple[Tensor, Tensor] | None = None
        for index, weight in batches.blocks(_BLOCK):
            for row, q in zip(index, weight.tolist(), strict=True):
                x = _run(runner, row)
                first = first or (row, x)
                compensated_add(mean, lost, q * x)
                square = float((x * x).sum())
                second += q * square
                norms.append(math.sqrt(square))
            done += len(index)
            if progress is not None and time.monotonic() - began > 2.0:
                progress(f"{problem.name}: {runner.step.name}", done, batches.count)
        if first is not None and _differ(first[1], _run(runner, first[0])):
            raise EstimatorError(
                f"{runner._who} gives another gradient from the same batch after {done} calls: it keeps state."
            )
        zeroing = _zeroing(runner)
    if zeroing == "some":
        raise EstimatorError(
            f"{runner._who} zeroes the .grad of some parameters and adds to that of others: does its optimizer hold all of"
            " them? Call model.zero_grad()."
        )
    seconds = time.monotonic() - began
    return DirectMoments(mean + lost, second, batches.count, ordered, seconds, zeroing, torch.tensor(norms))


def _run(runner: StepRunner, row: Tensor, *, before: Tensor | None = None) -> Tensor:
    try:
        return runner(row, before=before)
    except StepChangedModelError as error:
        impurity = _moved(str(error))
        raise EstimatorError(f"{runner._who} {impurity.what}, though not on every call; {impurity.mend}.") from None


def _order_is_free(runner: StepRunner) -> bool:
    """The gradient does not move when rows are permuted inside their groups and groups of equal size among each other."""
    orders = row_orders(runner.problem)
    if not orders:
        return True
    index = Batches(runner.problem.trajectories, runner.problem.sizes).random(PROBES, seed=0)
    for row in index:
        here = _run(runner, row)
        near = 1e-9 * float(here.norm()) + 1e-14
        if any(float((_run(runner, row[order]) - here).norm()) > near for order in orders):
            return False
    return True


def _seconds_of_one(runner: StepRunner) -> float:
    index = Batches(runner.problem.trajectories, runner.problem.sizes).random(3, seed=1)
    began = time.perf_counter()
    for row in index:
        _run(runner, row)
    return (time.perf_counter() - began) / len(index)


def _too_many(runner: StepRunner, batches: Batches, budget: int, one: float) -> str:
    p = runner.problem
    how = "ordered batches (the gradient depends on the order of its rows)" if batches.ordered else "batches"
    plan = nearest_plan(p, p.trajectories, budget=budget, ordered=batches.ordered)
    nearest = (
        f"The nearest that fits: groups={plan[0]}, group_size={plan[1]} ({plan[2]:,} batches); or pass a larger budget, or"
        " a task with fewer completions."
        if plan
        else "No smaller batch fits; raise the budget, or shorten the completions."
    )
    took = batches.count * one
    return (
        f"{runner._who} on '{p.name}' needs {batches.count:,} {how}, one run of it for each, about"
        f" {took:,.0f} s ({len(p.trajectories):,} rollouts, groups={p.groups}, group_size={p.group_size}); the budget is"
        f" {budget:,}. {nearest}"
    )
