"""Sampled verdicts: scores, witnesses, certificates and stopping; numbers in, numbers out."""
