"""How many positives an anchor will have, and the threshold and groups that keep them few but not none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from nnunetv2.preprocessing.resampling.default_resampling import compute_new_shape

from nnunetv2_macl.data import Sampling, draw_corner, position
from nnunetv2_macl.nnunet import DatasetConfiguration, read_json

ONLY_THE_OWN_VIEW = "only the own view is a positive"


def resampled_shapes(configuration: DatasetConfiguration) -> list[list[int]]:
    """Shapes of the training cases as the configuration has them, (3,) voxels each, from nnU-Net's own fingerprint."""
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
    """Chebyshev distances of all pairs of patches in batches drawn as in training, (N, N) each, fraction of the volume."""
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
    """Mean number of positives an anchor, its own view included: both views of each near patch, itself not."""
    return float(np.mean([2 * (d < threshold).sum(1).mean() - (1 if threshold > 0 else -1) for d in distances]))


def plan_threshold(shapes: Sequence[Sequence[int]], sampling: Sampling, recipe: Any) -> tuple[float, float, str]:
    """Threshold t, the expected number of positives an anchor (own view included), and the reason."""
    if not recipe.compares_positions:
        return 0.0, 0.0, "no patches are compared"
    threshold = float(recipe.threshold)
    distances = positive_distances(shapes, sampling)
    at_recipe = _expected_positives(distances, threshold)
    if not recipe.limit_positives or threshold == 0:
        return threshold, at_recipe, "as the recipe has it"
    limit = max(sampling.batch_size / 8, 2.5 * (sampling.position_group_size - 1))
    while _expected_positives(distances, threshold) - 1 > limit:
        threshold = threshold * 0.9 if threshold > 0.004 else 0.0
    threshold = round(threshold, 4)
    expected = _expected_positives(distances, threshold)
    if threshold == recipe.threshold:
        return threshold, expected, f"as the recipe has it: at most {limit:.3g} positives beside the own view"
    reason = (
        f"lowered from {recipe.threshold}, where an anchor would have {at_recipe - 1:.1f} positives beside its own view: more "
        f"than {limit:.3g} dilute the own view, which is learned first, and the run collapses"
    )
    if threshold == 0:
        reason += "; too many patches share one position here to leave a few, so the own view alone is a positive"
    return threshold, expected, reason


def plan_position_groups(axes: int, batch_size: int, recipe: Any) -> tuple[int, str]:
    if not recipe.compares_positions:
        return 1, "no patches are compared"
    if recipe.threshold == 0:
        return 1, ONLY_THE_OWN_VIEW
    if axes == 2:
        return 1, "slices of different cases meet by chance often enough"
    size = 1 + max(1, batch_size // 16)
    if batch_size < 2 * size:
        return 1, f"a batch of {batch_size} is too small for groups"
    return (
        size,
        "in 3D few random patches lie near each other, so some are drawn at one relative place of several cases",
    )
