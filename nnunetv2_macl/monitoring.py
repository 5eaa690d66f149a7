"""Monitor a run: reference values for its curves, detection of collapse, and pictures of curves and views."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from nnunetv2_macl.files import atomic_write
from nnunetv2_macl.losses import positive_mask
from nnunetv2_macl.methods.registry import all_methods, loss_labels, methods_of
from nnunetv2_macl.recipe import Recipe

# Unit vectors with a smaller variance count as equal.
_SMALLEST_VARIANCE = 0.01
# Vectors with a smaller effective rank vary in one direction only. The rank of a smaller batch is not reliable.
_SMALLEST_RANK, _MIN_BATCH = 1.05, 8
# No test for collapse before this number of steps, because the first losses say little and epochs may be short.
_MIN_STEPS = 40
_LINE_COLOURS = ("C3", "C1", "C2", "C7")
# titles of the curves besides those of the losses, by their key in the log of a run, and those next to the losses
CURVES = {
    "embedding_variance": "Variance of embeddings between images (0: collapsed)",
    "embedding_rank": "Effective rank of the embeddings of a batch (1: collapsed)",
    "positives": "Positives per anchor, including its own view",
    "lrs": "Learning rate",
    "patches_per_second": "Patches per second",
}
_SHOWN_WITH_LOSSES = ("embedding_variance", "lrs", "patches_per_second")


def reference_lines(recipe: Recipe, batch_size: int, means: Mapping[str, float]) -> dict[str, float]:
    """Return reference values for the curves of a run, by name.

    Args:
        recipe: Recipe of the run.
        batch_size: N, number of patches per step.
        means: Mean statistics of the epoch.
    """
    return {k: v for m in methods_of(recipe.method) for k, v in m.reference_lines(recipe, batch_size, means).items()}


def collapse_reason(
    recipe: Recipe, batch_size: int, means: Mapping[str, float], before: Mapping[str, float], steps_done: int
) -> str | None:
    """Return why the run counts as collapsed, or None.

    With every method, collapsed embeddings do not vary between images, or vary in one direction only. Some methods also
    recognise collapse by their losses, unless they are joined with restoration: their weights are then small, so that their
    losses fall slowly, and restoration trains the network meanwhile.

    Args:
        recipe: Recipe of the run.
        batch_size: N, number of patches per step.
        means: Mean losses and statistics of the epoch; a value may be missing.
        before: Losses of the previous epoch, NaN if it did not train a loss; empty in the first epoch.
        steps_done: Number of steps since the run began.
    """
    if steps_done < _MIN_STEPS:
        return None
    reasons = []
    if len(methods := methods_of(recipe.method)) == 1:
        references = methods[0].reference_lines(recipe, batch_size, means)
        reasons += methods[0].collapse_reasons(means, before, references)
    variance, rank = means.get("embedding_variance", 1.0), means.get("embedding_rank", math.inf)
    if variance < _SMALLEST_VARIANCE:
        reasons.append(f"embeddings do not vary between images (variance {variance:.4f} of 1)")
    elif rank < _SMALLEST_RANK and batch_size >= _MIN_BATCH:
        reasons.append(f"embeddings vary in one direction only (effective rank {rank:.2f})")
    return "; ".join(reasons) or None


def collapse_advice(recipe: Recipe) -> str:
    """Return advice against collapse that names keys of the recipe, the most effective one first."""
    tries = [advice for method in methods_of(recipe.method) for advice in method.collapse_advice(recipe)]
    tries.append(f"another learning_rate (now {recipe.learning_rate:g}) or optimizer (now {recipe.optimizer})")
    return (
        f"Recipe keys to try with --set KEY=VALUE, in this order: {'; '.join(tries)}. -recipe restore compares no embeddings and "
        "cannot collapse."
    )


# --- pictures ------------------------------------------------------------------------------------------------------------


class Line(NamedTuple):
    """A line of a curve: a value of each epoch, or a reference value, at which a method would learn nothing for example."""

    values: list[float]
    label: str
    is_reference: bool = False


def loss_lines(log: dict[str, list]) -> dict[str, list[Line]]:
    """Return the line of each loss in a log, followed by its reference lines, by its title."""
    return {
        title: [
            Line(log[f"train_losses/{name}"], title),
            *(
                Line(values, label, is_reference=True)
                for key, label in lines_of(name).items()
                if (values := log.get(f"references/{key}"))
            ),
        ]
        for name, title in loss_labels().items()
        if log.get(f"train_losses/{name}")
    }


def plot_progress(log: dict[str, list], file: Path, title: str) -> None:
    """Draw ``progress.png``: losses with reference lines, embedding variance, learning rate and speed over the epochs."""
    panels = loss_lines(log)
    panels |= {CURVES[key]: [Line(log[key], CURVES[key])] for key in _SHOWN_WITH_LOSSES if log.get(key)}
    # Without pyplot, which keeps each figure in memory.
    figure = Figure(figsize=(11, 3.2 * len(panels)))
    axes = figure.subplots(len(panels), 1, sharex=True)
    for axis, (name, lines) in zip(axes, panels.items(), strict=True):
        for line, colour in zip(lines, ("C0", *_LINE_COLOURS), strict=False):
            style: dict[str, Any] = {"ls": "--", "lw": 1} if line.is_reference else {"marker": "o", "ms": 3}
            axis.plot(line.values, color=colour, label=line.label, **style)
        if name in CURVES.values():
            axis.set_ylim(bottom=0)
        axis.legend(loc="best", fontsize=8)
        axis.grid(alpha=0.3)
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[-1].set_xlabel("epoch")
    axes[0].set_title(title, fontsize=10)
    figure.tight_layout()
    _write(figure, file, dpi=100)


def lines_of(loss: str) -> dict[str, str]:
    """Return the labels of the reference lines of a loss, by the name of the line."""
    return {k: v for m in all_methods().values() if loss in m.referenced_losses for k, v in m.reference_labels.items()}


def plot_views(
    groups: dict[str, Tensor],
    positions: Tensor,
    names: Sequence[str],
    threshold: float | None,
    file: Path,
    shown: int = 8,
) -> None:
    """Draw ``views.png``: the views of the first patches, their positions, and their positives.

    Args:
        groups: Views by title, each (N, C, *spatial). Of a volume the middle slice is drawn.
        positions: Positions of the patches, (N, 3), fraction of the volume.
        names: Names of the cases.
        threshold: Largest distance t of positives, fraction of the volume; None if positions do not matter.
        file: File of the picture.
        shown: Number of patches to draw.
    """
    shown = min(shown, len(positions))
    mask = None if threshold is None else positive_mask(positions, threshold)[: len(positions), : len(positions)]
    figure, axes = plt.subplots(
        shown, len(groups) + 1, figsize=(2.3 * len(groups) + 4.5, 2.3 * shown), squeeze=False,
        gridspec_kw={"width_ratios": [1] * len(groups) + [1.6]},
    )  # fmt: skip
    for row in range(shown):
        for column, (title, patches) in enumerate(groups.items()):
            image = patches[row, 0].float().cpu().numpy()
            if image.ndim == 3:
                image = image[len(image) // 2]
            low, high = np.percentile(image, (1, 99))
            axes[row, column].imshow(image, cmap="gray", vmin=low, vmax=max(high, low + 1e-6))
            axes[row, column].set_axis_off()
            if row == 0:
                size = "x".join(str(n) for n in patches.shape[2:])
                axes[row, column].set_title(f"{title}\n{size}", fontsize=9)
        where = ", ".join(f"{p:.2f}" for p in positions[row].tolist())
        words = f"patch {row + 1}: {names[row][:28]}\nposition {where}"
        if mask is not None:
            positives = [j + 1 for j in range(len(positions)) if j != row and mask[row, j]]
            listed = ", ".join(map(str, positives[:12])) + (" ..." if len(positives) > 12 else "")
            words += f"\npositives, besides its other view:\n{listed or 'none'}"
        text = axes[row, -1]
        text.set_axis_off()
        # no formulas, because a name may contain dollar signs
        text.text(0, 0.5, words, fontsize=9, va="center", parse_math=False)
    rule = f"Patches closer than {threshold:g} of the volume on every axis are positives." if threshold else ""
    if threshold == 0:
        rule = "Only the two views of one patch are positives."
    figure.suptitle(f"Inputs of the network. {rule}", fontsize=11)
    figure.tight_layout(rect=(0, 0, 1, 0.98))
    _write(figure, file, dpi=90)


def _write(figure: Figure, file: Path, dpi: int) -> None:
    """Write a figure to a file. Raises UserError if the file cannot be written."""
    try:
        atomic_write(file, lambda stream: figure.savefig(stream, dpi=dpi, format="png"))
    finally:
        plt.close(figure)
