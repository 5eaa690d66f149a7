"""Compare the dense loss with a loop over grid locations, and measure its memory."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import Row, at_least, at_most, peak_allocated, side_by_side
from nnunetv2_macl.losses import DenseContrastiveLoss, positive_mask

GIB = 2**30
_IN_A_ROW = 20


def maps(patches: int, channels: int, grid: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    dominant, auxiliary = torch.randn(2, patches, channels, grid, grid, generator=generator).to(device)
    return dominant.requires_grad_(), auxiliary.requires_grad_(), torch.rand(patches, generator=generator).to(device)


def loop(dominant: Tensor, auxiliary: Tensor, positions: Tensor, temperature: float = 0.1) -> Tensor:
    """Return the dense loss computed directly from the equations, location by location."""
    losses = []
    for row in range(dominant.shape[2]):
        for column in range(dominant.shape[3]):
            vectors = F.normalize(torch.cat((dominant[:, :, row, column], auxiliary[:, :, row, column])), dim=1)
            positives = positive_mask(positions, 0.1)
            similarities = vectors @ vectors.T / temperature
            others = similarities.masked_fill(
                torch.eye(len(vectors), dtype=torch.bool, device=vectors.device), -torch.inf
            )
            log_p = similarities - others.logsumexp(1, keepdim=True)
            losses.append((-(log_p * positives).sum(1) / positives.sum(1)).mean())
    return torch.stack(losses).mean() * temperature / 0.07


def run(device: torch.device) -> list[Row]:
    given = maps(16, 128, 32, device)
    criterion = DenseContrastiveLoss()

    def backward(loss: Tensor) -> Tensor:
        for tensor in given[:2]:
            tensor.grad = None
        loss.backward()
        return loss.detach()

    difference = (backward(criterion(*given)) - backward(loop(*given))).abs().item()
    # Repeat the fast loss, because a single run is too short to be timed well. More repetitions would take too long.
    ours, theirs = side_by_side(
        lambda: [backward(criterion(*given)) for _ in range(_IN_A_ROW)], lambda: backward(loop(*given)), repeats=3
    )
    ours /= _IN_A_ROW
    what = f"L_d of N=16, C=128, 32x32, {_IN_A_ROW} in a row, a loop over it (values differ by {difference:.0e})"
    rows = [at_least("dense loss", what, ours, theirs, "s", 100, theirs / ours)]
    if device.type == "cpu":
        many = maps(256, 128, 32, device)
        _, peak = peak_allocated(lambda: criterion(*many).backward())
        held = sum(tensor.nbytes for tensor in many[:2])
        rows.append(at_most("dense loss", "memory at N=256, C=128, 32x32", (peak + held) / GIB, 1.0, "GiB", 2.0))
    return rows
