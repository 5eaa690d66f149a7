"""Measure the share of each part of a step of `macl` in the time of the step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.measure import Row, side_by_side
from benchmarks.step import batch, network_alone, planned_shapes, training_step
from nnunetv2_macl.training.step import TrainingStep


def parts(step: TrainingStep, data: dict[str, Tensor]) -> dict[str, Callable[[], object]]:
    """Return functions that run the parts of a step: views, network, losses, statistics for the log, update of the weights."""
    patches, positions = data["data"].to(step.device), data["positions"].to(step.device)
    (method,), progress = step.methods, step.progress(0)
    alone = network_alone(step, patches)
    views = step.show(patches, 0)[method.name]
    with torch.no_grad(), step._autocast():
        embeddings = method.project(method.encode(views))
    alone()
    gradients = [parameter.grad for parameter in step.model.parameters()]

    def losses() -> dict[str, Tensor]:
        values = method.losses({name: e.requires_grad_() for name, e in embeddings.items()}, positions, progress)
        values["total"].backward()
        for embedding in embeddings.values():
            embedding.grad = None
        return values

    measured = {name: value.detach() for name, value in losses().items()}

    def update() -> None:
        for parameter, gradient in zip(step.model.parameters(), gradients, strict=True):
            parameter.grad = gradient
        step._update(progress, measured, {})

    return {
        "views": lambda: step.show(patches, 0),
        "network, forward and backward": alone,
        "losses, forward and backward": losses,
        "statistics for the log": lambda: step._statistics(method, embeddings, positions),
        "update of the weights": update,
    }


def run(device: torch.device) -> list[Row]:
    rows = []
    for shape, configuration, patches in planned_shapes():
        step = training_step(configuration, device, batch_size=patches)
        data = batch(step)
        alone = parts(step, data)
        whole, *seconds = side_by_side(lambda s=step, d=data: s(d, 0), *alone.values(), repeats=3)
        for title, ours in zip(alone, seconds, strict=True):
            what = f"{title}, {shape}, of the whole step"
            rows.append(Row("shares", what, ours, whole, "s", ours / whole, "", None))
    return rows
