"""Draw ``compare.png``: Dice over the number of labels, and Dice during the training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from nnunetv2_macl.compare.results import Results
from nnunetv2_macl.compare.statistics import Estimate, estimate
from nnunetv2_macl.compare.study import SCRATCH
from nnunetv2_macl.files import atomic_write
from nnunetv2_macl.text import pluralise


def draw(results: Results, file: Path) -> None:
    """Draw the results of a study into a PNG file.

    The upper row shows the Dice on the test cases and its difference to scratch, over the number of labels. The lower row
    shows the Dice on the validation cases over the epochs, with one panel per number of labels. Bars and bands are 95 %
    intervals.
    """
    study = results.study
    labels = study.split.labels
    figure = Figure(figsize=(max(11.0, 3.6 * len(labels)), 8.5), layout="constrained")
    above, below = figure.subfigures(2, 1, hspace=0.06)  # type: ignore[misc]
    colours = {arm.slug: f"C{number}" for number, arm in enumerate(study.arms)}
    over_labels = above.subplots(1, 2)
    _over_labels(over_labels, results, colours)
    above.legend(*over_labels[0].get_legend_handles_labels(), loc="outside upper center", ncols=min(4, len(study.arms)))
    panels = np.atleast_1d(below.subplots(1, len(labels), sharey=True))
    for panel, number in zip(panels, labels, strict=True):
        _over_epochs(panel, results, number, colours)
    panels[-1].legend(loc="best", fontsize=8)
    panels[0].set_ylabel(f"Dice, {pluralise(len(study.split.validation), 'validation case')}")
    seeds = pluralise(study.options.seeds, "seed")
    figure.suptitle(
        f"{study.options.dataset}, {study.options.configuration}: mean and 95 % interval over patients and {seeds}"
    )
    atomic_write(file, lambda stream: figure.savefig(stream, dpi=130, format="png"))


def _over_labels(axes: Any, results: Results, colours: dict[str, str]) -> None:
    study = results.study
    labels = study.split.labels
    resampling = results.test_bootstrap
    arms = [arm.slug for arm in study.arms]

    def dice(arm: str, number: int) -> np.ndarray:
        return results.groups[arm, number].measures["dice"]

    for axis, shown in zip(axes, (arms, [arm for arm in arms if arm != SCRATCH]), strict=True):
        for position, arm in enumerate(shown):
            values = [estimate(dice(arm, n), resampling, None if shown is arms else dice(SCRATCH, n)) for n in labels]
            # shifted, so that intervals do not hide each other
            shift = 1 + 0.03 * (position - (len(shown) - 1) / 2)
            _points(axis, [n * shift for n in labels], values, colours[arm], arm)
        axis.set_xscale("log")
        axis.set_xticks(labels, [str(n) for n in labels])
        axis.xaxis.set_minor_locator(NullLocator())
        axis.set_xlim(labels[0] / 1.25, labels[-1] * 1.25)
        axis.set_xlabel("labelled cases")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(f"Dice, {pluralise(len(study.split.test), 'test case')}")
    axes[1].axhline(0, color=colours[SCRATCH], lw=1.5)
    axes[1].set_ylabel("Dice above scratch, paired")


def _points(axis: Any, x: list[float], values: list[Estimate], colour: str, label: str) -> None:
    middle = np.array([e.value for e in values])
    reach = np.array([[e.value - e.low for e in values], [e.high - e.value for e in values]])
    # not negative, because a percentile interval may exclude the estimate
    axis.errorbar(x, middle, yerr=np.maximum(reach, 0), fmt="o-", ms=5, capsize=4, lw=1.5, color=colour, label=label)


def _over_epochs(axis: Any, results: Results, labels: int, colours: dict[str, str]) -> None:
    resampling = results.validation_bootstrap
    epochs = results.curve_epochs
    for arm in results.study.arms:
        values = [estimate(point, resampling) for point in results.groups[arm.slug, labels].curve]
        colour = colours[arm.slug]
        axis.plot(epochs, [e.value for e in values], "o-", ms=3, color=colour)
        axis.fill_between(epochs, [e.low for e in values], [e.high for e in values], color=colour, alpha=0.15, lw=0)
        if arm.slug == SCRATCH:
            axis.axhline(values[-1].value, color=colour, ls=":", lw=1, label="final value of scratch")
    axis.set_title(pluralise(labels, "labelled case"), fontsize=10)
    axis.set_xlabel("epochs of fine-tuning")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(alpha=0.3)
