"""Base classes that make networks of other libraries usable in a plan of nnU-Net."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, ClassVar

import numpy as np
from torch import Tensor, nn

_AVERAGE_POOL = {2: nn.functional.avg_pool2d, 3: nn.functional.avg_pool3d}


class SegmentationOutputs(nn.Module):
    """Convert logits into the list of logits at several resolutions that nnU-Net's trainer expects with deep supervision.

    This module has no weights. It averages the logits to lower resolutions. The lowest resolution has weight 0 in nnU-Net's loss,
    so with two resolutions the loss is that of the full resolution.

    Args:
        strides: Strides as in an nnU-Net plan. There is an output after each stride but the last.
        deep_supervision: Whether all outputs are returned. nnU-Net's trainer sets this attribute of a network's ``decoder``.
    """

    def __init__(self, strides: Sequence[Sequence[int]], deep_supervision: bool) -> None:
        super().__init__()
        totals = accumulate(strides[:-1], lambda a, b: [m * n for m, n in zip(a, b, strict=True)])
        self.totals = [list(total) for total in totals]
        self.deep_supervision = deep_supervision

    def forward(self, logits: Tensor) -> Tensor | list[Tensor]:
        """Return (N, classes, *size), or with deep supervision a list of (N, classes, *size / stride), the largest first."""
        if not self.deep_supervision:
            return logits
        pool = _AVERAGE_POOL[logits.ndim - 2]
        return [pool(logits, total) if max(total) > 1 else logits for total in self.totals]


class PlannedNetwork(nn.Module):
    """A mixin that lets nnU-Net build a network of another library from a plan and train it. It must be the first base class.

    The network's weights keep their names.

    Args:
        input_channels: Number of image channels.
        num_classes: Number of segmentation outputs.
        strides: See `SegmentationOutputs`.
        deep_supervision: See `SegmentationOutputs`.
        **arguments: Further arguments of the network.

    Attributes:
        variant: Name of the network in ``nnUNetv2_macl_network``.
        axes: The numbers of axes that the network supports.
        sizes: The names of the published sizes.
        total_stride: Stride of the network's smallest map, an even number that is the same on each axis.
        channel_arguments: The network's own names of the arguments ``input_channels`` and ``num_classes``.
    """

    variant: ClassVar[str]
    axes: ClassVar[tuple[int, ...]] = (2, 3)
    sizes: ClassVar[tuple[str, ...]] = ()
    total_stride: ClassVar[int]
    channel_arguments: ClassVar[tuple[str, str]] = ("input_channels", "num_classes")

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        strides: Sequence[Sequence[int]],
        deep_supervision: bool = False,
        **arguments: Any,
    ) -> None:
        channels = dict(zip(self.channel_arguments, (input_channels, num_classes), strict=True))
        super().__init__(**channels, **arguments)
        self.decoder = SegmentationOutputs(strides, deep_supervision)

    def forward(self, images: Tensor) -> Any:
        """Return the logits of images (N, input_channels, *size), see `SegmentationOutputs`."""
        return self.decoder(super().forward(images))  # type: ignore[misc]

    @classmethod
    def planned(cls, unet: Mapping[str, Any], patch_size: Sequence[int], size: str | None) -> dict[str, Any]:
        """Return the arguments of the network that replaces a U-Net planned by nnU-Net.

        Args:
            unet: `arch_kwargs` of the U-Net.
            patch_size: Patch size of nnU-Net's plan, voxels per axis.
            size: One of `sizes`. None uses the size of the published results.

        Returns:
            JSON values. With these ``strides``, there are outputs at full and at half resolution.
        """
        axes = len(patch_size)
        return {"strides": [[1] * axes, [2] * axes, [cls.total_stride // 2] * axes]}


def whole_multiples(patch_size: Sequence[int], total: Sequence[int]) -> list[int]:
    """Return a patch size rounded to the nearest multiples of a total stride, voxels per axis."""
    return nearest_multiple(np.asarray(patch_size), np.asarray(total)).tolist()


def nearest_multiple(size: np.ndarray, step: np.ndarray) -> np.ndarray:
    """Return the multiple of a step, and not 0, that is nearest to a size on each axis (halves up)."""
    return np.maximum(np.floor(size / step + 0.5), 1).astype(int) * step
