"""The U-Nets of dynamic-network-architectures, which nnU-Net plans, and the U-Net of the MACL paper."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet, ResidualUNet
from torch import Tensor, nn

from nnunetv2_macl.networks.base import Level, PretrainableNetwork
from nnunetv2_macl.networks.paper_unet import PaperUNet


class UNet(PretrainableNetwork):
    """Adapter of U-Nets whose decoder stages upsample, concatenate a map of the encoder, and convolve."""

    adapts = (PlainConvUNet, ResidualEncoderUNet, ResidualUNet, PaperUNet)
    names = {"encoder": "encoder", "transpconvs": "decoder.transpconvs", "stages": "decoder.stages"}
    encoder_stages = "encoder.stages"

    def __init__(self, network: nn.Module, decoder_stages: int) -> None:
        super().__init__(network, decoder_stages)
        # The annotation is needed because mypy takes attributes of an nn.Module for tensors or modules.
        encoder: Any = network.encoder
        decoder: Any = network.decoder
        total = accumulate(encoder.strides, lambda a, b: [m * n for m, n in zip(a, b, strict=True)])
        self.encoder_levels = [
            Level(channels, tuple(stride)) for channels, stride in zip(encoder.output_channels, total, strict=True)
        ]
        stages = len(self.encoder_levels)
        if not 0 <= decoder_stages < stages:
            raise ValueError(f"decoder_stages must be between 0 and {stages - 1}, got {decoder_stages}")
        self.decoder_levels = self.encoder_levels[-2 : -2 - decoder_stages : -1]
        self.patch_multiple = self.encoder_levels[-1].stride
        self.image_channels = next(encoder.parameters()).shape[1]
        # Keep this order of the modules, because the optimiser's state in checkpoints and the gradient norm depend on it.
        self.encoder = encoder
        self.transpconvs = nn.ModuleList(decoder.transpconvs[:decoder_stages])
        self.stages = nn.ModuleList(decoder.stages[:decoder_stages])

    @staticmethod
    def last_layer(network: nn.Module) -> nn.Module:
        decoder: Any = network.decoder
        return decoder.seg_layers[-1]

    @classmethod
    def examples(cls, axes: int) -> list[nn.Module]:
        conv, norm = {2: (nn.Conv2d, nn.InstanceNorm2d), 3: (nn.Conv3d, nn.InstanceNorm3d)}[axes]
        # The first axis has fewer strides, as in many plans for volumes.
        strides = [[1] * axes, [1] + [2] * (axes - 1), [2] * axes, [2] * axes]
        stages = len(strides)
        return [
            adapted(
                input_channels=2,
                n_stages=stages,
                features_per_stage=[4, 8, 12, 16],
                conv_op=conv,
                kernel_sizes=[[3] * axes] * stages,
                strides=strides,
                **{"n_blocks_per_stage" if "Residual" in adapted.__name__ else "n_conv_per_stage": [2] * stages},
                num_classes=3,
                n_conv_per_stage_decoder=[2] * (stages - 1),
                conv_bias=True,
                norm_op=norm,
                norm_op_kwargs={"eps": 1e-5, "affine": True},
                nonlin=nn.LeakyReLU,
                nonlin_kwargs={"inplace": True},
                deep_supervision=True,
            )
            for adapted in cls.adapts
        ]

    def decode(self, maps: list[Tensor], stages: int | None = None) -> list[Tensor]:
        decoded = [maps[-1]]
        for depth in range(len(self.stages) if stages is None else stages):
            upsampled = self.transpconvs[depth](decoded[-1])
            decoded.append(self.stages[depth](torch.cat((upsampled, maps[-depth - 2]), 1)))
        return decoded

    @classmethod
    def stage_differences(
        cls,
        theirs: dict[str, Any],
        ours: dict[str, Any],
        stages: tuple[tuple[str, int], tuple[str, int]],
        *,
        has_norm: bool,
    ) -> list[str]:
        part, here = stages[1]
        # Transposed convolutions have no norm.
        has_norm = has_norm and part != cls.names["transpconvs"]
        differences = super().stage_differences(theirs, ours, stages, has_norm=has_norm)
        if part == cls.encoder_stages and here > 0 and _downsampling(theirs) != _downsampling(ours):
            differences.append(f"{_downsampling(theirs)} there, {_downsampling(ours)} here")
        return differences


def _downsampling(architecture: dict[str, Any]) -> str:
    pools = str(architecture.get("network_class_name")).endswith(f".{PaperUNet.__name__}")
    return "max-pooling" if pools else "strided convolutions"
