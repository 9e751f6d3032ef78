"""The registry: a name once, a claim always, and a nearest name for a typo."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from pgcheck.envs.tabular import TabularMDP
from pgcheck.errors import EstimatorError, UnknownNameError, UsageError
from pgcheck.estimators import base, zoo
from pgcheck.estimators.base import (
    Claim,
    Estimator,
    biased,
    binary_return,
    discounted,
    find_estimator,
    fixed_length,
    from_coefficients,
    off_policy,
    on_policy,
    one_start,
    proportional,
    ragged,
    register,
    registered_estimators,
    several_starts,
    unbiased,
)
from pgcheck.problem import Problem
from tests.engines.oracle import bandit, dialogue, walk


@pytest.fixture
def own_registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A copy of the registry that is thrown away."""
    monkeypatch.setattr(base, "_ESTIMATORS", dict(base._ESTIMATORS))
    monkeypatch.setattr(base, "_ALIASES", dict(base._ALIASES))
    return


def entry(name: str = "mine", **changes: Any) -> Estimator:
    words: dict[str, Any] = {"claims": (unbiased(),), "formula": "c S", "reference": "none", "about": "for a test"}
    return Estimator(name, lambda batch: batch.mask, "trajectory", **{**words, **changes})


@pytest.mark.usefixtures("own_registry")
def test_a_name_is_registered_once() -> None:
    mine = register(entry())
    assert find_estimator("mine") is mine
    with pytest.raises(EstimatorError, match="'mine' is registered already"):
        register(entry())


@pytest.mark.usefixtures("own_registry")
@pytest.mark.parametrize(
    ("name", "aliases"), [("rloo", ()), ("new", ("rloo",)), ("new", ("grpo",)), ("grpo", ("new",))]
)
def test_names_and_aliases_share_one_space(name: str, aliases: tuple[str, ...]) -> None:
    """Neither an alias of another entry nor its name may be taken; a refused entry leaves nothing behind."""
    before = registered_estimators()
    with pytest.raises(EstimatorError, match=r"'(rloo|grpo)' is registered already"):
        register(entry(name), *aliases)
    assert registered_estimators() == before
    with pytest.raises(UnknownNameError):
        find_estimator("new")


@pytest.mark.usefixtures("own_registry")
@pytest.mark.parametrize(("field", "empty"), [("claims", ()), ("formula", ""), ("reference", ""), ("about", "")])
def test_an_entry_states_what_it_is(field: str, empty: Any) -> None:
    with pytest.raises(EstimatorError, match=f"'mine': {field} is empty"):
        register(entry(**{field: empty}))
    assert "mine" not in registered_estimators()


@pytest.mark.parametrize("name", registered_estimators())
def test_every_entry_has_its_words(name: str) -> None:
    """Claim, formula, reference, a sentence; a biased claim has its reason."""
    e = registered_estimators()[name]
    assert e.name == name
    assert e.claims
    for words in (e.formula, e.reference, e.about):
        assert words.strip()
    assert e.about.strip().endswith(".")
    for claim in e.claims:
        assert claim.kind in ("unbiased", "proportional", "biased")
        assert claim.kind != "biased" or claim.reason.strip()


@pytest.mark.parametrize("name", registered_estimators())
def test_every_on_policy_limit_is_an_entry(name: str) -> None:
    limit = registered_estimators()[name].on_policy_limit
    assert limit is None or limit in registered_estimators()


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("rloo", "leave_one_out"),
        ("vineppo", "vineppo(K=1)"),
        ("reinforce++", "reinforce_pp"),
        ("reinforce++_baseline", "reinforce_pp(group)"),
        ("gae", "gae(0.95)"),
        ("gae(0)", "actor_critic"),
        ("gae(wrong_value,lambda=1)", "gae(wrong_value, λ=1)"),
        ("raft", "best_of_n"),
        ("wis", "self_normalised_is"),
    ],
)
def test_an_alias_is_the_entry(alias: str, name: str) -> None:
    assert find_estimator(alias) is find_estimator(name)
    assert alias not in registered_estimators()


@pytest.mark.parametrize(
    ("typo", "nearest"),
    [
        ("grop", "grpo"),
        ("leave_one_uot", "leave_one_out"),
        ("rlo", "rloo"),
        ("batchmean", "batch_mean"),
        ("ppo", "ppo_clip"),
    ],
)
def test_an_unknown_name_suggests_the_nearest(typo: str, nearest: str) -> None:
    with pytest.raises(UnknownNameError, match=rf"unknown estimator '{typo}'\. Did you mean '{nearest}'\?") as caught:
        find_estimator(typo)
    assert isinstance(caught.value, UsageError)
    assert isinstance(caught.value, ValueError)


def test_a_name_like_no_other_suggests_nothing() -> None:
    with pytest.raises(UnknownNameError) as caught:
        find_estimator("zzzzzzzz")
    assert "Did you mean" not in str(caught.value)
    assert "pgcheck list estimators" in str(caught.value)


def test_the_list_is_a_copy() -> None:
    registered_estimators().clear()
    assert "reinforce" in registered_estimators()


# -- declarations


def test_min_group_size_follows_from_couples() -> None:
    """2 where rows are coupled, 1 where they are not; what is stated stands."""
    assert [from_coefficients(lambda b: b.mask, couples=c).min_group_size for c in base.COUPLES] == [1, 2, 2]
    assert from_coefficients(lambda b: b.mask, couples="group", min_group_size=3).min_group_size == 3
    assert from_coefficients(lambda b: b.mask, couples="batch", min_group_size=1).min_group_size == 1


def test_fits_asks_for_groups_or_for_the_batch() -> None:
    """Group statistics need every group large enough; batch statistics, the batch."""
    ones, pairs, mixed = (
        dialogue(groups=3, group_size=1),
        dialogue(groups=2, group_size=2),
        dialogue(groups=2, group_size=(3, 1)),
    )
    group, batch, row = (find_estimator(n) for n in ("leave_one_out", "leave_one_out(batch)", "reinforce"))
    assert [group.fits(p) for p in (ones, pairs, mixed)] == [False, True, False]
    assert [batch.fits(p) for p in (ones, pairs, mixed)] == [True, True, True]
    assert [row.fits(p) for p in (ones, pairs, mixed)] == [True, True, True]
    assert not batch.fits(dialogue(group_size=1))


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"couples": "rows"}, "couples: 'rows' is not one of trajectory, group, batch"), ({"leaf": "z"}, "leaf: 'z'")],
)
def test_misspelt_declarations_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(EstimatorError, match=words):
        from_coefficients(lambda b: b.mask, **changes)


def test_from_coefficients_takes_its_name_from_the_function() -> None:
    def my_own(batch: Any) -> torch.Tensor:
        return batch.mask  # type: ignore[no-any-return]

    assert from_coefficients(my_own).name == "my_own"
    assert from_coefficients(my_own, name="other").name == "other"
    assert from_coefficients(my_own).claims == (unbiased(),)
    assert from_coefficients(my_own).couples == "batch"


# -- claims


def test_a_claim_applies_where_all_its_conditions_hold() -> None:
    on, off = walk(), walk(behavior_logits=[[0.0, 1.0], [0.5, 0.0]])  # γ = .8
    flat = bandit([1.0, 0.0], [0.1, 0.2])  # γ = 1
    claim = biased("because", on_policy, discounted)
    assert [claim.applies(p) for p in (on, off, flat)] == [True, False, False]
    assert unbiased(off_policy).applies(off)
    assert unbiased().applies(off)


def test_conditions_are_facts_of_the_problem() -> None:
    """Starts, lengths and returns of a bandit, a walk of two steps, a dialogue with two prompts and rows of 1 and 2."""
    right_or_wrong, walked, talked = bandit([1.0, 0.0], [0.1, 0.2]), walk(), dialogue()
    assert [one_start.holds(p) for p in (right_or_wrong, walked, talked)] == [True, True, False]
    assert [fixed_length.holds(p) for p in (right_or_wrong, walked, talked)] == [True, True, False]
    assert [binary_return.holds(p) for p in (right_or_wrong, walked, talked)] == [True, False, False]
    for condition, opposite in ((one_start, several_starts), (fixed_length, ragged)):
        for p in (right_or_wrong, walked, talked):
            assert condition.holds(p) != opposite.holds(p)


def test_binary_is_the_return_not_the_reward() -> None:
    """.5 twice is right; 0/1 rewards that add up to 2 are not binary; a rounding error is."""
    assert not binary_return.holds(bandit([1.0, 0.5], [0.1, 0.2]))
    assert binary_return.holds(bandit([0.1 + 0.2 + 0.7, 0.0], [0.1, 0.2]))
    halves = walk().env.transition.tolist()
    twice = TabularMDP(halves, [[0.5, 0.0]] * 2, [1.0, 0.0], horizon=2)
    assert not binary_return.holds(Problem(twice, [[0.0, 0.0]] * 2))  # .5 alone happens as well
    always = TabularMDP(halves, [[0.5, 0.5]] * 2, [1.0, 0.0], horizon=2)
    assert binary_return.holds(Problem(always, [[0.0, 0.0]] * 2))


def test_the_scale_of_a_claim() -> None:
    """1 for unbiased; a number, a function of the problem or open for proportional."""
    problem = dialogue(groups=2, group_size=(3, 1))
    assert unbiased().scale_on(problem) == 1.0
    assert proportional(0.5).scale_on(problem) == 0.5
    assert proportional().scale_on(problem) is None
    assert proportional(zoo.own_share_of_batch).scale_on(problem) == pytest.approx(3 / 4)  # (B − 1)/B
    assert proportional(zoo.own_share_of_groups).scale_on(problem) == pytest.approx(2 / 4)  # (2 + 0)/4
    assert isinstance(biased("because"), Claim)
