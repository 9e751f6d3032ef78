"""The command line: `pgcheck list | run | gate | compare | design | explain | bench | calibrate`.

Exit codes: 0 every verdict agrees with its claim · 1 a verdict failed or was inconclusive · 2 usage or unreadable
input · 5 nothing was checked. Everything heavy is imported inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import pandas as pd

    from pgcheck.render.ci import Outcome
    from pgcheck.runs.compare import Sweeps
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
    quantities = "quantities"


class Engines(StrEnum):
    """How expectations are had."""

    exact = "exact"
    monte_carlo = "monte_carlo"
    auto = "auto"


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


class Space(StrEnum):
    """Where a comparison measures."""

    logits = "logits"
    parameters = "parameters"


AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Budget = Annotated[
    int | None, typer.Option(min=1, help="Most batches enumerated for one estimator on one problem.", metavar="N")
]

Engine = Annotated[
    Engines | None,
    typer.Option(help="exact: enumerate; monte_carlo: sample; auto: sample what does not fit", metavar="NAME"),
]
Draws = Annotated[int | None, typer.Option(min=1, help="most batches sampled on one problem", metavar="N")]
Seed = Annotated[int | None, typer.Option(min=0, help="of what is sampled (default: 0)", metavar="N")]
Tolerance = Annotated[
    float | None,
    typer.Option(
        "--tolerance",
        "--rtol",
        help="bias that a sampled verdict calls none, as a part of ‖∇J‖ (default: .05)",
        metavar="X",
    ),
]
Alpha = Annotated[
    float | None, typer.Option(help="chance that sampling fails a correct run (default: 1e-6)", metavar="X")
]
Beta = Annotated[
    float | None, typer.Option(help="chance that sampling passes one biased estimator (default: 1e-3)", metavar="X")
]
Workers = Annotated[
    int | None,
    typer.Option(min=1, help="processes that sample; any number gives the same report (default: 1)", metavar="N"),
]
Resume = Annotated[
    Path | None,
    typer.Option(
        help="keep there how far sampling is; the same command again goes on where it was cut off, to the same report",
        metavar="DIR",
    ),
]
Bounds = Annotated[
    tuple[float, float] | None,
    typer.Option(
        help="known of every estimator here: ⟨ĝ − κ ∇J, v⟩ lies between them for every unit v; sampled verdicts then rest on"
        " them and not on tails",
        metavar="LO HI",
    ),
]
Reference = Annotated[
    Path | None,
    typer.Option(
        help="estimates [n, P] of ∇J that were made before, .npy or .pt, which sampled verdicts are given against",
        metavar="FILE",
    ),
]
Device = Annotated[str | None, typer.Option(help="where sampled batches are evaluated: cpu, cuda", metavar="NAME")]


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
    what: Annotated[What, typer.Argument(help="estimators, problems, checks, suites, mistakes or quantities")],
    as_json: AsJson = False,
) -> None:
    """List the estimators, problems, checks, suites, the mistakes that losses are compared with, or the quantities that
    decide the cases of suites."""
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
    if what is What.quantities:
        from pgcheck.render.messages import first_sentence
        from pgcheck.verdicts.quantities import registered_quantities

        return [
            {"name": q.name, "of": ", ".join(q.parameters), "about": first_sentence(q.page)}
            for q in registered_quantities().values()
        ]
    from pgcheck.estimators.base import registered_estimators
    from pgcheck.estimators.lookup import FILLED_BY  # noqa: F401  (fills the registries)
    from pgcheck.registry import find_problem, heavy_problems, registered_problems

    if what is What.estimators:
        return [
            {"name": e.name, "claims": ", ".join(dict.fromkeys(c.kind for c in e.claims)), "about": e.about}
            for e in registered_estimators().values()
        ]
    problems = [find_problem(name) for name in registered_problems()]
    rows: list[dict[str, object]] = [
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
    unknown: dict[str, object] = dict.fromkeys(("N", "K", "groups", "γ"), "–")
    return rows + [{"name": name, **unknown, "about": about} for name, about in heavy_problems().items()]


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
    engine: Engine = None,
    tolerance: Tolerance = None,
    alpha: Alpha = None,
    beta: Beta = None,
    draws: Draws = None,
    seed: Seed = None,
    bounds: Bounds = None,
    reference: Reference = None,
    space: Annotated[Space | None, typer.Option(help="where E ĝ is held against ∇J (default: logits)")] = None,
    device: Device = None,
    workers: Workers = None,
    resume: Resume = None,
    search: Annotated[
        bool,
        typer.Option(
            "--search", help="hunt for counterexamples among random problems; the smallest is printed as code"
        ),
    ] = False,
) -> None:
    """Run a suite: every estimator on every problem, against its claims. `[tool.pgcheck]` of pyproject.toml says
    what is run; each argument takes the place of its line there."""
    from pgcheck.render.ci import on_github, outcomes_of_run, places_of, tell_github
    from pgcheck.render.files import refuse_file, write_report
    from pgcheck.render.progress import ProgressBar
    from pgcheck.runs.config import load_config, plan
    from pgcheck.runs.gate import exit_code

    refuse_file(out)
    form = Format.json if as_json else form
    planned = plan(load_config(Path.cwd()), suite=suite, estimators=estimator or (), budget=budget)
    settings = {"engine": engine and engine.value, "tolerance": tolerance, "alpha": alpha, "beta": beta, "draws": draws,
                "seed": seed, "bounds": bounds, "space": space and space.value, "device": device}  # fmt: skip
    planned = planned.with_settings(**{name: x for name, x in settings.items() if x is not None})
    sampling = replace(planned.suite.sampling, workers=workers or 1, checkpoint=resume, reference=reference)
    with ProgressBar() as progress:
        report = planned.run(sampling=sampling, progress=progress)
        report, messages = _searched(report, planned) if search else (report, _explained(report, planned))
    places = places_of(planned.estimators or [], Path.cwd())
    if out is not None:
        write_report(report, out, messages, places=places, device=planned.suite.device)
    outcomes = outcomes_of_run(report, messages, places, planned.expected)
    if form in _OF_OUTCOMES:
        _print_outcomes(outcomes, form.value, report.suite)
    else:
        _print_report(report, form, messages)
        if search and form is Format.terminal:
            typer.echo(
                "".join(
                    f"{v.estimator}, {v.check}: {v.reason}\n" for v in report.verdicts if not v.problem and v.reason
                )
            )
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


def _searched(report: Report, planned: Plan) -> tuple[Report, dict[str, str]]:
    """The report with a search for each estimator, and the failure messages; one that fails on a named problem is explained
    by those."""
    from pgcheck.api import explain_failure, searched
    from pgcheck.verdicts.verdict import RTOL

    messages = _explained(report, planned)
    problems, checks = planned.resolve_problems(), planned.suite.checks
    for e in planned.resolve_estimators():
        command = planned.commands.get(e.name, e.name)
        report, smallest, words = searched(report, e, problems, checks=checks, rtol=RTOL, command=command, asked={})
        if smallest and e.name not in messages:
            messages[e.name] = explain_failure(e, [*problems, *smallest], report, command=command)
        if words:
            messages[e.name] += words
    return report, messages


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
    suite: Annotated[
        str | None, typer.Option(help="what is run without a REPORT; default, that of pyproject.toml", metavar="NAME")
    ] = None,
    budget: Budget = None,
    seed: Seed = None,
) -> None:
    """Hold a report against a baseline: whatever changed is named, and fails until it is accepted with --update."""
    from shlex import quote

    from pgcheck.errors import UsageError
    from pgcheck.render import gate as words
    from pgcheck.render.ci import on_github, outcomes_of_gate, places_of, tell_github
    from pgcheck.render.files import write_all
    from pgcheck.render.progress import ProgressBar
    from pgcheck.render.provenance import read_places
    from pgcheck.runs.baseline import EMPTY, baseline_of, read_baseline, read_report
    from pgcheck.runs.config import expected_failures, load_config, plan
    from pgcheck.runs.gate import compare

    config = load_config(Path.cwd())
    path = baseline or (Path(config.baseline) if config.baseline else None)
    if path is None:
        raise UsageError("baseline: none given; name it with --baseline FILE, or in [tool.pgcheck] of pyproject.toml.")
    asked = {name: x for name, x in {"suite": suite, "budget": budget, "seed": seed}.items() if x is not None}
    if report is not None and asked:
        raise UsageError("gate: --suite, --budget and --seed say what is run; with a REPORT nothing is.")
    options = {"baseline": baseline, **asked} if baseline else asked
    shown = [*([quote(str(report))] if report else []), *(f"--{name} {quote(str(x))}" for name, x in options.items())]
    command = " ".join(["pgcheck gate", *shown, "--update"])
    known = EMPTY if update and not path.exists() else read_baseline(path, command)
    messages: dict[str, str] = {}
    if report is None:
        planned = plan(config, suite=suite, budget=budget)
        planned = planned if seed is None else planned.with_settings(seed=seed)
        with ProgressBar() as progress:
            run_of = planned.run(progress=progress)
            messages = _explained(run_of, planned)
        expected, places = planned.expected, places_of(planned.estimators or [], Path.cwd())
    else:
        run_of, expected, places = read_report(report), expected_failures(config), read_places(report)
    found = compare(run_of, known, expected=expected)
    outcomes = outcomes_of_gate(found, command, messages, places)
    empty = baseline_of(run_of).empty
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
    relative_to: Annotated[
        str | None, typer.Option(help="the one that the others are compared to (default: the first)", metavar="NAME")
    ] = None,
    space: Annotated[Space, typer.Option(help="where bias and variance are measured")] = Space.logits,
    out: Annotated[
        Path | None,
        typer.Option(
            help="write the table there, .csv, .json or .md, or the report with figures, .html", metavar="FILE"
        ),
    ] = None,
    tables: Annotated[
        Path | None, typer.Option(help="write the report's tables as CSV and its figures as SVG and PNG", metavar="DIR")
    ] = None,
    sweeps: Annotated[bool, typer.Option(help="whether the report measures other batch sizes and samplers")] = True,
    groups: Annotated[
        str | None, typer.Option(help="numbers of groups in a batch to measure, as 1,2,4", metavar="N,N,…")
    ] = None,
    group_sizes: Annotated[str | None, typer.Option(help="sizes of the group to measure", metavar="N,N,…")] = None,
    staleness: Annotated[
        str | None, typer.Option(help="how far behind to sample, 0 (on-policy) to 1 (an older policy)", metavar="X,X,…")
    ] = None,
    as_json: AsJson = False,
    budget: Budget = None,
    engine: Engine = None,
    draws: Draws = None,
    seed: Seed = None,
    tolerance: Tolerance = None,
    alpha: Alpha = None,
    beta: Beta = None,
    bounds: Bounds = None,
    reference: Reference = None,
    device: Device = None,
    workers: Workers = None,
    resume: Resume = None,
) -> None:
    """Compare bias and variance of estimators on the same batches, exactly where that is asked for."""
    from pgcheck import api
    from pgcheck.engines.exact import DEFAULT_BUDGET
    from pgcheck.engines.monte_carlo import Sampling
    from pgcheck.errors import UsageError
    from pgcheck.render.files import refuse_file, write_all
    from pgcheck.render.progress import ProgressBar

    endings = (*_WRITERS, ".html")
    if out is not None and out.suffix not in endings:
        raise UsageError(f"out: {out.name}; its ending must be one of {', '.join(endings)}.")
    refuse_file(out and out.parent)
    refuse_file(tables)
    swept = _sweeps(sweeps, groups, group_sizes, staleness)
    sampled = {"draws": draws, "seed": seed, "tolerance": tolerance, "alpha": alpha, "beta": beta, "device": device,
               "bounds": bounds, "reference": reference, "workers": workers, "checkpoint": resume}  # fmt: skip
    given: dict[str, Any] = {
        "relative_to": relative_to,
        "space": space.value,
        "budget": budget or DEFAULT_BUDGET,
        "engine": engine and engine.value,
        "sampling": Sampling(**{name: x for name, x in sampled.items() if x is not None}),  # type: ignore[arg-type]
    }
    on = problem or ["dialogue/two-turn"]
    written = []
    with ProgressBar() as progress:
        if tables is None and (out is None or out.suffix != ".html"):
            table = api.compare(estimators, on, progress=progress, **given)
        else:
            from pgcheck.render.comparison import report_html, write_tables

            found = api.comparison(estimators, on, sweeps=swept, progress=progress, **given)
            table = found.tables["comparison"]
            if tables is not None:
                files, remark = write_tables(found, tables)
                written += [f"written: {tables} ({len(files)} files)", *([remark] if remark else [])]
    if out is not None:
        write_all({out: report_html(found) if out.suffix == ".html" else _WRITERS[out.suffix](table)})
        written.insert(0, f"written: {out}")
    if as_json:
        typer.echo(table.to_json(orient="records", indent=1, force_ascii=False))
        return
    from pgcheck.render.terminal import print_comparison, stdout_console

    print_comparison(table, stdout_console())
    for line in written:
        typer.echo(line)


def _sweeps(wanted: bool, groups: str | None, group_sizes: str | None, staleness: str | None) -> Sweeps:
    from pgcheck.runs.compare import NO_SWEEPS, Sweeps

    given: dict[str, Any] = {"groups": groups, "group_sizes": group_sizes, "staleness": staleness}
    read: dict[str, Any] = {name: _numbers(name, text) for name, text in given.items() if text is not None}
    return Sweeps(**read) if wanted else NO_SWEEPS


def _numbers(name: str, text: str) -> tuple[float, ...]:
    """`"1,2,4"` as numbers, those without a point as integers."""
    from pgcheck.errors import UsageError

    try:
        return tuple(float(x) if "." in x else int(x) for x in text.split(",") if x.strip())
    except ValueError:
        raise UsageError(f"{name}: {text!r}; expected numbers with commas between them, as in 1,2,4.") from None


def _markdown_table(table: pd.DataFrame) -> str:
    from pgcheck.render.markdown import comparison_markdown

    return comparison_markdown(table)


_WRITERS = {
    ".csv": lambda table: table.to_csv(index=False),
    ".json": lambda table: table.to_json(orient="records", indent=1, force_ascii=False) + "\n",
    ".md": _markdown_table,
}


@app.command()
def explain(
    name: Annotated[str, typer.Argument(help="a check, an estimator, a problem, a mistake or a quantity")],
    as_json: AsJson = False,
) -> None:
    """Explain a check, an estimator, a problem, a mistake or a quantity: what it is, why it matters, what to do."""
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
    from pgcheck.render.files import refuse_file, write_all
    from pgcheck.render.progress import ProgressBar

    refuse_file(out)
    with ProgressBar() as progress:
        ratios = race.bench(rounds=rounds, progress=progress)
    as_text = json.dumps([asdict(r) for r in ratios], indent=1, ensure_ascii=False) + "\n"
    if out is not None:
        write_all({out / "bench.md": bench_markdown(ratios), out / "bench.json": as_text})
    typer.echo(as_text if as_json else bench_markdown(ratios), nl=False)


@app.command()
def design(
    estimator: Annotated[str, typer.Argument(help="a name, or pkg.mod:function of your own")],
    problem: Annotated[str, typer.Option(help="a problem id", metavar="ID")] = "dialogue/two-turn",
    rtol: Annotated[
        float, typer.Option("--rtol", "--tolerance", help="the bias that is tolerated, of ‖∇J‖", metavar="X")
    ] = 0.05,
    alpha: Annotated[float, typer.Option(help="false FAILs of a whole run", metavar="P")] = 1e-6,
    beta: Annotated[float, typer.Option(help="false PASSes of a check", metavar="P")] = 1e-3,
    mode: Annotated[str, typer.Option(help="what FAIL proves: nonzero or exceeds", metavar="MODE")] = "nonzero",
    draws: Annotated[int | None, typer.Option(min=1, help="batches that may be drawn", metavar="N")] = None,
    engine: Annotated[
        Engines, typer.Option(help="exact: from the exact covariance; monte_carlo: from a pilot; auto: what fits")
    ] = Engines.auto,
    pilot: Annotated[
        int | None, typer.Option(min=1, help="batches of a pilot, and for each group size (default: 2048)", metavar="N")
    ] = None,
    seed: Seed = None,
    budget: Budget = None,
    as_json: AsJson = False,
) -> None:
    """Plan a sampled verdict: batches it takes, the bias a budget shows, the group size that wastes the fewest rollouts."""
    from typing import cast

    from pgcheck.design import PILOT, plan
    from pgcheck.estimators.lookup import as_estimator
    from pgcheck.registry import find_problem
    from pgcheck.render.design import design_json, design_text
    from pgcheck.render.progress import ProgressBar
    from pgcheck.statistics.sequential import SHARE, Mode, Settings

    settings = Settings(rtol=rtol, alpha=alpha / SHARE, beta=beta, mode=cast(Mode, mode))
    with ProgressBar() as progress:
        made = plan(
            as_estimator(estimator),
            find_problem(problem),
            settings,
            draws=draws,
            budget=budget,
            engine=engine.value,
            pilot=pilot or PILOT,
            seed=seed or 0,
            progress=progress,
        )
    typer.echo(json.dumps(design_json(made), indent=1, ensure_ascii=False) if as_json else design_text(made))


@app.command()
def calibrate(
    out: Annotated[Path | None, typer.Option(help="write calibration.md, .json and .svg there", metavar="DIR")] = None,
    runs: Annotated[int, typer.Option(min=100, help="runs of one look for each law", metavar="N")] = 20_000,
    seed: Annotated[int, typer.Option(min=0, metavar="N")] = 0,
    only: Annotated[
        list[str] | None,
        typer.Option(
            help="measure only null, planted, exceeds, open, open-trigger, open-planted, ratio, verdicts or power; what DIR has"
            " of the rest stays",
            metavar="QUESTION",
        ),
    ] = None,
    law: Annotated[
        list[str] | None, typer.Option(help="measure only laws whose names start so; the rest stays", metavar="START")
    ] = None,
    workers: Workers = None,
    as_json: AsJson = False,
) -> None:
    """Measure how often each stage of a sampled verdict is wrong, against what it promises; all of it takes hours."""
    from shlex import quote

    from pgcheck import calibrate as calibration
    from pgcheck.render import calibration as words
    from pgcheck.render.files import refuse_file, write_all
    from pgcheck.render.progress import ProgressBar

    refuse_file(out)
    over = calibration.laws_named(law) if law else None
    before = words.read_calibration(out / "calibration.json") if out is not None and (only or law) else None
    with ProgressBar() as progress:
        measured = calibration.calibrate(
            over, runs=runs, seed=seed, workers=workers or 1, questions=only or calibration.QUESTIONS, progress=progress
        )
    part = [f" --{name} {quote(x)}" for name, given in (("only", only), ("law", law)) for x in given or ()]
    measured = replace(measured, made_by=(f"pgcheck calibrate --runs {runs} --seed {seed}" + "".join(part),))
    if before is not None:
        measured = before.with_more(measured)
    as_text = json.dumps(words.calibration_json(measured), indent=1, ensure_ascii=False) + "\n"
    if out is not None:
        texts = {"md": words.calibration_markdown(measured), "json": as_text, "svg": words.calibration_figure(measured)}
        write_all({out / f"calibration.{ending}": text for ending, text in texts.items()})
    typer.echo(as_text if as_json else words.calibration_markdown(measured), nl=False)


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
