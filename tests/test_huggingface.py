"""Hugging Face models as policies, against the same models one text at a time: tiny ones, from configurations alone."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pgcheck
from pgcheck import truth
from pgcheck.engines.coefficients import coefficients_of
from pgcheck.engines.parameters import one_by_one
from pgcheck.envs.language import LMTask
from pgcheck.errors import BudgetError, ProblemError
from pgcheck.policies import Decoding, HFPolicy, LMPolicy, huggingface, perturbed, truncated
from pgcheck.policies.huggingface import TokensToLogits, float64_throughout, is_hugging_face
from pgcheck.problem import Problem
from pgcheck.verdicts.quantities import find_quantity

transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install 'pgcheck[hf]'")

V = 11
SIZES = {
    "vocab_size": V, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 0,
}  # fmt: skip


def llama(**changes: Any) -> nn.Module:
    return made(lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**(SIZES | changes))))


def qwen(**changes: Any) -> nn.Module:
    return made(lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**(SIZES | changes))))


def gpt2(**changes: Any) -> nn.Module:
    sizes = {"vocab_size": V, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16, "bos_token_id": 1}
    return made(
        lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**(sizes | {"eos_token_id": 0} | changes)))
    )


def made(build: Callable[[], nn.Module]) -> nn.Module:
    """With weights from a seed, large enough to say something; tied embeddings stay tied."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build().eval()
        with torch.no_grad():
            for p in model.parameters():
                if p.dim() > 1:
                    p.mul_(8)
    return model


MODELS = {"llama": llama, "qwen2": qwen, "gpt2": gpt2, "llama, tied": lambda: llama(tie_word_embeddings=True)}
WRITTEN = (0, 2, 5, 9)
# prompts of unequal length, one of them the beginning of the other
TASK = LMTask(
    [(5, 6, 7), (3,), (3, 8)], vocab_size=V, eos=0, max_new_tokens=3, actions=WRITTEN,
    reward=lambda prompt, text: float((sum(prompt) + sum(text)) % 3 == 0),
)  # fmt: skip


def one_at_a_time(model: nn.Module, task: LMTask) -> Tensor:
    """Logits after each context, which stands alone: nothing is padded, nothing is masked."""
    model = model.double()
    with torch.no_grad(), float64_throughout():
        said = torch.stack([model(torch.tensor([tokens])).logits[0, -1] for tokens in task.contexts])
    return said[:, list(task.actions or ())]


@pytest.mark.parametrize("name", MODELS)
def test_the_tree_is_one_text_at_a_time(name: str) -> None:
    model = MODELS[name]()
    found = Problem(TASK, model).logits
    with torch.no_grad():  # as the model is, in float32
        stock = torch.stack([model(torch.tensor([tokens])).logits[0, -1] for tokens in TASK.contexts])
    torch.testing.assert_close(found, stock[:, list(WRITTEN)].double(), rtol=0, atol=3e-6)
    torch.testing.assert_close(found, one_at_a_time(model, TASK), rtol=0, atol=1e-13)
    assert float(found.std()) > 0.1


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("tokens_at_once", [512, 9])
def test_padding_cannot_be_seen(name: str, tokens_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever stands on the padding, and however many rows go into one pass."""
    monkeypatch.setattr(huggingface, "_TOKENS_AT_ONCE", tokens_at_once)
    model = MODELS[name]()
    policy = HFPolicy(model, TASK)
    assert (len(policy.parts) > 1) == (tokens_at_once == 9)
    before = policy().detach()
    padding = torch.arange(policy.tokens.shape[1]) >= policy.length.unsqueeze(-1)
    assert bool(padding.any())
    policy.tokens[padding] = 10
    torch.testing.assert_close(policy(), before, rtol=0, atol=1e-13)
    torch.testing.assert_close(before, one_at_a_time(model, TASK), rtol=0, atol=1e-13)


def test_wrong_positions_would_show() -> None:
    """Prompts padded on the left without a mask, as a batch that was tokenised for generation: other logits."""
    model = gpt2().double()
    with torch.no_grad(), float64_throughout():
        shifted = model(torch.tensor([[0, 0, 3]])).logits[0, -1]
        right = model(torch.tensor([[3]])).logits[0, -1]
    assert float((shifted - right).abs().max()) > 1e-3


def test_float64_throughout() -> None:
    """Norms, rotary angles and the softmax of attention are computed in float64, and float32 is float32 again outside."""
    model = llama().double()
    tokens = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        islands = model(tokens).logits
        with float64_throughout():
            exact = model(tokens).logits
            assert (
                torch.zeros(1).float().dtype
                == torch.softmax(torch.zeros(2), 0, dtype=torch.float32).dtype
                == torch.float64
            )
    assert 1e-9 < float((islands - exact).abs().max()) < 1e-4
    assert torch.zeros(1).double().float().dtype == torch.float32


def test_it_is_a_copy() -> None:
    model = llama()
    problem = Problem(TASK, model)
    with torch.no_grad():
        before = problem.policy().clone()
        for p in model.parameters():
            p.zero_()
        assert torch.equal(problem.policy(), before)
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_one_model_for_several_problems() -> None:
    model = llama().double()
    policy = HFPolicy(model, TASK, copy=False)
    problem = Problem(TASK, policy)
    assert problem.policy is policy
    assert policy.model is model
    torch.testing.assert_close(problem.logits, Problem(TASK, model).logits, rtol=0, atol=1e-13)
    assert problem.at(1).policy.model is not model


# -- in the parameters


@pytest.mark.parametrize("name", MODELS)
def test_the_gradient_in_parameters(name: str) -> None:
    """Against J differentiated in one piece through one text at a time, and against central differences."""
    problem = Problem(TASK, MODELS[name]())
    found = problem.parameter_gradient()
    model = MODELS[name]().double()
    with float64_throughout():
        z = torch.stack([model(torch.tensor([tokens])).logits[0, -1] for tokens in TASK.contexts])[:, list(WRITTEN)]
    J = truth.value_by_enumeration(problem.trajectories.paths, z)
    whole = torch.cat([g.flatten() for g in torch.autograd.grad(J, list(model.parameters()))])
    torch.testing.assert_close(found, whole, rtol=0, atol=1e-12 * float(whole.abs().max()))
    assert find_quantity("directional_gap")(problem=problem, directions=3).value < 1e-10


@pytest.mark.parametrize("name", MODELS)
def test_an_exact_verdict(name: str) -> None:
    """In logits and in all parameters, on-policy and with a sampler of other weights."""
    model = MODELS[name]()
    problem = Problem(TASK, model, group_size=3)
    table = pgcheck.compare(["leave_one_out", "dr_grpo", "grpo"], problem, space="parameters")
    assert table["finding"].tolist() == ["unbiased", "proportional", "biased"]
    assert table["rel"][0] <= 1e-12
    assert table["variance"].notna().all()
    stale = Problem(TASK, model, behavior_logits=perturbed(model, relative=0.1, seed=1), group_size=2)
    assert not stale.on_policy
    table = pgcheck.compare(["trajectory_is", "leave_one_out", "token_is"], stale)
    assert table["finding"].tolist() == ["unbiased", "biased", "biased"]


def test_a_jacobian_row_by_row() -> None:
    """The batched derivative is the one of each logit on its own."""
    task = LMTask(
        [(5, 6), (3,)], vocab_size=V, eos=0, max_new_tokens=1, actions=[0, 2], reward=lambda p, t: float(t[0])
    )
    problem = Problem(task, llama())
    z = problem.policy()
    rows = [
        torch.cat([g.flatten() for g in torch.autograd.grad(x, list(problem.policy.parameters()), retain_graph=True)])
        for x in z.flatten()
    ]
    torch.testing.assert_close(problem.logit_jacobian(), torch.stack(rows), rtol=0, atol=1e-12)


# -- samplers


def test_low_precision_is_a_sampler_of_its_own() -> None:
    """Biased without weights, by about its rounding, and not at all with them."""
    model = llama()
    rels = {}
    for dtype in (torch.float32, torch.bfloat16):
        behavior = HFPolicy(model, TASK, dtype=dtype)
        assert next(behavior.model.parameters()).dtype == dtype
        problem = Problem(TASK, model, behavior_logits=behavior, group_size=2)
        table = pgcheck.compare(["leave_one_out", "trajectory_is"], problem)
        assert table["finding"].tolist() == ["biased", "unbiased"]
        rels[dtype] = table["rel"][0]
    assert 1e-9 < rels[torch.float32] < 1e-5 < rels[torch.bfloat16] < 0.3


@pytest.mark.parametrize("rule", [{"top_p": 0.6}, {"top_k": 2}, {"top_k": 3, "top_p": 0.9}])
def test_a_truncated_sampler_loses_the_mass_it_cuts(rule: dict[str, Any]) -> None:
    """One token: E_old[w] = Σ_{a kept} π(a), averaged over prompts; 1 where nothing is cut."""
    task = LMTask([(5, 6), (3,)], vocab_size=V, eos=0, max_new_tokens=1, reward=lambda p, t: float(t[0] % 2))
    model = qwen()
    problem = Problem(task, model, behavior_logits=Decoding(**rule), group_size=2)
    pi = torch.softmax(problem.logits, -1)
    kept = 0.0
    for row in pi.tolist():  # by hand: the likeliest first, to top_k, renormalised, until top_p is reached
        chosen = sorted(range(V), key=lambda a: -row[a])[: rule.get("top_k", V)]
        mass = sum(row[a] for a in chosen)
        so_far = 0.0
        for a in chosen:
            if so_far / mass >= rule.get("top_p", 1.0):
                break
            so_far += row[a]
        kept += so_far / 2
    assert kept < 0.99
    assert find_quantity("mean_weight")(problem=problem).value == pytest.approx(kept, abs=1e-12)
    assert not problem.full_support
    warm = Problem(task, model, behavior_logits=Decoding(temperature=0.5), group_size=2)
    assert find_quantity("mean_weight")(problem=warm).value == pytest.approx(1.0, abs=1e-12)
    assert warm.full_support


def test_temperature_comes_first() -> None:
    """Then top-k, then top-p: at temperature ½ of .5, .3, .2 the first has .658, and top-p .6 keeps it alone."""
    logits = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64).log()
    cold = Decoding(temperature=0.5, top_p=0.6)(logits)
    assert torch.isfinite(cold).tolist() == [[True, False, False]]
    assert torch.isfinite(truncated(logits, top_p=0.6)).tolist() == [[True, True, False]]
    assert torch.equal(Decoding()(logits), logits)
    torch.testing.assert_close(
        torch.softmax(Decoding(temperature=0.5)(logits), -1), torch.tensor([[0.25, 0.09, 0.04]]).double() / 0.38
    )


def test_a_stale_copy() -> None:
    """Every tensor moves by the share asked for; the same for the same seed, and nothing global is drawn."""
    model, before = llama(), torch.get_rng_state()
    moved = perturbed(model, relative=0.05, seed=3)
    assert torch.equal(before, torch.get_rng_state())
    for p, q in zip(model.parameters(), moved.parameters(), strict=True):
        share = float((q - p).detach().norm() / p.detach().norm())
        assert 0.02 < share < 0.09
    again = perturbed(model, relative=0.05, seed=3)
    assert all(torch.equal(p, q) for p, q in zip(moved.parameters(), again.parameters(), strict=True))


# -- text


class Letters:
    """A tokenizer of single letters and "<e>", with what `text_task` asks of transformers' ones."""

    eos_token_id: int | None = 0
    chat_template = None
    letters = "_abcdefghij"

    def __len__(self) -> int:
        return len(self.letters)

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [self.letters.index(x) for x in text]}

    def decode(self, tokens: list[int], skip_special_tokens: bool = False) -> str:
        return "".join(self.letters[x] for x in tokens if x or not skip_special_tokens)

    def apply_chat_template(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> dict[str, list[int]]:
        assert add_generation_prompt
        return self("j" + messages[0]["content"] + "i")


def test_a_task_from_text() -> None:
    seen = []

    def reward(prompt: str, text: str) -> float:
        seen.append((prompt, text))
        return float(text == "ba")

    task = pgcheck.text_task(Letters(), ["cab", "d"], reward=reward, actions=["a", "b"], max_new_tokens=2)
    assert task.prompts == ((3, 1, 2), (4,))
    assert task.actions == (1, 2, 0)  # the end of text is added
    assert (task.eos, task.completions) == (0, 2 * (1 + 2 * 3))
    problem = Problem(task, llama())
    assert set(seen) == {(p, t) for p in ("cab", "d") for t in ("", "a", "b", "aa", "ab", "ba", "bb")}
    assert problem.trajectories.actions == 3
    chances = [
        float(p)
        for p, r in zip(problem.trajectories.probability, problem.trajectories.paths.reward.sum(-1), strict=True)
        if r
    ]
    z = torch.log_softmax(one_at_a_time(llama(), task), -1)
    at = {tokens: k for k, tokens in enumerate(task.contexts)}
    expected = [float((z[at[p], 1] + z[at[(*p, 2)], 0]).exp()) for p in task.prompts]  # "b", then "a"
    assert chances == pytest.approx(expected, abs=1e-13)


def test_a_chat() -> None:
    tokenizer = Letters()
    tokenizer.chat_template = "…"  # type: ignore[assignment]
    task = pgcheck.text_task(tokenizer, ["a"], reward=lambda prompt, text: float(prompt == "a"), chat=True)
    assert task.prompts == ((10, 1, 9),)
    assert float(task.paths().reward.min()) == 1.0  # the reward sees what the user says
    assert (task.max_new_tokens, task.completions) == (1, V)


def test_bad_texts() -> None:
    def task(**changes: Any) -> Any:
        given: dict[str, Any] = {"reward": lambda prompt, text: 0.0, "max_new_tokens": 2, **changes}
        return pgcheck.text_task(given.pop("tokenizer", Letters()), given.pop("prompts", ["ab"]), **given)

    no_end = Letters()
    no_end.eos_token_id = None
    with pytest.raises(ProblemError, match="eos: the tokenizer has no EOS"):
        task(tokenizer=no_end)
    assert task(tokenizer=no_end, eos=False).eos is None
    assert task(tokenizer=no_end, eos="j").eos == 10
    assert task(tokenizer=no_end, max_new_tokens=1).completions == V
    with pytest.raises(ProblemError, match=r"actions: 'ab' is 2 tokens, \['a', 'b'\]; expected one"):
        task(actions=["ab", "c"])
    with pytest.raises(ProblemError, match="actions: "):
        task(actions=[], max_new_tokens=1)
    with pytest.raises(ProblemError, match="no chat template"):
        task(chat=True)
    with pytest.raises(ProblemError, match=r"prompts: 'ab'; expected one string or more"):
        task(prompts="ab")


# -- what is refused


def test_dropout_is_named() -> None:
    with pytest.raises(ProblemError, match=r"has dropout \(module 'transformer\.drop'\)\. Call model\.eval\(\)"):
        Problem(TASK, gpt2().train())
    with pytest.raises(ProblemError, match=r"has dropout \(config\.attention_dropout = 0\.5\)\. Call model\.eval\(\)"):
        Problem(TASK, llama(attention_dropout=0.5).train())
    Problem(TASK, llama().train())  # nothing in it is random


def test_nan_is_shown() -> None:
    model = llama()
    with torch.no_grad():
        model.lm_head.weight[5] = math.nan
    with pytest.raises(ProblemError, match=r"the logit of token 5 after \(3,\) is nan"):
        Problem(TASK, model)


def test_another_vocabulary() -> None:
    task = LMTask([(1,)], vocab_size=9, eos=0, max_new_tokens=1, reward=lambda p, t: 0.0)
    with pytest.raises(ProblemError, match=r"it returns \[1, 1, 11\]; expected logits \[1, 1, 9\].* vocab_size"):
        Problem(task, llama())


def test_a_prompt_longer_than_the_context() -> None:
    with pytest.raises(
        ProblemError, match=r"its context is 4 tokens \(config\.max_position_embeddings\), but it must read 5"
    ):
        Problem(TASK, llama(max_position_embeddings=4))


def test_a_model_without_a_head() -> None:
    with pytest.raises(ProblemError, match=r"LlamaModel returns no logits; load it by AutoModelForCausalLM"):
        Problem(TASK, llama().model)


def test_no_model_at_all() -> None:
    with pytest.raises(ProblemError, match="model: Linear; expected a causal language model of transformers"):
        HFPolicy(nn.Linear(1, 1), TASK)
    assert not is_hugging_face(pgcheck.TinyGPT(3))
    with pytest.raises(ProblemError, match=r"copy: False, but the weights are torch\.float32"):
        HFPolicy(llama(), TASK, copy=False)


def test_memory_is_predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface, "free_memory", lambda: 2**14)
    with pytest.raises(
        BudgetError, match=r"model: a copy of 64 bits a number takes .* vocabulary 11\); 16 KiB are free"
    ):
        Problem(TASK, llama())


def test_a_bad_sampler() -> None:
    for temperature in (0.0, -1.0, math.inf, math.nan, "1", True):
        with pytest.raises(ProblemError, match="temperature: "):
            Decoding(temperature=temperature)  # type: ignore[arg-type]
    with pytest.raises(ProblemError, match="top_k, top_p: 0, None"):
        Problem(TASK, llama(), behavior_logits=Decoding(top_k=0))

    def broken(logits: Tensor) -> Tensor:
        raise KeyError("x")

    with pytest.raises(ProblemError, match="behavior_logits: called with the policy's logits, it raises KeyError"):
        Problem(TASK, llama(), behavior_logits=broken)


def test_transformers_is_imported_by_its_owner_only() -> None:
    code = "import sys, pgcheck; pgcheck.HFPolicy, pgcheck.Problem, pgcheck.text_task; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_ordinary_module_is_still_one() -> None:
    class Plain(nn.Module):
        def forward(self, tokens: Tensor) -> Tensor:
            return torch.nn.functional.one_hot(tokens, V).to(torch.float64)

    policy = Problem(TASK, Plain()).policy
    assert type(policy) is LMPolicy
    assert policy().shape == (len(TASK.contexts), len(WRITTEN))
    # the policy repeats the last token where it may
    for tokens, row in zip(TASK.contexts, policy(), strict=True):
        assert row.tolist() == [float(a == tokens[-1]) for a in WRITTEN]


# -- completions too many to be listed


@pytest.mark.parametrize("name", MODELS)
def test_what_such_a_model_writes(name: str) -> None:
    """Rows that it writes itself: their log-probabilities are those of each text alone; estimates in parameters, forward in a
    sketch and by backward passes, are one backward pass a batch."""
    model = MODELS[name]()
    task = LMTask(
        [(5, 6, 7), (3,)], vocab_size=V, eos=0, max_new_tokens=3, max_completions=1, max_prefixes=1,
        reward=lambda prompt, text: float((sum(prompt) + sum(text)) % 3 == 0),
    )  # fmt: skip
    p = Problem(task, model, group_size=3)
    assert p.written
    sampler = p.sampler(seed=1)
    table, index = sampler.draw(0, 12)
    alone, policy = model.double(), table.policy
    with torch.no_grad(), float64_throughout():
        for n in range(len(table)):
            for t in range(int(table.paths.end[n])):
                row, place = policy.where[:, table.paths.context[n, t]].tolist()
                said = torch.log_softmax(alone(policy.tokens[row : row + 1, : place + 1]).logits[0, -1], -1)
                expected = pytest.approx(float(said[table.paths.action[n, t]]), abs=1e-10)
                assert float(table.logp[n, t]) == expected
                assert float(table.behavior_logp[n, t]) == expected
    c = coefficients_of(pgcheck.as_estimator("grpo"), table.batch(index, p.group_labels))
    each = torch.cat(list(one_by_one(c, table, index, policy)))
    size = float(each.abs().max())
    torch.testing.assert_close(pgcheck.ParameterSpace(p).project(c, table, index), each, rtol=0, atol=1e-12 * size)
    space = pgcheck.SketchSpace.of(p, directions=3)
    x = space.project(c, table, index)
    torch.testing.assert_close(x, each @ space.directions.T, rtol=0, atol=1e-11 * float(x.abs().max()))


def test_restricted_actions_in_a_tree() -> None:
    """Prefixes of some tokens only: J and ∇J_θ are those of the table of completions; a task too large even for that is
    refused, as only a whole vocabulary is written."""
    model = llama()
    small, large = Problem(TASK, model), Problem(replace(TASK, max_completions=1), model)
    assert large.env.size == "tree"
    assert large.value() == pytest.approx(small.value(), abs=1e-13)
    g = small.parameter_gradient()
    torch.testing.assert_close(large.parameter_gradient(), g, rtol=0, atol=1e-12 * float(g.abs().max()))
    with pytest.raises(ProblemError, match="only the whole vocabulary is written by a model"):
        Problem(replace(TASK, max_completions=1, max_prefixes=1), model)


def test_an_hf_policy_that_reads_rows() -> None:
    """`LMPolicy.reading` of such a model, on contexts that end anywhere in given rows."""
    model = TokensToLogits(qwen().double())
    rows = torch.tensor([[5, 6, 7, 2], [3, 8, 9, 9]])
    where = torch.tensor([[0, 0, 1], [1, 3, 2]])
    policy = LMPolicy.reading(model, rows, where)
    with torch.no_grad():
        expected = torch.stack([model(rows[r : r + 1, : i + 1])[0, -1] for r, i in where.T.tolist()])
    torch.testing.assert_close(policy().detach(), expected, rtol=0, atol=1e-12 * float(expected.abs().max()))
