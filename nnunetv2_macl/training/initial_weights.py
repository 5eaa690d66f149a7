"""Fit pre-trained weights to the network of a configuration, and show what fine-tuning would load."""

from __future__ import annotations

import logging
from pathlib import Path

from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from torch import Tensor

from nnunetv2_macl import checkpoints, formats
from nnunetv2_macl.factory import build_segmentation_network
from nnunetv2_macl.nnunet import DatasetConfiguration
from nnunetv2_macl.training.commands import command_to_pretrain
from nnunetv2_macl.transfer import TooLittleFitsError, Transfer, plan_transfer

logger = logging.getLogger(__name__)


def transfer_to(
    target: DatasetConfiguration, state: dict[str, Tensor], pretrained: checkpoints.PretrainedWeights
) -> Transfer:
    """Fit pre-trained weights to the network of a configuration, see `plan_transfer`.

    Args:
        target: The configuration; it may be the second stage of a cascade.
        state: State dict of its network.
        pretrained: The weights.

    Raises:
        UserError: The network of the weights differs too much. The message names the first difference.
    """
    channels = determine_num_input_channels(target.plans_manager, target.manager, target.dataset_json)
    return plan_transfer(
        pretrained,
        state,
        target.architecture() | {"input_channels": channels},
        image_channels=len(target.channel_names),
        channel_names=(pretrained.channel_names, target.channel_names),
        advice=f"Pre-train for this one: {command_to_pretrain(target)}",
    )


def show_transfer(weights: Path, dataset: str | int, plans: str, configuration: str | None) -> Transfer:
    """Log which pre-trained weights fine-tuning would load, without training.

    Args:
        weights: Folder or file, as for ``nnUNet_macl_weights``.
        dataset: Data set to fine-tune on, by name or id.
        plans: Plans identifier.
        configuration: Name of the configuration. None: the default of pre-training.

    Raises:
        UserError: The data set, plan, configuration or weights do not exist, or the network of the weights differs too much.
    """
    target = DatasetConfiguration.load(dataset, plans, configuration)
    try:
        pretrained, transfer = load_transfer(weights, target)
    except TooLittleFitsError as error:
        logger.info("%s\n", error.transfer.table())
        raise
    logger.info(
        "%s\nfor %s, %s, %s: %s\n\n%s",
        ", ".join(str(file) for file in pretrained.files),
        target.dataset_name,
        target.plans_name,
        target.name,
        f"another network, {transfer.difference}" if transfer.difference else "the same network",
        transfer.table(),
    )
    return transfer


def load_transfer(weights: Path, target: DatasetConfiguration) -> tuple[checkpoints.PretrainedWeights, Transfer]:
    """Return pre-trained weights, and their transfer to the network of a configuration.

    Args:
        weights: Folder or file, as for ``nnUNet_macl_weights``.
        target: The configuration.

    Raises:
        UserError: There are no weights, or their network differs too much.
    """
    pretrained = formats.load_weights(weights.expanduser())
    return pretrained, transfer_to(target, build_segmentation_network(target).state_dict(), pretrained)
