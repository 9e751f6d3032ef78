"""A small library of policy-gradient losses."""
