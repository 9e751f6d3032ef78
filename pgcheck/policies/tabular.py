"""Softmax policies over a finite set of contexts: tables, linear features, any torch module over one-hot contexts.

A policy enters pgcheck only as logits z(θ) `[K, A]` and their Jacobian dz/dθ `[K·A, P]`: every verdict is in logit
space, and `E ĝ_θ = (dz/dθ)ᵀ E ĝ` carries it to the parameters: one backward pass, without the Jacobian.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pgcheck.errors import BudgetError, ProblemError, in_words
from pgcheck.policies.transformer import LMPolicy
from pgcheck.trajectories import as_table

Policy = Callable[[], Tensor]
# A policy is called with nothing and returns its logits [K, A], differentiable in its `parameters()` if it has any.


class SoftmaxTable(nn.Module):
    """One free logit per context and action: θ = z, `[K, A]`."""

    def __init__(self, logits: Any) -> None:
        super().__init__()
        self.table = nn.Parameter(as_table("policy_logits", logits))

    def forward(self) -> Tensor:
        return self.table


class ModulePolicy(nn.Module):
    """Any torch module from inputs `[K, F]` to logits `[K, A]`; by default the inputs are one-hot contexts."""

    def __init__(self, module: nn.Module, inputs: Any = None, *, contexts: int | None = None) -> None:
        super().__init__()
        if inputs is None:
            if contexts is None:
                raise ProblemError("policy: a module needs its inputs [K, F], or contexts=K for one-hot inputs.")
            inputs = torch.eye(contexts, dtype=torch.float64)
        self.module = copy.deepcopy(module).to(torch.float64)  # the caller's own stays as it is
        self.inputs: Tensor
        self.register_buffer("inputs", as_table("inputs", inputs))

    def forward(self) -> Tensor:
        logits: Tensor = self.module(self.inputs)
        return logits


class LinearPolicy(ModulePolicy):
    """Logits z = features · weight: `features` `[K, F]`, `weight` `[F, A]`, the parameters."""

    def __init__(self, features: Any, weight: Any) -> None:
        weight, features = as_table("weight", weight), as_table("features", features)
        if features.dim() != 2 or weight.dim() != 2 or features.shape[1] != weight.shape[0]:
            raise ProblemError(
                f"features, weight: shapes {list(features.shape)} and {list(weight.shape)}, expected [K, F] and [F, A]."
            )
        linear = nn.Linear(weight.shape[0], weight.shape[1], bias=False, dtype=torch.float64)
        with torch.no_grad():
            linear.weight.copy_(weight.T)
        super().__init__(linear, features)


def as_policy(policy: Any, contexts: int) -> nn.Module:
    """A policy from a table of logits `[K, A]`, a module over one-hot contexts, or one of the classes above.

    Raises:
        ProblemError: logits that are not a finite `[K, A]` table of numbers.
    """
    if isinstance(policy, LMPolicy):
        return policy if policy.shared else copy.deepcopy(policy)  # it was checked when it was made
    if isinstance(policy, (SoftmaxTable, ModulePolicy)):
        built: nn.Module = copy.deepcopy(policy)  # a problem is frozen, whatever an optimiser does later
    elif isinstance(policy, nn.Module):
        built = ModulePolicy(policy, contexts=contexts)
    else:
        built = SoftmaxTable(policy)
    try:
        logits = built().detach()
    except Exception as error:
        raise ProblemError(f"policy: calling it raises {in_words(error)}.") from error
    check_logits(logits)
    return built


def check_logits(logits: Tensor) -> None:
    """Raise `ProblemError` unless they are a finite table `[K, A]`."""
    if logits.dim() != 2:
        raise ProblemError(f"policy_logits: shape {list(logits.shape)}, expected [K, A].")
    if not bool(torch.isfinite(logits).all()):
        first = float(logits[~torch.isfinite(logits)][0])
        raise ProblemError(
            f"policy_logits: every logit must be finite (a behaviour policy's may be -inf), got {first}."
        )


JACOBIAN_ELEMENTS = 2**27  # 1 GiB: most entries of a dense dz/dθ


def _parameters_of(policy: nn.Module) -> dict[str, Tensor]:
    """θ by name, those that an optimiser would leave alone included.

    Raises:
        ProblemError: the policy has no parameters.
    """
    named = {name: p.detach() for name, p in policy.named_parameters()}
    if not named:
        raise ProblemError("policy: it has no parameters, so there is nothing to take a gradient in.")
    return named


def in_parameters(policy: nn.Module, x: Tensor) -> Tensor:
    """(dz/dθ)ᵀ x, `[P]` in the order of `policy.parameters()`, of `x` `[K, A]`: one backward pass of Σ x · z.

    Raises:
        ProblemError: the policy has no parameters.
    """
    leaves = {name: p.requires_grad_(True) for name, p in _parameters_of(policy).items()}
    total = torch.zeros(sum(p.numel() for p in leaves.values()), dtype=x.dtype, device=x.device)
    places = total.split([p.numel() for p in leaves.values()])
    for rows, contexts in in_parts(policy):
        z: Tensor = torch.func.functional_call(policy, leaves, rows)
        own = x if contexts is None else x.reshape(-1, z.shape[-1])[contexts]
        value = (z * own.reshape(z.shape)).sum()  # a scalar: given grad_outputs, torch imports sympy, for a second
        for place, g in zip(
            places, torch.autograd.grad(value, list(leaves.values()), materialize_grads=True), strict=True
        ):
            place += g.reshape(-1).to(x.device)
    return total


def in_parts(policy: nn.Module, *, tokens: int | None = None) -> list[tuple[tuple[slice, ...], Tensor | None]]:
    """Arguments with which a policy gives some of its contexts at a time, and those contexts; (nothing, None) for all.

    `tokens`: most of them that a language model is to read at once, if not as many as it likes.
    """
    if not isinstance(policy, LMPolicy):
        return [((), None)]
    parts = policy.in_parts_of(min(tokens or policy.tokens_at_once, policy.tokens_at_once))
    return [((rows,), policy.contexts_of(rows)) for rows in parts] if len(parts) > 1 else [((), None)]


def logit_jacobian(policy: nn.Module) -> Tensor:
    """dz/dθ, `[K·A, P]`, columns in the order of `policy.parameters()`.

    Raises:
        ProblemError: the policy has no parameters.
        BudgetError: the table does not fit.
    """
    named = _parameters_of(policy)
    K, A = policy().shape
    P = sum(p.numel() for p in named.values())
    if K * A * P > JACOBIAN_ELEMENTS:
        raise BudgetError(
            f"policy: the Jacobian of {K * A:,} logits in {P:,} parameters has {K * A * P:,} entries; at most"
            f" {JACOBIAN_ELEMENTS:,} are made. A mean in parameters needs none of it; for a variance take fewer contexts or a"
            " smaller model."
        )

    def jacobian(*rows: slice) -> Tensor:
        def logits(parameters: dict[str, Tensor]) -> Tensor:
            out: Tensor = torch.func.functional_call(policy, parameters, rows)
            return out.reshape(-1)

        found = torch.func.jacrev(logits)(named)
        return torch.cat([found[name].reshape(found[name].shape[0], -1) for name in named], -1).detach()

    if not isinstance(policy, LMPolicy):
        return jacobian()
    out = torch.empty(K, A, P, dtype=torch.float64)
    for i in range(len(policy.tokens)):  # a context's logits depend on its own text only
        row = slice(i, i + 1)
        out[policy.contexts_of(row)] = jacobian(row).unflatten(0, (-1, A))
    return out.flatten(0, 1)


def logit_gram(policy: nn.Module) -> Tensor:
    """(dz/dθ)(dz/dθ)ᵀ, `[K·A, K·A]`: tr((dz/dθ)ᵀ Cov (dz/dθ)) is Σ Cov · Gram, without a `[P, P]` matrix.

    Raises:
        ProblemError, BudgetError: as `logit_jacobian`.
    """
    jacobian = logit_jacobian(policy)
    return jacobian @ jacobian.T
