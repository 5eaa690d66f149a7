"""The paper's downsampling, which the views and the equivariance loss use."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

# torch's name for linear interpolation, by number of spatial axes.
LINEAR_MODE = {1: "linear", 2: "bilinear", 3: "trilinear"}


def downsample(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Return maps interpolated linearly to another size, with aligned corners. This is the paper's downsampling.

    Args:
        maps: (N, C, *spatial), with one to three spatial axes.
        size: Voxels on each spatial axis of the result.

    Returns:
        (N, C, *size). Maps that already have this size are returned without a copy.

    Source: MACL section III (down).
    """
    if tuple(maps.shape[2:]) == tuple(size):
        return maps
    return F.interpolate(maps, size=tuple(size), mode=LINEAR_MODE[maps.ndim - 2], align_corners=True)
