"""Contrast of voxels: the embeddings of a voxel in two crops are similar to each other and dissimilar to all other voxels.

Source: Goncharov et al., vox2vec, MICCAI 2023, https://arxiv.org/abs/2307.14725 (the features of a voxel are those of all levels,
concatenated), for the decoder of any U-Net; Pinheiro et al., VADeR, NeurIPS 2020, https://arxiv.org/abs/2011.05499; Wang et al.,
DenseCL, CVPR 2021, https://arxiv.org/abs/2011.09157. Departures: features are standardised over all voxels before the head. Crops
are cut out of nnU-Net's patch and enlarged to its size, whereas vox2vec cuts them out of the volume.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from nnunetv2_macl.losses import PositionalContrastiveLoss, reference_values
from nnunetv2_macl.methods.base import Geometry, Progress, StepRandom, Views
from nnunetv2_macl.methods.branches import plan_one_branch
from nnunetv2_macl.methods.config import Count, FactorRange, MethodConfig, Positive
from nnunetv2_macl.methods.contrast import ContrastiveMethod
from nnunetv2_macl.methods.heads import GlobalProjectionHead
from nnunetv2_macl.networks.base import PretrainableNetwork
from nnunetv2_macl.views import Crops, IntensityNumbers, RandomCrops, RandomIntensity

# Crops draw from a separate random stream, so that several methods can be trained together.
_CROPS = 7


class VoxelConfig(MethodConfig):
    """The recipe keys of voxel contrast."""

    weight_voxel: Positive = Field(1.0, description="weight of the voxel-level loss L_v")
    temperature: Positive = Field(0.1, description="τ")
    embedding_dim: Annotated[int, Field(ge=2)] = Field(128, description="length of the compared vectors")
    voxels: Count = Field(
        1024, description="number of compared voxels in a batch: the same number in each patch, and at least one"
    )
    zoom: FactorRange[Annotated[float, Field(ge=1, le=2)]] = Field(
        [1.0, 1.6], description="smallest and largest factor by which a crop is enlarged; the smaller one comes first"
    )
    mirroring: bool = Field(True, description="whether to mirror crops at random")
    intensity: Annotated[float, Field(ge=0, le=2)] = Field(
        1.0, description="strength of random gamma, contrast, brightness, bias field, noise and blur; `0` disables them"
    )


def _voxels_per_patch(recipe: Any, batch_size: int) -> int:
    """Return P, the number of compared voxels in a patch."""
    return max(1, recipe.voxels // batch_size)


class _Numbers(NamedTuple):
    first: Crops
    second: Crops
    points: Tensor
    intensity: list[IntensityNumbers]


class TwoCrops(Views):
    """Two crops of each patch, ``first`` and ``second``, enlarged to the size of the patch, and points that both crops show.

    ``first_points`` and ``second_points`` are the coordinates of the same P voxels in both crops, (n, P, A), as
    `torch.nn.functional.grid_sample` takes them without aligned corners.
    """

    def __init__(self, geometry: Geometry, recipe: Any) -> None:
        self.crops = RandomCrops(recipe.zoom, mirroring=recipe.mirroring)
        self.intensity = RandomIntensity(recipe.intensity, geometry.channels_without_zscore)
        self.recipe = recipe

    def draw(self, random: StepRandom) -> _Numbers:
        generator, axes = random.generator(_CROPS), len(random.patch_size)
        first, second = (self.crops.draw(random.batch_size, axes, generator) for _ in range(2))
        points = self.crops.draw_shared_points(
            first, second, _voxels_per_patch(self.recipe, random.batch_size), generator
        )
        intensity = [
            random.draw_intensity(self.intensity, random.generator(_CROPS, number + 1))
            for number in range(2 if self.intensity.strength else 0)
        ]
        first, second = (Crops(crops.centres[random.part], crops.reaches[random.part]) for crops in (first, second))
        return _Numbers(first, second, points[random.part], intensity)

    def make(self, patches: Tensor, numbers: _Numbers, progress: Progress) -> dict[str, Tensor]:
        views = [self.crops.apply(patches, crops) for crops in (numbers.first, numbers.second)]
        if numbers.intensity:
            views = [self.intensity.apply(v, changes) for v, changes in zip(views, numbers.intensity, strict=True)]
        # Coordinate 1 is the centre of the outermost voxel in crops (`align_corners`), and its outer edge in maps.
        inside = patches.new_tensor([1 - 1 / n for n in reversed(patches.shape[2:])])
        points = [crops.locate(numbers.points).to(patches) * inside for crops in (numbers.first, numbers.second)]
        return {"first": views[0], "second": views[1], "first_points": points[0], "second_points": points[1]}


def features_at(maps: Sequence[Tensor], points: Tensor) -> Tensor:
    """Return the linearly interpolated features of maps at points, concatenated: (N, P, channels of all maps).

    Args:
        maps: (N, C, *grid) each, with any grid.
        points: (N, P, A), from -1 to 1 between the outer edges of a map, with the last axis first.
    """
    axes = points.shape[-1]
    places = points.view(len(points), *[1] * (axes - 1), *points.shape[1:])
    found = [
        F.grid_sample(m.to(points.dtype), places, mode="bilinear", padding_mode="border", align_corners=False)
        for m in maps
    ]
    return torch.cat(found, 1).flatten(2).transpose(1, 2)


class Voxel(ContrastiveMethod):
    """Contrasts voxels within and between images. The positive of a voxel is the same voxel in the other crop.

    The head reads the bottleneck and the maps of all trained decoder stages at the voxel.
    """

    name = "voxel"
    Config: ClassVar[type[MethodConfig]] = VoxelConfig
    loss_labels = {"voxel": "L_v, voxel level"}
    referenced_losses = ("voxel",)
    view_titles = {"first": "first crop", "second": "second crop"}
    summary = "by contrastive learning of voxels,"
    citations = (
        "Goncharov et al. vox2vec: A Framework for Self-supervised Contrastive Learning of Voxel-Level "
        "Representations in Medical Images. MICCAI 2023. arXiv:2307.14725",
    )

    def __init__(self, network: PretrainableNetwork, geometry: Geometry, recipe: Any) -> None:
        super().__init__(network, geometry, recipe)
        channels = sum(level.channels for level in (network.encoder_levels[-1], *network.decoder_levels))
        self.voxel_head = GlobalProjectionHead(channels, recipe.embedding_dim)
        self.loss = PositionalContrastiveLoss(threshold=0.0, **self.loss_settings(recipe))
        self.views: TwoCrops = TwoCrops(geometry, recipe)

    @classmethod
    def plan_geometry(cls, patch_size: Sequence[int], strides: Sequence[Sequence[int]], recipe: Any) -> Geometry:
        """Return nnU-Net's own patch and all decoder stages but the last, which has the largest maps."""
        stages = len(strides) - 1  # a network with one map has none
        return plan_one_branch(patch_size, strides, recipe, min(stages, max(1, stages - 1)))

    @classmethod
    def weights(cls, recipe: Any) -> dict[str, float]:
        return {"voxel": recipe.weight_voxel}

    def encode(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        maps = self.network.decode(self.network.encode(torch.cat((views["first"], views["second"]))))
        features = features_at(maps, torch.cat((views["first_points"], views["second_points"])))
        first, second = features.chunk(2)
        return {"first": first, "second": second}

    def project(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        # The batch norm of the head standardises both crops together, so that their scales stay comparable.
        both = torch.cat((features["first"], features["second"]))
        # The head pools over space, so each voxel is passed as a map of one location.
        vectors = self.voxel_head(both.flatten(0, 1)[..., None]).view(*both.shape[:2], -1)
        first, second = vectors.chunk(2)
        return {"first": first, "second": second}

    def losses(self, embeddings: dict[str, Tensor], positions: Tensor, progress: Progress) -> dict[str, Tensor]:
        """Return the InfoNCE loss over all voxels of the batch. Each voxel serves as anchor."""
        first, second = (embeddings[crop].flatten(0, 1) for crop in ("first", "second"))
        loss = self.loss(first, second, positions.new_zeros(len(first)))
        return {"voxel": loss, "total": self.recipe.weight_voxel * loss}

    def measure(self, embeddings: dict[str, Tensor], positions: Tensor) -> dict[str, Tensor]:
        return {}

    def representations(self, embeddings: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the vectors of one voxel of each patch."""
        return embeddings["first"][:, 0], embeddings["second"][:, 0]

    @classmethod
    def statistics(cls, recipe: Any) -> list[str]:
        return []

    @classmethod
    def reference_lines(cls, recipe: Any, batch_size: int, means: Mapping[str, float]) -> dict[str, float]:
        voxels = batch_size * _voxels_per_patch(recipe, batch_size)
        return reference_values(voxels, 1.0, **cls.loss_settings(recipe))._asdict()

    @classmethod
    def collapse_advice(cls, recipe: Any) -> list[str]:
        return [f"another temperature (now {recipe.temperature:g})"]
