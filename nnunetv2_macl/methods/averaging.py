"""Averaged copies of a network, without gradient: momentum encoders and teachers."""

from __future__ import annotations

from copy import deepcopy
from math import prod

import torch
from torch import Tensor, nn

# Voxels that pass an averaged network at a time: enough to keep a GPU busy, and a small part of what a batch of volumes takes.
_VOXELS_AT_ONCE = 2**22


def averaged_copy(module: nn.Module) -> nn.Module:
    """Return a copy that has no gradient and follows the module by `update_average`."""
    return deepcopy(module).requires_grad_(False)


@torch.no_grad()
def update_average(average: nn.Module, module: nn.Module, decay: float) -> None:
    """Move an averaged copy towards its module. Buffers are copied.

    Args:
        average: What `averaged_copy` returned.
        module: What it follows.
        decay: Weight of the old average, 0 to 1.
    """
    torch._foreach_lerp_(list(average.parameters()), list(module.parameters()), 1 - decay)
    for old, new in zip(average.buffers(), module.buffers(), strict=True):
        old.copy_(new)


def in_chunks(images: Tensor) -> tuple[Tensor, ...]:
    """Cut (N, C, *patch) into parts for a pass without gradient, in which the next part uses the memory of this one again."""
    return images.split(max(1, _VOXELS_AT_ONCE // prod(images.shape[2:])))
