"""Rounds of self-training: each model labels the unlabelled images for the next one."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from nnunetv2.run.run_training import run_training

from nnunetv2_macl import nnunet
from nnunetv2_macl.errors import UserError
from nnunetv2_macl.files import is_permission_or_space_error, write_error
from nnunetv2_macl.folds import check_fold
from nnunetv2_macl.nnunet import TEACHER_VARIABLE, DatasetConfiguration
from nnunetv2_macl.planning.plan import plan_file, read_plan
from nnunetv2_macl.preprocessing.cases import sources_in_use
from nnunetv2_macl.preprocessing.sources import UNLABELLED_FOLDER, CaseFiles
from nnunetv2_macl.processes import environment
from nnunetv2_macl.run import add_trainers_folder, check_device
from nnunetv2_macl.semi_supervised.base import no_cascade
from nnunetv2_macl.semi_supervised.pseudo_labels import CHECKPOINT, Teacher
from nnunetv2_macl.semi_supervised.self_training import (
    check_same_teacher,
    find_teacher,
    model_folder,
    nnUNetTrainerMACLSelfTraining,
)
from nnunetv2_macl.training.out_of_memory import is_out_of_memory
from nnunetv2_macl.training.run_folder import RunLock

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
        export_labels: Folder for the teacher's labels of the unlabelled images, in the format of the data set. They are written
            before the last model's training, and files that are there already are kept. It holds a label for each readable
            image, also of a validation patient, on which the model is not trained.
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
    if target.is_cascaded:
        raise UserError(no_cascade(target.name))
    teacher = teacher or os.environ.get(TEACHER_VARIABLE) or nnUNetTrainerMACLSelfTraining.default_teacher
    find_teacher(teacher, target, fold, device)
    if export_labels is not None:
        # Mistakes show before the training.
        export_labels = export_labels.expanduser()
        _images_to_export(target)
        try:
            export_labels.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=export_labels):
                pass
        except FileExistsError:
            raise UserError(f"{export_labels} is a file. Give a folder: --export_labels FOLDER") from None
        except OSError as error:
            raise write_error(error, export_labels) from error
    for number in range(1, rounds + 1):
        student = nnUNetTrainerMACLSelfTraining.__name__ + (f"_round{number}" if number > 1 else "")
        run = model_folder(target, student) / f"fold_{fold}"
        if export_labels is not None and number == rounds:
            with _stopped_by_user("The export of the labels"):
                write_labels(find_teacher(teacher, target, fold, device), target, export_labels, device)
        _train(target, fold, student, teacher, run, device)
        teacher = student
    return run


@contextmanager
def _stopped_by_user(what: str) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        # nnU-Net saves a checkpoint from time to time, and the labels that are made are kept.
        raise UserError(f"{what} was stopped. To continue, repeat the command.") from None


def _train(target: DatasetConfiguration, fold: int | str, student: str, teacher: str, run: Path, device: str) -> None:
    """Train a model, or continue its training. A model that is trained but not validated is only validated.

    Raises:
        UserError: The model has begun with the labels of another teacher, or is stopped.
    """
    is_trained = (run / CHECKPOINT).is_file()
    check_same_teacher(run, find_teacher(teacher, target, fold, device), _teacher_of(run / CHECKPOINT))
    if is_trained and (run / "validation" / "summary.json").is_file():
        logger.info("%s is trained already: %s. To train it again, remove this folder.", student, run)
        return
    # nnU-Net begins a training that has no checkpoint to continue from.
    continues = not is_trained and run.is_dir()
    run.mkdir(parents=True, exist_ok=True)
    lock = RunLock(run)
    lock.acquire()
    try:
        with _stopped_by_user(student), environment(**{TEACHER_VARIABLE: teacher}):
            run_training(
                target.dataset_name,
                target.name,
                fold,
                student,
                target.plans_name,
                continue_training=continues,
                only_run_validation=is_trained,
                device=torch.device(device),
            )
    finally:
        lock.release()
        # An error before the first step leaves an empty folder.
        with suppress(OSError):
            run.rmdir()


def _teacher_of(checkpoint: Path) -> str | None:
    """Return the SHA-256 of the model whose labels a self-training has used; None without a checkpoint, or if it is not known."""
    if not checkpoint.is_file():
        return None
    # nnU-Net stores more than tensors, and this package has written the file.
    content = torch.load(checkpoint, map_location="cpu", weights_only=False, mmap=True)
    return content.get("macl", {}).get("teacher")


def _images_to_export(target: DatasetConfiguration) -> dict[str, CaseFiles]:
    """Return the files of each unlabelled image whose labels nnU-Net can write, by name.

    The name of an image of another data set begins with the name of that data set. Images in another format than DATASET's, and
    images of which only some channels are used, are left out.

    Raises:
        UserError: There is no such image.
    """
    file = plan_file(target)
    plan = read_plan(file) if file.is_file() else None
    reader = target.plans_manager.image_reader_writer_class
    found, left_out = {}, 0
    for source in sources_in_use(target, plan.unlabelled_datasets if plan else [], plan.channel_map if plan else None):
        for name, case in source.cases.items():
            if source.reader is reader and case.channels in (None, list(range(case.channels_in_file))):
                is_own = source.dataset_name == target.dataset_name
                found[name if is_own else f"{source.dataset_name}/{name}"] = case
            else:
                left_out += 1
    if left_out:
        logger.info(
            "The labels of %d unlabelled images cannot be exported, because these images have another file format than %s or "
            "further channels",
            left_out, target.dataset_name,
        )  # fmt: skip
    if not found:
        raise UserError(
            f"There is no unlabelled image whose labels can be exported. Put images into {UNLABELLED_FOLDER} of "
            f"{target.dataset_name}, or leave out --export_labels."
        )
    return found


def write_labels(teacher: Teacher, target: DatasetConfiguration, folder: Path, device: str) -> None:
    """Write a model's segmentations of the unlabelled images in the format of the data set.

    Existing files are kept, because somebody may have corrected them. The labels of images of another data set are written
    into a folder with its name.

    Raises:
        UserError: The disk is full, the folder may not be written, or no image can be labelled.
    """
    predictor = teacher.load(target, torch.device(device))
    ending = target.dataset_json["file_ending"]
    images = _images_to_export(target)
    reasons: dict[str, Exception] = {}
    kept = 0
    folder.mkdir(parents=True, exist_ok=True)
    for name, case in images.items():
        written = folder / f"{name}{ending}"
        if written.is_file():
            kept += 1
            continue
        # nnU-Net writes further files next to its predictions, and an interrupted prediction must not look like a whole one.
        with tempfile.TemporaryDirectory(dir=folder, prefix=".") as scratch:
            try:
                predictor.predict_from_files_sequential([case.files], [str(Path(scratch) / "label")])
            except Exception as error:
                # The readers raise errors of many classes for a damaged image, and one image must not stop the others.
                if is_out_of_memory(error):
                    raise
                if isinstance(error, OSError) and is_permission_or_space_error(error):
                    raise write_error(error, written) from error
                # SimpleITK's errors do not say that the disk is full.
                needed = sum(Path(file).stat().st_size for file in case.files if Path(file).exists())
                if shutil.disk_usage(folder).free < needed:
                    raise write_error(OSError(errno.ENOSPC, ""), written, needed) from error
                reasons[name] = error
                logger.info("%s was left out: %s", name, error)
                continue
            written.parent.mkdir(exist_ok=True)
            os.replace(Path(scratch) / f"label{ending}", written)
            for companion in Path(scratch).glob("label.*"):
                os.replace(companion, written.with_name(f"{Path(name).name}{companion.name.removeprefix('label')}"))
    if len(reasons) == len(images):
        name, first = next(iter(reasons.items()))
        raise UserError(f"No label could be written into {folder}. The error of {name} was: {first}") from first
    logger.info(
        "The labels of %d unlabelled images are in %s. %d of these files were there before and are kept",
        len(images) - len(reasons), folder, kept,
    )  # fmt: skip
