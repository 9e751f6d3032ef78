"""Estimators: coefficients of ∇log π, as compositions or taken from a loss, with their claims."""
