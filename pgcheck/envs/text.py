"""`text_task`: an `LMTask` from strings, by a tokenizer.

    task = text_task(tokenizer, ["2 + 3 = "], reward=lambda prompt, text: float(text == "5"), actions=list("0123456789"))

Prompts are what the tokenizer makes of them; the reward sees the prompt as it was given and the completion as text, without
special tokens. Any tokenizer of transformers will do, and nothing of transformers is imported.

Guarantee: an action given as text is one token, or an error; so is an end of text that the tokenizer does not have.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from pgcheck.envs.language import LMTask, Tokens
from pgcheck.errors import ProblemError


def text_task(
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    reward: Callable[[str, str], float],
    max_new_tokens: int = 1,
    actions: Sequence[str | int] | None = None,
    eos: str | int | Literal[False] | None = None,
    chat: bool = False,
    vocab_size: int | None = None,
    max_completions: int = 10_000,
) -> LMTask:
    """A task on text.

    Args:
        tokenizer: as `AutoTokenizer` gives it.
        prompts: one string or more; with `chat`, what the user says, put into the tokenizer's chat template.
        reward: (prompt, completion) -> float, both text.
        actions: what may be written, as texts of one token each (" yes"), or token ids; the end of text is added where
            completions may have several tokens. Default: the whole vocabulary.
        eos: what ends a completion, one token. Default: the tokenizer's; False: nothing, all have `max_new_tokens`.
        vocab_size: V of the model, where that is more than the tokenizer has.
        max_completions: as `LMTask` has it.

    Raises:
        ProblemError: an action or an end that is not one token; a tokenizer without an EOS, or without a chat template.
        BudgetError: too many completions.
    """
    if isinstance(prompts, str) or not all(isinstance(p, str) for p in prompts) or not prompts:
        raise ProblemError(f"prompts: {prompts!r}; expected one string or more, in a list.")
    if chat and not getattr(tokenizer, "chat_template", None):
        raise ProblemError("chat: the tokenizer has no chat template; write the prompt out, and leave chat out.")
    tokens = [_chat_tokens(tokenizer, p) if chat else tuple(tokenizer(p)["input_ids"]) for p in prompts]
    said = dict(zip(tokens, prompts, strict=True))
    end = _end(tokenizer, eos, max_new_tokens)
    chosen = None if actions is None else [_one_token(tokenizer, "actions", a) for a in actions]
    if chosen is not None and end is not None and max_new_tokens > 1 and end not in chosen:
        chosen.append(end)
    texts: dict[Tokens, str] = {}

    def score(prompt: Tokens, completion: Tokens) -> float:
        if completion not in texts:
            texts[completion] = tokenizer.decode(list(completion), skip_special_tokens=True)
        return reward(said[prompt], texts[completion])

    return LMTask(
        tokens,
        vocab_size=len(tokenizer) if vocab_size is None else vocab_size,
        eos=end if chosen is None or end in chosen else None,
        max_new_tokens=max_new_tokens,
        reward=score,
        actions=chosen,
        max_completions=max_completions,
    )


def _chat_tokens(tokenizer: Any, said: str) -> Tokens:
    found = tokenizer.apply_chat_template([{"role": "user", "content": said}], add_generation_prompt=True)
    return tuple(found["input_ids"] if isinstance(found, Mapping) else found)


def _end(tokenizer: Any, eos: str | int | bool | None, max_new_tokens: int) -> int | None:
    if eos is False:
        return None
    if eos is not None:
        return _one_token(tokenizer, "eos", eos)
    own = getattr(tokenizer, "eos_token_id", None)
    if own is None and max_new_tokens > 1:
        raise ProblemError(
            "eos: the tokenizer has no EOS; give the text that ends a completion (eos='\\n'), or eos=False where all have"
            " max_new_tokens."
        )
    return own


def _one_token(tokenizer: Any, name: str, given: str | int) -> int:
    if not isinstance(given, str):
        return given
    found = tokenizer(given, add_special_tokens=False)["input_ids"]
    if len(found) != 1:
        pieces = [tokenizer.decode([x]) for x in found]
        raise ProblemError(f"{name}: {given!r} is {len(found)} tokens, {pieces}; expected one.")
    return int(found[0])
