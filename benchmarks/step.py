"""A whole training step against forward and backward of the same network with a sum as loss."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from benchmarks.measure import Row, at_most, side_by_side
from benchmarks.planned import FLAT, Fingerprint, planned
from nnunetv2_macl.building import build_loss, build_network, build_optimizer
from nnunetv2_macl.nnunet import Configuration
from nnunetv2_macl.planning.derive import derive_plan
from nnunetv2_macl.recipe import load_recipe, recipe_from_values
from nnunetv2_macl.resources import resource_folder
from nnunetv2_macl.training.step import TrainingStep

SHAPES = {
    "2D 256x256": (Fingerprint("2D", ("MR",), (1, 248, 248), (FLAT, 1.0, 1.0), ExperimentPlanner), "2d", 16),
    "3D 64x64x64": (Fingerprint("3D", ("MR",), (62, 62, 62), (1.0, 1.0, 1.0), ExperimentPlanner), "3d_fullres", 2),
}


def training_step(configuration: Configuration, batch_size: int, device: torch.device, **values) -> TrainingStep:
    """A step of `macl` as the trainer builds it."""
    torch.manual_seed(0)
    recipe = load_recipe("macl", resource_folder("plans")).as_dict() | {"batch_size": batch_size} | values
    plan = derive_plan(configuration, recipe_from_values(recipe, "benchmark"))
    network = build_network(configuration, plan, plan.get_recipe()).to(device)
    optimizer = build_optimizer(network, plan.get_recipe())
    scaler = torch.amp.GradScaler("cuda") if device.type == "cuda" else None
    return TrainingStep(
        network, build_loss(plan.get_recipe()), optimizer, LambdaLR(optimizer, lambda _: 1.0), scaler, plan, device
    )


def batch(step: TrainingStep, patches: int, channels: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "data": torch.randn(patches, channels, *step.plan.patch_size, generator=generator),
        "positions": torch.rand(patches, 3, generator=generator),
    }


def bare(step: TrainingStep, patches: int) -> None:
    """Forward and backward of the network on the same shapes, and a sum as loss: no views, losses, optimiser."""
    groups = [
        torch.randn(patches, 1, *size, device=step.device)
        for size in (step.plan.dominant_patch_size, step.plan.patch_size) * 2
    ]
    step.optimizer.zero_grad(set_to_none=True)
    with step._autocast():
        outputs = step.network(*groups)
    total = sum(output.float().sum() for output in outputs.values())
    step._scaled(total).backward()


def planned_shapes() -> Iterator[tuple[str, Configuration, int]]:
    """Of each of `SHAPES`: what it is in words, its configuration, patches a step."""
    for name, (fingerprint, configuration_name, patches) in SHAPES.items():
        with (
            tempfile.TemporaryDirectory() as folder,
            planned(fingerprint, configuration_name, Path(folder)) as configuration,
        ):
            yield f"{name}, N={patches}", configuration, patches


def run(device: torch.device) -> list[Row]:
    rows = []
    for shape, configuration, patches in planned_shapes():
        step = training_step(configuration, patches, device)
        data = batch(step, patches)
        ours, theirs = side_by_side(lambda s=step, d=data: s(d, 0), lambda s=step, n=patches: bare(s, n))
        rows.append(at_most("step", f"{shape}, over forward and backward alone", ours, theirs, "s", 1.10))
    return rows
