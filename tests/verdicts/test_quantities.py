"""Every quantity against a closed form, or against sums over ordered tuples of rollouts in plain Python."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pgcheck.envs.tabular import TabularMDP
from pgcheck.errors import UnknownNameError, UsageError
from pgcheck.estimators.base import Estimator
from pgcheck.estimators.lookup import as_estimator
from pgcheck.notes_problems import coin
from pgcheck.policies import LinearPolicy
from pgcheck.problem import Problem
from pgcheck.registry import find_problem
from pgcheck.verdicts import quantities as q
from pgcheck.verdicts.quantities import find_quantity, registered_quantities
from tests.engines.oracle import bandit, brute_force, dialogue, every_batch, gradient_of, rollout_chances, softmax, walk

TIGHT = 1e-12
COVERED: set[str] = set()


def about(*names: str) -> Callable[[Any], Any]:
    """Marks a test as the oracle of these quantities."""
    COVERED.update(names)
    return lambda test: test


def value(name: str, **arguments: Any) -> float:
    """The number, estimators given by name."""
    resolved = {k: as_estimator(x) if k in ("estimator", "against") else x for k, x in arguments.items()}
    return find_quantity(name)(**resolved).value


def close(x: float) -> Any:
    return pytest.approx(x, rel=TIGHT, abs=TIGHT)


def brute(estimator: str | Estimator, problem: Problem) -> tuple[list[float], float]:
    """E ĝ and tr Cov ĝ over ordered batches."""
    e = as_estimator(estimator)
    table = problem.trajectories_with(e.needs)
    assert len(table) == len(problem.trajectories)
    mean, cov, _ = brute_force(e, every_batch(table, problem.sizes, rollout_chances(problem)), problem.logits)
    return mean.flatten().tolist(), float(cov.diagonal().sum())


def by_differences(problem: Problem) -> list[float]:
    """∇J by central differences of J, which share nothing with scores."""
    g: list[float] = problem.gradient("central_differences").flatten().tolist()
    return g


def dot(x: Sequence[float], y: Sequence[float]) -> float:
    return math.fsum(a * b for a, b in zip(x, y, strict=True))


def norm(x: Sequence[float]) -> float:
    return math.sqrt(dot(x, x))


def less(x: Sequence[float], y: Sequence[float]) -> list[float]:
    return [a - b for a, b in zip(x, y, strict=True)]


PAIRS = [
    ("grpo", dialogue(groups=1, group_size=2)),
    ("batch_mean", dialogue(groups=2, group_size=1)),
    ("reward_to_go_undiscounted_weight", walk(groups=1, group_size=2)),
    ("cispo", dialogue(groups=1, group_size=2, behavior_logits=[[0.5, 0.1], [0.0, 0.0], [-0.4, 0.2]])),
]
each_pair = pytest.mark.parametrize(("estimator", "problem"), PAIRS, ids=[name for name, _ in PAIRS])


@about("rel", "scale", "cosine", "off_axis", "bias", "component")
@each_pair
def test_direction(estimator: str, problem: Problem) -> None:
    """∇J by central differences is good to about 1e-11."""
    m, variance = brute(estimator, problem)
    g = by_differences(problem)
    along = dot(m, g) / dot(g, g)
    expected = {
        "rel": norm(less(m, g)) / norm(g),
        "scale": along,
        "cosine": dot(m, g) / norm(m) / norm(g),
        "off_axis": norm(less(m, [along * x for x in g])) / norm(m),
        "bias": norm(less(m, g)) / max(norm(g), math.sqrt(variance + dot(m, m))),
    }
    for name, x in expected.items():
        assert value(name, estimator=estimator, problem=problem) == pytest.approx(x, rel=1e-9, abs=1e-9), name
    A = problem.trajectories.actions
    for i, x in enumerate(m):
        assert value("component", estimator=estimator, problem=problem, context=i // A, action=i % A) == close(x)


@about("difference", "scale_against")
def test_of_two_means() -> None:
    problem = dialogue(groups=1, group_size=2)
    a, b = brute("grpo", problem)[0], brute("leave_one_out", problem)[0]
    arguments = {"estimator": "grpo", "against": "leave_one_out", "problem": problem}
    assert value("difference", **arguments) == close(norm(less(a, b)) / norm(b))
    assert value("scale_against", **arguments) == close(dot(a, b) / dot(b, b))


@about("scale_ratio")
@pytest.mark.parametrize("size", [2, 3, 5, 8])
def test_weights_of_difficulty(size: int) -> None:
    """E ĝ = w(p) ∇p, w = Σ_k C(G,k) p^k (1−p)^(G−k) √(k/G (1−k/G)) / (p(1−p))."""

    def weight(p: float) -> float:
        law = [math.comb(size, k) * p**k * (1 - p) ** (size - k) for k in range(size + 1)]
        return math.fsum(c * math.sqrt(k * (size - k)) / size for k, c in enumerate(law)) / (p * (1 - p))

    hard, easy = (coin(p).with_sampling(groups=1, group_size=size) for p in (0.05, 0.6))
    e = "pgcheck.estimators.variants:grpo_eps_0"
    assert value("scale", estimator=e, problem=hard) == pytest.approx(weight(0.05), rel=1e-10)
    assert value("scale_ratio", estimator=e, problem=hard, other=easy) == pytest.approx(
        weight(0.05) / weight(0.6), rel=1e-10
    )


@about("batchwise_gap")
def test_gap_over_every_batch() -> None:
    """max ‖ĝ − f ĝ'‖ / max ‖ĝ'‖ over ordered batches."""
    problem = dialogue(groups=1, group_size=2)
    policy = [softmax(row) for row in problem.logits.tolist()]

    def drawn(name: str, batch: Any) -> list[float]:
        steps = gradient_of(as_estimator(name).coefficients(batch), batch, policy)
        return [math.fsum(step[x] for step in steps) for x in range(6)]

    batches = [b for b, _ in every_batch(problem.trajectories, problem.sizes, rollout_chances(problem))]
    ours, theirs = ([drawn(name, b) for b in batches] for name in ("grpo", "leave_one_out"))
    worst = max(norm(less(x, [0.7 * a for a in y])) for x, y in zip(ours, theirs, strict=True))
    found = value("batchwise_gap", estimator="grpo", against="leave_one_out", problem=problem, factor=0.7)
    assert found == close(worst / max(map(norm, theirs)))


@about("bias_exponent")
def test_exponent() -> None:
    """From the errors of direction by brute force at 2 and 4 rows."""
    problem = bandit([0.0, 1.0, 3.0], [0.3, -0.2, 0.1])
    errors = []
    for rows in (2, 4):
        one = problem.with_sampling(groups=1, group_size=rows)
        m, g = brute("reinforce_pp", one)[0], by_differences(one)
        along = dot(m, g) / dot(g, g)
        errors.append(norm(less(m, [along * x for x in g])) / norm(m))
    expected = math.log(errors[0] / errors[1]) / math.log(2)
    found = value("bias_exponent", estimator="reinforce_pp", problem=problem, rows=2, more_rows=4)
    assert found == pytest.approx(expected, rel=1e-9)


@about("off_axis_of_fixed_prompts")
def test_prompts_with_group_sizes_of_their_own() -> None:
    """Two prompts of separate contexts: Σ_s G_s (G_s−1)/G_s ∇J_s against Σ_s G_s ∇J_s, ∇J_s[a] = π_a (r_a − V)."""
    problem = find_problem("notes/two-prompts")
    sizes = [2, 6]
    parts = []
    for row in problem.logits.tolist():
        p = softmax(row)
        parts.append([p[0] * (1 - p[0]), -p[1] * p[0]])
    truth = [G * x for G, part in zip(sizes, parts, strict=True) for x in part]
    found = [(G - 1) * x for G, part in zip(sizes, parts, strict=True) for x in part]
    along = dot(found, truth) / dot(truth, truth)
    expected = norm(less(found, [along * x for x in truth])) / norm(found)
    arguments = {"problem": problem, "sizes": sizes}
    assert value("off_axis_of_fixed_prompts", estimator="batch_mean(group)", **arguments) == close(expected)
    with pytest.raises(UsageError, match="a group size for each of its starts"):
        value("off_axis_of_fixed_prompts", estimator="leave_one_out", problem=problem, sizes=[2])


@about("scale_of_mixed_groups")
@pytest.mark.parametrize(("p", "size"), [(0.3, 2), (0.3, 5), (0.02, 4)])
def test_filter_of_unanimous_groups(p: float, size: int) -> None:
    problem = coin(p).with_sampling(groups=1, group_size=size)
    expected = (size - 1) / size / (1 - p**size - (1 - p) ** size)
    assert value("scale_of_mixed_groups", estimator="batch_mean(group)", problem=problem) == pytest.approx(
        expected, rel=1e-10
    )


# -- fields


@about("asymmetry")
def test_jacobian_without_the_discount() -> None:
    """a₁ at step 0 leads to a second step that pays 1 for a₁; everything else ends and pays nothing.

    With p = σ(x), s = σ(y) of the two logit differences, J_γ = γ p s. Without γ^t, F_x = γ p(1−p) s but
    F_y = p s(1−s): ∂F_x/∂y = γ p(1−p) s(1−s) and ∂F_y/∂x = p(1−p) s(1−s) differ by the factor γ.
    """
    transition = [[[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]], [[0.0, 0.0, 1.0]] * 2, [[0.0, 0.0, 1.0]] * 2]
    gamma, x, y = 0.5, 0.3, -0.4
    env = TabularMDP(
        transition, [[0.0, 0.0], [1.0, 0.0], [0.0, 0.0]], [1, 0, 0], horizon=2, discount=gamma, terminal=[2]
    )
    problem = Problem(env, [[x, 0.0], [y, 0.0], [0.0, 0.0]], groups=1, group_size=1)
    p, s = 1 / (1 + math.exp(-x)), 1 / (1 + math.exp(-y))
    dp, ds = p * (1 - p), s * (1 - s)
    # each coordinate of [K, A] is ± the logit difference: every entry of the 2×2 Jacobian appears four times, ±
    xx, yy = gamma * dp * (1 - 2 * p) * s, p * ds * (1 - 2 * s)
    xy, yx = gamma * dp * ds, dp * ds
    expected = math.sqrt(2 * (xy - yx) ** 2) / math.sqrt((2 * xx) ** 2 + (2 * yy) ** 2 + 2 * (xy + yx) ** 2)
    found = value("asymmetry", estimator="reward_to_go_undiscounted_weight", problem=problem)
    assert found == pytest.approx(expected, rel=1e-9)
    assert value("asymmetry", estimator="reward_to_go", problem=problem) == pytest.approx(0.0, abs=1e-11)


STALE = [[0.5, 0.1], [0.0, 0.0], [-0.4, 0.2]]


@about("surrogate_gap")
@pytest.mark.parametrize(
    ("estimator", "surrogate", "high"),
    [("token_is", "ratio", 0.2), ("cispo", "capped", 0.1), ("grpo", "clip", 0.2), ("cispo", "clip", 0.1)],
)
def test_surrogates_by_differences(estimator: str, surrogate: str, high: float) -> None:
    """∇S by central differences of S, a sum over ordered batches in plain Python."""
    problem = dialogue(groups=1, group_size=2, behavior_logits=STALE)
    e = as_estimator(estimator)
    batches = every_batch(problem.trajectories, problem.sizes, rollout_chances(problem))
    old = [softmax(row) for row in STALE]
    parts = []
    for batch, p in batches:
        weight = (e.coefficients.advantage(batch) * e.coefficients.aggregation(batch)).expand(batch.mask.shape)  # type: ignore[attr-defined]
        for i, t in (batch.mask > 0).nonzero().tolist():
            parts.append((p, int(batch.context[i, t]), int(batch.action[i, t]), float(weight[i, t])))

    def h(r: float, A: float) -> float:
        c = 1 + high
        if surrogate == "ratio":
            return r * A
        if surrogate == "capped":
            return (r if r <= c else c * (1 + math.log(r / c))) * A
        return min(r * A, min(max(r, 0.8), c) * A)

    def surrogate_at(z: list[list[float]]) -> float:
        pi = [softmax(row) for row in z]
        return math.fsum(p * h(pi[k][a] / old[k][a], A) for p, k, a, A in parts)

    gradient = []
    for k, a in itertools.product(range(3), range(2)):
        ends = []
        for step in (1e-4, -1e-4):
            z = problem.logits.tolist()
            z[k][a] += step
            ends.append(surrogate_at(z))
        gradient.append((ends[0] - ends[1]) / 2e-4)
    m = brute(e, problem)[0]
    expected = norm(less(m, gradient)) / norm(gradient)
    found = value("surrogate_gap", estimator=e, problem=problem, surrogate=surrogate, high=high)
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-7)
    if (estimator, surrogate) != ("cispo", "clip"):
        assert found < 1e-14
    else:
        assert found > 0.1


def test_surrogates_need_a_composition() -> None:
    with pytest.raises(UsageError, match="cannot be told apart"):
        value(
            "surrogate_gap",
            estimator="pgcheck.estimators.variants:pairwise_differences",
            problem=dialogue(groups=1, group_size=2),
            surrogate="ratio",
        )


# -- variance


@about("total_variance", "variance_ratio", "mse_ratio", "break_even")
def test_variances() -> None:
    problem = dialogue(groups=1, group_size=2)
    g = by_differences(problem)
    (m, u), (n, v) = brute("batch_mean", problem), brute("leave_one_out", problem)
    b, c = norm(less(m, g)) ** 2, norm(less(n, g)) ** 2
    arguments = {"estimator": "batch_mean", "against": "leave_one_out", "problem": problem}
    assert value("total_variance", estimator="batch_mean", problem=problem) == close(u)
    assert value("variance_ratio", **arguments) == close(u / v)
    assert value("mse_ratio", **arguments, batches=3) == pytest.approx((b + u / 3) / (c + v / 3), rel=1e-9)
    even = value("break_even", **arguments)
    assert even == pytest.approx((v - u) / (b - c), rel=1e-9)
    assert b + u / even == pytest.approx(c + v / even, rel=1e-9)


def rollouts(problem: Problem, estimator: str) -> list[tuple[float, list[list[float]], list[float], list[list[float]]]]:
    """(chance, x_t, c_t, score_t) of every rollout, in plain Python."""
    policy = [softmax(row) for row in problem.logits.tolist()]
    q_start = problem.trajectories.paths.start_probability.tolist()
    out = []
    for n, chance in enumerate(rollout_chances(problem)):
        batch = problem.trajectories.batch(torch.tensor([n]), torch.tensor([0]))
        c = as_estimator(estimator).coefficients(batch)
        x, s = gradient_of(c, batch, policy), gradient_of(torch.ones_like(c), batch, policy)
        start = int(problem.trajectories.paths.start[n])
        out.append((chance * q_start[start], x, (c * batch.mask)[0].tolist(), s))
    return out


def total(law: list[tuple[float, list[float]]]) -> float:
    """tr Cov of vectors with chances that sum to one."""
    mean = [math.fsum(p * x[i] for p, x in law) for i in range(len(law[0][1]))]
    return math.fsum(p * norm(less(x, mean)) ** 2 for p, x in law)


@about("approximate_variance", "rank_agreement")
@pytest.mark.parametrize("problem", [dialogue(groups=1, group_size=1), walk(groups=1, group_size=1)])
def test_the_notes_approximations(problem: Problem) -> None:
    found: dict[str, dict[str, float]] = {}
    for name in ("reinforce", "baselined(value)"):
        rows = rollouts(problem, name)
        T = len(rows[0][1])
        exact = total([(p, [math.fsum(step[i] for step in x) for i in range(len(x[0]))]) for p, x, _, _ in rows])
        alone = math.fsum(total([(p, x[t]) for p, x, _, _ in rows]) for t in range(T))
        split = 0.0
        for t in range(T):
            mean = [math.fsum(p * x[t][i] for p, x, _, _ in rows) for i in range(len(rows[0][1][t]))]
            score = math.fsum(p * dot(s[t], s[t]) for p, _, _, s in rows)
            split += score * math.fsum(p * c[t] ** 2 for p, _, c, _ in rows) - dot(mean, mean)
        found[name] = {"none": exact, "no cross terms": alone, "independent": split}
        for approximation, expected in found[name].items():
            ratio = value("approximate_variance", estimator=name, problem=problem, approximation=approximation)
            assert ratio == close(expected / exact)
    a, b = found["reinforce"], found["baselined(value)"]
    for approximation in ("no cross terms", "independent"):
        agreement = value(
            "rank_agreement",
            estimator="reinforce",
            against="baselined(value)",
            problem=problem,
            approximation=approximation,
        )
        alike = (a["none"] > b["none"]) == (a[approximation] > b[approximation])
        assert (agreement > 0) == alike
        u, v = a[approximation], b[approximation]
        assert agreement == close((a["none"] - b["none"]) / max(a["none"], b["none"]) * (u - v) / max(u, v))
    with pytest.raises(UsageError, match="approximation"):
        value("approximate_variance", estimator="reinforce", problem=problem, approximation="luck")


@about("optimal_constant_identity")
def test_parabola() -> None:
    """1 for every b, and the pieces by hand for two arms: π = (p, 1−p), r = (1, 0), S = ±(1−p), ∓p in both logits."""
    for b in (-2.0, 0.3, 5.0):
        assert value("optimal_constant_identity", problem=dialogue(), baseline=b) == pytest.approx(1.0, rel=1e-10)
        assert value("optimal_constant_identity", problem=coin(0.9), baseline=b) == pytest.approx(1.0, rel=1e-10)


@about("variance_share", "variance_part_change")
def test_parts_of_the_variance() -> None:
    """By grouping rollouts in dictionaries."""
    problem = walk(groups=1, group_size=1)
    state, action = (x.tolist() for x in (problem.trajectories.paths.state, problem.trajectories.paths.action))
    parts: dict[str, dict[str, float]] = {}
    for name in ("reward_to_go", "baselined(value)"):
        rows = rollouts(problem, name)
        out = dict.fromkeys(("rollout", "action", "state"), 0.0)
        for t in range(2):

            def means(keys: list[Any], t: int = t, rows: Any = rows) -> dict[Any, list[float]]:
                mass: dict[Any, float] = defaultdict(float)
                sums: dict[Any, list[float]] = defaultdict(lambda: [0.0] * 4)
                for key, (p, x, _, _) in zip(keys, rows, strict=True):
                    mass[key] += p
                    sums[key] = [a + p * b for a, b in zip(sums[key], x[t], strict=True)]
                return {key: [a / mass[key] for a in x] for key, x in sums.items()}

            s, sa = [row[t] for row in state], [(row[t], a[t]) for row, a in zip(state, action, strict=True)]
            by_s, by_sa, all_ = means(s), means(sa), means([0] * len(rows))[0]
            for n, (p, x, _, _) in enumerate(rows):
                out["rollout"] += p * norm(less(x[t], by_sa[sa[n]])) ** 2
                out["action"] += p * norm(less(by_sa[sa[n]], by_s[s[n]])) ** 2
                out["state"] += p * norm(less(by_s[s[n]], all_)) ** 2
        parts[name] = out
        whole = math.fsum(total([(p, x[t]) for p, x, _, _ in rows]) for t in range(2))
        assert math.fsum(out.values()) == close(whole)
        for part, x in out.items():
            assert value("variance_share", estimator=name, problem=problem, part=part) == close(x / whole)
        assert value("variance_share", estimator=name, problem=problem, part="all") == close(1.0)
    whole = math.fsum(parts["reward_to_go"].values())
    for part in ("rollout", "action", "state"):
        expected = (parts["baselined(value)"][part] - parts["reward_to_go"][part]) / whole
        arguments = {"estimator": "baselined(value)", "against": "reward_to_go", "problem": problem}
        assert value("variance_part_change", **arguments, part=part) == close(expected)
    with pytest.raises(UsageError, match="part"):
        value("variance_share", estimator="reward_to_go", problem=problem, part="luck")


def test_coupled_rows_have_no_single_rollouts() -> None:
    with pytest.raises(UsageError, match="rows are coupled"):
        value("variance_share", estimator="leave_one_out", problem=dialogue(), part="all")


# -- scores and weights


@about("mean_score")
def test_mean_of_the_score() -> None:
    """π_old − π at the worst context: the mean of 1[a] − π under π_old."""
    problem = dialogue(groups=1, group_size=2, behavior_logits=STALE)
    expected = max(
        norm(less(softmax(old), softmax(new))) for old, new in zip(STALE, problem.logits.tolist(), strict=True)
    )
    assert value("mean_score", problem=problem) == close(expected)
    assert value("mean_score", problem=dialogue()) == close(0.0)


@about("dynamics_gap")
def test_the_dynamics_gap_sees_a_wrong_score(monkeypatch: pytest.MonkeyPatch) -> None:
    """0 for true scores; with every score doubled, the largest norm of Σ_t ∇log π, by hand."""
    problem = walk()
    assert value("dynamics_gap", problem=problem) == pytest.approx(0.0, abs=1e-11)
    true = q.score
    monkeypatch.setattr(q, "score", lambda table: 2 * true(table))
    largest = max(
        norm([math.fsum(step[i] for step in s) for i in range(4)]) for _, _, _, s in rollouts(problem, "reinforce")
    )
    assert value("dynamics_gap", problem=problem) == pytest.approx(largest, rel=1e-9)


@about("mean_weight", "second_moment_of_weight", "chi_square_product", "chi_square_recursion")
@pytest.mark.parametrize("old", [STALE, [[0.5, -math.inf], [0.0, 0.0], [-0.4, 0.2]]], ids=["stale", "truncated"])
def test_weights(old: list[list[float]]) -> None:
    """Sums over rollouts in plain Python."""
    problem = dialogue(groups=1, group_size=2, behavior_logits=old)
    paths = problem.trajectories.paths
    pi, mu = ([softmax(row) for row in z] for z in (problem.logits.tolist(), old))
    moments = [0.0, 0.0]
    steps = [0.0] * paths.steps
    for n, given in enumerate(rollout_chances(problem)):
        p = given * paths.start_probability.tolist()[int(paths.start[n])]
        if p == 0:
            continue
        r = [
            pi[k][a] / mu[k][a] if m else 1.0
            for k, a, m in zip(*(x[n].tolist() for x in (paths.context, paths.action, paths.mask)), strict=True)
        ]
        moments = [moments[0] + p * math.prod(r), moments[1] + p * math.prod(r) ** 2]
        steps = [s + p * x**2 for s, x in zip(steps, r, strict=True)]
    assert value("mean_weight", problem=problem) == close(moments[0])
    assert value("second_moment_of_weight", problem=problem) == close(moments[1])
    assert value("chi_square_product", problem=problem) == close(math.prod(steps) / moments[1])
    assert value("chi_square_recursion", problem=problem) == close(1.0)
    # the recursion in brackets, prompt by prompt: Σ_a π²/μ · (1, or the second turn's Σ_a π²/μ after an observation)
    second = math.fsum(x * x / y for x, y in zip(pi[2], mu[2], strict=True))
    by_hand = math.fsum(
        q0 * math.fsum(pi[k][a] ** 2 / mu[k][a] * (second if a else 1.0) for a in range(2) if mu[k][a])
        for k, q0 in ((0, 0.4), (1, 0.6))
    )
    assert moments[1] == close(by_hand)


@about("truncation_bound")
def test_truncation_by_hand() -> None:
    """Three arms: bias Σ π (1 − c/w)₊ r ∇log π; the bound takes the largest |r| ‖∇log π‖ out of the sum."""
    rewards, new, old, cap = [1.0, 0.0, -2.0], [0.9, -0.2, 0.1], [-0.5, 0.4, 0.2], 2.0
    problem = bandit(rewards, new, behavior_logits=[old], groups=1, group_size=1)
    pi, mu = softmax(new), softmax(old)
    score = [[(a == b) - pi[b] for b in range(3)] for a in range(3)]
    lost = [max(0.0, 1 - cap * mu[a] / pi[a]) for a in range(3)]
    assert any(lost)
    bias = norm([math.fsum(pi[a] * lost[a] * rewards[a] * score[a][b] for a in range(3)) for b in range(3)])
    largest = max(abs(rewards[a]) * norm(score[a]) for a in range(3))
    bound = largest * math.fsum(pi[a] * lost[a] for a in range(3))
    found = value("truncation_bound", estimator="tis", problem=problem, cap=cap)
    assert found == pytest.approx(bias / bound, rel=1e-10)


# -- the registry


@about("parameter_bias", "directional_gap")
def test_in_parameters() -> None:
    """Of a linear policy z = x·w: ∇_w J = xᵀ ∇_z J with ∇_z J by differences, E ĝ over ordered batches."""
    x = torch.tensor([[1.0, 0.5], [-0.3, 2.0]], dtype=torch.float64)
    policy = LinearPolicy(x, [[0.3, -0.2], [0.1, 0.4]])
    problem = replace(walk(groups=1, group_size=2), policy=policy)
    g = x.T @ torch.tensor(by_differences(problem), dtype=torch.float64).reshape(2, 2)
    for name in ("leave_one_out", "batch_mean", "grpo"):
        m = x.T @ torch.tensor(brute(name, problem)[0], dtype=torch.float64).reshape(2, 2)
        expected = float((m - g).norm() / g.norm())
        assert value("parameter_bias", estimator=name, problem=problem) == pytest.approx(expected, abs=1e-9), name
    assert value("directional_gap", problem=problem, directions=4) < 1e-9
    # a gradient that is wrong shows: half of it is missing along every direction
    off = replace(problem)
    object.__setattr__(off, "parameter_gradient", lambda: 0.5 * problem.parameter_gradient())
    assert value("directional_gap", problem=off, directions=4) > 0.1


def test_every_quantity_has_an_oracle() -> None:
    assert set(registered_quantities()) == COVERED


@pytest.mark.parametrize("name", registered_quantities())
def test_a_quantity_introduces_itself(name: str) -> None:
    quantity = find_quantity(name)
    assert len(quantity.page) > 10
    assert quantity.parameters
    assert set(quantity.parameters.values()) <= {Estimator, Problem, float, int, str, list}


def test_an_unknown_quantity() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown quantity 'scal'. Did you mean 'scale'"):
        find_quantity("scal")


def test_what_cannot_be_registered() -> None:
    def scale(*, problem: Problem) -> float:
        """A name that is taken."""
        return 0.0

    def no_page(*, problem: Problem) -> float:
        return 0.0

    def positional(problem: Problem) -> float:
        """An argument by position."""
        return 0.0

    for fn in (scale, no_page, positional):
        with pytest.raises(ValueError, match=fn.__name__):
            q.quantity(fn)
    assert set(registered_quantities()) == COVERED


def test_rows_mean() -> None:
    x = torch.tensor([[1.0], [3.0], [10.0], [7.0]], dtype=torch.float64)
    weight = torch.tensor([0.25, 0.75, 1.0, 0.0], dtype=torch.float64)
    key: Tensor = torch.tensor([0, 0, -1, 5])
    assert q.rows_mean(x, weight, key)[:, 0].tolist() == [2.5, 2.5, 10.0, 0.0]
