"""Suites: which estimators on which problems, as TOML.

    name = "core"
    about = "…"
    estimators = ["reinforce", "pkg.mod:my_loss"]    # or "all": the zoo
    problems = ["bandit/two-arm", "mdp/*", "core"]   # ids, patterns, or sets
    thetas = 2                                       # each problem at this many θ
    checks = ["unbiased", "biased"]                  # optional: default, all
    budget = 5000000                                 # optional: most batches a cell that are enumerated
    engine = "auto"                                  # optional: "exact" (default), "monte_carlo", or "auto": what fits
    tolerance = 0.05                                 # optional, of sampled verdicts, as `alpha`, `beta`, `draws`, `seed`
    bounds = [-3.0, 3.0]                             # optional: known of every estimator here, as of `pgcheck.Sampling`
    space = "parameters"                             # optional: where E ĝ is held against ∇J; default, "logits"
    own_problems = ["bandit/*"]                      # optional: what estimators from outside are judged on

    [[expect]]                                       # optional: what is expected on one problem
    estimator = "token_is"
    problem = "off-policy/contextual-drifted"
    finding = "unbiased"                             # or "inconclusive", of what no sample of this size decides

    [[case]]                                         # optional: a sentence and the number that decides it
    name = "…"                                       # see `pgcheck.runs.cases`

A suite has estimators and problems, or cases, or both.

Guarantee: an unknown key, a misspelt name or a wrong type is one error that names the file, the field and the mend.
"""

from __future__ import annotations

import tomllib
from dataclasses import fields
from importlib import resources
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pgcheck.engines.choice import Engine
from pgcheck.engines.exact import DEFAULT_BUDGET
from pgcheck.engines.moments import Progress
from pgcheck.engines.monte_carlo import DEFAULT_DRAWS, Sampling
from pgcheck.errors import SuiteError, UnknownNameError, UsageError
from pgcheck.estimators.base import Estimator, registered_estimators
from pgcheck.estimators.lookup import as_estimator
from pgcheck.problem import Problem
from pgcheck.registry import (
    find_problem,
    heavy_problems,
    known_problem,
    problem_names,
    problem_sets,
    registered_problems,
)
from pgcheck.runs.cases import Case, check_case
from pgcheck.runs.report import Report
from pgcheck.runs.runner import Expectation, run
from pgcheck.verdicts.checks import find_check
from pgcheck.verdicts.verdict import Finding, Space


class ExpectRow(BaseModel):
    """One `[[expect]]` entry."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    estimator: str
    problem: str
    finding: Finding


class Suite(BaseModel):
    """A suite file."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str = Field(min_length=1)
    about: str = ""
    estimators: Literal["all"] | list[str] = []
    problems: list[str] = []
    own_problems: list[str] | None = None
    thetas: int = Field(default=1, ge=1, le=8)
    checks: list[str] | None = None
    budget: int = Field(default=DEFAULT_BUDGET, ge=1)
    engine: Engine = "exact"
    seed: int = Field(default=0, ge=0)
    draws: int = Field(default=DEFAULT_DRAWS, ge=1)
    tolerance: float = Field(default=Sampling.tolerance, gt=0, lt=1)
    alpha: float = Field(default=Sampling.alpha, gt=0, lt=0.5)
    beta: float = Field(default=Sampling.beta, gt=0, lt=0.5)
    device: str = Sampling.device
    bounds: tuple[float, float] | None = Sampling.bounds
    space: Space = "logits"
    expect: list[ExpectRow] = []
    case: list[Case] = []

    @model_validator(mode="after")
    def _has_something_to_ask(self) -> Suite:
        if bool(self.estimators) != bool(self.problems) or not (self.estimators or self.case):
            lacking = "problems" if self.estimators else "estimators"
            raise ValueError(f"field '{lacking}': none; a suite has estimators and problems, or cases")
        return self

    def resolve_estimators(self) -> list[Estimator]:
        """The estimators, in the order of the file."""
        if self.estimators == "all":
            return list(registered_estimators().values())
        return [as_estimator(name) for name in self.estimators]

    def resolve_problems(self, *, own: bool = False) -> list[Problem]:
        """The problems: patterns expanded, each once, every θ of one next to each other.

        `own`: those that estimators from outside the suite are judged on. A plain loss claims to be unbiased, full stop;
        on off-policy problems most of them do not mean it.
        """
        patterns = self.own_problems if own and self.own_problems is not None else self.problems
        return problems_matching(patterns, thetas=self.thetas)

    @property
    def sampling(self) -> Sampling:
        """How it samples."""
        return Sampling(
            **{f.name: getattr(self, f.name) for f in fields(Sampling) if f.name in type(self).model_fields}
        )

    def run(
        self,
        *,
        estimators: list[Estimator] | None = None,
        budget: int | None = None,
        engine: Engine | None = None,
        sampling: Sampling | None = None,
        progress: Progress | None = None,
    ) -> Report:
        """Run it, with other estimators and settings in place of its own if given."""
        if estimators is not None and not self.problems and not self.own_problems:
            raise UsageError(
                f"suite '{self.name}' has cases only, and no problems to judge another estimator on; run core."
            )
        chosen = self.resolve_estimators() if estimators is None else estimators
        names = {e.name for e in chosen}
        return run(
            chosen,
            self.resolve_problems(own=estimators is not None),
            suite=self.name,
            checks=self.checks,
            expectations=[Expectation(x.estimator, x.problem, x.finding) for x in self.expect if x.estimator in names],
            cases=self.case if estimators is None else (),
            budget=self.budget if budget is None else budget,
            engine=self.engine if engine is None else engine,
            sampling=self.sampling if sampling is None else sampling,
            space=self.space,
            progress=progress,
        )


def problems_matching(patterns: list[str], *, thetas: int = 1) -> list[Problem]:
    """Named problems by id, pattern (`mdp/*`) or set (`core`), each at `thetas` parameter values.

    Raises:
        UnknownNameError: a pattern without a match; suggests the nearest id.
    """
    return [find_problem(name).at(draw) for name in names_matching(patterns) for draw in range(thetas)]


def names_matching(patterns: list[str]) -> list[str]:
    """Their ids; nothing is built, which takes a pretrained model half a minute.

    Raises:
        UnknownNameError: a pattern without a match; suggests the nearest id.
    """
    sets = problem_sets()
    names: list[str] = []
    for pattern in patterns:
        found = sets.get(pattern) or problem_names(pattern)
        if not found and "@" in pattern:
            known_problem(pattern)
            found = [pattern]
        if not found:
            known = [*registered_problems(), *heavy_problems()]
            families = [f"{family}/*" for family in dict.fromkeys(x.partition("/")[0] for x in known)]
            raise UnknownNameError("problem", pattern, families if "*" in pattern else known)
        names += [name for name in found if name not in names]
    return names


def _folder() -> Path:
    """Suites of the wheel; in a checkout, the folder beside the package."""
    packaged = Path(str(resources.files("pgcheck"))) / "suites"
    return packaged if packaged.is_dir() else packaged.parent.parent / "suites"


def shipped_suites() -> dict[str, Path]:
    """Suite files that come with pgcheck, by name."""
    return {path.stem: path for path in sorted(_folder().glob("*.toml"))}


def load_suite(name_or_path: str) -> Suite:
    """A shipped suite by name, or a TOML file by path.

    Raises:
        UnknownNameError: neither.
        SuiteError: not TOML, or a field that is unknown, missing or of the wrong type.
    """
    shipped = shipped_suites()
    path = shipped.get(name_or_path, Path(name_or_path))
    if not path.is_file():
        hint = "`pgcheck list suites` shows them all; a path to a .toml file works as well."
        raise UnknownNameError("suite", name_or_path, shipped, hint=hint)
    suite = read_suite(path)
    _check_names(path, suite)
    return suite


def read_suite(path: Path) -> Suite:
    """A suite file as it stands; its names are not looked up.

    Raises:
        SuiteError: not TOML, or a field that is unknown, missing or of the wrong type.
    """
    try:
        return Suite.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SuiteError(f"{path}: not a TOML file: {error}.") from None
    except ValidationError as error:
        raise SuiteError(f"{path}: {_first_fault(error)}") from None


def _first_fault(error: ValidationError) -> str:
    # a misspelt field is unknown and, under its right name, missing: the first says more
    first = min(error.errors(include_url=False), key=lambda e: e["type"] != "extra_forbidden")
    if not first["loc"]:
        return f"{first['msg'].removeprefix('Value error, ')}."
    in_entry = len(first["loc"]) > 2 and first["loc"][0] in ("expect", "case")
    entry = f"[[{first['loc'][0]}]] number {int(first['loc'][1]) + 1}, " if in_entry else ""
    field = str(first["loc"][2 if in_entry else 0])
    if first["type"] == "extra_forbidden":
        known = ExpectRow.model_fields if in_entry else Suite.model_fields
        return entry + str(UnknownNameError("field", field, known, hint=f"Fields: {', '.join(known)}."))
    if first["type"] == "missing":
        return f"{entry}field '{field}' is missing."
    what = 'expected "all" or a list of names' if field == "estimators" else first["msg"].lower()
    return f"{entry}field '{field}': {what}, got {first['input']!r}."


def _check_names(path: Path, suite: Suite) -> None:
    try:
        estimators = {e.name for e in suite.resolve_estimators()}
        problems = {
            f"{name}@{draw}" if draw else name
            for name in names_matching(suite.problems)
            for draw in range(suite.thetas)
        }
        names_matching(suite.own_problems or [])
        _check_cases(suite.case)
        for name in suite.checks or ():
            find_check(name)
        for x in suite.expect:
            if x.estimator not in estimators:
                raise UnknownNameError("estimator", x.estimator, estimators, hint="[[expect]] names the suite's own.")
            if x.problem not in problems:
                raise UnknownNameError("problem", x.problem, problems, hint="[[expect]] names the suite's own.")
    except UsageError as error:
        raise SuiteError(f"{path}: {error}") from None


def _check_cases(cases: list[Case]) -> None:
    names = [case.name for case in cases]
    for case in cases:
        if names.count(case.name) > 1:
            raise UsageError(f"case '{case.name}' is there twice; give one of them another name.")
        try:
            check_case(case)
        except UsageError as error:
            raise UsageError(f"case '{case.name}': {error}") from None
