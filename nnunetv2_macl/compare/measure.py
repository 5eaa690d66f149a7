"""Compare predictions with their references: Dice by nnU-Net, and surface distances in mm by MONAI."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from monai.metrics import compute_average_surface_distance, compute_hausdorff_distance
from nnunetv2.evaluation.evaluate_predictions import compute_metrics, label_or_region_to_key, region_or_label_to_mask
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter


@dataclass(frozen=True)
class SegmentationScores:
    """Scores of one class of one case. NaN means not defined."""

    label: str  # the class, as nnU-Net's ``summary.json`` names it
    dice: float  # 0 to 1; NaN where the class is in neither segmentation
    # mm, the larger of the 95th percentiles of the two directions; NaN unless the class is in both segmentations
    hd95: float
    asd: float  # mm, the mean over the surface voxels of both segmentations; NaN like ``hd95``


def measure(
    reference_file: str,
    prediction_file: str,
    reader: BaseReaderWriter,
    classes: Sequence[int | tuple[int, ...]],
    ignore_label: int | None = None,
) -> list[SegmentationScores]:
    """Compare two segmentation files class by class.

    Args:
        reference_file, prediction_file: The segmentations.
        reader: nnU-Net's reader for these files.
        classes: Labels, or regions of several labels.
        ignore_label: Voxels that have this label in the reference are left out.
    """
    metrics = compute_metrics(reference_file, prediction_file, reader, list(classes), ignore_label)["metrics"]
    reference, properties = reader.read_seg(reference_file)
    prediction, _ = reader.read_seg(prediction_file)
    reference, prediction = reference[0], prediction[0]
    compared = reference != ignore_label if ignore_label is not None else np.ones_like(reference, dtype=bool)
    found = []
    for label in classes:
        wanted, got = (region_or_label_to_mask(array, label) & compared for array in (reference, prediction))
        hd95, asd = surface_distances(wanted, got, properties["spacing"])
        found.append(SegmentationScores(label_or_region_to_key(label), float(metrics[label]["Dice"]), hd95, asd))
    return found


def surface_distances(reference: np.ndarray, prediction: np.ndarray, spacing: Sequence[float]) -> tuple[float, float]:
    """Return the 95th percentile Hausdorff distance and the symmetric average surface distance.

    Args:
        reference, prediction: Masks, bool, (*spatial) with 2 or 3 axes. Axes of one voxel are removed, so a slice is 2D.
        spacing: Spacing of each axis in mm.

    Returns:
        Both distances in the unit of ``spacing``; NaN if a mask is empty and has no surface.
    """
    if not (reference.any() and prediction.any()):
        return float("nan"), float("nan")
    spacing = [float(s) for s, n in zip(spacing, reference.shape, strict=True) if n > 1]
    got, wanted = (torch.from_numpy(np.squeeze(mask).copy())[None, None] for mask in (prediction, reference))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        hd95 = compute_hausdorff_distance(got, wanted, include_background=True, percentile=95, spacing=spacing)
        asd = compute_average_surface_distance(got, wanted, include_background=True, symmetric=True, spacing=spacing)
    return float(hd95), float(asd)
