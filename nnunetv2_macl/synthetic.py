"""Generate a small data set in nnU-Net's raw format: organs of varying place and shape, with texture and noise.

The demonstration and the tests use it. The same seed makes the same images.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from scipy.ndimage import gaussian_filter, map_coordinates

LABELS = {"background": 0, "liver": 1, "vessel": 2}


def generate_dataset(
    folder: Path,
    *,
    labelled: int = 6,
    unlabelled: int = 24,
    test: int = 4,
    shape: Sequence[int] = (12, 64, 64),
    spacing: Sequence[float] = (5.0, 1.5, 1.5),
    channels: int = 1,
    seed: int = 0,
) -> None:
    """Write a raw data set: ``imagesTr``, ``labelsTr``, ``imagesUn``, ``imagesTs``, ``labelsTs``, ``dataset.json``.

    Args:
        folder: Folder of the data set, named DatasetXXX_NAME.
        labelled, unlabelled, test: Number of cases.
        shape: Voxels per axis, slices first. The number of slices varies by a quarter between cases.
        spacing: Millimetres per axis, slices first.
        channels: Number of channels of each image.
        seed: Seed of all random draws.
    """
    number = 0
    for images, labels, count in (
        ("imagesTr", "labelsTr", labelled),
        ("imagesUn", None, unlabelled),
        ("imagesTs", "labelsTs", test),
    ):
        for _ in range(count):
            rng = np.random.default_rng((seed, number))
            case = f"case_{number:03d}"
            slices = max(2, round(shape[0] * rng.uniform(0.75, 1.25)))
            image, segmentation = _case(rng, (slices, *shape[1:]), channels)
            for channel in range(channels):
                _write(image[channel], spacing, folder / images / f"{case}_{channel:04d}.nii.gz")
            if labels:
                _write(segmentation, spacing, folder / labels / f"{case}.nii.gz")
            number += 1
    description = {
        "channel_names": {str(channel): f"MR{channel}" for channel in range(channels)},
        "labels": LABELS,
        "numTraining": labelled,
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(description, indent=4))


def _case(rng: np.random.Generator, shape: tuple[int, ...], channels: int) -> tuple[np.ndarray, np.ndarray]:
    """Return an image (channels, *shape) and its segmentation (*shape): a body, an organ in it, a vessel in the organ."""
    axes = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    bent = [axis + _smooth(rng, shape, 4) * 0.12 for axis in axes]
    z, y, x = bent
    shift = rng.uniform(-0.15, 0.15, 2)

    body = (y / 0.85) ** 2 + (x / 0.8) ** 2 < 1
    size = rng.uniform(0.85, 1.15)
    organ = ((y - shift[0]) / 0.45) ** 2 + ((x + 0.2 - shift[1]) / 0.35) ** 2 + (z / 0.9) ** 2 < size**2
    vessel = ((y - shift[0] - 0.12 * np.sin(2 * z)) / 0.16) ** 2 + ((x + 0.2 - shift[1]) / 0.14) ** 2 < size**2
    organ &= body
    vessel &= organ
    bone = ((y - 0.55) / 0.14) ** 2 + (x / 0.14) ** 2 < 1

    image = np.empty((channels, *shape), dtype=np.float32)
    bias = 1 + 0.25 * _smooth(rng, shape, 8)
    for channel in range(channels):
        levels = rng.uniform(0.9, 1.1, 4) * (60, 110, 160, 25)
        plain = np.select([vessel, organ, bone, body], [levels[2], levels[1], levels[3], levels[0]], 0.0)
        texture = 12 * _smooth(rng, shape, 1.5) * (body * (1 + organ))
        image[channel] = (plain + texture) * bias + rng.normal(0, 6, shape)
    return image, (organ + vessel.astype(np.uint8)).astype(np.uint8)


def _smooth(rng: np.random.Generator, shape: tuple[int, ...], sigma: float) -> np.ndarray:
    """Return a random field of unit standard deviation that is smooth over ``sigma`` voxels in plane."""
    # Few values along the slices, so that organs keep their shape from slice to slice.
    field = gaussian_filter(rng.normal(size=(6, *shape[1:])), (1, sigma, sigma))
    where = np.meshgrid(np.linspace(0, 5, shape[0]), *(np.arange(n) for n in shape[1:]), indexing="ij")
    field = map_coordinates(field, where, order=1)
    return field / field.std()


def _write(array: np.ndarray, spacing: Sequence[float], file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(tuple(float(s) for s in reversed(spacing)))
    sitk.WriteImage(image, str(file))
