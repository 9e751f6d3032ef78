"""Failure messages: what, where, measured, allowed, most likely cause, next command."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from pgcheck.engines.direct import DirectMoments
from pgcheck.engines.stored import STORED
from pgcheck.estimators.base import registered_estimators
from pgcheck.registry import heavy_problems, registered_problems
from pgcheck.render.code import estimator_code, shell_name
from pgcheck.runs.report import MeasurementRow, ParameterRow, Report, VerdictRow
from pgcheck.verdicts.checks import find_check
from pgcheck.verdicts.diagnose import PER_ROW, PER_TOKEN, WITHOUT_DISCOUNT, Diagnosis, Swap
from pgcheck.verdicts.steps import Cause
from pgcheck.verdicts.verdict import Status

BIAS_CHECKS = ("unbiased", "proportional", "biased", "expected_finding")


_SEES = {
    "par": "along ∇J",
    "parw": "along ∇J, coordinates weighed by their noise",
    "dense": "spread over coordinates",
    "white": "in coordinates of little noise",
    "sparse": "in a few coordinates",
    "defl": "across the loudest directions of the noise",
}  # what each witness of `pgcheck.statistics.panel` finds


def number(x: float | None) -> str:
    """Four significant digits, one for what is rounding; — for "no such number"."""
    if x is None:
        return "—"
    return f"{x:.0e}" if 0 < abs(x) < 1e-12 else f"{x:.4g}"


def with_ends(m: MeasurementRow, name: str) -> str:
    """A number of a measurement, and behind it the 95% interval of one that was sampled."""
    text, key = number(getattr(m, name)), "variance" if name == "total_variance" else name
    low, high = m.low.get(key), m.high.get(key)
    return text if low is None or high is None else f"{text} [{low:.3g}, {high:.3g}]"


def sampled_words(v: VerdictRow) -> str:
    """What a sampled verdict says, how sure it is, and what it could have missed."""
    s = v.sample
    if s is None:
        return v.reason
    measured = (
        f"‖E ĝ − κ ∇J‖/‖κ ∇J‖ ≈ {number(v.measured)}" if v.check == "proportional" else f"rel ≈ {number(v.measured)}"
    )
    after = f"{v.status.value} after {s.batches:,} batches: "
    missed = f"anything above {number(s.missed)} is excluded, at an error rate of {s.beta:g}"
    if v.status is Status.FAIL and v.check != "biased":
        shape = f", {_SEES[s.witness]} (`{s.witness}`)" if s.witness else ""
        return f"{after}a bias is proven{shape}, at an error rate of {s.alpha:g} for the whole run; {measured}"
    if v.status is Status.PASS and v.check == "biased":
        return f"{after}a bias is proven on '{v.reason}', at an error rate of {s.alpha:g} for the whole run; {measured}"
    if v.status is not Status.INCONCLUSIVE:
        small = f"{after}the bias is below {number(v.allowed)}; {measured}, {missed}"
        return f"{small}; that it is not 0 is proven" if s.note == "nonzero" else small
    needed = f"; it would take about {s.needed:,} batches" if s.needed else ""
    if s.note == "constant":
        return f"{after}every batch gives the same estimate along ∇J; take the exact engine"
    if s.note == "tails":
        tails = (
            f"skewness of the mean {number(s.skewness)} (allowed: .1), largest share of one batch {number(s.largest_share)}"
            f" (allowed: .05), tail index {number(s.pareto_k)}, {number(s.effective_batches)} effective batches"
        )
        return f"{after}the tails are too heavy for an honest verdict at this number: {tails}{needed}"
    return f"{after}{measured}, up to {number(s.missed)} is not excluded, {number(v.allowed)} is allowed{needed}"


def seen_words(m: MeasurementRow | None) -> str:
    """Where a sample was looked at, if not in logits; "" if there."""
    if m is None or m.parameters is None:
        return ""
    words = f"in {m.parameters:,} parameters"
    if m.directions is not None:
        words += f", along ∇J (or a pilot's estimate of it) and {m.directions} random directions"
    if m.against is not None:
        here = f"`{m.against}` on the same rollouts" if m.against != STORED else STORED
        words += f", by the difference from {here}"
    if m.shown is not None:
        words += f"; judged with {number(m.shown)} times the tolerance, for the part of a bias that may be missed so"
    return words


def first_sentence(page: str) -> str:
    """The opening line of a docstring."""
    return page.strip().split("\n")[0]


_HINTS = {
    "−1": "the sign is flipped: a loss is minimised, coefficients ascend",
    "B": "summed over rows where the mean is meant",
    "1/B": "divided by the number of rows twice",
    "1/T": "averaged over the width of the padded tensor",
    "(B−1)/B": "the own return is in the mean over the batch that is subtracted from it",
    "(G−1)/G": "the own return is in the mean over the group that is subtracted from it",
    "√((B−1)/B)": "the standard deviation over the batch is divided by B − 1, not by B",
    "√((G−1)/G)": "the standard deviation over the group is divided by G − 1, not by G",
}


_MADE_HINTS = {
    WITHOUT_DISCOUNT: "J discounts the rewards, the loss does not",
    PER_ROW: "each row is divided by its own length, which its actions decide",
    PER_TOKEN: "it is divided by the number of tokens, which the actions decide",
}  # of what a known estimator is assembled with


def _factor_words(factor: str) -> str:
    return " × ".join(x if x in _HINTS or "/" in x else number(float(x)) for x in factor.split(" × "))


def cause_of(diagnosis: Diagnosis) -> str:
    """A diagnosis in words."""
    if diagnosis.kind == "batch by batch":
        tried = f"from every batch tried, on {diagnosis.problems} problem(s)"
        return f"it gives the estimate of `{diagnosis.subject}` {tried}: {diagnosis.mistake.rstrip('.')}"
    if diagnosis.kind == "draw by draw":
        of = f"{_factor_words(diagnosis.factor)} × " if diagnosis.factor else ""
        known = "; ".join(_HINTS[x] for x in diagnosis.factor.split(" × ") if x in _HINTS)
        why = "; ".join(x for x in (diagnosis.mistake.rstrip("."), known) if x)
        where = f"batch by batch, on {diagnosis.problems} problem(s)"
        return f"on the same draws this is {of}`{diagnosis.subject}`, {where}{why and f': {why}'}"
    if diagnosis.kind == "pattern":
        return (
            f"it is right on every problem but those where {diagnosis.subject} ({diagnosis.problems} problems compared)"
        )
    if diagnosis.kind == "necessary":
        return (
            f"it is wrong only where {diagnosis.subject}, not everywhere there ({diagnosis.problems} problems compared)"
        )
    if diagnosis.kind == "rounding":
        return "float32 inside the loss: batches are float64, but a tensor made without a dtype is not (torch.zeros(n))"
    is_gradient = diagnosis.subject.startswith("the gradient")
    name = diagnosis.subject.replace("the", "the exact", 1) if is_gradient else f"`{diagnosis.subject}`"
    name = " ".join((name, *diagnosis.made))
    if diagnosis.except_on:
        n = diagnosis.problems
        where = f"on {n - len(diagnosis.except_on)} of {n} problems compared, not on {', '.join(diagnosis.except_on)}"
    elif diagnosis.problems == 1:
        where = "on this problem"
    else:
        where = f"on all {diagnosis.problems} problems compared"
    this_is = "this is" if diagnosis.gap == 0 else f"this is, to {100 * diagnosis.gap:.2g}%,"
    why = diagnosis.mistake.rstrip(".") or "; ".join(_MADE_HINTS[x] for x in diagnosis.made if x in _MADE_HINTS)
    mistake = why and f": {why}"
    if not diagnosis.factor:
        return f"in expectation {this_is} {name}, {where}{mistake}"
    if diagnosis.same_here:
        each = [f"{x} ({_HINTS[x]})" if x in _HINTS else x for x in diagnosis.same_here]
        other = "; another size of batch tells them apart" if len(each) > 1 else ""
        number_here = number(float(diagnosis.factor))
        return f"in expectation this is {number_here} × {name}, {where}, where that is {' or '.join(each)}{other}"
    parts = diagnosis.factor.split(" × ")
    factor = _factor_words(diagnosis.factor)
    known = "; ".join(_HINTS[x] for x in parts if x in _HINTS)
    if mistake:
        return f"in expectation {this_is} {factor} × {name}, {where}{mistake}{known and f'; {known}'}"
    return f"in expectation {this_is} {factor} × {name}, {where}: {known or 'a constant factor'}"


def mend_of(swap: Swap) -> str:
    """A swap in words."""
    called = f" ({swap.name})" if swap.name else ""
    return f"with the {swap.part} of `{swap.donor}`{called} in its place it is unbiased on all {swap.problems} problems"


def _lines(rows: Sequence[tuple[str, str]]) -> str:
    return "\n".join(f"  {name:<9} {text}" for name, text in rows)


def failure_message(
    report: Report,
    estimator: str,
    *,
    diagnosis: Diagnosis | None = None,
    swap: Swap | None = None,
    mistake: Diagnosis | None = None,
    command: str | None = None,
) -> str:
    """Everything a reader needs about one estimator's failed checks, the worst bias first."""
    failures = [v for v in report.failures if v.estimator == estimator]
    bias = [v for v in failures if v.check in BIAS_CHECKS]
    others = [v for v in failures if v.check not in BIAS_CHECKS]
    parts = []
    shown = command or estimator
    if bias:
        parts.append(_bias_part(report, estimator, bias, diagnosis, swap, shown))
    for check in dict.fromkeys(v.check for v in others):
        of_check = [v for v in others if v.check == check]
        parts.append(_check_part(estimator, of_check, mistake if check == "same_as" else None))
    return "\n\n".join(parts)


def failure_messages(report: Report, worked_out: Mapping[str, str] | None = None) -> dict[str, str]:
    """The message of every estimator that failed, as worked out with a cause, else without one."""
    failed = dict.fromkeys(v.estimator for v in report.failures)
    return {name: (worked_out or {}).get(name) or failure_message(report, name) for name in failed}


def _bias_part(
    report: Report,
    estimator: str,
    failures: Sequence[VerdictRow],
    diagnosis: Diagnosis | None,
    swap: Swap | None,
    command: str,
) -> str:
    failed = [v for v in failures if v.status is Status.FAIL]
    if not failed:
        return _undecided_part(report, estimator, failures, command)
    worst = max(failed, key=lambda v: math.inf if v.measured is None else v.measured)
    if worst.check == "biased":
        return _stale_part(estimator, worst)
    if worst.check == "expected_finding":
        return f"{estimator} on {worst.problem}: {worst.reason}"
    m = report.cell(estimator, worst.problem)
    rows = [("what", f"{_claimed(worst)} does not hold on '{worst.problem}', the worst of them; {_how_sure(worst)}")]
    if m is not None:
        place = f"context {m.worst_context}, action {m.worst_action}{_step(report, m)}: {_at(report, m)}"
        rows += [("where", seen_words(m) or place), ("measured", _measured(worst, m))]
    rows.append(("allowed", number(worst.allowed)))
    if diagnosis:
        rows.append(("cause", cause_of(diagnosis)))
        known = registered_estimators().get(diagnosis.subject)
        if known and not diagnosis.mistake and not diagnosis.made:
            rows.append(("which is", known.about))
    elif not worst.sample:
        rows.append(("cause", "no known estimator has this expectation"))
    if swap:
        rows.append(("mend", mend_of(swap)))
    rows.append(("next", _comparison_with(diagnosis, estimator, worst.problem, m, command)))
    if any(f.check == "unbiased" for f in failed) and _only_scale(report, estimator):
        rows.append(("note", "the direction is right everywhere; if the factor is meant, claim proportional()"))
    asked = [v for v in report.verdicts if (v.estimator, v.check) == (estimator, worst.check)]
    contradicted = f"{len(failed)} of {len(asked)} problems contradict the claim"
    return f"{estimator} is not {worst.check}: {contradicted}.\n{_lines(rows)}"


def _claimed(v: VerdictRow) -> str:
    if v.check == "unbiased":
        return "E ĝ = ∇J"
    return "E ĝ = κ ∇J" + ("" if v.claimed_scale is None else f" with κ = {number(v.claimed_scale)}")


def _how_sure(v: VerdictRow) -> str:
    return sampled_words(v) if v.sample else "exact, no sampling error"


def _measured(v: VerdictRow, m: MeasurementRow) -> str:
    if v.sample:
        numbers = ", ".join(f"{name} {with_ends(m, name)}" for name in ("rel", "scale", "off_axis"))
        return f"{numbers}, of {v.sample.batches:,} batches, seed {m.seed}; in brackets 95%"
    numbers = ", ".join(f"{name} {number(getattr(m, name))}" for name in ("rel", "scale", "cosine", "off_axis"))
    return f"{number(v.measured)} of max(‖∇J‖, √E‖ĝ‖²)  ({numbers})"


def _comparison_with(
    diagnosis: Diagnosis | None, estimator: str, problem: str, m: MeasurementRow | None, command: str
) -> str:
    """A command that compares the estimator with what it was found to be, else with a right one."""
    against = diagnosis.subject if diagnosis and diagnosis.kind == "identity" else "reward_to_go"
    against = "reward_to_go" if against.startswith("the gradient") else against
    named = problem.partition("@")[0] in {*registered_problems(), *heavy_problems()}
    if named and (shown := shell_name(command)):
        return f"pgcheck compare {shown} '{against}' --problem {problem}{_space(m)}"
    on = f'"{problem}"' if named else "problem"  # the command line does not know one of them
    return f'pgcheck.compare(["{against}", {estimator_code(command)}], {on})'


def _stale_part(estimator: str, v: VerdictRow) -> str:
    """A bias that is claimed and not there."""
    rows = [
        ("what", f"E ĝ = ∇J on every problem that meets the claim's conditions (worst: {v.reason})"),
        ("measured", number(v.measured)),
        ("allowed", f"more than {number(v.allowed)}, somewhere"),
        ("cause", "the estimator was mended and its claim is stale, or the problems have a blind spot"),
        ("next", "claim unbiased(), or add a problem that shows the bias"),
    ]
    return f"{estimator} claims to be biased, but no bias was found:\n{_lines(rows)}"


def _undecided_part(report: Report, estimator: str, undecided: Sequence[VerdictRow], command: str) -> str:
    """Every problem on which a sample did not decide, and what would; or why there was none."""
    first = undecided[0]
    if not first.sample:
        return f"{estimator}: INCONCLUSIVE on {len(undecided)} problem(s): {first.reason}"
    rows = [("what", f"{v.check} on '{v.problem or v.reason}': {sampled_words(v)}") for v in undecided[:4]]
    if len(undecided) > 4:
        rows.append(("and", f"{len(undecided) - 4} more"))
    m = report.cell(estimator, first.problem or first.reason)
    if m is not None and (seen := seen_words(m)):
        rows.append(("where", seen))
    draws = max((v.sample.needed or 0 for v in undecided if v.sample), default=0)
    name = first.problem or first.reason
    if name.partition("@")[0] in registered_problems() and draws:
        how = f"--engine monte_carlo --draws {draws}{_space(m)}"
        rows.append(("next", f"pgcheck compare {shell_name(command) or command} --problem {name} {how}"))
    else:
        rows.append(
            ("next", "a smaller problem, which can be enumerated; or an estimator with a lighter tail to compare with")
        )
    return f"{estimator}: INCONCLUSIVE on {len(undecided)} problem(s).\n" + _lines(rows)


def _space(m: MeasurementRow | None) -> str:
    """The option that has a command look where `m` was seen."""
    return "" if m is None or m.parameters is None else " --space parameters"


def _at(report: Report, m: MeasurementRow) -> str:
    k, a = m.worst_context or 0, m.worst_action or 0
    truth = next(p.gradient for p in report.problems if p.name == m.problem)
    if not m.expected or not truth:
        return "see the measurements"
    return f"E ĝ = {m.expected[k][a]:+.6g}, ∇J = {truth[k][a]:+.6g}"


def _step(report: Report, m: MeasurementRow) -> str:
    steps = next(p.steps for p in report.problems if p.name == m.problem)
    return f", mostly step t = {m.worst_step} of 0–{steps - 1}" if m.worst_step is not None and steps > 1 else ""


def _only_scale(report: Report, estimator: str) -> bool:
    findings = {m.finding for m in report.measurements if m.estimator == estimator}
    return "proportional" in findings and "biased" not in findings


def _check_part(estimator: str, failures: Sequence[VerdictRow], mistake: Diagnosis | None = None) -> str:
    first = failures[0]
    page = find_check(first.check).page
    where = ", ".join(v.problem for v in failures[:3]) + (" …" if len(failures) > 3 else "")
    rows = [("what", first_sentence(page)), ("where", where)]
    if first.reason:
        rows.append(("found", first.reason))
    else:
        rows.append(("measured", f"{number(first.measured)} (relative to the largest coefficient)"))
        rows.append(("allowed", number(first.allowed)))
    if mistake:
        rows.append(("cause", cause_of(mistake)))
    rows.append(("next", f"pgcheck explain {mistake.subject if mistake else first.check}"))
    return f"{estimator} fails {first.check}.\n" + _lines(rows)


# -- training steps

_ADVANTAGE = {
    "return": "the return",
    "leave-one-out": "the return less the mean of the other rows of the {over}",
    "less the mean": "the return less the mean of the {over}",
    "standardised": "(return − mean)/std of the {over}",
    "standardised (ddof 1)": "(return − mean)/std of the {over}, the std divided by n − 1",
}
_NORMALISER = {
    "rows": "summed over tokens",
    "lengths": "averaged over each row's tokens",
    "tokens": "averaged over all tokens of the batch",
    "micro": "averaged over the tokens of each micro-batch of {rows} row(s)",
}
_RATIO = {
    "": "",
    "token": ", times the token's ratio",
    "ppo_clip": ", times the clipped ratio of PPO",
    "trajectory": ", times the row's ratio",
}
_MASK = {
    "response": "",
    "prompt": "the mask lets the prompt in",
    "tool": "the mask lets in what the tool said",
    "all real": "the mask lets in the prompt and what the tool said",
    "padding": "the mask lets padding in",
    "all": "there is no mask: prompt and padding are trained on",
    "one padding": "the mask lets in the first padding token",
    "eos dropped": "the mask leaves out the eos, which is the padding token as well",
    "last dropped": "the mask leaves out the last token of each row",
    "first dropped": "the mask leaves out the first token of a row",
    "early": "the mask is one column too early",
    "late": "the mask is one column too late",
}
_LOGP = {
    "": "",
    "not shifted": "a token is scored by the logits of its own column, which have seen it; the column before predicts it",
    "shifted twice": "a token is scored by the logits two columns before it; it should be one",
    "of the token before": "what is gathered is the token one column before the one that is meant",
    "of the token after": "what is gathered is the token one column after the one that is meant",
    "logit": "it is the logit that is gathered, without log_softmax",
    "probability": "it is the probability that is gathered, without the log",
}


def _here(names: Sequence[str]) -> str:
    return f" (here {' = '.join(names)})" if names else ""


def step_cause(c: Cause) -> str:
    """A cause in words."""
    if c.kind == "zero":
        return (
            "its gradient is zero on every batch: is log π detached, or an `old` that carries gradient subtracted from it"
            " (exp(logp − logp))?"
        )
    if c.kind == "clipped":
        return (
            f"its norm is cut off at {number(c.factor)}: clipping is no linear function of ĝ, and the mean of clipped gradients"
            " has another direction; take clip_grad_norm_ out of the step"
        )
    if c.kind == "parameters":
        return f"it is ∇J exactly, in all parameters but {c.subject}"
    if c.factor == 1.0:
        factor = ""
    elif c.factor < 0 and abs(c.factor + 1.0) < 1e-9:
        factor = "−"
    else:
        factor = f"{number(c.factor)}{_here(c.named)} × "
    nearly = f", to {100 * c.gap:.2g}%" if c.gap else ""
    if c.kind == "gradient" and c.factor == 1.0:
        return "in expectation this is ∇J exactly"
    if c.kind == "gradient":
        hint = "the sign is flipped: .grad is of a loss, which is minimised" if c.factor < 0 else "a constant factor"
        return f"in expectation this is {factor}∇J exactly: {hint}"
    if c.kind == "estimator":
        return f"in expectation this is{nearly} {factor}`{c.subject}`{f': {c.mistake}' if c.mistake else ''}"
    return f"in expectation this is{nearly} {factor}{_put_together(c)}"


def _put_together(c: Cause) -> str:
    if c.parts is None:
        return ""
    x, over = (
        c.parts,
        {"group": "group", "batch": "whole batch"}.get(c.parts.over, f"micro-batch of {c.parts.rows} rows"),
    )
    made = f"Σ ({_ADVANTAGE[x.advantage].format(over=over)}) ∇log π{_RATIO[x.ratio]}, {_NORMALISER[x.normaliser]}"
    made = made.format(rows=x.rows)
    logp = _LOGP.get(x.logp, f"the logits are divided by {x.logp.removeprefix('temperature ')}")
    wrong = [w for w in (_MASK[x.mask], logp) if w]
    return made + (f"; {'; '.join(wrong)}" if wrong else "")


def step_message(report: Report, run: DirectMoments | None, cause: Cause | None = None) -> str:
    """Everything a reader needs about a training step's failed checks."""
    name = report.estimators[0].name
    bias = [v for v in report.failures if v.check in BIAS_CHECKS]
    parts = [_step_bias_part(report, name, bias[0], run, cause)] if bias and run is not None else []
    others = [v for v in report.failures if v.check not in BIAS_CHECKS]
    parts += [
        _step_differs(name, v, None if bias else cause) if v.check == "same_as" else _check_part(name, [v])
        for v in others
    ]
    return "\n\n".join(parts)


def _step_bias_part(report: Report, name: str, v: VerdictRow, run: DirectMoments, cause: Cause | None) -> str:
    m = report.measurements[0]
    claim = "E ĝ = ∇J" if v.check == "unbiased" else "E ĝ ≠ ∇J" if v.check == "biased" else "E ĝ = κ ∇J"
    order = " in every order, as the gradient depends on it" if run.ordered else ""
    rows = [
        (
            "what",
            f"{claim} in the {len(run.mean):,} parameters does not hold, where ĝ = −.grad; exact, no sampling error",
        ),
        ("how", f"{run.enumerated:,} runs of the step, one for each batch{order}, in {run.seconds:.0f} s"),
        ("where", _worst_parameters(report.parameters)),
        (
            "measured",
            f"{number(v.measured)} of max(‖∇J‖, √E‖ĝ‖²)  (rel {number(m.rel)}, scale {number(m.scale)}, cosine"
            f" {number(m.cosine)}, off_axis {number(m.off_axis)})",
        ),
        ("allowed", number(v.allowed)),
        ("cause", step_cause(cause) if cause else "nothing that was tried has this expectation"),
    ]
    if m.finding == "proportional" and v.check == "unbiased":
        rows.append(("note", "the direction is right; if the factor is meant, claim proportional()"))
    return f"{name} is not {v.check}.\n" + _lines(rows)


def _worst_parameters(rows: Sequence[ParameterRow]) -> str:
    worst = sorted(rows, key=lambda p: -p.gap)[:2]
    shown = [
        f"{p.name}: ‖E ĝ‖ = {number(p.expected_norm)}, ‖∇J‖ = {number(p.gradient_norm)}, gap {number(p.gap)}"
        for p in worst
    ]
    return "; ".join(shown) + (f"; {len(rows)} parameters in all" if len(rows) > len(worst) else "")


def _step_differs(name: str, v: VerdictRow, cause: Cause | None) -> str:
    rows = [
        ("what", "every batch gives the gradient of the estimator that the step implements"),
        ("measured", f"{number(v.measured)} (relative to the largest gradient), over random batches"),
        ("allowed", number(v.allowed)),
        ("cause", step_cause(cause) if cause else "nothing that was tried has this expectation"),
    ]
    return f"{name} fails same_as.\n" + _lines(rows)
