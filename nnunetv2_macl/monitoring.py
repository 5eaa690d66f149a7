"""What a run shows of itself: curves with their reference lines, the collapse test, pictures of the views."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from nnunetv2_macl.files import write_whole
from nnunetv2_macl.losses import ReferenceValues, positive_mask, reference_values
from nnunetv2_macl.recipe import Recipe

LOSS_NAMES = {
    "global": "L_g, image level",
    "dense": "L_d, pixel level",
    "equivariance": "L_ER, feature level",
    "restoration": "L_R, restoration",
}
# those that have a value at which nothing is learned
CONTRASTIVE = ("global", "dense")
# A loss counts as learned when it is below collapse by this share of the way to the own-view line.
_LEARNED_SHARE = 0.05
# Unit vectors that vary less than this are one vector.
_SMALLEST_VARIANCE = 0.01
# A loss that fell by more than this share of the collapse value since the epoch before is on its way, wherever it is.
_FALLING_SHARE = 0.005
# Epochs can be a few steps long; before this many the loss says little.
_MIN_STEPS = 40


@torch.no_grad()
def embedding_variance(embeddings: Tensor) -> Tensor:
    """How much (N, C) embeddings vary between images: 1 - |mean of the unit vectors|^2. 0 one vector, 1 all over."""
    return 1 - F.normalize(embeddings.float(), dim=-1).mean(0).square().sum()


@torch.no_grad()
def feature_statistics(features: Tensor) -> tuple[Tensor, Tensor]:
    """Of (N, C, *spatial) features: their RMS, and the share of their variance that lies between images.

    Instance norm fixes the RMS, so a network that makes one map for every image shows in the second number alone.
    """
    features = features.float().flatten(1)
    between = features.var(0, unbiased=False).mean()
    return features.square().mean().sqrt(), between / features.var(unbiased=False).clamp_min(1e-12)


def mean_positives(positions: Tensor, threshold: float) -> Tensor:
    """Return the mean number of positives of an anchor in a batch, its own other view included."""
    return positive_mask(positions, threshold).sum(1).float().mean()


def contrastive_references(patches: int, positives: float, recipe: Recipe) -> ReferenceValues:
    return reference_values(
        patches,
        max(1.0, positives),
        temperature=recipe.temperature,
        base_temperature=recipe.base_temperature,
        own_view_weight=recipe.own_view_weight,
    )


def collapse_reason(
    epoch: dict[str, float], before: dict[str, float], references: ReferenceValues, steps_done: int
) -> str | None:
    """Why the run counts as collapsed, or None.

    Args:
        epoch: means over the epoch: ``global`` and ``dense`` losses, ``embedding_variance``, as far as there are any.
        before: the losses of the epoch before; empty in the first.
        references: for this epoch's batch and positives.
        steps_done: since the run began.
    """
    if steps_done < _MIN_STEPS:
        return None
    reasons = []
    line = references.collapse - _LEARNED_SHARE * (references.collapse - references.own_view_only)
    for name in CONTRASTIVE:
        # fresh networks start above the line and fall through it
        falling = before.get(name, math.inf) - epoch.get(name, math.inf) > _FALLING_SHARE * references.collapse
        if epoch.get(name, -math.inf) > line and not falling:
            reasons.append(
                f"{LOSS_NAMES[name]} is {epoch[name]:.3f}: at {references.collapse:.3f} every image has one embedding, a "
                f"network that knows the own view alone reaches {references.own_view_only:.3f}"
            )
    if epoch.get("embedding_variance", 1.0) < _SMALLEST_VARIANCE:
        reasons.append(f"embeddings do not vary between images (variance {epoch['embedding_variance']:.4f} of 1)")
    return "; ".join(reasons) or None


def collapse_advice(recipe: Recipe) -> str:
    """What to try, by the names of recipe keys, what helped most first."""
    tries = []
    if not recipe.standardise_projector:
        tries.append("standardise_projector=true")
    if recipe.own_view_weight < 0.5:
        tries.append(f"own_view_weight=0.5 (now {recipe.own_view_weight:g})")
    if not recipe.limit_positives:
        tries.append("limit_positives=true")
    if recipe.threshold > 0:
        tries.append(f"a smaller threshold (now {recipe.threshold:g}), or threshold_warmup=0.2")
    tries.append(f"a smaller weight_equivariance (now {recipe.weight_equivariance:g})")
    tries.append(f"another learning_rate (now {recipe.learning_rate:g}) or optimizer (now {recipe.optimizer})")
    return (
        f"Recipe keys to try with --set KEY=VALUE, in this order: {'; '.join(tries)}. -recipe macl has settings that do not "
        "collapse."
    )


# --- pictures ------------------------------------------------------------------------------------------------------------


def plot_progress(log: dict[str, list], file: Path, title: str) -> None:
    """``progress.png``: each loss with its reference lines, embedding variance, learning rate, speed; over epochs."""
    names = [name for name in LOSS_NAMES if log.get(f"train_losses/{name}")]
    varies = bool(log.get("embedding_variance"))
    panels = len(names) + varies + 2
    # Without pyplot, which other threads may be using.
    figure = Figure(figsize=(11, 3.2 * panels))
    axes = figure.subplots(panels, 1, sharex=True)
    epochs = range(len(log["lrs"]))
    for axis, name in zip(axes, names, strict=False):
        axis.plot(epochs, log[f"train_losses/{name}"], "o-", ms=3, color="C0", label=LOSS_NAMES[name])
        if name in CONTRASTIVE:
            for key, colour, label in (
                ("collapse", "C3", "collapse: one embedding for every image"),
                ("own_view_only", "C1", "own view only"),
                ("all_found", "C2", "all positives found"),
            ):
                axis.plot(epochs, log[f"references/{key}"], "--", color=colour, lw=1, label=label)
        axis.set_ylabel("loss")
        axis.legend(loc="best", fontsize=8)
    if varies:
        _line(axes[-3], epochs, log["embedding_variance"], "variance of features between images (0: collapsed)", "C4")
        axes[-3].set_ylim(0, 1.02)
    _line(axes[-2], epochs, log["lrs"], "learning rate", "C5")
    _line(axes[-1], epochs, log["patches_per_second"], "patches a second", "C6")
    axes[-1].set_ylim(0, 1.1 * max(log["patches_per_second"]))
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[-1].set_xlabel("epoch")
    axes[0].set_title(title, fontsize=10)
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.tight_layout()
    _write(figure, file, dpi=100)


def _line(axis: Any, epochs: range, values: Sequence[float], label: str, colour: str) -> None:
    axis.plot(epochs, values, "o-", ms=3, color=colour, label=label)
    axis.legend(loc="best", fontsize=8)


def plot_views(
    groups: dict[str, Tensor],
    positions: Tensor,
    names: Sequence[str],
    threshold: float | None,
    file: Path,
    shown: int = 8,
) -> None:
    """``views.png``: what each branch was shown of the first patches, where they lie, and which are positives.

    Args:
        groups: what is shown by title, each (N, C, *spatial); volumes are shown at their middle slice.
        positions: (N, 3), fraction of the volume.
        names: of the cases.
        threshold: t in force; None where patches are not compared.
        file: to write.
        shown: number of patches.
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
            words += f"\npositives beside its own view:\n{listed or 'none'}"
        text = axes[row, -1]
        text.set_axis_off()
        # a name may hold what matplotlib takes for a formula
        text.text(0, 0.5, words, fontsize=9, va="center", parse_math=False)
    rule = f"Patches closer than {threshold:g} of the volume on every axis are positives." if threshold else ""
    if threshold == 0:
        rule = "Only the two views of one patch are positives."
    figure.suptitle(f"What the network is shown. {rule}", fontsize=11)
    figure.tight_layout(rect=(0, 0, 1, 0.98))
    _write(figure, file, dpi=90)


def _write(figure: Figure, file: Path, dpi: int) -> None:
    """Raises UserError where the file cannot be written."""
    try:
        write_whole(file, lambda stream: figure.savefig(stream, dpi=dpi, format="png"))
    finally:
        plt.close(figure)
