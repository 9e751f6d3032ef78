"""The transformer and its policy on a tree, against a transformer in numpy and one text at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.special import erf
from torch import Tensor, nn

from pgcheck import truth
from pgcheck.engines.exact import exact_moments
from pgcheck.envs import language
from pgcheck.envs.language import LMTask
from pgcheck.errors import BudgetError, ProblemError
from pgcheck.estimators.base import find_estimator
from pgcheck.estimators.lookup import FILLED_BY  # noqa: F401  (fills the registries)
from pgcheck.policies import LMPolicy, TinyGPT, tabular, truncated
from pgcheck.policies.tabular import in_parameters, logit_gram, logit_jacobian
from pgcheck.problem import Problem
from pgcheck.verdicts.verdict import measure

TASK = language.tool_dialogue()
Array = NDArray[np.float64]


def model(**changes: int) -> TinyGPT:
    return TinyGPT(5, **({"width": 8, "layers": 2, "seed": 1} | changes))


# -- the transformer


def by_hand(gpt: TinyGPT, tokens: list[int]) -> Array:
    """Logits after the last of the tokens: position by position, head by head."""
    w = {name: p.detach().numpy() for name, p in gpt.named_parameters()}

    def norm(x: Array, name: str) -> Array:
        z = (x - x.mean()) / np.sqrt(x.var() + 1e-5)
        return z * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x: Array, name: str) -> Array:
        return np.asarray(w[f"{name}.weight"] @ x + w[f"{name}.bias"])

    xs = [w["token.weight"][token] + w["position.weight"][i] for i, token in enumerate(tokens)]
    D = len(xs[0])
    for b, block in enumerate(gpt.blocks):
        name, H = f"blocks.{b}", block.heads
        qkv = [linear(norm(x, f"{name}.norm_attention"), f"{name}.qkv") for x in xs]
        after = []
        for i, x in enumerate(xs):
            heads = []
            for h in range(H):
                part = slice(h * D // H, (h + 1) * D // H)
                q, ks = qkv[i][:D][part], [y[D : 2 * D][part] for y in qkv[: i + 1]]
                e = np.exp([q @ k / math.sqrt(D // H) for k in ks])
                heads.append(sum(a * y[2 * D :][part] for a, y in zip(e / e.sum(), qkv, strict=False)))
            x = x + linear(np.concatenate(heads), f"{name}.out")
            up = linear(norm(x, f"{name}.norm_mlp"), f"{name}.up")
            after.append(x + linear(up * 0.5 * (1 + erf(up / math.sqrt(2))), f"{name}.down"))
        xs = after
    return linear(norm(xs[-1], "norm"), "head")


def test_the_transformer_is_one() -> None:
    gpt = model()
    with torch.no_grad():  # scales and biases that do something
        for p in gpt.parameters():
            p.add_(torch.linspace(-0.1, 0.1, p.numel(), dtype=p.dtype).reshape(p.shape))
        tokens = [1, 4, 0, 3]
        found = gpt(torch.tensor([tokens]))[0]
    for i in range(4):
        np.testing.assert_allclose(found[i].numpy(), by_hand(gpt, tokens[: i + 1]), rtol=0, atol=1e-13)


def test_nothing_ahead_is_seen() -> None:
    gpt = model()
    a, b = torch.tensor([[1, 2, 3, 4, 0]]), torch.tensor([[1, 2, 3, 0, 2]])
    with torch.no_grad():
        assert torch.equal(gpt(a)[:, :3], gpt(b)[:, :3])
        assert not torch.allclose(gpt(a)[:, 3:], gpt(b)[:, 3:])


def test_weights_come_from_the_seed_alone() -> None:
    """Whatever was drawn before, and with nothing drawn from the global stream; three decimals, so no machine shows."""
    before = torch.get_rng_state()
    first = model()
    assert torch.equal(before, torch.get_rng_state())
    with torch.random.fork_rng():
        torch.manual_seed(99)
        second = model()
    weights = [torch.cat([p.detach().flatten() for p in gpt.parameters()]) for gpt in (first, second, model(seed=2))]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert torch.equal(weights[0], weights[0].round(decimals=3))
    assert weights[0].dtype == torch.float64


# -- the policy on the tree


def test_the_tree_is_one_text_at_a_time() -> None:
    gpt = model()
    policy = LMPolicy(gpt, TASK.contexts, vocab_size=5)
    with torch.no_grad():
        alone = torch.stack([gpt(torch.tensor([tokens]))[0, -1] for tokens in TASK.contexts])
        torch.testing.assert_close(policy(), alone, rtol=0, atol=1e-13)
    assert len(policy.tokens) < len(TASK.contexts)  # shorter texts are read on the way
    rows = [slice(i, i + 1) for i in range(len(policy.tokens))]
    assert sorted(torch.cat([policy.contexts_of(r) for r in rows]).tolist()) == list(range(len(TASK.contexts)))


def test_it_is_a_copy() -> None:
    gpt = model()
    policy = LMPolicy(gpt, TASK.contexts, vocab_size=5)
    before = policy().detach()
    with torch.no_grad():
        gpt.head.weight.zero_()
    assert torch.equal(policy(), before)


class Noncausal(nn.Module):
    """Adds the last token's number to every logit of token 0."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = model()

    def forward(self, tokens: Tensor) -> Tensor:
        bump = torch.zeros(5, dtype=torch.float64)
        bump[0] = 1e-3
        out: Tensor = self.inner(tokens) + tokens[:, -1, None, None] * bump
        return out


def test_a_model_that_looks_ahead_is_refused() -> None:
    with pytest.raises(ProblemError, match="not causal"):
        LMPolicy(Noncausal(), TASK.contexts, vocab_size=5)
    with pytest.raises(ProblemError, match="not causal"):  # a single line of texts, each once
        LMPolicy(Noncausal(), [(1,), (1, 2), (1, 2, 3)], vocab_size=5)


def test_dropout_is_named_and_random_state_kept() -> None:
    noisy = nn.Sequential(model(), nn.Dropout(0.5))
    before = torch.get_rng_state()
    with pytest.raises(ProblemError, match=r"train mode and has dropout \(module '1'\).*eval\(\)"):
        LMPolicy(noisy, TASK.contexts, vocab_size=5)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(LMPolicy(noisy.eval(), TASK.contexts, vocab_size=5)(), Problem(TASK, model()).policy())


def test_truncation() -> None:
    """Of .5, .3, .15, .05: top-p .8 keeps two (.5 + .3 reaches it), .81 three; of two equal ones the lower stays."""
    logits = torch.tensor([[0.15, 0.5, 0.05, 0.3]], dtype=torch.float64).log()
    kept = {
        "top_k": {1: [1], 2: [1, 3], 4: [0, 1, 2, 3]},
        "top_p": {0.4: [1], 0.8: [1, 3], 0.81: [0, 1, 3], 1.0: [0, 1, 2, 3]},
    }
    for rule, cases in kept.items():
        for x, tokens in cases.items():
            cut = truncated(logits, **{rule: x})  # type: ignore[arg-type]
            assert torch.isfinite(cut[0]).nonzero().flatten().tolist() == tokens, (rule, x)
            assert torch.equal(cut[0, tokens], logits[0, tokens])
    both = truncated(logits, top_k=2, top_p=0.6)  # top-p of what top-k leaves: .625 reaches it
    assert torch.isfinite(both[0]).nonzero().flatten().tolist() == [1]
    assert torch.isfinite(truncated(torch.zeros(1, 3), top_k=1)).tolist() == [[True, False, False]]


# -- in parameters


def nudged(problem: Problem, theta: Tensor) -> float:
    """J at θ."""
    nn.utils.vector_to_parameters(theta, problem.policy.parameters())
    return float(truth.value_by_enumeration(problem.trajectories.paths, problem.policy().detach()))


@pytest.mark.parametrize("name", ["parity", "tool_dialogue"])
def test_the_gradient_in_parameters(name: str) -> None:
    """Against central differences of J along random directions, and the enumerated J differentiated in one piece."""
    task = getattr(language, name)()
    problem = Problem(task, TinyGPT(task.vocab_size, width=8, layers=2, seed=4))
    found = problem.parameter_gradient()
    paths = problem.trajectories.paths
    whole = torch.autograd.grad(truth.value_by_enumeration(paths, problem.policy()), list(problem.policy.parameters()))
    torch.testing.assert_close(found, torch.cat([g.flatten() for g in whole]), rtol=0, atol=1e-14)
    theta = nn.utils.parameters_to_vector(problem.policy.parameters()).detach()
    generator, h = torch.Generator().manual_seed(0), 1e-3
    for _ in range(4):
        v = torch.randn(theta.shape, generator=generator, dtype=torch.float64)
        v /= v.norm()
        near, far = (nudged(problem, theta + k * h * v) - nudged(problem, theta - k * h * v) for k in (1, 2))
        assert (8 * near - far) / (12 * h) == pytest.approx(float(found @ v), abs=1e-10)


def test_jacobian_row_by_row() -> None:
    """Against one ordinary backward pass for each logit; the vector-Jacobian product and the Gram matrix follow."""
    policy = Problem(language.parity(), TinyGPT(3, width=4, layers=1, seed=5)).policy
    z = policy()
    rows = [
        torch.cat([g.flatten() for g in torch.autograd.grad(logit, list(policy.parameters()), retain_graph=True)])
        for logit in z.flatten()
    ]
    expected = torch.stack(rows)
    found = logit_jacobian(policy)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)
    x = torch.linspace(-1, 1, z.numel(), dtype=torch.float64).reshape(z.shape)
    torch.testing.assert_close(in_parameters(policy, x), expected.T @ x.flatten(), rtol=0, atol=1e-13)
    gram = expected @ expected.T
    torch.testing.assert_close(logit_gram(policy), gram, rtol=0, atol=1e-14 * float(gram.abs().max()))


def test_a_verdict_in_parameters() -> None:
    """Moments there are those of every batch's own ĝ_θ: the trace of the dense covariance, and the same verdict."""
    problem = Problem(language.parity(), TinyGPT(3, width=4, layers=1, seed=6), group_size=2)
    names = {"leave_one_out": "unbiased", "batch_mean": "proportional", "grpo": "biased"}
    for name, expected in names.items():
        estimator = find_estimator(name)
        (moments,) = exact_moments([estimator], problem)
        mean, covariance = moments.in_parameters()
        torch.testing.assert_close(moments.mean_in_parameters(), mean, rtol=0, atol=1e-14)
        assert moments.total_variance_in_parameters() == pytest.approx(float(covariance.trace()), rel=1e-12)
        x = measure(estimator, problem, moments, space="parameters")
        assert x.finding == measure(estimator, problem, moments).finding == expected
        assert x.gradient_norm == pytest.approx(float(problem.parameter_gradient().norm()), rel=1e-12)
        assert x.total_variance == pytest.approx(float(covariance.trace()), rel=1e-12)


def test_a_jacobian_that_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean needs none."""
    monkeypatch.setattr(tabular, "JACOBIAN_ELEMENTS", 1000)
    problem = Problem(language.parity(), TinyGPT(3, width=4, layers=1))
    assert len(problem.parameter_gradient()) == sum(p.numel() for p in problem.policy.parameters())
    with pytest.raises(BudgetError, match="Jacobian of 42 logits"):
        problem.logit_jacobian()


# -- the target: 26 thousand parameters, 781 completions


LARGE = LMTask(
    [(1, 2)], vocab_size=6, eos=0, max_new_tokens=4, reward=lambda prompt, text: float(sum(text) % 3 == sum(prompt) % 3)
)


@pytest.mark.parametrize("size", [2, 8, 16])
def test_leave_one_out_on_781_completions(size: int) -> None:
    """Two returns: groups of 16 by class counts, 17 · 781 evaluations at most."""
    problem = Problem(LARGE, TinyGPT(6), group_size=size)
    assert (LARGE.completions, problem.rows) == (781, size)
    (moments,) = exact_moments([find_estimator("leave_one_out")], problem)
    assert moments.enumerated <= (size + 1) * 781
    truth_ = problem.parameter_gradient()
    assert len(truth_) > 25_000
    assert float((moments.mean_in_parameters() - truth_).norm() / truth_.norm()) < 1e-12
