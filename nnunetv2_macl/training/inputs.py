"""Provide the inputs of a pre-training run: its images, batches of patches, and initial weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nnunetv2_macl import distributed
from nnunetv2_macl.data import Case, PretrainingBatches, load_batches, plan_reading_here
from nnunetv2_macl.errors import UserError
from nnunetv2_macl.folds import check_fold
from nnunetv2_macl.messages import log_to
from nnunetv2_macl.nnunet import GROUP_VARIABLE, DatasetConfiguration
from nnunetv2_macl.patients import group_regex, of_other_patients
from nnunetv2_macl.planning.plan import current_processes, has_current_plan, start_in_short
from nnunetv2_macl.preprocessing.cases import Preprocessed, found_images, preprocess_unlabelled
from nnunetv2_macl.preprocessing.sources import training_cases
from nnunetv2_macl.start import start_from_weights
from nnunetv2_macl.text import pluralise
from nnunetv2_macl.training.signals import StoppedWhileWaiting, ignore_in_worker

if TYPE_CHECKING:
    from nnunetv2_macl.training.pretrain import nnUNetTrainerMACLPretrain


def find_cases(trainer: nnUNetTrainerMACLPretrain) -> tuple[list[Case], Preprocessed]:
    """Return the labelled cases of the run, and all of its cases, which do not include the fold's validation cases.

    The variable ``nnUNet_macl_group_regex`` leaves out the other images of their patients too.

    Raises:
        UserError: A case is not preprocessed, an image cannot be used, a file cannot be written, there is no such fold, or
            no image is left.
    """
    unlabelled = unlabelled_cases(trainer)
    labelled = training_cases(trainer.macl_configuration)
    held_out: set[str] = set()
    if trainer.fold != "all":
        check_fold(trainer.macl_configuration, int(trainer.fold))
        held_out = set(trainer.do_split()[1])
        labelled = [case for case in labelled if case.name not in held_out]
    cases = labelled + unlabelled.cases
    kept = of_other_patients(cases, held_out)
    if trainer.fold != "all":
        trainer.print_to_log_file(
            f"Excluded: the {len(held_out)} validation images of fold {trainer.fold}"
            + f", {pluralise(len(cases) - len(kept), 'other image')} of their patients" * (len(kept) < len(cases))
        )
    if not kept:
        raise UserError(
            f"No image is left: all are of validation patients of fold {trainer.fold}. The variable {GROUP_VARIABLE}, "
            f"'{group_regex()}', says which part of a name is the patient. Correct it, or type: "
            f"unset {GROUP_VARIABLE}"
        )
    # compared by file, because names may occur in several data sets
    files = {case.file for case in kept}
    return [case for case in labelled if case.file in files], Preprocessed(kept, unlabelled.skipped)


def unlabelled_cases(trainer: nnUNetTrainerMACLPretrain) -> Preprocessed:
    """Preprocess the unlabelled images that are not preprocessed yet, and return all of them.

    Raises:
        UserError: An image cannot be used, or a file cannot be written.
    """
    # Our command has already preprocessed them, and has shown the messages on the console.
    if (found := found_images()) is not None:
        for reason in found.skipped.values():
            trainer.print_to_log_file(f"Left out: {reason}", also_print_to_console=False)
        return found
    log = partial(trainer.print_to_log_file, also_print_to_console=not has_current_plan())
    with log_to(log):
        return preprocess_unlabelled(
            trainer.macl_configuration,
            trainer.macl_plan.unlabelled_datasets,
            processes=current_processes(),
            skip_unreadable=trainer.macl_plan.skip_unreadable,
            channel_map=trainer.macl_plan.channel_map,
        )


def cases_by_dataset(configuration: DatasetConfiguration, cases: list[Case]) -> list[tuple[str, str]]:
    """Return data set and name of each case."""
    # nnU-Net names the folder of labelled cases after the configuration; this package names other folders after the data set.
    datasets = {configuration.cases_folder.name: configuration.dataset_name}
    folders = ((Path(case.file).parent.name, case.name) for case in cases)
    return [(datasets.get(folder, folder), name) for folder, name in folders]


def batches(trainer: nnUNetTrainerMACLPretrain) -> Iterator[dict[str, Any]]:
    """Yield this rank's part of each batch, from the next step on. A checkpoint is written before an error or an exit.

    Raises:
        UserError: A case cannot be read.
        RuntimeError: A data worker was killed.
        SystemExit: A signal asked to stop.
    """
    plan = trainer.macl_plan
    share = distributed.local_slice(plan.batch_size)
    dataset = PretrainingBatches(trainer.data.cases, plan.sampling, share, trainer.step.steps, draws=trainer.step.draws)
    reading = plan_reading_here(trainer.batch_bytes, distributed.ranks_on_this_machine())
    stream = load_batches(
        dataset,
        trainer.steps_done,
        workers=reading.workers,
        prefetch=reading.prefetch,
        pin_memory=trainer.device.type == "cuda",
        prepare_worker=ignore_in_worker,
    )
    try:
        with contextlib.closing(stream):
            while True:
                with trainer.stop_and_save.signals.waiting():
                    batch = next(stream, None)
                if batch is None:
                    return
                yield batch
    except StoppedWhileWaiting:
        trainer.checkpoints.save_between_steps()
        trainer.stop_and_save.stop()
    except (UserError, RuntimeError):
        trainer.checkpoints.save_between_steps()
        raise


def load_start_weights(trainer: nnUNetTrainerMACLPretrain) -> None:
    """Copy the weights that the plan names into the network of rank 0, and print which of them fit.

    Raises:
        UserError: The weights are missing or have changed.
    """
    start = trainer.macl_plan.pretrained_weights
    if start is None:
        return
    is_sgd = isinstance(trainer.optimizer, torch.optim.SGD)
    transfer = start_from_weights(trainer.step.model, trainer.macl_configuration, start, rescale=is_sgd)
    lines = [f"The run starts from {start_in_short(start)}", *transfer.table().splitlines()]
    if is_sgd:
        lines.append(
            "For SGD, kernels before an instance norm are scaled to their initial norms. The function is the same"
        )
    trainer.print_to_log_file("\n  ".join(lines))
