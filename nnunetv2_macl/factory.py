"""Build the model, the optimiser and the schedule of the learning rate for a recipe."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from nnunetv2_macl.errors import UserError
from nnunetv2_macl.methods.base import Geometry, Method
from nnunetv2_macl.methods.model import PretrainingModel
from nnunetv2_macl.networks.registry import present_name, pretrainable
from nnunetv2_macl.nnunet import DatasetConfiguration
from nnunetv2_macl.recipe import PaddingMode, Recipe


def build_segmentation_network(configuration: DatasetConfiguration) -> nn.Module:
    """Return the network that nnU-Net's trainer builds for a configuration, with the inputs of a cascade's second stage."""
    plans, dataset_json = configuration.plans_manager, configuration.dataset_json
    return nnUNetTrainer.build_network_architecture(
        plans,
        configuration.manager,
        determine_num_input_channels(plans, configuration.manager, dataset_json),
        plans.get_label_manager(dataset_json).num_segmentation_heads,
        True,
    )


def build_model(
    configuration: DatasetConfiguration, geometry: Geometry, recipe: Recipe, unet: nn.Module | None = None
) -> PretrainingModel:
    """Return the model that is pre-trained: the methods of a recipe around a segmentation network.

    Args:
        configuration: Configuration of nnU-Net.
        geometry: Patch sizes, and the parts of the network that the methods use.
        recipe: Recipe that names the methods.
        unet: The segmentation network. None builds nnU-Net's network for the configuration.

    Raises:
        UserError: The network's family cannot be pre-trained, or the network does not accept the methods' patch size.
    """
    if unet is None:
        manager = configuration.manager
        unet = get_network_from_plans(
            present_name(manager.network_arch_class_name),
            manager.network_arch_init_kwargs,
            manager.network_arch_init_kwargs_req_import,
            len(configuration.channel_names),
            2,
            allow_init=False,
        )
    geometry = replace(geometry, channels_without_zscore=configuration.channels_without_zscore)
    network = pretrainable(unet, geometry.decoder_stages)
    model = PretrainingModel(network, geometry, recipe)
    for size in (size for method in model for size in method.shown_sizes):
        if network.only_patch_size not in (None, tuple(size)):
            name = type(unet).__name__
            raise UserError(
                f"The method {recipe.method} uses patches of {_by(size)}, but {name} accepts only patches of "
                f"{_by(network.only_patch_size)}, because its position embeddings are learned for this size. Use a method with "
                "patches of nnU-Net's own size: -recipe restore"
            )
    if recipe.padding_mode != "zeros":
        _set_padding_mode(model, recipe.padding_mode)
    return model


def _by(size: Sequence[int] | None) -> str:
    return "x".join(map(str, size or ()))


def _set_padding_mode(model: PretrainingModel, mode: PaddingMode) -> None:
    """Set the padding mode of the convolutions of the network and of the heads, which does not change any weight.

    Raises:
        UserError: The mode is reflection, but a map is one voxel wide and cannot be reflected.
    """
    deepest = model.network.encoder_levels[-1].stride
    for size in (size for method in model for size in method.shown_sizes):
        voxels = [n // s for n, s in zip(size, deepest, strict=True)]
        if mode == "reflect" and min(voxels) < 2:
            raise UserError(
                f"padding_mode is reflect, which needs two voxels on each axis, but the deepest map has {voxels}. "
                "Use another mode: --set padding_mode=replicate"
            )
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Conv3d)):
            module.padding_mode = mode


def build_optimizer(network: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """Return the optimiser of a recipe, with a separate group for modules whose learning rate does not decay.

    Args:
        network: The model that is pre-trained, compiled or not.
        recipe: Recipe with the optimiser and its settings.
    """
    methods = [module for module in network.modules() if isinstance(module, Method)]
    constant = {p for m in methods for name in m.constant_rate_modules for p in m.get_submodule(name).parameters()}
    parameters = [p for p in network.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [{"params": [p for p in parameters if p not in constant]}]
    if constant:
        groups.append({"params": [p for p in parameters if p in constant], "schedule": "constant"})
    settings: dict[str, Any] = {"lr": recipe.learning_rate, "weight_decay": recipe.weight_decay}
    kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[recipe.optimizer]
    if recipe.optimizer == "sgd":
        settings["momentum"] = recipe.momentum
    # One kernel for all weights takes a quarter of the time on a CPU. On a GPU it also does not wait for the check of
    # the gradient scaler. SGD has it from torch 2.3 on, and CPUs from 2.4 on. That of SGD fails if some weights get
    # their first gradient later than others, as with two training stages.
    device, torch_version = parameters[0].device.type, tuple(map(int, torch.__version__.split(".")[:2]))
    has_kernel = device == "cuda" or (device == "cpu" and torch_version >= (2, 4))
    fails = recipe.optimizer == "sgd" and recipe.trains_in_stages
    if has_kernel and "fused" in inspect.signature(kind).parameters and not fails:
        settings["fused"] = True
    return kind(groups, **settings)


def build_schedule(optimizer: torch.optim.Optimizer, recipe: Recipe) -> LambdaLR:
    """Return the schedule of the learning rate of each group that `build_optimizer` has made."""
    schedules = [group.get("schedule", recipe.schedule) for group in optimizer.param_groups]
    return LambdaLR(optimizer, [partial(lr_factor, recipe, schedule=schedule) for schedule in schedules])


def lr_factor(recipe: Recipe, step: int, schedule: str | None = None) -> float:
    """Return the fraction of the recipe's learning rate at a step: linear warm-up, then the schedule to 0.

    Args:
        recipe: Recipe of the run.
        step: Number of the step.
        schedule: Schedule that replaces the recipe's, or None.
    """
    steps = recipe.num_epochs * recipe.num_iterations_per_epoch
    warmup = round(recipe.learning_rate_warmup * steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = min(1.0, (step - warmup) / max(1, steps - warmup))
    factors = {"cosine": (1 + math.cos(math.pi * done)) / 2, "poly": (1 - done) ** 0.9, "constant": 1.0}
    return factors[schedule or recipe.schedule]


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load the state of an optimiser, but keep its implementation (``fused``, ``foreach``).

    torch would take the implementation from the state too, which may come from another device or an earlier version.

    Args:
        optimizer: An optimiser of `build_optimizer`.
        state: Its state dict from a checkpoint.
    """
    groups = [
        theirs | {key: ours[key] for key in ("fused", "foreach") if key in ours}
        for theirs, ours in zip(state["param_groups"], optimizer.param_groups, strict=True)
    ]
    optimizer.load_state_dict(state | {"param_groups": groups})
