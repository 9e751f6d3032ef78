"""Directions of the witnesses: each formula by numpy, coordinate by coordinate."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from pgcheck.statistics.panel import WITNESSES, directions, loud_directions


@pytest.mark.parametrize("P", [1, 2, 7, 40, 300])
@pytest.mark.parametrize("aside", [False, True])
def test_each_direction_is_its_formula(P: int, aside: bool) -> None:
    rng = np.random.default_rng(P)
    n = 600
    d = (
        rng.standard_normal((n, P)) * np.geomspace(0.01, 1, P)
        + rng.standard_normal((n, 1))
        + 0.05 * rng.standard_normal(P)
    )
    mu = rng.standard_normal(P)
    mu /= np.linalg.norm(mu)
    mean, s2 = d.mean(0), d.var(0)
    z = np.abs(mean) / np.sqrt(s2 / n)
    value, vector = np.linalg.eigh(np.cov(d[:256].T, bias=True).reshape(P, P))
    value, vector = value[::-1], vector[:, ::-1]
    deflated = mean.copy()
    for i in range(min(16, P - 1)):
        deflated -= vector[:, i] * (vector[:, i] @ mean) * (1 - max(value[min(16, P - 1)] / value[i], 1e-3))
    expected = {
        "par": mu,
        "parw": mu / s2,
        "dense": mean,
        "white": mean / s2,
        "sparse": np.where(z >= min(math.sqrt(2 * math.log(max(P, 2))), z.max()), mean / s2, 0),
        "defl": deflated,
        "aside": mean - mu * (mu @ mean),
    }
    t = torch.from_numpy
    got = directions(
        t(d.sum(0)), t((d**2).sum(0)), n, along=t(mu), loud=loud_directions(t(d[:256].copy())), aside=aside
    ).numpy()
    for i, name in enumerate((*WITNESSES, "aside")):
        v = expected[name]
        if aside and name != "par":
            v = v - mu * (mu @ v)
        if np.linalg.norm(v) < 1e-12 * np.linalg.norm(expected[name]) or P == 1:
            continue
        assert np.allclose(got[:, i], v / np.linalg.norm(v), atol=1e-6), name


def test_a_coordinate_that_never_moves_has_no_weight() -> None:
    d = torch.randn(300, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    d[:, 2] = 5.0
    along = torch.ones(4, dtype=torch.float64) / 2
    got = directions(d.sum(0), (d * d).sum(0), 300, along=along, loud=loud_directions(d[:256]), aside=False)
    assert bool(torch.isfinite(got).all())
    assert got[2, WITNESSES.index("white")] == 0
    assert got[2, WITNESSES.index("dense")] > 0.99


@pytest.mark.parametrize("aside", [True, False])
def test_rounding_is_no_direction_across(aside: bool) -> None:
    """Draws along one line, whose mean is along μ* but for the last digits: what is left of it is no direction of its own."""
    rng = np.random.default_rng(5)
    line = rng.standard_normal(3)
    d = rng.standard_normal((2_000, 1)) * line * (1 + 1e-16 * rng.standard_normal((2_000, 3)))
    along = torch.from_numpy(line / np.linalg.norm(line))
    x = torch.from_numpy(d + 0.5 * line)
    got = directions(x.sum(0), (x * x).sum(0), 2_000, along=along, loud=loud_directions(x[:256]), aside=aside)
    assert got[:, -1].tolist() == [0.0] * 3
    if aside:
        assert (along @ got[:, 1:]).abs().max() < 1e-15


def test_a_direction_across_is_so_to_the_last_digits() -> None:
    """Also where it is a millionth of the mean."""
    along = torch.tensor([0.6, 0.8, 0.0], dtype=torch.float64)
    mean = along + 1e-6 * torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
    got = directions(
        100 * mean, 100 * mean**2 + 1, 100, along=along, loud=loud_directions(mean + torch.eye(3)), aside=True
    )
    assert torch.allclose(got[:, -1].abs(), torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64), atol=1e-9)
    assert (along @ got[:, 1:]).abs().max() < 1e-15
