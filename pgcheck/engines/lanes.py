"""What a sampled run knows of each estimator, kept once for those whose estimates are the same.

On-policy many losses are one: every ratio is 1, the clip never bites, and one group is the batch. As long as two estimators
give the same bits for every draw, one record of them is kept; where they part, the second goes on with a copy. What is told of
an estimator is so the same bytes as if it had been alone.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pgcheck.engines.accounts import Account
from pgcheck.estimators.base import Estimator
from pgcheck.statistics.certificate import gram_blocks
from pgcheck.statistics.grain import Grain
from pgcheck.statistics.guarded import Floats
from pgcheck.statistics.open_scale import OpenJudge
from pgcheck.statistics.sequential import GRAIN, Judge
from pgcheck.statistics.variance import Pairs

Scale = float | None
AnyJudge = Judge | OpenJudge


@dataclass(frozen=True)
class Grains:
    """What grains of draws that are taken at once have to say of an estimator."""

    draws: Grain
    r: Tensor | None  # an unbiased estimate of ∇J drawn beside each
    account: Account
    paired: Account | None


@dataclass(eq=False)
class Record:
    """What the draws so far said."""

    judges: dict[Scale, AnyJudge]
    account: Account | None = None
    paired: Account | None = None  # of x − r + reference, where an estimate r of ∇J is drawn beside x
    centre: Tensor | None = None  # the mean of the first grain

    def evaluated(self, x: Tensor, r: Tensor | None, reference: Tensor, grain: int) -> Grains:
        """What is to be taken of grains from number `grain` on."""
        draws = Grain.of(x, self.centre)

        def account(of: Grain, *, judged: bool) -> Account:
            return Account.of_grain(of, reference, blocks=None if judged else gram_blocks(of.x, grain, GRAIN))

        if r is None:
            return Grains(draws, None, account(draws, judged=self.judged), None)
        r = r.detach().to(torch.float64)
        beside = Grain.of(draws.x - r + reference, reference)
        return Grains(draws, r, account(draws, judged=False), account(beside, judged=self.judged))

    def take(self, new: Grains) -> None:
        """The next grains."""
        self.centre = new.draws.centre
        self.account = new.account if self.account is None else self.account.merge(new.account)
        if new.paired is not None:
            self.paired = new.paired if self.paired is None else self.paired.merge(new.paired)
        for judge in self.judges.values():
            judge.update(new.draws, new.r if judge.paired else None)

    @property
    def judged(self) -> bool:
        """κ = 1 has a judge, whose spectrum is that of X − μ, or of X − r where r stands for μ."""
        return 1.0 in self.judges

    @property
    def accounts(self) -> tuple[Account, Account | None]:
        """That of X, and the paired one, each with its spectrum."""
        account, paired = self.account, self.paired
        assert account is not None
        if self.judged and paired is None:
            account = replace(account, spectrum=self.judges[1.0].spectrum)
        elif self.judged and paired is not None:
            paired = replace(paired, spectrum=self.judges[1.0].spectrum)
        return account, paired

    @property
    def off_centre(self) -> float:
        """‖E x − centre‖², by which E‖x − centre‖² is more than the variance."""
        assert self.account is not None
        assert self.centre is not None
        return float((self.account.mean - self.centre).square().sum())

    @property
    def done(self) -> bool:
        return bool(self.judges) and all(j.decided for j in self.judges.values())


@dataclass
class Lane:
    """One estimator, and its record, which may be that of others."""

    estimator: Estimator
    record: Record
    pairs: Pairs | None = None  # ‖x − centre‖² beside that of the estimator that it is compared to

    def pair(self, squares: Floats, of_other: Floats) -> None:
        """Squared distances of the next draws, and those of the other."""
        new = Pairs.of(squares, of_other)
        self.pairs = new if self.pairs is None else self.pairs.merge(new)


def evaluate(
    lanes: Sequence[Lane], estimates: Sequence[tuple[Tensor, Tensor | None]], reference: Tensor, grain: int
) -> list[Grains]:
    """What each lane is to take of its `estimates` x, and r beside them, of grains from number `grain` on; one object for lanes
    that have had the same so far and have it again."""
    made: dict[object, list[tuple[Tensor, Tensor | None, Grains]]] = {}
    out = []
    for lane, (x, r) in zip(lanes, estimates, strict=True):
        known = made.setdefault(_so_far(lane), [])
        found = next((grains for a, b, grains in known if same_bits(a, x) and same_bits(b, r)), None)
        if found is None:
            found = lane.record.evaluated(x, r, reference, grain)
            known.append((x, r, found))
        out.append(found)
    return out


def same_bits(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether both are the same numbers in the same precision, zeros of the same sign, or both None."""
    if a is b or a is None or b is None:
        return a is b
    return a.dtype == b.dtype and torch.equal(a, b) and torch.equal(a.signbit(), b.signbit())


def take(lanes: Sequence[Lane], new: Sequence[Grains]) -> None:
    """The next grains of each lane, as `evaluate` gave them; each record takes them once."""
    alike: dict[object, list[int]] = {}
    for i, lane in enumerate(lanes):
        alike.setdefault((_so_far(lane), id(new[i])), []).append(i)
    records: list[Record] = []
    for members in alike.values():
        first = lanes[members[0]].record
        record = copy.deepcopy(first) if any(first is other for other in records) else first
        records.append(record)
        for i in members:
            lanes[i].record = record
    for members, record in zip(alike.values(), records, strict=True):
        record.take(new[members[0]])


def _so_far(lane: Lane) -> object:
    """The same for lanes that have had the same draws and are judged alike."""
    record = lane.record
    return id(record) if record.account is not None else tuple(record.judges)
