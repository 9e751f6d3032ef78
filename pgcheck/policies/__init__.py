"""Policies: maps from contexts to logits, `[K, A]`."""

from pgcheck.policies.huggingface import HFPolicy, perturbed
from pgcheck.policies.samplers import Sampler, truncated
from pgcheck.policies.tabular import LinearPolicy, ModulePolicy, Policy, SoftmaxTable, as_policy
from pgcheck.policies.transformer import LMPolicy, TinyGPT

__all__ = [
    "HFPolicy",
    "LMPolicy",
    "LinearPolicy",
    "ModulePolicy",
    "Policy",
    "Sampler",
    "SoftmaxTable",
    "TinyGPT",
    "as_policy",
    "perturbed",
    "truncated",
]
