"""The U-Nets of dynamic-network-architectures, which nnU-Net plans, and the U-Net of the MACL paper."""

from __future__ import annotations

from typing import Any

import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet, ResidualUNet
from torch import Tensor, nn

from nnunetv2_macl.networks.encoder_decoder import EncoderDecoderAdapter
from nnunetv2_macl.networks.paper_unet import PaperUNet


class UNet(EncoderDecoderAdapter):
    """Adapter of U-Nets whose decoder stages upsample, concatenate a map of the encoder, and convolve."""

    adapts = (PlainConvUNet, ResidualEncoderUNet, ResidualUNet, PaperUNet)
    names = {"encoder": "encoder", "transpconvs": "decoder.transpconvs", "stages": "decoder.stages"}
    stage_lists = ("transpconvs", "stages")

    transpconvs: nn.ModuleList

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
