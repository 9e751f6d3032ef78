"""The pytest plugin's doors: options, the marker and the fixture. What is behind them is `pgcheck.verdict_items`.

    pytest --pgcheck-baseline=pgcheck.json            # estimators of [tool.pgcheck]: one item a verdict, held to a baseline

    @pytest.mark.pgcheck([my_loss], problems="core", expected_failed_checks={"unbiased": "divides by the std"})
    def test_my_losses(pgcheck_verdict):
        pgcheck_verdict.check()

Guarantee: a session that asks for nothing of this imports nothing of pgcheck but this file.
"""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pgcheck.verdict_items import Session, Verdict

FIXTURE = "pgcheck_verdict"
ASKED = ("baseline", "update", "suite", "report")  # any of these options asks for the gate
_SESSION = pytest.StashKey["Session"]()
_SHARED = pytest.StashKey[str]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("pgcheck", "what policy-gradient losses really estimate")
    add = group.addoption
    add("--pgcheck-baseline", metavar="PATH", help="hold every estimator to this baseline; default, [tool.pgcheck]'s")
    add("--pgcheck-update", action="store_true", help="accept what changed: write the baseline anew, for review")
    add("--pgcheck-suite", metavar="NAME", help="judge the estimators of [tool.pgcheck] on this suite")
    add("--pgcheck-seed", metavar="N", type=int, help="the seed of what is sampled; exact verdicts do not depend on it")
    add(
        "--pgcheck-vary-seed",
        action="store_true",
        help="a seed of this session's own; exact verdicts do not depend on it",
    )
    add("--pgcheck-report", metavar="PATH", help="write report.json there, and its provenance beside it")
    add(
        "--pgcheck-inconclusive",
        choices=("fail", "warn"),
        default="fail",
        help="what a verdict is that could not be reached (default: fail)",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        "pgcheck(estimators, *, problems, claim, checks, expected_failed_checks, budget, engine, sampling): one item for each"
        f" verdict on these estimators; the test takes the fixture `{FIXTURE}`",
    )
    if config.option.pgcheck_vary_seed:  # drawn once, before there are workers: they get this session's options
        config.option.pgcheck_seed, config.option.pgcheck_vary_seed = secrets.randbits(32), False
    if any(getattr(config.option, f"pgcheck_{name}") for name in ASKED):
        session_of(config)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """(pytest-xdist) Workers share a folder, which the first of them makes that has something to share."""
    stash = node.config.stash
    folder = stash.setdefault(_SHARED, os.path.join(tempfile.gettempdir(), f"pgcheck-{secrets.token_hex(16)}"))
    node.workerinput["pgcheck"] = folder


def pytest_unconfigure(config: pytest.Config) -> None:
    if _SHARED in config.stash:
        shutil.rmtree(config.stash[_SHARED], ignore_errors=True)


def session_of(config: pytest.Config) -> Session:
    """The session's verdicts, begun when first asked for."""
    if _SESSION not in config.stash:
        from pgcheck.errors import UsageError
        from pgcheck.verdict_items import Session

        try:
            config.stash[_SESSION] = Session(config)
        except UsageError as error:
            pytest.exit(f"pgcheck: {error}", returncode=2)
        config.pluginmanager.register(config.stash[_SESSION], "pgcheck-session")
    return config.stash[_SESSION]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    mark = metafunc.definition.get_closest_marker("pgcheck")
    if mark is not None:
        session_of(metafunc.config).parametrize(metafunc, mark, FIXTURE)


@pytest.fixture(name=FIXTURE)
def _pgcheck_verdict(request: pytest.FixtureRequest) -> Iterator[Verdict]:
    """One verdict of a test marked `pgcheck`; `.check()` returns, skips or raises."""
    verdict: Any = getattr(request, "param", None)
    if verdict is None:
        pytest.fail(f"{FIXTURE} belongs to a test that is marked: @pytest.mark.pgcheck([my_loss])", pytrace=False)
    bound = verdict.bind(request.node)
    yield bound
    if not bound.checked:
        pytest.fail(f"nothing was checked: the test does not call {FIXTURE}.check()", pytrace=False)
