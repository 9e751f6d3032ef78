"""A reference that was estimated before: n unbiased estimates r_j of ∇J, from another run or another program.

    D_j = x_j − κ r_j,        E D = E x − κ ∇J,        Cov D = Cov x + κ² Cov r

Each stored estimate is put beside one draw of the run, and used once. So the D_j are independent and of one law, and all that
is said of draws beside a trusted estimator (`pgcheck.engines.trusted`) holds of them as it stands: the noise of the reference
is in every test, certificate and interval, stages of a FAIL share no part of it, and κ may be open. A quarter of what is stored
tells in two halves where ∇J points and how long it is at least; the rest bounds the draws.

Assumed, and not seen by any test: that each r_j is unbiased for the same ∇_θ J (the policy's parameters in their order, a mean
over a batch of any size), that they are independent of each other and of the draws of the run, and kept in no order that says
anything of their size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pgcheck.engines.parameters import by_draws, number_of_parameters
from pgcheck.engines.trusted import Beside, Seen, coefficients_on
from pgcheck.errors import NotFiniteError, UsageError
from pgcheck.estimators.base import Estimator
from pgcheck.problem import Problem
from pgcheck.statistics.guarded import Scores, interval
from pgcheck.statistics.sequential import GRAIN
from pgcheck.trajectories import Trajectories, is_count

STORED = "estimates of another run"
_OF_LENGTH = 4  # one part in so many tells how long ∇J is
_APART = 2**40  # seeds of stored estimates are below minus that


@dataclass(frozen=True, eq=False)
class Stored(Beside):
    """r is taken from estimates that were made before."""

    rows: Tensor  # [n, R]

    @property
    def most_draws(self) -> int:
        """Draws beside which one of them can be put."""
        return len(self.rows) // GRAIN * GRAIN

    def drawn(self, table: Trajectories, index: Tensor, first: int, e: Estimator) -> Tensor:
        """Those of the same numbers."""
        return self.rows[first : first + len(index)].to(index.device)


def stored(
    given: Tensor | Path | str, problem: Problem, around: Callable[[Tensor | None], Seen], *, first_look: int
) -> Stored:
    """Beside stored estimates `[n, P]`, in the space `around` the direction that the first quarter of them has.

    Raises:
        UsageError: no such file; another shape; too few to look once. NotFiniteError: one is NaN or infinite.
    """
    rows = _read(given)
    P = number_of_parameters(problem)
    if rows.dim() != 2 or rows.shape[1] != P:
        raise UsageError(
            f"reference: shape {list(rows.shape)}; '{problem.name}' has {P:,} parameters, so that stored estimates are"
            f" [n, {P}], each of one batch."
        )
    aside = len(rows) // _OF_LENGTH
    if len(rows) - aside < first_look:
        least = (_OF_LENGTH * first_look - 1) // (_OF_LENGTH - 1)
        raise UsageError(
            f"reference: {len(rows):,} stored estimates are too few: a quarter of them tells how long ∇J is, and the first look"
            f" is at {first_look:,} of the rest; the least is {least:,}."
        )
    if not bool((finite := torch.isfinite(rows).all(1)).all()):
        raise NotFiniteError(f"reference: stored estimate {int((~finite).nonzero()[0, 0])} is NaN or infinite.")
    one, other = rows[:aside].split([aside // 2, aside - aside // 2])
    total = one.sum(0)
    u = total / size if (size := float(total.norm())) > 0 else total
    scores = Scores.of((other @ u).unsqueeze(1).numpy())
    about, low = float(scores.mean[0]), float(interval(scores)[0][0])
    inside = around(u)
    return Stored(
        inside, inside.seen(u) * (about if low > 0 else 0.0), scores, STORED, inside.seen(rows[aside:].T).T.contiguous()
    )


def _read(given: Tensor | Path | str) -> Tensor:
    if isinstance(given, Tensor | np.ndarray):
        return torch.as_tensor(given).detach().cpu().to(torch.float64)
    path = Path(given)
    try:
        found = np.load(path) if path.suffix == ".npy" else torch.load(path, weights_only=True, map_location="cpu")
    except FileNotFoundError:
        raise UsageError(f"reference: {path}: no such file.") from None
    except Exception as error:
        raise UsageError(f"reference: {path} cannot be read ({type(error).__name__}); expected .npy, or .pt.") from None
    if not isinstance(found, Tensor | np.ndarray):
        raise UsageError(f"reference: {path} holds a {type(found).__name__}; expected one tensor [n, P].")
    return torch.as_tensor(found).to(torch.float64)


def reference_draws(estimator: Estimator, problem: Problem, *, draws: int, seed: int = 0) -> Tensor:
    """Estimates `[draws, P]` of ∇_θ J to be stored, each of one batch; no run draws these batches, whatever its seed.

        torch.save(pgcheck.reference_draws(pgcheck.as_estimator("rloo"), problem, draws=20_000), "reference.pt")
        pgcheck.check_estimator(my_loss, problem, engine="auto", sampling=pgcheck.Sampling(reference="reference.pt"))

    The estimator must be unbiased on this problem: that is what everything judged against it rests on.

    Raises:
        UsageError: `draws` or `seed` is no count; the policy has no parameters.
    """
    for name, x, least in (("draws", draws, 1), ("seed", seed, 0)):
        if not (is_count(x) or (x == least == 0 and not isinstance(x, bool))):
            raise UsageError(f"{name}: {x!r}; it must be an integer of at least {least}.")
    number_of_parameters(problem)
    sampler, parts = problem.sampler(seed=-_APART - seed, needs=estimator.needs), []
    for first in range(0, draws, GRAIN):
        table, index = sampler.draw(first, min(GRAIN, draws - first))
        c = coefficients_on(estimator, table, index, sampler.labels)
        parts.append(by_draws(c, table, index, problem).cpu())
    return torch.cat(parts)
