"""Every number of a comparison against sums over ordered batches in plain Python, or a closed form."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from fractions import Fraction
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from pgcheck.batch import Batch
from pgcheck.engines.exact import exact_moments
from pgcheck.errors import UnknownNameError
from pgcheck.estimators.base import Estimator, from_coefficients
from pgcheck.estimators.lookup import as_estimator
from pgcheck.problem import Problem
from pgcheck.registry import find_problem
from pgcheck.verdicts import variance as v
from pgcheck.verdicts.quantities import find_quantity
from pgcheck.verdicts.verdict import measure
from tests.engines.oracle import bandit, dialogue, every_batch, gradient_of, rollout_chances, softmax, walk


def close(x: float) -> Any:
    return pytest.approx(x, rel=1e-11, abs=1e-12)


OFF = [[0.5, 0.1], [0.0, 0.0], [-0.4, 0.2]]
PAIRS = [
    ("reinforce", dialogue(groups=1, group_size=2)),  # rows share their start
    ("reward_to_go", dialogue(groups=2, group_size=(1, 2))),
    ("all_action", dialogue(groups=1, group_size=2)),  # weights on logits
    ("grpo", dialogue(groups=2, group_size=(2, 1))),  # groups apart
    ("batch_mean", dialogue(groups=2, group_size=1)),
    ("leave_one_out", walk(groups=1, group_size=3)),  # contexts recur, so that steps covary
    ("cispo", dialogue(groups=1, group_size=2, behavior_logits=OFF)),
]
each_pair = pytest.mark.parametrize(("name", "problem"), PAIRS, ids=[f"{n}-{i}" for i, (n, _) in enumerate(PAIRS)])


def drawn(e: Estimator, problem: Problem) -> list[tuple[list[list[float]], float]]:
    """ĝ by position, T lists of K·A numbers, and the probability of every ordered batch."""
    policy = [softmax(row) for row in problem.logits.tolist()]
    table = problem.trajectories_with(e.needs)
    out = []
    for batch, p in every_batch(table, problem.sizes, rollout_chances(problem)):
        out.append((gradient_of(e.coefficients(seen(e, batch, problem)), batch, policy), p))
    return out


def seen(e: Estimator, batch: Batch, problem: Problem) -> Batch:
    from dataclasses import replace

    return replace(batch, action_logits=problem.logits[batch.context.clamp(min=0)]) if e.leaf == "logits" else batch


def expected(terms: list[tuple[float, float]]) -> float:
    return math.fsum(x * p for x, p in terms)


# -- by step, block and source


@each_pair
def test_covariance_of_steps(name: str, problem: Problem) -> None:
    """C[t,u] = Σ_x Cov(ĝ_t[x], ĝ_u[x]) by two passes; its sum is tr Cov ĝ."""
    e = as_estimator(name)
    every = drawn(e, problem)
    found = v.step_covariance(e, problem, budget=10**6)
    assert found is not None
    T, cells = len(every[0][0]), problem.logits.numel()
    mean = [[expected([(g[t][x], p) for g, p in every]) for x in range(cells)] for t in range(T)]
    for t, u in itertools.product(range(T), repeat=2):
        covariance = math.fsum(
            expected([((g[t][x] - mean[t][x]) * (g[u][x] - mean[u][x]), p) for g, p in every]) for x in range(cells)
        )
        assert float(found[t, u]) == close(covariance), (t, u)
    (moments,) = exact_moments([e], problem)
    assert float(found.sum()) == close(moments.total_variance)
    rows = v.step_rows(found)
    assert [r["step"] for r in rows] == list(range(T))
    assert math.fsum(r["share"] for r in rows) == close(1.0)
    assert [r["variance"] for r in rows] == [float(found[t, t]) for t in range(T)]


def test_covariance_of_steps_knows_the_order_of_rows() -> None:
    """The second row counts double: multisets would not do."""
    e = from_coefficients(
        lambda b: b.episode_return.unsqueeze(-1) * torch.tensor([[1.0], [2.0]]) * b.mask, name="ordered"
    )
    problem = walk(groups=1, group_size=2)
    found = v.step_covariance(e, problem, budget=10**6)
    assert found is not None
    every = drawn(e, problem)
    sums = [([math.fsum(g[t][x] for t in range(2)) for x in range(4)], p) for g, p in every]
    mean = [expected([(g[x], p) for g, p in sums]) for x in range(4)]
    assert float(found.sum()) == close(
        math.fsum(expected([((g[x] - mean[x]) ** 2, p) for g, p in sums]) for x in range(4))
    )


def test_steps_that_do_not_fit() -> None:
    assert v.step_covariance(as_estimator("grpo"), dialogue(groups=1, group_size=2), budget=5) is None


class Small(nn.Module):
    """Two layers over one-hot contexts; its blocks have names."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first, self.second = nn.Linear(3, 2), nn.Linear(2, 2, bias=False)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))  # type: ignore[no-any-return]


def test_blocks() -> None:
    """Logits: Σ_a Var ĝ[k,a] of a context. Parameters: the variance of Σ_z ĝ[z] ∂z/∂θ, ∂z/∂θ by central differences."""
    from dataclasses import replace

    with torch.random.fork_rng():
        model = Small()
    problem = replace(dialogue(groups=1, group_size=2), policy=model)
    e = as_estimator("grpo")
    (moments,) = exact_moments([e], problem)
    every = [([math.fsum(step[x] for step in g) for x in range(6)], p) for g, p in drawn(e, problem)]

    def variance(x: list[float]) -> float:
        chances = [p for _, p in every]
        mean = expected(list(zip(x, chances, strict=True)))
        return expected([((a - mean) ** 2, p) for a, p in zip(x, chances, strict=True)])

    by_context = v.blocks(moments, problem)
    for k in range(3):
        assert by_context[f"context {k}"] == close(sum(variance([g[2 * k + a] for g, _ in every]) for a in range(2)))
    by_name = v.blocks(moments, problem, space="parameters")
    assert list(by_name) == [name for name, _ in problem.policy.named_parameters()]
    with torch.no_grad():
        for name, parameter in problem.policy.named_parameters():
            total = 0.0
            for i in range(parameter.numel()):
                ends = []
                for step in (1e-5, -1e-5):
                    parameter.view(-1)[i] += step
                    ends.append(problem.policy().flatten())
                    parameter.view(-1)[i] -= step
                slope = ((ends[0] - ends[1]) / 2e-5).tolist()
                total += variance([math.fsum(a * b for a, b in zip(g, slope, strict=True)) for g, _ in every])
            assert by_name[name] == pytest.approx(total, rel=1e-7), name
    assert math.fsum(by_name.values()) == close(moments.total_variance_in_parameters())


@each_pair
def test_sources(name: str, problem: Problem) -> None:
    """By conditional means over rows of ordered batches, keyed by (s_t, a_t) and by s_t; each row with chance 1/B."""
    e = as_estimator(name)
    found = v.sources(e, problem)
    if e.leaf == "logits":
        assert found is None
        assert v.approximations(e, problem) is None
        return
    assert found is not None
    policy = [softmax(row) for row in problem.logits.tolist()]
    B, T, cells = problem.rows, problem.trajectories.paths.steps, problem.logits.numel()
    terms: list[tuple[Batch, int, list[list[float]], list[float], float]] = []
    for batch, p in every_batch(problem.trajectories_with(e.needs), problem.sizes, rollout_chances(problem)):
        c = e.coefficients(batch) * B
        for i in range(B):
            alone = torch.zeros_like(c)
            alone[i] = c[i]
            terms.append((batch, i, gradient_of(alone, batch, policy), (c[i] * batch.mask[i]).tolist(), p / B))

    def given(x: list[list[float]], keys: list[Any]) -> list[list[float]]:
        mass: dict[Any, float] = defaultdict(float)
        total: dict[Any, list[float]] = defaultdict(lambda: [0.0] * cells)
        for key, row, (*_, p) in zip(keys, x, terms, strict=True):
            mass[key] += p
            total[key] = [a + p * b for a, b in zip(total[key], row, strict=True)]
        return [[a / mass[key] for a in total[key]] for key in keys]

    def spread(x: list[list[float]], around: list[list[float]]) -> float:
        return math.fsum(
            p * math.fsum((a - b) ** 2 for a, b in zip(row, mid, strict=True))
            for row, mid, (*_, p) in zip(x, around, terms, strict=True)
        )

    without, independent = 0.0, 0.0
    for t in range(T):
        x = [g[t] for _, _, g, _, _ in terms]
        state = [int(b.state[i, t]) for b, i, *_ in terms]
        action = [int(b.action[i, t]) for b, i, *_ in terms]
        both, alone_state, mean = (given(x, k) for k in (list(zip(state, action, strict=True)), state, [0] * len(x)))
        assert found[t]["rollout"] == close(spread(x, both))
        assert found[t]["action"] == close(spread(both, alone_state))
        assert found[t]["state"] == close(spread(alone_state, mean))
        assert found[t]["variance"] == close(spread(x, mean))
        without += spread(x, mean)
        square_of_score = 0.0
        for b, i, _, _, p in terms:
            if b.mask[i, t]:
                pi = policy[int(b.context[i, t])]
                a = int(b.action[i, t])
                square_of_score += p * math.fsum(((j == a) - q) ** 2 for j, q in enumerate(pi))
        square = math.fsum(p * c[t] ** 2 for *_, c, p in terms)
        independent += square_of_score * square - math.fsum(m**2 for m in mean[0])
    whole = [[math.fsum(step[z] for step in g) for z in range(cells)] for _, _, g, _, _ in terms]
    approximate = v.approximations(e, problem)
    assert approximate is not None
    assert approximate["none"] == close(spread(whole, given(whole, [0] * len(whole))))
    assert approximate["no cross terms"] == close(without)
    assert approximate["independent"] == close(independent)


def test_sources_are_those_of_the_quantity() -> None:
    """Where rows are independent, `variance_share` says the same of one rollout."""
    problem = find_problem("mdp/two-state-0.9")
    found = v.sources(as_estimator("baselined(value)"), problem)
    assert found is not None
    whole = sum(r["variance"] for r in found)
    for part in ("rollout", "action", "state"):
        share = find_quantity("variance_share")(estimator=as_estimator("baselined(value)"), problem=problem, part=part)
        assert sum(r[part] for r in found) / whole == close(share.value)


# -- cost


def test_cost_of_continuations() -> None:
    """B rows, and K continuations for each position at which the policy acts: by hand from the chances of the rollouts."""
    problem = dialogue(groups=2, group_size=(1, 2), behavior_logits=OFF)
    paths = problem.trajectories.paths
    q = paths.start_probability.tolist()
    acting = [sum(row) for row in paths.mask.tolist()]
    each = math.fsum(
        q[s] * p * n for s, p, n in zip(paths.start.tolist(), rollout_chances(problem), acting, strict=True)
    )
    assert v.cost(as_estimator("reinforce"), problem) == 3
    assert v.cost(as_estimator("baselined(value)"), problem) == 3  # computed, not rolled out
    for K in (1, 2):
        assert v.cost(as_estimator(f"vineppo(K={K})"), problem) == close(3 + 3 * K * each)
    assert v.cost(as_estimator("remax"), problem) == 5  # one greedy rollout for each of two prompts


# -- against a reference


def line(name: str, bias: float, variance: float, **more: Any) -> dict[str, Any]:
    """A row of `pgcheck.compare` with ‖∇J‖ = 1 and a bias along it."""
    row = {
        "estimator": name, "problem": "p", "finding": "biased" if bias else "unbiased", "scale": 1.0 - bias, "bias": bias,
        "variance": variance, "cost": 2.0, "snr": (1.0 - bias) / math.sqrt(variance),
    }  # fmt: skip
    row |= {f"variance_{end}": variance for end in ("low", "high")} | more
    return row


def test_relative_by_hand() -> None:
    """V = 4 and 1, bias 0 and 1/2, cost 2 and 6."""
    table = v.relative(pd.DataFrame([line("a", 0.0, 4.0), line("b", 0.5, 1.0, cost=6.0)]))
    a, b = table.to_dict("records")
    assert (a["ratio"], a["batches_to_match"], a["rollouts_to_match"], a["better"]) == (1.0, 1.0, 1.0, "same")
    assert b["ratio"] == b["ratio_low"] == b["ratio_high"] == 0.25
    assert b["batches_to_match"] == 1.0  # half the signal, half the deviation
    assert b["rollouts_to_match"] == 3.0
    assert (b["better"], b["break_even"]) == ("below", 12.0)  # (4 − 1)/(1/4)
    assert (b["better_per_rollout"], b["break_even_rollouts"]) == ("below", 8.0)  # (8 − 6)/(1/4)
    swapped = v.relative(table[["estimator", "problem", "finding", "scale", "bias", "variance", "cost", "snr",
                                "variance_low", "variance_high"]], to="b")  # fmt: skip
    assert list(swapped["relative_to"]) == ["b", "b"]
    assert swapped["better"][0] == "above"
    assert swapped["break_even"][0] == 12.0


def test_relative_of_sampled_rows() -> None:
    """Ends of the ratio from the ends of the variances; those that were filled in stay."""
    rows = [
        line("a", 0.0, 4.0, variance_low=2.0, variance_high=5.0),
        line("b", 0.0, 1.0, variance_low=0.5, variance_high=2.0),
    ]
    a, b = v.relative(pd.DataFrame(rows)).to_dict("records")
    assert (b["ratio_low"], b["ratio"], b["ratio_high"]) == (0.1, 0.25, 1.0)
    assert (a["ratio_low"], a["ratio"], a["ratio_high"]) == (1.0, 1.0, 1.0)
    halved = [row | {"scale_low": 0.5, "scale_high": 2.0} for row in rows]
    b = v.relative(pd.DataFrame(halved)).iloc[1]
    assert (b["batches_to_match_low"], b["batches_to_match"], b["batches_to_match_high"]) == (0.1 / 16, 0.25, 16.0)
    paired = [
        row | dict(zip(("ratio_low", "ratio", "ratio_high"), ends, strict=True))
        for row, ends in zip(rows, ((1, 1, 1), (0.2, 0.24, 0.3)), strict=True)
    ]
    b = v.relative(pd.DataFrame(paired)).iloc[1]
    assert (b["ratio_low"], b["ratio"], b["ratio_high"]) == (0.2, 0.24, 0.3)
    assert (b["batches_to_match_low"], b["batches_to_match"], b["batches_to_match_high"]) == (0.2, 0.24, 0.3)


def test_crossings_of_sampled_rows() -> None:
    """‖b‖² = 0 and 1/4 [.16, .36]: with V − V' = 3 [2, 4] N* is 12, between 2/.36 and 4/.16; from ends of V it is wider."""
    rows = [
        line("a", 0.0, 4.0, variance_low=3.0, variance_high=5.0),
        line("b", 0.5, 1.0, variance_low=0.5, variance_high=1.5, bias_low=0.4, bias_high=0.6, cost=4.0),
    ]
    b = v.relative(pd.DataFrame(rows)).iloc[1]
    assert b["break_even"] == 12.0
    assert (b["break_even_low"], b["break_even_high"]) == pytest.approx((1.5 / 0.36, 4.5 / 0.16))
    assert (b["break_even_rollouts_low"], b["break_even_rollouts_high"]) == pytest.approx((0.0, 8.0 / 0.16))
    gaps = {"gap_low": -4.0, "gap": -3.0, "gap_high": -2.0}
    table = v.relative(pd.DataFrame([rows[0], rows[1] | gaps]))
    assert not {"gap", "gap_low", "gap_of_rollouts"} & set(table)
    b = table.iloc[1]
    assert (b["better"], b["break_even"]) == ("below", 12.0)
    assert (b["break_even_low"], b["break_even_high"]) == pytest.approx((2 / 0.36, 4 / 0.16))


@given(st.tuples(*[st.integers(-6, 6)] * 2), *[st.tuples(*[st.integers(0, 6)] * 2)] * 2)
def test_ends_of_a_crossing_hold_every_crossing(gap, squares, other) -> None:
    """All N* > 0 of numbers on a grid within the ends, in fractions; finite ends are reached."""
    gap, squares, other = (tuple(sorted(x)) for x in (gap, squares, other))
    low, high = v.break_even_ends(gap, squares, other)
    grid = [[Fraction(a * (8 - i) + b * i, 8) for i in range(0, 9, 2)] for a, b in (gap, squares, other)]
    found = [dv / (c - b) for dv in grid[0] for b in grid[1] for c in grid[2] if c != b and dv / (c - b) > 0]
    assert all(low * (1 - 1e-12) <= x <= high * (1 + 1e-12) for x in found)
    if not found:
        assert math.isnan(low)
        return
    if high < math.inf:
        assert max(found) == pytest.approx(high)
    if low > 0:
        assert min(found) == pytest.approx(low)


def test_relative_at_the_edges() -> None:
    """No variance at all, no direction, a step the wrong way, an unknown reference."""
    rows = [
        line("a", 0.0, 1.0),
        line("still", 0.0, 1e-17),
        line("away", 1.5, 1.0),
        line("flat", 0.0, 1.0, scale=math.nan),
    ]
    table = v.relative(pd.DataFrame(rows)).set_index("estimator")
    assert table["ratio"]["still"] == table["batches_to_match"]["still"] == 0.0
    assert table["batches_to_match"]["away"] == math.inf
    assert math.isnan(table["batches_to_match"]["flat"])
    assert table["better"]["still"] == "always"
    assert v.relative(pd.DataFrame(rows), to="still")["ratio"][0] == math.inf
    with pytest.raises(UnknownNameError, match="Did you mean 'still'"):
        v.relative(pd.DataFrame(rows), to="stil")
    assert v.relative(pd.DataFrame()).empty


@given(st.tuples(*[st.integers(0, 6)] * 4))
def test_break_even_is_where_the_errors_cross(numbers: tuple[int, int, int, int]) -> None:
    """Against b² + V/N in fractions, at N from 1/50 to 50."""
    one, other = (numbers[0], numbers[1]), (numbers[2], numbers[3])
    better, even = v.break_even((float(one[0]), float(one[1])), (float(other[0]), float(other[1])))
    at = None if math.isnan(even) else Fraction(even).limit_denominator(10**6)
    assert (at is not None) == (better in ("below", "above"))
    for N in (Fraction(n, d) for n in range(1, 51) for d in (1, 50)):
        ours, theirs = (b + V / N for b, V in (one, other))
        if at is not None:
            assert (ours < theirs) == (at > N if better == "below" else at < N)
        else:
            assert {"same": ours == theirs, "always": ours <= theirs, "never": ours >= theirs}[better]


def test_break_even_of_estimators_in_fractions() -> None:
    """Own-sample mean and leave-one-out on three arms, B = 2: V' = (B/(B−1))² V = 4V and ‖b‖ = ‖∇J‖/2, so N* = 3V/(‖∇J‖²/4)."""
    problem = bandit([0.0, 1.0, 3.0], [0.0, math.log(2.0), math.log(3.0)], groups=1, group_size=2)
    pi, r = [Fraction(k, 6) for k in (1, 2, 3)], [Fraction(x) for x in (0, 1, 3)]
    value = sum(p * x for p, x in zip(pi, r, strict=True))
    g = [p * (x - value) for p, x in zip(pi, r, strict=True)]
    square = Fraction(0)  # E‖ĝ‖² of ½ Σ_i (R_i − mean) (e_i − π) = ¼ (R_i − R_j)(e_i − e_j)
    for i, j in itertools.product(range(3), repeat=2):
        square += pi[i] * pi[j] * ((r[i] - r[j]) / 4) ** 2 * (2 if i != j else 0)
    norm = sum(x * x for x in g)
    V = square - norm / 4
    rows = []
    for e in map(as_estimator, ("leave_one_out", "batch_mean")):
        (m,) = exact_moments([e], problem)
        rows.append(v.row_of(e, problem, measure(e, problem, m)))
    table = v.relative(pd.DataFrame(rows))
    assert table["variance"][1] == close(float(V))
    assert table["ratio"][1] == close(0.25)
    assert table["batches_to_match"][1] == close(1.0)  # a factor is no noise
    assert table["better"][1] == "below"
    assert table["break_even"][1] == close(float(3 * V / (norm / 4)))
    assert table["break_even_rollouts"][1] == close(float(2 * 3 * V / (norm / 4)))
    at = v.mse_curves(table, [float(table["break_even_rollouts"][1]), 10.0])
    even = at[at["rollouts"] != 10.0]["mse"].tolist()
    assert even[0] == close(even[1])
    later = at[at["rollouts"] == 10.0]
    assert later["mse"].tolist() == [close(float(4 * V / 5)), close(float(V / 5 + norm / 4))]
    assert later["mse_low"].tolist() == later["mse"].tolist() == later["mse_high"].tolist()


@given(st.integers(0, 10**6), st.booleans())
def test_ends_hold_wherever_their_inputs_do(seed: int, in_pairs: bool) -> None:
    """Bonferroni's premise: while V, ‖b‖, scales (in pairs V/V', V − V') are within their ends, so is what is made of them."""
    rng = np.random.default_rng(seed)
    V, b, κ, c = rng.exponential(size=2), rng.exponential(size=2), rng.uniform(0.2, 2, 2), rng.integers(1, 9, 2)

    def around(x: float) -> dict[str, float]:
        below, above = rng.exponential(0.3, 2)
        return {"_low": x - below * abs(x), "": x * rng.uniform(0.9, 1.1), "_high": x + above * abs(x)}

    rows = []
    for i in (0, 1):
        row: dict[str, Any] = {"estimator": "ab"[i], "problem": "p", "finding": "biased", "cost": float(c[i])}
        for name, x in (("variance", V[i]), ("bias", b[i]), ("scale", κ[i])):
            row |= {f"{name}{end}": max(y, 0.0) for end, y in around(x).items()}
        if in_pairs and i == 1:
            for name, x in (
                ("ratio", V[1] / V[0]),
                ("gap", V[1] - V[0]),
                ("gap_of_rollouts", V[1] * c[1] - V[0] * c[0]),
            ):
                row |= {f"{name}{end}": y for end, y in around(x).items()}
        rows.append(row)
    got = v.relative(pd.DataFrame(rows)).iloc[1]
    matched = V[1] / κ[1] ** 2 / (V[0] / κ[0] ** 2)
    truth = {"ratio": V[1] / V[0], "batches_to_match": matched, "rollouts_to_match": matched * c[1] / c[0]}
    truth["break_even"] = (V[1] - V[0]) / (b[0] ** 2 - b[1] ** 2)
    truth["break_even_rollouts"] = (V[1] * c[1] - V[0] * c[0]) / (b[0] ** 2 - b[1] ** 2)
    for name, x in truth.items():
        if x > 0:
            assert got[f"{name}_low"] <= x * (1 + 1e-9)
            assert got[f"{name}_high"] >= x * (1 - 1e-9)
