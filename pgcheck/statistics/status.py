"""The three statuses of a verdict, exact or sampled."""

from __future__ import annotations

from enum import StrEnum


class Status(StrEnum):
    """PASS: agrees with the claim. FAIL: contradicts it. INCONCLUSIVE: neither could be shown."""

    PASS = "PASS"
    FAIL = "FAIL"
    INCONCLUSIVE = "INCONCLUSIVE"
