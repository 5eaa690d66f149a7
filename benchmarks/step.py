"""Compare the training step of each method with forward and backward pass of the same network with a sum as loss."""

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
    """Return the name of one recipe for each method, and for each combination of methods, in the recipes of the package."""
    found: dict[str, str] = {}
    for file in sorted(resource_folder("plans").glob("*.json")):
        found.setdefault(load_recipe(file, resource_folder("plans")).method, file.stem)
    return list(found.values())


def training_step(
    configuration: DatasetConfiguration,
    device: torch.device,
    recipe: str = "macl_0.1",
    *,
    gpu_memory_gb: float | None = None,
    compiled: bool = False,
    **settings: object,
) -> TrainingStep:
    """Return a training step like the trainer's.

    Args:
        configuration: Configuration of nnU-Net's plan.
        device: Device of the step.
        recipe: Name of a recipe.
        gpu_memory_gb: GPU memory for the batch, GB. None is the memory that nnU-Net planned for.
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
    """Return a batch of noise of the plan's size, with neighbours if a method uses them."""
    generator = torch.Generator().manual_seed(0)
    patches, channels = step.plan.batch_size, step.model.network.image_channels
    return {
        "data": torch.randn(
            patches * (1 + step.model.uses_neighbours), channels, *step.plan.patch_size, generator=generator
        ),
        "positions": torch.rand(patches, 3, generator=generator),
    }


def network_alone(step: TrainingStep, patches: Tensor) -> Callable[[], None]:
    """Return a function that runs forward and backward pass of all views of a step, with a sum as loss.

    It leaves out the computation of views and losses, gradient caching and the update of the weights.
    """
    views = step.show(patches, 0)
    is_whole = step.plan.patches_at_once >= step.plan.batch_size

    def run() -> None:
        step.optimizer.zero_grad(set_to_none=True)
        for method in step.methods:
            for part in step._cut(views[method.name]):
                with step._autocast():
                    outputs = step._encode[method.name](part)
                    # In a batch in parts, heads see the whole batch, so they are left out here.
                    outputs = method.project(outputs) if is_whole else outputs
                total = torch.stack([o.float().sum() for o in outputs.values() if o.requires_grad]).sum()
                step._scaled(total).backward()

    return run


def planned_shapes() -> Iterator[tuple[str, DatasetConfiguration, int]]:
    """Yield a description, the configuration and the number of patches of a step for each item of `SHAPES`."""
    for name, (fingerprint, configuration_name, patches) in SHAPES.items():
        with (
            tempfile.TemporaryDirectory() as folder,
            planned(fingerprint, configuration_name, Path(folder)) as configuration,
        ):
            yield f"{name}, N={patches}", configuration, patches


def run(device: torch.device) -> Iterator[Row]:
    for shape, configuration, patches in planned_shapes():
        for recipe in recipes():
            step = training_step(configuration, device, recipe, batch_size=patches)
            data = batch(step)
            ours, theirs = side_by_side(partial(step, data, 0), network_alone(step, data["data"]))
            what = f"{recipe}, {shape}, over only forward and backward"
            yield at_most("step", what, ours, theirs, "s", 1.10)
