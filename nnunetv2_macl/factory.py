"""The model and the optimiser that a recipe asks for."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from torch import nn

from nnunetv2_macl.errors import UserError
from nnunetv2_macl.methods.base import Geometry
from nnunetv2_macl.methods.model import PretrainingModel
from nnunetv2_macl.networks.registry import pretrainable
from nnunetv2_macl.nnunet import DatasetConfiguration
from nnunetv2_macl.recipe import Recipe


def build_model(
    configuration: DatasetConfiguration, geometry: Geometry, recipe: Recipe, unet: nn.Module | None = None
) -> PretrainingModel:
    """Return what is trained: the methods of a recipe around a segmentation network.

    Args:
        configuration: Of nnU-Net.
        geometry: What the methods read of the network, and the patches.
        recipe: Names the methods.
        unet: The segmentation network; None builds nnU-Net's own for the configuration.

    Raises:
        UserError: The network is of a family that cannot be pre-trained, or takes no patches of the size that the methods show.
    """
    if unet is None:
        manager = configuration.manager
        unet = get_network_from_plans(
            manager.network_arch_class_name,
            manager.network_arch_init_kwargs,
            manager.network_arch_init_kwargs_req_import,
            len(configuration.channel_names),
            2,
            allow_init=False,
        )
    geometry = replace(geometry, channels_without_zscore=configuration.channels_without_zscore)
    network = pretrainable(unet, geometry.decoder_stages)
    for size in (geometry.patch_size, geometry.dominant_patch_size):
        if network.only_patch_size not in (None, tuple(size)):
            name = type(unet).__name__
            raise UserError(
                f"The method {recipe.method} shows the network patches of {_by(size)}, and {name} takes patches of "
                f"{_by(network.only_patch_size)} alone, because its position embeddings are learned for that size. Take a method "
                "that shows patches of nnU-Net's own size: -recipe restore"
            )
    return PretrainingModel(network, geometry, recipe)


def _by(size: Sequence[int] | None) -> str:
    return "x".join(map(str, size or ()))


def build_optimizer(network: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    parameters = [p for p in network.parameters() if p.requires_grad]
    settings: dict[str, Any] = {"lr": recipe.learning_rate, "weight_decay": recipe.weight_decay}
    kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[recipe.optimizer]
    if recipe.optimizer == "sgd":
        settings["momentum"] = recipe.momentum
    # One kernel for all weights, and no wait for the gradient scaler's check. SGD has it from torch 2.3 on. There it fails if
    # some weights get their first gradient later than others, as with two training stages.
    is_possible = "fused" in inspect.signature(kind).parameters and (
        recipe.optimizer != "sgd" or not recipe.trains_in_stages
    )
    if parameters[0].device.type == "cuda" and is_possible:
        settings["fused"] = True
    return kind(parameters, **settings)


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load the state of an optimiser and keep how this process computes the update.

    torch would take that from the state too, which may come from another device or from an earlier version.

    Args:
        optimizer: As `build_optimizer` has built it.
        state: Its state dict from a checkpoint.
    """
    groups = [
        theirs | {key: ours[key] for key in ("fused", "foreach") if key in ours}
        for theirs, ours in zip(state["param_groups"], optimizer.param_groups, strict=True)
    ]
    optimizer.load_state_dict(state | {"param_groups": groups})
