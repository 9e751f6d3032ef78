"""Figures of the variance comparison report: seaborn, once with CSS colors for the page and once in print colors for files.

Every function takes the rows of one problem from a frame of `pgcheck.runs.compare.Comparison` and draws points with their
intervals wherever an interval has a length. What belongs to estimator number i has the gid e{i}, a class in the page.

Guarantee: no global state of matplotlib is changed; the same frame gives the same bytes.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import seaborn as sns
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from pgcheck.render.figures import LETTER, SETTINGS, WIDTH, inline
from pgcheck.verdicts.variance import mse_curves, noise

HEIGHT = 236.0
ROW = 17.0
SERIES = 10  # colors
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "p", "h", "*")
FINDINGS = ("unbiased", "proportional", "biased")
PARTS = ("rollout", "action", "state")


def marker(i: int) -> str:
    """Of estimator number i: no two of the first hundred share marker and color."""
    return MARKERS[(i + i // SERIES) % len(MARKERS)]


@dataclass(frozen=True)
class Ink:
    """The colors of a figure."""

    ink: str
    faint: str
    line: str
    series: tuple[str, ...]
    finding: Mapping[str, str]
    parts: Mapping[str, str]

    def of(self, i: int) -> str:
        """The color of estimator number i."""
        return self.series[i % len(self.series)]


PAGE = Ink(  # stand-ins
    "#010101", "#020202", "#030303", tuple(f"#1100{i:02x}" for i in range(SERIES)),
    {name: f"#2200{i:02x}" for i, name in enumerate(FINDINGS)}, {name: f"#3300{i:02x}" for i, name in enumerate(PARTS)},
)  # fmt: skip
VARIABLES = {
    PAGE.ink: "var(--ink)", PAGE.faint: "var(--faint)", PAGE.line: "var(--line)",
    **{color: f"var(--s{i})" for i, color in enumerate(PAGE.series)},
    **{color: f"var(--{name}-dot)" for name, color in PAGE.finding.items()},
    **{color: f"var(--{name}-part)" for name, color in PAGE.parts.items()},
}  # fmt: skip
PRINT = Ink(  # the same as the page's in light
    "#1c2024", "#60686e", "#dfe3e6",
    ("#0b6bb0", "#b86a00", "#0a8a63", "#c9420f", "#9c3fa0", "#7d5a35", "#c2357a", "#5d666c", "#8a8200", "#2a97b8"),
    {"unbiased": "#23804a", "proportional": "#1f76b8", "biased": "#b96a00"},
    {"rollout": "#7c93a5", "action": "#c08a2b", "state": "#4f9a7a"},
)  # fmt: skip

KEYS = {"ratios": "finding", "sources": "parts"}  # what colors stand for; elsewhere estimators

Draw = Callable[[Figure, pd.DataFrame, Ink], None]


@dataclass(frozen=True)
class Drawing:
    """A figure as a function of its rows."""

    name: str
    rows: pd.DataFrame
    draw: Draw
    height: float = HEIGHT

    def svg(self, prefix: str) -> Markup:
        """Inline, ids prefixed."""
        with mpl.rc_context(SETTINGS):
            return inline(self.made(PAGE, FigureCanvasSVG), prefix, VARIABLES)

    def file(self, form: str) -> bytes:
        """As a file, "svg" or "png", on white."""
        out = io.BytesIO()
        with mpl.rc_context(SETTINGS):
            figure = self.made(PRINT, FigureCanvasSVG if form == "svg" else FigureCanvasAgg)
            metadata = {"Date": None, "Creator": None} if form == "svg" else {"Software": None}
            _legend(figure, self, PRINT)
            figure.savefig(out, format=form, dpi=72 if form == "svg" else 216, facecolor="white", metadata=metadata,
                           bbox_inches="tight", pad_inches=0.08)  # fmt: skip
        return out.getvalue()

    def made(self, ink: Ink, canvas: Any) -> Figure:
        """The figure, drawn."""
        figure = Figure(figsize=(WIDTH / 72, self.height / 72), dpi=72)
        canvas(figure)
        self.draw(figure, self.rows, ink)
        return figure


def _legend(figure: Figure, drawing: Drawing, ink: Ink) -> None:
    """What the page says in its captions and buttons, below the figure."""
    kind = KEYS.get(drawing.name)
    keys: list[tuple[str, dict[str, Any]]]
    if kind is None:
        names = drawing.rows.drop_duplicates("number").sort_values("number")
        keys = [
            (
                " ".join(name.split()),
                {"color": ink.of(int(i)), "marker": marker(int(i)), "lw": 1.1, "markersize": 4.5},
            )
            for i, name in zip(names["number"], names["estimator"], strict=True)
        ]
    else:
        shown = [x for x in FINDINGS if (drawing.rows["finding"] == x).any()] if kind == "finding" else list(PARTS)
        keys = [(x, {"color": getattr(ink, kind)[x], "marker": "s" if kind == "parts" or x == "biased" else "o", "lw": 0})
                for x in shown]  # fmt: skip
        if kind == "parts":
            keys += [(x, {"color": ink.ink, "marker": m, "lw": 0}) for x, m in (("exact", "|"), ("independent", "x"))]
    handles = [Line2D([], [], **style) for _, style in keys]
    figure.legend(handles, [name for name, _ in keys], loc="upper center", bbox_to_anchor=(0.5, 0.0), frameon=False,
                  ncols=min(len(keys), 3), fontsize=8.5, labelcolor=ink.ink, columnspacing=1.2)  # fmt: skip


def drawings(tables: Mapping[str, pd.DataFrame], gradient_norm: float) -> list[Drawing]:
    """The figures of one problem; rows have a column `number`, the estimator's. A figure without rows is left out."""
    made = [
        _ratios(tables["comparison"]),
        _plane(tables["comparison"], gradient_norm),
        _mse(tables["comparison"], gradient_norm),
    ]
    if "steps" in tables:
        made.append(_steps(tables["steps"]))
    if "sources" in tables:
        made.append(_sources(tables["sources"], tables["approximations"]))
    if "blocks" in tables:
        made.append(_blocks(tables["blocks"]))
    for name, x, label in (("groups", "rows", "rows of a batch"), ("group_sizes", "group_size", "rows of the group")):
        if name in tables:
            made += _sizes(tables[name], name, x, label, gradient_norm)
    if "staleness" in tables:
        made += _staleness(tables["staleness"])
    return [d for d in made if len(d.rows)]


# -- axes


def _axes(figure: Figure, ink: Ink, *, title: str, xlabel: str, left: float = 40.0) -> Axes:
    height = figure.get_figheight() * 72
    ax = figure.add_axes((left / WIDTH, 34 / height, (WIDTH - left - 10) / WIDTH, (height - 60) / height))
    _dress(ax, ink, title)
    ax.set_xlabel(xlabel, color=ink.faint, labelpad=2)
    return ax


def _dress(ax: Axes, ink: Ink, title: str) -> None:
    ax.patch.set_visible(False)
    for side in ax.spines.values():
        side.set_visible(False)
    ax.set_axisbelow(True)
    ax.grid(color=ink.line, lw=0.6)
    ax.tick_params(axis="both", which="both", length=0, pad=3, colors=ink.faint)
    ax.set_title(title, fontsize=9.5, color=ink.ink, loc="left", pad=7)


def _short(x: float, _: object = None) -> str:
    return f"{x:.0e}".replace("e-0", "e-").replace("e+0", "e") if x and not 0.01 <= abs(x) < 1e5 else f"{x:g}"


def _log(
    ax: Axes, which: str, values: Sequence[float], *, include: Sequence[float] = (), narrow: bool = False
) -> tuple[float, float]:
    """A logarithmic axis around the positive finite values, at least half a decade; its ends."""
    some = [x for x in (*values, *include) if math.isfinite(x) and x > 0] or [1.0]
    low, high = min(some), max(some)
    pad = max((high / low) ** 0.07, 1.25)
    low, high = low / pad, high * pad
    axis = getattr(ax, f"{which}axis")
    getattr(ax, f"set_{which}scale")("log")
    getattr(ax, f"set_{which}lim")(low, high)
    decades = math.log10(high / low)
    if narrow:
        subs: tuple[float, ...] = (1.0,) if decades > 1.5 else (1.0, 3.0) if decades > 0.8 else (1.0, 2.0, 5.0)
    else:
        subs = (1.0,) if decades > 2 else (1.0, 2.0, 5.0) if decades > 0.7 else (1.0, 2.0, 3.0, 5.0, 7.0)
    axis.set_major_locator(LogLocator(subs=subs, numticks=(4 if narrow else 5) if decades > 2 else 12))
    axis.set_major_formatter(FuncFormatter(_short))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())
    return low, high


def _each(rows: pd.DataFrame) -> list[tuple[int, pd.DataFrame]]:
    return [(int(str(i)), own) for i, own in rows.groupby("number", sort=True)]


@contextmanager
def _belongs_to(ax: Axes, i: int) -> Iterator[None]:
    """What is drawn inside is estimator number i's."""
    before = set(ax.get_children())
    yield
    for artist in set(ax.get_children()) - before:
        artist.set_gid(f"e{i}")


def _points(ax: Axes, x: Any, y: Any, *, color: str, shape: str, size: float = 5.5, **more: Any) -> None:
    edge = 1.3 if shape in "x|" else 0
    ax.plot(x, y, color=color, marker=shape, markersize=size, markeredgewidth=edge, ls="none", zorder=4, **more)


def _lines(
    ax: Axes, rows: pd.DataFrame, ink: Ink, x: str, y: str, *, low: str = "", high: str = "", points: bool = True
) -> None:
    """A line for each estimator, with points, and intervals where they have a length."""
    rows = rows[np.isfinite(rows[y]) & (rows[low].notna() if low else True)]
    numbers = sorted(int(i) for i in rows["number"].unique())
    before = len(ax.lines)
    if numbers:
        sns.lineplot(
            rows, x=x, y=y, ax=ax, hue="number", hue_order=numbers, palette={i: ink.of(i) for i in numbers},
            style="number", style_order=numbers, markers=[marker(i) for i in numbers] if points else False,
            dashes=False, markersize=4.5, markeredgewidth=0, linewidth=1.1, errorbar=None, estimator=None, legend=False,
        )  # fmt: skip
    for i, line in zip(numbers, ax.lines[before:], strict=True):
        line.set_gid(f"e{i}")
    for i, own in _each(rows):
        some = own[own[low] < own[high]] if low else own.iloc[:0]
        if len(some):
            with _belongs_to(ax, i):
                ax.vlines(some[x], some[low], some[high], color=ink.of(i), lw=1.1)
    ax.set_ylabel("")


# -- against the reference


def _names(ax: Axes, names: Mapping[int, str], room: float, ink: Ink) -> None:
    """Names of rows left of the axes, cut to their room; the tables have them whole."""
    longest = int(room / LETTER)
    for at, (i, given) in enumerate(names.items()):
        name = " ".join(given.split())
        short = name if len(name) <= longest else f"{name[: longest - 1]}…"
        text = ax.annotate(
            short, (0, at), xycoords=("axes fraction", "data"), xytext=(-6, 0), textcoords="offset points", ha="right",
            va="center", color=ink.ink, fontsize=9.5,
        )  # fmt: skip
        text.set_gid(f"e{i}")


def _ratios(table: pd.DataFrame) -> Drawing:
    def draw(figure: Figure, rows: pd.DataFrame, ink: Ink) -> None:
        height = figure.get_figheight() * 72
        panels = (("ratio", "tr Cov, × ref", 130.0), ("rollouts_to_match", "rollouts to match", 252.0))
        for column, title, left in panels:
            ax = figure.add_axes((left / WIDTH, 24 / height, 98 / WIDTH, (height - 48) / height))
            _dress(ax, ink, title)
            ends = [f"{column}_low", f"{column}_high"] if f"{column}_low" in rows else [column]
            low, high = _log(ax, "x", list(rows[[column, *ends]].to_numpy().ravel()), include=[1.0], narrow=True)
            ax.axvline(1.0, color=ink.faint, lw=0.9)
            ax.set_ylim(len(rows) - 0.5, -0.5)
            ax.set_yticks(range(len(rows)), [""] * len(rows))
            for at, r in enumerate(rows.to_dict("records")):
                _point(ax, r, column, at, ink, (low, high))
            ax.set(xlabel=None, ylabel=None)
        _names(figure.axes[0], dict(zip(rows["number"], rows["estimator"], strict=True)), 122, ink)

    return Drawing("ratios", table, draw, 48 + ROW * len(table))


def _point(ax: Axes, r: Mapping[Any, Any], column: str, at: float, ink: Ink, limits: tuple[float, float]) -> None:
    """The point of one row with its interval; an arrow at the edge for 0 and infinity, nothing where either is NaN."""
    value, i, color = float(r[column]), int(r["number"]), ink.finding.get(r["finding"], ink.ink)
    if math.isnan(value) or math.isnan(r.get(f"{column}_low", value)):
        return
    ends = (r.get(f"{column}_low", value), r.get(f"{column}_high", value))
    inside = limits[0] <= value <= limits[1]
    mark = ("s" if r["finding"] == "biased" else "o") if inside else (">" if value > 1 else "<")
    with _belongs_to(ax, i):
        if ends[0] < ends[1]:
            ax.hlines(at, max(ends[0], limits[0]), min(ends[1], limits[1]), color=color, lw=1.4)
        _points(ax, [value if inside else limits[value > 1]], [at], color=color, shape=mark, clip_on=False)


# -- bias and variance


def _plane(table: pd.DataFrame, gradient_norm: float) -> Drawing:
    unit = gradient_norm if gradient_norm > 0 else 1.0

    def draw(figure: Figure, rows: pd.DataFrame, ink: Ink) -> None:
        of = "/‖∇J‖" if gradient_norm > 0 else ""
        ax = _axes(figure, ink, title=f"√tr Cov{of}, one batch", xlabel=f"‖bias‖{of}")
        bias = (rows["bias"] / unit).where(rows["finding"] != "unbiased", 0.0)
        biased, ends = bias > 0, ["rel_low", "rel_high"]
        far = rows[ends].where(rows["finding"] != "unbiased", axis=0).to_numpy().ravel() * gradient_norm / unit
        deviation = np.sqrt(rows["variance"].clip(lower=0)) / unit
        some = [x for x in (*bias, *far) if x > 0]
        # those without bias stand side by side in a column of their own, left of the logarithmic axis
        floor = min(some, default=0.1) / 6  # a place, no value
        low, high = _log(ax, "x", some, include=[floor / 2, floor * 12] if not biased.all() else ())
        bottom, top = _log(ax, "y", [*deviation, *(deviation / 10)], include=some)
        x = np.geomspace(low, high, 300)
        for level in 10.0 ** np.arange(math.floor(math.log10(bottom)), math.ceil(math.log10(top * 1.5)) + 1):
            for part in (1.0, 10**0.5):
                y = np.sqrt(np.clip((level * part) ** 2 - x**2, 0, None))
                ax.plot(x[y > bottom / 10], y[y > bottom / 10], color=ink.faint, lw=0.5, ls=(0, (4, 3)))
        if not biased.all():
            ax.axvspan(floor / 1.8, floor * 1.8, color=ink.line, lw=0)
        places = iter(np.geomspace(floor / 1.6, floor * 1.6, max(int((~biased).sum()), 1)))
        for r, b, s in zip(rows.to_dict("records"), bias, deviation, strict=True):
            i, at = int(r["number"]), b if b > 0 else next(places)
            if not (math.isfinite(s) and s > 0) or math.isnan(r["variance_low"]):
                continue
            with _belongs_to(ax, i):
                ax.plot([at, at], [s, s / 10], color=ink.of(i), lw=0.8)  # 100 batches averaged
                if r["variance_low"] < r["variance_high"]:
                    ax.vlines(
                        at, *(np.sqrt(r[f"variance_{end}"]) / unit for end in ("low", "high")), color=ink.of(i), lw=2
                    )
                if r["finding"] != "unbiased" and r["rel_low"] < r["rel_high"]:
                    left, right = (r[end] * gradient_norm / unit for end in ends)
                    ax.hlines(s, max(left, low) if b > 0 else at, right, color=ink.of(i), lw=2)
                _points(ax, [at], [s], color=ink.of(i), shape=marker(i))
        ticks = [t * 10.0**e for e in range(-12, 6) for t in ((1,) if high / floor > 300 else (1, 2, 5))]
        ax.xaxis.set_major_locator(
            FixedLocator([*([] if biased.all() else [floor]), *(t for t in ticks if floor * 2.5 < t <= high)])
        )
        ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: "0" if v == floor and not biased.all() else _short(v)))
        ax.set(ylabel=None, ylim=(bottom, top), xlim=(low, high))

    return Drawing("plane", table, draw, HEIGHT + 40)


def _mse(table: pd.DataFrame, gradient_norm: float) -> Drawing:
    least = float(table["cost"].min()) if len(table) else 1.0
    budgets = [float(x) for x in np.geomspace(least, least * 1e4, 41)]
    unit = gradient_norm**2 if gradient_norm > 0 else 1.0

    def draw(figure: Figure, rows: pd.DataFrame, ink: Ink) -> None:
        ax = _axes(
            figure, ink, title=f"MSE{'/‖∇J‖²' if gradient_norm > 0 else ''} of the average", xlabel="rollouts spent"
        )
        curves = mse_curves(rows, budgets)
        number = dict(zip(rows["estimator"], rows["number"], strict=True))
        curves = curves.assign(number=curves["estimator"].map(number))
        columns = ["mse", "mse_low", "mse_high"]
        curves[columns] = curves[columns] / unit
        _log(ax, "x", budgets)
        _log(ax, "y", list(curves["mse"]))
        cost = dict(zip(rows["estimator"], rows["cost"], strict=True))
        curves = curves[curves["rollouts"] >= curves["estimator"].map(cost) * (1 - 1e-9)]  # one batch at least
        curves = curves[curves["mse_low"].notna()]
        _lines(ax, curves, ink, "rollouts", "mse", points=False)
        for i, own in _each(curves):
            with _belongs_to(ax, i):
                marks = own.iloc[i % 5 :: 8]
                _points(ax, marks["rollouts"], marks["mse"], color=ink.of(i), shape=marker(i), size=4)
                if (own["mse_low"] < own["mse_high"]).any():
                    ax.fill_between(own["rollouts"], own["mse_low"], own["mse_high"], color=ink.of(i), alpha=0.2, lw=0)
        ax.set_xlabel("rollouts spent", color=ink.faint, labelpad=2)

    return Drawing("mse", table, draw, HEIGHT + 40)


# -- where it comes from


def _steps(table: pd.DataFrame) -> Drawing:
    def draw(figure: Figure, rows: pd.DataFrame, ink: Ink) -> None:
        ax = _axes(figure, ink, title="tr Cov of the part of each position", xlabel="position t")
        positive = rows[rows["variance"] > 1e-12 * rows["variance"].max()]
        _lines(ax, positive, ink, "step", "variance")
        _log(ax, "y", list(positive["variance"]))
        ax.set_xticks(sorted(rows["step"].unique()))

    return Drawing("steps", table, draw)


def _sources(table: pd.DataFrame, approximate: pd.DataFrame) -> Drawing:
    count = table["number"].nunique() if len(table) else 0

    def draw(figure: Figure, rows: pd.DataFrame, ink: Ink) -> None:
        height = figure.get_figheight() * 72
        ax = figure.add_axes((130 / WIDTH, 22 / height, 220 / WIDTH, (height - 46) / height))
        _dress(ax, ink, "variance of a row's terms, summed over t")
        sums = rows.groupby("number")[list(PARTS)].sum()
        for at, (number, r) in enumerate(sums.iterrows()):
            own, start = approximate[approximate["number"] == number].iloc[0], 0.0
            with _belongs_to(ax, int(str(number))):
                for part in PARTS:
                    ax.barh(at, r[part], left=start, height=0.62, color=ink.parts[part], lw=0)
                    start += r[part]
                _points(ax, [own["none"]], [at], color=ink.ink, shape="|", size=9)
                _points(ax, [own["independent"]], [at], color=ink.ink, shape="x", size=5)
        ax.set_ylim(len(sums) - 0.5, -0.5)
        ax.set_xlim(left=0)
        ax.set_yticks([])
        ax.xaxis.set_major_formatter(FuncFormatter(_short))
        ax.xaxis.set_major_locator(mpl.ticker.MaxNLocator(4))
        ax.set(xlabel=None, ylabel=None)
        names = rows.drop_duplicates("number").set_index("number")["estimator"]
        _names(ax, {int(i): names[i] for i in sums.index}, 122, ink)

    return Drawing("sources", table, draw, 46 + ROW * count)


MOST_BLOCKS = 16


def _blocks(table: pd.DataFrame) -> Drawing:
    """Of the parameters, where the policy has more than a table."""
    shown = table[table["space"] == ("parameters" if (table["space"] == "parameters").any() else "logits")]
    largest = shown.groupby("block", sort=False)["share"].mean().nlargest(MOST_BLOCKS)
    shown = shown[shown["block"].isin(largest.index)]

    def draw(figure: Figure, rows: pd.DataFrame, ink: Ink) -> None:
        height = figure.get_figheight() * 72
        ax = figure.add_axes((150 / WIDTH, 22 / height, 200 / WIDTH, (height - 46) / height))
        _dress(ax, ink, "share of tr Cov, %")
        order = {name: at for at, name in enumerate(largest.index)}
        for i, own in _each(rows):
            with _belongs_to(ax, i):
                _points(ax, 100 * own["share"], own["block"].map(order), color=ink.of(i), shape=marker(i),
                        size=4.5, alpha=0.85)  # fmt: skip
        ax.set_ylim(len(order) - 0.5, -0.5)
        ax.set_xlim(left=0)
        ax.set_yticks(range(len(order)), [""] * len(order))
        ax.set(xlabel=None, ylabel=None)
        longest = int(142 / LETTER)
        for name, at in order.items():
            text = str(name).removeprefix("model.")
            ax.annotate(text if len(text) <= longest else f"…{text[1 - longest :]}", (0, at), xytext=(-6, 0), ha="right",
                        xycoords=("axes fraction", "data"), textcoords="offset points", va="center", color=ink.ink)  # fmt: skip

    return Drawing("blocks", shown, draw, 46 + ROW * min(len(largest), MOST_BLOCKS))


# -- sweeps


def _sizes(table: pd.DataFrame, name: str, x: str, label: str, gradient_norm: float) -> list[Drawing]:
    def needed(scale: str, variance: str) -> pd.Series:
        pairs = zip(table[scale], table[variance], table["cost"], strict=True)
        return pd.Series([c * noise(k, v) / gradient_norm**2 for k, v, c in pairs], index=table.index)

    rollouts = table.iloc[:0]
    if gradient_norm > 0:
        rollouts = table.assign(needed=needed("scale", "variance"), needed_low=needed("scale_high", "variance_low"),
                                needed_high=needed("scale_low", "variance_high"))  # fmt: skip
        rollouts = rollouts[np.isfinite(rollouts["needed"])]

    def panel(y: str, title: str) -> Draw:
        def draw(figure: Figure, rows: pd.DataFrame, ink: Ink) -> None:
            ax = _axes(figure, ink, title=title, xlabel=label)
            rows = rows[rows[y] > 1e-12 * rows[y].max()]
            _log(ax, "x", list(rows[x]))
            _lines(ax, rows, ink, x, y, low=f"{y}_low", high=f"{y}_high")
            _log(ax, "y", list(rows[[y, f"{y}_low", f"{y}_high"]].to_numpy().ravel()))
            ax.xaxis.set_major_locator(FixedLocator(_spread(sorted(rows[x].unique()))))
            ax.set_xlabel(label, color=ink.faint, labelpad=2)

        return draw

    return [
        Drawing(f"{name}-variance", table, panel("variance", "tr Cov of one batch")),
        Drawing(f"{name}-rollouts", rollouts, panel("needed", "rollouts until signal = noise")),
    ]


def _spread(values: Sequence[float]) -> list[float]:
    """Those of them that have room on a logarithmic axis."""
    kept: list[float] = []
    for v in values:
        if not kept or v / kept[-1] >= 1.3:
            kept.append(float(v))
    return kept


def _staleness(table: pd.DataFrame) -> list[Drawing]:
    def draw_bias(figure: Figure, rows: pd.DataFrame, ink: Ink) -> None:
        ax = _axes(figure, ink, title="‖bias‖/‖∇J‖", xlabel="staleness of the behavior policy")
        clean = rows.assign(rel=rows["rel"].where(rows["finding"] != "unbiased", 0.0))
        _lines(ax, clean, ink, "staleness", "rel", low="rel_low", high="rel_high")
        top = float(clean["rel"].max())
        if top > 2:
            ax.set_yscale("asinh", linear_width=0.3)
            ticks = [t for t in (0, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 1000) if t <= top * 1.1]
            ax.yaxis.set_major_locator(FixedLocator(ticks))
            ax.yaxis.set_minor_locator(NullLocator())
        ax.yaxis.set_major_formatter(FuncFormatter(_short))
        ax.set_ylim(bottom=-0.02 * max(top, 0.05))
        ax.set_xticks(sorted(rows["staleness"].unique()))
        ax.xaxis.set_major_formatter(FuncFormatter(_short))

    def draw_variance(figure: Figure, rows: pd.DataFrame, ink: Ink) -> None:
        ax = _axes(figure, ink, title="tr Cov of one batch", xlabel="staleness of the behavior policy")
        rows = rows[rows["variance"] > 1e-12 * rows["variance"].max()]
        _lines(ax, rows, ink, "staleness", "variance", low="variance_low", high="variance_high")
        _log(ax, "y", list(rows[["variance", "variance_low", "variance_high"]].to_numpy().ravel()))
        ax.set_xticks(sorted(rows["staleness"].unique()))
        ax.xaxis.set_major_formatter(FuncFormatter(_short))

    has_direction = table[table["rel"].notna()]
    return [Drawing("staleness-bias", has_direction, draw_bias), Drawing("staleness-variance", table, draw_variance)]
