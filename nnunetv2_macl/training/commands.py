"""Build the commands that pre-train, continue a run, and fine-tune."""

from __future__ import annotations

import contextlib
import shlex
import sys
from pathlib import Path

from nnunetv2_macl import distributed
from nnunetv2_macl.errors import UserError
from nnunetv2_macl.folds import number_of_folds
from nnunetv2_macl.nnunet import DatasetConfiguration
from nnunetv2_macl.training.run_folder import PRETRAINER

FINETUNER = "nnUNetTrainerMACL"
SHORT_FINETUNER = f"{FINETUNER}_short"


def command_to_pretrain(configuration: DatasetConfiguration, fold: int | str = "all", device: str = "cuda") -> str:
    """Return the command that pre-trains without the validation images of a fold, or on all images for ``all``."""
    left_out = "" if fold == "all" else f" --exclude_fold {fold}"
    options = f"{plans_option(configuration.plans_name)}{left_out}{device_option(device)}"
    return f"nnUNetv2_train_macl_pretrain {configuration.id} -c {configuration.name}{options}"


def command_as_typed(configuration: DatasetConfiguration, fold: int | str, device: str = "cuda") -> str:
    """Return the command that the user typed, or the equivalent command for a call from Python."""
    program = Path(sys.argv[0]).name
    if program.startswith("nnUNetv2_"):
        return shlex.join([program, *sys.argv[1:]])
    return command_to_pretrain(configuration, fold, device)


def command_to_go_on(
    configuration: DatasetConfiguration, fold: int | str, device: str = "cuda", trainer: str = PRETRAINER
) -> str:
    """Return the command that continues a stopped run. Under torchrun it is the command that torchrun starts.

    Args:
        configuration, fold, device: Those of the run.
        trainer: Name of the run's trainer class. nnU-Net's command starts a class of the user's own.
    """
    if trainer != PRETRAINER:
        options = f"{plans_option(configuration.plans_name)}{device_option(device)}"
        return f"nnUNetv2_train {configuration.id} {configuration.name} {fold} -tr {trainer}{options} --c"
    ranks = distributed.world_size()
    gpus = f" -num_gpus {ranks}" if ranks > 1 and not distributed.started_by_torchrun() else ""
    return f"{command_to_pretrain(configuration, fold, device)}{gpus} --c"


def command_to_fine_tune(
    configuration: DatasetConfiguration, fold: int | str = "all", device: str = "cuda", trainer: str = FINETUNER
) -> str:
    """Return the command that fine-tunes from a run. After a run on ``all`` images it trains fold 0, or ``all`` without folds."""
    if fold == "all":
        folds = 1
        with contextlib.suppress(UserError, KeyError):  # the data set of a report may be on another machine
            folds = number_of_folds(configuration)
        fold = 0 if folds else "all"
    return command_to_train(configuration, fold, device, trainer)


def command_to_train(configuration: DatasetConfiguration, fold: int | str, device: str, trainer: str) -> str:
    """Return nnU-Net's command that trains a fold."""
    options = f"{plans_option(configuration.plans_name)}{device_option(device)}"
    return f"nnUNetv2_train {configuration.id} {configuration.name} {fold} -tr {trainer}{options}"


def plans_option(plans_name: str) -> str:
    """Return the option -p for a plans identifier, or an empty text for nnU-Net's default."""
    return "" if plans_name == "nnUNetPlans" else f" -p {shlex.quote(plans_name)}"


def device_option(device: str) -> str:
    """Return the option -device, or an empty text for nnU-Net's default."""
    return "" if device == "cuda" else f" -device {device}"
