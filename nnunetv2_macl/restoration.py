"""Restoration of hidden voxels, L_R: what a masked patch looked like, read off the partial decoder. No part of the paper.

Source: Xie et al., SimMIM, CVPR 2022, https://arxiv.org/abs/2111.09886 (a mask over the input, a linear head, a loss on what was
hidden), for any U-Net, 2D or 3D.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np
import torch
from torch import Tensor, nn

from nnunetv2_macl.losses import full_precision

_CONV = {2: nn.Conv2d, 3: nn.Conv3d}
_SMALLEST_BLOCK = 4


class RestorationHead(nn.Module):
    """Each location of a decoder map predicts its own block of voxels, linearly.

    Args:
        channels: of the decoder map.
        image_channels: of the image.
        block: voxels of the image an axis and location.
    """

    def __init__(self, channels: int, image_channels: int, block: Sequence[int]) -> None:
        super().__init__()
        self.image_channels = image_channels
        self.block = tuple(block)
        self.predict = _CONV[len(self.block)](channels, image_channels * prod(self.block), 1)

    def forward(self, maps: Tensor) -> Tensor:
        """(N, channels, *grid) -> (N, image_channels, *image)."""
        patches, grid, axes = len(maps), maps.shape[2:], len(self.block)
        blocks = self.predict(maps).view(patches, self.image_channels, *self.block, *grid)
        # grid and block by turns
        order = [axis for pair in zip(range(2 + axes, 2 + 2 * axes), range(2, 2 + axes), strict=True) for axis in pair]
        sizes = [n * b for n, b in zip(grid, self.block, strict=True)]
        return blocks.permute(0, 1, *order).reshape(patches, self.image_channels, *sizes)


def hidden_blocks(strides: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    """Sizes in which voxels are hidden together: the locations of encoder stages, from 4 voxels on.

    Several, since how large a hole must be, that its rim does not fill it, and may be, that there is something to fill it
    from, depends on the size of what is in the images.

    Args:
        strides: Total stride of each encoder stage, per axis, as far down as blocks may grow.

    Returns:
        Voxels an axis, each once; that of the last stage where none has 4.
    """
    large = [tuple(stride) for stride in strides if max(stride) >= _SMALLEST_BLOCK] or [tuple(strides[-1])]
    return list(dict.fromkeys(large))


def draw_mask(
    patches: int,
    size: Sequence[int],
    blocks: Sequence[Sequence[int]],
    share: float,
    generator: torch.Generator,
    *,
    part: slice = slice(None),
) -> Tensor:
    """Draw which voxels are hidden, in whole blocks of one size in each patch.

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
    """Repeat each value of a mask until it covers ``size``: (N, 1, *grid) -> (N, 1, *size), whole multiples of the grid."""
    for axis, voxels in enumerate(size, 2):
        mask = mask.repeat_interleave(voxels // mask.shape[axis], axis)
    return mask


def standardise(images: Tensor, channels: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Some channels at mean 0 and deviation 1 in each image, as restoring asks for; constant ones at 0.

    Args:
        images: (N, C, *size).
        channels: by number.

    Returns:
        (N, C, *size), the images themselves where there are no such channels; and what 0 is in the images, (N, C, 1, ...).
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


def restoration_loss(restored: Tensor, images: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error over the hidden voxels of each patch: (N, C, *size) twice, (N, 1, *size) -> (N,)."""
    with full_precision(images):
        squared = (restored.float() if restored.dtype != images.dtype else restored) - images
        squared = squared.square().mean(1, keepdim=True) * mask
        return squared.flatten(1).sum(1) / mask.flatten(1).sum(1)
