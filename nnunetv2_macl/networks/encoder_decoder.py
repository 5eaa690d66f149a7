"""The base classes of the U-Net variants of this package: encoder, decoder, network and adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, ClassVar

from dynamic_network_architectures.architectures.abstract_arch import AbstractDynamicNetworkArchitectures
from dynamic_network_architectures.initialization.weight_init import InitWeights_He
from torch import Tensor, nn

from nnunetv2_macl.networks.base import Level, PretrainableNetwork


class Encoder(nn.Module):
    """A sequence of stages. Each stage reads the map of the stage before.

    Args:
        stages: The stages, from the image to the bottleneck.
        channels: Number of channels of the map of each stage.
        strides: Stride of each stage, per axis.
    """

    def __init__(self, stages: Sequence[nn.Module], channels: Sequence[int], strides: Sequence[Sequence[int]]) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.output_channels, self.strides = list(channels), [list(stride) for stride in strides]

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the map of each stage, the first stage first."""
        maps = [images]
        for stage in self.stages:
            maps.append(stage(maps[-1]))
        return maps[1:]


class Decoder(nn.Module):
    """A sequence of stages, which read the map of the stage before and a map of the encoder, and segmentation layers.

    Args:
        stages: The stages, from the bottleneck to the image.
        channels: Number of channels of the map of each stage.
        num_classes: Number of segmentation outputs.
        conv_op: `nn.Conv2d` or `nn.Conv3d`.
        deep_supervision: Whether each stage returns a segmentation. nnU-Net's trainer sets this attribute.
    """

    def __init__(
        self,
        stages: Sequence[nn.Module],
        channels: Sequence[int],
        num_classes: int,
        conv_op: type[nn.Module],
        deep_supervision: bool,
    ) -> None:
        super().__init__()
        self.deep_supervision = deep_supervision
        self.stages = nn.ModuleList(stages)
        # Every stage has a segmentation layer, so that networks with and without deep supervision have the same weights.
        self.seg_layers = nn.ModuleList(conv_op(width, num_classes, 1) for width in channels)

    def forward(self, maps: list[Tensor]) -> Any:
        """Return the logits, or with deep supervision a list of logits, the largest first."""
        decoded, outputs = maps[-1], []
        for number, (stage, skip) in enumerate(zip(self.stages, maps[-2::-1], strict=True)):
            decoded = stage(decoded, skip)
            if self.deep_supervision or number == len(self.stages) - 1:
                outputs.append(self.seg_layers[number](decoded))
        return outputs[::-1] if self.deep_supervision else outputs[0]


class EncoderDecoder(AbstractDynamicNetworkArchitectures):
    """A segmentation network with an encoder and a decoder, which a plan of nnU-Net names.

    Training and prediction with such a network require that nnunetv2_macl is installed.

    Attributes:
        axes: The numbers of axes that the network supports.
        sizes: The names of the published sizes.
    """

    axes: ClassVar[tuple[int, ...]] = (2,)
    sizes: ClassVar[tuple[str, ...]] = ()

    encoder: nn.Module
    decoder: nn.Module

    def __init__(self, encoder: nn.Module, decoder: nn.Module) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        # nnssl uses these attributes to find the encoder, the stem and the first convolution.
        self.key_to_encoder, self.key_to_stem = "encoder.stages", "encoder.stages.0"
        stem = next(name for name, module in encoder.named_modules() if isinstance(module, (nn.Conv2d, nn.Conv3d)))
        self.keys_to_in_proj = (f"encoder.{stem}",)

    def forward(self, images: Tensor) -> Any:
        """Return the logits of images (N, input_channels, *size), or with deep supervision a list, the largest first."""
        return self.decoder(self.encoder(images))

    @staticmethod
    def initialize(module: nn.Module) -> None:
        """Initialise a convolution with He's method, as in nnU-Net's own networks. nnU-Net calls this for every module."""
        InitWeights_He(1e-2)(module)

    @classmethod
    def planned(cls, unet: Mapping[str, Any], patch_size: Sequence[int], size: str | None) -> dict[str, Any]:
        """Return the arguments of the network that replaces a U-Net planned by nnU-Net.

        Args:
            unet: `arch_kwargs` of the U-Net.
            patch_size: Patch size of nnU-Net's plan, voxels per axis.
            size: One of `sizes`. None uses the widths of the plan, or those of the middle size.

        Returns:
            JSON values. Layers are given by name, as in nnU-Net's plans.
        """
        raise NotImplementedError


class EncoderDecoderAdapter(PretrainableNetwork):
    """Adapter of a network with an encoder and a decoder, whose stages read the map of the stage before and one of the encoder.

    Attributes:
        stage_lists: Names of the lists of modules in the decoder, with one item for each stage.
    """

    names = {"encoder": "encoder", "stages": "decoder.stages"}
    encoder_stages = "encoder.stages"
    stage_lists: ClassVar[tuple[str, ...]] = ("stages",)

    stages: nn.ModuleList

    def __init__(self, network: nn.Module, decoder_stages: int) -> None:
        super().__init__(network, decoder_stages)
        # The annotation is needed because mypy takes attributes of an nn.Module for tensors or modules.
        encoder: Any = network.encoder
        decoder: Any = network.decoder
        total = accumulate(encoder.strides, lambda a, b: [m * n for m, n in zip(a, b, strict=True)])
        self.encoder_levels = [
            Level(channels, tuple(stride)) for channels, stride in zip(encoder.output_channels, total, strict=True)
        ]
        stages = len(decoder.stages)
        if not 0 <= decoder_stages <= stages:
            raise ValueError(f"decoder_stages must be between 0 and {stages}, got {decoder_stages}")
        self.decoder_levels = [
            Level(layer.in_channels, level.stride)
            for layer, level in zip(decoder.seg_layers, self.encoder_levels[-2::-1], strict=True)
        ][:decoder_stages]
        self.patch_multiple = self.encoder_levels[-1].stride
        self.image_channels = next(encoder.parameters()).shape[1]
        # Keep this order of the modules, because the optimiser's state in checkpoints and the gradient norm depend on it.
        self.encoder = encoder
        for name in self.stage_lists:
            self.add_module(name, nn.ModuleList(getattr(decoder, name)[:decoder_stages]))

    @staticmethod
    def last_layer(network: nn.Module) -> nn.Module:
        decoder: Any = network.decoder
        return decoder.seg_layers[-1]

    def decode(self, maps: list[Tensor], stages: int | None = None) -> list[Tensor]:
        decoded = [maps[-1]]
        for stage, skip in zip(self.stages[:stages], maps[-2::-1], strict=False):
            decoded.append(stage(decoded[-1], skip))
        return decoded


def per_axis(strides: Sequence[Any], axes: int) -> list[list[int]]:
    """Return strides or kernel sizes per axis. A plan may give one number for all axes."""
    return [[value] * axes if isinstance(value, int) else list(value) for value in strides]


def first_strides(unet: Mapping[str, Any], stages: int) -> list[list[int]]:
    """Return the strides of the first stages of a planned 2D U-Net. Stages that it lacks have stride 2."""
    strides = per_axis(unet["strides"], 2)[:stages]
    return strides + [[2, 2]] * (stages - len(strides))


def at_each_location(layer: nn.Module, maps: Tensor) -> Tensor:
    """Apply a layer to the channels of maps (N, C, *size) at each location."""
    return layer(maps.movedim(1, -1)).movedim(-1, 1)


def layers_of(unet: Mapping[str, Any]) -> dict[str, Any]:
    """Return the norm and the nonlinearity of a planned U-Net."""
    return {key: unet[key] for key in ("norm_op", "norm_op_kwargs", "nonlin", "nonlin_kwargs")}
