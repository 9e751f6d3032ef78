"""Whole runs: judges that look until they have decided, with the intervals that they give then, and how long they take."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pgcheck.calibrate.looks import SHAPES, planted, tolerance
from pgcheck.calibrate.oracle import oracle_draws
from pgcheck.calibrate.rates import EndToEnd, Misses, Power, Rate
from pgcheck.engines.accounts import Account
from pgcheck.statistics.certificate import GRAM
from pgcheck.statistics.finite import Law
from pgcheck.statistics.grain import Grain
from pgcheck.statistics.guarded import z_of
from pgcheck.statistics.sequential import GRAIN, Interval, Judge, Judgement, Settings, confidence_after
from pgcheck.statistics.status import Status

RATIOS = (0.1, 0.05, 0.025)  # of a planted bias to the standard deviation along it


@dataclass(frozen=True)
class Ended:
    """A whole run: the verdict, the intervals of its account, and what they should contain."""

    verdict: Judgement
    intervals: dict[str, Interval]
    truth: dict[str, float]


def run_to_the_end(law: Law, rng: np.random.Generator, *, bias: Tensor, settings: Settings) -> Ended:
    """A judge and an account on draws of a law whose mean is μ* + bias, until the judge has decided."""
    target = law.mean - bias
    judge, account, centre = Judge(target, settings), None, None
    while not judge.decided:
        x = Grain.of(law.draws(GRAIN, rng), centre)
        centre = x.centre
        new = Account.of_grain(x, target, blocks=x.x[:GRAM].unsqueeze(0))
        account = new if account is None else account.merge(new)
        judge.update(x)
    assert account is not None
    v = judge.verdict()
    said = account.intervals(target, confidence=confidence_after(v.draws, settings))
    of_judge = {"scale": v.scale, "off_axis": v.off_axis, "variance": v.variance}
    size, total = float(target.norm()), float(law.covariance.diagonal().sum())
    κ = float(law.mean @ target) / size**2
    truth = {
        "scale": κ, "off_axis": float((law.mean - κ * target).norm() / law.mean.norm()), "variance": total,
        "bias": float(bias.norm()), "mse": total + float(bias @ bias), "snr": float(law.mean.norm()) / math.sqrt(total),
    }  # fmt: skip
    if v.effect is not None:
        of_judge["effect"], truth["effect"] = v.effect, judge.along_witness(bias) / size
    return Ended(v, of_judge | {k: said[k] for k in ("bias", "mse", "snr")}, truth)


class _Endings:
    """What whole runs of a law said."""

    def __init__(self, law: Law) -> None:
        self.law, self.misses = law, dict[str, Misses]()

    def add(self, ended: Ended) -> Judgement:
        for name, x in ended.intervals.items():
            of = self.misses.setdefault(name, Misses())
            of.add(np.array(x.low), np.array(x.high), ended.truth[name])
        return ended.verdict

    def rates(self, what: str) -> list[Rate]:
        return [m.rate(what, self.law, name) for name, m in self.misses.items()]


def end_to_end(law: Law, *, runs: int, rng: np.random.Generator) -> tuple[EndToEnd, list[Rate]]:
    """Whole runs without a bias, at the default error rates; the tolerance is one that some looks can certify."""
    settings = Settings(rtol=0.0, atol=tolerance(law, 4 * Settings().first_look), looks=4)
    endings, none = _Endings(law), torch.zeros_like(law.mean)
    got = [endings.add(run_to_the_end(law, rng, bias=none, settings=settings)) for _ in range(runs)]
    count = Counter(v.status for v in got)
    verdicts = EndToEnd(
        law.name, law.family, runs, count[Status.PASS], count[Status.FAIL], count[Status.INCONCLUSIVE],
        max(v.draws for v in got),
    )  # fmt: skip
    return verdicts, endings.rates("after stopping, no bias")


def powers(law: Law, *, runs: int, rng: np.random.Generator) -> tuple[list[Power], list[Rate]]:
    """Draws to FAIL for biases along the gradient and dense, of `RATIOS` times the standard deviation along them."""
    settings = Settings(rtol=0.0, atol=1e-9, looks=7)  # too tight to be certified: only a FAIL ends it
    endings, out = _Endings(law), []
    for shape in SHAPES[:2]:
        direction = planted(law, shape, 1.0)
        noise = math.sqrt(float(direction @ law.covariance @ direction))
        scores = ((law.values - law.mean) @ direction).numpy()
        for ratio in RATIOS:
            bias = direction * (ratio * noise)
            got = [endings.add(run_to_the_end(law, rng, bias=bias, settings=settings)) for _ in range(runs)]
            draws = [float(v.draws) if v.status is Status.FAIL else math.inf for v in got]
            failed = sum(map(math.isfinite, draws))
            median = float(np.median(draws)) if 2 * failed > runs else None
            size = float(bias.norm() / (law.mean - bias).norm())
            normal = (z_of(settings.alpha) / ratio) ** 2
            exact = oracle_draws(scores, law.probability, bias=ratio * noise, alpha=settings.alpha)
            out.append(Power(law.name, law.family, shape, size, runs, failed, median, normal, exact))
    return out, endings.rates("after stopping, a bias")
