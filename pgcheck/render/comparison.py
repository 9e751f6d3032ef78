"""The variance comparison report: what `pgcheck.comparison` measured, as one self-contained page and as files.

Every figure has the numbers behind it in a table below it, sortable, with a CSV button. Whole without JavaScript.

Guarantee: the same comparison gives the same bytes; a number in a CSV file is the number that was measured to the bit.
"""

from __future__ import annotations

import importlib.util
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from markupsafe import Markup

from pgcheck.render.files import write_all
from pgcheck.render.frames import csv
from pgcheck.render.html import environment
from pgcheck.render.messages import number
from pgcheck.render.plots import SERIES, drawings, marker
from pgcheck.runs.compare import Comparison
from pgcheck.runs.report import ProblemRow
from pgcheck.verdicts.verdict import Space

_NAMES = (("estimator", "estimator"), ("found", "finding"))
_BIAS = (("scale", "scale"), ("rel", "rel"), ("off_axis", "off_axis"))
_COLUMNS: dict[str, tuple[tuple[str, str], ...]] = {  # heading and column of the tables of the page
    "results": (
        *_NAMES, ("problem", "problem"), *_BIAS, ("tr Cov", "variance"), ("× ref", "ratio"), ("SNR", "snr"),
        ("rollouts a batch", "cost"),
        ("rollouts to match", "rollouts_to_match"), ("MSE below ref's", "when"),
        ("… at equal cost", "when_rollouts"),
    ),
    "steps": (("estimator", "estimator"), ("t", "step"), ("tr Cov of the part", "variance"), ("share of tr Cov ĝ", "share")),
    "sources": (("estimator", "estimator"), ("t", "step"), ("Σ_τ rollout", "rollout"), ("Σ_a action", "action"),
                ("Σ_s state", "state"), ("sum", "variance")),
    "approximations": (("estimator", "estimator"), ("exact", "none"), ("no cross terms", "no cross terms"),
                       ("independent", "independent")),
    "blocks": (("estimator", "estimator"), ("space", "space"), ("block", "block"), ("tr Cov", "variance"), ("share", "share")),
    "groups": (*_NAMES, ("rows", "rows"), ("groups", "groups"), ("group size", "group_size"), ("tr Cov", "variance"),
               ("SNR", "snr"), ("rollouts a batch", "cost"), *_BIAS),
    "group_sizes": (*_NAMES, ("group size", "group_size"), ("tr Cov", "variance"), ("SNR", "snr"),
                    ("rollouts a batch", "cost"), *_BIAS),
    "staleness": (*_NAMES, ("staleness", "staleness"), ("effective rows", "effective_rows"), *_BIAS,
                  ("tr Cov", "variance"), ("SNR", "snr")),
    "missing": (("estimator", "estimator"), ("problem", "problem"), ("what", "what"), ("why not", "reason")),
}  # fmt: skip

_CAPTIONS = {
    "ratios": "<b>Variance against the reference</b>. Left: tr Cov of one batch. Right: rollouts that have as much"
    " signal for their noise, which neither shorter steps nor uncounted continuations can flatter; signal is the part of E ĝ"
    " along ∇J. Color: what was found of the bias. An arrow points to 0 or ∞.",
    "plane": "<b>Bias and variance</b>. A point is one batch, its line the way down to an average of 100. Dashed: equal MSE,"
    " the further down and left the better; where a line has crossed into the vertical part of a dashed curve, only bias is"
    " left and more data do not help. The gray column holds those without bias, or where a sample found none.",
    "mse": "<b>Who wins at which budget</b>: MSE of the average over a budget of rollouts, those behind the baseline counted."
    " Unbiased ones go down for ever, a biased one ends at ‖bias‖². Where two lines cross is the break-even R*.",
    "steps": "<b>By position</b>: variance of the part of ĝ that position t contributes. Parts covary, so that they need not"
    " add up to tr Cov ĝ; the shares in the table do.",
    "sources": '<b>By source</b>: <span class="part rollout">Σ_τ</span> what follows the action (the other rows of a batch'
    ' included), <span class="part action">Σ_a</span> the action, <span class="part state">Σ_s</span> the state (law of total'
    " variance; Tucker et al., 2018), of one row, in units of B ĝ. A state baseline moves Σ_a only. The bar is the"
    " approximation without cross terms, | the exact variance of the row, × the one that takes score and return as"
    " independent.",
    "blocks": "<b>By block</b>: where in the parameters (in the logits, for a table) the variance sits, the noisiest first.",
    "groups-variance": "<b>Batch size</b>: tr Cov against the rows of a batch, more groups of the same size.",
    "groups-rollouts": "<b>Batch size at equal cost</b>: rollouts until the average has as much signal along ∇J as noise. Flat:"
    " it makes no difference whether one large batch or several small ones are averaged.",
    "group_sizes-variance": "<b>Group size</b>: tr Cov of one group against its size.",
    "group_sizes-rollouts": "<b>Group size at equal cost</b>: the lowest point is the group size that buys the most signal"
    " for a rollout.",
    "staleness-bias": "<b>Bias of an old sampler</b>. Batches are drawn by a policy whose logits are that far on the way to"
    " an older one's: 0 is on-policy, 1 the older policy.",
    "staleness-variance": "<b>Variance of an old sampler</b>. Importance weights that keep the bias at 0 pay here.",
}  # fmt: skip

_TABLES_OF = {"ratios": (), "plane": (), "mse": (), "steps": ("steps",), "sources": ("sources", "approximations"),
              "blocks": ("blocks",)}  # fmt: skip  # the first three show the table of results


# -- the page


@dataclass(frozen=True)
class Cell:
    """A field of a table: its text, and what it sorts by if that is a number."""

    text: str
    value: float | None = None
    finding: str = ""


@dataclass(frozen=True)
class View:
    """A table of the page."""

    id: str
    heads: Sequence[str]
    rows: Sequence[tuple[int, Sequence[Cell]]]  # number of the estimator, cells


def report_html(c: Comparison) -> str:
    """The page."""
    tables = {name: _numbered(table, c) for name, table in c.tables.items()}
    sections = [_section(c, tables, i) for i in range(len(c.problems))]
    exact = bool(tables["comparison"]["batches"].isna().all())
    page = {
        "c": c,
        "exact": exact,
        "results": _view("results", _with_words(tables["comparison"]), "results"),
        "sections": sections,
        "missing": _view("missing", tables["missing"], "missing") if len(tables["missing"]) else None,
        "series": SERIES,
        "marks": [_mark(i) for i in range(len(c.estimators))],
    }
    return environment().get_template("compare.html").render(page)


def _numbered(table: pd.DataFrame, c: Comparison) -> pd.DataFrame:
    order = {e.name: i for i, e in enumerate(c.estimators)}
    return table.assign(number=table["estimator"].map(order))


def _of(tables: Mapping[str, pd.DataFrame], problem: str) -> dict[str, pd.DataFrame]:
    own = {name: table[table["problem"] == problem] for name, table in tables.items()}
    return {name: table for name, table in own.items() if len(table)}


def _section(c: Comparison, tables: Mapping[str, pd.DataFrame], i: int) -> dict[str, Any]:
    """One problem: what to take home, and figures with their tables."""
    p = c.problems[i]
    own = _of(tables, p.name)
    figures = []
    for d in drawings(own, _norm(own["comparison"], p, c.space)):
        prefix = f"p{i}-{d.name}"
        names = _TABLES_OF.get(d.name, (d.name.partition("-")[0],))
        figures.append({
            "name": d.name, "height": d.height, "svg": d.svg(prefix), "caption": Markup(_CAPTIONS[d.name]),
            "views": [_view(f"{prefix}-{name}", own[name], name) for name in names],
            "label": f"{d.name} on {p.name}",
        })  # fmt: skip
    return {"problem": p, "id": f"p{i}", "said": takeaways(own["comparison"]), "figures": figures}


def _norm(table: pd.DataFrame, problem: ProblemRow, space: Space) -> float:
    """‖∇J‖ of the space that the table is in: if not of the logits, ‖bias‖/rel of a row that has both."""
    if space == "logits" and problem.gradient_norm is not None:
        return problem.gradient_norm
    some = table[(table["rel"] > 0) & (table["bias"] > 0)]
    return float((some["bias"] / some["rel"]).iloc[0]) if len(some) else 0.0


def _mark(i: int) -> Markup:
    """The marker of estimator number i, as in the figures."""
    shapes = {
        "o": '<circle cx="6" cy="6" r="4"/>', "s": '<path d="M2.5 2.5h7v7h-7z"/>', "D": '<path d="M6 1l5 5-5 5-5-5z"/>',
        "^": '<path d="M6 1.5l5 9H1z"/>', "v": '<path d="M6 10.5l5-9H1z"/>',
        "P": '<path d="M4.4 1.5h3.2v2.9h2.9v3.2H7.6v2.9H4.4V7.6H1.5V4.4h2.9z"/>',
        "X": '<path d="M3.3 1L6 3.7 8.7 1 11 3.3 8.3 6 11 8.7 8.7 11 6 8.3 3.3 11 1 8.7 3.7 6 1 3.3z"/>',
        "p": '<path d="M6 1.2l4.8 3.5-1.8 5.7H3L1.2 4.7z"/>', "h": '<path d="M6 1l4.3 2.5v5L6 11 1.7 8.5v-5z"/>',
        "*": '<path d="M6 .8l1.500 3.400 3.700.4-2.800 2.500.8 3.700L6 8.900l-3.200 1.900.8-3.700L.8 4.600l3.700-.4z"/>',
    }  # fmt: skip
    shape = Markup(shapes[marker(i)])
    return Markup('<svg viewBox="0 0 12 12" class="mark" style="fill:var(--s{})" aria-hidden="true">{}</svg>').format(
        i % SERIES, shape
    )


# -- tables of the page


def _view(id_: str, table: pd.DataFrame, kind: str) -> View:
    one = table["problem"].nunique() == 1
    columns = [(head, name) for head, name in _COLUMNS[kind] if name in table and not (one and name == "problem")]
    rows = [
        (int(r["number"]), [_cell({str(k): v for k, v in r.items()}, name) for _, name in columns])
        for r in table.to_dict("records")
    ]
    return View(id_, [head for head, _ in columns], rows)


def _cell(row: Mapping[str, Any], name: str) -> Cell:
    x = row[name]
    if name == "finding":
        return Cell(x, finding=x)
    if isinstance(x, str):
        return Cell(x)
    return Cell(with_interval(row, name), None if pd.isna(x) else float(x))


def with_interval(row: Mapping[str, Any], name: str) -> str:
    """The number, and its interval where that has a length; or that there is none."""
    low, high = row.get(f"{name}_low", math.nan), row.get(f"{name}_high", math.nan)
    value = _words(row[name])
    if f"{name}_low" in row and value != "—" and (pd.isna(low) or pd.isna(high)):
        return f"{value} [no interval]"  # the tails of the sample allow none
    return f"{value} [{_words(low)}, {_words(high)}]" if low < high else value


def _words(x: float) -> str:
    if pd.isna(x):
        return "—"
    return ("∞" if x > 0 else "−∞") if math.isinf(x) else number(float(x))


# -- in words


def _with_words(table: pd.DataFrame) -> pd.DataFrame:
    rows = table.to_dict("records")
    return table.assign(
        when=[when(r["better"], r["break_even"], "batches", ends=_ends(r, "break_even")) for r in rows],
        when_rollouts=[
            when(
                r["better_per_rollout"],
                r["break_even_rollouts"],
                "rollouts",
                least=r["cost"],
                ends=_ends(r, "break_even_rollouts"),
            )
            for r in rows
        ],
    )


def _ends(row: Mapping[Any, Any], name: str) -> tuple[float, float]:
    return float(row.get(f"{name}_low", math.nan)), float(row.get(f"{name}_high", math.nan))


def when(
    better: str, even: float, unit: str, *, least: float = 1.0, ends: tuple[float, float] = (math.nan, math.nan)
) -> str:
    """When the MSE is the lower one, with the interval of a sample; a break-even below `least` is before the first batch."""
    if better == "same":
        return "equal"
    low, high = (f"{x:,.3g}".replace("inf", "∞") for x in ends)
    at = f"{even:,.3g}" + (f" [{low}, {high}]" if ends[0] < ends[1] else "") + f" {unit}"
    if better == "below":
        return f"below {at}" if even > least else "never"
    if better == "above":
        return f"above {at}" if even >= least else "always"
    return better


def takeaways(table: pd.DataFrame) -> list[str]:
    """The comparison on one problem in sentences."""
    rows = [{str(k): v for k, v in r.items()} for r in table.to_dict("records")]
    reference = next(r for r in rows if r["estimator"] == r["relative_to"])
    name = reference["estimator"]
    said = [
        f"Reference: {name}, {reference['finding']}, tr Cov {_words(reference['variance'])}, SNR"
        f" {_words(reference['snr'])}, {_words(reference['cost'])} rollouts a batch."
    ]
    fair = [r for r in rows if r["finding"] == "unbiased" and math.isfinite(r["rollouts_to_match"])]
    if len(fair) > 1:
        quietest = min(fair, key=lambda r: r["variance"])
        cheapest = min(fair, key=lambda r: r["rollouts_to_match"])
        said.append(
            f"Quietest of the unbiased: {quietest['estimator']}, {with_interval(quietest, 'ratio')} × the variance of {name}."
            + (
                f" For equal rollouts: {cheapest['estimator']}, {_words(cheapest['rollouts_to_match'])} ×; a batch of"
                f" {quietest['estimator']} takes {_words(quietest['cost'])} rollouts."
                if cheapest is not quietest
                else ""
            )
        )
    known = [r for r in rows if r["finding"] in ("biased", "proportional")]  # of a sample: shown, not suspected
    winning = [r for r in known if r["better_per_rollout"] == "below" and r["break_even_rollouts"] > r["cost"]]
    if winning:
        winning.sort(key=lambda r: -r["break_even_rollouts"])
        budgets = ", ".join(f"{r['estimator']} below {r['break_even_rollouts']:,.3g}" for r in winning)
        said.append(f"More biased than {name}, and yet of lower MSE at a small budget of rollouts: {budgets}.")
    wrong = sorted(
        (r for r in known if r["finding"] == "biased" and r["off_axis"] > 1e-9), key=lambda r: -r["off_axis"]
    )
    if wrong:
        worst = wrong[0]
        said.append(
            f"{len(wrong)} of {len(rows)} point elsewhere than ∇J, furthest {worst['estimator']} (off_axis"
            f" {_words(worst['off_axis'])}): no learning rate mends that."
        )
    return said


# -- files


def write_tables(c: Comparison, folder: Path) -> tuple[list[Path], str]:
    """Every table as CSV (and as Parquet, if pyarrow is there) and every figure as SVG and PNG, whole or not at all; and a
    remark on what was left out.

    Raises:
        UsageError: the folder cannot be made or written to.
    """
    files: dict[Path, str | bytes] = {}
    named = {name: table for name, table in c.tables.items() if len(table)}
    parquet = importlib.util.find_spec("pyarrow") is not None
    for name, table in named.items():
        files[folder / f"{name}.csv"] = csv(table)
        if parquet:
            out = io.BytesIO()
            table.to_parquet(out, index=False)
            files[folder / f"{name}.parquet"] = out.getvalue()
    tables = {name: _numbered(table, c) for name, table in c.tables.items()}
    for p in c.problems:
        own = _of(tables, p.name)
        for d in drawings(own, _norm(own["comparison"], p, c.space)):
            stem = f"{p.name.replace('/', '-')}-{d.name}"
            files |= {folder / f"{stem}.{form}": d.file(form) for form in ("svg", "png")}
    remark = "" if parquet else "no Parquet files: pyarrow is not installed; pip install 'pgcheck[parquet]'"
    return write_all(files), remark
