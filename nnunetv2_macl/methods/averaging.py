"""Momentum encoders and teachers: copies of a network that are averaged over steps and have no gradient."""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from nnunetv2_macl.methods.base import Progress
from nnunetv2_macl.networks.base import disable_dropout

# Number of voxels that an averaged network encodes at once. This keeps a GPU busy and needs little memory besides the batch.
_VOXELS_AT_ONCE = 2**22

Module = TypeVar("Module", bound=nn.Module)


def averaged_copy(module: Module) -> Module:
    """Return a copy of a module without gradient and without dropout. `update_average` moves the copy towards the module.

    The copy of a `PretrainableNetwork` can encode and decode, too.
    """
    copy = deepcopy(module).requires_grad_(False)
    for part in copy.modules():
        disable_dropout(part)
    return copy


@torch.no_grad()
def update_average(average: nn.Module, module: nn.Module, decay: float) -> None:
    """Move the weights of an averaged copy towards those of its module, and copy the buffers.

    A batch norm in training mode keeps its buffers, because these are the statistics of the copy's own features.

    Args:
        average: The result of `averaged_copy`.
        module: The trained module.
        decay: Weight of the old average, 0 to 1.
    """
    torch._foreach_lerp_(list(average.parameters()), list(module.parameters()), 1 - decay)
    for copied, trained in zip(average.modules(), module.modules(), strict=True):
        if not (isinstance(copied, _BatchNorm) and copied.training):
            for old, new in zip(copied.buffers(recurse=False), trained.buffers(recurse=False), strict=True):
                old.copy_(new)


def rising_decay(first: float, progress: Progress) -> float:
    """Return the weight of the old average at a step, which rises from ``first`` to 1 along half a cosine over the run.

    Source: BYOL, Grill et al., NeurIPS 2020, https://arxiv.org/abs/2006.07733, section 3.2.
    """
    return 1 - (1 - first) * (1 + math.cos(math.pi * progress.step / progress.steps)) / 2


# torch.compile skips this function because the number of chunks varies. It compiles the network, once for the size of a chunk.
@torch.compiler.disable(recursive=False)
def encode_without_gradient(
    encode: Callable[[Tensor], tuple[Tensor, ...]], images: Tensor, *, whole: bool = False
) -> tuple[Tensor, ...]:
    """Encode images without gradient, a few images at a time, and return the maps.

    Args:
        encode: A function from images to maps, each with one row per image. It should return only the maps that are needed,
            so that the memory of the other maps is free for the next chunk.
        images: (N, C, *patch).
        whole: Whether to encode all images at once. Set it if the maps of an image depend on the other images.
    """
    with torch.no_grad():
        parts = [encode(part) for part in ((images,) if whole else _in_chunks(images))]
    return tuple(torch.cat(maps) for maps in zip(*parts, strict=True))


def _in_chunks(images: Tensor) -> tuple[Tensor, ...]:
    return images.split(max(1, _VOXELS_AT_ONCE // math.prod(images.shape[2:])))
