"""Runs: many estimators on many problems, as data."""
