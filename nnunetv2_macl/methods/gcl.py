"""GCL: contrast of images by their partition of the volume, then contrast of regions within an image.

Source: Chaitanya et al., NeurIPS 2020, https://arxiv.org/abs/2006.10511. Strategy G^D of the image level trains the encoder, and
strategy L^R of the region level trains decoder stages while the encoder is frozen. Departures: the head of the image level reads
the pooled bottleneck, standardised over the batch, because a head on the flattened bottleneck would have more weights than the
encoder of an nnU-Net plan. Batches hold random patches instead of one image from each partition of each volume. In 3D, the
centre of a patch determines its partition.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from nnunetv2_macl.errors import UserError
from nnunetv2_macl.losses import PartitionContrastiveLoss, partition_masks, region_contrast
from nnunetv2_macl.methods.base import Geometry, Progress, StepRandom, Views
from nnunetv2_macl.methods.config import AUTO
from nnunetv2_macl.methods.image_level import TwoViews
from nnunetv2_macl.methods.simclr import SimCLR, SimCLRConfig
from nnunetv2_macl.networks.base import PretrainableNetwork

# Regions and views draw from separate random streams.
_REGION_STREAM = 6
# Number of compared regions in a map, number of negatives of a region in each map, and edge of a region in voxels of the map.
_REGIONS, _NEGATIVES, _REGION_EDGE = 13, 5, 3
# The fraction of the decoder stages that is trained: 3 of 5 in the paper.
_TRAINED_DECODER = 3 / 5
# If an anchor has fewer negatives on average, most patches have none.
_FEW_NEGATIVES = 1

_CONV = {2: nn.Conv2d, 3: nn.Conv3d}


class GCLImageConfig(SimCLRConfig):
    """The recipe keys of the image level of GCL."""

    partitions: Annotated[int, Field(ge=2)] = Field(
        4,
        description="S, number of partitions of a volume along its first axis; images from the same partition are positives, and "
        "images from other partitions negatives",
    )


class GCLImage(SimCLR):
    """Contrasts whole images. The partition of the volume determines which images are positives and which are negatives."""

    name = "gcl_image"
    Config = GCLImageConfig
    loss_labels = {"partition": "L_part, image level"}
    referenced_losses = ("partition",)
    summary = "by the image level of GCL, contrastive learning with partitions of a volume,"
    citations = (
        "Chaitanya et al. Contrastive learning of global and local features for medical image segmentation "
        "with limited annotations. NeurIPS 2020. arXiv:2006.10511",
    )

    def __init__(self, network: PretrainableNetwork, geometry: Geometry, recipe: Any) -> None:
        super().__init__(network, geometry, recipe)
        self.loss = PartitionContrastiveLoss(recipe.partitions, recipe.temperature)

    def measure(self, embeddings: dict[str, Tensor], positions: Tensor) -> dict[str, Tensor]:
        """Return the mean numbers of positives of an anchor (its own other view included) and of negatives."""
        positives, negatives = partition_masks(positions, self.recipe.partitions)
        return {"positives": positives.sum(1).float().mean(), "negatives": negatives.sum(1).float().mean()}

    @classmethod
    def statistics(cls, recipe: Any) -> list[str]:
        return [*super().statistics(recipe), "negatives"]

    @classmethod
    def reference_lines(cls, recipe: Any, batch_size: int, means: Mapping[str, float]) -> dict[str, float]:
        positives = max(1.0, means.get("positives", 1.0))
        # At collapse, the positive and all negatives have the same similarity.
        collapse = math.log1p(means.get("negatives", 2.0 * batch_size - 2))
        return {"collapse": collapse, "own_view_only": (1 - 1 / positives) * collapse, "all_found": 0.0}

    @classmethod
    def collapse_reasons(
        cls, means: Mapping[str, float], before: Mapping[str, float], references: Mapping[str, float]
    ) -> list[str]:
        """Return the reasons of `ContrastiveMethod`, or that nearly all patches are in one partition of their volumes."""
        # The region level, which the second half of GCL trains, has no partitions.
        if "partition" in means and means.get("negatives", math.inf) < _FEW_NEGATIVES:
            return [
                f"an anchor has {means['negatives']:.2f} negatives on average, because nearly all patches are in one partition "
                "of their volumes: the patch is nearly as long as the volumes on the first axis"
            ]
        return super().collapse_reasons(means, before, references)

    @classmethod
    def collapse_advice(cls, recipe: Any) -> list[str]:
        return [f"more partitions (now {recipe.partitions})", *super().collapse_advice(recipe)]


class GCLConfig(GCLImageConfig):
    """The recipe keys of GCL."""

    intensity: Annotated[float, Field(gt=0, le=2)] = Field(
        1.0,
        description="strength of random gamma, contrast, brightness, bias field, noise and blur, which are the only difference "
        "between the two views of the region level",
    )


class _Numbers(NamedTuple):
    views: Any
    regions: Tensor


class _RegionViews(Views):
    """Two random views of each patch in the first half of a run. In the second half, only their intensities differ.

    Args:
        geometry, recipe: As in `TwoViews`.
        cells: Number of regions in a map.
        regions: Number of compared regions.
    """

    def __init__(self, geometry: Geometry, recipe: Any, cells: int, regions: int) -> None:
        self.two = TwoViews(geometry, recipe)
        self.cells, self.regions = cells, regions

    def draw(self, random: StepRandom) -> _Numbers:
        generator = random.generator(_REGION_STREAM)
        orders = [torch.randperm(self.cells, generator=generator) for _ in range(random.batch_size)]
        return _Numbers(self.two.draw(random), torch.stack(orders)[random.part, : self.regions])

    def make(self, patches: Tensor, numbers: _Numbers, progress: Progress) -> dict[str, Tensor]:
        """Return ``first`` and ``second``, and in the second half ``regions``, the indices of the regions to compare."""
        if not progress.is_second_half:
            return self.two.make(patches, numbers.views, progress)
        first, second = (self.two.intensity.apply(patches, changes) for changes in numbers.views.intensity)
        return {"first": first, "second": second, "regions": numbers.regions}


class RegionHead(nn.Sequential):
    """Two convolutions of size 1 and a linear layer on each region: (N, C, *grid) -> (N, cells, embedding_dim).

    The linear layer reads all voxels of a region. It is a convolution whose stride equals its kernel size.

    Args:
        channels: C.
        embedding_dim: Length of the vector of a region.
        edge: Edge of a region, voxels of the map.
        axes: 2 or 3.
    """

    def __init__(self, channels: int, embedding_dim: int, edge: int, axes: int) -> None:
        conv = _CONV[axes]
        super().__init__(
            conv(channels, channels, 1),
            nn.ReLU(inplace=True),
            conv(channels, channels, 1),
            conv(channels, embedding_dim, edge, stride=edge, bias=False),
        )

    def forward(self, maps: Tensor) -> Tensor:
        return super().forward(maps).flatten(2).transpose(1, 2)


def _region_edge(grid: Sequence[int]) -> tuple[int, int]:
    """Return the edge of a region and the number of regions of a map. The edge is 3, or smaller if a map had too few regions."""
    for edge in range(_REGION_EDGE, 0, -1):
        cells = prod(n // edge for n in grid)
        if cells >= _REGIONS or edge == 1:
            break
    return edge, cells


class GCL(GCLImage):
    """Contrasts images by partitions of volumes to train the encoder, then regions of an image to train the decoder.

    The first half of the steps trains the encoder. The second half trains the decoder stages while the encoder is frozen. One
    schedule of the learning rate covers both halves, whereas the paper trains each level with a schedule of its own.
    """

    name = "gcl"
    Config = GCLConfig
    loss_labels = {**GCLImage.loss_labels, "region": "L_reg, region level"}
    summary = "by GCL, contrastive learning of images and regions,"

    def __init__(self, network: PretrainableNetwork, geometry: Geometry, recipe: Any) -> None:
        super().__init__(network, geometry, recipe)
        level = network.decoder_levels[-1]
        grid = [n // stride for n, stride in zip(geometry.patch_size, level.stride, strict=True)]
        edge, cells = _region_edge(grid)
        self.region_head = RegionHead(level.channels, recipe.embedding_dim, edge, len(grid))
        self.views = _RegionViews(geometry, recipe, cells, min(cells, _REGIONS))

    @property
    def channels(self) -> int:
        """Return the number of channels of the bottleneck. The image level reads it because it trains only the encoder."""
        return self.network.encoder_levels[-1].channels

    @classmethod
    def plan_geometry(cls, patch_size: Sequence[int], strides: Sequence[Sequence[int]], recipe: Any) -> Geometry:
        """Return nnU-Net's own patch and three fifths of the decoder stages.

        Raises:
            UserError: The recipe trains no decoder stage, or more than the network has.
        """
        geometry = super().plan_geometry(patch_size, strides, recipe)
        if recipe.decoder_stages == 0:
            raise UserError(
                "decoder_stages is 0, and the region level of the method gcl trains decoder stages. Set decoder_stages to at "
                "least 1, or use the method gcl_image, which has no region level."
            )
        if recipe.decoder_stages != AUTO:
            return geometry
        if len(strides) == 1:
            raise UserError(
                "This network has no decoder stage that can be pre-trained, and the region level of the method gcl trains "
                "decoder stages. Use the method gcl_image, which has no region level: -recipe gcl_image"
            )
        stages = max(1, round(_TRAINED_DECODER * (len(strides) - 1)))
        reason = f"{geometry.reason}; regions are compared after {stages} decoder stages, three fifths of them as in the paper"
        return replace(geometry, decoder_stages=stages, reason=reason)

    @classmethod
    def trains_in_stages(cls, recipe: Any) -> bool:
        return True

    def encode(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        both = torch.cat((views["first"], views["second"]))
        if "regions" not in views:
            first, second = self.network.encode(both)[-1].chunk(2)
            return {"first": first, "second": second}
        # The encoder is frozen in this half, see `withhold_gradients`.
        with torch.no_grad():
            maps = self.network.encode(both)
        regions = self.region_head(self.network.decode(maps)[-1])
        chosen = views["regions"].repeat(2, 1)[..., None].expand(-1, -1, regions.shape[-1])
        first, second = regions.gather(1, chosen).chunk(2)
        return {"regions_first": first, "regions_second": second}

    def project(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return super().project(features) if "first" in features else features

    def losses(self, embeddings: dict[str, Tensor], positions: Tensor, progress: Progress) -> dict[str, Tensor]:
        """Return the loss of the level that this half of the run trains, and ``total``."""
        if "first" in embeddings:
            return super().losses({name: embeddings[name] for name in ("first", "second")}, positions, progress)
        first, second = embeddings["regions_first"], embeddings["regions_second"]
        loss = region_contrast(first, second, min(_NEGATIVES, first.shape[1] - 1), self.recipe.temperature)
        return {"region": loss, "total": loss}

    def withhold_gradients(self, progress: Progress) -> None:
        """Freeze the encoder in the second half, also for restoration. Without a gradient, not even weight decay changes it."""
        if progress.is_second_half:
            for parameter in self.network.encoder.parameters():
                parameter.grad = None

    def representations(self, embeddings: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the image-level vectors; in the second half, the vectors of one region of each patch."""
        if "first" in embeddings:
            return super().representations(embeddings)
        return embeddings["regions_first"][:, 0], embeddings["regions_second"][:, 0]
