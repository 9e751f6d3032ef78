"""Sampled moments and verdicts: against enumeration, and the same bytes however they are run."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import pgcheck
from pgcheck.engines.accounts import Account
from pgcheck.engines.coefficients import estimates, per_row, unmasked_coefficients
from pgcheck.engines.exact import exact_moments
from pgcheck.engines.monte_carlo import LogitSpace, Sampling, _Run, monte_carlo
from pgcheck.estimators.lookup import as_estimator
from pgcheck.registry import find_problem
from pgcheck.statistics.sequential import Settings
from pgcheck.verdicts.verdict import Status

NAMES = ("reinforce", "batch_mean", "rloo", "grpo", "reward_to_go")
LIGHT = Settings(first=2048, alpha=1e-4, rtol=0.2)


def estimators(*names):
    return [as_estimator(name) for name in names]


def asked(n, *scales):
    return [list(scales)] * n


def bytes_of(found):
    m = found
    numbers = [x for v in m.intervals.values() for x in (v.value, v.low, v.high)]
    pairs = None if m.pairs is None else [x.numpy().tobytes() for x in m.pairs.state().values()]
    return m.mean.numpy().tobytes(), m.covariance.numpy().tobytes(), repr(numbers), repr(found.judgements), pairs


@pytest.mark.parametrize("problem", ["dialogue/two-turn", "off-policy/contextual-drifted", "mdp/two-state"])
def test_moments_are_those_of_enumeration(problem):
    p = find_problem(problem)
    chosen = [e for e in estimators(*NAMES) if e.fits(p)]
    n = 32_768
    for sampled, exact in zip(monte_carlo(chosen, p, seed=3, draws=n), exact_moments(chosen, p), strict=True):
        assert sampled.batches == n
        assert sampled.seed == 3
        error = (exact.covariance.diagonal() / n).sqrt().reshape(exact.mean.shape)
        assert ((sampled.mean - exact.mean).abs() <= 5 * error + 1e-14).all()
        assert torch.allclose(sampled.covariance, exact.covariance, rtol=0, atol=0.1 * exact.total_variance)
        g = p.gradient()
        scale = float((exact.mean * g).sum() / (g * g).sum())
        bias = float((exact.mean - g).norm())
        V = exact.total_variance
        truth = {"scale": scale, "bias": bias, "rel": bias / float(g.norm()), "variance": V, "mse": V + bias**2,
                 "snr": float(exact.mean.norm()) / math.sqrt(V)}  # fmt: skip
        for name, value in truth.items():  # at another level: 95% intervals would fail one time in twenty
            x = sampled.intervals[name]
            width = x.high - x.low
            assert x.low - width <= value <= x.high + width, name
            assert x.low <= x.value <= x.high, name


def test_moments_are_the_textbook_ones():
    """Against torch's own mean and covariance of the same estimates, drawn by `Problem.sample`."""
    p = find_problem("bandit/two-arm")
    (e,) = estimators("reinforce")
    batch = p.sample(2048, seed=5)
    c = e.coefficients(batch)
    pi = torch.softmax(p.logits, -1)
    x = torch.zeros(2048, *pi.shape, dtype=torch.float64)
    for i in range(p.rows):
        for t in range(batch.reward.shape[-1]):
            k, a, w = batch.context[:, i, t], batch.action[:, i, t], c[:, i, t]
            score = torch.nn.functional.one_hot(a, pi.shape[1]).to(w.dtype) - pi[k]
            x[torch.arange(2048), k] += w[:, None] * score
    x = x.flatten(1)
    (m,) = monte_carlo([e], p, seed=5, draws=2048)
    g = p.gradient().reshape(-1)
    assert torch.allclose(m.mean.reshape(-1), x.mean(0), rtol=0, atol=1e-13)
    assert torch.allclose(m.covariance, torch.cov(x.T), rtol=0, atol=1e-12)
    d = x - g
    pairs = (d.sum(0) @ d.sum(0) - (d * d).sum()) / (2048 * 2047)  # of ‖bias‖², and less than 0 half of the time
    mse = (d * d).sum(1).mean() - pairs.clamp(max=0.0)
    assert m.intervals["mse"].value == pytest.approx(float(mse), rel=1e-12)
    assert m.intervals["bias"].value == pytest.approx(math.sqrt(max(float(pairs), 0.0)), abs=1e-12)


def test_the_set_of_estimators_the_block_and_the_number_of_them_change_no_byte():
    p = find_problem("dialogue/two-turn")
    all_of_them = estimators(*NAMES)
    together = monte_carlo(all_of_them, p, scales=asked(5, 1.0), settings=LIGHT, draws=16_384, block=3)
    for e, found in zip(all_of_them, together, strict=True):
        (alone,) = monte_carlo([e], p, scales=asked(1, 1.0), settings=LIGHT, draws=16_384, block=1)
        assert bytes_of(alone) == bytes_of(found), e.name


@pytest.mark.parametrize("problem", ["sampled/groups-16", "sampled/token-tree", "sampled/walk-50"])
@pytest.mark.usefixtures("forks")
def test_no_byte_depends_on_company_or_processes_where_gradients_are_sums_of_scores_and_where_not(problem):
    """From a fixed table, from rollouts drawn anew with few logits, and with many."""
    p, how = find_problem(problem), {"settings": LIGHT, "draws": 4096}
    chosen = estimators("leave_one_out", "batch_mean(reward_to_go)", "grpo")
    together = monte_carlo(chosen, p, scales=asked(3, 1.0, None), beside=2, block=3, **how)
    shared = monte_carlo(chosen, p, scales=asked(3, 1.0, None), beside=2, workers=2, **how)
    for one, other in zip(together, shared, strict=True):
        assert bytes_of(one) == bytes_of(other)
    for i, e in enumerate(chosen[:2]):
        alone, _ = monte_carlo([e, chosen[2]], p, scales=asked(2, 1.0, None), beside=1, **how)
        assert bytes_of(alone) == bytes_of(together[i]), e.name


@pytest.mark.parametrize("problem", ["sampled/groups-16", "sampled/token-tree", "sampled/walk-50", "mdp/two-state"])
def test_weights_of_rows_give_what_coefficients_of_positions_give(problem):
    p = find_problem(problem)
    (e,) = estimators("leave_one_out")
    table, index = p.sampler(seed=2).draw(0, 64)
    w = per_row(unmasked_coefficients(e, table.batch(index, p.group_labels)))
    space = LogitSpace(p.gradient().reshape(-1))
    x = space.project_rows(w, table, index)
    if problem == "sampled/token-tree":  # six positions, 336 logits
        assert x is None
        x = space.project(w.unsqueeze(-1) * table.paths.mask[index], table, index)
    assert torch.allclose(x, estimates(e, table, index, p.group_labels), rtol=0, atol=1e-12 * float(x.abs().max()))


def test_weights_of_rows_give_the_same_bytes_in_blocks_of_any_size():
    p = find_problem("sampled/groups-16")
    table, index = p.sampler(seed=2).draw(0, 64)
    w = torch.randn(64, p.rows, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    space = LogitSpace(p.gradient().reshape(-1))
    whole = space.project_rows(w, table, index)
    for size in (1, 7, 32):
        parts = [space.project_rows(a, table, b) for a, b in zip(w.split(size), index.split(size), strict=True)]
        assert torch.equal(torch.cat(parts), whole)


@pytest.mark.usefixtures("forks")
def test_pairs_are_those_of_the_two_whatever_is_drawn_beside_them():
    """Also in another block, in processes, and where one of the two is done before the other."""
    p = find_problem("dialogue/two-turn")
    chosen = estimators("rloo", "grpo", "reinforce", "batch_mean")
    how = {"settings": LIGHT, "draws": 16_384, "seed": 1}
    together = monte_carlo(chosen, p, scales=asked(4, 1.0), beside=0, block=3, **how)
    assert together[0].pairs is None
    assert len({m.batches for m in together}) > 1
    for e, found in zip(chosen[1:], together[1:], strict=True):
        _, alone = monte_carlo([chosen[0], e], p, scales=asked(2, 1.0), beside=0, workers=2, **how)
        assert found.pairs.n == min(found.batches, together[0].batches)
        assert bytes_of(alone) == bytes_of(found), e.name


def test_pairs_are_the_textbook_ones():
    """‖ĝ − E ĝ‖² of both, draw by draw: their means are the variances, and their spread that of the same draws by hand."""
    p, n = find_problem("mdp/two-state"), 4096
    one, other = estimators("grpo", "rloo")
    found, _ = monte_carlo([one, other], p, seed=4, draws=n, beside=1)
    table, index = p.sampler(seed=4).draw(0, n)
    q = []
    for e in (one, other):
        x = estimates(e, table, index, p.group_labels)
        c = x[:1024].mean(0)
        q.append(((x - c) ** 2).sum(1) - ((x.mean(0) - c) ** 2).sum())
    a, b = (x.numpy() for x in q)
    assert found.pairs.mean == pytest.approx([a.mean(), b.mean()], rel=1e-12)
    assert found.pairs.second / n == pytest.approx(
        [a.var(), ((a - a.mean()) * (b - b.mean())).mean(), b.var()], rel=1e-9
    )
    y = a - 0.7 * b
    scores = found.pairs.minus(0.7)
    assert (scores.low[0], scores.high[0]) == pytest.approx((y.min(), y.max()), rel=1e-9)
    assert (scores.mean[0], scores.m2[0], scores.m3[0]) == pytest.approx(
        (y.mean(), ((y - y.mean()) ** 2).sum(), ((y - y.mean()) ** 3).sum()), rel=1e-7
    )


def test_intervals_of_paired_numbers_hold_the_exact_ones():
    """V/V', N* and R* of 24 seeds, which are what they are: 95% intervals of the ratio hold it 21 times or more, boxes for
    the crossings always do."""
    p, names = find_problem("dialogue/two-turn"), ["rloo", "grpo"]
    exact = pgcheck.compare(names, p).set_index("estimator")
    held = dict.fromkeys(("ratio", "break_even", "break_even_rollouts"), 0)
    sampling = {"draws": 8192, "tolerance": 0.2, "alpha": 1e-3}
    for seed in range(24):
        table = pgcheck.compare(names, p, engine="monte_carlo", sampling=pgcheck.Sampling(seed=seed, **sampling))
        row = table.set_index("estimator").loc["grpo"]
        assert row["ratio_high"] - row["ratio_low"] < 0.2 * row["ratio"]
        for name in held:
            held[name] += bool(row[f"{name}_low"] <= exact.loc["grpo", name] <= row[f"{name}_high"])
    assert held["ratio"] >= 21
    assert held["break_even"] == held["break_even_rollouts"] == 24


def test_another_seed_gives_other_draws():
    p = find_problem("bandit/two-arm")
    one, other = (monte_carlo(estimators("reinforce"), p, seed=s, draws=1024)[0] for s in (0, 1))
    assert not torch.equal(one.mean, other.mean)


def test_verdicts_are_those_of_enumeration():
    p = find_problem("dialogue/two-turn")
    found = monte_carlo(estimators(*NAMES), p, scales=asked(5, 1.0), seed=1)
    status = [x.judgements[1.0].status for x in found]
    assert status == [Status.PASS, Status.FAIL, Status.PASS, Status.FAIL, Status.PASS]


def test_a_scale_is_judged_at_the_scale():
    p = find_problem("dialogue/two-turn")
    κ = (p.rows - 1) / p.rows
    (found,) = monte_carlo(estimators("batch_mean"), p, scales=[[κ, None, 1.0]], seed=1)
    assert {k: j.status for k, j in found.judgements.items()} == {κ: Status.PASS, None: Status.PASS, 1.0: Status.FAIL}


@given(st.integers(0, 2**31), st.integers(1, 6), st.integers(2, 40))
def test_merging_is_associative_and_is_the_whole(seed, P, n):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3 * n, P, generator=generator, dtype=torch.float64) ** 3
    g = torch.randn(P, generator=generator, dtype=torch.float64)
    centre = x[0]
    a, b, c = (Account.of(part, g, centre=centre) for part in x.split(n))
    whole = Account.of(x, g, centre=centre)
    for merged in (a.merge(b).merge(c), a.merge(b.merge(c))):
        assert merged.n == 3 * n
        assert torch.allclose(merged.mean, whole.mean, rtol=1e-12, atol=1e-12)
        assert torch.allclose(merged.squares, whole.squares, rtol=1e-9, atol=1e-9)
        for name in ("mean", "m2", "m3"):
            here, there = getattr(merged.scores, name), getattr(whole.scores, name)
            assert here == pytest.approx(there, rel=1e-8, abs=1e-8 * abs(there).max())


# -- what can go wrong


def test_one_nan_in_many_draws_is_named_with_what_reproduces_it():
    p = find_problem("dialogue/two-turn")
    seed, number = 11, 5000
    marked = float(p.sample(1, seed=seed, first=number).logp.sum())

    def rare(batch):
        c = batch.episode_return.unsqueeze(-1) * batch.mask / batch.rows
        hit = (batch.logp.sum((-1, -2)) - marked).abs() < 1e-12
        return torch.where(hit[..., None, None], torch.nan, c)

    e = pgcheck.from_coefficients(rare, couples="batch")
    first = next(
        i for i in range(number + 1) if abs(float(p.sample(1, seed=seed, first=i).logp.sum()) - marked) < 1e-12
    )
    with pytest.raises(pgcheck.NotFiniteError, match=rf"draw {first:,} of seed 11") as caught:
        monte_carlo([e], p, seed=seed, draws=8192)
    assert f"problem.sample(1, seed=11, first={first})" in str(caught.value)


def test_identical_draws_get_no_verdict():
    p = find_problem("bandit/two-arm")

    def nothing(batch):
        return batch.mask * 0.0

    (found,) = monte_carlo(
        [pgcheck.from_coefficients(nothing, couples="trajectory")], p, scales=asked(1, 1.0), draws=8192
    )
    judgement = found.judgements[1.0]
    assert (judgement.status, judgement.note) == (Status.INCONCLUSIVE, "constant")


def test_an_infinite_variance_gets_no_verdict():
    """A weight 1/u with u uniform: mean and variance do not exist."""
    p = find_problem("mdp/two-state")

    def wild(batch):
        u = (batch.logp.exp().sum(-1, keepdim=True) * 1e7) % 1.0
        return batch.mask / (u + 1e-12) ** 3 / batch.rows

    (found,) = monte_carlo([pgcheck.from_coefficients(wild, couples="trajectory")], p, scales=asked(1, 1.0), draws=8192)
    assert found.judgements[1.0].status is not Status.PASS


@pytest.mark.parametrize("wrong", [{"draws": 0}, {"draws": 1000}, {"seed": -1}, {"block": 0}])
def test_settings_that_cannot_be(wrong):
    p = find_problem("bandit/two-arm")
    with pytest.raises(pgcheck.UsageError, match=next(iter(wrong))):
        monte_carlo(estimators("reinforce"), p, scales=asked(1, 1.0), **wrong)


# -- checkpoints


def test_a_run_goes_on_from_its_checkpoint_to_the_same_bytes(tmp_path):
    p, file = find_problem("dialogue/two-turn"), tmp_path / "run.ckpt"
    es = estimators("rloo", "grpo")
    tight = replace(LIGHT, rtol=0.02)
    settings = {"scales": asked(2, 1.0), "settings": tight, "draws": 32_768, "block": 2}
    whole = monte_carlo(es, p, **settings)

    class Stop(Exception):
        pass

    def cut(after):
        def progress(what, done, total):
            if done >= after:
                raise Stop

        return progress

    for after in (2048, 4096, 8192):
        with pytest.raises(Stop):
            monte_carlo(es, p, checkpoint=file, progress=cut(after), **settings)
    resumed = monte_carlo(es, p, checkpoint=file, **settings)
    assert [bytes_of(x) for x in resumed] == [bytes_of(x) for x in whole]
    again = monte_carlo(es, p, checkpoint=file, **settings)  # nothing is left to do
    assert [bytes_of(x) for x in again] == [bytes_of(x) for x in whole]


@pytest.mark.parametrize("change", ["problem", "seed", "draws", "estimator", "settings", "torn"])
def test_a_checkpoint_of_another_run_is_refused(tmp_path, change):
    p, file = find_problem("bandit/two-arm"), tmp_path / "run.ckpt"
    (e,) = estimators("reinforce")
    settings = {"scales": asked(1, 1.0), "settings": LIGHT, "draws": 4096, "seed": 0}
    monte_carlo([e], p, checkpoint=file, **settings)
    if change == "problem":
        p = p.at(1)
    elif change == "estimator":
        e = replace(as_estimator("reward_to_go"), name="reinforce", coefficients=lambda b: 2 * b.mask / b.rows)
    elif change == "settings":
        settings["settings"] = replace(LIGHT, beta=1e-2)
    elif change == "torn":
        file.write_bytes(file.read_bytes()[:100])
    else:
        settings[change] = 8192 if change == "draws" else 1
    with pytest.raises(pgcheck.UsageError, match="checkpoint"):
        monte_carlo([e], p, checkpoint=file, **settings)


SCRIPT = """
import sys
from pathlib import Path
from pgcheck.engines.monte_carlo import monte_carlo
from pgcheck.estimators.lookup import as_estimator
from pgcheck.registry import find_problem
from pgcheck.statistics.sequential import Settings
file, out = map(Path, sys.argv[1:])
def told(what, done, total):
    print(done, flush=True)
(x,) = monte_carlo([as_estimator("rloo")], find_problem("dialogue/two-turn"), scales=[[1.0]],
    settings=Settings(first=2048, alpha=1e-4, rtol=0.01), draws=262_144, block=2, checkpoint=file, progress=told)
out.write_text(repr((x.mean.tolist(), x.intervals, x.judgements)))
"""


def test_sigkill_loses_at_most_a_block(tmp_path):
    def start(file, out):
        return subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(SCRIPT), str(file), str(out)], stdout=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )  # fmt: skip

    whole, out = tmp_path / "whole.txt", tmp_path / "killed.txt"
    with start(tmp_path / "a", whole) as process:
        told = list(map(int, process.communicate()[0].split()))
    assert told[-1] == 262_144
    seen = 0
    for after in (2, 5, 1):  # blocks, each time from where the one before was killed
        with start(tmp_path / "b", out) as process:
            lines = [int(process.stdout.readline()) for _ in range(after)]
            process.send_signal(signal.SIGKILL)
        at = [0, *told].index(seen)
        assert lines[0] in told[at : at + 2]  # what a block that was saved but not told has in it is not lost
        seen = lines[-1]
    with start(tmp_path / "b", out) as process:
        process.communicate()
    assert out.read_text() == whole.read_text()


def test_memory_is_flat_in_the_number_of_draws(tmp_path):
    """What is kept of a run after 8 192 and after 65 536 draws; the judge is still undecided then."""
    p, tight = find_problem("dialogue/two-turn"), replace(LIGHT, rtol=1e-3)
    sizes = []
    for n in (8192, 65_536):
        file = tmp_path / str(n)
        (found,) = monte_carlo(estimators("rloo"), p, scales=asked(1, 1.0), settings=tight, draws=n, checkpoint=file)
        assert found.batches == n
        sizes.append(sum(x.numel() for x in tensors_in(torch.load(file, weights_only=True))))
    assert sizes[0] == sizes[1]


def tensors_in(x):
    if isinstance(x, torch.Tensor):
        return [x]
    return [
        t
        for part in (x.values() if isinstance(x, dict) else x if isinstance(x, list) else ())
        for t in tensors_in(part)
    ]


@pytest.mark.parametrize(("name", "status"), [("leave_one_out", "PASS"), ("batch_mean", "FAIL")])
def test_bounds_that_are_known_decide(name: str, status: str) -> None:
    """‖ĝ − ∇J‖ is below 4 from every batch (a draw beyond that is an error); E ĝ is ∇J, or three quarters of it. The seed is
    fixed, and with it the outcome."""
    problem, e = find_problem("dialogue/two-turn"), as_estimator(name)
    how = Sampling(bounds=(-4.0, 4.0), tolerance=0.1)
    assert how.settings.bounds == (-4.0, 4.0)
    (found,) = monte_carlo([e], problem, scales=[(1.0,)], settings=how.settings, draws=65_536)
    assert found.judgements[1.0].status is Status[status]
    (exact,) = exact_moments([e], problem)
    assert (float((exact.mean - problem.gradient()).norm()) > 0.1 * float(problem.gradient().norm())) == (
        status == "FAIL"
    )


def test_a_block_of_draws_is_small_whatever_an_estimator_differentiates():
    """Positions, times actions for one that weighs the logits of each, beside which the others' blocks stay as they are; of a
    task whose contexts are not listed too."""
    weights, most = replace(as_estimator("rloo"), leaf="logits"), 2**21
    for name in ("lm-large/written", "sampled/token-tree"):
        p = find_problem(name)
        alone, beside = (
            _Run(chosen, p, LogitSpace(torch.zeros(2)), 0, "cpu", LIGHT, [()] * len(chosen))
            for chosen in ([as_estimator("rloo")], [as_estimator("rloo"), weights])
        )
        assert alone._rows == beside._rows
        for rows, width in ((beside._rows, 1), (beside._logit_rows, p.actions)):
            held = rows * p.rows * p.steps * width
            assert held <= most
            assert rows == beside._at_once * 1024 or 2 * held > most
