"""Measure speed and memory of a step on a GPU: ``python -m benchmarks.gpu [-o FILE.json] [--seconds 300]``.

Each row is a plan of nnU-Net's planner for a data set of that size, with the batch that this package plans. The step is compared
with forward and backward pass of the same network with a sum as loss, which every method needs.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.experiment_planning.experiment_planners.residual_unets.residual_encoder_unet_planners import (
    nnUNetPlannerResEncL,
    nnUNetPlannerResEncM,
)
from torch.utils.data._utils.pin_memory import pin_memory

from benchmarks.planned import FLAT, Fingerprint, planned
from benchmarks.step import network_alone, training_step
from nnunetv2_macl.training.launch import prepare_process
from nnunetv2_macl.training.step import TrainingStep

_ONE_MM = (1.0, 1.0, 1.0)
SHAPES = {
    "2D, 64x64": (Fingerprint("2D", ("MR",), (1, 60, 60), (FLAT, 1.0, 1.0), ExperimentPlanner), "2d"),
    "2D, 512x512": (Fingerprint("2D", ("MR",), (1, 512, 512), (FLAT, 1.0, 1.0), ExperimentPlanner), "2d"),
    "3D": (Fingerprint("3D", ("MR",), (180, 250, 250), _ONE_MM, ExperimentPlanner), "3d_fullres"),
    "3D, anisotropic": (Fingerprint("3D", ("MR",), (20, 320, 320), (10.0, 1.0, 1.0), ExperimentPlanner), "3d_fullres"),
    "3D, ResEnc M": (Fingerprint("3D", ("MR",), (180, 250, 250), _ONE_MM, nnUNetPlannerResEncM), "3d_fullres"),
    "3D, ResEnc L": (Fingerprint("3D", ("MR",), (180, 250, 250), _ONE_MM, nnUNetPlannerResEncL), "3d_fullres"),
}
# Shape, recipe, -gpu_memory (None is the planner's own) and compiled or not, the most important rows first.
ROWS = (
    ("3D", "restore", None, False),
    ("3D", "macl_0.1", None, False),
    ("2D, 512x512", "restore", None, False),
    ("2D, 512x512", "macl_0.1", None, False),
    ("3D, ResEnc M", "restore", None, False),
    ("3D", "restore", 24.0, False),
    ("3D", "macl_0.1", 24.0, False),
    ("2D, 64x64", "restore", None, False),
    ("2D, 64x64", "macl_0.1", None, False),
    ("3D", "restore", 24.0, True),
    ("2D, 512x512", "macl_0.1", None, True),
    ("3D", "restore", None, True),
    ("2D, 512x512", "restore", None, True),
    ("3D", "macl_0.1", 24.0, True),
    ("3D", "macl", 24.0, False),
    ("3D", "restore", 80.0, False),
    ("3D, ResEnc L", "restore", 80.0, False),
    ("3D", "table6_ema_encoder_one_stage", None, False),
    ("3D, anisotropic", "restore", None, False),
    ("3D, ResEnc M", "macl_0.1", 24.0, True),
)


@dataclass(frozen=True)
class Measured:
    """A row of the table. Times are medians in milliseconds, and memory is in GiB."""

    shape: str
    recipe: str
    gpu_memory_gb: float
    compiled: bool
    patch: str
    batch_size: int
    patches_at_once: int
    step_ms: float
    network_alone_ms: float
    patches_per_second: float
    planned_gib: float
    allocated_gib: float
    reserved_gib: float
    first_steps_s: float

    @property
    def hours(self) -> float:
        """Return the hours of a pre-training of the default length, which has 62,500 steps."""
        return 62_500 * self.step_ms / 3.6e6

    def line(self) -> str:
        """Return the row of a Markdown table."""
        batch = f"{self.batch_size}"
        if self.patches_at_once < self.batch_size:
            batch += f" in parts of {self.patches_at_once}"
        cells = (
            self.shape, f"`{self.recipe}`", f"{self.gpu_memory_gb:g}", "yes" if self.compiled else "no", self.patch, batch,
            f"{self.step_ms:.1f}", f"{self.step_ms / self.network_alone_ms:.2f}", f"{self.patches_per_second:.0f}",
            f"{self.hours:.1f}", f"{self.planned_gib:.1f}", f"{self.allocated_gib:.1f}", f"{self.reserved_gib:.1f}",
        )  # fmt: skip
        return f"| {' | '.join(cells)} |"


HEAD = (
    "| network | recipe | `-gpu_memory` | compiled | patch | batch | ms per step | over only the network | patches/s "
    "| hours for 62,500 steps | planned GiB | allocated | reserved |\n" + 13 * "|---" + "|"
)


def batches(step: TrainingStep) -> Callable[[int], dict]:
    """Return a function from the number of a step to its batch in page-locked memory, as from the loader."""
    size, patch = step.plan.batch_size, step.plan.patch_size
    images_shown = size * (1 + step.model.uses_neighbours)
    coarse = torch.randn(images_shown, 1, *[max(2, n // 8) for n in patch])
    mode = {2: "bilinear", 3: "trilinear"}[len(patch)]
    data = torch.nn.functional.interpolate(coarse, size=patch, mode=mode)
    images = {"data": data, "positions": torch.rand(size, 3), "cases": ["generated"] * size}
    if step.device.type != "cuda":
        return lambda number: images | {"numbers": step.draws(number)}
    pinned = pin_memory(images)
    numbers = {number: pin_memory(step.draws(number)) for number in range(24)}
    return lambda number: pinned | {"numbers": numbers[number]}


def timed(run: Callable[[], object], repeats: int) -> float:
    """Return the median time of several runs, milliseconds."""
    seconds = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        began = time.perf_counter()
        run()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return 1e3 * statistics.median(seconds)


def measure(shape: str, recipe: str, gpu_memory: float | None, compiled: bool, device: torch.device) -> Measured:
    """Plan and measure a row of the table."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    fingerprint, name = SHAPES[shape]
    with tempfile.TemporaryDirectory() as folder, planned(fingerprint, name, Path(folder)) as configuration:
        step = training_step(configuration, device, recipe, gpu_memory_gb=gpu_memory, compiled=compiled)
    plan, batch, numbers = step.plan, batches(step), iter(range(24))

    def again() -> None:
        number = next(numbers)
        step(batch(number), number)

    began = time.perf_counter()
    for _ in range(8):
        again()
    torch.cuda.synchronize()
    first = time.perf_counter() - began
    allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    whole = timed(again, 9)
    run = network_alone(step, batch(0)["data"])
    run()
    alone = timed(run, 5)
    return Measured(
        shape, recipe, plan.gpu_memory_gb, compiled, "x".join(map(str, plan.patch_size)), plan.batch_size,
        plan.patches_at_once, whole, alone, 1e3 * plan.batch_size / whole, plan.memory_mixed_precision_gib,
        allocated / 2**30, reserved / 2**30, first,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("-o", dest="output", type=Path, default=Path("gpu.json"), help="JSON file to write")
    parser.add_argument("--seconds", type=float, default=300, help="start no row after this many seconds. Default: 300")
    parser.add_argument("--compiled", action="store_true", help="measure only the compiled rows")
    arguments = parser.parse_args()
    prepare_process("cuda")
    torch.backends.cudnn.benchmark = True  # As in nnU-Net's training command.
    device, began, rows = torch.device("cuda", 0), time.perf_counter(), []
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}\n{HEAD}", flush=True)
    for row in (row for row in ROWS if row[-1] or not arguments.compiled):
        if time.perf_counter() - began > arguments.seconds - (60 if row[-1] else 0):
            continue
        try:
            rows.append(measure(*row, device))
        except Exception:  # Continue with the other rows.
            traceback.print_exc()
            continue
        print(rows[-1].line(), flush=True)
        machine = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
        arguments.output.write_text(json.dumps(machine | {"rows": [asdict(r) for r in rows]}, indent=1))


if __name__ == "__main__":
    main()
