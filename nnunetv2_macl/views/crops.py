"""Random crops of a patch, and points that two crops have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nnunetv2_macl.views.affine import resample


class Crops(NamedTuple):
    """One crop of each of N patches, in torch's coordinates: from -1 to 1 on each axis, with the last axis first.

    Attributes:
        centres: (N, A), centres of the crops in the patches.
        reaches: (N, A), distances from the centre to the edge of the crop, negative on mirrored axes.
    """

    centres: Tensor
    reaches: Tensor

    def locate(self, points: Tensor) -> Tensor:
        """Convert points (N, P, A) from the coordinates of the patches to those of the crops."""
        return (points - self.centres[:, None]) / self.reaches[:, None]


class RandomCrops:
    """Cut crops out of 2D or 3D patches at random, mirror them, and enlarge them to the size of the patch.

    A crop is inside its patch. It covers at least half of each axis, so that two crops of a patch always overlap.

    Args:
        zoom: Smallest and largest factor by which a crop is enlarged.
        mirroring: Whether each axis is mirrored with probability 1/2.

    Raises:
        ValueError: The factors are not between 1 and 2, or the larger factor is first.
    """

    def __init__(self, zoom: Sequence[float], *, mirroring: bool = True) -> None:
        if not 1 <= zoom[0] <= zoom[1] <= 2:
            raise ValueError(f"zoom must be two factors from 1 to 2, the smaller first, got {tuple(zoom)}")
        self.zoom, self.mirroring = tuple(zoom), mirroring

    def draw(self, patches: int, axes: int, generator: torch.Generator) -> Crops:
        """Draw one crop of each of N patches, from a generator on the CPU."""
        low, high = self.zoom
        reaches = 1 / (torch.rand(patches, 1, generator=generator) * (high - low) + low).expand(-1, axes)
        centres = (torch.rand(patches, axes, generator=generator) * 2 - 1) * (1 - reaches)
        # Always drawn, so that disabling mirroring does not change the other random numbers.
        mirrored = torch.rand(patches, axes, generator=generator) < 0.5
        return Crops(centres, torch.where(mirrored, -reaches, reaches) if self.mirroring else reaches)

    def draw_shared_points(self, first: Crops, second: Crops, points: int, generator: torch.Generator) -> Tensor:
        """Draw uniform points inside both crops of each patch: (N, P, A), in the coordinates of the patch."""
        low = torch.maximum(first.centres - first.reaches.abs(), second.centres - second.reaches.abs())
        high = torch.minimum(first.centres + first.reaches.abs(), second.centres + second.reaches.abs())
        share = torch.rand(len(low), points, low.shape[1], generator=generator)
        return low[:, None] + share * (high - low)[:, None]

    def apply(self, patches: Tensor, crops: Crops) -> Tensor:
        """Return the crops, (N, C, *patch), of patches (N, C, *patch)."""
        return resample(patches, torch.cat((crops.reaches.diag_embed(), crops.centres[..., None]), -1))
