"""Choose the threshold and the groups of patches, so that an anchor has a few positives but not many."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from nnunetv2.preprocessing.resampling.default_resampling import compute_new_shape

from nnunetv2_macl.data import Sampling, draw_corner, position
from nnunetv2_macl.nnunet import DatasetConfiguration, read_json

ONLY_THE_OWN_VIEW = "the only positive is the own other view"


def resampled_shapes(configuration: DatasetConfiguration) -> list[list[int]]:
    """Return the shapes of the training cases after resampling, (3,) voxels each, from nnU-Net's fingerprint.

    Raises:
        UserError: The fingerprint is missing.
    """
    file = configuration.folder / "dataset_fingerprint.json"
    fingerprint = read_json(file, f"Type: nnUNetv2_extract_fingerprint -d {configuration.id}")
    order = configuration.plans_manager.transpose_forward
    shapes = []
    for shape, spacing in zip(fingerprint["shapes_after_crop"], fingerprint["spacings"], strict=True):
        shape, spacing = [shape[i] for i in order], [spacing[i] for i in order]
        target = list(configuration.manager.spacing)
        target = spacing[: 3 - len(target)] + target
        shapes.append([int(n) for n in compute_new_shape(shape, spacing, target)])
    return shapes


def positive_distances(shapes: Sequence[Sequence[int]], sampling: Sampling, batches: int = 64) -> list[np.ndarray]:
    """Return the Chebyshev distances between the patches of batches drawn as in training, (N, N) each, fraction of the volume."""
    distances = []
    for step in range(batches):
        positions = []
        for generator, case, place in sampling.draws(step, len(shapes)):
            corner = draw_corner(shapes[case], sampling.patch_size, generator, place)
            positions.append(position(corner, sampling.patch_size, shapes[case]))
        stacked = np.stack(positions)
        distances.append(np.abs(stacked[:, None] - stacked[None]).max(-1))
    return distances


def _expected_positives(distances: list[np.ndarray], threshold: float) -> float:
    """Return the mean number of positives of an anchor: both views of each near patch, except the anchor itself."""
    return float(np.mean([2 * (d < threshold).sum(1).mean() - (1 if threshold > 0 else -1) for d in distances]))


def plan_threshold(shapes: Sequence[Sequence[int]], sampling: Sampling, recipe: Any) -> tuple[float, float, str]:
    """Return the threshold t, the expected number of positives of an anchor (own view included), and the reason."""
    if not recipe.compares_positions:
        return 0.0, 0.0, "the method has no positives by position"
    threshold = float(recipe.threshold)
    distances = positive_distances(shapes, sampling)
    at_recipe = _expected_positives(distances, threshold)
    if not recipe.limit_positives or threshold == 0:
        return threshold, at_recipe, "set by the recipe"
    limit = max(sampling.batch_size / 8, 2.5 * (sampling.position_group_size - 1))
    while _expected_positives(distances, threshold) - 1 > limit:
        threshold = threshold * 0.9 if threshold > 0.004 else 0.0
    threshold = round(threshold, 4)
    expected = _expected_positives(distances, threshold)
    if threshold == recipe.threshold:
        return threshold, expected, f"set by the recipe: at most {limit:.3g} positives besides the own view"
    reason = (
        f"lowered from {recipe.threshold}, which gives an anchor {at_recipe - 1:.1f} positives besides its own view; with more "
        f"than {limit:.3g}, the own view, which is learned first, has little weight, and the run collapses"
    )
    if threshold == 0:
        reason += "; so many patches share one position that every threshold gives too many positives"
    return threshold, expected, reason


def plan_position_groups(axes: int, batch_size: int, recipe: Any) -> tuple[int, str]:
    """Return the number of patches that are drawn at one relative position of different cases, and the reason."""
    if not recipe.compares_positions:
        return 1, "the method has no positives by position"
    if recipe.threshold == 0:
        return 1, ONLY_THE_OWN_VIEW
    if axes == 2:
        return 1, "random slices of different cases are often at near positions"
    size = 1 + max(1, batch_size // 16)
    if batch_size < 2 * size:
        return 1, f"a batch of {batch_size} is too small for groups"
    return (
        size,
        "in 3D, few random patches are near each other, so some are drawn at the same relative position of several cases",
    )
