"""Draw curves as SVG in the text colour of the page, for light and dark mode."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from nnunetv2_macl.monitoring import CURVES, loss_lines
from nnunetv2_macl.probes import EFFECTIVE_RANK, LINEAR_DICE

# placeholder in the SVG, which is replaced by the page's text colour
_TEXT = "#010203"
# these colours are readable on white and on black
BLUE, RED, ORANGE, GREEN, VIOLET = "#3b82c4", "#d64545", "#d98a1f", "#3f9b62", "#8f6cc9"
COLOURS = (RED, GREEN, BLUE, ORANGE, VIOLET)
_LINE_COLOURS = (RED, ORANGE, GREEN, VIOLET)
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 11,
    "text.color": _TEXT,
    "axes.labelcolor": _TEXT,
    "axes.edgecolor": _TEXT,
    "xtick.color": _TEXT,
    "ytick.color": _TEXT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}


def loss_curves(log: dict[str, list[float]]) -> dict[str, str]:
    """Return an SVG of each loss with its reference lines, by title."""
    curves = {}
    for number, (title, (loss, *references)) in enumerate(loss_lines(log).items()):
        lines = [(loss.values, BLUE, "-", f"{title.split(',')[0]} of this run")]
        lines += [(r.values, colour, "--", r.label) for r, colour in zip(references, _LINE_COLOURS, strict=False)]
        curves[title] = draw_curves(lines, f"loss_{number}", from_zero=not references)
    return curves


def other_curves(log: dict[str, list[float]]) -> dict[str, str]:
    """Return an SVG of each other curve of the run, by title."""
    titles = CURVES | {LINEAR_DICE: "Dice of a linear probe of the dense features"}
    figures = {
        title: draw_curves([(log[key], BLUE, "-", title)], f"curve_{number}", from_zero=True, legend=False)
        for number, (key, title) in enumerate(titles.items())
        if any(math.isfinite(value) for value in log.get(key, []))
    }
    ranks = {key: values for key, values in log.items() if key.startswith(EFFECTIVE_RANK)}
    if ranks:
        lines = [(values, COLOURS[n % len(COLOURS)], "-", f"stage {n}") for n, values in enumerate(ranks.values(), 1)]
        figures["Effective rank of the encoder's features, by stage"] = draw_curves(lines, "rank", from_zero=True)
    return figures


def draw_curves(
    lines: Sequence[tuple[list[float], str, str, str]], name: str, *, from_zero: bool, legend: bool = True
) -> str:
    """Return a figure of curves over epochs as SVG.

    Args:
        lines: Values, colour, style and label of each curve.
        name: Name of the figure, which must be unique in the page.
        from_zero: Whether the axis begins at 0.
        legend: Whether to draw a legend.
    """
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": name}):
        figure = Figure(figsize=(6.4, 3.3 if legend else 2.4))
        axis = figure.subplots()
        for values, colour, style, label in lines:
            # probes have values only in some epochs
            epochs = [epoch for epoch, value in enumerate(values) if not math.isnan(value)]
            marker = "o" if style == "-" and len(epochs) < 60 else None
            axis.plot(
                epochs,
                [values[epoch] for epoch in epochs],
                style,
                color=colour,
                lw=1.8,
                marker=marker,
                ms=3.5,
                label=label,
            )
        if from_zero:
            axis.set_ylim(bottom=0)
        if max(len(values) for values, *_ in lines) < 2:
            axis.set_xlim(-0.5, 0.5)
        axis.set_xlabel("epoch")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axis.grid(alpha=0.25, lw=0.6)
        if legend:
            # below the axes, where the legend hides no curve
            # The handles are given, because a label that begins with _ would be left out.
            shown = axis.legend(
                axis.lines,
                [label for *_, label in lines],
                loc="upper center",
                bbox_to_anchor=(0.5, -0.2),
                ncol=2,
                fontsize=9,
            )
            for text in shown.get_texts():
                text.set_parse_math(False)  # a name may hold a $
        stream = io.StringIO()
        figure.savefig(stream, format="svg", bbox_inches="tight", transparent=True, metadata={"Date": None})
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :].replace(_TEXT, "currentColor")
    # make ids unique, because a page contains several figures
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]+"', r"\1", svg, count=1, flags=re.S)
    return re.sub(r'(<svg[^>]*?) height="[^"]+"', r"\1", svg, count=1, flags=re.S)
