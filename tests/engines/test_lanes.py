"""Estimators that are the same on every draw are looked at once, and nobody can tell."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pgcheck.engines.lanes import Lane, Record, evaluate, take
from pgcheck.engines.monte_carlo import LogitSpace, monte_carlo
from pgcheck.estimators.lookup import as_estimator
from pgcheck.registry import find_problem
from pgcheck.statistics.sequential import Judge, Settings
from tests.engines.test_monte_carlo import asked, bytes_of

LIGHT = Settings(first=2048, alpha=1e-4, rtol=0.02)
DRAWS = 16_384
PROBLEM = "dialogue/two-turn"
EARLY = 3_000  # draws on which the late one is still the same


def _kind(batch):
    """A number for what rows a batch has, `[M]`."""
    w = torch.rand(batch.rows, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return ((batch.logp.sum(-1) + batch.episode_return) * w).sum(-1)


@pytest.fixture(scope="module")
def chosen():
    """One, itself by another name, one that differs on a kind of batch that the first 3000 draws do not show."""
    p, rloo = find_problem(PROBLEM), as_estimator("rloo")
    kinds = _kind(p.sample(DRAWS, seed=0))
    new = (kinds[EARLY:, None] - kinds[:EARLY]).abs().amin(1) > 1e-9
    assert new.any()
    rare = kinds[EARLY:][new][0]

    def late(batch):
        return rloo.coefficients(batch) * torch.where((_kind(batch) - rare).abs() < 1e-9, 1.5, 1.0)[..., None, None]

    first = replace(rloo, name="first", coefficients=lambda batch: rloo.coefficients(batch))
    return [first, replace(first, name="again"), replace(first, name="late", coefficients=late)]


@pytest.fixture(scope="module")
def alone(chosen):
    """The bytes of each, judged by itself."""
    p = find_problem(PROBLEM)
    return [bytes_of(monte_carlo([e], p, scales=asked(1, 1.0), settings=LIGHT, draws=DRAWS)[0]) for e in chosen]


@pytest.fixture
def counted(monkeypatch):
    """How many records took grains, at each step."""
    taken = []

    def evaluated(self, *given, before=Record.evaluated):
        taken.append(given[-1])
        return before(self, *given)

    monkeypatch.setattr(Record, "evaluated", evaluated)
    return taken


def test_what_is_the_same_is_looked_at_once_as_long_as_it_is(chosen, alone, counted):
    p = find_problem(PROBLEM)
    found = monte_carlo(chosen, p, scales=asked(3, 1.0), settings=LIGHT, draws=DRAWS)
    assert [bytes_of(m) for m in found] == alone
    assert alone[0] == alone[1] != alone[2]
    assert counted.count(0) == 1
    assert counted.count(counted[-1]) == 2


def test_neither_claims_nor_the_one_that_is_compared_to_are_mixed_up(chosen):
    p = find_problem(PROBLEM)
    scales, how = [[1.0], [None], [1.0, None], []], {"settings": LIGHT, "draws": DRAWS}
    same = [chosen[0], chosen[1], chosen[2], replace(chosen[0], name="third")]
    found = monte_carlo(same, p, scales=scales, beside=3, **how)
    for i in range(3):
        apart, _ = monte_carlo([same[i], same[3]], p, scales=[scales[i], []], beside=1, **how)
        assert bytes_of(apart) == bytes_of(found[i])


@pytest.mark.usefixtures("forks")
def test_processes_change_no_byte(chosen, alone):
    found = monte_carlo(chosen, find_problem(PROBLEM), scales=asked(3, 1.0), settings=LIGHT, draws=DRAWS, workers=2)
    assert [bytes_of(m) for m in found] == alone


def test_a_checkpoint_keeps_who_shares_a_record(chosen, alone, counted, tmp_path):
    p, file = find_problem(PROBLEM), tmp_path / "run.ckpt"
    how = {"scales": asked(3, 1.0), "settings": LIGHT, "draws": DRAWS, "block": 1, "checkpoint": file}

    class Stop(Exception):
        pass

    def cut(what, done, total):
        raise Stop

    with pytest.raises(Stop):
        monte_carlo(chosen, p, progress=cut, **how)
    counted.clear()
    assert [bytes_of(m) for m in monte_carlo(chosen, p, **how)] == alone
    assert counted.count(counted[0]) == 1


def test_a_zero_of_the_other_sign_is_not_the_same():
    """Nor is a number in another precision; each keeps a record of its own."""
    x = torch.randn(1024, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[5, 1] = 0.0
    other = x.clone()
    other[5, 1] = -0.0
    reference = torch.ones(3, dtype=torch.float64)
    lanes = [
        Lane(as_estimator("rloo"), Record({1.0: Judge(reference, Settings(first=2048, alpha=1e-4))})) for _ in range(4)
    ]
    new = evaluate(lanes, [(y, None) for y in (x, other, x.to(torch.float32).double(), x.clone())], reference, 0)
    take(lanes, new)
    assert [new.index(g) for g in new] == [0, 1, 2, 0]
    assert lanes[3].record is lanes[0].record
    assert len({id(lane.record) for lane in lanes}) == 3


def test_the_same_weights_of_rows_are_made_into_estimates_once(monkeypatch):
    p, asked_for = find_problem("sampled/groups-16"), []

    def project_rows(self, w, table, index, before=LogitSpace.project_rows):
        asked_for.append(w)
        return before(self, w, table, index)

    monkeypatch.setattr(LogitSpace, "project_rows", project_rows)
    rloo, grpo = as_estimator("rloo"), as_estimator("grpo")
    found = monte_carlo([rloo, grpo, replace(rloo, name="again"), replace(grpo, name="too")], p, draws=1024)
    assert len(asked_for) == 2
    assert bytes_of(found[0]) == bytes_of(found[2]) != bytes_of(found[1]) == bytes_of(found[3])
