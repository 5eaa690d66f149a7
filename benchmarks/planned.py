"""Run nnU-Net's planners on data sets that consist only of a fingerprint."""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner

from nnunetv2_macl.nnunet import FOLDER_VARIABLES, DatasetConfiguration

FLAT = 999.0  # nnU-Net's spacing for the axis that 2D files lack


class Fingerprint(NamedTuple):
    """A data set as nnU-Net's fingerprint describes it: median shape (voxels) and spacing (mm), slices first."""

    name: str
    channels: tuple[str, ...]
    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    planner: type = ExperimentPlanner
    cases: int = 20


def plan_with_nnunet(fingerprint: Fingerprint, folder: Path) -> tuple[str, str]:
    """Run nnU-Net's planner on a data set that consists only of its fingerprint.

    Args:
        fingerprint: Fingerprint of the data set.
        folder: Folder whose subfolders nnU-Net's three environment variables name.

    Returns:
        The names of the data set and of the plans.
    """
    dataset = "Dataset950_Topology"
    raw, preprocessed = folder / "nnUNet_raw" / dataset, folder / "nnUNet_preprocessed" / dataset
    for path in (raw, preprocessed):
        path.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    factors = rng.uniform(0.9, 1.1, (fingerprint.cases, 3))
    shapes = [
        [max(1, round(n * f)) if n > 1 else 1 for n, f in zip(fingerprint.shape, row, strict=True)] for row in factors
    ]
    shapes[0] = list(fingerprint.shape)
    channels = range(len(fingerprint.channels))
    intensities = {"max": 900.0, "mean": 80.0, "median": 70.0, "min": -90.0, "percentile_00_5": -50.0}
    (preprocessed / "dataset_fingerprint.json").write_text(
        json.dumps(
            {
                "spacings": [list(fingerprint.spacing)] * fingerprint.cases,
                "shapes_after_crop": shapes,
                "median_relative_size_after_cropping": 0.9,
                "foreground_intensity_properties_per_channel": {
                    str(channel): intensities | {"percentile_99_5": 500.0, "std": 120.0} for channel in channels
                },
            }
        )
    )
    cases = [f"case_{number:03d}" for number in range(fingerprint.cases)]
    (raw / "dataset.json").write_text(
        json.dumps(
            {
                "channel_names": {str(channel): fingerprint.channels[channel] for channel in channels},
                "labels": {"background": 0, "organ": 1},
                "numTraining": fingerprint.cases,
                "file_ending": ".nii.gz",
                "overwrite_image_reader_writer": "SimpleITKIO",
                "dataset": {
                    case: {
                        "images": [f"imagesTr/{case}_{channel:04d}.nii.gz" for channel in channels],
                        "label": f"labelsTr/{case}.nii.gz",
                    }
                    for case in cases
                },
            }
        )
    )
    # The planner builds networks only to count their voxels, so the meta device saves memory.
    with torch.device("meta"):
        planner = fingerprint.planner(dataset)
        # Remove an older plan, because nnU-Net would keep some of its values.
        (preprocessed / f"{planner.plans_identifier}.json").unlink(missing_ok=True)
        planner.plan_experiment()
    return dataset, planner.plans_identifier


@contextlib.contextmanager
def planned(fingerprint: Fingerprint, configuration: str, folder: Path) -> Iterator[DatasetConfiguration]:
    """Provide the configuration that nnU-Net's planner makes. Within the context, nnU-Net's folders are in ``folder``."""
    before = {name: os.environ.get(name) for name in FOLDER_VARIABLES}
    os.environ.update({name: str(folder / name) for name in FOLDER_VARIABLES})
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            dataset, plans = plan_with_nnunet(fingerprint, folder)
        yield DatasetConfiguration.load(dataset, plans, configuration)
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
