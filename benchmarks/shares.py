"""What the time of a whole step goes to: each part alone, over the whole."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.measure import Row, side_by_side
from benchmarks.step import bare, batch, planned_shapes, training_step
from nnunetv2_macl.training.step import TrainingStep


def parts(step: TrainingStep, data: dict[str, torch.Tensor]) -> dict[str, Callable[[], object]]:
    """By name: views, network, losses, statistics for the log, update of the weights."""
    patches, positions = data["data"].to(step.device), data["positions"].to(step.device)
    shown = step.show(patches, 0)
    with torch.no_grad(), step._autocast():
        outputs = {name: output.detach() for name, output in step.network(*shown).items()}
    bare(step, len(patches))
    gradients = [parameter.grad for parameter in step.module.parameters()]

    def losses() -> dict[str, torch.Tensor]:
        values = step.loss({name: output.requires_grad_() for name, output in outputs.items()}, positions)
        values["total"].backward()
        for output in outputs.values():
            output.grad = None
        return values

    measured = {name: value.detach() for name, value in losses().items()}

    def update() -> None:
        for parameter, gradient in zip(step.module.parameters(), gradients, strict=True):
            parameter.grad = gradient
        step._update(0, measured["total"])

    return {
        "views": lambda: step.show(patches, 0),
        "network, forward and backward": lambda: bare(step, len(patches)),
        "losses, forward and backward": losses,
        "statistics for the log": lambda: step._measure(measured, outputs, positions),
        "update of the weights": update,
    }


def run(device: torch.device) -> list[Row]:
    rows = []
    for shape, configuration, patches in planned_shapes():
        step = training_step(configuration, patches, device)
        data = batch(step, patches)
        alone = parts(step, data)
        whole, *seconds = side_by_side(lambda s=step, d=data: s(d, 0), *alone.values(), repeats=3)
        for title, ours in zip(alone, seconds, strict=True):
            what = f"{title}, {shape}, of the whole step"
            rows.append(Row("shares", what, ours, whole, "s", ours / whole, "", None))
    return rows
