"""What to type next, as a run tells it."""

from __future__ import annotations

from nnunetv2_macl import distributed
from nnunetv2_macl.nnunet import Configuration


def command_to_go_on(configuration: Configuration, fold: int | str, device: str) -> str:
    """Goes on with a run that was stopped. Under torchrun this is what it starts."""
    left_out = "" if fold == "all" else f" --exclude_fold {fold}"
    ranks = distributed.world_size()
    gpus = f" -num_gpus {ranks}" if ranks > 1 and not distributed.started_by_torchrun() else ""
    return (
        f"nnUNetv2_train_macl_pretrain {configuration.id} -c {configuration.name}{_plans(configuration)}{left_out}"
        f"{_device(device)}{gpus} --c"
    )


def command_to_fine_tune(configuration: Configuration, fold: int | str, device: str) -> str:
    """Fine-tunes from what a run has made."""
    return (
        f"nnUNetv2_train {configuration.id} {configuration.name} {0 if fold == 'all' else fold} -tr nnUNetTrainerMACL"
        f"{_plans(configuration)}{_device(device)}"
    )


def _plans(configuration: Configuration) -> str:
    return "" if configuration.plans_name == "nnUNetPlans" else f" -p {configuration.plans_name}"


def _device(device: str) -> str:
    return "" if device == "cuda" else f" -device {device}"
