"""Policies: maps from contexts to logits, `[K, A]`."""

from pgcheck.policies.decoding import Decoding, truncated
from pgcheck.policies.huggingface import HFPolicy, perturbed
from pgcheck.policies.tabular import LinearPolicy, ModulePolicy, Policy, SoftmaxTable, as_policy
from pgcheck.policies.transformer import LanguageModel, LMPolicy, TinyGPT

__all__ = [
    "Decoding",
    "HFPolicy",
    "LMPolicy",
    "LanguageModel",
    "LinearPolicy",
    "ModulePolicy",
    "Policy",
    "SoftmaxTable",
    "TinyGPT",
    "as_policy",
    "perturbed",
    "truncated",
]
