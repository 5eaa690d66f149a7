"""Rolling-UNet: a U-Net whose deepest stages mix locations by shifting each channel by a different number of voxels.

Source: Liu et al., Rolling-Unet: Revitalizing MLP's Ability to Efficiently Extract Long-Distance Dependencies for Medical Image
Segmentation, AAAI 2024, https://doi.org/10.1609/aaai.v38i4.28173
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from dynamic_network_architectures.building_blocks.simple_conv_blocks import StackedConvBlocks
from torch import Tensor, nn

from nnunetv2_macl.networks.encoder_decoder import (
    Decoder,
    Encoder,
    EncoderDecoder,
    EncoderDecoderAdapter,
    at_each_location,
    first_strides,
    layers_of,
    per_axis,
)

_FIRST_WIDTH = {"S": 16, "M": 32, "L": 64}
_STAGES = 5


class RollingMLP(nn.Module):
    """R-MLP: shift channel c circularly by c voxels along one axis, and mix the channels at each location.

    Args:
        channels: C.
        axis: 2 or 3, an axis of (N, C, H, W).
        direction: 1 or -1, the direction of the shift.

    Source: Section "R-MLP"
    """

    def __init__(self, channels: int, axis: int, direction: int) -> None:
        super().__init__()
        self.axis, self.direction = axis, direction
        self.linear = nn.Linear(channels, channels)

    def forward(self, maps: Tensor) -> Tensor:
        """Return the mixed maps: (N, C, H, W) -> (N, C, H, W)."""
        length = maps.shape[self.axis]
        shifts = torch.arange(maps.shape[1], device=maps.device)[:, None] * self.direction
        source = (torch.arange(length, device=maps.device) - shifts) % length
        index = source.unsqueeze(2 if self.axis == 2 else 1).expand(maps.shape)
        return at_each_location(self.linear, maps.gather(self.axis, index))


class Lo2Block(nn.Module):
    """Lo2 block: long-range dependencies by rolling in two directions (DOR-MLP), local context by a separable convolution.

    Args:
        channels: C.
        norm_op, norm_op_kwargs: Norm after the convolution.

    Source: Sections "DOR-MLP" and "Lo2 Block"
    """

    def __init__(self, channels: int, norm_op: Any, norm_op_kwargs: Mapping[str, Any] | None) -> None:
        super().__init__()
        # The second pair rolls along the other diagonal.
        self.rolling = nn.ModuleList(
            nn.Sequential(RollingMLP(channels, *first), nn.GELU(), RollingMLP(channels, *second))
            for first, second in (((2, 1), (3, 1)), ((3, -1), (2, 1)))
        )
        self.rolled_norm = nn.LayerNorm(2 * channels)
        self.rolled_mix = nn.Linear(2 * channels, channels)
        self.convolution = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, groups=channels),
            nn.Conv2d(channels, channels, 1),
            nn.ReLU(),
            norm_op(channels, **(norm_op_kwargs or {})) if norm_op else nn.Identity(),
        )
        self.mix = nn.Linear(2 * channels, channels)
        self.norm = nn.LayerNorm(channels)

    def forward(self, maps: Tensor) -> Tensor:
        """Return the mixed maps: (N, C, H, W) -> (N, C, H, W)."""
        rolled = at_each_location(self.rolled_norm, torch.cat([maps + roll(maps) for roll in self.rolling], 1))
        far = maps + at_each_location(self.rolled_mix, rolled)
        mixed = at_each_location(self.mix, torch.cat((far, self.convolution(maps)), 1))
        return at_each_location(self.norm, mixed)


class FeatureIncentiveBlock(nn.Module):
    """Convolution, GELU, and a norm over the channels at each location.

    Args:
        below, channels: Number of input channels and of output channels.
    """

    def __init__(self, below: int, channels: int) -> None:
        super().__init__()
        self.projection = nn.Conv2d(below, channels, 3, padding=1)
        self.norm = nn.LayerNorm(channels)

    def forward(self, maps: Tensor) -> Tensor:
        """Return the normalised maps: (N, below, H, W) -> (N, channels, H, W)."""
        return at_each_location(self.norm, nn.functional.gelu(self.projection(maps)))


class _DecoderStage(nn.Module):
    """Reduce the channels, upsample, add the encoder's map, and apply a block."""

    def __init__(self, reduction: nn.Module, stride: Sequence[int], block: nn.Module) -> None:
        super().__init__()
        self.reduction, self.block = reduction, block
        self.upsampling = nn.Upsample(scale_factor=tuple(map(float, stride)), mode="bilinear")

    def forward(self, below: Tensor, skip: Tensor) -> Tensor:
        return self.block(self.upsampling(self.reduction(below)) + skip)


class RollingUNet(EncoderDecoder):
    """Rolling-UNet in 2D: three stages of convolutions, and two stages of Lo2 blocks.

    The number of features doubles in each stage. The sizes S, M and L have 16, 32 and 64 features in the first stage. The
    authors' implementation has 1,783,185, 7,098,401 and 28,324,929 parameters with batch norm. This network lacks 1,024, 2,048
    and 4,096 of these, which belong to unused norms. It has no dropout, as in nnU-Net's plans. The authors train with dropout
    0.1, 0.2 and 0.3 at the bottleneck.

    Args:
        input_channels: Number of image channels.
        num_classes: Number of segmentation outputs.
        features_per_stage: Number of channels of each of the five encoder stages.
        strides: Stride of each encoder stage, per axis: kernel size and stride of the max-pooling before the stage.
        deep_supervision: Whether the decoder returns a segmentation per stage.
        **layers: Norm and nonlinearity after each convolution, as `StackedConvBlocks` takes them. The default is a ReLU.

    Source: Liu et al., Figure 2
    """

    sizes = tuple(_FIRST_WIDTH)

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        features_per_stage: Sequence[int],
        strides: Sequence[Any],
        deep_supervision: bool = False,
        **layers: Any,
    ) -> None:
        layers = {"nonlin": nn.ReLU} | layers
        steps, widths = per_axis(strides, 2), list(features_per_stage)

        def convolutions(below: int, *channels: int) -> nn.Module:
            return StackedConvBlocks(len(channels), nn.Conv2d, below, list(channels), 3, 1, True, **layers)

        def block(channels: int) -> nn.Module:
            return Lo2Block(channels, layers.get("norm_op"), layers.get("norm_op_kwargs"))

        encoder_stages = [
            convolutions(input_channels, widths[0], widths[0]),
            *(
                nn.Sequential(nn.MaxPool2d(tuple(steps[n])), convolutions(widths[n - 1], widths[n], widths[n]))
                for n in (1, 2)
            ),
            *(
                nn.Sequential(
                    nn.MaxPool2d(tuple(steps[n])), FeatureIncentiveBlock(widths[n - 1], widths[n]), block(widths[n])
                )
                for n in (3, 4)
            ),
        ]
        last = max(1, widths[0] // 2)
        decoder_stages = [
            _DecoderStage(FeatureIncentiveBlock(widths[4], widths[3]), steps[4], block(widths[3])),
            _DecoderStage(convolutions(widths[3], widths[2]), steps[3], nn.Identity()),
            _DecoderStage(convolutions(widths[2], widths[2], widths[1]), steps[2], nn.Identity()),
            _DecoderStage(
                convolutions(widths[1], widths[1], widths[0]), steps[1], convolutions(widths[0], widths[0], last)
            ),
        ]
        super().__init__(
            Encoder(encoder_stages, widths, steps),
            Decoder(decoder_stages, [*widths[3:0:-1], last], num_classes, nn.Conv2d, deep_supervision),
        )

    @classmethod
    def planned(cls, unet: Mapping[str, Any], patch_size: Sequence[int], size: str | None) -> dict[str, Any]:
        """Return the first five strides of the U-Net, and widths that double from its first width, or from that of the size."""
        first = unet["features_per_stage"][0] if size is None else _FIRST_WIDTH[size]
        features = [first * 2**stage for stage in range(_STAGES)]
        return {"features_per_stage": features, "strides": first_strides(unet, _STAGES)} | layers_of(unet)


class RollingUNetAdapter(EncoderDecoderAdapter):
    """Adapter of `RollingUNet`."""

    adapts = (RollingUNet,)

    @classmethod
    def examples(cls, axes: int) -> list[nn.Module]:
        network = RollingUNet(
            input_channels=2,
            num_classes=3,
            features_per_stage=[4, 6, 8, 8, 12],
            strides=[1, [1, 2], [1, 2], 2, 2],
            norm_op=nn.InstanceNorm2d,
            norm_op_kwargs={"affine": True},
            deep_supervision=True,
        )
        return [network] if axes == 2 else []
