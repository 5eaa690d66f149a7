"""Primus, the vision transformer of dynamic-network-architectures.

Source: Wald et al., Primus: Enforcing Attention Usage for 3D Medical Image Segmentation, 2025, https://arxiv.org/abs/2503.01835
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from dynamic_network_architectures.architectures import primus
from torch import Tensor, nn

from nnunetv2_macl.networks.base import Level, PretrainableNetwork
from nnunetv2_macl.networks.planned import PlannedNetwork, whole_multiples

# Channels of a token, number of transformer blocks and of attention heads, by the names in dynamic-network-architectures.
_SIZES = {"S": (396, 12, 6), "B": (792, 12, 12), "M": (864, 16, 12), "L": (1056, 24, 16)}

# The kernels that read the images: a linear patch embedding, or the first block of a convolutional one, which may be residual.
_INPUT_WEIGHTS = (
    "down_projection.proj.weight",
    "down_projection.stem.convs.0.conv.weight",
    "down_projection.stem.blocks.0.conv1.conv.weight",
    "down_projection.stem.blocks.0.skip.0.conv.weight",
)


class Primus(PlannedNetwork, primus.Primus):
    """Primus with a linear patch embedding."""

    variant = "primus"
    axes = (3,)
    sizes = tuple(_SIZES)
    total_stride = 8

    def __init__(self, *, input_shape: Sequence[int], **arguments: Any) -> None:
        super().__init__(input_shape=tuple(input_shape), patch_embed_size=(self.total_stride,) * 3, **arguments)
        self.input_shape = tuple(input_shape)

    @classmethod
    def planned(cls, unet: Mapping[str, Any], patch_size: Sequence[int], size: str | None) -> dict[str, Any]:
        channels, blocks, heads = _SIZES[size or "M"]
        return super().planned(unet, patch_size, size) | {
            "input_shape": whole_multiples(patch_size, [cls.total_stride] * 3),
            "embed_dim": channels,
            "eva_depth": blocks,
            "eva_numheads": heads,
            # These values are those of nnU-Net's own trainers for Primus.
            "drop_path_rate": 0.2,
            "scale_attn_inner": True,
            "init_values": 0.1,
        }


class PrimusV2(Primus, primus.PrimusV2):
    """Primus with a convolutional patch embedding."""

    variant = "primus_v2"


class PrimusV3(Primus, primus.PrimusV3):
    """Primus with a convolutional patch embedding whose stages are also connected to the tokens."""

    variant = "primus_v3"


class PrimusEncoder(PretrainableNetwork):
    """Adapter of Primus: the patch embedding and the transformer, which have one map.

    The decoder is not pre-trained, because its number of channels depends on the number of classes.
    """

    adapts = (Primus, PrimusV2, PrimusV3)

    def __init__(self, network: nn.Module, decoder_stages: int) -> None:
        super().__init__(network, decoder_stages)
        if decoder_stages:
            raise ValueError(f"decoder_stages must be 0, because Primus has one map, got {decoder_stages}")
        # The annotation is needed because mypy takes attributes of an nn.Module for tensors or modules.
        whole: Any = network
        self.encoder_levels = [Level(whole.embed_dim, (whole.total_stride,) * 3)]
        self.decoder_levels = []
        self.patch_multiple = self.encoder_levels[0].stride
        self.only_patch_size = whole.input_shape
        self.image_channels = next(whole.down_projection.parameters()).shape[1]
        # The encoder is a shallow copy that shares all modules and whose forward pass skips the decoder.
        self.encoder = copy.copy(network)
        self.encoder._modules = network._modules | {"up_projection": nn.Identity(), "decoder": nn.Identity()}

    @staticmethod
    def last_layer(network: nn.Module) -> nn.Module:
        return network.get_submodule("up_projection")

    @classmethod
    def examples(cls, axes: int) -> list[nn.Module]:
        if axes == 2:
            return []
        return [
            adapted(
                input_channels=2,
                num_classes=3,
                strides=[[1] * 3, [2] * 3, [4] * 3],
                embed_dim=24,
                eva_depth=2,
                eva_numheads=2,
                input_shape=(16, 16, 16),
                drop_path_rate=0.0,
                deep_supervision=True,
                **({"ch_per_level": (4, 4, 8, 8)} if adapted is PrimusV3 else {}),
            )
            for adapted in cls.adapts
        ]

    @classmethod
    def stage_strides(cls, arch_kwargs: Mapping[str, Any]) -> Sequence[Any]:
        return [[Primus.total_stride] * 3]

    @classmethod
    def part_of(cls, name: str) -> str | None:
        return None if name.startswith("up_projection.") else "encoder"

    @classmethod
    def input_weights(cls, weights: Mapping[str, Tensor]) -> list[str]:
        return [name for name in _INPUT_WEIGHTS if name in weights]

    def encode(self, images: Tensor, encoder: nn.Module | None = None) -> list[Tensor]:
        return [(self.encoder if encoder is None else encoder)(images)]

    def decode(self, maps: list[Tensor], stages: int | None = None) -> list[Tensor]:
        return maps

    def trained_weights(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return dict(self.encoder.state_dict()), {}
