"""Policies: maps from contexts to logits, `[K, A]`."""

from pgcheck.policies.tabular import LinearPolicy, ModulePolicy, Policy, SoftmaxTable, as_policy
from pgcheck.policies.transformer import Decoding, LanguageModel, LMPolicy, TinyGPT, truncated

__all__ = [
    "Decoding",
    "LMPolicy",
    "LanguageModel",
    "LinearPolicy",
    "ModulePolicy",
    "Policy",
    "SoftmaxTable",
    "TinyGPT",
    "as_policy",
    "truncated",
]
