"""Where a report comes from: versions, machine, seed. Kept in a file of its own, so that report.json changes only when a
result does."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from pgcheck.runs.report import Report

PACKAGES = ("pgcheck", "torch", "numpy", "scipy", "pandas", "pydantic")


def provenance_path(report: Path) -> Path:
    """report.json → report.provenance.json."""
    return report.with_name(f"{report.stem}.provenance.json")


def provenance(
    report: Report,
    *,
    seed: int | None = None,
    places: Mapping[str, tuple[str, int]] | None = None,
    device: str = "cpu",
) -> str:
    """JSON of what produced the report; the gate reads `places`, for its annotations, and nothing else.

    `seed`: default, that of what was sampled; `device`: where that was evaluated.
    """
    text = report.to_json()
    if seed is None:
        seed = next((m.seed for m in report.measurements if m.seed is not None), None)
    made: dict[str, Any] = {
        "schema": "pgcheck-provenance/1",
        "report": {"sha256": hashlib.sha256(text.encode()).hexdigest(), "suite": report.suite},
        "seed": seed,  # of sampled verdicts; exact ones have none
        "versions": {"python": platform.python_version(), **{name: metadata.version(name) for name in PACKAGES}},
        "device": {"kind": device, "machine": platform.machine(), "system": platform.system()},
        "threads": torch.get_num_threads(),
        "problems": {p.name: p.digest for p in report.problems},
        "places": {name: {"file": file, "line": line} for name, (file, line) in (places or {}).items()},
    }
    return json.dumps(made, indent=1, ensure_ascii=False) + "\n"


def read_places(report: Path) -> dict[str, tuple[str, int]]:
    """The places beside a report; none if there are none, or they cannot be read."""
    try:
        found = json.loads(provenance_path(report).read_text(encoding="utf-8"))["places"]
        return {str(name): (str(x["file"]), int(x["line"])) for name, x in found.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
