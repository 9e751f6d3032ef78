"""How an entry is put together: (advantage × ratio + penalty) × aggregation, and the factors that several entries share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pgcheck.batch import Batch, scaled
from pgcheck.estimators import advantages as adv
from pgcheck.estimators import aggregation as agg
from pgcheck.estimators import penalties, ratios
from pgcheck.estimators.base import Claim, Coefficients, Couples, Estimator, of_return, register
from pgcheck.problem import Problem

NOTES = "policy-gradient lecture notes"


@dataclass(frozen=True)
class Composition:
    """c = aggregation · (ratio · advantage + penalty) · mask, `[..., B, T]`; the parts can be read, and swapped one at a
    time. Few have a penalty."""

    advantage: adv.Advantage
    ratio: ratios.Ratio
    aggregation: agg.Aggregation
    penalty: penalties.Penalty | None = None

    def __call__(self, batch: Batch) -> Tensor:
        return self.unmasked(batch) * batch.mask

    def unmasked(self, batch: Batch) -> Tensor:
        """c before the mask; one number a row, repeated over its positions without copies, where no part tells them apart."""
        return scaled(*self.factored(batch))

    def factored(self, batch: Batch) -> tuple[float, Tensor]:
        """A number and c before the mask without that factor: what aggregation and ratio are, where they are one number."""
        a = self.advantage(batch)
        weight = self.aggregation(batch) * self.ratio(batch, a)
        number, c = (float(weight), a) if weight.numel() == 1 else (1.0, weight * a)
        if self.penalty is not None:
            number, c = 1.0, number * c + self.aggregation(batch) * self.penalty(batch)
        return number, c.expand(batch.shape)


def compose(
    advantage: adv.Advantage,
    *,
    ratio: ratios.Ratio = ratios.none,
    aggregation: agg.Aggregation = agg.mean_of_rows,
    penalty: penalties.Penalty | None = None,
) -> Composition:
    """(advantage × ratio + penalty) × aggregation; by default no ratio, no penalty, and the mean over rows."""
    return Composition(advantage, ratio, aggregation, penalty)


def add(
    name: str, coefficients: Coefficients, couples: Couples, *aliases: str, claims: tuple[Claim, ...], **words: Any
) -> Estimator:
    """Register an entry; a claim that names no objective is about the return alone."""
    return register(Estimator(name, coefficients, couples, of_return(*claims), **words), *aliases)


# -- factors κ of proportional claims


def own_share_of_batch(problem: Problem) -> float:
    """(B − 1)/B: what is left of g when the own row is in a batch-wide mean."""
    return (problem.rows - 1) / problem.rows


def own_share_of_groups(problem: Problem) -> float:
    """Σ_g (G_g − 1)/B = (G − 1)/G for equal groups."""
    return (problem.rows - problem.groups) / problem.rows


def mean_over_rows(problem: Problem, factor: Callable[[int], float]) -> float:
    """Σ_g (G_g/B) factor(G_g): one prompt, groups of any size."""
    return sum(size * factor(size) for size in problem.sizes) / problem.rows
