"""Training steps in parameters: whether one is an estimator batch by batch, and why its expectation is not ∇_θ J.

The cause is found by trying. E ĝ_θ is compared, up to a factor, with ∇_θ J; with that of every estimator of the zoo and the
broken shelf; and with that of steps put together from what goes wrong in a loop over tokens:

    Σ_i a_i Σ_l M[i, l] r[i, l] ∇_θ log p(token l of row i) / normaliser

for each advantage a, normaliser (over rows, tokens, micro-batches), ratio r, mask M (the prompt in it, the eos not, …) and way
to get at log p (not shifted, another temperature, …). A row's share E Σ_i 1[row i is rollout n] a_i / normaliser is one
number, so a candidate is one weighted sum over the N rollouts; a few random directions sieve them, and what is left is
differentiated.

Guarantee: a cause is reported only if it holds at 1e-9 in all parameters, or is said to hold nearly, and how nearly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from pgcheck.engines.coefficients import estimates
from pgcheck.engines.direct import DirectMoments, StepRunner, direct_estimates
from pgcheck.engines.enumeration import Batches
from pgcheck.errors import UsageError
from pgcheck.estimators import advantages as adv
from pgcheck.estimators.base import Estimator
from pgcheck.policies import LMPolicy
from pgcheck.problem import Problem
from pgcheck.rollouts import Rollouts, token_table
from pgcheck.verdicts.diagnose import NEARLY, candidates, expectations
from pgcheck.verdicts.verdict import RTOL, Measurement

SAME_BATCHES = 32  # random batches on which a step is compared with an estimator
_DIRECTIONS = 4  # of the sieve
_SIEVE = 2e-2  # of the size, along those: what passes is compared in all parameters


def same_as_gap(runner: StepRunner, estimator: Estimator) -> float:
    """The largest ‖ĝ_θ − ĝ_θ of `estimator`‖ over random batches, relative to the largest of the latter.

    Raises:
        UsageError: its groups are too small for the estimator, or it draws for itself.
    """
    problem = runner.problem
    table = problem.trajectories_with(estimator.needs)
    if not estimator.fits(problem) or len(table) != len(problem.trajectories):
        raise UsageError(
            f"same_as: '{estimator.name}' needs groups of at least {estimator.min_group_size} on '{problem.name}', and no draws"
            " of its own."
        )
    index = Batches(table, problem.sizes).random(SAME_BATCHES, seed=7)
    logits = estimates(estimator, table, index, problem.group_labels).unflatten(1, (table.contexts, -1))
    expected = torch.stack([runner.trained(problem.in_parameters(x)) for x in logits])
    found = direct_estimates(runner.step, problem, index)
    size, gap = float(expected.norm(dim=1).max()), float((found - expected).norm(dim=1).max())
    return gap / size if size > 0 else gap


# -- causes


@dataclass(frozen=True)
class Parts:
    """A step put together; each part is a key of a table below, micro-batches have `rows` rows."""

    advantage: str
    over: str  # "group", "batch" or "micro-batch"
    normaliser: str
    ratio: str
    mask: str
    logp: str
    rows: int = 0

    @property
    def mistakes(self) -> int:
        """How many parts are none of a published estimator's."""
        return sum((self.over == "micro-batch", self.normaliser == "micro", self.mask != "response", self.logp != ""))


@dataclass(frozen=True)
class Cause:
    """What a step is in expectation: `factor` × `subject`.

    `kind` "zero": nothing, on every batch. "clipped": its norm is cut off at `factor`. "gradient": ∇J. "parameters": ∇J but for
    those named. "estimator": that of the zoo or, with a `mistake`, of the broken shelf. "step": put together of `parts`.
    """

    kind: Literal["zero", "clipped", "gradient", "parameters", "estimator", "step"]
    subject: str = ""
    factor: float = 1.0
    named: tuple[str, ...] = ()  # what the factor may be: "1/B", …
    mistake: str = ""
    parts: Parts | None = None
    gap: float = 0.0  # of the size, where that is more than rounding


def find_cause(runner: StepRunner, run: DirectMoments, m: Measurement) -> Cause | None:
    """The simplest cause that explains E ĝ_θ; None if nothing that was tried does."""
    mean, truth = m.expected.reshape(-1), m.truth.reshape(-1)
    if float(run.norms.max()) <= RTOL * max(float(truth.norm()), 1e-300):
        return Cause("zero")
    found = _fit(mean, truth, m.size)
    if found is not None and found[1] <= RTOL:
        return Cause("gradient", factor=found[0], named=_named(found[0], runner.problem, micro=run.ordered))
    cut = _cut_off(run.norms)
    if cut is not None:
        return Cause("clipped", factor=cut)
    if (names := _wrong_parameters(runner, mean, truth, m.size)) is not None:
        return Cause("parameters", subject=", ".join(names))
    if runner.problem.logits.shape[0] * (runner.problem.logits.shape[1] - 1) < 3:
        return None  # in so few numbers everything is a multiple of everything
    tried = list(_steps(runner, run, mean, m.size))
    for mistaken in (False, True):  # an estimator of the zoo explains more than a step put together, a mistake less
        if not any(c.gap == 0 and price <= mistaken for price, c in tried):
            tried += _estimators(runner, mean, m.size, mistaken=mistaken)
    return min(tried, key=lambda pair: (pair[1].gap > 0, pair[0]), default=(0.0, None))[1]


def _fit(mean: Tensor, other: Tensor, size: float) -> tuple[float, float] | None:
    """(κ, ‖mean − κ · other‖ / size) with the κ that fits best; 1 if that fits as well."""
    square = float(other @ other)
    if square <= (RTOL * size) ** 2:
        return None
    kappa = float(mean @ other) / square
    if abs(kappa - 1.0) <= 1e-6 and float((mean - other).norm()) <= RTOL * size:
        kappa = 1.0
    return kappa, float((mean - kappa * other).norm()) / size


def _named(factor: float, p: Problem, *, micro: bool = False) -> tuple[str, ...]:
    """What a factor may be, on this problem."""
    B, n = p.rows, p.groups
    letters = {"−1": -1, "B": B, "1/B": 1 / B, "(B−1)/B": (B - 1) / B, "B/(B−1)": B / (B - 1) if B > 1 else math.nan}
    if n > 1:
        letters |= {"groups": n, "1/groups": 1 / n}
    if len(set(p.sizes)) == 1 and p.sizes[0] > 1:
        G = p.sizes[0]
        letters |= {"G": G, "1/G": 1 / G, "(G−1)/G": (G - 1) / G, "G/(G−1)": G / (G - 1)}
    if micro:
        for m in range(2, B):
            letters |= {f"({m}−1)/{m}, for micro-batches of {m} rows": (m - 1) / m} if B % m == 0 else {}
    return tuple(name for name, x in letters.items() if abs(x - factor) <= 1e-9 * abs(factor))


def _cut_off(norms: Tensor) -> float | None:
    """The norm at which many batches' gradients are cut off, if there is one: a quarter of them have the same, and the largest.

    clip_grad_norm_ divides by the norm + 1e-6, so the same is to 1e-4."""
    top = float(norms.max())
    near = (norms >= top * (1 - 1e-4)).double().mean()
    exact = (norms >= top * (1 - 1e-12)).double().mean()
    return top if float(near) >= 0.25 and float(exact) < 0.9 * float(near) else None


def _wrong_parameters(runner: StepRunner, mean: Tensor, truth: Tensor, size: float) -> list[str] | None:
    """Those whose gradient is off, if there are others, with a gradient, that are right."""
    sizes = [p.numel() for p in runner.parameters.values()]
    right, wrong = [], []
    for name, m, g in zip(runner.parameters, mean.split(sizes), truth.split(sizes), strict=True):
        if float((m - g).norm()) > RTOL * size:
            wrong.append(name)
        elif float(g.norm()) > 1e-3 * float(truth.norm()):
            right.append(name)
    return wrong if right and wrong else None


_Priced = tuple[float, Cause]  # of two causes, the one with the lower number is the simpler


def _estimators(runner: StepRunner, mean: Tensor, size: float, *, mistaken: bool) -> Iterator[_Priced]:
    """Known estimators with that expectation up to a factor: the zoo, or those that are wrong on purpose."""
    p, known = runner.problem, {c.estimator.name: c for c in candidates() if bool(c.mistake) == mistaken}
    found = expectations([c.estimator for c in known.values() if c.estimator.fits(p)], p)
    for name, x in found.items():
        cause = Cause("estimator", name, mistake=known[name].mistake)
        yield from _cause(mean, runner.trained(p.in_parameters(x)), size, p, mistaken, cause)


def _cause(mean: Tensor, other: Tensor, size: float, p: Problem, complexity: float, cause: Cause) -> Iterator[_Priced]:
    fit = _fit(mean, other, size)
    if fit is not None and fit[1] <= NEARLY and fit[0] != 0:
        factor, gap = fit
        named = _named(factor, p)
        price = complexity + (0 if factor == 1.0 else 0.4 if named else 0.6)
        yield price, replace(cause, factor=factor, named=named, gap=gap if gap > RTOL else 0.0)


# -- steps put together

ADVANTAGES: dict[str, adv.Advantage] = {
    "return": adv.episode_return,
    "leave-one-out": adv.return_minus(adv.mean_of_others("group")),
    "less the mean": adv.return_minus(adv.mean_return("group")),
    "standardised": adv.standardised_return("group"),
    "standardised (ddof 1)": adv.standardised_return("group", ddof=1),
}  # a batch is one group for those over the batch, a micro-batch is one for those over it


def _chosen(logp: Tensor, ids: Tensor) -> Tensor:
    return logp.gather(-1, ids.unsqueeze(-1)).squeeze(-1)


def _moved(x: Tensor, by: int) -> Tensor:
    """Columns moved to the right by `by`, 0 moving in."""
    out = torch.zeros_like(x)
    if by > 0:
        out[:, by:] = x[:, :-by]
    else:
        out[:, :by] = x[:, -by:]
    return out


def _at_temperature(tau: float) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda z, ids: _chosen(_moved(torch.log_softmax(z / tau, -1), 1), ids)


LOGPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "": _at_temperature(1.0),
    "not shifted": lambda z, ids: _chosen(torch.log_softmax(z, -1), ids),
    "shifted twice": lambda z, ids: _chosen(_moved(torch.log_softmax(z, -1), 2), ids),
    "of the token before": lambda z, ids: _chosen(_moved(torch.log_softmax(z, -1), 1), _moved(ids, 1)),
    "of the token after": lambda z, ids: _chosen(_moved(torch.log_softmax(z, -1), 1), _moved(ids, -1)),
    "logit": lambda z, ids: _chosen(_moved(z, 1), ids),
    "probability": lambda z, ids: _chosen(_moved(torch.softmax(z, -1), 1), ids),
    **{f"temperature {tau}": _at_temperature(tau) for tau in (0.5, 0.6, 0.7, 0.8, 0.9, 1.1, 1.2, 1.5, 2.0)},
}  # what a step may take for the log-probability of the token in each column, [N, L]


def _masks(t: Rollouts, pad_token_id: int) -> dict[str, Tensor]:
    """What a step may take for the response mask, `[N, L]`; only those that differ from it."""
    own, real = t.response_mask.double(), t.attention_mask.double()
    column = torch.arange(own.shape[1])
    prompt = (column < t.prompt_length.unsqueeze(-1)).double() * (column > 0)
    last = own * (own.flip(-1).cumsum(-1).flip(-1) == 1)
    first = own * (own.cumsum(-1) == 1)
    after = (column >= t.prompt_length.unsqueeze(-1)).double()
    pad_next = (1 - real) * (_moved(real, 1) > 0) * (column > 0)
    found = {
        "response": own,
        "prompt": own + prompt,
        "tool": after * real,
        "all real": real * (column > 0),
        "padding": after * (1 - real) + own,
        "all": (column > 0).double().expand_as(own),
        "one padding": own + pad_next,
        "eos dropped": own * (t.input_ids != pad_token_id),
        "last dropped": own - last,
        "first dropped": own - first,
        "early": _moved(own, -1) * (column > 0),
        "late": _moved(own, 1),
    }
    kept: dict[str, Tensor] = {}
    for name, mask in found.items():
        if not any(torch.equal(mask, other) for other in kept.values()):
            kept[name] = mask
    return kept


def _ratios(p: Problem, t: Rollouts) -> dict[str, tuple[Tensor, Tensor]]:
    """What multiplies ∇log p at each token, `[N, L]`, where the advantage is positive and where it is negative."""
    one = torch.ones_like(t.old_log_probs)
    if p.on_policy:
        return {"": (one, one)}
    logp = torch.zeros_like(one)
    logp[t.response_mask > 0] = p.trajectories.logp[p.trajectories.paths.mask > 0]
    behind = (logp - t.old_log_probs).nan_to_num(posinf=0.0)  # where the sampler never goes
    r, w = behind.exp(), behind.sum(-1, keepdim=True).exp() * one
    clipped = (r * (r <= 1.2), r * (r >= 0.8))
    return {"": (one, one), "token": (r, r), "ppo_clip": clipped, "trajectory": (w, w)}


_Key = tuple[str, str, str, str, int]  # advantage, over what, normaliser, mask, rows of a micro-batch


def _shares(runner: StepRunner, run: DirectMoments, lengths: dict[str, Tensor]) -> dict[_Key, tuple[Tensor, Tensor]]:
    """E Σ_i 1[row i is rollout n] a_i / normaliser, `[N]`, of the positive and of the negative advantages; `lengths` are those
    of each rollout under each mask."""
    p = runner.problem
    B, table = p.rows, p.trajectories
    micro = [m for m in range(1, B) if B % m == 0]
    peers = {("group", 0): p.group_labels, ("batch", 0): torch.zeros(B, dtype=torch.int64)}
    peers |= {("micro-batch", m): torch.arange(B) // m for m in micro if m > 1}
    out: dict[_Key, tuple[Tensor, Tensor]] = {}
    for index, q in Batches(table, p.sizes, run.ordered).blocks(4096):
        normalisers: list[tuple[str, str, int, Tensor]] = []  # each [n, B]
        for mask, length in lengths.items():
            own = length[index].clamp(min=1.0)
            normalisers += [
                ("rows", mask, 0, torch.full_like(own, 1 / B)),
                ("lengths", mask, 0, 1 / (B * own)),
                ("tokens", mask, 0, 1 / own.sum(-1, keepdim=True).expand_as(own)),
            ]
            for m in micro:
                part = own.unflatten(-1, (-1, m)).sum(-1, keepdim=True).expand(-1, -1, m).flatten(1)
                normalisers.append(("micro", mask, m, m / (B * part)))
        for (over, rows), labels in peers.items():
            batch = table.batch(index, labels)
            smallest = int(labels.bincount().min())
            for name, advantage in ADVANTAGES.items():
                if (name == "return" and over != "group") or (name != "return" and smallest < 2):
                    continue
                a = advantage(batch)[..., 0] * q.unsqueeze(-1)
                for normaliser, mask, m, weight in normalisers:
                    if m and rows and m != rows:
                        continue
                    key = (name, over, normaliser, mask, m or rows)
                    plus, minus = out.setdefault(
                        key, (torch.zeros(len(table)).double(), torch.zeros(len(table)).double())
                    )
                    plus.index_add_(0, index.flatten(), (a.clamp(min=0) * weight).flatten())
                    minus.index_add_(0, index.flatten(), (a.clamp(max=0) * weight).flatten())
    return out


class _TokenModel:
    """log p of every token of every rollout in each way of `LOGPS`, as a function of the parameters that a step trains."""

    def __init__(self, runner: StepRunner, tokens: Rollouts) -> None:
        policy = runner.problem.policy
        self.model, self.ids = policy.model, tokens.input_ids
        self.theta = {name: x.detach() for name, x in self.model.named_parameters() if x.requires_grad}

    def logits(self, theta: dict[str, Tensor]) -> Tensor:
        z: Tensor = torch.func.functional_call(self.model, theta, (self.ids,))
        return z

    def direction(self, seed: int, *, step: float = 1e-4) -> tuple[Tensor, dict[str, Tensor]]:
        """A random direction v `[P]`, and the slope of each log p along it, `[N, L]`, by central differences."""
        generator = torch.Generator().manual_seed(seed)
        v = {n: torch.randn(x.shape, generator=generator, dtype=torch.float64) for n, x in self.theta.items()}
        with torch.no_grad():
            up, down = (self.logits({n: x + h * v[n] for n, x in self.theta.items()}) for h in (step, -step))
            slopes = {name: (f(up, self.ids) - f(down, self.ids)) / (2 * step) for name, f in LOGPS.items()}
        return torch.cat([x.flatten() for x in v.values()]), slopes

    def gradient(self, weight: Tensor, logp: str) -> Tensor:
        """∇_θ Σ weight · log p, `[P]`."""
        leaves = {n: x.clone().requires_grad_(True) for n, x in self.theta.items()}
        total = (weight * LOGPS[logp](self.logits(leaves), self.ids)).sum()
        found = torch.autograd.grad(total, list(leaves.values()), materialize_grads=True)
        return torch.cat([g.flatten() for g in found])


def _steps(runner: StepRunner, run: DirectMoments, mean: Tensor, size: float) -> Iterator[_Priced]:
    """Steps put together that have that expectation up to a factor."""
    p = runner.problem
    if not isinstance(p.policy, LMPolicy):
        return
    tokens = token_table(p, pad_token_id=runner.step.pad_token_id)
    masks, ratios, model = _masks(tokens, runner.step.pad_token_id), _ratios(p, tokens), _TokenModel(runner, tokens)
    seen = [model.direction(seed) for seed in range(_DIRECTIONS)]
    target = torch.stack([v @ mean for v, _ in seen])
    slopes = {name: torch.stack([s[name] for _, s in seen]) for name in LOGPS}  # [D, N, L]
    shares = _shares(runner, run, {name: mask.sum(-1) for name, mask in masks.items()})
    for (advantage, over, normaliser, mask, rows), (plus, minus) in shares.items():
        for ratio, (if_plus, if_minus) in ratios.items():
            weight = masks[mask] * (plus.unsqueeze(-1) * if_plus + minus.unsqueeze(-1) * if_minus)
            for logp in LOGPS if mask == "response" else ("",):  # one mistake at a time
                sketch = (weight * slopes[logp]).sum((1, 2))
                fit = _fit(target, sketch, float(target.norm()))
                if fit is None or fit[1] > _SIEVE:
                    continue
                parts = Parts(advantage, over, normaliser, ratio, mask, logp, rows)
                yield from _cause(
                    mean, model.gradient(weight, logp), size, p, parts.mistakes, Cause("step", parts=parts)
                )
