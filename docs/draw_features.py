"""Draw the features of pre-trained networks side by side, as colours of the same slices.

    python docs/draw_features.py RUN_FOLDER ... -o docs/pictures/features.png --titles restore macl

Each column is one slice. The rows are the slice, its features in a network that is not trained, and its features in the network
of each run. Equal colours in a row are equal features. The runs must have the same images and the same patch.
`nnUNet_preprocessed` must hold the images.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from draw_steps import STYLE
from matplotlib.figure import Figure

from nnunetv2_macl.report.features import compute_feature_figures
from nnunetv2_macl.report.run import read_run


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the runs and write the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_FOLDER", help="folders of pre-training runs")
    parser.add_argument("-o", dest="output", required=True, type=Path, metavar="FILE", help="figure, .svg or .png")
    parser.add_argument("--titles", nargs="+", required=True, metavar="TITLE", help="name of each run")
    args = parser.parse_args(arguments)
    found = [compute_feature_figures(read_run(folder)) for folder in args.runs]
    for features in found[1:]:
        if not np.array_equal(features.slices, found[0].slices):
            parser.error("the runs have other images or another patch, so their features cannot be compared.")
    rows = {"slice": found[0].slices, "not trained": found[0].colours["before"]}
    rows |= {title: features.colours["after"] for title, features in zip(args.titles, found, strict=True)}
    draw(rows, args.output)


def draw(rows: dict[str, np.ndarray], file: Path) -> None:
    """Draw the figure: a row of pictures for each title. Its ground is white, for light and dark pages."""
    columns = len(list(rows.values())[-1])
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(1 + 1.3 * columns, 1.35 * len(rows)), facecolor="white", layout="constrained")
        axes = figure.subplots(len(rows), columns, squeeze=False)
        for line, (title, pictures) in zip(axes, rows.items(), strict=True):
            for axis, picture in zip(line, pictures, strict=False):
                axis.imshow(picture, cmap="gray", interpolation="nearest")
                axis.set(xticks=[], yticks=[])
            line[0].set_ylabel(title)
        figure.savefig(file, dpi=110)


if __name__ == "__main__":
    main()
