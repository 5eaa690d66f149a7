"""Restoration of masked voxels: the partial decoder reconstructs a masked patch. This method is not from the MACL paper.

Source: Xie et al., SimMIM, CVPR 2022, https://arxiv.org/abs/2111.09886 (masked input, linear head, loss on masked voxels), here
for any network in 2D or 3D. Departures: the error is squared instead of absolute, masked voxels are 0 instead of a learned token,
and a decoder map is read instead of the deepest map.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import Any, ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from nnunetv2_macl.losses import at_least_float32, autocast_disabled
from nnunetv2_macl.methods.base import Geometry, Method, Progress, StepRandom, Views
from nnunetv2_macl.methods.branches import own_patch, plan_branches
from nnunetv2_macl.methods.config import AUTO, BranchKeys, Fraction, NotNegative
from nnunetv2_macl.networks.base import PretrainableNetwork
from nnunetv2_macl.views import enlarge_mask, mask_block_sizes, sample_mask, standardise

# Masks draw from a separate random stream, so that restoration and MACL can be trained together.
_MASKS = 5

_CONV = {2: nn.Conv2d, 3: nn.Conv3d}


class ReconstructionHead(nn.Module):
    """Predict the image from a decoder map. Each location predicts its block of voxels linearly.

    Args:
        channels: Number of channels of the decoder map.
        image_channels: Number of channels of the image.
        block: Size of the block of one location of the map, voxels of the image per axis.
    """

    def __init__(self, channels: int, image_channels: int, block: Sequence[int]) -> None:
        super().__init__()
        self.image_channels = image_channels
        self.block = tuple(block)
        self.predict = _CONV[len(self.block)](channels, image_channels * prod(self.block), 1)

    def forward(self, maps: Tensor) -> Tensor:
        """Return images (N, image_channels, *image) from maps (N, channels, *grid)."""
        patches, grid, axes = len(maps), maps.shape[2:], len(self.block)
        blocks = self.predict(maps).view(patches, self.image_channels, *self.block, *grid)
        # Put each axis of the grid before the same axis of the block, so that the reshape joins them.
        order = [axis for pair in zip(range(2 + axes, 2 + 2 * axes), range(2, 2 + axes), strict=True) for axis in pair]
        sizes = [n * b for n, b in zip(grid, self.block, strict=True)]
        return blocks.permute(0, 1, *order).reshape(patches, self.image_channels, *sizes)


def restoration_loss(restored: Tensor, images: Tensor, mask: Tensor) -> Tensor:
    """Return the mean squared error over the masked voxels of each patch.

    Args:
        restored: (N, C, *size), the prediction of the head.
        images: (N, C, *size), the target.
        mask: (N, 1, *size), True at masked voxels. Each patch has at least one.

    Returns:
        (N,).
    """
    with autocast_disabled(images):
        squared = (at_least_float32(restored) - images).square().mean(1, keepdim=True) * mask
        return squared.flatten(1).sum(1) / mask.flatten(1).sum(1)


class RestorationConfig(BranchKeys):
    """The recipe keys of restoration."""

    weight_restoration: NotNegative = Field(1.0, description="weight of the restoration loss L_R")
    restoration_share: Fraction = Field(0.6, description="fraction of the blocks of a patch that are masked")

    @model_validator(mode="after")
    def _restores_something(self) -> RestorationConfig:
        if self.weight_restoration <= 0:
            raise ValueError("weight_restoration is 0, so there is nothing to learn from. Set it above 0")
        return self


class MaskedViews(Views):
    """The masked patch, the restoration target and the mask."""

    def __init__(self, geometry: Geometry, recipe: Any, blocks: Sequence[Sequence[int]]) -> None:
        self.unnormalised, self.share = tuple(geometry.channels_without_zscore), recipe.restoration_share
        self.blocks = blocks

    def draw(self, random: StepRandom, *stream: int) -> Tensor:
        """Return the mask, (n, 1, *grid); see `sample_mask`. Each mask of a patch needs a different stream."""
        return sample_mask(
            random.batch_size,
            random.patch_size,
            self.blocks,
            self.share,
            random.generator(_MASKS, *stream),
            part=random.part,
        )

    def make(self, patches: Tensor, numbers: Tensor, progress: Progress) -> dict[str, Tensor]:
        """Return the masked patches ``masked``, the restoration target ``target``, and ``mask``, True at masked voxels.

        Masked voxels are set to 0: the mean of an image under z-score normalisation, and of the labelled foreground under CT
        normalisation. In other channels they are set to the channel's mean, and the target is standardised.
        """
        mask = enlarge_mask(numbers, patches.shape[2:])
        target, zero = standardise(patches, self.unnormalised)
        return {"masked": torch.where(mask, zero, patches), "target": target, "mask": mask}


class Restoration(Method):
    """Masks blocks of voxels, and restores them from the map of the last trained decoder stage."""

    name = "restoration"
    Config: ClassVar[type[RestorationConfig]] = RestorationConfig
    loss_labels = {"restoration": "L_R, restoration"}
    view_titles = {"target": "restoration target", "masked": "masked input"}
    couples_samples = False
    summary = "by restoration of masked voxels,"
    citations = ("Xie et al. SimMIM: A Simple Framework for Masked Image Modeling. CVPR 2022. arXiv:2111.09886",)
    tag = "masked-image-modelling"

    def __init__(self, network: PretrainableNetwork, geometry: Geometry, recipe: Any) -> None:
        super().__init__(network, geometry, recipe)
        dominant = [network.encoder_levels[-1], *network.decoder_levels][-1]
        self.restoration_head = ReconstructionHead(dominant.channels, network.image_channels, dominant.stride)
        strides = [level.stride for level in network.encoder_levels[: geometry.auxiliary_stage]]
        self.masked_views = MaskedViews(geometry, recipe, mask_block_sizes(strides))
        self.views = self.masked_views

    @classmethod
    def plan_geometry(cls, patch_size: Sequence[int], strides: Sequence[Sequence[int]], recipe: Any) -> Geometry:
        """Return nnU-Net's own patch and the stages that MACL would train."""
        geometry = plan_branches(patch_size, strides, recipe)
        if recipe.scale != AUTO:
            return geometry
        patch, deepest = own_patch(patch_size, strides)
        reason = f"one branch sees nnU-Net's own patch, a multiple of {'x'.join(map(str, deepest))}"
        return replace(geometry, scale=[1] * len(patch), patch_size=patch, reason=reason)

    @classmethod
    def weights(cls, recipe: Any) -> dict[str, float]:
        return {"restoration": recipe.weight_restoration}

    def encode(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        restored = self.restoration_head(self.network.decode(self.network.encode(views["masked"]))[-1])
        return {"restored": restored, "target": views["target"], "mask": views["mask"]}

    def losses(self, embeddings: dict[str, Tensor], positions: Tensor, progress: Progress) -> dict[str, Tensor]:
        """Return the mean squared error over the masked voxels of each patch."""
        loss = restoration_loss(embeddings["restored"], embeddings["target"], embeddings["mask"])
        return {"restoration": loss, "total": self.recipe.weight_restoration * loss}
