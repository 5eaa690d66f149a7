"""The pre-training network around an unchanged U-Net: shared encoder, partial decoder, projectors.

Works on any dynamic-network-architectures U-Net (an ``encoder`` that returns its skips, a ``decoder`` with ``transpconvs``
and ``stages``), 2D or 3D; knows no nnU-Net plan.

Source: MACL Figure 2 and Eq. 2-7; see `nnunetv2_macl.losses` for the reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from math import prod

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from nnunetv2_macl.restoration import RestorationHead
from nnunetv2_macl.views import hidden_blocks

_CONV = {2: nn.Conv2d, 3: nn.Conv3d}
_BATCH_NORM = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}

AUXILIARY_ENCODERS = ("shared", "ema", "independent")
# Voxels that pass the averaged encoder at a time: enough to keep a GPU busy, and a small part of what a batch of volumes takes.
_AVERAGED_VOXELS = 2**22


class InstanceProjector(nn.Sequential):
    """Mean over space, then Linear - ReLU - Linear: (N, C, *spatial) -> (N, embedding_dim).

    With ``standardise`` the pooled features are standardised over the batch first. Instance norm gives every channel of
    every image nearly the same mean, so without it the embeddings of all images are nearly one vector and nothing is learned.
    """

    def __init__(self, channels: int, embedding_dim: int = 128, *, standardise: bool = True) -> None:
        super().__init__(
            nn.BatchNorm1d(channels) if standardise else nn.Identity(),
            nn.Linear(channels, channels),
            nn.ReLU(inplace=True),
            nn.Linear(channels, embedding_dim),
        )

    def forward(self, features: Tensor) -> Tensor:
        # In half precision the means of instance-normalised maps would be nearly one number for every image.
        precise = torch.promote_types(features.dtype, torch.float32)
        return super().forward(features.flatten(2).mean(-1, dtype=precise))


class PixelProjector(nn.Sequential):
    """(convolution of 3 - batch norm - leaky ReLU) twice: (N, in_channels, *grid) -> (N, out_channels, *grid)."""

    def __init__(self, in_channels: int, out_channels: int, axes: int) -> None:
        def block(channels: int) -> list[nn.Module]:
            return [
                _CONV[axes](channels, out_channels, 3, padding=1, bias=False),
                _BATCH_NORM[axes](out_channels),
                nn.LeakyReLU(inplace=True),
            ]

        super().__init__(*block(in_channels), *block(out_channels))


class MACLNetwork(nn.Module):
    """Two branches over one U-Net: the dominant one (encoder and partial decoder), the auxiliary one (encoder).

    Holds only what is trained: the encoder, the first decoder stages, the projectors. They are the U-Net's own modules, so
    that training this trains the U-Net.

    Args:
        unet: the U-Net, as built for segmentation.
        decoder_stages: K, number of decoder stages of the dominant branch, counted from the bottleneck.
        auxiliary_stage: e, the encoder stage (1 is the first) at which the auxiliary dense map is read.
        image_level, pixel_level, feature_level, restoration: which losses will be asked for; the rest is neither built nor
            computed.
        embedding_dim: length of the image-level vectors.
        standardise: standardise pooled features over the batch, see `InstanceProjector`.
        auxiliary_encoder: ``shared`` (one encoder, gradients through both branches), ``ema`` (an average of the dominant
            encoder, no gradient; call `update_ema` after each step) or ``independent`` (its own weights).
        ema_decay: weight of the old average at each step.

    Raises:
        ValueError: an argument outside its range.
        NotImplementedError: a network that is no such U-Net.
    """

    def __init__(
        self,
        unet: nn.Module,
        *,
        decoder_stages: int,
        auxiliary_stage: int,
        image_level: bool = True,
        pixel_level: bool = True,
        feature_level: bool = True,
        restoration: bool = False,
        embedding_dim: int = 128,
        standardise: bool = True,
        auxiliary_encoder: str = "shared",
        ema_decay: float = 0.999,
    ) -> None:
        super().__init__()
        decoder = getattr(unet, "decoder", None)
        if not (hasattr(unet, "encoder") and hasattr(decoder, "transpconvs") and hasattr(decoder, "stages")):
            raise NotImplementedError(
                f"MACL needs a U-Net with encoder, decoder.transpconvs and decoder.stages; {type(unet).__name__} has not"
            )
        channels = list(unet.encoder.output_channels)
        stages = len(channels)
        if not 0 <= decoder_stages < stages:
            raise ValueError(f"decoder_stages must lie between 0 and {stages - 1}, got {decoder_stages}")
        if not stages - decoder_stages <= auxiliary_stage <= stages:
            raise ValueError(
                f"auxiliary_stage must lie between {stages - decoder_stages} and {stages}, got {auxiliary_stage}"
            )
        if auxiliary_encoder not in AUXILIARY_ENCODERS:
            raise ValueError(f"auxiliary_encoder must be one of {AUXILIARY_ENCODERS}, got {auxiliary_encoder!r}")
        if not (image_level or pixel_level or (restoration and not feature_level)):
            raise ValueError("image_level or pixel_level must be asked for, or restoration alone")
        self.auxiliary_stage = auxiliary_stage
        self.image_level, self.pixel_level, self.feature_level = image_level, pixel_level, feature_level
        self.ema_decay = ema_decay

        self.encoder = unet.encoder
        self.transpconvs = nn.ModuleList(decoder.transpconvs[:decoder_stages])
        self.decoder_stages = nn.ModuleList(decoder.stages[:decoder_stages])
        self.auxiliary_encoder = None
        if auxiliary_encoder != "shared":
            self.auxiliary_encoder = deepcopy(unet.encoder)
            if auxiliary_encoder == "ema":
                self.auxiliary_encoder.requires_grad_(False)
        self._is_ema = auxiliary_encoder == "ema"

        dominant_channels = channels[stages - decoder_stages - 1]
        axes = _axes(unet.encoder.conv_op)
        if image_level:
            self.instance_projector_dominant = InstanceProjector(
                dominant_channels, embedding_dim, standardise=standardise
            )
            self.instance_projector_auxiliary = InstanceProjector(channels[-1], embedding_dim, standardise=standardise)
        if pixel_level:
            self.pixel_projector = PixelProjector(channels[auxiliary_stage - 1], dominant_channels, axes)
        self.image_channels = next(unet.encoder.parameters()).shape[1]
        self.restoration_head: RestorationHead | None = None
        self.hidden_blocks: list[tuple[int, ...]] = []
        if restoration:
            strides = list(unet.encoder.strides)  # type: ignore[arg-type]
            block = [prod(axis) for axis in zip(*strides[: stages - decoder_stages], strict=True)]
            self.restoration_head = RestorationHead(dominant_channels, self.image_channels, block)
            self.hidden_blocks = hidden_blocks(strides[:auxiliary_stage])

    @property
    def needs_invariance(self) -> bool:
        """Whether the invariance group is used at all; it is not where only the image level is trained."""
        return self.pixel_level or self.feature_level

    @property
    def is_contrastive(self) -> bool:
        """Whether the branches are compared at all, or images are restored alone."""
        return self.image_level or self.pixel_level

    @property
    def features_vary(self) -> bool:
        """Whether `features` of a patch depend on more than the patch: batch norm or dropout in the U-Net."""
        parts = (self.encoder, self.transpconvs, self.decoder_stages)
        modules = [module for part in parts for module in part.modules()]
        return any(isinstance(m, (_BatchNorm, nn.modules.dropout._DropoutNd)) for m in modules)

    @property
    def passes_in_chunks(self) -> bool:
        """Whether the auxiliary encoder sees a few patches at a time: it has no gradient, and no patch depends on another."""
        return self._is_ema and not self.features_vary

    def forward(
        self,
        invariance_small: Tensor | None,
        invariance: Tensor | None,
        variance_small: Tensor | None,
        variance: Tensor | None,
    ) -> dict[str, Tensor]:
        """Embeddings and features by name, those that were asked for.

        Args:
            invariance_small: (N, C, *small), down(I1), for the dominant branch. None where `needs_invariance` is False.
            invariance: (N, C, *patch), I2, for the auxiliary branch. None likewise.
            variance_small: (N, C, *small), down(V1), or V1 itself, (N, C, *patch), for the dominant branch. None without the
                image level.
            variance: (N, C, *patch), V2, for the auxiliary branch. None likewise.

        Returns:
            ``global_dominant``, ``global_auxiliary``: (N, embedding_dim), from the variance group;
            ``dense_dominant``, ``dense_auxiliary``: (N, channels, *grid), from the invariance group;
            ``bottleneck_dominant``, ``bottleneck_auxiliary``: (N, channels, *bottleneck), from the invariance group.
        """
        return self.project(self.features(invariance_small, invariance, variance_small, variance))

    def features(
        self,
        invariance_small: Tensor | None,
        invariance: Tensor | None,
        variance_small: Tensor | None,
        variance: Tensor | None,
    ) -> dict[str, Tensor]:
        """What the U-Net makes of the four groups, before any projector: where nothing ties one patch to another.

        Arguments as in `forward`. Returns maps by name, each (N, channels, *spatial), for `project`.
        """
        small = [group for group in (invariance_small, variance_small) if group is not None]
        full = [group for group in (invariance, variance) if group is not None]
        patches = len(full[0])

        # one pass, unless one group is shown at full size
        same_size = len({group.shape for group in small}) == 1
        passes = [self._dominant(part) for part in ([torch.cat(small)] if same_size else small)]
        (bottleneck, decoded), (_, variance_decoded) = passes[0], passes[-1]
        dense, deepest = self._auxiliary(torch.cat(full))

        features: dict[str, Tensor] = {}
        if self.image_level:
            features["variance_dominant"] = variance_decoded[-patches:]
            features["variance_auxiliary"] = deepest[-patches:]
        if self.pixel_level:
            features["dense_dominant"] = decoded[:patches]
            features["dense_auxiliary"] = dense[:patches]
        if self.feature_level:
            features["bottleneck_dominant"] = bottleneck[:patches]
            features["bottleneck_auxiliary"] = deepest[:patches]
        return features

    def _auxiliary(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the auxiliary branch's dense map and its deepest map."""
        if self.passes_in_chunks:
            return self._averaged(images)
        skips = (self.auxiliary_encoder or self.encoder)(images)
        return skips[self.auxiliary_stage - 1], skips[-1]

    # This frame is left out of compiling; the encoder that it calls is compiled, once for the size of a chunk.
    @torch.compiler.disable(recursive=False)
    def _averaged(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return what `_auxiliary` does, a few patches at a time.

        Nothing is kept for a backward pass, so the next chunk uses the memory of this one again.
        """
        dense, deepest = [], []
        with torch.no_grad():
            for part in images.split(averaged_at_once(images.shape[2:])):
                skips = self.auxiliary_encoder(part)  # type: ignore[misc]
                dense.append(skips[self.auxiliary_stage - 1])
                deepest.append(skips[-1])
                # otherwise the large maps of this chunk would stay while the next one is computed
                del skips
        return torch.cat(dense), torch.cat(deepest)

    def project(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """From `features` of the whole batch to what `forward` returns."""
        outputs: dict[str, Tensor] = {}
        if self.image_level:
            outputs["global_dominant"] = self.instance_projector_dominant(features["variance_dominant"])
            outputs["global_auxiliary"] = self.instance_projector_auxiliary(features["variance_auxiliary"])
        if self.pixel_level:
            outputs["dense_dominant"] = features["dense_dominant"]
            outputs["dense_auxiliary"] = self.pixel_projector(features["dense_auxiliary"])
        if self.feature_level:
            outputs["bottleneck_dominant"] = features["bottleneck_dominant"]
            outputs["bottleneck_auxiliary"] = features["bottleneck_auxiliary"]
        return outputs

    def _dominant(self, images: Tensor) -> tuple[Tensor, Tensor]:
        skips = self.encoder(images)
        decoded = skips[-1]
        for depth, (transpconv, stage) in enumerate(zip(self.transpconvs, self.decoder_stages, strict=True)):
            decoded = stage(torch.cat((transpconv(decoded), skips[-depth - 2]), 1))
        return skips[-1], decoded

    def dense_features(self, images: Tensor) -> Tensor:
        """(N, C, *spatial) -> (N, channels, *grid): what the trained part of the U-Net, encoder and decoder, makes of images."""
        return self._dominant(images)[1]

    def restore(self, images: Tensor) -> Tensor:
        """(N, C, *spatial), parts of them hidden -> (N, C, *spatial), as they might be. Needs ``restoration``."""
        if self.restoration_head is None:
            raise ValueError("this network was built without restoration")
        return self.restoration_head(self.dense_features(images))

    def stages(self, images: Tensor) -> list[Tensor]:
        """(N, C, *spatial) -> what each encoder stage makes of images, the first first."""
        return list(self.encoder(images))  # type: ignore[operator]

    @torch.no_grad()
    def update_ema(self) -> None:
        """Move the averaged encoder towards the trained one; does nothing unless ``auxiliary_encoder`` is ``ema``."""
        if not self._is_ema:
            return
        averages = list(self.auxiliary_encoder.parameters())
        torch._foreach_lerp_(averages, list(self.encoder.parameters()), 1 - self.ema_decay)
        for average, buffer in zip(self.auxiliary_encoder.buffers(), self.encoder.buffers(), strict=True):
            average.copy_(buffer)

    def unet_weights(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Encoder and trained decoder weights under the names that the U-Net's own state dict has for them."""
        encoder: dict[str, Tensor] = {}
        decoder: dict[str, Tensor] = {}
        for key, value in self.state_dict().items():
            part, _, rest = key.partition(".")
            if part == "encoder":
                encoder[key] = value
            elif part == "transpconvs":
                decoder[f"decoder.transpconvs.{rest}"] = value
            elif part == "decoder_stages":
                decoder[f"decoder.stages.{rest}"] = value
        return encoder, decoder

    @torch.no_grad()
    def load_unet_weights(self, weights: dict[str, Tensor]) -> None:
        """Copy in weights by the names of `unet_weights`. A separate auxiliary encoder gets the weights of the encoder too."""
        encoder, decoder = self.unet_weights()
        own = encoder | decoder
        for key, weight in weights.items():
            own[key].copy_(weight)
        if self.auxiliary_encoder is not None:
            self.auxiliary_encoder.load_state_dict(self.encoder.state_dict())


def averaged_at_once(patch_size: Sequence[int]) -> int:
    """Return how many patches pass the averaged encoder at a time."""
    return max(1, _AVERAGED_VOXELS // prod(patch_size))


def _axes(conv_op: type[nn.Module]) -> int:
    for axes, conv in _CONV.items():
        if issubclass(conv_op, conv):
            return axes
    raise NotImplementedError(f"MACL supports 2D and 3D convolutions, got {conv_op.__name__}")
