"""Statistics over peers, against loops over rows: of batches gathered from a table, and of copies of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from pgcheck.batch import Batch
from pgcheck.estimators import advantages as adv
from pgcheck.estimators.lookup import FILLED_BY  # noqa: F401  (fills the registries)
from pgcheck.registry import find_problem

LABELS = {
    "one group": [0, 0, 0, 0, 0],
    "two, unequal": [4, 4, 4, 7, 7],
    "two, equal": [0, 0, 0, 5, 5, 5],
    "three, equal": [1, 1, 4, 4, 2, 2],
    "tiled": [0, 1, 0, 1, 0],
    "tiled, equal": [0, 1, 1, 0],
    "each by itself": [0, 1, 2],
    "one row by itself": [2, 2, 5, 2, 2],
    "a single row": [3],
}
Rows = list[float]


def others(R: Rows, i: int, mine: list[int]) -> float:
    """R_i − mean of the others; R_i alone without others."""
    rest = [R[j] for j in mine if j != i]
    return R[i] - (sum(rest) / len(rest) if rest else 0.0)


def everybody(R: Rows, i: int, mine: list[int]) -> float:
    return R[i] - sum(R[j] for j in mine) / len(mine)


def standardised(ddof: int) -> Callable[[Rows, int, list[int]], float]:
    def of_row(R: Rows, i: int, mine: list[int]) -> float:
        if len({R[j] for j in mine}) == 1:
            return 0.0
        mean = sum(R[j] for j in mine) / len(mine)
        std = math.sqrt(sum((R[j] - mean) ** 2 for j in mine) / max(len(mine) - ddof, 1))
        return (R[i] - mean) / (std + 0.01)

    return of_row


CASES: dict[str, tuple[Callable[[adv.Over], adv.Advantage], Callable[[Rows, int, list[int]], float]]] = {
    "others": (lambda over: adv.return_minus(adv.mean_of_others(over)), others),
    "mean": (lambda over: adv.return_minus(adv.mean_return(over)), everybody),
    "standardised": (lambda over: adv.standardised_return(over, eps=0.01), standardised(0)),
    "standardised, n − 1": (lambda over: adv.standardised_return(over, ddof=1, eps=0.01), standardised(1)),
}


def batches(labels: list[int]) -> tuple[Batch, Batch]:
    """20 batches of "tree/tokens" `[20, B]`, among them one whose rows are all the same rollout; and a copy."""
    table = find_problem("tree/tokens").trajectories
    index = torch.randint(len(table), (20, len(labels)), generator=torch.Generator().manual_seed(3))
    index[4] = index[4, :1]
    gathered = table.batch(index, torch.tensor(labels))
    return gathered, gathered.map(torch.Tensor.clone)


@pytest.mark.parametrize("over", ["group", "batch"])
@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("case", CASES)
def test_advantages_over_peers(case: str, labels: str, over: adv.Over) -> None:
    make, of_row = CASES[case]
    label = LABELS[labels]
    for batch in batches(label):
        found = make(over)(batch)
        for m, R in enumerate(batch.episode_return.tolist()):
            for i in range(len(R)):
                mine = [j for j in range(len(R)) if over == "batch" or label[j] == label[i]]
                assert float(found[m, i, 0]) == pytest.approx(of_row(R, i, mine), abs=1e-12)


@pytest.mark.parametrize("baseline", [adv.mean_of_others, adv.mean_return])
def test_a_baseline_is_what_is_left_out(baseline: Callable[[adv.Over], adv.OfReturns]) -> None:
    """R − b from b itself, in a product and in none."""
    for batch in batches(LABELS["two, unequal"]):
        b = baseline("group")
        left = adv.return_minus(lambda batch, b=b: b(batch))(batch)  # type: ignore[misc]
        torch.testing.assert_close(adv.return_minus(b)(batch), left, rtol=0, atol=1e-13)


@pytest.mark.parametrize("over", ["group", "batch"])
@pytest.mark.parametrize("ddof", [0, 1])
def test_returns_that_differ_by_rounding_agree(over: adv.Over, ddof: int) -> None:
    """0.1 + 0.2 − 0.3 is 6e-17 or 3e-17, as it is added up, which are one number without any ε; 1e-9 more is another."""
    labels, index = torch.zeros(3, dtype=torch.int64), torch.zeros(2, 3, dtype=torch.int64)
    batch = find_problem("tree/tokens").trajectories.batch(index, labels).map(torch.Tensor.clone)
    reward = torch.zeros_like(batch.reward)
    reward[..., :3] = torch.tensor([0.1, 0.2, -0.3], dtype=torch.float64)
    reward[:, 0] = reward[:, 0].roll(1, -1)
    reward[1, 0, 0] += 1e-9
    batch = batch.with_tensors({"reward": reward})
    assert len(set(batch.episode_return[0].tolist())) == 2
    found = adv.standardised_return(over, ddof=ddof, eps=0.0)(batch)[..., 0]
    assert found[0].tolist() == [0.0] * 3
    std = math.sqrt((4 + 1 + 1) / 9 / (3 - ddof))  # of 1, 0, 0
    assert found[1].tolist() == pytest.approx([2 / 3 / std, -1 / 3 / std, -1 / 3 / std], rel=1e-6)


def test_rounding_is_that_of_the_largest_return_of_a_table() -> None:
    """16 ulp of the largest Σ_t |γ^t r_t|, by a loop over all its rollouts, whichever are in the batch."""
    paths = find_problem("tree/tokens").trajectories.paths
    largest = max(sum(abs(paths.discount**t * r) for t, r in enumerate(row)) for row in paths.reward.tolist())
    gathered, _ = batches(LABELS["one group"])
    assert gathered.rounding.tolist() == [pytest.approx(16 * 2.0**-52 * largest, rel=1e-12)]


def test_standardised_returns_keep_their_gradient() -> None:
    """By finite differences in the return of one row."""
    labels = torch.zeros(3, dtype=torch.int64)
    batch = find_problem("tree/tokens").trajectories.batch(torch.tensor([[0, 3, 9]]), labels).map(torch.Tensor.clone)

    def first(x: torch.Tensor) -> torch.Tensor:
        moved = batch.reward.clone()
        moved[0, 1, 0] += x
        return adv.standardised_return("group")(batch.with_tensors({"reward": moved}))[0, 0, 0]

    x = torch.zeros((), dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(first(x), x)
    h = torch.tensor(1e-6, dtype=torch.float64)
    assert float(found) == pytest.approx(float(first(h) - first(-h)) / 2e-6, rel=1e-5)
    assert float(found) != 0.0


def test_what_agrees_among_drawn_rollouts_is_theirs_alone() -> None:
    """A batch among draws, one of which pays 1e16 times as much, standardises as it does by itself."""
    p = find_problem("sampled/walk-50")
    drawn, index = p.sampler(seed=0).draw(0, 4)
    rows = drawn.rows_as_batch()
    paid = rows.reward.clone()
    paid[-1, 0] = 1e16
    found = [
        adv.standardised_return("group")(Batch.gathered(replace(rows, reward=r), index, p.group_labels))[:-1]
        for r in (rows.reward, paid)
    ]
    assert found[0].abs().max() > 0.1
    assert torch.equal(found[0], found[1])
    assert not rows.lists_all
    assert find_problem("tree/tokens").trajectories.rows_as_batch().lists_all
