"""Ratios of `pgcheck bench` as Markdown."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from itertools import groupby

import torch

from pgcheck.bench import Ratio, has_jax
from pgcheck.render.messages import number

WHAT = {
    "gradient samples": "ĝ of given random batches, added into E ĝ and E ĝĝᵀ. The engine gathers its own rows; rivals are"
    " handed tensors. On-policy both estimators have one weight a row, which the engine takes from there on instead of"
    " positions; *by position* is the same engine without that. No batch is left out, and none is looked up: a batch that is"
    " given twice is evaluated twice.",
    "exact verdict": "The whole exact verdict, every check of a declaration included, as distinct batches a second; a rival"
    " would have to differentiate each of them, at the rate that it reaches on random ones. Ordered tuples go through the"
    " same engine.",
    "exact verdict of a transformer": "E ĝ_θ, ∇_θ J and the variance of 26 thousand parameters, the problem built anew in every"
    " round, as distinct groups a second; the rival runs each group through the model, and back.",
    "time of a verdict": "The same verdict in seconds, by class counts where groups are large; the aim is five on two cores.",
    "sketch": "The same coordinates of the same draws: the engine with everything it needs first, the rival by one backward"
    " pass a group. Along ∇J a draw tells both the same.",
    "tr Cov to the same error": "The same run, as the time to one standard error of tr Cov ĝ_θ: that of a sketch has the chance"
    " of its directions in it, which more draws do not remove, and so takes as long as fewer draws of the rival.",
    "estimates in parameters": "ĝ_θ of every draw, nothing left out: backward passes mapped over hundreds of groups, as sampled"
    " verdicts take them where parameters are few, against one pass a group.",
    "sampled draws": "A sampled verdict with everything it needs, the drawing of the batches included; the rival is handed the"
    " same batches and adds up E ĝ and E ĝĝᵀ.",
    "verdict beside sampling": "A whole sampled verdict of what a model writes, from nothing, beside drawing as many batches"
    " and nothing else. The aim on a GPU is a third.",
    "tenth estimator": "Ten estimators in one call of an engine against nine of them; 1 − ratio is (t₁₀ − t₉)/t₁₀, the part of"
    " the run that the tenth is. Exactly: each of four cheap ones is the tenth in turn, and their times are added up.",
}


def bench_markdown(ratios: Sequence[Ratio]) -> str:
    """One table a question; the device is named, since absolute rates are its own."""
    device = f"{platform.machine()} with {torch.backends.cpu.get_cpu_capability()}, Python {platform.python_version()}"
    lines = [
        "# pgcheck bench",
        "",
        f"{device}, torch {torch.__version__}, float64, one thread. Ratios are medians over rounds run in turn; least"
        " and largest in brackets.",
        "",
    ]
    if not has_jax():
        lines += ["jax is not installed (extra `bench`), so it was not raced.", ""]
    order = list(WHAT)
    for question, group in groupby(sorted(ratios, key=lambda r: order.index(r.question)), key=lambda r: r.question):
        lines += [f"## {question}", "", WHAT[question], ""]
        lines += ["| | rival | engine | rival | ratio |", "|---|---|--:|--:|--:|"]
        for r in group:
            spread = f"{number(r.ratio)} [{number(r.least)}, {number(r.largest)}]"
            lines.append(
                f"| {r.subject} | {r.rival} | {number(r.ours)} {r.unit} | {number(r.theirs)} {r.unit} | {spread} |"
            )
        lines.append("")
    return "\n".join(lines)
