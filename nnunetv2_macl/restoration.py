"""Restoration of hidden voxels, L_R: the partial decoder predicts what a masked patch looked like. It is no part of the paper.

Source: Xie et al., SimMIM, CVPR 2022, https://arxiv.org/abs/2111.09886 (a mask over the input, a linear head, a loss on what was
hidden), for any U-Net, 2D or 3D. The mask is in `nnunetv2_macl.views.masking`.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from torch import Tensor, nn

from nnunetv2_macl.losses import full_precision

_CONV = {2: nn.Conv2d, 3: nn.Conv3d}


class RestorationHead(nn.Module):
    """Predict the image from a decoder map. Each location predicts its own block of voxels, linearly.

    Args:
        channels: Channels of the decoder map.
        image_channels: Channels of the image.
        block: Voxels of the image on each axis for one location of the map.
    """

    def __init__(self, channels: int, image_channels: int, block: Sequence[int]) -> None:
        super().__init__()
        self.image_channels = image_channels
        self.block = tuple(block)
        self.predict = _CONV[len(self.block)](channels, image_channels * prod(self.block), 1)

    def forward(self, maps: Tensor) -> Tensor:
        """Return images (N, image_channels, *image) from maps (N, channels, *grid)."""
        patches, grid, axes = len(maps), maps.shape[2:], len(self.block)
        blocks = self.predict(maps).view(patches, self.image_channels, *self.block, *grid)
        # each axis of the grid before the same axis of the block
        order = [axis for pair in zip(range(2 + axes, 2 + 2 * axes), range(2, 2 + axes), strict=True) for axis in pair]
        sizes = [n * b for n, b in zip(grid, self.block, strict=True)]
        return blocks.permute(0, 1, *order).reshape(patches, self.image_channels, *sizes)


def restoration_loss(restored: Tensor, images: Tensor, mask: Tensor) -> Tensor:
    """Return the mean squared error over the hidden voxels of each patch.

    Args:
        restored: (N, C, *size), what the head predicted.
        images: (N, C, *size), what it should be.
        mask: (N, 1, *size), True where voxels were hidden. Each patch has some.

    Returns:
        (N,).
    """
    with full_precision(images):
        squared = (restored.float() if restored.dtype != images.dtype else restored) - images
        squared = squared.square().mean(1, keepdim=True) * mask
        return squared.flatten(1).sum(1) / mask.flatten(1).sum(1)
