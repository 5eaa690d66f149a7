"""U-KAN: a U-Net whose deepest stages apply Kolmogorov-Arnold layers to tokens.

Source: Li et al., U-KAN Makes Strong Backbone for Medical Image Segmentation and Generation, AAAI 2025,
https://arxiv.org/abs/2406.02918
"""

from __future__ import annotations

import math
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

# Number of channels of the last convolutional stage and of the two token stages, which the authors call C1, C2 and C3.
_WIDTHS = {"S": (64, 96, 128), "M": (128, 160, 256), "L": (256, 320, 512)}
_STAGES = 6


class KANLinear(nn.Module):
    """A Kolmogorov-Arnold layer: each output is a sum of learned functions of one input each.

    A function is w_b · SiLU(x) plus a B-spline with fixed, equally spaced knots on [-1, 1].

    Args:
        in_features, out_features: Numbers of inputs and outputs.
        grid_size: Number of intervals between the knots on [-1, 1].
        spline_order: Order of the B-splines.

    Source: Liu et al., KAN: Kolmogorov-Arnold Networks, https://arxiv.org/abs/2404.19756, Eq. 2.10 to 2.12
    """

    def __init__(self, in_features: int, out_features: int, grid_size: int = 5, spline_order: int = 3) -> None:
        super().__init__()
        self.grid_size, self.spline_order = grid_size, spline_order
        self.base = nn.Linear(in_features, out_features, bias=False)
        # The weights are small, so that a function is nearly its SiLU term before training.
        self.spline_weight = nn.Parameter(
            torch.empty(out_features, in_features, grid_size + spline_order).uniform_(-0.01, 0.01)
        )
        self.spline_scale = nn.Parameter(torch.empty(out_features, in_features))
        nn.init.kaiming_uniform_(self.spline_scale, a=math.sqrt(5))

    def forward(self, values: Tensor) -> Tensor:
        """Return the outputs: (..., in_features) -> (..., out_features)."""
        weight = (self.spline_weight * self.spline_scale[..., None]).flatten(1)
        splines = nn.functional.linear(self._splines(values).flatten(-2).to(weight.dtype), weight)
        return self.base(nn.functional.silu(values)) + splines

    def _splines(self, values: Tensor) -> Tensor:
        """Return the values of all B-splines, (..., grid_size + spline_order), by the recursion of Cox and de Boor."""
        order = self.spline_order
        # Scale the values so that the knots are whole numbers from 0 on. `order` knots are below -1.
        place = ((values + 1) * (self.grid_size / 2) + order)[..., None]
        knots = torch.arange(self.grid_size + 2 * order, device=values.device, dtype=values.dtype)
        splines = ((place >= knots) & (place < knots + 1)).to(values.dtype)
        for degree in range(1, order + 1):
            start = knots[:-degree]
            rising, falling = (place - start) * splines[..., :-1], (start + degree + 1 - place) * splines[..., 1:]
            splines = (rising + falling) / degree
        return splines


class KANBlock(nn.Module):
    """Three pairs of a Kolmogorov-Arnold layer at each location and a depthwise convolution, with a residual connection.

    Args:
        channels: C.
        norm_op, norm_op_kwargs: Norm after a convolution.

    Source: Section "Tokenized KAN Block"
    """

    def __init__(self, channels: int, norm_op: Any, norm_op_kwargs: Mapping[str, Any] | None) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.linears = nn.ModuleList(KANLinear(channels, channels) for _ in range(3))
        self.convolutions = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(channels, channels, 3, padding=1, groups=channels),
                norm_op(channels, **(norm_op_kwargs or {})) if norm_op else nn.Identity(),
                nn.ReLU(),
            )
            for _ in range(3)
        )
        self.last_norm = nn.LayerNorm(channels)

    def forward(self, maps: Tensor) -> Tensor:
        """Return the maps after the block: (N, C, H, W) -> (N, C, H, W)."""
        values = at_each_location(self.norm, maps)
        for linear, convolution in zip(self.linears, self.convolutions, strict=True):
            values = convolution(at_each_location(linear, values))
        return at_each_location(self.last_norm, maps + values)


class _PatchEmbedding(nn.Module):
    """Convert overlapping patches of edge 3 into tokens."""

    def __init__(self, below: int, channels: int, stride: Any) -> None:
        super().__init__()
        self.projection = nn.Conv2d(below, channels, 3, stride, padding=1)
        self.norm = nn.LayerNorm(channels)

    def forward(self, maps: Tensor) -> Tensor:
        return at_each_location(self.norm, self.projection(maps))


class _DecoderStage(nn.Module):
    """Convolve, upsample, add the encoder's map, and apply a `KANBlock` in the token stages."""

    def __init__(self, convolutions: nn.Module, stride: Sequence[int], block: nn.Module, *, adds: bool) -> None:
        super().__init__()
        self.convolutions, self.block, self.adds = convolutions, block, adds
        self.upsampling = nn.Upsample(scale_factor=tuple(map(float, stride)), mode="bilinear")

    def forward(self, below: Tensor, skip: Tensor) -> Tensor:
        upsampled = self.upsampling(self.convolutions(below))
        return self.block(upsampled + skip if self.adds else upsampled)


class UKAN(EncoderDecoder):
    """U-KAN in 2D: three stages of convolutions, and two token stages.

    With batch norm, the numbers of parameters equal those of the authors' implementation: 1,848,633 with 64, 96 and 128 features
    in the last three stages (size S), 6,356,689 with 128, 160 and 256 (M), and 25,359,265 with 256, 320 and 512 (L). The authors
    pool after a convolution, so the first two maps have the same channels, and the full-size map has no skip connection.

    Args:
        input_channels: Number of image channels.
        num_classes: Number of segmentation outputs.
        features_per_stage: Number of channels of each of the six encoder stages.
        strides: Stride of each encoder stage, per axis.
        deep_supervision: Whether the decoder returns a segmentation per stage.
        **layers: Norm and nonlinearity after each convolution, as `StackedConvBlocks` takes them. The default is a ReLU.

    Source: Li et al., Figure 2
    """

    sizes = tuple(_WIDTHS)

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
            return StackedConvBlocks(2, nn.Conv2d, below, list(channels), 3, 1, True, **layers)

        def block(channels: int) -> nn.Module:
            return KANBlock(channels, layers.get("norm_op"), layers.get("norm_op_kwargs"))

        encoder_stages = [
            convolutions(input_channels, widths[0], widths[0]),
            nn.MaxPool2d(tuple(steps[1])),
            *(
                nn.Sequential(convolutions(widths[n - 1], widths[n], widths[n]), nn.MaxPool2d(tuple(steps[n])))
                for n in (2, 3)
            ),
            *(
                nn.Sequential(_PatchEmbedding(widths[n - 1], widths[n], tuple(steps[n])), block(widths[n]))
                for n in (4, 5)
            ),
        ]
        decoder_stages = [
            _DecoderStage(
                convolutions(widths[n + 1], widths[n + 1], widths[n]),
                steps[n + 1],
                block(widths[n]) if n > 2 else nn.Identity(),
                adds=n > 0,
            )
            for n in (4, 3, 2, 1, 0)
        ]
        super().__init__(
            Encoder(encoder_stages, widths, steps),
            Decoder(decoder_stages, widths[-2::-1], num_classes, nn.Conv2d, deep_supervision),
        )

    @classmethod
    def planned(cls, unet: Mapping[str, Any], patch_size: Sequence[int], size: str | None) -> dict[str, Any]:
        """Return the authors' widths, and the first six strides of the U-Net."""
        last, *tokens = _WIDTHS[size or "M"]
        features = [last // 8, last // 8, last // 4, last, *tokens]
        return {"features_per_stage": features, "strides": first_strides(unet, _STAGES)} | layers_of(unet)


class UKANAdapter(EncoderDecoderAdapter):
    """Adapter of `UKAN`."""

    adapts = (UKAN,)

    @classmethod
    def examples(cls, axes: int) -> list[nn.Module]:
        network = UKAN(
            input_channels=2,
            num_classes=3,
            features_per_stage=[4, 4, 4, 8, 8, 12],
            strides=[1, [1, 2], [1, 2], 2, 2, 2],
            norm_op=nn.InstanceNorm2d,
            norm_op_kwargs={"affine": True},
            deep_supervision=True,
        )
        return [network] if axes == 2 else []
