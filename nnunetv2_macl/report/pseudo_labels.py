"""Collect the part of the page of a self-trained model about the labels that its teacher gave to unlabelled images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import blosc2
import numpy as np

from nnunetv2_macl.errors import UserError
from nnunetv2_macl.nnunet import read_json
from nnunetv2_macl.report.pictures import coloured, png, window_intensity
from nnunetv2_macl.semi_supervised.pseudo_labels import PSEUDO_LABELS_FOLDER, TEACHER_FILE


def describe_pseudo_labels(folder: Path) -> dict[str, Any] | None:
    """Return facts and pictures of the pseudo-labels of a training, or None if it had none.

    The pictures show the images for which the confidence of the teacher is lowest, in the middle, and highest. Of each
    image, they show the slice with the most foreground.

    Args:
        folder: Folder of the training, ``fold_F``.
    """
    labels = folder / PSEUDO_LABELS_FOLDER
    try:
        made_by = read_json(labels / TEACHER_FILE, "")
        records = []
        for file in (labels / name for name in made_by["labels"]):
            record = read_json(file.with_suffix(".json"), "")
            if float(record["foreground"]):
                records.append((float(record["confidence"]), file, Path(record["image"])))
    except (UserError, KeyError, TypeError, ValueError):
        return None
    records.sort(key=lambda record: record[0])
    facts = [
        ("Images", str(len(made_by["labels"]))),
        ("Without any label", str(len(made_by["labels"]) - len(records))),
        ("Confidence", f"{np.mean([record[0] for record in records]):.3f}, mean probability of the foreground voxels"),
    ]
    if dice := _teacher_dice(made_by):
        facts.append(("Dice of the teacher", f"{dice:.3f}, mean of the classes on the validation cases"))
    shown = {len(records) // 2: "middle", len(records) - 1: "most confident", 0: "least confident"}
    pictures = []
    for number, which in sorted(shown.items()):
        confidence, file, image = records[number]
        try:
            segmentation = blosc2.open(urlpath=str(file), mode="r")[0]
            z = int((segmentation > 0).sum((1, 2)).argmax())
            grey_slice = window_intensity(blosc2.open(urlpath=str(image), mode="r")[0, z])
        except (OSError, RuntimeError):  # The preprocessed images are elsewhere.
            continue
        pictures.append(
            {
                "case": f"{which}: {image.stem}, {confidence:.3f}",
                "image": png(grey_slice),
                "predicted": png(coloured(grey_slice, segmentation[z])),
            }
        )
    return {"facts": facts, "pictures": pictures}


def _teacher_dice(made_by: dict[str, Any]) -> float | None:
    try:
        summary = Path(made_by["fold_folder"]) / "validation" / "summary.json"
        return float(read_json(summary, "")["foreground_mean"]["Dice"])
    except (UserError, KeyError, TypeError, ValueError):
        return None
