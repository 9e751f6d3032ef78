"""Policies: maps from contexts to logits, `[K, A]`."""

from pgcheck.policies.tabular import LinearPolicy, ModulePolicy, Policy, SoftmaxTable, as_policy
from pgcheck.policies.transformer import LMPolicy, TinyGPT, truncated

__all__ = ["LMPolicy", "LinearPolicy", "ModulePolicy", "Policy", "SoftmaxTable", "TinyGPT", "as_policy", "truncated"]
