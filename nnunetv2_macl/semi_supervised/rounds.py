"""Rounds of self-training: each model labels the unlabelled images for the next one."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import torch
from nnunetv2.run.run_training import run_training

from nnunetv2_macl import nnunet
from nnunetv2_macl.errors import UserError
from nnunetv2_macl.folds import check_fold
from nnunetv2_macl.nnunet import TEACHER_VARIABLE, DatasetConfiguration
from nnunetv2_macl.planning.plan import plan_file, read_plan
from nnunetv2_macl.preprocessing.cases import sources_in_use
from nnunetv2_macl.run import add_trainers_folder, check_device
from nnunetv2_macl.semi_supervised.pseudo_labels import CHECKPOINT, Teacher
from nnunetv2_macl.semi_supervised.self_training import find_teacher, model_folder, nnUNetTrainerMACLSelfTraining

logger = logging.getLogger(__name__)


def self_train(
    dataset: str | int,
    configuration: str,
    fold: int | str,
    *,
    plans: str = "nnUNetPlans",
    teacher: str | None = None,
    rounds: int = 1,
    export_labels: Path | None = None,
    device: str = "cuda",
) -> Path:
    """Train models on the labelled images and on unlabelled images that the previous model has labelled.

    A round that was stopped continues, and a round that is finished is not repeated.

    Args:
        dataset: Name or id.
        configuration: Name of the configuration.
        fold: Number of the fold, or ``all``.
        plans: Plans identifier.
        teacher: Trainer of the first model. It must be trained. None: ``nnUNetTrainerMACL``.
        rounds: Number of models to train, 1 to 3.
        export_labels: Folder for the labels of the unlabelled images, in the format of the data set.
        device: ``cuda``, ``cpu`` or ``mps``.

    Returns:
        Path: Folder of the last model's fold.

    Raises:
        UserError: The first model is not trained, or another mistake that the user can correct.
    """
    nnunet.require_folders()
    check_device(device)
    add_trainers_folder()
    target = DatasetConfiguration.load(nnunet.dataset_name(dataset), plans, configuration)
    if fold != "all":
        if not str(fold).isdigit():
            raise UserError(f"-f must be a number or all, got {fold}.")
        fold = int(fold)
        check_fold(target, fold)
    teacher = teacher or os.environ.get(TEACHER_VARIABLE) or nnUNetTrainerMACLSelfTraining.default_teacher
    find_teacher(teacher, target, fold, device)
    for number in range(1, rounds + 1):
        student = nnUNetTrainerMACLSelfTraining.__name__ + (f"_round{number}" if number > 1 else "")
        run = model_folder(target, student) / f"fold_{fold}"
        if (run / CHECKPOINT).is_file():
            logger.info("%s is trained already: %s. To train it again, remove this folder.", student, run)
        else:
            os.environ[TEACHER_VARIABLE] = teacher
            try:
                run_training(
                    target.dataset_name,
                    target.name,
                    fold,
                    student,
                    target.plans_name,
                    continue_training=(run / "checkpoint_latest.pth").is_file(),
                    device=torch.device(device),
                )
            except KeyboardInterrupt:
                # nnU-Net saves a checkpoint from time to time, and the labels that are made are kept.
                raise UserError(f"{student} was stopped. To continue, repeat the command.") from None
        if export_labels is not None and number == rounds:
            write_labels(find_teacher(teacher, target, fold, device), target, export_labels.expanduser(), device)
        teacher = student
    return run


def write_labels(teacher: Teacher, target: DatasetConfiguration, folder: Path, device: str) -> None:
    """Write a model's segmentations of the unlabelled images in the format of the data set.

    Existing files are kept, because somebody may have corrected them.
    """
    file = plan_file(target)
    plan = read_plan(file) if file.is_file() else None
    reader = target.plans_manager.image_reader_writer_class
    images, targets = [], []
    for source in sources_in_use(target, plan.unlabelled_datasets if plan else [], plan.channel_map if plan else None):
        for name, case in source.cases.items():
            if case.channels is None and source.reader is reader:
                images.append(case.files)
                targets.append(str(folder / name))
    folder.mkdir(parents=True, exist_ok=True)
    predictor = teacher.load(target, torch.device(device))
    predictor.predict_from_files_sequential(images, targets, overwrite=False)
    logger.info("The labels of %d unlabelled images are in %s", len(images), folder)
