"""Self-training: a trained model labels the unlabelled images, and nnU-Net trains on them too."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.paths import nnUNet_results

from nnunetv2_macl.errors import UserError
from nnunetv2_macl.files import sha256
from nnunetv2_macl.nnunet import TEACHER_VARIABLE, DatasetConfiguration
from nnunetv2_macl.semi_supervised.base import UnlabelledTraining
from nnunetv2_macl.semi_supervised.pseudo_labels import (
    CHECKPOINT,
    PSEUDO_LABELS_FOLDER,
    PseudoLabel,
    Teacher,
    WithPseudoLabels,
    label_cases,
    read_teacher,
)
from nnunetv2_macl.text import first_of
from nnunetv2_macl.training.commands import FINETUNER, command_to_train
from nnunetv2_macl.training.run_folder import PLAN_COPY
from nnunetv2_macl.training.seeded import BatchLoader


class nnUNetTrainerMACLSelfTraining(UnlabelledTraining):
    """Trains as nnU-Net does, on labelled images and on unlabelled images that a trained model has labelled.

    The teacher is the model of ``nnUNetTrainerMACL`` for the same plans, configuration and fold. The variable
    ``nnUNet_macl_teacher`` names another trainer or the folder of a model. Loss, augmentation, oversampling and schedule are
    nnU-Net's, and a step costs what nnU-Net's step costs.

    Source: Lee, Pseudo-Label, ICML workshop 2013; Xie et al., Noisy Student, CVPR 2020.
    """

    # fraction of the patches that come from labelled images
    labelled_share: float = 0.5
    default_teacher: str = "nnUNetTrainerMACL"

    def check(self) -> None:
        super().check()
        teacher = self.find_teacher()
        if self._continues:
            check_same_teacher(Path(self.output_folder), teacher, self.macl_origin.get("teacher"))
        training, validation = map(set, self.do_split())
        if seen := sorted(teacher.training_cases(validation - training, self._configuration)):
            self.print_to_log_file(
                f"WARNING: {teacher.checkpoint} was trained with other folds. {len(seen)} of this fold's {len(validation)} "
                f"validation cases were no validation cases there: {first_of(seen)}. It may have been trained with their "
                "labels, and then their Dice will be too high."
            )

    def training_loader(self, loader: Any) -> BatchLoader:
        dataset = WithPseudoLabels(loader._data, self.pseudo_labels(), self.label_manager)
        labelled = len(loader._data.identifiers)
        pseudo = len(dataset.identifiers) - labelled
        shares = np.repeat([self.labelled_share / labelled, (1 - self.labelled_share) / pseudo], [labelled, pseudo])
        # nnU-Net's loader copies the names and their probabilities from its data set when it is created.
        loader._data, loader.indices, loader.sampling_probabilities = dataset, dataset.identifiers, shares
        return loader

    def pseudo_labels(self) -> list[PseudoLabel]:
        """Return the unlabelled images of this fold with the teacher's segmentations. Make those that are missing."""
        teacher = self.find_teacher()
        folder = Path(self.output_folder) / PSEUDO_LABELS_FOLDER
        cases = self.unlabelled_cases()
        found = label_cases(teacher, cases, folder, self._configuration, self.device, self.print_to_log_file)
        self.macl_origin["teacher"] = sha256(teacher.checkpoint)
        return found

    def find_teacher(self) -> Teacher:
        """Return the teacher. Raises UserError if it is this model, or is not trained."""
        named = os.environ.get(TEACHER_VARIABLE) or self.default_teacher
        folder = model_folder(self._configuration, named)
        if folder.resolve() == Path(self.output_folder_base).resolve():
            raise UserError(
                f"{folder} is the model that is being trained. Name another model: export {TEACHER_VARIABLE}=TRAINER"
            )
        return find_teacher(named, self._configuration, self.fold, self.device.type)


def find_teacher(named: str, target: DatasetConfiguration, fold: int | str, device: str) -> Teacher:
    """Return a trained model.

    Args:
        named: Its trainer, or the folder of the model.
        target: The configuration that it was trained for.
        fold: Number of the fold, or ``all``.
        device: Device for the command in the message.

    Raises:
        UserError: It is not trained. The message names the command, and the trainers whose model exists.
    """
    teacher = Teacher(model_folder(target, named), fold)
    if not teacher.checkpoint.is_file():
        there = Path(str(nnUNet_results), target.dataset_name).glob(
            f"*__{target.plans_name}__{target.name}/fold_{fold}/{CHECKPOINT}"
        )
        trainers = {f.parents[1].name.partition("__")[0] for f in there if not (f.parent / PLAN_COPY).is_file()}
        # Models of self-training are left out, because they have learned from another model.
        trained = sorted(t for t in trainers if not t.startswith(nnUNetTrainerMACLSelfTraining.__name__))
        is_trainer = Path(named).name == named
        name = named if is_trainer else nnUNetTrainerMACLSelfTraining.default_teacher
        fix = f"{'Train it' if is_trainer else 'Train a model'}:\n    {command_to_train(target, fold, device, name)}"
        if trained:
            fix += (
                f"\nor use a trained model: {', '.join(trained)}. Type nnUNetv2_macl_self_train ... -tr {trained[0]}, or for "
                f"nnU-Net's command: export {TEACHER_VARIABLE}={trained[0]}"
            )
        raise UserError(f"There is no model to label the unlabelled images: {teacher.checkpoint} does not exist. {fix}")
    if (teacher.checkpoint.parent / PLAN_COPY).is_file():
        raise UserError(
            f"{teacher.checkpoint.parent} is a pre-training run, and its network does not segment. Fine-tune it first:\n"
            f"    {command_to_train(target, fold, device, FINETUNER)}"
        )
    return teacher


def check_same_teacher(run: Path, teacher: Teacher, of_checkpoint: str | None = None) -> None:
    """Raise UserError if a self-training has begun with the labels of another model.

    Args:
        run: Folder of the training's fold.
        teacher: The model whose labels the training would now use.
        of_checkpoint: SHA-256 of the model whose labels the checkpoint has been trained with, if it is known.
    """
    checksum = sha256(teacher.checkpoint)
    away = shlex.join(["mv", str(run), f"{run}_before"])
    if (former := read_teacher(run)) and former["sha256"] != checksum:
        raise UserError(
            f"The training in {run} has begun with the labels of {former['fold_folder']}, not of {teacher.checkpoint}. To "
            f"train with new labels, move it away: {away}\n"
            "To continue with the former model: "
            f"export {TEACHER_VARIABLE}={shlex.quote(str(Path(former['fold_folder']).parent))}"
        )
    if of_checkpoint not in (None, checksum):
        raise UserError(
            f"The checkpoints in {run} are from an earlier training, with the labels of another model than "
            f"{teacher.checkpoint}. To train with new labels, move them away: {away}"
        )


def model_folder(target: DatasetConfiguration, named: str) -> Path:
    """Return the folder of a model, given this folder or the name of its trainer."""
    folder = Path(named).expanduser()
    # A folder of this name need not be a model.
    if folder.is_dir() and (folder.name != named or (folder / "plans.json").is_file()):
        return folder
    return Path(str(nnUNet_results)) / target.dataset_name / f"{named}__{target.plans_name}__{target.name}"
