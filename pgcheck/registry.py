"""Named problems, `family/setting`: built when they are asked for, and gathered in sets on which estimators are judged."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable

from pgcheck.errors import ProblemError, UnknownNameError
from pgcheck.problem import Problem

_BUILDERS: dict[str, Callable[[], Problem]] = {}
_SETS: dict[str, list[str]] = {"core": [], "off-policy": [], "penalized": []}
_DOUBLES: dict[str, str] = {}
_HEAVY: dict[str, str] = {}


def register_problem(
    name: str,
    build: Callable[[], Problem],
    *,
    belongs_to: str | None = None,
    double_of: str | None = None,
    heavy: str | None = None,
) -> None:
    """Add a named problem, to the set "core", "off-policy" or "penalized" on which estimators are judged or to none.

    `double_of`: the problem of a set that shows whatever this one shows; it is kept for its range, and belongs to no set.
    `heavy`: what a listing says of it, of a problem that takes a model to be loaded, or that can only be sampled: it is built
    when asked for by its name or family, and by nothing that goes through all problems.

    Raises:
        ProblemError: the name is taken, or has an @ (what follows it names a θ).
    """
    if "@" in name:
        raise ProblemError(f"problem '{name}': a name has no @; NAME@1 is the problem NAME at another θ.")
    if name in _BUILDERS:
        raise ProblemError(f"problem '{name}' is registered already; choose another name.")
    _BUILDERS[name] = build
    if heavy is not None:
        _HEAVY[name] = heavy
    if double_of is not None:
        _DOUBLES[name] = double_of
    elif belongs_to is not None:
        _SETS[belongs_to].append(name)


def problem_sets() -> dict[str, list[str]]:
    """Names by set: "core" (on-policy), "off-policy", "penalized" (with a KL or entropy term in the objective), and "all",
    which is all of them; a family stands together."""
    sets = {name: _by_family(names) for name, names in _SETS.items()}
    return {**sets, "all": [x for names in sets.values() for x in names]}


def _by_family(names: list[str]) -> list[str]:
    families = list(dict.fromkeys(name.partition("/")[0] for name in names))
    return sorted(names, key=lambda name: families.index(name.partition("/")[0]))


def doubles() -> dict[str, str]:
    """Problems that are in no set, and the one of a set that shows whatever they show."""
    return dict(_DOUBLES)


def registered_problems() -> dict[str, Callable[[], Problem]]:
    """Builders by name, in order of registration; without the heavy ones."""
    return {name: build for name, build in _BUILDERS.items() if name not in _HEAVY}


def heavy_problems() -> dict[str, str]:
    """Names of problems that take a model to be loaded, or can only be sampled, and what a listing says of them."""
    return dict(_HEAVY)


def problem_names(pattern: str = "*") -> list[str]:
    """Names that match; a heavy one, or one that can only be sampled, if the pattern spells its family out."""
    family = pattern.partition("/")[0]
    own = [name for name in _BUILDERS if name not in _HEAVY or name.partition("/")[0] == family]
    return [name for name in own if fnmatch.fnmatchcase(name, pattern)]


def find_problem(name: str) -> Problem:
    """The registered problem `family/setting`, or `family/setting@1` for its second θ.

    Raises:
        UnknownNameError: no such problem; suggests the nearest.
    """
    base, draw = known_problem(name)
    return _BUILDERS[base]().at(draw)


def known_problem(name: str) -> tuple[str, int]:
    """`family/setting` and the number of its θ, of the name of a registered problem; nothing is built.

    Raises:
        UnknownNameError: no such problem; suggests the nearest.
    """
    base, _, draw = name.partition("@")
    if base in _BUILDERS and draw and not draw.isdecimal():
        raise UnknownNameError("problem", name, (), hint=f"After the @ stands the number of a θ: {base}@1.")
    if base not in _BUILDERS:
        raise UnknownNameError("problem", name, _BUILDERS)
    return base, int(draw or 0)
