"""Prefixes that grow, against whole texts one at a time; and models that cannot."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pgcheck.envs import language
from pgcheck.policies import Decoding, TinyGPT, growing
from pgcheck.policies.growing import Growing
from pgcheck.problem import Problem
from tests.engines.test_sketch import problem

LEVELS: list[
    tuple[list[list[int]], list[int] | None]
] = [  # prompts of two lengths; what follows, by parent: one token or two
    ([[1, 2], [3]], None),
    ([[1, 2, 4], [1, 2, 3, 4], [3, 1], [3, 4]], [0, 0, 1, 1]),
    ([[3, 4, 1, 1], [1, 2, 3, 4, 2], [1, 2, 4, 0], [3, 1, 1]], [3, 1, 0, 2]),
]


def read(model: nn.Module) -> tuple[list[Tensor], list[Tensor], Growing]:
    """Of all levels: as they grow, and each prefix by itself."""
    reader, found, alone = Growing(model), [], []
    for texts, parent in LEVELS:
        length = torch.tensor(list(map(len, texts)))
        tokens = torch.tensor([text + [0] * (int(length.max()) - len(text)) for text in texts])
        with torch.no_grad():
            found.append(reader.read(tokens, length, None if parent is None else torch.tensor(parent)))
            alone.append(torch.stack([model(torch.tensor([text]))[0, -1] for text in texts]))
    return found, alone, reader


@pytest.mark.parametrize("rows", [1, 3, 512])
def test_the_same_logits(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growing, "_ROWS_AT_ONCE", rows)
    found, alone, reader = read(TinyGPT(5, context=6, layers=2, seed=3))
    assert reader._reader is not None
    for here, there in zip(found, alone, strict=True):
        torch.testing.assert_close(here, there, rtol=0, atol=1e-13)


def test_what_is_kept_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a prefix, only its new tokens are read: 2 · 2, then 4 · 2 (where a tool speaks there are two), then 4 · 2."""
    model, seen = TinyGPT(5, context=6), []
    model.token.register_forward_hook(lambda module, given, out: seen.append(given[0].numel()))
    monkeypatch.setattr(Growing, "_agrees", lambda *a: True)
    reader = Growing(model)
    for texts, parent in LEVELS:
        length = torch.tensor(list(map(len, texts)))
        tokens = torch.tensor([text + [0] * (int(length.max()) - len(text)) for text in texts])
        reader.read(tokens, length, None if parent is None else torch.tensor(parent))
    assert seen == [4, 8, 8]


class Liar(TinyGPT):
    """Keeps something else than it has."""

    def forward(self, tokens: Tensor, position: Any = None, attend: Any = None, keep: Any = None) -> Tensor:
        return super().forward(tokens, position, attend, keep and (lambda k, v: keep(k, 1.01 * v)))


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = TinyGPT(5, context=6)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.inner(tokens)  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", ["liar", "raises", "plain", "float32", "large"])
def test_models_that_are_read_whole(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model: nn.Module = Plain() if kind == "plain" else (Liar if kind == "liar" else TinyGPT)(5, context=6)
    if kind == "raises":
        monkeypatch.setattr(growing, "_keeping", lambda *a: 1 / 0)
    if kind == "float32":
        model = model.to(torch.float32)
    if kind == "large":
        monkeypatch.setattr(growing, "KEPT", 8_000)  # the prompts' alone
    found, alone, reader = read(model)
    assert reader._reader is None
    for here, there in zip(found[1:], alone[1:], strict=True):
        torch.testing.assert_close(here, there, rtol=0, atol=1e-5 if kind == "float32" else 1e-13)
    assert (model in growing._FORGETFUL) == (kind in ("liar", "raises"))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_models_of_transformers(family: str) -> None:
    transformers = pytest.importorskip("transformers")
    from pgcheck.policies.huggingface import TokensToLogits

    if family == "llama":
        config = transformers.LlamaConfig(
            vocab_size=5, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=16,
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config)
    else:
        config = transformers.GPT2Config(vocab_size=5, n_positions=16, n_embd=16, n_layer=2, n_head=2)
        model = transformers.GPT2LMHeadModel(config)
    found, alone, reader = read(TokensToLogits(model.double().eval()))
    assert reader._reader is not None
    for here, there in zip(found, alone, strict=True):
        torch.testing.assert_close(here, there, rtol=0, atol=1e-12)


@pytest.mark.parametrize("window", [4, 1])
def test_a_window_that_slides(window: int) -> None:
    """What is kept is looked at beyond the window, once a text is longer than that (a prompt is, of 1): from there on it is
    read whole."""
    transformers = pytest.importorskip("transformers")
    from pgcheck.policies.huggingface import TokensToLogits

    config = transformers.MistralConfig(
        vocab_size=5, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=16, sliding_window=window,
    )  # fmt: skip
    torch.manual_seed(0)
    model = TokensToLogits(transformers.MistralForCausalLM(config).double().eval())
    found, alone, reader = read(model)
    assert reader._reader is None
    assert model in growing._FORGETFUL
    for here, there in zip(found, alone, strict=True):
        torch.testing.assert_close(here, there, rtol=0, atol=1e-12)


@pytest.mark.parametrize("how", [None, Decoding(temperature=0.8, top_p=0.9)])
def test_the_same_completions(how: Decoding | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens and log-probabilities of a task with a tool, with what is kept and without."""
    task = replace(language.tool_dialogue(max_new_tokens=5), prompts=[(1, 2), (2,)])
    p = problem("written", task, behavior_logits=how, ref_logits=TinyGPT(5, width=8, seed=9))
    kept = p.sampler(seed=4).draw(0, 64)[0]
    monkeypatch.setattr(growing, "_reader_of", lambda model: None)
    whole = p.sampler(seed=4).draw(0, 64)[0]
    for name in ("context", "action", "reward", "mask"):
        assert torch.equal(getattr(kept.paths, name), getattr(whole.paths, name)), name
    for name in ("logits", "logp", "behavior_logp", "ref_logp"):
        torch.testing.assert_close(getattr(kept, name), getattr(whole, name), rtol=0, atol=1e-12)


def test_the_writer_is_the_policy() -> None:
    """A decoding without a model of its own is of the policy's, whose logits are then read once."""
    p = Problem(
        replace(language.parity(), max_completions=1, max_prefixes=1), TinyGPT(3), behavior_logits=Decoding(top_k=2)
    )
    assert p.behavior_logits.model is p.policy
