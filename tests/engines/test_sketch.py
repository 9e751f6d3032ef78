"""The sketch engine against backward passes of every batch, and against exact moments in parameters."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor, nn

import pgcheck
from pgcheck.engines import parameters, sketch
from pgcheck.engines.coefficients import coefficients_of
from pgcheck.engines.exact import exact_moments
from pgcheck.engines.monte_carlo import monte_carlo
from pgcheck.engines.parameters import ParameterSpace
from pgcheck.engines.sketch import SketchSpace, exact_in_sketch, sketch_moments
from pgcheck.engines.trusted import trusted_estimator
from pgcheck.envs import language
from pgcheck.envs.language import LMTask
from pgcheck.errors import BudgetError, UsageError
from pgcheck.estimators.lookup import FILLED_BY  # noqa: F401  (fills the registries)
from pgcheck.policies import Decoding, TinyGPT
from pgcheck.problem import Problem
from pgcheck.registry import find_problem

TASK = language.parity()
NAMES = ("leave_one_out", "grpo", "batch_mean", "entropy_bonus(token)")
KINDS = {"table": {}, "tree": {"max_completions": 1}, "written": {"max_completions": 1, "max_prefixes": 1}}


class Cubed(torch.autograd.Function):
    """x³ with a backward pass and nothing else."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * g


class Odd(nn.Module):
    """A TinyGPT with a third power at the end, with or without its forward-mode derivative."""

    def __init__(self, *, backward_only: bool) -> None:
        super().__init__()
        self.inner, self.backward_only = TinyGPT(3, width=8, seed=3), backward_only

    def forward(self, tokens: Tensor) -> Tensor:
        z: Tensor = self.inner(tokens)
        return Cubed.apply(z) if self.backward_only else z**3  # type: ignore[no-any-return, no-untyped-call]


def problem(kind: str = "table", task: LMTask = TASK, model: nn.Module | None = None, **plan: Any) -> Problem:
    model = TinyGPT(task.vocab_size, width=8, layers=2, seed=3) if model is None else model
    return Problem(replace(task, **KINDS[kind]), model, **({"group_size": 2} | plan))


def by_hand(p: Problem, name: str, draws: int) -> tuple[Tensor, Any, Tensor, Tensor]:
    """ĝ_θ of some draws, each by one backward pass of Σ c log π over texts read one at a time; what they were made from."""
    sampler, e = p.sampler(seed=5), pgcheck.as_estimator(name)
    table, index = sampler.draw(0, draws)
    c = coefficients_of(e, table.batch(index, sampler.labels, logits=e.leaf == "logits"))
    model = p.policy.model
    policy = getattr(table, "policy", p.policy)  # for the texts of its contexts
    out = []
    for m in range(draws):
        total = torch.zeros((), dtype=torch.float64)
        for b, n in enumerate(index[m].tolist()):
            for t in range(table.paths.steps):
                if not table.paths.mask[n, t]:
                    continue
                row, place = (int(x) for x in policy.where[:, table.paths.context[n, t]])
                z = model(policy.tokens[row : row + 1, : place + 1])[0, -1]
                if e.leaf == "logits":
                    total = total + (c[m, b, t] * z).sum()
                else:
                    total = total + c[m, b, t] * torch.log_softmax(z, -1)[table.paths.action[n, t]]
        g = torch.autograd.grad(total, list(model.parameters()), allow_unused=True, materialize_grads=True)
        out.append(torch.cat([x.flatten() for x in g]))
    return torch.stack(out), table, index, c


@pytest.mark.parametrize("name", ["grpo", "entropy_bonus(token)"])
@pytest.mark.parametrize("kind", KINDS)
def test_coordinates_are_products(kind: str, name: str) -> None:
    """Of ĝ_θ with each direction; ĝ_θ itself in parameter space."""
    p = problem(kind, language.tool_dialogue(), groups=2)
    expected, table, index, c = by_hand(p, name, 4)
    space = SketchSpace.of(p, directions=5, seed=1)
    assert space.lane == ("backward" if kind == "written" else "forward")
    x = space.project(c, table, index)
    torch.testing.assert_close(x, expected @ space.directions.T, rtol=0, atol=1e-12)
    for how in ("forward", "backward"):
        y = replace(space, how=how).project(c, table, index)
        torch.testing.assert_close(y, expected @ space.directions.T, rtol=0, atol=1e-12)
    torch.testing.assert_close(space.project(c, table, index), x, rtol=0, atol=0)  # asked again, from what it kept
    torch.testing.assert_close(ParameterSpace(p).project(c, table, index), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_forward_mode(kind: str) -> None:
    """A module whose autograd function has only a backward pass: the same numbers as its twin."""
    plain, odd = (problem(kind, model=Odd(backward_only=x)) for x in (False, True))
    forward = "forward" if kind == "written" else None
    spaces = [SketchSpace.of(plain, directions=4, how=forward), SketchSpace.of(odd, directions=4)]
    assert [s.lane for s in spaces] == ["forward", "backward"]
    assert plain.digest == odd.digest
    torch.testing.assert_close(spaces[0].directions, spaces[1].directions, rtol=0, atol=1e-12)
    estimators = [pgcheck.as_estimator(name) for name in NAMES]
    for a, b in zip(*(sketch_moments(estimators, s.problem, batches=20, space=s) for s in spaces), strict=True):
        for field in ("mean", "covariance", "bias", "bias_covariance"):
            torch.testing.assert_close(getattr(a, field), getattr(b, field), rtol=0, atol=1e-11)


def test_policies_that_are_no_language_models() -> None:
    p = find_problem("chain/linear-policy")
    estimators = [pgcheck.as_estimator("leave_one_out(batch)")]
    (exact,), space = exact_moments(estimators, p), SketchSpace.of(p, directions=3)
    assert space.lane == "forward"
    mean, covariance = exact.in_parameters()
    found = exact_in_sketch(exact, space)
    torch.testing.assert_close(found.mean, space.directions @ mean, rtol=0, atol=1e-12)
    torch.testing.assert_close(found.covariance, space.directions @ covariance @ space.directions.T, rtol=0, atol=1e-12)
    table, index = p.sampler().draw(0, 5)
    c = coefficients_of(estimators[0], table.batch(index, p.group_labels))
    x = ParameterSpace(p).project(c, table, index)
    torch.testing.assert_close(x @ space.directions.T, space.project(c, table, index), rtol=0, atol=1e-12)


# -- the geometry


def test_what_lies_along_the_gradient_is_apart() -> None:
    p = problem()
    space, g = SketchSpace.of(p, directions=6, seed=2), p.parameter_gradient()
    u, across = space.directions[0], space.directions[1:]
    torch.testing.assert_close(u, g / g.norm(), rtol=0, atol=1e-15)
    assert float((across @ u).abs().max()) < 1e-12
    torch.testing.assert_close(space.directions @ g, space.reference, rtol=0, atol=1e-12)
    assert space.reference is not None
    assert float(space.reference[1:].abs().max()) == 0
    assert len(across) == 6  # normal numbers in all dimensions but one
    square = float((across * across).sum()) * 6
    assert 1e-4 < stats.chi2.cdf(square, 6 * (len(u) - 1)) < 1 - 1e-4


def test_lengths_are_unbiased() -> None:
    """E over directions of ⟨x, y⟩ is ⟨x, y⟩: 300 seeds, each of two directions, within four standard errors. The length of
    what lies across ∇J is χ² of as many degrees of freedom, and more than `shows` of it is seen as often as it says."""
    p = problem()
    generator = torch.Generator().manual_seed(0)
    g = p.parameter_gradient()
    x, y = (torch.randn(len(g), generator=generator, dtype=torch.float64) + 3 * g / g.norm() for _ in range(2))
    drawn = [SketchSpace.of(p, directions=2, seed=s).directions for s in range(300)]
    for a, b in ((x, x), (x, y)):
        each = torch.tensor([float((v @ a) @ (v @ b)) for v in drawn], dtype=torch.float64)
        assert abs(float(each.mean() - a @ b)) < 4 * float(each.std()) / math.sqrt(300)
    b = x - g * (x @ g) / (g @ g)
    ratio = torch.tensor([2 * float((v @ b).square().sum() / (b @ b)) for v in drawn])
    assert stats.kstest(ratio, stats.chi2(2).cdf).pvalue > 1e-6
    least = SketchSpace.of(p, directions=2).shows(0.1)
    missed = int((ratio / 2 < least**2).sum())
    assert stats.binomtest(missed, 300, 0.1).pvalue > 1e-6


# -- moments


@pytest.mark.parametrize("name", ["lm/parity", "lm/stale", "lm/tool-dialogue"])
def test_exact_moments_in_a_sketch(name: str) -> None:
    """The mean is that of E ĝ_θ; the interval of tr Cov holds that in parameters, and at its level over sixty sketches; the
    squared bias across ∇J is χ² of as many degrees of freedom as there are directions."""
    p = find_problem(name)
    estimators = [pgcheck.as_estimator(e) for e in ("leave_one_out", "grpo")]
    exact = exact_moments(estimators, p)
    D, spaces = 16, [SketchSpace.of(p, directions=16, seed=s) for s in range(60)]
    g = p.parameter_gradient()
    for m in exact:
        variance, mean = m.total_variance_in_parameters(), m.mean_in_parameters()
        bias = mean - g
        across = float((bias**2).sum() - (bias @ g) ** 2 / (g @ g))
        found = [exact_in_sketch(m, space) for space in spaces]
        for x, space in zip(found, spaces, strict=True):
            torch.testing.assert_close(x.mean, space.directions @ mean, rtol=0, atol=1e-11)
            low, high = x.total_variance_interval(0.999_99)
            assert low < variance < high
            if across > 1e-20:
                ratio = (x.bias_square - float(x.bias[0]) ** 2) / across * D
                assert stats.chi2.ppf(1e-6, D) < ratio < stats.chi2.isf(1e-6, D)
                assert x.bias_square_error == pytest.approx(math.sqrt(2 / D) * across * ratio / D)
        inside = sum(a < variance < b for a, b in (x.total_variance_interval(0.8) for x in found))
        assert (
            stats.binomtest(inside, 60, 0.9).pvalue > 1e-6
        )  # half of what may be missed is kept for draws: there are none
        _, cov = m.in_parameters()
        u = g / g.norm()
        beside = cov - torch.outer(u, cov @ u) - torch.outer(cov @ u, u) + torch.outer(u, u) * (u @ cov @ u)
        law = 2 * float((beside * beside).sum()) / D  # of a form of normal numbers: 2 tr A²/D
        assert 0.4 < sum((x.total_variance - variance) ** 2 for x in found) / 60 / law < 2.5
        assert 0.4 < sum(x.total_variance_error**2 for x in found) / 60 / law < 2.5


@pytest.mark.parametrize("kind", KINDS)
def test_drawn_moments(kind: str) -> None:
    """Mean, covariance, bias and their errors against exact ones, in the same sketch."""
    exact_problem, p = problem(), problem(kind)
    estimators = [pgcheck.as_estimator(name) for name in NAMES]
    space = SketchSpace.of(p, directions=24)
    known = SketchSpace(exact_problem, space.directions, space.directions @ exact_problem.parameter_gradient())
    n = 3_000
    for e, m, x in zip(estimators, exact_moments(estimators, exact_problem),
                       sketch_moments(estimators, p, batches=n, space=space), strict=True):  # fmt: skip
        y = exact_in_sketch(m, known)
        gap = (x.mean - y.mean) / (y.covariance.diagonal() / n).sqrt()
        assert float(gap.abs().max()) < 5, e.name
        spread = (x.bias - y.bias) / (x.bias_covariance.diagonal() / n).sqrt().clamp(min=1e-300)
        assert float(torch.where(x.bias == y.bias, 0.0, spread).abs().max()) < 5 or e.name == "leave_one_out"
        low, high = x.bias_interval(0.999_999).T
        assert bool(((low <= y.bias + 1e-12) & (y.bias - 1e-12 <= high)).all()), e.name
        # given the directions, only the draws are left
        assert abs(x.total_variance - y.total_variance) < 5 * math.sqrt(x.spread / n), e.name
        assert abs(x.bias_square - y.bias_square) <= 5 * x.bias_square_error + 1e-25, e.name
        low, high = x.total_variance_interval(0.999_99)
        assert low < m.total_variance_in_parameters() < high, e.name


def test_one_pass_of_the_model_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a tree: ∂z/∂v is made once, whatever the number of draws and estimators."""
    p, calls = problem("tree"), []
    original = sketch.tangents
    monkeypatch.setattr(sketch, "tangents", lambda *a: calls.append(len(a[1])) or original(*a))
    sketch_moments([pgcheck.as_estimator(name) for name in NAMES], p, batches=3_000, directions=4)
    assert calls == [1, 5]  # whether there is a forward mode; all five coordinates


def test_grains_are_added_in_order() -> None:
    """2 500 draws are three grains; the moments are those of all rows at once."""
    p, e = problem("tree"), pgcheck.as_estimator("grpo")
    space = SketchSpace.of(p, directions=3)
    (found,) = sketch_moments([e], p, batches=2_500, space=space, seed=7)
    table, index = p.sampler(seed=7).draw(0, 2_500)
    x = space.project(coefficients_of(e, table.batch(index, p.group_labels)), table, index)
    torch.testing.assert_close(found.mean, x.mean(0), rtol=0, atol=1e-13)
    torch.testing.assert_close(found.covariance, torch.cov(x.T), rtol=1e-11, atol=1e-13)
    assert found.spread == pytest.approx(float(((x - x[:1024].mean(0)) ** 2).sum(-1).var()))


# -- where ∇J is not known


def test_what_is_trusted() -> None:
    """The first that claims to be unbiased there."""
    on = {"leave_one_out": {}, "reinforce": {"group_size": 1}, "trajectory_is": {"behavior_logits": Decoding(temperature=2.0)},
          "entropy_in_reward": {"entropy_coefficient": 0.1}}  # fmt: skip
    for name, plan in on.items():
        assert trusted_estimator(problem("written", **plan)).name == name
    ref = TinyGPT(3, width=8, seed=9)
    assert trusted_estimator(problem("written", kl_coefficient=0.1, ref_logits=ref)).name == "kl_in_reward(k1)"
    with pytest.raises(UsageError, match="no estimator is known to be unbiased"):
        trusted_estimator(problem("written", behavior_logits=Decoding(top_k=2)))


def test_a_bias_by_difference() -> None:
    """Off-policy, written: GRPO less trajectory importance sampling on the same rows has the exact bias of GRPO."""
    plan = {"behavior_logits": Decoding(temperature=1.25), "group_size": 2}
    small, p = problem(**plan), problem("written", **plan)
    (m,) = exact_moments([pgcheck.as_estimator("grpo")], small)
    (x,) = sketch_moments([pgcheck.as_estimator("grpo")], p, batches=4_000, directions=16)
    bias = m.mean_in_parameters() - small.parameter_gradient()
    directions = SketchSpace.of(p, directions=16).directions
    assert x.along == 0
    low, high = x.bias_interval(1 - 1e-7).T
    exact = directions @ bias
    assert bool(((low < exact) & (exact < high)).all())
    assert float((exact**2).sum()) == pytest.approx(x.bias_square, abs=5 * x.bias_square_error)


# -- what does not fit


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    p = problem("tree")
    for wrong in (0, -1, 2.5, True):
        with pytest.raises(UsageError, match="directions"):
            SketchSpace.of(p, directions=wrong)  # type: ignore[arg-type]
    for few in (0, 1):
        with pytest.raises(UsageError, match="batches"):
            sketch_moments([], p, batches=few)
    monkeypatch.setattr(sketch, "MEMORY", 10**6)
    monkeypatch.setattr(parameters, "MEMORY", 10**6)
    with pytest.raises(BudgetError, match=r"1,024 estimates in 1,[0-9]+ parameters take 0\.0 GiB.*a sketch"):
        ParameterSpace(p)
    with pytest.raises(BudgetError, match=r"their derivatives of .* parameters take"):
        SketchSpace.of(p, directions=500)
    with pytest.raises(UsageError, match="exact moments need a list"):
        exact_in_sketch(
            exact_moments([pgcheck.as_estimator("grpo")], problem())[0], SketchSpace(p, torch.ones(1, 1), None)
        )


# -- judged


@pytest.mark.parametrize("kind", ["tree", "written"])
def test_verdicts_in_a_sketch(kind: str) -> None:
    """GRPO fails; what is unbiased, and what has the scale that is claimed of it, passes; 0.9 times the gradient fails. An open
    scale is judged whether ∇J is known or not."""
    p = problem(kind, group_size=4)
    space = SketchSpace.paired(p, directions=16)
    estimators = [pgcheck.as_estimator(name) for name in ("leave_one_out", "grpo", "batch_mean", "reinforce")]
    scales = [[1.0, None], [1.0], [0.75, 1.0], [0.9]]
    found = monte_carlo(estimators, p, scales=scales, space=space, draws=32_768)
    status = [{κ: j.status.value for κ, j in m.judgements.items()} for m in found]
    assert status[0][1.0] == "PASS"
    assert status[0][None] == "PASS"
    assert status[1:] == [{1.0: "FAIL"}, {0.75: "PASS", 1.0: "FAIL"}, {0.9: "FAIL"}]
    exact = problem(group_size=4)
    for e, m, x in zip(estimators, exact_moments(estimators, exact), found, strict=True):
        assert x.view is not None
        nearest = "reinforce" if e.name == "reinforce" else "leave_one_out"
        assert (x.view.directions, x.view.against) == (16, nearest)
        g = exact.parameter_gradient()
        mean = m.mean_in_parameters()
        for name, true in {
            "rel": float((mean - g).norm() / g.norm()),
            "bias": float((mean - g).norm()),
            "variance": m.total_variance_in_parameters(),
            "mse": float((mean - g).square().sum()) + m.total_variance_in_parameters(),
            "scale": float(mean @ g / (g @ g)),
        }.items():
            a = x.intervals[name]
            if not math.isnan(a.low):
                assert a.low - 1e-12 <= true <= a.high + 1e-12, (e.name, name)
            else:  # it differs from what is trusted on few rollouts, so that its bias has no tail to trust
                assert e.name == "leave_one_out"
