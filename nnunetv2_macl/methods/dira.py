"""DiRA: contrast of whole images, restoration of the whole patch by the full decoder, and an adversary of the restored patch.

Source: Haghighi et al., CVPR 2022, https://arxiv.org/abs/2204.10437, Eq. 1 to 4, on MoCo v2. The learning rate of the adversary
does not decay, as published. Departures: the restored patch passes no sigmoid, because nnU-Net's images have no fixed range.
Distortions act on blocks of the image, one per voxel of the bottleneck. One optimiser trains network and adversary together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from math import prod
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call

from nnunetv2_macl.losses import at_least_float32
from nnunetv2_macl.methods.base import Geometry, Progress, StepRandom, Views
from nnunetv2_macl.methods.branches import plan_one_branch
from nnunetv2_macl.methods.config import AUTO, Count, Fraction, Positive
from nnunetv2_macl.methods.image_level import TwoViews
from nnunetv2_macl.methods.moco import MoCo, MoCoConfig
from nnunetv2_macl.methods.restoration import ReconstructionHead
from nnunetv2_macl.networks.base import PretrainableNetwork
from nnunetv2_macl.views import enlarge_mask, standardise

# Distortions and views draw from separate random streams.
_DISTORTION_STREAM = 8
# Channels of the adversary's layers, as multiples of those of the first layer.
_ADVERSARY_WIDTHS = (1, 2, 4, 8)
# The adversary does not downsample an axis with fewer voxels.
_SMALLEST_AXIS = 8

_CONV = {2: nn.Conv2d, 3: nn.Conv3d}
_INSTANCE_NORM = {2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}


class PatchAdversary(nn.Sequential):
    """Score each location of an image as real or restored: (N, C, *size) -> (N, 1, *locations).

    Args:
        image_channels: C.
        size: Size of an image, voxels per axis.
        width: Channels of the first layer.
    """

    def __init__(self, image_channels: int, size: Sequence[int], width: int = 64) -> None:
        left = list(size)
        conv: Any = _CONV[len(size)]
        layers: list[nn.Module] = []
        for before, after in pairwise((image_channels, *(width * times for times in _ADVERSARY_WIDTHS))):
            is_last = after == width * _ADVERSARY_WIDTHS[-1]
            stride = [1 if is_last or n < _SMALLEST_AXIS else 2 for n in left]
            left = [-(-n // step) for n, step in zip(left, stride, strict=True)]
            has_norm = bool(layers)
            layers.append(conv(before, after, 3, stride, padding=1, bias=not has_norm))
            if has_norm:
                layers.append(_INSTANCE_NORM[len(size)](after))
            layers.append(nn.LeakyReLU(0.2))
        super().__init__(*layers, conv(width * _ADVERSARY_WIDTHS[-1], 1, 3, padding=1))

    def error(self, images: Tensor, label: float, *, fixed: bool = False) -> Tensor:
        """Return the mean squared difference between the scores and a label, (N,).

        Args:
            images: (N, C, *size).
            label: 1 for real, 0 for restored.
            fixed: Whether only the images get a gradient, and not the adversary.
        """
        if fixed:
            judged = functional_call(self, {name: weight.detach() for name, weight in self.named_parameters()}, images)
        else:
            judged = self(images)
        return (at_least_float32(judged) - label).square().flatten(1).mean(1)


class DiRAConfig(MoCoConfig):
    """The recipe keys of DiRA."""

    weight_contrast: Positive = Field(1.0, description="weight of the contrast with the queue")
    weight_restoration: Positive = Field(10.0, description="weight of the restoration of the whole patch")
    weight_adversary: Positive = Field(0.001, description="weight of the adversary's score of the restored patch")
    adversary_start: Fraction = Field(
        0.5, description="fraction of the steps after which the adversary is trained and its losses are in the total"
    )
    adversary_width: Count = Field(
        64, description="channels of the adversary's first layer; its last layer has 8 times as many"
    )
    distorted_share: Annotated[float, Field(ge=0, le=0.5)] = Field(
        0.2,
        description="fraction of the blocks of a view that are cut out; the same number of other blocks is shuffled",
    )


class _Numbers(NamedTuple):
    two: Any
    orders: Tensor


class _DistortedViews(Views):
    """Two random views with blocks cut out and shuffled, ``first`` and ``second``, and the restoration target ``target``.

    The target is the first view before its intensities and blocks change.

    Args:
        geometry, recipe: As in `TwoViews`.
        block: Size of a block, voxels per axis. The patch size is a multiple of it.
    """

    def __init__(self, geometry: Geometry, recipe: Any, block: Sequence[int]) -> None:
        self.two = TwoViews(geometry, recipe)
        self.grid = [n // b for n, b in zip(geometry.patch_size, block, strict=True)]
        self.unnormalised = tuple(geometry.channels_without_zscore)
        self.cells = prod(self.grid)
        self.distorted = round(recipe.distorted_share * self.cells)

    def draw(self, random: StepRandom) -> _Numbers:
        """Return the random numbers of the views, and a random order of the blocks of each patch in each view."""
        generator = random.generator(_DISTORTION_STREAM)
        orders = [
            torch.stack([torch.randperm(self.cells, generator=generator) for _ in range(random.batch_size)])[
                random.part
            ]
            for _ in range(2)
        ]
        return _Numbers(self.two.draw(random), torch.stack(orders))

    def make(self, patches: Tensor, numbers: _Numbers, progress: Progress) -> dict[str, Tensor]:
        views = self.two.make(patches, numbers.two, progress)
        clean = self.two.spatial.apply(patches, numbers.two.spatial[0])
        first, second = (self.distort(v, order) for v, order in zip(views.values(), numbers.orders, strict=True))
        return {"first": first, "second": second, "target": standardise(clean, self.unnormalised)[0]}

    def distort(self, images: Tensor, orders: Tensor) -> Tensor:
        """Return images in which the first blocks of an order are cut out, and the same number of next blocks is rotated.

        Args:
            images: (n, C, *patch).
            orders: (n, blocks), the indices of the blocks of each image in random order.
        """
        count = self.distorted
        if not count:
            return images
        cut_out, moved = orders[:, :count], orders[:, count : 2 * count]
        _, zero = standardise(images, self.unnormalised)
        sources = torch.arange(self.cells, device=images.device).repeat(len(images), 1)
        sources = sources.scatter(1, moved, moved.roll(1, 1))
        shown = torch.ones_like(sources, dtype=torch.bool).scatter(1, cut_out, False)
        blocks = self._blocks(images)
        blocks = blocks.gather(1, sources[..., None].expand_as(blocks))
        mask = enlarge_mask(shown.view(len(images), 1, *self.grid), images.shape[2:])
        return torch.where(mask, self._images(blocks, images.shape), zero)

    def _axes(self) -> list[int]:
        """Return the order of axes in which the axes of the grid precede the channels, and the axes of a block follow them."""
        axes = len(self.grid)
        return [0, *range(2, 2 + 2 * axes, 2), 1, *range(3, 3 + 2 * axes, 2)]

    def _split(self, shape: Sequence[int]) -> list[int]:
        return [*shape[:2], *(n for g, size in zip(self.grid, shape[2:], strict=True) for n in (g, size // g))]

    def _blocks(self, images: Tensor) -> Tensor:
        """Return images (n, C, *patch) as blocks (n, cells, voxels)."""
        return images.reshape(self._split(images.shape)).permute(self._axes()).reshape(len(images), self.cells, -1)

    def _images(self, blocks: Tensor, shape: Sequence[int]) -> Tensor:
        """Return blocks (n, cells, voxels) as images of a shape. This reverts `_blocks`."""
        order = self._axes()
        split = self._split(shape)
        back = [order.index(axis) for axis in range(len(order))]
        return blocks.reshape([split[axis] for axis in order]).permute(back).reshape(shape)


class DiRA(MoCo):
    """Contrasts images with a queue, restores the whole patch, and trains an adversary to distinguish restored from real patches.

    All decoder stages are trained. `encode` computes the losses of single patches, so that processes need not exchange images.
    The adversary gets a gradient only from its own loss, which detaches the restored patch. The network's gradient passes through
    the adversary while the adversary's weights are fixed.
    """

    name = "dira"
    Config = DiRAConfig
    loss_labels = {
        **MoCo.loss_labels,
        "patch_restoration": "L_RP, restoration of the patch",
        "adversary": "L_adv, adversary of the restoration",
        "discriminator": "L_dis, training of the adversary",
    }
    view_titles = {"first": "input and query", "second": "key", "target": "restoration target"}
    constant_rate_modules = ("adversary",)
    summary = "by DiRA, contrastive, restorative and adversarial learning,"
    citations = (
        "Haghighi et al. DiRA: Discriminative, Restorative, and Adversarial Learning for Self-supervised "
        "Medical Image Analysis. CVPR 2022. arXiv:2204.10437",
    )
    tag = "contrastive-learning"

    def __init__(self, network: PretrainableNetwork, geometry: Geometry, recipe: Any) -> None:
        super().__init__(network, geometry, recipe)
        last = [network.encoder_levels[-1], *network.decoder_levels][-1]
        self.restoration_head = ReconstructionHead(last.channels, network.image_channels, last.stride)
        self.adversary = PatchAdversary(network.image_channels, geometry.patch_size, recipe.adversary_width)
        self.views = _DistortedViews(geometry, recipe, network.encoder_levels[-1].stride)

    @property
    def channels(self) -> int:
        """Return the number of channels of the bottleneck, which the contrast reads."""
        return self.network.encoder_levels[-1].channels

    @staticmethod
    def last_map(network: PretrainableNetwork, images: Tensor) -> Tensor:
        """Return the bottleneck, which the contrast reads."""
        return network.encode(images)[-1]

    @classmethod
    def plan_geometry(cls, patch_size: Sequence[int], strides: Sequence[Sequence[int]], recipe: Any) -> Geometry:
        """Return nnU-Net's own patch and all decoder stages."""
        geometry = plan_one_branch(patch_size, strides, recipe)
        if recipe.decoder_stages != AUTO:
            return geometry
        reason = f"{geometry.reason}; the whole decoder restores the patch"
        return replace(geometry, decoder_stages=len(strides) - 1, reason=reason)

    @classmethod
    def weights(cls, recipe: Any) -> dict[str, float]:
        return {
            "queue": recipe.weight_contrast,
            "patch_restoration": recipe.weight_restoration,
            "adversary": recipe.weight_adversary,
            "discriminator": 1.0,
        }

    @classmethod
    def trains_in_stages(cls, recipe: Any) -> bool:
        return recipe.adversary_start > 0

    def encode(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        maps, target = self.network.encode(views["first"]), views["target"]
        restored = self.restoration_head(self.network.decode(maps)[-1])
        own = (self.adversary.error(target, 1) + self.adversary.error(restored.detach(), 0)) / 2
        return {
            "query": maps[-1],
            "key": self.momentum_map(views["second"]),
            "patch_restoration": (at_least_float32(restored) - target).square().flatten(1).mean(1),
            "adversary": self.adversary.error(restored, 1, fixed=True),
            "discriminator": own,
        }

    def project(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return features | super().project(features)

    def losses(self, embeddings: dict[str, Tensor], positions: Tensor, progress: Progress) -> dict[str, Tensor]:
        """Return the four losses. ``total`` includes the two losses of the adversary from ``adversary_start`` on."""
        found = super().losses(embeddings, positions, progress)
        found |= {name: embeddings[name].mean() for name in self.loss_labels if name not in found}
        is_joint = progress.step >= self.recipe.adversary_start * progress.steps
        trained = {
            n: w for n, w in self.weights(self.recipe).items() if is_joint or n in ("queue", "patch_restoration")
        }
        return found | {"total": torch.stack([weight * found[name] for name, weight in trained.items()]).sum()}
