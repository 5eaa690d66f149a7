"""A whole training step of each method against forward and backward of the same network with a sum as loss."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from torch import Tensor, nn

from benchmarks.measure import Row, at_most, side_by_side
from benchmarks.planned import FLAT, Fingerprint, planned
from nnunetv2_macl.factory import build_model, build_optimizer, build_schedule
from nnunetv2_macl.files import resource_folder
from nnunetv2_macl.nnunet import DatasetConfiguration
from nnunetv2_macl.planning.derive import derive_plan
from nnunetv2_macl.recipe import load_recipe
from nnunetv2_macl.training.step import TrainingStep

SHAPES = {
    "2D 256x256": (Fingerprint("2D", ("MR",), (1, 248, 248), (FLAT, 1.0, 1.0), ExperimentPlanner), "2d", 16),
    "3D 64x64x64": (Fingerprint("3D", ("MR",), (62, 62, 62), (1.0, 1.0, 1.0), ExperimentPlanner), "3d_fullres", 2),
}


def recipes() -> list[str]:
    """Return the name of one recipe of each method, and of each sum of methods, that the recipes of the package name."""
    found: dict[str, str] = {}
    for file in sorted(resource_folder("plans").glob("*.json")):
        found.setdefault(load_recipe(file, resource_folder("plans")).method, file.stem)
    return list(found.values())


def training_step(
    configuration: DatasetConfiguration,
    device: torch.device,
    recipe: str = "macl",
    *,
    gpu_memory_gb: float | None = None,
    compiled: bool = False,
    **settings: object,
) -> TrainingStep:
    """Return a step as the trainer builds it.

    Args:
        configuration: Of nnU-Net.
        device: Where the step computes.
        recipe: Name of a recipe.
        gpu_memory_gb: What the batch may take; None is what nnU-Net planned for.
        compiled: Whether torch compiles the network.
        settings: Recipe values that replace those of the recipe.
    """
    torch.manual_seed(0)
    asked_for = load_recipe(recipe, resource_folder("plans"), settings)
    plan = derive_plan(configuration, asked_for, gpu_memory_gb=gpu_memory_gb)
    planned_recipe = plan.get_recipe()
    model: nn.Module = build_model(configuration, plan.geometry, planned_recipe).to(device)
    if compiled:
        model = torch.compile(model)  # type: ignore[assignment]
    optimizer = build_optimizer(model, planned_recipe)
    schedule = build_schedule(optimizer, planned_recipe)
    scaler = torch.amp.GradScaler("cuda") if device.type == "cuda" else None
    return TrainingStep(model, optimizer, schedule, scaler, plan, device)


def batch(step: TrainingStep) -> dict[str, Tensor]:
    """Return a batch of noise of the size that the plan has, with neighbours where a method asks for them."""
    generator = torch.Generator().manual_seed(0)
    patches, channels = step.plan.batch_size, step.model.network.image_channels
    return {
        "data": torch.randn(
            patches * (1 + step.model.uses_neighbours), channels, *step.plan.patch_size, generator=generator
        ),
        "positions": torch.rand(patches, 3, generator=generator),
    }


def network_alone(step: TrainingStep, patches: Tensor) -> Callable[[], None]:
    """Return forward and backward pass of all that the methods show to the network, with a sum as loss.

    What is left out of a step: the making of views, the losses, gradient caching and the update of the weights.
    """
    views = step.show(patches, 0)
    is_whole = step.plan.patches_at_once >= step.plan.batch_size

    def run() -> None:
        step.optimizer.zero_grad(set_to_none=True)
        for method in step.methods:
            for part in step._cut(views[method.name]):
                with step._autocast():
                    outputs = step._encode[method.name](part)
                    # Of a batch in parts the heads see the whole batch, and the network a part.
                    outputs = method.project(outputs) if is_whole else outputs
                total = torch.stack([o.float().sum() for o in outputs.values() if o.requires_grad]).sum()
                step._scaled(total).backward()

    return run


def planned_shapes() -> Iterator[tuple[str, DatasetConfiguration, int]]:
    """Yield, for each of `SHAPES`, its name in words, its configuration and its patches in a step."""
    for name, (fingerprint, configuration_name, patches) in SHAPES.items():
        with (
            tempfile.TemporaryDirectory() as folder,
            planned(fingerprint, configuration_name, Path(folder)) as configuration,
        ):
            yield f"{name}, N={patches}", configuration, patches


def run(device: torch.device) -> list[Row]:
    rows = []
    for shape, configuration, patches in planned_shapes():
        for recipe in recipes():
            step = training_step(configuration, device, recipe, batch_size=patches)
            data = batch(step)
            ours, theirs = side_by_side(partial(step, data, 0), network_alone(step, data["data"]))
            what = f"{recipe}, {shape}, over forward and backward alone"
            rows.append(at_most("step", what, ours, theirs, "s", 1.10))
    return rows
