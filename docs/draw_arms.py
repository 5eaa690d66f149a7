"""Draw the Dice of the arms of finished studies that ``nnUNetv2_macl_compare`` has written, with a panel for each study.

    python docs/draw_arms.py STUDY_FOLDER ... -o docs/pictures/networks.svg --titles U-Net "Attention U-Net"

A row is one arm, a small point is the Dice of one seed on the test patients, and a bar is the mean. The line is the mean of
training from scratch. The arm with the highest mean comes first. Seeds whose trainings are not all finished are left out.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from draw_steps import COLOURS, GREY, STYLE, by_seed, finished, label
from matplotlib.figure import Figure

from nnunetv2_macl.compare.results import Results
from nnunetv2_macl.compare.study import Study


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the studies and write the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "studies", nargs="+", type=Path, metavar="STUDY_FOLDER", help="folders with one number of labels"
    )
    parser.add_argument("-o", dest="output", required=True, type=Path, metavar="FILE", help="figure, .svg or .png")
    parser.add_argument("--titles", nargs="+", metavar="TITLE", help="title of each study. Default: its data set")
    args = parser.parse_args(arguments)
    results = [Results.read(finished(Study.read(folder), None)) for folder in args.studies]
    titles = args.titles or [result.study.options.dataset for result in results]
    if len(titles) != len(results):
        parser.error(f"--titles has {len(titles)} titles, and there are {len(results)} studies.")
    draw({title: dice(result) for title, result in zip(titles, results, strict=True)}, args.output)


def dice(results: Results) -> dict[str, np.ndarray]:
    """Return the Dice of each seed on the test cases, (S,), by the words for the arm."""
    (labels,) = results.study.split.labels
    return {
        label(arm): by_seed(results.groups[arm.slug, labels].measures["dice"][None])[0] for arm in results.study.arms
    }


def draw(panels: dict[str, dict[str, np.ndarray]], file: Path) -> None:
    """Draw the figure. Its ground is white, so that it is readable on a light and on a dark page."""
    names = dict.fromkeys(arm for panel in panels.values() for arm in panel)
    arms = sorted(names, key=lambda arm: -np.mean([panel[arm].mean() for panel in panels.values() if arm in panel]))
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": "arms"}):
        size = (2.2 + 1.7 * max(2, len(panels)), 0.9 + 0.28 * len(arms))
        figure = Figure(figsize=size, facecolor="white", layout="constrained")
        axes = figure.subplots(1, len(panels), sharey=True, sharex=len(panels) > 2, squeeze=False)[0]
        for axis, (title, panel) in zip(axes, panels.items(), strict=True):
            scratch = panel["from scratch"]
            axis.axvline(scratch.mean(), color=GREY, lw=1)
            for arm, values in panel.items():
                row, colour = arms.index(arm), GREY if values is scratch else COLOURS[0]
                axis.plot(values, [row] * len(values), "o", ms=4, color=colour, alpha=0.6, mew=0)
                axis.plot([values.mean()] * 2, [row - 0.3, row + 0.3], color=colour, lw=2.5)
            axis.set_title(title, fontsize=9.5)
            axis.set_xlabel("Dice")
            axis.grid(alpha=0.25, axis="x")
            axis.spines[["top", "right"]].set_visible(False)
        axes[0].set_yticks(range(len(arms)), [arm.removeprefix("pre-trained, ") for arm in arms])
        axes[0].invert_yaxis()
        figure.savefig(file, dpi=110, metadata={"Date": None} if file.suffix == ".svg" else None)


if __name__ == "__main__":
    main()
