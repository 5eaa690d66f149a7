"""Run the whole pre-training stage: the function behind ``nnUNetv2_train_macl_pretrain``."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nnunetv2_macl import distributed, nnunet
from nnunetv2_macl.errors import UserError
from nnunetv2_macl.files import trainer_folders
from nnunetv2_macl.folds import check_fold, number_of_folds
from nnunetv2_macl.nnunet import DatasetConfiguration
from nnunetv2_macl.planning.derive import derive_or_load_plan
from nnunetv2_macl.planning.plan import MACLPlan, check_plan, describe, plan_in_environment, read_plan
from nnunetv2_macl.preprocessing.cases import Preprocessed, images_found, preprocess_unlabelled
from nnunetv2_macl.preprocessing.sources import (
    UNLABELLED_FOLDER,
    find_sources,
    spacing_warning,
    training_cases,
)
from nnunetv2_macl.recipe import AUTO, check_values, settings_as_text
from nnunetv2_macl.training.launch import join_ranks, train
from nnunetv2_macl.training.run_folder import PLAN_COPY, PRETRAINER, pretraining_folder

logger = logging.getLogger(__name__)

DEVICES = ("cuda", "cpu", "mps")


def pretrain(
    dataset: str | int,
    configuration: str | None = None,
    *,
    plans: str = "nnUNetPlans",
    unlabelled: Sequence[str | int] = (),
    recipe: str | Path | None = None,
    exclude_fold: int | None = None,
    processes: int = 8,
    device: str = "cuda",
    num_gpus: int = 1,
    continue_training: bool = False,
    disable_checkpointing: bool = False,
    skip_unreadable: bool = False,
    channel_map: Mapping[str, str] | None = None,
    plan_only: bool = False,
    preprocess_only: bool = False,
    num_parts: int = 1,
    part_id: int = 0,
    gpu_memory: float | None = None,
    pretrained_weights: str | Path | None = None,
    **values: Any,
) -> Path:
    """Plan, preprocess, pre-train, and write weights that ``nnUNetTrainerMACL`` fine-tunes from.

    Under torchrun, each process calls this function and takes its share of every batch.

    Args:
        dataset: Id or name, as in nnU-Net.
        configuration: Configuration of the nnU-Net plan. None takes the first supported one.
        plans: Plans identifier.
        unlabelled: Further raw data sets whose images are used, by id or name; a single one may be given without a list.
        recipe: Name or JSON file of the recipe.
        exclude_fold: Leave out the validation images of this fold.
        processes: Number of processes for preprocessing.
        device: ``cuda``, ``cpu`` or ``mps``.
        num_gpus: Number of GPUs, as in nnU-Net.
        continue_training: Continue the run in the folder.
        disable_checkpointing: Write no weights.
        skip_unreadable: Leave out images that cannot be used.
        channel_map: The data set's channel names, by those of ``unlabelled`` that differ.
        plan_only: Only write the MACL plan.
        preprocess_only: Only preprocess the unlabelled images.
        num_parts, part_id: With ``preprocess_only``, preprocess only every ``num_parts``-th image, beginning with ``part_id``, so
            that machines can divide the work as in nnU-Net's prediction.
        gpu_memory: GPU memory in GB for which the batch is planned. None takes nnU-Net's target.
        pretrained_weights: Weights to start from: the folder of a pre-training run or a file in it, a checkpoint of nnU-Net or of
            nnssl, or a file of the MACL authors. None starts from a freshly initialised network.
        **values: Values that replace those of the recipe, by key, like ``--set`` of the command.

    Returns:
        The folder of the run, which holds the weights. With ``plan_only`` or ``preprocess_only`` it may not exist yet.

    Raises:
        UserError: A mistake that the user can correct.
        SystemExit: A signal stopped the run, or a process that was started failed and has printed the reason.
    """
    nnunet.require_folders()
    unlabelled = [unlabelled] if isinstance(unlabelled, (str, int)) else unlabelled
    values = {key: _plain(value) for key, value in values.items()}
    train_too = not (plan_only or preprocess_only)
    if train_too:
        check_device(device, num_gpus)
    _check_parts(num_parts, part_id, preprocess_only)
    join_ranks(device)
    plan: MACLPlan | None = None
    found: Preprocessed | None = None
    with distributed.rank_zero_first() as first:
        target = DatasetConfiguration.load(dataset, plans, configuration)
        fold = "all" if exclude_fold is None else exclude_fold
        if exclude_fold is not None:
            if not str(exclude_fold).isdigit():
                raise UserError(f"exclude_fold must be the number of a fold, got {exclude_fold!r}.")
            exclude_fold = fold = int(exclude_fold)
            check_fold(target, exclude_fold)
            if not 0 <= exclude_fold < (folds := number_of_folds(target)):
                there = f"{target.dataset_name} has the folds 0 to {folds - 1}"
                raise UserError(f"--exclude_fold {exclude_fold}: {there}. Give one of these.")
        results = Path(os.environ["nnUNet_results"])
        folder = pretraining_folder(results, target.dataset_name, plans, target.name) / f"fold_{fold}"
        start = None if pretrained_weights is None else Path(pretrained_weights).expanduser()
        if first:
            if configuration is None:
                there = target.plans_manager.available_configurations
                others = ", ".join(name for name in nnunet.SUPPORTED_CONFIGURATIONS if name in there)
                logger.info(
                    "Configuration %s: the first of %s in the plan (choose another with -c)", target.name, others
                )
            images = {
                "unlabelled_datasets": list(dict.fromkeys(nnunet.dataset_name(name) for name in unlabelled)),
                "skip_unreadable": skip_unreadable,
                "channel_map": dict(channel_map or {}),
            }
            if continue_training:
                plan = _plan_to_go_on(folder, target, images, recipe, values, gpu_memory, start)
            else:
                plan = _plan(target, images, recipe, values, gpu_memory, start)
            if not plan_only:
                found = preprocess_unlabelled(
                    target,
                    plan.unlabelled_datasets,
                    processes=processes,
                    skip_unreadable=plan.skip_unreadable,
                    channel_map=plan.channel_map,
                    part=slice(part_id, None, num_parts),
                )
    if train_too:
        add_trainers_folder()
        plan = distributed.broadcast_object(plan)
        with plan_in_environment(plan, processes), images_found(found), _unwrap_user_error():
            train(
                dataset_name_or_id=target.dataset_name,
                configuration=target.name,
                fold=fold,
                trainer_class_name=PRETRAINER,
                plans_identifier=plans,
                num_gpus=num_gpus,
                continue_training=continue_training,
                disable_checkpointing=disable_checkpointing,
                device=device,
            )
    return folder


@contextmanager
def _unwrap_user_error() -> Iterator[None]:
    """Raise the UserError behind a SystemExit, because the trainers turn errors into exits for nnU-Net's commands."""
    try:
        yield
    except SystemExit as end:
        if isinstance(end.__cause__, UserError):
            raise end.__cause__ from None
        raise


def _plan(
    target: DatasetConfiguration,
    images: dict[str, Any],
    recipe: str | Path | None,
    values: dict[str, Any],
    gpu_memory: float | None,
    start: Path | None,
) -> MACLPlan:
    """Check the images, and write and print the MACL plan."""
    training_cases(target)
    names = images["unlabelled_datasets"]
    if target.dataset_name in names:
        raise UserError(f"-u {target.dataset_name} is the data set itself, whose images are always used. Leave it out.")
    sources = find_sources(target, names, images["channel_map"])
    plan = derive_or_load_plan(
        target, recipe=recipe, values=values, gpu_memory_gb=gpu_memory, pretrained_weights=start, **images
    )
    logger.info("%s", describe(plan))
    for source in sources:
        if source.ignored_files:
            logger.warning(
                "%d files of %s are not named CASE_0000 with its file ending, and are left out: %s",
                len(source.ignored_files), source.dataset_name, ", ".join(source.ignored_files[:3]),
            )  # fmt: skip
        if warning := spacing_warning(source, target):
            logger.warning("WARNING: %s", warning)
    if not sources:
        logger.info(
            "No unlabelled images: pre-training uses only the training images. Put more into %s, or name data sets with -u.",
            nnunet.raw_folder(target.dataset_name) / UNLABELLED_FOLDER,
        )
    return plan


def add_trainers_folder() -> None:
    """Let nnU-Net find this package's trainers in this process and its children, besides the user's folders."""
    os.environ["nnUNet_extTrainer"] = trainer_folders()


def check_device(device: str, num_gpus: int = 1) -> None:
    """Raise UserError unless torch has the device."""
    if device not in DEVICES:
        raise UserError(f"-device must be one of {', '.join(DEVICES)}, got '{device}'.")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("-device is cuda, and torch finds no CUDA device. Type: -device cpu")
    if device == "mps" and not torch.backends.mps.is_available():
        raise UserError("-device is mps, and torch finds no such device. Type: -device cpu")
    if num_gpus < 1:
        raise UserError(f"-num_gpus must be 1 or more, got {num_gpus}.")
    if num_gpus > 1 and distributed.started_by_torchrun():
        raise UserError(
            f"-num_gpus {num_gpus} is not possible under torchrun, which starts the processes. Leave it out."
        )
    if num_gpus > 1 and device != "cuda":
        raise UserError(
            f"-num_gpus {num_gpus} needs -device cuda, got -device {device}. Leave out -num_gpus. For several processes on"
            " CPUs, type: torchrun --nproc_per_node G --no-python nnUNetv2_train_macl_pretrain ... -device cpu"
        )
    if num_gpus > 1 and num_gpus > torch.cuda.device_count():
        raise UserError(
            f"-num_gpus is {num_gpus}, but torch finds {torch.cuda.device_count()} GPUs. Give at most this number."
        )


def _check_parts(num_parts: int, part_id: int, preprocess_only: bool) -> None:
    if num_parts < 1:
        raise UserError(f"-num_parts must be 1 or more, got {num_parts}.")
    if not 0 <= part_id < num_parts:
        raise UserError(f"-part_id must be between 0 and {num_parts - 1} with -num_parts {num_parts}, got {part_id}.")
    if num_parts > 1 and not preprocess_only:
        raise UserError(
            f"-num_parts {num_parts} only splits the preprocessing. Use it with --preprocess_only on each machine, then train "
            "without -num_parts."
        )


def _plain(value: Any) -> Any:
    """Return a value from Python as a recipe file would have it: numpy's numbers as numbers, and tuples as lists."""
    if isinstance(value, np.generic):
        return value.item()
    return [_plain(each) for each in value] if isinstance(value, tuple) else value


def _plan_to_go_on(
    folder: Path,
    target: DatasetConfiguration,
    images: dict[str, Any],
    recipe: str | Path | None,
    values: dict[str, Any],
    gpu_memory: float | None,
    start: Path | None,
) -> MACLPlan:
    """Return the plan that the run began with. Only ``patches_at_once`` and ``skip_unreadable`` may change."""
    file = folder / PLAN_COPY
    if not file.is_file():
        raise UserError(f"There is no run to continue in {folder}. Leave out --c to start one.")
    check_values(values, "Command line")
    plan = read_plan(file)
    check_plan(plan, target, file, of_a_run=True)
    before = plan.get_recipe().as_dict()
    changed = [
        f"{text} (was {before.get(key)})"
        for (key, value), text in zip(values.items(), settings_as_text(values), strict=True)
        # Settings of the command may be keys of a method that they switch off, which the recipe of the run lacks.
        if value not in (before.get(key), (plan.settings or {}).get(key, before.get(key))) and key != "patches_at_once"
    ]
    for key, option in (("unlabelled_datasets", "-u"), ("channel_map", "--channel_map")):
        was = getattr(plan, key)
        # The order of data sets does not matter.
        if images[key] and (set(images[key]) != set(was) if key == "unlabelled_datasets" else images[key] != was):
            changed.append(f"{option} {images[key]} (was {getattr(plan, key)})")
    if gpu_memory is not None and gpu_memory != plan.gpu_memory_gb:
        changed.append(f"-gpu_memory {gpu_memory:g} (was {plan.gpu_memory_gb:g})")
    began = (plan.pretrained_weights or {}).get("path")
    if start is not None and str(start.resolve()) != began:
        changed.append(f"-pretrained_weights {start} (was {began})")
    # The plan has the name of its recipe only, and none after the user has edited it.
    if recipe is not None and plan.recipe_name is not None and Path(str(recipe)).name != plan.recipe_name:
        changed.append(f"-recipe {recipe} (was {plan.recipe_name})")
    if changed:
        raise UserError(
            f"The run in {folder} must continue with the settings that it began with. These cannot change: "
            f"{', '.join(changed)}. Leave them out, or leave out --c to start a new run."
        )
    asked_at_once = values.get("patches_at_once", AUTO)
    at_once = plan.patches_at_once if asked_at_once == AUTO else min(asked_at_once, plan.batch_size)
    # The run writes this plan into its folder, once no other run holds the lock.
    return replace(plan, patches_at_once=at_once, skip_unreadable=plan.skip_unreadable or images["skip_unreadable"])
