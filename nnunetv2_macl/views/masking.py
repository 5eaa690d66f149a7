"""Random masks of blocks of voxels, and standardisation of the images to restore.

Source: Xie et al., SimMIM, CVPR 2022, https://arxiv.org/abs/2111.09886, with several block sizes instead of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np
import torch
from torch import Tensor

# Minimum length of the longest axis of a block, voxels.
_SMALLEST_BLOCK = 4


def mask_block_sizes(strides: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    """Return the block sizes of masks. A block is the part of the image that corresponds to one location of an encoder map.

    Several sizes are used, because the right size depends on the structures in the image: small blocks can be filled from
    their border, and very large blocks leave no context. A block has at least 4 voxels on its longest axis.

    Args:
        strides: Total strides of the encoder stages per axis, up to the stage of the largest block.

    Returns:
        Different sizes, voxels per axis. If no stride reaches 4 voxels, only the size of the last stage.
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
    """Draw masks of whole blocks. All blocks of a patch have the same size.

    Args:
        patches: N, number of patches.
        size: Size of a patch, voxels per axis, a multiple of each block size.
        blocks: Block sizes, voxels per axis. All are equally likely.
        share: Fraction of the blocks to mask in each patch. At least one block is masked and at least one is visible.
        generator: Generator on the CPU.
        part: The patches whose masks are returned. All N masks are drawn, so that they do not depend on the part.

    Returns:
        (n, 1, *grid) bool, True where masked, with one value for each block of the smallest size; see `enlarge_mask`.
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
    """Return a mask (N, 1, *grid) enlarged to (N, 1, *size) by repeating its values. ``size`` must be a multiple of the grid."""
    for axis, voxels in enumerate(size, 2):
        mask = mask.repeat_interleave(voxels // mask.shape[axis], axis)
    return mask


def standardise(images: Tensor, channels: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Standardise some channels to mean 0 and standard deviation 1 in each image. Constant channels become 0.

    Restoration needs this for channels that nnU-Net does not normalise, because it masks voxels with 0 and gives the errors
    of all channels the same weight.

    Args:
        images: (N, C, *size).
        channels: Indices of the channels to standardise.

    Returns:
        The standardised images, (N, C, *size), and the value in the given images that became 0, (N, C, 1, ...). Without
        channels, the given images are returned without a copy.
    """
    zero = images.new_zeros(*images.shape[:2], *[1] * (images.ndim - 2))
    if not channels:
        return images, zero
    whole = images.clone()
    # Loop over the channels, because a list as an index would have to be copied to the GPU, which the CPU waits for.
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
