"""Sampled verdicts against exact ones, on random problems.

Error budget: every draw of every example is fixed (the problems by Hypothesis, derandomized; the batches by seed 0), so that
an outcome cannot change from run to run. Were the examples fresh, a correct judge would break the first property with
probability alpha/1024 = 1e-9 a verdict, the second with beta = 1e-5 where the bias is at the tolerance, and less above it.
"""

from __future__ import annotations

from hypothesis import assume, given, settings

from pgcheck import strategies
from pgcheck.engines.exact import exact_moments
from pgcheck.engines.monte_carlo import Sampling, monte_carlo
from pgcheck.errors import BudgetError
from pgcheck.estimators.lookup import as_estimator
from pgcheck.verdicts.verdict import RTOL, Status, measure

NAMES = ("reinforce", "reward_to_go", "leave_one_out", "batch_mean", "grpo")
HOW = Sampling(tolerance=0.3, beta=1e-5, draws=8192)


def test_a_sample_never_contradicts_the_expectation():
    """No FAIL where E ĝ = ∇J, no PASS where the bias exceeds the tolerance, and the same of some κ; and both are seen."""
    seen: set[tuple[bool, Status]] = set()

    @given(strategies.problems(off_policy=False, min_group_size=2))
    @settings(max_examples=25, derandomize=True, deadline=None)
    def on(problem):
        chosen = [e for e in map(as_estimator, NAMES) if e.fits(problem)]
        try:
            exact = [
                measure(e, problem, m)
                for e, m in zip(chosen, exact_moments(chosen, problem, budget=20_000), strict=True)
            ]
        except BudgetError:
            assume(False)
        scales = [(1.0, None)] * len(chosen)
        sampled = monte_carlo(chosen, problem, scales=scales, settings=HOW.settings, draws=HOW.draws)
        for e, known, found in zip(chosen, exact, sampled, strict=True):
            for κ, judgement in found.judgements.items():
                off = known.rel if κ is not None else known.off_axis
                right = known.distance(1.0 if κ is not None else max(known.scale, 0.0)) <= RTOL
                seen.add((right, judgement.status))
                assert not (right and known.scale > 0 and judgement.status is Status.FAIL), (e.name, κ)
                assert not (off > 1.01 * HOW.tolerance and judgement.status is Status.PASS), (e.name, κ)

    on()
    assert {(True, Status.PASS), (False, Status.FAIL)} <= seen


@given(strategies.problems(min_group_size=2))
@settings(max_examples=10, derandomize=True, deadline=None)
def test_blocks_and_neighbours_change_no_byte(problem):
    chosen = [e for e in map(as_estimator, NAMES[:3]) if e.fits(problem)]
    how = {"settings": HOW.settings, "draws": HOW.draws}

    def of(found):
        return found.mean.numpy().tobytes(), repr(found.intervals), repr(found.judgements)

    together = monte_carlo(chosen, problem, scales=[(1.0,)] * len(chosen), block=3, **how)
    for e, found in reversed(list(zip(chosen, together, strict=True))):
        (alone,) = monte_carlo([e], problem, scales=[(1.0,)], block=1, **how)
        assert of(alone) == of(found)
