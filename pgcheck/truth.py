"""J and ∇J by three derivations that share no code: dynamic programming, enumeration, central differences.

    J(π) = E_{s₀, τ~π} Σ_t γ^t (r_t − cost(k_t, a_t))        ∇J in logit space, [K, A]

cost = β log π/π_ref + α log π where the policy acts (`action_cost`), 0 for most problems: J less β times the KL to the
reference plus α times the entropy. Where γ = 1, they are those of whole rollouts: Σ_t E log π/π_ref = KL(p_π‖p_ref).

* dynamic programming: the backward recursion V_t(s) = Σ_a π(a|s) Σ_s' P(s'|s,a) (r − cost + γ V_{t+1}(s')) on the
  environment, differentiated by autograd, through the cost as well;
* enumeration: Σ_τ p(τ) R(τ) Σ_t (1[a_t = ·] − π(·|k_t)), R less what it costs: the score-function identity summed over
  the table of rollouts. The gradient of the cost itself is (β + α) ∇log π(a_t|k_t), of mean 0;
* central differences of fourth order of J, each logit in turn.

On a tree of prefixes (`pgcheck.envs.language.PrefixTree`) the first two are: V(s) = Σ_a π(a|s) Q(s,a) from the last tokens
backward, and ∇J[k, ·] = Σ_{s reads k} P(s) π (Q − V); and J = Σ P(s) π(a|s) (r − cost) from the prompts onward, by autograd.

Guarantee: `agreed_gradient` returns only when two of them agree to 1e-11 relative to the size of the returns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pgcheck.envs.language import PrefixTree
from pgcheck.envs.tabular import TabularMDP
from pgcheck.errors import TruthError
from pgcheck.trajectories import Paths, Trajectories


def action_cost(logits: Tensor, ref_logits: Tensor | None, *, kl: float, entropy: float) -> Tensor | None:
    """kl · log π/π_ref + entropy · log π of each action, `[K, A]`, differentiable in `logits`; None if both are 0."""
    if kl == 0 and entropy == 0:
        return None
    cost = (kl + entropy) * torch.log_softmax(logits, -1)
    return cost if ref_logits is None else cost - kl * torch.log_softmax(ref_logits, -1)


def value_by_dynamic_programming(
    env: TabularMDP, logits: Tensor, contexts: Sequence[int], cost: Tensor | None = None
) -> Tensor:
    """J by backward recursion, differentiable in `logits` `[K, A]` and `cost` `[K, A]`; `contexts[s]` is the context of
    state s."""
    pi = torch.softmax(logits, -1)[torch.as_tensor(contexts)]  # [S, A]
    for s in env.observation:
        pi = pi.index_put((torch.tensor([s]),), torch.eye(env.actions, dtype=pi.dtype)[:1])
    acts = torch.tensor([s not in env.observation and s not in env.terminal for s in range(env.states)])
    over = torch.tensor([s in env.terminal for s in range(env.states)])
    transition, reward = torch.nan_to_num(env.transition), torch.nan_to_num(env.full_reward)
    if cost is not None:
        reward = reward - (cost[torch.as_tensor(contexts)] * acts.unsqueeze(-1)).unsqueeze(-1)
    # Under the "action" clock γ applies on entering a state where the policy acts, from its second action on.
    # V[0] is the value before any action was taken, V[1] after.
    V = logits.new_zeros(2, env.states)
    for _ in range(env.horizon):
        new = []
        for acted in (False, True):
            after = acts | acted  # has anyone acted once this state is left, [S]
            if env.discount_clock == "position":
                gamma = torch.full((env.states, env.states), env.discount, dtype=pi.dtype)
            else:
                discounts = (after.unsqueeze(-1) & acts).to(pi.dtype)
                gamma = discounts * env.discount + (1.0 - discounts)
            following = torch.where(after.unsqueeze(-1), V[1], V[0])  # [S, S']
            q = (transition * (reward + (gamma * following).unsqueeze(1))).sum(-1)
            new.append(torch.where(over, torch.zeros_like(q[:, 0]), (pi * q).sum(-1)))
        V = torch.stack(new)
    return (env.initial * V[0]).sum()


def returns(paths: Paths, cost: Tensor | None = None) -> Tensor:
    """R(τ) = Σ_t γ^t (r_t − cost[k_t, a_t]) of every rollout, `[N]`, written out on its own (see `Batch.episode_return`)."""
    total = torch.zeros(len(paths), dtype=torch.float64)
    acted = torch.zeros(len(paths), dtype=torch.float64)
    for t in range(paths.steps):
        acted = acted + paths.mask[:, t]
        exponent = torch.full_like(acted, t) if paths.discount_clock == "position" else (acted - 1).clamp(min=0)
        paid = paths.reward[:, t]
        if cost is not None:
            paid = paid - cost[paths.context[:, t].clamp(min=0), paths.action[:, t].clamp(min=0)] * paths.mask[:, t]
        total = total + paid * paths.discount**exponent
    return total


def value_by_enumeration(paths: Paths, logits: Tensor, cost: Tensor | None = None) -> Tensor:
    """J = Σ_τ p(τ) R(τ), differentiable in `logits` and `cost`."""
    logp = torch.log_softmax(logits, -1)[paths.context.clamp(min=0), paths.action.clamp(min=0)] * paths.mask
    return (
        paths.start_probability[paths.start] * paths.env_probability * logp.sum(-1).exp() * returns(paths, cost)
    ).sum()


def gradient_by_enumeration(trajectories: Trajectories, cost: Tensor | None = None) -> Tensor:
    """∇J = Σ_τ p(τ) R(τ) Σ_t (1[a_t = ·] − π(·|k_t)), `[K, A]`, without autograd."""
    paths, logits = trajectories.paths, trajectories.logits
    pi = torch.softmax(logits, -1)
    weight = paths.start_probability[paths.start] * trajectories.probability * returns(paths, cost)
    out = torch.zeros_like(pi)
    for t in range(paths.steps):
        acts = paths.mask[:, t] > 0
        k, a, w = paths.context[acts, t], paths.action[acts, t], weight[acts]
        out.index_put_((k, a), w, accumulate=True)
        out -= pi.new_zeros(len(pi)).index_add_(0, k, w).unsqueeze(-1) * pi
    return out


def gradient_by_step(trajectories: Trajectories, cost: Tensor | None = None) -> Tensor:
    """E[γ^t Ĝ_t ∇log π(a_t | k_t)] of each position t, `[T, K, A]`; their sum is ∇J (Sutton et al. 2000, theorem 1)."""
    paths, pi = trajectories.paths, torch.softmax(trajectories.logits, -1)
    rows = trajectories.rows_as_batch()
    if cost is not None:
        rows = replace(rows, reward=rows.reward - cost.reshape(-1)[trajectories.cell] * rows.mask)
    to_go = rows.discount_weight * rows.reward_to_go
    weight = (paths.start_probability[paths.start] * trajectories.probability).unsqueeze(-1) * to_go
    out = torch.zeros(paths.steps, *pi.shape, dtype=pi.dtype)
    for t in range(paths.steps):
        acts = paths.mask[:, t] > 0
        k, a, w = paths.context[acts, t], paths.action[acts, t], weight[acts, t]
        out[t].index_put_((k, a), w, accumulate=True)
        out[t] -= pi.new_zeros(len(pi)).index_add_(0, k, w).unsqueeze(-1) * pi
    return out


def tree_values(tree: PrefixTree, logits: Tensor, cost: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Q `[S, V]` and V `[S]` of every prefix, of the reward less the cost of tokens yet to be written."""
    pi = torch.softmax(logits, -1)
    Q, V = tree.reward.clone(), tree.reward.new_zeros(len(tree.reward))
    for low, high in zip(tree.begins[-2::-1], tree.begins[:0:-1], strict=True):
        k, child = tree.context[low:high], tree.child[low:high]
        Q[low:high] += torch.where(child >= 0, V[child.clamp(min=0)], 0.0)
        if cost is not None:
            Q[low:high] -= cost[k]
        V[low:high] = (pi[k] * Q[low:high]).sum(-1)
    return Q, V


def tree_visits(tree: PrefixTree, logits: Tensor) -> list[Tensor]:
    """P(s) of every prefix, by level, differentiable in `logits`; prompts are equally likely."""
    pi = torch.softmax(logits, -1)
    visits = [logits.new_full((tree.prompts,), 1.0 / tree.prompts)]
    for low, high in zip(tree.begins, tree.begins[1:-1], strict=False):
        onward = visits[-1].unsqueeze(-1) * pi[tree.context[low:high]]
        visits.append(onward[tree.child[low:high] >= 0])  # in the order of the next level
    return visits


def tree_value(tree: PrefixTree, logits: Tensor, cost: Tensor | None = None) -> Tensor:
    """J = Σ_{s,a} P(s) π(a|s) (r(s, a) − cost(s, a)), differentiable in `logits` and `cost`."""
    paid = tree.reward if cost is None else tree.reward - cost[tree.context]
    reached = torch.cat(tree_visits(tree, logits)).unsqueeze(-1) * torch.softmax(logits, -1)[tree.context]
    return (reached * paid).sum()


def tree_gradient_by_step(tree: PrefixTree, logits: Tensor, cost: Tensor | None = None) -> Tensor:
    """Σ_{s at t reads k} P(s) π(a|s) (Q(s, a) − V(s)), `[T, K, V]`, without autograd; the sum over t is ∇J."""
    (Q, V), pi = tree_values(tree, logits, cost), torch.softmax(logits, -1)
    weight = torch.cat(tree_visits(tree, logits)).unsqueeze(-1) * pi[tree.context] * (Q - V.unsqueeze(-1))
    K, A = logits.shape
    place = tree.position * K + tree.context
    return logits.new_zeros(tree.steps * K, A).index_add_(0, place, weight).unflatten(0, (tree.steps, K))


def gradient_by_autograd(value: Callable[[Tensor], Tensor], logits: Tensor) -> Tensor:
    """∇ of `value` at `logits`."""
    leaf = logits.detach().clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(value(leaf), leaf)
    return gradient.detach()


def gradient_by_central_differences(value: Callable[[Tensor], Tensor], logits: Tensor, *, step: float = 1e-3) -> Tensor:
    """(8 (J(z+h) − J(z−h)) − (J(z+2h) − J(z−2h))) / 12h for every logit; error O(h⁴) plus rounding 1e-16 / h."""
    out = torch.zeros_like(logits)
    for k in range(logits.shape[0]):
        for a in range(logits.shape[1]):

            def at(h: float, k: int = k, a: int = a) -> float:
                moved = logits.detach().clone()
                moved[k, a] += h
                return float(value(moved))

            near, far = at(step) - at(-step), at(2 * step) - at(-2 * step)
            out[k, a] = (8 * near - far) / (12 * step)
    return out


def agreed_gradient(first: Tensor, second: Tensor, *, size: float, problem: str) -> Tensor:
    """`first`, if `second` agrees within 1e-11 of `size` (the largest return).

    Raises:
        TruthError: they differ.
    """
    gap = float((first - second).abs().max())
    if not gap <= 1e-11 * max(size, 1e-300):
        raise TruthError(f"{problem}: two derivations of ∇J differ by {gap:.3g}; please report this as a pgcheck bug.")
    return first
