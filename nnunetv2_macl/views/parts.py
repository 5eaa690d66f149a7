"""Split a batch into parts, so that views of large volumes need little memory besides the images."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

# Number of voxels that are processed at once. Resampling in 3D takes 12 bytes per voxel for the coordinates.
VOXELS_AT_ONCE = 2**24


def parts_of(patches: int, size: Sequence[int]) -> Iterator[slice]:
    """Yield the slices of a batch of patches with ``size`` voxels per axis that are processed at once."""
    at_once = max(1, VOXELS_AT_ONCE // math.prod(size))
    return (slice(first, first + at_once) for first in range(0, patches, at_once))
