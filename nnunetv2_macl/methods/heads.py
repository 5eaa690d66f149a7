"""Projection heads: small networks between a map of the network and what a loss compares."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_CONV = {2: nn.Conv2d, 3: nn.Conv3d}
_BATCH_NORM = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def pool(maps: Tensor) -> Tensor:
    """Return the mean over space in at least float32: (N, C, *spatial) -> (N, C).

    In half precision the means of instance-normalised maps would be nearly one number for every image.
    """
    return maps.flatten(2).mean(-1, dtype=torch.promote_types(maps.dtype, torch.float32))


class GlobalProjectionHead(nn.Sequential):
    """Mean over space, then Linear - ReLU - Linear: (N, C, *spatial) -> (N, embedding_dim).

    Args:
        channels: C.
        embedding_dim: Length of a vector.
        batch_norm: Whether pooled features are standardised over the batch first. Instance norm gives every channel of every
            image nearly the same mean, so without it the embeddings of all images are nearly one vector and nothing is learned.
    """

    def __init__(self, channels: int, embedding_dim: int = 128, *, batch_norm: bool = True) -> None:
        super().__init__(
            nn.BatchNorm1d(channels) if batch_norm else nn.Identity(),
            nn.Linear(channels, channels),
            nn.ReLU(inplace=True),
            nn.Linear(channels, embedding_dim),
        )

    def forward(self, maps: Tensor) -> Tensor:
        return super().forward(pool(maps))


class DenseProjectionHead(nn.Sequential):
    """(convolution of 3 - batch norm - leaky ReLU) twice: (N, in_channels, *grid) -> (N, out_channels, *grid).

    Args:
        in_channels: Channels of the map.
        out_channels: Channels of the result.
        axes: 2 or 3.
    """

    def __init__(self, in_channels: int, out_channels: int, axes: int) -> None:
        def block(channels: int) -> list[nn.Module]:
            return [
                _CONV[axes](channels, out_channels, 3, padding=1, bias=False),
                _BATCH_NORM[axes](out_channels),
                nn.LeakyReLU(inplace=True),
            ]

        super().__init__(*block(in_channels), *block(out_channels))
