"""MONAI's UNETR.

Source: Hatamizadeh et al., UNETR: Transformers for 3D Medical Image Segmentation, WACV 2022, https://arxiv.org/abs/2103.10504
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from monai.networks import nets
from torch import Tensor, nn

from nnunetv2_macl.networks.base import Level, PretrainableNetwork
from nnunetv2_macl.networks.planned import PlannedNetwork, whole_multiples


class UNETR(PlannedNetwork, nets.UNETR):
    """MONAI's UNETR, for nnU-Net's plans."""

    variant = "unetr"
    total_stride = 16
    channel_arguments = ("in_channels", "out_channels")

    def __init__(self, *, img_size: Sequence[int], **arguments: Any) -> None:
        super().__init__(img_size=img_size, spatial_dims=len(img_size), **arguments)
        self.img_size = tuple(img_size)
        for name, module in self.vit.named_modules():
            # UNETR does not use this norm of MONAI's cross-attention, and DDP rejects trained weights without gradient.
            if name.endswith(".norm_cross_attn"):
                module.requires_grad_(False)

    @classmethod
    def planned(cls, unet: Mapping[str, Any], patch_size: Sequence[int], size: str | None) -> dict[str, Any]:
        shape = whole_multiples(patch_size, [cls.total_stride] * len(patch_size))
        return super().planned(unet, patch_size, size) | {"img_size": shape}


class UNETREncoder(PretrainableNetwork):
    """Adapter of UNETR: the transformer, which has one map.

    The convolutions are not pre-trained, because none of them is between the images and the last map of the transformer.
    """

    adapts = (UNETR,)
    names = {"encoder": "vit"}

    def __init__(self, network: nn.Module, decoder_stages: int) -> None:
        super().__init__(network, decoder_stages)
        if decoder_stages:
            raise ValueError(f"decoder_stages must be 0, because the transformer has one map, got {decoder_stages}")
        # The annotation is needed because mypy takes attributes of an nn.Module for tensors or modules.
        whole: Any = network
        self.encoder = whole.vit
        self.encoder_levels = [Level(whole.hidden_size, (whole.total_stride,) * len(whole.img_size))]
        self.decoder_levels = []
        self.patch_multiple = self.encoder_levels[0].stride
        self.only_patch_size = whole.img_size
        self.image_channels = next(whole.encoder1.parameters()).shape[1]

    @staticmethod
    def last_layer(network: nn.Module) -> nn.Module:
        return network.get_submodule("decoder5")

    @classmethod
    def examples(cls, axes: int) -> list[nn.Module]:
        return [
            UNETR(
                input_channels=2,
                num_classes=3,
                strides=[[1] * axes, [2] * axes, [8] * axes],
                img_size=[32] * axes,
                feature_size=4,
                hidden_size=8,
                mlp_dim=16,
                num_heads=2,
                deep_supervision=True,
            )
        ]

    @classmethod
    def stage_strides(cls, arch_kwargs: Mapping[str, Any]) -> Sequence[Any]:
        return [[UNETR.total_stride] * len(arch_kwargs["img_size"])]

    @classmethod
    def input_weights(cls, weights: Mapping[str, Tensor]) -> list[str]:
        return [name for name in ("vit.patch_embedding.patch_embeddings.weight",) if name in weights]

    def encode(self, images: Tensor, encoder: nn.Module | None = None) -> list[Tensor]:
        tokens, _ = (self.encoder if encoder is None else encoder)(images)
        grid = [length // UNETR.total_stride for length in images.shape[2:]]
        return [tokens.transpose(1, 2).unflatten(2, grid)]

    def decode(self, maps: list[Tensor], stages: int | None = None) -> list[Tensor]:
        return maps
