"""What is known in closed form of group estimators and penalties, on a transformer, in its parameters θ.

The other side of each equation is written out over completions: their tokens by `itertools`, their log-probabilities by
teacher forcing of the model itself, gradients by autograd in θ. It shares nothing with trajectories, engines or the zoo.

    p(y) = Π_t π(y_t | x, y_<t)        S(y) = ∇_θ log p(y)        E_π f = Σ_y p(y) f(y)
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pytest
import torch
from torch import Tensor

from pgcheck import LMTask, Problem, TinyGPT
from pgcheck.engines.exact import exact_moments
from pgcheck.estimators import advantages as adv
from pgcheck.estimators import aggregation as agg
from pgcheck.estimators import ratios
from pgcheck.estimators.base import Estimator, find_estimator, from_coefficients
from pgcheck.estimators.lookup import FILLED_BY  # noqa: F401  (fills the registries)
from pgcheck.estimators.zoo import compose
from pgcheck.policies import truncated

PROMPT = (1, 1)


def model(seed: int = 0, vocab_size: int = 3) -> TinyGPT:
    return TinyGPT(vocab_size, width=8, layers=1, seed=seed)


@dataclass
class Completions:
    """Every completion of the prompt with at most `most` tokens; 0 ends one, unless `eos` is False."""

    vocab_size: int
    most: int
    eos: bool = True

    @cached_property
    def texts(self) -> list[tuple[int, ...]]:
        if not self.eos:
            return list(itertools.product(range(self.vocab_size), repeat=self.most))
        every = (y for n in range(1, self.most + 1) for y in itertools.product(range(self.vocab_size), repeat=n))
        return [y for y in every if 0 not in y[:-1] and (y[-1] == 0 or len(y) == self.most)]

    def token_logps(self, policy: TinyGPT) -> list[Tensor]:
        """log π(y_t | x, y_<t), `[|y|]` of each completion, one at a time."""
        out = []
        for y in self.texts:
            logits = policy(torch.tensor([[*PROMPT, *y]]))[0, len(PROMPT) - 1 : -1]
            out.append(torch.log_softmax(logits, -1)[torch.arange(len(y)), torch.tensor(y)])
        return out

    def logps(self, policy: TinyGPT) -> Tensor:
        return torch.stack([x.sum() for x in self.token_logps(policy)])

    def problem(self, policy: TinyGPT, reward: Callable[[Sequence[int]], float], **settings: Any) -> Problem:
        task = LMTask(
            [PROMPT], vocab_size=self.vocab_size, eos=0 if self.eos else None, max_new_tokens=self.most,
            reward=lambda prompt, text: reward(text),
        )  # fmt: skip
        return Problem(task, policy, **settings)

    def rewards(self, reward: Callable[[Sequence[int]], float]) -> Tensor:
        return torch.tensor([reward(y) for y in self.texts], dtype=torch.float64)


def slope(value: Tensor, policy: TinyGPT) -> Tensor:
    """∇_θ, `[P]`."""
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, list(policy.parameters()))])


def in_parameters(e: Estimator, problem: Problem) -> Tensor:
    (moments,) = exact_moments([e], problem)
    return moments.mean_in_parameters()


def close(found: Tensor, expected: Tensor) -> None:
    assert float((found - expected).norm()) <= 1e-10 * float(expected.norm()), (found.norm(), expected.norm())


def graded(text: Sequence[int]) -> float:
    """Three values, on completions of all lengths."""
    return float(sum(text) % 3) + 0.25 * len(text)


RAGGED = Completions(3, 2)  # 7 completions of 1 or 2 tokens


# -- 0/1 rewards


@pytest.mark.parametrize("G", range(2, 9))
@pytest.mark.parametrize("seed", [0, 1])
def test_grpo_weighs_a_prompt_by_its_difficulty(G: int, seed: int) -> None:
    """Equal lengths T, one prompt, no ε: E ĝ = w_G(p)/T ∇p, w_G = E √(q̂(1 − q̂)) / (p(1 − p)), q̂ ~ Bin(G, p)/G."""
    policy, T = model(seed, vocab_size=2), 3
    world = Completions(2, T, eos=False)
    problem = world.problem(policy, lambda text: float(sum(text) == 2), groups=1, group_size=G)
    right = world.rewards(lambda text: float(sum(text) == 2))
    p = (world.logps(policy).exp() * right).sum()
    q = float(p.detach())
    spread = math.fsum(math.comb(G, n) * q**n * (1 - q) ** (G - n) * math.sqrt(n * (G - n)) / G for n in range(1, G))
    grpo = compose(adv.standardised_return("group", eps=0.0), ratio=ratios.ppo_clip(), aggregation=agg.sequence_mean)
    found = in_parameters(from_coefficients(grpo, couples="group", reads=("return",)), problem)
    close(found, spread / (q * (1 - q)) / T * slope(p, policy))


# -- normalisers


@pytest.mark.parametrize("G", [2, 3])
@pytest.mark.parametrize("name", ["rows", "constant", "sequence", "tokens"])
def test_what_a_normaliser_makes_of_rloo(name: str, G: int) -> None:
    """Σ_i (R_i − mean of the others) S_i / n: n = G gives ∇J, 4G gives ∇J/4, G|y_i| gives E (R − J) S/|y|, which is no
    gradient of J, and Σ_j |y_j| depends on the other rows, too: a sum over all tuples of completions."""
    policy = model()
    R, L = RAGGED.rewards(graded), [len(y) for y in RAGGED.texts]
    chosen = {
        "rows": agg.mean_of_rows, "constant": agg.constant_length(4), "sequence": agg.sequence_mean, "tokens": agg.token_mean,
    }  # fmt: skip
    rloo = compose(adv.return_minus(adv.mean_of_others("group")), aggregation=chosen[name])
    found = in_parameters(
        from_coefficients(rloo, couples="batch"), RAGGED.problem(policy, graded, groups=1, group_size=G)
    )
    logp = RAGGED.logps(policy)
    p = logp.exp().detach()
    J = (logp.exp() * R).sum()
    if name in ("rows", "constant"):
        close(found, slope(J, policy) / (1 if name == "rows" else 4))
        return
    if name == "sequence":
        close(found, slope((p * (R - J.detach()) / torch.tensor(L) * logp).sum(), policy))
        return
    share = [0.0] * len(L)  # E Σ_i 1[row i is y] a_i / Σ|y|
    for drawn in itertools.product(range(len(L)), repeat=G):
        q, total = math.prod(float(p[n]) for n in drawn), float(sum(R[n] for n in drawn))
        for n in drawn:
            share[n] += q * (float(R[n]) - (total - float(R[n])) / (G - 1)) / sum(L[m] for m in drawn)
    close(found, slope((torch.tensor(share, dtype=torch.float64) * logp).sum(), policy))


# -- off-policy


@pytest.mark.parametrize("seed", [1, 2])
def test_cispo_is_the_gradient_of_a_capped_ratio(seed: int) -> None:
    """With θ_old and Â fixed: ∇_θ E_old Σ_i Σ_t h_c(r_it) Â_i / Σ|y|, h_c(r) = r up to c = 1.1, c (1 + log r/c) above."""
    policy, old = model(0), model(seed)
    problem = RAGGED.problem(policy, graded, behavior_logits=old, groups=1, group_size=2)
    found = in_parameters(find_estimator("cispo"), problem)
    R, now = RAGGED.rewards(graded), RAGGED.token_logps(policy)
    before = [x.detach() for x in RAGGED.token_logps(old)]
    mu = [math.exp(float(x.sum())) for x in before]
    c, objective, clipped = 1.1, torch.zeros(()).double(), False
    for n, m in itertools.product(range(len(R)), repeat=2):
        std = float((R[n] - R[m]).abs()) / 2
        if std == 0:
            continue
        for own, other in ((n, m), (m, n)):
            r = (now[own] - before[own]).exp()
            clipped = clipped or bool((r > c).any())
            h = torch.where(r <= c, r, c * (1 + (r / c).log()))
            advantage = float(R[own] - R[other]) / 2 / (std + 1e-6)
            objective = objective + mu[n] * mu[m] * advantage * h.sum() / (len(now[n]) + len(now[m]))
    assert clipped
    close(found, slope(objective, policy))


@pytest.mark.parametrize(("cut", "whole"), [({}, True), ({"top_p": 0.8}, False), ({"top_k": 2}, False)])
def test_the_mean_weight_is_what_the_sampler_can_reach(cut: dict[str, Any], whole: bool) -> None:
    """E_old[w] = P(completions that the sampler can write): 1 with full support, less under top-p and top-k."""
    policy, old = model(0), model(3)
    plain = RAGGED.problem(policy, graded, behavior_logits=old)
    logits = plain.behavior_logits
    problem = RAGGED.problem(policy, graded, behavior_logits=truncated(logits, **cut) if cut else logits)
    t = problem.trajectories
    reach = t.behavior_probability > 0
    w = (t.logp - t.behavior_logp)[reach].sum(-1).exp()
    found = float((t.behavior_probability[reach] * w).sum())

    def cuts(y: Sequence[int]) -> bool:  # from the model's own probabilities, one token at a time
        for i, token in enumerate(y):
            pi = torch.softmax(old(torch.tensor([[*PROMPT, *y[:i]]]))[0, -1], -1).detach()
            larger = float(pi[pi > pi[token]].sum())
            rank = int((pi > pi[token]).sum())
            if larger >= cut.get("top_p", 1.0) or rank >= cut.get("top_k", 3):
                return True
        return False

    p = RAGGED.logps(policy).exp().detach().tolist()
    reachable = math.fsum(q for q, y in zip(p, RAGGED.texts, strict=True) if not cuts(y))
    assert found == pytest.approx(reachable, rel=1e-12)
    assert (reachable == pytest.approx(1.0, abs=1e-12)) == whole


# -- KL

BETA = 0.3


@pytest.mark.parametrize(
    "name", ["kl_in_reward(k1)", "kl_in_reward(k3)", "kl_loss(k1, token)", "kl_loss(k2, token)", "kl_loss(k2, sequence)",
             "kl_loss(k3, token)", "kl_loss(k3, sequence)"],
)  # fmt: skip
def test_what_each_kl_term_is_the_gradient_of(name: str) -> None:
    """d_t = log π/π_ref of a token, D of the completion (Tang & Munos, arXiv 2506.09477):

    k1 in the reward, k2 of the sequence: −β ∇KL(π‖π_ref); k3 of the sequence: −β ∇KL(π_ref‖π); k1 as a loss: nothing; k3 in the
    reward: −β E[Σ_t k3(d_t) S]; k2 and k3 of a token: −β E Σ_t d_t ∇log π_t and −β E Σ_t (1 − e^{−d_t}) ∇log π_t.
    """
    policy, ref = model(0), model(4)
    problem = RAGGED.problem(policy, graded, ref_logits=ref, kl_coefficient=BETA, groups=1, group_size=1)
    tokens = RAGGED.token_logps(policy)
    of_ref = [x.detach() for x in RAGGED.token_logps(ref)]
    logp, log_ref = torch.stack([x.sum() for x in tokens]), torch.stack([x.sum() for x in of_ref])
    p, q = logp.exp(), log_ref.exp()
    J = (p * RAGGED.rewards(graded)).sum()
    fixed = p.detach()

    def by_token(weight: Callable[[Tensor], Tensor]) -> Tensor:
        """E Σ_t weight(d_t) ∇log π_t, as a function whose gradient it is."""
        return torch.stack(
            [
                fixed[n] * (weight((x - y).detach()) * x).sum()
                for n, (x, y) in enumerate(zip(tokens, of_ref, strict=True))
            ]
        ).sum()

    k3 = torch.stack([((y - x).exp() - 1 + x - y).sum() for x, y in zip(tokens, of_ref, strict=True)]).detach()
    penalty = {
        "kl_in_reward(k1)": (p * (logp - log_ref)).sum(),
        "kl_in_reward(k3)": (fixed * k3 * logp).sum(),
        "kl_loss(k1, token)": torch.zeros(()).double(),
        "kl_loss(k2, token)": by_token(lambda d: d),
        "kl_loss(k2, sequence)": (p * (logp - log_ref)).sum(),
        "kl_loss(k3, token)": by_token(lambda d: 1 - (-d).exp()),
        "kl_loss(k3, sequence)": (q * (log_ref - logp)).sum(),
    }[name]
    close(in_parameters(find_estimator(name), problem), slope(J - BETA * penalty, policy))
