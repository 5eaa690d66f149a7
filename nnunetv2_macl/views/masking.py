"""Masked views: which voxels of a patch are hidden, in blocks.

Source: Xie et al., SimMIM, CVPR 2022, https://arxiv.org/abs/2111.09886, with several block sizes instead of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np
import torch
from torch import Tensor

# Shortest longest axis of a block, voxels.
_SMALLEST_BLOCK = 4


def mask_block_sizes(strides: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    """Return the sizes of the blocks in which voxels are hidden. A block is the part of the image behind one location of a map.

    Several sizes are used, because the right one depends on the structures in the image: small blocks can be filled from
    their border, and very large ones leave no context. A block has at least 4 voxels on its longest axis.

    Args:
        strides: Total stride of each encoder stage on each axis, down to the stage of the largest block.

    Returns:
        Voxels on each axis, without repetitions. Where no stage reaches 4 voxels, the size of the last stage alone.
    """
    large = [tuple(stride) for stride in strides if max(stride) >= _SMALLEST_BLOCK] or [tuple(strides[-1])]
    return list(dict.fromkeys(large))


def sample_mask(
    patches: int,
    size: Sequence[int],
    blocks: Sequence[Sequence[int]],
    share: float,
    generator: torch.Generator,
    *,
    part: slice = slice(None),
) -> Tensor:
    """Draw which voxels are hidden. They are whole blocks, which have one size within a patch.

    Args:
        patches: N, number of patches.
        size: Voxels on each axis of a patch, whole multiples of each block.
        blocks: Block sizes in voxels on each axis. Each is as likely as any other.
        share: Fraction of the blocks to hide in each patch. At least one block is hidden and one is visible.
        generator: Source of every random number, on the CPU.
        part: The patches whose masks are returned. All are drawn, so that a part gets the masks that it has in the whole.

    Returns:
        (n, 1, *grid) bool, True where hidden, one value for each block of the smallest size; see `enlarge_mask`.
    """
    chosen = [blocks[number] for number in torch.randint(len(blocks), (patches,), generator=generator)]
    grids = [_draw_grid(size, block, share, generator) for block in chosen]
    finest = np.gcd.reduce(np.asarray(blocks))
    cells = [n // b for n, b in zip(size, finest, strict=True)]
    return torch.stack([enlarge_mask(grid[None], cells)[0] for grid in grids[part]])


def _draw_grid(size: Sequence[int], block: Sequence[int], share: float, generator: torch.Generator) -> Tensor:
    grid = [n // b for n, b in zip(size, block, strict=True)]
    blocks = prod(grid)
    hidden = max(1, min(round(share * blocks), blocks - 1))
    return (torch.randperm(blocks, generator=generator) < hidden).view(1, *grid)


def enlarge_mask(mask: Tensor, size: Sequence[int]) -> Tensor:
    """Return a mask (N, 1, *grid) with each value repeated, so that it is (N, 1, *size). Sizes are multiples of the grid."""
    for axis, voxels in enumerate(size, 2):
        mask = mask.repeat_interleave(voxels // mask.shape[axis], axis)
    return mask


def standardise(images: Tensor, channels: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Standardise some channels to mean 0 and standard deviation 1 in each image. Constant channels become 0.

    Restoration hides voxels as 0 and weighs errors of all channels alike, so channels that nnU-Net does not normalise need it.

    Args:
        images: (N, C, *size).
        channels: Indices of the channels to standardise.

    Returns:
        The images, (N, C, *size), and the value of the given images that became 0, (N, C, 1, ...). Without channels, the
        given images themselves.
    """
    zero = images.new_zeros(*images.shape[:2], *[1] * (images.ndim - 2))
    if not channels:
        return images, zero
    whole = images.clone()
    # One channel at a time: a list as an index would be copied to a GPU, which has to be waited for.
    for channel in channels:
        voxels = images[:, channel].flatten(1)
        # Subtract the first voxel before averaging, so that a constant image has a deviation of exactly zero.
        first = voxels[:, :1]
        mean = (voxels - first).mean(-1, keepdim=True)
        centred = voxels - first - mean
        deviation = centred.square().mean(-1, keepdim=True).sqrt()
        whole[:, channel] = (centred / deviation.clamp_min(1e-12)).view_as(whole[:, channel])
        zero[:, channel] = (first + mean).view_as(zero[:, channel])
    return whole, zero
