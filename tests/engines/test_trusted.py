"""Verdicts by difference from an unbiased estimator, against exact ones of the same task as a table."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats

import pgcheck
from pgcheck.engines import sketch, trusted
from pgcheck.engines.coefficients import coefficients_of
from pgcheck.engines.exact import exact_moments
from pgcheck.engines.monte_carlo import monte_carlo
from pgcheck.engines.parameters import ParameterSpace
from pgcheck.engines.sketch import SketchSpace, default_space
from pgcheck.engines.trusted import Paired, trusted_estimators, trusted_mixtures
from pgcheck.errors import UsageError
from pgcheck.policies import Decoding, TinyGPT
from pgcheck.problem import Problem
from pgcheck.runs.runner import run
from pgcheck.statistics.guarded import interval
from pgcheck.statistics.sequential import Settings
from pgcheck.statistics.status import Status
from tests.engines.test_sketch import problem

LIGHT = Settings(alpha=1e-4, first=2_048)


@pytest.mark.parametrize("how", ["all", "sketch"])
def test_the_length_of_a_gradient_that_is_not_known(how: str) -> None:
    """At least what a pilot says of it, which is not far off; over draws that no seed of a user's gives. The tolerance is what
    is seen of it, at least: a bias that passes is below δ ‖∇J‖."""
    p, exact = problem("written", group_size=4), problem(group_size=4)
    space = default_space(p) if how == "all" else SketchSpace.paired(p, directions=6, pilot=2_048)
    assert isinstance(space, Paired)
    length = float(exact.parameter_gradient().norm())
    assert space.length is not None
    assert float(interval(space.length, confidence=0.9999, sides=1)[0][0]) < length
    assert 0.8 < float(space.reference.norm()) / length < 1.2
    asked = Settings(rtol=0.05)
    allowed = space.settings(asked).rtol * float(space.reference.norm())
    least = 1.0 if how == "all" else math.sqrt(stats.chi2.ppf(1e-3 / 8, 6) / 6)
    assert 0.7 * least < allowed / (0.05 * length) < least
    drawn = [p.sampler(seed=s).draw(0, 3)[0].paths.action for s in (0, -1)]
    assert drawn[0].shape != drawn[1].shape or not torch.equal(*drawn)


PLANS: tuple[dict[str, Any], ...] = (
    {},
    {"group_size": 1},
    {"behavior_logits": Decoding(temperature=1.5)},
    {"entropy_coefficient": 0.2},
    {"ref_logits": TinyGPT(3, width=8, seed=9), "kl_coefficient": 0.1},
)


@pytest.mark.parametrize("plan", PLANS)
def test_what_is_trusted_is_unbiased(plan: dict[str, Any]) -> None:
    """The mixtures, exactly; and they are none of the estimators that they are made of."""
    p = problem(**plan)
    table, index = p.sampler().draw(0, 8)
    for r, own in zip(trusted_mixtures(p), trusted_estimators(p), strict=True):
        (m,) = exact_moments([replace(r, claims=())], p)
        torch.testing.assert_close(m.mean, p.gradient(), rtol=0, atol=1e-14)
        for e in trusted_estimators(p):
            here, there = (coefficients_of(x, table.batch(index, p.group_labels)) for x in (r, e))
            assert float((here - there).abs().max()) > 1e-3
            assert e is not own or float((here - there).abs().max()) < 1


def test_the_nearest_is_chosen() -> None:
    """REINFORCE differs from itself with a 32nd part of leave-one-out, not from leave-one-out: another's
    company does not matter."""
    p = problem("written", group_size=4)
    space = default_space(p)
    assert isinstance(space, Paired)
    loo, plain, grpo = (pgcheck.as_estimator(name) for name in ("leave_one_out", "reinforce", "grpo"))
    assert [space.nearest(e).name for e in (loo, plain, grpo)] == ["leave_one_out", "reinforce", "leave_one_out"]
    given: dict[str, Any] = {"space": space, "draws": 2_048, "settings": LIGHT}
    together = monte_carlo([plain, loo], p, scales=[[1.0], [1.0]], **given)
    alone = monte_carlo([plain], p, scales=[[1.0]], **given)[0]
    assert [m.view.against for m in together] == ["reinforce", "leave_one_out"]
    assert repr(alone.judgements) == repr(together[0].judgements)
    assert alone.judgements[1.0].status.name == "PASS"


def test_a_judge_in_parameters() -> None:
    """What is found of an estimator does not depend on what is judged beside it, nor on an interruption."""
    p = problem("written", group_size=4)
    space = default_space(p)
    grpo, loo = (pgcheck.as_estimator(name) for name in ("grpo", "leave_one_out"))
    given: dict[str, Any] = {"space": space, "draws": 4_096, "settings": LIGHT}
    alone = monte_carlo([grpo], p, scales=[[1.0]], **given)[0]
    beside = monte_carlo([loo, grpo], p, scales=[[1.0], [1.0]], **given)[1]
    assert torch.equal(alone.mean, beside.mean)
    assert repr(alone.judgements) == repr(beside.judgements)
    assert alone.intervals == beside.intervals


def test_a_kept_judge_goes_on(tmp_path: Path) -> None:
    p = problem("written", group_size=4)
    space, e = default_space(p), [pgcheck.as_estimator("reinforce")]
    given: dict[str, Any] = {"scales": [[1.0]], "space": space, "block": 1, "draws": 3_072, "settings": LIGHT}
    whole = monte_carlo(e, p, **given)

    class StopError(Exception): ...

    def stop(what: str, done: int, total: int) -> None:
        if done == 1_024:
            raise StopError

    kept = tmp_path / "kept"
    with pytest.raises(StopError):
        monte_carlo(e, p, checkpoint=kept, progress=stop, **given)
    again = monte_carlo(e, p, checkpoint=kept, **given)
    assert torch.equal(whole[0].mean, again[0].mean)
    assert repr(whole[0].judgements) == repr(again[0].judgements)


def test_where_a_sampled_verdict_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    assert default_space(problem("tree")) is None
    written = default_space(problem("written"))
    assert isinstance(written, Paired)
    assert isinstance(written.inside, ParameterSpace)
    monkeypatch.setattr(sketch, "MOST_COORDINATES", 20)  # logits, and parameters
    tree, written = (default_space(problem(kind), directions=3) for kind in ("tree", "written"))
    assert isinstance(tree, Paired)
    assert isinstance(written, Paired)
    assert isinstance(tree.inside, SketchSpace)
    assert isinstance(written.inside, SketchSpace)
    assert (tree.inside.lane, written.inside.lane) == ("forward", "backward")
    assert (len(tree.reference), tree.length) == (4, None)
    cut = problem("tree", behavior_logits=Decoding(top_k=2))
    assert isinstance(default_space(cut), SketchSpace)  # nothing is known to be unbiased
    with pytest.raises(UsageError, match="no estimator is known to be unbiased"):
        default_space(problem("written", behavior_logits=Decoding(top_k=2)))


def test_a_scale_that_is_not_named(tmp_path: Path) -> None:
    """Some κ > 0, judged against draws of the reference, as the same task tells exactly as a table; also interrupted."""
    p, table = problem("written", group_size=4), problem(group_size=4)
    names = ("leave_one_out", "grpo")
    e = [replace(pgcheck.as_estimator(n), claims=(pgcheck.proportional(),)) for n in names]
    given: dict[str, Any] = {"scales": [[None]] * 2, "space": default_space(p), "draws": 8_192, "settings": LIGHT}
    found = monte_carlo(e, p, **given)
    g = table.parameter_gradient()
    for m, exact in zip(found, exact_moments(e, table), strict=True):
        mean = exact.mean_in_parameters()
        κ = float(mean @ g / (g @ g))
        off = float((mean - κ * g).norm() / mean.norm())
        v = m.judgements[None]
        assert v.status is (Status.PASS if off < 1e-9 else Status.FAIL)
        assert v.off_axis.low <= off <= v.off_axis.high + 1e-9
    assert [m.judgements[None].status for m in found] == [Status.PASS, Status.FAIL]
    kept = tmp_path / "kept"

    class StopError(Exception): ...

    def stop(what: str, done: int, total: int) -> None:
        raise StopError

    with pytest.raises(StopError):
        monte_carlo(e, p, checkpoint=kept, block=3, progress=stop, **given)
    again = monte_carlo(e, p, checkpoint=kept, **given)
    assert [repr(m.judgements) for m in again] == [repr(m.judgements) for m in found]
    report = run(e[1:2], [p], checks=["proportional"], engine="auto", sampling=pgcheck.Sampling(draws=8_192))
    (verdict,) = report.verdicts
    assert verdict.status == "FAIL"


def test_a_gradient_that_a_pilot_does_not_tell_from_0() -> None:
    """Of a reward that is the same for all completions: there is no tolerance, which takes no more draws than a first look."""
    task = replace(problem("written").env, reward=lambda prompt, text: 1.0)
    p = Problem(task, TinyGPT(3, width=8), group_size=2)
    with pytest.raises(pgcheck.BiasError, match="does not tell it from 0: there is no tolerance") as caught:
        pgcheck.check_estimator("reinforce", p, checks=["unbiased"])
    (m,) = caught.value.report.measurements
    assert m.batches == pgcheck.Sampling().settings.first_look


def test_a_pilot_is_drawn_once_for_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    p, drawn = problem("written"), []
    original = trusted.coefficients_on
    monkeypatch.setattr(trusted, "coefficients_on", lambda *a: drawn.append(a) or original(*a))
    first = default_space(p)
    often = len(drawn)
    again, other = default_space(p), default_space(p, seed=1)
    assert often > 0
    assert len(drawn) == 2 * often
    assert torch.equal(first.reference, again.reference)
    assert not torch.equal(first.reference, other.reference)
