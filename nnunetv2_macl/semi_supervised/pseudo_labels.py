"""Segmentations of unlabelled images by a trained model, the teacher, at the resolution of nnU-Net's preprocessed images."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import blosc2
import numpy as np
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from nnunetv2_macl.data import Case, open_unchanged, read_outside
from nnunetv2_macl.errors import UserError
from nnunetv2_macl.files import atomic_write, sha256, write_json
from nnunetv2_macl.nnunet import TEACHER_VARIABLE, DatasetConfiguration, read_json

CHECKPOINT = "checkpoint_final.pth"
# folder of the segmentations, in the folder of a training
PSEUDO_LABELS_FOLDER = "pseudo_labels"
# file in that folder that names the model that made the labels, and the labels that the training uses
TEACHER_FILE = "teacher.json"


@dataclass(frozen=True)
class PseudoLabel:
    """The segmentation of a case by the teacher, on disk.

    Attributes:
        case: The preprocessed image.
        file: Its segmentation, ``.b2nd``, (1, *volume). The ``.npz`` file of the same name holds
            the locations of the classes, and the ``.json`` file holds the confidence of the teacher.
        confidence: Mean probability of the predicted class over the foreground voxels; 0 if there are none.
        foreground: Fraction of the voxels that are foreground.
    """

    case: Case
    file: Path
    confidence: float
    foreground: float


@dataclass(frozen=True)
class Teacher:
    """A trained model of one fold: the folder of a trainer, plans and configuration, as nnU-Net writes it."""

    folder: Path
    fold: int | str

    @property
    def checkpoint(self) -> Path:
        return self.folder / f"fold_{self.fold}" / CHECKPOINT

    def training_cases(self, cases: Set[str], target: DatasetConfiguration) -> Set[str]:
        """Return the cases that the teacher may have been trained with, because they were no validation cases of its fold.

        Returns an empty set if the teacher has no validation cases, or is of another data set.
        """
        ending = target.dataset_json["file_ending"]
        files = (self.checkpoint.parent / "validation").glob(f"*{ending}")
        validated = {file.name.removesuffix(ending) for file in files}
        is_of_target = read_json(self.folder / "plans.json", "").get("dataset_name") == target.dataset_name
        return cases - validated if validated and is_of_target else set()

    def load(self, target: DatasetConfiguration, device: torch.device) -> nnUNetPredictor:
        """Return nnU-Net's predictor with the teacher's weights.

        Raises:
            UserError: The folder is incomplete or damaged, or the labels, channels or preprocessing of the teacher differ from
                those of the target.
        """
        predictor = nnUNetPredictor(device=device, allow_tqdm=False)
        try:
            predictor.initialize_from_trained_model_folder(str(self.folder), (self.fold,), CHECKPOINT)
        except (OSError, EOFError, RuntimeError, KeyError, ValueError, UnpicklingError) as error:
            raise UserError(
                f"The model in {self.folder}, fold {self.fold}, cannot be loaded: {error}. Train it again, or name another "
                f"model: export {TEACHER_VARIABLE}=TRAINER"
            ) from error
        name, plans = self.folder.name.split("__")[-1], predictor.plans_manager
        if name not in plans.available_configurations:
            raise UserError(
                f"{self.folder} is not called TRAINER__PLANS__CONFIGURATION, as nnU-Net calls a model's folder. Rename it, or "
                "name another model."
            )
        own = DatasetConfiguration.from_plans(plans, name, predictor.dataset_json)
        for what, theirs, ours in (
            ("labels", *(_labels_of(c.dataset_json) for c in (own, target))),
            ("channels", own.channel_names, target.channel_names),
            ("spacing and normalisation", *(c.preprocessing_checksum(of_storage=False) for c in (own, target))),
        ):
            if theirs != ours:
                raise UserError(
                    f"The model in {self.folder} has other {what} than {target.dataset_name}, {target.plans_name}, "
                    f"{target.name}. Name a model that was trained with this plan."
                )
        return predictor


def _labels_of(dataset_json: dict[str, Any]) -> Any:
    """Return the labels of a data set.

    The order of regions counts, because it is that of the network's outputs, and so does the order in which nnU-Net writes them.
    """
    labels = dataset_json["labels"]
    order = dataset_json.get("regions_class_order")
    return (list(labels.items()), order) if order is not None else labels


def label_cases(
    teacher: Teacher,
    cases: Sequence[Case],
    folder: Path,
    target: DatasetConfiguration,
    device: torch.device,
    log: Callable[[str], Any],
) -> list[PseudoLabel]:
    """Segment cases that the teacher has not segmented yet, and return all segmentations.

    Args:
        teacher: The trained model.
        cases: Preprocessed images.
        folder: Folder for the segmentations.
        target: The configuration that the images were preprocessed for.
        device: Device for the prediction.
        log: Function that logs a line about the progress.

    Raises:
        UserError: The teacher does not fit the target, or no case has foreground.
    """
    checksum = sha256(teacher.checkpoint)
    if (former := read_teacher(folder.parent)) and former["sha256"] != checksum:
        # The file says which labels a training uses, and from here on these are not complete.
        (folder / TEACHER_FILE).unlink()
    labels = target.plans_manager.get_label_manager(target.dataset_json)
    predictor = None
    found = []
    for number, case in enumerate(cases, 1):
        file = folder / Path(case.file).parent.name / Path(case.file).name
        made_from = {"teacher": checksum, **image_state(Path(case.file))}
        record = _record(file, made_from)
        if record is None:
            if predictor is None:
                log(f"{teacher.folder.name}, fold {teacher.fold}, labels {len(cases)} unlabelled images in {folder}")
                predictor = teacher.load(target, device)
            record = _label(predictor, case, file, labels, target, made_from)
            if number % max(1, len(cases) // 10) == 0:
                log(f"{number} of {len(cases)} images are labelled")
        found.append(PseudoLabel(case, file, record["confidence"], record["foreground"]))
    if not any(label.foreground for label in found):
        raise UserError(
            f"{teacher.checkpoint} finds no foreground in {len(found)} unlabelled images, so training cannot use them. Train "
            "this model for longer, or check that the unlabelled images show the same structures."
        )
    files = [label.file.relative_to(folder).as_posix() for label in found]
    write_json(
        {"fold_folder": str(teacher.checkpoint.parent), "sha256": checksum, "labels": files}, folder / TEACHER_FILE
    )
    return found


def image_state(file: Path) -> dict[str, int]:
    """Return size and time of change of a preprocessed image, which tell whether its segmentation is up to date."""
    status = file.stat()
    return {"image_bytes": status.st_size, "image_changed": status.st_mtime_ns}


def read_teacher(run: Path) -> dict[str, Any] | None:
    """Return what a training's folder says about its teacher: ``fold_folder``, ``sha256`` and ``labels``; None if nothing."""
    file = run / PSEUDO_LABELS_FOLDER / TEACHER_FILE
    return read_json(file, f"Move {run} away.") if file.is_file() else None


def _record(file: Path, made_from: dict[str, Any]) -> dict[str, Any] | None:
    """Return the record of an existing segmentation, or None if the segmentation has to be made."""
    if not (file.is_file() and file.with_suffix(".json").is_file()):
        return None
    try:
        record = read_json(file.with_suffix(".json"), "")
        return record if record["made_from"] == made_from and record["bytes"] == file.stat().st_size else None
    except (UserError, KeyError, TypeError):
        return None


def _label(
    predictor: nnUNetPredictor,
    case: Case,
    file: Path,
    labels: LabelManager,
    target: DatasetConfiguration,
    made_from: dict[str, Any],
) -> dict[str, Any]:
    image = np.asarray(open_unchanged(case.file)[:])
    # First to the CPU, because GPU memory may be too small for the logits of a large image in single precision.
    logits = predictor.predict_sliding_window_return_logits(torch.from_numpy(image)).cpu().float()
    segmentation = np.asarray(labels.convert_logits_to_segmentation(logits)).astype(np.int16)
    probability = np.asarray(labels.apply_inference_nonlin(logits))
    # With regions, a voxel is as certain as its least certain region.
    certain = np.maximum(probability, 1 - probability).min(0) if labels.has_regions else probability.max(0)
    foreground = segmentation > 0
    segmentation = segmentation[None]
    locations = DefaultPreprocessor._sample_foreground_locations(segmentation, _classes(labels))
    if target.normalises_in_mask:
        # nnU-Net's augmentation finds the mask by the label -1.
        segmentation[(read_outside(case.file) < 0) & ~foreground] = -1

    file.parent.mkdir(parents=True, exist_ok=True)
    file.with_suffix(".json").unlink(missing_ok=True)
    blocks, chunks = comp_blosc2_params(segmentation.shape, tuple(target.patch_size), segmentation.itemsize)
    content = blosc2.asarray(segmentation, chunks=chunks, blocks=blocks).to_cframe()
    atomic_write(file, lambda stream: stream.write(content), needed=len(content))
    places = io.BytesIO()
    arrays: dict[str, Any] = {str(n): np.asarray(where) for n, where in enumerate(locations.values())}
    np.savez_compressed(places, **arrays)
    atomic_write(file.with_suffix(".npz"), lambda stream: stream.write(places.getvalue()))
    record = {
        "made_from": made_from,
        "image": case.file,
        "bytes": len(content),
        "confidence": float(certain[foreground].mean()) if foreground.any() else 0.0,
        "foreground": float(foreground.mean()),
    }
    write_json(record, file.with_suffix(".json"))
    return record


def _classes(labels: LabelManager) -> list[Any]:
    """Return the classes and regions whose voxel locations nnU-Net's preprocessing stores for oversampling."""
    classes = list(labels.foreground_regions if labels.has_regions else labels.foreground_labels)
    return [*classes, (-1, *labels.all_labels)] if labels.has_ignore_label else classes


class WithPseudoLabels:
    """The labelled cases of nnU-Net's data set and pseudo-labelled ones, as nnU-Net's data loader reads them.

    Args:
        labelled: nnU-Net's data set.
        pseudo: The pseudo-labelled cases.
        labels: nnU-Net's label manager.
    """

    def __init__(self, labelled: Any, pseudo: Sequence[PseudoLabel], labels: LabelManager) -> None:
        self.labelled = labelled
        self.pseudo = {label.case.file: label for label in pseudo}
        self.classes = [tuple(c) if isinstance(c, (tuple, list)) else int(c) for c in _classes(labels)]
        self.identifiers = [*labelled.identifiers, *self.pseudo]

    def load_case(self, identifier: str) -> tuple[Any, Any, Any, dict[str, Any]]:
        """Return image (C, *volume), segmentation (1, *volume), None and properties with the locations of the classes."""
        if identifier not in self.pseudo:
            return self.labelled.load_case(identifier)
        label = self.pseudo[identifier]
        with np.load(label.file.with_suffix(".npz")) as places:
            locations = {key: places[str(n)] for n, key in enumerate(self.classes)}
        return open_unchanged(identifier), open_unchanged(str(label.file)), None, {"class_locations": locations}
