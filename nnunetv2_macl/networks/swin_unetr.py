"""MONAI's Swin UNETR.

Source: Hatamizadeh et al., Swin UNETR: Swin Transformers for Semantic Segmentation of Brain Tumors in MRI Images, 2022,
https://arxiv.org/abs/2201.01266
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from monai.networks import nets
from torch import Tensor, nn

from nnunetv2_macl.networks.base import Level, PretrainableNetwork
from nnunetv2_macl.networks.planned import PlannedNetwork

# Names of the modules of each decoder stage, from the bottleneck: block of the map below, block of the skip connection, stage.
_STAGES = (
    ("encoder10", None, "decoder5"),
    (None, "encoder4", "decoder4"),
    (None, "encoder3", "decoder3"),
    (None, "encoder2", "decoder2"),
    (None, "encoder1", "decoder1"),
)
# Number of channels of the largest map for the sizes tiny, small and base. Published results are those of the base size.
_FEATURES = {"T": 12, "S": 24, "B": 48}
# The block of the last skip connection reads the images, with a convolution and a residual connection.
_OTHER_INPUT_WEIGHTS = ("encoder1.layer.conv1.conv.weight", "encoder1.layer.conv3.conv.weight")
_BLOCKS = [name for stage in _STAGES for name in stage if name]


class SwinUNETR(PlannedNetwork, nets.SwinUNETR):
    """MONAI's Swin UNETR, for nnU-Net's plans."""

    variant = "swin_unetr"
    sizes = tuple(_FEATURES)
    total_stride = 32
    channel_arguments = ("in_channels", "out_channels")

    def __init__(self, **arguments: Any) -> None:
        device = torch.empty(0).device
        # Build on the CPU, because MONAI reads values of a tensor, and tensors on the meta device have none.
        with torch.device("cpu"):
            super().__init__(**arguments)
        self.to(device)

    @classmethod
    def planned(cls, unet: Mapping[str, Any], patch_size: Sequence[int], size: str | None) -> dict[str, Any]:
        own = {"spatial_dims": len(patch_size), "feature_size": _FEATURES[size or "B"]}
        return super().planned(unet, patch_size, size) | own


class SwinUNETRStages(PretrainableNetwork):
    """Adapter of Swin UNETR: the transformer, and decoder stages with the convolutions of their skip connections.

    The first map is the image, which the last decoder stage reads.
    """

    adapts = (SwinUNETR,)
    names = {"encoder": "swinViT"} | {name: name for name in _BLOCKS}

    def __init__(self, network: nn.Module, decoder_stages: int) -> None:
        super().__init__(network, decoder_stages)
        if not 0 <= decoder_stages <= len(_STAGES):
            raise ValueError(f"decoder_stages must be between 0 and {len(_STAGES)}, got {decoder_stages}")
        # The annotation is needed because mypy takes attributes of an nn.Module for tensors or modules.
        whole: Any = network
        transformer: Any = whole.swinViT
        self.encoder = transformer
        self.normalize: bool = whole.normalize
        patch, channels = transformer.patch_size, transformer.embed_dim
        self.image_channels = transformer.patch_embed.proj.weight.shape[1]
        full_size = (1,) * len(patch)
        maps = [Level(channels * 2**n, tuple(size * 2**n for size in patch)) for n in range(len(_STAGES))]
        self.encoder_levels = [Level(self.image_channels, full_size), *maps]
        self.decoder_levels = [*maps[-2::-1], Level(channels, full_size)][:decoder_stages]
        self.patch_multiple = self.encoder_levels[-1].stride
        for stage in _STAGES[:decoder_stages]:
            for name in filter(None, stage):
                self.add_module(name, network.get_submodule(name))

    @staticmethod
    def last_layer(network: nn.Module) -> nn.Module:
        return network.get_submodule("out")

    @classmethod
    def examples(cls, axes: int) -> list[nn.Module]:
        return [
            SwinUNETR(
                input_channels=2,
                num_classes=3,
                strides=[[1] * axes, [2] * axes, [16] * axes],
                depths=(1, 1, 1, 1),
                num_heads=(1, 1, 2, 2),
                window_size=2,
                feature_size=12,
                spatial_dims=axes,
                deep_supervision=True,
            )
        ]

    @classmethod
    def stage_strides(cls, arch_kwargs: Mapping[str, Any]) -> Sequence[Any]:
        axes = arch_kwargs["spatial_dims"]
        return [[1] * axes] + [[2] * axes] * len(_STAGES)

    @classmethod
    def input_weights(cls, weights: Mapping[str, Tensor]) -> list[str]:
        return super().input_weights(weights) + [name for name in _OTHER_INPUT_WEIGHTS if name in weights]

    def encode(self, images: Tensor, encoder: nn.Module | None = None) -> list[Tensor]:
        return [images, *(self.encoder if encoder is None else encoder)(images, self.normalize)]

    def decode(self, maps: list[Tensor], stages: int | None = None) -> list[Tensor]:
        decoded = [maps[-1]]
        for depth in range(len(self.decoder_levels) if stages is None else stages):
            before, skip_block, stage = _STAGES[depth]
            read, skip = decoded[-1], maps[-depth - 2]
            if before:
                read = self.get_submodule(before)(read)
            if skip_block:
                skip = self.get_submodule(skip_block)(skip)
            decoded.append(self.get_submodule(stage)(read, skip))
        return decoded
