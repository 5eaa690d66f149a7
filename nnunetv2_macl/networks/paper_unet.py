"""The U-Net of the MACL paper, with the modules and parameter names of nnU-Net's own U-Nets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from dynamic_network_architectures.architectures.abstract_arch import AbstractDynamicNetworkArchitectures
from dynamic_network_architectures.building_blocks.helper import get_matching_pool_op, maybe_convert_scalar_to_list
from dynamic_network_architectures.building_blocks.plain_conv_encoder import PlainConvEncoder
from dynamic_network_architectures.building_blocks.simple_conv_blocks import StackedConvBlocks
from dynamic_network_architectures.building_blocks.unet_decoder import UNetDecoder
from dynamic_network_architectures.initialization.weight_init import InitWeights_He
from torch import Tensor, nn


class PaperUNet(AbstractDynamicNetworkArchitectures):
    """U-Net with max-pooling, and with a last encoder stage that has no norm.

    `PlainConvUNet` downsamples by strided convolutions and has norms in every stage. Everything else is the same, including the
    names of the parameters, so that weights can be transferred between the two networks.

    nnU-Net's plans name this class, so training and prediction require that nnunetv2_macl is installed.

    Args:
        input_channels: Number of image channels.
        num_classes: Number of segmentation outputs.
        strides: Stride of each encoder stage, per axis: kernel size and stride of the max-pooling before the stage.
        n_conv_per_stage_decoder: Number of convolutions of each decoder stage.
        deep_supervision: Whether the decoder returns a segmentation per stage.
        **encoder: Further arguments of `PlainConvEncoder`.

    Source: MACL, Section III; the authors' published implementation, https://github.com/stevezs315/MACL
    """

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        strides: Sequence[Any],
        n_conv_per_stage_decoder: Sequence[int],
        deep_supervision: bool = False,
        **encoder: Any,
    ) -> None:
        super().__init__()
        self.key_to_encoder = "encoder.stages"
        self.key_to_stem = "encoder.stages.0"
        self.keys_to_in_proj = ("encoder.stages.0.0.convs.0.all_modules.0", "encoder.stages.0.0.convs.0.conv")
        self.encoder = _MaxPoolingEncoder(input_channels, strides, **encoder)
        self.decoder = UNetDecoder(self.encoder, num_classes, n_conv_per_stage_decoder, deep_supervision)

    def forward(self, images: Tensor) -> Any:
        """Return the logits of images (N, input_channels, *size), or with deep supervision a list, the largest first."""
        return self.decoder(self.encoder(images))

    @staticmethod
    def initialize(module: nn.Module) -> None:
        """Initialise a convolution with He's method, as in `PlainConvUNet`. nnU-Net calls this for every module."""
        InitWeights_He(1e-2)(module)


class _MaxPoolingEncoder(PlainConvEncoder):
    def __init__(self, input_channels: int, strides: Sequence[Any], **encoder: Any) -> None:
        super().__init__(input_channels, strides=1, **encoder)
        conv_op, features = encoder["conv_op"], encoder["features_per_stage"]
        self.strides = [maybe_convert_scalar_to_list(conv_op, stride) for stride in strides]
        # PlainConvEncoder's own max-pooling is a module of the stage, which would change the names of the stage's parameters.
        pool = get_matching_pool_op(conv_op, pool_type="max")
        self.pools = nn.ModuleList(
            pool(stride, stride) if np.prod(stride) > 1 else nn.Identity() for stride in self.strides
        )
        convolutions = StackedConvBlocks(
            encoder["n_conv_per_stage"][-1],
            conv_op,
            features[-2],
            features[-1],
            encoder["kernel_sizes"][-1],
            1,
            encoder.get("conv_bias", False),
            nonlin=nn.ReLU,
            nonlin_kwargs={"inplace": True},
        )
        self.stages[-1] = nn.Sequential(convolutions)

    def forward(self, images: Tensor) -> list[Tensor]:
        skips = []
        for pool, stage in zip(self.pools, self.stages, strict=True):
            images = stage(pool(images))
            skips.append(images)
        return skips
