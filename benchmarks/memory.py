"""Compare the planned memory of a training step with the measured memory of a step on the CPU.

    python -m benchmarks.memory

Both numbers are the peak of activations, weights, gradients and optimiser state.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from nnunetv2.experiment_planning.experiment_planners.residual_unets.residual_encoder_unet_planners import (
    nnUNetPlannerResEncM,
)
from torch import Tensor

from benchmarks.measure import peak_allocated
from benchmarks.planned import FLAT, Fingerprint, planned
from benchmarks.step import batch, training_step
from nnunetv2_macl.planning.memory import MemoryEstimate
from nnunetv2_macl.training.step import TrainingStep


class Case(NamedTuple):
    """A plan to measure, with a small batch."""

    fingerprint: Fingerprint
    configuration: str
    batch_size: int
    recipe: str = "macl_0.1"
    settings: Mapping[str, Any] = MappingProxyType({})


_MR, _SGD = ("MR",), {"optimizer": "sgd"}
CASES = (
    Case(Fingerprint("2D plain", _MR, (1, 64, 64), (FLAT, 1.0, 1.0)), "2d", 4),
    Case(Fingerprint("2D ResEnc", ("MR", "MR"), (1, 128, 96), (FLAT, 1.0, 1.0), nnUNetPlannerResEncM), "2d", 4),
    Case(Fingerprint("3D plain", _MR, (36, 50, 35), (1.0, 1.0, 1.0)), "3d_fullres", 2),
    Case(
        Fingerprint("3D ResEnc", _MR, (32, 32, 32), (1.0, 1.0, 1.0), nnUNetPlannerResEncM),
        "3d_fullres",
        2,
        settings=_SGD,
    ),
    Case(Fingerprint("3D plain, anisotropic", _MR, (8, 96, 80), (10.0, 1.5, 1.5)), "3d_fullres", 2),
    Case(
        Fingerprint("3D ResEnc, anisotropic", _MR, (8, 96, 80), (10.0, 1.5, 1.5), nnUNetPlannerResEncM),
        "3d_fullres",
        2,
    ),
    Case(
        Fingerprint("2D plain, encoder only (PCL)", _MR, (1, 128, 128), (FLAT, 1.0, 1.0)),
        "2d",
        8,
        settings=_SGD
        | {"decoder_stages": 0, "auxiliary_stage": "bottleneck", "weight_dense": 0.0, "weight_equivariance": 0.0},
    ),
    Case(
        Fingerprint("2D plain, dense loss in chunks", _MR, (1, 32, 32), (FLAT, 1.0, 1.0)),
        "2d",
        128,
        settings=_SGD | {"decoder_stages": 3, "auxiliary_stage": 1},
    ),
    Case(
        Fingerprint("2D plain, averaged encoder", _MR, (1, 64, 64), (FLAT, 1.0, 1.0)),
        "2d",
        4,
        settings={"auxiliary_encoder": "ema"},
    ),
    Case(
        Fingerprint("2D plain, first stage at full size", _MR, (1, 64, 64), (FLAT, 1.0, 1.0)),
        "2d",
        4,
        settings=_SGD | {"training_stages": 2, "downsample_first_stage": False},
    ),
    Case(Fingerprint("2D plain, restoration", _MR, (1, 64, 64), (FLAT, 1.0, 1.0)), "2d", 4, "restore"),
    Case(Fingerprint("2D plain, both methods", _MR, (1, 64, 64), (FLAT, 1.0, 1.0)), "2d", 4, "macl"),
)


def measure(step: TrainingStep, *, mixed_precision: bool = False) -> int:
    """Train two steps on the CPU and return the peak memory of the second step, bytes."""
    data = batch(step)

    def train(number: int) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed_precision):
            step(data, number)

    train(0)
    held = [*step.model.parameters(), *_tensors(step.optimizer.state_dict())]
    step.optimizer.zero_grad(set_to_none=True)
    return _bytes(held) + data["data"].nbytes + peak_allocated(lambda: train(1))[1]


def _tensors(state: dict) -> list[Tensor]:
    return [value for values in state["state"].values() for value in values.values() if isinstance(value, Tensor)]


def _bytes(tensors: Iterable[Tensor]) -> int:
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def compare(case: Case, folder: Path) -> tuple[MemoryEstimate, int, list[int]]:
    """Return the predicted memory of a case, the measured memory in bytes, and the patch size."""
    with planned(case.fingerprint, case.configuration, folder) as configuration:
        settings = {"batch_size": case.batch_size, "patches_at_once": case.batch_size} | case.settings
        step = training_step(configuration, torch.device("cpu"), case.recipe, **settings)
        estimate = MemoryEstimate(configuration, step.plan.geometry, step.recipe)
        return estimate, measure(step), step.plan.patch_size


def main() -> None:
    print(f"{'':31}{'patch':>12}{'batch':>6}  {'peak of a step, MiB: predicted':>31}{'measured':>9}{'ratio':>6}")
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            estimate, measured, patch_size = compare(case, Path(folder))
        patch = "x".join(map(str, patch_size))
        peak, peaked = estimate.gib(case.batch_size) * 1024, measured / 2**20
        print(
            f"{case.fingerprint.name:31}{patch:>12}{case.batch_size:>6}  {peak:31.1f}{peaked:9.1f}{peak / peaked:6.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
