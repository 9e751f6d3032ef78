"""The library's doors: `check_estimator`, `compare`, `comparison`, `moments`."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, get_args

from torch import nn

from pgcheck.engines.choice import Engine, engine_on, moments_by
from pgcheck.engines.direct import DEFAULT_BUDGET as DIRECT_BUDGET
from pgcheck.engines.direct import Step, StepRunner, TrainingStep
from pgcheck.engines.exact import DEFAULT_BUDGET
from pgcheck.engines.moments import Moments, Progress
from pgcheck.engines.monte_carlo import DEFAULT_DRAWS, Sampling
from pgcheck.envs.language import LMTask
from pgcheck.envs.tabular import TabularMDP
from pgcheck.errors import BiasError, CheckFailed, UnknownNameError, UsageError
from pgcheck.estimators.base import Claim, Estimator, find_estimator, proportional, unbiased
from pgcheck.estimators.lookup import AnyEstimator, as_estimator, as_estimators, command_name
from pgcheck.policies.transformer import LMPolicy
from pgcheck.problem import Problem
from pgcheck.registry import problem_sets, registered_problems
from pgcheck.render.code import Code, check_code
from pgcheck.render.messages import BIAS_CHECKS, failure_message, step_message
from pgcheck.render.progress import ProgressBar
from pgcheck.rollouts import Padding
from pgcheck.runs.direct import run_step
from pgcheck.runs.report import Report, measurement_of, not_asked_row, verdict_row
from pgcheck.runs.runner import refuse_duplicates, run
from pgcheck.runs.suite import problems_matching
from pgcheck.trajectories import Paths
from pgcheck.verdicts.diagnose import diagnose, find_mistake, find_swap
from pgcheck.verdicts.same_draws import find_cause_of_sample
from pgcheck.verdicts.steps import find_cause
from pgcheck.verdicts.verdict import RTOL, NotAsked, Space, Status, Verdict

if TYPE_CHECKING:  # a check does not wait for pandas
    import pandas as pd

    from pgcheck.runs.compare import Comparison, Sweeps

AnyProblem = Problem | str

THETAS = 2


def as_problems(problems: AnyProblem | Sequence[AnyProblem]) -> list[Problem]:
    """Problems from a set ("core": on-policy; "off-policy"; "penalized": with a KL or entropy term in the objective; "all";
    each at two θ), ids, patterns, or as they are.

    Raises:
        UnknownNameError: no such problem; suggests the nearest.
    """
    if isinstance(problems, Problem):
        return [problems]
    if not isinstance(problems, str | Sequence):
        raise UsageError(f"problems: {problems!r}; expected a set, an id, a pattern, a Problem, or a list of those.")
    if not isinstance(problems, str):
        return [p for entry in problems for p in as_problems(entry)]
    sets = problem_sets()
    if problems in sets:
        return problems_matching([problems], thetas=THETAS)
    if "/" not in problems and "*" not in problems:
        raise UnknownNameError("problem", problems, [*sets, *registered_problems()], hint=f"Sets: {', '.join(sets)}.")
    return problems_matching([problems])


def as_claim(claim: str | Claim) -> Claim:
    """A claim by its name, `"unbiased"` or `"proportional"`, or as it is.

    Raises:
        UsageError: neither.
    """
    if isinstance(claim, Claim):
        return claim
    made = {"unbiased": unbiased(), "proportional": proportional()}
    if claim not in made:
        raise UsageError(f"claim: {claim!r}; expected 'unbiased', 'proportional', or a pgcheck Claim.")
    return made[claim]


def _is_verdict(raised: Any) -> bool:
    """Whether what pytest caught is one, and no defect on the way to it."""
    return issubclass(raised.type, CheckFailed)


def check_estimator(
    estimator: AnyEstimator,
    problems: AnyProblem | Sequence[AnyProblem] | None = None,
    *,
    claim: str | Claim | None = None,
    same_as: str | None = None,
    checks: Sequence[str] | None = None,
    budget: int = DEFAULT_BUDGET,
    rtol: float = RTOL,
    search: bool = False,
    engine: Engine | None = None,
    sampling: Sampling | None = None,
    space: Space = "logits",
    progress: Progress | None = None,
) -> Report:
    """Judge an estimator's claims, exactly, and everything else a correct loss has.

    Args:
        estimator: a loss `batch -> scalar`, an `Estimator`, or the name of one.
        problems: `"core"` (every on-policy problem at two θ), `"off-policy"`, `"penalized"` (a KL or entropy term in the
            objective: read `batch.kl_coefficient`), `"all"`, an id, a pattern, a `Problem`, or several of those. Default:
            `"core"`; with `same_as`, `"all"`.
        claim: what to judge instead of the estimator's own claims; a plain loss claims `"unbiased"`.
        same_as: name of the estimator that it implements: it must give the same estimate from every batch, and without
            `claim` it claims what that one claims.
        checks: names of checks; default, all.
        budget: most batches enumerated on one problem.
        progress: called with (what, done, total); default, a bar on stderr after two seconds, if that is a terminal.
        rtol: tolerance of exact verdicts, relative to max(‖∇J‖, √E‖ĝ‖²).
        engine: `"exact"`; `"auto"` samples where there are more batches than the budget; `"monte_carlo"` samples everywhere.
            Default: exact, and auto where rollouts cannot be listed (a model writes them, or they are too many). A sampled
            verdict may be INCONCLUSIVE, which is raised like a failure.
        sampling: `pgcheck.Sampling(tolerance=.05, alpha=1e-6, beta=1e-3, draws=262144, seed=0)`: what sampled verdicts call
            biased, how often they may be wrong, and how many batches they may draw.
        space: where E ĝ is held against ∇J. Unbiased in `"logits"` is unbiased in every parametrisation; `"parameters"` asks
            less, and only of the policy that a problem has.
        search: hunt for a counterexample among random problems as well, of the same kind as `problems` (on-policy if those
            are); the smallest ends the message, as code. A few seconds; the same problems every time.

    Returns:
        The report, if every check passed. A search is a verdict of it with problem "", which says how many problems it saw.

    Raises:
        BiasError: E ĝ contradicts the claim.
        CheckFailed: any other check failed, or nothing could be checked.
        UsageError: the estimator or a problem cannot be used; no estimator of the name `same_as`.
    """
    __tracebackhide__ = _is_verdict  # pytest shows the test and the message, not these lines
    if not (isinstance(rtol, (int, float)) and 0.0 < rtol < 1.0):
        raise UsageError(f"rtol: {rtol!r}; it must lie between 0 and 1.")
    if space not in get_args(Space):
        raise UsageError(f"space: {space!r}; expected 'logits' or 'parameters'.")
    if search and space != "logits":
        raise UsageError("search: counterexamples are looked for in logits; leave out space='parameters'.")
    e = as_estimator(estimator)
    if same_as is not None:
        other = find_estimator(same_as)
        e = replace(e, same_as=other.name, claims=other.claims)
    if claim is not None:
        e = replace(e, claims=(as_claim(claim),))
    chosen = as_problems(("core" if same_as is None else "all") if problems is None else problems)
    with ProgressBar() as bar:
        report = run(
            [e], chosen, suite="check", checks=checks, budget=budget, rtol=rtol, engine=engine_on(engine, chosen),
            sampling=sampling, space=space, progress=progress or bar,
        )  # fmt: skip
    named, words = report, ""
    smallest: list[Problem] = []
    if search:
        asked = {"same_as": same_as, "claim": claim if isinstance(claim, str) or claim is None else Code("claim")}
        command = command_name(estimator)
        report, smallest, words = searched(report, e, chosen, checks=checks, rtol=rtol, command=command, asked=asked)
    judged = any(v.check in BIAS_CHECKS for v in report.verdicts)
    nothing = not report.verdicts or (checks is None and not judged and not report.failures)
    if report.exit_code == 0 and not nothing:
        return report
    if nothing:
        raise CheckFailed(nothing_checked(e, chosen), report=report)
    shown = named if named.failures else report  # a random problem is explained where no named one fails
    message = explain_failure(e, [*chosen, *smallest], shown, command=command_name(estimator)) + words
    kind = BiasError if any(v.check in BIAS_CHECKS for v in report.failures) else CheckFailed
    raise kind(message, report=report)


def check_training_step(
    step: Step,
    model: Any,
    task: LMTask | TabularMDP | Paths | AnyProblem,
    *,
    groups: int | None = None,
    group_size: int | Sequence[int] | None = None,
    behavior: Any = None,
    reference: Any = None,
    claim: str | Claim | None = None,
    same_as: str | None = None,
    padding: Padding = "right",
    pad_token_id: int | None = None,
    name: str | None = None,
    budget: int = DIRECT_BUDGET,
    rtol: float = RTOL,
    progress: Progress | None = None,
) -> Report:
    """Judge a whole training step: run it on every batch that the task can give, and compare −E[.grad] with ∇_θ J.

        def step(model, rollouts):              # pgcheck.Rollouts: tokens [B, L], masks, rewards, old log-probabilities
            model.zero_grad()
            logp = torch.log_softmax(model(rollouts.input_ids)[:, :-1], -1)
            logp = logp.gather(-1, rollouts.input_ids[:, 1:, None])[..., 0]
            adv = rollouts.rewards - rollouts.rewards.mean()
            (-(adv[:, None] * logp * rollouts.response_mask[:, 1:]).sum() / rollouts.rows).backward()

        pgcheck.check_training_step(step, pgcheck.TinyGPT(3), task)

    A step minimises: its .grad is −ĝ. Masks, shifts, gathers, micro-batches and gradient accumulation are all inside.

    Args:
        step: `(model, rollouts) -> anything`, which leaves `.grad` on the model's parameters and does not move them; called
            once for each batch. With a task it gets `Rollouts`, with any other problem the `Batch` `[B, T]`.
        model: with a task, tokens `[n, L]` -> logits `[n, L, V]`; with a `TabularMDP` or `Paths`, a module over one-hot
            contexts, or a table of logits, which the step calls with nothing. The step gets a copy in float64. None: the
            policy that a `Problem` has.
        task: an `LMTask`, an environment, or a `Problem` (or the id of one), whose policy `model` replaces.
        groups, group_size: rows of a batch; default 2 and 2, or those of the problem. Groups of two hide a standard deviation.
        behavior: the policy that draws the rollouts, `old_log_probs`: a model, or logits `[K, V]`. Default: the model itself,
            and then every ratio is 1 and no mistake in one shows.
        reference: likewise, for `ref_log_probs`.
        claim: `"unbiased"` (the default without `same_as`), `"proportional"`, or a `Claim`.
        same_as: name of the estimator that the step implements; it must leave the same gradient on every batch tried.
        padding: `"right"`, or `"left"` for prompts as in verl and TRL (the model must then read masks or positions itself).
        pad_token_id: default, the eos of the task, else 0.
        name: default, the function's own.
        budget: most batches. A step that notices the order of rows (micro-batches) gets every order, which are more.
        rtol, progress: as of `check_estimator`.

    Returns:
        The report, if every check passed; `report.parameters` has the gap of each named parameter.

    Raises:
        BiasError: E ĝ_θ contradicts the claim; with the likeliest cause, found by trying.
        CheckFailed: the step is random, keeps state, moves the model, leaves NaN, or is not what `same_as` says.
        BudgetError: too many batches; with their number, how long they would take, and the nearest plan that fits.
        UsageError: the model, the task or a policy cannot be used; the step raises or leaves no gradient.
    """
    __tracebackhide__ = _is_verdict
    if not callable(step):
        raise UsageError(f"step: {step!r}; expected a function of (model, rollouts).")
    if not (isinstance(rtol, (int, float)) and 0.0 < rtol < 1.0):
        raise UsageError(f"rtol: {rtol!r}; it must lie between 0 and 1.")
    problem = _problem_of_step(model, task, groups, group_size, behavior, reference)
    eos = task.eos if isinstance(task, LMTask) else None
    pad = (0 if eos is None else eos) if pad_token_id is None else pad_token_id
    called = name or str(getattr(step, "__name__", type(step).__name__))
    runner = StepRunner(TrainingStep(step, called, padding, pad), problem)
    other = None if same_as is None else find_estimator(same_as)
    claims = () if claim is None and other is not None else (as_claim("unbiased" if claim is None else claim),)
    with ProgressBar() as bar:
        done = run_step(runner, claims=claims, same_as=other, budget=budget, rtol=rtol, progress=progress or bar)
    judged = any(v.check in (*BIAS_CHECKS, "same_as") for v in done.report.verdicts)
    if done.report.exit_code == 0 and judged:
        return done.report
    if not done.report.failures:
        raise CheckFailed(
            f"{called}: nothing was checked: the claim does not apply to this problem.", report=done.report
        )
    bias = any(v.check in BIAS_CHECKS for v in done.report.failures)
    found = None
    if (
        done.moments is not None
        and done.measurement is not None
        and any(v.check in (*BIAS_CHECKS, "same_as") for v in done.report.failures)
    ):
        found = find_cause(runner, done.moments, done.measurement)
    message = step_message(done.report, done.moments, found)
    raise (BiasError if bias else CheckFailed)(message, report=done.report)


def _problem_of_step(
    model: Any,
    task: LMTask | TabularMDP | Paths | AnyProblem,
    groups: int | None,
    group_size: int | Sequence[int] | None,
    behavior: Any,
    reference: Any,
) -> Problem:
    policies = {"behavior_logits": behavior, "ref_logits": reference}
    if isinstance(task, (str, Problem)):
        chosen = as_problems(task)
        if len(chosen) != 1:
            raise UsageError(
                f"task: {task!r} names {len(chosen)} problems; a training step is judged on one at a time."
            )
        given = {name: x for name, x in policies.items() if x is not None}
        problem = _with_policies(chosen[0], model, given)
    elif model is None:
        raise UsageError("model: None; a task has no policy of its own, so give the model that is trained.")
    else:
        problem = Problem(task, model, **policies, groups=2, group_size=2, name="task/training-step")
    return problem.with_sampling(
        groups=problem.groups if groups is None else groups,
        group_size=problem.group_size if group_size is None else group_size,
    )


def _with_policies(problem: Problem, model: Any, others: Mapping[str, Any]) -> Problem:
    """The problem with other policies; for one of a language model, models are language models."""
    policy = problem.policy

    def read(given: Any) -> Any:
        if isinstance(policy, LMPolicy) and isinstance(given, nn.Module) and not isinstance(given, LMPolicy):
            return LMPolicy(given, policy.texts, vocab_size=problem.logits.shape[1])
        return given

    changes = {name: x().detach() if isinstance(x := read(given), nn.Module) else x for name, given in others.items()}
    return replace(problem, policy=policy if model is None else read(model), **changes)


def nothing_checked(estimator: Estimator, problems: Sequence[Problem]) -> str:
    """Why no claim of the estimator was judged on these problems."""
    why = (
        f"no claim applies on the {len(problems)} problem(s) given, or their batches are too small (it needs groups of"
        f" {estimator.min_group_size})"
    )
    return f"{estimator.name}: nothing was checked: {why if problems else 'no problem was given'}."


def searched(
    report: Report,
    e: Estimator,
    problems: Sequence[Problem],
    *,
    checks: Sequence[str] | None,
    rtol: float,
    command: str,
    asked: Mapping[str, str | None],
) -> tuple[Report, list[Problem], str]:
    """The report with what a search found added to it, the counterexample, and the words for a failure message; as they are
    where it was measured on no problem, or none of its claims is checked."""
    measured = any(m.estimator == e.name for m in report.measurements)
    if not measured or not any(c.kind in (checks or BIAS_CHECKS) for c in e.claims):
        return report, [], ""
    from pgcheck.search import search as hunt

    verdicts, not_asked, words = [], [], ""
    smallest: list[Problem] = []
    for found in hunt(e, problems, rtol=rtol):
        if found.smallest is not None:
            before = sum(p.name.startswith(found.smallest.name) for p in report.problems)  # of other estimators
            name = found.smallest.name + (f"-{before + 1}" if before else "")
            smallest.append(replace(found.smallest, name=name))
            code = textwrap.indent(check_code(smallest[-1], estimator=command, asked=asked), "    ")
            words = f"\n\nThe smallest of {found.problems} random problems on which it fails:\n\n{code}"
        elif found.problems:
            reason = f"no counterexample among {found.problems} random problems"
            verdicts.append(Verdict(e.name, found.claim.kind, "", Status.PASS, found.worst, rtol, reason=reason))
        else:
            not_asked.append(NotAsked(e.name, "", "search: no random problem met the claim's conditions"))
    if all(c.kind == "biased" for c in e.claims):
        not_asked.append(NotAsked(e.name, "", "search: one problem does not refute a claim of bias"))
    rows = {"verdicts": list(map(verdict_row, verdicts)), "not_asked": list(map(not_asked_row, not_asked))}
    report = _joined(report, report.model_copy(update={"problems": [], "measurements": [], **rows}))
    if smallest:
        report = _joined(report, run([e], smallest, suite="check", checks=checks, rtol=rtol))
    return report, smallest, words


def _joined(report: Report, more: Report) -> Report:
    """The rows of both."""
    tables = ("problems", "measurements", "verdicts", "not_asked")
    return report.model_copy(update={name: [*getattr(report, name), *getattr(more, name)] for name in tables})


def explain_failure(
    estimator: Estimator, problems: Sequence[Problem], report: Report, command: str | None = None
) -> str:
    """The failure message of one estimator, with a cause found by trying."""
    exact = [m for m in report.measurements if m.estimator == estimator.name and m.batches is None]
    measured = {m.problem: m for m in exact}
    failed = {v.problem for v in report.failures if v.estimator == estimator.name and v.check in BIAS_CHECKS}
    found = swap = None
    if failed & set(measured):
        pairs = [p for p in problems if p.name in measured and measured[p.name].expected]
        numbers = [measurement_of(measured[p.name], p) for p in pairs]
        if pairs:
            found, swap = diagnose(estimator, pairs, numbers), find_swap(estimator, pairs, numbers)
    sampled = {
        m.problem: m.seed for m in report.measurements if m.estimator == estimator.name and m.batches is not None
    }
    if found is None and failed & set(sampled):  # E ĝ is too noisy to be told from that of a known mistake
        on = sorted((p for p in problems if p.name in sampled), key=lambda p: p.name not in failed)
        found = find_cause_of_sample(estimator, on, seed=sampled[on[0].name] or 0)
    differs = any((v.estimator, v.check) == (estimator.name, "same_as") for v in report.failures)
    listed = [p for p in problems if p.enumerable]
    mistake = find_mistake(estimator, listed) if differs and listed else None
    return failure_message(report, estimator.name, diagnosis=found, swap=swap, mistake=mistake, command=command)


def moments(
    estimator: AnyEstimator,
    problem: AnyProblem,
    *,
    engine: Engine | None = None,
    budget: int = DEFAULT_BUDGET,
    seed: int = 0,
    draws: int = DEFAULT_DRAWS,
    progress: Progress | None = None,
) -> Moments:
    """E ĝ and Cov ĝ of one batch, in logit space; of a sample where logits are too many, in parameters (`Moments.view`).

    Args:
        engine: `"exact"` enumerates; `"monte_carlo"` draws `draws` batches (rounded up to 1024s), the same for the same `seed`,
            and says how sure it is (`Moments.intervals`); `"auto"` enumerates what fits the budget.

    Raises:
        BudgetError: the batches are too many to enumerate; the message has the numbers and the nearest plan that fits.
    """
    how = Sampling(seed=seed, draws=draws)
    chosen = as_problems(problem)
    if len(chosen) != 1:
        raise UsageError(
            f"problem: {problem!r} names {len(chosen)} problems; moments are of one, compare takes several."
        )
    one = chosen[0]
    with ProgressBar() as bar:
        (found,) = moments_by(
            engine_on(engine, [one]),
            [as_estimator(estimator)],
            one,
            budget=budget,
            sampling=how,
            progress=progress or bar,
        )
    return found


def compare(
    estimators: Sequence[AnyEstimator],
    problems: AnyProblem | Sequence[AnyProblem],
    *,
    space: Space = "logits",
    relative_to: AnyEstimator | None = None,
    budget: int = DEFAULT_BUDGET,
    engine: Engine | None = None,
    sampling: Sampling | None = None,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Bias and variance of several estimators on the same batches, one row each.

    Columns: estimator, problem, finding, rel, scale, cosine, off_axis, bias, variance (tr Cov ĝ of one batch), mse, snr,
    batches (None: exact), cost (rollouts a batch takes), the ends NAME_low and NAME_high of scale, rel, bias, variance, mse
    and snr (95% of what was sampled, the value itself where it is exact), and what `pgcheck.verdicts.variance.relative` adds:
    ratio, batches_to_match, rollouts_to_match, better, break_even, …, with ends as well; sampled ratios and crossings are
    those of pairs of draws.

    Args:
        engine, sampling: as of `check_estimator`.
        space: `"parameters"`: of E ĝ_θ = (dz/dθ)ᵀ E ĝ against ∇_θ J, and tr Cov ĝ_θ (NaN where more
            logits × parameters than fit make it); the finding in logits holds for every θ.
        relative_to: the estimator that the others are compared to; default, the first.

    Raises:
        UsageError: two estimators of one name, or two problems; no such space.
        UnknownNameError: `relative_to` is none of them.
        BudgetError: more batches, or more memory, than fit.
    """
    from pgcheck.runs.compare import compared

    chosen, on = _to_compare(estimators, problems, space)
    reference = None if relative_to is None else as_estimator(relative_to).name
    with ProgressBar() as bar:
        return compared(
            chosen, on, relative_to=reference, space=space, budget=budget, engine=engine_on(engine, on), sampling=sampling,
            progress=progress or bar,
        )  # fmt: skip


def comparison(
    estimators: Sequence[AnyEstimator],
    problems: AnyProblem | Sequence[AnyProblem],
    *,
    space: Space = "logits",
    relative_to: AnyEstimator | None = None,
    sweeps: Sweeps | None = None,
    budget: int = DEFAULT_BUDGET,
    engine: Engine | None = None,
    sampling: Sampling | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """What the variance comparison report shows, as tables: `compare`, and variance by step, source and block, and sweeps
    over batch size, group size and staleness of the behavior policy (`pgcheck.Sweeps`). Another `engine` samples the table and
    the sweeps; what is split, is enumerated or missing.

    Raises:
        UsageError, UnknownNameError, BudgetError: as `compare`.
    """
    from pgcheck.runs import compare as runs

    chosen, on = _to_compare(estimators, problems, space)
    reference = None if relative_to is None else as_estimator(relative_to).name
    with ProgressBar() as bar:
        return runs.comparison(
            chosen, on, relative_to=reference, space=space, sweeps=runs.Sweeps() if sweeps is None else sweeps,
            budget=budget, engine=engine_on(engine, on), sampling=sampling, progress=progress or bar,
        )  # fmt: skip


def _to_compare(
    estimators: Sequence[AnyEstimator], problems: AnyProblem | Sequence[AnyProblem], space: Space
) -> tuple[list[Estimator], list[Problem]]:
    if space not in get_args(Space):
        raise UsageError(f"space: {space!r} is not one of {', '.join(get_args(Space))}.")
    chosen, on = as_estimators(estimators), as_problems(problems)
    refuse_duplicates(chosen, on)
    return chosen, on
