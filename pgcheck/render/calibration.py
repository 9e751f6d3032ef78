"""What `pgcheck calibrate` measured, as Markdown, as data and as a figure."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from pgcheck.calibrate import ALLOWED, NOMINAL, SHAPES, Calibration, EndToEnd, Power, Rate
from pgcheck.calibrate.laws import UNTOLD
from pgcheck.calibrate.rates import MISS
from pgcheck.errors import UsageError
from pgcheck.render.messages import number

_COLORS = {"light": "#4c72b0", "skewed": "#dd8452", "heavy-tailed": "#c44e52", "rare event": "#8172b3"} | {
    UNTOLD: "#937860"
}
_MOST_MISSES = 12  # percent, where the axis of a figure ends
_STAGES = {
    "trigger": ("First stage of a FAIL", "No bias. Any of six witnesses alarms at one look of 4,096 draws."),
    "confirm": (
        "Confirmation of a FAIL",
        "No bias. A confirming part, 2,048 fresh draws along the direction that stood out most, whether or not it triggered.",
    ),
    "certificate": ("False PASS", "The bias is exactly the tolerance, in one of four directions."),
    "trigger of exceeds": (
        "First stage, mode `exceeds`",
        "The bias is exactly the tolerance, along the gradient: FAIL must prove more than that.",
    ),
    "confirm of exceeds": ("Confirmation, mode `exceeds`", "The same, of the confirming parts."),
    "trigger of open κ": (
        "First stage, open κ, reference drawn",
        "E x = ½ g, and g is known only from an r beside each x, of whose noise x has a part; κ is looked for along a direction"
        " 45° off g. Any of six witnesses alarms at one look of 4,096 draws. *Refused*: κ is not bounded yet.",
    ),
    "confirm of open κ": (
        "Confirmation, open κ, reference drawn",
        "The same of a confirming part of 2,048 draws, along a direction across that, 45° off g as well.",
    ),
    "certificate of open κ": (
        "False PASS, open κ, reference drawn",
        "E x is δ times as long across g as along it, in one of three directions. The direction in which κ is looked for leans"
        " towards the bias just so that κ₀ g comes as near to E x as it may; ‖g‖ is such that 3,072 draws can certify δ.",
    ),
}
_MISSES = {
    "misses, fixed draws": (
        "Intervals after a fixed number of draws",
        "95% intervals after 4,096 draws (of the effect: after 4,096 confirming draws). Of a law without a usable variance few"
        " samples allow one, those that missed its large weights, and k̂ does not tell them either.",
    ),
    "misses, after stopping, no bias": (
        "Intervals at the end of a run, no bias",
        "Of whole runs, which end at whichever look gives a verdict.",
    ),
    "misses, after stopping, a bias": (
        "Intervals at the end of a run, with a bias",
        "The same, of runs that end in a FAIL: biases along the gradient and dense, of 10%, 5% and 2.5% of the standard"
        " deviation along them.",
    ),
}


def calibration_markdown(c: Calibration) -> str:
    """The answer first, then tables, one a question; families are never pooled."""
    lines = [
        "# How often a sampled verdict is wrong",
        "",
        "Measured on laws whose truth is known: the estimate ĝ of every batch of a small problem, and made-up ones, from light"
        " tails to a reward that is paid once in a hundred draws. Brackets are Clopper–Pearson bounds at 99%, law by law.",
        "",
        *_again(c),
        "![Measured over nominal rates](calibration.svg)",
        "",
        "**Wrong more often than promised** is a law whose lower bound is above nominal. **Shown to be within"
        f" {ALLOWED:g}x** is one whose upper bound is at most {ALLOWED:g} times nominal; one that is neither had too few runs"
        " to tell.",
        "",
        *_headline(c.rates),
        "",
        *_seldom_given(c.rates),
        *_product(c.rates),
        "",
        *_abstention(c.rates),
        "",
        *_speed(c),
        "",
    ]
    by_question = {what: list(group) for what, group in groupby(c.rates_by_question, key=lambda r: r.what)}
    for what, (title, about) in _STAGES.items():
        if what in by_question:
            lines += [f"## {title}", "", f"{about} {_UNITS}", "", *_rate_table(by_question[what]), ""]
    for what, (title, about) in _MISSES.items():
        if what in by_question:
            lines += [f"## {title}", "", f"{about} {_INTERVALS}", "", *_interval_table(by_question[what]), ""]
    return "\n".join([*lines, *_verdicts(c), "", *_power(c)]) + "\n"


_UNITS = (
    f"Rates in units of nominal: 1 is what was promised. **Bold**: the lower bound is above 1. *Italic*: the upper one is above"
    f" {ALLOWED:g}. *Refused*: share of trials in which the guard allows no statement; they count as right."
)
_INTERVALS = (
    "How many of those given miss the truth (promised: 5%), in brackets the bounds, and behind it the share that is given where"
    " that is not all; –: none is."
)


def _again(c: Calibration) -> list[str]:
    """How to have the figures once more."""
    if not c.made_by:
        return []
    first, *more = (f"`{command}`" for command in c.made_by)
    if not more:
        return [f"{first} gives these figures again.", ""]
    return [
        f"{first} gives these figures again, and these commands those of questions and laws that it had too few runs to tell;"
        " their numbers of runs were set beforehand, and a stream of looks goes on where the shorter one ended (where κ is"
        " open only that of the first setting; the others are of other draws):",
        "",
        *(f"* {command}" for command in more),
        "",
    ]


def _headline(rates: Sequence[Rate]) -> list[str]:
    """One line for each promise."""
    lines = [
        f"| | promised | worst measured | wrong more often than promised | shown to be within {ALLOWED:g}x |",
        "|---|--:|---|--:|--:|",
    ]
    for what, (title, _) in (_STAGES | _MISSES).items():
        for τ in sorted({r.nominal for r in rates if r.what == what}, reverse=True):
            cells = [r for r in rates if r.what == what and r.nominal == τ and r.runs]
            if not cells:
                continue
            worst = max(cells, key=lambda r: (r.rate, r.low))
            above = sum(r.low > r.nominal for r in cells)
            within = sum(r.high <= ALLOWED * r.nominal for r in cells)
            measured = f"{number(worst.rate)} [{worst.low:.2g}, {worst.high:.2g}] {_name(worst)}"
            lines.append(f"| {title} | {number(τ)} | {measured} | {above} of {len(cells)} | {within} of {len(cells)} |")
    return lines


def _seldom_given(rates: Sequence[Rate]) -> list[str]:
    """Intervals of which too many of those that are given are wrong, as few are given."""
    wrong = [r for r in rates if r.what in _MISSES and r.runs and r.low > r.nominal]
    if not wrong:
        return []
    laws, given = ", ".join(dict.fromkeys(r.law for r in wrong)), [1 - r.refused for r in wrong]
    return [
        f"Of the intervals that are given too many are wrong for {laws}: {min(given):.1%} to {max(given):.1%} of the samples"
        f" allow one. Given *and* wrong, of which {MISS:.0%} is promised, is at most"
        f" {max(r.rate * (1 - r.refused) for r in wrong):.1%} of all.",
        "",
    ]


def _name(r: Rate) -> str:
    return r.law + (f", {r.detail}" if r.detail else "")


def _product(rates: Sequence[Rate]) -> list[str]:
    """What the stages multiply to."""

    def worst(what: str) -> tuple[float, float]:
        cells = [r for r in rates if r.what == what and r.nominal == NOMINAL[-1] and r.runs]
        return max(r.rate for r in cells), max(r.high for r in cells)

    if not {"trigger", "confirm"} <= {r.what for r in rates if r.nominal == NOMINAL[-1]}:
        return []
    (a, a_high), (b, b_high) = worst("trigger"), worst("confirm")
    return [
        f"A false FAIL of one check takes a trigger and two confirming parts, on disjoint draws, each at {NOMINAL[-1]:g}:"
        f" 1e-9 is promised. The worst measured rates multiply to {a * b * b:.1e},"
        f" their upper bounds to {a_high * b_high**2:.1e}."
        " So the error rate of a whole verdict is *inferred* from measured stages and their independence; it was not observed.",
    ]


def _abstention(rates: Sequence[Rate]) -> list[str]:
    """Laws of which some stage says nothing most of the time."""
    stages = [what for what in _STAGES if any(r.what == what for r in rates)]
    share: dict[str, dict[str, float]] = {}
    for r in rates:
        if r.what in stages and r.nominal == NOMINAL[0]:
            share.setdefault(r.law, {})[r.what] = min(r.refused, share.get(r.law, {}).get(r.what, 1.0))
    some = {law: of for law, of in share.items() if max(of.values()) >= 0.01}
    if not some:
        return ["No stage abstains on any law."]
    lines = [
        "Where the tails of a law are too heavy for 4,096 draws a stage abstains; the verdict is then INCONCLUSIVE, with the"
        " number of draws that would do. Share of trials (of the certificate: in the direction in which it abstains least):",
        "",
        "| law | " + " | ".join(_STAGES[what][0] for what in stages) + " |",
        "|---|" + "--:|" * len(stages),
    ]
    for law, of in some.items():
        lines.append(f"| {law} | " + " | ".join(f"{of.get(what, 0.0):.0%}" for what in stages) + " |")
    return lines


def _speed(c: Calibration) -> list[str]:
    """Draws to a FAIL in a line for each family."""
    if not c.power:
        return []
    lines = [
        "Draws to a FAIL, against the one test at the same α that knows the direction of the bias: the median of the settings,"
        " and the most.",
        "",
        "| family | " + " | ".join(f"bias {shape}" for shape in SHAPES[:2]) + " | settings | runs | end in a FAIL |",
        "|---|" + "---|" * len(SHAPES[:2]) + "--:|--:|--:|",
    ]
    for family in dict.fromkeys(p.family for p in c.power):
        of = [p for p in c.power if p.family == family]
        cells = " | ".join(_times([p.ratio for p in of if p.detail == shape]) for shape in SHAPES[:2])
        runs = sum(p.runs for p in of)
        lines.append(f"| {family} | {cells} | {len(of)} | {runs:,} | {sum(p.failed for p in of) / runs:.1%} |")
    return lines


def _times(ratios: Sequence[float]) -> str:
    return f"{float(np.median(ratios)):.2g}x, at most {max(ratios):.2g}x" if ratios else "–"


def _cell(r: Rate) -> str:
    text = f"{r.rate / r.nominal:.2f} [{r.low / r.nominal:.2f}, {r.high / r.nominal:.2f}]"
    if r.low > r.nominal:
        return f"**{text}**"
    return f"*{text}*" if r.high > ALLOWED * r.nominal else text


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
    """A row for each law, a column for each interval."""
    names = list(dict.fromkeys(r.detail for r in rates))
    of = {(r.law, r.detail): r for r in rates}
    lines = ["| law | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
    for law in dict.fromkeys(r.law for r in rates):
        cells = [_interval_cell(of.get((law, name))) for name in names]
        lines.append(f"| {law} | " + " | ".join(cells) + " |")
    return lines


def _interval_cell(r: Rate | None) -> str:
    if r is None or r.runs == 0:
        return "–"
    text = f"{r.rate:.1%} [{100 * r.low:.1f}, {100 * r.high:.1f}]"
    text = f"**{text}**" if r.low > r.nominal else text
    return text + (f", {1 - r.refused:.0%} given" if r.refused > 0.005 else "")


def _verdicts(c: Calibration) -> list[str]:
    lines = [
        "## Whole verdicts without a bias",
        "",
        "Default error rates, at a tolerance that U = 0 certifies at the third look; four looks.",
        "",
        "| law | family | runs | PASS | FAIL | INCONCLUSIVE | most draws |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    return lines + [
        f"| {v.law} | {v.family} | {v.runs} | {v.passed} | {v.failed} | {v.inconclusive} | {v.most_draws:,} |"
        for v in c.verdicts
    ]


def _power(c: Calibration) -> list[str]:
    lines = [
        "## Draws to a FAIL",
        "",
        "Against the one test at the same α (1e-6/1024) that knows the direction of the bias beforehand. The schedule ends a"
        " confirmed FAIL at 8,192, 16,384, … draws, never earlier. A ratio below 1: a witness that weighs quiet coordinates up"
        " beats the direction of the bias itself. Runs that end otherwise count as longer than any. *At α*: the draws of the"
        " oracle are those of a normal law, at which its test of a skewed one is wrong more or less often than α; these are"
        " those at which it is at α, its scores' law being known as well.",
        "",
        "| law | bias | ‖b‖/‖μ*‖ | FAIL | median draws | oracle | ratio | at α | ratio |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    return lines + [
        f"| {p.law} | {p.detail} | {number(p.size)} | {p.failed} of {p.runs} | "
        + ("–" if p.median_draws is None else f"{p.median_draws:,.0f}")
        + f" | {p.oracle_draws:,.0f} | {p.ratio:.2g} | {p.exact_draws:,.0f} | {p.exact_ratio:.2g} |"
        for p in c.power
    ]


def calibration_json(c: Calibration) -> dict[str, Any]:
    """Everything, with the measured rate of each."""
    return asdict(c) | {"rates": [asdict(r) | {"rate": r.rate if r.runs else None} for r in c.rates]}


def read_calibration(path: Path) -> Calibration:
    """What `calibration_json` was written from.

    Raises:
        UsageError: it is not there, or is something else.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        rates = tuple(Rate(**{name: x for name, x in r.items() if name != "rate"}) for r in data["rates"])
        power, verdicts = tuple(Power(**x) for x in data["power"]), tuple(EndToEnd(**x) for x in data["verdicts"])
        return Calibration(data["seed"], rates, power, verdicts, tuple(data["made_by"]))
    except OSError as error:
        raise UsageError(
            f"{path}: {error.strerror}; what is measured in part goes into what is there, so measure all of it first."
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path}: not a calibration.json of this version ({type(error).__name__}: {error}).") from None


def calibration_figure(c: Calibration) -> str:
    """As SVG: measured over nominal rate of the three stages; intervals that miss; draws to a FAIL."""
    figure = Figure(figsize=(9.6, 6.6), layout="constrained")
    FigureCanvasSVG(figure)
    top, bottom = figure.subfigures(2, 1, squeeze=False)[:, 0]
    axes = top.subplots(1, 3, sharey=True)
    for ax, what in zip(axes, ("trigger", "confirm", "certificate"), strict=True):
        shown = [r for r in c.rates if r.what == what and r.runs and r.refused < 1 and r.detail in ("", SHAPES[3])]
        _draw_stage(ax, shown, _STAGES[what][0] + (f", {SHAPES[3]}" if what == "certificate" else ""))
    axes[0].set_ylabel("measured / promised")
    for family, color in _COLORS.items():
        axes[-1].plot([], [], color=color, label=family)
    axes[-1].legend(frameon=False, fontsize="small", loc="upper left")
    left, right = bottom.subplots(1, 2)
    _draw_misses(left, [r for r in c.rates if r.what == "misses, fixed draws" and r.runs >= 100])
    _draw_power(right, c)
    out = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "pgcheck"}):  # ids of the same figure are the same
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return out.getvalue()


def _draw_stage(ax: Axes, shown: Sequence[Rate], title: str) -> None:
    for τ in NOMINAL:
        rates = [r for r in shown if r.nominal == τ]
        for i, r in enumerate(rates):
            x = τ * 10 ** (0.7 * (i / max(len(rates) - 1, 1) - 0.5))
            bounds = [[(r.rate - r.low) / τ], [(r.high - r.rate) / τ]]
            ax.errorbar(x, r.rate / τ, yerr=bounds, color=_COLORS[r.family], marker=".", ms=3, lw=0.7)
    ax.axhline(1.0, color="#888888", lw=0.8)
    ax.axhline(ALLOWED, color="#888888", lw=0.6, ls=":")
    ax.set(xscale="log", xlabel="promised rate", title=title, ylim=(0, 2))


def _draw_misses(ax: Axes, shown: Sequence[Rate]) -> None:
    names = list(dict.fromkeys(r.detail for r in shown))
    for i, name in enumerate(names):
        rates = [r for r in shown if r.detail == name]
        for j, r in enumerate(rates):
            x = i + 0.7 * (j / max(len(rates) - 1, 1) - 0.5)
            if 100 * r.rate > _MOST_MISSES:  # beyond the axis, said as a number at its end
                ax.plot(x, 0.97 * _MOST_MISSES, marker="^", color=_COLORS[r.family], ms=4)
                ax.annotate(
                    f"{r.rate:.0%}", (x, 0.97 * _MOST_MISSES), xytext=(0, -5 - 18 * (j % 2)), textcoords="offset points",
                    ha="center", va="top", fontsize="x-small", rotation=90,
                )  # fmt: skip
                continue
            bounds = [[100 * (r.rate - r.low)], [100 * (r.high - r.rate)]]
            ax.errorbar(x, 100 * r.rate, yerr=bounds, color=_COLORS[r.family], marker=".", ms=3, lw=0.6)
    ax.axhline(5, color="#888888", lw=0.8)
    ax.set(ylim=(0, _MOST_MISSES), ylabel="miss the truth, %", title="95% intervals, fixed draws")
    ax.set_xticks(range(len(names)), names, fontsize="small")


def _draw_power(ax: Axes, c: Calibration) -> None:
    for shape, marker in zip(SHAPES[:2], "os", strict=True):
        points = [(p.oracle_draws, p.median_draws) for p in c.power if p.detail == shape and p.median_draws is not None]
        if points:
            ax.plot(
                [oracle * 1.06 ** (i % 7 - 3) for i, (oracle, _) in enumerate(points)],
                [median for _, median in points],
                marker, ms=4, alpha=0.7, label=shape, ls="",
            )  # fmt: skip
    if c.power:
        ends = np.array([min(p.oracle_draws for p in c.power) / 2, max(p.oracle_draws for p in c.power) * 2])
        for factor, ls in ((1, "-"), (4, ":")):
            ax.plot(ends, factor * ends, color="#888888", lw=0.8, ls=ls, label=f"{factor}x the oracle")
        ax.legend(frameon=False, fontsize="small")
    ax.set(xscale="log", yscale="log", xlabel="draws of the oracle", ylabel="draws to a FAIL, median", title="Power")
