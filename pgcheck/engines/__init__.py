"""Engines: from coefficients to the moments of ĝ."""
