"""What nnU-Net gives to every network of a plan and asks of it, for networks of other libraries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, ClassVar

from torch import Tensor, nn

_AVERAGE_POOL = {2: nn.functional.avg_pool2d, 3: nn.functional.avg_pool3d}


class SegmentationOutputs(nn.Module):
    """Return logits, and with deep supervision the list of them at several resolutions that nnU-Net's trainer expects.

    It has no weights. Logits below full resolution are averages of those at full resolution. nnU-Net gives the lowest resolution
    no weight in its loss, so with two resolutions the loss is that of the segmentation alone.

    Args:
        strides: As in a nnU-Net plan. There is an output after each of them but the last.
        deep_supervision: Whether all outputs are returned. nnU-Net's trainer switches this attribute of a network's ``decoder``.
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
    """First base class of a network from another library, so that nnU-Net can build it from a plan and train it.

    The network keeps its weights and their names.

    Args:
        input_channels: Number of image channels.
        num_classes: Number of segmentation outputs.
        strides: See `SegmentationOutputs`.
        deep_supervision: See `SegmentationOutputs`.
        **arguments: Further arguments of the network.

    Attributes:
        variant: What the command calls the network that writes a plan with it.
        axes: The numbers of axes for which there is such a network.
        sizes: The names of the sizes that its source has.
        total_stride: Stride of the network's smallest map, the same on each axis, an even number.
        channel_arguments: What the network calls ``input_channels`` and ``num_classes``.
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
        """Segment (N, input_channels, *size), as `SegmentationOutputs` says."""
        return self.decoder(super().forward(images))  # type: ignore[misc]

    @classmethod
    def planned(cls, unet: Mapping[str, Any], patch_size: Sequence[int], size: str | None) -> dict[str, Any]:
        """Return the arguments of such a network in the place of a U-Net that nnU-Net has planned.

        Args:
            unet: `arch_kwargs` of the U-Net.
            patch_size: Of nnU-Net's plan, voxels per axis.
            size: One of `sizes`. None takes the one that its source reports.

        Returns:
            Plain JSON values. By ``strides``, there are outputs at full and at half resolution.
        """
        axes = len(patch_size)
        return {"strides": [[1] * axes, [2] * axes, [cls.total_stride // 2] * axes]}


def whole_multiples(patch_size: Sequence[int], total: Sequence[int]) -> list[int]:
    """Return the patch size nearest to another one that a network with this total stride takes, voxels per axis."""
    return [int(max(1, round(length / stride)) * stride) for length, stride in zip(patch_size, total, strict=True)]
