"""Views of a few patches at a time, so that a batch of large volumes needs little memory besides its images."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

# Voxels that are changed at a time. Where each of them is read from takes 12 bytes.
VOXELS_AT_ONCE = 2**24


def parts_of(patches: int, size: Sequence[int]) -> Iterator[slice]:
    """Yield which patches of ``size`` voxels are changed at a time."""
    at_once = max(1, VOXELS_AT_ONCE // math.prod(size))
    return (slice(first, first + at_once) for first in range(0, patches, at_once))
