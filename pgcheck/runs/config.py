"""What a project wants checked: `[tool.pgcheck]` of its pyproject.toml, and what the command line puts in its place.

    [tool.pgcheck]
    suite = "core"                                  # a shipped suite, or a .toml file; default "core"
    problems = ["dialogue/*"]                       # optional: these instead of the suite's
    thetas = 2                                      # optional: each problem at this many θ; default, the suite's
    checks = ["unbiased", "finite"]                 # optional: default, all
    budget = 5000000                                # optional: most batches for one estimator on one problem
    engine = "auto"                                 # optional, as of a suite: engine, draws, seed, tolerance, alpha, beta,
                                                    # bounds, space
    baseline = "tests/pgcheck.json"                 # optional: what `pgcheck gate` and the pytest plugin compare with
    estimators = [                                  # default: the suite's own
      "my_rl.losses:rloo",                          # claims what it declares; a plain loss claims to be unbiased
      {path = "my_rl.losses:grpo", claim = "biased", reason = "divides by the std", couples = "group"},
      {path = "my_rl/mean.py:make(eps=0.1)", name = "centred", claim = "proportional", scale = 0.75},
      {path = "my_rl.losses:REGISTRY", expected_failed_checks = {reward_shift = "no baseline yet"}},
    ]

Guarantee: an unknown key, a misspelt name or a wrong type is one error that names the file, the field and the mend.
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from pgcheck.engines.choice import Engine
from pgcheck.engines.moments import Progress
from pgcheck.engines.monte_carlo import Sampling
from pgcheck.errors import UsageError, nearest
from pgcheck.estimators.base import ClaimKind, Couples, Estimator, biased, find_estimator, proportional, unbiased
from pgcheck.estimators.lookup import as_estimators
from pgcheck.problem import Problem
from pgcheck.runs.gate import ExpectedFailures
from pgcheck.runs.report import Report
from pgcheck.runs.runner import refuse_duplicates
from pgcheck.runs.suite import Suite, load_suite, problems_matching
from pgcheck.verdicts.checks import find_check
from pgcheck.verdicts.verdict import Space


class EstimatorConfig(BaseModel):
    """One entry of `estimators`; a plain text is its `path`."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    path: str
    name: str | None = Field(default=None, min_length=1)
    claim: ClaimKind | None = None
    scale: float | None = None
    reason: str = ""
    couples: Couples | None = None
    same_as: str | None = None
    expected_failed_checks: dict[str, str] = {}

    def estimators(self) -> list[Estimator]:
        """The estimators that it names, with the claims it makes for them.

        Raises:
            UsageError: they cannot be had, or what is said of them does not go together.
        """
        changes: dict[str, Any] = {}
        if self.same_as is not None:
            other = find_estimator(self.same_as)
            changes |= {"same_as": other.name, "claims": other.claims}
        if self.claim is None and (self.scale is not None or self.reason):
            raise UsageError("field 'claim' is missing: scale and reason belong to one.")
        if self.scale is not None and self.claim != "proportional":
            raise UsageError(f"field 'scale': a claim of {self.claim!r} has none; claim 'proportional'.")
        if self.claim == "biased" and not self.reason:
            raise UsageError("field 'reason' is missing: a claim of 'biased' says why.")
        if self.claim is not None:
            made = {
                "unbiased": unbiased(),
                "proportional": proportional(self.scale, reason=self.reason),
                "biased": biased(self.reason),
            }
            changes["claims"] = (made[self.claim],)
        if self.couples is not None:
            changes |= {"couples": self.couples, "min_group_size": 0}
        found = as_estimators([self.path])
        if self.name is not None:
            if len(found) > 1:
                raise UsageError(f"field 'name': '{self.path}' is {len(found)} estimators, which have names.")
            changes["name"] = self.name
        for name, reason in self.expected_failed_checks.items():
            find_check(name)
            if not reason.strip():
                raise UsageError(f"field 'expected_failed_checks': {name!r} has no reason; give it, in words.")
        return [replace(e, **changes) for e in found]


class Config(BaseModel):
    """The table `[tool.pgcheck]`."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    suite: str | None = None
    problems: list[str] | None = Field(default=None, min_length=1)
    thetas: int | None = Field(default=None, ge=1, le=8)
    checks: list[str] | None = Field(default=None, min_length=1)
    budget: int | None = Field(default=None, ge=1)
    engine: Engine | None = None
    draws: int | None = Field(default=None, ge=1)
    seed: int | None = Field(default=None, ge=0)
    tolerance: float | None = Field(default=None, gt=0, lt=1)
    alpha: float | None = Field(default=None, gt=0, lt=0.5)
    beta: float | None = Field(default=None, gt=0, lt=0.5)
    bounds: tuple[float, float] | None = Field(default=None, strict=False)
    space: Space | None = None
    baseline: str | None = Field(default=None, min_length=1)
    estimators: list[EstimatorConfig] | None = Field(default=None, min_length=1)

    @field_validator("estimators", mode="before")
    @classmethod
    def _paths(cls, given: Any) -> Any:
        return [{"path": x} if isinstance(x, str) else x for x in given] if isinstance(given, list) else given


def load_config(folder: Path) -> Config:
    """`[tool.pgcheck]` of the pyproject.toml in `folder`; empty if there is none.

    Raises:
        UsageError: not TOML, or a field that is unknown or of the wrong type.
    """
    path = folder / "pyproject.toml"
    if not path.is_file():
        return Config()
    try:
        tools = tomllib.loads(path.read_text(encoding="utf-8")).get("tool", {})
        return Config.model_validate(tools.get("pgcheck", {}))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path.name}: not a TOML file: {error}.") from None
    except ValidationError as error:
        raise UsageError(f"{path.name}, [tool.pgcheck]: {_fault(error)}") from None


def _fault(error: ValidationError) -> str:
    first = min(error.errors(include_url=False), key=lambda e: e["type"] != "extra_forbidden")
    *before, field_name = (str(x + 1) if isinstance(x, int) else x for x in first["loc"])
    where = " number ".join(before[:2]) + ", " if before else ""
    if first["type"] == "extra_forbidden":
        known = EstimatorConfig.model_fields if before else Config.model_fields
        return f"{where}unknown field '{field_name}'.{nearest(field_name, known)} Fields: {', '.join(known)}."
    if first["type"] == "missing":
        return f"{where}field '{field_name}' is missing."
    return f"{where}field '{field_name}': {first['msg'].lower()}, got {first['input']!r}."


@dataclass(frozen=True)
class Plan:
    """What is to be run: a suite, its own estimators or others, and which checks are expected to fail."""

    suite: Suite
    estimators: list[Estimator] | None = None
    expected: ExpectedFailures = field(default_factory=dict)
    commands: dict[str, str] = field(default_factory=dict)  # what the command line calls each estimator

    def resolve_estimators(self) -> list[Estimator]:
        """Others if there are any, else the suite's own."""
        return self.suite.resolve_estimators() if self.estimators is None else self.estimators

    def resolve_problems(self) -> list[Problem]:
        """What they are judged on."""
        return self.suite.resolve_problems(own=self.estimators is not None)

    def with_settings(self, **settings: Any) -> Plan:
        """The plan with other fields of the suite (`engine`, `tolerance`, `draws`, …)."""
        return replace(self, suite=self.suite.model_copy(update=settings))

    def run(self, *, sampling: Sampling | None = None, progress: Progress | None = None) -> Report:
        """Run it, with other settings of its sampling if given."""
        return self.suite.run(estimators=self.estimators, sampling=sampling, progress=progress)


def plan(
    config: Config,
    *,
    suite: str | None = None,
    estimators: Sequence[str] = (),
    budget: int | None = None,
) -> Plan:
    """What to run: each argument in the place of its line in the config. A suite of cases only is run as it is.

    Raises:
        UsageError: a name that is unknown, an estimator that cannot be had, two of one name.
    """
    loaded = load_suite(suite or config.suite or "core")
    changes: dict[str, Any] = {}
    if suite is None and config.problems is not None:
        problems_matching(config.problems)
        changes |= {"problems": config.problems, "own_problems": None, "expect": [], "case": []}
    for name in ("thetas", "engine", "draws", "seed", "tolerance", "alpha", "beta", "bounds", "space"):
        if (x := getattr(config, name)) is not None:
            changes[name] = x
    if config.checks is not None and loaded.checks is None:
        changes["checks"] = [find_check(name).name for name in config.checks]
    if budget or config.budget:
        changes["budget"] = budget or config.budget
    loaded = loaded.model_copy(update=changes)
    rows = [EstimatorConfig(path=x) for x in estimators] or config.estimators or []
    if not rows or not (loaded.problems or estimators):
        return Plan(loaded)
    chosen: list[Estimator] = []
    expected: dict[str, dict[str, str]] = {}
    commands: dict[str, str] = {}
    for i, row in enumerate(rows):
        try:
            found = row.estimators()
        except UsageError as error:
            if estimators:
                raise
            raise UsageError(f"pyproject.toml, [tool.pgcheck]: estimators number {i + 1}: {error}") from error
        chosen += found
        many = len(found) > 1
        commands |= {e.name: f"{row.path}[{e.name}]" if many else row.path for e in found}
        expected |= {e.name: row.expected_failed_checks for e in found if row.expected_failed_checks}
    refuse_duplicates(chosen, [])
    return Plan(loaded, chosen, expected, commands)


def expected_failures(config: Config) -> ExpectedFailures:
    """Checks that are expected to fail, by estimator; nothing is imported for estimators that expect none.

    Raises:
        UsageError: as `plan`.
    """
    rows = [row for row in config.estimators or [] if row.expected_failed_checks]
    return plan(Config(estimators=rows)).expected if rows else {}
