"""Draw Dice against steps of fine-tuning, from the folders of studies that ``nnUNetv2_macl_compare`` has written.

    python docs/draw_steps.py STUDY_FOLDER ... -o docs/pictures/steps.svg --arms scratch recipe:restore

Each row of the figure is one study. On the left is the Dice on the validation patients, with a line for each arm. On the
right is the difference from training from scratch in the same split with the same seed. A line is the mean over splits and
seeds, and its band reaches from the lowest to the highest training. Only seeds whose trainings are all finished are drawn.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from nnunetv2_macl.compare.results import Results
from nnunetv2_macl.compare.statistics import Resampling
from nnunetv2_macl.compare.steps import DONE_FILE
from nnunetv2_macl.compare.study import SCRATCH, Arm, Study, study_folders
from nnunetv2_macl.text import pluralise

# These are the colours of Okabe and Ito, because colour-blind people can tell them apart.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
GREY, TEXT = "#6b6b6b", "#1c2128"
STYLE = {"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9} | dict.fromkeys(
    ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), TEXT
)


@dataclass(frozen=True)
class Curves:
    """The trainings of one study with one number of labelled cases.

    Attributes:
        title: Data set, number of labelled cases, number of trainings.
        steps: Steps of fine-tuning, (P,).
        dice: By arm, the mean Dice of the validation cases, (P, T), for T pairs of a split and a seed.
    """

    title: str
    steps: np.ndarray
    dice: dict[Arm, np.ndarray]


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the studies and write the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="+", type=Path, metavar="STUDY_FOLDER")
    parser.add_argument("-o", dest="output", required=True, type=Path, metavar="FILE", help="figure, .svg or .png")
    parser.add_argument("--arms", nargs="+", metavar="ARM", help="arms to draw, as the study names them. Default: all")
    args = parser.parse_args(arguments)
    rows = [row for folder in args.studies for row in read(folder, args.arms)]
    if not rows:
        parser.error("no seed of these studies has all its trainings finished. Draw fewer arms with --arms.")
    draw(rows, args.output)


def read(folder: Path, arms: Sequence[str] | None = None) -> list[Curves]:
    """Return the finished trainings of a study, for each number of labelled cases.

    Args:
        folder: Folder of a study with one kind of fine-tuning, on one split or several.
        arms: Arms to read. None reads all arms. Arms that the study does not have are left out.
    """
    studies = [study for split in study_folders(folder) if (study := finished(Study.read(split), arms)).options.seeds]
    if not studies:
        return []
    results = [Results.read(study) for study in studies]
    options = studies[0].options
    trainings = sum(study.options.seeds for study in studies)
    counted = f"{pluralise(len(studies), 'split')}, {pluralise(trainings, 'training')} per line"
    return [
        Curves(
            f"{options.dataset}, {options.configuration}, {pluralise(labels, 'labelled case')} ({counted})",
            np.array(results[0].curve_epochs) * options.iterations,
            {
                arm: np.concatenate([by_seed(r.groups[arm.slug, labels].curve) for r in results], 1)
                for arm in found.arms
            },
        )
        for found in studies[:1]
        for labels in found.split.labels
    ]


def finished(study: Study, arms: Sequence[str] | None) -> Study:
    """Return the study with the chosen arms, and with its first seeds up to one whose trainings are not all finished."""
    chosen = [arm for arm in study.options.arms if arms is None or arm in arms or arm == SCRATCH]
    study = replace(study, options=replace(study.options, arms=chosen))
    open_seeds = [cell.seed for cell in study.cells if not (study.cell_folder(cell) / DONE_FILE).is_file()]
    seeds = min(open_seeds, default=study.options.seeds)
    print(f"{study.folder}: {seeds} of {pluralise(study.options.seeds, 'seed')} finished, arms {' '.join(chosen)}")
    return replace(study, options=replace(study.options, seeds=seeds))


def by_seed(curve: np.ndarray) -> np.ndarray:
    """Return the Dice of each seed, (P, S), from a curve (P, S, M, C): the mean over cases, then over classes."""
    each_seed = Resampling.each_seed(*curve.shape[1:3])
    return np.stack([each_seed.mean(point) for point in curve])


def draw(rows: Sequence[Curves], file: Path) -> None:
    """Draw the figure. Its ground is white, so that it is readable on a light and on a dark page."""
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": "steps"}):
        figure = Figure(figsize=(9, 0.5 + 3.1 * len(rows)), facecolor="white", layout="constrained")
        names = list(dict.fromkeys(label(arm) for row in rows for arm in row.dice))
        colours = dict(zip(names, (GREY, *COLOURS), strict=False))
        for part, row in zip(np.atleast_1d(figure.subfigures(len(rows), 1)), rows, strict=True):
            dice, difference = part.subplots(1, 2)
            scratch = next(values for arm, values in row.dice.items() if arm.slug == SCRATCH)
            for arm, values in row.dice.items():
                add_line(dice, row.steps, values, label(arm), colours[label(arm)])
                if arm.slug != SCRATCH:
                    add_line(difference, row.steps, values - scratch, label(arm), colours[label(arm)])
            difference.axhline(0, color=GREY, lw=2)
            dice.set(title="Dice, validation patients", xlabel="steps of fine-tuning")
            difference.set(title="Difference from scratch, same patients and seed", xlabel="steps of fine-tuning")
            part.suptitle(row.title, fontsize=10, weight="bold", x=0.01, ha="left")
        handles = {
            name: handle for row in figure.axes for handle, name in zip(*row.get_legend_handles_labels(), strict=True)
        }
        figure.legend(handles.values(), handles, loc="outside lower center", ncols=min(3, len(names)), frameon=False)
        figure.savefig(file, dpi=110, metadata={"Date": None} if file.suffix == ".svg" else None)


def add_line(axis: Any, steps: np.ndarray, values: np.ndarray, name: str, colour: str) -> None:
    """Add the mean over the trainings and their range. `values` are (P, T)."""
    axis.plot(steps, values.mean(1), "o-", ms=4, lw=2, color=colour, label=name)
    axis.fill_between(steps, values.min(1), values.max(1), color=colour, alpha=0.18, lw=0)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.title.set_fontsize(9.5)


def label(arm: Arm) -> str:
    """Return the words of the legend for an arm."""
    if arm.recipe is not None:
        part = "encoder pre-trained" if arm.encoder_only else "pre-trained"
        start = f"{part}, {','.join([arm.recipe_name, *arm.settings])}"
    else:
        start = f"weights of {Path(arm.weights).stem}" if arm.weights else "from scratch"
    if arm.semi is None:
        return start
    return f"semi-supervised{''.join(f' {value}' for value in arm.semi)}, {start}"


if __name__ == "__main__":
    main()
