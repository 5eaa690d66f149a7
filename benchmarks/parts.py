"""Measure time and memory of batches that are computed in parts."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from benchmarks.measure import Row, at_most, peak_allocated, side_by_side
from benchmarks.planned import FLAT, Fingerprint, planned
from benchmarks.step import batch, training_step
from nnunetv2_macl.training.step import TrainingStep

SMALL = Fingerprint("2D", ("MR",), (1, 124, 124), (FLAT, 1.0, 1.0))
LARGE = Fingerprint("2D", ("MR",), (1, 248, 248), (FLAT, 1.0, 1.0))


def run(device: torch.device) -> list[Row]:
    few, whole, cut = _steps(SMALL, device)
    ours, theirs = side_by_side(lambda: cut(batch(cut), 0), lambda: whole(batch(whole), 0), repeats=2)
    rows = [
        at_most(
            "batch in parts", f"{_size(cut)}, N=64 in parts of 8, time over the uncut batch", ours, theirs, "s", 1.5
        )
    ]
    if device.type == "cpu":
        few, _, cut = _steps(LARGE, device)
        mib = [_peak(step) / 2**20 for step in (cut, few)]
        rows.append(at_most("batch in parts", f"{_size(cut)}, N=64 in parts of 8, memory over N=8", *mib, "MiB", 1.2))
    return rows


def _steps(fingerprint: Fingerprint, device: torch.device) -> list[TrainingStep]:
    """Return training steps with N=8, with N=64, and with N=64 in parts of 8."""
    with tempfile.TemporaryDirectory() as folder, planned(fingerprint, "2d", Path(folder)) as configuration:
        return [
            training_step(configuration, device, optimizer="sgd", batch_size=patches, patches_at_once=at_once)
            for patches, at_once in ((8, 8), (64, 64), (64, 8))
        ]


def _peak(step: TrainingStep) -> int:
    data = batch(step)
    step(data, 0)
    step.optimizer.zero_grad(set_to_none=True)
    weights_and_momentum = 2 * sum(parameter.nbytes for parameter in step.model.parameters())
    return weights_and_momentum + peak_allocated(lambda: step(data, 0))[1]


def _size(step: TrainingStep) -> str:
    return "x".join(map(str, step.plan.patch_size))
