"""The command line: `pgcheck list | run | gate | compare | explain | bench`.

Exit codes: 0 every verdict agrees with its claim · 1 a verdict failed or was inconclusive · 2 usage or unreadable
input · 5 nothing was checked. Everything heavy is imported inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import pandas as pd

    from pgcheck.render.ci import Outcome
    from pgcheck.runs.config import Plan
    from pgcheck.runs.report import Report

app = typer.Typer(
    name="pgcheck",
    help="What does your policy-gradient estimator really estimate? Exact bias and variance on problems whose gradient"
    " is known.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


class What(StrEnum):
    """What can be listed."""

    estimators = "estimators"
    problems = "problems"
    checks = "checks"
    suites = "suites"
    mistakes = "mistakes"


class Format(StrEnum):
    """How a report is printed."""

    terminal = "terminal"
    markdown = "markdown"
    html = "html"
    json = "json"
    junit = "junit"
    sarif = "sarif"
    github = "github"


class GateFormat(StrEnum):
    """How the findings of the gate are printed."""

    terminal = "terminal"
    markdown = "markdown"
    junit = "junit"
    sarif = "sarif"
    github = "github"


AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Budget = Annotated[
    int | None, typer.Option(min=1, help="Most batches enumerated for one estimator on one problem.", metavar="N")
]


def _version(asked: bool) -> None:
    if asked:
        from importlib import metadata

        typer.echo(f"pgcheck {metadata.version('pgcheck')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it and exit.")
    ] = False,
) -> None:
    pass


@app.command("list")
def list_(
    what: Annotated[What, typer.Argument(help="estimators, problems, checks, suites or mistakes")],
    as_json: AsJson = False,
) -> None:
    """List the estimators, problems, checks, suites, or the mistakes that losses are compared with."""
    rows = _listing(what)
    if as_json:
        typer.echo(json.dumps(rows, indent=1, ensure_ascii=False))
        return
    from rich.table import Table

    from pgcheck.render.terminal import stdout_console

    table = Table(box=None, pad_edge=False)
    for name in rows[0] if rows else {}:
        table.add_column(name)
    for row in rows:
        table.add_row(*(str(x) for x in row.values()))
    stdout_console().print(table)


def _listing(what: What) -> list[dict[str, object]]:
    if what is What.suites:
        from pgcheck.runs.suite import read_suite, shipped_suites

        return [{"name": name, "about": read_suite(path).about} for name, path in shipped_suites().items()]
    if what is What.checks:
        from pgcheck.render.messages import first_sentence
        from pgcheck.verdicts.checks import registered_checks

        return [{"name": c.name, "kind": c.kind, "about": first_sentence(c.page)} for c in registered_checks().values()]
    if what is What.mistakes:
        from pgcheck.estimators.broken import BROKEN

        return [
            {"name": name, "made from": x.sound.name, "caught by": ", ".join(x.caught_by), "about": x.mistake}
            for name, x in BROKEN.items()
        ]
    from pgcheck.estimators.base import registered_estimators
    from pgcheck.estimators.lookup import FILLED_BY  # noqa: F401  (fills the registries)
    from pgcheck.problem import find_problem, registered_problems

    if what is What.estimators:
        return [
            {"name": e.name, "claims": ", ".join(dict.fromkeys(c.kind for c in e.claims)), "about": e.about}
            for e in registered_estimators().values()
        ]
    problems = [find_problem(name) for name in registered_problems()]
    return [
        {
            "name": p.name,
            "N": len(p.trajectories),
            "K": p.trajectories.contexts,
            "groups": "+".join(map(str, p.sizes)),
            "γ": p.discount,
            "about": p.about,
        }
        for p in problems
    ]


@app.command()
def run(
    suite: Annotated[
        str | None,
        typer.Argument(help="a shipped suite (`pgcheck list suites`) or a .toml file; default, that of pyproject.toml"),
    ] = None,
    estimator: Annotated[
        list[str] | None,
        typer.Option(
            help="judge these instead: a name, pkg.mod:function, file.py:function, pkg.mod:make(eps=0.1), pkg.mod:REGISTRY",
            metavar="NAME",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="write report.json, report.md and report.html there", metavar="DIR")
    ] = None,
    form: Annotated[Format, typer.Option("--format", help="what is printed")] = Format.terminal,
    as_json: AsJson = False,
    budget: Budget = None,
) -> None:
    """Run a suite: every estimator on every problem, exactly, against its claims. `[tool.pgcheck]` of pyproject.toml says
    what is run; each argument takes the place of its line there."""
    from pgcheck.render.ci import on_github, outcomes_of_run, places_of, tell_github
    from pgcheck.render.files import write_report
    from pgcheck.render.progress import ProgressBar
    from pgcheck.runs.config import load_config, plan
    from pgcheck.runs.gate import exit_code

    form = Format.json if as_json else form
    planned = plan(load_config(Path.cwd()), suite=suite, estimators=estimator or (), budget=budget)
    with ProgressBar() as progress:
        report = planned.run(progress=progress)
        messages = _explained(report, planned)
    places = places_of(planned.estimators or [], Path.cwd())
    if out is not None:
        write_report(report, out, messages, places=places)
    outcomes = outcomes_of_run(report, messages, places, planned.expected)
    if form in _OF_OUTCOMES:
        _print_outcomes(outcomes, form.value, report.suite)
    else:
        _print_report(report, form, messages)
    if on_github():
        typer.echo(tell_github(outcomes, report.suite), err=True, nl=False)
    if out is not None and form is Format.terminal:
        typer.echo(f"written: {out / 'report.html'}, report.md, report.json and its tables as .csv")
    raise typer.Exit(exit_code(report, planned.expected))


_OF_OUTCOMES = (Format.junit, Format.sarif, Format.github)


def _print_outcomes(outcomes: list[Outcome], form: str, title: str) -> None:
    from pgcheck.render import ci

    text = {
        "junit": lambda: ci.junit(outcomes, title),
        "sarif": lambda: ci.sarif(outcomes),
        "github": lambda: ci.github(outcomes),
        "markdown": lambda: ci.step_summary(outcomes, title),
    }[form]()
    typer.echo(text, nl=False)


def _explained(report: Report, planned: Plan) -> dict[str, str]:
    """The failure message of every estimator that failed, with its cause."""
    from pgcheck.api import explain_failure

    by_name = {e.name: e for e in planned.resolve_estimators()} if report.failures else {}
    problems = planned.resolve_problems() if report.failures else []
    messages = {}
    for name in dict.fromkeys(v.estimator for v in report.failures):
        messages[name] = explain_failure(by_name[name], problems, report, command=planned.commands.get(name, name))
    return messages


def _print_report(report: Report, form: Format, messages: dict[str, str]) -> None:
    if form is Format.json:
        typer.echo(report.to_json(), nl=False)
    elif form is Format.markdown:
        from pgcheck.render.markdown import markdown

        typer.echo(markdown(report, messages))
    elif form is Format.html:
        from pgcheck.render.html import html

        typer.echo(html(report, messages))
    else:
        from pgcheck.render.terminal import print_matrix, stdout_console

        print_matrix(report, stdout_console())
        for message in messages.values():
            typer.echo("\n" + message)


@app.command()
def gate(
    report: Annotated[
        Path | None,
        typer.Argument(
            help="report.json of `pgcheck run --out DIR`; default: run what pyproject.toml says", metavar="REPORT"
        ),
    ] = None,
    baseline: Annotated[
        Path | None, typer.Option(help="what it is held against; default, that of pyproject.toml", metavar="FILE")
    ] = None,
    update: Annotated[
        bool, typer.Option("--update", help="accept what changed: write the baseline anew, for review")
    ] = False,
    form: Annotated[GateFormat, typer.Option("--format", help="what is printed")] = GateFormat.terminal,
) -> None:
    """Hold a report against a baseline: whatever changed is named, and fails until it is accepted with --update."""
    from pgcheck.errors import UsageError
    from pgcheck.render import gate as words
    from pgcheck.render.ci import on_github, outcomes_of_gate, places_of, tell_github
    from pgcheck.render.files import write_all
    from pgcheck.render.progress import ProgressBar
    from pgcheck.render.provenance import read_places
    from pgcheck.runs.config import expected_failures, load_config, plan
    from pgcheck.runs.gate import EMPTY, baseline_of, compare, read_baseline, read_report

    config = load_config(Path.cwd())
    path = baseline or (Path(config.baseline) if config.baseline else None)
    if path is None:
        raise UsageError("baseline: none given; name it with --baseline FILE, or in [tool.pgcheck] of pyproject.toml.")
    shown = [*([str(report)] if report else []), *([f"--baseline {baseline}"] if baseline else [])]
    command = " ".join(["pgcheck gate", *shown, "--update"])
    known = EMPTY if update and not path.exists() else read_baseline(path, command)
    messages: dict[str, str] = {}
    if report is None:
        planned = plan(config)
        with ProgressBar() as progress:
            run_of = planned.run(progress=progress)
            messages = _explained(run_of, planned)
        expected, places = planned.expected, places_of(planned.estimators or [], Path.cwd())
    else:
        run_of, expected, places = read_report(report), expected_failures(config), read_places(report)
    found = compare(run_of, known, expected=expected)
    outcomes = outcomes_of_gate(found, command, messages, places)
    empty = not baseline_of(run_of).entries
    write = update and found.updatable and not empty
    if write:
        write_all({path: found.accepted().to_json()})
    if form is not GateFormat.terminal:
        _print_outcomes(outcomes, form.value, "gate")
    else:
        texts = [words.headline(d) if write else words.message(d, command, messages) for d in words.shown(found)]
        for text in dict.fromkeys(texts):
            typer.echo(text)
        typer.echo(words.summary(found))
        if update:
            typer.echo(f"written: {path}" if write else f"not written: {words.why_not(found)}")
    if on_github() and not write:
        typer.echo(tell_github(outcomes, "gate"), err=True, nl=False)
    raise typer.Exit(0 if write else 5 if empty and not found.differences else found.exit_code)


@app.command()
def compare(
    estimators: Annotated[list[str], typer.Argument(help="names, or pkg.mod:function of your own")],
    problem: Annotated[
        list[str] | None,
        typer.Option(help="a problem id or pattern; repeat for more (default: dialogue/two-turn)", metavar="ID"),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="write the table there: .csv, .json, .md or .html", metavar="FILE")
    ] = None,
    as_json: AsJson = False,
    budget: Budget = None,
) -> None:
    """Compare bias and variance of estimators on the same batches, exactly."""
    from pgcheck import api
    from pgcheck.engines.exact import DEFAULT_BUDGET
    from pgcheck.errors import UsageError
    from pgcheck.render.progress import ProgressBar

    if out is not None and out.suffix not in _WRITERS:
        raise UsageError(f"out: {out.name}; its ending must be one of {', '.join(_WRITERS)}.")
    with ProgressBar() as progress:
        table = api.compare(
            estimators, problem or ["dialogue/two-turn"], budget=budget or DEFAULT_BUDGET, progress=progress
        )
    if out is not None:
        from pgcheck.render.files import write_all

        write_all({out: _WRITERS[out.suffix](table)})
    if as_json:
        typer.echo(table.to_json(orient="records", indent=1, force_ascii=False))
        return
    from pgcheck.render.terminal import print_comparison, stdout_console

    print_comparison(table, stdout_console())


def _html_table(table: pd.DataFrame) -> str:
    from pgcheck.render.html import comparison_html

    return comparison_html(table)


def _markdown_table(table: pd.DataFrame) -> str:
    from pgcheck.render.markdown import comparison_markdown

    return comparison_markdown(table)


_WRITERS = {
    ".csv": lambda table: table.to_csv(index=False),
    ".json": lambda table: table.to_json(orient="records", indent=1, force_ascii=False) + "\n",
    ".md": _markdown_table,
    ".html": _html_table,
}


@app.command()
def explain(
    name: Annotated[str, typer.Argument(help="a check, an estimator or a problem")],
    as_json: AsJson = False,
) -> None:
    """Explain a check, an estimator or a problem: what it is, why it matters, what to do."""
    from pgcheck.render.explain import explain as page

    text = page(name)
    typer.echo(json.dumps({"name": name, "page": text}, ensure_ascii=False, indent=1) if as_json else text)


@app.command()
def bench(
    out: Annotated[Path | None, typer.Option(help="write bench.md and bench.json there", metavar="DIR")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="rounds in which all rivals run in turn", metavar="N")] = 7,
    as_json: AsJson = False,
) -> None:
    """Race the engine against loops of backward, vmap(grad) and jax, as ratios in one run; takes minutes."""
    from dataclasses import asdict

    from pgcheck import bench as race
    from pgcheck.render.bench import bench_markdown
    from pgcheck.render.files import write_all
    from pgcheck.render.progress import ProgressBar

    with ProgressBar() as progress:
        ratios = race.bench(rounds=rounds, progress=progress)
    as_text = json.dumps([asdict(r) for r in ratios], indent=1, ensure_ascii=False) + "\n"
    if out is not None:
        write_all({out / "bench.md": bench_markdown(ratios), out / "bench.json": as_text})
    typer.echo(as_text if as_json else bench_markdown(ratios), nl=False)


def main() -> None:
    """Entry point: usage errors of pgcheck are one line on stderr and exit code 2."""
    try:
        app(prog_name="pgcheck")
    except Exception as error:
        from pgcheck.errors import PgcheckError

        if not isinstance(error, PgcheckError):
            raise
        typer.echo(f"pgcheck: {error}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
