"""Prefixes that rows share, read once: against the rows, token by token, and the same logits and derivatives."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from pgcheck.engines.sketch import tangents
from pgcheck.envs import language
from pgcheck.policies import TinyGPT
from pgcheck.policies.prefixes import LEAST_TOKENS, branching
from pgcheck.policies.transformer import LMPolicy
from pgcheck.problem import Problem


def rows_of(n: int, L: int, tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(tokens, (n, L), generator=generator)
    return rows[torch.argsort(rows[:, 0])], torch.randint(1, L + 1, (n,), generator=generator)


@pytest.mark.parametrize(("n", "L", "tokens"), [(210, 5, 2), (200, 6, 3), (400, 8, 2), (1100, 1, 4)])
def test_every_token_sees_its_own_row(n: int, L: int, tokens: int) -> None:
    rows, length = rows_of(n, L, tokens, seed=n)
    found = branching(rows, length, most_pairs=math.inf)
    assert found is not None
    U = found.tokens.shape[1]
    for i in range(n):
        way = found.place[i].tolist()
        for t in range(int(length[i])):
            m, slot = divmod(way[t], U)
            assert found.tokens[m, slot] == rows[i, t]
            assert found.position[m, slot] == t
            seen = found.attend[m, slot].nonzero().flatten().tolist()
            assert seen == sorted(x - m * U for x in way[: t + 1])
        assert way[int(length[i]) :] == [way[int(length[i]) - 1]] * (L - int(length[i]))
    assert bool(found.attend.any(-1).all())  # padding sees itself: a softmax over nothing is NaN


def test_where_nothing_is_saved() -> None:
    assert branching(*rows_of(LEAST_TOKENS // 5, 5, 2, seed=0)) is None  # few tokens
    assert branching(*rows_of(400, 16, 2, seed=0)) is None  # attention over what is left costs more
    apart = torch.arange(300).unsqueeze(1).expand(-1, 6)
    assert branching(apart, torch.full((300,), 6)) is None


def large() -> Problem:
    """585 contexts on 512 rows of 5 tokens."""
    task = language.sum_mod(3, max_new_tokens=4, vocab_size=9)
    return Problem(task, TinyGPT(9, context=5, width=8, layers=2, seed=1), group_size=2)


def test_the_same_logits_and_derivatives(monkeypatch: pytest.MonkeyPatch) -> None:
    """With prefixes read once, and by rows; the model is handed less than half of the tokens."""
    read: list[int] = []
    p = large()
    p.policy.model.register_forward_pre_hook(lambda module, args: read.append(args[0].numel()))
    v = torch.randn(
        3, sum(x.numel() for x in p.policy.parameters()), generator=torch.Generator().manual_seed(0)
    ).double()
    x = torch.randn(p.logits.shape, generator=torch.Generator().manual_seed(1)).double()

    def everything() -> list[Tensor]:
        with torch.no_grad():
            z = p.policy()
        some = p.policy.at(torch.arange(100, 400))()
        parts = list(tangents(p.policy, v))
        order = torch.arange(len(z)) if parts[0][0] is None else torch.cat([k for k, _, _ in parts]).argsort()
        return [z, some.detach(), p.in_parameters(x), torch.cat([dz for _, _, dz in parts])[order]]

    shared, few = everything(), sum(read)
    read.clear()
    monkeypatch.setattr(LMPolicy, "reads_branches", False)
    for here, there in zip(shared, everything(), strict=True):
        torch.testing.assert_close(here, there, rtol=0, atol=1e-12)
    assert few < 0.5 * sum(read)


def test_models_of_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits of restricted actions and a gradient, on prompts of unequal length, against rows."""
    pytest.importorskip("transformers", reason="transformers is not installed: pip install 'pgcheck[hf]'")
    from pgcheck.envs.language import LMTask
    from pgcheck.policies import HFPolicy
    from tests.test_huggingface import MODELS

    task = LMTask(
        [(5, 6, 7), (3,), (3, 8)], vocab_size=11, eos=0, max_new_tokens=3, actions=(0, 1, 2, 4, 5, 9, 10),
        reward=lambda prompt, text: float(sum(text)),
    )  # fmt: skip
    for name, model in MODELS.items():
        policy = HFPolicy(model(), task)
        assert policy.reads_branches, name
        given: dict[str, Any] = {"group_size": 2}
        shared = Problem(task, policy, **given)
        z, g = shared.logits, shared.parameter_gradient()
        with monkeypatch.context() as m:
            m.setattr(HFPolicy, "reads_branches", False)
            plain = Problem(task, policy, **given)
            torch.testing.assert_close(plain.logits, z, rtol=0, atol=1e-11 * float(z.abs().max()))
            torch.testing.assert_close(plain.parameter_gradient(), g, rtol=0, atol=1e-11 * float(g.abs().max()))


def test_a_model_that_reads_no_branches() -> None:
    """Found out, and read by rows: positions are the model's own affair here, whatever it is told."""
    transformers = pytest.importorskip(
        "transformers", reason="transformers is not installed: pip install 'pgcheck[hf]'"
    )
    from pgcheck.envs.language import LMTask
    from pgcheck.policies import HFPolicy
    from tests.test_huggingface import SIZES, made, one_at_a_time

    class Stubborn(transformers.LlamaForCausalLM):  # type: ignore[misc, name-defined]
        def forward(self, input_ids: Any, attention_mask: Any = None, position_ids: Any = None, **more: Any) -> Any:
            return super().forward(
                input_ids, None if attention_mask is None or attention_mask.dim() > 2 else attention_mask, **more
            )

    model = made(lambda: Stubborn(transformers.LlamaConfig(**SIZES)))
    task = LMTask([(5, 6, 7)], vocab_size=11, eos=None, max_new_tokens=3, reward=lambda prompt, text: 0.0)
    policy = HFPolicy(model, task)
    assert not policy.reads_branches
    torch.testing.assert_close(policy().detach(), one_at_a_time(model, task), rtol=0, atol=1e-11)
