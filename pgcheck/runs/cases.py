"""Cases: sentences about policy gradients, each decided by one exact number.

    [[case]]
    name = "batch-mean-keeps-the-gradient"
    says = "Subtracting the mean return of the batch leaves the gradient unbiased."
    source = "lecture notes"
    truth = "wrong"                       # what pgcheck holds of the sentence
    quantity = "scale"                    # a function of `pgcheck.verdicts.quantities`, and its arguments
    estimator = "batch_mean"
    problem = "mdp/two-state"
    equals = 1                            # the sentence holds if the number does this
    number = "(B-1)/B"                    # optional: what the number is known to be, in closed form
    because = "The own return is in the mean, and cancels 1/B of the signal."

An argument given as a list is quantified over, and a pattern of problems stands for every problem it matches: the
sentence holds if the relation does for every combination, and the number shown is the one that says most against it.
`groups` and `group_size` give problems batches of another shape. Numbers may be formulas (`formula`).

Guarantee: a case passes only if (the sentence holds) == (truth is "right") *and* the number is what `number` says; a
number that is not finite, or cannot be had, decides nothing and never passes.
"""

from __future__ import annotations

import ast
import functools
import itertools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from pgcheck.errors import UnknownNameError, UsageError
from pgcheck.estimators.base import Estimator
from pgcheck.estimators.lookup import as_estimator
from pgcheck.problem import Problem
from pgcheck.registry import find_problem, heavy_problems, known_problem, problem_names, registered_problems
from pgcheck.runs.report import CaseRow
from pgcheck.verdicts.quantities import Found, Quantity, find_quantity
from pgcheck.verdicts.verdict import RTOL, Status

Amount = Annotated[float, Field(strict=True)] | str  # a number, or a formula that gives one
RELATIONS = {"equals": "=", "differs_from": "≠", "above": ">", "below": "<", "at_least": "≥", "at_most": "≤"}


class Case(BaseModel):
    """One `[[case]]` entry; keys that are not fields are arguments of the quantity."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str = Field(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$")
    says: str = Field(min_length=1)
    source: str = Field(min_length=1)
    truth: Literal["right", "wrong"]
    quantity: str
    equals: Amount | None = None
    differs_from: Amount | None = None
    above: Amount | None = None
    below: Amount | None = None
    at_least: Amount | None = None
    at_most: Amount | None = None
    number: Amount | None = None
    groups: Any = None
    group_size: Any = None
    because: str = Field(min_length=1)

    @property
    def relations(self) -> dict[str, Amount]:
        """What the number has to do, all of it."""
        return {name: x for name in RELATIONS if (x := getattr(self, name)) is not None}

    @property
    def arguments(self) -> dict[str, Any]:
        """What the quantity is asked of."""
        return dict(self.model_extra or {})


# -- formulas

_OPERATORS: dict[type[ast.AST], Callable[..., float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
    ast.USub: operator.neg,
}
_FUNCTIONS: dict[str, Callable[[float], float]] = {"sqrt": math.sqrt, "exp": math.exp, "log": math.log}


def formula(text: Amount, letters: Mapping[str, float]) -> float:
    """The number that `text` says: + − * / **, brackets, sqrt, exp, log and the letters given.

    Raises:
        UsageError: it does not parse, has another letter in it, or has no finite real value.
    """
    if isinstance(text, bool) or not isinstance(text, (int, float, str)):
        raise UsageError(f"formula {text!r}: expected a number or a formula.")

    def value(node: ast.AST) -> float:
        if isinstance(node, ast.Expression):
            return value(node.body)
        if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)) and not isinstance(node.value, bool):
            return float(node.value)
        if isinstance(node, ast.Name) and node.id in letters:
            return letters[node.id]
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
            return _OPERATORS[type(node.op)](value(node.left), value(node.right))
        if isinstance(node, ast.UnaryOp) and type(node.op) in _OPERATORS:
            return _OPERATORS[type(node.op)](value(node.operand))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS:
            (argument,) = node.args
            return _FUNCTIONS[node.func.id](value(argument))
        raise ValueError(f"'{ast.unparse(node)}' is not understood")

    try:
        out = value(ast.parse(text.strip(), mode="eval")) if isinstance(text, str) else float(text)
        if isinstance(out, complex) or not math.isfinite(out):
            raise ValueError(f"it is {out}")
        return out
    except (SyntaxError, ValueError, ArithmeticError) as error:
        why = "it does not parse" if isinstance(error, SyntaxError) else str(error)
        allowed = ", ".join([*letters, *_FUNCTIONS])
        raise UsageError(f"formula '{text}': {why}; it may hold numbers, + - * / **, brackets and {allowed}.") from None


# -- what a case is about


_NOT_BUILT = {"B": 5.5, "T": 3.5, "gamma": 0.9, "G": 2.5}  # what a formula is tried with where no problem is at hand


@dataclass(frozen=True)
class Subject:
    """One combination of arguments: what the number is of, as it stands in the file, and resolved."""

    named: Mapping[str, Any]
    arguments: Mapping[str, Any]

    @property
    def letters(self) -> dict[str, float]:
        """B rows, G rows a group, T steps and gamma of the problem; and the arguments that are numbers."""
        out: dict[str, float] = {}
        problem = self.arguments.get("problem")
        if isinstance(problem, Problem):
            out = {
                "B": problem.rows,
                "T": problem.trajectories.paths.steps,
                "gamma": problem.discount,
            }
            if len(set(problem.sizes)) == 1:
                out["G"] = problem.sizes[0]
        elif "problem" in self.named:
            out = dict(_NOT_BUILT)
        numbers = {k: float(x) for k, x in self.named.items() if isinstance(x, (int, float))}
        return out | numbers


@functools.cache
def _problem(name: str, groups: int | None, group_size: int | tuple[int, ...] | None) -> Problem:
    """The named problem, with batches of another shape if one is given; the same object each time."""
    problem = find_problem(name)
    if groups is None and group_size is None:
        return problem
    size = problem.group_size if group_size is None else group_size
    return problem.with_sampling(groups=problem.groups if groups is None else groups, group_size=size)


def _listed(x: Any) -> list[Any]:
    return x if isinstance(x, list) else [x]


def _problems(patterns: Any) -> list[str]:
    names: dict[str, None] = {}
    for pattern in _listed(patterns):
        if not isinstance(pattern, str):
            raise UsageError(f"problem: {pattern!r}; expected an id or a pattern.")
        base, _, draw = pattern.partition("@")
        found = problem_names(base)
        if not found:
            raise UnknownNameError("problem", pattern, [*registered_problems(), *heavy_problems()])
        names |= dict.fromkeys(f"{name}@{draw}" if draw else name for name in found)
    return list(names)


def subjects(case: Case, *, load: bool = True) -> list[Subject]:
    """Every combination of arguments that the sentence is about; without `load`, heavy problems are left out of them, which
    takes a pretrained model half a minute.

    Raises:
        UsageError: an unknown quantity, estimator or problem; an argument missing, unknown or of the wrong type.
    """
    quantity = find_quantity(case.quantity)
    given = case.arguments
    takes_problem = any(kind is Problem for kind in quantity.parameters.values())
    for name in given:
        if name not in quantity.parameters:
            fields = [f for f in Case.model_fields if takes_problem or f not in ("groups", "group_size")]
            hint = f"'{quantity.name}' takes {', '.join(quantity.parameters)}; a case has {', '.join(fields)}."
            raise UnknownNameError("key", name, [*quantity.parameters, *fields], hint=hint)
    missing = [name for name in quantity.parameters if name in quantity.required and name not in given]
    if missing:
        raise UsageError(f"quantity '{quantity.name}' needs {', '.join(missing)}.")
    choices = {
        name: _problems(x) if quantity.parameters[name] is Problem else _values(x, quantity.parameters[name])
        for name, x in given.items()
    }
    for name, x in (*choices.items(), ("groups", case.groups), ("group_size", case.group_size)):
        if x == []:
            raise UsageError(f"{name}: an empty list; of nothing, everything is true.")
    sampling = {name: _listed(getattr(case, name)) for name in ("groups", "group_size")}
    out = []
    for combination in itertools.product(*choices.values(), *sampling.values()):
        named = dict(zip([*choices, *sampling], combination, strict=True))
        out.append(_subject(quantity, named, load=load))
    return out


def _values(x: Any, kind: type) -> list[Any]:
    """The choices of one argument; one that is a list itself is given as a list, or as a list of lists."""
    if kind is list:
        return x if isinstance(x, list) and x and isinstance(x[0], list) else [x]
    return _listed(x)


def _subject(quantity: Quantity, named: Mapping[str, Any], *, load: bool) -> Subject:
    groups, shape = named.get("groups"), named.get("group_size")
    size = tuple(shape) if isinstance(shape, list) else shape
    for name, x in (("groups", groups), *(("group_size", n) for n in (size if isinstance(size, tuple) else (size,)))):
        if x is not None and type(x) is not int:
            raise UsageError(f"{name}: {x!r}; expected a positive integer.")
    resolved: dict[str, Any] = {}
    kinds = quantity.parameters
    for name, x in named.items():
        if name in kinds and kinds[name] is Problem:
            base, _ = known_problem(x)
            if load or base not in heavy_problems():
                resolved[name] = _problem(x, groups, size)
    subject = Subject({k: x for k, x in named.items() if x is not None}, resolved)
    for name, x in named.items():
        kind = kinds.get(name)
        if kind is Estimator:
            resolved[name] = as_estimator(x)
        elif kind is float:
            resolved[name] = formula(x, subject.letters)
        elif kind is not None and kind is not Problem:
            if type(x) is not kind:
                raise UsageError(f"{name}: {x!r}; '{quantity.name}' takes {_KINDS.get(kind, kind.__name__)} there.")
            resolved[name] = x
    for name, x in resolved.items():
        if isinstance(x, Estimator):
            for p in resolved.values():
                if isinstance(p, Problem) and not x.fits(p):
                    raise UsageError(f"{name}: '{x.name}' needs groups of at least {x.min_group_size} on '{p.name}'.")
    return Subject(subject.named, resolved)


_KINDS = {int: "an integer", str: "a word", list: "a list of integers"}


# -- judging


def _holds(relation: str, value: float, target: float) -> bool:
    room = RTOL * max(1.0, abs(target))
    return {
        "equals": abs(value - target) <= room,
        "differs_from": abs(value - target) > room,
        "above": value > target + room,
        "below": value < target - room,
        "at_least": value >= target - room,
        "at_most": value <= target + room,
    }[relation]


def _against(relation: str, value: float, target: float) -> float:
    """How much a number says against the relation: larger is worse."""
    return {
        "equals": abs(value - target),
        "differs_from": -abs(value - target),
        "above": target - value,
        "below": value - target,
        "at_least": target - value,
        "at_most": value - target,
    }[relation]


def check_case(case: Case) -> None:
    """Look up every name and formula of a case; nothing is computed, and no heavy problem built.

    Raises:
        UsageError: see `subjects` and `formula`.
    """
    asked = subjects(case, load=False)
    if not case.relations:
        raise UsageError(f"nothing decides it; give one of {', '.join(RELATIONS)}.")
    for subject in asked:
        for amount in (*case.relations.values(), *([] if case.number is None else [case.number])):
            formula(amount, subject.letters)


def judge_case(case: Case) -> CaseRow:
    """Compute the number for every subject, and judge the sentence."""
    asked = subjects(case)
    try:
        return decide(case, numbers_of(case, asked))
    except (UsageError, ArithmeticError, ValueError, IndexError) as error:  # too many batches, a division by 0, …
        reason = str(error) if isinstance(error, UsageError) else f"{type(error).__name__}: {error}"
        return _row(case, asked[0], len(asked), status=Status.INCONCLUSIVE, reason=reason)


def numbers_of(case: Case, asked: Sequence[Subject]) -> list[tuple[Subject, Found]]:
    """The number of every subject."""
    quantity = find_quantity(case.quantity)
    return [(s, quantity(**s.arguments)) for s in asked]


def decide(case: Case, numbers: Sequence[tuple[Subject, Found]]) -> CaseRow:
    """The verdict on a sentence, given its numbers."""

    def against(pair: tuple[Subject, Found]) -> float:
        s, x = pair
        return max(_against(r, x.value, formula(a, s.letters)) for r, a in case.relations.items())

    for s, x in numbers:
        if not math.isfinite(x.value):
            return _row(case, s, len(numbers), status=Status.INCONCLUSIVE, reason=f"the number is {x.value}")
    holds = all(_holds(r, x.value, formula(a, s.letters)) for s, x in numbers for r, a in case.relations.items())
    worst, number = max(numbers, key=against)
    status, reason = Status.PASS, ""
    if holds != (case.truth == "right"):
        status, reason = Status.FAIL, f"the sentence {'holds' if holds else 'does not hold'}"
    elif case.number is not None and not _holds("equals", number.value, known := formula(case.number, worst.letters)):
        status, reason = Status.FAIL, f"the number is not {_written(case.number)}, which is {known:.10g}"
    beside = {name: float(x) for name, x in number.beside.items() if math.isfinite(x)}
    return _row(case, worst, len(numbers), status=status, reason=reason, value=number.value, beside=beside, holds=holds)


def _written(amount: Amount) -> str:
    return amount if isinstance(amount, str) else f"{amount:g}"


def _row(case: Case, subject: Subject, asked: int, **found: Any) -> CaseRow:
    return CaseRow(
        name=case.name,
        says=case.says,
        source=case.source,
        truth=case.truth,
        quantity=case.quantity,
        subject={k: str(x) for k, x in subject.named.items()},
        asked=asked,
        relation=" and ".join(f"{RELATIONS[r]} {_written(x)}" for r, x in case.relations.items()),
        number=None if case.number is None else _written(case.number),
        because=case.because,
        **found,
    )
