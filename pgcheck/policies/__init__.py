"""Policies: maps from contexts to logits, `[K, A]`."""

from pgcheck.policies.tabular import LinearPolicy, ModulePolicy, Policy, SoftmaxTable, as_policy

__all__ = ["LinearPolicy", "ModulePolicy", "Policy", "SoftmaxTable", "as_policy"]
