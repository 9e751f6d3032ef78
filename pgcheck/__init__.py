"""pgcheck."""
