"""Each variant against the loss it stands for, by autograd, or against loops over rows."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import pytest
import torch

from pgcheck.batch import Batch
from pgcheck.estimators import variants
from pgcheck.estimators.base import Estimator
from pgcheck.estimators.lookup import FILLED_BY  # noqa: F401  (fills the registries)
from pgcheck.registry import find_problem


def random_batch(name: str, rows: int = 4, *, seed: int = 3) -> Batch:
    """`[M, B, T]` of rollouts of a named problem, two groups of equal size."""
    table = find_problem(name).trajectories
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(len(table), (12, rows), generator=generator)
    return table.batch(index, torch.arange(rows) // (rows // 2))


def every_row(batch: Batch) -> list[tuple[int, list[float], list[int], list[int]]]:
    """(batch, returns, lengths, labels) of each."""
    R, n = batch.episode_return.tolist(), batch.mask.sum(-1).int().tolist()
    return [(m, R[m], n[m], batch.group[m].tolist()) for m in range(len(R))]


@pytest.mark.parametrize(
    ("variant", "eps", "spread"),
    [
        (variants.grpo_eps_0, 0.0, statistics.pstdev),
        (variants.grpo_eps_1e_4, 1e-4, statistics.pstdev),
        (variants.grpo_ddof_1, 0.0, statistics.stdev),
    ],
)
def test_grpo(variant: Estimator, eps: float, spread: Callable[[list[float]], float]) -> None:
    """(R − mean)/(std + ε) / (B |o|), on-policy."""
    batch = random_batch("dialogue/two-turn")
    c = variant.coefficients(batch)
    for m, R, n, label in every_row(batch):
        for i in range(4):
            group = [r for r, g in zip(R, label, strict=True) if g == label[i]]
            std = spread(group)
            expected = 0.0 if std < 1e-12 else (R[i] - statistics.fmean(group)) / (std + eps) / (4 * n[i])
            assert c[m, i].tolist() == pytest.approx([expected * x for x in batch.mask[m, i].tolist()], abs=1e-12)


def test_token_means() -> None:
    """1/Σ|o| of the batch; 1/Σ|o| of each group, halved."""
    batch = random_batch("dialogue/two-turn")
    whole, parts = variants.token_mean.coefficients(batch), variants.token_mean_of_micro_batches.coefficients(batch)
    for m, R, n, label in every_row(batch):
        for i in range(4):
            other = next(r for j, r in enumerate(R) if j != i and label[j] == label[i])
            own_group = sum(x for x, g in zip(n, label, strict=True) if g == label[i])
            for c, weight in ((whole, 1 / sum(n)), (parts, 1 / (2 * own_group))):
                expected = [(R[i] - other) * weight * x for x in batch.mask[m, i].tolist()]
                assert c[m, i].tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("variant", "bound"), [(variants.cispo_absolute, 0.2), (variants.cispo_relative, 1.2)])
def test_what_a_bound_means(variant: Estimator, bound: float) -> None:
    """Both have ε_high = .2; the coefficient is that of the uncapped one times min(r, bound)/r."""
    batch = random_batch("off-policy/dialogue-stale")
    c = variant.coefficients(batch)
    plain = variants.compose(variants._standardised, aggregation=variants.agg.token_mean)(batch)
    ratio = (batch.logp - batch.behavior_logp).exp()
    assert bool((ratio > 1.2).any())
    for found, one, r in zip(c.flatten().tolist(), plain.flatten().tolist(), ratio.flatten().tolist(), strict=True):
        assert found == pytest.approx(one * min(r, bound), abs=1e-14)


def test_pairs() -> None:
    """Σ_{i<j} (R_i − R_j)(S_i − S_j)/(G(G−1)), the mean over groups: the coefficient of S_i."""
    batch = random_batch("mdp/two-state", rows=6)
    c = variants.pairwise_differences.coefficients(batch)
    for m, R, _, label in every_row(batch):
        for i in range(6):
            others = [R[j] for j in range(6) if j != i and label[j] == label[i]]
            expected = sum(R[i] - r for r in others) / (3 * 2) / 2
            assert c[m, i, 0].item() == pytest.approx(expected, abs=1e-12)


def test_a_group_of_one_gets_nothing() -> None:
    table = find_problem("degenerate/group-of-one").trajectories
    batch = table.batch(torch.tensor([[0, 1, 5]]), torch.arange(3))
    assert not variants.group_of_one.coefficients(batch).any()
