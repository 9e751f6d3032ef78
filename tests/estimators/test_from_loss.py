"""Losses as estimators: c = −∂loss/∂logp, the same number in every lane."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pgcheck.batch import Batch
from pgcheck.engines.exact import exact_moments
from pgcheck.errors import EstimatorError
from pgcheck.estimators import advantages as adv
from pgcheck.estimators import aggregation as agg
from pgcheck.estimators import ratios
from pgcheck.estimators.base import find_estimator
from pgcheck.estimators.from_loss import LossCoefficients, from_loss
from pgcheck.estimators.zoo import compose
from tests.engines.oracle import bandit, dialogue, walk

EXACT = {"rtol": 0.0, "atol": 1e-14}


def random_batch(*leading: int, seed: int = 0, B: int = 4, T: int = 3, A: int = 3) -> Batch:
    """Random rollouts `[*leading, B, T]` in two groups, ragged and with observation positions; logits included."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*leading, *shape, generator=g, dtype=torch.float64)

    mask = (torch.rand(*leading, B, T, generator=g, dtype=torch.float64) < 0.7).to(torch.float64)
    mask[..., 0] = 1.0
    action = torch.randint(0, A, (*leading, B, T), generator=g)
    logits = draw(B, T, A)
    logp = torch.log_softmax(logits, -1).gather(-1, action.unsqueeze(-1)).squeeze(-1) * mask
    minus_one = torch.full_like(action, -1)
    return Batch(
        state=torch.where(mask > 0, torch.zeros_like(action), minus_one),
        context=torch.where(mask > 0, torch.zeros_like(action), minus_one),
        action=torch.where(mask > 0, action, minus_one),
        reward=draw(B, T),
        mask=mask,
        logp=logp,
        behavior_logp=logp - 0.3 * draw(B, T) * mask,
        ref_logp=logp + 0.3 * draw(B, T) * mask,
        value=draw(B, T + 1),
        group=torch.tensor([0, 0, 1, 1]).expand(*leading, B),
        discount=0.9,
        action_logits=logits,
    )


def single(batch: Batch, m: int) -> Batch:
    return batch.map(lambda x: x[m])


def lane_of(loss: Callable[[Batch], Any], batch: Batch) -> tuple[Tensor, str | None]:
    coefficients = LossCoefficients(loss, leaf="logp", name="loss")
    return coefficients(batch), coefficients.lane


# -- the same loss in three lanes: REINFORCE with the batch mean, c = (R_i − R̄)/B


def plain(batch: Batch) -> Tensor:
    R = batch.episode_return
    return -((R - R.mean()).unsqueeze(-1) * batch.logp * batch.mask).sum(-1).mean()


def logging_item(batch: Batch) -> tuple[Tensor, dict[str, float]]:
    """As libraries do: the metrics are Python floats."""
    loss = plain(batch)
    kl = (batch.behavior_logp - batch.logp).mean()
    metrics = {"loss": loss.item(), "kl": -kl.item() / 2 + 1, "label": abs(kl.item())}
    return loss, {**metrics, "line": f"{metrics['loss']:.3f}"}  # type: ignore[dict-item]


def branching(batch: Batch) -> Tensor:
    """A Python branch on data, both sides equal in value."""
    R = batch.episode_return
    centred = R - R.mean() if R.mean().item() > 0 else R - R.sum() / batch.rows
    return -(centred.unsqueeze(-1) * batch.logp * batch.mask).sum(-1).mean()


def branching_on_float(batch: Batch) -> Tensor:
    """What is a Python float has left torch for good."""
    R = batch.episode_return
    centred = R - R.mean() if float(R.mean()) > 0 else R - R.sum() / batch.rows
    return -(centred.unsqueeze(-1) * batch.logp * batch.mask).sum(-1).mean()


def boolean_indexing(batch: Batch) -> Tensor:
    """x[mask.bool()]: the number of elements depends on the data."""
    R = batch.episode_return
    terms = ((R - R.mean()).unsqueeze(-1) * batch.logp)[batch.mask.bool()]
    return -terms.sum() / batch.rows


LANES: list[tuple[Callable[[Batch], Any], str]] = [
    (plain, "vmap"),
    (logging_item, "vmap, logged items"),
    (branching, "vmap, by branch"),
    (branching_on_float, "loop"),
    (boolean_indexing, "loop"),
]


def by_hand(batch: Batch) -> Tensor:
    """(R_i − R̄)/B, in loops over rows and steps of each batch of `[M, B, T]`."""
    out = torch.zeros_like(batch.reward)
    for m, rewards in enumerate(batch.reward.tolist()):
        R = [sum(batch.discount**t * r for t, r in enumerate(row)) for row in rewards]
        for i, row in enumerate(batch.mask[m].tolist()):
            for t, acts in enumerate(row):
                out[m, i, t] = acts * (R[i] - sum(R) / len(R)) / len(R)
    return out


@pytest.mark.parametrize(("loss", "lane"), LANES)
def test_every_lane_gives_the_coefficients_by_hand(loss: Callable[[Batch], Any], lane: str) -> None:
    """Same numbers, and the fastest lane the loss allows."""
    batch = random_batch(9)
    found, chosen = lane_of(loss, batch)
    torch.testing.assert_close(found, by_hand(batch), **EXACT)
    assert chosen == lane


@pytest.mark.parametrize(("loss", "lane"), LANES)
def test_one_batch_alone_is_one_of_many(loss: Callable[[Batch], Any], lane: str) -> None:
    """`[B, T]` in, `[B, T]` out."""
    batch = random_batch(3)
    found = LossCoefficients(loss, leaf="logp", name="loss")(single(batch, 1))
    torch.testing.assert_close(found, by_hand(batch)[1], **EXACT)


@pytest.mark.parametrize(("loss", "lane"), LANES)
def test_any_number_of_leading_dimensions(loss: Callable[[Batch], Any], lane: str) -> None:
    batch = random_batch(2, 5)
    found, chosen = lane_of(loss, batch)
    flat = batch.map(lambda x: x.flatten(0, 1))
    torch.testing.assert_close(found, by_hand(flat).unflatten(0, (2, 5)), **EXACT)
    assert chosen == lane


@pytest.mark.parametrize(("loss", "lane"), LANES)
def test_the_engine_reports_the_lane(loss: Callable[[Batch], Any], lane: str) -> None:
    """E ĝ of the batch mean is (B−1)/B ∇J, whichever way it was evaluated."""
    problem = walk(group_size=3)
    (found,) = exact_moments([from_loss(loss)], problem)
    torch.testing.assert_close(found.mean, problem.gradient() * 2 / 3, **EXACT)
    assert found.lane == lane


def test_losses_are_minimised_and_coefficients_ascend() -> None:
    """loss = −mean R log π has c = +R/B, and E ĝ = +∇J."""

    def loss(batch: Batch) -> Tensor:
        return -(batch.episode_return.unsqueeze(-1) * batch.logp * batch.mask).sum(-1).mean()

    problem = dialogue(groups=2, group_size=2)
    estimator = from_loss(loss, couples="trajectory")
    batch = random_batch(2)
    torch.testing.assert_close(
        estimator.coefficients(batch), batch.episode_return.unsqueeze(-1) * batch.mask / 4, **EXACT
    )
    (found,) = exact_moments([estimator], problem)
    torch.testing.assert_close(found.mean, problem.gradient(), **EXACT)


# -- numbers that leave the tensors and come back


def item_in_the_loss(batch: Batch) -> Tensor:
    """The scale is a Python number: x.item() times a tensor."""
    R = batch.episode_return
    return -((R - R.mean().item()).unsqueeze(-1) * batch.logp * batch.mask).sum(-1).mean()


def clamped_by_item(batch: Batch) -> Tensor:
    R = batch.episode_return
    centred = R - R.clamp(max=100.0 + R.max().item()).mean()
    return -(centred.unsqueeze(-1) * batch.logp * batch.mask).sum(-1).mean()


def list_of_items(batch: Batch) -> Tensor:
    R = batch.episode_return
    mean = sum(R.tolist()) / batch.rows
    return -((R - mean).unsqueeze(-1) * batch.logp * batch.mask).sum(-1).mean()


@pytest.mark.parametrize(
    ("loss", "expected"),
    [(item_in_the_loss, "vmap, by branch"), (clamped_by_item, "loop"), (list_of_items, "loop")],
)
def test_an_item_in_the_loss_is_no_log_line(loss: Callable[[Batch], Tensor], expected: str) -> None:
    batch = random_batch(9)
    found, lane = lane_of(loss, batch)
    torch.testing.assert_close(found, by_hand(batch), **EXACT)
    assert lane == expected


# A branch that is taken on few batches: the first ones, on which lanes are compared, do not show it. The rewards of one
# batch in `rare_batch` are large, all the others' are small, and all these losses double their scale on the large one.


def branch_on_item(batch: Batch) -> Tensor:
    return (2.0 if batch.reward.sum().item() > 50 else 1.0) * plain(batch)


def branch_on_float(batch: Batch) -> Tensor:
    return (2.0 if float(batch.reward.sum()) > 50 else 1.0) * plain(batch)


def branch_on_math(batch: Batch) -> Tensor:
    return (2.0 if math.sqrt(batch.reward.sum().item() ** 2) > 50 else 1.0) * plain(batch)


def branch_on_round(batch: Batch) -> Tensor:
    return (2.0 if round(batch.reward.sum().item(), 3) > 50 else 1.0) * plain(batch)


def compare_with_item(batch: Batch) -> Tensor:
    """A tensor compared with an item: an outlier filter as many write it."""
    large = batch.reward.sum() > 50 + 0 * batch.reward.max().item()
    return torch.where(large, 2.0, 1.0) * plain(batch)


def clamp_at_item(batch: Batch) -> Tensor:
    """clamp(s/50, 1, 2) with a bound that was an item."""
    scale = (batch.reward.sum() / 50).clamp(min=1.0 + 0 * batch.reward.max().item()).clamp(max=2.0)
    return scale * plain(batch)


def rare_batch() -> Batch:
    batch = random_batch(12)
    batch.reward[8, 0, 0] = 1_000.0
    return batch


@pytest.mark.parametrize(
    "loss", [branch_on_item, branch_on_float, branch_on_math, branch_on_round, compare_with_item, clamp_at_item]
)
def test_an_item_that_steers_only_some_batches(loss: Callable[[Batch], Tensor]) -> None:
    """What `.item()` decides is decided batch by batch, also where the first batches do not show it."""
    batch = rare_batch()
    expected = by_hand(batch)
    expected[8] *= 2.0
    found, _ = lane_of(loss, batch)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_a_logged_value_that_is_compared_for_the_log_alone() -> None:
    """A branch that only decides what is logged costs speed, not correctness."""

    def loss(batch: Batch) -> tuple[Tensor, dict[str, float]]:
        out = plain(batch)
        return out, ({"high": 1.0} if out.item() > 0 else {})

    batch = random_batch(9)
    found, lane = lane_of(loss, batch)
    torch.testing.assert_close(found, by_hand(batch), **EXACT)
    assert lane == "vmap, by branch"


def test_a_float_for_the_log() -> None:
    """float(x) is a log line too; whichever lane it takes, the numbers are right."""
    batch = random_batch(9)
    found, _ = lane_of(lambda b: (plain(b), float(b.reward.mean())), batch)
    torch.testing.assert_close(found, by_hand(batch), **EXACT)


# -- what a loss may return


def test_a_tuple_counts_as_its_first_element() -> None:
    batch = random_batch(5)
    found, lane = lane_of(lambda b: (plain(b), {"anything": "at all"}, None), batch)
    torch.testing.assert_close(found, by_hand(batch), **EXACT)
    assert lane == "vmap"


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (lambda b: b.logp.sum(-1), r"returned a tensor of shape \[4\], not a scalar; end it with a sum or a mean"),
        (lambda b: b.logp, r"returned a tensor of shape \[4, 3\], not a scalar"),
        (lambda b: b.logp.sum().reshape(1), r"returned a tensor of shape \[1\], not a scalar"),
        (lambda b: 3.0, "returned float, not a torch tensor"),
        (lambda b: None, "returned None, not a torch tensor"),
        (lambda b: (), "returned tuple, not a torch tensor"),
        (lambda b: {"loss": b.logp.sum()}, "returned dict, not a torch tensor"),
        (lambda b: (1.0, b.logp.sum()), "returned float, not a torch tensor"),
        (lambda b: b.logp.sum().item(), "returned float, not a torch tensor"),
    ],
)
@pytest.mark.parametrize("leading", [(), (9,)])
def test_what_is_no_scalar_is_refused(loss: Callable[[Batch], Any], words: str, leading: tuple[int, ...]) -> None:
    with pytest.raises(EstimatorError, match=rf"loss 'loss' {words}"):
        lane_of(loss, random_batch(*leading))


@pytest.mark.parametrize(
    "loss",
    [
        lambda b: b.reward.sum(),
        lambda b: b.logp.detach().sum(),
        lambda b: torch.zeros(()),
        lambda b: torch.ones((), requires_grad=True) * b.reward.sum(),
    ],
)
@pytest.mark.parametrize("leading", [(), (9,)])
def test_no_gradient_is_refused(loss: Callable[[Batch], Tensor], leading: tuple[int, ...]) -> None:
    """A loss that does not depend on batch.logp has no coefficients; zeros would look like an answer."""
    with pytest.raises(EstimatorError, match="loss 'loss' has no gradient"):
        lane_of(loss, random_batch(*leading))


def test_a_loss_under_no_grad_is_refused() -> None:
    def loss(batch: Batch) -> Tensor:
        with torch.no_grad():
            return plain(batch)

    with pytest.raises(EstimatorError, match=r"no gradient.*torch\.no_grad"):
        lane_of(loss, random_batch(9))


def test_a_batch_with_nothing_to_learn_has_coefficients_zero() -> None:
    """Unanimous batches that return a constant have no gradient of their own, also when one ends up alone in a block.

    Two arms, G = 64: 65 multisets, so blocks of 64 leave the last, (1, …, 1), by itself.
    """

    def skips_unanimous(batch: Batch) -> Tensor:
        R = batch.episode_return
        if len(set(R.tolist())) == 1:
            return torch.zeros((), dtype=R.dtype)
        return plain(batch)

    problem = bandit([1.0, 0.0], [0.3, -0.2], group_size=64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pgcheck.engines.exact._BLOCK_ELEMENTS", 1)
        (found,) = exact_moments([from_loss(skips_unanimous)], problem)
    torch.testing.assert_close(found.mean, problem.gradient() * 63 / 64, **EXACT)


@pytest.mark.parametrize("in_loop", [False, True])
def test_a_loss_that_is_not_a_number_is_refused(in_loop: bool) -> None:
    """Dividing by a standard deviation that can be zero; the engine shows the batch."""

    def loss(batch: Batch) -> Tensor:
        R = batch.episode_return
        if in_loop:
            assert R.sum().item() > -1e9
        return -(((R - R.mean()) / R.std()).unsqueeze(-1) * batch.logp).sum(-1).mean()

    problem = bandit([1.0, 0.0], [0.3, -0.2], group_size=2)
    table = r"row  group  actions  rewards  coefficients\n +0 +0 +(\d) +(\d) +nan\n +1 +0 +\1 +\2 +nan$"
    with pytest.raises(EstimatorError, match=rf"'divides' returns nan\. .*\n +{table}"):
        exact_moments([from_loss(loss, name="divides")], problem)


@pytest.mark.parametrize("leading", [(), (9,)])
def test_an_exception_in_the_loss_names_loss_line_and_shape(leading: tuple[int, ...]) -> None:
    def loss(batch: Batch) -> Tensor:
        return batch.logp @ batch.logp

    words = r"loss 'loss' raises at test_from_loss\.py:\d+, on a batch \[B, T\] = \[4, 3\]: RuntimeError: mat1"
    with pytest.raises(EstimatorError, match=words):
        lane_of(loss, random_batch(*leading))


def test_an_exception_of_the_users_own_is_the_cause() -> None:
    """Its message is in the error's, its traceback above it."""

    class OwnError(Exception):
        pass

    def loss(batch: Batch) -> Tensor:
        raise OwnError("mine")

    with pytest.raises(
        EstimatorError, match=r"on 'custom/problem': loss 'loss' raises at .*: OwnError: mine"
    ) as caught:
        exact_moments([from_loss(loss)], walk(group_size=2))
    assert isinstance(caught.value.__cause__, OwnError)


# -- what a loss may not do to its inputs


@pytest.mark.parametrize(("loss", "lane"), LANES)
def test_inputs_are_left_as_they_were(loss: Callable[[Batch], Any], lane: str) -> None:
    batch = random_batch(9)
    before = {name: x.clone() for name, x in batch.tensors().items()}
    lane_of(loss, batch)
    for name, x in batch.tensors().items():
        assert torch.equal(x, before[name]), name
        assert not x.requires_grad, name


def in_place(batch: Batch) -> Tensor:
    """As trainers do: the KL penalty is taken off the rewards in place, then the returns are formed."""
    rewards = batch.reward
    rewards -= 0.5 * (1.0 + batch.behavior_logp - batch.ref_logp)
    return -(rewards.sum(-1).unsqueeze(-1) * batch.logp * batch.mask).sum(-1).mean()


def test_a_loss_that_works_in_place_is_refused() -> None:
    """A later evaluation of the same rows would see what an earlier one did to them."""
    with pytest.raises(EstimatorError, match=r"'in_place' changes its inputs: batch\.reward"):
        exact_moments([from_loss(in_place)], dialogue(groups=2, group_size=2))


# -- losses on the logits


def entropy(batch: Batch) -> Tensor:
    """−(1/B) Σ H(π(·|k)) over policy positions: an entropy bonus alone."""
    logp = torch.log_softmax(batch.logits, -1)
    return ((logp.exp() * logp).sum(-1) * batch.mask).sum(-1).mean()


def test_entropy_in_closed_form() -> None:
    """∂H/∂z_a = −π_a (log π_a + H)."""
    batch = random_batch(6)
    found = LossCoefficients(entropy, leaf="logits", name="entropy")(batch)
    pi = torch.softmax(batch.logits, -1)
    H = -(pi * pi.log()).sum(-1, keepdim=True)
    expected = -pi * (pi.log() + H) * batch.mask.unsqueeze(-1) / 4
    assert found.shape == batch.logits.shape
    torch.testing.assert_close(found, expected, **EXACT)


def test_full_kl_in_closed_form() -> None:
    """KL(π‖u) to the uniform policy: −∂KL/∂z_a = −π_a (log π_a − log u − KL), with log u = −log A."""

    def kl(batch: Batch) -> Tensor:
        logp = torch.log_softmax(batch.logits, -1)
        return ((logp.exp() * (logp + math.log(3))).sum(-1) * batch.mask).sum(-1).mean()

    batch = random_batch(6)
    found = LossCoefficients(kl, leaf="logits", name="kl")(batch)
    pi = torch.softmax(batch.logits, -1)
    distance = (pi * (pi.log() + math.log(3))).sum(-1, keepdim=True)
    expected = -pi * (pi.log() + math.log(3) - distance) * batch.mask.unsqueeze(-1) / 4
    torch.testing.assert_close(found, expected, **EXACT)


def test_logp_is_recomputed_from_the_logits() -> None:
    """With leaf="logits", −∂/∂z of −R log π is R (1[a] − π): the same ĝ as leaf="logp"."""
    batch = random_batch(6)
    over_logits = LossCoefficients(plain, leaf="logits", name="plain")(batch)
    c = LossCoefficients(plain, leaf="logp", name="plain")(batch)
    pi = torch.softmax(batch.logits, -1)
    drawn = torch.nn.functional.one_hot(batch.action.clamp(min=0), 3)
    torch.testing.assert_close(over_logits, c.unsqueeze(-1) * (drawn - pi), **EXACT)
    problem = dialogue(groups=2, group_size=2)
    a, b = exact_moments([from_loss(plain), from_loss(plain, leaf="logits")], problem)
    torch.testing.assert_close(a.mean, b.mean, **EXACT)
    torch.testing.assert_close(a.covariance, b.covariance, **EXACT)


@pytest.mark.parametrize(("number", "lane"), [(Tensor.item, "vmap, by branch"), (float, "loop")])
def test_logits_lane_with_a_branch(number: Callable[[Tensor], Any], lane: str) -> None:
    """A branch on data, and a single batch, give the same as vmap."""

    def with_branch(batch: Batch) -> Tensor:
        assert number(batch.reward.sum()) < 1e9
        return entropy(batch)

    batch = random_batch(6)
    slow = LossCoefficients(with_branch, leaf="logits", name="slow")
    fast = LossCoefficients(entropy, leaf="logits", name="fast")
    torch.testing.assert_close(slow(batch), fast(batch), **EXACT)
    assert (slow.lane, fast.lane) == (lane, "vmap")
    torch.testing.assert_close(slow(single(batch, 2)), fast(batch)[2], **EXACT)


def test_logits_are_there_only_when_asked_for() -> None:
    """A loss with leaf="logp" that reads batch.logits is told which leaf to declare."""
    with pytest.raises(EstimatorError, match='leaf="logits"'):
        exact_moments([from_loss(entropy)], walk(group_size=2))


# -- from_loss itself


def test_from_loss_passes_its_declarations_on() -> None:
    e = from_loss(plain, couples="group", name="mine", min_group_size=3)
    assert (e.name, e.couples, e.leaf, e.min_group_size) == ("mine", "group", "logp", 3)
    assert from_loss(plain).name == "plain"
    assert from_loss(plain).couples == "batch"
    assert [c.kind for c in from_loss(plain).claims] == ["unbiased"]

    class LossObject:
        def __call__(self, batch: Batch) -> Tensor:
            return plain(batch)

    assert from_loss(LossObject()).name == "LossObject"


def test_one_loss_on_several_problems() -> None:
    """The lane found on one problem serves the next, of another shape."""
    estimator = from_loss(logging_item)
    for problem in (walk(group_size=3), dialogue(groups=2, group_size=2), bandit([1.0, 0.0], [0.3, 0.1], group_size=5)):
        (found,) = exact_moments([estimator], problem)
        share = (problem.rows - 1) / problem.rows
        torch.testing.assert_close(found.mean, share * problem.gradient(), **EXACT)


def ppo_clip_loss(batch: Batch) -> Tensor:
    """−(1/G) Σ_i (1/|o_i|) Σ_t min(r A, clip(r, .8, 1.2) A), A = (R − mean)/(std + 1e-6), population std, one group."""
    R = batch.episode_return
    A = ((R - R.mean()) / (R.std(correction=0) + 1e-6)).unsqueeze(-1)
    ratio = torch.exp(batch.logp - batch.behavior_logp)
    surrogate = torch.minimum(ratio * A, ratio.clamp(0.8, 1.2) * A)
    return -((surrogate * batch.mask).sum(-1) / batch.mask.sum(-1)).mean()


def test_a_real_ppo_clip_loss_is_the_zoo_entry_off_policy() -> None:
    """Away from the kinks r = .8, 1.2, autograd and `ppo_clip` agree; both have clipped and unclipped positions."""
    batch = random_batch(40, seed=3)
    one_group = replace(batch, group=torch.zeros_like(batch.group))
    r = (batch.logp - batch.behavior_logp).exp()[batch.mask > 0]
    assert float((r - 0.8).abs().min()) > 1e-6
    assert float((r - 1.2).abs().min()) > 1e-6
    found, lane = lane_of(ppo_clip_loss, one_group)
    expected = compose(adv.standardised_return("group"), ratio=ratios.ppo_clip(), aggregation=agg.sequence_mean)
    torch.testing.assert_close(found, expected(one_group), rtol=1e-11, atol=1e-14)
    assert lane == "vmap"
    silent = (expected(one_group) == 0) & (batch.mask > 0)
    assert 0 < int(silent.sum()) < int((batch.mask > 0).sum())


def test_a_real_ppo_clip_loss_is_grpo_in_expectation() -> None:
    """The same over every batch of an off-policy problem.

    To 1e-10: in a unanimous group the loss divides one rounding of its mean, 1e-16, by ε = 1e-6; the entry gives 0.
    """
    problem = walk(group_size=3, behavior_logits=[[-0.3, 0.5], [0.6, -0.1]])
    found, expected = exact_moments([from_loss(ppo_clip_loss, couples="group"), find_estimator("grpo")], problem)
    torch.testing.assert_close(found.mean, expected.mean, rtol=0, atol=1e-10)
    torch.testing.assert_close(found.covariance, expected.covariance, rtol=0, atol=1e-10)


_seen: list[int] = []


def _looped(weight: Callable[[Batch], Tensor]) -> Callable[[Batch], Tensor]:
    def loss(batch: Batch) -> Tensor:
        scale = 1.0 if float(batch.reward.sum()) > 0 else 2.0  # a branch: only the loop can take it
        return -scale * (weight(batch) * batch.logp * batch.mask).sum()

    return loss


def _counted(batch: Batch) -> Tensor:
    _seen.append(1)
    return batch.reward + 0.1 * len(_seen)


IMPURE = {
    "draws random numbers": lambda batch: torch.nn.functional.dropout(batch.reward, 0.5),
    "keeps state": _counted,
    "changes its inputs": lambda batch: batch.reward.mul_(1.5),
}


@pytest.mark.parametrize("said", IMPURE)
def test_an_impure_loss_is_found_out_in_the_loop_as_well(said: str) -> None:
    """Though a block's columns are shared by its batches, and few batches are looked at."""
    estimator = from_loss(_looped(IMPURE[said]))
    for _ in range(2):  # the lane is known the second time
        with pytest.raises(EstimatorError, match=said):
            exact_moments([estimator], dialogue(groups=1, group_size=2))
        assert isinstance(estimator.coefficients, LossCoefficients)
        assert estimator.coefficients.lane in (None, "loop")  # None: refused before it had one


def test_what_a_batch_works_out_may_be_written_to_in_the_loop() -> None:
    """`r -= r.mean()` of `batch.episode_return` is the batch's own business, as under vmap."""

    def centred(batch: Batch) -> Tensor:
        r = batch.episode_return
        r -= r.mean()
        return r[:, None]

    problem = dialogue(groups=1, group_size=2)
    written, plain = (
        exact_moments([from_loss(_looped(weight))], problem)[0]
        for weight in (centred, lambda batch: (batch.episode_return - batch.episode_return.mean())[:, None])
    )
    assert written.lane == plain.lane == "loop"
    assert torch.equal(written.mean, plain.mean)


# -- labels of groups


def _loops_over_groups(batch: Batch) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for g in batch.group.unique().tolist():
        rows = batch.group == g
        r = batch.episode_return[rows]
        total = total - ((r - r.mean())[:, None] * batch.logp[rows] * batch.mask[rows]).sum()
    return total


def _scatters_by_group(batch: Batch) -> Tensor:
    """Sums are written into a tensor made from the labels: it must be each batch's own."""
    R = batch.episode_return
    total = torch.zeros_like(batch.group, dtype=R.dtype).scatter_add_(-1, batch.group, R)
    count = torch.zeros_like(batch.group, dtype=R.dtype).scatter_add_(-1, batch.group, torch.ones_like(R))
    centred = R - (total / count.clamp(min=1.0)).gather(-1, batch.group)
    return -(centred[:, None] * batch.logp * batch.mask).sum()


@pytest.mark.parametrize("loss", [_loops_over_groups, _scatters_by_group])
def test_a_loss_that_goes_by_group_is_vectorised(loss: Callable[[Batch], Tensor]) -> None:
    problem = dialogue(groups=2, group_size=2)
    index = torch.cartesian_prod(*[torch.arange(len(problem.trajectories))] * problem.rows)[::7]
    batch = problem.trajectories.batch(index, problem.group_labels)
    found, lane = lane_of(loss, batch)
    assert lane == "vmap"
    R, mask = batch.episode_return, batch.mask
    centred = (R.unflatten(-1, (2, 2)) - R.unflatten(-1, (2, 2)).mean(-1, keepdim=True)).flatten(-2)
    torch.testing.assert_close(found, centred.unsqueeze(-1) * mask, rtol=1e-12, atol=1e-14)


# -- branch by branch


def _by_rows(batch: Batch) -> Tensor:
    """Rows of a group, one group after the other, if they differ: a path for each answer."""
    total = torch.zeros((), dtype=torch.float64)
    for g in batch.group.unique().tolist():
        rows = batch.group == g
        r = batch.episode_return[rows]
        if len(r) < 2 or r.std().item() < 0.2:
            continue
        scale = 2.0 if r[0].item() - r[1].item() > 0 else 1.0
        total = total - scale * ((r - r.mean())[:, None] * batch.logp[rows] * batch.mask[rows]).sum()
    return total + 0.0 * batch.logp.sum()


def _in_the_loop(loss: Callable[[Batch], Any], batch: Batch) -> Tensor:
    slow = LossCoefficients(loss, leaf="logp", name="slow")
    slow.lane = "loop"
    return slow(batch)


def test_every_batch_goes_its_own_way() -> None:
    """Two groups, three ways for each: every batch of the problem is as the loop has it."""
    problem = dialogue(groups=2, group_size=2)
    index = torch.cartesian_prod(*[torch.arange(len(problem.trajectories))] * problem.rows)
    batch = problem.trajectories.batch(index, problem.group_labels)
    found, lane = lane_of(_by_rows, batch)
    assert lane == "vmap, by branch"
    expected = _in_the_loop(_by_rows, batch)
    assert len(torch.unique((expected != 0).flatten(1).int(), dim=0)) > 3
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def _waits(batch: Batch) -> Tensor:
    n, left = 0, batch.reward.abs().sum()
    while left > 1e-3:  # answered in advance, it would go on for ever
        n, left = n + 1, left / 2
    return -(n * batch.logp * batch.mask).sum()


def _impossible_way(batch: Batch) -> Any:
    return 0.5 if (batch.reward**2).sum().item() < 0 else plain(batch)  # no batch goes there


def _every_way(batch: Batch) -> Tensor:
    """A path for each pattern of signs."""
    total = torch.zeros((), dtype=torch.float64)
    for r, logp in zip(batch.reward.flatten(), batch.logp.flatten(), strict=True):
        total = total - (logp * r if r > 0 else 2.0 * logp * r)
    return total


@pytest.mark.parametrize("loss", [_waits, _impossible_way, _every_way])
def test_what_cannot_be_answered_in_advance_is_right_all_the_same(loss: Callable[[Batch], Any]) -> None:
    batch = random_batch(40)
    found, _ = lane_of(loss, batch)
    torch.testing.assert_close(found, _in_the_loop(loss, batch), rtol=1e-12, atol=1e-14)


def test_a_path_that_the_loop_contradicts_is_not_taken() -> None:
    """`is` sees a number of its own: only where it is compared with the loop does that show."""

    def loss(batch: Batch) -> Tensor:
        scale = 1.0
        if batch.reward.sum().item() > 50:
            scale = 2.0 if isinstance(batch.reward.max().item(), float) else 3.0
        return scale * plain(batch)

    batch = rare_batch()
    found, lane = lane_of(loss, batch)
    expected = by_hand(batch)
    expected[8] *= 2.0
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    assert lane == "loop"


# -- in the loop, batches that see the same numbers together


def _above_the_worst(batch: Batch) -> Tensor:
    r = batch.episode_return
    best = r[r > float(r.min())]
    base = best.mean() if len(best) else r.mean()
    return -((r - base)[:, None] * batch.logp * batch.mask).sum(-1).mean()


def _mean_of_floats(batch: Batch) -> Tensor:
    r = batch.episode_return
    adv = torch.tensor([float(x) - sum(r.tolist()) / len(r) for x in r], dtype=torch.float64)
    return -(adv[:, None] * batch.logp * batch.mask).sum(-1).mean()


def _some_positions(batch: Batch) -> Tensor:
    """Masks with two dimensions, in a tuple, written to; places as whole numbers."""
    acts = batch.mask > 0
    total = -(batch.logp[acts] * batch.reward[acts].sum()).sum()
    adv = torch.zeros_like(batch.mask)
    adv[batch.episode_return > 0] = 2.0
    rows = (batch.episode_return > 0).nonzero().squeeze(-1)
    return total - (batch.logp[rows] * 0.5).sum() - batch.logp[batch.length > 1, 0].sum() - (adv * batch.logp).sum()


def _of_the_longest(batch: Batch) -> Tensor:
    return -batch.logp[int(batch.length.argmax())].sum() * batch.reward.sum()


def _by_numpy(batch: Batch) -> Tensor:
    return -(float(batch.episode_return.detach().numpy().max()) * batch.logp * batch.mask).sum()


def _now_and_then_constant(batch: Batch) -> Tensor:
    wins = batch.episode_return > 0
    return -(batch.logp[wins] * batch.mask[wins]).sum() if wins.any() and float(wins.sum()) < 4 else torch.zeros(())


def few_returns(M: int = 700) -> Batch:
    """0/1 returns, so that many batches see the same numbers."""
    batch = random_batch(M)
    reward = torch.zeros_like(batch.reward)
    reward[..., 0] = (batch.reward[..., 0] > 0.3).to(torch.float64)
    return replace(batch, reward=reward)


def counted(loss: Callable[[Batch], Any], batch: Batch) -> tuple[Tensor, int]:
    """c in the loop, and how often the loss was called."""
    calls: list[int] = []

    def watched(one: Batch) -> Any:
        calls.append(1)
        return loss(one)

    slow = LossCoefficients(watched, leaf="logp", name="slow")
    slow.lane = "loop"
    return slow(batch), len(calls)


def batch_by_batch(loss: Callable[[Batch], Any], batch: Batch) -> Tensor:
    slow = LossCoefficients(loss, leaf="logp", name="slow")
    slow.lane = "loop"
    return torch.stack([slow(single(batch, m)) for m in range(len(batch.reward))])


@pytest.mark.parametrize(
    ("loss", "most"),
    [
        (_above_the_worst, 150),
        (_mean_of_floats, 300),
        (_of_the_longest, 300),
        (_some_positions, 700 + 32),  # a path for each mask of twelve positions: most are watched, few go together
        (_now_and_then_constant, 300),
        (_by_numpy, 700 + 32),
    ],
)
def test_batches_that_see_the_same_numbers_go_together(loss: Callable[[Batch], Any], most: int) -> None:
    """The same coefficients as one batch after the other, from fewer calls; where nothing can be shared, from hardly more."""
    batch = few_returns()
    found, calls = counted(loss, batch)
    torch.testing.assert_close(found, batch_by_batch(loss, batch), rtol=1e-12, atol=1e-14)
    assert calls <= most


def test_masks_of_two_dimensions_go_together() -> None:
    """With the same mask in every batch there is a path for each set of rows that win."""
    batch = few_returns()
    batch = replace(batch, mask=torch.ones_like(batch.mask))
    found, calls = counted(_some_positions, batch)
    torch.testing.assert_close(found, batch_by_batch(_some_positions, batch), rtol=1e-12, atol=1e-14)
    assert calls <= 300


def test_a_batch_that_is_seen_wrongly_is_not_taken() -> None:
    """Python's own view of a number is not watched: `is_leaf` differs when batches go together, and the loop decides."""

    def loss(batch: Batch) -> Tensor:
        scale = 1.0 if float(batch.reward.sum()) > 1 else 3.0
        return scale * plain(batch) * (1.0 if torch._C._functorch.maybe_current_level() is None else 2.0)

    batch = few_returns()
    found, _ = counted(loss, batch)
    torch.testing.assert_close(found, batch_by_batch(loss, batch), rtol=1e-12, atol=1e-14)


def test_an_error_on_one_of_many_is_that_of_the_loop() -> None:
    def loss(batch: Batch) -> Tensor:
        if float(batch.reward.sum()) == 4.0:
            raise ValueError("all of them win")
        return _mean_of_floats(batch)

    with pytest.raises(EstimatorError, match=r"loss 'slow' raises.*all of them win"):
        counted(loss, few_returns())


def test_numbers_on_the_logits_go_together() -> None:
    def loss(batch: Batch) -> Tensor:
        return -((float(batch.episode_return.sum()) * batch.logp + batch.logits.logsumexp(-1)) * batch.mask).sum()

    calls: list[int] = []
    slow = LossCoefficients(lambda b: (calls.append(1), loss(b))[1], leaf="logits", name="slow")
    fast = LossCoefficients(loss, leaf="logits", name="fast")
    slow.lane = fast.lane = "loop"
    batch = few_returns()
    expected = torch.stack([fast(single(batch, m)) for m in range(len(batch.reward))])
    torch.testing.assert_close(slow(batch), expected, rtol=1e-12, atol=1e-14)
    assert len(calls) < 150
