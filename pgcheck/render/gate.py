"""What the gate found, in words: before → after, which way, and the command that mends it."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from pgcheck.render.messages import number
from pgcheck.runs.baseline import CaseEntry, Entry, EstimatorEntry, ExactEntry, SampledEntry
from pgcheck.runs.gate import Difference, Gate, Test, same_draws
from pgcheck.statistics.two_sample import ALPHA
from pgcheck.verdicts.verdict import Status

_VISIBLE = 1e-4  # relative; smaller changes of a number do not show in its four digits


def subject(d: Difference) -> str:
    """`grpo-lm/binary-reward`, or the estimator alone."""
    return f"{d.estimator}-{d.problem}" if d.problem else d.estimator


def headline(d: Difference) -> str:
    """One line: what differs, before → after."""
    where = f"{d.estimator} on {d.problem}" if d.problem else d.estimator
    return f"{where}: {_what(d)}"


def message(d: Difference, command: str, verdicts: Mapping[str, str] | None = None) -> str:
    """The headline and what to do.

    `command`: what accepts a change. `verdicts`: the failure messages of estimators, if they were worked out.
    """
    if d.kind == "verdict" and verdicts and d.estimator in verdicts:
        return verdicts[d.estimator]
    return f"{headline(d)}\n  next      {_next(d, command)}"


def shown(gate: Gate) -> list[Difference]:
    """The differences that a reader needs: an estimator that is new or gone stands for all its entries."""
    whole = {(d.estimator, d.kind) for d in gate.differences if not d.problem and d.kind in ("missing", "orphaned")}
    return [d for d in gate.differences if not d.problem or (d.estimator, d.kind) not in whole]


def summary(gate: Gate) -> str:
    """How many entries agree and how many do not."""
    if gate.exit_code == 5:
        return "nothing was compared: the report and the baseline are empty"
    entries = sum(isinstance(x, Entry) for x in gate.same)
    cases = sum(isinstance(x, CaseEntry) for x in gate.same)
    found = f"{entries} entries as in the baseline"
    if gate.tested:
        found += f" ({len(gate.tested)} of them by two-sample tests, together at {ALPHA:g})"
    if cases:
        found = f"{cases} cases as in the baseline" if not entries else f"{found}, and {cases} cases"
    return f"{found}, {len(gate.differences)} differences" if gate.differences else found


def why_not(gate: Gate) -> str:
    """Why no baseline is made of a run."""
    other = [d for d in gate.differences if not d.is_change]
    if not other:
        return "the report has no entries"
    return f"{len(other)} of these are no changes but failures; mend them first: {headline(other[0])}"


def _what(d: Difference) -> str:
    before, after = d.before, d.after
    if isinstance(before, Entry) and isinstance(after, Entry):
        other = f"the problem is another one (digest {before.digest} → {after.digest}); " if d.kind == "problem" else ""
        return other + _moved(before, after, d.test)
    if d.kind == "changed" and isinstance(before, CaseEntry) and isinstance(after, CaseEntry):
        return "; ".join(
            f"{name} {_told(a)} → {_told(b)}"
            for name in CaseEntry.model_fields
            if (a := getattr(before, name)) != (b := getattr(after, name))
        )
    if d.kind in ("claims", "checks") and isinstance(before, EstimatorEntry) and isinstance(after, EstimatorEntry):
        said = [f"the claims changed: {_listed(before.claims)} → {_listed(after.claims)}"] if d.kind == "claims" else []
        names = sorted({*before.checks, *after.checks})
        pairs = [(n, before.checks.get(n, 0), after.checks.get(n, 0)) for n in names]
        moved = ", ".join(f"{n} {a} → {b}" for n, a, b in pairs if a != b)
        return "; ".join([*said, *([f"checks asked on another number of problems: {moved}"] if moved else [])])
    if d.kind == "missing":
        return "not in the baseline: it is new, or was renamed"
    if d.kind == "orphaned":
        return "in the baseline, and not in the run: it was deleted, renamed or deselected"
    if d.kind == "number":
        return "E ĝ or its variance is no number (NaN or infinite)"
    if d.kind == "stale":
        return f"{d.check} is expected to fail ({d.reason}), and does not"
    status = d.verdict.status if d.verdict else Status.FAIL
    spoken = (d.verdict.reason if d.verdict else d.reason) or (
        f"measured {number(d.verdict.measured)}, allowed {number(d.verdict.allowed)}" if d.verdict else ""
    )
    return f"{d.check} is {status}: {spoken}"


def _listed(claims: list[str]) -> str:
    return ", ".join(claims) or "none"


def _told(x: object) -> str:
    if isinstance(x, float):
        return number(x)
    return ", ".join(f"{k}={v}" for k, v in x.items()) if isinstance(x, dict) else str(x)


def _moved(before: Entry, after: Entry, test: Test | None) -> str:
    if isinstance(before, ExactEntry) and isinstance(after, ExactEntry):
        return changes(before, after)
    if not (isinstance(before, SampledEntry) and isinstance(after, SampledEntry)):
        return f"the engine is another one: {before.engine} → {after.engine}"
    if before.digest != after.digest:
        return changes(before, after)
    if test is not None and test.rejects:
        return _tested(before, after, test)
    if same_draws(before, after):
        return f"{changes(before, after)}; on the same {after.batches:,} draws of seed {after.seed}"
    if before.seed == after.seed and before.first != after.first:
        return f"{changes(before, after)}; the first of the same draws of seed {after.seed} differ already"
    was, now = (f"{x.batches:,} draws of seed {x.seed}" for x in (before, after))
    return f"the same numbers are said to be of {was} and of {now}: the baseline was edited"


def _tested(before: SampledEntry, after: SampledEntry, test: Test) -> str:
    """“scale 0.75 → 1, rose; by chance with p = 1e-30 at most, allowed 2e-11”, and what else moved."""
    a, b = before.score(test.score), after.score(test.score)
    name = {"mse": "MSE of one batch", "scale": "scale"}.get(test.score, f"E ĝ along the fixed direction {test.score}")
    way = ("grew" if b.mean > a.mean else "fell") + (f" ×{number(b.mean / a.mean)}" if test.score == "mse" else "")
    return (
        f"{name} {number(a.mean)} ± {number(a.error)} → {number(b.mean)} ± {number(b.error)}, {way}: by chance with"
        f" p ≤ {test.p:.1e}, below {test.level:.1e} ({before.batches:,} draws of seed {before.seed}, {after.batches:,} of"
        f" seed {after.seed})"
    )


def changes(before: Entry, after: Entry) -> str:
    """“scale 0.75 → 1, now unbiased (was proportional); variance 0.1 → 0.13, grew ×1.3”."""
    said = []
    for name in ("scale", "rel", "off_axis", "cosine"):
        a, b = getattr(before, name), getattr(after, name)
        if a != b and (a is None or b is None or abs(a - b) > _VISIBLE * max(abs(a), abs(b), 1e-6)):
            said.append(f"{name} {_short(a)} → {_short(b)}")
    if before.finding != after.finding:
        said.append(f"now {after.finding} (was {before.finding})")
    elif said:
        said.append(f"still {after.finding}")
    old, new = before.total_variance, after.total_variance
    if abs(old - new) > _VISIBLE * max(abs(old), abs(new)) and abs(old - new) > 1e-9 * after.size**2:
        way = "grew" if new > old else "fell"
        times = f" ×{number(new / old)}" if old > 1e-12 * before.size**2 else ""
        said.append(f"variance {number(old)} → {number(new)}, {way}{times}")
    if said:
        return ", ".join(said)
    if isinstance(before, SampledEntry) or isinstance(after, SampledEntry):
        return f"a number of the draws moved, too little for these digits; {after.finding} as before"
    a, b = before.vector, after.vector
    moved = float(np.linalg.norm(a - b)) if a.shape == b.shape else math.inf
    part = moved / after.size if after.size > 0 else moved
    spread = _of_spread(before, after)
    return f"E ĝ moved by {number(part)} of its size, variance by {number(abs(new - old))}{spread}; {after.finding} as before"


def _of_spread(before: ExactEntry, after: ExactEntry) -> str:
    """What moved in Cov ĝ beside its trace."""
    if before.spread is None or after.spread is None:
        return "" if before.spread == after.spread else ", Cov ĝ is kept on one side only"
    moved = max((abs(x - y) for x, y in zip(before.spread, after.spread, strict=True)), default=0.0)
    along = f", variance along a fixed direction by {number(moved)}"
    return along if moved > 1e-9 * after.size**2 else ""


def _short(x: float | None) -> str:
    """Rounding shows as 0."""
    return number(0.0 if x is not None and abs(x) < 1e-9 else x)


def _next(d: Difference, command: str) -> str:
    if d.kind == "verdict":
        return f"pgcheck explain {d.check}" if d.check != "case" else "pgcheck run the suite, and read the case"
    if d.kind == "stale":
        return f"take '{d.check}' out of expected_failed_checks"
    if d.kind == "number":
        return "pgcheck explain finite"
    if d.kind == "orphaned":
        return f"bring it back; or, if it is meant to be gone: {command}"
    return f"if this is meant: {command}"
