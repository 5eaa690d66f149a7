"""Attention U-Net: a U-Net whose decoder weights the encoder's maps with attention gates.

Source: Oktay et al., Attention U-Net: Learning Where to Look for the Pancreas, MIDL 2018, https://arxiv.org/abs/1804.03999
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from dynamic_network_architectures.building_blocks.helper import convert_conv_op_to_dim, get_matching_pool_op
from dynamic_network_architectures.building_blocks.simple_conv_blocks import ConvDropoutNormReLU, StackedConvBlocks
from torch import Tensor, nn

from nnunetv2_macl.networks.encoder_decoder import (
    Decoder,
    Encoder,
    EncoderDecoder,
    EncoderDecoderAdapter,
    per_axis,
)


class AttentionGate(nn.Module):
    """Weight the map of a skip connection at each location: sigmoid(psi(ReLU(W_x x + W_g g))) * x.

    The gating signal g is the decoder's map after upsampling, so that both maps have one grid. Each of the three linear maps is a
    convolution of size 1 and a norm.

    Args:
        conv_op: `nn.Conv2d` or `nn.Conv3d`.
        channels: Number of channels of both maps. The gate has half as many hidden channels.
        **norm: Norm and bias of the three linear maps, as `ConvDropoutNormReLU` takes them.

    Source: Eq. 1 and 2 and Figure 2.
    """

    def __init__(self, conv_op: Any, channels: int, **norm: Any) -> None:
        super().__init__()
        between = max(1, channels // 2)
        self.skip = ConvDropoutNormReLU(conv_op, channels, between, 1, 1, **norm)
        self.gating = ConvDropoutNormReLU(conv_op, channels, between, 1, 1, **norm)
        self.psi = ConvDropoutNormReLU(conv_op, between, 1, 1, 1, nonlin=nn.Sigmoid, **norm)

    def forward(self, skip: Tensor, gating: Tensor) -> Tensor:
        """Return the weighted map, (N, channels, *size), from two maps of that shape."""
        return skip * self.psi(torch.relu(self.skip(skip) + self.gating(gating)))


class _DecoderStage(nn.Module):
    """Upsample and convolve, gate the encoder's map, concatenate both, and convolve."""

    def __init__(
        self,
        conv_op: Any,
        channels_below: int,
        channels: int,
        kernel_size: Sequence[int],
        stride: Sequence[int],
        convolutions: int,
        layers: Mapping[str, Any],
    ) -> None:
        super().__init__()
        self.upsampling = nn.Upsample(scale_factor=tuple(map(float, stride)))
        self.convolution = ConvDropoutNormReLU(conv_op, channels_below, channels, kernel_size, 1, **layers)
        norm = {key: layers[key] for key in ("conv_bias", "norm_op", "norm_op_kwargs") if key in layers}
        self.gate = AttentionGate(conv_op, channels, **norm)
        self.convolutions = StackedConvBlocks(convolutions, conv_op, 2 * channels, channels, kernel_size, 1, **layers)

    def forward(self, below: Tensor, skip: Tensor) -> Tensor:
        upsampled = self.convolution(self.upsampling(below))
        return self.convolutions(torch.cat((self.gate(skip, upsampled), upsampled), 1))


class AttentionUNet(EncoderDecoder):
    """U-Net with max-pooling, upsampling, and an attention gate in each decoder stage.

    With five stages of 64 to 1024 features, two convolutions each, biases and batch norm, the network has the reported 34.88
    million parameters.

    Args:
        input_channels: Number of image channels.
        num_classes: Number of segmentation outputs.
        n_stages: Number of encoder stages.
        features_per_stage: Number of channels of each encoder stage.
        conv_op: `nn.Conv2d` or `nn.Conv3d`.
        kernel_sizes: Kernel size of the convolutions of each encoder stage, per axis.
        strides: Stride of each encoder stage, per axis: kernel size and stride of the max-pooling before the stage.
        n_conv_per_stage: Number of convolutions of each encoder stage.
        n_conv_per_stage_decoder: Number of convolutions of each decoder stage, after the concatenation.
        deep_supervision: Whether the decoder returns a segmentation per stage.
        **layers: Bias of the convolutions, and norm, dropout and nonlinearity after each, as `StackedConvBlocks` takes them.
            The default is a bias and a ReLU.

    Source: Oktay et al., Figure 1
    """

    axes = (2, 3)

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        n_stages: int,
        features_per_stage: Sequence[int],
        conv_op: Any,
        kernel_sizes: Sequence[Any],
        strides: Sequence[Any],
        n_conv_per_stage: Sequence[int],
        n_conv_per_stage_decoder: Sequence[int],
        deep_supervision: bool = False,
        **layers: Any,
    ) -> None:
        axes = convert_conv_op_to_dim(conv_op)
        steps, kernels = per_axis(strides, axes), per_axis(kernel_sizes, axes)
        layers = {"conv_bias": True, "nonlin": nn.ReLU} | layers
        widths = [input_channels, *features_per_stage]
        pool = get_matching_pool_op(conv_op, pool_type="max")
        encoder_stages = [
            nn.Sequential(
                pool(steps[n], steps[n]) if max(steps[n]) > 1 else nn.Identity(),
                StackedConvBlocks(n_conv_per_stage[n], conv_op, widths[n], widths[n + 1], kernels[n], 1, **layers),
            )
            for n in range(n_stages)
        ]
        decoder_stages = [
            _DecoderStage(conv_op, widths[n + 2], widths[n + 1], kernels[n], steps[n + 1], convolutions, layers)
            for n, convolutions in zip(reversed(range(n_stages - 1)), n_conv_per_stage_decoder, strict=True)
        ]
        super().__init__(
            Encoder(encoder_stages, features_per_stage, steps),
            Decoder(decoder_stages, widths[-2:0:-1], num_classes, conv_op, deep_supervision),
        )

    @classmethod
    def planned(cls, unet: Mapping[str, Any], patch_size: Sequence[int], size: str | None) -> dict[str, Any]:
        """Return the U-Net's own arguments. Each stage of a residual encoder is replaced by two convolutions."""
        blocks = {"n_blocks_per_stage", "n_conv_per_stage"} & unet.keys()
        convolutions = unet["n_conv_per_stage"] if "n_conv_per_stage" in blocks else [2] * unet["n_stages"]
        return {key: value for key, value in unet.items() if key not in blocks} | {"n_conv_per_stage": convolutions}


class AttentionUNetAdapter(EncoderDecoderAdapter):
    """Adapter of `AttentionUNet`. A decoder stage includes its attention gate."""

    adapts = (AttentionUNet,)

    @classmethod
    def examples(cls, axes: int) -> list[nn.Module]:
        conv, norm = {2: (nn.Conv2d, nn.InstanceNorm2d), 3: (nn.Conv3d, nn.InstanceNorm3d)}[axes]
        # The first axis has fewer strides, as in many plans for volumes.
        strides = [[1] * axes, [1] + [2] * (axes - 1), [2] * axes, [2] * axes]
        stages = len(strides)
        return [
            AttentionUNet(
                input_channels=2,
                num_classes=3,
                n_stages=stages,
                features_per_stage=[4, 8, 12, 16],
                conv_op=conv,
                kernel_sizes=[3] * stages,
                strides=strides,
                n_conv_per_stage=[2] * stages,
                n_conv_per_stage_decoder=[2] * (stages - 1),
                norm_op=norm,
                norm_op_kwargs={"affine": True},
                deep_supervision=True,
            )
        ]
