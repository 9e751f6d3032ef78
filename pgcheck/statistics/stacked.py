"""The first look of many judges at once, and the confirmation of what stood out most, on counts of a law's values.

What `pgcheck.statistics.sequential.Judge` sums over draws is here a sum over values, weighted with how often each came up,
for R runs as `[R, …]`. Scores, directions, thresholds, certificates and decisions are the judge's own functions; what is
written a second time is which draws go into which.

Guarantee: on the same draws the numbers are the judge's to rounding, and the verdicts are its verdicts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pgcheck.statistics.certificate import GRAM, Spectrum, p_value, stretch
from pgcheck.statistics.finite import Law, weighted_scores
from pgcheck.statistics.guarded import Floats, Scores, z_scores
from pgcheck.statistics.panel import TWO_SIDED, WITNESSES, Loud, directions, loudest, thresholds
from pgcheck.statistics.sequential import GRAIN, Settings


@dataclass(frozen=True)
class Counts:
    """How often each value came up, in each part of a look's draws that is treated apart."""

    gram: Tensor  # [grains, R, N]: the Gram block of each grain
    known: Tensor  # [R, N]: the rest of the grains that directions are learned from
    scored: Tensor  # [R, N]: the rest of those that they are scored on
    fresh: Tensor  # [parts, R, N]: the confirming draws


def drawn_counts(
    law: Law, settings: Settings, runs: int, rng: np.random.Generator, *, parts: int | None = None
) -> Counts:
    """Of `runs` looks; `parts` confirming parts of the size that the settings give them (None: as many)."""
    grains, stages = settings.first_look // GRAIN, settings.stages - 1
    learned, size = _learned(settings), settings.first_look // stages
    gram = [law.counts(GRAM, runs, rng) for _ in range(grains)]
    known, scored = (law.counts((GRAIN - GRAM) * k, runs, rng) for k in (learned, grains - learned))
    fresh = [law.counts(size, runs, rng) for _ in range(stages if parts is None else parts)]
    return Counts(torch.stack(gram), known, scored, torch.stack(fresh) if fresh else torch.zeros(0, *known.shape))


def _learned(settings: Settings) -> int:
    return max(1, settings.first_look // 4 // GRAIN)


@dataclass(frozen=True)
class Certificates:
    """What the certificate of the first look reads, for R runs."""

    statistic: Floats  # U
    spectrum: Spectrum
    along: Scores  # ⟨D, μ*⟩/‖μ*‖
    loudest: Scores  # along the noisiest direction of the first Gram block

    @property
    def refused(self) -> NDArray[np.bool_]:
        """Whether the tails allow no certificate."""
        return self.along.refused | self.loudest.refused

    def passes(self, Δ: float, levels: Sequence[float]) -> list[NDArray[np.bool_]]:
        """Whether a bias of Δ or more is excluded, at each of these falling levels; never where the guard refuses.

        What does not pass at one level does not at a lower one, where A is stretched further.
        """
        left = np.flatnonzero(~self.refused & (self.statistic < Δ**2))  # above, p is about 1/2 or more
        a = np.maximum(np.abs(self.along.skewness_of_mean), np.abs(self.loudest.skewness_of_mean))
        largest = self.spectrum.at_least(self.loudest.m2 / self.loudest.n)
        out = []
        for level in levels:
            factor = stretch(a[left], level, self.spectrum.error[left])
            λ, square = largest[left], self.spectrum.trace_of_square[left]
            U = self.statistic[left]
            left = left[p_value(U, Δ, n=self.along.n, largest=λ, square=square, stretch=factor) <= level]
            passed = np.zeros(len(self.statistic), dtype=bool)
            passed[left] = True
            out.append(passed)
        return out


def certificates(law: Law, counts: Counts, biases: list[Tensor]) -> list[Certificates]:
    """At D = X − E X + b, for each b `[P]`."""
    d0 = law.values - law.mean
    P, runs = d0.shape[1], counts.known.shape[0]
    products = (d0.unsqueeze(2) * d0.unsqueeze(1)).reshape(len(d0), P * P)
    second = [(c @ products).reshape(runs, P, P) for c in counts.gram]
    first = [c @ d0 for c in counts.gram]
    total = counts.gram.sum(0) + counts.known + counts.scored
    n = int(total[0].sum())
    noisiest = _loud(second[0], first[0]).directions[:, :, -1] if P > 1 else None
    out = []
    for b in biases:
        d, target = d0 + b, law.mean - b
        norms2, spectrum = (d * d).sum(1), Spectrum()
        for c, M0, s in zip(counts.gram, second, first, strict=True):
            sb = s.unsqueeze(2) * b
            M = M0 + sb + sb.mT + GRAM * torch.outer(b, b)  # Σ D Dᵀ
            off = ((M * M).sum((1, 2)) - c @ norms2.square()).clamp(min=0.0) / (GRAM * (GRAM - 1))
            spectrum = spectrum.with_block((torch.linalg.eigvalsh(M)[:, -1] / GRAM).numpy(), off.numpy())
        sums = total @ d
        U = ((sums * sums).sum(1) - total @ norms2) / (n * (n - 1))
        along = weighted_scores(d @ (target / target.norm()), total)
        loud = along if noisiest is None else weighted_scores(noisiest @ d.T, total)
        out.append(Certificates(U.numpy(), spectrum, along, loud))
    return out


def _loud(second: Tensor, first: Tensor) -> Loud:
    """Of Σ D Dᵀ and Σ D of the first Gram blocks."""
    return loudest(*torch.linalg.eigh(second - first.unsqueeze(2) * first.unsqueeze(1) / GRAM))


@dataclass(frozen=True)
class Looks:
    """The first look of R judges, and the confirmation of each one's strongest witness, triggered or not."""

    along: Scores  # ⟨D, μ*⟩/‖μ*‖
    evidence: Floats  # [R, 2, 6]: as Judge._evidence
    spread: Scores  # ‖X − c‖², c the mean of the first Gram block
    gap: Floats  # [R]: ‖X̄ − c‖²
    confirming: Floats  # z-scores, [R, parts]
    confirming_refused: NDArray[np.bool_]  # [R, parts]
    effect: Scores  # of the frozen direction: the confirming draws
    effect_mean: Floats  # [R]: what they have as their mean

    def triggers(self, level: float) -> NDArray[np.bool_]:
        """Whether some witness reaches its threshold."""
        return np.asarray((self.evidence >= thresholds(level)).any((1, 2)))


def look(law: Law, settings: Settings, counts: Counts, *, bias: Tensor, shift: float = 0.0) -> Looks:
    """At D = X − E X + `bias`, tested against a mean of `shift` (Δ, in mode `exceeds`)."""
    target = law.mean - bias
    d, along = law.values - target, target / target.norm()
    d2, runs, learned = d * d, counts.known.shape[0], _learned(settings)

    first = counts.gram[0]
    centre = first @ d / GRAM
    P = d.shape[1]
    square = (first @ (d.unsqueeze(2) * d.unsqueeze(1)).reshape(len(d), P * P)).reshape(runs, P, P)
    loud = _loud(square, GRAM * centre)

    known, scored = counts.gram[:learned].sum(0) + counts.known, counts.gram[learned:].sum(0) + counts.scored
    total = known + scored
    scores_along = weighted_scores(d @ along, total)

    def learn(c: Tensor) -> Tensor:
        made = directions(c @ d, c @ d2, int(c[0].sum()), along=along, loud=loud, aside=False)
        return made[..., : len(WITNESSES)]

    v = learn(known)
    evidence = np.zeros((runs, 2, len(WITNESSES)))
    for w in range(len(WITNESSES)):
        of_witness = scores_along if w == 0 else weighted_scores(v[:, :, w] @ d.T, scored)
        evidence[:, 0, w] = z_scores(of_witness.plus(-shift))
        evidence[:, 1, w] = z_scores(of_witness.times(-1.0).plus(-shift))
    evidence[:, 1, TWO_SIDED:] = -np.inf
    best = torch.from_numpy((evidence / thresholds(settings.stage_level / settings.looks)).max(1).argmax(1))
    sign = np.where(evidence[np.arange(runs), 0, best] >= evidence[np.arange(runs), 1, best], 1.0, -1.0)
    frozen = learn(total)[torch.arange(runs), :, best] * torch.from_numpy(sign).unsqueeze(1)
    y = frozen @ d.T
    parts = [weighted_scores(y, c) for c in counts.fresh]
    x2 = d2.sum(1) + (centre * centre).sum(1, keepdim=True) - 2 * centre @ d.T
    return Looks(
        along=scores_along,
        evidence=evidence,
        spread=weighted_scores(x2, total),
        gap=((total @ d) / scores_along.n - centre).square().sum(1).numpy(),
        confirming=np.stack([z_scores(p.plus(-shift)) for p in parts], 1),
        confirming_refused=np.stack([p.refused for p in parts], 1),
        effect=weighted_scores(y, counts.fresh[: settings.stages - 1].sum(0)),
        effect_mean=(frozen @ bias).numpy(),
    )
