"""Completions that a model writes, against the table of all of them and one text at a time."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats

import pgcheck
from pgcheck.batch import Batch
from pgcheck.engines.coefficients import coefficients_of
from pgcheck.engines.exact import exact_moments
from pgcheck.envs import language
from pgcheck.envs.language import LMTask
from pgcheck.errors import BudgetError, NotFiniteError, ProblemError
from pgcheck.estimators.base import find_estimator
from pgcheck.estimators.lookup import FILLED_BY  # noqa: F401  (fills the registries)
from pgcheck.generation import mismatch
from pgcheck.policies import Decoding, TinyGPT, truncated
from pgcheck.problem import Problem
from pgcheck.render.files import write_report
from tests.test_tree import COLUMNS, TASKS, rows_of

FALSE_ALARM = 1e-9
DECODINGS: dict[str, Decoding | None] = {
    "on-policy": None,
    "stale": Decoding(TinyGPT(5, width=8, seed=9), temperature=0.8),
    "top-k": Decoding(top_k=2, temperature=1.3),
    "float32": Decoding(dtype=torch.float32),
}


def written(task: LMTask) -> LMTask:
    return replace(task, max_completions=1, max_prefixes=1)


def both(task: LMTask, decoding: Decoding | None = None, **plan: Any) -> tuple[Problem, Problem]:
    """As a table, and written."""
    model, ref = (TinyGPT(task.vocab_size, width=8, layers=2, seed=seed) for seed in (3, 4))
    if decoding is not None and decoding.model is not None:
        decoding = replace(decoding, model=TinyGPT(task.vocab_size, width=8, seed=9))
    given: dict[str, Any] = {"behavior_logits": decoding, "ref_logits": ref} | plan
    small, large = (Problem(t, model, **given) for t in (task, written(task)))
    assert (small.written, large.written) == (False, True)
    return small, large


@pytest.mark.parametrize("decoding", DECODINGS)
@pytest.mark.parametrize("name", TASKS)
def test_what_is_written(name: str, decoding: str) -> None:
    """Rows are those of the table, in every column that a writer can know, and come with their probability."""
    small, large = both(TASKS[name], DECODINGS[decoding], groups=2, group_size=2)
    draws, known = 2_000, rows_of(small)
    sampler = large.sampler(seed=3)
    table, index = sampler.draw(0, draws)
    batch, start = table.batch(index, sampler.labels), table.paths.start[index]
    assert bool((start[:, 0::2] == start[:, 1::2]).all())
    slack = 1e-5 if decoding == "float32" else 1e-13
    seen = dict.fromkeys(known, 0)
    for m in range(draws):
        for b in range(4):
            steps = len(next(iter(known.values()))["mask"])
            actions = batch.action[m, b].tolist()
            key = (int(start[m, b]), *actions, *[-1] * (steps - len(actions)))
            seen[key] += b == 0
            for column in ("reward", "mask", "logp", "behavior_logp", "ref_logp") if m < 100 else ():
                expected = known[key][column][: len(actions)]
                torch.testing.assert_close(getattr(batch, column)[m, b], expected, rtol=0, atol=slack, msg=column)
    chance = {key: float(row["p"]) for key, row in known.items()}
    assert not any(n for key, n in seen.items() if chance[key] == 0)
    often = [key for key in known if chance[key] * draws >= 5]
    counts = [seen[key] for key in often] + [draws - sum(seen[key] for key in often)]
    means = [chance[key] * draws for key in often]
    if draws - sum(means) > 1e-6:
        means.append(draws - sum(means))
    else:
        assert counts.pop() == 0
    assert stats.chisquare(counts, [x * draws / sum(means) for x in means]).pvalue > FALSE_ALARM


def test_contexts_are_texts() -> None:
    """The policy of a table reads, at each context, the prompt and what was written before."""
    task = TASKS["tool"]
    _, problem = both(task, group_size=3)
    table, _ = problem.sampler(seed=1).draw(0, 40)
    policy = problem.policy
    for n in range(len(table)):
        text = [*task.prompts[int(table.paths.start[n])]]
        for t in range(int(table.paths.end[n])):
            k, a = int(table.paths.context[n, t]), int(table.paths.action[n, t])
            if a < 0:
                continue
            row, place = (int(x) for x in table.policy.where[:, k])
            read = table.policy.tokens[row, : place + 1].tolist()
            assert read[: len(text)] == text
            said = read[len(text) :]  # by the tool
            assert tuple(said) == (task.said_by_tool(int(table.paths.start[n]), tuple(text[2:])) if t else ())
            with torch.no_grad():
                alone = torch.log_softmax(policy(torch.tensor([read]))[0, -1], -1)[a]
            assert float(table.logp[n, t]) == pytest.approx(float(alone), abs=1e-12)
            text = [*read, a]
    torch.testing.assert_close(table.policy(), table.logits, rtol=0, atol=0)


def test_draws_do_not_depend_on_the_asking() -> None:
    _, problem = both(TASKS["tool"], DECODINGS["stale"], groups=2, group_size=3)
    whole, later = problem.sample(12, seed=4), problem.sample(5, seed=4, first=7)
    steps = later.reward.shape[-1]
    for name in ("action", "reward", "mask", "logp", "behavior_logp", "ref_logp"):
        torch.testing.assert_close(
            getattr(later, name), getattr(whole, name)[7:, :, :steps], rtol=0, atol=1e-13, msg=name
        )
        assert torch.equal(getattr(problem.sample(12, seed=4), name), getattr(whole, name))
    assert not torch.equal(problem.sample(12, seed=5).action, whole.action)


def test_facts_without_a_list() -> None:
    task = TASKS["parity"]
    for decoding in DECODINGS.values():
        small, large = both(task, decoding)
        for fact in ("on_policy", "full_support", "discount", "plain_objective", "fixed_length", "one_start"):
            assert getattr(large, fact) == getattr(small, fact), (decoding, fact)
    model = TinyGPT(3, width=8)
    assert Problem(written(task), model, behavior_logits=Decoding(TinyGPT(3, width=8))).on_policy
    assert not Problem(
        written(task), model, behavior_logits=Decoding(TinyGPT(3, width=8, heads=4))
    ).on_policy  # same weights
    assert not Problem(written(task), model).binary_return  # who knows
    assert Problem(replace(written(task), returns=(0, 1)), model).binary_return
    assert not Problem(replace(written(task), returns=(0, 0.5, 1)), model).binary_return


def test_a_digest_is_of_everything_that_is_known() -> None:
    task, model = written(TASKS["copy"]), TinyGPT(4, width=8, seed=3)
    problems = [
        Problem(task, model),
        Problem(task, TinyGPT(4, width=8, seed=4)),
        Problem(task, TinyGPT(4, width=8, heads=4, seed=3)),  # the same weights
        Problem(task, model, group_size=3),
        Problem(task, model, behavior_logits=Decoding(temperature=0.9)),
        Problem(task, model, behavior_logits=Decoding(dtype=torch.bfloat16)),
        Problem(task, model, ref_logits=TinyGPT(4, width=8, seed=5)),
        Problem(task, model, entropy_coefficient=0.1),
        Problem(replace(task, reward=lambda prompt, text: task.reward(prompt, text) + 1), model),
        Problem(replace(task, reward=lambda prompt, text: 0.0 + task.reward(prompt, text)), model),  # another text
        Problem(replace(task, prompts=[(1, 2), (3, 2)]), model),
        Problem(task, model).at(1),
    ]
    assert len({p.digest for p in problems}) == len(problems)
    assert Problem(task, model).digest == problems[0].digest


# -- training and inference


def test_a_decoding_is_a_law() -> None:
    """On a table: temperature, then truncation, of the logits; a copy in bfloat16 says something else, and is not unbiased."""
    task, model = TASKS["parity"], TinyGPT(3, width=8, layers=2, seed=3)
    z = Problem(task, model).logits
    law = Problem(task, model, behavior_logits=Decoding(temperature=0.5, top_k=2)).behavior_logits
    torch.testing.assert_close(law, truncated(z / 0.5, top_k=2), rtol=0, atol=0)
    assert torch.equal(Problem(task, z, behavior_logits=Decoding(temperature=2.0)).behavior_logits, z / 2)
    low = Problem(task, model, behavior_logits=Decoding(dtype=torch.bfloat16), group_size=2)
    gap = (torch.log_softmax(low.behavior_logits, -1) - torch.log_softmax(z, -1)).abs().max()
    assert 1e-4 < gap < 0.2
    assert not low.on_policy
    estimator = find_estimator("leave_one_out")
    biases = []
    for problem in (Problem(task, model, group_size=2), low):
        (moments,) = exact_moments([estimator], problem)
        biases.append(float((moments.mean - problem.gradient()).norm() / problem.gradient().norm()))
    assert biases[0] < 1e-14
    assert 1e-5 < biases[1] < 0.1  # the exact bias of training on what bfloat16 wrote


@pytest.mark.parametrize("kind", ["table", "tree", "written"])
def test_mismatch_by_hand(kind: str) -> None:
    task = {
        "table": TASKS["parity"],
        "tree": replace(TASKS["parity"], max_completions=1),
        "written": written(TASKS["parity"]),
    }
    problem = Problem(
        task[kind], TinyGPT(3, width=8, layers=2, seed=3), behavior_logits=Decoding(dtype=torch.bfloat16), group_size=2
    )
    found, batch = problem.mismatch(200, seed=1), problem.sample(200, seed=1)
    gaps, ratios = [], []
    for m in range(200):
        for b in range(2):
            row = [
                float(batch.logp[m, b, t] - batch.behavior_logp[m, b, t])
                for t in range(batch.mask.shape[-1])
                if batch.mask[m, b, t]
            ]
            gaps += [abs(x) for x in row]
            ratios.append(math.exp(sum(row)))
    assert found.tokens == len(gaps)
    assert found.mean == pytest.approx(sum(gaps) / len(gaps))
    assert found.largest == pytest.approx(max(gaps))
    assert found.ratio == pytest.approx(sum(ratios) / 400)
    assert found.ratio_square == pytest.approx(sum(w * w for w in ratios) / 400)
    assert 1e-4 < found.largest < 0.2
    if kind == "written":
        assert found.rounding == pytest.approx(found.largest)  # nothing but the precision differs
        assert found.outside == 0
    else:
        assert found.rounding is found.outside is None


def test_what_was_recorded_is_what_was_drawn() -> None:
    """A float64 writer is recomputed to rounding; under top-k a token that float64 would have cut is counted as outside."""
    _, exact = both(TASKS["tool"], DECODINGS["stale"])
    assert exact.mismatch(300).rounding < 1e-12
    _, low = both(TASKS["tool"], Decoding(dtype=torch.bfloat16, top_k=2))
    table, index = low.sampler().draw(0, 300)
    acts = table.paths.mask > 0
    cut = ~torch.isfinite(table.recomputed[acts])
    assert mismatch(table, index).outside == pytest.approx(float(cut.double().mean()))
    assert bool(torch.isfinite(table.behavior_logp).all())


# -- what cannot be had


def test_what_needs_a_list_is_refused() -> None:
    _, problem = both(TASKS["parity"])
    for ask in (problem.value, problem.gradient, problem.parameter_gradient, lambda: problem.logits):
        with pytest.raises(BudgetError, match=r"at most 1 \(max_prefixes\)"):
            ask()
    with pytest.raises(BudgetError, match="max_completions is 1"):
        _ = problem.trajectories
    with pytest.raises(ProblemError, match="must be a language model"):
        Problem(written(TASKS["parity"]), torch.zeros(14, 3))
    task = LMTask([(1,)], vocab_size=50_000, eos=0, max_new_tokens=20, reward=lambda prompt, text: 0.0)
    sampler = Problem(task, TinyGPT(50_000, width=2, context=20), group_size=2).sampler()
    with pytest.raises(BudgetError, match=r"32\.8 GiB of logits and texts; 2 GiB are allowed\. Draw 60 at a time"):
        sampler.draw(0, 1_000)  # 2 · (1 + 19 · 2 000) + 6 · 2 000 times 50 000 logits of 8 bytes


def test_rewards_are_asked_for_once_a_completion() -> None:
    asked: list[int] = []

    def reward(prompts: list[Any], texts: list[Any]) -> list[float]:
        asked.append(len(texts))
        assert len(set(zip(prompts, texts, strict=True))) == len(texts)
        return [float(len(text)) for text in texts]

    task = written(replace(TASKS["parity"], reward=reward, batched=True))
    table, _ = Problem(task, TinyGPT(3, width=8)).sampler().draw(0, 200)
    assert asked[-1] + asked[-2] == asked[-3] <= 30  # twice, one of them alone the second time
    assert torch.equal(table.paths.reward.sum(-1), table.paths.end.double())
    counter = iter(range(10**6))
    with pytest.raises(ProblemError, match="when asked again"):
        Problem(written(replace(TASKS["parity"], reward=lambda prompt, text: float(next(counter)))), TinyGPT(3)).sample(
            1
        )


def test_a_long_task() -> None:
    """Sixteen tokens of eight: 7¹⁵ prefixes."""
    task = replace(language.sum_mod(3, max_new_tokens=16, vocab_size=8), returns=(0, 1))
    assert task.size == "generated"
    problem = Problem(task, TinyGPT(8, context=17, width=8), group_size=4)
    batch = problem.sample(8)
    assert batch.reward.shape == (8, 4, 16)
    assert problem.binary_return
    assert set(batch.reward.unique().tolist()) <= {0.0, 1.0}
    for name in COLUMNS[:-1]:
        assert bool(torch.isfinite(getattr(batch, name)).all()), name
    assert bool(torch.isnan(batch.value).all())


def test_verdicts_of_what_is_written(tmp_path: Path) -> None:
    """Without a word about engines: a true estimator passes, the own return in the baseline fails, by a quarter."""
    _, p = both(TASKS["parity"], group_size=4, ref_logits=None)

    def own_mean(batch: Batch) -> torch.Tensor:
        r = batch.episode_return
        return -((r - r.mean())[:, None] * batch.logp * batch.mask).sum(-1).mean()

    report = pgcheck.check_estimator("leave_one_out", p)
    (m,) = report.measurements
    assert (m.finding, m.parameters, m.directions, m.against) == ("unbiased", 1939, None, "leave_one_out")
    assert report.problems[0].gradient_norm is report.problems[0].contexts is None
    assert write_report(report, tmp_path)[0].exists()
    with pytest.raises(
        pgcheck.BiasError, match=r"(?s)in 1,939 parameters, by the difference from `leave_one_out`.*rel 0\.2"
    ):
        pgcheck.check_estimator(own_mean, p)
    table = pgcheck.compare(["leave_one_out", own_mean], p, sampling=pgcheck.Sampling(draws=4_096)).set_index(
        "estimator"
    )
    assert table.loc["own_mean", "ratio"] == pytest.approx(9 / 16)  # it is 3/4 of the other, draw by draw
    assert table.loc["own_mean", "scale_low"] < 0.75 < table.loc["own_mean", "scale_high"]
    assert table.loc["leave_one_out", "variance_low"] > 0


def test_values_are_not_known() -> None:
    """An estimator that reads them is told so."""
    _, problem = both(TASKS["parity"])
    e = find_estimator("baselined(value)")
    with pytest.raises(NotFiniteError, match=r"reads batch\.value: the value function .* is not known"):
        coefficients_of(e, problem.sample(4))
