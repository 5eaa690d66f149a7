"""Network, loss and optimiser that a recipe asks for."""

from __future__ import annotations

import inspect
from typing import Any, Protocol

import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from torch import nn

from nnunetv2_macl.losses import MultiLevelContrastiveLoss
from nnunetv2_macl.network import MACLNetwork
from nnunetv2_macl.nnunet import Configuration
from nnunetv2_macl.recipe import Recipe


class Meeting(Protocol):
    """Where the branches meet, as `Levels` and `MACLPlan` say it."""

    @property
    def decoder_stages(self) -> int: ...

    @property
    def auxiliary_stage(self) -> int: ...


def build_network(
    configuration: Configuration, levels: Meeting, recipe: Recipe, unet: nn.Module | None = None
) -> MACLNetwork:
    """The pre-training network around ``unet``, or around nnU-Net's own network for the configuration."""
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
    return MACLNetwork(
        unet,
        decoder_stages=levels.decoder_stages,
        auxiliary_stage=levels.auxiliary_stage,
        image_level=recipe.weight_global > 0,
        pixel_level=recipe.weight_dense > 0,
        feature_level=recipe.weight_equivariance > 0,
        restoration=recipe.weight_restoration > 0,
        embedding_dim=recipe.embedding_dim,
        standardise=recipe.standardise_projector,
        auxiliary_encoder=recipe.auxiliary_encoder,
        ema_decay=recipe.ema_decay,
    )


def build_loss(recipe: Recipe) -> MultiLevelContrastiveLoss:
    return MultiLevelContrastiveLoss(
        weight_global=recipe.weight_global,
        weight_dense=recipe.weight_dense,
        weight_equivariance=recipe.weight_equivariance,
        temperature=recipe.temperature,
        threshold=recipe.threshold,
        base_temperature=recipe.base_temperature,
        own_view_weight=recipe.own_view_weight,
        equivariance_form=recipe.equivariance_form,
    )


def build_optimizer(network: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    parameters = [p for p in network.parameters() if p.requires_grad]
    settings: dict[str, Any] = {"lr": recipe.learning_rate, "weight_decay": recipe.weight_decay}
    kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[recipe.optimizer]
    if recipe.optimizer == "sgd":
        settings["momentum"] = recipe.momentum
    # One kernel for all weights, and no wait for the gradient scaler's check. SGD has it from torch 2.3 on. There it fails if
    # some weights get their first gradient later than others, as with two training stages.
    is_possible = "fused" in inspect.signature(kind).parameters and (
        recipe.optimizer != "sgd" or recipe.training_stages == 1
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
