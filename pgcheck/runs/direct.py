"""A training step × a problem → `Report`: the direct lane's verdicts, in parameters.

Hygiene comes first, as in `pgcheck.runs.runner`: a step that is random, stateful or moves the model gets that verdict and no
other; one whose gradient is no number on some batch fails `finite`.

Guarantee: exact; the verdict is about this model at this θ, whereas one in logits (`pgcheck.check_estimator`) is about all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata

from torch import Tensor

from pgcheck.engines.direct import DirectMoments, StepRunner, direct_moments, find_step_impurity
from pgcheck.engines.moments import Progress
from pgcheck.engines.purity import KINDS
from pgcheck.errors import NotFiniteError
from pgcheck.estimators.base import Claim, Estimator
from pgcheck.runs import report as rows
from pgcheck.runs.report import ParameterRow, Report
from pgcheck.verdicts.checks.base import SAME
from pgcheck.verdicts.checks.bias import judge_claims
from pgcheck.verdicts.steps import same_as_gap
from pgcheck.verdicts.verdict import RTOL, Measurement, NotAsked, Status, Verdict, judged


@dataclass(frozen=True)
class StepRun:
    """The report, and what a diagnosis starts from; None where the step was not run over every batch."""

    report: Report
    moments: DirectMoments | None = None
    measurement: Measurement | None = None


def run_step(
    runner: StepRunner,
    *,
    claims: Sequence[Claim],
    same_as: Estimator | None,
    budget: int,
    rtol: float = RTOL,
    progress: Progress | None = None,
) -> StepRun:
    """Judge a training step; `same_as`: every batch must give that estimator's gradient.

    Raises:
        BudgetError, EstimatorError: as `direct_moments`.
    """
    name, problem = runner.step.name, runner.problem
    e = Estimator(name, _no_coefficients, "batch", tuple(claims), about="a training step, run whole", min_group_size=1)
    impurity = find_step_impurity(runner)
    if impurity is not None:
        reason = f"{impurity.what}; {impurity.mend}"
        failed = Verdict(name, impurity.kind, problem.name, Status.FAIL, impurity.measured, 0.0, reason=reason)
        return StepRun(_report(e, runner, [failed]))
    verdicts = [
        Verdict(name, kind, problem.name, Status.PASS, 0.0, 0.0) for kind in KINDS if kind != "inputs_unchanged"
    ]
    try:
        moments = direct_moments(runner, budget=budget, progress=progress)
    except NotFiniteError as error:
        failed = Verdict(name, "finite", problem.name, Status.FAIL, float("nan"), 0.0, reason=str(error.args[0]))
        return StepRun(_report(e, runner, [*verdicts, failed]))
    truth = runner.trained(problem.parameter_gradient())
    lane = "direct, ordered" if moments.ordered else "direct"
    found = judged(
        name, problem, moments.mean.unsqueeze(0), truth.unsqueeze(0), moments.total_variance, rtol=rtol, batches=None,
        enumerated=moments.enumerated, lane=lane,
    )  # fmt: skip
    verdicts.append(Verdict(name, "finite", "", Status.PASS, 0.0, 0.0))
    verdicts += judge_claims(e, [problem], [found], rtol=rtol)
    if same_as is not None:
        gap = same_as_gap(runner, same_as)
        status = Status.PASS if gap <= SAME else Status.FAIL  # NaN fails
        verdicts.append(Verdict(name, "same_as", problem.name, status, gap, SAME))
    not_asked = []
    if moments.zeroing == "adds":
        not_asked.append(
            NotAsked(name, problem.name, "it adds to a .grad that is there; zero gradients between batches")
        )
    report = _report(e, runner, verdicts, found, not_asked)
    return StepRun(report, moments, found)


def _no_coefficients(_: object) -> Tensor:
    raise AssertionError("a training step has no coefficients")


def _report(
    e: Estimator,
    runner: StepRunner,
    verdicts: Sequence[Verdict],
    found: Measurement | None = None,
    not_asked: Sequence[NotAsked] = (),
) -> Report:
    parameters = []
    if found is not None:
        sizes = [p.numel() for p in runner.parameters.values()]
        parts = (x.reshape(-1).split(sizes) for x in (found.expected, found.truth))
        for name, m, g in zip(runner.parameters, *parts, strict=True):
            norms = {"expected_norm": float(m.norm()), "gradient_norm": float(g.norm()), "gap": float((m - g).norm())}
            parameters.append(ParameterRow(estimator=e.name, problem=runner.problem.name, name=name, **norms))
    return Report(
        suite="training step",
        version=metadata.version("pgcheck"),
        problems=[rows.problem_row(runner.problem)],
        estimators=[rows.estimator_row(e)],
        measurements=[] if found is None else [rows.measurement_row(found, space="parameters")],
        verdicts=[rows.verdict_row(v) for v in verdicts],
        not_asked=[rows.not_asked_row(n) for n in not_asked],
        parameters=parameters,
    )
