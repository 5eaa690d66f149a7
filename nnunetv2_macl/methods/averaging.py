"""Averaged copies of a network, without gradient: momentum encoders and teachers."""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy
from typing import TypeVar

import torch
from torch import Tensor, nn

from nnunetv2_macl.methods.base import Progress

# Voxels that pass an averaged network at a time: enough to keep a GPU busy, and a small part of what a batch of volumes takes.
_VOXELS_AT_ONCE = 2**22

Module = TypeVar("Module", bound=nn.Module)


def averaged_copy(module: Module) -> Module:
    """Return a copy that has no gradient and follows the module by `update_average`.

    The copy of a `PretrainableNetwork` is a second network that encodes and decodes.
    """
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


def rising_decay(first: float, progress: Progress) -> float:
    """Return the weight of the old average at a step. It rises from ``first`` to 1 along half a cosine over the whole run.

    Source: BYOL, Grill et al., NeurIPS 2020, https://arxiv.org/abs/2006.07733, section 3.2.
    """
    return 1 - (1 - first) * (1 + math.cos(math.pi * progress.step / progress.steps)) / 2


# This frame is left out of compiling. The network that it calls is compiled, once for the size of a chunk.
@torch.compiler.disable(recursive=False)
def encode_without_gradient(
    encode: Callable[[Tensor], tuple[Tensor, ...]], images: Tensor, *, whole: bool = False
) -> tuple[Tensor, ...]:
    """Return what a function makes of images, without gradient and a few images at a time.

    Args:
        encode: Returns maps of images, each with one row per image. It should return only the maps that are needed, because
            the other maps of a chunk then leave their memory to the next chunk.
        images: (N, C, *patch).
        whole: Whether all images pass at once. This is necessary where the maps of an image depend on the other images.
    """
    with torch.no_grad():
        parts = [encode(part) for part in ((images,) if whole else _in_chunks(images))]
    return tuple(torch.cat(maps) for maps in zip(*parts, strict=True))


def _in_chunks(images: Tensor) -> tuple[Tensor, ...]:
    return images.split(max(1, _VOXELS_AT_ONCE // math.prod(images.shape[2:])))
