"""Verdicts: numbers judged against claims."""
