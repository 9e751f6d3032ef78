"""`pgcheck explain`: the page of a check, an estimator, a mistake, a problem or a quantity.

Checks and quantities say what they are in their docstrings; estimators, mistakes and problems in their entries, and the
numbers of their examples are measured when the page is asked for.

Guarantee: every page of a kind has the same parts, in the same order (`PARTS`), and none of them is empty.
"""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable, Sequence

from torch import Tensor

from pgcheck.engines.exact import exact_moments
from pgcheck.errors import PgcheckError, UnknownNameError
from pgcheck.estimators.base import Claim, Estimator, entropy_bonus, find_estimator, kl_penalty, registered_estimators
from pgcheck.estimators.broken import BROKEN, Broken
from pgcheck.estimators.lookup import as_estimator, command_name
from pgcheck.problem import Problem
from pgcheck.registry import find_problem, heavy_problems, registered_problems
from pgcheck.render.messages import first_sentence, number
from pgcheck.runs.suite import read_suite, shipped_suites
from pgcheck.verdicts.checks import Check, find_check, registered_checks
from pgcheck.verdicts.checks.bias import claims_on
from pgcheck.verdicts.quantities import Quantity, registered_quantities
from pgcheck.verdicts.verdict import measure

WIDTH = 96
PARTS = {
    "check": ("What it does", "Why it matters", "Example", "What to do", "References"),
    "estimator": ("What it is", "Claims", "Why it matters", "Example", "What to do", "Mistakes made from it", "References"),
    "mistake": ("What it is", "Why it matters", "Example", "What to do", "References"),
    "problem": ("What it is", "What it is for", "Example", "Numbers"),
    "quantity": ("What it is", "Arguments", "Sentences that it decides"),
}  # fmt: skip

# Cheap, and unlike each other: every mistake that moves E ĝ shows on one of them.
EXAMPLES = ("bandit/contextual", "dialogue/two-turn-action-clock", "off-policy/dialogue-stale")


def explain(name: str) -> str:
    """The page of whatever has that name.

    Raises:
        UnknownNameError: nothing of that name; suggests the nearest of all of them.
    """
    checks, estimators, problems = registered_checks(), registered_estimators(), registered_problems()
    quantities = registered_quantities()
    if name in checks:
        return _page(f"check {name} ({checks[name].kind})", "check", *_check_parts(checks[name]))
    if name in BROKEN:
        mistake = BROKEN[name]
        return _page(f"mistake {name}, made from {mistake.sound.name}", "mistake", *_mistake_parts(mistake))
    if name.partition("@")[0] in {*problems, *heavy_problems()}:
        return _page(f"problem {name}", "problem", *_problem_parts(find_problem(name)))
    if name in quantities:
        return _page(f"quantity {name}", "quantity", "", _quantity_parts(quantities[name]))
    try:
        found = as_estimator(name)
    except UnknownNameError:
        hint = "`pgcheck list checks`, `… estimators`, `… problems` and `… quantities` show them all."
        known = [*checks, *estimators, *problems, *BROKEN, *quantities]
        raise UnknownNameError("check, estimator, problem or quantity", name, known, hint=hint) from None
    return _page(f"estimator {found.name}", "estimator", *_estimator_parts(found, name))


def _page(title: str, kind: str, lead: str, parts: dict[str, str]) -> str:
    """A title, its first sentence, and the parts of its kind, each indented under its name."""
    blocks = [title, *([_filled(lead)] if lead else [])]
    blocks += [f"{part}\n{textwrap.indent(parts[part], '  ')}" for part in PARTS[kind]]
    return "\n\n".join(blocks)


def _filled(text: str, *, width: int = WIDTH - 2) -> str:
    return textwrap.fill(" ".join(text.split()), width, break_long_words=False, break_on_hyphens=False)


def _listed(rows: Sequence[tuple[str, str]]) -> str:
    """Names and what is said of them, in two columns."""
    wide = max(len(name) for name, _ in rows) + 2
    lines = []
    for name, text in rows:
        filled = _filled(text, width=WIDTH - 2 - wide).split("\n")
        lines += [name.ljust(wide) + filled[0], *(" " * wide + line for line in filled[1:])]
    return "\n".join(lines)


def _table(rows: Sequence[Sequence[str]], *, words: int = 2) -> str:
    """Columns as wide as they need to be: the first `words` of them to the left, numbers to the right."""
    full = [[*row, *[""] * (max(map(len, rows)) - len(row))] for row in rows]
    widths = [max(map(len, column)) for column in zip(*full, strict=True)]
    pad = [str.ljust] * words + [str.rjust] * (len(widths) - words)
    return "\n".join("  ".join(p(x, w) for p, x, w in zip(pad, row, widths, strict=True)).rstrip() for row in full)


# -- checks: the docstring is the page


def page_parts(page: str) -> tuple[str, dict[str, list[str]]]:
    """The first sentence of a check's docstring and the lines of its parts, "Part: text …" with code indented."""
    lines = inspect.cleandoc(page).split("\n")
    parts: dict[str, list[str]] = {}
    current: list[str] = []
    lead = current
    for line in lines:
        head, colon, rest = line.partition(":")
        if colon and head in PARTS["check"]:
            current = parts.setdefault(head, [])
            line = rest.strip()
        current.append(line)
    return " ".join(" ".join(lead).split()), parts


def example_code(page: str) -> str:
    """The code of a check's example: it defines a `loss` or an `estimator` that fails the check."""
    _, parts = page_parts(page)
    return textwrap.dedent("\n".join(line for line in parts.get("Example", []) if line.startswith("    ")))


def _prose(check: Check, part: str) -> str:
    """A part of a check's page without its code, as one sentence or more."""
    lines = page_parts(check.page)[1].get(part, [])
    text = " ".join(line for line in lines if not line.startswith("    "))
    return text[:1].upper() + text[1:]


def _check_parts(check: Check) -> tuple[str, dict[str, str]]:
    lead, parts = page_parts(check.page)
    out = {name: _filled(_prose(check, name)) for name in parts}
    if code := example_code(check.page):
        out["Example"] += "\n\n" + textwrap.indent(code, "    ")
    shown = [name for name, b in BROKEN.items() if check.name in b.caught_by]
    if shown:
        out["Example"] += "\n\n" + _filled(
            f"Mistakes that it finds: {', '.join(shown)} (`pgcheck explain` tells each)."
        )
    if check.asked:
        out["What it does"] += "\n" + _filled(f"It is asked only {check.asked}.")
    return lead, out


# -- estimators


def _claim_line(claim: Claim) -> tuple[str, str]:
    what = {"unbiased": "E ĝ = ∇J", "proportional": "E ĝ = κ ∇J", "biased": "E ĝ ≠ ∇J"}[claim.kind]
    if callable(claim.scale):
        what += f", κ = {inspect.cleandoc(claim.scale.__doc__ or 'a function of B and G').split(':')[0].rstrip('.')}"
    elif claim.scale is not None:
        what += f", κ = {claim.scale:g}"
    under = f", {' and '.join(c.name for c in claim.conditions)}" if claim.conditions else ", everywhere"
    return claim.kind, what + under + (f": {claim.reason}" if claim.reason else "")


def _estimator_parts(e: Estimator, name: str) -> tuple[str, dict[str, str]]:
    looks = {
        "trajectory": "its own rollout only",
        "group": f"the rollouts of its group, of at least {e.min_group_size}",
        "batch": "the whole batch",
    }[e.couples]
    fn = e.coefficients
    own = inspect.cleandoc(getattr(fn, "loss", fn).__doc__ or "")
    about = e.about or first_sentence(own) or "A loss of your own, without a docstring."
    mistakes = [
        (n, f"{b.mistake} Caught by {', '.join(b.caught_by)}.") for n, b in BROKEN.items() if b.sound.name == e.name
    ]
    what = [("ĝ", e.formula or "Σ c ∇log π, c = −∂loss/∂logp"), ("looks at", looks)]
    if e.on_policy_limit:
        what.append(("on-policy", f"it is {e.on_policy_limit}, row by row"))
    others = [other for other in _yardsticks(e) if other.name != e.name]
    names = " ".join(command_name(x.name) if x is not e else command_name(name) for x in [e, *others])
    shown = _examples(e)
    example = f"$ pgcheck compare {names}" + "".join(f" \\\n    --problem {p}" for p in shown)
    return about, {
        "What it is": _listed(what),
        "Claims": _listed([_claim_line(c) for c in e.claims]) if e.claims else "none",
        "Why it matters": _filled(_why(e)),
        "Example": f"{example}\n\n{_numbers_of(e, *others, problems=shown)}",
        "What to do": _filled(_what_to_do(e)),
        "Mistakes made from it": _listed(mistakes) if mistakes else "none that pgcheck keeps",
        "References": _filled(e.reference or "none given"),
    }


def _kinds(e: Estimator) -> set[str]:
    return {c.kind for c in e.claims}


def _yardsticks(e: Estimator) -> tuple[Estimator, Estimator]:
    """What is unbiased and looks at the same rows, on-policy; and off-policy."""
    return find_estimator("reward_to_go" if e.couples == "trajectory" else "leave_one_out"), find_estimator(
        "per_decision_is"
    )


def _why(e: Estimator) -> str:
    if "biased" in _kinds(e):
        return (
            "More data does not remove a bias, and its direction decides what is learned in the end. In the table below,"
            " `scale` is the part of ∇J that is there, and `off_axis` the part of E ĝ that points elsewhere."
        )
    if "proportional" in _kinds(e):
        return (
            "The direction is right and the length is not: the learning rate is another one than was set, and moves with"
            " the size of the batch or group. Comparisons at one learning rate compare the factor, too."
        )
    return (
        "Where the claim holds, more data brings it as close to ∇J as one likes, so that estimators of its kind differ in"
        " variance alone: `tr Cov` below is that of one batch. Elsewhere nothing is promised."
    )


def _what_to_do(e: Estimator) -> str:
    on_policy, off_policy = _yardsticks(e)
    if "biased" in _kinds(e):
        return (
            "Where off_axis is 0, a learning rate mends it. Where it is not, either E ĝ is what you mean to follow, or take"
            f" what the claim names out of the coefficients. `{on_policy.name}` is unbiased on-policy and looks at no more"
            f" than this does; `{off_policy.name}` is unbiased off-policy."
        )
    if "proportional" in _kinds(e):
        return f"Divide by κ, or take the own row out of what is subtracted: `{on_policy.name}` is unbiased."
    return "Compare its variance with that of others on problems like yours (`× least`); no bias is in the way."


def _examples(e: Estimator) -> tuple[str, ...]:
    """The example problems, the last of them one with the objective that the estimator is made for."""
    made_for = {c for claim in e.claims for c in claim.conditions}
    if kl_penalty in made_for:
        return (*EXAMPLES[:2], "kl/tree")
    return (*EXAMPLES[:2], "entropy/tree") if entropy_bonus in made_for else EXAMPLES


def _numbers_of(*estimators: Estimator, problems: Sequence[str] = EXAMPLES) -> str:
    """What was measured on the example problems, as lines."""
    rows = []
    for p in map(find_problem, problems):
        rows += [(p.name,), *((f"  {e.name}", *_measured(e, p)) for e in estimators)]
    return _table([("", *_COLUMNS), *rows])


_COLUMNS = ("finding", "rel", "scale", "off_axis", "tr Cov")


def _measured(e: Estimator, p: Problem) -> tuple[str, str, str, str, str]:
    if not e.fits(p):
        return "not asked", "", "", "", ""
    try:
        (moments,) = exact_moments([e], p)
    except PgcheckError as error:
        return type(error).__name__, "", "", "", ""
    m = measure(e, p, moments)
    return m.finding, number(m.rel), number(m.scale), number(m.off_axis), number(m.total_variance)


# -- mistakes


def _mistake_parts(mistake: Broken) -> tuple[str, dict[str, str]]:
    e, sound = mistake.estimator, mistake.sound
    fn = e.coefficients
    source = inspect.getsource(getattr(fn, "loss", fn))
    source = re.sub(r'    """.*?"""\n', "", source[source.index("def ") :], count=1, flags=re.DOTALL)  # it is the lead
    checks = [find_check(name) for name in mistake.caught_by]
    moves = (
        "It moves E ĝ, so that something else is learned."
        if mistake.moves
        else "E ĝ is what it was on problems like these; single batches show it."
    )
    problems = (mistake.shows_on, *EXAMPLES[1:]) if mistake.shows_on else EXAMPLES
    matters = [_prose(c, "Why it matters") for c in checks]
    todo = f"{_prose(checks[0], 'What to do')} The sound version: `pgcheck explain {command_name(sound)}`."
    return mistake.mistake, {
        "What it is": _listed(
            [
                ("instead of", f"{sound.name}: {sound.formula}"),
                *(("caught by", f"{c.name}: {first_sentence(c.page)}") for c in checks),
            ]
        ),
        "Why it matters": _filled(" ".join([moves, *matters])),
        "Example": f"{source.rstrip()}\n\n{_numbers_of(e, sound, problems=problems)}",
        "What to do": _filled(todo),
        "References": _filled(sound.reference),
    }


# -- problems


def _has_observation(p: Problem) -> bool:
    paths = p.trajectories.paths
    return bool(((paths.mask == 0) & (paths.mask.flip(-1).cumsum(-1).flip(-1) > 0)).any())


_SHOWS: tuple[tuple[Callable[[Problem], bool], str, str], ...] = (
    (
        lambda p: not p.plain_objective,
        "a KL or entropy term in the objective: what a penalty, in the reward or as a loss, is the gradient of",
        "",
    ),
    (
        lambda p: p.trajectories.paths.steps > 1,
        "more than one step: credit, rewards before an action, ratios of other steps",
        "one step only: every credit assignment is right, and a token ratio is the trajectory's",
    ),
    (
        lambda p: not p.fixed_length,
        "rows of several lengths: means over tokens, over own lengths, over the rows still alive",
        "rows of one length: a division by lengths is a constant",
    ),
    (
        _has_observation,
        "observation positions inside rows: masks, and rewards that nobody acted for",
        "no observation inside a row: a mask only cuts padding off",
    ),
    (
        lambda p: p.discount < 1,
        "γ < 1: a missing γ^t, a sum that is not discounted",
        "γ = 1: a missing γ^t",
    ),
    (
        lambda p: p.discount < 1 and p.trajectories.paths.discount_clock == "action",
        "a γ that counts actions: one that counts observations, too",
        "",
    ),
    (
        lambda p: int((p.trajectories.paths.start_probability > 0).sum()) > 1,
        "several starts: baselines that mix prompts",
        "one start: a baseline that mixes prompts",
    ),
    (
        lambda p: p.groups > 1,
        "several groups in a batch: statistics over the batch for statistics over a group",
        "one group: the batch's mean is the group's",
    ),
    (
        lambda p: len(set(p.sizes)) > 1,
        "groups of unequal size: a G that is read from a configuration, a statistic that takes all groups for one size",
        "groups of one size: what takes them for such",
    ),
    (
        lambda p: len(p.trajectories.rows_as_batch().episode_return.unique()) > 2,
        "returns of more than two values: a std that bends the direction",
        "returns of two values at most: a group's std only weighs prompts by their difficulty",
    ),
    (lambda p: p.rows > p.groups, "", "groups of one: nothing that needs another row"),
    (lambda p: not p.on_policy, "an old policy: ratios, their clips, their support", "on-policy: every ratio is 1"),
    (lambda p: p.full_support, "", "rollouts that the sampler cannot draw are missing from every estimate"),
)  # (fact, what it shows, what it hides where the fact does not hold)


_COMPARED = ("reward_to_go", "leave_one_out", "per_decision_is", "grpo")
_COMPARED_WITH_KL = ("'kl_in_reward(k1)'", "'kl_loss(k2, sequence)'", "'kl_loss(k3, token)'")
_COMPARED_WITH_ENTROPY = ("reinforce", "entropy_in_reward", "'entropy_bonus(token)'")


def _compared(p: Problem) -> tuple[str, ...]:
    """As a shell takes them: those that are made for the objective."""
    if p.kl_coefficient:
        return _COMPARED_WITH_KL
    return _COMPARED_WITH_ENTROPY if p.entropy_coefficient else _COMPARED


def _claimed(e: Estimator, p: Problem) -> str:
    return ", ".join(c.kind for c in claims_on(e, p)) or "nothing here"


def _objective(p: Problem) -> str:
    kl, entropy = p.kl_coefficient, p.entropy_coefficient
    kl_term = [f"less {kl:g} × KL to the reference"] if kl else []
    return " ".join(["return", *kl_term, *([f"plus {entropy:g} × entropy"] if entropy else [])])


_SHOWN_ACTIONS = 20


def _gradient_row(g: Tensor) -> str:
    """∇J of one context; of many actions, the largest five."""
    if len(g) <= _SHOWN_ACTIONS:
        return "  ".join(f"{x:+.6f}" for x in g.tolist())
    largest = g.abs().topk(5).indices.tolist()
    return "  ".join(f"{a}: {float(g[a]):+.6f}" for a in largest) + "  …"


def _problem_parts(p: Problem) -> tuple[str, dict[str, str]]:
    t, g = p.trajectories, p.gradient()
    shows = [shown for fact, shown, _ in _SHOWS if shown and fact(p)] or [
        "the estimator by itself: nothing else is in the way"
    ]
    hides = [hidden for fact, _, hidden in _SHOWS if hidden and not fact(p)] or [
        "nothing of what the named problems show"
    ]
    sampler = "the policy itself" if p.on_policy else "another policy"
    example = f"$ pgcheck compare {' '.join(_compared(p))} \\\n    --problem {p.name}"
    rows = [
        (e.name, _claimed(e, p), *_measured(e, p)) for e in (find_estimator(name.strip("'")) for name in _compared(p))
    ]
    numbers = [
        ("rollouts", f"N = {len(t)} of up to {t.paths.steps} positions, {len(t.paths.start_probability)} start(s)"),
        ("policy", f"K = {t.contexts} contexts, A = {t.actions} actions"),
        ("batch", f"B = {p.rows} rows: groups of {'+'.join(str(s) for s in p.sizes)}"),
        ("discount", f"γ = {p.discount:g}, counted by {t.paths.discount_clock}"),
        ("sampler", sampler + ("" if p.full_support else ", which cannot draw everything the policy can")),
        *([] if p.plain_objective else [("objective", _objective(p))]),
        ("J", number(p.value())),
        ("∇J", f"norm {number(float(g.norm()))}"),
        *((f"  context {k}", _gradient_row(g[k])) for k in range(t.contexts)),
        ("digest", p.digest),
    ]
    return "", {
        "What it is": _filled(p.about),
        "What it is for": _listed([*(("shows", s) for s in shows), *(("hides", h) for h in hides)]),
        "Example": f"{example}\n\n{_table([('', 'claims', *_COLUMNS), *rows], words=3)}",
        "Numbers": _listed(numbers),
    }


# -- quantities: the docstring is what they are


def _quantity_parts(quantity: Quantity) -> dict[str, str]:
    decides = [
        (name, f"{case.name} ({case.truth}): {case.says}")
        for name, path in shipped_suites().items()
        for case in read_suite(path).case
        if case.quantity == quantity.name
    ]
    arguments = [
        (name, kind.__name__.lower() + ("" if name in quantity.required else ", may be left out"))
        for name, kind in quantity.parameters.items()
    ]
    return {
        "What it is": "\n\n".join(map(_filled, quantity.page.split("\n\n"))),
        "Arguments": _listed(arguments),
        "Sentences that it decides": _listed(decides) if decides else "none of the suites that come with pgcheck",
    }
