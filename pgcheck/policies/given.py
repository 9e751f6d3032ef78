"""What a user gives for a policy, made into what a problem holds: modules over contexts, tables, models that write."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from pgcheck.envs.language import LMTask
from pgcheck.errors import PgcheckError, ProblemError, in_words
from pgcheck.policies.decoding import Decoding
from pgcheck.policies.huggingface import HFPolicy, TokensToLogits, is_hugging_face
from pgcheck.policies.tabular import ModulePolicy, SoftmaxTable
from pgcheck.policies.transformer import LanguageModel, LMPolicy
from pgcheck.trajectories import as_table

Three = tuple[Any, Any, Any]  # policy, behaviour, reference


def over_contexts(task: LMTask, policy: Any, behavior: Any, ref: Any) -> Three:
    """Language models as policies over the contexts of a task; whatever else is given stays as it is."""

    def read(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        if isinstance(model, LMPolicy) and dtype not in (None, model.dtype):
            model = model.model
        if isinstance(model, (SoftmaxTable, ModulePolicy, LMPolicy)):
            return model
        dtype = torch.float64 if dtype is None else dtype
        if is_hugging_face(model):
            return HFPolicy(model, task, dtype=dtype)
        return LMPolicy(model, task.contexts, vocab_size=task.vocab_size, actions=task.actions, dtype=dtype)

    def logits(given: Any) -> Any:
        with torch.no_grad():
            return read(given)().detach() if isinstance(given, nn.Module) else given

    read_policy = policy
    if isinstance(policy, nn.Module):
        with torch.no_grad():
            read_policy = read(policy)
    if isinstance(behavior, Decoding):
        source = (
            policy if behavior.model is None else behavior.model
        )  # as it was given: it may be wanted in another precision
        with torch.no_grad():
            written = read(source, behavior.dtype)() if isinstance(source, nn.Module) else None
        behavior = behavior(as_table("policy_logits", source) if written is None else written)
    return read_policy, logits(behavior), logits(ref)


def writers(
    task: LMTask, policy: Any, behavior: Any, ref: Any
) -> tuple[LanguageModel, Decoding | None, LanguageModel | None]:
    """Language models, for a task of which nothing can be listed.

    Raises:
        ProblemError: it restricts what is written; one of them is no language model, or does not run.
    """
    if len(task.actions or ()) < task.vocab_size:
        raise ProblemError(
            f"actions: {len(task.actions or ())} of {task.vocab_size:,} tokens, and too many completions to be listed; only"
            " the whole vocabulary is written by a model. Leave actions out, shorten max_new_tokens, or raise max_prefixes."
        )

    def taken(name: str, given: Any) -> LanguageModel:
        if isinstance(given, LanguageModel):
            return copy.deepcopy(given)
        if is_hugging_face(given):
            given = TokensToLogits(given)
        if not isinstance(given, nn.Module):
            raise ProblemError(
                f"{name}: {type(given).__name__}; the prefixes of this task are too many for a table of logits, so it must"
                " be a language model, tokens [n, L] -> logits [n, L, V]."
            )
        return LanguageModel(given, task.probes(), vocab_size=task.vocab_size)

    model = taken("policy", policy)
    reference = None if ref is None else taken("ref_logits", ref)
    if behavior is None:
        return model, None, reference
    how = behavior if isinstance(behavior, Decoding) else Decoding(behavior)
    writer = model if how.model is None else taken("behavior_logits", how.model)
    if how.dtype != torch.float64:
        LanguageModel(writer.model, task.probes(), vocab_size=task.vocab_size, dtype=how.dtype)  # it runs
    return model, replace(how, model=writer), reference


def table_like(name: str, given: Any, logits: Tensor) -> Tensor | None:
    """The logits `[K, A]` of the behaviour or the reference policy (a table, or a function of the policy's), None for none.

    Raises:
        ProblemError: of another shape than the policy's `logits`, or not finite; the behaviour's may be -inf.
    """
    if callable(given):
        given = _called(name, given, logits)
    if given is None:
        return None
    table = as_table(name, given)
    if table.shape != logits.shape:
        raise ProblemError(f"{name}: shape {list(table.shape)}, expected {list(logits.shape)} as the policy's.")
    dead = torch.isinf(table).all(-1) | (table == math.inf).any(-1) | torch.isnan(table).any(-1)
    if bool(dead.any()) or (name == "ref_logits" and not bool(torch.isfinite(table).all())):
        allowed = "finite" if name == "ref_logits" else "finite or -inf, and one in each row finite"
        raise ProblemError(f"{name}: every logit must be {allowed}.")
    return table


def _called(name: str, sampler: Callable[[Tensor], Any], logits: Tensor) -> Any:
    try:
        return sampler(logits)
    except PgcheckError:
        raise
    except Exception as error:
        raise ProblemError(f"{name}: called with the policy's logits, it raises {in_words(error)}.") from error
