"""The model and the optimiser that a recipe asks for."""

from __future__ import annotations

import inspect
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
        UserError: The network is of a family that cannot be pre-trained.
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
    model = PretrainingModel(pretrainable(unet, geometry.decoder_stages), geometry, recipe)
    if recipe.padding_mode != "zeros":
        _set_padding_mode(model, recipe.padding_mode)
    return model


def _set_padding_mode(model: PretrainingModel, mode: str) -> None:
    """Set what the convolutions of the network and of the heads see beyond the edge. No weight depends on it.

    Raises:
        UserError: Reflection is asked for, and a map is one voxel wide, which leaves nothing to reflect.
    """
    for method in model:
        deepest = model.network.encoder_levels[-1].stride
        size = [n // s for n, s in zip(method.geometry.dominant_patch_size, deepest, strict=True)]
        if mode == "reflect" and min(size) < 2:
            raise UserError(
                f"padding_mode is reflect, which needs two voxels on each axis, and the deepest map has {size}. "
                "Take another one: --set padding_mode=replicate"
            )
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Conv3d)):
            module.padding_mode = mode


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
