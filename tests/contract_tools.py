"""Combinations of all registered methods and networks, and training steps of them, for tests/test_contract.py."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import SimpleITK as sitk
import steps
import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import Tensor, nn

from nnunetv2_macl import distributed
from nnunetv2_macl.data import draw_corner, neighbour_corners
from nnunetv2_macl.factory import build_model, build_optimizer, build_schedule
from nnunetv2_macl.methods.registry import all_methods, methods_of
from nnunetv2_macl.networks.base import class_name
from nnunetv2_macl.networks.registry import families
from nnunetv2_macl.networks.unet import UNet
from nnunetv2_macl.nnunet import DatasetConfiguration
from nnunetv2_macl.synthetic import generate_dataset
from nnunetv2_macl.training.step import TrainingStep

# Neither two ranks nor the parts divide this batch evenly.
PATCHES = 5
STEPS_OF_AN_EPOCH = 15
# Published heads are so wide that they would dominate the time of the tests.
LIGHT = {name: {"head": "light"} for name, method in all_methods().items() if "head" in method.Config.model_fields}
# All registered methods with their defaults, and variants: a sum of methods, an averaged encoder, training stages.
RECIPES = {name: {"method": name} | LIGHT.get(name, {}) for name in all_methods()} | {
    "macl+restoration": {"method": "macl+restoration"},
    "macl_averaged_encoder": {"method": "macl", "auxiliary_encoder": "ema"},
    "macl_two_stages": {"method": "macl", "training_stages": 2},
    # The default heads and views would take much longer than the small networks.
    "desd": {"method": "desd", "hidden": 32, "outputs": 32},
    "dira": {"method": "dira", "adversary_width": 8},
    "swav": {"method": "swav", "prototypes": 16, "queue_length": 8, "small_views": 2},
}


class Case(NamedTuple):
    """A recipe and an example network of a family.

    Attributes:
        recipe: A key of `RECIPES`.
        family: Index of the family in `families()`.
        axes: 2 or 3.
        example: Index of the network in the family's `examples`.
    """

    recipe: str
    family: int
    axes: int
    example: int

    @property
    def first_steps(self) -> tuple[int, ...]:
        """Return the first step of each half of a run, because a method may train other weights in the second half.

        In 3D it is only the first step of the first half, because steps take long.
        """
        return (0, STEPS_OF_AN_EPOCH)[: 4 - self.axes]

    @property
    def has_unet(self) -> bool:
        """Return whether the network is one of nnU-Net's own U-Nets."""
        return families()[self.family] is UNet

    @property
    def is_quick(self) -> bool:
        """Return whether the quick suite includes the case.

        It includes every recipe with the first 2D U-Net, and one recipe with all U-Nets and with all other families in 2D.
        """
        if self.has_unet and self.example == 0 and self.axes == 2:
            return True
        return self.recipe == "macl+restoration" and (self.has_unet or self.axes == 2)

    @property
    def name(self) -> str:
        """Return the case as a part of a test's name: recipe, network and axes."""
        return f"{self.recipe}-{_network_name(self.family, self.axes, self.example)}-{self.axes}D"

    def network(self) -> nn.Module:
        """Return the segmentation network, with the same weights in every call."""
        torch.manual_seed(0)
        return families()[self.family].examples(self.axes)[self.example]


@cache
def _network_name(family: int, axes: int, example: int) -> str:
    return class_name(type(Case("", family, axes, example).network())).rpartition(".")[2]


@cache
def _number_of_examples(family: int, axes: int, one_per_family: bool) -> int:
    examples = len(families()[family].examples(axes))
    return min(examples, 1) if one_per_family or axes == 3 else examples


def all_cases(*, one_per_family: bool = False) -> list[Case]:
    """Return each recipe with all example networks in 2D, and with the first network of each family in 3D.

    Args:
        one_per_family: Whether to use only the first network of each family in 2D, too.
    """
    return [
        Case(recipe, number, axes, example)
        for recipe in RECIPES
        for number in range(len(families()))
        for axes in (2, 3)
        for example in range(_number_of_examples(number, axes, one_per_family))
    ]


def example_network(
    input_channels: int, num_classes: int, family: int, axes: int, example: int, deep_supervision: bool = True
) -> nn.Module:
    """Return an example network. The plan of `configuration_of` names this function as its network class."""
    return Case("", family, axes, example).network()


def configuration_of(case: Case, patch_size: list[int], channels: int) -> DatasetConfiguration:
    """Return a configuration of nnU-Net with the network of the case."""
    architecture = {
        "network_class_name": f"{__name__}.{example_network.__name__}",
        "arch_kwargs": {"family": case.family, "axes": case.axes, "example": case.example},
        "_kw_requires_import": [],
    }
    planned = {
        "architecture": architecture,
        "patch_size": patch_size,
        "normalization_schemes": ["ZScoreNormalization"] * channels,
    }
    plans = {"dataset_name": "Dataset001_Contract", "plans_name": "plans", "configurations": {"contract": planned}}
    dataset_json = {"channel_names": {str(number): "MR" for number in range(channels)}}
    return DatasetConfiguration("Dataset001_Contract", "plans", "contract", PlansManager(plans), dataset_json)


class Prepared(NamedTuple):
    """A training step, its segmentation network, and nnU-Net's configuration."""

    step: TrainingStep
    network: nn.Module
    configuration: DatasetConfiguration


def prepare(
    case: Case,
    dtype: torch.dtype = torch.float64,
    *,
    patches_at_once: int = PATCHES,
    size: int = 1,
    **settings: Any,
) -> Prepared:
    """Return a training step of a case, on the CPU.

    Args:
        case: Method and network.
        dtype: Data type of the weights.
        patches_at_once: Number of patches in a part of the batch.
        size: Factor per axis by which the patch is larger than necessary, if the network takes patches of any size.
        **settings: Further recipe values.
    """
    network, family = case.network(), families()[case.family]
    adapter = family(network, 0)
    totals = [(1,) * case.axes, *(level.stride for level in adapter.encoder_levels)]
    strides = [[b // a for a, b in zip(*pair, strict=True)] for pair in pairwise(totals)]
    # Instance norm needs more than one voxel at the bottleneck.
    planned = list(adapter.only_patch_size or [2 * size * multiple for multiple in adapter.patch_multiple])
    decoder_stages = min(1, len(adapter.encoder_levels) - 1)
    of_all = {"decoder_stages": decoder_stages, "num_epochs": 2, "num_iterations_per_epoch": STEPS_OF_AN_EPOCH}
    recipe = steps.recipe_of(**RECIPES[case.recipe] | of_all | settings)
    geometry = methods_of(recipe.method)[0].plan_geometry(planned, strides, recipe)
    plan = replace(
        steps.plan(PATCHES, patches_at_once, recipe),
        decoder_stages=geometry.decoder_stages,
        auxiliary_stage=geometry.auxiliary_stage,
        scale=geometry.scale,
        patch_size=geometry.patch_size,
        dominant_patch_size=geometry.dominant_patch_size,
    )
    configuration = configuration_of(case, geometry.patch_size, adapter.image_channels)
    # Initialise the heads with the same weights in every call, too.
    torch.manual_seed(1)
    model = build_model(configuration, plan.geometry, recipe, network).to(dtype)
    if distributed.world_size() > 1:
        distributed.synchronise_batch_norm(model)
    optimizer = build_optimizer(model, recipe)
    schedule = build_schedule(optimizer, recipe)
    step = TrainingStep(model, optimizer, schedule, None, plan, torch.device("cpu"))
    return Prepared(step, network, configuration)


def make_volumes(folder: Path, channels: int) -> list[Tensor]:
    """Return generated volumes, (channels, *volume), each channel normalised to zero mean and unit variance."""
    generate_dataset(folder, labelled=0, unlabelled=4, test=0, shape=(16, 72, 72), channels=channels)
    volumes = []
    for first in sorted((folder / "imagesUn").glob("*_0000.nii.gz")):
        files = sorted(first.parent.glob(first.name.replace("_0000.", "_*.")))
        volume = torch.stack([torch.from_numpy(sitk.GetArrayFromImage(sitk.ReadImage(str(file)))) for file in files])
        mean, deviation = (measured(volume.flatten(1), 1)[:, None, None, None] for measured in (torch.mean, torch.std))
        volumes.append(((volume - mean) / deviation).float())
    return volumes


def batch_of(step: TrainingStep, volumes: list[Tensor], number: int) -> dict[str, Tensor]:
    """Return this rank's part of a batch: patches at random positions of random volumes, in the data type of the weights.

    Args:
        step: The step, whose plan has the sizes of batch and patch.
        volumes: (channels, *volume), with at least as many channels as the network takes.
        number: Number of the step.
    """
    size, channels = step.plan.patch_size, step.model.network.image_channels
    whole = [1] * (3 - len(size)) + size
    drawn = np.random.default_rng(number)
    patches, neighbours, positions = [], [], []

    def cut(volume: Tensor, corner: np.ndarray) -> Tensor:
        place = [slice(first, first + n) for first, n in zip(corner, whole, strict=True)]
        return volume[(slice(None), *place)].reshape(channels, *size)

    for _ in range(step.plan.batch_size):
        volume = volumes[drawn.integers(len(volumes))][:channels]
        # A volume may be thinner than the patch.
        short = [max(0, n - available) for n, available in zip(whole, volume.shape[1:], strict=True)]
        volume = nn.functional.pad(volume, [width for n in reversed(short) for width in (0, n)])
        corner = draw_corner(volume.shape[1:], whole, drawn)
        patches.append(cut(volume, corner))
        if step.model.uses_neighbours:
            neighbours.append(cut(volume, neighbour_corners(corner, volume.shape[1:], whole, drawn)[0]))
        positions.append([(first + n / 2) / m for first, n, m in zip(corner, whole, volume.shape[1:], strict=True)])
    mine = slice(step.first, step.last)
    dtype = next(step.model.parameters()).dtype
    data = torch.stack(patches[mine] + neighbours[mine]).to(dtype)
    return {"data": data, "positions": torch.tensor(positions)[mine].float()}


def state_of(step: TrainingStep) -> Iterator[tuple[str, Tensor]]:
    """Yield the names and values of the weights, the buffers and the optimiser's state."""
    yield from step.model.state_dict().items()
    for number, values in step.optimizer.state_dict()["state"].items():
        yield from ((f"optimizer.{number}.{key}", value) for key, value in values.items() if isinstance(value, Tensor))
