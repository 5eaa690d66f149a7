"""Memory of a training step: what planning predicts against what a step on the CPU really takes.

    python -m benchmarks.memory

Kept is what autograd keeps for the backward pass and the loss, counted by storage, with weights, gradients and optimiser
state as allocated after a step. Peak is the most that torch's allocator held during a whole step.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from nnunetv2.experiment_planning.experiment_planners.residual_unets.residual_encoder_unet_planners import (
    nnUNetPlannerResEncM,
)
from torch import Tensor

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


class Memory(NamedTuple):
    """Bytes: kept for the backward pass; weights, gradients and optimiser state; the most allocated during a step."""

    activations: int
    state: int
    peak: int


def measure(configuration: Configuration, levels: Levels, recipe: Recipe, batch_size: int) -> Memory:
    """Train two real steps on the CPU and count."""
    torch.manual_seed(0)
    network = build_network(configuration, levels, recipe)
    loss = build_loss(recipe)
    optimizer = build_optimizer(network, recipe)
    small = [n // s for n, s in zip(levels.patch_size, levels.scale, strict=True)]

    def step() -> int:
        """A step as the trainer does it; returns the bytes kept for the backward pass."""
        groups = [torch.randn(batch_size, len(configuration.channel_names), *levels.patch_size) for _ in range(2)]
        shown = [x for full in groups for x in (down(full, small).clone(), full)]
        if recipe.full_size_first:
            shown[2] = groups[1].clone()
        if not network.needs_invariance:
            shown[:2] = None, None
        if not network.image_level:
            shown[2:] = None, None
        kept: list[Tensor] = []

        def keep(tensor: Tensor) -> Tensor:
            kept.append(tensor)
            return tensor

        optimizer.zero_grad(set_to_none=True)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            total = loss(network(*shown), torch.rand(batch_size, 3))["total"]
        weights = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
        activations = _bytes(tensor for tensor in kept if tensor.untyped_storage().data_ptr() not in weights)
        kept.clear()
        total.backward()
        optimizer.step()
        return activations

    step()
    held = [*network.parameters(), *_tensors(optimizer.state_dict())]
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    state = _bytes([*held, *gradients])
    before = _bytes(held)
    gradients.clear()
    optimizer.zero_grad(set_to_none=True)
    activations, peak = peak_allocated(step)
    return Memory(activations, state, before + peak)


def _tensors(state: dict) -> list[Tensor]:
    return [value for values in state["state"].values() for value in values.values() if isinstance(value, Tensor)]


def _bytes(tensors: Iterable[Tensor]) -> int:
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def compare(case: Case, folder: Path) -> tuple[MemoryEstimate, Memory, Levels]:
    """What is predicted and what is measured for a case."""
    with planned(case.fingerprint, case.configuration, folder) as configuration:
        levels = plan_levels(configuration.patch_size, configuration.strides, case.recipe)
        estimate = MemoryEstimate(configuration, levels, case.recipe)
        return estimate, measure(configuration, levels, case.recipe, case.batch_size), levels


def main() -> None:
    print(f"{'':31}{'patch':>12}{'batch':>6}  {'kept, MiB':^26}{'peak of a step, MiB':^28}")
    print(f"{'':49}  {'predicted':>9}{'measured':>9}{'ratio':>6}    {'predicted':>9}{'measured':>9}{'ratio':>6}")
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            estimate, memory, levels = compare(case, Path(folder))
        patch = "x".join(map(str, levels.patch_size))
        mib = 2**20
        kept, measured = estimate.kept(case.batch_size) / mib, (memory.activations + memory.state) / mib
        peak, peaked = estimate.gib(case.batch_size) * 1024, memory.peak / mib
        print(
            f"{case.fingerprint.name:31}{patch:>12}{case.batch_size:>6}  {kept:9.1f}{measured:9.1f}{kept / measured:6.2f}"
            f"    {peak:9.1f}{peaked:9.1f}{peak / peaked:6.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
