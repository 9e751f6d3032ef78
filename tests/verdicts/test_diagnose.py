"""Causes are found by trying: what a wrong loss is in expectation, or where it goes wrong; and none that does not hold."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pgcheck.api import as_problems
from pgcheck.batch import Batch
from pgcheck.engines.exact import exact_moments
from pgcheck.estimators import advantages as adv
from pgcheck.estimators import aggregation as agg
from pgcheck.estimators import ratios
from pgcheck.estimators.base import Estimator, find_estimator, from_coefficients, registered_estimators
from pgcheck.estimators.broken import BROKEN
from pgcheck.estimators.from_loss import from_loss
from pgcheck.estimators.zoo import compose
from pgcheck.problem import Problem
from pgcheck.registry import find_problem
from pgcheck.render.messages import cause_of, mend_of
from pgcheck.verdicts.diagnose import (
    CLIPPED,
    PER_ROW,
    PER_TOKEN,
    TRIED_PROBLEMS,
    WITHOUT_DISCOUNT,
    Diagnosis,
    Swap,
    assembled,
    candidates,
    diagnose,
    find_mistake,
    find_swap,
    identify,
    pattern,
)
from pgcheck.verdicts.verdict import Measurement, measure

FACTORS: dict[str, Callable[[Problem], float]] = {
    "": lambda p: 1.0,
    "−1": lambda p: -1.0,
    "B": lambda p: float(p.rows),
    "1/B": lambda p: 1 / p.rows,
    "(B−1)/B": lambda p: 1 - 1 / p.rows,
    "B/(B−1)": lambda p: p.rows / (p.rows - 1),
    "(G−1)/G": lambda p: 1 - p.groups / p.rows,
    "1/T": lambda p: 1 / p.trajectories.paths.steps,
}


@functools.cache
def problems(which: str) -> list[Problem]:
    """At one θ, unless it says otherwise."""
    names, _, twice = which.partition(" at ")
    return [p for p in as_problems(names.split(" and ")) if twice or "@" not in p.name]


@functools.cache
def named(name: str) -> Estimator:
    return BROKEN[name].estimator if name in BROKEN else EXTRA[name]


@functools.cache
def numbers(name: str, which: str) -> tuple[list[Problem], list[Measurement]]:
    """Where the estimator can be asked, and what was measured there."""
    e = named(name) if name not in registered_estimators() else find_estimator(name)
    fitting = [p for p in problems(which) if e.fits(p)]
    return fitting, [measure(e, p, exact_moments([e], p)[0]) for p in fitting]


@functools.cache
def diagnosed(name: str, which: str) -> Diagnosis | None:
    e = named(name) if name not in registered_estimators() else find_estimator(name)
    return diagnose(e, *numbers(name, which))


def coefficients(name: str) -> Callable[[Callable[[Batch], Tensor]], Callable[[Batch], Tensor]]:
    def decorate(fn: Callable[[Batch], Tensor]) -> Callable[[Batch], Tensor]:
        EXTRA[name] = from_coefficients(fn, couples="trajectory", name=name)
        return fn

    return decorate


EXTRA: dict[str, Estimator] = {}


@coefficients("tripled")
def _tripled(batch: Batch) -> Tensor:
    return 3.0 * batch.episode_return.unsqueeze(-1) * batch.mask / batch.rows


@coefficients("without γ^t and with the wrong clock")
def _two_mistakes(batch: Batch) -> Tensor:
    """Differs from the zoo's entry without γ^t on the one problem whose clock counts actions."""
    to_go = torch.zeros_like(batch.reward[..., 0])
    out = []
    for t in range(batch.reward.shape[-1] - 1, -1, -1):
        to_go = batch.reward[..., t] + batch.discount * to_go
        out.append(to_go)
    return torch.stack(out[::-1], -1) * batch.mask / batch.rows


@coefficients("through float32")
def _float32(batch: Batch) -> Tensor:
    return (batch.episode_return / 3.0).float().double().unsqueeze(-1) * 3.0 * batch.mask / batch.rows


@coefficients("a factor near 1")
def _nearly(batch: Batch) -> Tensor:
    return 1.001 * batch.episode_return.unsqueeze(-1) * batch.mask / batch.rows


def _centered(divisor: Callable[[Batch], float]) -> Callable[[Batch], Tensor]:
    def fn(batch: Batch) -> Tensor:
        same = (batch.group.unsqueeze(-1) == batch.group.unsqueeze(-2)).to(torch.float64)
        R = batch.episode_return
        centered = R - (same @ R.unsqueeze(-1)).squeeze(-1) / same.sum(-1)
        return centered.unsqueeze(-1) * batch.mask / batch.rows / divisor(batch)

    return fn


for _name, _divisor in {
    "centered over the group, and a mean over padding": lambda batch: batch.mask.shape[-1],
    "centered over the group, and a constant length": lambda batch: 512.0,
}.items():
    EXTRA[_name] = from_coefficients(_centered(_divisor), couples="group", name=_name)


@coefficients("zero")
def _zero(batch: Batch) -> Tensor:
    return torch.zeros_like(batch.reward)


IDENTITIES = {
    # name: (problems, subject, factor)
    "own_sample_in_the_mean": ("core", "the gradient", "(G−1)/G"),
    "groups_merged": ("core", "the gradient", "(B−1)/B"),
    "sign_flipped": ("core", "the gradient", "−1"),
    "summed_over_rows": ("core", "the gradient", "B"),
    "divided_by_rows_twice": ("core", "the gradient", "1/B"),
    "mean_over_padding": ("core", "the gradient", "1/T"),
    "tripled": ("core", "the gradient", "3"),
    "centered over the group, and a mean over padding": ("core", "the gradient", "(G−1)/G × 1/T"),
    "centered over the group, and a constant length": ("core", "the gradient", "0.001953125 × (G−1)/G"),
    "discount_weight_missing": ("core", "reward_to_go_undiscounted_weight", ""),
    "baseline_sees_next_state": ("core", "baselined(next_state)", ""),
    "token_ratio_for_trajectory_ratio": ("off-policy", "token_is", ""),
    "ratio_to_reference": ("off-policy", "reinforce", ""),  # the reference is the policy: the ratio is 1
}
PATTERNS = {
    "to_go_not_discounted": ("core", "γ < 1"),
    "observation_reward_dropped": ("core", "there are observation positions inside rows"),
    "reward_before_observation_dropped": ("core", "there are observation positions inside rows"),
    "to_go_reversed": ("core", "episodes have more than one step"),
    "advantages_transposed": ("core", "the batch has more than one group"),
    "ratio_inverted": ("core and off-policy", "the batch is off-policy"),
}


@pytest.mark.parametrize("name", IDENTITIES)
def test_identities(name: str) -> None:
    which, subject, factor = IDENTITIES[name]
    found = diagnosed(name, which)
    assert found is not None
    assert (found.kind, found.subject, found.factor) == ("identity", subject, factor)
    assert found.problems >= 2


@pytest.mark.parametrize("name", PATTERNS)
def test_patterns(name: str) -> None:
    """Not a known estimator; but wrong where a fact holds, and right (nearly) everywhere else."""
    which, fact = PATTERNS[name]
    found = diagnosed(name, which)
    assert found is not None
    assert found.kind in ("pattern", "necessary")  # exactly there, or only there
    assert found.subject == fact
    assert found.problems == len(numbers(name, which)[0])


@pytest.mark.parametrize("name", [*IDENTITIES, "without γ^t and with the wrong clock"])
def test_an_identity_holds_wherever_there_is_a_bias(name: str) -> None:
    """Not only on the problems that were tried first: on every one but those it names, by another enumeration."""
    which = IDENTITIES[name][0] if name in IDENTITIES else "core at two θ"
    found = diagnosed(name, which)
    if found is None or found.kind != "identity":
        assert name not in IDENTITIES
        return
    if name in IDENTITIES:
        assert found.except_on == ()
    else:
        assert {p.partition("@")[0] for p in found.except_on} == {"dialogue/two-turn-action-clock"}
    parts = found.factor.split(" × ")

    def factor(p: Problem) -> float:
        return math.prod(FACTORS[x](p) if x in FACTORS else float(x) for x in parts)

    for p, m in zip(*numbers(name, which), strict=True):
        if m.finding == "unbiased" or p.name in found.except_on:
            continue
        if found.subject == "the gradient":
            other = p.gradient()
        else:
            subject = find_estimator(found.subject)
            if not subject.fits(p):
                continue
            other = exact_moments([subject], p)[0].mean
        assert float((m.expected - factor(p) * other).norm()) <= 1e-9 * m.size, p.name


@pytest.mark.parametrize("name", PATTERNS)
def test_a_pattern_holds_wherever_there_is_a_bias(name: str) -> None:
    """The message says: right on every problem but those where the fact holds."""
    from pgcheck.verdicts.diagnose import _FACTS

    which, fact = PATTERNS[name]
    (holds,) = [f.holds for f in _FACTS if f.name == fact]
    for p, m in zip(*numbers(name, which), strict=True):
        assert m.finding == "unbiased" or holds(p), p.name


@pytest.mark.parametrize("name", ["leave_one_out", "reward_to_go", "baselined(value)"])
def test_nothing_is_wrong_with_a_sound_one(name: str) -> None:
    assert diagnosed(name, "core") is None


@pytest.mark.parametrize("name", ["negative_advantages_dropped", "eos_dropped", "mask_shifted"])
def test_no_cause_is_made_up(name: str) -> None:
    """Neither a known estimator nor bound to one fact."""
    assert diagnosed(name, "core") is None


def test_an_estimator_is_not_explained_by_itself() -> None:
    found = diagnosed("batch_mean_alive", "core")
    assert found is None or found.subject != "batch_mean_alive"


def test_a_loss_may_have_the_name_of_what_it_is() -> None:
    """REINFORCE judged where the objective is not the return alone, and where the batch is another policy's: zero on the first
    problem tried, as others that are something else on the next."""

    def reinforce(batch: Batch) -> Tensor:
        return -((batch.logp * batch.mask).sum(1) * batch.episode_return).mean()

    asked = problems("all")
    e = from_loss(reinforce)
    assert e.name == "reinforce"
    found = identify(e, asked, [measure(e, p, exact_moments([e], p)[0]) for p in asked])
    assert found is not None
    assert (found.subject, found.factor, found.except_on, found.mistake) == ("reinforce", "", (), "")


def test_zero_is_no_multiple_of_the_gradient() -> None:
    """E ĝ = 0 · g says nothing; nor is it another estimator."""
    found = diagnosed("zero", "core")
    assert found is None or found.kind == "pattern"


def test_what_float32_loses_is_called_that() -> None:
    """A relative error of 6e-8 is rounding; one of 1e-3 is a factor."""
    found = diagnosed("through float32", "core")
    assert found is not None
    assert found.kind == "rounding"
    assert "float32" in cause_of(found)
    found = diagnosed("a factor near 1", "core")
    assert found is not None
    assert (found.kind, found.factor) == ("identity", "1.001")


def test_nothing_measured_nothing_said() -> None:
    e = find_estimator("reinforce")
    assert identify(e, [], []) is None
    assert pattern([], []) is None
    assert diagnose(e, [], []) is None


def measured_on(e: Estimator, p: Problem) -> Measurement:
    return measure(e, p, exact_moments([e], p)[0])


def test_one_problem_is_enough_for_a_sign_and_a_number() -> None:
    """−∇J is a flipped sign. 3 ∇J = B · (B−1)/B ∇J at B = 4 is not `B × batch_mean`: with one problem, any factor fits, so
    that it is a number, there."""
    (p,) = as_problems("dialogue/two-turn")
    flipped = named("sign_flipped")
    (m,) = [measure(flipped, p, x) for x in exact_moments([flipped], p)]
    found = diagnose(flipped, [p], [m])
    assert found is not None
    assert (found.subject, found.factor, found.problems) == ("the gradient", "−1", 1)
    tripled = EXTRA["tripled"]
    found = identify(tripled, [p], [measured_on(tripled, p)])
    assert found == Diagnosis("identity", "the gradient", "3", 1)
    assert cause_of(found) == "in expectation this is 3 × the exact gradient, on this problem: a constant factor"


@pytest.mark.parametrize(
    ("where", "factor", "same"),
    [
        ("dialogue/two-turn", "0.75", ("(B−1)/B",)),  # two groups of two
        ("mdp/two-state", "0.666667", ("(B−1)/B", "(G−1)/G")),  # one group of three
        ("bandit/two-arm", None, ()),  # one free number: everything is a multiple of everything
    ],
)
def test_on_one_problem_every_factor_that_fits_is_named(where: str, factor: str | None, same: tuple[str, ...]) -> None:
    p, e = find_problem(where), replace(find_estimator("batch_mean"), name="mine", claims=())
    found = identify(e, [p], [measured_on(e, p)])
    if factor is None:
        assert found is None
        return
    assert found == Diagnosis("identity", "the gradient", factor, 1, same_here=same)
    text = cause_of(found)
    assert text.startswith(
        f"in expectation this is {factor[:6].replace('0.6666', '0.6667')} × the exact gradient, on this problem"
    )
    assert all(name in text for name in same)
    assert ("another size of batch" in text) == (len(same) > 1)


def test_a_wrong_direction_on_one_problem_is_no_factor() -> None:
    p, e = find_problem("mdp/two-state-0.9"), find_estimator("baselined(next_state)")
    found = identify(e, [p], [measured_on(e, p)])
    assert found is None or found.subject != "the gradient"


# -- a term of the objective that is missing


def _reward_less_kl(batch: Batch) -> Tensor:
    """(Σ_t γ^t (r_t − β log π/π_ref)) S: the KL penalty, and no entropy bonus."""
    paid = batch.reward - batch.kl_coefficient * (batch.logp - batch.ref_logp) * batch.mask
    return (batch.discount_weight * paid).sum(-1, keepdim=True) * batch.mask / batch.rows


def _plain(batch: Batch) -> Tensor:
    return batch.episode_return.unsqueeze(-1) * batch.mask / batch.rows


KL, ENTROPY = "the KL penalty (batch.kl_coefficient)", "the entropy bonus (batch.entropy_coefficient)"


@pytest.mark.parametrize(
    ("fn", "where", "both", "subject", "mistake"),
    [
        (
            _plain,
            "penalized",
            False,
            "the gradient of the return alone",
            f"{KL} and {ENTROPY} of the objective are missing",
        ),
        (_plain, "kl/*", False, "the gradient of the return alone", f"{KL} of the objective is missing"),
        (_plain, "entropy/*", False, "the gradient of the return alone", f"{ENTROPY} of the objective is missing"),
        (_plain, "entropy/fork", False, "the gradient of the return alone", f"{ENTROPY} of the objective is missing"),
        (
            _reward_less_kl,
            "penalized",
            False,
            "the gradient of the return alone",
            f"{ENTROPY} of the objective is missing",
        ),
        (
            _reward_less_kl,
            "kl/*",
            True,
            "the gradient without the entropy bonus",
            f"{ENTROPY} of the objective is missing",
        ),
    ],
)
def test_a_missing_term_is_named(
    fn: Callable[[Batch], Tensor], where: str, both: bool, subject: str, mistake: str
) -> None:
    """By the gradient of the objective without it; `both`: problems with a bonus beside the penalty."""
    e = from_coefficients(fn, couples="trajectory", name="mine")
    asked = [replace(p, entropy_coefficient=0.2, name=f"{p.name}+") if both else p for p in as_problems(where)]
    found = diagnose(e, asked, [measured_on(e, p) for p in asked])
    assert found is not None
    assert (found.kind, found.subject, found.factor, found.mistake) == ("identity", subject, "", mistake)
    wrong = [p for p in asked if fn is _plain or p.entropy_coefficient]
    assert found.problems == len(wrong)
    text = cause_of(found)
    assert text.startswith(f"in expectation this is {subject.replace('the', 'the exact', 1)}, on ")
    assert text.endswith(mistake)
    for p in wrong:  # by enumeration of J, not by the gradient that was compared
        bare = replace(p, entropy_coefficient=0.0, kl_coefficient=p.kl_coefficient if fn is _reward_less_kl else 0.0)
        gap = float((measured_on(e, p).expected - bare.gradient("enumeration")).norm())
        assert gap <= 1e-12, p.name


def test_a_missing_term_and_a_factor() -> None:
    e = replace(find_estimator("batch_mean"), name="mine", claims=())
    asked = as_problems("penalized")
    found = diagnose(e, asked, [measured_on(e, p) for p in asked])
    assert found is not None
    assert (found.subject, found.factor) == ("the gradient of the return alone", "(B−1)/B")
    assert cause_of(found).endswith(
        "are missing; the own return is in the mean over the batch that is subtracted from it"
    )


def test_few_problems_are_tried_and_of_many_kinds() -> None:
    found = diagnosed("discount_weight_missing", "core")
    assert found is not None
    assert found.problems >= min(TRIED_PROBLEMS, 4)


@pytest.mark.parametrize(
    ("diagnosis", "words"),
    [
        (Diagnosis("identity", "the gradient", "−1", 6), ["−1 × the exact gradient", "all 6", "sign is flipped"]),
        (Diagnosis("identity", "the gradient", "B", 6), ["B × the exact gradient", "summed over rows"]),
        (Diagnosis("identity", "the gradient", "1/B", 6), ["1/B × the exact gradient", "twice"]),
        (Diagnosis("identity", "the gradient", "(B−1)/B", 6), ["(B−1)/B × the exact gradient", "own return", "batch"]),
        (
            Diagnosis("identity", "the gradient", "(G−1)/G", 6),
            ["(G−1)/G × the exact gradient", "own return", "group"],
        ),
        (Diagnosis("identity", "the gradient", "2.5", 6), ["2.5 × the exact gradient", "constant factor"]),
        (Diagnosis("identity", "token_is", "", 3), ["this is `token_is`", "all 3"]),
        (Diagnosis("identity", "token_is", "", 9, ("a/b", "c/d")), ["`token_is`", "on 7 of 9", "not on a/b, c/d"]),
        (Diagnosis("pattern", "γ < 1", "", 9), ["γ < 1", "9 problems"]),
    ],
)
def test_in_words(diagnosis: Diagnosis, words: list[str]) -> None:
    text = cause_of(diagnosis)
    assert all(word in text for word in words)


def test_two_mistakes_at_once() -> None:
    """γ^t missing and summed over rows: B times a zoo entry, which one problem alone could not tell."""

    def both(batch: Batch) -> Tensor:
        return -(batch.reward_to_go * batch.logp * batch.mask).sum()

    e = from_loss(both)
    problems = as_problems(["mdp/two-state-0.9", "mdp/pessimal", "dialogue/two-turn-0.9", "dialogue/unequal-groups"])
    measured = [measure(e, p, exact_moments([e], p)[0]) for p in problems]
    found = identify(e, problems, measured)
    assert found is not None
    assert (found.subject, found.factor, found.problems) == ("reward_to_go_undiscounted_weight", "B", 4)


# -- losses of a user's own, and the mistakes on the shelf


def mean_over_tokens(batch: Batch) -> Tensor:
    per_token = -batch.episode_return[:, None] * batch.logp
    return (per_token * batch.mask).sum() / batch.mask.sum()


def mean_of_means(batch: Batch) -> Tensor:
    per_token = -batch.episode_return[:, None] * batch.logp * batch.mask
    return (per_token.sum(1) / batch.mask.sum(1)).mean()


def forward_sum(batch: Batch) -> Tensor:
    so_far = (batch.discount_weight * batch.reward).cumsum(1)
    return -(so_far * batch.logp * batch.mask).sum(1).mean()


@pytest.mark.parametrize(
    ("loss", "subject", "words"),
    [
        (mean_over_tokens, "token_mean", "all tokens of the batch"),
        (mean_of_means, "divided_by_own_length", "each row's tokens"),
        (forward_sum, "to_go_reversed", "runs forwards"),
    ],
)
def test_a_known_mistake_is_recognised(loss: Callable[[Batch], Tensor], subject: str, words: str) -> None:
    """An opaque loss has the expectation of an estimator that is wrong on purpose: on every problem, the right ones too."""
    e = from_loss(loss)
    fitting = problems("core")
    measured = [measure(e, p, exact_moments([e], p)[0]) for p in fitting]
    found = identify(e, fitting, measured)
    assert found is not None
    assert (found.subject, found.factor, found.except_on) == (subject, "", ())
    assert words in found.mistake
    assert words in cause_of(found)
    for p, m in zip(fitting, measured, strict=True):  # by another enumeration
        other = exact_moments([BROKEN[subject].estimator], p)[0].mean
        assert float((m.expected - other).norm()) <= 1e-9 * m.size


def test_the_zoo_comes_before_the_shelf() -> None:
    """`baseline_sees_next_state` of the shelf is `baselined(next_state)` of the zoo."""
    found = diagnosed("baseline_sees_next_state", "core")
    assert found is not None
    assert (found.subject, found.mistake) == ("baselined(next_state)", "")


def test_every_mistake_that_moves_the_expectation_is_a_candidate() -> None:
    names = [c.estimator.name for c in candidates()]
    assert len(names) == len(set(names))
    assert set(names) == {*registered_estimators(), *(name for name, x in BROKEN.items() if x.moves)}
    assert all(c.mistake for c in candidates() if c.estimator.name in BROKEN)


# -- the advantage of one paper in the average of another


def _weighed(advantage: Tensor, batch: Batch, over: str) -> Tensor:
    per_token = advantage.unsqueeze(-1) * batch.logp * batch.mask
    if over == "rows":
        return -per_token.sum(-1).mean()
    if over == "tokens of a row":
        return -(per_token.sum(-1) / batch.mask.sum(-1).clamp(min=1.0)).mean()
    return -per_token.sum() / batch.mask.sum()


def rloo_without_discount(batch: Batch) -> Tensor:
    """As in code for language models: rewards added up, leave-one-out in loops, and the mean over all tokens."""
    score = batch.reward.sum(-1)
    adv = torch.stack(
        [
            score[i] - sum(score[j] for j in same) / max(len(same), 1)
            for i in range(len(score))
            for same in [[j for j in range(len(score)) if j != i and bool(batch.group[j] == batch.group[i])]]
        ]
    )
    return _weighed(adv, batch, "tokens")


def minus_centered_row_mean(batch: Batch) -> Tensor:
    return -_weighed(batch.episode_return - batch.episode_return.mean(), batch, "tokens of a row")


def clipped_over_tokens(batch: Batch) -> Tensor:
    R = batch.episode_return
    adv, r = (R - R.mean()).unsqueeze(-1), (batch.logp - batch.behavior_logp).exp()
    return -(torch.minimum(r * adv, r.clamp(0.8, 1.2) * adv) * batch.mask).sum() / batch.mask.sum()


@pytest.mark.parametrize(
    ("loss", "which", "subject", "factor", "made"),
    [
        (rloo_without_discount, "chain/* and tree/* and lm/*", "leave_one_out", "", (WITHOUT_DISCOUNT, PER_TOKEN)),
        (minus_centered_row_mean, "lm/parity", "batch_mean", "−1", (PER_ROW,)),
        (clipped_over_tokens, "off-policy", "batch_mean", "", (CLIPPED, PER_TOKEN)),
    ],
)
def test_a_mixture_is_taken_apart(
    loss: Callable[[Batch], Tensor], which: str, subject: str, factor: str, made: tuple[str, ...]
) -> None:
    e = from_loss(loss)
    fitting = [p for p in problems(which) if e.fits(p) and p.rows > 1]
    found = diagnose(e, fitting, [measure(e, p, exact_moments([e], p)[0]) for p in fitting])
    assert found is not None
    assert (found.kind, found.subject, found.factor, found.made) == ("identity", subject, factor, made)
    assert found.except_on == ()
    assert all(words in cause_of(found) for words in made)


def test_without_γ_the_rewards_are_added_up() -> None:
    """E Σ_t r_t · Σ_t ∇log π by a loop over rollouts; and where γ = 1 nothing is undone."""
    assert not any(WITHOUT_DISCOUNT in c.made for c in assembled(problems("lm/parity")))
    p = find_problem("chain/absorbing")
    made = {c.entry: c.estimator for c in assembled([p]) if c.made == (WITHOUT_DISCOUNT,)}
    found, discounted = (exact_moments([e], p)[0].mean for e in (made["reinforce"], find_estimator("reinforce")))
    paths, π = p.trajectories.paths, torch.softmax(p.logits, -1)
    chances = paths.env_probability * paths.start_probability[paths.start] * p.trajectories.logp.sum(-1).exp()
    assert float(chances.sum()) == pytest.approx(1.0, abs=1e-12)
    expected = torch.zeros_like(found)
    for n, chance in enumerate(chances):
        for k, a, of_policy in zip(paths.context[n], paths.action[n], paths.mask[n], strict=True):
            if of_policy:
                score = -π[k]
                score[a] += 1.0
                expected[k] += chance * paths.reward[n].sum() * score
    assert float((found - expected).norm()) <= 1e-12
    assert float((discounted - expected).norm()) > 1e-3


# -- the step


@pytest.mark.parametrize("problem", ["mdp/two-state-0.9", "mdp/pessimal", "dialogue/two-turn-0.9"])
def test_the_step_that_is_wrong(problem: str) -> None:
    """Without γ^t, position t contributes γ^−t times its part of ∇J: position 0 is right, and a later one is named."""
    (p,) = as_problems(problem)
    e = find_estimator("reward_to_go_undiscounted_weight")
    (moments,) = exact_moments([e], p)
    assert moments.by_step is not None
    truth = p.gradient_by_step()
    for t in range(len(truth)):
        torch.testing.assert_close(moments.by_step[t], truth[t] / p.discount**t, rtol=0, atol=1e-14)
    m = measure(e, p, moments)
    gap = (1 / p.discount ** torch.arange(len(truth)) - 1) * truth.flatten(1)[
        :, int((m.expected - m.truth).abs().argmax())
    ]
    assert m.worst_step == int(gap.abs().argmax()) > 0


# -- one part for another


SWAPS = {
    "token mean": (compose(adv.return_minus(adv.mean_of_others("group")), aggregation=agg.token_mean), "aggregation"),
    "γ^t missing": (compose(adv.undiscounted_weight_to_go), "advantage"),
    "divided by the std": (compose(adv.standardised_return("group")), "advantage"),
    "token ratio": (compose(adv.discounted_to_go, ratio=ratios.token_ratio), "ratio"),
}


@pytest.mark.parametrize("name", SWAPS)
def test_the_part_to_blame_is_found(name: str) -> None:
    composition, part = SWAPS[name]
    e = from_coefficients(composition, couples="batch", name=name)
    where = [p for p in problems("off-policy" if part == "ratio" else "core") if p.full_support and e.fits(p)]
    measured = [measure(e, p, exact_moments([e], p)[0]) for p in where]
    found = find_swap(e, where, measured)
    assert found is not None
    assert found.part == part
    donor = {
        "token mean": "reinforce",
        "γ^t missing": "reward_to_go",
        "divided by the std": "leave_one_out",
        "token ratio": "trajectory_is",
    }[name]
    assert found.donor == donor
    assert f"the {part} of `{donor}`" in mend_of(found)


def test_two_parts_to_blame_are_not_found() -> None:
    """No single exchange mends a token mean of γ^t-less returns; nothing is said."""
    e = from_coefficients(compose(adv.undiscounted_weight_to_go, aggregation=agg.token_mean), name="both")
    where = problems("core")[:12]
    assert find_swap(e, where, [measure(e, p, exact_moments([e], p)[0]) for p in where]) is None


@pytest.mark.parametrize("name", ["leave_one_out", "token_mean"])
def test_a_sound_composition_and_an_opaque_loss_have_nothing_to_swap(name: str) -> None:
    e = BROKEN[name].estimator if name in BROKEN else find_estimator(name)
    where = [p for p in problems("core")[:6] if e.fits(p)]
    assert find_swap(e, where, [measure(e, p, exact_moments([e], p)[0]) for p in where]) is None


def test_a_swap_in_words() -> None:
    text = mend_of(Swap("aggregation", "reinforce", "mean_of_rows", 32))
    assert text == "with the aggregation of `reinforce` (mean_of_rows) in its place it is unbiased on all 32 problems"


# -- an implementation of a published estimator


def bessel_grpo(batch: Batch) -> Tensor:
    """GRPO as torch.std makes it: the spread over G − 1."""
    R, n = batch.episode_return, batch.same_group.sum(-1)
    mean = (batch.same_group @ R) / n
    var = (batch.same_group @ R**2 - n * mean**2) / (n - 1)
    adv = torch.where(var > 1e-20, (R - mean) / (var.clamp(min=1e-30).sqrt() + 1e-6), 0.0).unsqueeze(-1)
    ratio = ((batch.logp - batch.behavior_logp) * batch.mask).exp()
    surrogate = torch.minimum(ratio * adv, ratio.clamp(0.8, 1.2) * adv) * batch.mask
    return -(surrogate.sum(-1) / batch.mask.sum(-1)).mean()


def test_an_implementation_is_told_its_mistake() -> None:
    where = as_problems(["bandit/contextual", "dialogue/unequal-groups", "off-policy/dialogue-stale"])
    found = find_mistake(from_loss(bessel_grpo, same_as="grpo"), where)
    assert found is not None
    assert (found.kind, found.subject, found.problems) == ("batch by batch", "std_with_bessel", 3)
    assert "`std_with_bessel` from every batch tried" in cause_of(found)
    assert "G − 1" in cause_of(found)


def test_a_right_implementation_and_an_unheard_of_mistake_are_not() -> None:
    where = as_problems(["bandit/contextual", "off-policy/dialogue-stale"])
    assert find_mistake(replace(find_estimator("grpo"), name="mine", same_as="grpo"), where) is None
    assert find_mistake(from_loss(mean_over_tokens, same_as="grpo"), where) is None
    assert find_mistake(from_loss(bessel_grpo), where) is None  # of nothing that is published
