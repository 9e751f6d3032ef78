"""How fast the exact engine is, as ratios: every rival runs the same batches in the same process, turn by turn.

A *gradient sample* is ĝ of one batch, added into E ĝ and E ĝĝᵀ. Rivals differentiate the loss of one batch with respect
to the logits: a Python loop of `backward`, `torch.func.vmap(grad)`, `jax.jit(vmap(grad))`. They are handed gathered
tensors; the engine gathers its own. Everything is float64 on one thread of one core.

What the engine does with these batches, and a rival does not: on-policy both estimators have one weight a row, so that ĝ is a
sum of scores from a table (`pgcheck.engines.scores`), and no position is looked at. The same engine without that, position by
position, is raced as well. Every batch given is evaluated, those given twice twice. What is made once a table or once for
some labels (scores, what I − W is of a baseline W R) is there when the clock runs, as a rival's gathered tensors are.

Each pass over the weights takes about a nanosecond an element, as its operands come from beyond the second-level cache, and
each operation some 15 µs, as its code does too; so there are few of either: blocks of a million rows, what a baseline leaves
of a return from one sum over the group, factors that are one number kept outside, rollouts' numbers as int32 once a block,
columns of scores a multiple of four. Only x, of which each coordinate is written and read, is kept in cache, some thousand
batches at once, which is worth a twentieth of the run. At B = 8 and K·A = 32 three tenths are the sparse product and an
eighth to a quarter Σ x xᵀ. Tried, and slower or no faster: the batch as the fastest index (its passes are faster at B = 3,
its two transpositions cost more), smaller blocks, huge pages, `torch.compile`, syrk, one column less than a multiple of four,
norms of rows in place of a square and a product; a kernel of numba for all sums at once took half the time at two columns and
B = 3, as long at B = 8, and longer at 21 columns. A product with I − W in place of the sum was no slower on one machine, and
takes a tenth to a quarter more on another, with AVX-512. Against `vmap` the ratio was 11 to 16 on the former, and is 8 to 13
on the latter.

A sampled verdict is more than the sums that its rival makes: it draws the batches, and keeps of every estimator what a judge
and intervals need. With groups of 16 a third of a long run is the drawing (a third of that the generator), three tenths the
coefficients and ĝ, a third what is kept of the draws. A run of 32 768 draws spends a quarter on what every run does once:
whether the estimator is pure, the first directions, and the bounds that are printed; so that this problem is also raced with
as many draws as a check takes. On a tree of 336 logits a seventh is the drawing, a quarter Σ x xᵀ, and a fifth the Gram
blocks and their largest eigenvalues, of each grain while grains are few.

The tenth estimator is a few percent of an exact run, and within the noise of a sampled one whose draws are dear, as a walk
that is simulated or a model that writes. It is nothing where it is one of the nine: estimates that are the same bits are
looked at once, as those of leave-one-out over the batch and over the group where there is one group. The ten that are raced
here are all apart. With s for what estimators share and m for what each of ten that are alike takes by itself, m < 3% (s + 10
m) is m < s/23. A draw of sampled/groups-16, two groups of sixteen rollouts, takes .26 µs to make, so that m would be 11 ns,
in which its 32 returns can hardly be read; and of the tree Σ x xᵀ alone, 336 logits of each estimator, takes more than all
drawing. There an estimator costs what its own arithmetic costs, whichever it is in the row.

Guarantee: a rate is reported only after the contenders gave the same E ĝ and E‖ĝ‖² to 1e-9: rivals on the same random
batches, the exact verdict against ordered tuples wherever those are few enough to be raced. A ratio is the
median over rounds of two runs next to each other, with its least and largest value; no absolute time is asserted anywhere.
"""

from __future__ import annotations

import functools
import itertools
import os
import statistics
import time
import timeit
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pgcheck.engines.coefficients import coefficients_of
from pgcheck.engines.enumeration import Batches
from pgcheck.engines.exact import accumulate, exact_moments
from pgcheck.engines.moments import Progress
from pgcheck.engines.monte_carlo import DEFAULT_DRAWS, monte_carlo
from pgcheck.engines.parameters import ParameterSpace, one_by_one, policy_of
from pgcheck.engines.sketch import SketchSpace, default_space, sketch_moments
from pgcheck.engines.threads import one_thread
from pgcheck.envs.language import LMTask
from pgcheck.envs.tabular import TabularMDP
from pgcheck.errors import PgcheckError, UsageError
from pgcheck.estimators.base import Estimator
from pgcheck.estimators.lookup import as_estimator
from pgcheck.generation import draws_at_once
from pgcheck.policies import TinyGPT
from pgcheck.problem import Problem
from pgcheck.registry import find_problem
from pgcheck.statistics.sequential import GRAIN, Settings
from pgcheck.trajectories import Trajectories

ROUNDS = 7
ROWS = (3, 4, 6, 8)
SAMPLES = 131_072  # batches a round for the vectorised ones
RIVAL_BLOCKS = (2_048, 4_096, 16_384)  # batches at once; a rival gets those that suit it best
MOST_TUPLES = 2_000_000
LOOP_SAMPLES = 150  # batches a round for the loop of backward
DRAWS = 65_536  # of a task whose contexts are listed, for the sketch
GIVEN = 8_192  # of such a task for a whole verdict
WRITTEN = 1_024  # of one whose completions the model writes
MAPPED = 1_024  # draws of which every parameter is estimated
DIRECTIONS = 32
SAMPLED = {  # draws of each; of the first also as many as a check takes at most
    "sampled/groups-16": (32_768, DEFAULT_DRAWS), "sampled/walk-50": (8_192,), "sampled/token-tree": (8_192,),
}  # fmt: skip
VERDICTS = (("leave_one_out", 2), ("grpo", 2), ("leave_one_out", 8), ("leave_one_out", 16))  # of a transformer
CHEAP = ("batch_mean", "leave_one_out", "batch_mean(group)", "leave_one_out(batch)")  # each the tenth in turn
TEN = (
    "batch_mean", "leave_one_out", "reinforce_pp", "grpo", "cispo(notes)", "batch_mean_alive", "batch_mean(reward_to_go)",
    "batch_mean(group)", "reinforce_pp(group)", "leave_one_out(batch)",
)  # fmt: skip
APART = (  # no two of them give the same bits on a problem of `SAMPLED`; those are looked at once
    "batch_mean", "reinforce", "reward_to_go", "reinforce_pp", "reinforce_pp(group)", "grpo", "dr_grpo", "batch_mean_alive",
    "opo", "leave_one_out",
)  # fmt: skip


@dataclass(frozen=True)
class Ratio:
    """One line: `ours` and `theirs` in units of `unit`, and ours/theirs over the rounds."""

    question: str
    subject: str
    rival: str
    unit: str
    ours: float
    theirs: float
    ratio: float  # median over rounds
    least: float
    largest: float


@dataclass(frozen=True)
class FixedBatches:
    """Given batches, all equally likely; of one group if not told otherwise."""

    index: Tensor  # [M, B]
    groups: Tensor | None = None  # [B]

    @property
    def labels(self) -> Tensor:
        """The group of each row, `[B]`."""
        return torch.zeros(self.index.shape[1], dtype=torch.int64) if self.groups is None else self.groups

    @property
    def count(self) -> int:
        """M."""
        return len(self.index)

    def blocks(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """In the order given."""
        for part in self.index.split(size):
            yield part, torch.tensor([1.0 / self.count], dtype=torch.float64).expand(len(part))


def walk_of_four() -> Problem:
    """Eight states, four actions (S·A = 32), four deterministic steps, dense rewards: N = 256 rollouts."""
    generator = torch.Generator().manual_seed(5)
    nxt = torch.randint(8, (8, 4), generator=generator)
    reward = torch.randn(8, 4, generator=generator, dtype=torch.float64).round(decimals=1)
    logits = (0.5 * torch.randn(8, 4, generator=generator, dtype=torch.float64)).round(decimals=2)
    transition = torch.nn.functional.one_hot(nxt, 8).to(torch.float64)
    return Problem(TabularMDP(transition, reward, [1.0] + [0.0] * 7, horizon=4), logits, name="bench/walk-of-four")


# -- the rivals: (E ĝ [K, A], E‖ĝ‖²) of M batches


@dataclass(frozen=True)
class Gathered:
    """M batches as tensors `[M, B, T]`, and the logits `[K, A]`."""

    logits: Tensor
    context: Tensor
    action: Tensor
    mask: Tensor
    returns: Tensor  # [M, B]

    @property
    def columns(self) -> tuple[Tensor, ...]:
        """What a loss is handed of each batch."""
        return self.context, self.action, self.mask, self.returns


def gather(problem: Problem, index: Tensor) -> Gathered:
    """What a training loop would be handed."""
    batch = problem.trajectories.batch(index, torch.zeros(index.shape[1], dtype=torch.int64))
    ids = batch.context.clamp(min=0), batch.action.clamp(min=0)
    return Gathered(problem.logits, *ids, batch.mask, batch.episode_return)


def advantage(returns: Any, estimator: str, lib: Any) -> Any:
    """RLOO: (R − mean) B/(B−1). GRPO: (R − mean)/(std + 1e-6), and 0 where all agree; `lib` is torch or jax.numpy."""
    B = returns.shape[-1]
    centred = returns - returns.mean()
    if estimator == "leave_one_out":
        return centred * B / (B - 1)
    std = lib.sqrt((centred**2).mean())
    return lib.where(std > 1e-12, centred / (std + 1e-6), lib.zeros_like(centred))


def torch_loss(estimator: str, logits: Tensor, *columns: Tensor) -> Tensor:
    """The loss of one batch; GRPO takes the mean over each row. On-policy: every ratio is 1 with the gradient of log π."""
    context, action, mask, returns = columns
    logp = torch.log_softmax(logits, -1)[context, action] * mask
    of_row = logp.sum(-1) if estimator == "leave_one_out" else logp.sum(-1) / mask.sum(-1)
    return -(advantage(returns, estimator, torch) * of_row).mean()


def by_backward(data: Gathered, estimator: str) -> tuple[Tensor, float]:
    """A Python loop: one `backward` a batch."""
    logits = data.logits.clone().requires_grad_(True)
    mean, second = torch.zeros_like(data.logits), torch.zeros(logits.numel(), logits.numel(), dtype=torch.float64)
    for columns in zip(*data.columns, strict=True):
        logits.grad = None
        torch_loss(estimator, logits, *columns).backward()
        assert logits.grad is not None
        g = -logits.grad
        mean += g
        second += torch.outer(g.flatten(), g.flatten())
    return mean / len(data.returns), float(second.trace()) / len(data.returns)


def by_vmap(data: Gathered, estimator: str, *, block: int = 4_096) -> tuple[Tensor, float]:
    """`torch.func.vmap(torch.func.grad(loss))` in blocks."""

    loss = functools.partial(torch_loss, estimator)
    gradient = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0, 0, 0))
    cells = data.logits.numel()
    mean, second = torch.zeros_like(data.logits), torch.zeros(cells, cells, dtype=torch.float64)
    for columns in zip(*(x.split(block) for x in data.columns), strict=True):
        g = -gradient(data.logits, *columns)
        mean += g.sum(0)
        second += g.flatten(1).T @ g.flatten(1)
    return mean / len(data.returns), float(second.trace()) / len(data.returns)


def jax_rival(data: Gathered, estimator: str, *, block: int = 4_096) -> Callable[[], tuple[Tensor, float]]:
    """`jax.jit(jax.vmap(jax.grad(loss)))` with the sums inside; compiled before the clock runs.

    Raises:
        UsageError: jax is not installed.
    """
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")
    try:
        import jax
        import jax.numpy as jnp
    except ImportError:
        raise UsageError("jax is not installed; pip install 'pgcheck[bench]'.") from None
    jax.config.update("jax_enable_x64", True)

    def loss(logits: Any, context: Any, action: Any, mask: Any, returns: Any) -> Any:
        logp = jax.nn.log_softmax(logits, -1)[context, action] * mask
        of_row = logp.sum(-1) if estimator == "leave_one_out" else logp.sum(-1) / mask.sum(-1)
        return -(advantage(returns, estimator, jnp) * of_row).mean()

    @jax.jit
    def sums(logits: Any, *columns: Any) -> Any:
        g = -jax.vmap(jax.grad(loss), in_axes=(None, 0, 0, 0, 0))(logits, *columns)
        flat = g.reshape(len(g), -1)
        return g.sum(0), flat.T @ flat

    logits = jnp.asarray(data.logits.numpy())
    parts = [
        tuple(jnp.asarray(x[low : low + block].numpy()) for x in data.columns)
        for low in range(0, len(data.returns), block)
    ]
    for part in {len(p[0]): p for p in parts}.values():  # compile for every shape
        jax.block_until_ready(sums(logits, *part))

    def run() -> tuple[Tensor, float]:
        mean, second = 0.0, 0.0
        for part in parts:
            a, b = sums(logits, *part)
            mean, second = mean + a, second + b
        jax.block_until_ready(second)
        M = len(data.returns)
        return torch.from_numpy(np.array(mean) / M), float(np.trace(np.array(second))) / M

    return run


def by_engine(problem: Problem, index: Tensor, estimator: Estimator) -> tuple[Tensor, float]:
    """The coefficient engine on given batches."""
    (sums,) = accumulate([estimator], problem.trajectories, FixedBatches(index))
    return sums.mean.reshape(problem.logits.shape), float(sums.second.trace())


# -- side by side


def fastest(ways: Iterable[Callable[[], Any]]) -> Callable[[], Any]:
    """The one that takes the least time, of two runs each after one to warm up."""

    def seconds(work: Callable[[], Any]) -> float:
        work()
        return min(timeit.repeat(work, number=1, repeat=2))

    return min(ways, key=seconds)


def in_turns(
    contenders: dict[str, tuple[Callable[[], object], float]], *, rounds: int = ROUNDS
) -> dict[str, list[float]]:
    """Rates of each contender (work, units of work) in each round; one after the other in every round."""
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for work, _ in contenders.values():
        work()  # warm
    for _ in range(rounds):
        for name, (work, units) in contenders.items():
            began = time.perf_counter()
            work()
            rates[name].append(units / (time.perf_counter() - began))
    return rates


def _ratios(question: str, subject: str, unit: str, rates: dict[str, list[float]]) -> list[Ratio]:
    ours, *rivals = rates
    out = []
    for rival in rivals:
        each = [a / b for a, b in zip(rates[ours], rates[rival], strict=True)]
        a, b = statistics.median(rates[ours]), statistics.median(rates[rival])
        out.append(Ratio(question, subject, rival, unit, a, b, statistics.median(each), min(each), max(each)))
    return out


def gradient_samples(problem: Problem, estimator: str, rows: int, *, rounds: int = ROUNDS) -> list[Ratio]:
    """Gradient samples per second: the engine against the three rivals, and against itself position by position, on the same
    random batches."""
    problem = problem.with_sampling(groups=1, group_size=rows)
    e = replace(as_estimator(estimator), couples="batch", reads=None)
    index = Batches(problem.trajectories, problem.sizes).random(SAMPLES, seed=1)
    contenders: dict[str, tuple[Callable[[], Any], float]] = {
        "coefficient engine": (lambda: by_engine(problem, index, e), SAMPLES),
        **_rivals(problem, estimator),
    }
    dense = replace(
        e, coefficients=lambda batch: e.coefficients(batch).clone()
    )  # in memory of their own: not one a row
    few = index[: max(1, SAMPLES // 10)]
    _refuse_unless_equal("engine, by position", by_engine(problem, few, dense), by_engine(problem, few, e))
    contenders["engine, by position"] = (lambda: by_engine(problem, index, dense), SAMPLES)
    subject = f"{estimator}, B = {rows}, K·A = {problem.logits.numel()}, T = {problem.trajectories.paths.steps}"
    return _ratios("gradient samples", subject, "samples/s", in_turns(contenders, rounds=rounds))


def _rivals(problem: Problem, estimator: str) -> dict[str, tuple[Callable[[], Any], float]]:
    """The rivals on random batches, each found to compute what the coefficient engine computes."""
    e = replace(as_estimator(estimator), couples="batch", reads=None)
    index = Batches(problem.trajectories, problem.sizes).random(SAMPLES, seed=1)
    data, few = gather(problem, index), gather(problem, index[:LOOP_SAMPLES])
    blocks = {min(n, SAMPLES) for n in RIVAL_BLOCKS}
    mapped = fastest(functools.partial(by_vmap, data, estimator, block=n) for n in blocks)
    rivals: dict[str, tuple[Callable[[], Any], float]] = {
        "loop of backward": (lambda: by_backward(few, estimator), LOOP_SAMPLES),
        "torch.func.vmap(grad)": (mapped, SAMPLES),
    }
    if has_jax():
        rivals["jax.jit(vmap(grad))"] = fastest(jax_rival(data, estimator, block=n) for n in blocks), SAMPLES
    for name, (work, units) in rivals.items():
        _refuse_unless_equal(name, work(), by_engine(problem, index[: int(units)], e))
    return rivals


def _refuse_unless_equal(name: str, found: tuple[Tensor, float], expected: tuple[Tensor, float]) -> None:
    gap = max(float((found[0] - expected[0]).abs().max()), abs(found[1] - expected[1]))
    if not gap <= 1e-9 * max(1.0, expected[1]):
        raise PgcheckError(f"bench: '{name}' computes something else: its moments differ by {gap:.3g}.")


def exact_verdicts(problem: Problem, estimator: str, rows: int, *, rounds: int = ROUNDS) -> list[Ratio]:
    """A whole exact verdict: as the engine does it, against the same engine over ordered tuples (where there are fewer than
    two million) and against the rivals' rate on as many gradient samples as there are distinct batches."""
    problem = problem.with_sampling(groups=1, group_size=rows)
    e = as_estimator(estimator)
    every, ordered = (Batches(problem.trajectories, problem.sizes, ordered=o).count for o in (False, True))
    contenders: dict[str, tuple[Callable[[], Any], float]] = {
        "exact engine": (lambda: exact_moments([e], problem, budget=every + 1), every)
    }
    if ordered <= MOST_TUPLES:
        tuples = Batches(problem.trajectories, problem.sizes, ordered=True)
        contenders["ordered tuples"] = (lambda: accumulate([e], problem.trajectories, tuples), every)
        (sums,), (m,) = accumulate([e], problem.trajectories, tuples), exact_moments([e], problem, budget=every + 1)
        expected = sums.mean.reshape(m.mean.shape), float(sums.second.trace())
        _refuse_unless_equal("exact engine", (m.mean, m.second_moment), expected)
    contenders |= _rivals(problem, estimator)
    subject = f"{estimator}, B = {rows}, {problem.name}: {every:,} batches, {ordered:,} ordered"
    return _ratios("exact verdict", subject, "batches/s", in_turns(contenders, rounds=rounds))


def tenth_estimator(problem: Problem, rows: int, *, rounds: int = ROUNDS) -> list[Ratio]:
    """Ten estimators on the same batches against nine of them, over each of the cheap ones left out in turn: 1 − ratio is
    (t₁₀ − t₉)/t₁₀, the part of the run that the tenth is. Verifications of declarations are part of it."""
    problem = problem.with_sampling(groups=1, group_size=rows)
    ten = [replace(as_estimator(name), reads=None) for name in TEN]
    nines = [[e for e in ten if e.name != name] for name in CHEAP]
    contenders: dict[str, tuple[Callable[[], Any], float]] = {
        "ten": (lambda: [exact_moments(ten, problem) for _ in nines], len(nines)),
        "nine": (lambda: [exact_moments(nine, problem) for nine in nines], len(nines)),
    }
    n = Batches(problem.trajectories, problem.sizes).count
    subject = f"one of {', '.join(CHEAP)} beside nine, {n:,} batches"
    return _ratios("tenth estimator", subject, "runs/s", in_turns(contenders, rounds=rounds))


def tenth_of_the_command(problem: Problem, rows: int, *, rounds: int = ROUNDS) -> list[Ratio]:
    """The same of all that `pgcheck compare` does for them once it has read its arguments: the problem and its rollouts made
    anew, ∇J, the verdicts, and their table as text."""
    from pgcheck.runs.compare import compared

    ten = [replace(as_estimator(name), reads=None) for name in TEN]

    def command(estimators: list[Estimator]) -> str:
        table: str = compared(estimators, [problem.with_sampling(groups=1, group_size=rows)]).to_string()
        return table

    nines = [[e for e in ten if e.name != name] for name in CHEAP]
    contenders: dict[str, tuple[Callable[[], Any], float]] = {
        "ten": (lambda: [command(ten) for _ in nines], len(nines)),
        "nine": (lambda: [command(nine) for nine in nines], len(nines)),
    }
    subject = f"of the command, one of {', '.join(CHEAP)} beside nine, B = {rows}"
    return _ratios("tenth estimator", subject, "runs/s", in_turns(contenders, rounds=rounds))


# -- language models: (E ĝ_θ [P], E‖ĝ_θ‖²) of M batches, or a sketch of them


def digits_of_six(rows: int) -> Problem:
    """A transformer of 26 thousand parameters, six tokens, four steps: 781 completions; one group."""
    task = LMTask(
        [(1, 2)], vocab_size=6, eos=0, max_new_tokens=4, reward=lambda prompt, text: float(sum(text) % 3 == 0)
    )
    return Problem(task, TinyGPT(6, context=5, seed=1), groups=1, group_size=rows, name="bench/digits-of-six")


def model_by_backward(problem: Problem, index: Tensor, estimator: str) -> tuple[Tensor, float]:
    """As a training loop does it: the loss of one group through the model, one `backward` a group."""
    table, policy = problem.trajectories, problem.policy
    last = table.paths.context.gather(1, (table.paths.end - 1).unsqueeze(1)).squeeze(1)
    tokens = policy.tokens[policy.where[0, last]]  # of every rollout
    place = policy.where[1, table.paths.context.clamp(min=0)]
    batch = table.batch(index, problem.group_labels)
    parameters = list(policy.parameters())
    mean, second = torch.zeros(sum(p.numel() for p in parameters), dtype=torch.float64), 0.0
    for m, rows in enumerate(index):
        z = policy.model(tokens[rows]).gather(1, place[rows].unsqueeze(-1).expand(-1, -1, table.actions))
        logp = (
            torch.log_softmax(z, -1).gather(-1, batch.action[m].clamp(min=0).unsqueeze(-1)).squeeze(-1) * batch.mask[m]
        )
        of_row = logp.sum(-1) if estimator == "leave_one_out" else logp.sum(-1) / batch.mask[m].sum(-1)
        (advantage(batch.episode_return[m], estimator, torch) * of_row).mean().backward()
        g = torch.cat([p.grad.reshape(-1) for p in parameters if p.grad is not None])
        policy.zero_grad(set_to_none=True)
        mean += g
        second += float(g @ g)
    return mean / len(index), second / len(index)


def model_verdicts(estimator: str, rows: int, *, rounds: int = ROUNDS) -> list[Ratio]:
    """The exact verdict in 26 thousand parameters against a loop over its groups; and its time against five seconds."""
    problem, e = digits_of_six(rows), as_estimator(estimator)
    every = Batches(problem.trajectories, problem.sizes).count
    few = Batches(problem.trajectories, problem.sizes).random(LOOP_SAMPLES, seed=1)
    space = ParameterSpace(problem)
    c = coefficients_of(e, problem.trajectories.batch(few, problem.group_labels))
    x = space.project(c, problem.trajectories, few)
    expected = x.mean(0), float((x * x).sum(-1).mean())
    _refuse_unless_equal("loop of backward", model_by_backward(problem, few, estimator), expected)

    def verdict() -> tuple[float, float]:
        fresh = digits_of_six(rows)  # nothing is kept from the round before
        (m,) = exact_moments([e], fresh, budget=10**7)
        g = fresh.parameter_gradient()
        return float((m.mean_in_parameters() - g).norm() / g.norm()), m.total_variance

    contenders: dict[str, tuple[Callable[[], Any], float]] = {
        "exact engine": (verdict, every),
        "loop of backward": (lambda: model_by_backward(problem, few, estimator), LOOP_SAMPLES),
    }
    rates = in_turns(contenders, rounds=rounds)
    subject = f"{estimator}, G = {rows}, a transformer: {number_of(every)} groups"
    seconds = [every / r for r in rates["exact engine"]]
    each = [5.0 / t for t in seconds]
    out = _ratios("exact verdict of a transformer", subject, "groups/s", rates) if every < 10**7 else []
    timed = statistics.median(seconds), 5.0, statistics.median(each), min(each), max(each)
    return [*out, Ratio("time of a verdict", subject, "five seconds", "s", *timed)]


def number_of(n: int) -> str:
    """With commas, or as a power of ten."""
    return f"{n:,}" if n < 10**9 else f"{n:.1e}"


def sketched(problem: Problem, *, batches: int, directions: int = 32, rounds: int = ROUNDS) -> list[Ratio]:
    """A sketch of one estimator, and of ten, from nothing, against a backward pass a group of each on as many draws; and ĝ_θ
    itself, by backward passes mapped over the groups.

    Along ∇J a draw tells both the same, so that the first ratio is one of equal information about a scale or a bias there.
    Of tr Cov a backward pass tells more: the last line is the time to the same standard error, of the directions and the
    draws for the sketch, of the draws alone (fewer of them) for the backward passes.
    """
    e, ten = as_estimator("grpo"), [as_estimator(name) for name in TEN]
    space = SketchSpace.of(problem, directions=directions)
    few = max(2, min(batches, LOOP_SAMPLES))
    table, index = problem.sampler().draw(0, few)
    c = coefficients_of(e, table.batch(index, problem.group_labels))
    whole = ParameterSpace(problem)

    def drawn(number: int) -> tuple[Tensor, Trajectories, Tensor]:
        table, index = problem.sampler().draw(0, number)
        return coefficients_of(e, table.batch(index, problem.group_labels)), table, index

    def loop() -> Tensor:
        c, table, index = drawn(few)
        return torch.cat(list(one_by_one(c, table, index, policy_of(table, problem))))

    def loop_of_ten() -> list[tuple[Tensor, Tensor]]:
        table, index = problem.sampler().draw(0, few)
        given = [coefficients_of(one, table.batch(index, problem.group_labels)) for one in ten]
        return [(c, torch.cat(list(one_by_one(c, table, index, policy_of(table, problem))))) for c in given]

    def mapped() -> Tensor:
        return whole.project(*drawn(MAPPED))

    each = loop()
    for name, here, there in (
        ("backward passes", space.project(c, table, index), each @ space.directions.T),
        ("mapped backward passes", whole.project(c, table, index), each),
    ):
        _refuse_unless_equal(name, (there.mean(0), float((there**2).mean())), (here.mean(0), float((here**2).mean())))
    for one, (c, x) in zip(ten, loop_of_ten(), strict=True):
        here, there = space.project(c, table, index), x @ space.directions.T
        _refuse_unless_equal(
            one.name, (there.mean(0), float((there**2).mean())), (here.mean(0), float((here**2).mean()))
        )
    (found,) = sketch_moments([e], problem, batches=batches, directions=directions)
    x = mapped()
    square = (x - x.mean(0)).square().sum(1)
    enough = float(square.var()) / found.total_variance_error**2  # draws that tell tr Cov as well, without a sketch
    contenders: dict[str, tuple[Callable[[], Any], float]] = {
        "sketch engine": (lambda: sketch_moments([e], problem, batches=batches, directions=directions), batches),
        "backward passes": (loop, few),
    }
    size = f"{problem.name}, G = {problem.rows}, P = {x.shape[1]:,}"
    subject = f"{size}, {batches:,} draws, {len(space.directions)} directions"
    (of_draws,) = _ratios("sketch", subject, "draws/s", in_turns(contenders, rounds=rounds))
    contenders = {
        "sketch engine": (lambda: sketch_moments(ten, problem, batches=batches, directions=directions), batches),
        "backward passes": (loop_of_ten, few),
    }
    of_ten = _ratios("sketch", f"ten estimators, {subject}", "draws/s", in_turns(contenders, rounds=rounds))
    per = {name: getattr(of_draws, name) * enough / batches for name in ("ratio", "least", "largest")}
    error = f"{100 * found.total_variance_error / found.total_variance:.2g}%"
    of_trace = replace(
        of_draws,
        question="tr Cov to the same error",
        subject=f"{subject}: {error}, as of {max(enough, 2):,.0f} draws without a sketch",
        unit="times/s",
        ours=of_draws.ours / batches,
        theirs=of_draws.theirs / enough,
        **per,
    )
    contenders = {"mapped backward passes": (mapped, MAPPED), "one a draw": (loop, few)}
    rates = in_turns(contenders, rounds=rounds)
    return [
        of_draws,
        *of_ten,
        of_trace,
        *_ratios("estimates in parameters", f"{size}, {MAPPED:,} draws", "draws/s", rates),
    ]


def writer() -> Problem:
    """A transformer of 820 thousand parameters writes up to sixteen of 64 tokens."""
    task = LMTask(
        [(1, 2), (3,)], vocab_size=64, eos=0, max_new_tokens=16, max_completions=1, max_prefixes=1, returns=(0, 1),
        reward=lambda prompt, text: float(sum(text) % 2 == 0),
    )  # fmt: skip
    model = TinyGPT(64, context=18, width=128, layers=4, heads=4, seed=3)
    return Problem(task, model, groups=1, group_size=4, name="bench/writer")


def beside_sampling(
    made: Callable[[], Problem], *, draws: int, device: str = "cpu", rounds: int = ROUNDS
) -> list[Ratio]:
    """A whole sampled verdict of what a model writes, its pilot and the estimates that stand for ∇J included, beside drawing
    as many batches and nothing else; the problem is built anew in every round."""
    e, settings = as_estimator("grpo"), Settings(rtol=1e-3, first=draws, looks=1)

    def verdict() -> None:
        fresh = made()
        space = default_space(fresh, device=device)
        monte_carlo([e], fresh, scales=[[1.0]], settings=settings, draws=draws, device=device, space=space)

    def bare() -> None:
        sampler = made().sampler(device=device)
        at_once = draws_at_once(sampler, 8 * GRAIN)
        for low in range(0, draws, at_once):
            sampler.draw(low, min(at_once, draws - low))
        if device != "cpu":
            torch.cuda.synchronize()

    contenders: dict[str, tuple[Callable[[], Any], float]] = {
        "sampled verdict": (verdict, draws), "bare sampling": (bare, draws),
    }  # fmt: skip
    problem, where = made(), "" if device == "cpu" else f", on {torch.cuda.get_device_name()}"
    P = sum(p.numel() for p in problem.policy.parameters())
    subject = f"grpo, {problem.name}, G = {problem.rows}, P = {P:,}, {draws:,} draws{where}"
    return _ratios("verdict beside sampling", subject, "draws/s", in_turns(contenders, rounds=rounds))


def tenth_in_a_sketch(problem: Problem, *, batches: int, directions: int = 32, rounds: int = ROUNDS) -> list[Ratio]:
    """Ten estimators on the same draws against nine of them."""
    ten = [as_estimator(name) for name in TEN]
    run = functools.partial(sketch_moments, problem=problem, batches=batches, directions=directions)
    contenders: dict[str, tuple[Callable[[], Any], float]] = {
        "ten": (lambda: run(ten), 1),
        "nine": (lambda: run(ten[:-1]), 1),
    }
    subject = f"{TEN[-1]} beside nine, {problem.name}, {batches:,} draws, {directions} directions"
    return _ratios("tenth estimator", subject, "runs/s", in_turns(contenders, rounds=rounds))


def sampled(problem: Problem, *, draws: int, rounds: int = ROUNDS) -> list[Ratio]:
    """Sampled verdicts from nothing, against the coefficient engine on the same batches once they are drawn; and ten of them
    against nine. One look, at the end, so that no estimator is done before it."""
    settings = Settings(rtol=1e-3, first=draws, looks=1)
    run = functools.partial(monte_carlo, problem=problem, settings=settings, draws=draws)
    ten = [as_estimator(name) for name in APART]
    table, index = problem.sampler().draw(0, draws)
    batches = FixedBatches(index, problem.group_labels)
    (m,), (sums,) = run(ten[-1:], scales=[[1.0]]), accumulate(ten[-1:], table, batches)
    given = sums.mean.reshape(m.mean.shape), float(sums.second.trace())
    _refuse_unless_equal(
        "coefficient engine", given, (m.mean, m.total_variance * (draws - 1) / draws + float((m.mean**2).sum()))
    )
    contenders: dict[str, tuple[Callable[[], Any], float]] = {
        "sampled verdict": (lambda: run(ten[-1:], scales=[[1.0]]), draws),
        "coefficient engine": (lambda: accumulate(ten[-1:], table, batches), draws),
        "ten": (lambda: run(ten, scales=[[1.0]] * len(ten)), 1),
        "nine": (lambda: run(ten[:-1], scales=[[1.0]] * (len(ten) - 1)), 1),
    }
    rates = in_turns(contenders, rounds=rounds)
    subject = (
        f"{problem.name}, B = {problem.rows}, T = {problem.steps}, K·A = {problem.logits.numel()}, {draws:,} draws"
    )
    one, beside = (
        {name: rates[name] for name in names} for names in (("sampled verdict", "coefficient engine"), ("ten", "nine"))
    )
    return [
        *_ratios("sampled draws", f"{ten[-1].name}, {subject}", "draws/s", one),
        *_ratios("tenth estimator", f"{ten[-1].name} beside nine, {subject}", "runs/s", beside),
    ]


def has_jax() -> bool:
    """Whether the extra `bench` is installed."""
    from importlib.util import find_spec

    return find_spec("jax") is not None


@one_thread()
def bench(*, rounds: int = ROUNDS, progress: Progress | None = None) -> list[Ratio]:
    """Every ratio; some minutes."""
    dense = (find_problem("mdp/two-state-0.9"), walk_of_four())
    tree = find_problem("tree/tokens")
    work: list[Callable[[], list[Ratio]]] = []
    for problem, estimator, rows in itertools.product(dense, ("leave_one_out", "grpo"), ROWS):
        work.append(functools.partial(gradient_samples, problem, estimator, rows, rounds=rounds))
    for estimator, rows in itertools.product(("leave_one_out", "grpo"), (4, 6, 8)):
        work.append(functools.partial(exact_verdicts, tree, estimator, rows, rounds=rounds))
    work.append(functools.partial(exact_verdicts, dense[0], "leave_one_out", 5, rounds=rounds))
    work.append(functools.partial(tenth_estimator, dense[0], 6, rounds=rounds))
    work.append(functools.partial(tenth_of_the_command, dense[0], 6, rounds=rounds))
    for estimator, rows in VERDICTS:
        work.append(functools.partial(model_verdicts, estimator, rows, rounds=min(rounds, 3)))
    written, few = find_problem("lm-large/written"), min(rounds, 3)
    work.append(functools.partial(sketched, digits_of_six(8), batches=DRAWS, directions=DIRECTIONS, rounds=few))
    work.append(functools.partial(sketched, written, batches=WRITTEN, directions=DIRECTIONS, rounds=few))
    work.append(functools.partial(tenth_in_a_sketch, written, batches=WRITTEN, directions=DIRECTIONS, rounds=few))
    where = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    for device in where:
        small = functools.partial(find_problem, written.name)
        work.append(functools.partial(beside_sampling, small, draws=GIVEN, device=device, rounds=few))
        if device != "cpu":
            work.append(functools.partial(beside_sampling, writer, draws=GIVEN, device=device, rounds=few))
    for name, numbers in SAMPLED.items():
        work += [functools.partial(sampled, find_problem(name), draws=n, rounds=rounds) for n in numbers]
    out: list[Ratio] = []
    with one_core():
        for done, step in enumerate(work):
            if progress is not None:
                progress("bench", done, len(work))
            out += step()
    return out


@contextmanager
def one_core() -> Iterator[None]:
    """Within, this process runs on one core, where the system can say so: no rival gets a second one."""
    before = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    if before:
        os.sched_setaffinity(0, {max(before)})
    try:
        yield
    finally:
        if before:
            os.sched_setaffinity(0, before)
