"""UCTransNet: a U-Net with a channel transformer over all skip connections.

Source: Wang et al., UCTransNet: Rethinking the Skip Connections in U-Net from a Channel-wise Perspective with Transformer, AAAI
2022, https://arxiv.org/abs/2109.04335
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from copy import copy
from itertools import accumulate
from typing import Any

import torch
from dynamic_network_architectures.building_blocks.simple_conv_blocks import ConvDropoutNormReLU, StackedConvBlocks
from torch import Tensor, nn

from nnunetv2_macl.networks.encoder_decoder import (
    Decoder,
    Encoder,
    EncoderDecoder,
    EncoderDecoderAdapter,
    first_strides,
    layers_of,
    per_axis,
)

_STAGES = 5


class ChannelEmbedding(nn.Module):
    """Cut the map of a skip connection into patches, and add learned position embeddings.

    Args:
        channels: C.
        patch_size: Size per axis of a patch, which becomes one token.
        grid: Number of learned position embeddings per axis. They are interpolated for other numbers of patches.

    Source: Section "CCT: Channel-wise Cross Fusion Transformer", multi-scale feature embedding
    """

    def __init__(self, channels: int, patch_size: Any, grid: Sequence[int]) -> None:
        super().__init__()
        self.projection = nn.Conv2d(channels, channels, patch_size, patch_size)
        self.position_embeddings = nn.Parameter(torch.zeros(1, channels, *grid))

    def forward(self, maps: Tensor) -> Tensor:
        """Return the tokens, (N, C, *grid)."""
        tokens: Tensor = self.projection(maps)
        positions: Tensor = self.position_embeddings
        if positions.shape[2:] != tokens.shape[2:]:
            positions = nn.functional.interpolate(positions, tokens.shape[2:], mode="bilinear")
        return tokens + positions


class ChannelAttentionLayer(nn.Module):
    """Cross-attention of each scale's channels to the channels of all scales, and an MLP for each scale.

    Args:
        channels: Number of channels of each scale.
        heads: Number of attention heads, which are averaged.
        expansion: Width of the hidden layer of an MLP, as a multiple of the channels of the scale.

    Source: Eq. 1 to 4
    """

    def __init__(self, channels: Sequence[int], heads: int, expansion: int) -> None:
        super().__init__()
        every = sum(channels)
        self.heads = heads
        self.norm = nn.LayerNorm(every, eps=1e-6)
        self.key = nn.Linear(every, heads * every, bias=False)
        self.value = nn.Linear(every, heads * every, bias=False)
        self.norms = nn.ModuleList(nn.LayerNorm(width, eps=1e-6) for width in channels)
        self.queries = nn.ModuleList(nn.Linear(width, heads * width, bias=False) for width in channels)
        self.score_norm = nn.InstanceNorm2d(heads)
        self.outputs = nn.ModuleList(nn.Linear(width, width, bias=False) for width in channels)
        self.mlps = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(width, eps=1e-6),
                nn.Linear(width, expansion * width),
                nn.GELU(),
                nn.Linear(expansion * width, width),
            )
            for width in channels
        )

    def forward(self, tokens: list[Tensor]) -> list[Tensor]:
        """Return the tokens of each scale, (N, number of tokens, C), from the tokens of all scales."""
        every = self.norm(torch.cat(tokens, -1))
        key, value = self._split(self.key(every)), self._split(self.value(every))
        results = []
        # A layer of `ChannelTransformer.first` has queries only for the first scales.
        scales = zip(tokens, self.norms, self.queries, self.outputs, self.mlps, strict=False)
        for own, norm, query, output, mlp in scales:
            scores = self._split(query(norm(own))).mT @ key / math.sqrt(every.shape[-1])
            attention = self.score_norm(scores).softmax(-1)
            attended = own + output((attention @ value.mT).mean(1).mT)
            results.append(attended + mlp(attended))
        return results

    def _split(self, values: Tensor) -> Tensor:
        """Return the values of each head: (N, number of tokens, heads * C) -> (N, heads, number of tokens, C)."""
        return values.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class ChannelTransformer(nn.Module):
    """Fuse the maps of all skip connections, the deepest first.

    Args:
        channels: Number of channels of each map.
        patch_sizes: Size of a patch in each map, per axis. All maps must have the same number of patches.
        grid: Number of learned position embeddings per axis.
        n_layers, n_heads, expansion: See `ChannelAttentionLayer`.
        layers: Norm and nonlinearity.
    """

    def __init__(
        self,
        channels: Sequence[int],
        patch_sizes: Sequence[Sequence[int]],
        grid: Sequence[int],
        n_layers: int,
        n_heads: int,
        expansion: int,
        layers: Mapping[str, Any],
    ) -> None:
        super().__init__()
        self.embeddings = nn.ModuleList(
            ChannelEmbedding(width, tuple(size), grid) for width, size in zip(channels, patch_sizes, strict=True)
        )
        self.layers = nn.ModuleList(ChannelAttentionLayer(channels, n_heads, expansion) for _ in range(n_layers))
        self.norms = nn.ModuleList(nn.LayerNorm(width, eps=1e-6) for width in channels)
        self.reconstructions = nn.ModuleList(
            ConvDropoutNormReLU(nn.Conv2d, width, width, 1, 1, True, **layers) for width in channels
        )

    def forward(self, skips: list[Tensor]) -> list[Tensor]:
        """Return the fused maps, which have the sizes of the given maps."""
        embedded = [embedding(skip) for embedding, skip in zip(self.embeddings, skips, strict=True)]
        grid = embedded[0].shape[2:]
        tokens = [values.flatten(2).mT for values in embedded]
        for layer in self.layers:
            tokens = layer(tokens)
        fused = []
        for own, norm, reconstruction, skip in zip(tokens, self.norms, self.reconstructions, skips, strict=False):
            values = norm(own).mT.unflatten(2, grid)
            fused.append(skip + reconstruction(nn.functional.interpolate(values, skip.shape[2:])))
        return fused

    def first(self, maps: int) -> ChannelTransformer:
        """Return a transformer that shares the modules of this one and computes only the first fused maps."""
        part = _part(self, maps, "norms", "reconstructions")
        # The last layer reads all scales, and needs queries only for those that it computes.
        last = _part(self.layers[-1], maps, "norms", "queries", "outputs", "mlps")
        part.layers = nn.ModuleList([*self.layers[:-1], last])
        return part


def _part(module: Any, length: int, *names: str) -> Any:
    """Return a module that shares all parts of another module, but only the first items of the named lists."""
    part = copy(module)
    part._modules = dict(module._modules)
    for name in names:
        setattr(part, name, getattr(module, name)[:length])
    return part


class _DecoderStage(nn.Module):
    """Upsample, weight the channels of the skip connection by channel-wise cross-attention, concatenate, and convolve.

    Source: Section "CCA: Channel-wise Cross Attention", Eq. 5
    """

    def __init__(
        self, below: int, skip: int, channels: int, kernel_size: int, stride: Sequence[int], layers: Mapping[str, Any]
    ) -> None:
        super().__init__()
        self.upsampling = nn.Upsample(scale_factor=tuple(map(float, stride)))
        self.attention_skip = nn.Linear(skip, skip)
        self.attention_below = nn.Linear(below, skip)
        self.convolutions = StackedConvBlocks(2, nn.Conv2d, below + skip, channels, kernel_size, 1, True, **layers)

    def forward(self, below: Tensor, skip: Tensor) -> Tensor:
        upsampled = self.upsampling(below)
        means = skip.mean((2, 3)), upsampled.mean((2, 3))
        scale = torch.sigmoid((self.attention_skip(means[0]) + self.attention_below(means[1])) / 2)
        weighted = torch.relu(skip * scale[:, :, None, None])
        return self.convolutions(torch.cat((weighted, upsampled), 1))


class _Decoder(Decoder):
    def __init__(self, transformer: ChannelTransformer, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.transformer = transformer

    def forward(self, maps: list[Tensor]) -> Any:
        return super().forward([*self.transformer(maps[-2::-1])[::-1], maps[-1]])


class UCTransNet(EncoderDecoder):
    """U-Net in 2D with max-pooling, upsampling, and a channel transformer in the skip connections.

    With 64, 128, 256, 512 and 512 features, batch norm and a grid of 14 x 14 patches, the network has the 66,430,657 parameters
    of the authors' implementation. It has no dropout, as in nnU-Net's plans. The authors train with 0.1 in the transformer.

    Args:
        input_channels: Number of image channels.
        num_classes: Number of segmentation outputs.
        features_per_stage: Number of channels of each encoder stage.
        strides: Stride of each encoder stage, per axis: kernel size and stride of the max-pooling before the stage. A patch of
            the transformer is a voxel of the bottleneck.
        position_grid: Number of learned position embeddings per axis. They are interpolated for other numbers of patches.
        n_layers: Number of layers of the transformer.
        n_heads: Number of attention heads.
        expansion: Width of the hidden layer of the MLPs, as a multiple of the channels.
        deep_supervision: Whether the decoder returns a segmentation per stage.
        **layers: Norm and nonlinearity after each convolution, as `StackedConvBlocks` takes them. The default is a ReLU.

    Source: Wang et al., Figure 2
    """

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        features_per_stage: Sequence[int],
        strides: Sequence[Any],
        position_grid: Sequence[int],
        n_layers: int = 4,
        n_heads: int = 4,
        expansion: int = 4,
        deep_supervision: bool = False,
        **layers: Any,
    ) -> None:
        layers = {"nonlin": nn.ReLU} | layers
        steps = per_axis(strides, 2)
        widths = [input_channels, *features_per_stage]
        encoder_stages = [
            nn.Sequential(
                nn.MaxPool2d(tuple(step)) if max(step) > 1 else nn.Identity(),
                # As in the authors' implementation, the first stage has only one convolution.
                StackedConvBlocks(min(2, n + 1), nn.Conv2d, widths[n], widths[n + 1], 3, 1, True, **layers),
            )
            for n, step in enumerate(steps)
        ]
        # The order is from the bottleneck to the image.
        skips = list(features_per_stage[-2::-1])
        # A stage has as many channels as the next skip connection, with which it is concatenated.
        outputs = [*skips[1:], skips[-1]]
        decoder_stages = [
            _DecoderStage(below, skip, channels, 3, step, layers)
            for below, skip, channels, step in zip(
                [features_per_stage[-1], *outputs[:-1]], skips, outputs, steps[:0:-1], strict=True
            )
        ]
        patch_sizes = accumulate(steps[:0:-1], lambda a, b: [m * n for m, n in zip(a, b, strict=True)])
        transformer = ChannelTransformer(skips, list(patch_sizes), position_grid, n_layers, n_heads, expansion, layers)
        super().__init__(
            Encoder(encoder_stages, features_per_stage, steps),
            _Decoder(transformer, decoder_stages, outputs, num_classes, nn.Conv2d, deep_supervision),
        )

    @classmethod
    def planned(cls, unet: Mapping[str, Any], patch_size: Sequence[int], size: str | None) -> dict[str, Any]:
        """Return the first five stages of the U-Net. The bottleneck is as wide as the stage above, as published."""
        strides = first_strides(unet, _STAGES)
        features = list(unet["features_per_stage"])[: _STAGES - 1]
        features += [features[-1]] * (_STAGES - len(features))
        total = [math.prod(steps) for steps in zip(*strides, strict=True)]
        grid = [max(1, round(n / step)) for n, step in zip(patch_size, total, strict=True)]
        return {"features_per_stage": features, "strides": strides, "position_grid": grid} | layers_of(unet)


class UCTransNetAdapter(EncoderDecoderAdapter):
    """Adapter of `UCTransNet`, with the channel transformer.

    The transformer reads the maps of all encoder stages. Its last layer computes only the maps that the held decoder stages read.
    """

    adapts = (UCTransNet,)
    names = EncoderDecoderAdapter.names | {"transformer": "decoder.transformer"}

    def __init__(self, network: nn.Module, decoder_stages: int) -> None:
        super().__init__(network, decoder_stages)
        decoder: Any = network.decoder
        if decoder_stages:
            self.transformer = decoder.transformer.first(decoder_stages)

    @classmethod
    def examples(cls, axes: int) -> list[nn.Module]:
        network = UCTransNet(
            input_channels=2,
            num_classes=3,
            features_per_stage=[4, 8, 12, 12],
            strides=[1, [1, 2], 2, 2],
            position_grid=[2, 2],
            norm_op=nn.InstanceNorm2d,
            norm_op_kwargs={"affine": True},
            n_layers=2,
            n_heads=2,
            deep_supervision=True,
        )
        return [network] if axes == 2 else []

    def decode(self, maps: list[Tensor], stages: int | None = None) -> list[Tensor]:
        if stages == 0 or not len(self.stages):
            return [maps[-1]]
        return super().decode([*self.transformer(maps[-2::-1])[::-1], maps[-1]], stages)
