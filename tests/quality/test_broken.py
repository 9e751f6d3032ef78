"""What is wrong on purpose is caught by name, changes what it is said to change, and nothing else cries wolf."""

from __future__ import annotations

import pytest
import torch

from pgcheck.estimators.base import registered_estimators
from pgcheck.estimators.broken import BROKEN, STALE, Broken, broken
from pgcheck.render.messages import BIAS_CHECKS
from pgcheck.runs.report import Report
from pgcheck.verdicts.verdict import Status
from tests.quality.conftest import problems

ENTRIES: dict[str, Broken] = BROKEN | {STALE.estimator.name: STALE}


def failed_checks(report: Report, estimator: str) -> set[str]:
    return {v.check for v in report.failures if v.estimator == estimator and v.status is Status.FAIL}


def test_there_are_enough_of_them() -> None:
    assert len(ENTRIES) >= 60


@pytest.mark.parametrize("name", ENTRIES)
def test_it_is_caught_by_name_and_by_nothing_else(judged: Report, name: str) -> None:
    """Killed; and a mistake that leaves E ĝ alone fails no claim, one that padding does not change no padding check."""
    assert failed_checks(judged, name) == set(ENTRIES[name].caught_by)


def test_all_of_them_are_killed(judged: Report) -> None:
    """100 %, and nothing was left undecided."""
    assert {v.estimator for v in judged.failures} == set(ENTRIES)
    assert all(v.status is Status.FAIL for v in judged.failures)


@pytest.mark.parametrize("name", BROKEN)
def test_it_claims_what_its_sound_version_claims(name: str) -> None:
    x = BROKEN[name]
    assert x.estimator.claims == x.sound.claims
    assert x.estimator.name not in registered_estimators()
    assert x.mistake.endswith((".", ")"))


def test_a_name_is_given_once_and_says_what_is_wrong() -> None:
    def sign_flipped(batch: object) -> None:
        """Taken."""

    def nameless(batch: object) -> None: ...

    for fn in (sign_flipped, nameless):
        with pytest.raises(ValueError, match="there already, or does not say what is wrong"):
            broken("reinforce", "unbiased")(fn)  # type: ignore[arg-type]
    assert "nameless" not in BROKEN


def gaps(judged: Report, core: Report, name: str) -> dict[str, float]:
    """By how much E ĝ differs from the sound version's, relative to the size, on each problem that its claims are about."""
    x = BROKEN[name]
    claimed = {p.name for p in problems() if any(c.applies(p) for c in x.sound.claims)}
    right = {m.problem: m for m in core.measurements if m.estimator == x.sound.name and m.problem in claimed}
    found = {}
    for m in judged.measurements:
        if m.estimator == name and m.problem in right:
            gap = torch.tensor(m.expected).sub(torch.tensor(right[m.problem].expected)).norm()
            found[m.problem] = float(gap) / max(m.size or 0.0, right[m.problem].size or 0.0)
    return found


@pytest.mark.parametrize("name", [name for name, x in BROKEN.items() if x.moves])
def test_it_really_changes_the_expectation(judged: Report, core: Report, name: str) -> None:
    """By more than a hundredth of the size, at θ and at θ' of some problem: no luck."""
    found = gaps(judged, core, name)
    assert max(min(found[p], found[f"{p}@1"]) for p in found if "@" not in p) > 1e-2


@pytest.mark.parametrize("name", [name for name, x in BROKEN.items() if not x.moves])
def test_it_leaves_the_expectation_alone_if_said_so(judged: Report, core: Report, name: str) -> None:
    assert max(gaps(judged, core, name).values(), default=0.0) < 1e-9


@pytest.mark.parametrize(
    "name", [name for name, x in BROKEN.items() if x.moves and set(x.caught_by) & set(BIAS_CHECKS)]
)
def test_the_claim_fails_at_both_thetas(judged: Report, name: str) -> None:
    failed = {v.problem for v in judged.failures if v.estimator == name and v.check in BIAS_CHECKS}
    assert any(f"{problem}@1" in failed for problem in failed)


def test_impure_ones_get_no_other_verdict(judged: Report) -> None:
    """What is random, stateful or writes to its inputs has no expectation to speak of."""
    for name in ("dropout_left_on", "running_baseline", "rewards_centred_in_place"):
        own = [v for v in judged.verdicts if v.estimator == name]
        assert {v.check for v in own} <= {"inputs_unchanged", "deterministic", "stateless"}
        assert not [m for m in judged.measurements if m.estimator == name]
