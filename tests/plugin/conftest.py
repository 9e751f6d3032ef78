"""What runs in this process is loaded before pytester looks at `sys.modules`: it takes away what it did not find there, and
numpy and pandas cannot be loaded twice."""

import pgcheck.verdict_items  # noqa: F401
