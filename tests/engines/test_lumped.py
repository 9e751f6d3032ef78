"""Class counts give the moments of the enumeration of multisets, and wrong declarations are refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pgcheck.batch import Batch
from pgcheck.engines.enumeration import count_multisets
from pgcheck.engines.exact import exact_moments
from pgcheck.errors import BudgetError, EstimatorError
from pgcheck.estimators.base import from_coefficients
from pgcheck.estimators.lookup import as_estimator
from pgcheck.registry import find_problem

READERS = ("leave_one_out", "grpo", "batch_mean(group)", "batch_mean", "leave_one_out(batch)", "cispo", "cispo(notes)")


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("problem", ["tree/tokens", "tree/tokens@1", "off-policy/tree-stale", "mdp/two-state-0.9"])
def test_same_moments_as_multisets(name: str, problem: str) -> None:
    """E ĝ and Cov ĝ agree to rounding, from fewer evaluations."""
    p = find_problem(problem).with_sampling(groups=1, group_size=4)
    estimator = as_estimator(name)
    (by_counts,) = exact_moments([estimator], p)
    (by_multisets,) = exact_moments([replace(estimator, reads=None)], p)
    torch.testing.assert_close(by_counts.mean, by_multisets.mean, rtol=0, atol=1e-15)
    torch.testing.assert_close(by_counts.covariance, by_multisets.covariance, rtol=0, atol=1e-15)
    torch.testing.assert_close(by_counts.by_step, by_multisets.by_step, rtol=0, atol=1e-15)
    if problem.startswith(("tree", "off-policy")):
        assert by_counts.enumerated < by_multisets.enumerated


def test_several_groups_of_unequal_size() -> None:
    """Groups are lumped one size at a time: 5 and 3 rows."""
    p = find_problem("tree/tokens").with_sampling(groups=2, group_size=(5, 3))
    estimator = as_estimator("leave_one_out")
    (by_counts,) = exact_moments([estimator], p)
    (by_multisets,) = exact_moments([replace(estimator, reads=None)], p)
    torch.testing.assert_close(by_counts.covariance, by_multisets.covariance, rtol=0, atol=1e-15)
    torch.testing.assert_close(by_counts.by_step, by_multisets.by_step, rtol=0, atol=1e-15)


def test_a_group_of_sixteen() -> None:
    """G = 16 over 15 rollouts a prompt: 2·C(30, 16) = 2.9e8 multisets are refused, class counts are exact.

    Var of leave-one-out: ĝ = Σ_{i<j} (R_i − R_j)(S_i − S_j) / (G(G−1)) is a U-statistic of order two with kernel
    h = (R₁ − R₂)(S₁ − S₂)/2, so given the start Cov = (2/(G(G−1))) (2(G−2) ζ₁ + ζ₂) with ζ₁ = Cov of E[h | τ₁] and
    ζ₂ = Cov h (Hoeffding 1948).
    """
    G = 16
    p = find_problem("tree/tokens").with_sampling(groups=1, group_size=G)
    estimator = as_estimator("leave_one_out")
    (m,) = exact_moments([estimator], p)
    torch.testing.assert_close(m.mean, p.gradient(), rtol=0, atol=1e-15)
    with pytest.raises(BudgetError, match=f"{2 * count_multisets(15, G):,}"):
        exact_moments([replace(estimator, reads=None)], p)

    t = p.trajectories
    pi = torch.softmax(p.logits, -1)
    returns = t.paths.reward.sum(-1)  # γ = 1
    score = torch.zeros(len(t), t.contexts, t.actions, dtype=torch.float64)
    for n in range(len(t)):
        for step in range(t.paths.steps):
            if t.paths.mask[n, step] > 0:
                k = int(t.paths.context[n, step])
                score[n, k] -= pi[k]
                score[n, k, int(t.paths.action[n, step])] += 1
    score = score.flatten(1)
    total, second, mean = 0.0, 0.0, torch.zeros(score.shape[1], dtype=torch.float64)
    for start, q in enumerate(t.paths.start_probability.tolist()):
        rows = t.paths.start == start
        w, R, S = t.probability[rows], returns[rows], score[rows]
        h = (R[:, None, None] - R[None, :, None]) * (S[:, None] - S[None, :]) / 2  # [n, n, K·A]
        given = torch.einsum("i,j,ijc->c", w, w, h)
        zeta2 = float(torch.einsum("i,j,ijc->", w, w, h**2) - (given**2).sum())
        conditional = torch.einsum("j,ijc->ic", w, h)
        zeta1 = float(torch.einsum("i,ic->", w, conditional**2) - (given**2).sum())
        total += q * 2 / (G * (G - 1)) * (2 * (G - 2) * zeta1 + zeta2)
        second += q * float((given**2).sum())
        mean += q * given
    total += second - float((mean**2).sum())  # the start is drawn, too
    assert m.total_variance == pytest.approx(total, rel=1e-12)


def test_a_wrong_declaration_is_refused() -> None:
    """A coefficient that reads the others' first action is not a function of their returns."""

    def peeks(batch: Batch) -> torch.Tensor:
        first = batch.action[..., 0].to(batch.reward.dtype)
        others = first.sum(-1, keepdim=True) - first
        return (others / batch.rows).unsqueeze(-1) * batch.mask

    p = find_problem("tree/tokens").with_sampling(groups=1, group_size=5)
    estimator = from_coefficients(peeks, couples="group", reads=("return",))
    with pytest.raises(EstimatorError, match=r"on 'tree/tokens': .* declared reads=\('return',\)"):
        exact_moments([estimator], p)


def test_an_unknown_declaration_is_refused() -> None:
    """`reads` names what there is."""
    p = find_problem("tree/tokens")
    with pytest.raises(EstimatorError, match="reads: 'colour' is not one of return, length"):
        exact_moments([replace(as_estimator("grpo"), reads=("colour",))], p)
