"""What is made of a grain once: against the definitions, and the same bytes in another process."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

from pgcheck.statistics.certificate import GRAM, of_blocks_and_across
from pgcheck.statistics.grain import PRODUCTS_UP_TO, Grain


def grain(P: int, *, dtype: torch.dtype = torch.float64, n: int = 300) -> Grain:
    generator = torch.Generator().manual_seed(P)
    x = 3.0 + torch.randn(n, P, generator=generator, dtype=torch.float64) ** 3
    return Grain.of(x.to(dtype), x[:50].mean(0))


@pytest.mark.parametrize("P", [1, 7, 200, 400, PRODUCTS_UP_TO + 1])
def test_sums_from_any_point_are_their_definitions(P: int) -> None:
    g = grain(P)
    generator = torch.Generator().manual_seed(1)
    x = g.x.numpy()
    for t in (torch.zeros(P, dtype=torch.float64), g.centre, torch.randn(P, generator=generator, dtype=torch.float64)):
        d = x - t.numpy()
        assert np.allclose(g.total_from(t), d.sum(0), rtol=1e-12, atol=1e-10)
        assert np.allclose(g.squares_from(t), (d**2).sum(0), rtol=1e-12)
        assert np.allclose(g.distances_from(t), (d**2).sum(1), rtol=1e-12)
    v = torch.randn(P, 3, generator=generator, dtype=torch.float64)
    assert np.allclose(g.along(v).T, x @ v.numpy(), rtol=1e-12, atol=1e-10)
    assert np.allclose(g.along(v, t).T, (x - t.numpy()) @ v.numpy(), rtol=1e-12, atol=1e-10)
    off = x - g.centre.numpy()
    assert np.allclose(g.products, np.einsum("ni,nj->ij", off, off), rtol=1e-12, atol=1e-9)
    assert torch.equal(g.products, g.products.T)


def test_distances_do_not_cancel_where_the_noise_is_small() -> None:
    """A millionth of noise around a far point: the squares keep nine digits, which a difference of squares would lose."""
    noise = torch.randn(100, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    g = Grain.of(1000.0 + 1e-6 * noise)
    true = ((1e-6 * (noise - noise.mean(0))) ** 2).sum(1)
    assert torch.allclose(g.spread, true, rtol=1e-5, atol=0)


def test_draws_of_less_precision_are_remembered_as_such() -> None:
    assert grain(4, dtype=torch.float32).eps == torch.finfo(torch.float32).eps
    assert grain(4).eps == torch.finfo(torch.float64).eps


@pytest.mark.parametrize("P", [7, 400])
def test_a_grain_that_was_sent_is_the_same_bytes(P: int) -> None:
    here = grain(P)
    there = pickle.loads(pickle.dumps(here, protocol=5))
    assert "products" not in vars(there)
    t = torch.arange(P, dtype=torch.float64)
    for name in ("total_from", "squares_from", "distances_from"):
        assert torch.equal(getattr(here, name)(t), getattr(there, name)(t)), name
    assert torch.equal(here.along(t.unsqueeze(1)), there.along(t.unsqueeze(1)))


@pytest.mark.parametrize("P", [3, 400])
def test_what_lies_across_a_direction_is_its_definition(P: int) -> None:
    generator = torch.Generator().manual_seed(2)
    along = torch.randn(P, generator=generator, dtype=torch.float64)
    along /= along.norm()
    blocks = torch.randn(3, GRAM, P, generator=generator, dtype=torch.float64) + 2 * along
    across = blocks - (blocks @ along).unsqueeze(-1) * along
    for (tops, squares), parts in zip(of_blocks_and_across(blocks, along), (blocks, across), strict=True):
        for top, square, x in zip(tops, squares, parts, strict=True):
            gram = (x @ x.T).numpy()
            assert top == pytest.approx(np.linalg.norm(x.numpy(), 2) ** 2 / GRAM, rel=1e-9)
            assert square == pytest.approx(np.mean(gram[~np.eye(GRAM, dtype=bool)] ** 2), rel=1e-9)
