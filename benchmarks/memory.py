"""Memory of a training step: what planning predicts against what a step on the CPU really takes.

    python -m benchmarks.memory

Both are the most that a whole step holds: activations, weights, gradients and optimiser state.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from nnunetv2.experiment_planning.experiment_planners.residual_unets.residual_encoder_unet_planners import (
    nnUNetPlannerResEncM,
)
from torch import Tensor, nn

from benchmarks.measure import peak_allocated
from benchmarks.planned import FLAT, Fingerprint, planned
from nnunetv2_macl.building import build_loss, build_network, build_optimizer
from nnunetv2_macl.nnunet import Configuration
from nnunetv2_macl.planning.levels import Levels, plan_levels
from nnunetv2_macl.planning.memory import MemoryEstimate
from nnunetv2_macl.recipe import Recipe
from nnunetv2_macl.views import down


class Case(NamedTuple):
    """A plan to measure, at a batch that keeps it small."""

    fingerprint: Fingerprint
    configuration: str
    batch_size: int
    recipe: Recipe = Recipe()


_ADAMW, _SGD = Recipe(optimizer="adamw", own_view_weight=0.5), Recipe()
_MR = ("MR",)
CASES = (
    Case(Fingerprint("2D plain", _MR, (1, 64, 64), (FLAT, 1.0, 1.0)), "2d", 4, _ADAMW),
    Case(Fingerprint("2D ResEnc", ("MR", "MR"), (1, 128, 96), (FLAT, 1.0, 1.0), nnUNetPlannerResEncM), "2d", 4, _ADAMW),
    Case(Fingerprint("3D plain", _MR, (36, 50, 35), (1.0, 1.0, 1.0)), "3d_fullres", 2, _ADAMW),
    Case(Fingerprint("3D ResEnc", _MR, (32, 32, 32), (1.0, 1.0, 1.0), nnUNetPlannerResEncM), "3d_fullres", 2, _SGD),
    Case(Fingerprint("3D plain, anisotropic", _MR, (8, 96, 80), (10.0, 1.5, 1.5)), "3d_fullres", 2, _ADAMW),
    Case(
        Fingerprint("3D ResEnc, anisotropic", _MR, (8, 96, 80), (10.0, 1.5, 1.5), nnUNetPlannerResEncM),
        "3d_fullres",
        2,
        _ADAMW,
    ),
    Case(
        Fingerprint("2D plain, encoder only (PCL)", _MR, (1, 128, 128), (FLAT, 1.0, 1.0)),
        "2d",
        8,
        Recipe(decoder_stages=0, auxiliary_stage="bottleneck", weight_dense=0, weight_equivariance=0),
    ),
    Case(
        Fingerprint("2D plain, dense loss in chunks", _MR, (1, 32, 32), (FLAT, 1.0, 1.0)),
        "2d",
        128,
        Recipe(decoder_stages=3, auxiliary_stage=1),
    ),
    Case(
        Fingerprint("2D plain, averaged encoder", _MR, (1, 64, 64), (FLAT, 1.0, 1.0)),
        "2d",
        4,
        Recipe(auxiliary_encoder="ema", optimizer="adamw"),
    ),
    Case(
        Fingerprint("2D plain, first stage at full size", _MR, (1, 64, 64), (FLAT, 1.0, 1.0)),
        "2d",
        4,
        Recipe(training_stages=2, downsample_first_stage=False),
    ),
)


def measure(configuration: Configuration, levels: Levels, recipe: Recipe, batch_size: int) -> int:
    """Train two real steps on the CPU and return the most bytes that were allocated during a step."""
    torch.manual_seed(0)
    network = build_network(configuration, levels, recipe)
    loss = build_loss(recipe)
    optimizer = build_optimizer(network, recipe)
    small = [n // s for n, s in zip(levels.patch_size, levels.scale, strict=True)]

    def step() -> None:
        """Train a step as the trainer does."""
        images = torch.randn(batch_size, len(configuration.channel_names), *levels.patch_size)
        shown = [None] * 4
        if network.needs_invariance:
            shown[:2] = down(images, small), images
        if network.image_level:
            shown[2:] = images.clone() if recipe.full_size_first else down(images, small).clone(), images.clone()
        optimizer.zero_grad(set_to_none=True)
        loss(network(*shown), torch.rand(batch_size, 3))["total"].backward()
        optimizer.step()

    return peak_of_step(step, network, optimizer)


def peak_of_step(step: Callable[[], object], network: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Run a step twice and return the most bytes that weights, optimiser and all that it computes take in the second run."""
    step()
    held = [*network.parameters(), *_tensors(optimizer.state_dict())]
    optimizer.zero_grad(set_to_none=True)
    return _bytes(held) + peak_allocated(step)[1]


def _tensors(state: dict) -> list[Tensor]:
    return [value for values in state["state"].values() for value in values.values() if isinstance(value, Tensor)]


def _bytes(tensors: Iterable[Tensor]) -> int:
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def compare(case: Case, folder: Path) -> tuple[MemoryEstimate, int, Levels]:
    """What is predicted and what is measured for a case."""
    with planned(case.fingerprint, case.configuration, folder) as configuration:
        levels = plan_levels(configuration.patch_size, configuration.strides, case.recipe)
        estimate = MemoryEstimate(configuration, levels, case.recipe)
        return estimate, measure(configuration, levels, case.recipe, case.batch_size), levels


def main() -> None:
    print(f"{'':31}{'patch':>12}{'batch':>6}  {'peak of a step, MiB: predicted':>31}{'measured':>9}{'ratio':>6}")
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            estimate, measured, levels = compare(case, Path(folder))
        patch = "x".join(map(str, levels.patch_size))
        peak, peaked = estimate.gib(case.batch_size) * 1024, measured / 2**20
        print(
            f"{case.fingerprint.name:31}{patch:>12}{case.batch_size:>6}  {peak:31.1f}{peaked:9.1f}{peak / peaked:6.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
