"""The largest eigenvalue that is proven from above: against LAPACK's, on spectra that are hard to tell apart."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pgcheck.statistics import eigenvalues
from pgcheck.statistics.eigenvalues import largest_eigenvalues

N = 200
SPECTRA = {
    "falls": 0.8 ** np.arange(N),
    "one above many alike": np.array([2.0] + [1.0] * (N - 1)),
    "flat": np.ones(N),
    "almost flat": 1.0 + 1e-3 * np.linspace(0, 1, N),
    "two alike on top": np.array([1.0, 1.0, *0.5 ** np.arange(1, N - 1)]),
    "two almost alike on top": np.array([1.0, 1.0 - 1e-9, *0.5 ** np.arange(1, N - 1)]),
    "rank one": np.array([3.0] + [0.0] * (N - 1)),
    "tiny": 1e-200 * 0.8 ** np.arange(N),
    "zero": np.zeros(N),
}


@pytest.mark.parametrize("name", SPECTRA)
def test_it_is_the_largest(name: str) -> None:
    rotation, _ = np.linalg.qr(np.random.default_rng(1).standard_normal((N, N)))
    gram = rotation * SPECTRA[name] @ rotation.T
    gram = (gram + gram.T) / 2
    (found,) = largest_eigenvalues(torch.from_numpy(gram).unsqueeze(0)).tolist()
    true = SPECTRA[name].max()
    assert true * (1 - 1e-13) <= found <= true * (1 + 2e-12) + 1e-14 * (name == "zero")


def test_a_start_that_does_not_see_it_is_found_out() -> None:
    """The recurrence never leaves the space of the second eigenvalue and those below; the factorisation breaks down."""
    start = np.random.Generator(np.random.Philox(N)).standard_normal(N)
    basis, _ = np.linalg.qr(np.column_stack([start, np.random.default_rng(2).standard_normal((N, N - 1))]))
    top = basis[:, -1]  # orthogonal to the start
    mixed, _ = np.linalg.qr(np.random.default_rng(4).standard_normal((N - 1, N - 1)))
    below = basis[:, :-1] @ mixed
    gram = 5.0 * np.outer(top, top) + below * 0.7 ** np.arange(N - 1) @ below.T
    gram = (gram + gram.T) / 2
    eigenvalue = np.linalg.eigvalsh(gram)[-1]
    (seen,) = eigenvalues._ritz((gram - 5.0 * np.outer(top, top))[None])
    assert seen < 1.1
    assert eigenvalue == pytest.approx(5.0, rel=1e-12)
    assert largest_eigenvalues(torch.from_numpy(gram).unsqueeze(0)).item() == pytest.approx(5.0, rel=2e-12)
    rest = torch.diag_embed(torch.full((N,), seen * (1 + 1e-12), dtype=torch.float64)) - torch.from_numpy(gram)
    assert int(torch.linalg.cholesky_ex(rest).info) > 0


def test_of_draws_it_is_no_less_than_any_quotient() -> None:
    """Of Gram matrices of skewed draws, several at once: Rayleigh quotients of random vectors, and of the singular one."""
    x = torch.randn(5, 256, 300, generator=torch.Generator().manual_seed(3), dtype=torch.float64) ** 3
    x *= torch.logspace(0, -1, 300, dtype=torch.float64)
    grams = x @ x.mT
    found = largest_eigenvalues(grams)
    for gram, top, rows in zip(grams, found, x, strict=True):
        assert top.item() == pytest.approx(np.linalg.norm(rows.numpy(), 2) ** 2, rel=1e-11)
        u = torch.linalg.svd(rows).U[:, 0]
        assert float(u @ gram @ u) <= top.item() * (1 + 1e-14)


def test_each_is_found_as_if_it_were_alone() -> None:
    """To the bit, whatever is beside it: some settle after 20 steps, some after 40, some never, some are done at once."""
    rotation, _ = np.linalg.qr(np.random.default_rng(1).standard_normal((N, N)))
    grams = torch.from_numpy(np.stack([rotation * values @ rotation.T for values in SPECTRA.values()]))
    together = largest_eigenvalues(grams)
    alone = torch.cat([largest_eigenvalues(gram.clone().unsqueeze(0)) for gram in grams])
    assert torch.equal(together, alone)
    assert torch.equal(largest_eigenvalues(grams.flip(0)).flip(0), alone)
