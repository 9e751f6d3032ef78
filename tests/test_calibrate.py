"""The calibration: its second derivation of a look against the judge, its bounds, and a slice of the measured rates."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from pgcheck.calibrate import (
    NOMINAL,
    SHAPES,
    Calibration,
    EndToEnd,
    Power,
    Rate,
    calibrate,
    clopper_pearson,
    estimator_law,
    false_passes,
    laws,
    laws_named,
    null_rates,
    planted,
    rate,
    ratio_misses,
)
from pgcheck.calibrate.endings import run_to_the_end
from pgcheck.calibrate.oracle import oracle_draws
from pgcheck.engines.exact import exact_moments
from pgcheck.errors import UnknownNameError, UsageError
from pgcheck.estimators.lookup import as_estimator
from pgcheck.registry import find_problem
from pgcheck.render.calibration import calibration_figure, calibration_json, calibration_markdown, read_calibration
from pgcheck.statistics import guarded, stacked
from pgcheck.statistics.certificate import stretch
from pgcheck.statistics.finite import Law
from pgcheck.statistics.guarded import Floats, Scores, z_of, z_scores
from pgcheck.statistics.sequential import GRAIN, Judge, Settings
from pgcheck.statistics.stacked import Counts, certificates, drawn_counts, look
from pgcheck.statistics.status import Status
from pgcheck.statistics.variance import Pairs, variance_ratio

ONE_IN_1E8 = 1e-8


@cache
def law(name: str) -> Law:
    """One of the calibration's laws, by the start of its name."""
    return next(x for x in laws() if x.name.startswith(name))


class Recorder(Judge):
    """A judge that is never certified and always triggers: both stages of one look, whatever they say."""

    seen: Floats
    confirming: list[float]

    def _fires(self, ratio: float) -> bool:
        return self._looked == 0

    def _certified(self) -> bool:
        return False

    def _evidence(self) -> Floats:
        out = super()._evidence()
        if self._looked == 0:
            self.seen = out.copy()
        return out

    def _confirming_z(self) -> list[float]:
        self.confirming = super()._confirming_z()
        return self.confirming


class OneLook(Judge):
    """A judge whose certificate is looked at once, before the confirmation."""

    def _certified(self) -> bool:
        return self._looked == 0 and super()._certified()


def rows(values: Tensor, counts: Tensor) -> Tensor:
    """Draws `[n, P]` that have these counts `[N]`."""
    return values[torch.repeat_interleave(torch.arange(len(counts)), counts.to(torch.int64))]


def grains_of(x: Law, counts: Counts, run: int) -> list[Tensor]:
    """The draws of one run, as a judge eats them: of each grain the Gram block first."""
    rest = torch.cat([rows(x.values, counts.known[run]), rows(x.values, counts.scored[run])])
    size = GRAIN - len(rows(x.values, counts.gram[0, run]))
    first = [torch.cat([rows(x.values, g[run]), r]) for g, r in zip(counts.gram, rest.split(size), strict=True)]
    return first + [g for part in counts.fresh[:, run] for g in rows(x.values, part).split(GRAIN)]


@pytest.mark.parametrize("mode", ["nonzero", "exceeds"])
@pytest.mark.parametrize(
    "name", ["Gaussian values, P = 32", "leave_one_out on dialogue", "log-normal weights, σ = 1, P = 2"]
)
def test_the_judge_and_the_stack_see_the_same_look(name: str, mode: Any) -> None:
    x = law(name)
    bias = planted(x, SHAPES[1], 0.3 * float(x.mean.norm()))
    mu = x.mean - bias
    settings = Settings(mode=mode)
    runs = 4
    counts = drawn_counts(x, settings, runs, np.random.default_rng(5))
    shift = settings.rtol * float(mu.norm()) if mode == "exceeds" else 0.0
    many, (certificate,) = look(x, settings, counts, bias=bias, shift=shift), certificates(x, counts, [bias])
    for r in range(runs):
        judge = Recorder(mu, settings)
        grains = grains_of(x, counts, r)
        for grain in grains[:4]:
            judge.update(grain)
        v, U, whole, ever = judge.verdict(), judge._statistic(), judge._whole, judge._ever
        for grain in grains[4:]:
            judge.update(grain)
        assert np.allclose(judge.seen, many.evidence[r], rtol=1e-6, atol=1e-6)
        assert np.allclose(judge.confirming, many.confirming[r], rtol=1e-6, atol=1e-6)
        assert pytest.approx(certificate.statistic[r], rel=1e-8) == U
        assert whole.largest == pytest.approx(certificate.spectrum.largest[r], rel=1e-9)
        assert whole.trace_of_square == pytest.approx(certificate.spectrum.trace_of_square[r], rel=1e-9)
        assert whole.error == pytest.approx(certificate.spectrum.error[r], rel=1e-6)
        assert np.abs(ever.skewness_of_mean[2]) == pytest.approx(abs(certificate.loudest.skewness_of_mean[r]), rel=1e-6)
        assert ever.largest_share[2] == pytest.approx(certificate.loudest.largest_share[r], rel=1e-6)
        for scores in (many.along, certificate.along):
            assert v.tails.skewness_of_mean == pytest.approx(scores.skewness_of_mean[r], rel=1e-6)
            assert v.tails.largest_share == pytest.approx(scores.largest_share[r], rel=1e-6)


@pytest.mark.parametrize(
    ("shape", "size"), [("along the gradient", 0.0), ("along the gradient", 0.05), ("dense", 0.05)]
)
def test_the_judge_and_the_stack_give_the_same_verdicts(shape: str, size: float) -> None:
    """One look at error rates so large that all three verdicts occur, 210 runs together."""
    x, runs = law("leave_one_out on chain"), 70
    settings = Settings(rtol=0.0, atol=0.06 if size else 0.02, alpha=0.01, beta=0.2, looks=1)
    bias = planted(x, shape, max(size, 1e-12))
    counts = drawn_counts(x, settings, runs, np.random.default_rng(6))
    many, (certificate,) = look(x, settings, counts, bias=bias), certificates(x, counts, [bias])
    (passed,) = certificate.passes(settings.atol, [settings.beta / 2])
    failed = many.triggers(settings.stage_level) & (many.confirming >= z_of(settings.stage_level)).all(1)
    expected = [
        Status.PASS if p else Status.FAIL if f else Status.INCONCLUSIVE for p, f in zip(passed, failed, strict=True)
    ]
    got = []
    for r in range(runs):
        judge = OneLook(x.mean - bias, settings)
        for grain in grains_of(x, counts, r):
            judge.update(grain)
        got.append(judge.verdict().status)
    assert got == expected
    assert len(set(got)) > 1


def test_a_law_has_the_moments_of_the_exact_engine() -> None:
    (m,) = exact_moments([as_estimator("leave_one_out")], find_problem("dialogue/two-turn"))
    x = estimator_law("leave_one_out", "dialogue/two-turn", family="light")
    assert torch.allclose(x.mean, m.mean.flatten(), atol=1e-14)
    assert torch.allclose(x.covariance, m.covariance, atol=1e-14)
    drawn = x.draws(200_000, np.random.default_rng(0))
    assert torch.allclose(torch.cov(drawn.T), x.covariance, atol=0.03)


def test_bounds_are_those_of_the_binomial() -> None:
    low, high = clopper_pearson(7, 200)
    assert stats.binom.sf(6, 200, low) == pytest.approx(0.005)
    assert stats.binom.cdf(7, 200, high) == pytest.approx(0.005)
    assert clopper_pearson(0, 50)[0] == 0.0
    assert clopper_pearson(50, 50)[1] == 1.0


@pytest.mark.parametrize("name", ["Gaussian values, P = 2", "leave_one_out on chain", "reinforce on mdp", "paid once"])
def test_a_slice_of_the_false_alarms(name: str) -> None:
    """Each bound fails with probability < 1e-8 if the rate is nominal or below."""
    for x in null_rates(law(name), runs=400, rng=np.random.default_rng(1)):
        if x.runs:
            assert stats.binom.sf(x.events - 1, x.runs, x.nominal) > ONE_IN_1E8, x


@pytest.mark.parametrize("name", ["Gaussian values, P = 2", "leave_one_out on chain"])
def test_a_slice_of_the_false_passes(name: str) -> None:
    """At 1.15 times nominal, which is what the approximation of U's law was measured to cost."""
    rates = false_passes(law(name), runs=400, rng=np.random.default_rng(2))
    for x in rates:
        assert stats.binom.sf(x.events - 1, x.runs, 1.15 * x.nominal) > ONE_IN_1E8, x
    worst = [x for x in rates if x.detail == SHAPES[3] and x.nominal == NOMINAL[0]]
    assert stats.binom.cdf(worst[0].events, 400, 0.05) > ONE_IN_1E8  # calibrated: not hiding behind a wide margin


def test_a_looser_guard_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reward paid once in a hundred draws would be told eight times as early; an infinite variance would be a bias."""
    x = law("Pareto weights, index 1.5")

    def alarms() -> bool:
        rates = [r for r in null_rates(x, runs=1000, rng=np.random.default_rng(1)) if r.what == "confirm"]
        return any(stats.binom.sf(r.events - 1, r.runs, r.nominal) < ONE_IN_1E8 for r in rates)

    assert not alarms()
    monkeypatch.setattr(guarded, "MOST_SKEWNESS", 0.3)
    monkeypatch.setattr(guarded, "MOST_SHARE", 0.2)
    assert alarms()


@pytest.mark.parametrize("index", [1.5, 2.0])
def test_pareto_weights_have_the_tail_that_they_are_named_for(index: float) -> None:
    """Of weights w times vectors around 1: P(w > x) = x^−index, and the mean index/(index − 1), to the bins' width."""
    x = law(f"Pareto weights, index {index:g}")
    size = x.values.mean(1).numpy()
    for far in (10.0, 1_000.0):
        assert x.probability[size > far].sum() == pytest.approx(far**-index, rel=0.3)
    assert float(x.mean.mean()) == pytest.approx(index / (index - 1), rel=0.15)


def test_it_runs_whole_and_says_the_same_twice() -> None:
    small = [law("leave_one_out on chain")]
    a, b = (calibrate(small, runs=100, seed=3) for _ in range(2))
    assert a == b
    assert {x.what for x in a.rates} == {
        "trigger", "confirm", "certificate", "trigger of exceeds", "confirm of exceeds",
        "trigger of open κ", "confirm of open κ", "certificate of open κ",
        "misses, fixed draws", "misses, after stopping, no bias", "misses, after stopping, a bias",
    }  # fmt: skip
    assert all(x.failed == 0 for x in a.verdicts)
    assert all(x.failed == x.runs for x in a.power)
    assert all(0.05 < x.ratio < 20 for x in a.power)
    assert null_rates(small[0], runs=100, rng=np.random.default_rng(4)) != list(a.rates[:9])


def test_too_few_runs_are_refused() -> None:
    with pytest.raises(UsageError, match="runs: 5"):
        calibrate([law("Gaussian")], runs=5)


def test_equal_values_are_one() -> None:
    values = torch.tensor([[1.0, 0.0], [2.0, 2.0], [1.0, 0.0]], dtype=torch.float64)
    x = Law.of("", "", values, np.array([0.25, 0.5, 0.25]))
    assert x.values.tolist() == [[1.0, 0.0], [2.0, 2.0]]
    assert x.probability.tolist() == [0.5, 0.5]
    with pytest.raises(UsageError, match="probability"):
        Law.of("", "", values, np.array([0.5, 0.5]))


@pytest.mark.parametrize("ratio", [0.1, 0.025])
def test_the_oracle_of_a_normal_law_is_its_formula(ratio: float) -> None:
    y = stats.norm.isf((np.arange(20_000) + 0.5) / 20_000)
    n = oracle_draws(y, np.full(len(y), 1 / len(y)), bias=ratio * y.std(), alpha=1e-9)
    assert n == pytest.approx((stats.norm.isf(1e-9) / ratio) ** 2, rel=1e-4)


@pytest.mark.parametrize("probability", [0.01, 0.3, 0.95])
def test_the_oracle_of_a_coin_is_that_of_the_binomial(probability: float) -> None:
    """The least n from which on a share of p + b has a tail of α at most; on a lattice, to the 2% that its steps are."""
    b, α = 0.1 * math.sqrt(probability * (1 - probability)), 1e-9
    n = oracle_draws(
        np.array([1 - probability, -probability]), np.array([probability, 1 - probability]), bias=b, alpha=α
    )
    every = np.arange(1_000, 12_000)
    tail = stats.binom.sf(np.ceil(every * (probability + b) - 1e-9) - 1, every, probability)
    assert n == pytest.approx(every[tail > α][-1] + 1, rel=0.02)


def test_an_oracle_never_sees_a_mean_that_no_draw_has() -> None:
    assert oracle_draws(np.array([-1.0, 1.0]), np.array([0.5, 0.5]), bias=1.0, alpha=1e-3) == math.inf


def test_pairs_of_counts_are_those_of_the_draws() -> None:
    rng = np.random.default_rng(8)
    a, b = rng.exponential(size=(2, 30))
    counts = rng.integers(0, 9, 30)
    drawn = Pairs.of(np.repeat(a, counts), np.repeat(b, counts))
    got = Pairs.counted(a, b, counts)
    for name in ("n", "mean", "second", "third"):
        assert getattr(got, name) == pytest.approx(getattr(drawn, name), rel=1e-12)
    for r in (0.3, 1.0, 2.5):
        assert got.difference(r) == pytest.approx(drawn.difference(r), rel=1e-9)
    x, y = variance_ratio(got), variance_ratio(drawn)
    assert (x.value, x.low, x.high) == pytest.approx((y.value, y.low, y.high), rel=1e-9, nan_ok=True)


def test_a_slice_of_the_ratios() -> None:
    x = ratio_misses(law("leave_one_out on dialogue"), runs=300, rng=np.random.default_rng(3))
    assert x.refused == 0
    assert stats.binom.sf(x.events - 1, x.runs, x.nominal) > ONE_IN_1E8


def test_a_plain_t_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the guard a family of heavy weights breaks the bounds that the slice asserts."""
    assert stacked.z_scores is z_scores

    def plain(y: Scores) -> Floats:
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(y.m2 > 0, y.mean / y.error, 0.0)

    monkeypatch.setattr(stacked, "z_scores", plain)
    rates = [x for x in null_rates(law("paid once"), runs=3000, rng=np.random.default_rng(1)) if x.nominal == 0.001]
    assert any(stats.binom.sf(x.events - 1, x.runs, x.nominal) < ONE_IN_1E8 for x in rates)


@pytest.mark.parametrize("probability", [0.03, 0.04, 0.1])
def test_skewness_stretches_the_certificate(probability: float) -> None:
    """Exactly, for 0/1 scores of which k of n are 1: a bias of Δ passes if k/n + z · stretch · error ≤ probability."""
    n, β = 4096, 1e-3
    k = np.arange(1, n)
    q = k / n
    error, a = np.sqrt(q * (1 - q) / n), (1 - 2 * q) / np.sqrt(n * q * (1 - q))
    weight = stats.binom.pmf(k, n, probability)

    def passes(factor: Floats) -> float:
        return float(weight[q + z_of(β) * factor * error <= probability].sum())

    assert passes(np.array([stretch(x, β) for x in a])) < 1.3 * β
    assert passes(np.ones(n - 1)) > 1.5 * β


def report(*rates: Rate) -> Calibration:
    """A calibration with one cell of power."""
    cell = Power("coin", "rare event", "along the gradient", 0.1, 8, 8, 8192.0, 4096.0, 5000.0)
    ended = EndToEnd("coin", "light", 8, 7, 0, 1, 32768)
    return Calibration(3, rates, (cell,), (ended,), ("pgcheck calibrate --runs 10000 --seed 3",))


def test_the_report_answers_first() -> None:
    x = law("leave_one_out on chain")
    good = rate("trigger", x, "", 0.1, runs=10_000, events=900, refused=0.0)
    bad = rate("trigger", replace(x, name="coin"), "", 0.1, runs=10_000, events=2_000, refused=0.25)
    miss = rate("misses, fixed draws", x, "scale", 0.05, runs=0, events=0, refused=1.0)
    some = rate("misses, fixed draws", x, "variance", 0.05, runs=400, events=20, refused=0.5)
    text = calibration_markdown(report(good, bad, miss, some))
    headline = next(line for line in text.splitlines() if line.startswith("| First stage of a FAIL"))
    assert headline.startswith("| First stage of a FAIL | 0.1 | 0.2 [0.19, 0.21] coin |")
    assert headline.endswith("| 1 of 2 | 1 of 2 |")
    assert "| coin | light | 10,000 | 25.0% | **2.00 [" in text
    assert "| leave_one_out on chain/linear-policy | – | 5.0% [" in text
    assert ", 50% given |" in text
    assert "| coin | 25% |" in text
    assert "| rare event | 2x, at most 2x | – | 1 | 8 | 100.0% |" in text
    assert "| 8 of 8 | 8,192 | 4,096 | 2 | 5,000 | 1.6 |" in text
    assert "`pgcheck calibrate --runs 10000 --seed 3`" in text


def test_intervals_that_miss_as_few_are_given_are_said_in_words() -> None:
    x = law("leave_one_out on chain")
    wrong = rate("misses, fixed draws", x, "scale", 0.05, runs=400, events=200, refused=0.96)
    text = calibration_markdown(report(wrong))
    assert "too many are wrong for leave_one_out on chain/linear-policy: 4.0% to 4.0% of the samples allow one" in text
    assert "is at most 2.0% of all." in text


def test_the_figure_is_one_svg_and_the_same_twice() -> None:
    x = law("leave_one_out on chain")
    rates = [
        rate(w, x, "", τ, runs=1000, events=3, refused=0.0)
        for w in ("trigger", "confirm", "certificate")
        for τ in NOMINAL
    ]
    rates.append(rate("misses, fixed draws", x, "scale", 0.05, runs=400, events=20, refused=0.0))
    pictures = [calibration_figure(report(*rates)) for _ in range(2)]
    assert pictures[0] == pictures[1]
    assert ElementTree.fromstring(pictures[0]).tag.endswith("svg")
    data = calibration_json(report(*rates))
    assert data["rates"][0]["rate"] == 0.003


def test_more_looks_go_on_where_fewer_ended_and_questions_have_streams_of_their_own() -> None:
    x = law("leave_one_out on chain")
    few, more = (calibrate([x], runs=n, seed=3, questions=["null"]) for n in (250, 500))
    alone = calibrate([x], runs=100, seed=3, questions=["ratio"])
    whole = calibrate([x], runs=100, seed=3, questions=["ratio", "null"])
    for a, b in zip(few.rates, more.rates, strict=True):
        assert (a.what, a.nominal) == (b.what, b.nominal)
        assert a.events <= b.events <= a.events + b.runs - a.runs
    assert {r.runs for r in more.rates if r.what == "trigger"} == {500}
    assert alone.rates[0] in whole.rates
    assert alone.verdicts == alone.power == ()


def test_what_is_measured_anew_takes_the_place_of_what_was_there() -> None:
    x, y = law("leave_one_out on chain"), law("leave_one_out on dialogue")
    old = [rate("trigger", z, "", 0.1, runs=100, events=3, refused=0.0) for z in (x, y)]
    new = [rate(w, x, "", 0.1, runs=400, events=9, refused=0.0) for w in ("trigger", "confirm")]
    power = [Power(z.name, z.family, SHAPES[0], 0.1, 8, 8, 8192.0, 4096.0, 5000.0) for z in (x, y)]
    ended = [EndToEnd(z.name, z.family, 4, 4, 0, 0, 8192) for z in (x, y)]
    before = Calibration(3, tuple(old), tuple(power), tuple(ended), ("first",))
    mine = Calibration(3, tuple(new), (replace(power[0], runs=9),), (replace(ended[0], runs=9),), ("second",))
    both = before.with_more(mine)
    assert both.rates == (new[0], old[1], new[1])
    assert [(p.law, p.runs) for p in both.power] == [(y.name, 8), (x.name, 9)]
    assert [(v.law, v.runs) for v in both.verdicts] == [(x.name, 9), (y.name, 4)]
    assert both.made_by == ("first", "second")
    assert "* `second`" in calibration_markdown(both)
    with pytest.raises(UsageError, match="figures of two seeds"):
        before.with_more(replace(mine, seed=4))


def test_a_calibration_reads_back_as_it_was_written(tmp_path: Path) -> None:
    x = law("leave_one_out on chain")
    made = replace(calibrate([x], runs=100, questions=["null", "verdicts"]), made_by=("it",))
    path = tmp_path / "calibration.json"
    path.write_text(json.dumps(calibration_json(made)))
    assert read_calibration(path) == made
    path.write_text("{}")
    with pytest.raises(UsageError, match="not a calibration"):
        read_calibration(path)
    with pytest.raises(UsageError, match="measure all of it first"):
        read_calibration(tmp_path / "none.json")


def test_laws_are_chosen_by_how_their_names_start() -> None:
    assert [x.name for x in laws_named(["Gaussian", "paid"])] == [
        "Gaussian values, P = 2", "Gaussian values, P = 32", "paid once in a hundred, P = 32",
    ]  # fmt: skip
    with pytest.raises(UnknownNameError, match="Gaussian values"):
        laws_named(["Gausian values, P = 2"])
    with pytest.raises(UnknownNameError, match="Questions: null"):
        calibrate([], questions=["nul"])


def test_a_law_on_one_line_is_not_said_to_leave_it() -> None:
    """ĝ of a coin lies along ∇J, biased or not; rounding of its mean was once taken for a direction of its own."""
    x = law("reinforce on notes/coin")
    bias = planted(x, SHAPES[0], 0.1 * math.sqrt(float(x.covariance.trace())))
    for seed in range(3):
        ended = run_to_the_end(
            x, np.random.default_rng(seed), bias=bias, settings=Settings(rtol=0.0, atol=1e-9, looks=7)
        )
        assert ended.verdict.status is Status.FAIL
        assert ended.verdict.off_axis.low == 0.0
        assert ended.verdict.off_axis.high < 1e-6
