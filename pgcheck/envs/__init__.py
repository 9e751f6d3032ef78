"""Environments: what can happen, apart from the policy."""
