"""Measure how each option of torch changes the time of a step, over the step without the option."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch.optim.lr_scheduler import LambdaLR

from benchmarks.measure import Row, side_by_side
from benchmarks.step import batch, planned_shapes, training_step
from nnunetv2_macl.training.step import TrainingStep


def channels_last(step: TrainingStep) -> None:
    layout = {2: torch.channels_last, 3: torch.channels_last_3d}[len(step.plan.patch_size)]
    step.model.to(memory_format=layout)
    for method in step.methods:

        def make(*arguments, make=method.views.make):
            return {name: view.contiguous(memory_format=layout) for name, view in make(*arguments).items()}

        method.views.make = make  # type: ignore[method-assign]


def bfloat16(step: TrainingStep) -> None:
    step._autocast = partial(torch.autocast, step.device.type, dtype=torch.bfloat16)  # type: ignore[method-assign]


def fused_optimiser(step: TrainingStep) -> None:
    settings = {key: step.optimizer.defaults[key] for key in ("lr", "weight_decay")}
    step.optimizer = torch.optim.AdamW(step.model.parameters(), fused=True, **settings)
    step.scheduler = LambdaLR(step.optimizer, lambda _: 1.0)


def no_autocast(step: TrainingStep) -> None:
    step._autocast = partial(torch.autocast, step.device.type, enabled=False)  # type: ignore[method-assign]


def compiled(step: TrainingStep) -> None:
    step._encode = {method.name: torch.compile(method.encode, dynamic=False) for method in step.methods}


def switches(device: torch.device) -> dict[str, Callable[[TrainingStep], None]]:
    """Return the options by name. Compiling and autocast are options on a GPU only, as in nnU-Net."""
    common = {"channels_last": channels_last, "fused AdamW": fused_optimiser, "bfloat16": bfloat16}
    return common if device.type == "cpu" else common | {"no autocast": no_autocast, "compiled": compiled}


def run(device: torch.device) -> list[Row]:
    rows = []
    for shape, configuration, patches in planned_shapes():
        changes = {"": lambda _: None} | switches(device)
        steps = [training_step(configuration, device, batch_size=patches) for _ in changes]
        for step, change in zip(steps, changes.values(), strict=True):
            change(step)
        data = batch(steps[0])
        plain, *seconds = side_by_side(*(partial(step, data, 0) for step in steps), repeats=3)
        for title, ours in zip(list(changes)[1:], seconds, strict=True):
            what = f"{title}, {shape}, over the step as it is"
            rows.append(Row("switches", what, ours, plain, "s", ours / plain, "", None))
    return rows
