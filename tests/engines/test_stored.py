"""Verdicts against estimates that were made before, on a task whose ∇J is known exactly as well."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

import pgcheck
from pgcheck.engines.choice import moments_by
from pgcheck.engines.exact import exact_moments
from pgcheck.engines.monte_carlo import Sampling, monte_carlo
from pgcheck.engines.parameters import ParameterSpace, number_of_parameters
from pgcheck.engines.sketch import default_space
from pgcheck.engines.stored import STORED, Stored, reference_draws
from pgcheck.errors import NotFiniteError, UsageError
from pgcheck.render.messages import seen_words
from pgcheck.runs.runner import run
from pgcheck.statistics.guarded import interval
from pgcheck.statistics.sequential import Settings
from pgcheck.statistics.status import Status
from tests.engines.test_sketch import problem

LIGHT = Settings(alpha=1e-4, first=2_048)
LOO = pgcheck.as_estimator("leave_one_out")


def stored_on(p: pgcheck.Problem, rows: torch.Tensor) -> Stored:
    space = default_space(p, reference=rows, first_look=LIGHT.first_look)
    assert isinstance(space, Stored)
    return space


def test_stored_estimates_are_unbiased_and_no_draws_of_a_run() -> None:
    p = problem(group_size=2)
    rows = reference_draws(LOO, p, draws=3_000)
    g = p.parameter_gradient()
    z = (rows.mean(0) - g) / (rows.std(0) / math.sqrt(len(rows))).clamp(min=1e-12)
    assert float(z.abs().max()) < stats.norm.isf(1e-9 / len(g))
    assert torch.equal(rows[:1_500], reference_draws(LOO, p, draws=1_500))
    assert not torch.equal(rows[:9], reference_draws(LOO, p, draws=9, seed=1))
    drawn, index = p.sampler(seed=0).draw(0, 64)
    mine = [float(x) for x in rows[:64].norm(dim=1)]
    from pgcheck.engines.trusted import coefficients_on

    c = coefficients_on(LOO, drawn, index, p.group_labels)
    own = ParameterSpace(p).project(c, drawn, index).norm(dim=1)
    assert not np.allclose(sorted(mine), sorted(own.tolist()), atol=1e-6)


@pytest.mark.parametrize("kind", ["table", "written"])
def test_verdicts_against_what_was_stored(kind: str) -> None:
    """With κ named and open, as the exact numbers say; the bias has the noise of both, and no more than that."""
    p, table = problem(kind, group_size=4), problem(group_size=4)
    space = stored_on(p, reference_draws(LOO, table, draws=11_000))
    assert space.most_draws == 8_192
    names = ("leave_one_out", "grpo")
    es = [pgcheck.as_estimator(n) for n in names]
    found = monte_carlo(es, p, scales=[[1.0, None]] * 2, space=space, draws=space.most_draws, settings=LIGHT)
    g = table.parameter_gradient()
    for m, exact in zip(found, exact_moments(es, table), strict=True):
        mean = exact.mean_in_parameters()
        low, high = m.intervals["rel"].low, m.intervals["rel"].high
        assert low <= float((mean - g).norm() / g.norm()) + 1e-12
        assert high >= float((mean - g).norm() / g.norm()) * (1 - 1e-12)
        assert m.view is not None
        assert m.view.against == STORED
    assert found[0].judgements[1.0].status is not Status.FAIL
    assert found[0].judgements[None].status is not Status.FAIL
    assert [found[1].judgements[κ].status for κ in (1.0, None)] == [Status.FAIL] * 2


def test_the_noise_of_the_reference_is_in_the_spectrum_of_a_judge() -> None:
    """Cov D = Cov x + κ² Cov r, against exact covariances."""
    p = problem(group_size=2)
    rows = reference_draws(pgcheck.as_estimator("reinforce"), p, draws=8_192)
    space = stored_on(p, rows)
    (m,) = monte_carlo([LOO], p, scales=[[1.0]], space=space, draws=space.most_draws, settings=LIGHT)
    x, r = exact_moments([LOO, pgcheck.as_estimator("reinforce")], p)
    total = sum(float(e.in_parameters()[1].diagonal().sum()) for e in (x, r))
    j = m.judgements[1.0]
    of_bias = m.intervals["bias"]
    assert j.missed_bias**2 > total / j.draws / 4  # noise of both bounds what could be missed
    assert of_bias.high > 0.2 * math.sqrt(total / j.draws)
    gap = rows[2_048:] - rows[2_048:].mean(0)
    assert float(gap.square().sum(1).mean()) == pytest.approx(float(r.in_parameters()[1].diagonal().sum()), rel=0.1)


def test_a_biased_reference_shows() -> None:
    """What is assumed of it is not seen: what is stored decides. A reference 30% too long fails an unbiased estimator."""
    p = problem(group_size=4)
    space = stored_on(p, 1.3 * reference_draws(LOO, p, draws=11_000))
    (m,) = monte_carlo([LOO], p, scales=[[1.0, None]], space=space, draws=space.most_draws, settings=LIGHT)
    assert m.judgements[1.0].status is Status.FAIL
    assert m.judgements[None].status is not Status.FAIL
    v = m.judgements[None].scale
    assert v.low < 1 / 1.3 < v.high


def test_the_length_of_what_was_stored() -> None:
    """The tolerance is that of a length that ∇J has at least."""
    p = problem(group_size=4)
    space = stored_on(p, reference_draws(LOO, p, draws=11_000))
    length = float(p.parameter_gradient().norm())
    assert space.length is not None
    assert float(interval(space.length, confidence=0.9999, sides=1)[0][0]) < length
    assert 0.8 < float(space.reference.norm()) / length < 1.2
    assert space.settings(Settings()).rtol * float(space.reference.norm()) < 0.05 * length


@pytest.mark.usefixtures("forks")
def test_from_the_door(tmp_path: Path) -> None:
    """A file, a path, an array: the same report, which says what it was held against; bytes do not depend on workers."""
    p = problem("written", group_size=4)
    rows = reference_draws(LOO, p, draws=11_000)
    torch.save(rows, tmp_path / "r.pt")
    np.save(tmp_path / "r.npy", rows.numpy())
    grpo = replace(pgcheck.as_estimator("grpo"), claims=(pgcheck.unbiased(),))
    reports = []
    for reference, workers in ((rows, 1), (tmp_path / "r.pt", 2), (str(tmp_path / "r.npy"), 1)):
        sampling = Sampling(reference=reference, workers=workers, draws=8_192)
        report = run([grpo], [p], checks=["unbiased"], engine="auto", sampling=sampling)
        reports.append(report.to_json())
        assert f"by the difference from {STORED}; judged with" in seen_words(report.measurements[0])
    assert reports[0] == reports[1] == reports[2]
    assert '"FAIL"' in reports[0]


def test_bad_input(tmp_path: Path) -> None:
    p = problem(group_size=2)
    P = number_of_parameters(p)
    good = torch.randn(8_192, P, dtype=torch.float64)

    def asked(reference: Any, engine: Any = "auto") -> None:
        moments_by(engine, [LOO], p, sampling=Sampling(reference=reference), scales=[[1.0]])

    with pytest.raises(UsageError, match="engine='auto' or 'monte_carlo'"):
        asked(good, "exact")
    with pytest.raises(UsageError, match=rf"stored estimates are \[n, {P}\]"):
        asked(good[:, 1:])
    with pytest.raises(UsageError, match="the least is 5,461"):
        asked(good[:5_460])
    with pytest.raises(NotFiniteError, match="stored estimate 17 is"):
        asked(torch.where(torch.arange(8_192).unsqueeze(1) == 17, math.nan, good))
    with pytest.raises(UsageError, match="no such file"):
        asked(tmp_path / "none.pt")
    (tmp_path / "r.pt").write_text("no")
    with pytest.raises(UsageError, match="cannot be read"):
        asked(tmp_path / "r.pt")
    torch.save({"a": good}, tmp_path / "d.pt")
    with pytest.raises(UsageError, match="holds a dict"):
        asked(tmp_path / "d.pt")
    with pytest.raises(UsageError, match="draws: 0"):
        reference_draws(LOO, p, draws=0)
    with pytest.raises(UsageError, match="seed: -1"):
        reference_draws(LOO, p, draws=1, seed=-1)
