"""Projection heads: small networks from a map of the network to the vectors that a loss compares."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnunetv2_macl.losses import autocast_disabled

_CONV = {2: nn.Conv2d, 3: nn.Conv3d}
_BATCH_NORM = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def pool(maps: Tensor) -> Tensor:
    """Return the mean over space in at least float32: (N, C, *spatial) -> (N, C).

    In half precision, the means of instance-normalised maps would be nearly the same for all images.
    """
    return maps.flatten(2).mean(-1, dtype=torch.promote_types(maps.dtype, torch.float32))


def mlp(*widths: int, hidden_norm: bool = False, output_norm: bool = False) -> nn.Sequential:
    """Return linear layers with ReLU between them: (N, widths[0]) -> (N, widths[-1]).

    Args:
        widths: Length of the input, of each hidden vector, and of the output.
        hidden_norm: Whether batch norm comes before each ReLU.
        output_norm: Whether batch norm without scale and shift follows the last layer.
    """
    layers: list[nn.Module] = []
    for number, (before, after) in enumerate(pairwise(widths), 1):
        is_last = number == len(widths) - 1
        has_norm = output_norm if is_last else hidden_norm
        # A bias before a batch norm has no effect.
        layers.append(nn.Linear(before, after, bias=not has_norm))
        if has_norm:
            layers.append(nn.BatchNorm1d(after, affine=not is_last))
        if not is_last:
            layers.append(nn.ReLU(inplace=True))
    return nn.Sequential(*layers)


class GlobalProjectionHead(nn.Sequential):
    """Mean over space, then linear layers with ReLU between them: (N, C, *spatial) -> (N, embedding_dim).

    With its defaults and ``embedding_dim=channels`` this is the head of PCL, the "light" head of all image-level methods.

    Args:
        channels: C.
        embedding_dim: Length of the output.
        hidden: Lengths of the hidden vectors. None is one hidden vector of length C.
        batch_norm: Whether pooled features are standardised over the batch first. Instance norm gives every channel of every
            image nearly the same mean, so without batch norm all images have nearly the same embedding and nothing is learned.
        hidden_norm: Whether batch norm comes before each ReLU.
        output_norm: Whether batch norm without scale and shift follows the last layer.
    """

    def __init__(
        self,
        channels: int,
        embedding_dim: int = 128,
        *,
        hidden: Sequence[int] | None = None,
        batch_norm: bool = True,
        hidden_norm: bool = False,
        output_norm: bool = False,
    ) -> None:
        widths = (channels, *((channels,) if hidden is None else hidden), embedding_dim)
        super().__init__(
            nn.BatchNorm1d(channels) if batch_norm else nn.Identity(),
            *mlp(*widths, hidden_norm=hidden_norm, output_norm=output_norm),
        )

    def forward(self, maps: Tensor) -> Tensor:
        return super().forward(pool(maps))


class DenseProjectionHead(nn.Sequential):
    """Two blocks of convolution (size 3), batch norm and leaky ReLU: (N, in_channels, *grid) -> (N, out_channels, *grid).

    Args:
        in_channels: Number of input channels.
        out_channels: Number of output channels.
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


class DistillationHead(nn.Module):
    """Layers with batch norm and GELU, then cosine similarities to learned directions: (N, C) -> (N, outputs).

    Source: DINO, Caron et al., ICCV 2021, https://arxiv.org/abs/2104.14294, appendix C, with batch norm as in DeSD. The
    directions are the weight-normalised last layer. The input is standardised over the batch first, see `GlobalProjectionHead`.

    Args:
        channels: C.
        outputs: Number of directions.
        hidden: Length of the two hidden vectors.
        bottleneck: Length of the vectors that are compared with the directions.
    """

    def __init__(self, channels: int, outputs: int, *, hidden: int = 2048, bottleneck: int = 256) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.BatchNorm1d(channels)]
        for before in (channels, hidden):
            layers += [nn.Linear(before, hidden, bias=False), nn.BatchNorm1d(hidden), nn.GELU()]
        self.layers = nn.Sequential(*layers, nn.Linear(hidden, bottleneck))
        self.directions = nn.Linear(bottleneck, outputs, bias=False)

    def forward(self, vectors: Tensor) -> Tensor:
        compressed = self.layers(vectors)
        # Compute in float32, because half precision has too few digits for a cosine that is divided by a temperature of 0.04.
        with autocast_disabled(compressed):
            directions = F.normalize(self.directions.weight, dim=1)
            return F.linear(F.normalize(compressed.to(directions.dtype), dim=1), directions)
