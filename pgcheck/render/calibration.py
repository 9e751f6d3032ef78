"""What `pgcheck calibrate` measured, as Markdown, as data and as a figure."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from pgcheck.calibrate import ALLOWED, NOMINAL, Calibration, Rate
from pgcheck.render.messages import number

FAMILIES = ("light", "skewed", "heavy-tailed", "rare event")
_ABOUT = {
    "trigger": "False alarms of the first stage, no bias: any of six witnesses, at one look of 4096 draws.",
    "confirm": "False alarms of a confirming part (2048 fresh draws), no bias: the direction that stood out most, whether or"
    " not it triggered.",
    "certificate": "False certificates: the bias is exactly the tolerance.",
    "trigger of exceeds": "Mode `exceeds`, first stage: the bias is exactly the tolerance, along the gradient.",
    "confirm of exceeds": "Mode `exceeds`, a confirming part: the bias is exactly the tolerance, along the gradient.",
    "interval misses": "Intervals at 95% that miss the truth, among those given; at a fixed number of draws.",
}


def standing(rate: Rate) -> str:
    """What the bounds allow to say: `above` nominal, `within` 1.3 times nominal, or neither yet (`≤ …x`)."""
    if rate.runs == 0:
        return "always refused"
    if rate.low > rate.nominal:
        return f"**above** ({number(rate.rate / rate.nominal)}x)"
    if rate.high <= ALLOWED * rate.nominal:
        return "within"
    return f"≤ {rate.high / rate.nominal:.2g}x"


def calibration_markdown(c: Calibration) -> str:
    """Tables, one a question; families are never pooled."""
    runs = max(r.runs for r in c.rates if r.what == "trigger")
    lines = [
        "# pgcheck calibrate",
        "",
        "How often each stage of a sampled verdict is wrong, on laws whose truth is known: ĝ of every batch of a small problem,"
        " and made-up ones. Brackets are Clopper–Pearson bounds at 99%. *within*: the upper bound is at most"
        f" {ALLOWED:g} × nominal; *above*: the lower bound exceeds nominal; *≤ 2x*: the runs exclude no less than that."
        " *refused*: share of trials in which the guard allowed no statement.",
        "",
        f"`pgcheck calibrate --runs {runs} --seed {c.seed}`. A false FAIL takes a trigger and all"
        " confirming parts, on disjoint draws; so α = 1e-6 for a whole run"
        " is inferred from the measured stages and their independence, not observed.",
        "",
        *_worst(c.rates),
    ]
    for what, group in groupby(c.rates_by_question, key=lambda r: r.what):
        rates = list(group)
        table = _interval_table(rates) if what == "interval misses" else _rate_table(rates)
        lines += [f"## {what}", "", _ABOUT[what], "", *table, ""]
    lines += [
        "## Whole verdicts without a bias",
        "",
        "Default error rates, up to 5 looks, at a tolerance that U = 0 certifies at the third.",
        "",
        "| law | family | runs | PASS | FAIL | INCONCLUSIVE | most draws |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    lines += [
        f"| {v.law} | {v.family} | {v.runs} | {v.passed} | {v.failed} | {v.inconclusive} | {v.most_draws:,} |"
        for v in c.verdicts
    ]
    lines += [
        "",
        "## Draws to a FAIL",
        "",
        "Against the one test at the same α (1e-6/1024) that knows the direction of the bias beforehand. The schedule ends a"
        " confirmed FAIL at 8,192, 16,384, … draws, never earlier. A ratio below 1: a witness that weighs quiet coordinates up"
        " beats the direction of the bias itself.",
        "",
        "| law | bias | ‖b‖/‖μ*‖ | FAIL | median draws | oracle | ratio |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    lines += [
        f"| {p.law} | {p.detail} | {number(p.size)} | {p.failed} of {p.runs} | {p.median_draws:,.0f} | {p.oracle_draws:,.0f}"
        f" | {p.median_draws / p.oracle_draws:.2g} |"
        for p in c.power
    ]
    return "\n".join(lines) + "\n"


def _worst(rates: Sequence[Rate]) -> list[str]:
    """The largest ratio of a measured rate to nominal, for each stage and nominal rate, over families that give verdicts."""
    lines = ["| stage | nominal | largest measured | where | lower bound |", "|---|--:|--:|---|--:|"]
    for what in _ABOUT:
        for τ in sorted({r.nominal for r in rates if r.what == what}, reverse=True):
            worst = max((r for r in rates if r.what == what and r.nominal == τ and r.runs), key=lambda r: r.low)
            where = worst.law + (f", {worst.detail}" if worst.detail else "")
            lines.append(f"| {what} | {number(τ)} | {number(worst.rate)} | {where} | {number(worst.low)} |")
    return [*lines, ""]


def _cell(rate: Rate) -> str:
    return f"{number(rate.rate)} [{number(rate.low)}, {number(rate.high)}] {standing(rate)}"


def _rate_table(rates: Sequence[Rate]) -> list[str]:
    head = " | ".join(f"at {number(τ)}" for τ in NOMINAL)
    lines = [f"| law | family | runs | refused | {head} |", "|---|---|--:|--:|" + "---|" * len(NOMINAL)]
    for (law, detail), group in groupby(rates, key=lambda r: (r.law, r.detail)):
        row = list(group)
        name = f"{law}, {detail}" if detail else law
        cells = " | ".join(_cell(r) for r in row)
        lines.append(f"| {name} | {row[0].family} | {row[0].runs:,} | {row[0].refused:.1%} | {cells} |")
    return lines


def _interval_table(rates: Sequence[Rate]) -> list[str]:
    lines = ["| law | family | interval | given | refused | misses (5%) |", "|---|---|---|--:|--:|---|"]
    lines += [
        f"| {r.law} | {r.family} | {r.detail} | {r.runs:,} | {r.refused:.1%} | {_cell(r) if r.runs else '–'} |"
        for r in rates
    ]
    return lines


def calibration_json(c: Calibration) -> dict[str, Any]:
    """Everything, with the measured rate of each."""
    return asdict(c) | {"rates": [asdict(r) | {"rate": r.rate if r.runs else None} for r in c.rates]}


def calibration_figure(c: Calibration) -> str:
    """Measured over nominal rate of the three stages, with bounds, as SVG: one panel a stage, one color a family."""
    stages = ("trigger", "confirm", "certificate")
    figure = Figure(figsize=(9.0, 3.4), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.subplots(1, len(stages), sharey=True)
    colors = dict(zip(FAMILIES, ("#4c72b0", "#dd8452", "#c44e52", "#8172b3"), strict=True))
    for ax, stage in zip(axes, stages, strict=True):
        shown = [r for r in c.rates if r.what == stage and r.runs and r.refused < 1]
        for i, r in enumerate(shown):
            x = r.nominal * 10 ** (0.6 * (i / max(len(shown) - 1, 1) - 0.5))
            bounds = [[(r.rate - r.low) / r.nominal], [(r.high - r.rate) / r.nominal]]
            ax.errorbar(x, r.rate / r.nominal, yerr=bounds, color=colors[r.family], marker=".", ms=3, lw=0.7)
        ax.axhline(1.0, color="#888888", lw=0.8)
        ax.axhline(ALLOWED, color="#888888", lw=0.6, ls=":")
        ax.set(xscale="log", xlabel="nominal rate", title=stage, ylim=(0, 3))
    axes[0].set_ylabel("measured / nominal")
    for family, color in colors.items():
        axes[-1].plot([], [], color=color, label=family)
    axes[-1].legend(frameon=False, fontsize="small")
    out = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "pgcheck"}):  # ids of the same figure are the same
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return out.getvalue()
